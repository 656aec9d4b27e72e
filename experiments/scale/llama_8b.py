"""A dense model of 8 billion parameters on a trillion tokens.

    python -m llm_jax compile --experiment=experiments/scale/llama_8b.py --topology=v5e:16x16

The shape of Llama 3 8B (Llama Team 2024), 4 million tokens a step. Parameters and optimizer are split over all chips, and layers
are computed again in the backward pass.
"""

from llm_jax.core.config import override
from llm_jax.core.mesh import Mesh
from llm_jax.data.corpora import Jsonl
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import SentencePiece
from llm_jax.lab.experiment import Checkpoints, Evaluation, Experiment
from llm_jax.models.presets import llama3
from llm_jax.optim.optimizers import AdamW
from llm_jax.train.pretrain import Train

experiment = Experiment(
    data=Data(Jsonl(path="corpus"), sequence_length=8192, batch_size=512),
    tokenizer=SentencePiece(vocabulary=128_000),
    model=override(llama3("8B"), {"precision.compute": "bfloat16", "layers": "scanned", "remat": "full"}),
    optimizer=AdamW(learning_rate=3e-4, weight_decay=0.1),
    train=Train(steps=240_000),
    evaluation=Evaluation(every=1000, bytes=4_194_304),
    checkpoints=Checkpoints(every=1000),
    mesh=Mesh(data=1, fsdp=-1),
)
