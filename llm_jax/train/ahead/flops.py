"""FLOPs of a traced program: every product in its jaxpr, as often as it is done.

XLA's own count takes the body of a scan once. Here it counts `length` times, a branch as much as the costliest one, the body of a
`shard_map` once for each device, and that of a Pallas kernel once for each point of its grid, or what the kernel says of itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from jax.extend import core


@dataclass(frozen=True)
class Flops:
    """Of all devices together. products: of matrix products and convolutions; grouped: of products of rows with one of several
    matrices each, as experts have them; kernels: of products inside Pallas kernels, all blocks of their grids counted; uncounted:
    loops whose number of turns the program decides, counted once."""

    products: float = 0.0
    grouped: float = 0.0
    kernels: float = 0.0
    uncounted: int = 0

    @property
    def total(self) -> float:
        """All of them."""
        return self.products + self.grouped + self.kernels

    def __add__(self, other: Flops) -> Flops:
        return Flops(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def times(self, count: float) -> Flops:
        """Done so often."""
        return Flops(self.products * count, self.grouped * count, self.kernels * count, self.uncounted)


def of_jaxpr(jaxpr: Any) -> Flops:
    """The FLOPs of a `Jaxpr` or `ClosedJaxpr`: 2 for each multiply-add, nothing for what is done element by element."""
    return _sum(_of_equation(equation) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _sum(parts: Iterable[Flops]) -> Flops:
    return sum(parts, Flops())


def _of_equation(equation: Any) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name == "ragged_dot_general":
        return Flops(grouped=_ragged_dot(equation))
    if name in PRODUCTS:
        return Flops(products=PRODUCTS[name](equation))
    if name in CONTROL:
        return CONTROL[name](equation)
    return _sum(of_jaxpr(inner) for inner in _called(params)) if name not in UNCALLED else Flops()


def _called(params: Mapping[str, Any]) -> list[Any]:
    """The jaxprs that an equation calls once: `jit`, `remat`, `custom_vjp_call` and others."""
    values = [one for value in params.values() for one in (value if isinstance(value, (tuple, list)) else [value])]
    return [one for one in values if isinstance(one, (core.Jaxpr, core.ClosedJaxpr))]


# ── products ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _dot_general(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, out = equation.invars[0].aval, equation.outvars[0].aval
    return 2.0 * math.prod(out.shape) * math.prod(left.shape[i] for i in contracted)


def _ragged_dot(equation: Any) -> float:
    """Every row meets one of the matrices; where rows are contracted, each adds to one of the products."""
    left, right = (v.aval for v in equation.invars[:2])
    numbers = equation.params["ragged_dot_dimension_numbers"]
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    shared = {*contracted, *batch, *numbers.rhs_group_dimensions}
    return 2.0 * math.prod(left.shape) * math.prod(n for i, n in enumerate(right.shape) if i not in shared)


def _convolution(equation: Any) -> float:
    kernel, out = equation.invars[1].aval, equation.outvars[0].aval
    features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(out.shape) * math.prod(kernel.shape) / features


PRODUCTS = {
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
}


# ── control flow ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _scan(equation: Any) -> Flops:
    return of_jaxpr(equation.params["jaxpr"]).times(equation.params["length"])


def _while(equation: Any) -> Flops:
    body = of_jaxpr(equation.params["body_jaxpr"])
    turns = _turns(equation)
    return body.times(turns) if turns is not None else replace(body, uncounted=body.uncounted + (body.total > 0))


def _turns(equation: Any) -> int | None:
    """How often a loop goes round that counts by a constant from one constant up to another (`fori_loop`), or None."""
    cond, body = (equation.params[f"{part}_jaxpr"].jaxpr for part in ("cond", "body"))
    consts, taken = equation.params["cond_nconsts"], equation.params["body_nconsts"]
    if len(cond.eqns) != 1 or cond.eqns[0].primitive.name != "lt" or cond.eqns[0].invars[0] not in cond.invars[consts:]:
        return None
    place = cond.invars.index(cond.eqns[0].invars[0]) - consts
    start, stop = equation.invars[consts + taken + place], cond.eqns[0].invars[1]
    if stop in cond.invars:
        stop = [*equation.invars[:consts], *equation.invars[consts + taken :]][cond.invars.index(stop)]
    counter = body.outvars[place]
    steps = [e.invars[1] for e in body.eqns if counter in e.outvars and e.primitive.name == "add"]
    if len(steps) != 1 or not all(isinstance(one, core.Literal) for one in (start, stop, steps[0])):
        return None
    return max(math.ceil((int(stop.val) - int(start.val)) / int(steps[0].val)), 0)


def _cond(equation: Any) -> Flops:
    return max((of_jaxpr(branch) for branch in equation.params["branches"]), key=lambda found: found.total)


def _shard_map(equation: Any) -> Flops:
    params = equation.params
    manual = params["newly_manual_axes"] if "newly_manual_axes" in params else params["manual_axes"]  # its name until jax 0.10
    return of_jaxpr(params["jaxpr"]).times(math.prod(params["mesh"].shape[axis] for axis in manual))


def _pallas_call(equation: Any) -> Flops:
    estimate = equation.params.get("cost_estimate")
    if estimate is not None:
        return Flops(kernels=float(estimate.flops))
    points = math.prod(n for n in equation.params["grid_mapping"].grid if isinstance(n, int))
    return Flops(kernels=of_jaxpr(equation.params["jaxpr"]).total * points)


CONTROL = {"scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map, "pallas_call": _pallas_call}
# whose parameters hold functions that are applied to pairs of numbers, or that are differentiation's and not called
UNCALLED = (
    "reduce",
    "reduce_window",
    "reduce_precision",
    "scatter",
    "scatter-add",
    "scatter_add",
    "sort",
    "select_and_scatter_add",
)
