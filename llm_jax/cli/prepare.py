"""Turn raw text into sharded, checksummed token files, in parallel; killed at any moment, the same command goes on from there.

python -m llm_jax prepare --corpus="Jsonl(path='corpus')" --tokenizer="SentencePiece(vocabulary=32000)" --out=tokens
python -m llm_jax prepare --out=tokens --verify
python -m llm_jax run --experiment=FILE --set=data.corpus="Prepared(path='tokens')" --set=tokenizer=… --workdir=runs/tokens
"""

from __future__ import annotations

import os
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from llm_jax.cli.terminal import console, parse
from llm_jax.core.config import ConfigError
from llm_jax.core.platform import cache_dir
from llm_jax.core.written import parse as parse_component

if TYPE_CHECKING:
    from llm_jax.data.prepare import Progress

FLAGS = flags.FlagValues()
flags.DEFINE_string("corpus", None, "A corpus as it is written in an experiment file.", flag_values=FLAGS)
flags.DEFINE_string("tokenizer", "Bytes()", "A tokenizer, the same; one that is trained is kept in --out.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "The folder to write to; the same command again goes on from there.", flag_values=FLAGS)
flags.DEFINE_integer("workers", None, "Processes (default: one for each core).", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("shard_megabytes", 128.0, "Text of a shard, about.", lower_bound=0.001, flag_values=FLAGS)
flags.DEFINE_boolean("verify", False, "Write nothing: compare all checksums of --out.", flag_values=FLAGS)

EVERY = 10.0  # seconds between plain lines


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code: 0, or 1 if --verify found damage. Raises `ConfigError`."""
    parse(FLAGS, argv)
    if FLAGS.out is None:
        raise ConfigError("is missing: name the folder that token files are written to", "--out")
    from llm_jax.data import prepared
    from llm_jax.data.corpora import Corpus
    from llm_jax.data.prepare import prepare
    from llm_jax.data.tokenizer_json import Tokenizer  # whose module has the rest of them

    prepared.require_local(FLAGS.out, "--out")
    folder = pathlib.Path(FLAGS.out).expanduser()
    if FLAGS.verify:
        wanted = prepared.read_manifest(folder)["files"]
        wrong = prepared.damaged(folder, wanted)
        for sentence in wrong:
            print(sentence, file=sys.stderr)
        print(f"{len(wanted) - len(wrong)} of {len(wanted)} files are what they were when they were written")
        return 1 if wrong else 0
    if FLAGS.corpus is None:
        raise ConfigError("is missing: name a corpus, as in --corpus=\"Jsonl(path='corpus')\"", "--corpus")
    corpus = parse_component(FLAGS.corpus, Corpus, "--corpus")
    tokenizer = parse_component(FLAGS.tokenizer, Tokenizer, "--tokenizer")
    with _Display() as display:
        manifest = prepare(
            corpus,
            tokenizer,
            folder,
            cache=cache_dir(),
            workers=FLAGS.workers or os.cpu_count() or 1,
            shard_bytes=int(FLAGS.shard_megabytes * 1e6),
            tell=display.tell,
            note=display.note,
        )
    console().print(_table(manifest))
    if manifest["skipped"]:
        first = manifest["first_skipped"]
        print(f"skipped {manifest['skipped']:,} of {manifest['read']:,} documents, the first because {first}", file=sys.stderr)
    written = prepared.written(folder)
    print(f'To train on them: --set=data.corpus="Prepared(path=\'{folder}\')" --set=tokenizer="{written}"')
    return 0


class _Display:
    """A bar on a terminal, plain lines elsewhere, both on standard error; documents and tokens are those of this run."""

    def __enter__(self) -> _Display:
        self.console = Console(file=sys.stderr)
        self.started = self.last = time.monotonic()
        self.bars = None
        if self.console.is_terminal:
            parts = (BarColumn(), TaskProgressColumn(), TextColumn("shards"), MofNCompleteColumn(), TimeRemainingColumn())
            self.bars = Bars(*parts, TextColumn("{task.fields[numbers]}"), console=self.console)
            self.task = self.bars.add_task("", total=None, numbers="")
            self.bars.start()
        return self

    def __exit__(self, *_) -> None:
        if self.bars is not None:
            self.bars.stop()

    def tell(self, progress: Progress) -> None:
        now = time.monotonic()
        rate = progress.tokens / max(now - self.started, 1e-9)
        numbers = f"{progress.documents:,} documents, {progress.tokens:,} tokens, {rate:,.0f} tokens/s"
        if self.bars is not None:
            self.bars.update(self.task, total=progress.all_shards, completed=progress.shards, numbers=numbers)
        elif now - self.last >= EVERY or progress.shards == progress.all_shards:
            self.last = now
            share = progress.bytes / max(progress.all_bytes, 1)
            self.note(f"{progress.shards}/{progress.all_shards} shards ({share:.0%} of the corpus), {numbers}")

    def note(self, sentence: str) -> None:
        self.console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _table(manifest: dict[str, Any]) -> object:
    from rich.table import Table

    table = Table("split", "documents", "tokens", "bytes", "bytes a token")
    for split, count in manifest["splits"].items():
        ratio = f"{count['bytes'] / count['tokens']:.2f}" if count["tokens"] else "-"
        table.add_row(split, *(f"{count[key]:,}" for key in ("documents", "tokens", "bytes")), ratio)
    return table
