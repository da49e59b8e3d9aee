"""Continual GRPO on tau2-bench: one policy, one domain after another, with or without protection of its memory.

    python train.py --cl_algorithm replay                                  the embedded policy, minutes on a CPU
    torchrun --nproc_per_node=4 train.py --model_name_or_path Qwen/Qwen2.5-7B-Instruct --cl_algorithm replay
    python train.py --resume runs/NAME                                     continues a run that was stopped

For each domain: a warm start on gold demonstrations, GRPO steps, an evaluation on all domains. The function `train` is
the whole algorithm, from the first task to the last optimiser step.

Every random draw is a function of the seed and the position in the run: a resumed run repeats none and skips none. A
step's loss is divided by counts over all ranks: the gradient does not depend on how conversations are split.
"""

import copy
import dataclasses
import functools
import math
import os
import sys
import traceback
from dataclasses import dataclass, field
from typing import Literal

import distributed  # sets what other libraries read when they are imported

# isort: split
import pydantic
import torch
import torch.distributed as dist
import tyro
from tqdm import tqdm

import checkpoint
import distill
import drift
import eval as evaluation
import generative
import grpo
import merge
import oracle
import policy
import regularize
import replay
import rollout
import run
import server
import tracking
from algorithm import CLAlgorithm, batches
from flags import CHECKED, Count, CountOrZero, Few, LearningRate, Positive, PositiveShare, Seed, one_line
from grpo import TaskRef
from run import Trainer
from text import print_safely

ALGORITHMS = {
    "sequential": replay.SequentialCL,
    "joint": replay.JointCL,
    "replay": replay.ReplayCL,
    "adaptive_replay": replay.AdaptiveReplayCL,
    "generative_replay": generative.GenerativeReplayCL,
    "distillation": distill.DistillationCL,
    "der": distill.DERPlusPlus,
    "ewc": regularize.EWC,
    "online_ewc": regularize.OnlineEWC,
    "cpo": regularize.CPO,
    "lwf": regularize.LwF,
    "merge": merge.MergeCL,
}
LOOK_EVERY, LOOK_BELOW = 2, 0.4  # steps, and the loss, at which a warm start looks which tasks are at its target
MAX_SKIPPED = 5  # updates without a finite gradient, one after the other, that end a run


@dataclass(kw_only=True)
class Flags:
    """The loop."""

    cl_algorithm: str = "sequential"
    """sequential, joint, replay, adaptive_replay, generative_replay, distillation, der, ewc, online_ewc, cpo, lwf,
    merge, or path/to/file.py:MyAlgorithm"""
    seed: Seed = 0
    """seed of every random draw"""
    batch_size_per_gpu: Count = 4
    """tasks per rank and accumulation step: a step has this x gradient_accumulation_steps x ranks tasks"""
    gradient_accumulation_steps: Few = 2
    """rollouts of a step, one after the other: the same tasks in less memory, with a smaller batch_size_per_gpu"""
    micro_batch_tokens: Count = 16384
    """tokens of one forward and backward pass, padding included. Affects memory, not the gradient"""
    num_iterations: Few = 1
    """optimiser steps on the same rollouts"""
    num_samples_per_prompt: Count = 4
    """conversations per task: the group of GRPO"""
    num_steps_per_task: CountOrZero = 100
    """GRPO steps per domain"""
    learning_rate: LearningRate = 1e-6
    """learning rate of GRPO (AdamW, no weight decay)"""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """course of the rate over each domain's GRPO steps; linear and cosine end at 0"""
    lr_decay: PositiveShare = 1.0
    """multiply both learning rates by lr_decay**n after n conversations"""
    max_grad_norm: Positive = 1.0
    """clip gradients to this norm"""
    warmup_steps: CountOrZero = 0
    """supervised steps on gold demonstrations before each domain's GRPO, at most"""
    warmup_target: Positive | None = None
    """leave out of the warm start the tasks whose sampled conversations have this mean reward; end it when all have"""
    warmup_learning_rate: LearningRate = 1e-5
    """learning rate of the warm start"""


