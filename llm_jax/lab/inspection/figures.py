"""The pictures of an inspection, each from the numbers that it shows; whatever the size of the model, they can be read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import LogNorm, Normalize, PowerNorm
from matplotlib.figure import Figure

from llm_jax.lab.inspection import drawing
from llm_jax.lab.inspection.attention import Map, Numbers
from llm_jax.lab.inspection.depth import Depths
from llm_jax.lab.inspection.drawing import canvas, counted, heat, short, style, thinned, tokens
from llm_jax.lab.inspection.embeddings import History
from llm_jax.lab.inspection.lens import Lens
from llm_jax.lab.plots import PALETTE

ACROSS, DOWN = 4, 4  # heads of one picture
PLACES, PANELS = 16, 4  # tokens across a lens's table, and such tables below one another
DEPTHS, LINES = 33, 60  # of such a table, and of all together
WEIGHTS = PowerNorm(0.5, 0, 1)  # small weights are to be seen beside 1


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────
def overview(maps: Sequence[Map], title: str) -> Figure:
    """Every head of every layer as one small map, `maps` from top to bottom."""
    heads = max(found.weights.shape[1] for found in maps)
    side = int(np.clip(1800 // max(heads, len(maps)), 12, 120))
    rows = [_tiles(found.weights[0], heads, side) for found in maps]
    size = side + 2
    with style():
        inch = float(np.clip(9.5 / heads, 0.3, 1.5))
        figure = canvas(max(heads * inch + 1.5, 4), max(len(maps) * inch + 1.0, 2))
        ax = figure.subplots()
        drawing.bar(figure, heat(ax, np.concatenate(rows), norm=WEIGHTS), ax, "weight")
        ax.set_aspect("equal")
        middle = lambda count: [i * size + side / 2 for i in count]  # noqa: E731
        down, along = thinned(len(maps), 32), thinned(heads, 32)
        ax.set_yticks(middle(down), [str(maps[i].layer) for i in down], fontsize=7)
        ax.set_xticks(middle(along), [str(i) for i in along], fontsize=7)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.set(xlabel="head", ylabel="layer", title=title)
    return figure


def _tiles(weights_HLM: np.ndarray, heads: int, side: int) -> np.ndarray:
    """A row of maps of `side` pixels each with gaps between, missing ones grey."""
    row = np.full((side + 2, heads * (side + 2)), np.nan)
    for head, map_LM in enumerate(weights_HLM):
        small = drawing.pooled(map_LM, side)
        at = [np.arange(side) * length // side for length in small.shape]
        row[:side, head * (side + 2) : head * (side + 2) + side] = small[np.ix_(*at)]
    return row


def heads(found: Map, queries: Sequence[str], keys: Sequence[str], title: str) -> list[Figure]:
    """The maps of one layer, with their tokens; several pictures where there are many heads."""
    weights_HLM, most = found.weights[0], ACROSS * DOWN
    return [_heads(weights_HLM[start : start + most], start, queries, keys, title) for start in range(0, len(weights_HLM), most)]


def _heads(weights_HLM: np.ndarray, first: int, queries: Sequence[str], keys: Sequence[str], title: str) -> Figure:
    across = min(ACROSS, len(weights_HLM))
    down = math.ceil(len(weights_HLM) / across)
    side = {1: 5.0, 2: 4.0, 3: 2.8}.get(across, 2.2)
    most = int(side * 7)
    with style():
        figure = canvas(side * across + 1.2, side * down * min(max(len(queries) / len(keys), 0.5), 1.5) + 0.6)
        axes = figure.subplots(down, across, squeeze=False)
        for place, ax in enumerate(axes.flat):
            if place >= len(weights_HLM):
                ax.set_axis_off()
                continue
            map_LM = weights_HLM[place]
            texts = drawing.numbers(map_LM, "{:.2f}") if max(map_LM.shape) <= side * 2.4 else None
            small = drawing.pooled(map_LM)
            shown = heat(ax, small, norm=WEIGHTS, texts=texts)
            shown.set_extent((-0.5, map_LM.shape[1] - 0.5, map_LM.shape[0] - 0.5, -0.5))
            ax.set_title(f"head {first + place}")
            last, left = place + across >= len(weights_HLM), place % across == 0
            tokens(ax.xaxis, keys if last else [], most, upright=True)
            tokens(ax.yaxis, queries if left else [], most)
        axes[0, 0].set_ylabel("who looks")
        figure.suptitle(f"{title}: rows look at columns", fontsize=10)
        drawing.bar(figure, shown, axes, "weight")
    return figure


def head_summary(maps: Sequence[Map], found: Sequence[Numbers], title: str) -> Figure:
    """Entropy, distance, and the weight of the first key (and of a sink) for every layer and head."""
    width = max(found_map.weights.shape[1] for found_map in maps)
    pad = lambda row_H: np.pad(row_H.astype(float), (0, width - len(row_H)), constant_values=np.nan)  # noqa: E731
    columns = {
        "entropy, bits": [pad(n.entropy) for n in found],
        "distance, tokens": [pad(n.distance) for n in found],
        "weight of the first key": [pad(n.first) for n in found],
    }
    if any(n.sink.any() for n in found):
        columns["weight of the sink"] = [pad(n.sink) for n in found]
    columns = {name: rows for name, rows in columns.items() if np.isfinite(np.stack(rows)).any()}
    across = min(3 if width <= 4 else 2, len(columns))
    down = math.ceil(len(columns) / across)
    with style():
        figure = canvas(9.5 / (3 if width <= 4 else 2) * across, float(np.clip(0.26 * len(maps) + 0.9, 1.6, 7)) * down + 0.3)
        axes = figure.subplots(down, across, squeeze=False).flatten()
        for ax in axes[len(columns) :]:
            ax.set_axis_off()
        for ax, (name, rows) in zip(axes, columns.items(), strict=False):
            values = np.stack(rows)
            readable = drawing.numbers(values) if width <= 12 else None
            drawing.bar(figure, heat(ax, values, texts=readable), ax, "")
            ax.set(title=name, xlabel="head", ylabel="layer")
            counted(ax.xaxis, [str(i) for i in range(width)], 16)
            counted(ax.yaxis, [str(found_map.layer) for found_map in maps], 16)
        figure.suptitle(f"{title}, head by head", fontsize=10)
    return figure


# ── the logit lens ───────────────────────────────────────────────────────────────────────────────────────────────────
def lens_table(found: Lens, pieces: Sequence[str], read: Sequence[str], right: Sequence[str], counts: np.ndarray) -> Figure:
    """The likeliest token at each depth and place, the deepest at the top; framed where it is the right one.

    read, right `[L]`: the token at each place and the right one; counts `[L]`: whether it has a right one.
    """
    depths = _some_depths(len(found.ids))
    length = min(len(read), PLACES * int(np.clip(LINES // len(depths), 1, PANELS)))
    panels = math.ceil(length / PLACES)
    columns = min(length, PLACES)
    with style():
        figure = canvas(columns * 0.54 + 1.4, panels * (len(depths) * 0.25 + 0.75) + 0.4)
        axes = figure.subplots(panels, 1, squeeze=False)[:, 0]
        for panel, ax in enumerate(axes):
            places = range(panel * PLACES, min((panel + 1) * PLACES, length))
            sure_NL = np.full((len(depths), columns), np.nan)
            sure_NL[:, : len(places)] = found.probabilities[depths, 0][:, places, 0]
            shown = heat(ax, sure_NL, norm=Normalize(0, 1))
            for row, depth in enumerate(depths):
                for column, place in enumerate(places):
                    hit = counts[place] and found.right_rank[depth, 0, place] == 0
                    frame = {"bbox": {"boxstyle": "round,pad=0.15", "fc": "none", "ec": PALETTE[1], "lw": 1}} if hit else {}
                    ground = shown.cmap(shown.norm(sure_NL[row, column]))
                    drawing.write(ax, column, row, short(pieces[found.ids[depth, 0, place, 0]]), ground, **frame)
            counted(ax.yaxis, [str(depth) for depth in depths], DEPTHS)
            named = [f"{short(read[i])}\n→ {short(right[i], 6) if counts[i] else '?'}" for i in places]
            ax.set_xticks(range(len(places)), named, fontsize=drawing.LABEL, parse_math=False)
            ax.tick_params(length=2, pad=1)
            ax.set_ylabel("depth")
        drawing.bar(figure, shown, axes, "probability of the likeliest")
    return figure


def _some_depths(count: int) -> list[int]:
    """From the last to the first, not more than can be read."""
    return [count - 1 - i for i in thinned(count, DEPTHS)]


def lens_maps(found: Lens, read: Sequence[str], counts: np.ndarray) -> Figure:
    """Rank of the right token, entropy, and divergence from the last layer, for every depth and place."""
    rank_NL = np.where(counts[None], found.right_rank[:, 0] + 1.0, np.nan)
    ranks = LogNorm(1, float(np.nanmax(rank_NL, initial=2)))
    panels = {
        "rank of the right token (1: the likeliest)": (rank_NL, ranks, "Blues_r"),
        "entropy, bits": (found.entropy[:, 0], None, "Blues"),
        "divergence of the last layer from it, bits": (np.maximum(found.divergence[:, 0], 0), None, "Blues"),
    }
    height = float(np.clip(0.17 * len(found.ids) + 0.9, 1.3, 4))
    with style():
        figure = canvas(9.5, 3 * height)
        axes = figure.subplots(3, 1, squeeze=False)[:, 0]
        for ax, (title, (values_NL, norm, colours)) in zip(axes, panels.items(), strict=True):
            shown = heat(ax, values_NL[::-1], norm=norm, colours=colours)
            drawing.bar(figure, shown, ax, "")
            ax.set(title=title, ylabel="depth")
            counted(ax.yaxis, [str(n) for n in reversed(range(len(values_NL)))], 10)
            tokens(ax.xaxis, read, 64, upright=True)
    return figure


def lens_curves(found: Lens, counts: np.ndarray) -> Figure:
    """Means over the text at each depth."""
    depth = np.arange(len(found.ids))
    right = counts.astype(bool)
    rows = {
        "probability of the right token": found.right_probability[:, 0][:, right].mean(-1) if right.any() else None,
        "entropy, bits": found.entropy[:, 0].mean(-1),
        "divergence of the last layer from it, bits": found.divergence[:, 0].mean(-1),
    }
    drawn = {name: values for name, values in rows.items() if values is not None}
    with style():
        figure = canvas(3.5 * len(drawn), 2.7)
        axes = figure.subplots(1, len(drawn), squeeze=False)[0]
        for ax, colour, (name, values) in zip(axes, PALETTE, drawn.items(), strict=False):
            ax.plot(depth, values, marker="o", ms=3, color=colour)
            ax.set(title=name, xlabel="depth", ylim=(0, None))
            _whole(ax, depth[-1])
    return figure


# ── depth ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def depth_curves(sizes: Mapping[str, np.ndarray], found: Mapping[str, Depths]) -> Figure:
    """Size of the stream with its range over places, and of the gradient, at each depth. sizes: stack → `[N, B, L]`."""
    with style():
        figure = canvas(9, 3.2) if found else canvas(4.8, 3.2)
        axes = figure.subplots(1, 2 if found else 1, squeeze=False)[0]
        for index, (stack, rms_NBL) in enumerate(sizes.items()):
            depth, colour = np.arange(len(rms_NBL)), PALETTE[index]
            axes[0].plot(depth, rms_NBL.mean((1, 2)), marker="o", ms=3, color=colour, label=stack)
            axes[0].fill_between(depth, rms_NBL.min((1, 2)), rms_NBL.max((1, 2)), color=colour, alpha=0.15, lw=0)
            if found:
                axes[1].plot(depth, found[stack].gradient, marker="o", ms=3, color=colour, label=stack)
        axes[0].set(title="stream: root mean square (band: all places)", xlabel="depth")
        if found:
            axes[1].set(title="gradient of the loss at the stream: norm", xlabel="depth")
        for ax in axes:
            drawing.logarithmic(ax.yaxis)
            _whole(ax, max(len(rms) for rms in sizes.values()) - 1)
            if len(sizes) > 1:
                ax.legend(fontsize=8)
    return figure


def parameter_map(found: Mapping[str, Mapping[str, float]]) -> Figure:
    """The gradient's norm for every place of the network and part of it."""
    parts = [part for part in ("all", "attention", "cross", "ffn", "other") if any(part in row for row in found.values())]
    values = np.array([[row.get(part, np.nan) for part in parts] for row in found.values()])
    positive = values[np.isfinite(values) & (values > 0)]
    norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01)) if positive.size else None
    with style():
        figure = canvas(1.1 * len(parts) + 3, min(0.25 * len(values) + 1, 9))
        ax = figure.subplots()
        texts = drawing.numbers(values) if len(values) <= 40 else None
        drawing.bar(figure, heat(ax, np.where(values > 0, values, np.nan), norm=norm, texts=texts), ax, "norm")
        counted(ax.xaxis, parts)
        counted(ax.yaxis, list(found), 40)
        ax.set_title("gradient of the loss by parameters: norm")
    return figure


