"""The embedded run's table: each algorithm on the embedded policy, with several seeds, in processes of their own.

    python experiments/embedded.py                                              a night on a laptop
    python experiments/embedded.py --arms sequential replay --seeds 0 1 2       minutes

Every process has one thread; there are as many as cores. Stopped, the same command goes on. Of a finished run,
summary.json, metrics.jsonl, config.json, its report and its last model are kept.
"""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tqdm import tqdm

from checkpoint import revision
from comparison import compare
from experiments import runner
from experiments.runner import Several
from flags import Seed
from oracle import DOMAINS

STORED = "replay --replay_kind trajectories"
SMALL = f"{STORED} --replay_buffer_size 64"  # of a thousand conversations of each domain
ARMS = {  # --cl_algorithm, and flags of train.py
    "sequential": "sequential",
    "joint": "joint",
    "replay_02": "replay --replay_ratio 0.2",
    "replay": "replay",
    "replay_05": "replay --replay_ratio 0.5",
    "high_reward": "replay --replay_strategy high_reward",
    "recent": "replay --replay_strategy recent",
    "adaptive": "adaptive_replay",
    "stored": STORED,
    "stored_uncloned": f"{STORED} --clone_coef 0",
    "reservoir": SMALL,
    "brs": f"{SMALL} --buffer_policy brs",
    "lars": f"{SMALL} --buffer_policy lars",
    "labrs": f"{SMALL} --buffer_policy labrs",
    "generative": "generative_replay",
    "distillation": "distillation --distill_coef 0.3",
    "der": "der --replay_kind trajectories --distill_coef 0.1",
    "ewc": "ewc --ewc_lambda 0.1",
    "online_ewc": "online_ewc --ewc_lambda 0.1",
    "cpo": "cpo --ewc_lambda 0.001",
    "lwf": "lwf --lwf_coef 0.003",
    "er_plus": "replay --ewc_lambda 0.1 --lwf_coef 0.003",
    "merge": "merge --merge_alpha 0.8",
    **{f"only_{domain}": f"sequential --task_order {domain}" for domain in DOMAINS},  # references of intransigence
}
ORDERED = ("sequential", "replay")  # arms that are also run in the other orders of the domains


@dataclass(kw_only=True)
class Args(runner.Flags):
    """Runs train.py for each arm, seed and order of domains, and compares the runs."""

    seeds: Several[Seed] = field(default_factory=lambda: list(range(10)))
    """seeds of the runs"""
    arms: Several[Literal[*ARMS]] = field(default_factory=lambda: list(ARMS))
    """what to compare"""
    orders: bool = True
    """sequential and replay in all orders of the domains, too"""
    output: str = "runs/embedded"
    """directory for the runs and the comparison. Finished runs there are not run again"""


def usual_jobs(args) -> dict[str, str]:
    """{name of a run: flags of train.py}, one seed after the other."""
    return {f"{arm}_seed{seed}": f"{ARMS[arm]} --seed {seed}" for seed in args.seeds for arm in args.arms}


def other_orders(args) -> dict[str, str]:
    """The same of the arms that are also run in the other orders of the domains."""
    jobs, arms = {}, [arm for arm in args.arms if arm in ORDERED]
    for seed, order, arm in itertools.product(args.seeds, list(itertools.permutations(DOMAINS))[1:], arms):
        initials = "".join(domain[0] for domain in order)
        jobs[f"{arm}_{initials}_seed{seed}"] = f"{ARMS[arm]} --task_order {' '.join(order)} --seed {seed}"
    return jobs


def start(run: Path, flags) -> subprocess.Popen:
    """Starts a run, or resumes it. Its output goes to a file beside the run."""
    flags = f"--cl_algorithm {flags} --drift_every 8 --run_name {run.name} --runs_dir".split()
    flags = ["--resume", run] if (run / "config.json").exists() else [*flags, run.parent]
    with open(f"{run}.log", "a", encoding="utf-8") as log:
        command = [sys.executable, ROOT / "train.py", *flags]
        return subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})


def keep_model(run: Path):
    """Removes what takes much room: conversations, and all of the checkpoints but the last model."""
    (run / "trajectories.jsonl").unlink(missing_ok=True)
    last = (run / "checkpoints" / "LAST").resolve()
    for path in (*run.resolve().glob("checkpoints/[0-9]*"), last / "training"):
        if path != last:
            shutil.rmtree(path, ignore_errors=True)


def check_revisions(runs):
    """Raises ValueError if the runs that there are, finished or not, are not of this revision."""
    for run in runs:
        path = next((path for path in (run / "summary.json", run / "config.json") if path.exists()), None)
        made = json.loads(path.read_bytes()).get("revision") if path else revision()
        if made != revision():
            raise ValueError(f"{run} is of revision {made}, not {revision()}: a table has one; choose another --output")


def run_experiment(args: Args):
    """Makes all runs, then the tables. Raises ValueError if a run fails."""
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    usual = {output / name: flags for name, flags in usual_jobs(args).items()}
    others = {output / name: flags for name, flags in other_orders(args).items()} if args.orders else {}
    jobs = usual | others
    check_revisions(jobs)
    waiting = [run for run in jobs if not (run / "report.md").exists()]  # the last file of a finished run
    for run in jobs.keys() - set(waiting):  # the last command may have been stopped before it did so
        keep_model(run)
    going, began, todo = {}, time.monotonic(), len(waiting)
    bar = tqdm(total=len(jobs), initial=len(jobs) - todo, bar_format="runs: {n}/{total} |{bar}|{postfix}")
    try:
        while waiting or going:
            while waiting and len(going) < (args.workers or os.cpu_count()):
                run = waiting.pop(0)
                going[run] = start(run, jobs[run])
            time.sleep(0.5)
            for run, process in list(going.items()):
                if process.poll() is None:
                    continue
                if going.pop(run).returncode:
                    raise ValueError(f"{run.name} failed; see {run}.log")
                keep_model(run)
                bar.update()
                left = len(waiting) + len(going)
                minutes = (time.monotonic() - began) / 60 * left / (todo - left)
                bar.set_postfix_str(f"about {minutes:.0f} minutes left")
    finally:  # after an error or a signal: each run saves, and stops
        for process in going.values():
            process.terminate()
        for process in going.values():
            process.wait()
        bar.close()
    check_revisions(jobs)
    print(compare(usual, output / "comparison"))
    if others:
        first = [run for run in usual if run.name.rpartition("_seed")[0] in ORDERED]
        print("\nEvery order of the domains:\n\n" + compare([*first, *others], output / "orders"))


if __name__ == "__main__":
    runner.run_command(Args, run_experiment)
