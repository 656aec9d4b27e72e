"""A part of an inspection, and how it looks in HTML: on the page, and in a notebook."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from matplotlib.figure import Figure

from llm_jax.lab import page
from llm_jax.lab.inspection.drawing import png


@dataclass(frozen=True)
class Table:
    """What is better read than drawn."""

    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class View:
    """A part of an inspection; a notebook shows it as the page does.

    text: what it shows. figures: file name without ".png" → picture. numbers: what was drawn.
    """

    name: str
    title: str
    text: str
    numbers: Any
    figures: dict[str, Figure] = field(default_factory=dict)
    tables: tuple[Table, ...] = ()

    def _repr_html_(self) -> str:
        return section(self)


def section(view: View, pictures: dict[str, bytes] | None = None) -> str:
    """A view as HTML; pictures: those that are drawn already."""
    pictures = pictures or {file: png(figure) for file, figure in view.figures.items()}
    images = "".join(_image(file.replace("_", " "), pictures[file]) for file in view.figures)
    tables = "".join(
        f"<div class=pieces><p class=soft>{html.escape(table.caption)}</p>{page.table(table.headings, table.rows)}</div>"
        for table in view.tables
    )
    head = f"<h2>{html.escape(view.title)}</h2><p class=soft>{html.escape(view.text)}</p>"
    return f"<section id={view.name}>{head}{images}{tables}</section>"


def _image(name: str, picture: bytes) -> str:
    return f'<figure><img alt="{name}" src="data:image/png;base64,{base64.b64encode(picture).decode()}"></figure>'
