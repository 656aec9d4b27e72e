"""Generation: the prompts are read once, then one token after another with what earlier ones left in the cache.

    rows = generate(model, vocabulary, params, [[5, 3], [7]], max_new_tokens=20, key=jax.random.key(0))

A program is compiled for each shape: prompts are padded (`rows.rounded`), and both programs below are kept by `jax.jit`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.core.config import ConfigError
from llm_jax.infer import sampling as ways
from llm_jax.infer.forward import check_length, index, longest, segments
from llm_jax.infer.rows import Ids, Rows, pad, rounded, rounded_count
from llm_jax.infer.sampling import Greedy, Sampling
from llm_jax.models.block import Layer
from llm_jax.models.model import Model, Params
from llm_jax.models.stack import Stack
from llm_jax.nn.context import Memory
from llm_jax.nn.dispatch import Capacity, Dropless
from llm_jax.nn.moe import MoE

NOBODY = -1  # an end token that no token is
EVERY = 16  # tokens after which it is asked whether a row is to go on


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "logits", "length", "memory"], meta_fields=["slots"])
@dataclass(frozen=True)
class State:
    """Rows that can be continued, up to `slots` tokens each. logits `[B, V]`: of the next token; length `[B]`: tokens so far;
    memory: an encoder's output."""

    cache: Any
    logits: jax.Array
    length: jax.Array
    memory: Memory | None
    slots: int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Generated:
    """tokens `[B, N]`, of which each row's first `count` `[B]` are meant, an end token included; the model's log p of each, f32."""

    tokens: jax.Array
    log_p: jax.Array
    count: jax.Array


SCORES_NONE = "scores no text from left to right"


def check(model: Model, cannot: str = "cannot generate") -> None:
    """Raises `ConfigError` unless the model says what follows a text; cannot: what else it does not do."""
    if not model.head.words:
        raise ConfigError(f"is {type(model.head).__name__}, which scores no token ids: only LanguageModel() does", "model.head")
    if not model.causal:
        raise ConfigError(f"is not causal: each token sees later ones, which do not exist yet, so it {cannot}", "model")


def generate(
    model: Model,
    vocabulary: int,
    params: Params,
    prompts: Sequence[Ids],
    *,
    max_new_tokens: int,
    key: jax.Array,
    sampling: Sampling | None = None,
    end: Sequence[int] = (),
    inputs: Sequence[Ids] | None = None,
    numbers: Sequence[int] | None = None,
    width: int | None = None,
    halts: Callable[[int, np.ndarray], bool] | None = None,
    place: Callable[[Any], Any] = lambda tree: tree,
) -> Generated:
    """What follows each prompt, on the host; a row ends after one of the `end` tokens. Raises `ConfigError`.

    inputs: what an encoder reads for each row; the prompts then are how its output begins, at least a start token. numbers: of the
    rows (default: 0, 1, …); what is drawn for a row depends on `key` and its number alone. width: rows that the programs take
    (default: a power of two), so that a row's last bits do not depend on how many there are. halts: whether a row, by its place,
    need not go on after these tokens; asked every 16 of them. place: puts arrays `[B, …]` on devices, as `scoring.placing` has it.
    Experts with a capacity take every token that chose them here: what is full depends on what is computed together.
    """
    check(model)
    length, width = max(map(len, prompts)), width or rounded_count(len(prompts))
    if min(map(len, prompts)) == 0:
        raise ConfigError("is empty: give each at least one token to go on from", "prompt")
    if max_new_tokens < 1:
        raise ConfigError(f"must be >= 1, got {max_new_tokens}", "max_new_tokens")
    check_length(model.final, length + max_new_tokens, f"a prompt of {length} tokens with max_new_tokens={max_new_tokens}")
    model = roomy(model)
    memory = None
    if inputs is not None:
        encoder = model.stacks["encoder"]
        size = max(map(len, inputs))
        check_length(encoder, size, "an input")
        memory = encode(model, vocabulary, params, place(pad(inputs, rounded(size, longest(encoder)), width)))
    rows = place(pad(prompts, rounded(length, longest(model.final)), width))
    state = prefill(model, vocabulary, params, rows, memory, slots=rows.tokens.shape[1] + max_new_tokens)
    way, values = ways.split(sampling or Greedy())
    ends = np.asarray(list(end) or [NOBODY], np.int32)
    known = range(len(prompts)) if numbers is None else numbers
    keys_B = place(jax.vmap(partial(jax.random.fold_in, key))(np.array([*known] + [0] * (width - len(prompts)), np.uint32)))
    call = partial(extend, model, vocabulary, params, key_B=keys_B, values=values, end_E=ends, sampling=way)
    if halts is None:
        found, _ = call(state, steps=max_new_tokens)
        return jax.tree.map(lambda x: np.asarray(x)[: len(prompts)], found)
    return _halting(call, state, len(prompts), max_new_tokens, lambda row, ids: ids[-1] in ends or halts(row, ids), place)


def _halting(
    call: Callable[..., tuple[Generated, State]],
    state: State,
    rows: int,
    most: int,
    halts: Callable[[int, np.ndarray], bool],
    place: Callable[[Any], Any],
) -> Generated:
    """What `call` adds to the first `rows` rows, a few tokens at a time, until all of them halt or have `most`."""
    parts: list[Generated] = []
    for since in range(0, most, EVERY):
        part, state = call(state, since=since, steps=min(EVERY, most - since))
        parts.append(jax.tree.map(lambda x: np.asarray(x)[:rows], part))
        found = _joined(parts)
        told = [ids[:count] for ids, count in zip(found.tokens, found.count, strict=True)]
        done = [since + EVERY > len(ids) or halts(row, ids) for row, ids in enumerate(told)]
        if all(done):
            break
        done_B = np.array(done + [True] * (len(state.length) - rows))
        state = replace(state, length=jnp.where(place(done_B), 0, state.length))  # as of rows that there are not
    return found


