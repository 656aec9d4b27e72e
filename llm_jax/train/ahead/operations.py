"""What each operation of a compiled program does on one device: FLOPs of its products, and bytes that it moves to and from HBM."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from llm_jax.train.ahead.collectives import KINDS
from llm_jax.train.ahead.hlo import Array, Computation, Instruction, Module

# what moves nothing, or whose parts are counted where they run
FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all", "iota"),
    *("partition-id", "replica-id", "opt-barrier", "async-start", "async-update", "async-done", "copy-done"),
    *(f"{way}{end}" for way in ("send", "recv", *KINDS) for end in ("", "-start", "-done")),
}


GROUPED = "ragged_dot"  # in the label of products of rows with one of several matrices each


@dataclass(frozen=True)
class Operation:
    """One operation, done `times` a step. flops, bytes: each time; kernel: its name where its FLOPs are unknown here, because it is
    written by hand or decides at run time which matrix a row meets; overlaps: whether others run meanwhile, as with a copy."""

    name: str
    flops: float
    bytes: float
    times: float = 1.0
    kernel: str = ""
    overlaps: bool = False
    label: str = ""


def of_module(module: Module) -> list[Operation]:
    """Every operation of a program that takes time by itself, messages left out."""
    return [
        Operation(
            one.name,
            _flops(module, computation, one),
            _bytes(module, computation, one),
            times,
            kernel=_kernel(module, computation, one),
            overlaps=one.opcode == "copy-start" or name in module.aside,
            label=one.label,
        )
        for name, times in module.calls.items()
        for computation in [module.computations[name]]
        for one in computation
        if one.opcode not in FREE and 'custom_call_target="AllocateBuffer"' not in one.rest
    ]


def kernels(done: Iterable[Operation]) -> tuple[str, ...]:
    """The names of kernels among them."""
    return tuple(sorted({one.kernel for one in done if one.kernel}))


def _kernel(module: Module, computation: Computation, one: Instruction) -> str:
    if 'custom_call_target="tpu_custom_call"' in one.rest:
        return re.sub(r"\.\d+$", "", one.name)
    return "ragged-dot" if _grouped(module, computation, one) else ""


# ── products ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def _flops(module: Module, computation: Computation, one: Instruction) -> float:
    if one.opcode == "fusion" and GROUPED not in one.label:
        return sum(_flops(module, each, other) for each in _inside(module, one) for other in each)
    if one.opcode not in PRODUCTS or _grouped(module, computation, one):
        return 0.0
    return PRODUCTS[one.opcode](computation, one)


def _grouped(module: Module, computation: Computation, one: Instruction) -> bool:
    """Whether rows meet one of several matrices each, as its label says, or one mask that chooses rows of both operands."""
    if one.opcode == "fusion":
        return GROUPED in one.label or any(_grouped(module, each, other) for each in _inside(module, one) for other in each)
    if one.opcode not in PRODUCTS:
        return False
    left, right = (_masks(computation, operand) for operand in computation.operands(one)[:2])
    return GROUPED in one.label or bool(left & right)


def _masks(computation: Computation, one: Instruction) -> set[str]:
    """What a fusion that has its rows once for each of several matrices chooses them by, among its operands."""
    given = computation.operands(one) if one.opcode == "fusion" else []
    masks = {each.name for each in given if [array.dtype for array in each.arrays] == ["pred"]}
    rows = [each.arrays[0] for each in given if each.name not in masks]
    return masks if all(len(each.shape) < len(one.arrays[0].shape) for each in rows) else set()


def _inside(module: Module, fusion: Instruction) -> list[Computation]:
    return [module.computations[name] for name in fusion.called.get("calls", []) if name in module.computations]


def _dot(computation: Computation, one: Instruction) -> float:
    left = computation.operands(one)[0].arrays[0]
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", one.rest)
    over = [int(n) for n in contracted[1].split(",") if n] if contracted else []
    return 2.0 * math.prod(one.arrays[0].shape) * math.prod(left.shape[i] for i in over)


def _convolution(computation: Computation, one: Instruction) -> float:
    """2 · outputs · inputs that each is made of: on TPUs a product is a convolution, its batch dimensions spatial ones.

    Places of a window that fall into the padding or between dilated inputs are no work.
    """
    left, right = (operand.arrays[0] for operand in computation.operands(one)[:2])
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    if labels is None:
        return 0.0
    inputs, kernel, outputs = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    given = dict(part.split("=") for part in window[1].split()) if window else {}
    work = 2.0 * math.prod(n for label, n in zip(outputs, one.arrays[0].shape, strict=True) if label in "bf")
    work *= right.shape[kernel.index("i")]
    for label in (label for label in kernel if label.isdigit()):
        work *= _places(
            left.shape[inputs.index(label)],
            right.shape[kernel.index(label)],
            one.arrays[0].shape[outputs.index(label)],
            given,
            int(label),
        )
    return work / _number(one.rest, "batch_group_count")


def _places(size: int, kernel: int, outputs: int, window: dict[str, str], place: int) -> float:
    """Pairs of an output and a place in the window that meet an input, along one spatial dimension."""
    if kernel == 1 and outputs == size:
        return float(outputs)

    def value(name: str, default: str) -> str:
        return window[name].split("x")[place] if name in window else default

    stride, spread, holes = (int(value(name, "1")) for name in ("stride", "rhs_dilate", "lhs_dilate"))
    before = int(value("pad", "0_0").split("_")[0])
    at = np.arange(outputs)[:, None] * stride - before + np.arange(kernel)[None] * spread
    return float(((at >= 0) & (at % holes == 0) & (at // holes < size)).sum())


PRODUCTS = {"dot": _dot, "convolution": _convolution}


def _number(text: str, name: str) -> int:
    found = re.search(rf"{name}=(\d+)", text)
    return int(found[1]) if found else 1


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _bytes(module: Module, computation: Computation, one: Instruction) -> float:
    given = [operand.arrays for operand in computation.operands(one)]
    if one.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * _outside(one.arrays)
    if one.opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _outside(given[1])
    if one.opcode == "copy-start":
        return _outside(given[0]) + _outside(one.arrays[:1])
    if one.opcode != "fusion" or not one.called.get("calls"):
        return _outside(one.arrays) + sum(map(_outside, given))
    inside = module.computations[one.called["calls"][0]]
    if inside.has("AsyncCollective") and not _flops(module, computation, one):
        return 0.0  # a message's beginning or end, which are timed as such
    return sum(_read(module, inside, number, arrays) for number, arrays in enumerate(given)) + sum(_written(inside, one))


def _outside(found: list[Array]) -> float:
    return sum(array.bytes for array in found if not array.inside)


def _read(module: Module, inside: Computation, number: int, arrays: list[Array]) -> float:
    """Bytes that a fusion reads of an operand: where it only takes slices of it, theirs."""
    whole = _outside(arrays)
    parameter = next((one for one in inside if one.opcode == "parameter" and one.given == str(number)), None)
    if parameter is None or not whole:
        return whole
    return min(whole, sum(_taken(module, use, place, arrays) for use, place in _uses(inside, parameter)))


def _taken(module: Module, use: Instruction, place: int, arrays: list[Array]) -> float:
    if use.opcode in ("dynamic-slice", "gather", "slice") and place == 0:
        return use.arrays[0].bytes
    if use.opcode == "dynamic-update-slice" and place == 0:
        return 0.0
    if use.opcode == "fusion" and use.called.get("calls"):
        return _read(module, module.computations[use.called["calls"][0]], place, arrays)
    return _outside(arrays)


def _uses(inside: Computation, one: Instruction) -> Iterator[tuple[Instruction, int]]:
    """What an array goes into, and as which operand, under any other name that a bitcast gives it."""
    for use in inside:
        if one.name in use.operands:
            if use.opcode == "bitcast":
                yield from _uses(inside, use)
            else:
                yield use, use.operands.index(one.name)


def _written(inside: Computation, one: Instruction) -> Iterator[float]:
    """Bytes of each result of a fusion: where it is an update in place, of the update."""
    roots = inside.operands(inside.root) if inside.root.opcode == "tuple" else [inside.root]
    if len(roots) != len(one.arrays):
        yield _outside(one.arrays)
        return
    for root, array in zip(roots, one.arrays, strict=True):
        while root.opcode == "bitcast" and inside.operands(root):
            root = inside.operands(root)[0]
        if root.opcode == "dynamic-update-slice" and not array.inside:
            yield inside.operands(root)[1].arrays[0].bytes
        else:
            yield _outside([array])
