"""Our recipe for the loss that nanoGPT's CPU run ends at: `python shakespeare_llm_jax.py TEXT [path=value …]`; prints JSON lines.

The laboratory's runner does it in a folder of its own, with records, checkpoints and results on disk. The last line is the loss
of the whole validation split with the seconds since the process was started.
"""

import json
import os
import sys
import tempfile

from harness import age

from llm_jax.core import platform


def recipe(text: str):
    """The run. What differs from the reference's is said where it is set."""
    from llm_jax.data.corpora import TextFiles
    from llm_jax.data.packing import ConcatThenSplit
    from llm_jax.data.pipeline import Data
    from llm_jax.data.tokenizers import Characters
    from llm_jax.lab.experiment import Checkpoints, Evaluation, Experiment
    from llm_jax.models.decoder import Decoder
    from llm_jax.nn.ffn import Dense
    from llm_jax.nn.multihead import Attention
    from llm_jax.nn.normalization import RMSNorm
    from llm_jax.nn.position import Rope
    from llm_jax.optim.optimizers import Muon
    from llm_jax.optim.schedules import Linear
    from llm_jax.train.pretrain import Train

    steps = 270
    return Experiment(
        seed=int(os.environ.get("SEED", "0")),
        data=Data(corpus=TextFiles(path=text), sequence_length=64, batch_size=12, packing=ConcatThenSplit(document_masks=False)),
        tokenizer=Characters(),
        model=Decoder(
            width=128,
            depth=4,
            attention=Attention(heads=4),
            ffn=Dense(activation="squared_relu"),  # cheaper than an erf, and no worse
            position=Rope(),
            norm=RMSNorm(),
        ),
        # memories of few steps, as befits few steps
        optimizer=Muon(learning_rate=1e-2, momentum=0.8, b1=0.8, b2=0.95, weight_decay=0.0),
        schedule=Linear(warmup=10.0),
        train=Train(steps=steps, log_every=30),
        evaluation=Evaluation(every=steps, bytes=None),
        checkpoints=Checkpoints(every=steps),
    )


def main(text: str, *changes: str) -> None:
    """Trains, and prints the losses."""
    platform.setup()
    from llm_jax.core.written import override_text
    from llm_jax.lab.experiment import Ablation
    from llm_jax.lab.runner import Runner
    from llm_jax.lab.workfolder import WorkFolder

    experiment = override_text(recipe(text), changes)
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(Ablation(question="How soon?", base=experiment, seeds=1), WorkFolder(folder + "/work"))
        (result,) = runner.run()
    seconds = age()
    for step, train in zip(result["curve"]["step"], result["curve"]["train/loss"], strict=True):
        print(json.dumps({"step": step, "train": train}))
    last = {"step": experiment.train.steps, "seconds": seconds, "training_seconds": result["seconds"]}
    print(json.dumps(last | {"valid": result["metrics"]["valid/loss"]}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
