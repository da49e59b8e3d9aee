"""episode.py: openings, turns and ends of conversations; whatever the agent writes is answered."""

import json
import tracemalloc

import pytest
from tau2.agent.llm_agent import LLMAgent, LLMSoloAgent
from tau2.data_model.message import AssistantMessage, ToolCall, ToolMessage

import environment
import episode as episodes
import oracle
from episode import Episode


def first(domain):
    return oracle.load_tasks(domain, "base")[0]


def call(name, arguments):
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


LOOK = call("get_order_details", {"order_id": "#W2378156"})


def test_the_scripted_user_states_agrees_and_stops():
    episode = Episode("retail", first("retail"))
    greeting, statement = episode.opening()
    assert greeting == {"role": "assistant", "content": episodes.GREETING}
    assert statement["content"].startswith("I received my order #W2378156") and "Yusuf Rossi" in statement["content"]
    assert episode.act({"content": "One moment."}) == [{"role": "user", "content": "Yes, please go ahead."}]
    assert episode.act({"content": "Shall I?"}) == [{"role": "user", "content": "Yes, please go ahead."}]
    assert episode.act(AssistantMessage(role="assistant", content="Done.")) == []
    assert (episode.done, episode.termination) == (True, "user_stop")
    assert episode.messages[-1].content == episodes.STOP


def test_the_policy_cannot_end_a_conversation_with_a_user():
    episode = Episode("airline", first("airline"))
    assert episode.act({"content": episodes.STOP})
    assert episode.act(oracle.DONE)
    assert not episode.done


@pytest.mark.parametrize("last", [oracle.DONE, {"content": episodes.STOP}])
def test_solo_ends_by_done_or_by_the_stop_word(last):
    task = first("telecom")
    episode = Episode("telecom", task)
    assert episode.opening() == [{"role": "user", "content": task.ticket}]
    assert episode.act({"content": "Hello?"})[0]["content"].startswith("Error: there is no user")
    assert episode.act(last) == []
    assert episode.termination == "agent_stop"
    oracle.score(episode, verify=True)


def test_prompt_and_tools_are_those_of_tau2s_agents():
    """In solo mode: of both sides, and `done`."""
    task = first("telecom")
    solo, dual = Episode("telecom", task), Episode("telecom", task, "scripted-tools")
    tools, user_tools = dual.env.get_tools(), dual.env.get_user_tools()
    assert dual.system == LLMAgent(tools, dual.env.policy, llm="").system_prompt and "<ticket>" not in dual.system
    assert dual.tools == [tool.openai_schema for tool in tools]
    assert solo.system == LLMSoloAgent([*tools, *user_tools], solo.env.policy, task, llm="").system_prompt
    assert task.ticket in solo.system and solo.tools[:-1] == [tool.openai_schema for tool in [*tools, *user_tools]]
    assert solo.tools[-1]["function"]["name"] == "done"


def test_thinking_reaches_neither_user_nor_evaluator():
    episode = Episode("retail", first("retail"))
    episode.act({"content": "<think>the answer is 42</think>Hello."})
    assert episode.messages[-2].content == "Hello."
    assert episodes.strip_thinking("<think>never closed") == ""


@pytest.mark.parametrize(
    "turn, turns, termination",
    [
        (LOOK, 12, "max_steps"),
        (call("no_such_tool", {}), 10, "too_many_errors"),
        ({"content": "Are you sure?"}, 5, "user_stop"),  # the user does not agree for ever
    ],
)
def test_conversations_end_by_themselves_unrewarded(turn, turns, termination):
    episode = Episode("retail", first("retail"), max_turns=12)
    for number in range(1, turns + 1):
        assert bool(episode.act(turn)) == (number < turns)
    assert episode.termination == termination
    assert oracle.score(episode, verify=True).reward == 0.0
    with pytest.raises(ValueError, match="is over"):
        episode.act(LOOK)


