"""Programs that are not there, played by a script on PATH that records how it was called and gives prepared answers."""

import json
import os
import pathlib
import sys
from dataclasses import dataclass

import pytest

PLAYER = """#!{python} -IS
import fcntl, json, os, pathlib, re, sys
folder, name = pathlib.Path({folder!r}), os.path.basename(sys.argv[0])
with open(folder / "lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    given = "" if sys.stdin.isatty() else sys.stdin.read()
    with open(folder / "calls", "a") as calls:
        calls.write(json.dumps({{"argv": [name, *sys.argv[1:]], "given": given}}) + "\\n")
    answers = json.loads((folder / "answers").read_text())
    command = " ".join([name, *sys.argv[1:]])
    for answer in answers:
        if re.search(answer["pattern"], command, re.S) and answer["left"]:
            answer["left"] -= 1
            (folder / "answers").write_text(json.dumps(answers))
            print(answer["says"], end="", file=sys.stderr if answer["code"] else sys.stdout)
            sys.exit(answer["code"])
"""


@dataclass(frozen=True)
class Recorder:
    """Stand-ins for programs: what they were called with, and what they answer."""

    folder: pathlib.Path

    def answer(self, pattern: str, says: str = "", code: int = 0, times: int = 1_000_000) -> None:
        """The next `times` calls that match a pattern print `says` and exit with `code`; earlier answers come first."""
        answers = json.loads((self.folder / "answers").read_text())
        answers.append({"pattern": pattern, "says": says, "code": code, "left": times})
        (self.folder / "answers").write_text(json.dumps(answers))

    def calls(self) -> list[list[str]]:
        return [call["argv"] for call in self._read()]

    def given(self) -> list[str]:
        return [call["given"] for call in self._read()]

    def _read(self):
        file = self.folder / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """gcloud, kubectl, xpk, docker and sbatch before all others on PATH, as stand-ins that record."""
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "answers").write_text("[]")
    for name in ("gcloud", "kubectl", "xpk", "docker", "sbatch"):
        (folder / name).write_text(PLAYER.format(python=sys.executable, folder=str(folder)))
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Recorder(folder)


def launched(module, *words, run=("--experiment=e.py", "--workdir=runs/w")):
    """The exit code of a launcher's `main` for words typed before `--` and flags of `run` after it; its flags are then reset."""
    from launch.command import guarded

    try:
        return guarded(module.main, [module.__file__, *words, *(["--", *run] if run else [])])
    finally:
        module.FLAGS.unparse_flags()
        for name in module.FLAGS:
            module.FLAGS[name].unparse()
