"""eval.py: metrics against hand-computed cases and tau2's own, and the comparison of runs."""

import csv
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from tau2.data_model.simulation import Results
from tau2.metrics.agent_metrics import compute_metrics
from tau2.metrics.agent_metrics import pass_hat_k as tau2_pass_hat_k
from tau2.registry import registry

import eval as evaluation
import grpo
import oracle
from eval import cl_metrics, interval, pass_hat_k


def test_pass_hat_k_is_tau2s_and_counts_subsets():
    for trials in range(1, 6):
        for successes in range(trials + 1):
            outcomes = [1] * successes + [0] * (trials - successes)
            for k in range(1, trials + 1):
                subsets = list(itertools.combinations(outcomes, k))
                assert pass_hat_k(successes, trials, k) == pytest.approx(np.mean([all(s) for s in subsets]))
                assert pass_hat_k(successes, trials, k) == pytest.approx(tau2_pass_hat_k(trials, successes, k))


def test_cl_metrics_by_hand():
    R = [[0.8, 0.2, 0.1], [0.9, 0.7, 0.1], [0.5, 0.3, 0.6]]
    metrics = cl_metrics(R, baseline=[0.1, 0.1, 0.2], joint=[0.9, 0.9, 0.9])
    assert metrics["average"] == pytest.approx((0.5 + 0.3 + 0.6) / 3)
    assert metrics["backward_transfer"] == pytest.approx(((0.5 - 0.8) + (0.3 - 0.7)) / 2)
    assert metrics["forward_transfer"] == pytest.approx(((0.2 - 0.1) + (0.1 - 0.2)) / 2)
    assert metrics["forgetting"] == pytest.approx(((0.9 - 0.5) + (0.7 - 0.3)) / 2)
    assert metrics["intransigence"] == pytest.approx(((0.9 - 0.8) + (0.9 - 0.7) + (0.9 - 0.6)) / 3)
    assert metrics["old_task_mean"] == pytest.approx(0.4)
    assert R[2] == [0.5, 0.3, 0.6]  # arguments are left alone


def test_forgetting_leaves_the_last_row_out_of_the_maximum():
    # With the last row in the maximum this would be 0, never negative.
    assert cl_metrics([[0.2, 0.0], [0.6, 0.5]])["forgetting"] == pytest.approx(-0.4)


def test_one_task_has_nothing_to_forget():
    assert cl_metrics([[0.7]])["forgetting"] == 0.0
    assert cl_metrics([[0.7]])["average"] == pytest.approx(0.7)


@pytest.mark.parametrize("R", [[[0.1, 0.2]], [], [0.1]])
def test_a_matrix_that_is_not_square_is_refused(R):
    with pytest.raises(ValueError, match="square"):
        cl_metrics(R)


def test_interval_is_students():
    mean, half = interval([0.1, 0.2, 0.6])
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(4.303 * np.std([0.1, 0.2, 0.6], ddof=1) / math.sqrt(3))
    assert math.isnan(interval([0.5])[1])


def summary(algorithm, seed, forgetting, minutes):
    return {
        "cl_algorithm": algorithm,
        "bytes_kept": 1500,
        "task_order": ["airline", "retail"],
        "R": [[0.8, 0.0], [0.8 - forgetting, 0.6]],
        "warm_start": {"airline": 0.5, "retail": 0.4},
        "metrics": cl_metrics([[0.8, 0.0], [0.8 - forgetting, 0.6]]),
        "minutes": minutes,
        "config": {"cl_algorithm": algorithm, "seed": seed, "run_name": f"{algorithm}{seed}", "replay_ratio": 0.2},
    }


