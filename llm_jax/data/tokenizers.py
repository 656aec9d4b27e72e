"""Tokenizers: a configuration that is fitted to a corpus, or loaded, and what comes of it. Those made here are lossless."""

from __future__ import annotations

import copy
import functools
import io
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from llm_jax.core.config import Config, ConfigError, fingerprint, require, to_json
from llm_jax.core.whole import write_whole
from llm_jax.data import encoding
from llm_jax.data.corpora import Corpus
from llm_jax.data.kinds import kinds
from llm_jax.data.pieces import MARK, character_spans, keeps_text


@dataclass(frozen=True)
class Special:
    """A token that stands for no text. spellings: how published vocabularies have it, the usual one first."""

    spellings: tuple[str, ...]

    @property
    def name(self) -> str:
        """The usual spelling."""
        return self.spellings[0]


class Fitted:
    """A tokenizer ready to use. piece_bytes: the text that each id stands for, b"" for specials; end: the id between documents.

    lossless: whether the pieces of any text, one after another, are that text; where not, bits per byte are off by what is lost.
    unknown: the id of what it has no pieces for, or None. model: the file of SentencePiece that it is, or None; json: the
    `tokenizer.json`. specials: special tokens that were asked for, and their ids.
    """

    lossless = True
    unknown: int | None = None
    model: bytes | None = None
    json: str | None = None
    specials: Mapping[str, int] = {}
    _mark: np.ndarray | None = None  # ids in place of a literal "▁", which would come back as a space
    _cut: encoding.Cut | None = None  # where long texts may be cut without another id

    def __init__(self, piece_bytes: Sequence[bytes], end: int | None, identity: str):
        self.piece_bytes, self.end, self.fingerprint = list(piece_bytes), end, identity

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return len(self.piece_bytes)

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """`[V]` int32: bytes of text that each id stands for; they sum to the text's own length.

        float32 where the tokenizer loses some: the mean over its corpus, so that they sum to about the text's own length.
        """
        return np.array([len(piece) for piece in self.piece_bytes], np.int32)

    @functools.cached_property
    def kinds(self) -> np.ndarray:
        """`[V]` int32: the kind of text that each id stands for, as in `data.kinds`."""
        return kinds(self.piece_bytes)

    def with_specials(self, specials: Sequence[Special]) -> Fitted:
        """The same, knowing an id for each: its own where its vocabulary has it, or else a new one after its last.

        No text becomes a new one, so what is encoded stays what it is, and so does the fingerprint.
        """
        wanted = [special for special in specials if special.name not in self.specials]
        if not wanted:
            return self
        known = {special.name: next((i for i in map(self.id_of, special.spellings) if i is not None), None) for special in wanted}
        new = [name for name, i in known.items() if i is None]
        wider = copy.copy(self)
        for computed in ("byte_lengths", "kinds"):
            wider.__dict__.pop(computed, None)
        wider.piece_bytes = self.piece_bytes + [b""] * len(new)
        found = {name: i for name, i in known.items() if i is not None}
        wider.specials = {**self.specials, **found, **{name: self.vocabulary + k for k, name in enumerate(new)}}
        return wider

    def id_of(self, spelling: str) -> int | None:
        """The id of the special token that its vocabulary spells so, if it has one."""
        return None

    def encode(self, text: str) -> np.ndarray:
        """`[n]` int32 ids."""
        raise NotImplementedError

    def encode_all(self, texts: Iterable[str], *, threads: int = 1) -> Iterator[np.ndarray]:
        """What `encode` gives for each text, in order and sooner; a batch of texts is read ahead, and one more for each thread."""
        return encoding.encode_all(texts, self._parts, self._encoded, threads)

    def _parts(self, text: str) -> Sequence[encoding.Part]:
        """A text in parts that can be encoded one by one, and ids that stand between them; at least one."""
        parts = [text] if self._mark is None else encoding.replaced(text, MARK, self._mark)
        if self._cut is None:
            return parts
        return [one for part in parts for one in (self._cut(part) if isinstance(part, str) else [part])]

    def _encoded(self, texts: Sequence[str]) -> Sequence[np.ndarray]:
        """The ids of each of a batch of parts, in one thread."""
        return [self.encode(text) for text in texts]

    def spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """int32 ids `[n]`, and `[n, 2]` where in the text, in characters, what each stands for begins and ends.

        Pieces of one character all have that character. Raises `ConfigError` for a SentencePiece model that loses something.
        """
        if not self.lossless:
            raise ConfigError("loses where its pieces stand in the text: take its tokenizer.json", "tokenizer")
        ids = self.encode(text)
        return ids, character_spans(text, self.byte_lengths[ids])

    def name_of(self, number: int) -> str:
        """What an id is called that stands for no text."""
        return "<end>" if number == self.end else f"<{number}>"

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.piece_bytes[i] for i in ids).decode("utf-8", "replace")

    def decode_after(self, before: Sequence[int], ids: Sequence[int] | np.ndarray) -> str:
        """The text that ids add to that of those before them; ids that the tokenizer does not know add nothing."""
        known = [int(i) for i in ids if i < self.vocabulary]
        if self.lossless or not before:
            return self.decode(known)
        # some tokenizers drop the space that a text begins with
        begin, whole = self.decode(before), self.decode([*before, *known])
        return whole[len(begin) :] if whole.startswith(begin) else self.decode(known)


def nameless(vocabulary: int) -> Fitted:
    """So many ids that stand for a byte each, whatever byte: for what needs no text."""
    return Fitted([b"\xff"] * vocabulary, None, "nameless")


@dataclass(frozen=True)
class Tokenizer(Config):
    """How text becomes ids."""

    abstract = True

    def fit(self, corpus: Corpus, cache: str | os.PathLike) -> Fitted:
        """The tokenizer made from a corpus, or read from the `cache` folder if it was made before. Raises `ConfigError`."""
        raise NotImplementedError


def trained(config: Tokenizer, corpus: Corpus, cache: str | os.PathLike, suffix: str, train: Callable[[Corpus], bytes]) -> bytes:
    """The file that `train` makes of a corpus, or that it made before: kept in the `cache` folder, whole or not at all."""
    identity = fingerprint([to_json(config), corpus.fingerprint(), repr(corpus)])  # the corpus's settings say what is trained on
    file = pathlib.Path(cache) / "tokenizers" / f"{identity}{suffix}"
    if not file.is_file():
        if next(corpus.documents("train"), None) is None:
            raise ConfigError("has no text in its train split, so no tokenizer can be trained on it", "data.corpus")
        write_whole(file, train(corpus))
    return file.read_bytes()


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

    Trained on the corpus's train split, without normalization, or loaded from a `.model` file where `path` is given. What was
    trained elsewhere may normalize text, put a space before it, or have no bytes to fall back on: then it is not `lossless`.
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
        lines = (line for text in corpus.documents("train") for line in text.splitlines() if line)
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=lines,
                model_writer=model,
                vocab_size=self.vocabulary,
                model_type=self.kind,
                byte_fallback=True,
                normalization_rule_name="identity",
                add_dummy_prefix=False,
                remove_extra_whitespaces=False,
                allow_whitespace_only_pieces=True,
                max_sentence_length=1 << 20,
                num_threads=1,
                input_sentence_size=2_000_000,
                shuffle_input_sentence=False,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ConfigError(
                f"cannot be {self.vocabulary} for this corpus: {str(error).splitlines()[0]}", "tokenizer.vocabulary"
            ) from None
        return model.getvalue()


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
