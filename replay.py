"""What is remembered: replay buffers and sampling as pure functions, and the continual-learning algorithms.

    python replay.py                 shows what each buffer policy keeps of a stream
    python replay.py --benchmark     offers per second

Data flow: a finished group -> add -> Buffer -> sample -> augment_batch -> the next batch's rollouts.

To change what is kept, change `add`; what is replayed, `sample`; how much, `replay_count` and `adapt_ratio`. A
class of your own (a subclass of CLAlgorithm) runs with `python train.py --cl_algorithm path/to/file.py:MyClass`.
"""

import argparse
import importlib.util
import inspect
import json
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path

import numpy as np

STRATEGIES = ("random", "high_reward", "recent", "balanced")
POLICIES = ("reservoir", "brs", "lars", "labrs", "recent")
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
    high, spread = float(array.max()), float(np.ptp(array)) or 1.0
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

    Every policy but "recent" has the reservoir's gate, which lets item n + 1 in with probability capacity / (n + 1);
    they differ in what makes room for it: a uniformly drawn item (reservoir), `brs_slot`, `lars_slot` or `labrs_slot`.
    "recent" keeps the latest. Raises ValueError for an unknown policy, or a loss or reward that is not finite.
    """
    if policy not in POLICIES:
        raise ValueError(f"unknown buffer policy {policy!r}; choose one of {', '.join(POLICIES)}")
    if not (math.isfinite(loss) and math.isfinite(reward)):
        raise ValueError(f"loss and reward of an item must be finite, got {loss} and {reward}")
    latest = buffer.seen % buffer.capacity
    slot = latest if policy == "recent" else reservoir_slot(buffer.seen, buffer.capacity, rng)
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
        return Buffer(head["capacity"], items, *rest, seen=head["seen"])
    except (ValueError, KeyError, TypeError) as error:
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

    trainer.groups: this step's groups on all ranks (task: TaskRef, replayed: bool, rewards: list of float, None
    where invalid); trainer.finished: this step's conversations on all ranks, as they may be stored (see
    TrajectoryReplayCL), each with its loss; trainer.replayed_losses: one for each of augment_trajectories;
    trainer.scores: {domain: mean reward} of the last evaluation; trainer.step, trainer.model, ...
    """

    all_domains = False
    stores_trajectories = False

    @classmethod
    def from_args(cls, args):
        """An instance from train.py's flags: those that the constructor names, and where it takes **kwargs those
        that its parents' constructors name."""
        names = set()
        for parent in cls.__mro__:
            parameters = inspect.signature(parent.__init__).parameters
            names.update(parameters)
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                break
        return cls(**{name: getattr(args, name) for name in names if hasattr(args, name)})

    def augment_batch(self, new_tasks: list[TaskRef], current_domain: str) -> list[TaskRef]:
        """The tasks to roll out: the new ones, and what is replayed with them."""
        return new_tasks

    def augment_trajectories(self, new: int, current_domain: str, successful=False) -> list[dict]:
        """Stored conversations to train on beside a step's `new` conversations, or, in the warm start, beside so many
        demonstrations: then those that earned a reward only."""
        return []

    def extra_loss(self, trainer):
        """A scalar tensor to add to the step's loss, or None; asked before every optimiser step of GRPO.

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
            other = " (of trajectories also brs, lars, labrs)" if self.policies == TASK_POLICIES else ""
            names = ", ".join(self.policies) + other
            raise ValueError(f"buffer_policy {buffer_policy!r} is none for what is stored here; choose one of {names}")
        if replay_buffer_size < 1:
            raise ValueError(f"replay_buffer_size must be at least 1, got {replay_buffer_size}")
        if min_buffer_size < 1:
            raise ValueError(f"min_buffer_size must be at least 1, got {min_buffer_size}")
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
            self.replayed[domain] = self.replayed.get(domain, 0) + share
        return drawn

    def augment_batch(self, new_tasks, current_domain):
        drawn = self.draw(len(new_tasks), current_domain, self.strategy)
        return new_tasks + [self.buffers[domain].items[i] for domain, i in drawn]

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
    loss, a mean over its sampled tokens, computed anew whenever it is replayed. clone_coef: see `cloning_loss`; without
    cloning, what has no advantage teaches nothing and is not stored.
    """

    policies = POLICIES
    stores_trajectories = True

    def __init__(self, clone_coef=1.0, **kwargs):
        super().__init__(**kwargs)
        self.cloning = clone_coef > 0
        self.drawn = []

    def augment_batch(self, new_tasks, current_domain):
        return new_tasks

    def augment_trajectories(self, new, current_domain, successful=False):
        self.drawn = self.draw(new, current_domain, "high_reward" if successful else self.strategy)
        items = [self.buffers[domain].items[i] for domain, i in self.drawn]
        return [item for item in items if item["reward"] > 0] if successful else items

    def post_step_hook(self, trainer, domain):
        for (replayed, index), loss in zip(self.drawn, trainer.replayed_losses, strict=True):
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
            self.buffers[domain] = load_buffer(folder / f"replay_{domain}.jsonl")


def cloning_loss(logprobs, stored, mask, successful):
    """The behaviour-cloning term of a batch of stored conversations, summed over their sampled tokens (CLEAR, Rolnick
    et al. 2019, arXiv:1811.11682, "policy cloning"): KL(mu || pi) from the policy mu that sampled them, estimated as
    r - 1 - log r with r = pi / mu, and cross-entropy -log pi where the conversation was successful.

    logprobs (of pi), stored (of mu) and mask are (B, T), successful (B,). Returns a scalar tensor.
    """
    log_ratio = (logprobs - stored).clamp(-20, 20)
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


def load_algorithm(name, args=None) -> CLAlgorithm:
    """The algorithm called `name`, or the class of "path/to/file.py:MyAlgorithm", built from train.py's flags.
    Raises ValueError when there is no such algorithm, file or class."""
    if ":" not in name:
        if name not in ALGORITHMS:
            known = ", ".join(ALGORITHMS)
            raise ValueError(f"unknown cl_algorithm {name!r}; choose one of {known}, or path/to/file.py:MyAlgorithm")
        if getattr(args, "replay_kind", "tasks") == "trajectories":
            if name == "adaptive_replay":
                raise ValueError("adaptive_replay goes by rewards of old tasks' rollouts: it needs --replay_kind tasks")
            if name == "replay":
                return TrajectoryReplayCL.from_args(args)
        return ALGORITHMS[name].from_args(args)
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


def main():
    parser = argparse.ArgumentParser(description="Shows what each buffer policy keeps of a stream.")
    parser.add_argument("--benchmark", action="store_true", help="offers per second instead")
    if parser.parse_args().benchmark:
        benchmark()
    else:
        show_laws()


if __name__ == "__main__":
    main()
