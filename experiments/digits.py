"""Generative replay compared on split digits: five tasks of two digits each, one after the other.

    python experiments/digits.py --seeds 0 1 2 3 4     table and pictures in runs/split_digits
    python experiments/digits.py --mnist DIR           on MNIST's four files in DIR

Data flow, at the n-th task: the generator, frozen after task n - 1 -> a batch of images -> labels by the solver, frozen
then too -> both learn L = (1/n) L_current + (1 - 1/n) L_replay on that batch (Shin et al. 2017, arXiv:1705.08690).
"""

import gzip
import math
import struct
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pydantic
import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from distributed import CHECKED
from experiments import runner
from experiments.runner import Several, cell, of_arm
from generative import Rehearsal, distillation_loss, replay_weights
from grpo import Share
from replay import Buffer, add, sample
from vae import VAE, ConvVAE, check_inputs, frozen, one_hot

Scenario = Literal["class", "domain", "task"]
TASKS, CLASSES = 5, 2  # CLASSES in each task
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


class WGAN(nn.Module):
    """The generator of Shin et al.: a Wasserstein GAN with gradient penalty (Gulrajani et al. 2017, arXiv:1704.00028)
    of inputs in [0, 1], with the interface of `vae.VAE`."""

    PENALTY, CRITIC_STEPS = 10.0, 2

    def __init__(self, input_dim, hidden, latent_dim, num_conditions=0):
        super().__init__()
        self.latent_dim, self.num_conditions, self.shape = latent_dim, num_conditions, (input_dim,)

        def mlp(width, end):
            return nn.Sequential(nn.Linear(width, hidden), nn.LeakyReLU(0.2), nn.Linear(hidden, end))

        self.decoder = mlp(latent_dim + num_conditions, input_dim)
        self.critic = mlp(input_dim + num_conditions, 1)

    def judge(self, x, condition=None):
        """The critic's values (B,): high for real images."""
        return self.critic(torch.cat([x, one_hot(condition, self.num_conditions, x)], 1))[:, 0]

    def fit_prior(self, batches):
        """Does nothing: a GAN has no latents of its data."""

    def invent(self, number, condition):
        z = torch.randn(number, self.latent_dim, device=self.decoder[0].weight.device)
        return torch.sigmoid(self.decoder(torch.cat([z, one_hot(condition, self.num_conditions, z)], 1)))

    @torch.no_grad()
    def generate(self, num_samples, device=None, condition=None) -> Tensor:
        return self.invent(num_samples, condition)

    def optimizers(self, learning_rate) -> list:
        parts = (self.decoder, self.critic)
        return [torch.optim.Adam(part.parameters(), learning_rate, betas=(0.5, 0.9)) for part in parts]

    def learn(self, optimizers, parts) -> float:
        """CRITIC_STEPS updates of the critic and one of the generator. Returns the critic's Wasserstein distance."""
        decoder, critic = optimizers
        for _ in range(self.CRITIC_STEPS):
            distance, penalty = 0.0, 0.0
            for weight, x, condition in parts:
                fake = self.invent(len(x), condition).detach()
                distance = distance + weight * (self.judge(x, condition).mean() - self.judge(fake, condition).mean())
                mixed = torch.lerp(x, fake, torch.rand(len(x), 1, device=x.device)).requires_grad_()
                (slope,) = torch.autograd.grad(self.judge(mixed, condition).sum(), mixed, create_graph=True)
                penalty = penalty + weight * (slope.norm(dim=1) - 1).square().mean()
            critic.zero_grad()
            (self.PENALTY * penalty - distance).backward()
            critic.step()
        loss = -sum(weight * self.judge(self.invent(len(x), c), c).mean() for weight, x, c in parts)
        decoder.zero_grad()
        loss.backward()
        decoder.step()
        return distance.item()


class GenerativeReplay(Rehearsal):
    """A solver and a generator that learn one task after another, without images of earlier tasks.

    heads: which logits compete; soft: kind of the frozen solver's labels (see `Heads.distillation`).
    """

    def __init__(self, solver, generator, heads, args, soft=True, rng=None, memory_size=500):
        super().__init__(generator, memory_size, args.generator_learning_rate, rng)
        self.solver, self.heads, self.args, self.soft = solver, heads, args, soft
        self.optimizer = torch.optim.Adam(solver.parameters(), args.learning_rate)
        self.teacher = None  # the solver, frozen at the end of the previous task

    def begin_task(self, x, y):
        """Offers each of the task's images x (N, pixels) to the memory. Raises ValueError for values outside [0, 1]."""
        check_inputs(x, self.generator.shape)
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
        self.teach_generator(self.args.batch_size, generated)
        return loss.item()

    def end_task(self):
        """Freezes generator and solver, and drops everything stored of the task."""
        super().end_task()
        self.solver.zero_grad(set_to_none=True)
        self.teacher = frozen(self.solver)

    def bytes_kept(self):
        return runner.size(self.teacher) + runner.size(self.old_generator)


