"""Evaluates any model on tau2's tasks: a policy, or an agent behind an API.

    python eval.py --model_name_or_path runs/NAME/checkpoints/LAST --domains airline retail telecom
    python eval.py --compare runs/a_seed0 runs/a_seed1 runs/b_seed0 runs/b_seed1
    python eval.py --show runs/NAME --worst 3

Data flow: model and tasks -> episodes -> rewards -> records -> metrics of each domain.
"""

import concurrent.futures
import dataclasses
import datetime
import functools
import json
import os
import re
import sys
from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import MinLen
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from tqdm import tqdm

import distributed
import oracle  # sets what litellm reads when it is imported
import policy
import rollout
import users

# isort: split
import litellm

from distributed import StopRun, all_gather_json, barrier, rank, world_size
from grpo import Trajectory
from metrics import cl_metrics, measure, overall, text_metrics  # noqa: F401, cl_metrics is for run.py
from report import compare, read_jsonl, show_conversations, write_text

MAX_INVALID_SHARE = 0.5  # of the conversations; with more environment errors the run stops
API_AT_ONCE, API_RETRIES = 16, 3  # conversations with an agent behind an API; repetitions of a failed request


@dataclasses.dataclass(kw_only=True)
class Flags:
    """Evaluation."""

    eval_split: str = "test"
    """tau2's split to evaluate on. "train": the training tasks"""
    eval_max_tasks: PositiveInt | None = None
    """evaluate on the first tasks of each domain only, this many"""
    eval_trials: PositiveInt = 1
    """conversations per task in an evaluation"""


# ------------------------------------------------------------------------------------------------------- evaluation


def score_and_record(episode, trajectory) -> dict:
    """Sets the trajectory's reward and the episode's `reward_info`, and returns a record of the conversation as JSON.
    If the environment or the evaluator failed, the trajectory becomes invalid and the record's reward is None."""
    parts, episode.reward_info = {}, None
    if trajectory.valid:
        try:
            episode.reward_info = oracle.score(episode)
            trajectory.reward = episode.reward_info.reward
            parts = oracle.reward_parts(episode.task, episode.reward_info)
        except Exception as error:  # named in the record, and counted
            trajectory.valid, trajectory.error = False, f"{type(error).__name__}: {error}"
    return {
        "time": datetime.datetime.now().isoformat(timespec="seconds"),
        "domain": trajectory.domain,
        "task_id": trajectory.task_id,
        "reward": trajectory.reward if trajectory.valid else None,
        "reward_parts": parts,
        "tool_accuracy": oracle.tool_accuracy(episode),
        "termination": trajectory.termination,
        "error": trajectory.error,
        "tokens": sum(trajectory.action_mask),
        "turns": episode.turns,
        "tool_calls": episode.calls,
        "failed_calls": episode.failed_calls,
        "truncated": trajectory.truncated,
        "messages": [m.model_dump(exclude_none=True, exclude={"timestamp", "requestor"}) for m in episode.messages],
    }


def stop_if_invalid(records):
    """Raises StopRun, with the first error, if more than MAX_INVALID_SHARE of the conversations are invalid."""
    invalid = [r for r in records if r["reward"] is None]
    if len(invalid) > MAX_INVALID_SHARE * len(records):
        first = invalid[0]
        raise StopRun(
            f"{len(invalid)} of {len(records)} conversations ended in an error of the environment; the first, in "
            f"{first['domain']} task {first['task_id']}: {first['error']}"
        )


