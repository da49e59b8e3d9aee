"""A run: opening it, the record that the loop and the hooks read, its directory and its logs."""

import dataclasses
import json
import os
import sys
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

import checkpoint
import distributed
import drift
import eval as evaluation
import grpo
import oracle
import policy
import regularize
import report
import rollout
import server
import tracking
import users
from algorithm import LIBRARY, CLAlgorithm, check_hooks, load_algorithm, own_attributes
from distributed import StopRun, append_jsonl, rank, say, world_size, write_json
from flags import Count
from grpo import TaskRef, Trajectory
from metrics import cl_metrics, transfer_so_far
from replay import TrajectoryBuffer
from text import printable

INITIAL_EVERY = 4  # steps between two that log the KL to the policy before any training: it costs a forward pass


@dataclass(kw_only=True)
class Flags:
    """The run's files."""

    run_name: str | None = None
    """directory under runs_dir. Default: algorithm, seed and time"""
    runs_dir: str = "runs"
    """directory of all runs"""
    resume: str | None = None
    """continue the run in this directory from its last checkpoint, with its own settings"""
    checkpoint_every: Count = 10
    """GRPO steps between checkpoints"""
    tracker: tracking.Tracker | None = None
    """also log to TensorBoard, into the run's directory, or to Weights & Biases (package tensorboard, and wandb)"""


@dataclass
class Trainer:
    """The run as hooks may read it."""

    args: object
    run: Path
    model: torch.nn.Module
    tokenizer: object
    algorithms: list[CLAlgorithm]
    tasks: dict[str, list]  # domain -> training tasks
    eval_tasks: dict[str, list]
    stages: list[str]  # the names of the rows of R
    optimizer: torch.optim.Optimizer
    initial: dict | None  # the policy before any training (policy.snapshot); LoRA needs none
    trajectory_buffer: TrajectoryBuffer | None
    state: dict  # where the run is; JSON, saved in checkpoints
    reference: dict | None = None  # the policy at the start of the domain's GRPO
    domain: str = ""
    phase: str = ""  # "warmup" or "grpo" during a step
    refs_P: list[TaskRef] = field(default_factory=list)  # of this step: the tasks of all ranks, ...
    rewards_P_G: torch.Tensor | None = None  # ... their rewards, NaN for conversations without one, ...
    sampled: list[Trajectory] = field(default_factory=list)  # ... this rank's conversations, ...
    trajectories: list[Trajectory] = field(default_factory=list)  # ... of all ranks, if an algorithm uses them, ...
    replayed: list[Trajectory] = field(default_factory=list)  # ... stored conversations in the batch, ...
    replayed_losses: list[float] = field(default_factory=list)  # ... their losses, ...
    batches: list[dict] = field(default_factory=list)  # ... and this rank's micro-batches (grpo.collate)
    scores: dict[str, float] = field(default_factory=dict)  # of the last evaluation
    custom_metrics: dict[str, float] = field(default_factory=dict)  # for the next record of the log
    own_attributes: list[dict] = field(default_factory=list)  # see checkpoint.warn_of_unsaved_state
    writer: object = None  # of TensorBoard
    started: float = field(default_factory=time.perf_counter)
    cpu_started: float = field(default_factory=time.process_time)

    @property
    def config(self):
        return self.args

    @property
    def step(self):
        """GRPO steps so far."""
        return self.state["global_step"]

    @property
    def domains(self):
        """The domains that new tasks are drawn from."""
        joint = any(a.all_domains for a in self.algorithms)
        return self.args.task_order if joint else [self.domain]

    @property
    def cold(self):
        """Those of them without a warm start."""
        return [d for d in self.domains if d not in self.state["warm_start"]]

    @property
    def seconds(self):
        """Seconds that the run has taken, without the time between a stop and a resume."""
        return self.state["seconds"] + time.perf_counter() - self.started

    @property
    def cpu_seconds(self):
        """The same of the processors, of all ranks. Every rank must ask."""
        return self.state["cpu_seconds"] + distributed.sum_over_ranks(time.process_time() - self.cpu_started)

    def log_custom_metric(self, name, value):
        """Adds a number to the next record of metrics.jsonl: that of the step in post_step_hook."""
        self.custom_metrics[name] = float(value)

    def seeded(self, purpose, step) -> torch.Generator:
        """Random numbers that depend on the seed, the rank and the position in the run only."""
        position = (self.args.task_order.index(self.domain), purpose, step, rank())
        return distributed.seeded_generator(self.model.device, self.args.seed, *position)


