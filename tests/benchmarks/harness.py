"""Programs measured in turn: each is a process that warms up once and then does timed pieces of work when it is asked to.

Three lines of protocol on a worker's standard output and input: it prints `ready {json}`, is sent `run N`, and answers
`done {json}`; the end of its input ends it. Anything else that it prints is ignored, so a worker can be any program. The
pieces of all workers are interleaved and ratios are taken round by round: a machine that slows down slows both sides. A piece
during which other processes were busy is taken again. Only the standard library is needed, on Linux.
"""

from __future__ import annotations

import json
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

HERE = pathlib.Path(__file__).parent
TICKS = os.sysconf("SC_CLK_TCK")
BUSY = 0.10  # cores used by others from which on a piece does not count


# ── a worker's side ──────────────────────────────────────────────────────────────────────────────────────────────────
def requests(**info: Any) -> Iterator[int]:
    """Says `ready` with the info, then yields how many units of work to do; asking for the next one says `done`."""
    print("ready", json.dumps(info), flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        yield int(line.split()[1])
        print("done", json.dumps({"seconds": time.perf_counter() - start}), flush=True)


def age() -> float:
    """Seconds since this process was started, by the kernel's clock: its imports are in it."""
    started = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / TICKS
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


# ── what else the machine does ───────────────────────────────────────────────────────────────────────────────────────
def machine_seconds() -> float:
    """CPU seconds that all processes, and other machines on the same hardware (steal), have used since the machine started."""
    user, nice, system, _, _, irq, softirq, steal = map(int, pathlib.Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + irq + softirq + steal) / TICKS


def own_seconds() -> float:
    """CPU seconds that this process and its descendants have used, those that ended and were waited for included."""
    parent, used = {}, {}
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it ended meanwhile
                continue
            parent[int(entry.name)], used[int(entry.name)] = int(fields[1]), sum(map(int, fields[11:15]))

    def ours(process: int) -> bool:
        while process not in (0, os.getpid()):
            process = parent.get(process, 0)
        return process != 0

    return sum(ticks for process, ticks in used.items() if ours(process)) / TICKS


@dataclass
class Watch:
    """Counts seconds, and how many cores others used meanwhile."""

    start: float = field(default_factory=time.monotonic)
    machine: float = field(default_factory=machine_seconds)
    own: float = field(default_factory=own_seconds)

    def read(self) -> tuple[float, float]:
        """Seconds since the start, cores that others used on average."""
        seconds = time.monotonic() - self.start
        others = (machine_seconds() - self.machine) - (own_seconds() - self.own)
        return seconds, max(others, 0.0) / max(seconds, 1e-3)


def wait_for_quiet(patience: float, window: float = 0.3) -> None:
    """Returns when others leave the machine alone, or after `patience` seconds."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        watch = Watch()
        time.sleep(window)
        if watch.read()[1] < BUSY:
            return


# ── the driver's side ────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Side:
    """A program to measure. unit: what one unit of its work counts for (tokens, FLOPs, …), unless its `ready` says."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)


class Worker:
    """A started side; `info` is what its `ready` said, `startup` the seconds until then."""

    def __init__(self, side: Side, log: pathlib.Path):
        self.side, self.log, watch = side, log, Watch()
        with open(log, "w") as errors:
            self.process = subprocess.Popen(
                side.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=os.environ | side.environment,
            )
        self.info = self._answer("ready")
        self.startup = watch.read()[0]

    def _answer(self, tag: str) -> dict[str, Any]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(tag + " "):
                return json.loads(line.removeprefix(tag))
        self.stop()
        tail = self.log.read_text(errors="replace").strip().splitlines()[-15:]
        raise RuntimeError(f"{self.side.name} ended early:\n" + "\n".join(tail))

    def run(self, units: int) -> tuple[float, float]:
        """(seconds for so many units, cores that others used meanwhile)."""
        assert self.process.stdin is not None
        watch = Watch()
        self.process.stdin.write(f"run {units}\n")
        self.process.stdin.flush()
        seconds = self._answer("done")["seconds"]
        return seconds, watch.read()[1]

    def stop(self) -> None:
        """Ends the process."""
        try:
            self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()


@dataclass(frozen=True)
class Rates:
    """Units a second of every side in every round; `disturbed` counts pieces kept although others were busy."""

    rates: Mapping[str, Sequence[float]]
    info: Mapping[str, Mapping[str, Any]]
    startup: Mapping[str, float]
    disturbed: int

    def median(self, name: str) -> float:
        """A side's typical rate."""
        return statistics.median(self.rates[name])

    def ratio(self, name: str, base: str) -> tuple[float, float, float]:
        """Median, least and greatest of the per-round ratios of two sides."""
        ratios = [a / b for a, b in zip(self.rates[name], self.rates[base], strict=True)]
        return statistics.median(ratios), min(ratios), max(ratios)


def interleave(sides: Sequence[Side], *, rounds: int, seconds: float, logs: pathlib.Path, patience: float, retakes: int) -> Rates:
    """Every side in every round for about so many seconds, forwards and backwards by turns.

    Raises `RuntimeError` if one ends early.
    """
    workers: list[Worker] = []
    try:
        for side in sides:
            workers.append(Worker(side, logs / f"{side.name.replace(' ', '-')}.log"))
        units = {w.side.name: _units(w, seconds) for w in workers}
        rates: dict[str, list[float]] = {w.side.name: [] for w in workers}
        disturbed = 0
        for index in range(rounds):
            for worker in workers if index % 2 == 0 else workers[::-1]:
                name = worker.side.name
                taken, others = _undisturbed(worker, units[name], patience, retakes)
                disturbed += others >= BUSY
                rates[name].append(units[name] * worker.info["unit"] / taken)
        return Rates(rates, {w.side.name: w.info for w in workers}, {w.side.name: w.startup for w in workers}, disturbed)
    finally:
        for worker in workers:
            worker.stop()


def _units(worker: Worker, seconds: float) -> int:
    """Units of work that take about so long."""
    taken, _ = worker.run(1)
    if taken < seconds / 4:  # a single unit may be too short to judge by
        more = max(int(seconds / 4 / taken), 1)
        taken = worker.run(more)[0] / more
    return max(round(seconds / taken), 1)


def _undisturbed(worker: Worker, units: int, patience: float, retakes: int) -> tuple[float, float]:
    """The first of a few tries during which others were quiet, or the quietest."""
    tries = []
    for _ in range(1 + retakes):
        wait_for_quiet(patience)
        tries.append(worker.run(units))
        if tries[-1][1] < BUSY:
            break
    return min(tries, key=lambda t: t[1])


def timed(
    command: Sequence[str], *, environment: Mapping[str, str], log: pathlib.Path, patience: float
) -> tuple[float, float, str]:
    """Runs a program to its end: (seconds, cores that others used, its output). Raises `RuntimeError` if it fails."""
    wait_for_quiet(patience)
    watch = Watch()
    with open(log, "w") as errors:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | environment, check=False)
    seconds, others = watch.read()
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").strip().splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")
    return seconds, others, done.stdout


# ── the machine's peak ───────────────────────────────────────────────────────────────────────────────────────────────
def peaks(peer_python: str | None, compute: str = "float32") -> list[Side]:
    """Sides that multiply matrices with NumPy (in float32), JAX and, where there is one, the peer's PyTorch."""
    worker = str(HERE / "worker_peak.py")
    libraries = ("numpy", "jax") if compute == "float32" else ("jax",)
    own = {"JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    sides = [Side(f"peak {library}", [sys.executable, worker, library, compute], own) for library in libraries]
    return sides + ([Side("peak torch", [peer_python, worker, "torch", compute])] if peer_python else [])


def peak(rates: Rates) -> float:
    """The machine's matrix-product peak, FLOP/s: the best of the libraries' medians."""
    return max(rates.median(name) for name in rates.rates if name.startswith("peak "))
