"""A pretraining trial as three pure functions of its traced values: init, steps, evaluate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from llm_jax.core import sharding
from llm_jax.core.config import Config, require, require_positive, substitute, traced
from llm_jax.core.types import Batch, Metrics, Probed
from llm_jax.data.tokenizers import Fitted
from llm_jax.models import experts
from llm_jax.models.model import Model, abstract_parameters, initial_parameters, matrix_axes, parameter_roles, token_table
from llm_jax.models.predict import hidden_states, predict
from llm_jax.nn.embedding import neighbour_purity
from llm_jax.objectives.objective import Objective
from llm_jax.optim.gradients import clip_by_global_norm
from llm_jax.optim.optimizers import Optimizer
from llm_jax.optim.schedules import Schedule
from llm_jax.train.probe import linear_probe
from llm_jax.train.step import TrainState, make_train_step, many_steps

Values = Mapping[str, Any]  # dotted path → scalar, traced under jit


@dataclass(frozen=True)
class Train(Config):
    """How long and how: what the numbers of a run depend on besides model, data and optimizer.

    steps: optimizer updates. accumulate: micro-batches an update. clip: largest global gradient norm, None for no clipping.
    average: decay of the parameters' moving average, which is then what evaluation sees; None for none.
    log_every: steps between records. steps_per_dispatch: updates in one call of the program; None lets the platform choose.
    """

    steps: int = 1000
    accumulate: int = 1
    clip: float | None = traced(1.0)
    average: float | None = None
    log_every: int = 50
    steps_per_dispatch: int | None = None

    def validate(self):
        require_positive(self, "steps", "accumulate", "clip", "log_every", "steps_per_dispatch")
        require(self.average is None or 0 < self.average < 1, "average", f"must be in (0, 1), got {self.average}")


class Recipe(Protocol):
    """What of an experiment a trial reads."""

    @property
    def seed(self) -> int: ...
    @property
    def model(self) -> Model: ...
    @property
    def objective(self) -> Objective: ...
    @property
    def optimizer(self) -> Optimizer: ...
    @property
    def schedule(self) -> Schedule: ...
    @property
    def train(self) -> Train: ...
    @property
    def evaluation(self) -> Any: ...


R = TypeVar("R", bound=Config)


@dataclass(frozen=True)
class Trial:
    """Pure functions of `values` (path → scalar), which take the place of the recipe's traced fields.

    init: `values -> TrainState`. steps: `(values, state, batches [k, B, L]) -> (state, metrics summed over k)`.
    evaluate: `(values, state, batches [n, B, L]) -> metrics summed over n`, without dropout; of what is `Probed`, those of a
    linear probe of the hidden states.
    parameters: abstract, boxed with their logical axes.
    """

    init: Callable[[Values], TrainState]
    steps: Callable[[Values, TrainState, Batch], tuple[TrainState, Metrics]]
    evaluate: Callable[[Values, TrainState, Batch | Probed], Metrics]
    parameters: Any


def trial(recipe: Any, tokens: Fitted) -> Trial:
    """The trial of a `Recipe` over the ids of a tokenizer, of which it asks how much text, and what kind, each stands for.

    The tokenizer must know the objective's `specials`.
    """
    vocabulary = tokens.vocabulary
    abstract = abstract_parameters(recipe.model, vocabulary)
    plain = sharding.unbox(abstract)
    known = {"roles": parameter_roles(plain), "axes": matrix_axes(plain), "rates": recipe.model.rates(vocabulary)}

    def optimizer(recipe: Recipe):
        factor = lambda step: recipe.schedule(step, recipe.train.steps)  # noqa: E731
        return clip_by_global_norm(recipe.train.clip), recipe.optimizer.build(factor, **known)

    def chained(recipe: Recipe):
        import optax

        clip, update = optimizer(recipe)
        return optax.with_extra_args_support(optax.chain(clip, update))

    def init(values: Values) -> TrainState:
        given = substitute(recipe, values)
        key = jax.random.key(given.seed)
        params = initial_parameters(recipe.model, vocabulary, jax.random.fold_in(key, 0))
        average = params if recipe.train.average is not None else None
        return TrainState(jnp.zeros((), jnp.int32), params, chained(given).init(params), average, jax.random.fold_in(key, 1))

    def posed(given: Recipe, batch: Batch, keys_B: jax.Array) -> Batch:
        return given.objective.pose(batch, keys_B, model=given.model, tokens=tokens)

    def loss(given: Recipe, *, train: bool):
        byte_lengths = jnp.asarray(tokens.byte_lengths)

        def call(params, batch: Batch, rng):
            apply = partial(predict, given.model, vocabulary, train=train)
            return given.objective.loss(apply, params, batch, model=given.model, rng=rng, byte_lengths=byte_lengths, train=train)

        return call

    def steps(values: Values, state: TrainState, batches: Batch):
        given = substitute(recipe, values)
        step = make_train_step(
            loss(given, train=True),
            chained(given),
            accumulate=recipe.train.accumulate,
            average=recipe.train.average,
            rowwise=given.model.rowwise,
            averaged=lambda opt_state, params: given.optimizer.evaluation_params(opt_state[1], params),
            settle=partial(experts.settle, given.model),
            pose=lambda batch, rng: posed(given, batch, jax.random.split(rng, batch.tokens.shape[0])),
        )
        return many_steps(step, state, batches)

    def evaluate(values: Values, state: TrainState, batches: Batch | Probed) -> Metrics:
        given = substitute(recipe, values)
        params = _evaluated(given, state)
        if isinstance(batches, Probed):
            features = partial(hidden_states, given.model, vocabulary, params)
            return linear_probe(features, batches, len(recipe.evaluation.probe.classes))
        score = loss(given, train=False)
        # of rows, so that what is hidden depends on no batch size, and on no trial's seed
        numbers = jnp.arange(math.prod(batches.tokens.shape[:2])).reshape(batches.tokens.shape[:2])

        def scored(part: tuple[Batch, jax.Array]) -> Metrics:
            batch, numbers_B = part
            keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(numbers_B)
            return score(params, posed(given, batch, keys_B), state.key)[1]

        per_batch = jax.lax.map(scored, (batches, numbers))
        scores = given.objective.concluded(jax.tree.map(lambda x: x.sum(0), per_batch))
        if recipe.evaluation.neighbours:
            scores |= neighbour_purity(token_table(recipe.model, params), tokens.kinds, recipe.evaluation.neighbours)
        return scores

    return Trial(init, steps, evaluate, abstract)


def _evaluated(given: Recipe, state: TrainState) -> Any:
    """The parameters that are scored: their moving average, where there is one."""
    return given.optimizer.evaluation_params(state.opt_state[1], state.params) if state.average is None else state.average
