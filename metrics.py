"""Metrics: pass^k, one domain's conversations, continual learning; and their table.

Data flow: records of conversations (eval.score_and_record) -> measure -> one row of R -> cl_metrics.
"""

import math

import numpy as np
import pandas as pd

import oracle
from grpo import PASS
from text import markdown


def pass_hat_k(successes, trials, k) -> float:
    """pass^k = C(successes, k) / C(trials, k): the probability that k trials drawn without replacement all pass
    (tau-bench, Yao et al. 2024, arXiv:2406.12045). Not pass@k.

    >>> pass_hat_k(3, 4, 2)
    0.5
    """
    if not 0 <= successes <= trials or not 1 <= k <= trials:
        raise ValueError(f"pass^{k} of {successes} successes in {trials} trials is not defined")
    return math.comb(successes, k) / math.comb(trials, k)


def mean(values) -> float:
    """The mean; 0 without values."""
    return float(np.mean(values)) if len(values) else 0.0


def cl_metrics(R, baseline=None, joint=None) -> dict:
    """Continual-learning metrics of R (T, T), R[i, j] = score on task j after training task i. Higher is better; negate
    errors first. `baseline` (T,): scores before any training. `joint` (T,): reference scores on each task, of one model
    trained on all tasks (Chaudhry et al. 2018) or of models trained on that task alone.

    average             mean_j R[T, j]
    backward_transfer   mean_{i<T} (R[T, i] - R[i, i])                     (Lopez-Paz and Ranzato 2017)
    forward_transfer    mean_{i>=2} (R[i-1, i] - baseline_i)               (None without baseline)
    forgetting          mean_{j<T} (max_{l<T} R[l, j] - R[T, j])           (Chaudhry et al. 2018), in [-1, 1]
    intransigence       mean_k (joint_k - R[k, k])                         (None without joint)
    old_task_mean       mean_{j<T} R[T, j]. Some papers call it backward transfer; it cannot show forgetting
    Means over no tasks are 0. Raises ValueError for other shapes.

    >>> cl_metrics([[0.8, 0.1], [0.3, 0.9]])["forgetting"]
    0.5
    """
    R = np.array(R, dtype=float)
    if R.ndim != 2 or R.shape[0] != R.shape[1] or len(R) == 0:
        raise ValueError(f"R must be a square matrix, got the shape {R.shape}")
    if any(values is not None and len(values) != len(R) for values in (baseline, joint)):
        raise ValueError(f"baseline and joint must have {len(R)} entries, as R has")
    old, diagonal = R[-1, :-1], np.diag(R)
    found = {
        "average": mean(R[-1]),
        "backward_transfer": mean(old - diagonal[:-1]),
        "forward_transfer": None if baseline is None else mean(np.diag(R, 1) - np.array(baseline)[1:]),
        "forgetting": mean(R[:-1, :-1].max(0, initial=-np.inf) - old),
        "intransigence": None if joint is None else mean(np.array(joint) - diagonal),
        "old_task_mean": mean(old),
    }
    return {name: value if value is None else round(value, 12) for name, value in found.items()}


def transfer_so_far(R) -> dict:
    """The metrics of the domains trained so far: `R` has a row for each of them, and a column for every domain.
    `current` is the score on the last one.

    >>> transfer_so_far([[0.8, 0.1, 0.0], [0.3, 0.9, 0.0]])
    {'average': 0.6, 'current': 0.9, 'backward_transfer': -0.5, 'forgetting': 0.5}
    """
    found = cl_metrics([row[: len(R)] for row in R])
    found["current"] = R[-1][len(R) - 1]
    return {name: found[name] for name in ("average", "current", "backward_transfer", "forgetting")}


def mean_of_means(strata) -> np.ndarray:
    return np.mean([values.mean(-1) for values in strata], axis=0)


def bootstrap(*strata, statistic=mean_of_means, resamples=10_000, seed=0) -> tuple[float, float]:
    """95% interval of the mean of values (one per task) by the percentile bootstrap (Efron 1979). Several strata (one
    per domain), each resampled by itself: of the mean of their means, or of another statistic of the strata, which are
    arrays (..., values). (0, 0) without values."""
    strata = [np.asarray(values, dtype=float) for values in strata if len(values)]
    if not strata:
        return 0.0, 0.0
    rng = np.random.default_rng(seed)
    drawn = [values[rng.integers(len(values), size=(resamples, len(values)))] for values in strata]
    low, high = np.quantile(statistic(drawn), [0.025, 0.975])
    return float(low), float(high)


