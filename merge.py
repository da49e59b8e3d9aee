"""Merging of policies: task arithmetic, TIES, and a running merge at each domain's end.

    python merge.py --runs runs/airline runs/retail --method ties --output merged    finished runs, into a model
    python train.py --cl_algorithm merge                             each domain starts from the merged policy

What is merged are task vectors tau_i = theta_i - theta_0: the weights of finished runs less those that all of them
started from. The result is a directory that transformers, vLLM and eval.py load.
"""

import dataclasses
import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import distributed  # sets what transformers reads when it is imported

# isort: split
import torch
import tyro
from annotated_types import MinLen
from torch import Tensor

import checkpoint
import policy
from algorithm import CLAlgorithm
from flags import Positive, PositiveShare, Share, checked, errors_in_one_line

Weights = dict[str, Tensor]


# -------------------------------------------------------------------------------------------------------- the formulas


def task_arithmetic(base: Weights, policies: list[Weights], scale=1.0) -> Weights:
    """theta_0 + scale sum_i tau_i (Ilharco et al. 2023, arXiv:2212.04089, "task addition")."""
    return {name: start + scale * sum(p[name] - start for p in policies) for name, start in base.items()}


def ties(base: Weights, policies: list[Weights], scale=1.0, keep=0.2) -> Weights:
    """theta_0 + scale tau (Yadav et al. 2023, arXiv:2306.01708, algorithm 1). Of each task vector the share `keep` with
    the largest values stays; the sign of a weight is that of their sum; tau is the mean of those with this sign."""
    vectors = [trimmed({name: p[name] - start for name, start in base.items()}, keep) for p in policies]
    merged = {}
    for name, start in base.items():
        values = torch.stack([vector[name] for vector in vectors])
        agree = values.sign() == values.sum(0).sign()
        agree &= values != 0
        merged[name] = start + scale * (values * agree).sum(0) / agree.sum(0).clamp(min=1)
    return merged


def trimmed(vector: Weights, keep) -> Weights:
    """The share `keep` of all values that is largest in size (one at least, and all that are as large as the last); 0
    elsewhere."""
    sizes = torch.cat([values.abs().flatten() for values in vector.values()]).numpy()
    dropped = len(sizes) - max(1, round(keep * len(sizes)))
    if dropped == 0:
        return vector
    sizes.partition(dropped)  # in place
    return {name: values.where(values.abs() >= sizes[dropped], 0.0) for name, values in vector.items()}


def interpolate(old: Weights, new: Weights, alpha) -> Weights:
    """(1 - alpha) old + alpha new. With the first policy and the fine-tuned one: WiSE-FT (Wortsman et al. 2022,
    arXiv:2109.01903)."""
    return {name: (1 - alpha) * start + alpha * new[name] for name, start in old.items()}


