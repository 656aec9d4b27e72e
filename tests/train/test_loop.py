"""The loop by itself, around a program that only counts: when things happen, what is added up, what a stop leaves behind."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.types import Batch, Weighted
from llm_jax.io.checkpoint import Checkpointer
from llm_jax.train import loop
from llm_jax.train.interruption import Interrupted, interruptions
from llm_jax.train.loop import Program, Rhythm, Session, fit

MEMBERS = 2
RHYTHM = Rhythm(steps=12, dispatch=2, log_every=4, evaluate_every=8, checkpoint_every=6)


def program(*, calls=None, stop_at=None, signals=(signal.SIGTERM,)) -> Program:
    """Step s has loss s in member 0 and 10·s in member 1; an evaluation's loss is its first token plus the step."""
    scale = np.array([1.0, 10.0])
    calls = [] if calls is None else calls

    def steps(state, batches):
        done = int(state["step"][0]) + np.arange(1, batches.tokens.shape[1] + 1)
        if stop_at is not None and stop_at in done:
            for number in signals:
                signal.raise_signal(number)
        calls.append(("steps", int(done[0]), int(batches.tokens[0, 0, 0, 0])))
        return {"step": jnp.full(MEMBERS, done[-1])}, {"train/loss": Weighted(done.sum() * scale, np.full(MEMBERS, len(done)))}

    def evaluate(state, batches):
        calls.append(("evaluate", int(state["step"][0]), int(batches.tokens.flat[0])))
        return {"loss": Weighted(batches.tokens.flat[0] + state["step"] * scale, np.ones(MEMBERS))}

    abstract = {"step": jax.ShapeDtypeStruct((MEMBERS,), jnp.int32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))}
    return Program(MEMBERS, lambda: {"step": jnp.zeros(MEMBERS, jnp.int32)}, steps, evaluate, abstract)


def batch(number: int) -> Batch:
    ids = np.full((MEMBERS, RHYTHM.dispatch, 1, 1), number)
    return Batch(ids, ids)


def feed(start):
    return (batch(number) for number in itertools.count(start, RHYTHM.dispatch))


def session(records, checkpointer=None) -> Session:
    at_end = batch(100)
    return Session(
        record=lambda step, rows: records.append((step, rows)),
        rewind=lambda step, recorded: records.append(("rewind", step, recorded)),
        report=lambda step, **numbers: None,
        evaluations={"valid": batch(50)},
        final={"valid@1x": at_end, "valid": at_end, "test": batch(200)},
        tokens_per_step=3,
        flops_per_step=7,
        checkpointer=checkpointer,
    )


def test_records_hold_the_mean_over_their_steps_and_what_was_scored_then():
    records, calls = [], []
    final = fit(program(calls=calls), feed, RHYTHM, session(records))
    assert records.pop(0) == ("rewind", 0, 0)
    assert [step for step, _ in records] == [4, 8, 12]
    assert [rows[1]["train/loss"] for _, rows in records] == [25.0, 65.0, 105.0]
    assert [rows[0]["step"] for _, rows in records] == [4, 8, 12] and records[0][1][0]["tokens"] == 12
    assert "valid/loss" not in records[0][1][0] and records[1][1][1]["valid/loss"] == 50 + 80
    assert final == [{f"{split}/loss{at}": first + step for split, at, first in FINAL} for step in (12, 120)]
    assert [call for call in calls if call[0] == "evaluate"] == [("evaluate", 8, 50), ("evaluate", 12, 100), ("evaluate", 12, 200)]


FINAL = [("valid", "@1x", 100), ("valid", "", 100), ("test", "", 200)]


@pytest.mark.parametrize("stop_at", [3, 5, 7, 12])
def test_a_stop_is_saved_and_goes_on_with_the_same_numbers(tmp_path, stop_at):
    whole, calls, parts = [], [], []
    expected = fit(program(calls=calls), feed, RHYTHM, session(whole))

    def run(**given):
        checkpointer, records = Checkpointer(tmp_path), []
        try:
            return fit(program(**given), feed, RHYTHM, session(records, checkpointer)), records
        except Interrupted as stopped:
            return stopped, records
        finally:
            checkpointer.close()

    stopped, first = run(calls=parts, stop_at=stop_at)
    assert stopped.step == stop_at + stop_at % 2 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert "goes on from there" in str(stopped)
    final, second = run(calls=parts)
    due = stopped.step in (8, 12)  # when it was to be scored
    assert final == expected and second[0] == ("rewind", stopped.step, stopped.step - due)
    assert [call for call in parts if call[0] == "steps"] == [call for call in calls if call[0] == "steps"], (
        "each step once, in order"
    )
    timeless = [(step, [row | {"seconds": 0} for row in rows]) for step, rows in first[1:] + second[1:]]
    assert timeless == [(step, [row | {"seconds": 0} for row in rows]) for step, rows in whole[1:]]


