"""Every optimizer, step by step, and every schedule, against the papers' formulas in float64 NumPy."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.config import components
from llm_jax.optim.optimizers import (
    SGD,
    SOAP,
    Adafactor,
    Adam,
    AdamW,
    Lion,
    Momentum,
    Muon,
    Optimizer,
    ScheduleFreeAdamW,
    Sophia,
)
from llm_jax.optim.schedules import WSD, Constant, Cosine, Linear, Rsqrt, Schedule
from llm_jax.optim.second_order import TIES
from tests.optim import problems

STEPS = 12


# ── the problem ──────────────────────────────────────────────────────────────────────────────────────────────────────
@dataclass
class Leaf:
    """A parameter as a matrix `[inputs, outputs]`, a vector as a column, with what its optimizer remembers of it."""

    name: str
    p: np.ndarray
    m: Any = 0.0
    v: Any = 0.0
    sides: list = field(default_factory=lambda: [0.0, 0.0])  # statistics of rows and of columns
    bases: list = field(default_factory=list)
    z: Any = None
    x: Any = None
    weight: float = 0.0

    @property
    def is_vector(self):
        return self.name.endswith(("scale", "bias"))

    @property
    def is_matrix(self):
        return self.name.endswith("kernel") and self.name != "head/words/kernel"


def name_of(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def as_matrix(name: str, x) -> np.ndarray:
    inputs = 2 if name.endswith("output/kernel") else 1
    return np.asarray(x, np.float64).reshape(math.prod(x.shape[:inputs]), -1)


def matrices(tree) -> dict[str, np.ndarray]:
    return {name_of(path): as_matrix(name_of(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def factor(step):
    return (step + 1) / STEPS


def start() -> dict:
    """Kernels of 8 × 8 (with heads), 8 × 12 and 12 × 8, tables of 6 × 8 and 8 × 6, scales, a bias, and one that is 0 at first."""
    params = problems.tree(hidden=12)
    params["layers_0"]["ffn"]["up"]["bias"] = jnp.zeros(12)
    return params


def with_distinct_singular_values(path, g):
    left, _, right = np.linalg.svd(as_matrix(name_of(path), g), full_matrices=False)
    return jnp.asarray((left * 3 * np.sqrt(np.arange(1, len(right) + 1)) @ right).reshape(g.shape), jnp.float32)


def gradients() -> Iterator[dict]:
    """Normally distributed ones. The first has singular values far apart, and with them SOAP an eigenbasis that is well defined;
    the others do not resemble it, which would leave entries that are 0 in that basis, and of undecided sign after Adam."""
    yield jax.tree_util.tree_map_with_path(with_distinct_singular_values, problems.tree(100, hidden=12))
    for step in range(1, STEPS):
        yield problems.tree(100 + step, hidden=12)


# ── the formulas: a gradient g at step t = 1, 2, … to an update at learning rate 1 ───────────────────────────────────
def sgd(o, leaf, g, t):
    return g


def momentum(o, leaf, g, t):
    leaf.m = o.momentum * leaf.m + g
    return g + o.momentum * leaf.m if o.nesterov else leaf.m


def adam(o, leaf, g, t):
    leaf.m = o.b1 * leaf.m + (1 - o.b1) * g
    return leaf.m / (1 - o.b1**t) / denominator(o, leaf, g, t)


def adam_without_momentum(o, leaf, g, t):
    return g / denominator(o, leaf, g, t)


def denominator(o, leaf, g, t):
    leaf.v = o.b2 * leaf.v + (1 - o.b2) * g**2
    return np.sqrt(leaf.v / (1 - o.b2**t)) + getattr(o, "epsilon", 1e-8)


def adafactor(o, leaf, g, t):
    def mean(old, new):
        decay = 1 - t**-o.decay_exponent
        return decay * old + (1 - decay) * new

    if min(g.shape) >= o.smallest:
        sums = [(g**2 + 1e-30).sum(axis, keepdims=True) for axis in (1, 0)]
        rows, columns = leaf.sides = [mean(old, new) for old, new in zip(leaf.sides, sums, strict=True)]
        leaf.v = rows @ columns / rows.sum()
    else:
        leaf.v = mean(leaf.v, g**2 + 1e-30)
    u = g / np.sqrt(leaf.v)
    u = u / max(1, rms(u) / o.clip)
    return max(1e-3, rms(leaf.p)) * u if o.relative else u


def rms(x):
    return np.sqrt(np.mean(x**2))


def lion(o, leaf, g, t):
    u = np.sign(o.b1 * leaf.m + (1 - o.b1) * g)
    leaf.m = o.b2 * leaf.m + (1 - o.b2) * g
    return u


def sophia(o, leaf, g, t, *, late=True):
    """late: a new estimate of the Hessian serves from the next step on, as in the authors' code; in their algorithm 3 at once."""
    leaf.m = o.b1 * leaf.m + (1 - o.b1) * g
    h = leaf.v
    if (t - 1) % o.interval == 0:
        leaf.v = o.b2 * leaf.v + (1 - o.b2) * np.linspace(0.5, 2.0, g.size).reshape(g.shape)  # `problems.quadratic`'s
    h = h if late else leaf.v
    return np.clip(leaf.m / (1 - o.b1**t) / np.maximum(o.gamma * h, o.epsilon), -1, 1)


