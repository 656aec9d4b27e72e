"""What transformers' BERT tokenizer makes of a table of texts: `python -m tests.golden.make_wordpiece` (extra `parity`).

The tests hold llm_jax against `wordpiece.json`; a slow test makes it again and compares.
"""

import json
import pathlib
import tempfile
from typing import Any

FILE = pathlib.Path(__file__).with_name("wordpiece.json")
WORDS = "the un ##aff ##able ##ly want ##want ##ed wa runn ##ing , . ! ? ' \" - $ % [ ] low ##er ##est Low hello Hello naive naïve"
LETTERS = "a b c d e f g h i j k l m n o p q r s t u v w x y z A B É é ü 中 国 日 本 🙂 0 1 2 ª ##a ##e ##n ##é ##2 ##国 ##́"
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS.split(), *LETTERS.split()]
TEXTS = [
    "", " ", "unaffable", "UNwantéd,running", "the lowest, lower low.", "Hello hello HELLO", "naïve naive nai\u0308ve",
    "中国日本", "a中b", "the\tunaffable\r\nwanted", "\xa0the\u2003low", "\x00the�low\u200bly", "wanted!?running", "$2 22%",
    "'the' \"low\"", "the🙂low 🙂", "a" * 100, "a" * 101, "é" * 50, "e\u0301e\u0301", "[UNK] [low]", "low-er -ly", "Éa ÉA",
    "ﬁ ª²", "ΑΒ", "İi", "x—y", "the…low", "\x1bthe",
]  # fmt: skip


def made() -> dict[str, Any]:
    """Pieces and, for either case, pairs of text and ids."""
    from transformers import BertTokenizer

    found: dict[str, Any] = {"pieces": PIECES}
    for name, lowercase in (("uncased", True), ("cased", False)):
        with tempfile.TemporaryDirectory() as folder:
            file = pathlib.Path(folder) / "vocab.txt"
            file.write_text("\n".join(PIECES) + "\n", "utf-8")
            tokenizer = BertTokenizer(str(file), do_lower_case=lowercase)
            # what is spelt like a special token is text to us
            plain = {"add_special_tokens": False, "split_special_tokens": True}
            found[name] = [[text, tokenizer.encode(text, **plain)] for text in TEXTS]
    return found


def main() -> None:
    """Writes the file."""
    FILE.write_text(json.dumps(made(), separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