class Unrehearsed(GenerativeReplay):
    """The mistake to avoid: the generator learns the current task only."""

    def teach_generator(self, number, replayed=None):
        return self.generator.learn(self.generator_optimizers, [(1.0, *self.remembered(number))])


class Plain:
    """A solver without a generator. What an arm adds to cross-entropy stands in `step`."""

    def __init__(self, arm, solver, heads, args, rng):
        self.arm, self.solver, self.heads, self.args, self.rng = arm, solver, heads, args, rng
        self.optimizer = torch.optim.Adam(solver.parameters(), args.learning_rate)
        self.penalty = of_arm(arm, args)
        self.buffer = Buffer(args.buffer_size)
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


GENERATIVE = {  # arm: (type of generator, soft labels, by class)
    "unrehearsed": ("vae", True, False),
    "hard": ("vae", False, False),
    "soft": ("vae", True, False),
    "conditional_hard": ("vae", False, True),
    "conditional_soft": ("vae", True, True),
    "mixture": ("vae", True, True),
    "conv": ("conv", True, True),
    "gan": ("gan", True, True),
}
ARMS = ("naive", *GENERATIVE, "experience_replay", "lwf", "ewc", "online_ewc", "er_plus", "joint")


def make_learner(arm, solver, heads, args, shape, rng):
    """The learner of an arm; `shape`: of an image, (channels, height, width)."""
    if arm not in GENERATIVE:
        return Plain(arm, solver, heads, args, rng)
    kind, soft, conditional = GENERATIVE[arm]
    conditions = TASKS * CLASSES if conditional else 0
    pixels, hidden, latent = math.prod(shape), args.generator_hidden, args.latent_dim
    components = args.prior_components if arm == "mixture" else 0
    generator = {
        "vae": lambda: VAE(pixels, (hidden,), latent, 0.0, conditions, components),
        "conv": lambda: ConvVAE(shape, latent_dim=latent, num_conditions=conditions),
        "gan": lambda: WGAN(pixels, hidden, latent, conditions),
    }[kind]()
    learner = Unrehearsed if arm == "unrehearsed" else GenerativeReplay
    return learner(solver, generator, heads, args, soft, rng)


@pydantic.dataclasses.dataclass(config=CHECKED, kw_only=True)
class Args(runner.Flags):
    """Compares kinds of replay on split digits: five tasks of two digits, one after the other, in the class-, domain-
    and task-incremental scenario."""

    output: str = "runs/split_digits"
    """directory for results, table and pictures. Finished jobs there are not run again"""
    arms: Several[Literal[ARMS]] = field(default_factory=lambda: list(ARMS))
    """what to compare"""
    scenarios: Several[Scenario] = field(default_factory=lambda: list(get_args(Scenario)))
    """which logits compete"""
    mnist: str | None = None
    """directory with MNIST's four idx files as published, packed or not. Default: the digits of scikit-learn"""
    iterations: PositiveInt = 200
    """steps per task"""
    batch_size: PositiveInt = 64
    """current images per step; as many replayed ones are added"""
    generator_hidden: PositiveInt = 400
    """units in the generator's hidden layer"""
    latent_dim: PositiveInt = 16
    """latent dimensions of the generator"""
    prior_components: PositiveInt = 10
    """mixture: Gaussians per class of the prior that is fitted when a task ends"""
    learning_rate: PositiveFloat = 1e-3
    """learning rate of the solver (Adam)"""
    generator_learning_rate: PositiveFloat = 4e-3
    """learning rate of the generator (Adam)"""
    buffer_size: PositiveInt = 100
    """images that experience_replay and er_plus keep"""
    ewc_lambda: NonNegativeFloat = 1e4
    """weight of the penalty of ewc and online_ewc"""
    er_plus_lambda: NonNegativeFloat = 1.0
    """er_plus: weight of EWC's penalty beside replay"""
    ewc_decay: Share = 0.95
    """online_ewc: decay of the running Fisher information"""
    lwf_coef: NonNegativeFloat = 0.01
    """er_plus: weight of the distillation of the old solver's answers to current images"""


def load_images(args: Args) -> tuple[Tensor, Tensor, tuple]:
    """(images (N, pixels) in [0, 1], labels (N,), image shape). Raises ValueError for missing or damaged files."""
    if args.mnist is None:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y), (1, 8, 8)
    kinds, parts = ("images-idx3", "labels-idx1"), ("train", "t10k")
    x, y = (np.concatenate([read_idx(args.mnist, f"{part}-{kind}-ubyte") for part in parts]) for kind in kinds)
    return torch.tensor(x, dtype=torch.float32).flatten(1) / 255, torch.tensor(y, dtype=torch.long), (1, 28, 28)


