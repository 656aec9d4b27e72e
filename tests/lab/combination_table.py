"""What the concepts 2–10 and 20 can be combined from, as one would write it after `--set=`, and which pairs make no sense.

"@" stands for the model's stack, or for each of the two that an encoder-decoder has; "~" for where its network has its activation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp

from llm_jax.core.config import ConfigError
from llm_jax.core.types import Weighted
from llm_jax.core.written import override_text
from llm_jax.lab.experiment import Experiment
from llm_jax.nn.losses import cross_entropy
from llm_jax.objectives.objective import Objective

WIDTH, DEPTH, LENGTH, ROWS, VOCABULARY = 16, 2, 8, 4, 32

# The first level of each is compatible with all others.
FACTORS: dict[str, tuple[str, ...]] = {
    "architecture": ("model=Decoder()", "model=Encoder()", "model=EncoderDecoder()"),
    "mixer": (
        "@attention=Attention(heads=2, mask=Causal())",
        "@attention=Attention(heads=4, kv_heads=2, head_dim=8, qk_norm=RMSNorm(), soft_cap=5.0, sinks=True, bias=True)",
        "@attention=MLA(heads=2, kv_rank=8, q_rank=6, nope_dim=4, rope_dim=4, value_dim=6)",
        "@attention=LSTM()",
        "@attention=NoMixing()",
    ),
    "mask": (
        "",
        "@attention.mask=Bidirectional()",
        "@attention.mask=Prefix()",
        "@attention.mask=SlidingWindow(window=3, sinks=1)",
        "@attention.mask=SlidingWindow(window=3, causal=False)",
        "@attention.mask=Chunked(size=4)",
    ),
    "position": (
        "@position=NoPosition()",
        "@position=Sinusoidal()",
        "@position=Learned(max_length=8)",
        "@position=Rope(theta=100)",
        "@position=Alibi()",
        "@position=T5Bias(buckets=4, max_distance=6)",
        "@position=T5Bias(buckets=8, max_distance=6, bidirectional=True)",
    ),
    "norm": ("@norm=LayerNorm()", "@norm=RMSNorm()", "@norm=RMSNorm(offset=True)", "@norm=NoNorm()"),
    "placement": tuple(f"@placement={name}" for name in ("pre", "post", "sandwich", "parallel", "parallel_shared")),
    "network": (
        "@ffn=Dense(bias=True)",
        "@ffn=Gated(ratio=1, multiple=8)",
        "@ffn=MoE(experts=4, expert=Gated(ratio=1), shared=Dense(ratio=1))",
        "@ffn=MoE(experts=4, expert=Dense(units=8), router=Sigmoid(bias=True, groups=2), "
        "dispatch=Capacity(over='row', priority='position'), balance=0)",
        "@ffn=MoE(experts=4, expert=Dense(units=8), dispatch=Capacity(factor=1), z_loss=0.1)",
        "@ffn=MoE(experts=4, expert=Dense(units=8), router=ExpertChoice())",
        "@ffn=NoFeedForward()",
    ),
    "activation": (
        "",
        *(f"@ffn~activation={name}" for name in ("identity", "relu", "squared_relu", "gelu_tanh", "silu", "tanh", "sigmoid")),
    ),
    "residual": (
        "@residual=Residual()",
        "@residual=NoResidual()",
        "@residual=Scaled()",
        "@residual=Scaled(learned=True)",
        "@residual=ReZero()",
        "@residual=HyperConnections(rate=2)",
        "@residual=HyperConnections(rate=2, dynamic=False)",
    ),
    "dropout": (
        "",
        "@dropout=Dropout(embedding=0.1)",
        *(f"@dropout.{site}=0.1" for site in ("attention", "residual", "ffn", "layer")),
    ),
    "embedding": (
        "model.embedding=Embed()",
        "model.embedding=Embed(scaled=False)",
        "model.embedding=Embed(rank=6)",
        "model.embedding=Embed(norm=RMSNorm(), types=2)",
    ),
    "head": (
        "model.head=LanguageModel()",
        "model.head=LanguageModel(tied=False, bias=True, soft_cap=5.0, transform=gelu)",
        "model.head=MultiToken(ahead=2)",
        "model.head=TokenClassifier(labels=3)",
        "model.head=SequenceClassifier(labels=3, pooling=mean, transform=tanh)",
        "model.head=Scalar(bias=True)",
    ),
    "layers": ("@layers=unrolled", "@layers=scanned"),
    "remat": ("", "@remat=full", "@remat=dots"),
    "precision": ("", "@precision.compute=bfloat16"),
    "pattern": (
        "",
        "@first=(Layer(ffn=Gated(ratio=1)),)",
        "@pattern=(Layer(), Layer(position=NoPosition()))",
    ),
    "mup": ("", "model.mup=MuP(base_width=8); optimizer=AdamW()"),
}

# Each beside the first level of all factors: variants that no other factor is likely to meddle with.
ALONE: tuple[tuple[str, ...], ...] = (
    ("@position=Sinusoidal(interleaved=False)",),
    ("@position=Learned(max_length=8, offset=2)",),
    ("@position=Rope(fraction=0.5)",),
    ("@position=Rope(scaling=LinearScaling(factor=4))",),
    ("@position=Rope(scaling=NtkScaling(factor=4))",),
    ("@position=Rope(scaling=DynamicScaling(original_length=4))",),
    ("@position=Rope(scaling=YarnScaling(original_length=4))",),
    ("@position=Rope(scaling=Llama3Scaling(original_length=4))",),
    ("@attention=MLA(heads=2, kv_rank=8, nope_dim=4, rope_dim=4, value_dim=4)", "@position=Rope(scaling=YarnScaling())"),
    ("@attention=Attention(heads=4, kv_heads=1, scale=1.0, backend=blockwise)", "@position=Alibi()"),
    ("@attention=LSTM(units=12, forget=2.0)",),
    ("@ffn=MoE(experts=4, active=1, router=Softmax(renormalize=False), dispatch=Dropless(form=ragged))",),
    ("@ffn=MoE(experts=4, router=ExpertChoice(capacity=2.0, over=row), balance=0)", "model=Encoder()"),
    (
        "@pattern=(Layer(attention=Attention(heads=2, mask=SlidingWindow(window=3))), Layer(position=NoPosition()))",
        "@position=Rope()",
    ),
    ("@residual=HyperConnections(rate=1)",),
    ("model.embedding.rank=16",),
    ("model.head=SequenceClassifier(pooling=last)", "model.precision=Precision()"),
    ("model.shared_embedding=false", "model.head.tied=false", "model=EncoderDecoder()"),
    ("model=EncoderDecoder(encoder=Stack(width=16, depth=1), decoder=Stack(width=16, depth=3))",),
    ("objective=MaskedLM(rate=0.5)", "model=Encoder()", "@attention.mask=Bidirectional()"),
    ("objective=SpanCorruption(rate=0.5, sentinels=8)", "model=EncoderDecoder()"),
    ("objective=UL2(denoisers=(Denoiser(rate=0.5, mode=X), Denoiser(rate=0.25, mean_length=None, mode=S)), sentinels=8)",),
    ("objective=PrefixLM()", "@attention.mask=Prefix()"),
    ("objective=PrefixLM()", "model=EncoderDecoder()"),
    ("objective=FillInTheMiddle(rate=0.9)",),
    ("objective=Distillation(temperature=2.0)",),
    *((f"objective=NextToken(criterion={criterion}())",) for criterion in ("CrossEntropy", "Focal", "Brier", "SquaredError")),
)


@dataclass(frozen=True)
class Refused:
    """Any level that holds one of `left` in one factor with any that holds one of `right` in another, and the sentence."""

    left: tuple[str, ...]
    right: tuple[str, ...]
    sentence: str


ONLY_INSIDE = ("Rope", "Alibi", "T5Bias")
REFUSED = (
    Refused(("LSTM", "NoMixing"), ONLY_INSIDE, r"position is \w+\(\), which works inside attention, and no layer attends"),
    Refused(("LSTM", "NoMixing"), ("attention.mask",), r"mask is no field of (LSTM|NoMixing)"),
    Refused(("LSTM", "NoMixing"), ("dropout.attention",), r"dropout.attention drops attention weights, and no layer attends"),
    Refused(("NoMixing",), ("NoFeedForward",), r"ffn is NoFeedForward\(\) in a layer of NoMixing\(\), which then does nothing"),
    Refused(("NoFeedForward",), ("activation=",), r"activation is no field of NoFeedForward"),
    Refused(("NoFeedForward",), ("dropout.ffn",), r"dropout.ffn drops hidden units, and no layer has a feed-forward network"),
    Refused(
        ("Bidirectional()", "causal=False"),
        ("T5Bias(buckets=4, max_distance=6)",),
        r"position is T5Bias\(\), which cannot tell later tokens apart",
    ),
    Refused(("Bidirectional()", "causal=False"), ("MultiToken",), r"head predicts later tokens, and attention shows them"),
    Refused(("Capacity(factor", "ExpertChoice"), ("MultiToken",), r"head predicts later tokens, and ffn shows them"),
    Refused(("EncoderDecoder",), ("Prefix",), r"encoder.attention.mask is Prefix\(\), and an encoder-decoder's prefix"),
    Refused(("EncoderDecoder",), ("MuP",), r"mup is no field of EncoderDecoder"),
    Refused(("EncoderDecoder",), ("placement=parallel",), r"decoder.placement cannot be parallel with cross-attention"),
    Refused(("HyperConnections",), ("placement=post",), r"residual keeps 2 copies of the stream, which placement='post'"),
    Refused(("NoResidual",), ("dropout.layer",), r"dropout.layer drops whole branches, and without a residual nothing is left"),
)


def refusal(*levels: str) -> Refused | None:
    """The row that says why two levels cannot be together."""
    a, b = levels
    for row in REFUSED:
        for left, right in ((a, b), (b, a)):
            if any(part in left for part in row.left) and any(part in right for part in row.right):
                return row
    return None


@dataclass(frozen=True)
class Supervised(Objective):
    """For models that no objective of ours is for: the targets are labels of the tokens, or of the row, or numbers."""

    def loss(self, apply, params, batch, *, model, rng, byte_lengths, train):
        said = apply(params, batch, rng)
        x, targets_BL = said.logits, batch.targets
        if x.ndim == 3:
            each = cross_entropy(x, targets_BL % x.shape[-1])[0]
        elif x.shape == targets_BL.shape:
            each = jnp.square(x - targets_BL / VOCABULARY)
        else:
            each = -jnp.take_along_axis(jax.nn.log_softmax(x), targets_BL[:, :1] % x.shape[-1], -1)
        penalty = 0.0 if said.penalty is None else said.penalty.mean * each.size
        return Weighted(each.sum() + penalty, jnp.float32(each.size)), {"routing": said.routing} if said.routing else {}


def assignments(levels: Iterable[str]) -> list[str]:
    """The levels as `--set` takes them, with the sizes; a whole model first."""
    texts = [text for level in levels for text in level.split("; ") if text]
    whole = [text for text in texts if text.startswith("model=")][-1:]
    both = "EncoderDecoder" in "".join(whole)
    sized = "Stack(" in "".join(whole)
    sizes = (
        ()
        if sized
        else (f"@width={WIDTH}", f"@depth={DEPTH}", *(("model.cross=Attention(heads=2, mask=Bidirectional())",) if both else ()))
    )
    rest = [text for text in texts if not text.startswith("model=")]
    network = next((text for text in reversed(rest) if text.startswith("@ffn=")), "")
    dot = ".expert." if "MoE(" in network else "."
    stacks = ("model.encoder.", "model.decoder.") if both else ("model.",)
    written = [text.replace("~", dot) for text in (*sizes, *rest)]
    return whole + [text.replace("@", stack, 1) for text in written for stack in (stacks if text[0] == "@" else ("",))]


@cache
def base() -> Experiment:
    """What all rows change: the sizes of data, and an optimizer whose state shows the gradient."""
    given = [f"data.sequence_length={LENGTH}", f"data.batch_size={ROWS}", "optimizer=Momentum()", "train.clip=none"]
    return override_text(Experiment(), given)


def experiment(levels: Iterable[str]) -> Experiment:
    """The experiment of these levels, with the first objective that its model can be trained for. Raises `ConfigError`."""
    texts = assignments(levels)
    if any(text.startswith("objective=") for text in texts):
        return override_text(base(), texts)
    given = override_text(base(), [*texts, "objective=Supervised()"])
    for objective in ("Continuation()", "NextToken()") if "Prefix()" in "".join(texts) else ("NextToken()", "Continuation()"):
        try:
            return override_text(given, [f"objective={objective}"])
        except ConfigError:
            continue
    return given
