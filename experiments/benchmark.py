"""How fast: rollouts and updates against the plain ways; with a flag, environments and rewards, or the buffers.

    python experiments/benchmark.py --prompt_tokens 4096     rollouts and updates (needs no tau2)
    python experiments/benchmark.py --oracle                 environments and rewards, against tau2's own
    python experiments/benchmark.py --buffers                offers per second
    python experiments/benchmark.py --memory                 gigabytes that a real model takes, by arithmetic

Times on a shared machine are noisy: compare ratios within one run.
"""

import re
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from timeit import timeit
from types import SimpleNamespace
from typing import Annotated, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import distributed  # noqa: F401 (sets what transformers reads when it is imported)

# isort: split
import numpy as np
import pandas
import torch
import transformers
import tyro
from pydantic import Field
from transformers import AutoModelForCausalLM, Qwen2Config

import rollout
from chat import ChatFormat
from flags import Count, Few, checked, errors_in_one_line
from grpo import policy_loss
from policy import DTYPES, autocast, load_policy, token_logprobs
from replay import Buffer, add, brs_slot, labrs_slot, lars_slot

STATUS = Path("/proc/self/status")  # of Linux
NEW_TOKENS, TOOL_TOKENS = 32, 64  # per turn: sampled, and of its answer
ACTION_SHARE = 0.25  # of the update's tokens
ORACLE_TASKS = 10  # per domain
SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads vocab_size"
SHAPES = {  # of Qwen2.5, in the order of SIZES
    "tiny": (128, 384, 2, 4, 2, 2048),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "7b": (3584, 18944, 28, 28, 4, 152064),
    "32b": (5120, 27648, 64, 40, 8, 152064),
}
TIED = ("tiny", "0.5b", "1.5b")  # their head shares the weights of the embedding
LORA_RANK = 32  # of the table of memory


@dataclass(kw_only=True)
class Args:
    """Times rollouts and updates against the plain ways, on random weights in the shape of a model."""

    shape: Literal[*SHAPES] = "tiny"
    """shape of the model: tiny, or one of Qwen2.5's"""
    layers: Few | None = None
    """keep this many layers. Default: all"""
    tasks: Few = 4
    """tasks. All conversations share the prompt but for its last tokens, which differ by task"""
    samples: Few = 4
    """conversations per task"""
    turns: Few = 4
    """agent turns per conversation"""
    prompt_tokens: Count = 1024
    """tokens of the shared system prompt"""
    update_tokens: Annotated[int, Field(ge=2, le=10**7)] = 2048
    """tokens of the one sequence that the update is timed on; a quarter of them were sampled"""
    repeats: Few = 3
    """runs of each way; they take turns, and the fastest counts"""
    oracle: bool = False
    """time environments and rewards instead, against tau2's own"""
    buffers: bool = False
    """time offers to replay buffers instead"""
    memory: bool = False
    """compute the memory of a training run of each shape instead"""


class TimedEpisode:
    """A conversation of fixed length: a long shared prompt, a short task, and an answer to every turn but the last."""

    domain, system, tools = "benchmark", "", []

    def __init__(self, number, args, tokenizer):
        self.task = SimpleNamespace(id=number)
        self.words = np.random.default_rng([0, number])
        self.args, self.tokenizer = args, tokenizer
        self.prompt = self.text(args.prompt_tokens, np.random.default_rng(0))
        self.messages, self.done, self.termination = [], False, ""

    def text(self, tokens, rng):
        ids = self.tokenizer(" ".join(map(str, rng.integers(0, 1000, tokens)))).input_ids
        return self.tokenizer.decode(ids[:tokens])

    def opening(self):
        return [{"role": "user", "content": f"{self.prompt} {self.text(16, self.words)}"}]

    def act(self, message):
        self.messages.append(message)
        self.done = len(self.messages) == self.args.turns
        return [] if self.done else [{"role": "tool", "content": self.text(TOOL_TOKENS, self.words)}]


