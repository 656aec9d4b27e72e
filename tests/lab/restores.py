"""A population trained on many layouts of devices, each of which saves, and then restores and continues what every other saved.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m tests.lab.restores FOLDER
XLA_FLAGS=--xla_force_host_platform_device_count=4 python -m tests.lab.restores FOLDER HOST:PORT 2 INDEX

Each call trains its own layouts, waits until the folder holds what the other has trained on its own, and restores all of that: a
JSON line for each pair.
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.core import distributed
from llm_jax.core.config import override
from llm_jax.core.mesh import Mesh
from llm_jax.core.types import Batch
from llm_jax.core.whole import write_whole
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import nameless
from llm_jax.io.checkpoint import Checkpointer
from llm_jax.lab import population
from llm_jax.lab.experiment import Evaluation, Experiment
from llm_jax.lab.population import Compiled
from llm_jax.models.decoder import Decoder
from llm_jax.nn.ffn import Gated
from llm_jax.nn.moe import MoE
from llm_jax.nn.multihead import Attention
from llm_jax.optim.optimizers import AdamW
from llm_jax.train.pretrain import Train

VOCABULARY, ROWS, LENGTH, STEPS, MEMBERS = 32, 8, 16, 2, 2
PATIENCE = 900  # seconds in which all must have saved
MODEL = Decoder(
    width=16, depth=2, attention=Attention(heads=4), ffn=MoE(experts=4, expert=Gated(ratio=1.0), balance=0.0), layers="scanned"
)
ALONE: dict[str, dict[str, Any]] = {
    "one": {},
    "one, unrolled": {"layers": "unrolled"},
    "data2": {"data": 2},
    "stage2": {"stage": 2},
    "expert2-tensor2": {"expert": 2, "tensor": 2},
    "fsdp2-sequence2": {"fsdp": 2, "sequence": 2},
    "population2-fsdp2-expert2": {"population": 2, "fsdp": 2, "expert": 2},
    "stage2-fsdp2-tensor2": {"stage": 2, "fsdp": 2, "tensor": 2},
}
TOGETHER: dict[str, dict[str, Any]] = {
    "two processes, fsdp2": {"fsdp": 2},
    "two processes, data2-sequence2": {"data": 2, "sequence": 2},
    "two processes, stage2-expert2-tensor2": {"stage": 2, "expert": 2, "tensor": 2},
    "two processes, population2-replica2-fsdp2": {"population": 2, "replica": 2, "fsdp": 2},
}
LAYOUTS = ALONE | TOGETHER


@functools.cache
def compiled(name: str) -> tuple[Compiled, list[Experiment]]:
    """The program on a layout, whose devices are shared evenly by the processes, and its trials."""
    axes = dict(LAYOUTS[name])
    layers, mesh = axes.pop("layers", "scanned"), Mesh(**{"data": 1, "population": 1} | axes)
    base = Experiment(
        data=Data(sequence_length=LENGTH, batch_size=ROWS),
        model=MODEL,
        optimizer=AdamW(),
        train=Train(steps=10, average=0.9),
        evaluation=Evaluation(every=10),
    )
    base = override(base, {"mesh": mesh, "model.layers": layers})
    each = int(np.prod(list(mesh.sizes.values()))) // jax.process_count()
    devices = [device for process in range(jax.process_count()) for device in _of(process)[:each]]
    return population.compile_population(base, MEMBERS, nameless(VOCABULARY), devices=devices), [
        override(base, {"seed": seed}) for seed in range(MEMBERS)
    ]


def _of(process: int) -> Sequence[jax.Device]:
    return [device for device in jax.devices() if device.process_index == process]


def batches(step: int, program: Compiled) -> Batch:
    """Those of the rows that this process makes."""
    ids = np.random.default_rng(step).integers(0, 4, (MEMBERS, 1, ROWS, LENGTH + 1)).astype(np.int32)
    ids = ids[:, :, program.host.part(ROWS)]
    return Batch(ids[..., :-1], ids[..., 1:])


def whole(tree: Any, mesh: jax.sharding.Mesh) -> dict[str, np.ndarray]:
    """Every number, by its path, on the host."""
    everywhere = jax.jit(_numbers, out_shardings=NamedSharding(mesh, PartitionSpec()))(tree)
    leaves = jax.tree_util.tree_leaves_with_path(everywhere)
    return {jax.tree_util.keystr(path): np.asarray(leaf.addressable_data(0)) for path, leaf in leaves}


def together(numbers: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With layers stacked, all of which are alike."""
    alone = {path for path in numbers if "['layers_" in path}
    stacked = {path: x for path, x in numbers.items() if path not in alone}
    for path in alone:
        if "['layers_0']" in path:
            parts = [numbers[path.replace("layers_0", f"layers_{number}")] for number in range(MODEL.depth)]
            stacked[path.replace("['layers_0']", "['layers']['step_0']")] = np.stack(parts, 1)
    return stacked


def _numbers(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x, tree)


def train(folder: pathlib.Path, name: str) -> None:
    """A checkpoint after STEPS, what it holds, and the losses of the step after it, which are there when all is."""
    program, experiments = compiled(name)
    bound = program.bind(experiments)
    state = bound.init()
    for step in range(STEPS):
        state, _ = bound.steps(state, batches(step, program))
    held = whole(state, program.mesh)
    saver = Checkpointer(folder / name / "checkpoints")
    saver.save(STEPS, state, {}, {})
    saver.close()
    _, metrics = bound.steps(state, batches(STEPS, program))
    if distributed.leads():
        np.savez(folder / name / "held.npz", **held)
        write_whole(folder / name / "losses.json", json.dumps(np.asarray(metrics["train/loss"].mean).tolist()))


def restore(folder: pathlib.Path, onto: str) -> None:
    """Every checkpoint on this layout: whether all numbers are those that were saved, and how far the next losses are apart."""
    program, experiments = compiled(onto)
    bound = program.bind(experiments)
    for name in LAYOUTS:
        checkpointer = Checkpointer(folder / name / "checkpoints")
        step, state, _ = checkpointer.restore(bound.abstract)
        checkpointer.close()
        as_asked = lambda x, like: x.sharding.is_equivalent_to(like.sharding, x.ndim)  # noqa: E731
        split = jax.tree.map(as_asked, state, bound.abstract)  # with the optimizer's state and the average
        got, held = whole(state, program.mesh), np.load(folder / name / "held.npz")
        got, held = (together(numbers) for numbers in (got, dict(held)))
        same = set(got) == set(held) and all(np.array_equal(got[path], held[path]) for path in got)
        _, metrics = bound.steps(state, batches(STEPS, program))
        apart = np.abs(np.asarray(metrics["train/loss"].mean) - json.loads((folder / name / "losses.json").read_text()))
        said = {"saved": name, "onto": onto, "step": step, "same": same, "laid_out": all(jax.tree.leaves(split))}
        if distributed.leads():
            print(json.dumps(said | {"losses": float(apart.max())}), flush=True)


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    if len(sys.argv) > 2:
        distributed.start(coordinator=sys.argv[2], processes=int(sys.argv[3]), process=int(sys.argv[4]))
    own = TOGETHER if distributed.several() else ALONE
    for name in own:
        train(folder, name)
    until = time.monotonic() + PATIENCE
    while len(list(folder.glob("*/losses.json"))) < len(LAYOUTS):
        assert time.monotonic() < until, "the others have not saved"
        time.sleep(0.1)
    for onto in own:
        restore(folder, onto)
    distributed.end()