# ---------------------------------------------------------------------------------------------------------- opening


def set_up(args, algorithm, algorithms, device) -> Trainer:
    """Everything before the first step. Raises ValueError or OSError before anything is written."""
    config, folder = None, None
    if args.resume:
        run = Path(args.resume)
        given, (args, config) = args, checkpoint.read_config(type(args), run)
        if given.vllm_url:  # servers may have moved
            args.vllm_url, args.vllm_timeout = given.vllm_url, given.vllm_timeout
        checkpoint.lock(run)
        folder = next(reversed(checkpoint.checkpoints(run)), None)  # a run killed before its first one begins again
        saved = checkpoint.read(folder) if folder else None
        if folder is None and any(checkpoint.size_of(run / name) for name in checkpoint.LOGS):
            raise ValueError(f"cannot resume {run}: it has logs, but no checkpoint; begin another run")
    tracking.check(args.tracker)
    if config and algorithm is None and ":" not in args.cl_algorithm and args.cl_algorithm not in algorithms:
        made = f"{run} was started from code with an instance of {args.cl_algorithm}"
        raise ValueError(f"{made}; continue it with train(Args(resume=...), algorithm=...)")
    if config and algorithm is None and ":" in args.cl_algorithm:
        checkpoint.check_own_code(given, args, config)
    if algorithm is None:  # before the tasks: the file of a user's class may register a domain
        algorithm = load_algorithm(args.cl_algorithm, algorithms, args)
    else:
        args = dataclasses.replace(args, cl_algorithm=type(algorithm).__name__)
    check_hooks(algorithm)
    users.check(args.user)
    tasks = oracle.training_tasks(args)
    eval_tasks = oracle.evaluation_tasks(args, tasks)
    if config and config["train_tasks"] != checkpoint.task_ids(tasks):
        raise ValueError(f"cannot resume {run}: the train_tasks of its config.json are not those of this tau2")
    algorithms = [algorithm, *regularize.penalties(args, algorithm), *drift.loggers(args)]
    users.prepare(args.user, os.environ.get("OPENAI_BASE_URL"), model_dtype=args.model_dtype, device=device)
    args.kl_reference = args.kl_reference or ("initial" if args.lora_rank else "domain")
    corpus = None
    if args.model_name_or_path == "tiny":  # the tokenizer is trained on these tasks; the policy knows no others
        corpus = [text[:400] for d in tasks for text in oracle.corpus(d, tasks[d])]

    def load(source, lora_rank=args.lora_rank):
        names = ("seed", "weights_dtype", "attn_implementation", "gradient_checkpointing")
        settings = {**{name: getattr(args, name) for name in names}, "corpus": corpus, "lora_rank": lora_rank}
        model, tokenizer = policy.load_policy(
            str(source), args.model_dtype, "cpu" if args.shard else device, **settings
        )
        if not policy.trained_parameters(model):
            raise ValueError(f"{source} has a LoRA adapter; name its rank with --lora_rank to train it")
        if args.shard:
            policy.shard(model)
        return model, tokenizer

    tiny_lora = not folder and args.model_name_or_path == "tiny" and args.lora_rank > 0
    initial = policy.snapshot(load(args.model_name_or_path)[0]) if folder and not args.lora_rank else None
    model, tokenizer = load(folder or args.model_name_or_path, 0 if tiny_lora else args.lora_rank)
    if not folder and not args.lora_rank:
        initial = policy.snapshot(model)
    limits = (args.max_context, args.max_user_tokens, args.max_tool_tokens)
    for handed in rollout.check_engine(model, args):
        checkpoint.lock(handed)
    for domain, task in [(d, t) for found in (tasks, eval_tasks) for d, ts in found.items() for t in ts]:
        episode = oracle.Episode(domain, task, users.scripted_like(args.user), args.max_turns)
        rollout.check_opening(model, tokenizer, episode, *limits)
    if config is None:
        run = checkpoint.new_run(args, tasks, eval_tasks)
        checkpoint.lock(run)
    if tiny_lora:  # an adapter's directory names its base, which must be a directory, too
        weights = policy.gathered_weights(model)
        if rank() == 0:
            policy.save_policy(model, tokenizer, run / "base", weights)
        distributed.barrier()
        model, tokenizer = load((run / "base").resolve())
    # Not foreach: it needs another copy of the weights for a moment.
    parameters = policy.trained_parameters(model).values()
    optimizer = torch.optim.AdamW(parameters, args.learning_rate, weight_decay=0.0, foreach=False)
    order, buffer = args.task_order, next((b for a in algorithms if (b := a.make_buffer())), None)
    if buffer is None and type(algorithm).__module__ not in LIBRARY and not algorithm.keeps_no_data:
        buffer = TrajectoryBuffer(args.replay_buffer_size, args.buffer_policy, args.seed)
    stages = [f"{k + 1}/{len(order)} of all" for k in range(len(order))] if algorithm.all_domains else order
    names = (args, run, model, tokenizer, algorithms, tasks, eval_tasks, stages, optimizer, initial, buffer)
    trainer = Trainer(*names, state=initial_state(), writer=tracking.open_writer(args, run))
    for a in algorithms:
        a.trainer = trainer
    trainer.own_attributes = [own_attributes(a, args) for a in algorithms]
    if folder:
        checkpoint.load(trainer, folder, saved)
    announce(trainer)
    return trainer


