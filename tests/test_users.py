"""Users of other kinds, and agents behind an API: against a real server on loopback, and one that fails as told."""

import concurrent.futures
import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from tau2.data_model.message import AssistantMessage, ToolMessage, UserMessage
from tau2.data_model.tasks import RewardType

import eval as evaluation
import grpo
import oracle
import train

# ---------------------------------------------------------------------------------------- scripted, with tools


def telecom():
    return oracle.load_tasks("telecom", "base")


def test_gold_conversations_with_a_user_who_has_tools_score_one_and_tau2_agrees():
    for k, task in enumerate(telecom()):
        episode = oracle.demonstrate("telecom", task, "scripted-tools")
        assert not episode.solo and episode.termination == "user_stop"
        assert oracle.score(episode, verify=k % 6 == 0).reward == 1.0
        assert oracle.tool_accuracy(episode) == 1.0


def test_a_user_with_tools_calls_what_the_agent_names_and_tells_what_came_of_it():
    episode = oracle.Episode("telecom", telecom()[0], "scripted-tools")
    assert "toggle_airplane_mode" not in {tool["function"]["name"] for tool in episode.tools}  # the user's, not his
    opening = episode.opening()
    assert [m["role"] for m in opening] == ["assistant", "user"]
    text = 'First check_status_bar(), then set_network_mode_preference({"mode": "4g_only"}) and no_such_tool({}).'
    answers = episode.act({"content": text})
    calls = episode.messages[3].tool_calls
    assert [(c.name, c.arguments, c.requestor) for c in calls] == [
        ("check_status_bar", {}, "user"),
        ("set_network_mode_preference", {"mode": "4g_only"}, "user"),
    ]
    results = episode.messages[4:6]
    assert [type(m) for m in results] == [ToolMessage, ToolMessage] and [m.id for m in results] == [c.id for c in calls]
    assert [a["role"] for a in answers] == ["user"]
    assert answers[0]["content"] == "\n".join(m.content for m in results) == episode.messages[-1].content
    assert "4g_only" in answers[0]["content"]


def test_a_tool_that_fails_on_the_user_counts_as_an_error_and_the_talk_goes_on():
    episode = oracle.Episode("telecom", telecom()[0], "scripted-tools")
    answers = episode.act({"content": 'set_network_mode_preference({"no_such": "7g"})'})
    assert episode.errors == 1 and "Error" in answers[0]["content"] and not episode.done
    answers = episode.act({"content": "set_network_mode_preference({oops"})  # no JSON: nothing is called
    assert not episode.messages[-1].tool_calls and episode.errors == 1


def test_in_domains_without_user_tools_it_is_the_scripted_user():
    task = oracle.load_tasks("retail", "base")[3]
    told = [oracle.demonstrate("retail", task, user).messages for user in ("scripted", "scripted-tools")]
    assert [(m.role, m.content) for m in told[0]] == [(m.role, m.content) for m in told[1]]


