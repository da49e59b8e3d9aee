"""Generative replay: no sample of an earlier task is kept; a generator learns their distribution.

    python train.py --cl_algorithm generative_replay       on the agent
    python experiments/digits.py                           on split digits

Data flow, at the n-th task: the frozen generator of the previous task -> a generated batch -> the frozen policy labels
it -> policy and generator learn with L = (1/n) L_current + (1 - 1/n) L_replay on that same batch (Shin et al. 2017,
arXiv:1705.08690). At the task's end both are frozen anew, and everything stored of the task is dropped.

To generate in another way, write a class with the methods of `TokenVAE` and return it from `make_generator` in a
subclass of `GenerativeReplayCL`.
"""

import itertools
import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated

import numpy as np
import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

import distill
import distributed
import policy
from algorithm import CLAlgorithm
from flags import Count, Positive, Units
from replay import Buffer, add, sample
from text import printable
from vae import VAE, ConvVAE, TokenVAE, elbo_loss, frozen, make_generator  # noqa: F401 (some are for readers)

VOCABULARY = 8192  # distinct tokens that the generator has room for
LATENT_DIM = 32
LEARNING_RATE = 2e-3  # of the generator
COMPONENTS = 10  # Gaussians of the prior that is fitted for each domain when one ends
BATCH = 16  # windows of the domain per update of the generator, and as many generated ones


@dataclass
class Flags:
    """Generative replay (generative_replay)."""

    replay_weight: Positive = 4.0
    """weight of the KL to the previous domain's policy, times 1 - 1/n in the n-th domain"""
    window: Annotated[int, Field(ge=2, le=10**6)] = 256
    """tokens of a window. A window should include the message being answered"""
    window_batch: Count = 32
    """generated windows per optimiser step: the batch size of replay"""
    memory_size: Count = 500
    """windows of the current domain that are kept for the generator until the domain ends"""
    generator_update_freq: Annotated[float, Field(ge=1e-3, le=1e6)] = 1 / 6
    """GRPO steps per update of the generator; below 1, several updates a step. With 5, the embedded run forgets its
    first domain entirely: the generator has three updates to learn a domain (docs/results.md)"""
    generator_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """dropout of the generator. 0.1 made no measurable difference (docs/results.md)"""
    generator_hidden_dims: list[Units] = field(default_factory=lambda: [256])
    """units of the generator's hidden layers. A second one of 128 made no measurable difference (docs/results.md)"""


def replay_weights(n) -> tuple[float, float]:
    """The shares of the current and of the replayed loss at the n-th task, n from 1: (1/n, 1 - 1/n), so that every
    task so far counts the same (Shin et al. 2017, eq. 1 with r = 1/n).

    >>> replay_weights(4)
    (0.25, 0.75)
    """
    if n < 1:
        raise ValueError(f"tasks are counted from 1, got {n}")
    return 1 / n, 1 - 1 / n


def distillation_loss(student_logits, teacher_logits, temperature=2.0) -> Tensor:
    """Cross-entropy of the student to softmax(teacher / T), times T^2 so that its gradient keeps its size whatever T is
    (Hinton et al. 2015, arXiv:1503.02531, section 2), a mean over the batch.

    Logits are (B, classes); classes beyond the teacher's, which are new, have probability 0 in the target.
    """
    new = student_logits.shape[1] - teacher_logits.shape[1]
    target = F.pad(F.softmax(teacher_logits / temperature, 1), (0, new))
    return -(target * F.log_softmax(student_logits / temperature, 1)).sum(1).mean() * temperature**2


# -------------------------------------------------------------------------------------------------------- rehearsal


