"""Models of Hugging Face's transformers: folders of config.json and safetensors, read and written.

    model, vocabulary, params = load("folder")
    export(model, vocabulary, params, "other")

A family is a preset and a table of names (`family.py`); `FAMILIES` has them all.
"""

from __future__ import annotations

import functools
import os
import pathlib
import shutil
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import numpy as np

from llm_jax.core.config import ConfigError, nearest
from llm_jax.io.huggingface import arrays, weights
from llm_jax.io.huggingface.classic import BLOOM, GPT2, NEOX
from llm_jax.io.huggingface.encoders import BERT, T5
from llm_jax.io.huggingface.experts import DEEPSEEK_V3, MIXTRAL, QWEN3_MOE
from llm_jax.io.huggingface.family import Family
from llm_jax.io.huggingface.fields import Fields, harmless, read_json
from llm_jax.io.huggingface.forms import forms, rewritten
from llm_jax.io.huggingface.gemma import GEMMA2, GEMMA3
from llm_jax.io.huggingface.llama import LLAMA, MISTRAL, QWEN2, QWEN3, STABLELM
from llm_jax.io.huggingface.names import plans
from llm_jax.io.huggingface.rotary import usual_length
from llm_jax.models.model import Model, Params, initial_parameters

FAMILIES: dict[str, Family] = {
    family.kind: family
    for family in (
        GPT2,
        LLAMA,
        MISTRAL,
        QWEN2,
        QWEN3,
        STABLELM,
        GEMMA2,
        GEMMA3,
        NEOX,
        BLOOM,
        MIXTRAL,
        QWEN3_MOE,
        DEEPSEEK_V3,
        T5,
        BERT,
    )
}
Dtype = Literal["float32", "bfloat16", "float16"]
TOKENIZER_FILES = (
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template.*",
    "generation_config.json",
)


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def read_config(path: str | os.PathLike) -> tuple[Model, int]:
    """The model that a folder's (or its config.json's) configuration describes, and its vocabulary. Raises `ConfigError`."""
    file = pathlib.Path(path).expanduser()
    file = file / weights.CONFIG if file.is_dir() else file
    return _model(_fields(file))[:2]


def settings(path: str | os.PathLike) -> dict[str, Any]:
    """The keys of a folder's config.json that leave the arithmetic alone (token ids, labels' names …): for `export(settings=)`."""
    return harmless(read_json(pathlib.Path(path).expanduser() / weights.CONFIG))


def tokenizer_files(path: str | os.PathLike) -> list[pathlib.Path]:
    """A folder's files that are not the model's: for `export(tokenizer_files=)`."""
    folder = pathlib.Path(path).expanduser()
    return [file for name in TOKENIZER_FILES for file in sorted(folder.glob(name))]


def load(
    path: str | os.PathLike,
    *,
    shardings: Any = None,
    dtype: Dtype = "float32",
    layers: Literal["auto", "unrolled", "scanned"] = "auto",
) -> tuple[Model, int, Params]:
    """Model, vocabulary and parameters of a folder. Raises `ConfigError`.

    shardings: a tree like the parameters, of shardings; each process then reads only what its devices hold. None: all on the
    default device. dtype: of the parameters, but for those that the family keeps in float32. layers: as in the model's
    configuration.
    """
    folder = weights.Folder(path)
    fields = _fields(folder.path / weights.CONFIG, folder.shapes)
    model, vocabulary, family = _model(fields)
    model = model if layers == "auto" else model.with_layers(layers)
    tensors = arrays.Renamed(folder, family.renames)
    shapes = parameter_shapes(model, vocabulary)
    rows = family.rows(model, fields.values)
    found = plans(rows, model, shapes, tensors.shapes.__contains__)
    ignored = [pattern.replace("{depth}", str(model.final.depth)) for pattern in family.ignored]
    if model.head.tied:
        output = next(row.theirs for row in rows if row.ours == "head/words") + ".weight"
        tensors.check_tied(output, found["embedding/embedding"].pieces[()][0])
        ignored.append(output.replace(".", r"\."))
    tensors.check(found, ignored)
    places = arrays.flatten(shardings) if shardings is not None else {}
    leaves = {
        path: arrays.read(tensors, plan, places.get(path), np.dtype(jax.numpy.dtype(family.dtype(path, dtype))))
        for path, plan in found.items()
    }
    return model, vocabulary, arrays.nested(leaves)


@functools.lru_cache(maxsize=8)
def parameter_shapes(model: Model, vocabulary: int) -> dict[str, tuple[int, ...]]:
    """Path → shape of every parameter. One layer of a kind is traced, however many there are."""
    shapes = jax.eval_shape(functools.partial(initial_parameters, model, vocabulary), jax.random.key(0))
    return {path: leaf.shape for path, leaf in arrays.flatten(shapes).items()}


