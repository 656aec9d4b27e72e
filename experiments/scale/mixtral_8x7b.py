"""A mixture of 8 experts of 7 billion parameters, 13 of 47 billion active, on a trillion tokens.

    python -m llm_jax compile --experiment=experiments/scale/mixtral_8x7b.py --topology=v5p:4x8x8

The shape of Mixtral (Jiang et al. 2024). Every expert is on an eighth of the chips, and tokens travel to the two that they choose;
a device has memory for twice the tokens that it gets on average.
"""

from llm_jax.core.config import override
from llm_jax.core.mesh import Mesh
from llm_jax.data.corpora import Jsonl
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import SentencePiece
from llm_jax.lab.experiment import Checkpoints, Evaluation, Experiment
from llm_jax.models.presets import mixtral
from llm_jax.nn.dispatch import Dropless
from llm_jax.optim.optimizers import AdamW
from llm_jax.train.pretrain import Train

experiment = Experiment(
    data=Data(Jsonl(path="corpus"), sequence_length=8192, batch_size=512),
    tokenizer=SentencePiece(vocabulary=32_000),
    model=override(
        mixtral(),
        {"precision.compute": "bfloat16", "layers": "scanned", "remat": "full", "ffn.dispatch": Dropless(room=2.0)},
    ),
    optimizer=AdamW(learning_rate=3e-4, weight_decay=0.1),
    train=Train(steps=240_000),
    evaluation=Evaluation(every=1000, bytes=4_194_304),
    checkpoints=Checkpoints(every=1000),
    mesh=Mesh(data=1, fsdp=-1, expert=8),
)
