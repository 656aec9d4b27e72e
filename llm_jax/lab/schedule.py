"""Who trains which group when: one process all of them in turn, or any number of workers that share the work folder."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from llm_jax.core.config import ConfigError, fingerprint
from llm_jax.core.distributed import agreed
from llm_jax.lab.claims import Claim, Crew, Lapsed
from llm_jax.lab.plan import Run
from llm_jax.lab.population import structure
from llm_jax.lab.workfolder import WorkFolder

Grouped = Callable[[Sequence[Run], Sequence[Run]], list[list[Run]]]  # (all runs, those without results) → groups to train
Train = Callable[[Sequence[Run], tuple[int, int]], bool]  # (group, (runs done, all runs)) → False: it does not fit, try halves

DONE, FAILED, REPLACED = "done", "failed", "replaced"  # how a claimed group ends

SEEN_LATE = 90.0  # seconds after which a file that another host wrote is seen on NFS, at the latest, whose caches hold 60

WAITING = "all groups that are left are other workers': waiting until they end or are gone (--population makes more, smaller ones)"


class Schedule(Protocol):
    """Has runs trained in groups, and says what a group that is being trained must heed."""

    def finish(self, runs: Sequence[Run], grouped: Grouped, train: Train) -> None:
        """Returns when every run has ended, well or not."""

    def check(self) -> None:
        """Raises `Lapsed` when what is being trained may be another's."""

    def confirm(self) -> None:
        """The same, surely: before what cannot be undone."""

    def beside(self) -> str:
        """What there is to say of the others, or nothing."""

    @property
    def worker(self) -> str | None:
        """The name of this process among several."""


