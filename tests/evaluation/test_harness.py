"""lm-evaluation-harness over models of ours: what it reports is what we score, and what its own model for transformers scores."""

import builtins
import json
import math
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

import llm_jax
from llm_jax.core.config import ConfigError
from llm_jax.data.corpora import TextFiles
from llm_jax.evaluation.evaluation import evaluate
from llm_jax.evaluation.tasks import Generation, MultipleChoice
from llm_jax.infer.sampling import Greedy, Sample
from tests.evaluation.models import LEARNED, speller

ROOT = pathlib.Path(__file__).parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}

QUESTIONS = [
    {"context": f"def f{i}(", "choices": ["self):", f"{i})", "x, y):", "naïve"][: 2 + i % 3], "gold": i % 2} for i in range(12)
]
WRITTEN = [
    {"context": text, "answer": answer} for text, answer in zip(["import ", "for i in", "return ", "a" * 70], "abcd", strict=True)
]
DOCUMENTS = ["def main(self):\n    return 1\n" * 5, "import os", "naïve é " * 40, "x"]

TASKS = {
    "own_choices": """
output_type: multiple_choice
doc_to_text: "{{context}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{gold}}"
metric_list: [{metric: acc}, {metric: acc_norm}, {metric: acc_bytes}]
""",
    "own_written": """
output_type: generate_until
doc_to_text: "{{context}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", "e"], max_gen_toks: 20, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "own_text": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files of the harness, and the JSON lines that they and our own tasks read."""
    place = tmp_path_factory.mktemp("tasks")
    contents = {"own_choices": QUESTIONS, "own_written": WRITTEN, "own_text": [{"text": text} for text in DOCUMENTS]}
    for name, records in contents.items():
        lines = place / f"{name}.jsonl"
        lines.write_text("\n".join(map(json.dumps, records)))
        source = f"task: {name}\ndataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: '{lines}'}}}}"
        (place / f"{name}.yaml").write_text(source + TASKS[name])
    return place


def instances(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, given, 0, ("own", number, 1)) for number, given in enumerate(arguments)]


def test_without_the_library_it_is_a_sentence(monkeypatch):
    known = builtins.__import__

    def missing(name, *more):
        if name.partition(".")[0] == "lm_eval":
            raise ImportError(name)
        return known(name, *more)

    monkeypatch.setattr(builtins, "__import__", missing)
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ConfigError, match=r'--harness_tasks needs lm_eval: pip install -e "\.\[harness\]"'):
        evaluate(speller(), harness=["a"])


# ── what it asks ─────────────────────────────────────────────────────────────────────────────────────────────────────
def test_requests_are_answered_one_by_one_as_together():
    pytest.importorskip("lm_eval")
    from llm_jax.evaluation.harness import HarnessLM

    model = HarnessLM(speller(LEARNED), batch_size=8)
    pairs = instances("loglikelihood", ("the", " fox"), ("", "abc"), ("a ", "b"), ("x" * 30, "yz"), ("t", " fox"))
    together = model.loglikelihood(pairs, disable_tqdm=True)
    assert together == [model.loglikelihood([pair], disable_tqdm=True)[0] for pair in pairs]
    assert together == model.loglikelihood(pairs[::-1], disable_tqdm=True)[::-1]
    assert together[0][0] == pytest.approx(model.reader.lm.loglikelihood("the", " fox"), rel=1e-5)
    assert model.cut == {"own": {3}} and model.reader.length == 16
    texts = instances("loglikelihood_rolling", ("the quick brown fox jumps",), ("a",), ("",))
    whole = model.loglikelihood_rolling(texts, disable_tqdm=True)
    assert whole == [model.loglikelihood_rolling([text], disable_tqdm=True)[0] for text in texts] and whole[2] == 0
    asked = {"until": "q", "max_gen_toks": 5, "do_sample": True, "temperature": 1.5}
    prompts = instances("generate_until", ("the", asked), ("a", asked), ("the", asked))
    drawn = model.generate_until(prompts, disable_tqdm=True)
    assert drawn[:2] == model.generate_until(prompts[1::-1], disable_tqdm=True)[::-1] and drawn[2] != drawn[0]


