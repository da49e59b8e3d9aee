"""Hostile command lines and files for every script: does each end in one clear line?

    python experiments/fuzz.py                                         300 cases for each script
    python experiments/fuzz.py --scripts eval.py --seed 0 --only 19    one case again, with what it prints

Flags and types are those that a script hands to tyro. A case is a fork of this process, which has imported all scripts,
in a directory of its own with runs, an evaluation and other files, one of them perhaps damaged. It must end with 0 and
nothing on stderr, or with 2, one line there and nothing half-written; and it may not change files of others.
"""

import contextlib
import importlib
import json
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import time
import types
from collections import Counter
from dataclasses import dataclass, field, is_dataclass
from multiprocessing import connection, get_context
from pathlib import Path
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# A server that refuses to answer, no hub, and plain text.
os.environ |= {"OPENAI_BASE_URL": "http://127.0.0.1:9", "OPENAI_API_KEY": "none", "HF_HUB_OFFLINE": "1"}
os.environ |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "100"}

import distributed  # noqa: F401 (sets what other libraries read when they are imported)

# isort: split
from tqdm import tqdm

import environment
from experiments import runner
from experiments.runner import Several, run_command, show_table
from flags import Count, Few, Seed
from text import printable

# Small commands. A case takes one of its script's, changes some of its flags, and adds others.
SMALL = {
    "train.py": (
        "--task_order mock --max_tasks_per_domain None --num_steps_per_task 1 --num_samples_per_prompt 2 "
        "--batch_size_per_gpu 1 --warmup_steps 0 --eval_trials 1 --max_turns 2 --max_new_tokens 4 --vllm_timeout 1",
        "--resume stopped",
    ),
    "merge.py": ("--runs run run --method running --base run/checkpoints/LAST --output merged",),
    "server.py": ("--model_name_or_path run/checkpoints/LAST --directory handed --model_dtype float32",),
    "eval.py": (
        "--model_name_or_path run/checkpoints/LAST --domains mock --max_turns 2 --max_new_tokens 4",
        "--model_name_or_path run/checkpoints/LAST --domains mock --output evaluation",
        "--compare run run2 --output comparison",
        "--show run",
    ),
    "oracle.py": ("--domain mock",),
    "experiments/adaptive.py": ("--seeds 0 --steps 1",),
    "experiments/benchmark.py": ("--prompt_tokens 8 --turns 1 --update_tokens 8 --repeats 1 --tasks 1 --samples 1",),
    "experiments/channels.py": ("--users 5 --past 1 --epochs 1 --hidden 4 --layers 1 --arms naive --workers 1",),
    "experiments/digits.py": ("--iterations 1 --arms naive --scenarios task --workers 1",),
    "experiments/embedded.py": ("--arms sequential --seeds 0 --workers 1",),
    "experiments/kills.py": ("--output out --kills 0",),
    "experiments/soak.py": ("--output out --steps 1",),
}
# Their jobs take minutes: a case that works for LONG_SECONDS is stopped, and may say so.
LONG = ("experiments/embedded.py", "experiments/kills.py", "experiments/soak.py")
LONG_SECONDS = 5
HEAVY = {"shape", "oracle"}  # flags that are not drawn: they take minutes by themselves
SECONDS = 120  # another case that takes longer is a finding
MADE = ("run", "run2", "stopped", "evaluation")  # directories that scripts have made, see make_files
WORDS = """
    airline mock nowhere base train test all 0 create_task_1 replay sequential lwf scripted scripted-tools solo
    openai/none policy:run/checkpoints/LAST policy:folder bm25 eager flash_attention_2 run run2 stopped evaluation
    run/checkpoints/LAST run/config.json folder notes.txt pipe tiny algorithm.py:Good algorithm.py:Raises
    algorithm.py:Missing broken.py:Good notes.txt:Good pipe:Good http://127.0.0.1:9 None - ../outside
"""
VALUES = {
    int: (-1, 0, 1, 2, 3, 2**31, 2**32, 2**63, 2**64, 10**20, "1.5", ""),
    float: ("1e-308", "1e308", "nan", "inf", "-inf", "-0.0", -1, 0, 0.5, 1, 10**20, "1,5"),
    str: WORDS.split(),
}
HOSTILE = ("", " ", "\x1b[31mred\x1b[0m", "a\nb", "\u202egnirts", "x" * 5000, "\udcff", "{domain}", "%s", "/dev/null/x")
JSON_VALUES = (None, True, -1, 10**400, 1e308, "", "\ud800", "text", [], [[]], {}, {"x": 1}, [None], "airline")
ALGORITHMS = """
from algorithm import CLAlgorithm
class Good(CLAlgorithm):
    pass
class Raises(CLAlgorithm):
    def __init__(self):
        raise ValueError("no good")
"""
GOES_ON = re.compile(r"settings\.json|trials_0\.jsonl")  # in a directory that can be continued
BAR = re.compile(r"\d%\||\dit/s|\?it/s|s/it|: 0it ")  # of tqdm


