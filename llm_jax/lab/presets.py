"""Starting points for experiments: whole, valid `Experiment`s that a file overrides where its question differs."""

from __future__ import annotations

from typing import Any

from llm_jax.data.corpora import Jsonl
from llm_jax.data.pipeline import Data
from llm_jax.lab.experiment import Checkpoints, Evaluation, Experiment
from llm_jax.models.decoder import Decoder
from llm_jax.nn.multihead import Attention
from llm_jax.optim.optimizers import AdamW
from llm_jax.train.pretrain import Train

# a scale that shows in half a minute whether everything runs; its numbers mean nothing
SMOKE: dict[str, Any] = {
    "train.steps": 20,
    "train.log_every": 10,
    "evaluation.every": 20,
    "evaluation.bytes": 4096,
    "checkpoints.every": 20,
    "model.width": 32,
    "tuning_seeds": 1,
    "seeds": 2,
}
# a scale for a pod: 0.3 B parameters, 5.2 B tokens of text of your own; the standard library would be read hundreds of times
FULL: dict[str, Any] = {
    "data.corpus": Jsonl(path="corpus"),
    "data.sequence_length": 1024,
    "data.batch_size": 256,
    "model.width": 1024,
    "model.depth": 24,
    "train.steps": 20_000,
    "evaluation.every": 1000,
    "evaluation.bytes": 4_194_304,
    "checkpoints.every": 1000,
    "model.precision.compute": "bfloat16",
    "mesh.fsdp": -1,
    "mesh.data": 1,
    "nuisance": {"optimizer.learning_rate": (3e-4, 1e-3, 3e-3)},
    "tuning_seeds": 1,
    "seeds": 3,
}


def nano(*, sequence_length: int = 128, steps: int = 400, lengths: tuple[int, ...] = (1,)) -> Experiment:
    """A byte-level model of 2 layers × 64, small enough to train dozens of in minutes on two CPU cores.

    sequence_length: tokens a sequence, 1,024 tokens a step. lengths: multiples of it that the final model is scored at.
    """
    return Experiment(
        data=Data(sequence_length=sequence_length, batch_size=max(1024 // sequence_length, 2)),
        model=Decoder(width=64, depth=2, attention=Attention(heads=2)),
        optimizer=AdamW(learning_rate=4e-3),
        train=Train(steps=steps),
        checkpoints=Checkpoints(every=steps // 4),
        evaluation=Evaluation(every=steps // 4, bytes=65_536, lengths=lengths),
    )