def test_generation_kwargs_become_a_way_to_choose():
    pytest.importorskip("lm_eval")
    from llm_jax.evaluation.harness import _prompt

    assert _prompt("a", {}) == _prompt("a", {"do_sample": False, "until": []})
    plain = _prompt("a", {"until": ["b", ""], "temperature": 0.0})
    assert (plain.until, plain.new, plain.sampling) == (("b",), 256, Greedy())
    drawn = _prompt("a", {"until": "b", "do_sample": True, "temperature": 0.5, "top_k": 3, "max_new_tokens": 7})
    assert (drawn.until, drawn.new, drawn.sampling) == (("b",), 7, Sample(temperature=0.5, top_k=3))
    assert _prompt("a", {"num_beams": 1, "repetition_penalty": 1.0}) == _prompt("a", {})
    with pytest.raises(ConfigError, match="asks for num_beams=4, which is not known here"):
        _prompt("a", {"num_beams": 4})


# ── a real run ───────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A work folder of the main experiment at its smallest."""
    work = tmp_path_factory.mktemp("work") / "c06"
    command = [
        "run",
        "--experiment=experiments/c06_positional_encoding.py",
        "--scale=smoke",
        f"--workdir={work}",
        "--arms=rope,learned",
    ]
    subprocess.run([sys.executable, "-m", "llm_jax", *command], cwd=ROOT, check=True, capture_output=True, timeout=600)
    return work


@pytest.mark.slow
def test_the_harness_scores_a_checkpoint_as_we_do(trained, folder, tmp_path):
    pytest.importorskip("lm_eval")
    written = f"Generation(path='{folder}/own_written.jsonl', until=('\\n', 'e'), max_tokens=20, strip=False)"
    command = [
        "evaluate",
        f"--model={trained}",
        "--arm=rope",
        "--harness_tasks=own_choices,own_written,own_text",
        f"--include_path={folder}",
        f"--task={folder}/own_choices.jsonl",
        f"--task={written}",
        f"--corpus=Jsonl(path='{folder}/own_text.jsonl', valid_fraction=0.0, test_fraction=0.0)",
        "--split=train",
        f"--out={tmp_path / 'out.json'}",
    ]
    environment = os.environ | OFFLINE | {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-m", "llm_jax", *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out.json").read_text())
    results = told["results"]
    assert told["settings"]["lm_eval"] and told["settings"]["length"] == 64
    corpus, *ours = [one for one in results if one["kind"] != "harness"]
    theirs = {one["task"]: one["scores"] for one in results if one["kind"] == "harness"}
    assert set(theirs) == set(TASKS)
    for one in ours:
        assert one["scores"] == theirs[one["task"]]  # values, errors, intervals, counts
    for name, score in theirs["own_text"].items():
        assert score["value"] == pytest.approx(corpus["scores"][name]["value"], rel=1e-12)
    assert 0 < ours[0]["scores"]["acc"]["value"] < 1 and len(set(ours[0]["items"][0]["log_p"])) == 2


