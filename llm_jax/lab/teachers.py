"""Models that are trained already, to be asked by an objective while another is trained."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax

from llm_jax.core.config import ConfigError, fingerprint
from llm_jax.core.paths import to_path
from llm_jax.core.platform import cache_dir
from llm_jax.core.sharding import named, parameter_specs, unbox
from llm_jax.data import prepared
from llm_jax.data.tokenizers import Fitted
from llm_jax.io import huggingface, pretrained
from llm_jax.lab import trained
from llm_jax.lab.workfolder import write
from llm_jax.models.model import Params, abstract_parameters
from llm_jax.objectives.objective import Objective
from llm_jax.train.pretrain import Teacher

WHERE = "objective.teacher"


@dataclass(frozen=True)
class Found:
    """A teacher. identity: what numbers depend on of it; read: its parameters, on the devices that shardings name."""

    asked: Teacher
    identity: str
    read: Callable[[Any], Params]
    _known: dict[jax.sharding.Mesh, Params] = field(default_factory=dict)

    def parameters(self, mesh: jax.sharding.Mesh) -> Params:
        """Split over the mesh as its own training would split them; read once."""
        if mesh not in self._known:
            self._known[mesh] = self.read(named(mesh, parameter_specs(self._boxed, mesh)))
        return self._known[mesh]

    @property
    def shapes(self) -> Any:
        """Of its parameters, which need not be read for it."""
        return unbox(self._boxed)

    @property
    def _boxed(self) -> Any:
        return abstract_parameters(self.asked.model, self.asked.vocabulary)


def find(path: str, objective: Objective, tokens: Fitted) -> Found:
    """The model in a folder, of which no parameters are read yet.

    Raises `ConfigError` where there is none, where the objective cannot be asked of it, or where it reads text otherwise than
    `tokens` does.
    """
    folder = to_path(path)
    if pretrained.is_here(folder):
        found, tokenizer = _published(folder), pretrained.tokenizer(folder)
    elif trained.is_here(folder):
        kept = trained.find(folder)
        found, tokenizer = _own(kept), kept.tokenizer
    else:
        wanted = "a folder with a config.json of transformers, or one that `python -m llm_jax run --workdir=` made"
        raise ConfigError(f"is no model: give {wanted}, got {path!r}", WHERE)
    if tokenizer is None:
        raise ConfigError(f"is {path!r}, which has no tokenizer: nobody can say whether its ids are this experiment's", WHERE)
    if tokenizer.fingerprint != tokens.fingerprint:
        way = "give the experiment the tokenizer that it was trained with"
        raise ConfigError(f"is {path!r}, whose tokenizer is not this experiment's, so that ids mean other texts: {way}", WHERE)
    if found.asked.vocabulary < tokens.vocabulary:
        least = f"{found.asked.vocabulary} ids, and this experiment has {tokens.vocabulary}"
        raise ConfigError(f"is {path!r}, which knows {least}: train one for the same special tokens", WHERE)
    try:
        objective.check(found.asked.model)
    except ConfigError as error:
        raise ConfigError(f"is {path!r}, which cannot be asked: {error}", WHERE) from None
    return found


def _published(folder: pathlib.Path) -> Found:
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors*"))]  # and the index that says what lies where
    digest = fingerprint([[file.name, _sha256(file)] for file in files])
    read = lambda where: huggingface.load(folder, shardings=where)[2]  # noqa: E731
    return Found(Teacher(*huggingface.read_config(folder)), digest, read)


def _own(kept: trained.Kept) -> Found:
    """Of the newest checkpoint, which is the one that will be read."""
    model, step = kept.experiment.model, max(kept.steps(), default=None)
    read = lambda where: kept.load(step, mesh=jax.tree.leaves(where)[0].mesh).params  # noqa: E731
    of = fingerprint([kept.result["provenance"]["corpus"], kept.written(step)])
    return Found(Teacher(model, kept.tokenizer.vocabulary), f"{kept.result['trial']} ({of}) at step {step or 0}", read)


def _sha256(file: pathlib.Path) -> str:
    """Of all of a file, which is read again only when its size or time changes."""
    told = file.stat()
    note = cache_dir() / "hashed" / fingerprint([str(file.resolve()), told.st_size, told.st_mtime_ns])
    if not note.is_file():
        write(note, prepared.described(file)["sha256"])
    return json.loads(note.read_text())
