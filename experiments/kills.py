"""Does a run that is killed end as if it had not been, to the bit?

    python experiments/kills.py --output runs/kills

Four algorithms train the embedded policy on two domains. Each run is resumed from every one of its checkpoints. Then
runs are killed by SIGKILL at moments inside the writing of checkpoints and logs, again and again, and resumed until
they finish. Weights, moments, buffers, logs and results must equal those of the run that was never stopped. Needs
os.fork.
"""

import builtins
import io
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import distributed  # noqa: F401 (sets what other libraries read when they are imported)

# isort: split
import numpy as np
import torch
import transformers.modeling_utils
from safetensors.torch import save_file
from tqdm import tqdm

import checkpoint
import policy
import train
from experiments.runner import run_command, show_table
from flags import CountOrZero, Seed
from generative import GenerativeReplayCL
from regularize import OnlineEWC
from replay import ReplayCL

ALGORITHMS = {  # name: (class of this file, flags)
    "replay of tasks": ("Replay", "--replay_ratio 0.5"),
    "replay of conversations": ("Replay", "--replay_kind trajectories --buffer_policy lars --clone_coef 0.1"),
    "generative_replay": ("Generative", "--window 16"),
    "online_ewc": ("Online", "--ewc_lambda 10"),
}
SETTINGS = """
    --task_order airline telecom --max_tasks_per_domain 2 --eval_max_tasks 1 --eval_trials 1 --max_turns 2
    --max_new_tokens 8 --batch_size_per_gpu 2 --num_samples_per_prompt 2 --num_steps_per_task 3 --warmup_steps 2
    --warmup_target None --replay_buffer_size 5 --temperature 1 --checkpoint_every 1
"""
# By name: the event of sys.audit, or "half" of a write; the path in the run; how many such events may pass before.
SAVING = r"checkpoints/saving\.tmp"
MOMENTS = {
    "between two files of a checkpoint": ("open", rf"{SAVING}/.*", 30),
    "inside a file of tensors": ("half", rf"{SAVING}/.*\.safetensors", 12),
    "inside buffer.json": ("half", rf"{SAVING}/training/buffer\.json\.tmp", 3),
    "inside state.json": ("half", rf"{SAVING}/training/state\.json\.tmp", 3),
    "before state.json has its name": ("os.rename", rf"{SAVING}/training/state\.json\.tmp", 3),
    "before a checkpoint has its name": ("os.rename", SAVING, 3),
    "before the new link is made": ("os.symlink", r"checkpoints/LAST\.tmp", 3),
    "before the new link replaces LAST": ("os.rename", r"checkpoints/LAST\.tmp", 3),
    "before an old checkpoint is removed": ("shutil.rmtree", r"checkpoints/\d.*", 3),
    "while an old checkpoint is removed": ("os.remove", r"checkpoints/\d.*", 30),
    "before a line of metrics.jsonl": ("open", r"metrics\.jsonl", 8),
    "inside a line of metrics.jsonl": ("half", r"metrics\.jsonl", 8),
    "inside a line of trajectories.jsonl": ("half", r"trajectories\.jsonl", 12),
    "before a log is cut to its checkpoint": ("os.truncate", r".*\.jsonl", 1),
    "while config.json is written": ("half", r"\.\./.*\.tmp/config\.json\.tmp", 1),
    "while the results are written": ("open", r"summary\.json\.tmp|.*\.png|report\.md\.tmp", 4),
}


@dataclass(kw_only=True)
class Args:
    """Kills runs and compares them with runs that were not."""

    output: str
    """directory for the runs and table.md; it must not exist"""
    kills: CountOrZero = 100
    """SIGKILLs"""
    seed: Seed = 0
    """seed of the moments"""


class Learns:
    """Gives every step a gradient: the policy is too raw to earn rewards."""

    def extra_losses(self, trainer):
        yield from super().extra_losses(trainer)
        ids = torch.arange(64)[None]
        yield -policy.token_logprobs(trainer.model, ids, torch.ones_like(ids)).mean()


