"""replay.py: the buffers' laws as distributions, the strategies, the ratio, and what algorithms remember."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import replay
from experiments import adaptive
from grpo import TaskRef, Trajectory
from replay import AdaptiveReplayCL, Buffer, ReplayCL, TrajectoryBuffer, add, sample


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


def draws(slot, n, runs=20_000, seed=0):
    """How often each of n slots was drawn, as a share."""
    rng = np.random.default_rng(seed)
    return np.bincount([slot(rng) for _ in range(runs)], minlength=n) / runs


def near(found, expected, runs=20_000):
    """Within five standard deviations everywhere."""
    expected = np.asarray(expected)
    return (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / runs) + 1e-12).all()


def test_brs_draws_from_the_fullest_labels_alone():
    # Two labels tie, 0 among them: each is chosen half the time, and within it every item alike.
    found = draws(lambda rng: replay.brs_slot([0, "a", 0, "a", 7, 0, "a"], rng), 7)
    assert near(found, [1 / 6, 1 / 6, 1 / 6, 1 / 6, 0, 1 / 6, 1 / 6])


def test_brs_is_flat_for_plentiful_labels():
    kept, runs = np.zeros(5), 60
    rng = np.random.default_rng(0)
    for _ in range(runs):
        buffer = Buffer(100)
        for item in range(1000):  # five labels, 0 among them, one after the other
            add(buffer, item, label=item // 200, policy="brs", rng=rng)
        kept += np.bincount(buffer.labels, minlength=5) / runs
    assert np.abs(kept - 20).max() < 0.5


LOSSES = [0.3, 1.0, 0.1, 0.6]


@pytest.mark.parametrize(
    "scaling, losses, weights",
    [
        ("minmax", LOSSES, [1.0 - x + 0.9 / 4 for x in LOSSES]),
        ("inverse", LOSSES, [1 / (x + 1e-8) for x in LOSSES]),
        ("inverse", [-0.1, 0.4, 0.9], [1 / 1e-8, 1 / 0.5, 1.0]),  # raised by 0.1
        ("rank", LOSSES, [3, 1, 4, 2]),
        ("rank", [0.5, 0.2, 0.5], [1.5, 3, 1.5]),
    ],
)
def test_lars_weights_are_the_formula(scaling, losses, weights):
    found = draws(lambda rng: replay.lars_slot(losses, rng, scaling), len(losses))
    assert near(found, np.array(weights) / sum(weights))


@pytest.mark.parametrize("scaling, easy", [("minmax", 0.5), ("rank", 0.75)])
def test_an_outlier_hides_the_other_losses_from_minmax_and_not_from_rank(scaling, easy):
    """Of 100 losses between 0 and 1 and one of 100, the share of victims from the lower half."""
    losses = [*np.linspace(0, 1, 100), 100.0]
    found = draws(lambda rng: replay.lars_slot(losses, rng, scaling), 101)
    assert abs(found[:50].sum() - easy) < 0.02


def by_lars(scaling):
    return lambda losses, rng: replay.lars_slot(losses, rng, scaling)


def by_labrs(scaling):
    return lambda losses, rng: replay.labrs_slot(losses, ["a"] * len(losses), rng, scaling)


@pytest.mark.parametrize("slot", [by_lars("minmax"), by_lars("inverse"), by_lars("rank")])
@pytest.mark.parametrize("loss", [0.7, 0.0, -0.3])
def test_equal_losses_are_the_reservoirs_choice(slot, loss):
    assert near(draws(lambda rng: slot([loss] * 6, rng), 6), [1 / 6] * 6)


@pytest.mark.parametrize("scaling", ["balanced", "released", "product"])
def test_labrs_weights_are_the_formulas(scaling):
    losses, labels = [0.0, 2.0, 0.5, 1.0, 1.0], ["a", "a", "a", "b", "c"]
    sizes, low = np.array([3.0, 3.0, 3.0, 1.0, 1.0]), 2.0 - np.array(losses)
    score = 0.5 * -np.array(losses) / (np.mean(losses) * sizes.mean()) + 0.5 * sizes
    weights = {
        "balanced": low / 2 + (sizes == 3) + 1 / 5,
        "released": (score - score.min()) / (score.max() - score.min()) + 1 / 5,
        "product": (low + 2 / 5) * sizes,
    }[scaling]
    found = draws(lambda rng: replay.labrs_slot(losses, labels, rng, scaling), 5)
    assert near(found, weights / weights.sum()) and found.min() > 0
    equal = draws(lambda rng: by_labrs(scaling)([0.7] * 6, rng), 6)
    assert near(equal, [1 / 6] * 6)


@pytest.mark.parametrize("policy, low, high", [("reservoir", 0.46, 0.54), ("lars", 0.96, 1.0)])
def test_share_of_hard_items(policy, low, high):
    rng, shares = np.random.default_rng(0), []
    for _ in range(30):
        buffer = Buffer(50)
        for item in range(1000):
            add(buffer, item, loss=[0.1, 1.0][rng.integers(2)], policy=policy, rng=rng)
        shares.append(np.mean(np.array(buffer.losses) == 1.0))
    assert low <= np.mean(shares) <= high


def test_refreshed_losses_change_who_goes():
    rng, buffer = np.random.default_rng(0), Buffer(4)
    for item, loss in enumerate([0.1, 1.0, 1.0, 1.0]):
        add(buffer, item, loss=loss, policy="lars", rng=rng)
    before = draws(lambda rng: replay.lars_slot(buffer.losses, rng), 4)
    replay.update_losses(buffer, [0, 2], [1.0, 0.1])
    after = draws(lambda rng: replay.lars_slot(buffer.losses, rng), 4)
    assert before.argmax() == 0 and after.argmax() == 2
    assert buffer.losses == [1.0, 1.0, 0.1, 1.0]


@pytest.mark.parametrize("policy", replay.MAKE_ROOM)
def test_every_policy_has_the_reservoirs_gate(policy):
    """Of the last offer to a full buffer, a share of capacity / offers gets in, whatever it is."""
    accepted = 0
    for run in range(2000):
        rng, buffer = np.random.default_rng(run), Buffer(4)
        for item in range(16):
            slot = add(buffer, item, label=item % 2, loss=item, policy=policy, rng=rng)
        accepted += slot is not None
    assert abs(accepted / 2000 - 0.25) < 0.05


def test_random_overwrites_any_slot_with_every_item():
    """An item survives k later offers to a full buffer with probability (1 - 1/M)^k; the last is always there."""
    M, N, runs = 4, 12, 5000
    kept = np.zeros(N)
    for run in range(runs):
        rng, buffer = np.random.default_rng(run), Buffer(M)
        for item in range(N):
            assert add(buffer, item, policy="random", rng=rng) is not None
        kept[buffer.items] += 1
    expected = np.array([(1 - 1 / M) ** (N - max(item + 1, M)) for item in range(N)])
    assert near(kept / runs, expected, runs)


def test_recent_keeps_the_latest():
    rng, buffer = np.random.default_rng(0), Buffer(3)
    for item in range(8):
        add(buffer, item, policy="recent", rng=rng)
    assert sorted(buffer.items) == [5, 6, 7]


def test_bad_losses_and_lengths_are_named():
    rng, buffer = np.random.default_rng(0), Buffer(2)
    add(buffer, "x", loss=1.0, rng=rng)
    add(buffer, "y", loss=2.0, rng=rng)
    for call, message in (
        (lambda: replay.lars_slot([1.0, float("nan")], rng), "finite, got nan"),
        (lambda: replay.labrs_slot([1.0], ["a", "b"], rng), "1 losses for 2 labels"),
        (lambda: replay.labrs_slot([1.0], ["a"], rng, "best"), "unknown scaling 'best'"),
        (lambda: replay.lars_slot([1.0], rng, "best"), "unknown scaling 'best'"),
        (lambda: replay.update_losses(buffer, [0, 1], [1.0]), "1 losses for 2 items"),
        (lambda: replay.update_losses(buffer, [0, 1], [3.0, float("inf")]), "finite, got inf"),
        (lambda: add(buffer, "z", loss=float("nan"), policy="lars", rng=rng), "finite"),
        (lambda: Buffer(-1), "at least 1, got -1"),
        (lambda: Buffer(3, ["a"], [], [], [], []), "equally long"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert buffer.losses == [1.0, 2.0] and buffer.items == ["x", "y"]


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


@pytest.mark.parametrize(
    "ratio, drop, error, adapted",
    [
        (0.2, 0.3, 0.0, 0.3),
        (0.45, 0.3, 0.0, 0.5),  # the maximum
        (0.2, 0.3, 0.19, 0.2),  # the drop may be chance
        (0.2, 0.3, 0.18, 0.3),
        (0.2, 0.07, 0.0, 0.2),  # between half the threshold and the threshold
        (0.3, 0.04, 0.0, 0.2),
        (0.3, 0.07, 0.03, 0.2),  # within one standard error of half the threshold
        (0.1, -0.5, 0.0, 0.1),  # the minimum
    ],
)
def test_adapt_ratio_rises_falls_and_stays_within_bounds(ratio, drop, error, adapted):
    limits = {"threshold": 0.1, "rate": 0.1, "minimum": 0.1, "maximum": 0.5}
    assert replay.adapt_ratio(ratio, drop, error=error, **limits) == pytest.approx(adapted)


def test_mean_drop_is_that_of_each_task_and_its_error_is_that_within_tasks():
    before = {"easy": [1.0, 1.0, 1.0, 0.0], "hard": [0.0, 0.0], "other": [1.0]}
    now = {"easy": [1.0, 0.0], "hard": [0.0, 0.0, 0.0], "new": [1.0]}
    drop, error = replay.mean_drop(before, now)
    assert drop == pytest.approx((0.25 + 0.0) / 2)
    assert error == pytest.approx(np.sqrt(0.25 / 4 + 0.5 / 2) / 2)  # sample variances of easy; hard has none
    rng = np.random.default_rng(0)
    rates = {"a": 0.9, "b": 0.2, "c": 0.5}

    def rewards(n):
        return {task: list((rng.random(n) < rate).astype(float)) for task, rate in rates.items()}

    found = np.array([replay.mean_drop(rewards(8), rewards(16)) for _ in range(4000)])
    assert found[:, 0].std() == pytest.approx(np.sqrt((found[:, 1] ** 2).mean()), rel=0.05)
    assert abs(found[:, 0].mean()) < 0.01


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
        (lambda rng: ReplayCL(replay_strategy="magic"), "replay_strategy"),
        (lambda rng: ReplayCL(no_such=1), "no_such"),
        (lambda rng: AdaptiveReplayCL(min_replay_ratio=0.6, max_replay_ratio=0.5), "min_replay_ratio"),
        (lambda rng: AdaptiveReplayCL(replay_kind="trajectories"), "--replay_kind tasks"),
    ],
)
def test_bad_input_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(np.random.default_rng(0))


# ------------------------------------------------------------------------------------------- the trajectory buffer


def conversation(domain, task_id, reward=1.0, advantage=0.5) -> Trajectory:
    t = Trajectory(domain, task_id, reward=reward, advantage=advantage, messages=[{"role": "user"}])
    t.append([1, 2, 3], 0, [-1.0] * 3)
    return t


def filled_buffer(policy="reservoir", capacity=3, tokens=True) -> TrajectoryBuffer:
    buffer = TrajectoryBuffer(capacity, policy, tokens=tokens)
    for n in range(6):
        for domain in ("airline", "retail"):
            buffer.add(conversation(domain, str(n % 2), n / 6, 0.1 * n), 0.3 * n)
    return buffer


def test_a_record_is_a_trajectory_with_its_task_as_label():
    buffer = filled_buffer(capacity=10)
    assert buffer.buffers["airline"].labels == ["0", "1"] * 3
    record = buffer.sample("airline", 1)[0]
    assert record.task == TaskRef("airline", record.task_id) and record.domain == "airline" and record.replayed
    assert record.token_ids == [1, 2, 3] and record.messages == [{"role": "user"}]
    both = buffer.sample_multi_domain(["airline", "retail"], 2)
    assert [t.domain for t in both] == ["airline"] * 2 + ["retail"] * 2
    assert buffer.sample("telecom", 3) == []
    assert buffer.get_statistics() == {
        "buffer_sizes": {"airline": 6, "retail": 6},
        **{name: {"airline": r, "retail": r} for name, r in (("mean_reward", 0.4167), ("max_reward", 5 / 6))},
        **{name: {"airline": r, "retail": r} for name, r in (("min_reward", 0.0), ("num_high_reward", 5))},
    }


def test_a_buffer_for_tasks_stores_no_tokens():
    record = filled_buffer(tokens=False).sample("airline", 1)[0]
    assert record.token_ids == record.logprobs == record.turns == record.messages == []
    assert filled_buffer(tokens=False).bytes_kept() < filled_buffer().bytes_kept()


def test_tasks_are_drawn_each_once_if_there_are_enough():
    buffer = filled_buffer(capacity=10)
    assert sorted(t.task_id for t in buffer.sample_tasks("airline", 2)) == ["0", "1"]
    assert sorted(t.task_id for t in buffer.sample_tasks("airline", 5)).count("0") in (2, 3)


@pytest.mark.parametrize("policy", replay.POLICIES)
def test_a_saved_buffer_is_equal_and_draws_on(policy, tmp_path):
    buffer, again = filled_buffer(policy), TrajectoryBuffer(3, policy, seed=9)
    buffer.save(tmp_path / "buffer.json")
    again.load(tmp_path / "buffer.json")
    assert again.buffers == buffer.buffers and list(again.buffers) == ["airline", "retail"]
    assert again.sample("airline", 9) == buffer.sample("airline", 9)
    again.add(conversation("airline", "7"), 0.5)
    buffer.add(conversation("airline", "7"), 0.5)
    assert again.buffers == buffer.buffers


def test_a_damaged_buffer_is_named_and_a_failed_save_leaves_the_old_one(tmp_path):
    buffer, path = filled_buffer(), tmp_path / "buffer.json"
    buffer.save(path)
    good = path.read_text()
    for damaged in (good[:-9], good.replace('"losses"', '"lasses"'), good.replace('"turns"', '"terns"'), "[]", ""):
        (tmp_path / "damaged").write_text(damaged)
        with pytest.raises(ValueError, match="not a whole buffer"):
            TrajectoryBuffer().load(tmp_path / "damaged")
    buffer.buffers["airline"].items[0].messages = [object()]
    with pytest.raises(TypeError):
        buffer.save(path)
    assert path.read_text() == good


# ------------------------------------------------------------------------------------------------- the algorithms


def running(algorithm, *trajectories, phase="grpo"):
    """The algorithm in a run whose buffer holds the trajectories."""
    algorithm.trainer = SimpleNamespace(trajectory_buffer=algorithm.make_buffer(), phase=phase, replayed_losses=[])
    algorithm.trainer.state = {"replayed": {"grpo": {}, "warmup": {}}}
    for t in trajectories:
        if algorithm.keeps(t):
            algorithm.trainer.trajectory_buffer.add(t)
    return algorithm


def test_augment_batch_replays_previous_domains_only_and_evenly():
    stored = [conversation(d, str(n)) for d in ("airline", "retail") for n in range(4)]
    algorithm = running(ReplayCL(replay_ratio=0.5, min_buffer_size=2), *stored, conversation("mock", "0"))
    new = [TaskRef("telecom", str(i)) for i in range(4)]
    batch = algorithm.augment_batch(new, "telecom")
    assert batch[:4] == new and len(set(batch)) == 8
    assert sorted(task.domain for task in batch[4:]) == ["airline"] * 2 + ["retail"] * 2  # mock: below min_buffer_size
    assert {task.domain for task in algorithm.augment_batch(new, "airline")[4:]} == {"retail"}


def test_latest_domain_only():
    stored = [conversation("airline", "0"), conversation("retail", "0")]
    algorithm = running(ReplayCL(replay_ratio=0.5, min_buffer_size=1, replay_all_domains=False), *stored)
    batch = algorithm.augment_batch([TaskRef("telecom", "0")] * 4, "telecom")
    assert {task.domain for task in batch[4:]} == {"retail"}


@pytest.mark.parametrize("strategy", replay.STRATEGIES)
@pytest.mark.parametrize("policy", replay.POLICIES)
@pytest.mark.parametrize("kind", ["tasks", "trajectories"])
def test_every_policy_and_strategy_serves_both_kinds(kind, policy, strategy):
    stored = [conversation("airline", str(n), n % 2) for n in range(6)]
    flags = {"replay_kind": kind, "buffer_policy": policy, "replay_strategy": strategy, "replay_buffer_size": 4}
    algorithm = running(ReplayCL(replay_ratio=0.5, min_buffer_size=1, **flags), *stored)
    tasks = algorithm.augment_batch([TaskRef("retail", "0")] * 2, "retail")
    trajectories = algorithm.augment_trajectories(2, "retail")
    assert (len(tasks), len(trajectories)) == ((4, 0) if kind == "tasks" else (2, 2))


def test_losses_of_replayed_conversations_are_renewed():
    algorithm = ReplayCL(replay_ratio=0.5, min_buffer_size=1, replay_kind="trajectories")
    running(algorithm, conversation("airline", "3"), conversation("airline", "4"))
    assert algorithm.augment_trajectories(4, "airline") == []
    assert sorted(t.task_id for t in algorithm.augment_trajectories(2, "retail")) == ["3", "4"]
    algorithm.trainer.replayed_losses = [7.0, float("nan")]  # the second: train.py skips the update
    algorithm.post_step_hook(algorithm.trainer, "retail")
    assert sorted(algorithm.trainer.trajectory_buffer.buffers["airline"].losses) == [0.0, 7.0]


def test_a_step_that_replays_nothing_renews_no_loss():
    """The latest domain may have stored too little, after one that was replayed."""
    flags = {"replay_kind": "trajectories", "replay_all_domains": False, "min_buffer_size": 2}
    rows = [conversation("airline", "3"), conversation("airline", "4")]
    algorithm = running(ReplayCL(replay_ratio=0.5, **flags), *rows)
    algorithm.trainer.replayed_losses = [0.5] * len(algorithm.augment_trajectories(2, "retail"))
    algorithm.post_step_hook(algorithm.trainer, "retail")
    algorithm.trainer.trajectory_buffer.add(conversation("retail", "5"))
    algorithm.trainer.replayed_losses = []
    assert algorithm.augment_trajectories(2, "telecom") == []
    algorithm.post_step_hook(algorithm.trainer, "telecom")
    assert algorithm.trainer.trajectory_buffer.buffers["airline"].losses == [0.5, 0.5]


def test_without_cloning_a_conversation_without_an_advantage_is_not_stored():
    rows = [conversation("airline", "3"), conversation("airline", "4", advantage=None)]
    for flags, kept in (({"clone_coef": 0.0}, ["3"]), ({}, ["3", "4"])):
        algorithm = running(ReplayCL(replay_kind="trajectories", **flags), *rows)
        assert [t.task_id for t in algorithm.trainer.trajectory_buffer.buffers["airline"].items] == kept


def test_only_successful_conversations_become_demonstrations():
    rows = [conversation("airline", str(n), float(n == 2)) for n in range(4)]
    flags = {"replay_ratio": 0.5, "min_buffer_size": 1, "replay_kind": "trajectories"}
    algorithm = running(ReplayCL(**flags), *rows, phase="warmup")
    assert {t.task_id for t in algorithm.augment_trajectories(3, "retail")} == {"2"}
    failures = running(ReplayCL(**flags), *(t for t in rows if t.reward == 0), phase="warmup")
    assert failures.augment_trajectories(3, "retail") == []
    failures.trainer.phase = "grpo"
    assert len(failures.augment_trajectories(3, "retail")) == 3


def after_step(algorithm, *groups, domain):
    """The hook after a step with these groups (task, rewards)."""
    rewards = torch.tensor([[np.nan if r is None else r for r in rewards] for _, rewards in groups])
    algorithm.post_step_hook(SimpleNamespace(refs_P=[t for t, _ in groups], rewards_P_G=rewards), domain)


def test_adaptive_ratio_is_adapted_after_enough_conversations_and_begins_anew_in_each_domain():
    stored = [conversation("airline", str(n)) for n in range(2)]
    algorithm = running(AdaptiveReplayCL(initial_replay_ratio=0.2, min_buffer_size=1), *stored)
    old, other, new = TaskRef("airline", "0"), TaskRef("airline", "1"), TaskRef("retail", "0")
    for rewards in ([0.0] * 8, [1.0] * 8, [1.0] * 8):  # the last two groups are the reference
        after_step(algorithm, (old, rewards), domain="airline")
    algorithm.augment_batch([new], "retail")
    for _ in range(7):  # of 64 conversations
        after_step(algorithm, (new, [0.0] * 8), (old, [0.0, *[None] * 3, 0.0, 0.0, 0.0, 0.0]), domain="retail")
        after_step(algorithm, (new, [0.0] * 8), (other, [1.0] * 8), domain="retail")  # without a reference
    assert algorithm.replay_ratio == 0.2 and algorithm.drops == {}
    for _ in range(4):
        after_step(algorithm, (old, [0.0] * 8), domain="retail")
    assert algorithm.replay_ratio == pytest.approx(0.3) and algorithm.recent == {}
    assert algorithm.get_statistics()["drop since own training"] == {"airline": 1.0}
    for _ in range(8):
        after_step(algorithm, (old, [1.0] * 8), domain="retail")
    assert algorithm.replay_ratio == pytest.approx(0.2)
    algorithm.replay_ratio = 0.5
    algorithm.augment_batch([new], "retail")
    assert algorithm.replay_ratio == 0.5
    algorithm.augment_batch([TaskRef("telecom", "0")], "telecom")
    assert algorithm.replay_ratio == 0.2


class Law(adaptive.Args):
    seeds, steps = list(range(30)), 100


@pytest.mark.parametrize("rate, group, domains", adaptive.CASES)
def test_without_forgetting_the_ratio_stays_low(rate, group, domains):
    ratios = adaptive.without_forgetting(Law, rate, group, domains)
    assert ratios.mean() <= 0.2 and (ratios > 0.2 + 1e-9).mean() < 0.05


@pytest.mark.parametrize("rate, group, domains", [(0.7, 4, 1), (0.5, 16, 2)])
def test_after_a_fall_the_ratio_reaches_its_maximum_within_ten_adaptations_and_comes_back(rate, group, domains):
    for run in adaptive.with_a_fall(Law, rate, group, domains):
        assert adaptive.adaptations(run[adaptive.PERIOD :], lambda ratio: ratio >= 0.5 - 1e-9) <= 10
        assert adaptive.adaptations(run[2 * adaptive.PERIOD :], lambda ratio: ratio <= 0.2 + 1e-9) <= 20


@pytest.mark.parametrize("kind", [ReplayCL, AdaptiveReplayCL])
def test_state_survives_json(kind):
    stored = [conversation("airline", str(i), i / 6) for i in range(6)]
    algorithm = running(kind(replay_ratio=0.4, min_buffer_size=1, seed=5), *stored)
    twin = running(kind(replay_ratio=0.1, min_buffer_size=1, seed=5), *stored)
    new = [TaskRef("retail", "0")] * 3
    algorithm.augment_batch(new, "retail")
    twin.load_state_dict(json.loads(json.dumps(algorithm.state_dict())))
    for made in (algorithm, twin):
        made.trainer.trajectory_buffer.rng = np.random.default_rng(0)
    for _ in range(5):
        assert twin.augment_batch(new, "retail") == algorithm.augment_batch(new, "retail")
    assert twin.state_dict() == algorithm.state_dict()
