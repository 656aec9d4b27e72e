"""What layers with experts add to training: auxiliary losses, biases that no loss trains, and statistics of their loads."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.core.types import Metrics, Weighted
from llm_jax.models.model import Model
from llm_jax.nn.moe import MoE
from llm_jax.nn.routing import Sigmoid, updated_bias

Path = tuple[str, ...]
Tree = Mapping[str, Any]


def expert_layers(model: Model) -> dict[Path, MoE]:
    """Where in the parameters each layer with experts lies, the head's own among them, and its configuration."""
    found: dict[Path, MoE] = {}
    for name, stack in model.stacks.items():
        for index, layer in enumerate(stack.in_full):
            if isinstance(layer.ffn, MoE):
                found[(*((name,) if name else ()), *stack.place(index), "ffn")] = layer.ffn
    for place, layer in model.head.layers(model.final).items():
        if isinstance(layer.ffn, MoE):
            found[("head", *place, "ffn")] = layer.ffn
    return found


def penalty(model: Model, sown: Tree) -> Weighted | None:
    """All auxiliary losses by their weights, over the tokens; None without experts."""
    parts = [config.penalty(_at(sown, path)) for path, config in expert_layers(model).items()]
    return Weighted(sum((p.total for p in parts[1:]), parts[0].total), parts[0].weight) if parts else None


def settle(model: Model, params: Tree, sown: Tree) -> tuple[Tree, Metrics]:
    """After a step: parameters with the loss-free biases moved by what a whole batch chose, and metrics for the log.

    "moe/max_load": choices of the most chosen expert over the mean, averaged over layers; "moe/dropped": the part of all choices
    that was not carried out.
    """
    loads, dropped = [], []
    for path, config in expert_layers(model).items():
        load_E, lost = _at(sown, path)["load"], _at(sown, path)["dropped"]
        loads.append((load_E.max(-1) / jnp.maximum(load_E.mean(-1), 1e-30)).reshape(-1))
        dropped.append(jax.tree.map(jnp.sum, lost))
        if isinstance(config.router, Sigmoid) and config.router.bias:
            moved = partial(updated_bias, load_E=load_E, rate=config.router.bias_rate)
            params = _replaced(params, (*path, "router", "bias"), moved)
    if not loads:
        return params, {}
    lost = Weighted(sum(d.total for d in dropped), sum(d.weight for d in dropped))
    return params, {"moe/max_load": Weighted.of(jnp.concatenate(loads).mean()), "moe/dropped": lost}


def _at(tree: Tree, path: Path) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _replaced(tree: Tree, path: Path, function) -> dict[str, Any]:
    head, *rest = path
    return dict(tree) | {head: _replaced(tree[head], tuple(rest), function) if rest else function(tree[head])}
