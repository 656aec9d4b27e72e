"""Learning-rate schedules: a factor in [0, 1] on the peak learning rate, as a function of the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from llm_jax.core.config import Config, require, traced


@dataclass(frozen=True)
class Schedule(Config):
    """A linear warm-up, then what the subclass says. warmup: a fraction of all steps below 1, otherwise a number of steps."""

    abstract = True

    warmup: float = traced(0.05)

    def validate(self):
        require(self.warmup >= 0, "warmup", f"must be >= 0, got {self.warmup}")

    def __call__(self, step, total: int):
        """The factor at `step` (0-based, may be traced) of `total`: (step + 1) / warm-up steps at first, never above 1."""
        warm = jnp.asarray(jnp.where(self.warmup < 1, self.warmup * total, self.warmup), jnp.float32)
        step = jnp.asarray(step, jnp.float32)
        progress = jnp.clip((step - warm) / jnp.maximum(total - warm, 1.0), 0.0, 1.0)
        return jnp.minimum((step + 1) / jnp.maximum(warm, 1.0), 1.0) * self.after(step, progress, warm)

    def after(self, step, progress, warm):
        """The factor without warm-up; progress runs from 0 at its end to 1 at the end of training; `warm` is its steps."""
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(Schedule):
    """1 after warm-up."""

    def after(self, step, progress, warm):
        return jnp.ones_like(progress)


@dataclass(frozen=True)
class Decaying(Schedule):
    """A schedule that ends at `final`."""

    abstract = True

    final: float = traced(0.0)

    def validate(self):
        super().validate()
        require(0 <= self.final <= 1, "final", f"must be in [0, 1], got {self.final}")


@dataclass(frozen=True)
class Cosine(Decaying):
    """final + (1 - final) (1 + cos π·progress) / 2. Loshchilov & Hutter 2017."""

    final: float = traced(0.1)

    def after(self, step, progress, warm):
        return self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))


@dataclass(frozen=True)
class Linear(Decaying):
    """Straight to `final`. Bergsma et al. 2025 find that to zero is best."""

    def after(self, step, progress, warm):
        return 1 - (1 - self.final) * progress


@dataclass(frozen=True)
class Rsqrt(Schedule):
    """√(warm-up / step), which knows no end. Vaswani et al. 2017, §5.3."""

    def after(self, step, progress, warm):
        warm = jnp.maximum(warm, 1.0)
        return jnp.sqrt(warm / jnp.maximum(step + 1, warm))


FALLS: dict[str, Callable] = {"linear": lambda t: t, "sqrt": jnp.sqrt, "cosine": lambda t: 0.5 * (1 - jnp.cos(jnp.pi * t))}


@dataclass(frozen=True)
class WSD(Decaying):
    """Warm-up, stable, decay: 1 until the last `decay` of the time, then down to `final`. Hu et al. 2024, Hägele et al. 2024.

    shape: how it falls with t from 0 to 1: "linear" 1 - t, "sqrt" 1 - √t (fastest at first), "cosine" (1 + cos πt) / 2.
    """

    decay: float = traced(0.2)
    shape: Literal["linear", "sqrt", "cosine"] = "sqrt"

    def validate(self):
        super().validate()
        require(0 < self.decay <= 1, "decay", f"must be in (0, 1], got {self.decay}")

    def after(self, step, progress, warm):
        fallen = jnp.clip((progress - (1 - self.decay)) / self.decay, 0.0, 1.0)
        return 1 - (1 - self.final) * FALLS[self.shape](fallen)
