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
    part = _fraction(fields, fraction)
    outside = Rope(theta=_theta(fields, theta), fraction=part)
    found = [
        rope_of(fields.inside(name), fields, theta=outside.theta, fraction=None if fraction is None else part)
        for name in ("rope_parameters", "rope_scaling")
        if fields.get(name, None) is not None
    ]
    if not found:
        return outside
    fields.agree("rope_scaling", found[-1], found[0])
    fields.agree("rope_theta", _theta(fields, found[0].theta), found[0].theta)
    return found[0]


def rope_of(inside: Fields, fields: Fields, *, theta: float, fraction: float | None = None) -> Rope:
    """The scheme that an object such as `rope_parameters` describes; fields: what stands around it."""
    kind = inside.choose("rope_type" if "rope_type" in inside else "type", {name: name for name in SCALINGS}, "default")
    if "rope_type" in inside:
        inside.get("type", None)  # the older name of the same
    scaling = SCALINGS[kind](inside, fields)
    return Rope(theta=float(inside.get("rope_theta", theta)), fraction=_fraction(inside, fraction), scaling=scaling)


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
def write_rope(rope: Rope, *, partial: bool = False) -> dict[str, Any]:
    """The keys of a config.json that describe it, for transformers 5 and for 4. partial: where a part is the default."""
    longest = {"max_position_embeddings": rope.scaling.original_length} if isinstance(rope.scaling, DynamicScaling) else {}
    part = {"partial_rotary_factor": rope.fraction} if partial else {}
    return {"rope_parameters": rope_object(rope) | part, "rope_theta": rope.theta} | part | rope_scaling(rope) | longest


def rope_scaling(rope: Rope) -> dict[str, Any]:
    """The key of transformers 4 for a scaling, if there is one."""
    return {} if rope.scaling is None else {"rope_scaling": _written(rope.scaling)}


def usual_length(rope: Any) -> dict[str, int]:
    """The longest text that a scaling is made for, where that changes nothing and is known."""
    scaling = rope.scaling if isinstance(rope, Rope) else None
    if not isinstance(scaling, (YarnScaling, Llama3Scaling)):
        return {}
    return {"max_position_embeddings": math.ceil(scaling.original_length * scaling.factor)}


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
