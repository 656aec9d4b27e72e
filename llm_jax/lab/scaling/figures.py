"""The pictures of a scaling law."""

from __future__ import annotations

from typing import Any

import matplotlib
import numpy as np
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from llm_jax.lab.plots import PALETTE, Draw
from llm_jax.lab.scaling.law import interval
from llm_jax.lab.scaling.optimum import optimum, power
from llm_jax.lab.scaling.study import Study

AXES = {"N": "parameters N", "D": "training tokens D", "C": "training FLOPs C"}
BEYOND = 10.0  # times the most compute (or size) that curves are drawn to
POINTS = 60  # of a curve
NAMED = 8  # sizes in a legend
DRAWS = 100  # laws that a band is made from


def pictures(study: Study) -> dict[str, tuple[str, Draw]]:
    """Name → title and function that draws on matplotlib axes."""
    found: dict[str, tuple[str, Draw]] = {"law": ("The law, through all runs", _single)}
    if len(study.law.variables) == 2:
        found = {
            "law": ("Loss over compute: a colour a size, and the best size at each (dashed)", _sizes),
            "optimum": ("The best size over compute, with 95% of the bootstrap", _optimum),
        }
    if study.profiles:
        found["isoflop"] = ("IsoFLOP profiles: parabolas, and what the law says (dotted)", _isoflop)
    return found | {"residuals": ("What the law leaves", _residuals)}


def _colours(study: Study) -> dict[float, Any]:
    """Of every size: from light to dark, since sizes have an order."""
    sizes = np.unique(study.runs.N)
    return dict(zip(sizes.tolist(), matplotlib.colormaps["viridis_r"](np.linspace(0.1, 1, len(sizes))), strict=True))


def _short(number: float) -> str:
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def _dots(ax, study: Study, x: np.ndarray, y: np.ndarray, colours: dict[float, Any]) -> None:
    """Each run, hollow where it was held out too; the legend has as many sizes as can be read."""
    out, named = {held.arm for held in study.held}, list(colours)[:: -(-len(colours) // NAMED)]
    for N, colour in colours.items():
        ax.plot([], [], "o", color=colour, label=_short(N) if N in named else None)
        for hollow in (False, True):
            own = (study.runs.N == N) & np.array([(arm in out) == hollow for arm in study.runs.arms])
            ax.plot(x[own], y[own], "o", ms=5, mfc="white" if hollow else colour, mec=colour)


def _sizes(ax, study: Study) -> None:
    runs, colours = study.runs, _colours(study)
    for N, colour in colours.items():
        C = np.geomspace(runs.C[runs.N == N].min() / 1.5, runs.C[runs.N == N].max() * 3, POINTS)
        D = C / study.compute.per_token(N)
        ax.plot(C, study.law(np.column_stack([np.full(POINTS, N), D])), color=colour, lw=1.2, alpha=0.8)
    C = np.geomspace(runs.C.min(), runs.C.max() * BEYOND, POINTS)
    ax.plot(C, [optimum(study.law, study.compute, c)[2] for c in C], "--", color="#57606a", lw=1.5)
    _dots(ax, study, runs.C, runs.loss, colours)
    ax.set(xscale="log", yscale="log", xlabel=AXES["C"], ylabel=study.metric)
    _plain(ax.yaxis)
    ax.legend(title="parameters", fontsize=8, ncols=2)


def _single(ax, study: Study) -> None:
    (name,) = study.law.variables
    own = getattr(study.runs, name)
    x = np.geomspace(own.min() / 1.5, own.max() * BEYOND, POINTS)
    drawn = np.array([law(x[:, None]) for law in study.draws[:DRAWS]])
    ax.fill_between(x, *np.transpose([interval(column) for column in drawn.T]), color=PALETTE[0], alpha=0.15, lw=0)
    ax.plot(x, study.law(x[:, None]), color=PALETTE[0])
    ax.axhline(study.law.floor, color="#57606a", lw=1, ls=":")
    _dots(ax, study, own, study.runs.loss, _colours(study))
    ax.set(xscale="log", yscale="log", xlabel=AXES[name], ylabel=study.metric)
    _plain(ax.yaxis)


def _optimum(ax, study: Study) -> None:
    runs = study.runs
    most = max([runs.C.max() * BEYOND, *(budget.C for budget in study.budgets)])
    C = np.geomspace(runs.C.min(), most, POINTS // 2)
    drawn = np.array([[optimum(law, study.compute, c)[0] for c in C] for law in study.draws[:DRAWS]])
    ax.fill_between(C, *np.transpose([interval(column) for column in drawn.T]), color=PALETTE[0], alpha=0.15, lw=0)
    ax.plot(C, [optimum(study.law, study.compute, c)[0] for c in C], color=PALETTE[0], label="by the law")
    ax.plot(runs.C, runs.N, "o", ms=4, color="#57606a", alpha=0.6, label="trained")
    known = [(each.C, each.N) for each in study.profiles if each.N is not None]
    growth = power(study.profiles)
    if growth is not None:
        ax.plot(*np.transpose(known), "s", ms=6, color=PALETTE[1], label="lowest of a profile")
        ax.plot(C, growth[0] * C ** growth[1], "--", color=PALETTE[1], label=f"by profiles: C^{growth[1]:.2f}")
    for budget in study.budgets:
        ax.plot(budget.C, budget.N, "*", ms=12, color=PALETTE[0])
    ax.set(xscale="log", yscale="log", xlabel=AXES["C"], ylabel=AXES["N"])
    ax.legend(fontsize=8)


def _isoflop(ax, study: Study) -> None:
    runs = study.runs
    for i, profile in enumerate(study.profiles):
        own, colour = np.array(profile.members), PALETTE[i % len(PALETTE)]
        N = np.geomspace(runs.N[own].min() / 1.2, runs.N[own].max() * 1.2, POINTS)
        ax.plot(runs.N[own], runs.loss[own], "o", ms=4, color=colour, label=f"{profile.C:.2g} FLOPs")
        ax.plot(N, np.polyval(profile.curve, np.log(N)), color=colour, lw=1.2)
        ax.plot(N, study.law(np.column_stack([N, profile.C / study.compute.per_token(N)])), ":", color=colour)
        if profile.N is not None:
            ax.plot(profile.N, np.polyval(profile.curve, np.log(profile.N)), "*", ms=11, color=colour)
    ax.set(xscale="log", xlabel=AXES["N"], ylabel=study.metric)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.legend(fontsize=8)


def _residuals(ax, study: Study) -> None:
    ax.axhline(0, color="#57606a", lw=1)
    _dots(ax, study, study.runs.C, 100 * np.expm1(study.residuals), _colours(study))
    ax.set(xscale="log", xlabel=AXES["C"], ylabel=f"{study.metric} over the law's, %")
    ax.legend(title="parameters", fontsize=8, ncols=2)


def _plain(axis) -> None:
    """Plain numbers along a logarithmic axis of less than a decade."""
    axis.set_major_locator(LogLocator(subs=tuple(np.arange(1.0, 10.0, 0.5)), numticks=40))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
