"""A command as it is typed, in this process."""

import importlib
import sys

from llm_jax import __main__


def outcome(command, argv, monkeypatch, capsys):
    """Exit code, standard output, standard error of `python -m llm_jax command …`, whatever flags were set before."""
    monkeypatch.setattr(sys, "argv", ["llm_jax", command, *argv])
    known = importlib.import_module(f"llm_jax.cli.{command}").FLAGS
    known.unparse_flags()
    for name in known:
        known[name].unparse()
    code = __main__.main()
    shown = capsys.readouterr()
    return code, shown.out.strip(), shown.err.strip()
