"""Tokenizers that come without a tokenizer.json: `vocab.json` and `merges.txt`, `vocab.txt`, or a SentencePiece model alone.

How text is cut into words and what stands around it follows from the class in `tokenizer_config.json`, or else from the family.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers import Fitted
from llm_jax.io.huggingface.fields import read_json

CLASSES = {"gpt2": "GPT2Tokenizer", "qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer"} | {
    "bert": "BertTokenizer",
    "t5": "T5Tokenizer",
}
# how Qwen2Tokenizer cuts text into words
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
END = "<|endoftext|>"
NAMES = {
    "GPT2Tokenizer": {"unk_token": END, "bos_token": END, "eos_token": END},
    "Qwen2Tokenizer": {"unk_token": END, "eos_token": END, "pad_token": END},
    "BertTokenizer": {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")},
    "T5Tokenizer": {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
}


def describe(folder: pathlib.Path) -> str | None:
    """The tokenizer.json that the folder's vocabulary means; None where it has none. Raises `ConfigError`."""
    pairs, words = folder / "vocab.json", folder / "vocab.txt"
    if not pairs.is_file() and not words.is_file():
        return None
    settings = _settings(folder)
    builder = {"GPT2Tokenizer": _bytes, "Qwen2Tokenizer": _bytes, "BertTokenizer": _words}.get(settings["tokenizer_class"])
    present = {_bytes: pairs.is_file() and (folder / "merges.txt").is_file(), _words: words.is_file()}
    if builder is None or not present[builder]:
        file = pairs.name if pairs.is_file() else words.name
        way_out = "write one with `AutoTokenizer.from_pretrained(folder).save_pretrained(folder)` of transformers"
        raise ConfigError(f"has the {file} of a {settings['tokenizer_class']} and no tokenizer.json: {way_out}", str(folder))
    tokenizer = builder(folder, settings)
    _add(tokenizer, folder, settings)
    return tokenizer.to_str()


def around(folder: pathlib.Path, tokenizer: Fitted) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What stands before and after a text of a SentencePiece model, as its class has it."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model)
    ids = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    settings = _settings(folder)
    is_t5 = settings["tokenizer_class"] == "T5Tokenizer"
    usual = [next((name for name in names if name in ids), None) for names in (("<s>", "<bos>"), ("</s>", "<eos>"))]
    found = [settings.get(name) or piece for name, piece in zip(("bos_token", "eos_token"), usual, strict=True)]
    by_class = [name in ids and is_put for name, is_put in zip(found, (not is_t5, is_t5), strict=True)]
    put = [settings.get(f"add_{name}_token", default) for name, default in zip(("bos", "eos"), by_class, strict=True)]
    absent = [name for name, is_put in zip(found, put, strict=True) if is_put and name not in ids]
    if absent:
        raise ConfigError(f"puts {absent[0]!r} around a text, which its SentencePiece model lacks", str(folder))
    before, after = ((ids[name],) if is_put else () for name, is_put in zip(found, put, strict=True))
    return before, after


def _settings(folder: pathlib.Path) -> dict[str, Any]:
    """The keys of tokenizer_config.json and special_tokens_map.json, with tokens as text and the class by its plain name."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        found |= read_json(folder / name) if (folder / name).is_file() else {}
    kind = read_json(folder / "config.json").get("model_type") if (folder / "config.json").is_file() else None
    name = (found.get("tokenizer_class") or CLASSES.get(kind, f"tokenizer of {kind}")).removesuffix("Fast")
    texts = {k: v["content"] for k, v in found.items() if k.endswith("_token") and isinstance(v, dict)}
    return NAMES.get(name, {}) | found | texts | {"tokenizer_class": name}


# ── vocabularies ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _bytes(folder: pathlib.Path, settings: Mapping[str, Any]) -> Any:
    """Byte-pair encoding over bytes, of GPT-2 and Qwen."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    prefixed = bool(settings.get("add_prefix_space", False))
    if settings["tokenizer_class"] == "Qwen2Tokenizer":
        tokenizer.normalizer = normalizers.NFC()
        level = pre_tokenizers.ByteLevel(add_prefix_space=prefixed, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(QWEN), "isolated"), level])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefixed)
    tokenizer.decoder = decoders.ByteLevel()
    begin, end = (settings[f"{name}_token"] if settings.get(f"add_{name}_token") else None for name in ("bos", "eos"))
    put = [name for name in (begin, end) if name]
    if put:
        template = [part for part in (begin, "$A", end) if part]
        specials = [(name, tokenizer.token_to_id(name)) for name in dict.fromkeys(put)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return tokenizer


def _words(folder: pathlib.Path, settings: Mapping[str, Any]) -> Any:
    """WordPiece, of BERT."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordPiece.from_file(str(folder / "vocab.txt"), unk_token=settings["unk_token"]))
    tokenizer.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        strip_accents=settings.get("strip_accents"),
        lowercase=settings.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(prefix="##")
    ends = [(settings[name], tokenizer.token_to_id(settings[name])) for name in ("sep_token", "cls_token")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


def _add(tokenizer: Any, folder: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """The tokens that stand beside the vocabulary, and those of it that are special. Raises `ConfigError` where ids differ."""
    from tokenizers import AddedToken

    added = {int(i): token for i, token in settings.get("added_tokens_decoder", {}).items()}
    if (folder / "added_tokens.json").is_file():
        more = json.loads((folder / "added_tokens.json").read_text("utf-8"))
        added = {i: {"content": text, "special": True} for text, i in more.items()} | added
    known = {token["content"] for token in added.values()}
    for name in NAMES[settings["tokenizer_class"]]:
        text = settings.get(name)
        if isinstance(text, str) and text not in known and tokenizer.token_to_id(text) is not None:
            added[tokenizer.token_to_id(text)] = {"content": text, "special": True}
    for i, token in sorted(added.items()):
        flags = {flag: token[flag] for flag in ("single_word", "lstrip", "rstrip", "normalized", "special") if flag in token}
        tokenizer.add_tokens([AddedToken(token["content"], **{"normalized": False} | flags)])
        if tokenizer.token_to_id(token["content"]) != i:
            raise ConfigError(f"has {token['content']!r} at {i}, which its vocabulary leaves no room for", str(folder))
