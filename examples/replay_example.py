"""Experience replay on the embedded policy. Each run takes some minutes on two CPU cores.

    python examples/replay_example.py basic        a fifth of every batch is old tasks
    python examples/replay_example.py adaptive     the share of old tasks follows forgetting
    python examples/replay_example.py compare      four runs side by side: transfer, time, memory
    python examples/replay_example.py custom       a class of one's own, with three hooks

Flags of train.py may follow, such as --num_steps_per_task 4. The algorithm's own settings are in this file.
"""

import sys
from dataclasses import make_dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas as pd
import tyro

import train
from distributed import say
from replay import AdaptiveReplayCL, ReplayCL, SequentialCL


class CustomReplayCL(ReplayCL):
    """Adds one old task of each previous domain to every batch."""

    def augment_batch(self, new_tasks, current_domain):
        order = self.trainer.config.task_order
        previous = order[: order.index(current_domain)]
        records = self.trainer.trajectory_buffer.sample_multi_domain(domains=previous, num_samples_per_domain=1)
        return [*new_tasks, *(record.task for record in records)]

    def post_step_hook(self, trainer, domain):
        super().post_step_hook(trainer, domain)
        trainer.log_custom_metric("old_tasks", sum(ref.domain != domain for ref in trainer.refs_P))

    def post_task_hook(self, trainer, domain):
        super().post_task_hook(trainer, domain)
        say(f"the buffer after {domain}: {trainer.trajectory_buffer.get_statistics()}")


def compare(config):
    """Trains with four algorithms and prints a row for each. Higher is better for average and transfer."""
    algorithms = {
        "sequential": SequentialCL(),
        "replay 0.2": ReplayCL(replay_ratio=0.2),
        "replay 0.5": ReplayCL(replay_ratio=0.5),
        "adaptive": AdaptiveReplayCL(initial_replay_ratio=0.2),
    }
    rows = {}
    for name, algorithm in algorithms.items():
        summary = train.train(config, algorithm=algorithm)
        row = {metric: summary["metrics"][metric] for metric in ("average", "backward_transfer", "forgetting")}
        rows[name] = {**row, "minutes": summary["minutes"], "bytes_kept": summary["bytes_kept"]}
    say(pd.DataFrame.from_dict(rows, orient="index").round(2).to_markdown())


EXAMPLES = {
    "basic": lambda config: train.train(config, algorithm=ReplayCL(replay_ratio=0.2)),
    "adaptive": lambda config: train.train(config, algorithm=AdaptiveReplayCL(initial_replay_ratio=0.2)),
    "compare": compare,
    "custom": lambda config: train.train(config, algorithm=CustomReplayCL()),
}


def main():
    Command = make_dataclass("Command", [("example", tyro.conf.Positional[Literal[*EXAMPLES]])])
    command, flags = tyro.cli(Command, description=__doc__, return_unknown_args=True)
    train.main(lambda: EXAMPLES[command.example](train.parse_args(flags)), "replay_example.py")


if __name__ == "__main__":
    main()
