"""Span corruption: sentinels stand where spans of a text were, and what each of them hides is to be said."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import require, require_positive
from llm_jax.core.types import Batch, Weighted
from llm_jax.data.tokenizers import Special
from llm_jax.objectives.hidden import Hidden
from llm_jax.objectives.next_token import check_blind
from llm_jax.objectives.rows import arranged, documents, position_in_segment, predicting
from llm_jax.objectives.spans import Denoiser, noise_mask

SLACK = 16  # tokens, at least, that packed rows have room for besides what one document takes; a quarter of that if it is more
MODES = {"R": Special(("[R]", "[NLU]")), "S": Special(("[S]", "[S2S]")), "X": Special(("[X]", "[NLG]"))}  # second: as published


@dataclass(frozen=True)
class Denoising(Hidden):
    """Denoisers, one drawn for each document by their shares. sentinels: how many ids there are for them; n spans take n + 1.

    An encoder-decoder reads what is shown in its encoder; a decoder reads it first, from everywhere with the mask `Prefix()` and
    causally without. The answer is each sentinel and what it hides, and one more sentinel. The first of them, which says nothing,
    is given to begin with.

    documents: a packed row has room for so many of one length, and a quarter more for the answers. What takes more room than there
    is, the last of many short documents, is left out: training reports "left_out", the part of the text's tokens that are in these.
    """

    abstract = True

    sentinels: int = 100
    documents: int = 1

    def validate(self):
        super().validate()
        require(self.sentinels >= 2, "sentinels", f"must be at least 2, got {self.sentinels}")
        require_positive(self, "documents")

    @property
    def mixture(self) -> tuple[Denoiser, ...]:
        """The denoisers, of which one does what is to be done to a document."""
        raise NotImplementedError

    @property
    def specials(self):
        modes = dict.fromkeys(denoiser.mode for denoiser in self.mixture if denoiser.mode)
        return (*(Special((f"<extra_id_{k}>",)) for k in range(self.sentinels)), *(MODES[mode] for mode in modes))

    def check(self, model):
        require(model.head.words, "model.head", "must score token ids to say what is hidden: take LanguageModel()")
        check_blind(model)

    def lengths(self, length, *, model, packed):
        plan = self._plan(length, packed=packed)
        return (plan.answers - 1, plan.inputs) if model.encodes else (plan.both - 1, 0)

    def pose(self, batch, keys_B, *, model, tokens):
        plan = self._plan(batch.tokens.shape[1], packed=batch.segments is not None)
        needed = f"must be at least {plan.most_spans + 1} for rows of {plan.length} tokens, got {self.sentinels}"
        require(plan.most_spans < self.sentinels, "objective.sentinels", f"{needed}: raise it, or take longer spans")
        sentinels_S = jnp.array([tokens.specials[special.name] for special in self.specials[: self.sentinels]], jnp.int32)
        modes = [tokens.specials[MODES[denoiser.mode].name] if denoiser.mode else 0 for denoiser in self.mixture]
        split = _split if model.encodes else _joined

        def pose(key: jax.Array, row: Batch) -> Posed:
            return split(plan, _items(plan, key, row, sentinels_S, jnp.array(modes, jnp.int32)))

        posed = jax.vmap(pose)(keys_B, Batch(batch.tokens, batch.targets, batch.weights, batch.segments))
        if plan.exact:  # every place is filled by the one document
            return replace(posed, segments=None, positions=None, input_segments=None, input_positions=None)
        return posed

    def loss(self, apply, params, batch, **given):
        loss, metrics = super().loss(apply, params, batch, **given)
        if given["train"] and isinstance(batch, Posed):
            metrics = metrics | {"left_out": Weighted(batch.left_out.sum(), batch.asked.sum())}
        return loss, metrics

    def _plan(self, length: int, *, packed: bool) -> Plan:
        return Plan(self.mixture, length, packed=packed, documents=self.documents)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Posed(Batch):
    """Rows with something hidden. asked, left_out `[B]`: tokens of the documents to be posed, and of those without room."""

    asked: jax.Array = field(kw_only=True)
    left_out: jax.Array = field(kw_only=True)


@dataclass(frozen=True)
class SpanCorruption(Denoising):
    """One denoiser for all: T5's objective (Raffel et al. 2020, §3.1.4). rate, mean_length: as a `Denoiser`'s."""

    rate: float = 0.15
    mean_length: float | None = 3.0

    def validate(self):
        super().validate()
        _ = self.mixture

    @property
    def mixture(self):
        return (Denoiser(self.rate, self.mean_length),)


@dataclass(frozen=True)
class UL2(Denoising):
    """A mixture of denoisers: short spans (R), long or many (X), or the end (S). Tay et al. 2022 (arXiv:2205.05131).

    The seven are table 1 of §3.1.2, and alike probable, as in the code of appendix 9.2 unless it is given rates (public
    reproductions give R and X 0.4 each and S 0.2: `Denoiser(share=)`). Mode tokens are spelt as the published checkpoints have them
    where a tokenizer knows those: [NLU], [NLG] and [S2S] for R, X and S. Two things differ from that code. S hides the last quarter
    of a document, as in the table; there it begins anywhere, as in `PrefixLM`. And one is drawn for each document, not a row.
    """

    denoisers: tuple[Denoiser, ...] = (
        Denoiser(0.15, 3, "R"),
        Denoiser(0.15, 8, "R"),
        Denoiser(0.25, None, "S"),
        Denoiser(0.5, 3, "X"),
        Denoiser(0.5, 8, "X"),
        Denoiser(0.15, 64, "X"),
        Denoiser(0.5, 64, "X"),
    )

    def validate(self):
        super().validate()
        require(len(self.denoisers) > 0, "denoisers", "is empty: give it at least one Denoiser()")

    @property
    def mixture(self):
        return self.denoisers


class Plan:
    """What the denoisers K do to documents of 0 … L tokens, and how much room that takes: all known before any text is.

    shares_K: how probable each is. noise_KN, spans_KN: hidden tokens and spans. inputs, answers, both: room for what is shown, for
    what is to be said, for the two in one row. exact: one document fills it.
    """

    def __init__(self, mixture: tuple[Denoiser, ...], length: int, *, packed: bool, documents: int = 1):
        self.length, self.exact = length, not packed and len(mixture) == 1
        shares_K = np.array([denoiser.share for denoiser in mixture])
        self.shares_K = shares_K / shares_K.sum()
        self.modes_K = np.array([denoiser.mode is not None for denoiser in mixture])
        size_N, most = np.arange(length + 1), max(min(documents, length // 2), 1) if packed else 1
        amounts = [denoiser.amounts(size_N) for denoiser in mixture]
        self.noise_KN, self.spans_KN = (np.stack(part) for part in zip(*amounts, strict=True))
        self.most_spans = int(self.spans_KN.max())

        def room(tokens_KN: np.ndarray) -> int:
            return max(n * int(tokens_KN[:, length // n].max()) for n in range(1, most + 1))

        shown_KN = self.modes_K[:, None] + size_N - self.noise_KN + self.spans_KN
        said_KN = self.noise_KN + self.spans_KN + 1
        inputs, answers, both = room(shown_KN), room(said_KN), room(shown_KN + said_KN)
        self.inputs = max(inputs, length) if packed else inputs
        self.answers = _roomy(answers) if packed else answers
        self.both = length + _roomy(both - length) if packed else both


def _roomy(tokens: int) -> int:
    return tokens + max(SLACK, tokens // 4)


@dataclass(frozen=True)
class _Items:
    """What becomes of a row: N tokens and sentinels. shown, said: where they go; given: what of the latter is not scored.

    shown_D, said_D: how many there are of each document; text_D: of how many tokens they are made.
    """

    ids_N: jax.Array
    document_N: jax.Array
    shown_N: jax.Array
    said_N: jax.Array
    given_N: jax.Array
    shown_D: jax.Array
    said_D: jax.Array
    text_D: jax.Array

    def counted(self, posed: Batch, fits_D: jax.Array) -> Posed:
        """What was made of the documents that fit."""
        return Posed(**vars(posed), asked=self.text_D.sum(), left_out=jnp.where(fits_D, 0, self.text_D).sum())


def _items(plan: Plan, key: jax.Array, row: Batch, sentinels_S: jax.Array, modes_K: jax.Array) -> _Items:
    docs, (choose, cut) = documents(row), jax.random.split(key)
    number_L = docs.number_L
    which_D = jax.random.choice(choose, len(modes_K), docs.size_D.shape, p=jnp.asarray(plan.shares_K, jnp.float32))
    noise_D, spans_D = (jnp.asarray(table_KN)[which_D, docs.size_D] for table_KN in (plan.noise_KN, plan.spans_KN))
    hidden_L = noise_mask(cut, docs, noise_D, spans_D)
    asked_D = docs.live_D & (spans_D > 0)
    mode_D = jnp.asarray(plan.modes_K)[which_D]
    begins_L = hidden_L & ~jnp.pad(hidden_L, (1, 0))[:-1]
    count_L = jnp.cumsum(begins_L)
    span_L = jnp.maximum(count_L - count_L[docs.start_D[number_L]] - 1, 0)  # a document begins with a shown token
    sentinel_L, never_L = sentinels_S[span_L], jnp.zeros(begins_L.shape, bool)
    ids_L5 = [modes_K[which_D][number_L], jnp.where(hidden_L, sentinel_L, row.tokens)]
    ids_L5 += [sentinel_L, row.tokens, sentinels_S[spans_D[number_L]]]
    shown_L5 = [mode_D[number_L] & (docs.place_L == 0), ~hidden_L | begins_L, never_L, never_L, never_L]
    said_L5 = [never_L, never_L, begins_L, hidden_L, docs.last_L]
    given_L5 = [never_L, never_L, begins_L & (span_L == 0), never_L, never_L]
    each = lambda columns: jnp.stack(columns, 1).reshape(-1)  # noqa: E731
    asked_N = jnp.repeat(asked_D[number_L], 5)
    return _Items(
        each(ids_L5),
        jnp.repeat(number_L, 5),
        each(shown_L5) & asked_N,
        each(said_L5) & asked_N,
        each(given_L5),
        asked_D * (mode_D + docs.size_D - noise_D + spans_D),
        asked_D * (noise_D + spans_D + 1),
        asked_D * docs.size_D.astype(jnp.float32),
    )


def _split(plan: Plan, items: _Items) -> Posed:
    """What is shown as inputs, and the answer for the decoder."""
    fits_D = (jnp.cumsum(items.shown_D) <= plan.inputs) & (jnp.cumsum(items.said_D) <= plan.answers)
    fits_N, values = fits_D[items.document_N], {"ids": items.ids_N, "segments": items.document_N}
    shown, filled_M = arranged(items.document_N, items.shown_N & fits_N, plan.inputs, values)
    said, filled_R = arranged(items.document_N, items.said_N & fits_N, plan.answers, values | {"scored": ~items.given_N})
    answer = predicting(said["ids"], filled_R, said["segments"], said["scored"])
    segments_M = jnp.where(filled_M, shown["segments"], -1)
    posed = replace(answer, inputs=shown["ids"], input_segments=segments_M, input_positions=position_in_segment(segments_M))
    return items.counted(posed, fits_D)


def _joined(plan: Plan, items: _Items) -> Posed:
    """Of each document what is shown, and then the answer."""
    fits_D = jnp.cumsum(items.shown_D + items.said_D) <= plan.both
    fits_N = fits_D[items.document_N]
    values = {"ids": items.ids_N, "segments": items.document_N, "scored": items.said_N & ~items.given_N}
    present_N = (items.shown_N | items.said_N) & fits_N
    row, filled_R = arranged(2 * items.document_N + items.said_N, present_N, plan.both, values)
    posed = predicting(row["ids"], filled_R, row["segments"], row["scored"])
    return items.counted(replace(posed, prefix=(filled_R & ~row["scored"])[:-1]), fits_D)
