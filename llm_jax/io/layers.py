"""Layers of a checkpoint as a program has them: each alone, as CPUs like it best, or stacked and scanned, as accelerators do.

In every tree of a population's state, parameters and what an optimizer keeps of them alike, layers that stand alone are
`layers_0`, `layers_1`, … with leaves `[members, …]`; those that are stacked are `layers`, with a `step_0`, `step_1`, … for
each layer of the pattern that repeats, whose leaves are `[members, repeats, …]`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.core.config import require

Tree = dict[str, Any]


class Form(NamedTuple):
    """How a stack is stacked: layers of its pattern, how often it repeats, and the numbers of layers that stand alone."""

    period: int
    repeats: int
    alone: tuple[int, ...]

    @property
    def depth(self) -> int:
        """All its layers."""
        return self.period * self.repeats + len(self.alone)

    @property
    def stacked(self) -> list[int]:
        """Numbers of the layers that are stacked, in order: of steps 0, 1, … of the first repeat, then of the next."""
        return [number for number in range(self.depth) if number not in self.alone]


def as_stored(abstract: Any, stored: Any) -> tuple[Any, Callable[[Any], Any]]:
    """The shapes of a state with its layers as a checkpoint has them, and what makes of such a state one as `abstract` says.

    stored: the checkpoint's tree, of anything with a shape. Raises `ConfigError` for a state that does not go layer by layer.
    """
    here, there = (any(_is_stacked(stack) for stack in _stacks(tree)) for tree in (abstract, stored))
    if here == there or not _stacks(stored):
        return abstract, lambda state: state
    forms = {_depth(stack): _form(stack) for stack in _stacks(abstract if here else stored)}
    _require_alone({_depth(stack) for stack in _stacks(stored if here else abstract)} == set(forms))
    if here:
        asked = _each(abstract, lambda stack: _apart(stack, _form(stack), lambda leaf, _: _without_layers(leaf)))
        back = lambda state: _each(state, lambda stack: _joined(stack, forms[_depth(stack)], _stack))  # noqa: E731
    else:
        asked = _each(abstract, lambda stack: _joined(stack, forms[_depth(stack)], _with_layers))
        back = lambda state: _each(state, lambda stack: _apart(stack, _form(stack), lambda leaf, at: leaf[:, at]))  # noqa: E731
    _require_alone(_shapes(asked) == _shapes(stored))
    where = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return asked, jax.jit(back, out_shardings=where)


def _require_alone(told_apart: bool) -> None:
    """Raises `ConfigError` unless what is kept of each layer can be told from what is kept of the others."""
    told = "keeps numbers of several layers together: resume with model.layers 'scanned' or 'unrolled', as it was trained"
    require(told_apart, "the optimizer's state", told)


def _depth(stack: Tree) -> int:
    """Layers of a stack in either form."""
    return _form(stack).depth if _is_stacked(stack) else len(_numbers(stack))


def _numbers(stack: Tree) -> tuple[int, ...]:
    return tuple(sorted(int(found[1]) for name in stack if (found := re.fullmatch(r"layers_(\d+)", str(name)))))


def _is_stacked(stack: Tree) -> bool:
    return isinstance(stack.get("layers"), dict) and "step_0" in stack["layers"]


def _is_stack(tree: Any) -> bool:
    return isinstance(tree, dict) and (_is_stacked(tree) or bool(_numbers(tree)))


def _stacks(tree: Any) -> list[Tree]:
    return [stack for stack in jax.tree.leaves(tree, is_leaf=_is_stack) if _is_stack(stack) and jax.tree.leaves(stack)]


def _shapes(tree: Any) -> list[str]:
    """Of all stacks, in any order, what each leaf is called and its shape without members."""
    leaves = (jax.tree_util.tree_leaves_with_path(stack) for stack in _stacks(tree))
    return sorted(str(sorted((jax.tree_util.keystr(path), tuple(leaf.shape[1:])) for path, leaf in stack)) for stack in leaves)


def _each(tree: Any, function: Callable[[Tree], Tree]) -> Any:
    return jax.tree.map(lambda x: function(x) if _is_stack(x) else x, tree, is_leaf=_is_stack)


def _form(stack: Tree) -> Form:
    repeats = {leaf.shape[1] if len(leaf.shape) > 1 else 0 for leaf in jax.tree.leaves(stack["layers"])}
    _require_alone(len(repeats) == 1)
    return Form(len(stack["layers"]), repeats.pop(), _numbers(stack))


def _apart(stack: Tree, form: Form, take: Callable[[Any, int], Any]) -> Tree:
    rest = {name: tree for name, tree in stack.items() if name != "layers"}
    for place, number in enumerate(form.stacked):
        step, at = stack["layers"][f"step_{place % form.period}"], place // form.period
        rest[f"layers_{number}"] = jax.tree.map(lambda leaf, at=at: take(leaf, at), step)
    return rest


def _joined(stack: Tree, form: Form, join: Callable[..., Any]) -> Tree:
    numbers = form.stacked
    rest = {name: tree for name, tree in stack.items() if name not in {f"layers_{number}" for number in numbers}}
    steps = range(form.period)
    each = {step: [stack[f"layers_{number}"] for number in numbers[step :: form.period]] for step in steps}
    return rest | {"layers": {f"step_{step}": jax.tree.map(join, *each[step]) for step in steps}}


def _stack(*leaves: jax.Array) -> jax.Array:
    return jnp.stack(leaves, 1)


def _without_layers(leaf: Any) -> jax.ShapeDtypeStruct:
    """The shape of one layer's part."""
    members, _, *rest = _split(leaf)
    return _shaped((leaf.shape[0], *leaf.shape[2:]), leaf, members, *rest)


def _with_layers(*leaves: Any) -> jax.ShapeDtypeStruct:
    """The shape of layers together."""
    leaf = leaves[0]
    members, *rest = _split(leaf)
    return _shaped((leaf.shape[0], len(leaves), *leaf.shape[1:]), leaf, members, None, *rest)


def _split(leaf: Any) -> tuple[Any, ...]:
    """What splits each dimension."""
    spec = leaf.sharding.spec if isinstance(leaf.sharding, NamedSharding) else ()
    return (*spec, *[None] * leaf.ndim)[: leaf.ndim]


def _shaped(shape: tuple[int, ...], leaf: Any, *split: Any) -> jax.ShapeDtypeStruct:
    named = isinstance(leaf.sharding, NamedSharding)
    where = NamedSharding(leaf.sharding.mesh, PartitionSpec(*split)) if named else leaf.sharding
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=where)
