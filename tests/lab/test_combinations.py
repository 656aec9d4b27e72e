"""Every component is reached by `--set`, what is allowed trains, and what makes no sense is refused by a stated rule.

The factors of `combination_table` have about 10¹⁰ combinations. Of all pairs of their levels the configurations are built here, and
must be valid or refused by the rule that says so. Under `slow`, one training step is made of every variant by itself, of rows in
which every level occurs, and of rows in which every allowed pair occurs. Initialisation is only traced: parameters are random.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from itertools import combinations, product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llm_jax.core.config import Config, ConfigError, choices_of, field_types
from llm_jax.core.types import Batch
from llm_jax.core.written import override_text
from llm_jax.data.tokenizers import nameless
from llm_jax.lab import components as exported
from llm_jax.lab.experiment import Experiment
from llm_jax.models import count
from llm_jax.models.block import Layer
from llm_jax.models.model import Model, unstack_layers
from llm_jax.objectives.objective import Objective
from llm_jax.objectives.spans import Denoiser
from llm_jax.train.check import name_of
from llm_jax.train.pretrain import Teacher, trial
from tests.lab.combination_table import ALONE, FACTORS, LENGTH, REFUSED, ROWS, VOCABULARY, assignments, base, experiment, refusal
from tests.lab.covering import covering
from tests.quick import QUICK

LEVELS = list(FACTORS.values())
FIRST = [levels[0] for levels in LEVELS]


def levels_of(row: Iterable[int]) -> list[str]:
    return [levels[number] for levels, number in zip(LEVELS, row, strict=True)]


def first_but(*items: tuple[int, int]) -> list[str]:
    """The first level of each factor but for some, given as (factor, level)."""
    return [levels[dict(items).get(factor, 0)] for factor, levels in enumerate(LEVELS)]


@cache
def rows(strength: int) -> list[tuple[int, ...]]:
    """In which everything occurs that the rules allow."""
    return covering([len(levels) for levels in LEVELS], lambda pair: not refusal(*(LEVELS[f][n] for f, n in pair)), strength)


# ── one step ─────────────────────────────────────────────────────────────────────────────────────────────────────────
def batch() -> Batch:
    """Random tokens, in the second half of the rows of two documents."""
    ids = np.random.default_rng(0).integers(0, VOCABULARY, (1, ROWS, LENGTH + 1)).astype(np.int32)
    second = (np.arange(LENGTH) >= LENGTH - 2)[None] & (np.arange(ROWS) >= ROWS // 2)[:, None]
    return Batch(ids[..., :-1], ids[..., 1:], segments=second[None].astype(np.int32), inputs=ids[..., ::-1][..., :-1])


def step(levels: Iterable[str]) -> str:
    """What is wrong with one step of the experiment's own trial, or nothing."""
    given = experiment(levels)
    tokens = nameless(VOCABULARY).with_specials(given.objective.specials)
    teacher = Teacher(given.model, tokens.vocabulary) if given.objective.taught_by else None
    one = trial(given, tokens, teacher)
    shapes, rng = jax.eval_shape(one.init, {}), np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), leaf.dtype), shapes.params)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), (shapes.step, shapes.opt_state))
    state = replace(shapes, step=zeros[0], params=params, opt_state=zeros[1], key=jax.random.key(0, impl="unsafe_rbg"))
    taught = jax.tree.map(lambda leaf: -leaf, params) if teacher else None
    run = jax.jit(lambda state, data, taught: one.steps({}, state, data, taught), compiler_options=QUICK)
    after, metrics = run(state, batch(), taught)
    loss, leaves = metrics["train/loss"].mean, jax.tree.leaves(after.params)
    if not np.isfinite(loss) or not all(np.isfinite(leaf).all() for leaf in leaves):
        return f"the loss {loss} and all parameters should be finite"
    counted, size = count.parameters(given.model, tokens.vocabulary), sum(leaf.size for leaf in leaves)
    if counted != size:
        return f"it counts {counted} parameters and has {size}"
    (grads,) = (tree for kind in ("trace", "mu") if (tree := optax.tree.get(after.opt_state, kind)) is not None)
    found = jax.tree_util.tree_leaves_with_path(unstack_layers(jax.device_get(grads), given.model))
    sizes = {name_of(path): float(np.abs(leaf).max()) for path, leaf in found}
    still = [name for name, size in sizes.items() if size <= 1e-7 * max(sizes.values()) and not by_design(name, given)]
    return f"no gradient reaches {', '.join(still)}" if still else ""


def by_design(name: str, given: Experiment) -> bool:
    """Whether a parameter needs no gradient."""
    return (
        name.endswith("router/bias")  # moved by loads, not by the loss
        # the copies are equal before the first branch, whose norm undoes what their weights sum to
        or re.search(r"layers_0/residual_attention/read(_kernel)?$", name) is not None
        # the same for all keys, so the softmax undoes it
        or name.endswith("key/bias")
    )


