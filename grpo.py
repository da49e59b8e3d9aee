"""The policy: loading, batched multi-turn rollouts, and the GRPO loss.

    python grpo.py        trains the embedded tiny policy on a toy tool task: warm start, rollouts, GRPO, in two minutes

Data flow: Episode -> rollout -> Trajectory -> rewards -> group_advantages -> policy_loss.

What differs from GRPO as published (Shao et al. 2024, arXiv:2402.03300), and where:
- token in, token out: what is trained is the exact ids that were sampled. A turn's answer is appended as ids; the
  history is never rendered again, so templates that rewrite it cannot move a token (`ChatFormat`).
- the default loss is DAPO's (Yu et al. 2025, arXiv:2503.14476): one mean over all action tokens of the step, on all
  ranks, and an upper clip of 1.28.
- weights are float32 masters; `dtype` is what they are computed in, by autocast.
"""

import copy
import datetime
import json
import logging
import os
import re
import time
from collections import deque
from contextlib import nullcontext
from dataclasses import dataclass, field

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, Qwen2Config, Qwen2Tokenizer
from transformers.cache_utils import DynamicLayer

transformers.utils.logging.disable_progress_bar()
logging.getLogger("transformers").setLevel(logging.ERROR)

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo")
PER_SEQUENCE = ("grpo", "dr_grpo", "gspo")  # losses that are a mean over sequences; the others over tokens


@dataclass
class Trajectory:
    """One conversation as the policy saw it. token_ids, action_mask, logprobs and turns are equally long.

    >>> # ids:     prompt  prompt  sampled  sampled  <|im_end|>  tool  tool  sampled ...
    >>> # mask:    False   False   True     True     True        False False True
    >>> # turns:   -1      -1      0        0        0           -1    -1    1
    """

    domain: str = ""
    task_id: str = ""
    token_ids: list[int] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)  # True where the policy sampled the token
    logprobs: list[float] = field(default_factory=list)  # behaviour log-probability; 0.0 where not sampled
    turns: list[int] = field(default_factory=list)  # index of the agent turn; -1 where not sampled
    reward: float = 0.0
    messages: list = field(default_factory=list)
    termination: str = ""
    valid: bool = True  # False after an error of the environment: left out of its group's baseline
    error: str = ""
    truncated_turns: int = 0  # agent turns cut at max_new_tokens

    @property
    def truncated(self) -> bool:
        """Cut short, by max_new_tokens in some turn, by the context, or by the episode's max_turns."""
        return self.truncated_turns > 0 or self.termination == "max_steps"

    def append(self, ids, turn=-1, logprobs=None):
        self.token_ids.extend(ids)
        self.action_mask.extend([turn >= 0] * len(ids))
        self.logprobs.extend(logprobs if logprobs is not None else [0.0] * len(ids))
        self.turns.extend([turn] * len(ids))


# --------------------------------------------------------------------------------------------- the policy

TINY_TEMPLATE = """
{%- for message in messages %}
{%- if message.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}
{%- elif message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' + (message.content or '') }}
{%- for call in message.tool_calls or [] %}
{%- if not loop.first or message.content %}{{ '\n' }}{% endif %}
{{- '<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
{{- '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif message.role == 'user' %}
{{- '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
""".strip()
# Qwen2.5's format, without the system message and the tool schemas: the embedded policy has no context to read them.

TINY_CORPUS = [
    'Hi! How can I help you today? <tool_call>\n{"name": "get_details", "arguments": {"id": "0"}}\n</tool_call>',
    "Done. Yes, please go ahead. Error: not found. 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20",
]


