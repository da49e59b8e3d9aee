"""Variational autoencoders for generative replay: of vectors, of images, of windows of tokens.

A generator has: generate(num_samples, condition=...), loss(x, condition), optimizer(learning_rate),
learn(optimizer, parts), fit_prior(batches), and num_conditions.
"""

import copy
import math
import warnings
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def elbo_loss(x, reconstruction, mu, logvar) -> Tensor:
    """The negative evidence lower bound per sample, a mean over the batch (Kingma and Welling 2014, arXiv:1312.6114):
    binary cross-entropy summed over the inputs, + KL(N(mu, exp(logvar)) || N(0, 1)) summed over the latents.

    x, reconstruction: (B, ...) in [0, 1]; mu, logvar: (B, latent). Raises ValueError for inputs outside [0, 1] or NaN.
    """
    check_shape(x, reconstruction.shape[1:])
    wrong = x[~((x >= 0) & (x <= 1))]  # NaN is, too
    if len(wrong):
        raise ValueError(f"inputs must be in [0, 1], got {wrong[0].item()}")
    reconstruction_loss = F.binary_cross_entropy(reconstruction, x, reduction="sum")
    return (reconstruction_loss + latent_kl(mu, logvar)) / len(x)


def latent_kl(mu, logvar) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)), summed over latents and samples (Kingma and Welling 2014, appendix B)."""
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()


def check_shape(x, shape):
    if tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(f"inputs must have the shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}")


def check_numbers(name, values, count):
    """Raises ValueError if one of the integers `values` is not in 0 .. count - 1."""
    wrong = values[(values < 0) | (values >= count)]
    if len(wrong):
        raise ValueError(f"{name} must be in 0 .. {count - 1}, got {wrong[0].item()}")


def gaussian_mixture(z, components) -> tuple[Tensor, Tensor, Tensor]:
    """(weights (components,), means and standard deviations (components, d)) of a mixture of Gaussians with diagonal
    covariances, fitted to z (N, d) by EM. With few points only one Gaussian for every ten has a weight."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    fitted = max(1, min(components, len(z) // 10))
    seed = int(torch.randint(2**31, ()))  # so that torch.manual_seed decides
    mixture = GaussianMixture(fitted, covariance_type="diag", reg_covar=1e-3, random_state=seed)
    with warnings.catch_warnings(action="ignore", category=ConvergenceWarning):
        mixture.fit(z.repeat(2, 1).double().cpu().numpy())  # twice: it wants two points at least
    found = (mixture.weights_, mixture.means_, np.sqrt(mixture.covariances_))
    empty = (z.new_zeros(components), z.new_zeros(components, z.shape[1]), z.new_ones(components, z.shape[1]))
    for whole, values in zip(empty, found, strict=True):
        whole[:fitted] = torch.from_numpy(values)
    return empty


def mlp(widths, dropout) -> nn.Sequential:
    layers = ((nn.Linear(m, n), nn.ReLU(), nn.Dropout(dropout)) for m, n in pairwise(widths))
    return nn.Sequential(*chain.from_iterable(layers))


