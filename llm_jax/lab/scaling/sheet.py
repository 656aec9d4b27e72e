"""A scaling law as one self-contained page, its pictures as PNG, its numbers as JSON, and what a terminal shows of it."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Sequence

from rich.table import Table

from llm_jax.core.paths import to_path
from llm_jax.core.whole import write_whole
from llm_jax.lab import page, plots
from llm_jax.lab.scaling.figures import pictures
from llm_jax.lab.scaling.optimum import power
from llm_jax.lab.scaling.study import Study, as_json
from llm_jax.lab.workfolder import write as write_json

PAGE = "fit.html"
METHOD = (
    "Fitted by the Huber loss (δ = 0.001) of the log of the loss, by BFGS from a grid of starts (Hoffmann et al. 2022, approach "
    "3). Intervals are the middle 95% of fits to runs drawn with replacement. C is the FLOPs of the matrix products of each run's "
    "training, attention with them, counted from its shapes and not as 6ND; for sizes between those trained FLOPs a token are "
    "interpolated as a multiple of 6N, and beyond them held."
)
COUNTED = {
    "all": "all parameters",
    "body": "parameters but those of the vocabulary",
    "active": "parameters that a token visits",
}


def write(study: Study, folder: str | pathlib.Path) -> pathlib.Path:
    """Writes fit.html, fit.json and the pictures into `folder`; the page's path."""
    folder, drawn = to_path(folder), pictures(study)
    write_json(folder / "fit.json", as_json(study))
    for name, (_, draw) in drawn.items():
        plots.png(draw, study, folder / f"{name}.png")
    write_whole(folder / PAGE, _html(study, {title: plots.svg(draw, study) for title, draw in drawn.values()}))
    return folder / PAGE


def answer(study: Study) -> str:
    """The law in one line, and how it did on what it had not seen."""
    text = f"L = {study.law}"
    if study.held:
        worst = max(study.held, key=lambda one: abs(one.error))
        text += f"; of {len(study.held)} arms that were held out the worst is predicted {worst.error:+.2%} off ({worst.arm})"
    return text + "."


def tables(study: Study) -> list[Table]:
    """For a terminal."""
    shown = []
    for title, headings, rows in _tables(study):
        table = Table(*headings, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        shown.append(table)
    return shown


Rows = tuple[str, tuple[str, ...], list[tuple[str, ...]]]  # title, headings, cells


def _tables(study: Study) -> list[Rows]:
    known = [(name, f"{v:.4g}", _span(low, high)) for name, (v, low, high) in study.parameters.items()]
    found: list[Rows] = [("The law", ("parameter", "value", "95% interval"), known)]
    if study.held:
        rows = [
            (one.arm, f"{one.loss:.4f}", f"{one.predicted:.4f}", _span(one.low, one.high), f"{one.error:+.2%}")
            for one in study.held
        ]
        found.append(("Held out, and predicted from the rest", ("arm", study.metric, "predicted", "95% interval", "error"), rows))
    if study.budgets:
        rows = [
            (
                f"{b.C:.3g}",
                *(f"{getattr(b, name):.4g} {_span(*b.intervals[name])}" for name in ("N", "D", "loss")),
                f"{b.D / b.N:.3g}",
            )
            for b in study.budgets
        ]
        found.append(("For a budget", ("FLOPs", "parameters N", "tokens D", study.metric, "D / N"), rows))
    if study.profiles:
        rows = [(f"{p.C:.3g}", *("outside" if v is None else f"{v:.4g}" for v in (p.N, p.D))) for p in study.profiles]
        growth = power(study.profiles)
        said = "" if growth is None else f": N = {growth[0]:.3g} C^{growth[1]:.3f}"
        found.append((f"IsoFLOP profiles{said}", ("FLOPs", "best N", "best D"), rows))
    return found


def _span(low: float, high: float) -> str:
    return f"[{low:.4g}, {high:.4g}]"


def _run_rows(study: Study) -> list[tuple[str, ...]]:
    fitted, runs = study.law(study.runs.at(study.law.variables)), study.runs
    columns = zip(runs.arms, runs.seeds, runs.N, runs.D, runs.C, runs.loss, fitted, study.residuals, strict=True)
    return [
        (arm, str(seed), f"{N:,.0f}", f"{D:,.0f}", f"{C:.3g}", f"{loss:.4f}", f"{at:.4f}", f"{left:+.2%}")
        for arm, seed, N, D, C, loss, at, left in columns
    ]


def _html(study: Study, drawn: dict[str, str]) -> str:
    text = html.escape
    notes = "".join(f"<li>{text(note)}</li>" for note in study.notes)
    figures = "".join(f"<figure><figcaption>{text(title)}</figcaption>{svg}</figure>" for title, svg in drawn.items())
    held = " Hollow points were held out once." if study.held else ""
    headings: Sequence[str] = ("arm", "seed", "N", "D", "C", study.metric, "by the law", "residual")
    body = [
        f"<h1>How {text(study.metric)} falls with {' and '.join(study.law.variables)}</h1>",
        f"<p class=answer>{text(answer(study))}</p>",
        f"<p class=soft>N counts {COUNTED[study.counted]}. {len(study.runs)} runs of {text(', '.join(study.workdirs))}.</p>",
        *(f"<h2>{text(title)}</h2>{page.table(heads, rows)}" for title, heads, rows in _tables(study)),
        f"<h2>Take note</h2><ul>{notes}</ul>" if notes else "",
        f"<h2>Pictures</h2><div class=grid>{figures}</div><p class=soft>{held}</p>",
        f"<h2>Runs</h2><div class=numbers>{page.table(headings, _run_rows(study))}</div>",
        f"<h2>How it was made</h2><p class=soft>{METHOD}</p>",
    ]
    return page.document("A scaling law", "".join(body))
