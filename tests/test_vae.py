"""vae.py: the evidence lower bound, the generators, and their prior."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

import vae as generators
from vae import VAE, ConvVAE, TokenVAE, elbo_loss, make_generator


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

    def loss(mu, logvar):
        torch.manual_seed(3)
        return elbo_loss(x, *functional_call(vae, {"mu.bias": mu, "logvar.bias": logvar}, x))

    assert torch.autograd.gradcheck(loss, (vae.mu.bias, vae.logvar.bias))
    torch.manual_seed(3)
    mu, logvar = vae.encode(x)
    z = mu + logvar.exp().sqrt() * torch.randn_like(mu)
    torch.manual_seed(3)
    torch.testing.assert_close(vae(x)[0], vae.decode(z))


KINDS = {"vae": (VAE, {"hidden_dims": (32,)}), "conv_vae": (ConvVAE, {"channels": (4, 8)})}


def make(kind, conditions):
    return make_generator(kind, (1, 8, 8), latent_dim=8, num_conditions=conditions, **KINDS[kind][1])


@pytest.mark.parametrize("conditions", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_generators_share_an_interface(kind, conditions):
    generator = make(kind, conditions)
    condition = torch.tensor([0, 1, 2, 0]) if conditions else None
    x = generator.generate(4, condition=condition)
    assert type(generator) is KINDS[kind][0] and generator.num_conditions == conditions
    assert x.shape == (4, 64) and x.min() >= 0 and x.max() <= 1 and not x.requires_grad
    before = [p.clone() for p in generator.parameters()]
    loss = generator.learn(generator.optimizer(1e-3), [(0.5, torch.rand(4, 64), condition), (0.5, x, condition)])
    assert math.isfinite(loss)
    assert not any(torch.equal(a, b) for a, b in zip(before, generator.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_generator_learns_its_data_by_condition(kind):
    """Left half bright under condition 0, right half under 1."""
    torch.manual_seed(0)
    generator = make(kind, 2)
    optimizer = generator.optimizer(2e-3)
    for _ in range(300):
        condition = torch.randint(2, (32,))
        x = torch.full((32, 8, 8), 0.1)
        x[:, :, :4] += 0.7 * (condition == 0)[:, None, None]
        x[:, :, 4:] += 0.7 * (condition == 1)[:, None, None]
        generator.learn(optimizer, [(1.0, x.flatten(1), condition)])
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
    weights, means, stds = generators.gaussian_mixture(
        centre[which] + torch.tensor([0.5, 1.5]) * torch.randn(4000, 2), 2
    )
    order = weights.argsort(descending=True)
    assert torch.allclose(weights[order], torch.tensor([0.75, 0.25]), atol=0.01)
    assert torch.allclose(means[order], centre, atol=0.15)
    assert torch.allclose(stds[order], torch.tensor([0.5, 1.5]).expand(2, 2), atol=0.1)


@pytest.mark.parametrize("points, fitted", [(1, 1), (9, 1), (39, 3), (100, 4)])
def test_no_gaussian_is_fitted_to_fewer_than_ten_points(points, fitted):
    weights, means, stds = generators.gaussian_mixture(torch.randn(points, 3), 4)
    assert weights.shape == (4,) and means.shape == stds.shape == (4, 3)
    assert (weights > 0).sum() == fitted and weights.sum().item() == pytest.approx(1, abs=1e-5)


def test_samples_have_the_law_of_the_latents_of_their_condition(monkeypatch):
    """Mean and covariance of what is decoded, per condition, against those of what `fit_prior` was shown."""
    torch.manual_seed(0)
    generator = VAE(64, (32,), 2, dropout=0.9, num_conditions=3, components=6)
    shown = {0: torch.randn(6000, 2) + 3, 2: torch.cat([torch.randn(3000, 2) - 5, 0.2 * torch.randn(3000, 2) + 5])}
    seen = []  # with dropout?
    monkeypatch.setattr(VAE, "latent", lambda self, x, condition: seen.append(self.training) or (x, None, None))
    generator.fit_prior((part, torch.full((3000,), c)) for c, z in shown.items() for part in z.split(3000))
    assert seen == [False] * 4 and generator.training
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


def test_the_parts_of_a_generators_loss_are_weighted():
    """A part of weight 0 changes nothing; two halves of the same batch are the whole."""
    x, steps = torch.rand(8, 64), []
    for parts in ([(1.0, x, None)], [(1.0, x, None), (0.0, torch.rand(8, 64), None)]):
        torch.manual_seed(0)
        vae = VAE(64, (16,), 4, dropout=0.0)
        torch.manual_seed(1)
        vae.learn(torch.optim.SGD(vae.parameters(), 0.01), parts)
        steps.append(torch.cat([p.detach().flatten() for p in vae.parameters()]))
    torch.testing.assert_close(*steps)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: VAE(4, latent_dim=0), "latent_dim must be at least 1, got 0"),
        (lambda: ConvVAE((1, 8, 8), latent_dim=0), "latent_dim"),
        (lambda: ConvVAE((1, 9, 8)), "multiples of 4"),
        (lambda: VAE(4)(torch.rand(2, 5)), r"must have the shape \(B, 4\), got \(2, 5\)"),
        (lambda: VAE(4, num_conditions=3).generate(2), "3 conditions: name one"),
        (lambda: VAE(4, num_conditions=3).generate(2, condition=torch.tensor([2, 7])), "must be in 0 .. 2, got 7"),
        (lambda: VAE(4, num_conditions=3)(torch.rand(2, 4), torch.tensor([-1, 2])), "must be in 0 .. 2, got -1"),
        (lambda: TokenVAE(9, 4, dropout=2.0), "dropout .* between 0 and 1"),
        (lambda: make_generator("gan", (1, 8, 8)), "unknown generator 'gan'; choose vae or conv_vae"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------------------------------------- windows of tokens


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
    optimizer = vae.optimizer(3e-3)
    for _ in range(400):
        vae.learn(optimizer, [(1.0, windows, conditions)])
    made = vae.generate(200, condition=torch.arange(200) % 2)
    hits = (made[:, None] == windows).float().mean(2)  # (200, 6)
    nearest = hits.argmax(1)
    assert (conditions[nearest] == torch.arange(200) % 2).float().mean() > 0.95
    assert hits.max(1).values.mean() > 0.8 and len(nearest.unique()) == 6
