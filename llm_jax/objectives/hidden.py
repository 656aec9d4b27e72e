"""What is common to objectives that hide a part of the text and ask for it."""

from __future__ import annotations

from dataclasses import dataclass

from llm_jax.objectives.next_token import NextToken


@dataclass(frozen=True)
class Hidden(NextToken):
    """Scored are the tokens that were hidden, not the text: bits per byte of it mean nothing, and are not reported."""

    abstract = True
    scores = tuple(name for name in NextToken.scores if name != "bits_per_byte")

    def loss(self, apply, params, batch, **given):
        loss, metrics = super().loss(apply, params, batch, **given)
        return loss, metrics if given["train"] else {name: metrics[name] for name in Hidden.scores}
