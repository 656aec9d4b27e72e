"""Copies of what is being trained on each machine's own disk, made more often than checkpoints, since no array crosses a network.

They serve a job that is started again on the same machines with the same devices. Where a process no longer has its part of them,
or lays arrays out otherwise, the last checkpoint serves.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

from llm_jax.core import distributed
from llm_jax.core.whole import whole_folder
from llm_jax.io import keys

KEPT = 2  # copies: a job may die while some processes have written the newest and others have not
ARRAYS, REST = "arrays.safetensors", "rest.json"


class Nearby:
    """The copies of one process in a folder of its own, one every `every` steps. warn: called with a sentence when one fails."""

    def __init__(self, folder: str | pathlib.Path, *, every: int, warn: Callable[[str], None]):
        self.folder, self.every, self.warn = pathlib.Path(folder) / f"process_{distributed.index()}", every, warn
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="nearby")
        self._written: Future[None] | None = None

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Copies this process's part of the arrays to the host, and has a thread write it; they may be donated afterwards."""
        self.wait()
        shards = {name: np.asarray(data) for name, data in _shards(keys.taken_out(state)).items()}
        self._written = self._writer.submit(self._write, step, shards, dict(extra))

    def restore(
        self, abstract: Any, *, after: int, fits: Callable[[int, dict[str, Any]], bool] = lambda step, extra: True
    ) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, extra) of the newest copy of a step > after that all processes have whole, laid out as `abstract` says.

        fits: asked of its step and `extra` whether it can be gone on with.
        """
        common = set.intersection(*(set(json.loads(said)) for said in distributed.everyones("nearby", json.dumps(self.steps()))))
        for step in sorted((step for step in common if step > after), reverse=True):
            found = self._read(step, keys.taken_out(abstract))
            useless = found is None or not fits(step, found[1])
            if distributed.first_said("nearby is of no use", "yes" if useless else None) is None and found is not None:
                state, extra = found
                return step, keys.put_back(state, abstract), extra
        return None

    def steps(self) -> list[int]:
        """Steps of the copies that were written whole."""
        return sorted(int(one.name) for one in self.folder.glob("*") if one.name.isdigit() and (one / REST).is_file())

    def wait(self) -> None:
        """Returns when what was saved is on disk, or has been reported as lost."""
        try:
            if self._written is not None:
                self._written.result()
        except OSError as error:
            self.warn(f"no copy could be kept in {self.folder}, training goes on: {error.strerror}")
        self._written = None

    def clear(self) -> None:
        """Removes all copies, which are of no use any more."""
        self.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, step: int, shards: dict[str, np.ndarray], extra: dict[str, Any]) -> None:
        with whole_folder(self.folder / str(step), stands=lambda _: False) as folder:
            save_file(shards, folder / ARRAYS)
            checksum = zlib.crc32((folder / ARRAYS).read_bytes())
            (folder / REST).write_text(json.dumps({"checksum": checksum, "extra": extra}))
        for old in self.steps()[:-KEPT]:
            shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def _read(self, step: int, abstract: Any) -> tuple[Any, dict[str, Any]] | None:
        """The state and the rest; None where the file is damaged, or does not have what this process's devices hold."""
        folder = self.folder / str(step)
        try:
            rest = json.loads((folder / REST).read_text())
            if zlib.crc32((folder / ARRAYS).read_bytes()) != rest["checksum"]:
                return None
            shards = load_file(folder / ARRAYS)
        except (OSError, ValueError, KeyError):
            return None
        leaves, tree = jax.tree_util.tree_flatten_with_path(abstract)
        found = [_assembled(jax.tree_util.keystr(path), like, shards) for path, like in leaves]
        return None if any(array is None for array in found) else (tree.unflatten(found), rest["extra"])


def _name(path: str, index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """Of the part of an array that a device holds."""
    return f"{path}@{','.join('{}:{}'.format(*one.indices(size)[:2]) for one, size in zip(index, shape, strict=True))}"


def _shards(state: Any) -> dict[str, jax.Array]:
    """Name → one copy of each part of each array that this process's devices hold."""
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        for shard in leaf.addressable_shards:
            found[_name(jax.tree_util.keystr(path), shard.index, leaf.shape)] = shard.data
    return found


def _assembled(path: str, like: jax.ShapeDtypeStruct, shards: Mapping[str, np.ndarray]) -> jax.Array | None:
    """An array laid out as `like`, of parts by name; None where one is missing."""
    wanted = like.sharding.addressable_devices_indices_map(like.shape)
    parts = {device: shards.get(_name(path, index, like.shape)) for device, index in wanted.items()}
    if any(part is None or part.dtype != like.dtype for part in parts.values()):
        return None
    kind = like.sharding.memory_kind
    placed = [jax.device_put(part, jax.sharding.SingleDeviceSharding(device, memory_kind=kind)) for device, part in parts.items()]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, placed)
