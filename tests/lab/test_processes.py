"""One run on several real processes: the numbers of one, what they say when one of them dies, and nothing lost."""

import copy
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from llm_jax.cli import run
from llm_jax.core import platform
from llm_jax.io import checkpoint
from llm_jax.io.nearby import REST
from tests import quick
from tests.conftest import CACHE
from tests.forked import Forked, started

EXPERIMENT = """
from llm_jax.core.config import override
from llm_jax.lab import presets

experiment = override(
    presets.nano(sequence_length=32),
    {
        "train.log_every": 10, "train.steps": STEPS, "evaluation.every": 100_000, "evaluation.bytes": 2048, "checkpoints.every": 10,
        "train.steps_per_dispatch": 1, "model.width": 16, "model.depth": 1, "model.dropout.residual": 0.1, "data.batch_size": 8,
        "mesh.data": 1, "mesh.fsdp": -1,
    },
)
"""
STARTED = []
STEPS = 200
RARELY = "--set=checkpoints.every=100000"
LONG = 300  # steps of a run that can be stopped in the middle: a signal is heard within about a second
PACKAGE = pathlib.Path(__file__).parents[2] / "llm_jax"
DEADLINE = 60  # seconds in which the others must have stopped


def command(folder, *more, steps=60):
    file = folder.with_suffix(".py")
    file.write_text(EXPERIMENT.replace("STEPS", str(steps)))
    return [sys.executable, "-m", "llm_jax", "run", f"--experiment={file}", f"--workdir={folder}", *more]


def environment(devices):
    given = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS" and not name.startswith("PYTEST_")}
    options = {"xla_force_host_platform_device_count": devices, **quick.QUICK}
    return given | {"JAX_PLATFORMS": "cpu", "LLM_JAX_CACHE": str(CACHE / "processes"), "XLA_FLAGS": quick.flags(options)}


def start(count, folder, *more, devices=2, heartbeat=5, each=None, cwd=None, forked=True, **given):
    """So many processes of one run; each, cwd: what one of them is given besides, and where it is. heartbeat: None is not given."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = []
    for index in range(count):
        own = [f"--coordinator=localhost:{port}", f"--processes={count}", f"--process={index}"]
        own += [] if heartbeat is None else [f"--heartbeat={heartbeat}"]
        line = command(folder, *own, *more, *((each or {}).get(index, [])), **given)
        log = folder.with_suffix(f".{index}.log")
        log.unlink(missing_ok=True)
        if forked:
            processes.append(Forked(line, environment(devices), log))
        else:
            processes.append(started(line, environment(devices), log, cwd=(cwd or {}).get(index)))
    STARTED.extend(processes)
    return processes


@pytest.fixture(autouse=True)
def no_leftovers():
    yield
    for process in STARTED:
        if process.poll() is None:
            process.kill()
            process.wait()
    STARTED.clear()


def said(folder, index):
    return folder.with_suffix(f".{index}.log").read_text()


def ended(processes, folder, seconds=300):
    for index, process in enumerate(processes):
        assert process.wait(seconds) == 0, said(folder, index)
    return result(folder)


def result(folder):
    (file,) = folder.glob("trials/*/results.json")
    return json.loads(file.read_text())


def records(folder):
    """Numbers of each record, without what depends on the clock."""
    (file,) = folder.glob("trials/*/metrics.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.slow
def test_two_and_four_processes_have_the_losses_of_one(tmp_path):
    one = tmp_path / "one"
    subprocess.run(command(one), env=environment(4), check=True, capture_output=True)
    for count in (2, 4):
        several = tmp_path / f"{count}"
        ended(start(count, several, devices=4 // count), several)
        assert len(records(several)) == len(records(one)) == 6
        for ours, theirs in zip(records(several), records(one), strict=True):
            assert ours.keys() == theirs.keys()
            np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5, atol=1e-5)
        assert "report:" in said(several, 0) and "report:" not in said(several, 1), "the first alone speaks"
        assert sorted(path.name for path in several.glob("*")) == sorted(path.name for path in one.glob("*"))


@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_dies_at_ten_random_moments_and_at_ten_others_goes_on_where_it_was_saved(seed, tmp_path):
    chance, whole, killed, runs = random.Random(seed), tmp_path / "whole", 0, 0
    undisturbed = ended(start(2, whole, steps=STEPS), whole)
    while killed < 10:
        folder = tmp_path / f"run{runs}"
        processes, begun = start(2, folder, steps=STEPS), len(lines(folder))
        over = lambda processes=processes: processes[0].poll() is not None  # noqa: E731
        until(lambda begun=begun, over=over: len(lines(folder)) > begun or over())
        if killed % 2:  # in the middle of a checkpoint
            until(lambda over=over: list(folder.glob("groups/*/checkpoints/*tmp*")) or over())
        else:
            time.sleep(chance.uniform(0, 0.25))  # of which a few checkpoints are written
        if over():
            runs += 1
            assert ended(processes, folder)["metrics"] == undisturbed["metrics"] and records(folder) == records(whole)
            continue
        victim = chance.randrange(2)
        processes[victim].kill()
        if processes[1 - victim].wait(DEADLINE) == 0:  # it was over by then
            continue
        missed(folder, victim, by=1 - victim)
        killed += 1
    assert ended(start(2, folder, steps=STEPS), folder)["metrics"] == undisturbed["metrics"]
    assert records(folder) == records(whole)


@pytest.mark.slow
def test_who_dies_is_missed_within_a_minute_at_the_heartbeat_of_a_run_that_sets_none(tmp_path):
    folder = tmp_path / "run"
    first, second = start(2, folder, RARELY, heartbeat=None, steps=LONG)
    until(lambda: lines(folder))
    second.kill()
    assert first.wait(DEADLINE) == 1, said(folder, 0)
    missed(folder, 1, by=0)


def missed(folder, victim, by):
    """That one process says which other is gone; of one that JAX has aborted it is a child that says so, a moment later."""
    until(lambda: re.search(rf"process {victim} \(.*, pid \d+\) is gone: run the same command again", said(folder, by)), seconds=10)


def lines(folder):
    return [line for file in folder.glob("trials/*/metrics.jsonl") for line in file.read_text().splitlines()]


def until(condition, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The folder of a run of two processes that nobody stops."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    ended(start(2, folder, RARELY, steps=LONG), folder)
    return folder


def trained(folder):
    """The state at the end, as it was saved."""
    (checkpoints,) = folder.glob("groups/*/checkpoints")
    step, found = checkpoint.read(checkpoints, {"params": None, "opt_state": None})
    assert step == LONG
    return found


def assert_as_undisturbed(folder, undisturbed):
    assert result(folder)["metrics"] == result(undisturbed)["metrics"] and records(folder) == records(undisturbed)
    jax.tree.map(np.testing.assert_array_equal, trained(folder), trained(undisturbed))


@pytest.mark.slow
@pytest.mark.parametrize("told", [[0], [0, 1]], ids=["first", "both"])
def test_sigterm_to_any_of_two_has_both_save_and_leaves_the_numbers_as_they_are(told, undisturbed, tmp_path):
    folder = tmp_path / "run"
    processes = start(2, folder, RARELY, steps=LONG)
    until(lambda: lines(folder))
    for index in told:
        processes[index].send_signal(signal.SIGTERM)
    assert [process.wait(DEADLINE) for process in processes] == [0, 0], said(folder, 0) + said(folder, 1)
    found = re.search(r"stopped at step (\d+); the same command again goes on from there", said(folder, 0))
    assert found and "stopped" not in said(folder, 1), said(folder, 0) + said(folder, 1)
    (checkpoints,) = folder.glob("groups/*/checkpoints")
    assert checkpoint.steps(checkpoints, whole=True) == [step := int(found[1])] and step < LONG
    ended(start(2, folder, RARELY, steps=LONG), folder)
    assert f"going on after step {step}\n" in said(folder, 0)
    assert_as_undisturbed(folder, undisturbed)


LATE = """
import time
from llm_jax.core.ahead import Ahead
from llm_jax.io.checkpoint import Checkpointer

