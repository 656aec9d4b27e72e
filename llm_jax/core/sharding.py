"""Logical axes: what every array dimension is called, and which mesh axes each name is split over.

Weights and activations have names of their own, because they are split differently: with `fsdp` a weight is split by its
embedding dimension and gathered when used, while an activation is split by its batch.
"""

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from llm_jax.core.platform import traits

# logical axis → mesh axes (a tuple splits one dimension over several)
RULES: tuple[tuple[str, Any], ...] = (
    ("batch", ("data", "fsdp")),
    ("length", None),
    ("embed_act", None),
    ("heads_act", "tensor"),
    ("kv_heads_act", "tensor"),
    ("hidden_act", "tensor"),
    ("vocab_act", "tensor"),
    ("expert_act", None),
    ("embed", "fsdp"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("latent", None),
    ("embed_out", None),
    ("gates", None),
    ("hidden_in", None),
    ("hidden", "tensor"),
    # whole: an expert's hidden units take the tensor axis, its width fsdp; a mesh axis for experts goes here and in expert_act
    ("expert", None),
    ("vocab", "tensor"),
    ("position", None),
    ("norm", None),
    ("buckets", None),
    ("layers", None),
)
ALONE = 1 << 16  # entries from which on copying an array into the common message costs more than a message of its own
NAMES = frozenset(name for name, _ in RULES)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` with its dimensions laid out as the logical `axes` say; the identity where no mesh is set.

    Raises `ValueError` for an unknown name: silence would leave the array unsplit.
    """
    unknown = [a for a in axes if a is not None and a not in NAMES]
    if unknown or len(axes) != x.ndim:
        raise ValueError(f"constrain: axes {axes} for shape {x.shape}; the names are {sorted(NAMES)}")
    if not split_axes():
        return x
    return nn.with_logical_constraint(x, axes, rules=RULES, fallback=nn.spmd.RulesFallback.RAISE_ERROR)


def split_axes() -> set[str]:
    """The mesh axes that the compiler splits this code's arrays over: of more than one device, not taken by a `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    return {axis for axis in mesh.axis_names if mesh.shape[axis] > 1 and axis not in (*mesh.manual_axes, "population")}


def axes_over(name: str, size: int) -> tuple[str, ...]:
    """The mesh axes that the compiler splits a dimension of this logical name over; none where they do not divide its size."""
    given = dict(RULES)[name]
    axes = tuple(axis for axis in (given if isinstance(given, tuple) else (given,)) if axis in split_axes())
    return () if size % parts(axes) else axes


def parts(axes: tuple[str, ...]) -> int:
    """How many pieces these mesh axes cut a dimension into."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def sum_over_data(function: Callable) -> Callable:
    """`function(params, batch) -> sums` of a batch whose rows are split over the data axis, with one message for all small sums.

    Arrays that are the same for all rows come as `params`, none from outside.

    Where parameters are whole on every device and the platform asks for it; else `function` itself, whose sums the compiler
    adds up array by array (XLA:CPU takes 0.1 ms for each of them, however small).
    """
    if not _messages_by_hand():
        return function

    def local(params, batch):
        leaves, tree = jax.tree.flatten(function(params, batch))
        small = [index for index, leaf in enumerate(leaves) if leaf.size < ALONE]
        flat, restore = ravel_pytree([leaves[index] for index in small])
        sums = [jax.lax.psum(leaf, "data") if leaf.size >= ALONE else leaf for leaf in leaves]
        for index, leaf in zip(small, restore(jax.lax.psum(flat, "data")), strict=True):
            sums[index] = leaf
        return tree.unflatten(sums)

    return _on_each_data_device(local, PartitionSpec(), PartitionSpec("data"))


def each_by_one(function: Callable, xs: list[jax.Array]) -> list[jax.Array]:
    """`[function(x) for x in xs]`, shapes kept; every `x` is worked on by one of the data-parallel devices, which tells the others.

    Where arrays are whole on every device and the platform asks for it; else every device does all the work.
    """
    if not _messages_by_hand():
        return [function(x) for x in xs]
    devices = jax.sharding.get_abstract_mesh().shape["data"]
    loads, owner = [0] * devices, [0] * len(xs)
    for index in sorted(range(len(xs)), key=lambda i: -xs[i].size):
        owner[index] = loads.index(min(loads))
        loads[owner[index]] += xs[index].size

    def local(xs):
        def share(device):
            return lambda: ravel_pytree(
                [function(x) if o == device else jnp.zeros_like(x) for x, o in zip(xs, owner, strict=True)]
            )[0]

        flat = jax.lax.switch(jax.lax.axis_index("data"), [share(device) for device in range(devices)])
        return ravel_pytree(xs)[1](jax.lax.psum(flat, "data"))

    return _on_each_data_device(local, PartitionSpec())(xs)


def _messages_by_hand() -> bool:
    """Whether parameters are whole on every device, and the platform asks that this code, not the compiler, adds them up."""
    return traits().flat_gradient_sums and split_axes() == {"data"}


def _on_each_data_device(local: Callable, *specs: PartitionSpec) -> Callable:
    """`local` on each device's part of its arguments; the results must be the same everywhere."""
    return jax.shard_map(local, in_specs=specs, out_specs=PartitionSpec(), axis_names={"data"}, check_vma=False)


def partitioned(init: Callable, axes: tuple[str | None, ...]) -> Callable:
    """The initializer `init` with its logical axes attached (Linen boxes the value; `nn.unbox` takes it out)."""
    unknown = [a for a in axes if a is not None and a not in NAMES]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown}; the names are {sorted(NAMES)}")
    return nn.with_logical_partitioning(init, axes)


