"""The law of forgetting: which drift of the policy does forgetting follow, and how?

    python experiments/forgetting.py --runs runs/embedded/*_seed*/      runs that were made with --drift_every

A point is a domain that was trained after others, in one run: what the old domains lost in that time, against how far
the policy moved, as forward and reverse KL (see drift.py), on the new domain's conversations and on the old ones'. Old
domains that had nothing to lose do not count. For each of these four drifts: R^2 of a line and of a parabola through
the origin, and the rank correlation, with intervals from a bootstrap over seeds. Runs of one seed begin alike. The
arms are those that were chosen; other arms may follow another law. Results are table.md, points.csv and forgetting.png.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import pandas as pd
from annotated_types import MinLen

from comparison import group_runs
from distributed import write_text
from experiments import runner
from report import read_jsonl, read_summary

RESAMPLES = 1000
LEAST = 0.25  # mean reward of an old domain that can be lost
FEWEST = 3  # seeds
DRIFTS = {  # of the policy while the new domain was trained
    "forward KL, new domain": "forward new",
    "reverse KL, new domain": "reverse new",
    "forward KL, old domain": "forward old",
    "reverse KL, old domain": "reverse old",
}


@dataclass(kw_only=True)
class Args:
    """Fits the laws of forgetting to finished runs."""

    runs: Annotated[list[str], MinLen(1)]
    """directories of finished runs that were made with --drift_every"""
    output: str = "runs/forgetting"
    """directory for the table, the points and the picture"""


def points_of(run) -> list[dict]:
    """A run's points: a domain, and means over the old ones that had something to lose. Raises ValueError for a run
    that has not logged its drift. A run of one domain, or of all at once, has none, nor has a domain without a usable
    conversation."""
    summary = read_summary(Path(run))
    order, R = summary["task_order"], np.array(summary["R"])
    if summary["stages"] != order:
        return []
    ends = [r for r in read_jsonl(Path(run) / "metrics.jsonl") if r["kind"] == "transfer"]
    if not any(name.startswith("drift_") for end in ends for name in end):
        raise ValueError(f"{run} has not logged its drift: make it with train.py --drift_every 8")
    found = []
    for k in range(1, len(order)):
        measured = [name.rpartition("/")[2] for name in ends[k] if name.startswith(f"drift_forward/{order[k - 1]}/")]
        old = [j for j in range(k) if R[k - 1, j] >= LEAST and order[j] in measured]
        if not old or order[k] not in measured:
            continue
        drifts = {}
        for kind in ("forward", "reverse"):
            name = f"drift_{kind}/{order[k - 1]}"
            drifts[f"{kind} new"] = ends[k][f"{name}/{order[k]}"]
            drifts[f"{kind} old"] = np.mean([ends[k][f"{name}/{order[j]}"] for j in old])
        before, forgotten = R[k - 1, old].mean(), (R[k - 1, old] - R[k, old]).mean()
        names = {"run": str(run), "algorithm": summary["cl_algorithm"], "seed": summary["seed"], "new": order[k]}
        found.append({**names, "before": before, "forgotten": forgotten, **drifts})
    return found


def powers(x, degree) -> np.ndarray:
    """x, ..., x^degree, as columns."""
    return np.stack([x**k for k in range(1, degree + 1)], 1)


def fitted(x, y, degree) -> np.ndarray:
    """The coefficients of x, ..., x^degree of the least-squares polynomial through the origin: no drift, no loss."""
    return np.linalg.lstsq(powers(x, degree), y, rcond=None)[0]


def r_squared(x, y, degree) -> float:
    """1 - the sum of squares that `fitted` leaves, over that around the mean. Below 0 it is worse than the mean."""
    rest = y - powers(x, degree) @ fitted(x, y, degree)
    return 1 - (rest**2).sum() / ((y - y.mean()) ** 2).sum()


def over_seeds(points, statistic, seed=0) -> tuple[float, float, float]:
    """(statistic(points), its 95% interval from a bootstrap over seeds, whose points stay together)."""
    places = list(points.reset_index(drop=True).groupby("seed").indices.values())
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(RESAMPLES):
        chosen = np.concatenate([places[i] for i in rng.integers(len(places), size=len(places))])
        drawn.append(statistic(points.iloc[chosen]))
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return float(statistic(points)), float(low), float(high)


def table_of(points) -> list[dict]:
    """A row per drift, over all points. The last column says whether it explains more than the first drift does."""

    def explained(column, degree):
        return lambda chosen: r_squared(chosen[column].to_numpy(), chosen.forgotten.to_numpy(), degree)

    def more(column):
        mine, first = explained(column, 2), explained(next(iter(DRIFTS.values())), 2)
        return lambda chosen: mine(chosen) - first(chosen)

    rows = []
    for title, column in DRIFTS.items():
        statistics = {
            "R^2 of a line": explained(column, 1),
            "R^2 of a parabola": explained(column, 2),
            "rank correlation": lambda chosen, column=column: chosen[column].corr(chosen.forgotten, method="spearman"),
            "parabola, less the first": more(column),
        }
        found = {name: over_seeds(points, statistic) for name, statistic in statistics.items()}
        cells = {name: f"{value:.2f} [{low:.2f}, {high:.2f}]" for name, (value, low, high) in found.items()}
        rows.append({"drift": title, **cells})
    return rows


def run_experiment(args: Args):
    by_run = {run: of_run for run in args.runs if (of_run := points_of(run))}
    seeds = {point["seed"] for of_run in by_run.values() for point in of_run}
    if len(seeds) < FEWEST:
        raise ValueError(
            f"a law needs runs of {FEWEST} seeds at least, of several domains in sequence; got {len(seeds)}"
        )
    arms = group_runs(by_run)[0].algorithm
    points = pd.DataFrame([{"arm": arms[Path(run)], **point} for run, of_run in by_run.items() for point in of_run])
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "points.csv", points.to_csv(index=False))
    with runner.picture(output / "forgetting.png", 2, 2, (7.2, 6), sharey=True) as panels:
        for axes, (title, column) in zip(panels, DRIFTS.items(), strict=True):
            for k, (name, chosen) in enumerate(points.groupby("algorithm")):
                marker = "." if k < 10 else "x"  # there are ten colours
                axes.plot(chosen[column], chosen.forgotten, marker, markersize=3, alpha=0.6, label=name)
            x, y = points[column].to_numpy(), points.forgotten.to_numpy()
            grid = np.linspace(0, x.max(), 100)
            for degree, style in ((1, ":"), (2, "-")):
                axes.plot(grid, powers(grid, degree) @ fitted(x, y, degree), style, color="0.3", linewidth=1)
            laws = f"line {r_squared(x, y, 1):.2f}, parabola {r_squared(x, y, 2):.2f}"
            axes.set(title=f"{title}\n$R^2$: {laws}", xlabel="nats")
        panels[0].set_ylabel("forgotten")
        panels[2].set_ylabel("forgotten")
    runner.show_table(table_of(points), output)


if __name__ == "__main__":
    runner.run_command(Args, run_experiment)
