"""What the ids of a `tokenizer.json` stand for, byte by byte, and whether text survives the way to them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

MARK = "\u2581"  # SentencePiece's stand-in for a space


def pieces(data: dict[str, Any], ids: dict[str, int], specials: bool) -> tuple[list[bytes], bool]:
    """What each id stands for, and whether nothing gets lost on the way to ids."""
    model, added = data["model"], {token["content"]: token for token in data.get("added_tokens", ())}
    before = [*_steps(data.get("normalizer")), *_steps(data.get("pre_tokenizer"))]
    in_bytes = any(step["type"] == "ByteLevel" for step in (*before, *_steps(data.get("decoder"))))
    if in_bytes:
        characters = byte_characters()
        read = lambda piece: b"".join(characters.get(c) or c.encode() for c in piece)  # noqa: E731
        whole = characters.keys() <= ids.keys()
    elif model["type"] == "WordPiece":
        read, whole = lambda piece: (piece[2:] if piece.startswith("##") else f" {piece}").encode(), False
    else:
        by_byte = {f"<0x{b:02X}>": bytes([b]) for b in range(256)}
        read = lambda piece: by_byte.get(piece) or piece.replace(MARK, " ").encode()  # noqa: E731
        whole = bool(model.get("byte_fallback")) and by_byte.keys() <= ids.keys()
    found = [b""] * (max(ids.values()) + 1)
    for piece, i in ids.items():
        token = added.get(piece)
        found[i] = read(piece) if token is None else b"" if token["special"] else piece.encode()
    kept = [token for token in added.values() if not token["special"]]
    whole = whole and not specials and not any(token["lstrip"] or token["rstrip"] for token in kept)
    return found, whole and all(_keeps(step) for step in before)


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
