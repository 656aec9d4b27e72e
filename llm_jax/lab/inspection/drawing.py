"""What the pictures of an inspection are put together from: canvases, heat maps, and tokens along an axis."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from llm_jax.lab.plots import STYLE

LABEL = 7  # points: of tokens along axes and in cells
DOTS = 130  # an inch
CELLS = 24  # rows or columns of a heat map in whose cells a number can still be read
PIXELS = 320  # of one map along each side; a longer text's are pooled


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The reports' style, without the grid that would lie over a heat map."""
    with matplotlib.rc_context(STYLE | {"axes.grid": False, "axes.titlesize": 9, "axes.labelsize": 9}):
        yield


def canvas(width: float, height: float) -> Figure:
    """An empty figure of so many inches, of no window and no global state."""
    return Figure(figsize=(width, height), dpi=DOTS)


def png(figure: Figure) -> bytes:
    """The picture as a file. A character that the font lacks is drawn as a box."""
    out = io.BytesIO()
    with style(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(out, format="png", dpi=DOTS, metadata={"Software": None})
    return out.getvalue()


def short(piece: str, most: int = 8) -> str:
    """A token as it fits beside an axis."""
    return piece if len(piece) <= most else piece[: most - 1] + "…"


def thinned(count: int, most: int) -> range:
    """At most so many of 0 … count - 1, evenly spaced."""
    return range(0, count, max(math.ceil(count / max(most, 1)), 1))


def tokens(axis: Any, pieces: Sequence[str], most: int, *, upright: bool = False) -> None:
    """The tokens along an axis, no more than can be read; where some are left out, their places are counted too."""
    shown = thinned(len(pieces), most)
    named = [short(pieces[i]) if shown.step == 1 else f"{short(pieces[i], 6)} {i}" for i in shown]
    axis.set_ticks(list(shown), named, fontsize=LABEL, parse_math=False, **({"rotation": 90} if upright else {}))
    axis.set_tick_params(length=2, pad=1)


def counted(axis: Any, names: Sequence[str], most: int = CELLS) -> None:
    """Names along an axis, no more than can be read."""
    shown = thinned(len(names), most)
    axis.set_ticks(list(shown), [names[i] for i in shown], fontsize=LABEL + 1)
    axis.set_tick_params(length=2, pad=1)


def heat(ax: Any, values_RC: np.ndarray, *, norm: Normalize | None = None, colours: str = "Blues", texts: Any = None) -> Any:
    """A heat map with row 0 at the top; NaN stays grey. texts: rows of strings, written where they can be read."""
    norm = norm or spread(values_RC)
    shown = ax.imshow(values_RC, cmap=_with_grey(colours), norm=norm, aspect="auto", interpolation="nearest")
    if texts is not None:
        for row, line in enumerate(texts):
            for column, text in enumerate(line):
                write(ax, column, row, text, shown.cmap(norm(values_RC[row, column])))
    return shown


def write(ax: Any, x: float, y: float, text: str, ground: tuple[float, ...], **more: Any) -> None:
    """A text in the middle of a cell, dark on a light ground and light on a dark one."""
    light = np.dot(ground[:3], (0.299, 0.587, 0.114)) > 0.55
    colour = "#1b1f24" if light else "white"
    ax.text(x, y, text, ha="center", va="center", fontsize=LABEL, color=colour, parse_math=False, clip_on=True, **more)


def numbers(values_RC: np.ndarray, form: str = "{:.2g}") -> list[list[str]] | None:
    """A text a cell, none for NaN and for what is exactly 0; None where there are more cells than can be read."""
    if max(values_RC.shape) > CELLS:
        return None
    return [[form.format(value) if np.isfinite(value) and value else "" for value in row] for row in values_RC]


def spread(values: np.ndarray) -> Normalize:
    """From the smallest to the largest finite number."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0)
    return Normalize(low, high if high > low else low + 1)


def pooled(map_LM: np.ndarray, most: int = PIXELS) -> np.ndarray:
    """At most `most` a side: the largest of each block, so that one bright cell is not lost among thousands."""
    for axis in (0, 1):
        starts = np.arange(0, map_LM.shape[axis], max(math.ceil(map_LM.shape[axis] / most), 1))
        map_LM = np.maximum.reduceat(map_LM, starts, axis=axis)
    return map_LM


def bar(figure: Figure, shown: Any, axes: Any, label: str) -> None:
    """The scale of a heat map's colours."""
    drawn = figure.colorbar(shown, ax=axes, fraction=0.03, pad=0.02, aspect=30)
    if isinstance(shown.norm, LogNorm):
        _plain(drawn.ax.yaxis)
    drawn.set_label(label, fontsize=8)
    drawn.ax.tick_params(labelsize=LABEL)
    drawn.outline.set_visible(False)


def logarithmic(axis: Any) -> None:
    """A logarithmic axis with plain numbers, also where it spans less than a decade."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    _plain(axis)


def _plain(axis: Any) -> None:
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _with_grey(name: str) -> Any:
    return matplotlib.colormaps[name].with_extremes(bad="#e4e7eb")
