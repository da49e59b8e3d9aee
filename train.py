"""Continual GRPO on tau2-bench: one policy, one domain after another, with and without what protects its memory.

    python train.py --cl_algorithm replay                                  the embedded policy, minutes on a CPU
    torchrun --nproc_per_node=4 train.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --cl_algorithm replay
    python train.py --resume runs/NAME                                     continues a run that was stopped

For each domain: a warm start on gold demonstrations, GRPO steps, an evaluation on all domains, a checkpoint. One
step: sample tasks -> the algorithm adds replayed ones -> rollouts -> tau2's rewards -> advantages -> loss, and the
algorithm's own ones added to it -> one all-reduce of the raw gradients -> clip -> AdamW -> hooks -> log. With --shard,
FSDP2 takes the all-reduce's place.

Every random draw is a function of the seed and the position in the run, so that a resumed run repeats none and skips
none. A step's loss is normalised by counts over all ranks: how trajectories are split does not change the gradient.
"""

import atexit
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
import traceback
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

# Set before torch is imported: gloo reports its connections otherwise.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch
import torch.distributed as dist
import transformers
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from tqdm import tqdm

import eval as evaluation
import generative
import grpo
import oracle
import regularize
import replay
from eval import StopRun


@dataclass
class Args:
    """Trains one policy with GRPO on tau2 domains in sequence. The defaults are for a real model; with the embedded
    policy ("tiny") other defaults apply, which are printed at the start."""

    model_name_or_path: str = "tiny"
    """directory or hub name of a causal LM with a chat template that takes tools, or the embedded "tiny" """
    model_dtype: str = "bfloat16"
    """what is computed in (autocast); the weights themselves are float32 masters"""
    lora_rank: int = 0
    """train LoRA adapters of this rank (package peft) instead of every weight"""
    attn_implementation: str | None = None
    """eager, sdpa, flash_attention_2, ...; default: what transformers chooses"""
    gradient_checkpointing: bool = False
    """compute layers again in the backward pass: less memory, a third more time"""
    shard: bool = False
    """split weights, gradients and optimiser over the ranks (FSDP2); each still needs room for a copy of the weights in
    model_dtype during rollouts"""
    task_order: list[str] = field(default_factory=lambda: list(oracle.DOMAINS))
    """the domains, in the order of training"""
    max_tasks_per_domain: int | None = None
    """train on so many tasks of each domain"""
    task_selection: str = "all"
    """which ones: "all" (the first in tau2's order) or "short" (the shortest that need two actions or more)"""
    train_split: float = 0.8
    """share of tasks to train on, for domains without splits of their own"""
    user: str = "scripted"
    """scripted (telecom in tau2's solo mode), scripted-tools (telecom with the user's own tools), solo, or for tau2's
    simulated user a litellm name such as openai/NAME, or policy:PATH for a local model"""
    user_api_base: str | None = None
    """that user's model is served here, by an OpenAI-compatible API"""
    retrieval: str = oracle.RETRIEVAL
    """banking_knowledge (tau2 1.0): how the agent reads its documents; bm25, bm25_grep, grep_only, golden_retrieval,
    full_kb, no_knowledge, or another of tau2's that needs a server"""
    max_turns: int = 30
    """agent turns per conversation"""
    seed: int = 0
    """of everything"""

    temperature: float = 0.7
    """of the sampling, in rollouts and in the loss"""
    max_new_tokens: int = 2048
    """sampled tokens per agent turn"""
    max_context: int | None = None
    """tokens per conversation; default: what the model allows"""
    max_user_tokens: int | None = None
    """longer user messages are cut"""
    max_tool_tokens: int | None = None
    """longer tool results are cut"""
    rollout_engine: str = "auto"
    """paged (continuous batching), padded, or auto: paged on a GPU, padded elsewhere"""

    batch_size_per_gpu: int = 4
    """tasks per rank and accumulation step: a step has this x gradient_accumulation_steps x ranks tasks"""
    gradient_accumulation_steps: int = 2
    """see batch_size_per_gpu"""
    micro_batch_tokens: int = 16384
    """tokens, padding included, of one forward and backward pass; what sets the memory, and nothing else"""
    num_iterations: int = 1
    """optimiser steps on the same rollouts"""
    num_samples_per_prompt: int = 4
    """conversations per task: the group of GRPO"""
    num_steps_per_task: int = 100
    """optimiser steps per domain"""
    learning_rate: float = 1e-6
    """of GRPO (AdamW, no weight decay)"""
    lr_schedule: str = "constant"
    """constant, linear or cosine (both to 0), over each domain's GRPO steps"""
    lr_decay: float = 1.0
    """both rates are multiplied by this to the power of the conversations seen so far, in (0, 1]"""
    lr_warmup_steps: int = 0
    """GRPO steps of each domain over which the rate rises to learning_rate"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    loss_type: str = "dapo"
    """grpo, bnpo, dr_grpo, dapo, gspo or cispo"""
    advantage_scale: str = "group"
    """group, batch or none: what advantages are divided by"""
    epsilon_low: float = 0.2
    """lower clip of the ratio"""
    epsilon_high: float | None = None
    """upper clip of the ratio; default: 0.28, and 5 for cispo, where it is an absolute cap"""
    kl_coef: float = 0.1
    """weight of the KL penalty against the reference policy"""
    kl_reference: str | None = None
    """domain: the policy at the start of the domain's GRPO; initial: the very first one, which with LoRA is the model
    without its adapters. Default: domain, and initial with LoRA"""
    log_initial_kl: bool = True
    """log the KL to the very first policy, too: a copy of the weights in the CPU's memory and a forward pass"""
    kl_estimator: str = "k3"
    """k1, k2 or k3"""
    mask_truncated: bool = False
    """leave conversations cut short (a turn at max_new_tokens, or max_turns) out of the loss, not of the baseline"""
    gamma: float = 1.0
    """discount per agent turn"""
    max_invalid_share: float = 0.5
    """stop the run when more of a step's conversations end in environment errors"""

    warmup_steps: int = 0
    """at most so many supervised steps on gold demonstrations before each domain's GRPO"""
    warmup_target: float | None = None
    """end the warm start as soon as the sampled mean reward reaches this"""
    warmup_check_every: int = 5
    """steps between looks at the reward, once the loss per token is below 0.2 (with warmup_target)"""
    warmup_learning_rate: float = 1e-5
    """of the warm start"""

    cl_algorithm: str = "sequential"
    """sequential, joint, replay, adaptive_replay, generative_replay, ewc, online_ewc, lwf, or
    path/to/file.py:MyAlgorithm"""
    replay_kind: str = "tasks"
    """replay: tasks (old tasks are rolled out again) or trajectories (stored conversations, no new rollouts)"""
    replay_ratio: float = 0.2
    """share of replayed tasks, or conversations, in the mixed batch, in [0, 1)"""
    replay_buffer_size: int = 1000
    """tasks, or conversations, remembered per domain"""
    replay_strategy: str = "random"
    """random, high_reward, recent or balanced"""
    buffer_policy: str = "reservoir"
    """what a full buffer keeps: reservoir (all items alike) or recent; of trajectories also brs, lars, labrs, random"""
    min_buffer_size: int = 10
    """a domain with fewer remembered items is not replayed"""
    replay_all_domains: bool = True
    """False: replay the latest previous domain only"""
    clone_coef: float = 0.05
    """replay of trajectories: weight of the behaviour-cloning term"""
    forgetting_threshold: float = 0.1
    """adaptive_replay: a larger fall of a previous domain's score raises the ratio"""
    adaptation_rate: float = 0.1
    """adaptive_replay: by this much"""
    min_replay_ratio: float = 0.1
    """adaptive_replay: lowest ratio"""
    max_replay_ratio: float = 0.5
    """adaptive_replay: highest ratio"""

    replay_weight: float = 4.0
    """generative_replay: weight of the KL to the previous domain's policy, times 1 - 1/n in the n-th domain"""
    window: int = 256
    """generative_replay: tokens of a window; one that does not reach back to what a turn answers teaches little"""
    window_batch: int = 32
    """generative_replay: generated windows per optimiser step"""
    window_memory: int = 500
    """generative_replay: windows of the current domain that the generator learns from"""
    generator_updates: int = 6
    """generative_replay: updates of the generator after each GRPO step"""
    generator_vocabulary: int = 8192
    """generative_replay: distinct tokens that the generator has room for"""
    generator_latent_dim: int = 32
    """generative_replay: of the generator"""
    generator_components: int = 10
    """generative_replay: Gaussians of the prior that is fitted for each domain when one ends (0: N(0, 1))"""
    generator_learning_rate: float = 2e-3
    """generative_replay: of the generator (Adam)"""

    ewc_lambda: float | None = None
    """add EWC's penalty with this weight to any algorithm; default: none, and 1 with ewc and online_ewc"""
    ewc_decay: float | None = None
    """EWC with one running Fisher information, multiplied by this at each domain's end, in [0, 1]; default: one for
    each domain, and 0.95 with online_ewc"""
    fisher_samples: int = 64
    """EWC: conversations, a domain's last ones, that its Fisher information is taken from"""
    lwf_coef: float | None = None
    """add LwF's KL to the previous domain's policy with this weight to any algorithm; default: none, 0.01 with lwf"""

    eval_split: str = "test"
    """tau2's split to evaluate on; "train": the training tasks themselves"""
    eval_max_tasks: int | None = None
    """evaluate on so many tasks of each domain"""
    eval_trials: int = 1
    """conversations per task in an evaluation"""

    run_name: str | None = None
    """directory under runs_dir; default: algorithm, seed and time"""
    runs_dir: str = "runs"
    """where runs are written"""
    wandb_project: str | None = None
    """also log to this project of Weights & Biases (package wandb)"""
    tensorboard: bool = False
    """also log to TensorBoard, into the run's directory (package tensorboard)"""
    resume: str | None = None
    """continue this run directory from its last checkpoint, with its own settings"""
    checkpoint_every: int = 10
    """optimiser steps between checkpoints"""
    keep_checkpoints: int = 2
    """so many of the latest are kept"""


