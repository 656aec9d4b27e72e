"""A token store is made once, whoever else makes it; one that is not whole is made anew, and little of it is in memory."""

import threading
import tracemalloc
from dataclasses import dataclass

import numpy as np
import pytest

from llm_jax.data import tokenized
from llm_jax.data.corpora import Corpus
from llm_jax.data.tokenized import tokenize
from llm_jax.data.tokenizers import Bytes

FITTED = Bytes().fit(None, "")


@dataclass(frozen=True)
class Made(Corpus):
    """Documents of `size` letters each."""

    abstract = True
    count: int = 50
    size: int = 300

    def named(self):
        for number in range(self.count):
            yield str(number), chr(97 + number % 26) * self.size

    def part(self, name, text, split):
        return text


def check(tokens, corpus):
    expected = [[*text.encode(), 256] for text in corpus.documents("train")]
    assert tokens.ids[:].tolist() == [i for ids in expected for i in ids]
    assert tokens.starts.tolist() == np.cumsum([0, *map(len, expected)])[:-1].tolist()
    assert tokens.starts.dtype == np.int64


def test_a_write_that_was_interrupted_leaves_nothing(tmp_path, monkeypatch):
    write, told = tokenized.write_starts_header, []

    def fails_the_second_time(file, documents):
        if told:
            raise OSError("no space left on device")
        told.append(documents)
        write(file, documents)

    monkeypatch.setattr(tokenized, "write_starts_header", fails_the_second_time)
    with pytest.raises(OSError, match="no space"):
        tokenize(Made(), FITTED, "train", tmp_path)
    assert list((tmp_path / "tokens").iterdir()) == []
    monkeypatch.undo()
    check(tokenize(Made(), FITTED, "train", tmp_path), Made())


@pytest.mark.parametrize("name", ["ids.bin", "starts.npy", "meta.json"])
@pytest.mark.parametrize("left", [0, 60, None], ids=["empty", "cut", "gone"])
def test_a_store_that_is_not_whole_is_made_anew(name, left, tmp_path):
    tokenize(Made(), FITTED, "train", tmp_path)
    (file,) = (tmp_path / "tokens").glob(f"*/{name}")
    if left is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: min(left, file.stat().st_size - 1)])
    check(tokenize(Made(), FITTED, "train", tmp_path), Made())


def test_a_whole_store_is_not_made_again(tmp_path, monkeypatch):
    for corpus in (Made(), Made(count=0)):
        monkeypatch.setattr(Made, "documents", lambda self, split: (text for _, text in self.named()))
        tokenize(corpus, FITTED, "train", tmp_path)
        monkeypatch.setattr(Made, "documents", None)
        assert len(tokenize(corpus, FITTED, "train", tmp_path).starts) == corpus.count


def test_two_under_one_process_id_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenized, "cores", lambda: 1)
    half, go, found = threading.Event(), threading.Event(), []

    @dataclass(frozen=True)
    class Slow(Made):
        abstract = True
        size: int = 50_000

        def documents(self, split):
            for number, text in enumerate(super().documents(split)):
                if number == 30 and threading.current_thread() is slow:
                    half.set()
                    go.wait(10)
                yield text

    Slow().fingerprint()
    slow = threading.Thread(target=lambda: found.append(tokenize(Slow(), FITTED, "train", tmp_path)))
    slow.start()
    assert half.wait(10)
    check(tokenize(Slow(), FITTED, "train", tmp_path), Slow())
    go.set()
    slow.join()
    check(found[0], Slow())
    assert len(list((tmp_path / "tokens").iterdir())) == 1


def test_documents_are_not_counted_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenized, "cores", lambda: 1)
    monkeypatch.setattr("llm_jax.data.encoding.BATCH", 1 << 10)
    corpus = Made(count=3000, size=1)
    corpus.fingerprint()
    tracemalloc.start()
    tokens = tokenize(corpus, FITTED, "train", tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(tokens.starts) == 3000 and peak < 100_000  # 40 bytes a document are 120,000