# -------------------------------------------------------------------------------------------- a real server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(path of the embedded policy, address of `transformers serve`)."""
    folder = tmp_path_factory.mktemp("served") / "policy"
    model, tokenizer = grpo.load_policy("tiny", "float32", "cpu")
    grpo.save_policy(model, tokenizer, folder, grpo.gathered_weights(model))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = open(folder.parent / "log", "w")  # noqa: SIM115, as long as the server runs
    server = subprocess.Popen([*command, "--device", "cpu"], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
                break
            except OSError:
                assert server.poll() is None, (folder.parent / "log").read_text()
                time.sleep(0.1)
        yield str(folder), f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(20)
        log.close()


SHORT = {"domains": ["airline", "telecom"], "max_tasks": 1, "max_turns": 2, "max_new_tokens": 8, "num_trials": 2}


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(oracle.SimulatedUser, "BACKOFF", 0.01)
    monkeypatch.setattr(oracle, "USERS", dict(oracle.USERS))


def test_a_served_model_is_evaluated_like_a_local_one(served, tmp_path):
    folder, address = served
    args = evaluation.Args(f"openai/{folder}", api_base=address, output=str(tmp_path / "api"), **SHORT)
    evaluation.run_evaluation(args)
    trials = evaluation.read_trials(tmp_path / "api")
    assert len(trials) == 4 and all(r["reward"] is not None and r["tokens"] > 0 and r["turns"] > 0 for r in trials)
    settings = json.loads((tmp_path / "api" / "config.json").read_text())
    assert settings["model"] == f"openai/{folder}" and settings["api_base"] == address
    local = evaluation.Args(folder, model_dtype="float32", output=str(tmp_path / "local"), **SHORT)
    evaluation.run_evaluation(local)
    first, second = (json.loads((tmp_path / name / "metrics.json").read_text())["metrics"] for name in ("api", "local"))
    assert {d: set(m) for d, m in first.items()} == {d: set(m) for d, m in second.items()}  # stand in one table


def test_tau2s_simulated_user_behind_an_api_talks_to_a_policy(served, tmp_path):
    folder, address = served
    user = f"openai/{folder}"
    flags = {"user": user, "user_api_base": address, "user_temperature": 1.0}
    short = {**SHORT, "domains": ["telecom"], "num_trials": 1}  # an untrained model talks on and on
    evaluation.run_evaluation(evaluation.Args("tiny", model_dtype="float32", output=str(tmp_path), **flags, **short))
    trials = evaluation.read_trials(tmp_path)
    assert len(trials) == 1 and all(r["reward"] is not None for r in trials)
    for r in trials:
        spoken = [m for m in r["simulation"]["messages"] if m["role"] == "user"]
        assert spoken and all(m["content"].strip() or m["tool_calls"] for m in spoken)
        assert spoken[0]["usage"]["completion_tokens"] > 0  # it was asked, with the guidelines and the scenario
        assert spoken[0].get("raw_data") is None
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["user"], settings["user_api_base"], settings["user_temperature"]) == (user, address, 1.0)


# ------------------------------------------------------------------------------------ a server that fails as told


@pytest.fixture
def told():
    """(address, list of what it answers in turn, list of what it was asked). An answer is a message of the chat
    completions API, or a number: an HTTP error, or None: no answer at all. The last one stays."""
    answers, asked = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            if answer is None:
                time.sleep(1.5)
                return
            if isinstance(answer, int):
                self.send_error(answer)
                return
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **answer}}
            usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
            body = {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
                "usage": usage,
            }
            text = json.dumps(body).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", answers, asked
    server.shutdown()


def call(name, arguments, call_id="c"):
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def episode_with(address, domain="telecom", **llm_args):
    oracle.use_model_as_user("openai/m", address, **llm_args)
    return oracle.Episode(domain, oracle.load_tasks(domain, "base")[0], "openai/m")


def test_a_simulated_user_uses_its_tools_and_the_agent_hears_only_what_it_says(told):
    address, answers, asked = told
    answers += [
        {"content": "My phone does not work."},
        {"content": None, "tool_calls": [call("check_status_bar", "{}"), call("toggle_data", "{}")]},
        {"content": None, "tool_calls": [call("check_status_bar", "{}")]},
        {"content": "Still nothing. ###STOP###"},
    ]
    episode = episode_with(address)
    assert episode.slow and episode.opening()[-1] == {"role": "user", "content": "My phone does not work."}
    system = asked[0]["messages"][0]["content"]
    assert "<scenario>" in system and str(episode.task.user_scenario) in system  # tau2's own prompt
    assert {t["function"]["name"] for t in asked[0]["tools"]} == {t.name for t in episode.env.get_user_tools()}
    assert asked[0]["messages"][1] == {"role": "user", "content": oracle.GREETING}  # roles are turned round
    assert episode.act({"content": "Please toggle your data."}) == []
    assert episode.termination == "user_stop"
    roles = [m.role for m in episode.messages]
    assert roles == ["assistant", "user", "assistant", "user", "tool", "tool", "user", "tool", "user"]
    ids = [c.id for m in episode.messages if isinstance(m, UserMessage) for c in m.tool_calls or []]
    assert len(set(ids)) == 3 == len(ids)  # though the model gave each the same
    assert [m.id for m in episode.messages if isinstance(m, ToolMessage)] == ids
    assert [m["role"] for m in asked[-1]["messages"]] == [
        *("system", "user", "assistant", "user", "assistant", "tool", "tool", "assistant", "tool"),
    ]
    oracle.score(episode, verify=True)


