"""The policy: loading, batched multi-turn rollouts, and the GRPO loss.

    python grpo.py --shape tiny       times rollouts and updates against the plain ways, on random weights
    python grpo.py --shape 7b         the same in the shape of a 7B model (0.5b, 1.5b; --layers for a slice of one)

Data flow: Episode -> rollout -> Trajectory -> rewards -> group_advantages -> policy_loss.

What differs from GRPO as published (Shao et al. 2024, arXiv:2402.03300), and where:
- token in, token out: what is trained is the exact ids that were sampled. A turn's answer is appended as ids; the
  history is never rendered again, so templates that rewrite it cannot move a token (`ChatFormat`).
- the default loss is DAPO's (Yu et al. 2025, arXiv:2503.14476): one mean over all action tokens of the step, on all
  ranks, and an upper clip of 1.28.
- weights are float32 masters; `dtype` is what they are computed in, by autocast.
- the vocabulary is projected on at sampled tokens only, in chunks that the backward pass computes again.
"""

import concurrent.futures
import copy
import datetime
import json
import logging
import math
import os
import re
import sys
import time
import types
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import jinja2
import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    Qwen2Config,
    Qwen2Tokenizer,
)
from transformers.cache_utils import DynamicLayer
from transformers.generation import ContinuousBatchingConfig

transformers.utils.logging.disable_progress_bar()
for library in ("transformers", "huggingface_hub"):
    logging.getLogger(library).setLevel(logging.ERROR)

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


