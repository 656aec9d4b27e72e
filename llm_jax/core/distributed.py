"""One program on several processes: how they find each other, that all run the same, what they agree on, and who is missing.

Processes speak through the coordination service of `jax.distributed`, which the first of them runs; arrays take other ways.
"""

from __future__ import annotations

import _thread
import contextlib
import itertools
import json
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from llm_jax.core import platform
from llm_jax.core.config import ConfigError
from llm_jax.core.epitaph import Epitaph

PATIENCE = 300  # seconds that processes wait for each other where all must meet
UNEVEN = 3600  # the same where some may compile, read or write for much longer than others; who dies meanwhile is told by `_watch`
GOODBYE = 5  # seconds for which a process that gives up waits for others that may do so too
TELL = 5  # seconds after which a process that has failed, perhaps alone, says so
NOTHING = "llm_jax/nothing"  # a key that nobody sets before the end

_turns: dict[str, Iterator[int]] = defaultdict(itertools.count)
_leaving = threading.Event()
_watcher: threading.Thread | None = None
_epitaph: Epitaph | None = None

farewells: list[Callable[[], None]] = []  # what is called, by another thread, when this process leaves
FAREWELL = 10.0  # seconds


class Missing(RuntimeError):
    """Processes of the job are gone, or never came. The sentence names them."""


