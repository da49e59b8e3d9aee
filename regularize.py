"""What is held in place: penalties that keep the policy near where it was when the last domain ended.

    python regularize.py                                              three small tasks whose solutions are known
    python train.py --cl_algorithm ewc                                EWC alone (online_ewc, lwf)
    python train.py --cl_algorithm replay --ewc_lambda 0.1 --lwf_coef 0.01    beside replay: "ER+"

Each method is a `CLAlgorithm` that adds a loss to every optimiser step, of the warm start too. Several of them, and
replay, compose by adding these losses (`Composed.extra_loss`).

What differs from the papers, and where:
- the Fisher information of the agent is of whole conversations: the gradient of the log-probability of all that the
  policy sampled in one, squared; a mean over the domain's last conversations, which its policy of then sampled.
- the running Fisher information of online EWC (Schwarz et al. 2018) is neither normalised task by task nor multiplied
  by its decay once more while the next task is trained (both are matters of lambda).
- LwF (Li and Hoiem 2016) labels the new inputs with the old model, for each old task's head. A language model has one
  head: the policy of the last boundary labels the tokens of this step's conversations, softened by nothing.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

import grpo
from replay import CLAlgorithm, check_coefficients

EWC_LAMBDA = 1.0
EWC_DECAY = 0.95
LWF_COEF = 0.01


def fisher_diagonal(model, batches, loss_fn) -> list[Tensor]:
    """The diagonal of the empirical Fisher information of each trained parameter, in float32: the mean over sequences
    of (d log p(sequence) / d theta)^2 (Kirkpatrick et al. 2017, arXiv:1612.00796; Kunstner et al. 2019,
    arXiv:1905.12558, eq. 3, of which sequences sampled from the model itself make the Fisher information proper).

    batches: any iterable, read once; loss_fn(model, batch) -> (B,), minus the log-probability of each of its B
    sequences. Every sequence has a backward pass of its own through its batch: batches of one are the cheapest. The
    memory is one copy of the trained parameters, and for a moment the gradient of one of them (sharded: of one layer).

    On several ranks each passes batches of its own, and all get the same; of a sharded model all pass the same batches,
    and each gets its shards (as in grpo.snapshot). Raises ValueError where no parameter is trained, or without a
    sequence.
    """
    parameters = list(grpo.trained_parameters(model).values())
    if not parameters:
        raise ValueError("the model has no trainable parameters: there is no Fisher information of them")
    sharded = grpo.is_sharded(model)
    share = grpo.world_size() if sharded else 1  # FSDP sums gradients over ranks
    fisher = {p: torch.zeros_like(grpo.local_part(p), dtype=torch.float32) for p in parameters}

    def add_square(p):
        fisher[p] += grpo.local_part(p.grad).float().square()
        p.grad = None

    kept = [p.grad for p in parameters]
    hooks = [p.register_post_accumulate_grad_hook(add_square) for p in parameters]
    sequences = 0
    try:
        for p in parameters:
            p.grad = None
        for batch in batches:
            losses = loss_fn(model, batch)
            for i, loss in enumerate(losses):
                (loss / share).backward(retain_graph=i + 1 < len(losses))
                sequences += 1
    finally:
        for p, hook, grad in zip(parameters, hooks, kept, strict=True):
            hook.remove()
            p.grad = grad
    if not sharded:
        sequences = sum(grpo.all_gather_json(sequences))
        if grpo.world_size() > 1:
            for total in fisher.values():
                dist.all_reduce(total)
    if sequences == 0:
        raise ValueError("the Fisher information needs one sequence at least, got none")
    for total in fisher.values():
        total /= sequences
        if not total.isfinite().all():
            raise ValueError("the Fisher information is not finite: neither is the gradient of some sequence")
    return [fisher[p] for p in parameters]


class EWC(CLAlgorithm):
    """Elastic weight consolidation: ewc_lambda / 2 sum_k sum_i F_k,i (theta_i - theta*_k,i)^2 over the finished tasks
    k, with the parameters theta*_k at their end and the Fisher information F_k there (Kirkpatrick et al. 2017, eq. 3,
    one term for each task as in their section 2.1).

    fisher_samples: conversations, the last ones of a domain, that its Fisher information is taken from.
    """

    stores_trajectories = True

    def __init__(self, ewc_lambda=EWC_LAMBDA, fisher_samples=64, temperature=1.0):
        check_coefficients(ewc_lambda=ewc_lambda)
        if fisher_samples < 1:
            raise ValueError(f"fisher_samples must be at least 1, got {fisher_samples}")
        self.ewc_lambda, self.fisher_samples, self.temperature = ewc_lambda, fisher_samples, temperature
        self.held = []  # (theta*, F) of each task: two lists of tensors, in the order of the parameters
        self.recent = []  # conversations of the current domain
        self.information = {}  # by domain: the mean of F

    def penalty(self, parameters):
        """Yields the loss of each parameter. Raises ValueError before any task has ended, or for other parameters."""
        parameters = list(parameters)
        if not self.held:
            raise ValueError("EWC has nothing to hold: no task has ended (call consolidate at the end of one)")
        for anchor, fisher in self.held:
            if [grpo.local_part(p).shape for p in parameters] != [theta.shape for theta in anchor]:
                raise ValueError("the trained parameters are not those that the Fisher information was taken of")
            for p, theta, f in zip(parameters, anchor, fisher, strict=True):
                yield self.ewc_lambda / 2 * (grpo.shard_like(f, p) * (p - grpo.shard_like(theta, p)).square()).sum()

    def consolidate(self, model, batches, loss_fn):
        """The end of a task: see `fisher_diagonal`."""
        fisher = fisher_diagonal(model, batches, loss_fn)
        self.hold([grpo.local_part(p).detach() for p in grpo.trained_parameters(model).values()], fisher)
        return fisher

    def hold(self, theta, fisher):
        """Takes up a finished task. theta is copied, the tensors of fisher are kept."""
        self.held.append(([p.clone() for p in theta], fisher))

    def extra_loss(self, trainer):
        if not self.held:
            return None
        parameters = grpo.trained_parameters(trainer.model).values()
        device = grpo.local_part(next(iter(parameters))).device
        self.held = [tuple([t.to(device) for t in tensors] for tensors in pair) for pair in self.held]  # if not yet
        return self.penalty(parameters)

    def post_step_hook(self, trainer, domain):
        new = [
            {"token_ids": item["token_ids"], "turns": item["turns"]}
            for item, _ in trainer.finished
            if item["domain"] == domain
        ]
        self.recent = (self.recent + new)[-self.fisher_samples :]

    def post_task_hook(self, trainer, domain):
        mine = self.recent if grpo.is_sharded(trainer.model) else self.recent[grpo.rank() :: grpo.world_size()]
        if self.recent:
            fisher = self.consolidate(trainer.model, mine, self.conversation_loss)
            sums = grpo.all_gather_json([sum(f.sum().item() for f in fisher), sum(f.numel() for f in fisher)])
            self.information[domain] = sum(total for total, _ in sums) / sum(number for _, number in sums)
        elif grpo.rank() == 0:
            tqdm.write(f"EWC holds nothing of {domain}: it had no conversation to take the Fisher information from")
        self.recent = []

    def conversation_loss(self, model, item) -> Tensor:
        """Minus the log-probability (1,) of all that the policy sampled in a conversation."""
        ids = torch.tensor([item["token_ids"]], device=model.device)
        sampled = torch.tensor([item["turns"]], device=model.device) >= 0
        return -grpo.token_logprobs(model, ids, torch.ones_like(ids), self.temperature, sampled).sum(1)

    def get_statistics(self):
        return {"mean Fisher information": self.information, "tasks held": len(self.held)}

    def bytes_kept(self):
        return sum(t.nbytes for pair in self.held for tensors in pair for t in tensors)

    def state_dict(self):
        return {"recent": self.recent, "information": self.information, "held": len(self.held)}

    def load_state_dict(self, state):
        self.recent, self.information = state["recent"], state["information"]
        self.held = [None] * state["held"]

    def snapshots(self):
        return {
            f"{name}_{k}": pair[i] for k, pair in enumerate(self.held) for i, name in enumerate(("anchor", "fisher"))
        }

    def load_snapshots(self, snapshots):
        missing = {f"{name}_{k}" for k in range(len(self.held)) for name in ("anchor", "fisher")} - set(snapshots)
        if missing:
            raise ValueError(f"it has no {min(missing)} of EWC")
        self.held = [(snapshots[f"anchor_{k}"], snapshots[f"fisher_{k}"]) for k in range(len(self.held))]


class OnlineEWC(EWC):
    """EWC with one running Fisher information, F <- ewc_decay F + F_k, around the parameters at the end of the last
    task (Schwarz et al. 2018, arXiv:1805.06370, eq. 9; Huszar 2018, arXiv:1712.03847, on why one anchor is enough, and
    one for each task counts the first tasks again and again)."""

    def __init__(self, ewc_lambda=EWC_LAMBDA, ewc_decay=EWC_DECAY, **kwargs):
        super().__init__(ewc_lambda, **kwargs)
        check_coefficients(ewc_decay=ewc_decay)
        self.ewc_decay = ewc_decay

    def hold(self, theta, fisher):
        if not self.held:
            return super().hold(theta, fisher)
        for mine, other in zip(self.held[0][0], theta, strict=True):  # in place: no third copy of the parameters
            mine.copy_(other)
        for mine, other in zip(self.held[0][1], fisher, strict=True):
            mine.mul_(self.ewc_decay).add_(other)


def of_arm(arm, args) -> EWC | None:
    """The penalty of an arm of the supervised experiments."""
    if arm == "online_ewc":
        return OnlineEWC(args.ewc_lambda, args.ewc_decay)
    weights = {"ewc": args.ewc_lambda, "er_plus": args.er_plus_lambda}
    return EWC(weights[arm]) if arm in weights else None


class LwF(CLAlgorithm):
    """Learning without forgetting (Li and Hoiem 2016, arXiv:1606.09282): lwf_coef KL(frozen || policy), a mean over the
    tokens that the agent said in the conversations of this step that GRPO learns from (of groups whose rewards vary,
    not stored ones; in the warm start, the demonstrations), where `frozen` is the policy at the end of the previous
    domain: a copy of what is trained, so with LoRA of the adapter alone."""

    def __init__(self, lwf_coef=LWF_COEF):
        check_coefficients(lwf_coef=lwf_coef)
        self.lwf_coef = lwf_coef
        self.teacher = None  # grpo.snapshot
        self.ended = 0  # domains

    def extra_loss(self, trainer):
        if self.teacher is None:
            return None
        rows = [(batch["ids"], batch["attention_mask"], batch["mask"]) for batch in trainer.batches]
        total = sum(grpo.all_gather_json(sum(int(mask.sum()) for _, _, mask in rows)))
        if total == 0:
            return None
        with grpo.weights_of(trainer.model, self.teacher):
            head = grpo.frozen_head(trainer.model)
            taught = [grpo.hidden_states(trainer.model, *row) for row in rows]
        weight = self.lwf_coef * grpo.world_size() / total  # the loop takes a mean over ranks
        return (
            weight * grpo.distillation_kl(trainer.model, *row, head, teacher)
            for row, teacher in zip(rows, taught, strict=True)
        )

    def post_task_hook(self, trainer, domain):
        self.teacher = grpo.snapshot(trainer.model)
        self.ended += 1

    def bytes_kept(self):
        return sum(p.nbytes for p in self.teacher or [])

    def state_dict(self):
        return {"ended": self.ended}

    def load_state_dict(self, state):
        self.ended = state["ended"]

    def snapshots(self):
        return {} if self.teacher is None else {"frozen": self.teacher}

    def load_snapshots(self, snapshots):
        if self.ended > 0 and "frozen" not in snapshots:
            raise ValueError("it has no frozen policy of LwF")
        self.teacher = snapshots.get("frozen")


class Composed(CLAlgorithm):
    """Several algorithms as one: each adds to the batch what it replays, and to the loss what it penalises."""

    def __init__(self, *algorithms):
        self.algorithms = algorithms
        storing = [a for a in algorithms if type(a).augment_trajectories is not CLAlgorithm.augment_trajectories]
        if len(storing) > 1:
            raise ValueError("two algorithms that replay stored conversations cannot be composed")
        for name in ("all_domains", "stores_trajectories", "keeps_no_data"):
            setattr(self, name, any(getattr(a, name) for a in algorithms))

    def extra_loss(self, trainer):
        """Yields the losses, which the loop adds. Each is learnt from before the next algorithm is asked: to read a
        frozen policy, that one exchanges the weights that the earlier graph needs."""
        for a in self.algorithms:
            loss = a.extra_loss(trainer)
            if loss is not None:
                yield from [loss] if isinstance(loss, Tensor) else loss

    def augment_batch(self, new_tasks, current_domain):
        for a in self.algorithms:
            new_tasks = a.augment_batch(new_tasks, current_domain)
        return new_tasks

    def augment_trajectories(self, new, current_domain, successful=False):
        return [item for a in self.algorithms for item in a.augment_trajectories(new, current_domain, successful)]

    def post_step_hook(self, trainer, domain):
        for a in self.algorithms:
            a.post_step_hook(trainer, domain)

    def post_task_hook(self, trainer, domain):
        for a in self.algorithms:
            a.post_task_hook(trainer, domain)

    def get_statistics(self):
        return {name: value for a in self.algorithms for name, value in a.get_statistics().items()}

    def bytes_kept(self):
        return sum(a.bytes_kept() for a in self.algorithms)

    def save(self, folder):
        for a in self.algorithms:
            a.save(folder)

    def load(self, folder):
        for a in self.algorithms:
            a.load(folder)

    def snapshots(self):
        return {f"{k}_{name}": saved for k, a in enumerate(self.algorithms) for name, saved in a.snapshots().items()}

    def load_snapshots(self, snapshots):
        for k, a in enumerate(self.algorithms):
            mine = {name.removeprefix(f"{k}_"): saved for name, saved in snapshots.items() if name.startswith(f"{k}_")}
            a.load_snapshots(mine)

    def state_dict(self):
        return {"parts": [a.state_dict() for a in self.algorithms]}

    def load_state_dict(self, state):
        for a, part in zip(self.algorithms, state["parts"], strict=True):
            a.load_state_dict(part)


ALGORITHMS = {"ewc": EWC, "online_ewc": OnlineEWC, "lwf": LwF}


def set_defaults(args):
    """Fills in the coefficients of the algorithm that train.py's flags name."""
    if args.cl_algorithm in ("ewc", "online_ewc") and args.ewc_lambda is None:
        args.ewc_lambda = EWC_LAMBDA
    if args.cl_algorithm == "online_ewc" and args.ewc_decay is None:
        args.ewc_decay = EWC_DECAY
    if args.cl_algorithm == "lwf" and args.lwf_coef is None:
        args.lwf_coef = LWF_COEF