def _tiny(corpus, seed):
    """A Qwen2 of about a million parameters with a byte-level BPE tokenizer trained on `corpus`, in seconds."""
    tokenizer = Qwen2Tokenizer(eos_token="<|im_end|>").train_new_from_iterator(
        corpus or TINY_CORPUS,
        vocab_size=2048,
        new_special_tokens=["<|im_start|>"],
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"])
    tokenizer.chat_template = TINY_TEMPLATE
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    return model, tokenizer


def load_policy(name_or_path, dtype="bfloat16", device=None, lora_rank=0, seed=0, weights_dtype="float32", corpus=None):
    """(model, tokenizer) of a Hugging Face causal LM, or of the embedded "tiny" policy.

    `dtype`: what is computed in, under autocast; `weights_dtype`: what the weights are kept in (float32 masters for
    training: Adam at 1e-6 hardly moves bfloat16 weights). `corpus`: the texts that tiny's tokenizer is trained on.
    `device` defaults to the GPU where there is one. Raises ValueError for an unknown dtype, a missing directory, a
    tokenizer without a chat template, or one whose tool-call format is not supported. Every weight is trained: a
    `lora_rank` other than 0 is refused.
    """
    if lora_rank != 0:
        raise ValueError(f"lora_rank must be 0, got {lora_rank}: only full fine-tuning is supported")
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for value in (dtype, weights_dtype):
        if value not in known:
            raise ValueError(f"unknown dtype {value!r}; choose one of {', '.join(known)}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name_or_path == "tiny":
        model, tokenizer = _tiny(corpus, seed)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                name_or_path, dtype=known[weights_dtype], trust_remote_code=False, use_safetensors=True
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"cannot load a model from {name_or_path!r}: {reason}") from error
    for scaling in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(model.config, scaling, None) not in (None, 1.0):
            raise ValueError(f"{name_or_path}: models with {scaling} are not supported by token_logprobs")
    model.to(device=device, dtype=known[weights_dtype]).eval()  # eval: dropout would break the ratio of 1
    model.compute_dtype = known[dtype]
    _new_cache(model)  # refuses what rollouts cannot play, before anything is written
    ChatFormat.of(tokenizer)
    return model, tokenizer


def autocast(model):
    """Computes in the policy's dtype; one context for a whole rollout, so that weights are cast once."""
    dtype = getattr(model, "compute_dtype", torch.float32)
    return torch.autocast(model.device.type, dtype) if dtype != torch.float32 else nullcontext()


class ChatFormat:
    """How a tokenizer's chat template turns messages into ids: opening, the answers to a turn, and a turn itself.

    The answer to a sampled turn is what the template puts behind an assistant turn's end token when these messages
    follow; it is tokenized alone and appended, so the sampled ids stay as they are.
    """

    PROBE = "REHEARSE-PROBE"

    @classmethod
    def of(cls, tokenizer):
        if not hasattr(tokenizer, "_chat_format"):
            tokenizer._chat_format = cls(tokenizer)
        return tokenizer._chat_format

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.chat_template:
            raise ValueError(f"{name} has no chat template; an agent needs one (an Instruct model has it)")
        self.template = tokenizer.get_chat_template(tools=[{}])  # some have one for tools beside the default
        user = {"role": "user", "content": "x"}
        probe = {"role": "assistant", "content": self.PROBE}
        rendered = self._render([user, probe])
        tail = rendered.rpartition(self.PROBE)[2]
        ids = tokenizer(tail, add_special_tokens=False).input_ids
        # Not all_special_ids: they are only those with a role, such as eos and pad.
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = list(special.values())
        if not ids or ids[0] not in special:
            raise ValueError(f"{name}: the chat template does not end an assistant turn with a special token")
        self.end_id = ids[0]
        self.end = tokenizer.convert_ids_to_tokens(self.end_id)
        self.stop_ids = {self.end_id, tokenizer.eos_token_id} - {None}
        call = {"type": "function", "function": {"name": "probe_tool", "arguments": {"key": 'va"lue', "n": [1, 2.5]}}}
        text = tokenizer.decode(self.turn({"role": "assistant", "content": "", "tool_calls": [call]})[:-1])
        parsed = parse_message(text)["tool_calls"]
        if [c["function"] for c in parsed] != [call["function"]]:
            raise ValueError(
                f"{name}: tool calls are written as {text[:80]!r}, which is not supported; "
                'the <tool_call>{"name": ..., "arguments": ...}</tool_call> format of Qwen and Hermes is'
            )

    def _render(self, messages, tools=None, add_generation_prompt=False):
        return self.tokenizer.apply_chat_template(
            messages,
            tools=tools,
            chat_template=self.template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )

    def _clean(self, messages):
        """A tool's or user's text must not contain the template's own control tokens."""
        cleaned = []
        for message in messages:
            content, before = message["content"], None
            while content != before:  # what remains may join up to another one
                before = content
                for token in self.special:
                    content = content.replace(token, "")
            cleaned.append({**message, "content": content})
        return cleaned

    def _ids(self, text):
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def opening(self, system, messages, tools) -> list[int]:
        system = [{"role": "system", "content": system}] if system else []
        return self._ids(self._render(system + self._clean(messages), tools, add_generation_prompt=True))

    def answer(self, messages) -> list[int]:
        """What follows the end token of the agent's turn, up to where its next turn begins."""
        base = [{"role": "user", "content": "x"}, {"role": "assistant", "content": self.PROBE}]
        rendered = self._render(base + self._clean(messages), add_generation_prompt=True)
        return self._ids(rendered.partition(self.PROBE)[2].removeprefix(self.end))

    def turn(self, message) -> list[int]:
        """The ids a policy would sample to say `message`, its end token included."""
        user = [{"role": "user", "content": "x"}]
        message = {"role": "assistant", "content": "", **message}
        message["content"] = message["content"] or ""
        if not message.get("tool_calls"):
            message.pop("tool_calls", None)
        prompt = self._render(user, add_generation_prompt=True)
        rendered = self._render([*user, message])
        if not rendered.startswith(prompt):
            raise ValueError("the chat template does not begin an assistant turn with its generation prompt")
        return self._ids(rendered[len(prompt) :].partition(self.end)[0] + self.end)

    def cut(self, message, limit):
        """The message with at most `limit` tokens of content; cut between tokens, and marked."""
        if limit is None:
            return message
        ids = self._ids(message["content"])
        if len(ids) <= limit:
            return message
        return {**message, "content": self.tokenizer.decode(ids[:limit]).rstrip("\ufffd") + " ..."}


def parse_message(text: str) -> dict:
    """The policy's text as a chat message: content, and tool calls in the <tool_call> JSON format.

    A call that is not JSON keeps its place with name None and an "error", for the environment to answer.

    >>> parse_message('Hm.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>')["tool_calls"]
    [{'type': 'function', 'function': {'name': 'f', 'arguments': {'a': 1}}}]
    """
    text = re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL)
    text = text.rsplit("</think>", 1)[-1]  # some templates open <think> themselves
    calls = []
    for block in re.findall(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|$)", text, flags=re.DOTALL):
        try:
            call = json.loads(block)
            if not isinstance(call, dict):
                raise ValueError("a tool call must be a JSON object")
            function = {"name": call.get("name"), "arguments": call.get("arguments", {})}
        except (ValueError, RecursionError) as error:
            function = {"name": None, "arguments": block, "error": f"malformed tool call: {error}"}
        calls.append({"type": "function", "function": function})
    content = re.sub(r"<tool_call>.*?(</tool_call>|(?=<tool_call>)|$)", "", text, flags=re.DOTALL).strip()
    return {"role": "assistant", "content": content, "tool_calls": calls}


