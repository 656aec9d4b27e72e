"""Train what an experiment file declares, tune every arm alike, and report the comparison.

python -m llm_jax run --experiment=experiments/c06_positional_encoding.py --workdir=runs/c06
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

from absl import flags

from llm_jax.cli.declared import declared, define
from llm_jax.cli.terminal import console, parse, within
from llm_jax.core import platform
from llm_jax.core.config import ConfigError

FLAGS = flags.FlagValues()
define(FLAGS)
flags.DEFINE_string("workdir", None, "Where everything is written; the same command again goes on from there.", flag_values=FLAGS)
flags.DEFINE_list("arms", None, "Only these arms.", flag_values=FLAGS)
flags.DEFINE_integer("seeds", None, "Fresh seeds that each arm's winner is trained on.", flag_values=FLAGS)
flags.DEFINE_integer(
    "population",
    None,
    "Trials in one program, at most (default: what memory holds); 1 is one by one.",
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_integer(
    "data_workers",
    0,
    "Processes that make batches ahead of time (default: a thread does): for slow disks and fast devices.",
    lower_bound=0,
    flag_values=FLAGS,
)
flags.DEFINE_boolean("plan", False, "Print what would be done and what it costs; train nothing.", flag_values=FLAGS)

EXPECTED_SHARE_OF_PEAK = 0.35  # what small models reach of the matrix-product peak, for the plan's estimate


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code: 0, 1 if a trial failed, 130 if interrupted. Raises `ConfigError`."""
    parse(FLAGS, argv)
    platform.setup()
    platform.require_devices()
    from llm_jax.io.tracker import is_full
    from llm_jax.lab import plan, report
    from llm_jax.lab.runner import Runner
    from llm_jax.lab.sources import Sources
    from llm_jax.lab.workfolder import WorkFolder
    from llm_jax.train.loop import Interrupted

    if not FLAGS.workdir and not FLAGS.plan:
        raise ConfigError("--workdir is missing: name a folder for the results, e.g. --workdir=runs/c06")
    ablation, scale = _declared()
    command = "python -m llm_jax run " + shlex.join(argv[1:])
    given = {"command": command, "scale": scale, "largest": FLAGS.population, "sources": Sources(workers=FLAGS.data_workers)}
    runner = Runner(ablation, WorkFolder(FLAGS.workdir or "."), **given)
    if FLAGS.plan:
        runner.check()
        rate = EXPECTED_SHARE_OF_PEAK * platform.peak_flops()
        console().print(plan.readings(runner.readings()))
        console().print(plan.table(ablation, runner.costs(), runner.largest_population, rate))
        return 0
    try:
        results = runner.run()
        summary = report.write([FLAGS.workdir], FLAGS.workdir)
    except Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return 130
    except OSError as error:
        if not is_full(error) or not within(error.filename or FLAGS.workdir, FLAGS.workdir):
            raise
        print(
            f"error: {FLAGS.workdir}: {error.strerror}: make room and run the same command again, it goes on from what was saved",
            file=sys.stderr,
        )
        return 1
    console().print(report.table(summary))
    print(f"report: {FLAGS.workdir}/report.html")
    return 0 if results and runner.failures == 0 else 1


def _declared():
    """The ablation of the file with the flags' changes, and the scale that it is at."""
    ablation, scale = declared(FLAGS)
    if FLAGS.arms is not None:
        if not FLAGS.arms:
            raise ConfigError(f"--arms names no arm: the arms are {', '.join(ablation.arms)}")
        ablation = ablation.only(FLAGS.arms)
    return (ablation if FLAGS.seeds is None else ablation.changed({"seeds": FLAGS.seeds})), scale
