"""GRPO as pure formulas: trajectories, advantages, the KL penalty, the clipped loss, batches.

Data flow: rollout -> Trajectory -> rewards -> group_advantages -> collate -> policy_loss.

What differs from GRPO as published (Shao et al. 2024, arXiv:2402.03300):
- The default loss is DAPO's (Yu et al. 2025, arXiv:2503.14476): one mean over all action tokens of the step, on all
  ranks, and an upper clip of 1.28.
- Every loss is divided by a count over all ranks and micro-batches, so the gradient does not depend on how a step is
  split (`normalizer`).

Add a KL estimator to KL_ESTIMATORS, a loss to LOSS_TYPES and `policy_loss`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from flags import Positive, Share, Weight

LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "gspo", "cispo"]
AdvantageScale = Literal["group", "batch", "none"]
Correction = Literal["none", "truncate", "mask"]
LOSS_TYPES = get_args(LossType)
PASS = 1 - 1e-6  # tau2 counts a reward of 1 as a pass (tau2.metrics.agent_metrics.is_successful)
PER_SEQUENCE = ("grpo", "dr_grpo", "gspo")  # means over sequences; the others are means over tokens

# KL of the policy from the reference at sampled tokens, d = ref_logprobs - logprobs (Schulman 2020, "Approximating KL
# divergence"). As a loss, k1 does nothing: the expectation of its gradient, -grad log pi, is 0 under the policy.
KL_ESTIMATORS = {
    "k1": lambda d: -d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: d.exp() - d - 1,
}


@dataclass(kw_only=True)
class Flags:
    """The loss."""

    loss_type: LossType = "dapo"
    """how token losses are averaged, and which ratio is clipped"""
    advantage_scale: AdvantageScale = "group"
    """divide advantages by the standard deviation of the group or of the batch, or do not divide"""
    epsilon_low: Share = 0.2
    """lower clip of the ratio"""
    epsilon_high: Positive | None = None
    """upper clip of the ratio. Default: 0.28; for cispo 5, an absolute cap"""
    kl_coef: Weight = 0.1
    """weight of the KL penalty to the reference policy"""
    kl_reference: Literal["domain", "initial"] | None = None
    """domain: the policy at the start of the domain's GRPO; initial: the policy before any training, which with LoRA
    is the model without its adapters. Default: domain; initial with LoRA"""
    kl_estimator: Literal[*KL_ESTIMATORS] = "k3"
    """estimator of the KL penalty. The gradient of k1 has the expectation 0: with it, nothing holds the policy"""
    sampler_correction: Correction = "none"
    """weigh tokens by the ratio of the trainer's to the sampler's probability: each token's, cut at the cap (truncate),
    or the whole conversation's, and 0 above the cap (mask)"""
    sampler_cap: Annotated[float, Field(ge=1, le=1e6)] = 2.0
    """largest such weight"""
    mask_truncated: bool = False
    """leave conversations that were cut short out of the loss. They stay in the baseline"""
    gamma: Share = 1.0
    """discount per agent turn"""


# ------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class TaskRef:
    """A task by name: what a batch of tasks consists of."""

    domain: str
    task_id: str


