"""The optimizers, each a configuration that builds its update rule; optax does the arithmetic wherever it knows it.

Every learning rate is the peak; the schedule's factor multiplies it, and weight decay is decoupled and multiplied by the
scheduled learning rate (Loshchilov & Hutter 2019, as PyTorch does it). Fields declared `traced` may differ within one program.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import optax
import optax.contrib

from llm_jax.core.config import Config, require, require_fraction, require_positive, traced
from llm_jax.optim.gradients import Factor, decayed, multiplied, scale_by_adam, scheduled
from llm_jax.optim.matrices import matrix_by_matrix, sizes, where_present
from llm_jax.optim.orthogonal import orthogonal_momentum
from llm_jax.optim.second_order import branching, hutchinson, scale_by_soap


@dataclass(frozen=True)
class Optimizer(Config):
    """An update rule. slots: float32 numbers it keeps for each parameter, for memory estimates. scale_free: an entry's update
    does not grow with its gradient, as Adam's."""

    abstract = True
    slots = 2
    scale_free = False
    weight_decay = 0.0  # a field where the optimizer has it

    learning_rate: float = traced(1e-3)

    def validate(self):
        require_positive(self, "learning_rate")
        require(self.weight_decay >= 0, "weight_decay", f"must be >= 0, got {self.weight_decay}")

    def rule(self, roles: Any, axes: Any) -> optax.GradientTransformation:
        """Gradients to updates at learning rate 1, without decay."""
        raise NotImplementedError

    def build(self, factor: Factor, *, roles: Any, axes: Any, rates: Any = None) -> optax.GradientTransformationExtraArgs:
        """The whole transformation. factor: step → fraction of the peak; roles, axes: what each parameter is
        (`models.model.parameter_roles`, `matrix_axes`); rates: what its learning rate is multiplied by, decay not. Its update
        takes the extra arguments value, loss_fn and key. Raises `ConfigError` for rates that are not meant for this rule."""
        known = rates is None or self.scale_free
        require(
            known, "model.mup", f"has learning rates for Adam and its kin, not for {type(self).__name__}: take AdamW(), or no mup"
        )
        parts = self.rule(roles, axes), multiplied(rates), decayed(self.weight_decay, roles), scheduled(self.learning_rate, factor)
        return optax.with_extra_args_support(optax.chain(*parts))

    def evaluation_params(self, state: Any, params: Any) -> Any:
        """The parameters to evaluate, given the state of what `build` returned."""
        return params


@dataclass(frozen=True)
class SGD(Optimizer):
    """θ ← θ - η g."""

    slots = 0
    learning_rate: float = traced(1e-1)

    def rule(self, roles, axes):
        return optax.identity()


@dataclass(frozen=True)
class Momentum(Optimizer):
    """m ← μ m + g; θ ← θ - η m, or with Nesterov's look-ahead - η (g + μ m). Polyak 1964, Sutskever et al. 2013."""

    slots = 1
    learning_rate: float = traced(1e-1)
    momentum: float = traced(0.9)
    nesterov: bool = False

    def validate(self):
        super().validate()
        require_fraction(self, "momentum")

    def rule(self, roles, axes):
        return optax.trace(self.momentum, nesterov=self.nesterov)


