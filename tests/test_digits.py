"""experiments/digits.py: the heads, the solver's loss by hand, the arms, and the experiment."""

import copy
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_generative import shown_to
from torch import nn
from torch.nn import functional as F

from experiments import digits
from experiments.digits import Args, GenerativeReplay, Heads, Kind
from flags import checked
from generative import replay_weights

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "scenario, n, competing, labels",
    [
        ("class", 3, [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]], [1, 4]),
        ("class", 2, [[0, 1, 2, 3], [6, 7, 8, 9]], [1, 3]),  # the head grows
        ("domain", 3, [[0, 1], [6, 7]], [1, 0]),
        ("task", 3, [[0, 1], [10, 11]], [1, 0]),
    ],
)
def test_the_scenario_says_which_logits_compete(scenario, n, competing, labels):
    heads = Heads(scenario, 3, 2)
    logits = torch.arange(12.0).view(2, 6)[:, : heads.outputs]
    chosen, label = heads.choice(logits, torch.tensor([1, 3 if n == 2 else 4]), n)
    assert chosen.tolist() == competing and label.tolist() == labels
    with pytest.raises(ValueError, match=f"labels must be in 0 .. {3 if n == 2 else 5}, got 7"):
        heads.loss(logits, torch.tensor([3, 7]), n)


def test_a_teacher_speaks_of_the_heads_that_it_knows():
    logits = torch.arange(12.0).view(2, 6)
    ((student, teacher),) = Heads("class", 3, 2).pairs(logits, logits, 3)
    assert student.shape[1] == 6 and teacher.shape[1] == 4
    assert [s[0].tolist() for s, _ in Heads("task", 3, 2).pairs(logits, logits, 3)] == [[0, 1], [2, 3]]


def rehearsal(**kind):
    torch.manual_seed(0)
    heads = Heads("class", 3, 2)
    solver = nn.Sequential(nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, heads.outputs))
    args = Args(batch_size=8, generator_hidden=16, generator_learning_rate=1e-3)
    return GenerativeReplay(Kind(**{"by_class": False, **kind}), solver, heads, args)


def task(k, n=20):
    rng = torch.Generator().manual_seed(k)
    return torch.rand(n, 64, generator=rng), torch.arange(n) % 2 + 2 * k


def learn(replayer, *tasks, steps=3):
    for k in tasks:
        x, y = task(k)
        replayer.begin_task(x, y)
        for _ in range(steps):
            replayer.step(x[:8], y[:8])
        replayer.end_task()


def test_solver_and_generator_learn_from_the_same_generated_batch_with_the_same_weights(monkeypatch):
    replayer = rehearsal()
    learn(replayer, 0, 1)
    made, taught = [], shown_to(replayer, monkeypatch)
    generated = replayer.generated
    monkeypatch.setattr(replayer, "generated", lambda number: made.append(generated(number)) or made[-1])
    x, y = task(2)
    replayer.begin_task(x, y)
    for _ in range(4):
        replayer.step(x[:8], y[:8])
    assert len(made) == len(taught) == 4
    for (batch, _), parts in zip(made, taught, strict=True):
        assert [weight for weight, _, _ in parts] == list(replay_weights(3))
        assert parts[1][1] is batch
        assert all((image == x).all(1).any() for image in parts[0][1])  # from the memory of the current task


@pytest.mark.parametrize("soft", [False, True])
def test_the_solvers_step_is_the_formula(soft):
    replayer = rehearsal(soft=soft)
    learn(replayer, 0)
    replayer.solver.eval()  # no dropout, so that it can be computed again
    x, y = task(1)
    replayer.begin_task(x, y)
    generated = replayer.old_generator.generate(8)
    replayer.generated = lambda number: (generated, None)
    student, teacher = replayer.solver(generated).double(), replayer.teacher(generated).double()
    old = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        if soft:
            p = np.exp(np.array(t[:2]) / 2) / np.exp(np.array(t[:2]) / 2).sum()
            log_q = np.array(s[:4]) / 2 - math.log(sum(math.exp(v / 2) for v in s[:4]))
            old -= 4 * (p * log_q[:2]).sum()
        else:
            label = 0 if t[0] > t[1] else 1
            old -= s[label] - math.log(sum(math.exp(v) for v in s[:4]))
    logits = replayer.solver(x[:8])[:, :4].double().tolist()
    new = -sum(v[k] - math.log(sum(map(math.exp, v))) for v, k in zip(logits, y[:8].tolist(), strict=True))
    assert replayer.step(x[:8], y[:8]) == pytest.approx(0.5 * new / 8 + 0.5 * old / 8, rel=1e-5)


