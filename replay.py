"""Replay: buffers as pure functions, the trajectory buffer, and the algorithms that replay old experience.

Data flow: finished trajectory -> add -> Buffer -> sample -> the next batch.

To change which items a buffer keeps, change a `*_slot` function or `add`; which are drawn, `sample`; how many,
`replay_count` and `adapt_ratio`.
"""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import Field, NonNegativeFloat, PositiveInt

from algorithm import CLAlgorithm, JointCL, SequentialCL  # noqa: F401 (replay's public names)
from distributed import write_text
from grpo import Share, TaskRef, Trajectory

Strategy = Literal["random", "high_reward", "recent", "balanced"]
BufferPolicy = Literal["reservoir", "brs", "lars", "labrs", "random", "recent"]
STRATEGIES = get_args(Strategy)
POLICIES = get_args(BufferPolicy)
Ratio = Annotated[float, Field(ge=0, lt=1)]


@dataclass
class Flags:
    """Experience replay."""

    replay_ratio: Ratio = 0.2
    """share of replayed tasks, or conversations, in the mixed batch"""
    replay_strategy: Strategy = "random"
    """which stored conversations are drawn: any, those with a reward, the latest, or as many of each task"""
    min_buffer_size: PositiveInt = 10
    """do not replay a domain with fewer stored conversations"""
    replay_all_domains: bool = True
    """replay all previous domains, or only the latest"""
    replay_buffer_size: PositiveInt = 1000
    """stored conversations per domain"""
    buffer_policy: BufferPolicy = "reservoir"
    """which conversation a full buffer gives up: any; one of the most frequent task (brs); one with a low loss (lars);
    both (labrs); any, at every offer (random); the oldest (recent)"""
    replay_kind: Literal["tasks", "trajectories"] = "tasks"
    """tasks: roll the drawn conversation's task out again; trajectories: train on the conversation itself"""
    clone_coef: NonNegativeFloat = 0.05
    """weight of behaviour cloning on stored conversations (with replay_kind trajectories)"""
    forgetting_threshold: Share = 0.1
    """adaptive_replay: raise the ratio if a previous domain's score fell by more"""
    adaptation_rate: Share = 0.1
    """adaptive_replay: raise it by this much"""
    min_replay_ratio: Ratio = 0.1
    """adaptive_replay: lowest ratio"""
    max_replay_ratio: Ratio = 0.5
    """adaptive_replay: highest ratio"""


# ---------------------------------------------------------------------------------------------------------- buffers


@dataclass
class Buffer:
    """At most `capacity` items, with a label, a loss and a reward each (parallel lists). `seen` counts all offers, kept
    or not; `order` holds each item's offer number. Raises ValueError for lists of other lengths."""

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
    """The slot for the item that comes after `seen` others, or None to discard it (Vitter 1985, algorithm R).

    After N offers every item is kept with probability capacity / N. The draw is from 0..seen inclusive; several
    published codes leave `seen` out, which favours late items.
    """
    if seen < capacity:
        return seen
    slot = int(rng.random() * (seen + 1))  # five times as fast as rng.integers, and as even up to 2**-53
    return slot if slot < capacity else None


def brs_slot(labels, rng) -> int:
    """The slot to overwrite by balanced reservoir sampling (Buzzega et al. 2020, arXiv:2010.05595): uniform over the
    items of the most frequent label; ties are broken at random. Rare labels keep whatever the reservoir admitted."""
    counts = Counter(labels)
    most = max(counts.values())
    fullest = _one_of([label for label, count in counts.items() if count == most], rng)
    return _one_of([slot for slot, label in enumerate(labels) if label == fullest], rng)


def lars_slot(losses, rng) -> int:
    """The slot to overwrite by loss-aware reservoir sampling (Buzzega et al. 2020, arXiv:2010.05595), with the min-max
    weights p ~ (max - loss) + (max - min) / n: items with a low loss, which are learnt already, go first.

    The second term keeps every slot possible: the greatest loss may be noise. Equal losses are uniform. Raises
    ValueError for a loss that is not finite.
    """
    losses = _finite(losses)
    spread = losses.max() - losses.min()
    if spread == 0:
        return int(rng.integers(len(losses)))
    return _draw(losses.max() - losses + spread / len(losses), rng)


