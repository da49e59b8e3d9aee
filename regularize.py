"""Penalties that keep the policy near its state at the end of the last domain: EWC, online EWC, LwF.

    python train.py --cl_algorithm ewc                                         EWC alone (or online_ewc, lwf)
    python train.py --cl_algorithm replay --ewc_lambda 0.1 --lwf_coef 0.01     beside replay: "ER+"

Each adds a loss to every optimiser step, of the warm start too.

What differs from the papers:
- The agent's Fisher information is that of whole conversations: the squared gradient of the log-probability of all
  tokens that the policy sampled in one, a mean over the domain's last conversations.
- Online EWC (Schwarz et al. 2018) does not normalise the Fisher information task by task, and does not decay it once
  more while the next task is trained (both only change lambda).
- LwF (Li and Hoiem 2016) labels new inputs for each old task's head. A language model has one head: the policy at the
  last boundary labels the tokens of this step's conversations, at temperature 1.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import distill
import distributed
import policy
from algorithm import CLAlgorithm
from distributed import say
from flags import Weight


@dataclass
class Flags:
    """EWC and LwF, alone or beside any algorithm."""

    ewc_lambda: Weight | None = None
    """add EWC with this weight. Default: none; 1 with ewc, online_ewc and cpo"""
    lwf_coef: Weight | None = None
    """add LwF, the KL to the previous domain's policy, with this weight. Default: none; 0.01 with lwf"""


def fisher_diagonal(model, batches, loss_fn) -> dict[str, Tensor]:
    """The diagonal of the empirical Fisher information of each trained parameter, in float32: the mean over sequences
    of (d log p(sequence) / d theta)^2 (Kirkpatrick et al. 2017, arXiv:1612.00796; Kunstner et al. 2019,
    arXiv:1905.12558, eq. 3: it is the true Fisher information if the model itself sampled the sequences).

    batches: any iterable, read once; loss_fn(model, batch) -> (B,), minus the log-probability of each of its B
    sequences. Each sequence has its own backward pass through its batch: batches of one are the cheapest. The memory is
    one copy of the trained parameters, and for a moment the gradient of one of them (sharded: of one layer).

    On several ranks each passes its own batches, and all get the same result. With a sharded model all pass the same
    batches, and each gets its shards. Raises ValueError without trained parameters or without a sequence.
    """
    parameters = policy.trained_parameters(model)
    if not parameters:
        raise ValueError("the model has no trainable parameters: there is no Fisher information of them")
    sharded = policy.is_sharded(model)
    share = distributed.world_size() if sharded else 1  # FSDP sums gradients over ranks
    fisher = {p: torch.zeros_like(p, dtype=torch.float32).detach() for p in parameters.values()}

    def add_square(p):
        fisher[p] += p.grad.float().square()
        p.grad = None

    kept = [p.grad for p in fisher]
    hooks = [p.register_post_accumulate_grad_hook(add_square) for p in fisher]
    sequences = 0
    try:
        for p in fisher:
            p.grad = None
        for batch in batches:
            losses = loss_fn(model, batch)
            for i, loss in enumerate(losses):
                (loss / share).backward(retain_graph=i + 1 < len(losses))
                sequences += 1
    finally:
        for p, hook, grad in zip(fisher, hooks, kept, strict=True):
            hook.remove()
            p.grad = grad
    if not sharded and distributed.world_size() > 1:
        sequences = distributed.sum_over_ranks(sequences)
        for total in fisher.values():
            dist.all_reduce(total)
    if sequences == 0:
        raise ValueError("the Fisher information needs one sequence at least, got none")
    for total in fisher.values():
        total /= sequences
        if not policy.whole(total.sum()).isfinite():
            raise ValueError("the Fisher information is not finite: the gradient of some sequence is not")
    return {name: fisher[p] for name, p in parameters.items()}


