"""report.py: comparison of runs, tables, curves, and conversations to read."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import report
from metrics import cl_metrics
from report import interval

CURVES = {"task_order": ["airline", "retail"], "stages": ["airline", "retail"]}


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.6], list(np.linspace(0, 1, 11) ** 2)])
def test_interval_is_students(values):
    mean, half = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert math.isnan(interval(values[:1])[1])  # one value has no interval


# --------------------------------------------------------------------------------------------------- comparing runs


def summary(algorithm, seed, forgetting, minutes=2.0, **settings):
    R = [[0.8, 0.0], [0.8 - forgetting, 0.6]]
    return {
        "cl_algorithm": algorithm,
        "seed": seed,
        "bytes_kept": 1500,
        **CURVES,
        "split": "test",
        "R": R,
        "baseline": {"airline": 0.0, "retail": 0.1},
        "do_nothing_rate": {"airline": 0.0, "retail": 0.2},
        "warm_start": {"airline": 0.5, "retail": 0.4},
        "metrics": cl_metrics(R),
        "minutes": minutes,
        "config": {"cl_algorithm": algorithm, "seed": seed, "run_name": f"{algorithm}{seed}", "ratio": 0.2, **settings},
    }


@pytest.fixture
def written(tmp_path):
    """Writes summaries into folders of their own, and returns these."""

    def write(summaries):
        folders = [tmp_path / f"run{k}" for k in range(len(summaries))]
        for folder, values in zip(folders, summaries, strict=True):
            folder.mkdir()
            (folder / "summary.json").write_text(json.dumps(values))
        return folders

    return write


def cells(table):
    """The cells of a Markdown table's rows, without its second line."""
    rows = [line for line in table.splitlines() if line.startswith("|") and not line.startswith("|:")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


def names(table):
    return [row[0] for row in cells(table.split("\n\n")[0])[1:]]


def test_compare_groups_runs_over_seeds(written):
    settings = (("sequential", 0.6, 4.0), ("replay", 0.1, 5.0))
    table = report.compare(written([summary(a, s, f, m) for s in (0, 1, 2) for a, f, m in settings]))
    header, sequential, replay, *pairs = cells(table)
    assert header[:6] == ["algorithm", "seeds", "forgetting", "average", "backward transfer", "least lift by GRPO"]
    assert header[6:] == ["minutes", "time / seq.", "kept, kB"]
    assert sequential[:3] == ["sequential", "3", "0.60 ± 0.00"]
    assert replay[:3] == ["replay", "3", "0.10 ± 0.00"]
    assert replay[5:] == ["+0.20 (retail)", "5.00 ± 0.00", "1.25", "1.5"]
    assert pairs[0] == ["difference from sequential", "seeds", "forgetting", "average"]


def test_a_row_is_named_by_the_settings_in_which_it_differs(written):
    ratios = [("sequential", 0.2), ("replay", 0.2), ("replay", 0.5), ("replay", 0.2)]
    table = report.compare(written([summary(a, s, 0.1, ratio=ratio) for s, (a, ratio) in enumerate(ratios)]))
    assert names(table) == ["sequential", "replay", "replay, ratio 0.5"]
    assert table.split("\n\n")[1] == "Where not named: ratio 0.2."


def test_a_setting_that_another_version_lacks_does_not_name_a_row(written):
    runs = [summary("sequential", 0, 0.5), summary("replay", 0, 0.1), summary("replay", 1, 0.1, window=3, penalty=None)]
    runs.append(summary("replay", 0, 0.1, window=3, penalty=2.0))
    assert names(report.compare(written(runs))) == ["sequential", "replay", "replay, penalty 2.0"]


def test_differences_from_sequential_are_paired_by_seed(written):
    seeds = {"sequential": {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.1}, "replay": {2: 0.3, 0: 0.2, 1: 0.1}}
    table = report.compare(written([summary(name, s, f) for name, found in seeds.items() for s, f in found.items()]))
    mean, half = interval([0.2 - 0.5, 0.1 - 0.6, 0.3 - 0.7])
    average = f"{-mean / 2:+.2f} ± {half / 2:.2f}"  # of two domains, one forgets
    assert cells(table)[-1] == ["replay", "3", f"{mean:+.2f} ± {half:.2f}", average]


def test_a_comparison_is_written_as_table_csv_and_pictures(written, tmp_path, recwarn):
    rows = [(name, seed, k / 10) for k, name in enumerate(["sequential", *"abcdefg"]) for seed in (0, 1)]
    table = report.compare(written([summary(*row) for row in rows]), tmp_path / "out")
    assert (tmp_path / "out" / "comparison.md").read_text() == table + "\n"
    found = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert list(zip(found.algorithm, found.seed, found.forgetting.round(6), strict=True)) == rows
    assert found["airline after retail"].tolist() == pytest.approx([0.8 - forgetting for _, _, forgetting in rows])
    for name in ("comparison.png", "learning_curves.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    assert not [w for w in recwarn if "layout" in str(w.message)]


def test_compare_counts_no_run_twice(written):
    (run,) = written([summary("replay", 3, 0.1)])
    with pytest.raises(ValueError, match="the seed 3 of another run"):
        report.compare([run, str(run)])


@pytest.mark.parametrize("spoilt", ["", "3", "[]", "{}", json.dumps(summary("a", 3, 0.1)).replace('"R"', '"S"')])
def test_a_damaged_summary_is_named(tmp_path, spoilt):
    with pytest.raises(ValueError, match=r"is not a finished run: there is no .*summary\.json"):
        report.compare([tmp_path])
    (tmp_path / "summary.json").write_text(spoilt)
    with pytest.raises(ValueError, match=r"summary\.json is damaged"):
        report.compare([tmp_path])


# ------------------------------------------------------------------------------------------------- report of a run


def test_the_report_says_what_was_forgotten_and_when():
    order = ["airline", "retail", "telecom"]
    R = [[0.6, 0.0, 0.0], [0.7, 0.5, 0.0], [0.1, 0.5, 0.4]]
    assert report.text_forgetting({"task_order": order, "stages": order, "R": R}) == [
        "- airline: 0.70 after retail, 0.10 at the end; most was lost while training telecom (0.60)",
        "- retail: 0.50 after retail, 0.50 at the end",
    ]
    alone = {"task_order": ["airline"], "stages": ["airline"], "R": [[1.0]]}
    assert report.text_forgetting(alone) == ["- there was one domain only"]


def test_a_report_has_every_table_and_picture(written):
    values = dict.fromkeys(report.AT_END, 0.25)
    about = {"note": "a note", "evaluation": {"airline": values, "retail": values}, "statistics": {}, "versions": {}}
    (run,) = written([{**summary("replay", 0, 0.5), **about, "warm_start": {"retail": 0.4}}])
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in curve_records([0.0, 1.0, 0.5, 0.25])))
    report.write_report(run)
    text = (run / "report.md").read_text()
    found = cells(text)
    assert " ".join(row[0] for row in found[1:5]) == "before training after airline after retail doing nothing"
    assert ["forgetting", "0.500"] in found and "intransigence" not in text
    assert found[-1] == ["retail", "0.400", "0.600", "+0.200"] and found[-2][0] == "domain"
    assert report.text_matrix(summary("replay", 0, 0.5)).splitlines()[3].split() == ["after", "retail", "0.30", "0.60"]
    assert "To repeat it" not in text  # it was not started from the command line
    assert {path.name for path in run.glob("*.png")} == {"learning_curves.png", "transfer_matrix.png"}


