"""generative.py: the formulas against hand computations, the rule of rehearsal, privacy, and the experiment."""

import copy
import csv
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from privacy import reachable, runs_in
from torch import nn

import generative
import grpo
from generative import (
    VAE,
    Args,
    ConvVAE,
    GenerativeReplay,
    GenerativeReplayCL,
    Heads,
    TokenVAE,
    distillation_loss,
    elbo_loss,
    replay_weights,
)

ROOT = Path(__file__).resolve().parent.parent

# ------------------------------------------------------------------------------------------ the formulas


def test_weights_give_every_task_the_same_share():
    assert [replay_weights(n) for n in (1, 2, 5)] == [(1.0, 0.0), (0.5, 0.5), (0.2, 0.8)]
    with pytest.raises(ValueError, match="from 1, got 0"):
        replay_weights(0)


def test_elbo_is_the_hand_computed_one():
    rng = np.random.default_rng(0)
    x, r = rng.uniform(0.05, 0.95, (2, 3, 7))
    mu, logvar = rng.normal(size=(2, 3, 4))
    total = 0.0
    for b in range(3):
        total -= sum(x[b, i] * math.log(r[b, i]) + (1 - x[b, i]) * math.log(1 - r[b, i]) for i in range(7))
        for k in range(4):  # KL of two normal distributions with variances exp(logvar) and 1
            total += 0.5 * (math.exp(logvar[b, k]) + mu[b, k] ** 2 - 1 - logvar[b, k])
    assert elbo_loss(*map(torch.from_numpy, (x, r, mu, logvar))).item() == pytest.approx(total / 3, rel=1e-12)


@pytest.mark.parametrize("wrong", [1.5, -0.1, math.nan])
def test_a_bernoulli_likelihood_takes_values_in_0_to_1_only(wrong):
    x = torch.full((2, 3), 0.5)
    x[1, 2] = wrong
    with pytest.raises(ValueError, match=f"got {'nan' if wrong != wrong else wrong}"):
        elbo_loss(x, torch.full((2, 3), 0.5), torch.zeros(2, 1), torch.zeros(2, 1))


def test_samples_of_the_posterior_carry_its_gradient():
    """z = mu + exp(logvar / 2) * noise: by finite differences with the same noise."""
    vae = VAE(5, (6,), 2, dropout=0.0).double()
    x = torch.rand(4, 5, dtype=torch.float64)

    def loss():
        torch.manual_seed(3)
        return elbo_loss(x, *vae(x))

    loss().backward()
    for layer in (vae.mu, vae.logvar):
        gradient, eps = layer.bias.grad.clone(), 1e-6
        for k in range(2):
            with torch.no_grad():
                layer.bias[k] += eps
                high = loss().item()
                layer.bias[k] -= 2 * eps
                low = loss().item()
                layer.bias[k] += eps
            assert gradient[k].item() == pytest.approx((high - low) / (2 * eps), rel=1e-5)
    torch.manual_seed(3)
    mu, logvar = vae.encode(x)
    z = mu + logvar.exp().sqrt() * torch.randn_like(mu)
    torch.manual_seed(3)
    torch.testing.assert_close(vae(x)[0], vae.decode(z))


def test_distillation_is_cross_entropy_to_the_softened_teacher():
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(6, 5)), rng.normal(size=(6, 3))
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p = np.exp(t / 2) / np.exp(t / 2).sum()
        q = np.exp(s / 2) / np.exp(s / 2).sum()
        total -= sum(p[k] * math.log(q[k]) for k in range(3))  # the two new classes have target 0
    loss = distillation_loss(torch.from_numpy(student), torch.from_numpy(teacher), 2.0)
    assert loss.item() == pytest.approx(4 * total / 6, rel=1e-12)
    same = torch.from_numpy(teacher).requires_grad_()
    distillation_loss(same, torch.from_numpy(teacher), 2.0).backward()
    assert same.grad.abs().max() < 1e-12


# ---------------------------------------------------------------------------------------- the generators

MAKE = {
    "vae": lambda conditions: VAE(64, (32,), 8, 0.1, conditions),
    "conv": lambda conditions: ConvVAE((1, 8, 8), (4, 8), 8, conditions),
    "gan": lambda conditions: generative.WGAN(64, (32,), 8, conditions),
}


@pytest.mark.parametrize("conditions", [0, 3])
@pytest.mark.parametrize("kind", MAKE)
def test_generators_share_an_interface(kind, conditions):
    generator = MAKE[kind](conditions)
    condition = torch.tensor([0, 1, 2, 0]) if conditions else None
    x = generator.generate(4, condition=condition)
    assert x.shape == (4, 64) and x.min() >= 0 and x.max() <= 1 and not x.requires_grad
    before = [p.clone() for p in generator.parameters()]
    loss = generator.learn(generator.optimizers(1e-3), [(0.5, torch.rand(4, 64), condition), (0.5, x, condition)])
    assert math.isfinite(loss)
    changed = [not torch.equal(a, b) for a, b in zip(before, generator.parameters(), strict=True)]
    assert all(changed) or (
        kind == "gan" and sum(changed) >= len(changed) - 1
    )  # the critic's last bias has no gradient
    if conditions:
        with pytest.raises(ValueError, match="3 conditions"):
            generator.generate(4)


