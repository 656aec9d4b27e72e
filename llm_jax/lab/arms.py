"""How arms are named and composed, and the grids that they are tuned over."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_jax.core.config import ConfigError

Choices = Mapping[str, Mapping[str, Any]]  # dotted path → {arm name: value}


@dataclass(frozen=True)
class Arms:
    """Arm name → {dotted path: value}; what `product`, `zipped` and `chain` make and take."""

    changes: Mapping[str, Mapping[str, Any]]


def arms_of(choices: Choices | Arms) -> Arms:
    """`{path: {name: value}}` as arms; several paths are crossed."""
    if isinstance(choices, Arms):
        return choices
    for path, named in choices.items():
        if not isinstance(named, Mapping):
            raise ConfigError(f"must be {{name: value}}, got {named!r}", f"scientific[{path!r}]")
    return (
        product(*({path: named} for path, named in choices.items()))
        if len(choices) > 1
        else Arms({name: {path: value} for path, named in choices.items() for name, value in named.items()})
    )


def product(*parts: Choices | Arms) -> Arms:
    """Every combination, named "a+b"."""
    combined = itertools.product(*(arms_of(part).changes.items() for part in parts))
    return Arms(dict(_joined(items) for items in combined))


def zipped(*parts: Choices | Arms) -> Arms:
    """The first with the first, the second with the second, …; raises `ConfigError` unless all have as many."""
    lists = [list(arms_of(part).changes.items()) for part in parts]
    if len({len(items) for items in lists}) > 1:
        raise ConfigError(f"zipped needs parts of one length, got {', '.join(str(len(items)) for items in lists)}")
    return Arms(dict(_joined(items) for items in zip(*lists, strict=True)))


def chain(*parts: Choices | Arms) -> Arms:
    """All arms of all parts, one after another; raises `ConfigError` for a name that two parts share."""
    joined: dict[str, Mapping[str, Any]] = {}
    for part in parts:
        for name, changes in arms_of(part).changes.items():
            if name in joined:
                raise ConfigError(f"chain has two arms called {name!r}: rename one")
            joined[name] = changes
    return Arms(joined)


def _joined(items: Sequence[tuple[str, Mapping[str, Any]]]) -> tuple[str, dict[str, Any]]:
    changes: dict[str, Any] = {}
    for _, part in items:
        if set(part) & set(changes):
            raise ConfigError(f"two parts set {', '.join(sorted(set(part) & set(changes)))}: use chain for alternatives")
        changes |= part
    return "+".join(dict.fromkeys(name for name, _ in items)), changes


def log_grid(low: float, high: float, points: int) -> tuple[float, ...]:
    """`points` values from `low` to `high`, equally spaced in the logarithm, to three significant digits."""
    if not 0 < low <= high or points < 1:
        raise ConfigError(f"log_grid needs 0 < low <= high and points >= 1, got ({low}, {high}, {points})")
    if points == 1:
        return (low,)
    ratio = math.log(high / low) / (points - 1)
    return tuple(float(f"{low * math.exp(ratio * i):.3g}") for i in range(points))
