"""Starting points for experiments: whole, valid `Experiment`s that a file overrides where its question differs."""

from __future__ import annotations

from llm_jax.data.pipeline import Data
from llm_jax.lab.experiment import Checkpoints, Evaluation, Experiment
from llm_jax.models.decoder import Decoder
from llm_jax.nn.multihead import Attention
from llm_jax.optim.optimizers import AdamW
from llm_jax.train.pretrain import Train


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
