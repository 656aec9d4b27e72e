"""Checkpoints through Orbax, behind one thin door: asynchronous, retained best / last / every N, and never the end of a run.

A save that fails (a full disk) is reported, and training goes on. A checkpoint that cannot be read back is set aside, and the
next newest one is taken.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import pathlib
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from llm_jax.core import distributed
from llm_jax.core.config import ConfigError
from llm_jax.core.paths import absolute, in_bucket, move_folder, opened, to_path
from llm_jax.core.whole import write_whole
from llm_jax.io import keys, layers

CHECKSUMS = "checksums.json"


class Checkpointer:
    """The checkpoints of one program in one folder.

    keep_last, keep_every: the newest so many stay, and those at multiples of so many steps. best_metric, best_mode: the one
    whose metrics were best by that name stays too. warn: called with a sentence when something went wrong.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        *,
        keep_last: int = 1,
        keep_every: int | None = None,
        best_metric: str | None = None,
        best_mode: str = "min",
        asynchronous: bool = True,
        warn: Callable[[str], None] = warnings.warn,
    ):
        self.folder, self.warn = absolute(folder), warn
        self._best_metric, self._best_mode = best_metric, best_mode
        policies: list[Any] = [checkpoint_managers.LatestN(keep_last + 1)]  # one more than asked for: the newest may prove damaged
        if keep_every is not None:
            policies.append(checkpoint_managers.EveryNSteps(keep_every))
        if best_metric is not None:
            policies.append(checkpoint_managers.BestN(get_metric_fn=self._score, reverse=best_mode == "min", n=1))
        self._options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(policies),
            best_fn=self._score if best_metric else None,
            best_mode=best_mode,
            enable_async_checkpointing=asynchronous,
            cleanup_tmp_directories=True,
        )
        self._manager: ocp.CheckpointManager | None = None
        self._unchecked: set[int] = set()
        self._sealer = ThreadPoolExecutor(1, thread_name_prefix="checksums")
        self._sealing: list[Future[None]] = []
        for name in ("absl", "orbax"):  # Orbax tells the story of every save
            logging.getLogger(name).setLevel(logging.ERROR)

    def _score(self, metrics: Mapping[str, float]) -> float:
        worst = float("inf") if self._best_mode == "min" else float("-inf")
        value = metrics.get(self._best_metric or "")
        return worst if value is None else value

    def _open(self) -> ocp.CheckpointManager:
        if self._manager is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            distributed.abreast("the checkpoints")  # Orbax meets by a program, the first of its kind
            self._manager = ocp.CheckpointManager(self.folder, options=self._options)
        return self._manager

    def save(self, step: int, state: Any, extra: Mapping[str, Any], metrics: Mapping[str, float]) -> bool:
        """Starts saving `state` (arrays of any sharding, typed keys) and `extra` (JSON); False if that failed.

        The arrays may be donated as soon as this returns.
        """
        self._settle()  # Orbax would tell of one that failed by not saving the next
        self._unchecked.clear()
        try:
            manager = self._open()
            finite = {k: float(v) for k, v in metrics.items() if v == v and abs(v) != float("inf")}
            saved = manager.save(
                step,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(keys.taken_out(state)), extra=ocp.args.JsonSave(dict(extra))),
                metrics=finite,
                force=True,
            )
            self._unchecked.add(step)
            return bool(saved)
        except Exception as error:  # a full or read-only disk
            self._lost(step, error)
            return False

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are on disk, the oldest first."""
        self.wait()
        there = distributed.agreed("any checkpoint", self.folder.is_dir())
        return distributed.agreed("checkpoints", sorted(self._open().all_steps())) if there else []

    def restore(self, abstract: Any, *, at_most: int | None = None) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, extra) of the newest checkpoint that is whole, laid out as `abstract` says; None if there is none.

        A leading axis of another length, as a population has that is padded for other devices, is cut or filled up with zeros;
        layers are stacked, or stand alone, as `abstract` has them.
        One whose checksums are wrong, or that has none and cannot be read, is set aside. at_most: those of later steps are removed.
        Raises what Orbax raises on a whole one, and `ConfigError` where an optimizer's state cannot be laid out so.
        """
        there = self.steps()
        for step in [step for step in there if at_most is not None and step > at_most]:
            self._open().delete(step)
            there.remove(step)
        for step in reversed(there):
            sealed = distributed.agreed("sealed", _sealed(self.folder / str(step)))
            damage = distributed.first_said("damage", _damage(self.folder / str(step))) if sealed else None
            if damage is None:
                found, error = None, None
                try:
                    stored = ocp.PyTreeCheckpointHandler().metadata(self.folder / str(step) / "state").tree
                    asked, back = layers.as_stored(keys.taken_out(abstract), stored)
                    args = ocp.args.Composite(state=_layout(asked), extra=ocp.args.JsonRestore())
                    found = self._open().restore(step, args=args)
                except ConfigError:  # of the program, not of the checkpoint
                    raise
                except Exception as wrong:
                    if sealed:  # every byte is as it was written: the fault is not the checkpoint's
                        raise
                    error = str(wrong).splitlines()[0] if str(wrong) else type(wrong).__name__
                damage = distributed.first_said("what cannot be read", error)
                if damage is None and found is not None:
                    return step, keys.put_back(back(found["state"]), abstract), found["extra"]
            self._set_aside(step, damage)
        return None

    def wait(self) -> bool:
        """Returns when everything is on disk (True), or has been reported as lost (False)."""
        self._settle()
        for written in self._sealing:
            written.result()
        whole = not self._unchecked
        self._unchecked.clear()
        self._sealing.clear()
        return whole

    def _settle(self) -> None:
        """Returns when the save that was begun last has ended, and tells if it failed: then it stays unchecked."""
        try:
            if self._manager is not None:
                self._manager.wait_until_finished()
        except Exception as error:
            self._lost(max(self._unchecked, default=-1), error)
        self._seal()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self.wait()
        self._sealer.shutdown()
        if self._manager is not None:
            try:
                self._manager.close()
            except Exception as error:
                self._lost(-1, error)
            self._manager = None

    def _lost(self, step: int, error: Exception) -> None:
        if distributed.several():  # the others' part may be there, and they would wait for this process at the next one
            raise error
        reason = str(error).strip().splitlines()
        self.warn(
            f"the checkpoint of step {step} could not be saved, training goes on: {reason[0] if reason else type(error).__name__}"
        )
        manager, self._manager = self._manager, None  # a manager whose save failed stays failed: the next save opens a new one
        try:
            if manager is not None:
                manager.close()
        except Exception as again:
            logging.getLogger(__name__).debug("closing after a failed save: %s", again)

    def _seal(self) -> None:
        """Has a thread write the checksums of the checkpoints that have been committed since."""
        for step in sorted(self._unchecked):
            folder = self.folder / str(step)
            if ocp.utils.is_checkpoint_finalized(folder):
                self._unchecked.discard(step)
                self._sealing.append(self._sealer.submit(_write_checksums, folder))

    def _set_aside(self, step: int, damage: str) -> None:
        aside = self.folder.with_name(f"{self.folder.name}.damaged") / str(step)
        distributed.meet("a damaged checkpoint")
        self.warn(f"the checkpoint of step {step} is damaged ({damage}); it was moved to {aside}, and the next newest one is taken")
        self._open().close()
        self._manager = None
        if distributed.leads():
            move_folder(self.folder / str(step), aside)
        distributed.meet("a damaged checkpoint")


