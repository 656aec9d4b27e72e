"""Rotary embeddings as config.json has them: `rope_parameters` of today's files, `rope_theta` and `rope_scaling` of older ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llm_jax.io.huggingface.fields import Fields
from llm_jax.nn.position import Rope
from llm_jax.nn.rope import DynamicScaling, LinearScaling, Llama3Scaling, Scaling, YarnScaling

THETA = 10_000.0


def read_rope(fields: Fields, *, theta: float = THETA, fraction: float | None = None) -> Rope:
    """The scheme of all layers. fraction: the default part of a head that is turned, for families in which that may be a part."""
    theta, part = _theta(fields, theta), _fraction(fields, fraction)
    inside = _older_scaling(fields)
    if inside is None and fields.get("rope_parameters", None) is None:
        return Rope(theta=theta, fraction=part)
    inside = inside or fields.inside("rope_parameters")
    return rope_of(inside, fields, theta=theta, fraction=None if fraction is None else part)


def rope_of(inside: Fields, fields: Fields, *, theta: float, fraction: float | None = None) -> Rope:
    """The scheme that an object such as `rope_parameters` describes; fields: what stands around it."""
    kind = inside.choose("rope_type" if "rope_type" in inside else "type", {name: name for name in SCALINGS}, "default")
    if "rope_type" in inside:
        inside.get("type", None)  # the older name of the same
    scaling = SCALINGS[kind](inside, fields)
    return Rope(theta=float(inside.get("rope_theta", theta)), fraction=_fraction(inside, fraction), scaling=scaling)


def _older_scaling(fields: Fields) -> Fields | None:
    """The object `rope_scaling`, where it is given."""
    return fields.inside("rope_scaling") if fields.get("rope_scaling", None) is not None else None


def _theta(fields: Fields, default: float) -> float:
    return float(fields.get("rope_theta", fields.get("rotary_emb_base", default)))


def _fraction(fields: Fields, default: float | None) -> float:
    """The part of a head that is turned; `None` as default: all of it, in families whose code turns no part."""
    if default is None:
        fields.expect("partial_rotary_factor", 1.0, 1, None)
        return 1.0
    return float(fields.get("partial_rotary_factor", fields.get("rotary_pct", default)))


# ── scalings ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _linear(inside: Fields, fields: Fields) -> Scaling:
    return LinearScaling(factor=float(inside.get("factor")))


def _dynamic(inside: Fields, fields: Fields) -> Scaling:
    return DynamicScaling(factor=float(inside.get("factor")), original_length=fields.get("max_position_embeddings"))


def _llama3(inside: Fields, fields: Fields) -> Scaling:
    return Llama3Scaling(
        factor=float(inside.get("factor")),
        low_frequency=float(inside.get("low_freq_factor")),
        high_frequency=float(inside.get("high_freq_factor")),
        original_length=_original(inside, fields),
    )


def _yarn(inside: Fields, fields: Fields) -> Scaling:
    original = _original(inside, fields)
    factor = inside.get("factor", None)
    factor = float(factor or fields.get("max_position_embeddings") / original)
    amplitude, mscale, mscale_all = (inside.get(name, None) or None for name in ("attention_factor", "mscale", "mscale_all_dim"))
    if amplitude is None and (mscale is None) != (mscale_all is None):
        amplitude = 0.1 * math.log(factor) + 1  # one of the two alone leaves the amplitude as it is without them
    return YarnScaling(
        factor=factor,
        original_length=original,
        beta_fast=float(inside.get("beta_fast", None) or 32),
        beta_slow=float(inside.get("beta_slow", None) or 1),
        attention_factor=amplitude,
        mscale=mscale,
        mscale_all_dim=mscale_all,
        truncate=inside.get("truncate", True),
    )


def _original(inside: Fields, fields: Fields) -> int:
    """The length that was trained on first; where it stands beside the object, that counts."""
    within = inside.get("original_max_position_embeddings", None)
    return fields.get("original_max_position_embeddings", None) or within or fields.get("max_position_embeddings")


SCALINGS: dict[str, Callable[[Fields, Fields], Scaling | None]] = {
    "default": lambda inside, fields: None,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def write_rope(rope: Rope) -> dict[str, Any]:
    """The keys of a config.json that describe it."""
    scaling, longest = rope.scaling, {}
    if isinstance(scaling, DynamicScaling):
        longest = {"max_position_embeddings": scaling.original_length}
    elif isinstance(scaling, (YarnScaling, Llama3Scaling)):
        longest = {"max_position_embeddings": math.ceil(scaling.original_length * scaling.factor)}
    return {"rope_parameters": rope_object(rope)} | longest


def rope_object(rope: Rope) -> dict[str, Any]:
    """What stands in `rope_parameters`."""
    part = {} if rope.fraction == 1 else {"partial_rotary_factor": rope.fraction}
    return {"rope_theta": rope.theta} | part | _written(rope.scaling)


def _written(scaling: Scaling | None) -> dict[str, Any]:
    match scaling:
        case None:
            return {"rope_type": "default"}
        case LinearScaling(factor=factor):
            return {"rope_type": "linear", "factor": factor}
        case DynamicScaling(factor=factor):
            return {"rope_type": "dynamic", "factor": factor}
        case Llama3Scaling():
            turns = {"low_freq_factor": scaling.low_frequency, "high_freq_factor": scaling.high_frequency}
            original = {"original_max_position_embeddings": scaling.original_length}
            return {"rope_type": "llama3", "factor": scaling.factor} | turns | original
        case YarnScaling():
            found = {"rope_type": "yarn", "factor": scaling.factor, "original_max_position_embeddings": scaling.original_length}
            for name in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"):
                value = getattr(scaling, name)
                found |= {} if value is None else {name: value}
            return found
    return {"rope_type": type(scaling).__name__}  # one that transformers does not have: reading it back says so