def with_penalties(algorithm, args) -> CLAlgorithm:
    """`algorithm`, and beside it what train.py's flags add. Raises ValueError for flags that cannot work together."""
    penalties = []
    if args.ewc_lambda and not isinstance(algorithm, EWC):
        penalties.append((EWC if args.ewc_decay is None else OnlineEWC).from_args(args))
    if args.lwf_coef and not isinstance(algorithm, LwF):
        penalties.append(LwF.from_args(args))
    holds = [*penalties, *([algorithm] if isinstance(algorithm, (EWC, LwF)) else [])]
    if args.ewc_decay is not None and args.ewc_lambda != 0 and not any(isinstance(a, OnlineEWC) for a in holds):
        raise ValueError("ewc_decay is of the running Fisher information: it needs online_ewc, or --ewc_lambda")
    if holds and algorithm.all_domains:
        raise ValueError(f"{args.cl_algorithm} trains all domains at once: ewc_lambda and lwf_coef have none to hold")
    if holds and len(args.task_order) < 2:
        raise ValueError(f"EWC and LwF need a domain that has ended before another: task_order is {args.task_order}")
    if any(isinstance(a, EWC) for a in holds) and args.num_steps_per_task == 0:
        raise ValueError("EWC takes its Fisher information from conversations of GRPO: num_steps_per_task is 0")
    return Composed(algorithm, *penalties) if penalties else algorithm