class VAE(nn.Module):
    """A variational autoencoder of inputs in [0, 1] (Kingma and Welling 2014). num_conditions: it also reads the
    condition of a sample, such as its class or domain (Sohn et al. 2015); 0: none. components: Gaussians per condition
    of the prior, see `fit_prior`; 0: the prior is N(0, 1). Raises ValueError for inputs of another shape."""

    def __init__(self, input_dim, hidden_dims=(256, 128), latent_dim=32, dropout=0.1, num_conditions=0, components=0):
        super().__init__()
        self._set_latent(latent_dim, num_conditions, components)
        self.shape = (input_dim,)
        widths = [input_dim + num_conditions, *hidden_dims]
        self.encoder = mlp(widths, dropout)
        self.mu, self.logvar = nn.Linear(widths[-1], latent_dim), nn.Linear(widths[-1], latent_dim)
        widths = [latent_dim + num_conditions, *reversed(hidden_dims)]
        self.decoder = nn.Sequential(*mlp(widths, dropout), nn.Linear(widths[-1], input_dim))

    def _set_latent(self, latent_dim, num_conditions, components):
        if latent_dim < 1:
            raise ValueError(f"latent_dim must be at least 1, got {latent_dim}")
        self.latent_dim, self.num_conditions, self.components = latent_dim, num_conditions, components
        rows, columns = max(1, num_conditions), max(1, components)
        self.register_buffer("prior_weight", torch.ones(rows, columns))
        self.register_buffer("prior_mean", torch.zeros(rows, columns, latent_dim))
        self.register_buffer("prior_std", torch.ones(rows, columns, latent_dim))

    def rows(self, condition, number) -> Tensor:
        """The row of the prior for each of `number` samples: its condition, or 0 of a generator without conditions.
        Raises ValueError if there is none."""
        if not self.num_conditions:
            return torch.zeros(number, dtype=torch.long, device=self.mu.weight.device)
        if condition is None:
            raise ValueError(f"this generator has {self.num_conditions} conditions: name one for each sample")
        check_numbers("conditions", condition, self.num_conditions)
        return condition

    def joined(self, h, condition) -> Tensor:
        """h (B, d) and the condition, one-hot, side by side."""
        if not self.num_conditions:
            return h
        return torch.cat([h, F.one_hot(self.rows(condition, len(h)), self.num_conditions).to(h)], 1)

    def encode(self, x, condition=None) -> tuple[Tensor, Tensor]:
        h = self.encoder(self.joined(x, condition))
        return self.mu(h), self.logvar(h)

    def decode(self, z, condition=None) -> Tensor:
        return torch.sigmoid(self.decoder(self.joined(z, condition)))

    def latent(self, x, condition=None):
        """(z, mu, logvar) of x (B, input_dim), condition (B,) of integers: one draw of z by reparametrisation,
        z = mu + exp(logvar / 2) * noise."""
        check_shape(x, self.shape)
        mu, logvar = self.encode(x, condition)
        return mu + torch.exp(0.5 * logvar) * torch.randn_like(mu), mu, logvar

    def forward(self, x, condition=None):
        """(reconstruction, mu, logvar) of x."""
        z, mu, logvar = self.latent(x, condition)
        return self.decode(z, condition), mu, logvar

    @torch.no_grad()
    def generate(self, num_samples, device=None, condition=None) -> Tensor:
        """Samples of the prior, decoded to their means, (num_samples, input_dim); without dropout."""
        noise = torch.randn(num_samples, self.latent_dim, device=device or self.mu.weight.device)
        row = self.rows(condition, num_samples)
        chosen = self.prior_weight[row].multinomial(1)[:, 0]
        model = frozen(self) if self.training else self
        return model.decode(self.prior_mean[row, chosen] + self.prior_std[row, chosen] * noise, condition)

    @torch.no_grad()
    def fit_prior(self, batches):
        """Fits a mixture of Gaussians to the latents of each condition, from `batches` of (x, condition). It replaces
        N(0, 1) as the prior (Ghosh et al. 2020, arXiv:1903.12436, section 4): a generator that was trained only
        briefly decodes latents of real samples well, and latents between them badly."""
        if not self.components:
            return
        model = frozen(self)
        parts = [(model.latent(x, condition)[0], self.rows(condition, len(x))) for x, condition in batches]
        z, rows = (torch.cat(part) for part in zip(*parts, strict=True))
        for row in rows.unique():
            prior = gaussian_mixture(z[rows == row], self.components)
            self.prior_weight[row], self.prior_mean[row], self.prior_std[row] = prior

    def loss(self, x, condition=None) -> Tensor:
        return elbo_loss(x, *self(x, condition))

    def optimizer(self, learning_rate):
        return torch.optim.Adam(self.parameters(), learning_rate, fused=True)

    def learn(self, optimizer, parts) -> float:
        """One update on `parts`: (weight, x, condition) of the current and of the generated batch. Returns the loss."""
        loss = sum(weight * self.loss(x, condition) for weight, x, condition in parts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()


class ConvVAE(VAE):
    """A VAE with convolutions, for images of `image_shape` (channels, height, width); height and width are multiples of
    4. Samples are flat, as those of `VAE`."""

    def __init__(self, image_shape, channels=(32, 64), latent_dim=32, num_conditions=0, components=0):
        nn.Module.__init__(self)
        self._set_latent(latent_dim, num_conditions, components)
        if len(image_shape) != 3 or image_shape[1] % 4 or image_shape[2] % 4:
            raise ValueError(f"image_shape must be (channels, height, width), these multiples of 4; got {image_shape}")
        depth, height, width = image_shape
        first, second = channels
        self.shape = (math.prod(image_shape),)
        small = (second, height // 4, width // 4)
        down = {"kernel_size": 4, "stride": 2, "padding": 1}
        layers = [nn.Unflatten(1, image_shape), nn.Conv2d(depth, first, **down), nn.ReLU()]
        self.encoder = nn.Sequential(*layers, nn.Conv2d(first, second, **down), nn.ReLU(), nn.Flatten())
        features = math.prod(small) + num_conditions
        self.mu, self.logvar = nn.Linear(features, latent_dim), nn.Linear(features, latent_dim)
        layers = [nn.Linear(latent_dim + num_conditions, math.prod(small)), nn.ReLU(), nn.Unflatten(1, small)]
        layers += [nn.ConvTranspose2d(second, first, **down), nn.ReLU(), nn.ConvTranspose2d(first, depth, **down)]
        self.decoder = nn.Sequential(*layers, nn.Flatten())

    def encode(self, x, condition=None):
        h = self.joined(self.encoder(x), condition)
        return self.mu(h), self.logvar(h)


class TokenVAE(VAE):
    """A VAE of windows of tokens: the embeddings of a window side by side, an MLP, and a distribution over all tokens
    at each place, by the same embeddings. The caller numbers the tokens from 1 to `vocabulary` - 1, so that size and
    time do not depend on the policy's vocabulary; 0 ends a window. Only the first `used` numbers can be generated.
    conditions: num_conditions and components, see `VAE`."""

    def __init__(self, vocabulary, window=32, width=32, hidden_dims=(256,), latent_dim=32, dropout=0.0, **conditions):
        super().__init__(window * width, hidden_dims, latent_dim, dropout, **conditions)
        self.shape = (window,)
        self.embedding = nn.Embedding(vocabulary, width)
        self.register_buffer("used", torch.tensor(1))

    def encode(self, x, condition=None):
        return super().encode(self.embedding(x).flatten(1), condition)

    def states(self, z, condition=None) -> Tensor:
        """Hidden states (B, window, width), one for each token."""
        return self.decoder(self.joined(z, condition)).unflatten(1, (self.shape[0], -1))

    def logits(self, states) -> Tensor:
        return states @ self.embedding.weight[: self.used].T

    def decode(self, z, condition=None) -> Tensor:
        """Logits (B, window, used)."""
        return self.logits(self.states(z, condition))

    def generate(self, num_samples, device=None, condition=None) -> Tensor:
        """The likeliest token at each place, (num_samples, window); 0 from the window's end on."""
        x = super().generate(num_samples, device, condition).argmax(-1)
        return x * (x != 0).cumprod(1)

    def loss(self, x, condition=None):
        """The negative ELBO of a categorical likelihood: cross-entropy summed over the window up to and including its
        end, + the latents' KL."""
        z, mu, logvar = self.latent(x, condition)
        counts = F.pad((x != 0).cumprod(1)[:, :-1], (1, 0), value=1).bool()
        logits = self.logits(self.states(z, condition)[counts])
        cross_entropy = F.cross_entropy(logits, x[counts], reduction="sum")
        return (cross_entropy + latent_kl(mu, logvar)) / len(x)


def make_generator(name, shape, **settings) -> VAE:
    """The generator "vae" or "conv_vae" of samples of `shape`, such as (channels, height, width), which it takes flat.
    settings: see its class."""
    if name == "vae":
        return VAE(math.prod(shape), **settings)
    if name == "conv_vae":
        return ConvVAE(shape, **settings)
    raise ValueError(f"unknown generator {name!r}; choose vae or conv_vae")


def frozen(model):
    """A copy that neither learns nor drops units."""
    return copy.deepcopy(model).eval().requires_grad_(False)
