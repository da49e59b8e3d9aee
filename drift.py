"""Drift: how far the policy has moved from each earlier one, on new tasks and on old ones. It changes no training.

    python train.py --drift_every 8 ...      every 8 GRPO steps, and at each domain's end

Two laws of forgetting have been proposed: that it follows the forward KL(pi_0 || pi) on the new task (RL's Razor,
arXiv:2509.04259), and that it follows the drift on old tasks (arXiv:2607.04364). For each earlier policy (the one
before any training, and each domain's last) and each domain so far, metrics.jsonl gets both divergences, exact over
the vocabulary, as drift_forward/POLICY/DOMAIN and drift_reverse/POLICY/DOMAIN: means in nats over the agent's tokens
in conversations of the domain's training. Both are taken at the same prefixes, which all policies of that training
have sampled: neither is the divergence of whole conversations. experiments/forgetting.py reads them.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import distributed
import policy
import replay
from algorithm import CLAlgorithm, batches
from distill import hidden_states
from flags import CountOrZero
from grpo import Trajectory

CONVERSATIONS = 16  # of each domain, a reservoir of its training


@dataclass(kw_only=True)
class Flags:
    """Drift."""

    drift_every: CountOrZero = 0
    """GRPO steps between two measurements of the drift from earlier policies; one more at each domain's end. 0: none"""


@torch.no_grad()
def divergences(model, before_NH, head_before, now_NH, head_now, temperature=1.0) -> tuple[Tensor, Tensor]:
    """(KL(before || now), KL(now || before)), each (N,) in nats, of N distributions that are given by hidden states and
    the head that they belong to. model: what they are computed like."""
    size = max(1, policy.CHUNK // model.config.vocab_size)
    forward, reverse = [], []
    for before, now in zip(before_NH.split(size), now_NH.split(size), strict=True):
        with policy.autocast(model):
            logits = head_before(before).float(), head_now(now).float()
        p, q = ((each / temperature).log_softmax(-1) for each in logits)
        forward.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
        reverse.append(F.kl_div(p, q, reduction="none", log_target=True).sum(-1))
    return torch.cat(forward), torch.cat(reverse)


class Drift(CLAlgorithm):
    """Logs `divergences` beside any algorithm. It keeps a copy of the trained parameters and a few conversations of
    each domain, beside an algorithm that keeps no data, too."""

    Flags = Flags
    uses_trajectories = True

    def __init__(self, drift_every=0, temperature=1.0, **kwargs):
        super().__init__(drift_every=drift_every, **kwargs)
        self.temperature = temperature
        self.rng = np.random.default_rng([self.seed, 3])
        self.ends = {}  # domain: policy.snapshot at its end
        self.kept = {}  # domain: replay.Buffer of (token ids, turns)

    def post_step_hook(self, trainer, domain):
        for t in trainer.trajectories:
            if t.domain in trainer.domains:
                buffer = self.kept.setdefault(t.domain, replay.Buffer(CONVERSATIONS))
                replay.add(buffer, [t.token_ids, t.turns], rng=self.rng)
        if (trainer.step + 1) % self.flags.drift_every == 0:
            self.measure(trainer)

    def post_task_hook(self, trainer, domain):
        self.measure(trainer)
        self.ends[domain] = policy.snapshot(trainer.model)

    def measure(self, trainer):
        """Logs the drift since each earlier policy on each domain's conversations."""
        model = trainer.model
        rows = {domain: self.rows(trainer, buffer.items) for domain, buffer in self.kept.items()}

        def states():
            return policy.frozen_head(model), {d: [hidden_states(model, *row) for row in of] for d, of in rows.items()}

        head, now = states()
        for since, saved in {"initial": trainer.initial, **self.ends}.items():
            with policy.weights_of(model, saved):
                head_before, before = states()
            for domain in rows:
                sums = {"tokens": 0, "forward": 0.0, "reverse": 0.0}
                for pair in zip(before[domain], now[domain], strict=True):
                    forward, reverse = divergences(model, pair[0], head_before, pair[1], head, self.temperature)
                    sums["tokens"] += len(forward)
                    sums["forward"] += forward.sum().item()
                    sums["reverse"] += reverse.sum().item()
                sums = distributed.sum_over_ranks(sums)
                for kind in ("forward", "reverse"):
                    trainer.log_custom_metric(f"drift_{kind}/{since}/{domain}", sums[kind] / max(1, sums["tokens"]))

    def rows(self, trainer, conversations) -> list[tuple]:
        """This rank's conversations as micro-batches (ids, mask)."""
        mine = [
            Trajectory(token_ids=ids, action_mask=[turn >= 0 for turn in turns], logprobs=[0.0] * len(ids), turns=turns)
            for ids, turns in conversations[distributed.rank() :: distributed.world_size()]
        ]
        return [(batch["ids"], batch["mask"]) for batch in batches(trainer, mine)]

    def get_statistics(self):
        return {}

    def state_dict(self):
        kept = {domain: asdict(buffer) for domain, buffer in self.kept.items()}
        return {"kept": kept, "ends": list(self.ends), "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        self.kept = {domain: replay.Buffer(**buffer) for domain, buffer in state["kept"].items()}
        self.ends = {domain: self.ends.get(domain) for domain in state["ends"]}  # the rest: load_tensors
        self.rng.bit_generator.state = state["rng"]

    def tensors(self):
        return policy.gathered_snapshots(self.trainer.model, self.ends)

    def load_tensors(self, file):
        self.ends = policy.snapshots_from(self.trainer.model, self.ends, file.get_tensor)


def loggers(args) -> list[CLAlgorithm]:
    """What train.py's flags put beside the algorithms."""
    return [Drift.from_args(args)] if args.drift_every else []
