"""The report's pictures, as SVG for the page and PNG for the folder; one colour an arm, safe for colour-blind readers."""

from __future__ import annotations

import io
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from llm_jax.core.whole import write_whole
from llm_jax.lab.experiment import sign
from llm_jax.lab.summary import Summary, finite_mean, measured_at

# Okabe & Ito 2008, then Tol's muted set
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#882255",
    "#999933",
    "#44AA99",
    "#AA4499",
    "#661100",
)
STYLE = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "path",
    "svg.hashsalt": "llm_jax",
    "figure.figsize": (7.2, 4.2),
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}
AXES = {"step": "steps", "tokens": "tokens", "flops": "FLOPs", "seconds": "seconds (a trial's share of the machine)"}

Draw = Callable[[Any, Any], None]  # on matplotlib's axes, what is drawn: here a summary


def pictures(summary: Summary) -> dict[str, Draw]:
    """Name → function that draws on a matplotlib axes; only what the results have numbers for."""
    found: dict[str, Draw] = {"arms": _arms}
    for axis in AXES:
        found[f"learning_curves_{axis}"] = lambda ax, s, axis=axis: _curves(ax, s, axis)
    for path, grid in summary.data["nuisance"].items():
        if len(grid) > 1:
            found[f"sensitivity_{path.replace('.', '_')}"] = lambda ax, s, path=path: _sensitivity(ax, s, path)
    for unit, points in _reach(summary).items():
        if len(points) > 1:
            found["length" if unit == "x" else unit.strip("-")] = lambda ax, s, unit=unit: _by_reach(ax, s, unit)
    return found


def svg(draw: Draw, drawn: Any) -> str:
    """The picture as an `<svg>` element."""
    text = _render(draw, drawn, "svg").decode()
    return text[text.index("<svg") :]


def png(draw: Draw, drawn: Any, file: pathlib.Path) -> None:
    """The picture as a file."""
    write_whole(file, _render(draw, drawn, "png"))


def _render(draw: Draw, drawn: Any, kind: str) -> bytes:
    with matplotlib.rc_context(STYLE):
        figure = Figure()
        draw(figure.subplots(), drawn)
        out = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(out, format=kind, dpi=150, metadata=metadata)
    return out.getvalue()


def colour(summary: Summary, arm: str) -> str:
    """The arm's colour, the same in every picture."""
    return PALETTE[[row["arm"] for row in summary.data["arms"]].index(arm) % len(PALETTE)]


def _arms(ax, summary: Summary) -> None:
    """Each arm's mean with its interval, and every seed as a dot."""
    rows = [row for row in summary.data["arms"] if row["mean"] is not None]
    for height, row in enumerate(reversed(rows)):
        tint = colour(summary, row["arm"])
        if row["interval"]:
            ax.plot(row["interval"], [height, height], color=tint, lw=3, alpha=0.5, solid_capstyle="round")
        ax.plot(list(row["values"].values()), [height] * row["n"], "o", ms=4, color=tint, alpha=0.6)
        ax.plot(row["mean"], height, "|", ms=16, mew=2.5, color=tint)
    ax.set_yticks(range(len(rows)), [row["arm"] for row in reversed(rows)])
    ax.set_xlabel(summary.data["metric"])


def _curves(ax, summary: Summary, axis: str) -> None:
    """The metric (or the loss, where it is only known at the end) while training: mean and range over seeds."""
    name = summary.data["metric"].partition("@")[0]
    shown: list[float] = []
    for row in summary.data["arms"]:
        curves = [t["curve"] for t in summary.finals(row["arm"]) if not t.get("lost")]
        key = name if curves and all(name in c for c in curves) else "train/loss"
        curves = [c for c in curves if key in c]
        if not curves:
            continue
        x, y = np.array(finite_mean([c[axis] for c in curves])), np.array(finite_mean([c[key] for c in curves]))
        keep = np.isfinite(y)
        tint = colour(summary, row["arm"])
        ax.plot(x[keep], y[keep], marker="o", ms=3, color=tint, label=row["arm"])
        low, high = (
            np.array(
                [
                    f([v for v in column if v is not None], default=math.nan)
                    for column in zip(*(c[key] for c in curves), strict=False)
                ]
            )
            for f in (min, max)
        )
        ax.fill_between(x[keep], low[keep], high[keep], color=tint, alpha=0.15, lw=0)
        shown += list(y[keep])
    ax.set_xlabel(AXES[axis])
    ax.set_ylabel(key)
    _legend(ax, len(shown))


def _sensitivity(ax, summary: Summary, path: str) -> None:
    """The tuning metric against one nuisance parameter: the mean over tuning seeds, the best over the other parameters."""
    metric = summary.data["tuning_metric"]
    best = min if sign(metric, judged=summary.data["metric"], mode=summary.data["mode"]) > 0 else max
    for row in summary.data["arms"]:
        scores: dict[tuple, list[float]] = {}
        for trial in summary.trials:
            value = trial["metrics"].get(metric)
            if trial["arm"] == row["arm"] and trial["phase"] == "tune" and value is not None and path in trial["nuisance"]:
                scores.setdefault(tuple(sorted(trial["nuisance"].items())), []).append(value)
        means = [(dict(point)[path], sum(values) / len(values)) for point, values in scores.items()]
        points = {x: best(mean for at, mean in means if at == x) for x, _ in sorted(means)}
        ax.plot(list(points), list(points.values()), marker="o", ms=4, color=colour(summary, row["arm"]), label=row["arm"])
        chosen = row["nuisance"].get(path)
        if chosen in points:
            ax.plot(chosen, points[chosen], "o", ms=10, mfc="none", mew=1.5, color=colour(summary, row["arm"]))
    grid = summary.data["nuisance"][path]
    if min(grid) > 0 and max(grid) / min(grid) > 5:
        ax.set_xscale("log")
    ax.set_xticks(grid, [f"{value:.2g}" for value in grid], minor=False)
    ax.set_xticks([], minor=True)
    ax.set_xlabel(f"{path} (ring: chosen)")
    ax.set_ylabel(metric)
    _legend(ax, len(summary.data["arms"]))


def _reach(summary: Summary) -> dict[str, list[int]]:
    """Unit ("x": the trained length, …) → how far out the metric was measured, in order."""
    judged = measured_at(summary.data["metric"])[0]
    found: dict[str, list[int]] = {}
    for stem, far, unit in sorted(map(measured_at, summary.data["metrics"]), key=lambda at: at[1]):
        if stem == judged and far:
            found.setdefault(unit, []).append(int(far))
    return found


def _by_reach(ax, summary: Summary, unit: str) -> None:
    """The metric against the multiple of the trained length, or against a distance that the task has."""
    stem, points = measured_at(summary.data["metric"])[0], _reach(summary)[unit]
    for row in summary.data["arms"]:
        values = [summary.data["metrics"][f"{stem}@{m}{unit}"][row["arm"]] for m in points]
        ax.plot(
            points,
            [math.nan if v is None else v for v in values],
            marker="o",
            ms=4,
            color=colour(summary, row["arm"]),
            label=row["arm"],
        )
    ax.set_xscale("log", base=2)
    ax.set_xticks(points, [f"{m}×" if unit == "x" else f"{m}" for m in points])
    ax.set_xlabel("evaluated length / trained length" if unit == "x" else unit.strip("-"))
    ax.set_ylabel(stem)
    _legend(ax, len(points))


def _legend(ax, shown: int | Sequence) -> None:
    if shown:
        ax.legend(fontsize=8, ncols=2)
