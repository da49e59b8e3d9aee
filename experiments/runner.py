"""What the experiments share: flags, jobs in processes of their own, intervals, tables, and one line for each error.

A job is (arm, seed), or (scenario, arm, seed). Its result is written as soon as it is there, and is not computed again.
"""

import contextlib
import json
import math
import os
import signal
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import pandas
import torch
import tyro
from annotated_types import MinLen
from pydantic import AfterValidator
from tqdm import tqdm

from comparison import holm, sign_flip_test
from distributed import StopRun, write_json, write_text
from flags import Few, Seed, checked, one_line
from regularize import CPO, EWC, OnlineEWC
from report import interval
from text import printable

EWC_DECAY = 0.95  # of online_ewc's running Fisher information
NOT_SETTINGS = ("seeds", "arms", "scenarios", "output", "workers")  # flags that do not change a job's result


def _distinct(values):
    if len(set(values)) < len(values):
        raise ValueError(f"each value may be named once, got {values}")
    return values


Several = Annotated[list[TypeVar("T")], MinLen(1), AfterValidator(_distinct)]


@dataclass(kw_only=True)
class Flags:
    """Which jobs run."""

    seeds: Several[Seed] = field(default_factory=lambda: [0])
    """seeds of data, weights, batches and noise"""
    output: str
    """directory for results, tables and pictures. Finished jobs there are not run again"""
    workers: Few | None = None
    """jobs at a time. Default: one per CPU core; one on a GPU"""


def of_arm(arm, args) -> EWC | None:
    """The penalty of an arm of the supervised experiments, if it has one."""
    if arm == "cpo":
        return CPO(args.cpo_lambda)
    if arm == "online_ewc":
        return OnlineEWC(args.ewc_lambda, EWC_DECAY)
    weights = {"ewc": args.ewc_lambda, "er_plus": args.er_plus_lambda}
    return EWC(weights[arm]) if arm in weights else None


def size(model) -> int:
    """Bytes of a model's tensors; 0 for None."""
    return sum(value.nbytes for value in model.state_dict().values()) if model is not None else 0


def start_worker():
    """A worker has one thread: on a busy machine, threads that wait for each other are dozens of times slower. It ends
    when the main process dies."""
    torch.set_num_threads(1)

    def end_with_parent():
        parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def run_job(args, function, job, path: Path):
    """Writes function(args, *job) to `path`. Raises ValueError if that raises one, or has a number that is not finite,
    and RuntimeError for any other error: not every error reaches the main process as it is."""
    name = " ".join(map(str, job))
    try:
        result = function(args, *job)
    except (ValueError, OSError) as error:
        raise ValueError(f"{name}: {error}") from error
    except Exception as error:
        raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
    try:
        json.dumps(result, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{name}: {error} (is the learning rate too high?)") from error
    write_json(path, result)


def read_result(job, path):
    """A job's result, or None if there is no file. Raises ValueError if the file holds something else."""
    if not path.exists():
        return None
    with contextlib.suppress(ValueError, TypeError):
        result = json.loads(path.read_bytes())
        if [result[name] for name in ("scenario", "arm", "seed") if name in result] == list(job):
            return result
    raise ValueError(f"{path} is damaged; remove it, and it will be made again")


def run_jobs(args, function, jobs, prepare=None) -> list[dict]:
    """function(args, *job) for each job, args.workers at a time, in processes of their own.

    Results are JSON files below args.output. prepare(jobs) is called with the jobs that have no result yet, before they
    start. Raises ValueError if args.output holds results of other settings, or a damaged one.
    """
    results = Path(args.output) / "results"
    results.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in asdict(args).items() if name not in NOT_SETTINGS}
    written = results.parent / "settings.json"
    if any(results.glob("*.json")) and not (written.exists() and json.loads(written.read_bytes()) == settings):
        raise ValueError(f"{args.output} holds results of other settings; see {written}, or choose another --output")
    write_json(written, settings)
    paths = {job: results / f"{'_'.join(map(str, job)).replace(' ', '_')}.json" for job in jobs}
    todo = [job for job in jobs if read_result(job, paths[job]) is None]
    if prepare and todo:
        prepare(todo)
    workers = args.workers or (1 if torch.cuda.is_available() else os.cpu_count())
    workers = max(1, min(workers, len(todo)))  # all of them start with the first job
    # Workers inherit that Ctrl-C is ignored: it is for this process, which then stops them.
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker)
    futures = [pool.submit(run_job, args, function, job, paths[job]) for job in todo]
    started = active_children()
    signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        with tqdm(desc="jobs", total=len(jobs), initial=len(jobs) - len(todo)) as bar:
            for done in as_completed(futures):
                done.result()
                bar.update()
    except BrokenProcessPool as error:
        pool.shutdown()
        killed = -signal.SIGKILL in [worker.exitcode for worker in started]
        reason = "was killed, perhaps for lack of memory (try fewer --workers)" if killed else "failed, see above"
        raise BrokenProcessPool(f"a worker {reason}") from error
    except BaseException:
        for worker in active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [read_result(job, path) for job, path in paths.items()]


