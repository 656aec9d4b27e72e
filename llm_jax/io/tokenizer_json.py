"""A tokenizer as files: a `tokenizer.json`, which the library `tokenizers` and transformers read, or a model of SentencePiece."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.core.whole import write_whole
from llm_jax.data.pieces import MARK, byte_characters
from llm_jax.data.tokenizers import Fitted

END = "<|endoftext|>"  # how the id between documents is spelt where it has no spelling yet
MODEL = "tokenizer.model"


def save(tokenizer: Fitted, path: str | os.PathLike) -> list[pathlib.Path]:
    """Writes a `.model` file, which `SentencePiece(path=)` loads, or a folder, which `HuggingFace(path=)` does; returns its files.

    Raises `ConfigError` for a `.model` that is not SentencePiece's, and where there are such files already.
    """
    place = new_place(path)
    is_file = place.suffix == ".model"
    if is_file and tokenizer.model is None:
        raise ConfigError("can only be written by SentencePiece: name a folder", str(path))
    (place.parent if is_file else place).mkdir(parents=True, exist_ok=True)
    if is_file:
        assert tokenizer.model is not None
        write_whole(place, tokenizer.model)
        return [place]
    files = write(tokenizer, place)
    if tokenizer.model is not None and place / MODEL not in files:
        write_whole(place / MODEL, tokenizer.model)
        files.append(place / MODEL)
    return files


def new_place(path: str | os.PathLike) -> pathlib.Path:
    """Where `save` writes to. Raises `ConfigError` for a file that is no `.model`, and where there is a tokenizer already."""
    place = pathlib.Path(path).expanduser()
    if place.suffix == ".json":
        raise ConfigError("is a file, and tokenizer.json has files beside it: name a folder", str(path))
    there = [file for file in ([place] if place.suffix == ".model" else [place / "tokenizer.json", place / MODEL]) if file.exists()]
    if there:
        raise ConfigError("is there already: name another place", str(there[0]))
    return place


def write(tokenizer: Fitted, folder: pathlib.Path) -> list[pathlib.Path]:
    """The files that say what the tokenizer does, written into the folder; none where they cannot say it."""
    described = describe(tokenizer)
    if described is None:
        return _model_alone(tokenizer, folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    end = {} if tokenizer.end is None else {"eos_token": _spelling(described, tokenizer.end)}
    contents = {
        "tokenizer.json": json.dumps(described, ensure_ascii=False),
        "tokenizer_config.json": json.dumps(config | end),
    }
    for name, text in contents.items():
        write_whole(folder / name, text)
    return [folder / name for name in contents]


def _model_alone(tokenizer: Fitted, folder: pathlib.Path) -> list[pathlib.Path]:
    """A model of SentencePiece that changes text in ways which tokenizer.json has other words for, with nothing around a text."""
    if tokenizer.model is None:
        return []
    write_whole(folder / MODEL, tokenizer.model)
    write_whole(folder / "tokenizer_config.json", json.dumps({"add_bos_token": False, "add_eos_token": False}))
    return [folder / MODEL, folder / "tokenizer_config.json"]


def _spelling(described: dict[str, Any], number: int) -> str:
    vocabulary = described["model"]["vocab"]
    spelt = vocabulary.items() if isinstance(vocabulary, dict) else ((piece, i) for i, (piece, _) in enumerate(vocabulary))
    added = {token["id"]: token["content"] for token in described["added_tokens"]}
    return added.get(number) or next(piece for piece, i in spelt if i == number)


def describe(tokenizer: Fitted) -> dict[str, Any] | None:
    """The object of a `tokenizer.json`, or None where the format has no words for it."""
    pieces = tokenizer.piece_bytes
    if tokenizer.json is not None:
        return json.loads(tokenizer.json)
    if tokenizer.model is not None:
        return _sentencepiece(tokenizer.model) if tokenizer.lossless else None
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
