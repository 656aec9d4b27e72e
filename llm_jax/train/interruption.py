"""Being asked to stop, by the SIGTERM of a machine that is taken away or by Ctrl-C: when to listen, and how to leave."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from llm_jax.core.distributed import leads, leave

_open: list[Stop] = []  # of this process's main thread, the innermost last
_farewells: list[Callable[[], None]] = []  # what others are to hear of a process that leaves at once
_POLLS = itertools.count()  # how often processes have asked each other: all as often, whatever they train


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop by a signal; what it did up to `step` is saved, unless that failed.

    step: None where nothing had been done that could be lost. It may come at any moment, and what lets Ctrl-C pass lets it pass.
    """

    def __init__(self, number: int, step: int | None = None, saved: bool = True):
        where = "from there" if saved else "from the last checkpoint that could be saved"
        at = f"at step {step}; the same command again goes on {where}"
        super().__init__(
            f"stopped {at}" if step is not None else "stopped at once; the same command again goes on from what is saved"
        )
        self.number, self.step, self.saved = number, step, saved

    @property
    def code(self) -> int:
        """What the process exits with: 0 for a preemption that lost nothing, else 128 and the signal's number.

        So 0 says "nothing is wrong", not "all is done": a scheduler that preempts requeues what it stopped by itself (SLURM's
        `PreemptMode=REQUEUE`); who restarts a job by its exit code asks besides whether the work folder has its report.
        """
        return 0 if self.number == signal.SIGTERM and self.saved else 128 + self.number


class Stop:
    """Whether to stop. at_stake: set by who has done something that must be saved first; before, a signal is obeyed at once.

    leaves: and then the process ends where it is, and nothing is raised.
    """

    def __init__(self, *, together: bool = False, leaves: bool = False):
        self.number: int | None = None
        self.at_stake, self.leaves, self._together, self._agreed = False, leaves, together, False

    def asked(self) -> bool:
        """Whether to stop here, as all processes are told at the same of their calls. Once it is true it stays so."""
        if not self._together:
            return self.number is not None
        if not self._agreed:
            from jax.experimental import multihost_utils

            self._agreed = multihost_utils.reached_preemption_sync_point(next(_POLLS))
            self.number = signal.SIGTERM if self._agreed else None
        return self._agreed

    def interrupted(self, step: int, saved: bool) -> Interrupted:
        """What to raise when that is done."""
        return Interrupted(self.number or signal.SIGTERM, step, saved)


@contextlib.contextmanager
def interruptions(*, together: bool = False, leaves: bool = False) -> Iterator[Stop]:
    """Turns SIGTERM and the first Ctrl-C into a question while something is at stake, and else into `Interrupted` at once.

    leaves: a signal that comes while nothing is at stake, here and in what is called from here, ends the process with that sentence
    and code instead. A command wants this: what is raised at any moment may be raised in a function that C++ calls (garbage
    collection, the keys of JAX's caches), which swallows it, or ends the process by SIGABRT.

    The second Ctrl-C does what it did before, for who does not want to wait; SIGTERM again changes nothing: schedulers send it
    twice, and SIGKILL when the time of grace is over. together: of several processes, whose SIGTERM JAX listens to, and has them
    agree. One that came too late to be asked for is passed on at the end, and one whose exception somebody swallowed, as garbage
    collection does, is obeyed by the next who asks.
    """
    if _open and (missed := _open[-1].number) is not None:
        raise Interrupted(missed)
    leaves = leaves or (bool(_open) and _open[-1].leaves)
    stop, previous = Stop(together=together, leaves=leaves), dict[int, Any]()

    def handle(number: int, _) -> None:
        if stop.number is None:
            stop.number = number
            signal.signal(signal.SIGINT, previous[signal.SIGINT])
        if not stop.at_stake:
            if leaves:
                _leave(Interrupted(number))
            raise Interrupted(number)

    _open.append(stop)
    try:
        for number in () if together else (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: the caller's signals are not ours to take
                previous[number] = signal.signal(number, handle)
        yield stop
    except Exception as error:
        if stop.number is None or stop.at_stake:
            raise
        raise Interrupted(stop.number) from error  # which is what a library made of it
    finally:
        _open.remove(stop)
        for number, handler in previous.items():
            signal.signal(number, handler)
    if stop.number is not None and stop.at_stake and previous:
        signal.raise_signal(stop.number)


@contextlib.contextmanager
def farewell(say: Callable[[], None]) -> Iterator[None]:
    """Has it called too if the process leaves at once meanwhile. It may fail, and must not wait for long."""
    _farewells.append(say)
    try:
        yield
    finally:
        _farewells.remove(say)


def _leave(interrupted: Interrupted) -> NoReturn:
    """Ends this process and its children without waiting for threads, which may be compiling for minutes."""
    if leads():
        os.write(sys.__stderr__.fileno(), f"{interrupted}\n".encode())  # what is interrupted may be a print
    for child in multiprocessing.active_children():
        child.kill()
    for say in _farewells:
        with contextlib.suppress(Exception):
            say()
    leave(interrupted.code)