def halves(runs: Sequence[Run]) -> list[Sequence[Run]]:
    """Of a group that does not fit in memory."""
    gc.collect()  # what the attempt allocated, before half of it is tried
    return [runs[: len(runs) // 2], runs[len(runs) // 2 :]]


@dataclass(frozen=True)
class Alone:
    """One job, of one process or several that train together. crew: where nothing else keeps others out, as in a bucket."""

    folder: WorkFolder
    crew: Crew | None = None
    worker: str | None = None

    def finish(self, runs: Sequence[Run], grouped: Grouped, train: Train) -> None:
        """Trains group after group, those that the first of several processes says."""
        known = {run.name: run for run in runs}
        waiting = [known[n] for n in agreed("runs", [run.name for run in runs if self.folder.result(run.name) is None])]
        left = {run.name for run in waiting}
        groups = agreed("groups", [[run.name for run in group] for group in grouped(runs, waiting)])
        stack: list[Sequence[Run]] = [[known[name] for name in group] for group in reversed(groups)]
        while stack:
            members = stack.pop()
            if train(members, (len(runs) - len(left), len(runs))):
                left -= {run.name for run in members}
            else:
                stack += halves(members)[::-1]

    def check(self) -> None:
        """Nobody takes anything over, unless this job seemed dead. Raises `Lapsed`."""
        if self.crew is not None:
            self.crew.check()

    def confirm(self) -> None:
        """The same, surely."""
        if self.crew is not None:
            self.crew.confirm()

    def beside(self) -> str:
        """There is nobody else."""
        return ""


def group_name(runs: Sequence[Run]) -> str:
    """By which a group is claimed, and its folder called."""
    return fingerprint([run.name for run in runs])


@dataclass
class Workers:
    """One of several processes, which claim groups one by one.

    The groups are agreed upon: whoever finds runs that are in none writes down groups for them, as the next entry of a list that
    only grows; a group that does not fit in memory is replaced there by its halves. What failed is tried again by workers that
    come later, not by those who were there.
    """

    folder: WorkFolder
    crew: Crew
    note: Callable[[str], None]
    _groups: dict[str, list[str]] = field(default_factory=dict)  # name → runs
    _entries: int = 0
    _ended: dict[str, str] = field(default_factory=dict)  # group → outcome
    _failed: dict[str, int] = field(default_factory=dict)  # group that had failed before this worker came → its generation then
    _programs: dict[str, str] = field(default_factory=dict)  # group → structure
    _program: str = ""
    _place: str = ""

    def __post_init__(self):
        claims = [self.crew.told(claim) for claim in self.crew.claims().values()]
        self._failed = {claim.name: claim.generation for claim in claims if claim.outcome == FAILED}

    @property
    def worker(self) -> str:
        """The name of this process among several."""
        return self.crew.worker

    def check(self) -> None:
        """Raises `Lapsed` when what is being trained may be another's."""
        self.crew.check()

    def confirm(self) -> None:
        """The same, surely: before what cannot be undone."""
        self.crew.confirm()

    def beside(self) -> str:
        """Which group this is, and how many others are at work."""
        others = self.crew.others
        return f"{self._place} · {others} other worker{'' if others == 1 else 's'}"

    def finish(self, runs: Sequence[Run], grouped: Grouped, train: Train) -> None:
        """Trains what nobody else does, and waits for what others do, until all has ended."""
        told = False
        while True:
            try:
                self._agree(runs, grouped)
                last = self._newest()
                waiting = [name for name in self._ours(runs) if name not in self._ended]
                if not waiting:
                    break
                claim = self._claim(waiting, last, runs)
                if claim is not None:
                    told = False
                    self._turn(claim, last.get(claim.name), runs, train)
                    continue
                if not told:
                    self.note(WAITING)
                told = True
                self.crew.pause()
            except Lapsed as error:
                self.note(f"{error}: what this worker had claimed may be another's, so it is left to whoever claims it next")
                self.crew.rejoin()
        self._see_results(runs)

    def _turn(self, claim: Claim, last: Claim | None, runs: Sequence[Run], train: Train) -> None:
        """Trains the group of a claim and tells how that ended."""
        self._read_entries()
        if claim.name not in self._groups:  # its halves are, by a worker that died then
            self.crew.release(claim, REPLACED)
            return
        known, ours = {run.name: run for run in runs}, self._ours(runs)
        names = self._groups[claim.name]
        members, others = [known[n] for n in names if n in known], [n for n in names if n not in known]
        if last is not None and last.outcome is None:
            self.note(f"the group of {members[0].name} was {last.worker}'s, which is gone: taking it over")
        self._place = f"group {ours.index(claim.name) + 1} of {len(ours)}"
        done = sum(len(self._groups[name]) for name in ours if name in self._ended)
        if others:  # of arms that this worker does not know
            self._replace(claim, [[run.name for run in members], others])
        elif all(self.folder.result(n) is not None for n in names):
            self.crew.release(claim, DONE)
        elif train(members, (done, len(runs))):
            well = all(self.folder.result(n) is not None for n in names)
            self.crew.release(claim, DONE if well else FAILED)
        else:
            self._replace(claim, [[run.name for run in half] for half in halves(members)])

    def _claim(self, waiting: Sequence[str], last: dict[str, Claim], runs: Sequence[Run]) -> Claim | None:
        """The first of the groups that can be claimed.

        Those that the fewest workers had before come first, so that one whose workers die of it holds up no other; of these, those
        that share the program of the group before.
        """
        known = {run.name: run for run in runs}
        for name in waiting:
            if name not in self._programs:
                self._programs[name] = structure(next(known[n] for n in self._groups[name] if n in known).experiment)
        tried = {name: claim.generation for name, claim in last.items()}
        for name in sorted(waiting, key=lambda name: (tried.get(name, 0), self._programs[name] != self._program)):
            claim = self.crew.claim(name, last.get(name))
            if claim is not None:
                self._program = self._programs[name]
                return claim
        return None

    def _ours(self, runs: Sequence[Run]) -> list[str]:
        """The groups that hold any of the runs."""
        wanted = {run.name for run in runs}
        return [name for name, members in self._groups.items() if wanted & set(members)]

    def _newest(self) -> dict[str, Claim]:
        """The newest claim of every group that is not known to have ended; takes note of those that have."""
        newest = {n: self.crew.told(c) for n, c in self.crew.claims().items() if n in self._groups and n not in self._ended}
        for name, claim in newest.items():
            again = claim.outcome == FAILED and self._failed.get(name) == claim.generation
            if claim.outcome is not None and not again:
                self._ended[name] = claim.outcome
        return newest

    # ── the list of groups ───────────────────────────────────────────────────────────────────────────────────────────
    def _agree(self, runs: Sequence[Run], grouped: Grouped) -> None:
        """Sees to it that every run that has no result is in a group."""
        while True:
            self._read_entries()
            covered = {name for members in self._groups.values() for name in members}
            rest = [run for run in runs if run.name not in covered and self.folder.result(run.name) is None]
            if not rest:
                return
            groups = {group_name(members): [run.name for run in members] for members in grouped(runs, rest)}
            self._append({"groups": groups})

    def _replace(self, claim: Claim, parts: Sequence[list[str]]) -> None:
        entry = {"groups": {fingerprint(part): part for part in parts}, "replaces": claim.name}
        while not self._append(entry):
            self._read_entries()
        self.crew.release(claim, REPLACED)

    def _append(self, entry: dict) -> bool:
        """Writes the next entry, unless another worker has written one."""
        self.crew.check()
        written = self.crew.files.create(_entry(self._entries + 1), entry | {"by": self.crew.worker})
        if not written:
            time.sleep(0.05)  # until it is seen
        return written

    def _read_entries(self) -> None:
        while (entry := self.crew.files.read(_entry(self._entries + 1))) is not None:
            self._entries += 1
            self._groups.pop(entry.get("replaces", ""), None)
            self._groups |= entry["groups"]

    def _see_results(self, runs: Sequence[Run]) -> None:
        """Waits for the results of groups that others say are done, which may be seen late. Raises `ConfigError`."""
        until = time.monotonic() + SEEN_LATE
        done = [n for name in self._ours(runs) if self._ended.get(name) == DONE for n in self._groups[name]]
        for name in done:
            while self.folder.result(name) is None:
                if time.monotonic() > until:
                    raise ConfigError("is gone: run without --worker once, which trains it again", str(self.folder.trial(name)))
                time.sleep(1.0)


def _entry(number: int) -> str:
    return f"groups/{number:06}.json"
