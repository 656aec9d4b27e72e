"""Several corpora in one training run, each with its share of the rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np

from llm_jax.core.config import Config, fingerprint, require, require_positive
from llm_jax.data.apportion import apportion
from llm_jax.data.corpus import Corpus, Member

Points = tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Source(Config):
    """A corpus of a mixture. weight: its share of the rows, relative to the others'; None: as many as it has.

    A weight that changes is points (fraction of training, weight), straight lines between them: ((0, 1), (0.8, 1), (1, 4)). epochs:
    it is read so often, at most; then its share goes to the others, in proportion. rows: only its first so many are trained on.
    """

    name: str
    corpus: Corpus
    weight: float | Points | None = 1.0
    epochs: float | None = None
    rows: int | None = None

    def validate(self):
        plain = bool(self.name) and not set("/@.:") & set(self.name)
        require(plain, "name", f"must be a name without / @ . and :, got {self.name!r}")
        taken = self.name in ("train", "valid", "test") or re.fullmatch(r"\d+x", self.name)
        require(not taken, "name", f"is what scores are called by: call it otherwise than {self.name!r}")
        require_positive(self, "epochs", "rows")
        points = ((0.0, self.weight),) if isinstance(self.weight, (int, float)) else self.weight or ()
        require(self.weight is None or bool(points), "weight", "has no points: give it one (fraction of training, weight) at least")
        require(all(weight >= 0 for _, weight in points), "weight", f"must be >= 0, got {self.weight}")
        at = [fraction for fraction, _ in points]
        rising = at == sorted(set(at)) and all(0 <= fraction <= 1 for fraction in at)
        require(rising, "weight", f"must have its points at rising fractions of training, 0 to 1, got {self.weight}")

    def weight_at(self, fraction: float, rows: int) -> float:
        """Its weight after that fraction of training, if it has so many rows."""
        if isinstance(self.weight, tuple):
            points = np.array(self.weight)
            return float(np.interp(fraction, points[:, 0], points[:, 1]))
        return float(rows if self.weight is None else self.weight)


@dataclass(frozen=True)
class Mixture(Corpus):
    """Corpora whose rows are mixed: each dispatch has each source's share as exactly as whole rows allow.

    "valid" and "test" are as much text of each source, whatever the weights, so that mixtures of the same sources compare; each
    source's own is scored once training is done, as "valid/loss@name". Tokenizers are trained on all of it.
    """

    sources: tuple[Source, ...] = ()

    def validate(self):
        require(bool(self.sources), "sources", "are missing: give at least one Source(name, corpus)")
        nested = any(isinstance(source.corpus, Mixture) for source in self.sources)
        require(not nested, "sources", "has a mixture in it: name its sources one by one, with weights that are products")
        names = [source.name for source in self.sources]
        require(len(set(names)) == len(names), "sources", f"must have names of their own, got {', '.join(names)}")
        sized = {source.weight is None for source in self.sources}
        require(len(sized) == 1, "sources", "must all have a weight, or none: rows and weights are not compared")

    @property
    def probes(self):
        own = [f"{source.name}.{probe}" for source in self.sources for probe in source.corpus.probes]
        return (*(source.name for source in self.sources), *own)

    def check(self, sequence_length):
        for source in self.sources:
            source.corpus.check(sequence_length)

    def members(self, split):
        name, _, probe = split.partition(".")
        named = [source.corpus for source in self.sources if source.name == name]
        if named:
            return named[0].members(probe or "valid")
        limited = split == "train"
        return [Member(source.name, source.corpus, split, source.rows if limited else None) for source in self.sources]

    def apportioned(self, rows, total):
        changing = any(isinstance(source.weight, tuple) for source in self.sources)
        weights = [partial(source.weight_at, rows=count) for source, count in zip(self.sources, rows, strict=True)]
        limits = [np.inf if s.epochs is None else int(s.epochs * count) for s, count in zip(self.sources, rows, strict=True)]
        return apportion(weights, limits, total, changing=changing)

    def named(self) -> Iterator[tuple[str, str]]:
        for source in self.sources:
            for name, text in source.corpus.named():
                yield f"{source.name}:{name}", text

    def documents(self, split):
        self.require_split(split)
        for _, corpus, part, _ in self.members(split):
            yield from corpus.documents(part)

    def fingerprint(self, cache=None):
        return fingerprint([[source.name, source.corpus.fingerprint(cache)] for source in self.sources])
