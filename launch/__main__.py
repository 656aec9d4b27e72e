"""`python -m launch`: the launchers, each of which is a command of its own."""

import importlib
import sys

LAUNCHERS = ("local", "slurm", "tpu", "gke", "docker")


def main() -> int:
    """Lists them; exit code 2 unless that was asked for."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help", "--helpshort", "help"):
        print(_contents())
        return 0
    way = f"write python -m launch.{words[0]}" if words[0] in LAUNCHERS else "one of these is meant"
    print(f"error: python -m launch takes no {words[0]!r}: {way}\n{_contents()}", file=sys.stderr)
    return 2


def _contents() -> str:
    lines = {name: (importlib.import_module(f"launch.{name}").__doc__ or "").splitlines()[0] for name in LAUNCHERS}
    rows = "\n".join(f"  {name:<7} {what}" for name, what in lines.items())
    usage = "python -m launch.LAUNCHER --flags -- FLAGS OF RUN"
    return f"{usage}\n\n{rows}\n\npython -m launch.LAUNCHER --help says more, and lists the flags."


if __name__ == "__main__":
    sys.exit(main())