# ------------------------------------------------------------------------------------------- several ranks


def init_distributed() -> str:
    """Joins the process group that torchrun describes, if it started us; returns this rank's device."""
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if device != "cpu":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        # Long, since ranks wait for the longest conversation of all, and for rank 0's checkpoints.
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=datetime.timedelta(hours=6))
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_gather_json(value) -> list:
    """Every rank's `value`, in the order of ranks. JSON, because dist.all_gather_object unpickles."""
    if world_size() == 1:
        return [json.loads(json.dumps(value))]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    lengths = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)], device=device))
    padded = torch.zeros(int(max(lengths)), dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    parts = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return [json.loads(bytes(part[: int(n)].tolist())) for part, n in zip(parts, lengths, strict=True)]


def seeded_generator(device, *seeds) -> torch.Generator:
    """A generator whose numbers depend on all of the (non-negative) seeds."""
    words = np.random.SeedSequence([len(seeds), *seeds]).generate_state(2)  # alone, (1,) and (1, 0) are the same
    return torch.Generator(device).manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


# ----------------------------------------------------------------------------------------------- rollouts


class RoomyLayer(DynamicLayer):
    """transformers' DynamicLayer copies all keys at every token; this one doubles its room instead."""

    room = None

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        if self.room is None or self.room.shape[-2] < end:
            batch, heads, _, head_dim = key_states.shape
            room = key_states.new_empty((2, batch, heads, max(256, 2 * end), head_dim), dtype=value_states.dtype)
            if start:
                room[0, :, :, :start] = self.keys
                room[1, :, :, :start] = self.values
            self.room = room
        self.room[0, :, :, start:end] = key_states
        self.room[1, :, :, start:end] = value_states
        self.keys, self.values = self.room[0, :, :, :end], self.room[1, :, :, :end]
        return self.keys, self.values

    def select(self, rows):
        self.room = self.room.index_select(1, rows)
        end = self.keys.shape[-2]
        self.keys, self.values = self.room[0, :, :, :end], self.room[1, :, :, :end]


def _new_cache(model):
    cache = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        name = model.config.name_or_path or model.config.model_type
        raise ValueError(f"{name}: rollouts need full attention in every layer; this model has other layers")
    cache.layers = [RoomyLayer() for _ in cache.layers]
    return cache


class _Row:
    """One conversation in the batch: its trajectory, and the ids still to be fed before it is its turn again."""

    def __init__(self, episode, prompt):
        self.episode = episode
        self.trajectory = Trajectory(episode.domain, str(episode.task.id))
        self.trajectory.append(prompt)
        self.queue = deque()
        self.turn = 0
        self.sampled = []
        self.finished = False


@torch.no_grad()
def rollout(
    model,
    tokenizer,
    episodes,
    temperature=1.0,
    max_new_tokens=512,
    max_context=None,
    max_user_tokens=None,
    max_tool_tokens=None,
    generator=None,
    on_finish=None,
) -> list[Trajectory]:
    """Plays all episodes at once and returns their trajectories in the episodes' order.

    Every conversation advances by one token per forward pass, be it sampled or part of an answer that it reads, so
    each token is computed once and none waits for the others' turns. Sampling is from the whole distribution at
    `temperature` (0: the most likely token), so the log-probabilities are those of the loss.

    max_new_tokens: sampled tokens a turn; max_context: tokens a conversation (None: the model's limit), at which it
    ends as "max_steps"; max_user_tokens, max_tool_tokens: tokens of one message to the policy, cut beyond.
    generator: a torch.Generator on the model's device. on_finish(n): called when a conversation ends.
    An exception of `episode.act` makes the trajectory invalid, with the error's text.
    """
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    chat = ChatFormat.of(tokenizer)
    limits = {"tool": max_tool_tokens, "user": max_user_tokens}
    max_context = max_context or model.config.max_position_embeddings

    def cut(messages):
        return [chat.cut(message, limits.get(message["role"])) for message in messages]

    rows = [_Row(e, chat.opening(e.system, cut(e.opening()), e.tools)) for e in episodes]
    for row in rows:
        if len(row.trajectory.token_ids) + 1 > max_context:
            raise ValueError(
                f"the opening of task {row.episode.task.id} has {len(row.trajectory.token_ids)} tokens, "
                f"more than the context of {max_context}"
            )

    def finish(row, termination):
        row.finished = True
        row.trajectory.termination = termination
        row.trajectory.messages = row.episode.messages
        if on_finish is not None:
            on_finish(1)

    def end_turn(row):
        """The sampled turn goes to the episode; its answer is queued to be read."""
        ids = row.sampled
        stopped = ids[-1] in chat.stop_ids
        row.trajectory.truncated_turns += not stopped
        row.turn += 1
        row.sampled = []
        message = parse_message(tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True))
        try:
            answers = row.episode.act(message)
        except Exception as error:
            row.trajectory.valid = False
            row.trajectory.error = f"{type(error).__name__}: {error}"
            return finish(row, "environment_error")
        if row.episode.done:
            return finish(row, row.episode.termination)
        suffix = ([] if ids[-1] == chat.end_id else [chat.end_id]) + chat.answer(cut(answers))
        if len(row.trajectory.token_ids) + len(suffix) >= max_context:
            row.episode.stop("max_steps")
            return finish(row, "max_steps")
        row.trajectory.append(suffix)
        row.queue.extend(suffix)

    def sample(row, token, logprob):
        row.sampled.append(token)
        row.trajectory.append([token], row.turn, [logprob])
        row.queue.append(token)
        full = len(row.trajectory.token_ids) >= max_context
        if token in chat.stop_ids or len(row.sampled) >= max_new_tokens or full:
            end_turn(row)

    device = model.device
    active = [row for row in rows if not row.episode.done]
    if not active:
        return [row.trajectory for row in rows]
    width = max(len(row.trajectory.token_ids) for row in active)
    ids = torch.full((len(active), width), tokenizer.pad_token_id or 0)
    mask = torch.zeros((len(active), width), dtype=torch.long)
    for i, row in enumerate(active):  # padded on the left: every conversation's next token is in the same column
        prompt = row.trajectory.token_ids
        ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)
    cache = _new_cache(model)
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    with autocast(model):
        while True:
            logits_BV = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            logprobs_BV = (logits_BV.float() / (temperature or 1.0)).log_softmax(-1)
            if temperature > 0:
                tokens_B = torch.multinomial(logprobs_BV.exp(), 1, generator=generator)
            else:
                tokens_B = logprobs_BV.argmax(-1, keepdim=True)
            chosen_B = logprobs_BV.gather(1, tokens_B)[:, 0].tolist()
            for row, token, logprob in zip(active, tokens_B[:, 0].tolist(), chosen_B, strict=True):
                if not row.queue and not row.finished:
                    sample(row, token, logprob)
            kept = [i for i, row in enumerate(active) if not row.finished]
            if not kept:
                return [row.trajectory for row in rows]
            if len(kept) <= 0.8 * len(active):  # finished conversations leave the batch a fifth at a time
                index = torch.tensor(kept, device=device)
                active = [active[i] for i in kept]
                mask, positions = mask[index], positions[index]
                for layer in cache.layers:
                    layer.select(index)
            ids = torch.tensor([[row.queue.popleft() if row.queue else 0] for row in active], device=device)
            mask = torch.cat([mask, mask.new_ones(len(active), 1)], 1)
            positions = positions[:, -1:] + 1


