"""Train a tokenizer, encode with one, look at the pieces of a text in colour, or compare several on the same text.

python -m llm_jax tokenize train --tokenizer="ByteLevelBPE(vocabulary=512)" --corpus="TextFiles(path='texts')" --output=mine
python -m llm_jax tokenize encode --tokenizer=mine --text="def main(self):"
python -m llm_jax tokenize inspect --tokenizer=mine --chat=messages.json --template=path/to/model
python -m llm_jax tokenize compare --tokenizer="WordPiece()" --tokenizer=mine
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from absl import flags
from rich.text import Text

from llm_jax.cli.terminal import console, parse, piece_table, pieces_in_colour, require_writable, visible
from llm_jax.core.config import ConfigError
from llm_jax.core.platform import cache_dir
from llm_jax.core.written import parse as parse_component
from llm_jax.data import chat
from llm_jax.data.corpora import Corpus, StandardLibrary
from llm_jax.data.tokenizer_json import ByteLevelBPE, HuggingFace, WordPiece
from llm_jax.data.tokenizers import Bytes, Fitted, SentencePiece, Tokenizer

if TYPE_CHECKING:
    from llm_jax.data.measures import Measures

FLAGS = flags.FlagValues()
flags.DEFINE_multi_string(
    "tokenizer",
    [],
    "As in an experiment file, or a tokenizer.json, its folder, or a .model; several for `compare`.",
    flag_values=FLAGS,
)
flags.DEFINE_string("corpus", None, "What it is trained on (default: 4 MB of Python's standard library).", flag_values=FLAGS)
flags.DEFINE_string("output", None, "train: a folder, or a .model file of SentencePiece.", flag_values=FLAGS)
flags.DEFINE_multi_string("text", [], "encode, inspect: a text.", flag_values=FLAGS)
flags.DEFINE_string("file", None, "encode, inspect: a file of text in UTF-8; - is standard input.", flag_values=FLAGS)
flags.DEFINE_list("ids", None, "inspect: ids in place of a text: 1,2,3.", flag_values=FLAGS)
flags.DEFINE_string("chat", None, "encode, inspect: a JSON file, a list of messages with role and content.", flag_values=FLAGS)
flags.DEFINE_string("template", None, "Its chat template: a file in Jinja, or a folder of transformers.", flag_values=FLAGS)
flags.DEFINE_boolean("prompt", False, "Ends a chat with what an answer begins with.", flag_values=FLAGS)
flags.DEFINE_float("megabytes", 2.0, "compare: of text that is measured on.", lower_bound=1e-6, flag_values=FLAGS)

ACTIONS = ("train", "encode", "inspect", "compare")
USED = {  # flags that belong to some of the actions only
    "output": ("train",),
    "text": ("encode", "inspect"),
    "file": ("encode", "inspect"),
    "chat": ("encode", "inspect"),
    "template": ("encode", "inspect"),
    "prompt": ("encode", "inspect"),
    "ids": ("inspect",),
    "megabytes": ("compare",),
}
USUAL = (Bytes(), SentencePiece(), SentencePiece(kind="unigram"), ByteLevelBPE(), WordPiece())


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code 0. Raises `ConfigError`."""
    action = argv[1] if len(argv) > 1 and not argv[1].startswith("-") else ""
    parse(FLAGS, [f"{argv[0]} {action}".strip(), *argv[2 if action else 1 :]])
    if action not in ACTIONS:
        raise ConfigError(f"does one of {', '.join(ACTIONS)}: write it first, got {action!r}", "tokenize")
    for name, actions in USED.items():
        if FLAGS[name].present and action not in actions:
            raise ConfigError(f"is for {' and '.join(actions)}, not for {action}", f"--{name}")
    {"train": _train, "encode": _encode, "inspect": _inspect, "compare": _compare}[action]()
    return 0


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────────
def _corpus() -> Corpus:
    if FLAGS.corpus is None:
        return StandardLibrary(megabytes=4.0)
    return parse_component(FLAGS.corpus, Corpus, "--corpus")