def test_compare_groups_runs_over_seeds(tmp_path):
    runs = []
    for algorithm, forgetting, minutes in (("sequential", 0.6, 4.0), ("replay", 0.1, 5.0)):
        for seed in (0, 1, 2):
            run = tmp_path / f"{algorithm}{seed}"
            run.mkdir()
            (run / "summary.json").write_text(json.dumps(summary(algorithm, seed, forgetting, minutes)))
            runs.append(run)
    table = evaluation.compare(runs).splitlines()
    assert table[4] == "" and table[5].startswith("| less sequential's")
    assert table[2].startswith("| sequential | 3 | 0.60 ± 0.00 |")
    assert table[3].startswith("| replay | 3 | 0.10 ± 0.00 |")
    assert table[3].endswith("| +0.20 (retail) | 5.00 ± 0.00 | 1.25 | 1.5 |")


def test_compare_names_what_a_row_differs_in(tmp_path):
    runs = []
    for ratio in (0.2, 0.2, 0.5, 0.2):
        run = tmp_path / str(len(runs))
        run.mkdir()
        values = summary("replay" if len(runs) else "sequential", len(runs), 0.1, 1.0)
        values["config"] = {**values["config"], "replay_ratio": ratio}
        (run / "summary.json").write_text(json.dumps(values))
        runs.append(run)
    table = evaluation.compare(runs).splitlines()
    assert [line.split("|")[1].strip() for line in table[2:5]] == ["sequential", "replay", "replay, replay_ratio 0.5"]
    assert table[-1] == "Where not named: replay_ratio 0.2."


def written(tmp_path, rows):
    """Folders of finished runs; rows of (algorithm, seed, forgetting)."""
    runs = []
    for algorithm, seed, forgetting in rows:
        run = tmp_path / f"{algorithm}{seed}"
        run.mkdir()
        values = {**summary(algorithm, seed, forgetting, 2.0), "baseline": {"airline": 0.0, "retail": 0.1}}
        (run / "summary.json").write_text(json.dumps(values))
        runs.append(run)
    return runs


def test_differences_from_sequential_are_paired_by_seed(tmp_path):
    seeds = {"sequential": {0: 0.5, 1: 0.6, 2: 0.7, 3: 0.1}, "replay": {2: 0.3, 0: 0.2, 1: 0.1}}
    runs = written(tmp_path, [(name, s, f) for name, found in seeds.items() for s, f in found.items()])
    lines = evaluation.compare(runs).splitlines()
    assert lines[-3].startswith("| less sequential's, by seed |")
    differences = [0.2 - 0.5, 0.1 - 0.6, 0.3 - 0.7]
    mean, half = interval(differences)
    average = [-d / 2 for d in differences]  # of two domains, one forgets
    assert lines[-1] == f"| replay | 3 | {mean:+.2f} ± {half:.2f} | {np.mean(average):+.2f} ± {half / 2:.2f} |"


def test_a_comparison_is_written_as_table_csv_and_pictures(tmp_path, recwarn):
    rows = [(name, seed, 0.1 * k) for k, name in enumerate(["sequential", *"abcdefg"]) for seed in (0, 1)]
    table = evaluation.compare(written(tmp_path, rows), tmp_path / "out")
    assert (tmp_path / "out" / "comparison.md").read_text() == table + "\n"
    with open(tmp_path / "out" / "comparison.csv") as file:
        found = list(csv.DictReader(file))
    assert [(r["algorithm"], int(r["seed"])) for r in found] == [(name, seed) for name, seed, _ in rows]
    for r, (_, _, forgetting) in zip(found, rows, strict=True):
        assert float(r["forgetting"]) == pytest.approx(forgetting)
        assert (
            float(r["airline after retail"]) == pytest.approx(0.8 - forgetting) and r["retail after airline"] == "0.0"
        )
    for name in ("comparison.png", "learning_curves.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
    assert not [w for w in recwarn if "layout" in str(w.message)]


def test_runs_of_an_earlier_version_are_not_named_by_what_they_lack(tmp_path):
    runs = written(tmp_path, [("sequential", 0, 0.5), ("replay", 0, 0.1), ("replay", 1, 0.1)])
    path = runs[2] / "summary.json"
    values = json.loads(path.read_text())
    values["config"]["new_flag"] = 3
    path.write_text(json.dumps(values))
    lines = evaluation.compare(runs).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == ["sequential", "replay", "replay, new_flag 3"]


def test_compare_counts_no_run_twice_and_names_damaged_ones(tmp_path):
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary("replay", 3, 0.1, 1.0)))
    with pytest.raises(ValueError, match="the seed 3 of another run"):
        evaluation.compare([tmp_path, str(tmp_path)])
    for spoilt in ("", "[]", "{}", json.dumps({**summary("replay", 3, 0.1, 1.0), "R": None}).replace('"R"', '"S"')):
        path.write_text(spoilt)
        with pytest.raises(ValueError, match="damaged"):
            evaluation.compare([tmp_path])


