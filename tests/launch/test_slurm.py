"""The batch script: what it asks SLURM for, and what it runs."""

import json
import math
import re
import subprocess
import sys

import pytest

from launch import slurm
from launch.command import LaunchError
from tests.launch.conftest import launched
from tests.launch.shell import check

AWKWARD = ["--set=model.name=\"a 'b' $HOME `c`\\d\"", "--set=text=two\nlines", "--set=empty="]


def submitted(programs, *words, run=("--experiment=e.py", "--workdir=runs/w")):
    """The script that is given to sbatch, and the words sbatch was called with."""
    assert launched(slurm, *words, run=run) == 0
    return programs.given()[-1], programs.calls()[-1]


def options(script):
    return [line.removeprefix("#SBATCH ") for line in script.splitlines() if line.startswith("#SBATCH")]


def command(script, folder):
    """The words that a script runs, told by bash itself."""
    line = re.search(r"^command=\(.*?\)$\n\n", script, re.M | re.S).group()
    program = line + f'"{sys.executable}" -c "import json, sys; print(json.dumps(sys.argv[1:]))" "${{command[@]}}"'
    return json.loads(subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True, cwd=folder).stdout)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_over_nodes(programs, here):
    words = ["--nodes=4", "--gpus_per_node=8", "--cpus_per_task=12", "--time=1-12:00:00"]
    words += [
        "--partition=gpu",
        "--account=lab",
        "--sbatch=--qos=high",
        "--sbatch=--comment=two words",
        "--before=module load cuda",
    ]
    script, call = submitted(programs, *words, "--wait", "--before=module load cuda", run=("--workdir=runs/w", *AWKWARD))
    assert call == ["sbatch", "--parsable", "--wait"]
    assert options(script) == [
        "--job-name=w",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--gpus-per-node=8",
        "--cpus-per-task=12",
        "--time=1-12:00:00",
        "--partition=gpu",
        "--account=lab",
        f"--output={here}/runs/w-logs/%x-%j.log",
        "--open-mode=append",
        "--signal=B:USR1@120",
        "--requeue",
        "--qos=high",
        '"--comment=two words"',
    ]
    told = ["srun", "--kill-on-bad-exit=1", "--label", "--cpus-per-task=12"]
    assert command(script, here) == [*told, "python", "-m", "llm_jax", "run", "--workdir=runs/w", *AWKWARD, "--distributed"]
    assert "\nmodule load cuda\n" in script and (here / "runs" / "w-logs").is_dir()
    check(script)


def test_one_process_for_all_gpus_of_a_node_is_told_so(programs, here):
    """JAX would take one GPU a task by itself."""
    words = ("--gpus_per_node=4", "--time=60")
    script, _ = submitted(programs, *words, "--tasks_per_node=1")
    assert "\nexport JAX_LOCAL_DEVICE_IDS=0,1,2,3\n" in script and "--ntasks-per-node=1" in options(script)
    script, _ = submitted(programs, *words)
    assert "JAX_LOCAL_DEVICE_IDS" not in script and "--ntasks-per-node=4" in options(script)


def test_an_array_of_workers(programs, here):
    script, _ = submitted(programs, "--workers=10", "--time=60", "--norequeue", "--grace=30", "--python=/venv/bin/python")
    wanted = {"--array=0-9", "--no-requeue", "--signal=B:USR1@30", f"--output={here}/runs/w-logs/%x-%A_%a.log", "--nodes=1"}
    assert wanted <= set(options(script))
    own = ["/venv/bin/python", "-m", "llm_jax", "run", "--experiment=e.py", "--workdir=runs/w", "--worker"]
    assert command(script, here) == ["srun", "--kill-on-bad-exit=1", *own]
    assert "requeue=no" in script
    check(script)


def test_a_worker_is_one_process_with_all_gpus_of_its_node(programs, here):
    script, _ = submitted(programs, "--workers=2", "--gpus_per_node=8", "--time=60")
    assert {"--nodes=1", "--ntasks-per-node=1", "--gpus-per-node=8"} <= set(options(script))
    assert command(script, here)[-2:] == ["--workdir=runs/w", "--worker"]


def test_dry_run_prints_the_script_and_submits_nothing(programs, here, capsys):
    words = ("--nodes=2", "--time=60")
    script, _ = submitted(programs, *words)
    capsys.readouterr()
    assert launched(slurm, *words, "--dry_run", "--logs=other") == 0
    out = capsys.readouterr().out
    assert out == f"mkdir -p other\nsbatch --parsable <<'END'\n{script.replace('runs/w-logs', 'other').rstrip()}\nEND\n"
    assert len(programs.calls()) == 1 and not (here / "other").exists()


@pytest.mark.parametrize(
    "limit,expected",
    [
        ("30", 1800),
        ("30:15", 1815),
        ("2:00:01", 7201),
        ("1-12", 129600),
        ("1-0:30", 88200),
        ("2-1:1:1", 176461),
        ("UNLIMITED", math.inf),
    ],
)
def test_time_limits(limit, expected):
    """The six ways in which sbatch's manual writes them."""
    assert slurm.seconds(limit) == expected


@pytest.mark.parametrize("limit", ["2h", "1:2:3:4", "-5", "", "1-", "12:00:00 "])
def test_no_time_limits(limit):
    with pytest.raises(LaunchError, match="is no time limit"):
        slurm.seconds(limit)


@pytest.mark.parametrize(
    "words,sentence",
    [
        ((), "--time is missing"),
        (("--time=1",), "--time=1 leaves no time before --grace=120 s"),
        (("--time=60", "--sbatch=--comment=a\nb"), "line break"),
        (("--time=60", "--nodes=0"), "--nodes=0"),
        (("--time=60", "--gpus_per_node=8", "--tasks_per_node=4"), "give 8 (one a GPU) or 1"),
        (
            ("--time=60", "--workers=2", "--nodes=2"),
            "--workers=2: a worker is one process, and --nodes=2 --tasks_per_node=1 makes it 2",
        ),
        (("--time=60", "--workers=2", "--gpus_per_node=8", "--tasks_per_node=8"), "makes it 8: give it one task on one node"),
    ],
)
def test_mistakes_are_one_sentence(programs, here, capsys, words, sentence):
    assert launched(slurm, *words) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1
    assert not programs.calls()


def test_without_slurm(here, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert launched(slurm, "--time=60") == 2
    assert "sbatch is not on PATH: run this where Slurm is" in capsys.readouterr().err
