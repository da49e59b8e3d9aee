"""checkpoint.py: stopped, killed, damaged and resumed runs."""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from law import (
    ENV,
    ROOT,
    SMALL,
    TWO_RANKS,
    assert_equal_runs,
    refused,
    run_main,
    run_script,
    small_run,
    steps_of,
    stopper,
)
from safetensors.torch import load_file

import checkpoint
import eval as evaluation
import policy
import report
import train
from checkpoint import Interrupted
from experiments import kills
from train import parse_args


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """(folder, flags) of a run to compare stopped ones with."""
    folder = tmp_path_factory.mktemp("never_stopped")
    flags = [*SMALL, *stopper(folder)]
    train.train(parse_args([*flags, "--runs_dir", str(folder), "--run_name", "whole"]))
    return folder, flags


def stopped_run(tmp_path, monkeypatch, *flags, step=2):
    monkeypatch.setenv("STOP_AT", str(step))
    with pytest.raises(Interrupted):
        small_run(tmp_path, *flags, "--run_name", "stopped")
    return tmp_path / "stopped"


def resume_flags(folder):
    return ["--resume", str(folder), "--cl_algorithm", json.loads((folder / "config.json").read_text())["cl_algorithm"]]


def resume(folder):
    return train.train(parse_args(resume_flags(folder)))


@pytest.mark.parametrize("number, step, code", [(signal.SIGINT, 1, 130), (signal.SIGTERM, 2, 143)])
def test_a_stopped_run_continues_as_if_it_had_not_been(number, step, code, never_stopped, tmp_path):
    folder, flags = never_stopped
    flags = [*flags, "--runs_dir", str(tmp_path), "--run_name", "stopped"]
    env = {"STOP_WITH": str(int(number)), "STOP_AT": str(step)}
    [(found, _, shown)] = run_main(tmp_path / "shown", *flags, env=env)
    assert found == code and "saved; continue with --resume" in shown and "Traceback" not in shown
    assert not (tmp_path / "stopped" / "summary.json").exists()
    resume(tmp_path / "stopped")
    assert_equal_runs(folder / "whole", tmp_path / "stopped")


def test_a_signal_in_an_evaluation_stops_it_at_once_and_loses_nothing(never_stopped, tmp_path, monkeypatch):
    folder, flags = never_stopped
    ended, leave = [], checkpoint.StopSignal.leave_evaluation

    def interrupt(self, record, episode):
        ended.append(record)
        if len(ended) == 11:  # 4 conversations of the baseline and 2 of the warm start precede the first domain's 4
            os.kill(os.getpid(), signal.SIGTERM)
        leave(self, record, episode)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.StopSignal, "leave_evaluation", interrupt)
        with pytest.raises(Interrupted):
            train.train(parse_args([*flags, "--runs_dir", str(tmp_path), "--run_name", "stopped"]))
    assert len(ended) == 11
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # handled as before
    resume(tmp_path / "stopped")
    assert_equal_runs(folder / "whole", tmp_path / "stopped")


EARLY = [(moment, 1) for moment in kills.MOMENTS if moment.startswith(("between", "inside", "before"))]
ENDS = [("while config.json is written", 1), ("before the new link replaces LAST", 14)]  # nothing is left to save then


@pytest.mark.parametrize("name, moments", [("replay of conversations", EARLY[::2]), ("generative_replay", ENDS)])
def test_a_run_that_is_killed_while_it_writes_ends_as_if_it_had_not_been(name, moments, tmp_path):
    kills.start(tmp_path / "whole", kills.flags_of(name, tmp_path / "whole"))
    assert kills.kill_and_resume(name, tmp_path / "killed", moments) == [moment for moment, _ in moments]
    assert kills.differences(tmp_path / "killed", kills.outcome(tmp_path / "whole")) == []


def test_loaded_tensors_lie_at_addresses_like_those_of_fresh_ones(never_stopped):
    """On some processors a sum depends on them."""
    last = never_stopped[0] / "whole" / "checkpoints" / "LAST"
    model, _ = policy.load_policy(last, "float32", "cpu")
    moments = load_file(last / "training" / "optimizer.safetensors").values()
    tensors = [*model.parameters(), *(policy.placed_like(tensor, tensor) for tensor in moments)]
    assert {tensor.data_ptr() % 64 for tensor in tensors} == {0}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_and_several_updates_resume_exactly(dtype, tmp_path, monkeypatch):
    more = "--lora_rank 4 --num_iterations 2 --lr_schedule cosine --gradient_checkpointing"
    flags = [*stopper(tmp_path), *more.split(), "--model_dtype", dtype]
    small_run(tmp_path, *flags, "--run_name", "whole")
    resume(stopped_run(tmp_path, monkeypatch, *flags, step=3))
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")