@pytest.mark.parametrize("second", [False, True], ids=["first", "second set"])
def test_a_stop_while_it_is_scored_leaves_scoring_for_later(tmp_path, second):
    def run(evaluate=lambda *args: args):
        checkpointer, records, calls = Checkpointer(tmp_path), [], []
        counted = program(calls=calls)

        def asked(state, batches):
            evaluate(state, batches)
            return counted.evaluate(state, batches)

        try:
            fit(replace(counted, evaluate=asked), feed, RHYTHM, session(records, checkpointer))
        except Interrupted as stopped:
            return stopped, records, calls
        finally:
            checkpointer.close()
        return None, records, calls

    def stops(state, batches):
        if batches.tokens.flat[0] == (200 if second else 100):
            signal.raise_signal(signal.SIGTERM)

    whole = []
    fit(program(), feed, RHYTHM, session(whole))
    stopped, first, _ = run(stops)
    if second:  # the last one: it was scored, so nothing is left
        assert stopped.step == 12 and [step for step, _ in first[1:]] == [4, 8, 12]
        return
    assert stopped.step == 12 and stopped.saved and [step for step, _ in first[1:]] == [4, 8]
    none, again, calls = run()
    assert none is None and again[0] == ("rewind", 12, 11) and not [call for call in calls if call[0] == "steps"]
    assert [row["train/loss"] for row in again[1][1]] == [row["train/loss"] for row in whole[3][1]] and "test/loss" in again[1][1][
        0
    ]


def test_before_the_first_step_ends_there_is_nothing_to_save(tmp_path):
    checkpointer, records = Checkpointer(tmp_path / "none"), []
    with pytest.raises(Interrupted) as stopped:
        fit(program(stop_at=1), feed, RHYTHM, session(records, checkpointer))
    checkpointer.close()
    assert stopped.value.step is None and stopped.value.code == 0 and not (tmp_path / "none").exists()
    assert "stopped at once" in str(stopped.value) and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_waiting_thread_is_interrupted_at_once():
    """As the one that waits for a program to be compiled."""
    began = time.monotonic()
    threading.Timer(0.1, os.kill, [os.getpid(), signal.SIGTERM]).start()
    with pytest.raises(Interrupted), interruptions():
        Future().result(timeout=30)
    assert time.monotonic() - began < 10


def test_a_signal_that_nobody_asked_for_is_passed_on():
    def late():
        with interruptions() as stop:
            stop.at_stake = True
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # schedulers send it twice
            assert stop.asked()

    with pytest.raises(Interrupted) as outer, interruptions():
        late()
    assert outer.value.step is None


@pytest.mark.parametrize("whole", [True, False])
def test_one_that_comes_while_the_end_is_saved_waits_for_it(tmp_path, monkeypatch, whole):
    """SIGTERM again, as schedulers send it, changes nothing of that."""
    checkpointer, begun, ended = Checkpointer(tmp_path), list[int](), list[bool]()
    save, wait = checkpointer.save, checkpointer.wait

    def waited() -> bool:
        if begun[-1:] == [RHYTHM.steps] and not ended:
            signal.raise_signal(signal.SIGTERM)
            ended.append(wait())
        return wait() and whole

    def unwinds():
        try:
            fit(program(), feed, RHYTHM, session([], checkpointer))
        finally:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(checkpointer, "save", lambda step, *rest: begun.append(step) or save(step, *rest))
    monkeypatch.setattr(checkpointer, "wait", waited)
    with pytest.raises(Interrupted) as stopped, interruptions():
        unwinds()
    assert ended == [True] and checkpointer.steps()[-1] == RHYTHM.steps
    assert (stopped.value.step, stopped.value.code) == (RHYTHM.steps, 0 if whole else 128 + signal.SIGTERM)
    checkpointer.close()


def test_one_that_a_library_made_an_error_of_is_still_one():
    def translated():
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as interrupt:
            raise RuntimeError("the callback failed") from interrupt

    with pytest.raises(Interrupted), interruptions():
        translated()


LEAVES = """
import contextlib, os, signal, sys
from llm_jax.core.distributed import farewells
from llm_jax.train.interruption import interruptions

class Dying:
    def __del__(self):  # what is raised here is only printed
        signal.raise_signal(signal.{name})

class Key:
    def __hash__(self):  # what is raised here ends the process, where C++ asks
        signal.raise_signal(signal.{name})
        return 0

def calls_python():
    import jax
    jax.jit(lambda key, x: x, static_argnums=0)(Key(), 0)

def fails():
    raise KeyboardInterrupt

def says():
    os.kill(os.getpid(), signal.SIGTERM)
    print("farewell", flush=True)

farewells += [fails, says]
{before}
with interruptions(leaves=True):
    with contextlib.suppress(BaseException), interruptions() as stop:
        stop.at_stake = {at_stake}
        {what}()
        print("goes on")
    print("goes on for long")
"""


@pytest.mark.parametrize("what", ["Dying", "calls_python"])
@pytest.mark.parametrize("name, at_stake, said", [("SIGTERM", False, []), ("SIGINT", False, []), ("SIGTERM", True, ["goes on"])])
def test_a_command_leaves_where_nothing_can_be_raised(name, at_stake, said, what):
    code = LEAVES.format(name=name, at_stake=at_stake, what=what, before="")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.split("\n") == [*said, "farewell", ""]
    assert done.stderr == "stopped at once; the same command again goes on from what is saved\n"
    assert done.returncode == (0 if name == "SIGTERM" else 130)


