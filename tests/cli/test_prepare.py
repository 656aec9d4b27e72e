"""`prepare` as it is typed: killed and run again, verified, and trained from to the losses of tokenizing in memory."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from llm_jax.core.config import ConfigError
from llm_jax.data.corpora import TextFiles
from llm_jax.data.tokenizers import SentencePiece
from llm_jax.lab.trained import load as trained_model
from tests.cli.outcome import outcome
from tests.data.test_prepare import contents, damage
from tests.lab.test_runner import declared, outcomes  # noqa: F401


@pytest.fixture
def typed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {i} of a few"}) + "\n" for i in range(300)) + "{\n")
    return lambda *flags: outcome("prepare", flags, monkeypatch, capsys)


def test_what_is_shown_and_what_to_do_next(typed, tmp_path):
    corpus, out = f"--corpus=Jsonl(path='{tmp_path}/a.jsonl', bad='skip')", f"--out={tmp_path / 'tokens'}"
    code, shown, told = typed(corpus, "--tokenizer=SentencePiece(vocabulary=280)", out, "--shard_megabytes=0.002", "--workers=1")
    assert code == 0 and "documents" in shown and "train" in shown
    assert "skipped 1 of 301 documents" in told and "line 301, is not JSON" in told and "5/5 shards (100% of the corpus)" in told
    way = f"--set=data.corpus=\"Prepared(path='{tmp_path}/tokens')\" --set=tokenizer=\"SentencePiece(path='{tmp_path}/tokens/"
    assert way in shown
    assert typed(out, "--verify")[:2] == (0, "34 of 34 files are what they were when they were written")
    damage(tmp_path / "tokens/shard-00002/train.ids", "corrupted")
    code, shown, told = typed(out, "--verify")
    assert code == 1 and "tokens/shard-00002/train.ids is corrupted" in told and "33 of 34" in shown


@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([], "--out is missing: name the folder"),
        (["--out={tmp}/t"], "--corpus is missing: name a corpus"),
        (["--out={tmp}/t", "--corpus=Jsnl(path='x')"], "--corpus has no choice 'Jsnl': did you mean Jsonl"),
        (["--out={tmp}/t", "--corpus=Jsonl(path='{tmp}/none')"], "data.corpus.path finds no file at"),
        (["--out={tmp}/t", "--corpus=Jsonl(path='{tmp}/a.jsonl')"], "a.jsonl, line 301, is not JSON"),
        (["--out={tmp}/t", "--corpus=StandardLibrary()", "--tokenizer=SentencePiece(path='x')"], "tokenizer.path is no file: 'x'"),
        (["--out={tmp}/t", "--verify"], "t' is no folder of token files"),
    ],
)
def test_a_mistake_is_one_sentence(flags, sentence, typed, tmp_path):
    code, _, told = typed("--workers=1", *(flag.replace("{tmp}", str(tmp_path)) for flag in flags))
    assert code == 2 and sentence in told and "\n" not in told, told


@pytest.mark.slow
def test_killed_it_leaves_no_worker_and_goes_on_to_the_same_bytes(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"number {i} of many " * 9}) + "\n" for i in range(20_000)))
    environ = dict(os.environ) | {"LLM_JAX_CACHE": str(tmp_path / "cache"), "JAX_PLATFORMS": "cpu"}

    def command(out):
        flags = [f"--corpus=Jsonl(path='{tmp_path}/a.jsonl')", f"--out={tmp_path / out}", "--shard_megabytes=0.1", "--workers=2"]
        return [sys.executable, "-m", "llm_jax", "prepare", *flags]

    process = subprocess.Popen(command("killed"), env=environ, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while not list((tmp_path / "killed").glob("shard-*")) and process.poll() is None:
        time.sleep(0.01)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = len(list((tmp_path / "killed").glob("shard-*")))
    assert 0 < done < 40 and not (tmp_path / "killed" / "manifest.json").exists()
    assert len(children) >= 2
    for _ in range(100):
        alive = [child for child in children if pathlib.Path(f"/proc/{child}/stat").exists() and _state(child) != "Z"]
        if not alive:
            break
        time.sleep(0.1)
    assert not alive
    for out in ("killed", "whole"):
        again = subprocess.run(command(out), env=environ, capture_output=True, text=True, timeout=120)
        assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def _state(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "Z"


@pytest.mark.slow
def test_training_from_token_files_is_training_from_text(declared, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path / "cache"))
    text, tokens = declared.parent / "text.txt", tmp_path / "tokens"
    trained, own = "SentencePiece(vocabulary=300)", f"SentencePiece(path='{tokens}/tokenizer.model')"
    flags = [f"--corpus=TextFiles(path='{text}')", f"--out={tokens}", f"--tokenizer={trained}"]
    assert outcome("prepare", flags, monkeypatch, capsys)[0] == 0

    def results(name, *more):
        short = [f"--experiment={declared}", f"--workdir={tmp_path / name}", "--arms=rope", "--seeds=1", "--set=train.steps=24"]
        code, _, told = outcome("run", [*short, *more], monkeypatch, capsys)
        return sorted(outcomes(tmp_path / name).values(), key=str) if code == 0 else told

    corpus = f"--set=data.corpus=Prepared(path='{tokens}')"
    expected = results("text", f"--set=tokenizer={trained}")
    assert len(expected) == 3 and results("files", corpus, f"--set=tokenizer={own}") == expected
    assert "error: tokenizer is not the one that" in results("other", corpus)
    (tokens / "tokenizer.model").write_bytes(SentencePiece(vocabulary=310).fit(TextFiles(path=str(text)), tmp_path).model)
    with pytest.raises(ConfigError, match=r"tokenizer is not the one that rope-final-.* was trained with"):
        trained_model(tmp_path / "files")


MEMORY = """
import sys
from llm_jax.data.corpora import Jsonl
from llm_jax.data.prepare import prepare
from llm_jax.data.tokenizers import Bytes
prepare(Jsonl(path=sys.argv[1]), Bytes(), sys.argv[2], cache=sys.argv[2] + "-cache", shard_bytes=1_000_000)
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def peak(source, out):
    """MB that preparing a file takes."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(source), str(out)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1]) / 1000


@pytest.mark.slow
def test_memory_stays_flat_and_one_line_may_be_100_megabytes(tmp_path):
    line = json.dumps({"text": "the same words again and again, " * 30}) + "\n"
    used = {}
    for megabytes in (1, 100):
        (tmp_path / f"{megabytes}.jsonl").write_text(line * (megabytes * 1_000_000 // len(line)))
        used[megabytes] = peak(tmp_path / f"{megabytes}.jsonl", tmp_path / f"{megabytes}")
    print(used)
    assert used[100] < used[1] + 8
    (tmp_path / "long.jsonl").write_text(json.dumps({"text": "the same words again and again, " * 3_125_000}) + "\n" + line * 99)
    used["long"] = peak(tmp_path / "long.jsonl", tmp_path / "long")
    print(used)
    assert used["long"] < used[1] + 1000
    totals = json.loads((tmp_path / "long" / "manifest.json").read_text())["splits"]
    assert sum(count["bytes"] for count in totals.values()) == 100_000_000 + 99 * 960
