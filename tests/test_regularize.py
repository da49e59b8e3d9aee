"""regularize.py: the Fisher information, the penalties and their solutions against independent references."""

import copy
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_train import SMALL, STOPS, comparable, fail, run_main, small_args
from torch.nn import functional as F

import generative
import grpo
import regularize
import replay
import train
from regularize import EWC, Composed, LwF, OnlineEWC, fisher_diagonal


def squared_error(model, batch):
    x, y = batch
    return (model(x) - y).square().sum(1) / 2


# ---------------------------------------------------------------------------------------- Fisher information


def test_fisher_is_the_mean_of_squares_of_each_sequences_gradient():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x, y = torch.randn(7, 3), torch.randn(7, 2)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    batches = iter([(x[:4], y[:4]), (x[4:5], y[4:5]), (x[5:], y[5:])])  # read once

    def freed(model, batch):
        assert all(p.grad is None for p in model.parameters())  # no gradient is kept beside the sum
        return squared_error(model, batch)

    found = fisher_diagonal(model, batches, freed)
    weights = {name: p.detach().double() for name, p in model.named_parameters()}

    def loss(weights, x, y):
        return (torch.func.functional_call(model, weights, (x,)) - y).square().sum() / 2

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x.double(), y.double())
    for f, gradient in zip(found, gradients.values(), strict=True):
        assert f.dtype == torch.float32
        torch.testing.assert_close(f.double(), gradient.square().mean(0), rtol=1e-5, atol=1e-9)
        assert not torch.allclose(f.double(), gradient.mean(0).square(), rtol=0.1)
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())  # a caller's gradients stay


def test_fisher_of_a_known_model_is_the_known_one():
    """Logistic regression with labels of its own: the Fisher information is E[p (1 - p) x^2]."""
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1, bias=False)
    x = torch.randn(4000, 2)
    p = torch.sigmoid(model(x)).detach()
    labels = torch.bernoulli(p)

    def loss(model, batch):
        return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1], reduction="none")[:, 0]

    [found] = fisher_diagonal(model, zip(x.split(1), labels.split(1), strict=True), loss)
    expected = (p * (1 - p) * x.square()).mean(0)
    torch.testing.assert_close(found[0], expected, rtol=0.06, atol=0)


@pytest.fixture(scope="module")
def policy():
    return grpo.load_policy("tiny", "float32", "cpu")[0]


def conversations(number=3):
    rng = np.random.default_rng(0)
    rows = []
    for n in range(number):
        turns = [-1] * 4 + [0] * (3 + n) + [-1] * 2 + [1] * 3
        rows.append({"domain": "airline", "token_ids": rng.integers(3, 300, len(turns)).tolist(), "turns": turns})
    return rows


def log_probability(model, item, temperature):
    """Of what was sampled in a conversation, plainly."""
    logits = model(torch.tensor([item["token_ids"]])).logits[0] / temperature
    places = [k for k, turn in enumerate(item["turns"]) if turn >= 0]
    return sum(logits[k - 1].log_softmax(-1)[item["token_ids"][k]] for k in places)


@pytest.mark.parametrize("chunk, recompute", [(2**26, False), (1, False), (1, True)])
def test_fisher_of_the_agent_is_of_whole_conversations(policy, chunk, recompute, monkeypatch):
    monkeypatch.setattr(grpo, "CHUNK", chunk)
    if recompute:
        policy, _ = grpo.load_policy("tiny", "float32", "cpu", gradient_checkpointing=True)
    ewc = EWC(fisher_samples=3, temperature=0.7)
    trainer = SimpleNamespace(model=policy)
    old = [{**item, "domain": "retail"} for item in conversations(2)]  # replayed: not of this domain
    trainer.finished = [(item, 0.0) for item in [*conversations(1), *old, *conversations(3)]]
    ewc.post_step_hook(trainer, "airline")
    assert [item["turns"] for item in ewc.recent] == [item["turns"] for item in conversations(3)]  # the last three
    ewc.post_task_hook(trainer, "airline")
    assert ewc.recent == [] and ewc.get_statistics()["tasks held"] == 1
    double = copy.deepcopy(policy).double()
    total = [torch.zeros_like(p) for p in double.parameters()]
    for item in conversations(3):
        gradients = torch.autograd.grad(log_probability(double, item, 0.7), list(double.parameters()))
        total = [t + g.square() / 3 for t, g in zip(total, gradients, strict=True)]
    anchor, fisher = ewc.held[0]
    for f, expected, theta, p in zip(fisher, total, anchor, policy.parameters(), strict=True):
        torch.testing.assert_close(f.double(), expected, rtol=1e-3, atol=1e-6 * expected.max().item())
        assert torch.equal(theta, p) and theta.data_ptr() != p.data_ptr()
    mean = sum(t.sum() for t in total) / sum(t.numel() for t in total)
    assert ewc.information["airline"] == pytest.approx(mean.item(), rel=1e-4)
    assert ewc.bytes_kept() == 2 * 4 * sum(p.numel() for p in policy.parameters())


