"""What is re-imagined: generative replay. No sample of an earlier task is kept; a generator learns their distribution.

    python generative.py                the experiment on split digits, table and pictures
    python generative.py --mnist DIR    on MNIST's four files in DIR

Data flow, at the n-th task: the frozen generator of the previous task -> a generated batch -> the frozen solver labels
it -> solver and generator both learn with L = (1/n) L_current + (1 - 1/n) L_replay on that same batch (Shin et al.
2017, arXiv:1705.08690). At the task's end both are frozen anew, and what was stored of the task is dropped.

To change what is generated, write a class with the methods of `VAE`; how it is rehearsed, `GenerativeReplay.step`.
"""

import copy
import gzip
import itertools
import math
import struct
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import grpo
import regularize
from replay import Buffer, CLAlgorithm, add, check_coefficients, over_seeds, run_command, run_jobs, sample, write_csv

GENERATORS = ("vae", "conv", "gan")
TARGETS = ("hard", "soft")


# ------------------------------------------------------------------------------------------ the formulas


def replay_weights(n) -> tuple[float, float]:
    """The shares of the current and of the replayed loss at the n-th task, n from 1: (1/n, 1 - 1/n), so that every
    task so far counts the same (Shin et al. 2017, eq. 1 with r = 1/n).

    >>> replay_weights(4)
    (0.25, 0.75)
    """
    if n < 1:
        raise ValueError(f"tasks are counted from 1, got {n}")
    return 1 / n, 1 - 1 / n


def elbo_loss(x, reconstruction, mu, logvar) -> Tensor:
    """The negative evidence lower bound per sample, a mean over the batch (Kingma and Welling 2014, arXiv:1312.6114):
    binary cross-entropy summed over the inputs, + KL(N(mu, exp(logvar)) || N(0, 1)) summed over the latents.

    x, reconstruction: (B, ...) in [0, 1]; mu, logvar: (B, latent). Raises ValueError for inputs outside [0, 1] or NaN.
    """
    check_inputs(x, reconstruction.shape[1:])
    reconstruction_loss = F.binary_cross_entropy(reconstruction, x, reduction="sum")
    return (reconstruction_loss + latent_kl(mu, logvar)) / len(x)


def latent_kl(mu, logvar) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, 1)), summed over latents and samples (Kingma and Welling 2014, appendix B)."""
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()


def distillation_loss(student_logits, teacher_logits, temperature=2.0) -> Tensor:
    """Cross-entropy of the student to softmax(teacher / T), times T^2 so that its gradient keeps its size whatever T is
    (Hinton et al. 2015, arXiv:1503.02531, section 2), a mean over the batch.

    Logits are (B, classes); classes beyond the teacher's, which are new, have probability 0 in the target.
    """
    target = F.softmax(teacher_logits / temperature, 1)
    new = student_logits.shape[1] - teacher_logits.shape[1]
    target = F.pad(target, (0, new))
    return -(target * F.log_softmax(student_logits / temperature, 1)).sum(1).mean() * temperature**2


def hard_loss(student_logits, teacher_logits) -> Tensor:
    """Cross-entropy to the class that the teacher finds likeliest (Shin et al. 2017)."""
    return F.cross_entropy(student_logits, teacher_logits.argmax(1))


def soft_loss(pairs, temperature) -> Tensor:
    """The mean of `distillation_loss` over pairs (student's, teacher's logits)."""
    return sum(distillation_loss(student, teacher, temperature) for student, teacher in pairs) / len(pairs)


# ---------------------------------------------------------------------------------------- the generators


def at_least(lowest, **values):
    for name, value in values.items():
        if not value >= lowest:  # true for NaN, too
            raise ValueError(f"{name} must be at least {lowest}, got {value}")


def above_zero(**values):
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be greater than 0, got {value}")


def _one_hot(condition, num_conditions, like) -> Tensor:
    """(B, num_conditions); nothing where there are no conditions."""
    if not num_conditions:
        return like.new_zeros(len(like), 0)
    if condition is None:
        raise ValueError(f"this generator has {num_conditions} conditions: name one for each sample")
    return F.one_hot(condition, num_conditions).to(like)


@contextmanager
def evaluating(model):
    """Inside, no unit is dropped."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def gaussian_mixture(z, components) -> tuple[Tensor, Tensor, Tensor]:
    """(weights (components,), means and standard deviations (components, d)) of a mixture of Gaussians with diagonal
    covariances, fitted to z (N, d) by EM. At most one for every ten points has a weight."""
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


class VAE(nn.Module):
    """A variational autoencoder of inputs in [0, 1]; with `num_conditions`, of what each condition (a class, a domain)
    looks like (Sohn et al. 2015); with `components`, a prior of so many Gaussians per condition, see `fit_prior`."""

    def __init__(self, input_dim, hidden_dims=(256, 128), latent_dim=32, dropout=0.1, num_conditions=0, components=0):
        super().__init__()
        self._set_latent(latent_dim, num_conditions, components)
        self.shape = (input_dim,)
        width, layers = input_dim + num_conditions, []
        for hidden in hidden_dims:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout)]
            width = hidden
        self.encoder = nn.Sequential(*layers)
        self.mu, self.logvar = nn.Linear(width, latent_dim), nn.Linear(width, latent_dim)
        width, layers = latent_dim + num_conditions, []
        for hidden in reversed(hidden_dims):
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout)]
            width = hidden
        self.decoder = nn.Sequential(*layers, nn.Linear(width, input_dim))

    def _set_latent(self, latent_dim, num_conditions, components):
        at_least(1, latent_dim=latent_dim)
        at_least(0, num_conditions=num_conditions, components=components)
        self.latent_dim, self.num_conditions, self.components = latent_dim, num_conditions, components
        rows, columns = max(1, num_conditions), max(1, components)
        self.register_buffer("prior_weight", torch.ones(rows, columns))
        self.register_buffer("prior_mean", torch.zeros(rows, columns, latent_dim))
        self.register_buffer("prior_std", torch.ones(rows, columns, latent_dim))

    def encode(self, x, condition=None) -> tuple[Tensor, Tensor]:
        h = self.encoder(torch.cat([x, _one_hot(condition, self.num_conditions, x)], 1))
        return self.mu(h), self.logvar(h)

    def decode(self, z, condition=None) -> Tensor:
        return torch.sigmoid(self.decoder(torch.cat([z, _one_hot(condition, self.num_conditions, z)], 1)))

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
        device = device or self.mu.weight.device
        noise = torch.randn(num_samples, self.latent_dim, device=device)
        row = condition if self.num_conditions else torch.zeros(num_samples, dtype=torch.long, device=device)
        if row is None:
            raise ValueError(f"this generator has {self.num_conditions} conditions: name one for each sample")
        chosen = self.prior_weight[row].multinomial(1)[:, 0]
        with evaluating(self):
            return self.decode(self.prior_mean[row, chosen] + self.prior_std[row, chosen] * noise, condition)

    @torch.no_grad()
    def fit_prior(self, batches):
        """Fits the prior of each condition to the latents of `batches` of (x, condition): N(0, 1) until then, a mixture
        of Gaussians afterwards (Ghosh et al. 2020, arXiv:1903.12436, section 4). A generator that has not been trained
        for long decodes what it was shown, and little of what lies between."""
        if not self.components:
            return
        with evaluating(self):
            latents, conditions = zip(*((self.latent(*batch)[0], batch[1]) for batch in batches), strict=True)
        z = torch.cat(latents)
        rows = torch.cat(conditions) if self.num_conditions else torch.zeros(len(z), dtype=torch.long)
        for row in rows.unique():
            prior = gaussian_mixture(z[rows == row], self.components)
            self.prior_weight[row], self.prior_mean[row], self.prior_std[row] = prior

    def loss(self, x, condition=None) -> Tensor:
        return elbo_loss(x, *self(x, condition))

    def optimizers(self, learning_rate) -> list:
        return [torch.optim.Adam(self.parameters(), learning_rate, fused=True)]

    def learn(self, optimizers, parts) -> float:
        """One update on `parts`: (weight, x, condition) of the current and of the generated batch. Returns the loss."""
        loss = sum(weight * self.loss(x, condition) for weight, x, condition in parts)
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[0].step()
        return loss.item()


