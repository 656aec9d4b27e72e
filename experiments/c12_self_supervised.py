"""What does a model learn of the structure of text by filling in, and does it matter what is to be filled in?

    python -m llm_jax run --experiment=experiments/c12_self_supervised.py --workdir=runs/c12

Models of Python's sources, byte by byte, that were never told what a comment, a string or a keyword is. After training they are
frozen, and a linear probe is to tell from the hidden state of each byte which of seven classes Python's lexer puts it in: it is
fitted to the validation split and scored on the test split, "probe/accuracy". Whether a byte is in a string or in a comment is
said by others, far away. Objectives: the next byte, masked bytes (BERT), a suffix after a prefix, spans (T5) and the mixture of
UL2, each tuned over the same learning rates by its own loss; and models that have made one step. Literature: Devlin et al. 2019,
Raffel et al. 2020, Tay et al. 2022, Alain & Bengio 2017 (linear probes); Hewitt & Liang 2019 on what a probe learns by itself.
"""

from dataclasses import replace
from typing import Any

from llm_jax.core.config import override
from llm_jax.data.corpora import StandardLibrary
from llm_jax.data.labels import PythonSyntax
from llm_jax.lab import Ablation, Arms, Claim, log_grid, presets
from llm_jax.lab.components import (
    UL2,
    Attention,
    Bidirectional,
    Encoder,
    EncoderDecoder,
    MaskedLM,
    Prefix,
    PrefixLM,
    SpanCorruption,
    Stack,
)

UNTRAINED = {"train.steps": 1, "train.log_every": 1, "evaluation.every": 1}


def arms(width: int, depth: int, heads: int) -> dict[str, dict[str, Any]]:
    """The objectives, each with a model of that size that it can train."""
    size, causal = {"width": width, "depth": depth}, Attention(heads=heads)
    both_ways, past = replace(causal, mask=Bidirectional()), {"model.attention": causal}
    masked = {"model": Encoder(**size, attention=both_ways), "objective": MaskedLM()}
    two = EncoderDecoder(encoder=Stack(**size, attention=both_ways), decoder=Stack(**size, attention=causal))
    return {
        "next token": past,
        "masked": masked,
        "prefix": {"model.attention": replace(causal, mask=Prefix()), "objective": PrefixLM()},
        "spans": {"model": two, "objective": SpanCorruption()},
        "ul2": {"model": two, "objective": UL2()},
        "untrained decoder": past | UNTRAINED,
        "untrained encoder": masked | UNTRAINED,
    }


ablation = Ablation(
    question="Which objective leaves most of a text's structure in frozen features?",
    base=override(presets.nano(), {"evaluation.probe": PythonSyntax(), "data.corpus": StandardLibrary(kind="code")}),
    scientific=Arms(arms(64, 2, 2)),
    nuisance={"optimizer.learning_rate": log_grid(2e-3, 5.4e-2, 4)},
    seeds=4,
    baseline="next token",
    metric="probe/accuracy",
    mode="max",
    tuning_metric="valid/loss",
    claims=[
        Claim("Predicting the next token teaches structure", better="next token", than="untrained decoder"),
        Claim("Filling in masked tokens teaches structure", better="masked", than="untrained encoder"),
        Claim("Seeing both sides teaches more than the past alone", better="masked", than="next token"),
        Claim("Whole spans teach more than single tokens", better="spans", than="masked"),
        Claim("A mixture of objectives teaches more than one", better="ul2", than="spans"),
    ],
    scales={
        "smoke": presets.SMOKE | {"nuisance": {"optimizer.learning_rate": (4e-3,)}},
        "small": {},
        "full": presets.FULL | {"arms": arms(1024, 24, 16)},
    },
)
