"""A place that cannot be written: one sentence that names it as it was typed, before anything is computed for it."""

import errno
import json
import os
import subprocess
import sys

import pytest

from llm_jax.cli import terminal
from llm_jax.core import whole
from tests.cli.outcome import outcome

TOKENIZER = "--tokenizer=SentencePiece(vocabulary=300)"


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    lines = "".join(json.dumps({"text": f"number {i} of a few " * 9}) + "\n" for i in range(3000))
    (tmp_path / "a.jsonl").write_text(lines)
    return f"--corpus=Jsonl(path='{tmp_path}/a.jsonl')"


@pytest.fixture
def sealed(tmp_path, monkeypatch):
    """A folder of a file system that is only read, as far as anything beside its place is opened or made there."""
    place = tmp_path / "sealed"
    place.mkdir()

    def refuse(event, given):
        if active and event in ("open", "os.mkdir") and isinstance(given[0], (str, os.PathLike)):
            writes = event == "os.mkdir" or given[2] & (os.O_WRONLY | os.O_RDWR)
            if writes and os.fspath(given[0]).startswith(str(place) + "/"):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(given[0]))

    active = [True]
    sys.addaudithook(refuse)
    yield place
    active.clear()


def test_a_read_only_file_system_is_one_sentence(corpus, sealed, monkeypatch, capsys):
    code, _, told = outcome("prepare", [corpus, f"--out={sealed}/t/u", "--workers=1"], monkeypatch, capsys)
    assert (code, told) == (2, f"error: {sealed}/t/u: Read-only file system: name another place")
    monkeypatch.setenv("LLM_JAX_CACHE", str(sealed / "cache"))
    code, _, told = outcome("tokenize", ["encode", "--text=a", TOKENIZER, corpus], monkeypatch, capsys)
    way = "set LLM_JAX_CACHE to a folder that can be written"
    assert (code, told) == (2, f"error: {sealed}/cache: Read-only file system: {way}")


def test_what_is_computed_for_a_place_begins_when_that_can_be_written(corpus, sealed, monkeypatch, capsys):
    monkeypatch.setattr("llm_jax.cli.tokenize._fitted", lambda tokenizer: pytest.fail("was trained"))
    monkeypatch.setattr("llm_jax.core.platform.setup", lambda: pytest.fail("was scored"))
    for output in (sealed, sealed / "new" / "er", sealed / "a.model"):
        code, _, told = outcome("tokenize", ["train", TOKENIZER, f"--output={output}", corpus], monkeypatch, capsys)
        assert (code, told) == (2, f"error: --output={output} cannot be written: Read-only file system: name another place")
    (sealed.parent / "mine").mkdir()
    (sealed.parent / "mine" / "tokenizer.json").touch()
    code, _, told = outcome("tokenize", ["train", TOKENIZER, f"--output={sealed.parent}/mine"], monkeypatch, capsys)
    assert code == 2 and "tokenizer.json is there already" in told
    out = f"--out={sealed}/scores.json"
    code, _, told = outcome("evaluate", ["--model=m", "--task=q.jsonl", out], monkeypatch, capsys)
    assert (code, told) == (2, f"error: {out} cannot be written: Read-only file system: name another place")


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_one_sentence(workers, corpus, tmp_path):
    """A limit of the size of files is a disk that takes no more, to workers as well."""
    flags = [corpus, f"--out={tmp_path}/t", f"--workers={workers}", "--shard_megabytes=0.3"]
    limited = ["sh", "-c", 'ulimit -f 200; exec "$@"', "sh", sys.executable, "-m", "llm_jax", "prepare"]
    done = subprocess.run([*limited, *flags], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1] == f"error: {tmp_path}/t: File too large: make room, or name another place"
    assert "Traceback" not in done.stderr
    again = subprocess.run([*limited[4:], *flags], capture_output=True, text=True)  # with room enough
    assert again.returncode == 0 and not list((tmp_path / "t").glob(".shard*")), again.stderr  # of a worker that was stopped


def test_an_error_names_the_file_and_not_what_is_written_beside_it(tmp_path):
    for number, name in ((errno.ENOSPC, None), (errno.EROFS, "own")):
        with pytest.raises(OSError, match=os.strerror(number)) as found, whole.whole_file(tmp_path / "a") as partial:
            raise OSError(number, os.strerror(number), str(partial) if name else None)
        assert found.value.filename == str(tmp_path / "a")
        with pytest.raises(OSError, match=os.strerror(number)) as found, whole.whole_folder(tmp_path / "b", bool) as partial:
            raise OSError(number, os.strerror(number), str(partial / "c") if name else None)
        assert found.value.filename == str(tmp_path / "b" / "c" if name else tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_what_is_about_no_place_is_no_sentence():
    assert terminal.refusal(OSError("damaged")) is None
    assert terminal.refusal(ConnectionResetError(errno.ECONNRESET, "reset")) is None
    told = terminal.refusal(OSError(errno.ENOSPC, "No space left on device"))
    assert told == "No space left on device: make room, or name another place"
    told = terminal.refusal(OSError(errno.EISDIR, "Is a directory", "a/b"), ["--file=a/b"])
    assert told == "a/b: Is a directory: name another place"
