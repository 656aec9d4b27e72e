"""Small models trained on meshes of virtual devices: losses, gradients, and the messages of the compiled step, a JSON line each.

XLA_FLAGS=--xla_force_host_platform_device_count=16 python -m tests.lab.meshes NAME…

Without names those that come in, a line each.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import jax
import numpy as np

from llm_jax.core.config import override
from llm_jax.core.mesh import Mesh
from llm_jax.core.types import Batch
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import nameless
from llm_jax.lab import population
from llm_jax.lab.experiment import Evaluation, Experiment
from llm_jax.models.decoder import Decoder
from llm_jax.models.model import Model
from llm_jax.nn.ffn import Gated
from llm_jax.nn.moe import MoE
from llm_jax.nn.multihead import Attention
from llm_jax.optim.optimizers import Momentum
from llm_jax.optim.schedules import Constant
from llm_jax.train.ahead import collectives, hlo
from llm_jax.train.ahead.collectives import Collective
from llm_jax.train.pretrain import Train

VOCABULARY, ROWS, LENGTH, STEPS, RATE = 80, 16, 32, 20, 0.05
DENSE = Decoder(width=32, depth=4, attention=Attention(heads=8), ffn=Gated(ratio=2.0), layers="scanned", remat="full")
EXPERTS = MoE(experts=16, expert=Gated(ratio=1.5), balance=0.0)
MIXTURE = Decoder(width=32, depth=2, attention=Attention(heads=4), ffn=EXPERTS, layers="scanned", remat="full")


@dataclass(frozen=True)
class Row:
    """A model on a mesh whose axes are given, all others 1."""

    model: Model
    axes: dict[str, int]
    context: str = "gather"
    rounds: int = 1
    members: int = 1

    @property
    def mesh(self) -> Mesh:
        """With as many devices as its axes multiply to."""
        return Mesh(**{"data": 1} | self.axes, context=self.context, rounds=self.rounds)


def _named(kind: str, model: Model, *meshes: dict[str, int], **rest: Any) -> dict[str, Row]:
    tail = "".join(f"-{what}-{value}" for what, value in rest.items())
    names = ["-".join(f"{axis}{n}" for axis, n in axes.items()) for axes in meshes]
    rows = [Row(model, axes, members=axes.get("population", 1), **rest) for axes in meshes]
    return {f"{kind}-{name}{tail}": row for name, row in zip(names, rows, strict=True)}


TABLE = {
    **_named("dense", DENSE, *({axis: 16} for axis in ("replica", "data", "fsdp"))),
    **_named("dense", DENSE, *({axis: 8} for axis in ("tensor", "sequence"))),
    **_named("dense", DENSE, {"sequence": 16}, context="ring"),
    **_named("dense", DENSE, {"stage": 2}, {"stage": 4}, {"population": 2}),
    **_named("dense", DENSE, {"stage": 2}, rounds=2),
    **_named(
        "experts", MIXTURE, *({axis: 2} for axis in ("data", "fsdp", "expert", "sequence", "tensor", "stage")), {"expert": 16}
    ),
    **_named("dense", DENSE, {"data": 2, "fsdp": 2, "tensor": 2}, {"replica": 2, "data": 2, "fsdp": 2, "tensor": 2}),
    **_named("dense", DENSE, {"fsdp": 2, "sequence": 2, "tensor": 2}, {"fsdp": 4, "sequence": 2, "tensor": 2}, context="ring"),
    **_named("dense", DENSE, {"stage": 2, "fsdp": 2, "tensor": 2}, {"stage": 2, "fsdp": 2, "sequence": 2, "tensor": 2}),
    **_named("experts", MIXTURE, {"replica": 2, "fsdp": 2, "expert": 2}, {"fsdp": 2, "expert": 2, "sequence": 2, "tensor": 2}),
    **_named("experts", MIXTURE, {"stage": 2, "expert": 4}, {"expert": 4, "sequence": 2}, {"stage": 2, "fsdp": 2, "expert": 4}),
    **_named("dense", DENSE, *({"population": 2, axis: 2} for axis in ("stage", "data", "fsdp", "sequence", "tensor"))),
    **_named("experts", MIXTURE, {"population": 2, "expert": 2}, {"population": 2, "fsdp": 2, "expert": 4}),
}


def experiment(row: Row, rate: float = RATE) -> Experiment:
    """The row's experiment, in float32, without clipping: at a rate of 1 the first step takes the gradient away."""
    base = Experiment(
        data=Data(sequence_length=LENGTH, batch_size=ROWS),
        model=row.model,
        optimizer=Momentum(learning_rate=rate),
        schedule=Constant(),
        train=Train(steps=STEPS, clip=None),
        evaluation=Evaluation(every=STEPS),
    )
    return override(base, {"mesh": row.mesh})


