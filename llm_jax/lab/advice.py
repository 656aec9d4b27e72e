"""What to change about an experiment whose step does not fit into a device's memory, and what each change saves there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from llm_jax.core.config import ConfigError, override
from llm_jax.core.mesh import BATCH
from llm_jax.lab.experiment import Experiment
from llm_jax.lab.footprint import kept, parts
from llm_jax.models import count
from llm_jax.train.ahead.memory import Memory


@dataclass(frozen=True)
class Change:
    """A flag that makes the step smaller, the bytes of one device that it saves by the analytic model, and what it costs."""

    flag: str
    saves: float
    costs: str


def changes(experiment: Experiment, vocabulary: int, mesh: Mapping[str, int], memory: Memory) -> list[Change]:
    """Every change that saves something, the most first."""
    found = [
        one for one in (*_state(experiment, vocabulary, mesh), *_activations(experiment, vocabulary, mesh, memory)) if one.saves > 0
    ]
    return sorted(found, key=lambda one: -one.saves)


def _state(experiment: Experiment, vocabulary: int, mesh: Mapping[str, int]) -> list[Change]:
    """What parameters, gradients and the optimizer's numbers give way to."""
    one = 4.0 * count.parameters(experiment.model, vocabulary)
    pieces, slots = parts(mesh, ("fsdp", "tensor", "expert", "sequence", "stage")), experiment.optimizer.slots
    found = []
    if mesh.get("data", 1) > 1:
        spread = one * (2 + slots) / pieces * (1 - 1 / mesh["data"])
        found.append(
            Change(f"mesh.fsdp={mesh['fsdp'] * mesh['data']} mesh.data=1", spread, "parameters are gathered when they are used")
        )
    else:
        twice = f"twice as many devices, mesh.fsdp={2 * mesh['fsdp']}"
        found.append(Change(twice, one * (2 + slots) / pieces / 2, "devices"))
    if slots > 1:
        found.append(
            Change("optimizer=Lion()", one * (slots - 1) / pieces, f"another update rule, 1 number a parameter and not {slots}")
        )
    return found


def _activations(experiment: Experiment, vocabulary: int, mesh: Mapping[str, int], memory: Memory) -> list[Change]:
    """What the backward pass keeps of the rows gives way to; estimated by `lab.footprint`, at most what a step needs."""
    most, now = memory.working, kept(experiment, vocabulary, mesh)
    accumulate, length = experiment.train.accumulate, experiment.data.sequence_length
    candidates = [
        ({"train.accumulate": 2 * accumulate}, "twice as many, smaller products"),
        ({"data.batch_size": experiment.data.batch_size // 2}, "half of the tokens in a step"),
        ({"data.sequence_length": length // 2}, "half of the tokens in a row"),
    ]
    candidates += [({f"{path}.remat": "full"}, "a third more computation") for path in _keeping(experiment)]
    found = []
    for change, costs in candidates:
        try:
            smaller = override(experiment, change)
        except ConfigError:
            continue
        rows = smaller.data.batch_size // smaller.train.accumulate
        if rows % parts(mesh, BATCH) == 0:
            saves = min(now - kept(smaller, vocabulary, mesh), most)
            found.append(Change(" ".join(f"{path}={value}" for path, value in change.items()), saves, costs))
    return found


def _keeping(experiment: Experiment) -> list[str]:
    """The paths of stacks that keep what every layer computes."""
    names = {name: stack for name, stack in experiment.model.stacks.items() if stack.remat == "none"}
    return ["model" if stack is experiment.model else f"model.{name}" for name, stack in names.items()]
