"""Comparison of finished runs, from their summaries alone: statistics, tables, a CSV, pictures.

    python eval.py --compare runs/a_seed0 runs/a_seed1 runs/b_seed0 runs/b_seed1

Data flow: summaries -> a row for each run (`group_runs`) -> an arm is the runs with equal settings -> means, intervals
and tests over seeds. Runs of a single domain are no arm but the reference of intransigence.

The statistics are those of Agarwal et al. 2021 (arXiv:2108.13264), and exact tests in place of approximate ones.
"""

import json
import textwrap
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from distributed import write_text
from metrics import bootstrap, cl_metrics
from report import COLOURS, MARKERS, PLAIN, cell, interval, learning_curves, lifts, matrix, read_summary
from text import markdown

# Settings that make no arm.
OF_A_RUN = ("cl_algorithm", "seed", "run_name", "resume", "runs_dir", "task_order", "checkpoint_every", "drift_every")
OF_A_RUN += ("tracker", "vllm_url", "vllm_timeout")
LEVEL = 0.05  # of the tests
MOST_FLIPS = 2**20  # of signs; with more, they are drawn
TESTED = ("average", "forgetting")  # metrics that are tested against the baseline


# ------------------------------------------------------------------------------------------------------- statistics


def interquartile_mean(strata) -> np.ndarray:
    """The mean of the middle half of all scores: a quarter of them, rounded down, is cut off at each end. `strata`:
    arrays (..., runs), one for each domain."""
    scores = np.sort(np.concatenate(strata, axis=-1), axis=-1)
    cut = scores.shape[-1] // 4
    return scores[..., cut : scores.shape[-1] - cut].mean(-1)


def sign_flip_test(differences, seed=0) -> float:
    """The two-sided p value of paired differences whose distribution is symmetric around 0 if there is no effect: the
    share of all sign patterns with a mean as far from 0 (Fisher 1935). Exact for 20 differences or fewer; for more, of
    MOST_FLIPS random patterns and the observed one. NaN without differences."""
    differences = np.asarray(differences, dtype=float)
    n = len(differences)
    if n == 0:
        return np.nan
    if 2**n <= MOST_FLIPS:
        sums = np.zeros(1)
        for d in differences:
            sums = np.concatenate([sums + d, sums - d])
    else:
        rng = np.random.default_rng(seed)
        sums = np.full(MOST_FLIPS + 1, differences.sum())
        sums[1:] = 0.0
        for d in differences:
            sums[1:] += d * rng.choice((-1.0, 1.0), MOST_FLIPS)
    observed = abs(differences.sum())
    return float((np.abs(sums) >= observed - 1e-9 * max(1.0, observed)).mean())


def holm(p_values) -> np.ndarray:
    """Adjusted p values (Holm 1979): below a level, they are significant with this level for all of them together."""
    p_values = np.asarray(p_values, dtype=float)
    order = np.argsort(p_values)
    scaled = p_values[order] * np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(scaled))
    return adjusted


def probability_of_improvement(mine, others) -> float:
    """The probability that a random run of mine has a higher score than a random one of the others, a mean over
    domains; a tie counts half. Both are (runs, domains)."""
    mine, others = np.asarray(mine)[:, None], np.asarray(others)[None]
    return float(((mine > others) + 0.5 * (mine == others)).mean())


# -------------------------------------------------------------------------------------------------------------- arms


def name_arms(summaries) -> tuple[list[str], str]:
    """(the name of each run's arm, a note). Runs with equal settings are an arm, whatever the order of its domains. It
    is named by its algorithm and the settings in which it differs from most arms; the note gives their usual values."""
    settings = pd.DataFrame({k: json.dumps(v) for k, v in s["config"].items() if k not in OF_A_RUN} for s in summaries)
    for name, values in settings.items():  # of a run whose version had no such setting
        settings[name] = values.fillna("null" if "null" in values.values else values.mode().iloc[0])
    algorithms = [s["cl_algorithm"] for s in summaries]
    usual = settings[~settings.assign(cl_algorithm=algorithms).duplicated()].mode().iloc[0]
    unusual = settings.ne(usual)

    def named(values):
        return [f"{name} {json.loads(value)}" for name, value in values.items()]

    names = [", ".join([algorithm, *named(settings.loc[i, unusual.loc[i]])]) for i, algorithm in enumerate(algorithms)]
    varied = named(usual[unusual.any()])
    return names, f"Where not named: {', '.join(varied)}." if varied else ""


