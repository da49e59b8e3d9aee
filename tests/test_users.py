"""users.py: scripted users; simulated users behind a server that answers as told, and behind a real one; local policies
as users. And agents behind an API, which need the same servers."""

import concurrent.futures
import functools
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from fake_api import body, call, fake_api
from tau2.data_model.message import AssistantMessage, ToolMessage, UserMessage

import chat
import eval as evaluation
import grpo
import oracle
import policy
import rollout
import train
import users
from users import USERS, ScriptedUser

SHORT = {"domains": ["airline", "telecom"], "max_tasks": 1, "max_turns": 2, "max_new_tokens": 8, "num_trials": 2}


def first(domain):
    return oracle.load_tasks(domain, "base")[0]


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(users.SimulatedUser, "BACKOFF", 0.01)
    monkeypatch.setattr(users.PolicyServer, "MAX_NEW_TOKENS", 8)  # an untrained model talks on and on
    registered = dict(USERS)
    yield
    USERS.clear()
    USERS.update(registered)


@pytest.mark.parametrize(
    "told, said",
    [
        ("You want to return your lamp.", "I want to return my lamp."),
        ("You are Mei. You're upset.", "I am Mei. I'm upset."),
        ("If the agent helps you, thank them yourself.", "If the agent helps me, thank them myself."),
    ],
)
def test_instructions_become_the_users_own_words(told, said):
    assert users.first_person(told) == said


def test_gold_conversations_with_a_user_who_has_tools_score_one_and_tau2_agrees():
    for k, task in enumerate(oracle.load_tasks("telecom", "base")):
        episode = oracle.demonstrate("telecom", task, "scripted-tools")
        assert not episode.solo and episode.termination == "user_stop"
        assert oracle.score(episode, verify=k % 6 == 0).reward == 1.0
        assert oracle.tool_accuracy(episode) == 1.0


def test_a_user_with_tools_calls_what_the_agent_names_and_reports_the_results():
    episode = oracle.Episode("telecom", first("telecom"), "scripted-tools")
    assert "toggle_airplane_mode" not in {tool["function"]["name"] for tool in episode.tools}  # it is the user's
    opening = episode.opening()
    assert [m["role"] for m in opening] == ["assistant", "user"]
    text = 'First check_status_bar(), then set_network_mode_preference({"mode": "4g_only"}) and no_such_tool({}).'
    answers = episode.act({"content": text})
    calls = episode.messages[3].tool_calls
    expected = [("check_status_bar", {}), ("set_network_mode_preference", {"mode": "4g_only"})]
    assert [(c.name, c.arguments) for c in calls] == expected and {c.requestor for c in calls} == {"user"}
    results = episode.messages[4:6]
    assert [type(m) for m in results] == [ToolMessage, ToolMessage] and [m.id for m in results] == [c.id for c in calls]
    assert [a["role"] for a in answers] == ["user"]
    assert answers[0]["content"] == "\n".join(m.content for m in results) == episode.messages[-1].content
    assert "4g_only" in answers[0]["content"]


def test_a_tool_that_fails_on_the_user_counts_as_an_error_and_the_talk_goes_on():
    episode = oracle.Episode("telecom", first("telecom"), "scripted-tools")
    answers = episode.act({"content": 'set_network_mode_preference({"no_such": "7g"})'})
    assert episode.errors == 1 and "Error" in answers[0]["content"] and not episode.done
    answers = episode.act({"content": "set_network_mode_preference({oops"})  # no JSON: nothing is called
    assert not episode.messages[-1].tool_calls and episode.errors == 1


def test_in_domains_without_user_tools_it_is_the_scripted_user():
    task = oracle.load_tasks("retail", "base")[3]
    told = [oracle.demonstrate("retail", task, user).messages for user in ("scripted", "scripted-tools")]
    assert [(m.role, m.content) for m in told[0]] == [(m.role, m.content) for m in told[1]]


