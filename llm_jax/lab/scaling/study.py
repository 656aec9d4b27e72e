"""A scaling law of a population of sizes: fitted, checked on the runs that it did not see, and asked how to spend a budget."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llm_jax.core.config import ConfigError, nearest
from llm_jax.lab.scaling.law import NAMES, Law, bootstrap, fit, interval
from llm_jax.lab.scaling.optimum import Compute, Profile, optimum, power, profiles
from llm_jax.lab.scaling.runs import Runs, read

LARGEST, NONE = "LARGEST", "NONE"
LAWS = {"N,D": ("N", "D"), "N": ("N",), "D": ("D",), "C": ("C",)}
AUTO = "auto"
SAME = 0.02  # two sizes, budgets, or ratios of the two are the same within this


@dataclass(frozen=True)
class Held:
    """An arm that was left out, and what the law of the others says of it, with the middle 95% of its bootstrap."""

    arm: str
    loss: float
    predicted: float
    low: float
    high: float

    @property
    def error(self) -> float:
        """Of the prediction, relative."""
        return self.predicted / self.loss - 1


@dataclass(frozen=True)
class Budget:
    """What to train for C FLOPs: N parameters on D tokens and the loss to expect, each with the middle 95% of the bootstrap."""

    C: float
    N: float
    D: float
    loss: float
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Study:
    """All that is found. draws: the bootstrap's laws; held: what was left out to be predicted; budgets: only for a law of N and D;
    profiles: IsoFLOP profiles, if the runs are some; notes: what a reader must be told."""

    workdirs: tuple[str, ...]
    metric: str
    counted: str
    runs: Runs
    law: Law
    draws: list[Law]
    compute: Compute
    held: list[Held]
    budgets: list[Budget]
    profiles: list[Profile]
    notes: list[str]

    @property
    def residuals(self) -> np.ndarray:
        """log of the loss over what the law says of each run."""
        return np.log(self.runs.loss / self.law(self.runs.at(self.law.variables)))

    @property
    def parameters(self) -> dict[str, tuple[float, float, float]]:
        """Name → value and interval: of the law, and of compute-optimal growth N ∝ C^a, D ∝ C^b where it has N and D."""
        values, drawn = _named(self.law), [_named(law) for law in self.draws]
        return {name: (value, *interval(np.array([draw[name] for draw in drawn]))) for name, value in values.items()}


def study(
    workdirs: Sequence[str | pathlib.Path],
    *,
    metric: str = "valid/loss",
    counted: str = "all",
    law: str = AUTO,
    holdout: Sequence[str] = (LARGEST,),
    budgets: Sequence[float] = (),
    draws: int = 300,
) -> Study:
    """Reads the folders and fits. counted: what N counts (`runs.COUNTS`); law: a key of `LAWS`, or auto: as many variables as the
    runs tell apart; holdout: arms, LARGEST (those of the most compute) or NONE; budgets: FLOPs, default ten times the most.

    Raises `ConfigError` for what cannot be read, and where the runs are too few, or too much alike, for the law.
    """
    runs, notes = read(workdirs, metric=metric, counted=counted)
    variables = LAWS[law] if law != AUTO else told_apart(runs, notes)
    check(runs, variables)
    x = runs.at(variables)
    whole, compute = fit(variables, x, runs.loss), Compute.of(runs)
    drawn = bootstrap(whole, x, runs.loss, draws=draws)
    held = _predicted(runs, variables, holdout, draws, notes)
    wanted = [float(c) for c in budgets or (10 * runs.C.max(),)]
    found = [_budget(whole, drawn, compute, c) for c in wanted] if variables == ("N", "D") else []
    isoflop = profiles(runs, compute) if len(variables) == 2 else []
    places = tuple(str(folder) for folder in workdirs)
    done = Study(places, metric, counted, runs, whole, drawn, compute, held, found, isoflop, notes)
    notes += _doubts(done)
    return done


def _distinct(values: np.ndarray) -> int:
    """How many there are that differ by more than `SAME`."""
    logs = np.sort(np.log(values))
    return 1 + int((np.diff(logs) > SAME).sum())


def told_apart(runs: Runs, notes: list[str]) -> tuple[str, ...]:
    """The variables of the largest law that the runs are for; what that means where it is of one is added to the notes."""
    if _distinct(runs.N) > 1 and _distinct(runs.D) == 1:
        notes.append("all runs read as many tokens, so the law is of N alone, for so many tokens")
        return ("N",)
    if _distinct(runs.N) == 1:
        notes.append("all models are of one size, so the law is of D alone, for this size")
        return ("D",)
    if _distinct(runs.D / runs.N) == 1:
        ratio = float((runs.D / runs.N).mean())
        notes.append(f"D / N is {ratio:.3g} in all runs, so the law is of N alone, with D = {ratio:.3g} N")
        return ("N",)
    return ("N", "D")


def check(runs: Runs, variables: Sequence[str]) -> None:
    """Raises `ConfigError` unless there are enough different runs for E and two parameters a variable, and one to spare."""
    law = " and ".join(variables)
    names = {"N": "sizes", "D": "token budgets", "C": "amounts of compute"}
    if len(variables) == 2 and _distinct(runs.D / runs.N) == 1:
        raise ConfigError("cannot be told apart where D / N is the same in all runs: --law=N fits sizes alone", f"a law of {law}")
    least = 3 if len(variables) == 2 else 4
    for name in variables:
        have = _distinct(getattr(runs, name))
        if have < least:
            raise ConfigError(f"needs at least {least} different {names[name]}, got {have}: add some", f"a law of {law}")
    cells, needed = len(np.unique(runs.at(variables).round(), axis=0)), 2 + 2 * len(variables)
    if cells < needed:
        raise ConfigError(f"needs at least {needed} different runs, got {cells}: add some", f"a law of {law}")


def _held(runs: Runs, holdout: Sequence[str]) -> list[str]:
    """The arms that are left out. Raises `ConfigError` for one that is not there."""
    names = [name for name in holdout if name != NONE]
    known = list(dict.fromkeys(runs.arms))
    for name in names:
        if name not in (*known, LARGEST):
            raise ConfigError(
                f"is no arm of these runs: did you mean {nearest(name, [*known, LARGEST, NONE])}?", f"--holdout={name}"
            )
    most = [arm for arm, C in zip(runs.arms, runs.C, strict=True) if 0.9 * runs.C.max() <= C] if LARGEST in names else []
    return [arm for arm in known if arm in names or arm in most]


def _predicted(runs: Runs, variables: tuple[str, ...], holdout: Sequence[str], draws: int, notes: list[str]) -> list[Held]:
    arms = _held(runs, holdout)
    if not arms:
        return []
    rest = runs.where(np.array([arm not in arms for arm in runs.arms]))
    try:
        check(rest, variables)
    except ConfigError as error:
        notes.append(f"nothing was held out, since without {', '.join(arms)} {error}")
        return []
    early = fit(variables, rest.at(variables), rest.loss)
    drawn = bootstrap(early, rest.at(variables), rest.loss, draws=draws)
    found = []
    for arm in arms:
        at = np.array([[runs.mean(arm, name) for name in variables]])
        low, high = interval(np.array([law(at)[0] for law in drawn]))
        found.append(Held(arm, runs.mean(arm, "loss"), float(early(at)[0]), low, high))
    return found


def _budget(law: Law, draws: Sequence[Law], compute: Compute, budget: float) -> Budget:
    values = dict(zip(("N", "D", "loss"), optimum(law, compute, budget), strict=True))
    drawn = np.array([optimum(one, compute, budget) for one in draws])
    return Budget(budget, **values, intervals={name: interval(drawn[:, i]) for i, name in enumerate(values)})


def _named(law: Law) -> dict[str, float]:
    if len(law.variables) < 2:
        return law.parameters
    alpha, beta = law.exponents
    return law.parameters | {"a": beta / (alpha + beta), "b": alpha / (alpha + beta)}


def _doubts(done: Study) -> list[str]:
    """Where the numbers say less than they seem to."""
    found, known = [], done.parameters
    for name in (exponent for _, exponent in NAMES.values() if exponent in known):
        _, lowest, highest = known[name]
        if lowest < 0.02:
            found.append(f"{name} may be 0 ({lowest:.3g} to {highest:.3g}): the runs do not tell it from a constant")
    least = done.runs.loss.min()
    if known["E"][1] < 0.05 * least:
        found.append(f"E is not known from these runs ({known['E'][1]:.3g} to {known['E'][2]:.3g}): they are far above their floor")
    for budget in done.budgets:
        times = budget.C / done.runs.C.max()
        if times > 100:
            found.append(f"{budget.C:.3g} FLOPs is {times:.3g} times the largest run: what is said of it is an extrapolation")
        if not done.runs.N.min() / 10 <= budget.N <= done.runs.N.max() * 10:
            found.append(f"N = {budget.N:.3g} for {budget.C:.3g} FLOPs is far from all sizes that were trained")
    if done.profiles and power(done.profiles) is None:
        found.append("fewer than two IsoFLOP profiles have their lowest point between their sizes: train smaller or larger ones")
    return found


def as_json(done: Study) -> dict:
    """All numbers, for a machine."""
    runs, growth = done.runs, power(done.profiles)
    fitted = done.law(runs.at(done.law.variables))
    columns = {"arm": runs.arms, "seed": runs.seeds, **{name: getattr(runs, name).tolist() for name in ("N", "D", "C", "loss")}}
    columns["fitted"] = fitted.tolist()
    return {
        "workdirs": list(done.workdirs),
        "metric": done.metric,
        "N": done.counted,
        "law": {"variables": list(done.law.variables), "objective": done.law.objective}
        | {name: {"value": value, "interval": [low, high]} for name, (value, low, high) in done.parameters.items()},
        "residual": float(done.residuals.std()),
        "held_out": [vars(one) | {"error": one.error} for one in done.held],
        "budgets": [vars(one) for one in done.budgets],
        "isoflop": {
            "profiles": [{"C": one.C, "N": one.N, "D": one.D} for one in done.profiles],
            "growth": None if growth is None else {"k": growth[0], "a": growth[1]},
        },
        "flops_per_token": {"N": np.exp(done.compute.log_N).tolist(), "over_6N": done.compute.ratio.tolist()},
        "notes": done.notes,
        "runs": [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)],
    }
