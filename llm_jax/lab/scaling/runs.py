"""The finished trials of work folders as points: how large, how long trained, at what cost, with what loss."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llm_jax.core.config import ConfigError, from_json, nearest
from llm_jax.lab.experiment import Experiment, sign
from llm_jax.lab.problems import Trial, problems
from llm_jax.lab.summary import read as read_trials
from llm_jax.models import count


def _body(trial: Trial) -> int:
    return count.parameters(from_json(trial["config"], Experiment).model, 0)


def _active(trial: Trial) -> int:
    model = from_json(trial["config"], Experiment).model
    return trial["parameters"] - count.parameters(model, 0) + count.active_parameters(model, 0)


# what N counts. all: every parameter. body: those whose number does not depend on the vocabulary (Kaplan et al. 2020). active: all
# but the experts that a token does not visit
COUNTS: dict[str, Callable[[Trial], int]] = {"all": lambda trial: trial["parameters"], "body": _body, "active": _active}


@dataclass(frozen=True)
class Runs:
    """Points, one a trial: arm and seed; N parameters, D training tokens, C training FLOPs, loss (float64 [n] each)."""

    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    N: np.ndarray
    D: np.ndarray
    C: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.arms)

    def at(self, variables: Sequence[str]) -> np.ndarray:
        """The named variables, [n, K]."""
        return np.column_stack([getattr(self, name) for name in variables])

    def where(self, chosen: np.ndarray) -> Runs:
        """Those at which a mask or indices point."""
        index = np.arange(len(self))[chosen]
        numbers = (column[index] for column in (self.N, self.D, self.C, self.loss))
        return Runs(tuple(self.arms[i] for i in index), tuple(self.seeds[i] for i in index), *numbers)

    def mean(self, arm: str, name: str) -> float:
        """Of an arm's runs."""
        return float(getattr(self, name)[[own == arm for own in self.arms]].mean())


def read(workdirs: Sequence[str | pathlib.Path], *, metric: str, counted: str) -> tuple[Runs, list[str]]:
    """The final trials that ended well, and what a reader must be told of the others, in sentences.

    metric: a loss; counted: one of `COUNTS`. Raises `ConfigError` where there are no such trials, or none has the metric.
    """
    trials = read_trials(workdirs)
    ablation = max(trials, key=lambda trial: trial["provenance"]["date"])["ablation"]
    finals = [trial for trial in trials if trial["phase"] == "final" and trial["status"] == "done"]
    if not finals:
        ended = ", ".join(sorted({f"{trial['phase']} {trial['status']}" for trial in trials}))
        raise ConfigError(f"holds no final run that ended well (there are only: {ended})", str(workdirs[0]))
    known = sorted(set.intersection(*(set(trial["metrics"]) for trial in finals)))
    if metric not in known:
        raise ConfigError(f"is no metric that all runs have: did you mean {nearest(metric, known)}?", f"--metric={metric}")
    losses = np.array([trial["metrics"][metric] for trial in finals], np.float64)
    if sign(metric, judged=ablation["metric"], mode=ablation["mode"]) < 0 or not (losses > 0).all():
        raise ConfigError("is no loss, which falls to a floor as models grow: name one, such as valid/loss", f"--metric={metric}")
    columns = [[COUNTS[counted](trial) for trial in finals], *([trial[key] for trial in finals] for key in ("tokens", "flops"))]
    runs = Runs(
        tuple(trial["arm"] for trial in finals),
        tuple(trial["seed"] for trial in finals),
        *(np.array(column, np.float64) for column in columns),
        losses,
    )
    return runs, problems(trials, ablation)
