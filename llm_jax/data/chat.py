"""Chat templates: messages to a text and to ids, with a mask of what the assistant wrote, as `apply_chat_template` of transformers.

A template is a program in Jinja that comes with a model, so it runs in jinja2's immutable sandbox and sees plain JSON values only.
The rules are those of "Chat templates" in the documentation of transformers: messages are dicts with "role" and "content";
`messages`, `tools`, `documents`, `add_generation_prompt` and the special tokens are variables; `raise_exception`, `strftime_now`,
the filter `tojson`, `break` and `continue`, and `{% generation %}` around what the assistant writes are added to Jinja's own.
"""

from __future__ import annotations

import contextvars
import datetime
import functools
import json
import os
import pathlib
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox
import numpy as np
from jinja2.utils import Namespace

from llm_jax.core.config import ConfigError
from llm_jax.data.tokenizers import Fitted

Messages = Sequence[Mapping[str, Any]]
REASONING = ("reasoning_content", "thinking", "reasoning")  # the names that a message's reasoning goes by
CONTINUED = "<|here the last message goes on|> "


@dataclass(frozen=True)
class Template:
    """A chat template. source: in Jinja; specials: what its variables of special tokens hold, as {"bos_token": "<s>"}."""

    source: str
    specials: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rendered:
    """A chat as a text. spans: `[n, 2]` int64, where in it, in characters, each `{% generation %}` begins and ends."""

    text: str
    spans: np.ndarray


@dataclass(frozen=True)
class Encoded:
    """A chat as ids `[n]` int32. mask: `[n]` bool, true where an id holds any of what the assistant wrote; None where the template
    does not say what that is."""

    ids: np.ndarray
    mask: np.ndarray | None


def load(path: str | os.PathLike) -> Template:
    """The template of a folder of transformers (`chat_template.jinja`, or in `tokenizer_config.json`), or of a file alone.

    Raises `ConfigError`.
    """
    place = pathlib.Path(path).expanduser()
    if place.is_file():
        return Template(_text(place))
    names = ("special_tokens_map.json", "tokenizer_config.json")
    found: dict[str, Any] = {}
    for file in (place / name for name in names):
        found |= _json(file) if file.is_file() else {}
    source = _text(place / "chat_template.jinja") if (place / "chat_template.jinja").is_file() else found.get("chat_template")
    if isinstance(source, list):  # several by name
        source = {one["name"]: one["template"] for one in source}.get("default")
    if not isinstance(source, str):
        raise ConfigError("has no chat template: name a folder with a chat_template.jinja, or such a file", str(path))
    specials = {
        key: value["content"] if isinstance(value, dict) else value for key, value in found.items() if key.endswith("_token")
    }
    return Template(source, {key: value for key, value in specials.items() if isinstance(value, str)})


def render(
    template: Template,
    messages: Messages,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    **variables: Any,
) -> Rendered:
    """The text of a chat. tools: JSON schemas; documents: dicts of title and text; variables: what else the template asks for.

    add_generation_prompt: ends with what an answer of the assistant begins with. continue_final_message: ends within the last
    message, whose text is to go on. Raises `ConfigError` for a template that cannot be read, and for messages that it refuses.
    """
    if add_generation_prompt and continue_final_message:
        raise ConfigError("begins a new message, so the last one is not continued: choose one of the two", "add_generation_prompt")
    given = {"messages": _checked(messages), "tools": tools, "documents": documents, **variables}
    plain = _plain(given)
    if continue_final_message:
        _mark_end(plain["messages"][-1])
    text, spans = _run(template.source, {**template.specials, **plain, "add_generation_prompt": add_generation_prompt})
    if continue_final_message:
        text = _cut(text)
    return Rendered(text, np.minimum(np.array(spans, np.int64).reshape(-1, 2), len(text)))


def encode(template: Template, messages: Messages, tokenizer: Fitted, **options: Any) -> Encoded:
    """The ids of a chat, with the options of `render`, and which of them to learn from. Raises `ConfigError`.

    The tokenizer must take the template's special tokens for such: `HuggingFace(path=…, specials=True)`. Then they are so in what
    users write, too, as they are in transformers.
    """
    rendered = render(template, messages, **options)
    ids, places = tokenizer.spans(rendered.text)
    if not _marks(template.source):
        return Encoded(ids, None)
    spans = rendered.spans[rendered.spans[:, 1] > rendered.spans[:, 0]]
    nearest = np.searchsorted(spans[:, 1], places[:, 0], side="right")  # the first that ends after an id begins
    begins = np.append(spans[:, 0], np.iinfo(np.int64).max)
    return Encoded(ids, places[:, 1] > begins[nearest])


