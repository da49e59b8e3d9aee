"""eval.py: evaluation folders whose trials are not repeated, settings, and results that tau2 reads."""

import importlib
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
import report
import rollout

# isort: split
from tau2.data_model.simulation import Results
from tau2.metrics.agent_metrics import compute_metrics


def tiny(output, **settings):
    usual = {"domains": ["airline", "telecom"], "max_tasks": 2, "max_turns": 3, "max_new_tokens": 8}
    return evaluation.Args("tiny", **{"model_dtype": "float32", "output": str(output), **usual, **settings})


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The embedded policy, untrained: two trials of each task, three conversations at a time."""
    folder = tmp_path_factory.mktemp("measured") / "results"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "AT_ONCE", 3)
        evaluation.run_evaluation(tiny(folder, num_trials=2))
    return folder


def key(record):
    return record["domain"], record["task_id"], record["trial"]


def test_an_evaluation_writes_each_trial_once(measured):
    tasks = {domain: oracle.load_tasks(domain, "test", 2) for domain in ("airline", "telecom")}
    wanted = {(domain, task.id, trial) for domain in tasks for task in tasks[domain] for trial in (0, 1)}
    assert sorted(map(key, evaluation.read_trials(measured))) == sorted(wanted)
    shown = report.show_conversations(measured, worst=100)
    assert shown.count("; ended by ") == 8 and "airline task" in shown and "telecom task" in shown


def test_an_evaluation_writes_metrics_and_table(measured):
    found = json.loads((measured / "metrics.json").read_text())
    assert {"model", "split", "user", "seed", "temperature", "tau2", "tau2 tasks"} <= set(found)
    by_domain = found["metrics"]
    for name in ("reward_mean", "pass_hat_2", "turns", "do_nothing_rate"):
        mean = (by_domain["airline"][name] + by_domain["telecom"][name]) / 2
        assert by_domain["overall"][name] == pytest.approx(mean)
    header = (measured / "table.md").read_text().splitlines()[0]
    assert header.replace("|", "").split() == ["airline", "telecom", "overall"]


def test_only_missing_trials_are_played(measured, tmp_path):
    shutil.copytree(measured, tmp_path, dirs_exist_ok=True)
    mine, others = tmp_path / "trials_0.jsonl", tmp_path / "trials_1.jsonl"
    records = report.read_jsonl(mine)
    lines = [json.dumps(record) + "\n" for record in records]
    mine.write_text("".join([*lines[:2], lines[5][:100]]))  # cut short by a kill
    others.write_text("".join([*lines[3:5], json.dumps({**records[2], "reward": None})]))  # another rank's, one invalid
    evaluation.run_evaluation(tiny(tmp_path, num_trials=2))
    assert sorted(map(key, report.read_jsonl(mine)[2:])) == sorted(key(records[k]) for k in (2, 5, 6, 7))
    after = {key(r): r for r in evaluation.read_trials(tmp_path)}
    assert len(after) == 8 and all(r["reward"] is not None for r in after.values())
    assert all(after[key(records[k])] == records[k] for k in (0, 1, 3, 4))


def metrics_of(folder):
    return json.loads((folder / "metrics.json").read_text())["metrics"]


def test_fewer_trials_of_the_same_settings_are_there_already(measured, monkeypatch):
    monkeypatch.setattr(rollout, "rollout", lambda *args, **settings: pytest.fail("a trial was played again"))
    everything = metrics_of(measured)
    evaluation.run_evaluation(tiny(measured, num_trials=1, domains=["airline"], max_tasks=1))
    assert metrics_of(measured)["overall"]["tasks"] == 1
    settings = json.loads((measured / "config.json").read_text())
    del settings["evaluation_type"]  # of a version that had no such setting
    (measured / "config.json").write_text(json.dumps(settings))
    evaluation.run_evaluation(tiny(measured, num_trials=2, pass_threshold=0.5))  # which changes no trial
    evaluation.run_evaluation(tiny(measured, num_trials=2))
    assert metrics_of(measured) == everything


def test_an_evaluation_is_of_its_type_and_threshold(tmp_path):
    settings = {"evaluation_type": "communicate", "pass_threshold": 0.5}
    evaluation.run_evaluation(tiny(tmp_path, max_turns=8, **settings))
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert {name: written[name] for name in settings} == settings
    found = written["metrics"]["airline"]
    floor, _ = oracle.do_nothing("airline", oracle.load_tasks("airline", "test", 2), evaluation_type="communicate")
    assert found["do_nothing_rate"] == floor and set(found["reward_parts"]) == {"COMMUNICATE"}


BAKERY = """
from tau2.domains.mock.environment import get_environment, get_tasks
from tau2.registry import registry

