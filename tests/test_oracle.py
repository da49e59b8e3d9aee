"""oracle.py against tau2: rewards equal to its evaluator; tasks, splits and batches; demonstrations; the script."""

import gc
import itertools
import math
import multiprocessing
import os
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
from tau2.registry import registry

import eval as evaluation
import oracle
from grpo import Trajectory

NUM_BASE_TASKS = {"airline": 50, "retail": 114, "telecom": 114}


def play(domain, task, turns, final):
    """An episode in which the agent takes `turns` and then says `final` (or is done, in solo mode)."""
    episode = oracle.Episode(domain, task, max_turns=len(turns) + 10)
    for turn in turns:
        if not episode.done:
            episode.act(turn)
    while not episode.done:
        episode.act(oracle.DONE if episode.solo else {"content": final})
    return episode


def variants(domain, task, other_task, rng):
    """name -> episode: the conversations that the reward is compared on."""
    gold = oracle.agent_turns(oracle.demonstrate(domain, task))
    calls = [turn for turn in gold if turn.get("tool_calls") and "content" in turn]
    final = gold[-1].get("content") or ""
    others = [t for t in oracle.agent_turns(oracle.demonstrate(domain, other_task)) if t.get("tool_calls")]
    extra = [rng.choice(others)] if others else []
    return {
        "gold": play(domain, task, calls, final),
        "cut short": play(domain, task, calls[:-1], final),
        "extra action": play(domain, task, calls + extra, final),
        "nothing": play(domain, task, [], "I understand."),
        "not communicated": play(domain, task, calls, "Done."),
    }


def compare_with_tau2(domain):
    """[(description, ours, theirs)] of what differs, and the gold rewards; run in a process of its own."""
    gc.freeze()  # tau2 builds large object graphs; collecting over them again and again doubles the time
    gc.disable()
    tasks = oracle.load_tasks(domain, "base")
    rng = random.Random(0)
    different, gold_rewards = [], []
    for index, task in enumerate(tasks):
        episodes = variants(domain, task, rng.choice(tasks), rng)
        gold_rewards.append(oracle.score(episodes["gold"]).reward)
        if "REHEARSE_ALL" not in os.environ:  # tau2 takes a second for each: one of the five in turn
            episodes = dict([list(episodes.items())[index % 5]])
        for name, episode in episodes.items():
            ours = oracle.score(episode).model_dump()
            theirs = oracle.tau2_score(episode).model_dump()
            if ours != theirs:
                different.append((domain, task.id, name, ours, theirs))
    return different, gold_rewards


@pytest.mark.parametrize("domain", oracle.DOMAINS)
def test_score_equals_tau2_on_every_base_task(domain):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        different, gold_rewards = pool.apply(compare_with_tau2, [domain])
    assert different == []
    assert gold_rewards == [1.0] * NUM_BASE_TASKS[domain]


def test_verify_raises_when_the_fast_path_is_wrong(monkeypatch):
    episode = oracle.demonstrate("retail", oracle.load_tasks("retail", "base")[0])
    assert oracle.score(episode, verify=True).reward == 1.0
    monkeypatch.setattr(oracle, "changes", lambda domain, env: {"wrong": id(env)})
    with pytest.raises(RuntimeError, match="differs"):
        oracle.score(episode, verify=True)


@pytest.mark.parametrize("kind", ["all", "env", "action", "communicate"])
def test_each_evaluation_type_is_tau2s(kind):
    for domain in ("mock", "retail", "telecom"):
        for task in oracle.load_tasks(domain, "base")[:3]:
            episode = oracle.demonstrate(domain, task)
            ours, theirs = oracle.score(episode, kind), oracle.tau2_score(episode, kind)
            assert ours.model_dump() == theirs.model_dump()


def test_every_mock_task_scores_as_in_tau2():
    """mock has what the others lack: a message history, initialisation data and tasks without a ticket."""
    for task in oracle.load_tasks("mock", "base"):
        for final in ("Done.", "I understand."):
            episode = play("mock", task, oracle.agent_turns(oracle.demonstrate("mock", task))[:1], final)
            assert oracle.score(episode, verify=True) is not None


