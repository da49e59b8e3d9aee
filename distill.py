"""Distillation of what the policy was: on-policy distillation of old domains, DER++, and their divergences.

    python train.py --cl_algorithm distillation     old tasks are played again; each domain's last policy corrects them
    python train.py --cl_algorithm der --replay_kind trajectories      stored conversations keep their distributions

Data flow: policy.snapshot of a teacher -> distillation -> KL of its distributions and the policy's, exact over the
vocabulary (LwF and generative replay, too); or sampled tokens -> top_logprobs, in the buffer -> coarse_kl.
"""

import base64
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import distributed
import policy
from algorithm import batches
from flags import Weight
from replay import ReplayCL

TOP = 8  # log-probabilities that DER++ keeps of each sampled token's distribution
NOTHING = 1e-6  # a probability that rounding in float32 may leave


@dataclass(kw_only=True)
class Flags:
    """On-policy distillation, DER++."""

    distill_coef: Weight = 1.0
    """weight of the KL to the teacher (distillation), or to the stored distributions (der)"""


# -------------------------------------------------------------------------------------------------------- the formulas


def hidden_states(model, ids_B_T, mask_B_T) -> Tensor:
    """The last hidden states (N, H) that predict the N tokens of `mask_B_T` (never a first token), without gradient.
    With the `policy.frozen_head` they stand for N distributions over the vocabulary, in the memory of N vectors."""
    with torch.no_grad():
        return policy.read_logits(model, ids_B_T, mask_B_T[:, 1:].bool(), None)[0]


def distillation_kl(model, ids_B_T, mask_B_T, head, teacher_NH, temperature=1.0, reverse=False) -> Tensor:
    """KL(teacher || policy) in nats, or if `reverse` KL(policy || teacher), summed over the N distributions of the
    tokens of `mask_B_T`; a scalar. The teacher is given by its `policy.frozen_head` and its `hidden_states` for the
    same tokens."""

    def read(logits_NV, teacher_NH):
        with torch.no_grad():
            teacher_NV = (head(teacher_NH).float() / temperature).log_softmax(-1)
        ours_NV = (logits_NV / temperature).log_softmax(-1)
        p, q = (ours_NV, teacher_NV) if reverse else (teacher_NV, ours_NV)
        return (F.kl_div(q, p, reduction="none", log_target=True).sum(-1),)

    (kl,) = policy.read_logits(model, ids_B_T, mask_B_T[:, 1:].bool(), read, teacher_NH)
    return kl.sum()


def distillation(model, teacher, rows, **kind):
    """Yields the `distillation_kl` of each (ids, mask) of `rows`. teacher: a `policy.snapshot`."""
    if not rows:  # with shards, on all ranks or on none, see algorithm.batches
        return
    with policy.weights_of(model, teacher):
        head = policy.frozen_head(model)
        taught = [hidden_states(model, *row) for row in rows]
    for row, states_NH in zip(rows, taught, strict=True):
        yield distillation_kl(model, *row, head, states_NH, **kind)


