"""Many trials as one program.

Trials that differ only in traced values (seed, learning rate, weight decay, dropout rate, …) share one compiled program with
a leading population axis, split over the mesh's `population` devices. Within a device the trials are batched by `vmap`, or
taken in turn where the platform prefers it (a CPU core is full with one). A change of structure starts another group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.core import sharding
from llm_jax.core.ahead import Ahead
from llm_jax.core.config import ConfigError, fingerprint, require, substitute, to_json, traced_values
from llm_jax.core.mesh import BATCH, Mesh
from llm_jax.core.platform import cores, traits
from llm_jax.core.types import Batch, Probed
from llm_jax.data.pipeline import Host
from llm_jax.data.tokenizers import Fitted
from llm_jax.lab.experiment import Experiment
from llm_jax.lab.teachers import Found
from llm_jax.models.split import check_split
from llm_jax.train.loop import Program, Rhythm
from llm_jax.train.pretrain import Trial, trial
from llm_jax.train.step import TrainState

STORED = "opt_state", "average"  # of the state what a host can keep between steps


def structure(experiment: Experiment) -> str:
    """Fingerprint of all that is not traced: experiments with the same one can share a program."""
    traced = traced_values(experiment)
    # a rate that is zero is compiled away, so zero and non-zero are different programs
    blank = {path: bool(value) if path != "seed" else 0 for path, value in traced.items()}
    return fingerprint(to_json(substitute(experiment, blank)))


def groups(experiments: Sequence[Experiment], *, largest: Callable[[Experiment], int] | None = None) -> list[list[int]]:
    """Indices of experiments that share a program, in order of first appearance; `largest` says how many may, at most."""
    together: dict[str, list[int]] = {}
    for index, experiment in enumerate(experiments):
        together.setdefault(structure(experiment), []).append(index)
    parts = []
    for members in together.values():
        size = largest(experiments[members[0]]) if largest else len(members)
        parts += [members[i : i + size] for i in range(0, len(members), size)]
    return parts


def lift(function: Callable, mesh: jax.sharding.Mesh, members: int, *, shared: int = 0) -> Callable:
    """`function(values, state, …)` of one trial as a function of `members` trials, stacked on a leading axis.

    The last `shared` arguments are the same for every trial and are not stacked. `members` must be a multiple of the
    mesh's population axis.
    """
    local = members // mesh.shape["population"]

    def several(*args):
        own, common = args[: len(args) - shared], args[len(args) - shared :]
        one = lambda own: function(*own, *common)  # noqa: E731
        if local == 1:
            return jax.tree.map(lambda x: x[None], one(jax.tree.map(lambda x: x[0], own)))
        return jax.lax.map(one, own) if traits().population_in_turn else jax.vmap(one)(own)

    if mesh.shape["population"] == 1:
        return several

    def split(*args):
        specs = tuple(PartitionSpec("population") for _ in args[: len(args) - shared]) + (PartitionSpec(),) * shared
        return jax.shard_map(
            several, mesh=mesh, in_specs=specs, out_specs=PartitionSpec("population"), axis_names={"population"}, check_vma=False
        )(*args)

    return split


@dataclass(frozen=True)
class Compiled:
    """The jitted program of one structure and size; `bind` gives it the values of particular trials.

    `values` and `abstract` are the shapes (and shardings) of the traced values and of the state. taught: the parameters of a
    teacher, if it has one.
    """

    trial: Trial
    mesh: jax.sharding.Mesh
    members: int
    values: dict[str, np.ndarray]
    abstract: Any
    init: Ahead
    steps: Ahead
    evaluate: Ahead
    taught: tuple[Any, ...] = ()

    def expect(self, batch: Batch, evaluations: Iterable[Batch | Probed], *, fresh: bool) -> None:
        """Has other threads compile for batches like `batch` `[any, k, B, L]`, and for `evaluations`; fresh: and `init`."""
        pool = ThreadPoolExecutor(max_workers=cores(), thread_name_prefix="compile")
        if fresh:
            self.init.expect(pool, self.values)
        several = jax.tree.map(lambda x: np.broadcast_to(x[:1], (self.members, *x.shape[1:])), batch)
        self.steps.expect(pool, self.values, self.abstract, *self.taught, _abstract(several, self.rows))
        for batches in evaluations:
            self.evaluate.expect(pool, self.values, self.abstract, _abstract(batches, self._common))
        pool.shutdown(wait=False)

    @property
    def host(self) -> Host:
        """The rows that this process's devices have of every batch."""
        axes = [list(self.mesh.axis_names).index(axis) for axis in BATCH]
        sizes = [self.mesh.devices.shape[axis] for axis in axes]
        places = np.argwhere(np.vectorize(lambda device: device.process_index == jax.process_index())(self.mesh.devices))
        blocks = np.ravel_multi_index(places[:, axes].T, sizes)
        return Host(tuple(np.unique(blocks).tolist()), math.prod(sizes))

    @property
    def rows(self) -> NamedSharding:
        """How batches `[members, k, B, L]` are split."""
        return NamedSharding(self.mesh, PartitionSpec("population", None, BATCH))

    @property
    def _common(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(None, BATCH))

    def bind(self, experiments: Sequence[Experiment]) -> Program:
        """The program of these experiments, whose structure must be the one compiled; fewer than its size are padded."""
        values, wanted, here = stacked_values(experiments, self.members), len(experiments), self.host

        def put(batches: Any, where: NamedSharding, rows: int, host: Host, *, pad: int = 0) -> Batch:
            """Arrays of which this process has the host's rows; `rows`: their axis."""

            def array(x):
                x = np.asarray(x)
                x = np.concatenate([x, x[-1:].repeat(pad, 0)]) if pad else x
                whole = x.shape[rows] // len(host.own) * host.count
                shape = (*x.shape[:rows], whole, *x.shape[rows + 1 :])
                return jax.make_array_from_callback(
                    shape, where, lambda at: x[(*at[:rows], host.place(at[rows], whole), *at[rows + 1 :])]
                )

            return jax.tree.map(array, batches)

        def init():
            return self.init(values)

        def steps(state, batches):
            return self.steps(values, state, *self.taught, put(batches, self.rows, 2, here, pad=self.members - wanted))

        def evaluate(state, batches):
            return self.evaluate(values, state, put(batches, self._common, 1, Host()))

        return Program(wanted, init, steps, evaluate, self.abstract)


