"""The 8B model on rows of 131,072 tokens.

    python -m llm_jax compile --experiment=experiments/scale/llama_8b_128k.py --topology=v5p:8x8x8

Continued training at a longer context (Llama Team 2024, §3.4.2): rows are split over 16 chips along their length, keys and values
are gathered, and every chip has as much of the causal triangle to do. Positions are scaled as Llama 3.1 scales them. Parameters
are split over 128 chips, of which there are four copies: fewer than 32 rows of a matrix on each are a slow message.
"""

from llm_jax.core.config import override
from llm_jax.core.mesh import Mesh
from llm_jax.data.corpora import Jsonl
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import SentencePiece
from llm_jax.lab.experiment import Checkpoints, Evaluation, Experiment
from llm_jax.models.presets import llama3_1
from llm_jax.optim.optimizers import AdamW
from llm_jax.train.pretrain import Train

experiment = Experiment(
    data=Data(Jsonl(path="corpus"), sequence_length=131_072, batch_size=32),
    tokenizer=SentencePiece(vocabulary=128_000),
    model=override(llama3_1("8B"), {"precision.compute": "bfloat16", "layers": "scanned", "remat": "full"}),
    optimizer=AdamW(learning_rate=3e-5, weight_decay=0.1),
    train=Train(steps=24_000),
    evaluation=Evaluation(every=1000, bytes=4_194_304),
    checkpoints=Checkpoints(every=500),
    mesh=Mesh(data=-1, fsdp=8, sequence=16),
)