def read_idx(folder, name) -> np.ndarray:
    """An array of bytes in the idx format: two zeros, type 8, number of dimensions, their sizes, the values."""
    for path, unpacked in ((Path(folder) / name, bytes), (Path(folder) / f"{name}.gz", gzip.decompress)):
        if path.is_file():
            data = unpacked(path.read_bytes())
            dimensions = data[3] if data[:3] == b"\0\0\x08" else 0
            shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
            if not dimensions or len(data) != 4 + 4 * dimensions + math.prod(shape):
                raise ValueError(f"{path} is not a whole idx file of bytes")
            return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    raise ValueError(f"there is no {Path(folder) / name}, packed (.gz) or not")


def split_tasks(x, y, seed) -> list[tuple]:
    """(training images, labels, test images, labels) of each task; a fifth of each class is for testing."""
    rng, parts = np.random.default_rng(seed), []
    for task in range(TASKS):
        train, test = [], []
        for label in range(task * CLASSES, (task + 1) * CLASSES):
            of_class = rng.permutation(np.flatnonzero((y == label).numpy()))
            test.append(of_class[: len(of_class) // 5])
            train.append(of_class[len(of_class) // 5 :])
        train, test = torch.tensor(np.concatenate(train)), torch.tensor(np.concatenate(test))
        parts.append((x[train], y[train], x[test], y[test]))
    return parts


def run_arm(args: Args, scenario, arm, seed) -> dict:
    """Trains one solver on all tasks. Returns R (R[i][j]: accuracy on task j after task i), images generated after each
    task, seconds, and the bytes kept for the next task."""
    start = time.perf_counter()
    x, y, shape = load_images(args)
    tasks = split_tasks(x, y, seed)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    heads = Heads(scenario)
    hidden = [nn.Linear(x.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    solver = nn.Sequential(*hidden, nn.Linear(WIDTH, heads.outputs))
    learner = make_learner(arm, solver, heads, args, shape, rng)
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


def write_tables(args: Args, found, output):
    """Prints the table and writes it as table.md: average accuracy at the end of each scenario; of the first one also
    backward transfer, seconds and size. Writes accuracy.csv, a row per job and task learnt."""
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
    runner.show_table(rows, output / "table.md")
    rows = []
    for r in found:
        job = {name: r[name] for name in ("scenario", "arm", "seed")}
        for i, row in enumerate(r["R"], 1):
            rows.append({**job, "tasks learnt": i, **{f"task {k}": value for k, value in enumerate(row, 1)}})
    runner.write_csv(output / "accuracy.csv", rows)


def plot_samples(results, output):
    """samples.png: what the generators make after each task."""
    columns = min(4, len(results))
    rows = math.ceil(len(results) / columns)
    size = (1.8 * columns, 1.15 * rows + 0.2)
    with runner.picture(output / "samples.png", rows, columns, size) as (figure, panels):
        for axes, r in zip(panels, results, strict=False):
            images = np.array(r["samples"])  # (tasks, 10, pixels)
            side = math.isqrt(images.shape[-1])
            mosaic = images.reshape(len(images), 10, side, side).transpose(0, 2, 1, 3).reshape(len(images) * side, -1)
            axes.imshow(1 - mosaic, cmap="gray", vmin=0, vmax=1)
            axes.set(title=r["arm"], xticks=[], yticks=[side * (k + 0.5) for k in range(len(images))])
            axes.set_yticklabels(range(1, len(images) + 1), fontsize=6)
            axes.tick_params(length=0)
        figure.supylabel("after task", fontsize=8)


def plot_accuracy(args, results, output):
    """accuracy.png: accuracy on each task after each task, means over seeds."""
    columns = math.ceil(len(args.arms) / 3)
    size = (1.5 * columns, 4.6)
    with runner.picture(output / "accuracy.png", 3, columns, size, sharex=True, sharey=True) as (figure, panels):
        for axes, arm in zip(panels, args.arms, strict=False):
            R = np.mean([r["R"] for r in results if r["arm"] == arm], axis=0)
            for task, line in enumerate(("-", "--", "-.", ":", (0, (5, 1)))):
                style = {"linestyle": line, "marker": ".", "markersize": 4}
                axes.plot(range(task + 1, TASKS + 1), R[task:, task], **style, label=f"task {task + 1}")
            axes.set(ylim=(-0.03, 1.03), xticks=range(1, TASKS + 1))
            axes.set_title(arm, fontsize=8)
            axes.grid(alpha=0.3)
        figure.supxlabel("tasks learnt", fontsize=8)
        figure.supylabel("accuracy", fontsize=8)


def run_experiment(args: Args):
    """Runs all scenarios, arms and seeds, then writes tables and pictures."""
    load_images(args)  # so that bad files are named before anything is written
    jobs = [(scenario, arm, seed) for seed in args.seeds for scenario in args.scenarios for arm in args.arms]
    found = runner.run_jobs(args, run_arm, jobs)
    output = Path(args.output)
    write_tables(args, found, output)
    first = [r for r in found if r["scenario"] == args.scenarios[0]]
    drawn = [r for r in first if r["samples"] and r["seed"] == args.seeds[0]]
    if drawn:
        plot_samples(drawn, output)
    plot_accuracy(args, first, output)


if __name__ == "__main__":
    runner.run_command(Args, run_experiment)
