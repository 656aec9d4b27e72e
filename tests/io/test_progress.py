"""What a person reads while training runs: the numbers are those of the clock and the counts."""

import io
import os

import pytest

from llm_jax.core.distributed import farewells
from llm_jax.io import progress
from llm_jax.io.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def shown(clock, *, interval=0.0, every=4.0, **more) -> list[str]:
    """The lines of 40 steps reported by tens, ten of them every `every` seconds."""
    file = io.StringIO()
    given = {"flops_per_step": 2e9, "tokens_per_step": 512, "peak_flops": 1e10, "overall": (3, 8), **more}
    with Progress(40, "2 arms", interval=interval, file=file, **given) as display:
        for step in (10, 20, 30, 40):
            clock[0] += 50.0 if step == 10 else every  # compilation first
            display.update(step, **{"train/loss": 3.14159, "train/grad_norm": 1.0, "valid/bits_per_byte": 2.5})
        display.note("a sentence [worth] keeping")
    return file.getvalue().splitlines()


def test_rates_are_taken_from_the_first_report_on(clock):
    first, second, *_, last, note = shown(clock)
    assert first == "[3/8 runs] 2 arms · step 10/40 · loss 3.142 · valid/bits_per_byte 2.5"
    assert second == (
        "[3/8 runs] 2 arms · step 20/40 · loss 3.142 · valid/bits_per_byte 2.5 · 1.28 k tokens/s · 5 GFLOP/s · MFU 50% · ETA 8 s"
    )
    assert last.endswith("ETA 0 s") and note == "a sentence [worth] keeping"


def test_a_rate_above_the_peak_says_that_the_peak_is_wrong(clock):
    assert "MFU 100%" in shown(clock, peak_flops=5e9)[1]
    assert "MFU unknown, as the peak was measured too low" in shown(clock, peak_flops=4.9e9)[1]


def test_what_changes_meanwhile_stands_beside_the_title(clock):
    said = iter(["1 other worker", "", "2 other workers", ""])
    first, second, third, _, _ = shown(clock, beside=lambda: next(said))
    assert [line.split(" · step")[0] for line in (first, second, third)] == [
        "[3/8 runs] 2 arms · 1 other worker",
        "[3/8 runs] 2 arms",
        "[3/8 runs] 2 arms · 2 other workers",
    ]


def test_plain_lines_come_no_oftener_than_asked_and_the_end_is_told(clock):
    assert [line.split(" · ")[1] for line in shown(clock, interval=10.0)[:-1]] == ["step 10/40", "step 40/40"]
    assert [line.split(" · ")[1] for line in shown(clock, interval=7.0)[:-1]] == ["step 10/40", "step 30/40", "step 40/40"]


def test_a_process_that_leaves_gives_the_terminal_its_cursor_back():
    before, (ours, theirs) = list(farewells), os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        with Progress(40, "2 arms", file=terminal, flops_per_step=1, tokens_per_step=1, peak_flops=1, overall=(0, 1)):
            farewells[-1]()
        said = os.read(ours, 100_000).decode()
    assert farewells == before and 0 <= said.find("\x1b[?25l") < said.find("\x1b[?25h")
