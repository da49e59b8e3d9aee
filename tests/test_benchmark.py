"""experiments/benchmark.py compares the ways; experiments/embedded.py runs every arm once, and names one that fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

import train
from distributed import StopRun
from experiments import benchmark, embedded, runner
from policy import token_logprobs

ROOT = Path(__file__).resolve().parent.parent


def run_benchmark(flags, **env):
    command = [sys.executable, "experiments/benchmark.py", *flags.split()]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=900)


def test_rollouts_and_updates_are_compared(tmp_path):
    (tmp_path / "tau2.py").write_text("raise ImportError('the benchmark of the policy needs no tau2')")
    shown = run_benchmark("--repeats 1 --prompt_tokens 64 --turns 2 --update_tokens 64", PYTHONPATH=str(tmp_path))
    assert shown.returncode == 0 and shown.stderr == "", shown.stderr
    rows = [line.strip("|").split("|")[0].strip() for line in shown.stdout.splitlines() if line.startswith("|")]
    assert [row for row in rows if row.strip(":-")] == ["generate", "padded", "paged", "all logits", "token_logprobs"]


def test_the_plain_update_has_the_same_log_probabilities(tiny):
    ids = torch.randint(3, 60, (1, 32), generator=torch.Generator().manual_seed(0))
    plain = benchmark.all_logits(tiny[0], ids, torch.ones_like(ids))
    torch.testing.assert_close(plain, token_logprobs(tiny[0], ids, torch.ones_like(ids)), atol=1e-4, rtol=1e-4)


def test_buffers_are_timed(capsys):
    benchmark.time_buffers(None, capacity=10)
    names = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert names == ["reservoir", "brs", "lars", "labrs"]


def test_oracle_is_timed(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "ORACLE_TASKS", 1)
    benchmark.time_oracle(None)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()[2:]] == ["airline", "retail", "telecom"]


@pytest.mark.parametrize("shape", ["0.5b", "7b"])
def test_the_memory_is_that_of_the_models_parameters(shape, capsys):
    sizes = dict(zip(benchmark.SIZES.split(), benchmark.SHAPES[shape], strict=True))
    config = Qwen2Config(**sizes, tie_word_embeddings=shape in benchmark.TIED)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert benchmark.count_parameters(shape) == sum(p.numel() for p in model.parameters())
    linear = [m for m in model.model.layers[0].modules() if isinstance(m, torch.nn.Linear)]
    assert sorted(benchmark.layer_sizes(shape)) == sorted((m.in_features, m.out_features) for m in linear)
    benchmark.show_memory(None)
    assert len(capsys.readouterr().out.splitlines()) == 2 + 4


def test_a_setting_that_cannot_be_timed_is_one_line():
    shown = run_benchmark("--update_tokens 1")
    line = "benchmark.py: update_tokens must be greater than or equal to 2, got 1\n"
    assert shown.returncode == 2 and shown.stderr == line


ORDER = ["airline", "retail"]
SUMMARY = {
    "task_order": ORDER,
    "stages": ORDER,
    "R": [[0.5, 0.0], [0.4, 0.5]],
    "metrics": {"average": 0.45, "forgetting": 0.1, "backward_transfer": -0.1, "intransigence": None},
    **{name: dict.fromkeys(ORDER, 0.0) for name in ("baseline", "warm_start", "do_nothing_rate")},
    **{"minutes": 1.0, "bytes_kept": 0},
}


@pytest.mark.parametrize("arm", embedded.ARMS)
def test_train_takes_the_flags_of_every_arm(arm):
    args = train.parse_args(["--cl_algorithm", *embedded.ARMS[arm].split()])
    assert args.cl_algorithm == embedded.ARMS[arm].split()[0]


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout whose train.py notes its arguments, and writes a summary. Training ends with the code in a file
    `code`, or not before a signal if there is none."""
    (tmp_path / "train.py").write_text(
        f"""
import json, os, pathlib, sys, time
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
run = pathlib.Path(flags.get("--resume") or os.path.join(flags["--runs_dir"], flags["--run_name"]))
for name in ("00001-step1", "00002-step2"):
    (run / "checkpoints" / name / "training").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / name / "model.safetensors").write_text(name)
link = run / "checkpoints" / "LAST"
link.unlink(missing_ok=True)
link.symlink_to("00002-step2")
(run / "trajectories.jsonl").write_text("")
about = dict(revision={embedded.revision()!r}, flags=sys.argv[1:], threads=os.environ["OMP_NUM_THREADS"])
(run / "config.json").write_text(json.dumps(about | dict(pid=os.getpid())))
code = pathlib.Path(__file__).with_name("code")
while not code.exists():
    time.sleep(0.1)
arm, seed = run.name.split("_seed")
config = dict(arm=arm)
summary = {SUMMARY!r} | dict(cl_algorithm="replay", seed=int(seed), config=config, revision=about["revision"])
(run / "summary.json").write_text(json.dumps(summary))
(run / "report.md").write_text("")
sys.exit(int(code.read_text()))
"""
    )
    (tmp_path / "code").write_text("0")
    monkeypatch.setattr(embedded, "ROOT", tmp_path)
    return tmp_path


