"""Every form of every launcher ends in words that `run` takes, or is refused by the launcher: none starts what only says no."""

import copy
import itertools
import json
import re
import shlex

import pytest

from launch import gke, local, slurm, tpu
from launch.command import ROOT
from llm_jax.cli import run, terminal
from llm_jax.core.config import ConfigError
from tests.launch.conftest import launched
from tests.launch.test_gke import expanded

RUN = ("--experiment=e.py", "--workdir=gs://bucket/w", "--set=model.name=\"a 'b' $HOME\"")


def forms(*choices):
    """All combinations of one of each of the choices, which are words typed together, with spaces between."""
    return [[word for words in chosen for word in words.split()] for chosen in itertools.product(*choices)]


TPUS = [f"--topology={name}" for name in ("v5e:1x1", "v5e:2x2", "v5e:2x4", "v6e:2x4", "v5e:4x4", "v5p:2x2x1", "v4:2x2x2")]
PODS = [*TPUS, "--topology=v5e:2x4 --chips_per_node=8", "--gpu=nvidia-l4", "--gpu=nvidia-l4 --gpus_per_node=1", "--gpu=g --nodes=2"]
FORMS = {
    local: forms(["--processes=1", "--processes=2", "--workers=1", "--workers=3"]),
    slurm: forms(
        ["--time=60"],
        ["", "--workers=1", "--workers=3"],
        ["", "--nodes=2"],
        ["", "--gpus_per_node=1", "--gpus_per_node=8"],
        ["", "--tasks_per_node=1", "--tasks_per_node=8"],
    ),
    tpu: forms(["run --name=c --zone=z"], TPUS, ["", "--slices=2"], ["", "--worker"]),
    gke: forms(
        ["run --name=c --image=i"],
        PODS,
        ["", "--slices=2"],
        ["", "--workers=1", "--workers=3"],
        ["", "--through=xpk --cluster=c"],
    ),
}
CASES = [pytest.param(module, words, id=" ".join([module.__name__, *words])) for module, each in FORMS.items() for words in each]


def commands(module, out):
    """What a dry run's print starts: a pair for each command, its words and how many processes get them."""
    if module is local:
        return [(shlex.split(re.split(" 2>&1| >>", line)[0]), 1) for line in out.splitlines()]
    if module is slurm:
        tasks = [int(re.search(rf"--{name}=(\d+)", out)[1]) for name in ("nodes", "ntasks-per-node")]
        return [(shlex.split(re.search(r"^command=\((.*)\)$", out, re.M)[1]), tasks[0] * tasks[1])]
    if module is tpu:
        given = [word for word in shlex.split(out, comments=True) if word.startswith("--command=set -- ")]
        hosts = {"v5e:4x4": 4, "v4:2x2x2": 2}  # by Google's own tables; all others have one
        chosen = tpu_form(out)
        return [(shlex.split(word.splitlines()[0]), hosts.get(chosen[0], 1) * chosen[1]) for word in given]
    if out.startswith("xpk"):
        lines = [expanded(shlex.split(line)[-1].removeprefix("--command=")) for line in out.splitlines()]
        size = re.search(r"--tpu-type=(\S+) --num-slices=(\d+)|--num-nodes=(\d+)", out)
        hosts = {"v5litepod-8": 2, "v6e-8": 2, "v5litepod-16": 4, "v4-2x2x2": 2}  # of xpk's machines, of four chips
        count = int(size[3]) if size[3] else hosts.get(size[1], 1) * int(size[2])
        return [(shlex.split(line), count) for line in lines]
    given = json.loads(out.split("\n", 1)[1].rstrip().removesuffix("END"))
    found = []
    for jobset in given["items"] if given["kind"] == "List" else [given]:
        (job,) = jobset["spec"]["replicatedJobs"]
        (pod,) = job["template"]["spec"]["template"]["spec"]["containers"]
        found.append(
            (
                [expanded(word, JOB_COMPLETION_INDEX="0") for word in pod["args"]],
                job["replicas"] * job["template"]["spec"]["parallelism"],
            )
        )
    return found


def tpu_form(out):
    """The topology that gcloud is asked for, as it is typed here, and how many slices."""
    kind = re.search(r"--accelerator-type=(\S+)|--type=(\S+) --topology=(\S+)", out)
    slices = re.search(r"--node-count=(\d+)", out)
    return {"v5litepod-16": "v5e:4x4"}.get(kind[1], f"{kind[2]}:{kind[3]}"), int(slices[1]) if slices else 1


def taken(words):
    """Whether `run` would train with others and whether it would be a worker, by its own flags and its own rule."""
    at = words.index("run", words.index("llm_jax"))
    values = copy.deepcopy(run.FLAGS)
    terminal.parse(values, words[at:])
    assert tuple(words[at + 1 : at + 1 + len(RUN)]) == RUN
    return run.joins(values), values.worker


@pytest.mark.parametrize("module,words", CASES)
def test_run_takes_what_a_launcher_gives(capsys, module, words):
    code, printed = launched(module, *words, "--dry_run", run=RUN), capsys.readouterr()
    if code:
        assert code == 2 and printed.err.startswith("error: ") and printed.err.count("\n") == 1 and not printed.out
        assert re.search("a worker is one process|do not share out|GKE joins|--chips_per_node is|GPU nodes find", printed.err)
        return
    workers = [int(word.partition("=")[2]) for word in words if word.startswith("--workers=")]
    found = commands(module, printed.out)
    together = [int(word.partition("=")[2]) for word in words if word.startswith("--processes=")]
    assert len(found) == (together or ([1] if module is slurm else workers) or [1])[0]
    for given, processes in found:
        joins, worker = taken(given)
        assert worker == ("--worker" in words or bool(workers))
        assert joins or (together or [processes])[0] == 1, "several processes that are not told of each other"
        assert processes == 1 or not worker, "a worker of several processes"


def test_of_every_launcher_some_forms_have_workers_and_some_none(capsys):
    """So that the test above is not one of refusals."""
    for module, each in FORMS.items():
        seen = set()
        for words in each:
            if launched(module, *words, "--dry_run", run=RUN) == 0:
                seen |= {taken(given) for given, _ in commands(module, capsys.readouterr().out)}
            capsys.readouterr()
        assert {(True, False), (False, True)} <= seen, module


def test_commands_of_the_readme(capsys):
    lines = re.findall(r"^python -m launch\.(local|slurm|tpu|gke) (.*) -- (.*)$", (ROOT / "README.md").read_text(), re.M)
    assert {name for name, *_ in lines} == {"local", "slurm", "tpu", "gke"}
    for name, ours, theirs in lines:
        module = {"local": local, "slurm": slurm, "tpu": tpu, "gke": gke}[name]
        assert launched(module, *shlex.split(ours), "--dry_run", run=shlex.split(theirs)) == 0
        for given, _ in commands(module, capsys.readouterr().out):
            values = copy.deepcopy(run.FLAGS)
            terminal.parse(values, given[given.index("run", given.index("llm_jax")) :])
            run.joins(values)


@pytest.mark.parametrize("own", ["--distributed", "--coordinator=a:1", "--processes=1", "--process=0"])
def test_the_rule_finds_what_is_told_both(own):
    with pytest.raises(ConfigError, match="--distributed trains with others, and --worker for itself"):
        taken(["llm_jax", "run", *RUN, "--worker", own])
