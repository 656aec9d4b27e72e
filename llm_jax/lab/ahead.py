"""The program of an experiment, compiled for a machine that is not there, and what it will take there.

Nothing but a tokenizer is read: batches are shapes, and the vocabulary of one that is yet to be trained is what it declares.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.core import platform
from llm_jax.core.chips import Topology
from llm_jax.core.config import ConfigError
from llm_jax.core.types import Batch
from llm_jax.data.tokenizers import Fitted, nameless
from llm_jax.lab.expected import filled, head, visited
from llm_jax.lab.experiment import Experiment
from llm_jax.lab.population import Compiled, check_mesh, compile_population, layout, require_all_busy, rhythm_of
from llm_jax.models import count
from llm_jax.train.ahead import collectives, flops, hlo, memory, operations, roofline
from llm_jax.train.ahead.collectives import Collective
from llm_jax.train.ahead.flops import Flops
from llm_jax.train.ahead.memory import Memory
from llm_jax.train.ahead.roofline import Estimate

# libtpu may be opened by several processes at once, since no chip is, and need not ask a metadata server what machine this is
QUIET = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
}


@dataclass(frozen=True)
class Examined:
    """What a step of the program takes.

    parameters, model: of one trial, and the model's FLOPs of a step of all of them; machine: those of the program, all devices
    together; memory, collectives: of one device; device: FLOPs of products of one device, as compiled: more than its share of the
    machine's where work is repeated on several; tokens: of a step; steps: in one call of the program.
    seconds: to compile; flags: libtpu's; kernels: names of those that are written by hand, or of XLA's for experts.
    """

    topology: Topology
    mesh: dict[str, int]
    parameters: int
    tokens: int
    model: float
    machine: Flops
    device: float
    memory: Memory
    collectives: tuple[Collective, ...]
    estimate: Estimate
    steps: int
    seconds: float
    uncounted: int
    compiled: bool = True
    flags: str = ""
    kernels: tuple[str, ...] = ()

    @property
    def limit(self) -> float:
        """Bytes of memory that a program may have on one device."""
        return self.topology.chip.memory / self.topology.chip.devices

    @property
    def step(self) -> float:
        """Seconds of one step, estimated."""
        return self.estimate.seconds / self.steps

    @property
    def fits(self) -> bool:
        """Whether it runs."""
        return self.compiled and self.memory.total <= self.limit


def devices_of(topology: Topology) -> list[jax.Device]:
    """The devices of slices that are not attached. Raises `ConfigError` without libtpu, which compiles for them."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            'needs libtpu, which compiles for TPUs on any machine: pip install -e ".[tpu]"', f"--topology={topology.name}"
        )
    from jax.experimental import topologies

    for name, value in (QUIET | {platform.LIBTPU: " ".join(topology.chip.libtpu)}).items():
        os.environ.setdefault(name, value)
    jax.devices()  # so that JAX has read its flags, of which libtpu ends the process for those it does not know
    os.environ["XLA_FLAGS"] = " ".join(flag for flag in os.environ.get("XLA_FLAGS", "").split() if not flag.startswith("--xla_cpu"))
    given: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.family == "v4":
        given["chip_config_name"] = "megacore"  # its two cores as one device
    try:
        return list(topologies.get_topology_desc(topology.name, "tpu", **given).devices)
    except Exception as error:  # libtpu has no class of its own for it
        told = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"is not known to libtpu ({told})", f"--topology={topology.name}") from None


def declared(experiment: Experiment) -> Fitted:
    """A tokenizer with as many ids as the experiment's will have: that itself where it is there already."""
    given = experiment.tokenizer
    size = None if getattr(given, "path", None) else getattr(given, "vocabulary", None)
    return experiment.fitted(platform.cache_dir()) if size is None else nameless(size).with_specials(experiment.objective.specials)


def examine(experiment: Experiment, topology: Topology, *, members: int = 1) -> Examined:
    """Compiles the training step of `members` such trials for a topology. Raises `ConfigError` for what cannot be trained there."""
    if experiment.objective.taught_by is not None:
        raise ConfigError(
            "asks a trained model, which is not there yet: leave the arm out, or compile it without", "objective.teacher"
        )
    with platform.targeting("tpu"):
        devices = topology.chips * topology.chip.devices
        mesh, _ = layout(experiment, members, devices)
        check_mesh(experiment, mesh)
        require_all_busy(experiment, mesh, devices)
        compiled = compile_population(experiment, members, declared(experiment), devices=devices_of(topology))
        return _examined(experiment, compiled, topology)