class TerseUser(ScriptedUser):
    """As a user of Rehearse would write it: says who it is and what it wants in one line, and agrees in one word."""

    def opening(self):
        return self.statement[:100]

    def reply(self, text, acted):
        return "Yes." if super().reply(text, acted) != users.STOP else users.STOP


class MuteUser:
    """A user of another kind, who cannot stand in for a scripted one in gold conversations."""

    def __init__(self, task, env):
        pass

    def speak(self, incoming, episode):
        return UserMessage(role="user", content=users.STOP)


@pytest.mark.parametrize("registered", [lambda kind: kind, functools.partial])
@pytest.mark.parametrize("base", [TerseUser, MuteUser])
@pytest.mark.parametrize("solo", [True, False])
def test_whether_a_user_of_ones_own_plays_solo_is_a_property_of_its_class(solo, base, registered):
    """It is one entry of the registry. Gold conversations for a policy that talks to it score 1.0."""
    USERS["own"] = registered(type("OwnUser", (base,), {"solo": solo}))
    users.check("own")
    like = users.scripted_like("own")
    assert (like == "own") == (base is TerseUser)
    for domain in oracle.DOMAINS:
        alone = solo and domain == "telecom"
        assert oracle.is_solo(domain, "own") == oracle.Episode(domain, first(domain), "own").solo == alone
        for task in oracle.load_tasks(domain, "base")[::20]:
            episode = oracle.demonstrate(domain, task, like)
            assert episode.solo == alone and oracle.score(episode).reward == 1.0


def test_gold_conversations_for_a_simulated_user_are_with_a_scripted_one():
    USERS["persona"] = functools.partial(users.SimulatedUser, llm="openai/m")
    assert users.scripted_like("persona") == users.scripted_like("openai/m") == "scripted-tools"


@pytest.fixture
def told():
    with fake_api() as server:
        yield server


def episode_with(address, domain="telecom", **llm_args):
    users.prepare("openai/m", address, **llm_args)
    return oracle.Episode(domain, first(domain), "openai/m")


def test_a_simulated_user_uses_its_tools_and_the_agent_hears_only_what_it_says(told):
    address, answers, asked = told
    answers += [
        {"content": "My phone does not work."},
        {"content": None, "tool_calls": [call("check_status_bar", "{}"), call("toggle_data", "{}")]},
        {"content": None, "tool_calls": [call("check_status_bar", "{}")]},
        {"content": "Still nothing. ###STOP###"},
    ]
    episode = episode_with(address, temperature=0.5, seed=3)
    assert episode.slow and episode.opening()[-1] == {"role": "user", "content": "My phone does not work."}
    assert (asked[0]["temperature"], asked[0]["seed"]) == (0.5, 3)
    system = asked[0]["messages"][0]["content"]
    assert "<scenario>" in system and str(episode.task.user_scenario) in system  # tau2's own prompt
    assert {t["function"]["name"] for t in asked[0]["tools"]} == {t.name for t in episode.env.get_user_tools()}
    assert asked[0]["messages"][1] == {"role": "user", "content": episode.messages[0].content}  # roles are flipped
    assert episode.act({"content": "Please toggle your data."}) == []
    assert episode.termination == "user_stop"
    roles = [m.role for m in episode.messages]
    assert roles == ["assistant", "user", "assistant", "user", "tool", "tool", "user", "tool", "user"]
    ids = [c.id for m in episode.messages if isinstance(m, UserMessage) for c in m.tool_calls or []]
    assert len(set(ids)) == 3 == len(ids)  # though the model gave each the same
    assert [m.id for m in episode.messages if isinstance(m, ToolMessage)] == ids
    roles = [m["role"] for m in asked[-1]["messages"]]
    assert roles == ["system", "user", "assistant", "user", "assistant", "tool", "tool", "assistant", "tool"]
    oracle.score(episode, verify=True)


