"""Every kind of layer on a mesh that splits rows, widths and heads, against one device: outputs and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import sharding
from llm_jax.core.mesh import Mesh
from llm_jax.lab.components import (
    LSTM,
    MLA,
    Attention,
    Bidirectional,
    Decoder,
    Embed,
    EncoderDecoder,
    Gated,
    HyperConnections,
    LanguageModel,
    Layer,
    MoE,
    MultiToken,
    NoPosition,
    Sigmoid,
    SlidingWindow,
    Stack,
    T5Bias,
)
from llm_jax.models.model import abstract_parameters, initial_parameters

V, B, L = 16, 4, 8
TOKENS = np.random.default_rng(0).integers(0, V, (B, L)).astype(np.int32)
HEADS = Attention(heads=4, kv_heads=2, qk_norm=None, sinks=True)
MODELS = {
    "mla": Decoder(width=16, depth=2, attention=MLA(heads=4, kv_rank=8, q_rank=8, nope_dim=4, rope_dim=4, value_dim=4)),
    "lstm": Decoder(width=16, depth=2, attention=LSTM(), position=NoPosition()),
    "pattern": Decoder(
        width=16,
        depth=5,
        attention=HEADS,
        first=(Layer(ffn=Gated()),),
        pattern=(Layer(attention=Attention(heads=4, mask=SlidingWindow(window=3))), Layer(ffn=MoE(experts=4, router=Sigmoid()))),
        layers="scanned",
    ),
    "hyper": Decoder(width=16, depth=2, attention=HEADS, residual=HyperConnections(rate=2), placement="sandwich"),
    "heads": Decoder(
        width=16, depth=1, attention=HEADS, embedding=Embed(rank=8, types=2), head=LanguageModel(tied=False, transform="gelu")
    ),
    "ahead": Decoder(width=16, depth=1, attention=HEADS, head=MultiToken(ahead=1)),
    "encoder-decoder": EncoderDecoder(
        encoder=Stack(width=16, depth=2, attention=Attention(heads=4, mask=Bidirectional()), position=T5Bias(bidirectional=True)),
        decoder=Stack(width=16, depth=2, attention=HEADS, position=T5Bias(), layers="scanned"),
    ),
}


QUICK = ("mla", "pattern")  # the others take half a minute each


@pytest.mark.parametrize("name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MODELS])
def test_a_mesh_changes_no_number(name):
    model = MODELS[name]
    inputs = (TOKENS, TOKENS) if isinstance(model, EncoderDecoder) else (TOKENS,)
    params = jax.jit(lambda key: initial_parameters(model, V, key))(jax.random.key(0))

    def loss(params, *inputs):
        logits, sown = model.build(V).apply({"params": params}, *inputs, mutable=["ahead", "routing"])
        return sum(jnp.square(x).mean() for x in jax.tree.leaves((logits, sown.get("ahead", {})))), logits

    differentiate = jax.grad(loss, has_aux=True)
    expected = jax.jit(lambda *given: differentiate(*given))(params, *inputs)
    mesh = Mesh(data=2, fsdp=2, tensor=2).build(jax.devices())
    specs = sharding.parameter_specs(abstract_parameters(model, V), mesh)
    split = jax.device_put(params, sharding.named(mesh, specs))
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split))
    with jax.set_mesh(mesh):
        got = jax.jit(lambda *given: differentiate(*given))(split, *inputs)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)
