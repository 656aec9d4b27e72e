"""Configurations as they are written in a shell: `train.steps=500`, `model.position=Rope(theta=500)`."""

from __future__ import annotations

import ast
import dataclasses
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from llm_jax.core.config import (
    Config,
    ConfigError,
    check_type,
    choices_of,
    field_types,
    is_config,
    members_of,
    nearest,
    override,
    require_field,
    substitute,
)

C = TypeVar("C", bound=Config)


def override_text(config: C, assignments: Iterable[str]) -> C:
    """`config` after assignments as typed in a shell: `train.steps=500`, `model.position=Rope(theta=500)`.

    They apply in order, but are validated together. Raises `ConfigError`.
    """
    changes: dict[str, Any] = {}
    shape = config
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        path = path.strip()
        if not equals or not path:
            raise ConfigError(f"--set takes path=value, got {assignment!r}")
        value = parse(text.strip(), _annotation_at(shape, path), path)
        # a later path may reach into a component that this assignment puts there
        shape = substitute(shape, {path: value})
        changes = {p: v for p, v in changes.items() if p != path and not p.startswith(path + ".")} | {path: value}
    return override(config, changes)


def _annotation_at(config: Config, path: str) -> Any:
    *parents, leaf = path.split(".")
    node: Any = config
    for depth, name in enumerate([*parents, leaf]):
        if not isinstance(node, Config):
            raise ConfigError(f"is {node!r}, which has no field {name!r} to set", ".".join(path.split(".")[:depth]))
        try:
            require_field(node, name)
        except ConfigError as error:
            prefix = ".".join(parents[:depth])
            raise (error.inside(prefix) if prefix else error) from None
        if depth < len(parents):
            node = getattr(node, name)
    return field_types(type(node))[leaf]  # type: ignore[arg-type]


def parse(text: str, annotation: Any, where: str) -> Any:
    """The value that `text` denotes for a field of that type: a Python literal, a component call, or a bare word."""
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError as error:
        if choices_of(annotation):
            raise ConfigError(f"cannot be read: {error.msg}: {text!r}", where) from None
        node = ast.Constant(text)
    value = _evaluate(node, text, annotation, where)
    check_type(value, annotation, where)
    return value


def _evaluate(node: ast.expr, text: str, annotation: Any, where: str) -> Any:
    members = members_of(annotation)
    choices = choices_of(annotation)
    call = node.func if isinstance(node, ast.Call) else node
    if choices and isinstance(call, ast.Name) and call.id not in ("None", "none"):
        if call.id not in choices:
            near = nearest(call.id, sorted(choices))
            raise ConfigError(f"has no choice {call.id!r}: did you mean {near}?", where)
        return _construct(choices[call.id], node, where)
    if choices and isinstance(node, ast.Call):
        near = nearest(ast.unparse(call).rpartition(".")[2], sorted(choices))
        raise ConfigError(f"takes a component by its name alone, not {ast.unparse(node)!r}: did you mean {near}?", where)
    inner = next((typing.get_args(m)[0] for m in members if typing.get_origin(m) is tuple), None)
    if inner is not None and is_config(inner) and (items := _items(node)) is not None:
        return tuple(_evaluate(item, ast.unparse(item), inner, f"{where}[{i}]") for i, item in enumerate(items))
    if str in members or any(typing.get_origin(m) is typing.Literal for m in members):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if not isinstance(node, ast.Constant):
            return None if type(None) in members and text.lower() == "none" else text
    return _literal(node, text)


def _literal(node: ast.expr, text: str) -> Any:
    if isinstance(node, ast.Name):
        return {"true": True, "false": False, "none": None}.get(node.id.lower(), text)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError):
        return text


def _items(node: ast.expr) -> list[ast.expr] | None:
    """The elements of a tuple as it is written: (a, b), (a,) * 3 or a sum of such; None for what is none."""
    match node:
        case ast.Tuple() | ast.List():
            return node.elts
        case ast.BinOp(left, ast.Add(), right) if (first := _items(left)) is not None and (rest := _items(right)) is not None:
            return first + rest
        case ast.BinOp(left, ast.Mult(), ast.Constant(int(times))) if (items := _items(left)) is not None:
            return items * times
    return None


def _construct(cls: type, node: ast.expr, where: str) -> Any:
    if not isinstance(node, ast.Call):
        node = ast.Call(ast.Name(cls.__name__), [], [])
    hints = field_types(cls)
    values: dict[str, Any] = {}
    names = [field.name for field in dataclasses.fields(cls)]
    if len(node.args) > len(names):
        raise ConfigError(f"has {len(names)} fields in {cls.__name__}, got {len(node.args)} values", where)
    for keyword in [*map(ast.keyword, names, node.args), *node.keywords]:
        name = keyword.arg or "**"
        if name in values:
            raise ConfigError(f"is given {name!r} twice in {cls.__name__}", where)
        if name not in hints:
            near = nearest(name, sorted(hints))
            raise ConfigError(f"has no {name!r} in {cls.__name__}: did you mean {near}?", where)
        values[name] = _evaluate(keyword.value, ast.unparse(keyword.value), hints[name], f"{where}.{name}")
    try:
        return cls(**values)
    except ConfigError as error:
        raise error.inside(where) from None