def test_compare_names_what_is_not_a_run(tmp_path):
    with pytest.raises(ValueError, match="not a finished run"):
        evaluation.compare([tmp_path])


# -------------------------------------------------------------------------------------------- evaluation


def test_bootstrap_is_the_percentile_interval_of_the_mean():
    values = np.random.default_rng(0).normal(0.4, 0.2, 200)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=10_000, method="percentile", rng=1).confidence_interval
    assert evaluation.bootstrap(values) == pytest.approx(tuple(theirs), abs=2e-3)
    normal = np.mean(values) + np.array([-1.96, 1.96]) * np.std(values) / math.sqrt(200)
    assert evaluation.bootstrap(values) == pytest.approx(tuple(normal), abs=2e-3)
    assert evaluation.bootstrap([0.5]) == (0.5, 0.5) and evaluation.bootstrap([]) == (0.0, 0.0)


def test_bootstrap_of_several_domains_gives_each_the_same_weight():
    low, high = evaluation.bootstrap([0.0] * 90, [1.0] * 10)
    assert (low, high) == (0.5, 0.5)
    values = np.random.default_rng(0).normal(0.5, 0.2, 100)
    low, high = evaluation.bootstrap(values, values)  # the mean of two independent means
    alone = np.subtract(*evaluation.bootstrap(values)[::-1])
    assert high - low == pytest.approx(alone / math.sqrt(2), rel=0.05)


def record(task, reward, **other):
    usual = {"tool_accuracy": 0.5, "turns": 4, "truncated": False, "reward_parts": {"DB": reward, "COMMUNICATE": 1.0}}
    return {"domain": "airline", "task_id": task.id, "reward": reward, **usual, **other}


