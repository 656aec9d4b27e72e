"""Small parameter trees, shaped like the models', and losses over them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llm_jax.core.config import substitute, traced_values
from llm_jax.models.decoder import Decoder
from llm_jax.models.model import matrix_axes, parameter_roles, unstack_layers

LAYERS, WIDTH, HEADS, TOKENS = 2, 8, 2, 6
SCANNED = Decoder(width=WIDTH, depth=LAYERS, layers="scanned")


def tree(seed: int = 0, *, hidden: int = WIDTH) -> dict:
    """Unrolled parameters, normally distributed."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    layer = lambda: {  # noqa: E731
        "attention": {
            "query": {"kernel": draw(WIDTH, HEADS, WIDTH // HEADS)},
            "output": {"kernel": draw(HEADS, WIDTH // HEADS, WIDTH)},
        },
        "ffn": {"up": {"kernel": draw(WIDTH, hidden), "bias": draw(hidden)}, "down": {"kernel": draw(hidden, WIDTH)}},
        "norm_ffn": {"scale": draw(WIDTH)},
    }
    return {"embedding": {"tokens": {"embedding": draw(TOKENS, WIDTH)}}, "head": {"words": {"kernel": draw(WIDTH, TOKENS)}}} | {
        f"layers_{i}": layer() for i in range(LAYERS)
    }


def quadratic(params) -> jax.Array:
    """Σ h (p - p*)² / 2, whose Hessian is the diagonal h in [0.5, 2]; unrolled or scanned parameters."""
    params = unstack_layers(params, SCANNED) if "layers" in params else params
    pairs = zip(
        jax.tree.leaves(params), jax.tree.leaves(tree(1, hidden=params["layers_0"]["ffn"]["up"]["kernel"].shape[1])), strict=True
    )
    return sum(0.5 * jnp.sum(jnp.linspace(0.5, 2.0, p.size).reshape(p.shape) * (p - goal) ** 2) for p, goal in pairs)


def network(params) -> jax.Array:
    """Cross-entropy of a small residual network that is to map every token to the next: smooth, not convex."""
    x_TD = params["embedding"]["tokens"]["embedding"]
    for index in range(LAYERS):
        layer = params[f"layers_{index}"]
        h_THK = jnp.tanh(jnp.einsum("td,dhk->thk", x_TD, layer["attention"]["query"]["kernel"]))
        x_TD = x_TD + jnp.einsum("thk,hkd->td", h_THK, layer["attention"]["output"]["kernel"])
        h_TF = jnp.tanh(layer["norm_ffn"]["scale"][None] * x_TD @ layer["ffn"]["up"]["kernel"] + layer["ffn"]["up"]["bias"][None])
        x_TD = x_TD + h_TF @ layer["ffn"]["down"]["kernel"]
    logits = x_TD @ params["head"]["words"]["kernel"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, (jnp.arange(TOKENS) + 1) % TOKENS).mean()


def built(optimizer, params, factor=jnp.ones_like):
    """The transformation for such parameters."""
    return optimizer.build(factor, roles=parameter_roles(params), axes=matrix_axes(params))


def descend(optimizer, loss, params, steps: int, values=None):
    """(parameters, optimizer state) after so many steps; values: path → scalar for the optimizer's traced fields."""
    rule = built(substitute(optimizer, values or {}), params)

    def step(carry, key):
        params, state = carry
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = rule.update(grads, state, params, value=value, loss_fn=loss, key=key)
        return (optax.apply_updates(params, updates), state), value

    return jax.lax.scan(step, (params, rule.init(params)), jax.random.split(jax.random.key(0), steps))[0]


def varied(optimizer) -> dict[str, jax.Array]:
    """Two values, both within bounds, for every traced field: path → `[2]`."""
    return {path: value * jnp.array([1.0, 0.9]) for path, value in traced_values(optimizer).items()}
