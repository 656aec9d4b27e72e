"""What is inspected: a model with its parameters, and a sequence that it reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Batch
from llm_jax.models.intervention import unrolled
from llm_jax.models.model import Model, Params, unstack_layers


@dataclass(frozen=True)
class Subject:
    """A model to look at. pieces: what each id stands for, as shown; encode: text → ids, None where no tokenizer is known."""

    name: str
    model: Model
    vocabulary: int
    params: Params
    pieces: Sequence[str]
    encode: Callable[[str], Sequence[int]] | None = None

    def ids(self, text: str) -> np.ndarray:
        """`[L]`: the tokens of a text. Raises `ConfigError` where there is no tokenizer."""
        if self.encode is None:
            raise ConfigError("has no tokenizer here: give the token ids themselves with --ids=1,2,3", self.name)
        return np.asarray(self.encode(text), np.int32)

    def unrolled(self) -> Subject:
        """The same with every layer of the parameters alone."""
        return Subject(
            self.name, unrolled(self.model), self.vocabulary, unstack_layers(self.params, self.model), self.pieces, self.encode
        )


def sequence(model: Model, tokens: Sequence[int], *, inputs: Sequence[int] | None = None, start: int = 0) -> Batch:
    """One row `[1, L]` and what is right at each place.

    Of a causal model that is the next token, and the last place has none (weight 0); of an encoder the token itself. An
    encoder-decoder reads `inputs` and, after the id `start`, the tokens, each of which is right where it is yet to come.
    """
    row = np.asarray(tokens, np.int32)[None]
    if row.size == 0:
        raise ConfigError("must have at least one token, got none", "tokens")
    if model.encodes:
        if inputs is None or len(inputs) == 0:
            raise ConfigError("must be given, since the model reads an input besides the sequence that it continues", "inputs")
        shifted = np.concatenate([[[start]], row[:, :-1]], 1)
        return Batch(jnp.asarray(shifted, jnp.int32), jnp.asarray(row), inputs=jnp.asarray(inputs, jnp.int32)[None])
    if not model.causal:
        return Batch(jnp.asarray(row), jnp.asarray(row))
    weights = np.ones(row.shape, np.float32)
    weights[:, -1] = 0
    return Batch(jnp.asarray(row), jnp.asarray(np.roll(row, -1, 1)), jnp.asarray(weights))


def embedding_table(model: Model, params: Params) -> np.ndarray:
    """`[V, D]` float32: what each token enters the model as, before positions and norms."""
    tree = params["embedding"]
    table = jnp.asarray(tree["embedding"], jnp.float32)
    if "projection" in tree:
        table = table @ tree["projection"]["kernel"].astype(jnp.float32)
    return np.asarray(table * model.width**0.5 if model.embedding.scaled else table)


def places(stack: str) -> str:
    """The stack's name in captions: nothing where there is only one."""
    return f"{stack}, " if stack else ""


def words(model: Model) -> None:
    """Raises `ConfigError` unless the model scores token ids."""
    if not model.head.words:
        raise ConfigError(f"is {type(model.head).__name__}, which scores no token ids: this needs a language model's", "head")


def mean_loss(logits_BLV: jax.Array, batch: Batch) -> jax.Array:
    """-log p of the right token in nats, averaged over the places that count."""
    from llm_jax.nn.losses import cross_entropy

    nll_BL = cross_entropy(logits_BLV, batch.targets)[0]
    weights = jnp.ones_like(nll_BL) if batch.weights is None else batch.weights
    return (nll_BL * weights).sum() / jnp.maximum(weights.sum(), 1e-30)