def initial_state() -> dict:
    """Where a run is; JSON."""
    return {
        "position": 0,  # in the schedule
        "warm": -1,  # the stage whose warm start has reached its target
        "warm_steps": 0,  # of the current stage
        "checked": {},  # the mean rewards of its tasks when it last looked, by domain and id
        "global_step": 0,  # GRPO steps so far
        "skipped_in_a_row": 0,  # updates without a finite gradient
        "replayed": {"grpo": {}, "warmup": {}},  # conversations, and demonstrations, by domain
        "pass_rates": {},  # of each training task's last group, by domain and id
        "epoch": None,  # of the tasks: stage, phase, number
        "epoch_rates": {},  # the pass rates when it began
        "examples": 0,  # conversations trained on so far, demonstrations and replayed ones included
        "conversations": 0,  # of GRPO steps, so far, and ...
        "sampled_tokens": 0,  # ... their sampled tokens
        "seconds": 0.0,
        "cpu_seconds": 0.0,
        "ranks": world_size(),
        "baseline": {},
        "warm_start": {},
        "evaluation": {},
        "R": [],
    }


def announce(trainer: Trainer):
    """Tells the user what is about to run."""
    args, ranks = trainer.args, world_size()
    size = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    say(f"{args.cl_algorithm} on {args.model_name_or_path} ({size:.1f}M parameters), {ranks} rank(s)")
    number = {d: len(tasks) for d, tasks in trainer.tasks.items()}
    fields = dataclasses.fields(args)
    usual = {f.name: f.default_factory() if f.default is dataclasses.MISSING else f.default for f in fields}
    changed = [f"{name} {getattr(args, name)}" for name in usual if getattr(args, name) != usual[name]]
    say(f"settings that are not the defaults of a real model: {', '.join(changed)}")
    say(f"training tasks: {number}; evaluated on the {args.eval_split} split, {args.user} user")
    if trainer.state["ranks"] != ranks:
        say(f"resuming with {ranks} ranks a run of {trainer.state['ranks']}: batches change their size")
        trainer.state["ranks"] = ranks
    if args.kl_estimator == "k1" and args.kl_coef > 0:
        say("the gradient of kl_estimator k1 has the expectation 0: its penalty holds nothing; choose k2 or k3")
    say(f"writing {trainer.run}")