def cell(values, digits=2) -> str:
    """Mean and 95% interval as text, such as "0.93 ± 0.02"."""
    mean, half = interval(values)
    return f"{mean:.{digits}f}" if math.isnan(half) else f"{mean:.{digits}f} ± {half:.{digits}f}"


def p_values(values, baseline) -> dict[str, str]:
    """{arm: p of its difference from the baseline, as text} for `values`, {arm: a number of each seed}: the exact
    paired sign-flip test, with Holm's correction over the arms."""
    others = [arm for arm in values if arm != baseline and baseline in values]
    found = [sign_flip_test(np.subtract(values[arm], values[baseline])) for arm in others]
    return {arm: f"{p:.3f}" for arm, p in zip(others, holm(found), strict=True)}


def show_table(rows, output):
    """Prints rows, dicts of text, as a Markdown table, and writes it to table.md."""
    table = pandas.DataFrame(rows).fillna("").to_markdown(index=False, disable_numparse=True)
    print(table)
    write_text(output / "table.md", table + "\n")


@contextlib.contextmanager
def picture(path, rows, columns, size, **kwargs):
    """Yields the panels to draw in, rows x columns of them. Afterwards adds the legend of the first panel, and writes
    the file."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    plt.style.use(["petroff10", {"font.size": 8, "axes.titlesize": 8, "savefig.dpi": 200}])
    figure, panels = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **kwargs)
    yield list(panels.flat)
    for axes in panels.flat:
        axes.set(visible=axes.has_data())
    handles, labels = panels.flat[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(path)
    plt.close(figure)


def run_command(settings, function):
    """Calls function(an instance of the dataclass `settings`, from the command line). An error is one line, with an
    exit code of 2 (bad input), 1 (a worker ended), 130 (Ctrl-C) or 143 (SIGTERM)."""
    args = tyro.cli(settings)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    code, goes_on = 0, f"; finished jobs are in {args.output}; the same command goes on"
    try:
        checked(settings, vars(args))
        function(args)
    except (ValueError, OSError, ImportError, StopRun) as error:
        code, line = 2, f"{Path(sys.argv[0]).name}: {one_line(error)}"
    except BrokenProcessPool as error:
        code, line = 1, f"{error}{goes_on}"
    except (KeyboardInterrupt, SystemExit) as stop:
        begun = (Path(args.output) / "results").is_dir() or any(Path(args.output).glob("*/config.json"))
        code, line = getattr(stop, "code", 130), "stopped" + (goes_on if begun else "")
    finally:
        signal.signal(signal.SIGTERM, before)
    if code:
        print(printable(line), file=sys.stderr)
    raise SystemExit(code)