def assert_damage_is_named(path, folder, monkeypatch, capsys):
    """A file of the checkpoint that is missing, or has the right size and no content."""
    saved = path.read_bytes()
    with monkeypatch.context() as patch:
        for spoilt in (None, bytes(len(saved))):
            path.unlink() if spoilt is None else path.write_bytes(spoilt)
            assert "damaged" in refused(patch, capsys, "--resume", str(folder))
    path.write_bytes(saved)


STORED = ["--replay_kind", "trajectories", "--buffer_policy", "lars", "--replay_buffer_size", "3", "--lr_decay", "0.99"]


def test_stored_conversations_survive_a_stop(tmp_path, monkeypatch, capsys):
    flags = [*stopper(tmp_path, base="ReplayCL"), *STORED]
    small_run(tmp_path, *flags, "--run_name", "whole")
    folder = stopped_run(tmp_path, monkeypatch, *flags)  # with two steps to go that replay and offer
    saved = folder / "checkpoints" / "LAST" / "training" / "buffer.json"
    text = saved.read_text()
    assert len(json.loads(text)["buffers"]["airline"]["items"]) == 3
    with monkeypatch.context() as patch:
        for spoilt in (text.replace('"losses"', '"lasses"'), text.replace('"token_ids"', '"token_idx"'), ""):
            saved.write_text(spoilt)
            assert "damaged" in refused(patch, capsys, "--resume", str(folder))
    saved.write_text(text)
    resume(folder)
    assert_equal_runs(tmp_path / "whole", folder)


def test_penalties_beside_replay_survive_a_stop(tmp_path, monkeypatch, capsys):
    """A list of algorithms, stopped within the second domain: with anchors, a frozen policy, and conversations."""
    flags = [*stopper(tmp_path, base="ReplayCL"), "--ewc_lambda", "0.4", "--lwf_coef", "0.1"]
    whole = small_run(tmp_path, *flags, "--run_name", "whole")
    folder = stopped_run(tmp_path, monkeypatch, *flags)
    training = folder / "checkpoints" / "LAST" / "training"
    assert json.loads((training / "state.json").read_text())["algorithms"][1]["recent"]
    for path in (training / "algorithm_1.safetensors", training / "algorithm_2.safetensors"):
        assert_damage_is_named(path, folder, monkeypatch, capsys)
    resume(folder)
    assert_equal_runs(tmp_path / "whole", folder)
    assert whole["statistics"]["tasks held"] == 2 and whole["statistics"]["total_replay_samples"] > 0
    assert whole["statistics"]["replay_ratio"] == 0.4  # that of replay, not of the penalties
    assert set(whole["statistics"]["mean Fisher information"]) == {"airline", "telecom"}


@pytest.mark.parametrize("step", [0, 2])
def test_generative_replay_survives_a_stop(step, tmp_path, monkeypatch, capsys):
    flags = [*stopper(tmp_path, "generative", "GenerativeReplayCL"), "--window", "8"]
    small_run(tmp_path, *flags, "--run_name", "whole")
    folder = stopped_run(tmp_path, monkeypatch, *flags, step=step)
    path = folder / "checkpoints" / "LAST" / "training" / "algorithm_0.safetensors"
    assert any(name.startswith("teacher.") for name in load_file(path)) == (step == 2)
    assert_damage_is_named(path, folder, monkeypatch, capsys)
    resume(folder)
    assert_equal_runs(tmp_path / "whole", folder)


def test_a_merged_policy_survives_a_stop(tmp_path, monkeypatch):
    flags = stopper(tmp_path, "merge", "MergeCL")
    small_run(tmp_path, *flags, "--run_name", "whole")
    folder = stopped_run(tmp_path, monkeypatch, *flags)
    resume(folder)
    assert_equal_runs(tmp_path / "whole", folder)


