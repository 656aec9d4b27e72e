"""The container image, built and pushed by docker.

python -m launch.docker --image=us-docker.pkg.dev/PROJECT/REPOSITORY/llm_jax:1 --extra=tpu --push
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags

from launch.command import ROOT, LaunchError, Shell, guarded, parse, required

FLAGS = flags.FlagValues()
flags.DEFINE_string("image", None, "What the image is called, with its registry and tag.", flag_values=FLAGS)
flags.DEFINE_enum("extra", None, ["cuda", "tpu", "cpu"], "Which devices it is for.", flag_values=FLAGS)
flags.DEFINE_string("python", "3.12", "The Python version.", flag_values=FLAGS)
flags.DEFINE_string("platform", "linux/amd64", "The machines' platform, whatever this one's is.", flag_values=FLAGS)
flags.DEFINE_boolean("push", False, "Push it as well.", flag_values=FLAGS)
flags.DEFINE_boolean("dry_run", False, "Print what would run; change nothing.", flag_values=FLAGS)


def main(argv: Sequence[str]) -> int:
    """Runs the launcher; returns the exit code. Raises `LaunchError`."""
    if parse(FLAGS, argv, __doc__ or ""):
        raise LaunchError("an image runs nothing: leave out what stands after --")
    required(FLAGS, "image", "extra")
    shell = Shell(FLAGS.dry_run)
    given = [f"--build-arg=EXTRA={FLAGS.extra}", f"--build-arg=PYTHON={FLAGS.python}", f"--platform={FLAGS.platform}"]
    shell.do(["docker", "build", f"--file={ROOT / 'launch' / 'Dockerfile'}", *given, f"--tag={FLAGS.image}", str(ROOT)])
    if FLAGS.push:
        shell.do(["docker", "push", FLAGS.image])
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main, sys.argv))
