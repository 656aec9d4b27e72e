"""The work folder of an ablation: whose it is, and one folder a trial whose `results.json` says all there is to say."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm_jax.core import distributed
from llm_jax.core.config import ConfigError, to_json
from llm_jax.core.paths import in_bucket, reaching, require_folder, to_path
from llm_jax.core.whole import NO_LINKS, write_new, write_whole
from llm_jax.io.shared import Shared
from llm_jax.lab.experiment import Ablation

MEMBERS = "members.json"
ENDED = "done", "diverged"
SHOWN = 6  # differences named in an error
OWN = ("shared", "ablation.json")  # there may be in a folder that is no ablation's yet, since another worker makes it one
FOR_ARMS = "arms", "corpora", "tokenizers"  # what an identity tells for each arm
TOLD = "metrics.jsonl", "incidents.jsonl", "results.json"  # of a trial
SIDES = "better", "than", "since", "than_since"  # where a claim names an arm


class WorkFolder:
    """A folder that holds one ablation. Opening it for another is refused, with what differs; nothing is overwritten.

    trials: where the trials' own folders are instead; of several processes that train together only the first one's records count.
    """

    def __init__(self, path: str | os.PathLike, *, trials: str | os.PathLike | None = None):
        self.path = to_path(path)
        self._trials = self.path / "trials" if trials is None else to_path(trials)

    @contextlib.contextmanager
    def alone(self, *, workers: bool = False) -> Iterator[None]:
        """Keeps other processes from training into the folder meanwhile; workers: but other workers.

        Raises `ConfigError` if one already is, on this machine or on another whose file system tells of locks. A bucket has none:
        there a `Crew` of one does it.
        """
        if in_bucket(self.path):
            file = self.path / "shared" / f"{uuid.uuid4().hex}.txt"
            with reaching(self.path):
                write_whole(file, "\n")
                file.unlink()
            yield
            return
        require_folder(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            with contextlib.suppress(OSError):  # a file system without locks
                try:
                    fcntl.flock(folder, (fcntl.LOCK_SH if workers else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                except BlockingIOError:
                    other, way = ("a run that is no --worker", "") if workers else ("another run", "join it if it is a --worker, ")
                    said = f"is in use by {other}: let it end, {way}or choose another --workdir"
                    raise ConfigError(said, str(self.path)) from None
            yield
        finally:
            os.close(folder)

    def claim(
        self, ablation: Ablation, *, corpora: dict[str, str], tokenizers: dict[str, str] | None = None, scale: str | None = None
    ) -> None:
        """Makes the folder this ablation's, or checks that it is.

        More seeds, and a selection of the arms, are the same ablation: finished trials stay. Another base, grid, metric or
        arm of the same name is another. corpora: arm → fingerprint of its corpus; tokenizers: of its tokenizer, which may come
        from a file that has changed. Raises `ConfigError`.
        """
        identity = {
            "base": to_json(ablation.base),
            "nuisance": {p: list(v) for p, v in ablation.nuisance.items()},
            "metric": [ablation.metric, ablation.mode, ablation.tuning_metric],
            "tuning_seeds": ablation.tuning_seeds,
            "arms": {arm: to_json(changes) for arm, changes in ablation.arms.items()},
            "corpora": corpora,
            "tokenizers": tokenizers or {},
        }
        file, described, mark = self.path / "ablation.json", ablation.described(scale), uuid.uuid4().hex
        present = [found.name for found in self.path.glob("*")]
        others = [name for name in present if name not in OWN and not name.startswith(f".{file.name}.")]
        if file.exists():
            known = _read(file, "identity")
            known["identity"].setdefault("tokenizers", {})
            found = _differences(known["identity"], identity)
            if found:
                there = known["ablation"].get("scale")
                found = ([f"--scale is {there} there and {scale} here"] if there != scale else []) + found
                more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
                raise ConfigError(
                    f"belongs to another experiment: {'; '.join(found[:SHOWN])}{more}. Choose another --workdir", str(self.path)
                )
            for part in FOR_ARMS:
                identity[part] = known["identity"][part] | identity[part]
            described, mark = merged(known["ablation"], described), known.get("mark", mark)
        elif others:
            raise ConfigError("is not empty and holds no ablation.json: choose another --workdir", str(self.path))
        content = {"identity": identity, "ablation": described, "mark": mark}
        if not file.exists() or _read(file) != json.loads(json.dumps(finite(content))):
            write(file, content)

    def declared(self) -> dict[str, Any] | None:
        """The ablation as described by all runs into the folder, or None if none has claimed it."""
        file = self.path / "ablation.json"
        return _read(file, "ablation")["ablation"] if file.exists() else None

    @property
    def mark(self) -> str:
        """What no other work folder has, once an ablation has claimed it."""
        return _read(self.path / "ablation.json", "mark")["mark"]

    @property
    def shared_files(self) -> Shared:
        """By which the workers that share the folder agree."""
        return Shared(self.path / "shared")

    def trial(self, name: str) -> pathlib.Path:
        """The folder of a trial; elsewhere than in the work folder it begins with what that one's tells of it."""
        folder, common = self._trials / name, self.path / "trials" / name
        if folder != common and not folder.exists():
            for file in (common / told for told in TOLD if (common / told).exists()):
                write_whole(folder / file.name, file.read_bytes())
        return folder

    def group(self, name: str) -> pathlib.Path:
        """The folder of a group's checkpoints."""
        return self.path / "groups" / name

    def begin(self, name: str, members: Sequence[str]) -> None:
        """Writes down which trials a group trains together."""
        if distributed.leads():
            write(self.group(name) / MEMBERS, list(members))

    def forget(self, name: str) -> None:
        """Undoes `begin`."""
        if distributed.leads():
            (self.group(name) / MEMBERS).unlink(missing_ok=True)

    def begun(self) -> list[list[str]]:
        """The members of every group whose folder is still there."""
        return [_read(file) for file in sorted((self.path / "groups").glob(f"*/{MEMBERS}"))]

    def finish(self, name: str, result: Mapping[str, Any]) -> bool:
        """Writes down how a trial ended, unless that is written (and not that it failed); whether it did."""
        file, before = self.trial(name) / "results.json", self._written(name)
        if before is None:
            try:
                return write_new(file, _text(result))
            except OSError as error:
                if error.errno not in NO_LINKS:  # where there are none, there are no workers either
                    raise
        elif before["status"] in ENDED:
            return False
        write(file, result)
        return True

    def result(self, name: str) -> dict[str, Any] | None:
        """The results of a finished trial (done or diverged), or None: a failed one is to be tried again."""
        result = self._written(name)
        return result if result is not None and result["status"] in ENDED else None

    def _written(self, name: str) -> dict[str, Any] | None:
        file = self.trial(name) / "results.json"
        return _read(file, "status") if file.exists() else None


