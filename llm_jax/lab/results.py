"""What is written down about a finished trial: `results.json`, from which alone every report is made."""

from __future__ import annotations

import datetime
import functools
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax

from llm_jax.core.config import fingerprint, to_json
from llm_jax.lab.plan import Cost, Run

LIBRARIES = ("llm_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


@dataclass(frozen=True)
class Provenance:
    """Where a group's numbers come from. corpus, tokenizer: fingerprints; population: trials trained together.

    teacher: who was asked in training, if anybody was; worker: which of several trained it.
    """

    ablation: Mapping[str, Any]
    command: str
    corpus: str
    tokenizer: str
    population: int
    group: str
    teacher: str | None = None
    worker: str | None = None

    def described(self) -> dict[str, Any]:
        """As JSON, with the machine and the versions of the libraries that numbers depend on."""
        device = jax.devices()[0]
        return {
            "command": self.command,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "code": code(),
            "platform": device.platform,
            "device": device.device_kind,
            "devices": len(jax.devices()),
            "population": self.population,
            "group": self.group,
            "corpus": self.corpus,
            "tokenizer": self.tokenizer,
            "teacher": self.teacher,
            "worker": self.worker,
        }


def finished(
    run: Run,
    origin: Provenance,
    cost: Cost,
    *,
    metrics: Mapping[str, float],
    curve: Sequence[Mapping[str, float]],
    incidents: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """The results of a trial that ran to its end: "done", or "diverged" where a final metric is not finite.

    incidents: what its guard did, of which the batches' texts stay in the file. "lost" are the steps whose record the curve lacks,
    since the file was damaged.
    """
    names = dict.fromkeys(name for row in curve for name in row)
    steps, every = run.experiment.train.steps, run.experiment.train.log_every
    lost = sorted({*range(every, steps, every), steps} - {row["step"] for row in curve})
    well = bool(metrics) and all(math.isfinite(v) for v in metrics.values())
    return _described(run, origin) | {
        "status": "done" if well else "diverged",
        "error": None,
        "metrics": dict(metrics),
        "curve": {name: [row.get(name) for row in curve] for name in names},
        "lost": lost,
        "incidents": [{k: v for k, v in line.items() if k != "batches"} for line in incidents],
        "parameters": cost.parameters,
        "tokens": cost.tokens,
        "flops": cost.flops,
        "seconds": curve[-1].get("seconds") if curve else None,
    }


def failed(run: Run, origin: Provenance, error: Exception) -> dict[str, Any]:
    """The results of a trial whose program raised `error`; the next run of the same command tries it again."""
    return _described(run, origin) | {
        "status": "failed",
        "error": f"{type(error).__name__}: {error}",
        "metrics": {},
        "curve": {},
        "parameters": 0,
        "tokens": 0,
        "flops": 0.0,
        "seconds": None,
    }


def _described(run: Run, origin: Provenance) -> dict[str, Any]:
    return {
        "trial": run.name,
        "arm": run.arm,
        "phase": run.phase,
        "nuisance": dict(run.nuisance),
        "seed": run.seed,
        "fingerprint": fingerprint(run.experiment),
        "config": to_json(run.experiment),
        "ablation": dict(origin.ablation),
        "provenance": origin.described(),
    }


@functools.cache
def code() -> str:
    """Fingerprint of this package's source, which says more than its version while it is being changed."""
    root = pathlib.Path(__file__).parents[1]
    return fingerprint([[file.relative_to(root).as_posix(), file.read_text()] for file in sorted(root.rglob("*.py"))])


def versions() -> dict[str, str]:
    """Of Python and of the libraries that numbers depend on."""
    known = {"python": sys.version.split()[0]}
    for name in LIBRARIES:
        try:
            known[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            known[name] = "not installed"
    return known