def test_random_calls_score_as_in_tau2():
    """Random tools with random arguments, several a turn, good and bad mixed: replayed by tau2 to the same reward."""
    rng = random.Random(0)
    words = [
        "C1001",
        "L1002",
        "B1001",
        "555-123-2002",
        "John Smith",
        2.0,
        -1,
        True,
        None,
        [],
        {},
        "",
        "4g_5g_preferred",
    ]
    for task in oracle.load_tasks("telecom", "base")[:25]:
        episode = oracle.Episode("telecom", task, max_turns=40)
        for _ in range(6):
            if episode.done:
                break
            calls = []
            for _ in range(rng.randint(1, 3)):
                tool = rng.choice(episode.tools)["function"]
                if tool["name"] in ("done", "refuel_data"):
                    continue  # tau2 gives the bill of a refuel a random id
                arguments = {name: rng.choice(words) for name in tool["parameters"].get("properties", {})}
                calls.append({"function": {"name": tool["name"], "arguments": arguments}})
            calls += rng.choice([[], [{"function": {"name": None, "arguments": "{"}}]])
            answers = episode.act({"content": rng.choice(["", "text"]), "tool_calls": calls})
            assert len(answers) == max(1, len(calls)) or episode.done
        while not episode.done:
            episode.act({"content": oracle.STOP})
        oracle.score(episode, verify=True)


def test_doing_nothing_passes_what_it_passes_in_tau2():
    rates = [oracle.do_nothing_rate(d, s) for d in ("airline", "retail") for s in ("train", "test")]
    in_airline = (16 / 30, 7 / 20) if oracle.V1 else (13 / 30, 6 / 20)
    assert rates == pytest.approx([*in_airline, 5 / 74, 2 / 40])
    assert oracle.do_nothing_rate("telecom", "train") == oracle.do_nothing_rate("telecom", "test") == 0.0


ASSERTED = "create_task_1_with_env_assertions"  # reads the status of a task that the agent has to create
MMS = "[mms_issue]break_app_sms_permission|data_mode_off[PERSONA:None]"  # reads a field of the settings that it may set
SPOIL = {"tool_calls": [{"function": {"name": "set_apn_settings", "arguments": {"apn_settings": []}}}]}


@pytest.mark.parametrize(
    "domain, task_id, error", [("mock", ASSERTED, "task_2 not found"), ("telecom", MMS, "mmsc_url")]
)
def test_a_state_that_the_agent_has_broken_is_a_zero_with_its_reason(domain, task_id, error):
    """tau2's evaluator raises on it."""
    task = oracle.all_tasks(domain)[task_id]
    gold = oracle.agent_turns(oracle.demonstrate(domain, task))[:-1]
    episode = play(domain, task, [*gold, SPOIL] if domain == "telecom" else [], "Done.")
    with pytest.raises((ValueError, AttributeError), match=error):
        oracle.tau2_score(episode)
    trajectory = Trajectory(domain, task_id, termination=episode.termination)
    record = evaluation.score_and_record(episode, trajectory)
    assert trajectory.valid and record["reward"] == 0.0 == max(record["reward_parts"].values())
    assert error in record["error"] and record["termination"] == "agent_error"
    oracle.score(episode, verify=True)


def test_a_task_that_tau2_cannot_grade_is_not_the_agents_fault():
    task = oracle.all_tasks("mock")[ASSERTED].model_copy(deep=True)
    task.evaluation_criteria.env_assertions[0].func_name = "assert_nothing"
    with pytest.raises(AttributeError, match="assert_nothing"):
        oracle.score(oracle.demonstrate("mock", task))
    assert oracle.do_nothing("mock", [task]) == (None, {})
    tasks = oracle.load_tasks("mock", "base")
    rewards = [oracle.score(play("mock", task, [], "I understand.")).reward for task in tasks]
    assert oracle.do_nothing_rate("mock", "base") == pytest.approx(np.mean(rewards))


