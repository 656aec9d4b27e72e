"""Pods on Google Kubernetes Engine, as a JobSet or through xpk: TPU slices, several of them, or GPU nodes.

python -m launch.gke run --name=c06 --image=IMAGE --topology=v5e:16x16 -- --experiment=FILE --workdir=gs://B/c06
python -m launch.gke run --name=c06 --image=IMAGE --gpu=nvidia-h100-80gb --volume=CLAIM=/w -- --experiment=FILE --workdir=/w/c06
python -m launch.gke VERB --name=c06

The other verbs: status, logs (follow the first pod of each slice), delete. --workers=N makes N JobSets of one pod each that share
one ablation: a TPU slice of one host, or a GPU node. The work folder is in a bucket, or on a --volume, which outlive the pods.
--dry_run prints the manifest, which is JSON, and the command that applies it. --through=xpk hands the same run to `xpk workload
create`. Pods that are preempted get SIGTERM and --grace seconds to save, and all are started anew. The image is launch.docker's. A
bucket asks for a --service_account that may write there.
"""

from __future__ import annotations

import json
import pathlib
import posixpath
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace

from absl import flags

from launch import accelerators
from launch.command import LaunchError, Run, Shell, guarded, one_process, parse, required, verb
from launch.jobset import LABEL, STOPPABLE, Pods, manifest, verbatim

