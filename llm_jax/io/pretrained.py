"""A folder of transformers as a whole: the model, its tokenizer, and the tokens that texts begin and end with."""

from __future__ import annotations

import os
import pathlib
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.core.mesh import Mesh
from llm_jax.core.sharding import named, parameter_specs
from llm_jax.data.corpora import StandardLibrary
from llm_jax.data.tokenizer_json import HuggingFace
from llm_jax.data.tokenizers import Fitted, SentencePiece
from llm_jax.io import huggingface, vocabularies
from llm_jax.io.huggingface import Dtype
from llm_jax.io.huggingface.fields import read_json
from llm_jax.models.model import Model, Params, abstract_parameters

TOKENIZER, MODELS = "tokenizer.json", ("tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class Pretrained:
    """What such a folder holds. tokenizer: None where there are no files of one, or none that are understood, as `untold` says.
    before, after: what its tokenizer puts around a text. end: ids that end a text; start: what a decoder's output begins with;
    family: its `model_type`."""

    model: Model
    vocabulary: int
    params: Params
    tokenizer: Fitted | None
    before: tuple[int, ...]
    after: tuple[int, ...]
    end: tuple[int, ...]
    start: int | None
    family: str
    untold: str = ""


def is_here(path: str | os.PathLike) -> bool:
    """Whether the folder has a config.json of transformers."""
    file = pathlib.Path(path).expanduser() / "config.json"
    return file.is_file() and "model_type" in read_json(file)


def load(path: str | os.PathLike, *, dtype: Dtype = "float32", mesh: Mesh | None = None) -> Pretrained:
    """Everything of a folder; mesh: whose devices the parameters are split over. Raises `ConfigError`."""
    folder = pathlib.Path(path).expanduser()
    split = None if mesh is None else shardings(*huggingface.read_config(folder), mesh)
    model, vocabulary, params = huggingface.load(folder, dtype=dtype, shardings=split)
    config = read_json(folder / "config.json")
    generation = folder / "generation_config.json"
    says = config | (read_json(generation) if generation.is_file() else {})
    # T5's output begins with padding, and not every config.json says so
    start = says.get("decoder_start_token_id", says.get("pad_token_id")) if model.encodes else says.get("bos_token_id")
    try:
        (tokenizer, around), untold = _tokenizer(folder), ""
    except ConfigError as error:  # token ids are understood all the same
        (tokenizer, around), untold = (None, ((), ())), str(error)
    ends, kind = _ids(says.get("eos_token_id")), config["model_type"]
    return Pretrained(model, vocabulary, params, tokenizer, *around, ends, start, kind, untold)


def tokenizer(path: str | os.PathLike) -> Fitted | None:
    """That of a folder; None where it has no files of one. Raises `ConfigError` where they are not understood."""
    return _tokenizer(pathlib.Path(path).expanduser())[0]


def shardings(model: Model, vocabulary: int, mesh: Mesh) -> Any:
    """Where on the mesh each parameter lies."""
    built = mesh.build()
    return named(built, parameter_specs(abstract_parameters(model, vocabulary), built))


Around = tuple[tuple[int, ...], tuple[int, ...]]


def _tokenizer(folder: pathlib.Path) -> tuple[Fitted | None, Around]:
    """The tokenizer, and what it puts before and after a text."""
    corpus = StandardLibrary()  # which a tokenizer that is read from a file does not look at
    if (folder / TOKENIZER).is_file():
        return HuggingFace(path=str(folder)).fit(corpus, folder), _around(folder / TOKENIZER)
    model = next((folder / name for name in MODELS if (folder / name).is_file()), None)
    if model is not None:
        fitted = SentencePiece(path=str(model)).fit(corpus, folder)
        return fitted, vocabularies.around(folder, fitted)
    described = vocabularies.describe(folder)
    if described is None:
        return None, ((), ())
    with tempfile.TemporaryDirectory() as scratch:
        for file in folder.glob("*config.json"):  # which say what ends a text
            shutil.copy(file, scratch)
        file = pathlib.Path(scratch) / TOKENIZER
        file.write_text(described, "utf-8")
        return HuggingFace(path=scratch).fit(corpus, folder), _around(file)


def _around(file: pathlib.Path) -> Around:
    """What a tokenizer.json's post-processor puts around a text."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    mask: Sequence[int] = tokenizer.encode("a").special_tokens_mask
    ids: Sequence[int] = tokenizer.encode("a").ids
    text = [place for place, special in enumerate(mask) if not special] or [len(mask)]
    return tuple(ids[: text[0]]), tuple(ids[text[-1] + 1 :])


def _ids(value: Any) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)