# ── embeddings ───────────────────────────────────────────────────────────────────────────────────────────────────────
def spectrum_curve(share: np.ndarray) -> Figure:
    """The variance along each principal direction, beside that of a table with the same in every direction."""
    with style():
        figure = canvas(4.8, 3)
        ax = figure.subplots()
        ax.plot(np.arange(1, len(share) + 1), np.maximum(share, 1e-12), marker="." if len(share) < 200 else "", color=PALETTE[0])
        ax.axhline(1 / len(share), color=PALETTE[6], lw=0.8, ls=":", label="all alike")
        ax.set(title="embedding table: share of the variance", xlabel="principal direction")
        drawing.logarithmic(ax.yaxis)
        ax.set_ylim(bottom=max(share.min() / 2, share.max() * 1e-6))
        ax.legend(fontsize=8)
    return figure


def history_curves(found: History, names: Mapping[tuple[int, int, int, int], str]) -> Figure:
    """Isotropy, and ranks of analogies, over the checkpoints."""
    rows = {
        "partition ratio (1: isotropic)": [one.partition for one in found.isotropy],
        "average cosine (0: isotropic)": [one.cosine for one in found.isotropy],
        "effective rank": [one.rank for one in found.isotropy],
        "cosine with the last checkpoint": list(found.kept),
    }
    with style():
        figure = canvas(9, 5 if not found.ranks else 7.4)
        axes = figure.subplots(3 if found.ranks else 2, 2).flatten()
        for index, (ax, (name, values)) in enumerate(zip(axes, rows.items(), strict=False)):
            ax.plot(found.steps, values, marker="o", ms=3, color=PALETTE[index])
            ax.set(title=name, xlabel="step")
        for ax in axes[4:]:
            ax.set_axis_off()
        if found.ranks:
            axes[4].set_axis_on()
            for index, (given, ranks) in enumerate(found.ranks.items()):
                axes[4].plot(found.steps, ranks + 1, marker="o", ms=3, color=PALETTE[index % len(PALETTE)], label=names[given])
            axes[4].set(title="rank of an analogy's answer (1: found)", xlabel="step")
            drawing.logarithmic(axes[4].yaxis)
            legend = axes[4].legend(fontsize=7)
            for text in legend.get_texts():
                text.set_parse_math(False)
    return figure


def _whole(ax, last: int) -> None:
    """Ticks at whole depths."""
    ax.set_xticks(list(thinned(last + 1, 13)))