@pytest.mark.parametrize("kind", MAKE)
def test_a_generator_learns_its_data_by_condition(kind):
    """Left half bright under condition 0, right half under 1."""
    torch.manual_seed(0)
    generator = MAKE[kind](2)
    optimizers = generator.optimizers(2e-3)
    for _ in range(1000 if kind == "gan" else 300):
        condition = torch.randint(2, (32,))
        x = torch.full((32, 8, 8), 0.1)
        x[:, :, :4] += 0.7 * (condition == 0)[:, None, None]
        x[:, :, 4:] += 0.7 * (condition == 1)[:, None, None]
        generator.learn(optimizers, [(1.0, x.flatten(1), condition)])
    made = generator.generate(100, condition=torch.arange(100) % 2).unflatten(1, (8, 8))
    left, right = made[..., :4].mean((1, 2)), made[..., 4:].mean((1, 2))
    assert ((left > right) == (torch.arange(100) % 2 == 0)).float().mean() > 0.95


def as_latents(monkeypatch, generator, number, condition=None):
    """What `generate` decodes."""
    monkeypatch.setattr(type(generator), "decode", lambda self, z, condition: z)
    return generator.generate(number, condition=condition)


def test_before_any_fit_the_prior_is_standard_normal(monkeypatch):
    torch.manual_seed(0)
    z = as_latents(monkeypatch, VAE(64, (32,), 3, components=4), 20000)
    assert z.mean(0).abs().max() < 0.03 and (z.std(0) - 1).abs().max() < 0.03


def test_a_mixture_is_found_again():
    torch.manual_seed(0)
    centre = torch.tensor([[-4.0, 0.0], [4.0, 4.0]])
    which = torch.arange(4000) % 4 // 3  # a quarter in the second
    weights, means, stds = generative.gaussian_mixture(
        centre[which] + torch.tensor([0.5, 1.5]) * torch.randn(4000, 2), 2
    )
    order = weights.argsort(descending=True)
    assert torch.allclose(weights[order], torch.tensor([0.75, 0.25]), atol=0.01)
    assert torch.allclose(means[order], centre, atol=0.15)
    assert torch.allclose(stds[order], torch.tensor([0.5, 1.5]).expand(2, 2), atol=0.1)


@pytest.mark.parametrize("points, fitted", [(1, 1), (9, 1), (39, 3), (100, 4)])
def test_no_gaussian_is_fitted_to_fewer_than_ten_points(points, fitted):
    weights, means, stds = generative.gaussian_mixture(torch.randn(points, 3), 4)
    assert weights.shape == (4,) and means.shape == stds.shape == (4, 3)
    assert (weights > 0).sum() == fitted and weights.sum().item() == pytest.approx(1, abs=1e-5)


def test_samples_have_the_law_of_the_latents_of_their_condition(monkeypatch):
    """Mean and covariance of what is decoded, per condition, against those of what `fit_prior` was shown."""
    torch.manual_seed(0)
    generator = VAE(64, (32,), 2, dropout=0.9, num_conditions=3, components=6)
    shown = {0: torch.randn(6000, 2) + 3, 2: torch.cat([torch.randn(3000, 2) - 5, 0.2 * torch.randn(3000, 2) + 5])}
    monkeypatch.setattr(
        VAE, "latent", lambda self, x, condition: (x, None, None) if not self.training else pytest.fail("with dropout")
    )
    generator.fit_prior(
        (z[part], torch.full((3000,), c)) for c, z in shown.items() for part in (slice(3000), slice(3000, None))
    )
    assert generator.training
    for c, z in shown.items():
        made = as_latents(monkeypatch, generator, 20000, torch.full((20000,), c))
        assert (made.mean(0) - z.mean(0)).abs().max() < 0.15
        assert (made.T.cov() - z.T.cov()).abs().max() < 0.05 * z.T.cov().abs().max() + 0.05
    other = as_latents(monkeypatch, generator, 20000, torch.ones(20000, dtype=torch.long))
    assert other.mean(0).abs().max() < 0.05 and (other.std(0) - 1).abs().max() < 0.05  # was not shown: as before
    copied = VAE(64, (32,), 2, num_conditions=3, components=6)
    copied.load_state_dict(generator.state_dict())
    torch.manual_seed(1)
    made = as_latents(monkeypatch, generator, 5, torch.full((5,), 2))
    torch.manual_seed(1)
    assert torch.equal(as_latents(monkeypatch, copied, 5, torch.full((5,), 2)), made)


def test_the_prior_is_fitted_to_as_much_of_each_task():
    """At a task's end, before what was stored of it is dropped; of earlier tasks, to what the old generator makes."""
    replayer = rehearsal(conditions=6, components=2)
    fitted = []
    replayer.generator.fit_prior = lambda batches: fitted.append(list(batches))
    learn(replayer, 0, 1, 2, conditional=True)
    assert len(fitted) == 3
    for n, batches in enumerate(fitted, 1):
        x, condition = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert torch.bincount(condition, minlength=6).tolist() == [10] * 2 * n + [0] * (6 - 2 * n)
        assert torch.allclose(x[:20].sum(0), task(n - 1)[0].sum(0))