class ConvVAE(VAE):
    """The same with convolutions, for images of `image_shape` (channels, height, width), both a multiple of 4. Samples
    are flat, as those of `VAE`."""

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
        self.encoder = nn.Sequential(
            nn.Unflatten(1, image_shape),
            nn.Conv2d(depth, first, **down),
            nn.ReLU(),
            nn.Conv2d(first, second, **down),
            nn.ReLU(),
            nn.Flatten(),
        )
        features = math.prod(small) + num_conditions
        self.mu, self.logvar = nn.Linear(features, latent_dim), nn.Linear(features, latent_dim)
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim + num_conditions, math.prod(small)),
            nn.ReLU(),
            nn.Unflatten(1, small),
            nn.ConvTranspose2d(second, first, **down),
            nn.ReLU(),
            nn.ConvTranspose2d(first, depth, **down),
            nn.Flatten(),
        )

    def encode(self, x, condition=None):
        h = torch.cat([self.encoder(x), _one_hot(condition, self.num_conditions, x)], 1)
        return self.mu(h), self.logvar(h)


class TokenVAE(VAE):
    """A VAE of windows of tokens: the embeddings of a window side by side, an MLP, and a distribution over all tokens
    at each place, by the same embeddings. Tokens are numbered anew, in the order in which they are met (`vocabulary` of
    them at most), so that neither size nor time depends on the policy's vocabulary or width; 0 is the end of a window
    shorter than the others. `used`: so many of the numbers are taken; others cannot be generated."""

    def __init__(
        self, vocabulary, window=32, width=32, hidden_dims=(256,), latent_dim=32, num_conditions=0, components=0
    ):
        super().__init__(window * width, hidden_dims, latent_dim, 0.0, num_conditions, components)
        self.shape = (window,)
        self.embedding = nn.Embedding(vocabulary, width)
        self.register_buffer("used", torch.tensor(1))

    def encode(self, x, condition=None):
        return super().encode(self.embedding(x).flatten(1), condition)

    def states(self, z, condition=None) -> Tensor:
        """What is read as a token at each place, (B, window, width)."""
        h = self.decoder(torch.cat([z, _one_hot(condition, self.num_conditions, z)], 1))
        return h.unflatten(1, (self.shape[0], -1))

    def logits(self, states) -> Tensor:
        return states @ self.embedding.weight[: self.used].T

    def decode(self, z, condition=None) -> Tensor:
        """Logits (B, window, used)."""
        return self.logits(self.states(z, condition))

    def generate(self, num_samples, device=None, condition=None) -> Tensor:
        """The likeliest token at each place, (num_samples, window); 0 from the end on."""
        x = super().generate(num_samples, device, condition).argmax(-1)
        return x * (x != 0).cumprod(1)

    def loss(self, x, condition=None):
        """The negative ELBO of a categorical likelihood: cross-entropy summed over the window up to its end, that
        included, + the latents' KL."""
        z, mu, logvar = self.latent(x, condition)
        counts = F.pad((x != 0).cumprod(1)[:, :-1], (1, 0), value=1).bool()
        logits = self.logits(self.states(z, condition)[counts])
        cross_entropy = F.cross_entropy(logits, x[counts], reduction="sum")
        return (cross_entropy + latent_kl(mu, logvar)) / len(x)


class WGAN(nn.Module):
    """The generator of Shin et al.: a Wasserstein GAN with gradient penalty (Gulrajani et al. 2017, arXiv:1704.00028)
    of inputs in [0, 1], with the interface of `VAE`."""

    PENALTY, CRITIC_STEPS = 10.0, 2

    def __init__(self, input_dim, hidden_dims=(256, 128), latent_dim=32, num_conditions=0):
        super().__init__()
        at_least(1, latent_dim=latent_dim)
        at_least(0, num_conditions=num_conditions)
        self.latent_dim, self.num_conditions, self.shape = latent_dim, num_conditions, (input_dim,)

        def mlp(width, hidden_dims, end):
            layers = []
            for hidden in hidden_dims:
                layers += [nn.Linear(width, hidden), nn.LeakyReLU(0.2)]
                width = hidden
            return nn.Sequential(*layers, nn.Linear(width, end))

        self.decoder = mlp(latent_dim + num_conditions, tuple(reversed(hidden_dims)), input_dim)
        self.critic = mlp(input_dim + num_conditions, hidden_dims, 1)

    def decode(self, z, condition=None):
        return torch.sigmoid(self.decoder(torch.cat([z, _one_hot(condition, self.num_conditions, z)], 1)))

    def judge(self, x, condition=None):
        return self.critic(torch.cat([x, _one_hot(condition, self.num_conditions, x)], 1))[:, 0]

    def fit_prior(self, batches):
        """A GAN does not say which latents its data have."""

    def invent(self, condition, number, device):
        return self.decode(torch.randn(number, self.latent_dim, device=device), condition)

    @torch.no_grad()
    def generate(self, num_samples, device=None, condition=None) -> Tensor:
        return self.invent(condition, num_samples, device or self.decoder[0].weight.device)

    def optimizers(self, learning_rate) -> list:
        kwargs = {"lr": learning_rate, "betas": (0.5, 0.9)}
        return [
            torch.optim.Adam(self.decoder.parameters(), **kwargs),
            torch.optim.Adam(self.critic.parameters(), **kwargs),
        ]

    def learn(self, optimizers, parts) -> float:
        """CRITIC_STEPS updates of the critic, one of the generator. Returns the distance that the critic sees."""
        decoder, critic = optimizers
        for _ in range(self.CRITIC_STEPS):
            distance, penalty = 0.0, 0.0
            for weight, x, condition in parts:
                fake = self.invent(condition, len(x), x.device).detach()
                distance = distance + weight * (self.judge(x, condition).mean() - self.judge(fake, condition).mean())
                mixed = torch.lerp(x, fake, torch.rand(len(x), 1, device=x.device)).requires_grad_()
                (slope,) = torch.autograd.grad(self.judge(mixed, condition).sum(), mixed, create_graph=True)
                penalty = penalty + weight * (slope.norm(dim=1) - 1).square().mean()
            critic.zero_grad()
            (self.PENALTY * penalty - distance).backward()
            critic.step()
        loss = -sum(w * self.judge(self.invent(c, len(x), x.device), c).mean() for w, x, c in parts)
        decoder.zero_grad()
        loss.backward()
        decoder.step()
        return distance.item()


