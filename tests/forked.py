"""`python -m llm_jax …` without the start of an interpreter: a process of its own, forked from one that has imported what it needs.

Imports are most of a short run. Where processes are many, and what is shown is what becomes of them, a fork is as good: it has the
flags, the environment, the signals and the files of the command.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from jax._src import cache_key

OURS = ["llm_jax.cli.run", "llm_jax.lab.presets", "llm_jax.lab.report", "llm_jax.lab.runner"]
OTHERS = ["grain", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg", "orbax.checkpoint", "tensorboardX"]
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([*OURS, *OTHERS])


def started(
    command: Sequence[str],
    env: Mapping[str, str],
    out: pathlib.Path,
    err: pathlib.Path | None = None,
    cwd: pathlib.Path | None = None,
) -> subprocess.Popen:
    """The command itself, where it is to be."""
    with open(out, "a") as said, open(err or out, "a") as told:
        return subprocess.Popen(command, env=env, stdout=said, stderr=told, cwd=cwd)


class Forked:
    """The process of a command, with `subprocess.Popen`'s names; what it says goes to files."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], out: pathlib.Path, err: pathlib.Path | None = None):
        assert list(command[:3]) == [sys.executable, "-m", "llm_jax"], command
        for file in (out, err or out):
            open(file, "a").close()  # it is there from now on
        self._process = SERVER.Process(target=_run, args=(list(command[3:]), dict(env), out, err or out), daemon=True)
        self._process.start()
        atexit.register(self.kill)  # before `multiprocessing` asks it to end and waits, which one that was stopped never does
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None: it runs."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, when there is one. Raises `subprocess.TimeoutExpired`."""
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired("python -m llm_jax", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        """Sends it, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)


def _run(argv: list[str], env: dict[str, str], out: pathlib.Path, err: pathlib.Path) -> None:
    late = [name for name in {**os.environ, **env} if name.startswith("JAX_") and env.get(name) != os.environ.get(name)]
    assert not late, f"JAX has been imported and does not read {late} again"
    os.environ.clear()
    os.environ.update(env)
    for file, number in ((out, 1), (err, 2)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.argv = ["llm_jax", *argv]
    # of several processes on CPUs each has a key of its own, and only the first one's is written: the others would always compile
    assert cache_key._hash_accelerator_config
    cache_key._hash_accelerator_config = cache_key._hash_devices
    from llm_jax.__main__ import main

    sys.exit(main())