def test_fisher_of_lora_is_of_the_adapters_alone(policy, tmp_path):
    tokenizer = grpo.load_policy("tiny", "float32", "cpu")[1]
    grpo.save_policy(policy, tokenizer, tmp_path / "base")
    model, _ = grpo.load_policy(str(tmp_path / "base"), "float32", "cpu", lora_rank=2)
    ewc = EWC()
    items = [{"token_ids": item["token_ids"], "turns": item["turns"]} for item in conversations(2)]
    fisher = ewc.consolidate(model, items, ewc.conversation_loss)
    adapters = grpo.trained_parameters(model)
    assert [f.shape for f in fisher] == [p.shape for p in adapters.values()]
    assert sum(f.numel() for f in fisher) < sum(p.numel() for p in policy.parameters()) / 10
    moved = {name: f.sum().item() for (name, f) in zip(adapters, fisher, strict=True)}
    assert all((value > 0) == ("lora_B" in name) for name, value in moved.items())  # B is 0, so A has no gradient yet
    assert all(p.grad is None for p in model.parameters())


def test_what_has_no_fisher_information_is_named():
    frozen = torch.nn.Linear(2, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        fisher_diagonal(frozen, [(torch.ones(1, 2), torch.ones(1, 1))], squared_error)
    with pytest.raises(ValueError, match="is not finite"):
        fisher_diagonal(torch.nn.Linear(2, 1), [(torch.full((1, 2), math.inf), torch.ones(1, 1))], squared_error)
    with pytest.raises(ValueError, match="one sequence at least, got none"):
        fisher_diagonal(torch.nn.Linear(2, 1), [], squared_error)


def test_a_failing_loss_leaves_no_hook_behind():
    model = torch.nn.Linear(2, 1)
    with pytest.raises(ZeroDivisionError):
        fisher_diagonal(model, [(1, 0)], lambda model, batch: batch[0] / batch[1])
    model(torch.ones(1, 2)).sum().backward()
    assert model.weight.grad is not None  # a hook would have taken it


# ---------------------------------------------------------------------------------------------- the penalties


@pytest.mark.parametrize("kind", [EWC, OnlineEWC])
def test_the_penaltys_gradient_is_lambda_f_times_the_distance(kind):
    torch.manual_seed(0)
    ewc = kind(0.4) if kind is EWC else kind(0.4, 0.9)
    p = torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
    tasks = [[torch.randn(3, 2, dtype=torch.float64), torch.rand(3, 2, dtype=torch.float64)] for _ in range(2)]
    for theta, fisher in tasks:
        ewc.hold([theta], [fisher.clone()])
    (theta_1, f_1), (theta_2, f_2) = tasks
    loss = sum(ewc.penalty([p]))
    loss.backward()
    if kind is EWC:
        expected = 0.4 * f_1 * (p - theta_1) + 0.4 * f_2 * (p - theta_2)
        value = 0.2 * (f_1 * (p - theta_1) ** 2 + f_2 * (p - theta_2) ** 2).sum()
    else:
        expected = 0.4 * (0.9 * f_1 + f_2) * (p - theta_2)
        value = 0.2 * ((0.9 * f_1 + f_2) * (p - theta_2) ** 2).sum()
    torch.testing.assert_close(p.grad, expected.detach(), rtol=1e-12, atol=0)
    assert loss.item() == pytest.approx(value.item(), rel=1e-12)


def minimise(p, objective):
    optimizer = torch.optim.LBFGS(
        [p], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimizer.step(closure)


def quadratic(curvature, centre):
    return lambda p: (curvature * (p - centre) ** 2).sum() / 2


QUADRATICS = [  # (curvature, which is the Fisher information; minimum) of three tasks
    (torch.tensor([4.0, 1.0, 0.1], dtype=torch.float64), torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)),
    (torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64), torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64)),
    (torch.tensor([0.5, 0.5, 2.0], dtype=torch.float64), torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64)),
]


