"""A process that is killed has a sentence printed for it, and one that ends by itself has not."""

import signal
import subprocess
import sys

import pytest

CODE = """
import os, sys
from llm_jax.core.epitaph import Epitaph
epitaph = Epitaph("it is gone")
{end}
"""


@pytest.mark.parametrize(
    "end, code, said",
    [
        ("os.kill(os.getpid(), 9)", -signal.SIGKILL, "it is gone\n"),
        ("os.abort()", -signal.SIGABRT, "it is gone\n"),
        ("sys.exit(3)", 3, ""),
        ("epitaph.withdraw(); epitaph.withdraw(); os._exit(4)", 4, ""),
    ],
)
def test_it_is_said_of_what_ends_without_a_word(end, code, said):
    done = subprocess.run([sys.executable, "-c", CODE.format(end=end)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (code, said)
