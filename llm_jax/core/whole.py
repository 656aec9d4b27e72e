"""Files and folders that are whole under their names: each is written beside its place and renamed when all of it is there.

Processes on several hosts may write the same one at a time: the partial names are random, because process ids are equal in
containers. What is killed leaves ".NAME.…" behind, which `remove_left` takes away. A file in a bucket is whole by itself.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import pathlib
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Sequence

from llm_jax.core.distributed import farewells
from llm_jax.core.paths import in_bucket, opened

NO_LINKS = errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP  # what file systems without hard links say


@contextlib.contextmanager
def whole_file(file: pathlib.Path) -> Iterator[pathlib.Path]:
    """A path of this machine to write to, which then takes the place of `file`; nothing is left of it after an error."""
    if in_bucket(file):
        with tempfile.TemporaryDirectory() as scratch:
            partial = pathlib.Path(scratch) / file.name
            yield partial
            file.write_bytes(partial.read_bytes())
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(file)
    try:
        with _naming(partial, file):
            yield partial
            partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(folder: pathlib.Path, stands: Callable[[pathlib.Path], bool]) -> Iterator[pathlib.Path]:
    """An empty folder to fill, which then gets the name `folder`; nothing is left of it after an error,
    nor when the process leaves.

    stands: whether a folder that has the name by then, another process's, stays in its stead; one that does not is removed.
    """
    partial = _beside(folder)
    remove = functools.partial(shutil.rmtree, partial, ignore_errors=True)
    farewells.append(remove)
    try:
        with _naming(partial, folder):
            partial.mkdir(parents=True)
            yield partial
        if folder.exists() and not stands(folder):
            _remove(folder)
        try:
            partial.rename(folder)
        except OSError as error:  # another process was faster
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
    finally:
        remove()
        farewells.remove(remove)


def write_whole(file: pathlib.Path, content: str | bytes) -> None:
    """Writes a small file, text as UTF-8."""
    with whole_file(file) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_new(file: pathlib.Path, content: str | bytes) -> bool:
    """Writes a small file unless there is one, and says whether it did: of several processes on any hosts exactly one does.

    In a bucket a process that had to ask twice may be told that there was one, which it wrote itself. Raises `OSError` with one of
    `NO_LINKS` where a disk has no hard links, by which alone a name is given whole and only once.
    """
    data = content.encode() if isinstance(content, str) else content
    if in_bucket(file):
        system, name = opened(file)
        try:
            system.pipe_file(name, data, mode="create")  # if-generation-match: 0
        except FileExistsError:
            return False
        return True
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(file)
    try:
        with _naming(partial, file):
            partial.write_bytes(data)
            try:
                os.link(partial, file)
            except FileExistsError:
                return os.path.samefile(partial, file)  # NFS may repeat a request that it has carried out
            return True
    finally:
        partial.unlink(missing_ok=True)


def safe(name: str) -> str:
    """A name without what files and shells take for something else."""
    return "".join(c if c.isalnum() or c in "+-_." else "-" for c in name)


def try_file(file: pathlib.Path) -> None:
    """Writes a file beside it and removes it. Raises `OSError`, which names `file`, where that cannot be."""
    partial = _beside(file)
    try:
        with _naming(partial, file):
            partial.write_bytes(b"\n")
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def left(folder: pathlib.Path, names: Sequence[str]) -> list[pathlib.Path]:
    """What was being written to files and folders of these names, or patterns of names, in a folder, and never got them."""
    return [path for name in names for path in folder.glob(f".{name}.*")]


def remove_left(folder: pathlib.Path, names: Sequence[str]) -> None:
    """Removes what is left of them. Nobody may be writing there."""
    for path in left(folder, names):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextlib.contextmanager
def _naming(partial: pathlib.Path, place: pathlib.Path) -> Iterator[None]:
    """What the system refuses is said of the place, not of what is written beside it, nor of nothing, as a full disk is."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or isinstance(error.filename, (str, os.PathLike))):
            error.filename = str(place if error.filename is None else error.filename).replace(str(partial), str(place))
        raise


def _beside(path: pathlib.Path) -> pathlib.Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}")


def _remove(folder: pathlib.Path) -> None:
    """Under another name first, so that whoever looks meanwhile finds all of a folder or none."""
    aside = _beside(folder)
    with contextlib.suppress(FileNotFoundError):  # another process does the same
        folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)
