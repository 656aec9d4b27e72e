"""Every format gives the same documents, whole or in pieces; damage and bad records are named, never read past."""

import bz2
import gzip
import json
import logging
import pathlib
import sys

import datasets
import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from llm_jax.core.config import ConfigError
from llm_jax.core.written import parse
from llm_jax.data.corpora import (
    ArrayRecord,
    Corpus,
    HuggingFace,
    Jsonl,
    Mixture,
    Parquet,
    Recall,
    Source,
    StandardLibrary,
    TextFiles,
)
from llm_jax.data.tokenizers import Bytes, SentencePiece

TEXTS = [f"document {i}: naïve 日本語\n\t\0 “x” " + "na " * (i % 17) for i in range(700)]
LINES = "".join(json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(TEXTS)).encode()


def zstd(content):
    return pyarrow.compress(content, "zstd", asbytes=True)


def parquet(path):
    table = pyarrow.table({"id": list(range(len(TEXTS))), "text": TEXTS})
    pyarrow.parquet.write_table(table, path, row_group_size=90)


def array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:8")
    for record in records:
        writer.write(record)
    writer.close()


def saved(path):
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": TEXTS, "n": [0] * len(TEXTS)})}).save_to_disk(str(path))


MADE = {
    "jsonl": (lambda path: path.write_bytes(LINES), "a.jsonl", Jsonl),
    "jsonl.gz": (lambda path: path.write_bytes(gzip.compress(LINES)), "a.jsonl.gz", Jsonl),
    "jsonl.bz2": (lambda path: path.write_bytes(bz2.compress(LINES)), "a.jsonl.bz2", Jsonl),
    "jsonl.zst": (lambda path: path.write_bytes(zstd(LINES)), "a.jsonl.zst", Jsonl),
    "jsonl.zst of two frames": (lambda path: path.write_bytes(zstd(LINES[:999]) + zstd(LINES[999:])), "a.jsonl.zst", Jsonl),
    "parquet": (parquet, "a.parquet", Parquet),
    "array_record": (lambda path: array_record(path, [text.encode() for text in TEXTS]), "a.array_record", ArrayRecord),
    "array_record of json": (
        lambda path: array_record(path, LINES.splitlines()),
        "b.array_record",
        lambda path: ArrayRecord(path=path, field="text"),
    ),
    "hugging face": (saved, "a.dataset", HuggingFace),
}


@pytest.mark.parametrize("make, name, kind", MADE.values(), ids=MADE)
def test_every_format_gives_the_same_documents_whole_and_in_pieces(make, name, kind, tmp_path):
    make(tmp_path / name)
    corpus = kind(path=str(tmp_path / name))
    found = list(corpus.named())
    assert found == [(f"{name}:{number}", text) for number, text in enumerate(TEXTS, 1)]
    for size in (1, 5000, 20_000, 10**9):
        pieces = corpus.pieces(size)
        assert [item for piece in pieces for item in corpus.read(piece)] == found
    parts = [list(corpus.documents(split)) for split in ("train", "valid", "test")]
    assert sorted(parts[0] + parts[1] + parts[2]) == sorted(TEXTS) and all(parts)
    assert name.startswith("a.jsonl.") or len(corpus.pieces(1)) >= 3


@pytest.mark.parametrize("make, name, kind", [row for row in MADE.values() if row[1] != "a.dataset"])
def test_an_address_gives_what_the_path_gives(make, name, kind, tmp_path):
    make(tmp_path / name)
    remote = fsspec.filesystem("memory")
    remote.pipe(f"/bucket/{tmp_path.name}/deep/{name}", (tmp_path / name).read_bytes())
    found = list(kind(path=str(tmp_path / name)).named())
    for path in (f"deep/{name}", "deep/*"):
        assert list(kind(path=f"memory://bucket/{tmp_path.name}/{path}").named()) == found
    assert list(kind(path=f"memory://bucket/{tmp_path.name}").named()) == [(f"deep/{n}", text) for n, text in found]
    with pytest.raises(ConfigError, match="finds no file at 'memory://bucket/none'"):
        list(kind(path="memory://bucket/none").named())


@pytest.mark.parametrize("size", [1, 7, 64, 300, 5000])
def test_lines_are_cut_where_they_end(size, tmp_path):
    lines = [b'{"text": "a"}', b"", b'{"text": "' + b"b" * 400 + b'"}', b'{"text": "c"}'] * 5
    for end in (b"", b"\n"):
        (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines) + end)
        corpus = Jsonl(path=str(tmp_path / "a.jsonl"))
        pieces = corpus.pieces(size)
        assert sum(piece.size for piece in pieces) == (tmp_path / "a.jsonl").stat().st_size
        assert [item for piece in pieces for item in corpus.read(piece)] == list(corpus.named())


