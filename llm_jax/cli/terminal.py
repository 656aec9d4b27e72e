"""Between a command and the person who typed it: flags in, tables out."""

from __future__ import annotations

import errno
import os
import pathlib
import sys
from collections.abc import Sequence

from absl import flags
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llm_jax.core.config import ConfigError
from llm_jax.core.platform import cache_dir
from llm_jax.core.whole import try_file


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


def which_model(values: flags.FlagValues) -> None:
    """Defines the flags that say which trained model a command is about."""
    flags.DEFINE_string(
        "model", None, "A work folder of `run`, one of its trials, or a folder of Hugging Face's.", flag_values=values
    )
    flags.DEFINE_string("experiment", None, "The experiment file, where it defines components of its own.", flag_values=values)
    flags.DEFINE_string("arm", None, "The arm of a work folder (default: the best).", flag_values=values)
    flags.DEFINE_string("trial", None, "The trial of a work folder.", flag_values=values)
    flags.DEFINE_integer("step", None, "The step of its checkpoint (default: the last).", flag_values=values)


def console() -> Console:
    """Standard output; where it is no terminal, tables are as wide as they need to be read."""
    return Console(width=None if sys.stdout.isatty() else 160)


# ── places ───────────────────────────────────────────────────────────────────────────────────────────────────────────
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def refusal(error: OSError, argv: Sequence[str] = ()) -> str | None:
    """A sentence for a place that the system refuses, with the way out; None where the error is not about one.

    What cannot be written is named as `argv` has it; a file that cannot be read is named itself.
    """
    full, known = error.errno in FULL, isinstance(error.filename, (str, bytes, os.PathLike))
    if error.errno is None or not (known or full):
        return None
    room = "make room, or " if full else ""
    if not known:
        return f"{error.strerror}: {room}name another place"
    name = os.fsdecode(error.filename)
    if within(name, cache_dir()) or within(cache_dir(), name):
        return f"{cache_dir()}: {error.strerror}: {room}set LLM_JAX_CACHE to a folder that can be written"
    typed = [argument.partition("=")[2] if argument.startswith("-") else argument for argument in argv]
    if full or error.errno == errno.EROFS:
        name = next((place for place in typed if place and (within(name, place) or within(place, name))), name)
    return f"{name}: {error.strerror}: {room}name another place"


def within(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Whether a path is a folder's, or the folder itself."""
    inner, outer = (pathlib.Path(os.path.abspath(pathlib.Path(one).expanduser())) for one in (path, folder))
    return inner.is_relative_to(outer)


def require_writable(file: pathlib.Path, flag: str) -> None:
    """Raises `ConfigError`, which begins with the flag as it was typed, where the system does not let the file be written."""
    try:
        try_file(file)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}: name another place", flag) from None


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