def _joined(parts: Sequence[Generated]) -> Generated:
    """One after another: a row that ended has no tokens in later ones."""
    tokens, log_p = (np.concatenate([getattr(part, name) for part in parts], 1) for name in ("tokens", "log_p"))
    return Generated(tokens, log_p, sum(part.count for part in parts))  # type: ignore[arg-type]


@partial(jax.jit, static_argnames=("model", "vocabulary"))
def encode(model: Model, vocabulary: int, params: Params, rows: Rows) -> Memory:
    """An encoder's output."""
    return model.build(vocabulary).apply({"params": params}, rows.tokens, segments_BM=segments(rows), method="encode")


@partial(jax.jit, static_argnames=("model", "vocabulary", "slots"))
def prefill(model: Model, vocabulary: int, params: Params, rows: Rows, memory: Memory | None = None, *, slots: int) -> State:
    """The prompts through the whole network at once, with a cache of `slots` places. A `Prefix` mask takes them as the prefix."""
    given: dict[str, Any] = {"segments_BL": segments(rows), "index_BL": index(model.final, rows)}
    if model.prefix_mask and memory is None:
        given["prefix_BL"] = rows.real
    said, cache = _call(model, vocabulary, params, {}, memory, rows.tokens, slots=slots, **given)
    last_B11 = jnp.maximum(rows.length - 1, 0)[:, None, None]
    return State(cache, jnp.take_along_axis(said, last_B11, 1)[:, 0], rows.length, memory, slots)


@partial(jax.jit, static_argnames=("model", "vocabulary", "sampling", "steps"), donate_argnames="state")
def extend(
    model: Model,
    vocabulary: int,
    params: Params,
    state: State,
    key_B: jax.Array,
    values: dict[str, Any],
    end_E: jax.Array,
    *,
    sampling: Sampling,
    steps: int,
    since: jax.Array | int = 0,
) -> tuple[Generated, State]:
    """Up to `steps` more tokens, in the cache's own memory; `sampling` with its `values`, as `sampling.split` gives them.

    since: tokens that were added before, which decide what is drawn.
    Every row's last token has been through the network too, so that the state can be extended again, while it has slots.
    """
    method, rows = ways.join(sampling, values), len(state.length)

    def choose(logits_V: jax.Array, key: jax.Array, step: jax.Array) -> jax.Array:
        return method(logits_V[None], jax.random.fold_in(key, step))[0]

    def unfinished(carry) -> jax.Array:
        step, _, _, done_B = carry
        return (step < steps) & ~done_B.all()

    def one(carry):
        step, state, found, done_B = carry
        token_B = jnp.where(done_B, 0, jax.vmap(choose, (0, 0, None))(state.logits, key_B, since + step))
        log_p_B = jnp.take_along_axis(jax.nn.log_softmax(state.logits.astype(jnp.float32)), token_B[:, None], -1)[:, 0]
        found = Generated(
            found.tokens.at[:, step].set(token_B), found.log_p.at[:, step].set(jnp.where(done_B, 0, log_p_B)), found.count + ~done_B
        )
        # a row that is done passes over what is computed for it: its state stays what it was
        given = {"segments_BL": jnp.where(done_B, -1, 0)[:, None], "index_BL": state.length[:, None]}
        if model.prefix_mask and state.memory is None:
            given["prefix_BL"] = jnp.zeros((rows, 1), bool)
        said, cache = _call(model, vocabulary, params, state.cache, state.memory, token_B[:, None], slots=state.slots, **given)
        logits_BV = jnp.where(done_B[:, None], state.logits, said[:, 0])
        state = replace(state, cache=cache, logits=logits_BV, length=state.length + ~done_B)
        return step + 1, state, found, done_B | (token_B[:, None] == end_E[None]).any(-1)

    empty = Generated(jnp.zeros((rows, steps), jnp.int32), jnp.zeros((rows, steps)), jnp.zeros(rows, jnp.int32))
    _, state, found, _ = jax.lax.while_loop(unfinished, one, (jnp.int32(0), state, empty, state.length == 0))
    return found, state


def _call(model: Model, vocabulary: int, params: Params, cache: Any, memory: Memory | None, tokens_BL, **given) -> tuple[Any, Any]:
    """Logits `[B, L, V]` and the cache after them."""
    variables = {"params": params} | ({"cache": cache} if cache else {})
    network, how = model.build(vocabulary), {"mutable": ["cache"]}
    if memory is None:
        said, left = network.apply(variables, tokens_BL, **given, **how)
    else:
        said, left = network.apply(variables, memory, tokens_BL, **given, **how, method="decode")
    return said, left.get("cache", {})


def roomy(model: Model) -> Model:
    """The model with experts that take every token that chose them: what is full depends on what is computed together."""

    def ffn(part: Any) -> Any:
        return replace(part, dispatch=Dropless()) if isinstance(part, MoE) and isinstance(part.dispatch, Capacity) else part

    def layer(part: Layer) -> Layer:
        return replace(part, ffn=ffn(part.ffn))

    def stack(part: Stack) -> Stack:
        return replace(part, ffn=ffn(part.ffn), first=tuple(map(layer, part.first)), pattern=tuple(map(layer, part.pattern)))

    if model.encodes:
        return replace(model, **{name: stack(part) for name, part in model.stacks.items()})
    return stack(model)  # type: ignore[arg-type,return-value]
