"""What gcloud is told, machines that are taken away and made again, and the scripts of the hosts, run here."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time

import pytest

from launch import accelerators, tpu
from launch.command import ROOT, TEMPLATES, LaunchError, Shell
from launch.queued import ALIVE
from tests.launch.conftest import launched
from tests.launch.shell import check

AWKWARD = ["--set=model.name=\"a 'b' $HOME `c`\\d\"", "--set=text=two\nlines", "--set=empty="]
RUN = ("--workdir=gs://bucket/w", *AWKWARD)
HERE = ["--name=c06", "--zone=us-west4-a", "--project=lab", "--poll=0"]
PLACE = ["--zone=us-west4-a", "--project=lab"]
QUEUED = ["gcloud", "compute", "tpus", "queued-resources"]


def actions(programs):
    """What was done, a word a call: the action, or which script of ours a host was to run."""
    kinds = {"tail -n": "follow", "run.command || true": "going?", "uv pip": "install", "setsid": "start", "ended with": "await"}
    words = []
    for call in programs.calls():
        action = call[call.index("queued-resources") + 1] if "queued-resources" in call else call[call.index("tpu-vm") + 1]
        if action == "ssh":
            command = next(word for word in call if word.startswith("--command="))
            action = next(kind for part, kind in kinds.items() if part in command)
        words.append(action)
    return words


def test_from_nothing_to_the_end(programs, capsys):
    programs.answer("describe", "ERROR: NOT_FOUND: no such resource", code=1, times=1)
    programs.answer("describe", "WAITING_FOR_RESOURCES", times=2)
    programs.answer("describe", "ACTIVE")
    programs.answer("tpu-vm list", "c06\tREADY\nother-c06\tPREEMPTED\nc06-other\tPREEMPTED\n")
    programs.answer("ended with", "ended with 0\nended with 0\n")
    assert launched(tpu, "run", *HERE, "--topology=v5e:16x16", "--capacity=spot", "--delete_after", run=RUN) == 0
    looks = ["describe"] * 3 + ["list"]
    assert actions(programs) == [
        *["describe", "create", *looks],
        *["going?", "scp", "install", "start", "follow", "await", "delete"],
    ]
    calls = programs.calls()
    named = ["--node-id=c06", "--runtime-version=v2-alpha-tpuv5-lite", *PLACE, "--accelerator-type=v5litepod-256", "--spot"]
    assert calls[1] == [*QUEUED, "create", "c06", *named]
    assert calls[-1] == [*QUEUED, "delete", "c06", "--force", "--quiet", *PLACE]
    for call in calls[7:10]:
        assert "--node=all" in call and "--worker=all" in call and call[-2:] == PLACE
    assert "WAITING_FOR_RESOURCES" in capsys.readouterr().err


def test_slices_and_three_axes(programs):
    programs.answer("describe", "NOT_FOUND", code=1, times=1)
    programs.answer("describe", "ACTIVE")
    words = ["--topology=v5p:4x4x8", "--slices=2", "--capacity=reserved", "--create=--network=lab net", "--image=mine"]
    assert launched(tpu, "create", *HERE, *words, run=()) == 0
    named = ["--node-count=2", "--node-prefix=c06", "--runtime-version=mine", *PLACE, "--type=v5p", "--topology=4x4x8"]
    alpha = ["gcloud", "alpha", *QUEUED[1:]]
    assert programs.calls()[1] == [*alpha, "create", "c06", *named, "--reserved", "--network=lab net"]


LOST = {
    "the connection broke": [("ended with", "", 255, 1), ("describe", "ACTIVE", 0, 1), ("describe", "SUSPENDED", 0, 1)],
    "it saved": [("ended with", "ended with 143\n", 0, 1), ("describe", "ACTIVE", 0, 2), ("describe", "SUSPENDING", 0, 1)],
    "a node was taken": [
        ("ended with", "ended with 1\nended with 143", 0, 1),
        ("tpu-vm list", "c06\tREADY", 0, 1),
        ("tpu-vm list", "c06\tPREEMPTED", 0, 1),
        ("describe", "ACTIVE", 0, 2),
    ],
    "before it began": [("setsid", "", 255, 1), ("describe", "ACTIVE", 0, 1), ("describe", "SUSPENDED", 0, 1)],
    "before the code was there": [("scp", "", 1, 1), ("describe", "ACTIVE", 0, 1), ("describe", "FAILED", 0, 1)],
    "while it was waited for": [("describe", "NOT_FOUND", 1, 1), ("describe", "PROVISIONING", 0, 1), ("describe", "FAILED", 0, 2)],
}


def test_a_slice_that_is_taken_away(programs, capsys):
    """One of the two nodes of this resource, not that of another whose name looks like it."""
    programs.answer("describe", "ACTIVE")
    programs.answer("tpu-vm list", "c06-0\tREADY\nc06-1\tPREEMPTED\nc06-2\tSTOPPED\nc06\tTERMINATED\n")
    assert launched(tpu, "status", *HERE, "--slices=2", run=()) == 0 and capsys.readouterr().out == "PREEMPTED\n"
    assert launched(tpu, "status", *HERE, run=()) == 0 and capsys.readouterr().out == "TERMINATED\n"
    assert launched(tpu, "status", "--name=c0", *HERE[1:], run=()) == 0 and capsys.readouterr().out == "ACTIVE\n"


@pytest.mark.parametrize("before,capacity", [*((case, "spot") for case in LOST), ("it saved", "on-demand")])
def test_machines_that_are_taken_away_are_made_again(programs, before, capacity, capsys):
    for pattern, says, code, times in LOST[before]:
        programs.answer(pattern, says, code, times)
    programs.answer("describe", "NOT_FOUND", code=1, times=1)
    programs.answer("describe", "ACTIVE")
    programs.answer("ended with", "ended with 0\n")
    assert launched(tpu, "run", *HERE, "--topology=v5e:4x4", f"--capacity={capacity}", "--retries=1", run=RUN) == 0
    done = actions(programs)
    assert done.count("delete") == 1
    again = done[done.index("delete") + 1 :]
    assert [word for word in again if word not in ("describe", "list")] == [
        *["create", "going?", "scp", "install", "start", "follow", "await"]
    ]
    assert "retries left: 1" in capsys.readouterr().err


def test_retries_end(programs, capsys):
    programs.answer("describe", "FAILED")
    assert launched(tpu, "run", *HERE, "--topology=v5e:4x4", "--retries=2", run=RUN) == 2
    assert actions(programs).count("create") == 3
    assert "taken away 3 times" in capsys.readouterr().err


def test_a_run_that_fails_is_not_tried_again(programs):
    programs.answer("describe", "ACTIVE")
    programs.answer("ended with", "ended with 0\nended with 7\n")
    assert launched(tpu, "run", *HERE, "--topology=v5e:4x4", run=RUN) == 7
    assert not {"delete", "create"} & set(actions(programs))


def test_a_run_that_was_stopped_by_hand_ends(programs):
    programs.answer("describe", "ACTIVE")
    programs.answer("ended with", "ended with 143\n")
    assert launched(tpu, "run", *HERE, "--topology=v5e:4x4", "--capacity=spot", run=RUN) == 143
    assert "delete" not in actions(programs)


def test_a_broken_connection_is_taken_up_again(programs, capsys):
    programs.answer("describe", "ACTIVE")
    programs.answer("ended with", "", code=255, times=1)
    programs.answer("ended with", "ended with 0\n")
    assert launched(tpu, "run", *HERE, "--topology=v5e:4x4", run=RUN) == 0
    assert actions(programs).count("start") == 1 and actions(programs).count("follow") == 2


def test_the_same_command_follows_what_is_going_on(programs, capsys):
    programs.answer("describe", "ACTIVE")
    command = [".venv/bin/python", "-m", "llm_jax", "run", *RUN, "--distributed"]
    programs.answer("run.command \\|\\| true", " ".join(command))
    programs.answer("ended with", "ended with 0\n")
    assert launched(tpu, "run", *HERE, "--topology=v5e:4x4", run=RUN) == 0
    assert not {"scp", "install", "start"} & set(actions(programs))
    assert launched(tpu, "run", *HERE, "--topology=v5e:4x4", run=(*RUN, "--seeds=2")) == 2
    assert "another run is going on on c06" in capsys.readouterr().err


def test_other_verbs(programs, capsys):
    programs.answer("describe", "ACTIVE")
    assert launched(tpu, "status", *HERE, run=()) == 0 and capsys.readouterr().out == "ACTIVE\n"
    assert launched(tpu, "stop", *HERE, run=()) == 0
    assert launched(tpu, "delete", *HERE, run=()) == 0
    ssh = ["--node=all", "--worker=all", '--command=kill -TERM "$(cat llm_jax/run.pid)"', ALIVE, *PLACE]
    assert programs.calls()[-2:] == [[*QUEUED, "ssh", "c06", *ssh], [*QUEUED, "delete", "c06", "--force", "--quiet", *PLACE]]


def test_dry_run_tells_it_all_and_calls_nothing(programs, capsys):
    assert launched(tpu, "run", *HERE, "--topology=v5e:4x4", "--dry_run", run=RUN) == 0
    out = capsys.readouterr().out
    assert not programs.calls()
    told = ["create c06", "describe c06", "scp", "uv pip install", "setsid nohup", "tail -n +1", "ended with"]
    assert [out.index(part) for part in told] == sorted(out.index(part) for part in told)


@pytest.mark.parametrize(
    "words,run,sentence",
    [
        (["run", "--topology=v5e:4x4"], ("--workdir=runs/w",), "--workdir=runs/w is on the disk of machines that go away"),
        (["run"], RUN, "--topology is missing"),
        (["run", "--name=c 06;rm", "--topology=v5e:4x4"], RUN, "--name=c 06;rm: write at most 63 small letters"),
        (["run", "--topology=v5:4x4"], RUN, "no TPU 'v5' (did you mean v5"),
        (["run", "--topology=v5e:4x4x4"], RUN, "slices of v5e have 2 axes, as in v5e:16x16"),
        (["run", "--topology=v5e:3x5"], RUN, "--topology=v5e:3x5 does not exist: the nearest are v5e:4x4, v5e:2x4, v5e:4x8"),
        (["run", "--topology=tpu7x:4x4x4"], RUN, "the Cloud TPU API has no tpu7x: use python -m launch.gke"),
        (["run", "--topology=v5e:4x4", "--capacity=cheap"], RUN, "cheap"),
        (
            ["run", "--topology=v5e:4x4", "--worker"],
            RUN,
            "--worker: a worker is one process, and --topology=v5e:4x4 --slices=1 makes it 4",
        ),
        (["create", "--topology=v5e:2x2", "--slices=2", "--worker"], (), "give it one slice of one host, as in --topology=v5e:2x2"),
        (["walk"], RUN, "error: python -m launch.tpu begins with one of run, create, status, logs, stop, delete, got 'walk'"),
        (["delete", "now"], (), "error: python -m launch.tpu takes flags only, got 'now'"),
        (["delete"], RUN, "delete runs nothing: leave out what stands after --"),
    ],
)
def test_mistakes_are_told(programs, capsys, words, run, sentence):
    assert launched(tpu, words[0], *HERE, *words[1:], run=run) == 2
    assert sentence in capsys.readouterr().err
    assert not programs.calls()


def test_what_gcloud_refuses_is_told(programs, capsys):
    programs.answer("describe", "", code=1)
    assert launched(tpu, "status", *HERE, run=()) == 2
    assert "gcloud does not say how c06 is" in capsys.readouterr().err


# ── on the hosts ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture
def host(tmp_path):
    """A home folder with the code's templates, whose interpreter is a program of the test's; runs lines of shell there."""
    home = tmp_path / "home"
    shutil.copytree(TEMPLATES, home / "llm_jax" / "launch" / "templates")
    interpreter = home / "llm_jax" / ".venv" / "bin" / "python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(
        f"#!{sys.executable}\n"
        "import json, os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved', flush=True), sys.exit(0)))\n"
        "pathlib.Path('argv').write_text(json.dumps([sys.argv[1:], os.environ.get('A')]))\n"
        "print('began', flush=True)\n"
        "time.sleep(float(os.environ.get('WAIT', 0)))\n"
        "sys.exit(int(os.environ.get('CODE', 0)))\n"
    )
    interpreter.chmod(0o755)

    def run(line, **env):
        return subprocess.run(
            ["bash", "-c", line], env=os.environ | {"HOME": str(home)} | env, cwd=home, capture_output=True, text=True
        )

    run.home = home
    return run


def until(done, seconds=10):
    """Waits until a file of the host's is there."""
    for _ in range(int(seconds / 0.05)):
        if done():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come")


