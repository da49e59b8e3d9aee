"""One step of the real loop on made-up conversations, so that its gradient can be compared; and small runs."""

import copy
import functools
import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.multiprocessing

import checkpoint
import eval as evaluation
import grpo
import oracle
import policy
import replay
import report
import rollout
import run
import train

ROOT = Path(__file__).resolve().parent.parent
SMALL = """
    --task_order airline telecom --max_tasks_per_domain 2 --num_samples_per_prompt 2 --num_steps_per_task 2
    --warmup_steps 2 --warmup_target None --eval_trials 1 --max_turns 2 --max_new_tokens 6 --batch_size_per_gpu 1
    --gradient_accumulation_steps 2 --checkpoint_every 1
"""
SMALL = SMALL.split()
PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "NO_COLOR": "1"}
TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]

# Rewards of four groups, and their trajectories' lengths; None: the environment failed. The last group does not vary.
REWARDS = [[1.0, 0.0, 0.3], [0.2, None, 0.9], [0.0, 1.0, 0.5], [0.7, 0.7, 0.7]]
LENGTHS = [3, 9, 5, 14, 4, 7, 6, 8, 2, 5, 5, 11]


def conversations() -> list[grpo.Trajectory]:
    """Three for each of four tasks."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for k, n in enumerate(LENGTHS):
        t = grpo.Trajectory("airline", str(k // 3))
        t.append(torch.randint(3, 300, (n,), generator=rng).tolist())
        for turn in range(2):
            t.append(torch.randint(3, 300, (n,), generator=rng).tolist(), turn, [-5.5 + 0.1 * k for k in range(n)])
        found.append(t)
    return found


@functools.cache
def tiny():
    return policy.load_policy("tiny", "float32", "cpu")


def law_trainer(loss_type="dapo", shard=False, model=None, **settings) -> run.Trainer:
    """A trainer with a fixed policy, a reference a little apart, and plain gradient descent at rate 1."""
    fixed = {"temperature": 1.0, "gamma": 0.9, "max_context": 64, "max_grad_norm": 1e9, "kl_reference": "domain"}
    fixed |= {"num_samples_per_prompt": 3, "learning_rate": 1.0, "task_order": ["airline", "retail"], "shard": shard}
    args = train.Args(model_name_or_path="made-up", **{**fixed, "loss_type": loss_type, **settings})
    made, tokenizer = tiny()
    initial = reference = None
    if model is None:
        model, rng = copy.deepcopy(made), torch.Generator().manual_seed(1)
        initial = {n: p.detach().clone() for n, p in model.named_parameters()}
        reference = {n: p + 0.01 * torch.randn(p.shape, generator=rng) for n, p in initial.items()}
    if shard:
        policy.shard(model)
        if initial is not None:
            initial, reference = (policy.snapshot_from(model, s.__getitem__) for s in (initial, reference))
    optimizer = torch.optim.SGD(policy.trained_parameters(model).values(), lr=1.0)
    tasks = {d: [SimpleNamespace(id=str(k)) for k in range(4)] for d in args.task_order}
    rest = (tasks, {}, args.task_order, optimizer, initial, None, run.initial_state())
    trainer = run.Trainer(args, Path(), model, tokenizer, [replay.SequentialCL()], *rest, reference=reference)
    trainer.domain = "airline"
    return trainer


def use(trainer, *algorithms):
    trainer.algorithms = list(algorithms)
    for algorithm in algorithms:
        algorithm.trainer = trainer


def weights(trainer) -> torch.Tensor:
    parameters = policy.trained_parameters(trainer.model).values()
    return torch.cat([policy.whole(p.detach()).flatten().clone() for p in parameters])


def play(trainer, order=(0, 1, 2, 3), rewards=REWARDS, trajectories=None, steps=1, phase="grpo") -> list[dict]:
    """Runs steps of train.train on the conversations of the tasks in `order`. Returns the log. In the warm start, the
    demonstration of a task is the first of its conversations."""
    trajectories, logged = trajectories or conversations(), []

    def score_and_record(episode, t, evaluation_type, scored):
        place = trajectories.index(t)
        reward = rewards[place // 3][place % 3]
        t.valid, t.reward = reward is not None, reward or 0.0
        reward = reward if scored else None
        about = {"turns": 2, "failed_calls": 0, "tool_calls": 0, "truncated": t.truncated, "tokens": sum(t.action_mask)}
        about |= {"tool_accuracy": 0.5, "error": "" if t.valid else "failed"}
        return {"reward": reward, "domain": t.domain, "messages": [], **about}

    def rollouts(model, tokenizer, episodes, **kwargs):
        return [copy.deepcopy(trajectories[3 * int(task.id) + k % 3]) for k, task in enumerate(episodes)]

    replaced = {
        (run, "set_up"): lambda *args: trainer,
        (run, "finish"): lambda trainer: None,
        (run, "log"): lambda trainer, record: logged.append(record),
        (run, "append_jsonl"): lambda *args: None,
        (train, "schedule"): lambda *args: [(0, phase, step) for step in range(steps)],
        (run, "demonstration"): lambda args, tokenizer, domain, task: trajectories[3 * int(task.id)],
        (oracle, "sample_tasks"): lambda tasks, *args: [tasks[k] for k in order],
        (oracle, "Episode"): lambda domain, task, *args: task,
        (rollout, "rollout"): rollouts,
        (evaluation, "score_and_record"): score_and_record,
        (checkpoint, "save"): lambda trainer: None,
    }
    with ExitStack() as stack:
        for (module, name), value in replaced.items():
            stack.enter_context(mock.patch.object(module, name, value))
        train.train(trainer.args)
    trainer.state["position"] = 0
    return logged


def gradient(trainer, *args, **kwargs) -> tuple[torch.Tensor, dict]:
    """(the gradient of one step: what plain descent at rate 1 takes off the weights; the step's metrics)."""
    before = weights(trainer)
    [metrics] = play(trainer, *args, **kwargs)
    return before - weights(trainer), without_times(metrics)


def without_times(record) -> dict:
    return {
        n: v for n, v in record.items() if not n.endswith(("seconds", "per_second")) and not isinstance(v, (str, dict))
    }


def apart(a, b) -> float:
    return ((a - b).norm() / b.norm()).item()


def near(values):
    return pytest.approx(values, rel=1e-4, abs=1e-6, nan_ok=True)


# --------------------------------------------------------------------------------------------------------- small runs


def small_args(tmp_path, *flags) -> train.Args:
    return train.parse_args([*SMALL, "--runs_dir", str(tmp_path), *flags])


def small_run(tmp_path, *flags) -> dict:
    return train.train(small_args(tmp_path, *flags))


def steps_of(run_directory) -> list[dict]:
    return [r for r in report.read_jsonl(run_directory / "metrics.jsonl") if r["kind"] == "step"]


def run_script(script, *flags, launcher=(), **kwargs):
    command = [*(launcher or [sys.executable]), script, *flags]
    kwargs = {"env": ENV, "timeout": 300, **kwargs}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


def _main(rank, flags, env, folder, largest_file):
    import resource

    os.environ.update(env, RANK=str(rank)) if "WORLD_SIZE" in env else os.environ.update(env)
    for name in ("stdout", "stderr"):
        shown = os.open(f"{folder}/{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        setattr(sys, name, os.fdopen(shown, "w", buffering=1))
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    sys.argv = ["train.py", *flags]
    train.main()


def start_main(folder, *flags, ranks=1, env=None, largest_file=None) -> list:
    """Starts train.py's main as the script would be, in processes that have imported everything already."""
    folder.mkdir(exist_ok=True)
    env = dict(env or {})
    if ranks > 1 or "--shard" in flags:
        with socket.socket() as port:
            port.bind(("localhost", 0))
            address = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port.getsockname()[1])}
        env.update(address, WORLD_SIZE=str(ranks))
    fork = torch.multiprocessing.get_context("fork")
    processes = [fork.Process(target=_main, args=(rank, flags, env, folder, largest_file)) for rank in range(ranks)]
    for process in processes:
        process.start()
    return processes


