"""A run that is preempted over and over loses nothing: SIGTERM at twenty random moments, and the same command again each time."""

import itertools
import pathlib
import random
import re
import signal
import subprocess
import time

import jax
import numpy as np
import pytest

from llm_jax.io import checkpoint
from tests.lab.test_runner import command, environment, outcomes

EXPERIMENT = """
from llm_jax.data.corpora import TextFiles
from llm_jax.data.pipeline import Data
from llm_jax.lab import Experiment
from llm_jax.lab.experiment import Checkpoints, Evaluation
from llm_jax.models.decoder import Decoder
from llm_jax.nn.multihead import Attention
from llm_jax.train.pretrain import Train

experiment = Experiment(
    data=Data(corpus=TextFiles(path={text!r}), sequence_length=32, batch_size=16),
    model=Decoder(width=32, depth=1, attention=Attention(heads=2)),
    train=Train(steps={steps}, log_every=50, average=0.99), evaluation=Evaluation(every=200, bytes=2048),
    checkpoints=Checkpoints(every={steps}))
"""
KILLS, STEPS = 20, 10_000


@pytest.mark.slow
def test_twenty_preemptions_leave_the_numbers_as_they_are(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"{n} {n * n % 97} {n % 7}" for n in range(4000)))
    (tmp_path / "one_run.py").write_text(EXPERIMENT.format(text=str(tmp_path / "text.txt"), steps=STEPS))
    declared, chance, ends = tmp_path / "one_run.py", random.Random(5), []
    for attempt in itertools.count():
        process = subprocess.Popen(
            command(declared, tmp_path / "preempted"),
            env=environment(declared),
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        if len(ends) < KILLS:
            _wait(process, tmp_path / "preempted", chance, early=attempt % 3 == 0)
            process.send_signal(signal.SIGTERM)
        told = process.communicate(timeout=300)[1]
        if "stopped" not in told and process.returncode == 0:
            break
        ends.append((process.returncode, told))
    assert len(ends) == KILLS
    # what comes while Python itself is starting is answered by Python
    assert all(code == 0 or (code == -signal.SIGTERM and not told) for code, told in ends), ends
    stopped = [int(found[1]) for _, told in ends if (found := re.search(r"stopped at step (\d+);", told))]
    begun = [int(found[1]) for _, told in [*ends, (0, told)] if (found := re.search(r"going on after step (\d+)", told))]
    assert len(set(stopped)) >= KILLS // 3 and begun == sorted(begun) and set(stopped) <= set(begun), (
        "each goes on where the last stopped"
    )
    plain = subprocess.run(
        command(declared, tmp_path / "whole"), env=environment(declared), capture_output=True, text=True, timeout=300
    )
    assert plain.returncode == 0, plain.stderr
    assert outcomes(tmp_path / "preempted") == outcomes(tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, _final(tmp_path / "preempted"), _final(tmp_path / "whole"))


def _final(workdir: pathlib.Path):
    (folder,) = (workdir / "groups").glob("*/checkpoints")
    step, found = checkpoint.read(folder, {"params": None, "opt_state": None, "average": None})
    assert step == STEPS
    return found


def _wait(process: subprocess.Popen, workdir: pathlib.Path, chance: random.Random, *, early: bool) -> None:
    """Until some moment: of the first seconds, or of the training."""
    before = _records(workdir)
    deadline = time.monotonic() + (chance.uniform(0.5, 4.0) if early else 120)
    while process.poll() is None and time.monotonic() < deadline and (early or _records(workdir) <= before):
        time.sleep(0.01)
    time.sleep(0 if early else chance.uniform(0, 0.2))


def _records(workdir: pathlib.Path) -> int:
    return sum(file.read_text().count("\n") for file in workdir.glob("trials/*/metrics.jsonl"))