def demonstration(tokenizer, episode, turns, max_user_tokens=None, max_tool_tokens=None) -> Trajectory:
    """The trajectory of a policy that says `turns` (chat messages) in a fresh `episode`: what a warm start imitates.
    The action mask is True on what the policy says; log-probabilities are 0.0."""
    chat = ChatFormat.of(tokenizer)
    limits = {"tool": max_tool_tokens, "user": max_user_tokens}
    opening = [chat.cut(message, limits.get(message["role"])) for message in episode.opening()]
    trajectory = Trajectory(episode.domain, str(episode.task.id))
    trajectory.append(chat.opening(episode.system, opening, episode.tools))
    for k, turn in enumerate(turns):
        trajectory.append(chat.turn(turn), turn=k)
        answers = episode.act(turn)
        if episode.done:
            break
        trajectory.append(chat.answer([chat.cut(message, limits.get(message["role"])) for message in answers]))
    trajectory.messages, trajectory.termination = episode.messages, episode.termination
    return trajectory


# --------------------------------------------------------------------------------------------------- GRPO


def group_advantages(rewards_P_G, scale="group") -> Tensor:
    """Advantages (P, G) of G samples for each of P tasks: the reward less the mean of its group.

    scale "group": divided by the group's sample standard deviation + 1e-4 (Shao et al. 2024); "batch": by that of
    all rewards; "none": not divided (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783). NaN marks an invalid sample: it is
    left out of mean and deviation and gets 0. A group of one, or with equal rewards, gets 0.

    >>> group_advantages([[1.0, 0.0], [1.0, 1.0]], scale="none")
    tensor([[ 0.5000, -0.5000],
            [ 0.0000,  0.0000]])
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"unknown advantage scale {scale!r}; choose one of group, batch, none")
    rewards = torch.as_tensor(rewards_P_G, dtype=torch.float32)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have the shape (tasks, samples), got {tuple(rewards.shape)}")
    valid = ~rewards.isnan()
    filled = rewards.where(valid, torch.zeros(()))

    def mean(values, keep, **kwargs):
        return values.where(keep, torch.zeros(())).sum(**kwargs) / keep.sum(**kwargs).clamp(min=1)

    centred = (filled - mean(filled, valid, dim=1, keepdim=True)).where(valid, torch.zeros(()))
    # Rounding leaves 1e-8 where all rewards are equal; divided by 1e-4 that would be a gradient.
    low = rewards.where(valid, torch.tensor(torch.inf)).amin(1, keepdim=True)
    high = rewards.where(valid, torch.tensor(-torch.inf)).amax(1, keepdim=True)
    centred = centred.where(high > low, torch.zeros(()))
    if scale == "none":
        return centred
    if scale == "group":
        variance = centred.square().sum(1, keepdim=True) / (valid.sum(1, keepdim=True) - 1).clamp(min=1)
    else:
        spread = (filled - mean(filled, valid)).where(valid, torch.zeros(()))
        variance = spread.square().sum() / (valid.sum() - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-4)


def token_logprobs(model, ids_B_T, attention_mask_B_T, temperature=1.0, mask_B_T=None) -> Tensor:
    """Log-probabilities (B, T) of the given tokens; entry t scores token t given those before it, entry 0 is 0.0.

    They are of the distribution scaled by `temperature`, as in the rollout. With `mask_B_T` only the tokens where it
    is True are projected to the vocabulary (the peak of memory); the others are 0.0. Sequences are padded on the right.
    """
    with autocast(model):
        hidden = model.get_decoder()(input_ids=ids_B_T, attention_mask=attention_mask_B_T).last_hidden_state[:, :-1]
        wanted = attention_mask_B_T[:, 1:].bool() if mask_B_T is None else mask_B_T[:, 1:].bool()
        logits_NV = model.get_output_embeddings()(hidden[wanted]).float() / temperature
    chosen_N = logits_NV.log_softmax(-1).gather(-1, ids_B_T[:, 1:][wanted][:, None])[:, 0]
    logprobs = torch.zeros(ids_B_T.shape, dtype=chosen_N.dtype, device=ids_B_T.device)
    logprobs[:, 1:] = logprobs[:, 1:].masked_scatter(wanted, chosen_N)
    return logprobs


def policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    loss_type="dapo",
    epsilon_low=0.2,
    epsilon_high=0.28,
    ref_logprobs=None,
    kl_coef=0.0,
    kl_estimator="k3",
    normalizer=None,
    max_tokens=None,
):
    """(loss, stats) of the clipped objective; all tensors (B, T), advantages (B,) or (B, T).

    With r = exp(logprobs - old_logprobs) and l = -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A):
      grpo     mean over sequences of the mean of l over action tokens (Shao et al. 2024, eq. 3)
      bnpo     sum of l / action tokens of this batch
      dr_grpo  sum of l / (B * max_tokens)                              (Liu et al. 2025)
      dapo     sum of l / normalizer                                    (Yu et al. 2025, eq. 8)
      gspo     r is the exponential of the sequence's mean log-ratio, then as grpo (Zheng et al. 2025, arXiv:2507.18071)
      cispo    -stop_grad(min(r, epsilon_high)) A logprobs / normalizer (MiniMax-M1, arXiv:2506.13585); epsilon_high ~ 5
    `normalizer`: action tokens over all ranks and micro-batches of the step (dapo, cispo; default: of this batch).
    The KL penalty to `ref_logprobs`, d = ref - logprobs, is added per token: k1 = -d, k2 = d^2/2, k3 = exp(d) - d - 1.
    Masked tokens never enter, NaN or not. stats: token means over this batch (floats).
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type {loss_type!r}; choose one of {', '.join(LOSS_TYPES)}")
    if kl_estimator not in ("k1", "k2", "k3"):
        raise ValueError(f"unknown kl_estimator {kl_estimator!r}; choose one of k1, k2, k3")
    if loss_type == "dr_grpo" and not max_tokens:
        raise ValueError("dr_grpo needs max_tokens, the length that every sequence is divided by")
    mask = mask.bool()
    zero = torch.zeros((), dtype=logprobs.dtype, device=logprobs.device)
    logprobs = logprobs.where(mask, zero)  # select, do not multiply: NaN * 0 is NaN
    log_ratio = logprobs - old_logprobs.where(mask, zero)
    length_B = mask.sum(1).clamp(min=1)
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    advantages = advantages.expand_as(logprobs).where(mask, zero)
    if loss_type == "gspo":
        log_ratio = (log_ratio.sum(1) / length_B)[:, None].expand_as(logprobs)
    ratio = log_ratio.clamp(-20, 20).exp()
    if loss_type == "cispo":
        loss = -ratio.clamp(max=epsilon_high).detach() * advantages * logprobs
        clipped = ratio > epsilon_high
    else:
        bounded = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
        loss = -torch.minimum(ratio * advantages, bounded * advantages)
        clipped = (ratio * advantages) > (bounded * advantages)
    stats = {}
    if ref_logprobs is not None:
        d = (ref_logprobs.where(mask, zero) - logprobs).clamp(-20, 20)
        kl = {"k1": -d, "k2": d.square() / 2, "k3": d.exp() - d - 1}[kl_estimator]
        loss = loss + kl_coef * kl
        stats["kl"] = (kl.detach().where(mask, zero).sum() / mask.sum().clamp(min=1)).item()
    loss = loss.where(mask, zero)
    if loss_type in ("grpo", "gspo"):
        total = (loss.sum(1) / length_B).mean()
    elif loss_type == "dr_grpo":
        total = loss.sum() / (len(loss) * max_tokens)
    else:
        tokens = mask.sum() if normalizer is None or loss_type == "bnpo" else normalizer
        total = loss.sum() / max(float(tokens), 1.0)
    stats["clip_share"] = ((clipped & mask).sum() / mask.sum().clamp(min=1)).item()
    stats["ratio_max"] = ratio.detach().where(mask, zero + 1).max().item() if mask.any() else 1.0
    stats["ratio_min"] = ratio.detach().where(mask, zero + 1).min().item() if mask.any() else 1.0
    return total, stats