def test_a_failure_is_tried_again_without_a_trace(told):
    address, answers, asked = told
    broken = {"content": None, "tool_calls": [call("toggle_data", "{broken")]}
    answers += [500, {"content": ""}, broken, {"content": "Hello."}]
    episode = episode_with(address)
    assert episode.opening()[-1]["content"] == "Hello."
    assert len(asked) == 4 and [len(a["messages"]) for a in asked] == [2] * 4
    assert episode.act({"content": "How can I help?"})[0]["content"] == "Hello."
    assert [m["role"] for m in asked[-1]["messages"]] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    "answer, reason, limits",
    [(500, "InternalServerError", {}), (None, "Timeout", {"timeout": 1.0}), ({"content": " "}, "empty", {})],
)
def test_a_user_that_goes_on_failing_makes_the_episode_invalid(told, answer, reason, limits):
    """It is not a failure of the agent."""
    address, answers, asked = told
    answers += [answer]
    episode = episode_with(address, **limits)
    model, tokenizer = policy.load_policy("tiny", "float32", "cpu")
    (trajectory,) = rollout.rollout(model, tokenizer, [episode], max_new_tokens=4)
    record = evaluation.score_and_record(episode, trajectory)
    assert not trajectory.valid and len(asked) == 4
    assert record["reward"] is None and "openai/m failed 4 times" in record["error"] and reason in record["error"]


def test_a_user_who_never_stops_calling_tools_is_stopped(told):
    address, answers, _ = told
    answers += [{"content": "Hello."}, {"content": None, "tool_calls": [call("check_status_bar", "{}")]}]
    episode = episode_with(address)
    with pytest.raises(users.UserFailed, match="called tools 20 times"):
        episode.act({"content": "Look at your screen."})


def test_an_agent_behind_an_api_calls_tools_and_gets_their_results_by_id(told):
    address, answers, asked = told
    user = {"user_id": "mia_li_3668"}
    made = {json.dumps(user): "get_user_details", "{}": "no_such_tool", "{broken": "get_user_details"}
    calls = [call(name, arguments) for arguments, name in made.items()]
    answers += [{"content": None, "tool_calls": calls}, {"content": "Done."}]
    episode, ended = oracle.Episode("airline", first("airline")), []
    settings = {"temperature": 0.2, "seed": 3, **users.served_at(address)}
    evaluation.play_api([episode], "openai/m", on_finish=lambda *end: ended.append(end), **settings)
    ((same, trajectory),) = ended
    assert same is episode and trajectory.valid and trajectory.termination == "user_stop"
    assert (asked[0]["temperature"], asked[0]["seed"]) == (0.2, 3)
    assert asked[0]["messages"][0]["content"] == episode.system
    assert {t["function"]["name"] for t in asked[0]["tools"]} == {t["function"]["name"] for t in episode.tools}
    said, *results = asked[1]["messages"][-4:]
    assert [c["id"] for c in said["tool_calls"]] == [m["tool_call_id"] for m in results]
    assert "mia_li_3668" in results[0]["content"] and "not found" in results[1]["content"]
    assert "malformed JSON" in results[2]["content"]
    assert isinstance(episode.messages[2], AssistantMessage) and sum(trajectory.action_mask) == 3 * len(asked)


def test_an_agent_behind_a_server_that_fails_is_counted_as_invalid(told, tmp_path, monkeypatch):
    address, answers, _ = told
    answers += [500]
    monkeypatch.setattr(evaluation, "API_RETRIES", 1)
    args = evaluation.Args(model_name_or_path="openai/m", api_base=address, output=str(tmp_path / "out"), **SHORT)
    with pytest.raises(evaluation.StopRun, match=r"4 of 4 conversations ended in an error.*InternalServerError"):
        evaluation.run_evaluation(args)
    assert all(r["reward"] is None for r in evaluation.read_trials(tmp_path / "out"))


