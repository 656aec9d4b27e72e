"""A real SLURM on this machine, where it is installed: what becomes of jobs that the launcher submits."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from tests.conftest import CACHE
from tests.launch.test_slurm import AWKWARD
from tests.quick import QUICK, flags

SECOND_START = 3  # seconds that a job has been seen in the queue again before it is started: slurmd counts in whole ones
NEEDED = "sbatch", "slurmctld", "slurmd", "munged"
CONF = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1
KillWait=10
OverTimeLimit=0
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 Gres=gpu:2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=2
"""
PROGRAM = """
import json, os, pathlib, signal, sys, time
names = "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "CUDA_VISIBLE_DEVICES"
mine = {name: os.environ.get(name) for name in names}
restarts = int(os.environ.get("SLURM_RESTART_COUNT", 0))
folder = pathlib.Path(next(word for word in sys.argv if word.startswith("--workdir=")).partition("=")[2])
def note(event):
    with (folder / "events.jsonl").open("a") as events:
        events.write(json.dumps([event, restarts, mine, sys.argv[1:]]) + "\\n")
def stop(*_):
    note("told")
    time.sleep(4)
    note("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
note("began")
if "--set=wait=true" in sys.argv and not restarts:
    time.sleep(300)
note("ended")
"""


def free_ports(count):
    """Ports that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A SLURM of one node with eight cores and what counts as two GPUs, on loopback, for this file: munged, slurmctld, slurmd."""
    if missing := [name for name in NEEDED if shutil.which(name) is None]:
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts tasks as root alone")
    folder, host = tmp_path_factory.mktemp("slurm"), socket.gethostname().partition(".")[0]
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, host=host, user="root", ports=free_ports(2)))
    (folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")  # two files that count as GPUs
    (folder / "key").write_bytes(os.urandom(128))
    (folder / "key").chmod(0o600)
    env = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
    files = {"socket": "munge.socket", "key-file": "key", "pid-file": "munged.pid", "seed-file": "seed", "log-file": "munged.log"}
    munge = ["munged", "--force", "--foreground", *(f"--{name}={folder / file}" for name, file in files.items())]
    daemons = []
    try:
        for daemon in (munge, ["slurmctld", "-D"], ["slurmd", "-D", "-N", host]):
            daemons.append(subprocess.Popen(daemon, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
            time.sleep(1)
        wait(lambda: "idle" in subprocess.run(["sinfo", "--noheader"], env=env, capture_output=True, text=True).stdout, folder)
        yield env

        def empty():  # a job may go back into the queue while it is ended
            subprocess.run(["scancel", "--me"], env=env, check=False)
            return not subprocess.run(["squeue", "--noheader"], env=env, capture_output=True, text=True).stdout

        wait(empty, folder)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()


def wait(done, folder, seconds=60):
    """Waits until something is so; what SLURM says is in the error otherwise."""
    until = time.monotonic() + seconds
    while not done():
        if time.monotonic() > until:
            raise AssertionError("\n".join(f"{log}\n{log.read_text()[-4000:]}" for log in sorted(folder.rglob("*.log"))))
        time.sleep(0.5)


JAX = """
import os
os.environ["JAX_PLATFORMS"] = "cpu"
import jax
from jax.experimental import multihost_utils
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize()
everyone = multihost_utils.process_allgather(jax.numpy.array([jax.process_index()]))
print("found", jax.process_index(), everyone.ravel().tolist(), flush=True)
"""


@pytest.fixture
def job(cluster, tmp_path):
    """Submits through the launcher in a folder whose `llm_jax` is a program of the test's; returns its output."""
    (tmp_path / "llm_jax").mkdir()
    (tmp_path / "llm_jax" / "__init__.py").touch()
    (tmp_path / "work folder").mkdir()

    def submit(*words, run=(), program=PROGRAM):
        (tmp_path / "llm_jax" / "__main__.py").write_text(program)
        ours = [sys.executable, "-m", "launch.slurm", f"--python={sys.executable}", *words]
        env = cluster | {"PYTHONPATH": str(pathlib.Path(__file__).parents[2])}
        done = subprocess.run(
            [*ours, "--", "--workdir=work folder", *run], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
        )
        logs = "\n".join(log.read_text() for log in (tmp_path / "work folder-logs").glob("*.log"))
        assert done.returncode == 0, done.stdout + done.stderr + logs
        return done.stdout.strip()

    return submit


def events(folder):
    file = folder / "work folder" / "events.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.slow
def test_two_tasks_see_each_other(job, tmp_path):
    job("--tasks_per_node=2", "--time=5", "--wait", "--name=two tasks", run=AWKWARD)
    began = [event for event in events(tmp_path) if event[0] == "began"]
    assert sorted(mine["SLURM_PROCID"] for _, _, mine, _ in began) == ["0", "1"]
    assert {mine["SLURM_NTASKS"] for _, _, mine, _ in began} == {"2"}
    assert len({mine["SLURM_JOB_ID"] for _, _, mine, _ in began}) == 1
    assert all(argv == ["run", "--workdir=work folder", *AWKWARD, "--distributed"] for *_, argv in began)
    assert len([event for event in events(tmp_path) if event[0] == "ended"]) == 2
    assert list((tmp_path / "work folder-logs").glob("two tasks-*.log"))


@pytest.mark.slow
def test_jax_finds_the_other_tasks_by_itself(job, tmp_path):
    job("--tasks_per_node=2", "--time=5", "--wait", program=JAX)
    (log,) = (tmp_path / "work folder-logs").glob("*.log")
    found = [line for line in log.read_text().splitlines() if "found" in line]
    assert sorted(found) == ["0: found 0 [0, 1]", "1: found 1 [0, 1]"]


@pytest.mark.slow
def test_workers_are_an_array(job, tmp_path):
    job("--workers=3", "--time=5", "--wait")
    began = [event for event in events(tmp_path) if event[0] == "began"]
    assert sorted(mine["SLURM_ARRAY_TASK_ID"] for _, _, mine, _ in began) == ["0", "1", "2"]
    assert all(argv[-1] == "--worker" for *_, argv in began)


@pytest.mark.slow
def test_a_worker_sees_all_gpus_of_its_node(job, tmp_path):
    job("--workers=2", "--gpus_per_node=2", "--time=5", "--wait")
    began = [event for event in events(tmp_path) if event[0] == "began"]
    seen = [(mine["SLURM_ARRAY_TASK_ID"], mine["SLURM_NTASKS"], mine["CUDA_VISIBLE_DEVICES"]) for _, _, mine, _ in began]
    assert sorted(seen) == [("0", "1", "0,1"), ("1", "1", "0,1")]
    assert all("--distributed" not in argv for *_, argv in began)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_the_real_run_on_two_tasks(cluster, tmp_path):
    """Two processes of one device each find each other by what SLURM says, train together, and the first reports."""
    folder = tmp_path / "c06"
    ours = ["--tasks_per_node=2", "--time=30", "--wait", f"--python={sys.executable}"]
    theirs = ["--experiment=experiments/c06_positional_encoding.py", "--scale=smoke", "--arms=rope", "--seeds=1"]
    root = str(pathlib.Path(__file__).parents[2])
    env = {name: value for name, value in cluster.items() if not name.startswith("PYTEST_")}
    env |= {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu", "LLM_JAX_CACHE": str(CACHE / "slurm")}
    env |= {"XLA_FLAGS": flags(QUICK | {"xla_force_host_platform_device_count": 1})}  # not the eight of these tests
    done = subprocess.run(
        [sys.executable, "-m", "launch.slurm", *ours, "--", *theirs, f"--workdir={folder}"],
        cwd=root,
        env=env,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    said = "\n".join(log.read_text() for log in (tmp_path / "c06-logs").glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + said
    assert (folder / "report.html").stat().st_size > 0
    assert f"0: report: {folder}/report.html" in said and "1: report:" not in said, "the first alone speaks"
    assert "--distributed" in (folder / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["time", "preemption"])
def test_a_job_that_is_stopped_saves_and_goes_on(job, cluster, tmp_path, reason):
    """Both tasks are told, save for longer than the time that srun would have given them, and go on in the job's second start."""
    words = {"time": ["--time=1", "--grace=50"], "preemption": ["--time=5", "--cpus_per_task=4"]}[reason]
    number = job("--tasks_per_node=2", *words, run=["--set=wait=true"])
    folder, pending = pathlib.Path(cluster["SLURM_CONF"]).parent, list[float]()

    def seen(event, restarts):
        return [each[:2] for each in events(tmp_path)].count([event, restarts])

    def ended():
        """A job that was queued again waits for two minutes, unless told otherwise.

        Nobody is told in the second in which the job's first start ended: slurmd takes a second one of that second for the first.
        """
        queue = ["squeue", "--noheader", f"--jobs={number}", "--format=%T"]
        if subprocess.run(queue, env=cluster, capture_output=True, text=True).stdout.strip() == "PENDING":
            pending.append(time.monotonic())
            if pending[-1] - pending[0] >= SECOND_START:
                subprocess.run(["scontrol", "update", f"JobId={number}", "StartTime=now"], env=cluster, capture_output=True)
        return seen("ended", 1) == 2

    wait(lambda: seen("began", 0) == 2, folder)
    if reason == "preemption":
        urgent = ["sbatch", "--partition=urgent", "--cpus-per-task=8", "--output=/dev/null", "--wrap=sleep 1"]
        subprocess.run(urgent, env=cluster, check=True, capture_output=True)
    wait(lambda: seen("saved", 0) == 2, folder, seconds=120)
    wait(ended, folder, seconds=200)
    assert (seen("began", 0), seen("told", 0), seen("began", 1), len(events(tmp_path))) == (2, 2, 2, 10)


@pytest.mark.slow
def test_one_job_of_an_array_is_told_alone(job, cluster, tmp_path):
    """The array's last job has the array's own number: signals sent by that number would reach all."""
    number = job("--workers=2", "--time=5", run=["--set=wait=true"])
    folder = pathlib.Path(cluster["SLURM_CONF"]).parent
    wait(lambda: len(events(tmp_path)) == 2, folder)
    subprocess.run(["scancel", "--batch", f"--signal={signal.SIGUSR1.value}", f"{number}_1"], env=cluster, check=True)
    wait(lambda: "saved" in [event for event, *_ in events(tmp_path)], folder)
    told = [mine["SLURM_ARRAY_TASK_ID"] for event, _, mine, _ in events(tmp_path) if event in ("told", "saved")]
    assert told == ["1", "1"]
    subprocess.run(["scancel", number], env=cluster, check=True)
