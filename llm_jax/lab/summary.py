"""From the `results.json` files of trials to one summary: what every report is rendered from."""

from __future__ import annotations

import functools
import json
import math
import pathlib
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.core.paths import reaching, to_path
from llm_jax.io import profile
from llm_jax.lab import statistics, transfer
from llm_jax.lab.experiment import sign as direction
from llm_jax.lab.problems import Trial, problems, settings
from llm_jax.lab.workfolder import SIDES, WorkFolder, merged

OTHER_SETTINGS = "other settings"  # the verdict on arms of a folder that does not compare with the baseline's


@dataclass(frozen=True)
class Summary:
    """Everything a report says. data: JSON; trials: what it was made from, with the arm's name as reported."""

    data: dict[str, Any]
    trials: list[Trial]

    def finals(self, arm: str) -> list[Trial]:
        """The trials of an arm's winner that ended well, by seed."""
        found = [t for t in self.trials if t["arm"] == arm and t["phase"] == "final" and t["status"] == "done"]
        return sorted(found, key=lambda t: t["seed"])


def read(workdirs: Sequence[str | pathlib.Path]) -> list[Trial]:
    """The results of every trial in the folders; arms that several folders share are called "folder/arm".

    Raises `ConfigError` for a folder that is missing, holds none, or holds one that cannot be read.
    """
    trials: list[Trial] = []
    folders = [to_path(workdir) for workdir in workdirs]
    last = [folder.resolve().name for folder in folders]
    names = {folder: name if last.count(name) == 1 else str(folder) for folder, name in zip(folders, last, strict=True)}
    for workdir in folders:
        with reaching(workdir):
            files = sorted((workdir / "trials").glob("*/results.json"))
        if not files:
            raise ConfigError("holds no results (trials/*/results.json): is it a work folder, and has a trial ended?", str(workdir))
        for file in files:
            try:
                trial = json.loads(file.read_text())
                if not isinstance(trial, dict) or not {"provenance", "arm", "status"} <= set(trial):
                    raise ValueError("it holds no trial")
                trials.append(trial | {"folder": names[workdir]})
            except ValueError as error:
                raise ConfigError(f"is damaged ({error}): remove it and run the command again", str(file)) from None
    homes: dict[str, set[str]] = {}
    for trial in trials:
        homes.setdefault(trial["arm"], set()).add(trial["folder"])
    for trial in trials:
        trial["own_arm"] = trial["arm"]
        if len(homes[trial["own_arm"]]) > 1:
            trial["arm"] = f"{trial['folder']}/{trial['own_arm']}"
    return trials


def summarize(workdirs: Sequence[str | pathlib.Path]) -> Summary:
    """Statistics of all arms, claims and failures. Raises what `read` raises."""
    trials = read(workdirs)
    newest = max(trials, key=lambda t: t["provenance"]["date"])["ablation"]
    declared = [folder for workdir in workdirs if (folder := WorkFolder(workdir).declared())]
    ablation = functools.reduce(merged, declared) if declared else newest
    metric = ablation["metric"]
    sign = direction(metric, judged=metric, mode=ablation["mode"])
    arms = _ordered(trials)
    values = {arm: _by_seed(trials, arm, metric) for arm in arms}
    baseline = _baseline(arms, ablation["baseline"])
    alike = _alike(trials)
    rows = _rows(trials, arms, values, baseline, ablation, sign, alike)
    floor = statistics.noise_floor([list(v.values()) for v in values.values()], tests=max(len(arms) - 1, 1))
    data = {
        "question": ablation["question"],
        "name": ablation["name"],
        "metric": metric,
        "mode": ablation["mode"],
        "baseline": baseline,
        "tuning_metric": ablation["tuning_metric"],
        "scale": ablation.get("scale"),
        "answer": _answer(rows, metric, sign),
        "arms": rows,
        "noise_floor": None if floor is None else asdict(floor),
        "claims": _claims(trials, ablation, alike),
        "nuisance": ablation["nuisance"],
        "scientific": ablation["scientific"],
        "metrics": _metrics(trials, arms),
        "problems": problems(trials, ablation),
        "provenance": _provenance(trials),
        "base": trials[0]["config"],
        "profiles": [found for workdir in workdirs for found in profile.summaries(to_path(workdir))],
    }
    return Summary(data, trials)


def _ordered(trials: Sequence[Trial]) -> list[str]:
    declared = list(dict.fromkeys(arm for t in trials for arm in t["ablation"]["arms"]))
    own = {t["arm"]: t["own_arm"] for t in trials}
    return sorted(own, key=lambda arm: (declared.index(own[arm]) if own[arm] in declared else len(declared), arm))


