"""Who does what, agreed upon by files alone: workers give signs of life, and what a dead one had claimed is another's.

A worker rewrites its sign four times a lease. Another that has seen the same sign for a whole lease, by its own clock, takes the
worker for dead; the worker itself gives up before that, when its last sign is three quarters of a lease old (Gray and Cheriton
1989, Leases). So no clocks of two machines are ever compared; they need only run about equally fast. A claim is a file whose name
ends in a generation: the next generation is created by exactly one, and the newest is the owner's. A worker that stood still, even
with its clocks, as a paused machine does, finds the newer generation before it writes a result.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.core.distributed import farewells
from llm_jax.io.shared import Shared

SHORTEST = 2.0  # seconds of a lease
BEATS = 4  # signs of life in a lease
GIVES_UP = 0.75  # of a lease, after which a worker no longer counts on what it has claimed


def _clock() -> float:
    """Seconds that also pass while the machine is suspended, where the system tells them."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Lapsed(Exception):
    """This worker gave no sign of life for so long that another may have taken over what it had claimed."""


@dataclass(frozen=True)
class Claim:
    """The newest generation of what is claimed under a name. outcome: how it ended; None: it goes on, or was left."""

    name: str
    generation: int
    worker: str
    outcome: str | None = None

    @property
    def file(self) -> str:
        """Where it is written."""
        return f"claims/{self.name}.{self.generation}.json"

    @property
    def next(self) -> str:
        """Where whoever takes it over writes."""
        return replace(self, generation=self.generation + 1).file


class Signs:
    """The signs of life of all workers, as one observer has seen them. lease: what is assumed where a sign cannot be read."""

    def __init__(self, files: Shared, lease: float = 60.0, clock: Callable[[], float] = _clock):
        self._files, self._lease, self._clock = files, lease, clock
        self._seen: dict[str, tuple[dict[str, Any], float]] = {}
        self.moved: set[str] = set()
        self.gone: set[str] = set()

    def look(self) -> None:
        """Sees what has changed. Whoever left, or has not changed for a lease, is gone for good."""
        written = {name.removesuffix(".json") for name in self._files.names("workers")}
        for worker in sorted((written | set(self._seen)) - self.gone):
            before = self._clock()  # the sign is as old as the read that first saw it, and the silence ends before this one
            sign = self._files.read(f"workers/{worker}.json")
            known, since = self._seen.get(worker, ({}, 0.0))
            if sign is None or sign.get("left"):  # whoever is alone removes the signs of those that are gone
                self.gone.add(worker)
            elif worker not in self._seen or sign != known:
                self.moved |= {worker} & set(self._seen)
                self._seen[worker] = sign, self._clock()
            elif before - since > sign.get("lease", self._lease):
                self.gone.add(worker)

    def here(self) -> dict[str, dict[str, Any]]:
        """Worker → sign of those that may be alive."""
        return {worker: sign for worker, (sign, _) in list(self._seen.items()) if worker not in self.gone}

    def first(self, suspects: Iterable[str]) -> str | None:
        """The first of the suspects that gives another sign of life; None once all are gone. Takes a lease at most."""
        suspects = set(suspects) - self.gone
        while suspects and not suspects & self.moved:
            time.sleep(min(0.5, min(self._seen[one][0].get("lease", self._lease) for one in suspects) / (2 * BEATS)))
            self.look()
            suspects -= self.gone
        return next(iter(sorted(suspects & self.moved)), None)


def check_lease(seconds: float) -> None:
    """Raises `ConfigError` for a lease that is too short to be kept."""
    if seconds < SHORTEST:
        raise ConfigError(f"must be at least {SHORTEST:g} seconds, with {BEATS} signs of life in it, got {seconds:g}", "--lease")


