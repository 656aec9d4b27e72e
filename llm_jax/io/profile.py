"""Where the time of a program goes: XLA's trace of some steps, and its summary by kind of operation.

An operation's kind is that of what it is made of: a fusion with a matrix product in it is a matrix product. That is read from the
compiled programs, which a trace holds beside its events (`/host:metadata`, as `HloProto`s).
"""

from __future__ import annotations

import json
import pathlib
import re
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from llm_jax.core.paths import copy_folder, in_bucket, remove_folder
from llm_jax.core.whole import safe, write_whole

PRODUCTS = {"dot", "convolution", "ragged-dot"}
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-", "ragged-all-to-all", "send", "recv")
COPIES = {"copy", "copy-start", "copy-done", "transpose", "concatenate", "pad", "slice", "reverse", "reshape", "bitcast-convert"}
COPIES |= {"dynamic-slice", "dynamic-update-slice", "gather", "scatter", "broadcast"}
ENTERED = {"fusion", "call", "async-start"}  # made of the computations that they call; loops have events for what is in them
# custom calls by their targets: libraries' products, and attention's kernels (Pallas' for TPU and GPU, cuDNN's)
PRODUCT_CALLS = re.compile(r"gemm|matmul|cublas|onednn|convForward|convBackward", re.IGNORECASE)
KERNEL_CALLS = re.compile(r"tpu_custom_call|mosaic|triton|fmha|flash|attention", re.IGNORECASE)
ATTENTION_KERNELS = re.compile(r"fmha|flash|sdpa", re.IGNORECASE)
PRODUCT_KERNELS = re.compile(r"convolution|dot|gemm|matmul|nvjet|cutlass|xmma")  # the last three are cuBLAS's names
NCCL, MOVES = re.compile(r"nccl", re.IGNORECASE), re.compile(r"memcpy|memset", re.IGNORECASE)
KINDS = ("matrix products", "attention kernels", "collectives", "copies", "fusions", "other", "idle")
TOP = 12  # operations that are named
FOLDER, SUMMARY = "profiles", "summary.json"

Classes = dict[str, dict[str, str]]  # program → operation → kind


class _Event(NamedTuple):
    device: str
    start: float
    stop: float
    name: str
    kind: str


@dataclass
class Profiler:
    """Traces the steps from `first` to before `last`, in whole dispatches, and what happens between these; off without a folder.

    The trace is for XProf and TensorBoard (`plugins/profile/…`); `summary.json` beside it is this module's `summary`, for reports.
    """

    folder: pathlib.Path | None = None
    first: int = 0
    last: int = 0
    label: str = ""
    _traced: list[int] | None = None  # the first step, and the one after the last
    _trace: pathlib.Path = pathlib.Path(".")  # where XLA writes, which is on a disk

    def before(self, step: int, after: int, pending: Any) -> None:
        """Training is about to go from `step` to `after`; pending: what devices are still working on."""
        if self.folder is None or self._traced is not None or after <= self.first:
            return
        jax.block_until_ready(pending)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # it would slow down what is measured
        self._trace = pathlib.Path(tempfile.mkdtemp(prefix="llm_jax-")) if in_bucket(self.folder) else self.folder
        jax.profiler.start_trace(self._trace, profiler_options=options)
        self._traced = [step, after]

    def after(self, step: int, pending: Any) -> None:
        """Training has come to `step`."""
        if self.folder is not None and self._traced is not None:
            self._traced[1] = step
            if step >= self.last:
                jax.block_until_ready(pending)
                self.close()

    def close(self) -> None:
        """Ends what has begun, and writes the summary."""
        if self.folder is None or self._traced is None:
            return
        folder, self.folder = self.folder, None  # whatever comes now, the trace has been ended
        jax.profiler.stop_trace()
        found = summary(self._trace)
        if self._trace != folder:
            copy_folder(self._trace, folder)
            remove_folder(self._trace)
        if found is not None and jax.process_index() == 0:
            write_whole(folder / SUMMARY, json.dumps({"label": self.label, "steps": self._traced} | found, indent=1) + "\n")


