"""Private tau2 environments that cost a millisecond, and tool calls that are safe to carry out in them.

tau2 reads a domain's database from its files for every environment, and hashes all of it for every reward. Here the
database is read once. An environment is a copy-on-write view of it, and two environments are compared by what differs
from the pristine database.
"""

import copy
import functools
import importlib.util
import json
import logging
import math
import os
import re
import sys
import types
import warnings
from collections.abc import MutableMapping
from contextlib import suppress

# Before the first import of tau2: litellm would try the network for a price list, and tau2 logs every tool call.
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
from loguru import logger

logger.disable("tau2")


class Later(types.ModuleType):
    """Stands for a module of functions, and imports it when one of them is called for the first time."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: getattr(language_models(), name)(*args, **kwargs)


@functools.cache
def language_models() -> types.ModuleType:
    """tau2's module that asks models behind an API. Neither it nor litellm may print parts of a server's answer."""
    del sys.modules[LANGUAGE_MODELS]
    module = importlib.import_module(LANGUAGE_MODELS)
    module.print = lambda *_: None
    logging.getLogger("LiteLLM").setLevel(logging.CRITICAL)
    return module


LANGUAGE_MODELS = "tau2.utils.llm_utils"
sys.modules[LANGUAGE_MODELS] = Later(LANGUAGE_MODELS)  # its litellm takes 40% of a script's start

from tau2.data_model.message import ToolCall
from tau2.data_model.tasks import Task
from tau2.environment.environment import Environment
from tau2.registry import registry

import variants

V1 = None  # tau2_v1.py, if tau2 1.x is installed
if importlib.util.find_spec("tau2.runner"):
    import tau2_v1 as V1

# A tool stores whatever the agent passed, so a dump may hold a string where the schema says a number.
warnings.filterwarnings("ignore", message="Pydantic serializer warnings")
warnings.filterwarnings("ignore", message="Items? .* on TypedDict class")  # litellm's own types, at a first request

MAX_TEXT = 20_000  # characters of one message, or of one tool call's arguments
MAX_CALLS = 100  # tool calls of one message
MAX_VALUES = 100  # JSON values in one tool call's arguments: pydantic writes a paragraph for each that is wrong
MAX_EXPRESSION = 500  # characters: whether Python can compile thousands of signs depends on the stack it is called from


class CopyOnWrite(dict):
    """A table of a shared database. A record is copied the first time it is reached by its key.

    `touched` holds the keys whose records may differ from the pristine table. `.values()` gives the shared records;
    tau2's tools only read those (tests check the pristine hash).
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
        self.get(key)  # copies the record, which the caller may change
        self.touched.add(key)
        return super().pop(key, *default)

    # dict's own methods would bypass those above.
    get, setdefault, update = MutableMapping.get, MutableMapping.setdefault, MutableMapping.update
    popitem, clear = MutableMapping.popitem, MutableMapping.clear


def _private_db(db):
    fields = {name: getattr(db, name) for name in type(db).model_fields}
    private = {k: CopyOnWrite(v) if isinstance(v, dict) else copy.deepcopy(v) for k, v in fields.items()}
    return db.model_copy(update=private)


def _private_toolkit(toolkit):
    if toolkit is None:
        return None
    twin = copy.copy(toolkit)
    for name, value in vars(toolkit).items():
        if name == "db":
            twin.db = value and _private_db(value)
        elif type(value).__module__ != "tau2.knowledge.pipeline":  # an index of documents, which no tool changes
            setattr(twin, name, copy.deepcopy(value))
    return twin


def registered(domain: str) -> str:
    """The name of a domain that tau2 has an environment and tasks for, or of a variant of one (variants.py); ValueError
    for any other."""
    if domain not in registry.get_domains() and variants.register(domain):
        return domain
    known = sorted(set(registry.get_domains()) & set(registry.get_task_sets()))
    if domain not in known:
        raise ValueError(f"unknown domain {domain!r}; choose one of {', '.join(known)}, or register it with tau2 first")
    return domain


@functools.cache
def all_tasks(domain: str) -> dict[str, Task]:
    """Every task of a domain, by its id, in tau2's order. Tasks are shared and must not be changed."""
    return {task.id: task for task in registry.get_tasks_loader(registered(domain))(None)}


@functools.cache
def template(domain: str, solo: bool) -> Environment:
    """The pristine environment, as tau2 builds it. It is shared, and must not be changed."""
    build = registry.get_env_constructor(registered(domain))
    if V1:
        build = functools.partial(V1.build, build, domain)
    return build(solo_mode=True) if solo else build()


def make_env(domain, task=None, solo=False) -> Environment:
    """A private environment in the task's initial state. Raises ValueError if the domain has no solo mode."""
    pristine = template(domain, solo)
    env = copy.copy(pristine)
    env.tools = _private_toolkit(pristine.tools)
    env.user_tools = _private_toolkit(pristine.user_tools)
    if env.user_tools is not None and pristine.user_tools.db is pristine.tools.db:  # one database for both sides
        env.user_tools.db = env.tools.db
    if V1:
        V1.fit_to_task(env, domain, task)
    state = task.initial_state if task is not None else None
    if state is not None:
        env.set_state(state.initialization_data, state.initialization_actions, state.message_history or [])
    return env


