"""Replay: buffers as pure functions, the trajectory buffer, and the algorithms that replay old experience.

Data flow: finished trajectory -> add -> Buffer -> sample -> the next batch.

To change which items a buffer keeps, change a `*_slot` function or MAKE_ROOM; which are drawn, `sample`; how many,
`replay_count` and `adapt_ratio`.
"""

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import numpy as np
from pydantic import Field

from algorithm import CLAlgorithm, JointCL, SequentialCL  # noqa: F401 (replay's public names)
from distributed import write_text
from flags import Count, Weight
from grpo import Share, TaskRef, Trajectory

Strategy = Literal["random", "high_reward", "recent", "balanced"]
MAKE_ROOM = {  # the slot that an admitted item overwrites in a full buffer; reservoir: any
    "brs": lambda buffer, rng: brs_slot(buffer.labels, rng),
    "lars": lambda buffer, rng: lars_slot(buffer.losses, rng),
    "lars_inverse": lambda buffer, rng: lars_slot(buffer.losses, rng, "inverse"),
    "lars_rank": lambda buffer, rng: lars_slot(buffer.losses, rng, "rank"),
    "labrs": lambda buffer, rng: labrs_slot(buffer.losses, buffer.labels, rng),
    "labrs_released": lambda buffer, rng: labrs_slot(buffer.losses, buffer.labels, rng, "released"),
    "labrs_product": lambda buffer, rng: labrs_slot(buffer.losses, buffer.labels, rng, "product"),
}
BufferPolicy = Literal["reservoir", *MAKE_ROOM, "random", "recent"]
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
    min_buffer_size: Count = 10
    """do not replay a domain with fewer stored conversations"""
    replay_all_domains: bool = True
    """replay all previous domains, or only the latest"""
    replay_buffer_size: Count = 1000
    """stored conversations per domain"""
    buffer_policy: BufferPolicy = "reservoir"
    """which conversation a full buffer gives up: any; one of the most frequent task (brs); one with a low loss (lars);
    both (labrs); any, at every offer (random); the oldest (recent). The endings are scalings, see lars_slot and
    labrs_slot"""
    replay_kind: Literal["tasks", "trajectories"] = "tasks"
    """tasks: roll the drawn conversation's task out again; trajectories: train on the conversation itself"""
    clone_coef: Weight = 0.05
    """weight of behaviour cloning on stored conversations (with replay_kind trajectories)"""
    forgetting_threshold: Share = 0.1
    """adaptive_replay: raise the ratio if a previous domain's score fell by more, and by more than chance explains"""
    adaptation_rate: Share = 0.1
    """adaptive_replay: raise or lower it by this much"""
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


def lars_slot(losses, rng, scaling="minmax") -> int:
    """The slot to overwrite by loss-aware reservoir sampling (Buzzega et al. 2020, arXiv:2010.05595): items with a low
    loss, which are learnt already, go first.

    "minmax": p ~ (max - loss) + (max - min) / n. The second term keeps every slot possible: the greatest loss may be
    noise. One outlier far above all others hides their differences: all of them are then as likely to go.
    "inverse": p ~ 1 / (loss + 1e-8), where negative losses are first raised until the lowest is 0. The lowest losses
    take nearly all of the probability. "rank": p ~ the loss's rank, n for the lowest and 1 for the greatest; outliers
    count no more than others. Equal losses are uniform. Raises ValueError for a loss that is not finite and for an
    unknown scaling.
    """
    return _draw(_low_loss(_finite(losses), scaling), rng)


def _low_loss(losses, scaling):
    if scaling == "minmax":
        return losses.max() - losses + (np.ptp(losses) / len(losses) or 1.0)
    if scaling == "inverse":
        return 1 / (losses - min(losses.min(), 0.0) + 1e-8)
    if scaling == "rank":
        below, upto = (np.searchsorted(np.sort(-losses), -losses, side) for side in ("left", "right"))
        return (below + upto + 1) / 2  # equal losses share their mean rank
    raise ValueError(f"unknown scaling {scaling!r}; choose minmax, inverse or rank")


def labrs_slot(losses, labels, rng, scaling="balanced") -> int:
    """The slot to overwrite by loss-aware balanced reservoir sampling (Buzzega et al. 2020, arXiv:2010.05595): likelier
    for a low loss and for a frequent label. B is the number of items of the label.

    "balanced": p ~ I + B' + 1/n with I = (max - loss) / (max - min), and B' the numbers B scaled to [0, 1] in the same
    way: both count the same. "released", as in the authors' code: s = I / (2 mean|I| mean|B|) + B / 2 with I = -loss,
    p ~ s scaled to [0, 1], + 1/n; there B hides I almost entirely. The 1/n is ours and keeps every slot possible.
    "product": p ~ (the minmax weight of `lars_slot`) B. Equal terms are uniform. Raises ValueError for a loss that is
    not finite, for other lengths and for an unknown scaling.
    """
    if scaling not in ("balanced", "released", "product"):
        raise ValueError(f"unknown scaling {scaling!r}; choose balanced, released or product")
    if len(losses) != len(labels):
        raise ValueError(f"{len(losses)} losses for {len(labels)} labels; there must be one each")
    losses, counts = _finite(losses), Counter(labels)
    size = np.array([counts[label] for label in labels], dtype=float)
    if scaling == "product":
        return _draw(_low_loss(losses, "minmax") * size, rng)
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

    "random" and "recent" admit every item: "random" overwrites any slot (an item survives k later offers with
    probability (1 - 1 / capacity)^k), "recent" the oldest. The others share the reservoir's gate: item n + 1 gets in
    with probability capacity / (n + 1). They differ in the item that makes room. Raises ValueError for an unknown
    policy, and for a loss or reward that is not finite.
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
    if policy in MAKE_ROOM:
        slot = MAKE_ROOM[policy](buffer, rng)
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


