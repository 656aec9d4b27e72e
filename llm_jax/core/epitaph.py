"""What is said of a process that ends without a word of its own, by a child that outlives it."""

from __future__ import annotations

import atexit
import contextlib
import subprocess
import sys

_CHILD = "import sys; sys.stdin.buffer.read() or print(sys.argv[1], file=sys.stderr, flush=True)"


class Epitaph:
    """Has a sentence printed to standard error when this process is gone, killed or aborted, unless it was withdrawn before."""

    def __init__(self, sentence: str):
        line = [sys.executable, "-I", "-S", "-c", _CHILD, sentence]
        # in a session of its own, as what ends the process may be meant for all of its group
        self._child = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
        atexit.register(self.withdraw)

    def withdraw(self) -> None:
        """This process has said itself what there is to say."""
        atexit.unregister(self.withdraw)
        with contextlib.suppress(OSError, ValueError, subprocess.TimeoutExpired):  # the child is gone, was told, or is stopped
            self._child.communicate(b"said", timeout=10)
