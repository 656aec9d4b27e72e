"""The experiment that computes what the other side computes: GPT-2 with biases, learned positions, tied output layer, erf GELU."""

from shapes import BETAS, CLIP, LEARNING_RATE, WEIGHT_DECAY, Shape

from llm_jax.data.packing import ConcatThenSplit
from llm_jax.data.pipeline import Data
from llm_jax.lab.experiment import Checkpoints, Evaluation, Experiment
from llm_jax.models.decoder import Decoder
from llm_jax.nn.embedding import Embed
from llm_jax.nn.ffn import Dense
from llm_jax.nn.linear import Precision
from llm_jax.nn.multihead import Attention
from llm_jax.nn.position import Learned
from llm_jax.optim.optimizers import AdamW
from llm_jax.optim.schedules import Constant
from llm_jax.train.pretrain import Train


def gpt2(shape: Shape, *, steps: int, log_every: int) -> Experiment:
    """The run of a shape, evaluated and saved only at its end."""
    return Experiment(
        data=Data(sequence_length=shape.length, batch_size=shape.rows, packing=ConcatThenSplit(document_masks=False)),
        model=Decoder(
            width=shape.width,
            depth=shape.depth,
            attention=Attention(heads=shape.heads, bias=True),
            ffn=Dense(activation="gelu", bias=True),
            position=Learned(max_length=shape.length),
            embedding=Embed(scaled=False),
            precision=Precision(compute=shape.compute),
        ),
        optimizer=AdamW(learning_rate=LEARNING_RATE, b1=BETAS[0], b2=BETAS[1], weight_decay=WEIGHT_DECAY),
        schedule=Constant(warmup=0.0),
        train=Train(steps=steps, clip=CLIP, log_every=log_every),
        evaluation=Evaluation(every=steps),
        checkpoints=Checkpoints(every=steps),
    )