def lines(capsys, *words):
    """The lines that hosts are given for a run, and for its stop, as a dry run prints them: part of it → line."""
    assert launched(tpu, "run", *HERE, "--topology=v5e:2x4", "--env=A=b c$d", "--worker", "--dry_run", *words, run=RUN) == 0
    assert launched(tpu, "stop", *HERE, "--dry_run", run=()) == 0
    printed = [word for word in shlex.split(capsys.readouterr().out) if word.startswith("--command=")]
    parts = "uv pip", "setsid", "tail -n", "ended with", "kill -TERM", "|| true"
    return {part: next(word for word in printed if part in word).removeprefix("--command=") for part in parts}


def test_a_host_runs_the_words_verbatim(host, capsys):
    line = lines(capsys)
    check(line["setsid"])
    begun = host(line["setsid"], CODE="5")
    assert begun.returncode == 0, begun.stderr
    assert host(line["ended with"]).stdout == "ended with 5\n"
    assert host(line["tail -n"]).stdout == "began\n"
    told, value = json.loads((host.home / "llm_jax" / "argv").read_text())
    assert told == ["-m", "llm_jax", "run", *RUN, "--worker"] and value == "b c$d"
    assert host(line["|| true"]).stdout == ""


def test_a_host_that_is_stopped_lets_the_run_save_and_says_so(host, capsys):
    line = lines(capsys)
    assert host(line["setsid"], WAIT="60").returncode == 0
    until(lambda: "began" in (host.home / "llm_jax" / "run.log").read_text())
    wanted = " ".join(["env", "A=b c$d", ".venv/bin/python", "-m", "llm_jax", "run", *RUN, "--worker"])
    assert host(line["|| true"]).stdout == wanted + "\n"
    again = host(line["setsid"])
    assert again.returncode == 3 and "a run is going on here already" in again.stderr
    assert host(line["kill -TERM"]).returncode == 0
    assert host(line["ended with"]).stdout == "ended with 143\n"
    assert host(line["tail -n"]).stdout == "began\nsaved\n"


