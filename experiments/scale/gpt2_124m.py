"""GPT-2 small on 10 billion tokens: the size at which many papers compare their recipes.

    python -m llm_jax compile --experiment=experiments/scale/gpt2_124m.py --topology=v5e:4x4

The architecture of Radford et al. 2019 with today's optimizer settings. A chip holds all of it, so the devices share nothing but
rows; layers are computed again in the backward pass, as 32 rows a chip would keep twice what it has memory for.
"""

from llm_jax.core.config import override
from llm_jax.core.mesh import Mesh
from llm_jax.data.corpora import Jsonl
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizer_json import ByteLevelBPE
from llm_jax.lab.experiment import Checkpoints, Evaluation, Experiment
from llm_jax.models.presets import gpt2
from llm_jax.optim.optimizers import AdamW
from llm_jax.train.pretrain import Train

experiment = Experiment(
    data=Data(Jsonl(path="corpus"), sequence_length=1024, batch_size=512),
    tokenizer=ByteLevelBPE(vocabulary=50_304),
    model=override(gpt2(), {"precision.compute": "bfloat16", "layers": "scanned", "remat": "full"}),
    optimizer=AdamW(learning_rate=6e-4, weight_decay=0.1),
    train=Train(steps=19_000),
    evaluation=Evaluation(every=1000, bytes=4_194_304),
    checkpoints=Checkpoints(every=1000),
    mesh=Mesh(data=-1),
)
