"""examples/generative_replay.py, as its reader runs it."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "generative_replay.py"


def run(*flags):
    return subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True, timeout=600)


def test_replay_keeps_the_first_task():
    shown = run("--iterations", "60")
    assert shown.returncode == 0, shown.stderr
    without, replay = ([float(x) for x in line.split(":")[1].split()] for line in shown.stdout.splitlines())
    assert len(without) == len(replay) == 5
    assert without[0] < 0.1 < 0.6 < replay[0] and sum(replay) > 2 * sum(without)


def test_bad_input_is_one_line():
    shown = run("--iterations", "0")
    assert shown.returncode == 2 and shown.stderr == "iterations must be at least 1, got 0\n"
