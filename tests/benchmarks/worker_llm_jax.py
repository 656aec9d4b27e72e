"""A worker that trains GPT-2 with llm_jax: `python worker_llm_jax.py SIZE [path=value …]`. A unit is a few steps.

It is the real thing: the program that `lab.population` compiles, fed by `data.pipeline` from a token store, driven by
`train.loop.fit`, recorded by the tracker and the progress display. The iterator that the loop draws from waits for the
harness; the loop has settled a unit's last step before it asks for more, because a unit ends at a record.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from itertools import islice

import numpy as np
from harness import requests
from shapes import LOG_EVERY, SHAPES

from llm_jax.core import platform
from llm_jax.data.tokenizers import nameless

FOREVER = 1_000_000  # steps; a multiple of every LOG_EVERY
TOKENS = 2_000_000


def gated(batches: Iterator, per_unit: int, **info) -> Iterator:
    """`batches`, handed out as the harness asks for units of `per_unit` items, after two units to warm up."""
    yield from islice(batches, 2 * per_unit)
    for units in requests(**info):
        yield from islice(batches, units * per_unit)


def main(size: str, *changes: str) -> None:
    """Trains, when asked to, until the input ends."""
    platform.setup(devices=int(os.environ["DEVICES"]) if "DEVICES" in os.environ else None)
    import jax
    from gpt2_llm_jax import gpt2

    from llm_jax.core.written import override_text
    from llm_jax.data.pipeline import dispatches, feed
    from llm_jax.data.store import Tokens
    from llm_jax.io.progress import Progress
    from llm_jax.io.tracker import Tracker
    from llm_jax.lab.plan import cost
    from llm_jax.lab.population import compile_population
    from llm_jax.train.loop import Rhythm, Session, fit

    shape = SHAPES[size]
    experiment = override_text(gpt2(shape, steps=FOREVER, log_every=LOG_EVERY[size]), changes)
    train, price = experiment.train, cost(experiment, shape.vocabulary)
    ids = np.random.default_rng(0).integers(0, shape.vocabulary, TOKENS).astype(np.uint16)
    rows = experiment.data.packing.rows(Tokens(ids, np.zeros(1, np.int64), None), shape.length, "")
    program = compile_population(experiment, 1, nameless(shape.vocabulary)).bind([experiment])
    rhythm = Rhythm.fitting(
        steps=FOREVER,
        log_every=train.log_every,
        evaluate_every=FOREVER,
        checkpoint_every=FOREVER,
        dispatch=train.steps_per_dispatch or platform.traits().steps_per_dispatch,
    )
    source = dispatches(experiment.data, [rows], seeds=[0], steps_per_item=rhythm.dispatch, steps=FOREVER)
    per_unit = train.log_every // rhythm.dispatch
    info = {
        "unit": train.log_every * shape.rows * shape.length,
        "parameters": price.parameters,
        "devices": len(jax.devices()),
        "dispatch": rhythm.dispatch,
    }
    with tempfile.TemporaryDirectory() as folder, open(os.devnull, "w") as nowhere:
        tracker = Tracker(folder)

        def record(step: int, rows: list[dict[str, float]]) -> None:
            tracker.log(rows[0])

        with Progress(
            FOREVER,
            size,
            flops_per_step=price.flops / FOREVER,
            tokens_per_step=price.tokens / FOREVER,
            peak_flops=1e12,
            file=nowhere,
        ) as progress:
            session = Session(
                record=record,
                rewind=lambda step, recorded: None,
                report=progress.update,
                evaluations={},
                final={},
                tokens_per_step=price.tokens / FOREVER,
                flops_per_step=price.flops / FOREVER,
            )

            def batches(start: int) -> Iterator:
                return gated(feed(source, start_step=start), per_unit, **info)

            try:
                fit(program, batches, rhythm, session)
            except StopIteration:  # the harness wants no more
                tracker.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
