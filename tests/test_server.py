"""server.py: rollouts by servers that are good, slow, dying, stale or lying; LoRA; runs that a server ends."""

import copy
import fcntl
import itertools
import math
import os
import re
import threading
from contextlib import nullcontext

import pytest
import torch
from fake_api import fake_api
from fake_vllm import serving
from law import SMALL, refused, small_args, small_run, steps_of
from ranks import on_two_ranks
from safetensors import SafetensorError
from test_rollout import Chatter, SlowChatter, assert_scored

import distributed
import policy
import rollout
import server
import train
from report import read_jsonl
from server import ServerFailed


@pytest.fixture
def fake(tiny, tmp_path):
    with serving(*tiny, tmp_path / "policy") as [one]:
        yield one


def play(model, tokenizer, fake, episodes, timeout=30.0, **kwargs):
    fakes = fake if isinstance(fake, list) else [fake]
    kwargs = {"max_new_tokens": 8, "generator": torch.Generator().manual_seed(0), **kwargs}
    kwargs |= {"engine": "vllm", "vllm_url": [one.url for one in fakes], "vllm_timeout": timeout}
    return rollout.rollout(model, tokenizer, episodes, **kwargs)


def moved(model, scale=0.05):
    """A copy of the policy after an update."""
    other, rng = copy.deepcopy(model), torch.Generator().manual_seed(3)
    for p in other.parameters():
        p.data += scale * torch.randn(p.shape, generator=rng)
    return other


@pytest.mark.parametrize("kind", [Chatter, SlowChatter])
def test_a_servers_logprobs_are_those_of_a_full_forward_pass(tiny, fake, kind):
    turns = [1, 3, 2, 4]
    episodes = [kind(n, k) for n, k in enumerate(turns)]
    trajectories = play(*tiny, fake, episodes, temperature=0.7)
    assert [max(t.turns) + 1 for t in trajectories] == turns
    assert_scored(tiny[0], trajectories, 0.7)


def test_the_most_likely_tokens_are_those_of_the_padded_engine(tiny, fake):
    served = play(*tiny, fake, [Chatter(n % 3, 3) for n in range(5)], temperature=0)
    padded = rollout.rollout(*tiny, [Chatter(n % 3, 3) for n in range(5)], temperature=0, max_new_tokens=8)
    assert [t.token_ids for t in served] == [t.token_ids for t in padded]


def test_a_conversation_goes_on_as_soon_as_it_is_answered(tiny, fake):
    """The first conversation's first turn is answered when all others have ended, and not before."""
    ended, turns = threading.Event(), itertools.count()

    def delay(body):
        if "prompt" in body and "prompt_logprobs" not in body and next(turns) == 0:
            assert ended.wait(60)
        return 0.0

    fake.delay, finished = delay, []

    def on_finish(episode, trajectory):
        finished.append(episode)
        if len(finished) == 3:
            ended.set()

    play(*tiny, fake, [Chatter(n, 3) for n in range(4)], on_finish=on_finish)
    assert len(finished) == 4


def test_weights_are_handed_over_when_they_have_changed(tiny, fake):
    for model, reloads in ((tiny[0], 1), (tiny[0], 1), (moved(tiny[0]), 2), (tiny[0], 3)):
        assert_scored(model, play(model, tiny[1], fake, [Chatter(1)]))
        assert fake.count("/collective_rpc") == fake.count("/reset_prefix_cache") == reloads


