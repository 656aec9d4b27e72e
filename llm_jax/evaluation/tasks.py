"""Questions in files of JSON lines, and how a model's answers to them are scored.

    {"context": "2 + 2 =", "choices": ["4", "5"], "gold": 0}          multiple choice; gold: the right one's place from 0, its text,
                                                                      or a list of such where several are right
    {"context": "Q: Who wrote Emma?\\nA:", "answer": "Jane Austen"}   to be written; a list of answers where any will do

`context` may also be called question, query or prompt, and `gold` or `answer` also target or label. What else is in a line is left
alone.
"""

from __future__ import annotations

import difflib
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from llm_jax.core.config import Config, ConfigError, require
from llm_jax.evaluation.estimates import Estimate, proportion
from llm_jax.evaluation.lines import lines, short
from llm_jax.evaluation.reading import Reader
from llm_jax.evaluation.writing import Prompt, write
from llm_jax.infer.sampling import Greedy, Sampling
from llm_jax.infer.scoring import Request, Scorer

CONTEXT, GOLD = ("context", "question", "query", "prompt"), ("gold", "answer", "target", "label")
Tell = Callable[[int, int], None]  # (done, of how many)


@dataclass(frozen=True)
class Record:
    """A question. where: file and line; gold: places of the right choices, or the answers that are right; choices: None of none."""

    where: str
    context: str
    gold: tuple[Any, ...]
    choices: tuple[str, ...] | None = None

    @property
    def answer(self) -> str:
        """A right one, as an example shows it."""
        return self.gold[0] if self.choices is None else self.choices[self.gold[0]]


@dataclass(frozen=True)
class Answered:
    """scores: by name; cut: how many questions had their context cut on the left; items: what was made of each record."""

    scores: dict[str, Estimate]
    cut: int
    items: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Task(Config):
    """Questions of a file, or of a folder or a pattern of such, local or remote.

    A question is put as: description, the examples, each with its answer and a separator, and its own context. delimiter: between a
    context and its answer. shots: examples, the first so many records of the file `examples`, or without one drawn from the other
    questions, for each question its own, always the same. In a chat (`--chat`) the description is the system's, examples are turns,
    and delimiter and separator are the template's.
    """

    abstract = True
    path: str = ""
    shots: int = 0
    examples: str | None = None
    description: str = ""
    delimiter: str = " "
    separator: str = "\n\n"
    seed: int = 0

    def validate(self):
        require(bool(self.path), "path", "is missing: name a file of JSON lines")
        require(self.shots >= 0, "shots", f"must be >= 0, got {self.shots}")
        require(self.examples is None or self.shots > 0, "shots", "is 0, so that examples are named for nothing: set it")

    @property
    def name(self) -> str:
        """What it is called in tables."""
        return pathlib.PurePosixPath(self.path).name.partition(".")[0]

    def score(self, reader: Reader, *, limit: int | None = None, tell: Tell = lambda *_: None) -> Answered:
        """The scores of the first `limit` questions. Raises `ConfigError` for a record that is wrong."""
        raise NotImplementedError

    def record(self, raw: Mapping[str, Any], where: str) -> Record:
        """A line's content as a question. Raises `ConfigError`."""
        raise NotImplementedError

    def records(self, path: str | None = None) -> list[Record]:
        """The questions of the file. Raises `ConfigError`."""
        return [self.record(raw, where) for where, raw in lines(path or self.path)]

    def contexts(self, reader: Reader, limit: int | None) -> list[tuple[Record, str]]:
        """Every question and what the model is to go on from."""
        known = self.records()
        pool = known if self.examples is None else self.records(self.examples)
        enough = len(pool) - (self.examples is None)
        require(self.shots <= enough, "shots", f"is {self.shots}, but there are only {enough} examples")
        return [(record, self._put(reader, record, self._shown(pool, n))) for n, record in enumerate(known[:limit])]

    def _shown(self, pool: Sequence[Record], number: int) -> list[Record]:
        """The examples of a question."""
        if self.examples is not None or not self.shots:
            return list(pool[: self.shots])
        drawn = np.random.default_rng([self.seed, number]).choice(len(pool) - 1, self.shots, replace=False)
        return [pool[i + (i >= number)] for i in drawn.tolist()]

    def _put(self, reader: Reader, record: Record, shown: Sequence[Record]) -> str:
        if reader.template is None:
            examples = (one.context + self.delimiter + one.answer + self.separator for one in shown)
            return self.description + "".join(examples) + record.context
        turns = [turn for one in shown for turn in (("user", one.context), ("assistant", one.answer))]
        system = [("system", self.description)] if self.description else []
        said = [*system, *turns, ("user", record.context)]
        return reader.chat([{"role": role, "content": content} for role, content in said])


