"""merge.py: formulas against cases worked by hand and float64, the algorithm in runs, the command."""

import copy
import json
import shutil

import pytest
import torch
from law import law_trainer, small_args, tiny, use
from ranks import on_two_ranks

import merge
import policy
import train

RNG, IDS = torch.Generator().manual_seed(0), torch.arange(3, 40)[None]
BASE, FIRST, SECOND = ({"a": torch.randn(4, 3, generator=RNG), "b": torch.randn(5, generator=RNG)} for _ in range(3))


def close(found, expected):
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


def test_task_arithmetic_adds_task_vectors():
    found = merge.task_arithmetic(BASE, [FIRST, SECOND], 0.3)
    close(found, {n: 0.4 * BASE[n] + 0.3 * FIRST[n] + 0.3 * SECOND[n] for n in BASE})


def test_ties_of_a_case_worked_by_hand():
    """Ten values and 40% of them: four of each vector stay, over both tensors together."""
    base = {"x": torch.tensor([1.0] * 6), "y": torch.tensor([-1.0] * 4)}
    vectors = [
        {"x": [5.0, -4.0, 0.1, 0.2, 0.0, 3.0], "y": [0.3, -2.0, 0.0, 0.1]},  # 5, -4, 3, -2 stay
        {"x": [1.0, 6.0, 0.2, 0.1, 0.0, -9.0], "y": [0.1, -4.0, 0.2, 0.0]},  # 1, 6, -9, -4 stay
    ]
    policies = [{n: base[n] + torch.tensor(v) for n, v in vector.items()} for vector in vectors]
    # Signs of the sums: +, + (6 - 4), 0, 0, 0, - (3 - 9); 0, -, 0, 0. Means of those that agree: 3, 6, -9, -3.
    merged = {"x": [3.0, 6.0, 0.0, 0.0, 0.0, -9.0], "y": [0.0, -3.0, 0.0, 0.0]}
    close(merge.ties(base, policies, 0.5, 0.4), {n: base[n] + 0.5 * torch.tensor(v) for n, v in merged.items()})


@pytest.mark.parametrize("keep", [0.01, 0.2, 0.5, 1.0])
def test_trimming_keeps_the_largest_values(keep):
    vector = {n: FIRST[n] - BASE[n] for n in BASE}
    kept = {n: values != 0 for n, values in merge.trimmed(vector, keep).items()}
    sizes = torch.cat([v.abs().flatten() for v in vector.values()])
    stay = torch.cat([k.flatten() for k in kept.values()])
    assert stay.sum() == max(1, round(17 * keep))
    assert stay.all() or sizes[stay].min() > sizes[~stay].max()


def test_merging_equal_policies_gives_that_policy():
    close(merge.ties(BASE, [FIRST, FIRST], 1.0, 1.0), FIRST)
    close(merge.task_arithmetic(BASE, [FIRST] * 4, 0.25), FIRST)
    close(merge.interpolate(FIRST, FIRST, 0.3), FIRST)


def test_an_alpha_of_0_or_1_is_one_of_the_two():
    for alpha, expected in ((0.0, FIRST), (1.0, SECOND)):
        assert all(torch.equal(merge.interpolate(FIRST, SECOND, alpha)[n], expected[n]) for n in BASE)


def adapters(rank, seed):
    rng = torch.Generator().manual_seed(seed)
    return {"m.lora_A.w": torch.randn(rank, 7, generator=rng), "m.lora_B.w": torch.randn(5, rank, generator=rng)}


def product(weights):
    return weights["m.lora_B.w"] @ weights["m.lora_A.w"]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("rank", [1, 2, 4, 6, 9])  # the layer has 7 inputs and 5 outputs
def test_merged_adapters_have_the_nearest_product_of_their_rank(rank, alpha):
    old, new = adapters(rank, 1), adapters(rank, 2)
    found, wanted = product(merge.merge_adapters(old, new, alpha)), (1 - alpha) * product(old) + alpha * product(new)
    u, s, v = torch.linalg.svd(wanted, full_matrices=False)
    torch.testing.assert_close(found, u[:, :rank] * s[:rank] @ v[:rank])
    if alpha in (0.0, 1.0):
        torch.testing.assert_close(found, wanted)


