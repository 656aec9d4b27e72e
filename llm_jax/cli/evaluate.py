"""Score a model: perplexity of a corpus, questions of your own in JSON lines, tasks of EleutherAI's lm-evaluation-harness.

python -m llm_jax evaluate --model=runs/c06 --corpus="TextFiles(path='texts')" --split=valid --length=512
python -m llm_jax evaluate --model=path/to/gpt2 --task=questions.jsonl --task="MultipleChoice(path='more.jsonl', shots=5)"
python -m llm_jax evaluate --model=runs/c06 --arm=rope --harness_tasks=hellaswag,my_task --include_path=tasks

A question is {"context": "2 + 2 =", "choices": ["4", "5"], "gold": 0}, or {"context": "Q: …", "answer": "…"} to be written.
"""

from __future__ import annotations

import pathlib
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from llm_jax.cli.terminal import console, parse, require_writable, which_model
from llm_jax.core import platform
from llm_jax.core.config import ConfigError
from llm_jax.core.written import parse as parse_component

if TYPE_CHECKING:
    from llm_jax.evaluation.tasks import Task

FLAGS = flags.FlagValues()
which_model(FLAGS)
flags.DEFINE_multi_string("corpus", [], "A corpus as it is written in an experiment file.", flag_values=FLAGS)
flags.DEFINE_string("split", "valid", "What of it: train, valid, test, or one of its probes.", flag_values=FLAGS)
flags.DEFINE_multi_string(
    "task",
    [],
    "A file of JSON lines, or MultipleChoice(path=…, shots=…) or Generation(path=…, until=…, max_tokens=…).",
    flag_values=FLAGS,
)
flags.DEFINE_list("harness_tasks", [], "Tasks of lm-evaluation-harness, by name.", flag_values=FLAGS)
flags.DEFINE_string("include_path", None, "A folder of task files for it.", flag_values=FLAGS)
flags.DEFINE_integer("shots", None, "Examples of its tasks (default: each task's own).", lower_bound=0, flag_values=FLAGS)
flags.DEFINE_integer("length", None, "Tokens read at most (default: the model's own).", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("context", 1, "Tokens that a corpus' later windows see, at least.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("limit", None, "Documents or questions of each, at most.", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_boolean("chat", False, "Questions go through the model's chat template.", flag_values=FLAGS)
flags.DEFINE_string("compute", None, "Activations: float32 or bfloat16 (default: the model's).", flag_values=FLAGS)
flags.DEFINE_string(
    "mesh", "Mesh()", "Mesh() copies the model to every device, Mesh(data=1, fsdp=-1) splits it.", flag_values=FLAGS
)
flags.DEFINE_integer("seed", 0, "Of what is drawn.", flag_values=FLAGS)
flags.DEFINE_string("out", None, "A JSON file for all scores, and each question's.", flag_values=FLAGS)

EVERY = 10.0  # seconds between lines of progress


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code 0. Raises `ConfigError`."""
    parse(FLAGS, argv)
    if FLAGS.model is None:
        raise ConfigError("needs --model=FOLDER, a work folder or one of Hugging Face's", "evaluate")
    if not (FLAGS.corpus or FLAGS.task or FLAGS.harness_tasks):
        raise ConfigError("needs something to score: --corpus=…, --task=FILE.jsonl or --harness_tasks=NAME", "evaluate")
    out = None if FLAGS.out is None else pathlib.Path(FLAGS.out).expanduser()
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise ConfigError(f"must be a file in a folder that there is, got {FLAGS.out!r}", "--out")
    if out is not None:
        require_writable(out, f"--out={FLAGS.out}")
    platform.setup()
    platform.require_devices()
    from llm_jax.core.mesh import Mesh
    from llm_jax.data.corpora import Corpus
    from llm_jax.evaluation.evaluation import choose, evaluate
    from llm_jax.lab import experiment
    from llm_jax.language_model import load

    if FLAGS.experiment is not None:
        experiment.load(FLAGS.experiment)
    corpora = [parse_component(text, Corpus, "--corpus") for text in FLAGS.corpus]
    tasks, mesh = [_task(text) for text in FLAGS.task], parse_component(FLAGS.mesh, Mesh, "--mesh")
    harness = choose(FLAGS.harness_tasks, FLAGS.include_path) if FLAGS.harness_tasks else ()
    lm = load(FLAGS.model, arm=FLAGS.arm, trial=FLAGS.trial, step=FLAGS.step, compute=FLAGS.compute, mesh=mesh)
    names = ("split", "include_path", "shots", "length", "context", "limit", "seed")
    given = {name: FLAGS[name].value for name in names}
    with _Display() as display:
        found = evaluate(lm, corpora=corpora, tasks=tasks, harness=harness, chats=FLAGS.chat, tell=display.tell, **given)
    console().print(found.model, highlight=False, markup=False)
    console().print(found.table())
    if out is not None:
        found.write(out)
        print(f"written: {out}")
    return 0


def _task(text: str) -> Task:
    """A component as it is written, or what a file's first record is of."""
    from llm_jax.evaluation.tasks import Task, of_file

    is_component = text.partition("(")[0].isidentifier() and not pathlib.Path(text).expanduser().exists()
    return parse_component(text, Task, "--task") if is_component else of_file(text)


class _Display:
    """One line that is rewritten on a terminal, a line now and then elsewhere, both on standard error."""

    def __enter__(self) -> _Display:
        from rich.console import Console

        self.last, self.console = time.monotonic(), Console(stderr=True)
        self.status = self.console.status("scoring") if self.console.is_terminal else None
        if self.status is not None:
            self.status.start()
        return self

    def __exit__(self, *_) -> None:
        if self.status is not None:
            self.status.stop()

    def tell(self, what: str, done: int, of: int | None, words: str) -> None:
        now = time.monotonic()
        if now - self.last < (0.1 if self.status else EVERY):
            return
        self.last = now
        line = f"{what}: {words or f'{done:,} of {of:,}'}"
        if self.status is not None:
            self.status.update(line)
        else:
            print(line, file=sys.stderr, flush=True)
