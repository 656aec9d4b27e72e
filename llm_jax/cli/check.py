"""Check a model of yours: gradients, causality, scanned and recomputed layers, decoding, precision, parameter counts.

python -m llm_jax check --model="Decoder(width=32, depth=2, attention=MLA(heads=2), ffn=MoE())"
python -m llm_jax check --experiment=experiments/c06_positional_encoding.py --arm=alibi
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from llm_jax.cli.terminal import console, parse
from llm_jax.core import platform
from llm_jax.core.config import ConfigError
from llm_jax.core.written import override_text
from llm_jax.core.written import parse as parse_component

if TYPE_CHECKING:
    from llm_jax.models.model import Model
    from llm_jax.objectives.objective import Objective

FLAGS = flags.FlagValues()
flags.DEFINE_string("model", None, "A model as it is written in an experiment file.", flag_values=FLAGS)
flags.DEFINE_string("experiment", None, "An experiment file, whose model and objective are checked.", flag_values=FLAGS)
flags.DEFINE_string("arm", None, "The arm of the experiment (default: its base).", flag_values=FLAGS)
flags.DEFINE_multi_string("set", [], "path=value: a field of the experiment, e.g. model.depth=2.", flag_values=FLAGS)
flags.DEFINE_integer("vocabulary", 64, "Token ids of the example, at least twice its length.", flag_values=FLAGS)
flags.DEFINE_integer("length", 16, "Tokens of the example's rows.", lower_bound=4, flag_values=FLAGS)
flags.DEFINE_integer("rows", 2, "Rows of the example.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("seed", 0, "Of the parameters and the example.", flag_values=FLAGS)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code: 0, or 1 if a check failed. Raises `ConfigError`."""
    parse(FLAGS, argv)
    if (FLAGS.model is None) == (FLAGS.experiment is None):
        raise ConfigError('needs either --model="Decoder(width=32, depth=2)" or --experiment=PATH, and not both', "check")
    platform.setup()
    platform.require_devices()
    from llm_jax.train import check

    model, objective = _model()
    sizes = {name: FLAGS[name].value for name in ("vocabulary", "length", "rows", "seed")}
    found = []
    with console().status("checking") as status:
        for finding in check.findings(check.subject(model, objective, **sizes)):
            found.append(finding)
            status.update(f"checked: {finding.name}")
            if not console().is_terminal:
                print(f"checked: {finding.name}", file=sys.stderr, flush=True)
    console().print(_table(found))
    return 0 if all(finding.passed for finding in found) else 1


def _model() -> tuple[Model, Objective | None]:
    """The model, and what it is trained for where an experiment says so."""
    from llm_jax.lab.experiment import load
    from llm_jax.models.model import Model  # after lab, which knows all components

    if FLAGS.model is not None:
        for flag in ("arm", "set"):
            if FLAGS[flag].value:
                raise ConfigError("changes an experiment: write it into --model instead", f"--{flag}")
        return parse_component(FLAGS.model, Model, "--model"), None
    ablation = load(FLAGS.experiment)
    if FLAGS.arm is not None and FLAGS.arm not in ablation.arms:
        raise ConfigError(f"names the arm {FLAGS.arm!r}, but the arms are {', '.join(ablation.arms)}", "--arm")
    experiment = override_text(ablation.base if FLAGS.arm is None else ablation.experiment(FLAGS.arm), FLAGS.set)
    return experiment.model, experiment.objective


def _table(found: Sequence) -> object:
    from rich.table import Table

    table = Table("check", "error", "tolerance", "", "where")
    for finding in found:
        mark = "-" if finding.error is None else "[green]ok[/]" if finding.passed else "[red bold]FAILED[/]"
        error = "" if finding.error is None else f"{finding.error:.1e}"
        table.add_row(finding.name, error, f"{finding.tolerance:.0e}" if finding.error is not None else "", mark, finding.note)
    return table
