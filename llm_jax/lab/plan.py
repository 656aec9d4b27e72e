"""What a run will do before it does it: trials, groups, and their cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import jax
from rich.table import Table

from llm_jax.core import platform
from llm_jax.core.config import fingerprint
from llm_jax.core.whole import safe
from llm_jax.lab import footprint
from llm_jax.lab.experiment import Ablation, Experiment
from llm_jax.lab.population import groups, layout, structure
from llm_jax.lab.sources import Reading
from llm_jax.models import count
from llm_jax.models.model import Model
from llm_jax.objectives.objective import Objective
from llm_jax.train.pretrain import Teacher

Phase = Literal["tune", "final"]

Largest = Callable[[Experiment], int]  # trials of one program, at most

SHARE_OF_MEMORY = 0.8  # that the trials of a program may be estimated to take

# tuning seeds start here, so that they never meet the seeds the winner is trained on
TUNING_SEED = 1_000_000


@dataclass(frozen=True)
class Run:
    """One trial of an ablation: which arm, at which point of the grid, with which seed, and why."""

    arm: str
    phase: Phase
    nuisance: Mapping[str, float]
    seed: int
    experiment: Experiment

    @property
    def name(self) -> str:
        """The trial's folder: readable, and unique because it ends in the experiment's fingerprint."""
        return f"{safe(self.arm)}-{self.phase}-{fingerprint(self.experiment)}"


def tuning_runs(ablation: Ablation) -> list[Run]:
    """Every arm at every point of the grid on the tuning seeds; none where the grid leaves nothing to choose."""
    if len(ablation.grid) <= 1:
        return []
    seeds = [TUNING_SEED + ablation.base.seed + i for i in range(ablation.tuning_seeds)]
    return [
        Run(arm, "tune", point, seed, ablation.experiment(arm, point, seed))
        for arm in ablation.arms
        for point in ablation.grid
        for seed in seeds
    ]


def final_runs(ablation: Ablation, winners: Mapping[str, Mapping[str, float]]) -> list[Run]:
    """Every arm that has a winner, at that point of the grid, on fresh seeds."""
    seeds = [ablation.base.seed + i for i in range(ablation.seeds)]
    return [
        Run(arm, "final", winners[arm], seed, ablation.experiment(arm, winners[arm], seed))
        for arm in ablation.arms
        if arm in winners
        for seed in seeds
    ]


def winners(ablation: Ablation, results: Sequence[dict]) -> dict[str, dict[str, float]]:
    """Arm → the point of its grid with the best mean tuning metric over the tuning seeds.

    A point with a diverged trial cannot win, and an arm with none left has no winner. An arm whose tuning is not complete, because
    a trial failed, has none yet: another winner might come of it later.
    """
    if len(ablation.grid) <= 1:
        return dict.fromkeys(ablation.arms, ablation.grid[0])
    metric = ablation.tuning_metric or ablation.metric
    sign = ablation.sign(metric)
    best: dict[str, dict[str, float]] = {}
    for arm in ablation.arms:
        scored = []
        ended = sum(r["arm"] == arm and r["phase"] == "tune" for r in results)
        if ended < len(ablation.grid) * ablation.tuning_seeds:
            continue
        for point in ablation.grid:
            values = [
                r["metrics"].get(metric) for r in results if r["arm"] == arm and r["phase"] == "tune" and r["nuisance"] == point
            ]
            if values and all(v is not None for v in values):
                scored.append((sign * math.fsum(values) / len(values), len(scored), point))
        if scored:
            best[arm] = min(scored)[2]
    return best


@dataclass(frozen=True)
class Cost:
    """What one trial takes: parameters, training tokens of text, FLOPs of training and of evaluation, bytes while training.

    shared: bytes besides that all trials of a program use together, a teacher's parameters.
    """

    parameters: int
    tokens: int
    flops: float
    evaluation: float
    memory: float
    shared: float = 0.0


def cost(
    experiment: Experiment, vocabulary: int, *, scored: Sequence[tuple[int, int]] = (), teacher: Teacher | None = None
) -> Cost:
    """The analytic cost of a trial. scored: (tokens, sequence length) of every evaluation that it makes; teacher: whom it asks."""
    data, model = experiment.data, experiment.model
    rows, length = experiment.train.steps * data.batch_size, data.sequence_length

    def flops(objective: Objective, length: int, of: Model = model, ids: int = vocabulary) -> float:
        return count.flops_per_row(of, ids, *objective.lengths(length, model=model, packed=data.packing.segmented))

    forward = sum(n / m * flops(each, m) / 3 for n, m in scored for each in experiment.objective.evaluated.values())
    asked = 0.0 if teacher is None else flops(experiment.objective, length, teacher.model, teacher.vocabulary) / 3
    return Cost(
        count.parameters(model, vocabulary),
        rows * length,
        rows * (flops(experiment.objective, length) + asked),
        forward,
        footprint.memory(experiment, vocabulary, {}, platform.name()),
        0.0 if teacher is None else 4.0 * count.parameters(teacher.model, teacher.vocabulary),
    )


def largest_population(experiment: Experiment, each: Cost, *, memory: float, devices: int, wanted: int) -> int:
    """How many of `wanted` trials may share a program: as many as fit the devices' memory together, the padding counted.

    What they share is there once, for each part of the mesh that does not split it. At least one: a trial that is estimated too
    large is tried anyway.
    """
    most = min(wanted, int(SHARE_OF_MEMORY * memory / each.memory))
    for members in range(most, 1, -1):
        mesh, room = layout(experiment, members, devices)
        copies = math.prod(mesh.sizes[axis] for axis in ("population", "replica", "data"))
        if room * each.memory + copies * each.shared <= SHARE_OF_MEMORY * memory:
            return members
    return 1


def table(ablation: Ablation, costs: Mapping[str, Cost], largest: Largest, flops_per_second: float) -> Table:
    """The plan as a table, an arm a row; `flops_per_second` is what the machine is expected to reach."""
    finals = final_runs(ablation, dict.fromkeys(ablation.arms, ablation.grid[0]))
    runs = [*tuning_runs(ablation), *finals]
    shown = Table(
        title=ablation.question,
        caption=_caption(ablation, runs, costs, largest, flops_per_second),
        title_justify="left",
        caption_justify="left",
    )
    shown.add_column("arm")
    for column in (
        "grid",
        "tuning runs",
        "final runs",
        "groups",
        "parameters",
        "tokens a run",
        "FLOPs a run",
        "memory a run",
        "est. time",
    ):
        shown.add_column(column, justify="right")
    for arm in ablation.arms:
        own = [r for r in runs if r.arm == arm]
        each = costs[arm]
        final = sum(r.phase == "final" for r in own)
        shown.add_row(
            arm,
            str(len(ablation.grid)),
            str(len(own) - final),
            str(final),
            str(len(_groups(own, largest))),
            f"{each.parameters:,}",
            f"{each.tokens:,}",
            f"{each.flops:.3g}",
            f"{(each.memory + each.shared) / 2**20:,.0f} MiB",
            duration(len(own) * (each.flops + each.evaluation) / flops_per_second),
        )
    return shown


def readings(sources: Mapping[str, Sequence[Reading]]) -> Table:
    """What each arm's training reads, by the corpora; arms that read alike are one row."""
    alike: dict[tuple[Reading, ...], list[str]] = {}
    for arm, found in sources.items():
        alike.setdefault(tuple(found), []).append(arm)
    shown = Table()
    for column in ("arms", "corpus"):
        shown.add_column(column)
    for column in ("documents", "tokens", "rows", "share", "epochs"):
        shown.add_column(column, justify="right")
    for found, arms in alike.items():
        total = sum(one.drawn for one in found)
        for one in found:
            counts = (f"{count:,}" for count in (one.documents, one.tokens, one.rows))
            who = "all" if len(alike) == 1 else ", ".join(arms)
            shown.add_row(who, one.name, *counts, f"{one.drawn / total:.1%}", f"{one.epochs:.3g}")
    return shown