# ------------------------------------------------------------------------------------------------- learning curves


def curve_records(rewards, partial=False):
    """metrics.jsonl of a run on two domains, with two steps each. `rewards`: of the four steps."""

    def passed(scores):
        return {domain: score / 2 if partial else score for domain, score in scores.items()}

    def evaluated(step, stage, scores):
        details = {d: {"reward_mean": score, "pass_rate": passed(scores)[d]} for d, score in scores.items()}
        return {"kind": "evaluation", "stage": stage, "global_step": step, "scores": scores, "details": details}

    records = [evaluated(0, "baseline", {"airline": 0.0, "retail": 0.0}), evaluated(0, "warmup", {"airline": 0.1})]
    for step, reward in enumerate(rewards, 1):
        domain = "airline" if step < 3 else "retail"
        played = {domain: reward} if step != 4 else {domain: reward, "airline": 0.5}  # replayed
        by_domain = {"reward_by_domain": played, "pass_rate_by_domain": passed(played)}
        records.append({"kind": "step", "global_step": step, **by_domain})
        if step % 2 == 0:
            records.append(evaluated(step, "domain", {"airline": rewards[1], "retail": reward}))
    return records


def test_a_rollout_curve_is_a_mean_of_three_steps():
    def rollouts(domain, value):
        points = report.curve_points(curve_records([0.0, 1.0, 0.5, 0.25], partial=True), value)
        points = points[(points.kind == "rollout") & (points.domain == domain)]
        return dict(zip(points.step, points.value, strict=True))

    assert rollouts("airline", "reward") == {1: 0.0, 2: 0.5, 4: 0.5}
    assert rollouts("retail", "pass_rate") == {3: 0.25, 4: 0.1875}


