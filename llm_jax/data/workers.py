"""Who writes the shards: this process, or several that die with it."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Generator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from llm_jax.core.config import ConfigError
from llm_jax.data import shards
from llm_jax.data.corpus import Piece
from llm_jax.data.shards import Work
from llm_jax.data.tokenizers import Tokenizer


@dataclass
class Progress:
    """Shards and bytes of the corpus that are done, and all of them; documents and tokens that were written since the start."""

    shards: int
    all_shards: int
    bytes: int
    all_bytes: int
    documents: int = 0
    tokens: int = 0


Run = Callable[[Work, dict[int, list[Piece]], Progress, Callable[[Progress], None]], Generator[int, None, None]]


def in_turn(
    work: Work, waiting: dict[int, list[Piece]], progress: Progress, tell: Callable[[Progress], None]
) -> Generator[int, None, None]:
    """Writes the shards in this process; yields the number of each."""

    def tally(documents: int, tokens: int) -> None:
        progress.documents, progress.tokens = progress.documents + documents, progress.tokens + tokens
        tell(progress)

    work.tally = tally
    for number, pieces in waiting.items():
        shards.write(work, number, pieces)
        yield number


def in_parallel(named: Tokenizer, identity: str, cache: str | os.PathLike, workers: int) -> Run:
    """Like `in_turn`, but in so many processes, and in the order in which they finish."""

    def run(
        work: Work, waiting: dict[int, list[Piece]], progress: Progress, tell: Callable[[Progress], None]
    ) -> Generator[int, None, None]:
        context = multiprocessing.get_context("spawn")  # threads of the parent's libraries do not survive a fork
        counts = context.Array("q", 2)
        given = (work.corpus, named, identity, os.fspath(cache), work.out, work.dtype, work.threads, counts)
        pool, numbers = ProcessPoolExecutor(workers, context, _start, given), {}
        try:
            numbers = {pool.submit(_write, number, pieces): number for number, pieces in waiting.items()}
            while numbers:
                done, _ = wait(numbers, timeout=0.25, return_when=FIRST_COMPLETED)
                progress.documents, progress.tokens = counts[:]
                tell(progress)
                for future in done:
                    future.result()
                    yield numbers.pop(future)
        except BrokenProcessPool:
            raise ConfigError(
                "was killed, perhaps for want of memory: run the same command again with fewer --workers, finished shards are kept",
                "a worker process",
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if numbers:  # an error or an interruption: what is being written is thrown away
                for child in multiprocessing.active_children():
                    child.terminate()

    return run


_work: Work  # of a worker process


def _start(corpus, named, identity, cache, out, dtype, threads, counts) -> None:
    global _work  # noqa: PLW0603
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_die_with_parent, daemon=True).start()

    def tally(documents: int, tokens: int) -> None:
        with counts.get_lock():
            counts[0] += documents
            counts[1] += tokens

    fitted = shards.without_text(named, cache)
    if fitted.fingerprint != identity:
        raise ConfigError("changed while it was read", "tokenizer")
    _work = Work(corpus, fitted, out, dtype, tally, threads)


def _die_with_parent() -> None:
    """The pool's workers would wait for ever for a parent that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)


def _write(number: int, pieces: list[Piece]) -> None:
    shards.write(_work, number, pieces)
