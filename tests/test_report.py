"""report.py: tables, curves, and conversations to read."""

import json
import math
import re

import numpy as np
import pytest
from markdown_it import MarkdownIt
from matplotlib.figure import Figure
from scipy import stats

import report
from metrics import cl_metrics
from report import interval


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.6], list(np.linspace(0, 1, 11) ** 2)])
def test_interval_is_students(values):
    mean, half = interval(values)
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert math.isnan(interval(values[:1])[1])  # one value has no interval


def summary(algorithm, seed, forgetting, minutes=2.0, **settings):
    R, order = [[0.8, 0.0], [0.8 - forgetting, 0.6]], ["airline", "retail"]
    about = {"cl_algorithm": algorithm, "seed": seed}
    usual = {"task_order": order, "stages": order, "split": "test", "minutes": minutes, "bytes_kept": 1500}
    scores = {"baseline": [0.0, 0.1], "do_nothing_rate": [0.0, None], "warm_start": [0.5, 0.4]}
    scores = {name: dict(zip(order, values, strict=True)) for name, values in scores.items()}
    config = {**about, "run_name": f"{algorithm}{seed}", "ratio": 0.2, **settings}
    return {**about, **usual, **scores, "R": R, "metrics": cl_metrics(R), "config": config}


def cells(table):
    """The cells of a Markdown table's rows, without its second line."""
    rows = [line for line in table.splitlines() if line.startswith("|") and not line.startswith("|:")]
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


@pytest.mark.parametrize("spoilt", [None, "", "3", "{}", json.dumps(summary("a", 3, 0.1)).replace('"R"', '"S"')])
def test_a_missing_or_damaged_summary_is_named(tmp_path, spoilt):
    if spoilt is not None:
        (tmp_path / "summary.json").write_text(spoilt)
    with pytest.raises(ValueError, match=r"is not a finished run: summary\.json"):
        report.read_summary(tmp_path)


def test_the_report_says_what_was_forgotten_and_when():
    order = ["airline", "retail", "telecom"]
    R = [[0.6, 0.0, 0.0], [0.7, 0.5, 0.0], [0.1, 0.5, 0.4]]
    assert report.text_forgetting({"task_order": order, "stages": order, "R": R}) == [
        "- airline: 0.70 after retail, 0.10 at the end; most was lost while training telecom (0.60)",
        "- retail: 0.50 after retail, 0.50 at the end",
    ]


@pytest.mark.parametrize("floor, shown", [(0.2, "0.200"), (None, "n/a")])
def test_a_report_has_every_table_and_picture(tmp_path, floor, shown):
    values = {**dict.fromkeys(report.AT_END, 0.25), "do_nothing_rate": floor}
    about = {"note": "a note", "evaluation": {"airline": values, "retail": values}, "statistics": {}, "versions": {}}
    found = {**summary("replay", 0, 0.5), **about, "warm_start": {"retail": 0.4}}
    found["do_nothing_rate"] = {"airline": 0.0, "retail": floor}
    (tmp_path / "summary.json").write_text(json.dumps(found))
    write_curves(tmp_path, [0.0, 1.0, 0.5, 0.25])
    report.write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    rows = cells(text)
    assert " ".join(row[0] for row in rows[1:5]) == "before training after airline after retail doing nothing"
    assert rows[4] == ["doing nothing", "0.000", shown] and rows[7][0] == "retail" and rows[7][5] == shown
    assert ["forgetting", "0.500"] in rows and "intransigence" not in text
    assert rows[-1] == ["retail", "0.400", "0.600", "+0.200"] and rows[-2][0] == "domain"
    *_, last, nothing = report.text_matrix(found).splitlines()
    assert last.split() == ["after", "retail", "0.30", "0.60"] and nothing.split()[-1] == shown[:4]
    assert "To repeat it" not in text  # it was not started from the command line
    assert {path.name for path in tmp_path.glob("*.png")} == {"learning_curves.png", "transfer_matrix.png"}


def write_curves(run, rewards, unplayed=None):
    """metrics.jsonl of a run on two domains, with two steps each. `rewards`: of the four steps."""

    def evaluated(step, stage, **scores):
        return {"kind": "evaluation", "stage": stage, "global_step": step, "scores": scores}

    records = [evaluated(0, "baseline", airline=0.0, retail=0.0), evaluated(0, "warmup", airline=0.1)]
    for step, reward in enumerate(rewards, 1):
        played = {"airline" if step < 3 else "retail": reward}
        played |= {"airline": 0.5} if step == 4 else {}  # replayed
        if step != unplayed:
            records.append({"kind": "step", "global_step": step, "reward_by_domain": played})
        if step % 2 == 0:
            records.append(evaluated(step, "domain", airline=rewards[1], retail=reward))
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return report.logged_points(run)