def collate(trajectories, advantages, gamma=1.0, device="cpu", pad_id=0) -> dict[str, Tensor]:
    """Trajectories as tensors (B, T), padded on the right: ids, attention_mask, mask, old_logprobs, advantages.

    The advantage of a token in turn k of K is gamma^(K-1-k) times its trajectory's.
    """
    width = max(len(t.token_ids) for t in trajectories)
    ids = torch.full((len(trajectories), width), pad_id)
    attention_mask = torch.zeros_like(ids)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    old_logprobs = torch.zeros(ids.shape)
    turns = torch.full(ids.shape, -1)
    for i, t in enumerate(trajectories):
        n = len(t.token_ids)
        if not n == len(t.action_mask) == len(t.logprobs) == len(t.turns):
            raise ValueError(f"trajectory of task {t.task_id}: its lists differ in length")
        ids[i, :n] = torch.tensor(t.token_ids)
        attention_mask[i, :n] = 1
        mask[i, :n] = torch.tensor(t.action_mask)
        old_logprobs[i, :n] = torch.tensor(t.logprobs)
        turns[i, :n] = torch.tensor(t.turns)
    last_B = turns.amax(1, keepdim=True)
    advantages = torch.as_tensor(advantages, dtype=torch.float32)[:, None] * gamma ** (last_B - turns)
    batch = {"ids": ids, "attention_mask": attention_mask, "mask": mask, "old_logprobs": old_logprobs}
    batch["advantages"] = advantages.where(mask, torch.zeros(()))
    return {name: tensor.to(device) for name, tensor in batch.items()}


