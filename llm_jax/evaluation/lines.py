"""Files of JSON lines, each an object, by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.data import files


def lines(path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and line, its object) of files of JSON lines. Raises `ConfigError` where there is none, or a line is no object."""
    try:
        found = files.find(path, files.with_compressed("*.jsonl"))
    except ConfigError as error:
        raise ConfigError(error.problem, "task") from None
    empty = True
    for piece in found:
        with files.reading(piece.file) as content:
            for number, raw in enumerate(content, 1):
                if raw.strip():
                    empty, where = False, f"{piece.file}, line {number},"
                    yield where, _object(raw, where)
    if empty:
        raise ConfigError("is empty: write one JSON object a line", path)


def _object(raw: bytes, where: str) -> dict[str, Any]:
    value = files.parsed(raw, where)
    if not isinstance(value, dict):
        raise ConfigError(f'must be an object, as in {{"context": "2 + 2 =", "answer": "4"}}, got {short(value)}', where)
    return value


def short(value: Any) -> str:
    """The beginning of a value as JSON, for a sentence."""
    return json.dumps(value, ensure_ascii=False)[:60]