def test_a_sharded_run_continues_on_another_number_of_ranks(tmp_path):
    flags = [
        *SMALL,
        *stopper(tmp_path),
        "--runs_dir",
        str(tmp_path),
        "--shard",
        "--ewc_lambda",
        "0.4",
        "--lwf_coef",
        "0.1",
    ]
    flags += ["--eval_max_tasks", "1"]  # the second rank has nothing to evaluate, but takes part in gathering weights
    stopped = run_main(tmp_path / "shown", *flags, "--run_name", "r", ranks=2, env={"STOP_AT": "2"})
    assert [code for code, _, _ in stopped] == [143, 143], stopped
    last = tmp_path / "r" / "checkpoints" / "LAST"
    weights, held = load_file(last / "model.safetensors"), load_file(last / "training" / "algorithm_1.safetensors")
    assert {n: t.shape for n, t in held.items()} == {  # whole, not shards
        f"{kind}_0/{n}": t.shape for n, t in weights.items() for kind in ("anchor", "fisher")
    }
    [(code, shown, errors)] = run_main(tmp_path / "shown", *resume_flags(tmp_path / "r"), "--shard")
    assert code == 0, errors
    assert "resuming with 1 ranks a run of 2" in shown
    assert [r["global_step"] for r in steps_of(tmp_path / "r")] == [1, 2, 3, 4]
    model, _ = policy.load_policy("tiny", "float32", "cpu")
    final = load_file(last / "model.safetensors")
    assert set(final) == set(weights) == set(model.state_dict()) - {"lm_head.weight"}
    assert any(not torch.equal(final[name], weights[name]) for name in final)


