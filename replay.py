"""What is remembered: replay buffers and sampling as pure functions, and the continual-learning algorithms.

    python replay.py                 the channel-prediction experiment: buffers compared on a supervised problem
    python replay.py --laws          shows what each buffer policy keeps of a stream
    python replay.py --benchmark     offers per second

Data flow: a finished group -> add -> Buffer -> sample -> augment_batch -> the next batch's rollouts.

To change what is kept, change `add`; what is replayed, `sample`; how much, `replay_count` and `adapt_ratio`. A
class of your own (a subclass of CLAlgorithm) runs with `python train.py --cl_algorithm path/to/file.py:MyClass`.
"""

import copy
import csv
import importlib.util
import inspect
import json
import math
import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field, is_dataclass
from multiprocessing import Pipe, get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

STRATEGIES = ("random", "high_reward", "recent", "balanced")
POLICIES = ("reservoir", "brs", "lars", "labrs", "random", "recent")
TASK_POLICIES = ("reservoir", "recent")  # a task that is rolled out anew has no loss, and a buffer per domain one label


# ----------------------------------------------------------------------------------------------- buffers


@dataclass
class Buffer:
    """At most `capacity` items, with a label, loss and reward each; `seen` counts every offer, kept or not, and
    `order` holds the offer number of each item (parallel lists)."""

    capacity: int
    items: list = field(default_factory=list)
    labels: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    rewards: list = field(default_factory=list)
    order: list = field(default_factory=list)
    seen: int = 0

    def __post_init__(self):
        if self.capacity < 1:
            raise ValueError(f"a buffer's capacity must be at least 1, got {self.capacity}")
        lengths = {len(values) for values in (self.items, self.labels, self.losses, self.rewards, self.order)}
        if len(lengths) != 1 or len(self.items) > self.capacity:
            raise ValueError(f"a buffer's lists must be equally long, and {self.capacity} at most; got {lengths}")


def reservoir_slot(seen, capacity, rng) -> int | None:
    """The slot for the item that comes after `seen` earlier ones, None to discard it (Vitter 1985, algorithm R).

    After N offers every item is kept with probability capacity / N. The draw is from 0..seen inclusive; leaving
    `seen` out, as several published codes do, favours late items.
    """
    if seen < capacity:
        return seen
    slot = int(rng.random() * (seen + 1))  # five times as fast as rng.integers, and as even up to 2**-53
    return slot if slot < capacity else None


def brs_slot(labels, rng) -> int:
    """The slot to overwrite by balanced reservoir sampling (Buzzega et al. 2020, arXiv:2010.05595): uniform over the
    items of a label that has the most items, one such label drawn at random.

    With the reservoir's gate before it, plentiful labels end equal; a rare one keeps what the gate let in of it.
    """
    counts = Counter(labels)
    most = max(counts.values())
    fullest = _one_of([label for label, count in counts.items() if count == most], rng)
    return _one_of([slot for slot, label in enumerate(labels) if label == fullest], rng)


def lars_slot(losses, rng) -> int:
    """The slot to overwrite by loss-aware reservoir sampling (Buzzega et al. 2020, arXiv:2010.05595), with the min-max
    weights p ~ (max - loss) + (max - min) / n: what is learnt already (a low loss) goes first.

    The second term keeps every slot possible, also that of the greatest loss, which may be noise. Equal losses are
    uniform. Raises ValueError for a loss that is not finite.
    """
    losses = _finite(losses)
    spread = losses.max() - losses.min()
    if spread == 0:
        return int(rng.integers(len(losses)))
    return _draw(losses.max() - losses + spread / len(losses), rng)


def labrs_slot(losses, labels, rng, scaling="balanced") -> int:
    """The slot to overwrite by loss-aware balanced reservoir sampling (Buzzega et al. 2020, arXiv:2010.05595): likelier
    where the loss is low and where the label has many items.

    "balanced": p ~ I + B + 1/n with I = (max - loss) / (max - min) and B the number of items of the label, scaled
    from 0 to 1 in the same way: both count the same. "released", as in the authors' code: s = I / (2 mean|I| mean|B|)
    + B / 2 with I = -loss and B the number itself, p ~ s scaled from 0 to 1, + 1/n; there B all but hides I. The 1/n,
    which is ours, keeps every slot possible; where all terms are equal the draw is uniform. Raises ValueError for a
    loss that is not finite, for other lengths and for an unknown scaling.
    """
    if scaling not in ("balanced", "released"):
        raise ValueError(f"unknown scaling {scaling!r}; choose balanced or released")
    if len(losses) != len(labels):
        raise ValueError(f"{len(losses)} losses for {len(labels)} labels; there must be one each")
    counts, array, n = Counter(labels), _finite(losses), len(losses)
    if scaling == "released":
        size = np.array([counts[label] for label in labels], dtype=float)
        score = -0.5 * array / max(np.abs(array).mean() * size.mean(), 1e-12) + 0.5 * size
        return _draw((score - score.min()) / (np.ptp(score) or 1.0) + 1 / n, rng)
    high = float(array.max())
    spread = high - float(array.min()) or 1.0
    fewest = min(counts.values())
    range_of_counts = max(counts.values()) - fewest or 1
    while True:  # by rejection, since the weights of all slots would take four times as long
        slot = int(rng.random() * n)
        weight = (high - losses[slot]) / spread + (counts[labels[slot]] - fewest) / range_of_counts + 1 / n
        if rng.random() * (2 + 1 / n) < weight:
            return slot


def _finite(losses):
    losses = np.asarray(losses, dtype=float)
    if not np.isfinite(losses).all():
        raise ValueError(f"losses must be finite, got {losses[~np.isfinite(losses)][0]}")
    return losses


def _draw(weights, rng) -> int:
    """An index with probability in proportion to its weight."""
    total = weights.cumsum()
    return int(total.searchsorted(rng.random() * total[-1], side="right"))


def _one_of(values, rng):
    return values[int(rng.integers(len(values)))]


