"""Several processes finish one ablation: whoever is killed, stopped or slow, the results are those of one."""

import json
import os
import pathlib
import random
import signal
import time

import pytest

from llm_jax.core.config import ConfigError
from llm_jax.lab import group, runner
from llm_jax.lab.experiment import load
from llm_jax.lab.workfolder import WorkFolder
from tests.forked import Forked
from tests.lab.test_runner import command, declared, environment, outcomes  # noqa: F401
from tests.quick import QUICK, flags

STEPS = 120
FLAGS = ("--worker", "--lease=6", "--population=1", f"--set=train.steps={STEPS}")


def start(declared, workdir, log: pathlib.Path) -> Forked:  # noqa: F811
    one_device = {"XLA_FLAGS": flags(QUICK | {"xla_force_host_platform_device_count": 1})}
    return Forked(command(declared, workdir, *FLAGS), environment(declared) | one_device, pathlib.Path(os.devnull), log)


@pytest.fixture(scope="module")
def one(declared):  # noqa: F811
    """What a single worker makes of it."""
    workdir = declared.parent / "one"
    assert start(declared, workdir, declared.parent / "one.log").wait(timeout=600) == 0, (declared.parent / "one.log").read_text()
    return workdir


def reported(workdir):
    """The report's numbers, but for the time that they took and where that was."""
    data = json.loads((workdir / "results.json").read_text())
    for row in data["arms"]:
        del row["seconds"]
    assert (workdir / "report.md").is_file() and (workdir / "report.html").is_file()
    return {key: value for key, value in data.items() if key != "provenance"}


def check(workdir, one, trials=8):
    """Nothing is lost, nothing was done twice, and all is as one worker made it."""
    assert outcomes(workdir) == outcomes(one) and len(outcomes(one)) == trials
    assert reported(workdir) == reported(one)
    claims = [json.loads(file.read_text()) for file in (workdir / "shared" / "claims").glob("*.json")]
    assert sum(claim["outcome"] == "done" for claim in claims) == trials
    for trial in (workdir / "trials").iterdir():
        steps = [json.loads(line)["step"] for line in (trial / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(6, STEPS + 1, 6)), trial
    return len(claims) - trials


def wait_until(true, *, seconds=300.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def recorded(workdir, worker: Forked) -> int:
    """How many records there are of the trial that a worker is training."""
    shared = workdir / "shared"
    groups = {k: v for file in shared.glob("groups/*.json") for k, v in json.loads(file.read_text())["groups"].items()}
    for file in shared.glob("claims/*.json"):
        claim = json.loads(file.read_text())
        if claim["outcome"] is None and claim["worker"].split("-")[-2] == str(worker.pid):
            records = workdir / "trials" / groups[file.name.split(".")[0]][0] / "metrics.jsonl"
            return records.read_text().count("\n") if records.is_file() else 0
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_four_workers_two_of_them_killed_at_random_make_what_one_makes(declared, one, seed, tmp_path):  # noqa: F811
    chance, workdir = random.Random(seed), tmp_path / "w"
    logs = [tmp_path / f"{i}.log" for i in range(4)]
    workers = [start(declared, workdir, log) for log in logs]
    wait_until(lambda: list(workdir.glob("trials/*/metrics.jsonl")))
    anywhere, training = chance.sample(workers, 2)
    time.sleep(chance.uniform(0.0, 5.0))
    anywhere.kill()
    steps = chance.randrange(3, 12)  # of 20 records
    wait_until(lambda: steps <= recorded(workdir, training) < 15)
    training.kill()
    codes = [worker.wait(timeout=600) for worker in workers]
    assert sorted(codes) == [-signal.SIGKILL, -signal.SIGKILL, 0, 0], [log.read_text()[-2000:] for log in logs]
    taken_over = check(workdir, one)
    assert 1 <= taken_over == sum(log.read_text().count("taking it over") for log in logs)
    assert any("going on after step" in log.read_text() for log in logs)


@pytest.mark.slow
def test_a_worker_that_stood_still_for_longer_than_its_lease_leaves_its_group_to_the_other(declared, one, tmp_path):  # noqa: F811
    workdir, logs = tmp_path / "w", [tmp_path / "0.log", tmp_path / "1.log"]
    first = start(declared, workdir, logs[0])
    wait_until(lambda: any(file.read_text().count("\n") >= 3 for file in workdir.glob("trials/*/metrics.jsonl")))
    first.send_signal(signal.SIGSTOP)
    second = start(declared, workdir, logs[1])
    wait_until(lambda: "taking it over" in logs[1].read_text())
    first.send_signal(signal.SIGCONT)
    assert (first.wait(timeout=600), second.wait(timeout=600)) == (0, 0), [log.read_text()[-2000:] for log in logs]
    assert check(workdir, one) >= 1
    assert "left to whoever claims it next" in logs[0].read_text() and "going on after step" in logs[1].read_text()


def test_a_worker_that_lapses_in_the_middle_of_training_goes_on_from_its_checkpoint(declared, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("LLM_JAX_CACHE", str(declared.parent / "cache"))
    eight = {"mesh.data": 1, "mesh.population": 8}
    ablation = load(declared).only(["rope"]).changed({"nuisance": {}, "train.steps": 24, "seeds": 1, **eight})
    undisturbed = runner.Runner(ablation, WorkFolder(tmp_path / "expected"), note=print)
    expected = undisturbed.run()
    notes: list[str] = []
    worker = runner.Runner(ablation, WorkFolder(tmp_path / "w"), lease=60.0, note=notes.append)
    worker._compiled = undisturbed._compiled
    fit, lapsed = group.fit, []

    def lapses(program, feed, rhythm, session):
        def record(step, rows):
            inner(step, rows)
            if step == 12 and not lapsed:
                lapsed.append(step)
                worker.schedule.crew._lapsed.set()

        inner, session.record = session.record, record
        return fit(program, feed, rhythm, session)

    monkeypatch.setattr(group, "fit", lapses)
    assert [r["metrics"] for r in worker.run()] == [r["metrics"] for r in expected] and worker.failures == 0
    assert outcomes(tmp_path / "w") == outcomes(tmp_path / "expected")
    assert lapsed and sum("claims it next" in note for note in notes) == 1


def test_a_worker_leaves_nothing_in_a_folder_of_something_else(declared, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("LLM_JAX_CACHE", str(declared.parent / "cache"))
    (tmp_path / "thesis.tex").write_text("years of work")
    ablation = load(declared).changed({"mesh.data": 1, "mesh.population": 8})
    with pytest.raises(ConfigError, match="is not empty and holds no ablation"):
        runner.Runner(ablation, WorkFolder(tmp_path), lease=60.0).run()
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_is_shared_by_workers_or_one_run_has_it(tmp_path):
    folder = WorkFolder(tmp_path)
    two = folder.alone(workers=True), folder.alone(workers=True)
    with two[0], two[1], pytest.raises(ConfigError, match="in use by another run"), folder.alone():
        pass
    with folder.alone(), pytest.raises(ConfigError, match="a run that is no --worker"), folder.alone(workers=True):
        pass