def start(*, coordinator: str | None = None, processes: int | None = None, process: int | None = None, heartbeat: int = 30) -> None:
    """Joins this process to the others, before JAX opens a backend.

    coordinator: HOST:PORT of the first; without any of the three they are found by what SLURM, Open MPI, GKE or Cloud TPU says of
    the job. heartbeat: seconds without a sign of life after which a process counts as dead. Raises `ConfigError` where they are not
    found, or do not come.
    """
    import jax

    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    absent = [flag for flag, value in given.items() if value is None]
    if 0 < len(absent) < len(given):
        raise ConfigError(f"is missing beside {' and '.join(f for f in given if f not in absent)}: give all three", absent[0])
    if processes is not None and process is not None and not 0 <= process < processes:
        raise ConfigError(f"must be at least 0 and below --processes={processes}, got {process}", "--process")
    if os.environ.get("JAX_PLATFORMS") in (None, "", "cpu"):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_cpu_enable_async_dispatch", False)  # programs under way together can wait for each other without end
    jax.config.update("jax_enable_recoverability", True)  # the death of a process is told to `_watch`, which says who it was
    try:
        jax.distributed.initialize(
            coordinator, processes, process, heartbeat_timeout_seconds=heartbeat, initialization_timeout=PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        ways = "give --coordinator=HOST:PORT --processes=N --process=I to each" if coordinator is None else "start all of them"
        if isinstance(error, ValueError) and coordinator is None:
            told = "knows of no other processes, since neither SLURM, Open MPI, GKE nor Cloud TPU says here who they are"
            raise ConfigError(f"{told}: {ways}, or leave it out for a run of one", "--distributed") from None
        raise ConfigError(f"cannot join the other processes within {PATIENCE} s ({reason}): {ways}", "--distributed") from None
    if several():
        _client().key_value_set(f"llm_jax/hosts/{index()}", f"{socket.gethostname()}, pid {os.getpid()}")
        global _watcher, _epitaph  # noqa: PLW0603 (of one process there is one)
        if not leads():  # JAX ends the others at once when the first dies, which runs its service, and does not say who that was
            _client().blocking_key_value_get("llm_jax/hosts/0", PATIENCE * 1000)
            _epitaph = Epitaph(
                f"error: {_names([index()])} ended without a word: it was killed, or {_names([0])} is gone: run the same command "
                "again, it goes on from the last checkpoint"
            )
            farewells.append(_epitaph.withdraw)
        _watcher = threading.Thread(target=_watch, args=(heartbeat,), name="other processes", daemon=True)
        _watcher.start()


def end() -> None:
    """Waits for the others before this process, which has done its part, exits; the first is the last to. Raises `Missing`."""
    if not several():
        return
    import jax

    _leaving.set()
    meet("the end")
    if leads():
        _client().key_value_set(NOTHING, "")  # so that nobody waits for it any longer
    if _watcher is not None:
        _watcher.join(PATIENCE)
    _see_off(PATIENCE)
    jax.distributed.shutdown()
    if _epitaph is not None:
        _epitaph.withdraw()


def one_of_many() -> str | None:
    """What the environment says of other processes that this one would wait for, the end of a sentence; None: nothing."""
    for where, count, own in (
        ("SLURM step", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
        ("Open MPI job", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ):
        size = os.environ.get(count, "1")
        if size.isdigit() and int(size) > 1:
            return f"process {os.environ.get(own, '?')} of a {where} of {size}"
    return host_of_many()


def host_of_many() -> str | None:
    """The same of the hosts of a TPU, which sees no device before all are there, but where its bounds are set to those of one."""
    if os.environ.get("TPU_PROCESS_BOUNDS") == "1,1,1":
        return None
    slices = os.environ.get("MEGASCALE_NUM_SLICES", "1")
    if slices.isdigit() and int(slices) > 1:
        return f"a process of slice {os.environ.get('MEGASCALE_SLICE_ID', '?')} of {slices} that are one TPU job"
    told = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES", "")
    hosts = [name for name in told.split(",") if name] or _hosts_of_tpu()
    if len(hosts) > 1:
        return f"host {os.environ.get('TPU_WORKER_ID', '?')} of a TPU slice of {len(hosts)}"
    return None


def _hosts_of_tpu() -> list[str]:
    """The hosts of the slice that this Cloud TPU VM belongs to, as its metadata have it; none elsewhere."""
    with contextlib.suppress(Exception):  # whatever a metadata server may answer
        from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

        if GceTpuCluster.is_env_present():
            return [str(number) for number in range(GceTpuCluster.get_process_count())]
    return []


def several() -> bool:
    """Whether this process is one of several."""
    return count() > 1


def count() -> int:
    """Processes of the job."""
    return getattr(_joined(), "num_processes", None) or 1


def index() -> int:
    """Which of them this is, from 0."""
    return getattr(_joined(), "process_id", None) or 0


def _joined() -> Any:
    """JAX's own state of it; None: JAX was not imported, or not to the end, and cannot be now, as when it was interrupted there."""
    return getattr(sys.modules.get("jax._src.distributed"), "global_state", None)


def leads() -> bool:
    """Whether this is the process that writes and speaks for all."""
    return index() == 0


# ── meeting and agreeing ─────────────────────────────────────────────────────────────────────────────────────────────
def meet(where: str, *, seconds: float = PATIENCE) -> None:
    """Returns when all processes have called it. Raises `Missing` after so many seconds, with the names of those that have not."""
    if not several():
        return
    name = f"llm_jax/meet/{where}/{next(_turns['meet ' + where])}"
    _client().key_value_set(f"{name}/{index()}", "")
    try:
        _client().wait_at_barrier(name, int(seconds * 1000))
    except Exception as error:
        raise Missing(f"waited {seconds:g} s at {where!r} for {_names(_absent(name))}") from error


def abreast(where: str) -> None:
    """Returns when all are here: before programs that run on all, where one that comes late is not waited for. Raises `Missing`."""
    if several() and platform.traits().messages_give_up:
        meet(where, seconds=UNEVEN)


def agreed(what: str, value: Any) -> Any:
    """The first process's `value`, JSON, on all of them; what the others give is not looked at. Raises `Missing`."""
    if not several():
        return value
    key = f"llm_jax/agreed/{what}/{next(_turns['agreed ' + what])}"
    if leads():
        _client().key_value_set(key, json.dumps(value))
        return value
    try:
        return json.loads(_client().blocking_key_value_get(key, PATIENCE * 1000))
    except Exception as error:
        raise Missing(f"waited {PATIENCE} s for {_names([0])} to say {what!r}") from error


def led(what: str, act: Callable[[], Any]) -> Any:
    """What `act`, called on the first process alone, returns there, as JSON; a `ConfigError` of it is everyone's."""
    said: dict[str, Any] = {}
    if leads():
        try:
            said = {"result": act()}
        except ConfigError as error:
            agreed(what, {"error": str(error)})
            raise
    said = agreed(what, said)
    if "error" in said:
        raise ConfigError(said["error"])
    return said["result"]


def failed_together(what: str, *, seconds: float = PATIENCE, error: Exception | None = None) -> bool:
    """After an error of this process: whether all have had one; alone it is the only one. If others take their time, it is told."""
    told = f"process {index()}: {type(error).__name__}: {error}: waiting {seconds:g} s for the others, which may have had it too"
    teller = threading.Timer(TELL, lambda: print(told, file=sys.stderr, flush=True))
    teller.daemon = True
    if several() and error is not None:
        teller.start()
    try:
        meet(what, seconds=seconds)  # `_watch` ends the process before, if another is gone
    except Missing:
        return False
    finally:
        teller.cancel()
    return True


def give_up(text: str, code: int) -> NoReturn:
    """Ends one of several processes after an error; where all have had one the first alone says what it was."""
    _leaving.set()
    together = failed_together("giving up", seconds=GOODBYE)
    if leads() or not together:
        print(text, file=sys.stderr)
    if together:
        _see_off(GOODBYE)
    leave(code)


def _see_off(seconds: float) -> None:
    """Says that this process leaves; the first, whose end ends the others, waits so long for all to have said it."""
    _client().key_value_set(f"llm_jax/left/{index()}", "")
    until = time.monotonic() + seconds
    while leads() and _absent("llm_jax/left") and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5 * leads())  # in which the last of them says goodbye


def first_said(what: str, value: str | None) -> str | None:
    """Of what all processes say, that of the first that says something; None: none does. Raises `Missing`."""
    return next((own for own in everyones(what, value or "") if own), None)


def require_same(what: str, value: str) -> None:
    """Raises `ConfigError` on every process unless all give the same value; it names who differs from the first."""
    found = everyones(what, value)
    others = [process for process, own in enumerate(found) if own != found[0]]
    if others:
        told = f"{_names(others)} has {found[others[0]]!r} and {_names([0])} {found[0]!r}"
        raise ConfigError(f"differs: {told}; install the same everywhere and start again", what)


def everyones(what: str, value: str) -> list[str]:
    """What all processes say, in their order. Raises `Missing`."""
    if not several():
        return [value]
    name = f"llm_jax/said/{what}/{next(_turns['said ' + what])}"
    _client().key_value_set(f"{name}/{index()}", value)
    meet(what)
    found = {int(key.rpartition("/")[2]): own for key, own in _client().key_value_dir_get(name)}
    return [found[process] for process in range(count())]


def leave(code: int) -> NoReturn:
    """Ends this process where it stands, without waiting for others or for its threads, as an ordinary exit does.

    Farewells have `FAREWELL` seconds. A handler of signals may call it.
    """
    try:
        said = _thread.allocate_lock()
        said.acquire()
        _thread.start_new_thread(_say, (said,))  # not `threading`'s, whose lock may be held by what a signal has interrupted
        said.acquire(timeout=FAREWELL)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # closed, full, or interrupted while it wrote
                stream.flush()
    finally:
        os._exit(code)


def _say(said: _thread.LockType) -> None:
    for farewell in farewells:
        with contextlib.suppress(BaseException):
            farewell()
    said.release()


def _watch(heartbeat: float) -> None:
    """Ends this process, with a sentence, when another is gone: what it waits for, maybe inside a program, will never come."""
    everyone = list(range(count()))
    while not _leaving.is_set():
        try:
            gone = sorted(set(everyone) - set(_client().get_live_nodes(everyone)))
            if not gone:
                _pause(heartbeat / 3)
        except Exception:  # the service is gone, and with it the process that ran it
            gone = [0]
        if gone and not _leaving.is_set():
            print(
                f"error: {_names(gone)} is gone: run the same command again, it goes on from the last checkpoint", file=sys.stderr
            )
            leave(1)


def _pause(seconds: float) -> None:
    """Waits, but learns at once when the service is gone."""
    try:
        _client().blocking_key_value_get(NOTHING, int(seconds * 1000))
    except Exception as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise


def _absent(name: str) -> list[int]:
    there = {int(key.rpartition("/")[2]) for key, _ in _client().key_value_dir_get(name)}
    return [process for process in range(count()) if process not in there]


def _names(processes: list[int]) -> str:
    """Processes with the hosts that they said they are on, where that can still be asked."""
    known: dict[int, str] = {}
    with contextlib.suppress(Exception):
        known = {int(key.rpartition("/")[2]): host for key, host in _client().key_value_dir_get("llm_jax/hosts")}
        known = {process: known.get(process, "which never came") for process in processes}
    shown = [f"process {process}" + (f" ({known[process]})" if process in known else "") for process in processes[:4]]
    return ", ".join(shown) + (f" and {len(processes) - 4} more" if len(processes) > 4 else "")


def _client() -> Any:
    from jax._src import distributed

    client = distributed.global_state.client
    if client is None:
        raise RuntimeError("jax.distributed was not started")
    return client
