"""Variants of a domain, to tell what is learnt from what is memorised: its tasks with other names, ids, phone numbers.

    python oracle.py --domain airline~1 --task 27                    the first variant of a task
    python eval.py --model_name_or_path MODEL --domains airline~1    airline, retail, telecom: DOMAIN~SEED is a variant

Data flow: the domain's databases -> renaming(seed), {old text: new text} -> the same databases and tasks, rewritten.
Database, gold actions, the user's story and the start of each task change together, so the gold actions of a variant
pass, and those of the original fail where they name something (tests/test_variants.py has both by tau2's evaluator).
Prices, dates and what is asked for stay; so does an email address in a story that is in no database.
"""

import functools
import json
import re
from collections.abc import Callable

import numpy as np
from tau2.data_model.tasks import Task
from tau2.registry import registry

NAME = re.compile(r"(?P<domain>.+)~(?P<seed>\d{1,9})")
TOKEN = re.compile(r"#?\w(?:[\w@.-]*\w)?")  # a word, an id, a phone number, an email address
PART = re.compile(r"#?\w+")
IDENTIFIERS = re.compile(r"(.*_)?id|phone_number|email")  # fields; besides, keys of tables that their records repeat
NAMES = ("first_name", "last_name", "full_name")


def register(name: str) -> bool:
    """Registers the domain DOMAIN~SEED with tau2. False if this is no such name, or tau2 has no DOMAIN."""
    found = NAME.fullmatch(name)
    if not found or not (found["domain"] in registry.get_domains() or register(found["domain"])):
        return False
    domain, seed = found["domain"], int(found["seed"])
    registry.register_domain(functools.partial(environment_of, domain, seed), name)
    splits = registry.get_task_splits_loader(domain)
    registry.register_tasks(functools.partial(tasks_of, domain, seed), name, splits)
    return True


def original(name: str) -> str:
    """The domain of a variant's name; of any other name, itself."""
    found = NAME.fullmatch(name)
    return found["domain"] if found else name


def environment_of(domain, seed, solo_mode=False):
    """tau2's environment with the variant's databases."""
    build = registry.get_env_constructor(domain)
    env = build(solo_mode=True) if solo_mode else build()
    for side in ("tools", "user_tools"):
        if (toolkit := getattr(env, side)) is not None and toolkit.db is not None:
            toolkit.db = type(toolkit.db).model_validate_json(database_of(domain, seed, side))
    return env


@functools.cache
def database_of(domain, seed, side) -> str:
    """The variant's database as JSON."""
    database = getattr(registry.get_env_constructor(domain)(), side).db
    return json.dumps(rewritten(database.model_dump(mode="json"), renaming(domain, seed)))


def tasks_of(domain, seed, split=None) -> list[Task]:
    """The variant's tasks, with the ids of the originals."""
    names = renaming(domain, seed)
    tasks = registry.get_tasks_loader(domain)(split)
    return [Task.model_validate({**rewritten(task.model_dump(), names), "id": task.id}) for task in tasks]


def rewritten(value, names):
    """JSON with other names and ids, also where they are keys, or words of a text."""
    if isinstance(value, dict):
        return {rewritten(key, names): rewritten(item, names) for key, item in value.items()}
    if isinstance(value, list):
        return [rewritten(item, names) for item in value]
    if not isinstance(value, str):
        return value
    return TOKEN.sub(lambda token: names.get(token[0]) or PART.sub(lambda p: names.get(p[0], p[0]), token[0]), value)


@functools.cache
def renaming(domain, seed) -> dict[str, str]:
    """{old: new} of the people's names, and of the ids, phone numbers and email addresses, in the domain's databases.
    Names trade places; no one keeps theirs. Digits of an id are drawn anew, and the capitals of a code without three
    digits in a row, such as NQNU5R."""
    env, rng = registry.get_env_constructor(domain)(), np.random.default_rng([seed, *domain.encode()])
    databases = [kit.db.model_dump() for kit in (env.tools, env.user_tools) if kit is not None and kit.db is not None]
    people, ids = set(), set()
    for database in databases:
        collect(database, people.update, ids.add)
    order = [sorted(people)[i] for i in rng.permutation(len(people))]
    names = dict(zip(order, order[1:] + order[:1], strict=True))
    lower = {old.lower(): new.lower() for old, new in names.items()}
    taken = set(ids)
    for old in sorted(ids - people):
        renamed = re.sub(r"[a-z]+", lambda part: lower.get(part[0], part[0]), old)
        new = redrawn(renamed, rng)
        while new in taken and new != renamed:
            new = redrawn(renamed, rng)
        taken.add(new)
        names[old] = new
        if old.startswith("#"):  # some stories leave it out
            names[old[1:]] = new[1:]
    return {old: new for old, new in names.items() if old != new}


def collect(value, add_people: Callable, add_id: Callable):
    """Finds people's names and identifiers in a database."""
    for key, item in value.items() if isinstance(value, dict) else ():
        if isinstance(item, dict) and key in item.values():
            add_id(key)
        elif isinstance(item, str) and key in NAMES:
            add_people(item.split())
        elif isinstance(item, str) and IDENTIFIERS.fullmatch(key):
            add_id(item)
        elif isinstance(item, list) and f"{key}".endswith("_id"):
            for one in item:
                add_id(one)
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        collect(item, add_people, add_id)


def redrawn(text, rng) -> str:
    """An id of the same form: with other digits if it has three in a row, else with other capitals and digits."""

    def digits(run):
        return "".join(str(rng.integers(10)) for _ in run[0])

    if re.search(r"\d{3}|[a-z]", text):
        return re.sub(r"\d+", digits, text)
    return re.sub(r"[A-Z]", lambda _: chr(rng.integers(65, 91)), re.sub(r"\d", digits, text))
