"""`python -m llm_jax tokenize`: what is trained is loaded by its path, pieces are shown and do no harm, mistakes are sentences."""

import functools
import io
import json
import re

import pytest
from rich.console import Console

from llm_jax.cli import terminal
from llm_jax.data.tokenizer_json import HuggingFace, WordPiece
from tests.cli.outcome import outcome

run = functools.partial(outcome, "tokenize")
TEXT = "the cat sat. a dog (the cat) sat, the dog sat: " * 30


@pytest.fixture
def text(tmp_path, monkeypatch):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(TEXT)
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_COLOR", "1")
    return [f"--corpus=TextFiles(path='{tmp_path / 'text'}')"]


@pytest.mark.parametrize(
    "kind, output, loaded",
    [
        ("WordPiece(vocabulary=30)", "out", "HuggingFace(path='{}')"),
        ("ByteLevelBPE(vocabulary=270)", "out", "HuggingFace(path='{}')"),
        ("SentencePiece(vocabulary=275)", "out", "HuggingFace(path='{}')"),
        ("SentencePiece(vocabulary=275,kind=unigram)", "one.model", "SentencePiece(path='{}')"),
        ("Bytes()", "out", "HuggingFace(path='{}')"),
    ],
)
def test_what_is_trained_is_loaded_by_its_path(kind, output, loaded, text, tmp_path, monkeypatch, capsys):
    place = tmp_path / output
    code, out, err = run(["train", f"--tokenizer={kind}", f"--output={place}", *text], monkeypatch, capsys)
    assert code == 0 and not err and f'--set="tokenizer={loaded.format(place)}"' in out
    encode = ["encode", "--text=the dog sat", "--text=", *text]
    ids = [run([*encode, f"--tokenizer={name}"], monkeypatch, capsys)[1] for name in (kind, place, loaded.format(place))]
    assert ids[0] == ids[1] == ids[2] and ids[0].count(",") >= 2
    code, _, err = run(["train", f"--tokenizer={kind}", f"--output={place}", *text], monkeypatch, capsys)
    assert code == 2 and "is there already" in err


def test_pieces_and_what_comes_back_are_shown(text, monkeypatch, capsys):
    given = ["inspect", "--tokenizer=WordPiece(vocabulary=30)", "--text=the\tcat\x1b[31m  é", *text]
    code, out, _ = run(given, monkeypatch, capsys)
    assert code == 0 and " the| c|at|[UNK]" in f" {out}" and "comes back as: the cat" in out and "\x1b" not in out
    code, out, _ = run(["inspect", "--tokenizer=Bytes()", "--ids=104,27,256,233"], monkeypatch, capsys)
    assert out.splitlines()[0] == "h|␛|<end>|\\xe9" and "comes back" not in out


def test_colours_take_turns_and_nothing_reaches_the_terminal_that_moves_it():
    pieces = [b"a", "\x9b2J".encode(), b"\x1b]0;x\x07", "\u202eb".encode(), "<s\x1b>", b"\xe6", b"\n\r", "日".encode()]
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=80)
    console.print(terminal.pieces_in_colour(pieces, [True] + [False] * 7, colour=True), soft_wrap=True)
    console.print(terminal.piece_table(range(8), pieces, None))
    shown = out.getvalue()
    assert shown.startswith("\x1b[4;30;106ma\x1b[0m\x1b[30;103m\\u009b2J\x1b[0m") and "\\xe6" in shown and "日" in shown
    rest = re.sub(r"\x1b\[[0-9;]*m", "", shown)  # colours alone
    assert not [c for c in rest if not c.isprintable() and c != "\n"]
    assert terminal.visible("\t\x7f\u200b") == "␉␡\\u200b"


