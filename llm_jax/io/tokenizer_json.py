"""A tokenizer made here as a `tokenizer.json`, which the library `tokenizers` and transformers read."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Sequence
from typing import Any

from llm_jax.data.pieces import MARK, byte_characters
from llm_jax.data.tokenizers import Fitted

END = "<|endoftext|>"  # how the id between documents is spelt where it has no spelling yet


def write(tokenizer: Fitted, folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that say what the tokenizer does, written into the folder; none where they cannot say it."""
    described = describe(tokenizer)
    if described is None:
        return []
    special = {token["id"]: token["content"] for token in described["added_tokens"]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    contents = {
        "tokenizer.json": json.dumps(described, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config | ({} if tokenizer.end is None else {"eos_token": special[tokenizer.end]})),
    }
    for name, text in contents.items():
        (folder / name).write_text(text, "utf-8")
    return [folder / name for name in contents]


def describe(tokenizer: Fitted) -> dict[str, Any] | None:
    """The object of a `tokenizer.json`, or None where the format has no words for it."""
    pieces = tokenizer.piece_bytes
    if tokenizer.model is not None:
        return _sentencepiece(tokenizer.model)
    specials = [(i, END) for i, piece in enumerate(pieces) if piece == b"" and i == tokenizer.end]
    specials += [(i, text) for text, i in tokenizer.specials.items()]
    if pieces[:256] == [bytes([b]) for b in range(256)] and len(pieces) == 256 + len(specials):
        spelling = {raw: char for char, raw in byte_characters().items()}
        vocabulary = {spelling[piece]: i for i, piece in enumerate(pieces[:256])} | {text: i for i, text in specials}
        level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
        return _whole(_bpe(vocabulary, []), specials, pre_tokenizer=level, decoder=level)
    spelt = dict(specials)
    characters = [spelt.get(i, piece.decode("utf-8", "replace")) for i, piece in enumerate(pieces)]
    if all(len(c) == 1 or i in spelt for i, c in enumerate(characters)):
        return _whole(_bpe({c: i for i, c in enumerate(characters)}, []), specials, decoder={"type": "Fuse"})
    return None


def _whole(model: dict[str, Any], specials: Sequence[tuple[int, str]], **parts: Any) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    steps = dict.fromkeys(("normalizer", "pre_tokenizer", "post_processor", "decoder"))
    added = [{"id": i, "content": text} | flags for i, text in specials]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added} | steps | parts | {"model": model}


def _bpe(vocabulary: dict[str, int], merges: list[list[str]], **more: Any) -> dict[str, Any]:
    return {"type": "BPE", "dropout": None, "unk_token": None, "vocab": vocabulary, "merges": merges} | more


def _sentencepiece(model: bytes) -> dict[str, Any]:
    """Of a model with byte fallback and without normalization, as those trained here are."""
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as proto

    p = sentencepiece.SentencePieceProcessor(model_proto=model)
    specials = [(i, p.id_to_piece(i)) for i in range(p.get_piece_size()) if p.is_control(i) or p.is_unknown(i)]
    scored = [(p.id_to_piece(i), p.get_score(i)) for i in range(p.get_piece_size())]
    unknown = p.id_to_piece(p.unk_id())
    trainer = proto.ModelProto.FromString(model).trainer_spec
    if trainer.model_type == trainer.BPE:
        made_of = _bpe(
            {piece: i for i, (piece, _) in enumerate(scored)},
            _merges(p),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=False,
        )
    else:
        made_of = {"type": "Unigram", "unk_id": p.unk_id(), "vocab": [list(pair) for pair in scored], "byte_fallback": True}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    back = [{"type": "Replace", "pattern": {"String": MARK}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    return _whole(made_of, specials, normalizer=spaces, decoder={"type": "Sequence", "decoders": back})


def _merges(p: Any) -> list[list[str]]:
    """Pairs of pieces that make a third one, in the order in which they are joined: by the score of what they make."""
    plain = [i for i in range(p.get_piece_size()) if not (p.is_control(i) or p.is_unknown(i) or p.is_byte(i) or p.is_unused(i))]
    ids = {p.id_to_piece(i): i for i in plain}
    found = []
    for piece, i in ids.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                found.append((-p.get_score(i), ids[left], ids[right], [left, right]))
    return [pair for *_, pair in sorted(found)]
