"""Between a command and the person who typed it: flags in, tables out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_jax.core.config import ConfigError


def parse(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Fills `values` from `argv` (the command's name first); `--help` and `--helpshort` list the flags and leave.

    Raises `ConfigError` for an unknown flag, a wrong value, or a word that is no flag.
    """
    if set(argv[1:]) & {"--help", "--helpshort", "-h"}:
        print(f"python -m {argv[0]} --flags\n{values.get_help()}")
        raise SystemExit(0)
    try:
        rest = values(list(argv))
    except flags.Error as error:
        raise ConfigError(str(error).replace("\n", " ")) from None
    if len(rest) > 1:
        raise ConfigError(f"takes flags only, got {rest[1]!r}: write --name=value", argv[0])


def console() -> Console:
    """Standard output; where it is no terminal, tables are as wide as they need to be read."""
    return Console(width=None if sys.stdout.isatty() else 160)


# ── pieces of text ───────────────────────────────────────────────────────────────────────────────────────────────────
COLOURS = ("black on bright_cyan", "black on bright_yellow", "black on bright_magenta", "black on bright_green")
ROWS = 60  # of a table of pieces, at most


def visible(piece: bytes | str) -> str:
    """What a terminal can show of a piece without doing anything else: control characters by their pictures, others by number."""
    text = piece if isinstance(piece, str) else piece.decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else _picture(ord(c)) for c in text)


def _picture(point: int) -> str:
    return chr(0x2400 + point) if point < 0x20 else "\u2421" if point == 0x7F else f"\\u{point:04x}"


def pieces_in_colour(pieces: Sequence[bytes | str], mask: Sequence[bool] | None, *, colour: bool) -> Text:
    """The pieces one after another, in turns of colours, or parted by | without them; underlined where the mask is true."""
    found = Text()
    for place, piece in enumerate(pieces):
        style = COLOURS[place % len(COLOURS)] + (" underline" if mask is not None and mask[place] else "")
        shown = visible(piece).replace("\u240a", "\u240a\n")  # lines stay lines
        found.append("" if colour or not place else "|").append(shown, style)
    return found


def piece_table(ids: Sequence[int], pieces: Sequence[bytes | str], mask: Sequence[bool] | None) -> Table:
    """A row for each of the first pieces: id, text, bytes, and whether the assistant wrote it where that is known."""
    table = Table("id", "piece", "bytes", *(["assistant"] if mask is not None else []))
    for place, (number, piece) in enumerate(zip(ids[:ROWS], pieces, strict=False)):
        size = str(len(piece)) if isinstance(piece, bytes) else "-"
        said = [] if mask is None else ["yes" if mask[place] else ""]
        table.add_row(str(number), Text(repr_of(piece)), size, *said)
    if len(ids) > ROWS:
        table.add_row("…", f"and {len(ids) - ROWS} more", "")
    return table


def repr_of(piece: bytes | str) -> str:
    """A piece between marks that show its spaces, a name as it is."""
    return f"\u00ab{visible(piece)}\u00bb" if isinstance(piece, bytes) else visible(piece)