def muon(o, leaf, g, t):
    if not leaf.is_matrix:
        return adam(o, leaf, g, t)
    leaf.m = o.momentum * leaf.m + (1 - o.momentum) * g
    left, s, right = np.linalg.svd(o.momentum * leaf.m + (1 - o.momentum) * g, full_matrices=False)
    s = s / np.linalg.norm(s)
    for _ in range(o.iterations):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return o.size * np.sqrt(max(g.shape)) * (left * s) @ right


def soap(o, leaf, g, t):
    if not leaf.is_matrix:
        return adam(o, leaf, g, t)
    u = np.zeros_like(g)
    if t > 1:
        left, right = leaf.bases
        leaf.m = o.b1 * leaf.m + (1 - o.b1) * g
        leaf.v = o.b2 * leaf.v + (1 - o.b2) * (left.T @ g @ right) ** 2
        turned = left.T @ leaf.m @ right / (1 - o.b1 ** (t - 1))
        u = left @ (turned / (np.sqrt(leaf.v / (1 - o.b2 ** (t - 1))) + 1e-8)) @ right.T
    leaf.sides = [o.b2 * old + (1 - o.b2) * new for old, new in zip(leaf.sides, (g @ g.T, g.T @ g), strict=True)]
    if t == 1:
        leaf.bases = [np.linalg.eigh(definite(c))[1] if len(c) <= o.largest else np.eye(len(c)) for c in leaf.sides]
    elif (t - 1) % o.frequency == 0:
        turn(o, leaf)
    return u


def definite(covariance):
    n = len(covariance)
    return covariance + TIES * np.trace(covariance) / n * np.diag(np.linspace(1, 2, n))


def turn(o, leaf):
    for side, (covariance, basis) in enumerate(zip(leaf.sides, leaf.bases, strict=True)):
        if len(covariance) <= o.largest:
            power = definite(covariance) @ basis
            order = np.argsort(-np.sum(basis * power, axis=0))
            leaf.bases[side] = np.linalg.qr(power[:, order])[0]
            leaf.v = np.take(leaf.v, order, axis=side)


def descend(o, leaf, rate, u):
    leaf.x = leaf.p - rate * u
    return leaf.x


def average(o, leaf, rate, u):
    """The parameters are y, where gradients are taken; z descends and x is its average, weighted by the squared rates."""
    z, x = (leaf.p, leaf.p) if leaf.z is None else (leaf.z, leaf.x)
    leaf.weight += rate**2
    leaf.z = z - rate * u
    leaf.x = x + rate**2 / leaf.weight * (leaf.z - x)
    return (1 - o.b1) * leaf.z + o.b1 * leaf.x


# ── the comparison ───────────────────────────────────────────────────────────────────────────────────────────────────
# Relative to a leaf's largest entry; measured are at most 3e-6, 2e-6 and 4e-6.
EXACT = 1e-5  # float32, in which 1 - b2^t has lost two digits at the first steps
ITERATED = 2e-5  # Newton–Schulz stretches rounding errors along small singular values, by up to 3.4445^5 = 485
# SOAP's first eigenvalues are an 8th of the largest apart, so eigenvectors err by 8 roundings or 5e-7; Adam divides them by entries
# of the turned gradients that may be 100 times smaller than usual. Where bases are turned, the directions' order is certain: their
# eigenvalue estimates differ by 4e-4 of the largest.
TURNED = 5e-5
SOPHIA = Sophia(learning_rate=0.1, b2=0.5, gamma=0.5, interval=3)
ROWS = {
    "sgd": (SGD(learning_rate=0.3), sgd, EXACT),
    "momentum": (Momentum(learning_rate=0.1), momentum, EXACT),
    "nesterov": (Momentum(learning_rate=0.1, nesterov=True), momentum, EXACT),
    "adam": (Adam(learning_rate=0.1, epsilon=0.1), adam, EXACT),
    "adamw": (AdamW(learning_rate=0.1, epsilon=0.1), adam, EXACT),
    "adafactor": (Adafactor(learning_rate=0.1, weight_decay=0.1, clip=0.8, smallest=8), adafactor, EXACT),
    "adafactor-absolute": (Adafactor(learning_rate=0.1, relative=False, smallest=8), adafactor, EXACT),
    "lion": (Lion(learning_rate=0.1), lion, EXACT),
    "muon": (Muon(learning_rate=0.1), muon, ITERATED),
    "soap": (SOAP(learning_rate=0.1, frequency=3, largest=8), soap, TURNED),
    "sophia": (SOPHIA, sophia, EXACT),
    "schedule-free": (ScheduleFreeAdamW(learning_rate=1.0, epsilon=0.1), adam_without_momentum, EXACT),
}
DEVIATIONS = {
    "sophia-published": (SOPHIA, partial(sophia, late=False), EXACT, "optax uses an estimate of the Hessian from the next step on"),
}


