"""A model scored on corpora, on questions, and on tasks of lm-evaluation-harness, in one call: a table, and a file."""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import metadata
from typing import Any

from rich.markup import escape
from rich.table import Table

from llm_jax.core.config import ConfigError, check_type, require, to_json
from llm_jax.core.whole import write_whole
from llm_jax.data.corpora import Corpus
from llm_jax.evaluation.estimates import Estimate
from llm_jax.evaluation.perplexity import perplexity
from llm_jax.evaluation.reading import Reader, reader
from llm_jax.evaluation.tasks import Task, of_file
from llm_jax.language_model import LM

Tell = Callable[[str, int, int | None, str], None]  # (what, done, of how many, in words)


@dataclass(frozen=True)
class Found:
    """name: of the task; scores: by metric; told: what else is worth knowing, in words; more: what the file has besides."""

    name: str
    scores: dict[str, Estimate]
    told: str = ""
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """model: what was scored; settings: how; found: by task, in the order in which they were asked for."""

    model: str
    settings: dict[str, Any]
    found: tuple[Found, ...]

    def table(self) -> Table:
        """Every score with its standard error and interval."""
        table = Table("task", "metric", "score", "± error", "95% interval", "of", "")
        for one in self.found:
            for row, (metric, score) in enumerate(one.scores.items()):
                known = not math.isnan(score.error)
                interval = f"{_short(score.low)} – {_short(score.high)}" if known else "-"
                error = _short(score.error) if known else "-"
                name, told = (escape(one.name), escape(one.told)) if not row else ("", "")
                table.add_row(name, escape(metric), _short(score.value), error, interval, f"{score.count:,}", told)
        return table

    def json(self) -> dict[str, Any]:
        """All of it as plain data; what is no number, such as the error of a single document, is null."""
        found = [
            {"task": one.name, "scores": {name: asdict(score) for name, score in one.scores.items()}} | one.more
            for one in self.found
        ]
        return _finite({"model": self.model, "settings": self.settings, "results": found})

    def write(self, path: str | os.PathLike) -> None:
        """Writes the file, whole or not at all."""
        write_whole(pathlib.Path(path), json.dumps(self.json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


@dataclass(frozen=True)
class Chosen:
    """Tasks of the harness that there are, by name. manager: its `TaskManager`, which takes seconds to make."""

    names: tuple[str, ...]
    manager: Any


def choose(names: str | Sequence[str], include_path: str | None = None) -> Chosen:
    """Tasks of the harness, looked up before a model is loaded for them. Raises `ConfigError` for one that it does not have."""
    known = tuple(_several(names, str, "harness"))
    check_type(include_path, str | None, "include_path")
    return Chosen(known, _harness().manager_of(known, include_path))


def evaluate(
    lm: LM,
    *,
    corpora: Corpus | Sequence[Corpus] = (),
    split: str = "valid",
    tasks: Task | str | Sequence[Task | str] = (),
    harness: str | Sequence[str] | Chosen = (),
    include_path: str | None = None,
    shots: int | None = None,
    length: int | None = None,
    context: int = 1,
    limit: int | None = None,
    chats: bool = False,
    seed: int = 0,
    tell: Tell = lambda *_: None,
) -> Evaluated:
    """Scores of everything that is named; tasks: or files of questions. Raises `ConfigError`.

    length: tokens that the model reads at most (None: `reading.longest`); context: tokens at least that later windows of a corpus'
    document go on from; limit: documents or questions of each, at most; shots: examples of the harness's tasks; chats: questions go
    through the model's chat template.
    """
    given = {"split": (split, str), "shots": (shots, int | None), "length": (length, int | None), "context": (context, int)}
    given |= {"limit": (limit, int | None), "chats": (chats, bool), "seed": (seed, int)}
    for name, (value, kind) in given.items():
        check_type(value, kind, name)
    require(limit is None or limit >= 1, "limit", f"must be >= 1, or None for all, got {limit}")
    require(shots is None or shots >= 0, "shots", f"must be >= 0, or None for each task's own, got {shots}")
    if not isinstance(lm, LM):
        raise ConfigError(f"must be what llm_jax.load gave, got {lm!r}: evaluate(llm_jax.load(…), …)", "lm")
    corpora, tasks = _several(corpora, Corpus, "corpora"), _several(tasks, Task | str, "tasks")
    if not (corpora or tasks or harness):
        raise ConfigError("needs something to score: corpora=[…], tasks=['FILE.jsonl'] or harness=['NAME']", "evaluate")
    chosen = harness if isinstance(harness, Chosen) else choose(harness, include_path) if harness else None
    asked = reader(lm, length, chats=chats)
    settings = {"length": asked.length, "context": context, "split": split, "limit": limit, "chats": chats, "seed": seed}
    found = [_corpus(asked, corpus, split, context, limit, tell) for corpus in corpora]
    found += [_task(asked, of_file(task) if isinstance(task, str) else task, limit, tell) for task in tasks]
    if chosen is not None:
        call = partial(_harness().run, lm, chosen.names, chosen.manager, shots=shots)
        by_task = call(length=length, chats=chats, limit=limit, seed=seed)
        found += [Found(name, scores, _cut(cut), {"kind": "harness", "cut": cut}) for name, scores, cut in by_task]
        settings |= {"shots": shots, "lm_eval": metadata.version("lm_eval")}
    return Evaluated(repr(lm), settings, tuple(found))


def _several(value: Any, kind: Any, name: str) -> list[Any]:
    """One, or several, as a list. Raises `ConfigError` for what is of another kind."""
    found = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    for one in found:
        check_type(one, kind, name)
    return found


def _harness() -> Any:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise ConfigError('needs lm_eval: pip install -e ".[harness]"', "--harness_tasks") from None
    from llm_jax.evaluation import harness

    return harness


def _corpus(asked: Reader, corpus: Corpus, split: str, context: int, limit: int | None, tell: Tell) -> Found:
    name = f"{type(corpus).__name__} {getattr(corpus, 'path', '')}".strip()
    one = perplexity(asked, corpus, split, context=context, limit=limit, tell=lambda done, words: tell(name, done, None, words))
    told = f"{one.tokens:,} tokens, {one.words:,} words, {one.bytes:,} bytes of {split}"
    told += f"; {one.unscored:,} first tokens have nothing before them and are not scored" if one.unscored else ""
    counts = {part: getattr(one, part) for part in ("documents", "tokens", "words", "bytes", "unscored")}
    return Found(name, one.scores, told, {"kind": "corpus", "corpus": to_json(corpus)} | counts)


def _task(asked: Reader, task: Task, limit: int | None, tell: Tell) -> Found:
    one = task.score(asked, limit=limit, tell=lambda done, of: tell(task.name, done, of, ""))
    more = {"kind": "task", "definition": to_json(task), "cut": one.cut, "items": list(one.items)}
    return Found(task.name, one.scores, _cut(one.cut), more)


def _cut(count: int) -> str:
    return f"{count:,} {'contexts are' if count > 1 else 'context is'} cut on the left" if count else ""


def _short(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