def test_the_code_is_copied_and_installed(host, tmp_path, capsys):
    """The archive is the working tree without what git ignores; installing it keeps the environment and nothing else."""
    seen, install = tmp_path / "seen.tar.gz", lines(capsys)["uv pip"]
    tpu.pack(Shell(), seen, None)
    with tarfile.open(seen) as tar:
        names = set(tar.getnames())
    assert {"setup.py", "llm_jax/__main__.py", "launch/tpu.py", "launch/templates/until_stopped.sh"} <= names
    assert not [name for name in names if name.startswith((".venv", ".git/", "runs/")) or name.endswith(".pyc")]
    shutil.copy(seen, host.home / "llm_jax.tar.gz")
    (host.home / "llm_jax" / "left over").touch()
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text('#!/bin/bash\nprintf "%s|" "$@"\n')
    uv.chmod(0o755)
    check(install)
    done = host(install, PATH=f"{uv.parent}{os.pathsep}{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    pip = "pip|install|--quiet|--python|.venv/bin/python|-e|.[tpu,data]|"
    assert done.stdout == f"venv|--quiet|--allow-existing|--python|3.12|{pip}"
    assert (host.home / "llm_jax" / ".venv" / "bin" / "python").exists() and (host.home / "llm_jax" / "setup.py").exists()
    assert not (host.home / "llm_jax" / "left over").exists()


def test_a_commit_is_packed(tmp_path):
    tpu.pack(Shell(), tmp_path / "code.tar.gz", "HEAD")
    with tarfile.open(tmp_path / "code.tar.gz") as tar:
        tracked = subprocess.run(["git", "ls-tree", "-r", "--name-only", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
        assert {member.name for member in tar.getmembers() if member.isfile()} == set(tracked.splitlines())


def test_code_that_is_no_clone(tmp_path, monkeypatch):
    monkeypatch.setattr(tpu, "ROOT", tmp_path)
    with pytest.raises(LaunchError, match="is no working tree of git's"):
        tpu.pack(Shell(), tmp_path / "code.tar.gz", None)


@pytest.mark.parametrize("number,code", [(None, 4), (signal.SIGTERM, 143)])
def test_until_stopped(tmp_path, number, code):
    """The exit code of the command, or 143 if it was told to stop, whatever it makes of that."""
    check((TEMPLATES / "until_stopped.sh").read_text())
    body = "trap 'echo saved; exit 0' TERM; echo began >began; for _ in {1..100}; do sleep 0.1; [ ! -e go ] || exit 4; done"
    command = ["bash", str(TEMPLATES / "until_stopped.sh"), "bash", "-c", body]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=os.environ | {"CODE_FILE": "code"})
    until((tmp_path / "began").exists)
    (tmp_path / "go").touch() if number is None else child.send_signal(number)
    out, _ = child.communicate(timeout=20)
    assert (child.returncode, out) == (code, "" if number is None else "saved\n")
    assert pathlib.Path(tmp_path / "code").read_text() == f"{code}\n"


def test_topologies():
    slice_ = accelerators.parse("v5p:4x4x8")
    assert (slice_.chips, slice_.type, slice_.nodes(None)) == (128, "v5p-256", (32, 4))
    hosts = {"v5e:1x1": 1, "v5e:2x2": 1, "v5e:2x4": 1, "v6e:2x4": 1, "v5e:4x4": 4, "v6e:16x16": 64, "v4:2x2x1": 1, "v5p:2x2x2": 2}
    assert {name: accelerators.parse(name).hosts for name in hosts} == hosts
    assert accelerators.parse("v6e:1x1").nodes(None) == (1, 1) and accelerators.parse("v6e:2x4").nodes(8) == (1, 8)
    with pytest.raises(LaunchError, match="which nodes of 3 do not make up"):
        accelerators.parse("v5e:4x4").nodes(3)
