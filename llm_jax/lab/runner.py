"""Running an ablation: plan → groups → trials, each written down as soon as it ends; what is done is never done again."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax

from llm_jax.core import distributed, platform
from llm_jax.core.config import ConfigError, fingerprint, nearest, to_json
from llm_jax.core.mesh import Mesh
from llm_jax.core.paths import in_bucket
from llm_jax.io.tracker import is_full
from llm_jax.lab import plan, results
from llm_jax.lab.claims import Crew, Lapsed, check_lease, clear
from llm_jax.lab.experiment import Ablation, Experiment
from llm_jax.lab.group import Group
from llm_jax.lab.plan import Cost, Run
from llm_jax.lab.population import Compiled, check_mesh, compile_population, groups, layout, require_all_busy, structure
from llm_jax.lab.schedule import Alone, Schedule, Workers
from llm_jax.lab.sources import Reading, Source, Sources
from llm_jax.lab.workfolder import WorkFolder
from llm_jax.train.interruption import Interrupted
from llm_jax.train.pretrain import trial
from llm_jax.train.watchdog import Watchdog


@dataclass
class Runner:
    """Trains what an ablation declares into a work folder, in groups of at most `largest` trials (None: what memory holds).

    command and scale are written down with every result. note: called with a sentence worth telling. failures: trials
    that raised an error; they are written down too, and tried again by the next run. lease: seconds, of one of many workers
    that share the folder; None: this process has it for itself. profiled: steps, from and to, that are traced of the first group of
    each arm.
    """

    ablation: Ablation
    folder: WorkFolder
    command: str = ""
    scale: str | None = None
    largest: int | None = None
    note: Callable[[str], None] = lambda text: print(text, file=sys.stderr)
    failures: int = 0
    sources: Sources = field(default_factory=Sources)
    watchdog: Watchdog = field(default_factory=Watchdog)
    profiled: tuple[int, int] | None = None
    lease: float | None = None
    schedule: Schedule = field(init=False, repr=False)
    _compiled: dict[tuple[str, Mesh, int], Compiled] = field(default_factory=dict)

    def check(self) -> None:
        """Finds what is wrong with any arm before anything is trained or written. Raises `ConfigError`."""
        if self.lease is not None:
            check_lease(self.lease)
            if jax.process_count() > 1:
                raise ConfigError(f"is one process, and this is one of {jax.process_count()} that train together", "--worker")
        traced: set[str] = set()
        found: dict[str | None, str] = {}  # what is wrong → the first arm of which it is
        for arm in self.ablation.arms:
            found.setdefault(self._wrong(self.ablation.experiment(arm), traced), arm)
            if len(found) > 1:
                break
        for sentence, arm in found.items():
            if sentence is not None:
                where = f" (in arm {arm!r})" if len(found) > 1 else ""  # else no arm is the cause
                raise ConfigError(f"{sentence}{where}")

    def _wrong(self, experiment: Experiment, traced: set[str]) -> str | None:
        """What is, in a sentence, or nothing; traced: structures whose lengths are known to be right."""
        try:
            mesh, _ = layout(experiment, 1, len(jax.devices()))
            check_mesh(experiment, mesh)
            if jax.process_count() > 1:
                require_all_busy(experiment, mesh, len(jax.devices()))
            if self.profiled is not None and self.profiled[0] >= experiment.train.steps:
                raise ConfigError(f"begins after the last of {experiment.train.steps} steps", "--profile")
            source = self.sources.of(experiment)
            source.check()
            self._check_metrics(experiment, source)
            if structure(experiment) not in traced:  # a length that is refused is found here, not at the end
                _check_lengths(experiment, source)
                traced.add(structure(experiment))
        except ConfigError as error:
            return str(error)
        return None

    def _check_metrics(self, experiment: Experiment, source: Source) -> None:
        """Raises `ConfigError` for a metric that the experiment will not have."""
        ablation = self.ablation
        scores = (*experiment.objective.scores, *experiment.evaluation.scores)
        splits = [name.partition("@") for name in source.evaluations(final=True)]
        known = [f"{split}/{score}{at}{times}" for split, at, times in splits for score in scores]
        known += [f"{probe}/accuracy" for probe in source.probed]
        for metric in [ablation.metric, ablation.tuning_metric, *(claim.metric for claim in ablation.claims)]:
            if metric is not None and metric not in known:
                raise ConfigError(f"is not scored: did you mean {nearest(metric, known)}?", f"metric {metric!r}")

    def costs(self) -> dict[str, Cost]:
        """Arm → what one of its trials takes."""
        return {arm: self._cost(self.ablation.experiment(arm)) for arm in self.ablation.arms}

    def readings(self) -> dict[str, list[Reading]]:
        """Arm → what its training reads."""
        return {arm: self.sources.of(self.ablation.experiment(arm)).readings() for arm in self.ablation.arms}

    def _cost(self, experiment: Experiment) -> Cost:
        source, steps = self.sources.of(experiment), experiment.train.steps
        during, final = (
            list({id(b): b.tokens.shape for b in source.evaluations(final=f).values()}.values()) for f in (False, True)
        )
        times = math.ceil(steps / experiment.evaluation.every) - 1  # at the end, `final` is scored instead
        scored = [(math.prod(shape), shape[-1]) for shape in during * times + final]
        return plan.cost(experiment, source.vocabulary, scored=scored, teacher=source.asked)

    def largest_population(self, experiment: Experiment) -> int:
        """How many trials of this structure may share a program."""
        source = self.sources.of(experiment)
        each = plan.cost(experiment, source.vocabulary, teacher=source.asked)
        most = max(len(self.ablation.grid) * self.ablation.tuning_seeds, self.ablation.seeds) * len(self.ablation.arms)
        wanted = 1 if experiment.train.guard.alone else min(self.largest or most, most)
        return plan.largest_population(experiment, each, memory=platform.memory(), devices=jax.device_count(), wanted=wanted)

    def run(self) -> list[dict[str, Any]]:
        """Tunes, then trains the winners; returns the results of all trials. Raises `ConfigError` and `Interrupted`."""
        arms = {arm: self.ablation.experiment(arm) for arm in self.ablation.arms}
        for name, value in ({"the code": results.code()} | results.versions()).items():
            distributed.require_same(name, value)
        distributed.require_same("the experiment", fingerprint([to_json(e) for e in arms.values()]))
        self.check()
        with self.folder.alone(workers=self.lease is not None) if distributed.leads() else contextlib.nullcontext():
            corpora = {arm: self.sources.of(e).identity for arm, e in arms.items()}
            tokenizers = {arm: self.sources.of(e).tokenizer.fingerprint for arm, e in arms.items()}
            given = {"corpora": corpora, "tokenizers": tokenizers, "scale": self.scale}
            distributed.led("the work folder", lambda: self.folder.claim(self.ablation, **given))
            distributed.require_same("what is read", fingerprint([corpora, tokenizers]))
            with self._scheduled():
                tuning = plan.tuning_runs(self.ablation)
                tuned = self._all(tuning, after=len(arms) * self.ablation.seeds)
                best = distributed.agreed("winners", plan.winners(self.ablation, tuned))
                for arm in arms:
                    if arm not in best:
                        why = "no point of the grid trained to the end, so there is no winner to train on fresh seeds"
                        self.note(f"arm {arm!r}: {why}")
                return tuned + self._all(plan.final_runs(self.ablation, best), before=len(tuning))

    @contextlib.contextmanager
    def _scheduled(self) -> Iterator[None]:
        """Trains what there is to train by itself, or with other workers."""
        files, versions = self.folder.shared_files, results.versions() | {"code": results.code()}
        if self.lease is not None:
            with Crew(files, lease=self.lease, versions=versions, note=self.note) as crew:
                self.schedule = Workers(self.folder, crew, self.note)
                yield
            return
        if not distributed.leads():
            self.schedule = Alone(self.folder)
            yield
        elif in_bucket(files.folder):
            with Crew(files, versions=versions, alone=True, note=self.note) as crew:
                self.schedule = Alone(self.folder, crew)
                try:
                    yield
                except Lapsed as error:
                    way = "let it end, or choose another --workdir"
                    raise ConfigError(
                        f"is another run's, which saw no sign of life of this one ({error}): {way}", str(self.folder.path)
                    ) from None
        else:
            clear(files, self.note)
            self.schedule = Alone(self.folder)
            yield

    def _all(self, runs: Sequence[Run], *, before: int = 0, after: int = 0) -> list[dict[str, Any]]:
        """The results of a phase; before, after: runs of the phases before it and after it, which are counted with its own."""

        def train(members: Sequence[Run], overall: tuple[int, int]) -> bool:
            return self._train(members, (before + overall[0], before + overall[1] + after))

        self.schedule.finish(runs, self._grouped, train)
        finished = [result for run in runs if (result := self.folder.result(run.name)) is not None]
        self.failures += distributed.agreed("failures", len(runs) - len(finished))
        return finished

    def _train(self, members: Sequence[Run], overall: tuple[int, int]) -> bool:
        """Trains a group and writes down how it ended; False, and nothing written, if it is to be tried in halves."""
        group = Group(self, members)
        try:
            group.train(overall=overall)
        except (Interrupted, ConfigError, Lapsed):
            raise
        except Exception as error:  # one broken group must not lose the others
            self.schedule.confirm()  # who trains it now may have taken away what it needed
            if is_full(error) or not distributed.failed_together(group.name, error=error):
                raise  # nothing could be written down about any of them
            if len(members) > 1 and distributed.agreed("no room", platform.is_exhausted(error)):
                self.note(f"{group.title} does not fit in memory: trying half of them at a time")
                self.folder.forget(group.name)
                return False
            group.failed(error)
        return True

    def _grouped(self, runs: Sequence[Run], waiting: Sequence[Run]) -> list[list[Run]]:
        """The groups to train: first those that a run before this one began, with the same members, so that the numbers are too."""
        known, left, found = {run.name: run for run in runs}, {run.name: run for run in waiting}, []
        for names in self.folder.begun():
            if set(names) <= set(known) and set(names) & set(left) and len(names) <= (self.largest or len(names)):
                found.append([known[name] for name in names])
                left = {name: run for name, run in left.items() if name not in names}
        rest = list(left.values())
        return found + [[rest[i] for i in part] for part in groups([r.experiment for r in rest], largest=self.largest_population)]

    def program(self, runs: Sequence[Run], source: Source) -> Compiled:
        """The compiled program of the runs' structure and size; the one that tuning compiled serves the winners too."""
        key = structure(runs[0].experiment), *layout(runs[0].experiment, len(runs), jax.device_count())
        if key not in self._compiled:
            idle = jax.device_count() - math.prod(key[1].sizes.values())
            if idle:
                self.note(f"{len(runs)} runs of {runs[0].arm} leave {idle} of {jax.device_count()} devices idle")
            self._compiled[key] = compile_population(runs[0].experiment, len(runs), source.tokenizer, teacher=source.teacher)
        return self._compiled[key]


def _check_lengths(experiment: Experiment, source: Source) -> None:
    """Raises `ConfigError` for a length that the model or the objective refuses."""
    one = trial(experiment, source.tokenizer, source.asked)
    state = jax.eval_shape(one.init, {})
    if source.teacher is not None:
        batches = jax.tree.map(lambda x: x[0], source.example(1))
        jax.eval_shape(one.steps, {}, state, batches, source.teacher.shapes)
    for batches in {b.tokens.shape[-1]: b for b in source.evaluations(final=True).values()}.values():
        row = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, 1, *x.shape[2:]), x.dtype), batches)
        jax.eval_shape(one.evaluate, {}, state, row)
