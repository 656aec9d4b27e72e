"""The tokenizers made here, all lossless, and SentencePiece's files; what they have in common is in `tokenizer`."""

from __future__ import annotations

import io
import pathlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llm_jax.core.config import ConfigError, fingerprint, require
from llm_jax.data import encoding
from llm_jax.data.corpora import Corpus
from llm_jax.data.pieces import MARK, keeps_text
from llm_jax.data.tokenizer import Fitted, Special, Tokenizer, nameless, trained

__all__ = ["Bytes", "Characters", "Fitted", "SentencePiece", "Special", "Tokenizer", "nameless"]

LINES, LONGEST = 2_000_000, 1 << 20  # that the library is trained on, and bytes of one; more than these it would leave out


@dataclass(frozen=True)
class Bytes(Tokenizer):
    """UTF-8 bytes, and one id for the end of a document. Xue et al. 2022 (ByT5)."""

    def fit(self, corpus, cache):
        return _Bytes([bytes([i]) for i in range(256)] + [b""], 256, "bytes")


class _Bytes(Fitted):
    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32)


@dataclass(frozen=True)
class Characters(Tokenizer):
    """The characters that occur in the corpus, in code-point order, and no end of document: nanoGPT's "character level"."""

    def fit(self, corpus, cache):
        found = sorted({c for _, text in corpus.named() for c in set(text)})
        return _Characters(found)


class _Characters(Fitted):
    def __init__(self, characters: list[str]):
        super().__init__([c.encode("utf-8") for c in characters], None, fingerprint(["characters", *characters]))
        self._points = np.array([ord(c) for c in characters], np.uint32)

    def encode(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        ids = np.minimum(np.searchsorted(self._points, points), len(self._points) - 1)
        unknown = np.flatnonzero(self._points[ids] != points)
        if len(unknown):
            raise ConfigError(
                f"does not know the character {text[unknown[0]]!r}: its corpus has only {self.vocabulary} others", "tokenizer"
            )
        return ids.astype(np.int32)


@dataclass(frozen=True)
class SentencePiece(Tokenizer):
    """Subwords: byte-pair encoding (Sennrich et al. 2016) or a unigram model (Kudo 2018), with bytes for what is unseen.

    Trained on the lines of the corpus's train split, without normalization, or loaded from a `.model` file where `path` is given.
    Of more than 2 million lines, which the library would hold in memory, so many are taken at even distances from first to last;
    lines of more than 1 MiB are cut. What was trained elsewhere may normalize text, put a space before it, or have no bytes to
    fall back on: then it is not `lossless`.
    """

    vocabulary: int = 4096
    kind: Literal["bpe", "unigram"] = "bpe"
    path: str | None = None

    def validate(self):
        require(self.vocabulary > 260, "vocabulary", f"must be > 260 (256 bytes and the specials), got {self.vocabulary}")

    def fit(self, corpus, cache):
        if self.path is not None:
            file = pathlib.Path(self.path).expanduser()
            require(file.is_file(), "tokenizer.path", f"is no file: {self.path!r}")
            try:
                return _SentencePiece(file.read_bytes())
            except RuntimeError:
                raise ConfigError(f"is no SentencePiece model: {self.path!r}", "tokenizer.path") from None
        return _SentencePiece(trained(self, corpus, cache, ".model", self._train))

    def _train(self, corpus: Corpus) -> bytes:
        import sentencepiece

        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=_sample(corpus),
                model_writer=model,
                vocab_size=self.vocabulary,
                model_type=self.kind,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=LONGEST,
                num_threads=1,
                input_sentence_size=LINES,
                shuffle_input_sentence=False,
                minloglevel=2,
            )
        except RuntimeError as error:
            if "KeyboardInterrupt" in str(error):  # of its reader of lines
                raise KeyboardInterrupt from None
            told = f"cannot be {self.vocabulary} for this corpus: {_why_not(str(error))}"
            raise ConfigError(told, "tokenizer.vocabulary") from None
        return model.getvalue()


def _why_not(error: str) -> str:
    """What the library says of a vocabulary's size, in a person's words."""
    most, least = re.search(r"value <= (\d+)", error), re.search(r"required_chars\. \d+ vs (\d+)", error)
    if most:
        return f"it has no more than {most[1]} pieces, take that"
    return f"its single characters are {least[1]} already" if least else error.splitlines()[0]


def _sample(corpus: Corpus) -> Iterator[str]:
    """`LINES` of the train split's lines at even distances, or all if they are fewer; the corpus is read twice, one to count."""
    count = sum(1 for _ in _lines(corpus))
    return (line for number, line in enumerate(_lines(corpus)) if number * LINES % count < LINES)


def _lines(corpus: Corpus) -> Iterator[str]:
    for text in corpus.documents("train"):
        for line in text.splitlines():
            if len(line) <= LONGEST // 4 or len(line.encode()) <= LONGEST:  # a character takes 4 bytes at most
                yield from [line] if line else []
            else:
                yield from (line[at : at + LONGEST // 4] for at in range(0, len(line), LONGEST // 4))


class _SentencePiece(Fitted):
    def __init__(self, model: bytes):
        import sentencepiece

        self.model = model
        self._processor = p = sentencepiece.SentencePieceProcessor(model_proto=model)
        super().__init__(
            [self._bytes_of(i) for i in range(p.get_piece_size())],
            p.eos_id() if p.eos_id() >= 0 else None,
            fingerprint([model.hex()]),
        )
        self.unknown = p.unk_id()
        self.lossless, lines = keeps_text(model)
        if self.lossless:
            self._mark = np.array([p.piece_to_id(f"<0x{b:02X}>") for b in MARK.encode()], np.int32)
            self._cut = encoding.Cut(encoding.AT_LINES, 1 << 11) if lines else None  # byte pairs are 1.2 times as quick as at 2¹⁶

    def _bytes_of(self, i: int) -> bytes:
        p = self._processor
        if p.is_byte(i):
            return bytes([int(p.id_to_piece(i)[3:5], 16)])
        return b"" if p.is_control(i) or p.is_unknown(i) or p.is_unused(i) else p.id_to_piece(i).replace(MARK, " ").encode("utf-8")

    def id_of(self, spelling):
        i = self._processor.piece_to_id(spelling)
        return i if self._processor.id_to_piece(i) == spelling and not self._processor.is_unknown(i) else None

    def encode(self, text: str) -> np.ndarray:
        return next(self.encode_all([text]))

    def _encoded(self, texts):
        if len(texts) == 1:  # a list has a thread started for it
            return [np.array(self._processor.encode(texts[0]), np.int32)]
        return [np.array(ids, np.int32) for ids in self._processor.encode(texts, num_threads=1)]

    def name_of(self, number: int) -> str:
        return self._processor.id_to_piece(number)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return super().decode(ids) if self.lossless else self._processor.decode([int(i) for i in ids])