def test_a_rollout_curve_is_a_mean_of_three_steps(tmp_path):
    points = write_curves(tmp_path, [0.0, 1.0, 0.5, 0.25])
    rollouts = points[points.kind == "rollout"].groupby("domain")
    curves = {domain: dict(zip(found.step, found.value, strict=True)) for domain, found in rollouts}
    assert curves == {"airline": {1: 0.0, 2: 0.5, 4: 0.5}, "retail": {3: 0.5, 4: 0.375}}


def test_curves_over_seeds_are_means_with_intervals(tmp_path):
    runs = [write_curves(tmp_path, [0.0, 1.0, 0.5, 0.3]), write_curves(tmp_path, [0.4, 0.6, 0.1, 0.5], unplayed=3)]
    axes = Figure().subplots()
    report.draw_curves(axes, runs)
    lines = [line for line in axes.lines if line.get_linestyle() in ("-", "--") and len(line.get_xdata())]
    shown = {tuple(np.asarray(line.get_xdata()).tolist()): np.asarray(line.get_ydata()).tolist() for line in lines}
    assert shown[1, 2] == pytest.approx([0.2, 0.5])  # means over seeds of means over steps
    assert (4,) in shown and not any(3 in steps for steps in shown)  # of one seed there is no interval
    band = next(c for c in axes.collections if len(c.get_paths()) and len(c.get_paths()[0].vertices) > 3)
    half = 12.706 * np.std([0.0, 0.4], ddof=1) / np.sqrt(2)
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(0.2 - half, rel=1e-3)


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
    titles = [line.removeprefix("retail task ") for line in shown.splitlines() if line.startswith("retail")]
    assert titles == ["2, global_step 2", "2, global_step 1", "3, global_step 3"]
    assert report.show_conversations(conversations, task="3").count("retail task") == 1
    with pytest.raises(ValueError, match="has no conversations of task '9', but of 1, 2, 3"):
        report.show_conversations(conversations, task="9")


def test_a_conversation_is_folded_to_lines(conversations):
    _, user, call, tool, said, outcome = report.show_conversations(conversations, worst=1).splitlines()
    assert user == "[user] My lamp is broken." and said == "[assistant] Later."
    assert call.startswith('[assistant] get_user({"user_id": "uuu') and call.endswith("... (215 characters))")
    assert tool == f"[tool] {'x' * 100} ... (300 characters)"
    assert outcome == "reward 0 (DB 1, COMMUNICATE 0); ended by user_stop; gold actions taken: 0.50"
    assert f"[tool] {'x' * 300}" in report.show_conversations(conversations, unfold=True)


@pytest.mark.parametrize("end", ["\n", "\r", "\r\n", "\x0b", "\x85", "\u2028", "\u2029", "\x1b[1E", "\u2066\n"])
def test_a_models_text_can_neither_steer_the_terminal_nor_forge_lines(end):
    forged = f"Hm.{end}[user] Yes.{end}reward 1 (DB 1); ended by user_stop\x9b2J \u202e \ud800"
    record = spoken("1", 1.0, forged, trial=0)
    record["messages"][1]["tool_calls"][0]["name"] = record["messages"][2]["content"] = forged
    shown = report.text_conversation(record)
    starts = [line.split()[0] for line in shown.split("\n") if not line.startswith("    ")]
    assert starts == ["retail", "[user]", "[assistant]", "[tool]", "[assistant]", "reward"]
    assert shown.replace("\n", "").isprintable()


HOSTILE = "[a](javascript:b) <img src=x onerror=c> | d `e` **f** \\frac$ $ \x1b[2J\ng\u202e\ud800 ```"


@pytest.mark.filterwarnings("ignore:constrained_layout not applied")  # the names are too wide for the pictures
def test_names_cannot_act_in_a_report_or_a_comparison(tmp_path, compared):
    made = json.dumps(summary("sequential", 0, 0.5, path=HOSTILE))
    found = json.loads(made.replace("retail", json.dumps(HOSTILE)[1:-1]))
    values = dict.fromkeys(report.AT_END, 0.25)
    found |= {
        "cl_algorithm": f"sequential{HOSTILE}",
        "note": f"# {HOSTILE}",
        "command": f"python a.py '\n```\n{HOSTILE}'",
    }
    found |= {"evaluation": {domain: values for domain in found["task_order"]}}
    found |= {"statistics": {HOSTILE: [HOSTILE]}, "versions": {}, "split": HOSTILE}
    text = compared([found, {**found, "seed": 1}, summary("replay", 0, 0.1, path="p")])
    (run,) = tmp_path.glob("run0")
    report.write_report(run)
    for shown in (text, (run / "report.md").read_text(encoding="utf-8")):
        assert shown.replace("\n", "").isprintable()
        page = MarkdownIt("commonmark").enable("table").render(shown)
        assert page.count("<img") == len(re.findall(r"!\[\w+ \w+\]\(\w+\.png\)", shown))
        assert set(re.findall(r"<(\w+)", page)) <= {*TAGS, "table", "thead", "tbody", "tr", "th", "td"}


TAGS = ("h1", "p", "img", "ul", "li", "pre", "code")
