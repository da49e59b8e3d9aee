"""The policy: loading, LoRA, shards (FSDP2), snapshots of its weights, and token log-probabilities.

Weights are float32 masters; `model_dtype` is what they are computed in, by autocast. The vocabulary is projected on
at the wanted tokens only, in chunks that the backward pass computes again. No other file knows DTensor.
"""

import copy
import json
import logging
import os
import re
import types
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import distributed  # sets what transformers reads when it is imported

# isort: split
import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, Qwen2Config, Qwen2Tokenizer
from transformers.cache_utils import DynamicLayer

from chat import ChatFormat
from flags import CountOrZero

transformers.utils.logging.disable_progress_bar()
for library in ("transformers", "huggingface_hub"):
    logging.getLogger(library).setLevel(logging.ERROR)

SMALL = 10_000_000  # parameters: a smaller model gains nothing from a second thread
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True)
class Flags:
    """The policy."""

    model_name_or_path: str = "tiny"
    """directory or hub name of a causal LM whose chat template takes tools, or the embedded "tiny" """
    model_dtype: Literal[*DTYPES] = "bfloat16"
    """type to compute in (autocast)"""
    weights_dtype: Literal[*DTYPES] = "float32"
    """type of trained weights, their gradients and moments. bfloat16 halves their memory and loses updates of less than
    0.4% of a weight, which at a rate of 1e-6 are nearly all. LoRA's adapters are always float32"""
    lora_rank: CountOrZero = 0
    """train LoRA adapters of this rank instead of every weight"""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2, ... Default: what transformers chooses"""
    gradient_checkpointing: bool = False
    """compute layers again in the backward pass: less memory, a third more time"""
    shard: bool = False
    """split weights, gradients and optimiser over the ranks (FSDP2). During rollouts each rank still needs room for a
    copy of the weights in model_dtype"""


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
    """A Qwen2 of about 600,000 parameters with a byte-level BPE tokenizer trained on `corpus`, in seconds."""
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
        num_hidden_layers=2,
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


def load_policy(
    name_or_path,
    dtype="bfloat16",
    device=None,
    lora_rank=0,
    seed=0,
    corpus=None,
    attn_implementation=None,
    gradient_checkpointing=False,
    weights_dtype="float32",
):
    """(model, tokenizer) of a Hugging Face causal LM, or of the embedded "tiny" policy.

    `dtype`: the type to compute in, by autocast. `weights_dtype`: that of trained weights; Adam at 1e-6 hardly moves
    bfloat16 weights. `corpus`: the texts that tiny's tokenizer is trained on. `device`: default the GPU, if there is
    one. `lora_rank` > 0: only float32 LoRA adapters (Hu et al. 2021, arXiv:2106.09685) on every linear layer but the
    head are trained; frozen weights are kept in `dtype`. A directory with an adapter is loaded with it.
    `attn_implementation`: as in transformers (eager, sdpa, ...). `gradient_checkpointing`: layers are computed again in
    the backward pass.
    Raises ValueError for an unknown dtype, bfloat16 weights to compute in float32 with, a missing directory, a model
    without full attention in every layer, a tokenizer without a chat template, or one whose turns or tool calls cannot
    be handled.
    """
    for unknown in {dtype, weights_dtype} - set(DTYPES):
        raise ValueError(f"unknown dtype {unknown!r}; choose one of {', '.join(DTYPES)}")
    if lora_rank < 0:
        raise ValueError(f"lora_rank must be 0 (train every weight) or more, got {lora_rank}")
    _check_directory(name_or_path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if weights_dtype != "float32" and dtype != weights_dtype:
        raise ValueError(f"weights_dtype {weights_dtype} needs model_dtype {weights_dtype}, got {dtype}")
    kept = DTYPES[dtype if lora_rank else weights_dtype]
    try:
        if name_or_path == "tiny":
            model, tokenizer = _tiny(corpus, seed, attn_implementation)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=False)
            for name in ("is_local", "local_files_only"):  # saved with it, they would say where it was loaded from
                tokenizer.init_kwargs.pop(name, None)
            model = AutoModelForCausalLM.from_pretrained(
                name_or_path,
                dtype=kept,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation=attn_implementation,
            )
    except Exception as error:  # of a damaged tokenizer, nothing more precise is raised
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"cannot load a model from {name_or_path!r}: {reason}") from error
    _check_model(model, name_or_path)
    model.to(device=device, dtype=kept)
    for p in model.parameters():  # tensors read from a file lie at other addresses, and kernels then round differently
        p.data = p.data.clone()
    if lora_rank:
        _add_lora(model, lora_rank, seed)
        adapter = Path(name_or_path) / "adapter_model.safetensors"
        if adapter.exists():  # as float32: the model above was read as `dtype`
            for name, tensor in load_file(adapter, device=str(device)).items():
                path = re.sub(r"(lora_[AB])", r"\1.default", name.removeprefix("base_model.model."))
                model.get_parameter(path).data.copy_(tensor)
    if gradient_checkpointing:
        # transformers renamed the method in 5.2x, and the old name warns.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    for module in model.modules():  # dropout would make the first ratio differ from 1
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    model.eval()
    if device.type == "cpu" and model.num_parameters() < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # on a busy machine, threads that wait for each other are dozens of times slower
    model.compute_dtype = DTYPES[dtype]
    model.recompute_layers = gradient_checkpointing
    ChatFormat.of(tokenizer)
    return model, tokenizer


def _check_directory(name_or_path):
    """Raises ValueError for a path that is not there, or an adapter whose base model is not."""
    path = Path(name_or_path)
    if (path.is_absolute() or name_or_path.startswith(".")) and not path.is_dir():
        raise ValueError(f"cannot load a model from {name_or_path!r}: there is no such directory")
    config = path / "adapter_config.json"
    if config.is_file():
        base = json.loads(config.read_bytes()).get("base_model_name_or_path") or ""
        if Path(base).is_absolute() and not Path(base).is_dir():
            raise ValueError(f"cannot load the adapter {name_or_path}: its base model {base} is not there")


def _check_model(model, name):
    """Raises ValueError for a model that rollouts or `token_logprobs` would get wrong."""
    for scaling in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(model.config, scaling, None) not in (None, 1.0):
            raise ValueError(f"{name}: models with {scaling} are not supported by token_logprobs")
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=model.config).layers):
        raise ValueError(f"{name}: rollouts need full attention in every layer; this model has other layers")


def _add_lora(model, rank, seed):
    """Adds adapters to the linear layers in place (a loaded adapter is trained on): the model keeps its class and the
    names of its weights."""
    from peft import LoraConfig

    if rank > model.config.hidden_size:
        raise ValueError(f"lora_rank must be at most the model's width of {model.config.hidden_size}, got {rank}")
    if not getattr(model, "_hf_peft_config_loaded", False):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    [config] = model.peft_config.values()
    if config.r != rank:
        raise ValueError(f"the saved adapter has rank {config.r}, not {rank}")
    config.inference_mode = False  # transformers loads an adapter for inference, and would save it so
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
        if p.requires_grad:
            p.data = p.data.float()


def autocast(model):
    """Computes in the policy's dtype. One context spans a whole rollout, so that weights are cast once."""
    dtype = getattr(model, "compute_dtype", torch.float32)
    return torch.autocast(model.device.type, dtype) if dtype != torch.float32 else nullcontext()