def _baseline(arms: Sequence[str], wanted: str) -> str:
    return next((arm for arm in arms if arm == wanted or arm.endswith(f"/{wanted}")), arms[0])


def _diverged(trials: Sequence[Trial], arm: str) -> int:
    """How many of an arm's final runs diverged."""
    return sum(t["arm"] == arm and t["phase"] == "final" and t["status"] == "diverged" for t in trials)


def _by_seed(trials: Sequence[Trial], arm: str, metric: str) -> dict[int, float]:
    found = [t for t in trials if t["arm"] == arm and t["phase"] == "final" and t["status"] == "done"]
    return {t["seed"]: t["metrics"][metric] for t in found if t["metrics"].get(metric) is not None}


def _rows(trials, arms, values, baseline, ablation, sign, alike) -> list[dict[str, Any]]:
    compared = [arm for arm in arms if arm != baseline and alike(arm, baseline)]
    differences = {arm: statistics.paired_difference(values[arm], values[baseline]) for arm in compared}
    adjusted = dict(zip(differences, statistics.holm([d.p if d else None for d in differences.values()]), strict=True))
    rows = []
    for arm in arms:
        scores = list(values[arm].values())
        winner = next((t for t in trials if t["arm"] == arm and t["phase"] == "final"), None)
        nuisance = winner["nuisance"] if winner else {}
        difference = differences.get(arm)
        verdict = _verdict(difference, adjusted.get(arm), sign, arm in compared, _diverged(trials, arm))
        rows.append(
            {
                "arm": arm,
                "n": len(scores),
                "mean": float(np.mean(scores)) if scores else None,
                "interval": statistics.mean_interval(scores),
                "values": {str(s): v for s, v in values[arm].items()},
                "nuisance": nuisance,
                "edges": [path for path, grid in ablation["nuisance"].items() if _at_edge(nuisance.get(path), grid)],
                "difference": asdict(difference) if difference else None,
                "p": adjusted.get(arm),
                "verdict": "baseline" if arm == baseline else verdict,
                "parameters": winner["parameters"] if winner else None,
                "seconds": winner["seconds"] if winner else None,
                "tokens": winner["tokens"] if winner else None,
                "flops": winner["flops"] if winner else None,
            }
        )
    return rows


def _alike(trials: Sequence[Trial]) -> Callable[[str, str], bool]:
    """Whether two arms' folders have the same settings, so that a difference is one of arms."""
    known, homes = settings(trials), {t["arm"]: t["folder"] for t in trials}
    return lambda a, b: a in homes and b in homes and known[homes[a]] == known[homes[b]]


def _verdict(difference, p, sign: int, compared: bool, diverged: int) -> str:
    """What the test says, where settings are the baseline's and all runs ended well: else the seeds that did are a selection."""
    if not compared:
        return OTHER_SETTINGS
    return "diverges" if diverged else statistics.verdict(difference, p, sign=sign)


def _at_edge(value: float | None, grid: Sequence[float]) -> bool:
    return value is not None and len(grid) > 2 and value in (min(grid), max(grid))


def _answer(rows: Sequence[dict[str, Any]], metric: str, sign: int) -> str:
    """One sentence, no stronger than the tests."""
    known = [r for r in rows if r["mean"] is not None and r["verdict"] != OTHER_SETTINGS]
    if not known:
        return "No arm has been trained to the end on fresh seeds yet."
    best = min(known, key=lambda r: sign * r["mean"])
    start = f"{best['arm']} has the {'lowest' if sign > 0 else 'highest'} {metric}, {best['mean']:.4g}"
    better = [r["arm"] for r in known if r["verdict"] == "better"]
    worse = [r["arm"] for r in known if r["verdict"] == "worse"]
    base = next((r["arm"] for r in rows if r["verdict"] == "baseline"), "")
    parts = ([f"better than {base}: {', '.join(better)}"] if better else []) + ([f"worse: {', '.join(worse)}"] if worse else [])
    apart = sum(r["mean"] is not None for r in rows) - len(known)
    tail = f" Not compared, since their settings differ in more than the arm: {apart}." if apart else ""
    if len(known) == 1:
        return f"{start}; there is no other arm to compare it with.{tail}"
    if not parts:
        return f"{start}; no arm differs detectably from {base}.{tail}"
    return f"{start}; {'; '.join(parts)} (paired over seeds, Holm-corrected).{tail}"


