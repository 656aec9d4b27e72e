"""What every objective is: a batch and a model in, weighted sums out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax

from llm_jax.core.config import Config
from llm_jax.core.types import Batch, Metrics, Predictions, Weighted
from llm_jax.data.tokenizers import Fitted, Special

Apply = Callable[[Any, Batch, jax.Array], Predictions]  # (params, batch, rng)


class Says(Protocol):
    """What an objective must know of a model's head."""

    words: bool  # it scores token ids


class Predicts(Protocol):
    """What an objective must know of a model."""

    @property
    def causal(self) -> bool: ...  # no output depends on a later token
    @property
    def sees_later(self) -> str: ...  # what of it makes an output depend on a later token, or nothing
    @property
    def prefix_mask(self) -> str: ...  # where it has a mask for a prefix, if it has
    @property
    def encodes(self) -> bool: ...  # it reads an input besides
    @property
    def head(self) -> Says: ...


@dataclass(frozen=True)
class Objective(Config):
    """What a model is trained for."""

    abstract = True
    scores: ClassVar[tuple[str, ...]] = ()  # what evaluation reports

    @property
    def specials(self) -> tuple[Special, ...]:
        """Special tokens that it writes into what the model reads; the vocabulary has room for them."""
        return ()

    @property
    def taught_by(self) -> str | None:
        """The folder of a trained model that reads every batch of training too; what it says is `Predictions.teacher`."""
        return None

    @property
    def evaluated(self) -> Mapping[str, Objective]:
        """What goes before the names of scores → the objective whose they are, which poses and scores the rows of evaluation."""
        return {"": self}

    def check(self, model: Predicts) -> None:
        """Raises `ConfigError` unless the model can be trained for it."""

    def pose(self, batch: Batch, keys_B: jax.Array, *, model: Predicts, tokens: Fitted) -> Batch:
        """The batch with something hidden or moved, as the model is to read it; called under jit, once a step, before `loss`.

        keys: one a row, so that what becomes of a row does not depend on those beside it; evaluation gives row n of a split
        the same one every time, whatever the seed of the trial. tokens: the tokenizer, with `specials`. Raises `ConfigError`
        where the rows are too long for it.
        """
        return batch

    def lengths(self, length: int, *, model: Predicts, packed: bool) -> tuple[int, int]:
        """What becomes of rows of `length` tokens: how long those are that the model says something of, and those of its input.

        packed: they have segments. The second is 0 where there is no encoder.
        """
        return length, length if model.encodes else 0

    def loss(
        self,
        apply: Apply,
        params: Any,
        batch: Batch,
        *,
        model: Predicts,
        rng: jax.Array,
        byte_lengths: jax.Array,
        train: bool,
    ) -> tuple[Weighted, Metrics]:
        """The summed loss over its weight, and metrics. byte_lengths `[V]`: bytes of text that each id stands for.

        In training a metric "routing" is what `Predictions.routing` holds.
        """
        raise NotImplementedError

    def concluded(self, sums: Metrics) -> Metrics:
        """What evaluation reports, from the metrics of `loss` summed over all batches: for scores that are no mean over batches."""
        return sums
