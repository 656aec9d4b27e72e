"""Splash attention, the flash attention for TPUs in Pallas that skips what a mask hides; interpreted, and slow, elsewhere."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as shapes
from jax.sharding import PartitionSpec

from llm_jax.core import platform
from llm_jax.core.sharding import axes_over, parts
from llm_jax.nn.kernels.call import Call, Kernel
from llm_jax.nn.kernels.sequence import Line, line_of
from llm_jax.nn.masks import Bidirectional, Causal, Mask, Places, Prefix, SlidingWindow

LANES = 128  # lengths are padded to whole vector registers
NOWHERE = -1, -2  # documents of queries and keys that meet nothing


def attend(call: Call) -> jax.Array:
    """`[B, L, H, V]`; on a mesh each device for its own rows, heads and queries: no compiler splits a kernel over an axis."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _attend(call, _kernel(call, None), None)
    call = _with_heads_to_split(call)
    rows, heads = axes_over("batch", len(call.q_BLHK)), axes_over("kv_heads_act", call.k_BMGK.shape[2])
    line, segments = line_of(call, unit=LANES), call.queries.segment
    length = line.axes if line else ()
    kernel = _kernel(replace(call, q_BLHK=call.q_BLHK[:, :, :: parts(heads)]), line)  # of the heads of one device
    by_head = PartitionSpec(rows, length, heads)

    def local(kernel, q_BLHK, k_BMGK, v_BMGV, segment_BL, sinks_H):
        places = Places(segment=segment_BL)
        given = {"q_BLHK": q_BLHK, "k_BMGK": k_BMGK, "v_BMGV": v_BMGV, "sinks_H": sinks_H}
        return _attend(replace(call, **given, queries=places, keys=places), kernel, line)

    axes = jax.sharding.AbstractMesh(mesh.axis_sizes, mesh.axis_names)  # splash cannot read one of which a `shard_map` has a part
    shards = kernel.manual_sharding_spec(jax.sharding.NamedSharding(axes, PartitionSpec(None, length)))
    specs = shards, by_head, by_head, by_head, PartitionSpec(rows), PartitionSpec(heads)
    names = set(mesh.axis_names) - set(mesh.manual_axes)  # those of one device too, or lowering for TPUs refuses it
    split = jax.shard_map(local, in_specs=specs, out_specs=by_head, axis_names=names, check_vma=False)
    return split(kernel, call.q_BLHK, call.k_BMGK, call.v_BMGV, segments, call.sinks_H)


def _with_heads_to_split(call: Call) -> Call:
    """With keys and values repeated where there are fewer heads of them than devices that share the queries'."""
    H, G = call.q_BLHK.shape[2], call.k_BMGK.shape[2]
    devices = parts(axes_over("heads_act", H))
    copies = devices // math.gcd(devices, G)
    if copies == 1 or H % (G * copies):
        return call
    k, v = (jnp.repeat(x, copies, 2) for x in (call.k_BMGK, call.v_BMGV))
    return replace(call, k_BMGK=k, v_BMGV=v)


