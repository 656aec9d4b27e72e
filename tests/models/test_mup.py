"""µP: the base model is untouched, rates are base fan in / fan in, and steps move activations alike at every width."""

import jax
import numpy as np
import pytest

from llm_jax.core.config import ConfigError, override
from llm_jax.lab import presets
from llm_jax.lab.components import Attention, Decoder, Embed, Gated, LanguageModel, Scalar, SequenceClassifier, TokenClassifier
from llm_jax.lab.coordinates import coordinate_check, growth
from llm_jax.models.model import initial_parameters
from llm_jax.models.mup import MuP
from llm_jax.optim.optimizers import Adam, Momentum, Muon

MU = MuP(base_width=16)
TOKENS = np.arange(12, dtype=np.int32).reshape(2, 6)


def model(width=32, mup=MU, **changes):
    return override(Decoder(width=width, depth=2, attention=Attention(heads=2), ffn=Gated(), mup=mup), changes)


def logits(model, params):
    return model.build(16).apply({"params": params}, TOKENS)


def test_the_base_model_is_left_as_it_is():
    plain, scaled = model(16, None), model(16)
    params = initial_parameters(plain, 16, jax.random.key(0))
    np.testing.assert_allclose(logits(scaled, params), logits(plain, params), rtol=1e-6)
    assert set(jax.tree.leaves(scaled.rates(16))) == {1.0}


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
def test_rates_are_fan_in_over_the_bases(layers):
    rates = model(64, layers=layers, **{"head.tied": False}).rates(16)
    layer = rates["layers"]["step_0"] if layers == "scanned" else rates["layers_0"]
    assert layer["attention"]["query"]["kernel"] == layer["attention"]["output"]["kernel"] == 16 / 64
    assert layer["ffn"]["down"]["kernel"] == pytest.approx(model(16).ffn.hidden(16) / model(64).ffn.hidden(64))
    assert layer["norm_ffn"]["scale"] == rates["head"]["words"]["kernel"] == 1.0
    assert rates["embedding"]["embedding"] == 0.5, "a table stored divided by √width learns by √(base width / width)"


def test_scores_and_logits_are_scaled():
    wide = model(64, **{"head.tied": False, "embedding": Embed(scaled=False)})
    found = wide.mup.parametrized(wide)
    assert found.attention.scale == pytest.approx(np.sqrt(8) / 32) and found.head == LanguageModel(
        tied=False, multiplier=16 / 64, gain=2.0
    )
    more_heads = override(wide, {"mup": MuP(base_width=16, base_heads=2), "attention": Attention(heads=8)})
    assert more_heads.mup.parametrized(more_heads).attention.scale == pytest.approx(1 / np.sqrt(8)), "heads as wide as the base's"
    assert more_heads.mup.parametrized(more_heads).head == LanguageModel(tied=False, multiplier=0.25, gain=2.0)


@pytest.mark.parametrize(
    "head", [SequenceClassifier(), TokenClassifier(bias=False), Scalar(bias=True)], ids=lambda h: type(h).__name__
)
def test_other_heads_are_drawn_and_learn_so_that_a_step_moves_their_output_alike(head):
    """Their matrix moved by its rate along what it reads, as Adam's first step does."""

    def step(width):
        """How far it moves the last token's output, the matrix's first deviation, its rate."""
        wide = model(width, head=head)
        params = initial_parameters(wide, 16, jax.random.key(0))
        ((name, linear),) = params["head"].items()
        rates = wide.rates(16)["head"][name]
        assert rates.get("bias", 1.0) == 1.0
        _, sown = wide.build(16).apply({"params": params}, TOKENS, mutable=["intermediates"])
        read_D = np.sign(sown["intermediates"]["hidden"][0][0, -1])
        moved = params | {"head": {name: linear | {"kernel": linear["kernel"] + rates["kernel"] * read_D[:, None]}}}
        change = np.asarray(logits(wide, moved) - logits(wide, params))
        last = change[0] if isinstance(head, SequenceClassifier) else change[0, -1]
        return float(np.abs(last).max()), float(linear["kernel"].std()), rates["kernel"]

    (base, _, one), (wide, drawn, rate) = step(16), step(256)
    assert (one, rate) == (1.0, 1 / 16) and drawn == pytest.approx(16**-0.5 / 16, rel=0.15), "the base's over 16"
    assert wide == pytest.approx(base, rel=0.2)


def test_what_the_rules_are_not_for_is_refused():
    with pytest.raises(ConfigError, match=r"mup.base_width must divide width=32, got 24"):
        model(mup=MuP(base_width=24))
    for optimizer in (Momentum(), Muon()):
        with pytest.raises(
            ConfigError, match=f"model.mup has learning rates for Adam and its kin, not for {type(optimizer).__name__}"
        ):
            optimizer.build(lambda step: 1.0, roles={}, axes={}, rates={})


def test_updates_are_multiplied_and_decay_is_not():
    params, gradients = {"a": np.ones(2, np.float32), "b": np.ones(2, np.float32)}, {"a": np.ones(2), "b": np.ones(2)}
    roles = {"a": "matrix", "b": "matrix"}
    rule = Adam(learning_rate=0.5).build(lambda step: 1.0, roles=roles, axes={}, rates={"a": 0.25, "b": 1.0})
    updates, _ = rule.update(gradients, rule.init(params), params)
    np.testing.assert_allclose(updates["a"], 0.25 * np.asarray(updates["b"]), rtol=1e-6)


@pytest.mark.slow
def test_steps_move_activations_alike_at_every_width():
    widths = [64, 128, 256]
    head = LanguageModel(tied=False, gain=0.0)  # as drawn, what it adds to the logits fades with the width
    changes = {"model.head": head, "model.embedding": Embed(scaled=False), "schedule.warmup": 0.0}
    plain = override(presets.nano(sequence_length=32), changes)
    grows = growth(widths, coordinate_check(plain, widths, seeds=1))
    stays = growth(widths, coordinate_check(override(plain, {"model.mup": MuP(base_width=64)}), widths, seeds=1))
    assert all(abs(stays[name]) < 0.15 for name in stays), stays
    assert all(grows[name] > 0.4 for name in ("layer 0", "layer 1", "logits")), grows
