"""What a layer leaves to its gradient: the same arrays counted by hand."""

import jax
import pytest

from llm_jax.core import platform
from llm_jax.models import residuals
from llm_jax.models.stack import Stack
from llm_jax.nn.ffn import Dense, NoFeedForward
from llm_jax.nn.linear import Precision
from llm_jax.nn.mixer import NoMixing
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import NoNorm, RMSNorm
from llm_jax.nn.position import NoPosition

D, L = 256, 512
ALONE = {"width": D, "norm": NoNorm(), "position": NoPosition(), "precision": Precision("bfloat16")}
HIDDEN = {"attention": NoMixing(), "ffn": Dense(activation="relu")}


def kept(*, length=L, again=False, **given):
    stack = Stack(**ALONE | given)
    with platform.targeting("tpu"):
        return residuals.kept(stack, stack.in_full[0], length, again=again)


@pytest.mark.parametrize("heads, filled", [(2, 128), (4, 128), (1, 256)])
def test_attention_leaves_what_its_kernel_reads_and_writes(heads, filled):
    """Input; queries, keys, values and result, their heads filled up to 128 channels; its softmax's sums; what goes out."""
    found = kept(attention=Attention(heads=heads), ffn=NoFeedForward())
    assert found.whole + found.split == 2 * L * D + 4 * 2 * L * heads * filled + 4 * L * heads + 2 * L * D
    assert found.whole == 2 * L * D or heads == 1  # the stream, on all devices
    assert found.weights == pytest.approx(2 * 4 * D * D, rel=0.01)


def test_hidden_units_are_kept_and_norms_in_float32():
    found = kept(**HIDDEN)
    assert found.whole == 2 * L * D
    assert found.split == L * 4 * D * (2 + 1)  # and which of them are 0
    assert found.weights == 2 * 2 * D * 4 * D
    normed = kept(**HIDDEN, norm=RMSNorm())
    assert normed.split == found.split
    assert normed.whole - found.whole == pytest.approx(3 * 4 * L * D, rel=0.01)


def test_what_is_computed_again_is_not_kept():
    norm = RMSNorm()
    everything, nothing, products = (kept(**HIDDEN, norm=norm, remat=remat) for remat in ("none", "full", "dots"))
    assert nothing == residuals.Kept(2 * L * D, 0, 0)  # the stream that it begins with
    assert (products.whole, products.split, products.weights) == (2 * L * D, 2 * L * 4 * D, 0)
    again = kept(**HIDDEN, norm=norm, remat="full", again=True)
    assert again.whole == 2 * L * D  # what the norm makes; no array of float32
    assert products.split <= again.split <= everything.split


def test_scores_that_are_written_out_grow_with_the_square():
    dense = {"attention": Attention(heads=2, backend="dense"), "ffn": NoFeedForward()}
    few, many = kept(**dense), kept(**dense, length=2 * L)
    assert many.split > 3 * few.split
    kernel = {"attention": Attention(heads=2), "ffn": NoFeedForward()}
    assert kept(**kernel, length=32 * L).split == 32 * kept(**kernel).split


def test_nothing_is_computed():
    before = len(jax.live_arrays())
    kept(width=1 << 14, attention=Attention(heads=128), ffn=Dense())
    assert len(jax.live_arrays()) <= before + 8