def evaluate_tasks(
    model,
    tokenizer,
    tasks_by_domain,
    num_trials=1,
    user="scripted",
    max_turns=30,
    seed=0,
    at_once=256,
    label="evaluate",
    known=(),
    on_records=None,
    on_record=None,
    **sampling,
) -> dict:
    """{domain: metrics (see `measure`), trials and user} of the given tasks, on every rank. Each rank plays `at_once`
    conversations at a time.

    `model`: a policy; or the litellm name of a model behind an API, with tokenizer None. `sampling`: arguments of
    rollout.rollout, or of `play_api`. `known`: records of trials that are not played again. `on_records(records)`:
    called with the records of all ranks. `on_record(record, episode)`: called when a conversation ends, on the rank
    that played it; it may raise to stop. Raises StopRun, see `stop_if_invalid`.
    """
    jobs = {
        (domain, task.id, trial): task
        for trial in range(num_trials)
        for domain, tasks in tasks_by_domain.items()
        for task in tasks
    }
    known = {(r["domain"], r["task_id"], r["trial"]): r for r in known}
    todo = [(key, task) for key, task in jobs.items() if key not in known]
    if isinstance(model, str):
        play = functools.partial(play_api, llm=model, seed=seed, **sampling)
    else:
        generator = distributed.seeded_generator(model.device, seed, rank(), *([len(known)] if known else []))
        play = functools.partial(rollout.rollout, model, tokenizer, generator=generator, **sampling)
    records = []
    stride = at_once * world_size()
    with tqdm(total=len(todo[rank() :: world_size()]), desc=label, leave=False, disable=rank() > 0) as bar:

        def finish(episode, trajectory):
            records.append({**score_and_record(episode, trajectory), "trial": trials[id(episode)]})
            bar.update()
            if on_record is not None:
                on_record(records[-1], episode)

        for begin in range(0, len(todo), stride):  # as often on every rank: each time sharded models are gathered
            batch = todo[begin : begin + stride][rank() :: world_size()]
            episodes = [oracle.Episode(domain, task, user, max_turns) for (domain, _, _), task in batch]
            trials = {id(episode): trial for episode, ((_, _, trial), _) in zip(episodes, batch, strict=True)}
            play(episodes=episodes, on_finish=finish)
    records = [record for part in all_gather_json(records) for record in part]
    records += [record for key, record in known.items() if key in jobs]
    stop_if_invalid(records)
    if on_records is not None:
        on_records(records)
    about = {"trials": num_trials, "user": user}
    return {
        domain: {**measure([r for r in records if r["domain"] == domain], domain, tasks, num_trials), **about}
        for domain, tasks in tasks_by_domain.items()
    }


def evaluate(model, tokenizer, domain, split="test", max_tasks=None, **kwargs) -> dict:
    """The metrics of one domain's split; see `evaluate_tasks`."""
    tasks = oracle.load_tasks(domain, split, max_tasks)
    return {"split": split, **evaluate_tasks(model, tokenizer, {domain: tasks}, **kwargs)[domain]}


# ------------------------------------------------------------------------------------------ an agent behind an API


def is_api_model(name, api_base=None) -> bool:
    """Whether `name` is the litellm name of a model behind an API."""
    return api_base is not None or (not Path(name).is_dir() and name.split("/")[0] in litellm.provider_list)


def play_api(episodes, llm, on_finish, temperature=0.7, max_new_tokens=2048, **llm_args):
    """Plays the episodes with an agent behind an API, by its litellm name, API_AT_ONCE of them at a time. A request
    that fails is repeated API_RETRIES times, with litellm's back-off; then its episode is invalid. `llm_args`:
    litellm's (api_base, seed, ...). `on_finish(episode, trajectory)` is called when one ends."""
    limits = {"temperature": temperature, "max_tokens": max_new_tokens, "num_retries": API_RETRIES, "timeout": 300}

    def converse(episode):
        trajectory = Trajectory(episode.domain, str(episode.task.id))
        try:
            messages = [{"role": "system", "content": episode.system}, *episode.opening()]
            while not episode.done:
                asked = {"messages": messages, "tools": episode.tools, "tool_choice": "auto"}
                response = litellm.completion(llm, **asked, **limits, **llm_args)
                choice, usage = response.choices[0], response.get("usage")
                trajectory.action_mask += [True] * (usage.completion_tokens if usage else 0)  # only their number counts
                trajectory.truncated_turns += choice.finish_reason == "length"
                calls = [
                    {"id": f"call_{len(messages)}_{k}", "type": "function", "function": call.function.model_dump()}
                    for k, call in enumerate(choice.message.tool_calls or [])
                ]
                said = {"role": "assistant", "content": choice.message.content or ""}
                messages.append({**said, "tool_calls": calls} if calls else said)
                answers = episode.act({**said, "tool_calls": calls})
                ids = [call["id"] for call in calls] or [None] * len(answers)
                for answer, call_id in zip(answers, ids, strict=False):
                    messages.append({**answer, "tool_call_id": call_id} if answer["role"] == "tool" else answer)
        except Exception as error:  # of the network, the server, or the user: named in the record, and counted
            trajectory.valid = False
            trajectory.error = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            episode.stop("agent_error")
        trajectory.termination, trajectory.messages = episode.termination, episode.messages
        return episode, trajectory

    pool = concurrent.futures.ThreadPoolExecutor(API_AT_ONCE)
    try:
        for future in concurrent.futures.as_completed([pool.submit(converse, episode) for episode in episodes]):
            on_finish(*future.result())
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


# ------------------------------------------------------------------------------------------------------- the script


USUAL = {  # the settings that a checkpoint's run gives, and their defaults
    "split": Flags.eval_split,
    "temperature": rollout.Flags.temperature,
    "max_new_tokens": rollout.Flags.max_new_tokens,
    "max_turns": oracle.Flags.max_turns,
    "model_dtype": policy.Flags.model_dtype,
    "retrieval": oracle.Flags.retrieval,
}
LIMITS = ("max_context", "max_user_tokens", "max_tool_tokens")


