"""Token files are what tokenizing in memory gives, whoever writes them and however often it is killed; damage is named."""

import json
import pathlib
import shutil
from dataclasses import dataclass

import numpy as np
import pytest

from llm_jax.core import whole
from llm_jax.core.config import ConfigError
from llm_jax.data import pipeline, prepared, tokenized, workers
from llm_jax.data.corpora import Jsonl, Prepared, TextFiles
from llm_jax.data.packing import ConcatThenSplit
from llm_jax.data.pipeline import Data
from llm_jax.data.prepare import prepare
from llm_jax.data.tasks import Recall
from llm_jax.data.tokenizer_json import ByteLevelBPE
from llm_jax.data.tokenizers import Bytes, Characters, SentencePiece, Tokenizer, nameless

SPLITS = ("train", "valid", "test")


def contents(folder):
    """Name → bytes of all that counts in a folder."""
    files = [file for file in pathlib.Path(folder).rglob("*") if file.is_file() and file.name not in (".lock", "plan.json")]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines")
    rng = np.random.default_rng(0)
    words = ["alpha", "beta", "gamma", "naïve", "日本語", "def f(x):", "\treturn x", "0.5"]
    for name in ("a", "b"):
        lines = [json.dumps({"text": " ".join(rng.choice(words, rng.integers(1, 60)))}) for _ in range(400)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return Jsonl(path=str(folder), valid_fraction=0.1)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def made(corpus, cache, tmp_path_factory):
    """Token files of bytes in several shards."""
    folder = tmp_path_factory.mktemp("made") / "tokens"
    prepare(corpus, Bytes(), folder, cache=cache, shard_bytes=30_000)
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return pathlib.Path(shutil.copytree(made, tmp_path / "tokens"))


@pytest.mark.parametrize("tokenizer", [Bytes(), SentencePiece(vocabulary=320)], ids=["bytes", "trained"])
def test_the_tokens_are_those_of_tokenizing_in_memory(tokenizer, corpus, cache, tmp_path):
    manifest = prepare(corpus, tokenizer, tmp_path / "tokens", cache=cache, shard_bytes=30_000)
    fitted = tokenizer.fit(corpus, cache)
    assert len([name for name in manifest["files"] if name.endswith("train.ids")]) > 4
    for split in SPLITS:
        expected = tokenized.tokenize(corpus, fitted, split, cache)
        found = tokenized.tokenize(Prepared(path=str(tmp_path / "tokens")), fitted, split, cache)
        np.testing.assert_array_equal(found.ids[:], expected.ids[:])
        np.testing.assert_array_equal(found.starts, expected.starts)
        assert found.end == expected.end and found.ids.dtype == np.uint16
        count, text = manifest["splits"][split], list(corpus.documents(split))
        assert count == {"documents": len(text), "tokens": len(expected), "bytes": sum(len(t.encode()) for t in text)}


def test_batches_are_those_of_tokenizing_in_memory(corpus, cache, made):
    fitted = Bytes().fit(corpus, cache)
    given = {"batch": 4, "byte_lengths": fitted.byte_lengths, "limit_bytes": 3000}
    found = []
    for one in (corpus, Prepared(path=str(made))):
        data = Data(corpus=one, sequence_length=100, batch_size=4)
        rows = {split: pipeline.rows_of(data, fitted, split, cache) for split in ("train", "valid")}
        feed = pipeline.feed(pipeline.dispatches(data, rows["train"], seeds=[1, 2], steps_per_item=5, steps=100))
        found.append([*(next(feed) for _ in range(3)), pipeline.evaluation_batches(rows["valid"], **given)])
    for expected, got in zip(*found, strict=True):
        for name in ("tokens", "targets", "weights", "segments", "positions"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))


