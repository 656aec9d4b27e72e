"""Train what an experiment file declares, tune every arm alike, and report the comparison.

python -m llm_jax run --experiment=experiments/c06_positional_encoding.py --workdir=runs/c06

With `--worker` the same command, started any number of times on any machines that share the work folder, is one ablation.
"""

from __future__ import annotations

import atexit
import os
import pathlib
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence

from absl import flags

from llm_jax.cli.declared import declared, define, require_named
from llm_jax.cli.terminal import console, parse, within
from llm_jax.core import distributed, platform
from llm_jax.core.config import ConfigError
from llm_jax.core.paths import in_bucket, require_folder
from llm_jax.train.interruption import Interrupted, interruptions

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
flags.DEFINE_boolean(
    "worker",
    False,
    "Be one of any number of processes, on any machines that share the folder, that finish the ablation together.",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "lease",
    None,
    "Seconds without a sign of life after which a worker's group is another's (default: 60).",
    flag_values=FLAGS,
)
flags.DEFINE_float(
    "watchdog",
    600.0,
    "Seconds without a sign of life after which the stacks of all threads are written down, or 20 usual dispatches; 0 for never.",
    lower_bound=0.0,
    flag_values=FLAGS,
)
flags.DEFINE_boolean("watchdog_exits", False, "And end with code 75, for a scheduler that starts it again.", flag_values=FLAGS)
flags.DEFINE_boolean(
    "deterministic", False, "The same command on the same devices gives the same bits (CPU, TPU: always).", flag_values=FLAGS
)
flags.DEFINE_string("profile", None, "FIRST:LAST: trace these steps of each arm, for the report and XProf.", flag_values=FLAGS)
flags.DEFINE_boolean(
    "distributed",
    False,
    "This is one of several processes that train together, as SLURM, Open MPI, GKE or Cloud TPU says in the environment.",
    flag_values=FLAGS,
)
flags.DEFINE_string("coordinator", None, "HOST:PORT of the first of several processes, where nothing says it.", flag_values=FLAGS)
flags.DEFINE_integer("processes", None, "How many there are.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("process", None, "Which of them this is, from 0.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer(
    "heartbeat", 30, "Seconds without a sign of life after which one of them counts as dead.", lower_bound=5, flag_values=FLAGS
)
flags.DEFINE_boolean("autoshard", False, "Rank the meshes of these TPUs by formula, and train on the best.", flag_values=FLAGS)
flags.DEFINE_boolean("plan", False, "Print what would be done and what it costs; train nothing.", flag_values=FLAGS)

PLACE = ("coordinator", "processes", "process")  # which say where the others are, and which of them this is
LEASE = 60.0  # seconds
EXPECTED_SHARE_OF_PEAK = 0.35  # what small models reach of the matrix-product peak, for the plan's estimate


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code: 0, 1 if a trial failed, and `Interrupted.code` if stopped after a save.

    Stopped before, the process ends where it stands. Raises `ConfigError`.
    """
    parse(FLAGS, argv)
    try:
        with interruptions(leaves=True):
            code = _run(argv)
        distributed.end()
        return code
    except Interrupted as interrupted:
        if distributed.leads():
            print(interrupted, file=sys.stderr, flush=True)
        distributed.end()
        return interrupted.code
    except Exception as error:
        if not distributed.several():
            raise
        known = isinstance(error, ConfigError)
        distributed.give_up(f"error: {error}" if known else traceback.format_exc(), 2 if known else 1)


def joins(values: flags.FlagValues) -> bool:
    """Whether flags say that the process trains with others. Raises `ConfigError` where they call it a worker too."""
    told = values.distributed or any(values[name].value is not None for name in PLACE)
    if told and values.worker:
        raise ConfigError("trains with others, and --worker for itself: leave one of them out", "--distributed")
    return told


def _join() -> None:
    """Sets this process up, and meets the others of the job, if there are any.

    Raises `ConfigError` where it is one of many and was not told, or cannot be one alone.
    """
    together = joins(FLAGS)
    platform.setup(deterministic=FLAGS.deterministic, alone=not together)
    if together:
        distributed.start(**{name: FLAGS[name].value for name in PLACE}, heartbeat=FLAGS.heartbeat)
    elif not FLAGS.worker and (many := distributed.one_of_many()):
        raise ConfigError(
            f"this is {many}, and was not told so: start all with --distributed, to train together, or with --worker, to share the "
            "trials among them"
        )
    elif FLAGS.worker and "tpu" in (os.environ.get("JAX_PLATFORMS") or "tpu") and (many := distributed.host_of_many()):
        way = "start all with --distributed in its stead, or give each worker a TPU of one host"
        raise ConfigError(f"is one process with a TPU of its own, and this is {many}: {way}", "--worker")


def _require_sound() -> None:
    """Raises `ConfigError` for what can be told of the flags before JAX is imported, which takes seconds."""
    if FLAGS.lease is not None and not FLAGS.worker:
        raise ConfigError("is how long a worker may be silent: give --worker too", f"--lease={FLAGS.lease:g}")
    if not FLAGS.workdir and not FLAGS.plan:
        raise ConfigError("--workdir is missing: name a folder for the results, e.g. --workdir=runs/c06")
    require_named(FLAGS)
    if FLAGS.workdir:
        require_folder(FLAGS.workdir)
    _steps(FLAGS.profile)


def _run(argv: Sequence[str]) -> int:
    together = joins(FLAGS)
    if not together:
        _require_sound()
    _join()
    if together:  # what is wrong for one of them is then told to all
        _require_sound()
    platform.require_devices()
    from llm_jax.io.tracker import is_full
    from llm_jax.lab import plan, report
    from llm_jax.lab.runner import Runner
    from llm_jax.lab.sources import Sources
    from llm_jax.lab.workfolder import WorkFolder
    from llm_jax.train.watchdog import Watchdog

    lease = (LEASE if FLAGS.lease is None else FLAGS.lease) if FLAGS.worker else None
    argv = _autosharded(argv) if FLAGS.autoshard else argv
    ablation, scale = _declared()
    command = "python -m llm_jax run " + shlex.join(argv[1:])
    trials = None if distributed.leads() else tempfile.mkdtemp(prefix="llm_jax-")
    if trials is not None:
        atexit.register(shutil.rmtree, trials, ignore_errors=True)
    here = "." if in_bucket(FLAGS.workdir or ".") else FLAGS.workdir or "."  # what hangs may be what lies between this and a bucket
    watchdog = Watchdog(pathlib.Path(here), FLAGS.watchdog, FLAGS.watchdog_exits)
    runner = Runner(
        ablation,
        WorkFolder(FLAGS.workdir or ".", trials=trials),
        command=command,
        scale=scale,
        largest=FLAGS.population,
        sources=Sources(workers=FLAGS.data_workers),
        lease=lease,
        watchdog=watchdog,
        profiled=_steps(FLAGS.profile),
        **({} if distributed.leads() else {"note": lambda text: None}),
    )
    if FLAGS.plan:
        runner.check()
        rate = EXPECTED_SHARE_OF_PEAK * platform.peak_flops()
        console().print(plan.readings(runner.readings()))
        console().print(plan.table(ablation, runner.costs(), runner.largest_population, rate))
        return 0
    try:
        results = runner.run()
        summary = report.write([FLAGS.workdir], FLAGS.workdir) if distributed.leads() else None
    except OSError as error:
        if not is_full(error) or not within(error.filename or FLAGS.workdir, FLAGS.workdir):
            raise
        print(
            f"error: {FLAGS.workdir}: {error.strerror}: make room and run the same command again, it goes on from what was saved",
            file=sys.stderr,
        )
        return 1
    if summary is not None:
        console().print(report.table(summary))
        print(f"report: {FLAGS.workdir}/report.html")
    return 0 if results and runner.failures == 0 else 1


def _autosharded(argv: Sequence[str]) -> list[str]:
    """The command with the best mesh in place of the search, which is set as if it had been typed."""
    import jax

    from llm_jax.lab import autoshard

    ablation, _ = _declared()
    data, ranking = ablation.base.data, autoshard.of_ablation(ablation, autoshard.attached(jax.devices()))
    if distributed.leads():
        console().print(autoshard.table(ranking, data.batch_size * data.sequence_length))
    FLAGS["set"].value = [*FLAGS.set, *ranking.best.flags]
    return [*(one for one in argv if one.lstrip("-") != "autoshard"), *(f"--set={flag}" for flag in ranking.best.flags)]


def _steps(text: str | None) -> tuple[int, int] | None:
    """The two numbers of FIRST:LAST. Raises `ConfigError`."""
    if text is None:
        return None
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
        raise ConfigError(f"must be FIRST:LAST, steps counted from 0, as in 10:15, got {text!r}", "--profile")
    return int(first), int(last)


def _declared():
    """The ablation of the file with the flags' changes, and the scale that it is at."""
    ablation, scale = declared(FLAGS)
    if FLAGS.arms is not None:
        if not FLAGS.arms:
            raise ConfigError(f"--arms names no arm: the arms are {', '.join(ablation.arms)}")
        ablation = ablation.only(FLAGS.arms)
    return (ablation if FLAGS.seeds is None else ablation.changed({"seeds": FLAGS.seeds})), scale
