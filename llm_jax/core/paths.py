"""Folders of this machine and folders in a bucket, by paths with the same methods.

A bucket holds objects, each written whole or not at all, under names that only look like paths: nothing can be appended to, renamed
or locked, and there are no empty folders.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any, cast

from llm_jax.core.config import ConfigError

BUCKETS = "gs://"
ANSWER = 10.0  # seconds


def to_path(place: str | os.PathLike) -> pathlib.Path:
    """A path of this machine, or in a bucket (gs://BUCKET/NAME), which reads, writes, lists and makes folders as `pathlib`'s do.

    ~ is the home folder. Raises `ConfigError` for another address, and where the library for buckets is missing.
    """
    text = os.fspath(place)
    if not text.startswith(BUCKETS):
        if "://" in text or text.startswith("gs:/"):
            raise ConfigError("must be a folder of this machine, which may be mounted, or one in a bucket (gs://BUCKET/NAME)", text)
        return pathlib.Path(text).expanduser()
    try:
        import gcsfs  # noqa: F401
    except ImportError:
        raise ConfigError('needs gcsfs: pip install -e ".[data]"', text) from None
    import fsspec
    from etils import epath

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)  # what goes wrong is told in a sentence
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)  # other processes write there too
    return cast(pathlib.Path, epath.Path(text))


def absolute(place: str | os.PathLike) -> pathlib.Path:
    """The same from the root on."""
    found = to_path(place)
    return found if in_bucket(found) else found.absolute()


def require_folder(place: str | os.PathLike) -> None:
    """Raises `ConfigError` where a work folder is to be, and a file is."""
    found = to_path(place)
    if not in_bucket(found) and found.exists() and not found.is_dir():
        raise ConfigError("is a file: choose another --workdir", os.fspath(place))


@contextlib.contextmanager
def reaching(place: str | os.PathLike) -> Iterator[None]:
    """Has what goes wrong in a bucket meanwhile be a `ConfigError`: its drivers raise errors of many classes.

    It is asked for first, for `ANSWER` seconds: later requests are repeated for a minute, as is right in a long run.
    """
    try:
        if in_bucket(place):
            system, name = opened(place)
            system.exists(name, timeout=ANSWER)
        yield
    except Exception as error:
        if not in_bucket(place) or isinstance(error, ConfigError):
            raise
        silent = f"no answer within {ANSWER:g} s" if isinstance(error, TimeoutError) else type(error).__name__
        said = " ".join(str(error).split()) or silent
        way = "`gcloud auth application-default login` gives credentials, and `gcloud storage buckets create` makes a bucket"
        raise ConfigError(f"cannot be reached ({said}): {way}", os.fspath(place)) from None


def in_bucket(place: str | os.PathLike) -> bool:
    """Whether it is not of this machine."""
    return os.fspath(place).startswith(BUCKETS)


def opened(place: str | os.PathLike) -> tuple[Any, str]:
    """fsspec's file system of a place in a bucket, and its name there."""
    import fsspec

    return fsspec.core.url_to_fs(os.fspath(to_path(place)))


def remove_folder(folder: pathlib.Path) -> None:
    """Removes a folder with all that is in it, if there is one, as far as the system lets."""
    if not in_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    system, name = opened(folder)
    if system.exists(name):
        system.rm(name, recursive=True)


def copy_folder(folder: pathlib.Path, to: pathlib.Path) -> None:
    """Copies all that is in a folder of this machine to one that is not there yet."""
    if in_bucket(to):
        system, name = opened(to)
        system.put(f"{folder}/", f"{name}/", recursive=True)
    else:
        shutil.copytree(folder, to)


def move_folder(folder: pathlib.Path, to: pathlib.Path) -> None:
    """Gives a folder another name, beside which it stays: in a bucket its objects, of which none is gone before all are copied.

    gcsfs's own move asks for each by a request that not every storage knows, six times and with pauses of half a minute.
    """
    if in_bucket(folder):
        system, name = opened(folder)
        files = system.find(name)
        system.copy(files, [opened(to)[1] + file.removeprefix(name) for file in files])
        system.rm(files)
    else:
        to.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(to)


def append(file: pathlib.Path, text: str) -> None:
    """Writes at the end of a file, which in a bucket is written anew: only now and then."""
    if in_bucket(file):
        file.write_text((file.read_text() if file.exists() else "") + text)
    else:
        with open(file, "a") as end:
            end.write(text)
