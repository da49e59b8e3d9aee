"""experiments/digits.py: the solver's loss by hand, the rule of rehearsal, privacy, the WGAN, and the experiment."""

import copy
import csv
import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from privacy import reachable
from torch import nn

from experiments import digits
from experiments.digits import WGAN, Args, GenerativeReplay, Heads
from generative import replay_weights
from vae import VAE

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "scenario, competing, labels",
    [
        ("class", [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]], [1, 4]),
        ("domain", [[0, 1], [6, 7]], [1, 0]),
        ("task", [[0, 1], [10, 11]], [1, 0]),
    ],
)
def test_the_scenario_says_which_logits_compete(scenario, competing, labels):
    heads = Heads(scenario, 3, 2)
    logits = torch.arange(12.0).view(2, 6)[:, : heads.outputs]
    chosen, label = heads.choice(logits, torch.tensor([1, 4]), 3)
    assert chosen.tolist() == competing and label.tolist() == labels


def test_a_class_head_grows():
    assert Heads("class", 3, 2).choice(torch.zeros(1, 6), torch.tensor([1]), 1)[0].shape == (1, 2)


def test_a_teacher_speaks_of_the_heads_that_it_knows():
    logits = torch.arange(12.0).view(2, 6)
    ((student, teacher),) = Heads("class", 3, 2).pairs(logits, logits, 3)
    assert student.shape[1] == 6 and teacher.shape[1] == 4
    assert [s[0].tolist() for s, _ in Heads("task", 3, 2).pairs(logits, logits, 3)] == [[0, 1], [2, 3]]


def test_every_parameter_of_a_wgan_learns():
    generator = WGAN(64, 32, 8, 3)
    condition = torch.tensor([0, 1, 2, 0])
    x = generator.generate(4, condition=condition)
    assert x.shape == (4, 64) and x.min() >= 0 and x.max() <= 1 and not x.requires_grad
    before = [p.clone() for p in generator.parameters()]
    parts = [(0.5, torch.rand(4, 64), condition), (0.5, x, condition)]
    assert math.isfinite(generator.learn(generator.optimizers(1e-3), parts))
    changed = [not torch.equal(a, b) for a, b in zip(before, generator.parameters(), strict=True)]
    assert sum(changed) >= len(changed) - 1  # the critic's last bias has no gradient
    with pytest.raises(ValueError, match="3 conditions"):
        generator.generate(4)


def test_a_wgan_learns_its_data_by_condition():
    """Left half bright under condition 0, right half under 1."""
    torch.manual_seed(0)
    generator = WGAN(64, 32, 8, 2)
    optimizers = generator.optimizers(2e-3)
    for _ in range(1000):
        condition = torch.randint(2, (32,))
        x = torch.full((32, 8, 8), 0.1)
        x[:, :, :4] += 0.7 * (condition == 0)[:, None, None]
        x[:, :, 4:] += 0.7 * (condition == 1)[:, None, None]
        generator.learn(optimizers, [(1.0, x.flatten(1), condition)])
    made = generator.generate(100, condition=torch.arange(100) % 2).unflatten(1, (8, 8))
    left, right = made[..., :4].mean((1, 2)), made[..., 4:].mean((1, 2))
    assert ((left > right) == (torch.arange(100) % 2 == 0)).float().mean() > 0.95


def rehearsal(conditions=0, scenario="class", components=0, soft=True, **settings):
    torch.manual_seed(0)
    heads = Heads(scenario, 3, 2)
    solver = nn.Sequential(nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, heads.outputs))
    generator = VAE(64, (16,), 4, 0.1, conditions, components)
    args = Args(batch_size=8, generator_learning_rate=1e-3)
    return GenerativeReplay(solver, generator, heads, args, soft, **settings)


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
    made, taught = [], []
    generated = replayer.generated
    monkeypatch.setattr(replayer, "generated", lambda number: made.append(generated(number)) or made[-1])
    monkeypatch.setattr(replayer.generator, "learn", lambda optimizers, parts: taught.append(parts) or 0.0)
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


def test_teacher_and_old_generator_learn_nothing():
    replayer = rehearsal()
    learn(replayer, 0)
    modules = (replayer.teacher, replayer.old_generator)
    before = [p.clone() for module in modules for p in module.parameters()]
    x, y = task(1)
    replayer.begin_task(x, y)
    for _ in range(5):
        replayer.step(x[:8], y[:8])
    assert (replayer.teacher, replayer.old_generator) == modules
    after = [p for module in modules for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in after)
    assert not any(module.training for top in modules for module in top.modules())


