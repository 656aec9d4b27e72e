"""An inspection as a whole: its views for a notebook, or one self-contained page beside a folder of pictures."""

from __future__ import annotations

import html
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llm_jax.core.config import ConfigError, nearest
from llm_jax.core.paths import to_path
from llm_jax.core.whole import write_whole
from llm_jax.lab import page
from llm_jax.lab.inspection import views
from llm_jax.lab.inspection.drawing import png
from llm_jax.lab.inspection.subject import Subject
from llm_jax.lab.inspection.view import View, section
from llm_jax.lab.inspection.views import VIEWS

PAGE = "inspection.html"
STYLE = """
img{max-width:100%;height:auto;display:block}figure{margin:.8rem 0;width:fit-content;max-width:100%}
.pieces td{white-space:pre-wrap}.pieces td,.pieces th{text-align:left}nav a{margin-right:1rem}
"""


@dataclass(frozen=True)
class Written:
    """What was written. page: its file; left_out: view → why."""

    page: pathlib.Path
    views: tuple[View, ...]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Inspection:
    """A look into a model while it reads a text. Every view is shown by a notebook, and has its `numbers` and `figures`."""

    subject: Subject

    def attention(self, *, layers: Sequence[int] | None = None) -> View:
        """Where every head looks."""
        return views.attention(self.subject, layers=layers)

    def lens(self, *, top: int = 5) -> View:
        """What the model would say after each layer."""
        return views.lens(self.subject, top=top)

    def depth(self) -> View:
        """Sizes of the residual stream and of gradients."""
        return views.depth(self.subject)

    def embeddings(self, *, words: Sequence[str] = (), analogies: Sequence[str] = (), count: int = 8) -> View:
        """Neighbours, analogies "a:b:c" and isotropy, over the checkpoints where there are several."""
        return views.embeddings(self.subject, words=words, analogies=analogies, count=count)

    def positions(self, *, length: int | None = None) -> View:
        """What positional schemes add, bias and turn."""
        return views.positions(self.subject, length=length)

    def write(self, folder: str | pathlib.Path, *, show: Sequence[str] = (), **options: dict[str, Any]) -> Written:
        """Writes inspection.html, which works alone, and the pictures as PNG into `folder`.

        show: the views; () is all that this model has. options: view → what it is given, `embeddings={"words": ["a"]}`. Raises
        `ConfigError` where a view that was named does not apply, or none does.
        """
        unknown = next((name for name in (*show, *options) if name not in VIEWS), None)
        if unknown is not None:
            meant = nearest(unknown, list(VIEWS)) or ", ".join(VIEWS)
            raise ConfigError(f"names no view {unknown!r}: did you mean {meant}?", "show")
        drawn, left_out = [], {}
        for name in show or VIEWS:
            try:
                drawn.append(VIEWS[name](self.subject, **options.get(name, {})))
            except ConfigError as error:
                if name in show or options.get(name):
                    raise
                left_out[name] = str(error)
        if not drawn:
            raise ConfigError(f"has nothing to show: {'; '.join(left_out.values())}", self.subject.name)
        folder = to_path(folder)
        pictures = {file: png(figure) for view in drawn for file, figure in view.figures.items()}
        for file, picture in pictures.items():
            write_whole(folder / f"{file}.png", picture)
        write_whole(folder / PAGE, _html(self.subject, drawn, left_out, pictures))
        return Written(folder / PAGE, tuple(drawn), left_out)


def _html(subject: Subject, drawn: Sequence[View], left_out: dict[str, str], pictures: dict[str, bytes]) -> str:
    links = "".join(f"<a href=#{view.name}>{html.escape(view.title)}</a>" for view in drawn)
    batch = subject.batch
    text = "" if batch is None else _text(subject)
    missing = "".join(f"<li>{name}: {html.escape(why)}</li>" for name, why in left_out.items())
    body = [
        f"<h1>Inside {html.escape(subject.name)}</h1>{text}<nav>{links}</nav>",
        *(section(view, pictures) for view in drawn),
        f"<h2>Left out</h2><ul>{missing}</ul>" if missing else "",
    ]
    return page.document(f"Inside {subject.name}", "".join(body), style=STYLE)


def _text(subject: Subject) -> str:
    """What is read, token by token."""
    batch = subject.read
    rows = [("reads", batch.tokens)] if batch.inputs is None else [("input", batch.inputs), ("reads after it", batch.tokens)]
    return "".join(f"<p class=soft>{name}</p><pre>{html.escape(' '.join(subject.pieces(ids)))}</pre>" for name, ids in rows)
