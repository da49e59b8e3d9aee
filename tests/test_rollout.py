"""rollout.py: both engines against a full forward pass, slow episodes, and what a trajectory holds."""

import copy
import math
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_chat import TEMPLATES, with_template

import rollout
from chat import ChatFormat
from grpo import collate, policy_loss
from policy import load_policy, token_logprobs

both_engines = pytest.mark.parametrize("engine", ["padded", "paged"])
PATIENCE = 300  # seconds, after which a test that hangs fails


class Chatter:
    """An episode that answers with texts of different lengths until its turns are used up."""

    domain, system, tools = "toy", "", []

    def __init__(self, number, turns=3):
        self.task, self.left = SimpleNamespace(id=number), turns
        self.messages, self.done, self.termination = [], False, ""

    def opening(self):
        return [{"role": "user", "content": f"Open door {self.task.id}."}]

    def act(self, message):
        self.messages.append(message)
        self.left -= 1
        if self.left == 0:
            self.stop("user_stop")
            return []
        return [{"role": "tool", "content": "result " * self.task.id}, {"role": "tool", "content": "second"}]

    def stop(self, reason):
        self.done, self.termination = True, reason


class SlowChatter(Chatter):
    slow = True


class Lecture(Chatter):
    def opening(self):
        shared = " ".join(str(n * n) for n in range(400))
        return [{"role": "user", "content": f"{shared} {self.task.id}"}]


def play(policy, episodes, **kwargs):
    kwargs = {"max_new_tokens": 12, "generator": torch.Generator().manual_seed(0), **kwargs}
    return rollout.rollout(*policy, episodes, **kwargs)


def assert_scored(model, trajectories, temperature=1.0, atol=1e-4):
    """Log-probabilities are those that the loss computes, so that its first ratio is 1."""
    for t in trajectories:
        ids, mask = torch.tensor([t.token_ids]), torch.tensor(t.action_mask)
        full = token_logprobs(model, ids, torch.ones_like(ids), temperature)[0]
        assert mask.any() and t.action_mask == [turn >= 0 for turn in t.turns]
        torch.testing.assert_close(torch.tensor(t.logprobs), full * mask, atol=atol, rtol=0)


@both_engines
@pytest.mark.parametrize(
    "dtype, temperature, atol", [("float32", 1, 1e-4), ("float32", 0.7, 1e-4), ("bfloat16", 1, 0.05)]
)
def test_rollout_logprobs_are_those_of_a_full_forward_pass(dtype, temperature, atol, engine):
    policy, turns = load_policy("tiny", dtype, "cpu"), [1, 3, 2, 4, 1, 3]
    episodes = [Chatter(n, k) for n, k in zip((0, 3, 1, 9, 0, 2), turns, strict=True)]
    trajectories = play(policy, episodes, temperature=temperature, engine=engine)
    assert [max(t.turns) + 1 for t in trajectories] == turns
    assert_scored(policy[0], trajectories, temperature, atol)


def test_the_most_likely_tokens_are_the_same_whichever_way_they_are_decoded(tiny):
    eager, played = load_policy("tiny", "float32", "cpu", attn_implementation="eager")[0], []
    for model, engine in ((tiny[0], "padded"), (tiny[0], "paged"), (eager, "padded")):
        for kind in (Chatter, SlowChatter):
            episodes = [kind(n % 4, 3) for n in range(8)]
            trajectories = play((model, tiny[1]), episodes, temperature=0, engine=engine, max_new_tokens=9)
            played.append([t.token_ids for t in trajectories])
    assert all(other == played[0] for other in played)


