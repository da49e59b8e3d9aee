"""oracle.py against tau2: rewards equal to its evaluator, environments private, bad agent messages answered."""

import gc
import multiprocessing
import random

import pytest

import oracle

NUM_BASE_TASKS = {"airline": 50, "retail": 114, "telecom": 114}


def play(domain, task, turns, final):
    """An episode in which the agent takes `turns` and then says `final` (or is done, in solo mode)."""
    episode = oracle.Episode(domain, task, max_turns=len(turns) + 10)
    for turn in turns:
        if not episode.done:
            episode.act(turn)
    while not episode.done:
        done = {"tool_calls": [{"function": {"name": "done", "arguments": {}}}]}
        episode.act(done if episode.solo else {"content": final})
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


def compare_with_tau2(job):
    """[(description, ours, theirs)] of what differs, and the gold rewards; run in a process of its own."""
    domain, worker, workers = job
    gc.freeze()  # tau2 builds large object graphs; collecting over them again and again doubles the time
    gc.disable()
    tasks = oracle.load_tasks(domain, "base")
    rng = random.Random(worker)
    different, gold_rewards = [], []
    for index in range(worker, len(tasks), workers):
        episodes = variants(domain, tasks[index], rng.choice(tasks), rng)
        for name, episode in episodes.items():
            ours = oracle.score(episode).model_dump()
            theirs = oracle.tau2_score(episode).model_dump()
            if ours != theirs:
                different.append((domain, tasks[index].id, name, ours, theirs))
        gold_rewards.append(oracle.score(episodes["gold"]).reward)
    return different, gold_rewards


@pytest.mark.parametrize("domain", oracle.DOMAINS)
def test_score_equals_tau2_on_every_base_task(domain):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(compare_with_tau2, [(domain, 0, 2), (domain, 1, 2)])
    assert [difference for different, _ in results for difference in different] == []
    gold_rewards = [reward for _, rewards in results for reward in rewards]
    assert gold_rewards == [1.0] * NUM_BASE_TASKS[domain]
