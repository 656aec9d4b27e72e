"""A model of 1.2 billion parameters on 50 billion tokens.

    python -m llm_jax compile --experiment=experiments/scale/llama_1b.py --topology=v5e:8x8

The shape of Llama 3.2 1B (Meta 2024). Parameters and optimizer are split over all chips.
"""

from llm_jax.core.config import override
from llm_jax.core.mesh import Mesh
from llm_jax.data.corpora import Jsonl
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import SentencePiece
from llm_jax.lab.experiment import Checkpoints, Evaluation, Experiment
from llm_jax.models.presets import llama3_2
from llm_jax.optim.optimizers import AdamW
from llm_jax.train.pretrain import Train

experiment = Experiment(
    data=Data(Jsonl(path="corpus"), sequence_length=4096, batch_size=256),
    tokenizer=SentencePiece(vocabulary=128_000),
    model=override(llama3_2("1B"), {"precision.compute": "bfloat16", "layers": "scanned", "remat": "full"}),
    optimizer=AdamW(learning_rate=4e-4, weight_decay=0.1),
    train=Train(steps=48_000),
    evaluation=Evaluation(every=1000, bytes=4_194_304),
    checkpoints=Checkpoints(every=1000),
    mesh=Mesh(data=1, fsdp=-1),
)