def test_rollout_samples_the_distribution_it_reports(tiny):
    """Over many one-token turns, a token comes as often as its reported probability says."""
    sharp = copy.deepcopy(tiny[0])
    sharp.get_output_embeddings().weight.data *= 30
    trajectories = play((sharp, tiny[1]), [Chatter(1, 1) for _ in range(3000)], max_new_tokens=1, temperature=0.9)
    reported = {t.token_ids[-1]: math.exp(t.logprobs[-1]) for t in trajectories}
    token = max(reported, key=reported.get)
    counted = np.mean([t.token_ids[-1] == token for t in trajectories])
    assert reported[token] > 0.05
    assert abs(counted - reported[token]) < 4 * math.sqrt(reported[token] / 3000)


def test_tokens_are_drawn_by_their_probabilities():
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2 - 1e-9, 1e-9, 0.0])
    logits = probabilities.log().clamp(min=-1000).expand(20_000, -1)
    tokens, logprobs = rollout.draw(logits, 1.0, torch.Generator().manual_seed(0))
    found = torch.bincount(torch.tensor(tokens), minlength=6) / len(tokens)
    assert (found - probabilities).abs().max() < 0.012 and found[1] == found[5] == 0  # three standard deviations
    assert logprobs[:5] == pytest.approx([probabilities[token].log().item() for token in tokens[:5]], abs=1e-6)
    assert rollout.draw(logits[:2], 0.0, None)[0] == [0, 0]


def test_no_token_is_too_rare_to_be_drawn(monkeypatch):
    """A hundred thousand tokens have 1e-8 each: float32, whose steps there are 1e-7, would leave most of them out."""
    logits = torch.cat([torch.zeros(1), torch.full((100_000,), 1e-8).log()]).expand(5, -1)
    total, places = 1 + 1e-3, torch.tensor([1, 2, 500, 50_000, 99_999])
    numbers = (1 + 1e-8 * (places.double() - 0.5)) / total  # in the middle of these tokens
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: numbers.view(size))
    assert rollout.draw(logits, 1.0, None)[0] == places.tolist()


@both_engines
def test_a_conversations_tokens_are_computed_once(tiny, engine):
    """Tokens fed to the model, against the distinct beginnings of all conversations."""
    fed = []
    hook = (
        tiny[0]
        .get_decoder()
        .register_forward_pre_hook(
            lambda module, inputs, kwargs: fed.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
    )
    tasks = 1 if engine == "padded" else 3  # the padded engine shares openings between samples of one task only
    trajectories = play(tiny, [Lecture(n % tasks, 3) for n in range(6)], engine=engine, max_new_tokens=20)
    hook.remove()
    distinct = {tuple(t.token_ids[:end]) for t in trajectories for end in range(1, len(t.token_ids) + 1)}
    assert min(len(t.token_ids) for t in trajectories) > 1000
    assert 0.9 <= sum(fed) / len(distinct) <= (1.15 if engine == "paged" else 1.1)


@both_engines
def test_nothing_cached_survives_an_optimiser_step(tiny, engine):
    model = copy.deepcopy(tiny[0])
    play((model, tiny[1]), [Chatter(2, 2)], engine=engine)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.3)
    assert_scored(model, play((model, tiny[1]), [Chatter(2, 2)], engine=engine))


@both_engines
def test_rollouts_leave_the_global_random_state_alone(tiny, engine):
    before = torch.get_rng_state()
    play(tiny, [Chatter(1, 1)], engine=engine)
    assert torch.equal(torch.get_rng_state(), before)


@both_engines
def test_slow_episodes_wait_side_by_side_while_the_others_go_on(tiny, engine):
    """Each slow one answers when all of them have been asked and a quick one has ended."""
    all_asked, quick_ended, threads, finished = threading.Barrier(4), threading.Event(), [], []

    class Waiting(SlowChatter):
        def act(self, message):
            threads.append(threading.current_thread())
            all_asked.wait(PATIENCE)
            assert quick_ended.wait(PATIENCE)
            return super().act(message)

    class Quick(Chatter):
        def stop(self, reason):
            super().stop(reason)
            quick_ended.set()

    def on_finish(episode, trajectory):
        finished.append(trajectory.task_id)
        assert threading.current_thread() not in threads

    played = play(tiny, [Quick(4, 5), *(Waiting(n, 3) for n in range(4))], engine=engine, on_finish=on_finish)
    assert [len(t.messages) for t in played] == [5, 3, 3, 3, 3] and all(t.valid for t in played)
    assert finished[0] == "4" and sorted(finished) == ["0", "1", "2", "3", "4"]
    assert_scored(tiny[0], played)


