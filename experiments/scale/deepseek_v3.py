"""A mixture of 256 experts, 38 of 671 billion parameters active.

    python -m llm_jax compile --experiment=experiments/scale/deepseek_v3.py --topology=v5p:8x8x8

The shape of DeepSeek-V3 (2024): latent attention, three dense layers, then 256 experts of which 8 and a shared one are used,
balanced by a bias. 64 groups of chips have 4 experts each; a device has memory for twice the tokens that it gets on average.
"""

from llm_jax.core.config import override
from llm_jax.core.mesh import Mesh
from llm_jax.data.corpora import Jsonl
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import SentencePiece
from llm_jax.lab.experiment import Checkpoints, Evaluation, Experiment
from llm_jax.models.presets import deepseek_v3
from llm_jax.nn.dispatch import Dropless
from llm_jax.optim.optimizers import AdamW
from llm_jax.train.pretrain import Train

experiment = Experiment(
    data=Data(Jsonl(path="corpus"), sequence_length=4096, batch_size=1024),
    tokenizer=SentencePiece(vocabulary=128_000),
    model=override(
        deepseek_v3(),
        {"precision.compute": "bfloat16", "layers": "scanned", "remat": "full", "ffn.dispatch": Dropless(room=2.0)},
    ),
    optimizer=AdamW(learning_rate=2.2e-4, weight_decay=0.1),
    train=Train(steps=240_000),
    evaluation=Evaluation(every=1000, bytes=4_194_304),
    checkpoints=Checkpoints(every=1000),
    mesh=Mesh(data=1, fsdp=-1, expert=64),
)