@dataclass
class Trajectory:
    """One conversation as the policy saw it. token_ids, action_mask, logprobs and turns are equally long.

    >>> # ids:     prompt  prompt  sampled  sampled  <|im_end|>  tool  tool  sampled ...
    >>> # mask:    False   False   True     True     True        False False True
    >>> # turns:   -1      -1      0        0        0           -1    -1    1
    """

    domain: str = ""
    task_id: str = ""
    token_ids: list[int] = field(default_factory=list)
    action_mask: list[bool] = field(default_factory=list)  # True where the policy sampled the token
    logprobs: list[float] = field(default_factory=list)  # behaviour log-probability; 0.0 where not sampled
    turns: list[int] = field(default_factory=list)  # index of the agent turn; -1 where not sampled
    reward: float = 0.0
    advantage: float | None = None  # None: no policy gradient, because all rewards of the group are equal
    messages: list = field(default_factory=list)
    termination: str = ""
    valid: bool = True  # False after an error of the environment: left out of its group's baseline
    error: str = ""
    truncated_turns: int = 0  # agent turns cut at max_new_tokens
    replayed: bool = False  # a stored conversation of an earlier policy
    top: str = ""  # the distributions of the sampled tokens, if an algorithm keeps them, see distill.pack

    @property
    def task(self) -> TaskRef:
        return TaskRef(self.domain, self.task_id)

    @property
    def truncated(self) -> bool:
        """Cut short by max_new_tokens in some turn, by the context, or by the episode's max_turns."""
        return self.truncated_turns > 0 or self.termination == "max_steps"

    def usable(self, mask_truncated=False) -> bool:
        """Whether it may be trained on."""
        return self.valid and any(self.action_mask) and not (mask_truncated and self.truncated)

    def append(self, ids, turn=-1, logprobs=None):
        self.token_ids.extend(ids)
        self.action_mask.extend([turn >= 0] * len(ids))
        self.logprobs.extend(logprobs if logprobs is not None else [0.0] * len(ids))
        self.turns.extend([turn] * len(ids))


# --------------------------------------------------------------------------------------------------------- formulas


def group_advantages(rewards_P_G, scale="group") -> Tensor:
    """Advantages (P, G) of G samples for each of P tasks: the reward minus the mean of its group.

    scale "group": divided by the group's sample standard deviation + 1e-4 (Shao et al. 2024); "batch": by that of
    all rewards; "none": not divided (Dr. GRPO, Liu et al. 2025, arXiv:2503.20783). NaN marks an invalid sample: it is
    left out of mean and deviation and gets 0. A group of one, or with equal rewards, gets 0, and the loop leaves it out
    of the step: its tokens have no KL penalty and no LwF, and do not count in the loss's divisor. Raises ValueError for
    an unknown scale or another shape.

    >>> group_advantages([[1.0, 0.0], [1.0, 1.0]], scale="none")
    tensor([[ 0.5000, -0.5000],
            [ 0.0000,  0.0000]])
    """
    if scale not in get_args(AdvantageScale):
        raise ValueError(f"unknown advantage scale {scale!r}; choose one of group, batch, none")
    rewards = torch.as_tensor(rewards_P_G, dtype=torch.float32)
    if rewards.ndim != 2:
        raise ValueError(f"rewards must have the shape (tasks, samples), got {tuple(rewards.shape)}")
    valid = ~rewards.isnan()
    filled = rewards.where(valid, torch.zeros(()))

    def mean(values, keep, **kwargs):
        return values.where(keep, torch.zeros(())).sum(**kwargs) / keep.sum(**kwargs).clamp(min=1)

    centred = (filled - mean(filled, valid, dim=1, keepdim=True)).where(valid, torch.zeros(()))
    # Rounding leaves 1e-8 where all rewards are equal; divided by 1e-4 that would be a gradient.
    centred = centred.where(varied(rewards)[:, None], torch.zeros(()))
    if scale == "none":
        return centred
    if scale == "group":
        variance = centred.square().sum(1, keepdim=True) / (valid.sum(1, keepdim=True) - 1).clamp(min=1)
    else:
        spread = (filled - mean(filled, valid)).where(valid, torch.zeros(()))
        variance = spread.square().sum() / (valid.sum() - 1).clamp(min=1)
    return centred / (variance.sqrt() + 1e-4)


def varied(rewards_P_G) -> Tensor:
    """(P,) False if all rewards of a group are equal: the group is skipped, KL included. NaN rewards do not count."""
    low = rewards_P_G.nan_to_num(nan=torch.inf).amin(1)
    high = rewards_P_G.nan_to_num(nan=-torch.inf).amax(1)
    return high > low


def kl_estimate(d, estimator="k3") -> Tensor:
    """One of KL_ESTIMATORS at d = ref_logprobs - logprobs. d is kept within 20, where exp is still a number."""
    return KL_ESTIMATORS[estimator](d.clamp(-20, 20))


