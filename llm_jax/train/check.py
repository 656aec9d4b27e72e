"""Checks of a model: its gradient is the derivative of its loss, it is causal where it says so, and all ways to compute it agree.

Everything is computed in float64 unless the check is about another dtype, so that a mistake stands out from rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core import platform
from llm_jax.core.config import ConfigError, require, substitute
from llm_jax.core.types import Batch
from llm_jax.data.tokenizers import nameless
from llm_jax.infer.forward import stretches
from llm_jax.models import count
from llm_jax.models.heads import LanguageModel, SequenceClassifier
from llm_jax.models.model import Model, initial_parameters, stack_layers
from llm_jax.models.predict import predict
from llm_jax.nn.dispatch import Dropless
from llm_jax.nn.dropout import Dropout
from llm_jax.nn.moe import MoE
from llm_jax.objectives.continuation import Continuation
from llm_jax.objectives.next_token import NextToken
from llm_jax.objectives.objective import Objective

Tree = Any
# A kink of ReLU or a changed choice of experts inside the larger step is no mistake, hence a second one. With directions of length
# 1 the larger step leaves about 1e-8 of the gradient's length, half of it rounding and half the third derivative.
STEPS = (1e-5, 1e-6)
DERIVATIVE, EQUAL = 1e-6, 1e-9  # tolerances: of finite differences, and of two ways to the same number
FLOOR = 1e-3  # a leaf's error counts relative to its gradient, or to this part of the whole gradient if that is more


@dataclass(frozen=True)
class Finding:
    """What one check measured. error: None where it does not apply. note: where the error is largest, or why there is none."""

    name: str
    error: float | None
    tolerance: float = 0.0
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return self.error is None or self.error <= self.tolerance


@dataclass(frozen=True)
class Subject:
    """What is checked: a model, what it is trained for (None: the mean square of what it says), and an example of its data.

    posed: the example as the objective has the model read it.
    """

    model: Model
    objective: Objective | None
    vocabulary: int
    batch: Batch
    posed: Batch
    params: Tree  # float64, every layer by itself
    key: jax.Array


# ── derivatives ──────────────────────────────────────────────────────────────────────────────────────────────────────
def compiled(function: Callable) -> Callable:
    """`jax.jit` for programs that run a few times: on a CPU, LLVM's optimisation takes longer than it saves."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0} if platform.name() == "cpu" else None)


def derivative_errors(function: Callable[[Tree], jax.Array], tree: Tree, seed: int = 0) -> dict[str, float]:
    """Leaf → error of a scalar function's gradient against central differences, relative to the gradient's length.

    Every leaf is moved by itself, along its gradient and a random direction, of length 1 each.
    """
    evaluate = compiled(jax.value_and_grad(function))
    grads = jax.tree.leaves(evaluate(tree)[1])
    leaves, shape = jax.tree.flatten(tree)
    floor = FLOOR * _length(grads)
    errors, rng = {}, np.random.default_rng(seed)
    for index, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree)):
        grad = np.asarray(grads[index])
        way = _unit(rng.normal(size=np.shape(leaf))) + _unit(grad)

        def value(step: float) -> float:
            moved = [leaf + step * way if i == index else other for i, other in enumerate(leaves)]
            return float(evaluate(jax.tree.unflatten(shape, moved))[0])

        slopes = [(value(step) - value(-step)) / (2 * step) for step in STEPS]
        wrong = min(abs(slope - float((grad * way).sum())) for slope in slopes)
        errors[name_of(path)] = wrong / max(_length([grad]), floor, np.finfo(float).tiny)
    return errors


