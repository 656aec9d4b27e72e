"""What a trial learns from: corpus, fitted tokenizer, token stores, evaluation batches and a teacher, shared by equals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import jax

from llm_jax.core.config import fingerprint, to_json
from llm_jax.core.platform import cache_dir
from llm_jax.core.types import Batch
from llm_jax.data import packing, pipeline
from llm_jax.lab import teachers
from llm_jax.lab.experiment import Experiment
from llm_jax.lab.population import layout
from llm_jax.train.pretrain import Teacher


class Source:
    """The corpus of one experiment through its tokenizer; everything is read from the cache where it was made before."""

    def __init__(self, experiment: Experiment):
        self.data, self.evaluation, self.objective = experiment.data, experiment.evaluation, experiment.objective
        self.corpus = experiment.data.corpus
        mesh, _ = layout(experiment, 1, jax.device_count())
        self.parts = mesh.data * mesh.fsdp  # what a batch's rows are split over, at most
        self.tokenizer = experiment.fitted(cache_dir())
        self._evaluated: dict[tuple[str, int], Batch] = {}

    @property
    def vocabulary(self) -> int:
        """Ids of the tokenizer and of the objective's special tokens, and so rows of the embedding."""
        return self.tokenizer.vocabulary

    def tokens(self, split: str) -> packing.Tokens:
        """The token store of a split."""
        return packing.tokenize(self.corpus, self.tokenizer, split, cache_dir())

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
    def identity(self) -> str:
        """Fingerprint of all that is learned from."""
        corpus = self.corpus.fingerprint()
        return corpus if self.teacher is None else fingerprint([corpus, self.teacher.identity])

    @cached_property
    def training(self) -> packing.Tokens:
        """The token store that is trained on."""
        return self.tokens("train")

    def check(self) -> None:
        """Raises `ConfigError` if any split that will be used is too short, or the teacher none, before anything is trained."""
        _ = self.teacher
        self.feed([0], 1, 0)
        self.evaluations(final=True)

    def feed(self, seeds: Sequence[int], steps: int, start: int) -> Iterator[Batch]:
        """Host batches `[members, steps, B, L]` in the order that each member's seed gives, from step `start` on."""
        return pipeline.feed(self.data, self.training, seeds=seeds, steps_per_item=steps, start_step=start)

    def example(self, steps: int) -> Batch:
        """A host batch `[1, steps, B, L]` like those of `feed`."""
        return pipeline.Dispatches(self.data, self.training, (0,), steps)[0]

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

    def _batches(self, split: str, times: int) -> Batch:
        if (split, times) not in self._evaluated:
            rows = -(-self.data.batch_size // (times * self.parts)) * self.parts
            self._evaluated[split, times] = pipeline.evaluation_batches(
                self.data,
                self.tokens(split),
                length=self.data.sequence_length * times,
                batch=rows,
                byte_lengths=self.tokenizer.byte_lengths,
                limit_bytes=self.evaluation.bytes,
            )
        return self._evaluated[split, times]


class Sources:
    """One `Source` for all experiments that read the same text in the same way."""

    def __init__(self):
        self._known: dict[str, Source] = {}

    def of(self, experiment: Experiment) -> Source:
        """The experiment's source, made on first use."""
        e = experiment
        names = [special.name for special in e.objective.specials]
        parts = (to_json(part) for part in (e.data, e.tokenizer, e.evaluation, e.mesh))
        key = fingerprint([*parts, names, e.objective.taught_by and to_json(e.objective)])
        if key not in self._known:
            self._known[key] = Source(experiment)
        return self._known[key]
