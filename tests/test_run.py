"""run.py: settings that are refused, a run's directory, logs and trackers."""

import importlib.util
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from law import ENV, SMALL, refused, run_script, small_run, steps_of

import policy
import run
import tracking
import train


def test_the_first_policys_log_probabilities_are_computed_in_some_steps(tiny):
    """In every INITIAL_EVERY-th; in all of them if they are also those of the reference policy."""
    batch = {"ids": torch.arange(8).view(2, 4), "attention_mask": torch.ones(2, 4), "mask": torch.ones(2, 4).bool()}
    for reference, always in (("domain", False), ("initial", True)):
        args = SimpleNamespace(kl_coef=0.1, kl_reference=reference, temperature=1.0, sampler_correction="none")
        weights = [policy.snapshot(tiny[0]) for _ in range(2)]
        names = {"args": args, "model": tiny[0], "initial": weights[0], "reference": weights[1]}
        for step in range(run.INITIAL_EVERY + 1):
            trainer = SimpleNamespace(**names, step=step, batches=[dict(batch)])
            run.add_logprobs(trainer)
            found = trainer.batches[0]
            assert "ref_logprobs" in found
            assert ("initial_logprobs" in found) == (always or step in (0, run.INITIAL_EVERY))


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--task_order airline railway", "railway"),
        ("--task_order airline airline", "once"),
        ("--eval_split validation", "validation"),
        ("--model_name_or_path /no/such/directory", "/no/such/directory"),
        ("--cl_algorithm magic", "magic"),
        ("--cl_algorithm nowhere.py:Magic", "nowhere.py"),
        ("--replay_strategy best", "best"),
        ("--buffer_policy best", "best"),
        ("--replay_kind rollouts", "rollouts"),
        ("--cl_algorithm adaptive_replay --replay_kind trajectories", "--replay_kind tasks"),
        ("--cl_algorithm replay --min_buffer_size 6 --replay_buffer_size 5", "min_buffer_size"),
        ("--clone_coef -1", "clone_coef"),
        ("--lr_decay 0", "lr_decay must be greater than 0, got 0.0"),
        ("--lr_decay 1.01", "lr_decay must be less than or equal to 1, got 1.01"),
        ("--cl_algorithm generative_replay --window 1", "window must be greater than or equal to 2, got 1"),
        ("--replay_weight 0", "replay_weight"),
        ("--ewc_lambda -1", "ewc_lambda must be greater than or equal to 0, got -1"),
        ("--ewc_lambda nan", "ewc_lambda must be a finite number, got nan"),
        ("--lwf_coef -0.1", "lwf_coef"),
        ("--cl_algorithm joint --ewc_lambda 1", "joint"),
        ("--cl_algorithm ewc --num_steps_per_task 0", "num_steps_per_task is 0"),
        ("--cl_algorithm ewc --task_order airline", "a domain that has ended"),
        ("--replay_ratio 1.0", "replay_ratio must be less than 1, got 1.0"),
        ("--replay_ratio -0.1", "replay_ratio"),
        ("--max_tasks_per_domain 0", "max_tasks_per_domain"),
        ("--eval_max_tasks 0", "eval_max_tasks"),
        ("--max_context -5", "max_context must be greater than or equal to 1, got -5"),
        ("--max_tasks_per_domain 1000", "1000"),
        ("--loss_type ppo", "ppo"),
        ("--kl_coef -1", "kl_coef"),
        ("--learning_rate 0", "learning_rate must be greater than 0, got 0.0"),
        ("--learning_rate nan", "learning_rate"),
        ("--user nobody", "nobody"),
        ("--model_dtype float8", "float8"),
        ("--max_turns 0", "max_turns"),
        ("--gamma 1.5", "gamma"),
        ("--epsilon_low nan", "epsilon_low"),
        ("--adaptation_rate -1", "adaptation_rate"),
        ("--task_order mock", "mock"),
        ("--resume nowhere", "nowhere"),
        ("--num_steps_per_task many", "many"),
        ("--no_such_flag 1", "no_such_flag"),
        ("--rollout_engine fast", "fast"),
        ("--attn_implementation flex_attention", "flex_attention"),
        ("--seed 9223372036854775808", "seed"),
        ("--lr_schedule step", "step"),
        ("--kl_reference first", "first"),
        ("--lora_rank -1", "lora_rank"),
        ("--attn_implementation none_such", "none_such"),
        ("--shard", "torchrun"),
        ("--max_context 20", "context of 20"),
        ("--max_context 100000", "100000"),
    ],
)
def test_bad_flags_are_named_before_anything_is_written(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--runs_dir", str(tmp_path), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert message.replace("_", "-") in shown.replace("_", "-") and "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


def test_bad_settings_in_code_are_refused_like_those_of_the_command_line():
    for settings in ({"learning_rate": 0}, {"loss_type": "ppo"}, {"no_such_flag": 1}, {"task_order": "airline"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            train.Args(**settings)


def test_a_run_directory_that_exists_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("kept")
    assert "exists" in refused(monkeypatch, capsys, *SMALL, "--runs_dir", str(tmp_path), "--run_name", "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["precious"]


def test_scalars_of_a_record_have_names_that_say_where_they_come_from():
    record = {"kind": "evaluation", "stage": "domain", "scores": {"airline": 0.5}, "details": {"airline": {"turns": 3}}}
    assert tracking.scalars({**record, "label": "x", "nothing": None}) == {
        "evaluation/domain/scores/airline": 0.5,
        "evaluation/domain/details/airline/turns": 3.0,
    }
    assert tracking.scalars({"kind": "step", "reward": 0.25}) == {"step/reward": 0.25}


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named(name, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = refused(monkeypatch, capsys, *SMALL, "--runs_dir", str(tmp_path / "runs"), "--tracker", name)
    assert f"needs the package {name}" in error and f"pip install {name}" in error
    assert not (tmp_path / "runs").exists()


def test_a_run_is_logged_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    small_run(tmp_path, "--run_name", "r", "--tracker", "tensorboard")
    logged = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    logged.Reload()
    found = [(event.step, event.value) for event in logged.Scalars("step/reward")]
    assert found == [(r["global_step"], pytest.approx(r["reward"])) for r in steps_of(tmp_path / "r")]
    assert "evaluation/domain/scores/airline" in logged.Tags()["scalars"]


def test_a_run_is_logged_to_wandb_without_a_network(tmp_path):
    pytest.importorskip("wandb")
    flags = [*SMALL, "--runs_dir", str(tmp_path), "--run_name", "r", "--tracker", "wandb"]
    shown = run_script("train.py", *flags, env={**ENV, "WANDB_MODE": "offline"})
    assert shown.returncode == 0, shown.stderr
    assert "wandb:" not in shown.stdout + shown.stderr and "sync" not in shown.stderr  # our lines only
    (written,) = (tmp_path / "r" / "wandb").glob("offline-run-*/run-r.wandb")
    assert b"evaluation/domain/scores/airline" in written.read_bytes()


def test_settings_are_saved_with_the_run_and_name_its_tasks(tmp_path):
    small_run(tmp_path, "--task_order", "airline", "--num_steps_per_task", "1", "--run_name", "r")
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config["run_name"] == "r" and config["kl_reference"] == "domain"
    assert len(config["train_tasks"]["airline"]) == len(config["eval_tasks"]["airline"]) == 2