def once(workdir: pathlib.Path, steps: tuple[int, int] | None, arms: Iterable[str]) -> Profiler:
    """Of these steps of a program that trains these arms, unless a trace of them is in the work folder."""
    label = "+".join(dict.fromkeys(arms))
    folder = workdir / FOLDER / safe(label)[:100]
    return Profiler() if steps is None or (folder / SUMMARY).exists() else Profiler(folder, *steps, label=label)


def summaries(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Of all traces in a work folder."""
    return [json.loads(file.read_text()) for file in sorted((workdir / FOLDER).glob(f"*/{SUMMARY}"))]


def summary(folder: pathlib.Path) -> dict[str, Any] | None:
    """Of the newest trace in a folder; None where it tells of no operation.

    seconds: from the first operation to the last; devices: how many were traced; shares: kind → share of all devices' time, which
    add up to 1 ("idle": waiting for the host or each other); top: the operations that took longest, with kind and share.
    """
    files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
    if not files:
        return None
    content = files[-1].read_bytes()
    return summed(list(_events(jax.profiler.ProfileData.from_serialized_xspace(content), classes(content))))


def summed(events: list[_Event]) -> dict[str, Any] | None:
    """The summary of events, of which those of a device do not overlap."""
    if not events:
        return None
    devices = {event.device for event in events}
    seconds = (max(event.stop for event in events) - min(event.start for event in events)) / 1e9
    took, kinds = Counter[str](), {}
    for event in events:
        took[event.name] += event.stop - event.start
        kinds[event.name] = event.kind
    whole = max(seconds * 1e9 * len(devices), 1e-9)
    shares = dict.fromkeys(KINDS, 0.0)
    for name, time in took.items():
        shares[kinds[name]] += time / whole
    shares["idle"] = max(1 - sum(shares.values()), 0.0)
    top = [{"operation": n, "kind": kinds[n], "share": t / whole} for n, t in took.most_common(TOP)]
    return {"seconds": seconds, "devices": len(devices), "shares": shares, "top": top}


# ── events ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _events(data: Any, known: Classes) -> Iterator[_Event]:
    """What each device did when: of operations that hold others only what lies between these, and nothing twice."""
    found: dict[str, list[_Event]] = defaultdict(list)
    for plane in data.planes:
        lines = list(plane.lines)
        named = [line for line in lines if line.name == "XLA Ops"]  # a TPU tells of the same time by steps and modules too
        for line in named or lines:
            for event in line.events:
                stats = dict(event.stats)
                if named or "hlo_op" in stats:
                    one = _event(plane.name, event, stats, known)
                    found[one.device].append(one)
    for events in found.values():
        yield from _alone(events)


def _event(plane: str, event: Any, stats: Mapping[str, Any], known: Classes) -> _Event:
    name = str(stats.get("hlo_op") or event.name).partition(" = ")[0].lstrip("%")
    if name.startswith("command_buffer"):  # of a GPU: many kernels in one, and each is an event
        name = event.name
    program = known.get(str(stats.get("program_id"))) or known.get(str(stats.get("hlo_module"))) or {}
    kind = program.get(name) or _by_name(str(stats.get("hlo_category") or name))
    device = f"{plane} {stats['device_ordinal']}" if "CPU" in plane and "device_ordinal" in stats else plane
    return _Event(device, event.start_ns, event.start_ns + event.duration_ns, name, kind)


def _alone(events: Iterable[_Event]) -> Iterator[_Event]:
    """The stretches of a device's time, each given to the operation that began last of those that were running."""
    open_: list[_Event] = []
    at = 0.0

    def until(time: float) -> Iterator[_Event]:
        nonlocal at
        while open_:
            last = open_[-1]
            if min(last.stop, time) > at:
                yield last._replace(start=at, stop=min(last.stop, time))
                at = min(last.stop, time)
            if last.stop > time:
                break
            open_.pop()
        at = max(at, time)

    for event in sorted(events, key=lambda e: (e.start, -e.stop)):
        yield from until(event.start)
        open_.append(event)
    yield from until(float("inf"))


def _by_name(name: str) -> str:
    """The kind of an operation of which only the name, or the compiler's own category, is known."""
    if ATTENTION_KERNELS.search(name):
        return "attention kernels"
    if PRODUCT_KERNELS.search(name):
        return "matrix products"
    if NCCL.match(name):
        return "collectives"
    if MOVES.match(name):
        return "copies"
    if KERNEL_CALLS.search(name) or name.startswith("custom-call"):
        return "attention kernels"
    return _plain(re.sub(r"[.\d]+$", "", name))


def _plain(opcode: str) -> str:
    if opcode.startswith(COLLECTIVES):
        return "collectives"
    if opcode in COPIES:
        return "copies"
    return "fusions" if "fusion" in opcode else "other"


# ── programs ─────────────────────────────────────────────────────────────────────────────────────────────────────────
class _Instruction(NamedTuple):
    name: str
    opcode: str
    target: str
    calls: tuple[int, ...]


def classes(trace: bytes) -> Classes:
    """Program (by number, and by name) → operation → kind, from the compiled programs in a trace (an `XSpace`)."""
    found: Classes = {}
    for number, plane in _fields(trace):
        if number == 1 and any(key == 2 and value == b"/host:metadata" for key, value in _fields(plane)):
            for key, entry in _fields(plane):
                if key == 4:
                    found |= _program(dict(_fields(entry))[2])
    return found


def _program(metadata: bytes) -> Classes:
    """Of one `XEventMetadata`: its name is that of the program, with its number, and one of its stats the `HloProto`."""
    name = next((value.decode() for key, value in _fields(metadata) if key == 2), "")
    protos = [dict(_fields(stat)).get(6) for key, stat in _fields(metadata) if key == 5]
    bodies: dict[int, list[_Instruction]] = {}
    for proto in [proto for proto in protos if isinstance(proto, bytes)]:
        for key, module in _fields(proto):
            if key == 1:
                bodies |= dict(_computation(value) for at, value in _fields(module) if at == 3)
    kinds = {one.name: _kind(one, bodies) for body in bodies.values() for one in body}
    kinds = {re.sub(r"\W", "_", name): kind for name, kind in kinds.items()} | kinds  # the first as a GPU's kernels are called
    plain, _, number = name.rstrip(")").rpartition("(")
    return {number: kinds, plain: kinds}


def _computation(data: bytes) -> tuple[int, list[_Instruction]]:
    number = next((value for key, value in _fields(data) if key == 5), 0)
    return number, [_instruction(value) for key, value in _fields(data) if key == 2]


def _instruction(data: bytes) -> _Instruction:
    name = opcode = target = ""
    calls: list[int] = []
    for key, value in _fields(data):
        if key == 1:
            name = value.decode()
        elif key == 2:
            opcode = value.decode()
        elif key == 28:
            target = value.decode()
        elif key == 38:  # packed
            calls += _varints(value) if isinstance(value, bytes) else [value]
    return _Instruction(name, opcode, target, tuple(calls))


def _kind(one: _Instruction, bodies: Mapping[int, list[_Instruction]]) -> str:
    if one.opcode in PRODUCTS or (one.opcode == "custom-call" and PRODUCT_CALLS.search(one.target)):
        return "matrix products"
    if one.opcode == "custom-call":
        return "attention kernels" if KERNEL_CALLS.search(one.target) else "other"
    inner = [_kind(part, bodies) for call in one.calls for part in bodies.get(call, [])] if one.opcode in ENTERED else []
    return next((kind for kind in KINDS[:3] if kind in inner), None) or _plain(one.opcode)


def _varints(data: bytes) -> list[int]:
    found, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            found.append(value)
            value = shift = 0
    return found


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of a protocol buffer's fields: an int, or bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        begin = at
        while data[at] >= 128:
            at += 1
        at += 1
        return _varints(data[begin:at])[0]

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            yield key >> 3, varint()
            continue
        size = {1: 8, 5: 4}.get(key & 7) or varint()
        yield key >> 3, data[at : at + size]
        at += size