def test_metrics_of_records_by_hand():
    tasks = oracle.load_tasks("airline", "test")[:3]
    records = [record(tasks[0], r) for r in (1.0, 0.0, 1.0)]
    records += [
        record(tasks[1], 0.0, tool_accuracy=None),
        record(tasks[1], 1.0, truncated=True, reward_parts={"DB": 0.5}),
    ]
    records += [record(tasks[2], None, turns=10, tool_accuracy=0.0, reward_parts={})]  # invalid
    metrics = evaluation.measure(records, "airline", tasks, 3)
    assert metrics["reward_mean"] == metrics["pass_rate"] == pytest.approx(3 / 5)
    assert metrics["pass_hat_1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert metrics["pass_hat_2"] == pytest.approx((1 / 3 + 0) / 2)
    assert metrics["pass_hat_3"] == 0.0
    assert metrics["tool_accuracy"] == 0.5
    assert metrics["turns"] == 5 and metrics["truncated"] == pytest.approx(1 / 6) and metrics["invalid"] == 1
    assert metrics["reward_parts"] == {"COMMUNICATE": 1.0, "DB": pytest.approx((2 + 0 + 0.5) / 5)}
    assert metrics["tasks"] == 3 and metrics["do_nothing_rate"] == oracle.do_nothing_reward("airline", tasks)
    low, high = evaluation.bootstrap([2 / 3, 1 / 2])
    assert (metrics["reward_low"], metrics["reward_high"]) == (low, high)


def test_parts_of_doing_nothing_multiply_to_its_reward():
    for domain in oracle.DOMAINS:
        for task in oracle.load_tasks(domain, "test")[:5]:
            parts = oracle.do_nothing_parts(domain, [task])
            assert set(parts) == {part.value for part in oracle.graded(task).evaluation_criteria.reward_basis}
            assert math.prod(parts.values()) == oracle.do_nothing_reward(domain, [task])


def tiny(output, **settings):
    usual = {"domains": ["airline", "telecom"], "max_tasks": 2, "max_turns": 3, "max_new_tokens": 8}
    return evaluation.Args("tiny", model_dtype="float32", output=str(output), **{**usual, **settings})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The embedded policy, untrained, measured twice a task, three conversations at a time."""
    folder = tmp_path_factory.mktemp("measured") / "results"
    evaluation.run_evaluation(tiny(folder, num_trials=2, at_once=3))
    return folder


def test_an_evaluation_writes_trials_metrics_and_table(measured):
    trials = evaluation.read_trials(measured)
    keys = {(r["domain"], r["task_id"], r["trial"]) for r in trials}
    tasks = {domain: oracle.load_tasks(domain, "test", 2) for domain in ("airline", "telecom")}
    assert keys == {(d, t.id, trial) for d, found in tasks.items() for t in found for trial in (0, 1)}
    assert [path.name for path in sorted(measured.glob("trials*"))] == ["trials.jsonl"]
    found = json.loads((measured / "metrics.json").read_text())
    assert {"model", "split", "user", "seed", "temperature", "tau2", "tau2 tasks"} <= set(found)
    metrics = found["metrics"]
    for name in ("reward_mean", "pass_hat_2", "turns", "do_nothing_rate"):
        assert metrics["overall"][name] == pytest.approx((metrics["airline"][name] + metrics["telecom"][name]) / 2)
    assert metrics["overall"]["tasks"] == 4
    table = (measured / "table.md").read_text().splitlines()
    assert [cell.strip() for cell in table[0].split("|")[1:-1]] == ["", "airline", "telecom", "overall"]
    assert len({len(line) for line in table}) == 1  # aligned


def test_trials_that_are_done_are_not_repeated(measured, tmp_path, monkeypatch):
    folder = tmp_path / "results"
    shutil.copytree(measured, folder)
    lines = (folder / "trials.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 8
    spoilt = json.loads(lines[2])
    spoilt["reward"] = None  # an invalid one is played again
    (folder / "trials.jsonl").write_text("".join([*lines[:2], json.dumps(spoilt) + "\n"]))
    (folder / "trials_1.jsonl").write_text("".join(lines[3:5]) + lines[5][:100])  # another rank's, cut short by a kill
    played = []
    rollout = grpo.rollout
    monkeypatch.setattr(
        grpo, "rollout", lambda m, t, episodes, **k: played.extend(episodes) or rollout(m, t, episodes, **k)
    )
    evaluation.run_evaluation(tiny(folder, num_trials=2))
    missing = [json.loads(lines[k]) for k in (2, 5, 6, 7)]
    assert sorted(e.task.id for e in played) == sorted(r["task_id"] for r in missing)
    kept = {(r["domain"], r["task_id"], r["trial"]): r for r in evaluation.read_trials(folder)}
    assert len(kept) == 8
    for line in [*lines[:2], *lines[3:5]]:
        r = json.loads(line)
        assert kept[r["domain"], r["task_id"], r["trial"]] == r
    played.clear()
    evaluation.run_evaluation(tiny(folder, num_trials=2))
    evaluation.run_evaluation(tiny(folder, num_trials=1, domains=["airline"], max_tasks=1))
    assert played == []  # less of the same is there, too
    assert json.loads((folder / "metrics.json").read_text())["metrics"]["overall"]["tasks"] == 1


def test_a_kill_between_two_conversations_loses_none(tmp_path, monkeypatch):
    score = evaluation.score_and_record

    def third_fails(episode, trajectory):
        if len(evaluation.read_trials(tmp_path)) == 2:
            raise KeyboardInterrupt
        return score(episode, trajectory)

    monkeypatch.setattr(evaluation, "score_and_record", third_fails)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run_evaluation(tiny(tmp_path))
    assert len(evaluation.read_trials(tmp_path)) == 2


@pytest.mark.parametrize(
    "other, message",
    [
        ({"temperature": 0.5}, "made with temperature 0.7, not 0.5; choose another --output"),
        ({"seed": 1}, "made with seed 0, not 1"),
        ({"split": "train"}, "made with split test, not train"),
    ],
)
def test_trials_made_otherwise_are_not_mixed(measured, other, message):
    with pytest.raises(ValueError, match=message):
        evaluation.run_evaluation(tiny(measured, **other))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"temperature": math.nan}, "temperature must be 0 or more, got nan"),
        ({"user_temperature": -1.0}, "user_temperature must be 0 or more, got -1.0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_turns": 0}, "max_turns must be at least 1, got 0"),
        ({"num_trials": 0}, "num_trials must be at least 1, got 0"),
        ({"at_once": 0}, "at_once must be at least 1, got 0"),
        ({"domains": ["airline", "airline"]}, "domains must name each domain once"),
        ({"domains": ["mars"]}, "unknown domain 'mars'"),
        ({"split": "exam"}, "unknown split 'exam'"),
    ],
)
def test_settings_that_cannot_work_are_named_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        evaluation.run_evaluation(tiny(tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()


def test_trials_of_an_earlier_checkpoint_are_not_taken_for_those_of_the_last(tmp_path):
    model, tokenizer = grpo.load_policy("tiny", "float32", "cpu")
    for step in (1, 2):
        grpo.save_policy(model, tokenizer, tmp_path / f"step{step}", grpo.gathered_weights(model))
    last = tmp_path / "LAST"
    last.symlink_to("step1")
    args = tiny(tmp_path / "out", domains=["telecom"], max_tasks=1)
    args.model_name_or_path = str(last)
    evaluation.run_evaluation(args)
    last.unlink()
    last.symlink_to("step2")
    with pytest.raises(ValueError, match=r"made with model .*step1, not .*step2; choose another --output"):
        evaluation.run_evaluation(args)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and holds no evaluation"):
        evaluation.run_evaluation(tiny(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_tau2_reads_the_results_and_scores_them_the_same(measured, tmp_path):
    """With its own command line: metrics and rewards computed anew from the conversations."""
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    folder = tmp_path / "tau2"
    folder.mkdir()
    for domain in ("airline", "telecom"):  # gold conversations beside the policy's
        results = Results.load(measured / "tau2" / f"{domain}.json")
        for task in results.tasks:
            episode = oracle.demonstrate(domain, task)
            results.simulations.append(oracle.simulation(episode, oracle.score(episode), 2))
        results.info.num_trials = 3
        results.save(folder / f"{domain}.json")
    tau2 = str(Path(sys.executable).with_name("tau2"))
    command = [tau2, "evaluate-trajs", str(folder), "-o", str(tmp_path / "scored")]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert shown.returncode == 0 and "All files processed successfully" in shown.stdout, shown.stdout
    rewards = []
    for domain in ("airline", "telecom"):
        ours = Results.load(folder / f"{domain}.json")
        theirs = Results.load(tmp_path / "scored" / f"updated_{domain}.json")
        rewards += [s.reward_info.reward for s in ours.simulations]
        assert rewards[-len(ours.simulations) :] == [s.reward_info.reward for s in theirs.simulations]
        records = [{"task_id": s.task_id, "reward": s.reward_info.reward} for s in ours.simulations]
        rest = {"tool_accuracy": 0.0, "turns": 1, "truncated": False, "reward_parts": {}}
        mine = evaluation.measure([{**r, **rest} for r in records], domain, ours.tasks, 3)
        metrics = compute_metrics(theirs)
        assert mine["reward_mean"] == pytest.approx(metrics.avg_reward)
        assert {k: mine[f"pass_hat_{k}"] for k in (1, 2, 3)} == pytest.approx(metrics.pass_hat_ks)
    assert 1.0 in rewards and 0.0 in rewards
    command = [tau2, "view", "--file", str(folder / "telecom.json")]
    leave = "6" if "banking_knowledge" in registry.get_domains() else "5"  # tau2 1.0 has one item more
    answers = f"1\n1\n3\n1\n\n{leave}\n"  # select the only file, view the first conversation, no note, exit
    shown = subprocess.run(command, env=environment, input=answers, capture_output=True, text=True, timeout=100)
    assert shown.returncode == 0 and "Task Details" in shown.stdout, shown.stdout + shown.stderr
    assert "Reward" in shown.stdout and "Messages" in shown.stdout


# ------------------------------------------------------------------------------------------ conversations


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


def test_conversations_are_shown_worst_first(tmp_path):
    rows = [spoken("1", 1.0, global_step=0), spoken("2", 0.0, global_step=1), spoken("2", 0.0, "Later.", global_step=2)]
    rows += [spoken("3", 0.5, global_step=3), spoken("4", None, global_step=4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "trajectories.jsonl").write_text(text + text[:50])  # cut short by a kill
    shown = evaluation.show_conversations(tmp_path, worst=3)
    assert [line for line in shown.splitlines() if line.startswith("retail")] == [
        "retail task 2, step 2",
        "retail task 2, step 1",
        "retail task 3, step 3",
    ]
    first = shown.split("\n\n")[0].splitlines()
    assert first[1] == "[user] My lamp is broken."
    assert first[2].startswith('[assistant] get_user({"user_id": "uuu') and first[2].endswith("... (215 characters))")
    assert first[3] == f"[tool] {'x' * 100} ... (300 characters)"
    assert first[4] == "[assistant] Later."
    assert first[5] == "reward 0 (DB 1, COMMUNICATE 0); ended by user_stop; gold actions taken: 0.50"
    assert f"[tool] {'x' * 300}" in evaluation.show_conversations(tmp_path, unfold=True)
    assert evaluation.show_conversations(tmp_path, task="3").count("retail task") == 1
    with pytest.raises(ValueError, match=r"no conversation of task '9' in .*; there are 1, 2, 3"):
        evaluation.show_conversations(tmp_path, task="9")
    with pytest.raises(ValueError, match="worst must be at least 1, got 0"):
        evaluation.show_conversations(tmp_path, worst=0)
    with pytest.raises(ValueError, match="has no conversations"):
        evaluation.show_conversations(tmp_path / "nothing")


def test_what_a_model_wrote_cannot_steer_the_terminal():
    shown = evaluation.text_conversation(spoken("1", 1.0, "\x1b[2J\x9b2J\x07 wiped \ud800", trial=0))
    assert "wiped" in shown and not any((ord(c) < 32 and c != "\n") or 0x7F <= ord(c) < 0xA0 for c in shown)
    shown.encode()
    assert "\033[32mreward 1" in evaluation.text_conversation(spoken("1", 1.0, trial=0), colour=True)


def test_trials_of_an_evaluation_are_shown(measured):
    shown = evaluation.show_conversations(measured, worst=100)
    assert shown.count("; ended by ") == 8 and "airline task" in shown and "telecom task" in shown


def test_the_report_says_what_was_forgotten_and_when():
    order = ["airline", "retail", "telecom"]
    R = [[0.6, 0.0, 0.0], [0.7, 0.5, 0.0], [0.1, 0.5, 0.4]]
    assert evaluation.text_forgetting({"task_order": order, "stages": order, "R": R}) == [
        "- airline: 0.70 after retail, 0.10 at the end; most was lost while training telecom (0.60)",
        "- retail: 0.50 after retail, 0.50 at the end",
    ]
    alone = {"task_order": ["airline"], "stages": ["airline"], "R": [[1.0]]}
    assert evaluation.text_forgetting(alone) == ["- there was one domain only"]


# ------------------------------------------------------------------------------------------- learning curves


def curve_records(rewards, partial=False):
    """metrics.jsonl of a run on two domains, of two steps each; `rewards` are those of the four steps."""

    def evaluated(step, stage, scores):
        details = {
            d: {"reward_mean": score, "pass_rate": score / 2 if partial else score} for d, score in scores.items()
        }
        return {"kind": "evaluation", "stage": stage, "global_step": step, "scores": scores, "details": details}

    records = [evaluated(0, "baseline", {"airline": 0.0, "retail": 0.0})]
    for step, reward in enumerate(rewards, 1):
        domain = "airline" if step < 3 else "retail"
        played = {domain: reward} if step != 4 else {domain: reward, "airline": 0.5}  # replayed
        halves = {d: r / 2 if partial else r for d, r in played.items()}
        records.append({"kind": "step", "global_step": step, "reward_by_domain": played, "pass_rate_by_domain": halves})
        if step % 2 == 0:
            records.append(evaluated(step, "domain", {"airline": rewards[1], "retail": reward}))
    return records


CURVES = {"task_order": ["airline", "retail"], "stages": ["airline", "retail"]}


def test_a_rollout_curve_is_a_mean_of_three_steps():
    records = curve_records([0.0, 1.0, 0.5, 0.25], partial=True)
    assert evaluation.rollout_curve(records, "airline", "reward") == {1: 0.0, 2: 0.5, 4: 0.5}
    assert evaluation.rollout_curve(records, "retail", "pass rate") == {3: 0.25, 4: 0.1875}


def test_curves_over_seeds_are_means_with_intervals():
    runs = [(curve_records(rewards), CURVES) for rewards in ([0.0, 1.0, 0.5, 0.3], [0.4, 0.6, 0.1, 0.5])]
    runs[1][0][:] = [r for r in runs[1][0] if r["global_step"] != 3]  # one seed did not play retail there
    plt = evaluation._pyplot()
    _, axes = plt.subplots()
    evaluation.draw_curves(axes, runs, "reward")
    lines = [line for line in axes.lines if line.get_linestyle() in ("-", "--") and len(line.get_xdata())]
    shown = {tuple(np.asarray(line.get_xdata()).tolist()): np.asarray(line.get_ydata()).tolist() for line in lines}
    assert shown[1, 2] == pytest.approx([0.2, 0.5])  # means over seeds of means over steps
    assert (3,) not in shown  # of one seed there is no interval
    band = next(c for c in axes.collections if len(c.get_paths()) and len(c.get_paths()[0].vertices) > 3)
    half = 12.706 * np.std([0.0, 0.4], ddof=1) / np.sqrt(2)
    assert band.get_paths()[0].vertices[:, 1].min() == pytest.approx(0.2 - half, rel=1e-3)
    plt.close("all")


@pytest.mark.parametrize("partial, panels", [(False, 1), (True, 2)])
def test_the_pass_rate_has_a_panel_where_it_is_another(partial, panels, tmp_path, monkeypatch):
    plt, made = evaluation._pyplot(), []
    real = plt.subplots
    monkeypatch.setattr(plt, "subplots", lambda *args, **kwargs: made.append(real(*args, **kwargs)) or made[-1])
    path = tmp_path / "learning_curves.png"
    evaluation.plot_learning_curves(curve_records([0.0, 1.0, 0.5, 0.25], partial), CURVES, path)
    assert made[0][1].size == panels and path.stat().st_size > 10_000