def references(summaries) -> dict[str, float]:
    """The mean final reward of the runs that train a single domain, by domain."""
    alone = pd.Series([s["R"][0][0] for s in summaries], [s["task_order"][0] for s in summaries], dtype=float)
    return alone.groupby(level=0).mean().to_dict()


def row(summary, alone) -> dict:
    """One run's numbers. `alone`: see `references`."""
    order, R = summary["task_order"], np.array(summary["R"])
    one_by_one = summary["stages"] == order  # not joint
    known = [alone[domain] for domain in order] if one_by_one and set(order) <= set(alone) else None
    found = {
        "order": " -> ".join(order),
        **{name: summary[name] for name in ("seed", "bytes_kept", "minutes")},
        **{name: summary.get(name, np.nan) for name in ("conversations", "sampled_tokens", "cpu_seconds")},
        **summary["metrics"],
        "intransigence": cl_metrics(R, joint=known)["intransigence"],
        "plasticity": np.diag(R).mean() if one_by_one else np.nan,
        "revision": summary.get("revision", "unknown"),
    }
    found |= {f"lift of {domain}": value for domain, value in lifts(summary).lift.items()}
    for k, domain in enumerate(order):
        found |= {f"{domain} at the end": R[-1, k], f"{domain} after its own training": R[k, k] if one_by_one else None}
    return found | {" ".join(place): value for place, value in matrix(summary).unstack().items()}


def group_runs(runs) -> tuple[pd.DataFrame, str]:
    """(table, note; see `name_arms`). The table has a row per run, with its folder as index; `algorithm` is its arm,
    with the order of domains if that is not the usual one. Raises ValueError for a run that is not finished, or counts
    twice."""
    folders = [Path(run) for run in runs]
    summaries = [read_summary(folder) for folder in folders]
    single = [len(s["task_order"]) == 1 for s in summaries]
    if all(single):
        single = [False] * len(single)
    arms, note = name_arms([s for s, alone in zip(summaries, single, strict=True) if not alone])
    alone = references([s for s, of_one in zip(summaries, single, strict=True) if of_one])
    chosen = [(f, s) for f, s, of_one in zip(folders, summaries, single, strict=True) if not of_one]
    table = pd.DataFrame([row(s, alone) for _, s in chosen], index=[f for f, _ in chosen])
    usual = table.order.mode().iloc[0]
    ordered = [arm if order == usual else f"{arm}, {order}" for arm, order in zip(arms, table.order, strict=True)]
    table = pd.concat([pd.DataFrame({"algorithm": ordered, "arm": arms}, index=table.index), table], axis=1)
    for folder, of_run in table[table.duplicated(["algorithm", "seed"])].iterrows():
        raise ValueError(f"{folder} has the settings and the seed {of_run.seed} of another run: each counts once")
    return table, note


def choose_baseline(table, name=None) -> str | None:
    """The arm that the others are tested against: `name`, by default sequential, if it is there. Raises ValueError for
    a name that no arm has."""
    arms = list(dict.fromkeys(table.arm))
    if name is not None and name not in arms:
        raise ValueError(f"there is no arm {name!r} to compare with; there are: {'; '.join(arms)}")
    return name or min((arm for arm in arms if arm.split(", ")[0] == "sequential"), key=len, default=None)


def differences(table, name, baseline, metric) -> np.ndarray:
    """An algorithm's metric less that of the baseline (an arm), run by run of the same seed and order."""
    mine, others = table[table.algorithm == name], table[table.arm == baseline]
    paired = (of.set_index(["seed", "order"])[metric].astype(float) for of in (mine, others))
    mine, others = next(paired), next(paired)
    return (mine - others).dropna().to_numpy()


def final_scores(runs) -> np.ndarray:
    """The mean rewards (runs, domains) at the end."""
    return runs.filter(like=" at the end").dropna(axis=1).to_numpy(dtype=float)


# ------------------------------------------------------------------------------------------------------------ tables