def _kernel(call: Call, line: Line | None) -> splash.SplashAttentionKernel:
    """For queries of all devices along the line, each of which has its own part of what the kernel knows of the mask."""
    (queries, keys), devices = (length + -length % LANES for length in call.lengths), line.size if line else 1
    return splash.make_splash_mha(
        shapes.MultiHeadMask([_shape(call.mask, queries, keys, line)] * call.q_BLHK.shape[2]),
        block_sizes=_blocks(queries // devices // (2 if line and line.dealt else 1), keys),
        head_shards=1,
        q_seq_shards=devices,
        attn_logits_soft_cap=call.soft_cap,
        interpret=platform.name() != "tpu",
    )


def _attend(call: Call, kernel: splash.SplashAttentionKernel, line: Line | None) -> jax.Array:
    """On one device. Documents are of whole rows; of queries, keys and values it has its own part of a line."""
    k_BMGK, v_BMGV, q_BLHK = call.k_BMGK, call.v_BMGV, call.q_BLHK * jnp.asarray(call.scale, call.q_BLHK.dtype)
    if line:
        q_BLHK, (k_BMGK, v_BMGV) = line.deal(q_BLHK), map(line.gathered, (k_BMGK, v_BMGV))
    (B, L), M = q_BLHK.shape[:2], k_BMGK.shape[1]
    q, k, v = (_padded(x, 0).transpose(0, 2, 1, 3) for x in (q_BLHK, k_BMGK, v_BMGV))
    segments = _segments(call, B, (line.size * L if line else L, M))
    if line and segments:
        segments = segments._replace(q=segments.q[:, line.own(M)])
    out_BHLV = jax.vmap(kernel, in_axes=(0, 0, 0, 0, None))(q, k, v, segments, call.sinks_H)
    out_BLHV = out_BHLV[:, :, :L].transpose(0, 2, 1, 3)
    if segments is not None and call.queries.segment is not None:
        out_BLHV = jnp.where((segments.q[:, :L] >= 0)[:, :, None, None], out_BLHV, 0)  # it averages over what it cannot see
    return line.collect(out_BLHV) if line else out_BLHV


def _padded(x: jax.Array, value: int) -> jax.Array:
    """The second axis filled up to whole registers."""
    widths = [(0, 0)] * x.ndim
    widths[1] = (0, -x.shape[1] % LANES)
    return jnp.pad(x, widths, constant_values=value)


def _segments(call: Call, rows: int, lengths: tuple[int, int]) -> splash.SegmentIds | None:
    """Documents, filled up with what meets nothing; None where there is only one and nothing is filled up."""
    given = call.queries.segment, call.keys.segment
    if all(s is None for s in given) and not any(length % LANES for length in lengths):
        return None
    filled = (jnp.zeros((rows, n), jnp.int32) if s is None else s for s, n in zip(given, lengths, strict=True))
    return splash.SegmentIds(*(_padded(s, pad) for s, pad in zip(filled, NOWHERE, strict=True)))


def _blocks(queries: int, keys: int) -> splash.BlockSizes:
    q, k = (_block(length) for length in (queries, keys))
    back = {"block_q_dkv": q, "block_kv_dkv": k, "block_kv_dkv_compute": k, "block_q_dq": q, "block_kv_dq": k}
    return splash.BlockSizes(block_q=q, block_kv=k, block_kv_compute=k, **back)


def _block(length: int) -> int:
    """The greatest multiple of `LANES` that divides the length and is at most the platform's block."""
    most = max(platform.traits().attention_block, LANES)
    return max(size for size in range(LANES, most + 1, LANES) if length % size == 0)


# ── masks ────────────────────────────────────────────────────────────────────────────────────────────────────────────
class Shown(shapes.Mask):
    """A mask as splash reads it where it cannot compute it in the kernel: its different blocks are kept.

    Chunks are among them, though splash has a name for those: the division asks which chip it is for, which no ahead-of-time
    compilation can say, and aligned chunks keep one block.
    """

    def __init__(self, mask: Mask, shape: tuple[int, int]):
        self.mask, self._shape = mask, shape

    @property
    def shape(self) -> tuple[int, int]:
        """Of queries and keys."""
        return self._shape

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        queries, keys = (Places(np.arange(n, dtype=np.int32)[s][None]) for n, s in zip(self._shape, index, strict=True))  # type: ignore[arg-type]
        return np.asarray(self.mask.visible(queries, keys))[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shown) and (self.mask, self._shape) == (other.mask, other._shape)

    def __hash__(self) -> int:
        return hash((self.mask, self._shape))


@functools.singledispatch
def _shape(mask: Mask, queries: int, keys: int, line: Line | None) -> shapes.Mask:
    """The mask in splash's terms, with queries in the order in which a line's devices have them."""
    return Shown(mask, (queries, keys))


@_shape.register
def _(mask: Causal | Prefix, queries: int, keys: int, line: Line | None) -> shapes.Mask:
    shape = shapes.CausalMask((queries, keys))
    if line:
        shape.q_sequence = line.owners(queries).reshape(-1)
    return shape


@_shape.register
def _(mask: Bidirectional, queries: int, keys: int, line: Line | None) -> shapes.Mask:
    return shapes.FullMask((queries, keys))


@_shape.register
def _(mask: SlidingWindow, queries: int, keys: int, line: Line | None) -> shapes.Mask:
    if mask.sinks:
        return Shown(mask, (queries, keys))
    return shapes.LocalMask((queries, keys), (mask.window - 1, 0 if mask.causal else mask.window - 1), offset=0)


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def refusal(call: Call) -> str | None:
    """Why splash cannot."""
    return _arithmetic(call) or _places(call)


def _arithmetic(call: Call) -> str | None:
    if call.bias is not None:
        return "adds no bias to scores, neither ALiBi's nor T5's"
    if call.key is not None:
        return "has no dropout of attention weights"
    if call.soft_cap is not None and not isinstance(call.soft_cap, (int, float)):
        return "needs a soft cap that is a plain number"
    if call.dtype != jnp.float32:
        return f"sums in float32, and was given {call.q_BLHK.dtype}"
    return None


def _places(call: Call) -> str | None:
    L, M = call.lengths
    if not call.counted:
        return "must know its mask before the program runs, so places must be counted from 0 (no index)"
    if isinstance(call.mask, Prefix) and call.keys.prefix is not None:
        return "must know its mask before the program runs, and prefixes come with the data"
    if call.packed and call.mask.counts:
        return f"counts places for {type(call.mask).__name__} in the row, and was given positions in documents"
    if call.queries.segment is not call.keys.segment:
        return "cannot tell which queries see nothing where queries and keys have documents of their own"
    if L > M and not isinstance(call.mask, (Bidirectional, Causal)):
        return f"leaves queries past the last key undefined, got {L} queries and {M} keys"
    return _pieces(call)


def _pieces(call: Call) -> str | None:
    length = call.lengths[0]
    axes = axes_over("length", length)
    if axes and line_of(call, unit=LANES) is None:
        return f"takes rows split over {parts(axes)} devices in pieces of a multiple of {LANES} tokens, got {length}"
    return None


SPLASH = Kernel(attend, refusal, shares_rows=True)
