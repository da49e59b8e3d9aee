"""A run's files: its settings, its logs, its checkpoints, and the stop signal.

A checkpoint is a directory that transformers and vLLM load as a model. Everything else that a run needs to go on lies
in its folder `training`, because vLLM reads every *.safetensors beside the model. Files are written aside and renamed:
a kill at any moment leaves the last good state.
"""

import dataclasses
import datetime
import fcntl
import functools
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import policy
from algorithm import own_attributes
from distributed import StopRun, all_gather_json, barrier, rank, say, world_size, write_json
from flags import one_line
from text import without_secrets

KEEP = 2  # checkpoints of a run
LOGS = ("metrics.jsonl", "trajectories.jsonl")  # what is logged after a checkpoint is dropped by a resume


class Interrupted(Exception):
    """A signal asked to stop; the run is saved."""


class StopSignal:
    """SIGINT and SIGTERM ask the run to save and stop: after the current step, or immediately during an evaluation (the
    run is saved before each). A second SIGINT stops it at once."""

    def __init__(self):
        self.received = 0
        for number in SIGNALS:
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        say("stopping: finishing what is running, then saving (press Ctrl-C again to stop at once)")

    def on_any_rank(self) -> int:
        return max(all_gather_json(self.received)) if world_size() > 1 else self.received

    def leave_evaluation(self, record, episode):
        if self.received:
            raise Interrupted(self.received)


SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def restored():
    """Afterwards, signals are handled as before and locks are released."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        while _locks:
            os.close(_locks.pop())


_locks = []


def lock(run: Path):
    """Keeps other processes out of the run, or another directory, until `restored` ends, or this process does. Every
    rank must call. Raises ValueError if another process is in it."""
    free = True
    if rank() == 0:
        _locks.append(os.open(run, os.O_RDONLY))
        try:
            fcntl.flock(_locks[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            say(f"{run} is on a file system without locks: nothing keeps a second process from training it, too")
    if not all(all_gather_json(free)):
        raise ValueError(f"another process is training in {run}; wait for it, or stop it")


# ------------------------------------------------------------------------------------------------- directory of a run


def task_ids(tasks) -> dict:
    return {domain: [task.id for task in tasks[domain]] for domain in tasks}


def read_config(kind, run: Path):
    """(settings as a dataclass `kind`, whole contents) of a run's config.json. Raises ValueError if the run cannot be
    resumed."""
    path = run / "config.json"
    if not path.is_file():
        raise ValueError(f"cannot resume {run}: there is no {path}")
    if (run / "report.md").exists():
        raise ValueError(f"cannot resume {run}: it is finished; see {run / 'report.md'}")
    try:
        config = json.loads(path.read_bytes())
        settings = kind(**{f.name: config[f.name] for f in dataclasses.fields(kind)})
    except (ValueError, TypeError, KeyError) as error:
        why = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"cannot resume {run}: {path} is damaged ({why})") from error
    return settings, config


def check_own_code(given, args, config):
    """Raises ValueError unless the user of --resume names the code that the run's config.json names, and it is the
    same: a run from elsewhere must not bring code along."""
    if given.cl_algorithm != args.cl_algorithm:
        flag = f"--cl_algorithm {args.cl_algorithm}"
        raise ValueError(f"{given.resume} runs code of its own; if you trust it, add {flag}")
    path = Path(args.cl_algorithm.rpartition(":")[0])
    if path.is_file() and sum_of(path) != config["algorithm_sum"]:
        raise ValueError(f"{path} has changed since {given.resume} was started (its sha256 is not algorithm_sum there)")


def new_run(args, train_tasks, eval_tasks) -> Path:
    """Makes the run's directory with its settings. Raises ValueError if the directory exists."""
    algorithm_name = args.cl_algorithm.rpartition(":")[2]
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = all_gather_json(args.run_name or f"{algorithm_name}_seed{args.seed}_{stamp}")[0]
    run = Path(args.runs_dir) / name
    if any(all_gather_json(run.exists())):
        raise ValueError(f"run directory {run} exists; choose another --run_name, or continue it with --resume {run}")
    if rank() == 0:
        temporary = run.with_name(f".{run.name}.tmp")  # a kill leaves no run without settings
        shutil.rmtree(temporary, ignore_errors=True)
        (temporary / "checkpoints").mkdir(parents=True)
        config = {**dataclasses.asdict(args), "run_name": name, "command": command_line()}
        code = Path(args.cl_algorithm.rpartition(":")[0])
        config["algorithm_sum"] = sum_of(code) if code.is_file() else None
        config["revision"] = revision()
        config.update(train_tasks=task_ids(train_tasks), eval_tasks=task_ids(eval_tasks))
        write_json(temporary / "config.json", config)
        os.replace(temporary, run)
    barrier()
    return run