# The embedded policy shows something in minutes with these. It memorises a few tasks; a real model needs none of them.
TINY = {
    "model_dtype": "float32",
    "max_tasks_per_domain": 3,
    "max_turns": 5,
    "temperature": 0.5,
    "max_new_tokens": 96,
    "max_context": 320,
    "max_user_tokens": 64,
    "max_tool_tokens": 12,
    "batch_size_per_gpu": 3,
    "gradient_accumulation_steps": 1,
    "micro_batch_tokens": 4096,
    "num_samples_per_prompt": 16,
    "num_steps_per_task": 16,
    "learning_rate": 1e-3,
    "lr_schedule": "linear",
    "advantage_scale": "none",
    "kl_coef": 0.05,
    "warmup_steps": 300,
    "warmup_target": 0.25,
    "warmup_learning_rate": 2e-3,
    "replay_ratio": 0.4,
    "min_buffer_size": 1,
    "window": 320,
    "window_batch": 4,
    "eval_split": "train",
    "eval_trials": 16,
}
COMPONENTS = {
    "loop": Flags,
    "policy": policy.Flags,
    "tasks": oracle.Flags,
    "rollouts": rollout.Flags,
    "vllm": server.Flags,
    "GRPO": grpo.Flags,
    "replay": replay.Flags,
    "generative_replay": generative.Flags,
    "distillation": distill.Flags,
    "penalties": regularize.Flags,
    "merging": merge.Flags,
    "drift": drift.Flags,
    "evaluation": evaluation.Flags,
    "run": run.Flags,
}


@pydantic.dataclasses.dataclass(kw_only=True, config=CHECKED)
class Args(*COMPONENTS.values()):
    """Trains one policy with GRPO on tau2 domains in sequence. Defaults are for a real model; "tiny" has its own."""

    @pydantic.model_validator(mode="before")
    @classmethod
    def settings_of_the_embedded_policy(cls, given):
        named = given.kwargs or {}
        tiny = named.get("model_name_or_path", "tiny") == "tiny" and not named.get("resume")
        return {**TINY, **named} if tiny else named


def parse_args(argv=None) -> Args:
    """The flags, with help grouped by component. Raises ValueError for a value that its type rules out."""
    groups = [(name, tyro.conf.OmitArgPrefixes[kind], field(default_factory=kind)) for name, kind in COMPONENTS.items()]
    Grouped = dataclasses.make_dataclass("Args", groups, namespace={"__doc__": Args.__doc__})

    def parse(default) -> dict:
        parsed = tyro.cli(Grouped, args=argv, default=default)
        return {name: value for group in vars(parsed).values() for name, value in vars(group).items()}

    given = parse(Grouped())
    if given["model_name_or_path"] == "tiny" and not given["resume"]:
        tiny = Grouped()
        for group in vars(tiny).values():
            vars(group).update({name: value for name, value in TINY.items() if hasattr(group, name)})
        given = parse(tiny)
    return Args(**given)


