"""A work folder is found under any way to write its name, and what is damaged in it is named."""

import pytest

from llm_jax.core.config import ConfigError
from llm_jax.core.paths import absolute, to_path
from llm_jax.io.tracker import Tracker
from llm_jax.lab import summary
from llm_jax.lab.workfolder import WorkFolder


def test_a_home_folder_is_the_same_to_all(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert WorkFolder("~/runs").path == to_path("~/runs") == absolute("~/runs") == tmp_path / "runs"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"provenance": {}}', b"\xff\xfe"])
def test_results_that_are_damaged_are_named(tmp_path, content):
    file = tmp_path / "trials" / "rope" / "results.json"
    file.parent.mkdir(parents=True)
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    for read in (lambda: WorkFolder(tmp_path).result("rope"), lambda: summary.read([tmp_path])):
        with pytest.raises(ConfigError, match=r"results.json is damaged \(.+\): remove it and run the command again"):
            read()


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b'{"step": 2\n', b"2\n", b"\n", b"\0\0\0\n"])
def test_a_damaged_line_ends_what_is_read_and_is_named(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + damage + b'{"step": 3}\n')
    with pytest.warns(UserWarning, match=r"metrics.jsonl, line 2 is damaged: it and what follows are left out"):
        assert Tracker.read(tmp_path) == [{"step": 1}]


@pytest.mark.parametrize("torn", [b'{"step": 2', b"{", b"", b"\xff"])
def test_a_last_line_that_was_cut_short_is_no_damage(tmp_path, torn):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + torn)
    assert Tracker.read(tmp_path) == [{"step": 1}]
