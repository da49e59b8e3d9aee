"""Reports: report.md, pictures, and conversations to read.

Data flow: summary.json and metrics.jsonl -> report.md and pictures.
"""

import contextlib
import json
import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.special import stdtrit  # scipy.stats.t.ppf, without the second that scipy.stats takes to import

from distributed import write_text
from text import markdown, printable

PLAIN = matplotlib.rc_context({"text.parse_math": False})  # a name with two dollar signs is no formula
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, for colour-blind readers
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))  # tell lines apart in greyscale
AT_END = ["reward_mean", "reward_std", "pass_rate", "tool_accuracy", "do_nothing_rate", "turns", "truncated", "invalid"]


def interval(values) -> tuple[float, float]:
    """(mean, half width of its 95% confidence interval by Student's t). The half width of a single value is NaN."""
    values = pd.Series(values, dtype=float)
    return values.mean(), values.sem() * stdtrit(len(values) - 1, 0.975)


def cell(values, form=".2f") -> str:
    """Mean and 95% interval as text, such as "0.93 ± 0.02"."""
    mean, half = interval(values)
    return f"{mean:{form}}" if np.isnan(half) else f"{mean:{form}} ± {half:.2f}"


def read_jsonl(path) -> list[dict]:
    """The records of a file with one JSON object a line. A line that a kill cut short is left out."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").split("\n"):
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def matrix(summary) -> pd.DataFrame:
    """Mean rewards, a column per domain: before training, after each training stage, and of doing nothing (NaN if there
    is none)."""
    order = summary["task_order"]
    rows = {"before training": [summary["baseline"][domain] for domain in order]}
    rows |= {f"after {stage}": row for stage, row in zip(summary["stages"], summary["R"], strict=True)}
    rows["doing nothing"] = [summary["do_nothing_rate"][domain] for domain in order]
    return pd.DataFrame.from_dict(rows, orient="index", columns=order, dtype=float)


def text_matrix(summary) -> str:
    """The transfer matrix as text, see `matrix`."""
    return matrix(summary).to_string(float_format="{:.2f}".format, col_space=9, na_rep="n/a")


def text_table(table, name, floatfmt=".3f") -> str:
    """The table in Markdown; `name`: the title of its index."""
    table = table.astype(object).where(table.notna(), None).rename(markdown).rename(columns=markdown).rename_axis(name)
    return table.to_markdown(floatfmt=floatfmt, missingval="n/a")


def lifts(summary) -> pd.DataFrame:
    """Mean reward on each domain that had a warm start: after the warm start, after GRPO, and the difference."""
    order = summary["task_order"]
    start = pd.Series(summary["warm_start"], order, dtype=float)
    end = pd.Series(np.diag(summary["R"]), order)
    return pd.DataFrame({"after the warm start": start, "after GRPO": end, "lift": end - start}).dropna()


def text_forgetting(summary) -> list[str]:
    """A line for each domain but the last: its best score, its last score, and the stage in which it lost most."""
    lines = []
    for domain, scores in pd.DataFrame(summary["R"], summary["stages"], summary["task_order"]).iloc[:, :-1].items():
        best, worst, lost = scores[:-1].idxmax(), scores.diff().idxmin(), -scores.diff().min()
        line = f"{domain}: {scores[best]:.2f} after {best}, {scores.iloc[-1]:.2f} at the end"
        line += f"; most was lost while training {worst} ({lost:.2f})" if lost > 0 else ""
        lines.append(f"- {markdown(line)}")
    return lines


def write_report(run):
    """Writes report.md, learning_curves.png and transfer_matrix.png from a run's summary.json and metrics.jsonl."""
    run = Path(run)
    summary = read_summary(run)
    transfer_matrix(summary).savefig(run / "transfer_matrix.png")
    learning_curves({" | ".join(summary["stages"]): [run]}).savefig(run / "learning_curves.png")
    at_end = pd.DataFrame(summary["evaluation"]).loc[AT_END].T.astype(float)
    metrics = pd.Series(summary["metrics"], dtype=float).dropna().to_frame("value")
    parts = [
        f"# {markdown(run.name)}",
        markdown(f"{summary['cl_algorithm']} on {' -> '.join(summary['task_order'])}: {summary['note']}"),
        text_table(matrix(summary), "mean reward"),
        text_table(at_end, "at the end"),
        text_table(metrics, "metric"),
        text_table(lifts(summary), "domain", ("", ".3f", ".3f", "+.3f")),
        "![learning curves](learning_curves.png)",
        "![transfer matrix](transfer_matrix.png)",
        "What was forgotten, and when:",
        "\n".join(text_forgetting(summary)),
        "Statistics of the algorithm, and versions:",
        f"```\n{json.dumps(summary['statistics'], indent=1)}\n{json.dumps(summary['versions'], indent=1)}\n```",
    ]
    if summary.get("command"):
        parts.append(f"To repeat it:\n\n```\n{summary['command']}\n```")
    write_text(run / "report.md", "\n\n".join(parts) + "\n")  # last, because a run with a report is complete


