"""Generative replay on one page: a solver learns the digits two at a time, and no image of an old task is kept.

python examples/generative_replay.py      accuracy on each of five tasks at the end, without replay and with it
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tyro
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from generative import Rehearsal, distillation_loss, replay_weights
from vae import VAE, frozen


class ContinualTrainer:
    """Trains a solver on one task after another (Shin et al. 2017, arXiv:1705.08690). generator: see vae.VAE; None: no
    replay."""

    def __init__(self, solver, generator=None, learning_rate=1e-3, generator_learning_rate=4e-3):
        self.solver, self.teacher = solver, None  # the teacher is the solver, frozen at the end of the previous task
        self.optimizer = torch.optim.Adam(solver.parameters(), learning_rate)
        self.rehearsal = Rehearsal(generator, learning_rate=generator_learning_rate) if generator else None

    def train_task(self, x, y, iterations, batch_size=64):
        """Learns images x (N, pixels) with labels y (N,)."""
        if self.rehearsal:
            for image, label in zip(x, y.tolist(), strict=True):  # the generator learns from a sample of the task
                self.rehearsal.offer(image, label)
        for _ in range(iterations):
            batch = torch.randint(len(x), (batch_size,))
            self.step(x[batch], y[batch])
        if self.rehearsal:
            self.rehearsal.end_task()  # freezes the generator, and drops the sample
            self.teacher = frozen(self.solver)

    def step(self, x, y):
        """L = (1/n) L_current + (1 - 1/n) L_replay at the n-th task. Solver and generator learn from the same generated
        images, which the teacher labels with its probabilities."""
        loss, replayed = F.cross_entropy(self.solver(x), y), None
        if self.teacher is not None:
            current, old = replay_weights(self.rehearsal.tasks_done + 1)
            replayed = self.rehearsal.generated(len(x))
            images = replayed[0]
            loss = current * loss + old * distillation_loss(self.solver(images), self.teacher(images))
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if self.rehearsal:
            self.rehearsal.teach_generator(len(x), replayed)


def main(iterations: int = 200, seed: int = 0):
    """iterations: steps for each task."""
    if iterations < 1:
        print(f"iterations must be at least 1, got {iterations}", file=sys.stderr)
        sys.exit(2)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    testing = torch.arange(len(x)) % 5 == 0
    for name in ("without replay", "with replay"):
        torch.manual_seed(seed)
        solver = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10))
        generator = VAE(64, (400,), latent_dim=16, dropout=0.0, num_conditions=10) if name == "with replay" else None
        trainer = ContinualTrainer(solver, generator)
        tasks = [(y == first) | (y == first + 1) for first in range(0, 10, 2)]
        for task in tasks:
            trainer.train_task(x[task & ~testing], y[task & ~testing], iterations)
        right = solver(x).argmax(1) == y
        print(f"{name:>14}:", *(f"{right[task & testing].float().mean():.2f}" for task in tasks))


if __name__ == "__main__":
    tyro.cli(main)