def _tokenizer(text: str) -> Tokenizer:
    """A component as it is written, or what a path holds."""
    place = pathlib.Path(text).expanduser()
    if place.is_dir() and not (place / "tokenizer.json").is_file() and (place / "tokenizer.model").is_file():
        return SentencePiece(path=str(place / "tokenizer.model"))
    if place.exists():
        return SentencePiece(path=text) if place.suffix == ".model" else HuggingFace(path=text)
    if "/" in text.partition("(")[0] or text.endswith((".model", ".json")):
        raise ConfigError(f"is neither a file nor a folder: {text!r}", "--tokenizer")
    return parse_component(text, Tokenizer, "--tokenizer")


def _fitted(tokenizer: Tokenizer) -> Fitted:
    with console().status(f"reading or training {_name(tokenizer)}"):
        return tokenizer.fit(_corpus(), cache_dir())


def _name(tokenizer: Tokenizer) -> str:
    """As short as it can be written: by its file, or by what it is trained with."""
    fields = {name: value for name, value in vars(tokenizer).items() if value not in (None, "", False)}
    shown = {"path": fields["path"]} if "path" in fields else fields
    return f"{type(tokenizer).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


def _one() -> Tokenizer:
    if len(FLAGS.tokenizer) != 1:
        raise ConfigError('takes one, as in --tokenizer="SentencePiece(vocabulary=4096)" or --tokenizer=mine', "--tokenizer")
    return _tokenizer(FLAGS.tokenizer[0])