def _examined(experiment: Experiment, compiled: Compiled, topology: Topology) -> Examined:
    steps, vocabulary = rhythm_of(experiment).dispatch, declared(experiment).vocabulary
    batch, values = _batch(experiment, compiled, steps), _values(compiled)
    traced = compiled.steps.trace(values, compiled.abstract, batch)
    machine, begun = flops.of_jaxpr(traced.jaxpr), time.perf_counter()
    machine = replace(machine, grouped=machine.grouped * filled(experiment, compiled.mesh.shape))
    dump, stats = _compiled(traced.lower())
    seconds = time.perf_counter() - begun
    module = hlo.parse(dump.program)
    mesh = dict(compiled.mesh.shape)
    where = [getattr(device, "slice_index", 0) or 0 for device in compiled.mesh.devices.flat] if topology.slices > 1 else []
    sent = collectives.of_module(module, mesh, where)
    done = operations.of_module(module)
    products = sum(one.flops * one.times for one in done) + machine.grouped / compiled.mesh.size
    words, inputs = experiment.lengths
    rows = compiled.members * experiment.data.batch_size * steps
    model = rows * count.flops_per_row(experiment.model, vocabulary, words, inputs)
    estimate = roofline.estimate(
        products=products,
        memory=roofline.unhidden(done, topology),
        collectives=sent,
        topology=topology,
        model=model,
        kernels=machine.kernels * visited(experiment, words) / compiled.mesh.size,
        head=head(experiment),
    )
    given = {
        "parameters": memory.on_device(compiled.abstract.params),
        "optimizer state": memory.on_device(compiled.abstract.opt_state),
        "average of the parameters": memory.on_device(compiled.abstract.average),
        "batch": memory.on_device(batch),
        "rest of the state": memory.on_device((compiled.abstract.step, compiled.abstract.key, values)),
    }
    return Examined(
        topology,
        mesh,
        count.parameters(experiment.model, vocabulary),
        rows * experiment.data.sequence_length,
        model,
        machine,
        products,
        memory.of_program(
            stats,
            {name: size for name, size in given.items() if size},
            dump.report,
            memory.at_peak(dump.assignment, dump.ranges, module),
        ),
        tuple(sent),
        estimate,
        steps,
        seconds,
        machine.uncounted + module.unknown,
        stats is not None,
        os.environ.get(platform.LIBTPU, ""),
        operations.kernels(done),
    )


# ── what the program is given ────────────────────────────────────────────────────────────────────────────────────────
def _batch(experiment: Experiment, compiled: Compiled, steps: int) -> Batch:
    """A batch as the packing gives it: with weights, documents and places where rows hold several."""
    shape = (compiled.members, steps, experiment.data.batch_size, experiment.data.sequence_length)

    def array(dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=compiled.rows)

    if not experiment.data.packing.segmented:
        return Batch(array(jnp.int32), array(jnp.int32))
    return Batch(*(array(dtype) for dtype in (jnp.int32, jnp.int32, jnp.float32, jnp.int32, jnp.int32)))


def _values(compiled: Compiled) -> dict[str, Any]:
    where = NamedSharding(compiled.mesh, PartitionSpec("population"))
    return {path: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where) for path, value in compiled.values.items()}


class _Dump(NamedTuple):
    """Texts of the compiler: the program, its report of memory, where values lie, and from when to when."""

    program: str
    report: str
    assignment: str
    ranges: str


def _compiled(lowered: jax.stages.Lowered) -> tuple[_Dump, Any]:
    """What the compiler wrote, and its `memory_analysis()`; None where the program does not fit."""
    with tempfile.TemporaryDirectory(prefix="llm_jax_compile_") as folder:
        stats = None
        try:
            options = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
            stats = lowered.compile(compiler_options=options).memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if not platform.is_exhausted(error):
                raise ConfigError(f"cannot be compiled for it: {str(error).splitlines()[0]}", "the training step") from None
        ends = ("", "-memory-usage-report", "-buffer-assignment", "-live-range")
        files = (sorted(pathlib.Path(folder).glob(f"*.after_optimizations{end}.txt"))[-1:] for end in ends)
        dump = _Dump(*("".join(file.read_text() for file in found) for found in files))
    if not dump.program:
        raise ConfigError("was compiled without a dump: leave --xla_dump_to out of XLA_FLAGS", "the training step")
    return dump, stats
