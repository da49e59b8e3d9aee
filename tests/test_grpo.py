"""grpo.py: every formula against numbers written out in float64, batches, and the statistics of a step."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import grpo
from flags import checked
from grpo import Trajectory, cloning_loss, collate, group_advantages, policy_loss

NAN = math.nan


def conversation(lengths, advantage=None, seed=0, **about) -> Trajectory:
    """Two tokens to read, then turns of these lengths with a token after each."""
    rng = torch.Generator().manual_seed(seed)
    t = Trajectory(advantage=advantage, **about)
    t.append([1, 2])
    for turn, n in enumerate(lengths):
        t.append([3 + turn] * n, turn, (-0.5 - torch.rand(n, generator=rng)).tolist())
        t.append([9])
    return t


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_advantages(scale):
    rewards = [[1.0, 0.0, 0.0, 1.0], [0.3, NAN, 0.9, 0.1], [0.7] * 4, [NAN, 1.0, NAN, NAN], [NAN] * 4]
    expected = np.zeros((5, 4))  # no advantage where rewards are equal or missing
    for row in (0, 1):
        everything, group = (np.array(values)[~np.isnan(values)] for values in (rewards, rewards[row]))
        deviation = {"group": group.std(ddof=1) + 1e-4, "batch": everything.std(ddof=1) + 1e-4, "none": 1.0}[scale]
        expected[row] = np.nan_to_num((np.array(rewards[row]) - group.mean()) / deviation)
    torch.testing.assert_close(group_advantages(rewards, scale).double(), torch.tensor(expected), atol=1e-6, rtol=1e-5)


def test_equal_rewards_that_float32_cannot_average_exactly_have_no_advantage():
    assert group_advantages([[0.1] * 7], "group").abs().max() == 0.0


def test_bad_rewards_are_named():
    with pytest.raises(ValueError, match="unknown advantage scale 'std'"):
        group_advantages([[1.0]], "std")
    with pytest.raises(ValueError, match=r"\(tasks, samples\), got \(1,\)"):
        group_advantages([1.0])


def test_a_group_whose_rewards_are_equal_has_no_advantage_not_one_of_zero():
    rewards = torch.tensor([[1.0, 0.0, 0.5], [0.7, 0.7, 0.7], [NAN, 0.3, 0.3], [NAN, 0.3, 0.4], [NAN] * 3])
    assert grpo.varied(rewards).tolist() == [True, False, False, True, False]
    trajectories = [Trajectory() for _ in range(15)]
    grpo.set_advantages(trajectories, rewards, group_advantages(rewards, "none"))
    found = [t.advantage for t in trajectories]
    assert found[:3] == [0.5, -0.5, 0.0] and found[9:12] == pytest.approx([0.0, -0.05, 0.05])
    assert found[3:9] + found[12:] == [None] * 9


def reference_loss(lp, old, A, mask, ref, loss_type, estimator, normalizer, dual_clip):
    """The table of formulas with clip 0.2 and 0.28 (cispo: 5), KL weight 0.3 and 20 tokens, token by token."""
    total = 0.0
    for b in range(len(lp)):
        tokens = [t for t in range(lp.shape[1]) if mask[b, t]]
        mean_log_ratio = sum(lp[b, t] - old[b, t] for t in tokens) / max(len(tokens), 1)
        for t in tokens:
            if loss_type == "cispo":
                loss = -min(math.exp((lp[b, t] - old[b, t]).item()), 5.0) * A[b, t] * lp[b, t]
            else:
                r = torch.exp(mean_log_ratio if loss_type == "gspo" else lp[b, t] - old[b, t])
                loss = -torch.minimum(r * A[b, t], torch.clamp(r, 0.8, 1.28) * A[b, t])
                if dual_clip and A[b, t] < 0:  # Ye et al. 2020, eq. 5: max(min(r A, clip(r) A), c A)
                    loss = -torch.maximum(-loss, dual_clip * A[b, t])
            d = ref[b, t] - lp[b, t]
            loss = loss + 0.3 * {"k1": -d, "k2": d * d / 2, "k3": torch.exp(d) - d - 1}[estimator]
            total = total + loss / {"grpo": len(tokens), "gspo": len(tokens), "dr_grpo": 20}.get(loss_type, 1)
    return total / (normalizer or (len(lp) if loss_type in ("grpo", "gspo", "dr_grpo") else mask.sum()))


@pytest.mark.parametrize("normalizer, dual_clip", [(None, None), (11, 1.5)])
@pytest.mark.parametrize("estimator", grpo.KL_ESTIMATORS)
@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
def test_policy_loss_and_gradient_agree_with_a_float64_reference(loss_type, estimator, normalizer, dual_clip):
    rng = torch.Generator().manual_seed(3)
    lp = -torch.rand(4, 7, generator=rng) * 3
    old, ref = (lp + 0.6 * torch.randn(4, 7, generator=rng) for _ in range(2))
    advantages, mask = torch.randn(4, 7, generator=rng), torch.rand(4, 7, generator=rng) < 0.6
    mask[2] = False
    exact, mine = lp.double().requires_grad_(), lp.clone().requires_grad_()
    rows = (old.double(), advantages.double(), mask, ref.double())
    expected = reference_loss(exact, *rows, loss_type, estimator, normalizer, dual_clip)
    settings = {"kl_coef": 0.3, "max_tokens": 20, "normalizer": normalizer, "dual_clip": dual_clip}
    settings |= {"kl_estimator": estimator, "epsilon_high": 5.0 if loss_type == "cispo" else 0.28}
    loss, stats = policy_loss(mine, old, advantages, mask, loss_type, ref_logprobs=ref, **settings)
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    torch.testing.assert_close(mine.grad.double(), exact.grad, atol=1e-6, rtol=1e-5)
    assert stats["ratio_min"] < 1 < stats["ratio_max"]


@pytest.mark.parametrize("advantage, clipped", [(-0.5, [0.1, 3.5, 40.0]), (0.5, [1.5, 2.9, 3.5, 40.0])])
def test_a_clipped_token_is_counted_and_has_no_gradient(advantage, clipped):
    for ratio in (0.1, 0.9, 1.5, 2.9, 3.5, 40.0):
        lp = torch.tensor([[math.log(ratio)]], requires_grad=True)
        one = (torch.zeros(1, 1), torch.tensor([advantage]), torch.ones(1, 1, dtype=torch.bool))
        loss, stats = policy_loss(lp, *one, dual_clip=3.0)
        loss.backward()
        assert lp.grad.item() == pytest.approx(0.0 if ratio in clipped else -ratio * advantage, rel=1e-5)
        assert stats["clip_share"] == float(ratio in clipped)


LOG_RATIO = torch.tensor([[0.1, 5.0, 0.9, -3.0], [NAN, 0.2, 0.3, NAN], [NAN] * 4])
RATIO_MASK = torch.tensor([[True, False, True, True], [False, True, True, False], [False] * 4])


def test_sampler_weights_are_cut_token_by_token_or_by_the_conversation():
    truncated, cut = grpo.sampler_weights(LOG_RATIO, RATIO_MASK, "truncate", 2.0)
    assert cut.tolist() == [[False, False, True, False], [False] * 4, [False] * 4]
    rows = [[math.exp(0.1), 2.0, math.exp(-3)], [math.exp(0.2), math.exp(0.3)]]
    assert [truncated[k][RATIO_MASK[k]].tolist() for k in (0, 1)] == [pytest.approx(row) for row in rows]
    for cap, second in ((2.0, math.exp(0.5)), (1.6, 0.0)):
        masked, cut = grpo.sampler_weights(LOG_RATIO, RATIO_MASK, "mask", cap)
        assert torch.equal(cut, RATIO_MASK & torch.tensor([[False], [second == 0.0], [False]]))
        assert masked[0][RATIO_MASK[0]].tolist() == pytest.approx([math.exp(-2.0)] * 3)
        assert masked[1][RATIO_MASK[1]].tolist() == pytest.approx([second] * 2)
    far, _ = grpo.sampler_weights(torch.tensor([[900.0, -900.0]]), torch.tensor([[True, True]]), "truncate", 2.0)
    assert not grpo.sampler_weights(torch.zeros(1, 2), torch.ones(1, 2).bool(), "truncate", 1.0)[1].any()  # at the cap
    assert far.isfinite().all() and far[0, 0] == 2.0


def test_with_weights_the_gradient_is_that_of_the_policys_own_samples():
    """Enumerated in float64: sum over tokens mu(x) w(x) A(x) grad log pi(x) is sum pi(x) A(x) grad log pi(x), as long
    as no ratio is above the cap. Without weights, the clip around 1 leaves out what the sampler sees otherwise."""
    rng = torch.Generator().manual_seed(0)
    logits, advantages = (torch.randn(6, generator=rng, dtype=torch.float64) for _ in range(2))
    sampler = (logits + torch.randn(6, generator=rng, dtype=torch.float64)).softmax(0)
    exact = logits.clone().requires_grad_()
    (exact.softmax(0) * advantages).sum().backward()  # its gradient is the policy gradient
    found = {}
    for correction in ("none", "truncate", "mask"):
        mine = logits.clone().requires_grad_()
        logprobs, total = mine.log_softmax(0), 0.0
        for x in range(6):
            one, mask = logprobs[x].view(1, 1), torch.ones(1, 1, dtype=torch.bool)
            batch = {"old_logprobs": sampler[x].log().view(1, 1), "mask": mask}
            if correction != "none":
                grpo.correct_sampler(batch, one.detach(), correction, 100.0)
            rows = (batch["old_logprobs"], advantages[x].view(1), mask)
            total = total + sampler[x] * policy_loss(one, *rows, weights=batch.get("weights"))[0]
        total.backward()
        found[correction] = -mine.grad
    torch.testing.assert_close(found["truncate"], exact.grad)
    torch.testing.assert_close(found["mask"], exact.grad)
    assert (found["none"] - exact.grad).abs().max() > 0.01


def test_weights_multiply_the_policys_loss_and_not_its_kl():
    rng = torch.Generator().manual_seed(1)
    lp, old, ref = (-torch.rand(2, 5, generator=rng) for _ in range(3))
    mask, weights = torch.rand(2, 5, generator=rng) < 0.7, torch.rand(2, 5, generator=rng) + 0.5
    advantages = torch.randn(2, generator=rng)
    settings = {"ref_logprobs": ref, "kl_coef": 0.4, "epsilon_low": 0.999, "epsilon_high": 1e9}
    for loss_type in grpo.LOSS_TYPES:
        found, _ = policy_loss(lp, old, advantages, mask, loss_type, weights=weights, max_tokens=9, **settings)
        # With bounds that never bind, weighing a token is weighing its advantage.
        expected, _ = policy_loss(lp, old, advantages[:, None] * weights, mask, loss_type, max_tokens=9, **settings)
        torch.testing.assert_close(found, expected)


def test_a_correction_puts_the_trainer_in_the_samplers_place():
    lp = torch.tensor([[-1.0, -2.0, NAN, -0.5]])
    batch = {"old_logprobs": torch.tensor([[-1.1, -4.0, 0.0, -0.5]]), "mask": torch.tensor([[True, True, False, True]])}
    grpo.correct_sampler(batch, lp, "truncate", 2.0)
    assert batch["old_logprobs"] is lp and batch["sampler_cut"].tolist() == [[False, True, False, False]]
    assert batch["sampler_log_ratio"].tolist() == [pytest.approx([0.1, 2.0, 0.0, 0.0], abs=1e-6)]
    batch["old_logprobs"] = torch.tensor([[-1.1, -4.0, 0.0, -0.5]])
    grpo.correct_sampler(batch, lp, "mask", 2.0)
    assert batch["weights"].abs().max() == 0 and batch["sampler_cut"].tolist() == [[True, True, False, True]]


def test_masked_nan_stays_out():
    lp = torch.tensor([[0.0, -1.0, NAN]], requires_grad=True)
    old, mask = torch.tensor([[NAN, -1.0, 0.0]]), torch.tensor([[False, True, False]])
    loss, stats = policy_loss(lp, old, torch.ones(1), mask, ref_logprobs=old, kl_coef=0.1)
    loss.backward()
    assert loss.item() == pytest.approx(-1.0) and stats["kl"] == 0.0
    assert torch.equal(lp.grad, torch.tensor([[0.0, -1.0, 0.0]]))


def test_kl_survives_what_would_overflow():
    far, mask = torch.tensor([[-500.0]]), torch.tensor([[True]])
    loss, _ = policy_loss(far, far, torch.zeros(1), mask, ref_logprobs=far + 499, kl_coef=1.0)
    assert torch.isfinite(loss)


@pytest.mark.parametrize(
    "settings, message",
    [({"loss_type": "ppo"}, "'ppo'"), ({"kl_estimator": "k4"}, "'k4'"), ({"loss_type": "dr_grpo"}, "max_tokens")],
)
def test_bad_settings_of_the_loss_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(*[torch.zeros(1, 1)] * 4, **settings)


def test_settings_of_the_loss_follow_from_the_flags():
    def settings(max_context=None, **flags):
        rest = {"max_context": max_context, "max_turns": 3, "max_new_tokens": 5}
        return grpo.loss_settings(SimpleNamespace(**vars(checked(grpo.Flags, flags)), **rest))

    highs = [settings(), settings(loss_type="cispo"), settings(epsilon_high=0.4)]
    assert [found["epsilon_high"] for found in highs] == [0.28, 5.0, 0.4]
    assert (settings()["max_tokens"], settings(max_context=9)["max_tokens"]) == (15, 9)
    policy_loss(*[torch.zeros(1, 1)] * 4, **settings(loss_type="dr_grpo"))


def test_cloning_is_the_kl_from_the_policy_that_sampled():
    """In expectation over that policy, value and gradient are those of KL(mu || pi) over the whole vocabulary."""
    rng = torch.Generator().manual_seed(0)
    mu = torch.randn(7, generator=rng, dtype=torch.float64).log_softmax(0)
    logits = (mu + 0.2 * torch.randn(7, generator=rng, dtype=torch.float64)).requires_grad_()
    pi = logits.log_softmax(0)
    exact = (mu.exp() * (mu - pi)).sum()
    mask, failed = torch.ones(1, 1, dtype=torch.bool), torch.tensor([False])
    ours = sum(mu[k].exp() * cloning_loss(pi[k].view(1, 1), mu[k].view(1, 1), mask, failed) for k in range(7))
    assert (pi - mu).max() < grpo.CLONING_CAP and ours.item() == pytest.approx(exact.item(), rel=1e-9)
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (ours, exact)]
    torch.testing.assert_close(*gradients)


def test_cloning_adds_cross_entropy_where_successful_and_leaves_out_the_masked():
    logprobs = torch.tensor([[-0.5, -2.0, -9.0], [-1.0, -3.0, -1.0]], requires_grad=True)
    stored = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -2.5, -7.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    loss = cloning_loss(logprobs, stored, mask, torch.tensor([True, False]))
    kl = [np.exp(d) - 1 - d for d in (0.5, 0.0, 0.0, -0.5, 1.0)]  # the last is capped
    assert loss.item() == pytest.approx(sum(kl) + 0.5 + 2.0, rel=1e-6)
    loss.backward()
    expected = [[np.exp(0.5) - 2, -1.0, 0.0], [0.0, np.exp(-0.5) - 1, 0.0]]
    torch.testing.assert_close(logprobs.grad, torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("advantage", [0.7, -0.4, None])
def test_the_loss_of_fresh_tokens_is_that_of_a_ratio_of_one(advantage):
    t = conversation([3, 1, 4], advantage)
    batch = collate([t], gamma=0.8)
    loss, _ = policy_loss(*(batch[n] for n in ("old_logprobs", "old_logprobs", "advantages", "mask")), "grpo")
    assert grpo.fresh_loss(t, gamma=0.8) == pytest.approx(loss.item(), abs=1e-7)


def test_only_valid_conversations_with_action_tokens_are_trained_on():
    cut, over = conversation([2], truncated_turns=1), conversation([2], termination="max_steps")
    found = [conversation([2]), cut, over, conversation([]), conversation([2], valid=False)]
    assert [t.usable() for t in found] == [True, True, True, False, False]
    assert [t.usable(mask_truncated=True) for t in found] == [True, False, False, False, False]


def test_gamma_discounts_per_agent_turn():
    batch = collate([conversation([2, 2, 2], 2.0), conversation([1], 3.0)], gamma=0.5)
    assert batch["advantages"][batch["mask"]].tolist() == [0.5, 0.5, 1.0, 1.0, 2.0, 2.0, 3.0]
    assert batch["advantages"][~batch["mask"]].abs().max() == 0


def test_collate_pads_on_the_right_and_trains_where_there_is_an_advantage():
    long, short = conversation([2, 1], 0.5, reward=1.0), conversation([1], None, replayed=True)
    batch = collate([long, short], pad_id=77)
    assert batch["ids"].tolist() == [long.token_ids, short.token_ids + [77] * 3]
    assert batch["attention_mask"].sum(1).tolist() == [7, 4]
    assert batch["mask"].tolist() == [long.action_mask, short.action_mask + [False] * 3]
    assert batch["trained"].tolist() == [long.action_mask, [False] * 7]
    torch.testing.assert_close(batch["old_logprobs"][0], torch.tensor(long.logprobs))
    assert (batch["rewards"].tolist(), batch["replayed"].tolist()) == ([1.0, 0.0], [False, True])
    long.logprobs.pop()
    with pytest.raises(ValueError, match="its lists differ in length"):
        collate([long])


def test_micro_batches_hold_every_sequence_once_and_no_more_tokens_than_allowed():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 60, rng.integers(0, 30)).tolist()
        parts = grpo.micro_batches(lengths, 100)
        assert sorted(i for part in parts for i in part) == list(range(len(lengths)))
        assert all(len(part) == 1 or len(part) * max(lengths[i] for i in part) <= 100 for part in parts)
    assert grpo.micro_batches([500, 3, 3], 100) == [[1, 2], [0]]


NEW = [conversation([2, 3], 0.7, 1), conversation([5], -0.4, 2), conversation([1, 1, 2], 0.1, 3)]
STORED = [conversation([4], -1.2, 4), conversation([2, 2], None, 5, reward=1.0), conversation([3], 0.8, 6, reward=1.0)]
for stored in STORED:
    stored.replayed = True
WHOLE, COUNTS = collate(NEW + STORED, gamma=0.9), grpo.counts(NEW, STORED)
SPLITS = [[[0, 1, 2], [3, 4, 5]], [[0], [2], [1], [5], [3, 4]], [[i] for i in range(6)]]
# Log-probabilities of other policies than the one that sampled.
LP, REF, INITIAL, LATER = (
    WHOLE["old_logprobs"] + WHOLE["mask"] * torch.randn(WHOLE["mask"].shape, generator=torch.Generator().manual_seed(k))
    for k in range(4)
)


def step(loss_type, split, lp=LP):
    """(loss, gradient, statistics, {i: loss of a stored conversation}) of these micro-batches."""
    lp, total, stats, losses = lp.clone().requires_grad_(), 0.0, [], {}
    for part in split:
        batch = collate([(NEW + STORED)[i] for i in part], gamma=0.9)
        width = batch["ids"].shape[1]
        batch.update(ref_logprobs=REF[part, :width], initial_logprobs=INITIAL[part, :width])
        loss, found = grpo.batch_loss(batch, lp[part, :width], COUNTS, 0.3, **settings_of(loss_type))
        stats.append(grpo.batch_stats(batch, lp[part, :width], -lp[part, :width].detach()[batch["mask"]], found))
        losses.update(zip(part, batch.get("losses", []), strict=False))
        total = total + loss
    return total.item(), torch.autograd.grad(total, lp)[0], stats, losses


def settings_of(loss_type):
    high = 5.0 if loss_type == "cispo" else 0.28
    return {"loss_type": loss_type, "kl_coef": 0.2, "max_tokens": 30, "epsilon_high": high}


def test_counts_are_what_each_loss_is_divided_by():
    assert COUNTS == {"sequences": 5, "tokens": 14 + 7, "new_tokens": 14, "replayed_tokens": 11}
    assert grpo.counts([], []) == dict.fromkeys(COUNTS, 0)


@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
def test_batch_loss_and_gradient_do_not_depend_on_the_split(loss_type):
    """They are the policy loss of all, with a dual clip for stored conversations, and the cloning loss of these."""
    lp, clip = LP.clone().requires_grad_(), torch.tensor([[math.inf]] * 3 + [[grpo.DUAL_CLIP]] * 3)
    settings = {**settings_of(loss_type), "ref_logprobs": REF, "dual_clip": clip}
    settings["normalizer"] = COUNTS["sequences" if loss_type in grpo.PER_SEQUENCE else "tokens"]
    expected, _ = policy_loss(lp, *(WHOLE[n] for n in ("old_logprobs", "advantages", "trained")), **settings)
    cloned = (table[3:] for table in (lp, WHOLE["old_logprobs"], WHOLE["mask"], WHOLE["rewards"] == 1.0))
    expected = expected + 0.3 * cloning_loss(*cloned) / COUNTS["replayed_tokens"]
    (gradient,) = torch.autograd.grad(expected, lp)
    assert gradient.abs().max() > 0.01
    for split in SPLITS:
        found, found_gradient, _, _ = step(loss_type, split)
        assert found == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(found_gradient, gradient, atol=1e-7, rtol=1e-5)


def test_a_stored_conversation_has_a_loss_of_its_own():
    ratio = (LP - WHOLE["old_logprobs"]).double().exp()
    assert ratio[3].max() > grpo.DUAL_CLIP  # the advantage there is negative
    for split in SPLITS:
        losses = step("dapo", split)[-1]
        assert sorted(losses) == [3, 4, 5] and losses[4] == 0.0
        for i in (3, 5):
            r, a = (table[i][WHOLE["mask"][i]] for table in (ratio, WHOLE["advantages"].double()))
            objective = torch.minimum(r * a, r.clamp(0.8, 1.28) * a)
            objective = torch.maximum(objective, 3 * a) if a[0] < 0 else objective
            assert losses[i] == pytest.approx(-objective.mean().item(), rel=1e-5)


def statistics(split):
    return grpo.update_stats([step("dapo", split)[2], step("dapo", split, LATER)[2]], COUNTS)


def test_statistics_of_a_step_do_not_depend_on_the_split():
    for split in SPLITS[1:]:
        assert statistics(split) == pytest.approx(statistics(SPLITS[0]), rel=1e-5)


def test_statistics_of_a_step_are_means_and_extremes_over_its_tokens_and_iterations():
    replayed, behaviour = WHOLE["replayed"][:, None], WHOLE["old_logprobs"]
    new, old, trained = WHOLE["mask"] & ~replayed, WHOLE["mask"] & replayed, WHOLE["trained"] & replayed
    found, iterations = statistics(SPLITS[0]), (LP, LATER)
    expected = {
        "kl": torch.cat([grpo.kl_estimate(REF - lp)[new] for lp in iterations]).mean(),
        "kl_initial": torch.cat([grpo.kl_estimate(INITIAL - lp)[new] for lp in iterations]).mean(),
        "entropy": torch.cat([-lp[new] for lp in iterations]).mean(),
        "replayed_kl": torch.cat([grpo.kl_estimate(lp - behaviour)[old] for lp in iterations]).mean(),
        "loss": step("dapo", SPLITS[0])[0],  # of the first iteration
        "action_tokens": COUNTS["new_tokens"],
        "ratio_first_step": 1 + (LP - behaviour)[new].expm1().abs().max(),
        "sampler_kl": grpo.kl_estimate(LP - behaviour)[new].mean(),  # of the first iteration
        "sampler_ratio_max": (LP - behaviour)[new].exp().max(),
        "sampler_cut": 0.0,
    }
    for name, tokens in (("ratio", new), ("replayed_ratio", trained)):
        ratio = torch.cat([(lp - behaviour)[tokens].exp() for lp in iterations])
        expected |= {f"{name}_min": ratio.min(), f"{name}_max": ratio.max()}
    assert {n: found[n] for n in expected} == pytest.approx({n: float(v) for n, v in expected.items()}, rel=1e-5)
