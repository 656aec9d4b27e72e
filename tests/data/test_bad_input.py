"""Files that are empty, hold NUL bytes or one endless line, or are no such files: said, counted, or read all the same."""

import gzip
import json
import subprocess
import sys

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from llm_jax.core.config import ConfigError
from llm_jax.data.corpora import ArrayRecord, HuggingFace, Jsonl, Parquet, TextFiles
from llm_jax.data.tokenized import tokenize
from llm_jax.data.tokenizer_json import ByteLevelBPE
from llm_jax.data.tokenizers import Bytes, SentencePiece
from tests.cli.outcome import outcome
from tests.data.test_corpora import TEXTS, array_record, zstd
from tests.lab.test_runner import declared  # noqa: F401

RECORD = b'{"text": "good text"}\n'


def table(path, texts):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, pyarrow.string())}), path)


def packed(file, content):
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else zstd(content) if file.suffix == ".zst" else content)


# kind: (the corpus, what its files are called, what is in one without text, what in one with it)
EMPTY = {
    "text": (TextFiles, "txt", b"", b"good text"),
    "text.gz": (TextFiles, "txt.gz", b"", b"good text"),
    "jsonl": (Jsonl, "jsonl", b"", RECORD),
    "jsonl of empty lines": (Jsonl, "jsonl", b"\n \n\n", RECORD),
    "jsonl of empty texts": (Jsonl, "jsonl", b'{"text": ""}\n' * 3, RECORD),
    "jsonl.gz": (Jsonl, "jsonl.gz", b"", RECORD),
    "jsonl.zst": (Jsonl, "jsonl.zst", b"", RECORD),
    "parquet": (Parquet, "parquet", [], ["good text"]),
}


@pytest.mark.parametrize("kind", EMPTY)
def test_a_file_without_text_is_passed_over_beside_others_and_no_corpus_by_itself(kind, tmp_path):
    make, suffix, empty, good = EMPTY[kind]
    write = table if make is Parquet else packed
    write(tmp_path / f"a.{suffix}", empty)
    corpus = make(path=str(tmp_path), valid_fraction=0.0)
    for size in (None, 1):
        assert not any(text for piece in corpus.pieces(size) for _, text in corpus.read(piece))
    for read in (lambda: list(corpus.documents("train")), lambda: tokenize(corpus, Bytes().fit(None, ""), "train", tmp_path / "c")):
        with pytest.raises(ConfigError, match=r"data\.corpus is an empty corpus: there is no text in it"):
            read()
    write(tmp_path / f"b.{suffix}", good)
    write(tmp_path / f"c.{suffix}", empty)
    assert list(make(path=str(tmp_path), valid_fraction=0.0, test_fraction=0.0).documents("train")) == ["good text"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.bz2", "a.jsonl.zst", "a.txt.gz", "a.parquet", "a.array_record"])
def test_a_file_of_no_bytes_that_should_have_some_is_named(name, tmp_path):
    """A decoder says that it was cut off, or finds nothing: then it is as empty as a file of text."""
    kind = {"txt": TextFiles, "jsonl": Jsonl, "parquet": Parquet, "array_record": ArrayRecord}[name.split(".")[1]]
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=rf"{name} (is damaged|is no|has no)|is an empty corpus"):
        list(kind(path=str(tmp_path / name)).documents("train"))


def test_a_dataset_without_rows_is_a_sentence(tmp_path):
    datasets.Dataset.from_dict({"text": []}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(ConfigError, match="cannot be loaded: it has no rows"):
        list(HuggingFace(path=str(tmp_path / "d")).documents("train"))
    array_record(tmp_path / "a.array_record", [b"", b""])
    with pytest.raises(ConfigError, match="is an empty corpus"):
        list(ArrayRecord(path=str(tmp_path / "a.array_record")).documents("train"))


@pytest.mark.parametrize("tokenizer", [Bytes(), SentencePiece(vocabulary=300), ByteLevelBPE(vocabulary=300)], ids=str)
@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet", "array_record"])
def test_nul_bytes_are_trained_on_like_any_others(kind, tokenizer, tmp_path):
    text = "\0" + "".join(TEXTS[:200]) + "\0\0"
    make = {"txt": TextFiles, "jsonl": Jsonl, "parquet": Parquet, "array_record": ArrayRecord}[kind]
    file = tmp_path / f"a.{kind}"
    {
        "txt": lambda: file.write_bytes(text.encode()),
        "jsonl": lambda: file.write_text(json.dumps({"text": text})),
        "parquet": lambda: table(file, [text]),
        "array_record": lambda: array_record(file, [text.encode()]),
    }[kind]()
    corpus = make(path=str(file), valid_fraction=0.0, test_fraction=0.0)
    fitted = tokenizer.fit(corpus, tmp_path)
    ids = np.asarray(tokenize(corpus, fitted, "train", tmp_path / "cache").ids[:])
    assert fitted.decode(ids[: len(ids) - (fitted.end is not None)]) == text


def test_a_flag_says_whether_a_bad_line_stops_a_run(declared, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    good = json.dumps({"text": "every good boy does fine " * 20}) + "\n"
    (tmp_path / "a.jsonl").write_text(good * 30 + '{"text": "cut\n' + good * 30)
    run = [f"--experiment={declared}", f"--workdir={tmp_path / 'w'}", "--plan"]
    corpus = f"Jsonl(path='{tmp_path / 'a.jsonl'}', valid_fraction=0.2"
    code, _, told = outcome("run", [*run, f"--set=data.corpus={corpus})"], monkeypatch, capsys)
    assert code == 2 and "a.jsonl, line 31, is not JSON" in told and "Traceback" not in told
    code, shown, _ = outcome("run", [*run, f"--set=data.corpus={corpus}, bad='skip')"], monkeypatch, capsys)
    assert code == 0 and "tokens a run" in " ".join(shown.split())


MEMORY = """
import sys
from llm_jax.data.corpora import Jsonl, TextFiles
from llm_jax.data.tokenized import tokenize
from llm_jax.data.tokenizers import Bytes
kind, path, cache = sys.argv[1:]
corpus = {"jsonl": Jsonl, "txt": TextFiles}[kind](path=path, valid_fraction=0.0, test_fraction=0.0)
tokens = len(tokenize(corpus, Bytes().fit(corpus, cache), "train", cache))
print(tokens, next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_one_line_may_be_100_megabytes(kind, tmp_path):
    """It is one document, and so in memory: as bytes, as text and as four bytes for each of its ids, not more than twice over."""
    used = {}
    for megabytes in (1, 100):
        text, file = "the same words again and again, " * (megabytes * 31_250), tmp_path / f"{megabytes}.{kind}"
        file.write_text(text if kind == "txt" else json.dumps({"text": text}) + "\n")
        command = [sys.executable, "-c", MEMORY, kind, str(file), str(tmp_path / str(megabytes))]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        tokens, kilobytes = map(int, done.stdout.split())
        assert tokens == megabytes * 1_000_000 + 1
        used[megabytes] = kilobytes / 1000
    print(used)
    assert used[100] - used[1] < 1000