# What the embedded policy needs to show something in minutes. It memorises a few tasks; a real model needs none of it.
TINY = {
    "model_dtype": "float32",
    "max_tasks_per_domain": 4,
    "task_selection": "short",
    "max_turns": 5,
    "temperature": 0.5,
    "max_new_tokens": 96,
    "max_context": 320,
    "max_user_tokens": 64,
    "max_tool_tokens": 12,
    "batch_size_per_gpu": 2,
    "micro_batch_tokens": 4096,
    "num_samples_per_prompt": 16,
    "num_steps_per_task": 16,
    "learning_rate": 7e-4,
    "advantage_scale": "none",
    "kl_coef": 0.05,
    "warmup_steps": 150,
    "warmup_target": 0.25,
    "warmup_check_every": 1,
    "warmup_learning_rate": 2e-3,
    "replay_ratio": 0.4,
    "min_buffer_size": 1,
    "window": 320,
    "window_batch": 4,
    "eval_split": "train",
    "eval_trials": 16,
}


ALGORITHMS = {"generative_replay": generative.GenerativeReplayCL, **regularize.ALGORITHMS}  # beside replay.ALGORITHMS


class Interrupted(Exception):
    """A signal asked to stop; the run is saved."""


@dataclass
class Group:
    """What became of one task of the batch: the rewards of its samples on whichever rank, None where invalid."""

    task: replay.TaskRef
    replayed: bool
    rewards: list

    @property
    def varied(self):
        """False: no advantage. The group is left out before the forward pass, and so of the KL penalty, too."""
        return len({r for r in self.rewards if r is not None}) > 1


STAGES = ("baseline", "warmup", "grpo", "evaluate")  # the first once, the others for each domain


def initial_state() -> dict:
    """Where a run is; JSON, saved in its checkpoints."""
    return {
        "domain_index": 0,
        "stage": "baseline",
        "step": 0,  # within the stage
        "global_step": 0,  # GRPO steps so far
        "skipped_in_a_row": 0,  # updates without a finite gradient
        "examples": 0,  # conversations seen so far, demonstrations and replayed ones too
        "seconds": 0.0,
        "ranks": grpo.world_size(),
        "baseline": {},
        "warm_start": {},
        "R": [],
    }


@dataclass
class Trainer:
    """All there is in a run; hooks of an algorithm get it."""

    args: Args
    run: Path
    model: torch.nn.Module
    tokenizer: object
    algorithm: replay.CLAlgorithm
    tasks: dict[str, list]  # domain -> training tasks
    eval_tasks: dict[str, list]
    reference: list | None = None  # the policy at the start of the domain's GRPO (grpo.snapshot)
    initial: list | None = None  # the very first policy (grpo.snapshot); with LoRA it needs none
    optimizer: torch.optim.Optimizer | None = None
    groups: list[Group] = field(default_factory=list)  # of this step, all ranks
    batches: list[dict] = field(default_factory=list)  # of this step, this rank's: see `make_batches`
    finished: list = field(default_factory=list)  # of this step, all ranks: (conversation to store, its loss)
    replayed_losses: list[float] = field(default_factory=list)  # of this step's replayed conversations
    scores: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    demonstrations: dict = field(default_factory=dict)
    signals: "Signals | None" = None
    trackers: list = field(default_factory=list)  # see `open_trackers`
    started: float = field(default_factory=time.perf_counter)  # what `state["seconds"]` does not count yet
    state: dict = field(default_factory=initial_state)

    @property
    def domain(self):
        return self.args.task_order[self.state["domain_index"]]

    @property
    def domains(self):
        """Those that new tasks are drawn from."""
        return list(self.args.task_order) if self.algorithm.all_domains else [self.domain]

    @property
    def label(self):
        return self.stages[self.state["domain_index"]]

    @property
    def stages(self):
        """What the rows of R are called."""
        order = self.args.task_order
        return [f"{k + 1}/{len(order)} of all" for k in range(len(order))] if self.algorithm.all_domains else order

    @property
    def step(self):
        return self.state["global_step"]

    def task(self, ref: replay.TaskRef):
        return next(task for task in self.tasks[ref.domain] if task.id == ref.task_id)

    def generator(self, purpose):
        """Random numbers that depend on the seed, the rank and the position in the run only."""
        position = (self.state["domain_index"], purpose, self.state["step"], grpo.rank())
        return grpo.seeded_generator(self.model.device, self.args.seed, *position)


# --------------------------------------------------------------------------------------------- one step


def sample_batch(trainer: Trainer, count_per_rank) -> list[replay.TaskRef]:
    """The whole batch of all ranks: new tasks without replacement within an epoch, and what the algorithm adds."""
    refs = [replay.TaskRef(domain, task.id) for domain in trainer.domains for task in trainer.tasks[domain]]
    seed = [trainer.args.seed, trainer.state["domain_index"], trainer.state["stage"] == "grpo"]
    drawn = oracle.sample_tasks(refs, count_per_rank * grpo.world_size(), trainer.state["step"], seed)
    return trainer.algorithm.augment_batch(drawn, trainer.domain)


def sampling(args: Args) -> dict:
    """The flags that grpo.rollout takes."""
    names = ("temperature", "max_new_tokens", "max_context", "max_user_tokens", "max_tool_tokens")
    return {**{name: getattr(args, name) for name in names}, "engine": args.rollout_engine}


def collect(trainer: Trainer, batch):
    """What this rank trains on (pairs of trajectory and advantage), and groups, records and seconds of all ranks."""
    args, G = trainer.args, trainer.args.num_samples_per_prompt
    start = time.perf_counter()
    mine = batch[grpo.rank() :: grpo.world_size()]
    tasks = [trainer.task(ref) for ref in mine]
    episodes = [
        oracle.Episode(ref.domain, task, args.user, args.max_turns)
        for ref, task in zip(mine, tasks, strict=True)
        for _ in range(G)
    ]
    trajectories = grpo.rollout(
        trainer.model, trainer.tokenizer, episodes, generator=trainer.generator(1), **sampling(args)
    )
    rollout_seconds = time.perf_counter() - start
    records = []
    for i, (episode, trajectory) in enumerate(zip(episodes, trajectories, strict=True)):
        position = {"kind": "rollout", "global_step": trainer.step, "sample": i % G}
        replayed = trajectory.domain not in trainer.domains
        records.append({**position, "replayed": replayed, **evaluation.score_and_record(episode, trajectory)})
    records = gathered_in_order(records, len(batch), G)
    groups = [
        Group(ref, ref.domain not in trainer.domains, [r["reward"] for r in records[i * G : (i + 1) * G]])
        for i, ref in enumerate(batch)
    ]
    evaluation.stop_if_invalid(records, args.max_invalid_share)
    kept = with_advantages(trainer, trajectories, groups)
    if trainer.algorithm.stores_trajectories:
        trainer.finished = finished(trainer, trajectories, kept, len(batch))
    stats = {"rollout_seconds": rollout_seconds, "score_seconds": time.perf_counter() - start - rollout_seconds}
    return kept, groups, records, stats


