"""Reports: report.md, pictures, the comparison of runs, and conversations to read.

Data flow: summary.json and metrics.jsonl -> report.md and pictures; many summaries -> one table, a CSV and pictures.
"""

import json
import re
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.special import stdtrit  # scipy.stats.t.ppf, without the second that scipy.stats takes to import

from grpo import PASS

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito, for colour-blind readers
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)))  # tell lines apart in greyscale
AT_END = ["reward_mean", "reward_std", "pass_rate", "tool_accuracy", "do_nothing_rate", "turns", "truncated", "invalid"]


def interval(values) -> tuple[float, float]:
    """(mean, half width of its 95% confidence interval by Student's t). The half width of a single value is NaN."""
    values = pd.Series(values, dtype=float)
    return values.mean(), values.sem() * stdtrit(len(values) - 1, 0.975)


# ------------------------------------------------------------------------------------------------------------ files


def write_text(path, text):
    """Writes aside and renames, so that a kill leaves the old file or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read_jsonl(path) -> list[dict]:
    """The records of a file with one JSON object a line. A line that a kill cut short is left out."""
    records = []
    for line in Path(path).read_text().splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


# -------------------------------------------------------------------------------------------------- report of a run


def matrix(summary) -> pd.DataFrame:
    """Mean rewards, a column per domain: before training, after each training stage, and of doing nothing."""
    order = summary["task_order"]
    rows = {"before training": [summary["baseline"][domain] for domain in order]}
    rows |= {f"after {stage}": row for stage, row in zip(summary["stages"], summary["R"], strict=True)}
    rows["doing nothing"] = [summary["do_nothing_rate"][domain] for domain in order]
    return pd.DataFrame.from_dict(rows, orient="index", columns=order)


def text_matrix(summary) -> str:
    """The transfer matrix as text, see `matrix`."""
    return matrix(summary).to_string(float_format="{:.2f}".format, col_space=9)


def lifts(summary) -> pd.DataFrame:
    """Mean reward on each domain that had a warm start: after the warm start, after GRPO, and the difference."""
    order = summary["task_order"]
    start = pd.Series(summary["warm_start"], order, dtype=float)
    end = pd.Series(np.diag(summary["R"]), order)
    return pd.DataFrame({"after the warm start": start, "after GRPO": end, "lift": end - start}).dropna()


def text_forgetting(summary) -> list[str]:
    """A line for each domain but the last: its best score, its last score, and the stage in which it lost most."""
    order, stages = summary["task_order"], summary["stages"]
    lines = []
    for j, domain in enumerate(order[:-1]):
        scores = [row[j] for row in summary["R"]]
        best = max(scores[:-1])
        falls = {stages[i]: scores[i - 1] - scores[i] for i in range(1, len(scores))}
        worst = max(falls, key=falls.get)
        line = f"- {domain}: {best:.2f} after {stages[scores.index(best)]}, {scores[-1]:.2f} at the end"
        lost = f"; most was lost while training {worst} ({falls[worst]:.2f})"
        lines.append(line + (lost if falls[worst] > 0 else ""))
    return lines or ["- there was one domain only"]


def write_report(run):
    """Writes report.md, learning_curves.png and transfer_matrix.png from a run's summary.json and metrics.jsonl."""
    run = Path(run)
    summary = json.loads((run / "summary.json").read_text())
    transfer_matrix(summary).savefig(run / "transfer_matrix.png")
    learning_curves(read_jsonl(run / "metrics.jsonl"), summary).savefig(run / "learning_curves.png")
    at_end = pd.DataFrame(summary["evaluation"]).loc[AT_END].T.astype(float)
    metrics = pd.Series(summary["metrics"], dtype=float).dropna().to_frame("value")
    parts = [
        f"# {run.name}",
        f"{summary['cl_algorithm']} on {' -> '.join(summary['task_order'])}: {summary['note']}",
        matrix(summary).rename_axis("mean reward").to_markdown(floatfmt=".3f"),
        at_end.rename_axis("at the end").to_markdown(floatfmt=".3f"),
        metrics.rename_axis("metric").to_markdown(floatfmt=".3f"),
        lifts(summary).rename_axis("domain").to_markdown(floatfmt=("", ".3f", ".3f", "+.3f")),
        "![learning curves](learning_curves.png)",
        "![transfer matrix](transfer_matrix.png)",
        "What was forgotten, and when:",
        "\n".join(text_forgetting(summary)),
        "Statistics of the algorithm, and versions:",
        f"```\n{json.dumps(summary['statistics'], indent=1)}\n{json.dumps(summary['versions'], indent=1)}\n```",
    ]
    if "command" in summary:
        parts.append(f"To repeat it:\n\n```\n{summary['command']}\n```")
    write_text(run / "report.md", "\n\n".join(parts) + "\n")  # the last file of a run: a run with one is complete


