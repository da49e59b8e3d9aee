"""Evaluates any model on tau2's tasks: a policy, or an agent behind an API.

    python eval.py --model_name_or_path runs/NAME/checkpoints/LAST --domains airline retail telecom
    python eval.py --compare runs/a_seed0 runs/a_seed1 runs/b_seed0 runs/b_seed1
    python eval.py --show runs/NAME --worst 3

Data flow: model and tasks -> episodes -> rewards -> records -> metrics of each domain.
"""

import dataclasses
import datetime
import functools
import json
import re
from pathlib import Path
from typing import Annotated, Literal

import joblib
import tyro
from annotated_types import MinLen
from pydantic import AfterValidator, Field
from tqdm import tqdm

import checkpoint
import distributed
import environment
import oracle
import policy
import rollout
import users
import variants
from distributed import StopRun, all_gather_json, barrier, rank, world_size
from flags import Count, Few, PositiveShare, Seed, checked, errors_in_one_line
from grpo import PASS, Trajectory
from metrics import cl_metrics, measure, overall, text_metrics  # noqa: F401 (cl_metrics is a public name of eval)
from report import read_jsonl, show_conversations
from text import reason, without_secrets

MAX_INVALID_SHARE = 0.5  # of the conversations; with more environment errors the run stops
AT_ONCE = 256  # conversations with a policy, on each rank
API_AT_ONCE, API_RETRIES = 16, 3  # conversations with an agent behind an API; repetitions of a failed request
MAX_TOKENS = 10**6  # of one answer, whatever its server claims


def _without_overflow(temperature):
    if 0 < temperature < 0.01:
        raise ValueError(f"a temperature must be 0, or at least 0.01, got {temperature}")
    return temperature


Temperature = Annotated[float, Field(ge=0, le=100), AfterValidator(_without_overflow)]


@dataclasses.dataclass(kw_only=True)
class Flags:
    """Evaluation."""

    eval_split: str = "test"
    """tau2's split to evaluate on. "train": the training tasks"""
    eval_max_tasks: Count | None = None
    """evaluate on the first tasks of each domain only, this many"""
    eval_trials: Few = 1
    """conversations per task in an evaluation"""
    pass_threshold: PositiveShare = PASS
    """a conversation passes with this reward or more. Default: tau2's, 1"""


def score_and_record(episode, trajectory, evaluation_type="all", scored=True) -> dict:
    """Sets the trajectory's reward and the episode's `reward_info`, and returns a record of the conversation as JSON.
    If the environment or the evaluator failed, the trajectory becomes invalid and the record's reward is None; if the
    agent made it fail, the reward is 0 (see oracle.score). "error" is the reason of both. scored: False calls no
    evaluator; the reward is None, too."""
    parts, episode.reward_info = {}, None
    if trajectory.valid and scored:
        try:
            episode.reward_info = oracle.score(episode, evaluation_type)
            trajectory.reward, trajectory.termination = episode.reward_info.reward, episode.termination
            trajectory.error = (episode.reward_info.info or {}).get("error", "")  # what the agent has broken
            parts = oracle.reward_parts(episode.task, episode.reward_info, evaluation_type)
        except Exception as error:  # named in the record, and counted
            trajectory.valid, trajectory.error = False, reason(error)
    return {
        "time": datetime.datetime.now().isoformat(timespec="seconds"),
        **{name: getattr(trajectory, name) for name in ("domain", "task_id", "termination", "error", "truncated")},
        "reward": trajectory.reward if trajectory.valid and scored else None,
        "reward_parts": parts,
        "tool_accuracy": oracle.tool_accuracy(episode) if scored else None,
        "tokens": sum(trajectory.action_mask),
        "turns": episode.turns,
        "tool_calls": episode.calls,
        "failed_calls": episode.failed_calls,
        "messages": [m.model_dump(exclude_none=True, exclude={"timestamp", "requestor"}) for m in episode.messages],
    }


def stop_if_invalid(records):
    """Raises StopRun, with the first error, if more than MAX_INVALID_SHARE of the conversations are invalid."""
    invalid = [r for r in records if r["reward"] is None and r["error"]]
    if len(invalid) > MAX_INVALID_SHARE * len(records):
        where = "{domain} task {task_id}: {error}".format(**invalid[0])
        raise StopRun(f"{len(invalid)} of {len(records)} conversations ended in an error (the first in {where})")


