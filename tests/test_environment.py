"""environment.py: environments are private and tau2's; changes say what tau2's hashes say; unsafe calls are refused."""

import json
import random
import warnings

import pytest
from tau2.data_model.message import ToolCall
from tau2.registry import registry

import environment
import oracle


def full_hash(env):
    return env.get_db_hash(), env.get_user_db_hash()


@pytest.mark.parametrize("domain", oracle.DOMAINS)
def test_environments_are_private(domain):
    pristine = full_hash(environment.template(domain, False))
    assert pristine == full_hash(registry.get_env_constructor(domain)())
    tasks = oracle.load_tasks(domain, "base")[:12]
    first = [oracle.demonstrate(domain, task) for task in tasks]  # all alive side by side
    again = [oracle.demonstrate(domain, task) for task in reversed(tasks)][::-1]
    for a, b in zip(first, again, strict=True):
        assert [m.content for m in a.messages] == [m.content for m in b.messages]
    assert full_hash(environment.template(domain, False)) == pristine


@pytest.mark.parametrize("domain", [*oracle.DOMAINS, "mock"])
def test_changes_are_equal_exactly_if_tau2s_hashes_are(domain):
    different = 0
    for task in oracle.load_tasks(domain, "base")[6:9]:
        fresh, gold, again = (environment.make_env(domain, task), *(oracle.demonstrate(domain, task).env for _ in "12"))
        for a, b in [(fresh, gold), (gold, again)]:
            equal = full_hash(a) == full_hash(b)
            assert equal == (environment.changes(domain, a) == environment.changes(domain, b))
            different += not equal
    assert different > 0 and environment.changes(domain, environment.make_env(domain)) == {}


EDITS = [
    lambda table, key: key in table and table[key]["value"].append("edited"),
    lambda table, key: table.__setitem__(key, {"value": ["new"]}),
    lambda table, key: key in table and table.__delitem__(key),
    lambda table, key: table.pop(key, None),
    lambda table, key: table.setdefault(key, {"value": []})["value"].append(1),
    lambda table, key: table.get(key, {"value": []})["value"].append(2),
    lambda table, key: table.update({key: {"value": [3]}}),
]


def test_copy_on_write_is_a_dict_to_its_user():
    rng = random.Random(0)
    for _ in range(200):
        pristine = {i: {"value": [i]} for i in range(5)}
        shared, plain = environment.CopyOnWrite(pristine), {i: {"value": [i]} for i in range(5)}
        for _ in range(12):
            key, edit = rng.randrange(8), rng.choice(EDITS)
            for table in (shared, plain):
                edit(table, key)
        assert dict(shared) == plain and list(shared) == list(plain)
        assert pristine == {i: {"value": [i]} for i in range(5)}
        changed = {k for k in {*plain, *pristine} if plain.get(k) != pristine.get(k)}
        assert changed <= shared.touched


def test_a_record_taken_from_a_table_is_a_copy():
    pristine = {i: {"value": [i]} for i in range(5)}
    shared = environment.CopyOnWrite(pristine)
    for record in (shared.pop(0), shared.popitem()[1], shared.setdefault(3), shared.get(4)):
        record["value"].append("edited")
    shared.clear()
    assert pristine == {i: {"value": [i]} for i in range(5)} and shared.touched == set(pristine)


def test_an_environment_without_solo_mode_or_of_no_domain_is_named():
    with pytest.raises(ValueError, match="solo"):
        environment.make_env("airline", solo=True)
    with pytest.raises(ValueError, match="unknown domain 'nowhere'; choose one of airline, "):
        environment.make_env("nowhere")


UNSAFE = {
    "not finite": ['{"id": NaN}', '{"id": -Infinity}', '{"id": 1e999}', {"id": float("nan")}],
    "too large|digits": [{"id": 10**400}, '{"id": ' + "9" * 5000 + "}"],
    "malformed JSON in the tool call": ['{"id": "a"', {"id": {1, 2}}, "[" * 10000],
    "must be a JSON object, not": ['["a"]', "null", None],
    "not valid Unicode": [{"id": "\ud800"}, '{"id": "\\ud800"}'],
    "longer than 20000": [{"id": "x" * 30000}],
    "nested more than 20 deep": [{"id": json.loads("[" * 500 + "]" * 500)}],
    "more than 100 values": [{"id": [1] * 99}, {str(k): k for k in range(100)}],
}


@pytest.mark.parametrize("message, arguments", [(message, a) for message, found in UNSAFE.items() for a in found])
def test_arguments_that_tau2_cannot_store_are_refused(message, arguments):
    with pytest.raises(ValueError, match=message):
        environment.parse_arguments(arguments)


def test_arguments_are_taken_as_json_text_or_dict():
    arguments = {"id": "a", "n": [1, 2.5, None, True, {"b": -(10**17)}]}
    assert environment.parse_arguments(arguments) == environment.parse_arguments(json.dumps(arguments)) == arguments
    assert environment.parse_arguments({"id": "\u6f22" * 19_000})  # characters, not bytes or escapes


def at_depth(depth, function):
    return at_depth(depth - 1, function) if depth else function()


def test_calculate_says_the_same_wherever_it_is_called_and_nothing_on_the_terminal():
    """Also to tau2, which plays the conversation again."""
    rng = random.Random(0)
    expressions = [
        "-" * 2400 + "1",
        "(" * 199 + "1" + ")" * 199,
        "(-" * 150 + "1" + ")" * 150,
        "1" + "+1" * 249,
        "1(2)",
    ]
    expressions += ["".join(rng.choices("0123456789+-*/(). ", k=rng.randint(1, 20))) for _ in range(500)]
    calls = [{"function": {"name": "calculate", "arguments": {"expression": e}}} for e in expressions]
    env = environment.make_env("airline")

    def answer(call):
        try:
            return env.get_response(environment.checked_call(call, "1")).content
        except ValueError as error:
            return str(error)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        shallow = [answer(call) for call in calls]
        assert at_depth(400, lambda: [answer(call) for call in calls]) == shallow and not caught
    assert shallow[0] == "calculate takes at most 500 characters" and shallow[1:4] == ["1.0", "1.0", "250.0"]
    episode = oracle.Episode("airline", oracle.load_tasks("airline", "base")[0])
    at_depth(400, lambda: episode.act({"content": "", "tool_calls": calls[:5]}))
    while not episode.done:
        episode.act({"content": "Done."})
    oracle.score(episode, verify=True)


@pytest.mark.parametrize(
    "function, message",
    [
        ({"name": None, "error": "malformed tool call: oops"}, "oops"),
        ({"name": ""}, "has no name"),
        ({"name": "x" * 101}, "longer than 100"),
        ({"name": "\ud800"}, "Unicode"),
        ({"name": "calculate", "arguments": {"expression": "9 * * 9"}}, r"does not support \*\*"),
        ({"name": "calculate", "arguments": {"expression": "(2) (3)"}}, "an operator before each parenthesis"),
    ],
)
def test_calls_that_are_not_safe_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        environment.checked_call({"function": function}, "1")


def test_a_safe_call_is_tau2s():
    call = ToolCall(id="theirs", name="f", arguments={"a": 1})
    for form in (call, {"function": {"name": "f", "arguments": '{"a": 1}'}}):
        assert environment.checked_call(form, "ours") == call.model_copy(update={"id": "ours"})