def wrong(many: Iterable[Iterable[str]]) -> str:
    """Every row that fails, as one would run it."""
    found = []
    for levels in many:
        try:
            problem = step(levels)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem:
            found.append(" ".join(f"--set='{text}'" for text in assignments(levels)) + f"\n    {problem}")
    return "\n".join(found)


@pytest.mark.timeout(1800)
@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_what_stands_alone_trains(part):
    many = [[*FIRST, *variant] for variant in ALONE]
    assert not (found := wrong(many[part::2])), found


def test_every_level_is_in_some_pair():
    assert {number for row in rows(2) for number in row} == {number for row in rows(1) for number in row}


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(8))
def test_every_allowed_pair_trains(part):
    assert not (found := wrong(levels_of(row) for row in rows(2)[part::8])), found


# ── reached, and refused ─────────────────────────────────────────────────────────────────────────────────────────────
def classes(value) -> set[str]:
    """Of a configuration and all inside it."""
    if isinstance(value, tuple):
        return {name for item in value for name in classes(item)}
    if not isinstance(value, Config):
        return set()
    return {type(value).__name__}.union(*(classes(v) for v in vars(value).values()))


def reachable(annotation):
    """Name → class of all that a field of that type, and the fields of what it may hold, may be set to."""
    found = {}

    def visit(annotation):
        for name, kind in choices_of(annotation).items():
            if name not in found and kind.__module__.startswith("llm_jax."):
                found[name] = kind
                for inner in field_types(kind).values():
                    visit(inner)

    visit(annotation)
    return found


def test_every_component_can_be_imported_from_one_place():
    wanted = reachable(Model) | reachable(Objective) | {"Layer": Layer, "Denoiser": Denoiser}  # in tuples
    assert set(exported.__all__) == set(wanted)
    assert all(getattr(exported, name) is kind for name, kind in wanted.items())


def test_set_reaches_every_component():
    """Each is somewhere in the table, and where its text names it, it is in the experiment that comes out."""
    named = {"NextToken", "Continuation"}  # which `experiment` sets
    changes = [(first_but((f, n)), levels[n]) for f, levels in enumerate(LEVELS) for n in range(len(levels))]
    changes += [([*FIRST, *variant], " ".join(variant)) for variant in ALONE]
    for levels, text in changes:
        names = set(re.findall(r"([A-Z]\w+)\(", text))
        found = classes(experiment(levels))
        assert names <= found, f"{text}: {names - found} did not arrive"
        named |= names
    missing = set(exported.__all__) - named
    assert not missing, f"{sorted(missing)} can be chosen, but no row of combination_table trains with it: add one"


def test_every_pair_is_valid_or_refused_by_its_rule():
    wrongly = []
    for a, b in combinations(range(len(LEVELS)), 2):
        for left, right in product(range(len(LEVELS[a])), range(len(LEVELS[b]))):
            rule = refusal(LEVELS[a][left], LEVELS[b][right])
            try:
                experiment(first_but((a, left), (b, right)))
            except ConfigError as error:
                if rule is None or not re.search(rule.sentence, str(error)):
                    wrongly.append(f"{LEVELS[a][left]} with {LEVELS[b][right]} is refused: {error}")
            else:
                if rule is not None:
                    wrongly.append(f"{LEVELS[a][left]} with {LEVELS[b][right]} is valid, and a rule refuses it: {rule.sentence}")
    assert not wrongly, "\n".join(wrongly)


def test_every_rule_is_met():
    pairs = [refusal(left, right) for a, b in combinations(range(len(LEVELS)), 2) for left, right in product(LEVELS[a], LEVELS[b])]
    assert set(REFUSED) <= set(pairs), set(REFUSED) - set(pairs)


def test_pairs_that_no_rule_refuses_are_all_in_some_row():
    chosen = rows(2)
    for a, b in combinations(range(len(LEVELS)), 2):
        got = {(row[a], row[b]) for row in chosen}
        for left, right in product(range(len(LEVELS[a])), range(len(LEVELS[b]))):
            assert ((left, right) in got) == (refusal(LEVELS[a][left], LEVELS[b][right]) is None)
    assert len(chosen) < 100


