"""`python -m llm_jax inspect`: a page, its pictures, a table of them, and a sentence for what cannot be shown."""

import functools
import pathlib

import pytest

from llm_jax import language_model
from llm_jax.core.config import ConfigError
from tests.cli.outcome import outcome

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "huggingface"


run = functools.partial(outcome, "inspect")


def test_a_page_is_written_and_told(monkeypatch, capsys, tmp_path):
    flags = [
        f"--model={GOLDEN / 'gpt2'}",
        "--ids=3,4,5,6",
        f"--out={tmp_path / 'a' / 'b'}",
        "--words=7,8",
        "--analogy=1:2:3:4",
        "--layers=1",
    ]
    code, out, err = run(flags, monkeypatch, capsys)
    assert code == 0 and not err
    lines = out.splitlines()
    for view in ("attention", "lens", "depth", "embeddings", "positions"):
        assert any(f"│ {view} " in line and "left out" not in line for line in lines), view
    assert "LM(Decoder, 2 layers × 8" in out and lines[-1] == f"The page: {tmp_path / 'a' / 'b' / 'inspection.html'}"
    page = (tmp_path / "a" / "b" / "inspection.html").read_text()
    assert "<td>#7</td>" in page and "#1 : #2 :: #3 : #4" in page
    names = {file.stem for file in (tmp_path / "a" / "b").glob("*.png")}
    assert "attention_layer_1" in names and "attention_layer_0" not in names and "lens_tokens" in names


def test_views_are_chosen_and_those_that_do_not_apply_are_left_out(monkeypatch, capsys, tmp_path):
    t5 = [f"--model={GOLDEN / 't5'}", f"--out={tmp_path}"]
    code, out, _ = run([*t5, "--show=positions,embeddings", "--ids=3,4", "--input=5,6,7"], monkeypatch, capsys)
    assert (
        code == 0
        and "lens" not in out
        and {"positions_encoder_t5bias_0_bias", "embeddings_spectrum"} <= {file.stem for file in tmp_path.glob("*.png")}
    )
    code, out, _ = run(t5, monkeypatch, capsys)
    assert code == 0 and out.count("left out: text is missing") == 3


def test_flags_reach_the_model(monkeypatch, capsys, tmp_path):
    asked = []

    def load(path, **which):
        asked.append((path, which))
        raise ConfigError("was asked", "the model")

    monkeypatch.setattr(language_model, "load", load)
    code, _, err = run(["--model=runs/x", "--arm=rope", "--trial=t", "--step=40", "--text=a"], monkeypatch, capsys)
    assert (code, err) == (2, "error: the model was asked")
    assert asked == [("runs/x", {"arm": "rope", "trial": "t", "step": 40})]


@functools.cache
def model(name):
    return f"--model={GOLDEN / name}"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "inspect needs --model=FOLDER, a work folder or one of Hugging Face's"),
        (["--model=nowhere", "--text=a"], "nowhere is no model: give a folder"),
        ([model("gpt2"), "--text=abc"], "token ids are what this model takes, got 'abc'"),
        ([model("gpt2"), "--text=abc", "--ids=1"], "--ids is the same as --text in ids: give one of the two"),
        ([model("gpt2"), "--ids=1,x"], "--ids must be whole numbers as in --ids=1,2,3, got '1,x'"),
        ([model("gpt2"), "--ids=1,99"], "a token id is 99, but there are only 0 … 22"),
        ([model("gpt2"), "--ids=" + ",".join("1" * 17)], "the text takes 17 tokens, but the model has learned only 16 positions"),
        ([model("gpt2"), "--ids=1", "--show=lense"], "show names no view 'lense': did you mean lens"),
        ([model("gpt2"), "--ids=1", "--words=king", "--show=embeddings"], "words must be ids below 23, for"),
        ([model("gpt2"), "--ids=1", "--analogy=1:2", "--show=embeddings"], "analogy must be a:b:c or, with an answer to look for"),
        ([model("gpt2"), "--ids=1", "--step=3"], "is a model of Hugging Face, which has no arms, trials and steps"),
        ([model("t5"), "--ids=1"], "inputs must be given, since the model reads an input besides"),
        ([model("gpt2"), "--ids=1", "--input=2"], "input is for an encoder-decoder: give this model all that it reads as its text"),
        ([model("bert-sequence"), "--ids=1", "--show=lens"], "head is SequenceClassifier, which scores no token ids"),
    ],
)
def test_a_mistake_is_one_sentence(flags, sentence, monkeypatch, capsys, tmp_path):
    code, out, err = run([*flags, f"--out={tmp_path / 'out'}"], monkeypatch, capsys)
    assert code == 2 and sentence in err and "\n" not in err and not out, err
    assert not (tmp_path / "out").exists()


def test_components_of_an_experiment_file_are_known(monkeypatch, capsys, tmp_path):
    file = tmp_path / "own.py"
    file.write_text("raise RuntimeError('it was run')\n")
    code, _, err = run([model("gpt2"), "--ids=1", f"--experiment={file}"], monkeypatch, capsys)
    assert code == 2 and "cannot be run: RuntimeError: it was run" in err