def _claims(trials, ablation, alike) -> list[dict[str, Any]]:
    claims = [named for claim in ablation["claims"] for named in _as_reported(trials, claim)]
    differences, signs, metrics = [], [], []
    for claim in claims:
        metric, sign, (a, b) = _claimed(trials, ablation, claim)
        metrics.append(metric)
        signs.append(sign)
        tested = alike(claim["better"], claim["than"])
        differences.append(statistics.paired_difference(a, b, shift=-signs[-1] * claim["by"]) if tested else None)
    adjusted = statistics.holm([d.p if d else None for d in differences])
    return [
        claim
        | {
            "metric": metric,
            "difference": asdict(d) if d else None,
            "p": p,
            "verdict": "inconclusive"
            if any(_diverged(trials, claim[side]) for side in ("better", "than"))
            else statistics.claim_verdict(d, p, by=claim["by"], sign=sign),
        }
        for claim, metric, d, p, sign in zip(claims, metrics, differences, adjusted, signs, strict=True)
    ]


def _claimed(trials, ablation, claim) -> tuple[str, int, list[dict[int, float]]]:
    """What a claim is about, +1 where less of it is better, and seed → value for either side."""
    path = claim.get("nuisance")
    metric = claim["metric"] or ablation["tuning_metric" if path else "metric"]
    sign = direction(metric, judged=ablation["metric"], mode=ablation["mode"])
    if not path:
        return metric, sign, [_by_seed(trials, claim[side], metric) for side in ("better", "than")]
    ends = ((claim["since"], claim["better"]), (claim["than_since"], claim["than"]))
    return f"moves of {path}, log2", 1, [transfer.moves(trials, arms, path, metric, sign=sign) for arms in ends]


def _as_reported(trials, claim) -> list[dict[str, Any]]:
    """The claim in the names that its arms have in the report: once for every folder that holds both, or else across folders."""
    sides = [side for side in SIDES if side in claim]
    homes: dict[str, dict[str, str]] = {claim[side]: {} for side in sides}  # arm → folder → reported name
    for trial in trials:
        if trial["own_arm"] in homes:
            homes[trial["own_arm"]][trial["folder"]] = trial["arm"]
    both = [folder for folder in homes[claim["better"]] if all(folder in homes[claim[side]] for side in sides)]
    if not both:
        return [claim | {side: next(iter(homes[claim[side]].values()), claim[side]) for side in sides}]
    return [
        claim
        | {"text": claim["text"] + (f" ({folder})" if both[1:] else "")}
        | {side: homes[claim[side]][folder] for side in sides}
        for folder in both
    ]


def _metrics(trials, arms) -> dict[str, dict[str, float | None]]:
    """Metric → arm → mean over the winner's seeds."""
    names = sorted({name for t in trials if t["phase"] == "final" for name in t["metrics"]}, key=_metric_order)
    found: dict[str, dict[str, float | None]] = {}
    for name in names:
        means = {arm: list(_by_seed(trials, arm, name).values()) for arm in arms}
        found[name] = {arm: float(np.mean(v)) if v else None for arm, v in means.items()}
    return found


def _metric_order(name: str) -> tuple[str, str, float]:
    stem, at, unit = measured_at(name)
    return stem, unit, at


def measured_at(metric: str) -> tuple[str, float, str]:
    """How far out it was measured, in which unit: of "valid/loss@4x" ("valid/loss", 4, "x"), of "valid/loss" 0 and ""."""
    stem, _, where = metric.partition("@")
    found = re.fullmatch(r"(\d+)(\D+)", where)
    return (stem, float(found[1]), found[2]) if found else (stem, 0.0, where)


def _provenance(trials) -> list[dict[str, Any]]:
    """One record for each way the trials were made, newest first."""
    unique: dict[str, dict[str, Any]] = {}
    for trial in sorted(trials, key=lambda t: t["provenance"]["date"], reverse=True):
        kept = {k: v for k, v in trial["provenance"].items() if k not in ("date", "group", "population", "worker")}
        unique.setdefault(json.dumps(kept, sort_keys=True), trial["provenance"])
    return list(unique.values())


def finite_mean(columns: Sequence[Sequence[float | None]]) -> list[float]:
    """The mean of each position over the columns that have a number there; NaN where none has."""
    rows = zip(*columns, strict=False)
    return [float(np.mean([v for v in row if v is not None])) if any(v is not None for v in row) else math.nan for row in rows]
