"""What a layer leaves to its backward pass: it is differentiated without arrays, and what JAX keeps is counted."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from llm_jax.core import platform
from llm_jax.core.sharding import unbox
from llm_jax.models.block import Block, Layer
from llm_jax.models.stack import REMAT, Stack
from llm_jax.nn.context import Context, Memory
from llm_jax.nn.masks import Places
from llm_jax.nn.multihead import Attention

LONG = 4096  # tokens from which on what is kept grows with the row: by then no kernel but "dense" writes its scores out
LANES = 128  # to which kernels fill up the last dimension of what they read and write
SAME = {"reshape", "squeeze", "expand_dims", "sharding_constraint", "optimization_barrier", "name"}  # give the array another name
KERNELS = {"pallas_call"}
PRODUCTS = {"dot_general", "ragged_dot_general", "conv_general_dilated"}


@dataclass(frozen=True)
class Kept:
    """Bytes of what one layer leaves to its gradient. whole: for each row, of arrays that each device along `tensor` has; split: of
    those that are cut there, by heads or hidden units; weights: of matrices in the compute dtype, and what else is the same for all
    rows."""

    whole: float
    split: float
    weights: float


def kept(
    stack: Stack,
    layer: Layer,
    length: int,
    *,
    cross: Attention | None = None,
    inputs: int = 0,
    segmented: bool = False,
    again: bool = False,
) -> Kept:
    """Of a layer on rows of `length` tokens, for the platform that is targeted.

    cross: attention to an encoder's output of `inputs` tokens; segmented: rows hold several documents. again: of a layer that is
    computed again as a whole, while it is differentiated: all of it, or what products and kernels read and write where the platform
    computes the rest inside of them; else what `stack.remat` keeps until then.
    """
    policy = None if again else REMAT.get(stack.remat)
    plain = replace(stack, depth=1, first=(), pattern=(), remat="none")  # what a layer's arrays do not depend on
    times = 1 if getattr(layer.attention, "backend", None) == "dense" else max(-(-length // LONG), -(-inputs // LONG))
    operands = again and platform.traits().recomputed_inside
    found = _kept(Traced(plain, layer, -(-length // times), cross, inputs // times, segmented, policy, operands), platform.name())
    return Kept(found.whole * times, found.split * times, found.weights)


@functools.lru_cache(maxsize=1024)
def _kept(given: Traced, name: str) -> Kept:
    """By the difference that a second row makes. name: the platform's."""
    (whole, split), (whole_2, split_2) = given.bytes(1), given.bytes(2)
    return Kept(whole_2 - whole, split_2 - split, 2 * (whole + split) - whole_2 - split_2)


