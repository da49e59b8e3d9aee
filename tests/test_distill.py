"""distill.py: divergences against enumeration in float64, the two algorithms in the real loop and in runs."""

import copy
import json

import numpy as np
import pytest
import torch
from law import apart, assert_equal_runs, conversations, gradient, law_trainer, small_run, stopper, tiny, use
from ranks import on_two_ranks
from test_checkpoint import resume, stopped_run

import checkpoint
import distill
import eval as evaluation
import oracle
import policy
import report
import run
import server
from distill import DERPlusPlus, DistillationCL, coarse_kl, distillation, pack, top_logprobs, unpack
from distributed import StopRun
from drift import Drift
from replay import TrajectoryBuffer

IDS = torch.tensor([[5, 17, 40, 8], [9, 3, 22, 0]])
MASK = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 0]])
PLACES = [(0, 0), (0, 2), (1, 1)]  # whose logits predict the tokens of the mask


def moved(model, size=0.05, seed=1):
    other, rng = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.parameters():
            p += size * torch.randn(p.shape, generator=rng)
    return other


def distributions(model, temperature):
    """(3, V) log-probabilities in float64."""
    logits = model(IDS).logits
    return torch.stack([logits[place].double() / temperature for place in PLACES]).log_softmax(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_divergence_and_its_gradient_are_those_of_enumeration(reverse, temperature):
    """Of the reverse KL: sum_v pi(v) (log pi(v) - log teacher(v)) grad log pi(v), the policy gradient with the reward
    log teacher - log pi."""
    teacher, model = tiny()[0], moved(tiny()[0])
    frozen = distributions(teacher, temperature).detach()
    reference = copy.deepcopy(model)
    ours = distributions(reference, temperature)
    kl = (ours.exp() * (ours - frozen) if reverse else frozen.exp() * (frozen - ours)).sum()
    if reverse:
        (ours.detach().exp() * (ours - frozen).detach() * ours).sum().backward()
    else:
        kl.backward()
    expected = torch.cat([p.grad.flatten() for p in reference.parameters()])
    kind = {"reverse": reverse, "temperature": temperature}
    [found] = distillation(model, policy.snapshot(teacher), [(IDS, MASK)], **kind)
    assert found.item() == pytest.approx(kl.item(), rel=1e-4) and kl > 0.1
    found.backward()
    assert apart(torch.cat([p.grad.flatten() for p in model.parameters()]), expected) < 1e-4


def test_the_divergence_from_oneself_is_0():
    model = tiny()[0]
    for reverse in (False, True):
        [found] = distillation(model, policy.snapshot(model), [(IDS, MASK)], reverse=reverse)
        assert found.item() == pytest.approx(0.0, abs=1e-6)


def test_all_log_probabilities_give_the_whole_kl():
    rng = torch.Generator().manual_seed(0)
    stored, logits = (torch.randn(5, 7, generator=rng, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    p, q = stored.log_softmax(-1), logits.log_softmax(-1)
    exact = (p.exp() * (p - q)).sum(-1)
    values, ids = p.topk(7)
    found = coarse_kl(logits, ids, values)
    torch.testing.assert_close(found, exact)
    torch.testing.assert_close(*(torch.autograd.grad(kl.sum(), logits, retain_graph=True)[0] for kl in (found, exact)))


@pytest.mark.parametrize("k", [1, 3])
def test_the_rest_is_one_class(k):
    """Against the probabilities of k + 1 classes, and their gradient by differences."""
    rng = torch.Generator().manual_seed(0)
    stored, logits = (2 * torch.randn(4, 7, generator=rng, dtype=torch.float64) for _ in range(2))
    values, ids = stored.log_softmax(-1).topk(k)

    def by_classes(logits):
        total = 0.0
        for n in range(4):
            p, q = stored[n].softmax(-1).tolist(), logits[n].softmax(-1).tolist()
            kept = ids[n].tolist()
            pairs = [(p[v], q[v]) for v in kept] + [(1 - sum(p[v] for v in kept), 1 - sum(q[v] for v in kept))]
            total += sum(a * np.log(a / b) for a, b in pairs)
        return total

    logits.requires_grad_()
    found = coarse_kl(logits, ids, values).sum()
    assert found.item() == pytest.approx(by_classes(logits), rel=1e-9)
    found.backward()
    for place in ((0, 0), (1, 6), (3, 2)):
        step = torch.zeros_like(logits)
        step[place] = 1e-5
        difference = (by_classes(logits + step) - by_classes(logits - step)) / 2e-5
        assert logits.grad[place].item() == pytest.approx(difference, rel=1e-4, abs=1e-9)


def test_certain_tokens_have_a_finite_divergence():
    """All of the stored mass on one token; a policy that gives it none."""
    stored, ids = torch.zeros(1, 1), torch.tensor([[2]])
    logits = torch.tensor([[0.0, 50.0, -50.0, 0.0]], requires_grad=True)
    kl = coarse_kl(logits, ids, stored)
    assert kl.item() == pytest.approx(100.0)
    kl.sum().backward()
    assert logits.grad.isfinite().all()


def test_the_likeliest_tokens_are_kept():
    logprobs, ids = top_logprobs(tiny()[0], IDS, MASK, temperature=0.5, k=4)
    expected = distributions(tiny()[0], 0.5).topk(4)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(logprobs.double(), expected.values, rtol=1e-4, atol=1e-5)


def test_what_is_packed_comes_back_to_the_bit():
    logprobs, ids = top_logprobs(tiny()[0], IDS, MASK)
    for found, expected in zip(unpack(pack(logprobs, ids)), (logprobs, ids), strict=True):
        assert torch.equal(found, expected) and found.dtype == expected.dtype
    assert [tensor.shape for tensor in unpack("")] == [(0, distill.TOP)] * 2


# ------------------------------------------------------------------------------------------------------- in the loop


BACKWARDS = {"task_order": ["retail", "airline"], "kl_coef": 0.0, "micro_batch_tokens": 40}  # trains retail


def distilled_step(shard=False, order=(0, 1, 2)):
    """Retail is trained; the conversations of the first two tasks are of airline, whose policy was another one."""
    trainer, algorithm = law_trainer(shard=shard, **BACKWARDS), DistillationCL(distill_coef=2.0)
    use(trainer, algorithm)
    trainer.trajectory_buffer = TrajectoryBuffer()
    teacher = moved(tiny()[0])
    algorithm.teachers["airline"] = policy.snapshot_from(trainer.model, teacher.state_dict().__getitem__)
    played = conversations()
    for t in played[6:]:
        t.domain = "retail"
    found, metrics = gradient(trainer, order, trajectories=played)
    kept = [t.domain for b in trainer.trajectory_buffer.buffers.values() for t in b.items]
    assert set(kept) <= {"retail"}  # replayed conversations have no reward, and are not stored
    return found, torch.tensor([metrics["extra_loss"], metrics["invalid"], metrics["reward"]])


def test_old_conversations_are_distilled_and_new_ones_rewarded():
    """The gradient is the sum of that of GRPO on the new task alone and that of the KL written out in float64."""
    found, (extra, invalid, reward) = distilled_step()
    assert invalid == 1 and reward == pytest.approx(0.5)  # of the new task's, (0 + 1 + 0.5) / 3
    trainer = law_trainer(kl_coef=0.0)
    rewarded, _ = gradient(trainer, (2,))
    model, teacher = copy.deepcopy(tiny()[0]).double(), moved(tiny()[0]).double()
    terms = []
    for t in conversations()[:4] + conversations()[5:6]:  # the fifth is invalid
        ids = torch.tensor([t.token_ids])
        p, q = (m(ids).logits[0].log_softmax(-1) for m in (model, teacher))
        terms += [(p[k - 1].exp() * (p[k - 1] - q[k - 1])).sum() for k, sampled in enumerate(t.action_mask) if sampled]
    kl = 2.0 * sum(terms) / len(terms)
    kl.backward()
    distilled = torch.cat([p.grad.flatten() for p in model.parameters()]).float()
    assert extra == pytest.approx(kl.item(), rel=1e-4)
    assert apart(found, rewarded + distilled) < 1e-4 and min(rewarded.norm(), distilled.norm()) > 0.1 * found.norm()


def der_step(shard=False, clone_coef=0.0):
    """A stored conversation of airline from another policy, beside a new one whose rewards do not vary."""
    trainer = law_trainer(shard=shard, clone_coef=clone_coef, **BACKWARDS)
    flags = {"replay_ratio": 0.5, "min_buffer_size": 1, "clone_coef": clone_coef}
    algorithm = DERPlusPlus(distill_coef=3.0, replay_kind="trajectories", **flags)
    use(trainer, algorithm)
    trainer.trajectory_buffer = TrajectoryBuffer()
    played = conversations()
    for t in played[:3]:
        [ids], [mask] = torch.tensor([t.token_ids]), torch.tensor([t.action_mask])
        logprobs, top = top_logprobs(moved(tiny()[0]), ids[None], mask[None])
        t.top, t.advantage = pack(logprobs, top), 0.7
        trainer.trajectory_buffer.add(t)
    for t in played[9:]:
        t.domain = "retail"
    found, metrics = gradient(trainer, (3,), trajectories=played)
    new = trainer.trajectory_buffer.buffers["retail"].items
    tops = torch.cat([unpack(t.top)[0] for t in new])
    assert len(tops) == sum(sum(t.action_mask) for t in new) and len(new) == 3
    return found, torch.cat([torch.tensor([metrics["extra_loss"], metrics["cloning_loss"]]), tops.flatten()])


def test_stored_distributions_pull_the_policy_back():
    """Written out in float64, over K + 1 classes; the three stored ones are drawn, each once."""
    model, before = copy.deepcopy(tiny()[0]).double(), moved(tiny()[0])
    terms = []
    for t in conversations()[:3]:
        ids = torch.tensor([t.token_ids])
        p, q = before(ids).logits[0].double().softmax(-1), model(ids).logits[0].softmax(-1)
        for k in [k - 1 for k, sampled in enumerate(t.action_mask) if sampled]:
            kept = p[k].topk(distill.TOP).indices
            a, b = (torch.cat([x[k][kept], 1 - x[k][kept].sum(0, keepdim=True)]) for x in (p, q))
            terms.append((a * (a / b).log()).sum())
    kl = 3.0 * sum(terms) / len(terms)
    kl.backward()
    found, others = der_step()
    assert others[0] == pytest.approx(kl.item(), rel=1e-4)
    assert apart(found, torch.cat([p.grad.flatten() for p in model.parameters()]).float()) < 1e-4
    cloned, _ = der_step(clone_coef=0.5)
    assert apart(cloned, found) > 1e-2


class OnOneRank(DistillationCL):
    """A loss that a single rank has."""

    def extra_losses(self, trainer):
        if torch.distributed.get_rank() == 0:
            yield 2 * sum(p.square().sum() for p in trainer.model.parameters())


def lonely_step():
    trainer = law_trainer()
    use(trainer, OnOneRank())
    trainer.trajectory_buffer = TrajectoryBuffer()
    weights = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
    found, metrics = gradient(trainer, (3,))
    return found, torch.tensor([metrics["extra_loss"]]), weights


def steps_on_a_rank():
    found = [distilled_step(shard, order) for shard in (False, True) for order in ((0, 1, 2), (0,))]
    return {"steps": [*found, der_step(False, 0.5), der_step(True, 0.5)], "lonely": lonely_step()}


def test_ranks_and_shards_do_not_matter(tmp_path):
    """A rank may have nothing to distil."""
    alone = [distilled_step(order=order) for order in ((0, 1, 2), (0,))] * 2 + [der_step(clone_coef=0.5)] * 2
    for found in on_two_ranks(steps_on_a_rank, tmp_path):
        for (step, others), (expected, rest) in zip(found["steps"], alone, strict=True):
            assert apart(step, expected) < 1e-5
            torch.testing.assert_close(others, rest, rtol=1e-4, atol=1e-5)
        step, extra, weights = found["lonely"]
        assert apart(step, 2 * weights) < 1e-5 and extra == pytest.approx(weights.square().sum().item(), rel=1e-4)


def test_a_server_that_fails_costs_no_teacher(monkeypatch):
    """The run is saved as it was at the beginning of the step, with the teachers of then."""
    trainer = law_trainer(task_order=["retail", "airline"])
    trainer.args.rollout_engine, saved = "vllm", []
    algorithms = [DistillationCL(), Drift(drift_every=1)]
    use(trainer, *algorithms)
    teacher = policy.snapshot(moved(tiny()[0]))
    algorithms[0].teachers, algorithms[1].ends = {"airline": teacher}, {"airline": teacher}
    monkeypatch.setattr(checkpoint, "save", lambda trainer: saved.extend(a.tensors() for a in trainer.algorithms))
    with pytest.raises(StopRun), run.saved_before(trainer, run.drawn(trainer)):
        raise server.ServerFailed("gone")
    for tensors in saved:
        assert all(torch.equal(tensors[f"0/{name}"], teacher[name]) for name in teacher)
    assert len(saved) == 2


@pytest.mark.parametrize("kind, other", [(DistillationCL, "trajectories"), (DERPlusPlus, "tasks")])
def test_the_other_kind_of_replay_is_refused(kind, other):
    with pytest.raises(ValueError, match="needs --replay_kind"):
        kind(replay_kind=other)


# ------------------------------------------------------------------------------------------------------- whole runs


def test_no_evaluator_is_called_for_old_tasks(tmp_path, monkeypatch):
    calls, unscored, score, score_and_record = [], [], oracle.score, evaluation.score_and_record
    monkeypatch.setattr(oracle, "score", lambda *args: calls.append(args) or score(*args))

    def watched(episode, trajectory, *rest, scored=True, **kwargs):
        before = len(calls)
        record = score_and_record(episode, trajectory, *rest, scored=scored, **kwargs)
        assert len(calls) == before + scored
        unscored.extend([] if scored else [record["domain"]])
        return record

    monkeypatch.setattr(evaluation, "score_and_record", watched)
    flags = ["--cl_algorithm", "distillation", "--replay_ratio", "0.5", "--run_name", "run"]
    summary = small_run(tmp_path, *flags)
    records = report.read_jsonl(tmp_path / "run" / "trajectories.jsonl")
    old = [r for r in records if r.get("replayed")]
    assert unscored == ["airline"] * len(old) and len(old) == 8
    assert all(r["reward"] is None and r["tool_accuracy"] is None and not r["error"] and r["tokens"] for r in old)
    steps = [r for r in report.read_jsonl(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "step"]
    assert all("extra_loss" in s and s["invalid"] == 0 for s in steps if s["domain"] == "telecom")
    assert summary["bytes_kept"] > 2 * 4 * 500_000  # two teachers
    assert (tmp_path / "run" / "report.md").exists()


def test_a_stopped_run_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    """For DistillationCL see test_drift.py."""
    flags = [*stopper(tmp_path, "distill", "DERPlusPlus"), "--replay_kind", "trajectories"]
    flags += ["--replay_ratio", "0.5", "--distill_coef", "0.3"]
    whole = small_run(tmp_path, *flags, "--run_name", "whole")
    folder = stopped_run(tmp_path, monkeypatch, *flags, step=2)
    resume(folder)
    assert_equal_runs(tmp_path / "whole", folder)
    assert whole["statistics"]["total_replay_samples"] == 2 * 2 * 4  # two draws in each of two steps
    buffer = json.loads((folder / "checkpoints" / "LAST" / "training" / "buffer.json").read_text())
    assert all(len(unpack(t["top"])[0]) == sum(t["action_mask"]) for t in buffer["buffers"]["airline"]["items"])