def make_generator(kind, input_dim, image_shape=None, num_conditions=0, **sizes):
    """The generator of that type: vae, conv or gan."""
    if kind not in GENERATORS:
        raise ValueError(f"unknown generator type {kind!r}; choose one of {', '.join(GENERATORS)}")
    if kind == "conv":
        if image_shape is None or math.prod(image_shape) != input_dim:
            raise ValueError(f"image_shape {image_shape} does not fit inputs of {input_dim} values")
        return ConvVAE(image_shape, num_conditions=num_conditions, **sizes)
    return {"vae": VAE, "gan": WGAN}[kind](input_dim, num_conditions=num_conditions, **sizes)


def frozen(model):
    """A copy that neither learns nor drops units."""
    return copy.deepcopy(model).eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------ the rehearsal


class Rehearsal:
    """A generator that learns one task after another: the current one from a reservoir of it, emptied at its end, all
    earlier ones from its own frozen copy. There is no setting without the second part."""

    def __init__(self, generator, memory_size=500, learning_rate=1e-3, rng=None):
        self.generator, self.learning_rate = generator, learning_rate
        self.generator_optimizers = generator.optimizers(learning_rate)
        self.memory = Buffer(memory_size)
        self.old_generator = None  # frozen at the end of the previous task
        self.conditions, self.old_conditions = [], []  # those seen, and those seen at that end; in order
        self.tasks_done = 0
        self.rng = rng or np.random.default_rng(0)

    def offer(self, x, condition=None):
        """Offers a sample of the current task to the memory."""
        if condition is not None:
            self.conditions = sorted({*self.conditions, condition})
        add(self.memory, (x, condition), rng=self.rng)

    def generated(self, number) -> tuple[Tensor, Tensor | None]:
        """(x, condition) from the generator of the previous task; conditions evenly over those seen (task-balanced).
        Raises ValueError before any task has ended."""
        if self.old_generator is None:
            raise ValueError("there is nothing to replay before the first task has ended")
        condition = None
        if self.old_generator.num_conditions:
            order = self.rng.permutation(self.old_conditions)
            condition = torch.tensor(np.resize(order, number), device=self.device)
        return self.old_generator.generate(number, condition=condition), condition

    def remembered(self, number):
        """(x, condition) of the current task, from the memory."""
        if not self.memory.items:
            raise ValueError("there is no sample of the current task in the memory: offer some first")
        return self.batch([self.memory.items[i] for i in sample(self.memory, number, rng=self.rng)])

    def batch(self, items):
        x = torch.stack([x for x, _ in items]).to(self.device)
        return x, None if items[0][1] is None else torch.tensor([c for _, c in items], device=self.device)

    def teach_generator(self, number, replayed=None) -> float:
        """One update of the generator on `number` samples of the current task and on `replayed`, which is what
        `generated` returned, by default as many new ones. Returns its loss."""
        current, old = replay_weights(self.tasks_done + 1)
        parts = [(current, *self.remembered(number))]
        if self.tasks_done > 0:
            parts.append((old, *(replayed or self.generated(number))))
        return self.generator.learn(self.generator_optimizers, parts)

    def learnt(self, size=64):
        """Batches (x, condition) of what the generator has learnt: the memory, and as much for each earlier task."""
        items = self.memory.items
        for first in range(0, len(items), size):
            yield self.batch(items[first : first + size])
        for first in range(0, len(items) * self.tasks_done, size):
            yield self.generated(min(size, len(items) * self.tasks_done - first))

    def end_task(self):
        """Freezes the generator as what earlier tasks are replayed from, and drops all that was stored of this one: the
        memory, and gradients and moments, which may hold single samples. A task of which nothing was offered does not
        count."""
        if not self.memory.items:
            return
        self.generator.fit_prior(self.learnt())
        self.generator.zero_grad(set_to_none=True)
        self.generator_optimizers = self.generator.optimizers(self.learning_rate)
        self.old_conditions = list(self.conditions)
        self.old_generator = frozen(self.generator)
        self.memory = Buffer(self.memory.capacity)
        self.tasks_done += 1

    @property
    def device(self):
        return next(self.generator.parameters()).device

    def to(self, device):
        """Moves both generators and the optimisers' moments; the memory stays on the CPU."""
        if device == self.device:
            return
        self.generator.to(device)
        if self.old_generator is not None:
            self.old_generator.to(device)
        before, self.generator_optimizers = self.generator_optimizers, self.generator.optimizers(self.learning_rate)
        for old, new in zip(before, self.generator_optimizers, strict=True):
            new.load_state_dict(old.state_dict())  # moves the moments to where the parameters are

    def state_dict(self) -> dict:
        """What a resumed run needs, as JSON, beside `tensors`."""
        counts = {name: getattr(self, name) for name in ("tasks_done", "conditions", "old_conditions")}
        return {**counts, "rng": self.rng.bit_generator.state, "seen": self.memory.seen}

    def load_state_dict(self, state):
        for name in ("tasks_done", "conditions", "old_conditions"):
            setattr(self, name, state[name])
        self.rng.bit_generator.state = state["rng"]
        self.memory.seen = state["seen"]

    def tensors(self) -> dict[str, Tensor]:
        """Both generators, the optimisers' moments and the memory (with integers as conditions), on the CPU."""
        found = {f"generator.{name}": value for name, value in self.generator.state_dict().items()}
        if self.old_generator is not None:
            old = self.old_generator.state_dict()
            if any(not torch.equal(value, found[f"generator.{name}"]) for name, value in old.items()):
                found.update({f"old_generator.{name}": value for name, value in old.items()})
        for k, optimizer in enumerate(self.generator_optimizers):
            found.update(_moments(f"optimizer.{k}", optimizer))
        if self.memory.items:
            x, conditions = zip(*self.memory.items, strict=True)
            found.update({"memory.x": torch.stack(x), "memory.order": torch.tensor(self.memory.order)})
            if None not in conditions:
                found["memory.condition"] = torch.tensor(conditions)
        return {name: value.cpu().contiguous() for name, value in found.items()}

    def load_tensors(self, found):
        """The inverse of `tensors`, after `load_state_dict`. Raises ValueError for what is not whole."""
        if ("memory.x" in found) != (self.memory.seen > 0):
            raise ValueError(f"{self.memory.seen} samples were offered, but it has no memory.x")
        _load_module(self.generator, found, "generator.")
        if self.tasks_done > 0:
            self.old_generator = frozen(self.generator)
            if _part(found, "old_generator."):  # else it is equal
                _load_module(self.old_generator, found, "old_generator.")
        for k, optimizer in enumerate(self.generator_optimizers):
            _load_moments(f"optimizer.{k}", optimizer, found)
        if "memory.x" in found:
            x, order = found["memory.x"], found["memory.order"].tolist()
            conditions = found["memory.condition"].tolist() if "memory.condition" in found else [None] * len(x)
            rows = list(zip(x, conditions, strict=True))
            rest = ([None] * len(x), [0.0] * len(x), [0.0] * len(x), order)
            self.memory = Buffer(self.memory.capacity, rows, *rest, seen=self.memory.seen)