DEEP = "[" * 100_000 + "]" * 100_000
MALFORMED = {  # a server's answer -> the reason in the record; None: it is answered
    "half a pair": ({"content": "Hi \ud800 there\x1b[2J !!!!!!"}, None),
    "half a pair in an id": ({"content": None, "tool_calls": [call("no_such_tool", "{}", "\ud800")]}, None),
    "half a pair in a name": ({"content": None, "tool_calls": [call("\ud800", "{}")]}, "Unicode"),
    "half a pair in arguments": ({"content": None, "tool_calls": [call("f", '{"a": "\ud800"}')]}, "Unicode"),
    "nested arguments": ({"content": None, "tool_calls": [call("f", '{"a": ' + "[" * 60 + "]" * 60 + "}")]}, "nested"),
    "arguments that nobody can read": ({"content": None, "tool_calls": [call("f", DEEP)]}, "ServerError"),
    "a list": ({"content": ["hi"]}, "ServerError"),
    "a dict": ({"content": {"a": 1}}, "ServerError"),
    "a number": ({"content": 7}, "ServerError"),
    "no calls": ({"content": None, "tool_calls": 7}, "ServerError"),
    "too long": ({"content": "x" * 30_000}, "20000"),
    "no choices": (body({}, choices=[]), "choices|index"),
    "a lie about its length": (body({"content": "Hi"}, usage={"completion_tokens": 10**15}), None),
    "a nested body": (DEEP.encode(), "ServerError"),
    "no JSON": (b"\xff<html>", "ServerError"),
}
OF_THE_MODEL = ("half a pair in a name", "half a pair in arguments", "nested arguments", "too long")


@pytest.mark.parametrize("side", ["agent", "user"])
@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_answer_costs_its_conversation_at_most(told, tmp_path, monkeypatch, capsys, name, side):
    """What an agent's model wrote is answered, as if the policy were a local one."""
    address, answers, _ = told
    answer, reason = MALFORMED[name]
    answers += [answer, {"content": "Done. ###STOP###"}]
    monkeypatch.setattr(evaluation, "API_RETRIES", 0)
    monkeypatch.setattr(users.SimulatedUser, "TRIES", 1)
    where = {
        "agent": ("openai/m", {"api_base": address}),
        "user": ("tiny", {"user": "openai/m", "user_api_base": address}),
    }
    model, served = where[side]
    usual = {**SHORT, "domains": ["telecom"], "max_tasks": 3, "num_trials": 1, "model_dtype": "float32"}
    evaluation.run_evaluation(evaluation.Args(model, output=str(tmp_path / "out"), **{**usual, **served}))
    errors = [r["error"] for r in evaluation.read_trials(tmp_path / "out") if r["reward"] is None]
    if reason is None or (side == "agent" and name in OF_THE_MODEL):
        assert errors == []
    else:
        assert len(errors) == 1 and re.search(reason, errors[0])
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out and "Traceback" not in shown.err


def training(tmp_path, user, *flags):
    """The summary of a short run in telecom with this user, and its conversations."""
    sizes = "--max_tasks_per_domain 1 --num_steps_per_task 1 --batch_size_per_gpu 1 --num_samples_per_prompt 2"
    limits = "--warmup_steps 1 --max_turns 2 --max_new_tokens 4 --eval_trials 1"
    names = f"--task_order telecom --user {user} --runs_dir {tmp_path} --run_name r"
    summary = train.train(train.parse_args([*f"{names} {sizes} {limits}".split(), *flags]))
    return summary, [json.loads(line) for line in (tmp_path / "r" / "trajectories.jsonl").read_text().splitlines()]