# --------------------------------------------------------------------------------------------------------- pictures


def new_figure(width, height):
    """An empty figure, in inches."""
    from matplotlib.figure import Figure  # here, because training imports this file and draws at its end only

    return Figure(figsize=(width, height), dpi=200, layout="constrained")


def transfer_matrix(summary):
    """The transfer matrix as a picture. The domain that a stage trained is bold."""
    frame = matrix(summary)
    figure = new_figure(3.6, 0.42 * len(frame) + 1.0)
    axes = figure.subplots()
    axes.imshow(frame, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(frame.shape[1]), frame.columns)
    axes.set_yticks(range(len(frame)), frame.index)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    for line in (0.5, len(frame) - 1.5):
        axes.axhline(line, color="black", linewidth=1)
    for (i, j), value in np.ndenumerate(frame):
        colour = "white" if value > 0.55 else "black"
        weight = "bold" if i - 1 == j else "normal"
        axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=colour, fontweight=weight)
    axes.set_title(f"mean reward, {summary['split']} split", fontsize=9)
    return figure


def curve_points(records, value) -> pd.DataFrame:
    """The points of a run's learning curves of "reward" or "pass_rate", from its metrics.jsonl: columns kind
    (rollout, evaluation or warm start), domain, step, value. A rollout's value is the mean of this step and of the two
    before it in which the domain was played."""
    kinds = {"baseline": "evaluation", "domain": "evaluation", "warmup": "warm start"}
    metric = {"reward": "reward_mean", "pass_rate": "pass_rate"}[value]
    rows = []
    for r in records:
        if r["kind"] == "step":
            rows += [("rollout", domain, r["global_step"], y) for domain, y in r[f"{value}_by_domain"].items()]
        elif r["kind"] == "evaluation" and r["stage"] in kinds:
            kind = kinds[r["stage"]]
            rows += [(kind, domain, r["global_step"], found[metric]) for domain, found in r["details"].items()]
    points = pd.DataFrame(rows, columns=["kind", "domain", "step", "value"])
    rollouts = points[points.kind == "rollout"].groupby("domain").value
    points.loc[points.kind == "rollout", "value"] = rollouts.transform(lambda y: y.rolling(3, min_periods=1).mean())
    return points


def spread(points) -> pd.DataFrame:
    """By step: mean, half (width of the 95% interval; 0 for a single value) and count of the points' values."""
    return points.groupby("step").value.agg(mean="mean", half=lambda v: interval(v)[1], count="count").fillna(0.0)


def draw_line(axes, curve, k, **style):
    """A line of means and a band of intervals (see `spread`), in the k-th style."""
    axes.plot(curve.index, curve["mean"], color=COLOURS[k % 6], linestyle=DASHES[k % 6], alpha=0.8, **style)
    low, high = curve["mean"] - curve.half, curve["mean"] + curve.half
    axes.fill_between(curve.index, low, high, color=COLOURS[k % 6], alpha=0.15, lw=0)


def draw_curves(axes, runs, value):
    """Draws curves of `value` (see `curve_points`) of runs that differ in seed; `runs`: (records of metrics.jsonl,
    summary). Rollouts are lines, evaluations are filled points, evaluations after the warm start are hollow points.
    Several runs: means with 95% intervals. A dotted line ends each stage."""
    points = pd.concat([curve_points(records, value) for records, _ in runs])
    for k, domain in enumerate(runs[0][1]["task_order"]):
        here = points[points.domain == domain]
        rollouts = spread(here[here.kind == "rollout"])
        rollouts = rollouts[rollouts["count"] >= min(2, len(runs))]  # of one seed in several there is no interval
        gaps = np.diff(rollouts.index, prepend=0) > 1  # no line over steps in which the domain was not played
        for _, part in rollouts.groupby(gaps.cumsum()):
            draw_line(axes, part, k, linewidth=1.2)
        filled = {"markerfacecolor": COLOURS[k % 6], "markeredgecolor": "black", "label": domain}
        hollow = {"markerfacecolor": "white", "markeredgecolor": COLOURS[k % 6]}
        for kind, style in (("evaluation", filled), ("warm start", hollow)):
            found = spread(here[here.kind == kind])
            style |= {"fmt": MARKERS[k % 6], "markersize": 5, "color": COLOURS[k % 6], "elinewidth": 0.8}
            axes.errorbar(found.index, found["mean"], found.half if len(runs) > 1 else None, **style)
    for step in stage_ends(runs[0][0]):
        axes.axvline(step, color="0.5", linewidth=0.8, linestyle=":")
    axes.set(ylim=(-0.03, 1.03))
    axes.spines[["top", "right"]].set_visible(False)