def rewards_by_task(records, domain, tasks) -> dict[str, list[float]]:
    """The rewards of each task's valid conversations, for tasks that have any."""
    valid = [r for r in records if r["domain"] == domain and r["reward"] is not None]
    found = {task.id: [r["reward"] for r in valid if r["task_id"] == task.id] for task in tasks}
    return {task_id: rewards for task_id, rewards in found.items() if rewards}


def measure(records, domain, tasks, num_trials, user="scripted", evaluation_type="all", pass_threshold=PASS) -> dict:
    """Metrics of one domain's records: reward_mean, its 95% interval over tasks (reward_low, reward_high; see
    `bootstrap`), reward_std (over conversations), pass_rate, pass_hat_1 to pass_hat_<num_trials>, tool_accuracy (share
    of gold actions taken), turns, truncated (a share), invalid and tasks (numbers), reward_parts (the mean of each),
    the scores of doing nothing: do_nothing_rate (None if there is none), do_nothing_parts; and by_task, the mean reward
    of each task. Invalid conversations count in turns, truncated and invalid only. A reward of `pass_threshold` or more
    passes."""
    records = [r for r in records if r["domain"] == domain]
    valid = [r for r in records if r["reward"] is not None]
    rewards = [r["reward"] for r in valid]
    by_task = rewards_by_task(records, domain, tasks)
    means = {task_id: mean(found) for task_id, found in by_task.items()}
    low, high = bootstrap(list(means.values()))
    floor, floor_parts = oracle.do_nothing(domain, tasks, user, evaluation_type)
    metrics = {
        "reward_mean": mean(rewards),
        "reward_low": low,
        "reward_high": high,
        "reward_std": float(np.std(rewards)) if rewards else 0.0,
        "pass_rate": mean([r >= pass_threshold for r in rewards]),
        "tool_accuracy": mean([r["tool_accuracy"] for r in valid if r["tool_accuracy"] is not None]),
        "do_nothing_rate": floor,
        "turns": mean([r["turns"] for r in records]),
        "truncated": mean([r["truncated"] for r in records]),
        "invalid": len(records) - len(valid),
        "tasks": len(tasks),
        "reward_parts": oracle.mean_parts([r["reward_parts"] for r in valid]),
        "do_nothing_parts": floor_parts,
        "by_task": means,
    }
    passed = [[r >= pass_threshold for r in found] for found in by_task.values()]
    for k in range(1, num_trials + 1):
        metrics[f"pass_hat_{k}"] = mean([pass_hat_k(sum(p), len(p), k) for p in passed if len(p) >= k])
    return metrics


def overall(metrics, records, tasks) -> dict:
    """Means over the domains, with equal weights; None if a domain has none. The interval is over tasks in domains."""
    found = {}
    for name, value in next(iter(metrics.values())).items():
        if isinstance(value, float | None):
            values = [of_domain[name] for of_domain in metrics.values()]
            found[name] = None if None in values else mean(values)
    strata = [list(map(mean, rewards_by_task(records, d, chosen).values())) for d, chosen in tasks.items()]
    found["reward_low"], found["reward_high"] = bootstrap(*strata)
    return {**found, **{name: sum(values[name] for values in metrics.values()) for name in ("invalid", "tasks")}}


def text_metrics(metrics) -> str:
    """A Markdown table: a row per metric, a column per domain. In brackets: the score of doing nothing."""

    def text(value):
        return "n/a" if value is None else f"{value:.3f}"

    parts = sorted({part for values in metrics.values() for part in values.get("reward_parts", {})})
    columns = {}
    for domain, v in metrics.items():
        found, floor = v.get("reward_parts", {}), v.get("do_nothing_parts", {})
        columns[markdown(domain)] = {
            "reward (doing nothing)": f"{v['reward_mean']:.3f} ({text(v['do_nothing_rate'])})",
            "95% interval": f"{v['reward_low']:.3f} ... {v['reward_high']:.3f}",
            **{f"pass^{n.removeprefix('pass_hat_')}": f"{v[n]:.3f}" for n in v if n.startswith("pass_hat_")},
            **{f"part {markdown(p)}": f"{found[p]:.3f} ({text(floor.get(p))})" if p in found else "" for p in parts},
            "gold actions taken": f"{v['tool_accuracy']:.3f}",
            "turns": f"{v['turns']:.1f}",
            "truncated": f"{v['truncated']:.3f}",
            "invalid conversations": f"{v['invalid']}",
            "tasks": f"{v['tasks']}",
        }
    return pd.DataFrame(columns).to_markdown(disable_numparse=True)