class Crew:
    """A context in which this process is one of the workers that share a folder.

    lease: seconds. versions: what must be the same for all who work at the same time. alone: there must be no other; it claims
    nothing. note: called with a sentence where others are waited for. clock: seconds, from any start. Entering raises `ConfigError`
    where versions differ, where one of several would be alone, or where the file system does not let a file be created only once.
    """

    def __init__(
        self,
        files: Shared,
        *,
        lease: float = 60.0,
        versions: Mapping[str, str] | None = None,
        alone: bool = False,
        note: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = _clock,
    ):
        check_lease(lease)
        self.files, self.lease, self.versions, self.alone, self.note = files, lease, dict(versions or {}), alone, note
        self.signs, self._clock = Signs(files, lease, clock), clock
        self._held: Claim | None = None

    def __enter__(self) -> Crew:
        farewells.append(self._say_farewell)
        try:
            self._join()
        except BaseException:
            farewells.remove(self._say_farewell)
            raise
        return self

    def __exit__(self, *_) -> None:
        self._leave()
        farewells.remove(self._say_farewell)

    def rejoin(self) -> None:
        """Goes on as a worker of another name, which has claimed nothing yet."""
        self._leave()
        self._join()

    @property
    def others(self) -> int:
        """How many other workers are there, as far as is known."""
        return len(set(self.signs.here()) - {self.worker})

    def check(self) -> None:
        """Raises `Lapsed` if what this worker has claimed may be another's; costs nothing. Who is alone is, until told."""
        silent = self._clock() - self._renewed
        if self._lapsed.is_set() or (silent > GIVES_UP * self.lease and not self.alone):
            self._lapsed.set()
            raise Lapsed(f"no sign of life for {silent:.0f} seconds")

    def confirm(self) -> None:
        """The same, and looks whether there is a newer generation of what is claimed: before what cannot be undone.

        One that is alone looks whether its sign is still there, which another removes that comes to be alone.
        """
        self.check()
        if self.files.read(self._file) is None if self.alone else self._held and self.files.read(self._held.next) is not None:
            self._lapsed.set()
            raise Lapsed(f"another {'run' if self.alone else 'worker'} has taken over")

    def beat(self) -> None:
        """Gives a sign of life, and looks at the others'. Raises `Lapsed`."""
        began = self._clock()
        self.confirm()
        self._beat += 1
        self.files.write(self._file, self._sign())
        self._renewed = began
        self.signs.look()

    def claims(self) -> dict[str, Claim]:
        """Name → newest generation of all that is claimed, whose file is not read yet: `told` does that."""
        found: dict[str, Claim] = {}
        for file in self.files.names("claims"):
            name, generation = file.removesuffix(".json").rsplit(".", 1)
            if name not in found or found[name].generation < int(generation):
                found[name] = Claim(name, int(generation), "")
        return found

    def told(self, claim: Claim) -> Claim:
        """The claim with its worker and outcome."""
        said = self.files.read(claim.file) or {}
        return replace(claim, worker=said.get("worker", ""), outcome=said.get("outcome"))

    def claim(self, name: str, last: Claim | None) -> Claim | None:
        """Claims a name whose newest claim is `last`; None if another has it, or is faster. Raises `Lapsed`."""
        if last is not None and last.outcome is None and last.worker not in self.signs.gone:
            return None
        mine = Claim(name, last.generation + 1 if last else 1, self.worker)
        self.check()
        if not self.files.create(mine.file, {"worker": self.worker, "outcome": None}):
            return None
        self.check()
        self._held = mine
        return mine

    def release(self, claim: Claim, outcome: str) -> None:
        """Tells all how it ended; whoever has taken it over is not disturbed."""
        self.files.write(claim.file, {"worker": claim.worker, "outcome": outcome})
        self._held = None

    def pause(self) -> None:
        """Until it is worth looking what the others have done. Raises `Lapsed`."""
        time.sleep(min(self.lease / BEATS, 5.0))
        self.check()

    def _join(self) -> None:
        host = re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname())
        self.worker = f"{host}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._beat, self._held, self._lapsed, self._left = 0, None, threading.Event(), threading.Event()
        began = self._clock()
        if not self.files.create(self._file, self._sign()) or self.files.create(self._file, self._sign() | {"beat": -1}):
            raise ConfigError(
                "lies where two processes can create the same file: workers need another file system, e.g. NFS or a bucket",
                str(self.files.folder),
            )
        self._renewed = began
        took = self._clock() - began
        if took > self.lease / BEATS:
            if self.alone:
                raise ConfigError(f"is too slow: a sign of life took {took:.1f} s", str(self.files.folder))
            raise ConfigError(
                f"is too short: a sign of life took {took:.1f} s; give {10 * took:.0f} seconds or more", f"--lease={self.lease:g}"
            )
        self._thread = threading.Thread(target=self._live, name="signs of life", daemon=True)
        self._thread.start()
        try:
            self._refuse_others()
            if self.alone:
                _remove(self.files, self.signs.gone - {self.worker})
        except BaseException:
            self._leave()
            raise

    def _refuse_others(self) -> None:
        """Of two who come at once each sees the other: a sign is written before others' are read."""
        self.signs.look()
        others = {worker: sign for worker, sign in self.signs.here().items() if worker != self.worker}
        _refuse(self.signs, (w for w, sign in others.items() if self.alone or sign.get("alone")), self.files, self.note)
        found = self.signs.first(worker for worker, sign in others.items() if sign.get("versions", {}) != self.versions)
        if found is not None:
            theirs = others[found].get("versions", {})
            names = [n for n in dict.fromkeys([*theirs, *self.versions]) if theirs.get(n) != self.versions.get(n)]
            differ = ", ".join(f"{n} is {theirs.get(n)} there and {self.versions.get(n)} here" for n in names)
            raise ConfigError(
                f"has a worker ({found}) of other code or libraries: {differ}. Start all from the same, or let the others end",
                str(self.files.folder),
            )

    def _say_farewell(self) -> None:
        self._leave(wait=1.0)

    def _leave(self, wait: float | None = None) -> None:
        self._left.set()
        if hasattr(self, "_thread"):
            self._thread.join(self.lease if wait is None else wait)
        with contextlib.suppress(Exception):  # a full disk, a network that is gone: the lease runs out
            self.files.write(self._file, self._sign() | {"left": True})

    def _live(self) -> None:
        """What a thread does until the worker leaves or was silent for too long."""
        while not self._left.wait(self.lease / BEATS):
            try:
                self.beat()
            except Lapsed:
                return
            except Exception:  # whatever a disk or a bucket's driver raises: another try, until the lease is over
                continue

    def _sign(self) -> dict[str, Any]:
        return {"beat": self._beat, "lease": self.lease, "left": False, "versions": self.versions, "alone": self.alone}

    @property
    def _file(self) -> str:
        return f"workers/{self.worker}.json"


def clear(files: Shared, note: Callable[[str], None]) -> None:
    """Removes all signs and claims of workers that are gone. Raises `ConfigError` if one is alive, which takes a lease to see."""
    signs = Signs(files)
    signs.look()
    _refuse(signs, signs.here(), files, note)
    _remove(files, signs.gone)


def _refuse(signs: Signs, workers: Iterable[str], files: Shared, note: Callable[[str], None]) -> None:
    """Raises `ConfigError` if one of these is alive."""
    suspects = sorted(workers)
    if suspects:
        note(f"{files.folder}: waiting for a sign of life of {', '.join(suspects)}, which did not say that it left")
    found = signs.first(suspects)
    if found is not None:
        ways = "let it end, choose another --workdir, or run all with --worker"
        raise ConfigError(f"is in use by another ({found}): {ways}", str(files.folder))


def _remove(files: Shared, gone: Iterable[str]) -> None:
    for name in ["claims", "groups", *(f"workers/{worker}.json" for worker in gone)]:
        files.remove(name)