# --------------------------------------------------------------------------------------------------------------- logs


def log_conversations(trainer: Trainer, records):
    """A step's conversations, of all ranks, are counted, and go into trajectories.jsonl."""
    trainer.state["conversations"] += len(records)
    trainer.state["sampled_tokens"] += sum(record["tokens"] for record in records)
    for k, record in enumerate(records):
        position = {"global_step": trainer.step, "sample": k % trainer.args.num_samples_per_prompt}
        record.update(kind="rollout", replayed=record["domain"] not in trainer.domains, **position)
    append_jsonl(trainer.run / "trajectories.jsonl", records)


def log(trainer, record):
    """A line in metrics.jsonl, and its numbers in TensorBoard."""
    position = {"global_step": trainer.step, "seconds": round(trainer.seconds, 2)}
    for name in trainer.custom_metrics.keys() & {*record, *position}:
        raise ValueError(f"log_custom_metric: {name!r} is a name of the log's own; choose another")
    record = {**record, **trainer.custom_metrics}
    trainer.custom_metrics = {}
    append_jsonl(trainer.run / "metrics.jsonl", [{**record, **position}])
    tracking.write(trainer.writer, record, trainer.step)


# ------------------------------------------------------------------------------------------------------ of one step


def demonstration(args, tokenizer, domain, task) -> Trajectory:
    """The task's gold conversation, as the policy would have to say it."""
    user = users.scripted_like(args.user)
    turns = oracle.agent_turns(oracle.demonstrate(domain, task, user))
    episode = oracle.Episode(domain, task, user, max_turns=len(turns) + 1)
    return rollout.demonstration(tokenizer, episode, turns, args.max_user_tokens, args.max_tool_tokens)


def drawn(trainer: Trainer) -> str:
    """The state of the algorithms' and the buffer's draws, if a server may fail in the rollout that follows."""
    if trainer.args.rollout_engine != "vllm":
        return ""
    buffer = trainer.trajectory_buffer
    states = [algorithm.state_dict() for algorithm in trainer.algorithms]
    return json.dumps([states, buffer and buffer.rng.bit_generator.state])


@contextmanager
def saved_before(trainer: Trainer, draws: str):
    """If a server fails inside: saves the run as it was at the beginning of the step, which a resumed run does again.
    Then raises StopRun."""
    try:
        yield
    except server.ServerFailed as error:
        states, rng = json.loads(draws)
        for algorithm, state in zip(trainer.algorithms, states, strict=True):
            algorithm.load_state_dict(state)
        if trainer.trajectory_buffer is not None:
            trainer.trajectory_buffer.rng.bit_generator.state = rng
        checkpoint.save(trainer)
        raise StopRun(f"{error}; the run is saved, continue with --resume {trainer.run}") from None


@torch.no_grad()
def add_logprobs(trainer: Trainer):
    """Adds to each micro-batch what other policies say of its tokens: the reference policy of the KL penalty; in every
    INITIAL_EVERY-th step, for the log, the policy before any training; and for a correction of the sampler, the policy
    itself, which then takes the sampler's place."""
    args, model = trainer.args, trainer.model
    for batch in trainer.batches if args.sampler_correction != "none" else ():
        inputs = (batch["ids"], batch["attention_mask"], args.temperature, batch["mask"])
        logprobs = policy.token_logprobs(model, *inputs)  # of stored ones, too: shards need as many passes on all ranks
        if not batch["replayed"].any():  # those keep the policy that sampled them
            grpo.correct_sampler(batch, logprobs, args.sampler_correction, args.sampler_cap)
    needed = args.kl_coef > 0 and args.kl_reference == "initial"
    policies = {}
    if needed or trainer.step % INITIAL_EVERY == 0:
        policies["initial_logprobs"] = trainer.initial
    if args.kl_coef > 0 and args.kl_reference == "domain":
        policies["ref_logprobs"] = trainer.reference
    for name, weights in policies.items():
        with policy.weights_of(model, weights):
            for batch in trainer.batches:
                inputs = (batch["ids"], batch["attention_mask"], args.temperature, batch["mask"])
                batch[name] = policy.token_logprobs(model, *inputs)
    if needed:
        for batch in trainer.batches:
            batch["ref_logprobs"] = batch["initial_logprobs"]