def test_the_parts_of_a_generators_loss_are_weighted():
    """A part of weight 0 changes nothing; two halves of the same batch are the whole."""
    x, steps = torch.rand(8, 64), []
    for parts in ([(1.0, x, None)], [(1.0, x, None), (0.0, torch.rand(8, 64), None)]):
        torch.manual_seed(0)
        vae = VAE(64, (16,), 4, dropout=0.0)
        torch.manual_seed(1)
        vae.learn([torch.optim.SGD(vae.parameters(), 0.01)], parts)
        steps.append(torch.cat([p.detach().flatten() for p in vae.parameters()]))
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: VAE(4, latent_dim=0), "latent_dim must be at least 1, got 0"),
        (lambda: ConvVAE((1, 8, 8), latent_dim=0), "latent_dim"),
        (lambda: ConvVAE((1, 9, 8)), "multiples of 4"),
        (lambda: generative.WGAN(4, latent_dim=0), "latent_dim"),
        (lambda: generative.make_generator("flow", 4), "unknown generator type 'flow'; choose one of vae, conv, gan"),
        (lambda: generative.make_generator("conv", 60, (1, 8, 8), latent_dim=2), "does not fit inputs of 60"),
        (lambda: VAE(4)(torch.rand(2, 5)), r"must have the shape \(B, 4\), got \(2, 5\)"),
        (lambda: rehearsal().generated(3), "before the first task has ended"),
        (lambda: rehearsal(targets="firm"), "unknown targets 'firm'"),
        (lambda: rehearsal(generator_update_freq=0), "generator_update_freq must be at least 1, got 0"),
        (lambda: rehearsal(memory_size=0), "memory_size must be at least 1, got 0"),
        (lambda: rehearsal(replay_weight=-1.0), "replay_weight must be greater than 0, got -1.0"),
        (lambda: rehearsal(replay_weight=math.nan), "replay_weight must be greater than 0, got nan"),
        (lambda: rehearsal(temperature=0.0), "temperature must be greater than 0, got 0.0"),
        (lambda: rehearsal(generator_learning_rate=0.0), "generator_learning_rate must be greater than 0"),
        (lambda: VAE(4, components=-1), "components must be at least 0, got -1"),
        (lambda: VAE(4, num_conditions=-1), "num_conditions must be at least 0, got -1"),
        (lambda: VAE(4, num_conditions=3).generate(2), "3 conditions: name one"),
        (lambda: rehearsal().begin_task(torch.rand(2, 60)), r"shape \(B, 64\), got \(2, 60\)"),
        (lambda: rehearsal().begin_task(torch.full((2, 64), 7.0)), r"in \[0, 1\], got 7.0"),
        (lambda: rehearsal().step(torch.full((2, 64), math.nan), torch.zeros(2).long()), r"in \[0, 1\], got nan"),
        (lambda: rehearsal().teach_generator(2), "no sample of the current task"),
        (lambda: rehearsal().end_task(), "no update in this task: call begin_task"),
        (lambda: learn(rehearsal(generator_update_freq=4), 0), "at least generator_update_freq = 4 times"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------------------------------ the rehearsal


def rehearsal(conditions=0, scenario="class", components=0, **settings):
    torch.manual_seed(0)
    heads = Heads(scenario, 3, 2)
    solver = nn.Sequential(nn.Linear(64, 16), nn.Dropout(0.5), nn.Linear(16, heads.outputs))
    settings = {"generator_update_freq": 1, "batch_size": 8, **settings}
    return GenerativeReplay(solver, VAE(64, (16,), 4, 0.1, conditions, components), heads, **settings)


def task(k, n=20):
    rng = torch.Generator().manual_seed(k)
    return torch.rand(n, 64, generator=rng), torch.arange(n) % 2 + 2 * k


def learn(replayer, *tasks, steps=3, conditional=False):
    for k in tasks:
        x, y = task(k)
        replayer.begin_task(x, y if conditional else None)
        for _ in range(steps):
            replayer.step(x[:8], y[:8])
        replayer.end_task()


def test_solver_and_generator_learn_from_the_same_generated_batch_with_the_same_weights(monkeypatch):
    replayer = rehearsal(generator_update_freq=2)
    learn(replayer, 0, 1)
    labelled, taught = [], []
    monkeypatch.setattr(replayer, "replay_loss", lambda x, n: labelled.append(x) or torch.zeros((), requires_grad=True))
    monkeypatch.setattr(replayer.generator, "learn", lambda optimizers, parts: taught.append(parts) or 0.0)
    x, y = task(2)
    replayer.begin_task(x)
    for _ in range(4):
        replayer.step(x[:8], y[:8])
    assert len(labelled) == 4 and len(taught) == 2  # generator_update_freq
    for parts in taught:
        assert [weight for weight, _, _ in parts] == list(replay_weights(3))
        assert any(parts[1][1] is batch for batch in labelled)
        assert all((image == x).all(1).any() for image in parts[0][1])  # from the memory of the current task


@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_the_solvers_step_is_the_formula(targets):
    replayer = rehearsal(targets=targets, replay_weight=0.7)
    learn(replayer, 0)
    replayer.solver.eval()  # no dropout, so that it can be computed again
    x, y = task(1)
    replayer.begin_task(x)
    generated = replayer.old_generator.generate(8)
    replayer.generated = lambda number: (generated, None)
    student, teacher = replayer.solver(generated).double(), replayer.teacher(generated).double()
    old = 0.0
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        if targets == "hard":
            label = 0 if t[0] > t[1] else 1
            old -= s[label] - math.log(sum(math.exp(v) for v in s[:4]))
        else:
            p = np.exp(np.array(t[:2]) / 2) / np.exp(np.array(t[:2]) / 2).sum()
            log_q = np.array(s[:4]) / 2 - math.log(sum(math.exp(v / 2) for v in s[:4]))
            old -= 4 * (p * log_q[:2]).sum()
    logits = replayer.solver(x[:8])[:, :4].double().tolist()
    new = -sum(v[k] - math.log(sum(map(math.exp, v))) for v, k in zip(logits, y[:8].tolist(), strict=True))
    losses = replayer.step(x[:8], y[:8])
    assert losses["solver"] == pytest.approx(0.5 * new / 8 + 0.7 * 0.5 * old / 8, rel=1e-5)


def test_teacher_and_generator_are_frozen_at_the_tasks_end():
    replayer = rehearsal()
    learn(replayer, 0)
    modules = (replayer.teacher, replayer.old_generator)
    before = [p.clone() for module in modules for p in module.parameters()]
    x, y = task(1)
    replayer.begin_task(x)
    for _ in range(5):
        replayer.step(x[:8], y[:8])
    assert (replayer.teacher, replayer.old_generator) == modules
    after = [p for module in modules for p in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(p.requires_grad or p.grad is not None for p in after)
    assert not any(module.training for top in modules for module in top.modules())
    assert any(
        not torch.equal(a, b) for a, b in zip(replayer.solver.parameters(), replayer.teacher.parameters(), strict=True)
    )
    replayer.end_task()
    assert replayer.teacher is not modules[0]
    for a, b in zip(replayer.solver.parameters(), replayer.teacher.parameters(), strict=True):
        assert torch.equal(a, b)


def holds(root, samples):
    tensors = [t.detach().flatten() for t in reachable(root) if isinstance(t, torch.Tensor)]
    numbers = torch.cat([t.float() for t in tensors if t.numel()])
    return [bool(torch.isin(sample, numbers).all()) for sample in samples]


def test_no_raw_sample_of_a_finished_task_is_kept():
    replayer = rehearsal(conditions=6, components=10)
    x, y = task(0)
    replayer.begin_task(x, y)
    replayer.step(x[:8], y[:8])
    assert all(holds(replayer, x))  # what is looked for would be found
    replayer.end_task()
    assert not any(holds(replayer, x))
    learn(replayer, 1, conditional=True)
    assert not any(holds(replayer, torch.cat([x, task(1)[0]])))


def test_conditions_are_drawn_evenly_over_those_seen():
    replayer = rehearsal(conditions=6)
    learn(replayer, 0, 1, conditional=True)
    _, condition = replayer.generated(400)
    assert torch.bincount(condition, minlength=6).tolist() == [100, 100, 100, 100, 0, 0]
    counts = sum(torch.bincount(replayer.generated(6)[1], minlength=6) for _ in range(400))
    assert counts[4:].sum() == 0 and (counts[:4] - 600).abs().max() < 60  # not always the same ones twice


def test_conditions_that_were_never_seen_are_not_drawn():
    replayer = rehearsal(conditions=6, scenario="domain")
    for k in (2, 0):
        x, y = task(k)
        replayer.begin_task(x, y)
        replayer.step(x[:8], y[:8])
        replayer.end_task()
    assert replayer.old_conditions == [0, 1, 4, 5]
    assert torch.bincount(replayer.generated(40)[1], minlength=6).tolist() == [10, 10, 0, 0, 10, 10]


def test_a_solver_comes_back_from_a_checkpoint_and_goes_on_the_same():
    replayer = rehearsal(conditions=6, components=2, generator_update_freq=2)
    learn(replayer, 0, conditional=True)
    x, y = task(1)
    replayer.begin_task(x, y)
    for _ in range(3):  # between two updates of the generator
        replayer.step(x[:8], y[:8])
    state, tensors = json.loads(json.dumps(replayer.state_dict())), replayer.tensors()
    other = rehearsal(conditions=6, components=2, generator_update_freq=2)
    other.load_state_dict(state)
    other.load_tensors({name: tensor.clone() for name, tensor in tensors.items()})
    for each in (replayer, other):
        torch.manual_seed(3)
        for _ in range(3):
            each.step(x[:8], y[:8])
        each.end_task()
    mine, theirs = replayer.tensors(), other.tensors()
    assert set(mine) == set(theirs) and all(torch.equal(mine[name], theirs[name]) for name in mine)
    for name in ("generator.mu.weight", "teacher.0.weight", "memory.x"):
        with pytest.raises(ValueError, match=name.rsplit(".", 1)[0]):
            third = rehearsal(conditions=6, components=2)
            third.load_state_dict(state)
            third.load_tensors({k: v for k, v in tensors.items() if k != name})


def test_nothing_of_a_task_is_left_in_gradients_or_moments():
    """A unit that is active for one sample only has it as its gradient."""
    replayer = rehearsal(conditions=6)
    learn(replayer, 0, conditional=True)
    modules = [replayer.generator, replayer.solver]
    assert not any(p.grad is not None for module in modules for p in module.parameters())
    assert not replayer.generator_optimizers[0].state


def test_the_memory_is_a_reservoir_of_the_current_task():
    replayer = rehearsal(memory_size=5)
    replayer.begin_task(task(0)[0])
    assert len(replayer.memory.items) == 5 and replayer.memory.seen == 20
    replayer.step(*(part[:8] for part in task(0)))
    replayer.end_task()
    assert replayer.memory.items == [] and replayer.memory.seen == 0 and replayer.memory.capacity == 5


# ------------------------------------------------------------------------------------------ on the agent


def agent(**settings):
    return GenerativeReplayCL(
        ["airline", "retail"], **{"window": 4, "window_memory": 20, "window_batch": 6, **settings}
    )


def test_a_token_vae_minimises_the_negative_elbo_of_a_categorical_likelihood():
    vae = TokenVAE(9, window=3, width=4, hidden_dims=(5,), latent_dim=2, num_conditions=2).double()
    vae.used.fill_(7)
    x, condition = torch.tensor([[1, 6, 0], [2, 2, 5]]), torch.tensor([0, 1])
    torch.manual_seed(4)
    loss = vae.loss(x, condition)
    torch.manual_seed(4)
    logits, mu, logvar = vae(x, condition)
    assert logits.shape == (2, 3, 7)
    total = 0.0
    for b in range(2):
        for t in range(3):
            row = logits[b, t].tolist()
            total -= row[x[b, t]] - math.log(sum(map(math.exp, row)))
        for m, v in zip(mu[b].tolist(), logvar[b].tolist(), strict=True):
            total += 0.5 * (math.exp(v) + m**2 - 1 - v)
    assert loss.item() == pytest.approx(total / 2, rel=1e-12)
    with pytest.raises(ValueError, match=r"shape \(B, 3\), got \(2, 4\)"):
        vae.loss(torch.ones(2, 4, dtype=torch.long), condition)


def test_behind_its_end_a_generated_window_is_empty(monkeypatch):
    made = torch.tensor([[2, 0, 3, 1], [1, 1, 1, 0], [0, 1, 2, 3]])
    vae = TokenVAE(5, window=4, width=4, hidden_dims=(5,), latent_dim=2)
    monkeypatch.setattr(TokenVAE, "decode", lambda self, z, condition: nn.functional.one_hot(made))
    assert vae.generate(3).tolist() == [[2, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]


def test_a_token_vae_learns_what_belongs_to_its_condition():
    torch.manual_seed(0)
    windows = torch.randint(1, 40, (6, 8))
    conditions = torch.tensor([0, 0, 0, 1, 1, 1])
    vae = TokenVAE(40, window=8, width=16, hidden_dims=(64,), latent_dim=4, num_conditions=2)
    vae.used.fill_(40)
    optimizers = vae.optimizers(3e-3)
    for _ in range(400):
        vae.learn(optimizers, [(1.0, windows, conditions)])
    made = vae.generate(200, condition=torch.arange(200) % 2)
    hits = (made[:, None] == windows).float().mean(2)  # (200, 6)
    nearest = hits.argmax(1)
    assert (conditions[nearest] == torch.arange(200) % 2).float().mean() > 0.95
    assert hits.max(1).values.mean() > 0.8 and len(nearest.unique()) == 6


def test_conversations_are_cut_into_windows_and_back():
    algorithm = agent(generator_vocabulary=8)
    algorithm.number([[100, 14, 14, 61, 40], [61, 181]])
    assert algorithm.symbols == [0, 14, 40, 61, 100, 181]  # sorted: the order of the conversation is not kept
    algorithm.number([[2, 4, 6, 14]])
    assert algorithm.symbols == [0, 14, 40, 61, 100, 181, 2, 4]  # no room for 6
    assert algorithm.rehearsal.generator.used == 8
    windows = torch.stack(algorithm.as_windows([100, 14, 14, 61, 40, 6, 181, 61, 4, 2]))
    assert windows.tolist() == [[4, 1, 1, 3], [2, 0, 0, 0], [7, 6, 0, 0]]
    ids, mask, sampled = algorithm.as_tokens(torch.tensor([[4, 1, 0, 3], [6, 3, 5, 2]]))
    assert ids.tolist() == [[50, 7, 0, 0], [1, 30, 90, 20]]
    assert mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]] and sampled.tolist() == [[0, 0, 0, 0], [0, 1, 1, 0]]


def test_generated_windows_can_be_read(monkeypatch):
    algorithm = agent(generator_vocabulary=8)
    algorithm.number([[100, 14, 61, 40]])  # tokens 7, 20, 30 (sampled), 50
    for condition in (1, 0):
        algorithm.rehearsal.offer(torch.tensor([1, 2, 3, 4]), condition)
    algorithm.rehearsal.end_task()
    made = [torch.tensor([[4, 3, 3, 1], [2, 0, 4, 4]]), torch.tensor([[3, 0, 0, 0], [0, 0, 0, 0]])]
    monkeypatch.setattr(TokenVAE, "generate", lambda self, number, condition: made[condition[0]])
    expected = "[airline] (50)<<(30)(30)>>(7)\n\n[airline] (20)\n\n[retail] <<(30)>>\n\n[retail] \n"
    assert algorithm.show_windows(FakeTrainer(None)) == expected


@pytest.fixture(scope="module")
def policies():
    """A policy, and another one with the same tokenizer."""
    return [grpo.load_policy("tiny", "float32", "cpu", seed=seed)[0] for seed in (0, 1)]


class FakeTrainer:
    """What the hooks look at."""

    def __init__(self, model, domain="airline", conversations=()):
        self.model, self.domain = model, domain
        turns = [-1, 0, 0] * 10
        items = [{"domain": domain, "token_ids": ids, "turns": turns[: len(ids)]} for ids in conversations]
        self.finished = [(item, 0.0) for item in items]
        self.run = Path(tempfile.mkdtemp())
        self.tokenizer = self

    @staticmethod
    def decode(ids):
        return "".join(f"({token})" for token in ids)


def conversations(seed):
    return torch.randint(3, 60, (12, 16), generator=torch.Generator().manual_seed(seed)).tolist()


def as_symbols(ids):
    return [2 * token + (k % 3 > 0) for k, token in enumerate(ids)]


def trained_agent(policies, **settings):
    algorithm = agent(**settings)
    trainer = FakeTrainer(policies[0], conversations=conversations(0))
    assert algorithm.extra_loss(trainer) is None
    algorithm.post_step_hook(trainer, "airline")
    algorithm.post_task_hook(trainer, "airline")
    return algorithm


def learnt(parts):
    """The value of a loss that comes in parts, each of which adds its gradient."""
    total = 0.0
    for part in parts:
        part.backward()
        total += part.item()
    return total


def test_the_policy_is_held_to_the_frozen_ones_distributions(policies, monkeypatch):
    """The loss and its gradient against whole log-softmaxes of two models, in float64."""
    algorithm = trained_agent(policies, replay_weight=0.6)
    frozen_weights = [p.clone() for p in policies[0].parameters()]
    learner = copy.deepcopy(policies[1])
    sampled = [k for k, symbol in enumerate(algorithm.symbols) if symbol % 2]
    read = [k for k, symbol in enumerate(algorithm.symbols) if k and symbol % 2 == 0]
    rows = [[read[0], sampled[3], sampled[1], read[2]], [sampled[4], sampled[0], 0, read[1]], [0, 1, 2, 3]]
    counted = [[1, 2], [1]]  # of each row: those that were sampled, without a first token and what is behind the end
    monkeypatch.setattr(algorithm.rehearsal, "generated", lambda number: (torch.tensor(rows), torch.tensor([0, 0, 0])))
    for chunk, at_once in ((2**26, 3), (1, 3), (2**26, 1)):  # whole; one distribution, one window at a time
        monkeypatch.setattr(grpo, "CHUNK", chunk)
        algorithm.windows_at_once = at_once
        learner.zero_grad()
        loss = learnt(algorithm.extra_loss(FakeTrainer(learner, "retail")))
        teacher, student = copy.deepcopy(policies[0]).double(), copy.deepcopy(learner).double()
        student.zero_grad()
        total = 0.0
        for row, places in zip(rows[:2], counted, strict=True):
            ids = torch.tensor([[algorithm.symbols[k] // 2 for k in row[: row.index(0) if 0 in row else None]]])
            for place in places:
                p = teacher(ids).logits[0, place - 1].softmax(-1)
                log_q = student(ids).logits[0, place - 1].log_softmax(-1)
                total = total + (p * (p.log() - log_q)).sum()
        expected = 0.6 * 0.5 * total / 3
        expected.backward()
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for mine, other in zip(learner.parameters(), student.parameters(), strict=True):
            torch.testing.assert_close(mine.grad.double(), other.grad, rtol=1e-3, atol=1e-7)
    for now, before in zip(policies[0].parameters(), frozen_weights, strict=True):
        assert torch.equal(now, before)
    for now, before in zip(learner.parameters(), policies[1].parameters(), strict=True):
        assert torch.equal(now, before)  # the teacher's weights were in it only for its forward pass
    statistics = algorithm.get_statistics()
    assert statistics["windows generated"] == {"airline": 9, "retail": 0}
    assert statistics["distillation KL"]["retail"] == pytest.approx(loss / 0.6 / 0.5, rel=1e-3)


def test_windows_in_which_the_policy_samples_nothing_give_no_gradient(policies, monkeypatch):
    algorithm = trained_agent(policies)
    windows = torch.zeros(2, 4, dtype=torch.long)
    monkeypatch.setattr(algorithm.rehearsal, "generated", lambda number: (windows, torch.tensor([0, 0])))
    loss = learnt(algorithm.extra_loss(FakeTrainer(policies[1], "retail")))
    assert loss == 0 and not any(p.grad.any() for p in policies[1].parameters() if p.grad is not None)


def test_the_generator_of_the_agent_is_rehearsed_and_keeps_no_conversation(policies, monkeypatch):
    algorithm = agent()
    first, second = conversations(0), [[60 + token for token in ids] for ids in conversations(1)]
    trainer = FakeTrainer(policies[0], conversations=first)
    algorithm.post_step_hook(trainer, "airline")
    windows = torch.cat([torch.stack(algorithm.as_windows(as_symbols(ids))) for ids in first])
    assert algorithm.rehearsal.memory.seen == 12 * 4 and len(algorithm.rehearsal.memory.items) == 20
    raw = [way[k : k + 4] for ids in first for way in (ids, as_symbols(ids)) for k in range(len(ids) - 3)]
    assert runs_in(algorithm, windows.tolist()) >= 20 and runs_in(first, raw) > 100
    algorithm.post_task_hook(trainer, "airline")
    shown = (trainer.run / "generated_after_airline.txt").read_text()
    assert shown.count("[airline]") == 3 and "[retail]" not in shown
    for held in (algorithm, algorithm.state_dict(), algorithm.rehearsal.tensors()):
        assert runs_in(held, windows.tolist()) == runs_in(held, raw) == 0
    taught = []
    learn = algorithm.rehearsal.generator.learn
    monkeypatch.setattr(
        algorithm.rehearsal.generator, "learn", lambda o, parts: taught.append(parts) or learn(o, parts)
    )
    trainer = FakeTrainer(policies[0], "retail", second)
    algorithm.post_step_hook(trainer, "retail")
    assert len(taught) == algorithm.generator_updates
    offered = {tuple(w.tolist()) for ids in second for w in algorithm.as_windows(as_symbols(ids))}
    for (new, x, condition), (old, _, old_condition) in taught:
        assert (new, old) == (0.5, 0.5) and set(condition.tolist()) == {1} and set(old_condition.tolist()) == {0}
        assert all(tuple(window) in offered for window in x.tolist())
    algorithm.post_task_hook(trainer, "retail")
    statistics = algorithm.get_statistics()
    assert statistics["bytes of the windows dropped"] == 2 * 20 * 4 * 4
    assert statistics["bytes kept"]["frozen policy"] == sum(p.nbytes for p in policies[0].parameters())
    assert algorithm.bytes_kept() == sum(statistics["bytes kept"].values()) > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_domain_without_conversations_is_passed_over(policies, ranks, monkeypatch):
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, source: None)  # of two equal ranks
    monkeypatch.setattr(grpo, "all_gather_json", lambda value: [value] * ranks)
    monkeypatch.setattr(grpo, "world_size", lambda: ranks)
    algorithm = agent()
    for domain, found in (("airline", []), ("retail", conversations(0))):
        trainer = FakeTrainer(policies[0], domain, found)
        assert algorithm.extra_loss(trainer) is None
        algorithm.post_step_hook(trainer, domain)
        algorithm.post_task_hook(trainer, domain)
    assert algorithm.rehearsal.tasks_done == 1 and algorithm.rehearsal.old_conditions == [1]
    learnt(algorithm.extra_loss(trainer))
    generated = algorithm.get_statistics()["windows generated"]
    assert generated["airline"] == 0 < generated["retail"]


def test_statistics_say_how_much_is_copied_and_what_found_no_room(policies):
    torch.manual_seed(0)
    algorithm = agent(generator_updates=300, generator_vocabulary=20)
    same = [[5, 6, 7, 8]] * 12
    trainer = FakeTrainer(policies[0], conversations=same)
    algorithm.post_step_hook(trainer, "airline")
    algorithm.post_task_hook(trainer, "airline")
    statistics = algorithm.get_statistics()
    assert statistics["equal to the nearest real window"]["airline"] == 1.0  # there was one to learn
    assert statistics["cut for lack of vocabulary"]["airline"] == 0.0
    trainer = FakeTrainer(policies[0], "retail", conversations(0))
    algorithm.post_step_hook(trainer, "retail")
    assert algorithm.get_statistics()["cut for lack of vocabulary"]["retail"] > 0.9
    assert all(window.any() for window, _ in algorithm.rehearsal.memory.items)
    raw = torch.tensor([[1, 2, 3, 4], [1, 2, 0, 0]])
    made = torch.tensor([[1, 2, 9, 9], [9, 2, 3, 4], [1, 2, 0, 0], [0, 0, 0, 0]])
    algorithm.rehearsal.old_generator.generate = lambda number, condition: made
    assert algorithm.likeness(raw, "airline", 4) == pytest.approx((0.5 + 0.75 + 1 + 0) / 4)


def test_generators_and_moments_move_together(policies):
    """As after a resumed run's load, on the CPU; "meta" stands for a GPU."""
    algorithm = trained_agent(policies)
    algorithm.post_step_hook(FakeTrainer(policies[0], "retail", conversations(1)), "retail")
    rehearsal = algorithm.rehearsal
    rehearsal.to(torch.device("meta"))
    moments = [
        m for state in rehearsal.generator_optimizers[0].state.values() for m in (state["exp_avg"], state["step"])
    ]
    tensors = [*rehearsal.generator.state_dict().values(), *rehearsal.old_generator.state_dict().values(), *moments]
    assert len(moments) > 10 and all(t.device.type == "meta" for t in tensors)


@pytest.mark.parametrize("hook", ["post_step_hook", "post_task_hook", "extra_loss"])
def test_every_hook_moves_the_generator_first(policies, monkeypatch, hook):
    """After a load it is on the CPU, and any of them may be the next."""
    algorithm = trained_agent(policies)
    calls = []
    monkeypatch.setattr(algorithm.rehearsal, "to", lambda device: calls.append(device))
    for name in ("offer", "end_task", "generated"):
        original = getattr(algorithm.rehearsal, name)
        monkeypatch.setattr(algorithm.rehearsal, name, lambda *a, f=original: calls.append("used") or f(*a))
    trainer = FakeTrainer(policies[0], "retail", conversations(1))
    getattr(algorithm, hook)(trainer, *([] if hook == "extra_loss" else ["retail"]))
    assert calls[0] == policies[0].device and "used" in calls


def test_the_agents_generator_comes_back_from_a_checkpoint(policies, tmp_path):
    algorithm = trained_agent(policies)
    trainer = FakeTrainer(policies[0], "retail", conversations(1))
    algorithm.post_step_hook(trainer, "retail")
    state = json.loads(json.dumps(algorithm.state_dict()))
    algorithm.save(tmp_path)
    other = agent()
    other.load_state_dict(state)
    other.load(tmp_path)
    with pytest.raises(ValueError, match="no algorithm_teacher"):
        other.load_snapshots({})
    other.load_snapshots({name: [t.clone() for t in tensors] for name, tensors in algorithm.snapshots().items()})
    losses = []
    for each in (algorithm, other):
        each.post_step_hook(trainer, "retail")
        losses.append(learnt(each.extra_loss(trainer)))
    assert losses[0] == losses[1]
    ours, theirs = (each.rehearsal.tensors() for each in (algorithm, other))
    assert set(ours) == set(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    (tmp_path / "generator.safetensors").unlink()
    with pytest.raises(ValueError, match="it has no generator"):
        other.load(tmp_path)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"window": 1}, "window must be at least 2, got 1"),
        ({"window_batch": 0}, "window_batch must be at least 1, got 0"),
        ({"window_memory": 0}, "window_memory must be at least 1, got 0"),
        ({"generator_updates": 0}, "generator_updates must be at least 1, got 0"),
        ({"generator_vocabulary": 1}, "generator_vocabulary must be at least 2, got 1"),
        ({"generator_latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({"replay_weight": 0.0}, "replay_weight must be greater than 0, got 0.0"),
        ({"generator_learning_rate": math.nan}, "generator_learning_rate must be greater than 0, got nan"),
    ],
)
def test_settings_of_the_agent_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        agent(**settings)


# ---------------------------------------------------------------------------------------- the experiment


def test_heads_are_those_of_the_scenario():
    logits = torch.arange(12.0).view(2, 6)
    y = torch.tensor([1, 4])
    choice = {s: Heads(s, 3, 2).choice(logits[:, : Heads(s, 3, 2).outputs], y, 3) for s in generative.SCENARIOS}
    assert choice["class"][0].tolist() == logits.tolist() and choice["class"][1].tolist() == [1, 4]
    assert choice["domain"][0].tolist() == [[0, 1], [6, 7]] and choice["domain"][1].tolist() == [1, 0]
    assert choice["task"][0].tolist() == [[0, 1], [10, 11]] and choice["task"][1].tolist() == [1, 0]
    assert Heads("class", 3, 2).choice(logits, y[:1], 1)[0].shape == (2, 2)
    pairs = Heads("class", 3, 2).pairs(logits, logits, 3)
    assert [(s.shape[1], t.shape[1]) for s, t in pairs] == [(6, 4)]
    pairs = Heads("task", 3, 2).pairs(logits, logits, 3)
    assert [s[0].tolist() for s, _ in pairs] == [[0, 1], [2, 3]]


def test_images_are_split_by_class_without_overlap():
    x, y, _ = generative.load_images(Args())
    tasks = generative.split_tasks(torch.arange(len(y)), y, 0)
    train, test = (torch.cat([t[k] for t in tasks]) for k in (0, 2))
    assert sorted(torch.cat([train, test]).tolist()) == list(range(len(y))) and 0.19 < len(test) / len(y) < 0.21
    assert [sorted(t[1].unique().tolist()) for t in tasks] == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]
    other = generative.split_tasks(torch.arange(len(y)), y, 1)
    assert not torch.equal(tasks[0][0], other[0][0]) and x.min() == 0 and x.max() == 1


def average(arm):
    return np.mean(generative.run_arm(Args(), "class", arm, 0)["R"][-1])


def test_the_order_of_the_arms():
    """One seed, with room between them: the README has five, with intervals."""
    scores = {arm: average(arm) for arm in ("naive", "unrehearsed", "soft", "conditional_soft", "mixture", "joint")}
    assert scores["naive"] < 0.25 < scores["unrehearsed"] < 0.65 < scores["soft"] < 0.9
    assert 0.9 < scores["conditional_soft"] < scores["mixture"] < scores["joint"] and scores["joint"] > 0.93


@pytest.mark.parametrize(
    "scenario, arm, plain",
    [("domain", "ewc", "naive"), ("task", "online_ewc", "naive"), ("class", "er_plus", "experience_replay")],
)
def test_penalties_are_added_to_the_loss(scenario, arm, plain):
    """With weight 0 they change nothing at all; with one the tasks behind the first."""
    plain = generative.run_arm(Args(iterations=20), scenario, plain, 0)
    without = generative.run_arm(
        Args(iterations=20, ewc_lambda=0.0, er_plus_lambda=0.0, lwf_coef=0.0), scenario, arm, 0
    )
    held = generative.run_arm(Args(iterations=20, ewc_lambda=1e3, er_plus_lambda=1e3, lwf_coef=1.0), scenario, arm, 0)
    assert without["R"] == plain["R"]
    assert held["R"][0] == plain["R"][0] and held["R"][1:] != plain["R"][1:]
    size = (held["bytes_kept"] - plain["bytes_kept"]) / {"ewc": 10, "online_ewc": 2, "er_plus": 11}[arm]
    assert size == 4 * (64 * 100 + 100 + 100 * 100 + 100 + 101 * (2 if scenario == "domain" else 10))


def test_the_fisher_information_is_of_labels_that_compete(monkeypatch):
    """At the n-th task: of all classes so far, of the two, of the two of its head; drawn as the solver has them."""
    logits = torch.randn(1, 10, generator=torch.Generator().manual_seed(0)).expand(30_000, 10)
    torch.manual_seed(0)
    for scenario, competing in (("class", slice(0, 6)), ("task", slice(4, 6)), ("domain", slice(0, 2))):
        heads = generative.Heads(scenario, 5, 2)
        given = logits[:, : heads.outputs]
        losses = generative.surprise(given, heads, 3)
        p = given[0, competing].softmax(0)
        share = [(losses + p[k].log()).abs().lt(1e-5).float().mean().item() for k in range(len(p))]
        assert share == pytest.approx(p.tolist(), abs=0.015)


def write_idx(path, array):
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes())