@dataclass(frozen=True)
class MultipleChoice(Task):
    """Which choice is the likeliest after the context.

    acc: by Σ log p of its tokens; acc_norm: by that over its characters, acc_bytes: over its UTF-8 bytes, as lm-evaluation-harness
    has them, without the delimiter. Of equal ones the first counts.
    """

    def record(self, raw, where):
        choices = raw.get("choices")
        if choices is None:
            raise ConfigError(f'has no "choices", a list of texts{_meant(raw)}', where)
        if not isinstance(choices, list) or not all(isinstance(choice, str) and choice for choice in choices):
            raise ConfigError(f'needs "choices", a list of texts, got {short(choices)}', where)
        if len(choices) < 2:
            raise ConfigError(f"has {len(choices) or 'no'} choice, and needs at least two", where)
        gold = _one_of(raw, GOLD, where)
        right = tuple(_place(one, choices, where) for one in (gold if isinstance(gold, list) else [gold]))
        if not right:
            raise ConfigError("has no right choice", where)
        return Record(where, _context(raw, where), right, tuple(choices))

    def score(self, reader, *, limit=None, tell=lambda *_: None):
        known = self.contexts(reader, limit)
        delimiter = self.delimiter if reader.template is None else ""
        pairs = [(n, choice) for n, (record, _) in enumerate(known) for choice in record.choices]
        found, cut = np.zeros(len(pairs)), set[int]()

        def requests() -> Iterator[Request]:
            for n, choice in pairs:
                try:
                    request, shorter = reader.pair(known[n][1], delimiter + choice)
                except ConfigError as error:
                    raise ConfigError(str(error), known[n][0].where) from None
                if shorter:
                    cut.add(n)
                yield request

        scorer = Scorer(reader.lm.config, reader.lm.vocabulary, reader.lm.params)
        for done, (number, scores) in enumerate(scorer(requests()), 1):
            found[number] = scores.log_p
            tell(done, len(pairs))
        ends = np.cumsum([len(record.choices) for record, _ in known])[:-1]
        items = tuple(_item(record, log_p) for (record, _), log_p in zip(known, np.split(found, ends), strict=True))
        scores = {name: proportion([item[name] for item in items]) for name in ("acc", "acc_norm", "acc_bytes")}
        return Answered(scores, len(cut), items)


def _item(record: Record, log_p: np.ndarray) -> dict[str, Any]:
    assert record.choices is not None
    sizes = {
        "acc": 1.0,
        "acc_norm": np.array([len(choice) for choice in record.choices]),
        "acc_bytes": np.array([len(choice.encode("utf-8")) for choice in record.choices]),
    }
    hits = {name: int(np.argmax(log_p / size)) in record.gold for name, size in sizes.items()}
    return {"where": record.where, "gold": list(record.gold), "log_p": log_p.tolist()} | hits