def compare(runs, output, baseline=None) -> str:
    """Compares finished runs, see `group_runs`, and returns Markdown. `baseline`: see `choose_baseline`. Writes it to
    `output`, a directory, with comparison.csv (a row per run) and pictures."""
    table, note = group_runs(runs)
    baseline = choose_baseline(table, baseline)
    revisions = sorted(set(table.revision))
    if len(revisions) > 1:
        note = " ".join([note, f"The runs are of {len(revisions)} revisions: {', '.join(revisions)}."]).strip()
    parts = [table_of_arms(table), *([markdown(note)] if note else []), table_of_domains(table)]
    if baseline is not None and len(tests := tests_against(table, baseline)):
        parts += [table_of_tests(tests, baseline), markdown(what_seeds_can_show(tests))]
    text = "\n\n".join(parts)
    groups = table.groupby("algorithm", sort=False)
    pictures = {
        "comparison.png": forgetting_and_plasticity(groups),
        "learning_curves.png": learning_curves({name: group.index for name, group in groups}),
        "p_values.png": matrix_of_p_values(table),
    }
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "comparison.md", text + "\n")
    write_text(output / "comparison.csv", table.to_csv(index=False))
    for name, picture in pictures.items():
        picture.savefig(output / name)
    return text


def to_markdown(rows, title) -> str:
    table = pd.DataFrame(rows).set_index(title).rename(markdown)
    return table.to_markdown(disable_numparse=True)


def number(values, form, scale=1.0) -> str:
    """The mean as text; empty if it is not known."""
    mean = pd.Series(values, dtype=float).mean() * scale
    return "" if np.isnan(mean) else f"{mean:{form}}"


def table_of_arms(table) -> str:
    """A row per algorithm: means over seeds with 95% intervals, the interquartile mean with that of the bootstrap
    within domains, and what it cost."""
    rows = []
    for name, runs in table.groupby("algorithm", sort=False):
        scores = final_scores(runs).T
        low, high = bootstrap(*scores, statistic=interquartile_mean)
        shown = ("average", "forgetting", "backward_transfer", "plasticity", "intransigence")
        metrics = {m.replace("_", " "): cell(runs[m]) if runs[m].notna().any() else "" for m in shown}
        costs = {
            "conversations": number(runs.conversations, ".0f"),
            "sampled tokens, k": number(runs.sampled_tokens, ".0f", 1e-3),
            "CPU seconds": number(runs.cpu_seconds, ".0f"),
            "kept, kB": number(runs.bytes_kept, ".1f", 1e-3),
        }
        iqm = f"{interquartile_mean(scores):.2f} [{low:.2f}, {high:.2f}]"
        rows.append({"algorithm": name, "seeds": f"{len(runs)}", "IQM": iqm, **metrics, **costs})
    return to_markdown(rows, "algorithm")


def table_of_domains(table) -> str:
    """A row per algorithm and domain: mean rewards, and what GRPO has added to the warm start."""
    rows = []
    for name, runs in table.groupby("algorithm", sort=False):
        domains = [c.removesuffix(" at the end") for c in table.filter(like=" at the end")]
        for domain in domains:
            places = {place: f"{domain} {place}" for place in ("after its own training", "at the end")}
            places["lift by GRPO"] = f"lift of {domain}"
            values = {title: runs[c].dropna() if c in runs else () for title, c in places.items()}
            cells = {title: cell(found) if len(found) else "" for title, found in values.items()}
            if cells["at the end"]:
                rows.append({"algorithm": name, "domain": markdown(domain), **cells})
    return to_markdown(rows, "algorithm")


def tests_against(table, baseline) -> pd.DataFrame:
    """By algorithm: its differences from the baseline in each of TESTED (a mean, the half width of its interval, p,
    and p after Holm's correction), and the probability of improvement. Algorithms without a common seed are left
    out."""
    rows = {}
    for name, runs in table[table.arm != baseline].groupby("algorithm", sort=False):
        found = {metric: differences(table, name, baseline, metric) for metric in TESTED}
        if not all(map(len, found.values())):
            continue
        others = final_scores(table[(table.arm == baseline) & table.order.isin(runs.order)])
        rows[name] = {
            "seeds": len(found[TESTED[0]]),
            "improvement": probability_of_improvement(final_scores(runs), others),
        }
        for metric, values in found.items():
            mean, half = interval(values)
            rows[name] |= {metric: mean, f"{metric} half": half, f"{metric} p": sign_flip_test(values)}
    tests = pd.DataFrame.from_dict(rows, orient="index")
    for metric in TESTED if len(tests) else ():
        tests[f"{metric} p, Holm"] = holm(tests[f"{metric} p"])
    return tests


