"""What every attention kernel is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from llm_jax.nn.masks import Mask, Places

MASKED = -1e30  # the score of a key that is not seen


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Bias:
    """What is added to the scores: `function(params, queries_BL, keys_BM) -> [B or 1, H, L, M]` float32 of places in the row.

    It is asked for blocks of places. Whatever is to be differentiated is in `params`: the function must not close over it.
    """

    function: Callable[[Any, jax.Array, jax.Array], jax.Array] = field(metadata={"static": True})
    params: Any = None

    def __call__(self, queries_BL: jax.Array, keys_BM: jax.Array) -> jax.Array:
        """The bias of a block."""
        return self.function(self.params, queries_BL, keys_BM)


@dataclass(frozen=True)
class Call:
    """The arguments of `attend`, with `scale` filled in and `key` None where nothing is dropped."""

    q_BLHK: jax.Array
    k_BMGK: jax.Array
    v_BMGV: jax.Array
    mask: Mask
    queries: Places
    keys: Places
    bias: Bias | None
    scale: Any
    soft_cap: float | None
    sinks_H: jax.Array | None
    rate: Any
    key: jax.Array | None

    @property
    def lengths(self) -> tuple[int, int]:
        """Of queries and keys."""
        return self.q_BLHK.shape[1], self.k_BMGK.shape[1]

    @property
    def counted(self) -> bool:
        """Whether queries and keys are counted from 0, so that what meets what is known before the program runs."""
        return self.queries.index is None and self.keys.index is None

    @property
    def packed(self) -> bool:
        """Whether positions in the document are given, besides places in the row."""
        return self.queries.position is not None or self.keys.position is not None

    @property
    def lonely(self) -> bool:
        """Whether a query may see nothing, as far as is known: with a key at its own place and one document, none does."""
        L, M = self.lengths
        return not self.counted or L > M or self.queries.segment is not None or self.keys.segment is not None

    @property
    def dtype(self) -> Any:
        """That of scores and sums: float32 at least."""
        return jnp.promote_types(self.q_BLHK.dtype, jnp.float32)

    def heads(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Scaled queries `[B, G, H/G, L, K]`, keys `[B, G, M, K]`, values `[B, G, M, V]`."""
        B, L, H, K = self.q_BLHK.shape
        G = self.k_BMGK.shape[2]
        q_BGRLK = (self.q_BLHK * jnp.asarray(self.scale, self.q_BLHK.dtype)).reshape(B, L, G, H // G, K).transpose(0, 2, 3, 1, 4)
        return q_BGRLK, self.k_BMGK.transpose(0, 2, 1, 3), self.v_BMGV.transpose(0, 2, 1, 3)


class Kernel(NamedTuple):
    """A way to compute attention, `[B, L, H, V]` of a call.

    refusal: the end of a sentence that says what it cannot do, or None. quadratic: whether it writes a mask or a bias out.
    shares_rows: whether it does by itself what `sequence` does for others, where a mesh splits rows along their length.
    """

    attend: Callable[[Call], jax.Array]
    refusal: Callable[[Call], str | None] = lambda call: None
    quadratic: Callable[[Call], bool] = lambda call: False
    shares_rows: bool = False