def test_adapters_without_a_product_go_on_learning():
    fresh = adapters(2, 1)
    fresh["m.lora_B.w"].zero_()
    merged = merge.merge_adapters(fresh, fresh, 0.5)
    assert not product(merged).any()
    torch.testing.assert_close(merged["m.lora_A.w"].norm(), fresh["m.lora_A.w"].norm())  # so B has a gradient


def test_equal_values_stay_together():
    vector = {"a": torch.tensor([1.0, 1.0, -1.0, 1.0, 0.5])}
    assert merge.trimmed(vector, 0.2)["a"].tolist() == [1.0, 1.0, -1.0, 1.0, 0.0]
    assert merge.trimmed({"a": torch.tensor([2.0] * 5)}, 0.2)["a"].tolist() == [2.0] * 5


# ------------------------------------------------------------------------------------------------------- the algorithm


def merged_in_a_domain(shard):
    """The weights before any step, after each of two, which are the fourth domain's, and those that are kept."""
    trainer = law_trainer(shard=shard, num_steps_per_task=2)
    algorithm, found = merge.MergeCL(None if shard else 0.25), []
    trainer.state["R"] = [[0.0]] * 3
    use(trainer, algorithm)
    initial = {name: policy.gathered(p) for name, p in policy.trained_parameters(trainer.model).items()}
    for step in range(2):
        trainer.state["global_step"] = step
        assert algorithm.augment_batch([], "airline") == []
        with torch.no_grad():
            for p in policy.trained_parameters(trainer.model).values():
                p.add_(step + 1.0)
        algorithm.post_step_hook(trainer, "airline")
        found.append({name: policy.gathered(p) for name, p in policy.trained_parameters(trainer.model).items()})
    kept = algorithm.tensors()
    return [initial, *found, kept]


@pytest.mark.parametrize("shard", [False, True])
def test_a_domain_ends_with_the_merged_policy(shard, tmp_path):
    made = on_two_ranks(merged_in_a_domain, tmp_path, shard)[0] if shard else merged_in_a_domain(shard)
    initial, first, merged, kept = made
    for name, start in initial.items():
        torch.testing.assert_close(first[name], start + 1.0)
        torch.testing.assert_close(merged[name], start + 0.25 * 3.0)
        assert torch.equal(kept[name], merged[name])


@pytest.mark.parametrize("lora", [[], ["--lora_rank", "2"]])
def test_every_domain_starts_from_the_merged_policy(lora, tmp_path):
    """The policy that a domain's steps begin with is the one before any training, if alpha is 0."""
    frozen = ["--cl_algorithm", "merge", "--merge_alpha", "0", "--warmup_learning_rate", "0.1", "--run_name", "r"]
    args = small_args(tmp_path, *frozen, *lora)
    algorithm, scores = merge.MergeCL.from_args(args), {}

    def score(trainer):
        return policy.token_logprobs(trainer.model, IDS, torch.ones_like(IDS)).detach()

    def augment_batch(new_tasks, domain):
        scores.setdefault(f"start of {domain}", score(algorithm.trainer))
        return merge.MergeCL.augment_batch(algorithm, new_tasks, domain)

    def post_step_hook(trainer, domain):
        scores[f"training of {domain}"] = score(trainer)
        merge.MergeCL.post_step_hook(algorithm, trainer, domain)

    algorithm.augment_batch, algorithm.post_step_hook = augment_batch, post_step_hook
    train.train(args, algorithm)
    torch.testing.assert_close(scores["start of telecom"], scores["start of airline"])
    for domain in ("airline", "telecom"):  # each has learnt something, which the merge then drops
        assert (scores[f"training of {domain}"] - scores["start of airline"]).abs().max() > 1e-3