def test_the_generator_of_unrehearsed_learns_the_current_task_only(monkeypatch):
    replayer = rehearsal(rehearsed=False)
    learn(replayer, 0)
    taught = shown_to(replayer, monkeypatch)
    replayer.begin_task(*task(1))
    replayer.step(*(part[:8] for part in task(1)))
    [[(weight, x, _)]] = taught
    assert weight == 1.0 and all((image == task(1)[0]).all(1).any() for image in x)


def test_the_teacher_is_the_frozen_solver_of_the_last_tasks_end():
    replayer = rehearsal()
    learn(replayer, 0)
    first, before = replayer.teacher, copy.deepcopy(replayer.solver.state_dict())
    assert not any(p.grad is not None for p in replayer.solver.parameters())  # a gradient can be a sample
    learn(replayer, 1)
    for name, value in replayer.solver.state_dict().items():
        assert torch.equal(first.state_dict()[name], before[name])
        assert torch.equal(value, replayer.teacher.state_dict()[name]) and not torch.equal(value, before[name])
    assert not any(p.requires_grad or p.grad is not None for p in first.parameters())
    assert not any(module.training for module in first.modules())


def test_images_are_split_by_class_without_overlap():
    y = torch.arange(1000) // 100
    tasks = digits.split_tasks(torch.arange(len(y)), y, 0)
    train, test = (torch.cat([t[k] for t in tasks]) for k in (0, 2))
    assert sorted(torch.cat([train, test]).tolist()) == list(range(len(y))) and len(test) == 200
    assert [sorted(t[1].unique().tolist()) for t in tasks] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    other = digits.split_tasks(torch.arange(len(y)), y, 1)
    assert not torch.equal(tasks[0][0], other[0][0])


def test_the_order_of_the_arms():
    """One seed, with room between them; docs/results.md has five, with intervals."""
    arms = ("naive", "unrehearsed", "soft", "conditional_soft", "joint")
    scores = {arm: np.mean(digits.run_arm(Args(), "class", arm, 0)["R"][-1]) for arm in arms}
    assert scores["naive"] < 0.25 < scores["unrehearsed"] < 0.65 < scores["soft"] < 0.9
    assert 0.9 < scores["conditional_soft"] < scores["joint"] and scores["joint"] > 0.93


PENALTIES = [("domain", "ewc", "naive"), ("task", "online_ewc", "naive"), ("class", "er_plus", "experience_replay")]


@pytest.mark.parametrize("scenario, arm, plain", PENALTIES)
def test_penalties_change_the_tasks_behind_the_first_unless_their_weight_is_0(scenario, arm, plain):
    def run(arm, weight, lwf):
        weights = {"ewc_lambda": weight, "er_plus_lambda": weight, "lwf_coef": lwf}
        return digits.run_arm(Args(iterations=20, **weights), scenario, arm, 0)

    plain, without, held = run(plain, 0.0, 0.0), run(arm, 0.0, 0.0), run(arm, 1e3, 1.0)
    assert without["R"] == plain["R"]
    assert held["R"][0] == plain["R"][0] and held["R"][1:] != plain["R"][1:]
    size = (held["bytes_kept"] - plain["bytes_kept"]) / {"ewc": 10, "online_ewc": 2, "er_plus": 11}[arm]
    assert size == 4 * (64 * 100 + 100 + 100 * 100 + 100 + 101 * (2 if scenario == "domain" else 10))


def learner_of(arm, **settings):
    torch.manual_seed(0)
    return digits.Plain(arm, nn.Linear(64, 10), Heads("class"), Args(**settings), np.random.default_rng(0))


IMAGES, LABELS = torch.rand(6, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1, 1, 0])


