"""What moves information between the places of a sequence; "none" is a real choice."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import flax.linen as nn

from llm_jax.core.config import Config
from llm_jax.nn.position import Position


@dataclass(frozen=True)
class Mixer(Config):
    """How tokens are mixed. The counts are of one layer of a model of that width."""

    abstract = True
    attends = False  # whether tokens look at each other by scores, which a position may turn or bias

    def build(self, position: Position, gain: float, dtype: Any, name: str) -> nn.Module:
        """The module `(x [B, L, D], Context) -> [B, L, D]`; gain: of its last matrix's initialisation."""
        raise NotImplementedError

    def parameters(self, width: int) -> int:
        """Trainable scalars."""
        return 0

    def entries(self, width: int) -> int:
        """Entries of matrices, each of which multiplies every token once."""
        return 0

    def scores(self, width: int) -> int:
        """Multiply-adds for each pair of a query and a key."""
        return 0

    def cached(self, width: int) -> int:
        """Numbers that the cache keeps of every token."""
        return 0

    def inner(self, width: int) -> int:
        """Numbers that the backward pass keeps of every token, besides scores."""
        return 0

    def turned(self, width: int) -> int | None:
        """Channels of a head that a positional scheme may turn; None where it turns none."""
        return None

    @property
    def causal(self) -> bool:
        """Whether no token sees a later one."""
        return True

    @property
    def heads_for_bias(self) -> int:
        """Heads that a bias on the scores is for."""
        return 1


@dataclass(frozen=True)
class NoMixing(Mixer):
    """Every token by itself: the control for what mixing adds."""