def test_without_grpo_nothing_would_be_merged(tmp_path):
    with pytest.raises(ValueError, match="num_steps_per_task is 0"):
        merge.MergeCL.from_args(small_args(tmp_path, "--cl_algorithm", "merge", "--num_steps_per_task", "0"))


def test_whole_adapters_are_needed(tmp_path):
    args = small_args(tmp_path, "--cl_algorithm", "merge", "--lora_rank", "2")
    args.shard = True
    with pytest.raises(ValueError, match="merge needs whole LoRA adapters; leave out --shard"):
        merge.MergeCL.from_args(args)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, weights) of a base model and of two that are fine-tuned from it: a run's, and a LoRA adapter's."""
    folder, (model, tokenizer) = tmp_path_factory.mktemp("merge"), tiny()
    policy.save_policy(model, tokenizer, folder / "base")
    other, rng = copy.deepcopy(model), torch.Generator().manual_seed(5)
    for p in other.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=rng)
    policy.save_policy(other, tokenizer, folder / "run/checkpoints/LAST")
    (folder / "run/config.json").write_text(json.dumps({"model_name_or_path": str(folder / "base")}))
    adapted, _ = policy.load_policy(str(folder / "base"), "float32", "cpu", lora_rank=2)
    for p in policy.trained_parameters(adapted).values():
        p.data += 0.1 * torch.randn(p.shape, generator=rng)
    policy.save_policy(adapted, tokenizer, folder / "adapter/checkpoints/LAST")
    shutil.copy(folder / "run/config.json", folder / "adapter/config.json")
    return folder, model, other, adapted


def run_command(monkeypatch, capsys, *flags, code=0):
    monkeypatch.setattr("sys.argv", ["merge.py", "--runs", *map(str, flags)])
    if code:
        with pytest.raises(SystemExit) as stop:
            merge.main()
        assert stop.value.code == code
        return capsys.readouterr().err
    merge.main()
    return capsys.readouterr().out


def test_the_command_writes_a_model(saved, tmp_path, monkeypatch, capsys):
    folder, model, other, adapted = saved
    runs = [folder / "run", folder / "adapter"]
    for number, (flags, expected) in enumerate(
        [
            (["running", "--alpha", "1"], adapted),  # the last of them; its product is added to the weights
            (["running", "--alpha", "0"], model),
            (["arithmetic", "--scale", "1e-9"], model),
            (["ties", "--scale", "1e-9"], model),
        ]
    ):
        output = tmp_path / str(number)
        run_command(monkeypatch, capsys, *runs, "--method", *flags, "--output", output)
        merged, _ = policy.load_policy(str(output), "float32", "cpu")
        torch.testing.assert_close(merged(IDS).logits, expected(IDS).logits, atol=1e-5, rtol=1e-5)
        assert json.loads((output / "merge.json").read_text())["method"] == flags[0]
    output = tmp_path / "halves"
    run_command(monkeypatch, capsys, folder / "run", "--method", "running", "--output", output)  # WiSE-FT
    found = policy.load_policy(str(output), "float32", "cpu")[0].state_dict()
    close(found, merge.interpolate(model.state_dict(), other.state_dict(), 0.5))


def test_what_cannot_be_merged_is_one_line(saved, tmp_path, monkeypatch, capsys):
    folder = saved[0]
    ties = ["--method", "ties", "--output", tmp_path / "out"]

    def line(*flags):
        return run_command(monkeypatch, capsys, *flags, code=2)

    assert line(tmp_path, *ties) == f"merge.py: {tmp_path} is no directory of a run or of a model\n"
    assert "do not name one model" in line(folder / "base", *ties)
    assert "keep must be greater than 0" in line(folder / "run", *ties, "--keep", "0")
    assert f"{tmp_path} exists" in line(folder / "run", "--method", "ties", "--output", tmp_path)
    assert "there is no such directory" in line(folder / "run", *ties, "--base", "/nowhere")
    assert not (tmp_path / "out").exists()
