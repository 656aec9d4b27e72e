"""A work folder in a bucket: processes and workers train into it together, are killed and go on, and it ends as on a disk."""

import json
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from llm_jax.core.config import ConfigError
from llm_jax.core.paths import to_path
from llm_jax.lab.workfolder import WorkFolder
from tests.cli.outcome import outcome
from tests.forked import Forked
from tests.lab import test_processes as processes
from tests.lab import test_scaling as scaling
from tests.lab import test_workers as workers
from tests.lab.test_processes import no_leftovers  # noqa: F401
from tests.lab.test_runner import command, declared, environment, outcomes, run  # noqa: F401


def test_what_is_no_folder_and_no_bucket_is_a_sentence(bucket):
    with pytest.raises(ConfigError, match="s3://b/runs must be a folder of this machine, which may be mounted, or one in a bucket"):
        WorkFolder("s3://b/runs")
    none = WorkFolder("gs://no-such-bucket/runs").alone()
    with pytest.raises(ConfigError, match=r"gs://no-such-bucket/runs cannot be reached \(.+\): `gcloud"), none:
        pass
    with WorkFolder(bucket).alone():
        pass


def test_a_bucket_that_does_not_answer_is_not_waited_for_long():
    code = "from llm_jax.core import paths; paths.ANSWER = 0.5\nwith paths.reaching('gs://a-bucket/runs'): print('reached')"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = f"http://127.0.0.1:{silent.getsockname()[1]}"
        env = os.environ | {
            "STORAGE_EMULATOR_HOST": place,
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert "gs://a-bucket/runs cannot be reached (no answer within 0.5 s): `gcloud" in done.stderr and not done.stdout


@pytest.mark.slow
def test_two_processes_killed_and_started_again_end_as_on_a_disk(bucket, tmp_path):
    disk, log, far = tmp_path / "disk", tmp_path / "far", to_path(bucket)
    whole = processes.ended(processes.start(2, disk, steps=40), disk)
    both = processes.start(2, log, f"--workdir={bucket}", steps=40)
    processes.until(lambda: list(far.glob("groups/*/checkpoints/*/checksums.json*")))
    both[1].kill()
    assert both[0].wait(processes.DEADLINE) not in (0, -signal.SIGKILL)
    assert processes.ended(processes.start(2, log, f"--workdir={bucket}", steps=40), far)["metrics"] == whole["metrics"]
    assert "going on after step" in processes.said(log, 0)
    assert processes.records(far) == processes.records(disk)
    assert (far / "report.html").exists()


@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_make_what_one_makes_on_a_disk(declared, bucket, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(workers, "STEPS", 24)
    monkeypatch.setattr(workers, "FLAGS", ("--worker", "--lease=10", "--population=1", "--set=train.steps=24"))
    far, disk, logs = to_path(bucket), tmp_path / "disk", [tmp_path / f"{i}.log" for i in range(3)]
    assert workers.start(declared, disk, logs[2]).wait(timeout=600) == 0, logs[2].read_text()
    both = [workers.start(declared, bucket, log) for log in logs[:2]]
    workers.wait_until(lambda: len(list(far.glob("trials/*/results.json"))) >= 2)
    both[1].kill()
    assert both[0].wait(timeout=600) == 0, logs[0].read_text()
    workers.check(far, disk)
    claims = [json.loads(file.read_text()) for file in (far / "shared" / "claims").glob("*.json")]
    assert len({claim["worker"] for claim in claims}) == 2


SHORT = ("--arms=rope", "--seeds=1", "--population=1")


@pytest.mark.slow
def test_a_worker_that_stood_still_leaves_its_successors_records_alone(declared, bucket, tmp_path, monkeypatch):  # noqa: F811
    """It stands still while it trains, and goes on when another has gone on with its group."""
    monkeypatch.setattr(workers, "STEPS", 96)
    monkeypatch.setattr(workers, "FLAGS", ("--worker", "--lease=6", "--set=train.steps=96", "--set=checkpoints.every=24", *SHORT))
    far, disk, logs = to_path(bucket), tmp_path / "disk", [tmp_path / f"{i}.log" for i in range(3)]
    assert workers.start(declared, disk, logs[2]).wait(timeout=600) == 0, logs[2].read_text()
    first = workers.start(declared, bucket, logs[0])
    workers.wait_until(lambda: list(far.glob("groups/*/checkpoints/24/checksums.json")))
    first.send_signal(signal.SIGSTOP)
    second = workers.start(declared, bucket, logs[1])
    workers.wait_until(lambda: "going on after step" in logs[1].read_text())
    first.send_signal(signal.SIGCONT)
    assert (first.wait(timeout=600), second.wait(timeout=600)) == (0, 0), [log.read_text()[-2000:] for log in logs]
    assert workers.check(far, disk, trials=3) >= 1
    assert "taking it over" in logs[1].read_text() and "left to whoever claims it next" in logs[0].read_text()


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_goes_on_at_once_to_what_a_disk_has(declared, bucket, tmp_path):  # noqa: F811
    flags, log = ("--set=train.steps=600", "--set=checkpoints.every=600", *SHORT), tmp_path / "log"
    whole = run(declared, tmp_path / "disk", *flags)
    assert whole.returncode == 0, whole.stderr
    line = command(declared, bucket, *flags)
    process = Forked(line, environment(declared), log)
    processes.until(lambda: "step 6/600" in log.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(processes.DEADLINE) == 0
    (step,) = re.findall(r"stopped at step (\d+); the same command again goes on from there", log.read_text())
    assert 0 < int(step) < 600
    assert Forked(line, environment(declared), log).wait(300) == 0, log.read_text()
    assert f"going on after step {step}\n" in log.read_text() and "waiting for a sign of life" not in log.read_text()
    assert outcomes(bucket) == outcomes(tmp_path / "disk")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")  # gcsfs to aiohttp, a trace
def test_commands_that_read_and_write_a_work_folder_do_so_in_a_bucket(declared, bucket, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setenv("LLM_JAX_CACHE", str(declared.parent / "cache"))
    flags = [f"--experiment={declared}", f"--workdir={bucket}/run", "--arms=rope", "--set=train.steps=12", "--set=mesh.data=1"]
    code, out, err = outcome("run", [*flags, "--set=mesh.population=8", "--profile=2:4", "--seeds=1"], monkeypatch, capsys)
    assert code == 0 and out.endswith(f"report: {bucket}/run/report.html"), err
    assert "## Where the time goes" in (far := to_path(bucket) / "run" / "report.md").read_text()
    assert json.loads((far.parent / "profiles" / "rope" / "summary.json").read_text())
    asked = [f"--model={bucket}/run", "--text=the quick", "--show=lens,embeddings"]
    code, out, err = outcome("inspect", [*asked, f"--out={bucket}/inside"], monkeypatch, capsys)
    assert (code, err) == (0, "") and out.endswith(f"The page: {bucket}/inside/inspection.html")
    assert {"inspection.html", "lens_tokens.png"} <= {file.name for file in (to_path(bucket) / "inside").iterdir()}
    scaling.folder(to_path(bucket) / "sizes", scaling.RATIO, seeds=1)
    code, out, err = outcome("fit", [f"--workdir={bucket}/sizes", "--draws=20"], monkeypatch, capsys)
    assert (code, err) == (0, "") and out.endswith(f"The page: {bucket}/sizes/fit/fit.html")
    assert {"fit.html", "fit.json", "law.png"} <= {file.name for file in (to_path(bucket) / "sizes" / "fit").iterdir()}
