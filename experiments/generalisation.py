"""What has a run learnt, and what has it memorised? Its tasks, and variants of them with other names and ids.

    python experiments/generalisation.py --runs runs/NAME ...      a minute each, then the table

Counted are the tasks whose original gold conversation fails in the variants (variants.py): who has only memorised it
gets 0. The others name nothing that the reward depends on. A run's result stays in its variants.json.
"""

import functools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import distributed  # sets what transformers reads when it is imported

# isort: split
import numpy as np
from annotated_types import MinLen

import eval as evaluation
import oracle
import policy
import users
import variants
from comparison import group_runs
from environment import all_tasks
from experiments import runner
from flags import Few
from report import read_summary


@dataclass(kw_only=True)
class Args:
    """Evaluates finished runs on variants of the tasks that they were evaluated on."""

    runs: Annotated[list[str], MinLen(1)]
    """directories of finished runs"""
    variants: Few = 3
    """variants of each task"""
    trials: Few = 8
    """conversations per variant"""
    output: str = "runs/generalisation"
    """directory for the table"""


def with_old_gold(variant, task) -> oracle.Episode:
    """The gold actions and facts of the original, played in the variant."""
    original = all_tasks(variants.original(variant))[task.id].evaluation_criteria
    episode = oracle.Episode(variant, task, max_turns=100)
    for action in original.actions or []:
        if not episode.done:
            call = {"function": {"name": action.name, "arguments": action.arguments}}
            episode.act({"role": "assistant", "content": None, "tool_calls": [call]})
    while not episode.done:
        words = " ".join(["Done.", *(original.communicate_info or [])])
        episode.act(oracle.DONE if episode.solo else {"content": words})
    return episode


@functools.cache
def tells_apart(variant, task_id, evaluation_type) -> bool:
    """Whether who has memorised the original fails in the variant."""
    return oracle.score(with_old_gold(variant, all_tasks(variant)[task_id]), evaluation_type).reward < 1.0


def evaluated(run: Path, args) -> dict:
    """{variant: {task id: mean reward}} of a run's last policy, of the tasks that count. Made once."""
    path, made = run / "variants.json", {"variants": args.variants, "trials": args.trials}
    if path.exists():
        result = json.loads(path.read_bytes())
        if {name: result[name] for name in made} != made:
            raise ValueError(f"{path} was made with other settings; remove it, and it will be made again")
        return result["by_task"]
    settings = evaluation.read_run(run / "checkpoints" / "LAST")
    if not settings["eval_tasks"]:
        raise ValueError(f"{run} has no checkpoint to evaluate")
    tasks, reward = {}, settings["evaluation_type"]
    for domain, ids in settings["eval_tasks"].items():
        for variant in [f"{domain}~{seed}" for seed in range(1, args.variants + 1)]:
            tasks[variant] = [all_tasks(variant)[task_id] for task_id in ids if tells_apart(variant, task_id, reward)]
    tasks = {variant: chosen for variant, chosen in tasks.items() if chosen}
    users.prepare(settings["user"], os.environ.get("OPENAI_BASE_URL"), model_dtype=settings["model_dtype"])
    model, tokenizer = policy.load_policy(str(run / "checkpoints" / "LAST"), settings["model_dtype"])
    about = {name: settings[name] for name in ("user", "max_turns", "evaluation_type", "pass_threshold")}
    sampling = {name: settings[name] for name in ("temperature", "max_new_tokens", *evaluation.LIMITS)}
    found = evaluation.evaluate_tasks(model, tokenizer, tasks, args.trials, label=run.name, **about, **sampling)
    result = {variant: values["by_task"] for variant, values in found.items()}
    distributed.write_json(path, {**made, "by_task": result})
    return result


def scores(run: Path, found) -> dict[str, tuple[float, float]]:
    """{domain: (mean reward of its tasks, of their variants)}, of the tasks that count and have a result in both."""
    trained = read_summary(run)["evaluation"]
    pairs = {}
    for variant, by_task in found.items():
        domain = variants.original(variant)
        known = trained[domain]["by_task"]
        pairs.setdefault(domain, []).extend((known[id], mean) for id, mean in by_task.items() if id in known)
    return {domain: tuple(np.mean(values, 0)) for domain, values in pairs.items() if values}


def run_experiment(args: Args):
    table, _ = group_runs(args.runs)
    found = {run: scores(run, evaluated(run, args)) for run in table.index}
    rows = []
    for arm, runs in table.groupby("algorithm", sort=False):
        of_arm = [found[run] for run in runs.index]
        for domain in dict.fromkeys(domain for values in of_arm for domain in values):
            own, varied = zip(*[values[domain] for values in of_arm if domain in values], strict=True)
            cells = {"tasks": runner.cell(own), "their variants": runner.cell(varied)}
            rows.append({"algorithm": arm, "domain": domain, "seeds": str(len(own)), **cells})
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=True)
    runner.show_table(rows, output)


if __name__ == "__main__":
    runner.run_command(Args, run_experiment)