registry.register_domain(get_environment, "bakery")
registry.register_tasks(get_tasks, "bakery")
"""


def test_a_domain_of_ones_own_needs_one_import(tmp_path, monkeypatch, capsys):
    """As in CONTRIBUTING.md."""
    (tmp_path / "bakery.py").write_text(BAKERY)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("bakery")
    train, test = (oracle.load_tasks("bakery", split, train_split=0.5) for split in ("train", "test"))
    assert train and test and not {task.id for task in train} & {task.id for task in test}
    for task in train + test:
        oracle.score(oracle.demonstrate("bakery", task), verify=True)
    flags = f"--model_name_or_path tiny --model_dtype float32 --domains bakery airline --output {tmp_path / 'out'}"
    limits = "--split base --max_tasks 3 --max_turns 2 --max_new_tokens 8"
    monkeypatch.setattr(sys, "argv", ["eval.py", *f"{flags} {limits}".split()])
    evaluation.main()
    assert "bakery" in capsys.readouterr().out
    found = metrics_of(tmp_path / "out")
    floors = [found[domain]["do_nothing_rate"] for domain in ("bakery", "airline")]
    assert found["overall"]["do_nothing_rate"] == pytest.approx(sum(floors) / 2)


def test_a_checkpoint_is_evaluated_on_the_split_that_its_run_cut(tmp_path):
    folder = tmp_path / "checkpoints" / "step1"
    folder.mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps({"seed": 3, "train_split": 0.5, "evaluation_type": "env"}))
    args, settings, tasks = evaluation.complete(evaluation.Args(str(folder), domains=["mock"]))
    assert tasks == {"mock": oracle.load_tasks("mock", "test", None, 0.5, 3)}
    assert args.evaluation_type == settings["evaluation_type"] == "env"


def test_a_kill_between_two_conversations_loses_none(tmp_path, monkeypatch):
    score = evaluation.score_and_record

    def third_fails(*conversation):
        if len(evaluation.read_trials(tmp_path)) == 2:
            raise KeyboardInterrupt
        return score(*conversation)

    monkeypatch.setattr(evaluation, "score_and_record", third_fails)
    with pytest.raises(KeyboardInterrupt):
        evaluation.run_evaluation(tiny(tmp_path))
    assert len(evaluation.read_trials(tmp_path)) == 2


def test_too_many_invalid_conversations_stop_the_evaluation():
    records = [{"domain": "retail", "task_id": "7", "reward": reward, "error": "oops"} for reward in (1.0, None, None)]
    evaluation.stop_if_invalid(records[:2])
    with pytest.raises(evaluation.StopRun, match=r"2 of 3 conversations .* in retail task 7: oops"):
        evaluation.stop_if_invalid(records)


OTHERS = [("temperature", 0.7, 0.5), ("seed", 0, 1), ("split", "test", "train"), ("evaluation_type", "all", "env")]


@pytest.mark.parametrize("name, before, other", OTHERS)
def test_trials_with_other_settings_are_not_mixed(measured, name, before, other):
    with pytest.raises(ValueError, match=f"were made with {name} {before}, not {other}; choose another --output"):
        evaluation.run_evaluation(tiny(measured, **{name: other}))


WRONG = [
    ({"temperature": math.nan}, "temperature"),
    ({"num_trials": 0}, "num_trials"),
    ({"domains": []}, "domains"),
    ({"domains": ["mars"]}, "unknown domain 'mars'"),
    ({"split": "exam"}, "unknown split 'exam'"),
    ({"pass_threshold": 2.0}, "pass_threshold must be less than or equal to 1, got 2.0"),
    ({"evaluation_type": "magic"}, "evaluation_type must be 'all', 'env'"),
]


@pytest.mark.parametrize("wrong, message", WRONG)
def test_settings_that_cannot_work_are_named_before_anything_is_written(tmp_path, wrong, message):
    with pytest.raises(ValueError, match=message):
        evaluation.run_evaluation(tiny(tmp_path / "out", **wrong))
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line_on_stderr(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", "--model_name_or_path", "tiny", "--split", "exam"])
    with pytest.raises(SystemExit, match="2"):
        evaluation.main()
    assert capsys.readouterr().err.startswith("eval.py: unknown split 'exam' of airline; choose one of ")


@pytest.mark.parametrize("prefix", ["", "policy:"])
def test_an_earlier_checkpoint_is_not_taken_for_the_last(tmp_path, prefix):
    (tmp_path / "step1").mkdir()
    (tmp_path / "LAST").symlink_to("step1")
    assert evaluation.resolved(f"{prefix}{tmp_path}/LAST", prefix) == f"{prefix}{tmp_path.resolve()}/step1"
    assert evaluation.resolved("scripted", "policy:") == "scripted"


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="not empty and holds no evaluation"):
        evaluation.run_evaluation(tiny(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


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


def test_tau2_scores_the_results_the_same(tau2_files, tmp_path):
    command = [Path(sys.executable).with_name("tau2"), "evaluate-trajs", tau2_files, "-o", tmp_path]
    environment = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert shown.returncode == 0 and "All files processed successfully" in shown.stdout, shown.stdout + shown.stderr
    everything = set()
    for domain in ("airline", "telecom"):
        files = (tau2_files / f"{domain}.json", tmp_path / f"updated_{domain}.json")
        ours, theirs = map(Results.load, files)
        rewards = [s.reward_info.reward for s in ours.simulations]
        assert rewards == [s.reward_info.reward for s in theirs.simulations]
        everything.update(rewards)
        rest = {"domain": domain, "tool_accuracy": 0.0, "turns": 1, "truncated": False, "reward_parts": {}}
        records = [{"task_id": s.task_id, "reward": s.reward_info.reward, **rest} for s in ours.simulations]
        mine, tau2s = metrics.measure(records, domain, ours.tasks, 3), compute_metrics(theirs)
        found = {"reward_mean": tau2s.avg_reward, **{f"pass_hat_{k}": value for k, value in tau2s.pass_hat_ks.items()}}
        assert len(found) == 4 and {name: mine[name] for name in found} == pytest.approx(found)
    assert {0.0, 1.0} <= everything