def evaluate_tasks(
    model,
    tokenizer,
    tasks_by_domain,
    num_trials=1,
    user="scripted",
    max_turns=30,
    seed=0,
    label="evaluate",
    evaluation_type="all",
    pass_threshold=PASS,
    known=(),
    on_records=lambda records: None,
    on_record=lambda record, episode: None,
    **sampling,
) -> dict:
    """{domain: metrics (see `measure`), trials and user} of the given tasks, on every rank.

    `model`: a policy; or the litellm name of a model behind an API, with tokenizer None. `sampling`: arguments of
    rollout.rollout, or of `play_api`. `known`: records of trials that are not played again. `on_records(records)`:
    called with the records of all ranks. `on_record(record, episode)`: called when a conversation ends, on the rank
    that played it; it may change the record, or raise to stop. Raises StopRun, see `stop_if_invalid`.
    """
    jobs = {(d, task.id, k): task for k in range(num_trials) for d, tasks in tasks_by_domain.items() for task in tasks}
    known = {(r["domain"], r["task_id"], r["trial"]): r for r in known}
    todo = [job for job in jobs.items() if job[0] not in known]
    if isinstance(model, str):
        play = functools.partial(play_api, llm=model, seed=seed, **sampling)
    else:
        generator = distributed.seeded_generator(model.device, seed, rank(), *([len(known)] if known else []))
        play = functools.partial(rollout.rollout, model, tokenizer, generator=generator, **sampling)
    records = []
    with tqdm(total=len(todo[rank() :: world_size()]), desc=label, leave=False, disable=rank() > 0) as bar:

        def finish(episode, trajectory):
            records.append({**score_and_record(episode, trajectory, evaluation_type), "trial": trials[id(episode)]})
            bar.update()
            on_record(records[-1], episode)

        stride = AT_ONCE * world_size()
        for begin in range(0, len(todo), stride):  # as often on every rank: each time sharded models are gathered
            batch = todo[begin : begin + stride][rank() :: world_size()]
            episodes = [oracle.Episode(domain, task, user, max_turns) for (domain, _, _), task in batch]
            trials = {id(episode): trial for episode, ((_, _, trial), _) in zip(episodes, batch, strict=True)}
            play(episodes=episodes, on_finish=finish)
    records = [record for part in all_gather_json(records) for record in part]
    records += [record for key, record in known.items() if key in jobs]
    stop_if_invalid(records)
    on_records(records)
    settings = (num_trials, user, evaluation_type, pass_threshold)
    found = {domain: measure(records, domain, tasks, *settings) for domain, tasks in tasks_by_domain.items()}
    return {domain: {**metrics, "trials": num_trials, "user": user} for domain, metrics in found.items()}


def evaluate(model, tokenizer, domain, split="test", max_tasks=None, **kwargs) -> dict:
    """The metrics of one domain's split; see `evaluate_tasks`."""
    tasks = oracle.load_tasks(domain, split, max_tasks)
    return {"split": split, **evaluate_tasks(model, tokenizer, {domain: tasks}, **kwargs)[domain]}


