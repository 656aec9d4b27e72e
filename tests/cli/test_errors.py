"""A mistake in what was typed: one sentence, exit code 2, nothing written."""

import functools
import os
import subprocess
import sys

import pytest

from llm_jax.lab.experiment import load
from llm_jax.lab.workfolder import WorkFolder
from tests.cli.outcome import outcome
from tests.lab.test_runner import declared  # noqa: F401

ERRORS = {
    "misspelt field": (["--set=train.stpes=5"], "train.stpes is no field of Train: did you mean steps"),
    "wrong type": (["--set=train.steps=many"], "train.steps must be int, got 'many'"),
    "negative learning rate": (["--set=optimizer.learning_rate=-1"], "optimizer.learning_rate must be > 0, got -1"),
    "heads and width": (["--set=model.attention.heads=3"], "heads"),
    "unknown arm": (["--arms=rope,alibli"], "--arms names the arm 'alibli', but the arms are rope, alibi"),
    "unknown component": (["--set=model.position=Roppe()"], "model.position has no choice 'Roppe': did you mean Rope"),
    "mesh": (["--set=mesh.tensor=3"], "mesh tensor=3 does not divide 8 devices: 3 is none of their divisors 1, 2, 4, 8"),
    "mesh and heads": (["--set=mesh.tensor=8"], "model.attention.heads must be a multiple of mesh.tensor = 8, got"),
    "mesh and layers": (
        ["--set=mesh.stage=4", "--set=model.layers=scanned"],
        "model.depth must be a multiple of mesh.stage = 4, got",
    ),
    "mesh and a row's tokens": (["--set=mesh.sequence=8", "--set=data.sequence_length=12"], "take 16, or mesh.sequence = 6"),
    "mesh and what there is": (["--set=mesh.rules=(Split('hed',('tensor',)),)"], "mesh.rules names 'hed': did you mean"),
    "longer than the corpus": (["--set=data.sequence_length=1000000"], "data."),
    "empty corpus": (["--set=data.corpus=TextFiles(path='{folder}/empty.txt')"], "empty"),
    "no UTF-8": (["--set=data.corpus=TextFiles(path='{folder}/latin.txt')"], "latin.txt is not UTF-8"),
    "no such file": (["--set=data.corpus=TextFiles(path='nowhere.txt')"], "nowhere.txt"),
    "what the grid sets": (["--set=optimizer.learning_rate=0.1"], "optimizer.learning_rate is set by the grid"),
    "what every arm sets": (["--set=model.position=Rope()"], "model.position is set by every arm"),
    "what every arm replaces": (["--set=model.position.theta=500"], "model.position.theta is set by every arm"),
    "no arm": (["--arms="], "--arms names no arm: the arms are rope, alibi"),
    "a seed out of range": (["--set=seed=3000000000"], "seed must be"),
    "evaluation between records": (
        ["--set=evaluation.every=13"],
        "evaluation.every must be a multiple of train.log_every=6, got 13",
    ),
    "a lease of no worker": (["--lease=30"], "--lease=30 is how long a worker may be silent: give --worker too"),
    "a lease too short": (["--worker", "--lease=0.5"], "--lease must be at least 2 seconds"),
    "a trace of no step": (["--profile=60:66"], "--profile begins after the last of 60 steps"),
    "unknown flag": (["--sett=1"], "sett"),
    "stray word": (["train.steps=5"], "takes flags only"),
}


run = functools.partial(outcome, "run")


