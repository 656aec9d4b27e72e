"""Questions in JSON lines: what they are put as, what is scored, and that a bad line is named."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.core.mesh import Mesh
from llm_jax.data.chat import Template
from llm_jax.evaluation import tasks
from llm_jax.evaluation.reading import Reader
from llm_jax.evaluation.tasks import Generation, MultipleChoice, of_file
from llm_jax.infer.sampling import Greedy, Sample
from llm_jax.io.pretrained import shardings
from llm_jax.models.encoder_decoder import EncoderDecoder
from llm_jax.models.heads import LanguageModel
from llm_jax.models.stack import Stack
from llm_jax.nn.attention import Bidirectional
from llm_jax.nn.multihead import Attention
from llm_jax.nn.position import T5Bias
from tests.evaluation.models import speller

CHOICES = [
    {"context": "one", "choices": ["two", "three thousand", "日本"], "gold": 0},
    {"question": "four", "choices": ["five", "6"], "answer": "6"},
    {"query": "seven", "choices": ["é", "eight", "nine"], "label": [1, "nine"], "id": 3},
    {"prompt": "x" * 40, "choices": ["a", "b"], "target": 1},
]
ANSWERS = [{"context": "one", "answer": "two"}, {"context": "three", "answer": ["four", "five"]}, {"context": "six", "gold": "7"}]


def written(path, records) -> str:
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def reads():
    return Reader(speller(), 32)


# ── multiple choice ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_the_likeliest_choice_is_taken_by_each_measure(reads, tmp_path):
    task = MultipleChoice(path=written(tmp_path / "q.jsonl", CHOICES))
    found = task.score(reads)
    right = [{0}, {1}, {1, 2}, {1}]
    hits = {"acc": [], "acc_norm": [], "acc_bytes": []}
    for record, item, gold in zip(CHOICES, found.items, right, strict=True):
        context = next(iter(record.values()))
        choices = record["choices"]
        log_p = reads.lm.loglikelihood(context[-28:], [f" {choice}" for choice in choices])
        if len(context) < 28:
            np.testing.assert_allclose(item["log_p"], log_p, rtol=1e-5)
        for name, sizes in (("acc", None), ("acc_norm", map(len, choices)), ("acc_bytes", (len(c.encode()) for c in choices))):
            picked = int(np.argmax(item["log_p"] if sizes is None else np.array(item["log_p"]) / np.array(list(sizes))))
            hits[name].append(picked in gold)
            assert item[name] == hits[name][-1]
    assert {name: score.value for name, score in found.scores.items()} == {name: np.mean(of) for name, of in hits.items()}
    assert found.cut == 1 and found.items[2]["gold"] == [1, 2] and found.scores["acc"].count == 4


def test_characters_and_bytes_are_told_apart():
    record = tasks.Record("", "", (1,), ("abcd", "日本"))  # 4 and 2 characters, 4 and 6 bytes
    item = tasks._item(record, np.array([-4.0, -3.0]))
    assert (item["acc"], item["acc_norm"], item["acc_bytes"]) == (True, False, True)


def test_an_encoder_reads_the_question(tmp_path):
    stack = {"width": 16, "depth": 1}
    encoder = Stack(attention=Attention(heads=2, mask=Bidirectional()), position=T5Bias(bidirectional=True), **stack)
    decoder = Stack(attention=Attention(heads=2), position=T5Bias(), **stack)
    lm = speller(EncoderDecoder(encoder=encoder, decoder=decoder, head=LanguageModel(tied=False)), after=(255,))
    reads = Reader(lm, 12)
    item, *_, last = MultipleChoice(path=written(tmp_path / "q.jsonl", CHOICES[1:])).score(reads).items
    read = [*b"four", 255]
    np.testing.assert_allclose(item["log_p"], lm.loglikelihood(read, [[*b" five"], [*b" 6"]]), rtol=1e-5)
    np.testing.assert_allclose(last["log_p"][0], lm.loglikelihood([*(b"x" * 11), 255], [*b" a"]), rtol=1e-5)
    task = Generation(path=written(tmp_path / "a.jsonl", ANSWERS), until=("\x00",), max_tokens=6)
    said = lm.generate([[*b"one"], [*b"three"], [*b"six"]], max_new_tokens=6)
    assert [item["written"] for item in task.score(dataclasses.replace(reads, lm=dataclasses.replace(lm, after=()))).items] == [
        lm.tokenizer.decode(ids).partition("\x00")[0] for ids in said
    ]
    with pytest.raises(ConfigError, match=r"' x{12}' has 13 tokens to be scored, and the model reads 12"):
        reads.pair("a", " " + "x" * 12)


def test_scores_do_not_depend_on_the_order_of_questions(reads, tmp_path):
    there, back = (
        MultipleChoice(path=written(tmp_path / name, records)).score(reads)
        for name, records in (("there.jsonl", CHOICES), ("back.jsonl", CHOICES[::-1]))
    )
    assert [item["log_p"] for item in there.items] == [item["log_p"] for item in back.items[::-1]]
    assert there.scores == back.scores
    alone = [MultipleChoice(path=written(tmp_path / "one.jsonl", [one])).score(reads).items[0]["log_p"] for one in CHOICES]
    assert alone == [item["log_p"] for item in there.items]


def test_examples_are_put_before_the_question(reads, tmp_path):
    file, shots = written(tmp_path / "q.jsonl", CHOICES[:3]), written(tmp_path / "shots.jsonl", CHOICES[1:3])
    from_file = MultipleChoice(path=file, shots=2, examples=shots, description="Count.\n")
    contexts = [context for _, context in from_file.contexts(reads, None)]
    assert contexts == [f"Count.\nfour 6\n\nseven eight\n\n{word}" for word in ("one", "four", "seven")]
    drawn = [context for _, context in MultipleChoice(path=file, shots=2).contexts(reads, None)]
    assert [sorted(context.split("\n\n")[:-1]) for context in drawn] == [
        ["four 6", "seven eight"],
        ["one two", "seven eight"],
        ["four 6", "one two"],
    ]
    assert drawn[:2] == [context for _, context in MultipleChoice(path=file, shots=2).contexts(reads, 2)]
    many = written(tmp_path / "many.jsonl", [{"context": str(i), "answer": "a"} for i in range(30)])
    first, other = (Generation(path=many, shots=3, seed=seed).contexts(reads, None) for seed in (0, 1))
    assert first != other and len({context.rpartition("\n\n")[0] for _, context in first}) > 20
    with pytest.raises(ConfigError, match="shots is 3, but there are only 2 examples"):
        MultipleChoice(path=file, shots=3).contexts(reads, None)


def test_a_chat_is_what_the_template_writes(reads, tmp_path):
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    chats = dataclasses.replace(reads, template=Template(source), length=200)
    file = written(tmp_path / "q.jsonl", CHOICES[:2])
    task = MultipleChoice(path=file, shots=1, examples=file, description="Count.")
    said = "[system]Count.[user]one[assistant]two[user]four[assistant]"
    assert task.contexts(chats, None)[1][1] == said
    np.testing.assert_allclose(task.score(chats).items[1]["log_p"], reads.lm.loglikelihood(said, ["five", "6"]), rtol=1e-5)


# ── written answers ──────────────────────────────────────────────────────────────────────────────────────────────────
def test_what_is_written_is_cut_at_the_first_end_and_compared(reads, tmp_path):
    lm = reads.lm
    free = lm.generate(["one", "three", "six"], max_new_tokens=12)
    end = free[0][4]
    records = [{"context": "one", "answer": free[0].partition(end)[0]}, {"context": "three", "answer": ["", free[1]]}, ANSWERS[2]]
    task = Generation(path=written(tmp_path / "q.jsonl", records), until=(end, "never there"), max_tokens=12, strip=False)
    found = task.score(reads)
    assert [item["written"] for item in found.items] == [text.partition(end)[0] for text in free]
    assert [item["exact_match"] for item in found.items] == [True, end not in free[1] or free[1].startswith(end), False]
    assert found.scores["exact_match"].value == np.mean([item["exact_match"] for item in found.items])
    for size in (1, 2):  # how many there are beside changes nothing
        some = dataclasses.replace(task, path=written(tmp_path / "some.jsonl", records[-size:])).score(reads)
        assert some.items == tuple(
            item | {"where": item["where"].replace("q.jsonl", "some.jsonl").replace(f"line {3 - size + n}", f"line {n}")}
            for n, item in enumerate(found.items[-size:], 1)
        )


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(data=2, fsdp=2, tensor=2)])
def test_devices_share_what_is_written(mesh, reads, tmp_path):
    lm = reads.lm
    spread = dataclasses.replace(lm, params=jax.device_put(lm.params, shardings(lm.config, lm.vocabulary, mesh)))
    for way in (Greedy(), Sample(temperature=1.5)):
        task = Generation(path=written(tmp_path / "q.jsonl", ANSWERS), max_tokens=20, until=("\x00",), sampling=way)
        assert task.score(Reader(spread, 32)) == task.score(reads)


def test_spaces_and_case_count_unless_they_do_not(tmp_path):
    file = written(tmp_path / "q.jsonl", ANSWERS)
    for task, same in ((Generation(path=file), True), (Generation(path=file, strip=False), False)):
        assert (task._plain(" two\n") == task._plain("two")) == same
    assert Generation(path=file)._plain("Two") != "two" and Generation(path=file, ignore_case=True)._plain("Two") == "two"


def test_draws_belong_to_the_question(reads, tmp_path):
    way = {"sampling": Sample(temperature=2.0), "max_tokens": 12, "until": ("\x00",)}
    task = Generation(path=written(tmp_path / "a.jsonl", [*ANSWERS, ANSWERS[0]]), **way)
    found = [item["written"] for item in task.score(reads).items]
    turned = Generation(path=written(tmp_path / "b.jsonl", ANSWERS[::-1]), **way)
    assert [item["written"] for item in turned.score(reads).items] == found[2::-1]
    assert found[3] != found[0] and len(set(found)) == 4
    assert [item["written"] for item in dataclasses.replace(task, seed=1).score(reads).items] != found


def test_a_model_that_has_diverged_is_never_right(reads, tmp_path):
    lm = dataclasses.replace(reads.lm, params=jax.tree.map(lambda leaf: leaf * np.nan, reads.lm.params))
    choices = MultipleChoice(path=written(tmp_path / "q.jsonl", [{"context": "a", "choices": ["b", "c"], "gold": 0}]))
    answers = Generation(path=written(tmp_path / "a.jsonl", [{"context": "a", "answer": ""}]), until=("\x00",), max_tokens=2)
    for task in (choices, answers):
        with pytest.raises(ConfigError, match="the model gives a log p of nan, so that it has no score"):
            task.score(dataclasses.replace(reads, lm=lm))


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_a_file_says_which_task_it_is(tmp_path):
    choices, answers = written(tmp_path / "c.jsonl", CHOICES), written(tmp_path / "a.jsonl", ["", json.dumps(ANSWERS[0])])
    assert of_file(choices) == MultipleChoice(path=choices) and of_file(answers) == Generation(path=answers)
    assert of_file(choices).name == "c"


GOOD = {"context": "a", "choices": ["b", "c"], "gold": 0}


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("{", "line 2, is not JSON: "),
        ('{"id": ' + "1" * 5000 + "}", "line 2, is not JSON: Exceeds the limit (4300 digits)"),
        ('{"context": "\udc80"}'.encode("utf-8", "surrogateescape"), "line 2, is not UTF-8 at byte 13"),
        ("[1]", 'line 2, must be an object, as in {"context": "2 + 2 =", "answer": "4"}, got [1]'),
        (GOOD | {"choices": ["b"]}, "line 2, has 1 choice, and needs at least two"),
        (GOOD | {"choices": []}, "line 2, has no choice, and needs at least two"),
        (
            {"context": "a", "chioces": ["b", "c"], "gold": 0},
            'line 2, has no "choices", a list of texts: did you mean "chioces" to be that?',
        ),
        (GOOD | {"choices": "bc"}, 'line 2, needs "choices", a list of texts, got "bc"'),
        (GOOD | {"choices": ["b", ""]}, 'line 2, needs "choices", a list of texts, got ["b", ""]'),
        (GOOD | {"gold": 2}, "line 2, has the gold 2, but its 2 choices are 0 … 1"),
        (GOOD | {"gold": -1}, "line 2, has the gold -1, but its 2 choices are 0 … 1"),
        (GOOD | {"gold": "d"}, 'line 2, has the gold "d", which is none of its choices'),
        (GOOD | {"gold": 0.5}, "line 2, must have a place or a text as its gold, got 0.5"),
        (GOOD | {"gold": True}, "line 2, must have a place or a text as its gold, got true"),
        (GOOD | {"gold": []}, "line 2, has no right choice"),
        (GOOD | {"label": 1}, "line 2, has 'gold' and 'label', which mean the same: give one of gold, answer, target, label"),
        ({"choices": ["b", "c"], "gold": 0}, 'line 2, has no "context": give one of context, question, query, prompt'),
        (GOOD | {"context": 5}, "line 2, must have a text as its context, got 5"),
        (
            GOOD | {"choices": ["b", "c" * 40]},
            "line 2, '" + " " + "c" * 39 + "' has 41 tokens to be scored, and the model reads 32",
        ),
    ],
)
def test_a_bad_line_is_named(line, sentence, reads, tmp_path):
    file = tmp_path / "q.jsonl"
    raw = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    file.write_bytes(json.dumps(GOOD).encode() + b"\n" + raw + b"\n")
    with pytest.raises(ConfigError) as error:
        MultipleChoice(path=str(file)).score(reads)
    assert str(error.value).startswith(f"{file}, {sentence}"), error.value


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda path: Generation(path=written(path, [{"context": "a", "answer": 4}])).records(), 'line 1, needs "answer", a text'),
        (
            lambda path: Generation(path=written(path, [{"context": "a", "gold": 0}])).records(),
            'line 1, needs "answer", a text or a list of texts, got 0, or the "choices" that it is a place of',
        ),
        (
            lambda path: of_file(written(path, [{"context": "a", "chioces": ["b", "c"], "gold": "b"}])),
            'line 1, has no "choices": did you mean "chioces" to be that? For answers to be written: Generation(path=',
        ),
        (
            lambda path: Generation(path="q.jsonl").score(Reader(speller(), 64)),
            "max_tokens is 256, which leaves no room for a context in the 64 tokens that are read: write "
            "--task=\"Generation(path='q.jsonl', max_tokens=32)\"",
        ),
        (lambda path: Generation(path="q.jsonl", until="x"), "until must be a tuple such as ('x',), got 'x'"),
        (lambda path: Generation(path=written(path, ["", " "])).records(), "is empty: write one JSON object a line"),
        (lambda path: list(tasks.lines(str(path))), "task finds no file at"),
        (lambda path: MultipleChoice(), "path is missing: name a file of JSON lines"),
        (lambda path: MultipleChoice(path="a", examples="b"), "shots is 0, so that examples are named for nothing"),
        (lambda path: Generation(path="a", until=("",)), "until has an empty text, which everything contains"),
        (lambda path: Generation(path="a", max_tokens=0), "max_tokens must be > 0, got 0"),
    ],
)
def test_a_mistake_is_a_sentence(call, sentence, tmp_path):
    with pytest.raises(ConfigError) as error:
        call(tmp_path / "q.jsonl")
    assert sentence in str(error.value)