def table_of_tests(tests, baseline) -> str:
    title, rows = markdown(f"less {baseline}'s, by seed"), []
    for name, found in tests.iterrows():
        shown = {title: name, "seeds": f"{found.seeds:.0f}"}
        for metric in TESTED:
            half = found[f"{metric} half"]
            shown[metric] = f"{found[metric]:+.2f}" + ("" if np.isnan(half) else f" ± {half:.2f}")
            shown[f"p ({metric})"] = f"{found[f'{metric} p']:.3f}"
            shown[f"Holm ({metric})"] = f"{found[f'{metric} p, Holm']:.3f}"
        rows.append(shown | {"probability of improvement": f"{found.improvement:.2f}"})
    return to_markdown(rows, title)


def what_seeds_can_show(tests) -> str:
    """A sentence: how small p can be, and which differences lie within the intervals."""
    seeds = int(tests.seeds.min())
    least = sign_flip_test(np.ones(seeds))
    corrected = min(1.0, least * len(tests))
    can = "can" if corrected <= LEVEL else "cannot"
    text = f"With {seeds} paired seeds p is at least {least:.3f}, and {corrected:.3f} after Holm's correction over "
    text += f"{len(tests)} arms: it {can} fall below {LEVEL}."
    half = tests[[f"{metric} half" for metric in TESTED]].median()
    if half.notna().all():
        spread = " and ".join(f"{half[f'{metric} half']:.2f} in {metric}" for metric in TESTED)
        text += f" Differences of less than about {spread} (the median half width of the intervals) do not show."
    return text


# ---------------------------------------------------------------------------------------------------------- pictures


@PLAIN
def forgetting_and_plasticity(groups):
    """A point per algorithm, with 95% intervals over seeds: up and left is better."""
    figure = Figure((7.2, max(3.2, 0.2 * len(groups) + 1.0)), 200, layout="constrained")
    axes = figure.subplots()
    for k, (name, runs) in enumerate(groups):
        if runs.plasticity.isna().all():
            continue
        (x, wide), (y, high) = interval(runs.forgetting), interval(runs.plasticity)
        style = {"fmt": MARKERS[k % 6], "color": COLOURS[(k + k // 6) % 6], "alpha": 0.8, "lw": 0.8}  # 36 pairs
        axes.errorbar(x, y, high, wide, capsize=2, label=textwrap.fill(name, 40), **style)
    axes.axvline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="forgetting", ylabel="plasticity")
    figure.legend(loc="outside right center", fontsize=7)
    return figure


@PLAIN
def matrix_of_p_values(table):
    """For each pair of algorithms with common seeds: p of the sign-flip test on the average, without correction."""
    names = list(dict.fromkeys(table.algorithm))
    averages = {name: runs.set_index(["seed", "order"]).average for name, runs in table.groupby("algorithm")}
    size = 0.34 * len(names) + 2.6
    figure = Figure((size + 1.2, size), 200, layout="constrained")
    axes = figure.subplots()
    signed = np.full((len(names), len(names)), np.nan)
    for i, a in enumerate(names):
        for j, b in enumerate(names):
            found = (averages[a] - averages[b]).dropna().to_numpy(dtype=float)
            if i == j or not len(found):
                continue
            p = sign_flip_test(found)
            signed[i, j] = np.sign(found.mean()) * (1 - p)
            style = {"fontsize": 5, "fontweight": "bold" if p < LEVEL else "normal"}
            axes.text(j, i, f"{p:.3f}".removeprefix("0"), ha="center", va="center", **style)
    axes.matshow(signed, cmap="PuOr", vmin=-1.6, vmax=1.6)
    labels = [textwrap.fill(name, 40) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=6)
    axes.set_yticks(range(len(names)), labels, fontsize=6)
    axes.set_title("p of the difference in average; purple: the row has more, orange: less", fontsize=7)
    return figure
