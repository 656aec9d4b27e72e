"""The one training step: a loss and an optimizer in, a pure function of (state, batch) out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jax.core.types import Batch, Metrics, Weighted

Loss = Callable[[Any, Batch, jax.Array], tuple[Weighted, Metrics]]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything training carries from step to step; `average` is the running mean of the parameters, or None."""

    step: jax.Array
    params: Any
    opt_state: Any
    average: Any
    key: jax.Array


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    accumulate: int = 1,
    average: float | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A step that descends the token-weighted mean of `loss` over the whole batch.

    loss: `(params, batch, rng) -> (Weighted, metrics)`. accumulate: the batch's rows are taken in that many micro-batches,
    whose sums are added before the division, so the result is that of the whole batch however targets are spread.
    average: decay of the exponential moving average of the parameters (Polyak & Juditsky 1992), or None for none.
    The metrics are Weighted sums: "loss", "grad_norm" and whatever `loss` reports, as "train/…".
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.key, state.step)
        grads, total, metrics, last = _summed_gradients(loss, state.params, batch, rng, accumulate)
        grads = jax.tree.map(lambda g: g / jnp.maximum(total.weight, 1e-30), grads)
        updates, opt_state = optimizer.update(
            grads,
            state.opt_state,
            state.params,
            value=total.mean,
            key=jax.random.fold_in(rng, 1),
            loss_fn=lambda params: loss(params, *last)[0].mean,
        )
        params = optax.apply_updates(state.params, updates)
        mean = state.average
        if average is not None:
            mean = jax.tree.map(lambda m, p: average * m + (1 - average) * p, mean, params)
        metrics = {f"train/{name}": value for name, value in metrics.items()}
        metrics["train/grad_norm"] = Weighted.of(optax.tree.norm(grads))
        return replace(state, step=state.step + 1, params=params, opt_state=opt_state, average=mean), metrics

    return step


def _summed_gradients(loss: Loss, params: Any, batch: Batch, rng: jax.Array, accumulate: int):
    """Gradient of the summed loss, the Weighted loss, its metrics, and the last (batch, rng) that was differentiated."""

    def total(params, batch, rng):
        weighted, metrics = loss(params, batch, rng)
        return weighted.total, (weighted, {"loss": weighted} | metrics)

    differentiate = jax.grad(total, has_aux=True)
    if accumulate == 1:
        grads, (weighted, metrics) = differentiate(params, batch, rng)
        return grads, weighted, metrics, (batch, rng)
    micro = jax.tree.map(lambda x: x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:]), batch)
    rngs = jax.random.split(rng, accumulate)

    def body(carry, inputs):
        return jax.tree.map(jnp.add, carry, differentiate(params, *inputs)), None

    zeros = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(differentiate, params, *jax.tree.map(lambda x: x[0], (micro, rngs)))
    )
    (grads, (weighted, metrics)), _ = jax.lax.scan(body, zeros, (micro, rngs))
    return grads, weighted, metrics, jax.tree.map(lambda x: x[-1], (micro, rngs))


def many_steps(step: Callable, state: TrainState, batches: Batch) -> tuple[TrainState, Metrics]:
    """One step for every leading entry of `batches` `[k, B, L]`; the metrics are summed over them."""
    steps = jax.tree.leaves(batches)[0].shape[0]
    if steps == 1:
        return step(state, jax.tree.map(lambda x: x[0], batches))
    state, metrics = jax.lax.scan(step, state, batches)
    return state, jax.tree.map(lambda x: x.sum(0), metrics)
