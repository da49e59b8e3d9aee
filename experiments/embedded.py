"""The embedded run's table: each algorithm on the embedded policy, with several seeds, one process a run.

    python experiments/embedded.py --workers 2               runs/embedded: 51 runs of minutes each, then the table
    python experiments/embedded.py --arms sequential replay --seeds 0 1

A finished run is not run again, and a stopped one goes on from its last checkpoint.
"""

import os
import subprocess
import sys
import time
from dataclasses import field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import pydantic
from pydantic import NonNegativeInt

from distributed import CHECKED
from experiments import runner
from experiments.runner import Several

ARMS = {  # flags of train.py
    "sequential": "--cl_algorithm sequential",
    "joint": "--cl_algorithm joint",
    "replay": "--cl_algorithm replay",
    "adaptive": "--cl_algorithm adaptive_replay",
    "high": "--cl_algorithm replay --replay_strategy high_reward",
    "recent": "--cl_algorithm replay --replay_strategy recent",
    "balanced": "--cl_algorithm replay --replay_strategy balanced",
    "ratio02": "--cl_algorithm replay --replay_ratio 0.2",
    "ratio05": "--cl_algorithm replay --replay_ratio 0.5",
    "clone": "--cl_algorithm replay --replay_kind trajectories",
    "noclone": "--cl_algorithm replay --replay_kind trajectories --clone_coef 0",
    "ewc": "--cl_algorithm ewc",
    "online": "--cl_algorithm online_ewc",
    "lwf": "--cl_algorithm lwf",
    "er_plus": "--cl_algorithm replay --ewc_lambda 0.1 --lwf_coef 0.01",
    "generative": "--cl_algorithm generative_replay",
    "normal": "--cl_algorithm generative_replay --generator_components 0",
}


@pydantic.dataclasses.dataclass(config=CHECKED, kw_only=True)
class Args(runner.Flags):
    """Runs train.py for each arm and seed, and compares the runs."""

    seeds: Several[NonNegativeInt] = field(default_factory=lambda: [0, 1, 2])
    """seeds of the runs"""
    arms: Several[Literal[*ARMS]] = field(default_factory=lambda: list(ARMS))
    """what to compare"""
    output: str = "runs/embedded"
    """directory for the runs and the comparison. Finished runs there are not run again"""


def start(run: Path, arm, seed) -> subprocess.Popen:
    """Starts a run, or lets it go on. What it prints goes to a file beside it."""
    flags = [*ARMS[arm].split(), "--seed", str(seed), "--run_name", run.name, "--runs_dir", str(run.parent)]
    if (run / "config.json").exists():
        flags = ["--resume", str(run)]
    with open(f"{run}.log", "a") as log:
        command = [sys.executable, str(ROOT / "train.py"), *flags]
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_experiment(args: Args):
    """All runs, then the table. Raises ValueError for a run that fails."""
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    jobs = {output / f"{arm}_seed{seed}": (arm, seed) for seed in args.seeds for arm in args.arms}
    waiting = [run for run in jobs if not (run / "report.md").exists()]  # written last
    going = {}
    try:
        while waiting or going:
            while waiting and len(going) < (args.workers or os.cpu_count()):
                run = waiting.pop(0)
                print(f"{run.name}, {len(waiting)} more", flush=True)
                going[run] = start(run, *jobs[run])
            time.sleep(0.5)
            for run in [run for run, process in going.items() if process.poll() is not None]:
                if going.pop(run).returncode:
                    raise ValueError(f"{run.name} failed; see {run}.log")
    except BaseException:
        for process in going.values():  # each saves, and stops
            process.terminate()
        for process in going.values():
            process.wait()
        raise
    flags = ["--compare", *map(str, jobs), "--output", str(output / "comparison")]
    subprocess.run([sys.executable, str(ROOT / "eval.py"), *flags], check=False)


if __name__ == "__main__":
    runner.run_command(Args, run_experiment)
