"""Distillation: the next token as a larger model, which is not trained, expects it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax

from llm_jax.core.config import ConfigError, require, require_positive, substitute, traced, traced_values
from llm_jax.core.sharding import constrain
from llm_jax.nn.kernels import blocks
from llm_jax.nn.losses import distillation, top_k_distillation
from llm_jax.objectives.next_token import NextToken, at_once


@dataclass(frozen=True)
class Distillation(NextToken):
    """weight · T² · KL(teacher ‖ student) + (1 - weight) · the loss of `NextToken`, of each token (Hinton et al. 2015, §2).

    teacher: a work folder, one of its trials, or a folder of Hugging Face; its tokenizer must be the experiment's. It reads every
    batch in the step that trains the student, without dropout and without a gradient, its parameters split over the mesh as its own
    training would split them, its logits made a few tokens at a time like the student's. What it has rows for that are no ids of
    the tokenizer is left out. temperature T: both are softened by it. top_k: its most probable ids alone are told apart; None: all.
    Evaluation does not ask it. Tokens after the next one are learned from the text alone.
    """

    teacher: str = "runs/teacher"
    weight: float = traced(0.5)
    temperature: float = traced(1.0)
    top_k: int | None = None

    def validate(self):
        super().validate()
        require(0 <= self.weight <= 1, "weight", f"must be in [0, 1], got {self.weight}")
        require_positive(self, "temperature", "top_k")

    @property
    def taught_by(self):
        return self.teacher

    def _summed(self, said, step, targets_BL, weights_BL):
        if step:
            return super()._summed(said, step, targets_BL, weights_BL)
        if said.teacher is None:
            raise ConfigError(
                f"{self.teacher!r} has said nothing: Distillation() is for `run`, take NextToken()", "objective.teacher"
            )
        if at_once(said, 0):
            return (self._blended(said.logits, said.teacher.logits, targets_BL) * weights_BL).sum()
        taught = said.teacher.unembeddings[0]
        parts = {name: getattr(taught, name) for name in ("matrix", "bias")}

        def judge(values: Any, logits_NV: jax.Array, targets: Any) -> jax.Array:
            targets_N, hidden_ND = targets
            teacher_NV = constrain(replace(taught, hidden=hidden_ND, **values["teacher"]).logits(), None, "vocab_act")
            return substitute(self, values["own"])._blended(logits_NV, teacher_NV, targets_N)

        values = {"own": traced_values(self, jax.Array), "teacher": parts}
        return blocks.total(judge, said.unembeddings[0], (targets_BL, taught.hidden), weights_BL, values)

    def _blended(self, logits: jax.Array, teacher: jax.Array, targets: jax.Array) -> jax.Array:
        """The loss of each token, `[..., V]` twice and `[...]` to `[...]`."""
        teacher = teacher[..., : logits.shape[-1]]
        if self.top_k is None or self.top_k >= logits.shape[-1] - 1:  # of V - 1 ids the last is known too
            divergence = distillation(logits, teacher, temperature=self.temperature)
        else:
            log_q, ids = jax.lax.top_k(jax.nn.log_softmax(teacher / self.temperature), self.top_k)
            divergence = top_k_distillation(logits, ids, log_q, temperature=self.temperature)
        return self.weight * divergence + (1 - self.weight) * self._each(0, logits, targets)