def play_api(episodes, llm, on_finish, temperature=0.7, max_new_tokens=2048, **llm_args):
    """Plays the episodes with an agent behind an API, by its litellm name, API_AT_ONCE of them at a time. A request
    that fails is repeated API_RETRIES times, with litellm's back-off; then its episode is invalid. `llm_args`:
    litellm's (api_base, seed, ...). `on_finish(episode, trajectory)` is called when one ends."""
    limits = {"temperature": temperature, "max_tokens": max_new_tokens, "num_retries": API_RETRIES, "timeout": 300}
    litellm = environment.language_models().litellm

    def converse(episode):
        trajectory = Trajectory(episode.domain, str(episode.task.id))
        try:
            messages = [{"role": "system", "content": episode.system}, *episode.opening()]
            while not episode.done:
                response = litellm.completion(llm, messages, tools=episode.tools, **limits, **llm_args)
                if not response.choices:
                    raise ValueError("the server's answer has no choices")
                choice, usage = response.choices[0], response.get("usage")
                tokens = usage.completion_tokens if usage else 0
                trajectory.action_mask += [True] * min(tokens, MAX_TOKENS)  # only their number counts
                trajectory.truncated_turns += choice.finish_reason == "length"
                calls = [call.model_dump() for call in choice.message.tool_calls or []]
                said = {"role": "assistant", "content": choice.message.content or ""}
                said |= {"tool_calls": calls} if calls else {}
                answers = episode.act(said)
                for call, answer in zip(calls, answers, strict=False):  # a user answers without an id
                    answer["tool_call_id"] = call["id"]
                messages += environment.clean([said, *answers])
        except Exception as error:  # of the network, the server, or the user: named in the record, and counted
            trajectory.valid = False
            trajectory.error = reason(error)
            episode.stop("agent_error")
        trajectory.termination = episode.termination
        return episode, trajectory

    parallel = joblib.Parallel(API_AT_ONCE, prefer="threads", return_as="generator_unordered")
    for end in parallel(joblib.delayed(converse)(episode) for episode in episodes):
        on_finish(*end)


USUAL = {  # the settings that a checkpoint's run gives, and their defaults
    "split": Flags.eval_split,
    "temperature": rollout.Flags.temperature,
    "max_new_tokens": rollout.Flags.max_new_tokens,
    "max_turns": oracle.Flags.max_turns,
    "model_dtype": policy.Flags.model_dtype,
    "retrieval": oracle.RETRIEVAL,
    "evaluation_type": oracle.Flags.evaluation_type,
    "pass_threshold": Flags.pass_threshold,
}
ASKED = ("api_base", "judge", "user_api_base", "user_temperature", "seed")
LIMITS = ("max_context", "max_user_tokens", "max_tool_tokens")


@dataclasses.dataclass
class Args:
    """Evaluates a model on tau2's domains, compares finished runs, or shows conversations."""

    model_name_or_path: str | None = None
    """directory or hub name of a causal LM whose chat template takes tools; or a litellm name such as openai/NAME"""
    api_base: str | None = None
    """address of an OpenAI-compatible server of the model"""
    domains: Annotated[list[str], MinLen(1)] = dataclasses.field(default_factory=lambda: list(oracle.DOMAINS))
    """tau2's domains to evaluate on. airline~1 is a variant of airline, with other names and ids"""
    split: str | None = None
    """tau2's split. Default: as in the checkpoint's run, else test"""
    max_tasks: Count | None = None
    """evaluate on the first tasks of each split, this many. Default: as in the checkpoint's run, else all"""
    num_trials: Few = 1
    """conversations per task. pass^1 to pass^num_trials are reported"""
    user: str = "scripted"
    """scripted, scripted-tools, solo, a litellm name such as openai/NAME, or policy:PATH; see train.py"""
    user_api_base: str | None = None
    """address of an OpenAI-compatible server of the user's model"""
    user_temperature: Temperature = 0.0
    """sampling temperature of the user's model"""
    retrieval: str | None = None
    """how the agent of banking_knowledge (tau2 1.0) reads documents: bm25 (the default), bm25_grep, grep_only,
    golden_retrieval, full_kb, no_knowledge, or another of tau2's that needs a server"""
    judge: str | None = None
    """litellm name of the model that judges assertions in words (retail in tau2 1.0). Default: they are left out"""
    judge_api_base: str | None = None
    """address of an OpenAI-compatible server of the judge"""
    temperature: Temperature | None = None
    """sampling temperature. Default: as in the checkpoint's run, else 0.7"""
    max_new_tokens: Count | None = None
    """sampled tokens per agent turn. Default: as in the checkpoint's run, else 2048"""
    max_turns: Count | None = None
    """agent turns per conversation. Default: as in the checkpoint's run, else 30"""
    model_dtype: Literal[*policy.DTYPES] | None = None
    """type to compute in. Default: as in the checkpoint's run, else bfloat16"""
    evaluation_type: oracle.EvaluationType | None = None
    """parts of tau2's reward that count. Default: as in the checkpoint's run, else all"""
    pass_threshold: PositiveShare | None = None
    """a conversation passes with this reward or more. Default: as in the checkpoint's run, else tau2's, 1"""
    seed: Seed = 0
    """seed of the sampling"""
    output: str | None = None
    """directory of results, whose trials are kept. Default: runs/evaluation_MODEL_SPLIT_USER, or runs/comparison"""
    compare: list[str] = dataclasses.field(default_factory=list)
    """instead, compare these finished runs: tables, tests, CSV, pictures"""
    baseline: str | None = None
    """test them against this arm, by its name in the table. Default: sequential"""
    show: str | None = None
    """instead, print conversations of this run or evaluation, the smallest reward first"""
    worst: Count = 5
    """number of conversations to show"""
    task: str | None = None
    """show conversations of the task with this id only"""
    unfold: bool = False
    """show tool calls and their results in full"""