def stacked_values(experiments: Sequence[Experiment], members: int) -> dict[str, jax.Array]:
    """Path → `[members]` array of the traced values; zero everywhere is left out, so that it is compiled away."""
    padded = [traced_values(e) for e in (*experiments, *[experiments[-1]] * (members - len(experiments)))]
    paths = [path for path in padded[0] if path == "seed" or any(values[path] for values in padded)]
    kinds = {path: np.int32 if isinstance(padded[0][path], int) and path == "seed" else np.float32 for path in paths}
    return {path: np.array([values[path] for values in padded], kinds[path]) for path in paths}


def layout(experiment: Experiment, members: int, devices: int) -> tuple[Mesh, int]:
    """The mesh for so many trials, and how many the program has room for: they are padded to a multiple of its population axis."""
    mesh = experiment.mesh.for_population(members, devices, experiment.data.batch_size // experiment.train.accumulate)
    parts = mesh.sizes["population"]
    return mesh, -(-members // parts) * parts


def require_all_busy(experiment: Experiment, mesh: Mesh, devices: int) -> None:
    """Raises `ConfigError` where so few devices can share the rows that others are idle, which a pod's cannot be."""
    rows, idle = experiment.data.batch_size, devices - math.prod(mesh.sizes.values())
    if idle:
        apart = math.prod(size for axis, size in mesh.sizes.items() if axis not in BATCH)
        unit = experiment.train.accumulate * devices // apart
        raise ConfigError(f"leaves {idle} of {devices} devices idle, got {rows}: take {-(-rows // unit) * unit}", "data.batch_size")


def rhythm_of(experiment: Experiment) -> Rhythm:
    """When things happen in its training, with as many steps in one call of the program as it or the platform asks for."""
    return Rhythm.fitting(
        steps=experiment.train.steps,
        log_every=experiment.train.log_every,
        evaluate_every=experiment.evaluation.every,
        checkpoint_every=experiment.checkpoints.every,
        dispatch=experiment.train.steps_per_dispatch or traits().steps_per_dispatch,
    )


def check_mesh(experiment: Experiment, mesh: Mesh) -> None:
    """Raises `ConfigError` unless a mesh, whose axes are worked out, divides the rows of every micro-batch and the model.

    And where one of its rules is of nothing that there is.
    """
    sharding.rules(mesh)
    parts, rows = experiment.train.accumulate * mesh.rows, experiment.data.batch_size
    axes = " × ".join(axis for axis in BATCH if axis in ("data", "fsdp") or mesh.sizes[axis] > 1)
    sentence = (
        f"must be a multiple of train.accumulate × {axes} = {parts} on this mesh, got {rows}: take {-(-rows // parts) * parts}"
    )
    require(rows % parts == 0, "data.batch_size", sentence)
    micro, share = mesh.microbatches or mesh.stage, rows // parts * mesh.stage
    fits = mesh.stage == 1 or (micro % mesh.stage == 0 and share % micro == 0)
    problem = f"must be a multiple of stage={mesh.stage} that divides the {share} rows of each part of the mesh, got {micro}"
    require(fits, "mesh.microbatches", problem)
    check_split(experiment.model, mesh, length=experiment.data.sequence_length)


def compile_population(
    experiment: Experiment,
    members: int,
    tokens: Fitted,
    *,
    teacher: Found | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Compiled:
    """The program that trains `members` experiments of the structure of `experiment`, on all devices by default.

    teacher: who is asked by all of them, whose parameters are there once.
    """
    devices = list(devices or jax.devices())
    axes, size = layout(experiment, members, len(devices))
    check_mesh(experiment, axes)
    mesh = axes.build(devices)
    one = trial(experiment, tokens, teacher.asked if teacher else None)
    values = stacked_values([experiment], size)
    where = _state_shardings(one, {path: jax.ShapeDtypeStruct((), v.dtype) for path, v in values.items()}, mesh, axes)
    init = jax.jit(lambda values: _stored(lift(one.init, mesh, size)(values), where), out_shardings=where)
    with sharding.on(mesh, axes):
        shapes = jax.eval_shape(init, values)
    abstract = jax.tree.map(lambda s, to: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=to), shapes, where)
    taught = (teacher.parameters(mesh),) if teacher else ()
    lifted = lift(one.steps, mesh, size, shared=len(taught))

    def several(values, state, *rest):  # batches last, by whose shapes programs are told apart
        state, metrics = lifted(values, _at_hand(state, where), rest[-1], *rest[:-1])
        return _stored(state, where), metrics

    # numbers that every process reads, where there are several
    numbers = NamedSharding(mesh, PartitionSpec()) if jax.process_count() > 1 else None
    steps = jax.jit(several, donate_argnums=1, out_shardings=(where, numbers))
    scored = lift(one.evaluate, mesh, size, shared=1)
    evaluate = jax.jit(lambda values, state, batches: scored(values, _at_hand(state, where), batches), out_shardings=numbers)
    return Compiled(one, mesh, size, values, abstract, *(Ahead(f, mesh, axes) for f in (init, steps, evaluate)), taught)


def _abstract(batches: Any, where: NamedSharding) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), batches)


def _state_shardings(one: Trial, values: dict[str, jax.ShapeDtypeStruct], mesh: jax.sharding.Mesh, axes: Mesh) -> Any:
    state = jax.eval_shape(one.init, values)
    specs = sharding.state_specs(sharding.unbox(one.parameters), sharding.parameter_specs(one.parameters, mesh, axes), state)
    where = sharding.named(mesh, specs, leading=("population",))
    if not axes.offload:
        return where
    own = {name: sharding.on_host(getattr(where, name), getattr(state, name)) for name in STORED}
    return replace(where, **own)


def _stored(state: TrainState, where: TrainState) -> TrainState:
    """Between steps: what is to lie in the hosts' memory there."""
    return replace(state, **{n: sharding.moved(getattr(state, n), getattr(where, n), jax.memory.Space.Host) for n in STORED})


def _at_hand(state: TrainState, where: TrainState) -> TrainState:
    """In a step: all on the devices."""
    return replace(state, **{n: sharding.moved(getattr(state, n), getattr(where, n), jax.memory.Space.Device) for n in STORED})
