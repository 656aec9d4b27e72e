"""Text to tokens on disk, and tokens on disk to packed batches, beside Hugging Face's `datasets` and `tokenizers`: on one core, in turn.

    python tests/benchmarks/pipeline.py --rounds=7 --at_least=1,2

Both sides read the same JSON lines with the same tokenizer.json, and before anything is timed they are held to give the same ids in
the same order, and the same rows, segments and positions.

tokenizing, from JSON lines to files of ids, an end after each document:
  llm_jax     `prepare` with one worker: reads, names and splits documents, encodes, writes ids and starts, SHA-256 of everything.
  datasets    `load_dataset("json")`, then `map(batched=True)` over the library's `encode_batch_fast`, whose cache file counts as
              written: `save_to_disk` is not counted. Of the batch sizes and of lists and arrays (--tried), the quickest.
packing, from there to an epoch of shuffled batches in memory, [B, L] int32 tokens, targets, segments and positions:
  llm_jax     `rows_of` and `feed` on `Prepared`, --steps batches a dispatch, as training reads them.
  numpy       `map(group_texts, batched=True)`, that is concatenate, cut, drop the rest, written with NumPy; `shuffle`;
              `with_format("numpy")`, `iter(batch_size)`. Targets, segments and positions are computed from the ends of documents as
              a batch comes, which was quicker than columns of them. Of the batch sizes of the map, the quickest.
  run_clm     the same with group_texts as transformers' run_clm.py has it, in Python's lists.
  arrow       as numpy, but batches are taken from Arrow's buffers by hand (`with_format("arrow")`).
"without map" is the same epoch from rows that are packed already. Printed are tokens a second (median) and how many times as quick as
the others we are, the median of the rounds' ratios with the least and the greatest, by wall time and by processor seconds, children's
included. --at_least: the exit code is 1 where the median ratio by processor seconds is below the first of the two numbers in
tokenizing (to datasets) or below the second in packing (to numpy, with its map).
"""

from __future__ import annotations

import functools
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from absl import app, flags
from harness import wait_for_quiet

if TYPE_CHECKING:
    from pipeline_datasets import Theirs
    from pipeline_llm_jax import Ours