def steps(folder: str | os.PathLike, *, whole: bool = False) -> list[int]:
    """Those of the checkpoints in a folder that were written whole, the oldest first; whole: and still are as they were written."""
    found = [one for one in absolute(folder).glob("*") if one.name.isdigit() and _sealed(one)]
    return sorted(int(one.name) for one in found if not (whole and _damage(one)))


def written(folder: str | os.PathLike, step: int | None) -> str:
    """A fingerprint of the checksums of all files of a checkpoint when it was written; empty where there is none."""
    files = _parts(to_path(folder) / str(step))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16] if files else ""


def read(
    folder: str | os.PathLike,
    parts: Mapping[str, Callable[[dict[str, Any]], Any] | None],
    *,
    step: int | None = None,
    layout: Callable[[dict[str, Any]], Any] | None = None,
) -> tuple[int, dict[str, Any]] | None:
    """(step, parts of the state) of a checkpoint in a folder that is whole; None if there is none. Nothing on the disk is changed.

    parts: name → what makes a tree like the part, given all that is stored; or None to take it as nested dictionaries. step: whose;
    None is the newest's. layout: makes of the parts' shapes what they shall be, `jax.ShapeDtypeStruct`s with shardings, of which
    each device reads only what it holds; an axis may be shorter: what is behind its end is not read. None: all, on the host.
    """
    for step in [one for one in reversed(steps(folder)) if step in (None, one)]:
        whole = absolute(folder) / str(step)
        if _damage(whole) is not None:
            continue
        stored = ocp.PyTreeCheckpointHandler().metadata(whole / "state").tree
        item = {name: stored[name] if like is None else like(stored) for name, like in parts.items()}
        item = item if layout is None else keys.taken_out(layout(item))
        one = (lambda _: ocp.RestoreArgs(restore_type=np.ndarray)) if layout is None else _as_laid_out
        with ocp.PyTreeCheckpointer() as reader:
            request = ocp.args.PyTreeRestore(item=item, restore_args=jax.tree.map(one, item), partial_restore=True)
            return step, reader.restore(whole / "state", args=request)
    return None


