"""What a person sees while training runs: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import IO

from rich.console import Console
from rich.control import Control
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from llm_jax.core.distributed import farewells


class Progress:
    """A context that shows steps, loss, tokens/s, model FLOP/s, its share of the peak (MFU) and the time left.

    flops_per_step, tokens_per_step: of the whole program; overall: (runs done, all runs); beside: says what changes meanwhile, to
    stand beside the title; plain lines come at most every `interval` seconds. shown: whether anything is.
    Everything goes to standard error.
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        *,
        flops_per_step: float,
        tokens_per_step: float,
        peak_flops: float,
        overall: tuple[int, int] = (0, 1),
        beside: Callable[[], str] = lambda: "",
        interval: float = 10.0,
        file: IO[str] | None = None,
        shown: bool = True,
    ):
        self.total, self.title, self.overall, self.interval = total_steps, title, overall, interval
        self.beside = beside
        self.flops, self.tokens, self.peak = flops_per_step, tokens_per_step, peak_flops
        self.console = Console(file=file or sys.stderr, quiet=not shown)
        self.live: Live | None = None
        self.last_line = 0.0

    def __enter__(self) -> Progress:
        self.started, self.first_step = time.perf_counter(), None
        if self.console.is_terminal:
            self.bars = Bars(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self.runs = self.bars.add_task(
                f"runs · {self._heading()}", total=self.overall[1], completed=self.overall[0], numbers=""
            )
            self.task = self.bars.add_task("compiling", total=self.total, numbers="")
            self.live = Live(self.bars, console=self.console, refresh_per_second=4, transient=True)
            farewells.append(self._show_cursor)
            self.live.start()
        return self

    def __exit__(self, *_) -> None:
        if self.live is not None:
            self.live.stop()
            farewells.remove(self._show_cursor)

    def _show_cursor(self) -> None:
        """Which `Live` hides; past the console, which may be in the middle of a line."""
        os.write(self.console.file.fileno(), f"{Control.show_cursor(True)}\n".encode())

    def update(self, step: int, **metrics: float) -> None:
        """Shows that `step` steps are done, with metrics by name; the rate is that since the first call."""
        now = time.perf_counter()
        if self.first_step is None or step < self.first_step:  # the first report's time holds the compilation
            self.first_step, self.started = step, now
        numbers = self._numbers(step, now, metrics)
        if self.live is not None:
            self.bars.update(self.runs, description=f"runs · {self._heading()}")
            self.bars.update(self.task, completed=step, description="training", numbers=numbers)
        elif now - self.last_line >= self.interval or step >= self.total:
            self.last_line = now
            self.console.print(
                f"[{self.overall[0]}/{self.overall[1]} runs] {self._heading()} · step {step}/{self.total} · {numbers}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def note(self, text: str) -> None:
        """A sentence worth keeping on the screen."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _heading(self) -> str:
        return " · ".join(filter(None, (self.title, self.beside())))

    def _numbers(self, step: int, now: float, metrics: dict[str, float]) -> str:
        parts = [
            f"{name.removeprefix('train/')} {value:.4g}"
            for name, value in metrics.items()
            if name in ("train/loss", "valid/bits_per_byte")
        ]
        done, seconds = step - (self.first_step or 0), now - self.started
        if done > 0 and seconds > 0:
            rate = done / seconds
            share = rate * self.flops / self.peak
            parts += [
                f"{_short(rate * self.tokens)} tokens/s",
                f"{_short(rate * self.flops)}FLOP/s",
                f"MFU {share:.0%}" if share <= 1 else "MFU unknown, as the peak was measured too low: the machine was busy",
                f"ETA {(self.total - step) / rate:.0f} s",
            ]
        return " · ".join(parts)


def _short(value: float) -> str:
    """1234567 as "1.2 M"."""
    for size, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g} "