def _tiny(corpus, seed, attn_implementation):
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
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation)
    return model, tokenizer


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_policy(
    name_or_path,
    dtype="bfloat16",
    device=None,
    lora_rank=0,
    seed=0,
    weights_dtype="float32",
    corpus=None,
    attn_implementation=None,
    gradient_checkpointing=False,
):
    """(model, tokenizer) of a Hugging Face causal LM, or of the embedded "tiny" policy.

    `dtype`: what is computed in, under autocast; `weights_dtype`: what the weights are kept in (float32 masters for
    training: Adam at 1e-6 hardly moves bfloat16 weights). `corpus`: the texts that tiny's tokenizer is trained on.
    `device` defaults to the GPU where there is one. `lora_rank` > 0: float32 LoRA adapters (Hu et al. 2021,
    arXiv:2106.09685) on every linear layer but the head are all that is trained; frozen weights are kept in `dtype`.
    A directory with an adapter is loaded with it. `attn_implementation`: as in transformers (eager, sdpa, ...).
    `gradient_checkpointing`: layers are computed again in the backward pass.
    Raises ValueError for an unknown dtype, a missing directory, a tokenizer without a chat template, or one whose
    turns or tool calls cannot be handled.
    """
    for value in (dtype, weights_dtype):
        if value not in DTYPES:
            raise ValueError(f"unknown dtype {value!r}; choose one of {', '.join(DTYPES)}")
    if lora_rank < 0:
        raise ValueError(f"lora_rank must be 0 (train every weight) or more, got {lora_rank}")
    _check_directory(name_or_path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    kept = DTYPES[dtype if lora_rank else weights_dtype]
    try:
        if name_or_path == "tiny":
            model, tokenizer = _tiny(corpus, seed, attn_implementation)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
            model = AutoModelForCausalLM.from_pretrained(
                name_or_path,
                dtype=kept,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation=attn_implementation,
            )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot load a model from {name_or_path!r}: {reason}") from error
    for scaling in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(model.config, scaling, None) not in (None, 1.0):
            raise ValueError(f"{name_or_path}: models with {scaling} are not supported by token_logprobs")
    model.to(device=device, dtype=kept)
    if lora_rank:
        _add_lora(model, lora_rank, seed)
        adapter = Path(name_or_path) / "adapter_model.safetensors"
        if adapter.exists():  # read as float32: the model above was read as `dtype`
            for name, tensor in load_file(adapter, device=str(device)).items():
                path = re.sub(r"(lora_[AB])", r"\1.default", name.removeprefix("base_model.model."))
                model.get_parameter(path).data.copy_(tensor)
    if gradient_checkpointing:
        # The method's name changed in transformers 5.2x; the old one warns.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    for module in model.modules():  # dropout would break the ratio of 1, in training mode too
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model.eval()
    model.compute_dtype = DTYPES[dtype]
    model.recompute_layers = gradient_checkpointing
    _new_cache(model)  # refuses what rollouts cannot play, before anything is written
    ChatFormat.of(tokenizer)
    return model, tokenizer


def _check_directory(name_or_path):
    """Raises ValueError for a path that is not there, or an adapter whose base model is not."""
    path = Path(name_or_path)
    if (path.is_absolute() or name_or_path.startswith(".")) and not path.is_dir():
        raise ValueError(f"cannot load a model from {name_or_path!r}: there is no such directory")
    config = path / "adapter_config.json"
    if config.is_file():
        base = json.loads(config.read_text()).get("base_model_name_or_path") or ""
        if Path(base).is_absolute() and not Path(base).is_dir():
            raise ValueError(f"cannot load the adapter {name_or_path}: its base model {base} is not there")


def _add_lora(model, rank, seed):
    """Adapters on the linear layers, in place (a loaded one is trained on): the model keeps its class and names."""
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("lora_rank needs the package peft; pip install peft") from error
    if rank > model.config.hidden_size:
        raise ValueError(f"lora_rank must be at most the model's width of {model.config.hidden_size}, got {rank}")
    if not getattr(model, "_hf_peft_config_loaded", False):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    elif next(iter(model.peft_config.values())).r != rank:
        raise ValueError(f"the saved adapter has rank {next(iter(model.peft_config.values())).r}, not {rank}")
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
        if p.requires_grad:
            p.data = p.data.float()


def autocast(model):
    """Computes in the policy's dtype; one context for a whole rollout, so that weights are cast once."""
    dtype = getattr(model, "compute_dtype", torch.float32)
    return torch.autocast(model.device.type, dtype) if dtype != torch.float32 else nullcontext()


# --------------------------------------------------------------------- the weights: shards, snapshots, copies


def shard(model):
    """Splits weights, gradients and optimiser states over all ranks (FSDP2, Rajbhandari et al. 2020,
    arXiv:1910.02054), in place. Gradients of a backward pass are then summed over the ranks by themselves, and every
    rank must make the same number of forward and backward passes. Loaded on the CPU before, the model goes to the GPU
    layer by layer."""
    if not dist.is_initialized():
        raise ValueError("sharding needs several ranks: start with torchrun --nproc_per_node=N")
    if len({p.dtype for p in model.parameters()}) > 1:  # LoRA: FSDP gathers weights of one type only
        model.float()
    # What a plain copy is made from later (`plain_copy`): the modules as they are, their weights left out.
    hollow = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    model.__dict__["skeleton"] = copy.deepcopy(model, hollow)
    low = model.compute_dtype if model.compute_dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # the loss is normalised by global counts: sum, not mean
            module.set_gradient_divide_factor(1.0)
    model.project = types.MethodType(_project, model)
    register_fsdp_forward_method(model, "project")


def is_sharded(model) -> bool:
    return isinstance(model, FSDPModule)


def trained_parameters(model) -> dict[str, nn.Parameter]:
    """By name, as they are kept between steps: under FSDP this rank's shards (DTensor)."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(tensor) -> Tensor:
    """A DTensor gathered from all ranks (all must call), any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(tensor, like) -> Tensor:
    """The inverse of `whole`: what this rank keeps of a tensor, if `like` is kept in parts."""
    return distribute_tensor(tensor, like.device_mesh, like.placements) if isinstance(like, DTensor) else tensor


def snapshot(model) -> list[Tensor]:
    """A copy of the trained parameters in the CPU's memory (under FSDP, of this rank's shards)."""
    parameters = trained_parameters(model).values()
    return [local_part(p).detach().to("cpu", copy=True) for p in parameters]


def local_part(tensor):
    """What this rank holds of a DTensor; any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(part, like) -> Tensor:
    """The inverse of `local_part`: a tensor of this rank's part, beside a parameter that may be sharded."""
    if not isinstance(like, DTensor):
        return part
    placed = (like.device_mesh, like.placements)
    return DTensor.from_local(part, *placed, run_check=False, shape=like.shape, stride=like.stride())


@contextmanager
@torch.no_grad()
def weights_of(model, saved):
    """Inside, the model is the policy of `snapshot(model)` then; None: the model without its LoRA adapters.

    Contents are exchanged in place, so that it needs no second model, and exchanged back at the end.
    """
    if saved is None:
        model.disable_adapters()
        for name, p in model.named_parameters():
            p.requires_grad_("lora_" in name)  # peft has frozen them; FSDP chooses its types by what is trained
    else:
        _exchange(model, saved)
    try:
        yield
    finally:
        if saved is None:
            model.enable_adapters()
        else:
            _exchange(model, saved)


def _exchange(model, saved):
    for p, other in zip(trained_parameters(model).values(), saved, strict=True):
        mine = local_part(p).detach()
        kept = mine.to("cpu", copy=True)
        mine.copy_(other)
        other.copy_(kept)


def gathered(tensor) -> Tensor | None:
    """A tensor whole in the CPU's memory of rank 0, None on the others. If it is sharded, every rank must call."""
    tensor = whole(tensor.detach())
    return tensor.to("cpu", copy=True).contiguous() if rank() == 0 else None


def gathered_weights(model) -> dict | None:
    """`gathered` of all weights by name; None where they are not sharded."""
    if not is_sharded(model):
        return None
    trained_parameters(model)  # reshards
    return {name: gathered(p) for name, p in model.named_parameters()}


@torch.no_grad()
def gathered_snapshot(model, saved) -> dict[str, Tensor]:
    """`gathered` of a snapshot by the parameters' names, for a file."""
    with weights_of(model, saved):
        return {name: gathered(p) for name, p in trained_parameters(model).items()}


def snapshot_from(model, read) -> list[Tensor]:
    """The inverse of `gathered_snapshot`, on any number of ranks; `read(name)` gives a whole tensor."""
    parameters = trained_parameters(model).items()
    return [local_part(part_like(read(name).to(p.device), p)).to("cpu", copy=True) for name, p in parameters]


def save_policy(model, tokenizer, folder, weights=None):
    """Writes a directory that transformers loads (with LoRA, the adapter only); weights: `gathered_weights(model)`."""
    model.__dict__.get("skeleton", model).save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def plain_copy(model, dtype):
    """An ordinary model with these weights in `dtype`, gathered from all ranks if they are sharded: to sample from."""
    trained_parameters(model)  # reshards
    skeleton = model.__dict__.get("skeleton", model)
    copies = {}
    for bone, p in zip(skeleton.parameters(), model.parameters(), strict=True):
        copies[id(bone)] = nn.Parameter(whole(p.detach()).to(dtype), requires_grad=False)
    return copy.deepcopy(skeleton, copies).to(model.device)


# ------------------------------------------------------------------------------------------ the chat template


PROBE_TOOL = {"name": "probe_tool", "description": "", "parameters": {"type": "object", "properties": {}}}
TOOLS = [{"type": "function", "function": PROBE_TOOL}]


class ChatFormat:
    """How a tokenizer's chat template turns messages into ids: opening, the answers to a turn, and a turn itself.

    The answer to a sampled turn is what the template puts behind an assistant turn's end token when these messages
    follow; it is tokenized alone and appended, so the sampled ids stay as they are, also where the template would
    rewrite them later (Qwen3 drops earlier thoughts). A template that puts something else between two turns depending
    on what came before cannot be followed in this way and raises ValueError.
    """

    PROBE = "REHEARSE-PROBE"

    @classmethod
    def of(cls, tokenizer):
        if not hasattr(tokenizer, "_chat_format"):
            tokenizer._chat_format = cls(tokenizer)
        return tokenizer._chat_format

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or "the tokenizer"
        if not tokenizer.chat_template:
            raise ValueError(f"{self.name} has no chat template; an agent needs one (an Instruct model has it)")
        self.template = tokenizer.get_chat_template(tools=[{}])  # some have one for tools beside the default
        user = {"role": "user", "content": "x"}
        self.base = [user, {"role": "assistant", "content": self.PROBE}]
        tail = self._render(self.base).rpartition(self.PROBE)[2]
        ids = self._ids(tail)
        # Not all_special_ids: they are only those with a role, such as eos and pad.
        special = {i: token.content for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = list(special.values())
        if not ids or ids[0] not in special:
            raise ValueError(f"{self.name}: the chat template does not end an assistant turn with a special token")
        self.end_id = ids[0]
        self.end = special[self.end_id]
        self.stop_ids = {self.end_id, tokenizer.eos_token_id} - {None}
        self._check_calls()
        self._check_answers()
        self.greets = self._can_greet()

    def _can_greet(self) -> bool:
        """Whether a conversation may begin with the agent. Where the template puts such a greeting into the user's
        mouth (Llama 3.1 with tools) or refuses it, `opening` leaves it out."""
        header = self._render([*self.base, self.base[0]]).partition(self.PROBE)[0]
        header = header.removeprefix(self._render(self.base[:1]))
        try:
            rendered = self._render(self.base[::-1], TOOLS)
        except ValueError:
            return False
        return header + self.PROBE in rendered

    def _check_calls(self):
        """What the template writes for a tool call must be read as that call."""
        call = {"type": "function", "function": {"name": "probe_tool", "arguments": {"key": 'va"lue', "n": [1, 2.5]}}}
        ids = self.turn({"role": "assistant", "content": "", "tool_calls": [call]})[:-1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        for self.bare_calls in (False, True):
            if [c["function"] for c in self.parse(text)["tool_calls"]] == [call["function"]]:
                return
        raise ValueError(
            f"{self.name}: tool calls are written as {text[:80]!r}, which is not supported; "
            'the <tool_call>{"name": ..., "arguments": ...}</tool_call> of Qwen and Hermes and the '
            '{"name": ..., "parameters": ...} of Llama 3 are'
        )

    def _check_answers(self):
        """What follows a turn must not depend on what came before it, nor on how it is cut into texts."""
        before = [*self.base, {"role": "user", "content": "y"}, {"role": "assistant", "content": "z"}]
        for role in ("tool", "user"):
            answer = [{"role": role, "content": "answer"}]
            expected = self._behind(self.base + answer)
            last = [{"role": "user", "content": "w"}, self.base[1]]
            longer = [{**m, "content": m["content"].replace(self.PROBE, "v")} for m in before] + last + answer
            if self._behind(longer) != expected or self._behind(self.base + answer, TOOLS) != expected:
                raise ValueError(
                    f"{self.name}: what the chat template puts before a {role} message depends on the turns before it "
                    "or on the tools, so that turns cannot be appended to a conversation as they come"
                )
            rendered = self._render(self.base + answer, add_generation_prompt=True)
            head = rendered.partition(self.PROBE)[0] + self.PROBE + self.end
            if self._ids(rendered) != self._ids(head) + self._ids(expected):
                raise ValueError(f"{self.name}: text behind an end of turn is tokenized differently alone")

    def _render(self, messages, tools=None, add_generation_prompt=False):
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise ValueError(f"{self.name}: the chat template cannot render the roles {roles}: {error}") from error

    def _behind(self, messages, tools=None):
        """The rendered text behind the end token of the last turn that says PROBE."""
        rendered = self._render(messages, tools, add_generation_prompt=True)
        return rendered.rpartition(self.PROBE)[2].removeprefix(self.end)

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
        if messages and messages[0]["role"] == "assistant" and not self.greets:
            messages = messages[1:]
        return self._ids(self._render(system + self._clean(messages), tools, add_generation_prompt=True))

    def answer(self, messages) -> list[int]:
        """What follows the end token of the agent's turn, up to where its next turn begins."""
        rendered = self._render(self.base + self._clean(messages), add_generation_prompt=True)
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
            raise ValueError(f"{self.name}: the chat template does not begin a turn with its generation prompt")
        return self._ids(rendered[len(prompt) :].partition(self.end)[0] + self.end)

    def parse(self, text) -> dict:
        """The policy's text as a chat message, by the tool-call format of this template."""
        return parse_message(text, self.bare_calls)

    def cut(self, message, limit):
        """The message with at most `limit` tokens of content; cut between tokens, and marked."""
        if limit is None:
            return message
        ids = self._ids(message["content"])
        if len(ids) <= limit:
            return message
        return {**message, "content": self.tokenizer.decode(ids[:limit]).rstrip("\ufffd") + " ..."}


def parse_message(text: str, bare_calls=False) -> dict:
    """The policy's text as a chat message: content, and tool calls in the <tool_call> JSON format; with `bare_calls`
    a text that is one JSON object with a name is a call (Llama 3, which says "parameters" for the arguments).

    A call that is not JSON keeps its place with name None and an "error", for the environment to answer.

    >>> parse_message('Hm.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>')["tool_calls"]
    [{'type': 'function', 'function': {'name': 'f', 'arguments': {'a': 1}}}]
    """
    text = re.sub(r"<think>.*?(</think>|$)", "", text, flags=re.DOTALL)
    text = text.rsplit("</think>", 1)[-1]  # some templates open <think> themselves
    if bare_calls:
        bare = text.strip().removeprefix("<|python_tag|>").lstrip()
        blocks = [bare] if re.match(r'\{\s*"(name|type)"', bare) else []
        content = "" if blocks else text.strip()
    else:
        blocks = re.findall(r"<tool_call>(.*?)(?:</tool_call>|(?=<tool_call>)|$)", text, flags=re.DOTALL)
        content = re.sub(r"<tool_call>.*?(</tool_call>|(?=<tool_call>)|$)", "", text, flags=re.DOTALL).strip()
    calls = []
    for block in blocks:
        try:
            call = json.loads(block)
            if not isinstance(call, dict):
                raise ValueError("a tool call must be a JSON object")
            arguments = call.get("arguments", call.get("parameters", {}) if bare_calls else {})
            function = {"name": call.get("name"), "arguments": arguments}
        except (ValueError, RecursionError) as error:
            function = {"name": None, "arguments": block, "error": f"malformed tool call: {error}"}
        calls.append({"type": "function", "function": function})
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


def barrier():
    if world_size() > 1:
        dist.barrier()


def all_gather_json(value) -> list:
    """Every rank's `value`, in the order of ranks. JSON, because dist.all_gather_object unpickles."""
    if world_size() == 1:
        return [json.loads(json.dumps(value))]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    lengths = [torch.zeros(1, dtype=torch.long, device=device) for _ in range(world_size())]
    dist.all_gather(lengths, torch.tensor([len(data)], device=device))
    padded = torch.zeros(int(max(lengths)), dtype=torch.uint8, device=device)
    padded[: len(data)] = data
    parts = [torch.zeros_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return [json.loads(part[: int(n)].cpu().numpy().tobytes()) for part, n in zip(parts, lengths, strict=True)]


def seeded_generator(device, *seeds) -> torch.Generator:
    """A generator whose numbers depend on all of the (non-negative) seeds."""
    words = np.random.SeedSequence([len(seeds), *seeds]).generate_state(2)  # alone, (1,) and (1, 0) are the same
    return torch.Generator(device).manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


@contextmanager
def seeded(device, *seeds):
    """Inside, torch's global generators depend on the seeds; afterwards they are as before."""
    with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(seeded_generator("cpu", *seeds).initial_seed())
        yield


# ----------------------------------------------------------------------------------------------- rollouts


class RaggedLayer(DynamicLayer):
    """Keys and values of conversations of different lengths, in room that doubles when it is full: a forward pass of
    some `rows` writes to each from its own `starts` on. transformers' DynamicLayer has one length for all and copies
    everything at every token."""

    count = 0  # conversations
    room = None  # (2, count, heads, tokens, head_dim)
    rows = starts = None  # of the next forward pass, (b,); rows None: all
    end = 0

    def update(self, key_states, value_states, *args, **kwargs):
        batch, heads, width, head_dim = key_states.shape
        if self.room is None or self.room.shape[-2] < self.end:
            old = self.room
            self.room = value_states.new_zeros((2, self.count, heads, max(256, 2 * self.end), head_dim))
            if old is not None:
                self.room[:, :, :, : old.shape[-2]] = old
        rows = torch.arange(batch, device=self.starts.device) if self.rows is None else self.rows
        columns = self.starts[:, None] + torch.arange(width, device=self.starts.device)
        for half, states in zip(self.room, (key_states, value_states), strict=True):
            half[rows[:, None], :, columns] = states.transpose(1, 2).to(half.dtype)
        seen = self.room[:, :, :, : self.end]
        return tuple(seen if self.rows is None else seen[:, rows])

    def get_seq_length(self):
        return self.end

    def select(self, rows):
        self.room, self.count = self.room.index_select(1, rows), len(rows)


def _new_cache(model):
    cache = DynamicCache(config=model.config)
    if any(type(layer) is not DynamicLayer for layer in cache.layers):
        name = model.config.name_or_path or model.config.model_type
        raise ValueError(f"{name}: rollouts need full attention in every layer; this model has other layers")
    cache.layers = [RaggedLayer() for _ in cache.layers]
    return cache


@dataclass
class _Conversation:
    """A conversation in progress, whichever way its turns are sampled."""

    episode: object
    chat: ChatFormat
    max_new_tokens: int
    max_context: int
    cut: dict  # tokens that a message of a role is cut to
    on_finish: object
    opened: object = None  # of an episode that waits for a server: the future of its opening
    finished: bool = False
    turn: int = 0
    answer: object = None  # of such an episode: the future of its answer to the last turn

    def __post_init__(self):
        self.trajectory = Trajectory(self.episode.domain, str(self.episode.task.id))
        try:
            opening = self._cut(self.episode.opening() if self.opened is None else self.opened.result())
        except Exception as error:
            if self.opened is None:
                raise
            self._fail(error)
            return
        self.trajectory.append(self.chat.opening(self.episode.system, opening, self.episode.tools))
        if self.room < 1:
            raise ValueError(
                f"the opening of {self.episode.domain} task {self.episode.task.id} has "
                f"{len(self.trajectory.token_ids)} tokens, which leaves none in a context of {self.max_context}"
            )
        if self.episode.done:
            self._finish(self.episode.termination)

    @property
    def room(self):
        """Tokens that the next turn may have."""
        return min(self.max_new_tokens, self.max_context - len(self.trajectory.token_ids))

    def say(self, ids, logprobs, pool=None) -> list[int]:
        """A sampled turn, to its end or to where it was cut. Returns what is to be read before the next one; nothing
        where the answer has to be waited for: then `answer` is its future (in `pool`), and `hear` is to be called."""
        stopped = ids[-1] in self.chat.stop_ids
        self.trajectory.append(ids, self.turn, logprobs)
        self.trajectory.truncated_turns += not stopped
        self.turn += 1
        text = self.chat.tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True)
        if pool is not None and getattr(self.episode, "slow", False):
            self.answer = pool.submit(self.episode.act, self.chat.parse(text))
            return []
        return self.hear(lambda: self.episode.act(self.chat.parse(text)))

    def hear(self, act=None) -> list[int]:
        """The answer to the last turn, by default the one that was waited for."""
        answer, self.answer = self.answer, None
        try:
            answers = act() if act is not None else answer.result()
        except Exception as error:  # named in the trajectory, which its group leaves out
            return self._fail(error)
        if self.episode.done:
            return self._finish(self.episode.termination)
        ended = self.trajectory.token_ids[-1] == self.chat.end_id
        suffix = ([] if ended else [self.chat.end_id]) + self.chat.answer(self._cut(answers))
        if len(self.trajectory.token_ids) + len(suffix) >= self.max_context:
            self.episode.stop("max_steps")
            return self._finish("max_steps")
        self.trajectory.append(suffix)
        return suffix

    def _cut(self, messages):
        return [self.chat.cut(message, self.cut.get(message["role"])) for message in messages]

    def _fail(self, error):
        self.trajectory.valid = False
        self.trajectory.error = f"{type(error).__name__}: {error}"
        return self._finish("environment_error")

    def _finish(self, termination):
        self.finished = True
        self.trajectory.termination = termination
        self.trajectory.messages = self.episode.messages
        if self.on_finish is not None:
            self.on_finish(self.episode, self.trajectory)
        return []


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
    engine="auto",
) -> list[Trajectory]:
    """Plays all episodes at once and returns their trajectories in the episodes' order.

    Sampling is from the whole distribution at `temperature` (0: the most likely token), so the log-probabilities are
    those of the loss: to rounding in float32; in bfloat16, where engines, autocast and shards round in other places, to
    about a percent. Each token is computed once, and none waits for the others' turns.

    max_new_tokens: sampled tokens a turn; max_context: tokens a conversation (None: the model's limit), at which it
    ends as "max_steps"; max_user_tokens, max_tool_tokens: tokens of one message to the policy, cut beyond.
    generator: a torch.Generator on the model's device. on_finish(episode, trajectory): called when one ends.
    engine: "padded" decodes all conversations in one batch, token by token; "paged" is transformers' continuous
    batching, where answers are read in one piece and common prefixes once; "auto": paged on a GPU, padded elsewhere
    (`python grpo.py` measures both). With a sharded model every rank must call, with episodes or without.
    An exception of `episode.act` makes the trajectory invalid, with the error's text. Episodes with a true attribute
    `slow` (their users are models behind a server) are asked in threads, SLOW_AT_ONCE at a time, while others go on.
    """
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be 0 or more, got {temperature}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    engine = choose_engine(model, engine)
    # Sharded weights are gathered, and continuous batching runs in a thread of its own, outside autocast.
    uniform = {p.dtype for p in model.parameters()} == {getattr(model, "compute_dtype", model.dtype)}
    if is_sharded(model) or (engine == "paged" and not uniform):
        model = plain_copy(model, model.compute_dtype)
    max_context = context_length(model, max_context)
    cut = {"tool": max_tool_tokens, "user": max_user_tokens}
    chat = ChatFormat.of(tokenizer)
    pool = concurrent.futures.ThreadPoolExecutor(SLOW_AT_ONCE)
    try:
        opened = [pool.submit(e.opening) if getattr(e, "slow", False) else None for e in episodes]
        conversations = [
            _Conversation(episode, chat, max_new_tokens, max_context, cut, on_finish, opening)
            for episode, opening in zip(episodes, opened, strict=True)
        ]
        active = [c for c in conversations if not c.finished]
        if active:
            play = _play_paged if engine == "paged" else _play_padded
            with autocast(model):
                play(model, tokenizer, active, temperature, generator, pool)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return [c.trajectory for c in conversations]


SLOW_AT_ONCE = 32  # conversations that wait for a server at the same time


ENGINES = ("auto", "padded", "paged")


def choose_engine(model, engine="auto") -> str:
    """What "auto" stands for. Raises ValueError for an unknown engine, or one that the model's attention rules out."""
    if engine not in ENGINES:
        raise ValueError(f"unknown engine {engine!r}; choose one of {', '.join(ENGINES)}")
    if engine == "auto":
        engine = "paged" if torch.cuda.is_available() else "padded"
    attention = model.config._attn_implementation
    if engine == "padded" and attention not in ("eager", "sdpa"):
        raise ValueError(f"padded rollouts need the attention eager or sdpa, not {attention}")
    if engine == "paged" and not (attention in ("eager", "sdpa") or "flash" in attention):
        raise ValueError(f"paged rollouts need the attention eager, sdpa or a flash one, not {attention}")
    return engine


def context_length(model, max_context=None) -> int:
    """Tokens that a conversation may have. ValueError where that is more than the model allows."""
    limit = model.config.max_position_embeddings
    if (max_context or 0) > limit:
        raise ValueError(f"max_context must be at most the model's {limit} tokens, got {max_context}")
    return max_context or limit


def check_opening(model, tokenizer, episode, max_context=None, max_user_tokens=None, max_tool_tokens=None):
    """Raises ValueError where an episode's opening leaves no room for a turn: better known at the start of a run."""
    cut = {"tool": max_tool_tokens, "user": max_user_tokens}
    _Conversation(episode, ChatFormat.of(tokenizer), 1, context_length(model, max_context), cut, None)


def _play_padded(model, tokenizer, active, temperature, generator, pool=None):
    """All conversations sample one token per forward pass; those that have been answered read the answer first, in a
    pass of their own. Equal prompts are read once."""
    device = model.device
    prompts = [tuple(c.trajectory.token_ids) for c in active]
    distinct = sorted(set(prompts))
    cache = _new_cache(model)
    lengths = torch.zeros(len(distinct), dtype=torch.long, device=device)  # tokens in the cache
    head = model.get_output_embeddings()

    def read(rows, texts):
        """Feeds each row its next tokens; logits (rows, V) behind the last one."""
        widths = torch.tensor([len(text) for text in texts], device=device)
        ids = torch.zeros((len(texts), max(map(len, texts))), dtype=torch.long)
        for i, text in enumerate(texts):
            ids[i, : len(text)] = torch.tensor(text)
        index = None if rows is None else torch.tensor(rows, device=device)
        starts = lengths if rows is None else lengths[index]
        positions = starts[:, None] + torch.arange(ids.shape[1], device=device)
        end = int(starts.max()) + ids.shape[1]
        for layer in cache.layers:
            layer.rows, layer.starts, layer.end = index, starts, end
        seen = torch.arange(end, device=device) <= positions[:, :, None]  # and so never the padding behind a text
        if model.config._attn_implementation == "eager":
            seen = torch.where(seen, 0.0, torch.finfo(model.dtype).min)
        hidden = model.get_decoder()(
            input_ids=ids.to(device),
            attention_mask=seen[:, None],
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        logits = head(hidden[torch.arange(len(texts), device=device), widths - 1])
        if rows is None:
            lengths.add_(widths)
        else:
            lengths[index] += widths
        return logits

    def read_long(rows, texts):
        """The same in passes of 16k tokens."""
        logits = {}
        for part in micro_batches([len(text) for text in texts], 16384):
            found = read([rows[i] for i in part], [texts[i] for i in part])
            logits.update(zip(part, found, strict=True))
        return torch.stack([logits[i] for i in range(len(texts))])

    cache_rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=device)
    for layer in cache.layers:
        layer.count = len(distinct)
    logits_BV = read_long(range(len(distinct)), distinct)[cache_rows]
    for layer in cache.layers:
        layer.select(cache_rows)
    lengths = lengths[cache_rows]
    rows = list(range(len(active)))  # whose logits these are
    sampled = [[] for _ in active]  # of the turn in progress: (token, log-probability)
    pending = [[] for _ in active]  # to be read before the next token
    while True:
        if not logits_BV.isfinite().all():
            raise ValueError("the policy's logits are not finite; its weights have diverged, lower the learning rate")
        logprobs_BV = (logits_BV.float() / (temperature or 1.0)).log_softmax(-1)
        if temperature > 0:
            tokens_B = torch.multinomial(logprobs_BV.exp(), 1, generator=generator)
        else:
            tokens_B = logprobs_BV.argmax(-1, keepdim=True)
        chosen_B = logprobs_BV.gather(1, tokens_B)[:, 0].tolist()
        for i, token, logprob in zip(rows, tokens_B[:, 0].tolist(), chosen_B, strict=True):
            if active[i].finished:
                continue
            sampled[i].append((token, logprob))
            pending[i] = [token]
            if token in active[i].chat.stop_ids or len(sampled[i]) == active[i].room:
                pending[i] += active[i].say(*map(list, zip(*sampled[i], strict=True)), pool)
                sampled[i] = []
        _wait(active, pending)
        kept = [i for i, c in enumerate(active) if not c.finished]
        if not kept:
            return
        if len(kept) <= 0.8 * len(active):  # finished conversations leave the batch a fifth at a time
            active, pending, sampled = ([column[i] for i in kept] for column in (active, pending, sampled))
            index = torch.tensor(kept, device=device)
            lengths = lengths[index]
            for layer in cache.layers:
                layer.select(index)
        waiting = {i for i, c in enumerate(active) if c.answer is not None}
        rows = [i for i, text in enumerate(pending) if len(text) > 1 and not active[i].finished and i not in waiting]
        if rows:
            logits_BV = read_long(rows, [pending[i] for i in rows])
        elif waiting:
            rows = [i for i, c in enumerate(active) if not c.finished and i not in waiting]
            logits_BV = read(rows, [pending[i][:1] for i in rows])
        else:
            rows = list(range(len(active)))
            logits_BV = read(None, [text[:1] for text in pending])


def _wait(active, pending):
    """Takes the answers that have come; where every conversation waits for one, until one has."""
    while True:
        going = False
        for i, c in enumerate(active):
            if c.answer is not None and c.answer.done():
                pending[i] += c.hear()
            going = going or (c.answer is None and not c.finished)
        futures = [c.answer for c in active if c.answer is not None]
        if going or not futures:
            return
        concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_COMPLETED)


PAGE = 16  # tokens; what is not a whole page is read again when its conversation goes on


def _play_paged(model, tokenizer, active, temperature, generator, pool=None):
    """transformers' continuous batching: one manager, and so one cache, for this rollout and no longer. A conversation
    goes on as soon as it is answered; what it shares with any other one so far, or with itself, is not read again."""
    settings = GenerationConfig(
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_k=0,
        top_p=1.0,
        max_new_tokens=active[0].max_new_tokens,
        eos_token_id=sorted(active[0].chat.stop_ids),
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    seed = int(torch.randint(2**31, (), generator=generator, device=generator.device)) if generator else None
    sizes = {}
    if model.device.type == "cpu":  # elsewhere they follow from the free memory
        sizes = {"num_blocks": sum(-(-c.max_context // PAGE) for c in active), "max_batch_tokens": 2048}
    known = ContinuousBatchingConfig.__dataclass_fields__
    if "auto_switch_to_flash" in known:
        sizes["auto_switch_to_flash"] = False  # the attention is the user's choice
    sizes["page_size" if "page_size" in known else "block_size"] = PAGE  # its name before transformers 5.18
    paging = ContinuousBatchingConfig(return_logprobs=True, seed=seed, **sizes)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):  # the library seeds the global generator
        manager = model.init_continuous_batching(settings, paging)
        manager.start()
        try:
            _read_shared_prefixes(manager, active)
            sampling = set(range(len(active)))  # of whom the manager has a request
            going_on = list(sampling)
            while not all(c.finished for c in active):
                for i in going_on:
                    manager.add_request(active[i].trajectory.token_ids, str(i), max_new_tokens=active[i].room)
                asked = {c.answer: i for i, c in enumerate(active) if c.answer is not None}
                answered = []
                if not sampling:
                    concurrent.futures.wait(asked, return_when=concurrent.futures.FIRST_COMPLETED)
                elif (result := _next_result(manager, patient=not asked)) is not None:
                    i = int(result.request_id)
                    sampling.remove(i)
                    active[i].say(result.generated_tokens, result.logprobs, pool)
                    answered += [i] if active[i].answer is None else []
                for answer, i in asked.items():
                    if answer.done():
                        active[i].hear()
                        answered.append(i)
                going_on = [i for i in answered if not active[i].finished]
                sampling.update(going_on)
        finally:
            manager.stop(block=True, hard_stop=True)


def _read_shared_prefixes(manager, active):
    """Conversations that start together would each read the prompt that they share: it is read once before, first what
    all of one domain share (its policy and tools), then what the samples of one task do."""
    by_domain, by_prompt = {}, Counter(tuple(c.trajectory.token_ids) for c in active)
    for c in active:
        by_domain.setdefault(c.episode.domain, []).append(c.trajectory.token_ids)
    policies = [_common_prefix(min(p), max(p)) for p in by_domain.values() if min(p) != max(p)]
    samples = [list(prompt) for prompt, count in by_prompt.items() if count > 1]
    for prefixes in (policies, samples):
        prefixes = [prefix for prefix in prefixes if len(prefix) >= PAGE]
        for i, prefix in enumerate(prefixes):  # two tokens: the cache forgets what a request's last step completed
            manager.add_request(prefix, f"prefix {i}", max_new_tokens=2, eos_token_id=-1)
        for _ in prefixes:
            _next_result(manager)


def _common_prefix(a, b):
    """Of the least and the greatest of some lists, it is the common prefix of all."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(a))]


def _next_result(manager, patient=True):
    """A finished request; impatiently None if there is none soon."""
    result = None
    while result is None:
        result = manager.get_result(timeout=1.0 if patient else 0.02)
        if result is None and not manager.is_running():
            raise RuntimeError(f"continuous batching stopped: {manager.background_thread_status.fatal_error}")
        if result is None and not patient:
            return None
    if result.error is not None:
        raise ValueError(f"paged rollouts failed: {result.error}; take fewer conversations at once, or engine padded")
    return result


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


CHUNK = 2**26  # logits at once: 0.25 GB in float32, 441 tokens of a vocabulary of 152k


def token_logprobs(model, ids_B_T, attention_mask_B_T, temperature=1.0, mask_B_T=None, return_entropy=False):
    """Log-probabilities (B, T) of the given tokens; entry t scores token t given those before it, entry 0 is 0.0.

    They are of the distribution scaled by `temperature`, as in the rollout. With `mask_B_T` only the tokens where it
    is True are scored; the others are 0.0. Sequences are padded on the right. `return_entropy`: also the entropy (B, T)
    in nats of each of these distributions, without gradient. The vocabulary is projected on in chunks that the backward
    pass computes again, so that no more than a few times CHUNK logits are in memory.
    """
    targets = ids_B_T[:, 1:]

    def read(logits_NV, targets_N):
        logprobs_NV = (logits_NV / temperature).log_softmax(-1)
        chosen = logprobs_NV.gather(-1, targets_N[:, None])[:, 0]
        if not return_entropy:
            return (chosen,)
        with torch.no_grad():
            return chosen, -(logprobs_NV.exp() * logprobs_NV).sum(-1)

    wanted = attention_mask_B_T[:, 1:].bool() if mask_B_T is None else mask_B_T[:, 1:].bool()
    results = []
    for column in _read_logits(model, ids_B_T, attention_mask_B_T, wanted, read, targets[wanted]):
        full = torch.zeros(ids_B_T.shape, device=ids_B_T.device)
        full[:, 1:] = full[:, 1:].masked_scatter(wanted, column)
        results.append(full)
    return tuple(results) if return_entropy else results[0]


@torch.no_grad()
def frozen_head(model) -> nn.Module:
    """The projection on the vocabulary, for `distillation_kl`: itself where it is not trained, else a copy, whole on
    every rank."""
    trained_parameters(model)  # reshards
    head = model.get_output_embeddings()
    if not any(p.requires_grad for p in head.parameters()):
        return head
    skeleton = model.__dict__.get("skeleton", model).get_output_embeddings()
    copies = {}
    for bone, p in zip(skeleton.parameters(), head.parameters(), strict=True):
        copies[id(bone)] = nn.Parameter(whole(p).to(model.compute_dtype, copy=True), requires_grad=False)
    return copy.deepcopy(skeleton, copies)


def hidden_states(model, ids_B_T, attention_mask_B_T, mask_B_T) -> Tensor:
    """The last hidden states (N, H) that the N tokens of `mask_B_T` (without first ones) are predicted from, without
    gradient. With the `frozen_head` they stand for N distributions over the vocabulary, in the memory of N vectors."""
    with torch.no_grad():
        return _read_logits(model, ids_B_T, attention_mask_B_T, mask_B_T[:, 1:].bool(), None)[0]


def distillation_kl(model, ids_B_T, attention_mask_B_T, mask_B_T, head, teacher_NH) -> Tensor:
    """KL(teacher || policy) in nats, summed over the N distributions of the tokens of `mask_B_T`; a scalar. The teacher
    is given by its `frozen_head` and its `hidden_states` for the same tokens."""

    def read(logits_NV, teacher_NH):
        with torch.no_grad():
            teacher_NV = head(teacher_NH).float().log_softmax(-1)
        return (F.kl_div(logits_NV.log_softmax(-1), teacher_NV, reduction="none", log_target=True).sum(-1),)

    wanted = mask_B_T[:, 1:].bool()
    (kl,) = _read_logits(model, ids_B_T, attention_mask_B_T, wanted, read, teacher_NH)
    return kl.sum()


def _read_logits(model, ids_B_T, attention_mask_B_T, wanted, read, *rows):
    """What `read(logits (n, V), *rows (n, ...))` makes of the logits that predict the tokens `wanted` (B, T - 1), of
    those from the second on: a tuple of tensors (N, ...), computed CHUNK logits at a time. With None for `read`, the
    hidden states (N, H) before the projection."""
    project = getattr(model, "project", None) or types.MethodType(_project, model)  # FSDP wraps the first
    model.train(
        torch.is_grad_enabled() and getattr(model, "recompute_layers", False)
    )  # transformers does it in this mode
    with autocast(model):
        columns = project(ids_B_T, attention_mask_B_T, wanted, read, *rows)
    model.eval()
    return columns


def _project(model, ids_B_T, attention_mask_B_T, wanted, read, *rows):
    hidden = model.get_decoder()(input_ids=ids_B_T, attention_mask=attention_mask_B_T, use_cache=False)
    head = model.get_output_embeddings()

    def project(hidden_N, *rows):
        return read(head(hidden_N).float(), *rows)

    hidden_N = hidden.last_hidden_state[:, :-1][wanted]
    if read is None:
        return (hidden_N,)
    size = max(1, CHUNK // model.config.vocab_size)
    chunks = list(zip(*(tensor.split(size) for tensor in (hidden_N, *rows)), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        parts = [project(*chunk) for chunk in chunks]
    else:
        parts = [checkpoint(project, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
    return tuple(torch.cat(column) for column in zip(*parts, strict=True))


def kl_estimate(d, estimator="k3") -> Tensor:
    """KL of the policy from the reference at sampled tokens, d = ref_logprobs - logprobs (Schulman 2020, "Approximating
    KL divergence"): k1 = -d, k2 = d^2/2, k3 = exp(d) - d - 1. d is kept within 20, where exp still is a number."""
    d = d.clamp(-20, 20)
    return {"k1": -d, "k2": d.square() / 2, "k3": d.exp() - d - 1}[estimator]


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
    dual_clip=None,
):
    """(loss, stats) of the clipped objective; all tensors (B, T), advantages (B,) or (B, T).

    With r = exp(logprobs - old_logprobs) and l = -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A):
      grpo     mean over sequences of the mean of l over action tokens (Shao et al. 2024, eq. 3)
      bnpo     sum of l / action tokens of this batch
      dr_grpo  sum of l / (B * max_tokens)                              (Liu et al. 2025)
      dapo     sum of l / normalizer                                    (Yu et al. 2025, eq. 8)
      gspo     r is the exponential of the sequence's mean log-ratio, then as grpo (Zheng et al. 2025, arXiv:2507.18071)
      cispo    -stop_grad(min(r, epsilon_high)) A logprobs / normalizer (MiniMax-M1, arXiv:2506.13585); epsilon_high ~ 5
    `dual_clip`: where A < 0, l is dual_clip |A| at most: a ratio far above 1, which only conversations of an older
    policy have, would outweigh all the others (Ye et al. 2020, arXiv:1912.09729, eq. 5; not in cispo, which has a cap).
    `normalizer`: action tokens over all ranks and micro-batches of the step (dapo, cispo; default: of this batch).
    The KL penalty to `ref_logprobs` is added per token, times `kl_coef` (see `kl_estimate`).
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
        objective = torch.minimum(ratio * advantages, bounded * advantages)
        clipped = (ratio * advantages) > (bounded * advantages)
        if dual_clip is not None:
            floor = torch.where(advantages < 0, dual_clip * advantages, -torch.inf)
            clipped = clipped | (objective < floor)
            objective = torch.maximum(objective, floor)
        loss = -objective
    stats = {}
    if ref_logprobs is not None:
        kl = kl_estimate(ref_logprobs.where(mask, zero) - logprobs, kl_estimator)
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


def micro_batches(lengths, max_tokens) -> list[list[int]]:
    """Indices of the sequences of each micro-batch, the shortest first: as many as make `max_tokens` with their
    padding; a sequence that is longer than that has a micro-batch of its own.

    >>> micro_batches([3, 9, 4, 2], max_tokens=9)
    [[3, 0], [2], [1]]
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[i] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


# -------------------------------------------------------------------------- the benchmark (python grpo.py)

SHAPES = {  # of Qwen2.5: width, width of the MLP, layers, heads, key-value heads, vocabulary
    "tiny": (128, 384, 4, 4, 2, 2048),
    "0.5b": (896, 4864, 24, 14, 2, 151936),
    "1.5b": (1536, 8960, 28, 12, 2, 151936),
    "7b": (3584, 18944, 28, 28, 4, 152064),
}


@dataclass
class Benchmark:
    """Times rollouts and updates of this file against the plain ways, on random weights in the shape of a model."""

    shape: str = "tiny"
    """tiny, 0.5b, 1.5b or 7b (Qwen2.5)"""
    layers: int | None = None
    """a slice of so many layers; default: all"""
    dtype: str | None = None
    """float32 or bfloat16; default: bfloat16 on a GPU, float32 elsewhere"""
    attn_implementation: str | None = None
    """eager or sdpa; default: what transformers chooses"""
    tasks: int = 4
    """different tasks; all conversations share the prompt but for its last tokens"""
    samples: int = 4
    """conversations per task"""
    turns: int = 4
    """agent turns per conversation"""
    prompt_tokens: int = 1024
    """tokens of the shared system prompt"""
    new_tokens: int = 32
    """sampled tokens per turn"""
    tool_tokens: int = 64
    """tokens of the answer to a turn"""
    update_tokens: int = 2048
    """tokens of the one sequence that the update is timed on"""
    action_share: float = 0.25
    """share of its tokens that were sampled"""
    repeats: int = 3
    """of each measurement, one after the other in turn"""
    peak_tflops: float = 989.0
    """of the GPU in bfloat16, for the model FLOP utilisation (H100, H200: 989)"""
    seed: int = 0
    """of weights, texts and samples"""


class TimedEpisode:
    """A conversation of fixed length: a long shared prompt, a short task, and an answer to every turn but the last."""

    domain, system, tools = "benchmark", "", []

    def __init__(self, number, args, tokenizer):
        self.task = types.SimpleNamespace(id=number)
        self.words = np.random.default_rng([args.seed, number])
        self.args, self.tokenizer = args, tokenizer
        self.prompt = self.text(args.prompt_tokens, np.random.default_rng(args.seed))
        self.messages, self.done, self.termination = [], False, ""

    def text(self, tokens, rng):
        ids = self.tokenizer(" ".join(map(str, rng.integers(0, 1000, tokens)))).input_ids
        return self.tokenizer.decode(ids[:tokens])

    def opening(self):
        return [{"role": "user", "content": f"{self.prompt} {self.text(16, self.words)}"}]

    def act(self, message):
        self.messages.append(message)
        if len(self.messages) == self.args.turns:
            self.stop("user_stop")
            return []
        return [{"role": "tool", "content": self.text(self.args.tool_tokens, self.words)}]

    def stop(self, reason):
        self.done, self.termination = True, reason


def _play_generate(model, tokenizer, active, temperature, generator):
    """The plain way: `model.generate` once per turn on all conversations, which reads them from the start each time."""
    while active:
        prompts = [{"input_ids": c.trajectory.token_ids} for c in active]
        batch = tokenizer.pad(prompts, padding_side="left", return_tensors="pt").to(model.device)
        width = batch.input_ids.shape[1]
        said = model.generate(
            **batch,
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=active[0].max_new_tokens,
            eos_token_id=sorted(active[0].chat.stop_ids),
            pad_token_id=tokenizer.pad_token_id,
        )
        for c, ids in zip(active, said[:, width:].tolist(), strict=True):
            stop = next((i + 1 for i, token in enumerate(ids) if token in c.chat.stop_ids), len(ids))
            c.say(ids[:stop], [0.0] * stop)
        active = [c for c in active if not c.finished]


@contextmanager
def peak_memory(device):
    """Yields a list that holds, afterwards, the bytes that were used at most beyond those used before."""
    found = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device) - before)
        return
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(name):
        return int(re.search(rf"{name}:\s+(\d+)", status.read_text()).group(1))

    if reset.exists():
        reset.write_text("5")  # sets the peak of resident memory back to what is resident now
        before = kilobytes("VmRSS")
        yield found
        found.append(1024 * (kilobytes("VmHWM") - before))
    else:
        yield found
        found.append(0)


def _timed(ways, repeats, device):
    """{name: (seconds of the fastest run, peak bytes, result)}; the ways take turns, so that noise meets all alike."""
    measured = {}
    for _ in range(repeats):
        for name, way in ways.items():
            with peak_memory(device) as peak:
                start = time.perf_counter()
                result = way()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            if name not in measured or seconds < measured[name][0]:
                measured[name] = (seconds, peak[0], result)
    return measured


def benchmark_rollouts(args, model, tokenizer):
    """Prints a table of the ways to play the same conversations."""
    computed = [0]
    model.get_decoder().register_forward_pre_hook(
        lambda module, inputs, kwargs: computed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    chat = ChatFormat.of(tokenizer)
    length = args.prompt_tokens + args.turns * (args.new_tokens + 2 * args.tool_tokens) + 256

    def play(how):
        computed.clear()
        episodes = [TimedEpisode(n, args, tokenizer) for n in range(args.tasks) for _ in range(args.samples)]
        generator = torch.Generator(model.device).manual_seed(args.seed)
        if how != "generate":
            limits = {"max_new_tokens": args.new_tokens, "max_context": length}
            played = rollout(model, tokenizer, episodes, **limits, generator=generator, engine=how)
        else:
            cut = {"tool": None, "user": None}
            started = [_Conversation(e, chat, args.new_tokens, length, cut, None) for e in episodes]
            with torch.no_grad(), autocast(model):
                _play_generate(model, tokenizer, started, 1.0, generator)
            played = [c.trajectory for c in started]
        beginnings = set()
        for t in played:
            beginning = 0
            for token in t.token_ids:
                beginning = hash((beginning, token))
                beginnings.add(beginning)
        return sum(sum(t.action_mask) for t in played), sum(computed) / len(beginnings)

    ways = {how: (lambda how=how: play(how)) for how in ("generate", "padded", "paged")}
    measured = _timed(ways, args.repeats, model.device)
    print("\n| rollouts | seconds | sampled tokens/s | times `generate` | computed / distinct tokens | peak GB |")
    print("|---|---|---|---|---|---|")
    plain = measured["generate"][2][0] / measured["generate"][0]
    for name, (seconds, peak, (tokens, share)) in measured.items():
        speed = tokens / seconds
        print(f"| {name} | {seconds:.2f} | {speed:.0f} | {speed / plain:.2f} | {share:.2f} | {peak / 1e9:.2f} |")


def benchmark_update(args, model):
    """Prints a table of the ways to compute a loss and its gradient on one long sequence."""
    rng = torch.Generator().manual_seed(args.seed)
    ids = torch.randint(3, model.config.vocab_size, (1, args.update_tokens), generator=rng).to(model.device)
    mask = (torch.rand(ids.shape, generator=rng) < args.action_share).to(model.device)
    attention = torch.ones_like(ids)

    def plain():
        with autocast(model):
            logits = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
        logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return torch.cat([logprobs.new_zeros(1, 1), logprobs], 1)

    def gradient(logprobs):
        loss, _ = policy_loss(logprobs, logprobs.detach(), torch.ones(1, device=model.device), mask)
        loss.backward()
        squares = torch.stack([p.grad.float().square().sum() for p in model.parameters()])
        model.zero_grad()
        return squares.sum().sqrt().item()

    measured = _timed(
        {
            "all logits": lambda: gradient(plain()),
            "token_logprobs": lambda: gradient(token_logprobs(model, ids, attention, mask_B_T=mask)),
        },
        args.repeats,
        model.device,
    )
    layers = sum(p.numel() for p in model.get_decoder().layers.parameters())
    config = model.config
    flops = 6 * args.update_tokens * (layers + config.hidden_size * config.vocab_size * args.action_share)
    flops += 6 * config.num_hidden_layers * args.update_tokens**2 * config.hidden_size  # causal attention
    print("\n| update | seconds | tokens/s | times all logits | peak GB beyond the weights | gradient norm |")
    print("|---|---|---|---|---|---|")
    base = measured["all logits"][0]
    for name, (seconds, peak, norm) in measured.items():
        speed = f"{args.update_tokens / seconds:.0f} | {base / seconds:.2f}"
        print(f"| {name} | {seconds:.2f} | {speed} | {peak / 1e9:.2f} | {norm:.5f} |")
    if model.device.type == "cuda":
        share = flops / measured["token_logprobs"][0] / (args.peak_tflops * 1e12)
        print(f"\nmodel FLOP utilisation of the update: {share:.1%} of {args.peak_tflops:.0f} TFLOP/s")


def check_benchmark(args):
    """Raises ValueError for settings that cannot be timed."""
    counts = "tasks samples turns prompt_tokens new_tokens tool_tokens repeats peak_tflops"
    bounds = dict.fromkeys(counts.split(), ("greater than 0", lambda x: x > 0))
    bounds["update_tokens"] = ("at least 2", lambda x: x >= 2)
    bounds["layers"] = ("greater than 0", lambda x: x is None or x > 0)
    bounds["action_share"] = ("in (0, 1]", lambda x: 0 < x <= 1)
    bounds["seed"] = ("0 or more", lambda x: 0 <= x < 2**63)
    bounds["shape"] = (f"one of {', '.join(SHAPES)}", lambda x: x in SHAPES)
    bounds["dtype"] = (f"one of {', '.join(DTYPES)}", lambda x: x is None or x in DTYPES)
    bounds["attn_implementation"] = ("eager or sdpa", lambda x: x in (None, "eager", "sdpa"))
    for name, (wanted, holds) in bounds.items():
        if not holds(getattr(args, name)):
            raise ValueError(f"{name} must be {wanted}, got {getattr(args, name)}")


def main():
    import tyro

    args = tyro.cli(Benchmark)
    try:
        check_benchmark(args)
    except ValueError as error:
        print(f"grpo.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    torch.manual_seed(args.seed)
    _, tokenizer = load_policy("tiny", "float32", "cpu")
    width, mlp, layers, heads, kv_heads, vocabulary = SHAPES[args.shape]
    config = Qwen2Config(
        vocab_size=max(vocabulary, len(tokenizer)),
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=args.layers or layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2**17,
        tie_word_embeddings=args.shape != "7b",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with device:
        model = AutoModelForCausalLM.from_config(config, attn_implementation=args.attn_implementation).eval()
    model.compute_dtype = DTYPES[dtype]
    size = sum(p.numel() for p in model.parameters())
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    print(
        f"{args.shape} with {config.num_hidden_layers} layers: {size / 1e6:.0f}M parameters, {dtype}, {name}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}; the best of {args.repeats} runs each"
    )
    benchmark_rollouts(args, model, tokenizer)
    benchmark_update(args, model)


if __name__ == "__main__":
    main()
