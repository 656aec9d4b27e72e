"""A step that hangs is noticed, and where; one that is slow, or at rest, is not."""

import contextlib
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from llm_jax.train.loop import fit
from llm_jax.train.watchdog import STUCK, USUAL, Watchdog
from tests.train.test_loop import RHYTHM, feed, program, session


def hangs_for_a_while(said=None):
    """Until something was said, or for a second."""
    until = time.monotonic() + (1.0 if said is None else 60.0)
    while time.monotonic() < until and not said:
        time.sleep(0.05)


def watched(folder, said, *, at, seconds=0.2):
    """Training whose dispatch that begins with step `at` (from 1), or whose scoring for None, hangs."""
    counted = program()

    def steps(state, batches):
        if int(state["step"][0]) + 1 == at:
            hangs_for_a_while(said if at > 1 else None)
        return counted.steps(state, batches)

    def evaluate(state, batches):
        if at is None:
            hangs_for_a_while()
        return counted.evaluate(state, batches)

    dog = Watchdog(folder, seconds, tell=said.append)
    fit(replace(counted, steps=steps, evaluate=evaluate), feed, RHYTHM, replace(session([]), watchdog=dog))
    assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_step_that_hangs_is_told_with_the_stacks_of_all_threads(tmp_path):
    said = []
    watched(tmp_path, said, at=7)
    (file,) = tmp_path.glob("stuck-*.txt")
    assert len(said) == 2 and "no sign of life" in said[0] and "after step 6 (usually" in said[0] and str(file) in said[0]
    assert said[1] == "watchdog: training goes on"
    text = file.read_text()
    assert "after step 6" in text and "hangs_for_a_while" in text and text.lower().count("thread 0x") >= 2


@pytest.mark.parametrize("at", [1, None], ids=["compilation", "scoring"])
def test_what_may_take_long_is_no_step(tmp_path, at):
    said = []
    watched(tmp_path, said, at=at)
    assert not said and not list(tmp_path.iterdir())


def test_a_step_may_take_as_long_as_many_usual_ones():
    dog = Watchdog(seconds=0.01)
    dog.alive(0)
    for number in range(3):
        time.sleep(0.02)
        dog.alive(number + 1)
    assert 0.02 * USUAL <= dog.limit < 1.0


def test_it_is_off_without_seconds():
    with Watchdog().watching() as dog:
        dog.alive(1)
        assert "watchdog" not in {thread.name for thread in threading.enumerate()}


def test_a_folder_that_cannot_be_written_is_no_reason_to_be_silent(tmp_path):
    said = []
    with contextlib.suppress(OSError):
        watched(tmp_path / "none", said, at=7)
    assert "could not be written (No such file or directory)" in said[0]


def test_it_leaves_where_it_is_told_to(tmp_path):
    script = (
        "import pathlib, time; from llm_jax.train.watchdog import Watchdog\n"
        f"with Watchdog(pathlib.Path({str(tmp_path)!r}), 0.2, True).watching() as dog:\n"
        "    dog.alive(3); time.sleep(60)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=50)
    assert done.returncode == STUCK and "no sign of life" in done.stderr and list(tmp_path.glob("stuck-*.txt"))