def with_advantages(trainer: Trainer, trajectories, groups) -> list[tuple]:
    """This rank's trajectories, each with its advantage, without those that must give no gradient: of groups whose
    rewards do not vary, invalid ones, and truncated ones with mask_truncated. `groups` are those of all ranks."""
    args = trainer.args
    rewards_P_G = torch.tensor([[math.nan if r is None else r for r in g.rewards] for g in groups])
    advantages_P_G = grpo.group_advantages(rewards_P_G, args.advantage_scale)
    mine = slice(grpo.rank(), None, grpo.world_size())
    advantages = advantages_P_G[mine].flatten().tolist()
    varied = [g.varied for g in groups[mine] for _ in g.rewards]
    return [
        (t, advantage)
        for t, advantage, varies in zip(trajectories, advantages, varied, strict=True)
        if varies and t.valid and any(t.action_mask) and not (args.mask_truncated and t.truncated)
    ]


def gathered_in_order(values, batch_size, G) -> list:
    """Every rank's `values`, G for each of its tasks, in the order of the batch."""
    parts = grpo.all_gather_json(values)
    ranks = len(parts)
    return [value for i in range(batch_size) for value in parts[i % ranks][i // ranks * G :][:G]]


def finished(trainer: Trainer, trajectories, kept, batch_size) -> list[tuple]:
    """All ranks' valid conversations as replay.TrajectoryReplayCL stores them, each with its loss: that of tokens just
    sampled, whose ratio is 1, is minus their advantage."""
    args = trainer.args
    advantages = {id(t): advantage for t, advantage in kept}
    rows = []
    for t in trajectories:
        usable = t.valid and any(t.action_mask) and not (args.mask_truncated and t.truncated)
        item = {name: getattr(t, name) for name in STORED}
        item["advantage"] = advantages.get(id(t))
        batch = grpo.collate([t], [item["advantage"] or 0.0], args.gamma)
        rows.append([item, -batch["advantages"][batch["mask"]].mean().item()] if usable else None)
    rows = gathered_in_order(rows, batch_size, args.num_samples_per_prompt)
    return [tuple(row) for row in rows if row is not None]


STORED = ("domain", "task_id", "token_ids", "logprobs", "turns", "reward")


def as_trajectory(item) -> tuple[grpo.Trajectory, float]:
    """A stored conversation as the pair that `update` takes."""
    mask = [turn >= 0 for turn in item["turns"]]
    return grpo.Trajectory(**{name: item[name] for name in STORED}, action_mask=mask), item["advantage"]


def sum_over_ranks(trainer, *values) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=trainer.model.device)
    if grpo.world_size() > 1:
        dist.all_reduce(tensor)
    return tensor.tolist()


BUCKET = 2**26  # elements reduced at once: memory for one more copy of 0.25 GB, not of all gradients


def optimizer_step(trainer: Trainer, loss: float) -> float:
    """The raw gradients summed over ranks (missing ones as zeros), clip, step. Returns the norm before clipping.

    `loss` is the sum over all ranks. Where it or the norm is not finite, on all ranks alike, the step is left out.
    """
    parameters = list(grpo.trained_parameters(trainer.model).values())
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    if grpo.world_size() > 1 and not trainer.args.shard:  # FSDP has summed its gradients already
        for bucket in grpo.micro_batches([p.numel() for p in parameters], BUCKET):
            flat = torch.cat([parameters[i].grad.flatten() for i in bucket])
            dist.all_reduce(flat)
            for i, grad in zip(bucket, flat.split([parameters[i].numel() for i in bucket]), strict=True):
                parameters[i].grad.copy_(grad.view_as(parameters[i]))
    norm = grpo.whole(torch.nn.utils.clip_grad_norm_(parameters, trainer.args.max_grad_norm)).item()
    if math.isfinite(norm) and math.isfinite(loss):
        trainer.optimizer.step()
        trainer.state["skipped_in_a_row"] = 0
    else:
        trainer.state["skipped_in_a_row"] += 1
    trainer.optimizer.zero_grad()
    return norm


def make_batches(trainer: Trainer, pairs, gamma=1.0) -> list[dict]:
    """Pairs of trajectory and advantage as micro-batches of tensors; "scored" is what grpo.token_logprobs takes,
    "trained" the tokens that have an advantage, "indices" and "successful" are of the pairs."""
    args = trainer.args
    nothing = grpo.Trajectory(token_ids=[0, 0], action_mask=[False] * 2, logprobs=[0.0] * 2, turns=[-1] * 2)
    pairs = [*pairs, (nothing, 0.0)]
    parts = grpo.micro_batches([len(t.token_ids) for t, _ in pairs[:-1]], args.micro_batch_tokens)
    if args.shard:  # every pass is one of all ranks: those with fewer add passes over two tokens that do not count
        parts += [[len(pairs) - 1]] * (max(grpo.all_gather_json(len(parts))) - len(parts))
    batches = []
    for part in parts:
        trajectories, advantages = zip(*[pairs[i] for i in part], strict=True)
        pad = trainer.tokenizer.pad_token_id or 0
        device = trainer.model.device
        batch = grpo.collate(trajectories, [a or 0.0 for a in advantages], gamma, device, pad)
        has_advantage = torch.tensor([a is not None for a in advantages], device=device)
        batch["trained"] = batch["mask"] & has_advantage[:, None]
        batch["indices"] = part
        batch["successful"] = torch.tensor([t.reward >= evaluation.PASS for t in trajectories], device=device)
        batch["scored"] = {
            "ids_B_T": batch["ids"],
            "attention_mask_B_T": batch["attention_mask"],
            "temperature": args.temperature or 1.0,
            "mask_B_T": batch["mask"],
        }
        batches.append(batch)
    return batches


def reference_logprobs(trainer: Trainer, batches):
    """Puts into each batch the log-probabilities of the policy of the KL penalty, and of the very first policy."""
    args, model = trainer.args, trainer.model
    initial = args.kl_reference == "initial"
    with torch.no_grad():
        if args.log_initial_kl or (initial and args.kl_coef > 0):
            with grpo.weights_of(model, trainer.initial):
                for batch in batches:
                    batch["initial_logprobs"] = grpo.token_logprobs(model, **batch["scored"])
        if args.kl_coef > 0 and not initial:
            with grpo.weights_of(model, trainer.reference):
                for batch in batches:
                    batch["ref_logprobs"] = grpo.token_logprobs(model, **batch["scored"])
    for batch in batches:
        if args.kl_coef > 0 and initial:
            batch["ref_logprobs"] = batch["initial_logprobs"]


def update(trainer: Trainer, kept, replayed=()) -> dict:
    """The GRPO updates of a step: `kept` are this rank's pairs of trajectory and advantage, `replayed` the stored
    conversations of all ranks, members of the same batch. Leaves their losses in trainer.replayed_losses."""
    args = trainer.args
    start = time.perf_counter()
    stored = [as_trajectory(item) for item in replayed[grpo.rank() :: grpo.world_size()]]
    trained = kept + [pair for pair in stored if pair[1] is not None]
    values = (count_tokens(trained), len(trained), count_tokens(kept), count_tokens(stored))
    names = ("tokens", "sequences", "new_tokens", "replayed_tokens")
    counts = dict(zip(names, sum_over_ranks(trainer, *values), strict=True))
    new_batches, old_batches = make_batches(trainer, kept, args.gamma), make_batches(trainer, stored, args.gamma)
    trainer.batches = new_batches
    reference_logprobs(trainer, new_batches + old_batches)
    totals, norm, extra_seconds = [], 0.0, 0.0
    for _ in range(args.num_iterations):
        new, old = Logged(), Logged()
        losses = [0.0] * (len(stored) + 1)  # the last for passes that do not count
        for batch in new_batches:
            step_loss(trainer, batch, counts, new).backward()
        for batch in old_batches:
            step_loss(trainer, batch, counts, old, losses=losses).backward()
        extra_start = time.perf_counter()
        extra = backward_extra_loss(trainer)  # EWC, LwF, generative replay: added to GRPO's loss by its gradient
        extra_seconds += time.perf_counter() - extra_start
        ranks = grpo.all_gather_json([dataclasses.asdict(new), dataclasses.asdict(old), losses[:-1]])
        new, old = Logged.over_ranks(r[0] for r in ranks), Logged.over_ranks(r[1] for r in ranks)
        trainer.replayed_losses = [ranks[i % len(ranks)][2][i // len(ranks)] for i in range(len(replayed))]
        totals.append((new, old))
        if counts["tokens"] > 0 or counts["replayed_tokens"] > 0 or extra is not None:
            norm = optimizer_step(trainer, new.loss + old.loss)
        if trainer.state["skipped_in_a_row"] >= MAX_SKIPPED:
            stop_with_batch(trainer, kept + stored, norm)

    def per_token(which, name, tokens):
        return sum(getattr(pair[which], name) for pair in totals) / len(totals) / max(tokens, 1.0)

    shared = ("kl", "kl_initial", "entropy", "clip_share")
    stats = {name: per_token(0, name, counts["new_tokens"]) for name in shared}
    if replayed:
        in_loss = counts["tokens"] - counts["new_tokens"]
        stats.update(
            replayed_conversations=len(replayed),
            replayed_kl=per_token(1, "behaviour_kl", counts["replayed_tokens"]),
            replayed_ratio_min=min(old.ratio_min for _, old in totals),
            replayed_ratio_max=max(old.ratio_max for _, old in totals),
            replayed_clip_share=per_token(1, "clip_share", in_loss),
            cloning_loss=per_token(1, "cloning", counts["replayed_tokens"]),
        )
    if extra is not None:
        stats.update(extra_loss=extra, extra_seconds=extra_seconds)
    return {
        "loss": totals[0][0].loss + totals[0][1].loss,
        **stats,
        "ratio_first_step": 1.0 + totals[0][0].deviation,
        "ratio_min": min(new.ratio_min for new, _ in totals),
        "ratio_max": max(new.ratio_max for new, _ in totals),
        "grad_norm": norm,
        "skipped_in_a_row": trainer.state["skipped_in_a_row"],
        "action_tokens": int(counts["new_tokens"]),
        "update_seconds": time.perf_counter() - start,
    }


def backward_extra_loss(trainer: Trainer) -> float | None:
    """Adds the gradient of the algorithm's own loss. Returns its value, a mean over ranks, if there is one."""
    extra = trainer.algorithm.extra_loss(trainer)
    if extra is None:
        return None
    total, number = 0.0, 0
    for part in [extra] if isinstance(extra, torch.Tensor) else extra:
        if isinstance(part, DTensor):  # of sharded weights themselves: one for all ranks
            part.backward()
        else:
            (part / grpo.world_size()).backward()  # gradients are summed over ranks
        total += grpo.whole(part.detach()).item()
        number += 1
    total, number = sum_over_ranks(trainer, total, number)
    return total / grpo.world_size() if number > 0 else None


def count_tokens(pairs) -> int:
    return sum(sum(t.action_mask) for t, _ in pairs)


@dataclass
class Logged:
    """What is logged of the new or of the replayed conversations of an update: sums over tokens, and extremes."""

    loss: float = 0.0
    kl: float = 0.0  # to the reference
    kl_initial: float = 0.0
    behaviour_kl: float = 0.0  # from the policy that sampled
    cloning: float = 0.0
    entropy: float = 0.0
    clip_share: float = 0.0
    ratio_min: float = 1.0
    ratio_max: float = 1.0
    deviation: float = 0.0  # of the ratio from 1

    @classmethod
    def over_ranks(cls, parts):
        parts = list(parts)
        extremes = {"ratio_min": min, "ratio_max": max, "deviation": max}
        return cls(**{name: extremes.get(name, sum)(p[name] for p in parts) for name in parts[0]})


DUAL_CLIP = 3.0  # of replayed conversations, see grpo.policy_loss


def step_loss(trainer: Trainer, batch, counts, logged: Logged, losses=None):
    """The share that a micro-batch has in the loss of the step, whose `counts` are over all ranks. Adds to `logged`.
    `losses` is given for replayed conversations: the loss of each is put there, by "indices"."""
    args = trainer.args
    logprobs, entropy = grpo.token_logprobs(trainer.model, **batch["scored"], return_entropy=True)
    old_logprobs, mask, trained = batch["old_logprobs"], batch["mask"], batch["trained"]
    clip = (args.epsilon_low, args.epsilon_high or (5.0 if args.loss_type == "cispo" else 0.28))
    dual_clip = DUAL_CLIP if losses is not None else None
    loss, stats = grpo.policy_loss(
        logprobs,
        old_logprobs,
        batch["advantages"],
        trained,
        args.loss_type,
        *clip,
        batch.get("ref_logprobs"),
        args.kl_coef,
        args.kl_estimator,
        normalizer=counts["tokens"],
        max_tokens=args.max_context or args.max_turns * args.max_new_tokens,
        dual_clip=dual_clip,
    )
    tokens = int(trained.sum())
    if args.loss_type in grpo.PER_SEQUENCE:  # a mean over sequences: this micro-batch's share of it
        loss = loss * len(batch["ids"]) / max(counts["sequences"], 1.0)
    elif args.loss_type == "bnpo":
        loss = loss * tokens / max(counts["tokens"], 1.0)
    current = logprobs.detach()
    if losses is not None:
        clone = replay.cloning_loss(logprobs, old_logprobs, mask, batch["successful"])
        loss = loss + args.clone_coef * clone / max(counts["replayed_tokens"], 1.0)
        logged.cloning += clone.item()
        for row, index in enumerate(batch["indices"]):
            row = slice(row, row + 1)
            tensors = (current[row], old_logprobs[row], batch["advantages"][row], trained[row])
            losses[index] = grpo.policy_loss(*tensors, "grpo", *clip, dual_clip=dual_clip)[0].item()
    logged.loss += loss.item()
    logged.kl += stats.get("kl", 0.0) * tokens
    logged.clip_share += stats["clip_share"] * tokens
    logged.entropy += entropy.sum().item()
    logged.behaviour_kl += grpo.kl_estimate(current - old_logprobs, "k3")[mask].sum().item()
    if "initial_logprobs" in batch:
        logged.kl_initial += grpo.kl_estimate(batch["initial_logprobs"] - current, "k3").sum().item()
    if mask.any():
        logged.deviation = max(logged.deviation, (current - old_logprobs)[mask].expm1().abs().max().item())
        logged.ratio_min = min(logged.ratio_min, stats["ratio_min"])
        logged.ratio_max = max(logged.ratio_max, stats["ratio_max"])
    return loss


MAX_SKIPPED = 5  # updates without a finite gradient, one after the other, that end a run


def stop_with_batch(trainer, kept, norm):
    """Leaves this rank's batch for inspection and raises StopRun on all ranks."""
    path = trainer.run / f"not_finite_rank{grpo.rank()}.json"
    batch = [{**dataclasses.asdict(dataclasses.replace(t, messages=[])), "advantage": a} for t, a in kept]
    evaluation.write_json(path, {"global_step": trainer.step, "grad_norm": norm, "trajectories": batch})
    raise StopRun(
        f"{MAX_SKIPPED} updates in a row had no finite loss or gradient (norm {norm}); the weights are from before "
        f"them, the last batch is in {path}"
    )


def scheduled_rate(args: Args, step) -> float:
    """The learning rate of a domain's GRPO step, from 0, before `lr_decay`."""
    progress = step / max(1, args.num_steps_per_task)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return args.learning_rate * decay[args.lr_schedule] * min(1.0, (step + 1) / max(1, args.lr_warmup_steps))


def set_rate(trainer: Trainer, rate, examples):
    """Sets the rate of a step on so many conversations, decayed by those before it (ELRD, Buzzega et al. 2020,
    arXiv:2010.05595: lr = lr0 gamma^examples)."""
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate * trainer.args.lr_decay ** trainer.state["examples"]
    trainer.state["examples"] += examples


def grpo_step(trainer: Trainer) -> dict:
    args = trainer.args
    batch = sample_batch(trainer, args.batch_size_per_gpu * args.gradient_accumulation_steps)
    kept, trainer.groups, records, stats = collect(trainer, batch)
    replayed = trainer.algorithm.augment_trajectories(len(records), trainer.domain)
    set_rate(trainer, scheduled_rate(args, trainer.state["step"]), len(records) + len(replayed))
    stats.update(update(trainer, kept, replayed))
    valid = [r for r in records if r["reward"] is not None]
    by_domain = {}
    for r in valid:
        by_domain.setdefault(r["domain"], []).append(r["reward"])
    new = torch.tensor([reward for domain in trainer.domains for reward in by_domain.get(domain, [])] or [0.0])
    append_jsonl(trainer.run / "trajectories.jsonl", records)
    start = time.perf_counter()
    trainer.algorithm.post_step_hook(trainer, trainer.domain)
    trainer.finished = []
    stats["hook_seconds"] = time.perf_counter() - start
    return {
        "kind": "step",
        "domain": trainer.domain,
        "reward": new.mean().item(),
        "reward_std": new.std(correction=0).item(),
        "reward_max": new.max().item(),
        "reward_by_domain": {domain: sum(values) / len(values) for domain, values in by_domain.items()},
        "pass_rate_by_domain": {
            domain: sum(reward >= evaluation.PASS for reward in values) / len(values)
            for domain, values in by_domain.items()
        },
        "zero_variance_groups": sum(not g.varied for g in trainer.groups) / len(trainer.groups),
        "replayed_groups": sum(g.replayed for g in trainer.groups) / len(trainer.groups),
        "turns": sum(r["turns"] for r in records) / len(records),
        "tool_error_share": sum(r["failed_calls"] for r in records) / max(1, sum(r["tool_calls"] for r in records)),
        "truncated": sum(r["truncated"] for r in records) / len(records),
        "invalid": len(records) - len(valid),
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "tokens_per_second": sum(r["tokens"] for r in records) / stats["rollout_seconds"],
        **stats,
    }


def warmup_step(trainer: Trainer) -> float:
    """One supervised step on gold demonstrations, those of replayed tasks or stored conversations that were successful
    among them. Returns the loss per token."""
    args = trainer.args
    batch = sample_batch(trainer, args.batch_size_per_gpu * args.gradient_accumulation_steps)
    mine = [demonstration(trainer, ref) for ref in batch[grpo.rank() :: grpo.world_size()]]
    replayed = trainer.algorithm.augment_trajectories(len(batch), trainer.domain, successful=True)
    mine += [as_trajectory(item)[0] for item in replayed[grpo.rank() :: grpo.world_size()]]
    num_tokens, _ = sum_over_ranks(trainer, sum(sum(t.action_mask) for t in mine), 0)
    total = 0.0
    trainer.batches = make_batches(trainer, [(t, 1.0) for t in mine])
    for part in trainer.batches:
        logprobs = grpo.token_logprobs(trainer.model, **{**part["scored"], "temperature": 1.0})
        loss = -logprobs.sum() / num_tokens
        loss.backward()
        total += loss.item()
    total = sum_over_ranks(trainer, total)[0]
    backward_extra_loss(trainer)
    set_rate(trainer, args.warmup_learning_rate, len(batch) + len(replayed))
    norm = optimizer_step(trainer, total)
    if trainer.state["skipped_in_a_row"] >= MAX_SKIPPED:
        stop_with_batch(trainer, [(t, 1.0) for t in mine], norm)
    return total


def demonstration(trainer: Trainer, ref) -> grpo.Trajectory:
    if ref not in trainer.demonstrations:
        args, task = trainer.args, trainer.task(ref)
        user = oracle.scripted_like(args.user)
        turns = oracle.agent_turns(oracle.demonstrate(ref.domain, task, user))
        episode = oracle.Episode(ref.domain, task, user, max_turns=len(turns) + 1)
        limits = {"max_user_tokens": args.max_user_tokens, "max_tool_tokens": args.max_tool_tokens}
        trainer.demonstrations[ref] = grpo.demonstration(trainer.tokenizer, episode, turns, **limits)
    return trainer.demonstrations[ref]


def evaluate(trainer: Trainer, stage, domains) -> dict[str, float]:
    """Mean reward of each domain; logged with the other metrics of eval.py."""
    args = trainer.args
    look = stage == "check"  # only to end the warm start, so on training tasks
    tasks = trainer.tasks if look else trainer.eval_tasks

    def record(records):
        position = {"kind": "evaluation", "stage": stage, "global_step": trainer.step}
        append_jsonl(trainer.run / "trajectories.jsonl", [{**position, **r} for r in records])

    details = evaluation.evaluate_tasks(
        trainer.model,
        trainer.tokenizer,
        {domain: tasks[domain] for domain in domains},
        num_trials=max(1, args.eval_trials // 2) if look else args.eval_trials,
        max_invalid_share=args.max_invalid_share,
        on_records=record,
        on_record=trainer.signals.leave_evaluation,
        user=args.user,
        max_turns=args.max_turns,
        seed=trainer.generator(2 + ("check", "warmup", "baseline", "domain").index(stage)).initial_seed(),
        label=f"evaluate ({', '.join(domains)})",
        **sampling(args),
    )
    scores = {domain: values["reward_mean"] for domain, values in details.items()}
    if stage == "domain":
        trainer.state["evaluation"] = details
    log(trainer, {"kind": "evaluation", "stage": stage, "domain": trainer.domain, "scores": scores, "details": details})
    return scores


# ------------------------------------------------------------------------------------- files and signals


def append_jsonl(path, records):
    if grpo.rank() == 0:
        with open(path, "a") as lines:
            lines.writelines(json.dumps(record) + "\n" for record in records)


def log(trainer, record):
    position = {"global_step": trainer.step, "seconds": round(trainer.state["seconds"] + clock(trainer), 2)}
    append_jsonl(trainer.run / "metrics.jsonl", [{**record, **position}])
    for write in trainer.trackers:
        write(scalars(record), trainer.step)


def scalars(record, prefix="") -> dict[str, float]:
    """The numbers of a record, nested ones too, by names such as step/reward and evaluation/domain/scores/airline."""
    name = "/".join(str(record[key]) for key in ("kind", "stage") if key in record)
    found = {}
    for key, value in record.items():
        path = f"{prefix or name}/{key}"
        if isinstance(value, dict):
            found.update(scalars(value, path))
        elif isinstance(value, (int, float)):  # and bool
            found[path] = float(value)
    return found


def open_trackers(args: Args, run) -> list:
    """Functions (scalars, step) that log to where the flags say. A resumed run goes on where it was."""
    trackers = []
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(run / "tensorboard")

        def to_tensorboard(values, step):
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        trackers.append(to_tensorboard)
    if args.wandb_project is not None:
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it would advertise it
        import wandb

        about = {"project": args.wandb_project, "name": run.name, "id": run.name, "resume": "allow", "dir": str(run)}
        quiet = wandb.Settings(silent=True, console="off")
        logged = wandb.init(**about, config=dataclasses.asdict(args), settings=quiet)
        atexit.register(logged.finish)
        # Its own steps must not fall, and evaluations of a step come after it: the step is a value among others.
        trackers.append(lambda values, step: logged.log({**values, "optimiser_step": step}))
    return trackers


def clock(trainer):
    return time.perf_counter() - trainer.started


def say(text):
    if grpo.rank() == 0:
        tqdm.write(text)


def start_stage(trainer: Trainer, stage):
    """One AdamW serves the whole run: its second moments carry over from stage to stage (anew, the first steps would
    move every weight by the full rate, whatever its gradient), its momentum, of another loss, does not."""
    trainer.state.update(stage=stage, step=0)
    for moments in trainer.optimizer.state.values():
        moments["exp_avg"].zero_()


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, the oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("[0-9]*") if path.is_dir())


def save_checkpoint(trainer: Trainer):
    """A directory that transformers loads as a model, plus what the run needs to go on; the last few are kept."""
    state = trainer.state
    state["seconds"] += clock(trainer)
    trainer.started = time.perf_counter()
    parts = gather_checkpoint(trainer)
    failure = None
    if grpo.rank() == 0:
        try:
            write_checkpoint(trainer, *parts)
        except Exception as error:  # a full disk reaches us as OSError, SafetensorError or RuntimeError
            shutil.rmtree(trainer.run / "checkpoints" / "saving.tmp", ignore_errors=True)
            earlier = checkpoints(trainer.run)
            kept = f"; {earlier[-1].name} is intact" if earlier else ""
            failure = f"cannot write a checkpoint in {trainer.run / 'checkpoints'}: {error}{kept}"
    failure = grpo.all_gather_json(failure)[0]
    if failure:
        raise StopRun(failure)


def gather_checkpoint(trainer: Trainer):
    """(weights where they are sharded, AdamW's moments, the reference policy and the algorithm's snapshots by name),
    whole on rank 0; all ranks take part."""
    weights = grpo.gathered_weights(trainer.model)
    moments = {
        f"{name}/{key}": grpo.gathered(value)
        for name, p in grpo.trained_parameters(trainer.model).items()
        for key, value in trainer.optimizer.state.get(p, {}).items()
    }
    snapshots = {f"algorithm_{name}": saved for name, saved in trainer.algorithm.snapshots().items()}
    if trainer.reference is not None:
        snapshots["reference"] = trainer.reference
    snapshots = {name: grpo.gathered_snapshot(trainer.model, saved) for name, saved in snapshots.items()}
    return weights, moments, snapshots


def write_checkpoint(trainer: Trainer, weights, moments, snapshots):
    folder = trainer.run / "checkpoints"
    earlier = checkpoints(trainer.run)
    number = int(earlier[-1].name.split("-")[0]) + 1 if earlier else 0
    final = folder / f"{number:05d}-step{trainer.step}"
    temporary = folder / "saving.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    grpo.save_policy(trainer.model, trainer.tokenizer, temporary, weights)
    save_file(moments, temporary / "optimizer.safetensors")
    for name, tensors in snapshots.items():
        save_file(tensors, temporary / f"{name}.safetensors")
    trainer.algorithm.save(temporary)
    logs = {path.name: path.stat().st_size for path in trainer.run.glob("*.jsonl")}
    sizes = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
    saved = {"state": trainer.state, "scores": trainer.scores, "algorithm": trainer.algorithm.state_dict()}
    (temporary / "state.json").write_text(json.dumps({**saved, "logs": logs, "sizes": sizes}))
    os.replace(temporary, final)
    link = folder / "LAST.tmp"
    link.unlink(missing_ok=True)
    link.symlink_to(final.name)
    os.replace(link, folder / "LAST")
    remove_checkpoints(trainer.run, trainer.args.keep_checkpoints)


def remove_checkpoints(run, keep):
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)


def read_checkpoint(folder: Path) -> dict:
    """The saved state, once every file has been found whole. Raises ValueError, naming what is damaged."""
    try:
        saved = json.loads((folder / "state.json").read_text())
        for name, size in saved["sizes"].items():
            found = (folder / name).stat().st_size if (folder / name).exists() else None
            if found != size:
                raise ValueError(f"{name} has {found} bytes, expected {size}")
        for name, size in saved["logs"].items():
            log_file = folder.parent.parent / name
            if not 0 <= size <= (log_file.stat().st_size if log_file.exists() else 0):
                raise ValueError(f"{name} is shorter than the {size} bytes that were logged before it")
        missing = set(initial_state()) - set(saved["state"])
        if missing or saved["state"]["stage"] not in STAGES:
            raise ValueError(f"its state.json has no {', '.join(sorted(missing)) or 'known stage'}")
    except (ValueError, KeyError, OSError, TypeError, AttributeError) as error:
        raise damaged(folder, error) from error
    return saved


def damaged(folder, error) -> ValueError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return ValueError(
        f"checkpoint {folder} is damaged ({reason}); remove that directory to continue from the one before"
    )


def other_parameters(model, folder) -> list[str]:
    """Those that are trained now, or were when the checkpoint was written, and not both in the same shape."""
    with safe_open(folder / "optimizer.safetensors", "pt") as moments:
        paths = [path for path in moments.keys() if path.endswith("/exp_avg")]  # noqa: SIM118 (it is no dict)
        saved = {(path.rpartition("/")[0], tuple(moments.get_slice(path).get_shape())) for path in paths}
    trained = {(name, tuple(p.shape)) for name, p in grpo.trained_parameters(model).items()}
    return sorted({name for name, _ in saved ^ trained}) if saved else []


def load_checkpoint(trainer: Trainer, folder: Path, saved: dict):
    """Puts a trainer, its model loaded already, back to where the checkpoint was saved."""
    trainer.state, trainer.scores = saved["state"], saved["scores"]
    trainer.algorithm.load_state_dict(saved["algorithm"])
    trainer.algorithm.load(folder)
    parameters = grpo.trained_parameters(trainer.model)
    with safe_open(folder / "optimizer.safetensors", "pt") as moments:
        for path in moments.keys():  # noqa: SIM118 (it is no dict)
            name, _, key = path.rpartition("/")
            p, tensor = parameters[name], moments.get_tensor(path)
            is_count = tensor.ndim == 0  # AdamW's count of steps
            trainer.optimizer.state[p][key] = tensor if is_count else grpo.part_like(tensor.to(p.device), p)
    if (folder / "reference.safetensors").exists():
        trainer.reference = read_snapshot(trainer.model, folder / "reference.safetensors")
    of_algorithm = {path.stem.removeprefix("algorithm_"): path for path in sorted(folder.glob("algorithm_*"))}
    trainer.algorithm.load_snapshots({name: read_snapshot(trainer.model, path) for name, path in of_algorithm.items()})
    if grpo.rank() == 0:  # what was logged after the checkpoint will be logged again
        for path in trainer.run.glob("*.jsonl"):
            os.truncate(path, saved["logs"].get(path.name, 0))


def read_snapshot(model, path) -> list:
    with safe_open(path, "pt") as tensors:
        return grpo.snapshot_from(model, tensors.get_tensor)


class Signals:
    """SIGINT and SIGTERM ask the run to save and stop: behind the step in progress, or at once in an evaluation, before
    which it was saved. A second SIGINT stops it at once."""

    def __init__(self):
        self.received = 0
        self.previous = {s: signal.signal(s, self.receive) for s in (signal.SIGINT, signal.SIGTERM)}

    def receive(self, number, frame):
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        say("stopping: finishing what is running, then saving (press Ctrl-C again to stop at once)")

    def check(self, trainer):
        number = self.received
        if grpo.world_size() > 1:  # all ranks or none
            tensor = torch.tensor(number, device=trainer.model.device)
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
            number = int(tensor)
        if number:
            save_checkpoint(trainer)
            raise Interrupted(number)

    def leave_evaluation(self, record, episode):
        if self.received:
            raise Interrupted(self.received)

    def restore(self):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------ the run


def check(args: Args):
    """Raises ValueError for settings that cannot work, before anything is loaded or written."""
    counts = (
        "batch_size_per_gpu gradient_accumulation_steps num_samples_per_prompt max_turns max_new_tokens eval_trials"
    )
    counts += " micro_batch_tokens num_iterations fisher_samples"
    files = "checkpoint_every keep_checkpoints warmup_check_every"
    rates = "learning_rate warmup_learning_rate max_grad_norm temperature"
    bounds = dict.fromkeys(f"{counts} {files} {rates}".split(), ("greater than 0", lambda x: 0 < x < math.inf))
    for name in ("num_steps_per_task", "warmup_steps", "kl_coef", "lora_rank", "lr_warmup_steps", "clone_coef"):
        bounds[name] = ("0 or more", lambda x: 0 <= x < math.inf)
    bounds["seed"] = ("in [0, 2**63)", lambda x: 0 <= x < 2**63)
    bounds["lr_decay"] = ("in (0, 1]", lambda x: 0 < x <= 1)
    for name in ("gamma", "max_invalid_share"):
        bounds[name] = ("in [0, 1]", lambda x: 0 <= x <= 1)
    for name in ("forgetting_threshold", "adaptation_rate", "epsilon_low"):
        bounds[name] = ("in [0, 1]", lambda x: 0 <= x <= 1)
    optional = "max_tasks_per_domain eval_max_tasks max_context max_user_tokens max_tool_tokens"
    for name in f"{optional} warmup_target epsilon_high".split():
        bounds[name] = ("greater than 0", lambda x: x is None or 0 < x < math.inf)
    bounds["replay_ratio"] = ("in [0, 1)", lambda x: 0 <= x < 1)
    for name, (wanted, holds) in bounds.items():
        if not holds(getattr(args, name)):
            raise ValueError(f"{name} must be {wanted}, got {getattr(args, name)}")
    replay.check_coefficients(args.ewc_lambda, args.ewc_decay, args.lwf_coef)
    packages = {"wandb_project": ("wandb", args.wandb_project), "tensorboard": ("tensorboard", args.tensorboard)}
    for flag, (package, wanted) in packages.items():
        if wanted and importlib.util.find_spec(package) is None:
            raise ValueError(f"--{flag} needs the package {package}, which is not installed: pip install {package}")
    if "/" in args.user and not args.user.startswith("policy:"):
        oracle.use_model_as_user(args.user, args.user_api_base, temperature=0.0)
    oracle.use_retrieval(args.retrieval)
    choices = {
        "task_selection": ("all", "short"),
        "loss_type": grpo.LOSS_TYPES,
        "advantage_scale": ("group", "batch", "none"),
        "kl_estimator": ("k1", "k2", "k3"),
        "kl_reference": (None, "domain", "initial"),
        "lr_schedule": ("constant", "linear", "cosine"),
        "rollout_engine": grpo.ENGINES,
        "replay_strategy": replay.STRATEGIES,
        "replay_kind": ("tasks", "trajectories"),
        "buffer_policy": replay.POLICIES,
        "user": (*oracle.USERS, "solo", *([args.user] if evaluation.policy_of_user(args.user) else [])),
    }
    for name, known in choices.items():
        if getattr(args, name) not in known:
            names = ", ".join(choice for choice in known if choice is not None)
            raise ValueError(f"unknown {name} {getattr(args, name)!r}; choose one of {names}")
    if args.shard and not dist.is_initialized():
        raise ValueError("shard needs several ranks: start with torchrun --nproc_per_node=N train.py ...")
    if not args.task_order or len(set(args.task_order)) != len(args.task_order):
        raise ValueError(f"task_order must name each domain once, got {args.task_order}")


def select_tasks(args: Args):
    """(training tasks, evaluation tasks) by domain."""
    train_tasks, eval_tasks = {}, {}
    for domain in args.task_order:
        if args.task_selection == "short":
            if args.max_tasks_per_domain is None:
                raise ValueError('task_selection "short" needs max_tasks_per_domain')
            train_tasks[domain] = oracle.short_tasks(
                domain, "train", args.max_tasks_per_domain, args.train_split, args.seed
            )
        else:
            train_tasks[domain] = oracle.load_tasks(
                domain, "train", args.max_tasks_per_domain, args.train_split, args.seed
            )
        if args.eval_split == "train":
            eval_tasks[domain] = train_tasks[domain][: args.eval_max_tasks]
        else:
            eval_tasks[domain] = oracle.load_tasks(
                domain, args.eval_split, args.eval_max_tasks, args.train_split, args.seed
            )
    return train_tasks, eval_tasks


def set_up(args: Args, device="cpu") -> Trainer:
    """Everything up to the first step. Raises ValueError or OSError for what the user can mend."""
    folder = None
    if args.resume:
        run = Path(args.resume)
        if not (run / "config.json").is_file():
            raise ValueError(f"cannot resume {run}: there is no {run / 'config.json'}")
        if (run / "report.md").exists():
            raise ValueError(f"cannot resume {run}: it is finished; see {run / 'report.md'}")
        args, config = read_config(run, args.resume)
        if checkpoints(run):  # a run killed before its first one begins again
            folder = checkpoints(run)[-1]
            saved = read_checkpoint(folder)
    regularize.set_defaults(args)
    check(args)
    path = evaluation.policy_of_user(args.user)
    if path:
        evaluation.use_policy_as_user(path, args.model_dtype, device, temperature=0.0)
    train_tasks, eval_tasks = select_tasks(args)
    if args.resume and config["train_tasks"] != task_ids(train_tasks):
        raise ValueError(f"cannot resume {run}: the train_tasks of its config.json are not those of this tau2")
    algorithm = regularize.with_penalties(replay.load_algorithm(args.cl_algorithm, args, ALGORITHMS), args)
    corpus = None
    if args.model_name_or_path == "tiny":
        # Cut, as the policy sees them; the tokenizer is made for these tasks, the policy knows no others.
        corpus = [text[:400] for d, tasks in train_tasks.items() for text in oracle.corpus(d, tasks)]
    loading = {
        "dtype": args.model_dtype,
        "device": "cpu" if args.shard else device,
        "seed": args.seed,
        "corpus": corpus,
        "attn_implementation": args.attn_implementation,
        "gradient_checkpointing": args.gradient_checkpointing,
    }
    args.kl_reference = args.kl_reference or ("initial" if args.lora_rank else "domain")
    keep_initial = not args.lora_rank and (args.log_initial_kl or args.kl_reference == "initial")

    def load(source, lora_rank=args.lora_rank):
        model, tokenizer = grpo.load_policy(str(source), lora_rank=lora_rank, **loading)
        if not grpo.trained_parameters(model):
            raise ValueError(f"{source} has a LoRA adapter; name its rank with --lora_rank to train it")
        if args.shard:
            grpo.shard(model)
        return model, tokenizer

    initial = None
    if keep_initial and folder is not None:
        initial = grpo.snapshot(load(args.model_name_or_path)[0])
    embedded_lora = folder is None and args.model_name_or_path == "tiny" and args.lora_rank > 0
    model, tokenizer = load(folder or args.model_name_or_path, 0 if embedded_lora else args.lora_rank)
    if keep_initial and folder is None:
        initial = grpo.snapshot(model)
    grpo.choose_engine(model, args.rollout_engine)
    for domain, tasks in [*train_tasks.items(), *eval_tasks.items()]:
        for task in tasks:
            episode = oracle.Episode(domain, task, oracle.scripted_like(args.user), args.max_turns)
            limits = (args.max_context, args.max_user_tokens, args.max_tool_tokens)
            grpo.check_opening(model, tokenizer, episode, *limits)
    if not args.resume:
        run = new_run(args, train_tasks, eval_tasks)
    if embedded_lora:  # an adapter's directory names its base, which must be one too
        weights = grpo.gathered_weights(model)
        if grpo.rank() == 0:
            grpo.save_policy(model, tokenizer, run / "base", weights)
        grpo.barrier()
        model, tokenizer = load((run / "base").resolve())
    trainer = Trainer(args, run, model, tokenizer, algorithm, train_tasks, eval_tasks, initial=initial)
    parameters = grpo.trained_parameters(model).values()
    # Not foreach, which needs another copy of the weights for a moment.
    trainer.optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0, foreach=False)
    if folder is not None:
        try:
            other = other_parameters(model, folder)
            if not other:
                load_checkpoint(trainer, folder, saved)
        except Exception as error:  # right sizes, wrong content: whatever the reader of that format raises
            raise damaged(folder, error) from error
        if other:
            raise ValueError(f"cannot resume {run}: other parameters were trained in it, see {', '.join(other[:3])}")
        if trainer.state["ranks"] != grpo.world_size():
            say(f"resuming with {grpo.world_size()} ranks a run of {trainer.state['ranks']}: batches change their size")
            trainer.state["ranks"] = grpo.world_size()
    elif grpo.rank() == 0:
        for path in run.glob("*.jsonl"):
            path.unlink()
    return trainer


def task_ids(tasks) -> dict:
    return {domain: [task.id for task in tasks[domain]] for domain in tasks}


def read_config(run, resume) -> tuple[Args, dict]:
    """(settings, whole contents) of a run's config.json. ValueError for what is no such file."""
    path = run / "config.json"
    try:
        config = json.loads(path.read_text())
        missing = [f.name for f in dataclasses.fields(Args) if f.name not in config]
        if missing:
            raise KeyError(f"no {missing[0]}; another version may have written it")
        saved = {f.name: config[f.name] for f in dataclasses.fields(Args)}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"cannot resume {run}: {path} is damaged ({type(error).__name__}: {error})") from error
    for name, kind in typing.get_type_hints(Args).items():
        allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (typing.get_origin(kind) or kind,)
        value = saved[name]
        if not (isinstance(value, allowed) or (float in allowed and type(value) is int)):
            raise ValueError(f"cannot resume {run}: {name} in {path} is {value!r}, which is no {kind}")
    return Args(**{**saved, "resume": resume}), config


