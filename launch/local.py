"""Several processes on this machine: one run of many processes, or many workers on one ablation.

python -m launch.local --processes=2 -- --experiment=experiments/c06_positional_encoding.py --workdir=runs/c06
python -m launch.local --workers=4 -- --experiment=experiments/c06_positional_encoding.py --workdir=runs/c06

Each process writes its own log; the first is shown as well. Ctrl-C and SIGTERM go to all of them, so that they save. Processes of
one run end together: when one fails, the others are told to stop, and killed after --grace seconds. Workers do not need each other.
The exit code is that of the first process that failed; among workers 0 if one ended well, which none does before all is done.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from absl import flags

from launch.command import LaunchError, Run, found, guarded, logs_beside, parse, say

FLAGS = flags.FlagValues()
flags.DEFINE_integer("processes", None, "Processes of one run, on loopback.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("workers", None, "Processes that share one ablation group by group.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("gpus_per_process", None, "GPUs that each process sees (default: all).", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("grace", 60.0, "Seconds that processes have to save before they are killed.", lower_bound=0.0, flag_values=FLAGS)
flags.DEFINE_integer("port", None, "The first process's port (default: a free one).", flag_values=FLAGS)
flags.DEFINE_string("logs", None, "The folder of the logs (default: WORKDIR-logs).", flag_values=FLAGS)
flags.DEFINE_string("python", sys.executable, "The interpreter.", flag_values=FLAGS)
flags.DEFINE_boolean("dry_run", False, "Print what would run; start nothing.", flag_values=FLAGS)

LOOK = 0.1  # seconds between looks at the processes
# what libraries below JAX say of every run of several processes; it stays in the logs
NOISE = re.compile(rb"\[Gloo\] Rank \d+ is connected|W\d{4} .*Using experimental recoverable task feature")


@dataclass(frozen=True)
class Process:
    """One process to start: `env` is set beside what is set already."""

    name: str
    argv: list[str]
    env: dict[str, str]
    log: pathlib.Path


def main(argv: Sequence[str]) -> int:
    """Runs the launcher; returns the exit code. Raises `LaunchError`."""
    run = Run(parse(FLAGS, argv, __doc__ or ""))
    if (FLAGS.processes is None) == (FLAGS.workers is None):
        raise LaunchError("give one of --processes=N (one run of N processes) and --workers=N (N workers on one ablation)")
    planned = plan(run)
    if FLAGS.dry_run:
        for process in planned:
            words = [f"{name}={shlex.quote(value)}" for name, value in process.env.items()]
            log, front = shlex.quote(str(process.log)), process is planned[0]
            print(*words, shlex.join(process.argv), f"2>&1 | tee -a {log} &" if front else f">>{log} 2>&1 &")
        return 0
    return supervise(planned, together=FLAGS.processes is not None, grace=FLAGS.grace)


def plan(run: Run) -> list[Process]:
    """The processes that the flags ask for."""
    count, kind = (FLAGS.workers, "worker") if FLAGS.workers else (FLAGS.processes, "process")
    logs = pathlib.Path(FLAGS.logs) if FLAGS.logs else logs_beside(run)
    port = FLAGS.port or _free_port()
    planned = []
    for index in range(count):
        own = ["--worker"] if FLAGS.workers else [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={index}"]
        env = {"PYTHONUNBUFFERED": "1"} | _gpus(index, count)
        name = f"{kind}-{index}"
        planned.append(Process(name, run.argv(FLAGS.python, *own), env, logs / f"{name}.log"))
    return planned


def supervise(planned: Sequence[Process], *, together: bool, grace: float) -> int:
    """Starts the processes and waits for them all; returns the exit code. together: one that fails ends the others."""
    asked: list[int] = []  # signals to pass on
    ended: dict[str, int] = {}  # exit codes, in the order in which they came
    running: dict[str, subprocess.Popen] = {}
    with _signals(asked), contextlib.ExitStack() as logs:
        logs.callback(_end, running, ended)
        for process in planned:
            running[process.name] = _start(process, front=not running, logs=logs)
        told, deadline = 0, None
        while len(ended) < len(running):
            _collect(planned, running, ended)
            if together and any(ended.values()) and not asked:
                asked.append(signal.SIGTERM)
            left = {name: child for name, child in running.items() if name not in ended}
            fresh = asked[told:]
            told += len(fresh)
            for number in fresh:
                _tell(left.values(), number)
            deadline = time.monotonic() + grace if fresh and deadline is None else deadline
            if deadline is not None and time.monotonic() > deadline:
                for name, child in left.items():
                    say(f"{name} did not end within {grace:g} s: killed")
                    _kill(child)
            time.sleep(LOOK)
    failures = [code for code in ended.values() if code]
    if not together and not asked and len(failures) < len(ended):
        return 0
    return failures[0] if failures else 0


def _collect(planned: Sequence[Process], running: dict[str, subprocess.Popen], ended: dict[str, int]) -> None:
    """Notes which processes have ended since, and ends what they left behind."""
    for process in planned:
        child = running[process.name]
        if process.name in ended or child.poll() is None:
            continue
        ended[process.name] = code = 128 - child.returncode if child.returncode < 0 else child.returncode
        _kill(child)
        if code:
            say(f"{process.name} ended with code {code}: {process.log}")


def _end(running: dict[str, subprocess.Popen], ended: dict[str, int]) -> None:
    """Leaves no process behind, whatever went wrong here."""
    for name, child in running.items():
        if name not in ended:
            _kill(child)


def _start(process: Process, *, front: bool, logs: contextlib.ExitStack) -> subprocess.Popen:
    """A process in a group of its own, so that a terminal's Ctrl-C comes from here alone, once."""
    process.log.parent.mkdir(parents=True, exist_ok=True)
    log = logs.enter_context(process.log.open("ab"))
    child = subprocess.Popen(
        found(process.argv),
        env=os.environ | process.env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if front else log,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    if front:
        copying = threading.Thread(target=_copy, args=(child.stdout, log), daemon=True)
        copying.start()
        logs.callback(copying.join, timeout=5.0)
    return child


def _copy(source, log) -> None:
    """All that comes from a pipe, line by line, to a log, and but for noise to standard output."""
    for line in source:
        log.write(line)
        log.flush()
        with contextlib.suppress(OSError):  # nobody reads it any more
            if not NOISE.match(line):
                sys.stdout.buffer.write(line)
                sys.stdout.buffer.flush()


@contextlib.contextmanager
def _signals(asked: list[int]) -> Iterator[None]:
    """Collects the signals that are to be passed on; a closed terminal counts as SIGTERM."""

    def note(number, _):
        asked.append(signal.SIGTERM if number == signal.SIGHUP else number)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(children: Iterable[subprocess.Popen], number: int) -> None:
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.send_signal(number)


def _kill(child: subprocess.Popen) -> None:
    """Ends a process with all that it started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)


def _gpus(index: int, count: int) -> dict[str, str]:
    """CUDA_VISIBLE_DEVICES of a process, out of those that are visible here. Raises `LaunchError` if they do not suffice."""
    each = FLAGS.gpus_per_process
    if each is None:
        return {}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = [str(number) for number in range(each * count)] if visible is None else visible.split(",") if visible else []
    if len(known) < each * count:
        raise LaunchError(
            f"--gpus_per_process={each} × {count} processes need {each * count} GPUs, and CUDA_VISIBLE_DEVICES is {visible}"
        )
    return {"CUDA_VISIBLE_DEVICES": ",".join(known[index * each : (index + 1) * each])}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv))
