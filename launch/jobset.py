"""JobSet manifests: a run's processes as pods, a job for each slice, started anew together when one of them ends badly.

https://jobset.sigs.k8s.io. On TPU nodes GKE itself tells every pod its place (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES, and MEGASCALE_*
where a JobSet has several slices), which JAX reads; elsewhere the place is an index of the job, given by flags.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from launch.command import require_name

LABEL = "llm-jax/run"
JOB = "slice"
PORT = 8476
STOPPABLE = ["bash", "launch/templates/until_stopped.sh"]  # what is preempted has not succeeded, although it saved and ended well


@dataclass(frozen=True)
class Pods:
    """The pods of one JobSet: `slices` jobs of `nodes` pods each, all alike.

    limits: devices of a pod, as Kubernetes counts them; selector: labels of the nodes that they go to; restarts: how often all are
    started anew after one has failed, not counting nodes that were taken away; grace: seconds that a pod has to save; volumes:
    claim of a persistent volume → where pods have it; worker: the only pod is one of the workers on an ablation.
    """

    name: str
    image: str
    nodes: int
    limits: dict[str, int]
    selector: dict[str, str]
    slices: int = 1
    env: dict[str, str] = field(default_factory=dict)
    namespace: str | None = None
    queue: str | None = None
    service_account: str | None = None
    spot: bool = False
    restarts: int = 3
    grace: int = 120
    volumes: dict[str, str] = field(default_factory=dict)
    worker: bool = False

    def __post_init__(self):
        require_name(self.name, 40)

    @property
    def tpu(self) -> bool:
        """Whether the pods have TPUs."""
        return "google.com/tpu" in self.limits

    def own(self) -> list[str]:
        """Flags of `run` that tell each pod its place, as a manifest has them; a worker has none and needs no other pod."""
        if self.worker:
            return ["--worker"]
        if self.tpu:
            return ["--distributed"]
        if self.nodes == 1:
            return []
        first = f"{self.name}-{JOB}-0-0.{self.name}"  # the name that JobSet's service gives to the first pod
        return [f"--coordinator={first}:{PORT}", f"--processes={self.nodes}", "--process=$(JOB_COMPLETION_INDEX)"]


def manifest(pods: Pods, run: str, command: Sequence[str]) -> dict[str, Any]:
    """The JobSet whose pods run a command. run: what LABEL finds it by."""
    metadata: dict[str, Any] = {"name": pods.name, "labels": {LABEL: run}, "annotations": {}}
    if pods.namespace:
        metadata["namespace"] = pods.namespace
    if pods.queue:
        metadata["labels"]["kueue.x-k8s.io/queue-name"] = pods.queue
    if pods.tpu and pods.nodes > 1:  # a slice's hosts are a node pool; no two jobs share one
        metadata["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"] = "cloud.google.com/gke-nodepool"
    taken = {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}
    job = {
        "parallelism": pods.nodes,
        "completions": pods.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [taken]},
        "template": {"metadata": {"labels": {LABEL: run}}, "spec": _pod(pods, command)},
    }
    free = {"name": "preempted", "action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": pods.restarts, "rules": [free]},
            "replicatedJobs": [{"name": JOB, "replicas": pods.slices, "template": {"spec": job}}],
        },
    }


def _pod(pods: Pods, command: Sequence[str]) -> dict[str, Any]:
    devices = {name: str(count) for name, count in pods.limits.items()}
    container: dict[str, Any] = {
        "name": "run",
        "image": pods.image,
        "command": STOPPABLE,
        "args": [*map(verbatim, command), *pods.own()],
        "env": [{"name": name, "value": verbatim(value)} for name, value in pods.env.items()],
        "resources": {"limits": devices, "requests": devices},
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": pods.grace,
        "nodeSelector": dict(pods.selector),
        "tolerations": [{"key": name, "operator": "Exists", "effect": "NoSchedule"} for name in pods.limits],
        "containers": [container],
        "volumes": [{"name": claim, "persistentVolumeClaim": {"claimName": claim}} for claim in pods.volumes],
    }
    container["volumeMounts"] = [{"name": claim, "mountPath": path} for claim, path in pods.volumes.items()]
    if pods.tpu:
        container["securityContext"] = {"privileged": True, "runAsUser": 0}  # the chips' files are root's
        spec |= {"hostNetwork": True, "dnsPolicy": "ClusterFirstWithHostNet"}  # the fastest way from slice to slice
    else:
        container["volumeMounts"].append({"name": "shm", "mountPath": "/dev/shm"})  # NCCL's, for which Docker's 64 MB are too small
        spec["volumes"].append({"name": "shm", "emptyDir": {"medium": "Memory"}})
    if pods.spot:
        spec["nodeSelector"]["cloud.google.com/gke-spot"] = "true"
        spec["tolerations"].append(
            {"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        )
    if pods.service_account:
        spec["serviceAccountName"] = pods.service_account
    return spec


def verbatim(word: str) -> str:
    """A word in which Kubernetes puts no variable: it reads $(NAME) in a container's words, and $$ as a dollar sign."""
    return word.replace("$", "$$")
