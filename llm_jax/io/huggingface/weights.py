"""A folder of safetensors files: tensors read by slices when they are asked for, and written one shard at a time."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.whole import whole_folder
from llm_jax.io.huggingface.fields import read_json
from llm_jax.io.huggingface.layouts import Index

WHOLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
DTYPES = {"F64", "F32", "F16", "BF16"}  # what a weight may be stored in; others need their scales
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
class Folder:
    """The tensors of a folder by name. shapes: of each; nothing is read before `read`."""

    def __init__(self, path: str | os.PathLike):
        self.path = pathlib.Path(path).expanduser()
        if not self.path.is_dir():
            raise ConfigError("is no folder: give one that holds config.json and safetensors files", str(path))
        self._slices: dict[str, Any] = {}
        for file, names in self._files().items():
            self._open(file, names)
        self.shapes = {name: tuple(piece.get_shape()) for name, piece in self._slices.items()}

    def _files(self) -> dict[str, set[str] | None]:
        """File name → the tensors it must hold, or None for any."""
        if (self.path / INDEX).is_file():
            files: dict[str, set[str] | None] = {}
            for name, file in read_json(self.path / INDEX).get("weight_map", {}).items():
                files.setdefault(file, set()).add(name)  # type: ignore[union-attr]
            return files
        if (self.path / WHOLE).is_file():
            return {WHOLE: None}
        if any(next(self.path.glob(pattern), None) for pattern in PICKLES):
            raise ConfigError(
                "holds pickled weights, which run code when they are read: convert them with"
                " `AutoModel….from_pretrained(folder).save_pretrained(other)`, which writes safetensors",
                str(self.path),
            )
        raise ConfigError(f"holds neither {WHOLE} nor {INDEX}", str(self.path))

    def _open(self, file: str, names: set[str] | None) -> None:
        import safetensors

        if not (self.path / file).is_file():
            raise ConfigError(f"lacks {file}, which its index names: download the folder again", str(self.path))
        try:
            opened = safetensors.safe_open(self.path / file, framework="numpy")
        except safetensors.SafetensorError as error:
            raise ConfigError(f"is no whole safetensors file: {error}", str(self.path / file)) from None
        absent = sorted((names or set()) - set(opened.keys()))
        if absent:
            raise ConfigError(f"lacks {', '.join(absent[:5])}, which the index says it holds", str(self.path / file))
        for name in opened.keys():  # noqa: SIM118 (the file is no mapping)
            self._slices[name] = opened.get_slice(name)

    def read(self, name: str, index: Index) -> np.ndarray:
        """A slice of a tensor, in the dtype it is stored in."""
        piece = self._slices[name]
        if piece.get_dtype() not in DTYPES:
            raise ConfigError(f"is stored as {piece.get_dtype()}, which is read only after it has been dequantized", name)
        return piece[index] if index else piece[...]


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in order, cut so that a file holds at most `limit` bytes, or a single tensor. sizes: bytes of each."""
    found: list[list[str]] = []
    used = limit
    for name, size in sizes.items():
        if used + size > limit and (not found or found[-1]):
            found.append([])
            used = 0
        found[-1].append(name)
        used += size
    return found


def write(
    folder: pathlib.Path,
    shapes: Mapping[str, tuple[int, ...]],
    tensor: Callable[[str], np.ndarray],
    *,
    dtypes: Mapping[str, str],
    limit: int,
) -> None:
    """Writes every tensor; one file's are in memory at a time. tensor: gives one by name; dtypes: of each, in the file."""
    from safetensors.numpy import save_file

    numbers = {name: np.dtype(jnp.dtype(dtypes[name])) for name in shapes}
    sizes = {name: numbers[name].itemsize * math.prod(shape) for name, shape in shapes.items()}
    plan = shards(sizes, limit)
    files = [WHOLE] if len(plan) == 1 else [f"model-{i + 1:05}-of-{len(plan):05}.safetensors" for i in range(len(plan))]
    for file, names in zip(files, plan, strict=True):
        save_file({name: tensor(name).astype(numbers[name]) for name in names}, folder / file, metadata={"format": "pt"})
    if len(plan) > 1:
        places = {name: file for file, names in zip(files, plan, strict=True) for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places})


def write_json(file: pathlib.Path, values: Mapping[str, Any]) -> None:
    """The object as an indented file."""
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", "utf-8")


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A folder under a temporary name until everything is in it. Raises `ConfigError` where one is in the way."""
    target = pathlib.Path(path).expanduser().absolute()

    def stands(folder: pathlib.Path) -> bool:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise ConfigError("exists already: give the name of a new folder, or remove it first", str(path))
        return False  # an empty one makes room

    stands(target)
    with whole_folder(target, stands=stands) as partial:
        yield partial
