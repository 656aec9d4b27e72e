"""Losses of single tokens as functions of their logits, in float32 at least: which of them a model is trained by is a choice."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llm_jax.core.config import Config, require, require_positive, traced
from llm_jax.nn.kernels.product import row_sum, softmax, widened

SMALLEST = 1e-12  # of 1 - p where a power or a logarithm is taken of it: rounding may leave less than zero


def cross_entropy(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """-log softmax(logits)[target] in nats and log Σ exp(logits); `[..., V]` and `[...]` ids to `[...]` float32, twice."""
    logits = widened(logits)
    highest = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    log_sum = jnp.log(row_sum(jnp.exp(logits - highest)))
    target = _of_target(logits, targets)
    # the highest and the target's logit cancel before the small logarithm is added, so that large logits cost no digits
    return (log_sum + (highest - target))[..., 0], (log_sum + highest)[..., 0]


# ── what a model may be trained by ───────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Criterion(Config):
    """A loss of each token: `(logits [..., V], targets [...]) -> [...]` float32."""

    abstract = True

    def __call__(self, logits: jax.Array, targets: jax.Array) -> jax.Array:
        raise NotImplementedError


@dataclass(frozen=True)
class CrossEntropy(Criterion):
    """-log p, p the target's probability, in nats."""

    def __call__(self, logits, targets):
        return cross_entropy(logits, targets)[0]


@dataclass(frozen=True)
class Focal(Criterion):
    """-(1 - p)^gamma · log p, which counts tokens less the better they are predicted (Lin et al. 2017, eq. 4)."""

    gamma: float = traced(2.0)

    def validate(self):
        require(self.gamma >= 0, "gamma", f"must be >= 0, got {self.gamma}")

    def __call__(self, logits, targets):
        nll = cross_entropy(logits, targets)[0]
        return jnp.power(jnp.maximum(-jnp.expm1(-nll), SMALLEST), self.gamma) * nll


@dataclass(frozen=True)
class Brier(Criterion):
    """Σ over ids of (p - [is the target])², the mean squared error of probabilities, from 0 to 2 (Brier 1950)."""

    def __call__(self, logits, targets):
        p = softmax(widened(logits))
        return (row_sum(jnp.square(p)) + (1 - 2 * _of_target(p, targets)))[..., 0]


@dataclass(frozen=True)
class SquaredError(Criterion):
    """The mean over ids of (logit - height · [is the target])², the target's counted `weight` times (Hui & Belkin 2021).

    Logits are regressed to numbers and need not be log-probabilities: scores that read them as such punish it.
    """

    height: float = traced(15.0)
    weight: float = traced(1.0)

    def validate(self):
        require_positive(self, "height", "weight")

    def __call__(self, logits, targets):
        logits = widened(logits)
        target = _of_target(logits, targets)
        total = row_sum(jnp.square(logits)) + (self.weight * jnp.square(target - self.height) - jnp.square(target))
        return total[..., 0] / logits.shape[-1]


def smoothed(nll: jax.Array, log_sum: jax.Array, logits: jax.Array, smoothing: jax.Array | float) -> jax.Array:
    """(1 - s) · nll + s · the mean over ids of -log p: the cross-entropy to a target softened by s (Szegedy et al. 2016, §7)."""
    return (1 - smoothing) * nll + smoothing * (log_sum - widened(logits).mean(-1))


# ── distillation ─────────────────────────────────────────────────────────────────────────────────────────────────────
def distillation(logits: jax.Array, teacher: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """T² · KL(teacher ‖ student), both softened by the temperature T, in nats; `[..., V]` twice to `[...]`. Hinton et al. 2015, §2.

    T² keeps gradients as large as those of the cross-entropy. The teacher gets none.
    """
    log_p = jax.nn.log_softmax(widened(logits) / temperature)
    log_q = jax.nn.log_softmax(widened(jax.lax.stop_gradient(teacher)) / temperature)
    return temperature**2 * (jnp.exp(log_q) * (log_q - log_p)).sum(-1)


def top_k_distillation(logits: jax.Array, ids: jax.Array, log_q: jax.Array, *, temperature: float = 1.0) -> jax.Array:
    """The same from the teacher's k most probable ids alone, `[..., k]`, with all the others as one outcome; `[..., V]` to `[...]`.

    log_q: their log-probabilities at this temperature, as a teacher that is stored has them. It is the divergence of what is
    left when the others are no longer told apart: at most the full one, the same at k = V - 1, and zero only where the student
    gives each of the k what the teacher does. Raises `ValueError` where there are no others.
    """
    if ids.shape[-1] >= logits.shape[-1]:
        raise ValueError(f"top_k_distillation: k={ids.shape[-1]} of {logits.shape[-1]} ids leaves no others: call distillation()")
    log_p = jax.nn.log_softmax(widened(logits) / temperature)
    log_q = widened(jax.lax.stop_gradient(log_q))
    known = (jnp.exp(log_q) * (log_q - jnp.take_along_axis(log_p, ids, -1))).sum(-1)
    # the student's others are summed, not subtracted from one, which would leave rounding where they are improbable
    rest_p = jax.nn.logsumexp(jnp.put_along_axis(log_p, ids, -jnp.inf, -1, inplace=False), -1)
    rest_q = jnp.log(jnp.maximum(1 - jnp.exp(log_q).sum(-1), SMALLEST))
    return temperature**2 * (known + jnp.exp(rest_q) * (rest_q - rest_p))


def _of_target(x: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x, targets[..., None], -1)