def parameter_specs(boxed: Any, mesh: Mesh) -> Any:
    """`PartitionSpec` of every leaf of an abstract, still boxed parameter tree (`jax.eval_shape(init, …)`).

    A dimension that its mesh axis does not divide, such as 257 bytes over 2 devices, stays whole.
    """

    def dividing(spec: PartitionSpec, leaf: Any) -> PartitionSpec:
        def size(axis) -> int:
            return math.prod(mesh.shape[name] for name in (axis if isinstance(axis, tuple) else (axis,)))

        return PartitionSpec(*(None if axis is None or n % size(axis) else axis for axis, n in zip(spec, leaf.shape, strict=False)))

    specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), RULES)
    return jax.tree.map(dividing, specs, unbox(boxed), is_leaf=lambda s: isinstance(s, PartitionSpec))


def state_specs(params: Any, specs: Any, state: Any) -> Any:
    """Specs for `state` (optimizer moments, averages): a leaf whose key path ends with a parameter's path and whose
    shape is that parameter's takes its spec; everything else is replicated."""
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    leaves = jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, PartitionSpec))
    known = {_names(path): (leaf.shape, spec) for (path, leaf), spec in zip(flat, leaves, strict=True)}

    def spec_of(path, leaf):
        names = _names(path)
        for start in range(len(names)):
            shape, spec = known.get(names[start:], (None, None))
            if shape == leaf.shape:
                return spec
        return PartitionSpec()

    return jax.tree_util.tree_map_with_path(spec_of, state)


def _names(path) -> tuple[str, ...]:
    return tuple(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))


def named(mesh: Mesh, specs: Any, *, leading: tuple[str | None, ...] = ()) -> Any:
    """`NamedSharding`s from specs, with `leading` mesh axes put in front of every dimension (a population axis)."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, PartitionSpec(*leading, *spec)), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )


def unbox(tree: Any) -> Any:
    """`tree` with Linen's partitioning boxes taken off (and no constraint applied: that fails on abstract values)."""
    return jax.tree.map(
        lambda x: x.unbox(apply_constraint=False) if isinstance(x, nn.LogicallyPartitioned) else x,
        tree,
        is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
    )
