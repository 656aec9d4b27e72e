"""What two real processes agree on, and whom one names that waits for the other in vain."""

import contextlib
import json
import os
import socket
import subprocess
import sys

import pytest

from llm_jax.core import distributed
from llm_jax.core.config import ConfigError

# each says what it found, as a line of JSON; then the first waits for the second, which lives until its input ends
EACH = """
import json, sys
from llm_jax.core import distributed
from llm_jax.core.config import ConfigError

def refused(call, *given):
    try:
        call(*given)
    except (ConfigError, distributed.Missing) as error:
        return str(error)

def act():
    raise ConfigError("is not to be had", "data")

own = int(sys.argv[2])
distributed.start(coordinator=sys.argv[1], processes=2, process=own)
found = {
    "agreed": [distributed.agreed("a number", [1, None] if own == 0 else object()), distributed.agreed("a number", 2 + own)],
    "everyones": [distributed.everyones("a name", name) for name in (f"of {own}", "")],
    "first_said": [distributed.first_said("what", said[own]) for said in (("a", "b"), (None, "b"), ("a", None), (None, None))],
    "led": [distributed.led("where", lambda: own), refused(distributed.led, "where", act)],
    "the same": [refused(distributed.require_same, "the code", code) for code in ("1", f"of {own}")],
}
print(json.dumps(found), flush=True)
if own == 0:
    print(json.dumps(refused(lambda: distributed.meet("a place", seconds=3))), flush=True)
sys.stdin.read()
distributed.leave(0)
"""


@pytest.fixture(scope="module")
def two():
    """Two processes that have met, and may meet again."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with contextlib.ExitStack() as ends:
        processes = []
        for index in range(2):
            processes.append(subprocess.Popen([sys.executable, "-c", EACH, address, str(index)], env=env, **pipes))
            ends.enter_context(processes[-1])  # which closes its pipes and waits for it
            ends.callback(processes[-1].kill)
        yield processes, [json.loads(process.stdout.readline()) for process in processes]


def test_two_processes_agree(two):
    processes, found = two
    hosts = [f"process {index} ({socket.gethostname()}, pid {process.pid})" for index, process in enumerate(processes)]
    for own in found:
        assert own["agreed"] == [[1, None], 2], "the first's, whatever the other gives"
        assert own["everyones"] == [["of 0", "of 1"], ["", ""]]
        assert own["first_said"] == ["a", "b", "a", None]
        assert own["led"] == [0, "data is not to be had"], "an error of the first is everyone's"
        same, differs = own["the same"]
        assert same is None and differs.startswith(f"the code differs: {hosts[1]} has 'of 1' and {hosts[0]} 'of 0'; install")


def test_one_that_waits_in_vain_names_who_has_not_come(two):
    processes, _ = two
    told = json.loads(processes[0].stdout.readline())
    assert told == f"waited 3 s at 'a place' for process 1 ({socket.gethostname()}, pid {processes[1].pid})"
    assert processes[1].poll() is None, "it lives"


def test_a_process_alone_waits_for_nobody():
    distributed.meet("a place", seconds=0)
    assert distributed.agreed("a number", 1) == 1 and distributed.everyones("a name", "own") == ["own"]
    assert [distributed.first_said("what", said) for said in ("a", None)] == ["a", None]
    distributed.require_same("the code", "1")
    with pytest.raises(ConfigError, match="is not to be had"):
        distributed.led("where", _refuses)


def _refuses():
    raise ConfigError("is not to be had", "data")
