"""What a reader of a report must be told: runs that are missing or failed, and folders that do not compare."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Trial = dict[str, Any]  # a `results.json`, with the "folder" it lies in and the arm's "own_arm" beside the reported name


def problems(trials: Sequence[Trial], ablation: Mapping[str, Any]) -> list[str]:
    """What is missing, failed or not comparable among trials (as `summary.read` gives them), in sentences."""
    found, several = [], len({t["folder"] for t in trials}) > 1
    for status in ("diverged", "failed"):
        for arm in dict.fromkeys(t["arm"] for t in trials if t["status"] == status):
            own = [t for t in trials if t["arm"] == arm and t["status"] == status]
            detail = f" ({own[0]['error']})" if own[0]["error"] else f" at {'; '.join(_point(t) for t in own[:4])}"
            found.append(f"{arm}: {len(own)} run{'s' * (len(own) > 1)} {status}{detail}")
    found += _left_out(trials) + _lost(trials)
    for arm in ablation["arms"]:
        done = sum(t["own_arm"] == arm and t["phase"] == "final" and t["status"] != "failed" for t in trials)
        if done < ablation["seeds"] and not several:
            found.append(f"{arm}: {done} of {ablation['seeds']} final runs have ended")
    for name, key in (("corpus", "corpus"), ("tokenizer", "tokenizer")):
        if several and len({t["provenance"][key] for t in trials}) > 1:
            found.append(f"the folders were trained on another {name}, so their numbers compare only as far as that allows")
    if len({t["ablation"]["metric"] for t in trials}) > 1:
        found.append(f"the folders declare different metrics; {ablation['metric']} is shown")
    if len({t["provenance"].get("code") for t in trials}) > 1:
        found.append("not all runs were made by the same version of the code")
    return found + _other_settings(trials)


def _left_out(trials: Sequence[Trial]) -> list[str]:
    """What guards left out of trials that ended, which were trained on other batches than those they are compared with."""
    found = []
    for arm in dict.fromkeys(t["arm"] for t in trials):
        lines = [line for t in trials if t["arm"] == arm for line in t.get("incidents", [])]
        updates = sum(line["kind"] == "skipped" for line in lines)
        batches = sum(line["left_out"][1] - line["left_out"][0] for line in lines if "left_out" in line)
        parts = [f"{updates} single updates"] * (updates > 0) + [f"{batches} batches by going back"] * (batches > 0)
        if parts:
            runs = len({line["seed"] for line in lines})
            found.append(f"{arm}: the guard left out {' and '.join(parts)}, in runs of {runs} seed{'s' * (runs > 1)}")
    return found


def _lost(trials: Sequence[Trial]) -> list[str]:
    """Curves that have holes, since the file that they come from was damaged."""
    return [
        f"{t['arm']}, seed {t['seed']}: the records of steps {t['lost'][0]} to {t['lost'][-1]} are lost, since "
        f"trials/{t['trial']}/metrics.jsonl in {t['folder']} was damaged: its curve is not drawn"
        for t in trials
        if t.get("lost")
    ]


def settings(trials: Sequence[Trial]) -> dict[str, dict[str, Any]]:
    """Folder → dotted path → value, of what no arm and no grid changes: runs compare where these are the same."""
    changed = {path for t in trials for changes in t["ablation"]["scientific"].values() for path in changes}
    changed |= {"seed", *(path for t in trials for path in t["ablation"]["nuisance"])}
    found: dict[str, dict[str, Any]] = {}
    for trial in trials:
        if trial["folder"] not in found:
            flat = _flat(trial["config"]).items()
            found[trial["folder"]] = {p: v for p, v in flat if not any(f"{p}.".startswith(f"{c}.") for c in changed)}
    return found


def _other_settings(trials: Sequence[Trial]) -> list[str]:
    folders = settings(trials)
    paths = dict.fromkeys(path for own in folders.values() for path in own)
    return [
        f"{path} is " + ", ".join(f"{json.dumps(own.get(path))} in {folder}" for folder, own in folders.items())
        for path in paths
        if len({json.dumps(own.get(path)) for own in folders.values()}) > 1
    ]


def _flat(config: Any, path: str = "") -> dict[str, Any]:
    """Dotted path → value of every field of a configuration as JSON."""
    if not isinstance(config, dict):
        return {path: config}
    return {p: v for key, value in config.items() for p, v in _flat(value, f"{path}.{key}" if path else key).items()}


def _point(trial: Trial) -> str:
    return ", ".join(f"{path.split('.')[-1]} {value:g}" for path, value in trial["nuisance"].items()) or f"seed {trial['seed']}"