@dataclass(frozen=True)
class Trained:
    """losses: `[members, STEPS]`; gradients: of the first step, `[members, …]`; sent: the messages of a step."""

    losses: np.ndarray
    gradients: dict[str, np.ndarray]
    sent: list[Collective]


def train(row: Row) -> Trained:
    """Every member of a population at a lower rate than the one before."""
    members = row.members
    devices = jax.devices()[: math.prod(row.axes.values())]
    compiled = population.compile_population(experiment(row), members, nameless(VOCABULARY), devices=devices)
    batches = [jax.device_put(_batch(step, members), compiled.rows) for step in range(STEPS)]
    program = compiled.steps.lower(_values(row, [1.0] * members), compiled.abstract, batches[0]).compile()

    def start():
        return jax.tree.map(
            lambda x, to: jax.device_put(x[np.zeros(members, int)], to.sharding), _start(row.model), compiled.abstract
        )

    after = jax.device_get(program(_values(row, [1.0] * members), start(), batches[0])[0].params)
    gradients = jax.tree.map(lambda before, after: np.asarray(before) - after, _start(row.model).params, after)
    state, losses, rates = start(), [], _values(row, [RATE / (1 + member) for member in range(members)])
    for batch in batches:
        state, metrics = program(rates, state, batch)
        losses.append(np.asarray(metrics["train/loss"].mean))
    sent = collectives.of_module(hlo.parse(program.as_text()), dict(compiled.mesh.shape))
    named = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)}
    return Trained(np.stack(losses, 1), named, sent)


@functools.cache
def _start(model: Model) -> Any:
    """The state before the first step, of a population of one on one device."""
    one = experiment(Row(model, {}))
    compiled = population.compile_population(one, 1, nameless(VOCABULARY), devices=jax.devices()[:1])
    return compiled.init(population.stacked_values([one], 1))


@functools.cache
def alone(model: Model, members: int) -> Trained:
    """The same on one device."""
    return train(Row(model, {}, members=members))


def _values(row: Row, rates: list[float]) -> dict[str, jax.Array]:
    return population.stacked_values([experiment(row, rate) for rate in rates], len(rates))


def _batch(step: int, members: int) -> Batch:
    """A few of the ids, which can be learned."""
    ids = np.random.default_rng(step).integers(0, 4, (1, 1, ROWS, LENGTH + 1)).astype(np.int32).repeat(members, 0)
    return Batch(ids[..., :-1], ids[..., 1:])


def compared(name: str) -> dict[str, Any]:
    """What a row's numbers differ by from one device's, at most, and what it sends."""
    row = TABLE[name]
    begun = time.perf_counter()
    own, one = train(row), alone(row.model, row.members)
    apart = {path: float(np.abs(own.gradients[path] - one.gradients[path]).max()) for path in own.gradients}
    return {
        "row": name,
        "losses": float(np.abs(own.losses - one.losses).max()),
        "learned": float((own.losses[:, 0] - own.losses[:, -1]).min()),
        "gradients": max(apart.values()),
        "largest": max(float(np.abs(leaf).max()) for leaf in one.gradients.values()),
        "sent": [asdict(each) for each in own.sent],
        "seconds": time.perf_counter() - begun,
    }


if __name__ == "__main__":
    for name in sys.argv[1:] or sys.stdin:
        print(json.dumps(compared(name.strip())), flush=True)