def test_bfloat16_weights_are_handed_over_in_bfloat16(tmp_path):
    model, tokenizer = policy.load_policy("tiny", "bfloat16", "cpu")
    weights = server.served_weights(model)
    assert {w.dtype for w in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    with serving(model, tokenizer, tmp_path / "policy") as [fake]:
        assert_scored(model, play(model, tokenizer, fake, [Chatter(1)]), atol=0.1)


@pytest.mark.parametrize("kept, scale", [(["lm_head.weight"], 0.05), ("all", 0.05), ("all", 0.002)])
def test_a_server_that_plays_an_old_policy_stops_the_run(tiny, fake, kept, scale):
    play(*tiny, fake, [Chatter(1)])
    fake.kept_names = dict(fake.model.state_dict()) if kept == "all" else kept
    model = moved(tiny[0], scale)
    with pytest.raises(
        ServerFailed, match=r"plays another policy, perhaps an old one: its log-probabilities are [0-9.]+"
    ):
        play(model, tiny[1], fake, [Chatter(1)])
    fake.kept_names = ()
    assert_scored(model, play(model, tiny[1], fake, [Chatter(1)]))  # it did not count as handed over


def test_a_server_that_rounds_is_not_mistaken_for_one_with_an_old_policy(tiny, fake):
    """Its precision is what the first hand-over shows."""
    scores, rng = fake.complete, torch.Generator().manual_seed(0)

    def rounded(body):
        choice = scores(body)
        logprobs = choice["logprobs"]["token_logprobs"]
        noise = (0.02 * torch.randn(len(logprobs), generator=rng)).tolist()
        choice["logprobs"]["token_logprobs"] = [min(0.0, p + e) for p, e in zip(logprobs, noise, strict=True)]
        return choice

    fake.complete = rounded
    for scale in (0.0, 1e-4, 0.05):
        play(moved(tiny[0], scale), tiny[1], fake, [Chatter(1)])


LIES = {
    "too few log-probabilities": lambda c: {**c, "logprobs": {"token_logprobs": c["logprobs"]["token_logprobs"][:-1]}},
    "no ids": lambda c: {k: v for k, v in c.items() if k != "token_ids"},
    "an empty turn": lambda c: {**c, "token_ids": [], "logprobs": {"token_logprobs": []}},
    "words": lambda c: {**c, "token_ids": ["a"] * len(c["token_ids"])},
    "no numbers": lambda c: {**c, "logprobs": {"token_logprobs": [math.nan] * len(c["token_ids"])}},
    "null": lambda c: {**c, "logprobs": {"token_logprobs": [None] * len(c["token_ids"])}},
    "likelier than certain": lambda c: {**c, "logprobs": {"token_logprobs": [0.5] * len(c["token_ids"])}},
    "no logprobs": lambda c: {**c, "logprobs": None},
    "ids beyond the vocabulary": lambda c: {**c, "token_ids": [10**6] * len(c["token_ids"])},
    "negative ids": lambda c: {**c, "token_ids": [-1] * len(c["token_ids"])},
    "half a turn": lambda c: {**c, "token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}},
    "too long": lambda c: {**c, "token_ids": [5] * 99, "logprobs": {"token_logprobs": [-1.0] * 99}},
    "no choice": lambda c: None,
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_of_the_server_is_one_clear_line(tiny, fake, lie):
    play(*tiny, fake, [Chatter(1)])
    fake.change = LIES[lie]
    with pytest.raises(ServerFailed, match=r"^http://127.0.0.1:\d+(/v1/completions)? answers? with[^\n]*$"):
        play(*tiny, fake, [Chatter(1), Chatter(2)])


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_the_probe_is_one_clear_line(tiny, fake, lie):
    fake.change = LIES[lie]
    with pytest.raises(ServerFailed, match=r"^http://127.0.0.1:\d+ answers with[^\n]*$"):
        play(*tiny, fake, [Chatter(1)])


@pytest.mark.parametrize("after", [1, 3])
def test_a_server_that_comes_back_in_time_is_waited_for(tiny, fake, after):
    play(*tiny, fake, [Chatter(1)])
    asked = fake.count("/v1/completions")

    def die(body):
        if fake.count("/v1/completions") >= asked + after and not died:
            died.append(1)
            fake.stop()
            threading.Timer(1.5, fake.start).start()
            raise ConnectionResetError
        return 0.0

    died, fake.delay = [], die
    assert_scored(tiny[0], play(*tiny, fake, [Chatter(n, 2) for n in range(3)]))
    assert died


@pytest.mark.parametrize("how", ["gone", "hangs", "errors"])
def test_a_server_that_gives_no_answer_ends_the_rollout_in_time(tiny, fake, capsys, how):
    play(*tiny, fake, [Chatter(1)])
    if how == "gone":
        fake.stop()
    elif how == "hangs":
        fake.delay = lambda body: 8.0
    else:
        fake.status = lambda path: 503
    with pytest.raises(ServerFailed, match=r"has given no answer for 2 s .*; see --vllm_timeout"):
        play(*tiny, fake, [Chatter(n) for n in range(40)], timeout=2.0)
    assert len(re.findall("waiting for", capsys.readouterr().out)) <= 1  # not for each of them


def test_a_server_whose_scores_stay_is_noticed_where_rounding_hides_the_difference(tmp_path):
    model, tokenizer = policy.load_policy("tiny", "bfloat16", "cpu")
    with serving(model, tokenizer, tmp_path / "policy") as [fake]:
        play(model, tokenizer, fake, [Chatter(1)])
        fake.kept_names = dict(fake.model.state_dict())
        other = moved(model, 0.002)
        with pytest.raises(ServerFailed, match=r"are 0\.0\d+ away from those here, .*, and have not changed"):
            play(other, tokenizer, fake, [Chatter(1)])


def test_a_directory_without_room_is_one_line(tiny, fake, monkeypatch):
    def full(*args, **kwargs):
        (fake.folder / "model.tmp").write_text("half")
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr(server, "save_file", full)
    with pytest.raises(ServerFailed, match=r"cannot write .*, which needs room for the weights twice: No space left"):
        play(*tiny, fake, [Chatter(1)])
    assert not (fake.folder / "model.tmp").exists()


def test_a_request_that_hangs_does_not_keep_the_process_from_ending():
    before, released = set(threading.enumerate()), threading.Event()
    future = server.in_thread(released.wait)
    [thread] = set(threading.enumerate()) - before
    assert thread.daemon and not future.done()
    released.set()
    assert future.result(60)


def test_an_error_that_breaks_off_is_waited_for_like_any_other(tiny, fake, capsys):
    """The server announces more of the body than it sends."""
    play(*tiny, fake, [Chatter(1)])
    broken = iter([True] * 3)
    fake.status = lambda path: 503 if next(broken, False) else 200
    fake.short = True
    assert_scored(tiny[0], play(*tiny, fake, [Chatter(n) for n in range(2)]))
    assert capsys.readouterr().out.count("waiting for") == 1


def test_a_refusal_is_not_repeated(tiny, fake):
    fake.status = lambda path: 404 if path == "/collective_rpc" else 200
    with pytest.raises(ServerFailed, match="/collective_rpc refuses: HTTP 404"):
        play(*tiny, fake, [Chatter(1)])
    assert fake.count("/collective_rpc") == 1


def test_the_adapter_alone_is_handed_over(tiny, tmp_path):
    policy.save_policy(*tiny, tmp_path / "base")
    model, tokenizer = policy.load_policy(str(tmp_path / "base"), "float32", "cpu", lora_rank=2)
    with serving(*tiny, tmp_path / "policy") as [fake]:
        for _ in range(2):
            for name, p in policy.trained_parameters(model).items():
                p.data += 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name)))
            assert_scored(model, play(model, tokenizer, fake, [Chatter(1)]))
        assert fake.count("/collective_rpc") == 0 and len(fake.adapters) == 1
        fake.adapters.clear()  # it has been started again
        with pytest.raises(ServerFailed, match="refuses: HTTP 404"):
            play(model, tokenizer, fake, [Chatter(1)])
        for p in policy.trained_parameters(model).values():
            p.data += 0.1
        assert_scored(model, play(model, tokenizer, fake, [Chatter(1)]))
        assert len([path for path in fake.folder.iterdir() if path.is_dir()]) == 1  # older ones are removed


