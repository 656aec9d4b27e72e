"""Mixtures of experts against loops over tokens and experts in float64 NumPy, and against `transformers` (golden files)."""

import math
import pathlib
from dataclasses import replace
from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads
from scipy import special

from llm_jax.core import platform
from llm_jax.core.config import ConfigError, components, from_json, to_json
from llm_jax.core.mesh import Mesh
from llm_jax.core.sharding import parameter_specs, unbox
from llm_jax.core.types import Weighted
from llm_jax.core.written import override_text
from llm_jax.nn.dispatch import Capacity, Dropless
from llm_jax.nn.ffn import MLP, Dense, FeedForward, Gated, NoFeedForward
from llm_jax.nn.kernels.grouped import batched_products, exchange, grouped_products, spare
from llm_jax.nn.moe import Experts, MoE
from llm_jax.nn.routing import ExpertChoice, Router, Sigmoid, Softmax, balance_loss, updated_bias, z_loss

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "moe"
ROWS, LENGTH, WIDTH, UNITS, EXPERTS = 4, 6, 8, 6, 8
BLOCKS, RAGGED = Dropless(form="blocks", block=4), Dropless(form="ragged")
FORMULAS = {"silu": lambda x: x * special.expit(x), "gelu": lambda x: x * special.ndtr(x)}


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def small(**fields):
    return MoE(**({"experts": EXPERTS, "expert": Gated(units=UNITS)} | fields))


def tokens(seed=1, common=2.0):
    """Tokens with something in common, so that some experts get many of them and some none."""
    return normal(ROWS, LENGTH, WIDTH, seed=seed) + np.float32(common) * normal(1, 1, WIDTH, seed=seed + 1)


def parameters(config, seed=3):
    shapes = unbox(jax.eval_shape(lambda: Experts(config, 1.0, jnp.float32).init(jax.random.key(0), jnp.zeros((1, 1, WIDTH)), {})))
    leaves, tree = jax.tree.flatten(shapes["params"])
    return tree.unflatten([normal(*leaf.shape, seed=seed + i) / 2 for i, leaf in enumerate(leaves)])


@cache
def compiled(config, dtype):
    return jax.jit(
        lambda params, x, valid: Experts(config, 1.0, dtype).apply({"params": params}, x, {}, valid, mutable=["routing"])
    )


def run(config, params, x, valid=None, dtype=jnp.float32):
    """Output and what was sown."""
    y, sown = compiled(config, dtype)(params, x, valid)
    return y, sown["routing"]


# ── the same in loops ────────────────────────────────────────────────────────────────────────────────────────────────
def f64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), tree)


def feed_forward(config, params, x):
    def linear(name, x):
        return x @ params[name]["kernel"] + params[name].get("bias", 0.0)

    f = FORMULAS[config.activation]
    return linear("down", f(linear("gate", x)) * linear("up", x) if config.branches == 2 else f(linear("up", x)))


def one_expert(params, index):
    return jax.tree.map(lambda leaf: leaf[index], params["experts"])


def mixture(config, params, x_BLD, weight_TE):
    """The sum over all experts, each with the weight that a token gives it."""
    params, x_TD = f64(params), f64(x_BLD).reshape(-1, WIDTH)
    y_TD = sum(weight_TE[:, [e]] * feed_forward(config.expert, one_expert(params, e), x_TD) for e in range(config.experts))
    if config.shared is not None:
        y_TD = y_TD + feed_forward(config.shared, params["shared"], x_TD)
    return y_TD.reshape(x_BLD.shape)


def scores_of(params, x, function=special.softmax):
    logits = f64(x).reshape(-1, WIDTH) @ f64(params["router"]["kernel"])
    return special.softmax(logits, -1) if function is special.softmax else function(logits)


def choices(params, x, active=2):
    """Softmax: chosen experts, best first, and renormalized weights."""
    scores = scores_of(params, x)
    expert = np.argsort(-scores, -1, kind="stable")[:, :active]
    weight = np.take_along_axis(scores, expert, -1)
    return expert, weight / weight.sum(-1, keepdims=True)


def spread_out(expert_TK, weight_TK):
    weight_TE = np.zeros((len(expert_TK), EXPERTS))
    np.put_along_axis(weight_TE, expert_TK, weight_TK, -1)
    return weight_TE


def admitted(config, expert_TK, valid_T):
    """Which choices a capacity lets through, counted one by one."""
    c, (count, active) = config.dispatch, expert_TK.shape
    kept = np.zeros(expert_TK.shape, bool)
    for group in np.arange(count).reshape(ROWS if c.over == "row" else 1, -1):
        room = math.ceil(round(c.factor * active * valid_T[group].sum() / config.experts, 6))
        first = [(t, k) for k in range(active) for t in group]
        taken = np.zeros(config.experts, int)
        for t, k in first if c.priority == "choice" else sorted(first):
            if valid_T[t] and taken[expert_TK[t, k]] < room:
                taken[expert_TK[t, k]] += 1
                kept[t, k] = True
    return kept