def name_of(path: tuple) -> str:
    """A leaf's path as one would write it."""
    return "/".join(str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", key)))) for key in path)


def _length(leaves: list[Any]) -> float:
    return float(np.sqrt(sum(np.square(np.asarray(leaf, np.float64)).sum() for leaf in leaves)))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / max(_length([x]), np.finfo(float).tiny)


def _worst(errors: dict[str, float]) -> tuple[float, str]:
    name = max(errors, key=lambda leaf: errors[leaf] if np.isfinite(errors[leaf]) else np.inf)
    return errors[name], name


# ── the model's loss ─────────────────────────────────────────────────────────────────────────────────────────────────
def subject(
    model: Model, objective: Objective | None = None, *, vocabulary: int = 64, length: int = 16, rows: int = 2, seed: int = 0
) -> Subject:
    """A model with random tokens, the rows after the first in two documents, and parameters away from their symmetric start.

    objective: None is next-token prediction, or continuing a text, where the model can be trained for it. Raises `ConfigError`.
    """
    require(length >= 4, "length", f"must be at least 4, got {length}")
    require(vocabulary >= 2 * length, "vocabulary", f"must be at least twice length={length}, got {vocabulary}")
    keys = jax.random.split(jax.random.key(seed), 3)
    row_BL = jax.random.randint(keys[0], (rows, length + 1), 0, vocabulary)
    segments_BL = ((jnp.arange(length) >= length // 3)[None] & (jnp.arange(rows) > 0)[:, None]).astype(jnp.int32)
    places_BL = jnp.arange(length)[None] - segments_BL * (length // 3)
    batch = Batch(row_BL[:, :-1], row_BL[:, 1:], segments=segments_BL, positions=places_BL, inputs=row_BL[:, ::-1])
    objective = objective or _usual(model)
    tokens = nameless(vocabulary).with_specials(objective.specials if objective else ())
    posed = objective.pose(batch, jax.random.split(keys[2], rows), model=model, tokens=tokens) if objective else batch
    params = compiled(partial(initial_parameters, model.with_layers("unrolled"), tokens.vocabulary))(keys[1])
    params = jax.tree.map(partial(moved, np.random.default_rng(seed)), params)
    return Subject(model, objective, tokens.vocabulary, batch, posed, params, keys[2])


def moved(rng: np.random.Generator, leaf: jax.Array) -> np.ndarray:
    """Away from where things are symmetrical, or switched off, to where training leads."""
    start = np.asarray(leaf, np.float64)
    return start + 0.1 * (start.std() or 1.0) * rng.normal(size=start.shape)


def _usual(model: Model) -> Objective | None:
    for objective in (NextToken(), Continuation()):
        try:
            objective.check(model)
        except ConfigError:
            continue
        return objective
    return None


def variant(
    model: Model, *, layers: str = "scanned", remat: str = "none", compute: str = "float64", dropout: bool = False
) -> Model:
    """The same model computed another way. Unchecked: float64 is no precision that one would train in."""
    changes: dict[str, Any] = {"layers": layers, "remat": remat, "precision.compute": compute}
    changes |= {} if dropout else {"dropout": Dropout()}
    return substitute(model, {f"{path}.{k}" if path else k: v for path in model.stacks for k, v in changes.items()})


def loss(given: Subject, model: Model, params: Tree) -> jax.Array:
    """What the model is trained to lower, on the example, as a function of parameters with every layer by itself."""
    apply = partial(predict, model, given.vocabulary, train=True)
    params = stack_layers(params, model)
    if given.objective is not None:
        more = {"model": model, "rng": given.key, "byte_lengths": jnp.ones(given.vocabulary), "train": True}
        return given.objective.loss(apply, params, given.posed, **more)[0].mean
    said = apply(params, given.batch, given.key)
    square = jnp.square(said.logits).mean()
    return square if said.penalty is None else square + said.penalty.mean


def _slope(given: Subject, model: Model, dtype: str = "float64") -> dict[str, np.ndarray]:
    """The loss, and its gradient leaf by leaf."""
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), given.params)
    value, grads = compiled(jax.value_and_grad(partial(loss, given, model)))(params)
    leaves = jax.tree_util.tree_leaves_with_path(grads)
    return {"loss": np.asarray(value)} | {name_of(path): np.asarray(leaf) for path, leaf in leaves}


def _distances(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
    floor = max(FLOOR * _length(list(want.values())), np.finfo(float).tiny)
    return {name: _length([got[name] - leaf]) / max(_length([leaf]), floor) for name, leaf in want.items()}


# ── the checks ───────────────────────────────────────────────────────────────────────────────────────────────────────
def findings(given: Subject) -> Iterator[Finding]:
    """Every check, one after another."""
    with jax.enable_x64(True):
        want = _slope(given, variant(given.model))
    for check in (
        _counted,
        _derivative,
        partial(_equal, want=want, name="scanned = unrolled", layers="unrolled"),
        partial(_equal, want=want, name="recomputed = kept", remat="full"),
        _causal,
        _decoding,
        partial(_finite, want=want, compute="float32"),
        partial(_finite, want=want, compute="bfloat16"),
    ):
        with jax.enable_x64(True):
            found = check(given)
        yield found


def _equal(given: Subject, *, want: dict[str, np.ndarray], name: str, **changes: str) -> Finding:
    """The loss and gradient of the model computed another way, against those of scanned layers."""
    error, leaf = _worst(_distances(_slope(given, variant(given.model, **changes)), want))
    return Finding(name, error, EQUAL, leaf if error > 0 else "")


def _counted(given: Subject) -> Finding:
    size = sum(leaf.size for leaf in jax.tree.leaves(given.params))
    counted = count.parameters(given.model, given.vocabulary)
    return Finding("counted parameters = tree", abs(size - counted), 0, f"{size:,}")


def _derivative(given: Subject) -> Finding:
    model = variant(given.model, dropout=True)
    error, leaf = _worst(derivative_errors(partial(loss, given, model), given.params))
    return Finding("gradient = finite differences", error, DERIVATIVE, leaf)


def _finite(given: Subject, *, want: dict[str, np.ndarray], compute: str) -> Finding:
    """Also how far the gradient is from float64's, which no tolerance is set for: choices of experts may differ."""
    with jax.enable_x64(False):
        got = _slope(given, variant(given.model, compute=compute), "float32")
    bad = sum(int((~np.isfinite(leaf)).sum()) for leaf in got.values())
    leaf = next((name for name, leaf in got.items() if not np.isfinite(leaf).all()), "")
    far = _worst(_distances(got, want))[0]
    return Finding(f"finite in {compute}", float(bad), 0, leaf or f"at most {far:.1e} from float64")


def _causal(given: Subject) -> Finding:
    """What each token's logits owe to the embedding of each other: by gradient, and by what exchanging later tokens changes."""
    name = "no token sees a later one"
    if not given.model.causal:
        return Finding(name, None, 0, "the model says that tokens see later ones")
    model: Any = variant(replace(given.model, head=LanguageModel(tied=False)))  # a tied table would be seen from everywhere
    length = given.batch.tokens.shape[1]
    tokens_BL = jnp.arange(length)[None]
    start = given.params["embedding"]["embedding"]
    ways_DV = np.random.default_rng(0).normal(size=(model.final.width, given.vocabulary)) / model.final.width**0.5

    def says(table_VD: jax.Array, tokens_BL: jax.Array) -> jax.Array:
        table = dict(given.params["embedding"]) | {"embedding": table_VD}
        params = dict(given.params) | {"embedding": table, "head": {"words": {"kernel": ways_DV}}}
        first = (jnp.arange(length)[None] + length,) if model.encodes else ()
        logits_BLV = model.build(given.vocabulary).apply({"params": stack_layers(params, model)}, *first, tokens_BL)
        return jnp.square(logits_BLV[0]).sum(-1)

    seen_LM = np.linalg.norm(np.asarray(compiled(jax.jacrev(says))(start, tokens_BL))[:, :length], axis=-1)
    later_LM = np.triu(seen_LM, 1)
    half = length // 2
    others_BL = jnp.where(tokens_BL >= half, length - 1 - tokens_BL + half, tokens_BL)
    run = compiled(says)
    before, after = (np.asarray(run(start, tokens)) for tokens in (tokens_BL, others_BL))
    changed = np.abs(after - before)[:half].max() / np.abs(before).max()
    place, later = np.unravel_index(later_LM.argmax(), later_LM.shape)
    error = float(max(later_LM.max() / seen_LM.max(), changed))
    sees = f"token {place} sees token {later}" if later_LM.any() else f"tokens before {half} change with later ones"
    return Finding(name, error, EQUAL, sees if error > EQUAL else f"{length} × {length} tokens")


def _decoding(given: Subject) -> Finding:
    """A text's first half at once and then token by token, with what came before in the cache, against the whole at once."""
    name, model = "decoding by the cache = at once", variant(given.model)
    why = _no_decoding(given.model, given.batch.tokens.shape[1])
    if why:
        return Finding(name, None, 0, why)
    params, tokens_BL = jax.tree.map(jnp.asarray, stack_layers(given.params, model)), given.batch.tokens
    network = model.build(given.vocabulary)
    first, length = (given.batch.inputs,) if model.encodes else (), tokens_BL.shape[1]

    def part(cache: Tree, tokens: jax.Array, index: jax.Array) -> tuple[jax.Array, Tree]:
        given = {"params": params} | ({} if cache is None else {"cache": cache})
        out, kept = network.apply(given, *first, tokens, index_BL=index[None], slots=length, mutable=["cache"])
        return out, kept.get("cache", {})

    whole = compiled(lambda tokens: network.apply({"params": params}, *first, tokens))(tokens_BL)
    half, step = length // 2, compiled(part)
    out, cache = step(None, tokens_BL[:, :half], jnp.arange(half))
    outs = [out]
    for place in range(half, length):
        out, cache = step(cache, tokens_BL[:, place : place + 1], jnp.arange(place, place + 1))
        outs.append(out)
    wrong_BL = np.abs(jnp.concatenate(outs, 1) - whole).reshape(len(whole), length, -1).max(-1) / np.abs(whole).max()
    error, worst = float(wrong_BL.max()), int(wrong_BL.max(0).argmax())
    return Finding(name, error, EQUAL, f"token {worst}" if error > EQUAL else f"{length - half} of {length} tokens one by one")


def _no_decoding(model: Model, length: int) -> str:
    if not model.causal:
        return "the model says that tokens see later ones"
    if isinstance(model.head, SequenceClassifier):
        return "the head says one thing of a whole row"
    networks = [layer.ffn for layer in model.final.in_full]
    if any(isinstance(ffn, MoE) and not isinstance(ffn.dispatch, Dropless) for ffn in networks):
        return "what experts have room for depends on how many tokens come together"
    if stretches(model.final, length):
        return "how far a token is turned depends on how long its row is"
    return ""