DIER = """
import os, signal
import distributed
from replay import SequentialCL

class Dier(SequentialCL):
    def post_step_hook(self, trainer, domain):
        if distributed.rank() == 1 and os.environ["HOW"] == "raise":
            raise RuntimeError("the cable came out")
        if distributed.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def dying(tmp_path):
    (tmp_path / "dier.py").write_text(DIER)
    return [*SMALL, "--cl_algorithm", f"{tmp_path / 'dier.py'}:Dier", "--runs_dir", str(tmp_path)]


def test_a_rank_that_raises_shows_why_and_the_others_end_without_a_traceback(tmp_path):
    (first, _, shown), (second, _, why) = run_main(tmp_path, *dying(tmp_path), ranks=2, env={"HOW": "raise"})
    assert (first, second) == (1, 1)
    assert "[rank 1] Traceback" in why and "the cable came out" in why
    assert "lost the connection to another rank" in shown and "Traceback" not in shown


def test_torchrun_names_a_rank_that_is_killed_and_ends_the_others(tmp_path):
    died = run_script("train.py", *dying(tmp_path), launcher=TWO_RANKS, env={**ENV, "HOW": "kill"})
    assert died.returncode != 0
    assert "Signal 9" in died.stderr and "lost the connection to another rank" in died.stderr


def test_a_kill_before_the_second_checkpoint_leaves_no_record_twice(tmp_path, monkeypatch):
    """The first checkpoint is older than any log: records after it must go when the run is resumed."""
    save = checkpoint.save

    def killed(trainer):
        if trainer.state["baseline"]:  # evaluated and logged, not yet saved
            raise KeyboardInterrupt
        save(trainer)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            small_run(tmp_path, "--run_name", "r")
    assert len(report.read_jsonl(tmp_path / "r" / "metrics.jsonl")) == 1
    resume(tmp_path / "r")
    for name, number in (("metrics.jsonl", 1), ("trajectories.jsonl", 4)):  # 2 domains of 2 tasks
        records = report.read_jsonl(tmp_path / "r" / name)
        assert sum(r["kind"] == "evaluation" and r["stage"] == "baseline" for r in records) == number


@pytest.fixture
def damaged_run(tmp_path, monkeypatch):
    """(folder, last checkpoint) of a stopped run."""
    folder = stopped_run(tmp_path, monkeypatch, *stopper(tmp_path))
    checkpoints = checkpoint.checkpoints(folder)
    assert len(checkpoints) == checkpoint.KEEP
    return folder, checkpoints[-1]


def test_a_damaged_file_of_a_checkpoint_is_named(damaged_run, monkeypatch, capsys):
    folder, last = damaged_run
    state = last / "training" / "state.json"
    good = json.loads(state.read_text())
    moments = last / "training" / "optimizer.safetensors"
    saved = moments.read_bytes()
    moments.write_bytes(bytes(len(saved)))  # right size, wrong content
    assert "damaged" in refused(monkeypatch, capsys, "--resume", str(folder))
    moments.write_bytes(saved)
    for spoilt in (
        {**good, "logs": {"metrics.jsonl": 10**9}},
        {**good, "state": {}},
        {**good, "sizes": []},
        [],
        3,
        "{",
    ):
        state.write_text(spoilt if isinstance(spoilt, str) else json.dumps(spoilt))
        assert "damaged" in refused(monkeypatch, capsys, "--resume", str(folder))
    state.write_text(json.dumps(good))
    weights = last / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    assert "model.safetensors has" in refused(monkeypatch, capsys, "--resume", str(folder))


def test_a_flipped_bit_is_noticed_wherever_it_is(damaged_run, monkeypatch, capsys):
    folder, last = damaged_run
    files = [*checkpoint.files_in(last), folder / "config.json", folder / "metrics.jsonl"]
    assert len(files) >= 9
    for path in files:
        good = path.read_bytes()
        spoilt = bytearray(good)
        spoilt[spoilt.index(b'"') if path.name == "metrics.jsonl" else len(spoilt) // 2] ^= 1
        path.write_bytes(spoilt)
        shown = refused(monkeypatch, capsys, "--resume", str(folder))
        assert path.name in shown or (path.name == "state.json" and "is damaged" in shown)
        path.write_bytes(good)
    resume(folder)


def test_eval_refuses_changed_weights_and_ignores_what_it_does_not_read(damaged_run):
    _, last = damaged_run
    (last / "training" / "optimizer.safetensors").write_bytes(b"")
    settings = {"model_name_or_path": str(last), "domains": ["airline"]}
    assert evaluation.complete(evaluation.Args(**settings))[0].split == "train"
    weights = bytearray((last / "model.safetensors").read_bytes())
    weights[-5] ^= 16
    (last / "model.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match=r"model\.safetensors has been changed\)$"):  # no advice to remove it
        evaluation.complete(evaluation.Args(**settings))


def test_a_file_that_cannot_be_read_is_not_called_damaged(damaged_run, monkeypatch, capsys):
    folder, _ = damaged_run

    def unreadable(path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "sum_of", unreadable)
    shown = refused(monkeypatch, capsys, "--resume", str(folder))
    assert "Input/output error" in shown and "damaged" not in shown


def test_the_only_checkpoint_is_not_to_be_removed(damaged_run, monkeypatch, capsys):
    folder, last = damaged_run
    shutil.rmtree(checkpoint.checkpoints(folder)[0])
    (last / "model.safetensors").unlink()
    assert "there is none before it" in refused(monkeypatch, capsys, "--resume", str(folder))
    shutil.rmtree(last)
    logged = (folder / "metrics.jsonl").read_bytes()
    assert "logs, but no checkpoint" in refused(monkeypatch, capsys, "--resume", str(folder))
    assert logged and (folder / "metrics.jsonl").read_bytes() == logged


def test_a_resume_leaves_other_files_alone(damaged_run):
    folder, _ = damaged_run
    (folder / "notes.jsonl").write_text("mine\n")
    resume(folder)
    assert (folder / "notes.jsonl").read_text() == "mine\n"


def test_only_one_process_trains_a_run(damaged_run, monkeypatch, capsys):
    folder, _ = damaged_run
    other = os.open(folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert "another process is training" in refused(monkeypatch, capsys, *resume_flags(folder))
    os.close(other)
    resume(folder)


def test_a_resumed_run_brings_no_code_along(damaged_run, monkeypatch, capsys):
    folder, _ = damaged_run
    flags = resume_flags(folder)
    assert "code of its own" in refused(monkeypatch, capsys, *flags[:2])
    code = Path(flags[-1].rpartition(":")[0])
    code.write_text(code.read_text() + "\n# changed\n")
    assert "stopper.py has changed" in refused(monkeypatch, capsys, *flags)


def test_ranks_end_with_their_launcher(tmp_path):
    """Without time to stop them."""
    flags = [*SMALL, "--num_steps_per_task", "100000", "--runs_dir", str(tmp_path), "--run_name", "r"]
    command = [*TWO_RANKS, "train.py", *flags]
    launcher = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "r" / "checkpoints" / "LAST").exists():
        assert launcher.poll() is None
        time.sleep(0.1)
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    launcher.kill()
    launcher.wait()
    assert len(children) >= 2

    def alive():
        lines = [Path(f"/proc/{pid}/cmdline") for pid in children]
        return [path.parent.name for path in lines if path.exists() and b"train.py" in path.read_bytes()]

    deadline = time.monotonic() + 120
    while alive() and time.monotonic() < deadline:
        time.sleep(0.1)
    survivors = alive()
    for pid in survivors:
        os.kill(int(pid), signal.SIGKILL)
    assert survivors == []


def test_the_checkpoint_before_a_damaged_one_serves(damaged_run, monkeypatch, capsys):
    folder, last = damaged_run
    (last / "training" / "state.json").write_text("{")
    assert last.name in refused(monkeypatch, capsys, "--resume", str(folder))
    shutil.rmtree(last)
    resume(folder)
    assert (folder / "summary.json").exists()


def test_damaged_settings_are_named(damaged_run, monkeypatch, capsys):
    folder, _ = damaged_run
    config = json.loads((folder / "config.json").read_text())
    for name, value in (("seed", "x"), ("num_iterations", 1.5), ("lora_rank", None)):
        (folder / "config.json").write_text(json.dumps({**config, name: value}))
        assert name in refused(monkeypatch, capsys, "--resume", str(folder))
    (folder / "config.json").write_text(json.dumps({**config, "seed": 1}))
    assert "config.json has been changed" in refused(monkeypatch, capsys, "--resume", str(folder))
    (folder / "config.json").write_text("{")
    assert "config.json is damaged" in refused(monkeypatch, capsys, "--resume", str(folder))


def test_a_run_resumed_with_other_trained_parameters_is_told_so(tmp_path, monkeypatch, capsys):
    folder = stopped_run(tmp_path, monkeypatch, *stopper(tmp_path), "--lora_rank", "2")
    load = policy.load_policy

    def load_frozen(*args, **kwargs):
        model, tokenizer = load(*args, **kwargs)
        next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)
        return model, tokenizer

    monkeypatch.setattr(policy, "load_policy", load_frozen)
    message = refused(monkeypatch, capsys, *resume_flags(folder))
    assert "other parameters were trained" in message and "lora_A" in message


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path):
    flags = [*SMALL, "--runs_dir", str(tmp_path), "--run_name", "full"]
    # Bytes that a file may have; the weights need four times that.
    [(code, _, shown)] = run_main(tmp_path / "shown", *flags, largest_file=1_000_000)
    assert code == 2
    assert "cannot write a checkpoint" in shown and "Traceback" not in shown
    assert list((tmp_path / "full" / "checkpoints").iterdir()) == []


FORGETFUL = """
from replay import ReplayCL

