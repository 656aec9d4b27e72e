"""Typed, frozen configurations: strict overrides by dotted path, JSON, fingerprints, and traced substitution.

A configuration is a tree of frozen dataclasses that derive from `Config`. A component choice is an object in a field
(`position=Rope(theta=10_000)`), so every place below accepts either a whole component or a path into it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

import pydantic

C = TypeVar("C", bound="Config")


class ConfigError(ValueError):
    """A mistake in what the user wrote: one sentence that names the field, the value and the way out."""

    def __init__(self, problem: str, path: str = ""):
        super().__init__(f"{path} {problem}" if path else problem)
        self.problem, self.path = problem, path

    def inside(self, prefix: str) -> ConfigError:
        """The same error seen from the parent's field `prefix`."""
        return ConfigError(self.problem, f"{prefix}.{self.path}" if self.path else prefix)


class Config:
    """Base of every configuration dataclass: fields are type-checked on construction, then `validate` runs."""

    def __post_init__(self):
        hints = field_types(type(self))  # type: ignore[arg-type]
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            check_type(getattr(self, field.name), hints[field.name], field.name)
        self.validate()

    def validate(self) -> None:
        """Raises `ConfigError` where values do not fit together; subclasses override it and call `require`."""


def require(condition: bool, field: str, problem: str) -> None:
    """Raises `ConfigError(field problem)` unless `condition`."""
    if not condition:
        raise ConfigError(problem, field)