# ── what goes in ─────────────────────────────────────────────────────────────────────────────────────────────────────
def _text(file: pathlib.Path) -> str:
    try:
        return file.read_text("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"is not UTF-8 at byte {error.start}", str(file)) from None


def _json(file: pathlib.Path) -> dict[str, Any]:
    try:
        return json.loads(_text(file))
    except json.JSONDecodeError as error:
        raise ConfigError(f"is not JSON: {error}", str(file)) from None


def _checked(messages: Messages) -> list[dict[str, Any]]:
    """The messages without what is None, and with reasoning under the two names that templates look for."""
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ConfigError(f"must be a list of at least one dict with a role and a content, got {str(messages)[:60]!r}", "messages")
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ConfigError(f"must be a dict with a role and a content, got {str(message)[:60]!r}", f"messages[{number}]")
        kept = {key: value for key, value in message.items() if value is not None}
        thought = next((kept[name] for name in REASONING if name in kept), None)
        found.append(kept if thought is None else {"thinking": thought, **kept, "reasoning_content": thought})
    return found


def _plain(given: dict[str, Any]) -> dict[str, Any]:
    """The same out of JSON's own types, so that a template gets hold of nothing that could do something."""
    try:
        return json.loads(json.dumps(given))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"must be what JSON can hold: {error}", "messages") from None


def _mark_end(message: dict[str, Any]) -> None:
    blocks = message.get("content")
    if isinstance(blocks, str):
        message["content"] += CONTINUED
        return
    texts = [block for block in blocks if isinstance(block, dict) and "text" in block] if isinstance(blocks, list) else []
    if not texts:
        raise ConfigError("has no text to continue", f"messages, the last of role {message['role']!r},")
    texts[-1]["text"] += CONTINUED


def _cut(text: str) -> str:
    """The text up to the mark; where the template cuts spaces off a message, as the one of the mark shows, without those before."""
    place = text.rfind(CONTINUED.strip())
    if place < 0:
        raise ConfigError("does not show the last message as it is, so it cannot be continued", "chat template")
    return text[:place] if text.startswith(CONTINUED, place) else text[:place].rstrip()


# ── Jinja ────────────────────────────────────────────────────────────────────────────────────────────────────────────
# what a template has written so far, and the places of its generation blocks
_WRITING: contextvars.ContextVar[tuple[list[str], list[tuple[int, int]]]] = contextvars.ContextVar("writing")


class _Generation(jinja2.ext.Extension):
    """`{% generation %} … {% endgeneration %}`, whose place is noted; in a macro or a captured block places are not known."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller):
        blocks, spans = _WRITING.get()
        start, written = sum(map(len, blocks)), caller()
        spans.append((start, start + len(written)))
        return written


class _Space(Namespace):
    """`namespace()` without names that begin with an underscore."""

    def __init__(*args, **values):
        self, *rest = args
        values = dict(*rest, **values)
        _require_names(values)
        Namespace.__init__(self, **values)

    def __setitem__(self, name, value):
        _require_names([name])
        Namespace.__setitem__(self, name, value)


def _require_names(names: Any) -> None:
    for name in names:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name that begins with an underscore, got {name!r}")


@functools.cache
def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    found = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    found.filters["tojson"] = _to_json
    found.globals |= {"raise_exception": _refuse, "strftime_now": _now, "namespace": _Space}
    return found


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
    """Jinja's own writes `<` and `'` as HTML has them."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise jinja2.exceptions.TemplateError(message)


def _now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


@functools.lru_cache(maxsize=32)
def _compiled(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.exceptions.TemplateSyntaxError as error:
        raise ConfigError(f"cannot be read: {error.message}", f"chat template, line {error.lineno},") from None


@functools.lru_cache(maxsize=32)
def _marks(source: str) -> bool:
    """Whether a template says what the assistant writes."""
    return any(kind == "name" and text == "generation" and before == "block_begin" for before, kind, text in _words(source))


def _words(source: str):
    before = ""
    for _, kind, text in _environment().lex(source):
        if kind != "whitespace":
            yield before, kind, text
            before = kind


def _run(source: str, variables: dict[str, Any]) -> tuple[str, list[tuple[int, int]]]:
    template = _compiled(source)
    blocks: list[str] = []
    spans: list[tuple[int, int]] = []
    token = _WRITING.set((blocks, spans))
    try:
        for block in template.generate(**variables):
            blocks.append(block)  # noqa: PERF402 `_note` asks how long they are meanwhile
    except Exception as error:  # a program of someone else's: anything can go wrong in it
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
        where = f"chat template, line {lines[-1]}," if lines else "chat template"
        refused = type(error) is jinja2.exceptions.TemplateError
        why = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{'refuses' if refused else 'fails on'} these messages: {why}", where) from None
    finally:
        _WRITING.reset(token)
    return "".join(blocks), spans