def stop_diverged(trainer: Trainer, trajectories, norm):
    """Leaves this rank's batch for inspection and raises StopRun on every rank."""
    path = trainer.run / f"not_finite_rank{rank()}.json"
    rows = [dataclasses.asdict(dataclasses.replace(t, messages=[])) for t in trajectories]
    write_json(path, {"global_step": trainer.step, "grad_norm": norm, "trajectories": rows})
    raise StopRun(
        f"{trainer.state['skipped_in_a_row']} updates in a row had no finite loss or gradient (norm {norm}); the "
        f"weights are from before them, the last batch is in {path}"
    )


def all_trajectories(trainer: Trainer, trajectories, records) -> list[Trajectory]:
    """The usable conversations of all ranks, with messages as JSON; none if nothing uses them."""
    if trainer.trajectory_buffer is None and not any(a.uses_trajectories for a in trainer.algorithms):
        return []
    usable = [t.usable(trainer.args.mask_truncated) for t in trajectories]
    rows = [
        {**vars(t), "messages": []} if u else None  # the records have them, as JSON
        for t, u in zip(trajectories, usable, strict=True)
    ]
    rows = distributed.gathered_in_order(rows, len(trainer.refs_P), trainer.args.num_samples_per_prompt)
    pairs = zip(rows, records, strict=True)
    return [Trajectory(**{**row, "messages": record["messages"]}) for row, record in pairs if row is not None]


def stored_losses(trainer: Trainer) -> list[float]:
    """The losses of the step's stored conversations, in the order of trainer.replayed."""
    stored = [batch for batch in trainer.batches if "losses" in batch]
    pairs = [pair for batch in stored for pair in zip(batch["indices"], batch["losses"], strict=True)]
    mine = [loss for _, loss in sorted(pairs)]
    return distributed.gathered_in_order(mine, len(trainer.replayed), 1)