def resolved(name, prefix="") -> str:
    """The real path of a directory: the link LAST will be another checkpoint later."""
    path = Path(name.removeprefix(prefix))
    return prefix + str(path.resolve()) if name.startswith(prefix) and path.is_dir() else name


@dataclasses.dataclass(kw_only=True)
class OfRun(policy.Flags, oracle.Flags, rollout.Flags, Flags):
    """What an evaluation takes from the run that wrote a checkpoint."""

    seed: Seed = 0
    eval_tasks: dict[str, list[str]] = dataclasses.field(default_factory=dict)


def read_run(model: Path) -> dict:
    """These settings of a checkpoint's run; defaults where there is none. Raises ValueError for a damaged file."""
    path = model.resolve().parent.parent / "config.json"
    try:
        config = {**json.loads(path.read_bytes())} if model.is_dir() and path.is_file() else {}
        kept = {f.name: config[f.name] for f in dataclasses.fields(OfRun) if f.name in config}
        return vars(checked(OfRun, kept))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error})") from error


def complete(args: Args) -> tuple[Args, dict, dict]:
    """(args with their defaults, the settings that decide the outcome of a trial as JSON, tasks by domain). Raises
    ValueError for what cannot be evaluated."""
    args = checked(Args, vars(args))
    if args.model_name_or_path is None:
        raise ValueError("name a model with --model_name_or_path, or runs with --compare")
    users.check(args.user)
    model = Path(args.model_name_or_path)
    if (model / "training" / "state.json").is_file():
        checkpoint.verify(model, model_only=True)
    config = read_run(model)
    chosen = config["eval_tasks"] if args.split is None and args.max_tasks is None else {}
    of_run = {**USUAL, **config, "split": config["eval_split"]}
    args = dataclasses.replace(args, **{name: of_run[name] for name in USUAL if getattr(args, name) is None})
    oracle.use_judge(args.judge, args.judge_api_base)
    oracle.use_retrieval(args.retrieval)
    settings = {
        "model": resolved(args.model_name_or_path),
        "user": resolved(args.user, "policy:"),
        **{name: getattr(args, name) for name in (*ASKED, *USUAL) if name != "pass_threshold"},
        **{name: config[name] for name in LIMITS},
        **oracle.data_version(),
    }
    for name in ("api_base", "user_api_base"):  # a password in an address is given again, not kept
        settings[name] = settings[name] and without_secrets(settings[name])
    cut = (args.max_tasks, config["train_split"], config["seed"])
    tasks = {domain: oracle.load_tasks(domain, args.split, *cut) for domain in args.domains}
    for domain in tasks:
        wanted = chosen.get(domain) or chosen.get(variants.original(domain))  # of a variant: those of its original
        tasks[domain] = [task for task in tasks[domain] if wanted is None or task.id in wanted]
    return args, settings, tasks


def read_trials(folder) -> list[dict]:
    """The trials in a folder, each once: the valid one, if there are several."""
    records = [r for path in sorted(folder.glob("trials*.jsonl")) for r in read_jsonl(path)]
    records.sort(key=lambda r: r["reward"] is not None)
    return list({(r["domain"], r["task_id"], r["trial"]): r for r in records}.values())


