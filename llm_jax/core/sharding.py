"""Logical axes: what every array dimension is called, and which mesh axes each name is split over.

Weights and activations have names of their own, because they are split differently: with `fsdp` a weight is split by its
embedding dimension and gathered when used, while an activation is split by its batch.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jaxlib.version
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.core.config import nearest, require
from llm_jax.core.mesh import BATCH, Mesh
from llm_jax.core.platform import traits

ORDERED = jaxlib.version.__version_info__ >= (0, 11)  # whether an inner `shard_map` may take later axes of the mesh alone
Rules = Mapping[str, tuple[str, ...]]  # logical axis → the mesh axes that split it

RULES: Rules = MappingProxyType(
    {
        "batch": BATCH,
        "length": ("sequence",),
        "embed_act": (),
        "heads_act": ("tensor",),
        "kv_heads_act": ("tensor",),
        "hidden_act": ("tensor",),
        "vocab_act": ("tensor",),
        "layers": ("stage",),
        "expert": ("expert",),
        "embed": ("fsdp", "sequence", "expert"),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "head_dim": (),
        "latent": ("fsdp", "sequence", "expert"),
        "embed_out": (),
        "gates": (),
        "hidden_in": (),
        "hidden": ("tensor",),
        "vocab": ("tensor",),
        "position": (),
        "norm": (),
        "buckets": (),
    }
)
SMALL = 1 << 10  # entries that are not worth a way to the host
ALONE = 1 << 16  # entries from which on copying an array into the common message costs more than a message of its own

_layout: contextvars.ContextVar[Mesh] = contextvars.ContextVar("layout", default=Mesh())  # noqa: B039 (it is frozen)


@functools.cache
def rules(mesh: Mesh) -> Rules:
    """The rules, with the mesh's exceptions. Raises `ConfigError` for a name that no dimension has."""
    for split in mesh.rules:
        require(
            split.name != "batch", "mesh.rules", f"splits 'batch', which is always split over {', '.join(BATCH)}: set those axes"
        )
        require(split.name in RULES, "mesh.rules", f"names {split.name!r}: did you mean {nearest(split.name, list(RULES))}?")
    return {**RULES, **{split.name: split.over for split in mesh.rules}}


@contextlib.contextmanager
def on(devices: jax.sharding.Mesh, layout: Mesh | None = None) -> Iterator[None]:
    """Programs that are traced within it lay their arrays out over the devices as `layout` says."""
    token = _layout.set(layout or Mesh())
    try:
        with jax.set_mesh(devices):
            yield
    finally:
        _layout.reset(token)


def layout() -> Mesh:
    """What `on` was given."""
    return _layout.get()


def spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mapping[str, int], rules: Rules = RULES) -> PartitionSpec:
    """How an array of this shape, whose dimensions are called `axes`, is split over a mesh (axis → devices).

    A dimension takes of its rule's mesh axes those that no dimension before it has taken, the first of them that divide its size
    together: 257 bytes over two devices stay whole. Raises `ValueError` for an unknown name: silence would leave the array unsplit.
    """
    unknown = [a for a in axes if a is not None and a not in rules]
    if unknown or len(axes) != len(shape):
        raise ValueError(f"logical axes {tuple(axes)} for shape {tuple(shape)}; the names are {sorted(rules)}")
    taken: set[str] = set()
    entries: list[tuple[str, ...] | str | None] = []
    for name, size in zip(axes, shape, strict=True):
        free = [axis for axis in rules.get(name or "", ()) if axis not in taken and mesh.get(axis, 1) > 1]
        own = dividing(free, size, mesh)
        taken |= set(own)
        entries.append(None if not own else own[0] if len(own) == 1 else own)
    return PartitionSpec(*entries)


