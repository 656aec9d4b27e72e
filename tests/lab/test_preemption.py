"""A run that is preempted over and over loses nothing: SIGTERM at twenty random moments, and the same command again each time."""

import itertools
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from llm_jax.io import checkpoint
from tests.forked import Forked, started
from tests.lab.test_runner import command, environment, outcomes, run

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
KILLS, STEPS = 20, 3000
WHILE_IMPORTING = """
import signal, sys
class Stops:
    def find_spec(self, name, path, target=None):
        if name == "jax._src.cloud_tpu_init":
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGTERM)
sys.meta_path.insert(0, Stops())
sys.argv = ["llm_jax", "run", "--workdir=none", "--experiment=" + sys.executable]
from llm_jax.__main__ import main
sys.exit(main())
"""


def test_one_that_is_stopped_while_it_imports_jax_does_not_ask_it_who_it_is():
    done = subprocess.run([sys.executable, "-c", WHILE_IMPORTING], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "stopped at once; the same command again goes on from what is saved\n")


@pytest.mark.slow
def test_twenty_preemptions_leave_the_numbers_as_they_are(tmp_path):
    (tmp_path / "text.txt").write_text("\n".join(f"{n} {n * n % 97} {n % 7}" for n in range(4000)))
    declared, chance, stopped, kills = tmp_path / "one_run.py", random.Random(5), set(), 0
    declared.write_text(EXPERIMENT.format(text=str(tmp_path / "text.txt"), steps=STEPS))
    assert run(declared, tmp_path / "whole").returncode == 0
    for number in itertools.count():  # a quick machine comes to the end before there were twenty
        workdir = tmp_path / f"preempted{number}"
        ends, told = _preempted(declared, workdir, chance, KILLS - kills)
        # what comes while Python itself is starting is answered by Python
        other = [(code, text) for code, text in ends if code and (code != -signal.SIGTERM or text)]
        assert not other, other
        at, begun = _steps(r"stopped at step (\d+);", ends), _steps(r"going on after step (\d+)", [*ends, (0, told)])
        assert begun == sorted(begun) and set(at) <= {*begun, STEPS}, "each goes on where the last one stopped"
        assert outcomes(workdir) == outcomes(tmp_path / "whole")
        jax.tree.map(np.testing.assert_array_equal, _final(workdir), _final(tmp_path / "whole"))
        kills, stopped = kills + len(ends), stopped | set(at)
        if kills == KILLS:
            break
    assert len(stopped) >= KILLS // 3


def _preempted(declared, workdir, chance: random.Random, most: int) -> tuple[list[tuple[int, str]], str]:
    """Code and words of each process that was stopped, at most so many, and the words of the one that finished.

    Those that are stopped early are commands, which Python starts first.
    """
    ends, ending = list[tuple[int, str]](), True
    while True:
        early, stops = len(ends) % 3 == 0, len(ends) < most
        files = [workdir.with_suffix(f".{len(ends)}.{name}") for name in ("out", "err")]
        process = (started if early and stops else Forked)(command(declared, workdir), environment(declared), *files)
        if stops:
            _wait(process, workdir, chance, early=early)
            ending = process.poll() is not None or _records(workdir) > STEPS // 50 - 10
            process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=300)
        said, told = (file.read_text() for file in files)
        if code == 0 and "report:" in said:
            assert ending or len(ends) == most, "a signal was lost"
            return ends, told
        ends.append((code, told))


def _steps(pattern: str, ends: list[tuple[int, str]]) -> list[int]:
    return [int(found[1]) for _, told in ends if (found := re.search(pattern, told))]


def _final(workdir: pathlib.Path):
    (folder,) = (workdir / "groups").glob("*/checkpoints")
    step, found = checkpoint.read(folder, {"params": None, "opt_state": None, "average": None})
    assert step == STEPS
    return found


def _wait(process: subprocess.Popen | Forked, workdir: pathlib.Path, chance: random.Random, *, early: bool) -> None:
    """Until some moment: of the first seconds, or of the training."""
    before = _records(workdir)
    deadline = time.monotonic() + (chance.uniform(0.5, 4.0) if early else 120)
    while process.poll() is None and time.monotonic() < deadline and (early or _records(workdir) <= before):
        time.sleep(0.01)
    time.sleep(0 if early else chance.uniform(0, 0.2))


def _records(workdir: pathlib.Path) -> int:
    return sum(file.read_text().count("\n") for file in workdir.glob("trials/*/metrics.jsonl"))
