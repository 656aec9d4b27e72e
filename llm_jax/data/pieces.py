"""What the ids of a tokenizer's file stand for, byte by byte and place by place, and whether text survives the way to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from llm_jax.data.corpora import Corpus

MARK = "\u2581"  # SentencePiece's stand-in for a space


def pieces(data: dict[str, Any], ids: dict[str, int]) -> tuple[list[bytes], bool]:
    """What each id stands for, and whether nothing gets lost on the way to ids while special tokens are text like any other."""
    model, added = data["model"], {token["content"]: token for token in data.get("added_tokens", ())}
    before = [*_steps(data.get("normalizer")), *_steps(data.get("pre_tokenizer"))]
    prefix, suffix = (model.get(name) or "" for name in ("continuing_subword_prefix", "end_of_word_suffix"))
    bare = lambda piece: piece.removeprefix(prefix).removesuffix(suffix)  # noqa: E731
    in_bytes = any(step["type"] == "ByteLevel" for step in (*before, *_steps(data.get("decoder"))))
    if in_bytes:
        characters = byte_characters()
        read = lambda piece: b"".join(characters.get(c) or c.encode() for c in bare(piece))  # noqa: E731
        whole = characters.keys() <= ids.keys()
    elif model["type"] == "WordPiece":
        read, whole = lambda piece: (bare(piece) if piece.startswith(prefix) else f" {piece}").encode(), False
    else:
        by_byte = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}
        read = lambda piece: by_byte.get(piece) or bare(piece).replace(MARK, " ").encode()  # noqa: E731
        whole = bool(model.get("byte_fallback")) and by_byte.keys() <= ids.keys()
    found = [b""] * (max(ids.values()) + 1)
    for piece, i in ids.items():
        token = added.get(piece)
        found[i] = read(piece) if token is None else b"" if token["special"] else piece.encode()
    kept = [token for token in added.values() if not token["special"]]
    whole = whole and not (prefix or suffix) and not any(token["lstrip"] or token["rstrip"] for token in kept)
    return found, whole and all(_keeps(step) for step in before)


def parts_at_words(data: dict[str, Any]) -> bool:
    """Whether a `tokenizer.json` gives the same ids where a text is cut after a word, before a space or line end.

    So it is where BERT's or GPT-2's words are looked at one by one and special tokens are text.
    """
    normalizers, cutters = [*_steps(data.get("normalizer"))], [*_steps(data.get("pre_tokenizer"))]
    if len(cutters) != 1 or not all(token["special"] for token in data.get("added_tokens", ())):
        return False
    match cutters[0]:
        case {"type": "BertPreTokenizer"}:
            return all(step["type"] == "BertNormalizer" for step in normalizers)
        case {"type": "ByteLevel", "add_prefix_space": False}:
            return cutters[0].get("use_regex", True) and not normalizers
    return False


def _steps(part: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The parts of a normalizer, pre-tokenizer or decoder, one by one."""
    inner = (part or {}).get("normalizers") or (part or {}).get("pretokenizers") or (part or {}).get("decoders")
    if inner is not None:
        for one in inner:
            yield from _steps(one)
    elif part:
        yield part


def _keeps(step: dict[str, Any]) -> bool:
    """Whether a step leaves the text as it is, but for spaces that become "▁"."""
    match step:
        case {"type": "ByteLevel"}:
            return not step.get("add_prefix_space")
        case {"type": "Metaspace"}:
            return step.get("prepend_scheme", "always") == "never" and step.get("replacement") == MARK
        case {"type": "Replace", "pattern": {"String": " "}, "content": content}:
            return content == MARK
        case {"type": "Split"}:
            return step.get("behavior") != "Removed"
        case {"type": "Digits" | "Punctuation"}:
            return step.get("behavior") != "Removed"
    return False


def byte_characters() -> dict[str, bytes]:
    """The byte that each printable character stands for in byte-level vocabularies (Radford et al. 2019)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): bytes([b]) for b in printable} | {chr(256 + i): bytes([b]) for i, b in enumerate(others)}


def keeps_text(model: bytes) -> tuple[bool, bool]:
    """Whether a file of SentencePiece leaves text as it is, and then whether ids stay what they are where it is cut at a line end.

    The former where nothing is normalized or added and bytes stand for what is unseen; the latter where only pairs are joined, and
    no piece has a line end inside. A unigram model adds up what comes before, and rounds.
    """
    from sentencepiece import sentencepiece_model_pb2 as proto

    read = proto.ModelProto.FromString(model)
    does = read.normalizer_spec
    changes = does.add_dummy_prefix or does.remove_extra_whitespaces or does.precompiled_charsmap or not does.escape_whitespaces
    in_bytes = sum(piece.type == proto.ModelProto.SentencePiece.BYTE for piece in read.pieces) == 256
    pairs = read.trainer_spec.model_type == proto.TrainerSpec.BPE
    lines = pairs and not any("\n" in piece.piece and len(piece.piece) > 1 for piece in read.pieces)
    return not changes and in_bytes, lines


# ── where pieces stand ───────────────────────────────────────────────────────────────────────────────────────────────
MEASURED = 2_000_000  # characters: more moves the mean of a common piece by less than it differs between two splits


def character_spans(text: str, lengths: np.ndarray) -> np.ndarray:
    """`[n, 2]` int64: begin and end, in characters of the text, of pieces of so many bytes that follow one another."""
    ends = np.cumsum(lengths, dtype=np.int64)
    first = _byte_places(text)
    begins = np.searchsorted(first, ends - lengths, side="right") - 1
    return np.stack([begins, np.maximum(np.searchsorted(first, ends, side="left"), begins)], 1)


def measured_lengths(spans: Callable[[str], tuple[np.ndarray, np.ndarray]], spelt: np.ndarray, corpus: Corpus) -> np.ndarray:
    """`[V]` float32: mean bytes of the train split that an id stands for; `spelt` for ids that do not occur in it.

    To a piece belongs what lies between it and the one before, and to the last one the rest of its document: on the text that is
    looked at, the first 2 million characters, lengths sum to that of the text.
    """
    counts, bytes_, room = np.zeros(len(spelt)), np.zeros(len(spelt)), MEASURED
    for text in corpus.documents("train"):
        ids, places = spans(text[:room])
        if len(ids):
            ends = np.maximum.accumulate(places[:, 1])
            ends[-1] = len(text[:room])
            counts += np.bincount(ids, minlength=len(spelt))
            bytes_ += np.bincount(ids, np.diff(_byte_places(text)[ends], prepend=0), minlength=len(spelt))
        room -= len(text)
        if room <= 0:
            break
    return np.where(counts > 0, bytes_ / np.maximum(counts, 1), spelt).astype(np.float32)


def _byte_places(text: str) -> np.ndarray:
    """`[len(text) + 1]`: the byte that each character of UTF-8 begins at, and the number of bytes."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    wide = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate([[0], np.cumsum(wide)])
