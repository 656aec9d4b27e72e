"""JobSet manifests against the schema's own models, what Kubernetes and bash make of the words, what xpk and kubectl are told."""

import json
import re
import subprocess
import sys

import pytest

from launch import gke
from launch.jobset import verbatim
from tests.launch.conftest import launched

AWKWARD = ["--set=model.name=\"a 'b' $HOME $(HOSTNAME) $$x `c`\\d\"", "--set=text=two\nlines '\\n", "--set=empty="]
RUN = ("--workdir=gs://bucket/w", *AWKWARD)
COMMAND = ["python", "-m", "llm_jax", "run", *RUN]
HERE = ["--name=c06", "--image=registry/llm_jax:1"]
CASES = {
    "one host": ["--topology=v6e:1x1"],
    "a slice": ["--topology=v5e:16x16"],
    "slices": [
        "--topology=v5p:4x4x8",
        "--slices=2",
        "--spot",
        "--queue=q",
        "--service_account=me",
        "--namespace=lab",
        "--env=A=b $(C)",
    ],
    "chips that GKE alone has": ["--topology=tpu7x:4x4x4", "--selector=cloud.google.com/reservation-name=r"],
    "GPUs": ["--gpu=nvidia-h100-80gb", "--nodes=4"],
    "one GPU": ["--gpu=nvidia-l4", "--gpus_per_node=1", "--spot"],
    "workers": ["--topology=v5e:2x2", "--workers=3", "--volume=claim=/w"],
    "workers of eight chips": ["--topology=v6e:2x4", "--chips_per_node=8", "--workers=1"],
    "workers of GPUs": ["--gpu=nvidia-h100-80gb", "--workers=2"],
}


def applied(programs, *words, run=RUN):
    """The JobSets that kubectl is given."""
    assert launched(gke, "run", *HERE, *words, run=run) == 0
    assert programs.calls()[-1] == ["kubectl", "apply", "--filename=-"]
    given = json.loads(programs.given()[-1])
    return given["items"] if given["kind"] == "List" else [given]


def job(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]


def container(jobset):
    (only,) = job(jobset)["template"]["spec"]["containers"]
    return only


def expanded(word, **env):
    """What Kubernetes makes of a word of a container's: $(NAME) is a variable if there is one, $$ is $."""
    return re.sub(r"\$(\$|\(([^)]*)\))", lambda found: "$" if found[1] == "$" else env.get(found[2], found[0]), word)


@pytest.mark.parametrize("case", list(CASES))
def test_manifests_are_what_the_schema_says(programs, case):
    """Models made from JobSet's OpenAPI document and Kubernetes': types are strict, and a field that they do not know is lost."""
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="not installed: kubeflow-trainer-api, of the extra test")
    for jobset in applied(programs, *CASES[case]):
        known = models.JobsetV1alpha2JobSet.from_dict(jobset)
        assert known is not None and known.to_dict() == jobset
        assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")


def test_the_schema_finds_mistakes(programs):
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="not installed: kubeflow-trainer-api, of the extra test")
    (jobset,) = applied(programs, *CASES["a slice"])
    job(jobset)["paralelism"] = 3
    assert models.JobsetV1alpha2JobSet.from_dict(jobset).to_dict() != jobset
    container(jobset)["env"] = [{"name": "A", "value": 3}]
    with pytest.raises(ValueError, match="valid string"):
        models.JobsetV1alpha2JobSet.from_dict(jobset)


@pytest.mark.parametrize("case", list(CASES))
def test_pods_run_the_words_verbatim(programs, case):
    for jobset in applied(programs, *CASES[case]):
        pod = container(jobset)
        assert pod["command"] == ["bash", "launch/templates/until_stopped.sh"]
        words = [expanded(word, HOSTNAME="wrong", HOME="wrong", JOB_COMPLETION_INDEX="2") for word in pod["args"]]
        assert words[: len(COMMAND)] == COMMAND
        own = {"GPUs": ["--coordinator=c06-slice-0-0.c06:8476", "--processes=4", "--process=2"], "one GPU": []}
        assert words[len(COMMAND) :] == own.get(case, ["--worker" if "workers" in case else "--distributed"])


def test_slices_are_jobs_of_their_own_node_pools(programs):
    (jobset,) = applied(programs, *CASES["slices"])
    labels = {"llm-jax/run": "c06", "kueue.x-k8s.io/queue-name": "q"}
    exclusive = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert jobset["metadata"] == {"name": "c06", "namespace": "lab", "labels": labels, "annotations": exclusive}
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
    assert (job(jobset)["parallelism"], job(jobset)["completions"], job(jobset)["backoffLimit"]) == (32, 32, 0)
    pod = job(jobset)["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x8",
        "cloud.google.com/gke-spot": "true",
    }
    assert container(jobset)["resources"]["limits"] == {"google.com/tpu": "4"}
    assert container(jobset)["env"] == [{"name": "A", "value": "b $$(C)"}]
    assert (pod["serviceAccountName"], pod["terminationGracePeriodSeconds"], pod["restartPolicy"]) == ("me", 120, "Never")
    assert {each["key"] for each in pod["tolerations"]} == {"google.com/tpu", "cloud.google.com/gke-spot"}


