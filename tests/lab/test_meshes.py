"""Every axis of a mesh, alone and with others, against one device: losses, gradients, and what the compiled step sends."""

import json
import os
import subprocess
import sys
from collections import Counter

import jax
import pytest

from llm_jax.models.model import abstract_parameters
from llm_jax.train.ahead.collectives import Collective
from tests.lab import meshes
from tests.lab.meshes import LENGTH, ROWS, TABLE, VOCABULARY, Row

QUICK = ("experts-sequence2",)  # the row that the quick tests take
COUNTED = 1024  # bytes up to which a message is one of numbers, or of a norm's scales
WEIGHTS = ("fsdp", "expert", "sequence")  # the axes that kernels are gathered along


def check(found: dict) -> None:
    assert found["learned"] > 1, "nothing was learned, so equality would show nothing"
    assert found["losses"] < 1e-5 and found["gradients"] < 1e-4 * min(1, found["largest"]), found


@pytest.mark.parametrize("name", QUICK)
def test_a_mesh_changes_no_number(name):
    found = meshes.compared(name)
    check(found)
    Sent(TABLE[name], found).check()


@pytest.fixture(scope="session")
def row(tmp_path_factory):
    """What is found of a row, by a process with sixteen devices: every worker has one, and asks it for its own rows."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=16")
    given = os.environ | {"XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    given |= {
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    errors, pipes = tmp_path_factory.mktemp("meshes") / "err", {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with open(errors, "w") as err:
        asked = subprocess.Popen([sys.executable, "-m", "tests.lab.meshes"], env=given, stderr=err, text=True, **pipes)

    def found(name):
        print(name, file=asked.stdin, flush=True)
        line = asked.stdout.readline()
        assert line, errors.read_text()[-2000:]
        return json.loads(line)

    with asked:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TABLE if name not in QUICK])
def test_the_table(row, name):
    found = row(name)
    assert found["row"] == name
    check(found)
    Sent(TABLE[name], found).check()


class Sent:
    """The messages of a row's step, told apart."""

    def __init__(self, row: Row, found: dict):
        self.row, self.axes = row, row.mesh.sizes
        self.all = [Collective(**one | {"axes": tuple(one["axes"])}) for one in found["sent"]]
        self.large = [one for one in self.all if one.bytes > COUNTED]
        axes, rounds = self.axes, row.rounds
        # how often a device runs a layer's body, forwards
        stages = axes["stage"]
        self.runs = row.model.depth if stages == 1 else (stages * rounds + stages - 1) * row.model.depth // (stages * rounds)
        self.parts = axes["replica"] * axes["data"] * axes["fsdp"] * axes["expert"]  # of the rows, beside stages
        self.activation = 4 * ROWS * LENGTH * row.model.width // (self.parts * axes["sequence"])  # of all stages' rows

    def over(self, kind: str, *axes: str) -> list[Collective]:
        """The large ones of a kind along exactly these axes."""
        return [one for one in self.large if one.kind == kind and one.axes == axes]

    def check(self) -> None:
        assert not [one for one in self.all if "population" in one.axes], "trials have nothing to say to each other"
        self.check_weights()
        self.check_gradients()
        self.check_experts()
        if self.axes["population"] == 1:  # within a `shard_map` rows are gathered for the gradient of the embedding too
            self.check_keys()
            self.check_stages()

    def kernels(self) -> tuple[Counter[float], Counter[float]]:
        """Bytes of a layer's kernels as a device uses them → how many have so many; and the same of those that experts have."""
        shapes = jax.tree_util.tree_leaves_with_path(abstract_parameters(self.row.model, VOCABULARY)["layers"])
        own, experts = Counter[float](), Counter[float]()
        for path, leaf in shapes:
            names, size = [getattr(key, "key", "") for key in path], leaf.size * 4 / self.row.model.depth
            if "experts" in names:
                experts[size / (self.axes["expert"] * self.axes["tensor"])] += 1
            elif "kernel" in names:
                own[size / (1 if "router" in names else self.axes["tensor"])] += 1
        return own, experts

    def check_weights(self) -> None:
        """A layer's kernels are gathered along the axes that split them, forwards and again for the gradient; the table once.

        Experts' kernels stay where they are, and are gathered along the others.
        """
        own, experts = self.kernels()
        along, inside = (tuple(axis for axis in axes if self.axes[axis] > 1) for axes in (WEIGHTS, ("fsdp", "sequence")))
        # a stage's only layer is the same in all turns, and gathered before them, for the gradient again or not
        alone = self.axes["stage"] == self.row.model.depth and self.row.rounds == 1
        times = 1 if alone else 2 * self.runs
        expected = Counter({(along, size): times * count for size, count in own.items() if along})
        expected += Counter({(inside, size): times * count for size, count in experts.items() if inside})
        within = self.axes["population"] > 1  # a `shard_map`, where what embedding and head gather is not found to be the same
        expected += Counter({(along, 4 * VOCABULARY * self.row.model.width / self.axes["tensor"]): 1 + within} if along else {})
        # two kernels of a gated layer twice, computed again and for the gradient: XLA writes the same groups of devices once as a
        # pattern and once as a list, and takes the gathers for different ones
        if self.row.axes.keys() == {"replica", "data", "fsdp", "tensor"}:
            expected[along, max(own)] += 2 * self.runs
        found, others = Counter[tuple[tuple[str, ...], float]](), self.keys() + self.over("all-gather", "stage")
        if within:
            others += [one for one in self.all if "embedding/scatter-add" in one.label]
        for one in self.large:
            if one.kind == "all-gather" and one not in others:
                found[one.axes, one.bytes] += one.count
        if alone:
            again = {key: 2 * count for key, count in expected.items()}
            assert found.keys() == expected.keys() and all(found[key] in (expected[key], again[key]) for key in found)
        else:
            assert found == expected

    def check_gradients(self) -> None:
        """Every gradient is summed once, where rows or tokens are split."""
        copies = {"replica", "data", "fsdp", "expert", "sequence"}
        sums = [one for one in self.all if one.kind in ("all-reduce", "reduce-scatter") and set(one.axes) & copies]
        sums = [one for one in sums if one not in self.keys()]
        whole = 4 * sum(leaf.size for leaf in jax.tree.leaves(abstract_parameters(self.row.model, VOCABULARY)))
        if set(self.row.axes) <= {"replica", "data"}:
            assert {one.kind for one in self.all} == {"all-reduce"}
            assert sum(one.total for one in self.all) < 1.1 * whole
        elif self.axes["stage"] == 1:
            # a sum over one axis, and of what each device is left with over the next
            assert sum(one.total for one in sums) < 1.6 * whole, sums
        if not set(self.row.axes) & copies | (set(self.row.axes) & {"stage"}):
            assert not sums
        experts = self.kernels()[1]
        inside = self.axes["fsdp"] * self.axes["sequence"] > 1
        scattered = [one for one in self.large if one.kind == "reduce-scatter" and one.bytes in experts and one not in self.keys()]
        assert sum(one.count for one in scattered) == (3 * self.runs if experts and inside else 0), scattered

    def keys(self) -> list[Collective]:
        """Keys and values, all of a row's, and their gradients."""
        size = self.activation * self.axes["sequence"] // (self.axes["tensor"] * self.axes["stage"])
        kinds = ("all-gather", "reduce-scatter")
        return [one for kind in kinds for one in self.over(kind, "sequence") if one.bytes == size and "attention" in one.label]

    def check_keys(self) -> None:
        counts = {kind: sum(one.count for one in self.keys() if one.kind == kind) for kind in ("all-gather", "reduce-scatter")}
        gathers = self.axes["sequence"] > 1 and self.row.context == "gather"
        expected = (4 * self.runs, 2 * self.runs) if gathers else (0, 0)
        assert tuple(counts.values()) == expected, counts
        passed = self.over("collective-permute", "sequence")
        assert bool(passed) == (self.axes["sequence"] > 1)

    def check_stages(self) -> None:
        """Micro-batches from stage to stage; rows to all stages at the beginning, and from the last to all at the end."""
        stages = self.axes["stage"]
        if stages == 1:
            return
        turns = stages * self.row.rounds + stages - 1
        passed = self.over("collective-permute", "stage")
        assert sum(one.count for one in passed) == 2 * turns and {one.bytes for one in passed} == {self.activation / stages}
        for kind in ("all-gather", "reduce-scatter"):
            assert [(one.bytes, one.count) for one in self.over(kind, "stage")] == [(self.activation, 2)]

    def check_experts(self) -> None:
        """Tokens there and back: forwards, when that is done again, and for the gradient."""
        travels = [one for one in self.large if one.kind == "all-to-all" and one.axes == ("expert",)]
        assert sum(one.count for one in travels) == (6 * self.runs if self.axes["expert"] > 1 else 0)
        others = [one for one in self.large if one.kind == "all-to-all" and one not in travels]
        assert not others or self.row.rounds > 1, others  # with rounds, layers go to their stages
