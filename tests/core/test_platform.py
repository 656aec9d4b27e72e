"""Settings of the process: what is asked for is in `XLA_FLAGS`, and what the user wrote there stays."""

import os

import pytest

from llm_jax.core import chips, platform
from llm_jax.core.config import ConfigError

WANTED = "--xla_gpu_deterministic_ops=true"


@pytest.fixture
def flags(monkeypatch):
    def given(text="", platforms="", **settings):
        monkeypatch.setenv("XLA_FLAGS", text)
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        platform.setup(cache=False, **settings)
        return os.environ["XLA_FLAGS"].split()

    return given


def test_what_makes_a_gpu_deterministic_is_set_where_there_may_be_one(flags):
    assert WANTED in flags(deterministic=True) and WANTED in flags("", "cuda", deterministic=True)
    assert WANTED not in flags() and all(WANTED not in flags("", kind, deterministic=True) for kind in ("cpu", "tpu"))
    assert {"--xla_a=1", WANTED} <= set(flags("--xla_a=1", "cuda", deterministic=True))


def test_the_opposite_in_the_environment_is_a_contradiction(flags):
    with pytest.raises(ConfigError, match="--deterministic contradicts XLA_FLAGS"):
        flags("--xla_gpu_deterministic_ops=false", deterministic=True)


def test_the_number_of_devices_that_the_user_set_stays(flags):
    given = {"--xla_force_host_platform_device_count=3", "--xla_disable_hlo_passes=dce"}
    assert set(flags(" ".join(given))) == given
    assert "--xla_force_host_platform_device_count=5" in flags(devices=5)


def test_sums_are_left_as_they_are_written_where_there_may_be_cpus(flags):
    assert platform.SUMS_AS_WRITTEN in flags() and platform.SUMS_AS_WRITTEN in flags(platforms="cpu")
    assert platform.SUMS_AS_WRITTEN not in flags(platforms="cuda")


@pytest.fixture
def libtpu(monkeypatch):
    """libtpu's flags after `setup` on a slice."""

    def given(accelerator, text=None, platforms=""):
        monkeypatch.setenv("TPU_ACCELERATOR_TYPE", accelerator)
        monkeypatch.setenv("XLA_FLAGS", "")
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        monkeypatch.setenv(platform.LIBTPU, text or "")
        platform.setup(cache=False)
        return os.environ[platform.LIBTPU].split()

    return given


def test_messages_overlap_on_the_slices_that_need_flags_for_it(libtpu):
    assert libtpu("v5p-512") == libtpu("v6e-256", platforms="tpu") == list(chips.SPARSE_CORES)
    assert libtpu("v5litepod-16") == libtpu("v4-8") == libtpu("") == []
    assert libtpu("v5p-512", platforms="cpu") == []  # compiling ahead, perhaps for others


def test_what_the_user_told_libtpu_stays(libtpu):
    off = chips.SPARSE_CORES[0].replace("true", "false")
    assert sorted(libtpu("v5p-512", f"{off} --xla_a=1")) == sorted([off, "--xla_a=1", *chips.SPARSE_CORES[1:]])
