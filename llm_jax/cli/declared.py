"""The flags that say what an experiment file declares, and which of it is meant, for every command that takes one."""

from __future__ import annotations

import pathlib
from dataclasses import replace
from typing import TYPE_CHECKING

from absl import flags

from llm_jax.core.config import ConfigError
from llm_jax.core.written import override_text

if TYPE_CHECKING:
    from llm_jax.lab.experiment import Ablation


def define(values: flags.FlagValues) -> None:
    """Defines the flags that `declared` reads."""
    flags.DEFINE_string("experiment", None, "The experiment file: it declares `ablation` or `experiment`.", flag_values=values)
    flags.DEFINE_string(
        "scale", None, "One of the sizes that the file declares (default: small, if it is one).", flag_values=values
    )
    flags.DEFINE_multi_string("set", [], "path=value: a field of the base experiment, e.g. train.steps=500.", flag_values=values)


def require_named(values: flags.FlagValues) -> None:
    """Raises `ConfigError` unless the flags name an experiment file; JAX is not imported for it."""
    if values.experiment is None:
        raise ConfigError(
            "--experiment is missing: name an experiment file, e.g. --experiment=experiments/c06_positional_encoding.py"
        )
    if not pathlib.Path(values.experiment).is_file():
        raise ConfigError("is no file: give --experiment=PATH of an experiment file", values.experiment)


def declared(values: flags.FlagValues) -> tuple[Ablation, str | None]:
    """The ablation of the file with the flags' changes, and the scale that it is at. Raises `ConfigError`."""
    require_named(values)
    from llm_jax.lab.experiment import load

    ablation = load(values.experiment)
    scale = values.scale or ("small" if "small" in ablation.scales else None)
    ablation = ablation.at_scale(scale)
    if values.set:
        ablation = replace(ablation, base=override_text(ablation.base, values.set))
    for path in (assignment.partition("=")[0].strip() for assignment in values.set):
        replaced = [any(path == own or path.startswith(f"{own}.") for own in changes) for changes in ablation.arms.values()]
        if path in ablation.nuisance or all(replaced):
            by = "the grid" if path in ablation.nuisance else "every arm"
            raise ConfigError(f"is set by {by}, so --set would change nothing: change it in {values.experiment}", path)
    return ablation, scale