@dataclass(kw_only=True)
class Args:
    """Draws hostile command lines and files for the scripts, runs them, and judges how they end."""

    cases: Count = 300
    """cases for each script"""
    seed: Seed = 0
    """seed of the cases"""
    only: int | None = None
    """play only the case with this number, and show what it prints"""
    scripts: Several[Literal[*SMALL]] = field(default_factory=lambda: list(SMALL))
    """what to run"""
    workers: Few = 2
    """cases at a time"""
    output: str = "runs/fuzz"
    """directory for table.md"""


def run_script(script):
    if "/" in script:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:  # others import it
        importlib.import_module(Path(script).stem).main()


def flags_of(script) -> dict:
    """{flag: annotated type} of a script's command line. Imports all that the script does."""

    def read(kind):
        found = {}
        for name, hint in get_type_hints(kind, include_extras=True).items():
            inner = get_args(hint)[0] if get_origin(hint) is Annotated else hint
            found |= read(inner) if is_dataclass(inner) else {name: hint}
        return found

    with mock.patch("tyro.cli", side_effect=SystemExit) as cli, contextlib.suppress(SystemExit):
        run_script(script)
    return read(cli.call_args.args[0])


def draw(hint, rng) -> list[str]:
    """Words for a flag of this type, right or wrong."""
    kind, inner = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return draw(inner[0], rng)
    if kind in (Union, types.UnionType):
        return ["None"] if rng.random() < 0.1 else draw(inner[0], rng)
    if kind is list:
        return [word for _ in range(rng.choice((0, 1, 1, 1, 2, 3))) for word in draw(inner[0], rng)]
    hostile = (kind is Literal or hint is str) and rng.random() < 0.25
    return [str(rng.choice(HOSTILE if hostile else inner or VALUES[hint]))]


def command(script, flags, rng) -> list[str]:
    """A small command with up to three flags drawn."""
    small = rng.choice(SMALL[script])
    chosen = {name: values for name, *values in (part.split() for part in f" {small}".split(" --")[1:])}
    others = sorted(flags.keys() - HEAVY)
    for name in rng.sample(others, min(len(others), rng.choice((0, 1, 1, 2, 2, 3)))):
        if flags[name] is bool:
            chosen[rng.choice(("", "no-")) + name] = []
        else:
            chosen[name] = draw(flags[name], rng)
    return [word for name, values in chosen.items() for word in (f"--{name}", *values)]


def damage(folder, rng) -> str:
    """Damages a file of a run or an evaluation. Returns which, and how."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    path = rng.choice(paths + 5 * [p for p in paths if p.parent == folder])
    data, how = path.read_bytes(), rng.choice(("value", "value", "value", "cut", "noise", "empty", "gone", "folder"))
    if how == "value" and path.suffix == ".json":
        place = whole = json.loads(data)
        while True:  # goes down to some value
            key = rng.choice(sorted(place) if isinstance(place, dict) else range(len(place)))
            if not (place[key] and isinstance(place[key], (dict, list)) and rng.random() < 0.7):
                break
            place = place[key]
        place[key] = rng.choice(JSON_VALUES)
        how = f"{key} = {json.dumps(place[key])[:50]}"
        path.write_text(json.dumps(whole))
    elif how in ("gone", "folder"):
        path.unlink()
        if how == "folder":
            path.mkdir()
    else:
        k = rng.randrange(len(data) + 1)
        changed = {"empty": b"", "cut": data[:k]}.get(how, data[:k] + rng.randbytes(3) + data[k + 3 :])
        path.write_bytes(changed)
    return f"{folder.name}/{path.relative_to(folder)}: {how}"


def make_files(folder):
    """Two finished runs, one that was stopped, an evaluation, and a user's own files."""
    (folder / "folder").mkdir(parents=True)
    (folder / "notes.txt").write_text("mine\n")
    (folder / "algorithm.py").write_text(ALGORITHMS)
    (folder / "broken.py").write_text("def broken(:\n")
    runs = [("train.py", f"--run_name {name} --runs_dir . --seed {k}") for k, name in enumerate(("run", "run2"))]
    for script, more in (*runs, ("eval.py", "--output evaluation")):
        process = start(script, f"{SMALL[script][0]} {more}".split(), folder, folder.parent)
        process.join()
        if process.exitcode:
            raise ValueError(f"{script} fails without hostility: {(folder.parent / 'stderr').read_text()}")
    shutil.copytree(folder / "run", folder / "stopped", symlinks=True)
    last = (folder / "stopped" / "checkpoints" / "LAST").resolve()
    shutil.rmtree(last)  # the one before it is from before the last evaluation
    for name in ("report.md", "summary.json"):
        (folder / "stopped" / name).unlink()


def start(script, words, folder, output):
    """The process of a script."""

    def play():
        os.setsid()
        os.chdir(folder)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(output / name, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace"))
        resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
        sys.argv = [str(ROOT / script), *words]
        runner.get_context = lambda _: get_context("fork")  # its workers need no imports, either
        run_script(script)

    process = get_context("fork").Process(target=play)
    process.start()
    return process


def stamps(folder) -> dict:
    """{path: size and time} of every file."""
    paths = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names)
    return {str(p.relative_to(folder)): (p.stat().st_size, p.stat().st_mtime_ns) for p in paths if p.is_file()}


