"""Texts as rows of tokens to be scored, by the rules of lm-evaluation-harness, so that scores compare with its.

    The end of a context that is spaces belongs to what follows it, because tokens begin with their space.
    A continuation's tokens are those of both texts together after as many as the context alone has.
    What stands before an empty context is the token that texts begin with, or else the one that ends them; of a model trained
    here only what its texts began after, which is nothing where documents were masked from each other.
    What does not fit is cut on the left.

Two things differ from its model for transformers: a token that the tokenizer itself puts before a text is never scored, and what
spells a special token is text like any other, but in chats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.data import chat
from llm_jax.data.corpora import StandardLibrary
from llm_jax.data.tokenizer_json import HuggingFace
from llm_jax.infer import decode, forward
from llm_jax.infer.rows import alike, owned
from llm_jax.infer.scoring import Request
from llm_jax.io.huggingface.fields import read_json
from llm_jax.language_model import LM

LENGTH = 2048  # tokens, where a model does not say how many it reads
EMPTY = "is empty, and this model has no token that a text begins with: give it a context"
SAID = ("max_position_embeddings", "n_positions")  # in a config.json of transformers


@dataclass(frozen=True)
class Reader:
    """How texts become requests of a model. length: tokens that it reads at most; template: of chats."""

    lm: LM
    length: int
    template: chat.Template | None = None

    # ── ids ──────────────────────────────────────────────────────────────────────────────────────────────────────────
    def encode(self, text: str) -> list[int]:
        """A text's ids alone. Raises `ConfigError` where the tokenizer does not take it, or is another model's."""
        assert self.lm.tokenizer is not None
        return self.owned(self.lm.tokenizer.encode(text).tolist())

    def owned(self, ids: list[int]) -> list[int]:
        """Ids that come from the tokenizer. Raises `ConfigError` for one that the model does not have."""
        return owned(ids, self.lm.vocabulary, self.lm.source)

    def ids(self, text: str) -> list[int]:
        """The ids of a text, after what its tokenizer puts before one, unless it begins with that."""
        ids, before = self.encode(text), list(self.lm.before)
        return ids if ids[: len(before)] == before else before + ids

    @cached_property
    def prefix(self) -> list[int]:
        """What the first token of a text comes after; empty where there is no such token."""
        ends = [token for token in (self.lm.start, *self.lm.end) if token is not None]
        return self.owned(list(self.lm.before) or ends[:1])

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────
    def pair(self, context: str, continuation: str) -> tuple[Request, bool]:
        """What scores a continuation after its context, and whether the context is cut. Raises `ConfigError`."""
        spaces = len(context) - len(context.rstrip())
        continuation = context[len(context) - spaces :] + continuation
        context = context[: len(context) - spaces]
        read: list[int] = []
        if self.lm.config.encodes:
            row, first, read = self._answer(context, continuation)
        else:
            row, first = self._joined(context, continuation)
        scored = len(row) - first
        if scored > self.length:
            raise ConfigError(f"has {scored} tokens to be scored, and the model reads {self.length}", repr(continuation[:40]))
        kept = row[-(self.length + 1) :]
        return Request(kept, len(kept) - scored, read[-self.length :]), len(kept) < len(row) or len(read) > self.length

    def _joined(self, context: str, continuation: str) -> tuple[list[int], int]:
        """The ids of both, and the place of the first that is scored: after as many as the context alone has, as in the harness.

        `LM.loglikelihood` takes the ids of both together, from the first that differs from the context's on; that is done here
        only where nothing is left to be scored otherwise.
        """
        known = self.ids(context) if context else self.prefix
        if not known:
            raise ConfigError(EMPTY, "a context")
        if not context:
            return [*known, *self.encode(continuation)], len(known)
        whole = self.ids(context + continuation)
        row = [*known, *whole[len(known) :]]
        if len(row) > len(known) or not continuation:
            return row, len(known)
        # together they have no more tokens than the context alone: what has changed is scored
        same = alike(known, whole)
        return (whole, same) if same else (self.prefix + whole, max(len(self.prefix), 1))

    def _answer(self, context: str, continuation: str) -> tuple[list[int], int, list[int]]:
        """The same of an encoder-decoder, and what its encoder reads: the context."""
        read = [*(self.ids(context) if context else self.prefix), *self.lm.after]
        if not read:
            raise ConfigError(EMPTY, "a context")
        start = read[-1] if self.lm.start is None else self.lm.start
        return [start, *self.encode(continuation)], 1, read

    def windows(self, ids: Sequence[int] | np.ndarray, context: int = 1) -> Iterator[Request]:
        """A long text's ids, each scored once, after at least `context` others where there are as many, and never over `length`.

        The first window begins with the text; each later one is as long as the model reads, and its last `length` - `context` + 1
        tokens are new. The very first token is scored where there is one to stand before it.
        """
        ids, before = list(ids), self.prefix[-1:]
        row = [*before, *ids]
        stop = min(self.length + 1, len(row))
        if stop > 1:
            yield Request(row[:stop], 1)
        while stop < len(row):
            new = min(self.length - context + 1, len(row) - stop)
            stop += new
            yield Request(row[stop - self.length - 1 : stop], self.length + 1 - new)

    def prompt(self, context: str, new: int) -> tuple[list[int], bool]:
        """A context's ids that leave room for so many new ones, and whether it is cut. Raises `ConfigError`."""
        room = self.length if self.lm.config.encodes else self.length - new
        if room < 1:
            raise ConfigError(
                f"is {new}, which leaves no room for a context in the {self.length} tokens that are read", "max_tokens"
            )
        ids = self.ids(context) if context else self.prefix
        ids = [*ids, *self.lm.after] if self.lm.config.encodes else ids
        if not ids:
            raise ConfigError(EMPTY, "a context")
        return ids[-room:], len(ids) > room

    def chat(self, messages: chat.Messages, *, answering: bool = True) -> str:
        """Messages as the model's template writes them. answering: up to where an answer begins; else the last goes on."""
        if self.template is None:
            raise ConfigError(f"has no chat template: {self.lm.source} was not made for chats", "the model")
        return chat.render(self.template, messages, add_generation_prompt=answering, continue_final_message=not answering).text