FLAGS = flags.FlagValues()
flags.DEFINE_string("name", None, "What the run is called.", flag_values=FLAGS)
flags.DEFINE_string("image", None, "The container image.", flag_values=FLAGS)
flags.DEFINE_string("topology", None, "Chip and topology of a TPU slice, as in v5e:16x16.", flag_values=FLAGS)
flags.DEFINE_integer("slices", 1, "TPU slices of one run.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("chips_per_node", None, "Chips of a node (default: 4, or all of less).", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("gpu", None, "The GPU as GKE calls it, as in nvidia-h100-80gb.", flag_values=FLAGS)
flags.DEFINE_integer("nodes", 1, "GPU nodes of one run; a worker has one.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("gpus_per_node", 8, "GPUs of a node.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "workers", None, "Runs, on one host each, that share one ablation group by group.", lower_bound=1, flag_values=FLAGS
)
flags.DEFINE_string("namespace", None, "The namespace.", flag_values=FLAGS)
flags.DEFINE_string("queue", None, "Kueue's local queue.", flag_values=FLAGS)
flags.DEFINE_string("service_account", None, "Kubernetes' service account of the pods.", flag_values=FLAGS)
flags.DEFINE_multi_string("selector", [], "LABEL=VALUE that nodes must have besides.", flag_values=FLAGS)
flags.DEFINE_multi_string("env", [], "NAME=VALUE for the run.", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "volume", [], "CLAIM=PATH: a persistent volume of the cluster, and where all pods have it.", flag_values=FLAGS
)
flags.DEFINE_boolean("spot", False, "On nodes that can be taken away.", flag_values=FLAGS)
flags.DEFINE_integer(
    "restarts", 3, "How often all start anew after a failure; preemptions are free.", lower_bound=0, flag_values=FLAGS
)
flags.DEFINE_integer("grace", 120, "Seconds that a pod has to save.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum("through", "kubectl", ["kubectl", "xpk"], "Who makes the pods.", flag_values=FLAGS)
flags.DEFINE_string("cluster", None, "xpk's: the cluster.", flag_values=FLAGS)
flags.DEFINE_string("zone", None, "xpk's: the zone.", flag_values=FLAGS)
flags.DEFINE_string("project", None, "xpk's: the project.", flag_values=FLAGS)
flags.DEFINE_boolean("shared_disk", False, "xpk's: --workdir is on a storage that it gives all pods.", flag_values=FLAGS)
flags.DEFINE_multi_string("xpk", [], "One more flag of xpk's, as in --xpk=--priority=high.", flag_values=FLAGS)
flags.DEFINE_string("python", "python", "The interpreter in the image.", flag_values=FLAGS)
flags.DEFINE_boolean("dry_run", False, "Print what would run; change nothing.", flag_values=FLAGS)


def main(argv: Sequence[str]) -> int:
    """Runs the launcher; returns the exit code. Raises `LaunchError`."""
    verbs = ("run", "status", "logs", "delete")
    word, words = verb(argv, verbs, __doc__ or "")
    theirs, shell = parse(FLAGS, words, __doc__ or ""), Shell(FLAGS.dry_run)
    required(FLAGS, "name")
    if FLAGS.through == "xpk":
        required(FLAGS, "cluster")
    if word == "run":
        run = Run(theirs)
        require_lasting(run)
        return through_xpk(shell, run) if FLAGS.through == "xpk" else through_kubectl(shell, run)
    if theirs:
        raise LaunchError(f"{word} runs nothing: leave out what stands after --")
    return shell.run(asked(word))


def through_kubectl(shell: Shell, run: Run) -> int:
    """Applies the manifest."""
    items = manifests(run)
    text = json.dumps(items[0] if len(items) == 1 else {"apiVersion": "v1", "kind": "List", "items": items}, indent=2)
    return shell.run(["kubectl", "apply", "--filename=-"], given=text)


def manifests(run: Run) -> list[dict]:
    """The JobSets of a run: one, or one a worker, because GKE takes the slices of one JobSet for one run."""
    pods = planned()
    if FLAGS.workers is None:
        return [manifest(pods, FLAGS.name, run.argv(FLAGS.python))]
    each = [replace(pods, name=f"{FLAGS.name}-{index}") for index in range(FLAGS.workers)]
    return [manifest(one, FLAGS.name, run.argv(FLAGS.python)) for one in each]


def require_lasting(run: Run) -> None:
    """Raises `LaunchError` unless the work folder, which --plan can do without, outlives the pods and is there for all of them."""
    workdir = run.flag("workdir")
    if workdir is None or workdir.startswith("gs://") or (FLAGS.through == "xpk" and FLAGS.shared_disk):
        return
    folder = pathlib.PurePosixPath(posixpath.normpath(workdir))
    if folder.is_absolute() and any(folder.is_relative_to(posixpath.normpath(path)) for path in pairs("volume").values()):
        return
    disk = "say --shared_disk where a storage of xpk's is mounted there"
    if FLAGS.through == "kubectl":
        disk = "a folder on a volume, as in --volume=CLAIM=/w and --workdir=/w/DIR"
    raise LaunchError(
        f"--workdir={workdir} is on the disk of a pod, which goes away and which other pods do not see: name a bucket, as in "
        f"--workdir=gs://BUCKET/DIR, or {disk}"
    )


def planned() -> Pods:
    """The pods that the flags ask for. Raises `LaunchError` if they do not fit together."""
    required(FLAGS, "image")
    if (FLAGS.topology is None) == (FLAGS.gpu is None):
        raise LaunchError(
            "give one of --topology=CHIP:TOPOLOGY (TPUs) and --gpu=NAME, as in --topology=v5e:4x4 or --gpu=nvidia-h100-80gb"
        )
    selector = pairs("selector")
    if FLAGS.topology:
        slice_ = accelerators.parse(FLAGS.topology)
        nodes, chips = slice_.nodes(FLAGS.chips_per_node)
        if FLAGS.slices > 1 and nodes == 1:
            raise LaunchError(f"--slices={FLAGS.slices}: GKE joins slices of several nodes only, and {FLAGS.topology} is one")
        selector |= {"cloud.google.com/gke-tpu-accelerator": slice_.chip.gke, "cloud.google.com/gke-tpu-topology": slice_.topology}
        limits = {"google.com/tpu": chips}
        what, way = f"--topology={FLAGS.topology}", f"give it a slice of one host, as in --topology={slice_.single}"
        if slice_.chip.axes == 2 and slice_.chips == 8 and FLAGS.through == "kubectl":
            way += ", or --chips_per_node=8 where there are such nodes"
    else:
        nodes, limits = FLAGS.nodes, {"nvidia.com/gpu": FLAGS.gpus_per_node}
        selector |= {"cloud.google.com/gke-accelerator": FLAGS.gpu}
        what, way = f"--nodes={FLAGS.nodes}", "give it one node, all of whose GPUs it then has"
    if FLAGS.workers:
        one_process(f"--workers={FLAGS.workers}", nodes, what, way)
    return Pods(
        name=FLAGS.name,
        image=FLAGS.image,
        nodes=nodes,
        slices=FLAGS.slices if FLAGS.topology else 1,
        limits=limits,
        selector=selector,
        env=pairs("env"),
        namespace=FLAGS.namespace,
        queue=FLAGS.queue,
        service_account=FLAGS.service_account,
        spot=FLAGS.spot,
        restarts=FLAGS.restarts,
        grace=FLAGS.grace,
        volumes=pairs("volume"),
        worker=FLAGS.workers is not None,
    )


def through_xpk(shell: Shell, run: Run) -> int:
    """Hands the run, or each worker, to xpk, which has its own manifest, namespace and queue."""
    for name in ("namespace", "queue", "selector", "volume", "chips_per_node"):
        if FLAGS[name].value:
            raise LaunchError(f"--{name} is not for --through=xpk: xpk has its own")
    pods = planned()
    if not pods.tpu and pods.nodes > 1:
        raise LaunchError("GPU nodes find each other by the manifest's names, which xpk does not tell: leave out --through=xpk")
    place = [f"--{name}={FLAGS[name].value}" for name in ("cluster", "zone", "project") if FLAGS[name].value]
    size = [f"--tpu-type={_xpk_type()}", f"--num-slices={pods.slices}"]
    if not pods.tpu:
        size = [f"--device-type={FLAGS.gpu.removeprefix('nvidia-')}-{FLAGS.gpus_per_node}", "--num-nodes=1"]
    more = [f"--docker-image={pods.image}", f"--max-restarts={pods.restarts}", f"--termination-grace-period-seconds={pods.grace}"]
    more += [*(f"--env={name}={value}" for name, value in pods.env.items()), *(["--spot"] if pods.spot else []), *FLAGS.xpk]
    names = [pods.name] if FLAGS.workers is None else [f"{pods.name}-{index}" for index in range(FLAGS.workers)]
    command = " ".join(map(_one_line, [*STOPPABLE, *run.argv(FLAGS.python, *pods.own())]))
    for name in names:
        code = shell.run(
            ["xpk", "workload", "create", f"--workload={name}", *place, *size, *more, f"--command={verbatim(command)}"]
        )
        if code:
            return code
    return 0


def asked(word: str) -> list[str]:
    """The command of a verb that is about what runs."""
    found = f"--selector={LABEL}={FLAGS.name}"
    space = [f"--namespace={FLAGS.namespace}"] if FLAGS.namespace else []
    if FLAGS.through == "xpk":
        if word == "delete":
            place = [f"--{name}={FLAGS[name].value}" for name in ("cluster", "zone", "project") if FLAGS[name].value]
            return ["xpk", "workload", "delete", f"--workload={FLAGS.name}", *place]
        found = f"--selector=jobset.sigs.k8s.io/jobset-name={FLAGS.name}"
    if word == "logs":
        found += ",batch.kubernetes.io/job-completion-index=0"
        return ["kubectl", "logs", "--follow", "--prefix", "--tail=-1", "--max-log-requests=100", found, *space]
    return (
        ["kubectl", "delete", "jobsets", found, *space] if word == "delete" else ["kubectl", "get", "jobsets,pods", found, *space]
    )


def pairs(name: str) -> dict[str, str]:
    """A flag's NAME=VALUE words. Raises `LaunchError` for one without =."""
    words: list[str] = FLAGS[name].value or []
    for word in words:
        if "=" not in word:
            raise LaunchError(f"--{name}={word}: write --{name}=NAME=VALUE")
    return {key: value for key, _, value in (word.partition("=") for word in words)}


def _xpk_type() -> str:
    slice_ = accelerators.parse(FLAGS.topology) if FLAGS.topology else None
    return "" if slice_ is None else f"{slice_.chip.vm}-{slice_.topology}" if slice_.chip.axes == 3 else slice_.type


def _one_line(word: str) -> str:
    """A word quoted for bash on one line, because xpk puts the command into YAML as it is."""
    if "\n" not in word:
        return shlex.quote(word)
    return "$'" + word.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv))
