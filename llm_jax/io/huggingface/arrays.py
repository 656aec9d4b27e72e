"""Between a folder's tensors and a model's parameters, one array after another."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.io.huggingface.layouts import Index
from llm_jax.io.huggingface.names import Plan
from llm_jax.io.huggingface.weights import Folder

Tree = Mapping[str, Any]
SMALL = 1 << 24  # bytes up to which an array is put together on the host, in one transfer instead of one a piece


def flatten(tree: Tree) -> dict[str, Any]:
    """Path → leaf."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)[last] = leaf
    return tree


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class Renamed:
    """A folder's tensors under the names that a family's table has."""

    def __init__(self, folder: Folder, renames: Iterable[tuple[str, str]]):
        self._folder, self._names = folder, {}
        for name in folder.shapes:
            known = functools.reduce(lambda text, rule: re.sub(*rule, text), renames, name)
            self._names[known] = name
        self.shapes = {known: folder.shapes[name] for known, name in self._names.items()}

    def fetch(self, name: str) -> Callable[[Index], np.ndarray]:
        """What reads slices of a tensor."""
        return functools.partial(self._folder.read, self._names[name])

    def check_tied(self, output: str, embedding: str) -> None:
        """Raises `ConfigError` where the output matrix is there, and is not the embedding that config.json says it is tied to."""
        if output in self.shapes and embedding in self.shapes:
            size = self.shapes[embedding][0]
            blocks = [(slice(row, min(row + 4096, size)), slice(None)) for row in range(0, size, 4096)]
            same = self.shapes[output] == self.shapes[embedding] and all(
                np.array_equal(self.fetch(output)(block), self.fetch(embedding)(block)) for block in blocks
            )
            if not same:
                raise ConfigError(f"is true, but {output} is not {embedding} ({self._folder.path})", "tie_word_embeddings")

    def check(self, plans: Mapping[str, Plan], ignored: Iterable[str]) -> None:
        """Raises `ConfigError` unless the tensors are those of the plans, in their shapes, and else only `ignored` patterns."""
        wanted = {name: layout.shape for plan in plans.values() for name, layout in plan.pieces.values()}
        where = str(self._folder.path)
        absent = [name for name in wanted if name not in self.shapes]
        if absent:
            raise ConfigError(f"lacks {_some(absent)}, which config.json calls for", where)
        for name, shape in wanted.items():
            if self.shapes[name] != shape:
                raise ConfigError(
                    f"has the shape {list(self.shapes[name])}, and config.json calls for {list(shape)} ({where})", name
                )
        patterns = [re.compile(pattern) for pattern in ignored]
        spare = [name for name in self.shapes if name not in wanted and not any(p.fullmatch(name) for p in patterns)]
        if spare:
            raise ConfigError(f"has {_some(spare)}, for which config.json has no use", where)


def _some(names: list[str], count: int = 5) -> str:
    names = sorted(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more tensors" if len(names) > count else "")


def read(tensors: Renamed, plan: Plan, sharding: jax.sharding.Sharding | None, dtype: np.dtype) -> jax.Array:
    """One array, of which only the parts that this process' devices hold are read, piece by piece."""
    if sharding is None:
        return _part(tensors, plan, tuple(slice(0, n) for n in plan.shape), [None], dtype)[0]
    holders: dict[tuple, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(plan.shape).items():
        bounds = tuple(part.indices(n)[:2] for part, n in zip(index, plan.shape, strict=True))  # type: ignore[arg-type]
        holders.setdefault(bounds, []).append(device)
    parts = [
        part
        for bounds, devices in holders.items()
        for part in _part(tensors, plan, tuple(slice(*pair) for pair in bounds), devices, dtype)
    ]
    return jax.make_array_from_single_device_arrays(plan.shape, sharding, parts)


def _part(tensors: Renamed, plan: Plan, index: Index, devices: list[Any], dtype: np.dtype) -> list[jax.Array]:
    """The array's part at `index`, on each of the devices (None: where JAX puts it)."""
    lead, rest = index[: len(plan.lead)], index[len(plan.lead) :]

    def piece(place: tuple[int, ...]) -> np.ndarray:
        name, layout = plan.pieces[place]
        return np.ascontiguousarray(layout.read(tensors.fetch(name), rest), dtype)

    def local(place: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(at - part.start for at, part in zip(place, lead, strict=True))

    if not lead:
        block = piece(())
        return [jax.device_put(block, device) for device in devices]
    shape = tuple(part.stop - part.start for part in index)
    places = itertools.product(*(range(part.start, part.stop) for part in lead))
    if dtype.itemsize * math.prod(shape) <= SMALL:
        whole = np.empty(shape, dtype)
        for place in places:
            whole[local(place)] = piece(place)
        return [jax.device_put(whole, device) for device in devices]
    parts = [jnp.zeros(shape, dtype, device=device) for device in devices]
    for place in places:
        parts = _inserted(parts, piece(place), np.array(local(place), np.int32), devices)
    return parts


def _inserted(parts: list[jax.Array], piece: np.ndarray, place: np.ndarray, devices: list[Any]) -> list[jax.Array]:
    """Each device's `parts` with the piece put in there, so that the host holds no more than that piece."""
    parts = [_insert(part, jax.device_put(piece, device), place) for part, device in zip(parts, devices, strict=True)]
    return jax.block_until_ready(parts)  # dispatch is asynchronous, and would have all pieces wait in memory


@functools.partial(jax.jit, donate_argnums=0)
def _insert(whole: jax.Array, piece: jax.Array, place: jax.Array) -> jax.Array:
    """`whole` with `piece` at `place` of its first axes."""
    count = whole.ndim - piece.ndim
    starts = [place[axis] for axis in range(count)] + [0] * piece.ndim
    return jax.lax.dynamic_update_slice(whole, piece.reshape((1,) * count + piece.shape), starts)


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class Tensors:
    """A model's parameters as the tensors of a family. shapes: of each, by layer."""

    def __init__(self, plans: Mapping[str, Plan], leaves: Mapping[str, jax.Array]):
        self._leaves, self._parts = leaves, {}
        for path, plan in plans.items():
            for place, (name, layout) in plan.pieces.items():
                self._parts.setdefault(name, []).append((path, place, layout))
        ordered = sorted(self._parts, key=lambda name: [int(n) if n.isdigit() else n for n in re.split(r"(\d+)", name)])
        self.shapes = {name: self._parts[name][0][2].shape for name in ordered}

    def __call__(self, name: str) -> np.ndarray:
        """The tensor."""
        parts = self._parts[name]
        tensor = np.empty(self.shapes[name], self._leaves[parts[0][0]].dtype)
        for path, place, layout in parts:
            leaf = self._leaves[path]
            is_large = place and leaf.nbytes > SMALL
            layout.write(tensor, np.asarray(_piece(leaf, np.array(place, np.int32)) if is_large else np.asarray(leaf)[place]))
        return tensor


@jax.jit
def _piece(whole: jax.Array, place: jax.Array) -> jax.Array:
    """What stands at `place` of the first axes."""
    for axis in range(len(place)):
        whole = jax.lax.dynamic_index_in_dim(whole, place[axis], keepdims=False)
    return whole