def test_several_servers_share_the_conversations(tiny, tmp_path):
    with serving(*tiny, tmp_path / "policy", 2) as fakes:
        assert_scored(tiny[0], play(*tiny, fakes, [Chatter(n, 2) for n in range(4)]))
        assert [fake.count("/v1/completions") for fake in fakes] == [1 + 4, 1 + 4]  # the probe, and two turns of two


def rollouts_of_a_rank(url):
    model, tokenizer = policy.load_policy("tiny", "float32", "cpu")
    urls = {"engine": "vllm", "vllm_url": [url], "vllm_timeout": 30.0, "max_new_tokens": 8}
    rank, found = distributed.rank(), []
    whole, _ = policy.load_policy("tiny", "float32", "cpu")
    for temperature in (1.0, 0.9, 0.5):
        try:
            episodes = [Chatter(n, 2) for n in range(2 * rank)]  # the first rank has none
            trajectories = rollout.rollout(model, tokenizer, episodes, temperature=temperature, **urls)
            assert_scored(whole, trajectories, temperature)
            found.append(len(trajectories))
        except ServerFailed as error:
            found.append(str(error))
        if not policy.is_sharded(model):
            policy.shard(model)
    return found


def test_ranks_share_a_server_with_whole_and_sharded_weights_and_fail_together(fake, tmp_path):
    sampled = fake.complete
    fake.complete = lambda body: LIES["no ids"](sampled(body)) if body["temperature"] == 0.5 else sampled(body)
    (*first, failure), (*second, same) = on_two_ranks(rollouts_of_a_rank, tmp_path, fake.url)
    assert first == [0, 0] and second == [2, 2] and fake.count("/collective_rpc") <= 2
    assert failure == same and "answers without the ids" in failure