def top_logprobs(model, ids_B_T, mask_B_T, temperature=1.0, k=TOP) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each of the N distributions of the tokens of `mask_B_T`: (log-probabilities, ids), both
    (N, k)."""

    def read(logits_NV):
        return tuple((logits_NV / temperature).log_softmax(-1).topk(k))

    with torch.no_grad():
        return policy.read_logits(model, ids_B_T, mask_B_T[:, 1:].bool(), read)


def pack(logprobs_NK, ids_NK) -> str:
    """As text for JSON, 11 bytes for each pair of numbers. See `unpack`."""
    pairs = torch.stack([logprobs_NK.float().view(torch.int32), ids_NK.int()])
    return base64.b64encode(pairs.cpu().numpy().tobytes()).decode()


def unpack(text) -> tuple[Tensor, Tensor]:
    """The (log-probabilities, ids), both (N, TOP), that `pack` was given."""
    numbers = np.frombuffer(base64.b64decode(text), np.int32).reshape(2, -1, TOP).copy()
    return torch.from_numpy(numbers[0].view(np.float32)), torch.from_numpy(numbers[1].astype(np.int64))


def coarse_kl(logits_NV, ids_NK, stored_NK) -> Tensor:
    """KL(stored || policy) (N,) in nats over K + 1 classes: the tokens ids_NK, whose stored log-probabilities are
    stored_NK, and all others together. With K = V it is the KL over the vocabulary."""
    logprobs_NV, outside = logits_NV.log_softmax(-1), -1e4  # a logarithm of nothing that has a gradient
    terms = stored_NK.exp() * (stored_NK - logprobs_NV.gather(-1, ids_NK))
    rest = 1 - stored_NK.exp().sum(-1)
    others = logprobs_NV.scatter(-1, ids_NK, outside).logsumexp(-1)
    of_rest = rest * (rest.clamp(min=NOTHING).log() - others)
    return terms.sum(-1) + of_rest.where(rest > NOTHING, 0.0)


# ------------------------------------------------------------------------------------------------------ the algorithms


class DistillationCL(ReplayCL):
    """On-policy distillation (Agarwal et al. 2024, arXiv:2306.13649, GKD with the reverse KL and on-policy data only)
    of each finished domain from the policy at its end. Old tasks are drawn as in replay and played by the current
    policy; distill_coef KL(policy || teacher), a mean over their sampled tokens and exact over the vocabulary, takes
    the place of the policy gradient. Their rewards are not computed.

    The gradient is that of the KL at the sampled prefixes, not that of their distribution (as in GKD). GKD averages
    over the tokens of each sequence first; here every token counts the same. In the warm start old tasks are replayed
    as in `replay`: by their demonstrations."""

    def __init__(self, *values, distill_coef=1.0, temperature=1.0, **kwargs):
        super().__init__(*values, **kwargs)
        if self.flags.replay_kind != "tasks":
            raise ValueError("distillation plays old tasks again: it needs --replay_kind tasks")
        self.distill_coef, self.temperature = distill_coef, temperature
        self.teachers = {}  # domain: policy.snapshot at its end

    def needs_rewards(self, domain):
        return domain in self.trainer.domains

    def keeps(self, trajectory):
        return trajectory.domain in self.trainer.domains

    def extra_losses(self, trainer):
        if trainer.phase == "warmup":
            return
        usable = [t for t in trainer.sampled if t.usable(trainer.args.mask_truncated)]
        old = {domain: [t for t in usable if t.domain == domain] for domain in self.teachers}
        rows = {d: [(b["ids"], b["mask"]) for b in batches(trainer, found)] for d, found in old.items()}
        total = distributed.sum_over_ranks(sum(int(mask.sum()) for of in rows.values() for _, mask in of))
        weight = self.distill_coef * distributed.world_size() / max(1, total)  # the loop averages over ranks
        for domain, teacher in self.teachers.items() if total else ():
            for kl in distillation(trainer.model, teacher, rows[domain], temperature=self.temperature, reverse=True):
                yield weight * kl

    def post_task_hook(self, trainer, domain):
        self.teachers[domain] = policy.snapshot(trainer.model)

    def bytes_kept(self):
        return len(self.teachers) * policy.snapshot_bytes(self.trainer.model)

    def state_dict(self):
        return {**super().state_dict(), "taught": list(self.teachers)}

    def load_state_dict(self, state):
        self.teachers = {domain: self.teachers.get(domain) for domain in state["taught"]}  # the rest: load_tensors
        super().load_state_dict({name: value for name, value in state.items() if name != "taught"})

    def tensors(self):
        return policy.gathered_snapshots(self.trainer.model, self.teachers)

    def load_tensors(self, file):
        self.teachers = policy.snapshots_from(self.trainer.model, self.teachers, file.get_tensor)


class DERPlusPlus(ReplayCL):
    """Dark experience replay (Buzzega et al. 2020, arXiv:2004.07211, eq. 6), on two draws from the buffer in each step:
    distill_coef KL(stored || policy), a mean over the sampled tokens of the one, from the distributions that they were
    sampled from; and clone_coef times cloning of the other (grpo.cloning_loss). Stored conversations have no policy
    gradient. The warm start draws successes only, which it imitates.

    What differs from the paper:
    - It has the squared distance of all logits, which treats likely and unlikely tokens alike. Here it is the KL, over
      the TOP likeliest tokens and the others as one class.
    - Its second term is the cross-entropy of every label; cloning has that of successful conversations only.
    - It replays the current task, too; here earlier domains only.
    The distributions are those of the trainer. A vLLM server that sampled may differ a little."""

    def __init__(self, *values, distill_coef=1.0, temperature=1.0, **kwargs):
        super().__init__(*values, **kwargs)
        if self.flags.replay_kind != "trajectories":
            raise ValueError("der draws stored conversations: it needs --replay_kind trajectories")
        self.distill_coef, self.temperature = distill_coef, temperature
        self.taught = []  # the stored conversations of this step's first draw

    def keeps(self, trajectory):
        return True

    def augment_trajectories(self, new, current_domain):
        if self.trainer.phase == "grpo":
            self.keep_distributions(self.trainer)
        self.taught = super().augment_trajectories(new, current_domain)
        counted = self.trainer.state["replayed"][self.trainer.phase]  # the loop counts the second draw
        for t in self.taught:
            counted[t.domain] = counted.get(t.domain, 0) + 1
        return [replace(t, advantage=None) for t in super().augment_trajectories(new, current_domain)]

    def keep_distributions(self, trainer):
        """Gives each conversation of this rank the distributions that its tokens were sampled from."""
        mine = [t for t in trainer.sampled if t.usable(trainer.args.mask_truncated)]
        for batch in batches(trainer, mine):
            logprobs, ids = top_logprobs(trainer.model, batch["ids"], batch["mask"], self.temperature)
            lengths = batch["mask"][:, 1:].sum(1).tolist()
            for i, *top in zip(batch["indices"], logprobs.split(lengths), ids.split(lengths), strict=True):
                if i < len(mine):  # not a dummy
                    mine[i].top = pack(*top)

    def extra_losses(self, trainer):
        mine = self.taught[distributed.rank() :: distributed.world_size()]
        total = distributed.sum_over_ranks(sum(sum(t.action_mask) for t in mine))
        weight = self.distill_coef * distributed.world_size() / max(1, total)  # the loop averages over ranks

        def read(logits_NV, ids_NK, stored_NK):
            return (coarse_kl(logits_NV / self.temperature, ids_NK, stored_NK),)

        for batch in batches(trainer, mine) if total else ():
            tops = [unpack(mine[i].top if i < len(mine) else "") for i in batch["indices"]]  # a dummy has none
            stored, ids = (torch.cat(column).to(batch["ids"].device) for column in zip(*tops, strict=True))
            (kl,) = policy.read_logits(trainer.model, batch["ids"], batch["mask"][:, 1:], read, ids, stored)
            yield weight * kl.sum()

    def post_step_hook(self, trainer, domain):
        """Losses stay those of the offer: what is replayed has no policy gradient."""
