"""The launchers' table, which may import nothing of the package, says the same as the one that programs are compiled for."""

import pytest

from launch import accelerators
from launch.command import LaunchError
from llm_jax.core import chips
from llm_jax.core.config import ConfigError


def test_the_same_chips():
    assert list(accelerators.CHIPS) == list(chips.TPUS)


@pytest.mark.parametrize("name", chips.TPUS)
def test_the_same_topologies(name):
    assert set(accelerators.CHIPS[name].topologies()) == set(chips.TPUS[name].slices())


@pytest.mark.parametrize("text", ["v5e:3x5", "v6e:16x17", "v5p:4x4x5", "v4:8x4x4", "tpu7x:1x1x2"])
def test_the_same_are_refused_with_the_same_nearest(text):
    with pytest.raises(ConfigError) as core:
        chips.Topology.parse(text)
    with pytest.raises(LaunchError) as launcher:
        accelerators.parse(text)
    assert str(launcher.value) == str(core.value)
