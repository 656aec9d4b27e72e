"""The pictures of positional schemes: one for each thing that a scheme does."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from llm_jax.lab.inspection import drawing
from llm_jax.lab.inspection.drawing import canvas, heat, style, thinned
from llm_jax.lab.inspection.positions import Scheme, Turning, added, biases, by_distance, overrides, similarity, turning
from llm_jax.lab.plots import PALETTE
from llm_jax.nn.position import Rope

CURVES = 12  # heads in one picture; more could not be told apart
MATRICES = 4


def pictures(scheme: Scheme, length: int) -> dict[str, Figure]:
    """What the scheme does ("table", "bias", "turning") → its picture, for a text of so many tokens."""
    found = {}
    if overrides(scheme.position, "embed") and scheme.layers:
        found["table"] = _table(added(scheme, length), scheme.name)
    if overrides(scheme.position, "bias"):
        found["bias"] = _bias(biases(scheme, length), scheme)
    if isinstance(scheme.position, Rope):
        found["turning"] = _turning(turning(scheme, length), scheme, length)
    return found


def _table(vectors_LD: np.ndarray, name: str) -> Figure:
    """What is added at each place, and how alike places are by it."""
    with style():
        figure = canvas(10, 3.6)
        left, middle, right = figure.subplots(1, 3, width_ratios=(1.4, 1, 1))
        most = max(float(np.abs(vectors_LD).max()), 1e-12)
        drawing.bar(figure, heat(left, vectors_LD, norm=Normalize(-most, most), colours="RdBu_r"), left, "")
        left.set(title=f"{name}: what is added", xlabel="channel", ylabel="place")
        cosine_LL = similarity(vectors_LD)
        drawing.bar(figure, heat(middle, cosine_LL, norm=Normalize(-1, 1), colours="RdBu_r"), middle, "")
        middle.set(title="cosine between places", xlabel="place", ylabel="place")
        for index, place in enumerate(sorted({0, len(cosine_LL) // 4, len(cosine_LL) // 2})):
            right.plot(cosine_LL[place], color=PALETTE[index], lw=1.2, label=f"place {place}")
        right.set(title="cosine with one place", xlabel="place", ylim=(None, 1.05))
        right.legend(fontsize=7)
    return figure


def _bias(bias_HLM: np.ndarray, scheme: Scheme) -> Figure:
    """The bias by distance for every head, and as a matrix for some."""
    distances, by_head = by_distance(bias_HLM, causal=scheme.causal)
    shown = thinned(len(bias_HLM), MATRICES)
    with style():
        figure = canvas(10, 3.4)
        curves, *matrices = figure.subplots(1, 1 + len(shown), width_ratios=(1.8, *[1] * len(shown)))
        chosen = thinned(len(by_head), CURVES)
        for index, head in enumerate(chosen):
            curves.plot(distances, by_head[head], color=PALETTE[index], lw=1.2, label=f"{head}")
        side = "distance to the left" if scheme.causal else "distance (> 0: to the left)"
        curves.set(title=f"{scheme.name}: added to the score", xlabel=side)
        curves.legend(fontsize=6, title="head", title_fontsize=7, ncols=math.ceil(len(chosen) / 6))
        hidden = np.triu(np.full(bias_HLM.shape[1:], scheme.causal), 1)
        norm = drawing.spread(np.where(hidden, np.nan, bias_HLM))
        for ax, head in zip(matrices, shown, strict=True):
            last = heat(ax, np.where(hidden, np.nan, bias_HLM[head]), norm=norm, colours="viridis")
            ax.set(title=f"head {head}", xlabel="key")
            ax.set_aspect("equal")
        matrices[0].set_ylabel("query")
        drawing.bar(figure, last, matrices, "")
    return figure


def _turning(found: Turning, scheme: Scheme, length: int) -> Figure:
    """How fast each pair turns, its cosine at each distance, and what is left of a score."""
    with style():
        figure = canvas(10, 3.4)
        left, middle, right = figure.subplots(1, 3)
        left.plot(2 * np.pi / found.frequencies, marker=".", color=PALETTE[0])
        left.axhline(length, color=PALETTE[6], lw=0.8, ls=":", label=f"{length} tokens")
        left.set(title=f"{scheme.name}: tokens for a whole turn", xlabel="pair of channels")
        drawing.logarithmic(left.yaxis)
        left.legend(fontsize=7)
        cosine_NW = np.cos(found.distances[:, None] * found.frequencies)
        drawing.bar(figure, heat(middle, cosine_NW, norm=Normalize(-1, 1), colours="RdBu_r"), middle, "")
        middle.set(title="cosine of the angle", xlabel="pair of channels", ylabel="distance")
        right.plot(found.distances, found.attenuation, color=PALETTE[0], lw=1.2, label="like content, on average")
        right.plot(found.distances, found.bound, color=PALETTE[1], lw=1.2, label="the bound, as a share of its own")
        right.set(title="score, as a share of distance 0", xlabel="distance")
        right.legend(fontsize=7)
    return figure
