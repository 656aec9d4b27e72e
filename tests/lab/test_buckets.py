"""A work folder in a bucket: processes and workers train into it together, are killed and go on, and it ends as on a disk."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from llm_jax.core.config import ConfigError
from llm_jax.core.paths import to_path
from llm_jax.lab.workfolder import WorkFolder
from tests.lab import test_processes as processes
from tests.lab import test_workers as workers
from tests.lab.test_processes import no_leftovers  # noqa: F401
from tests.lab.test_runner import declared  # noqa: F401


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
    whole = processes.ended(processes.start(2, disk, steps=80), disk)
    both = processes.start(2, log, f"--workdir={bucket}", steps=80)
    processes.until(lambda: list(far.glob("groups/*/checkpoints/*/checksums.json*")))
    both[1].kill()
    assert both[0].wait(processes.DEADLINE) not in (0, -signal.SIGKILL)
    assert processes.ended(processes.start(2, log, f"--workdir={bucket}", steps=80), far)["metrics"] == whole["metrics"]
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
