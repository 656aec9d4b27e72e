"""What an ablation trained, found again: a trial of a work folder with its parameters, as its evaluation saw them."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from llm_jax.core import sharding
from llm_jax.core.config import ConfigError, from_json, nearest
from llm_jax.core.paths import absolute, reaching
from llm_jax.core.platform import cache_dir
from llm_jax.data.tokenizers import Fitted
from llm_jax.io import checkpoint
from llm_jax.lab import experiment as declared
from llm_jax.lab.experiment import Experiment
from llm_jax.lab.workfolder import MEMBERS, WorkFolder
from llm_jax.models.model import Model, Params, abstract_parameters, stack_layers, unstack_layers
from llm_jax.optim.optimizers import Optimizer
from llm_jax.train.pretrain import trial as functions


@dataclass(frozen=True)
class Trained:
    """A trained model. step: of the checkpoint that its parameters are from; folder: the trial's; result: its `results.json`; mesh:
    what its parameters are split over, None: they are on the default device."""

    experiment: Experiment
    model: Model
    params: Params
    tokenizer: Fitted
    step: int
    folder: pathlib.Path
    result: dict[str, Any]
    mesh: jax.sharding.Mesh | None = None


def is_here(path: str | os.PathLike) -> bool:
    """Whether the folder is one that `python -m llm_jax run` trains into, or one of its trials."""
    folder = absolute(path)
    with reaching(folder):
        return (folder / "trials").is_dir() or folder.parent.name == "trials"


@dataclass(frozen=True)
class Kept:
    """A finished trial, its parameters not read yet. work: the folder that it was trained into; result: its `results.json`."""

    work: pathlib.Path
    result: dict[str, Any]
    experiment: Experiment
    tokenizer: Fitted

    def steps(self) -> list[int]:
        """Those of its checkpoints that are kept, the oldest first."""
        return checkpoint.steps(_group(self.work, self.result) / "checkpoints")

    def written(self, step: int | None) -> str:
        """A fingerprint of the files of one of its checkpoints; an empty one where that is gone."""
        return checkpoint.written(_group(self.work, self.result) / "checkpoints", step)

    def load(self, step: int | None = None, *, mesh: jax.sharding.Mesh | None = None) -> Trained:
        """With its parameters. Raises `ConfigError` where its checkpoint, of the step that is asked for, is gone.

        mesh: whose devices each read what they hold, of this trial and of those before it in its group; the others' are not read.
        """
        found, params = _parameters(self.work, self.result, self.experiment, self.tokenizer, step, mesh)
        folder = self.work / "trials" / self.result["trial"]
        return Trained(self.experiment, self.experiment.model, params, self.tokenizer, found, folder, self.result, mesh)


def load(
    path: str | os.PathLike,
    *,
    arm: str | None = None,
    trial: str | None = None,
    step: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Trained:
    """The trial that `find` finds, with its parameters. step: of the checkpoint, None is the newest. Raises `ConfigError`."""
    return find(path, arm=arm, trial=trial).load(step, mesh=mesh)


def find(path: str | os.PathLike, *, arm: str | None = None, trial: str | None = None) -> Kept:
    """The trial of a work folder, or of its own folder, that is asked for: by name, or the best final one (of an arm).

    Raises `ConfigError` where there is none, or where its tokenizer is gone.
    """
    folder = absolute(path)
    if folder.parent.name == "trials":
        folder, trial = folder.parent.parent, folder.name
    result = _chosen(_finished(folder), folder, arm, trial)
    try:
        experiment = from_json(result["config"], Experiment)
    except ConfigError as error:
        raise ConfigError(
            f"{error} (of {result['trial']}): import the file that defines its components first (inspect: --experiment=FILE)"
        ) from None
    tokenizer = experiment.fitted(cache_dir())
    if tokenizer.fingerprint != result["provenance"]["tokenizer"]:
        raise ConfigError(f"is not the one that {result['trial']} was trained with: its corpus or file has changed", "tokenizer")
    return Kept(folder, result, experiment, tokenizer)


def history(found: Trained) -> Iterator[tuple[int, Params]]:
    """(step, parameters as its evaluation would see them) of every checkpoint of a trial that is kept, the oldest first.

    `checkpoints.keep_every` says how many there are.
    """
    work = found.folder.parent.parent
    for step in checkpoint.steps(_group(work, found.result) / "checkpoints"):
        yield _parameters(work, found.result, found.experiment, found.tokenizer, step, found.mesh)


# ── which trial ──────────────────────────────────────────────────────────────────────────────────────────────────────
def _finished(folder: pathlib.Path) -> dict[str, dict[str, Any]]:
    """Name → results of all trials that ran to their end."""
    work = WorkFolder(folder)
    found = {file.parent.name: work.result(file.parent.name) for file in sorted(folder.glob("trials/*/results.json"))}
    return {name: result for name, result in found.items() if result is not None}


def _chosen(known: dict[str, dict[str, Any]], folder: pathlib.Path, arm: str | None, trial: str | None) -> dict[str, Any]:
    if trial is not None:
        if trial not in known:
            raise ConfigError(f"has no finished trial {trial!r}: did you mean {nearest(trial, sorted(known)) or '?'}?", str(folder))
        return known[trial]
    finals = [result for result in known.values() if result["phase"] == "final" and result["status"] == "done"]
    if not finals:
        raise ConfigError("has no final trial that is done: run its command again, it goes on from there", str(folder))
    arms = list(dict.fromkeys(result["arm"] for result in finals))
    if arm is not None and arm not in arms:
        raise ConfigError(f"has no final trial of {arm!r}: its arms are {', '.join(arms)}", str(folder))
    return min((result for result in finals if arm in (None, result["arm"])), key=_score)


def _score(result: dict[str, Any]) -> float:
    """Less is better."""
    ablation = result["ablation"]
    metric = ablation["metric"]
    return declared.sign(metric, judged=metric, mode=ablation["mode"]) * result["metrics"][metric]


# ── its parameters ───────────────────────────────────────────────────────────────────────────────────────────────────
def _group(folder: pathlib.Path, result: dict[str, Any]) -> pathlib.Path:
    """The folder of the group that a trial was trained in."""
    return WorkFolder(folder).group(result["provenance"]["group"])


def _parameters(
    folder: pathlib.Path,
    result: dict[str, Any],
    experiment: Experiment,
    tokenizer: Fitted,
    step: int | None,
    mesh: jax.sharding.Mesh | None,
) -> tuple[int, Params]:
    """Step, and what evaluation saw of its checkpoint, of the newest if it is None: the average where there is one."""
    name, group = result["trial"], _group(folder, result)
    if not (group / MEMBERS).is_file():
        kept = "only final trials' are kept" if result["phase"] == "tune" else "remove its results.json and run the command again"
        raise ConfigError(f"is gone, with the parameters of {name}: {kept}", str(group))
    members: Sequence[str] = json.loads((group / MEMBERS).read_text())
    index, part = members.index(name), "params" if experiment.train.average is None else "average"
    made = part == "params" and type(experiment.optimizer).evaluation_params is not Optimizer.evaluation_params
    model, vocabulary = experiment.model, tokenizer.vocabulary
    split = None if mesh is None else partial(_split, model, vocabulary, mesh, index + 1)
    wanted: dict[str, Any] = {part: None} | ({"opt_state": partial(_optimizer_state, experiment, tokenizer)} if made else {})
    found = checkpoint.read(group / "checkpoints", wanted, step=step, layout=split)
    if found is None and step is not None:
        kept = ", ".join(map(str, checkpoint.steps(group / "checkpoints", whole=True))) or "none"
        raise ConfigError(f"is {step}, but the checkpoints of {name} that were kept are of {kept}", "step")
    if found is None:
        raise ConfigError(f"holds no whole checkpoint of {name}: remove its results.json and run the command again", str(group))
    step, state = found

    def seen(own: dict[str, Any]) -> Params:
        params = experiment.optimizer.evaluation_params(own["opt_state"][1], own["params"]) if made else own[part]
        return stack_layers(unstack_layers(params, _as_stored(params, model)), model)

    if mesh is None:
        return step, seen(jax.tree.map(lambda leaf: jax.device_put(leaf[index]), state))
    where = sharding.named(mesh, sharding.parameter_specs(abstract_parameters(model, vocabulary), mesh))
    return step, jax.jit(lambda state: seen(jax.tree.map(lambda leaf: leaf[index], state)), out_shardings=where)(state)


def _as_stored(params: Params, model: Model) -> Model:
    """The model with layers scanned or unrolled, as they were where it was trained."""
    scanned = "layers" in params or any("layers" in part for part in params.values() if isinstance(part, dict))
    return model.with_layers("scanned" if scanned else "unrolled")


def _split(model: Model, vocabulary: int, mesh: jax.sharding.Mesh, members: int, stored: dict[str, Any]) -> Any:
    """Of the parts of a population's state its first `members`, each as its own training would split it over the mesh."""
    params = stored.get("params", stored.get("average"))
    boxed = abstract_parameters(_as_stored(params, model), vocabulary)
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), stored)
    specs = sharding.state_specs(sharding.unbox(boxed), sharding.parameter_specs(boxed, mesh), one)
    where = sharding.named(mesh, specs, leading=(None,))
    return jax.tree.map(lambda leaf, to: jax.ShapeDtypeStruct((members, *leaf.shape), leaf.dtype, sharding=to), one, where)


def _optimizer_state(experiment: Experiment, tokenizer: Fitted, stored: dict[str, Any]) -> Any:
    """Shapes of the optimizer's state of a population of one."""
    one = functions(replace(experiment, model=_as_stored(stored["params"], experiment.model)), tokenizer)
    state = jax.eval_shape(one.init, {"seed": jax.ShapeDtypeStruct((), np.int32)}).opt_state
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), state)
