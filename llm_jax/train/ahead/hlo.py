"""XLA's text of a compiled program, read: computations, instructions, shapes, and how often each computation is called."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

BITS = {"pred": 8, "token": 0, "c64": 64, "c128": 128}  # the others' names end in theirs
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """One array of a shape. inside: whether it lies in the chip's own memory beside the arithmetic, not in HBM."""

    dtype: str
    shape: tuple[int, ...]
    inside: bool = False

    @property
    def bytes(self) -> float:
        """Without padding."""
        bits = BITS.get(self.dtype) or re.search(r"\d+", self.dtype)
        return math.prod(self.shape) * (bits if isinstance(bits, int) else int(bits[0]) if bits else 0) / 8


def arrays(text: str) -> list[Array]:
    """The arrays of a shape as XLA writes it, `bf16[4,64]{1,0:T(8,128)}` or a tuple of such."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        shape = tuple(int(n) for n in sizes.split(",") if n)
        found.append(Array(dtype, shape, space is not None and space[1] != "0"))
    return found


@dataclass(frozen=True)
class Instruction:
    """One line of a computation. rest: what follows its operands."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    rest: str
    given: str = ""  # between the parentheses, of a constant its value
    root: bool = False

    @cached_property
    def arrays(self) -> list[Array]:
        """Of its result."""
        return arrays(self.shape)

    @cached_property
    def called(self) -> dict[str, list[str]]:
        """What it calls, by the part that they play."""
        return {part: re.findall(r"[\w.\-]+", names) for part, names in _CALLED.findall(self.rest)}

    @property
    def label(self) -> str:
        """Where in the source it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else self.name


@dataclass
class Computation:
    """Instructions by name, in order."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @property
    def root(self) -> Instruction:
        """What it returns."""
        return next(one for one in reversed(list(self)) if one.root)

    def has(self, target: str) -> bool:
        """Whether it calls a function of the compiler's by this name."""
        return any(f'custom_call_target="{target}' in one.rest for one in self)

    def operands(self, instruction: Instruction) -> list[Instruction]:
        """The instructions whose results one takes."""
        return [self.instructions[name] for name in instruction.operands if name in self.instructions]


@dataclass
class Module:
    """A program. unknown: loops whose number of turns cannot be read, counted once; aside: computations that run while others do,
    once `calls` has been asked for."""

    computations: dict[str, Computation]
    entry: str
    unknown: int = 0
    aside: set[str] = field(default_factory=set)

    @cached_property
    def calls(self) -> dict[str, float]:
        """How often each computation that runs by itself is called: the entry, loops' bodies, branches; not those of fusions."""
        counts: dict[str, float] = {}

        def visit(name: str, times: float) -> None:
            counts[name] = counts.get(name, 0.0) + times
            computation = self.computations[name]
            for one in computation:
                if one.opcode == "while":
                    turns = self.turns(computation, one)
                    self.unknown += turns is None
                    visit(one.called["body"][0], times * (1 if turns is None else turns))
                elif one.opcode in ("call", "async-start"):
                    inner = (one.called.get("to_apply") or one.called["calls"])[0]
                    self.aside |= {inner} if one.opcode == "async-start" or name in self.aside else set()
                    visit(inner, times)
                elif one.opcode == "conditional":
                    for branch in one.called.get("branch_computations", []):
                        visit(branch, times)

        visit(self.entry, 1.0)
        return counts

    def turns(self, computation: Computation, loop: Instruction) -> int | None:
        """How often a loop goes round, where XLA says it, or it counts by a constant from one constant up to another."""
        said = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest)
        if said:
            return int(said[1])
        condition, body = (self.computations[loop.called[part][0]] for part in ("condition", "body"))
        limits = [int(one.given) for one in condition if one.opcode == "constant" and re.fullmatch(r"-?\d+", one.given)]
        places = {int(found[1]) for one in condition if (found := re.search(r"index=(\d+)", one.rest))}
        if len(limits) != 1 or len(places) != 1 or not (condition.root.opcode == "fusion" or "direction=LT" in condition.root.rest):
            return None
        place = places.pop()
        start, step = _constant(computation, _element(computation, loop.operands[0], place)), _step(body, place)
        return max(math.ceil((limits[0] - (start or 0)) / (step or 1)), 0)  # what cannot be seen is as `lax.scan` has it


def _element(computation: Computation, name: str, place: int) -> str:
    """What stands at a place of a tuple; nothing where that cannot be seen."""
    found = computation.instructions.get(name)
    return found.operands[place] if found is not None and found.opcode == "tuple" and place < len(found.operands) else ""


def _constant(computation: Computation, name: str) -> int | None:
    """The number that an instruction is."""
    found = computation.instructions.get(name)
    while found is not None and found.opcode in ("copy", "bitcast", "convert"):
        found = next(iter(computation.operands(found)), None)
    return int(found.given) if found is not None and re.fullmatch(r"-?\d+", found.given) and found.opcode == "constant" else None


def _step(body: Computation, place: int) -> int | None:
    """What a loop's body adds to its counter, in as many additions as it likes."""
    found, total = body.instructions.get(_element(body, body.root.name, place)), 0
    while found is not None and found.opcode in ("add", "copy", "bitcast"):
        known = [_constant(body, name) for name in found.operands]
        total += next((number for number in known if number is not None), 0)
        found = next((one for one, number in zip(body.operands(found), known, strict=False) if number is None), None)
    return total or None


def parse(text: str) -> Module:
    """The program of XLA's text, as `compiled.as_text()` or a dump has it."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in re.sub(r'\n(?="|}})', "", text).splitlines():  # kernels' own notes are written over several
        header = _HEADER.match(line) if not line.startswith(" ") else None
        if header and not line.startswith("HloModule"):
            current = computations[header[2]] = Computation(header[2])
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _LINE.match(line)):
            current.instructions[found[2]] = _instruction(found[2], found[3], bool(found[1]))
    return Module(computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    shape, rest = _cut(text) if text.startswith("(") else text.split(" ", 1)
    opcode, _, rest = rest.strip().partition("(")
    given, rest = _cut("(" + rest)
    inner = given[1:-1]
    operands = re.findall(r"%([\w.\-]+)", inner) or re.findall(r"(?:^|[\s,])([a-zA-Z_][\w.\-]*)(?=,|$)", inner)
    return Instruction(name, shape, opcode, tuple(operands), rest, inner.strip(), root)


def _cut(text: str) -> tuple[str, str]:
    """A text that begins with a parenthesis, up to the one that closes it, and what follows."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return text[: place + 1], text[place + 1 :]
    return text, ""
