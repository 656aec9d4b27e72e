"""Fill in the middle: documents whose middle is moved to their end, so that a causal model learns to write what was between."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from llm_jax.core.config import require, traced
from llm_jax.core.types import Batch
from llm_jax.data.tokenizers import Special
from llm_jax.objectives.hidden import Hidden
from llm_jax.objectives.next_token import NextToken
from llm_jax.objectives.rows import arranged, documents, predicting

PREFIX = Special(("<fim_prefix>", "<|fim_prefix|>", "▁<PRE>"))
SUFFIX = Special(("<fim_suffix>", "<|fim_suffix|>", "▁<SUF>"))
MIDDLE = Special(("<fim_middle>", "<|fim_middle|>", "▁<MID>"))
END = Special(("<fim_end>", "▁<EOT>"))
SPECIALS = PREFIX, SUFFIX, MIDDLE, END
# The order of: the four specials, then prefix, middle and suffix of the text
PSM = (0, 2, 4, 6, 1, 5, 3)  # <prefix> prefix <suffix> suffix <middle> middle <end>
SPM = (0, 1, 3, 6, 4, 5, 2)  # <prefix> <suffix> suffix <middle> prefix middle <end>
SLACK = 7  # documents of a packed row that may be moved besides the first; each takes four specials more


@dataclass(frozen=True)
class FillInTheMiddle(Hidden):
    """Next-token prediction of documents of which `rate` are cut at two random places and told in another order.

    Of these `suffix_first` have the suffix before the prefix ("SPM", variant 2), the others "PSM" (Bavarian et al. 2022, §3, and
    appendix D). All tokens are scored, as there. A row has room for eight documents that are moved; later ones stay as they are.

    Evaluation scores each row twice: as it stands, from left to right, under the names of `NextToken`, "bits_per_byte" among them,
    which is to suffer nothing from the moving ("FIM for free": there, §1); and with `rate` of the documents moved, as
    "infilling_loss", "infilling_accuracy" ….
    """

    scores = (*NextToken.scores, *(f"infilling_{name}" for name in Hidden.scores))

    rate: float = traced(0.5)
    suffix_first: float = traced(0.5)

    @property
    def specials(self):
        return SPECIALS

    def validate(self):
        super().validate()
        for name in ("rate", "suffix_first"):
            require(0 <= getattr(self, name) <= 1, name, f"must be in [0, 1], got {getattr(self, name)}")

    @property
    def evaluated(self):
        return {"": NextToken(after=self.after, skip=self.skip), "infilling_": self}

    def lengths(self, length, *, model, packed):
        return length + 4 * _moved(packed) - 1, 0

    def check(self, model):
        NextToken.check(self, model)

    def pose(self, batch, keys_B, *, model, tokens):
        specials_4 = jnp.array([tokens.specials[special.name] for special in SPECIALS], jnp.int32)
        moved = _moved(batch.segments is not None)
        room = batch.tokens.shape[1] + 4 * moved

        def pose(key: jax.Array, row: Batch) -> Batch:
            docs = documents(row)
            whether, which, cut = jax.random.split(key, 3)
            shape, size_D = docs.size_D.shape, docs.size_D
            moved_D = docs.live_D & (jax.random.uniform(whether, shape) < self.rate)
            moved_D = moved_D & (jnp.cumsum(moved_D) <= moved)
            order_D7 = jnp.where((jax.random.uniform(which, shape) < self.suffix_first)[:, None], jnp.array(SPM), jnp.array(PSM))
            cuts_D2 = jnp.sort(jax.random.randint(cut, (*shape, 2), 0, size_D[:, None] + 1), -1)
            part_L = (docs.place_L[:, None] >= cuts_D2[docs.number_L]).sum(-1)  # of the text: 0, 1 or 2
            number_L = docs.number_L
            text_L = jnp.where(moved_D[number_L], order_D7[number_L, 4 + part_L], 0)
            first_L = moved_D[number_L] & (docs.place_L == 0)
            columns = [jnp.concatenate([specials_4[None].repeat(len(number_L), 0), row.tokens[:, None]], 1)]
            columns += [jnp.concatenate([order_D7[number_L, :4], text_L[:, None]], 1)]
            columns += [jnp.concatenate([first_L[:, None].repeat(4, 1), docs.live_D[number_L][:, None]], 1)]
            ids_N, order_N, present_N = (column.reshape(-1) for column in columns)
            number_N = jnp.repeat(number_L, 5)
            values = {"ids": ids_N, "segments": number_N}
            found, filled_R = arranged(7 * number_N + order_N, present_N, room, values)
            return predicting(found["ids"], filled_R, found["segments"], filled_R)

        return jax.vmap(pose)(keys_B, Batch(batch.tokens, batch.targets, batch.weights, batch.segments))


def _moved(packed: bool) -> int:
    """How many documents of a row may be moved, at most."""
    return 1 + SLACK if packed else 1
