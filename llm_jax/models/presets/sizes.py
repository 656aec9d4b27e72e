"""What presets have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from llm_jax.core.config import ConfigError, nearest
from llm_jax.models.heads import LanguageModel
from llm_jax.nn.embedding import Embed

PLAIN = Embed(scaled=False)
UNTIED = LanguageModel(tied=False)
Shape = TypeVar("Shape", bound=tuple)


def shape(sizes: Mapping[str, Shape], size: str) -> Shape:
    """The entry of that size. Raises `ConfigError` with the nearest ones."""
    if size not in sizes:
        raise ConfigError(f"has no size {size!r}: did you mean {nearest(size, list(sizes))}?", "preset")
    return sizes[size]
