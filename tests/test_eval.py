"""eval.py: evaluation folders whose trials are not repeated, settings, and results that tau2 reads."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import metrics
import oracle
import policy
import report
import rollout

# isort: split
from tau2.data_model.simulation import Results
from tau2.metrics.agent_metrics import compute_metrics
from tau2.registry import registry


def tiny(output, **settings):
    usual = {"domains": ["airline", "telecom"], "max_tasks": 2, "max_turns": 3, "max_new_tokens": 8}
    return evaluation.Args("tiny", model_dtype="float32", output=str(output), **{**usual, **settings})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The embedded policy, untrained: two trials of each task, three conversations at a time."""
    folder = tmp_path_factory.mktemp("measured") / "results"
    evaluation.run_evaluation(tiny(folder, num_trials=2, at_once=3))
    return folder


@pytest.fixture
def played(monkeypatch):
    """Gets every episode that is played."""
    found, real = [], rollout.rollout

    def spy(model, tokenizer, episodes, **settings):
        found.extend(episodes)
        return real(model, tokenizer, episodes, **settings)

    monkeypatch.setattr(rollout, "rollout", spy)
    return found


def key(record):
    return record["domain"], record["task_id"], record["trial"]


def test_an_evaluation_writes_each_trial_once(measured):
    tasks = {domain: oracle.load_tasks(domain, "test", 2) for domain in ("airline", "telecom")}
    wanted = {(domain, task.id, trial) for domain in tasks for task in tasks[domain] for trial in (0, 1)}
    assert sorted(map(key, evaluation.read_trials(measured))) == sorted(wanted)
    assert [path.name for path in sorted(measured.glob("trials*"))] == ["trials.jsonl"]


def test_an_evaluation_writes_metrics_and_table(measured):
    found = json.loads((measured / "metrics.json").read_text())
    assert {"model", "split", "user", "seed", "temperature", "tau2", "tau2 tasks"} <= set(found)
    by_domain = found["metrics"]
    for name in ("reward_mean", "pass_hat_2", "turns", "do_nothing_rate"):
        mean = (by_domain["airline"][name] + by_domain["telecom"][name]) / 2
        assert by_domain["overall"][name] == pytest.approx(mean)
    table = [line.split("|")[1:-1] for line in (measured / "table.md").read_text().splitlines()]
    assert [cell.strip() for cell in table[0]] == ["", "airline", "telecom", "overall"]
    assert {len("".join(row)) for row in table} == {len("".join(table[0]))}  # aligned


def test_trials_of_an_evaluation_are_shown(measured):
    shown = report.show_conversations(measured, worst=100)
    assert shown.count("; ended by ") == 8 and "airline task" in shown and "telecom task" in shown


