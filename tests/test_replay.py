"""replay.py: the buffers' laws as distributions, the strategies, the ratio, and what algorithms remember."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

import replay
from replay import AdaptiveReplayCL, Buffer, ReplayCL, TaskRef, add, sample


def inclusion_counts(capacity, offers, runs, seed=0):
    rng = np.random.default_rng(seed)
    kept = np.zeros(offers)
    for _ in range(runs):
        buffer = Buffer(capacity)
        for item in range(offers):
            add(buffer, item, rng=rng)
        kept[buffer.items] += 1
    return kept


def test_reservoir_keeps_every_item_alike():
    capacity, offers, runs = 20, 200, 3000
    kept = inclusion_counts(capacity, offers, runs)
    share = capacity / offers
    # Each run keeps exactly `capacity` items, so the statistic below is chi-square with offers - 1 degrees of freedom.
    chi_square = ((kept - runs * share) ** 2).sum() / (runs * share * (1 - share)) * (offers - 1) / offers
    assert chi_square < 199 + 4 * np.sqrt(2 * 199)


def test_reservoir_is_not_off_by_one():
    kept = inclusion_counts(2, 20, 6000) / 6000
    # Drawing from 0..n-1 instead of 0..n would keep item 0 with 0.053; the deviation here is 0.004.
    assert abs(kept[0] - 0.1) < 0.016
    assert abs(kept[-1] - 0.1) < 0.016


def test_full_buffer_keeps_its_size_and_parallel_lists():
    rng = np.random.default_rng(0)
    buffer = Buffer(3)
    for item in range(50):
        add(buffer, item, label=item % 2, loss=item / 10, reward=item / 50, rng=rng)
    assert buffer.seen == 50
    assert len(buffer.items) == 3
    for i, item in enumerate(buffer.items):
        row = (buffer.labels[i], buffer.losses[i], buffer.rewards[i], buffer.order[i])
        assert row == (item % 2, item / 10, item / 50, item)


def filled(rewards, labels=None):
    rng = np.random.default_rng(0)
    buffer = Buffer(len(rewards))
    for i, reward in enumerate(rewards):
        add(buffer, f"item{i}", label=labels[i] if labels else None, reward=reward, rng=rng)
    return buffer


def test_random_is_uniform_and_without_replacement():
    buffer, rng = filled([0.0] * 10), np.random.default_rng(1)
    counts = np.zeros(10)
    for _ in range(3000):
        drawn = sample(buffer, 3, rng=rng)
        assert len(set(drawn)) == 3
        counts[drawn] += 1
    assert np.abs(counts / 3000 - 0.3).max() < 0.035
    assert sorted(sample(buffer, 25, rng=rng)).count(0) in (2, 3)


def test_high_reward_draws_only_successes_if_there_are_any():
    rng = np.random.default_rng(0)
    buffer = filled([0.0, 1.0, 0.0, 0.5])
    assert set(sample(buffer, 50, strategy="high_reward", rng=rng)) == {1, 3}
    assert set(sample(filled([0.0, 0.0]), 20, strategy="high_reward", rng=rng)) == {0, 1}


def test_recent_is_by_time_of_offer_not_by_slot():
    buffer = Buffer(3, ["new", "old", "mid"], [None] * 3, [0.0] * 3, [0.0] * 3, [9, 1, 5], seen=10)
    assert sample(buffer, 2, strategy="recent", rng=np.random.default_rng(0)) == [0, 2]


def test_balanced_gives_rare_labels_their_share():
    buffer, rng = filled([0.0] * 20, labels=["a"] * 18 + ["b"] * 2), np.random.default_rng(0)
    drawn = [sample(buffer, 1, strategy="balanced", rng=rng)[0] for _ in range(2000)]
    assert abs(np.mean([buffer.labels[i] == "b" for i in drawn]) - 0.5) < 0.045
    labels = [buffer.labels[i] for i in sample(buffer, 4, strategy="balanced", rng=rng)]
    assert sorted(labels) == ["a", "a", "b", "b"]


@pytest.mark.parametrize("new, ratio", [(4, 0.1), (4, 0.2), (4, 0.5), (1, 0.75), (8, 0.0)])
def test_replay_count_makes_the_ratio_the_share_of_the_mixed_batch(new, ratio):
    rng = np.random.default_rng(0)
    drawn = np.array([replay.replay_count(new, ratio, rng) for _ in range(20000)])
    expected = new * ratio / (1 - ratio)
    assert abs(drawn.mean() - expected) < 0.02
    assert set(drawn) <= {int(np.floor(expected)), int(np.ceil(expected))}


def test_adapt_ratio_rises_falls_and_stays_within_bounds():
    limits = {"threshold": 0.1, "rate": 0.1, "minimum": 0.1, "maximum": 0.5}
    assert replay.adapt_ratio(0.2, 0.3, **limits) == pytest.approx(0.3)
    assert replay.adapt_ratio(0.2, 0.1, **limits) == pytest.approx(0.19)
    assert replay.adapt_ratio(0.45, 0.3, **limits) == 0.5
    assert replay.adapt_ratio(0.1, 0.0, **limits) == 0.1


def step(algorithm, *groups, domain):
    """Offers finished groups (task, rewards) to the algorithm, as train.py does after a step."""
    groups = [SimpleNamespace(task=t, rewards=r, replayed=t.domain != domain) for t, r in groups]
    algorithm.post_step_hook(SimpleNamespace(groups=groups), domain)


def test_replay_offers_a_task_once_and_refreshes_its_reward():
    algorithm = ReplayCL(min_buffer_size=1)
    task = TaskRef("airline", "1")
    step(algorithm, (task, [0.0, None]), domain="airline")
    step(algorithm, (task, [1.0, 0.0]), domain="airline")
    step(algorithm, (task, [None, None]), domain="airline")  # nothing valid: nothing learnt of it
    buffer = algorithm.buffers["airline"]
    assert (buffer.items, buffer.rewards, buffer.seen) == ([task], [0.5], 1)


def test_augment_batch_replays_previous_domains_only_and_evenly():
    algorithm = ReplayCL(replay_ratio=0.5, min_buffer_size=2)
    for i in range(4):
        step(algorithm, (TaskRef("airline", str(i)), [1.0]), domain="airline")
        step(algorithm, (TaskRef("retail", str(i)), [1.0]), domain="retail")
    step(algorithm, (TaskRef("mock", "0"), [1.0]), domain="mock")  # below min_buffer_size
    new = [TaskRef("telecom", str(i)) for i in range(4)]
    batch = algorithm.augment_batch(new, "telecom")
    assert batch[:4] == new
    assert sorted(task.domain for task in batch[4:]) == ["airline"] * 2 + ["retail"] * 2
    assert algorithm.get_statistics()["replayed per domain"] == {"airline": 2, "retail": 2}
    assert {task.domain for task in algorithm.augment_batch(new, "airline")[4:]} == {"retail"}


def test_latest_domain_only():
    algorithm = ReplayCL(replay_ratio=0.5, min_buffer_size=1, replay_all_domains=False)
    for domain in ("airline", "retail"):
        step(algorithm, (TaskRef(domain, "0"), [1.0]), domain=domain)
    batch = algorithm.augment_batch([TaskRef("telecom", "0")] * 4, "telecom")
    assert {task.domain for task in batch[4:]} == {"retail"}


def test_adaptive_ratio_follows_the_drop():
    algorithm = AdaptiveReplayCL(replay_ratio=0.2, min_buffer_size=1)
    old, new = TaskRef("airline", "0"), TaskRef("retail", "0")
    step(algorithm, (old, [1.0, 0.6]), domain="airline")
    step(algorithm, (new, [0.0]), (old, [0.8]), domain="retail")
    assert algorithm.ratio == pytest.approx(0.19)
    step(algorithm, (new, [0.0]), (old, [0.0, None]), domain="retail")  # 0.8 -> 0.56: more than the threshold
    assert algorithm.ratio == pytest.approx(0.29)
    assert algorithm.get_statistics()["drop from best"] == {"airline": 0.24, "retail": 0.0}
    step(algorithm, (new, [0.0]), domain="retail")  # nothing replayed, nothing known
    assert algorithm.ratio == pytest.approx(0.29)
    step(algorithm, (new, [0.0]), (old, [None]), domain="retail")  # nothing valid: as before
    assert algorithm.ratio == pytest.approx(0.39)
    algorithm.post_task_hook(None, "retail")
    assert algorithm.ratio == 0.2


@pytest.mark.parametrize("kind", [ReplayCL, AdaptiveReplayCL])
def test_state_survives_json(kind):
    algorithm = kind(replay_ratio=0.4, min_buffer_size=1, replay_buffer_size=3, seed=5)
    for i in range(6):
        step(algorithm, (TaskRef("airline", str(i)), [i / 6]), domain="airline")
    twin = kind(replay_ratio=0.1, min_buffer_size=1, replay_buffer_size=3, seed=99)
    twin.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    new = [TaskRef("retail", "0")] * 3
    for _ in range(5):
        assert twin.augment_batch(new, "retail") == algorithm.augment_batch(new, "retail")
    assert twin.state_dict() == algorithm.state_dict()


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda rng: Buffer(0), "capacity"),
        (lambda rng: Buffer(2, items=[1]), "equally long"),
        (lambda rng: add(Buffer(2), 1, policy="magic", rng=rng), "magic"),
        (lambda rng: add(Buffer(2), 1, loss=float("nan"), rng=rng), "finite"),
        (lambda rng: sample(Buffer(2), 1, strategy="magic", rng=rng), "magic"),
        (lambda rng: replay.replay_count(4, 1.0, rng), "ratio"),
        (lambda rng: ReplayCL(replay_ratio=-0.1), "replay_ratio"),
        (lambda rng: AdaptiveReplayCL(min_replay_ratio=0.6, max_replay_ratio=0.5), "minimum"),
        (lambda rng: replay.load_algorithm("magic"), "magic"),
        (lambda rng: replay.load_algorithm("nowhere.py:Magic"), "nowhere.py"),
        (lambda rng: replay.load_algorithm("replay.py:Magic"), "Magic"),
    ],
)
def test_bad_input_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(np.random.default_rng(0))
