"""Look inside a model: attention maps, logit lens, stream and gradients by depth, embeddings, positions, as one page and as PNGs.

python -m llm_jax inspect --model=runs/c06 --text="def main(self):" --out=inspection
python -m llm_jax inspect --model=path/to/gpt2 --text="The capital of France is" --words=king,queen --analogy=man:king:woman:queen
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from llm_jax.cli.terminal import console, parse, which_model
from llm_jax.core import platform
from llm_jax.core.config import ConfigError

if TYPE_CHECKING:
    from llm_jax.lab.inspection import Written

FLAGS = flags.FlagValues()
which_model(FLAGS)
flags.DEFINE_string("text", None, "What it reads (of an encoder-decoder: what its decoder writes).", flag_values=FLAGS)
flags.DEFINE_list("ids", None, "Token ids in place of the text: 1,2,3.", flag_values=FLAGS)
flags.DEFINE_string("input", None, "What an encoder-decoder's encoder reads; ids where --ids are.", flag_values=FLAGS)
flags.DEFINE_list("show", [], "Views: attention,lens,depth,embeddings,positions (default: all that there are).", flag_values=FLAGS)
flags.DEFINE_list("layers", None, "Layers whose attention is drawn large, from 0 (default: up to six).", flag_values=FLAGS)
flags.DEFINE_list("words", [], "Words whose nearest neighbours are listed (default: the text's).", flag_values=FLAGS)
flags.DEFINE_multi_string("analogy", [], "a:b:c asks a is to b as c is to what; a:b:c:d looks for d.", flag_values=FLAGS)
flags.DEFINE_string("out", "inspection", "The folder to write to.", flag_values=FLAGS)


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code 0. Raises `ConfigError`."""
    parse(FLAGS, argv)
    if FLAGS.model is None:
        raise ConfigError("needs --model=FOLDER, a work folder or one of Hugging Face's", "inspect")
    if FLAGS.text is not None and FLAGS.ids is not None:
        raise ConfigError("is the same as --text in ids: give one of the two", "--ids")
    platform.setup()
    platform.require_devices()
    from llm_jax.lab import experiment
    from llm_jax.language_model import load

    if FLAGS.experiment is not None:
        experiment.load(FLAGS.experiment)
    model = load(FLAGS.model, arm=FLAGS.arm, trial=FLAGS.trial, step=FLAGS.step)
    text = FLAGS.text if FLAGS.ids is None else _numbers("--ids", FLAGS.ids)
    given = FLAGS.input if FLAGS.ids is None or FLAGS.input is None else _numbers("--input", FLAGS.input.split(","))
    options = {"attention": {"layers": None if FLAGS.layers is None else _numbers("--layers", FLAGS.layers)}}
    options["embeddings"] = {"words": FLAGS.words, "analogies": FLAGS.analogy}
    given_options = {view: {name: value for name, value in more.items() if value} for view, more in options.items()}
    with console().status("looking"):
        written = model.inspect(text, input=given).write(FLAGS.out, show=FLAGS.show, **given_options)
    console().print(repr(model), highlight=False, markup=False)
    console().print(_table(written))
    console().print(f"The page: {written.page}", highlight=False, markup=False, soft_wrap=True)
    return 0


def _numbers(flag: str, words: Sequence[str]) -> list[int]:
    try:
        return [int(word) for word in words]
    except ValueError:
        raise ConfigError(f"must be whole numbers as in {flag}=1,2,3, got {','.join(words)!r}", flag) from None


def _table(written: Written) -> object:
    from rich.markup import escape
    from rich.table import Table

    table = Table("view", "pictures", "")
    for view in written.views:
        table.add_row(view.name, str(len(view.figures)), view.title)
    for name, why in written.left_out.items():
        table.add_row(name, "-", escape(f"left out: {why}"))
    return table