@both_engines
def test_an_error_of_the_environment_spoils_one_trajectory_only(tiny, engine):
    class Broken(Chatter):
        def act(self, message):
            raise TimeoutError("the server does not answer")

    class SlowBroken(Broken):
        slow = True

    class Unreachable(SlowChatter):
        def opening(self):
            raise ConnectionError("no server")

    class Endless(SlowChatter):
        def opening(self):
            return [{"role": "user", "content": "and then " * 3000}]

    kinds = (Chatter, Broken, SlowBroken, Unreachable, Endless, Chatter)
    played = play(tiny, [kind(n) for n, kind in enumerate(kinds)], engine=engine)
    timeout = "TimeoutError: the server does not answer"
    full = "ValueError: the opening of toy task 4 has 24017 tokens, which leaves none in a context of 4096"
    assert [t.error for t in played] == ["", timeout, timeout, "ConnectionError: no server", full, ""]
    assert [t.termination for t in played] == ["user_stop", *["environment_error"] * 4, "user_stop"]
    assert all((t.error == "") == t.valid and t.task_id == str(n) for n, t in enumerate(played))


def test_the_policy_reads_the_template_around_its_sampled_ids(tiny):
    [t] = play(tiny, [Chatter(2, turns=3)], max_new_tokens=5)
    said = []
    for turn in range(3):
        ids = [i for i, k in zip(t.token_ids, t.turns, strict=True) if k == turn]
        assert len(ids) <= 5 and tiny[1].eos_token_id not in ids[:-1]
        said.append(tiny[1].decode(ids).removesuffix("<|im_end|>"))
    results = "<tool_response>\nresult result \n</tool_response>\n<tool_response>\nsecond\n</tool_response>"
    expected = "<|im_start|>user\nOpen door 2.<|im_end|>\n<|im_start|>assistant\n"
    for text in said[:-1]:
        expected += f"{text}<|im_end|>\n<|im_start|>user\n{results}<|im_end|>\n<|im_start|>assistant\n"
    assert tiny[1].decode(t.token_ids).removesuffix("<|im_end|>") == expected + said[-1]


def spoken(tokenizer, episode, turns):
    """The trajectory of a policy that samples the ids of `turns`."""
    conversation = rollout._Conversation(episode, ChatFormat.of(tokenizer), 99, 999, {})
    for ids in turns:
        conversation.say(ids, [0.0] * len(ids))
    return conversation.trajectory


def test_thoughts_that_a_template_would_drop_stay_as_they_were_sampled(tiny):
    tokenizer, episode = with_template(tiny[1], TEMPLATES["Qwen3"]), Chatter(1, turns=3)
    thought = tokenizer("<think>\nhm\n</think>\n\nYes.<|im_end|>").input_ids
    t = spoken(tokenizer, episode, [thought] * 3)
    assert [[i for i, k in zip(t.token_ids, t.turns, strict=True) if k == turn] for turn in range(3)] == [thought] * 3
    assert {message["content"] for message in episode.messages} == {"Yes."}


GOLD = [{"content": "Hi."}, {"tool_calls": [{"function": {"name": "look", "arguments": {}}}]}]