def solutions(penalty) -> list:
    """The minimum at the end of each task."""
    p, found = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)), []
    for curvature, centre in QUADRATICS:
        task = quadratic(curvature, centre)
        minimise(p, lambda task=task: task(p) + (sum(penalty.penalty([p])) if penalty.held else 0))
        penalty.hold([p.detach()], [curvature.clone()])
        found.append(p.detach().clone())
    return found


def test_ewc_has_the_published_solution():
    """After two tasks that of both together, sum F_k theta_k / sum F_k; after three, the terms of Kirkpatrick et al.
    hold to the solution after two and to that after one (Huszar 2018, eq. 5: the first task counts twice)."""
    (f1, c1), (f2, c2), (f3, c3) = QUADRATICS
    found = solutions(EWC(1.0))
    two = (f1 * c1 + f2 * c2) / (f1 + f2)
    torch.testing.assert_close(found[0], c1, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], two, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2], (f1 * c1 + f2 * two + f3 * c3) / (f1 + f2 + f3), rtol=0, atol=1e-5)


def test_online_ewc_has_the_solution_of_all_tasks_together():
    found = solutions(OnlineEWC(1.0, 1.0))
    weighted = sum(f * c for f, c in QUADRATICS) / sum(f for f, _ in QUADRATICS)
    torch.testing.assert_close(found[2], weighted, rtol=0, atol=1e-5)
    (f1, c1), (f2, c2), (f3, c3) = QUADRATICS
    found = solutions(OnlineEWC(0.7, 0.6))
    two = (0.7 * f1 * c1 + f2 * c2) / (0.7 * f1 + f2)
    held = 0.7 * (0.6 * f1 + f2)
    torch.testing.assert_close(found[1], two, rtol=0, atol=1e-5)
    torch.testing.assert_close(found[2], (held * two + f3 * c3) / (held + f3), rtol=0, atol=1e-5)


def test_misuse_of_ewc_is_named():
    ewc = EWC(1.0)
    with pytest.raises(ValueError, match="no task has ended"):
        sum(ewc.penalty([torch.nn.Parameter(torch.zeros(2))]))
    ewc.hold([torch.zeros(2)], [torch.ones(2)])
    for other in ([torch.nn.Parameter(torch.zeros(3))], [torch.nn.Parameter(torch.zeros(2))] * 2):
        with pytest.raises(ValueError, match="trained parameters are not those"):
            sum(ewc.penalty(other))
    for wrong in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="ewc_lambda must be 0 or more"):
            EWC(wrong)
        with pytest.raises(ValueError, match="lwf_coef must be 0 or more"):
            LwF(wrong)
    with pytest.raises(ValueError, match=r"ewc_decay must be in \[0, 1\], got 2"):
        OnlineEWC(1.0, 2)
    with pytest.raises(ValueError, match="fisher_samples must be at least 1"):
        EWC(1.0, fisher_samples=0)


def test_lwf_is_the_kl_of_the_frozen_policy_on_the_batch(policy, monkeypatch):
    """Against whole log-softmaxes of two models in float64; micro-batches and chunks do not matter."""
    student = copy.deepcopy(policy)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.02 * torch.randn_like(p)
    items = conversations(3)
    trajectories = [
        grpo.Trajectory(
            token_ids=item["token_ids"],
            action_mask=[turn >= 0 for turn in item["turns"]],
            logprobs=[0.0] * len(item["turns"]),
            turns=item["turns"],
        )
        for item in items
    ]
    lwf = LwF(0.3)
    trainer = SimpleNamespace(model=policy)
    trainer.batches = [grpo.collate(trajectories[:2], [1.0, 0.0]), grpo.collate(trajectories[2:], [0.0])]
    assert lwf.extra_loss(trainer) is None  # no domain has ended
    lwf.post_task_hook(trainer, "airline")
    trainer.model = student
    double, frozen = copy.deepcopy(student).double(), copy.deepcopy(policy).double()
    terms = []
    for item in items:
        ids = torch.tensor([item["token_ids"]])
        p, q = (model(ids).logits[0].log_softmax(-1) for model in (frozen, double))
        terms += [(p[k - 1].exp() * (p[k - 1] - q[k - 1])).sum() for k, turn in enumerate(item["turns"]) if turn >= 0]
    expected = 0.3 * sum(terms) / len(terms)
    expected.backward()
    assert expected > 1e-3
    for chunk in (2**26, 1):
        monkeypatch.setattr(grpo, "CHUNK", chunk)
        student.zero_grad()
        loss = 0.0
        for part in lwf.extra_loss(trainer):
            part.backward()
            loss += part.item()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        for mine, other in zip(student.parameters(), double.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-2, atol=1e-6)
    for now, before in zip(lwf.teacher, policy.parameters(), strict=True):
        assert torch.equal(now, before)
    trainer.batches = []
    assert lwf.extra_loss(trainer) is None  # a step without a conversation to learn from


