"""`run --autoshard`: the best mesh takes the place of the search in the command, for all arms."""

import pytest

from llm_jax.cli import run
from llm_jax.core.chips import Topology
from llm_jax.lab import autoshard
from tests.cli.outcome import outcome

SMALL = '''
"""A small model."""
from llm_jax.data.pipeline import Data
from llm_jax.lab.arms import Arms
from llm_jax.lab.experiment import Ablation, Experiment
from llm_jax.models.decoder import Decoder

ablation = Ablation(
    question="Which?",
    base=Experiment(model=Decoder(width=64, depth=2), data=Data(sequence_length=128, batch_size=16)),
    scientific=Arms({"post": {"model.placement": "post"}, "pre": {}}),
    seeds=1,
)
'''


@pytest.fixture
def flags(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(SMALL)
    return [f"--experiment={file}", "--autoshard", "--plan"]


def test_a_cpu_is_told_what_can_be_ranked(flags, monkeypatch, capsys):
    code, out, err = outcome("run", flags, monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert err.startswith("error: --autoshard knows the links and memory of v4,")


def test_the_best_mesh_is_set_as_if_it_had_been_typed(flags, monkeypatch, capsys):
    monkeypatch.setattr(autoshard, "attached", lambda devices: Topology.parse("v5e:2x4"))  # eight, as there are CPU devices here
    commands = []
    searched = run._autosharded
    monkeypatch.setattr(run, "_autosharded", lambda argv: commands.append(searched(argv)) or commands[0])
    monkeypatch.setenv("COLUMNS", "150")
    code, out, _ = outcome("run", flags, monkeypatch, capsys)
    assert code == 0
    assert "Meshes for v5e:2x4, the fastest first" in out
    (command,) = commands
    assert "--autoshard" not in command
    mesh = [one for one in command if one.startswith("--set=mesh.")]
    assert mesh == [f"--set={one}" for one in run.FLAGS.set]
    assert {"--set=mesh.data=8", "--set=mesh.fsdp=8"} & set(mesh)
    assert all(ablation.mesh.sizes["data"] * ablation.mesh.sizes["fsdp"] == 8 for ablation in _bases())


def _bases():
    ablation, _ = run._declared()
    return [ablation.experiment(arm) for arm in ablation.arms]
