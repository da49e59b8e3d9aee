"""Generative replay compared on split digits: five tasks of two digits each, one after the other.

    python experiments/digits.py --seeds 0 1 2 3 4     table and pictures in runs/split_digits

Data flow, at the n-th task: the generator, frozen after task n - 1 -> a batch of images -> labels by the solver, frozen
then too -> both learn L = (1/n) L_current + (1 - 1/n) L_replay on that batch (Shin et al. 2017, arXiv:1705.08690).
"""

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from experiments import runner
from experiments.runner import Several, cell, of_arm
from generative import Rehearsal, distillation_loss, replay_weights
from replay import Buffer, add, sample
from vae import VAE, ConvVAE, frozen

Scenario = Literal["class", "domain", "task"]
TASKS, CLASSES = 5, 2  # CLASSES in each task
IMAGE = (1, 8, 8)  # channels, height, width
LATENT_DIM = 16  # of the generators
COMPONENTS = 10  # Gaussians per class of the prior of `mixture`
LEARNING_RATE = 1e-3  # of the solver
BUFFER_SIZE = 100  # images that experience_replay and er_plus keep
WIDTH = 100  # of the solver's hidden layers
TEMPERATURE = 2.0  # of soft targets


@dataclass(frozen=True)
class Heads:
    """Which logits compete at the n-th task (van de Ven and Tolias 2019, arXiv:1904.07734). Labels are
    0 .. tasks * classes - 1 in every scenario.

    class   those of all classes so far, in one head that grows
    domain  those of the task's classes, in the same head for all tasks; the task is not known
    task    those of the task's classes, in a head of its own; the task is known
    """

    scenario: Scenario
    tasks: int = TASKS
    classes: int = CLASSES

    @property
    def outputs(self):
        return self.classes if self.scenario == "domain" else self.tasks * self.classes

    def choice(self, logits, y, n):
        """(logits (B, k) that compete, the label among them) for labels y (B,) at the n-th task."""
        if self.scenario == "class":
            return logits[:, : n * self.classes], y
        if self.scenario == "task":
            logits = logits.unflatten(1, (self.tasks, self.classes))[torch.arange(len(y)), y // self.classes]
        return logits, y % self.classes

    def loss(self, logits, y, n):
        return F.cross_entropy(*self.choice(logits, y, n))

    def correct(self, logits, y, n):
        logits, label = self.choice(logits, y, n)
        return (logits.argmax(1) == label).float().mean().item()

    def pairs(self, student, teacher, n) -> list[tuple]:
        """(student's, teacher's logits) of each head that the teacher of the first n - 1 tasks knows."""
        if self.scenario == "domain":
            return [(student, teacher)]
        known = (n - 1) * self.classes
        if self.scenario == "class":
            return [(student[:, : known + self.classes], teacher[:, :known])]
        return list(zip(*(logits[:, :known].split(self.classes, 1) for logits in (student, teacher)), strict=True))

    def distillation(self, student, teacher, n, soft=True) -> Tensor:
        """The student's loss (logits (B, outputs)) against the teacher's soft labels, or against hard ones, the class
        that the teacher finds likeliest (Shin et al. 2017); a mean over heads."""
        pairs = self.pairs(student, teacher, n)
        if soft:
            return sum(distillation_loss(s, t, TEMPERATURE) for s, t in pairs) / len(pairs)
        return sum(F.cross_entropy(s, t.argmax(1)) for s, t in pairs) / len(pairs)


class GenerativeReplay(Rehearsal):
    """A solver and a generator that learn one task after another, without images of earlier tasks.

    soft: the kind of the frozen solver's labels, see `Heads.distillation`. rehearsed: whether the generator learns
    generated images beside those of the task; it is a mistake if it does not.
    """

    def __init__(self, solver, generator, heads, args, soft=True, rng=None, rehearsed=True):
        super().__init__(generator, learning_rate=args.generator_learning_rate, rng=rng)
        self.solver, self.heads, self.args, self.soft, self.rehearsed = solver, heads, args, soft, rehearsed
        self.optimizer = torch.optim.Adam(solver.parameters(), LEARNING_RATE)
        self.teacher = None  # the solver, frozen at the end of the previous task

    def begin_task(self, x, y):
        """Offers each of the task's images x (N, pixels) to the memory."""
        for image, label in zip(x, y.tolist(), strict=True):
            self.offer(image.clone(), label if self.generator.num_conditions else None)

    def step(self, x, y) -> float:
        """One update of solver and generator, both with a batch of the current task and with the same generated batch.
        Returns the solver's loss."""
        n, generated = self.tasks_done + 1, None
        current, replayed = replay_weights(n)
        loss = current * self.heads.loss(self.solver(x), y, n)
        if n > 1:
            generated = self.generated(self.args.batch_size)
            old = generated[0]
            loss = loss + replayed * self.heads.distillation(self.solver(old), self.teacher(old), n, self.soft)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.rehearsed:
            self.teach_generator(self.args.batch_size, generated)
        else:
            self.generator.learn(self.generator_optimizers, [(1.0, *self.remembered(self.args.batch_size))])
        return loss.item()

    def end_task(self):
        """Freezes generator and solver, and drops everything stored of the task."""
        super().end_task()
        self.solver.zero_grad(set_to_none=True)
        self.teacher = frozen(self.solver)

    def bytes_kept(self):
        return runner.size(self.teacher) + runner.size(self.old_generator)


class Plain:
    """A solver without a generator. What an arm adds to cross-entropy stands in `step`."""

    def __init__(self, arm, solver, heads, args, rng):
        self.arm, self.solver, self.heads, self.args, self.rng = arm, solver, heads, args, rng
        self.optimizer = torch.optim.Adam(solver.parameters(), LEARNING_RATE)
        self.penalty = of_arm(arm, args)
        self.buffer = Buffer(BUFFER_SIZE)
        self.teacher = None  # the solver, frozen at the end of the previous task
        self.n = 0

    def begin_task(self, x, y):
        self.n += 1
        self.x, self.y = x, y

    def step(self, x, y):
        current, replayed = replay_weights(self.n)
        loss = self.heads.loss(self.solver(x), y, self.n)
        if self.buffer.items:
            old = [self.buffer.items[i] for i in sample(self.buffer, len(x), rng=self.rng)]
            x_old, y_old = torch.stack([image for image, _ in old]), torch.tensor([label for _, label in old])
            loss = current * loss + replayed * self.heads.loss(self.solver(x_old), y_old, self.n)
        if self.penalty and self.n > 1:
            loss = loss + sum(self.penalty.penalty(dict(self.solver.named_parameters())))
        if self.teacher is not None:  # labels the current images (LwF, Li and Hoiem 2016, arXiv:1606.09282)
            taught = self.heads.distillation(self.solver(x), self.teacher(x), self.n)
            lwf = self.arm == "lwf"
            loss = current * loss + replayed * taught if lwf else loss + self.args.lwf_coef * taught
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def surprise(self, solver, x) -> Tensor:
        """Minus the log-probability (B,) of labels that the solver draws itself, among those that compete. Its squared
        gradient is the Fisher information."""
        any_label = torch.full((len(x),), (self.n - 1) * self.heads.classes)  # of the task: it tells the head
        competing = self.heads.choice(solver(x), any_label, self.n)[0]
        drawn = torch.distributions.Categorical(logits=competing.detach()).sample()
        return F.cross_entropy(competing, drawn, reduction="none")

    def end_task(self):
        if self.penalty:
            self.penalty.consolidate(self.solver, self.x[:, None], self.surprise)
        if self.arm in ("lwf", "er_plus"):
            self.teacher = frozen(self.solver)
        if self.arm in ("experience_replay", "er_plus"):
            for image, label in zip(self.x, self.y.tolist(), strict=True):
                add(self.buffer, (image.clone(), label), label=label, rng=self.rng)

    def bytes_kept(self):
        images = [self.x] if self.arm == "joint" else [image for image, _ in self.buffer.items]
        penalty = self.penalty.bytes_kept() if self.penalty else 0
        return penalty + runner.size(self.teacher) + sum(image.nbytes for image in images)


GENERATIVE = {  # arm: (soft labels, by class)
    "unrehearsed": (True, False),
    "hard": (False, False),
    "soft": (True, False),
    "conditional_hard": (False, True),
    "conditional_soft": (True, True),
    "mixture": (True, True),
    "conv": (True, True),
}
ARMS = ("naive", *GENERATIVE, "experience_replay", "lwf", "ewc", "online_ewc", "er_plus", "joint")


@dataclass(kw_only=True)
class Args(runner.Flags):
    """Compares kinds of replay on split digits: five tasks of two digits, one after the other, in the class-, domain-
    and task-incremental scenario."""

    output: str = "runs/split_digits"
    """directory for results, table and pictures. Finished jobs there are not run again"""
    arms: Several[Literal[ARMS]] = field(default_factory=lambda: list(ARMS))
    """what to compare"""
    scenarios: Several[Scenario] = field(default_factory=lambda: list(get_args(Scenario)))
    """which logits compete"""
    iterations: PositiveInt = 200
    """steps per task"""
    batch_size: PositiveInt = 64
    """current images per step; as many replayed ones are added"""
    generator_hidden: PositiveInt = 400
    """units in the generator's hidden layer"""
    generator_learning_rate: PositiveFloat = 4e-3
    """learning rate of the generator (Adam)"""
    ewc_lambda: NonNegativeFloat = 1e4
    """weight of the penalty of ewc and online_ewc"""
    er_plus_lambda: NonNegativeFloat = 1.0
    """er_plus: weight of EWC's penalty beside replay"""
    lwf_coef: NonNegativeFloat = 0.01
    """er_plus: weight of the distillation of the old solver's answers to current images"""


def make_learner(arm, solver, heads, args, rng):
    if arm not in GENERATIVE:
        return Plain(arm, solver, heads, args, rng)
    soft, by_class = GENERATIVE[arm]
    conditions = TASKS * CLASSES if by_class else 0
    if arm == "conv":
        generator = ConvVAE(IMAGE, latent_dim=LATENT_DIM, num_conditions=conditions)
    else:
        components = COMPONENTS if arm == "mixture" else 0
        generator = VAE(math.prod(IMAGE), (args.generator_hidden,), LATENT_DIM, 0.0, conditions, components)
    return GenerativeReplay(solver, generator, heads, args, soft, rng, arm != "unrehearsed")


def split_tasks(x, y, seed) -> list[tuple]:
    """(training images, labels, test images, labels) of each task; a fifth of each class is for testing."""
    rng, tasks = np.random.default_rng(seed), []
    for labels in torch.arange(TASKS * CLASSES).split(CLASSES):
        shuffled = [rng.permutation(np.flatnonzero(y == label)) for label in labels]
        train = np.concatenate([rows[len(rows) // 5 :] for rows in shuffled])
        test = np.concatenate([rows[: len(rows) // 5] for rows in shuffled])
        tasks.append((x[train], y[train], x[test], y[test]))
    return tasks


def run_arm(args: Args, scenario, arm, seed) -> dict:
    """Trains one solver on all tasks. Returns R (R[i][j]: accuracy on task j after task i), images generated after each
    task, seconds, and the bytes kept for the next task."""
    from sklearn.datasets import load_digits

    start = time.perf_counter()
    x, y = load_digits(return_X_y=True)
    tasks = split_tasks(torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y), seed)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    heads = Heads(scenario)
    hidden = [nn.Linear(math.prod(IMAGE), WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    solver = nn.Sequential(*hidden, nn.Linear(WIDTH, heads.outputs))
    learner = make_learner(arm, solver, heads, args, rng)
    R, samples = [], []
    for n, (x_task, y_task, _, _) in enumerate(tasks, 1):
        if arm == "joint":
            x_task, y_task = (torch.cat([task[k] for task in tasks[:n]]) for k in (0, 1))
        learner.begin_task(x_task, y_task)
        for _ in range(args.iterations):
            index = torch.from_numpy(rng.integers(len(x_task), size=args.batch_size))
            learner.step(x_task[index], y_task[index])
        learner.end_task()
        with torch.no_grad():
            tested = [(solver(x_test), y_test) for _, _, x_test, y_test in tasks]
            R.append([heads.correct(*pair, TASKS if k >= n else n) for k, pair in enumerate(tested)])
        if arm in GENERATIVE:
            seen = learner.old_conditions
            condition = torch.tensor(np.resize(seen, 10)) if seen else None
            images = learner.old_generator.generate(10, condition=condition)
            samples.append([[round(value, 2) for value in image] for image in images.tolist()])
    job = {"scenario": scenario, "arm": arm, "seed": seed}
    seconds = time.perf_counter() - start
    return {**job, "R": R, "samples": samples, "seconds": seconds, "bytes_kept": learner.bytes_kept()}


def write_table(args: Args, found):
    """Prints the table and writes it as table.md: average accuracy at the end of each scenario; of the first one also
    backward transfer, seconds and size."""
    rows = []
    for arm in args.arms:
        runs = {s: [r for r in found if r["arm"] == arm and r["scenario"] == s] for s in args.scenarios}
        first = runs[args.scenarios[0]]
        transfer = [np.mean([r["R"][-1][k] - r["R"][k][k] for k in range(TASKS - 1)]) for r in first]
        row = {"accuracy": arm}
        row |= {f"{s}-incremental": cell([np.mean(r["R"][-1]) for r in results], 3) for s, results in runs.items()}
        row[f"backward transfer ({args.scenarios[0]})"] = cell(transfer, 3)
        row["seconds"] = f"{np.mean([r['seconds'] for r in first]):.0f}"
        row["kept, kB"] = f"{first[0]['bytes_kept'] / 1000:.0f}"
        rows.append(row)
    runner.show_table(rows, Path(args.output))


def plot_samples(results, output):
    """samples.png: what the generators make; a row of images for each task."""
    rows = math.ceil(len(results) / 4)
    with runner.picture(output / "samples.png", rows, 4, (7.2, 1.3 * rows)) as panels:
        for axes, r in zip(panels, results, strict=False):
            images = np.array(r["samples"]).reshape(TASKS, 10, *IMAGE[1:])
            axes.imshow(images.transpose(0, 2, 1, 3).reshape(TASKS * IMAGE[1], -1), cmap="gray_r", vmin=0, vmax=1)
            axes.set(title=r["arm"], xticks=[], yticks=[])


def plot_accuracy(args, results, output):
    """accuracy.png: accuracy on each task after each task, means over seeds."""
    columns = math.ceil(len(args.arms) / 3)
    size = (1.5 * columns, 4.6)
    with runner.picture(output / "accuracy.png", 3, columns, size, sharex=True, sharey=True) as panels:
        for axes, arm in zip(panels, args.arms, strict=False):
            R = np.mean([r["R"] for r in results if r["arm"] == arm], axis=0)
            for task, line in enumerate(("-", "--", "-.", ":", (0, (5, 1)))):
                axes.plot(range(task + 1, TASKS + 1), R[task:, task], ".", linestyle=line, label=f"task {task + 1}")
            axes.set(title=arm, xlabel="tasks learnt", ylabel="accuracy", xticks=range(1, TASKS + 1))
            axes.label_outer()
            axes.grid(alpha=0.3)


def run_experiment(args: Args):
    """Runs all scenarios, arms and seeds, then writes the table and the pictures."""
    jobs = [(scenario, arm, seed) for seed in args.seeds for scenario in args.scenarios for arm in args.arms]
    found = runner.run_jobs(args, run_arm, jobs)
    write_table(args, found)
    first = [r for r in found if r["scenario"] == args.scenarios[0]]
    drawn = [r for r in first if r["samples"] and r["seed"] == args.seeds[0]]
    if drawn:
        plot_samples(drawn, Path(args.output))
    plot_accuracy(args, first, Path(args.output))


if __name__ == "__main__":
    runner.run_command(Args, run_experiment)
