"""What every launcher is made of: its flags, the `python -m llm_jax run …` that it ends in, programs run or only printed."""

from __future__ import annotations

import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from absl import flags

ROOT = pathlib.Path(__file__).parent.parent
TEMPLATES = pathlib.Path(__file__).parent / "templates"
OURS = ("worker", "distributed", "coordinator", "processes", "process")  # flags of run that launchers give
GET = {
    "gcloud": "install Google Cloud's command line: https://cloud.google.com/sdk/docs/install",
    "kubectl": "gcloud components install kubectl",
    "xpk": "pip install xpk",
    "docker": "install Docker: https://docs.docker.com/engine/install",
    "sbatch": "run this where Slurm is, on the cluster's login node",
    "git": "install git",
}


class LaunchError(ValueError):
    """What cannot be launched: one sentence with the way out."""


@dataclass(frozen=True)
class Run:
    """`python -m llm_jax run` with the flags that stood after `--`, word by word."""

    given: tuple[str, ...]

    def __post_init__(self):
        if not self.given or not self.given[0].startswith("-"):
            got = f", got {self.given[0]!r}" if self.given else ""
            raise LaunchError(f"after -- come the flags of `python -m llm_jax run`, as in -- --experiment=FILE --workdir=DIR{got}")
        for name in OURS:
            if self.flag(name) is not None:
                raise LaunchError(f"--{name} is given by the launcher: leave it out after --")
        if self.flag("workdir") is None and self.flag("plan") is None:
            raise LaunchError("--workdir is missing after --: name where everything is written, as in -- --workdir=runs/c06")

    def argv(self, python: str, *more: str) -> list[str]:
        """The command of one process; `more` are the launcher's own flags."""
        return [python, "-m", "llm_jax", "run", *self.given, *more]

    def flag(self, name: str) -> str | None:
        """The value of a flag, "" for one without, or None where it is not given: `--name=x`, `--name x`, with one dash or two."""
        for word, following in zip(self.given, (*self.given[1:], ""), strict=True):
            key, equals, value = word.partition("=")
            if key in (f"--{name}", f"-{name}"):
                return value if equals or following.startswith("-") else following
        return None


@dataclass(frozen=True)
class Shell:
    """Runs programs; with `dry` it prints what it would run, as one could type it, and changes nothing."""

    dry: bool = False

    def run(self, argv: Sequence[str], *, given: str | None = None) -> int:
        """The exit code of a program that writes to this terminal and reads `given`."""
        if self.dry:
            print(shlex.join(argv) + ("" if given is None else f" <<'END'\n{given.rstrip()}\nEND"))
            return 0
        return subprocess.run(found(argv), input=given, text=True, check=False).returncode

    def do(self, argv: Sequence[str], *, given: str | None = None) -> None:
        """`run`, raising `LaunchError` unless the program ends well."""
        if code := self.run(argv, given=given):
            raise LaunchError(f"{shlex.join(argv[:6])} … ended with code {code}: what it says of it stands above")

    def ask(self, argv: Sequence[str], *, supposed: str) -> tuple[int, str]:
        """Exit code and output of a program that only looks; `supposed` is its answer in a dry run."""
        if self.dry:
            print(f"{shlex.join(argv)}  # supposed to say {supposed}")
            return 0, supposed
        done = subprocess.run(found(argv), capture_output=True, text=True, check=False)
        return done.returncode, (done.stdout if done.returncode == 0 else done.stderr).strip()

    def need(self, program: str) -> None:
        """Raises `LaunchError` if a program that is to run later is not there."""
        if not self.dry:
            found([program])

    def make(self, folder: pathlib.Path) -> None:
        """Makes a folder on this machine."""
        if self.dry:
            print(shlex.join(["mkdir", "-p", str(folder)]))
            return
        folder.mkdir(parents=True, exist_ok=True)


def one_process(flag: str, processes: int, what: str, way: str) -> None:
    """Raises `LaunchError` unless a worker is one process, which `run --worker` is. what: flags that say more; way: the way out."""
    if processes > 1:
        name = flag.partition("=")[0]
        raise LaunchError(
            f"{flag}: a worker is one process, and {what} makes it {processes}: {way}, or leave out {name} for one run of all"
        )


def logs_beside(run: Run) -> pathlib.Path:
    """The folder of logs beside a work folder, which itself may hold nothing but an ablation."""
    workdir = run.flag("workdir") or "runs/plan"
    if "://" in workdir:
        return pathlib.Path("runs") / (workdir.rstrip("/").rpartition("/")[2] + "-logs")
    return pathlib.Path(workdir.rstrip("/") + "-logs")


def say(sentence: str) -> None:
    """A line about what goes on, on standard error."""
    print(f"launch: {sentence}", file=sys.stderr, flush=True)


def found(argv: Sequence[str]) -> list[str]:
    """The command itself. Raises `LaunchError` if there is no such program."""
    if shutil.which(argv[0]) is None:
        raise LaunchError(f"{argv[0]} is not on PATH: {GET.get(argv[0], 'install it, or name another')}")
    return list(argv)


def parse(values: flags.FlagValues, argv: Sequence[str], usage: str) -> tuple[str, ...]:
    """Fills `values` from the words before `--` and returns those after it. `argv[0]` is the launcher as it is typed.

    Raises `LaunchError` for an unknown flag, a wrong value, or a word that is no flag.
    """
    cut = argv.index("--") if "--" in argv else len(argv)
    ours, theirs = list(argv[:cut]), tuple(argv[cut + 1 :])
    if set(ours[1:]) & {"--help", "--helpshort", "-h"}:
        print(f"{usage}\n{values.get_help()}")
        raise SystemExit(0)
    try:
        rest = values(ours)
    except flags.Error as error:
        raise LaunchError(str(error).replace("\n", " ")) from None
    if len(rest) > 1:
        raise LaunchError(f"{argv[0]} takes flags only, got {rest[1]!r}: write --name=value, and what is for `run` after --")
    return theirs


def verb(argv: Sequence[str], known: Sequence[str], usage: str) -> tuple[str, list[str]]:
    """The verb that comes first, and the words without it. Raises `LaunchError` for another."""
    word = argv[1] if len(argv) > 1 else ""
    if word in ("--help", "--helpshort", "-h"):
        return known[0], list(argv)
    if word not in known:
        raise LaunchError(f"{argv[0]} begins with one of {', '.join(known)}, got {word!r}\n{usage}")
    return word, [argv[0], *argv[2:]]


def required(values: flags.FlagValues, *names: str) -> None:
    """Raises `LaunchError` if one of the flags has no value."""
    for name in names:
        if values[name].value is None:
            raise LaunchError(f"--{name} is missing: {values[name].help.rstrip('.')}")


def require_name(name: str, most: int) -> None:
    """Raises `LaunchError` unless a --name is one that Google Cloud takes, of so many characters at most."""
    if len(name) > most or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        raise LaunchError(f"--name={name}: write at most {most} small letters, digits and dashes, a letter first")


def guarded(main: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """The exit code of a launcher; 2, after one sentence, for a mistake in what was typed. `argv[0]` is its file."""
    try:
        return main([f"python -m launch.{pathlib.Path(argv[0]).stem}", *argv[1:]])
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: {error.filename}: {error.strerror}: name another place, as with --logs", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
