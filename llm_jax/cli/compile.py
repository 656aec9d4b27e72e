"""Compile the very same training step for TPUs that are not attached, and say what it will take there before they are rented.

python -m llm_jax compile --experiment=experiments/c06_positional_encoding.py --scale=full --topology=v5e:16x16 --all-arms

With `--autoshard` it ranks the meshes that would do, by formula and in seconds.
"""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from llm_jax.cli.declared import declared, define, require_named
from llm_jax.cli.terminal import console, parse, require_writable
from llm_jax.core import platform
from llm_jax.core.chips import Topology
from llm_jax.core.config import ConfigError

if TYPE_CHECKING:
    from llm_jax.lab.experiment import Ablation, Experiment

FLAGS = flags.FlagValues()
define(FLAGS)
flags.DEFINE_string("topology", None, "Chips: v4:4x4x4, v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, …", flag_values=FLAGS)
flags.DEFINE_integer("slices", 1, "How many such slices, on one network.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("arm", None, "The arm that is compiled (default: the first).", flag_values=FLAGS)
flags.DEFINE_boolean("all-arms", False, "Compile every program that the arms make.", short_name="all_arms", flag_values=FLAGS)
flags.DEFINE_boolean("autoshard", False, "Rank the meshes of that topology by formula; compile nothing.", flag_values=FLAGS)
flags.DEFINE_integer("population", 1, "Trials in one program.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_string("out", None, "A JSON file for all that is found.", flag_values=FLAGS)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code: 0, or 1 if a program does not fit. Raises `ConfigError`."""
    parse(FLAGS, argv)
    if FLAGS.topology is None:
        raise ConfigError("--topology is missing: name the chips, e.g. --topology=v5e:16x16")
    require_named(FLAGS)
    topology = Topology.parse(FLAGS.topology, FLAGS.slices)
    if FLAGS.out:
        require_writable(pathlib.Path(FLAGS.out), f"--out={FLAGS.out}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # or JAX looks for the chips that libtpu is for
    platform.setup(cache=False)  # a program from the cache is not dumped
    from llm_jax.lab import ahead, outlook

    ablation, _ = declared(FLAGS)
    if FLAGS.autoshard:
        return _rank(ablation.only([FLAGS.arm]) if FLAGS.arm else ablation, topology)
    programs, found = _programs(ablation), {}
    for arms, experiment in programs.items():
        print(f"compiling {arms} for {topology.name}", file=sys.stderr)
        try:
            found[arms] = ahead.examine(experiment, topology, members=FLAGS.population)
        except ConfigError as error:
            raise ConfigError(f"{error} (in arm {arms!r})" if len(programs) > 1 else str(error)) from None
    for arms, one in found.items():
        if len(found) == 1 or not one.fits:
            for table in outlook.tables(arms, programs[arms], one):
                console().print(table)
    if len(found) > 1:
        console().print(outlook.summary(ablation.question, found))
    if FLAGS.out:
        pathlib.Path(FLAGS.out).write_text(json.dumps({arms: outlook.as_json(one) for arms, one in found.items()}, indent=1) + "\n")
    return 0 if all(one.fits for one in found.values()) else 1


def _rank(ablation: Ablation, topology: Topology) -> int:
    from llm_jax.lab import autoshard

    data = ablation.base.data
    console().print(autoshard.table(autoshard.of_ablation(ablation, topology), data.batch_size * data.sequence_length))
    return 0


def _programs(ablation: Ablation) -> dict[str, Experiment]:
    """The experiments to compile, by the arms that share their program."""
    from llm_jax.lab.population import structure

    if not FLAGS["all-arms"].value:
        arm = FLAGS.arm or next(iter(ablation.arms))
        return {arm: ablation.only([arm]).experiment(arm)}
    if FLAGS.arm:
        raise ConfigError("--arm and --all-arms exclude each other: leave one out")
    alike: dict[str, list[str]] = {}
    for arm in ablation.arms:
        alike.setdefault(structure(ablation.experiment(arm)), []).append(arm)
    return {", ".join(arms): ablation.experiment(arms[0]) for arms in alike.values()}
