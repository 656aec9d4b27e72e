import pytest

from llm_jax.core.chips import Topology
from llm_jax.train.ahead import roofline
from llm_jax.train.ahead.collectives import Collective
from llm_jax.train.ahead.operations import Operation

POD = Topology.parse("v5e:16x16")
PEAK = 197e12


def test_without_anything_else_the_products_decide():
    found = roofline.estimate(products=PEAK, memory=0, collectives=[], topology=POD, model=256 * PEAK * 3 / 4)
    assert found.seconds == pytest.approx(1 / 0.93)
    assert found.mfu == pytest.approx(0.93 * 3 / 4)  # a quarter of it was computed again
    assert found.hfu == pytest.approx(0.93)


def test_memory_is_read_at_its_bandwidth():
    assert roofline.estimate(products=0, memory=0.819e12, collectives=[], topology=POD, model=0).seconds == pytest.approx(1 / 0.9)


@pytest.mark.parametrize("head, times", [(256, 1), (128, 2), (64, 4)])
def test_narrow_heads_leave_a_wide_matrix_unit_empty(head, times):
    wide = Topology.parse("v6e:16x16")
    found = roofline.estimate(products=0, kernels=918e12, memory=0, collectives=[], topology=wide, model=0, head=head)
    assert found.kernels == pytest.approx(times / roofline.KERNEL)


def gathered(size, overlaps=False, parts=256, crosses=False):
    return Collective("all-gather", size, parts, ("fsdp",), overlaps=overlaps, crosses=crosses)


def test_a_gather_takes_what_arrives_over_all_links():
    inside, outside = roofline.seconds_of(gathered(200e9), POD)
    assert inside == pytest.approx(255 / 256 / 0.9, rel=1e-4)
    assert outside == 0


def test_a_sum_takes_twice_as_long_as_a_gather():
    twice = roofline.seconds_of(Collective("all-reduce", 200e9, 256), POD)[0]
    assert twice == pytest.approx(2 * roofline.seconds_of(gathered(200e9), POD)[0], rel=1e-4)


def test_what_is_sent_meanwhile_is_half_hidden_or_what_outlasts_the_computation():
    def shown(size):
        return roofline.estimate(products=PEAK, memory=0, collectives=[gathered(size, overlaps=True)], topology=POD, model=0)

    short, long = shown(18e9), shown(1800e9)
    assert short.ici == pytest.approx(0.1 * 255 / 256 * roofline.SHOWN, rel=1e-3)
    assert long.ici == pytest.approx(10 * 255 / 256 - long.products, rel=1e-3)
    assert short.hidden == pytest.approx(short.ici)


def test_between_slices_each_chip_sends_its_part_of_the_array():
    two = Topology.parse("v5e:16x16", slices=2)
    inside, outside = roofline.seconds_of(Collective("all-reduce", 256e9, 512, crosses=True), two)
    assert outside == pytest.approx(2 * 1e9 / 2 / 3.125e9)
    assert inside == pytest.approx(2 * 255 * 1e9 / (200e9 * 0.9), rel=1e-4)
    only = roofline.seconds_of(Collective("all-reduce", 1e9, 2, crosses=True), two)
    assert only == (0, pytest.approx(2 * 1e9 / 2 / 3.125e9))


def test_bytes_that_products_hide_are_free():
    balance = 0.9 * 0.819e12 / (0.93 * PEAK)
    product, norm = Operation("a", 1e12, 0.5e12 * balance), Operation("b", 0.0, 1e6, times=3)
    copied = Operation("c", 0.0, 1e9, overlaps=True)
    assert roofline.unhidden([product, norm, copied], POD) == pytest.approx(3e6)
    heavy = Operation("a", 1e12, 1.5e12 * balance)
    assert roofline.unhidden([heavy], POD) == pytest.approx(0.5e12 * balance)