def evaluate(trainer: Trainer, stop, stage, domains, step) -> dict[str, float]:
    """The mean reward of each domain; all metrics are logged. Stage "check" is a look in the warm start: on training
    tasks, with the mean reward of each domain's hardest one."""
    args, check = trainer.args, stage == "check"
    tasks = trainer.tasks if check else trainer.eval_tasks
    purpose = 2 + ("check", "warmup", "baseline", "domain").index(stage)

    def record(records):
        position = {"kind": "evaluation", "stage": stage, "global_step": trainer.step}
        append_jsonl(trainer.run / "trajectories.jsonl", [{**position, **r} for r in records])

    try:
        details = evaluation.evaluate_tasks(
            trainer.model,
            trainer.tokenizer,
            {domain: tasks[domain] for domain in domains},
            num_trials=max(1, args.eval_trials // 2) if check else args.eval_trials,
            on_records=record,
            on_record=stop.leave_evaluation,
            user=args.user,
            max_turns=args.max_turns,
            evaluation_type=args.evaluation_type,
            pass_threshold=args.pass_threshold,
            seed=trainer.seeded(purpose, step).initial_seed(),
            label=f"evaluate ({', '.join(domains)})",
            **rollout.settings(args),
        )
    except server.ServerFailed as error:
        raise StopRun(f"{error}; continue with --resume {trainer.run}") from None
    scores = {domain: values["reward_mean"] for domain, values in details.items()}
    trainer.state["evaluation"] = details if stage == "domain" else trainer.state["evaluation"]
    if check:
        trainer.state["checked"] = {domain: values["by_task"] for domain, values in details.items()}
        scores = {domain: min(means.values(), default=0.0) for domain, means in trainer.state["checked"].items()}
    about = {"kind": "evaluation", "stage": stage, "domain": trainer.domain}
    log(trainer, {**about, "scores": scores, "details": details})
    return scores


def remember(trainer: Trainer, new):
    """Counts what algorithms have added to the step's `new` tasks and to its batch, and notes the pass rates."""
    each = trainer.args.num_samples_per_prompt if trainer.phase == "grpo" else 1
    found = Counter(trainer.state["replayed"][trainer.phase])
    found.update(t.domain for t in trainer.replayed)
    for ref, number in (Counter(trainer.refs_P) - Counter(new)).items():
        found[ref.domain] += number * each
    trainer.state["replayed"][trainer.phase] = dict(found)
    for ref, rewards_G in zip(trainer.refs_P, trainer.rewards_P_G, strict=True) if trainer.phase == "grpo" else ():
        if len(valid := rewards_G[~rewards_G.isnan()]):
            passed = (valid >= trainer.args.pass_threshold).float().mean().item()
            trainer.state["pass_rates"].setdefault(ref.domain, {})[ref.task_id] = passed


def end_of_domain(trainer: Trainer):
    """Shows and logs what a domain has left behind: scores, transfer so far, statistics of the algorithms."""
    stage, order = trainer.stages[len(trainer.state["R"]) - 1], trainer.args.task_order
    say(f"after {stage}: " + "  ".join(f"{domain} {trainer.scores[domain]:.2f}" for domain in order))
    found = statistics_of(trainer)
    if found:
        say(f"statistics of {trainer.args.cl_algorithm} after {stage}")
    for name, value in found.items():
        say(printable(f"  {name}: {value}"))
    transfer = transfer_so_far(trainer.state["R"]) if trainer.stages == order else {}
    log(trainer, {"kind": "transfer", "domain": trainer.domain, **transfer, "statistics": found})


def statistics_of(trainer: Trainer) -> dict:
    return {name: value for a in trainer.algorithms for name, value in a.get_statistics().items()}


# ----------------------------------------------------------------------------------------------------------- the end


def finish(trainer: Trainer) -> dict:
    """Writes summary.json and the report, shows the result, and returns the summary."""
    args, state, run = trainer.args, trainer.state, trainer.run
    order, buffer, config = args.task_order, trainer.trajectory_buffer, json.loads((run / "config.json").read_bytes())
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
    versions.update(oracle.data_version())
    solo = ", ".join(domain for domain in order if oracle.is_solo(domain, args.user))
    note = f"{args.user} user{f' ({solo}: solo mode)' if solo else ''}, {args.eval_split} split, {versions['tau2']}"
    if args.model_name_or_path == "tiny":
        note += "; the embedded policy memorises a few training tasks, this is no benchmark score"
    kept = buffer.bytes_kept() if buffer is not None else 0
    summary = {
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
        "metrics": cl_metrics(state["R"], [state["baseline"][d] for d in order]),
        "evaluation": state["evaluation"],
        "do_nothing_rate": {d: state["evaluation"][d]["do_nothing_rate"] for d in order},
        "statistics": statistics_of(trainer),
        "bytes_kept": kept + sum(algorithm.bytes_kept() for algorithm in trainer.algorithms),
        "conversations": state["conversations"],
        "sampled_tokens": state["sampled_tokens"],
        "cpu_seconds": trainer.cpu_seconds,
        "minutes": trainer.seconds / 60,
        "ranks": world_size(),
        "versions": versions,
        "config": dataclasses.asdict(args),
        "command": config["command"],
        "revision": ", then ".join(dict.fromkeys([config.get("revision", "unknown"), checkpoint.revision()])),
    }
    if rank() == 0:
        write_json(run / "summary.json", summary)
        report.write_report(run)
    say("\n" + report.text_matrix(summary) + "\n")
    say("  ".join(f"{name} {value:.2f}" for name, value in summary["metrics"].items() if value is not None))
    say(f"{summary['minutes']:.1f} minutes; report: {run / 'report.md'}")
    return summary
