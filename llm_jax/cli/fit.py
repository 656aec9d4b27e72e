"""Fit a scaling law to the finished runs of work folders whose arms are sizes, or sizes and token budgets, of a model.

python -m llm_jax fit --workdir=runs/sizes --compute=1e15
python -m llm_jax fit --workdir=runs/a --workdir=runs/b --out=runs/law --metric=valid/bits_per_byte

L(N, D) = E + A / N^α + B / D^β, or of one variable where the runs tell no more apart. N counts all parameters (`--count=all`), as
Hoffmann et al. do: leaving out the vocabulary's (`body`, Kaplan et al.'s) bends the law of small models, and is most of why the two
papers disagree (Pearce & Song 2024; Porian et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from absl import flags

from llm_jax.cli.terminal import console, parse
from llm_jax.core.config import ConfigError
from llm_jax.core.paths import to_path

FLAGS = flags.FlagValues()
flags.DEFINE_multi_string("workdir", [], "A work folder of finished runs; several are fitted together.", flag_values=FLAGS)
flags.DEFINE_string("metric", "valid/loss", "The loss.", flag_values=FLAGS)
flags.DEFINE_enum("law", "auto", ["auto", "N,D", "N", "D", "C"], "Of what (default: what the runs tell apart).", flag_values=FLAGS)
flags.DEFINE_enum("count", "all", ["all", "body", "active"], "What N counts; body: not the vocabulary's.", flag_values=FLAGS)
flags.DEFINE_list("holdout", ["LARGEST"], "Arms to predict from the rest: names, LARGEST in FLOPs, or NONE.", flag_values=FLAGS)
flags.DEFINE_list("compute", [], "Budgets in FLOPs (default: ten times the largest run's).", flag_values=FLAGS)
flags.DEFINE_integer("draws", 300, "Fits of the bootstrap.", lower_bound=20, flag_values=FLAGS)
flags.DEFINE_string("out", None, "The folder to write to (default: fit in the one work folder).", flag_values=FLAGS)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code 0. Raises `ConfigError`."""
    parse(FLAGS, argv)
    folders = FLAGS.workdir
    if not folders:
        raise ConfigError("--workdir is missing: name a folder that `run` has trained a population of sizes into")
    if FLAGS.out is None and len(folders) > 1:
        raise ConfigError("--out is missing: several work folders are fitted in a folder of their own")
    out = to_path(FLAGS.out or to_path(folders[0]) / "fit")
    budgets = [_flops(word) for word in FLAGS.compute]
    from llm_jax.lab import scaling

    with console().status("fitting"):
        found = scaling.study(
            folders,
            metric=FLAGS.metric,
            counted=FLAGS.count,
            law=FLAGS.law,
            holdout=FLAGS.holdout,
            budgets=budgets,
            draws=FLAGS.draws,
        )
        written = scaling.write(found, out)
    for table in scaling.tables(found):
        console().print(table)
    for note in found.notes:
        console().print(f"- {note}", highlight=False, markup=False)
    console().print(scaling.answer(found), highlight=False, markup=False)
    print(f"The page: {written}")
    return 0


def _flops(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 1e6):
        raise ConfigError("must be FLOPs, at least 1e6, as in --compute=1e21", f"--compute={word}")
    return value
