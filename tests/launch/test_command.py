"""What all launchers share: the run's flags as they were typed, programs printed as a shell takes them, no heavy import."""

import shlex
import subprocess
import sys

import pytest

from launch.command import ROOT, LaunchError, Run, Shell


@pytest.mark.parametrize(
    "words,value",
    [
        (["--workdir=a b"], "a b"),
        (["--workdir", "a b"], "a b"),
        (["-workdir=x=y"], "x=y"),
        (["--set=--workdir=other", "--workdir=mine"], "mine"),
        (["--workdir="], ""),
    ],
)
def test_flags_are_found_however_they_are_written(words, value):
    assert Run(tuple(words)).flag("workdir") == value


def test_a_flag_without_a_value():
    run = Run(("--plan", "--experiment=e.py"))
    assert (run.flag("plan"), run.flag("experiment"), run.flag("arms")) == ("", "e.py", None)


@pytest.mark.parametrize("own", ["--worker", "--distributed", "--coordinator=a:1", "--process=0", "-processes=2"])
def test_what_the_launcher_gives_is_not_given_twice(own):
    with pytest.raises(LaunchError, match="is given by the launcher"):
        Run(("--workdir=w", own))


def test_what_is_printed_is_what_a_shell_runs(capsys, tmp_path):
    words = [sys.executable, "-c", "import sys; print(sys.argv[1:], sys.stdin.read())", "a 'b' $HOME", "c\nd"]
    Shell(dry=True).run(words, given="$HOME `e`\n")
    printed = capsys.readouterr().out
    shown = subprocess.run(["bash", "-c", printed], capture_output=True, text=True).stdout
    assert shown == f"{words[3:]} $HOME `e`\n\n"
    Shell(dry=True).make(tmp_path / "a b")
    assert shlex.split(capsys.readouterr().out) == ["mkdir", "-p", str(tmp_path / "a b")] and not (tmp_path / "a b").exists()


def test_a_program_that_fails_and_one_that_is_not_there():
    shell = Shell()
    assert shell.ask([sys.executable, "-c", "import sys; sys.exit('no')"], supposed="yes") == (1, "no")
    with pytest.raises(LaunchError, match="ended with code 3"):
        shell.do([sys.executable, "-c", "raise SystemExit(3)"])
    with pytest.raises(LaunchError, match="no-such-program is not on PATH"):
        shell.run(["no-such-program"])


def test_launchers_need_absl_alone():
    """On a login node, or a laptop, nothing else of the project's is installed."""
    code = (
        "import sys; before = set(sys.modules)\n"
        "import launch.docker, launch.gke, launch.local, launch.slurm, launch.tpu\n"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(tops - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "['absl', 'launch']\n", done.stderr


@pytest.mark.parametrize("words, code", [([], 0), (["--help"], 0), (["tpu"], 2), (["nonsense"], 2)])
def test_launchers_are_listed(words, code):
    done = subprocess.run([sys.executable, "-m", "launch", *words], cwd=ROOT, capture_output=True, text=True)
    rows = [line.split()[0] for line in (done.stdout if code == 0 else done.stderr).splitlines() if line.startswith("  ")]
    kept = {file.stem for file in (ROOT / "launch").glob("*.py") if "guarded(main, sys.argv)" in file.read_text()}
    assert done.returncode == code and set(rows) == kept and len(rows) == len(kept)
    assert ("write python -m launch.tpu" in done.stderr) == (words == ["tpu"])