class Counter(ReplayCL):
    count = 0

    def post_step_hook(self, trainer, domain):
        super().post_step_hook(trainer, domain)
        self.count += 1
"""
SAVING = """
    def state_dict(self):
        return {**super().state_dict(), "count": self.count}
"""


@pytest.mark.parametrize("more, said", [("", 1), (SAVING, 0)])
def test_a_class_that_keeps_state_and_saves_none_is_told_so_when_the_run_is_saved(more, said, tmp_path, capsys):
    (tmp_path / "own.py").write_text(FORGETFUL + more)
    small_run(tmp_path, "--cl_algorithm", f"{tmp_path / 'own.py'}:Counter", "--run_name", "r")
    assert capsys.readouterr().out.count("Counter changes count, which --resume would lose") == said


def test_a_revision_is_that_of_the_code(tmp_path, monkeypatch):
    """The commit that last changed a file beside checkpoint.py; a sum of these files if git does not know them."""

    def git(*words):
        command = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    code, page = tmp_path / "checkpoint.py", tmp_path / "README.md"
    monkeypatch.setattr(checkpoint, "__file__", str(code))
    found = checkpoint.revision.__wrapped__
    code.write_text("1")
    alone = found()
    assert re.fullmatch("[0-9a-f]{12}", alone)
    git("init", "-q")
    assert found() == alone
    git("add", ".")
    git("commit", "-qm", "one")
    first = git("rev-parse", "--short=12", "HEAD")
    assert found() == first != alone
    page.write_text("2")
    git("add", ".")
    git("commit", "-qm", "two")
    assert found() == first
    code.write_text("2")
    assert found() == f"{first}-changed"