def test_curves_over_seeds_are_means_with_intervals():
    runs = [(curve_records(rewards), CURVES) for rewards in ([0.0, 1.0, 0.5, 0.3], [0.4, 0.6, 0.1, 0.5])]
    runs[1][0][:] = [r for r in runs[1][0] if r["global_step"] != 3]  # one seed did not play retail there
    axes = report.new_figure(3, 3).subplots()
    report.draw_curves(axes, runs, "reward")
    lines = [line for line in axes.lines if line.get_linestyle() in ("-", "--") and len(line.get_xdata())]
    shown = {tuple(np.asarray(line.get_xdata()).tolist()): np.asarray(line.get_ydata()).tolist() for line in lines}
    assert shown[1, 2] == pytest.approx([0.2, 0.5])  # means over seeds of means over steps
    assert (4,) in shown and not any(3 in steps for steps in shown)  # of one seed there is no interval
    band = next(c for c in axes.collections if len(c.get_paths()) and len(c.get_paths()[0].vertices) > 3)
    half = 12.706 * np.std([0.0, 0.4], ddof=1) / np.sqrt(2)
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(0.2 - half, rel=1e-3)


@pytest.mark.parametrize("partial, panels", [(False, 1), (True, 2)])
def test_the_pass_rate_has_a_panel_if_it_differs(partial, panels):
    figure = report.learning_curves(curve_records([0.0, 1.0, 0.5, 0.25], partial), CURVES)
    assert len(figure.axes) == panels


# ---------------------------------------------------------------------------------------------------- conversations


def spoken(task, reward, text="Done.", **position):
    call = {"id": "call_1", "name": "get_user", "arguments": {"user_id": "u" * 200}}
    messages = [
        {"role": "user", "content": "My lamp is broken."},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "x" * 300},
        {"role": "assistant", "content": text},
    ]
    usual = {"domain": "retail", "task_id": task, "reward": reward, "reward_parts": {"DB": 1.0, "COMMUNICATE": 0.0}}
    return {**usual, "tool_accuracy": 0.5, "termination": "user_stop", "messages": messages, **position}


@pytest.fixture
def conversations(tmp_path):
    rows = [spoken("1", 1.0, global_step=0), spoken("2", 0.0, global_step=1), spoken("2", 0.0, "Later.", global_step=2)]
    rows += [spoken("3", 0.5, global_step=3), spoken("4", None, global_step=4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "trajectories.jsonl").write_text(text + text[:50])  # cut short by a kill
    return tmp_path


def test_conversations_are_shown_worst_first_and_the_latest_of_equals(conversations):
    shown = report.show_conversations(conversations, worst=3)
    titles = [line for line in shown.splitlines() if line.startswith("retail")]
    assert titles == ["retail task 2, step 2", "retail task 2, step 1", "retail task 3, step 3"]


def test_a_conversation_is_folded_to_lines(conversations):
    _, user, call, tool, said, outcome = report.show_conversations(conversations, worst=1).splitlines()
    assert user == "[user] My lamp is broken." and said == "[assistant] Later."
    assert call.startswith('[assistant] get_user({"user_id": "uuu') and call.endswith("... (215 characters))")
    assert tool == f"[tool] {'x' * 100} ... (300 characters)"
    assert outcome == "reward 0 (DB 1, COMMUNICATE 0); ended by user_stop; gold actions taken: 0.50"
    assert f"[tool] {'x' * 300}" in report.show_conversations(conversations, unfold=True)


def test_conversations_of_one_task_are_shown(conversations):
    assert report.show_conversations(conversations, task="3").count("retail task") == 1
    with pytest.raises(ValueError, match=r"no conversation of task '9' in .*; there are 1, 2, 3"):
        report.show_conversations(conversations, task="9")
    with pytest.raises(ValueError, match="has no conversations"):
        report.show_conversations(conversations / "nothing")


def test_a_models_text_cannot_steer_the_terminal():
    shown = report.text_conversation(spoken("1", 1.0, "\x1b[2J\x9b2J\x07 wiped \ud800", trial=0))
    assert "wiped" in shown and not any((ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 for c in shown)
    shown.encode()
    assert "\033[32mreward 1" in report.text_conversation(spoken("1", 1.0, trial=0), colour=True)