class Replay(Learns, ReplayCL):
    pass


class Generative(Learns, GenerativeReplayCL):
    pass


class Online(Learns, OnlineEWC):
    pass


# ------------------------------------------------------------------------------------------------ in a forked process


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(run, moment, number):
    """Kills this process when it writes to the run at this moment for the n-th time."""
    wanted, pattern, _ = MOMENTS[moment]
    left, run, opened = number, run.resolve(), io.open

    def is_now(path, directory=-1) -> bool:
        nonlocal left
        if isinstance(path, (str, Path)):
            folder = os.readlink(f"/proc/self/fd/{directory}") if directory >= 0 else os.getcwd()
            left -= bool(re.fullmatch(pattern, os.path.relpath(Path(folder, path), run)))
        return left == 0

    def heard(event, args):
        writing = event != "open" or (args[1] and "r" not in args[1])
        if event == wanted and writing:
            path, directory = (args[1], -1) if event == "os.symlink" else args[:2]
            if is_now(path, directory if event == "os.remove" else -1):
                die()

    def open_to_halve(path, mode="r", *args, **kwargs):
        file = opened(path, mode, *args, **kwargs)
        write = file.write

        def half(text):
            if not is_now(path):
                return write(text)
            write(text[: len(text) // 2])
            file.flush()
            die()

        if set(mode) & set("wa"):
            file.write = half
        return file

    def save_and_halve(tensors, path, **kwargs):
        save_file(tensors, path, **kwargs)
        if is_now(path):
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    if wanted == "half":
        io.open = builtins.open = open_to_halve
        checkpoint.save_file = transformers.modeling_utils.safe_save_file = save_and_halve
    else:
        sys.addaudithook(heard)


def child(flags, run, moment, number, kept):
    shown = os.open(f"{run}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(shown, 1)
    os.dup2(shown, 2)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    remove = checkpoint.remove_old

    def keep_a_copy(run, *args, **kwargs):
        newest = checkpoint.checkpoints(run)[-1]
        shutil.copytree(newest, kept / newest.name, dirs_exist_ok=True)
        remove(run, *args, **kwargs)

    if kept:
        checkpoint.remove_old = keep_a_copy
    if moment:
        arm(run, moment, number)
    sys.argv = ["train.py", *flags]
    train.main()


# ------------------------------------------------------------------------------------------------------ in this process


def start(run, flags, moment=None, number=0, kept=None) -> bool:
    """Runs train.py's main in a fork of this process: the imports are done. Returns whether it was killed. kept: a
    folder for copies of all checkpoints."""
    process = multiprocessing.get_context("fork").Process(target=child, args=(flags, run, moment, number, kept))
    process.start()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise ValueError(f"train.py ended with exit code {process.exitcode}; see {run}.log")
    return process.exitcode != 0


def outcome(run) -> dict:
    """All that a finished run has to show, by name, without times."""
    last = run / "checkpoints" / "LAST"
    found = {str(path.relative_to(last)): path.read_bytes() for path in checkpoint.files_in(last)}
    state = json.loads(found.pop("training/state.json"))
    for name in ("seconds", "cpu_seconds"):
        state["state"].pop(name)
    found["training/state.json"] = [state[name] for name in ("state", "scores", "algorithms")]
    for name in checkpoint.LOGS:
        records = [json.loads(line) for line in (run / name).read_text().splitlines()]
        found[name] = [{k: v for k, v in r.items() if not re.search("seconds$|per_second$|^time$", k)} for r in records]
    summary = json.loads((run / "summary.json").read_text())
    # Killed in the first evaluation, a run saves its untrained model once more: numbers count from the oldest one kept.
    numbers = {folder.name: str(k) for k, folder in enumerate(checkpoint.checkpoints(run))}
    parts = [path.relative_to(run).parts for path in run.rglob("*")]
    found.update({f"the file {'/'.join(numbers.get(part, part) for part in of)}": "is there" for of in parts})
    found["summary.json"] = {name: summary[name] for name in ("baseline", "R", "metrics", "statistics", "bytes_kept")}
    return found


def differences(run, expected) -> list[str]:
    """What of a run's outcome is not as expected."""
    found = outcome(run)
    return sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))


def flags_of(name, run) -> list[str]:
    """The flags that begin a run, or continue it."""
    kind, settings = ALGORITHMS[name]
    algorithm = ["--cl_algorithm", f"{Path(__file__).resolve()}:{kind}"]
    if (run / "config.json").exists():
        return ["--resume", str(run), *algorithm]
    return ["--runs_dir", str(run.parent), "--run_name", run.name, *algorithm, *SETTINGS.split(), *settings.split()]


def resume_from(folder, name, whole, expected) -> list[str]:
    """Resumes a copy of the run `whole` from one of its checkpoints. Returns what of its outcome differs."""
    copy = whole.parent / "resumed"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy / "checkpoints" / folder.name)
    for file in ("config.json", *checkpoint.LOGS):
        shutil.copy(whole / file, copy)
    start(copy, flags_of(name, copy))
    return [item for item in differences(copy, expected) if not item.startswith("the file ")]


