"""A queued resource of Cloud TPU by gcloud's words: how it is, a command on its hosts, its end."""

from __future__ import annotations

import re
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass

from launch.command import LaunchError, Shell

GONE = "SUSPENDING", "SUSPENDED", "FAILED", "DELETING"
TAKEN = "PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING"  # of single nodes
ALIVE = "--ssh-flag=-oServerAliveInterval=30"  # a connection to a machine that is gone ends
PATIENCE = 5  # looks at the state after a run that was stopped, which may be ahead of it; tries to connect to new machines


class Lost(LaunchError):
    """The machines were taken away."""


@dataclass(frozen=True)
class Tpu:
    """A queued resource, by gcloud's words."""

    name: str
    place: tuple[str, ...]
    shell: Shell
    slices: int = 1
    ssh: tuple[str, ...] = ()
    poll: float = 30.0

    def queued(self, action: str, *words: str) -> list[str]:
        """A command of gcloud about it."""
        return ["gcloud", "compute", "tpus", "queued-resources", action, *words, *self.place]

    def state(self) -> str | None:
        """The queue's state of it, or a node's if that was taken away; None if there is no such resource."""
        code, said = self.shell.ask(self.queued("describe", self.name, "--format=value(state.state)"), supposed="ACTIVE")
        if code and re.search(r"NOT_FOUND|not found", said):
            return None
        if code:
            raise LaunchError(f"gcloud does not say how {self.name} is: {said.splitlines()[-1] if said else f'code {code}'}")
        if said != "ACTIVE" or self.shell.dry:
            return said
        listed = ["gcloud", "compute", "tpus", "tpu-vm", "list", "--format=value(name.basename(),state)", *self.place]
        code, nodes = self.shell.ask(listed, supposed="")
        states = dict(line.split() for line in nodes.splitlines() if len(line.split()) == 2 and not code)
        mine = [self.name] if self.slices == 1 else [f"{self.name}-{index}" for index in range(self.slices)]
        return next((states[node] for node in mine if states.get(node) in TAKEN), "ACTIVE")

    def still_there(self) -> None:
        """Raises `Lost` if it was taken away, and `LaunchError` if it was deleted."""
        state = self.state()
        if state is None:
            raise LaunchError(f"{self.name} was deleted meanwhile")
        if state != "ACTIVE":
            raise Lost(f"{self.name} is {state}")

    def everywhere(self, command: str) -> list[str]:
        """A command of gcloud that runs a line of shell on every host."""
        return self.queued("ssh", self.name, "--node=all", "--worker=all", f"--command={command}", ALIVE, *self.ssh)

    def on_first(self, command: str) -> list[str]:
        """The same on the first host of the first slice."""
        return self.queued("ssh", self.name, "--node=0", "--worker=0", f"--command={command}", ALIVE, *self.ssh)

    def patiently(self, argv: Sequence[str]) -> None:
        """Runs a command that fails while machines start. Raises `Lost` or `LaunchError`."""
        for left in reversed(range(PATIENCE)):
            if self.shell.run(argv) == 0:
                return
            self.still_there()
            if left:
                time.sleep(self.poll)
        raise LaunchError(f"{shlex.join(argv[:7])} … failed {PATIENCE} times on machines that are there: what it says stands above")

    def delete(self) -> None:
        """Deletes it with its nodes."""
        self.shell.do(self.queued("delete", self.name, "--force", "--quiet"))
