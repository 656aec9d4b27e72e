"""`python -m llm_jax evaluate`: a table, a file, and a sentence for what cannot be scored."""

import functools
import json
import pathlib
from types import SimpleNamespace

import pytest

from llm_jax import export, language_model
from llm_jax.core.config import ConfigError
from llm_jax.evaluation import evaluation
from tests.cli.outcome import outcome
from tests.evaluation.models import speller

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "huggingface"

run = functools.partial(outcome, "evaluate")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a model of transformers, a corpus, questions, and an empty file."""
    place = tmp_path_factory.mktemp("files")
    export(speller(), place / "model")
    (place / "corpus.jsonl").write_text("\n".join(json.dumps({"text": "the quick brown fox " * n}) for n in range(1, 5)))
    (place / "choices.jsonl").write_text(json.dumps({"context": "x" * 40, "choices": ["b", "c"], "gold": 0}))
    (place / "answers.jsonl").write_text(json.dumps({"context": "a", "answer": "b"}))
    (place / "bad.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "gold": 0}\n{"context"\n')
    (place / "empty.jsonl").write_text("")
    return place


def test_everything_is_scored_in_one_call(files, monkeypatch, capsys, tmp_path):
    flags = [
        f"--model={files / 'model'}",
        f"--corpus=Jsonl(path='{files / 'corpus.jsonl'}', valid_fraction=0.0, test_fraction=0.0)",
        "--split=train",
        f"--task={files / 'choices.jsonl'}",
        f"--task=Generation(path='{files / 'answers.jsonl'}', max_tokens=4)",
        "--length=16",
        f"--out={tmp_path / 'out.json'}",
    ]
    code, out, err = run(flags, monkeypatch, capsys)
    assert code == 0 and not err, err
    names = (
        "token_perplexity",
        "word_perplexity",
        "byte_perplexity",
        "bits_per_byte",
        "acc",
        "acc_norm",
        "acc_bytes",
        "exact_match",
    )
    for name in names:
        assert f"│ {name} " in out, name
    assert "1 context is cut on the left" in out and "200 tokens, " in out and "LM(Decoder, 1 layers × 16" in out
    told = json.loads((tmp_path / "out.json").read_text())
    assert [one["kind"] for one in told["results"]] == ["corpus", "task", "task"]
    corpus, choices, _ = told["results"]
    assert (corpus["documents"], corpus["tokens"], corpus["bytes"]) == (4, 200, 200)
    assert corpus["scores"]["bits_per_byte"]["low"] < corpus["scores"]["bits_per_byte"]["value"]
    assert choices["cut"] == 1 and choices["scores"]["acc"]["error"] is None  # of one question there is none
    assert told["settings"]["length"] == 16 and choices["definition"]["class"] == "MultipleChoice"


def test_a_name_in_brackets_is_shown_as_it_is(files, monkeypatch, capsys):
    named = files / "[red]a.jsonl"
    named.write_text((files / "choices.jsonl").read_text())
    code, out, err = run([f"--model={files / 'model'}", f"--task={named}", "--length=16"], monkeypatch, capsys)
    assert code == 0 and "│ [red]a " in out, err


def test_flags_reach_the_model(files, monkeypatch, capsys):
    asked = []

    def load(path, **which):
        asked.append((path, which.pop("mesh").fsdp, which))
        raise ConfigError("was asked", "the model")

    monkeypatch.setattr(language_model, "load", load)
    flags = [
        "--model=runs/x",
        "--arm=rope",
        "--trial=t",
        "--step=40",
        f"--task={files / 'choices.jsonl'}",
        "--mesh=Mesh(data=1, fsdp=-1)",
    ]
    code, _, err = run([*flags, "--compute=bfloat16"], monkeypatch, capsys)
    assert (code, err) == (2, "error: the model was asked")
    assert asked == [("runs/x", -1, {"arm": "rope", "trial": "t", "step": 40, "compute": "bfloat16"})]


def test_tasks_of_the_harness_are_looked_up_before_a_model_is_read(monkeypatch, capsys):
    def manager_of(names, include_path):
        raise ConfigError(f"names {names[0]}, of {include_path}", "--harness_tasks")

    monkeypatch.setattr(evaluation, "_harness", lambda: SimpleNamespace(manager_of=manager_of))
    monkeypatch.setattr(language_model, "load", lambda *_, **__: pytest.fail("was read"))
    code, _, err = run(["--model=m", "--harness_tasks=helaswag", "--include_path=own"], monkeypatch, capsys)
    assert (code, err) == (2, "error: --harness_tasks names helaswag, of own")


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "evaluate needs --model=FOLDER, a work folder or one of Hugging Face's"),
        (["--model={}/model"], "evaluate needs something to score: --corpus=…, --task=FILE.jsonl or --harness_tasks=NAME"),
        (["--model=nowhere", "--task={}/choices.jsonl"], "nowhere is no model: give a folder"),
        (["--model={}", "--task={}/choices.jsonl"], "is no model: give a folder"),
        ([f"--model={GOLDEN}/gpt2", "--task={}/choices.jsonl"], "gpt2 has no tokenizer, and what is scored are texts"),
        (["--model={}/model", "--task={}/empty.jsonl"], "empty.jsonl is empty: write one JSON object a line"),
        (["--model={}/model", "--task={}/bad.jsonl"], "bad.jsonl, line 2, is not JSON: "),
        (["--model={}/model", "--task={}/none.jsonl"], "task finds no file at "),
        (["--model={}/model", "--task=Choices(path='a')"], "--task has no choice 'Choices': did you mean MultipleChoice"),
        (["--model={}/model", "--corpus=Jsonl(path='{}/empty.jsonl')"], "is an empty corpus: there is no text in it"),
        (["--model={}/model", "--corpus=Jsonl(path='{}/corpus.jsonl')", "--split=dev"], "corpus has no split 'dev': it has train"),
        (["--model={}/model", "--corpus=TextFiles(path='{}/corpus.jsonl')", "--split=dev"], "corpus has no split 'dev': it has "),
        (["--model={}/model", "--task={}/choices.jsonl", "--out={}"], "--out must be a file in a folder that there is"),
        (["--model={}/model", "--task={}/choices.jsonl", "--length=0"], "length"),
        (["--model={}/model", "--task={}/choices.jsonl", "--chat"], "has no chat template"),
    ],
)
def test_a_mistake_is_one_sentence(flags, sentence, files, monkeypatch, capsys):
    code, out, err = run([flag.replace("{}", str(files)) for flag in flags], monkeypatch, capsys)
    assert code == 2 and sentence in err and "\n" not in err and not out, err