def test_mnist_is_read_from_its_files(tmp_path):
    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("t10k", 20)):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", rng.integers(0, 256, (n, 28, 28), dtype=np.uint8))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8) % 10)
    x, y, shape = generative.load_images(Args(mnist=str(tmp_path)))
    assert x.shape == (60, 784) and shape == (1, 28, 28) and x.max() == 1 and y[:12].tolist() == [*range(10), 0, 1]
    result = generative.run_arm(Args(mnist=str(tmp_path), iterations=2), "class", "conv", 0)
    assert len(result["samples"]) == 5 and len(result["samples"][0][0]) == 784
    path = tmp_path / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a whole idx file"):
        generative.load_images(Args(mnist=str(tmp_path)))
    path.unlink()
    with pytest.raises(ValueError, match=r"there is no .*t10k-images.*packed"):
        generative.load_images(Args(mnist=str(tmp_path)))


def test_the_experiment_writes_its_table_and_pictures(tmp_path):
    flags = [
        "--iterations",
        "3",
        "--seeds",
        "0",
        "1",
        "--scenarios",
        "task",
        "--workers",
        "2",
        "--output",
        str(tmp_path),
    ]
    command = [sys.executable, "generative.py", *flags]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert shown.returncode == 0, shown.stderr
    assert "Warning" not in shown.stderr and shown.stdout.count("\n| ") >= len(generative.ARMS)
    for name in ("samples.png", "accuracy.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    with open(tmp_path / "accuracy.csv") as file:
        assert len(list(csv.reader(file))) == 1 + 5 * 2 * len(generative.ARMS)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"arms": ["best"]}, "unknown arm 'best'"),
        ({"scenarios": ["classes"]}, "unknown scenario 'classes'"),
        ({"seeds": [0, 0]}, "once"),
        ({"latent_dim": 0}, "latent_dim must be greater than 0, got 0"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"mnist": "/no/such"}, "/no/such"),
    ],
)
def test_bad_settings_are_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        generative.check_args(Args(**wrong))