def test_a_command_leaves_though_nobody_listens():
    code = LEAVES.format(name="SIGTERM", at_stake=False, what="Dying", before="os.close(2); sys.stderr.close()")
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, timeout=60)
    assert (done.returncode, done.stdout) == (0, b"farewell\n")


@pytest.mark.parametrize(
    "number, saved, code", [(signal.SIGTERM, True, 0), (signal.SIGTERM, False, 143), (signal.SIGINT, True, 130)]
)
def test_a_preemption_that_lost_nothing_is_no_failure(number, saved, code):
    assert Interrupted(number, 7, saved).code == code


def test_the_second_interruption_does_not_wait_for_the_save(tmp_path):
    checkpointer = Checkpointer(tmp_path)
    found = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test runner may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(program(stop_at=5, signals=[signal.SIGINT] * 2), feed, RHYTHM, session([], checkpointer))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, found)
    checkpointer.close()


def test_compiling_and_scoring_are_no_training_time(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    counted, records = program(), []

    def takes(seconds, function):
        def call(*args):
            now[0] += seconds
            return function(*args)

        return call

    first = [1000.0]  # compilation
    steps = takes(1.0, counted.steps)

    def compiled(*args):
        now[0] += first.pop() if first else 0.0
        return steps(*args)

    slow = replace(counted, init=takes(500.0, counted.init), steps=compiled, evaluate=takes(70.0, counted.evaluate))
    fit(slow, feed, RHYTHM, session(records))
    assert [rows[0]["seconds"] for _, rows in records[1:]] == [0.5, 1.5, 2.5], "the clock starts with the first dispatch"


def test_the_rhythm_dispatches_what_divides_every_interval():
    assert Rhythm.fitting(steps=100, log_every=50, evaluate_every=50, checkpoint_every=25, dispatch=10).dispatch == 5
    assert Rhythm.fitting(steps=7, log_every=7, evaluate_every=7, checkpoint_every=7, dispatch=4).dispatch == 1
    assert replace(RHYTHM, steps=13).at(13, 4), "what happens every so often also happens at the end"


SUMS = {"train/loss": (np.ones(1), np.ones(1))}


@pytest.mark.parametrize(
    "step, sums, due, told",
    [
        (0, {}, False, 0),
        (2, SUMS, False, 0),  # before the first record
        (4, {}, False, 4),  # recorded, as nothing is left of the sums
        (4, SUMS, True, 0),  # stopped while it was scored
        (5, SUMS, False, 4),
        (8, {}, False, 8),
        (8, SUMS, True, 4),
        (9, SUMS, False, 8),
        (10, {}, False, 10),  # the end, which is no multiple
        (10, SUMS, True, 8),
    ],
)
def test_the_last_record_before_a_state_that_was_saved_with_sums(step, sums, due, told):
    rhythm = Rhythm(steps=10, dispatch=1, log_every=4, evaluate_every=8, checkpoint_every=1)
    assert (rhythm.due(step, sums), rhythm.told(step, sums)) == (due, told)
    each = replace(rhythm, log_every=1)
    assert (each.due(step, sums), each.told(step, sums)) == (bool(sums), step - bool(sums))


def test_training_that_may_not_proceed_ends_with_nothing_recorded_or_saved(tmp_path):
    records, calls, checkpointer = [], [], Checkpointer(tmp_path, asynchronous=False)

    def proceed():
        if len(calls) == 4:  # after step 8, where a record and a score are due
            raise PermissionError("another's")

    stopped = replace(session(records, checkpointer), proceed=proceed)
    with pytest.raises(PermissionError):
        fit(program(calls=calls), feed, replace(RHYTHM, checkpoint_every=8), stopped)
    checkpointer.close()
    assert [step for step, _ in records[1:]] == [4] and [c[0] for c in calls] == ["steps"] * 4 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_processes_stop_together_whichever_was_asked_to(tmp_path):
    def both(folder, stop_at):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        line = [sys.executable, "-m", "tests.train.stopped_host"]
        given = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
        pair = [
            subprocess.Popen([*line, *map(str, (index, port, folder, stop_at))], env=given, stdout=subprocess.PIPE, text=True)
            for index in range(2)
        ]
        said = [process.communicate(timeout=120)[0].splitlines() for process in pair]
        assert [process.returncode for process in pair] == [0, 0]
        return [[text for text in lines if not text.startswith("[Gloo]")] for lines in said]

    begun, stopped = zip(*both(tmp_path / "a", 20), strict=True)
    assert begun[0] == "begins after 0" and stopped[0] == stopped[1] and stopped[0].startswith("stopped after")
    step = int(stopped[0].split()[-1])
    assert 20 <= step < 120
    again, whole = both(tmp_path / "a", -1), both(tmp_path / "b", -1)
    assert again[0] == again[1] == [f"begins after {step}", whole[0][1]]