@pytest.mark.parametrize("flags, sentence", ERRORS.values(), ids=ERRORS)
def test_a_mistake_is_one_sentence_and_writes_nothing(declared, flags, sentence, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("LLM_JAX_CACHE", str(declared.parent / "cache"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes("café ".encode("latin-1") * 100)
    flags = [flag.replace("{folder}", str(tmp_path)) for flag in flags]
    code, _, text = run([f"--experiment={declared}", f"--workdir={tmp_path / 'w'}", *flags], monkeypatch, capsys)
    assert code == 2 and sentence in text and "\n" not in text, text
    assert not (tmp_path / "w").exists()


def test_a_folder_of_another_experiment_is_refused_with_what_differs(declared, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("LLM_JAX_CACHE", str(declared.parent / "cache"))
    WorkFolder(tmp_path / "w").claim(load(declared).changed({"train.steps": 66, "model.depth": 2}), corpora={})
    before = (tmp_path / "w" / "ablation.json").read_bytes()
    code, _, text = run([f"--experiment={declared}", f"--workdir={tmp_path / 'w'}"], monkeypatch, capsys)
    assert code == 2 and "\n" not in text and "belongs to another experiment" in text
    assert "model.depth is 2 there and 1 here" in text and "train.steps is 66 there and 60 here" in text
    assert [f.name for f in (tmp_path / "w").iterdir()] == ["ablation.json"]
    assert (tmp_path / "w" / "ablation.json").read_bytes() == before


def test_a_folder_of_another_scale_is_refused_with_its_name(declared, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("LLM_JAX_CACHE", str(declared.parent / "cache"))
    sized = tmp_path / "sized.py"
    scales = "scales={'small': {}, 'big': {'train.steps': 66}}, claims="
    sized.write_text(declared.read_text().replace("claims=", scales))
    WorkFolder(tmp_path / "w").claim(load(sized).at_scale("big"), corpora={}, scale="big")
    code, _, text = run([f"--experiment={sized}", f"--workdir={tmp_path / 'w'}"], monkeypatch, capsys)
    assert code == 2 and "belongs to another experiment: --scale is big there and small here; train.steps is 66 there" in text


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--experiment=README.md", "--workdir={folder}/w"], "README.md is no Python file"),
        (["--experiment={declared}", "--workdir={folder}/empty.txt/w"], "empty.txt"),
        (["--experiment={declared}", "--workdir={folder}/empty.txt"], "empty.txt is a file"),
        (["--experiment={declared}", "--workdir="], "--workdir is missing"),
    ],
)
def test_a_wrong_place_is_one_sentence(declared, flags, sentence, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("LLM_JAX_CACHE", str(declared.parent / "cache"))
    (tmp_path / "empty.txt").touch()
    code, _, text = run([f.format(folder=tmp_path, declared=declared) for f in flags], monkeypatch, capsys)
    assert code == 2 and sentence in text and "\n" not in text, text


@pytest.mark.parametrize(
    "command, sentence",
    [
        ("run --sett=1", "sett"),
        ("run --workdir=w", "--experiment is missing"),
        ("run --experiment=README.md", "--workdir is missing"),
        ("run --experiment=no.py --workdir=w", "no.py is no file"),
        ("run --experiment=README.md --workdir=LICENSE", "LICENSE is a file"),
        ("run --experiment=README.md --workdir=w --profile=3", "--profile must be FIRST:LAST"),
        ("report", "--workdir is missing"),
        ("inspect", "needs --model=FOLDER"),
        ("evaluate", "needs --model=FOLDER"),
        ("compile --topology=v5e:4x4", "--experiment is missing"),
        ("compile --experiment=README.md --topology=v5e:3x5", "does not exist: the nearest are v5e:4x4"),
        ("check", "needs either --model"),
        ("fit", "--workdir is missing"),
        ("prepare", "--out is missing"),
        ("tokenize", "does one of"),
    ],
)
def test_what_flags_alone_tell_is_told_before_jax_is_imported(command, sentence):
    code = (
        "import sys; from llm_jax.__main__ import main; code = main()\n"
        "print([name for name in ('jax', 'flax', 'orbax', 'scipy') if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *command.split()], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "[]\n") and sentence in done.stderr, done.stderr


def test_a_platform_that_is_not_there_is_one_sentence(declared, tmp_path):  # noqa: F811
    command = [sys.executable, "-m", "llm_jax", "run", f"--experiment={declared}", f"--workdir={tmp_path / 'w'}"]
    done = subprocess.run(command, env=os.environ | {"JAX_PLATFORMS": "rocm"}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: JAX_PLATFORMS=rocm asks for"), done.stderr
    assert "Traceback" not in done.stderr


def test_commands_are_listed():
    shown = subprocess.run([sys.executable, "-m", "llm_jax", "nonsense"], capture_output=True, text=True)
    assert shown.returncode == 2 and "run" in shown.stderr and "report" in shown.stderr