@dataclass(frozen=True)
class Traced:
    """A layer to be differentiated. policy: what it keeps of `jax.checkpoint`'s, None for all; operands: only those of products."""

    stack: Stack
    layer: Layer
    length: int
    cross: Attention | None
    inputs: int
    segmented: bool
    policy: Any
    operands: bool

    def bytes(self, rows: int) -> tuple[float, float]:
        """Of arrays that each device along `tensor` has, and of those that are cut there, for so many rows."""
        jaxpr, parameters = self._gradient(rows)
        makers = {made: equation for equation in jaxpr.eqns for made in equation.outvars}
        padded, multiplied = (_touched(jaxpr, makers, names) for names in (KERNELS, KERNELS | PRODUCTS))
        found: dict[Any, float] = {}
        for one, varies in zip(jaxpr.outvars, _varying(jaxpr, [True] * len(jaxpr.invars)), strict=True):
            source = _source(one, makers) if varies and one not in parameters else None
            if source is not None and (source in multiplied or not self.operands):
                found[source] = max(found.get(source, 0.0), _size(one, one in padded))
        cut = sum(size for one, size in found.items() if self._is_cut(one.aval.shape))
        return sum(found.values()) - cut, cut

    def _is_cut(self, shape: tuple[int, ...]) -> bool:
        """Whether heads or hidden units are a dimension; one that may as well be the width or the length is not taken for them."""
        mixer, ffn, width = self.layer.attention, self.layer.ffn, self.stack.width
        sizes = {mixer.heads_for_bias, getattr(mixer, "groups", 1)} if mixer and mixer.attends else set()
        for one in (getattr(ffn, "expert", ffn), getattr(ffn, "shared", None)):
            sizes |= {one.hidden(width)} if one else set()
        return bool((sizes - {1, width, self.length}) & set(shape[1:])) and shape[-1:] != (width,)

    def _array(self, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, self.stack.precision.dtype)

    def _gradient(self, rows: int) -> tuple[Any, set[Any]]:
        """The program that ends with what is kept, and which of its inputs are parameters."""
        block = Block(self.stack, self.layer, self.cross)
        stream = jax.eval_shape(self.stack.residual.open, self._array(rows, self.length, self.stack.width))
        context, number = self._context(rows), jax.ShapeDtypeStruct((), jnp.int32)
        key = jax.eval_shape(lambda: jax.random.key(0))

        def run(params: Any, x: jax.Array, context: Context, number: jax.Array, key: jax.Array) -> Any:
            return block.apply({"params": params}, x, number, context, rngs={"dropout": key}, mutable=["routing"])

        def gradient(params: Any, x: jax.Array, context: Context, number: jax.Array, key: jax.Array) -> Any:
            own = run if self.policy is None else jax.checkpoint(run, policy=self.policy)
            return jax.vjp(lambda params, x, context: own(params, x, context, number, key), params, x, context)[1]

        def init(key: jax.Array, *given: Any) -> Any:
            return unbox(block.init({"params": key, "dropout": key}, *given))["params"]

        params = jax.eval_shape(init, key, stream, number, context)
        jaxpr = jax.make_jaxpr(gradient)(params, stream, context, number, key).jaxpr
        count = len(jax.tree.leaves(params))
        streams = set(jaxpr.invars[count : count + 1])
        return jaxpr, set(jaxpr.invars) - streams

    def _context(self, rows: int) -> Context:
        stack = self.stack

        def places(length: int) -> Places:
            own = jax.ShapeDtypeStruct((rows, length), jnp.int32)
            return Places(segment=own, position=own) if self.segmented else Places()

        def parameter(name: str, init: Any, shape: tuple[int, ...], axes: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape, jnp.float32)

        shared = stack.position.shared(stack.heads_for_bias, param=parameter)
        memory = Memory(self._array(rows, self.inputs, stack.width), places(self.inputs)) if self.cross else None
        return Context(places(self.length), shared, stack.dropout.rates(), memory)


def _varying(jaxpr: Any, inputs: list[bool]) -> list[bool]:
    """Which of a program's results depend on those of its inputs: the others, such as where a mask hides what, are constants."""
    found = {one for one, varies in zip(jaxpr.invars, inputs, strict=True) if varies}
    for equation in jaxpr.eqns:
        given = [isinstance(one, core.Var) and one in found for one in equation.invars]
        inner = list(_called(equation)) if equation.primitive.name in ("jit", "pjit") else []
        made = _varying(inner[0], given) if inner else [any(given)] * len(equation.outvars)
        found |= {one for one, varies in zip(equation.outvars, made, strict=True) if varies}
    return [isinstance(one, core.Var) and one in found for one in jaxpr.outvars]


def _source(one: Any, makers: Any) -> Any:
    """The array that this one is in another shape."""
    while (made := makers.get(one)) is not None and made.primitive.name in SAME and isinstance(made.invars[0], core.Var):
        one = made.invars[0]
    return one


def _size(one: Any, padded: bool) -> float:
    *outer, last = one.aval.shape or (1,)
    last = -(-last // LANES) * LANES if padded else last
    return float(math.prod(outer) * last * one.aval.dtype.itemsize)


def _touched(jaxpr: Any, makers: Any, names: set[str]) -> set[Any]:
    """What operations of these names read and write, and what that is in another shape."""
    touched = {
        one
        for equation in jaxpr.eqns
        if _does(equation, names)
        for one in (*equation.invars, *equation.outvars)
        if isinstance(one, core.Var)
    }
    return touched | {_source(one, makers) for one in touched}


def _does(equation: Any, names: set[str]) -> bool:
    """Whether an operation of these names is in it."""
    return equation.primitive.name in names or any(_does(one, names) for inner in _called(equation) for one in inner.eqns)


def _called(equation: Any) -> Iterator[Any]:
    for value in equation.params.values():
        for one in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(one, (core.Jaxpr, core.ClosedJaxpr)):
                yield getattr(one, "jaxpr", one)
