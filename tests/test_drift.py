"""drift.py: the divergences against float64, what is logged in the loop, and runs that it leaves as they are."""

import copy

import pytest
import torch
from law import assert_equal_runs, conversations, law_trainer, small_run, steps_of, stopper, tiny, use
from ranks import on_two_ranks
from test_checkpoint import resume, stopped_run
from test_distill import moved

import policy
import report
from drift import Drift, divergences


@pytest.mark.parametrize("chunk", [2**26, 1])
def test_divergences_are_those_of_whole_distributions(chunk, monkeypatch):
    monkeypatch.setattr(policy, "CHUNK", chunk)
    rng = torch.Generator().manual_seed(0)
    heads = [torch.nn.Linear(6, 9) for _ in range(2)]
    states = [torch.randn(4, 6, generator=rng) for _ in range(2)]
    logits = [copy.deepcopy(head).double()(state.double()) / 0.5 for head, state in zip(heads, states, strict=True)]
    p, q = (torch.distributions.Categorical(logits=each) for each in logits)
    forward, reverse = divergences(tiny()[0], states[0], heads[0], states[1], heads[1], temperature=0.5)
    kl = torch.distributions.kl_divergence
    torch.testing.assert_close(forward.double(), kl(p, q), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(reverse.double(), kl(q, p), rtol=1e-4, atol=1e-6)


def written_out(before, now, items):
    """The mean forward and reverse KL over the sampled tokens, in float64."""
    terms = []
    for t in items:
        ids = torch.tensor([t.token_ids])
        p, q = (m(ids).logits[0].double().log_softmax(-1) for m in (before, now))
        for k in [k - 1 for k, sampled in enumerate(t.action_mask) if sampled]:
            terms.append(torch.stack([(p[k].exp() * (p[k] - q[k])).sum(), (q[k].exp() * (q[k] - p[k])).sum()]))
    return torch.stack(terms).mean(0).tolist()


def measured(shard=False, model=None):
    """The drift since two policies on two domains, the second of which is trained."""
    trainer, algorithm = law_trainer(shard=shard, micro_batch_tokens=40, model=model), Drift(drift_every=1)
    use(trainer, algorithm)
    if model is None:
        other = moved(tiny()[0]).state_dict()
        algorithm.ends["airline"] = policy.snapshot_from(trainer.model, other.__getitem__)
    else:  # 1.5 times what is trained
        if "lora_A" not in str(model):
            trainer.initial = policy.snapshot(model)
        algorithm.ends["airline"] = {name: 1.5 * p for name, p in policy.snapshot(trainer.model).items()}
    trainer.domain, played = "airline", conversations()
    for domain, part in (("airline", played[:4]), ("retail", played[4:9])):
        trainer.domain, trainer.trajectories = domain, part
        for t in part:
            t.domain = domain
        trainer.custom_metrics = {}
        algorithm.post_step_hook(trainer, domain)
    return trainer.custom_metrics


def test_the_drift_is_logged_since_each_policy_on_each_domain():
    found, (model, _) = measured(), tiny()
    assert len(found) == 8
    for domain, items in (("airline", conversations()[:4]), ("retail", conversations()[4:9])):
        expected = written_out(moved(model), model, items)
        for kind, value in zip(("forward", "reverse"), expected, strict=True):
            assert found[f"drift_{kind}/airline/{domain}"] == pytest.approx(value, rel=1e-4) and value > 0.1
            assert found[f"drift_{kind}/initial/{domain}"] == pytest.approx(0.0, abs=1e-6)


def with_adapters(base, shard=False):
    """In bfloat16, with adapters that change something."""
    model, _ = policy.load_policy(base, "bfloat16", "cpu", lora_rank=2)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in policy.trained_parameters(model).items():
            p.copy_(torch.randn(p.shape, generator=rng) if "lora_B" in name else p)
    return measured(shard, model)


def measured_on_a_rank(base):
    return [[measured(), measured(shard=True)], [with_adapters(base), with_adapters(base, shard=True)]]


def test_ranks_and_shards_do_not_matter(tmp_path):
    base = str(tmp_path / "base")
    policy.save_policy(*tiny(), base)
    whole, adapted = measured(), with_adapters(base)
    assert min(adapted.values()) > 1e-3 and len(adapted) == 8
    for plain, lora in on_two_ranks(measured_on_a_rank, tmp_path, base):
        assert plain == [pytest.approx(whole, rel=1e-4, abs=1e-6)] * 2
        assert lora == [pytest.approx(adapted, rel=0.05)] * 2


def test_weights_in_float32_that_are_computed_with_in_bfloat16():
    """The types of a real model without adapters."""
    exact, found = (measured(model=policy.load_policy("tiny", dtype, "cpu")[0]) for dtype in ("float32", "bfloat16"))
    assert found == pytest.approx(exact, rel=0.1, abs=1e-3) and max(exact.values()) > 0.05


def test_a_run_is_the_same_with_and_without(tmp_path):
    flags = ["--cl_algorithm", "replay", "--replay_ratio", "0.5"]
    small_run(tmp_path, *flags, "--run_name", "without")
    small_run(tmp_path, *flags, "--run_name", "with", "--drift_every", "1")
    files = [tmp_path / run / "checkpoints" / "LAST" / "model.safetensors" for run in ("without", "with")]
    assert files[0].read_bytes() == files[1].read_bytes()
    steps = [{n for n in s if n.startswith("drift")} for s in steps_of(tmp_path / "with")]
    assert [len(names) for names in steps] == [2, 2, 8, 8]  # one policy, one domain; two and two
    ends = [r for r in report.read_jsonl(tmp_path / "with" / "metrics.jsonl") if r["kind"] == "transfer"]
    assert ends[1]["drift_forward/initial/airline"] > 0 < ends[1]["drift_reverse/airline/telecom"]
    assert not any(n.startswith("drift") for s in steps_of(tmp_path / "without") for n in s)


def test_a_stopped_run_with_adapters_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    """The policy before any training is the model without its adapters."""
    flags = [*stopper(tmp_path, "distill", "DistillationCL"), "--lora_rank", "2", "--drift_every", "2"]
    small_run(tmp_path, *flags, "--run_name", "whole")
    folder = stopped_run(tmp_path, monkeypatch, *flags, step=2)
    resume(folder)
    assert_equal_runs(tmp_path / "whole", folder)
    assert all(s["drift_forward/initial/airline"] > 0 for s in steps_of(folder)[1::2])