SENTENCES = {
    ("@pattern=(Layer(attention=NoMixing(), position=Rope()), Layer())",): (
        r"model.pattern\[0\].position is Rope\(\), which works inside attention, and this layer has none: take NoPosition\(\)"
    ),
    ("@first=(Layer(position=Sinusoidal()),)",): (
        r"model.first\[0\].position is Sinusoidal\(\), which is added to the embeddings, before any layer: make it the position of"
    ),
    ("@first=(Layer(position=T5Bias()),)",): r"first\[0\].position is T5Bias\(\), whose parameters all layers share: make it the",
    ("@position=T5Bias()", "@first=(Layer(attention=Attention(heads=4)),)"): (
        r"model.position is T5Bias\(\), one bias for all layers, whose attention must then have equally many heads, got \[2, 4\]"
    ),
    ("@position=T5Bias()", "@pattern=(Layer(position=NoPosition()),)"): (
        r"model.position is T5Bias\(\), whose parameters no layer uses, since all have positions of their own: take NoPosition\(\)"
    ),
    ("@pattern=(Layer(), Layer(attention=NoMixing(), ffn=NoFeedForward()))",): r"pattern\[1\].ffn is NoFeedForward\(\) in a",
    ("model.embedding.rank=17",): r"model.embedding.rank must be at most width=16, got 17: take a smaller one, or None",
    (
        "model.embedding.rank=12",
        "model.mup=MuP(base_width=8)",
    ): (r"model.embedding.rank must be at most width=8, got 12: .* \(in the base model of mup.base_width=8\)"),
    ("@attention=MLA(heads=2, rope_dim=1)", "@position=Rope()"): r"model.position turns pairs of channels, but a head has only 1",
    ("@attention=Attention(heads=3)",): r"model.attention.heads must divide width=16 unless attention.head_dim is given, got 3",
    ("@attention=Attention(heads=2, kv_heads=4)",): r"model.attention.kv_heads must divide heads=2, got 4",
    ("@ffn=MoE(router=ExpertChoice(), dispatch=Capacity())",): r"model.ffn.dispatch has no say where experts choose their tokens",
    ("model=EncoderDecoder()", "model.cross=Attention(heads=3, mask=Bidirectional())"): (
        r"model.cross.heads must divide width=16 unless cross.head_dim is given, got 3"
    ),
    ("model=EncoderDecoder()", "model.cross.mask=Causal()"): r"model.cross.mask must be Bidirectional\(\)",
    ("model=EncoderDecoder()", "model.cross=none", "@attention=LSTM()"): (
        r"model.cross must be given where the decoder mixes by LSTM"
    ),
    ("objective=NextToken()", "@attention.mask=Bidirectional()"): r"model.attention lets a token see those it is to predict",
    ("objective=NextToken()", "@ffn=MoE(router=ExpertChoice())"): r"model.ffn lets a token see those it is to predict",
    ("objective=NextToken()", "@ffn=MoE(dispatch=Capacity())"): r"model.ffn lets a token see those it is to predict",
    ("objective=NextToken()", "model.head=Scalar()"): r"model.head must score token ids to predict the next one",
    ("objective=NextToken()", "@attention.mask=Prefix()"): r"model.attention.mask is Prefix\(\), and NextToken\(\) gives no prefix",
    ("objective=NextToken()", "model=EncoderDecoder()"): r"objective has no input for an encoder: take Continuation\(\)",
    ("objective=Continuation()", "@attention.mask=Bidirectional()"): r"model.attention lets a token see those it is to predict",
}


@pytest.mark.parametrize("levels", SENTENCES, ids=" ".join)
def test_what_makes_no_sense_is_a_sentence(levels):
    with pytest.raises(ConfigError, match=SENTENCES[levels]):
        override_text(base(), assignments([*FIRST, *levels]))


ALLOWED = [  # what a rule on pairs would refuse, and something else makes sensible
    ("@attention=LSTM()", "@position=Rope()", "@pattern=(Layer(), Layer(attention=Attention(heads=2)))"),
    ("@attention=NoMixing()", "@ffn=NoFeedForward()", "@pattern=(Layer(attention=LSTM()), Layer(ffn=Dense()))"),
    ("@ffn=NoFeedForward()", "@dropout.ffn=0.1", "@first=(Layer(ffn=Dense()),)"),
    ("@attention=LSTM()", "@position=T5Bias()", "@first=(Layer(attention=Attention(heads=4)),)"),
    ("@attention=MLA(heads=2)", "@position=T5Bias()", "@first=(Layer(attention=Attention(heads=2)),)"),
    ("@position=Sinusoidal()", "@first=(Layer(position=Rope()),)"),
    ("model=EncoderDecoder()", "model.decoder.attention=NoMixing()", "model.decoder.ffn=NoFeedForward()"),
    ("model=EncoderDecoder()", "model.decoder.attention=NoMixing()", "model.decoder.dropout.attention=0.1"),
]


@pytest.mark.parametrize("part", range(2))
def test_what_another_choice_makes_sensible_trains(part):
    assert not (found := wrong([*FIRST, *levels] for levels in ALLOWED[part::2])), found
