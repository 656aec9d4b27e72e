"""What every model is to the rest of the system: a configuration that builds a network, and functions of its parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm_jax.core.config import Config, substitute
from llm_jax.core.sharding import unbox
from llm_jax.core.types import Batch
from llm_jax.models.stack import Stack
from llm_jax.nn.multihead import Attention

Params = Mapping[str, Any]


@dataclass(frozen=True)
class Model(Config):
    """A language model."""

    abstract = True

    def build(self, vocabulary: int) -> nn.Module:
        """The network over so many token ids."""
        raise NotImplementedError

    def arguments(self, batch: Batch) -> tuple[tuple, dict[str, Any]]:
        """What the network takes of a batch: positional and named arguments."""
        raise NotImplementedError

    def example(self) -> tuple[jax.Array, ...]:
        """The smallest inputs that the network takes, to initialise it."""
        return (jnp.zeros((1, 1), jnp.int32),)

    def rates(self, vocabulary: int) -> Any:
        """For every parameter what the learning rate is multiplied by; None: all alike."""
        return None

    @property
    def stacks(self) -> dict[str, Stack]:
        """Where in the parameters each stack lies ("": at the top), and its configuration."""
        raise NotImplementedError

    @property
    def final(self) -> Stack:
        """The stack that the head reads from."""
        return list(self.stacks.values())[-1]

    @property
    def tables(self) -> int:
        """Embedding tables."""
        return 1

    @property
    def across(self) -> Attention | None:
        """Cross-attention of the final stack's layers."""
        return None

    @property
    def rowwise(self) -> bool:
        """Whether training treats each row for itself: nothing is dropped at random, and no layer looks at several rows."""
        stacks = self.stacks.values()
        alone = all(layer.ffn.rowwise for stack in stacks for layer in stack.in_full if layer.ffn)
        return alone and not any(stack.dropout.rates() for stack in stacks)

    @property
    def encodes(self) -> bool:
        """Whether it reads an input besides the sequence that it continues."""
        return len(self.stacks) > 1

    @property
    def causal(self) -> bool:
        """Whether no output sees a later token of its own sequence."""
        return self.final.causal

    @property
    def sees_later(self) -> str:
        """What of it shows a token later ones, as a path; empty if nothing does."""
        name = list(self.stacks)[-1]
        return f"{name}.{self.final.sees_later}" if name and self.final.sees_later else self.final.sees_later

    @property
    def prefix_mask(self) -> str:
        """Where a mask shows a prefix, as a path; empty if none does."""
        return self.final.prefix_mask

    @property
    def scanned(self) -> bool:
        """Whether any stack is scanned."""
        return any(stack.scanned for stack in self.stacks.values())

    def with_layers(self, layers: str) -> Model:
        """The same with all stacks "scanned" or "unrolled"."""
        paths = (f"{path}.layers" if path else "layers" for path in self.stacks)
        return substitute(self, dict.fromkeys(paths, layers))


# ── parameters ───────────────────────────────────────────────────────────────────────────────────────────────────────
def abstract_parameters(config: Model, vocabulary: int) -> Params:
    """Shapes and dtypes of the parameters, boxed with their logical axes."""
    return jax.eval_shape(partial(_boxed, config, vocabulary), jax.random.key(0))


def initial_parameters(config: Model, vocabulary: int, key: jax.Array) -> Params:
    """Fresh parameters: the same numbers whether layers are scanned or unrolled, and a program that does not grow with depth."""
    stacked = config.with_layers("scanned")
    params = unstack_layers(unbox(_boxed(stacked, vocabulary, key)), stacked)
    return stack_layers(params, config)


def _boxed(config: Model, vocabulary: int, key: jax.Array) -> Params:
    return config.build(vocabulary).init(key, *config.example())["params"]


def stack_layers(params: Params, config: Model) -> dict[str, Any]:
    """Parameters whose layers all stand alone (`layers_0`, …) as the network of `config` takes them."""
    return _each_stack(params, config, lambda tree, stack: _stacked(tree, stack) if stack.scanned else dict(tree))


def unstack_layers(params: Params, config: Model) -> dict[str, Any]:
    """Parameters as the network of `config` takes them, with every layer alone (`layers_0`, …)."""
    return _each_stack(params, config, _unstacked)


def _each_stack(params: Params, config: Model, function) -> dict[str, Any]:
    result = dict(params)
    for path, stack in config.stacks.items():
        if path:
            result[path] = function(result[path], stack)
        else:
            result = function(result, stack)
    return result


def _stacked(tree: Params, stack: Stack) -> dict[str, Any]:
    first, period = len(stack.first), stack.period
    end = first + stack.repeats * period

    def layers(step: int) -> list[Any]:
        return [tree[f"layers_{i}"] for i in range(first + step, end, period)]

    if not stack.repeats:
        return dict(tree)
    scanned = {f"step_{step}": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers(step)) for step in range(period)}
    rest = {k: v for k, v in tree.items() if not (m := re.fullmatch(r"layers_(\d+)", k)) or not first <= int(m[1]) < end}
    return rest | {"layers": scanned}


def _unstacked(tree: Params, stack: Stack) -> dict[str, Any]:
    scanned = tree.get("layers", {})
    rest = {k: v for k, v in tree.items() if k != "layers"}
    for step in range(len(scanned)):
        for repeat in range(stack.repeats):
            name = f"layers_{len(stack.first) + repeat * stack.period + step}"
            rest[name] = jax.tree.map(lambda leaf, r=repeat: leaf[r], scanned[f"step_{step}"])
    return rest


def parameter_roles(params: Any) -> Any:
    """For every leaf what it is to an optimizer: "matrix", "embedding", "head" or "vector"."""

    def role(path, leaf) -> str:
        names = [k.key for k in path]
        if names[-1] in ("embedding", "types"):
            return "embedding"
        if not names[-1].endswith("kernel"):
            return "vector"
        return "head" if names[-2] in ("words", "labels", "number") and names[0] == "head" else "matrix"

    return jax.tree_util.tree_map_with_path(role, params)


def matrix_axes(params: Any) -> Any:
    """For every leaf its (input axes, output axes) as a linear map, counted from 0; `None` for vectors and tables.

    Axes in neither, such as the layer axis of scanned parameters and the expert axis, count separate matrices.
    """
    return jax.tree_util.tree_map_with_path(input_output_axes, params)


def input_output_axes(path: Any, leaf: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The same of one leaf, whose path in the tree tells what it is."""
    names = [key.key for key in path]
    if not names[-1].endswith("kernel"):
        return None
    first = ("layers" in names) + ("experts" in names)
    inputs = 2 if names[-2] == "output" else 1
    return tuple(range(first, first + inputs)), tuple(range(first + inputs, leaf.ndim))


def token_table(config: Model, params: Params) -> jax.Array:
    """`[V, D]` float32: what each token enters the model as, before positions and norms."""
    tree = params["embedding"]
    table_VD = jnp.asarray(tree["embedding"], jnp.float32)
    if "projection" in tree:
        table_VD = table_VD @ tree["projection"]["kernel"].astype(jnp.float32)
    return table_VD * config.width**0.5 if config.embedding.scaled else table_VD