def stage_ends(records) -> list[int]:
    return [r["global_step"] for r in records if r["kind"] == "evaluation" and r["stage"] == "domain"]


def learning_curves(records, summary):
    """Mean reward and pass rate over a run, see `draw_curves`. One panel if they are equal (every reward 0 or 1)."""
    panels = {"reward": "mean reward", "pass_rate": "pass rate"}
    if curve_points(records, "reward").equals(curve_points(records, "pass_rate")):
        panels = {"reward": "mean reward = pass rate"}
    figure = new_figure(6.4, 1.4 + 1.6 * len(panels))
    grid = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axes, (value, label) in zip(grid, panels.items(), strict=True):
        draw_curves(axes, [(records, summary)], value)
        axes.set(ylabel=label)
    ends = [0, *stage_ends(records)]
    for stage, start, end in zip(summary["stages"], ends[:-1], ends[1:], strict=True):
        grid[0].text((start + end) / 2, 1.06, f"training {stage}", ha="center", fontsize=8)
    grid[-1].set_xlabel("optimiser step")
    title = "lines: rollouts\nfilled: evaluation\nhollow: warm start"
    style = {"loc": "outside right center", "frameon": False, "fontsize": 7, "title_fontsize": 7}
    figure.legend(*grid[0].get_legend_handles_labels(), title=title, **style)
    return figure


# --------------------------------------------------------------------------------------------------- comparing runs

OF_A_RUN = ("cl_algorithm", "seed", "run_name", "resume", "runs_dir")  # settings that do not make a group
NEEDED = ("cl_algorithm", "seed", "task_order", "R", "baseline", "warm_start", "metrics", "minutes", "bytes_kept")


def read_summary(run) -> dict:
    """summary.json of a finished run. Raises ValueError if the run is not finished, or the file is damaged."""
    path = Path(run) / "summary.json"
    if not path.is_file():
        raise ValueError(f"{run} is not a finished run: there is no {path}")
    try:
        summary = json.loads(path.read_text())
        missing = [name for name in (*NEEDED, "config") if name not in summary]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if missing:
        raise ValueError(f"{path} is damaged: it has no {', '.join(missing)}")
    return summary


def name_groups(summaries) -> tuple[list[str], str]:
    """(the name of each run's group, a note). Runs with equal settings are a group. It is named by its algorithm and
    the settings in which it differs from most groups; the note gives their usual values. A setting that a run does not
    have, because another version made it, counts as None if it may be None, and else as the usual value."""
    settings = pd.DataFrame({k: json.dumps(v) for k, v in s["config"].items() if k not in OF_A_RUN} for s in summaries)
    optional = settings.columns[settings.eq("null").any()]
    settings[optional] = settings[optional].fillna("null")
    algorithms = [s["cl_algorithm"] for s in summaries]
    usual = settings[~settings.assign(cl_algorithm=algorithms).duplicated()].mode().iloc[0]
    unusual = settings.ne(usual) & settings.notna()

    def named(values):
        return [f"{name} {json.loads(value)}" for name, value in values.items()]

    names = [", ".join([algorithm, *named(settings.loc[i, unusual.loc[i]])]) for i, algorithm in enumerate(algorithms)]
    varied = named(usual[unusual.any()])
    return names, f"Where not named: {', '.join(varied)}." if varied else ""


def group_runs(runs) -> tuple[pd.DataFrame, dict[Path, dict], str]:
    """(table, summaries by folder, note; see `name_groups`). The table has a row per run, with its folder as index,
    and the columns algorithm (its group), seed, minutes, bytes_kept, each metric, lifts, and R row by row.
    Raises ValueError for a run that is not finished, or counts twice."""
    folders = [Path(run) for run in runs]
    summaries = [read_summary(folder) for folder in folders]
    names, note = name_groups(summaries)
    rows = []
    for name, s in zip(names, summaries, strict=True):
        row = {"algorithm": name, **{key: s[key] for key in ("seed", "minutes", "bytes_kept")}, **s["metrics"]}
        row |= {f"lift of {domain}": value for domain, value in lifts(s).lift.items()}
        for stage, values in zip(s["task_order"], s["R"], strict=True):
            row |= {f"{domain} after {stage}": value for domain, value in zip(s["task_order"], values, strict=True)}
        rows.append(row)
    table = pd.DataFrame(rows, index=folders)
    for folder, row in table[table.duplicated(["algorithm", "seed"])].iterrows():
        raise ValueError(f"{folder} has the settings and the seed {row.seed} of another run: each counts once")
    table = pd.concat(group.sort_values("seed") for _, group in table.groupby("algorithm", sort=False))
    return table, dict(zip(folders, summaries, strict=True)), note