def play_generate(model, tokenizer, episodes, max_new_tokens, max_context):
    """The plain way: `model.generate` once per turn on all conversations, which reads them from the start each time."""
    chat, cut = ChatFormat.of(tokenizer), {"tool": None, "user": None}
    started = [rollout._Conversation(e, chat, max_new_tokens, max_context, cut, None) for e in episodes]
    settings = {"do_sample": True, "top_k": 0, "max_new_tokens": max_new_tokens, "eos_token_id": sorted(chat.stop_ids)}
    while active := [c for c in started if not c.finished]:
        prompts = [{"input_ids": c.trajectory.token_ids} for c in active]
        batch = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(model.device)
        with torch.no_grad(), autocast(model):
            texts = model.generate(**batch, **settings, pad_token_id=tokenizer.pad_token_id)
        for c, ids in zip(active, texts[:, batch.input_ids.shape[1] :].tolist(), strict=True):
            stop = next((i + 1 for i, token in enumerate(ids) if token in chat.stop_ids), len(ids))
            c.say(ids[:stop], [0.0] * stop)
    return [c.trajectory for c in started]


def memory(device, peak=False) -> int:
    """Bytes in use, or their peak since `reset_peak`; 0 if the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    status = STATUS.read_text() if STATUS.exists() else "VmHWM: 0 VmRSS: 0"
    return 1024 * int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", status).group(1))


def reset_peak(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif STATUS.exists():
        STATUS.with_name("clear_refs").write_text("5")


def show_times(ways, repeats, device):
    """Prints a table of the fastest run of each way, compared with the first way. A way is a function that returns its
    number of tokens. The ways take turns, so that noise meets all alike."""
    fastest = {}
    for _ in range(repeats):
        for name, way in ways.items():
            reset_peak(device)
            before, start = memory(device), time.perf_counter()
            tokens = way()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            if name not in fastest or seconds < fastest[name]["seconds"]:
                peak = (memory(device, peak=True) - before) / 1e9
                fastest[name] = {"seconds": seconds, "tokens/s": tokens / seconds, "peak GB beyond the weights": peak}
    table = pandas.DataFrame(fastest).T
    table.insert(2, "speed-up", table["tokens/s"] / table["tokens/s"].iloc[0])
    print(table.to_markdown(floatfmt=".2f"))


def time_rollouts(args, model, tokenizer):
    """Times the ways to play the same conversations, by sampled tokens."""
    limits = {"max_new_tokens": NEW_TOKENS}
    limits["max_context"] = args.prompt_tokens + args.turns * (NEW_TOKENS + 2 * TOOL_TOKENS) + 256

    def play(engine):
        episodes = [TimedEpisode(n, args, tokenizer) for n in range(args.tasks) for _ in range(args.samples)]
        if engine == "generate":
            played = play_generate(model, tokenizer, episodes, **limits)
        else:
            generator = torch.Generator(model.device).manual_seed(0)
            played = rollout.rollout(model, tokenizer, episodes, **limits, generator=generator, engine=engine)
        return sum(sum(t.action_mask) for t in played)

    engines = ("generate", "padded", "paged")
    show_times({engine: partial(play, engine) for engine in engines}, args.repeats, model.device)


def all_logits(model, ids, attention):
    """The log-probabilities of `policy.token_logprobs`, from the logits of all tokens at once."""
    with autocast(model):
        logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return torch.cat([logprobs.new_zeros(1, 1), logprobs], 1)


def time_update(args, model):
    """Times the ways to compute a loss and its gradient on one long sequence."""
    rng = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, args.update_tokens), generator=rng).to(model.device)
    mask = (torch.rand(ids.shape, generator=rng) < ACTION_SHARE).to(model.device)
    attention = torch.ones_like(ids)

    def update(logprobs_of):
        logprobs = logprobs_of(model, ids, attention)
        policy_loss(logprobs, logprobs.detach(), torch.ones(1, device=model.device), mask)[0].backward()
        model.zero_grad()
        return args.update_tokens

    ways = {"all logits": all_logits, "token_logprobs": partial(token_logprobs, mask_B_T=mask)}
    show_times({name: partial(update, way) for name, way in ways.items()}, args.repeats, model.device)


def time_policy(args):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    torch.manual_seed(0)
    _, tokenizer = load_policy("tiny", "float32", "cpu")
    sizes = dict(zip(SIZES.split(), SHAPES[args.shape], strict=True))
    sizes["vocab_size"] = max(sizes["vocab_size"], len(tokenizer))
    sizes["num_hidden_layers"] = args.layers or sizes["num_hidden_layers"]
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen2Config(**sizes, **tokens, max_position_embeddings=2**17, tie_word_embeddings=args.shape in TIED)
    with device:
        model = AutoModelForCausalLM.from_config(config).eval()
    model.compute_dtype = DTYPES[dtype]
    size = sum(p.numel() for p in model.parameters())
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{args.shape} with {config.num_hidden_layers} layers: {size / 1e6:.0f}M parameters, {dtype}, {name}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; the best of {args.repeats} runs each"
    )
    time_rollouts(args, model, tokenizer)
    time_update(args, model)


def time_oracle(args):
    """Prints median milliseconds per environment and per reward, tau2's and ours, on the same conversations."""
    import oracle
    from environment import make_env, registry

    rows = {}
    for domain in oracle.DOMAINS:
        tasks = oracle.load_tasks(domain, "base")
        build, times = registry.get_env_constructor(domain), []
        for task in tasks[:: max(1, len(tasks) // ORACLE_TASKS)][:ORACLE_TASKS]:
            episode = oracle.demonstrate(domain, task)
            oracle.score(episode)  # computes the task's gold changes, which are kept
            ways = {
                "environment, tau2": partial(build, solo_mode=episode.solo),
                "environment, ours": partial(make_env, domain, task, episode.solo),
                "reward, tau2": partial(oracle.tau2_score, episode),
                "reward, ours": partial(oracle.score, episode),
            }
            times.append({name: 1e3 * timeit(way, number=3) / 3 for name, way in ways.items()})
        rows[domain] = pandas.DataFrame(times).median()
    print(pandas.DataFrame(rows).T.to_markdown(floatfmt=".2f"))


def time_buffers(args, capacity=1000):
    """Prints how often per second a full buffer takes an offer, and chooses the slot of an accepted item."""
    rng = np.random.default_rng(0)
    buffer = Buffer(capacity)
    for item in range(capacity):
        add(buffer, item, label=int(rng.integers(10)), loss=rng.random(), rng=rng)
    ways = {
        "reservoir": lambda: add(buffer, 0, rng=rng),
        "brs": lambda: brs_slot(buffer.labels, rng),
        "lars": lambda: lars_slot(buffer.losses, rng),
        "labrs": lambda: labrs_slot(buffer.losses, buffer.labels, rng),
    }
    for name, way in ways.items():
        print(f"{name}: {20_000 / timeit(way, number=20_000):.0f} per second, {capacity} items")


def layer_sizes(shape) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear maps of a layer."""
    width, inner, _, heads, kv_heads, _ = SHAPES[shape]
    kv = width // heads * kv_heads
    return [(width, width), (width, kv), (width, kv), (width, width), (width, inner), (width, inner), (inner, width)]


def count_parameters(shape) -> int:
    """Of Qwen2: linear maps, biases of queries, keys and values, norms, embedding and head."""
    width, _, layers, _, _, vocabulary = SHAPES[shape]
    sizes = layer_sizes(shape)
    layer = sum(a * b for a, b in sizes) + sum(b for _, b in sizes[:3]) + 2 * width
    return layers * layer + width + vocabulary * width * (1 if shape in TIED else 2)


def show_memory(args):
    """Prints gigabytes by arithmetic, without activations: 16 bytes for a trained weight (itself, gradient, two
    moments, in float32), 2 for one that is only computed with (bfloat16)."""
    rows = {}
    for shape in SHAPES:
        _, _, layers, heads, kv_heads, _ = SHAPES[shape]
        head = SHAPES[shape][0] // heads
        weights = count_parameters(shape)
        adapter = LORA_RANK * layers * sum(a + b for a, b in layer_sizes(shape))
        gigabytes = {
            "every weight, one GPU": 16 * weights,
            "--shard, 4 GPUs": 4 * weights,
            "--shard, 8 GPUs": 2 * weights,
            "a copy to sample from": 2 * weights,
            f"--lora_rank {LORA_RANK}": 2 * weights + 16 * adapter,
            "keys and values of 100,000 tokens": 2 * 2 * layers * kv_heads * head * 100_000,
        }
        rows[shape] = {"billion parameters": weights / 1e9, **{name: size / 1e9 for name, size in gigabytes.items()}}
    print(pandas.DataFrame(rows).T.drop("tiny").to_markdown(floatfmt=".1f"))


if __name__ == "__main__":
    args = tyro.cli(Args)
    with errors_in_one_line("benchmark.py"):
        checked(Args, vars(args))
    ways = {"oracle": time_oracle, "buffers": time_buffers, "memory": show_memory}
    benchmark = next((way for name, way in ways.items() if getattr(args, name)), time_policy)
    benchmark(args)
