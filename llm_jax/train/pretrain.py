"""A pretraining trial as three pure functions of its traced values: init, steps, evaluate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp

from llm_jax.core import sharding
from llm_jax.core.config import Config, ConfigError, require, require_positive, substitute, traced
from llm_jax.core.types import Batch, Metrics, Predictions, Probed
from llm_jax.data.tokenizers import Fitted
from llm_jax.models import experts
from llm_jax.models.model import Model, abstract_parameters, initial_parameters, matrix_axes, parameter_roles, token_table
from llm_jax.models.predict import hidden_states, predict
from llm_jax.nn.embedding import neighbour_purity
from llm_jax.objectives.objective import Apply, Objective
from llm_jax.optim.gradients import clip_by_global_norm
from llm_jax.optim.optimizers import Optimizer
from llm_jax.optim.schedules import Schedule
from llm_jax.train import rollback  # noqa: F401  so that all guards are known
from llm_jax.train.guard import Guard, NoGuard
from llm_jax.train.probe import linear_probe
from llm_jax.train.step import TrainState, make_train_step, many_steps

Values = Mapping[str, Any]  # dotted path → scalar, traced under jit


@dataclass(frozen=True)
class Train(Config):
    """How long and how: what the numbers of a run depend on besides model, data and optimizer.

    steps: optimizer updates. accumulate: micro-batches an update. clip: largest global gradient norm, None for no clipping.
    average: decay of the parameters' moving average, which is then what evaluation sees; None for none.
    log_every: steps between records. steps_per_dispatch: updates in one call of the program; None lets the platform choose.
    guard: what is done about updates that would do harm.
    """

    steps: int = 1000
    accumulate: int = 1
    clip: float | None = traced(1.0)
    average: float | None = None
    log_every: int = 50
    steps_per_dispatch: int | None = None
    guard: Guard = field(default_factory=NoGuard)

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
class Teacher:
    """A model that the objective asks in training, and that is not trained. vocabulary: ids it has rows for."""

    model: Model
    vocabulary: int


@dataclass(frozen=True)
class Trial:
    """Pure functions of `values` (path → scalar), which take the place of the recipe's traced fields.

    init: `values -> TrainState`. steps: `(values, state, batches [k, B, L], teacher's parameters or None) -> (state, metrics summed
    over k)`.
    evaluate: `(values, state, batches [n, B, L]) -> metrics summed over n`, without dropout; of what is `Probed`, those of a
    linear probe of the hidden states.
    parameters: abstract, boxed with their logical axes.
    """

    init: Callable[[Values], TrainState]
    steps: Callable[..., tuple[TrainState, Metrics]]
    evaluate: Callable[[Values, TrainState, Batch | Probed], Metrics]
    parameters: Any


def _asked(model: Model, vocabulary: int, teacher: Teacher | None, taught: Any, *, train: bool) -> Apply:
    """What an objective calls: the model, and in training the teacher beside it, whose parameters are `taught`."""
    own = partial(predict, model, vocabulary, train=train)
    if teacher is None or not train:
        return own

    def both(params: Any, batch: Batch, rng: jax.Array) -> Predictions:
        try:
            said = predict(teacher.model, teacher.vocabulary, taught, batch, rng, train=False)
        except ConfigError as error:  # of its own settings, as a length that is too much for it
            raise ConfigError(f"cannot read these rows: {error}", "objective.teacher") from None
        return replace(own(params, batch, rng), teacher=said)

    return both


def _loss(recipe: Any, tokens: Fitted, teacher: Teacher | None = None, *, scored: str | None = None) -> Callable:
    """`(params, batch, rng, values, teacher's parameters) -> (Weighted, metrics)` of the recipe's objective in training.

    scored: or in evaluation, of the objective whose scores begin like this. Nothing traced comes from outside, where the rows may
    lie otherwise.
    """
    byte_lengths, train = jnp.asarray(tokens.byte_lengths), scored is None

    def loss(params: Any, batch: Batch, rng: jax.Array, values: Values, taught: Any = None):
        given = substitute(recipe, values)
        objective = given.objective if scored is None else given.objective.evaluated[scored]
        apply = _asked(given.model, tokens.vocabulary, teacher, taught, train=train)
        return objective.loss(apply, params, batch, model=given.model, rng=rng, byte_lengths=byte_lengths, train=train)

    return loss


def _scores(recipe: Any, tokens: Fitted, values: Values, params: Any, key: jax.Array, batches: Batch) -> Metrics:
    """What evaluation reports of batches `[n, B, L]`."""
    objectives = substitute(recipe, values).objective.evaluated
    losses = {prefix: _loss(recipe, tokens, scored=prefix) for prefix in objectives}
    # of rows, so that what is hidden depends on no batch size, and on no trial's seed
    numbers = jnp.arange(math.prod(batches.tokens.shape[:2])).reshape(batches.tokens.shape[:2])

    def each(part: tuple[Batch, jax.Array]) -> dict[str, Metrics]:
        batch, numbers_B = part
        keys_B = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(numbers_B)
        posed = {prefix: own.pose(batch, keys_B, model=recipe.model, tokens=tokens) for prefix, own in objectives.items()}
        return {prefix: loss(params, posed[prefix], key, values)[1] for prefix, loss in losses.items()}

    sums = jax.tree.map(lambda x: x.sum(0), jax.lax.map(each, (batches, numbers)))
    concluded = {prefix: own.concluded(sums[prefix]) for prefix, own in objectives.items()}
    return {prefix + name: value for prefix, found in concluded.items() for name, value in found.items()}


def trial(recipe: Any, tokens: Fitted, teacher: Teacher | None = None) -> Trial:
    """The trial of a `Recipe` over the ids of a tokenizer, of which it asks how much text, and what kind, each stands for.

    The tokenizer must know the objective's `specials`, and the teacher be the one that it is `taught_by`.
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
        zero, own_key, guard = jnp.zeros((), jnp.int32), jax.random.fold_in(key, 1), recipe.train.guard.start()
        return TrainState(zero, params, chained(given).init(params), average, own_key, guard)

    def steps(values: Values, state: TrainState, batches: Batch, taught: Any = None):
        given = substitute(recipe, values)

        def pose(batch: Batch, rng: jax.Array) -> Batch:
            keys_B = jax.random.split(rng, batch.tokens.shape[0])
            return given.objective.pose(batch, keys_B, model=given.model, tokens=tokens)

        step = make_train_step(
            _loss(recipe, tokens, teacher),
            chained(given),
            accumulate=recipe.train.accumulate,
            average=recipe.train.average,
            rowwise=given.model.rowwise and (teacher is None or teacher.model.rowwise),
            averaged=lambda opt_state, params: given.optimizer.evaluation_params(opt_state[1], params),
            settle=partial(experts.settle, given.model),
            pose=pose,
            frozen=(values, taught),
            guarded=recipe.train.guard.guarded,
        )
        return many_steps(step, state, batches)

    def evaluate(values: Values, state: TrainState, batches: Batch | Probed) -> Metrics:
        given = substitute(recipe, values)
        params = _evaluated(given, state)
        if isinstance(batches, Probed):
            features = partial(hidden_states, given.model, vocabulary, params)
            return linear_probe(features, batches, len(recipe.evaluation.probe.classes))
        scores = _scores(recipe, tokens, values, params, state.key, batches)
        if recipe.evaluation.neighbours:
            scores |= neighbour_purity(token_table(recipe.model, params), tokens.kinds, recipe.evaluation.neighbours)
        return scores

    return Trial(init, steps, evaluate, abstract)


def _evaluated(given: Recipe, state: TrainState) -> Any:
    """The parameters that are scored: their moving average, where there is one."""
    return given.optimizer.evaluation_params(state.opt_state[1], state.params) if state.average is None else state.average
