"""How long a step takes on a machine, from what it computes, moves and sends: few constants, each of which means something.

    seconds = products / (matmul · peak) + kernels / (KERNEL · fill · peak) + memory / (STREAM · bandwidth) + messages

products: FLOPs of matrix products, which reach the share `Chip.matmul` of the peak; kernels: those of attention, bound by what is
done to the scores besides, and filling `fill` of a matrix unit that is wider than a head; memory: bytes of what is no product, such
as norms, activations and the optimizer, or of products beyond what their arithmetic hides; messages: what the links need, all of it
where nothing is computed meanwhile, and of the rest what outlasts the computation, but `SHOWN` of it at least. MFU is the model's
FLOPs over what the chips could have done in that time (Chowdhery et al. 2022, appendix B).

The peaks, bandwidths and links are the data sheets' (`core.chips`). `Chip.matmul` (one for v4 to v5p, one
for v6e and later), `KERNEL` and `SHOWN` are fitted, to six runs that MaxText has published (`tests/lab/test_expected.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llm_jax.core.chips import Topology
from llm_jax.train.ahead.collectives import Collective
from llm_jax.train.ahead.operations import Operation

KERNEL = 0.5  # of the peak that fused attention reaches: its exponentials take the vector unit as long as its products the other
STREAM = 0.9  # of the memory's bandwidth that long reads and writes reach
LINK = 0.9  # of a link's (Austin et al. 2025, "How to Scale Your Model": 45 of 50 GB/s on v5e)
HOP = 1e-6  # seconds from chip to chip (ibid.)
SHOWN = 0.5  # of a message that is sent while something is computed: the layer's first, and what disturbs its products


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step, by what they go to, and what share of the peak the model's FLOPs are (MFU) and all the machine's (HFU)."""

    products: float
    kernels: float
    memory: float
    ici: float
    dcn: float
    hidden: float
    mfu: float
    hfu: float

    @property
    def seconds(self) -> float:
        """Of a step; what is `hidden` behind computation costs nothing."""
        return self.products + self.kernels + self.memory + self.ici + self.dcn


def estimate(
    *,
    products: float,
    memory: float,
    collectives: Iterable[Collective],
    topology: Topology,
    model: float,
    kernels: float = 0.0,
    head: int = 128,
) -> Estimate:
    """The time of a step. products, kernels, memory: FLOPs, FLOPs and bytes of one device; collectives: those of a step.

    kernels: of attention, for the blocks that are computed; head: channels of its heads; model: the model's FLOPs of a step, of all
    devices together.
    """
    chip = topology.chip
    peak, bandwidth = chip.flops / chip.devices, chip.bandwidth / chip.devices
    computing = products / (chip.matmul * peak)
    attending = kernels / (KERNEL * min(1.0, head / chip.tile) * peak)
    moving = memory / (STREAM * bandwidth)
    sums = {(near, overlaps): 0.0 for near in (True, False) for overlaps in (True, False)}
    for one in collectives:
        inside, outside = seconds_of(one, topology)
        sums[True, one.overlaps] += inside
        sums[False, one.overlaps] += outside
    behind, cover = sums[True, True] + sums[False, True], computing + attending
    shown = max(SHOWN * behind, behind - cover) / behind if behind else 0.0
    ici, dcn = (sums[near, False] + shown * sums[near, True] for near in (True, False))
    total = computing + attending + moving + ici + dcn
    could = total * peak
    devices = topology.chips * chip.devices
    return Estimate(
        computing,
        attending,
        moving,
        ici,
        dcn,
        (1 - shown) * behind,
        model / devices / could if could else 0.0,
        (products + kernels) / could if could else 0.0,
    )


def seconds_of(one: Collective, topology: Topology) -> tuple[float, float]:
    """Seconds that all messages of a kind need on the links of a slice, and on the network between slices.

    Where devices of several slices take part, each slice first does its own part, and what is left of the array on each chip goes
    over the network.
    """
    chip, slices = topology.chip, topology.slices if one.crosses else 1
    local = max(one.parts // slices, 1)
    each = one.travels / (1 - 1 / one.parts) if one.parts > 1 and one.kind != "collective-permute" else one.travels
    if one.kind == "collective-permute":
        near, far = (0.0, each) if one.crosses else (each / chip.link / LINK, 0.0)
        return one.count * (near + HOP), one.count * far / (chip.network / chip.devices)
    near = each * (1 - 1 / local) / (topology.bandwidth(max(local // chip.devices, 1)) / chip.devices * LINK)
    hops = sum(min(side, local) / 2 for side in topology.shape)
    far = each / local * (1 - 1 / slices) / (chip.network / chip.devices)
    return one.count * (near + (HOP * hops if local > 1 else 0.0)), one.count * far


def unhidden(operations: Sequence[Operation], topology: Topology) -> float:
    """Bytes that operations move beyond what their own products hide; those of hand-written kernels are hidden by theirs."""
    chip = topology.chip
    hides = STREAM * chip.bandwidth / (chip.matmul * chip.flops)  # bytes that are moved in the time of a FLOP
    return sum(one.times * max(0.0, one.bytes - one.flops * hides) for one in operations if not (one.kernel or one.overlaps))