def labrs_slot(losses, labels, rng, scaling="balanced") -> int:
    """The slot to overwrite by loss-aware balanced reservoir sampling (Buzzega et al. 2020, arXiv:2010.05595): likelier
    for a low loss and for a frequent label.

    "balanced": p ~ I + B + 1/n with I = (max - loss) / (max - min), and B the number of items of the label, scaled
    to [0, 1] in the same way: both count the same. "released", as in the authors' code: s = I / (2 mean|I| mean|B|)
    + B / 2 with I = -loss and B the number itself, p ~ s scaled to [0, 1], + 1/n; there B hides I almost entirely. The
    1/n is ours and keeps every slot possible. Equal terms are uniform. Raises ValueError for a loss that is not finite,
    for other lengths and for an unknown scaling.
    """
    if scaling not in ("balanced", "released"):
        raise ValueError(f"unknown scaling {scaling!r}; choose balanced or released")
    if len(losses) != len(labels):
        raise ValueError(f"{len(losses)} losses for {len(labels)} labels; there must be one each")
    losses, counts = _finite(losses), Counter(labels)
    size = np.array([counts[label] for label in labels], dtype=float)
    if scaling == "released":
        score = _to_unit(-0.5 * losses / max(np.abs(losses).mean() * size.mean(), 1e-12) + 0.5 * size)
    else:
        score = _to_unit(-losses) + _to_unit(size)
    return _draw(score + 1 / len(losses), rng)


def _to_unit(values):
    """Scaled to [0, 1]; zeros if all are equal."""
    return (values - values.min()) / (np.ptp(values) or 1.0)


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
    """Offers an item to the buffer, in place. Returns the slot written, or None if the item was discarded.

    reservoir, brs, lars and labrs share the reservoir's gate: item n + 1 gets in with probability capacity / (n + 1).
    They differ in the item that makes room. "random" and "recent" admit every item: "random" overwrites any slot (an
    item survives k later offers with probability (1 - 1 / capacity)^k), "recent" the oldest. Raises ValueError for an
    unknown policy, and for a loss or reward that is not finite.
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
    """`n` indices into the buffer, without replacement if there are enough candidates.

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
    """Replaces the losses of items, one for each index: the loss-aware policies go by them. Raises ValueError for other
    lengths or a loss that is not finite, and then changes nothing."""
    losses = _finite(losses)
    if len(losses) != len(indices):
        raise ValueError(f"{len(losses)} losses for {len(indices)} items; there must be one each")
    for index, loss in zip(indices, losses.tolist(), strict=True):
        buffer.losses[index] = loss


def replay_count(new, ratio, rng) -> int:
    """How many replayed items make `ratio` the share of a mixed batch with `new` new ones: new * ratio / (1 - ratio),
    rounded up or down at random so that the expectation is right (0.1 of a batch of 4 is not zero)."""
    if not 0 <= ratio < 1:
        raise ValueError(f"the replay ratio must be in [0, 1), got {ratio}")
    exact = new * ratio / (1 - ratio)
    return int(exact) + int(rng.random() < exact - int(exact))


def adapt_ratio(ratio, drop, *, threshold, rate, minimum, maximum) -> float:
    """The ratio after a previous domain's score fell by `drop` from its best: up by `rate` if that is more than
    `threshold`, else down by a tenth of `rate`; within [minimum, maximum]."""
    ratio = ratio + rate if drop > threshold else ratio - rate / 10
    return min(max(ratio, minimum), maximum)