@pytest.mark.parametrize("name", ["jsonl.gz", "jsonl.bz2", "jsonl.zst", "parquet", "array_record"])
def test_a_file_that_is_cut_off_is_named(name, tmp_path):
    make, file, kind = MADE[name]
    make(tmp_path / file)
    content = (tmp_path / file).read_bytes()
    for cut in (len(content) // 2, len(content) - 3):
        (tmp_path / file).write_bytes(content[:cut])
        with pytest.raises(ConfigError, match=rf"{file} (is damaged or cut off|is no Parquet file, or cut off|has no records)"):
            list(kind(path=str(tmp_path / file)).documents("train"))


def test_a_bad_record_is_fatal_or_counted(tmp_path, caplog):
    bad = [b"{", b'{"body": "x"}', b"[1]", b'{"text": 3}', b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"\0\0\0", b"1" * 5000]
    for number, line in enumerate(bad):
        file = tmp_path / f"{number}.jsonl"
        file.write_bytes(b'{"text": "a"}\n' + line + b'\n\n{"text": "c"}\n')
        with pytest.raises(ConfigError, match=rf"{number}.jsonl, line 2, (is not JSON|has no text|has half|is not UTF-8)"):
            list(Jsonl(path=str(file)).named())
    with pytest.raises(ConfigError, match="NUL bytes from byte 0 on"):
        list(Jsonl(path=str(tmp_path / "6.jsonl")).named())
    corpus = Jsonl(path=str(tmp_path), bad="skip", valid_fraction=0.0, test_fraction=0.0)
    with caplog.at_level(logging.WARNING):
        assert [text for _, text in corpus.named()] == ["a", "c"] * len(bad)
        list(corpus.named())
    assert len(caplog.messages) == 1
    assert "skipped 8 of 24 documents, the first because" in caplog.text and "0.jsonl, line 2, is not JSON" in caplog.text


def test_a_null_in_a_table_is_a_bad_record(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "c"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a\.parquet, row 2, has no text under 'text'"):
        list(Parquet(path=str(tmp_path / "a.parquet")).named())
    assert [text for _, text in Parquet(path=str(tmp_path / "a.parquet"), bad="skip").named()] == ["a", "c"]


def test_nul_bytes_are_text(tmp_path):
    (tmp_path / "a.txt").write_text("".join(TEXTS))
    corpus = TextFiles(path=str(tmp_path / "a.txt"))
    for fitted in (Bytes().fit(corpus, tmp_path), SentencePiece(vocabulary=400).fit(corpus, tmp_path)):
        assert fitted.decode(fitted.encode("a\0\0b\0")) == "a\0\0b\0"


def test_files_may_be_compressed_text(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"two"))
    (tmp_path / "c.md").write_text("three")
    assert list(TextFiles(path=str(tmp_path)).named()) == [("a.txt", "one"), ("b.txt.gz", "two")]


def test_what_is_hidden_or_a_folder_is_no_document(tmp_path):
    shown, hidden = ("a.txt", "d/c.txt"), (".a.txt.swp.txt", ".h/e.txt", "d/.f.txt")
    remote = fsspec.filesystem("memory")
    for name in (*shown, *hidden, "g.txt/h.txt"):
        (tmp_path / ".top" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / ".top" / name).write_text(name)
        remote.pipe(f"/bucket/{tmp_path.name}/.top/{name}", name.encode())
    for at in (f"{tmp_path}/.top", f"memory://bucket/{tmp_path.name}/.top"):

        def found(path, at=at):
            return [text for _, text in TextFiles(path=at + path).named()]

        assert found("") == [*shown, "g.txt/h.txt"]
        assert found("/*") == found("/*.txt") == ["a.txt"]
        assert sorted(found("/**/*.txt")) == [*shown, "g.txt/h.txt"]
        assert found("/.a.txt.swp.txt") == found("/.a*.txt") == [".a.txt.swp.txt"]
        with pytest.raises(ConfigError, match="finds no file at"):
            found("/g*")


def test_a_split_that_there_is_not_is_a_sentence(tmp_path):
    for name, (make, file, _) in MADE.items():
        if "." not in name:
            make(tmp_path / file)
    (tmp_path / "a.txt").write_text("text")
    at, three = str(tmp_path), "it has train, valid, test"
    recall = Recall(distances=(4,))
    for corpus, has in [
        (StandardLibrary(megabytes=0.1), three),
        (TextFiles(path=f"{at}/a.txt"), three),
        (TextFiles(path=f"{at}/a.txt", split="file"), three),
        *((kind(path=f"{at}/{file}"), three) for _, file, kind in MADE.values() if (tmp_path / file).exists()),
        (recall, f"{three}, 4-facts"),
        (Mixture((Source("a", recall),)), f"{three}, a, a.4-facts"),
    ]:
        with pytest.raises(ConfigError, match=rf"data\.corpus has no split 'dev': {has}$"):
            list(corpus.documents("dev"))


def test_mistakes_are_sentences(tmp_path, monkeypatch):
    parquet(tmp_path / "a.parquet")
    saved(tmp_path / "a.dataset")
    for name in ("empty.parquet", "empty.jsonl", "empty.array_record", "a.jsonl.zst"):
        (tmp_path / name).touch()
    at = str(tmp_path)
    datasets.Dataset.from_dict({"text": []}).save_to_disk(f"{at}/empty.dataset")
    table = [
        (
            Parquet(path=f"{at}/a.parquet", field="body"),
            r"a.parquet has no column 'body': set data.corpus.field to one of id, text",
        ),
        (Parquet(path=f"{at}/empty.parquet"), "empty.parquet is no Parquet file, or cut off"),
        (Jsonl(path=f"{at}/empty.jsonl"), "is an empty corpus"),
        (ArrayRecord(path=f"{at}/empty.array_record"), "empty.array_record has no records"),
        (HuggingFace(path=f"{at}/a.dataset", rows="test"), "data.corpus.rows is none of .*: it has train"),
        (HuggingFace(path=f"{at}/a.dataset", field="body"), "data.corpus.field is no column of .*: it has text, n"),
        (HuggingFace(path=f"{at}/empty.dataset"), "empty.dataset' cannot be loaded: it has no rows"),
        (HuggingFace(path=f"{at}/nowhere/at/all"), "nowhere/at/all' cannot be loaded"),
        (Jsonl(path="nowhere://x/y.jsonl"), "cannot read 'nowhere://x/y.jsonl': Protocol not known: nowhere"),
    ]
    for corpus, sentence in table:
        with pytest.raises(ConfigError, match=sentence):
            list(corpus.documents("train"))
    for module, corpus, sentence in [
        ("pyarrow.parquet", Parquet(path=f"{at}/a.parquet"), r'needs pyarrow for Parquet: pip install -e "\.\[data\]"'),
        ("pyarrow", Jsonl(path=f"{at}/a.jsonl.zst"), "needs pyarrow for"),
        ("datasets", HuggingFace(path=f"{at}/other"), "needs datasets for"),
        ("array_record.python.array_record_module", ArrayRecord(path=f"{at}/empty.array_record"), "needs array_record for"),
        ("gcsfs", Jsonl(path="gs://bucket/a.jsonl"), r'cannot read .gs://bucket/a.jsonl.: .*gcsfs.* pip install -e "\.\[data\]"'),
        ("s3fs", Parquet(path="s3://bucket/a.parquet"), r'cannot read .s3://.*s3fs.* pip install -e "\.\[data\]"'),
    ]:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ConfigError, match=sentence):
                list(corpus.documents("train"))


