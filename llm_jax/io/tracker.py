"""Records of a run: one JSON line each in `metrics.jsonl`, which is the truth, mirrored to TensorBoard where that works."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import pathlib
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait
from typing import Any

from llm_jax.core.paths import in_bucket, remove_folder, to_path
from llm_jax.core.whole import write_whole
from llm_jax.io.lines import lines, uploads, whole_lines

NAME = "metrics.jsonl"
AXES = ("step", "tokens", "flops", "seconds")


def is_full(error: BaseException) -> bool:
    """Whether `error` says that there is no room on the disk, or none left of a quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


class Tracker:
    """Appends records to `folder/metrics.jsonl`. A mirror that fails is switched off with one warning and never slows a run.

    While the disk is full, or the bucket out of reach, records wait in memory and training goes on; `close` raises if they still
    cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, *, tensorboard: bool = True):
        self.folder = to_path(folder)
        self._lines, self._waiting, self._writer = lines(self.folder / NAME), False, None
        self._events, self._copies = self.folder, list[Future[None]]()
        if tensorboard:
            with self._switching_off():
                from tensorboardX import SummaryWriter

                self._events = pathlib.Path(tempfile.mkdtemp(prefix="llm_jax-")) if in_bucket(self.folder) else self.folder
                self._writer = SummaryWriter(str(self._events))

    def log(self, record: Mapping[str, float]) -> None:
        """Writes a record, which must have a "step"; numbers that are not finite become null."""
        clean = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
        with self._telling():
            self._lines.append(clean)
        self._mirror(clean)

    def send(self) -> None:
        """Has what was recorded be on its way to where it outlives this process."""
        with self._telling():
            self._lines.send()
        self._copy_events()

    def keep(self) -> None:
        """Returns when it is there, or waits in memory since it cannot be."""
        with self._telling():
            self._lines.keep()

    def truncate_after(self, step: int) -> None:
        """Drops what was recorded after `step`, and a last line that was cut short: a resumed run writes it again."""
        self._lines.replace(record for record in self.read(self.folder) if record["step"] <= step)

    @staticmethod
    def read(folder: str | os.PathLike) -> list[dict[str, Any]]:
        """All whole records, oldest first."""
        return whole_lines(to_path(folder) / NAME)

    def leave(self) -> None:
        """Closes the files, which are another's by now: what has not been written is dropped."""
        self._lines.leave()
        self._close_mirror()

    def close(self) -> None:
        """Closes the files. Raises `OSError` if records could not be written."""
        self._close_mirror(copied=True)
        self._lines.close()

    def _close_mirror(self, *, copied: bool = False) -> None:
        """copied: once more where it belongs, if that is in a bucket."""
        if self._writer is not None:
            with contextlib.suppress(Exception):  # whatever a mirror does
                self._writer.close()
                if copied:
                    self._copy_events()
                    wait(self._copies)
        if self._events != self.folder:
            remove_folder(self._events)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Of the first record that has to wait."""
        try:
            yield
            self._waiting = False
        except OSError as error:
            if not self._waiting:
                said = f"{self.folder}: {error.strerror}: records wait in memory until they can be written"
                warnings.warn(said, stacklevel=4)
            self._waiting = True

    def _copy_events(self) -> None:
        """Has the mirror's file, which is appended to on a disk, be on its way to the bucket where it belongs."""
        if self._writer is not None and self._events != self.folder:
            with self._switching_off():
                for copy in self._copies:
                    copy.result()
                self._writer.flush()
                files = list(self._events.iterdir())
                self._copies = [uploads().submit(write_whole, self.folder / file.name, file.read_bytes()) for file in files]

    def _mirror(self, record: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        with self._switching_off():
            if not self._writer.file_writer.event_writer._worker.is_alive():  # or its queue, once full, would hold up training
                raise RuntimeError("its thread has died")
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