def test_a_policy_is_trained_with_tau2s_simulated_user(told, tmp_path, monkeypatch):
    address, answers, asked = told
    answers += [{"content": "My phone does not work. \ud83d"}]  # half an emoji
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    summary, records = training(tmp_path, "openai/m")
    assert summary["user"] == "openai/m" and "solo" not in summary["note"] and len(asked) > 3
    assert all(r["reward"] == 0.0 and r["messages"][1]["content"].startswith("My phone") for r in records)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Path of an embedded policy that does not repeat the last token it has read, which is a line break."""
    folder = tmp_path_factory.mktemp("saved") / "policy"
    model, tokenizer = policy.load_policy("tiny", "float32", "cpu")
    for layer in model.get_decoder().layers:
        layer.mlp.down_proj.weight.data *= 30
    policy.save_policy(model, tokenizer, folder, policy.gathered_weights(model))
    return str(folder)


@pytest.fixture(scope="module")
def served(saved, tmp_path_factory):
    """Address of `transformers serve`, which knows the embedded policy by its path."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    path = tmp_path_factory.mktemp("served") / "log"
    with open(path, "w") as log:
        server = subprocess.Popen([*command, "--device", "cpu"], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(3000):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10)
                break
            except OSError:
                assert server.poll() is None, path.read_text()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(60)


def test_a_served_model_is_evaluated_like_a_local_one(saved, served, tmp_path):
    folders = {"api": {"model_name_or_path": f"openai/{saved}", "api_base": served}}
    folders["local"] = {"model_name_or_path": saved, "model_dtype": "float32"}
    metrics = {}
    for name, model in folders.items():
        evaluation.run_evaluation(evaluation.Args(output=str(tmp_path / name), **model, **SHORT))
        trials = evaluation.read_trials(tmp_path / name)
        assert len(trials) == 4 and all(r["reward"] is not None and r["tokens"] and r["turns"] for r in trials)
        settings = json.loads((tmp_path / name / "metrics.json").read_text())
        assert settings["model"] == model["model_name_or_path"]
        metrics[name] = {domain: set(found) for domain, found in settings["metrics"].items()}
    assert metrics["api"] == metrics["local"]  # they can stand in one table


def test_tau2s_simulated_user_behind_an_api_talks_to_a_policy(saved, served, tmp_path, monkeypatch):
    short_answers = {"api_base": served, "api_key": "none", "max_tokens": 16}
    monkeypatch.setattr(users, "served_at", lambda address: short_answers)
    flags = {"user": f"openai/{saved}", "user_api_base": served, "user_temperature": 1.0}
    short = {**SHORT, "domains": ["telecom"], "num_trials": 1, "output": str(tmp_path)}
    evaluation.run_evaluation(evaluation.Args(model_name_or_path="tiny", model_dtype="float32", **flags, **short))
    (trial,) = evaluation.read_trials(tmp_path)
    assert trial["reward"] is not None
    spoken = [m for m in trial["simulation"]["messages"] if m["role"] == "user"]
    assert spoken and all(m["content"].strip() or m["tool_calls"] for m in spoken)
    assert spoken[0]["usage"]["completion_tokens"] > 0  # it was asked, with the guidelines and the scenario
    assert spoken[0].get("raw_data") is None
    settings = json.loads((tmp_path / "config.json").read_text())
    assert {name: settings[name] for name in flags} == flags


@pytest.fixture
def local(monkeypatch, saved):
    """(name of the user, list of batches that it was asked, list of what it says in turn): the embedded policy, with
    its words given, so that all but its sampling is real."""
    users.prepare(f"policy:{saved}", temperature=0.0, model_dtype="float32", device="cpu")
    batches, words = [], []

    def speak(model, tokenizer, requests, **settings):
        batches.append([(r.system, r.tools, r.opening(), settings) for r in requests])
        for request in requests:
            request.act(chat.parse_message(words.pop(0) if len(words) > 1 else words[0]))
        return [grpo.Trajectory(action_mask=[True] * 5) for _ in requests]

    monkeypatch.setattr(rollout, "rollout", speak)
    return f"policy:{saved}", batches, words