def _canonical(value) -> str:
    """The text that tau2 hashes, of part of a database."""
    return json.dumps(value, sort_keys=True, default=lambda v: v.model_dump() if hasattr(v, "model_dump") else str(v))


@functools.cache
def _pristine(domain, side, table, key) -> str | None:
    value = getattr(getattr(template(domain, False), side).db, table, None)
    if key is None:
        return _canonical(value)
    return _canonical(value[key]) if key in value else None


def changes(domain: str, env: Environment) -> dict:
    """What differs from the pristine databases: {(side, table, record's key): canonical JSON, None if deleted}. The
    key is None for a part that is no table. Two environments of one task have equal tau2 hashes exactly if their
    changes are equal."""
    found = {}
    for side in ("tools", "user_tools"):
        db = getattr(getattr(env, side), "db", None)
        for table in type(db).model_fields if db is not None else ():
            value = getattr(db, table)
            if isinstance(value, CopyOnWrite):
                # dict's own access: CopyOnWrite's would copy the record.
                now = {key: _canonical(dict.__getitem__(value, key)) if key in value else None for key in value.touched}
            else:
                now = {None: _canonical(value)}
            for key, text in now.items():
                if text != _pristine(domain, side, table, key):
                    found[side, table, key] = text
    return found


_GOLD = {}  # id(task) -> (task, its changes); keeping the task keeps its id from being given to another


def gold_changes(domain: str, task: Task) -> dict:
    """The changes that the task's gold actions make, computed once per task."""
    if id(task) not in _GOLD:
        env = make_env(domain, task)
        for action in task.evaluation_criteria.actions or []:
            with suppress(Exception):  # like tau2, which skips a gold action that fails
                env.make_tool_call(tool_name=action.name, requestor=action.requestor, **action.arguments)
        _GOLD[id(task)] = (task, changes(domain, env))
    return _GOLD[id(task)][1]


def clean(value):
    """A text, or JSON with texts, without halves of surrogate pairs, which no file, tokenizer or server takes."""
    return json.loads(json.dumps(value, ensure_ascii=False).encode(errors="ignore"))


def _check_values(value, depth=1) -> int:
    """The number of values. Raises ValueError for what parses as JSON, but makes tau2 fail or hang."""
    if depth > 20:
        raise ValueError("the arguments are nested more than 20 deep")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("the arguments have a number that is not finite")
    if isinstance(value, int) and abs(value) >= 10**18:  # Python refuses to print the product of very long ones
        raise ValueError("the arguments have a number that is too large")
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(_check_values(child, depth + 1) for child in children)


def parse_arguments(arguments) -> dict:
    """A tool call's arguments, JSON text or a dict, as a dict that tau2 can store. ValueError if it cannot."""
    try:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        if len(text) > MAX_TEXT:
            raise ValueError(f"the arguments are longer than {MAX_TEXT} characters")
        parsed = json.loads(text)
        if _check_values(parsed) > MAX_VALUES:
            raise ValueError(f"the arguments have more than {MAX_VALUES} values")
        json.dumps(parsed, ensure_ascii=False).encode()  # half a surrogate pair can be parsed, but not stored
    except UnicodeEncodeError:
        raise ValueError("the arguments are not valid Unicode") from None
    except (json.JSONDecodeError, TypeError, RecursionError) as error:
        raise ValueError(f"malformed JSON in the tool call: {error}") from None
    if not isinstance(parsed, dict):
        raise ValueError(f"the arguments must be a JSON object, not {type(parsed).__name__}")
    return parsed


def _check_expression(text):
    """Raises ValueError for an expression of calculate that tau2, which gives it to Python, cannot take safely."""
    if len(text) > MAX_EXPRESSION:
        raise ValueError(f"calculate takes at most {MAX_EXPRESSION} characters")
    if "**" in text.replace(" ", ""):
        raise ValueError("calculate does not support **")  # 9**9**8 never ends
    if re.search(r"[\d.)]\s*\(", text):  # a call to Python, which prints a SyntaxWarning
        raise ValueError("calculate needs an operator before each parenthesis")


def checked_call(call, call_id: str, requestor="assistant") -> ToolCall:
    """A tool call that is safe to carry out and to store, from tau2's ToolCall or {"function": {"name", "arguments"}}.
    Raises ValueError if the call is not safe."""
    function = {"name": call.name, "arguments": call.arguments} if isinstance(call, ToolCall) else call["function"]
    name = function.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(str(function.get("error") or "the tool call has no name"))
    if len(name) > 100 or clean(name) != name:
        raise ValueError("the tool name is longer than 100 characters, or not valid Unicode")
    arguments = parse_arguments(function.get("arguments"))
    if name == "calculate":
        _check_expression(str(arguments.get("expression")))
    if V1 and name == "grep":
        V1.check_pattern(arguments.get("pattern"))
    return ToolCall(id=call_id, name=name, arguments=arguments, requestor=requestor)
