"""Being asked to stop, by the SIGTERM of a machine that is taken away or by Ctrl-C: when to listen, and how to leave."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Iterator
from typing import Any, NoReturn

from llm_jax.core.distributed import leads, leave

_open: list[Stop] = []  # of this process's main thread, the innermost last
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

    leaves: and then the process ends where it is, and nothing is raised. obeyed: what says so is being raised.
    """

    def __init__(self, *, together: bool = False, leaves: bool = False):
        self.number: int | None = None
        self.previous = dict[int, Any]()  # number → handler
        self.at_stake, self.obeyed, self.leaves, self._together, self._agreed = False, False, leaves, together, False

    def asked(self) -> bool:
        """Whether to stop here, as all processes are told at the same of their calls. Once it is true it stays so."""
        if not self._together:
            return self.number is not None
        if not self._agreed:
            from jax.experimental import multihost_utils

            self._agreed = multihost_utils.reached_preemption_sync_point(next(_POLLS))
            self.number = signal.SIGTERM if self._agreed else None
        return self._agreed

    def handle(self, number: int, _: Any) -> None:
        """What a signal does."""
        if self.obeyed and number == signal.SIGTERM:
            return
        if self.number is None:
            self.number = number
            signal.signal(signal.SIGINT, self.previous[signal.SIGINT])
        if not self.at_stake:
            if self.leaves:
                _leave(Interrupted(number))
            raise Interrupted(number)

    def interrupted(self, step: int, saved: bool) -> Interrupted:
        """What to raise when that is done."""
        return Interrupted(self.number or signal.SIGTERM, step, saved)


@contextlib.contextmanager
def interruptions(*, together: bool = False, leaves: bool = False) -> Iterator[Stop]:
    """Turns SIGTERM and the first Ctrl-C into a question while something is at stake, and else into `Interrupted` at once.

    leaves: a signal that comes while nothing is at stake, here and in what is called from here, ends the process with that sentence
    and code instead. A command wants this: what is raised at any moment may be raised in a function that C++ calls (garbage
    collection, the keys of JAX's caches), which swallows it, or ends the process by SIGABRT.
    together: of several processes, whose SIGTERM JAX listens to, and has them agree.

    The second Ctrl-C does what it did before, for who does not want to wait; SIGTERM again changes nothing: schedulers send it
    twice, and SIGKILL when the time of grace is over. One that came too late to be asked for is passed on at the end.
    """
    stop = Stop(together=together, leaves=leaves or any(outer.leaves for outer in _open))
    _open.append(stop)
    try:
        for number in () if together else (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: the caller's signals are not ours to take
                stop.previous[number] = signal.signal(number, stop.handle)
        yield stop
    except Interrupted:
        for outer in _open:
            outer.obeyed = True
        raise
    except Exception as error:
        if stop.number is None or stop.at_stake:
            raise
        raise Interrupted(stop.number) from error  # which is what a library made of it
    finally:
        _open.remove(stop)
        for number, handler in stop.previous.items():
            signal.signal(number, handler)
    if stop.number is not None and stop.at_stake and stop.previous:
        signal.raise_signal(stop.number)


def _leave(interrupted: Interrupted) -> NoReturn:
    """Ends this process and its children without waiting for threads, which may be compiling for minutes."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the second one does not wait for farewells
    with contextlib.suppress(Exception):  # nobody may be listening
        if leads():
            os.write(2, f"{interrupted}\n".encode())  # what is interrupted may be a print
    with contextlib.suppress(Exception):
        for child in multiprocessing.active_children():
            child.kill()
    leave(interrupted.code)