def open_folder(folder, settings) -> list[dict]:
    """Makes the folder, or continues it. Returns its valid trials. Raises ValueError if it has other contents, or
    trials with other settings."""
    path = folder / "config.json"
    if not path.is_file() and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and holds no evaluation; choose another --output")
    before = json.loads(path.read_bytes()) if path.is_file() else settings
    for name, value in settings.items():
        made = before.get(name, USUAL.get(name))  # a version without this setting had its default
        if made != value:
            other = f"{name} {made}, not {value}"
            raise ValueError(f"the trials in {folder} were made with {other}; choose another --output")
    known = [record for record in read_trials(folder) if record["reward"] is not None]
    barrier()  # every rank has read them
    folder.mkdir(parents=True, exist_ok=True)
    if rank() == 0:
        distributed.write_json(path, settings)
    return known


def run_evaluation(args: Args):
    """Plays the missing trials, writes metrics.json, table.md and tau2's results, and prints the table."""
    args, settings, tasks = complete(args)
    device = distributed.init_distributed()
    slug = re.sub(r"[^\w.-]+", "_", f"{settings['model']}_{settings['split']}_{settings['user']}")
    folder = Path(args.output or f"runs/evaluation_{slug}")
    sampling = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens}
    model, tokenizer = args.model_name_or_path, None
    providers = () if Path(model).is_dir() else environment.language_models().litellm.provider_list
    if args.api_base is not None or model.split("/")[0] in providers:
        sampling |= users.served_at(args.api_base)
    else:
        model, tokenizer = policy.load_policy(model, args.model_dtype, device)
        sampling |= {name: settings[name] for name in LIMITS}
    users.prepare(args.user, args.user_api_base, args.user_temperature, args.model_dtype, device, seed=args.seed)
    for domain, task in [(d, task) for d in tasks for task in tasks[d]]:
        oracle.Episode(domain, task, users.scripted_like(args.user), args.max_turns)  # ValueError: it cannot be played
    known = open_folder(folder, settings)  # last: before it, nothing is written

    def keep(record, episode):
        simulation = oracle.simulation(episode, episode.reward_info, record["trial"], args.seed)
        record["simulation"] = simulation.model_dump(mode="json")
        del record["messages"]  # the simulation has them
        with open(folder / f"trials_{rank()}.jsonl", "a", encoding="utf-8") as lines:
            lines.write("\n" + json.dumps(record))  # on a line of its own, even if a kill cut the last one short

    trials = []
    about = {"user": args.user, "max_turns": args.max_turns, "seed": args.seed}
    sampling |= {"known": known, "on_record": keep, "on_records": trials.extend}
    sampling |= {"evaluation_type": args.evaluation_type, "pass_threshold": args.pass_threshold}
    metrics = evaluate_tasks(model, tokenizer, tasks, args.num_trials, **about, **sampling)
    if rank() > 0:
        return
    metrics["overall"] = overall(metrics, trials, tasks)
    settings |= {"num_trials": args.num_trials, "pass_threshold": args.pass_threshold}
    distributed.write_json(folder / "metrics.json", {**settings, "metrics": metrics})
    (folder / "tau2").mkdir(exist_ok=True)
    about |= {"model": settings["model"], "num_trials": args.num_trials}
    for domain in tasks:
        simulations = [r["simulation"] for r in trials if r["domain"] == domain and r["reward"] is not None]
        oracle.tau2_results(domain, tasks[domain], simulations, **about).save(folder / "tau2" / f"{domain}.json")
    table, header = text_metrics(metrics), [f"{args.split} split", f"{args.user} user", settings["tau2"]]
    header += [f"{args.evaluation_type} part of the reward only"] if args.evaluation_type != "all" else []
    distributed.write_text(folder / "table.md", table + "\n")
    print(f"{settings['model']}, {', '.join(header)}\n\n{table}\n\n{folder}")


def main():
    with errors_in_one_line("eval.py", StopRun):
        args = checked(Args, vars(tyro.cli(Args)))
        if args.show:
            print(show_conversations(args.show, args.worst, args.task, args.unfold))
        elif args.compare:
            output = args.output or "runs/comparison"
            from comparison import compare  # here, because only this needs it

            print(compare(args.compare, output, args.baseline))
            print(f"\n{output}: comparison.md, comparison.csv, comparison.png, learning_curves.png, p_values.png")
        else:
            run_evaluation(args)


if __name__ == "__main__":
    main()
