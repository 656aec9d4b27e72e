"""Small JSON files by which processes on several machines agree: in a local folder, on NFS, or in a bucket that fsspec opens."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from llm_jax.core.config import ConfigError
from llm_jax.core.whole import NO_LINKS, write_new, write_whole


class Shared:
    """A folder of JSON files, each of which is read whole or not at all.

    A bucket must be one whose fsspec driver creates objects conditionally: gcsfs (`if-generation-match: 0`) and s3fs
    (`If-None-Match: *`) do.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = os.fspath(folder)
        self._local = "://" not in self.folder
        self._system, self._root = LocalFileSystem(), os.path.abspath(self.folder)
        if not self._local:
            self._system, self._root = fsspec.core.url_to_fs(self.folder)

    def create(self, name: str, data: Mapping[str, Any]) -> bool:
        """Writes a file unless there is one, and says whether it did: of all who try exactly one does.

        data: unlike any other's, so that who is told that there is a file already, since a request was repeated that had been
        carried out, knows it for its own. Raises `ConfigError` where the file system cannot do it.
        """
        content = json.dumps(data)
        try:
            if self._local:
                return write_new(pathlib.Path(self._path(name)), content)
            self._system.pipe_file(self._path(name), content.encode(), mode="create")
        except FileExistsError:
            return self.read(name) == json.loads(content)
        except (NotImplementedError, ValueError) as error:
            raise self._cannot(error) from None
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            raise self._cannot(error) from None
        return True

    def write(self, name: str, data: Mapping[str, Any]) -> None:
        """Writes a file, also over one that is there; only one process may write it."""
        if self._local:
            write_whole(pathlib.Path(self._path(name)), json.dumps(data))
        else:
            self._system.pipe_file(self._path(name), json.dumps(data).encode())

    def read(self, name: str) -> dict[str, Any] | None:
        """What a file holds now, or None if there is none."""
        try:
            return json.loads(self._system.cat_file(self._path(name)))
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS: it was replaced meanwhile
                raise
            return json.loads(self._system.cat_file(self._path(name)))

    def names(self, folder: str) -> list[str]:
        """The files of a folder, without their paths."""
        self._system.invalidate_cache()
        try:
            found = self._system.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        names = (str(path).rstrip("/").rpartition("/")[2] for path in found)
        return sorted(name for name in names if name.endswith(".json") and not name.startswith("."))

    def remove(self, name: str = "") -> None:
        """Removes a file, or a folder with all that is in it. Nobody may be writing there."""
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            self._system.rm(self._path(name), recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _cannot(self, error: Exception) -> ConfigError:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return ConfigError(
            f"lies where a file cannot be created by exactly one of several processes ({reason}): workers need a folder on a local "
            "disk, NFS or a file system with hard links",
            self.folder,
        )