def _files(folder: pathlib.Path) -> dict[str, Callable[[], list[Any]]]:
    """Relative path → () → [size, CRC-32] of every file; in a bucket what that tells of it, which keeps it whole by itself."""
    if in_bucket(folder):
        system, name = opened(folder)
        told = {one["name"].removeprefix(f"{name}/"): one for one in system.find(name, detail=True).values()}
        found = {file: lambda one=one: [one["size"], one["crc32c"]] for file, one in told.items()}
    else:
        files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
        found = {name: lambda file=file: [file.stat().st_size, zlib.crc32(file.read_bytes())] for name, file in files.items()}
    return {name: found[name] for name in sorted(found) if not name.lstrip(".").startswith(CHECKSUMS)}


def _own(files: Mapping[str, Callable[[], list[Any]]]) -> Iterator[tuple[str, list[Any]]]:
    """Name and checksum of this process's share of the files."""
    for name in list(files)[distributed.index() :: distributed.count()]:
        yield name, files[name]()


def _write_checksums(folder: pathlib.Path) -> None:
    name = CHECKSUMS + (f".{distributed.index()}-of-{distributed.count()}" if distributed.several() else "")
    with contextlib.suppress(Exception):  # it was not to be kept, and is gone; or there is no room, and Orbax will have to judge it
        write_whole(folder / name, json.dumps(dict(_own(_files(folder)))))


def _parts(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of checksums, one for each process that wrote; none until all have."""
    found = sorted(folder.glob(f"{CHECKSUMS}*"))
    wanted = int(found[0].name.rpartition("-of-")[2]) if found and "-of-" in found[0].name else 1
    return found if len(found) == wanted else []


def _sealed(folder: pathlib.Path) -> bool:
    return bool(_parts(folder))


def _damage(folder: pathlib.Path) -> str | None:
    """What differs in a sealed checkpoint from what was written, or None; of several processes each looks at its share."""
    known: dict[str, list[Any]] = {}
    for file in _parts(folder):
        try:
            known |= json.loads(file.read_text())
        except json.JSONDecodeError:
            return f"{file.name} cannot be read"
    files = _files(folder)
    wrong = [name for name in known if name not in files] or [
        name for name, found in _own(files) if known.get(name, found) != found
    ]
    return f"{wrong[0]} is missing or changed" if wrong else None


def _layout(abstract: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(item=abstract, restore_args=jax.tree.map(_as_laid_out, abstract))


def _as_laid_out(x: Any) -> ocp.ArrayRestoreArgs:
    return ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape, dtype=x.dtype, strict=False)
