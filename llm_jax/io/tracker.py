"""Records of a run: one JSON line each in `metrics.jsonl`, which is the truth, mirrored to TensorBoard where that works."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

AXES = ("step", "tokens", "flops", "seconds")


def is_full(error: BaseException) -> bool:
    """Whether `error` says that there is no room on the disk, or none left of a quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def whole_lines(file: pathlib.Path) -> list[dict[str, Any]]:
    """What a file has a JSON line of each, the oldest first, up to one that was cut short; nothing where there is no file."""
    found = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            break  # cut short when the process died
    return found


class Tracker:
    """Appends records to `folder/metrics.jsonl`. A mirror that fails is switched off with one warning and never slows a run.

    While the disk is full, records wait in memory and training goes on; `close` raises if they still cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, *, tensorboard: bool = True):
        self.folder = pathlib.Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._open()
        self._waiting, self._writer = bytearray(), None
        if tensorboard:
            with self._switching_off():
                from tensorboardX import SummaryWriter

                self._writer = SummaryWriter(str(self.folder))

    def log(self, record: Mapping[str, float]) -> None:
        """Writes a record, which must have a "step"; numbers that are not finite become null."""
        clean = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
        full = bool(self._waiting)
        self._waiting += (json.dumps(clean, allow_nan=False) + "\n").encode()
        try:
            self._drain()
        except OSError as error:
            if not full:
                warnings.warn(f"{self.folder}: {error.strerror}: records wait in memory until there is room", stacklevel=2)
        self._mirror(clean)

    def _open(self) -> None:
        self._file = open(self.folder / "metrics.jsonl", "ab", buffering=0)

    def _drain(self) -> None:
        while self._waiting:
            del self._waiting[: self._file.write(self._waiting)]

    def truncate_after(self, step: int) -> None:
        """Drops what was recorded after `step`, and a last line that was cut short: a resumed run writes it again."""
        kept = [record for record in self.read(self.folder) if record["step"] <= step]
        self._file.close()
        partial = self.folder / ".metrics.jsonl"
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(self.folder / "metrics.jsonl")
        self._open()

    @staticmethod
    def read(folder: str | os.PathLike) -> list[dict[str, Any]]:
        """All whole records, oldest first."""
        return whole_lines(pathlib.Path(folder) / "metrics.jsonl")

    def close(self) -> None:
        """Closes the files. Raises `OSError` if records could not be written."""
        if self._writer is not None:
            with contextlib.suppress(Exception):  # whatever a mirror does
                self._writer.close()
        try:
            self._drain()
        finally:
            self._file.close()

    def _mirror(self, record: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        with self._switching_off():
            for name, value in record.items():
                if name not in AXES and value is not None:
                    self._writer.add_scalar(name, value, int(record["step"]))

    @contextlib.contextmanager
    def _switching_off(self) -> Iterator[None]:
        """Ends the mirror, with a warning, when what it does fails: the run goes on."""
        try:
            yield
        except Exception as error:
            self._writer = None
            warnings.warn(f"TensorBoard is switched off for {self.folder}: {error}", stacklevel=4)