def _texts() -> list[str]:
    given = list(FLAGS.text)
    if FLAGS.file is not None:
        raw = sys.stdin.buffer.read() if FLAGS.file == "-" else pathlib.Path(FLAGS.file).expanduser().read_bytes()
        try:
            given.append(raw.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ConfigError(f"is not UTF-8 at byte {error.start} ({raw[error.start]:#04x})", FLAGS.file) from None
    for text in given:
        if any("\ud800" <= c <= "\udfff" for c in text):  # how Python hands on what was typed in another encoding
            raise ConfigError("is not UTF-8: put it into a file and convert that", "--text")
    return given


def _chat() -> tuple[Fitted, chat.Rendered, chat.Encoded]:
    """The tokenizer, which takes special tokens for such, and the chat in its text and its ids."""
    if FLAGS.template is None:
        raise ConfigError("is missing: a file in Jinja, or the folder of a model that has one", "--template")
    place = pathlib.Path(FLAGS.chat).expanduser()
    try:
        messages = json.loads(place.read_text("utf-8"))
    except ValueError as error:
        raise ConfigError(f"is not JSON: {error}", FLAGS.chat) from None
    tokenizer, template = _one(), chat.load(FLAGS.template)
    if isinstance(tokenizer, HuggingFace):
        tokenizer = replace(tokenizer, specials=True)
    fitted = _fitted(tokenizer)
    rendered = chat.render(template, messages, add_generation_prompt=FLAGS.prompt)
    return fitted, rendered, chat.encode(template, messages, fitted, add_generation_prompt=FLAGS.prompt)


# ── what is done ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _train() -> None:
    from llm_jax.io import tokenizer_json

    if FLAGS.output is None:
        raise ConfigError("is missing: name a folder, or a .model file of SentencePiece", "--output")
    place = tokenizer_json.new_place(FLAGS.output)
    folder = next(folder for folder in (place, *place.parents) if folder.exists())
    require_writable(folder / place.name, f"--output={FLAGS.output}")
    fitted = _fitted(_one())
    files = tokenizer_json.save(fitted, FLAGS.output)
    print(f"{fitted.vocabulary:,} ids, {'lossless' if fitted.lossless else 'not lossless'}, fingerprint {fitted.fingerprint}")
    print("written: " + " ".join(map(str, files)))
    loads = "SentencePiece" if any(file.suffix == ".model" for file in files[:1]) else "HuggingFace"
    path = str(files[0]) if loads == "SentencePiece" else FLAGS.output
    print(f"in an experiment: --set=\"tokenizer={loads}(path='{path}')\"")


def _encode() -> None:
    if FLAGS.chat is not None:
        _, rendered, encoded = _chat()
        mask = None if encoded.mask is None else encoded.mask.astype(int).tolist()
        print(json.dumps({"text": rendered.text, "ids": encoded.ids.tolist(), "mask": mask}))
        return
    texts = _texts()
    if not texts:
        raise ConfigError("needs a --text, a --file or a --chat", "tokenize encode")
    fitted = _fitted(_one())
    for text in texts:
        print(",".join(map(str, fitted.encode(text).tolist())))


def _inspect() -> None:
    if FLAGS.chat is not None:
        fitted, _, encoded = _chat()
        _show(fitted, encoded.ids.tolist(), None, encoded.mask)
        print(f"{len(encoded.ids)} ids, of which the assistant wrote {_share(encoded)}")
        return
    texts = _texts()
    if not texts and FLAGS.ids is None:
        raise ConfigError("needs a --text, a --file, --ids or a --chat", "tokenize inspect")
    fitted = _fitted(_one())
    if FLAGS.ids is not None:
        _show(fitted, _known(FLAGS.ids, fitted.vocabulary), None)
    for text in texts:
        _show(fitted, fitted.encode(text).tolist(), text)


def _share(encoded: chat.Encoded) -> str:
    return "what its template does not say" if encoded.mask is None else str(int(encoded.mask.sum()))


def _known(words: Sequence[str], vocabulary: int) -> list[int]:
    if not all(word.strip().isdecimal() and int(word) < vocabulary for word in words):
        raise ConfigError(f"must be whole numbers below {vocabulary}, as in --ids=1,2,3, got {','.join(words)!r}", "--ids")
    return [int(word) for word in words]


def _show(fitted: Fitted, ids: Sequence[int], text: str | None, mask: Sequence[bool] | None = None) -> None:
    """The pieces of ids; text: what they were made of, and come back as where that differs."""
    named, out = [_spelling(fitted, int(i)) for i in ids], console()
    colour = out.color_system is not None
    out.print(pieces_in_colour(named, mask, colour=colour), soft_wrap=True)
    out.print(piece_table(ids, named, mask))
    if text is None:
        return
    size = len(text.encode("utf-8"))
    out.print(f"{len(ids)} ids, {size} bytes, {size / max(len(ids), 1):.2f} bytes an id", highlight=False)
    back = fitted.decode(ids)
    if back != text and not fitted.lossless:
        out.print(Text("comes back as: ").append(visible(back)), soft_wrap=True)


def _spelling(fitted: Fitted, number: int) -> bytes | str:
    """The bytes of an id, or the name of one that stands for none."""
    return fitted.piece_bytes[number] or fitted.name_of(number)


def _compare() -> None:
    from llm_jax.data import measures

    kinds = [_tokenizer(text) for text in FLAGS.tokenizer] or list(USUAL)
    text = measures.text_of(_corpus(), FLAGS.megabytes)
    found = {}
    for kind in kinds:
        try:
            fitted = _fitted(kind)
            with console().status(f"measuring {_name(kind)}"):
                found[_name(kind)] = measures.measure(fitted, text)
        except ConfigError as error:
            raise ConfigError(f"{error} (of {_name(kind)})") from None
    size = sum(len(document.encode("utf-8")) for document in text.train)
    out = console()
    out.print(_table(found))
    out.print(
        f"measured on {text.bytes:,} bytes of the validation split; the n-gram model of bits a byte on {size:,} of the train split"
    )


def _table(found: dict[str, Measures]) -> object:
    from rich.markup import escape
    from rich.table import Table

    heads = ("ids", "bits a byte", "bytes an id", "ids a word", "an unseen word", "unknown", "words lost", "k ids/s", "MB/s")
    table = Table("tokenizer", *heads)
    for name, m in found.items():
        numbers = (f"{m.vocabulary:,}", f"{m.bits_per_byte:.3f}", f"{m.bytes_per_token:.2f}", f"{m.tokens_per_word:.2f}")
        lost = "none" if m.exact else f"{m.lost:.1%}"
        rest = (
            f"{m.unseen_tokens:.2f}",
            f"{m.unknown:.2%}",
            lost,
            f"{m.tokens_per_second / 1e3:,.0f}",
            f"{m.megabytes_per_second:.1f}",
        )
        table.add_row(escape(name), *numbers, *rest)
    for column in table.columns[1:]:
        column.justify = "right"
    return table
