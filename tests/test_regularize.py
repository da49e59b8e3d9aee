"""regularize.py: the Fisher information, the penalties and their solutions against independent references."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from law import small_run
from safetensors.torch import load_file
from torch.nn import functional as F

import grpo
import policy as policies
from grpo import Trajectory
from regularize import CPO, EWC, LwF, OnlineEWC, fisher_diagonal


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
    for f, gradient in zip(found.values(), gradients.values(), strict=True):
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

    found = fisher_diagonal(model, zip(x.split(1), labels.split(1), strict=True), loss)
    expected = (p * (1 - p) * x.square()).mean(0)
    torch.testing.assert_close(found["weight"][0], expected, rtol=0.06, atol=0)


@pytest.fixture(scope="module")
def policy():
    return policies.load_policy("tiny", "float32", "cpu")[0]


def conversations(number=3, domain="airline"):
    rng = np.random.default_rng(0)
    rows = []
    for n in range(number):
        turns = [-1] * 4 + [0] * (3 + n) + [-1] * 2 + [1] * 3
        t = Trajectory(domain, "0", rng.integers(3, 300, len(turns)).tolist(), [turn >= 0 for turn in turns])
        t.logprobs, t.turns = [0.0] * len(turns), turns
        rows.append(t)
    return rows


def log_probability(model, t, temperature):
    """Of what was sampled in a conversation, plainly."""
    logits = model(torch.tensor([t.token_ids])).logits[0] / temperature
    places = [k for k, turn in enumerate(t.turns) if turn >= 0]
    return sum(logits[k - 1].log_softmax(-1)[t.token_ids[k]] for k in places)


@pytest.mark.parametrize("chunk, recompute", [(2**26, False), (1, False), (1, True)])
def test_fisher_of_the_agent_is_of_whole_conversations(policy, chunk, recompute, monkeypatch):
    monkeypatch.setattr(policies, "CHUNK", chunk)
    if recompute:
        policy, _ = policies.load_policy("tiny", "float32", "cpu", gradient_checkpointing=True)
    ewc = EWC(temperature=0.7)
    ewc.SAMPLES = 3
    trainer = SimpleNamespace(model=policy)
    old = conversations(2, "retail")  # replayed: not of this domain
    trainer.trajectories = [*conversations(1), *old, *conversations(3)]
    ewc.post_step_hook(trainer, "airline")
    assert ewc.recent == [[t.token_ids, t.turns] for t in conversations(3)]  # the last three
    ewc.post_task_hook(trainer, "airline")
    assert ewc.recent == [] and ewc.get_statistics()["tasks held"] == 1
    double = copy.deepcopy(policy).double()
    total = [torch.zeros_like(p) for p in double.parameters()]
    for item in conversations(3):
        gradients = torch.autograd.grad(log_probability(double, item, 0.7), list(double.parameters()))
        total = [t + g.square() / 3 for t, g in zip(total, gradients, strict=True)]
    anchor, fisher = ewc.held[0]
    for (name, p), expected in zip(policy.named_parameters(), total, strict=True):
        f, theta = fisher[name], anchor[name]
        torch.testing.assert_close(f.double(), expected, rtol=1e-3, atol=1e-6 * expected.max().item())
        assert torch.equal(theta, p) and theta.data_ptr() != p.data_ptr()
    mean = sum(t.sum() for t in total) / sum(t.numel() for t in total)
    assert ewc.information["airline"] == pytest.approx(mean.item(), rel=1e-4)
    assert ewc.bytes_kept() == 2 * 4 * sum(p.numel() for p in policy.parameters())


def test_fisher_of_lora_is_of_the_adapters_alone(policy, tmp_path):
    tokenizer = policies.load_policy("tiny", "float32", "cpu")[1]
    policies.save_policy(policy, tokenizer, tmp_path / "base")
    model, _ = policies.load_policy(str(tmp_path / "base"), "float32", "cpu", lora_rank=2)
    ewc = EWC()
    items = [[t.token_ids, t.turns] for t in conversations(2)]
    fisher = ewc.consolidate(model, items, ewc.conversation_loss)
    adapters = policies.trained_parameters(model)
    assert {n: f.shape for n, f in fisher.items()} == {n: p.shape for n, p in adapters.items()}
    assert sum(f.numel() for f in fisher.values()) < sum(p.numel() for p in policy.parameters()) / 10
    assert all((f.sum() > 0) == ("lora_B" in name) for name, f in fisher.items())  # B is 0, so A has no gradient yet
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
        ewc.hold({"p": theta}, {"p": fisher.clone()})
    (theta_1, f_1), (theta_2, f_2) = tasks
    loss = sum(ewc.penalty({"p": p}))
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
        minimise(p, lambda task=task: task(p) + (sum(penalty.penalty({"p": p})) if penalty.held else 0))
        penalty.hold({"p": p.detach()}, {"p": curvature.clone()})
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


def test_cpo_pulls_what_it_protects_by_the_same_force_however_far_it_is():
    cpo = CPO(0.3)
    information = {"a": torch.tensor([[4.0, 0.0], [1.0, 0.9]]).double(), "b": torch.tensor([0.1, 2.0]).double()}
    there = {name: torch.zeros_like(f) for name, f in information.items()}
    cpo.hold(there, {name: f.clone() for name, f in information.items()})  # the mean over all six is 1.33
    protected = {"a": torch.tensor([[1.0, 0.0], [0.0, 0.0]]).double(), "b": torch.tensor([0.0, 1.0]).double()}
    for drift in (1e-6, 5.0):
        parameters = {n: torch.nn.Parameter(torch.full_like(f, -drift)) for n, f in there.items()}
        loss = sum(cpo.penalty(parameters))
        loss.backward()
        assert loss.item() == pytest.approx(0.3 * 2 * drift)
        for name, p in parameters.items():
            torch.testing.assert_close(p.grad, -0.3 * protected[name])
    assert cpo.get_statistics()["share protected"] == [pytest.approx(2 / 6, abs=1e-4)]


def test_cpo_has_the_solution_of_a_lasso_around_the_task_before():
    """The minimum of c (p - m)^2 / 2 + lambda |p - t| is a step towards m from t that lambda shortens, or t itself."""
    p, held = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)), CPO(0.5)
    held.hold({"p": torch.zeros(3, dtype=torch.float64)}, {"p": torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)})
    curvature, centre = torch.tensor([1.0, 1.0, 2.0]).double(), torch.tensor([2.0, 0.3, 0.3]).double()
    optimizer = torch.optim.SGD([p], lr=1e-3)
    for _ in range(8000):
        optimizer.zero_grad()
        (quadratic(curvature, centre)(p) + sum(held.penalty({"p": p}))).backward()
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([1.5, 0.0, 0.3]).double(), rtol=0, atol=2e-3)


def test_misuse_of_ewc_is_named():
    ewc = EWC(1.0)
    with pytest.raises(ValueError, match="no task has ended"):
        sum(ewc.penalty({"p": torch.nn.Parameter(torch.zeros(2))}))
    ewc.hold({"p": torch.zeros(2)}, {"p": torch.ones(2)})
    for other in ({"p": torch.nn.Parameter(torch.zeros(3))}, {"q": torch.nn.Parameter(torch.zeros(2))}):
        with pytest.raises(ValueError, match="trained parameters are not those"):
            sum(ewc.penalty(other))
    for wrong in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match="ewc_lambda must be"):
            EWC(wrong)
        with pytest.raises(ValueError, match="lwf_coef must be"):
            LwF(wrong)
    with pytest.raises(ValueError, match="ewc_decay must be from 0 to 1, got 2"):
        OnlineEWC(1.0, 2)


def test_lwf_is_the_kl_of_the_frozen_policy_on_the_batch(policy, monkeypatch):
    """Against whole log-softmaxes of two models in float64; micro-batches and chunks do not matter."""
    student = copy.deepcopy(policy)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in student.parameters():
            p += 0.02 * torch.randn_like(p)
    items = conversations(3)
    stored = conversations(1)
    stored[0].replayed = True
    lwf = LwF(0.3)
    trainer = SimpleNamespace(model=policy)
    trainer.batches = [grpo.collate(part) for part in (items[:2], items[2:], stored)]  # stored ones do not count
    assert list(lwf.extra_losses(trainer)) == []  # no domain has ended
    lwf.post_task_hook(trainer, "airline")
    trainer.model = student
    double, frozen = copy.deepcopy(student).double(), copy.deepcopy(policy).double()
    terms = []
    for t in items:
        ids = torch.tensor([t.token_ids])
        p, q = (model(ids).logits[0].log_softmax(-1) for model in (frozen, double))
        terms += [(p[k - 1].exp() * (p[k - 1] - q[k - 1])).sum() for k, turn in enumerate(t.turns) if turn >= 0]
    expected = 0.3 * sum(terms) / len(terms)
    expected.backward()
    assert expected > 1e-3
    for chunk in (2**26, 1):
        monkeypatch.setattr(policies, "CHUNK", chunk)
        student.zero_grad()
        loss = 0.0
        for part in lwf.extra_losses(trainer):
            part.backward()
            loss += part.item()
        assert loss == pytest.approx(expected.item(), rel=1e-4)
        for mine, other in zip(student.parameters(), double.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-2, atol=1e-6)
    for now, before in zip(lwf.teacher.values(), policy.parameters(), strict=True):
        assert torch.equal(now, before)
    trainer.batches = []
    assert list(lwf.extra_losses(trainer)) == []  # a step without a conversation to learn from


# ------------------------------------------------------------------------------------------------------ whole runs


def test_a_run_without_weight_on_the_penalty_is_the_sequential_one(tmp_path):
    for name, flags in (("a", ["sequential"]), ("b", ["ewc", "--ewc_lambda", "0"])):
        small_run(tmp_path, "--cl_algorithm", *flags, "--run_name", name)
    weights = [(tmp_path / name / "checkpoints" / "LAST" / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_strong_penalty_holds_the_policy(tmp_path):
    """In the second domain, the higher lambda the less the weights that mattered move."""
    moved = []
    for ewc_lambda in (1e-6, 1e3):
        run = tmp_path / f"{ewc_lambda}"
        flags = ["--cl_algorithm", "ewc", "--ewc_lambda", str(ewc_lambda), "--warmup_steps", "8"]
        small_run(tmp_path, *flags, "--run_name", run.name)
        last = run / "checkpoints" / "LAST"
        held = load_file(last / "training" / "algorithm_0.safetensors")
        names = [name.removeprefix("anchor_0/") for name in held if name.startswith("anchor_0/")]
        distance = {n: held[f"anchor_0/{n}"] - held[f"anchor_1/{n}"] for n in names}
        moved.append(sum((held[f"fisher_0/{n}"] * distance[n] ** 2).sum().item() for n in names))
    assert 0 < moved[1] < moved[0] / 3