def test_distillation_reads_any_head_of_the_teacher(policy):
    """One that is not tied to the embedding, is trained, and has a bias: as it was then."""
    model = copy.deepcopy(policy)
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, dtype=torch.float32)
    model.set_output_embeddings(head)
    model.compute_dtype = torch.float32
    row = (torch.tensor([[5, 9, 31, 7]]), torch.ones(1, 4, dtype=torch.long), torch.tensor([[0, 1, 0, 1]]))
    frozen = grpo.frozen_head(model)
    states = grpo.hidden_states(model, *row)
    assert states.shape == (2, model.config.hidden_size) and not states.requires_grad
    assert not any(p.requires_grad for p in frozen.parameters()) and frozen.weight.data_ptr() != head.weight.data_ptr()
    assert grpo.distillation_kl(model, *row, frozen, states).item() == pytest.approx(0.0, abs=1e-6)
    with torch.no_grad():
        before = model(row[0]).logits[0, [0, 2]].log_softmax(-1)
        head.bias += torch.randn(head.bias.shape, generator=torch.Generator().manual_seed(0))
        head.weight *= 1.3
        after = model(row[0]).logits[0, [0, 2]].log_softmax(-1)
    expected = (before.exp() * (before - after)).sum().item()
    assert grpo.distillation_kl(model, *row, frozen, states).item() == pytest.approx(expected, rel=1e-4)
    head.requires_grad_(False)
    assert grpo.frozen_head(model) is head  # no copy of what is not trained


# ---------------------------------------------------------------------------------------------- composition


class Constant(replay.SequentialCL):
    def __init__(self, value):
        self.value = value

    def extra_loss(self, trainer):
        return self.value


def test_composition_is_addition_of_losses():
    one, two = torch.tensor(1.0), torch.tensor(2.0)
    losses = Composed(Constant(one), Constant(None), Constant(iter([two, two]))).extra_loss(None)
    assert sum(losses).item() == 5
    assert list(Composed(Constant(None), Constant(None)).extra_loss(None)) == []
    stored = replay.TrajectoryReplayCL()
    with pytest.raises(ValueError, match="cannot be composed"):
        Composed(stored, stored)


USERS_OWN = """
from replay import SequentialCL

class L2(SequentialCL):
    def extra_loss(self, trainer):
        return 1e-4 * sum(p.square().sum() for p in trainer.model.parameters())
"""


def test_a_loss_of_the_users_own_stands_beside_lwf_and_ewc(tmp_path):
    """It is a tensor with a graph through the weights that LwF exchanges to read the frozen policy."""
    (tmp_path / "own.py").write_text(USERS_OWN)
    flags = f"--cl_algorithm {tmp_path / 'own.py'}:L2 --lwf_coef 0.1 --ewc_lambda 1 --num_iterations 2 --run_name r"
    summary = train.train(small_args(tmp_path, *flags.split()))
    assert summary["statistics"]["tasks held"] == 2
    steps = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert all(r["extra_loss"] > 0 for r in steps if r["kind"] == "step")