@pytest.mark.slow
def test_the_library_finds_it_by_name(trained, folder, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    import llm_jax.evaluation.harness

    for name, value in (OFFLINE | {"HF_HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    found = lm_eval.simple_evaluate(
        model="llm_jax",
        model_args=f"pretrained={trained},arm=rope,max_length=32",
        tasks=["own_choices"],
        batch_size=3,
        task_manager=TaskManager(include_path=str(folder)),
    )
    mine = evaluate(llm_jax.load(trained, arm="rope"), tasks=[MultipleChoice(path=f"{folder}/own_choices.jsonl")], length=32)
    assert found["results"]["own_choices"]["acc,none"] == mine.found[0].scores["acc"].value
    assert found["config"]["max_length"] == 32
    for path, sentence in ((folder, "names nothing_so, which is no task of lm_eval or"), (tmp_path / "no", "is no folder")):
        with pytest.raises(ConfigError, match=sentence):
            evaluate(llm_jax.load(trained), harness=["nothing_so"], include_path=str(path))


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["rope", "learned"])
def test_its_model_for_transformers_says_the_same_of_what_is_exported(arm, trained, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM

    from llm_jax.evaluation.harness import HarnessLM

    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    lm = llm_jax.load(trained, arm=arm)
    llm_jax.export(lm, tmp_path / "m")
    # its cache scores other tokens than are asked for where windows of one batch read the same (0.4.13)
    theirs = HFLM(str(tmp_path / "m"), max_length=64, device="cpu", batch_size=4, logits_cache=False)
    pairs = [(one["context"], f" {choice}") for one in QUESTIONS for choice in one["choices"]]
    pairs += [("", "abc"), ("a b  ", " c"), ("x" * 100, "yz"), ("naïve ", "é"), ("q", "q" * 64)]
    texts = [(text,) for text in [*DOCUMENTS, *("y" * n for n in (64, 65, 128, 129))]]
    prompts = [(one["context"], {"until": ["\n", "the"], "max_gen_toks": 20}) for one in WRITTEN]
    for mine in (HarnessLM(lm), HarnessLM(tmp_path / "m", max_length=64)):
        for kind, asked in (("loglikelihood", pairs), ("loglikelihood_rolling", texts)):
            said, told = (getattr(model, kind)(instances(kind, *asked), disable_tqdm=True) for model in (mine, theirs))
            if kind == "loglikelihood":
                assert [greedy for _, greedy in said] == [greedy for _, greedy in told]
                said, told = ([log_p for log_p, _ in found] for found in (said, told))
            np.testing.assert_allclose(said, told, rtol=1e-6, atol=1e-4)
        said, told = (model.generate_until(instances("generate_until", *prompts), disable_tqdm=True) for model in (mine, theirs))
        assert said == told and math.prod(map(len, said))


TEMPLATE = """{%- for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}
{%- if add_generation_prompt %}assistant: {% endif %}"""


@pytest.mark.slow
@pytest.mark.parametrize("chats", [False, True])
def test_examples_and_chats_are_put_as_the_library_puts_them(chats, folder, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval")
    pytest.importorskip("accelerate")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from llm_jax.evaluation.harness import HarnessLM

    for name, value in (OFFLINE | {"HF_HOME": str(tmp_path)}).items():
        monkeypatch.setenv(name, value)
    llm_jax.export(speller(), tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text(TEMPLATE)
    examples = tmp_path / "examples.jsonl"
    examples.write_text("\n".join(map(json.dumps, QUESTIONS[5:8])))
    (tmp_path / "shots.yaml").write_text(
        f"task: shots\ndataset_path: json\ntest_split: test\nfewshot_split: train\nnum_fewshot: 2\ndescription: Complete.\n"
        f"fewshot_config: {{sampler: first_n}}\ndataset_kwargs: {{data_files: {{test: '{folder}/own_choices.jsonl', "
        f"train: '{examples}'}}}}" + TASKS["own_choices"]
    )
    found = [
        lm_eval.simple_evaluate(
            model=model,
            tasks=["shots"],
            apply_chat_template=chats,
            fewshot_as_multiturn=chats,
            task_manager=TaskManager(include_path=str(tmp_path)),
        )
        for model in (
            HarnessLM(tmp_path / "m", max_length=256),
            HFLM(str(tmp_path / "m"), max_length=256, device="cpu", logits_cache=False),
        )
    ]
    said, told = ([[one[0][0] for one in sample["resps"]] for sample in one["samples"]["shots"]] for one in found)
    task = MultipleChoice(path=f"{folder}/own_choices.jsonl", shots=2, examples=str(examples), description="Complete.")
    (own,) = evaluate(llm_jax.load(tmp_path / "m"), tasks=[task], length=256, chats=chats).found
    for mine, theirs, item in zip(said, told, own.more["items"], strict=True):
        assert mine == item["log_p"]
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-4)
    assert found[0]["results"]["shots"]["acc,none"] == own.scores["acc"].value == found[1]["results"]["shots"]["acc,none"]


def test_tasks_are_written_in_a_shell(folder):
    from llm_jax.core.written import parse
    from llm_jax.evaluation.tasks import Task

    text = f"Generation(path='{folder}/own_written.jsonl', until=('\\n', 'e'), max_tokens=20, sampling=Sample(temperature=0.5))"
    assert parse(text, Task, "--task") == Generation(
        path=f"{folder}/own_written.jsonl", until=("\n", "e"), max_tokens=20, sampling=Sample(temperature=0.5)
    )


@pytest.mark.parametrize(
    "given, sentence",
    [
        ({"limit": 0}, "limit must be >= 1, or None for all, got 0"),
        ({"limit": -1}, "limit must be >= 1, or None for all, got -1"),
        ({"limit": 0.5}, "limit must be int | None, got 0.5"),
        ({"shots": -1}, "shots must be >= 0, or None for each task's own, got -1"),
        ({"corpora": ["t/txt"]}, "corpora must be ArrayRecord | "),
        ({"corpora": "t/txt"}, "corpora must be ArrayRecord | "),
        ({"tasks": [4]}, "tasks must be Generation | MultipleChoice | str, got 4"),
        ({"harness": [4]}, "harness must be str, got 4"),
        ({"split": None, "tasks": "q.jsonl"}, "split must be str, got None"),
        ({"length": "64", "tasks": "q.jsonl"}, "length must be int | None, got '64'"),
        ({"include_path": 4, "harness": "a"}, "include_path must be str | None, got 4"),
        ({}, "evaluate needs something to score: corpora=[…], tasks=['FILE.jsonl'] or harness=['NAME']"),
        ({"lm": "runs/m1", "tasks": "q.jsonl"}, "lm must be what llm_jax.load gave, got 'runs/m1': evaluate(llm_jax.load(…), …)"),
    ],
)
def test_a_mistake_in_a_call_is_one_sentence(given, sentence):
    with pytest.raises(ConfigError) as error:
        llm_jax.evaluate(**{"lm": speller()} | given)
    assert str(error.value).startswith(sentence)


def test_one_of_a_kind_needs_no_list(folder, tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox " * 9)
    corpus, task = TextFiles(path=str(tmp_path)), f"{folder}/own_choices.jsonl"
    given = {"split": "train", "length": 64, "limit": 2}
    alone = llm_jax.evaluate(speller(), corpora=corpus, tasks=task, **given)
    assert alone.json() == llm_jax.evaluate(speller(), corpora=[corpus], tasks=(task,), **given).json()
    assert alone.json()["results"][1:] == llm_jax.evaluate(speller(), tasks=MultipleChoice(path=task), **given).json()["results"]


def test_a_task_whose_data_cannot_be_reached_is_one_sentence(tmp_path):
    pytest.importorskip("lm_eval")
    (tmp_path / "far.yaml").write_text(
        f"task: far\ndataset_path: json\ntest_split: test\ndataset_kwargs: {{data_files: {{test: '{tmp_path}/none'}}}}"
        + TASKS["own_choices"]
    )
    with pytest.raises(ConfigError, match=r"^--harness_tasks=far cannot be loaded: .*: mend the task, or get its data once"):
        evaluate(speller(), harness="far", include_path=str(tmp_path), length=64)


def test_a_file_of_questions_is_scored_in_one_call(folder):
    found = llm_jax.evaluate(speller(), tasks=[f"{folder}/own_choices.jsonl"], length=64, limit=5)
    assert found.found[0].scores["acc"].count == 5 and len(found.found[0].more["items"]) == 5
