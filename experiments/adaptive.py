"""Does the ratio of adaptive replay follow forgetting? A simulation with known pass rates.

    python experiments/adaptive.py      table and picture in runs/adaptive

The algorithm is the real one. Its conversations are coin tosses: a task of an old domain passes with a rate that stays,
or falls by 0.3 and recovers.
"""

import sys
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from experiments import runner
from flags import Count, Seed
from grpo import TaskRef, Trajectory
from replay import AdaptiveReplayCL

TASKS = 20  # of each domain
NEW = 8  # tasks of the current domain in each step
OLD = ("airline", "retail")
FALL = 0.3
PERIOD = 200  # steps before the fall, with it, and after it
CASES = list(product((0.1, 0.3, 0.5, 0.7, 0.9), (4, 16), (1, 2)))  # pass rate, samples in a group, old domains


@dataclass(kw_only=True)
class Args:
    """Simulates adaptive replay, without forgetting and with a fall that is mended."""

    seeds: runner.Several[Seed] = field(default_factory=lambda: list(range(30)))
    """seeds of the coin tosses"""
    steps: Count = 100
    """steps of the current domain without forgetting"""
    output: str = "runs/adaptive"
    """directory for table and picture"""


def simulate(rate, group, domains, seed, steps):
    """Yields (ratio, whether it was just adapted) after each step of a domain that follows `domains` old ones.
    rate(step): the pass rate of old tasks."""
    rng = np.random.default_rng([seed, 9])
    algorithm = AdaptiveReplayCL(seed=seed)
    trainer = SimpleNamespace(trajectory_buffer=algorithm.make_buffer(), replayed_losses=[], phase="grpo")
    algorithm.trainer = trainer

    def step(refs, domain, rate):
        trainer.refs_P = refs
        trainer.rewards_P_G = torch.from_numpy(rng.random((len(refs), group)) < rate).float()
        algorithm.post_step_hook(trainer, domain)

    for domain in OLD[:domains]:
        refs = [TaskRef(domain, str(k)) for k in range(TASKS)]
        for _ in range(2):
            step(refs, domain, rate(0))
        for ref in refs:
            trainer.trajectory_buffer.add(Trajectory(ref.domain, ref.task_id, reward=1.0))
    new = [TaskRef("telecom", str(k)) for k in range(NEW)]
    for k in range(steps):
        step(algorithm.augment_batch(new, "telecom"), "telecom", rate(k))
        yield algorithm.replay_ratio, not algorithm.recent


def without_forgetting(args, rate, group, domains) -> np.ndarray:
    """The ratios (seeds, steps) at a constant pass rate."""
    runs = (simulate(lambda k: rate, group, domains, seed, args.steps) for seed in args.seeds)
    return np.array([[ratio for ratio, _ in run] for run in runs])


def with_a_fall(args, rate, group, domains) -> list[list]:
    """Of each seed, simulate's results for a pass rate that is lower by FALL in the second of three periods."""

    def falling(k):
        return rate - FALL * (PERIOD <= k < 2 * PERIOD)

    return [list(simulate(falling, group, domains, seed, 3 * PERIOD)) for seed in args.seeds]


def run_experiment(args: Args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    initial, highest = AdaptiveReplayCL.Flags.replay_ratio, AdaptiveReplayCL.Flags.max_replay_ratio
    rows = []
    with runner.picture(output / "adaptive_ratio.png", 1, 2, (7.2, 2.8), sharey=True) as (one, two):
        for rate, group, domains in CASES:
            row = {"pass rate": f"{rate}", "samples": f"{group}", "old domains": f"{domains}"}
            ratios = without_forgetting(args, rate, group, domains)
            row |= {"mean ratio": f"{ratios.mean():.3f}", "steps above": f"{(ratios > initial + 1e-9).mean():.1%}"}
            if rate >= FALL:
                runs = with_a_fall(args, rate, group, domains)
                needed = [adaptations(run[PERIOD:], lambda r: r >= highest - 1e-9) for run in runs]
                back = [adaptations(run[2 * PERIOD :], lambda r: r <= initial + 1e-9) for run in runs]
                row |= {
                    "up in": f"{np.mean(needed):.1f}, {max(needed)}",
                    "back in": f"{np.mean(back):.1f}, {max(back)}",
                }
                axes = one if domains == 1 else two
                axes.plot(np.mean([[ratio for ratio, _ in run] for run in runs], 0), label=f"{rate}, G {group}")
            rows.append(row)
        for axes, title in ((one, "one old domain"), (two, "two old domains")):
            axes.axvspan(PERIOD, 2 * PERIOD, color="0.5", alpha=0.15, linewidth=0)
            axes.axhline(initial, color="0.5", linewidth=0.8, linestyle=":")
            axes.set(title=title, xlabel=f"step (shaded: the pass rate is lower by {FALL})")
        one.set_ylabel("replay ratio")
    runner.show_table(rows, output)


def adaptations(run, reached) -> int:
    """Adaptations until `reached` holds for the ratio; a thousand if it never does."""
    count = 0
    for ratio, adapted in run:
        count += adapted
        if reached(ratio):
            return count
    return 1000


if __name__ == "__main__":
    runner.run_command(Args, run_experiment)
