"""Language models in JAX: trained in ablations that answer a question, and loaded, asked and exported as one object.

import llm_jax

lm = llm_jax.load("runs/c06")
print(lm.generate("def main", sampling=llm_jax.Sample(temperature=0.8)))
"""

import importlib

HOMES = {
    "LM": "llm_jax.language_model",
    "load": "llm_jax.language_model",
    "export": "llm_jax.language_model",
    "evaluate": "llm_jax.evaluation.evaluation",
    "Mesh": "llm_jax.core.mesh",
    "Greedy": "llm_jax.infer.sampling",
    "Sample": "llm_jax.infer.sampling",
}

__all__ = ["LM", "Greedy", "Mesh", "Sample", "evaluate", "export", "load"]


def __getattr__(name: str):
    """Imported when it is asked for: `import llm_jax` alone does not import JAX."""
    if name in HOMES:
        return getattr(importlib.import_module(HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *globals()]
