"""Cloud TPU VMs by queued resources, through gcloud: made, waited for, run on, followed, made again when they are taken away.

python -m launch.tpu run --name=c06 --topology=v5e:16x16 --zone=us-west4-a --capacity=spot -- --experiment=FILE --workdir=gs://B/c06
python -m launch.tpu VERB --name=c06 --zone=us-west4-a

run does all of it; the same command again goes on from whatever is there, a run that is going on included. The other verbs: create
(and wait for it), status, logs (follow the first host's), stop (let the run save and end), delete. --dry_run prints it all.
"""

from __future__ import annotations

import pathlib
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence

from absl import flags

from launch import accelerators
from launch.command import (
    ROOT,
    TEMPLATES,
    LaunchError,
    Run,
    Shell,
    found,
    guarded,
    one_process,
    parse,
    require_name,
    required,
    say,
    verb,
)
from launch.queued import GONE, PATIENCE, TAKEN, Lost, Tpu

FLAGS = flags.FlagValues()
flags.DEFINE_string("name", None, "What the queued resource is called.", flag_values=FLAGS)
flags.DEFINE_string("zone", None, "The zone, as in us-central2-b.", flag_values=FLAGS)
flags.DEFINE_string("project", None, "The project (default: gcloud's).", flag_values=FLAGS)
flags.DEFINE_string("topology", None, "Chip and topology of a slice, as in v5e:16x16.", flag_values=FLAGS)
flags.DEFINE_integer("slices", 1, "Slices of one run.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_enum("capacity", "on-demand", ["on-demand", "spot", "reserved"], "Whose machines they are.", flag_values=FLAGS)
flags.DEFINE_string("image", None, "The VMs' software version (default: the chip's).", flag_values=FLAGS)
flags.DEFINE_multi_string("create", [], "One more flag of gcloud's create, as in --create=--network=lab.", flag_values=FLAGS)
flags.DEFINE_multi_string("ssh", [], "One more flag of gcloud's ssh and scp, as in --ssh=--tunnel-through-iap.", flag_values=FLAGS)
flags.DEFINE_string("ref", None, "The git commit or branch to run (default: the working tree).", flag_values=FLAGS)
flags.DEFINE_string("python", "3.12", "The Python version on the hosts.", flag_values=FLAGS)
flags.DEFINE_list("extras", ["tpu", "data"], "Extras to install; data has gs://.", flag_values=FLAGS)
flags.DEFINE_multi_string("env", [], "NAME=VALUE for the run.", flag_values=FLAGS)
flags.DEFINE_integer("retries", 10, "How often machines that were taken away are made again.", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_float("poll", 30.0, "Seconds between looks at the queue.", lower_bound=0.0, flag_values=FLAGS)
flags.DEFINE_boolean(
    "worker", False, "This TPU, of one host, is one of several on one ablation, each of another name.", flag_values=FLAGS
)
flags.DEFINE_boolean("shared_disk", False, "--workdir is on a disk that all hosts mount and that outlives them.", flag_values=FLAGS)
flags.DEFINE_boolean("delete_after", False, "Delete the TPU when the run has ended, however it did.", flag_values=FLAGS)
flags.DEFINE_boolean("dry_run", False, "Print what would run; change nothing.", flag_values=FLAGS)

STOPPED = "143"  # of templates/until_stopped.sh


def main(argv: Sequence[str]) -> int:
    """Runs the launcher; returns the exit code. Raises `LaunchError`."""
    others: dict[str, Callable[[Tpu], int]] = {
        "create": create,
        "status": status,
        "logs": logs,
        "stop": stop,
        "delete": delete,
    }
    word, words = verb(argv, ["run", *others], __doc__ or "")
    theirs = parse(FLAGS, words, __doc__ or "")
    required(FLAGS, "name", "zone")
    require_name(FLAGS.name, 63)
    place = (f"--zone={FLAGS.zone}", *([f"--project={FLAGS.project}"] if FLAGS.project else []))
    tpu = Tpu(FLAGS.name, place, Shell(FLAGS.dry_run), FLAGS.slices, tuple(FLAGS.ssh), FLAGS.poll)
    if word == "run":
        return run(tpu, theirs)
    if theirs:
        raise LaunchError(f"{word} runs nothing: leave out what stands after --")
    return others[word](tpu)


def run(tpu: Tpu, theirs: tuple[str, ...]) -> int:
    """All of it, again and again until the run has ended."""
    given = Run(theirs)
    workdir = given.flag("workdir") or ""
    if not workdir.startswith("gs://") and not FLAGS.shared_disk:
        raise LaunchError(
            f"--workdir={workdir} is on the disk of machines that go away, and that other hosts do not see: name a bucket, "
            "as in --workdir=gs://BUCKET/DIR, or say --shared_disk where all of them mount it"
        )
    slices()
    tpu.shell.need("gcloud")
    for left in reversed(range(FLAGS.retries + 1)):
        try:
            code = attempt(tpu, given)
            break
        except Lost as lost:
            say(f"{lost}; retries left: {left}")
            tpu.delete()
        except KeyboardInterrupt:
            say(f"{tpu.name} goes on without this, and costs: the same command takes it up again, the verbs stop and delete end it")
            raise
    else:
        raise LaunchError(f"the machines were taken away {FLAGS.retries + 1} times: the same command goes on, from {workdir}")
    if FLAGS.delete_after:
        tpu.delete()
    else:
        say(f"{tpu.name} is still there, and costs: python -m launch.tpu delete --name={tpu.name} {' '.join(tpu.place)}")
    return code


def attempt(tpu: Tpu, given: Run) -> int:
    """From whatever is there to the run's exit code. Raises `Lost` and `LaunchError`."""
    create(tpu)
    own = "--worker" if FLAGS.worker else "--distributed"
    command = [*(["env", *FLAGS.env] if FLAGS.env else []), *given.argv(".venv/bin/python", own)]
    going = going_on(tpu)
    if going and going != " ".join(command):
        raise LaunchError(f"another run is going on on {tpu.name}: follow it with the verb logs, or end it with stop: {going}")
    if not going:
        install(tpu)
        start(tpu, command)
    return outcome(tpu)


def going_on(tpu: Tpu) -> str:
    """The command that the first host is running, or nothing."""
    ask = 'cd llm_jax 2>/dev/null && kill -0 "$(cat run.pid)" 2>/dev/null && cat run.command || true'
    code, said = tpu.shell.ask(tpu.on_first(ask), supposed="")
    return "" if code else said


def install(tpu: Tpu) -> None:
    """Copies the code to every host and makes its environment. Raises `Lost` and `LaunchError`."""
    with tempfile.TemporaryDirectory() as folder:
        archive = pathlib.Path(folder) / "llm_jax.tar.gz"
        pack(tpu.shell, archive, FLAGS.ref)
        tpu.patiently(tpu.queued("scp", str(archive), f"{tpu.name}:llm_jax.tar.gz", "--node=all", "--worker=all", *tpu.ssh))
    values = f"python={shlex.quote(FLAGS.python)} extras={shlex.quote(','.join(FLAGS.extras))}"
    tpu.patiently(tpu.everywhere(f"{values}\n{(TEMPLATES / 'tpu_install.sh').read_text()}"))


def start(tpu: Tpu, command: Sequence[str]) -> None:
    """Begins the run on every host. Raises `Lost` and `LaunchError`."""
    if tpu.shell.run(tpu.everywhere(f"set -- {shlex.join(command)}\n{(TEMPLATES / 'tpu_start.sh').read_text()}")):
        tpu.still_there()
        raise LaunchError("the run did not start on every host: what they say stands above; `stop` ends it where it did")


def outcome(tpu: Tpu) -> int:
    """Follows a run to its end; the first exit code that is not 0. Raises `Lost` and `LaunchError`."""
    lines = "+1"
    while True:
        logs(tpu, lines)
        ask = 'cd llm_jax && tail --pid="$(cat run.pid)" -f /dev/null; echo "ended with $(cat run.code)"'
        failed, said = tpu.shell.ask(tpu.everywhere(ask), supposed="ended with 0")
        codes = re.findall(r"ended with (\d+)", said)
        code = next((int(each) for each in codes if each != "0"), 0)
        clear = codes and STOPPED not in codes and not (code and FLAGS.capacity == "spot")
        if clear and not failed:
            return code
        # stopped, or out of reach: by hand, by the network, or with the machines, of which gcloud learns late
        for _ in range(PATIENCE):
            tpu.still_there()
            time.sleep(tpu.poll)
        if codes and not failed:
            return code
        if not failed:
            raise LaunchError("the run left no exit code: it was killed, or its host started anew; `logs` has its last words")
        say("the connection is lost, the machines are there: following again")
        lines = "20"


def create(tpu: Tpu) -> int:
    """Has the resource made unless it is there, and waits until it is active. Raises `LaunchError` and `Lost`."""
    slice_, state = slices(), None if tpu.shell.dry else tpu.state()
    if state in GONE or state in TAKEN:
        say(f"{tpu.name} is {state}: deleted, and made again")
        tpu.delete()
        state = None
    if state is None:
        tpu.shell.do(creation(tpu, slice_))
        state = tpu.state()
    seen = None
    while state != "ACTIVE":
        if state is None:
            raise LaunchError(f"{tpu.name} was deleted while it was waited for")
        if state in GONE or state in TAKEN:
            tpu.shell.run(tpu.queued("describe", tpu.name))  # which says why
            time.sleep(tpu.poll)
            raise Lost(f"{tpu.name} is {state}")
        if state != seen:
            say(f"{tpu.name} is {state}")
            seen = state
        time.sleep(tpu.poll)
        state = tpu.state()
    return 0


def creation(tpu: Tpu, slice_: accelerators.Slice) -> list[str]:
    """gcloud's command that has it made. Slices of three axes of one size differ: these are named by topology, which is alpha."""
    nodes = [f"--node-id={tpu.name}"] if FLAGS.slices == 1 else [f"--node-count={FLAGS.slices}", f"--node-prefix={tpu.name}"]
    command = tpu.queued("create", tpu.name, *nodes, f"--runtime-version={FLAGS.image or slice_.chip.image}")
    if slice_.chip.axes == 3:
        command.insert(1, "alpha")
        command += [f"--type={slice_.chip.vm}", f"--topology={slice_.topology}"]
    else:
        command += [f"--accelerator-type={slice_.type}"]
    return [*command, *([] if FLAGS.capacity == "on-demand" else [f"--{FLAGS.capacity}"]), *FLAGS.create]


def status(tpu: Tpu) -> int:
    """Prints its state; 1 if there is none."""
    state = tpu.state()
    print(state or f"there is no {tpu.name} in {FLAGS.zone}")
    return 0 if state else 1


def logs(tpu: Tpu, lines: str = "+1") -> int:
    """Follows the first host's log until the run ends. lines: from which on, or how many of the last."""
    return tpu.shell.run(tpu.on_first(f'cd llm_jax && tail -n {lines} --pid="$(cat run.pid)" -F run.log'))


def stop(tpu: Tpu) -> int:
    """Lets the run save and end, on all hosts; the machines stay."""
    return tpu.shell.run(tpu.everywhere('kill -TERM "$(cat llm_jax/run.pid)"'))


def delete(tpu: Tpu) -> int:
    """Deletes it."""
    tpu.delete()
    return 0


def slices() -> accelerators.Slice:
    """The slice of --topology. Raises `LaunchError` if the Cloud TPU API has none such, or a worker would have several hosts."""
    required(FLAGS, "topology")
    slice_ = accelerators.parse(FLAGS.topology)
    if slice_.chip.image is None:
        raise LaunchError(f"--topology={FLAGS.topology}: the Cloud TPU API has no {slice_.chip.vm}: use python -m launch.gke")
    if FLAGS.worker:
        what = f"--topology={FLAGS.topology} --slices={FLAGS.slices}"
        one_process(
            "--worker", slice_.hosts * FLAGS.slices, what, f"give it one slice of one host, as in --topology={slice_.single}"
        )
    return slice_


def pack(shell: Shell, archive: pathlib.Path, ref: str | None) -> None:
    """The code: what git knows in a commit, or in the working tree with new files that are not ignored."""
    if ref:
        shell.do(["git", "-C", str(ROOT), "archive", "--format=tar.gz", f"--output={archive}", ref])
        return
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(found(listing), capture_output=True, text=True, check=False)
    if listed.returncode:
        raise LaunchError(f"{ROOT} is no working tree of git's, which says what belongs to the code: launch from a clone")
    files = sorted({name for name in listed.stdout.split("\0") if (ROOT / name).is_file()})
    if shell.dry:
        print(f"# {archive}: {len(files)} files of {ROOT}, which git knows or does not ignore")
        return
    with tarfile.open(archive, "w:gz") as tar:
        for name in files:
            tar.add(ROOT / name, name)


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv))