# ------------------------------------------------------------------------------- python regularize.py


def demonstrate():
    """Three regressions y = x . w + noise, one after the other. Each sees some of the inputs alone, so that the Fisher
    information is diagonal and the solution of all data together can be reached without any of the earlier data."""
    seen = [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]
    generator = torch.Generator().manual_seed(0)
    data = []
    for inputs in seen:
        rows = torch.eye(4)[torch.tensor(inputs).bool()].repeat_interleave(200, 0)
        x = rows * torch.randn(len(rows), 1, generator=generator)
        y = x @ torch.randn(4, 1, generator=generator) + torch.randn(len(x), 1, generator=generator)
        data.append((x.double(), y.double()))

    def loss_fn(model, batch):
        x, y = batch
        return (model(x) - y).square().sum(1) / 2

    def minimise(model, batch, penalty):
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, line_search_fn="strong_wolfe")

        def closure():
            optimizer.zero_grad()
            loss = loss_fn(model, batch).mean()
            if penalty.held:
                loss = loss + sum(penalty.penalty(model.parameters()))
            loss.backward()
            return loss

        optimizer.step(closure)

    joint = tuple(torch.cat(columns) for columns in zip(*data, strict=True))
    best = torch.linalg.lstsq(*joint).solution[:, 0]
    print(f"{'':<22}{'weights':<34}loss on task 1, 2, 3     distance from joint")
    arms = {"one after the other": EWC(0.0), "ewc": EWC(1.0), "online_ewc": OnlineEWC(1.0, 1.0), "joint": None}
    for name, penalty in arms.items():
        model = torch.nn.Linear(4, 1, bias=False, dtype=torch.float64)
        torch.nn.init.zeros_(model.weight)
        for x, y in [joint] if penalty is None else data:
            minimise(model, (x, y), penalty or EWC(0.0))
            if penalty is not None:
                with torch.no_grad():  # answers of the model itself: the proper Fisher information
                    answers = model(x) + torch.randn(len(x), 1, generator=generator)
                penalty.consolidate(model, zip(x.split(1), answers.split(1), strict=True), loss_fn)
        with torch.no_grad():
            losses = "  ".join(f"{loss_fn(model, task).mean():.3f}" for task in data)
            weights = " ".join(f"{w:7.3f}" for w in model.weight[0].tolist())
            print(f"{name:<22}{weights:<34}{losses:<25}{(model.weight[0] - best).norm():.3f}")


if __name__ == "__main__":
    demonstrate()