class Rehearsal:
    """A generator that learns one task after another: the current one from a reservoir of its samples, all earlier ones
    from its own frozen copy. At a task's end the reservoir is emptied.

    generator: see `VAE`; memory_size: samples in the reservoir; rng: of the draws from it. A condition is any integer,
    such as the sample's class. task_balanced: generate the conditions in equal numbers; False: draw them at random.
    """

    def __init__(self, generator, memory_size=500, learning_rate=1e-3, rng=None, task_balanced=True):
        self.generator, self.learning_rate, self.task_balanced = generator, learning_rate, task_balanced
        self.generator_optimizer = generator.optimizer(learning_rate)
        self.memory = Buffer(memory_size)
        self.old_generator = None  # frozen at the end of the previous task
        self.conditions, self.old_conditions = [], []  # seen so far, and seen at that end; in order of appearance
        self.tasks_done = 0
        self.rng = rng or np.random.default_rng(0)

    def offer(self, x, condition=None):
        """Offers a sample of the current task to the memory. Raises ValueError for one condition too many."""
        if condition is not None and condition not in self.conditions:
            room = self.generator.num_conditions
            if len(self.conditions) == room > 0:
                raise ValueError(f"the generator has {room} conditions, {self.conditions}: no room for {condition}")
            self.conditions.append(int(condition))
        add(self.memory, (x, condition), rng=self.rng)

    def rows(self, condition) -> Tensor | None:
        """The generator's numbers of conditions (B,), from 0 in the order of their first appearance."""
        if condition is None:
            return None
        return torch.tensor([self.conditions.index(c) for c in condition.tolist()], device=condition.device)

    def generated(self, number) -> tuple[Tensor, Tensor | None]:
        """(x, condition) from the generator of the previous task. Raises ValueError before any task has ended."""
        if self.old_generator is None:
            raise ValueError("there is nothing to replay before the first task has ended")
        condition = None
        if self.old_generator.num_conditions:
            seen = self.old_conditions
            order = self.rng.permutation(seen) if self.task_balanced else self.rng.choice(seen, number)
            condition = torch.tensor(np.resize(order, number), device=self.device)
        return self.old_generator.generate(number, condition=self.rows(condition)), condition

    def remembered(self, number):
        """(x, condition) of the current task, from the memory. Raises ValueError if it is empty."""
        if not self.memory.items:
            raise ValueError("there is no sample of the current task in the memory: offer some first")
        return self.batch([self.memory.items[i] for i in sample(self.memory, number, rng=self.rng)])

    def batch(self, items):
        x = torch.stack([x for x, _ in items]).to(self.device)
        return x, None if items[0][1] is None else torch.tensor([c for _, c in items], device=self.device)

    def teach_generator(self, number, replayed=None) -> float:
        """One update of the generator, on `number` samples of the current task and on `replayed`, a result of
        `generated` (default: a new one of the same size). Returns its loss."""
        current, old = replay_weights(self.tasks_done + 1)
        parts = [(current, *self.remembered(number))]
        if self.tasks_done > 0:
            parts.append((old, *(replayed or self.generated(number))))
        parts = [(weight, x, self.rows(condition)) for weight, x, condition in parts]
        return self.generator.learn(self.generator_optimizer, parts)

    def learnt(self, size=64):
        """Batches (x, condition) of everything that the generator has learnt: the memory, and as many generated samples
        for each earlier task."""
        items = self.memory.items
        for first in range(0, len(items), size):
            yield self.batch(items[first : first + size])
        for first in range(0, len(items) * self.tasks_done, size):
            yield self.generated(min(size, len(items) * self.tasks_done - first))

    def end_task(self):
        """Freezes the generator, and drops everything stored of this task: the memory, and gradients and moments, which
        may hold single samples. A task without samples does not count."""
        if not self.memory.items:
            return
        self.generator.fit_prior((x, self.rows(condition)) for x, condition in self.learnt())
        self.generator.zero_grad(set_to_none=True)
        self.generator_optimizer = self.generator.optimizer(self.learning_rate)
        self.old_conditions = list(self.conditions)
        self.old_generator = frozen(self.generator)
        self.memory = Buffer(self.memory.capacity)
        self.tasks_done += 1

    @property
    def device(self):
        return next(self.generator.parameters()).device

    def to(self, device):
        """Moves both generators and the optimiser's moments; the memory stays on the CPU."""
        if device == self.device:
            return
        self.generator.to(device)
        if self.old_generator is not None:
            self.old_generator.to(device)
        state = self.generator_optimizer.state_dict()
        self.generator_optimizer = self.generator.optimizer(self.learning_rate)
        self.generator_optimizer.load_state_dict(state)  # moves the moments to the parameters' device

    def state_dict(self) -> dict:
        """A resumed run needs this, as JSON, and `tensors`."""
        counts = {name: getattr(self, name) for name in ("tasks_done", "conditions", "old_conditions")}
        return {**counts, "rng": self.rng.bit_generator.state, "seen": self.memory.seen}

    def load_state_dict(self, state):
        for name in ("tasks_done", "conditions", "old_conditions"):
            setattr(self, name, state[name])
        self.rng.bit_generator.state = state["rng"]
        self.memory.seen = state["seen"]

    def tensors(self) -> dict[str, Tensor]:
        """Both generators, the optimiser's moments and the memory (whose conditions are integers), on the CPU."""
        parts = {"generator": self.generator.state_dict()}
        if self.old_generator is not None:
            parts["old_generator"] = self.old_generator.state_dict()
        for i, moments in self.generator_optimizer.state_dict()["state"].items():
            parts[f"optimizer.{i}"] = moments
        if self.memory.items:
            x, conditions = zip(*self.memory.items, strict=True)
            order = torch.tensor(self.memory.order)
            parts["memory"] = {"x": torch.stack(x), "condition": torch.tensor(conditions), "order": order}
        return {f"{k}.{name}": t.cpu().contiguous() for k, part in parts.items() for name, t in part.items()}

    def load_tensors(self, found):
        """The inverse of `tensors`, after `load_state_dict`. Raises KeyError or RuntimeError for missing tensors."""

        def part(prefix):
            return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}

        self.generator.load_state_dict(part("generator."))
        if self.tasks_done > 0:
            self.old_generator = frozen(self.generator)
            self.old_generator.load_state_dict(part("old_generator."))
        saved = self.generator_optimizer.state_dict()
        for key, value in part("optimizer.").items():
            i, name = key.split(".")
            saved["state"].setdefault(int(i), {})[name] = value
        self.generator_optimizer.load_state_dict(saved)
        if self.memory.seen > 0:
            items = list(zip(found["memory.x"], found["memory.condition"].tolist(), strict=True))
            rest = ([None] * len(items), [0.0] * len(items), [0.0] * len(items), found["memory.order"].tolist())
            self.memory = Buffer(self.memory.capacity, items, *rest, self.memory.seen)