def merge_adapters(old: Weights, new: Weights, alpha) -> Weights:
    """LoRA's factors whose product is nearest to (1 - alpha) B_old A_old + alpha B_new A_new (Eckart and Young 1936),
    with the ranks that they have. The merged product may have twice their rank; what is beyond is lost. The rows of A
    are orthogonal and as long as those of the new A on average, so that B learns on, also where the product is 0."""
    merged = {}
    for name_a in [name for name in new if "lora_A" in name]:
        name_b = name_a.replace("lora_A", "lora_B")
        # Both products as one, B (out, 2r) A (2r, in): no matrix (out, in) is needed.
        left = torch.cat([(1 - alpha) * old[name_b], alpha * new[name_b]], 1).double()
        right = torch.cat([old[name_a], new[name_a]], 0).double()
        (q_left, r_left), (q_right, r_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
        u, s, v = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
        rank = min(len(new[name_a]), len(s))  # a layer may have fewer inputs or outputs than the adapter's rank
        length = new[name_a].double().square().sum(1).mean().sqrt()
        a, b = new[name_a].clone(), torch.zeros_like(new[name_b])
        a[:rank] = (length * v[:rank] @ q_right.T).to(a.dtype)
        b[:, :rank] = (q_left @ (u[:, :rank] * s[:rank]) / length).to(b.dtype)
        merged |= {name_a: a, name_b: b}
    return merged


# ------------------------------------------------------------------------------------------------------- the algorithm


@dataclass(kw_only=True)
class Flags:
    """Merging."""

    merge_alpha: Share | None = None
    """weight of a domain's policy in the merge at its end; the rest is what was merged before. Default: 1/k at the end
    of the k-th domain, which makes the merge the mean of the domains' policies"""


class MergeCL(CLAlgorithm):
    """At the end of each domain's GRPO, theta~_k = (1 - alpha) theta~_(k-1) + alpha theta_k, which is then evaluated,
    and from which the next domain starts. theta~_0 is the policy before any training. Without an alpha it is 1/k.

    With LoRA the products of the adapters are merged, not their factors, see `merge_adapters`."""

    Flags = Flags

    def __init__(self, merge_alpha=None, **kwargs):
        super().__init__(merge_alpha=merge_alpha, **kwargs)
        self.merged = None  # policy.snapshot

    @classmethod
    def from_args(cls, args):
        if args.lora_rank and args.shard:
            raise ValueError("cl_algorithm merge needs whole LoRA adapters; leave out --shard")
        if args.num_steps_per_task == 0:
            raise ValueError("cl_algorithm merge merges at the end of a domain's GRPO: num_steps_per_task is 0")
        return super().from_args(args)

    def augment_batch(self, new_tasks, current_domain):
        if self.merged is None:  # before the first step
            self.merged = policy.snapshot(self.trainer.model)
        return new_tasks

    def post_step_hook(self, trainer, domain):
        if (trainer.step + 1) % trainer.args.num_steps_per_task:  # not the domain's last
            return
        merge = merge_adapters if trainer.args.lora_rank else interpolate
        alpha = self.flags.merge_alpha
        if alpha is None:
            alpha = 1 / (len(trainer.state["R"]) + 1)
        self.merged = merge(self.merged, policy.snapshot(trainer.model), alpha)
        policy.restore(trainer.model, self.merged)
        if trainer.args.lora_rank:
            trainer.optimizer.state.clear()  # the moments are those of other factors

    def bytes_kept(self):
        return 0 if self.merged is None else policy.snapshot_bytes(self.trainer.model)

    def tensors(self):
        return {} if self.merged is None else policy.gathered_snapshot(self.trainer.model, self.merged)

    def load_tensors(self, file):
        if list(file.keys()):
            self.merged = policy.snapshot_from(self.trainer.model, file.get_tensor)


# -------------------------------------------------------------------------------------------------------- the command


@dataclass(kw_only=True)
class Args:
    """Merges finished runs that started from the same policy."""

    runs: Annotated[list[str], MinLen(1)]
    """directories of runs, or of models"""
    method: Literal["arithmetic", "ties", "running"]
    """task arithmetic; TIES; or the running merge, in the order of the runs (of one run: WiSE-FT)"""
    output: str
    """a new directory for the merged model"""
    base: str | None = None
    """the policy that all runs started from. Default: the model that the runs name"""
    scale: Positive = 1.0
    """weight of the sum of task vectors (arithmetic), or of their merge (ties)"""
    keep: PositiveShare = 0.2
    """share of each task vector that stays (ties)"""
    alpha: Share = 0.5
    """weight of each run (running)"""


def model_of(run) -> Path:
    """The directory of a run's last model. Raises ValueError if there is none, or it is damaged."""
    last = Path(run) / "checkpoints" / "LAST"
    folder = last if last.exists() else Path(run)
    config = folder / "config.json"
    is_model = config.is_file() and "model_type" in json.loads(config.read_bytes())
    if not is_model and not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{run} is no directory of a run or of a model")
    if (folder / "training" / "state.json").is_file():
        checkpoint.verify(folder, model_only=True)
    return folder


def base_of(runs) -> str:
    """The model that all runs name. Raises ValueError if they name none, or several, or the embedded one."""
    paths = [Path(run) / "config.json" for run in runs]
    names = {json.loads(p.read_bytes()).get("model_name_or_path") if p.is_file() else None for p in paths}
    if len(names) > 1 or names & {None, "tiny"}:
        raise ValueError(f"the runs do not name one model in a directory (but {names}); name it with --base")
    return names.pop()


def weights_of(folder) -> Weights:
    """The weights of a model by name, in float32; those of an adapter are added to its base."""
    model, _ = policy.load_policy(str(folder), "float32", "cpu")
    found = {}
    for name, p in model.named_parameters():
        if "lora_" not in name:
            found[name.replace(".base_layer", "")] = p.detach()
    for name, module in model.named_modules():
        for adapter, a in getattr(module, "lora_A", {}).items():
            found[f"{name}.weight"] += module.scaling[adapter] * (module.lora_B[adapter].weight @ a.weight).detach()
    return found


def run_merge(args: Args):
    """Writes the merged model. Raises ValueError for runs that cannot be merged."""
    args, output = checked(Args, vars(args)), Path(args.output)
    if output.exists():
        raise ValueError(f"{output} exists; choose another --output")
    folders = [model_of(run) for run in args.runs]
    model, tokenizer = policy.load_policy(args.base or base_of(args.runs), "float32", "cpu")
    base, policies = {name: p.detach() for name, p in model.named_parameters()}, [weights_of(f) for f in folders]
    for run, weights in zip(args.runs, policies, strict=True):
        if {n: p.shape for n, p in base.items()} != {n: p.shape for n, p in weights.items()}:
            raise ValueError(f"{run} did not start from {args.base or base_of(args.runs)}: it has other weights")
    if args.method == "arithmetic":
        merged = task_arithmetic(base, policies, args.scale)
    elif args.method == "ties":
        merged = ties(base, policies, args.scale, args.keep)
    else:
        merged = functools.reduce(functools.partial(interpolate, alpha=args.alpha), policies, base)
    policy.restore(model, merged)
    temporary = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    policy.save_policy(model, tokenizer, temporary)
    distributed.write_json(temporary / "merge.json", dataclasses.asdict(args))
    temporary.rename(output)
    print(f"{output}: {args.method} of {', '.join(args.runs)}")


def main():
    with errors_in_one_line("merge.py"):
        run_merge(tyro.cli(Args))


if __name__ == "__main__":
    main()
