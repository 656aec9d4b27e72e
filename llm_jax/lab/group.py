"""Runs that are trained together, as one program, from their first step to their results."""

from __future__ import annotations

import pathlib
import traceback
from collections.abc import Callable, Sequence
from typing import Protocol

from llm_jax.core import distributed, platform
from llm_jax.core.config import to_json
from llm_jax.core.paths import remove_folder
from llm_jax.core.whole import write_whole
from llm_jax.io import profile
from llm_jax.io.checkpoint import Checkpointer
from llm_jax.io.nearby import Nearby
from llm_jax.io.progress import Progress
from llm_jax.io.tracker import Tracker
from llm_jax.lab import plan, results
from llm_jax.lab.claims import Lapsed
from llm_jax.lab.experiment import Ablation
from llm_jax.lab.plan import Run
from llm_jax.lab.population import Compiled, rhythm_of
from llm_jax.lab.schedule import Schedule, group_name
from llm_jax.lab.sources import Source, Sources
from llm_jax.lab.workfolder import WorkFolder, write
from llm_jax.train import incidents
from llm_jax.train.loop import Rhythm, Session, fit
from llm_jax.train.watchdog import Watchdog


class Trainer(Protocol):
    """Whose groups they are."""

    ablation: Ablation
    folder: WorkFolder
    command: str
    scale: str | None
    note: Callable[[str], None]
    sources: Sources
    schedule: Schedule
    watchdog: Watchdog
    profiled: tuple[int, int] | None

    def program(self, runs: Sequence[Run], source: Source) -> Compiled:
        """The compiled program of runs."""