def _part(found, prefix) -> dict:
    return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}


def _load_module(module, found, prefix):
    """ValueError names what is missing or does not fit."""
    values, expected = _part(found, prefix), module.state_dict()
    wrong = [k for k, value in expected.items() if k not in values or values[k].shape != value.shape]
    if wrong:
        raise ValueError(f"it has no {prefix}{wrong[0]} of the shape {tuple(expected[wrong[0]].shape)}")
    module.load_state_dict(values)


def _moments(prefix, optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{i}.{name}": value.cpu() for i, moments in state.items() for name, value in moments.items()}


def _load_moments(prefix, optimizer, found):
    saved = optimizer.state_dict()
    saved["state"] = {}
    for key, value in _part(found, f"{prefix}.").items():
        i, name = key.split(".")
        saved["state"].setdefault(int(i), {})[name] = value
    optimizer.load_state_dict(saved)


def check_shape(x, shape):
    if tuple(x.shape[1:]) != tuple(shape):
        raise ValueError(f"inputs must have the shape (B, {', '.join(map(str, shape))}), got {tuple(x.shape)}")


def check_inputs(x, shape):
    """Raises ValueError where x is not a batch (N, *shape) of values in [0, 1]; NaN is not."""
    check_shape(x, shape)
    if not (x.min() >= 0 and x.max() <= 1):  # false for NaN, too
        found = x.flatten()[~((x.flatten() >= 0) & (x.flatten() <= 1))][0].item()
        raise ValueError(f"inputs must be in [0, 1], got {found}")


class GenerativeReplay(Rehearsal):
    """A solver and a generator that learn one task after another from batches of the current one alone.

    heads: which logits a label or a teacher speaks of (see `Heads`); targets: "hard" or "soft" (see `hard_loss`,
    `distillation_loss`); memory_size: see `Rehearsal`; generator_update_freq: steps of the solver between updates of
    the generator; replay_weight: times the replayed loss. There is no setting that trains the solver on generated data
    and not the generator: one that is not rehearsed forgets, and the solver with it.
    """

    def __init__(
        self,
        solver,
        generator,
        heads,
        targets="hard",
        temperature=2.0,
        memory_size=500,
        batch_size=32,
        replay_weight=1.0,
        generator_update_freq=5,
        learning_rate=1e-3,
        generator_learning_rate=1e-3,
        rng=None,
    ):
        if targets not in TARGETS:
            raise ValueError(f"unknown targets {targets!r}; choose one of {', '.join(TARGETS)}")
        at_least(1, batch_size=batch_size, generator_update_freq=generator_update_freq, memory_size=memory_size)
        above_zero(temperature=temperature, replay_weight=replay_weight)
        above_zero(learning_rate=learning_rate, generator_learning_rate=generator_learning_rate)
        super().__init__(generator, memory_size, generator_learning_rate, rng)
        self.solver, self.heads = solver, heads
        self.targets, self.temperature, self.replay_weight = targets, temperature, replay_weight
        self.batch_size, self.generator_update_freq = batch_size, generator_update_freq
        self.optimizer = torch.optim.Adam(solver.parameters(), learning_rate)
        self.teacher = None  # the solver, frozen at the end of the previous task
        self.steps = self.taught = 0  # updates of the solver; of these, the generator's

    def begin_task(self, x, conditions=None):
        """Offers the task's samples (N, ...) to the memory, each once. Raises ValueError for values outside [0, 1]."""
        check_inputs(x, self.generator.shape)
        for k in range(len(x)):
            self.offer(x[k].clone(), None if conditions is None else int(conditions[k]))

    def step(self, x, y) -> dict:
        """One update of the solver on a batch of the current task (and of the generator, every
        generator_update_freq-th time), both with the same generated batch. Returns the losses. Raises ValueError for
        values outside [0, 1]."""
        check_inputs(x, self.generator.shape)
        self.steps += 1
        n = self.tasks_done + 1
        current, replayed = replay_weights(n)
        loss = current * self.heads.loss(self.solver(x), y, n)
        generated = None
        if n > 1:
            generated = self.generated(self.batch_size)
            loss = loss + self.replay_weight * replayed * self.replay_loss(generated[0], n)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        losses = {"solver": loss.item()}
        if self.steps % self.generator_update_freq == 0:
            losses["generator"] = self.teach_generator(self.batch_size, generated)
            self.taught += 1
        return losses

    def replay_loss(self, x, n) -> Tensor:
        """The solver's loss on generated x against the frozen one's labels, at the n-th task."""
        with torch.no_grad():
            taught = self.teacher(x)
        pairs = self.heads.pairs(self.solver(x), taught, n)
        if self.targets == "hard":
            return sum(hard_loss(s, t) for s, t in pairs) / len(pairs)
        return soft_loss(pairs, self.temperature)

    def end_task(self):
        """Freezes the solver, too, as the teacher of the next task. Raises ValueError for a task without samples, or in
        which the generator learnt nothing: the next would be rehearsed on noise."""
        if not self.memory.items or self.taught == 0:
            raise ValueError(
                f"the generator had no update in this task: call begin_task, and step at least generator_update_freq = "
                f"{self.generator_update_freq} times"
            )
        super().end_task()
        self.taught = 0
        self.solver.zero_grad(set_to_none=True)
        self.teacher = frozen(self.solver)

    def state_dict(self):
        return {**super().state_dict(), "steps": self.steps, "taught": self.taught}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.steps, self.taught = state["steps"], state["taught"]

    def tensors(self):
        models = {"solver": self.solver} if self.teacher is None else {"solver": self.solver, "teacher": self.teacher}
        found = {f"{name}.{k}": v.cpu() for name, model in models.items() for k, v in model.state_dict().items()}
        return {**super().tensors(), **found, **_moments("solver_optimizer", self.optimizer)}

    def load_tensors(self, found):
        super().load_tensors(found)
        _load_module(self.solver, found, "solver.")
        if self.tasks_done > 0:
            self.teacher = frozen(self.solver)
            _load_module(self.teacher, found, "teacher.")
        _load_moments("solver_optimizer", self.optimizer, found)


# -------------------------------------------------------------------------------------------- on the agent


class GenerativeReplayCL(CLAlgorithm):
    """Generative replay of conversations. While a domain is trained, a `TokenVAE` with the domain as condition learns
    windows of its conversations (pieces of `window` tokens, one after the other, with which of them the policy sampled)
    and rehearses the earlier domains on its own; of the domain only the generator and the frozen policy remain. While
    the n-th domain is trained, the policy is kept close to the frozen one on generated windows: replay_weight (1 - 1/n)
    KL(frozen || policy), a mean over the distributions of the tokens that the policy is to sample, is added to the loss
    of every step.

    window_batch: windows per optimiser step, over all ranks; generator_updates: updates of the generator after each
    GRPO step, each on BATCH windows of the domain and as many generated ones; generator_vocabulary: distinct tokens it
    can tell apart (one twice where it is both read and sampled), a window ends where there is no room for another.
    """

    stores_trajectories = True
    keeps_no_data = True
    BATCH = 16

    def __init__(
        self,
        task_order,
        replay_weight=4.0,
        window=256,
        window_batch=32,
        window_memory=500,
        generator_updates=6,
        generator_vocabulary=8192,
        generator_latent_dim=32,
        generator_components=10,
        generator_learning_rate=2e-3,
        micro_batch_tokens=16384,
        seed=0,
    ):
        at_least(2, window=window, generator_vocabulary=generator_vocabulary)
        at_least(1, window_batch=window_batch, window_memory=window_memory, generator_updates=generator_updates)
        above_zero(replay_weight=replay_weight, generator_learning_rate=generator_learning_rate)
        self.order, self.seed, self.replay_weight = task_order, seed, replay_weight
        self.window, self.window_batch, self.generator_updates = window, window_batch, generator_updates
        self.windows_at_once = max(1, micro_batch_tokens // window)
        with grpo.seeded("cpu", seed, 0):
            generator = TokenVAE(
                generator_vocabulary,
                window,
                latent_dim=generator_latent_dim,
                num_conditions=len(task_order),
                components=generator_components,
            )
        self.rehearsal = Rehearsal(generator, window_memory, generator_learning_rate, np.random.default_rng([seed, 2]))
        self.symbols = [0]  # what the generator's numbers stand for, 2 token + sampled; the first is the end
        self.numbers = {}  # the inverse
        self.teacher = None  # the policy at the end of the previous domain (grpo.snapshot)
        self.draws = 0  # batches generated and taught so far: the position of the random numbers
        self.generated = dict.fromkeys(task_order, 0)  # windows of each domain
        self.history = {}  # by domain trained: the means that `get_statistics` shows, and the bytes of what was dropped

    def extra_loss(self, trainer):
        if self.teacher is None or self.rehearsal.tasks_done == 0:  # the first domain, or none had conversations
            return None
        self.rehearsal.to(trainer.model.device)
        number = math.ceil(self.window_batch / grpo.world_size())  # as many on all ranks: a pass is one of all
        self.draws += 1
        with grpo.seeded(self.rehearsal.device, self.seed, 1, self.draws, grpo.rank()):
            windows, condition = self.rehearsal.generated(number)
        for k in condition.tolist():
            self.generated[self.order[k]] += grpo.world_size()
        parts = [self.as_tokens(part) for part in windows.split(self.windows_at_once)]
        with grpo.weights_of(trainer.model, self.teacher):
            head = grpo.frozen_head(trainer.model)
            taught = [grpo.hidden_states(trainer.model, *part) for part in parts]
        return self.divergence(trainer, parts, head, taught)

    def divergence(self, trainer, parts, head, taught):
        """Yields the loss part by part, so that each is learnt from and freed before the next is computed. Their sum is
        a mean over the distributions of all ranks, times the number of ranks, over which the loop takes a mean."""
        total = max(1, sum(grpo.all_gather_json(sum(map(len, taught)))))
        weight = self.replay_weight * replay_weights(self.rehearsal.tasks_done + 1)[1]
        divergence = 0.0
        for part, teacher in zip(parts, taught, strict=True):
            kl = grpo.distillation_kl(trainer.model, *part, head, teacher)
            divergence += kl.item()
            yield weight * kl * grpo.world_size() / total
        self.count(trainer.domain, "distillation KL", sum(grpo.all_gather_json(divergence)) / total)

    def post_step_hook(self, trainer, domain):
        """Offers the step's conversations to the memory and teaches the generator."""
        self.rehearsal.to(trainer.model.device)
        conversations = [
            [2 * token + (turn >= 0) for token, turn in zip(item["token_ids"], item["turns"], strict=True)]
            for item, _ in trainer.finished
            if item["domain"] == domain
        ]
        self.number(conversations)
        for conversation in conversations:
            for window in self.as_windows(conversation):
                self.rehearsal.offer(window, self.order.index(domain))
            unknown = any(symbol not in self.numbers for symbol in conversation)
            self.count(domain, "cut for lack of vocabulary", float(unknown))
        if not self.rehearsal.memory.items:
            return
        self.draws += 1
        with grpo.seeded(self.rehearsal.device, self.seed, 2, self.draws):
            for _ in range(self.generator_updates):
                self.count(domain, "generator loss", self.rehearsal.teach_generator(self.BATCH))

    def post_task_hook(self, trainer, domain):
        """The end of the domain: what it leaves is the generator and the frozen policy."""
        self.rehearsal.to(trainer.model.device)
        raw = [window for window, _ in self.rehearsal.memory.items]
        self.history.setdefault(domain, {})["raw bytes"] = sum(4 * int((window != 0).sum()) for window in raw)
        self.draws += 1
        with grpo.seeded(self.rehearsal.device, self.seed, 3, self.draws):
            self.rehearsal.end_task()
        if grpo.world_size() > 1 and raw:  # what differed between ranks in the last digit
            kept = self.rehearsal.old_generator.state_dict()
            for value in kept.values():
                torch.distributed.broadcast(value, 0)
            self.rehearsal.generator.load_state_dict(kept)
        self.teacher = grpo.snapshot(trainer.model)
        if raw:
            self.count(domain, "equal to the nearest real window", self.likeness(torch.stack(raw), domain))
        if grpo.rank() == 0:
            (trainer.run / f"generated_after_{domain}.txt").write_text(self.show_windows(trainer.tokenizer))

    def likeness(self, raw, domain, number=100) -> float:
        """How much of a generated window, in the mean, is what the real one (of `raw`) that is most like it has at the
        same places: how well the generator has learnt, and how little it has forgotten of whom."""
        condition = torch.full((number,), self.order.index(domain), device=self.rehearsal.device)
        with grpo.seeded(self.rehearsal.device, self.seed, 5):
            made = self.rehearsal.old_generator.generate(number, condition=condition).cpu()
        equal = [((raw == window) & (window != 0)).sum(1).max() / max(1, (window != 0).sum()) for window in made]
        return float(sum(equal)) / number

    def show_windows(self, tokenizer, number=3) -> str:
        """Generated windows, `number` of each domain that has ended; what the policy is to sample stands in << >>."""
        shown = []
        for k in self.rehearsal.old_conditions:
            condition = torch.full((number,), k, device=self.rehearsal.device)
            with grpo.seeded(self.rehearsal.device, self.seed, 4, k):
                windows = self.rehearsal.old_generator.generate(number, condition=condition)
            for ids, mask, sampled in zip(*(part.tolist() for part in self.as_tokens(windows)), strict=True):
                counted = list(zip(ids, sampled, strict=True))[: sum(mask)]
                pieces = itertools.groupby(counted, key=lambda pair: pair[1])
                texts = ((acts, tokenizer.decode([token for token, _ in piece])) for acts, piece in pieces)
                shown.append(f"[{self.order[k]}] " + "".join(f"<<{text}>>" if acts else text for acts, text in texts))
        return "\n\n".join(shown) + "\n"

    def number(self, conversations):
        """Gives new symbols a number, in sorted order, so that the numbers do not tell which followed which."""
        new = sorted({symbol for conversation in conversations for symbol in conversation} - set(self.numbers))
        generator = self.rehearsal.generator
        self.symbols += new[: generator.embedding.num_embeddings - len(self.symbols)]
        self.numbers = {symbol: number for number, symbol in enumerate(self.symbols) if number > 0}
        generator.used.fill_(len(self.symbols))

    def as_windows(self, conversation) -> list[Tensor]:
        """Pieces (window,) of a conversation, one after the other, in the generator's numbers; 0 at and behind a symbol
        that has none, and behind the conversation's end."""
        pieces = []
        for start in range(0, len(conversation) - 1, self.window):
            numbers = [self.numbers.get(symbol, 0) for symbol in conversation[start : start + self.window]]
            numbers = numbers[: numbers.index(0)] if 0 in numbers else numbers
            if numbers:
                pieces.append(torch.tensor(numbers + [0] * (self.window - len(numbers))))
        return pieces

    def as_tokens(self, windows):
        """(token ids, attention mask, which the policy is to sample), each (B, length of the longest window), of the
        generator's numbers; behind the end of a window nothing counts."""
        mask = (windows != 0).cumprod(1)
        longest = max(1, int(mask.sum(1).max()))
        windows, mask = windows[:, :longest], mask[:, :longest]
        symbols = torch.tensor(self.symbols, device=windows.device)[windows]
        return symbols // 2 * mask, mask, symbols % 2 * mask

    def count(self, domain, name, value):
        """Adds to the running mean `name` of a domain's training."""
        total = self.history.setdefault(domain, {}).setdefault(name, [0.0, 0])
        total[0] += value
        total[1] += 1

    def get_statistics(self):
        means = {}  # by name and the domain that was trained
        for domain, found in self.history.items():
            for name, value in found.items():
                if name != "raw bytes":
                    means.setdefault(name, {})[domain] = round(value[0] / value[1], 4)
        return {
            "windows generated": dict(self.generated),
            **means,
            "bytes kept": self.sizes(),
            "bytes of the windows dropped": sum(found.get("raw bytes", 0) for found in self.history.values()),
        }

    def sizes(self) -> dict:
        """Bytes of what is kept of the domains that have ended."""
        generator, teacher = self.rehearsal.old_generator, self.teacher
        return {
            "generator": sum(t.nbytes for t in generator.state_dict().values()) if generator is not None else 0,
            "frozen policy": sum(p.nbytes for p in teacher) if teacher is not None else 0,
        }

    def bytes_kept(self):
        return sum(self.sizes().values())

    def state_dict(self):
        mine = ("symbols", "draws", "generated", "history")
        return {"rehearsal": self.rehearsal.state_dict(), **{name: getattr(self, name) for name in mine}}

    def load_state_dict(self, state):
        self.symbols, self.draws = state["symbols"], state["draws"]
        self.numbers = {symbol: number for number, symbol in enumerate(self.symbols) if number > 0}
        self.generated, self.history = state["generated"], state["history"]
        self.rehearsal.load_state_dict(state["rehearsal"])

    def save(self, folder):
        save_file(self.rehearsal.tensors(), folder / "generator.safetensors")

    def load(self, folder):
        path = folder / "generator.safetensors"
        if not path.is_file():
            raise ValueError("it has no generator.safetensors")
        self.rehearsal.load_tensors(load_file(path))

    def snapshots(self):
        return {} if self.teacher is None else {"teacher": self.teacher}

    def load_snapshots(self, snapshots):
        if self.rehearsal.tasks_done > 0 and "teacher" not in snapshots:
            raise ValueError("it has no algorithm_teacher.safetensors")
        self.teacher = snapshots.get("teacher")


# ------------------------------------------------------- the experiment on split digits (python generative.py)


@dataclass(frozen=True)
class Heads:
    """Which logits count at the n-th task of `tasks`, of `classes` each (van de Ven and Tolias 2019, arXiv:1904.07734).
    Labels are 0 .. tasks * classes - 1 in every scenario.

    class   which of all classes so far: one head that grows
    domain  which of the task's classes, for all tasks the same head; the task is not known
    task    which of the task's classes, a head for each task; the task is known
    """

    scenario: str
    tasks: int
    classes: int

    @property
    def outputs(self):
        return self.classes if self.scenario == "domain" else self.tasks * self.classes

    def choice(self, logits, y, n):
        """(logits (B, k) that compete, the label among them) for labels y (B,) at the n-th task."""
        if self.scenario == "class":
            return logits[:, : n * self.classes], y
        if self.scenario == "task":
            logits = logits.unflatten(1, (self.tasks, self.classes))[torch.arange(len(y)), y // self.classes]
        return logits, y % self.classes

    def loss(self, logits, y, n):
        return F.cross_entropy(*self.choice(logits, y, n))

    def correct(self, logits, y, n):
        logits, label = self.choice(logits, y, n)
        return (logits.argmax(1) == label).float().mean().item()

    def pairs(self, student, teacher, n) -> list[tuple]:
        """(student's, teacher's logits) of each head that the teacher of the first n - 1 tasks knows."""
        if self.scenario == "class":
            return [(student[:, : n * self.classes], teacher[:, : (n - 1) * self.classes])]
        if self.scenario == "domain":
            return [(student, teacher)]
        heads = [slice(k * self.classes, (k + 1) * self.classes) for k in range(n - 1)]
        return [(student[:, head], teacher[:, head]) for head in heads]


class Unrehearsed(GenerativeReplay):
    """What must not be done: the generator learns the current task only. For the experiment."""

    def teach_generator(self, number, replayed=None):
        return self.generator.learn(self.generator_optimizers, [(1.0, *self.remembered(number))])


class LwF(GenerativeReplay):
    """Learning without forgetting (Li and Hoiem 2016, arXiv:1606.09282): the frozen solver labels current inputs."""

    def begin_task(self, x, conditions=None):
        """There is no generator to learn from them."""

    def end_task(self):
        self.tasks_done += 1
        self.teacher = frozen(self.solver)

    def step(self, x, y):
        n = self.tasks_done + 1
        current, replayed = replay_weights(n)
        loss = current * self.heads.loss(self.solver(x), y, n)
        if n > 1:
            loss = loss + replayed * self.replay_loss(x, n)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"solver": loss.item()}


# (class, type of generator, targets, conditional) of the arms that have a teacher; "mixture": with `fit_prior`.
REHEARSALS = {
    "unrehearsed": (Unrehearsed, "vae", "soft", False),
    "hard": (GenerativeReplay, "vae", "hard", False),
    "soft": (GenerativeReplay, "vae", "soft", False),
    "conditional_hard": (GenerativeReplay, "vae", "hard", True),
    "conditional_soft": (GenerativeReplay, "vae", "soft", True),
    "mixture": (GenerativeReplay, "vae", "soft", True),
    "conv": (GenerativeReplay, "conv", "soft", True),
    "gan": (GenerativeReplay, "gan", "soft", True),
    "lwf": (LwF, "vae", "soft", False),
}
ARMS = ("naive", *list(REHEARSALS)[:-1], "experience_replay", "lwf", "ewc", "online_ewc", "er_plus", "joint")
SCENARIOS = ("class", "domain", "task")
TASKS = 5


@dataclass
class Args:
    """Split digits: five tasks of two classes one after the other, in the class-, domain- and task-incremental
    scenario, with each kind of replay."""

    seeds: list[int] = field(default_factory=lambda: [0])
    """of the split into training and test images, weights, batches and samples"""
    arms: list[str] = field(default_factory=lambda: list(ARMS))
    """what is compared"""
    scenarios: list[str] = field(default_factory=lambda: list(SCENARIOS))
    """class, domain, task"""
    output: str = "runs/split_digits"
    """directory for results, table and pictures; what is finished there is not done again"""
    workers: int | None = None
    """arms at a time; default: one per CPU core"""
    mnist: str | None = None
    """directory with MNIST's four idx files, as published, packed or not; default: the digits of scikit-learn"""
    iterations: int = 200
    """steps per task"""
    batch_size: int = 64
    """current images per step, and as many replayed ones"""
    solver_hidden: int = 100
    """units in each of the solver's two hidden layers"""
    generator_hidden: int = 400
    """units in the generator's hidden layer"""
    latent_dim: int = 16
    """of the generator"""
    prior_components: int = 10
    """mixture: Gaussians per class of the prior that is fitted when a task ends"""
    learning_rate: float = 1e-3
    """of the solver (Adam)"""
    generator_learning_rate: float = 4e-3
    """of the generator"""
    generator_update_freq: int = 1
    """steps of the solver per update of the generator"""
    temperature: float = 2.0
    """of soft targets"""
    buffer_size: int = 100
    """images that experience_replay and er_plus keep"""
    ewc_lambda: float = 1e4
    """weight of the penalty of ewc and online_ewc"""
    er_plus_lambda: float = 1.0
    """er_plus: weight of EWC's penalty beside replay"""
    ewc_decay: float = 0.95
    """online_ewc: of the running Fisher information"""
    lwf_coef: float = 0.01
    """er_plus: weight of the distillation of the old solver's answers to current images"""


def load_images(args: Args) -> tuple[Tensor, Tensor, tuple]:
    """(images (N, pixels) in [0, 1], labels (N,), image shape)."""
    if args.mnist is None:
        from sklearn.datasets import load_digits

        x, y = load_digits(return_X_y=True)
        return torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y), (1, 8, 8)
    parts = [
        (read_idx(args.mnist, f"{k}-images-idx3-ubyte"), read_idx(args.mnist, f"{k}-labels-idx1-ubyte"))
        for k in ("train", "t10k")
    ]
    x, y = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return torch.tensor(x, dtype=torch.float32).flatten(1) / 255, torch.tensor(y, dtype=torch.long), (1, 28, 28)


def read_idx(folder, name) -> np.ndarray:
    """An array of bytes in the idx format: two zeros, type 8, number of dimensions, their sizes, the values."""
    for path, opened in ((Path(folder) / name, open), (Path(folder) / f"{name}.gz", gzip.open)):
        if path.is_file():
            with opened(path, "rb") as file:
                data = file.read()
            dimensions = data[3] if data[:3] == b"\0\0\x08" else 0
            shape = struct.unpack(f">{dimensions}I", data[4 : 4 + 4 * dimensions])
            if not dimensions or len(data) != 4 + 4 * dimensions + math.prod(shape):
                raise ValueError(f"{path} is not a whole idx file of bytes")
            return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
    raise ValueError(f"there is no {Path(folder) / name}, packed (.gz) or not")


def split_tasks(x, y, seed) -> list[tuple]:
    """(training images, labels, test images, labels) of each task; a fifth of each class is for testing."""
    rng, parts = np.random.default_rng(seed), []
    classes = 10 // TASKS
    for task in range(TASKS):
        train, test = [], []
        for label in range(task * classes, (task + 1) * classes):
            of_class = rng.permutation(np.flatnonzero((y == label).numpy()))
            test.append(of_class[: len(of_class) // 5])
            train.append(of_class[len(of_class) // 5 :])
        train, test = torch.tensor(np.concatenate(train)), torch.tensor(np.concatenate(test))
        parts.append((x[train], y[train], x[test], y[test]))
    return parts


def run_arm(args: Args, scenario, arm, seed) -> dict:
    """Trains one solver on all tasks. Returns R (R[i][j]: accuracy on task j after task i), images generated after each
    task, seconds, and the bytes kept for the next task."""
    start = time.perf_counter()
    x, y, shape = load_images(args)
    tasks = split_tasks(x, y, seed)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    heads = Heads(scenario, TASKS, 10 // TASKS)
    width = args.solver_hidden
    solver = nn.Sequential(
        nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, heads.outputs)
    )
    optimizer = torch.optim.Adam(solver.parameters(), args.learning_rate)
    rehearsal, teacher, buffer = None, None, Buffer(args.buffer_size)
    penalty = regularize.of_arm(arm, args)
    if arm in REHEARSALS:
        kind, generator_type, targets, conditional = REHEARSALS[arm]
        sizes = {"latent_dim": args.latent_dim}
        if generator_type != "conv":
            sizes["hidden_dims"] = (args.generator_hidden,)
        if arm == "mixture":
            sizes["components"] = args.prior_components
        if generator_type == "vae":
            sizes["dropout"] = 0.0
        generator = make_generator(generator_type, x.shape[1], shape, 10 if conditional else 0, **sizes)
        rehearsal = kind(
            solver,
            generator,
            heads,
            targets,
            args.temperature,
            batch_size=args.batch_size,
            generator_update_freq=args.generator_update_freq,
            learning_rate=args.learning_rate,
            generator_learning_rate=args.generator_learning_rate,
            rng=rng,
        )
    R, samples = [], []
    for n, (x_task, y_task, _, _) in enumerate(tasks, 1):
        if arm == "joint":
            x_task, y_task = (torch.cat([task[k] for task in tasks[:n]]) for k in (0, 1))
        if rehearsal:
            rehearsal.begin_task(x_task, y_task if rehearsal.generator.num_conditions else None)
        for _ in range(args.iterations):
            index = torch.from_numpy(rng.integers(len(x_task), size=args.batch_size))
            batch = (x_task[index], y_task[index])
            if rehearsal:
                rehearsal.step(*batch)
                continue
            loss = heads.loss(solver(batch[0]), batch[1], n)
            if buffer.items:
                old = [buffer.items[i] for i in sample(buffer, args.batch_size, rng=rng)]
                x_old, y_old = torch.stack([image for image, _ in old]), torch.tensor([label for _, label in old])
                current, replayed = replay_weights(n)
                loss = current * loss + replayed * heads.loss(solver(x_old), y_old, n)
            if penalty and n > 1:
                loss = loss + sum(penalty.penalty(solver.parameters()))
            if teacher:
                pairs = heads.pairs(solver(batch[0]), teacher(batch[0]), n)
                loss = loss + args.lwf_coef * soft_loss(pairs, args.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if rehearsal:
            rehearsal.end_task()
        if penalty:
            penalty.consolidate(solver, x_task[:, None], lambda model, image, n=n: surprise(model(image), heads, n))
        if arm == "er_plus":
            teacher = frozen(solver)
        if arm in ("experience_replay", "er_plus"):
            for image, label in zip(x_task, y_task.tolist(), strict=True):
                add(buffer, (image.clone(), label), label=label, rng=rng)
        with torch.no_grad():
            R.append(
                [
                    heads.correct(solver(x_test), y_test, TASKS if k >= n else n)
                    for k, (_, _, x_test, y_test) in enumerate(tasks)
                ]
            )
        if rehearsal and arm != "lwf":
            seen = rehearsal.old_conditions
            condition = torch.tensor(np.resize(seen, 10)) if seen else None
            images = rehearsal.old_generator.generate(10, condition=condition)
            samples.append([[round(value, 2) for value in image] for image in images.tolist()])
    kept = penalty.bytes_kept() if penalty else 0
    kept += sum(task[0].nbytes for task in tasks) if arm == "joint" else sum(image.nbytes for image, _ in buffer.items)
    modules = [teacher]
    if rehearsal:
        modules += [rehearsal.teacher] + ([rehearsal.old_generator] if arm != "lwf" else [])
    kept += sum(value.nbytes for module in modules if module for value in module.state_dict().values())
    job = {"scenario": scenario, "arm": arm, "seed": seed}
    return {**job, "R": R, "samples": samples, "seconds": time.perf_counter() - start, "bytes_kept": kept}


def surprise(logits, heads, n) -> Tensor:
    """Minus the log-probability (B,) of labels that the solver draws itself, of those that compete at the n-th task."""
    of_task = torch.full((len(logits),), (n - 1) * heads.classes)  # any label of the task: it tells its head
    competing = heads.choice(logits, of_task, n)[0]
    drawn = torch.distributions.Categorical(logits=competing.detach()).sample()
    return F.cross_entropy(competing, drawn, reduction="none")


def backward_transfer(R) -> float:
    return float(np.mean([R[-1][k] - R[k][k] for k in range(len(R) - 1)]))


def text_table(args: Args, found) -> str:
    """Average accuracy at the end of each scenario; of the first one backward transfer, seconds, size."""

    def cell(values):
        mean, half = over_seeds(values)
        return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"

    names = [
        *(f"{s}-incremental" for s in args.scenarios),
        f"backward transfer ({args.scenarios[0]})",
        "seconds",
        "kept, kB",
    ]
    lines = [f"| accuracy | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for arm in args.arms:
        results = {s: [r for r in found if r["arm"] == arm and r["scenario"] == s] for s in args.scenarios}
        columns = [cell([np.mean(r["R"][-1]) for r in rows]) for rows in results.values()]
        first = results[args.scenarios[0]]
        columns.append(cell([backward_transfer(r["R"]) for r in first]))
        columns += [f"{np.mean([r['seconds'] for r in first]):.0f}", f"{first[0]['bytes_kept'] / 1000:.0f}"]
        lines.append(f"| {arm} | {' | '.join(columns)} |")
    return "\n".join(lines)


def plot_results(args: Args, found, output):
    """samples.png: what the generators make after each task (first seed, first scenario). accuracy.png: accuracy on
    each task after each task, means over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.style.use(["petroff10", {"font.size": 8, "savefig.dpi": 200}])
    first = [r for r in found if r["scenario"] == args.scenarios[0]]
    drawn = [r for r in first if r["samples"] and r["seed"] == args.seeds[0]]
    if drawn:
        columns = min(4, len(drawn))
        rows = math.ceil(len(drawn) / columns)
        picture, panels = plt.subplots(
            rows, columns, figsize=(1.8 * columns, 1.15 * rows + 0.2), layout="constrained", squeeze=False
        )
        for axes in panels.flat[len(drawn) :]:
            axes.axis("off")
        for axes, r in zip(panels.flat, drawn, strict=False):
            images = np.array(r["samples"])
            side = math.isqrt(images.shape[-1])
            mosaic = images.reshape(*images.shape[:2], side, side).transpose(0, 2, 1, 3).reshape(len(images) * side, -1)
            axes.imshow(1 - mosaic, cmap="gray", vmin=0, vmax=1)
            axes.set(title=r["arm"], xticks=[], yticks=[side * (k + 0.5) for k in range(len(images))])
            axes.set_yticklabels(range(1, len(images) + 1), fontsize=6)
            axes.tick_params(length=0)
        picture.supylabel("after task", fontsize=8)
        picture.savefig(output / "samples.png")
        plt.close(picture)
    columns = math.ceil(len(args.arms) / 3)
    picture, panels = plt.subplots(
        3, columns, figsize=(1.5 * columns, 4.6), sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(args.arms) :]:
        axes.axis("off")
    for axes, arm in zip(panels.flat, args.arms, strict=False):
        R = np.mean([r["R"] for r in first if r["arm"] == arm], axis=0)
        for task in range(TASKS):
            line = ("-", "--", "-.", ":", (0, (5, 1)))[task]
            axes.plot(
                range(task + 1, TASKS + 1),
                R[task:, task],
                linestyle=line,
                marker=".",
                markersize=4,
                label=f"task {task + 1}",
            )
        axes.set(ylim=(-0.03, 1.03), xticks=range(1, TASKS + 1))
        axes.set_title(arm, fontsize=8)
        axes.grid(alpha=0.3)
    picture.supxlabel("tasks learnt", fontsize=8)
    picture.supylabel("accuracy", fontsize=8)
    handles, labels = panels.flat[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside right center", frameon=False)
    picture.savefig(output / "accuracy.png")
    plt.close(picture)


def check_args(args: Args):
    """Raises ValueError for settings that cannot work."""
    positive = "iterations batch_size solver_hidden generator_hidden latent_dim learning_rate generator_learning_rate"
    for name in f"{positive} generator_update_freq temperature buffer_size prior_components".split():
        if not 0 < getattr(args, name) < math.inf:
            raise ValueError(f"{name} must be greater than 0, got {getattr(args, name)}")
    for name, known in (("arms", ARMS), ("scenarios", SCENARIOS)):
        for value in getattr(args, name):
            if value not in known:
                raise ValueError(f"unknown {name[:-1]} {value!r}; choose from {', '.join(known)}")
    for name in ("arms", "scenarios", "seeds"):
        if not getattr(args, name) or len(set(getattr(args, name))) < len(getattr(args, name)):
            raise ValueError(f"{name} must name each of them once, got {getattr(args, name)}")
    if min(args.seeds) < 0 or (args.workers is not None and args.workers < 1):
        raise ValueError(f"seeds must be 0 or more and workers at least 1, got {args.seeds} and {args.workers}")
    check_coefficients(args.ewc_lambda, args.ewc_decay, args.lwf_coef, args.er_plus_lambda)
    load_images(args)


def run_experiment(args: Args):
    """All scenarios, arms and seeds, several at a time; then the table and pictures."""
    check_args(args)
    jobs = [(scenario, arm, seed) for seed in args.seeds for scenario in args.scenarios for arm in args.arms]
    found = run_jobs(args, run_arm, jobs)
    table = text_table(args, found)
    print(table)
    output = Path(args.output)
    (output / "table.md").write_text(table + "\n")
    rows = [[r["scenario"], r["arm"], r["seed"], i + 1, *row] for r in found for i, row in enumerate(r["R"])]
    write_csv(
        output / "accuracy.csv",
        ["scenario", "arm", "seed", "tasks learnt", *(f"task {k + 1}" for k in range(TASKS))],
        rows,
    )
    plot_results(args, found, output)


def main():
    run_command(tyro.cli(Args), run_experiment)


if __name__ == "__main__":
    main()