@checkpoint.restored()
def train(args: Args, algorithm: CLAlgorithm | None = None) -> dict:
    """Runs (or resumes) a training run and returns its summary, as written to summary.json. `algorithm`: an instance,
    in place of args.cl_algorithm.

    Raises ValueError for bad settings, StopRun if the run cannot go on, Interrupted after a signal (saved).
    """
    trainer = run.set_up(args, algorithm, ALGORITHMS, distributed.init_distributed())
    args, state, model, tokenizer = trainer.args, trainer.state, trainer.model, trainer.tokenizer
    algorithms, buffer, optimizer = trainer.algorithms, trainer.trajectory_buffer, trainer.optimizer
    rank, ranks, G = distributed.rank(), distributed.world_size(), args.num_samples_per_prompt
    objective, sampling = grpo.loss_settings(args), rollout.settings(args)
    score = functools.partial(evaluation.score_and_record, evaluation_type=args.evaluation_type)
    stop = checkpoint.StopSignal()
    plan = schedule(args, trainer.stages)
    tasks = {TaskRef(d, task.id): task for d in args.task_order for task in trainer.tasks[d]}
    gold = functools.cache(lambda ref: run.demonstration(args, tokenizer, ref.domain, tasks[ref]))
    bar = tqdm(total=len(plan), initial=state["position"], disable=rank > 0 or None)
    for position in range(state["position"], len(plan)):
        stage, phase, step = plan[position]
        if phase == "warmup" and state["warm"] == stage:  # its target is reached
            continue
        trainer.domain, trainer.phase = args.task_order[stage], phase
        domain, clock = trainer.domain, distributed.Clock()
        bar.set_description(f"{trainer.stages[stage]}: {phase}")

        if phase in ("warmup", "grpo"):
            # 1. Tasks: the next ones, and those that the algorithms add. Every rank draws the same list.
            refs_P = new = next_tasks(trainer, tasks, stage, step)
            draws = run.drawn(trainer)
            for a in algorithms:
                refs_P = a.augment_batch(refs_P, domain)
            trainer.refs_P, mine_P = refs_P, refs_P[rank::ranks]

            if phase == "warmup":  # imitates gold demonstrations in place of conversations
                conversations = len(refs_P)
                trained = [gold(ref) for ref in mine_P]
            else:
                # 2. Conversations: each rank plays G of every ranks-th task, an accumulation step at a time.
                conversations = len(refs_P) * G
                played = [ref for ref in mine_P for _ in range(G)]
                episodes = [oracle.Episode(ref.domain, tasks[ref], args.user, args.max_turns) for ref in played]
                generator, trajectories = trainer.seeded(1, step), []
                size = G * math.ceil(len(mine_P) / args.gradient_accumulation_steps)
                with run.saved_before(trainer, draws):
                    for k in range(args.gradient_accumulation_steps):
                        part = episodes[k * size : (k + 1) * size]
                        trajectories += rollout.rollout(model, tokenizer, part, generator=generator, **sampling)
                trainer.sampled = trajectories
                clock.lap("rollout_seconds")

                # 3. Rewards: tau2's own. An invalid conversation has none.
                needed = {d: all(a.needs_rewards(d) for a in algorithms) for d in args.task_order}
                records = [score(e, t, scored=needed[t.domain]) for e, t in zip(episodes, trajectories, strict=True)]
                records = distributed.gathered_in_order(records, len(refs_P), G)
                evaluation.stop_if_invalid(records)
                rewards = [math.nan if r["reward"] is None else r["reward"] for r in records]
                trainer.rewards_P_G = rewards_P_G = torch.tensor(rewards).view(len(refs_P), G)
                clock.lap("score_seconds")

                # 4. Advantages: the reward minus its group's mean. Groups with equal rewards are skipped.
                advantages_P_G = grpo.group_advantages(rewards_P_G, args.advantage_scale)
                grpo.set_advantages(trajectories, rewards_P_G[rank::ranks], advantages_P_G[rank::ranks])
                trained = [t for t in trajectories if t.usable(args.mask_truncated) and t.advantage is not None]

            # 5. Loss and gradient of this rank's share, divided by counts of all ranks.
            trainer.replayed = [t for a in algorithms for t in a.augment_trajectories(conversations, domain)]
            stored = trainer.replayed[rank::ranks]
            counts = distributed.sum_over_ranks(grpo.counts(trained, stored))
            trainer.batches = batches(trainer, trained) + batches(trainer, stored)
            if phase == "grpo":
                run.add_logprobs(trainer)
            set_learning_rate(trainer, step, conversations + len(trainer.replayed))
            history, extra, norm = [], [], 0.0  # by iteration: statistics of all ranks' micro-batches, extra losses
            for _ in range(args.num_iterations if phase == "grpo" else 1):
                stats = []
                for batch in trainer.batches:
                    inputs = {"ids_B_T": batch["ids"], "attention_mask_B_T": batch["attention_mask"]}
                    if phase == "warmup":
                        tokens = counts["new_tokens"] + counts["replayed_tokens"]
                        loss = -policy.token_logprobs(model, **inputs, mask_B_T=batch["mask"]).sum() / tokens
                        stats.append({"loss": loss.item()})
                    else:
                        inputs.update(temperature=args.temperature, mask_B_T=batch["mask"], return_entropy=True)
                        logprobs, entropy = policy.token_logprobs(model, **inputs)
                        loss, found = grpo.batch_loss(batch, logprobs, counts, args.clone_coef, **objective)
                        stats.append(grpo.batch_stats(batch, logprobs, entropy, found))
                    loss.backward()
                clock.lap("update_seconds")
                added = []
                for a in algorithms:  # EWC, LwF, distillation, generative replay: added by their gradients
                    for loss in a.extra_losses(trainer):
                        policy.rank_share(loss).backward()
                        added.append(policy.whole(loss.detach()).item())
                clock.lap("extra_seconds")
                of_ranks = distributed.all_gather_json([stats, added])
                history.append([s for stats, _ in of_ranks for s in stats])
                added = [loss for _, added in of_ranks for loss in added]
                extra += [sum(added) / ranks] if added else []
                if not counts["tokens"] and not counts["replayed_tokens"] and not added:
                    continue

                # 6. Data parallelism: sum the raw gradients over ranks, clip, step.
                parameters = list(policy.trained_parameters(model).values())
                for p in parameters:
                    p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                    if ranks > 1 and not args.shard:  # FSDP has summed its gradients already
                        dist.all_reduce(p.grad)
                norm = policy.whole(torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)).item()
                if math.isfinite(norm) and math.isfinite(sum(s["loss"] for s in history[-1])):
                    optimizer.step()
                    state["skipped_in_a_row"] = 0
                else:
                    state["skipped_in_a_row"] += 1
                    if state["skipped_in_a_row"] == MAX_SKIPPED:
                        run.stop_diverged(trainer, trained + stored, norm)
                optimizer.zero_grad()
            clock.lap("update_seconds")

            # 7. What is remembered, and the log.
            run.remember(trainer, new)
            if phase == "warmup":
                loss = sum(s["loss"] for s in history[0])
                run.log(trainer, {"kind": "warmup", "domain": domain, "loss": loss})
                state["warm_steps"] = step + 1
                bar.set_postfix(loss=f"{loss:.3f}")
                if args.warmup_target is not None and loss < LOOK_BELOW and step % LOOK_EVERY == 0:
                    scores = run.evaluate(trainer, stop, "check", trainer.cold, step + 1)
                    state["warm"] = stage if min(scores.values()) >= args.warmup_target else state["warm"]
            else:
                run.log_conversations(trainer, records)
                trainer.trajectories = run.all_trajectories(trainer, trajectories, records)
                trainer.replayed_losses = run.stored_losses(trainer)
                for a in algorithms:
                    a.post_step_hook(trainer, domain)
                for t in trainer.trajectories if buffer is not None else ():
                    if all(a.keeps(t) for a in algorithms):
                        buffer.add(t, grpo.fresh_loss(t, args.gamma))
                clock.lap("hook_seconds")
                state["global_step"] += 1
                metrics = {**tracking.step_metrics(trainer, records, clock), **grpo.update_stats(history, counts)}
                metrics["grad_norm"] = norm
                if extra:
                    metrics["extra_loss"] = sum(extra) / args.num_iterations
                run.log(trainer, metrics)
                bar.set_postfix(reward=f"{metrics['reward']:.2f}", kl=f"{metrics['kl']:.3f}")

        elif phase == "baseline":
            checkpoint.save(trainer)
            state["baseline"] = run.evaluate(trainer, stop, "baseline", args.task_order, 0)
        elif phase == "start":  # of GRPO: the warm start is over
            if state["warm_steps"]:
                state["warm_start"].update(run.evaluate(trainer, stop, "warmup", trainer.cold, state["warm_steps"]))
            if args.kl_coef > 0 and args.kl_reference == "domain":
                trainer.reference = policy.snapshot(model)
            reset_momentum(optimizer)
        else:  # a domain ends: one row of the transfer matrix
            trainer.scores = run.evaluate(trainer, stop, "domain", args.task_order, 0)
            state["R"].append([trainer.scores[d] for d in args.task_order])
            for a in algorithms:
                a.post_task_hook(trainer, domain)
            run.end_of_domain(trainer)
            trainer.reference = None
            state |= {"warm_steps": 0, "checked": {}}
            reset_momentum(optimizer)

        # 8. Checkpoints: at the end of each phase, and every few GRPO steps.
        state["position"] = position + 1
        bar.update(position + 1 - bar.n)
        ended = plan[position + 1 :][:1] != [(stage, phase, step + 1)] or (phase == "warmup" and state["warm"] == stage)
        number = stop.on_any_rank()
        if ended or number or (phase == "grpo" and (step + 1) % args.checkpoint_every == 0):
            checkpoint.save(trainer)
        if phase == "evaluate" and any(a.keeps_no_data for a in algorithms):
            checkpoint.remove_old(trainer.run, keep=1)
        if number:
            raise checkpoint.Interrupted(number)
    bar.close()
    return run.finish(trainer)