BAD_TURNS = [
    call("calculate", {"expression": "9**9**8"}),
    call("calculate", {"expression": 7}),
    call("calculate", {"expression": "1/0"}),
    call("get_order_details", '{"order_id": NaN}'),
    call("get_order_details", {"order": 1}),
    call("get_order_details", '{"order_id": "\\ud800"}'),
    call("get_order_details", {"self": 1, "tool_name": 2, "requestor": "user"}),
    call("update_reservation_baggages", '{"reservation_id": "JMO1MG", "nonfree_baggages": ' + "9" * 4000 + "}"),
    call("no_such_tool", {}),
    call("\ud800", {}),
    call(None, "{"),
    call("db", {}),
    call("return_delivered_order_items", {"order_id": "#W2378156", "item_ids": 5, "payment_method_id": None}),
    call("modify_user_address", {"user_id": "yusuf_rossi_9620", "address1": 1}),
    {"role": "assistant", "content": "", "tool_calls": []},
    {"role": "assistant", "content": "   "},
    {"role": "assistant", "content": "x" * 30000},
    {"role": "assistant", "content": "half a pair \ud800"},
    AssistantMessage(role="assistant", content=None, tool_calls=[ToolCall(id="", name="", arguments={})]),
]


@pytest.mark.parametrize("domain", ["retail", "airline", "telecom", "mock"])
@pytest.mark.parametrize("turn", BAD_TURNS, ids=range(len(BAD_TURNS)))
def test_whatever_the_agent_writes_is_answered(domain, turn):
    """An error message, never an exception or a hang; and the evaluator still reads the conversation."""
    episode = Episode(domain, first(domain))
    before = environment.changes(domain, episode.env)
    answers = episode.act(turn)
    assert answers and all(isinstance(answer["content"], str) for answer in answers)
    json.dumps(answers).encode()
    while not episode.done:
        episode.act({"content": episodes.STOP if episode.solo else "Done."})
    assert environment.changes(domain, episode.env) == before or domain == "mock"
    for message in episode.messages:
        message.model_dump_json()
    if domain in ("retail", "mock", "telecom"):
        oracle.score(episode, verify=domain != "retail")


def test_results_follow_their_calls_with_unique_ids():
    episode = Episode("retail", first("retail"))
    good = LOOK["tool_calls"][0]
    bad = {"function": {"name": None, "arguments": "{", "error": "malformed tool call"}}
    answers = episode.act({"content": "Looking.", "tool_calls": [good, bad, good]})
    assert [a["content"][:6] for a in answers] == ['{"orde', "Error:", '{"orde']
    message = episode.messages[2]
    results = episode.messages[3:5]
    assert all(isinstance(r, ToolMessage) for r in results)
    assert [c.id for c in message.tool_calls] == [r.id for r in results] and len({r.id for r in results}) == 2
    assert episode.messages[5].role == "system"
    assert (episode.calls, episode.failed_calls, episode.errors) == (3, 1, 1)
    answers = episode.act({"tool_calls": [good] * 101})
    assert [a["content"][:6] for a in answers] == ['{"orde'] * 100 + ["Error:"]
    answers = episode.act({"content": "x" * 30_000, "tool_calls": [good] * 3})
    assert [a["role"] for a in answers] == ["tool"] * 3  # a server wants each call answered


@pytest.mark.parametrize("name", ["get_customer_by_id", "set_apn_settings"])
def test_a_turn_takes_memory_for_its_size(name):
    """pydantic would answer with a paragraph for each of the second tool's keys."""
    text, keys = "\u6f22" * 19_000, {chr(0x4E00 + k): 1 for k in range(2400)}
    arguments = {"customer_id": text} if name == "get_customer_by_id" else {"apn_settings": keys}
    episode = Episode("telecom", first("telecom"))
    tracemalloc.start()
    answers = episode.act(call(name, json.dumps(arguments, ensure_ascii=False)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20 and len(answers[0]["content"]) < 40_000


@pytest.mark.parametrize("user, message", [("nobody", "unknown user 'nobody'; choose"), ("solo", "has no ticket")])
def test_a_user_that_cannot_be_is_named(user, message):
    with pytest.raises(ValueError, match=message):
        Episode("airline", first("airline"), user=user)