@dataclasses.dataclass
class Args:
    """Evaluates a model on tau2's domains, compares finished runs, or shows conversations."""

    model_name_or_path: str | None = None
    """directory or hub name of a causal LM whose chat template takes tools; or a litellm name such as openai/NAME"""
    api_base: str | None = None
    """address of an OpenAI-compatible server of the model"""
    domains: Annotated[list[str], MinLen(1)] = field(default_factory=lambda: list(oracle.DOMAINS))
    """tau2's domains to evaluate on"""
    split: str | None = None
    """tau2's split. Default: as in the checkpoint's run, else test"""
    max_tasks: PositiveInt | None = None
    """evaluate on the first tasks of each split, this many. Default: as in the checkpoint's run, else all"""
    num_trials: PositiveInt = 1
    """conversations per task. pass^1 to pass^num_trials are reported"""
    user: str = "scripted"
    """scripted, scripted-tools, solo, a litellm name such as openai/NAME, or policy:PATH; see train.py"""
    user_api_base: str | None = None
    """address of an OpenAI-compatible server of the user's model"""
    user_temperature: NonNegativeFloat = 0.0
    """sampling temperature of the user's model"""
    retrieval: str | None = None
    """see train.py. Default: as in the checkpoint's run, else bm25"""
    judge: str | None = None
    """litellm name of the model that judges assertions in words (retail in tau2 1.0). Default: they are left out"""
    judge_api_base: str | None = None
    """address of an OpenAI-compatible server of the judge"""
    temperature: NonNegativeFloat | None = None
    """sampling temperature. Default: as in the checkpoint's run, else 0.7"""
    max_new_tokens: PositiveInt | None = None
    """sampled tokens per agent turn. Default: as in the checkpoint's run, else 2048"""
    max_turns: PositiveInt | None = None
    """agent turns per conversation. Default: as in the checkpoint's run, else 30"""
    model_dtype: Literal[*policy.DTYPES] | None = None
    """type to compute in. Default: as in the checkpoint's run, else bfloat16"""
    seed: NonNegativeInt = 0
    """seed of the sampling"""
    output: str | None = None
    """directory for the results; trials in it are not repeated. Default: runs/evaluation_MODEL_SPLIT_USER, or
    runs/comparison"""
    at_once: PositiveInt = 256
    """conversations at a time on each rank"""
    compare: list[str] = field(default_factory=list)
    """instead, compare these finished runs: Markdown tables, CSV, pictures"""
    show: str | None = None
    """instead, print conversations of this run or evaluation, the smallest reward first"""
    worst: PositiveInt = 5
    """number of conversations to show"""
    task: str | None = None
    """show conversations of the task with this id only"""
    unfold: bool = False
    """show tool calls and their results in full"""


def resolved(name, prefix="") -> str:
    """The real path of a directory: the link LAST will be another checkpoint later."""
    path = Path(name.removeprefix(prefix))
    return prefix + str(path.resolve()) if name.startswith(prefix) and path.is_dir() else name


def complete(args: Args) -> tuple[Args, dict, dict]:
    """(args with their defaults, the settings that decide the outcome of a trial as JSON, tasks by domain). Raises
    ValueError for what cannot be evaluated."""
    if args.model_name_or_path is None:
        raise ValueError("name a model with --model_name_or_path, or runs with --compare")
    if len(set(args.domains)) != len(args.domains):
        raise ValueError(f"domains must name each domain once, got {args.domains}")
    users.check(args.user)
    model = Path(args.model_name_or_path)
    run = model.resolve().parent.parent / "config.json"  # of the run that wrote this checkpoint
    config = json.loads(run.read_text()) if model.is_dir() and run.is_file() else {}
    chosen = config.get("eval_tasks", {}) if args.split is None and args.max_tasks is None else {}
    of_run = {**USUAL, **config, "split": config.get("eval_split", USUAL["split"])}
    args = dataclasses.replace(args, **{name: of_run[name] for name in USUAL if getattr(args, name) is None})
    oracle.use_judge(args.judge, args.judge_api_base)
    oracle.use_retrieval(args.retrieval)
    names = ("api_base", "judge", "user_api_base", "user_temperature", "seed", *USUAL)
    settings = {
        "model": resolved(args.model_name_or_path),
        "user": resolved(args.user, "policy:"),
        **{name: getattr(args, name) for name in names},
        **{name: config.get(name) for name in LIMITS},
        **oracle.data_version(),
    }
    tasks = {domain: oracle.load_tasks(domain, args.split, args.max_tasks) for domain in args.domains}
    for domain in set(chosen) & set(tasks):
        tasks[domain] = [task for task in tasks[domain] if task.id in chosen[domain]]
    return args, settings, tasks