def close(actual, expected: dict, tolerance: float):
    """Errors are relative to the largest entry of each leaf."""
    for name, value in matrices(actual).items():
        bound = tolerance * np.abs(expected[name]).max()
        np.testing.assert_allclose(value, expected[name], rtol=0, atol=bound, err_msg=name)


@pytest.mark.parametrize(
    "optimizer, formula, tolerance",
    [pytest.param(*row, id=name) for name, row in ROWS.items()]
    + [
        pytest.param(*row, id=name, marks=pytest.mark.xfail(raises=AssertionError, reason=reason))
        for name, (*row, reason) in DEVIATIONS.items()
    ],
)
def test_every_step_equals_the_formula(optimizer, formula, tolerance):
    params = start()
    rule = problems.built(optimizer, params, factor)
    extra = {"value": 0.0, "loss_fn": problems.quadratic, "key": jax.random.key(0)}
    update = jax.jit(lambda g, state, p: rule.update(g, state, p, **extra))
    state, leaves = rule.init(params), {name: Leaf(name, p) for name, p in matrices(params).items()}
    follow = average if isinstance(optimizer, ScheduleFreeAdamW) else descend
    for t, grads in enumerate(gradients(), start=1):
        updates, state = update(grads, state, params)
        params = jax.tree.map(jnp.add, params, updates)
        before = {name: leaf.p for name, leaf in leaves.items()}
        for name, g in matrices(grads).items():
            leaf = leaves[name]
            u = formula(optimizer, leaf, g, t) + (0 if leaf.is_vector else optimizer.weight_decay) * leaf.p
            leaf.p = follow(optimizer, leaf, optimizer.learning_rate * factor(t - 1), u)
        close(updates, {name: leaf.p - before[name] for name, leaf in leaves.items()}, tolerance)
        close(optimizer.evaluation_params(state, params), {name: leaf.x for name, leaf in leaves.items()}, tolerance)


def test_every_optimizer_has_a_formula():
    assert {type(optimizer) for optimizer, *_ in ROWS.values()} == set(components(Optimizer).values())


# ── schedules ────────────────────────────────────────────────────────────────────────────────────────────────────────
TOTAL = 32
every_warmup = pytest.mark.parametrize("warmup, warm", [(0.0, 0), (0.125, 4), (1.0, 1), (6.0, 6)])  # as configured, and in steps


def factors(schedule: Schedule, steps):
    return jax.jit(jax.vmap(lambda step: schedule(step, TOTAL)))(steps)


def half_cosine(t):
    return np.cos(np.pi * t / 2) ** 2


def fallen(progress):
    return np.interp(progress, [0.7, 1], [0, 1])


CLOSED_FORMS = {
    "constant": (Constant(), np.ones_like),
    "cosine": (Cosine(final=0.1), lambda t: 0.1 + 0.9 * half_cosine(t)),
    "linear": (Linear(final=0.2), lambda t: 1 - 0.8 * t),
    "linear-to-zero": (Linear(), lambda t: 1 - t),
    "wsd-linear": (WSD(decay=0.3, final=0.1, shape="linear"), lambda t: np.interp(t, [0.7, 1], [1, 0.1])),
    "wsd-sqrt": (WSD(decay=0.3, final=0.1, shape="sqrt"), lambda t: 1 - 0.9 * np.sqrt(fallen(t))),
    "wsd-cosine": (WSD(decay=0.3, final=0.1, shape="cosine"), lambda t: 0.1 + 0.9 * half_cosine(fallen(t))),
}


@every_warmup
@pytest.mark.parametrize("schedule, form", CLOSED_FORMS.values(), ids=CLOSED_FORMS.keys())
def test_schedules_equal_their_closed_forms(schedule, form, warmup, warm):
    steps = np.arange(TOTAL + 4)  # some after the end
    ramp = [(step + 1) / warm if step < warm else 1 for step in steps]
    progress = np.interp(steps, [warm, TOTAL], [0, 1])
    np.testing.assert_allclose(factors(replace(schedule, warmup=warmup), steps), ramp * form(progress), rtol=1e-6, atol=1e-6)


@every_warmup
def test_rsqrt_is_the_schedule_of_the_transformer(warmup, warm):
    steps, warm = np.arange(1, TOTAL + 5), max(warm, 1)
    published = np.minimum(steps**-0.5, steps * warm**-1.5)
    np.testing.assert_allclose(factors(Rsqrt(warmup=warmup), steps - 1), published * warm**0.5, rtol=1e-6)


def test_every_schedule_has_a_closed_form():
    assert {type(schedule) for schedule, _ in CLOSED_FORMS.values()} | {Rsqrt} == set(components(Schedule).values())