def run_main(folder, *flags, **kwargs) -> list:
    """(exit code, stdout, stderr) of each rank of `start_main`."""
    processes = start_main(folder, *flags, **kwargs)
    for process in processes:
        process.join(240)
        assert not process.is_alive(), "a rank hangs"
    return [
        (process.exitcode, *((folder / f"{rank}.{name}").read_text() for name in ("stdout", "stderr")))
        for rank, process in enumerate(processes)
    ]


def refused(monkeypatch, capsys, *flags) -> str:
    """The line that train.py prints for these flags; the exit code must be 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


# Ends the class of an algorithm: a loss that gives every step a gradient, and a signal once, at step STOP_AT.
STOPS = """
    def extra_losses(self, trainer):
        yield from super().extra_losses(trainer)
        yield sum(p.square().sum() for p in trainer.model.parameters())

    def post_step_hook(self, trainer, domain):
        super().post_step_hook(trainer, domain)
        step, number = os.environ.get("STOP_AT"), int(os.environ.get("STOP_WITH", 15))
        if step and trainer.step == int(step) and not (trainer.run / "stopped").exists():
            (trainer.run / "stopped").write_text("")
            os.kill(os.getpid(), number)
"""


def stopper(tmp_path, module="replay", base="AdaptiveReplayCL") -> list[str]:
    """Flags of a class of one's own that derives from `base` and stops as STOP_AT and STOP_WITH say."""
    path = tmp_path / "stopper.py"
    path.write_text(f"import os\nimport {module}\n\n\nclass Stopper({module}.{base}):{STOPS}")
    return ["--cl_algorithm", f"{path}:Stopper"]


def comparable(folder) -> tuple:
    """Everything of a finished run that must not depend on its having been stopped."""
    records = report.read_jsonl(folder / "metrics.jsonl")
    metrics = [{k: v for k, v in r.items() if not k.endswith(("seconds", "per_second"))} for r in records]
    lines = report.read_jsonl(folder / "trajectories.jsonl")
    trajectories = [{k: v for k, v in r.items() if k != "time"} for r in lines]
    last = folder / "checkpoints" / "LAST"
    names = [path for path in checkpoint.files_in(last) if path.name != "state.json"]
    files = {str(p.relative_to(last)): p.read_bytes().replace(str(folder).encode(), b"") for p in names}
    summary = (folder / "summary.json").read_text()
    statistics = json.loads(summary)["statistics"]
    return metrics, trajectories, files, statistics


def assert_equal_runs(first, second):
    for a, b in zip(comparable(first), comparable(second), strict=True):
        assert a == b