@pytest.mark.parametrize("kind", ["all", "env", "action", "communicate"])
def test_parts_of_the_reward_multiply_to_it_and_are_zero_if_it_is_not_graded(kind):
    counted = {"all": {"DB", "COMMUNICATE"}, "env": {"DB"}}.get(kind, {kind.upper()})
    for domain in ("airline", "retail"):
        for task in oracle.load_tasks(domain, "test")[:5]:
            floor, parts = oracle.do_nothing(domain, [task], evaluation_type=kind)
            assert math.prod(parts.values()) == floor and set(parts) == counted
    episode = oracle.Episode(domain, task, max_turns=1)
    episode.act({"content": "Hello."})
    assert episode.termination == "max_steps"
    parts = oracle.reward_parts(task, oracle.score(episode, kind, verify=True), kind)
    assert parts == dict.fromkeys(counted, 0.0)
    assert oracle.mean_parts([{"DB": 0.0, "ACTION": 0.0}, {"DB": 1.0}]) == {"ACTION": 0.0, "DB": 0.5}


def test_splits_are_tau2s():
    for domain in oracle.DOMAINS:
        splits = registry.get_task_splits_loader(domain)()
        for split in ("train", "test"):
            assert {task.id for task in oracle.load_tasks(domain, split)} == set(splits[split])
    assert len(oracle.load_tasks("retail", "train", max_tasks=5)) == 5


def test_a_domain_without_splits_is_cut():
    train, test = (oracle.load_tasks("mock", split, train_split=0.7, seed=3) for split in ("train", "test"))
    number = len(registry.get_tasks_loader("mock")(None))  # 9 in tau2 0.2, 10 in 1.0
    assert len(train) == round(0.7 * number) and len(test) == number - len(train) > 0
    assert not {t.id for t in train} & {t.id for t in test}
    assert [t.id for t in train] != [t.id for t in oracle.load_tasks("mock", "train", train_split=0.7, seed=4)]


@pytest.mark.parametrize("order", get_args(oracle.BatchOrder))
@pytest.mark.parametrize("count", [3, 9])
def test_batches_cover_each_epoch_once(order, count):
    tasks, rates = list(range(7)), {0: 0.9, 3: 0.1, 5: 0.1}
    drawn = [t for step in range(7) for t in oracle.sample_tasks(tasks, count, step, 5, order, rates)]
    for epoch in range(count):
        assert sorted(drawn[7 * epoch : 7 * epoch + 7]) == tasks
    assert (drawn == tasks * count) == (order == "sequential")
    assert (drawn[:7] == drawn[7:14]) == (order == "sequential")


def test_balanced_batches_span_the_difficulties():
    rates = {f"task{k}": k / 12 for k in range(12)} | {"task6": 0.5}
    known = {task: rate for task, rate in rates.items() if task != "task6"}  # an unknown one counts as 0.5
    drawn = [oracle.sample_tasks(list(rates), 4, step, 0, "balanced", known) for step in range(300)]
    for batch in drawn:
        assert sorted(int(4 * rates[task]) for task in batch) == [0, 1, 2, 3]
    together = {frozenset(pair) for batch in drawn for pair in itertools.combinations(batch, 2)}
    assert len(together) == 6 * 3 * 3  # any two tasks of different strata meet
    rates = {k: k / 10 for k in range(10)}
    drawn = [oracle.sample_tasks(range(10), 4, step, 0, "balanced", rates) for step in range(50)]
    assert all(min(batch) < 5 and max(batch) > 6 for batch in drawn)  # where two epochs meet, two strata stand for four


def test_a_batch_depends_on_its_number_and_the_seed_only():
    assert oracle.sample_tasks("abcdefg", 3, 4, 5) == ["d", "b", "a"]
    assert oracle.sample_tasks("abcdefg", 3, 0, [1, 2]) == ["a", "g", "f"]