class TrajectoryBuffer:
    """A Buffer of finished conversations for each domain, in the order of training. A record is a grpo.Trajectory: it
    has .task, .task_id, .domain, .reward, .messages and the token lists. Its label is its task.

    tokens: False stores no tokens and no messages, which is enough to roll a task out again.
    """

    def __init__(self, capacity=1000, policy="reservoir", seed=0, tokens=True):
        self.capacity, self.policy, self.tokens = capacity, policy, tokens
        self.rng = np.random.default_rng([seed, 1])
        self.buffers: dict[str, Buffer] = {}

    def add(self, trajectory: Trajectory, loss=0.0) -> int | None:
        """Offers a trajectory to its domain's buffer, see `add`."""
        t = replace(trajectory, replayed=True)
        if not self.tokens:
            t = replace(t, token_ids=[], action_mask=[], logprobs=[], turns=[], messages=[])
        buffer = self.buffers.setdefault(t.domain, Buffer(self.capacity))
        return add(buffer, t, label=t.task_id, loss=loss, reward=t.reward, policy=self.policy, rng=self.rng)

    def sample(self, domain, n, strategy="random") -> list[Trajectory]:
        """`n` records of a domain, see `sample`; none of a domain without records."""
        return [self.buffers[domain].items[i] for i in self.draw(domain, n, strategy)]

    def draw(self, domain, n, strategy="random") -> list[int]:
        """The same as indices into the domain's buffer."""
        buffer = self.buffers.get(domain)
        return sample(buffer, n, strategy=strategy, rng=self.rng) if buffer else []

    def sample_tasks(self, domain, n, strategy="random") -> list[TaskRef]:
        """The tasks of drawn records, each task once if there are enough."""
        records = self.sample(domain, len(self.buffers[domain].items), strategy)
        tasks = list(dict.fromkeys(t.task for t in records))
        return [tasks[i % len(tasks)] for i in range(n)]

    def sample_multi_domain(self, domains, num_samples_per_domain, strategy="random") -> list[Trajectory]:
        return [t for domain in domains for t in self.sample(domain, num_samples_per_domain, strategy)]

    def get_statistics(self) -> dict:
        rewards = {domain: round(float(np.mean(b.rewards)), 4) for domain, b in self.buffers.items()}
        return {"buffer sizes": {domain: len(b.items) for domain, b in self.buffers.items()}, "buffer rewards": rewards}

    def save(self, path):
        """Writes JSON, aside and renamed: the file is whole or not there."""
        saved = {"rng": self.rng.bit_generator.state, "buffers": {d: asdict(b) for d, b in self.buffers.items()}}
        write_text(path, json.dumps(saved))

    def load(self, path):
        """Takes back what `save` wrote. Raises ValueError for a file that is damaged."""
        try:
            saved = json.loads(Path(path).read_text())
            for domain, b in saved["buffers"].items():
                self.buffers[domain] = Buffer(**{**b, "items": [Trajectory(**t) for t in b["items"]]})
            self.rng.bit_generator.state = saved["rng"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not a whole buffer: {error}") from error

    def bytes_kept(self) -> int:
        return sum(len(json.dumps(asdict(t))) for b in self.buffers.values() for t in b.items)


# ------------------------------------------------------------------------------------------------------- algorithms


class ReplayCL(CLAlgorithm):
    """Experience replay: conversations of earlier domains are drawn from the trajectory buffer. Their tasks are rolled
    out again by the current policy, or the conversations themselves are members of the batch (replay_kind). See Flags
    for the parameters."""

    Flags = Flags
    uses_trajectories = True

    def __init__(self, *values, **kwargs):
        names = [f.name for f in fields(self.Flags)]
        super().__init__(**dict(zip(names, values, strict=False)), **kwargs)
        if self.flags.min_buffer_size > self.flags.replay_buffer_size:
            sizes = f"({self.flags.replay_buffer_size}), got {self.flags.min_buffer_size}"
            raise ValueError(f"min_buffer_size must be from 1 to replay_buffer_size {sizes}")
        self.ratio = self.flags.replay_ratio
        self.rng = np.random.default_rng([self.seed, 2])
        self.drawn = []  # (domain, index) of the conversations that this step trains on
        self.replayed: dict[str, int] = {}

    def make_buffer(self):
        flags = self.flags
        tokens = flags.replay_kind == "trajectories"
        return TrajectoryBuffer(flags.replay_buffer_size, flags.buffer_policy, self.seed, tokens)

    def keeps(self, trajectory):
        # Without cloning, a conversation without an advantage teaches nothing.
        tasks = self.flags.replay_kind == "tasks"
        return tasks or self.flags.clone_coef > 0 or trajectory.advantage is not None

    def shares(self, new, current_domain) -> dict[str, int]:
        """How many records of each previous domain to replay beside `new` new items, as evenly as the count allows."""
        buffers = self.trainer.trajectory_buffer.buffers
        previous = [d for d in buffers if d != current_domain]
        previous = previous if self.flags.replay_all_domains else previous[-1:]
        ready = [d for d in previous if len(buffers[d].items) >= self.flags.min_buffer_size]
        if not ready:
            return {}
        count = replay_count(new, self.ratio, self.rng)
        turns = [ready[i] for i in self.rng.permutation(len(ready))]
        found = {d: count // len(turns) + (k < count % len(turns)) for k, d in enumerate(turns)}
        for domain, number in found.items():
            self.replayed[domain] = self.replayed.get(domain, 0) + number
        return found

    def augment_batch(self, new_tasks, current_domain):
        if self.flags.replay_kind != "tasks":
            return new_tasks
        buffer, batch = self.trainer.trajectory_buffer, list(new_tasks)
        for domain, n in self.shares(len(new_tasks), current_domain).items():
            batch += buffer.sample_tasks(domain, n, self.flags.replay_strategy)
        return batch

    def augment_trajectories(self, new, current_domain):
        if self.flags.replay_kind != "trajectories":
            return []
        buffer, warmup = self.trainer.trajectory_buffer, self.trainer.phase == "warmup"
        strategy = "high_reward" if warmup else self.flags.replay_strategy
        shares = self.shares(new, current_domain)
        self.drawn = [(domain, i) for domain, n in shares.items() for i in buffer.draw(domain, n, strategy)]
        found = [buffer.buffers[domain].items[i] for domain, i in self.drawn]
        return [t for t in found if t.reward > 0] if warmup else found  # only successes are worth imitating

    def post_step_hook(self, trainer, domain):
        for (replayed, index), loss in zip(self.drawn, trainer.replayed_losses, strict=True):
            if math.isfinite(loss):  # train.py skips the update otherwise
                update_losses(trainer.trajectory_buffer.buffers[replayed], [index], [loss])

    def get_statistics(self):
        return {
            "replayed": sum(self.replayed.values()),
            "replayed per domain": dict(self.replayed),
            "replay ratio": round(self.ratio, 4),
        }

    def state_dict(self):
        return {"ratio": self.ratio, "replayed": self.replayed, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        super().load_state_dict({name: value for name, value in state.items() if name != "rng"})
        self.rng.bit_generator.state = state["rng"]


class AdaptiveReplayCL(ReplayCL):
    """Replay whose ratio follows forgetting: up if a previous domain's score fell by more than `forgetting_threshold`
    from its best, slowly down otherwise. The score is a running mean of the rewards of the domain's rollouts, new and
    replayed: it costs nothing extra, and no evaluation task steers the training. Each domain begins at `replay_ratio`
    again: the last domain's interference does not predict the next's."""

    SMOOTHING = 0.3

    def __init__(self, *values, **kwargs):
        super().__init__(*values, **kwargs)
        low, high = self.flags.min_replay_ratio, self.flags.max_replay_ratio
        if low > high:
            raise ValueError(f"min_replay_ratio must be at most max_replay_ratio ({high}), got {low}")
        if self.flags.replay_kind != "tasks":
            raise ValueError("adaptive_replay reads the rewards of old tasks' rollouts: it needs --replay_kind tasks")
        self.ratio = self.initial_ratio = min(max(self.ratio, low), high)
        self.best: dict[str, float] = {}
        self.recent: dict[str, float] = {}

    def post_step_hook(self, trainer, domain):
        rewards = {}
        for ref, rewards_G in zip(trainer.refs_P, trainer.rewards_P_G.tolist(), strict=True):
            rewards.setdefault(ref.domain, []).extend(r for r in rewards_G if not math.isnan(r))
        for played, values in rewards.items():
            if values:
                score = self.recent.get(played, float(np.mean(values)))
                self.recent[played] = score + self.SMOOTHING * (float(np.mean(values)) - score)
                self.best[played] = max(self.best.get(played, 0.0), self.recent[played])
        if any(ref.domain != domain for ref in trainer.refs_P):
            drop = max(self.best[d] - self.recent[d] for d in self.best if d != domain)
            limits = {"minimum": self.flags.min_replay_ratio, "maximum": self.flags.max_replay_ratio}
            rule = {"threshold": self.flags.forgetting_threshold, "rate": self.flags.adaptation_rate}
            self.ratio = adapt_ratio(self.ratio, drop, **rule, **limits)

    def post_task_hook(self, trainer, domain):
        self.ratio = self.initial_ratio

    def get_statistics(self):
        drops = {domain: round(self.best[domain] - self.recent[domain], 3) for domain in self.best}
        return {**super().get_statistics(), "drop from best": drops}

    def state_dict(self):
        return {**super().state_dict(), "best": self.best, "recent": self.recent}