def late(cls, name):
    inner, left = getattr(cls, name), [35]  # more than gloo's 30

    def outer(*args, **given):
        time.sleep(left.pop() if left else 0)
        return inner(*args, **given)

    setattr(cls, name, outer)

late(Ahead, "_compile")
late(Checkpointer, "save")
"""


@pytest.mark.slow
def test_one_that_compiles_and_saves_much_later_than_the_other_is_waited_for(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other.py"
    other.write_text(EXPERIMENT.replace("STEPS", "10") + LATE)
    ended(start(2, folder, each={1: [f"--experiment={other}"]}, steps=10), folder)


FAILS = """
from llm_jax.core.ahead import Ahead

def fails(self, *args):
    raise RuntimeError("it is my own")

Ahead._compile = fails
"""


@pytest.mark.slow
def test_one_that_fails_alone_says_so_while_it_waits_for_the_others(tmp_path):
    folder, other = tmp_path / "run", tmp_path / "other.py"
    other.write_text(EXPERIMENT.replace("STEPS", "10") + FAILS)
    start(2, folder, each={1: [f"--experiment={other}"]}, steps=10)
    until(lambda: "process 1: RuntimeError: it is my own: waiting 300 s for the others" in said(folder, 1))
    assert "RuntimeError" not in said(folder, 0)


def copied(near):
    """Steps of the copies that both of two processes have whole."""
    folders = [[one.parent for one in near.glob(f"*/*/process_{index}/*/{REST}")] for index in range(2)]
    return sorted(set.intersection(*({int(one.name) for one in each if one.name.isdigit()} for each in folders)))


@pytest.mark.slow
def test_what_is_killed_goes_on_from_the_newest_copies_nearby_that_both_have(undisturbed, tmp_path):
    folder, near = tmp_path / "run", tmp_path / "near"
    flags = [f"--set=checkpoints.every={LONG // 2}", f"--set=checkpoints.nearby={near}", "--set=checkpoints.nearby_every=20"]
    processes = start(2, folder, *flags, steps=LONG)
    until(lambda: list(folder.glob(f"groups/*/checkpoints/{LONG // 2}")) and sum(step > LONG // 2 for step in copied(near)) > 1)
    for process in processes:
        process.kill()
    assert [process.wait(DEADLINE) for process in processes] == [-signal.SIGKILL] * 2
    if len(copied(near)) > 1:  # as if one had been killed before the other
        shutil.rmtree(next(near.glob(f"*/*/process_1/{copied(near)[-1]}")))
    step, saved = copied(near)[-1], [int(one.name) for one in folder.glob("groups/*/checkpoints/*") if one.name.isdigit()]
    assert max(saved) < step < LONG
    ended(start(2, folder, *flags, steps=LONG), folder)
    assert f"going on after step {step}\n" in said(folder, 0)
    assert_as_undisturbed(folder, undisturbed)
    assert not copied(near), "of what is finished there is nothing to go on with"


@pytest.mark.slow
def test_processes_that_do_not_run_the_same_say_so_and_stop(tmp_path):
    folder = tmp_path / "run"
    processes = start(2, folder, each={1: ["--set=train.clip=0.5"]})
    assert [process.wait(DEADLINE * 2) for process in processes] == [2, 2]
    assert re.search(r"error: the experiment differs: process 1 \(.*\) has '\w+' and process 0", said(folder, 0)), said(folder, 0)
    assert "error" not in said(folder, 1)


@pytest.mark.slow
def test_processes_whose_code_differs_say_so_and_stop(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(PACKAGE, other / "llm_jax")
    with open(other / "llm_jax" / "optim" / "schedules.py", "a") as changed:
        changed.write("CHANGED = True\n")
    folder = tmp_path / "run"
    processes = start(2, folder, cwd={1: other}, forked=False)
    assert [process.wait(DEADLINE * 2) for process in processes] == [2, 2]
    told = re.search(
        r"error: the code differs: process 1 \(.*\) has '(\w+)' and process 0 \(.*\) '(\w+)'; install", said(folder, 0)
    )
    assert told and told[1] != told[2], said(folder, 0)
    assert "error" not in said(folder, 1) and not (folder / "trials").exists()


def lone(*flags, **environ):
    given = environment(1) | environ
    line = [sys.executable, "-m", "llm_jax", "run", "--experiment=experiments/c06_positional_encoding.py", "--plan", *flags]
    done = subprocess.run(line, env=given, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2], timeout=120)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "environ, told",
    [
        ({"SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}, "this is process 3 of a SLURM step of 8"),
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "1"}, "this is host 1 of a TPU slice of 4"),
    ],
)
def test_one_of_many_says_so_instead_of_waiting_for_the_others(environ, told):
    code, error = lone(**environ)
    assert code == 2 and error.startswith(f"error: {told}, and was not told so: start all with --distributed"), error


@pytest.mark.parametrize(
    "environ, told",
    [
        ({"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "1"}, "host 1 of a TPU slice of 4"),
        ({"TPU_PROCESS_ADDRESSES": "a:1,b:1", "TPU_WORKER_ID": "0"}, "host 0 of a TPU slice of 2"),
        ({"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}, "a process of slice 1 of 2 that are one TPU job"),
    ],
)
def test_a_worker_on_a_host_of_a_larger_tpu_says_so_instead_of_waiting_for_the_others(environ, told):
    code, error = lone("--worker", **environ, JAX_PLATFORMS="")
    assert code == 2 and error.startswith(f"error: --worker is one process with a TPU of its own, and this is {told}: start"), error


@pytest.mark.parametrize("own", [{"JAX_PLATFORMS": "cpu"}, {"TPU_PROCESS_BOUNDS": "1,1,1"}, {"TPU_WORKER_HOSTNAMES": "a"}])
def test_a_worker_that_has_a_host_for_itself_is_not_refused(own, monkeypatch):
    for name, value in ({"JAX_PLATFORMS": "", "TPU_WORKER_HOSTNAMES": "a,b"} | own).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(platform, "setup", lambda **given: None)
    monkeypatch.setattr(run, "FLAGS", copy.deepcopy(run.FLAGS))
    run.parse(run.FLAGS, ["run", "--worker"])
    run._join()


@pytest.mark.parametrize(
    "flags, told",
    [
        (["--processes=2", "--process=0"], "--coordinator is missing beside --processes and --process"),
        (
            ["--coordinator=localhost:1", "--processes=2", "--process=2"],
            "--process must be at least 0 and below --processes=2, got 2",
        ),
        (["--distributed"], "--distributed knows of no other processes, since neither SLURM, Open MPI, GKE nor Cloud TPU says"),
        (["--distributed"], "give --coordinator=HOST:PORT --processes=N --process=I to each, or leave it out for a run of one"),
        (["--distributed", "--worker"], "--distributed trains with others, and --worker for itself"),
    ],
)
def test_a_job_that_is_described_wrong_is_a_sentence(flags, told):
    code, error = lone(*flags)
    assert code == 2 and told in error, error