def new_run(args: Args, train_tasks, eval_tasks) -> Path:
    """Makes the run's directory with its settings. ValueError where there is one of that name."""
    algorithm_name = args.cl_algorithm.rpartition(":")[2]
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    name = grpo.all_gather_json(args.run_name or f"{algorithm_name}_seed{args.seed}_{stamp}")[0]
    run = Path(args.runs_dir) / name
    if any(grpo.all_gather_json(run.exists())):
        raise ValueError(f"run directory {run} exists; choose another --run_name, or continue it with --resume {run}")
    if grpo.rank() == 0:
        (run / "checkpoints").mkdir(parents=True)
        config = {**dataclasses.asdict(args), "run_name": name}
        config.update(train_tasks=task_ids(train_tasks), eval_tasks=task_ids(eval_tasks))
        evaluation.write_json(run / "config.json", config)
    grpo.barrier()
    return run


def run_stages(trainer: Trainer):
    """The whole run, from wherever the trainer's state says it is."""
    args, state, signals = trainer.args, trainer.state, trainer.signals
    if trainer.algorithm.keeps_no_data and (state["stage"], state["step"]) == ("warmup", 0) and grpo.rank() == 0:
        remove_checkpoints(trainer.run, keep=1)  # where a kill came before it, below
    if state["stage"] == "baseline":
        save_checkpoint(trainer)
        state["baseline"] = evaluate(trainer, "baseline", args.task_order)
        start_stage(trainer, "warmup")
        save_checkpoint(trainer)

    while state["domain_index"] < len(args.task_order):
        domain = trainer.domain

        if state["stage"] == "warmup":
            needed = [d for d in trainer.domains if d not in state["warm_start"]]
            steps = args.warmup_steps * len(needed)
            shown = {**BAR, "disable": steps == 0 or BAR["disable"]}
            bar = tqdm(total=steps, initial=state["step"], desc=f"{trainer.label}: warm start", **shown)
            while state["step"] < steps:
                loss = warmup_step(trainer)
                state["step"] += 1
                log(trainer, {"kind": "warmup", "domain": domain, "loss": loss})
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
                look = args.warmup_target is not None and loss < 0.2 and state["step"] % args.warmup_check_every == 0
                if look and min(evaluate(trainer, "check", needed).values()) >= args.warmup_target:
                    break
                signals.check(trainer)
            bar.close()
            if state["step"]:
                state["warm_start"].update(evaluate(trainer, "warmup", needed))
            if args.kl_coef > 0 and args.kl_reference == "domain":
                trainer.reference = grpo.snapshot(trainer.model)
            start_stage(trainer, "grpo")
            save_checkpoint(trainer)

        if state["stage"] == "grpo":
            bar = tqdm(total=args.num_steps_per_task, initial=state["step"], desc=f"{trainer.label}: GRPO", **BAR)
            while state["step"] < args.num_steps_per_task:
                record = grpo_step(trainer)
                state["step"] += 1
                state["global_step"] += 1
                log(trainer, record)
                bar.update()
                bar.set_postfix(reward=f"{record['reward']:.2f}", kl=f"{record['kl']:.3f}")
                signals.check(trainer)
                if state["step"] % args.checkpoint_every == 0:
                    save_checkpoint(trainer)
            bar.close()
            state.update(stage="evaluate", step=0)
            save_checkpoint(trainer)

        trainer.scores = evaluate(trainer, "domain", args.task_order)
        state["R"].append([trainer.scores[d] for d in args.task_order])
        shown = "  ".join(f"{d} {score:.2f}" for d, score in trainer.scores.items())
        say(f"after {trainer.label}: {shown}")
        trainer.algorithm.post_task_hook(trainer, domain)
        for name, value in trainer.algorithm.get_statistics().items():
            say(f"  {name}: {value}")
        trainer.reference = None
        state["domain_index"] += 1
        start_stage(trainer, "warmup")
        save_checkpoint(trainer)
        if trainer.algorithm.keeps_no_data and grpo.rank() == 0:
            remove_checkpoints(trainer.run, keep=1)


