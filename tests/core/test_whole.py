"""What has its name is whole, whoever else writes it, and what failed leaves nothing."""

import errno
import pathlib
import re

import pytest

from llm_jax.core import whole
from llm_jax.core.distributed import farewells
from llm_jax.core.whole import left, remove_left, whole_file, whole_folder, write_new, write_whole

stands = pathlib.Path.is_dir


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_there_when_it_is_whole(tmp_path):
    file = tmp_path / "deep" / "a.json"
    write_whole(file, "naïve")
    assert file.read_bytes() == "naïve".encode()
    with whole_file(file) as partial:
        partial.write_text("new")
        assert file.read_text() == "naïve" and partial.parent == file.parent
    assert file.read_text() == "new" and names(file.parent) == ["a.json"]


def half_of_a_file(path, error):
    with whole_file(path) as partial:
        partial.write_text("half")
        raise error


def half_of_a_folder(path, error):
    with whole_folder(path, stands) as partial:
        (partial / "half").touch()
        raise error


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("half", [half_of_a_file, half_of_a_folder])
def test_an_error_leaves_nothing(half, error, tmp_path):
    write_whole(tmp_path / "a", "before")
    with pytest.raises(type(error)):
        half(tmp_path / ("a" if half is half_of_a_file else "b"), error)
    assert names(tmp_path) == ["a"] and (tmp_path / "a").read_text() == "before"


def test_two_of_one_process_id_do_not_meet(tmp_path):
    with whole_folder(tmp_path / "a", stands) as slow, whole_file(tmp_path / "b") as slow_file:
        with whole_folder(tmp_path / "a", stands) as fast, whole_file(tmp_path / "b") as fast_file:
            (fast / "x").write_text("fast")
            fast_file.write_text("fast")
        (slow / "x").write_text("slow")
        slow_file.write_text("slow")
    assert (tmp_path / "a" / "x").read_text() == "fast" and (tmp_path / "b").read_text() == "slow"
    assert names(tmp_path) == ["a", "b"]


def test_what_does_not_stand_gives_way(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    with whole_folder(tmp_path / "a", stands=lambda folder: (folder / "x").is_file()) as partial:
        (partial / "x").touch()
    assert names(tmp_path / "a") == ["x"] and names(tmp_path) == ["a"]


def test_only_another_process_is_no_error(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(errno.EACCES, "not allowed")

    monkeypatch.setattr(whole.pathlib.Path, "rename", fails)
    with pytest.raises(OSError, match="not allowed"), whole_folder(tmp_path / "a", stands):
        pass
    assert names(tmp_path) == []


def test_what_was_killed_is_found_and_removed(tmp_path):
    write_whole(tmp_path / "a.json", "")
    with whole_file(tmp_path / "a.json") as one, whole_folder(tmp_path / "b-1", stands) as other:
        one.touch()
        assert set(left(tmp_path, ["a.json", "b-*"])) == {one, other} and left(tmp_path, ["c"]) == []
        assert all(re.fullmatch(r"\.(a\.json|b-1)\.[0-9a-f]{32}", path.name) for path in (one, other))
    one.touch()
    other.mkdir()
    remove_left(tmp_path, ["a.json", "b-*"])
    assert names(tmp_path) == ["a.json", "b-1"]


def test_a_new_file_is_written_by_the_first_alone(tmp_path):
    assert write_new(tmp_path / "in" / "a", "one") and not write_new(tmp_path / "in" / "a", "two")
    assert (tmp_path / "in" / "a").read_text() == "one" and [f.name for f in (tmp_path / "in").iterdir()] == ["a"]


def test_a_process_that_leaves_takes_what_it_had_of_a_folder_with_it(tmp_path):
    before = list(farewells)
    with whole_folder(tmp_path / "a", stands) as partial:
        (partial / "x").write_text("half")
        farewells[-1]()
        assert names(tmp_path) == []
        partial.mkdir()
    assert farewells == before and names(tmp_path) == ["a"]