@dataclass(frozen=True)
class Generation(Task):
    """What the model writes after the context, up to one of `until`, its own end, or `max_tokens`, is one of the answers.

    exact_match: word for word, without spaces around it where `strip`, and without regard to case where `ignore_case`.
    """

    until: tuple[str, ...] = ("\n\n",)
    max_tokens: int = 256
    sampling: Sampling = field(default_factory=Greedy)
    strip: bool = True
    ignore_case: bool = False

    def validate(self):
        super().validate()
        require(self.max_tokens > 0, "max_tokens", f"must be > 0, got {self.max_tokens}")
        require(all(self.until), "until", "has an empty text, which everything contains")

    def record(self, raw, where):
        gold = _one_of(raw, GOLD, where)
        answers = gold if isinstance(gold, list) else [gold]
        if not answers or not all(isinstance(answer, str) for answer in answers):
            told = f'needs "answer", a text or a list of texts, got {short(gold)}'
            place = isinstance(gold, (int, list)) and "choices" not in raw
            raise ConfigError(told + (f', or the "choices" that it is a place of{_meant(raw)}' if place else ""), where)
        return Record(where, _context(raw, where), tuple(answers))

    def score(self, reader, *, limit=None, tell=lambda *_: None):
        if self.max_tokens >= reader.length and not reader.lm.config.encodes:
            way = f"Generation(path='{self.path}', max_tokens={max(reader.length // 2, 1)})"
            told = f"is {self.max_tokens}, which leaves no room for a context in the {reader.length} tokens that are read"
            raise ConfigError(f'{told}: write --task="{way}"', "max_tokens")
        known = self.contexts(reader, limit)
        prompts = [Prompt(context, self.until, self.max_tokens, self.sampling) for _, context in known]
        written: list[str] = [""] * len(known)
        cut = 0
        for done, (number, text, shorter) in enumerate(write(reader, prompts, seed=self.seed), 1):
            written[number], cut = text, cut + shorter
            tell(done, len(known))
        hits = [self._plain(text) in map(self._plain, record.gold) for (record, _), text in zip(known, written, strict=True)]
        items = tuple(
            {"where": record.where, "gold": list(record.gold), "written": text, "exact_match": hit}
            for (record, _), text, hit in zip(known, written, hits, strict=True)
        )
        return Answered({"exact_match": proportion(hits)}, cut, items)

    def _plain(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.ignore_case else text


def of_file(path: str) -> Task:
    """The task that a file's first record is of, with its usual settings. Raises `ConfigError`."""
    where, first = next(lines(path))
    if "choices" not in first and any(isinstance(first[name], list) for name in _like_choices(first)):
        raise ConfigError(f'has no "choices"{_meant(first)} For answers to be written: Generation(path={path!r})', where)
    return MultipleChoice(path=path) if "choices" in first else Generation(path=path)


# ── records ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def _one_of(raw: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    found = [name for name in names if raw.get(name) is not None]
    if len(found) != 1:
        told = f"has {' and '.join(map(repr, found))}, which mean the same" if found else f'has no "{names[0]}"'
        raise ConfigError(f"{told}: give one of {', '.join(names)}", where)
    return raw[found[0]]


def _like_choices(raw: Mapping[str, Any]) -> list[str]:
    return difflib.get_close_matches("choices", raw)


def _meant(raw: Mapping[str, Any]) -> str:
    """A question about a key that is spelt much like "choices"; nothing where there is none."""
    near = _like_choices(raw)
    return f': did you mean "{near[0]}" to be that?' if near else ""


def _context(raw: Mapping[str, Any], where: str) -> str:
    context = _one_of(raw, CONTEXT, where)
    if not isinstance(context, str):
        raise ConfigError(f"must have a text as its context, got {short(context)}", where)
    return context


def _place(gold: Any, choices: Sequence[str], where: str) -> int:
    if isinstance(gold, str):
        if gold not in choices:
            raise ConfigError(f"has the gold {short(gold)}, which is none of its choices", where)
        return choices.index(gold)
    if isinstance(gold, bool) or not isinstance(gold, int):
        raise ConfigError(f"must have a place or a text as its gold, got {short(gold)}", where)
    if not 0 <= gold < len(choices):
        raise ConfigError(f"has the gold {gold}, but its {len(choices)} choices are 0 … {len(choices) - 1}", where)
    return gold
