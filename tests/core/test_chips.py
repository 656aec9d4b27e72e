import math

import pytest

from llm_jax.core.chips import TPUS, Topology, of_accelerator, of_kind
from llm_jax.core.config import ConfigError


@pytest.mark.parametrize(
    "kind, name",
    [("TPU v4", "TPU v4"), ("TPU v5 lite", "TPU v5e"), ("TPU v5", "TPU v5p"), ("TPU v6 lite", "TPU v6e"), ("TPU7x", "TPU7x")],
)
def test_device_kinds_of_libtpu(kind, name):
    chip = of_kind(kind)
    assert chip is not None
    assert chip.name == name


@pytest.mark.parametrize(
    "accelerator, family", [("v4-8", "v4"), ("v5litepod-16", "v5e"), ("v5p-512", "v5p"), ("v6e-256", "v6e"), ("tpu7x-128", "tpu7x")]
)
def test_what_cloud_tpu_calls_a_slice(accelerator, family):
    assert of_accelerator(accelerator) is TPUS[family]
    assert of_accelerator("") is None and of_accelerator("a100-8") is None


def test_an_unknown_kind_is_no_chip():
    assert of_kind("cpu") is None


@pytest.mark.parametrize("family, chips", [("v5e", 256), ("v6e", 256), ("v5p", 6144), ("v4", 3072), ("tpu7x", 9216)])
def test_the_largest_slices_are_googles(family, chips):
    assert math.prod(TPUS[family].slices()[-1]) == chips


@pytest.mark.parametrize("family", TPUS)
def test_every_slice_is_a_topology(family):
    for shape in TPUS[family].slices():
        topology = Topology.parse(f"{family}:{'x'.join(map(str, shape))}")
        assert (topology.shape, topology.chips) == (shape, math.prod(shape))
        assert len(shape) == TPUS[family].dims


@pytest.mark.parametrize(
    "text, near",
    [("v5e:16x17", "v5e:16x16"), ("v5p:4x4x5", "v5p:4x4x4"), ("v6e:256", "v6e:16x16"), ("v5e:", "v5e:4x4"), ("v6:4x4", "v6e")],
)
def test_what_does_not_exist_is_told_what_does(text, near):
    with pytest.raises(ConfigError, match=f"--topology={text}.*{near}"):
        Topology.parse(text)


def test_bandwidth_grows_with_the_dimensions_that_a_ring_fills():
    slice_, link = Topology.parse("v5e:16x16"), 50e9
    assert slice_.bandwidth(256) == 4 * link  # both dimensions, from both sides
    assert slice_.bandwidth(16) == 2 * link
    assert slice_.bandwidth(4) == link  # its ends are not linked
    assert Topology.parse("v5e:4x4").bandwidth(16) == 2 * link
    assert Topology.parse("v5p:4x4x4").bandwidth(64) == 6 * 100e9