@functools.cache
def revision() -> str:
    """The last git commit that changed this code, with "-changed" if it has been changed since; without git, a sum of
    its files."""
    root = Path(__file__).parent
    files = sorted(str(path) for path in root.glob("*.py"))

    def git(*words):
        return subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("log", "-1", "--format=%h", "--abbrev=12", "--", *files)
        if commit:  # else the repository is not this code's
            return commit + ("-changed" if git("status", "--porcelain", "--", *files) else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:12]


def command_line() -> str | None:
    """The command that started this run; None if it was started from code."""
    script = Path(sys.argv[0])
    if script.suffix != ".py":
        return None
    launcher = ["torchrun", f"--nproc_per_node={world_size()}"] if world_size() > 1 else ["python"]
    return without_secrets(shlex.join([*launcher, script.name, *sys.argv[1:]]))


# --------------------------------------------------------------------------------------------------------- checkpoints


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, the oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("[0-9]*") if path.is_dir())


def remove_old(run, keep=KEEP):
    for old in checkpoints(run)[:-keep] if rank() == 0 else ():
        shutil.rmtree(old)


def save(trainer):
    """Writes a checkpoint. Every rank must call. Raises StopRun on every rank if it cannot be written."""
    trainer.state |= {"seconds": trainer.seconds, "cpu_seconds": trainer.cpu_seconds}
    trainer.started, trainer.cpu_started = time.perf_counter(), time.process_time()
    weights, tensors = policy.gathered_weights(trainer.model), gather(trainer)
    failure = None
    if rank() == 0:
        folder, earlier = trainer.run / "checkpoints", checkpoints(trainer.run)
        try:
            write(trainer, folder, earlier, weights, tensors)
        except Exception as error:  # a full disk reaches us as OSError, SafetensorError or RuntimeError
            shutil.rmtree(folder / "saving.tmp", ignore_errors=True)
            kept = f"; {earlier[-1].name} is intact" if earlier else ""
            failure = f"cannot write a checkpoint in {folder}: {error}{kept}"
    failure = all_gather_json(failure)[0]
    if failure:
        raise StopRun(failure)


def gather(trainer) -> dict[str, dict]:
    """The tensors of each file, whole on rank 0: AdamW's moments, the reference policy, what the algorithms keep."""
    moments = {
        f"{name}/{key}": policy.gathered(value)
        for name, p in policy.trained_parameters(trainer.model).items()
        for key, value in trainer.optimizer.state.get(p, {}).items()
    }
    files = {"optimizer": moments}
    if trainer.reference is not None:
        files["reference"] = policy.gathered_snapshot(trainer.model, trainer.reference)
    for k, algorithm in enumerate(trainer.algorithms):
        files[f"algorithm_{k}"] = algorithm.tensors()
    return files


def write(trainer, folder, earlier, weights, tensors):
    """Writes a checkpoint aside, renames it, and moves the link LAST to it."""
    temporary = folder / "saving.tmp"
    training = temporary / "training"
    shutil.rmtree(temporary, ignore_errors=True)
    training.mkdir(parents=True)
    policy.save_policy(trainer.model, trainer.tokenizer, temporary, weights)
    for name, found in tensors.items():
        save_file(found, training / f"{name}.safetensors")
    if trainer.trajectory_buffer is not None:
        trainer.trajectory_buffer.save(training / "buffer.json")
    saved = {
        "state": trainer.state,
        "scores": trainer.scores,
        "algorithms": [algorithm.state_dict() for algorithm in trainer.algorithms],
        "logs": {name: size_of(trainer.run / name) for name in LOGS},
        "config": sum_of(trainer.run / "config.json"),
        "sums": {str(path.relative_to(temporary)): sum_of(path) for path in files_in(temporary)},
    }
    write_json(training / "state.json", {**saved, "sum": sum_of_json(saved)})
    final = folder / f"{int(earlier[-1].name.split('-')[0]) + 1 if earlier else 0:05d}-step{trainer.step}"
    os.replace(temporary, final)
    link_last(final)
    remove_old(trainer.run)
    warn_of_unsaved_state(trainer)


def link_last(checkpoint):
    link = checkpoint.with_name("LAST.tmp")
    link.unlink(missing_ok=True)
    link.symlink_to(checkpoint.name)
    os.replace(link, checkpoint.with_name("LAST"))


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def size_of(path) -> int:
    return path.stat().st_size if path.exists() else 0


