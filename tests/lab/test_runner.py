"""From a declaration to results on disk; killed at any moment, the same command again ends in the same numbers."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import jax
import numpy as np
import pytest

from llm_jax.core.paths import to_path
from llm_jax.io import checkpoint
from llm_jax.io.tracker import Tracker
from tests.forked import Forked
from tests.quick import QUICK, flags

EXPERIMENT = """
from llm_jax.data.corpora import TextFiles
from llm_jax.data.pipeline import Data
from llm_jax.lab import Ablation, Claim, Experiment
from llm_jax.lab.experiment import Checkpoints, Evaluation
from llm_jax.models.decoder import Decoder
from llm_jax.nn.multihead import Attention
from llm_jax.nn.position import Alibi, Rope
from llm_jax.train.pretrain import Train

ablation = Ablation(
    question="Which of two schemes learns faster?",
    base=Experiment(
        data=Data(corpus=TextFiles(path={text!r}), sequence_length=16, batch_size=4), model=Decoder(width=16, depth=1, attention=Attention(heads=2)),
        train=Train(steps=60, log_every=6), evaluation=Evaluation(every=12, bytes=512, lengths=(1, 2)), checkpoints=Checkpoints(every=6)),
    scientific={{"model.position": {{"rope": Rope(), "alibi": Alibi()}}}},
    nuisance={{"optimizer.learning_rate": (1e-3, 1e-2)}}, seeds=2,
    claims=[Claim("ALiBi is better", better="alibi", than="rope")],
)
"""


@pytest.fixture(scope="module")
def declared(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("declared")
    words = "the quick brown fox jumps over the lazy dog while many small numbers add up".split()
    lines = [" ".join(words[(i * k) % len(words)] for k in range(1, 9)) for i in range(600)]
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "two_schemes.py").write_text(EXPERIMENT.format(text=str(folder / "text.txt")))
    return folder / "two_schemes.py"


def command(declared, workdir, *flags):
    return [sys.executable, "-m", "llm_jax", "run", f"--experiment={declared}", f"--workdir={workdir}", *flags]


def environment(declared) -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu",
        "LLM_JAX_CACHE": str(declared.parent / "cache"),
        "XLA_FLAGS": flags(QUICK),
    }


def run(declared, workdir, *flags):
    return subprocess.run(
        command(declared, workdir, *flags), env=environment(declared), capture_output=True, text=True, timeout=300
    )


def outcomes(workdir):
    """Trial → everything in its results that does not depend on the clock."""
    found = {}
    for file in sorted((to_path(workdir) / "trials").glob("*/results.json")):
        result = json.loads(file.read_text())
        curve = {k: v for k, v in result["curve"].items() if k != "seconds"}
        found[result["trial"]] = (
            result["status"],
            result["arm"],
            result["phase"],
            result["seed"],
            result["nuisance"],
            result["metrics"],
            curve,
        )
    return found


@pytest.fixture(scope="module")
def finished(declared):
    workdir = declared.parent / "uninterrupted"
    done = run(declared, workdir)
    assert done.returncode == 0, done.stderr
    return workdir, done


def test_every_run_of_the_plan_is_written_down(finished):
    workdir, done = finished
    results = outcomes(workdir)
    assert len(results) == 2 * 2 * 1 + 2 * 2
    assert {r[0] for r in results.values()} == {"done"}
    assert all(json.loads(file.read_text())["lost"] == [] for file in workdir.glob("trials/*/results.json"))
    assert all({"valid/bits_per_byte", "valid/bits_per_byte@1x", "valid/bits_per_byte@2x"} <= set(r[5]) for r in results.values())
    tuning, final = ({r[3] for r in results.values() if r[2] == phase} for phase in ("tune", "final"))
    assert not tuning & final, "the seeds that choose must not be the seeds that are reported"
    for name in ("report.html", "report.md", "results.json", "ablation.json"):
        assert (workdir / name).is_file()
    assert "rope" in done.stdout and "alibi" in done.stdout


def test_one_counter_goes_through_tuning_and_fresh_seeds(finished):
    told = re.findall(r"^\[(\d+)/(\d+) runs\] .* · (tune|final)", finished[1].stderr, re.M)
    done = [int(before) for before, *_ in told]
    assert {(phase, of) for _, of, phase in told} == {("tune", "8"), ("final", "8")}
    assert done == sorted(done) and done[0] == 0 and min(int(before) for before, _, phase in told if phase == "final") == 4


def test_the_winner_has_the_best_tuning_metric(finished):
    results = list(outcomes(finished[0]).values())
    for arm in ("rope", "alibi"):
        tuned = min((r for r in results if r[1] == arm and r[2] == "tune"), key=lambda r: r[5]["valid/bits_per_byte"])
        assert {json.dumps(r[4]) for r in results if r[1] == arm and r[2] == "final"} == {json.dumps(tuned[4])}


def test_finished_trials_are_not_run_again(declared, finished):
    workdir, _ = finished
    before = {f: f.stat().st_mtime_ns for f in pathlib.Path(workdir, "trials").glob("*/results.json")}
    again = run(declared, workdir)
    assert again.returncode == 0, again.stderr
    assert before == {f: f.stat().st_mtime_ns for f in pathlib.Path(workdir, "trials").glob("*/results.json")}


@pytest.mark.slow
def test_killed_again_and_again_the_numbers_are_the_same(declared, finished, tmp_path):
    """By SIGKILL; SIGTERM has twenty moments of its own (`test_preemption.py`)."""
    expected, workdir, kills = outcomes(finished[0]), tmp_path / "killed", 0
    for attempt in range(40):
        process = Forked(command(declared, workdir), environment(declared), pathlib.Path(os.devnull))
        _wait_for_progress(process, workdir, seconds=0.3 * attempt)
        if process.poll() is not None:
            break
        process.kill()
        process.wait(timeout=60)
        kills += 1
    assert kills >= 5 and run(declared, workdir).returncode == 0
    assert outcomes(workdir) == expected


def _wait_for_progress(process, workdir, *, seconds: float) -> None:
    """Waits until the run wrote something new, and a little longer."""

    def newest() -> int:
        times = [0]
        for file in pathlib.Path(workdir).rglob("*"):
            with contextlib.suppress(FileNotFoundError):  # it has had another name since
                times.append(file.stat().st_mtime_ns)
        return max(times)

    start, deadline = newest(), time.monotonic() + 120
    while process.poll() is None and newest() == start and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(seconds)


def test_a_program_that_breaks_is_written_down_and_the_others_go_on(declared, tmp_path, monkeypatch):
    from llm_jax.lab import runner
    from llm_jax.lab.experiment import load
    from llm_jax.lab.workfolder import WorkFolder

    monkeypatch.setenv("LLM_JAX_CACHE", str(declared.parent / "cache"))
    compile_population = runner.compile_population

    def breaks_for_rope(experiment, *args, **kwargs):
        if type(experiment.model.position).__name__ == "Rope":
            raise MemoryError("the device has no more memory")
        return compile_population(experiment, *args, **kwargs)

    monkeypatch.setattr(runner, "compile_population", breaks_for_rope)
    notes: list[str] = []
    ablation = load(declared).changed(
        {"mesh.data": 1, "mesh.population": 8, "train.steps": 6, "train.log_every": 6, "evaluation.every": 6}
    )
    broken = runner.Runner(ablation, WorkFolder(tmp_path / "w"), note=notes.append)
    broken.run()
    states = {(r[1], r[0]) for r in outcomes(tmp_path / "w").values()}
    assert states == {("rope", "failed"), ("alibi", "done")} and broken.failures == 2
    assert any("no more memory" in note for note in notes)


def test_records_that_are_lost_are_told(declared, tmp_path, monkeypatch):
    from llm_jax.lab import group, report, runner
    from llm_jax.lab.experiment import load
    from llm_jax.lab.workfolder import WorkFolder

    monkeypatch.setenv("LLM_JAX_CACHE", str(declared.parent / "cache"))
    fit = group.fit

    def damaged(*given):
        final = fit(*given)
        (file,) = (tmp_path / "w" / "trials").glob("*/metrics.jsonl")
        first, _, last = file.read_text().splitlines()
        file.write_text(f"{first}\n#\n{last}\n")
        return final

    monkeypatch.setattr(group, "fit", damaged)
    changes = {"train.steps": 18, "evaluation.every": 18, "seeds": 1, "nuisance": {}}
    with pytest.warns(UserWarning, match=r"metrics.jsonl, line 2 is damaged"):
        (result,) = runner.Runner(load(declared).changed(changes).only(["rope"]), WorkFolder(tmp_path / "w")).run()
    assert result["lost"] == [12, 18] and result["curve"]["step"] == [6]
    told = f"rope, seed 0: the records of steps 12 to 18 are lost, since trials/{result['trial']}/metrics.jsonl in w was damaged"
    summary = report.write([tmp_path / "w"], tmp_path / "w")
    assert any(said.startswith(told) for said in summary.data["problems"])
    assert told in (tmp_path / "w" / "report.md").read_text()


def test_a_group_that_does_not_fit_is_tried_in_halves(declared, tmp_path, monkeypatch):
    from llm_jax.lab import group, runner
    from llm_jax.lab.experiment import load
    from llm_jax.lab.workfolder import WorkFolder

    monkeypatch.setenv("LLM_JAX_CACHE", str(declared.parent / "cache"))
    fit, tried = group.fit, []

    def room_for_two(program, *args):
        tried.append(program.members)
        if program.members > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")
        return fit(program, *args)

    monkeypatch.setattr(group, "fit", room_for_two)
    notes: list[str] = []
    ablation = load(declared).changed(
        {"mesh.data": 1, "mesh.population": 8, "train.steps": 6, "train.log_every": 6, "evaluation.every": 6, "seeds": 5}
    )
    small = runner.Runner(ablation.only(["rope"]), WorkFolder(tmp_path / "w"), note=notes.append)
    results = small.run()
    assert [r["status"] for r in results] == ["done"] * 7 and small.failures == 0
    assert tried == [2, 5, 2, 3, 1, 2] and [note.endswith("trying half of them at a time") for note in notes] == [True, True]


def test_a_folder_is_trained_into_by_one_process(declared, tmp_path):
    from llm_jax.lab.workfolder import WorkFolder

    with WorkFolder(tmp_path / "w").alone():
        second = run(declared, tmp_path / "w")
        assert second.returncode == 2 and "is in use by another run" in second.stderr, second.stderr
    assert not list((tmp_path / "w").iterdir())


@pytest.mark.parametrize("damaged", [False, True], ids=["whole", "newest checkpoint damaged"])
def test_a_group_whose_results_are_partly_written_is_the_same_group_again(declared, finished, damaged, tmp_path):
    shutil.copytree(finished[0], tmp_path / "w")
    if damaged:
        for state in (tmp_path / "w" / "groups").glob("*/checkpoints/60/state"):
            largest = max((f for f in state.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
            largest.write_bytes(largest.read_bytes()[:-1])
    finals = sorted((tmp_path / "w" / "trials").glob("rope-final-*/results.json"))
    kept, lost = finals[0], finals[1]
    lost.unlink()
    before = kept.stat().st_mtime_ns
    again = run(declared, tmp_path / "w")
    assert again.returncode == 0, again.stderr
    assert f"going on after step {54 if damaged else 60}" in again.stderr and kept.stat().st_mtime_ns == before
    assert ("the checkpoint of step 60 is damaged" in again.stderr) == damaged
    assert outcomes(tmp_path / "w") == outcomes(finished[0])


FULL_DISK = """
mount -t tmpfs -o size=6m tmpfs {disk} || exit 77
head -c {filler} /dev/zero > {disk}/filler
{command}; echo "first $?"
rm {disk}/filler
{command}; echo "second $?"
cp -r {disk}/work {out}
"""


@pytest.mark.slow
@pytest.mark.parametrize("room", [4_000, 200_000], ids=["none for records", "none for checkpoints"])
def test_on_a_full_disk_training_goes_on_and_nothing_is_lost(declared, finished, room, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    run = shlex.join(command(declared, disk / "work"))
    script = FULL_DISK.format(disk=disk, filler=6 * 2**20 - room, command=run, out=tmp_path)
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", script], env=environment(declared), capture_output=True, text=True
    )
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("this machine does not let us mount a small disk")
    first, second = (line.split()[1] for line in done.stdout.splitlines() if line.startswith(("first", "second")))
    assert first == "1" and second == "0", done.stderr
    assert "make room and run the same command again" in done.stderr, done.stderr
    assert f"{os.sep}llm_jax{os.sep}" not in done.stderr, "a traceback through our own code"  # Orbax's threads print theirs
    assert outcomes(tmp_path / "work") == outcomes(finished[0])


@pytest.mark.parametrize(
    "guard, kind",
    [
        ("SkipBad(deviations=0.5, decay=0.8, after=4)", "skipped"),
        ("RollBack(deviations=0.01, window=4, before=0, after=0, times=50)", "rolled back"),
    ],
)
def test_what_a_guard_left_out_is_told_with_its_text_and_reported(declared, tmp_path, monkeypatch, guard, kind):
    from llm_jax.core.written import override_text
    from llm_jax.lab import report, runner
    from llm_jax.lab.experiment import load
    from llm_jax.lab.workfolder import WorkFolder

    monkeypatch.setenv("LLM_JAX_CACHE", str(declared.parent / "cache"))
    short = {"nuisance": {}, "seeds": 1, "train.steps": 24, "train.log_every": 2, "checkpoints.every": 2}
    ablation = load(declared).only(["rope"]).changed(short)
    ablation = replace(ablation, base=override_text(ablation.base, [f"train.guard={guard}", "optimizer.learning_rate=0.03"]))
    (result,) = runner.Runner(ablation, WorkFolder(tmp_path / "w"), profiled=(2, 4)).run()
    (file,) = (tmp_path / "w").glob("trials/*/incidents.jsonl")
    lines, text = [json.loads(line) for line in file.read_text().splitlines()], (declared.parent / "text.txt").read_text()
    assert {line["kind"] for line in lines} == {kind} and len(result["incidents"]) == len(lines)
    for batch in (batch for line in lines for batch in line["batches"]):
        (corpus,) = batch["of"].values()
        assert len(corpus["rows"]) == len(corpus["documents"]) == 4
        assert all(len(begin) == 16 and begin.split("\x00")[0] in text for begin in corpus["begin"])
    report.write([tmp_path / "w"], tmp_path / "w")
    told = (tmp_path / "w" / "report.md").read_text()
    assert "rope: the guard left out" in told
    assert "## Where the time goes" in told and "| rope | 2–4 |" in told and (tmp_path / "w/profiles/rope/summary.json").is_file()


@pytest.mark.slow
def test_what_goes_on_elsewhere_and_comes_back_has_all_records(declared, tmp_path, monkeypatch):
    """The copies that it left behind are newer than the last checkpoint, and than what was recorded elsewhere."""
    from llm_jax.lab import group, runner
    from llm_jax.lab.experiment import load
    from llm_jax.lab.workfolder import WorkFolder

    class Dies(BaseException):
        pass

    def fit_until(program, feed, rhythm, session):
        def record(step, rows):
            inner(step, rows)
            if step == dies:
                raise Dies

        begun.clear()
        inner, rewind = session.record, session.rewind
        session.record, session.rewind = record, lambda step, recorded: (begun.append(step), rewind(step, recorded))
        return fit(program, feed, rhythm, session)

    monkeypatch.setenv("LLM_JAX_CACHE", str(declared.parent / "cache"))
    own, other = tmp_path / "near", tmp_path / "elsewhere"
    own.mkdir()
    other.mkdir()
    changes = {"train.steps": 24, "train.log_every": 2, "train.steps_per_dispatch": 1, "evaluation.every": 24}
    changes |= {"checkpoints.every": 10, "checkpoints.nearby": str(own), "checkpoints.nearby_every": 1}
    ablation = load(declared).only(["rope"]).changed({"nuisance": {}, "seeds": 1, **changes})
    fit, begun, compiled, found = group.fit, [], {}, []
    monkeypatch.setattr(group, "fit", fit_until)
    for folder, dies, begins in (("a", 18, 0), ("a", 14, 10), ("a", 0, 10), ("whole", 0, 0)):
        one = runner.Runner(ablation, WorkFolder(tmp_path / folder))
        one._compiled = compiled
        with pytest.raises(Dies) if dies else contextlib.nullcontext():
            found += one.run()
        assert begun == [begins]
        own.rename(tmp_path / "swapped")
        other.rename(own)
        (tmp_path / "swapped").rename(other)
    again, whole = ([{**r, "seconds": 0} for r in Tracker.read(next((tmp_path / f / "trials").iterdir()))] for f in ("a", "whole"))
    assert again == whole and len(again) == 12 and found[0]["metrics"] == found[1]["metrics"]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2], ids=["devices of one thread", "one device of several threads"])
def test_two_runs_give_the_same_bits(declared, tmp_path, threads):
    """Each compiles for itself, as a user's does: nothing is shared but the text."""
    finals, one = [], declared.with_name("one_run.py")
    one.write_text(declared.read_text() + "experiment = ablation.base\ndel ablation\n")
    for number in range(2):
        given = environment(declared) | {"LLM_JAX_CACHE": str(tmp_path / f"cache{number}")}
        given["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1" if threads > 1 else ""
        line = command(one, tmp_path / f"w{number}", "--deterministic", "--set=model.width=64")
        done = subprocess.run(line, env=given, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        (folder,) = (tmp_path / f"w{number}" / "groups").glob("*/checkpoints")
        finals.append(checkpoint.read(folder, {"params": None, "opt_state": None})[1])
    jax.tree.map(np.testing.assert_array_equal, *finals)
    assert outcomes(tmp_path / "w0") == outcomes(tmp_path / "w1")