def adapt_ratio(ratio, drop, *, threshold, rate, minimum, maximum, error=0.0) -> float:
    """The ratio after a previous domain's score fell by `drop`, which has the standard error `error`: up by `rate` if
    the drop is more than `threshold` and not chance (1.645 standard errors: a one-sided test at 5%), down by `rate` if
    it is less than half of `threshold` and one standard error together, else as it is; within [minimum, maximum]."""
    if drop > max(threshold, 1.645 * error):
        ratio += rate
    elif drop < threshold / 2 + error:
        ratio -= rate
    return min(max(ratio, minimum), maximum)


def mean_drop(before, now) -> tuple[float, float]:
    """(drop, standard error) from `before` to `now`, which hold the rewards of tasks, {task: [reward, ...]}: the mean
    of the drops of the tasks that both hold. Hard and easy tasks do not add to the error."""
    pairs = [(before[task], now[task]) for task in now if task in before]
    drop = float(np.mean([np.mean(b) - np.mean(n) for b, n in pairs]))
    variances = [np.var(rewards, ddof=min(1, len(rewards) - 1)) / len(rewards) for pair in pairs for rewards in pair]
    return drop, math.sqrt(sum(variances)) / len(pairs)


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
            t = replace(t, token_ids=[], action_mask=[], logprobs=[], turns=[], messages=[], top="")
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
        """By domain: conversations, their rewards, and how many have a reward (`high_reward` draws from these)."""
        measures = {
            "buffer_sizes": len,
            "mean_reward": lambda rewards: round(float(np.mean(rewards)), 4),
            "max_reward": max,
            "min_reward": min,
            "num_high_reward": lambda rewards: sum(reward > 0 for reward in rewards),
        }
        return {name: {d: f(b.rewards) for d, b in self.buffers.items()} for name, f in measures.items()}

    def save(self, path):
        """Writes JSON, aside and renamed: the file is whole or not there."""
        saved = {"rng": self.rng.bit_generator.state, "buffers": {d: asdict(b) for d, b in self.buffers.items()}}
        write_text(path, json.dumps(saved))

    def load(self, path):
        """Takes back what `save` wrote. Raises ValueError for a file that is damaged."""
        try:
            saved = json.loads(Path(path).read_bytes())
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
        self.replay_ratio = self.flags.replay_ratio
        self.rng = np.random.default_rng([self.seed, 2])
        self.drawn = []  # (domain, index) of the conversations that this step trains on

    def make_buffer(self):
        flags = self.flags
        tokens = flags.replay_kind == "trajectories"
        return TrajectoryBuffer(flags.replay_buffer_size, flags.buffer_policy, self.seed, tokens)

    def keeps(self, trajectory):
        # Without cloning, a conversation without an advantage teaches nothing.
        tasks = self.flags.replay_kind == "tasks"
        return tasks or self.flags.clone_coef > 0 or trajectory.advantage is not None

    def previous_domains(self, current_domain) -> list[str]:
        """The domains to replay, the oldest first: those with enough stored conversations."""
        buffers = self.trainer.trajectory_buffer.buffers
        previous = [d for d in buffers if d != current_domain]
        previous = previous if self.flags.replay_all_domains else previous[-1:]
        return [d for d in previous if len(buffers[d].items) >= self.flags.min_buffer_size]

    def shares(self, domains, number) -> dict[str, int]:
        """`number` records, spread over domains as evenly as possible: {domain: number}."""
        turns = [domains[i] for i in self.rng.permutation(len(domains))]
        return {d: number // len(turns) + (k < number % len(turns)) for k, d in enumerate(turns)}

    def augment_batch(self, new_tasks, current_domain):
        previous = self.previous_domains(current_domain)
        if self.flags.replay_kind != "tasks" or not previous:
            return new_tasks
        count = replay_count(len(new_tasks), self.replay_ratio, self.rng)
        return [*new_tasks, *self._sample_replay_tasks(previous, count)]

    def _sample_replay_tasks(self, previous_domains, num_samples) -> list[TaskRef]:
        """The tasks to replay. Override it to choose others."""
        buffer, strategy = self.trainer.trajectory_buffer, self.flags.replay_strategy
        shares = self.shares(previous_domains, num_samples)
        return [task for domain, n in shares.items() for task in buffer.sample_tasks(domain, n, strategy)]

    def augment_trajectories(self, new, current_domain):
        previous = self.previous_domains(current_domain)
        self.drawn = []
        if self.flags.replay_kind != "trajectories" or not previous:
            return []
        buffer, warmup = self.trainer.trajectory_buffer, self.trainer.phase == "warmup"
        strategy = "high_reward" if warmup else self.flags.replay_strategy
        shares = self.shares(previous, replay_count(new, self.replay_ratio, self.rng))
        self.drawn = [(domain, i) for domain, n in shares.items() for i in buffer.draw(domain, n, strategy)]
        found = [buffer.buffers[domain].items[i] for domain, i in self.drawn]
        return [t for t in found if t.reward > 0] if warmup else found  # only successes are worth imitating

    def post_step_hook(self, trainer, domain):
        for (replayed, index), loss in zip(self.drawn, trainer.replayed_losses, strict=True):
            if math.isfinite(loss):  # train.py skips the update otherwise
                update_losses(trainer.trajectory_buffer.buffers[replayed], [index], [loss])

    def state_dict(self):
        return {"replay_ratio": self.replay_ratio, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        super().load_state_dict({name: value for name, value in state.items() if name != "rng"})
        self.rng.bit_generator.state = state["rng"]


class AdaptiveReplayCL(ReplayCL):
    """Replay whose ratio follows forgetting, see `adapt_ratio`. The score of a domain is the mean reward of its
    rollouts: it costs nothing extra, and no evaluation task steers the training.

    The reference is each task's last two groups of rollouts while its own domain was trained. After WINDOW replayed
    conversations of each previous domain, their rewards are compared with it, task by task (`mean_drop`), and the ratio
    is adapted once. It goes up if any domain has fallen, and down only if none has. Each domain begins at the initial
    ratio: the last domain's interference does not predict the next's.

    initial_replay_ratio: another name of replay_ratio.
    """

    WINDOW = 64

    def __init__(self, *values, initial_replay_ratio=None, **kwargs):
        if initial_replay_ratio is not None:
            kwargs["replay_ratio"] = initial_replay_ratio
        super().__init__(*values, **kwargs)
        low, high = self.flags.min_replay_ratio, self.flags.max_replay_ratio
        if low > high:
            raise ValueError(f"min_replay_ratio must be at most max_replay_ratio ({high}), got {low}")
        if self.flags.replay_kind != "tasks":
            raise ValueError("adaptive_replay reads the rewards of old tasks' rollouts: it needs --replay_kind tasks")
        self.replay_ratio = self.initial_ratio = min(max(self.replay_ratio, low), high)
        self.adapting = None  # the domain that the ratio is of
        self.reference: dict[str, dict[str, list]] = {}  # domain -> task -> rewards
        self.recent: dict[str, dict[str, list]] = {}  # the same, of replayed conversations since the last adaptation
        self.drops: dict[str, float] = {}  # the last that was found

    def augment_batch(self, new_tasks, current_domain):
        if current_domain != self.adapting:
            self.adapting, self.replay_ratio, self.recent = current_domain, self.initial_ratio, {}
        return super().augment_batch(new_tasks, current_domain)

    def post_step_hook(self, trainer, domain):
        for ref, rewards_G in zip(trainer.refs_P, trainer.rewards_P_G.tolist(), strict=True):
            rewards = [reward for reward in rewards_G if not math.isnan(reward)]
            if rewards and ref.domain == domain:
                groups = self.reference.setdefault(domain, {})
                groups[ref.task_id] = (groups.get(ref.task_id, []) + rewards)[-2 * len(rewards_G) :]
            elif rewards and ref.task_id in self.reference.get(ref.domain, {}):
                self.recent.setdefault(ref.domain, {}).setdefault(ref.task_id, []).extend(rewards)
        counts = [sum(map(len, tasks.values())) for tasks in self.recent.values()]
        if counts and min(counts) >= self.WINDOW:
            self.replay_ratio = max(self.adapted(old, tasks) for old, tasks in self.recent.items())
            self.recent = {}

    def adapted(self, domain, rewards) -> float:
        """The ratio that a previous domain asks for, by the rewards of its replayed tasks."""
        drop, error = mean_drop(self.reference[domain], rewards)
        self.drops[domain] = round(drop, 3)
        limits = {"minimum": self.flags.min_replay_ratio, "maximum": self.flags.max_replay_ratio}
        rule = {"threshold": self.flags.forgetting_threshold, "rate": self.flags.adaptation_rate}
        return adapt_ratio(self.replay_ratio, drop, error=error, **rule, **limits)

    def get_statistics(self):
        return {**super().get_statistics(), "drop since own training": self.drops}

    def state_dict(self):
        own = ("adapting", "reference", "recent", "drops")
        return {**super().state_dict(), **{name: getattr(self, name) for name in own}}