def test_a_composed_replay_replays_and_is_saved_whole(tmp_path):
    algorithm = train.replay.load_algorithm("replay", small_args(tmp_path, "--replay_kind", "trajectories"))
    both = Composed(algorithm, EWC(1.0), LwF(0.1))
    assert both.stores_trajectories and not both.keeps_no_data and not both.all_domains
    assert both.augment_batch(["a"], "airline") == ["a"]
    both.algorithms[1].hold([torch.ones(2)], [torch.ones(2)])
    both.algorithms[2].teacher, both.algorithms[2].ended = [torch.zeros(2)], 1
    assert set(both.snapshots()) == {"1_anchor_0", "1_fisher_0", "2_frozen"}
    again = Composed(copy.deepcopy(algorithm), EWC(1.0), LwF(0.1))
    again.load_state_dict(json.loads(json.dumps(both.state_dict())))
    again.load_snapshots(both.snapshots())
    assert torch.equal(again.algorithms[1].held[0][0][0], torch.ones(2)) and again.algorithms[2].teacher is not None
    assert again.bytes_kept() == both.bytes_kept() == algorithm.bytes_kept() + 3 * 8
    again.load_state_dict(both.state_dict())
    for missing in both.snapshots():
        with pytest.raises(ValueError, match="it has no"):
            again.load_snapshots({name: saved for name, saved in both.snapshots().items() if name != missing})


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--cl_algorithm ewc", [EWC]),
        ("--cl_algorithm online_ewc", [OnlineEWC]),
        ("--cl_algorithm lwf", [LwF]),
        ("--cl_algorithm lwf --ewc_lambda 2", [LwF, EWC]),
        ("--cl_algorithm ewc --lwf_coef 2", [EWC, LwF]),
        ("--cl_algorithm replay --ewc_lambda 0.4 --lwf_coef 0.1", [replay.ReplayCL, EWC, LwF]),
        ("--cl_algorithm replay --ewc_lambda 0.4 --ewc_decay 0.5", [replay.ReplayCL, OnlineEWC]),
        ("--cl_algorithm generative_replay --lwf_coef 0.1", [generative.GenerativeReplayCL, LwF]),
        ("--cl_algorithm sequential --ewc_lambda 0 --lwf_coef 0", [replay.SequentialCL]),
    ],
)
def test_flags_choose_what_is_composed(flags, expected, tmp_path):
    args = small_args(tmp_path, *flags.split(), "--temperature", "0.6")
    regularize.set_defaults(args)
    algorithm = replay.load_algorithm(args.cl_algorithm, args, train.ALGORITHMS)
    algorithm = regularize.with_penalties(algorithm, args)
    parts = list(algorithm.algorithms) if isinstance(algorithm, Composed) else [algorithm]
    assert [type(part) for part in parts] == expected
    for part in parts:
        if isinstance(part, EWC):
            assert part.ewc_lambda == args.ewc_lambda is not None and part.temperature == 0.6
        if isinstance(part, OnlineEWC):
            assert part.ewc_decay == args.ewc_decay is not None
        if isinstance(part, LwF):
            assert part.lwf_coef == args.lwf_coef is not None


# ---------------------------------------------------------------------------------------------- whole runs


STOPPER = (
    """
import os
from regularize import Composed, LwF, OnlineEWC
from replay import ReplayCL

class Stopper(Composed):
    @classmethod
    def from_args(cls, args):
        replay = ReplayCL(replay_ratio=0.5, min_buffer_size=1)
        return cls(replay, OnlineEWC(0.4, 0.9, fisher_samples=5), LwF(0.1))
"""
    + STOPS
)


def test_a_stopped_run_continues_as_if_it_had_not_been(tmp_path, monkeypatch, capsys):
    """Stopped within the second domain, with what holds the first one and with conversations of its own."""
    (tmp_path / "stopper.py").write_text(STOPPER)
    flags = ["--cl_algorithm", f"{tmp_path / 'stopper.py'}:Stopper"]
    train.train(small_args(tmp_path, *flags, "--run_name", "whole"))
    monkeypatch.setenv("STOP_AT", "2")
    with pytest.raises(train.Interrupted):
        train.train(small_args(tmp_path, *flags, "--run_name", "stopped"))
    last = tmp_path / "stopped" / "checkpoints" / "LAST"
    held = [last / f"algorithm_{name}.safetensors" for name in ("1_anchor_0", "1_fisher_0", "2_frozen")]
    assert json.loads((last / "state.json").read_text())["algorithm"]["parts"][1]["recent"]
    with monkeypatch.context() as patch:
        for path in held:
            saved = path.read_bytes()
            path.unlink()
            assert "damaged" in fail(patch, capsys, "--resume", str(tmp_path / "stopped"))
            path.write_bytes(bytes(len(saved)))
            assert "damaged" in fail(patch, capsys, "--resume", str(tmp_path / "stopped"))
            path.write_bytes(saved)
    train.train(train.Args(resume=str(tmp_path / "stopped")))
    whole, resumed = (comparable(tmp_path / name) for name in ("whole", "stopped"))
    for a, b in zip(whole, resumed, strict=True):
        assert a == b
    summary = json.loads((tmp_path / "stopped" / "summary.json").read_text())
    assert summary["statistics"]["tasks held"] == 1 and summary["statistics"]["replayed"] > 0
    assert set(summary["statistics"]["mean Fisher information"]) == {"airline", "telecom"}
    steps = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all("extra_loss" in r for r in steps if r["kind"] == "step")


