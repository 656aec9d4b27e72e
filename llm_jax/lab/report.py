"""The report: one self-contained page, the same as Markdown, pictures, and the numbers; rebuilt from `results.json` files alone."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from rich.table import Table

from llm_jax.core.paths import to_path
from llm_jax.core.whole import write_whole
from llm_jax.lab import page, plots
from llm_jax.lab.summary import Summary, summarize
from llm_jax.lab.workfolder import write as write_json


def write(workdirs: Sequence[str | pathlib.Path], output: str | pathlib.Path) -> Summary:
    """Writes report.html, report.md, results.json and plots/*.png into `output`, each whole: several processes may do it at once.

    Raises `ConfigError` where there is nothing to report.
    """
    summary, output = summarize(workdirs), to_path(output)
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "results.json", summary.data)
    drawn = plots.pictures(summary)
    for name, draw in drawn.items():
        plots.png(draw, summary, output / "plots" / f"{name}.png")
    write_whole(output / "report.md", page.markdown(summary, list(drawn)))
    write_whole(output / "report.html", page.html(summary, {name: plots.svg(draw, summary) for name, draw in drawn.items()}))
    return summary


def table(summary: Summary) -> Table:
    """The arms for a terminal."""
    data = summary.data
    shown = Table(title=data["question"], caption=data["answer"], title_justify="left", caption_justify="left")
    for heading in page.COLUMNS:
        shown.add_column(heading, justify="left" if heading in ("arm", "verdict") else "right")
    for row in data["arms"]:
        shown.add_row(*page.cells(row))
    return shown
