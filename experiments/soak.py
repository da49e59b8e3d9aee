"""Does a long run leak? Many GRPO steps of a small policy on tau2's mock domain, watched from outside.

    python experiments/soak.py --output runs/soak                     10,000 steps
    python experiments/soak.py --output runs/short --steps 1500       a first look

Memory, open files, threads and CPU time of train.py, and the size of each file of the run, are sampled as it goes. Stop
it at any time: table and picture are of the samples that there are. Needs /proc (Linux).

The mock domain stands for both the current and the old domain: conversations are replayed as soon as there are any.
"""

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from distributed import append_jsonl  # sets what other libraries read when they are imported
from flags import Count

# isort: split
import numpy as np
import pandas
from scipy.special import stdtrit
from scipy.stats import linregress
from tqdm import tqdm
from transformers import Qwen2Config, Qwen2ForCausalLM

import environment
import oracle
import policy
from experiments.runner import picture, run_command, show_table
from replay import ReplayCL

SETTLED = 500  # steps until buffers are full and caches are warm
BLOCKS = 20  # a slope is fitted to the means of this many blocks: single samples depend on those before them
FLAT = 0.01  # growth after SETTLED, as a share of the mean, that counts as none
LINEAR = 0.999  # R² from which a file grows linearly
LARGE = 100_000  # bytes of a checkpoint's file in the picture
SETTINGS = """
    --task_order mock --max_tasks_per_domain 2 --eval_split train --max_turns 2 --max_new_tokens 48 --max_context 320
    --batch_size_per_gpu 2 --gradient_accumulation_steps 1 --num_samples_per_prompt 2 --model_dtype float32
    --warmup_steps 300 --warmup_target 0.8 --warmup_learning_rate 2e-3 --learning_rate 1e-6 --temperature 1
    --replay_kind trajectories --clone_coef 0.1 --replay_buffer_size 200 --buffer_policy lars --run_name run
"""


class SameDomain(ReplayCL):
    """Replay with a single domain, which is its own old one."""

    def previous_domains(self, current_domain):
        buffers = self.trainer.trajectory_buffer.buffers
        return [d for d in buffers if len(buffers[d].items) >= self.flags.min_buffer_size]


@dataclass(kw_only=True)
class Args:
    """Watches a long run of train.py."""

    output: str
    """directory for the model, the run, samples.jsonl, table.md and soak.png; it must not exist"""
    steps: Count = 10_000
    """GRPO steps"""
    every: Count = 20
    """steps between samples"""
    checkpoint_every: Count = 250
    """GRPO steps between checkpoints"""
    algorithm: str = f"{Path(__file__).resolve()}:SameDomain"
    """--cl_algorithm of the run. Default: replay of the domain itself"""


def make_model(folder):
    """Saves a Qwen2 with random weights, smaller than the embedded policy, in a new folder."""
    folder.mkdir(parents=True)
    tasks = list(environment.all_tasks("mock").values())
    _, tokenizer = policy.load_policy("tiny", "float32", "cpu", corpus=oracle.corpus("mock", tasks))
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, tie_word_embeddings=True, **shape, **ends)
    policy.save_policy(Qwen2ForCausalLM(config), tokenizer, folder)


def sample(process, run) -> dict:
    """What the process holds, and the bytes of each file of its run. Raises OSError if one of them has just gone."""
    proc, last = Path(f"/proc/{process.pid}"), (run / "checkpoints" / "LAST").resolve(strict=True)
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    times = (proc / "stat").read_text().rpartition(")")[2].split()
    return {
        "memory (MB)": int(status["VmRSS"].split()[0]) / 1024,
        "open files": len(os.listdir(proc / "fd")),
        "threads": int(status["Threads"]),
        "CPU (s)": sum(map(int, times[11:13])) / os.sysconf("SC_CLK_TCK"),
        "checkpoints": len(list((run / "checkpoints").glob("[0-9]*"))),
        **{path.name: path.stat().st_size for path in run.iterdir() if path.is_file()},
        **{f"LAST/{path.relative_to(last)}": path.stat().st_size for path in last.rglob("*") if path.is_file()},
    }