# --------------------------------------------------------------------------- the demonstration (no tau2 needed)


class CodeEpisode:
    """A toy task in the shape of an Episode: read a code with one tool, repeat it to another."""

    domain, system, tools = "toy", "", []

    def __init__(self, number):
        from types import SimpleNamespace

        self.task = SimpleNamespace(id=number)
        self.messages, self.done, self.termination, self.reward = [], False, "", 0.0

    def opening(self):
        return [{"role": "user", "content": f"Open door {self.task.id}."}]

    def code(self):
        return (7 * self.task.id + 3) % 10

    def act(self, message):
        calls = [call["function"] for call in message.get("tool_calls") or []]
        if len(self.messages) == 0 and calls and calls[0]["name"] == "look":
            self.messages.append(message)
            return [{"role": "tool", "content": f"code {self.code()}"}]
        right = {"name": "open", "arguments": {"code": self.code()}}
        self.reward = float(bool(self.messages) and right in [dict(c) for c in calls])
        self.messages.append(message)
        self.stop("agent_stop")
        return []

    def stop(self, reason):
        self.done, self.termination = True, reason

    def gold(self):
        look = {"name": "look", "arguments": {}}
        return [{"tool_calls": [{"function": f}]} for f in (look, {"name": "open", "arguments": {"code": self.code()}})]