# --------------------------------------------------------------------------------------------------------- whole runs


def of_server(folder, *flags):
    """Flags of a small run on the model of a directory."""
    limits = "--max_context 320 --max_user_tokens 64 --max_tool_tokens 12 --temperature 0.5 --learning_rate 1e-3"
    return [
        *limits.split(),
        "--model_name_or_path",
        str(folder),
        "--model_dtype",
        "float32",
        "--eval_split",
        "train",
        *flags,
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(directory, model, tokenizer) of a policy whose vocabulary is that of the tasks."""
    folder = tmp_path_factory.mktemp("small")
    train.train(small_args(folder, "--run_name", "made", "--num_steps_per_task", "0"))
    last = folder / "made/checkpoints/LAST"
    return last, *policy.load_policy(str(last), "float32", "cpu")


@pytest.fixture
def vllm(small, tmp_path):
    """(server of this policy, flags of a run that uses it)."""
    folder, *made = small
    with serving(*made, tmp_path / "policy") as [fake]:
        yield fake, of_server(folder, "--rollout_engine", "vllm", "--vllm_url", fake.url, "--vllm_timeout", "30")


REPLAY = ["--cl_algorithm", "replay", "--replay_ratio", "0.3", "--min_buffer_size", "1", "--num_steps_per_task", "4"]
CORRECTIONS = [[], ["--sampler_correction", "truncate"], ["--sampler_correction", "mask", "--num_iterations", "2"]]


@pytest.mark.parametrize("correction", CORRECTIONS)
def test_a_run_on_a_server_learns_from_what_the_server_sampled(vllm, tmp_path, correction):
    fake, flags = vllm
    small_run(tmp_path, *REPLAY, *flags, *correction, "--run_name", "run")
    steps = steps_of(tmp_path / "run")
    assert len(steps) == 8 and sum(step["action_tokens"] for step in steps) > 0
    for step in steps:
        assert abs(step["ratio_first_step"] - 1) < 1e-3 and step["sampler_cut"] == 0
        assert step["sampler_kl"] < 1e-6 and abs(step["sampler_ratio_max"] - 1) < 1e-3
    assert fake.count("/collective_rpc") > 2


def tasks_of_steps(folder):
    rows = [row for row in read_jsonl(folder / "trajectories.jsonl") if row["kind"] == "rollout"]
    return [(row["global_step"], row["domain"], row["task_id"]) for row in rows]


def test_a_run_that_a_server_ends_is_saved_and_repeats_no_draw(vllm, tmp_path, monkeypatch, capsys):
    fake, flags = vllm
    flags = [*REPLAY, *flags, "--checkpoint_every", "100", "--runs_dir", str(tmp_path)]
    small_run(tmp_path, *flags, "--run_name", "whole")
    rolled = [task for task in tasks_of_steps(tmp_path / "whole") if task[0] == 6]
    assert {domain for _, domain, _ in rolled} == {"airline", "telecom"}  # some are replayed
    logs = tmp_path / "stopped/trajectories.jsonl"

    def status(path):  # in the seventh step
        broken = path == "/v1/completions" and logs.exists() and '"global_step": 5' in logs.read_text()
        return 404 if broken else 200

    fake.status = status
    message = refused(monkeypatch, capsys, *SMALL, *flags, "--run_name", "stopped")
    assert "/v1/completions refuses: HTTP 404" in message
    assert message.endswith(f"the run is saved, continue with --resume {tmp_path / 'stopped'}")
    assert len(steps_of(tmp_path / "stopped")) == 6
    fake.stop()
    fake.port, fake.status = 0, lambda path: 200
    fake.start()  # elsewhere
    train.train(train.parse_args(["--resume", str(tmp_path / "stopped"), "--vllm_url", fake.url]))
    assert tasks_of_steps(tmp_path / "stopped") == tasks_of_steps(tmp_path / "whole")
    assert [step["global_step"] for step in steps_of(tmp_path / "stopped")] == list(range(1, 9))


def test_a_server_that_fails_in_an_evaluation_leaves_the_last_checkpoint(vllm, tmp_path, monkeypatch, capsys):
    fake, flags = vllm
    fake.status = lambda path: 404
    message = refused(monkeypatch, capsys, *SMALL, *flags, "--run_name", "stopped", "--runs_dir", str(tmp_path))
    assert "refuses: HTTP 404" in message and message.endswith(f"; continue with --resume {tmp_path / 'stopped'}")
    fake.status = lambda path: 200
    assert train.train(train.parse_args(["--resume", str(tmp_path / "stopped")]))["R"]


def test_what_cannot_be_served_is_one_line(vllm, tiny, tmp_path, monkeypatch, capsys):
    fake, flags = vllm
    start = [*SMALL, *flags, "--runs_dir", str(tmp_path / "runs")]

    def line(*more):
        return refused(monkeypatch, capsys, *start, *more)

    assert line("--rollout_engine", "padded").startswith("train.py: rollout_engine vllm and vllm_url go together")
    for url in ("file:///etc", "localhost:80", "http://", "http://me:word@host", "http://host:x"):
        assert "vllm_url must be like http://127.0.0.1:8000, got" in line("--vllm_url", url)
    fake.max_model_len = 256
    server.connect.cache_clear()
    assert "has room for 256 tokens (--max-model-len), max_context is 320" in line()
    fake.max_model_len = 4096
    server.connect.cache_clear()
    other = os.open(fake.folder, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    assert f"another process is training in {fake.folder}" in line()
    os.close(other)
    fake.folder = tmp_path
    server.connect.cache_clear()
    assert "is no hand-over directory; make one with python server.py" in line()
    server.make_directory(*tiny, tmp_path / "other")
    fake.folder = tmp_path / "other"
    server.connect.cache_clear()
    assert "has another model: lm_head.weight has the shape [" in line()
    (tmp_path / "other/model.safetensors").write_bytes(b"damaged")
    assert "cannot read" in line()
    with fake_api() as (address, answers, _):
        answers.append({"content": "no"})
        assert "/v1/models refuses: HTTP 501" in line("--vllm_url", address)
    fake.stop()
    server.connect.cache_clear()
    assert "/v1/models has given no answer for 1 s" in line("--vllm_timeout", "1")
    assert not (tmp_path / "runs").exists()


def test_the_script_makes_a_directory_that_a_server_can_start_from(small, tmp_path, monkeypatch, capsys):
    folder, model, _ = small
    for code in (0, 2):
        monkeypatch.setattr(
            "sys.argv",
            [
                "server.py",
                "--model_name_or_path",
                str(folder),
                "--directory",
                str(tmp_path / "policy"),
                "--model_dtype",
                "float32",
            ],
        )
        with pytest.raises(SystemExit) if code else nullcontext():
            server.main()
    shown = capsys.readouterr()
    assert f"vllm serve {tmp_path / 'policy'} " in shown.out and "is not empty; name a new directory" in shown.err
    again, _ = policy.load_policy(str(tmp_path / "policy"), "float32", "cpu")
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.tie_word_embeddings is False
