"""A SLURM job: one run over nodes, or an array of workers on one ablation. Renders the script and submits it.

python -m launch.slurm --nodes=2 --gpus_per_node=8 --time=12:00:00 -- --experiment=FILE --workdir=/nfs/runs/c06
python -m launch.slurm --workers=10 --time=4:00:00 -- --experiment=FILE --workdir=/nfs/runs/c06

--dry_run prints the script. --grace seconds before the time limit the tasks get SIGTERM, so that they save, and with --requeue (the
default) the job goes back into the queue and on from there, as it does when a node fails or the scheduler preempts it.
"""

from __future__ import annotations

import math
import pathlib
import re
import shlex
import sys
from collections.abc import Sequence

from absl import flags

from launch.command import TEMPLATES, LaunchError, Run, Shell, guarded, logs_beside, one_process, parse, required, say

FLAGS = flags.FlagValues()
flags.DEFINE_integer("nodes", 1, "Nodes of a run; a worker has one.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "tasks_per_node",
    None,
    "Processes on each (default: one a GPU; a worker is one for all GPUs of its node).",
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_integer("gpus_per_node", None, "GPUs of each node.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("cpus_per_task", None, "Cores of each process.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer(
    "workers",
    None,
    "Jobs of an array, of one process each, that share one ablation group by group.",
    lower_bound=1,
    flag_values=FLAGS,
)
flags.DEFINE_string("time", None, "The time limit, as in 30 (minutes), 2:00:00 or 1-12:00:00.", flag_values=FLAGS)
flags.DEFINE_string("partition", None, "The partition.", flag_values=FLAGS)
flags.DEFINE_string("account", None, "The account.", flag_values=FLAGS)
flags.DEFINE_string("name", None, "The job's name (default: the work folder's).", flag_values=FLAGS)
flags.DEFINE_multi_string("sbatch", [], "One more option of sbatch, as in --sbatch=--qos=high.", flag_values=FLAGS)
flags.DEFINE_multi_string("before", [], "A line of shell before the run, as in --before='module load cuda'.", flag_values=FLAGS)
flags.DEFINE_string("python", "python", "The interpreter on the nodes.", flag_values=FLAGS)
flags.DEFINE_string("logs", None, "The folder of the logs (default: WORKDIR-logs).", flag_values=FLAGS)
flags.DEFINE_integer("grace", 120, "Seconds before the time limit when the run is told to save.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_boolean("requeue", True, "Go on in a new job when the time is up or the nodes are taken.", flag_values=FLAGS)
flags.DEFINE_boolean("wait", False, "Wait for the job's end; the exit code is its.", flag_values=FLAGS)
flags.DEFINE_boolean("dry_run", False, "Print the script and the command; submit nothing.", flag_values=FLAGS)

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")


def main(argv: Sequence[str]) -> int:
    """Runs the launcher; returns the exit code. Raises `LaunchError`."""
    run = Run(parse(FLAGS, argv, __doc__ or ""))
    required(FLAGS, "time")
    if seconds(FLAGS.time) <= FLAGS.grace:
        raise LaunchError(
            f"--time={FLAGS.time} leaves no time before --grace={FLAGS.grace} s: give more of one or less of the other"
        )
    logs = pathlib.Path(FLAGS.logs) if FLAGS.logs else logs_beside(run)
    text, shell = script(run, logs.absolute()), Shell(FLAGS.dry_run)
    shell.need("sbatch")
    shell.make(logs)
    submit = ["sbatch", "--parsable", *(["--wait"] if FLAGS.wait else [])]
    if not FLAGS.dry_run:
        say(f"logs will be in {logs}; `scancel --signal=TERM JOB` makes a job save and end")
    return shell.run(submit, given=text)


def script(run: Run, logs: pathlib.Path) -> str:
    """The batch script, whole."""
    gpus = FLAGS.gpus_per_node
    per_node = FLAGS.tasks_per_node or (1 if FLAGS.workers else gpus or 1)
    if gpus and per_node not in (1, gpus):
        raise LaunchError(f"--tasks_per_node={per_node} do not share out --gpus_per_node={gpus}: give {gpus} (one a GPU) or 1")
    tasks = FLAGS.nodes * per_node
    if FLAGS.workers:
        what = f"--nodes={FLAGS.nodes} --tasks_per_node={per_node}"
        one_process(f"--workers={FLAGS.workers}", tasks, what, "give it one task on one node, all of whose GPUs it then has")
    name = FLAGS.name or pathlib.PurePosixPath(run.flag("workdir") or "plan").name
    options = {
        "job-name": name,
        "nodes": FLAGS.nodes,
        "ntasks-per-node": per_node,
        "gpus-per-node": gpus,  # not gpus-per-task: JAX takes the GPU of a task's number among all of the node
        "cpus-per-task": FLAGS.cpus_per_task,
        "time": FLAGS.time,
        "partition": FLAGS.partition,
        "account": FLAGS.account,
        "array": f"0-{FLAGS.workers - 1}" if FLAGS.workers else None,
        "output": logs / ("%x-%A_%a.log" if FLAGS.workers else "%x-%j.log"),
        "open-mode": "append",
        "signal": f"B:USR1@{FLAGS.grace}",
    }
    given = [f"--{key}={value}" for key, value in options.items() if value is not None]
    given += ["--requeue" if FLAGS.requeue else "--no-requeue", *FLAGS.sbatch]
    own = ["--worker"] if FLAGS.workers else ["--distributed"] if tasks > 1 else []
    step = ["srun", "--kill-on-bad-exit=1", *(["--label"] if tasks > 1 else [])]
    if FLAGS.cpus_per_task:
        step.append(f"--cpus-per-task={FLAGS.cpus_per_task}")  # srun does not take it from the job
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {_quoted(option)}" for option in given),
        "",
        *FLAGS.before,
        "export PYTHONUNBUFFERED=1",
        *([f"export JAX_LOCAL_DEVICE_IDS={','.join(map(str, range(gpus)))}"] if gpus and per_node == 1 else []),
        f"requeue={'yes' if FLAGS.requeue else 'no'}",
        f"command=({shlex.join([*step, *run.argv(FLAGS.python, *own)])})",
        "",
        (TEMPLATES / "slurm.sh").read_text(),
    ]
    return "\n".join(lines)


def seconds(limit: str) -> float:
    """A SLURM time limit in seconds: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]."""
    if limit.upper() in ("UNLIMITED", "INFINITE", "0"):
        return math.inf
    match = TIME.fullmatch(limit)
    if match is None:
        raise LaunchError(
            f"--time={limit} is no time limit of SLURM's: write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS:MINUTES:SECONDS"
        )
    parts = [int(part) for part in match["parts"].split(":")]
    if match["days"] is None and len(parts) < 3:
        parts.insert(0, 0)  # minutes come first where no hours are given
    hours, minutes, rest = (*parts, 0, 0)[:3]
    return int(match["days"] or 0) * 86400 + hours * 3600 + minutes * 60 + rest


def _quoted(option: str) -> str:
    """An option as a line of a script has it. Raises `LaunchError` for one that no line can hold."""
    if "\n" in option:
        raise LaunchError(f"{option!r} has a line break, which no #SBATCH line can hold")
    return option if re.fullmatch(r"[\w@%+=:,./-]+", option) else '"' + option.replace("\\", "\\\\").replace('"', '\\"') + '"'


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv))