def policy_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    loss_type="dapo",
    epsilon_low=0.2,
    epsilon_high=0.28,
    ref_logprobs=None,
    kl_coef=0.0,
    kl_estimator="k3",
    normalizer=None,
    max_tokens=None,
    dual_clip=None,
    weights=None,
):
    """(loss, stats) of the clipped objective; all tensors (B, T), advantages (B,) or (B, T).

    With r = exp(logprobs - old_logprobs) and l = -min(r A, clip(r, 1 - epsilon_low, 1 + epsilon_high) A):
      grpo     sum over sequences of the mean of l over action tokens / sequences (Shao et al. 2024, eq. 3)
      bnpo     sum of l / action tokens
      dr_grpo  sum of l / (sequences * max_tokens)                       (Liu et al. 2025)
      dapo     sum of l / action tokens                                  (Yu et al. 2025, eq. 8)
      gspo     r is the exponential of the sequence's mean log-ratio, then as grpo (Zheng et al. 2025, arXiv:2507.18071)
      cispo    -stop_grad(min(r, epsilon_high)) A logprobs / action tokens (MiniMax-M1, arXiv:2506.13585);
               epsilon_high is an absolute cap near 5
    `normalizer`: these sequences or action tokens, counted over all ranks and micro-batches of the step. Default: of
    this batch. (bnpo differs from dapo only then.)
    `dual_clip`: where A < 0, l is at most dual_clip |A|. A ratio far above 1, which only conversations of an older
    policy have, would outweigh all others (Ye et al. 2020, arXiv:1912.09729, eq. 5; not in cispo, which has a cap). A
    number, or a tensor (B, 1) with infinity where there is no such clip.
    `weights`: l of a token is multiplied by its own, see `sampler_weights`.
    The KL penalty to `ref_logprobs` is added per token, times `kl_coef`.
    Masked tokens never enter, NaN or not. stats: token means over this batch (floats). Raises ValueError for unknown
    names, and for dr_grpo without max_tokens.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"unknown loss_type {loss_type!r}; choose one of {', '.join(LOSS_TYPES)}")
    if kl_estimator not in KL_ESTIMATORS:
        raise ValueError(f"unknown kl_estimator {kl_estimator!r}; choose one of {', '.join(KL_ESTIMATORS)}")
    if loss_type == "dr_grpo" and not max_tokens:
        raise ValueError("dr_grpo needs max_tokens, the length that every sequence is divided by")
    mask = mask.bool()
    zero = torch.zeros((), dtype=logprobs.dtype, device=logprobs.device)
    logprobs = logprobs.where(mask, zero)  # select, do not multiply: NaN * 0 is NaN
    log_ratio = logprobs - old_logprobs.where(mask, zero)
    length_B = mask.sum(1).clamp(min=1)
    advantages = advantages[:, None] if advantages.ndim == 1 else advantages
    advantages = advantages.expand_as(logprobs).where(mask, zero)
    if loss_type == "gspo":
        log_ratio = (log_ratio.sum(1) / length_B)[:, None].expand_as(logprobs)
    ratio = log_ratio.clamp(-20, 20).exp()
    if loss_type == "cispo":
        loss = -ratio.clamp(max=epsilon_high).detach() * advantages * logprobs
        clipped = ratio > epsilon_high
    else:
        bounded = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
        objective = torch.minimum(ratio * advantages, bounded * advantages)
        clipped = (ratio * advantages) > (bounded * advantages)
        if dual_clip is not None:
            floor = torch.where(advantages < 0, dual_clip * advantages, -torch.inf)
            clipped = clipped | (objective < floor)
            objective = torch.maximum(objective, floor)
        loss = -objective
    if weights is not None:
        loss = loss * weights
    stats = {}
    if ref_logprobs is not None:
        kl = kl_estimate(ref_logprobs.where(mask, zero) - logprobs, kl_estimator)
        loss = loss + kl_coef * kl
        stats["kl"] = (kl.detach().where(mask, zero).sum() / mask.sum().clamp(min=1)).item()
    loss = loss.where(mask, zero)
    if loss_type in ("grpo", "gspo"):
        loss = loss.sum(1) / length_B
    if normalizer is None:
        normalizer = len(mask) if loss_type in PER_SEQUENCE else mask.sum()
    total = loss.sum() / max(float(normalizer), 1.0)
    if loss_type == "dr_grpo":
        total = total / max_tokens
    stats["clip_share"] = ((clipped & mask).sum() / mask.sum().clamp(min=1)).item()
    stats["ratio_max"] = ratio.detach().where(mask, zero + 1).max().item() if mask.any() else 1.0
    stats["ratio_min"] = ratio.detach().where(mask, zero + 1).min().item() if mask.any() else 1.0
    return total, stats


def sampler_weights(log_ratio, mask, correction, cap) -> tuple[Tensor, Tensor]:
    """(importance weights of tokens that an engine sampled whose probabilities differ from the trainer's, where they
    are cut), both (B, T). log_ratio: the trainer's log-probability less the sampler's, (B, T).

      truncate  min(ratio, cap) of each token (Yao et al. 2025, "Your efficient RL framework secretly brings you
                off-policy RL training")
      mask      the ratio of the conversation, the product over its sampled tokens; 0 where it is above cap (TRL's
                sequence_mask)
    """
    log_ratio = log_ratio.where(mask, torch.zeros_like(log_ratio))
    if correction == "mask":
        log_ratio = log_ratio.sum(1, keepdim=True).expand_as(log_ratio)
    ratio = log_ratio.clamp(-20, 20).exp()
    weights = ratio.clamp(max=cap) if correction == "truncate" else ratio.where(ratio <= cap, torch.zeros_like(ratio))
    return weights, mask & (ratio > cap)


def correct_sampler(batch, logprobs, correction, cap):
    """Puts the trainer's own log-probabilities (B, T) in the place of the sampler's, and the weights that correct for
    the difference into the batch."""
    log_ratio = (logprobs - batch["old_logprobs"]).where(batch["mask"], torch.zeros_like(logprobs))
    batch["weights"], batch["sampler_cut"] = sampler_weights(log_ratio, batch["mask"], correction, cap)
    batch["old_logprobs"], batch["sampler_log_ratio"] = logprobs, log_ratio


DUAL_CLIP = 3.0  # of stored conversations, see grpo.policy_loss
CLONING_CAP = 1.0  # of log r


def cloning_loss(logprobs, stored, mask, successful):
    """The behaviour-cloning term of stored conversations, summed over their sampled tokens (CLEAR, Rolnick et al. 2019,
    arXiv:1811.11682, "policy cloning"): KL(mu || pi) from the policy mu that sampled them, estimated as r - 1 - log r
    with r = pi / mu, and cross-entropy -log pi if the conversation was successful. r counts up to e: where a token is
    likelier still, the gradient (r - 1) grad log pi would outweigh all others, so there the KL has no gradient at all
    (log r is cut at CLONING_CAP).

    logprobs (of pi), stored (of mu) and mask are (B, T), successful (B,). Returns a scalar tensor.
    """
    log_ratio = (logprobs - stored).clamp(max=CLONING_CAP)
    kl = log_ratio.exp() - 1 - log_ratio
    return (kl - logprobs * successful[:, None])[mask].sum()


def fresh_loss(trajectory: Trajectory, gamma=1.0) -> float:
    """The mean loss of tokens that were just sampled: the ratio is 1, so it is minus their advantage."""
    turns = [turn for turn in trajectory.turns if turn >= 0]
    discounts = [gamma ** (max(turns) - turn) for turn in turns]
    return -(trajectory.advantage or 0.0) * sum(discounts) / len(turns)


def loss_settings(args) -> dict:
    """The keyword arguments of `policy_loss` that an object with these flags (and rollout's) holds."""
    return {
        "loss_type": args.loss_type,
        "epsilon_low": args.epsilon_low,
        "epsilon_high": args.epsilon_high or (5.0 if args.loss_type == "cispo" else 0.28),
        "kl_coef": args.kl_coef,
        "kl_estimator": args.kl_estimator,
        "max_tokens": args.max_context or args.max_turns * args.max_new_tokens,
    }


# ---------------------------------------------------------------------------------------------------------- batches


def collate(trajectories, gamma=1.0, device="cpu", pad_id=0) -> dict[str, Tensor]:
    """Trajectories as tensors, padded on the right: ids, attention_mask, mask (the sampled tokens), old_logprobs,
    advantages and trained (the sampled tokens that have an advantage), all (B, T); rewards and replayed, (B,).

    The advantage of a token in turn k of K is gamma^(K-1-k) times its trajectory's. Raises ValueError for a trajectory
    whose lists differ in length.
    """
    width = max(len(t.token_ids) for t in trajectories)
    ids = torch.full((len(trajectories), width), pad_id)
    attention_mask = torch.zeros_like(ids)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    old_logprobs = torch.zeros(ids.shape)
    turns = torch.full(ids.shape, -1)
    for i, t in enumerate(trajectories):
        n = len(t.token_ids)
        if not n == len(t.action_mask) == len(t.logprobs) == len(t.turns):
            raise ValueError(f"trajectory of task {t.task_id}: its lists differ in length")
        ids[i, :n] = torch.tensor(t.token_ids)
        attention_mask[i, :n] = 1
        mask[i, :n] = torch.tensor(t.action_mask)
        old_logprobs[i, :n] = torch.tensor(t.logprobs)
        turns[i, :n] = torch.tensor(t.turns)
    last_B = turns.amax(1, keepdim=True)
    advantages = torch.tensor([t.advantage or 0.0 for t in trajectories])[:, None] * gamma ** (last_B - turns)
    has_advantage = torch.tensor([t.advantage is not None for t in trajectories])
    batch = {
        "ids": ids,
        "attention_mask": attention_mask,
        "mask": mask,
        "old_logprobs": old_logprobs,
        "advantages": advantages.where(mask, torch.zeros(())),
        "trained": mask & has_advantage[:, None],
        "rewards": torch.tensor([t.reward for t in trajectories]),
        "replayed": torch.tensor([t.replayed for t in trajectories]),
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def micro_batches(lengths, max_tokens) -> list[list[int]]:
    """Indices of the sequences of each micro-batch, the shortest first: as many as make `max_tokens` with their
    padding. A sequence that is longer than that has a micro-batch of its own.

    >>> micro_batches([3, 9, 4, 2], max_tokens=9)
    [[3, 0], [2], [1]]
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if not batches or (len(batches[-1]) + 1) * lengths[i] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    return batches


# ----------------------------------------------------------------------------------------------- a step of the loop


def set_advantages(trajectories, rewards_P_G, advantages_P_G):
    """Gives each of P * G trajectories its advantage; none where all rewards of the group are equal."""
    varies = varied(rewards_P_G)[:, None].expand_as(advantages_P_G).flatten().tolist()
    for t, advantage, varying in zip(trajectories, advantages_P_G.flatten().tolist(), varies, strict=True):
        t.advantage = advantage if varying else None


def counts(new, stored) -> dict[str, int]:
    """What a step's losses are divided by, once summed over ranks: tokens and sequences with an advantage; sampled
    tokens of new and of stored trajectories."""
    trained = [*new, *(t for t in stored if t.advantage is not None)]
    tokens = {"tokens": trained, "new_tokens": new, "replayed_tokens": stored}
    return {"sequences": len(trained), **{name: sum(sum(t.action_mask) for t in ts) for name, ts in tokens.items()}}


def batch_loss(batch, logprobs, counts, clone_coef, **settings) -> tuple[Tensor, dict]:
    """(a micro-batch's part of the step's loss, statistics) from `collate` and `loss_settings`. `counts`: of all ranks.
    Stored conversations have a dual clip and behaviour cloning; a micro-batch has only stored ones, or none. Their own
    losses go into batch["losses"]."""
    stored = bool(batch["replayed"].any())
    rows = (batch["old_logprobs"], batch["advantages"], batch["trained"])
    normalizer = counts["sequences" if settings["loss_type"] in PER_SEQUENCE else "tokens"]
    settings["dual_clip"] = DUAL_CLIP if stored else None
    references = {"ref_logprobs": batch.get("ref_logprobs"), "weights": batch.get("weights"), "normalizer": normalizer}
    loss, stats = policy_loss(logprobs, *rows, **references, **settings)
    if stored:
        clone = cloning_loss(logprobs, batch["old_logprobs"], batch["mask"], batch["rewards"] >= PASS)
        loss = loss + clone_coef * clone / max(counts["replayed_tokens"], 1.0)
        settings = {**settings, "loss_type": "grpo", "kl_coef": 0.0}
        singly = zip(*(tensor.split(1) for tensor in (logprobs.detach(), *rows)), strict=True)
        batch["losses"] = [policy_loss(*row, **settings)[0].item() for row in singly]
        stats["cloning"] = clone.item()
    return loss, {**stats, "loss": loss.item(), "stored": stored}


def batch_stats(batch, logprobs, entropy, found) -> dict:
    """What is logged of a micro-batch: sums over its sampled tokens, and extremes of the ratio; `found`: the statistics
    of `batch_loss`."""
    log_ratio = (logprobs.detach() - batch["old_logprobs"])[batch["mask"]]
    initial = batch.get("initial_logprobs")
    if initial is not None:
        kl = kl_estimate((initial - logprobs.detach())[batch["mask"]])
        found = {**found, "kl_initial": kl.sum().item()}
    sampler = batch.get("sampler_log_ratio", logprobs.detach() - batch["old_logprobs"])[batch["mask"]]
    trained = int(batch["trained"].sum())
    return {
        **found,
        "kl": found.get("kl", 0.0) * trained,
        "clip_share": found["clip_share"] * trained,
        "sampler_kl": kl_estimate(sampler).sum().item(),
        "sampler_cut": int(batch["sampler_cut"].sum()) if "sampler_cut" in batch else 0,
        "sampler_ratio_max": sampler.max().exp().item() if len(sampler) else 1.0,
        "entropy": entropy.sum().item(),
        "deviation": log_ratio.expm1().abs().max().item() if len(log_ratio) else 0.0,
    }


def update_stats(history, counts) -> dict[str, float]:
    """What is logged of a step's updates, from the `batch_stats` of all ranks in each iteration: means over tokens and
    iterations, and extremes. The first iteration's loss and ratio tell whether the policy is the one that sampled."""
    counts = {**counts, "old_tokens": counts["tokens"] - counts["new_tokens"]}  # stored ones with an advantage
    new = [s for stats in history for s in stats if not s["stored"]]
    old = [s for stats in history for s in stats if s["stored"]]

    def mean(name, parts, tokens):
        return sum(s[name] for s in parts) / len(history) / max(counts[tokens], 1.0)

    first = [s for s in history[0] if not s["stored"]]
    found = {
        "loss": sum(s["loss"] for s in history[0]),
        **{name: mean(name, new, "new_tokens") for name in ("kl", "entropy", "clip_share")},
        "ratio_first_step": 1.0 + max((s["deviation"] for s in first), default=0.0),
        "sampler_kl": sum(s["sampler_kl"] for s in first) / max(counts["new_tokens"], 1.0),
        "sampler_cut": sum(s["sampler_cut"] for s in first) / max(counts["new_tokens"], 1.0),
        "sampler_ratio_max": max((s["sampler_ratio_max"] for s in first), default=1.0),
        "ratio_min": min((s["ratio_min"] for s in new), default=1.0),
        "ratio_max": max((s["ratio_max"] for s in new), default=1.0),
        "action_tokens": counts["new_tokens"],
    }
    if all("kl_initial" in s for s in new):
        found["kl_initial"] = mean("kl_initial", new, "new_tokens")
    if old:
        found.update(
            replayed_kl=mean("sampler_kl", old, "replayed_tokens"),
            cloning_loss=mean("cloning", old, "replayed_tokens"),
            replayed_clip_share=mean("clip_share", old, "old_tokens"),
            replayed_ratio_min=min(s["ratio_min"] for s in old),
            replayed_ratio_max=max(s["ratio_max"] for s in old),
        )
    return found
