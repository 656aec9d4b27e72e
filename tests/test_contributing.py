"""CONTRIBUTING's recipes for a position scheme and an objective, followed: code as a module, flag, row, a run; and its family."""

import dataclasses
import importlib.util
import pathlib
import re
import shlex
import sys
import textwrap
from types import ModuleType

import jax
import numpy as np
import pytest

from llm_jax.core.config import ConfigError, components
from llm_jax.core.sharding import unbox
from llm_jax.core.types import Batch
from llm_jax.core.written import override_text
from llm_jax.data.tokenizers import nameless
from llm_jax.io.huggingface import FAMILIES, Family
from llm_jax.io.huggingface.fields import Fields, read_json
from llm_jax.lab import presets
from llm_jax.nn.position import Position, Positions
from llm_jax.train.pretrain import trial
from tests.nn import test_position
from tests.objectives import posed, test_lengths

ROOT = pathlib.Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def shown(title) -> list[str]:
    """A section's code, a flag, and a row for a test's table."""
    section = re.search(rf"## {title}\n(.*?)\n## ", TEXT, re.DOTALL)[1]
    return [textwrap.dedent(block) for block in re.findall(r"```(?:python|sh)\n(.*?)```", section, re.DOTALL)]


CODE, FLAG, ROW = shown("Add a position scheme")
SMALL = ["model.width=16", "model.depth=2", "model.attention.heads=2", "train.steps=4", "optimizer.learning_rate=0.01"]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> ModuleType:
    """The recipe's code in a file of its own, imported as an experiment's is."""
    return imported(CODE, tmp_path_factory.mktemp("recipe") / "a_readers_scheme.py")


def imported(code, path) -> ModuleType:
    path.write_text(code)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def experiment(written):
    return override_text(presets.nano(), [shlex.split(FLAG)[0].removeprefix("--set="), *SMALL])


def test_the_flag_chooses_it(written, experiment):
    assert components(Position)["KerpleLog"] is written.KerpleLog
    assert experiment.model.position == written.KerpleLog(spread=0.5)
    with pytest.raises(ConfigError, match=r"model\.position\.spread must be > 0, got -1"):
        override_text(presets.nano(), ["model.position=KerpleLog(spread=-1.0)"])
    with pytest.raises(ConfigError, match=r"model\.position has no choice 'KerpelLog': did you mean KerpleLog"):
        override_text(presets.nano(), ["model.position=KerpelLog"])


@pytest.mark.parametrize("clause", test_position.CONTRACT, ids=lambda f: f.__name__)
def test_its_row_keeps_the_contract(written, clause):
    clause(eval(ROW.strip(), vars(test_position) | vars(written)))


def test_it_is_the_papers_formula(written):
    scheme, index = written.KerpleLog(), np.array([[0, 3, 50]])
    params = unbox(Positions(scheme).init(jax.random.key(0), np.zeros((1, 3, 4)), index, unit=1.0, heads=2))["params"]
    r1, r2 = (np.exp(np.asarray(params[name], np.float64)) for name in ("log_r1", "log_r2"))
    bias = scheme.bias(params, index, index, 2)
    for h in range(2):
        for at, query in enumerate(index[0]):
            expected = -r1[h] * np.log(1 + r2[h] * abs(query - index[0]))
            np.testing.assert_allclose(bias[0, h, at], expected, rtol=1e-5)


def test_a_model_trains_with_it(experiment):
    vocabulary, steps = 11, 4
    parts = trial(experiment, nameless(vocabulary))
    ids = np.random.default_rng(0).integers(0, vocabulary, (1, 4, 13)).repeat(steps, 0).astype(np.int32)
    state = jax.jit(parts.init)({})
    before = jax.tree.map(np.asarray, state.params["position"])
    batches = Batch(ids[..., :-1], ids[..., 1:])
    losses = [jax.jit(parts.evaluate)({}, state, batches)]
    state, _ = jax.jit(parts.steps)({}, state, batches)
    losses.append(jax.jit(parts.evaluate)({}, state, batches))
    assert set(before) == {"log_r1", "log_r2"}
    assert all((before[name] != state.params["position"][name]).all() for name in before), "every head should learn its own"
    assert losses[1]["loss"].mean < losses[0]["loss"].mean


def test_the_objective_that_is_shown_reads_backwards(tmp_path):
    code, flag, row = shown("Add an objective")
    module = imported(code, tmp_path / "a_readers_objective.py")
    given = override_text(presets.nano(), [shlex.split(flag)[0].removeprefix("--set="), *SMALL])
    assert given.objective == module.Backwards()
    objective, model = eval(row.strip(), vars(test_lengths) | vars(module))
    for sizes in ((40,), (23, 9, 30)):
        test_lengths.test_they_are_as_long_as_is_said(objective, model, sizes)
        batch = posed.whole(*sizes, rows=2) if len(sizes) == 1 else posed.packed(sizes, rows=2)
        found, start = posed.pose(objective, batch), 0
        for document, size in enumerate(sizes):
            ids, asked = posed.sequence(found, 1, document)
            assert ids == np.asarray(batch.tokens)[1, start : start + size][::-1].tolist() and asked == [False] + [True] * (
                size - 1
            )
            start += size
    parts = trial(given, nameless(11))
    ids = np.random.default_rng(0).integers(0, 11, (1, 4, 13)).repeat(4, 0).astype(np.int32)
    batches, state = Batch(ids[..., :-1], ids[..., 1:]), jax.jit(parts.init)({})
    before, (state, _) = jax.jit(parts.evaluate)({}, state, batches), jax.jit(parts.steps)({}, state, batches)
    after = jax.jit(parts.evaluate)({}, state, batches)
    assert after["loss"].mean < before["loss"].mean and after["loss"].weight == 4 * 4 * 11


def test_the_family_that_is_shown_is_the_one_that_is_here():
    found: dict = {}
    exec(textwrap.dedent(re.search(r"## Port a model family\n.*?```python\n(.*?)```", TEXT, re.DOTALL)[1]), found)
    mine, theirs = FAMILIES["stablelm"], found["STABLELM"]
    functions = ("read", "write")
    assert [(f.name, getattr(mine, f.name)) for f in dataclasses.fields(Family) if f.name not in functions] == [
        (f.name, getattr(theirs, f.name)) for f in dataclasses.fields(Family) if f.name not in functions
    ]
    folder = pathlib.Path(__file__).parent / "golden" / "huggingface" / "stablelm"
    models = [family.model(Fields(read_json(folder / "config.json"), "config.json")) for family in (mine, theirs)]
    assert models[0] == models[1] and mine.config(models[0]) == theirs.config(models[0])


def test_the_files_that_are_named_are_there():
    names = set(re.findall(r"`((?:llm_jax|tests|experiments)/[\w/.]+)`", TEXT))
    assert len(names) > 12 and [name for name in names if not (ROOT / name).exists()] == []
