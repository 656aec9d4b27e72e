"""Tokenizers that a `tokenizer.json` describes: any that is loaded, and WordPiece and byte-level BPE, trained here."""

from __future__ import annotations

import functools
import json
import os
import pathlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llm_jax.core.config import ConfigError, fingerprint, require
from llm_jax.data import encoding
from llm_jax.data.corpora import Corpus
from llm_jax.data.pieces import MARK, measured_lengths, parts_at_words, pieces
from llm_jax.data.tokenizer import Fitted, Tokenizer, trained

END = "<|endoftext|>"
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class FromJson(Fitted):
    """What a `tokenizer.json` describes, through the library `tokenizers`. corpus: whose text lengths are measured on."""

    def __init__(self, text: str, *, specials: bool = False, end: int | None = None, corpus: Corpus | None = None):
        import tokenizers

        # threads are ours: the library's are as many as cores in each of several processes, and warn at every fork
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        described = json.loads(text)
        if described["model"].get("dropout"):  # of merges, while a model is trained: the same text would have other ids every time
            described["model"]["dropout"] = None
            text = json.dumps(described, ensure_ascii=False)
        self.json, self._corpus, self._tokenizer = text, corpus, tokenizers.Tokenizer.from_str(text)
        self._tokenizer.encode_special_tokens = not specials
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        found, self._exact = pieces(described, self._tokenizer.get_vocab())
        self.lossless = self._exact and not specials
        unknown = described["model"].get("unk_token")
        self.unknown = described["model"].get("unk_id") if unknown is None else self._tokenizer.token_to_id(unknown)
        super().__init__(found, end, fingerprint([text, specials]))
        mark = [self._tokenizer.token_to_id(f"<0x{b:02X}>") for b in MARK.encode()]
        self._mark = np.array(mark, np.int32) if self.lossless and None not in mark else None
        self._cut = encoding.Cut(encoding.AFTER_WORDS, 1 << 15) if not specials and parts_at_words(described) else None

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        known = super().byte_lengths
        return known if self._exact or self._corpus is None else measured_lengths(self.spans, known, self._corpus)

    def encode(self, text: str) -> np.ndarray:
        return next(self.encode_all([text]))

    def _encoded(self, texts):
        found = (one.ids for one in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))
        return [np.fromiter(ids, np.int32, len(ids)) for ids in found]

    def spans(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        if self.lossless:
            return super().spans(text)
        found = self._tokenizer.encode(text, add_special_tokens=False)
        return np.array(found.ids, np.int32), np.array(found.offsets, np.int64).reshape(-1, 2)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        if self.lossless:
            return super().decode(ids)
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def name_of(self, number: int) -> str:
        return self._tokenizer.id_to_token(number) or super().name_of(number)

    def id_of(self, spelling):
        return self._tokenizer.token_to_id(spelling)


# ── loaded ───────────────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class HuggingFace(Tokenizer):
    """A `tokenizer.json`, as the library `tokenizers` writes it and models of transformers come with; path: the file or its folder.

    specials: text that spells a special token, such as "<|endoftext|>", is taken for it; otherwise it is text like any other.
    """

    path: str = ""
    specials: bool = False

    def fit(self, corpus, cache):
        path = pathlib.Path(self.path).expanduser()
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            model = next((path / name for name in ("tokenizer.model", "spiece.model") if (path / name).is_file()), None)
            way_out = f": take SentencePiece(path={str(model)!r})" if model else ""
            raise ConfigError(f"has no tokenizer.json: {self.path!r}{way_out}", "tokenizer.path")
        return _HuggingFace(file, self.specials, corpus)


class _HuggingFace(FromJson):
    def __init__(self, file: pathlib.Path, specials: bool, corpus: Corpus):
        text = file.read_text("utf-8")
        try:
            super().__init__(text, specials=specials, corpus=corpus)
        except Exception as error:  # the library has no class of its own for it
            raise ConfigError(f"is no tokenizer.json ({error}): {str(file)!r}", "tokenizer.path") from None
        self.end = self._end(file.parent)
        self.fingerprint = fingerprint([self.json, specials, self.end])

    def _end(self, folder: pathlib.Path) -> int | None:
        """The id of the end of a text, by the files beside it."""
        for name in ("tokenizer_config.json", "generation_config.json", "config.json"):
            values = json.loads((folder / name).read_text("utf-8")) if (folder / name).is_file() else {}
            token, number = values.get("eos_token"), values.get("eos_token_id")
            token = token["content"] if isinstance(token, dict) else token
            found = self.id_of(token) if token else number[0] if isinstance(number, list) else number
            if found is not None:
                return found
        return None


# ── trained here ─────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class ByteLevelBPE(Tokenizer):
    """Byte-pair encoding over the bytes of words, as GPT-2 has it (Radford et al. 2019): lossless, and nothing is unknown.

    Trained on the corpus's train split. vocabulary: ids, with the 256 bytes and the end of a document.
    """

    vocabulary: int = 4096

    def validate(self):
        require(self.vocabulary > 257, "vocabulary", f"must be > 257 (256 bytes and the end), got {self.vocabulary}")

    def fit(self, corpus, cache):
        text = trained(self, corpus, cache, ".json", self._train).decode("utf-8")
        return _ByteLevelBPE(text, end=0, corpus=corpus)

    def _train(self, corpus: Corpus) -> bytes:
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers, trainers

        tokenizer = Library(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocabulary, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(corpus.documents("train"), trainer)
        _require_size(tokenizer.get_vocab_size(), self.vocabulary)
        return tokenizer.to_str().encode("utf-8")


class _ByteLevelBPE(FromJson):
    pass


@dataclass(frozen=True)
class WordPiece(Tokenizer):
    """Longest known pieces of words, from the left (Wu et al. 2016), in words as BERT cuts them (Devlin et al. 2019).

    By design it is not lossless: spaces, line ends and control characters only part words, `lowercase` also drops accents, and a
    word with a character unseen in training, or of more than 100, is one [UNK]. Bytes per id are therefore means over the corpus.
    Trained on the corpus's train split; [SEP] stands between documents. vocabulary: ids, with the five specials.
    """

    vocabulary: int = 4096
    lowercase: bool = False

    def validate(self):
        require(self.vocabulary > 5, "vocabulary", f"must be > 5 (the specials), got {self.vocabulary}")

    def fit(self, corpus, cache):
        text = trained(self, corpus, cache, ".json", self._train).decode("utf-8")
        return _WordPiece(text, end=SPECIALS.index("[SEP]"), corpus=corpus)

    def described(self, pieces: Sequence[str]) -> Any:
        """The library's tokenizer with these pieces, whose places are their ids."""
        from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
        from tokenizers import Tokenizer as Library

        tokenizer = Library(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=self.lowercase)
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
        tokenizer.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in SPECIALS if name in pieces])
        return tokenizer

    def _train(self, corpus: Corpus) -> bytes:
        from tokenizers import trainers

        tokenizer = self.described(SPECIALS)
        inside = _inner_characters(tokenizer, corpus)
        # the library numbers what it has not seen in the order of a hash map, and ties go by number: so all have one beforehand
        numbered = [*SPECIALS, *(f"##{c}" for c in inside)]
        trainer = trainers.WordPieceTrainer(vocab_size=self.vocabulary, special_tokens=numbered, show_progress=False)
        tokenizer.train_from_iterator(corpus.documents("train"), trainer)
        ids = tokenizer.get_vocab()
        _require_size(len(ids), self.vocabulary)
        return self.described(sorted(ids, key=ids.__getitem__)).to_str().encode("utf-8")


class _WordPiece(FromJson):
    pass


def _inner_characters(tokenizer: Any, corpus: Corpus) -> list[str]:
    """The characters that stand in a word of the train split after its first, in code-point order."""
    found: set[str] = set()
    for text in corpus.documents("train"):
        different = " ".join(set(text.replace("\n", " ").split(" ")))  # nothing reaches over these two, and most come again
        words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(different))
        found.update(*{word[1:] for word, _ in words})
    return sorted(found)


def _require_size(found: int, wanted: int) -> None:
    why = f"its single characters are {found} already" if found > wanted else f"it has no more than {found} pieces, take that"
    require(found == wanted, "tokenizer.vocabulary", f"cannot be {wanted} for this corpus: {why}")