def read_trials(folder) -> list[dict]:
    """The trials in a folder, each once."""
    records = [record for path in sorted(folder.glob("trials*.jsonl")) for record in read_jsonl(path)]
    return list({(r["domain"], r["task_id"], r["trial"]): r for r in records}.values())


def merge_trials(folder) -> list[dict]:
    """Puts the trials of all ranks into one file, trials.jsonl. A kill at any moment loses none."""
    records = read_trials(folder)
    write_text(folder / "trials.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    for path in folder.glob("trials_*.jsonl"):
        path.unlink()
    return records


def open_folder(folder, settings) -> list[dict]:
    """Makes the folder, or continues it. Returns its valid trials. Raises ValueError if it has other contents, or
    trials with other settings."""
    path = folder / "config.json"
    before = json.loads(path.read_text()) if path.is_file() else settings
    for name in settings:
        if before.get(name) != settings[name]:
            made = f"were made with {name} {before.get(name)}, not {settings[name]}"
            raise ValueError(f"the trials in {folder} {made}; choose another --output")
    if not path.is_file() and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no evaluation; choose another --output")
    barrier()  # every rank has looked
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        distributed.write_json(path, settings)
        merge_trials(folder)
    barrier()
    return [record for record in read_trials(folder) if record["reward"] is not None]


def run_evaluation(args: Args):
    """Plays the missing trials, writes metrics.json, table.md and tau2's results, and prints the table."""
    args, settings, tasks = complete(args)
    device = distributed.init_distributed()
    slug = re.sub(r"[^\w.-]+", "_", f"{settings['model']}_{settings['split']}_{settings['user']}")
    folder = Path(args.output or f"runs/evaluation_{slug}")
    sampling = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    if is_api_model(args.model_name_or_path, args.api_base):
        model, tokenizer = args.model_name_or_path, None
        sampling |= users.served_at(args.api_base)
    else:
        model, tokenizer = policy.load_policy(args.model_name_or_path, args.model_dtype, device)
        sampling |= {name: settings[name] for name in LIMITS}
    known = open_folder(folder, settings)
    users.prepare(args.user, args.user_api_base, args.user_temperature, args.model_dtype, device, seed=args.seed)

    def keep(record, episode):
        simulation = oracle.simulation(episode, episode.reward_info, record["trial"], args.seed)
        rest = {name: value for name, value in record.items() if name != "messages"}
        with open(folder / f"trials_{rank()}.jsonl", "a") as lines:
            lines.write(json.dumps({**rest, "simulation": simulation.model_dump(mode="json")}) + "\n")

    about = {"user": args.user, "max_turns": args.max_turns, "seed": args.seed}
    playing = {"at_once": args.at_once, "known": known, "on_record": keep}
    metrics = evaluate_tasks(model, tokenizer, tasks, args.num_trials, **about, **playing, **sampling)
    barrier()
    if rank() > 0:
        return
    wanted = {(domain, task.id, k) for domain in tasks for task in tasks[domain] for k in range(args.num_trials)}
    trials = [r for r in merge_trials(folder) if (r["domain"], r["task_id"], r["trial"]) in wanted]
    metrics["overall"] = overall(metrics, trials, tasks)
    distributed.write_json(folder / "metrics.json", {**settings, "num_trials": args.num_trials, "metrics": metrics})
    (folder / "tau2").mkdir(exist_ok=True)
    for domain in tasks:
        simulations = [r["simulation"] for r in trials if r["domain"] == domain and r["reward"] is not None]
        about |= {"model": settings["model"], "num_trials": args.num_trials}
        oracle.tau2_results(domain, tasks[domain], simulations, **about).save(folder / "tau2" / f"{domain}.json")
    table = text_metrics(metrics)
    write_text(folder / "table.md", table + "\n")
    print(f"{settings['model']}, {args.split} split, {args.user} user, {settings['tau2']}\n\n{table}\n\n{folder}")


def main():
    try:
        args = distributed.checked(Args, vars(tyro.cli(Args)))
        if args.show:
            colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
            print(show_conversations(args.show, args.worst, args.task, args.unfold, colour))
        elif args.compare:
            output = args.output or "runs/comparison"
            print(f"{compare(args.compare, output)}\n\n{output}/comparison.png, learning_curves.png, comparison.csv")
        else:
            run_evaluation(args)
    except (ValueError, OSError, StopRun) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