def require_positive(config: Config, *names: str) -> None:
    """Every named field that is not None must be > 0."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value > 0, name, f"must be > 0, got {value}")


def require_fraction(config: Config, *names: str) -> None:
    """Every named field must lie in [0, 1)."""
    for name in names:
        value = getattr(config, name)
        require(0 <= value < 1, name, f"must be in [0, 1), got {value}")


def traced(default: Any) -> Any:
    """A field whose value may be a traced scalar, so that trials that differ in it share one compiled program."""
    return dataclasses.field(default=default, metadata={"traced": True})


# ── types ────────────────────────────────────────────────────────────────────────────────────────────────────────────
@functools.cache
def field_types(cls: Any) -> dict[str, Any]:
    """The resolved annotation of every dataclass field of `cls`."""
    return typing.get_type_hints(cls)


@functools.cache
def _adapter(annotation: Any) -> pydantic.TypeAdapter:
    return pydantic.TypeAdapter(annotation, config=pydantic.ConfigDict(arbitrary_types_allowed=True))


def _is_of(value: Any, annotation: Any) -> bool:
    try:
        _adapter(annotation).validate_python(value, strict=True)
    except pydantic.ValidationError:
        return False
    return True


def members_of(annotation: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the annotation alone."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return typing.get_args(annotation)
    return (annotation,)


def _describe(annotation: Any, value: Any = None) -> str:
    """The alternatives; a tuple that `value` belongs into as it is written."""
    names, alone = [], tuple(value) if isinstance(value, list) else (value,)
    for member in members_of(annotation):
        if is_config(member):
            names += sorted(components(member))
        elif typing.get_origin(member) is typing.Literal:
            names += [repr(a) for a in typing.get_args(member)]
        elif typing.get_origin(member) is tuple and value is not None and _is_of(alone, member):
            names.append(f"a tuple such as {alone!r}")
        else:
            names.append("None" if member is type(None) else getattr(member, "__name__", str(member)))
    return " | ".join(names)


def is_config(annotation: Any) -> bool:
    """Whether a type is that of a component."""
    return isinstance(annotation, type) and issubclass(annotation, Config)


def components(base: type) -> dict[str, type]:
    """Name → class of every concrete dataclass at or below `base`: the choices a field of that type accepts."""
    found = {} if base.__dict__.get("abstract") else {base.__name__: base}
    sub: type
    for sub in base.__subclasses__():
        found |= components(sub)
    return found


def choices_of(annotation: Any) -> dict[str, type]:
    """Name → class of every component that a field of this type accepts."""
    found: dict[str, type] = {}
    for member in members_of(annotation):
        found |= components(member) if is_config(member) else {}
    return found


def check_type(value: Any, annotation: Any, where: str) -> None:
    """Raises `ConfigError` unless `value` is of the annotated type (an int passes for a float; nothing else is coerced)."""
    for member in members_of(annotation):
        if is_config(member) or member is Any:
            if member is Any or isinstance(value, member):
                return
        elif not isinstance(value, Config) and _is_of(value, member):
            return
    raise ConfigError(f"must be {_describe(annotation, value)}, got {value!r}", where)


# ── overrides ────────────────────────────────────────────────────────────────────────────────────────────────────────
def override(config: C, changes: Mapping[str, Any]) -> C:
    """`config` with the values at dotted paths replaced, e.g. `{"model.depth": 6, "optimizer": Lion()}`.

    All changes are applied before anything is validated, so fields that depend on each other can change together; a
    whole component and a path into it may both be named. Raises `ConfigError` for an unknown path (with the nearest
    valid names) or a wrong type.
    """
    own = {path: value for path, value in changes.items() if "." not in path}
    nested: dict[str, dict[str, Any]] = {}
    for path, value in changes.items():
        if "." in path:
            head, rest = path.split(".", 1)
            nested.setdefault(head, {})[rest] = value
    for name in (*own, *nested):
        require_field(config, name)
    for name, inner in nested.items():
        child = own.get(name, getattr(config, name))
        if not isinstance(child, Config):
            raise ConfigError(f"is {child!r}, which has no field {next(iter(inner))!r} to set", name)
        try:
            own[name] = override(child, inner)
        except ConfigError as error:
            raise error.inside(name) from None
    return dataclasses.replace(config, **own)  # type: ignore[type-var]


def nearest(name: str, names: list[str]) -> str:
    """The names that a misspelt one may have meant, for a sentence; all of them where none is near."""
    return ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.5) or names)


def require_field(config: Config, name: str) -> None:
    """Raises `ConfigError` with the nearest names unless the configuration has that field."""
    names = [f.name for f in dataclasses.fields(config)]  # type: ignore[arg-type]
    if name not in names:
        near = nearest(name, names)
        raise ConfigError(f"is no field of {type(config).__name__}: did you mean {near}?", name)


def substitute(config: C, values: Mapping[str, Any]) -> C:
    """`config` with values at dotted paths put in *unchecked*: how traced scalars enter a configuration under jit."""
    result = object.__new__(type(config))
    result.__dict__.update(config.__dict__)
    for path, value in values.items():
        head, _, rest = path.partition(".")
        result.__dict__[head] = substitute(result.__dict__[head], {rest: value}) if rest else value
    return result


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def walk(config: Config, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Every leaf below `config` as (dotted path, field, value), in declaration order."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, path = getattr(config, field.name), prefix + field.name
        if isinstance(value, Config):
            yield from walk(value, path + ".")
        else:
            yield path, field, value


def traced_values(config: Config, kinds: Any = (int, float)) -> dict[str, Any]:
    """Path → value of every field declared with `traced` whose value is of these kinds: a number, unless told otherwise."""
    return {path: value for path, field, value in walk(config) if field.metadata.get("traced") and isinstance(value, kinds)}


def differences(a: Config, b: Config) -> dict[str, tuple[Any, Any]]:
    """Path → (value in a, value in b) wherever the two differ; a component of another class counts as one value."""
    if type(a) is not type(b):
        return {"": (a, b)}
    found: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(a):  # type: ignore[arg-type]
        left, right = getattr(a, field.name), getattr(b, field.name)
        if isinstance(left, Config) and isinstance(right, Config):
            for path, pair in differences(left, right).items():
                found[f"{field.name}.{path}" if path else field.name] = pair
        elif left != right:
            found[field.name] = (left, right)
    return found


# ── JSON ─────────────────────────────────────────────────────────────────────────────────────────────────────────────
def to_json(value: Any) -> Any:
    """Plain JSON data; a configuration becomes `{"class": name, field: …}`."""
    if isinstance(value, Config):
        fields = dataclasses.fields(value)  # type: ignore[arg-type]
        return {"class": type(value).__name__} | {f.name: to_json(getattr(value, f.name)) for f in fields}
    if isinstance(value, (tuple, list)):
        return [to_json(v) for v in value]
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    return value


def from_json(data: Any, annotation: Any, where: str = "config") -> Any:
    """The inverse of `to_json` for a value of the annotated type. Raises `ConfigError` for unknown classes or fields."""
    if isinstance(data, dict) and "class" in data:
        choices = choices_of(annotation)
        if data["class"] not in choices:
            raise ConfigError(f"names the class {data['class']!r}, which is none of {', '.join(sorted(choices))}", where)
        cls = choices[data["class"]]
        hints = field_types(cls)
        unknown = sorted(set(data) - set(hints) - {"class"})
        if unknown:
            raise ConfigError(f"has {', '.join(unknown)}, unknown to {cls.__name__}", where)
        return cls(**{k: from_json(v, hints[k], f"{where}.{k}") for k, v in data.items() if k != "class"})
    if isinstance(data, list):
        inner = [a for m in members_of(annotation) for a in typing.get_args(m) if a is not Ellipsis]
        return tuple(from_json(v, inner[0] if inner else Any, where) for v in data)
    return data


def fingerprint(value: Any) -> str:
    """Twelve hexadecimal digits that identify a configuration (or any JSON-able value) across processes and machines."""
    text = json.dumps(to_json(value), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