def merged(known: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What two descriptions of an ablation declare together: `given` is the newer, and may name only some of the arms.

    A claim that `given` could make, having both arms, and does not make is gone; the baseline stays where its arm is not given.
    """
    arms, texts = given["arms"], {claim["text"] for claim in given["claims"]}
    kept = [c for c in known["claims"] if c["text"] not in texts and not {c[side] for side in SIDES if side in c} <= set(arms)]
    whole = set(known["arms"]) <= set(arms)
    return dict(given) | {
        "arms": arms if whole else list(dict.fromkeys([*known["arms"], *arms])),
        "scientific": {**known["scientific"], **given["scientific"]},
        "claims": [*given["claims"], *kept],
        "baseline": given["baseline"] if whole else known["baseline"],
        "seeds": max(known["seeds"], given["seeds"]),
    }


def _differences(known: Any, given: Any, path: str = "") -> list[str]:
    """Sentences on where two identities differ; what is told for arms that only one of them names is no difference."""
    if isinstance(known, dict) and isinstance(given, dict) and known.get("class") == given.get("class"):
        keys = [k for k in known if k in given] if path in FOR_ARMS else list(dict.fromkeys([*known, *given]))
        found = []
        for key in keys:
            found += _differences(known.get(key), given.get(key), f"{path}.{key}" if path else key)
        return found
    return [] if known == given else [f"{path.removeprefix('base.')} is {_short(known)} there and {_short(given)} here"]


def _short(value: Any) -> str:
    text = value["class"] if isinstance(value, dict) and "class" in value else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def write(file: pathlib.Path, data: Any) -> None:
    """Writes JSON whole or not at all; numbers that are not finite become null."""
    write_whole(file, _text(data))


def _text(data: Any) -> str:
    return json.dumps(finite(data), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """`value` with NaN and infinities as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, (list, tuple)) else value


def _read(file: pathlib.Path, field: str | None = None) -> Any:
    """What a file holds; field: which it must have. Raises `ConfigError`."""
    try:
        found = json.loads(file.read_text())
        if field is not None and (not isinstance(found, dict) or field not in found):
            raise ValueError(f"it has no {field!r}")
    except ValueError as error:
        own = ", or choose another --workdir" if field in ("ablation", "identity", "mark") else ""
        way = f"remove it and run the command again{own}"
        raise ConfigError(f"is damaged ({error}): {way}", str(file)) from None
    return found
