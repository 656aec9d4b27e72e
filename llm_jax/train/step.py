"""The one training step: a loss and an optimizer in, a pure function of (state, batch) out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llm_jax.core.sharding import sum_over_data
from llm_jax.core.types import Batch, Metrics, Weighted
from llm_jax.optim import gradients

Loss = Callable[..., tuple[Weighted, Metrics]]  # (params, batch, rng, and what is frozen)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything training carries from step to step.

    average: the running mean of the parameters, or None; guard: what `train.guard` has seen, or None.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    average: Any
    key: jax.Array
    guard: Any = None


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformationExtraArgs,
    *,
    accumulate: int = 1,
    average: float | None = None,
    rowwise: bool = False,
    averaged: Callable[[Any, Any], Any] = lambda opt_state, params: params,
    settle: Callable[[Any, Any], tuple[Any, Metrics]] = lambda params, routing: (params, {}),
    pose: Callable[[Batch, jax.Array], Batch] = lambda batch, rng: batch,
    frozen: tuple[Any, ...] = (),
    guarded: Callable[..., tuple[TrainState, Metrics]] = lambda old, new, metrics, **seen: (new, metrics),
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A step that descends the token-weighted mean of `loss` over the whole batch.

    loss: `(params, batch, rng, *frozen) -> (Weighted, metrics)`; frozen: arrays that are not trained. accumulate: the batch's rows
    are taken in that many micro-batches, whose sums are added before the division, so the result is that of the whole batch however
    targets are spread.
    average: decay of the exponential moving average of the parameters (Polyak & Juditsky 1992), or None for none.
    rowwise: the loss is a sum over rows that know nothing of each other, and draws no random numbers, which must not depend on how
    many devices share the rows. averaged:
    `(opt_state, params) -> parameters` that the average is of. settle: `(params, routing) -> (params, metrics)` after the update,
    where the loss reports "routing", which it has summed over the batch. pose: `(batch, rng) -> batch` that the loss is of; it sees
    the whole batch, so that it may draw random numbers however micro-batches and devices share the rows. guarded: `(old state, new
    state, metrics, loss, norm) -> (state, metrics)`, the last word on each update.
    The metrics are Weighted sums: "loss", "grad_norm" and whatever `loss` reports, as "train/…".
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(state.key, state.step)
        batch = pose(batch, jax.random.fold_in(rng, 2))
        sums = partial(_summed_gradients, loss, rng=rng, accumulate=accumulate)
        grads, total, metrics = (sum_over_data(sums) if rowwise else sums)((state.params, *frozen), batch)
        grads = jax.tree.map(lambda g: g / jnp.maximum(total.weight, 1e-30), grads)
        last = (batch, rng) if accumulate == 1 else jax.tree.map(lambda x: x[-1], _micro_batches(batch, rng, accumulate))
        updates, opt_state = optimizer.update(
            grads,
            state.opt_state,
            state.params,
            value=total.mean,
            key=jax.random.fold_in(rng, 1),
            loss_fn=lambda params: loss(params, *last, *frozen)[0].mean,
        )
        params = optax.apply_updates(state.params, updates)
        if "routing" in metrics:
            params, found = settle(params, metrics.pop("routing"))
            metrics |= found
        mean = state.average
        if average is not None:
            mean = gradients.average(mean, averaged(opt_state, params), average)
        metrics = {f"train/{name}": value for name, value in metrics.items()}
        norm = optax.tree.norm(grads)
        metrics["train/grad_norm"] = Weighted.of(norm)
        new = replace(state, step=state.step + 1, params=params, opt_state=opt_state, average=mean)
        return guarded(state, new, metrics, loss=total.mean, norm=norm)

    return step


def _summed_gradients(loss: Loss, given: tuple[Any, ...], batch: Batch, *, rng: jax.Array, accumulate: int):
    """Gradient of the summed loss, the Weighted loss, and its metrics. given: the parameters, and what is frozen."""
    params, *frozen = given

    def total(params, batch, rng):
        weighted, metrics = loss(params, batch, rng, *frozen)
        return weighted.total, (weighted, {"loss": weighted} | metrics)

    def differentiate(micro: tuple[Batch, jax.Array]):
        grads, (weighted, metrics) = jax.grad(total, has_aux=True)(params, *micro)
        return grads, weighted, metrics

    if accumulate == 1:
        return differentiate((batch, rng))
    micro = _micro_batches(batch, rng, accumulate)
    first = jax.eval_shape(differentiate, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), first)
    return jax.lax.scan(lambda sums, m: (jax.tree.map(jnp.add, sums, differentiate(m)), None), zeros, micro)[0]


def _micro_batches(batch: Batch, rng: jax.Array, accumulate: int) -> tuple[Batch, jax.Array]:
    """The batch's rows and the key, each split in `accumulate` along a leading axis."""
    rows = jax.tree.map(lambda x: x.reshape(accumulate, x.shape[0] // accumulate, *x.shape[1:]), batch)
    return rows, jax.random.split(rng, accumulate)


def many_steps(step: Callable, state: TrainState, batches: Batch) -> tuple[TrainState, Metrics]:
    """One step for every leading entry of `batches` `[k, B, L]`; the metrics are summed over them."""
    steps = jax.tree.leaves(batches)[0].shape[0]
    if steps == 1:
        return step(state, jax.tree.map(lambda x: x[0], batches))
    state, metrics = jax.lax.scan(step, state, batches)
    return state, jax.tree.map(lambda x: x.sum(0), metrics)