def sum_of(path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sum_of_json(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def warn_of_unsaved_state(trainer):
    """Says once which attributes of a class of the user's own a resumed run would lose."""
    for algorithm, before in zip(trainer.algorithms, trainer.own_attributes, strict=False):
        now = own_attributes(algorithm, trainer.args)
        lost = ", ".join(name for name, value in now.items() if before.get(name) != value)
        if lost:
            say(f"{type(algorithm).__name__} changes {lost}, which --resume would lose: write a state_dict for it")
            trainer.own_attributes = []


def read(folder: Path) -> dict:
    """The saved state. Rank 0 looks whether every file is as it was written: those of the checkpoint, the run's
    settings, and what was logged before. Every rank must call. Raises ValueError, naming the file that is not, or that
    cannot be read."""
    saved = failure = None
    if rank() == 0:
        try:
            saved = check_all(folder)
        except (ValueError, OSError) as error:
            failure = str(error)
    saved, failure = all_gather_json([saved, failure])[0]
    if failure:
        raise ValueError(failure)
    return saved


def check_all(folder: Path) -> dict:
    run, saved = folder.parent.parent, verify(folder)
    if sum_of(run / "config.json") != saved["config"]:
        raise ValueError(f"cannot resume {run}: its config.json has been changed; restore it")
    for name, size in saved["logs"].items():
        if size_of(run / name) < size:
            raise ValueError(f"cannot resume {run}: {name} has less than the {size} bytes that were logged; restore it")
    metrics = (run / "metrics.jsonl").read_bytes() if saved["logs"]["metrics.jsonl"] else b""
    for number, line in enumerate(metrics[: saved["logs"]["metrics.jsonl"]].splitlines(), 1):
        try:
            json.loads(line)
        except ValueError as error:
            raise ValueError(f"cannot resume {run}: line {number} of metrics.jsonl is damaged ({error})") from error
    return saved


def verify(folder: Path, model_only=False) -> dict:
    """The contents of a checkpoint's state.json. Raises ValueError if it or another file of the checkpoint is not as it
    was written. model_only: looks at the model's files only."""
    try:
        saved = json.loads((folder / "training" / "state.json").read_bytes())
        if saved.pop("sum") != sum_of_json(saved):
            raise ValueError("training/state.json has been changed")
        for name, expected in saved["sums"].items():
            if model_only and name.startswith("training/"):
                continue
            if not (folder / name).exists():
                raise ValueError(f"{name} is missing")
            if sum_of(folder / name) != expected:
                raise ValueError(f"{name} has been changed")
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise damaged(folder, error, advise=not model_only) from error
    return saved


def damaged(folder, error, advise=True) -> ValueError:
    """advise: say how to continue the run."""
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    if not advise:
        return ValueError(f"checkpoint {folder} is damaged ({reason})")
    others = [path.name for path in checkpoints(folder.parent.parent) if path.name < folder.resolve().name]
    advice = f"remove that directory to continue from {others[-1]}" if others else "there is none before it"
    return ValueError(f"checkpoint {folder} is damaged ({reason}); {advice}")


def load(trainer, folder: Path, saved: dict):
    """Puts a trainer, whose model is loaded already, back to where the checkpoint was saved. Raises ValueError for a
    damaged file, and if other parameters were trained."""
    training = folder / "training"
    parameters = policy.trained_parameters(trainer.model)
    try:
        trainer.state.update(saved["state"])
        trainer.scores = saved["scores"]
        if set(trainer.state) != set(saved["state"]):
            raise ValueError(f"its state.json has no {', '.join(set(trainer.state) - set(saved['state']))}")
        with safe_open(training / "optimizer.safetensors", "pt") as moments:
            other = other_parameters(parameters, moments)
            for path in moments.keys() if not other else ():
                name, _, key = path.rpartition("/")
                tensor = moments.get_tensor(path)
                if key != "step":
                    tensor = policy.placed_like(tensor, parameters[name])
                trainer.optimizer.state[parameters[name]][key] = tensor
        if not other:
            if (training / "reference.safetensors").exists():
                with safe_open(training / "reference.safetensors", "pt") as tensors:
                    trainer.reference = policy.snapshot_from(trainer.model, tensors.get_tensor)
            for k, (algorithm, state) in enumerate(zip(trainer.algorithms, saved["algorithms"], strict=True)):
                algorithm.load_state_dict(state)
                with safe_open(training / f"algorithm_{k}.safetensors", "pt") as tensors:
                    algorithm.load_tensors(tensors)
            if trainer.trajectory_buffer is not None:
                trainer.trajectory_buffer.load(training / "buffer.json")
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise damaged(folder, error) from error
    if other:
        raise ValueError(
            f"cannot resume {trainer.run}: other parameters were trained in it, see {', '.join(other[:3])}"
        )
    if rank() == 0:  # what a kill may have left undone
        link_last(folder)
        remove_old(trainer.run, 1 if any(a.keeps_no_data for a in trainer.algorithms) else KEEP)
        for name, size in saved["logs"].items():  # what was logged after the checkpoint will be logged again
            if size_of(trainer.run / name) > size:
                os.truncate(trainer.run / name, size)


def other_parameters(parameters, moments) -> list[str]:
    """Those that are trained now or were when the moments were saved, but not both in the same shape."""
    paths = [path for path in moments.keys() if path.endswith("/exp_avg")]  # noqa: SIM118 (it is no dict)
    saved = {(path.rpartition("/")[0], tuple(moments.get_slice(path).get_shape())) for path in paths}
    trained = {(name, tuple(p.shape)) for name, p in parameters.items()}
    return sorted({name for name, _ in saved ^ trained}) if saved else []