def test_what_fails_is_tried_again_without_a_trace(told):
    address, answers, asked = told
    answers += [
        500,
        {"content": ""},
        {"content": None, "tool_calls": [call("toggle_data", "{broken")]},
        {"content": "Hello."},
    ]
    episode = episode_with(address)
    assert episode.opening()[-1]["content"] == "Hello."
    assert len(asked) == 4 and [len(a["messages"]) for a in asked] == [2] * 4
    assert episode.act({"content": "How can I help?"})[0]["content"] == "Hello."
    assert [m["role"] for m in asked[-1]["messages"]] == ["system", "user", "assistant", "user"]


@pytest.mark.parametrize(
    "answer, reason", [(500, "InternalServerError"), (None, "Timeout"), ({"content": " "}, "empty")]
)
def test_a_user_that_goes_on_failing_makes_the_episode_invalid_not_a_failure_of_the_agent(told, answer, reason):
    address, answers, asked = told
    answers += [{"content": "Hello."}, answer]
    episode = episode_with(address, timeout=0.5)
    episode.opening()
    model, tokenizer = grpo.load_policy("tiny", "float32", "cpu")
    (trajectory,) = grpo.rollout(model, tokenizer, [episode], max_new_tokens=4)
    record = evaluation.score_and_record(episode, trajectory)
    assert not trajectory.valid and len(asked) == 1 + 4
    assert record["reward"] is None and "openai/m failed 4 times" in record["error"] and reason in record["error"]


def test_a_user_who_never_stops_calling_tools_is_stopped(told):
    address, answers, _ = told
    answers += [{"content": "Hello."}, {"content": None, "tool_calls": [call("check_status_bar", "{}")]}]
    episode = episode_with(address)
    with pytest.raises(oracle.UserFailed, match="called tools 20 times"):
        episode.act({"content": "Look at your screen."})


def test_an_agent_behind_an_api_calls_tools_and_gets_their_results_by_id(told):
    address, answers, asked = told
    user = {"user_id": "mia_li_3668"}
    calls = [
        call("get_user_details", json.dumps(user)),
        call("no_such_tool", "{}"),
        call("get_user_details", "{broken"),
    ]
    answers += [{"content": None, "tool_calls": calls}, {"content": "Done."}]
    episode = oracle.Episode("airline", oracle.load_tasks("airline", "base")[0], "scripted")
    ended = []
    arguments = {"api_base": address, "api_key": "none", "seed": 3}
    evaluation.play_api([episode], "openai/m", on_finish=lambda *end: ended.append(end), temperature=0.2, **arguments)
    ((same, trajectory),) = ended
    assert same is episode and trajectory.valid and trajectory.termination == "user_stop"
    assert (
        asked[0]["temperature"] == 0.2
        and asked[0]["seed"] == 3
        and asked[0]["messages"][0]["content"] == episode.system
    )
    assert {t["function"]["name"] for t in asked[0]["tools"]} == {t["function"]["name"] for t in episode.tools}
    said, *results = asked[1]["messages"][-4:]
    assert [c["id"] for c in said["tool_calls"]] == [m["tool_call_id"] for m in results]
    assert "mia_li_3668" in results[0]["content"] and "not found" in results[1]["content"]
    assert "malformed JSON" in results[2]["content"]
    assert isinstance(episode.messages[2], AssistantMessage) and sum(trajectory.action_mask) == 3 * len(asked)


