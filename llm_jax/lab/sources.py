"""What a trial learns from: corpus, fitted tokenizer, token stores, evaluation batches and a teacher, shared by equals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from llm_jax.core.config import ConfigError, fingerprint, to_json
from llm_jax.core.platform import cache_dir
from llm_jax.core.types import Batch, Probed
from llm_jax.data import pipeline
from llm_jax.data.labels import labelled
from llm_jax.data.packing import Rows
from llm_jax.data.pipeline import Dispatches, Host
from llm_jax.lab import teachers
from llm_jax.lab.experiment import Experiment
from llm_jax.lab.population import layout
from llm_jax.train.pretrain import Teacher

EVERYTHING = Host()
EXCERPTS = 4  # of a corpus in a batch that went wrong


@dataclass(frozen=True)
class Reading:
    """What training reads of one corpus: its name, its documents, tokens and rows, and how many rows are drawn."""

    name: str
    documents: int
    tokens: int
    rows: int
    drawn: int

    @property
    def epochs(self) -> float:
        """How often each row is drawn, on average."""
        return self.drawn / self.rows


class Source:
    """The corpus of one experiment through its tokenizer; everything is read from the cache where it was made before."""

    def __init__(self, experiment: Experiment, *, workers: int = 0):
        self.data, self.evaluation, self.steps = experiment.data, experiment.evaluation, experiment.train.steps
        self.objective = experiment.objective
        self.corpus, self.workers = experiment.data.corpus, workers
        mesh, _ = layout(experiment, 1, jax.device_count())
        self.parts = mesh.rows  # what a batch's rows are split over, at most
        self.tokenizer = experiment.fitted(cache_dir())
        self._evaluated: dict[tuple[str, int], Batch] = {}

    @property
    def vocabulary(self) -> int:
        """Ids of the tokenizer and of the objective's special tokens, and so rows of the embedding."""
        return self.tokenizer.vocabulary

    @cached_property
    def teacher(self) -> teachers.Found | None:
        """The trained model that the objective asks, if it asks one. Raises `ConfigError`."""
        folder = self.objective.taught_by
        return None if folder is None else teachers.find(folder, self.objective, self.tokenizer)

    @property
    def asked(self) -> Teacher | None:
        """The teacher as a program sees it."""
        return None if self.teacher is None else self.teacher.asked

    @property
    def content(self) -> str:
        """Fingerprint of the corpus."""
        return self.corpus.fingerprint(cache_dir())

    @property
    def identity(self) -> str:
        """Fingerprint of all that is learned from."""
        return self.content if self.teacher is None else fingerprint([self.content, self.teacher.identity])

    @cached_property
    def training(self) -> list[Rows]:
        """The rows that are trained on."""
        return pipeline.rows_of(self.data, self.tokenizer, "train", cache_dir())

    def check(self) -> None:
        """Raises `ConfigError` if any split that will be used is too short, or the teacher none, before anything is trained."""
        _ = self.teacher
        self._dispatches([0], 1)
        self.evaluations(final=True)
        _ = self.probed

    def feed(self, seeds: Sequence[int], steps: int, start: int, host: Host = EVERYTHING) -> Iterator[Batch]:
        """The host's rows of batches `[members, steps, B, L]`, in the order that each member's seed gives, from step `start` on."""
        return pipeline.feed(self._dispatches(seeds, steps, host), start_step=start, workers=self.workers)

    def example(self, steps: int) -> Batch:
        """A host batch `[1, steps, B, L]` like those of `feed`."""
        return self._dispatches([0], steps)[0]

    def origin(self, seed: int, step: int) -> dict[str, dict[str, Any]]:
        """Where the batch of a step (from 0) comes from, as JSON.

        Corpus → "rows" by number, for each of these "documents" by number in the split, and what the first of them say.
        """
        names, found = [member.name for member in self.corpus.members("train")], dict[str, dict[str, Any]]()
        for one in self._dispatches([seed], 1).origins(step, seed):
            told = found.setdefault(names[one.source], {"rows": [], "documents": [], "begin": []})
            told["rows"].append(one.row)
            told["documents"].append(list(one.documents))
            if len(told["begin"]) < EXCERPTS:
                told["begin"].append(self.tokenizer.decode(one.ids))
        return found

    def _dispatches(self, seeds: Sequence[int], steps: int, host: Host = EVERYTHING) -> Dispatches:
        given = {"seeds": seeds, "steps_per_item": steps, "steps": self.steps, "host": host}
        return pipeline.dispatches(self.data, self.training, **given)

    def readings(self) -> list[Reading]:
        """What training reads, of each corpus."""
        found = self._dispatches([0], 1)
        drawn = found.turns.taken(self.steps * self.data.batch_size)
        members = zip(self.corpus.members("train"), self.training, drawn, strict=True)
        return [Reading(m.name, len(rows.tokens.starts), len(rows.tokens), len(rows), int(count)) for m, rows, count in members]

    def evaluations(self, *, final: bool) -> dict[str, Batch]:
        """Name → batches `[n, B, L]`: the validation split; at the end also other lengths, the corpus's probes, the test split.

        "valid" is always that of the trained length; if others are scored too, "valid@1x" is its other name.
        """
        sets = {}
        for split in ("valid", *(["test"] if final and self.evaluation.test else [])):
            sets[split] = self._batches(split, 1)
            if final and self.evaluation.lengths != (1,):
                sets |= {f"{split}@{times}x": self._batches(split, times) for times in self.evaluation.lengths}
        if final:
            sets |= {f"valid@{probe}": self._batches(probe, 1) for probe in self.corpus.probes}
        return sets

    @cached_property
    def probed(self) -> dict[str, Probed]:
        """What a linear probe is fitted to and scored on, by the name of its scores; nothing where none is asked for."""
        labels = self.evaluation.probe
        if labels is None:
            return {}
        for member in self.corpus.members("valid"):
            if member.corpus.store(self.tokenizer.fingerprint, member.split, str(cache_dir())) is not None:
                told = (
                    f"labels characters, and {type(member.corpus).__name__} has tokens and no text: leave it out, or take the text"
                )
                raise ConfigError(told, "evaluation.probe")
        given = {"length": self.data.sequence_length, "batch": self._rows(1)}
        fit, test = (labelled(self.corpus, self.tokenizer, split, labels, **given) for split in ("valid", "test"))
        return {"probe": Probed(fit, test)}

    def _rows(self, times: int) -> int:
        """Rows of a batch that is scored, of `times` the trained length: about as many tokens as a batch of training."""
        return -(-self.data.batch_size // (times * self.parts)) * self.parts

    def _batches(self, split: str, times: int) -> Batch:
        if (split, times) not in self._evaluated:
            self._evaluated[split, times] = pipeline.evaluation_batches(
                pipeline.rows_of(self.data, self.tokenizer, split, cache_dir(), times=times),
                batch=self._rows(times),
                byte_lengths=self.tokenizer.byte_lengths,
                limit_bytes=self.evaluation.bytes,
            )
        return self._evaluated[split, times]


class Sources:
    """One `Source` for all experiments that read the same text in the same way. workers: processes that make their batches."""

    def __init__(self, *, workers: int = 0):
        self._known, self._workers = dict[str, Source](), workers

    def of(self, experiment: Experiment) -> Source:
        """The experiment's source, made on first use."""
        e = experiment
        names = [special.name for special in e.objective.specials]
        parts = (to_json(part) for part in (e.data, e.tokenizer, e.evaluation, e.mesh))
        key = fingerprint([*parts, names, e.train.steps, e.objective.taught_by and to_json(e.objective)])
        if key not in self._known:
            self._known[key] = Source(experiment, workers=self._workers)
        return self._known[key]
