"""Rebuild the report of one or several work folders from their `results.json` files.

python -m llm_jax report --workdir=runs/c06
python -m llm_jax report --workdir=runs/a --workdir=runs/b --output=runs/both
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import flags

from llm_jax.cli.terminal import console, parse
from llm_jax.core.config import ConfigError

FLAGS = flags.FlagValues()
flags.DEFINE_multi_string("workdir", [], "A work folder; name several to compare them.", flag_values=FLAGS)
flags.DEFINE_string("output", None, "Where the report is written; the default is the one work folder.", flag_values=FLAGS)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code. Raises `ConfigError`."""
    parse(FLAGS, argv)
    if not FLAGS.workdir:
        raise ConfigError("--workdir is missing: name a folder that `run` has written to")
    if FLAGS.output is None and len(FLAGS.workdir) > 1:
        raise ConfigError("--output is missing: several work folders are compared in a folder of their own")
    from llm_jax.lab import report

    output = FLAGS.output or FLAGS.workdir[0]
    console().print(report.table(report.write(FLAGS.workdir, output)))
    print(f"report: {output}/report.html")
    return 0