BAR = {"disable": None, "leave": True}


def summarize(trainer: Trainer) -> dict:
    args, state = trainer.args, trainer.state
    order = args.task_order
    baseline = [state["baseline"][d] for d in order]
    solo = " (telecom: solo mode)" if args.user == "scripted" and "telecom" in order else ""
    note = f"{args.user} user{solo}, {args.eval_split} split, {oracle.data_version()['tau2']}"
    if args.model_name_or_path == "tiny":
        note += "; the embedded policy memorises a few training tasks, this is no benchmark score"
    return {
        "cl_algorithm": args.cl_algorithm,
        "task_order": order,
        "split": args.eval_split,
        "user": args.user,
        "note": note,
        "seed": args.seed,
        "baseline": state["baseline"],
        "warm_start": state["warm_start"],
        "stages": trainer.stages,
        "R": state["R"],
        "metrics": evaluation.cl_metrics(state["R"], baseline),
        "evaluation": state["evaluation"],
        "do_nothing_rate": {d: state["evaluation"][d]["do_nothing_rate"] for d in order},
        "statistics": trainer.algorithm.get_statistics(),
        "bytes_kept": trainer.algorithm.bytes_kept(),
        "minutes": (state["seconds"] + clock(trainer)) / 60,
        "ranks": grpo.world_size(),
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            **oracle.data_version(),
        },
        "config": dataclasses.asdict(args),
        "command": command_line(args),
    }