def test_the_teacher_is_the_solver_at_the_last_tasks_end():
    replayer = rehearsal()
    learn(replayer, 0)
    first, at_first_end = replayer.teacher, copy.deepcopy(replayer.solver.state_dict())
    learn(replayer, 1)
    assert replayer.teacher is not first
    for name, value in replayer.solver.state_dict().items():
        assert torch.equal(value, replayer.teacher.state_dict()[name])
        assert not torch.equal(value, at_first_end[name])


def test_no_raw_sample_of_a_finished_task_is_kept():
    def held(samples):
        tensors = [t.detach().flatten() for t in reachable(replayer) if isinstance(t, torch.Tensor)]
        numbers = torch.cat([t.float() for t in tensors if t.numel()])
        return [bool(torch.isin(sample, numbers).all()) for sample in samples]

    replayer = rehearsal(conditions=6, components=10)
    x, y = task(0)
    replayer.begin_task(x, y)
    replayer.step(x[:8], y[:8])
    assert all(held(x))  # before the end they are found
    replayer.end_task()
    assert not any(held(x))
    learn(replayer, 1)
    assert not any(held(torch.cat([x, task(1)[0]])))


def test_nothing_of_a_task_is_left_in_gradients_or_moments():
    """A unit that is active for one sample only has it as its gradient."""
    replayer = rehearsal(conditions=6)
    learn(replayer, 0)
    modules = [replayer.generator, replayer.solver]
    assert not any(p.grad is not None for module in modules for p in module.parameters())
    assert not replayer.generator_optimizers[0].state


def test_the_prior_is_fitted_to_as_much_of_each_task():
    """At a task's end, before its samples are dropped; of earlier tasks, to samples of the old generator."""
    replayer = rehearsal(conditions=6, components=2)
    fitted = []
    replayer.generator.fit_prior = lambda batches: fitted.append(list(batches))
    learn(replayer, 0, 1, 2)
    assert len(fitted) == 3
    for n, batches in enumerate(fitted, 1):
        x, condition = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.bincount(condition, minlength=6).tolist() == [10] * 2 * n + [0] * (6 - 2 * n)
        assert torch.allclose(x[:20].sum(0), task(n - 1)[0].sum(0))


def test_conditions_are_drawn_evenly_over_those_seen():
    replayer = rehearsal(conditions=6)
    learn(replayer, 0, 1)
    _, condition = replayer.generated(400)
    assert torch.bincount(condition, minlength=6).tolist() == [100, 100, 100, 100, 0, 0]
    counts = sum(torch.bincount(replayer.generated(6)[1], minlength=6) for _ in range(400))
    assert counts[4:].sum() == 0 and (counts[:4] - 600).abs().max() < 60  # not always the same ones twice


def test_conditions_that_were_never_seen_are_not_drawn():
    replayer = rehearsal(conditions=6, scenario="domain")
    learn(replayer, 2, 0, steps=1)
    assert replayer.old_conditions == [0, 1, 4, 5]
    assert torch.bincount(replayer.generated(40)[1], minlength=6).tolist() == [10, 10, 0, 0, 10, 10]