@dataclass(frozen=True)
class Adam(Optimizer):
    """m̂ / (√v̂ + ε) with bias-corrected moments. Kingma & Ba 2015."""

    scale_free = True

    b1: float = traced(0.9)
    b2: float = traced(0.99)
    epsilon: float = 1e-8

    def validate(self):
        super().validate()
        require_fraction(self, "b1", "b2")
        require_positive(self, "epsilon")

    def rule(self, roles, axes):
        return scale_by_adam(self.b1, self.b2, self.epsilon)


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay. Loshchilov & Hutter 2019."""

    weight_decay: float = traced(0.1)


@dataclass(frozen=True)
class Adafactor(Optimizer):
    """Adam's second moment from its row and column means, no first moment. Shazeer & Stern 2018.

    relative: steps are multiplied by the parameter's root mean square, so that the learning rate is a relative change.
    smallest: both dimensions must be at least this to be factored.
    """

    slots = 0
    learning_rate: float = traced(1e-2)
    weight_decay: float = traced(0.0)
    decay_exponent: float = 0.8
    clip: float = 1.0
    relative: bool = True
    smallest: int = 32

    def validate(self):
        super().validate()
        require_positive(self, "decay_exponent", "clip", "smallest")

    def rule(self, roles, axes):
        return matrix_by_matrix(
            optax.chain(
                optax.scale_by_factored_rms(decay_rate=self.decay_exponent, min_dim_size_to_factor=self.smallest),
                optax.clip_by_block_rms(self.clip),
                optax.scale_by_param_block_rms() if self.relative else optax.identity(),
            ),
            roles,
            axes,
        )


@dataclass(frozen=True)
class Lion(Optimizer):
    """The sign of an interpolated momentum. Chen et al. 2023."""

    slots = 1
    scale_free = True
    learning_rate: float = traced(3e-4)
    b1: float = traced(0.9)
    b2: float = traced(0.99)
    weight_decay: float = traced(0.1)

    def validate(self):
        super().validate()
        require_fraction(self, "b1", "b2")

    def rule(self, roles, axes):
        return optax.scale_by_lion(self.b1, self.b2)


@dataclass(frozen=True)
class Sophia(Optimizer):
    """clip(m̂ / max(γ h, ε), ±1) with h the running mean of Hutchinson's estimate of the Hessian's diagonal, made every `interval`
    steps from the loss of the last micro-batch. Liu et al. 2023, Sophia-H.

    A new estimate serves from the next step on (optax; algorithm 3 of the paper uses it at once), so the first step is a sign.
    Entries without positive curvature move by the learning rate, the others by less: γ sets how many. The variant with
    Gauss–Newton–Bartlett estimates would need labels sampled from the model, which a scalar loss does not give.
    """

    learning_rate: float = traced(1e-3)
    b1: float = traced(0.965)
    b2: float = traced(0.99)
    gamma: float = traced(0.01)
    epsilon: float = 1e-12
    interval: int = 10
    weight_decay: float = traced(0.1)

    def validate(self):
        super().validate()
        require_fraction(self, "b1", "b2")
        require_positive(self, "gamma", "epsilon", "interval")

    def rule(self, roles, axes):
        return branching(
            optax.contrib.sophia(
                learning_rate=-1.0,  # optax applies the sign of descent here, `scheduled` does in this file
                b1=self.b1,
                b2=self.b2,
                eps=self.epsilon,
                gamma=self.gamma,
                update_interval=self.interval,
                weight_decay=0.0,
                hessian_diagonal_fn=hutchinson(),
            )
        )


@dataclass(frozen=True)
class MatrixOptimizer(Optimizer):
    """A rule for weight matrices; embeddings, the output layer and vectors take Adam at the same learning rate."""

    abstract = True

    b1: float = traced(0.9)
    b2: float = traced(0.99)
    weight_decay: float = traced(0.1)

    def matrix_rule(self, axes: Any) -> optax.GradientTransformation:
        """The rule for matrices; `axes` is a function from their updates to each one's (input axes, output axes)."""
        raise NotImplementedError

    def validate(self):
        super().validate()
        require_fraction(self, "b1", "b2")

    def rule(self, roles, axes):
        labels = jax.tree.map(lambda role: "matrix" if role == "matrix" else "other", roles)
        other = scale_by_adam(self.b1, self.b2)
        return optax.partition({"matrix": self.matrix_rule(lambda updates: where_present(axes, updates)), "other": other}, labels)


@dataclass(frozen=True)
class Muon(MatrixOptimizer):
    """Nesterov momentum, orthogonalised by Newton–Schulz iterations. Jordan et al. 2024.

    Updates are scaled by `size` · √max(inputs, outputs), so that their root mean square is `size`, AdamW's typical one, and both
    work at the same learning rates (Liu et al. 2025, Muon is Scalable, §2.2). b1, b2: of Adam for everything else.
    """

    slots = 1
    momentum: float = traced(0.95)
    iterations: int = 5
    size: float = traced(0.2)

    def validate(self):
        super().validate()
        require_fraction(self, "momentum")
        require_positive(self, "iterations", "size")

    def matrix_rule(self, axes):
        def resize(updates, state, params=None):
            return jax.tree.map(lambda u, pair: u * (self.size * math.sqrt(max(sizes(u, pair)))), updates, axes(updates)), state

        return optax.chain(
            orthogonal_momentum(self.momentum, self.iterations, axes),
            optax.GradientTransformation(lambda params: optax.EmptyState(), resize),
        )


@dataclass(frozen=True)
class SOAP(MatrixOptimizer):
    """Adam in the slowly turning eigenbasis of Shampoo's preconditioner. Vyas et al. 2024, algorithm 3.

    frequency: steps between QR iterations of the basis. largest: a side longer than this is not turned.
    """

    slots = 6
    b1: float = traced(0.95)
    b2: float = traced(0.95)
    frequency: int = 10
    largest: int = 4096

    def validate(self):
        super().validate()
        require_positive(self, "frequency", "largest")

    def matrix_rule(self, axes):
        return scale_by_soap(axes, b1=self.b1, b2=self.b2, frequency=self.frequency, largest=self.largest)


@dataclass(frozen=True)
class ScheduleFreeAdamW(Optimizer):
    """AdamW whose schedule is replaced by interpolating with an average of the iterates. Defazio et al. 2024.

    Gradients are taken at y = (1 - b1) z + b1 x, z follows AdamW without momentum, x is the average of z weighted by the
    square of the learning rate, and is what evaluation sees. It wants a constant schedule after warm-up.
    """

    scale_free = True

    learning_rate: float = traced(3e-3)
    b1: float = traced(0.9)
    b2: float = traced(0.99)
    epsilon: float = 1e-8
    weight_decay: float = traced(0.1)

    def validate(self):
        super().validate()
        require_fraction(self, "b2")
        require(0 < self.b1 < 1, "b1", f"must be in (0, 1), got {self.b1}")
        require_positive(self, "epsilon")

    def rule(self, roles, axes):
        return optax.scale_by_rms(self.b2, self.epsilon, eps_in_sqrt=False, bias_correction=True)

    def build(self, factor, *, roles, axes, rates=None):
        base = super().build(factor, roles=roles, axes=axes, rates=rates)
        return optax.contrib.schedule_free(
            base, lambda count: self.learning_rate * factor(count - 1), b1=self.b1
        )  # optax counts from 1

    def evaluation_params(self, state, params):
        return optax.contrib.schedule_free_eval_params(state, params)