def compare(runs, output=None) -> str:
    """Compares groups of finished runs, see `group_runs`. Returns Markdown: a table of means with 95% intervals over
    seeds, and one of the differences from sequential, run by run of the same seed. Time is a ratio to sequential.
    Writes these to `output`, a directory, if it is given, with comparison.csv (a row per run) and pictures."""
    table, summaries, note = group_runs(runs)
    groups = table.groupby("algorithm", sort=False)
    base = next((name for name in groups.groups if name.split(", ")[0] == "sequential"), None)
    rows = groups[["forgetting", "average", "backward_transfer"]].agg(cell)
    rows = rows.rename(columns={"backward_transfer": "backward transfer"})
    rows.insert(0, "seeds", groups.size())
    rows["least lift by GRPO"] = [least_lift(group) for _, group in groups]
    rows["minutes"] = groups.minutes.agg(cell)
    if base is not None:
        rows["time / seq."] = (groups.minutes.mean() / groups.minutes.mean()[base]).map("{:.2f}".format)
    rows["kept, kB"] = (groups.bytes_kept.mean() / 1000).map("{:.1f}".format)
    parts = [rows.to_markdown(disable_numparse=True), *([note] if note else [])]
    metrics = ["forgetting", "average"]
    others, of_base = table[table.algorithm != base].copy(), table[table.algorithm == base].set_index("seed")
    others[metrics] -= of_base[metrics].reindex(others.seed).to_numpy()
    pairs = others.dropna(subset=metrics).groupby("algorithm", sort=False)
    if len(pairs):
        rows = pairs[metrics].agg(cell, form="+.2f")
        rows.insert(0, "seeds", pairs.size())
        parts.append(rows.rename_axis("difference from sequential").to_markdown(disable_numparse=True))
    text = "\n\n".join(parts)
    if output is not None:
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        write_text(output / "comparison.md", text + "\n")
        table.to_csv(output / "comparison.csv", index=False)
        forgetting_over_time(groups, base).savefig(output / "comparison.png")
        curves_over_seeds(groups, summaries).savefig(output / "learning_curves.png")
    return text


def cell(values, form=".2f") -> str:
    mean, half = interval(values)
    return f"{mean:{form}}" if np.isnan(half) else f"{mean:{form}} ± {half:.2f}"


def least_lift(group) -> str:
    """The smallest mean lift of a group's domains, and which domain that is."""
    lift = group.filter(like="lift of ").mean().dropna()
    return f"{lift.min():+.2f} ({lift.idxmin().removeprefix('lift of ')})" if len(lift) else ""


def wrapped(name, width) -> str:
    """A group's name in lines that break after commas."""
    return "\n".join(textwrap.wrap(re.sub("(?<!,) ", "\xa0", name), width))


def forgetting_over_time(groups, base):
    """Forgetting against time: means over seeds, with 95% intervals of forgetting. Down and left is better."""
    names = [wrapped(name, 40) for name in groups.groups]
    figure = new_figure(6.4, max(2.8, 0.13 * sum(name.count("\n") + 1.4 for name in names) + 1.0))
    axes = figure.subplots()
    minutes = groups.minutes.mean() / (1.0 if base is None else groups.minutes.mean()[base])
    for k, (name, (group, runs)) in enumerate(zip(names, groups, strict=True)):
        mean, half = interval(runs.forgetting)
        colour = COLOURS[(k + k // 6) % 6]  # 36 pairs of marker and colour, filled and hollow in turn
        face = colour if k // 6 % 2 == 0 else "white"
        style = {"color": colour, "markerfacecolor": face, "markersize": 5, "capsize": 2, "elinewidth": 0.7}
        axes.errorbar(minutes[group], mean, half, fmt=MARKERS[k % 6], label=name, **style)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="minutes" if base is None else "time / time of sequential", ylabel="forgetting")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def curves_over_seeds(groups, summaries):
    """A panel per group: its learning curves (see `draw_curves`) if each run has its metrics.jsonl, else its mean
    rewards after each stage."""
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure = new_figure(2.4 * columns, 1.7 * rows + 0.5)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False).flat
    for axes in grid[len(groups) :]:
        axes.axis("off")
    for place, (axes, (name, group)) in enumerate(zip(grid, groups, strict=False)):
        lowest = place + columns >= len(groups)
        if all((folder / "metrics.jsonl").is_file() for folder in group.index):
            runs = [(read_jsonl(folder / "metrics.jsonl"), summaries[folder]) for folder in group.index]
            draw_curves(axes, runs, "reward")
            axes.set_xlabel("optimiser step" if lowest else "", fontsize=7)
        else:
            draw_stages(axes, [summaries[folder] for folder in group.index])
            axes.tick_params(axis="x", labelbottom=lowest, rotation=30)
        axes.set_title(wrapped(name, 34), fontsize=7)
        axes.tick_params(labelsize=6)
        axes.set(ylim=(-0.03, 1.03))
        axes.grid(alpha=0.3)
    figure.supylabel("mean reward", fontsize=8)
    handles, labels = grid[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=7)
    return figure