# ------------------------------------------------------------------------------------ the weights: shards, snapshots


def shard(model):
    """Splits weights, gradients and optimiser states over all ranks (FSDP2, Rajbhandari et al. 2020,
    arXiv:1910.02054), in place. The backward pass then sums gradients over the ranks by itself, and every rank must
    make the same number of forward and backward passes. A model on the CPU moves to the GPU layer by layer. Raises
    ValueError outside a process group."""
    if not dist.is_initialized():
        raise ValueError("shard needs several ranks: start with torchrun --nproc_per_node=N train.py ...")
    if len({p.dtype for p in model.parameters()}) > 1:  # LoRA: FSDP gathers weights of one type only
        model.float()
    # The modules without their weights: `plain_copy` fills them later.
    hollow = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in model.parameters()}
    model.__dict__["skeleton"] = copy.deepcopy(model, hollow)
    low = model.compute_dtype if model.compute_dtype != torch.float32 else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # losses are divided by counts over all ranks: sum, not mean
            module.set_gradient_divide_factor(1.0)
    model.project = types.MethodType(_project, model)
    register_fsdp_forward_method(model, "project")


def is_sharded(model) -> bool:
    return isinstance(model, FSDPModule)


def trained_parameters(model) -> dict[str, nn.Parameter]:
    """By name. Under FSDP: this rank's shards (DTensor)."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(tensor) -> Tensor:
    """A sharded tensor, gathered: every rank must call. Any other tensor as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def placed_like(tensor, p) -> Tensor:
    """The inverse of `whole`: a whole tensor on p's device, sharded if p is. In memory of its own."""
    tensor = tensor.to(p.device, copy=True)
    return distribute_tensor(tensor, p.device_mesh, p.placements) if isinstance(p, DTensor) else tensor