# -------------------------------------------------------------------------------------------------------- the agent


class GenerativeReplayCL(CLAlgorithm):
    """Generative replay of conversations. While a domain is trained, a `TokenVAE` with the domain as condition learns
    windows of its conversations (consecutive pieces of `window` tokens, each marked as sampled or read) and rehearses
    the earlier domains on its own samples; only the generator and the frozen policy outlive the domain. While the n-th
    domain is trained, replay_weight (1 - 1/n) KL(frozen || policy), a mean over the tokens that the policy is to sample
    in generated windows, is added to the loss of every step.

    The generator numbers the tokens that occur (a token that is both read and sampled counts twice), VOCABULARY of them
    at most; a window ends where there is no number left.
    """

    Flags = Flags
    uses_trajectories = True
    keeps_no_data = True

    def __init__(self, task_order, micro_batch_tokens=16384, **kwargs):
        super().__init__(**kwargs)
        self.order = task_order
        self.windows_at_once = max(1, micro_batch_tokens // self.flags.window)
        with distributed.seeded("cpu", self.seed, 0):
            generator = self.make_generator()
        rng = np.random.default_rng([self.seed, 2])
        self.rehearsal = Rehearsal(generator, self.flags.memory_size, LEARNING_RATE, rng)
        self.symbols = [0]  # the meaning of the generator's numbers: 2 * token + sampled; the first is the end
        self.numbers = {}  # the inverse
        self.teacher = None  # the policy at the end of the previous domain (policy.snapshot)
        self.draws = 0  # batches generated and taught so far: the position of the random numbers
        self.steps = 0  # of GRPO, so far
        self.generated = dict.fromkeys(task_order, 0)  # windows of each domain
        self.history = {}  # sum and count of each statistic, by name and the domain that was trained
        self.bytes_dropped = 0  # of windows, at the ends of their domains

    def make_generator(self):
        """A generator with the methods of TokenVAE, and the domain as condition."""
        flags = self.flags
        layers = {"hidden_dims": flags.generator_hidden_dims, "dropout": flags.generator_dropout}
        conditions = {"num_conditions": len(self.order), "components": COMPONENTS}
        return TokenVAE(VOCABULARY, flags.window, latent_dim=LATENT_DIM, **layers, **conditions)

    def seeded(self, *purpose):
        """Random numbers of one draw, the same on every rank (or not, with the rank among `purpose`)."""
        return distributed.seeded(self.rehearsal.device, self.seed, *purpose)

    def extra_losses(self, trainer):
        if self.teacher is None or self.rehearsal.tasks_done == 0:  # the first domain, or no earlier conversations
            return
        self.rehearsal.to(trainer.model.device)
        ranks = distributed.world_size()
        self.draws += 1
        with self.seeded(1, self.draws, distributed.rank()):
            windows, condition = self.rehearsal.generated(math.ceil(self.flags.window_batch / ranks))
        for k in condition.tolist():
            self.generated[self.order[k]] += ranks
        parts = [self.as_tokens(part) for part in windows.split(self.windows_at_once)]
        total = max(1, distributed.sum_over_ranks(sum(int(mask[:, 1:].sum()) for _, mask in parts)))
        weight = self.flags.replay_weight * replay_weights(self.rehearsal.tasks_done + 1)[1]
        divergence = 0.0
        for kl in distill.distillation(trainer.model, self.teacher, parts):
            divergence += kl.item()
            yield weight * kl * ranks / total  # the loop averages over ranks
        self.count(trainer.domain, "distillation KL", distributed.sum_over_ranks(divergence) / total)

    def post_step_hook(self, trainer, domain):
        """Offers the step's conversations to the memory and teaches the generator."""
        self.rehearsal.to(trainer.model.device)
        rate = Fraction(1 / self.flags.generator_update_freq).limit_denominator(10**6)  # a float 0.3 is not 3/10
        updates = math.floor((self.steps + 1) * rate) - math.floor(self.steps * rate)
        self.steps += 1
        conversations = [
            [2 * token + (turn >= 0) for token, turn in zip(t.token_ids, t.turns, strict=True)]
            for t in trainer.trajectories
            if t.domain == domain
        ]
        self.number(conversations)
        for conversation in conversations:
            for window in self.as_windows(conversation):
                self.rehearsal.offer(window, self.order.index(domain))
            unknown = any(symbol not in self.numbers for symbol in conversation)
            self.count(domain, "cut for lack of vocabulary", float(unknown))
        if not self.rehearsal.memory.items:
            return
        self.draws += 1
        with self.seeded(2, self.draws):
            for _ in range(updates):
                self.count(domain, "generator loss", self.rehearsal.teach_generator(BATCH))

    def post_task_hook(self, trainer, domain):
        """The end of the domain: only the generator and the frozen policy are kept."""
        self.rehearsal.to(trainer.model.device)
        raw = [window for window, _ in self.rehearsal.memory.items]
        self.bytes_dropped += sum(4 * int((window != 0).sum()) for window in raw)
        self.draws += 1
        with self.seeded(3, self.draws):
            self.rehearsal.end_task()
        if distributed.world_size() > 1 and raw:  # ranks may differ in the last digit
            kept = self.rehearsal.old_generator.state_dict()
            for value in kept.values():
                dist.broadcast(value, 0)
            self.rehearsal.generator.load_state_dict(kept)
        self.teacher = policy.snapshot(trainer.model)
        if raw:
            self.count(domain, "equal to the nearest real window", self.likeness(torch.stack(raw), domain))
        if distributed.rank() == 0:
            distributed.write_text(trainer.run / f"generated_after_{domain}.txt", self.show_windows(trainer.tokenizer))

    def samples(self, condition, number, *purpose) -> Tensor:
        with self.seeded(*purpose):
            rows = self.rehearsal.rows(torch.full((number,), condition, device=self.rehearsal.device))
            return self.rehearsal.old_generator.generate(number, condition=rows)

    def likeness(self, raw, domain, number=100) -> float:
        """The mean share of a generated window's tokens that the most similar real window (of `raw`) has at the same
        place: how well the generator has learnt, and how little it has forgotten of whom."""
        made = self.samples(self.order.index(domain), number, 5).cpu()
        equal = [((raw == window) & (window != 0)).sum(1).max() / max(1, (window != 0).sum()) for window in made]
        return float(sum(equal)) / number

    def show_windows(self, tokenizer, number=3) -> str:
        """Generated windows, `number` of each domain that has ended; << >> marks what the policy is to sample."""
        shown = []
        for k in self.rehearsal.old_conditions:
            for window in self.samples(k, number, 4, k).tolist():
                symbols = [self.symbols[place] for place in itertools.takewhile(bool, window)]
                pieces = itertools.groupby(symbols, key=lambda symbol: symbol % 2)
                texts = ((acts, tokenizer.decode([symbol // 2 for symbol in piece])) for acts, piece in pieces)
                shown.append(f"[{self.order[k]}] " + "".join(f"<<{text}>>" if acts else text for acts, text in texts))
        return printable("\n\n".join(shown), keep="\n") + "\n"

    def number(self, conversations):
        """Gives new symbols a number, in sorted order: the numbers do not tell which symbol followed which."""
        new = sorted({symbol for conversation in conversations for symbol in conversation} - set(self.numbers))
        generator = self.rehearsal.generator
        self.symbols += new[: generator.embedding.num_embeddings - len(self.symbols)]
        self.numbers = {symbol: number for number, symbol in enumerate(self.symbols) if number > 0}
        generator.used.fill_(len(self.symbols))

    def as_windows(self, conversation) -> list[Tensor]:
        """Consecutive pieces (window,) of a conversation in the generator's numbers; 0 after its end, and from a symbol
        without a number on."""
        window, pieces = self.flags.window, []
        for start in range(0, len(conversation) - 1, window):
            numbers = [self.numbers.get(symbol, 0) for symbol in conversation[start : start + window]]
            numbers = numbers[: numbers.index(0)] if 0 in numbers else numbers
            if numbers:
                pieces.append(torch.tensor(numbers + [0] * (window - len(numbers))))
        return pieces

    def as_tokens(self, windows):
        """(token ids, mask of tokens that the policy is to sample), each (B, length of the longest window), of the
        generator's numbers. Nothing counts after a window's end."""
        mask = (windows != 0).cumprod(1)
        longest = max(1, int(mask.sum(1).max()))
        windows, mask = windows[:, :longest], mask[:, :longest]
        symbols = torch.tensor(self.symbols, device=windows.device)[windows]
        return symbols // 2 * mask, symbols % 2 * mask

    def count(self, domain, name, value):
        """Adds to the running mean `name` of a domain's training."""
        total = self.history.setdefault(name, {}).setdefault(domain, [0.0, 0])
        total[0] += value
        total[1] += 1

    def get_statistics(self):
        means = {name: {d: round(total / n, 4) for d, (total, n) in by.items()} for name, by in self.history.items()}
        return {"windows generated": dict(self.generated), **means, "bytes of the windows dropped": self.bytes_dropped}

    def bytes_kept(self):
        """Bytes of the generator and the frozen policy."""
        generator = self.rehearsal.old_generator
        tensors = (generator.state_dict() if generator else {}).values()
        teacher = 0 if self.teacher is None else policy.snapshot_bytes(self.trainer.model)
        return teacher + sum(t.nbytes for t in tensors)

    def state_dict(self):
        mine = ("symbols", "draws", "steps", "generated", "history", "bytes_dropped")
        return {"rehearsal": self.rehearsal.state_dict(), **{name: getattr(self, name) for name in mine}}

    def load_state_dict(self, state):
        super().load_state_dict({name: value for name, value in state.items() if name != "rehearsal"})
        self.numbers = {symbol: number for number, symbol in enumerate(self.symbols) if number > 0}
        self.rehearsal.load_state_dict(state["rehearsal"])

    def tensors(self):
        found = self.rehearsal.tensors()
        if self.teacher is not None:
            teacher = policy.gathered_snapshot(self.trainer.model, self.teacher)
            found.update({f"teacher.{name}": tensor for name, tensor in teacher.items()})
        return found

    def load_tensors(self, file):
        names = [name for name in file.keys() if not name.startswith("teacher.")]  # noqa: SIM118 (it is no dict)
        self.rehearsal.load_tensors({name: file.get_tensor(name) for name in names})
        if self.rehearsal.tasks_done > 0:
            self.teacher = policy.snapshot_from(self.trainer.model, lambda name: file.get_tensor(f"teacher.{name}"))