def kill_and_resume(name, run, moments) -> list[str]:
    """Kills a run at each (moment, number) in turn, until it finishes. Returns the moments of its kills."""
    killed = []
    for moment, number in [*moments, (None, 0)]:
        if not start(run, flags_of(name, run), moment, number):
            break
        killed.append(moment)
    return killed


def resume_all(output, expected) -> tuple[list[dict], list[str]]:
    """Resumes runs that were never stopped from each of their checkpoints: (rows of the table, what differs)."""
    rows, findings = [], []
    with tqdm(desc="resumes") as bar:
        for name in ALGORITHMS:
            whole, kept = output / name.replace(" ", "_"), output / "kept" / name.replace(" ", "_")
            start(whole, flags_of(name, whole), kept=kept)
            expected[name] = outcome(whole)
            folders, found = sorted(kept.iterdir()), []
            bar.total = len(folders) * len(ALGORITHMS)
            for folder in folders:
                if different := resume_from(folder, name, whole, expected[name]):
                    found.append(f"{name}, resumed from {folder.name}: {', '.join(different)} differ")
                bar.update()
            about = f"{name}: resumed from each checkpoint"
            rows.append({"": about, "times": len(folders), "equal": len(folders) - len(found)})
            findings += found
    return rows, findings


def kill_all(args, output, expected) -> tuple[list[dict], list[str]]:
    """Kills runs at every moment in turn: (rows of the table, what differs)."""
    rng, done, equal, findings, order = np.random.default_rng(args.seed), Counter(), Counter(), [], []
    names = itertools.cycle(ALGORITHMS)
    with tqdm(desc="kills", total=args.kills) as bar:
        while done.total() < args.kills:
            run, name = output / f"killed{bar.n}", next(names)
            order = order or sorted(rng.permutation(list(MOMENTS)).tolist(), key=lambda moment: "config" not in moment)
            plan = [(moment, int(rng.integers(1, MOMENTS[moment][2] + 1))) for moment in order]
            killed = kill_and_resume(name, run, plan[: args.kills - done.total()])
            order = order[len(killed) + 1 :]  # the one after the last kill did not come up
            done.update(killed)
            if different := differences(run, expected[name]):
                findings.append(f"{name}, killed {', '.join(killed)}: {', '.join(different)} differ")
            else:
                equal.update(killed)
                shutil.rmtree(run)
            bar.update(len(killed))
    return [{"": f"killed {moment}", "times": done[moment], "equal": equal[moment]} for moment in MOMENTS], findings


def kills(args):
    output, expected = Path(args.output), {}
    torch.set_num_threads(1)  # other threads would not survive a fork
    output.mkdir(parents=True)
    resumed, findings = resume_all(output, expected)
    killed, more = kill_all(args, output, expected)
    show_table(resumed + killed, output)
    if findings or more:
        raise AssertionError("\n".join([*findings, *more]))


if __name__ == "__main__":
    run_command(Args, kills)