def gathered(tensor) -> Tensor | None:
    """The whole tensor in the CPU's memory of rank 0, None on the others. If it is sharded, every rank must call."""
    tensor = whole(tensor.detach())
    return tensor.to("cpu", copy=True).contiguous() if distributed.rank() == 0 else None


def rank_share(loss) -> Tensor:
    """One rank's share of a loss that is a mean over ranks, for gradients that are summed over ranks. The loss of
    sharded weights themselves is one loss for all ranks."""
    return loss if isinstance(loss, DTensor) else loss / distributed.world_size()


def snapshot(model) -> dict[str, Tensor]:
    """A copy of the trained parameters in the CPU's memory. Under FSDP: of this rank's shards."""
    return {name: _local(p).to("cpu", copy=True) for name, p in trained_parameters(model).items()}


def snapshot_bytes(model) -> int:
    """Bytes of a snapshot, of all ranks together."""
    return sum(p.nbytes for p in trained_parameters(model).values())


@torch.no_grad()
def restore(model, saved):
    """Gives the model the trained parameters of a snapshot."""
    for name, p in trained_parameters(model).items():
        _local(p).copy_(saved[name])


def _local(p):
    p = p.detach()
    return p.to_local() if isinstance(p, DTensor) else p


@contextmanager
@torch.no_grad()
def weights_of(model, saved):
    """Inside, the model is the policy of a `snapshot`; None: the model without its LoRA adapters.

    Contents are exchanged in place and back, so no second model is needed.
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
    for name, p in trained_parameters(model).items():
        mine = _local(p)
        kept = mine.to("cpu", copy=True)
        mine.copy_(saved[name])
        saved[name].copy_(kept)


@torch.no_grad()
def gathered_snapshot(model, saved) -> dict[str, Tensor]:
    """A snapshot as whole tensors on rank 0, for a file. Every rank must call."""
    with weights_of(model, saved):
        return {name: gathered(p) for name, p in trained_parameters(model).items()}


def snapshot_from(model, read) -> dict[str, Tensor]:
    """The inverse of `gathered_snapshot`, on any number of ranks; `read(name)` gives a whole tensor."""
    parameters = trained_parameters(model).items()
    return {name: _local(placed_like(read(name), p)).to("cpu", copy=True) for name, p in parameters}


def gathered_snapshots(model, saved) -> dict[str, Tensor]:
    """{name: snapshot}, for a file, as `gathered_snapshot` of each."""
    whole = [gathered_snapshot(model, one) for one in saved.values()]
    return {f"{k}/{name}": tensor for k, one in enumerate(whole) for name, tensor in one.items()}


def snapshots_from(model, names, read) -> dict[str, dict]:
    """The inverse of `gathered_snapshots`."""
    return {name: snapshot_from(model, lambda key, k=k: read(f"{k}/{key}")) for k, name in enumerate(names)}


def gathered_weights(model) -> dict | None:
    """All weights by name, whole on rank 0; None if they are not sharded."""
    if not is_sharded(model):
        return None
    trained_parameters(model)  # reshards
    return {name: gathered(p) for name, p in model.named_parameters()}


def save_policy(model, tokenizer, folder, weights=None):
    """Writes a directory that transformers loads (with LoRA, the adapter only); weights: `gathered_weights(model)`."""
    model.__dict__.get("skeleton", model).save_pretrained(folder, state_dict=weights)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def plain_copy(model, dtype):
    """An ordinary model with these weights in `dtype`, gathered if they are sharded: to sample from."""
    trained_parameters(model)  # reshards
    skeleton = model.__dict__.get("skeleton", model)
    return _filled(skeleton, model.parameters(), dtype).to(model.device)


def _filled(skeleton, parameters, dtype):
    """A copy of the modules with frozen copies of the parameters, whole."""
    copies = {}
    for bone, p in zip(skeleton.parameters(), parameters, strict=True):
        copies[id(bone)] = nn.Parameter(whole(p.detach()).to(dtype, copy=True), requires_grad=False)
    return copy.deepcopy(skeleton, copies)


# ----------------------------------------------------------------------------------------------- log-probabilities

CHUNK = 2**26  # logits at once: 0.25 GB in float32, 441 tokens of a vocabulary of 152k


def token_logprobs(model, ids_B_T, attention_mask_B_T, temperature=1.0, mask_B_T=None, return_entropy=False):
    """Log-probabilities (B, T) of the given tokens. Entry t scores token t given those before it; entry 0 is 0.0.

    They are of the distribution scaled by `temperature`, as in the rollout. With `mask_B_T` only the tokens where it
    is True are scored; the others are 0.0. Sequences are padded on the right. `return_entropy`: also the entropy (B, T)
    in nats of each of these distributions, without gradient.
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
    for column in read_logits(model, ids_B_T, wanted, read, targets[wanted]):
        full = torch.zeros(ids_B_T.shape, device=ids_B_T.device)
        full[:, 1:] = full[:, 1:].masked_scatter(wanted, column)
        results.append(full)
    return tuple(results) if return_entropy else results[0]