def test_an_agent_behind_a_server_that_fails_is_counted_as_invalid(told, tmp_path):
    address, answers, _ = told
    answers += [500]
    args = evaluation.Args("openai/m", api_base=address, output=str(tmp_path / "out"), retries=1, **SHORT)
    with pytest.raises(evaluation.StopRun, match=r"4 of 4 conversations ended in an error .* InternalServerError"):
        evaluation.run_evaluation(args)
    assert all(r["reward"] is None for r in evaluation.read_trials(tmp_path / "out"))


def test_a_policy_is_trained_with_tau2s_simulated_user(told, tmp_path):
    address, answers, asked = told
    answers += [{"content": "My phone does not work. ###STOP###"}]
    sizes = "--max_tasks_per_domain 1 --num_steps_per_task 1 --batch_size_per_gpu 1 --num_samples_per_prompt 2"
    limits = "--warmup_steps 1 --max_turns 2 --max_new_tokens 4 --eval_trials 1"
    names = f"--task_order telecom --user openai/m --user_api_base {address} --runs_dir {tmp_path} --run_name r"
    summary = train.train(train.parse_args(f"{names} {sizes} {limits}".split()))
    assert summary["user"] == "openai/m" and "solo" not in summary["note"] and len(asked) > 3
    records = evaluation.read_jsonl(tmp_path / "r" / "trajectories.jsonl")
    assert all(r["reward"] == 0.0 and r["messages"][1]["content"].startswith("My phone") for r in records)


# ------------------------------------------------------------------------------------------- a local policy


@pytest.fixture
def local(monkeypatch, tmp_path):
    """(name of the user, list of batches of what was read, list of what is said in turn): the embedded policy, with the
    words put into its mouth, so that all but its sampling is real."""
    model, tokenizer = grpo.load_policy("tiny", "float32", "cpu")
    grpo.save_policy(model, tokenizer, tmp_path / "policy", grpo.gathered_weights(model))
    evaluation.use_policy_as_user(str(tmp_path / "policy"), "float32", "cpu", temperature=0.0)
    batches, words = [], []

    def rollout(model, tokenizer, requests, **settings):
        batches.append([(r.system, r.tools, r.opening(), settings) for r in requests])
        played = [grpo.Trajectory("request", "0") for _ in requests]
        for request, trajectory in zip(requests, played, strict=True):
            trajectory.action_mask = [True] * 5
            request.act(grpo.parse_message(words.pop(0) if len(words) > 1 else words[0]))
        return played

    monkeypatch.setattr(grpo, "rollout", rollout)
    return f"policy:{tmp_path / 'policy'}", batches, words


