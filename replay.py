"""What is remembered: replay buffers and sampling as pure functions, and the continual-learning algorithms.

    python replay.py        shows the reservoir's law: every item is kept with probability capacity / offered

Data flow: a finished group -> add -> Buffer -> sample -> augment_batch -> the next batch's rollouts.

To change what is kept, change `add`; what is replayed, `sample`; how much, `replay_count` and `adapt_ratio`. A
class of your own (a subclass of CLAlgorithm) runs with `python train.py --cl_algorithm path/to/file.py:MyClass`.
"""

import importlib.util
import inspect
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

STRATEGIES = ("random", "high_reward", "recent", "balanced")
POLICIES = ("reservoir",)


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
    slot = int(rng.integers(seen + 1))
    return slot if slot < capacity else None


def add(buffer, item, *, label=None, loss=0.0, reward=0.0, policy="reservoir", rng) -> int | None:
    """Offers an item to the buffer, in place. Returns the slot written, None if it was discarded.
    Raises ValueError for an unknown policy, or a loss or reward that is not finite."""
    if policy not in POLICIES:
        raise ValueError(f"unknown buffer policy {policy!r}; choose one of {', '.join(POLICIES)}")
    if not (math.isfinite(loss) and math.isfinite(reward)):
        raise ValueError(f"loss and reward of an item must be finite, got {loss} and {reward}")
    slot = reservoir_slot(buffer.seen, buffer.capacity, rng)
    row = (item, label, float(loss), float(reward), buffer.seen)
    buffer.seen += 1
    if slot is None:
        return None
    for values, value in zip(
        (buffer.items, buffer.labels, buffer.losses, buffer.rewards, buffer.order), row, strict=True
    ):
        values[slot : slot + 1] = [value]  # appends while the buffer is filling
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


def update_rewards(buffer, indices, rewards) -> None:
    """Replaces the rewards of items that were played again."""
    for index, reward in zip(indices, rewards, strict=True):
        buffer.rewards[index] = float(reward)


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

    trainer.groups: this step's groups on all ranks (task: TaskRef, replayed: bool, rewards: list of float, None
    where invalid); trainer.scores: {domain: mean reward} of the last evaluation; trainer.step, trainer.model, ...
    """

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

    def extra_loss(self, trainer):
        """A scalar tensor to add to the step's loss, or None."""
        return None

    def post_step_hook(self, trainer, domain):
        """After each optimiser step."""

    def post_task_hook(self, trainer, domain):
        """After a domain is finished and all domains are evaluated."""

    def get_statistics(self) -> dict:
        return {}

    def state_dict(self) -> dict:
        """Everything that a resumed run needs, as JSON."""
        return {}

    def load_state_dict(self, state):
        if state:
            raise ValueError(f"{type(self).__name__} cannot restore {sorted(state)}")


class SequentialCL(CLAlgorithm):
    """One domain after another and nothing against forgetting: the baseline."""


class ReplayCL(CLAlgorithm):
    """Old tasks, drawn from a buffer per domain, are rolled out again by the current policy, beside the new ones.

    replay_ratio: their share of the mixed batch, in [0, 1); replay_strategy: see `sample`; min_buffer_size: a domain
    with fewer stored tasks is not replayed; replay_all_domains: False replays the latest previous domain only.
    """

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
        if buffer_policy not in POLICIES:
            raise ValueError(f"unknown buffer_policy {buffer_policy!r}; choose one of {', '.join(POLICIES)}")
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

    def augment_batch(self, new_tasks, current_domain):
        previous = [d for d in self.buffers if d != current_domain]
        previous = previous if self.replay_all_domains else previous[-1:]
        ready = [d for d in previous if len(self.buffers[d].items) >= self.min_buffer_size]
        if not ready:
            return new_tasks
        count = replay_count(len(new_tasks), self.ratio, self.rng)
        turns = [ready[i] for i in self.rng.permutation(len(ready))]
        old_tasks = []
        for k, domain in enumerate(turns):  # as evenly over the domains as the count allows
            share = count // len(turns) + (k < count % len(turns))
            chosen = sample(self.buffers[domain], share, strategy=self.strategy, rng=self.rng)
            old_tasks += [self.buffers[domain].items[i] for i in chosen]
            self.replayed[domain] = self.replayed.get(domain, 0) + share
        return new_tasks + old_tasks

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
            "replayed tasks": sum(self.replayed.values()),
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


ALGORITHMS = {"sequential": SequentialCL, "replay": ReplayCL, "adaptive_replay": AdaptiveReplayCL}


def load_algorithm(name, args=None) -> CLAlgorithm:
    """The algorithm called `name`, or the class of "path/to/file.py:MyAlgorithm", built from train.py's flags.
    Raises ValueError when there is no such algorithm, file or class."""
    if ":" not in name:
        if name not in ALGORITHMS:
            known = ", ".join(ALGORITHMS)
            raise ValueError(f"unknown cl_algorithm {name!r}; choose one of {known}, or path/to/file.py:MyAlgorithm")
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


def main():
    rng = np.random.default_rng(0)
    capacity, offers, runs = 5, 50, 4000
    kept = np.zeros(offers)
    for _ in range(runs):
        buffer = Buffer(capacity)
        for item in range(offers):
            add(buffer, item, rng=rng)
        kept[buffer.items] += 1
    print(f"reservoir of {capacity}, {offers} offers, {runs} runs; each item should be kept {capacity / offers:.3f}")
    for first in range(0, offers, 10):
        share = kept[first : first + 10].mean() / runs
        print(f"  items {first:2d} to {first + 9:2d}: kept {share:.3f} {'#' * round(400 * share)}")
    drawn = [replay_count(4, 0.1, rng) for _ in range(runs)]
    print(f"replay_count(4, 0.1): {np.mean(drawn):.3f} on average, {4 * 0.1 / 0.9:.3f} expected")


if __name__ == "__main__":
    main()