@torch.no_grad()
def frozen_head(model) -> nn.Module:
    """The projection on the vocabulary, to keep beside hidden states (`distill.hidden_states`): itself if it is not
    trained and not sharded, else a copy, whole on every rank."""
    trained_parameters(model)  # reshards
    head = model.get_output_embeddings()
    if not any(p.requires_grad for p in head.parameters()) and not is_sharded(model):
        return head
    skeleton = model.__dict__.get("skeleton", model).get_output_embeddings()
    return _filled(skeleton, head.parameters(), model.compute_dtype)


def read_logits(model, ids_B_T, wanted, read, *rows):
    """read(logits (n, V), *rows (n, ...)) -> tuple of tensors (n, ...), CHUNK logits at a time, for the logits that
    predict the tokens `wanted` (B, T - 1), which begin with the second. Returns the tuple for all N. `read` None: the
    hidden states (N, H) before the projection."""
    project = getattr(model, "project", None) or types.MethodType(_project, model)  # FSDP wraps the first
    model.train(torch.is_grad_enabled() and getattr(model, "recompute_layers", False))  # as transformers requires
    with autocast(model):
        columns = project(ids_B_T, wanted, read, *rows)
    model.eval()
    return columns


def _project(model, ids_B_T, wanted, read, *rows):
    # Without a mask: padding is on the right, where causal attention of a token never looks.
    hidden = model.get_decoder()(input_ids=ids_B_T, use_cache=False)
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