CORPUS = flags.DEFINE_string("corpus", "StandardLibrary()", "A corpus as it is written in an experiment file; all of it is used.")
PARAGRAPHS = flags.DEFINE_bool("paragraphs", False, "Documents are cut at blank lines, into short ones.")
TOKENIZER = flags.DEFINE_string("tokenizer", "ByteLevelBPE(8192)", "A tokenizer, the same; it must have a tokenizer.json.")
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens a row.", lower_bound=2)
BATCH = flags.DEFINE_integer("batch", 16, "Rows a batch.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 8, "Batches a dispatch of ours.", lower_bound=1)
WORKS = flags.DEFINE_list("works", ["tokenizing", "packing"], "What is measured.")
TRIED = flags.DEFINE_list("tried", ["100", "1000"], "Batch sizes that are tried for map.")
ROUNDS = flags.DEFINE_integer("rounds", 5, "Pieces of each side.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 1.0, "Length of a piece of packing, about.")
AT_LEAST = flags.DEFINE_list("at_least", None, "The least ratios of tokenizing and of packing.")
PATIENCE = flags.DEFINE_float("patience", 5.0, "Seconds to wait for the machine to be quiet, before each round.")

Times = tuple[float, float]  # wall and processor seconds a token


# ── the same text ────────────────────────────────────────────────────────────────────────────────────────────────────
def write_text(file: pathlib.Path) -> int:
    """All documents of the corpus as JSON lines; their bytes."""
    from llm_jax.core.written import parse
    from llm_jax.data.corpora import Corpus

    size = 0
    with open(file, "w") as lines:
        for _, text in parse(CORPUS.value, Corpus, "--corpus").named():
            for part in text.split("\n\n") if PARAGRAPHS.value else [text]:
                if part.strip():
                    size += len(part.encode())
                    print(json.dumps({"text": part}), file=lines)
    return size


# ── the same work ────────────────────────────────────────────────────────────────────────────────────────────────────
def check(ours: Ours, theirs: Theirs) -> None:
    """Raises unless both sides have the same ids on disk, and every row of an epoch is what it should be."""
    import numpy as np

    from llm_jax.data.tokenized import tokenize

    store = tokenize(ours.data.corpus, ours.fitted, "train", ours.cache)
    ids = np.asarray(store.ids[:], np.int32)
    for mine, other in zip((ids, store.starts), theirs.written(), strict=True):
        assert np.array_equal(mine, other), f"{len(mine)} numbers of ours and {len(other)} of theirs are not the same"
    found = [row for batch in ours.batches(0) for row in whole_rows(batch.tokens, batch.segments, batch.positions)]
    assert found and not set(found) - set(rows_of([ids[:-1]], theirs.end)), "rows of ours"
    for way in ("numpy", "run_clm", "arrow"):
        step = theirs.quickest["run_clm" if way == "run_clm" else "numpy"].documents
        wanted = rows_of(np.split(ids, store.starts[step::step]), theirs.end)
        read = theirs.batches(theirs.packed(way), way, 0)
        found = [row for x in read for row in whole_rows(x["tokens"], x["segments"], x["positions"])]
        assert len(found) == len(wanted) // BATCH.value * BATCH.value > 0 and not set(found) - set(wanted), f"rows of {way}"


def rows_of(parts, end: int) -> list[bytes]:
    """What rows the parts are cut into."""
    import numpy as np
    from pipeline_datasets import described

    cut = np.concatenate([part[: len(part) // LENGTH.value * LENGTH.value].reshape(-1, LENGTH.value) for part in parts])
    told = described(cut, end)
    return whole_rows(cut, told["segments"], told["positions"])


def whole_rows(*arrays) -> list[bytes]:
    """The rows of several arrays [..., L] side by side, as bytes."""
    import numpy as np

    return [row.tobytes() for row in np.concatenate([np.asarray(a, np.int32).reshape(-1, LENGTH.value) for a in arrays], 1)]


def timed(work: Callable[[int], int], seconds: float, after: Callable[[], None] = lambda: None) -> Times:
    """Seconds a token, of as many calls (0, 1, …) as that takes; `after` each is not counted."""
    wall = used = 0.0
    tokens = calls = 0
    while calls == 0 or wall < seconds:
        start, processor = time.perf_counter(), processor_seconds()
        tokens, calls = tokens + work(calls), calls + 1
        wall, used = wall + time.perf_counter() - start, used + processor_seconds() - processor
        after()
    return wall / tokens, used / tokens


def processor_seconds() -> float:
    """Of this process, and of its children that have ended."""
    told = os.times()
    return time.process_time() + told.children_user + told.children_system


def choose(theirs: Theirs) -> None:
    """Tries settings of the other side, and keeps the quickest by processor seconds."""
    from pipeline_datasets import Settings

    def quickest(work: str, functions: Sequence[Callable], seconds: Callable[[Settings], float]) -> None:
        tried = [Settings(function, int(size)) for function in functions for size in TRIED.value]
        theirs.quickest[work] = min(tried, key=seconds)
        print(f"datasets, {work}: documents as {theirs.quickest[work]} are quickest")

    if "tokenizing" in WORKS.value:
        one = lambda settings: timed(lambda _: theirs.tokenize(settings), 0.0, theirs.discard)[1]  # noqa: E731
        quickest("tokenizing", [theirs.lists, theirs.arrays], one)
    theirs.tokenize()
    for way, function in (("numpy", theirs.grouped_arrays), ("run_clm", theirs.grouped_lists)):
        quickest(way, [function], lambda settings, way=way: timed(lambda _: theirs.packed(way, settings).num_rows, 0.3)[1])


def sides(ours: Ours, theirs: Theirs, work: str) -> dict[str, Callable[[], Times]]:
    """Name → a piece of the work, ours first."""
    if work == "tokenizing":
        whole = lambda side: functools.partial(timed, lambda _: side.tokenize(), 0.0, side.discard)  # noqa: E731
        return {"llm_jax": whole(ours), "datasets": whole(theirs)}
    found = {"llm_jax": functools.partial(timed, ours.epoch, SECONDS.value)}
    for way in ("numpy", "run_clm", "arrow"):
        found[way] = functools.partial(timed, functools.partial(theirs.epoch, way), SECONDS.value)
    for way in ("numpy", "arrow"):
        rows = theirs.packed(way, name=f"rows-{way}")
        found[f"{way} without map"] = functools.partial(timed, functools.partial(theirs.epoch, way, rows=rows), SECONDS.value)
    return found


def show(work: str, times: dict[str, list[Times]], bytes_a_token: float) -> dict[str, float]:
    """Prints a table; our median ratio by processor seconds, to each side."""
    print(f"\n{work}{'':28}tokens/s by wall, by processor{'':8}llm_jax is × as quick: wall{'':13}processor")
    base, medians = times["llm_jax"], {}
    for name, own in times.items():
        rates = [1 / statistics.median(t[i] for t in own) for i in (0, 1)]
        ratios = [[a[i] / b[i] for a, b in zip(own, base, strict=True)] for i in (0, 1)]
        each = "".join(f"{statistics.median(r):10.2f} [{min(r):.2f}, {max(r):.2f}]" for r in ratios)
        megabytes = f" ({rates[1] * bytes_a_token / 1e6:.2f} MB/s)" if work == "tokenizing" else ""
        print(f"  {name:20}{rates[0]:16,.0f}{rates[1]:16,.0f}{megabytes:14}{'' if name == 'llm_jax' else each}", flush=True)
        medians[name] = statistics.median(ratios[1])
    return medians


def main(_) -> int:
    """Measures both works in turn; the exit code."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    threads = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "JAX_PLATFORMS": "cpu"}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        os.environ.update(threads | {"HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"})
        import datasets
        import pyarrow
        from pipeline_datasets import Theirs
        from pipeline_llm_jax import Ours, Shape

        datasets.disable_progress_bars()
        pyarrow.set_cpu_count(1)
        pyarrow.set_io_thread_count(1)
        bytes_ = write_text(folder / "text.jsonl")
        ours = Ours(folder, TOKENIZER.value, Shape(LENGTH.value, BATCH.value, STEPS.value))
        if ours.fitted.end is None:
            sys.exit("--tokenizer has no end of a document, which the other side finds segments by: take ByteLevelBPE or WordPiece")
        theirs = Theirs(folder, ours.fitted.end, LENGTH.value, BATCH.value)
        tokens = ours.tokenize()
        choose(theirs)
        check(ours, theirs)
        print(
            f"{bytes_ / 1e6:.1f} MB, {tokens:,} tokens, rows of {LENGTH.value}, {BATCH.value} a batch; both sides' tokens are the same"
        )
        return int(not min([measured(ours, theirs, work, bytes_ / tokens) for work in WORKS.value]))


def measured(ours: Ours, theirs: Theirs, work: str, bytes_a_token: float) -> bool:
    """Measures and prints a work; whether it is as quick as it should be."""
    if work == "tokenizing":
        ours.discard()
        theirs.discard()
    pieces = sides(ours, theirs, work)
    times: dict[str, list[Times]] = {name: [] for name in pieces}
    for index in range(ROUNDS.value):
        wait_for_quiet(PATIENCE.value)
        for name in list(pieces)[:: 1 if index % 2 == 0 else -1]:
            times[name].append(pieces[name]())
    if work == "tokenizing":  # for the next work
        ours.tokenize()
        theirs.tokenize()
    ratios = show(work, times, bytes_a_token)
    least = dict(zip(("tokenizing", "packing"), map(float, AT_LEAST.value or ()), strict=False))
    return ratios["datasets" if work == "tokenizing" else "numpy"] >= least.get(work, 0.0)


if __name__ == "__main__":
    app.run(main)