class Group:
    """Runs that are trained together, as one program."""

    def __init__(self, runner: Trainer, runs: Sequence[Run]):
        self.runner, self.runs = runner, runs
        self.name = group_name(runs)
        self.source = runner.sources.of(runs[0].experiment)
        self.cost = plan.cost(runs[0].experiment, self.source.vocabulary, teacher=self.source.asked)
        arms = list(dict.fromkeys(run.arm for run in runs))
        self.title = f"{arms[0] if len(arms) == 1 else f'{len(arms)} arms'} · {runs[0].phase} × {len(runs)}"

    def train(self, *, overall: tuple[int, int]) -> None:
        """Trains the runs and writes their results; `overall` is how many of all runs were done before, for the display."""
        first = self.runs[0].experiment
        compiled = self.runner.program(self.runs, self.source)
        program = compiled.bind([run.experiment for run in self.runs])
        rhythm = rhythm_of(first)
        peak = platform.peak_flops()  # measured, on a CPU, before other threads compile
        seeds = [run.seed for run in self.runs]
        compiled.expect(
            self.source.example(rhythm.dispatch),
            [
                *self.source.evaluations(final=False).values(),
                *self.source.evaluations(final=True).values(),
                *self.source.probed.values(),
            ],
            fresh=not self._checkpoints.is_dir(),
        )
        self.runner.schedule.confirm()
        self.runner.folder.begin(self.name, [run.name for run in self.runs])
        trackers = [Tracker(self.runner.folder.trial(run.name)) for run in self.runs]
        for run in self.runs:
            write(self.runner.folder.trial(run.name) / "config.json", to_json(run.experiment))
        scale = len(self.runs) / rhythm.steps
        with Progress(
            rhythm.steps,
            self.title,
            flops_per_step=scale * self.cost.flops,
            tokens_per_step=scale * self.cost.tokens,
            peak_flops=peak,
            overall=overall,
            beside=self.runner.schedule.beside,
            shown=distributed.leads(),
        ) as progress:
            checkpointer, nearby = self._checkpointer(progress), self._nearby(progress)
            session = self._session(trackers, checkpointer, nearby, progress, rhythm)
            try:
                feed = lambda start: self.source.feed(seeds, rhythm.dispatch, start, compiled.host)  # noqa: E731
                final = fit(program, feed, rhythm, session)
            except Lapsed:
                for tracker in trackers:
                    tracker.leave()
                trackers.clear()
                raise
            finally:
                checkpointer.close()
                if nearby is not None:
                    nearby.wait()
                for tracker in trackers:
                    tracker.close()
        for run, tracker, metrics in zip(self.runs, trackers, final, strict=True):
            self.runner.schedule.confirm()
            found = {"curve": tracker.read(tracker.folder), "incidents": incidents.read(tracker.folder)}
            result = results.finished(run, self._origin(), self.cost, metrics=metrics, **found)
            if not self.runner.folder.finish(run.name, result):
                continue
            if result["status"] == "diverged":
                self.runner.note(f"{run.arm}, {run.phase}, {dict(run.nuisance)}, seed {run.seed}: diverged")
        distributed.meet("the end of a group")
        if nearby is not None:
            nearby.clear()
        if self.runs[0].phase == "tune" and distributed.leads():  # nobody asks for what only chose a learning rate
            remove_folder(self.runner.folder.group(self.name))

    def failed(self, error: Exception) -> None:
        """Writes down that the program raised `error`."""
        message = str(error).strip().splitlines()
        self.runner.note(
            f"{self.title} failed: {type(error).__name__}: {message[0] if message else ''} (see error.txt in the trials' folders)"
        )
        lost = [run for run in self.runs if self.runner.folder.result(run.name) is None]
        self.runner.folder.forget(self.name)  # another try may group them otherwise: fewer of them may fit
        for run in lost:
            folder = self.runner.folder.trial(run.name)
            write(folder / "results.json", results.failed(run, self._origin(), error))
            write_whole(folder / "error.txt", "".join(traceback.format_exception(error)))

    def _origin(self) -> results.Provenance:
        return results.Provenance(
            self.runner.ablation.described(self.runner.scale),
            self.runner.command,
            self.source.content,
            self.source.tokenizer.fingerprint,
            len(self.runs),
            self.name,
            None if self.source.teacher is None else self.source.teacher.identity,
            self.runner.schedule.worker,
        )

    @property
    def _checkpoints(self) -> pathlib.Path:
        return self.runner.folder.group(self.name) / "checkpoints"

    def _checkpointer(self, progress: Progress) -> Checkpointer:
        keep, ablation = self.runs[0].experiment.checkpoints, self.runner.ablation
        # lengths beyond the trained one are scored only at the end
        judged = (ablation.tuning_metric or ablation.metric).partition("@")[0]
        return Checkpointer(
            self._checkpoints,
            keep_last=keep.keep_last,
            keep_every=keep.keep_every,
            best_metric=judged if keep.keep_best else None,
            best_mode="min" if ablation.sign(judged) > 0 else "max",
            warn=progress.note,
        )

    def _nearby(self, progress: Progress) -> Nearby | None:
        own = self.runs[0].experiment.checkpoints
        if own.nearby is None:
            return None
        folder = pathlib.Path(own.nearby) / self.runner.folder.mark / self.name
        return Nearby(folder, every=own.nearby_every, warn=progress.note)

    def _session(
        self,
        trackers: Sequence[Tracker],
        checkpointer: Checkpointer,
        nearby: Nearby | None,
        progress: Progress,
        rhythm: Rhythm,
    ) -> Session:
        def record(step: int, rows: Sequence[dict[str, float]]) -> None:
            for tracker, row in zip(trackers, rows, strict=True):
                tracker.log(row)

        def rewind(step: int, recorded: int) -> None:
            self.runner.schedule.confirm()
            if step:
                progress.note(f"{self.title}: going on after step {step}")
            for tracker in trackers:
                tracker.truncate_after(recorded)

        def keep() -> None:
            for tracker in trackers:
                tracker.send()
            for tracker in trackers:
                tracker.keep()

        traced = self.runner.profiled if distributed.leads() else None
        folders, seeds = [tracker.folder for tracker in trackers], [run.seed for run in self.runs]
        told = lambda text: progress.note(f"{self.title}: {text}")  # noqa: E731
        return Session(
            record=record,
            rewind=rewind,
            report=progress.update,
            evaluations=self.source.evaluations(final=False),
            final=self.source.evaluations(final=True) | self.source.probed,
            tokens_per_step=self.cost.tokens / rhythm.steps,
            flops_per_step=self.cost.flops / rhythm.steps,
            checkpointer=checkpointer,
            nearby=nearby,
            recorded=lambda: min(max((r["step"] for r in tracker.read(tracker.folder)), default=0) for tracker in trackers),
            proceed=self.runner.schedule.check,
            keep=keep,
            watchdog=self.runner.watchdog,
            profiler=profile.once(self.runner.folder.path, traced, [run.arm for run in self.runs]),
            watch=self.runs[0].experiment.train.guard.watch(incidents.Incidents(folders, seeds, self.source.origin, told)),
        )