def test_the_memory_is_a_reservoir_of_the_current_task():
    replayer = rehearsal(memory_size=5)
    replayer.begin_task(*task(0))
    assert len(replayer.memory.items) == 5 and replayer.memory.seen == 20
    replayer.step(*(part[:8] for part in task(0)))
    replayer.end_task()
    assert replayer.memory.items == [] and replayer.memory.seen == 0 and replayer.memory.capacity == 5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: rehearsal().generated(3), "before the first task has ended"),
        (lambda: rehearsal().teach_generator(2), "no sample of the current task"),
        (lambda: rehearsal().begin_task(torch.rand(2, 60), torch.zeros(2)), r"shape \(B, 64\), got \(2, 60\)"),
        (lambda: rehearsal().begin_task(torch.full((2, 64), 7.0), torch.zeros(2)), r"in \[0, 1\], got 7.0"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_images_are_split_by_class_without_overlap():
    x, y, _ = digits.load_images(Args())
    tasks = digits.split_tasks(torch.arange(len(y)), y, 0)
    train, test = (torch.cat([t[k] for t in tasks]) for k in (0, 2))
    assert sorted(torch.cat([train, test]).tolist()) == list(range(len(y))) and 0.19 < len(test) / len(y) < 0.21
    assert [sorted(t[1].unique().tolist()) for t in tasks] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    other = digits.split_tasks(torch.arange(len(y)), y, 1)
    assert not torch.equal(tasks[0][0], other[0][0]) and x.min() == 0 and x.max() == 1


def test_the_order_of_the_arms():
    """One seed, with room between them; docs/results.md has five, with intervals."""
    arms = ("naive", "unrehearsed", "soft", "conditional_soft", "mixture", "joint")
    scores = {arm: np.mean(digits.run_arm(Args(), "class", arm, 0)["R"][-1]) for arm in arms}
    assert scores["naive"] < 0.25 < scores["unrehearsed"] < 0.65 < scores["soft"] < 0.9
    assert 0.9 < scores["conditional_soft"] < scores["mixture"] < scores["joint"] and scores["joint"] > 0.93


PENALTIES = [("domain", "ewc", "naive"), ("task", "online_ewc", "naive"), ("class", "er_plus", "experience_replay")]


@pytest.mark.parametrize("scenario, arm, plain", PENALTIES)
def test_penalties_of_weight_0_change_nothing(scenario, arm, plain):
    off = {"ewc_lambda": 0.0, "er_plus_lambda": 0.0, "lwf_coef": 0.0}
    without = digits.run_arm(Args(iterations=20, **off), scenario, arm, 0)
    assert without["R"] == digits.run_arm(Args(iterations=20), scenario, plain, 0)["R"]


@pytest.mark.parametrize("scenario, arm, plain", PENALTIES)
def test_penalties_change_the_tasks_behind_the_first(scenario, arm, plain):
    plain = digits.run_arm(Args(iterations=20), scenario, plain, 0)
    held = digits.run_arm(Args(iterations=20, ewc_lambda=1e3, er_plus_lambda=1e3, lwf_coef=1.0), scenario, arm, 0)
    assert held["R"][0] == plain["R"][0] and held["R"][1:] != plain["R"][1:]
    size = (held["bytes_kept"] - plain["bytes_kept"]) / {"ewc": 10, "online_ewc": 2, "er_plus": 11}[arm]
    assert size == 4 * (64 * 100 + 100 + 100 * 100 + 100 + 101 * (2 if scenario == "domain" else 10))


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


@pytest.fixture
def mnist(tmp_path):
    """Sixty images in MNIST's four files; one of them packed."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("t10k", 20)):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        for name, array in (("images-idx3", images), ("labels-idx1", np.arange(n, dtype=np.uint8) % 10)):
            data = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
            (tmp_path / f"{part}-{name}-ubyte").write_bytes(data)
    labels = tmp_path / "train-labels-idx1-ubyte"
    Path(f"{labels}.gz").write_bytes(gzip.compress(labels.read_bytes()))
    labels.unlink()
    return tmp_path


def test_mnist_is_read_from_its_files(mnist):
    x, y, shape = digits.load_images(Args(mnist=str(mnist)))
    assert x.shape == (60, 784) and shape == (1, 28, 28) and x.max() == 1 and y[:12].tolist() == [*range(10), 0, 1]
    result = digits.run_arm(Args(mnist=str(mnist), iterations=2), "class", "conv", 0)
    assert len(result["samples"]) == 5 and len(result["samples"][0][0]) == 784


def test_damaged_and_missing_files_of_mnist_are_named(mnist):
    path = mnist / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole idx file"):
        digits.load_images(Args(mnist=str(mnist)))
    path.unlink()
    with pytest.raises(ValueError, match=r"there is no .*t10k-images.*packed"):
        digits.load_images(Args(mnist=str(mnist)))


def test_the_experiment_writes_its_table_and_pictures(tmp_path):
    flags = f"--iterations 3 --seeds 0 1 --scenarios task --workers 2 --output {tmp_path}"
    command = [sys.executable, "experiments/digits.py", *flags.split()]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert shown.returncode == 0, shown.stderr
    assert "Warning" not in shown.stderr and shown.stdout.count("\n| ") >= len(digits.ARMS)
    for name in ("samples.png", "accuracy.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    with open(tmp_path / "accuracy.csv") as file:
        assert len(list(csv.reader(file))) == 1 + 5 * 2 * len(digits.ARMS)
    result = json.loads((tmp_path / "results" / "task_gan_1.json").read_text())
    assert np.shape(result["R"]) == (5, 5) and np.shape(result["samples"]) == (5, 10, 64)


@pytest.mark.parametrize(
    "name, value",
    [
        ("arms", ["best"]),
        ("scenarios", ["classes"]),
        ("seeds", [0, 0]),
        ("latent_dim", 0),
        ("learning_rate", math.nan),
        ("ewc_decay", 1.5),
    ],
)
def test_bad_settings_are_named(name, value):
    with pytest.raises(ValueError, match=name):
        Args(**{name: value})
