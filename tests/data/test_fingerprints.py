"""A corpus's text is read for its fingerprint once, and again when a file changes, in this process or a later one."""

import json
import os
import shutil
import time
from dataclasses import dataclass

import pytest

from llm_jax.data import corpus as room
from llm_jax.data.corpora import Jsonl, Mixture, Source, TextFiles
from llm_jax.data.tokenized import tokenize
from llm_jax.data.tokenizers import Bytes, SentencePiece


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"{name} one two three\n" * 50)
    return TextFiles(path=str(tmp_path / "texts"))


@pytest.fixture
def read(monkeypatch):
    """Names of the documents that are read from now on."""
    told = []
    original = TextFiles.read

    def spied(self, piece):
        told.append(piece.name)
        yield from original(self, piece)

    monkeypatch.setattr(TextFiles, "read", spied)
    return told


def later(monkeypatch):
    """As if files had been changed long ago."""
    monkeypatch.setattr(room, "SETTLED", -1.0)


def another_process():
    room._remembered.cache_clear()


def test_a_second_process_reads_only_what_files_are_called(texts, read, tmp_path, monkeypatch):
    later(monkeypatch)
    found = texts.fingerprint(tmp_path / "cache")
    assert read == ["a.txt", "b.txt"]
    another_process()
    assert texts.fingerprint(tmp_path / "cache") == found and read == ["a.txt", "b.txt"]
    another_process()
    assert texts.fingerprint() == found and len(read) == 4
    assert texts.fingerprint() == found and len(read) == 4


@pytest.mark.parametrize("make", [lambda c: c, lambda c: Mixture(sources=(Source("a", c),))], ids=["alone", "mixture"])
def test_all_that_is_cached_is_found_without_reading(make, texts, read, tmp_path, monkeypatch):
    later(monkeypatch)
    corpus = make(texts)
    for tokenizer in (Bytes(), SentencePiece(vocabulary=270)):
        tokenize(corpus, tokenizer.fit(corpus, tmp_path), "train", tmp_path)
        another_process()
        read.clear()
        tokenize(corpus, tokenizer.fit(corpus, tmp_path), "train", tmp_path)
        assert read == []


def test_files_that_were_changed_just_now_are_read_again(texts, read, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "SETTLED", 1e9)
    found = {texts.fingerprint(tmp_path / "cache") for _ in range(2)}
    assert len(found) == 1 and len(read) == 4 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("settled", [1e9, -1.0], ids=["just-written", "long-ago"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_change_is_noticed(cached, settled, texts, tmp_path, monkeypatch):
    monkeypatch.setattr(room, "SETTLED", settled)
    cache, file = (tmp_path / "cache" if cached else None), tmp_path / "texts" / "a.txt"
    found = [texts.fingerprint(cache)]
    before = file.stat()
    time.sleep(0.02 if settled < 0 else 0)  # the clock of files ticks every 4 to 10 ms
    file.write_text(file.read_text().replace("two", "TWO"))
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # of the same size and time
    assert file.stat().st_size == before.st_size and file.stat().st_mtime_ns == before.st_mtime_ns
    found.append(texts.fingerprint(cache))
    file.unlink()
    found.append(texts.fingerprint(cache))
    assert len(set(found)) == 3
    file.write_text((tmp_path / "texts" / "b.txt").read_text())
    shutil.copytree(tmp_path / "texts", tmp_path / "copy")
    assert TextFiles(path=str(tmp_path / "copy")).fingerprint(cache) == texts.fingerprint(cache) not in found


def test_tokens_are_of_the_files_as_they_are(texts, tmp_path):
    first = tokenize(texts, Bytes().fit(None, ""), "train", tmp_path / "cache").ids[:]
    (tmp_path / "texts" / "a.txt").write_text("a ONE TWO THREE\n" * 50)
    second = tokenize(texts, Bytes().fit(None, ""), "train", tmp_path / "cache").ids[:]
    assert bytes(first.astype("u1")) == bytes(second.astype("u1")).replace(b"ONE TWO THREE", b"one two three")
    assert (first != second).any()


@dataclass(frozen=True)
class Own(TextFiles):
    """How it reads may change from process to process."""

    abstract = True


def test_what_may_read_otherwise_next_time_is_not_noted(texts, tmp_path, monkeypatch):
    later(monkeypatch)
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a"}) + "\n{\n")
    for corpus in (Own(path=texts.path), Jsonl(path=str(tmp_path / "a.jsonl"), bad="skip")):
        corpus.fingerprint(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    texts.fingerprint(tmp_path / "cache")
    (note,) = (tmp_path / "cache" / "contents").iterdir()
    whole = note.read_text()
    note.write_text(whole[:7])
    assert texts.fingerprint(tmp_path / "cache") == whole == note.read_text()
    room._code.cache_clear()
    monkeypatch.setattr(room, "__file__", str(tmp_path / "other" / "corpus.py"))
    texts.fingerprint(tmp_path / "cache")
    room._code.cache_clear()
    assert len(list((tmp_path / "cache" / "contents").iterdir())) == 2
