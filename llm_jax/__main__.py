"""`python -m llm_jax COMMAND --flags`: the table of contents. Each command is one small file in `cli/`."""

import importlib
import sys

COMMANDS = {
    "run": "train what an experiment file declares, and report it",
    "report": "rebuild the report of one or several work folders from their results",
    "prepare": "turn raw text into sharded, checksummed token files that experiments read",
    "inspect": "look inside a model: attention, logit lens, depth, embeddings, positions, as one page",
    "tokenize": "train a tokenizer, encode with it, see the pieces of a text in colour, compare several",
    "evaluate": "score a model on corpora, on questions in JSON lines, and by EleutherAI's harness",
    "compile": "compile the step for TPUs that are not attached: memory, FLOPs, messages, and the time they will take",
    "fit": "a scaling law over a population of sizes: its parameters, how well it predicts, and how to spend a budget",
    "check": "a model's gradient against finite differences, its causality, and that all ways to compute it agree",
}


def main() -> int:
    """Runs the command named first; exit code 2 for a mistake in what was typed, after one sentence."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        wanted = sys.argv[1] if len(sys.argv) > 1 else ""
        if wanted in ("-h", "--help", "help"):
            print(_contents())
            return 0
        print((f"error: no command {wanted!r}\n" if wanted else "") + _contents(), file=sys.stderr)
        return 2
    from llm_jax.core.config import ConfigError

    command = sys.argv[1]
    try:
        return importlib.import_module(f"llm_jax.cli.{command}").main([f"llm_jax {command}", *sys.argv[2:]])
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        from llm_jax.cli.terminal import refusal

        sentence = refusal(error, sys.argv[2:])
        if sentence is None:
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _contents() -> str:
    rows = "\n".join(f"  {name:<10} {what}" for name, what in COMMANDS.items())
    return f"python -m llm_jax COMMAND --flags\n\n{rows}\n\npython -m llm_jax COMMAND --helpshort lists a command's flags."


if __name__ == "__main__":
    sys.exit(main())