class Case:
    def __init__(self, script, number, seed, flags, template, folder):
        rng = random.Random(f"{seed} {script} {number}")
        self.script, self.number, self.folder, self.files = script, number, folder, folder / "files"
        self.words, self.damaged = command(script, flags, rng), "nothing"
        used = [name for name in MADE if any(name in word for word in self.words)]
        shutil.copytree(template, self.files, symlinks=True, ignore=lambda folder, names: {*MADE} - {*used})
        if used and rng.random() < 0.7:
            self.damaged = damage(self.files / rng.choice(used), rng)
        os.mkfifo(self.files / "pipe")
        self.before, self.begun = stamps(self.files), time.monotonic()
        self.process = start(script, self.words, self.files, folder)

    def stop_late(self):
        late = time.monotonic() - self.begun - (LONG_SECONDS if self.script in LONG else SECONDS)
        if late > 0:
            (self.process.kill if late > 60 else self.process.terminate)()

    def end(self) -> str:
        """What is wrong with how it has ended; nothing if all is well."""
        self.process.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it may have left
        code = self.process.exitcode
        out, err = ((self.folder / name).read_bytes().decode(errors="replace") for name in ("stdout", "stderr"))
        lines = [line for line in re.split(r"[\r\n]|\x1b\[A", err) if line.strip() and not BAR.search(line)]
        usage = bool(lines) and lines[0].startswith("╭")
        after = stamps(self.files)
        own = ("stopped/", "evaluation/")  # what a resumed run or evaluation continues
        changed = [name for name in self.before if after.get(name) != self.before[name] and not name.startswith(own)]
        kept = (*own, *(re.split(GOES_ON, name)[0] for name in after if re.search(GOES_ON, name)))
        left = [name for name in after.keys() - self.before.keys() if code == 2 and not name.startswith(kept)]
        left += [name for name in after if name.endswith(".tmp")]
        rules = {
            f"traceback: {lines[-1:]}": "Traceback" in out + err,
            f"exit code {code}: {lines[-1:]}": code not in (0, 2, *((143,) if self.script in LONG else ())),
            "a library's warning": "Warning" in out + err,
            f"{len(lines)} lines on stderr: {lines[:3]}": not usage and len(lines) != bool(code),
            f"control characters: {lines[:1]}": not usage and not all(line.isprintable() for line in lines),
            f"changed {changed[:3]}": changed,
            f"left {left[:3]}": left,
        }
        return next((text for text, broken in rules.items() if broken), "")

    def show(self, wrong, seed, printed):
        again = f"python experiments/fuzz.py --scripts {self.script} --seed {seed} --only {self.number}"
        lines = ["", f"{self.script} {shlex.join(self.words)}", f"damaged: {self.damaged}", wrong or "well", again]
        for name in ("stdout", "stderr") if printed else ():
            lines.append((self.folder / name).read_bytes().decode(errors="backslashreplace"))
        tqdm.write("\n".join(printable(line, keep="\n") for line in lines))


def run_experiment(args: Args):
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    flags = {script: flags_of(script) for script in SMALL}
    for domain in ("mock", "airline", "retail", "telecom"):
        environment.all_tasks(domain)  # cases inherit what is cached
    numbers = range(args.cases) if args.only is None else [args.only]
    waiting = [(script, number) for script in args.scripts for number in numbers]
    ended, going = {script: Counter(cases=len(numbers), findings=0) for script in args.scripts}, {}
    with tempfile.TemporaryDirectory() as top, tqdm(total=len(waiting), desc="cases", mininterval=5) as bar:
        template = Path(top) / "template" / "files"
        make_files(template)
        try:
            while waiting or going:
                while waiting and len(going) < args.workers:
                    script, number = waiting.pop(0)
                    case = Case(script, number, args.seed, flags[script], template, Path(tempfile.mkdtemp(dir=top)))
                    going[case.process.sentinel] = case
                for sentinel in connection.wait(going, timeout=1):
                    case = going.pop(sentinel)
                    wrong = case.end()
                    if wrong or args.only is not None:
                        case.show(wrong, args.seed, args.only is not None)
                    found = ended[case.script]
                    found[f"exit code {case.process.exitcode}"] += 1
                    found["findings"] += bool(wrong)
                    found["seconds"] += time.monotonic() - case.begun
                    shutil.rmtree(case.folder)
                    bar.update()
                for case in going.values():
                    case.stop_late()
        finally:
            for case in going.values():  # after Ctrl-C
                os.killpg(case.process.pid, signal.SIGKILL)
    show_table([{"": script, **{k: f"{v:.0f}" for k, v in sorted(c.items())}} for script, c in ended.items()], output)
    if any(counts["findings"] for counts in ended.values()):
        raise ValueError("there are findings, see above")


if __name__ == "__main__":
    run_command(Args, run_experiment)