def test_a_chat_is_encoded_with_its_mask(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "m.json").write_text(json.dumps([{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]))
    template = "{% for m in messages %}<{{ m.role }}>{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    (tmp_path / "t.jinja").write_text(template)
    given = [f"--chat={tmp_path / 'm.json'}", f"--template={tmp_path / 't.jinja'}", "--tokenizer=Bytes()"]
    code, out, _ = run(["encode", *given], monkeypatch, capsys)
    found = json.loads(out)
    assert code == 0 and found["text"] == "<user>the<assistant>cat" and found["ids"] == list(found["text"].encode())
    assert found["mask"] == [0] * 6 + [1] * 3 + [0] * 11 + [1] * 3
    code, out, _ = run(["inspect", *given], monkeypatch, capsys)
    assert "assistant" in out and "23 ids, of which the assistant wrote 6" in out
    (tmp_path / "m.json").write_text("[")
    assert "is not JSON" in run(["encode", *given], monkeypatch, capsys)[2]


def test_special_tokens_of_a_chat_are_ids(tmp_path, text, monkeypatch, capsys):
    run(["train", "--tokenizer=WordPiece(vocabulary=30)", f"--output={tmp_path / 'w'}", *text], monkeypatch, capsys)
    (tmp_path / "m.json").write_text('[{"role": "user", "content": "the"}]')
    (tmp_path / "t.jinja").write_text("[CLS] {{ messages[0].content }} [SEP]")
    given = [f"--chat={tmp_path / 'm.json'}", f"--template={tmp_path / 't.jinja'}", f"--tokenizer={tmp_path / 'w'}"]
    found = json.loads(run(["encode", *given], monkeypatch, capsys)[1])
    assert found["ids"][0] == 2 and found["ids"][-1] == 3 and len(found["ids"]) == 3 and found["mask"] is None


def test_tokenizers_are_compared_in_one_table(text, monkeypatch, capsys):
    kinds = ["Bytes()", "WordPiece(vocabulary=30)", "ByteLevelBPE(vocabulary=270)"]
    code, out, err = run(["compare", *(f"--tokenizer={kind}" for kind in kinds), *text], monkeypatch, capsys)
    rows = [line.split("│") for line in out.splitlines() if line.startswith("│")]
    assert code == 0 and not err and [row[1].strip().split("(")[0] for row in rows] == ["Bytes", "WordPiece", "ByteLevelBPE"]
    assert [row[8].strip() for row in rows] == ["none", "45.5%", "none"] and all(float(row[3]) > 0 for row in rows)
    assert "of the validation split" in out


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "tokenize does one of train, encode, inspect, compare: write it first, got ''"),
        (["trian"], "write it first, got 'trian'"),
        (["train", "--tokenizer=Bytes()"], "--output is missing"),
        (["train", "--text=a"], "--text is for encode and inspect, not for train"),
        (["encode", "--text=a"], "--tokenizer takes one"),
        (["encode", "--tokenizer=Bytes()"], "tokenize encode needs a --text, a --file or a --chat"),
        (["encode", "--tokenizer=Byts()", "--text=a"], "--tokenizer has no choice 'Byts': did you mean Bytes"),
        (["encode", "--tokenizer=no/where", "--text=a"], "--tokenizer is neither a file nor a folder: 'no/where'"),
        (["encode", "--tokenizer={folder}", "--text=a"], "has no tokenizer.json"),
        (["encode", "--tokenizer=Bytes()", "--file={folder}/latin"], "is not UTF-8 at byte 3 (0xe9)"),
        (["encode", "--tokenizer=Bytes()", "--file={folder}/none"], "none: No such file or directory"),
        (["encode", "--tokenizer=Bytes()", "--text=\udce9"], "--text is not UTF-8"),
        (["encode", "--tokenizer=Bytes()", "--chat=m.json"], "--template is missing"),
        (["inspect", "--tokenizer=Bytes()", "--ids=1,300"], "--ids must be whole numbers below 257"),
        (["train", "--tokenizer=Bytes()", "--output=a.model"], "can only be written by SentencePiece"),
        (
            ["compare", "--tokenizer=Bytes()", "--tokenizer=SentencePiece(path='none')"],
            "tokenizer.path is no file: 'none' (of SentencePiece(path='none'))",
        ),
        (["compare", "--corpus=TextFils()"], "--corpus has no choice 'TextFils': did you mean TextFiles"),
        (["encode", "more"], "takes flags only, got 'more'"),
    ],
)
def test_a_mistake_is_one_sentence(flags, sentence, tmp_path, monkeypatch, capsys):
    (tmp_path / "latin").write_bytes("café".encode("latin-1"))
    code, out, err = run([flag.replace("{folder}", str(tmp_path)) for flag in flags], monkeypatch, capsys)
    assert code == 2 and sentence in err and "\n" not in err and not out, err


def test_a_tokenizer_with_another_corpus_is_another(tmp_path, text, monkeypatch, capsys):
    given = ["train", "--tokenizer=WordPiece(vocabulary=30,lowercase=True)", f"--output={tmp_path / 'w'}", *text]
    assert run(given, monkeypatch, capsys)[0] == 0
    loaded = HuggingFace(path=str(tmp_path / "w")).fit(None, "")
    assert loaded.decode(loaded.encode("The CAT")) == "the cat" and WordPiece(30, True).lowercase