def test_it_does_not_depend_on_the_number_of_workers(corpus, cache, made, tmp_path):
    told = []

    def tell(progress):
        told.append((progress.shards, progress.bytes, progress.documents))

    prepare(corpus, Bytes(), tmp_path / "two", cache=cache, shard_bytes=30_000, workers=2, tell=tell)
    assert contents(tmp_path / "two") == contents(made)
    assert told == sorted(told) and told[-1][0] > 4 and told[-1][1] == sum(p.size for p in corpus.pieces(30_000))


@pytest.mark.parametrize("number", [0, 2])
def test_what_was_interrupted_goes_on_to_the_same_bytes(number, corpus, cache, made, tmp_path, monkeypatch):
    write = workers.shards.write

    def interrupted(work, shard, pieces):
        if shard == number:
            work.tally = lambda documents, tokens: (_ for _ in ()).throw(KeyboardInterrupt)
        write(work, shard, pieces)

    monkeypatch.setattr(workers.shards, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(corpus, Bytes(), tmp_path / "t", cache=cache, shard_bytes=30_000)
    assert sorted(file.name for file in (tmp_path / "t").glob("*shard*")) == [f"shard-{n:05d}" for n in range(number)]
    with pytest.raises(ConfigError, match=r"t' is not finished: run the same"):
        Prepared(path=str(tmp_path / "t")).fingerprint()
    done = []
    monkeypatch.setattr(workers.shards, "write", lambda work, shard, pieces: (done.append(shard), write(work, shard, pieces)))
    prepare(corpus, Bytes(), tmp_path / "t", cache=cache, shard_bytes=30_000)
    assert done[0] == number and contents(tmp_path / "t") == contents(made)


@pytest.mark.parametrize("name", ["plan.json", "tokenizer.model", "manifest.json", "train.starts.npy", "shard-00000"])
def test_what_was_killed_while_it_was_written_is_ours(name, corpus, cache, tmp_path):
    (tmp_path / "t").mkdir()
    whole._beside(tmp_path / "t" / name).touch()
    prepare(corpus, Bytes(), tmp_path / "t", cache=cache)
    assert [path.name for path in (tmp_path / "t").rglob(".*")] == [".lock"]


def damage(file, how):
    content = bytearray(file.read_bytes())
    if how == "truncated":
        file.write_bytes(content[:-2])
    elif how == "corrupted":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()


@pytest.mark.parametrize(
    "how, sentence",
    [("truncated", r"has [\d,]+ bytes and should have"), ("corrupted", "is corrupted: its SHA-256 is"), ("missing", "is missing")],
)
@pytest.mark.parametrize("name", ["shard-00001/train.ids", "shard-00002/train.starts"])
def test_a_damaged_shard_is_named_and_made_anew(name, how, sentence, corpus, cache, made, copy):
    damage(copy / name, how)
    with pytest.raises(ConfigError, match=f"{name} {sentence}.*: run the same `python -m llm_jax prepare` again"):
        Prepared(path=str(copy)).store("bytes", "train", str(cache))
    Prepared(path=str(copy)).store("bytes", "valid", str(cache))
    notes = []
    prepare(corpus, Bytes(), copy, cache=cache, shard_bytes=30_000, note=notes.append)
    assert len(notes) == 1 and name in notes[0] and "the shard is made anew" in notes[0]
    assert contents(copy) == contents(made)


def test_checksums_are_compared_once_and_again_when_a_file_changes(copy, tmp_path, monkeypatch):
    hashed = []
    described = prepared.described
    monkeypatch.setattr(prepared, "described", lambda file: (hashed.append(file), described(file))[1])
    for _ in range(2):
        Prepared(path=str(copy)).store("bytes", "train", str(tmp_path))
    count = len([name for name in json.loads((copy / "manifest.json").read_text())["files"] if "train" in name])
    assert len(hashed) == count
    damage(copy / "shard-00001/train.ids", "corrupted")
    with pytest.raises(ConfigError, match="is corrupted"):
        Prepared(path=str(copy)).store("bytes", "train", str(tmp_path))
    assert len(hashed) == 2 * count
    Prepared(path=str(copy), verify=False).store("bytes", "train", str(tmp_path))


def test_another_tokenizer_is_refused(corpus, cache, made, tmp_path):
    other = SentencePiece(vocabulary=320)
    with pytest.raises(ConfigError, match=r"tokenizer is not the one that .* was made with .*: set tokenizer=Bytes\(\)"):
        tokenized.tokenize(Prepared(path=str(made)), other.fit(corpus, cache), "train", cache)
    with pytest.raises(ConfigError, match=r"corpus has tokens and no text, .*: set tokenizer=Bytes\(\)"):
        other.fit(Prepared(path=str(made)), tmp_path)
    with pytest.raises(ConfigError, match="corpus has no split '4x': it has train, valid, test"):
        Prepared(path=str(made)).store("bytes", "4x", str(cache))
    prepare(corpus, other, tmp_path / "own", cache=cache)
    way_out = prepared.written(tmp_path / "own")
    assert way_out == f"SentencePiece(path={str(tmp_path / 'own' / 'tokenizer.model')!r})"
    again = SentencePiece(path=str(tmp_path / "own" / "tokenizer.model")).fit(Prepared(path=str(tmp_path / "own")), tmp_path)
    assert len(tokenized.tokenize(Prepared(path=str(tmp_path / "own")), again, "train", cache)) > 1000


def test_a_folder_is_for_one_corpus_and_tokenizer(corpus, cache, copy, tmp_path):
    for other, tokenizer, size in [
        (corpus, SentencePiece(vocabulary=300), 30_000),
        (Jsonl(path=corpus.path), Bytes(), 30_000),
        (corpus, Bytes(), 99_999),
    ]:
        with pytest.raises(ConfigError, match="tokens' was begun for something else"):
            prepare(other, tokenizer, copy, cache=cache, shard_bytes=size)
    with pytest.raises(ConfigError, match=r"something else \(shard_bytes was 30000 and is 7000\): name another"):
        prepare(corpus, Bytes(), copy, cache=cache, shard_bytes=7000)
    own = pathlib.Path(shutil.copytree(corpus.path, tmp_path / "texts"))
    prepare(Jsonl(path=str(own)), Bytes(), tmp_path / "t", cache=cache)
    (own / "a.jsonl").write_text(json.dumps({"text": "changed"}))
    with pytest.raises(ConfigError, match="files of the corpus was"):
        prepare(Jsonl(path=str(own)), Bytes(), tmp_path / "t", cache=cache)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").touch()
    with pytest.raises(ConfigError, match=r"notes' has other files in it \(mine.txt\)"):
        prepare(corpus, Bytes(), tmp_path / "notes", cache=cache)


def test_a_tokenizer_file_that_was_exchanged_is_noticed(corpus, cache, tmp_path):
    file = tmp_path / "own.model"
    file.write_bytes(SentencePiece(vocabulary=300).fit(corpus, cache).model)
    prepare(corpus, SentencePiece(path=str(file)), tmp_path / "t", cache=cache)
    file.write_bytes(SentencePiece(vocabulary=310).fit(corpus, cache).model)
    with pytest.raises(ConfigError, match=r"tokenizer is not the one that .*shard-00000 was made with"):
        prepare(corpus, SentencePiece(path=str(file)), tmp_path / "t", cache=cache)


def test_bad_lines_are_fatal_until_they_are_skipped(cache, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 50 + "{\n" + '{"text": "b"}\n' * 50)
    file = str(tmp_path / "a.jsonl")
    with pytest.raises(ConfigError, match=r"a.jsonl, line 51, is not JSON"):
        prepare(Jsonl(path=file), Bytes(), tmp_path / "t", cache=cache, shard_bytes=200)
    manifest = prepare(Jsonl(path=file, bad="skip"), Bytes(), tmp_path / "t", cache=cache, shard_bytes=200)
    assert (manifest["read"], manifest["skipped"]) == (101, 1) and "line 51, is not JSON" in manifest["first_skipped"]
    assert sum(count["documents"] for count in manifest["splits"].values()) == 100
    with pytest.raises(ConfigError, match="line 51"):
        prepare(Jsonl(path=file), Bytes(), tmp_path / "t", cache=cache, shard_bytes=200)


def test_what_cannot_be_prepared_is_a_sentence(corpus, cache, tmp_path, made):
    (tmp_path / "empty.txt").touch()
    for one, tokenizer, sentence in [
        (TextFiles(path=str(tmp_path / "empty.txt")), Bytes(), "is an empty corpus"),
        (Recall(), Bytes(), "corpus is Recall, which has no text to prepare"),
        (Prepared(path=str(made)), Bytes(), "corpus is Prepared, which has no text to prepare"),
        (corpus, Characters(), r"tokenizer is Characters\(\), which every corpus makes anew from its text: take Bytes"),
        (corpus, ByteLevelBPE(290), r"makes anew from its text: train it once with `python -m llm_jax tokenize train"),
    ]:
        with pytest.raises(ConfigError, match=sentence):
            prepare(one, tokenizer, tmp_path / "t" / type(one).__name__, cache=cache)
    prepare(corpus, Bytes(), tmp_path / "t" / "Jsonl", cache=cache)  # a refused tokenizer leaves nothing behind
    for call in (lambda path: Prepared(path=path), lambda path: prepare(corpus, Bytes(), path, cache=cache)):
        with pytest.raises(ConfigError, match=r"must be a folder on this machine, got 'gs://bucket/tokens': name a local"):
            call("gs://bucket/tokens")
    for path, sentence in [("nowhere", "'nowhere' is no folder of token files"), (str(tmp_path), "is no folder of token files")]:
        with pytest.raises(ConfigError, match=sentence):
            Prepared(path=path).fingerprint()


def test_tails_are_held_out_in_files_too(cache, tmp_path):
    (tmp_path / "a.txt").write_text("x" * 80 + "y" * 10 + "z" * 10)
    corpus = TextFiles(path=str(tmp_path / "a.txt"), test_fraction=0.1)
    prepare(corpus, Bytes(), tmp_path / "t", cache=cache)
    found = {split: tokenized.tokenize(Prepared(path=str(tmp_path / "t")), Bytes().fit(None, ""), split, cache) for split in SPLITS}
    assert {split: bytes(tokens.ids[:-1].astype(np.uint8)) for split, tokens in found.items()} == {
        split: next(corpus.documents(split)).encode() for split in SPLITS
    }


@dataclass(frozen=True)
class Wide(Tokenizer):
    """Code points, of which there are more than 16 bits hold."""

    abstract = True

    def fit(self, corpus, cache):
        fitted = nameless(0x110000)
        fitted.encode = lambda text: np.frombuffer(text.encode("utf-32-le"), np.uint32).astype(np.int32)
        return fitted


def test_large_vocabularies_take_32_bits_and_empty_splits_are_empty(cache, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "a𝄞\U0010ffff"}))
    corpus = Jsonl(path=str(tmp_path), valid_fraction=0.0, test_fraction=0.0)
    assert prepare(corpus, Wide(), tmp_path / "t", cache=cache)["dtype"] == "uint32"
    tokens = Prepared(path=str(tmp_path / "t")).store("nameless", "train", str(cache))
    assert tokens.ids[:].tolist() == [ord("a"), 0x1D11E, 0x10FFFF] and tokens.ids.dtype == np.uint32
    empty = Prepared(path=str(tmp_path / "t")).store("nameless", "valid", str(cache))
    assert len(empty) == 0 and len(empty.starts) == 0 and len(ConcatThenSplit().rows(empty, 4, cache)) == 0