def test_the_end_of_a_turn_is_trained_on_and_nothing_else_is(tiny):
    """Also where the padding has the same id as the end of a turn."""
    end = ChatFormat.of(tiny[1]).end_id
    shown = [rollout.demonstration(tiny[1], Chatter(n, 3), GOLD[:n]) for n in (1, 2)]
    for t in shown:
        t.advantage = 1.0
    batch = collate(shown, pad_id=end)
    for t, ids, mask in zip(shown, batch["ids"], batch["mask"], strict=True):
        assert ids[mask].tolist().count(end) == max(t.turns) + 1
        assert not mask[len(t.action_mask) :].any()
    loss, _ = policy_loss(torch.zeros(batch["ids"].shape), *(batch[n] for n in ("old_logprobs", "advantages", "mask")))
    assert loss.item() == pytest.approx(-1.0)  # the mean over action tokens alone


def test_a_demonstration_is_what_a_rollout_of_these_turns_would_be(tiny):
    chat = ChatFormat.of(tiny[1])
    played = spoken(tiny[1], Chatter(4, 2), [chat.turn(turn) for turn in GOLD])
    shown = rollout.demonstration(tiny[1], Chatter(4, 2), GOLD)
    assert shown.messages == GOLD and shown.termination == "user_stop"
    assert [m["content"] for m in played.messages] == ["Hi.", ""] and len(played.messages[1]["tool_calls"]) == 1
    played.messages = GOLD
    assert shown == played


def test_openings_are_not_changed(tiny):
    """The samples of a group share one opening, and each must read the same."""
    shared, episodes = [{"role": "user", "content": "long " * 40}], [Chatter(1, 2) for _ in range(3)]
    for episode in episodes:
        episode.opening = lambda: shared
    trajectories = play(tiny, episodes, max_user_tokens=5)
    assert shared == [{"role": "user", "content": "long " * 40}]
    assert len({tuple(t.token_ids[: t.action_mask.index(True)]) for t in trajectories}) == 1


def test_a_full_context_ends_the_conversation(tiny):
    episode = Chatter(9, turns=50)
    [t] = play(tiny, [episode], max_context=60)
    assert len(t.token_ids) <= 60 and (t.termination, episode.termination) == ("max_steps", "max_steps")


@both_engines
def test_an_episode_that_is_over_before_it_begins_counts_as_finished(tiny, engine):
    over, chatter, ended = Chatter(1), Chatter(2, 1), []
    over.stop("user_stop")
    played = play(tiny, [over, chatter], engine=engine, on_finish=lambda *pair: ended.append(pair))
    assert ended == [(over, played[0]), (chatter, played[1])]
    assert [t.termination for t in played] == ["user_stop"] * 2 and not any(played[0].action_mask)


@pytest.mark.parametrize("engine, attention", [("padded", "flash_attention_2"), ("paged", "flex_attention")])
def test_an_attention_that_an_engine_cannot_use_is_named(tiny, engine, attention):
    model = copy.deepcopy(tiny[0])
    model.config._attn_implementation = attention
    with pytest.raises(ValueError, match=f"{engine} rollouts need .*, not {attention}"):
        play((model, tiny[1]), [Chatter(1)], engine=engine)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"engine": "fast"}, "unknown engine 'fast'; choose one of auto, padded, paged"),
        ({"temperature": math.nan}, "temperature must be 0 or more, got nan"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_context": 5000}, "max_context must be at most the model's 4096 tokens, got 5000"),
        ({"max_context": 40}, "the opening of toy task 1 has .* tokens, which leaves none in a context of 40"),
    ],
)
def test_bad_settings_are_named(tiny, settings, message):
    with pytest.raises(ValueError, match=message):
        play(tiny, [Lecture(1)], **settings)


def test_an_opening_is_checked_with_its_messages_cut(tiny):
    rollout.check_opening(*tiny, Lecture(1), max_context=40, max_user_tokens=10)
    with pytest.raises(ValueError, match="leaves none in a context of 40"):
        rollout.check_opening(*tiny, Lecture(1), max_context=40)


def test_a_policy_that_has_diverged_is_named(tiny):
    model = copy.deepcopy(tiny[0])
    model.get_output_embeddings().weight.data.mul_(math.nan)
    with pytest.raises(ValueError, match="not finite"):
        play((model, tiny[1]), [Chatter(1)])