def command_line(args: Args) -> str:
    """The command that repeats the run: the flags that differ from what they are without being named."""
    usual = dataclasses.replace(Args(), **(TINY if args.model_name_or_path == "tiny" else {}))
    words = []
    for entry in dataclasses.fields(Args):
        name, value = entry.name, getattr(args, entry.name)
        if value == getattr(usual, name) or name in ("run_name", "runs_dir", "resume"):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, (list, tuple)) else [value])]
    launcher = ["torchrun", f"--nproc_per_node={grpo.world_size()}"] if grpo.world_size() > 1 else ["python"]
    return shlex.join([*launcher, "train.py", *words])


def train(args: Args) -> dict:
    """Runs (or resumes) a training run and returns its summary, as written to summary.json.

    Raises ValueError for bad settings, StopRun when the run cannot go on, Interrupted after a signal (saved).
    """
    device = grpo.init_distributed()
    BAR["disable"] = grpo.rank() > 0
    trainer = set_up(args, device)
    args = trainer.args
    size = sum(p.numel() for p in trainer.model.parameters())
    number = {d: len(tasks) for d, tasks in trainer.tasks.items()}
    say(f"{args.cl_algorithm} on {args.model_name_or_path} ({size / 1e6:.1f}M parameters), {grpo.world_size()} rank(s)")
    say(f"training tasks: {number}; evaluated on the {args.eval_split} split, {args.user} user")
    if args.model_name_or_path == "tiny":
        changed = {name: value for name, value in TINY.items() if getattr(args, name) == value}
        say("settings of the embedded policy: " + ", ".join(f"{k} {v}" for k, v in changed.items()))
    say(f"writing {trainer.run}")
    if grpo.rank() == 0:
        trainer.trackers = open_trackers(args, trainer.run)
    trainer.signals = Signals()
    try:
        run_stages(trainer)
    finally:
        trainer.signals.restore()
    summary = summarize(trainer)
    if grpo.rank() == 0:
        evaluation.write_json(trainer.run / "summary.json", summary)
        evaluation.write_report(trainer.run)
    say("\n" + evaluation.text_matrix(summary) + "\n")
    say("  ".join(f"{name} {value:.2f}" for name, value in summary["metrics"].items() if value is not None))
    say(f"{summary['minutes']:.1f} minutes; report: {trainer.run / 'report.md'}")
    return summary