def dividing(axes: Sequence[str], size: int, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The first of these mesh axes, as many as divide the size together."""
    own: list[str] = []
    for axis in axes:
        if size % (math.prod(mesh[a] for a in own) * mesh[axis]):
            break
        own.append(axis)
    return tuple(own)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` with its dimensions laid out as the logical `axes` say; the identity where no mesh splits anything."""
    mesh = _splitting()
    where = spec(axes, x.shape, mesh, rules(layout()))
    return jax.lax.with_sharding_constraint(x, where) if mesh else x


def split_axes() -> set[str]:
    """The mesh axes that the compiler splits this code's arrays over: of more than one device, not taken by a `shard_map`."""
    return set(_splitting())


def _splitting() -> dict[str, int]:
    mesh = jax.sharding.get_abstract_mesh()
    manual = *mesh.manual_axes, "population"
    return {axis: size for axis, size in mesh.shape.items() if size > 1 and axis not in manual}


def axes_over(name: str, size: int) -> tuple[str, ...]:
    """The mesh axes that the compiler splits a dimension of this logical name and size over."""
    mesh = _splitting()
    return dividing([axis for axis in rules(layout())[name] if axis in mesh], size, mesh)


def parts(axes: tuple[str, ...]) -> int:
    """How many pieces these mesh axes cut a dimension into."""
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in axes)


def spec_over(axes: Sequence[str], names: Sequence[str | None], shape: Sequence[int]) -> PartitionSpec:
    """How the compiler splits an array over these of its mesh axes alone."""
    return spec(names, shape, {axis: size for axis, size in _splitting().items() if axis in axes}, rules(layout()))


def by_hand(message: Callable[[jax.Array], jax.Array], x: jax.Array, *axes: str | None) -> jax.Array:
    """`message(x)` among devices along the axes of a `shard_map`, of the part that each has of `x` by the others.

    axes: the logical names of the dimensions, None of those that the message changes. Without it the compiler gathers `x` along
    all other axes before any message but a sum and one that is passed on; so it does with jaxlib 0.11, which dies of the nesting,
    along axes that come before the `shard_map`'s in the mesh.
    """
    where = spec(axes, x.shape, _inner(), rules(layout()))
    taken = {axis for entry in where if entry for axis in ((entry,) if isinstance(entry, str) else entry)}
    if not taken:
        return message(x)
    return jax.shard_map(message, in_specs=where, out_specs=where, axis_names=taken, check_vma=False)(x)


def _inner() -> dict[str, int]:
    """The mesh axes that a `shard_map` inside of others may take: XLA ends the process if they do not come in the mesh's order."""
    names, manual = (mesh := jax.sharding.get_abstract_mesh()).axis_names, mesh.manual_axes
    first = 1 + max(map(names.index, manual), default=-1) if ORDERED else 0
    return {axis: size for axis, size in _splitting().items() if axis in names[first:]}


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
    unknown = [a for a in axes if a is not None and a not in RULES]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown}; the names are {sorted(RULES)}")
    return nn.with_logical_partitioning(init, axes)


def parameter_specs(boxed: Any, devices: jax.sharding.Mesh, mesh: Mesh | None = None) -> Any:
    """`PartitionSpec` of every leaf of an abstract, still boxed parameter tree (`jax.eval_shape(init, …)`)."""
    names = nn.get_partition_spec(boxed)
    return jax.tree.map(
        lambda axes, leaf: spec((*axes, *[None] * (leaf.ndim - len(axes))), leaf.shape, devices.shape, rules(mesh or Mesh())),
        names,
        unbox(boxed),
        is_leaf=lambda s: isinstance(s, PartitionSpec),
    )


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


def named(mesh: jax.sharding.Mesh, specs: Any, *, leading: tuple[str | None, ...] = ()) -> Any:
    """`NamedSharding`s from specs, with `leading` mesh axes put in front of every dimension (a population axis)."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, PartitionSpec(*leading, *spec)), specs, is_leaf=lambda s: isinstance(s, PartitionSpec)
    )


def on_host(where: Any, tree: Any) -> Any:
    """Shardings with their arrays in the hosts' memory, where they are larger than `SMALL` entries. tree: shapes of the arrays."""
    return jax.tree.map(lambda to, x: to.with_memory_kind("pinned_host") if x.size > SMALL else to, where, tree)


def moved(tree: Any, where: Any, space: jax.memory.Space) -> Any:
    """Inside a program: the arrays that lie in the hosts' memory by their shardings, in that space."""
    return jax.tree.map(lambda x, to: jax.device_put(x, space) if to.memory_kind == "pinned_host" else x, tree, where)


def unbox(tree: Any) -> Any:
    """`tree` with Linen's partitioning boxes taken off (and no constraint applied: that fails on abstract values)."""
    return jax.tree.map(
        lambda x: x.unbox(apply_constraint=False) if isinstance(x, nn.LogicallyPartitioned) else x,
        tree,
        is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned),
    )