@pytest.mark.parametrize(
    "words,nodes,chips,accelerator",
    [
        (["--topology=v4:2x2x4"], 4, "4", "tpu-v4-podslice"),
        (["--topology=v5e:2x4"], 2, "4", "tpu-v5-lite-podslice"),
        (["--topology=v5e:2x4", "--chips_per_node=8"], 1, "8", "tpu-v5-lite-podslice"),
        (["--topology=v6e:16x16"], 64, "4", "tpu-v6e-slice"),
        (["--topology=tpu7x:2x2x1"], 1, "4", "tpu7x"),
    ],
)
def test_nodes_of_a_slice(programs, words, nodes, chips, accelerator):
    (jobset,) = applied(programs, *words)
    assert job(jobset)["parallelism"] == nodes
    assert container(jobset)["resources"]["limits"] == {"google.com/tpu": chips}
    assert job(jobset)["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert bool(jobset["metadata"]["annotations"]) == (nodes > 1)


def test_preemptions_start_all_anew_and_failures_do_so_a_few_times(programs):
    (jobset,) = applied(programs, "--topology=v5e:4x4", "--restarts=5", "--grace=30")
    free = {"name": "preempted", "action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    assert jobset["spec"]["failurePolicy"] == {"maxRestarts": 5, "rules": [free]}
    taken = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    assert job(jobset)["podFailurePolicy"] == {"rules": [taken]}
    assert job(jobset)["template"]["spec"]["terminationGracePeriodSeconds"] == 30


def test_workers_are_jobsets_of_their_own(programs):
    jobsets = applied(programs, *CASES["workers"])
    assert [each["metadata"]["name"] for each in jobsets] == ["c06-0", "c06-1", "c06-2"]
    assert {each["metadata"]["labels"]["llm-jax/run"] for each in jobsets} == {"c06"}


def test_other_verbs(programs):
    for word in ("status", "logs", "delete"):
        assert launched(gke, word, "--name=c06", "--namespace=lab", run=()) == 0
    chosen = "--selector=llm-jax/run=c06"
    follow = ["--follow", "--prefix", "--tail=-1", "--max-log-requests=100", f"{chosen},batch.kubernetes.io/job-completion-index=0"]
    assert programs.calls() == [
        ["kubectl", "get", "jobsets,pods", chosen, "--namespace=lab"],
        ["kubectl", "logs", *follow, "--namespace=lab"],
        ["kubectl", "delete", "jobsets", chosen, "--namespace=lab"],
    ]


def test_dry_run_prints_what_is_applied(programs, capsys):
    (jobset,) = applied(programs, *CASES["slices"])
    capsys.readouterr()
    assert launched(gke, "run", *HERE, *CASES["slices"], "--dry_run", run=RUN) == 0
    out = capsys.readouterr().out
    assert len(programs.calls()) == 1
    assert out.startswith("kubectl apply --filename=- <<'END'\n") and out.endswith("\nEND\n")
    assert json.loads(out.split("\n", 1)[1].removesuffix("\nEND\n")) == jobset


def words_of(command):
    """The words that bash makes of a command."""
    tell = [sys.executable, "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"]
    done = subprocess.run(["bash", "-c", f'"$@" {command}', "-", *tell], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_through_xpk(programs):
    words = ["--through=xpk", "--cluster=pods", "--zone=z", "--project=p", "--env=A=b c", "--spot", "--xpk=--priority=high"]
    assert launched(gke, "run", *HERE, "--topology=v5p:4x4x8", "--slices=2", *words, run=RUN) == 0
    (call,) = programs.calls()
    place, size = ["--cluster=pods", "--zone=z", "--project=p"], ["--tpu-type=v5p-4x4x8", "--num-slices=2"]
    more = ["--docker-image=registry/llm_jax:1", "--max-restarts=3", "--termination-grace-period-seconds=120", "--env=A=b c"]
    assert call[:-1] == ["xpk", "workload", "create", "--workload=c06", *place, *size, *more, "--spot", "--priority=high"]
    command = call[-1].removeprefix("--command=")
    assert "\n" not in command, "xpk puts it into a line of YAML"
    assert words_of(expanded(command)) == ["bash", "launch/templates/until_stopped.sh", *COMMAND, "--distributed"]


def test_through_xpk_others(programs):
    words = ["--through=xpk", "--cluster=pods"]
    assert launched(gke, "run", *HERE, "--topology=v5e:2x2", "--workers=2", *words, run=RUN) == 0
    assert launched(gke, "run", *HERE, "--gpu=nvidia-h100-80gb", *words, run=RUN) == 0
    assert launched(gke, "delete", "--name=c06", *words, run=()) == 0
    first, second, gpu, delete = programs.calls()
    assert ("--workload=c06-0" in first, "--workload=c06-1" in second) == (True, True)
    assert "--tpu-type=v5litepod-4" in first and first[-1].endswith(" --worker") and "--distributed" not in first[-1]
    assert {"--device-type=h100-80gb-8", "--num-nodes=1"} <= set(gpu) and "--distributed" not in gpu[-1]
    assert delete == ["xpk", "workload", "delete", "--workload=c06", "--cluster=pods"]


@pytest.mark.parametrize(
    "words,sentence",
    [
        (["run", "--topology=v5e:4x4", "--gpu=nvidia-l4"], "give one of --topology=CHIP:TOPOLOGY"),
        (["run"], "give one of --topology=CHIP:TOPOLOGY"),
        (["run", "--topology=v5p:8x4x4"], "--topology=v5p:8x4x4 does not exist: the nearest are v5p:4x4x8"),
        (["run", "--topology=v5e:4x4", "--name=C06"], "--name=C06: write at most 40 small letters"),
        (["run", "--topology=v5e:2x2", "--slices=2"], "GKE joins slices of several nodes only"),
        (["run", "--topology=v5e:4x4", "--env=A"], "--env=A: write --env=NAME=VALUE"),
        (["run", "--topology=v5e:4x4", "--through=xpk"], "--cluster is missing"),
        (["run", "--gpu=nvidia-l4", "--nodes=2", "--through=xpk", "--cluster=c"], "leave out --through=xpk"),
        (["run", "--topology=v5e:4x4", "--through=xpk", "--cluster=c", "--queue=q"], "--queue is not for --through=xpk"),
        (
            ["run", "--topology=v5e:2x4", "--through=xpk", "--cluster=c", "--chips_per_node=8"],
            "--chips_per_node is not for --through=xpk",
        ),
        (["run", "--topology=v5e:4x4", "--workers=2"], "and --topology=v5e:4x4 makes it 4: give it a slice of one host"),
        (["run", "--topology=v5e:2x4", "--workers=2"], "as in --topology=v5e:2x2, or --chips_per_node=8 where there are"),
        (["run", "--topology=v5p:2x2x2", "--workers=2"], "as in --topology=v5p:2x2x1, or leave out --workers for one run of all"),
        (["run", "--gpu=nvidia-l4", "--workers=2", "--nodes=3"], "and --nodes=3 makes it 3: give it one node"),
        (["logs"], "logs runs nothing"),
        (["up"], "begins with one of run, status, logs, delete, got 'up'"),
    ],
)
def test_mistakes_are_told(programs, capsys, words, sentence):
    assert launched(gke, words[0], *HERE, *words[1:], run=RUN) == 2
    assert sentence in capsys.readouterr().err
    assert not programs.calls()


@pytest.mark.parametrize("word", ["$(A)", "$A", "$$(A)", "$$$(A)", "plain", "$"])
def test_verbatim(word):
    """By the rules of Kubernetes' own page "Define a Command and Arguments for a Container"."""
    assert expanded(verbatim(word), A="wrong") == word


@pytest.mark.parametrize("devices", [["--topology=v5e:4x4"], ["--gpu=nvidia-l4"]], ids=["TPUs", "GPUs"])
def test_pods_have_the_volumes_that_are_asked_for(programs, devices):
    (jobset,) = applied(programs, *devices, "--volume=claim=/shared")
    assert {"name": "claim", "mountPath": "/shared"} in container(jobset)["volumeMounts"]
    assert {"name": "claim", "persistentVolumeClaim": {"claimName": "claim"}} in job(jobset)["template"]["spec"]["volumes"]


KEPT = ["gs://bucket/w", "/shared", "/shared/c06", "/shared/./a/../c06"]
LOST = ["runs/w", "/tmp/w", "/shared2/w", "/shared/../tmp", "shared/w"]


@pytest.mark.parametrize("workdir", [*KEPT, *LOST])
def test_the_work_folder_outlives_the_pods(programs, capsys, workdir):
    words = ["run", *HERE, "--topology=v5e:4x4", "--volume=other=/o", "--volume=claim=/shared/"]
    assert launched(gke, *words, run=(f"--workdir={workdir}",)) == (0 if workdir in KEPT else 2)
    told = f"--workdir={workdir} is on the disk of a pod, which goes away and which other pods do not see: name a bucket"
    assert (told in capsys.readouterr().err) == (workdir in LOST) and len(programs.calls()) == (workdir in KEPT)
    assert launched(gke, *words, "--dry_run", run=(f"--workdir={workdir}",)) == (0 if workdir in KEPT else 2)


def test_the_work_folder_of_a_plan_and_of_xpk(programs, capsys):
    assert launched(gke, "run", *HERE, "--topology=v5e:4x4", run=("--plan",)) == 0
    words = ["run", *HERE, "--topology=v5e:4x4", "--through=xpk", "--cluster=c"]
    assert launched(gke, *words, run=("--workdir=/w/c06",)) == 2
    assert "say --shared_disk where a storage of xpk's is mounted there" in capsys.readouterr().err
    assert launched(gke, *words, "--shared_disk", run=("--workdir=/w/c06",)) == 0