def test_der_keeps_logits_and_pulls_them_back_on_two_draws():
    learner = learner_of("der", der_alpha=0.3, der_beta=0.7)
    learner.begin_task(IMAGES, LABELS)
    learner.step(IMAGES, LABELS)
    learner.end_task()
    for image, label, logits in learner.buffer.items:
        torch.testing.assert_close(logits, learner.solver(image))
        assert label == LABELS[(image == IMAGES).all(1)].item()
    assert learner.bytes_kept() == 6 * 4 * (64 + 10)
    draws = [(IMAGES[:2], LABELS[:2], torch.randn(2, 10)), (IMAGES[3:5], LABELS[3:5], torch.randn(2, 10))]
    learner.begin_task(IMAGES, LABELS + 2)
    solver = nn.Linear(64, 10)
    solver.load_state_dict(learner.solver.state_dict())
    expected = F.cross_entropy(solver(IMAGES)[:, :4], LABELS + 2)
    expected = expected + 0.7 * F.cross_entropy(solver(draws[0][0])[:, :4], draws[0][1])
    expected = expected + 0.3 * (solver(draws[1][0]) - draws[1][2]).square().mean()
    expected.backward()
    left = iter(draws)
    learner.drawn = lambda number: next(left)
    learner.step(IMAGES, LABELS + 2)
    for p, q in zip(learner.solver.parameters(), solver.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize(
    "arm, scale, merged", [("merge", 1.0, 2.0), ("task_arithmetic", 0.5, 2.0), ("ties", 1.0, 2.0), ("ties", 0.5, 1.0)]
)
def test_merges_of_two_tasks_are_those_of_merge_py(arm, scale, merged):
    """From weights of 0; the first task ends with weights of 1, the second with 3."""
    learner = learner_of(arm, merge_scale=scale)

    def fill(value):
        for p in learner.solver.parameters():
            p.data.fill_(value)

    fill(0.0)
    learner.start = learner.weights()
    for end in (1.0, 3.0):
        learner.begin_task(IMAGES, LABELS)
        first = learner.solver.weight.flatten()[0].item()
        assert first == (1.0 if arm == "merge" and end == 3.0 else 0.0)  # the others start each task anew
        fill(end)
        learner.end_task()
    assert all((p == merged).all() for p in learner.solver.parameters())
    assert learner.bytes_kept() == 4 * 650 * (1 if arm == "merge" else 3)


@pytest.mark.parametrize(
    "scenario, competing", [("class", slice(0, 6)), ("task", slice(4, 6)), ("domain", slice(0, 2))]
)
def test_the_fisher_information_is_of_labels_that_compete(scenario, competing):
    """Labels are drawn with the solver's own probabilities: of all classes so far, or of the two of the task."""
    heads = Heads(scenario)
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(0))[:, : heads.outputs].expand(30_000, -1)
    learner = digits.Plain("ewc", nn.Linear(1, 1), heads, Args(), None)
    learner.n = 3
    torch.manual_seed(0)
    losses = learner.surprise(lambda x: logits, logits)
    p = logits[0, competing].softmax(0)
    share = [(losses + p[k].log()).abs().lt(1e-5).float().mean().item() for k in range(len(p))]
    assert share == pytest.approx(p.tolist(), abs=0.015)


def test_the_experiment_writes_its_table_and_pictures(tmp_path):
    arms = ["naive", "conv_vae", "experience_replay", "cpo", "joint"]
    flags = f"--iterations 3 --seeds 0 --scenarios task --workers 2 --output {tmp_path} --arms {' '.join(arms)}"
    command = [sys.executable, "experiments/digits.py", *flags.split()]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert shown.returncode == 0, shown.stderr
    assert "Warning" not in shown.stderr and shown.stdout.count("\n| ") == len(arms)
    for name in ("samples.png", "accuracy.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    result = json.loads((tmp_path / "results" / "task_conv_vae_0.json").read_text())
    assert np.shape(result["R"]) == (5, 5) and np.shape(result["samples"]) == (5, 10, 64)


@pytest.mark.parametrize("name, value", [("arms", ["best"]), ("scenarios", ["classes"]), ("iterations", 0)])
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        checked(Args, {**vars(Args()), name: value})
