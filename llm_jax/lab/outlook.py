"""What a program will take on its topology, as tables for a person and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from llm_jax.lab.advice import changes
from llm_jax.lab.ahead import Examined, declared
from llm_jax.lab.experiment import Experiment

GIB = 2**30


def tables(name: str, experiment: Experiment, found: Examined) -> list[Table]:
    """All that was found of one program: memory, messages, time, and what to change where it does not fit."""
    shown = [_memory(name, found), _messages(found), _time(found)]
    return shown if found.fits else [*shown, _largest(found), _advice(experiment, found)]


def summary(question: str, found: Mapping[str, Examined]) -> Table:
    """A row for each program of an ablation."""
    shown = _table(question, caption=f"On {_where(next(iter(found.values())))}; the time is an estimate, nothing has been trained.")
    shown.add_column("arms")
    for column in (
        "parameters",
        "memory a device",
        "of HBM",
        "FLOPs a step",
        "sent a device",
        "s a step",
        "tokens/s",
        "MFU",
        "compiled in",
    ):
        shown.add_column(column, justify="right")
    for arms, one in found.items():
        shown.add_row(
            arms,
            f"{one.parameters:,}",
            f"{one.memory.total / GIB:.2f} GiB",
            f"{one.memory.total / one.limit:.0%}" + ("" if one.fits else " does not fit"),
            f"{one.model:.3g}",
            f"{sum(each.total for each in one.collectives) / GIB:.2f} GiB",
            f"{one.step:.3g}",
            f"{one.tokens / one.step:,.0f}",
            f"{one.estimate.mfu:.1%}",
            f"{one.seconds:.0f} s",
        )
    return shown


def as_json(found: Examined) -> dict[str, Any]:
    """The same as numbers: bytes, FLOPs and seconds."""
    totals = {"memory_bytes": found.memory.total, "memory_limit_bytes": found.limit, "fits": found.fits, "step_seconds": found.step}
    return dataclasses.asdict(found) | totals


# ── tables ───────────────────────────────────────────────────────────────────────────────────────────────────────────
def _table(title: str, *, caption: str = "") -> Table:
    return Table(title=title, caption=caption or None, title_justify="left", caption_justify="left", min_width=100)


def _where(found: Examined) -> str:
    axes = " × ".join(f"{axis}={size}" for axis, size in found.mesh.items() if size > 1) or "one device"
    slices = f"{found.topology.slices} slices of " if found.topology.slices > 1 else ""
    return f"{slices}{found.topology.name}, {found.topology.chips} chips, {axes}"


def _memory(name: str, found: Examined) -> Table:
    verdict = "" if found.fits else f": {(found.memory.total - found.limit) / GIB:.2f} GiB too many"
    title = f"{name}: {found.parameters:,} parameters on {_where(found)}"
    caption = f"{found.memory.total / GIB:.2f} of {found.limit / GIB:.2f} GiB that a program may have{verdict}."
    shown = _table(title, caption=caption)
    shown.add_column("memory of one device")
    shown.add_column("GiB", justify="right")
    shown.add_column("of HBM", justify="right")
    for part, size in found.memory.parts.items():
        shown.add_row(part, f"{size / GIB:.3f}", f"{size / found.limit:.1%}")
    return shown


def _messages(found: Examined) -> Table:
    from llm_jax.train.ahead.roofline import seconds_of

    flags = (
        f" Compiled with LIBTPU_INIT_ARGS='{found.flags}', which `run` sets too where TPU_ACCELERATOR_TYPE names the chips."
        if found.flags
        else ""
    )
    shown = _table(
        "Messages of a step",
        caption=f"What is sent while something is computed is half hidden, or less where it outlasts it.{flags}",
    )
    shown.add_column("kind")
    shown.add_column("over")
    for column in ("messages", "MiB each", "GiB", "ms"):
        shown.add_column(column, justify="right")
    shown.add_column("meanwhile")
    shown.add_column("of")
    for one in found.collectives:
        if one.total < sum(each.total for each in found.collectives) / 1000:
            continue
        over = " × ".join(one.axes) + (" (between slices)" if one.crosses else "")
        each, seconds = f"{one.bytes / 2**20:,.4g} {one.dtype}", sum(seconds_of(one, found.topology))
        shown.add_row(
            one.kind,
            over,
            f"{one.count:,.0f}",
            each,
            f"{one.total / GIB:.3f}",
            f"{1e3 * seconds:.2f}",
            "computed" if one.overlaps else "waited",
            one.label.rpartition("closed_call/")[2][-60:],
        )
    return shown


def _time(found: Examined) -> Table:
    estimate, chip = found.estimate, found.topology.chip
    peak = found.topology.chips * chip.flops
    repeated = found.device * found.topology.chips * chip.devices / max(found.machine.products + found.machine.grouped, 1.0)
    caption = (
        f"MFU = {found.model:.4g} model FLOPs / ({estimate.seconds:.4g} s × {peak:.4g} FLOP/s) = {estimate.mfu:.1%}, "
        f"{found.tokens / estimate.seconds:,.0f} tokens/s. The machine does {found.machine.total:.4g} FLOPs by the traced program, "
        f"{found.machine.total / found.model:.2f} × the model's, with what is computed again "
        f"and all blocks of attention; the devices do {repeated:.2f} × its products. "
        f"{1e3 * estimate.hidden:.1f} ms of messages are hidden. Kernels: {', '.join(found.kernels) or 'none'}."
        + (f" {found.uncounted} loops of unknown length are counted once." if found.uncounted else "")
    )
    shown = _table(f"Time of {'a step' if found.steps == 1 else f'{found.steps} steps'}, estimated", caption=caption)
    shown.add_column("bound by")
    shown.add_column("ms", justify="right")
    shown.add_column("share", justify="right")
    shown.add_column("at")
    rates = {
        "products": f"{chip.matmul:.0%} of {chip.flops / 1e12:,.0f} TFLOP/s a chip",
        "kernels": "attention: half of that peak, less where heads do not fill the matrix unit",
        "memory": f"90% of {chip.bandwidth / 1e9:,.0f} GB/s: what is no product",
        "ici": f"90% of {chip.link / 1e9:,.0f} GB/s a link and direction, {chip.dims} dimensions",
        "dcn": f"{chip.network / 1e9:,.3g} GB/s a chip to other slices",
    }
    for part, rate in rates.items():
        seconds = getattr(estimate, part)
        shown.add_row(part, f"{1e3 * seconds:.2f}", f"{seconds / estimate.seconds:.1%}", rate)
    return shown


def _largest(found: Examined) -> Table:
    shown = _table("The largest places in memory")
    shown.add_column("GiB", justify="right")
    shown.add_column("arrays that lie there, one after another")
    for one in found.memory.largest:
        shown.add_row(f"{one.bytes / GIB:.3f}", one.what)
    return shown


def _advice(experiment: Experiment, found: Examined) -> Table:
    needed = found.memory.total - found.limit
    shown = _table(f"What to change: {needed / GIB:.2f} GiB are too many", caption="Savings are of the analytic model, each alone.")
    shown.add_column("--set")
    shown.add_column("saves GiB", justify="right")
    shown.add_column("enough")
    shown.add_column("costs")
    for one in changes(experiment, declared(experiment).vocabulary, found.mesh, found.memory):
        shown.add_row(one.flag, f"{one.saves / GIB:.2f}", "yes" if one.saves >= needed else "", one.costs)
    return shown
