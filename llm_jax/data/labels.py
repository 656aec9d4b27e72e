"""What a text is made of, character by character: what a linear probe is to read off a model's hidden states."""

from __future__ import annotations

import ast
import io
import keyword
import token
import tokenize
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from llm_jax.core.config import Config, ConfigError, require_positive
from llm_jax.core.types import Labelled
from llm_jax.data.corpus import Corpus, Split
from llm_jax.data.packing import ConcatThenSplit
from llm_jax.data.store import Tokens
from llm_jax.data.tokenizers import Fitted

NO_CLASS = -1


@dataclass(frozen=True)
class Labels(Config):
    """A class for each character of a text. bytes: the text of a split that is labelled, at most."""

    abstract = True
    classes: ClassVar[tuple[str, ...]]

    bytes: int = 262_144

    def validate(self):
        require_positive(self, "bytes")

    def of(self, text: str) -> np.ndarray:
        """`[characters]` int8: places in `classes`, or -1 for none."""
        raise NotImplementedError


@dataclass(frozen=True)
class PythonSyntax(Labels):
    """What Python's own lexer makes of its sources: whether a byte is in a comment or a string is seen from far away only.

    As the Python that runs has it: an f-string is a string until 3.11, and later what stands in its braces is code.

    A text that is no Python as a whole has no classes.
    """

    classes = ("space", "comment", "string", "keyword", "name", "number", "operator")

    def of(self, text: str) -> np.ndarray:
        found = np.full(len(text), NO_CLASS, np.int8)
        lines = io.StringIO(text, newline="").readlines()
        begins = np.cumsum([0, *map(len, lines)])
        try:
            ast.parse(text)  # the lexer takes nearly anything
            for part in tokenize.generate_tokens(iter(lines).__next__):
                name = self._class(part)
                if name is not None:
                    (first, column), (last, stop) = part.start, part.end
                    found[begins[first - 1] + column : begins[last - 1] + stop] = self.classes.index(name)
        except (tokenize.TokenError, SyntaxError, ValueError, RecursionError, MemoryError):
            return np.full(len(text), NO_CLASS, np.int8)  # it is no Python, or nothing that can be parsed
        found[(found == NO_CLASS) & _blank(text)] = self.classes.index("space")
        return found

    def _class(self, part: tokenize.TokenInfo) -> str | None:
        match token.tok_name[part.type]:
            case "NAME":
                return "keyword" if keyword.iskeyword(part.string) else "name"
            case "COMMENT" | "NUMBER" | "STRING" as name:
                return name.lower()
            case name if name.startswith("FSTRING"):
                return "string"
            case "OP":
                return "operator"
        return None


def labelled(corpus: Corpus, tokenizer: Fitted, split: Split | str, labels: Labels, *, length: int, batch: int) -> Labelled:
    """The first rows of a split, `[n, batch, length]`, and the class of each token: of its first character that is no space.

    Documents without any class are left out. Raises `ConfigError` where less than a batch is left.
    """
    ids: list[np.ndarray] = []
    classes: list[np.ndarray] = []
    starts: list[int] = []
    total, room = 0, labels.bytes
    for text in corpus.documents(split):
        found, text = labels.of(text)[:room], text[:room]
        if not (found != NO_CLASS).any():
            continue
        pieces, spans = tokenizer.spans(text)
        starts.append(total)
        end = [] if tokenizer.end is None else [tokenizer.end]
        ids.append(np.append(pieces, end).astype(np.int32))
        classes.append(np.append(found[_tellings(text, spans)], [NO_CLASS] * len(end)).astype(np.int32))
        total, room = total + len(ids[-1]), room - len(text)
        if room <= 0:
            break
    store = Tokens(np.concatenate(ids or [np.zeros(0, np.int32)]), np.array(starts, np.int64), tokenizer.end, split)
    rows = ConcatThenSplit().rows(store, length, "")
    count = len(rows) // batch
    if count < 1:
        kind = type(labels).__name__
        told = f"finds {len(store)} tokens of the {split} split that {kind} has classes for, less than a batch: take another corpus"
        raise ConfigError(told, "evaluation.probe")
    numbers = np.arange(count * batch).reshape(count, batch)
    inside = ConcatThenSplit().rows(Tokens(np.concatenate(classes), store.starts, None, split), length, "")
    return Labelled(rows.gather(numbers), inside.gather(numbers).tokens)


def _blank(text: str) -> np.ndarray:
    """`[characters]` bool: which are spaces."""
    return np.array([character.isspace() for character in text], bool)


def _tellings(text: str, spans: np.ndarray) -> np.ndarray:
    """`[n]`: the place of the first character of each span `[n, 2]` that is no space, or its first where all are."""
    places = np.where(_blank(text), len(text), np.arange(len(text)))
    following = np.minimum.accumulate(places[::-1])[::-1]
    found = following[spans[:, 0]]
    return np.where(found < spans[:, 1], found, spans[:, 0])
