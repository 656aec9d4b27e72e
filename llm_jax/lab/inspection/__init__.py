"""A look inside a trained model: numbers as functions of `(model, vocabulary, params, batch)`, pictures, and a page of them."""

from llm_jax.lab.inspection.sheet import Inspection, Written
from llm_jax.lab.inspection.subject import Subject, sequence
from llm_jax.lab.inspection.view import Table, View

__all__ = ["Inspection", "Subject", "Table", "View", "Written", "sequence"]