def test_a_local_policy_is_tau2s_user_with_its_tools(local):
    user, batches, words = local
    calls = '<tool_call>{"name": "check_status_bar", "arguments": {}}</tool_call>'
    words += ["My phone does not work.", "<tool_call>{broken</tool_call>", calls, "Still nothing. ###STOP###"]
    episode = oracle.Episode("telecom", first("telecom"), user)
    assert episode.slow and episode.opening()[-1]["content"] == "My phone does not work."
    assert episode.act({"content": "Look at your screen."}) == [] and episode.termination == "user_stop"
    assert [m.role for m in episode.messages] == ["assistant", "user", "assistant", "user", "tool", "user"]
    ((system, tools, messages, settings),) = batches[-1]
    assert system == episode.user.simulator.system_prompt and settings["temperature"] == 0.0
    assert {t["function"]["name"] for t in tools} == {t.name for t in episode.env.get_user_tools()}
    assert [m["role"] for m in messages] == ["user", "assistant", "user", "assistant", "tool"]
    assert messages[3]["tool_calls"][0]["function"] == {"name": "check_status_bar", "arguments": {}}
    assert len(batches) == 4  # the broken call was tried again
    assert episode.messages[1].usage == {"completion_tokens": 5, "prompt_tokens": 0}
    oracle.score(episode, verify=True)


def test_requests_that_wait_together_are_answered_in_one_batch(local):
    user, batches, words = local
    words += ["Hello."]
    episodes = [oracle.Episode("airline", task, user) for task in oracle.load_tasks("airline", "base")[:20]]
    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        openings = list(pool.map(lambda episode: episode.opening(), episodes))
    assert all(opening[-1]["content"] == "Hello." for opening in openings)
    assert sum(map(len, batches)) == 20 and len(batches) < 10


def test_a_policy_that_fails_as_a_user_makes_the_episode_invalid(local, monkeypatch):
    user, *_ = local
    monkeypatch.setattr(rollout, "rollout", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(users.UserFailed, match=r"policy failed 4 times: .*division by zero"):
        oracle.Episode("airline", first("airline"), user).opening()


def test_a_request_that_is_too_long_fails_alone(local):
    user, batches, words = local
    words += ["Hello."]
    long, short = (oracle.Episode("airline", task, user) for task in oracle.load_tasks("airline", "base")[:2])
    long.messages = [AssistantMessage(role="assistant", content="word " * 10_000)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        failed, opened = pool.submit(long.opening), pool.submit(short.opening)
    assert opened.result()[-1]["content"] == "Hello." and sum(map(len, batches)) == 1
    with pytest.raises(users.UserFailed, match="which leaves none in a context of 4096"):
        failed.result()


def test_two_policies_talk_to_each_other(saved, tmp_path):
    monologue = {**SHORT, "user": f"policy:{saved}", "user_temperature": 1.0, "output": str(tmp_path / "out")}
    evaluation.run_evaluation(evaluation.Args(model_name_or_path="tiny", model_dtype="float32", **monologue))
    trials = evaluation.read_trials(tmp_path / "out")
    assert len(trials) == 4 and any(r["reward"] is not None for r in trials)


def test_a_run_is_trained_with_a_local_policy_as_its_user(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_INVALID_SHARE", 1.0)
    summary, records = training(tmp_path, f"policy:{saved}")
    assert summary["user"] == f"policy:{saved}" and "solo" not in summary["note"]
    assert len(records) >= 4 and any(m["role"] == "user" for r in records for m in r["messages"])


@pytest.mark.parametrize(
    "user, message",
    [("policy:/no/such", "no directory /no/such"), ("nobody", "unknown user 'nobody'; choose one of scripted")],
)
def test_users_that_are_not_there_are_named_before_anything_is_written(user, message, tmp_path):
    args = evaluation.Args(model_name_or_path="tiny", user=user, output=str(tmp_path / "out"), **SHORT)
    with pytest.raises(ValueError, match=message):
        evaluation.run_evaluation(args)
    with pytest.raises(ValueError, match=message):
        train.train(train.parse_args(["--user", user, "--runs_dir", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()