def test_only_missing_trials_are_played(measured, tmp_path, played):
    folder = tmp_path / "results"
    shutil.copytree(measured, folder)
    lines = (folder / "trials.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 8
    invalid = json.dumps({**json.loads(lines[2]), "reward": None}) + "\n"  # played again
    (folder / "trials.jsonl").write_text("".join([*lines[:2], invalid]))
    (folder / "trials_1.jsonl").write_text("".join(lines[3:5]) + lines[5][:100])  # another rank's, cut short by a kill
    evaluation.run_evaluation(tiny(folder, num_trials=2))
    missing = [json.loads(lines[k]) for k in (2, 5, 6, 7)]
    assert sorted(e.task.id for e in played) == sorted(r["task_id"] for r in missing)
    after = {key(r): r for r in evaluation.read_trials(folder)}
    assert len(after) == 8
    for line in [*lines[:2], *lines[3:5]]:
        assert after[key(json.loads(line))] == json.loads(line)


def test_fewer_trials_of_the_same_settings_are_there_already(measured, played):
    everything = json.loads((measured / "metrics.json").read_text())["metrics"]
    evaluation.run_evaluation(tiny(measured, num_trials=1, domains=["airline"], max_tasks=1))
    assert json.loads((measured / "metrics.json").read_text())["metrics"]["overall"]["tasks"] == 1
    evaluation.run_evaluation(tiny(measured, num_trials=2))
    assert json.loads((measured / "metrics.json").read_text())["metrics"] == everything
    assert played == []


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


def test_too_many_invalid_conversations_stop_the_evaluation():
    records = [{"domain": "retail", "task_id": "7", "reward": reward, "error": "oops"} for reward in (1.0, None, None)]
    evaluation.stop_if_invalid(records[:2])
    with pytest.raises(evaluation.StopRun, match=r"2 of 3 conversations .* in retail task 7: oops"):
        evaluation.stop_if_invalid(records)


OTHER = [
    ({"temperature": 0.5}, "temperature 0.7, not 0.5"),
    ({"seed": 1}, "seed 0, not 1"),
    ({"split": "train"}, "split"),
]


@pytest.mark.parametrize("other, message", OTHER)
def test_trials_with_other_settings_are_not_mixed(measured, other, message):
    with pytest.raises(ValueError, match=f"were made with {message}.*; choose another --output"):
        evaluation.run_evaluation(tiny(measured, **other))


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"temperature": math.nan}, "temperature"),
        ({"user_temperature": -1.0}, "user_temperature"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_trials": 0}, "num_trials"),
        ({"domains": []}, "domains"),
        ({"domains": ["airline", "airline"]}, "domains must name each domain once"),
        ({"domains": ["mars"]}, "unknown domain 'mars'"),
        ({"split": "exam"}, "unknown split 'exam'"),
        ({"user": "nobody"}, "unknown user 'nobody'"),
    ],
)
def test_settings_that_cannot_work_are_named_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        evaluation.run_evaluation(tiny(tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_on_stderr(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model_name_or_path", "tiny", "--split", "exam"])
    with pytest.raises(SystemExit) as stop:
        evaluation.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("eval.py: unknown split 'exam' of airline; choose one of ")


def test_trials_of_an_earlier_checkpoint_are_not_taken_for_those_of_the_last(tmp_path):
    model, tokenizer = policy.load_policy("tiny", "float32", "cpu")
    for step in (1, 2):
        policy.save_policy(model, tokenizer, tmp_path / f"step{step}")
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


# ---------------------------------------------------------------------------------------------- tau2's command line


@pytest.fixture(scope="module")
def tau2_files(measured):
    """A folder with tau2's results: the policy's conversations, and a gold one of each task."""
    folder = measured.parent / "tau2"
    folder.mkdir()
    for domain in ("airline", "telecom"):
        results = Results.load(measured / "tau2" / f"{domain}.json")
        for task in results.tasks:
            episode = oracle.demonstrate(domain, task)
            results.simulations.append(oracle.simulation(episode, oracle.score(episode), 2))
        results.info.num_trials = 3
        results.save(folder / f"{domain}.json")
    return folder


def tau2(*arguments, answers=None):
    command = [str(Path(sys.executable).with_name("tau2")), *map(str, arguments)]
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    shown = subprocess.run(command, env=environment, input=answers, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    return shown.stdout


def test_tau2_scores_the_results_the_same(tau2_files, tmp_path):
    assert "All files processed successfully" in tau2("evaluate-trajs", tau2_files, "-o", tmp_path)
    everything = []
    for domain in ("airline", "telecom"):
        ours = Results.load(tau2_files / f"{domain}.json")
        theirs = Results.load(tmp_path / f"updated_{domain}.json")
        rewards = [s.reward_info.reward for s in ours.simulations]
        assert rewards == [s.reward_info.reward for s in theirs.simulations]
        everything += rewards
        rest = {"domain": domain, "tool_accuracy": 0.0, "turns": 1, "truncated": False, "reward_parts": {}}
        records = [{"task_id": s.task_id, "reward": s.reward_info.reward, **rest} for s in ours.simulations]
        mine, tau2s = metrics.measure(records, domain, ours.tasks, 3), compute_metrics(theirs)
        assert mine["reward_mean"] == pytest.approx(tau2s.avg_reward)
        assert {k: mine[f"pass_hat_{k}"] for k in (1, 2, 3)} == pytest.approx(tau2s.pass_hat_ks)
    assert {0.0, 1.0} <= set(everything)


def test_tau2_shows_the_results(tau2_files):
    leave = "6" if "banking_knowledge" in registry.get_domains() else "5"  # tau2 1.0 has one item more
    answers = f"1\n1\n3\n1\n\n{leave}\n"  # select the only file, view the first conversation, no note, exit
    shown = tau2("view", "--file", tau2_files / "telecom.json", answers=answers)
    assert all(word in shown for word in ("Task Details", "Reward", "Messages"))