def add(buffer, item, *, label=None, loss=0.0, reward=0.0, policy="reservoir", rng) -> int | None:
    """Offers an item to the buffer, in place. Returns the slot written, None if it was discarded.

    The policies have the reservoir's gate, which lets item n + 1 in with probability capacity / (n + 1), and differ in
    what makes room for it: a uniformly drawn item (reservoir), `brs_slot`, `lars_slot` or `labrs_slot`. Two have none:
    "random" puts every item in the place of a uniformly drawn one, so that an item survives k later offers with
    probability (1 - 1 / capacity)^k, and "recent" keeps the latest. Raises ValueError for an unknown policy, or a loss
    or reward that is not finite.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown buffer policy {policy!r}; choose one of {', '.join(POLICIES)}")
    if not (math.isfinite(loss) and math.isfinite(reward)):
        raise ValueError(f"loss and reward of an item must be finite, got {loss} and {reward}")
    if policy == "recent":
        slot = buffer.seen % buffer.capacity
    elif policy == "random":
        slot = int(rng.integers(buffer.capacity))
    else:
        slot = reservoir_slot(buffer.seen, buffer.capacity, rng)
    buffer.seen += 1
    if slot is None:
        return None
    row = (item, label, float(loss), float(reward), buffer.seen - 1)
    lists = (buffer.items, buffer.labels, buffer.losses, buffer.rewards, buffer.order)
    if len(buffer.items) < buffer.capacity:
        for values, value in zip(lists, row, strict=True):
            values.append(value)
        return len(buffer.items) - 1
    if policy == "brs":
        slot = brs_slot(buffer.labels, rng)
    elif policy == "lars":
        slot = lars_slot(buffer.losses, rng)
    elif policy == "labrs":
        slot = labrs_slot(buffer.losses, buffer.labels, rng)
    for values, value in zip(lists, row, strict=True):
        values[slot] = value
    return slot


def sample(buffer, n, *, strategy="random", rng) -> list[int]:
    """`n` indices into the buffer; without replacement as long as there are enough candidates.

    random       uniform over the items
    high_reward  uniform over the items with a reward above 0, if there are any
    recent       the n offered last
    balanced     labels in turn, in random order, uniform within a label
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown replay strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    if n == 0 or not buffer.items:
        return []
    candidates = np.arange(len(buffer.items))
    if strategy == "recent":
        latest = np.argsort(buffer.order)[::-1]
        return [int(latest[i % len(latest)]) for i in range(n)]
    if strategy == "high_reward" and max(buffer.rewards) > 0:
        candidates = candidates[np.array(buffer.rewards) > 0]
    if strategy == "balanced":
        groups = {}
        for index in rng.permutation(candidates):
            groups.setdefault(buffer.labels[index], []).append(int(index))
        labels = [list(groups)[i] for i in rng.permutation(len(groups))]
        rounds = [groups[labels[i % len(labels)]] for i in range(n)]
        return [group[i // len(labels) % len(group)] for i, group in enumerate(rounds)]
    shuffled = [rng.permutation(candidates) for _ in range(math.ceil(n / len(candidates)))]
    return [int(index) for index in np.concatenate(shuffled)[:n]]


def update_losses(buffer, indices, losses) -> None:
    """Replaces the losses of items that were replayed, one for each: what the loss-aware policies go by. Raises
    ValueError for other lengths or a loss that is not finite, and then changes nothing."""
    losses = _finite(losses)
    if len(losses) != len(indices):
        raise ValueError(f"{len(losses)} losses for {len(indices)} items; there must be one each")
    for index, loss in zip(indices, losses.tolist(), strict=True):
        buffer.losses[index] = loss


def update_rewards(buffer, indices, rewards) -> None:
    """Replaces the rewards of items that were played again."""
    for index, reward in zip(indices, rewards, strict=True):
        buffer.rewards[index] = float(reward)


def save_buffer(buffer, path, min_reward=None) -> int:
    """Writes a buffer as JSON lines, the first for the buffer and one for each item: aside and renamed, so that the
    file is whole or not there. Items must be what json.dumps takes, or dataclasses. `min_reward`: only items with at
    least this reward, for analysis. Returns the number of items written."""
    rows = []
    for item, label, loss, reward, order in zip(
        buffer.items, buffer.labels, buffer.losses, buffer.rewards, buffer.order, strict=True
    ):
        if min_reward is None or reward >= min_reward:
            item = asdict(item) if is_dataclass(item) else item
            rows.append({"item": item, "label": label, "loss": loss, "reward": reward, "order": order})
    head = {"capacity": buffer.capacity, "seen": buffer.seen, "items": len(rows)}
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in [head, *rows])
    temporary.replace(path)
    return len(rows)


def load_buffer(path, make_item=None) -> Buffer:
    """The buffer of a file of `save_buffer`; `make_item(item)`: what an item is made of, where it is not JSON itself.
    Raises ValueError where lines are missing or damaged."""
    try:
        with open(path) as lines:
            head, *rows = map(json.loads, lines)
        if len(rows) != head["items"]:
            raise ValueError(f"it has {len(rows)} items, its first line says {head['items']}")
        columns = {name: [row[name] for row in rows] for name in ("item", "label", "loss", "reward", "order")}
        items = columns["item"] if make_item is None else [make_item(item) for item in columns["item"]]
        rest = (columns["label"], columns["loss"], columns["reward"], columns["order"])
        return Buffer(head["capacity"], items, *rest, seen=int(head["seen"]))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a whole buffer: {error}") from error


def replay_count(new, ratio, rng) -> int:
    """How many replayed items make `ratio` the share of a mixed batch with `new` new ones: new * ratio / (1 - ratio),
    rounded up or down at random so that the expectation is right (0.1 of a batch of 4 is not zero)."""
    if not 0 <= ratio < 1:
        raise ValueError(f"the replay ratio must be in [0, 1), got {ratio}")
    exact = new * ratio / (1 - ratio)
    return int(exact) + int(rng.random() < exact - int(exact))


def adapt_ratio(ratio, drop, *, threshold, rate, minimum, maximum) -> float:
    """The ratio after a previous domain's score fell by `drop` from its best: up by `rate` if that is more than
    `threshold`, else down by a tenth of it; within [minimum, maximum]."""
    ratio = ratio + rate if drop > threshold else ratio - rate / 10
    return min(max(ratio, minimum), maximum)


# -------------------------------------------------------------------------------------------- algorithms


@dataclass(frozen=True)
class TaskRef:
    """A task by name: what a batch consists of and what a buffer of tasks holds."""

    domain: str
    task_id: str


class CLAlgorithm:
    """What happens to a batch, a loss and a policy besides GRPO itself. Every rank holds the same state and makes the
    same draws, on the whole batch of all ranks; ranks then share the batch out.

    all_domains: batches are drawn from every domain from the start, in as many stages as there are domains.
    stores_trajectories: it needs trainer.finished.
    keeps_no_data: when a domain has ended, checkpoints from before its end are removed.

    trainer.groups: this step's groups on all ranks (task: TaskRef, replayed: bool, rewards: list of float, None
    where invalid); trainer.finished: this step's conversations on all ranks, as they may be stored (see
    TrajectoryReplayCL), each with its loss; trainer.replayed_losses: one for each of augment_trajectories;
    trainer.batches: this rank's micro-batches (train.make_batches) of the conversations or demonstrations that the step
    learns from; trainer.scores: {domain: mean reward} of the last evaluation; trainer.step, trainer.model, ...
    """

    all_domains = False
    stores_trajectories = False
    keeps_no_data = False

    @classmethod
    def from_args(cls, args):
        """An instance from train.py's flags: those that the constructor names, and where it takes **kwargs those
        that its parents' constructors name. A flag that is None leaves a default as it is."""
        flags = {}
        for parent in cls.__mro__:
            parameters = inspect.signature(parent.__init__).parameters
            for name, parameter in parameters.items():
                if hasattr(args, name) and (getattr(args, name) is not None or parameter.default is parameter.empty):
                    flags[name] = getattr(args, name)
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
        return cls(**flags)

    def augment_batch(self, new_tasks: list[TaskRef], current_domain: str) -> list[TaskRef]:
        """The tasks to roll out: the new ones, and what is replayed with them."""
        return new_tasks

    def augment_trajectories(self, new: int, current_domain: str, successful=False) -> list[dict]:
        """Stored conversations to train on beside a step's `new` conversations, or, in the warm start, beside so many
        demonstrations: then those that earned a reward only."""
        return []

    def extra_loss(self, trainer):
        """A scalar tensor to add to the step's loss, or None; asked before every optimiser step, also of the warm start
        (trainer.state["stage"] is "warmup" or "grpo"). Or an iterator of such, whose sum it is: each is learnt from,
        and its graph freed, before the next is asked for.

        Every rank computes the same, or its share of a mean over ranks: the ranks' tensors are averaged. A penalty on
        the weights takes them from grpo.trained_parameters(trainer.model), which also serves sharded ones.
        """
        return None

    def post_step_hook(self, trainer, domain):
        """After each optimiser step."""

    def post_task_hook(self, trainer, domain):
        """After a domain is finished and all domains are evaluated."""

    def get_statistics(self) -> dict:
        return {}

    def bytes_kept(self) -> int:
        """The size of what is remembered, as it is saved."""
        state = self.state_dict()
        return len(json.dumps(state)) if state else 0

    def save(self, folder: Path):
        """Writes what is too large for `state_dict` into a checkpoint's directory, on rank 0."""

    def load(self, folder: Path):
        """Reads what `save` wrote, after `load_state_dict`."""

    def snapshots(self) -> dict[str, list[torch.Tensor]]:
        """Tensors of the policy's shape that it keeps (grpo.snapshot), by name: train.py saves them in checkpoints."""
        return {}

    def load_snapshots(self, snapshots):
        """Takes back what was saved of `snapshots`, after `load`."""

    def state_dict(self) -> dict:
        """Everything that a resumed run needs, as JSON."""
        return {}

    def load_state_dict(self, state):
        if state:
            raise ValueError(f"{type(self).__name__} cannot restore {sorted(state)}")


class SequentialCL(CLAlgorithm):
    """One domain after another and nothing against forgetting: the baseline."""


class JointCL(CLAlgorithm):
    """All domains at once, for as many steps as the sequence of them takes: what a method that forgets nothing and
    learns as well could reach."""

    all_domains = True


class ReplayCL(CLAlgorithm):
    """Old tasks, drawn from a buffer per domain, are rolled out again by the current policy, beside the new ones.

    replay_ratio: their share of the mixed batch, in [0, 1); replay_strategy: see `sample`; min_buffer_size: a domain
    with fewer stored items is not replayed; replay_all_domains: False replays the latest previous domain only.
    """

    policies = TASK_POLICIES

    def __init__(
        self,
        replay_ratio=0.2,
        replay_strategy="random",
        min_buffer_size=10,
        replay_all_domains=True,
        replay_buffer_size=1000,
        buffer_policy="reservoir",
        seed=0,
    ):
        if not 0 <= replay_ratio < 1:
            raise ValueError(f"replay_ratio must be in [0, 1), got {replay_ratio}")
        if replay_strategy not in STRATEGIES:
            raise ValueError(f"unknown replay_strategy {replay_strategy!r}; choose one of {', '.join(STRATEGIES)}")
        if buffer_policy not in self.policies:
            other = " (of trajectories also brs, lars, labrs, random)" if self.policies == TASK_POLICIES else ""
            names = ", ".join(self.policies) + other
            raise ValueError(f"buffer_policy {buffer_policy!r} is none for what is stored here; choose one of {names}")
        if replay_buffer_size < 1:
            raise ValueError(f"replay_buffer_size must be at least 1, got {replay_buffer_size}")
        if not 1 <= min_buffer_size <= replay_buffer_size:
            raise ValueError(
                f"min_buffer_size must be from 1 to replay_buffer_size ({replay_buffer_size}), got {min_buffer_size}"
            )
        self.ratio = replay_ratio
        self.strategy = replay_strategy
        self.min_buffer_size = min_buffer_size
        self.replay_all_domains = replay_all_domains
        self.capacity = replay_buffer_size
        self.policy = buffer_policy
        self.rng = np.random.default_rng([seed, 1])
        self.buffers: dict[str, Buffer] = {}  # by domain, in the order of training
        self.offered: dict[str, list[str]] = {}  # task ids offered, so that none is offered twice
        self.replayed: dict[str, int] = {}

    def draw(self, new, current_domain, strategy) -> list[tuple[str, int]]:
        """What to replay beside `new` new items: domain and index into its buffer, as evenly over the previous domains
        as the count allows."""
        previous = [d for d in self.buffers if d != current_domain]
        previous = previous if self.replay_all_domains else previous[-1:]
        ready = [d for d in previous if len(self.buffers[d].items) >= self.min_buffer_size]
        if not ready:
            return []
        count = replay_count(new, self.ratio, self.rng)
        turns = [ready[i] for i in self.rng.permutation(len(ready))]
        drawn = []
        for k, domain in enumerate(turns):
            share = count // len(turns) + (k < count % len(turns))
            drawn += [(domain, i) for i in sample(self.buffers[domain], share, strategy=strategy, rng=self.rng)]
        return drawn

    def taken(self, drawn) -> list:
        """The items drawn, counted."""
        for domain, _ in drawn:
            self.replayed[domain] = self.replayed.get(domain, 0) + 1
        return [self.buffers[domain].items[i] for domain, i in drawn]

    def augment_batch(self, new_tasks, current_domain):
        return new_tasks + self.taken(self.draw(len(new_tasks), current_domain, self.strategy))

    def post_step_hook(self, trainer, domain):
        for group in trainer.groups:
            rewards = [reward for reward in group.rewards if reward is not None]
            if rewards:
                self.remember(group.task, float(np.mean(rewards)))

    def remember(self, task, reward):
        """Offers a task once; when it is played again only its reward changes."""
        buffer = self.buffers.setdefault(task.domain, Buffer(self.capacity))
        offered = self.offered.setdefault(task.domain, [])
        if task.task_id not in offered:
            offered.append(task.task_id)
            add(buffer, task, label=task.domain, reward=reward, policy=self.policy, rng=self.rng)
        elif task in buffer.items:
            update_rewards(buffer, [buffer.items.index(task)], [reward])

    def get_statistics(self):
        return {
            "replayed": sum(self.replayed.values()),
            "replayed per domain": dict(self.replayed),
            "buffer sizes": {domain: len(buffer.items) for domain, buffer in self.buffers.items()},
            "replay ratio": round(self.ratio, 4),
        }

    def state_dict(self):
        return {
            "ratio": self.ratio,
            "rng": self.rng.bit_generator.state,
            "buffers": {domain: asdict(buffer) for domain, buffer in self.buffers.items()},
            "offered": self.offered,
            "replayed": self.replayed,
        }

    def load_state_dict(self, state):
        self.ratio = state["ratio"]
        self.rng.bit_generator.state = state["rng"]
        self.offered, self.replayed = state["offered"], state["replayed"]
        self.buffers = {}
        for domain, saved in state["buffers"].items():
            items = [TaskRef(**item) for item in saved["items"]]
            self.buffers[domain] = Buffer(**{**saved, "items": items})


class TrajectoryReplayCL(ReplayCL):
    """Conversations of earlier domains, stored with their behaviour log-probabilities and advantages, train the policy
    again beside the new ones; nothing old is rolled out.

    An item: {"domain", "task_id", "token_ids", "logprobs", "turns" (-1 where not sampled), "advantage", "reward"}; the
    advantage is None where the group's rewards did not vary. Its label is its domain and task, its loss the clipped
    loss, a mean over its sampled tokens, computed anew whenever GRPO replays it. It is low where the advantage is high:
    "lars" and "labrs" let successes go and keep failures. clone_coef: see `cloning_loss`; without cloning, what has no
    advantage teaches nothing and is not stored.
    """

    policies = POLICIES
    stores_trajectories = True

    def __init__(self, clone_coef=0.05, **kwargs):
        super().__init__(**kwargs)
        self.cloning = clone_coef > 0
        self.drawn = []

    def augment_batch(self, new_tasks, current_domain):
        return new_tasks

    def augment_trajectories(self, new, current_domain, successful=False):
        self.drawn = self.draw(new, current_domain, "high_reward" if successful else self.strategy)
        if successful:
            self.drawn = [(domain, i) for domain, i in self.drawn if self.buffers[domain].rewards[i] > 0]
        return self.taken(self.drawn)

    def post_step_hook(self, trainer, domain):
        for (replayed, index), loss in zip(self.drawn, trainer.replayed_losses, strict=True):
            if math.isfinite(loss):  # one that is not makes train.py skip the update
                update_losses(self.buffers[replayed], [index], [loss])
        for item, loss in trainer.finished:
            if self.cloning or item["advantage"] is not None:
                buffer = self.buffers.setdefault(item["domain"], Buffer(self.capacity))
                label = f"{item['domain']}/{item['task_id']}"
                kept = {"label": label, "loss": loss, "reward": item["reward"], "policy": self.policy}
                add(buffer, item, **kept, rng=self.rng)

    def bytes_kept(self):
        return sum(len(json.dumps(item)) for buffer in self.buffers.values() for item in buffer.items)

    def state_dict(self):
        state = super().state_dict()
        return {**state, "buffers": list(self.buffers)}

    def load_state_dict(self, state):
        super().load_state_dict({**state, "buffers": {}})
        self.buffers = dict.fromkeys(state["buffers"])

    def save(self, folder):
        for domain, buffer in self.buffers.items():
            save_buffer(buffer, folder / f"replay_{domain}.jsonl")

    def load(self, folder):
        for domain in self.buffers:
            self.buffers[domain] = load_buffer(folder / f"replay_{domain}.jsonl", whole_conversation)


def whole_conversation(item) -> dict:
    """An item as TrajectoryReplayCL stores it; ValueError where something is missing."""
    columns = [item.get(name) for name in ("token_ids", "logprobs", "turns")]
    lengths = {len(values) for values in columns if isinstance(values, list)}
    if None in columns or len(lengths) != 1 or not {"domain", "task_id", "advantage", "reward"} <= set(item):
        raise ValueError(f"a stored conversation of task {item.get('task_id')} is not whole")
    return item


CLONING_CAP = 1.0  # of log r


def cloning_loss(logprobs, stored, mask, successful):
    """The behaviour-cloning term of a batch of stored conversations, summed over their sampled tokens (CLEAR, Rolnick
    et al. 2019, arXiv:1811.11682, "policy cloning"): KL(mu || pi) from the policy mu that sampled them, estimated as
    r - 1 - log r with r = pi / mu, and cross-entropy -log pi where the conversation was successful. r counts up to e:
    where a token has become likelier still, the gradient (r - 1) grad log pi would outweigh all others.

    logprobs (of pi), stored (of mu) and mask are (B, T), successful (B,). Returns a scalar tensor.
    """
    log_ratio = (logprobs - stored).clamp(max=CLONING_CAP)
    kl = log_ratio.exp() - 1 - log_ratio
    return (kl - logprobs * successful[:, None])[mask].sum()


class AdaptiveReplayCL(ReplayCL):
    """Replay whose ratio follows forgetting: up when a previous domain's score has fallen by more than
    `forgetting_threshold` from its best, slowly down otherwise. The score is a running mean of the rewards of the
    domain's rollouts, new and replayed ones: it costs nothing extra, and no evaluation task steers the training. A new
    domain begins at `replay_ratio` again: that the last one left the old ones alone says nothing of the next."""

    SMOOTHING = 0.3

    def __init__(
        self,
        forgetting_threshold=0.1,
        adaptation_rate=0.1,
        min_replay_ratio=0.1,
        max_replay_ratio=0.5,
        **kwargs,
    ):
        super().__init__(**kwargs)
        if not 0 <= min_replay_ratio <= max_replay_ratio < 1:
            raise ValueError(
                f"replay ratios must satisfy 0 <= minimum <= maximum < 1, got {min_replay_ratio} and {max_replay_ratio}"
            )
        self.adaptation = {
            "threshold": forgetting_threshold,
            "rate": adaptation_rate,
            "minimum": min_replay_ratio,
            "maximum": max_replay_ratio,
        }
        self.ratio = self.initial_ratio = min(max(self.ratio, min_replay_ratio), max_replay_ratio)
        self.best: dict[str, float] = {}
        self.recent: dict[str, float] = {}

    def post_step_hook(self, trainer, domain):
        super().post_step_hook(trainer, domain)
        rewards = {}
        for group in trainer.groups:
            rewards.setdefault(group.task.domain, []).extend(r for r in group.rewards if r is not None)
        for played, values in rewards.items():
            if values:
                score = self.recent.get(played, float(np.mean(values)))
                self.recent[played] = score + self.SMOOTHING * (float(np.mean(values)) - score)
                self.best[played] = max(self.best.get(played, 0.0), self.recent[played])
        if any(group.replayed for group in trainer.groups):
            drop = max(self.best[d] - self.recent[d] for d in self.best if d != domain)
            self.ratio = adapt_ratio(self.ratio, drop, **self.adaptation)

    def post_task_hook(self, trainer, domain):
        self.ratio = self.initial_ratio

    def get_statistics(self):
        drops = {domain: round(self.best[domain] - self.recent[domain], 3) for domain in self.best}
        return {**super().get_statistics(), "drop from best": drops}

    def state_dict(self):
        return {**super().state_dict(), "best": self.best, "recent": self.recent}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.best, self.recent = state["best"], state["recent"]


ALGORITHMS = {"sequential": SequentialCL, "joint": JointCL, "replay": ReplayCL, "adaptive_replay": AdaptiveReplayCL}


def check_coefficients(ewc_lambda=None, ewc_decay=None, lwf_coef=None, er_plus_lambda=None):
    """Raises ValueError for what is no such coefficient; None stands for none."""
    for name, value in (("ewc_lambda", ewc_lambda), ("lwf_coef", lwf_coef), ("er_plus_lambda", er_plus_lambda)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be 0 or more, got {value}")
    if ewc_decay is not None and not 0 <= ewc_decay <= 1:
        raise ValueError(f"ewc_decay must be in [0, 1], got {ewc_decay}")


def load_algorithm(name, args=None, others=None) -> CLAlgorithm:
    """The algorithm called `name` in ALGORITHMS or `others`, or the class of "path/to/file.py:MyAlgorithm", built from
    train.py's flags. Raises ValueError when there is no such algorithm, file or class."""
    if ":" not in name:
        algorithms = {**ALGORITHMS, **(others or {})}
        if name not in algorithms:
            known = ", ".join(algorithms)
            raise ValueError(f"unknown cl_algorithm {name!r}; choose one of {known}, or path/to/file.py:MyAlgorithm")
        if getattr(args, "replay_kind", "tasks") == "trajectories":
            if name == "adaptive_replay":
                raise ValueError("adaptive_replay goes by rewards of old tasks' rollouts: it needs --replay_kind tasks")
            if name == "replay":
                return TrajectoryReplayCL.from_args(args)
        return algorithms[name].from_args(args)
    path, _, class_name = name.rpartition(":")
    if not Path(path).is_file():
        raise ValueError(f"cl_algorithm: there is no file {path!r}")
    # A name of its own: the user's file may be a changed copy called replay.py.
    spec = importlib.util.spec_from_file_location("rehearse_user_algorithm", path)
    if spec is None:
        raise ValueError(f"cl_algorithm: {path!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    algorithm = getattr(module, class_name, None)
    if not (inspect.isclass(algorithm) and issubclass(algorithm, CLAlgorithm)):
        raise ValueError(f"cl_algorithm: {path} has no subclass of replay.CLAlgorithm called {class_name!r}")
    return algorithm.from_args(args)


def show_laws():
    """What each policy keeps of a stream whose labels come one after the other, the last of them rare."""
    rng = np.random.default_rng(0)
    labels = [0] * 400 + [1] * 400 + [2] * 150 + [3] * 50
    losses = rng.choice([0.1, 1.0], len(labels))
    print("a stream of 1000 items in a buffer of 100, mean of 100 runs: items kept of each label, share of high losses")
    print(f"{'offered':>12}  {'  '.join(f'label {k}: {n:4d}' for k, n in sorted(Counter(labels).items()))}  high 0.50")
    for policy in POLICIES:
        kept, high = np.zeros(4), 0.0
        for _ in range(100):
            buffer = Buffer(100)
            for item, (label, loss) in enumerate(zip(labels, losses, strict=True)):
                add(buffer, item, label=label, loss=loss, policy=policy, rng=rng)
            kept += np.bincount(buffer.labels, minlength=4) / 100
            high += np.mean(np.array(buffer.losses) > 0.5) / 100
        print(f"{policy:>12}  {'  '.join(f'label {k}: {n:4.1f}' for k, n in enumerate(kept))}  high {high:.2f}")


def benchmark(capacity=1000, offers=1_000_000):
    """Prints seconds of offers to a full buffer, and accepted offers per second of each policy's choice of a slot."""
    rng = np.random.default_rng(0)
    buffer = Buffer(capacity)
    for item in range(capacity):
        add(buffer, item, label=item % 10, loss=rng.random(), rng=rng)
    start = time.perf_counter()
    for item in range(offers):
        add(buffer, item, rng=rng)
    print(f"reservoir of {capacity}: {offers} offers in {time.perf_counter() - start:.2f} s")
    buffer.losses = rng.random(capacity).tolist()
    buffer.labels = rng.integers(0, 10, capacity).tolist()
    slots = {
        "brs": lambda: brs_slot(buffer.labels, rng),
        "lars": lambda: lars_slot(buffer.losses, rng),
        "labrs": lambda: labrs_slot(buffer.losses, buffer.labels, rng),
    }
    for name, slot in slots.items():
        start = time.perf_counter()
        for _ in range(20_000):
            slot()
        print(f"{name} of {capacity}: {20_000 / (time.perf_counter() - start):.0f} accepted offers/s")


# --------------------------------------------- the channel-prediction experiment (python replay.py)


@dataclass(frozen=True)
class Scenario:
    """Where users are, in terms of 3GPP TR 38.901: metres from the base station, in its line of sight or not, and the
    distance of neighbouring antennas in wavelengths."""

    distance: tuple[float, float]
    line_of_sight: bool
    spacing: float


SCENARIOS = {
    "S1 compact": Scenario((120.0, 200.0), False, 1.0),
    "S2 dense": Scenario((20.0, 60.0), True, 0.25),
    "S3 standard": Scenario((50.0, 100.0), True, 0.5),
}
CARRIER, BANDWIDTH = 5e9, 100e6  # Hz
STEP = 0.004  # metres that a user moves between two channels
SPEED = 1.0  # m/s
SEGMENTS, RESOURCE_BLOCKS = 3, 6  # windows per user: one after the other on its way, times places in the band
RX, TX = 2, 8  # antennas
TEST_SHARE = 0.2  # of the users
SNRS = (0, 5, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)  # dB
TRAINING_SNR = (0.0, 30.0)  # dB, uniform

BUFFERS = {"naive": None, "random": "random", "reservoir": "reservoir", "brs": "brs", "lars": "lars", "labrs": "labrs"}
BUFFERS |= {"lars_distill": "lars", "joint": None, "ewc": None, "online_ewc": None, "lwf": None, "er_plus": "reservoir"}
ARMS = (*BUFFERS, *(f"only {name}" for name in SCENARIOS))


@dataclass
class Args:
    """An LSTM learns to predict the next MIMO channel in one scenario after another, with each replay buffer. Or, with
    --laws or --benchmark, the buffers themselves."""

    seeds: list[int] = field(default_factory=lambda: [0])
    """of data, weights, noise and buffers"""
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    """what is compared; "only S1 compact" etc. are trained on that scenario alone"""
    output: str = "runs/channel_prediction"
    """directory for results, tables and pictures; what is finished there is not done again"""
    workers: int | None = None
    """arms at a time; default: one per CPU core, one on a GPU"""
    model: str = "lstm"
    """lstm, gru or transformer"""
    hidden: int = 64
    """units per layer"""
    layers: int = 3
    """of the model"""
    users: int = 256
    """per scenario; a fifth of them is for testing"""
    past: int = 8
    """channels that the next one is predicted from"""
    epochs: int = 12
    """per scenario"""
    batch_size: int = 64
    """new windows per step; with a buffer as many replayed ones beside them (joint: twice as many)"""
    capacity: int = 500
    """windows that a buffer holds"""
    learning_rate: float = 5e-3
    """of Adam, at the start"""
    final_rate: float = 0.1
    """the rate falls exponentially, window by window, to this share of it at the end of the run"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    distill_coef: float = 1.0
    """lars_distill: weight of the NMSE to the predictions of the model as it was before the current scenario"""
    ewc_lambda: float = 100.0
    """weight of the penalty of ewc and online_ewc"""
    er_plus_lambda: float = 1.0
    """er_plus: weight of EWC's penalty beside replay"""
    ewc_decay: float = 0.95
    """online_ewc: of the running Fisher information"""
    fisher_samples: int = 256
    """ewc, online_ewc, er_plus: windows of a scenario that its Fisher information is taken from"""
    lwf_coef: float = 0.1
    """lwf, er_plus: weight of the NMSE to the predictions of the model as it was before, on the new windows"""
    autocast: bool = False
    """compute in bfloat16"""
    eval_snr: float = 20.0
    """dB, of the forgetting curves and of the table"""
    laws: bool = False
    """show what each buffer policy keeps of a stream, instead"""
    benchmark: bool = False
    """offers per second, instead"""


def generate_channels(scenario: Scenario, users, steps, seed) -> np.ndarray:
    """Clean downlink channels of users on straight ways, complex (users, steps, RESOURCE_BLOCKS, RX * TX), each user's
    of mean power 1: the UMi model of 3GPP TR 38.901 by sionna, with uniform linear arrays at both ends."""
    import sionna.phy
    from sionna.phy.channel import cir_to_ofdm_channel
    from sionna.phy.channel.tr38901 import PanelArray, UMi

    rng = np.random.default_rng(seed)
    sionna.phy.config.device = "cpu"  # where random numbers do not depend on the GPU
    sionna.phy.config.seed = int(rng.integers(2**31))
    kind = {"num_rows_per_panel": 1, "polarization": "single", "polarization_type": "V", "antenna_pattern": "omni"}
    kind |= {"carrier_frequency": CARRIER, "element_horizontal_spacing": scenario.spacing}
    model = UMi(
        carrier_frequency=CARRIER,
        o2i_model="low",
        ut_array=PanelArray(num_cols_per_panel=RX, **kind),
        bs_array=PanelArray(num_cols_per_panel=TX, **kind),
        direction="downlink",
        enable_pathloss=False,
        enable_shadow_fading=False,
    )

    def vectors(x, y, z):
        columns = [np.broadcast_to(value, users) for value in (x, y, z)]
        return torch.tensor(np.stack(columns, 1), dtype=torch.float32)[:, None]

    distance, azimuth = rng.uniform(*scenario.distance, users), rng.uniform(-np.pi / 3, np.pi / 3, users)
    heading, turned = rng.uniform(0, 2 * np.pi, users), rng.uniform(0, 2 * np.pi, users)
    model.set_topology(
        ut_loc=vectors(distance * np.cos(azimuth), distance * np.sin(azimuth), 1.5),
        bs_loc=vectors(0.0, 0.0, 10.0),
        ut_orientations=vectors(turned, 0.0, 0.0),
        bs_orientations=vectors(0.0, 0.0, 0.0),
        ut_velocities=vectors(SPEED * np.cos(heading), SPEED * np.sin(heading), 0.0),
        in_state=torch.zeros(users, 1, dtype=torch.bool),
        los=scenario.line_of_sight,
    )
    gains, delays = model(num_time_samples=steps, sampling_frequency=SPEED / STEP)
    frequencies = (torch.arange(RESOURCE_BLOCKS) - (RESOURCE_BLOCKS - 1) / 2) * BANDWIDTH / RESOURCE_BLOCKS
    h = cir_to_ofdm_channel(frequencies, gains, delays)  # user, 1, rx, 1, tx, step, frequency
    h = h[:, 0, :, 0].permute(0, 3, 4, 1, 2).flatten(3)
    return (h / h.abs().square().mean((1, 2, 3), keepdim=True).sqrt()).numpy()


def channel_windows(args: Args, seed) -> dict[str, tuple]:
    """(training, test) windows of each scenario, complex (windows, past + 1, RX * TX), of different users. Generated
    once and kept in `output`."""
    path = Path(args.output) / f"channels_{args.users}users_{args.past}past_seed{seed}.npz"
    steps = SEGMENTS * (args.past + 1)
    if not path.exists():
        made = [generate_channels(s, args.users, steps, [seed, k]) for k, s in enumerate(SCENARIOS.values())]
        temporary = path.with_suffix(".tmp.npz")
        np.savez(temporary, *made)
        temporary.replace(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            channels = [torch.from_numpy(file[name]) for name in file.files]
        shapes = {tuple(h.shape) for h in channels}
        if len(channels) != len(SCENARIOS) or shapes != {(args.users, steps, RESOURCE_BLOCKS, RX * TX)}:
            raise ValueError(f"arrays of shapes {shapes}")
    except Exception as error:  # whatever numpy and zipfile find wrong
        raise ValueError(f"{path} is damaged ({error}); remove it, and it will be made again") from error
    windows = {}
    for name, h in zip(SCENARIOS, channels, strict=True):
        h = h.unflatten(1, (SEGMENTS, args.past + 1)).transpose(2, 3)  # user, segment, block, step, antennas
        test = round(len(h) * TEST_SHARE)
        windows[name] = (h[test:].flatten(0, 2), h[:test].flatten(0, 2))
    return windows


class ChannelPredictor(torch.nn.Module):
    """The next channel from noisy past ones: complex (B, past, antennas) -> (B, antennas)."""

    def __init__(self, kind="lstm", hidden=64, layers=3, past=8, antennas=RX * TX):
        super().__init__()
        self.attends = kind == "transformer"
        if self.attends:
            self.enter = torch.nn.Linear(2 * antennas, hidden)
            self.position = torch.nn.Parameter(0.02 * torch.randn(past, hidden))
            layer = torch.nn.TransformerEncoderLayer(hidden, 4, 4 * hidden, 0.0, batch_first=True, norm_first=True)
            self.body = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        else:
            recurrent = {"lstm": torch.nn.LSTM, "gru": torch.nn.GRU}[kind]
            self.body = recurrent(2 * antennas, hidden, layers, batch_first=True)
        self.head = torch.nn.Linear(hidden, 2 * antennas)

    def forward(self, noisy):
        x = torch.view_as_real(noisy).flatten(-2)
        x = self.body(self.enter(x) + self.position) if self.attends else self.body(x)[0]
        return torch.view_as_complex(self.head(x[:, -1]).float().unflatten(-1, (-1, 2)).contiguous())


def nmse(predicted, target):
    """||predicted - target||^2 / ||target||^2 of each item, complex (B, antennas) -> (B,)."""
    return (predicted - target).abs().square().sum(-1) / target.abs().square().sum(-1)


def augment(windows, generator, snr=None):
    """(noisy past channels, clean next one) of clean windows, drawn anew at each use: one random phase per window and
    white noise at `snr` dB, by default uniform over TRAINING_SNR (independent buffer augmentation)."""
    n = len(windows)
    low, high = TRAINING_SNR if snr is None else (snr, snr)
    snrs = low + (high - low) * torch.rand(n, 1, 1, generator=generator)
    windows = windows * torch.exp(2j * torch.pi * torch.rand(n, 1, 1, generator=generator))
    power = windows.abs().square().mean((1, 2), keepdim=True)
    noise = torch.randn(windows[:, :-1].shape, dtype=windows.dtype, generator=generator)
    return windows[:, :-1] + noise * (power * 10 ** (-snrs / 10)).sqrt(), windows[:, -1]


@torch.no_grad()
def measure_nmse(model, windows, snr) -> float:
    """E||error||^2 / E||channel||^2 in dB over test windows; the same noise every time."""
    noisy, target = augment(windows, torch.Generator().manual_seed(0), snr)
    device = next(model.parameters()).device
    error = model(noisy.to(device)).cpu() - target
    return 10 * math.log10(error.abs().square().sum() / target.abs().square().sum())


def run_arm(args: Args, arm, seed) -> dict:
    """Trains one model over its scenarios. Returns the NMSE in dB on every scenario's test users, at `eval_snr` after
    each epoch ("curve", from before the first) and at the end over SNRS, and the seconds it took."""
    start = time.perf_counter()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    windows = channel_windows(args, seed)
    torch.manual_seed(seed)
    generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    model = ChannelPredictor(args.model, args.hidden, args.layers, args.past).to(device)
    optimizer = torch.optim.Adam(model.parameters(), args.learning_rate)
    stages = [arm.removeprefix("only ")] if arm.startswith("only ") else list(SCENARIOS)
    policy, teacher, seen = BUFFERS.get(arm), None, 0
    penalty = None
    if arm in ("ewc", "online_ewc", "er_plus"):
        from regularize import of_arm  # which imports this file, and more

        penalty = of_arm(arm, args)
    buffer = Buffer(args.capacity)
    share = 2 if arm == "joint" else 1  # as many windows in a step as the arms with a buffer have
    size = share * len(windows[stages[0]][0])  # of an epoch
    decay = args.final_rate ** (1 / (len(stages) * args.epochs * size))  # per new window seen
    by_loss = policy in ("lars", "labrs")
    autocast = torch.autocast(device, torch.bfloat16, enabled=args.autocast)

    def measure(snr):
        return [measure_nmse(model, test, snr) for _, test in windows.values()]

    def difficulty(items):
        """The losses that items are kept by: all at one SNR, or the draw of the noise would decide."""
        noisy, target = augment(items, generator, sum(TRAINING_SNR) / 2)
        with torch.no_grad(), autocast:
            return nmse(model(noisy.to(device)), target.to(device)).tolist()

    def learn(new, stage):
        nonlocal seen
        drawn = sample(buffer, len(new), rng=rng)
        old = [buffer.items[i] for i in drawn]
        noisy, target = augment(torch.cat([new, *(item[None] for item in old)]), generator)
        noisy, target = noisy.to(device), target.to(device)
        with autocast:
            predicted = model(noisy)
        losses = nmse(predicted, target)
        loss = losses.mean()
        earlier = [len(new) + k for k, i in enumerate(drawn) if buffer.labels[i] < stage]
        if penalty and stage > 0:
            loss = loss + sum(penalty.penalty(model.parameters()))
        distilled = earlier if arm == "lars_distill" else list(range(len(new)))
        if teacher is not None and distilled:
            with torch.no_grad():
                taught = teacher(noisy[distilled])
            weight = args.distill_coef / len(losses) if arm == "lars_distill" else args.lwf_coef / len(new)
            loss = loss + weight * nmse(predicted[distilled], taught).sum()
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * decay**seen
        seen += len(new)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
        optimizer.step()
        if by_loss and drawn:
            update_losses(buffer, drawn, difficulty(torch.stack(old)))

    curve = [measure(args.eval_snr)]
    for stage, name in enumerate(stages):
        train = torch.cat([windows[s][0] for s in stages]) if arm == "joint" else windows[name][0]
        for epoch in range(args.epochs):
            order = torch.randperm(len(train), generator=generator)[:size]
            for index in order.split(share * args.batch_size):
                learn(train[index], stage)
                if policy and epoch == 0:  # each window is offered once
                    losses = difficulty(train[index]) if by_loss else [0.0] * len(index)
                    for i, loss in zip(index.tolist(), losses, strict=True):
                        add(buffer, train[i].clone(), label=stage, loss=loss, policy=policy, rng=rng)
            curve.append(measure(args.eval_snr))
        if penalty:
            apart = torch.Generator().manual_seed(seed)  # so that all arms draw the same batches and noise
            some = train[torch.randperm(len(train), generator=apart)[: args.fisher_samples]]
            noisy, target = (part.to(device) for part in augment(some, apart))
            batches = zip(noisy.split(1), target.split(1), strict=True)
            penalty.consolidate(model, batches, lambda model, batch: nmse(model(batch[0]), batch[1]))
        if arm in ("lars_distill", "lwf", "er_plus"):
            teacher = copy.deepcopy(model).eval().requires_grad_(False)
    snr = dict(zip(SCENARIOS, zip(*[measure(value) for value in SNRS], strict=True), strict=True))
    kept = sum(window.nbytes for window in buffer.items) + (penalty.bytes_kept() if penalty else 0)
    kept += sum(p.nbytes for p in teacher.parameters()) if teacher is not None else 0
    if arm == "joint":
        kept = sum(windows[s][0].nbytes for s in stages)
    seconds = time.perf_counter() - start
    return {"arm": arm, "seed": seed, "seconds": seconds, "curve": curve, "snr": snr, "bytes_kept": kept}


def start_worker(threads, stop):
    """Of a process of its own: the cores are shared out, and it ends with the main process, killed or not."""
    torch.set_num_threads(threads)

    def end_with_parent():
        wait([stop, parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


def run_job(args, function, job, path: Path):
    try:
        result = json.dumps(function(args, *job), allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{' '.join(map(str, job))}: {error} (is the learning rate too high?)") from error
    write_whole(path, result)


def write_whole(path, text):
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def read_result(job, path):
    """The result in a file, None if there is none. ValueError if it is none of that job."""
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        whole = [result[name] for name in ("scenario", "arm", "seed") if name in result] == list(job)
    except (ValueError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f"{path} is damaged; remove it, and it will be made again")
    return result


def run_jobs(args, function, jobs, prepare=None) -> list[dict]:
    """function(args, *job) of each job (arm, seed), args.workers at a time, in processes of their own. Each result is
    written below args.output as soon as there is one, and what is there already is not done again; `prepare(jobs)` is
    called with what is left to do. Raises ValueError where the results found are of other settings."""
    output = Path(args.output)
    results = output / "results"
    results.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in asdict(args).items() if k not in ("seeds", "arms", "scenarios", "output", "workers")}
    written, text = output / "settings.json", json.dumps(settings, indent=1)
    if any(results.glob("*.json")) and not (written.exists() and written.read_text() == text):
        raise ValueError(f"{output} holds results of other settings than {written} says; choose another --output")
    write_whole(written, text)
    paths = {job: results / f"{'_'.join(map(str, job)).replace(' ', '_')}.json" for job in jobs}
    todo = [job for job in jobs if read_result(job, paths[job]) is None]
    if prepare and todo:
        prepare(todo)
    workers = args.workers or (1 if torch.cuda.is_available() else os.cpu_count())
    threads = max(1, os.cpu_count() // workers)
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc="arms x seeds")
    stop, running = Pipe(duplex=False)  # the workers end when `running` is closed
    on_ctrl_c = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which they inherit: a Ctrl-C is for this process
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker, (threads, stop))
    futures = [pool.submit(run_job, args, function, job, paths[job]) for job in todo]
    signal.signal(signal.SIGINT, on_ctrl_c)
    try:
        for done in as_completed(futures):
            done.result()
            bar.update()
    except BaseException:
        running.close()
        raise
    finally:
        bar.close()
        pool.shutdown(cancel_futures=True)
    return [read_result(job, path) for job, path in paths.items()]


def run_experiment(args: Args):
    """All arms and seeds, several at a time; then tables and pictures."""
    check_args(args)

    def make_channels(todo):
        for seed in tqdm(sorted({seed for _, seed in todo}), desc="channels", leave=False):
            channel_windows(args, seed)

    found = run_jobs(args, run_arm, [(arm, seed) for seed in args.seeds for arm in args.arms], make_channels)
    write_tables(args, found, Path(args.output))
    plot_results(args, found, Path(args.output))


def over_seeds(values) -> tuple[float, float]:
    """(mean, half width of the 95% confidence interval by Student's t, nan for one value)."""
    from scipy import stats

    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))


def forgetting_db(result, epochs) -> list[float]:
    """By how many dB the NMSE on each scenario but the last has risen since the model had just learnt it."""
    return [result["curve"][-1][k] - result["curve"][(k + 1) * epochs][k] for k in range(len(SCENARIOS) - 1)]


def write_tables(args: Args, found, output):
    """Prints the table and writes it, with all that is in the pictures, as CSV."""
    by_arm = {arm: sorted((r for r in found if r["arm"] == arm), key=lambda r: r["seed"]) for arm in args.arms}
    naive = [np.mean(forgetting_db(r, args.epochs)) for r in by_arm.get("naive", [])]

    def cell(values):
        mean, half = over_seeds(values)
        return f"{mean:.2f}" if math.isnan(half) else f"{mean:.2f} ± {half:.2f}"

    names = [*SCENARIOS, "mean", *(f"forgetting {name.split()[0]}" for name in list(SCENARIOS)[:-1]), "less than naive"]
    lines = [
        f"| NMSE, dB at {args.eval_snr:g} dB SNR | {' | '.join(names)} | seconds | kept, kB |",
        "|---" * (len(names) + 3) + "|",
    ]
    rows = []
    for arm, results in by_arm.items():
        final = np.array([r["curve"][-1] for r in results])
        columns = [cell(values) for values in (*final.T, final.mean(1))]
        lost = None
        if arm in BUFFERS and arm != "joint":
            lost = np.array([forgetting_db(r, args.epochs) for r in results])
            columns += [cell(values) for values in lost.T]
            columns.append(f"{1 - lost.mean() / np.mean(naive):.0%}" if naive and arm != "naive" else "")
        else:
            columns += [""] * len(SCENARIOS)
        columns += [f"{np.mean([r['seconds'] for r in results]):.0f}", f"{results[0]['bytes_kept'] / 1000:.0f}"]
        lines.append(f"| {arm} | {' | '.join(columns)} |")
        for k, r in enumerate(results):
            rows.append([arm, r["seed"], *final[k], *(lost[k] if lost is not None else ["", ""]), r["seconds"]])
    print("\n".join(lines))
    if by_arm.get("lars") and by_arm.get("reservoir"):
        pairs = zip(by_arm["lars"], by_arm["reservoir"], strict=True)
        gain = [np.mean(b["curve"][-1]) - np.mean(a["curve"][-1]) for a, b in pairs]
        print(f"\nlars is better than reservoir by {cell(gain)} dB (mean over scenarios, paired by seed)")
    (output / "table.md").write_text("\n".join(lines) + "\n")
    names = list(SCENARIOS)
    head = ["arm", "seed", *names, *(f"forgetting {name}" for name in names[:-1]), "seconds"]
    write_csv(output / "table.csv", head, rows)
    rows = [[r["arm"], r["seed"], epoch, *row] for r in found for epoch, row in enumerate(r["curve"])]
    write_csv(output / "forgetting_curve.csv", ["arm", "seed", "epoch", *names], rows)
    rows = [[r["arm"], r["seed"], s, *(r["snr"][n][k] for n in names)] for r in found for k, s in enumerate(SNRS)]
    write_csv(output / "nmse_over_snr.csv", ["arm", "seed", "SNR in dB", *names], rows)


def write_csv(path, head, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([head, *rows])


def plot_results(args: Args, found, output):
    """forgetting_curve.png, nmse_over_snr.png and single_scenario.png: means over seeds, 95% intervals as bands."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use(["petroff10", {"font.size": 8, "savefig.dpi": 200, "axes.grid": True, "grid.alpha": 0.3}])
    names = list(SCENARIOS)
    present = [arm for arm in args.arms if any(r["arm"] == arm for r in found)]

    def runs(arm):
        return [r for r in found if r["arm"] == arm]

    def figure(lines, xlabel, titles):
        """lines(k): of panel k, (x, values of each seed, label, colour) one after the other."""
        picture, panels = plt.subplots(1, len(titles), figsize=(7.2, 2.6), sharey=True, layout="constrained")
        for k, axes in enumerate(panels):
            for x, values, label, colour in lines(k):
                mean, half = zip(*[over_seeds(column) for column in np.array(values).T], strict=True)
                style = {"color": f"C{colour}", "linestyle": ("-", "--", "-.", ":")[colour % 4]}
                axes.plot(x, mean, **style, label=label, linewidth=1.2)
                axes.fill_between(x, np.subtract(mean, half), np.add(mean, half), color=f"C{colour}", alpha=0.2, lw=0)
            axes.set(title=titles[k], xlabel=xlabel)
        panels[0].set_ylabel("NMSE, dB")
        handles, labels = panels[0].get_legend_handles_labels()
        picture.legend(handles, labels, loc="outside right center", frameon=False)
        return picture, panels

    def save(file, picture):
        picture.savefig(output / file)
        plt.close(picture)

    def curves(k):
        for arm in (arm for arm in present if arm in BUFFERS):
            values = [[row[k] for row in r["curve"][1:]] for r in runs(arm)]
            yield range(1, len(values[0]) + 1), values, arm, list(BUFFERS).index(arm)

    def snrs(k):
        for arm in (arm for arm in ("naive", "reservoir", "lars", "joint") if arm in present):
            yield SNRS, [r["snr"][names[k]] for r in runs(arm)], arm, list(BUFFERS).index(arm)

    def singles(k):
        for colour, name in enumerate(names):
            yield SNRS, [r["snr"][name] for r in runs(f"only {names[k]}")], f"tested on {name}", colour

    tested = [f"test users of {name}" for name in names]
    if any(arm in BUFFERS for arm in present):
        picture, panels = figure(curves, "epoch (shaded: this scenario)", tested)
        for k, axes in enumerate(panels):
            axes.axvspan(k * args.epochs, (k + 1) * args.epochs, color="0.5", alpha=0.12, linewidth=0)
        save("forgetting_curve.png", picture)
        save("nmse_over_snr.png", figure(snrs, "SNR, dB", tested)[0])
    if all(f"only {name}" in present for name in names):
        titles = [f"trained on {name.split()[0]} only" for name in names]
        save("single_scenario.png", figure(singles, "SNR, dB", titles)[0])


def check_args(args: Args):
    """Raises ValueError for settings that cannot work."""
    positive = "hidden layers past epochs batch_size capacity learning_rate final_rate max_grad_norm fisher_samples"
    for name in positive.split():
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"{name} must be greater than 0, got {getattr(args, name)}")
    if args.final_rate > 1:
        raise ValueError(f"final_rate must be in (0, 1], got {args.final_rate}")
    if args.users < 5:
        raise ValueError(f"users must be 5 or more, for one to test on, got {args.users}")
    check_coefficients(args.ewc_lambda, args.ewc_decay, args.lwf_coef, args.er_plus_lambda)
    if not 0 <= args.distill_coef < math.inf or not math.isfinite(args.eval_snr):
        raise ValueError(f"distill_coef must be 0 or more, eval_snr finite; got {args.distill_coef}, {args.eval_snr}")
    if args.model not in ("lstm", "gru", "transformer"):
        raise ValueError(f"unknown model {args.model!r}; choose one of lstm, gru, transformer")
    if args.model == "transformer" and args.hidden % 4:
        raise ValueError(f"hidden must be a multiple of the transformer's 4 heads, got {args.hidden}")
    for arm in args.arms:
        if arm not in ARMS:
            raise ValueError(f"unknown arm {arm!r}; choose from {', '.join(ARMS)}")
    for name in ("arms", "seeds"):
        if not getattr(args, name) or len(set(getattr(args, name))) < len(getattr(args, name)):
            raise ValueError(f"{name} must name each of them once, got {getattr(args, name)}")
    if min(args.seeds) < 0 or (args.workers is not None and args.workers < 1):
        raise ValueError(f"seeds must be 0 or more and workers at least 1, got {args.seeds} and {args.workers}")


def run_command(args, function):
    """function(args) for a user at the command line: one line for what goes wrong, and an exit code."""
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    code, line = 0, f"what is finished is in {args.output}, the same command goes on"
    try:
        function(args)
    except (ValueError, OSError) as error:
        code, line = 2, f"{Path(sys.argv[0]).name}: {error}"
    except ImportError as error:
        code, line = 2, f"{Path(sys.argv[0]).name}: {error}; run pip install -r requirements.txt"
    except BrokenProcessPool:
        code, line = 1, f"a worker was killed, maybe for want of memory; {line} (with fewer --workers)"
    except KeyboardInterrupt:
        code, line = 130, f"stopped; {line}"
    except SystemExit as stop:
        code, line = stop.code, f"stopped; {line}"
    if code:
        print(line, file=sys.stderr)
    raise SystemExit(code)


def main():
    args = tyro.cli(Args)
    if args.laws:
        show_laws()
    elif args.benchmark:
        benchmark()
    else:
        run_command(args, run_experiment)


if __name__ == "__main__":
    main()
