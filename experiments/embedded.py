"""The embedded run's table: each algorithm on the embedded policy, with several seeds, in processes of their own.

python experiments/embedded.py --arms sequential replay --workers 2     default: 51 runs, of minutes each
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from experiments import runner
from experiments.runner import Several
from flags import Seed

ARMS = {  # --cl_algorithm, and flags of train.py
    "sequential": "sequential",
    "joint": "joint",
    "replay": "replay",
    "adaptive": "adaptive_replay",
    "high": "replay --replay_strategy high_reward",
    "recent": "replay --replay_strategy recent",
    "balanced": "replay --replay_strategy balanced",
    "ratio02": "replay --replay_ratio 0.2",
    "ratio05": "replay --replay_ratio 0.5",
    "clone": "replay --replay_kind trajectories",
    "noclone": "replay --replay_kind trajectories --clone_coef 0",
    "ewc": "ewc",
    "online": "online_ewc",
    "lwf": "lwf",
    "er_plus": "replay --ewc_lambda 0.1 --lwf_coef 0.01",
    "generative": "generative_replay",
    "normal": "generative_replay --generator_components 0",
}


@dataclass(kw_only=True)
class Args(runner.Flags):
    """Runs train.py for each arm and seed, and compares the runs. A stopped run goes on from its last checkpoint."""

    seeds: Several[Seed] = field(default_factory=lambda: [0, 1, 2])
    """seeds of the runs"""
    arms: Several[Literal[*ARMS]] = field(default_factory=lambda: list(ARMS))
    """what to compare"""
    output: str = "runs/embedded"
    """directory for the runs and the comparison. Finished runs there are not run again"""


def start(run: Path, arm, seed) -> subprocess.Popen:
    """Starts a run, or resumes it. Its output goes to a file beside the run."""
    flags = f"--cl_algorithm {ARMS[arm]} --seed {seed} --run_name {run.name} --runs_dir".split()
    flags = ["--resume", run] if (run / "config.json").exists() else [*flags, run.parent]
    with open(f"{run}.log", "a", encoding="utf-8") as log:
        command = [sys.executable, ROOT / "train.py", *flags]
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def run_experiment(args: Args):
    """Makes all runs, then the table. Raises ValueError if a run fails."""
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    jobs = {output / f"{arm}_seed{seed}": (arm, seed) for seed in args.seeds for arm in args.arms}
    waiting = [run for run in jobs if not (run / "report.md").exists()]  # train.py writes it last
    going = {}
    try:
        while waiting or going:
            while waiting and len(going) < (args.workers or os.cpu_count()):
                run = waiting.pop(0)
                print(f"{run.name}; {len(waiting)} more wait", flush=True)
                going[run] = start(run, *jobs[run])
            time.sleep(0.5)
            for run, process in list(going.items()):
                if process.poll() is not None and going.pop(run).returncode:
                    raise ValueError(f"{run.name} failed; see {run}.log")
    finally:  # after an error or a signal: each run saves, and stops
        for process in going.values():
            process.terminate()
        for process in going.values():
            process.wait()
    compare = [sys.executable, ROOT / "eval.py", "--compare", *jobs, "--output", output / "comparison"]
    compared = subprocess.run(compare, stderr=subprocess.PIPE, text=True)
    if compared.returncode:
        raise ValueError(compared.stderr.strip())


if __name__ == "__main__":
    runner.run_command(Args, run_experiment)
