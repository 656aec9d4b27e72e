"""Scaling laws over the runs of work folders: `study(["runs/sizes"])`, and `write` makes a page of it."""

from llm_jax.lab.scaling.sheet import answer, tables, write
from llm_jax.lab.scaling.study import study

__all__ = ["answer", "study", "tables", "write"]
