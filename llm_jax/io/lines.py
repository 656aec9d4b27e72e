"""Files of JSON lines that grow: on a disk line by line; in a bucket, where nothing can be appended, as a whole now and then."""

from __future__ import annotations

import functools
import json
import pathlib
import time
import warnings
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from llm_jax.core.paths import in_bucket
from llm_jax.core.whole import write_whole

EVERY = 30.0  # seconds between two uploads of a file that grows


def whole_lines(file: pathlib.Path) -> list[dict[str, Any]]:
    """What a file has a JSON line of each, the oldest first, up to one that is damaged; nothing where there is no file.

    A last line that was cut short, as when the process died, is no damage; of another there is a warning.
    """
    found = []
    *written, last = file.read_bytes().split(b"\n") if file.exists() else [b""]
    for number, line in enumerate([*written, last] if last else written, 1):
        try:
            found.append(_record(line))
        except ValueError:
            if number <= len(written):
                warnings.warn(f"{file}, line {number} is damaged: it and what follows are left out", stacklevel=2)
            break
    return found


def _record(line: bytes) -> dict[str, Any]:
    if isinstance(record := json.loads(line), dict):
        return record
    raise ValueError("it holds no record")


def as_lines(records: Iterable[Any]) -> str:
    """A line each. Raises `ValueError` for a number that is not finite."""
    return "".join(json.dumps(record, allow_nan=False) + "\n" for record in records)


class Lines(Protocol):
    """The end of such a file. What cannot be written, as when a disk is full, waits in memory, and `OSError` is raised."""

    def append(self, record: Any) -> None:
        """Adds a line."""

    def replace(self, records: Iterable[Any]) -> None:
        """Makes these all of the file."""

    def send(self) -> None:
        """Has all lines be on their way to where they outlive this process."""

    def keep(self) -> None:
        """Returns when they are there."""

    def close(self) -> None:
        """The same, and lets go of the file."""

    def leave(self) -> None:
        """Lets go of the file, which is another's: what is not there yet is dropped."""


def lines(file: pathlib.Path) -> Lines:
    """The end of a file, which is made if there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return _InBucket(file) if in_bucket(file) else _OnDisk(file)


class _OnDisk:
    def __init__(self, file: pathlib.Path):
        self.file, self._waiting = file, bytearray()
        self._end = open(file, "ab", buffering=0)

    def append(self, record: Any) -> None:
        self._waiting += as_lines([record]).encode()
        self.keep()

    def replace(self, records: Iterable[Any]) -> None:
        self._end.close()
        write_whole(self.file, as_lines(records))
        self._end = open(self.file, "ab", buffering=0)

    def keep(self) -> None:
        while self._waiting:
            del self._waiting[: self._end.write(self._waiting)]

    send = keep

    def leave(self) -> None:
        self._waiting.clear()
        self._end.close()

    def close(self) -> None:
        try:
            self.keep()
        finally:
            self._end.close()


class _InBucket:
    def __init__(self, file: pathlib.Path):
        self.file, self._since = file, time.monotonic()
        self._content = bytearray(file.read_bytes() if file.exists() else b"")
        self._there = len(self._content)  # bytes that are on their way, or arrived
        self._upload: Future[None] | None = None

    def append(self, record: Any) -> None:
        self._content += as_lines([record]).encode()
        if time.monotonic() - self._since >= EVERY and (self._upload is None or self._upload.done()):
            self.send()

    def replace(self, records: Iterable[Any]) -> None:
        self._arrived()
        self._content[:] = as_lines(records).encode()
        self._there = -1
        self.keep()

    def send(self) -> None:
        self._arrived()
        if self._there != len(self._content):
            self._since, self._there = time.monotonic(), len(self._content)
            self._upload = uploads().submit(write_whole, self.file, bytes(self._content))

    def keep(self) -> None:
        self.send()
        self._arrived()

    close = keep

    def leave(self) -> None:
        if self._upload is not None:
            self._upload.cancel()

    def _arrived(self) -> None:
        """Waits for what is on its way. Raises `OSError`, and it has to be sent again, if it was lost."""
        upload, self._upload = self._upload, None
        if upload is not None:
            try:
                upload.result()
            except Exception as error:  # what a bucket's driver raises has many classes
                self._there = -1
                raise OSError(None, " ".join(str(error).split()) or type(error).__name__, str(self.file)) from error


@functools.cache
def uploads() -> ThreadPoolExecutor:
    """The threads that write into buckets."""
    return ThreadPoolExecutor(8, thread_name_prefix="uploads")