def _fields(file: pathlib.Path, tensors: Iterable[str] | None = None) -> Fields:
    if tensors is None and file.with_name(weights.INDEX).is_file() | file.with_name(weights.WHOLE).is_file():
        tensors = weights.Folder(file.parent).shapes
    return Fields(read_json(file), str(file), None if tensors is None else frozenset(tensors))


def _model(fields: Fields) -> tuple[Model, int, Family]:
    family = _family(fields.get("model_type"), fields.where)
    vocabulary = fields.get("vocab_size")
    return family.model(fields), vocabulary, family


def _family(kind: str, where: str) -> Family:
    if kind not in FAMILIES:
        raise ConfigError(
            f"{kind!r} is no family that is known here: did you mean {nearest(kind, sorted(FAMILIES))}? ({where})", "model_type"
        )
    return FAMILIES[kind]


# ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def export(
    model: Model,
    vocabulary: int,
    params: Params,
    path: str | os.PathLike,
    *,
    family: str | None = None,
    dtype: Dtype = "float32",
    max_shard_bytes: int = 5_000_000_000,
    tokenizer_files: Iterable[str | os.PathLike] = (),
    settings: Mapping[str, Any] | None = None,
) -> None:
    """A new folder that transformers loads: config.json, safetensors and the tokenizer's files. Raises `ConfigError`.

    family: a `model_type`; None is the first that computes what the model computes, if need be in another of its `forms`, whose
    parameters are then not those that were given. max_shard_bytes: of one file. settings: further keys of config.json, of those
    that leave the arithmetic alone.
    """
    kind, form, values = _described(model, family)
    values = _with_settings(values | {"vocab_size": vocabulary, "torch_dtype": dtype}, settings or {}, form)
    leaves, shapes = arrays.flatten(params), parameter_shapes(form, vocabulary)
    _check_shapes(parameter_shapes(model, vocabulary), leaves)
    if form != model:
        leaves = rewritten(model, form, leaves, shapes)
    found = plans(FAMILIES[kind].rows(form, values), form, shapes)
    tensors = arrays.Tensors(found, leaves, FAMILIES[kind].copies)
    dtypes = {name: FAMILIES[kind].dtype(path, dtype) for path, plan in found.items() for name, _ in plan.pieces.values()}
    dtypes |= {copy: dtypes[source] for copy, source in FAMILIES[kind].copies if source in dtypes}
    with weights.new_folder(path) as folder:
        weights.write(folder, tensors.shapes, tensors, dtypes=dtypes, limit=max_shard_bytes)
        for file in tokenizer_files:
            shutil.copy(file, folder)
        weights.write_json(folder / weights.CONFIG, values)


def _described(model: Model, family: str | None) -> tuple[str, Model, dict[str, Any]]:
    """The family, the form of the model that it has, and its config.json."""
    families = FAMILIES if family is None else {family: _family(family, "export")}
    reasons: dict[str, list[ConfigError]] = {kind: [] for kind in families}
    for form in forms(model):
        for kind, candidate in families.items():
            try:
                return kind, form, candidate.config(form)
            except ConfigError as error:
                reasons[kind].append(error)
    nearest = {kind: min(errors, key=_distance) for kind, errors in reasons.items()}
    if family is not None:
        raise nearest[family]
    order = sorted(nearest, key=lambda kind: _distance(nearest[kind]))[:3]
    ways = "; ".join(f"{kind} has {', '.join(getattr(nearest[kind], 'wants', [str(nearest[kind])]))}" for kind in order)
    raise ConfigError(f"is like no family of {', '.join(FAMILIES)}. The nearest: {ways}", "model")


def _distance(error: ConfigError) -> tuple[int, int]:
    """How far a model is from a family: components of other classes, then other values."""
    return getattr(error, "kinds", 0), len(getattr(error, "wants", ("",)))


def _with_settings(values: dict[str, Any], more: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """A config.json with further keys. Raises `ConfigError` where one of them could change the arithmetic."""
    unknown = sorted(set(more) - set(harmless(more)))
    if unknown:
        raise ConfigError(f"has {', '.join(unknown)}: only keys that leave the arithmetic alone can be added", "settings")
    more = {name: value for name, value in more.items() if name != "dtype"}  # today's name of torch_dtype
    same_labels = len(more.get("id2label", ())) == len(values.get("id2label", ()))
    names = {name: more[name] for name in ("id2label", "label2id") if name in more and same_labels}
    return usual_length(model.final.in_full[0].position) | more | values | names


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], leaves: Mapping[str, Any]) -> None:
    """Raises `ConfigError` unless the parameters are those of the model."""
    for path, shape in shapes.items():
        if path not in leaves or tuple(leaves[path].shape) != shape:
            got = list(leaves[path].shape) if path in leaves else "nothing"
            raise ConfigError(f"must have the shape {list(shape)} that the model says, got {got}", f"params {path}")
        if not getattr(leaves[path], "is_fully_addressable", True):
            raise ConfigError("is spread over several processes: bring it together with process_allgather first", f"params {path}")
