"""What a step logs, and TensorBoard and Weights & Biases, which get the numbers of metrics.jsonl."""

import dataclasses
import importlib.util
import os
import statistics
from typing import Literal

import pandas as pd

import grpo
from distributed import rank

Tracker = Literal["tensorboard", "wandb"]
NEEDED = {"tensorboard": ("tensorboard",), "wandb": ("wandb", "tensorboard")}  # packages
PROJECT = "rehearse"  # of Weights & Biases, unless the environment variable WANDB_PROJECT names another


def step_metrics(trainer, records, clock) -> dict:
    """What the conversations of a step (of all ranks) say."""
    frame = pd.DataFrame(records).astype({"reward": float, "tool_accuracy": float})
    valid = frame.dropna(subset="reward")
    accuracy = frame["tool_accuracy"].dropna()
    by_domain = valid.groupby("domain")["reward"]
    scored = trainer.rewards_P_G[~trainer.rewards_P_G.isnan().all(1)]
    new = valid["reward"][valid["domain"].isin(trainer.domains)]
    return {
        "kind": "step",
        "domain": trainer.domain,
        "reward": float(new.mean()) if len(new) else 0.0,
        "reward_std": float(new.std(ddof=0)) if len(new) else 0.0,
        "reward_max": float(new.max()) if len(new) else 0.0,
        "reward_by_domain": by_domain.mean().to_dict(),
        "pass_rate_by_domain": by_domain.agg(lambda rewards: (rewards >= trainer.args.pass_threshold).mean()).to_dict(),
        "tool_accuracy": float(accuracy.mean()) if len(accuracy) else None,
        "zero_variance_groups": 1.0 - grpo.varied(scored).float().mean().item() if len(scored) else 0.0,
        "replayed_groups": statistics.fmean(ref.domain not in trainer.domains for ref in trainer.refs_P),
        "replay_ratio": max(a.replay_ratio for a in trainer.algorithms),
        "turns": float(frame["turns"].mean()),
        "tool_error_share": float(frame["failed_calls"].sum() / max(1, frame["tool_calls"].sum())),
        "truncated": float(frame["truncated"].mean()),
        "invalid": int((frame["reward"].isna() & (frame["error"] != "")).sum()),
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "skipped_in_a_row": trainer.state["skipped_in_a_row"],
        "tokens_per_second": float(frame["tokens"].sum() / clock["rollout_seconds"]),
        **({"replayed_conversations": len(trainer.replayed)} if trainer.replayed else {}),
        **clock,
    }


def check(name: Tracker | None):
    """Raises ValueError for a tracker whose package is not installed, and for Weights & Biases without a key."""
    for package in NEEDED.get(name, ()):
        if importlib.util.find_spec(package) is None:
            needs = f"--tracker {name} needs the package {package}"
            raise ValueError(f"{needs}, which is not installed: pip install {package}")
    if name == "wandb" and os.environ.get("WANDB_MODE", "online") == "online":
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        if not wandb.login(prompt=False, verify=False):
            raise ValueError("--tracker wandb has no key: run `wandb login`, or set WANDB_MODE=offline")


def open_writer(args, run):
    """TensorBoard's writer on rank 0, if args.tracker asks for one; Weights & Biases reads along. A resumed run goes on
    where it was."""
    if rank() > 0 or args.tracker is None:
        return None
    if args.tracker == "wandb":
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_DISABLE_WEAVE", "true")  # it would advertise itself
        import wandb

        about = {"name": run.name, "id": run.name, "resume": "allow", "dir": str(run)}
        about["project"] = os.environ.get("WANDB_PROJECT", PROJECT)
        quiet = wandb.Settings(silent=True, console="off")
        try:
            wandb.init(**about, config=dataclasses.asdict(args), settings=quiet, sync_tensorboard=True)
        except wandb.Error as error:
            raise ValueError(f"--tracker wandb: {error}") from error
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run / "tensorboard")


def write(writer, record, step):
    for name, value in scalars(record).items() if writer is not None else ():
        writer.add_scalar(name, value, step)
    if writer is not None:
        writer.flush()


def scalars(record) -> dict[str, float]:
    """The numbers of a record, nested ones too, by names such as step/reward and evaluation/domain/scores/airline."""
    name = "/".join(str(record[key]) for key in ("kind", "stage") if key in record)
    [flat] = pd.json_normalize(record, sep="/").to_dict("records")
    return {f"{name}/{key}": float(value) for key, value in flat.items() if isinstance(value, (int, float))}