def watch(args, process, output):
    """Samples until the process ends."""
    metrics, step = output / "run" / "metrics.jsonl", 0
    while process.poll() is None and not metrics.exists():
        time.sleep(0.1)
    if not metrics.exists():
        return
    with open(metrics) as log, tqdm(desc="steps", total=args.steps) as bar:
        while process.poll() is None:
            time.sleep(0.05)
            new = sum('"kind": "step"' in line for line in log)
            bar.update(new)
            step += new
            if step // args.every > (step - new) // args.every:
                with contextlib.suppress(OSError, KeyError):  # it ends, or a checkpoint is being replaced
                    append_jsonl(output / "samples.jsonl", [{"step": step, **sample(process, output / "run")}])


def growth(values) -> dict:
    """A row of the table: how a series goes on after SETTLED steps."""
    values = values[values.index > SETTLED].dropna()
    steps = values.index.to_numpy(float)
    means = [(x.mean(), y.mean()) for x, y in zip(*(np.array_split(v, BLOCKS) for v in (steps, values)), strict=True)]
    fit, whole = linregress(*np.transpose(means)), linregress(steps, values)
    half = fit.stderr * stdtrit(BLOCKS - 2, 0.975) if np.ptp(values) else 0.0
    share = fit.slope * np.ptp(steps) / values.mean()
    form = "flat" if share < FLAT or fit.slope <= half else "linear" if whole.rvalue**2 > LINEAR else "GROWS"
    numbers = (values.iloc[0], values.iloc[-1], 1000 * fit.slope, 1000 * half)
    names = ("first", "last", "growth in 1,000 steps", "± (95%)")
    shown = {name: f"{number:,.4g}" for name, number in zip(names, numbers, strict=True)}
    return {"": values.name, **shown, "R²": f"{whole.rvalue**2:.5f}" if form != "flat" else "", "form": form}


def report(output):
    """Table and picture of the samples that there are."""
    samples = pandas.read_json(output / "samples.jsonl", lines=True).drop_duplicates("step").set_index("step")
    seconds = samples.pop("CPU (s)")
    samples.insert(0, "CPU (ms a step)", 1000 * seconds.diff() / seconds.index.to_series().diff())
    late = samples[samples.index > SETTLED]
    show_table([growth(samples[name]) for name in samples if late[name].count() >= 2 * BLOCKS], output)
    panels = {name: [name] for name in ("memory (MB)", "open files", "threads", "CPU (ms a step)")}
    panels["logs (MB)"] = [name for name in samples if name.endswith(".jsonl")]
    panels["last checkpoint (MB)"] = [n for n in samples if n.startswith("LAST/") and samples[n].max() > LARGE]
    with picture(output / "soak.png", 2, 3, (9, 5)) as places:
        for axes, (title, names) in zip(places, panels.items(), strict=True):
            files = {"label": names} if title.startswith(("logs", "last")) else {}
            axes.plot(samples.index, samples[names] / (1e6 if files else 1), **files)
            axes.set(title=title, xlabel="step", ylim=(0, 1.1 * axes.get_ylim()[1]))
            if files:
                axes.legend(fontsize=6)


def soak(args):
    output = Path(args.output)
    make_model(output / "model")
    flags = ["--model_name_or_path", str(output / "model"), "--runs_dir", str(output), *SETTINGS.split()]
    flags += ["--num_steps_per_task", str(args.steps), "--checkpoint_every", str(args.checkpoint_every)]
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--cl_algorithm", args.algorithm]
    with open(output / "train.log", "w") as shown:
        process = subprocess.Popen(command, cwd=ROOT, stdout=shown, stderr=subprocess.STDOUT)
    try:
        watch(args, process, output)
    finally:
        process.terminate()
        process.wait()
        if (output / "samples.jsonl").exists():
            report(output)
    if process.returncode:
        raise ValueError(f"train.py ended with exit code {process.returncode}; see {output / 'train.log'}")


if __name__ == "__main__":
    run_command(Args, soak)