def test_first_tasks_are_drawn_evenly():
    firsts = np.array([oracle.sample_tasks(range(7), 1, 0, seed)[0] for seed in range(3500)])
    counts = np.bincount(firsts, minlength=7)
    assert ((counts - 500) ** 2 / 500).sum() < 22.5  # chi-square, 6 degrees of freedom, p = 0.001


def test_short_tasks_need_action_and_open_differently():
    for domain in oracle.DOMAINS:
        tasks = oracle.short_tasks(domain, "train", 3)
        openings = {oracle.Episode(domain, task).opening()[-1]["content"][: oracle.ALIKE] for task in tasks}
        assert len(openings) == 3
        for task in tasks:
            assert len(task.evaluation_criteria.actions) >= 2
            assert oracle.score(play(domain, task, [], "0 1 2 3 4 5 6 7 8 9")).reward == 0.0


def settings(**changed):
    usual = {**vars(oracle.Flags()), "seed": 0, "eval_split": "test", "eval_max_tasks": None, "model_name_or_path": ""}
    return SimpleNamespace(**{**usual, **changed})


def test_tasks_to_train_and_to_evaluate_on():
    args = settings(task_order=["retail", "mock"], max_tasks_per_domain=3, eval_max_tasks=2)
    training = oracle.training_tasks(args)
    assert training == {d: oracle.load_tasks(d, "train", 3) for d in ("retail", "mock")}
    assert oracle.evaluation_tasks(args, training) == {d: oracle.load_tasks(d, "test", 2) for d in ("retail", "mock")}
    args.eval_split = "train"
    assert oracle.evaluation_tasks(args, training) == {domain: tasks[:2] for domain, tasks in training.items()}
    short = settings(task_order=["retail"], max_tasks_per_domain=3, model_name_or_path="tiny")
    assert oracle.training_tasks(short) == {"retail": oracle.short_tasks("retail", "train", 3)}


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda: oracle.load_tasks("airlines"), "unknown domain 'airlines'; choose one of airline"),
        (lambda: oracle.load_tasks("airline", "validation"), "unknown split 'validation' of airline"),
        (lambda: oracle.load_tasks("airline", max_tasks=0), "has no tasks"),
        (lambda: oracle.short_tasks("airline", "train", 1000), "asked for 1000"),
        (lambda: oracle.training_tasks(settings(task_order=[])), "task_order"),
        (lambda: oracle.training_tasks(settings(task_order=["retail", "retail"])), "each domain once"),
        (lambda: oracle.score(oracle.Episode("airline", oracle.load_tasks("airline")[0])), "not finished"),
        (lambda: oracle.score(oracle.demonstrate("mock", oracle.load_tasks("mock")[0]), "magic"), "magic"),
    ],
)
def test_bad_input_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_agent_turns_replay_a_demonstration():
    for domain in oracle.DOMAINS:
        task = oracle.load_tasks(domain, "base")[5]
        shown = oracle.demonstrate(domain, task)
        episode = oracle.Episode(domain, task)
        for turn in oracle.agent_turns(shown):
            episode.act(turn)
        assert [m.content for m in episode.messages] == [m.content for m in shown.messages]
        assert oracle.score(episode) == oracle.score(shown) == oracle.score(shown)  # scoring changes nothing


def run(*args):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, timeout=600)


def test_the_script_shows_a_task():
    shown = run("oracle.py", "--domain", "retail", "--task", "0")
    assert shown.returncode == 0 and shown.stderr == ""
    assert "exchange_delivered_order_items" in shown.stdout and "reward 1.0 = {'DB': 1.0" in shown.stdout


def test_the_script_names_what_is_wrong_in_one_line():
    wrong = run("oracle.py", "--domain", "retail", "--task", "9999")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert wrong.stderr.count("\n") == 1 and "9999" in wrong.stderr


def test_oracle_alone_needs_no_torch():
    code = "import sys, oracle; print([name for name in ('torch', 'transformers') if name in sys.modules])"
    assert run("-c", code).stdout == "[]\n"
