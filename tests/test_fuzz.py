"""experiments/fuzz.py finds what is planted and nothing else; and what it has found, case by case."""

import json
import subprocess
import sys
import time

import pytest

import algorithm
import eval as evaluation
import train
from experiments import adaptive, benchmark, channels, digits, fuzz
from flags import checked

ROOT = fuzz.ROOT


def test_some_cases_of_the_scripts_end_well(tmp_path):
    scripts = ["train.py", "eval.py", "oracle.py"]
    command = [sys.executable, "experiments/fuzz.py", "--cases", "4", "--output", tmp_path, "--scripts", *scripts]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    rows = [line.split("|")[1:3] for line in (tmp_path / "table.md").read_text().splitlines()[2:]]
    assert [[cell.strip() for cell in row] for row in rows] == [[script, "4"] for script in scripts]


BAD = {  # a script, and what is wrong with it
    "print('{}')": "",
    "sys.exit('usage')": "exit code 1",
    "1 / 0": "traceback: ['ZeroDivisionError: division by zero']",
    "sys.stderr.write('one\\ntwo\\n'); sys.exit(2)": "2 lines on stderr: ['one', 'two']",
    "sys.exit(2)": "0 lines on stderr",
    "sys.stderr.write('\\x1b[31mred\\n'); sys.exit(2)": "control characters",
    "sys.stderr.write('DeprecationWarning: old\\n')": "a library's warning",
    "open('mine.txt', 'w'); sys.stderr.write('no\\n'); sys.exit(2)": "left ['mine.txt']",
    "open('other/notes.txt', 'w')": "changed ['other/notes.txt']",
    "open('done.tmp', 'w')": "left ['done.tmp']",
    "time.sleep(600)": "exit code -15",
}


@pytest.mark.parametrize("code", BAD)
def test_a_planted_defect_is_found(code, tmp_path, monkeypatch):
    (tmp_path / "template" / "other").mkdir(parents=True)
    (tmp_path / "template" / "other" / "notes.txt").write_text("mine")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "script.py").write_text(f"import sys, time\n{code}\n")
    monkeypatch.setattr(fuzz, "ROOT", tmp_path)
    monkeypatch.setitem(fuzz.SMALL, "bad/script.py", ("",))
    case = fuzz.Case("bad/script.py", 0, 0, {}, tmp_path / "template", tmp_path)
    while "sleep" in code and case.process.is_alive():
        time.sleep(1)
        case.begun -= fuzz.SECONDS
        case.stop_late()
    assert case.end().startswith(BAD[code]) and bool(case.end()) == bool(BAD[code])


def test_flags_are_those_of_the_script():
    flags = fuzz.flags_of("train.py")
    assert len(flags) > 60 and {"seed", "ewc_lambda", "resume"} <= set(flags)
    rng = fuzz.random.Random(0)
    words = [fuzz.command("train.py", flags, rng) for _ in range(200)]
    assert words == [fuzz.command("train.py", flags, rng) for rng in [fuzz.random.Random(0)] for _ in range(200)]
    assert len({word for line in words for word in line if word.startswith("--")}) > 60


FOUND = [
    *((train.Args, name, 2**31) for name in ("num_steps_per_task", "num_samples_per_prompt", "eval_trials", "window")),
    (train.Args, "learning_rate", 1e308),
    (train.Args, "generator_update_freq", 1e-308),
    (train.Args, "temperature", 1e-308),
    (evaluation.Args, "temperature", 1e-308),
    (evaluation.Args, "num_trials", 2**31),
    (evaluation.Args, "seed", 2**64),
    (benchmark.Args, "tasks", 2**32),
    (benchmark.Args, "update_tokens", 10**20),
    (adaptive.Args, "steps", 2**64),
    (adaptive.Args, "seeds", []),
    (channels.Args, "workers", 2**64),
    (channels.Args, "epochs", 2**31),
    (digits.Args, "generator_learning_rate", 1e308),
]


@pytest.mark.parametrize("settings, name, value", FOUND)
def test_absurd_values_are_named(settings, name, value):
    with pytest.raises(ValueError, match=f"{name}|a temperature must be 0, or at least 0.01"):
        if settings is train.Args:
            train.Args(**{name: value})
        else:
            checked(settings, {**vars(settings()), name: value})


@pytest.mark.parametrize(
    "contents", [[], "text", 1, {"temperature": "hot"}, {"eval_tasks": 1}, {"seed": -1}, {"max_context": [1]}]
)
def test_wrong_types_in_a_runs_config_are_damage(contents, tmp_path):
    model = tmp_path / "checkpoints" / "00001-step1"
    model.mkdir(parents=True)
    (tmp_path / "config.json").write_text(json.dumps(contents))
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        evaluation.complete(evaluation.Args(model_name_or_path=str(model)))


def test_a_users_file_that_cannot_be_imported_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("def broken(:\n")
    with pytest.raises(ValueError, match=r"mine\.py cannot be imported: SyntaxError"):
        algorithm.load_algorithm(f"{tmp_path}/mine.py:Mine", {}, train.Args())


def test_a_tracker_without_a_key_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(ValueError, match="--tracker wandb has no key"):
        train.train(train.Args(tracker="wandb", runs_dir=str(tmp_path / "runs")))
    assert not (tmp_path / "runs").exists()