def close(got, expected, tolerance=1e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected)


def valid_mask():
    valid = np.ones((ROWS, LENGTH), bool)
    valid[0, 4:] = valid[2, :3] = valid[3] = False
    return valid


# ── dispatch ─────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("dispatch", [BLOCKS, Dropless(form="blocks", block=512), RAGGED], ids=str)
@pytest.mark.parametrize("expert", [Gated(units=UNITS), Dense(units=UNITS, bias=True)], ids=["gated", "dense with bias"])
def test_dropless_is_the_sum_over_the_chosen_experts(dispatch, expert):
    config = small(dispatch=dispatch, expert=expert, shared=Dense(units=3))
    params, x = parameters(config), tokens()
    expert_TK, weight_TK = choices(params, x)
    y, sown = run(config, params, x)
    close(y, mixture(config, params, x, spread_out(expert_TK, weight_TK)))
    load = np.bincount(expert_TK.reshape(-1), minlength=EXPERTS)
    assert load.min() == 0 and load.max() > 2 * load.mean(), "a test of uneven loads"
    np.testing.assert_array_equal(sown["load"], load)
    assert (float(sown["dropped"].total), float(sown["dropped"].weight)) == (0, expert_TK.size)


@pytest.mark.parametrize("over", ["row", "batch"])
@pytest.mark.parametrize("priority", ["choice", "position"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_capacity_drops_what_comes_too_late(over, priority, padded):
    config = small(dispatch=Capacity(factor=1.0, over=over, priority=priority))
    params, x, valid = parameters(config), tokens(common=0.5), valid_mask() if padded else np.ones((ROWS, LENGTH), bool)
    expert_TK, weight_TK = choices(params, x)
    kept, otherwise = (
        admitted(replace(config, dispatch=replace(config.dispatch, priority=p)), expert_TK, valid.reshape(-1))
        for p in (priority, {"choice": "position", "position": "choice"}[priority])
    )
    assert (kept != otherwise).any(), "a test of the order"
    y, sown = run(config, params, x, valid if padded else None)
    close(y, mixture(config, params, x, spread_out(expert_TK, weight_TK * kept)))
    asked = 2 * valid.sum()
    assert 0 < kept.sum() < asked
    assert (float(sown["dropped"].total), float(sown["dropped"].weight)) == (asked - kept.sum(), asked)
    np.testing.assert_array_equal(sown["load"], np.bincount(expert_TK[valid.reshape(-1)].reshape(-1), minlength=EXPERTS))


def test_a_large_capacity_drops_nothing():
    config = small(dispatch=Capacity(factor=EXPERTS / 2))
    params, x = parameters(config), tokens()
    y, sown = run(config, params, x)
    assert float(sown["dropped"].total) == 0
    close(y, run(replace(config, dispatch=RAGGED), params, x)[0])


@pytest.mark.parametrize("over", ["row", "batch"])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_experts_choose_their_best_tokens_equally_many_each(over, padded):
    config = small(router=ExpertChoice(over=over, capacity=0.7))
    params, x, valid = parameters(config), tokens(), valid_mask() if padded else np.ones((ROWS, LENGTH), bool)
    scores, weight_TE, load = scores_of(params, x), np.zeros((ROWS * LENGTH, EXPERTS)), 0
    for group in np.arange(ROWS * LENGTH).reshape(ROWS if over == "row" else 1, -1):
        group = group[valid.reshape(-1)[group]]
        room = math.ceil(0.7 * 2 * len(group) / EXPERTS)
        load += room
        for e in range(EXPERTS):
            best = group[np.argsort(-scores[group, e], kind="stable")[:room]]
            weight_TE[best, e] = scores[best, e]
    y, sown = run(config, params, x, valid if padded else None)
    close(y, mixture(config, params, x, weight_TE))
    np.testing.assert_array_equal(sown["load"], np.full(EXPERTS, load))
    missed = (weight_TE[valid.reshape(-1)] == 0).all(1).sum()
    assert missed > 0 or padded
    assert (float(sown["dropped"].total), float(sown["dropped"].weight)) == (missed, valid.sum())


WAYS = {
    "blocks": {"dispatch": BLOCKS},
    "ragged": {"dispatch": RAGGED},
    "capacity of rows": {"dispatch": Capacity(factor=1.0)},
    "capacity of the batch": {"dispatch": Capacity(factor=1.0, over="batch", priority="position")},
    "expert choice": {"router": ExpertChoice()},
    "sigmoid": {
        "dispatch": BLOCKS,
        "router": Sigmoid(groups=4, active_groups=2, bias=True),
        "expert": Dense(units=UNITS, bias=True, activation="tanh"),
    },
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@every_way
def test_padding_is_as_if_it_were_not_there(way):
    config = small(**way)
    params, x, valid = parameters(config), tokens(), np.ones((ROWS, LENGTH), bool)
    valid[:, -2:] = False
    y, sown = run(config, params, np.where(valid[..., None], x, 1e6 * x), valid)
    alone, expected = run(config, params, x[:, :-2])
    close(y[:, :-2], alone)
    np.testing.assert_array_equal(y[:, -2:], 0)
    close(sown, expected)


@every_way
def test_a_token_does_not_depend_on_later_ones_where_it_is_said(way):
    config = small(**way)
    params, x = parameters(config), tokens()
    others = [np.concatenate([x[:, :3], 3 * tokens(seed)[:, 3:]], 1) for seed in range(20, 24)]
    before = run(config, params, x)[0][:, :3]
    moved = max(float(jnp.abs(run(config, params, other)[0][:, :3] - before).max()) for other in others)
    assert (moved < 1e-5) == config.causal
    assert small(dispatch=Capacity(priority="position")).causal


# ── routers ──────────────────────────────────────────────────────────────────────────────────────────────────────────
def deepseek_v3(scores, bias, groups, active_groups, active, scale):
    """One token's weights by the rules of the paper, in loops."""
    biased, per_group = scores + bias, len(scores) // groups
    best = [np.sort(biased[g * per_group : (g + 1) * per_group])[-2:].sum() for g in range(groups)]
    open_groups = np.argsort(-np.array(best))[:active_groups]
    allowed = [e for e in range(len(scores)) if e // per_group in open_groups]
    chosen = sorted(allowed, key=lambda e: -biased[e])[:active]
    weights = np.zeros(len(scores))
    weights[chosen] = scores[chosen] / scores[chosen].sum() * scale
    return weights


@pytest.mark.parametrize("groups, active_groups, active", [(1, 1, 3), (4, 2, 3), (8, 3, 6), (16, 16, 4)])
def test_sigmoid_routing_is_deepseek_v3s(groups, active_groups, active):
    router = Sigmoid(groups=groups, active_groups=active_groups, scale=2.5, bias=True)
    logits, bias = normal(50, 32), normal(32, seed=1) / 4
    expert_TK, weight_TK = jax.jit(lambda logits, bias: router.choose(router.scores(logits), bias, active))(logits, bias)
    got = np.zeros((50, 32))
    np.put_along_axis(got, np.asarray(expert_TK), np.asarray(weight_TK), -1)
    expected = [deepseek_v3(special.expit(f64(row)), f64(bias), groups, active_groups, active, 2.5) for row in logits]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_softmax_weights_and_groups():
    logits = normal(50, 32)
    p = special.softmax(f64(logits), -1)
    chosen = np.argsort(-p, -1)[:, :3]
    scores = Softmax().scores(logits)
    raw, alone, limited = (
        router.choose(scores, None, 3)
        for router in (Softmax(renormalize=False, scale=2.0), Softmax(), Softmax(groups=8, active_groups=2))
    )
    np.testing.assert_array_equal(raw[0], chosen)
    np.testing.assert_allclose(raw[1], 2 * np.take_along_axis(p, chosen, -1), rtol=1e-5)
    np.testing.assert_allclose(alone[1], special.softmax(np.take_along_axis(f64(logits), chosen, -1), -1), rtol=1e-5)
    best = np.argsort(-p.reshape(50, 8, 4).max(-1), -1)[:, :2]
    assert all(set(experts // 4) <= set(groups) for experts, groups in zip(np.asarray(limited[0]), best, strict=True))


GOLDENS = {
    "mixtral": (Softmax(), 2, None),
    "qwen3_raw": (Softmax(renormalize=False), 3, None),
    "qwen3_renormalized": (Softmax(), 3, None),
    "deepseek_v2": (Softmax(renormalize=False, groups=4, active_groups=2, scale=1.5), 3, 2 * UNITS),
    "deepseek_v3": (Sigmoid(groups=4, active_groups=2, scale=2.5, bias=True), 3, 2 * UNITS),
}


@pytest.mark.parametrize("name", GOLDENS)
def test_blocks_of_transformers(name):
    router, active, shared = GOLDENS[name]
    config = small(router=router, active=active, dispatch=BLOCKS, shared=None if shared is None else Gated(units=shared))
    with np.load(GOLDEN / f"{name}.npz") as file:
        golden = dict(file)
    params = parameters(config)
    filled = jax.tree_util.tree_map_with_path(lambda path, _: golden["/".join(k.key for k in path)], params)
    assert len(jax.tree.leaves(params)) == len(golden) - len({"x", "y", "balance", "valid"})
    y, _ = run(config, filled, golden["x"])
    np.testing.assert_allclose(y, golden["y"], rtol=2e-5, atol=2e-5)
    if name == "mixtral":
        _, sown = run(config, filled, golden["x"], golden["valid"])
        np.testing.assert_allclose(sown["balance"].mean, golden["balance"], rtol=1e-5)


# ── losses, statistics, the bias ─────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("over", ["batch", "row"])
def test_the_balance_loss_is_its_formula(over):
    scores, expert, valid = special.expit(normal(24, 8)), np.random.default_rng(1).integers(0, 8, (24, 2)), valid_mask()
    load = np.array([[(row[ok] == e).sum() for e in range(8)] for row, ok in zip(expert.reshape(4, 6, 2), valid, strict=True)])
    share = (scores / scores.sum(-1, keepdims=True)).reshape(4, 6, 8)
    groups = [(load[b], share[b][valid[b]]) for b in range(3)]
    if over == "batch":
        groups = [(load.sum(0), share[valid])]
    expected = sum(len(p) * 8 * (chosen / len(p) * p.mean(0)).sum() for chosen, p in groups)
    got = balance_loss(scores.reshape(4, 6, 8), load.astype(np.float32), valid, over=over)
    np.testing.assert_allclose([got.total, got.weight], [expected, valid.sum()], rtol=1e-5)


def test_even_loads_have_the_least_balance_loss():
    even, load = np.ones((1, 16, 8), np.float32), np.full((1, 8), 4.0, np.float32)
    np.testing.assert_allclose(balance_loss(even, load, None).mean, 2)
    collapsed = np.eye(8, dtype=np.float32)[[0] * 16][None]
    np.testing.assert_allclose(balance_loss(collapsed, np.eye(8)[:1] * 16, None).mean, 8)


def test_the_z_loss_is_its_formula():
    logits, valid = 30 * normal(24, 8), valid_mask().reshape(-1)
    square = special.logsumexp(f64(logits), -1) ** 2
    for mask in (None, valid):
        got, chosen = z_loss(logits, mask), square if mask is None else square[valid]
        np.testing.assert_allclose([got.total, got.weight], [chosen.sum(), len(chosen)], rtol=1e-5)


def test_sums_of_micro_batches_are_those_of_the_batch():
    config = small(dispatch=Capacity(factor=1.0), balance_over="row")
    params, x, valid = parameters(config), tokens(), valid_mask()
    parts = [run(config, params, x[i : i + 2], valid[i : i + 2])[1] for i in (0, 2)]
    close(jax.tree.map(jnp.add, *parts), run(config, params, x, valid)[1])


ROWWISE = [
    (small(), False),
    (small(balance_over="row", router=ExpertChoice()), False),
    (small(balance=0.0, dispatch=Capacity(factor=1.0)), True),
    (small(balance_over="row", dispatch=Capacity(factor=1.0, over="batch")), False),
]


@pytest.mark.parametrize("config, rowwise", ROWWISE, ids=str)
def test_rows_mind_their_own_where_it_is_said(config, rowwise):
    assert config.rowwise == rowwise
    params, x = parameters(config), tokens(common=0.5)

    def apply(x):
        y, sown = run(config, params, x)
        return y, config.penalty(sown).total

    whole, parts = apply(x), [apply(x[i : i + 2]) for i in (0, 2)]
    apart = np.concatenate([y for y, _ in parts]), sum(loss for _, loss in parts)
    gap = max(float(jnp.abs(a - b).max()) for a, b in zip(whole, apart, strict=True))
    assert (gap < 1e-4) == rowwise


def test_the_penalty_weighs_the_losses_and_sums_layers():
    config = small(balance=0.5, z_loss=0.25)
    sown = {name: Weighted(jnp.array([8.0, 4.0]) * f, jnp.array([4.0, 4.0])) for name, f in (("balance", 1), ("z_loss", 10))}
    np.testing.assert_allclose(config.penalty(sown).mean, 0.5 * 3 + 0.25 * 30)
    np.testing.assert_allclose(config.penalty(jax.tree.map(lambda leaf: leaf[0], sown)).mean, 0.5 * 2 + 0.25 * 20)


def test_the_bias_moves_the_choice_alone_and_evens_loads():
    config = small(router=Sigmoid(bias=True, bias_rate=0.02))
    params, x = parameters(config), tokens()
    params["router"]["bias"] = np.zeros(EXPERTS, np.float32)
    apply = jax.jit(lambda params: Experts(config, 1.0, jnp.float32).apply({"params": params}, x, {}, mutable=["routing"]))
    grads = jax.jit(jax.grad(lambda params: jnp.square(apply(params)[0]).sum()))(params)
    np.testing.assert_array_equal(grads["router"]["bias"], 0)
    assert float(jnp.abs(grads["router"]["kernel"]).max()) > 0
    close(apply(params)[0], apply(params | {"router": params["router"] | {"bias": np.full(EXPERTS, 0.7, np.float32)}})[0])
    first = load = apply(params)[1]["routing"]["load"]
    for _ in range(100):
        params["router"]["bias"] = updated_bias(params["router"]["bias"], load, config.router.bias_rate)
        load = apply(params)[1]["routing"]["load"]
    assert first.min() == 0 and load.min() > 0 and load.std() < first.std() / 3


def test_the_bias_update_is_its_formula():
    got = updated_bias(jnp.zeros((2, 4)), jnp.array([[8.0, 0.0, 4.0, 4.0], [1.0, 1.0, 1.0, 1.0]]), 0.1)
    np.testing.assert_allclose(got, [[-0.1, 0.1, 0, 0], [0, 0, 0, 0]])


# ── gradients ────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("name", ["ragged", "capacity of rows", "expert choice", "sigmoid"])
def test_gradients_of_router_and_experts(name):
    config = small(**WAYS[name], shared=Gated(units=2), z_loss=0.1)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), parameters(config))
        x, valid = jnp.asarray(tokens()[:, :3], jnp.float64), valid_mask()[:, :3]
        bias = params["router"].pop("bias", None)  # which no gradient reaches

        def loss(params, x):
            router = params["router"] if bias is None else params["router"] | {"bias": bias}
            y, sown = Experts(config, 1.0, jnp.float64).apply(
                {"params": params | {"router": router}}, x, {}, valid, mutable=["routing"]
            )
            return jnp.sin(y).sum() + config.penalty(sown["routing"]).total

        assert jax.eval_shape(loss, params, x).dtype == jnp.float64
        check_grads(jax.jit(loss), (params, x), order=1, modes=["rev"], eps=1e-6)


@pytest.mark.parametrize("outputs", [(4,), (2,), (2, 4)], ids=str)
def test_products_of_groups_and_their_derivatives(outputs):
    sizes = np.array([3, 0, 40, 1, 13, 16])
    x, kernels = normal(73 + spare(16), 3), [normal(6, 3, width, seed=width) for width in outputs]
    gs = [normal(73, width, seed=9 + width) for width in outputs]
    parts = [slice(end - size, end) for end, size in zip(np.cumsum(sizes), sizes, strict=True)]
    ys = [np.concatenate([x[part] @ kernel[e] for e, part in enumerate(parts)]) for kernel in kernels]
    dx = np.concatenate([sum(g[part] @ w[e].T for g, w in zip(gs, kernels, strict=True)) for e, part in enumerate(parts)])
    dws = [np.stack([x[part].T @ g[part] for part in parts]) for g in gs]
    for block in (1, 3, 4, 16, None):

        def of(x, kernels, block=block):
            return [y[:73] for y in grouped_products(x, kernels, jnp.asarray(sizes), block=block)]

        got, back = jax.vjp(jax.jit(of), x, kernels)
        close(got, ys, 1e-5)
        dx_got, dws_got = back([jnp.asarray(g) for g in gs])
        close((dx_got[:73], dws_got), (dx, dws), 1e-5)


def test_products_of_equal_groups():
    x, kernels = normal(15, 3), [normal(5, 3, 4), normal(5, 3, 2)]
    expected = [np.concatenate([x[3 * e : 3 * e + 3] @ kernel[e] for e in range(5)]) for kernel in kernels]
    close(batched_products(x, kernels), expected, 1e-5)


def test_second_derivatives_of_blocks():
    x, kernels, sizes = normal(12, 3), normal(3, 3, 4, seed=1), jnp.array([3, 0, 5])

    def along(block):
        def loss(kernels):
            return jnp.sin(grouped_products(x, [kernels], sizes, block=block)[0][:8]).sum()

        return jax.jit(lambda k: jax.jvp(jax.grad(loss), (k,), (jnp.ones_like(k),))[1])(kernels)

    close(along(4), along(None), 1e-5)


def test_an_exchange_and_its_gradient():
    x, source, slots = normal(3, 2), jnp.array([2, 3, 0, 2]), jnp.array([[2, 4], [4, 4], [0, 3]])
    y, back = jax.vjp(lambda x: exchange(x, source, slots), x)
    np.testing.assert_array_equal(y, np.stack([x[2], 0 * x[0], x[0], x[2]]))
    np.testing.assert_array_equal(back(y)[0], np.stack([x[0], 0 * x[1], 2 * x[2]]))


# ── populations, meshes, scans, dtypes ───────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("way", [{"dispatch": BLOCKS}, {"dispatch": RAGGED}, {"router": ExpertChoice()}], ids=str)
def test_a_population_is_its_members(way):
    config = small(**way)
    both, x = [parameters(config, seed) for seed in (3, 30)], np.stack([tokens(1), tokens(5)])

    def value(params, x):
        y, sown = Experts(config, 1.0, jnp.float32).apply({"params": params}, x, {}, mutable=["routing"])
        return jnp.square(y).sum(), sown["routing"]

    differentiate = jax.jit(jax.value_and_grad(value, has_aux=True))
    got = jax.jit(jax.vmap(differentiate))(jax.tree.map(lambda *p: jnp.stack(p), *both), x)
    for i, params in enumerate(both):
        close(jax.tree.map(lambda leaf: leaf[i], got), differentiate(params, x[i]), 1e-3)


MESHES = [
    {"data": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": 1, "expert": 4},
    {"data": 1, "fsdp": 2, "expert": 2, "tensor": 2},
    {"data": 1, "sequence": 2, "expert": 2},
]


@pytest.mark.parametrize(
    "name, target", [("sigmoid", "cpu"), ("ragged", "tpu"), ("capacity of rows", "cpu"), ("expert choice", "cpu")]
)
def test_devices_together_compute_what_one_does(name, target, monkeypatch):
    monkeypatch.setattr(platform, "TPU", replace(platform.TPU, ragged_exchange=False))  # XLA:CPU has none
    config = small(**WAYS[name], shared=Gated(units=2))
    params, x, valid = parameters(config), tokens(), valid_mask()

    def value(params, x, valid):
        y, sown = Experts(config, 1.0, jnp.float32).apply({"params": params}, x, {}, valid, mutable=["routing"])
        return jnp.square(y).sum(), (y, sown["routing"])

    boxed = jax.eval_shape(lambda: Experts(config, 1.0, jnp.float32).init(jax.random.key(0), x, {}))["params"]
    with platform.targeting(target):
        expected = jax.jit(jax.value_and_grad(value, has_aux=True))(params, x, valid)
        for axes in MESHES:
            mesh = Mesh(**axes).build(jax.devices()[: math.prod(axes.values())])
            with jax.set_mesh(mesh):
                specs = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), parameter_specs(boxed, mesh))
                rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
                split = jax.device_put(params, specs), jax.device_put(x, rows), jax.device_put(valid, rows)
                got = jax.jit(jax.value_and_grad(lambda *given: value(*given), has_aux=True))(*split)
            close(got, expected, 1e-3)


def ragged_by_definition(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`jax.lax.ragged_all_to_all` as its documentation has it: everybody sees everything, and takes what is for him."""
    here = jax.lax.axis_index(axis_name)
    rows, starts, sizes, ends = (jax.lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets))
    place = jnp.arange(len(output))
    for source in range(len(rows)):
        rank = place - ends[source, here]
        inside = (rank >= 0) & (rank < sizes[source, here])
        taken = rows[source][(starts[source, here] + rank).clip(0, len(operand) - 1)]
        output = jnp.where(inside[:, None], taken, output)
    return output


@pytest.mark.parametrize("room", [None, 10.0], ids=str)
def test_messages_of_unequal_lengths_bring_what_equal_ones_do(room, monkeypatch):
    config = small(dispatch=Dropless(form="ragged", room=room))
    params, x = parameters(config), tokens()

    def slope(params, x):
        return jax.value_and_grad(lambda p: jnp.square(Experts(config, 1.0, jnp.float32).apply({"params": p}, x, {})).sum())(params)

    expected = jax.jit(slope)(params, x)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_definition)
    with platform.targeting("tpu"), jax.set_mesh(Mesh(data=1, expert=4).build()):
        close(jax.jit(lambda *given: slope(*given))(params, x), expected, 1e-3)


def test_what_a_device_has_no_room_for_is_left_out_and_counted():
    config = small(dispatch=Dropless(form="ragged", room=1.0), active=1)
    params, x = parameters(config), tokens()
    params["router"]["kernel"] = jnp.zeros_like(params["router"]["kernel"])  # all choose the first expert

    def routed(config):
        return Experts(config, 1.0, jnp.float32).apply({"params": params}, x, {}, mutable=["routing"])

    whole, _ = routed(config)
    with jax.set_mesh(Mesh(data=1, expert=4).build()):
        y, sown = jax.jit(lambda: routed(config))()
    dropped = sown["routing"]["dropped"]
    served = np.abs(y).sum(-1) > 0
    assert (served.sum(1) == LENGTH // 4).all(), "the first device has room for a quarter, of every device's tokens alike"
    assert dropped.weight == ROWS * LENGTH and dropped.total == (~served).sum()
    np.testing.assert_allclose(y[served], whole[served], atol=1e-5)


def test_trials_on_devices_of_their_own_share_rows_with_more():
    config, axes = small(dispatch=BLOCKS), jax.P("population")
    both, x = [parameters(config, seed) for seed in (3, 30)], np.stack([tokens(1), tokens(5)])

    @jax.jit
    def slope(params, x):
        return jax.grad(lambda p: jnp.square(Experts(config, 1.0, jnp.float32).apply({"params": p}, x, {})).sum())(params)

    mesh = Mesh(population=2, data=2, fsdp=2).build()
    with jax.set_mesh(mesh):
        trials = jax.shard_map(
            lambda *given: jax.lax.map(lambda one: slope(*one), given),
            mesh=mesh,
            in_specs=axes,
            out_specs=axes,
            axis_names={"population"},
            check_vma=False,
        )
        got = jax.jit(trials)(jax.tree.map(lambda *p: jnp.stack(p), *both), x)
    for i, params in enumerate(both):
        close(jax.tree.map(lambda leaf: leaf[i], got), slope(params, x[i]), 1e-3)


def test_each_device_sorts_its_own_rows():
    config = small(dispatch=RAGGED)
    params, x = parameters(config), tokens()
    with jax.set_mesh(Mesh(data=4).build(jax.devices()[:4])):
        lowered = jax.jit(lambda p, x: Experts(config, 1.0, jnp.float32).apply({"params": p}, x, {})).lower(params, x)
    assert f"tensor<{ROWS * LENGTH * 2 // 4}xi32>" in lowered.as_text() and "manual_axes" in lowered.as_text()


def test_the_platform_chooses_the_form():
    config = small()
    params, x = parameters(config), tokens()

    def text(target):
        with platform.targeting(target):
            return str(jax.make_jaxpr(lambda: Experts(config, 1.0, jnp.float32).apply({"params": params}, x, {}))())

    assert "ragged_dot" in text("tpu") and "ragged_dot" not in text("cpu") and "while" in text("cpu")


def test_statistics_of_scanned_and_recomputed_layers_are_stacked():
    config = small(dispatch=BLOCKS)

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + Experts(config, 1.0, jnp.float32, name="ffn")(x, {}), None

    stack = nn.scan(
        nn.remat(Layer, prevent_cse=False),
        variable_axes={"params": 0, "routing": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=2,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )()
    both, x = [parameters(config, seed) for seed in (3, 30)], tokens()
    params = {"ffn": jax.tree.map(lambda *p: jnp.stack(p), *both)}
    (got, _), sown = jax.jit(lambda p: stack.apply({"params": p}, x, None, mutable=["routing"]))(params)
    for layer, alone in enumerate(both):
        y, expected = run(config, alone, x)
        close(jax.tree.map(lambda leaf: leaf[layer], sown["routing"]["ffn"]), expected)
        x = x + y
    close(got, x)


def test_bfloat16_routes_in_float32():
    config = small(dispatch=BLOCKS)
    params, x = parameters(config), np.asarray(jnp.asarray(tokens(), jnp.bfloat16), np.float32)
    expected, wide = run(config, params, x)
    got, sown = run(config, params, jnp.asarray(x, jnp.bfloat16), dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(sown["load"], wide["load"])
    np.testing.assert_allclose(sown["z_loss"].total, wide["z_loss"].total, rtol=1e-5)
    assert np.abs(f64(got) - expected).max() < 0.03 * np.abs(expected).max()


def test_gradients_of_bfloat16_are_summed_in_float32():
    """128 blocks: sums of bfloat16 would be off by a percent."""
    x, g = (jnp.asarray(normal(4096 + spare(32), 8, seed=seed), jnp.bfloat16) for seed in (1, 2))
    kernels = jnp.asarray(normal(2, 8, 8, seed=3), jnp.bfloat16)
    sizes = jnp.array([4000, 96])
    _, back = jax.vjp(lambda x, kernels: grouped_products(x, [kernels], sizes, block=32)[0], x, kernels)
    got = f64(back(g)[1])
    for expert, rows in enumerate((slice(0, 4000), slice(4000, 4096))):
        expected = f64(x[rows]).T @ f64(g[rows])
        assert np.linalg.norm(got[expert] - expected) < 0.004 * np.linalg.norm(expected)


def test_devices_drop_hidden_units_as_one_does():
    config, x = small(dispatch=BLOCKS), tokens()
    params = parameters(config)

    def apply(params, x):
        return Experts(config, 1.0, jnp.float32).apply({"params": params}, x, {"ffn": 0.3}, rngs={"dropout": jax.random.key(0)})

    expected = jax.jit(apply)(params, x)
    with jax.set_mesh(Mesh(data=2).build(jax.devices()[:2])):
        close(jax.jit(lambda *given: apply(*given))(params, x), expected)


def test_dropout_of_hidden_units_keeps_the_mean():
    config = small(dispatch=Capacity(factor=4.0), expert=Dense(units=400))
    params, x = parameters(config), tokens()

    @jax.jit
    @partial(jax.vmap, in_axes=(0, None))
    def apply(key, rate):
        return Experts(config, 1.0, jnp.float32).apply({"params": params}, x, {"ffn": rate}, rngs={"dropout": key})

    expected, keys = run(config, params, x)[0], jax.random.split(jax.random.key(0), 200)
    close(apply(keys, 0.0)[0], expected)
    mean = apply(keys, 0.5).mean(0)
    assert 1e-4 < np.abs(mean - expected).mean() / np.abs(expected).mean() < 0.15


# ── configuration ────────────────────────────────────────────────────────────────────────────────────────────────────
NETWORKS: list[FeedForward] = [
    Dense(),
    Dense(units=7, bias=True),
    Gated(multiple=4),
    Gated(units=7, bias=True),
    NoFeedForward(),
    small(),
    small(active=3, shared=Dense(units=5, bias=True), expert=Gated(units=7, bias=True)),
    small(router=Sigmoid(bias=True), expert=Dense()),
]


@pytest.mark.parametrize("config", NETWORKS, ids=str)
def test_parameters_and_active_entries_are_those_of_the_tree(config):
    if isinstance(config, NoFeedForward):
        assert config.parameters(WIDTH) == config.entries(WIDTH) == 0
        return
    module = (Experts if isinstance(config, MoE) else MLP)(config, 1.0, jnp.float32)
    tree = unbox(jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 1, WIDTH)), {})["params"]))
    assert config.parameters(WIDTH) == sum(leaf.size for leaf in jax.tree.leaves(tree))

    def used(path, leaf):
        names = [k.key for k in path]
        share = config.active / config.experts if names[0] == "experts" else 1
        return leaf.size * share * (names[-1] == "kernel")

    assert config.entries(WIDTH) == sum(jax.tree.leaves(jax.tree_util.tree_map_with_path(used, tree)))


def test_units_override_the_ratio():
    assert Dense(ratio=3.0, units=5).hidden(8) == Gated(units=5, multiple=4).hidden(8) == 5
    assert small(shared=Dense(units=3), active=3).hidden(8) == 3 * UNITS + 3


def test_kernels_start_with_the_deviation_of_one_expert_and_their_axes():
    config = MoE(experts=16, expert=Gated(units=64, bias=True), router=Sigmoid(bias=True))
    boxed = jax.jit(lambda key: Experts(config, 0.5, jnp.float32).init(key, jnp.zeros((1, 1, 32)), {})["params"])(jax.random.key(0))
    names = jax.tree.map(lambda p: p.names, boxed, is_leaf=lambda p: isinstance(p, nn.LogicallyPartitioned))
    expert, router = names["experts"], names["router"]
    assert expert["gate"] == expert["up"] == {"kernel": ("expert", "embed", "hidden"), "bias": ("expert", "hidden")}
    assert expert["down"] == {"kernel": ("expert", "hidden", "embed"), "bias": ("expert", "embed")}
    assert router == {"kernel": ("embed", "expert"), "bias": ("expert",)}
    params = unbox(boxed)
    for kernel, deviation in (
        (params["experts"]["gate"]["kernel"], 1 / math.sqrt(32)),
        (params["experts"]["down"]["kernel"], 0.5 / math.sqrt(64)),
        (params["router"]["kernel"], 1 / math.sqrt(32)),
    ):
        assert abs(float(kernel.std()) / deviation - 1) < 0.1
    np.testing.assert_array_equal(params["router"]["bias"], 0)


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: MoE(experts=4, active=5), r"active must be at most experts=4, got 5"),
        (lambda: MoE(experts=0), r"experts must be > 0, got 0"),
        (lambda: MoE(balance=-1.0), r"balance must be >= 0, got -1.0"),
        (lambda: MoE(router=Sigmoid(groups=3)), r"router.groups must divide experts=8, got 3"),
        (
            lambda: MoE(router=Sigmoid(groups=8, active_groups=1)),
            r"active_groups leaves 1 experts to choose 2 from: raise it",
        ),
        (lambda: Softmax(groups=2, active_groups=3), r"active_groups must be at most groups=2, got 3"),
        (lambda: Sigmoid(bias_rate=-0.1), r"bias_rate must be >= 0, got -0.1"),
        (lambda: ExpertChoice(capacity=0.0), r"capacity must be > 0, got 0.0"),
        (lambda: MoE(router=ExpertChoice(), dispatch=Capacity()), r"dispatch has no say where experts choose their tokens"),
        (lambda: Capacity(factor=0.0), r"factor must be > 0, got 0.0"),
        (lambda: Dropless(block=0), r"block must be > 0, got 0"),
        (lambda: Dense(units=0), r"units must be > 0, got 0"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(make, sentence):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_a_mixture_is_set_from_a_shell_and_kept_as_json():
    config = override_text(MoE(), ["router=Sigmoid(groups=2)", "experts=16", "shared=Dense()", "dispatch=Capacity(factor=2)"])
    assert config == MoE(experts=16, router=Sigmoid(groups=2), shared=Dense(), dispatch=Capacity(factor=2))
    assert from_json(to_json(config), FeedForward) == config
    assert set(components(Router)) == {"Softmax", "Sigmoid", "ExpertChoice"}
