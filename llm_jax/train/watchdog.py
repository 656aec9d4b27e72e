"""A thread that notices when training hangs, as on a collective that another host has left, and says where."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pathlib
import socket
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from llm_jax.core.distributed import leave

USUAL = 20  # so many usual dispatches may one take at least
STUCK = 75  # EX_TEMPFAIL: try again


@dataclass
class Watchdog:
    """Expects a sign of life every `seconds`, and at most every 20 usual dispatches; 0 for never.

    Without one it writes the stacks of all threads to a file in `folder` and says so on standard error, once. leaves: and ends the
    process with code 75, so that a scheduler starts it again: nothing else gets a thread out of a hung collective. What may take
    long and is no step (compilation, scoring) is `resting`.
    """

    folder: pathlib.Path = pathlib.Path(".")
    seconds: float = 0.0
    leaves: bool = False
    tell: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
    _step: int | None = None  # None: at rest
    _since: float = 0.0
    _took: deque[float] = field(default_factory=lambda: deque(maxlen=64))

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watchdog]:
        """Has the thread run meanwhile."""
        ended = threading.Event()
        thread = threading.Thread(target=self._watch, args=(ended,), name="watchdog", daemon=True)
        if self.seconds:
            thread.start()
        try:
            yield self
        finally:
            self._step = None
            ended.set()
            if self.seconds:
                thread.join()

    def alive(self, step: int) -> None:
        """A sign of life: so many steps have been handed to the devices."""
        now = time.monotonic()
        if self._step is not None:
            self._took.append(now - self._since)
        self._since, self._step = now, step

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Nothing is expected meanwhile."""
        step, self._step = self._step, None
        yield
        if step is not None:
            self.alive(step)

    @property
    def limit(self) -> float:
        """Seconds that there may be between two signs."""
        return max(self.seconds, USUAL * statistics.median(self._took) if self._took else 0.0)

    def _watch(self, ended: threading.Event) -> None:
        told = None  # the sign that was the last of one that hangs
        while True:
            over = ended.wait(min(1.0, self.seconds / 4))
            step, since = self._step, self._since
            if told is not None and since != told:
                self.tell("watchdog: training goes on")
                told = None
            if over:
                return
            late = time.monotonic() - since
            if step is not None and told is None and late > self.limit:
                told = since
                self._stuck(step, late)

    def _stuck(self, step: int, late: float) -> None:
        usual = f" (usually there is one every {statistics.median(self._took):.3g} s)" if self._took else ""
        where = self.folder / f"stuck-{socket.gethostname()}-{os.getpid()}.txt"
        try:
            with open(where, "a") as file:
                file.write(f"{time.strftime('%F %T')}: no sign of life for {late:.0f} s after step {step}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
            known = f"the stacks of all threads are in {where}"
        except OSError as error:  # the disk may be what it hangs on
            known = f"the stacks of all threads could not be written ({error.strerror})"
        self.tell(f"watchdog: no sign of life for {late:.0f} s after step {step}{usual}: {known}")
        if self.leaves:
            leave(STUCK)