# ------------------------------------------------------------------------------------------------- leaves of the loop


def schedule(args, stages) -> list[tuple[int, str, int]]:
    """(stage, phase, step within the phase) of every position of a run. The warm start may end early."""
    plan = [(0, "baseline", 0)]
    joint = stages != args.task_order
    for stage in range(len(stages)):
        cold = len(stages) if joint else 1  # domains that this stage's warm start has to warm up
        warmup = 0 if joint and stage > 0 else args.warmup_steps * cold
        plan += [(stage, "warmup", step) for step in range(warmup)]
        plan.append((stage, "start", 0))
        plan += [(stage, "grpo", step) for step in range(args.num_steps_per_task)]
        plan.append((stage, "evaluate", 0))
    return plan


def next_tasks(trainer: Trainer, tasks, stage, step) -> list[TaskRef]:
    """The new tasks of a step of all ranks; in a warm start, of those that were not at its target when it last looked.
    Past pass rates stay as they are for an epoch: an epoch has one order."""
    args, state, candidates = trainer.args, trainer.state, [ref for ref in tasks if ref.domain in trainer.domains]
    if trainer.phase == "warmup" and (checked := state["checked"]):
        candidates = [ref for ref in candidates if checked[ref.domain].get(ref.task_id, 0.0) < args.warmup_target]
    count = args.batch_size_per_gpu * args.gradient_accumulation_steps * distributed.world_size()
    epoch = [stage, trainer.phase, step * count // len(candidates)]
    if state["epoch"] != epoch:
        state["epoch"], state["epoch_rates"] = epoch, copy.deepcopy(state["pass_rates"])
    rates = {TaskRef(domain, id): rate for domain, of in state["epoch_rates"].items() for id, rate in of.items()}
    seed = [args.seed, stage, trainer.phase == "grpo"]
    return oracle.sample_tasks(candidates, count, step, seed, args.batch_order, rates)


def set_learning_rate(trainer: Trainer, step, conversations):
    """The rate of a step on this many conversations, decayed by those before it (ELRD, Buzzega et al. 2020,
    arXiv:2010.05595: lr = lr0 gamma^examples)."""
    args, state = trainer.args, trainer.state
    rate = args.warmup_learning_rate if trainer.phase == "warmup" else scheduled_rate(args, step)
    for group in trainer.optimizer.param_groups:
        group["lr"] = rate * args.lr_decay ** state["examples"]
    state["examples"] += conversations


def scheduled_rate(args, step) -> float:
    """The learning rate of a domain's GRPO step, from 0, before `lr_decay`."""
    progress = step / max(1, args.num_steps_per_task)
    decay = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return args.learning_rate * decay[args.lr_schedule]


def reset_momentum(optimizer):
    """Keep Adam's second moments between phases; reset momentum, which belongs to the old loss."""
    for moments in optimizer.state.values():
        moments["exp_avg"].zero_()


# --------------------------------------------------------------------------------------------------------- the script


def main(job=lambda: train(parse_args()), script="train.py"):
    """Calls `job` and exits. An error that a user can mend is one line; see the exit codes."""
    code, text = 0, ""
    try:
        job()
    except checkpoint.Interrupted as stop:
        code, text = 128 + stop.args[0], "\nsaved; continue with --resume"
    except KeyboardInterrupt:
        code, text = 130, "\nstopped at once; --resume continues a run from its last checkpoint"
    except (ValueError, OSError, distributed.StopRun) as error:
        code, text = 2, f"{script}: {one_line(error)}"
    except Exception as error:
        # The other ranks raise this when one is gone; the cause is that one's, which has shown it.
        lost = isinstance(error, dist.DistBackendError) or "gloo/transport" in str(error)
        code, text = 1, f"{script}: lost the connection to another rank" if lost else traceback.format_exc()
    if text and (code < 128 or distributed.rank() == 0):
        print_safely((f"[rank {distributed.rank()}] " if distributed.rank() > 0 else "") + text, file=sys.stderr)
    if code and distributed.world_size() > 1:
        os._exit(code)  # without waiting for the others in a destructor: torchrun stops them then
    if dist.is_initialized():
        dist.destroy_process_group()
    raise SystemExit(code)


if __name__ == "__main__":
    main()
