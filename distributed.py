"""Ranks, gathering between them, seeds; and what every file uses: whole files, checked settings, a clock.

Every other file works alike on one rank and on many.
"""

import ctypes
import datetime
import json
import os
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path

# Libraries read these when they are imported: our lines are the only ones a user sees.
for variable, value in {
    "TORCH_CPP_LOG_LEVEL": "ERROR",  # gloo reports its connections otherwise
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(variable, value)

import numpy as np
import torch
import torch.distributed as dist

from text import print_safely


class StopRun(RuntimeError):
    """The run cannot go on; the message is for the user."""


def init_distributed() -> str:
    """Joins the process group that torchrun describes, if it started us. Returns this rank's device."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        if sys.platform == "linux":  # a rank ends with its launcher, however that ends (PR_SET_PDEATHSIG)
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)
        # Ranks wait for the longest conversation of all, and for rank 0's checkpoints: hours, not minutes.
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=datetime.timedelta(hours=6))
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world_size() > 1:
        dist.barrier()


def say(text):
    """Prints above the progress bars, on rank 0 only."""
    if rank() == 0:
        print_safely(text)


def write_text(path, text):
    """Writes aside and renames: a kill leaves the old file or the new one."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path, value):
    """See `write_text`."""
    write_text(path, json.dumps(value, indent=1))


def append_jsonl(path, records):
    """One line for each record, on rank 0."""
    if rank() == 0:
        with open(path, "a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(record) + "\n" for record in records)


def all_gather_json(value) -> list:
    """Every rank's `value`, in the order of ranks. JSON, because dist.all_gather_object unpickles."""
    if world_size() == 1:
        return [json.loads(json.dumps(value))]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)], device=device))
    padded = torch.zeros(int(max(lengths)), dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    parts = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return [json.loads(part[: int(n)].cpu().numpy().tobytes()) for part, n in zip(parts, lengths, strict=True)]


def gathered_in_order(values, tasks, per_task) -> list:
    """Every rank's `values`, `per_task` for each of its tasks, in the order of all tasks (rank r has every n-th)."""
    parts = all_gather_json(values)
    ranks = len(parts)
    return [value for i in range(tasks) for value in parts[i % ranks][i // ranks * per_task :][:per_task]]


def sum_over_ranks(value):
    """The sum of every rank's number, or of each number in a dictionary."""
    parts = all_gather_json(value)
    return {name: sum(part[name] for part in parts) for name in value} if isinstance(value, dict) else sum(parts)


def seeded_generator(device, *seeds) -> torch.Generator:
    """A generator whose numbers depend on all of the seeds, which are integers from 0."""
    # The number of seeds is one of the words: by themselves (1,) and (1, 0) give the same state.
    words = np.random.SeedSequence([len(seeds), *seeds]).generate_state(2)
    return torch.Generator(device).manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


@contextmanager
def seeded(device, *seeds):
    """Inside, torch's global generators depend on the seeds; afterwards they are as before."""
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seeded_generator("cpu", *seeds).initial_seed())
        yield


class Clock(dict):
    """Seconds by name: each `lap` adds the time since the one before."""

    def __init__(self):
        self.last = time.perf_counter()

    def lap(self, name):
        now = time.perf_counter()
        self[name] = self.get(name, 0.0) + now - self.last
        self.last = now