def arguments(run):
    return json.loads((run / "config.json").read_text())


def test_every_arm_runs_once_and_is_compared(checkout, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    args = embedded.Args(arms=["replay", "high_reward"], seeds=[0, 3], orders=False, output="out", workers=2)
    embedded.run_experiment(args)
    runs = [checkout / "out" / f"{arm}_seed{seed}" for seed in (0, 3) for arm in ("replay", "high_reward")]
    expected = (
        "--cl_algorithm replay --replay_strategy high_reward --seed 3 --drift_every 8 --run_name high_reward_seed3"
    )
    assert arguments(runs[-1])["flags"] == [*expected.split(), "--runs_dir", "out"]
    assert arguments(runs[-1])["threads"] == "1"
    assert {path.name for path in runs[0].iterdir()} == {"config.json", "summary.json", "report.md", "checkpoints"}
    assert {path.name for path in (runs[0] / "checkpoints").iterdir()} == {"00002-step2", "LAST"}
    assert [path.name for path in (runs[0] / "checkpoints" / "LAST").iterdir()] == ["model.safetensors"]
    assert re.search(r"\| replay, arm \w+ +\| 2 ", capsys.readouterr().out)
    assert (checkout / "out" / "comparison" / "p_values.png").is_file()
    before = [arguments(run) for run in runs]
    (runs[0] / "report.md").unlink()  # as if it had been stopped
    (runs[1] / "trajectories.jsonl").write_text("")  # as if it had finished while the experiment was stopped
    embedded.run_experiment(args)
    assert arguments(runs[0])["flags"] == ["--resume", "out/replay_seed0"]
    assert not (runs[1] / "trajectories.jsonl").exists()
    assert [arguments(run) for run in runs[1:]] == before[1:]


def test_two_arms_are_run_in_every_order_of_the_domains():
    args = embedded.Args(seeds=[0, 1], arms=["sequential", "replay", "ewc"])
    assert len(embedded.usual_jobs(args)) == 6 and len(others := embedded.other_orders(args)) == 2 * 2 * 5
    assert others["replay_tra_seed1"] == "replay --task_order telecom retail airline --seed 1"


@pytest.mark.parametrize("name", ["summary.json", "config.json"])
def test_a_table_has_one_revision(checkout, name):
    run = checkout / "out" / "replay_seed0"
    run.mkdir(parents=True)
    (run / name).write_text(json.dumps({"revision": "0123456789ab"}))
    with pytest.raises(ValueError, match=r"replay_seed0 is of revision 0123456789ab, not \w+.*choose another --output"):
        embedded.run_experiment(embedded.Args(arms=["replay"], seeds=[0], output=str(checkout / "out")))


def test_a_run_that_fails_is_named(checkout):
    (checkout / "code").write_text("2")
    with pytest.raises(ValueError, match=r"replay_seed0 failed; see .*replay_seed0\.log"):
        embedded.run_experiment(embedded.Args(arms=["replay"], seeds=[0], output=str(checkout / "out")))


def test_a_stopped_table_stops_its_runs(checkout, monkeypatch):
    (checkout / "code").unlink()
    run = checkout / "out" / "replay_seed0"
    sleep = time.sleep

    def interrupted(seconds):
        sleep(seconds)
        if (run / "config.json").exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(embedded.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        embedded.run_experiment(embedded.Args(arms=["replay"], seeds=[0], output=str(checkout / "out")))
    with pytest.raises(ProcessLookupError):
        os.kill(arguments(run)["pid"], signal.SIGTERM)


def test_what_cannot_go_on_is_one_line(monkeypatch, capsys):
    def stops(args):
        raise StopRun("4 of 4 conversations ended in an error")

    monkeypatch.setattr("sys.argv", ["embedded.py"])
    with pytest.raises(SystemExit) as stop:
        runner.run_command(embedded.Args, stops)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "embedded.py: 4 of 4 conversations ended in an error\n"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # handled as before