def test_a_local_policy_is_tau2s_user_with_its_tools(local):
    user, batches, words = local
    calls = '<tool_call>{"name": "check_status_bar", "arguments": {}}</tool_call>'
    words += ["My phone does not work.", "<tool_call>{broken</tool_call>", calls, "Still nothing. ###STOP###"]
    episode = oracle.Episode("telecom", telecom()[0], user)
    assert episode.slow and episode.opening()[-1]["content"] == "My phone does not work."
    assert episode.act({"content": "Look at your screen."}) == [] and episode.termination == "user_stop"
    assert [m.role for m in episode.messages] == ["assistant", "user", "assistant", "user", "tool", "user"]
    ((system, tools, messages, settings),) = batches[-1]
    assert "<scenario>" in system and settings["temperature"] == 0.0
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
    monkeypatch.setattr(grpo, "rollout", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(oracle.UserFailed, match=r"policy failed 4 times: .*division by zero"):
        oracle.Episode("airline", oracle.load_tasks("airline", "base")[0], user).opening()


def test_two_policies_talk_to_each_other(tmp_path):
    model, tokenizer = grpo.load_policy("tiny", "float32", "cpu")
    grpo.save_policy(model, tokenizer, tmp_path / "policy", grpo.gathered_weights(model))
    monologue = {**SHORT, "user": f"policy:{tmp_path / 'policy'}", "user_temperature": 1.0}
    evaluation.run_evaluation(evaluation.Args("tiny", model_dtype="float32", output=str(tmp_path / "out"), **monologue))
    trials = evaluation.read_trials(tmp_path / "out")
    assert len(trials) == 4 and any(r["reward"] is not None for r in trials)


def test_a_run_is_trained_with_a_local_policy_as_its_user(tmp_path, monkeypatch, capsys):
    model, tokenizer = grpo.load_policy("tiny", "float32", "cpu")
    grpo.save_policy(model, tokenizer, tmp_path / "policy", grpo.gathered_weights(model))
    monkeypatch.setattr(oracle.SimulatedUser, "BACKOFF", 0.0)
    sizes = "--max_tasks_per_domain 1 --num_steps_per_task 1 --batch_size_per_gpu 1 --num_samples_per_prompt 2"
    limits = "--warmup_steps 1 --max_turns 2 --max_new_tokens 4 --eval_trials 1 --max_invalid_share 1"
    names = f"--task_order telecom --user policy:{tmp_path / 'policy'} --runs_dir {tmp_path} --run_name r"
    summary = train.train(train.parse_args(f"{names} {sizes} {limits}".split()))
    assert summary["user"] == f"policy:{tmp_path / 'policy'}" and "solo" not in summary["note"]
    records = evaluation.read_jsonl(tmp_path / "r" / "trajectories.jsonl")
    assert len(records) >= 4 and any(m["role"] == "user" for r in records for m in r["messages"])
    with pytest.raises(ValueError, match="there is no directory /no/such"):
        train.train(train.parse_args(["--user", "policy:/no/such", "--runs_dir", str(tmp_path / "other")]))
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("user, message", [("policy:/no/such", "no directory /no/such"), ("nobody", "unknown user")])
def test_users_that_are_not_there_are_named(user, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        evaluation.run_evaluation(evaluation.Args("tiny", user=user, output=str(tmp_path / "out"), **SHORT))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ the judge


def judged_episode():
    """A gold conversation of a task that is also graded by an assertion in words, as in tau2 1.0."""
    task = oracle.load_tasks("retail", "base")[3]
    criteria = task.evaluation_criteria.model_copy(
        update={"reward_basis": [RewardType.DB, RewardType.NL_ASSERTION], "nl_assertions": ["The agent is polite."]}
    )
    episode = oracle.demonstrate("retail", task)
    episode.task = task.model_copy(update={"evaluation_criteria": criteria})
    return episode


def test_without_a_judge_assertions_in_words_are_left_out_by_name():
    episode = judged_episode()
    info = oracle.score(episode, verify=True)
    assert info.reward == 1.0 and info.reward_basis == [RewardType.DB, RewardType.COMMUNICATE]
    assert set(oracle.reward_parts(episode.task, info)) == {"DB", "COMMUNICATE"}
    assert episode.task.evaluation_criteria.reward_basis == [RewardType.DB, RewardType.NL_ASSERTION]


@pytest.mark.parametrize("met", [True, False])
def test_a_judge_judges_assertions_in_words(told, met):
    address, answers, asked = told
    verdict = {"expectedOutcome": "The agent is polite.", "reasoning": "I saw it.", "metExpectation": met}
    answers += [{"content": json.dumps({"results": [verdict]})}]
    episode = judged_episode()
    oracle.use_judge("openai/m", address)
    try:
        info = oracle.score(episode)
        assert info.reward == float(met) and info.reward_basis == [RewardType.DB, RewardType.NL_ASSERTION]
        assert info.nl_assertions[0].met is met
        assert "The agent is polite." in asked[0]["messages"][-1]["content"]
        answers[:] = [{"content": "no JSON"}]
        record = evaluation.score_and_record(episode, grpo.Trajectory("retail", episode.task.id))
        assert record["reward"] is None and "JSON" in record["error"]  # the judge's fault is no zero
    finally:
        oracle.use_judge(None)
