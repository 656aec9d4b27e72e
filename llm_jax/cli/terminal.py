"""Between a command and the person who typed it: flags in, tables out."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags
from rich.console import Console

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
