"""What a run will do before it does it: trials, groups, and their cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

from llm_jax.core.config import fingerprint
from llm_jax.lab.experiment import Ablation, Experiment
from llm_jax.lab.population import groups
from llm_jax.models import count

Phase = Literal["tune", "final"]

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
        safe = "".join(c if c.isalnum() or c in "+-_." else "-" for c in self.arm)
        return f"{safe}-{self.phase}-{fingerprint(self.experiment)}"


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

    A diverged or failed trial counts as the worst outcome. An arm none of whose points ended well has no winner.
    """
    if len(ablation.grid) <= 1:
        return dict.fromkeys(ablation.arms, ablation.grid[0])
    metric, sign = ablation.tuning_metric or ablation.metric, 1 if ablation.mode == "min" else -1
    best: dict[str, dict[str, float]] = {}
    for arm in ablation.arms:
        scored = []
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
    """What one trial takes: parameters, training tokens, FLOPs (evaluation left out) and bytes of memory while training."""

    parameters: int
    tokens: int
    flops: float
    memory: float


def cost(experiment: Experiment, vocabulary: int) -> Cost:
    """The analytic cost of a trial."""
    data, model = experiment.data, experiment.model
    tokens = experiment.train.steps * data.batch_size * data.sequence_length
    rows = data.batch_size // experiment.train.accumulate
    return Cost(
        count.parameters(model, vocabulary),
        tokens,
        tokens * count.flops_per_token(model, vocabulary, data.sequence_length),
        count.training_memory(model, vocabulary, rows, data.sequence_length, experiment.optimizer.slots),
    )


def table(ablation: Ablation, costs: Mapping[str, Cost], largest: int | None, flops_per_second: float) -> Table:
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
            str(_group_count(own, largest)),
            f"{each.parameters:,}",
            f"{each.tokens:,}",
            f"{each.flops:.3g}",
            f"{each.memory / 2**20:,.0f} MiB",
            duration(len(own) * each.flops / flops_per_second),
        )
    return shown


def _group_count(runs: Sequence[Run], largest: int | None) -> int:
    return sum(len(groups([r.experiment for r in runs if r.phase == phase], largest=largest)) for phase in ("tune", "final"))


def _caption(
    ablation: Ablation, runs: Sequence[Run], costs: Mapping[str, Cost], largest: int | None, flops_per_second: float
) -> str:
    flops = sum(costs[r.arm].flops for r in runs)
    return (
        f"{len(ablation.arms)} arms × {len(ablation.grid)} grid points × {ablation.tuning_seeds} tuning seeds"
        f" + {len(ablation.arms)} arms × {ablation.seeds} seeds = {len(runs)} runs in {_group_count(runs, largest)} groups, "
        f"{sum(costs[r.arm].tokens for r in runs):,} tokens, {flops:.3g} FLOPs, about {duration(flops / flops_per_second)} "
        f"at {flops_per_second / 1e9:,.1f} GFLOP/s, compilation and evaluation apart; nothing has been trained."
    )


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