def draw_stages(axes, summaries):
    order = summaries[0]["task_order"]
    for k, domain in enumerate(order):
        scores = [[s["baseline"][domain], *(row[k] for row in s["R"])] for s in summaries]
        points = pd.DataFrame([(step, y) for row in scores for step, y in enumerate(row)], columns=["step", "value"])
        draw_line(axes, spread(points), k, marker=MARKERS[k % 6], markersize=4, label=domain)
    axes.set_xticks(range(len(order) + 1), ["start", *[f"after {stage}" for stage in order]], ha="right")


# ---------------------------------------------------------------------------------------------------- conversations

ANSI = {"assistant": 36, "user": 33, "tool": 90, "system": 35, "call": 32, "good": 32, "bad": 31, "title": 1}


def show_conversations(folder, worst=5, task=None, unfold=False, colour=False) -> str:
    """The `worst` conversations of a run or an evaluation: those with the smallest reward, the latest first.
    `task`: of this task only. `unfold`: do not cut tool calls and results to a line. Raises ValueError if there is no
    such conversation."""
    folder = Path(folder)
    paths = [*folder.glob("trajectories.jsonl"), *sorted(folder.glob("trials*.jsonl"))]
    records = [r for path in paths for r in read_jsonl(path) if r["reward"] is not None]
    if not records:
        raise ValueError(f"{folder} has no conversations: neither in trajectories.jsonl nor in trials.jsonl")
    known = sorted({r["task_id"] for r in records})
    if task is not None and task not in known:
        raise ValueError(f"there is no conversation of task {task!r} in {folder}; there are {', '.join(known)}")
    chosen = [r for r in reversed(records) if task in (None, r["task_id"])]
    chosen.sort(key=lambda r: r["reward"])
    return "\n\n".join(text_conversation(r, unfold, colour) for r in chosen[:worst])


def text_conversation(record, unfold=False, colour=False) -> str:
    """A conversation as text: each message, tool calls as function(arguments), and the reward at the end."""

    def paint(kind, text):
        return f"\033[{ANSI[kind]}m{text}\033[0m" if colour else text

    def clean(text):
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]", "\ufffd", text)  # a model's text may hold escapes

    def fold(text):
        line = " ".join(text.split())
        return line if unfold or len(line) <= 100 else f"{line[:100]} ... ({len(line)} characters)"

    position = [
        f"{name} {record[key]}" for key, name in {"global_step": "step", "trial": "trial"}.items() if key in record
    ]
    lines = [paint("title", f"{record['domain']} task {record['task_id']}, {', '.join(position)}")]
    for message in record["messages"] if "messages" in record else record["simulation"]["messages"]:
        role, text = message["role"], clean(message.get("content") or "")
        if text:
            lines.append(paint(role, f"[{role}] {fold(text) if role == 'tool' else text}"))
        for call in message.get("tool_calls") or []:
            lines.append(paint("call", clean(f"[{role}] {call['name']}({fold(json.dumps(call['arguments']))})")))
    parts = ", ".join(f"{name} {value:g}" for name, value in record["reward_parts"].items())
    accuracy = "" if record["tool_accuracy"] is None else f"; gold actions taken: {record['tool_accuracy']:.2f}"
    outcome = f"reward {record['reward']:g} ({parts}); ended by {record['termination']}{accuracy}"
    lines.append(paint("good" if record["reward"] >= PASS else "bad", outcome))
    return "\n".join(lines)
