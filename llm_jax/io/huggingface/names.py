"""Where each array of ours lies among a family's tensors: a table of names, spelt out for the layers and experts of a model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from llm_jax.core.config import ConfigError
from llm_jax.io.huggingface.layouts import Layout, flat, same, transposed
from llm_jax.models.model import Model

Arrange = Callable[[tuple[int, ...]], Layout]  # from the shape of our array
SUFFIXES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}


@dataclass(frozen=True)
class Row:
    """A module of ours, as a path in which {i} is a layer, and the module on disk; or one array and one tensor by whole names.

    {e} in `theirs` is an expert: the first axis of our array. layouts: by the array's name, where it is not the usual: matrices
    transposed, and everything else as it is. instead: another place where older or newer files have it.
    """

    ours: str
    theirs: str
    layouts: Mapping[str, Arrange] = field(default_factory=dict)
    instead: Row | None = None


@dataclass(frozen=True)
class Plan:
    """One of our arrays. lead: sizes of its first axes along which it is stacked from tensors; pieces: for each place in them
    the tensor's name and where the rest of the axes lie in it."""

    shape: tuple[int, ...]
    lead: tuple[int, ...]
    pieces: dict[tuple[int, ...], tuple[str, Layout]]


def plans(
    rows: Iterable[Row], model: Model, shapes: Mapping[str, tuple[int, ...]], present: Callable[[str], bool] = lambda name: True
) -> dict[str, Plan]:
    """The plan of every array, by its path in the parameters. present: whether a tensor is there, to choose between places."""
    table = [(re.compile(re.escape(row.ours).replace(r"\{i\}", r"(?P<i>\d+)") + r"(?:/\w+)?"), row) for row in rows]
    return {path: _plan(path, shape, table, model, present) for path, shape in shapes.items()}


def _plan(path: str, shape: tuple[int, ...], table: list[tuple[re.Pattern, Row]], model: Model, present) -> Plan:
    layers = _layers(path, model)
    lead: tuple[int, ...] = (len(layers),) if layers[0] != path else ()
    pieces: dict[tuple[int, ...], tuple[str, Layout]] = {}
    experts = 0
    for place, alone in enumerate(layers):
        at = (place,) if lead else ()
        name, arrange, has_experts = _found(alone, table, present)
        own = shape[len(lead) :]
        experts = own[0] if has_experts else 0
        if not experts:
            pieces[at] = (name, arrange(own))
            continue
        layout = arrange(own[1:])
        pieces |= {(*at, e): (name.format(e=e), layout) for e in range(experts)}
    return Plan(shape, (*lead, experts) if experts else lead, pieces)


def _layers(path: str, model: Model) -> list[str]:
    """The paths that the array would have if every layer stood alone: one, or one for each that is stacked in it."""
    for prefix, stack in model.stacks.items():
        start = f"{prefix}/" if prefix else ""
        scanned = re.fullmatch(re.escape(start) + r"layers/step_(\d+)/(.+)", path)
        if scanned:
            first = len(stack.first) + int(scanned[1])
            return [f"{start}layers_{first + repeat * stack.period}/{scanned[2]}" for repeat in range(stack.repeats)]
    return [path]


def _found(path: str, table: list[tuple[re.Pattern, Row]], present: Callable[[str], bool]) -> tuple[str, Arrange, bool]:
    """The tensor's name, how our array lies in it, and whether the name still has a place for an expert."""
    row, match = next(((row, match) for pattern, row in table if (match := pattern.fullmatch(path))), (None, None))
    if row is None or match is None:
        raise ConfigError("has no place among the tensors of this family", path)
    name, arrange = _spelt(row, path, match)
    if row.instead is not None and not present(name.format(e=0)):
        name, arrange = _spelt(row.instead, path, match)
    return name, arrange, "{e}" in name


def _spelt(row: Row, path: str, match: re.Match) -> tuple[str, Arrange]:
    leaf = path.rsplit("/", 1)[1]
    name = row.theirs.replace("{i}", match.groupdict().get("i") or "")
    usual: Arrange = same
    if leaf == "kernel":
        usual = transposed(2 if "/output/" in path else 1)
    elif leaf == "bias":
        usual = flat(0)
    is_module = row.ours.count("/") < path.count("/")
    return (f"{name}.{SUFFIXES[leaf]}" if is_module else name), row.layouts.get(leaf, usual)