def longest(lm: LM) -> int:
    """Tokens that a model reads: as many as it was trained on here, or has positions for, or as its config.json says."""
    if lm.trial is not None:
        return lm.trial.experiment.data.sequence_length
    known = forward.longest(lm.config.final)
    if known is not None:
        return known
    told = read_json(lm.folder / "config.json") if lm.folder is not None else {}
    told = told.get("text_config", told)
    return next((told[name] for name in SAID if isinstance(told.get(name), int)), LENGTH)


def reader(lm: LM, length: int | None = None, *, chats: bool = False) -> Reader:
    """Of a model with a tokenizer; length: None for what `longest` says. Raises `ConfigError` for a model that cannot be scored."""
    arm = "" if lm.trial is None else f" (this is the arm {lm.trial.result['arm']!r}: --arm names another)"
    decode.check(lm.config, decode.SCORES_NONE + arm)
    source = lm.source or "the model"
    if lm.tokenizer is None:
        raise ConfigError(f"has no tokenizer, and what is scored are texts: {lm.untold or 'put its files beside it'}", source)
    most, length = forward.longest(lm.config.final), longest(lm) if length is None else length
    if length < 1:
        raise ConfigError(f"must be >= 1, got {length}", "length")
    if most is not None and length > most:
        raise ConfigError(f"is {length}, but the model has learned only {most} positions: ask for as many or fewer", "length")
    plain = Reader(lm, length)
    plain.owned([*plain.prefix, *lm.after])
    if not chats:
        return plain
    if lm.folder is None:
        raise ConfigError("has no chat template: what is trained here has none", source)
    return Reader(_with_specials(lm), length, chat.load(lm.folder))


def _with_specials(lm: LM) -> LM:
    """The model with a tokenizer that takes the special tokens of a template for such."""
    assert lm.folder is not None
    if not (lm.folder / "tokenizer.json").is_file():
        raise ConfigError("has no tokenizer.json, whose special tokens a chat template needs", lm.source)
    return replace(lm, tokenizer=HuggingFace(path=str(lm.folder), specials=True).fit(StandardLibrary(), lm.folder))
