"""Dropout (Srivastava et al. 2014): where, at which rate; a rate of zero costs nothing, a traced one may vary in a population."""

from dataclasses import dataclass, fields

import jax
import jax.numpy as jnp

from llm_jax.core.config import Config, require_fraction, traced


@dataclass(frozen=True)
class Dropout(Config):
    """Rates: of the embedded tokens, the attention weights, each branch before it joins the residual, the hidden units.

    layer: of whole branches, each sequence for itself ("stochastic depth", Huang et al. 2016; LayerDrop, Fan et al. 2020).
    """

    embedding: float = traced(0.0)
    attention: float = traced(0.0)
    residual: float = traced(0.0)
    ffn: float = traced(0.0)
    layer: float = traced(0.0)

    def validate(self):
        require_fraction(self, "embedding", "attention", "residual", "ffn", "layer")

    def rates(self) -> dict[str, float]:
        """Site → rate wherever it is not known to be zero."""
        sites = {field.name: getattr(self, field.name) for field in fields(self)}
        return {site: rate for site, rate in sites.items() if not (isinstance(rate, (int, float)) and rate == 0)}


def dropout(x: jax.Array, rate, key: jax.Array | None, *, whole: int = 0) -> jax.Array:
    """Zeroes entries with probability `rate` and divides the rest by 1 - rate; the identity without a key.

    whole: that many last axes are kept or dropped together.
    """
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape[: x.ndim - whole] + (1,) * whole)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