def test_a_flag_names_them():
    for text, corpus in {
        "Parquet(path='a', field='b')": Parquet(path="a", field="b"),
        "HuggingFace(path='user/name', subset='en', revision='v1')": HuggingFace(path="user/name", subset="en", revision="v1"),
        "Jsonl(path='gs://b/*.jsonl.zst', bad='skip')": Jsonl(path="gs://b/*.jsonl.zst", bad="skip"),
    }.items():
        assert parse(text, Corpus, "data.corpus") == corpus


def test_the_default_is_one_piece():
    corpus = StandardLibrary(megabytes=0.1)
    (piece,) = corpus.pieces(10)
    assert list(corpus.read(piece)) == list(corpus.named())


def test_a_folder_is_read_by_name(tmp_path):
    for number in (2, 10, 1):
        pathlib.Path(tmp_path, f"{number}.jsonl").write_text(json.dumps({"text": str(number)}))
    assert [text for _, text in Jsonl(path=str(tmp_path)).named()] == ["1", "10", "2"]


def test_what_the_hub_has_is_read_by_the_same_code(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "name").mkdir()
    parquet(tmp_path / "name" / "train.parquet")
    corpus = HuggingFace(path=str(tmp_path / "name"))
    assert [text for _, text in corpus.named()] == TEXTS
    with pytest.raises(ConfigError, match=r"name' cannot be loaded: .*test"):
        list(HuggingFace(path=str(tmp_path / "name"), rows="test").named())


def test_a_connection_that_breaks_is_a_sentence(monkeypatch):
    fsspec.filesystem("memory").pipe("/far/a.jsonl", LINES * 200)
    found = Jsonl(path="memory://far/a.jsonl").named()
    next(found)

    def broken(*_):
        raise ValueError("the server went away")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFile.readinto", broken, raising=False)
    with pytest.raises(ConfigError, match=r"far/a.jsonl cannot be read to its end: the server went away"):
        list(found)
