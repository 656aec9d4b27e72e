"""What a guard did, and to which batch: a JSON line each in `incidents.jsonl`, in the folder of the trial."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from llm_jax.core.paths import append
from llm_jax.core.whole import write_whole
from llm_jax.io.lines import as_lines, whole_lines
from llm_jax.io.tracker import Tracker

NAME = "incidents.jsonl"
MOST = 200  # lines of a trial that say where a batch comes from


@dataclass(frozen=True)
class Incidents:
    """The incidents of trials that are trained together. folders, seeds: theirs.

    origin: `(seed, number) -> what is to be written down of the batch of that number, as JSON`; tell: called with a line to read.
    """

    folders: Sequence[pathlib.Path]
    seeds: Sequence[int]
    origin: Callable[[int, int], Any]
    tell: Callable[[str], None]

    def write(self, member: int, kind: str, step: int, *, batch: int | None = None, steps: int = 1, **more: Any) -> None:
        """Appends a line about the `steps` steps from `step` (from 0) on. batch: the number of the first one's, if another.

        After `MOST` lines batches are no longer looked up: where nearly all are bad, they say nothing.
        """
        first, seed = step if batch is None else batch, self.seeds[member]
        known = {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in more.items()}
        told = len(self.read(member)) < MOST
        batches = [{"number": first + i, "of": self.origin(seed, first + i) if told else None} for i in range(steps)]
        append(self.folders[member] / NAME, as_lines([{"kind": kind, "step": step, "seed": seed} | known | {"batches": batches}]))

    def say(self, member: int, text: str) -> None:
        """Tells a person."""
        self.tell(f"seed {self.seeds[member]}: {text} (see {self.folders[member] / NAME})")

    def read(self, member: int) -> list[dict[str, Any]]:
        """All whole lines of a trial, oldest first."""
        return read(self.folders[member])

    def records(self, member: int) -> list[dict[str, Any]]:
        """What was recorded of a trial's training."""
        return Tracker.read(self.folders[member])

    def drop_from(self, step: float) -> None:
        """Drops what happened in steps that will be made again, and a line that was cut short."""
        for member, folder in enumerate(self.folders):
            if (folder / NAME).exists():
                write_whole(folder / NAME, as_lines(line for line in self.read(member) if line["step"] < step))


def read(folder: pathlib.Path) -> list[dict[str, Any]]:
    """All whole lines of the trial whose folder it is, oldest first."""
    return whole_lines(folder / NAME)
