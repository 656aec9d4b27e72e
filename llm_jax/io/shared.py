"""Small JSON files by which processes on several machines agree: in a local folder, on NFS, or in a bucket."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from typing import Any

from llm_jax.core.config import ConfigError
from llm_jax.core.paths import remove_folder, to_path
from llm_jax.core.whole import NO_LINKS, write_new, write_whole


class Shared:
    """A folder of JSON files, each of which is read whole or not at all."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = to_path(folder)

    def create(self, name: str, data: Mapping[str, Any]) -> bool:
        """Writes a file unless there is one, and says whether it did: of all who try exactly one does.

        data: unlike any other's, so that who is told that there is a file already, since a request was repeated that had been
        carried out, knows it for its own. Raises `ConfigError` where the file system cannot do it.
        """
        content = json.dumps(data)
        try:
            return write_new(self.folder / name, content) or self.read(name) == json.loads(content)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            said = f"lies where a file cannot be created by exactly one of several processes ({error.strerror})"
            way = "workers need a folder in a bucket, or on a local disk or NFS with hard links"
            raise ConfigError(f"{said}: {way}", str(self.folder)) from None

    def write(self, name: str, data: Mapping[str, Any]) -> None:
        """Writes a file, also over one that is there; only one process may write it."""
        write_whole(self.folder / name, json.dumps(data))

    def read(self, name: str) -> dict[str, Any] | None:
        """What a file holds now, or None if there is none."""
        try:
            return json.loads((self.folder / name).read_text())
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:  # NFS: it was replaced meanwhile
                raise
            return json.loads((self.folder / name).read_text())

    def names(self, folder: str) -> list[str]:
        """The files of a folder, without their paths."""
        try:
            names = [file.name for file in (self.folder / folder).iterdir()]
        except FileNotFoundError:
            return []
        return sorted(name for name in names if name.endswith(".json") and not name.startswith("."))

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it. Nobody may be writing there."""
        place = self.folder / name
        remove_folder(place) if place.is_dir() else place.unlink(missing_ok=True)