def test_a_sharded_run_continues_on_another_number_of_ranks(tmp_path):
    (tmp_path / "stopper.py").write_text(STOPPER)
    flags = [*SMALL, "--cl_algorithm", f"{tmp_path / 'stopper.py'}:Stopper", "--runs_dir", str(tmp_path), "--shard"]
    flags += ["--eval_max_tasks", "1", "--run_name", "r"]
    stopped = run_main(tmp_path / "shown", *flags, ranks=2, env={"STOP_AT": "2"})
    assert [code for code, _, _ in stopped] == [143, 143], stopped
    last = tmp_path / "r" / "checkpoints" / "LAST"
    before = {name: load_file(last / f"algorithm_{name}.safetensors") for name in ("1_anchor_0", "1_fisher_0")}
    weights = load_file(last / "model.safetensors")
    for tensors in before.values():  # whole, not shards
        assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in weights.items()}
    [(code, shown, errors)] = run_main(tmp_path / "shown", "--resume", str(tmp_path / "r"), "--shard")
    assert code == 0 and "resuming with 1 ranks a run of 2" in shown, errors
    for name, tensors in before.items():  # online EWC: the second domain's information is added to it, decayed
        after = load_file(last / f"algorithm_{name}.safetensors")
        if "fisher" in name:
            assert all((after[n] >= 0.9 * t * (1 - 1e-6)).all() for n, t in tensors.items())
        assert any(not torch.equal(after[n], t) for n, t in tensors.items())


def test_a_run_without_weight_on_the_penalty_is_the_sequential_one(tmp_path):
    for name, flags in (("a", ["sequential"]), ("b", ["ewc", "--ewc_lambda", "0"])):
        train.train(small_args(tmp_path, "--cl_algorithm", *flags, "--run_name", name))
    weights = [(tmp_path / name / "checkpoints" / "LAST" / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_strong_penalty_holds_the_policy(tmp_path):
    """In the second domain, the higher lambda the less the weights that mattered move."""
    moved = []
    for ewc_lambda in (1e-6, 1e3):
        run = tmp_path / f"{ewc_lambda}"
        flags = ["--cl_algorithm", "ewc", "--ewc_lambda", str(ewc_lambda), "--warmup_steps", "8"]
        train.train(small_args(tmp_path, *flags, "--run_name", run.name))
        last = run / "checkpoints" / "LAST"
        names = ("anchor_0", "fisher_0", "anchor_1")
        before, fisher, after = (load_file(last / f"algorithm_{name}.safetensors") for name in names)
        moved.append(sum((fisher[n] * (before[n] - after[n]) ** 2).sum().item() for n in fisher))
    assert 0 < moved[1] < moved[0] / 3


def test_a_run_resumed_with_other_trained_parameters_is_told_so(tmp_path, monkeypatch, capsys):
    (tmp_path / "stopper.py").write_text(STOPPER)
    monkeypatch.setenv("STOP_AT", "2")
    for name, flags in (("lora", ["--lora_rank", "2"]), ("all", [])):
        flags = ["--cl_algorithm", f"{tmp_path / 'stopper.py'}:Stopper", *flags, "--run_name", name]
        with pytest.raises(train.Interrupted):
            train.train(small_args(tmp_path, *flags))
    config = json.loads((tmp_path / "lora" / "config.json").read_text())
    for rank, message in ((0, "lora_rank"), (3, "the saved adapter has rank 2, not 3")):
        (tmp_path / "lora" / "config.json").write_text(json.dumps({**config, "lora_rank": rank}))
        assert message in fail(monkeypatch, capsys, "--resume", str(tmp_path / "lora"))
    load = grpo.load_policy

    def load_frozen(*args, **kwargs):
        model, tokenizer = load(*args, **kwargs)
        model.get_input_embeddings().requires_grad_(False)
        return model, tokenizer

    monkeypatch.setattr(grpo, "load_policy", load_frozen)
    message = fail(monkeypatch, capsys, "--resume", str(tmp_path / "all"))
    assert "other parameters were trained" in message and "embed_tokens" in message


def test_the_demonstration_shows_the_known_solutions(capsys):
    regularize.demonstrate()
    lines = capsys.readouterr().out.splitlines()[1:]
    distance = {line.split("  ")[0].strip(): float(line.split()[-1]) for line in lines}
    assert distance["joint"] == 0 and distance["online_ewc"] < distance["ewc"] < distance["one after the other"]
