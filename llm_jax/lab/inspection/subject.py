"""What is inspected: a model with its parameters, and a sequence that it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Batch
from llm_jax.data.tokenizers import Fitted
from llm_jax.models.model import Model, Params, token_table
from llm_jax.nn.losses import cross_entropy

SIGNS = str.maketrans({" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True)
class Subject:
    """A model to look at. name: as a title has it. tokenizer: None where none is known, and tokens are shown by their ids.

    batch: what it reads, one row as `sequence` makes it; None where nothing that needs a text is looked at. history: (step,
    parameters) of the checkpoints that there are, the oldest first.
    """

    name: str
    model: Model
    vocabulary: int
    params: Params
    tokenizer: Fitted | None = None
    batch: Batch | None = None
    history: Callable[[], Iterator[tuple[int, Params]]] | None = None

    @property
    def read(self) -> Batch:
        """The batch. Raises `ConfigError` where there is none."""
        if self.batch is None:
            raise ConfigError("is missing: this is a view of the model while it reads one", "text")
        return self.batch

    def piece(self, number: int) -> str:
        """What an id stands for, with signs for spaces and line ends; #5 for one that stands for no text."""
        found = self.tokenizer.piece_bytes[number] if self.tokenizer and number < self.tokenizer.vocabulary else b""
        text = found.decode("utf-8", "backslashreplace").translate(SIGNS)
        return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text) or f"#{number}"

    def pieces(self, ids: Sequence[int] | np.ndarray | jax.Array) -> list[str]:
        """What each id stands for."""
        return [self.piece(int(i)) for i in np.asarray(ids).reshape(-1)]

    def id(self, word: str) -> int:
        """The one token that a word is, alone or after a space; an id where there is no tokenizer. Raises `ConfigError`."""
        if self.tokenizer is None:
            if word.isdigit() and int(word) < self.vocabulary:
                return int(word)
            raise ConfigError(f"must be ids below {self.vocabulary}, for {self.name} has no tokenizer: got {word!r}", "words")
        for text in (word, f" {word}"):
            same = [i for i, piece in enumerate(self.tokenizer.piece_bytes) if piece == text.encode()]
            for ids in (same, self.tokenizer.encode(text)):
                if len(ids) == 1:
                    return int(ids[0])
        several = " + ".join(repr(piece) for piece in self.pieces(self.tokenizer.encode(word)))
        raise ConfigError(f"must be single tokens of the model's, and {word!r} is {several}: name another", "words")


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
    return np.asarray(token_table(model, params))


def words(model: Model) -> None:
    """Raises `ConfigError` unless the model scores token ids."""
    if not model.head.words:
        raise ConfigError(f"is {type(model.head).__name__}, which scores no token ids: this needs a language model's", "head")


def mean_loss(logits_BLV: jax.Array, batch: Batch) -> jax.Array:
    """-log p of the right token in nats, averaged over the places that count."""
    nll_BL = cross_entropy(logits_BLV, batch.targets)[0]
    weights = jnp.ones_like(nll_BL) if batch.weights is None else batch.weights
    return (nll_BL * weights).sum() / jnp.maximum(weights.sum(), 1e-30)
