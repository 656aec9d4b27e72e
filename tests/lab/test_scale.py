"""The files of experiments/scale: their meshes divide what they split, and the slow tests compile some for their chips."""

import json
import math
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from llm_jax.core import platform, sharding
from llm_jax.core.chips import Topology
from llm_jax.lab import footprint
from llm_jax.lab.ahead import declared
from llm_jax.lab.expected import estimate
from llm_jax.lab.experiment import load
from llm_jax.lab.population import check_mesh, layout, trial

FOLDER = pathlib.Path(__file__).parents[2] / "experiments" / "scale"
README = FOLDER.parents[1] / "README.md"
NEAR = (0.03, 0.15)  # of MFU, and the share of memory
COMMAND = re.compile(r"python -m llm_jax compile --experiment=(\S+) --topology=(\S+)")
FILES = sorted(FOLDER.glob("*.py"))
TRAINED_ELSEWHERE = [file for file in FILES if COMMAND.search(file.read_text())]


def topology_of(file: pathlib.Path) -> Topology:
    """Of the command in its docstring."""
    named, topology = COMMAND.search(file.read_text()).groups()
    assert named == f"experiments/scale/{file.name}"
    return Topology.parse(topology)


def test_there_are_models_of_all_sizes():
    names = {"gpt2_124m", "llama_1b", "llama_8b", "llama_8b_128k", "mixtral_8x7b", "deepseek_v3"}
    assert names <= {file.stem for file in TRAINED_ELSEWHERE}


@pytest.mark.parametrize("file", TRAINED_ELSEWHERE, ids=lambda file: file.stem)
def test_a_file_has_a_mesh_for_the_chips_that_it_names(file):
    experiment, topology = load(file).base, topology_of(file)
    devices = topology.chips * topology.chip.devices
    mesh, members = layout(experiment, 1, devices)
    assert (members, mesh.sizes["population"]) == (1, 1)
    check_mesh(experiment, mesh)
    sizes, vocabulary = mesh.shape(devices), declared(experiment).vocabulary  # of all devices: none is idle
    assert footprint.memory(experiment, vocabulary, sizes) < topology.chip.memory / topology.chip.devices
    assert estimate(experiment, vocabulary, sizes, topology).mfu > 0.3


@pytest.mark.parametrize("file", TRAINED_ELSEWHERE, ids=lambda file: file.stem)
def test_the_formula_splits_parameters_as_the_rules_do(file):
    experiment, topology = load(file).base, topology_of(file)
    devices, tokens = topology.chips * topology.chip.devices, declared(experiment)
    mesh = layout(experiment, 1, devices)[0]
    sizes = mesh.shape(devices)
    with platform.targeting("tpu"):
        boxed = trial(experiment, tokens).parameters
    specs = sharding.parameter_specs(boxed, jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes)), mesh)

    def own(leaf, spec):
        axes = [axis for part in spec if part for axis in ([part] if isinstance(part, str) else part)]
        return leaf.size / math.prod(sizes[axis] for axis in axes)

    held = sum(jax.tree.leaves(jax.tree.map(own, sharding.unbox(boxed), specs)))
    assert footprint.held(experiment, tokens.vocabulary, sizes) == pytest.approx(held, rel=0.01)  # norms and the router are whole


# what `compile` found with libtpu 0.0.42.1, of the same meshes: MFU, GiB of a device; and how near to it the formulas are
COMPILED = {
    "gpt2_124m": (0.451, 4.66, (0.03, 0.3)),
    "llama_1b": (0.479, 4.91, NEAR),
    "llama_8b": (0.624, 11.89, NEAR),
    "llama_8b_128k": (0.552, 9.36, NEAR),
    "mixtral_8x7b": (0.520, 23.83, (0.03, 0.2)),
    "deepseek_v3": (0.380, 76.22, (0.06, 0.3)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_the_formulas_are_near_what_was_compiled(name):
    file, (mfu, gib, (off, share)) = FOLDER / f"{name}.py", COMPILED[name]
    experiment, topology = load(file).base, topology_of(file)
    mesh, vocabulary = layout(experiment, 1, topology.chips)[0].shape(topology.chips), declared(experiment).vocabulary
    assert estimate(experiment, vocabulary, mesh, topology).mfu == pytest.approx(mfu, abs=off)
    assert footprint.memory(experiment, vocabulary, mesh) / 2**30 == pytest.approx(gib, rel=share)


def test_the_readme_has_the_numbers_of_the_largest_dense_model():
    """Those above, of which 55% are asked for: it takes minutes to compile."""
    topology, gib, limit, percent = re.search(
        r"\| v5e-256 \(`--topology=(\S+)`\) \| ([\d.]+) of ([\d.]+) GiB \| ([\d.]+)% \|", README.read_text()
    ).groups()
    chip, (mfu, compiled_gib, _) = Topology.parse(topology).chip, COMPILED["llama_8b"]
    assert Topology.parse(topology).chips == 256 and mfu >= 0.55
    assert (gib, limit, percent) == (f"{compiled_gib:.1f}", f"{chip.memory / 2**30:.2f}", f"{100 * mfu:.1f}")


# ── with libtpu ──────────────────────────────────────────────────────────────────────────────────────────────────────
def compiled(file, topology, tmp_path):
    """What the command finds, in a process of its own, as libtpu reads its flags once."""
    pytest.importorskip("libtpu")
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "llm_jax", "compile", f"--experiment={file}", f"--topology={topology}", f"--out={out}"]
    done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(out.read_text()).values()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name, mfu, kernels", [("llama_1b", 0.4, ["splash"]), ("mixtral_8x7b", 0.4, ["splash", "ragged-dot"])])
def test_a_step_for_its_chips(name, mfu, kernels, tmp_path):
    file = FOLDER / f"{name}.py"
    topology, experiment = topology_of(file), load(file).base
    found = compiled(file, topology.name, tmp_path)
    assert found["fits"]
    assert found["estimate"]["mfu"] > mfu
    for kernel in kernels:
        assert any(kernel in one for one in found["kernels"]), found["kernels"]
    vocabulary = declared(experiment).vocabulary
    formula = estimate(experiment, vocabulary, found["mesh"], topology)
    for part in ("products", "kernels"):
        assert found["estimate"][part] == pytest.approx(getattr(formula, part), rel=0.05)
    assert found["estimate"]["mfu"] == pytest.approx(formula.mfu, rel=0.2)
    assert found["memory_bytes"] == pytest.approx(footprint.memory(experiment, vocabulary, found["mesh"]), rel=0.35)