@PLAIN
def transfer_matrix(summary):
    """The transfer matrix as a picture. The domain that a stage trained is bold."""
    frame = matrix(summary)
    figure = Figure((3.6, 0.42 * len(frame) + 1.0), 200, layout="constrained")
    axes = figure.subplots()
    axes.matshow(frame, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(frame.shape[1]), frame.columns)
    axes.set_yticks(range(len(frame)), frame.index)
    for (i, j), value in np.ndenumerate(frame):
        style = {"color": "white" if value > 0.55 else "black", "fontweight": "bold" if i - 1 == j else "normal"}
        axes.text(j, i, "n/a" if np.isnan(value) else f"{value:.2f}", ha="center", va="center", **style)
    axes.set_title(f"mean reward, {summary['split']} split", fontsize=9)
    return figure


def logged_points(run) -> pd.DataFrame:
    """The points of a run's learning curves, from its metrics.jsonl: columns kind (rollout, evaluation or warm start),
    domain, step, value (mean reward). A rollout's value is the mean over this step and the two before it in which the
    domain was played."""
    kinds = {"baseline": "evaluation", "domain": "evaluation", "warmup": "warm start"}
    rows = []
    for r in read_jsonl(run / "metrics.jsonl"):
        if r["kind"] == "step":
            rows += [("rollout", domain, r["global_step"], y) for domain, y in r["reward_by_domain"].items()]
        elif r["kind"] == "evaluation" and r["stage"] in kinds:
            rows += [(kinds[r["stage"]], domain, r["global_step"], y) for domain, y in r["scores"].items()]
    points = pd.DataFrame(rows, columns=["kind", "domain", "step", "value"])
    rollouts = points[points.kind == "rollout"].groupby("domain").value
    points.loc[points.kind == "rollout", "value"] = rollouts.transform(lambda y: y.rolling(3, min_periods=1).mean())
    return points


def stage_points(run) -> pd.DataFrame:
    """The same without metrics.jsonl: lines through the evaluations. A step is a stage."""
    scores = matrix(read_summary(run))[:-1].reset_index(drop=True)
    points = scores.melt(var_name="domain", ignore_index=False).rename_axis("step").reset_index()
    return pd.concat([points.assign(kind=kind) for kind in ("rollout", "evaluation")])


def spread(points) -> pd.DataFrame:
    """By step: mean, half (width of the 95% interval; 0 for a single value) and count of the points' values."""
    return points.groupby("step").value.agg(mean="mean", half=lambda v: interval(v)[1], count="count").fillna(0.0)


def draw_curves(axes, runs):
    """Draws the learning curves of runs that differ in seed; `runs`: the points of each. Rollouts are lines,
    evaluations are filled points, evaluations after the warm start are hollow points. Several runs: means with 95%
    intervals. A dotted line ends each stage."""
    points = pd.concat(runs)
    for k, (domain, here) in enumerate(points.groupby("domain")):
        colour = COLOURS[k % 6]
        rollouts = spread(here[here.kind == "rollout"])
        rollouts = rollouts[rollouts["count"] >= min(2, len(runs))]  # of one seed in several there is no interval
        gaps = np.diff(rollouts.index, prepend=0) > 1  # no line over steps in which the domain was not played
        for _, line in rollouts.groupby(gaps.cumsum()):
            axes.plot(line.index, line["mean"], color=colour, linestyle=DASHES[k % 6])
            low, high = line["mean"] - line.half, line["mean"] + line.half
            axes.fill_between(line.index, low, high, color=colour, alpha=0.15, lw=0)
        for kind, face, label in (("evaluation", colour, domain), ("warm start", "white", None)):
            found = spread(here[here.kind == kind])
            style = {"fmt": MARKERS[k % 6], "markersize": 5, "color": colour, "markerfacecolor": face, "label": label}
            axes.errorbar(found.index, found["mean"], found.half, **style)
    for step in points.step[points.kind == "evaluation"].unique():
        axes.axvline(step, color="0.5", linewidth=0.8, linestyle=":")
    axes.set(ylim=(-0.03, 1.03))