def parse_args(argv=None) -> Args:
    """The flags; where the embedded policy is meant, its settings are the defaults."""
    args = tyro.cli(Args, args=argv)
    if args.model_name_or_path == "tiny" and not args.resume:
        args = tyro.cli(Args, args=argv, default=dataclasses.replace(Args(), **TINY))
    return args


def main():
    args = parse_args()
    code = 0
    try:
        train(args)
    except Interrupted as stop:
        code = 128 + stop.args[0]
        report("saved; continue with --resume", rank_0_only=True)
    except KeyboardInterrupt:
        code = 130
        report("stopped at once; --resume continues a run from its last checkpoint", rank_0_only=True)
    except (ValueError, OSError, StopRun) as error:
        code = 2
        report(f"train.py: {error}")
    except Exception as error:
        code = 1
        # What the others raise when one rank is gone; the cause is that one's, which has shown it.
        lost = isinstance(error, dist.DistBackendError) or "gloo/transport" in str(error)
        report("train.py: lost the connection to another rank" if lost else traceback.format_exc())
    if code and grpo.world_size() > 1:
        os._exit(code)  # at once, without waiting for the others in a destructor: torchrun stops them then
    if dist.is_initialized():
        dist.destroy_process_group()
    raise SystemExit(code)


def report(text, rank_0_only=False):
    where = f"[rank {grpo.rank()}] " if grpo.rank() > 0 else ""
    if not where or not rank_0_only:
        tqdm.write(f"\n{where}{text}" if rank_0_only else f"{where}{text}", file=sys.stderr)


if __name__ == "__main__":
    main()