def _groups(runs: Sequence[Run], largest: Largest) -> list[tuple[str, int]]:
    """The program (structure, room for trials) of every group."""
    found: list[tuple[str, int]] = []
    for phase in ("tune", "final"):
        experiments = [r.experiment for r in runs if r.phase == phase]
        for group in groups(experiments, largest=largest):
            first = experiments[group[0]]
            found.append((structure(first), layout(first, len(group), jax.device_count())[1]))
    return found


def _caption(ablation: Ablation, runs: Sequence[Run], costs: Mapping[str, Cost], largest: Largest, flops_per_second: float) -> str:
    training, scoring = (sum(getattr(costs[r.arm], part) for r in runs) for part in ("flops", "evaluation"))
    programs, points, arms = _groups(runs, largest), len(ablation.grid), _counted(len(ablation.arms), "arm")
    tuning = f"{arms} × {points} grid points × {_counted(ablation.tuning_seeds, 'tuning seed')} + " if points > 1 else ""
    return (
        f"{tuning}{arms} × {_counted(ablation.seeds, 'seed')} = {_counted(len(runs), 'run')} in "
        f"{_counted(len(programs), 'group')}, "
        f"{sum(costs[r.arm].tokens for r in runs):,} tokens, {training:.3g} FLOPs to train and {scoring:.3g} to evaluate, about "
        f"{duration((training + scoring) / flops_per_second)} at {flops_per_second / 1e9:,.1f} GFLOP/s and the compilation of "
        f"{_counted(len(set(programs)), 'program')}; nothing has been trained."
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
