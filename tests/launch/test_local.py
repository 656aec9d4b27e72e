"""Real processes on this machine: what they are told, what ends them, and with which code."""

import os
import pathlib
import shlex
import signal
import subprocess
import sys
import textwrap
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
AWKWARD = ["--set=model.name=\"a 'b' $HOME `c`\\d\"", "--set=text=two\nlines", "--set=empty="]

PROGRAM = """
import json, os, pathlib, signal, sys, time
flags = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[2:])
index = int(flags.get("process", os.getpid()))
def stop(number, _):
    print("told", signal.Signals(number).name, flush=True)
    pathlib.Path(f"told-{{index}}").write_text(str(number))
    if {stubborn}:
        return
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
print("started", index, flush=True)
path = pathlib.Path(f"argv-{{index}}")
path.with_suffix(".new").write_text(json.dumps([sys.argv[1:], os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()]))
path.with_suffix(".new").rename(path)
{body}
"""
WAIT = "for _ in range(600): time.sleep(0.1)"


@pytest.fixture
def start(tmp_path):
    """Starts the launcher in a folder whose `llm_jax` is a program of the test's."""
    started = []

    def begin(*words, body=WAIT, stubborn="False", run=("--workdir=runs/w",), **options):
        package = tmp_path / "llm_jax"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(PROGRAM.format(body=textwrap.dedent(body), stubborn=stubborn))
        command = [sys.executable, "-m", "launch.local", *words, "--", *run]
        child = subprocess.Popen(
            command,
            cwd=tmp_path,
            env={name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"} | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        started.append(child)
        return child

    yield begin
    for child in started:
        child.kill()
        child.stdout.close()
        child.wait()


def started(folder, count):
    """What each of the processes was given, once all run."""
    import json

    for _ in range(300):
        files = sorted(folder.glob("argv-[0-9]*"))
        files = [file for file in files if not file.suffix]
        if len(files) == count:
            return [json.loads(file.read_text()) for file in files]
        time.sleep(0.05)
    raise AssertionError(f"{len(files)} of {count} processes started")


def gone(pids, seconds):
    """Whether processes end in time."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not any(pathlib.Path(f"/proc/{pid}").exists() for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_processes_get_the_words_verbatim_and_one_coordinator(start, tmp_path):
    child = start("--processes=3", "--gpus_per_process=2", body="", run=("--workdir=runs/w", *AWKWARD))
    out, _ = child.communicate(timeout=30)
    assert child.returncode == 0, out
    told = started(tmp_path, 3)
    coordinators = {argv[-3] for argv, _, _ in told}
    assert len(coordinators) == 1 and coordinators.pop().startswith("--coordinator=127.0.0.1:")
    for index, (argv, gpus, _) in enumerate(told):
        assert argv[:-3] == ["run", "--workdir=runs/w", *AWKWARD]
        assert argv[-2:] == ["--processes=3", f"--process={index}"]
        assert gpus == f"{2 * index},{2 * index + 1}"
    logs = tmp_path / "runs" / "w-logs"
    assert [(logs / f"process-{index}.log").read_text() for index in range(3)] == [f"started {index}\n" for index in range(3)]
    assert "started 0" in out and "started 1" not in out, "one in front"


def test_what_libraries_say_of_every_run_stays_in_the_log(start, tmp_path):
    noise = (
        "[Gloo] Rank 1 is connected to 1 peer ranks. Expected number of connected peer ranks is : 1\n"
        "W1127 18:52:05.214408    3892 coordination_service.cc:185] [1503] Using experimental recoverable task feature. The\n"
    )
    child = start("--processes=1", body=f"print({noise!r} + 'W1127 18:52:05.214408 of another kind')")
    out, _ = child.communicate(timeout=30)
    assert out == "started 0\nW1127 18:52:05.214408 of another kind\n"
    assert noise in (tmp_path / "runs" / "w-logs" / "process-0.log").read_text()


@pytest.mark.slow
def test_jax_finds_the_other_process_by_the_flags(start):
    body = """
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    from jax.experimental import multihost_utils
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(flags["coordinator"], int(flags["processes"]), index)
    print("found", multihost_utils.process_allgather(jax.numpy.array([index])).ravel().tolist())
    """
    out, _ = start("--processes=2", body=body).communicate(timeout=120)
    assert "found [0, 1]" in out


def test_workers_get_the_flag_alone(start, tmp_path):
    child = start("--workers=2", body="")
    child.communicate(timeout=30)
    assert child.returncode == 0
    assert [argv for argv, _, _ in started(tmp_path, 2)] == [["run", "--workdir=runs/w", "--worker"]] * 2


def test_one_that_is_killed_takes_the_others_down(start, tmp_path):
    child = start("--processes=3", "--grace=20")
    pids = [pid for _, _, pid in started(tmp_path, 3)]
    os.kill(pids[1], signal.SIGKILL)
    assert gone(pids, 10)
    out, _ = child.communicate(timeout=10)
    assert child.returncode == 128 + signal.SIGKILL
    assert "process-1 ended with code 137" in out and (tmp_path / "told-0").exists() and (tmp_path / "told-2").exists()


def test_stubborn_ones_are_killed_after_the_grace_with_what_they_started(start, tmp_path):
    body = """
    import subprocess
    if index == 1:
        sys.exit(7)
    child = subprocess.Popen(["sleep", "60"])
    pathlib.Path("grandchild").write_text(str(child.pid))
    for _ in range(600): time.sleep(0.1)
    """
    child = start("--processes=2", "--grace=1", body=body, stubborn="True")
    out, _ = child.communicate(timeout=30)
    assert child.returncode == 7, "the first that failed, not the ones killed for it"
    assert "process-0 did not end within 1 s: killed" in out
    assert gone([(tmp_path / "grandchild").read_text()], 5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_reach_all_and_what_saves_ends_well(start, tmp_path, number):
    child = start("--processes=2")
    pids = [pid for _, _, pid in started(tmp_path, 2)]
    child.send_signal(number)
    child.communicate(timeout=20)
    assert child.returncode == 0 and gone(pids, 1)
    expected = signal.SIGINT if number == signal.SIGINT else signal.SIGTERM
    assert [(tmp_path / f"told-{index}").read_text() for index in range(2)] == [str(int(expected))] * 2


def test_a_dead_worker_leaves_the_others_alone(start, tmp_path):
    child = start("--workers=2", body="time.sleep(1.5)")
    pids = [pid for _, _, pid in started(tmp_path, 2)]
    os.kill(pids[0], signal.SIGKILL)
    out, _ = child.communicate(timeout=20)
    assert child.returncode == 0 and "ended with code 137" in out
    assert not list(tmp_path.glob("told-*"))


def test_workers_that_all_fail_fail(start):
    child = start("--workers=2", body="sys.exit(3)")
    child.communicate(timeout=20)
    assert child.returncode == 3


def test_dry_run_starts_nothing_and_prints_what_a_shell_can_run(start, tmp_path):
    child = start("--processes=2", "--port=1234", "--dry_run", run=("--workdir=my runs/w", *AWKWARD))
    out, _ = child.communicate(timeout=20)
    assert child.returncode == 0 and not list(tmp_path.glob("argv-*")) and not (tmp_path / "my runs").exists()
    words = shlex.split(out)
    assert words.count("--coordinator=127.0.0.1:1234") == 2 and all(words.count(word) == 2 for word in AWKWARD)


@pytest.mark.parametrize(
    "words,run,sentence",
    [
        (("--processes=2", "--workers=2"), ("--workdir=w",), "give one of --processes=N"),
        (("--processes=2",), ("--workdir=w", "--process=1"), "--process is given by the launcher"),
        (("--processes=2",), ("--experiment=e.py",), "--workdir is missing after --"),
        (("--processes=2",), ("python", "-m", "llm_jax"), "after -- come the flags of `python -m llm_jax run`"),
        (("--processes=2",), (), "after -- come the flags"),
        (("--processes=0",), ("--workdir=w",), "--processes=0"),
        (("--prosesses=2",), ("--workdir=w",), "Did you mean: processes"),
        (("--processes=2", "--workdir=w"), (), "workdir"),
        (("--processes=2", "--logs=/proc/no/such"), ("--workdir=w",), "/proc/no"),
        (("--processes=2", "--python=no-such-python"), ("--workdir=w",), "no-such-python is not on PATH"),
    ],
)
def test_mistakes_are_one_sentence(start, words, run, sentence):
    child = start(*words, run=run)
    out, _ = child.communicate(timeout=20)
    assert child.returncode == 2 and out.count("\n") == 1, out
    assert sentence in out