def main():
    torch.manual_seed(0)
    model, tokenizer = load_policy("tiny", dtype="float32")
    size = sum(p.numel() for p in model.parameters())
    print(f"tiny policy: {size / 1e6:.2f}M parameters, vocabulary {len(tokenizer)}, on {model.device}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    pad = tokenizer.pad_token_id
    loss = torch.tensor(torch.inf)
    while loss > 0.03:  # warm start: imitate the gold turns, and stop before there is nothing left to learn
        shown = [demonstration(tokenizer, CodeEpisode(n), CodeEpisode(n).gold()) for n in range(4)]
        batch = collate(shown, [1.0] * len(shown), device=model.device, pad_id=pad)
        logprobs = token_logprobs(model, batch["ids"], batch["attention_mask"], mask_B_T=batch["mask"])
        loss = -logprobs.sum() / batch["mask"].sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    print(f"warm start on 4 demonstrations: loss {loss.item():.3f}")
    reference = copy.deepcopy(model)
    generator = torch.Generator(model.device).manual_seed(0)
    for group in optimizer.param_groups:
        group["lr"] = 1e-3
    for moments in optimizer.state.values():
        moments["exp_avg"].zero_()
    for step in range(30):
        start = time.perf_counter()
        episodes = [CodeEpisode(n) for n in range(4) for _ in range(48)]
        trajectories = rollout(model, tokenizer, episodes, 0.7, max_new_tokens=48, generator=generator)
        rewards_P_G = torch.tensor([e.reward for e in episodes]).view(4, 48)
        advantages = group_advantages(rewards_P_G, scale="none").flatten()
        batch = collate(trajectories, advantages, device=model.device, pad_id=pad)
        scored = (batch["ids"], batch["attention_mask"], 0.7, batch["mask"])
        with torch.no_grad():
            ref_logprobs = token_logprobs(reference, *scored)
        loss, stats = policy_loss(
            token_logprobs(model, *scored),
            batch["old_logprobs"],
            batch["advantages"],
            batch["mask"],
            ref_logprobs=ref_logprobs,
            kl_coef=0.02,
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens = int(batch["mask"].sum())
        print(
            f"step {step:2d}  reward {rewards_P_G.mean():.2f}  kl {stats['kl']:.3f}  ratio {stats['ratio_min']:.5f} to "
            f"{stats['ratio_max']:.5f}  {tokens / (time.perf_counter() - start):.0f} action tokens/s"
        )


if __name__ == "__main__":
    main()