@PLAIN
def learning_curves(groups):
    """A panel for each group, {title: folders of runs that differ in seed}: learning curves (see `draw_curves`) if each
    run has its metrics.jsonl, else mean rewards after each stage."""
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = Figure((max(4.8, 2.4 * columns), 1.7 * rows + 1.0), 200, layout="constrained")
    grid = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for axes, (name, runs) in zip(grid, groups.items(), strict=False):
        logged = all((run / "metrics.jsonl").is_file() for run in runs)
        draw_curves(axes, [logged_points(run) if logged else stage_points(run) for run in runs])
        axes.set_xlabel("optimiser step" if logged else "stages trained", fontsize=7)
        axes.set_title(textwrap.fill(name, 34), fontsize=7)
        axes.tick_params(labelsize=6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in grid[len(groups) :]:
        axes.axis("off")
    figure.supylabel("mean reward", fontsize=8)
    style = {"title": "lines: rollouts; filled: evaluation; hollow: warm start" if logged else None, "fontsize": 7}
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper center", ncols=6, title_fontsize=7, **style)
    return figure


NEEDED = {"cl_algorithm", "seed", "task_order", "stages", "R", "baseline", "warm_start", "do_nothing_rate", "metrics"}
NEEDED |= {"minutes", "bytes_kept", "config"}


def cleaned(value):
    """JSON whose strings are printable: a run from elsewhere may hold any."""
    if isinstance(value, dict):
        return {printable(name): cleaned(v) for name, v in value.items()}
    if isinstance(value, list):
        return [cleaned(v) for v in value]
    return printable(value) if isinstance(value, str) else value


def read_summary(run) -> dict:
    """summary.json of a finished run, see `cleaned`. Raises ValueError if there is none, or it is damaged."""
    try:
        summary = cleaned(json.loads((Path(run) / "summary.json").read_bytes()))
        if missing := NEEDED - set(summary):
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{run} is not a finished run: summary.json: {error}") from error
    return summary


def show_conversations(folder, worst=5, task=None, unfold=False) -> str:
    """The `worst` conversations of a run or an evaluation: those with the smallest reward, the latest first.
    `task`: of this task only. `unfold`: do not cut tool calls and results to a line. Raises ValueError if there is no
    such conversation."""
    folder = Path(folder)
    paths = [*folder.glob("trajectories.jsonl"), *sorted(folder.glob("trials*.jsonl"))]
    records = [r for path in paths for r in read_jsonl(path) if r["reward"] is not None]
    chosen = sorted((r for r in reversed(records) if task in (None, r["task_id"])), key=lambda r: r["reward"])
    if not chosen:
        known = ", ".join(sorted({r["task_id"] for r in records}))
        raise ValueError(f"{folder} has no conversations{f' of task {task!r}, but of {known}' if known else ''}")
    return "\n\n".join(text_conversation(r, unfold) for r in chosen[:worst])


def text_conversation(record, unfold=False) -> str:
    """A conversation as text: each message, tool calls as function(arguments), and the reward at the end."""

    def fold(text):
        line = " ".join(text.split())
        return line if unfold or len(line) <= 100 else f"{line[:100]} ... ({len(line)} characters)"

    where = ", ".join(f"{name} {record[name]}" for name in ("global_step", "trial") if name in record)
    lines = [printable(f"{record['domain']} task {record['task_id']}, {where}")]
    for message in record["messages"] if "messages" in record else record["simulation"]["messages"]:
        role, text = message["role"], message.get("content")
        if text:
            first, *rest = (fold(text) if role == "tool" else text).split("\n")
            # Only a message begins at the left margin: a text cannot forge another one's.
            lines += [printable(f"[{role}] {first}"), *(f"    {printable(line)}" for line in rest)]
        for call in message.get("tool_calls") or []:
            lines.append(printable(f"[{role}] {call['name']}({fold(json.dumps(call['arguments']))})"))
    parts = ", ".join(f"{name} {value:g}" for name, value in record["reward_parts"].items())
    accuracy = "" if record["tool_accuracy"] is None else f"; gold actions taken: {record['tool_accuracy']:.2f}"
    lines.append(printable(f"reward {record['reward']:g} ({parts}); ended by {record['termination']}{accuracy}"))
    return "\n".join(lines)