class EWC(CLAlgorithm):
    """Elastic weight consolidation: ewc_lambda / 2 sum_k sum_i F_k,i (theta_i - theta*_k,i)^2 over the finished tasks
    k, with the parameters theta*_k at their end and the Fisher information F_k there (Kirkpatrick et al. 2017, eq. 3,
    one term for each task as in their section 2.1)."""

    Flags = Flags
    uses_trajectories = True
    SAMPLES = 64  # conversations that the Fisher information is taken from, the domain's last

    def __init__(self, ewc_lambda=None, temperature=1.0, **kwargs):
        super().__init__(ewc_lambda=ewc_lambda, **kwargs)
        self.ewc_lambda = 1.0 if ewc_lambda is None else ewc_lambda
        self.temperature = temperature
        self.held = []  # (theta*, F) of each task, both by the parameters' names
        self.recent = []  # conversations of the current domain
        self.information = {}  # by domain: the mean of F

    def penalty(self, parameters: dict):
        """Yields the loss of each parameter. Raises ValueError before any task has ended, or for other parameters."""
        if not self.held:
            raise ValueError("EWC has nothing to hold: no task has ended (call consolidate at the end of one)")
        for anchor, fisher in self.held:
            if {name: p.shape for name, p in parameters.items()} != {name: t.shape for name, t in anchor.items()}:
                raise ValueError("the trained parameters are not those that the Fisher information was taken of")
            for name, p in parameters.items():
                yield self.term(p - anchor[name], fisher[name])

    def term(self, drift, fisher):
        """The penalty of a parameter's drift from where it was."""
        return self.ewc_lambda / 2 * (fisher * drift.square()).sum()

    def consolidate(self, model, batches, loss_fn) -> dict[str, Tensor]:
        """The end of a task: see `fisher_diagonal`."""
        fisher = fisher_diagonal(model, batches, loss_fn)
        self.hold({name: p.detach() for name, p in policy.trained_parameters(model).items()}, fisher)
        return fisher

    def hold(self, theta, fisher):
        """Adds a finished task. theta is copied, the tensors of fisher are kept."""
        self.held.append(({name: p.clone() for name, p in theta.items()}, fisher))

    def extra_losses(self, trainer):
        return self.penalty(policy.trained_parameters(trainer.model)) if self.held else ()

    def post_step_hook(self, trainer, domain):
        self.recent += [[t.token_ids, t.turns] for t in trainer.trajectories if t.domain == domain]
        self.recent = self.recent[-self.SAMPLES :]

    def post_task_hook(self, trainer, domain):
        sharded = policy.is_sharded(trainer.model)
        mine = self.recent if sharded else self.recent[distributed.rank() :: distributed.world_size()]
        if self.recent:
            fisher = self.consolidate(trainer.model, mine, self.conversation_loss).values()
            total = sum(policy.whole(f.sum()).item() for f in fisher)
            self.information[domain] = total / sum(f.numel() for f in fisher)
        else:
            say(f"EWC holds nothing of {domain}: it had no conversation to take the Fisher information from")
        self.recent = []

    def conversation_loss(self, model, conversation) -> Tensor:
        """Minus the log-probability (1,) of all tokens that the policy sampled in a conversation."""
        token_ids, turns = conversation
        ids = torch.tensor([token_ids], device=model.device)
        sampled = torch.tensor([turns], device=model.device) >= 0
        return -policy.token_logprobs(model, ids, torch.ones_like(ids), self.temperature, sampled).sum(1)

    def get_statistics(self):
        return {"mean Fisher information": self.information, "tasks held": len(self.held)}

    def bytes_kept(self):
        return sum(t.nbytes for pair in self.held for tensors in pair for t in tensors.values())

    def state_dict(self):
        return {"recent": self.recent, "information": self.information}

    def tensors(self):
        found = {}
        for k, pair in enumerate(self.held):
            for kind, tensors in zip(("anchor", "fisher"), pair, strict=True):
                found.update({f"{kind}_{k}/{name}": policy.gathered(t) for name, t in tensors.items()})
        return found

    def load_tensors(self, file):
        parameters = policy.trained_parameters(self.trainer.model)

        def read(kind):
            return {name: policy.placed_like(file.get_tensor(f"{kind}/{name}"), p) for name, p in parameters.items()}

        tasks = {name.split("/")[0] for name in file.keys()}  # noqa: SIM118 (it is no dict)
        self.held = [(read(f"anchor_{k}"), read(f"fisher_{k}")) for k in range(len(tasks) // 2)]


class OnlineEWC(EWC):
    """EWC with one running Fisher information, F <- ewc_decay F + F_k, around the parameters at the end of the last
    task (Schwarz et al. 2018, arXiv:1805.06370, eq. 9; Huszar 2018, arXiv:1712.03847, on why one anchor is enough and
    one for each task counts the first tasks again and again)."""

    def __init__(self, ewc_lambda=None, ewc_decay=0.95, **kwargs):
        if not 0 <= ewc_decay <= 1:
            raise ValueError(f"ewc_decay must be from 0 to 1, got {ewc_decay}")
        super().__init__(ewc_lambda, **kwargs)
        self.ewc_decay = ewc_decay

    def hold(self, theta, fisher):
        if not self.held:
            return super().hold(theta, fisher)
        anchor, running = self.held[0]
        for name, p in theta.items():  # in place: no third copy of the parameters
            anchor[name].copy_(p)
            running[name].mul_(self.ewc_decay).add_(fisher[name])


class CPO(EWC):
    """ewc_lambda sum over protected parameters of |theta - theta*| (CPO, arXiv:2607.04364), for each finished task. We
    could not find how the paper chooses what is protected. Here it is what has more Fisher information at the task's
    end than the mean over all parameters; that is ours."""

    def hold(self, theta, fisher):
        total = sum(policy.whole(f.sum()).item() for f in fisher.values())
        mean = total / sum(f.numel() for f in fisher.values())
        super().hold(theta, {name: (f > mean).to(f.dtype) for name, f in fisher.items()})

    def term(self, drift, protected):
        return self.ewc_lambda * (protected * drift.abs()).sum()

    def get_statistics(self):
        shares = [sum(policy.whole(p.sum()).item() for p in held.values()) for _, held in self.held]
        size = sum(p.numel() for p in self.held[0][1].values()) if self.held else 1
        return {**super().get_statistics(), "share protected": [round(share / size, 4) for share in shares]}


class LwF(CLAlgorithm):
    """Learning without forgetting (Li and Hoiem 2016, arXiv:1606.09282): lwf_coef KL(frozen || policy), a mean over
    agent tokens in this step's batch of new conversations (groups with equal rewards are not in it; in the warm start,
    the demonstrations). `frozen` is the policy at the end of the previous domain: a copy of the trained parameters."""

    Flags = Flags

    def __init__(self, lwf_coef=None, **kwargs):
        super().__init__(lwf_coef=lwf_coef, **kwargs)
        self.lwf_coef = 0.01 if lwf_coef is None else lwf_coef
        self.teacher = None  # policy.snapshot

    def extra_losses(self, trainer):
        if self.teacher is None:
            return
        rows = []
        for batch in trainer.batches:
            mask = batch["mask"] & ~batch["replayed"][:, None]
            rows.append((batch["ids"], mask))
        total = distributed.sum_over_ranks(sum(int(mask.sum()) for _, mask in rows))
        if total == 0:
            return
        weight = self.lwf_coef * distributed.world_size() / total  # the loop averages over ranks
        for kl in distill.distillation(trainer.model, self.teacher, rows):
            yield weight * kl

    def post_task_hook(self, trainer, domain):
        self.teacher = policy.snapshot(trainer.model)

    def get_statistics(self):
        return {}

    def bytes_kept(self):
        return 0 if self.teacher is None else policy.snapshot_bytes(self.trainer.model)

    def tensors(self):
        return {} if self.teacher is None else policy.gathered_snapshot(self.trainer.model, self.teacher)

    def load_tensors(self, file):
        if list(file.keys()):
            self.teacher = policy.snapshot_from(self.trainer.model, file.get_tensor)


def penalties(args, algorithm: CLAlgorithm) -> list[CLAlgorithm]:
    """The algorithms that train.py's flags put beside `algorithm`. Raises ValueError for flags that cannot work
    together."""
    found = []
    if args.ewc_lambda and not isinstance(algorithm, EWC):
        found.append(EWC.from_args(args))
    if args.lwf_coef and not isinstance(algorithm, LwF):
        found.append(LwF.from_args(args))
    holding = [a for a in (algorithm, *found) if isinstance(a, (EWC, LwF))]
    if holding and algorithm.all_domains:
        raise ValueError(f"{args.cl_algorithm} trains all domains at once: ewc_lambda and lwf_coef have none to hold")
    if holding and len(args.task_order) < 2:
        raise ValueError(f"EWC and LwF need a domain that has ended before another: task_order is {args.task_order}")
    if any(isinstance(a, EWC) for a in holding) and args.num_steps_per_task == 0:
        raise ValueError("EWC takes its Fisher information from conversations of GRPO: num_steps_per_task is 0")
    return found
