"""All that `model` and `objective` are put together from, in one place to import from."""

from llm_jax.data.tokenizer_json import ByteLevelBPE, HuggingFace, WordPiece
from llm_jax.data.tokenizers import Bytes, Characters, SentencePiece
from llm_jax.models.block import Layer
from llm_jax.models.decoder import Decoder
from llm_jax.models.encoder import Encoder
from llm_jax.models.encoder_decoder import EncoderDecoder
from llm_jax.models.heads import LanguageModel, MultiToken, Scalar, SequenceClassifier, TokenClassifier
from llm_jax.models.mup import MuP
from llm_jax.models.stack import Stack
from llm_jax.nn.attention import Bidirectional, Causal, Chunked, Prefix, SlidingWindow
from llm_jax.nn.dispatch import Capacity, Dropless
from llm_jax.nn.dropout import Dropout
from llm_jax.nn.embedding import Embed
from llm_jax.nn.ffn import Dense, Gated, NoFeedForward
from llm_jax.nn.latent import MLA
from llm_jax.nn.linear import Precision
from llm_jax.nn.losses import Brier, CrossEntropy, Focal, SquaredError
from llm_jax.nn.mixer import NoMixing
from llm_jax.nn.moe import MoE
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import LayerNorm, NoNorm, RMSNorm
from llm_jax.nn.position import Alibi, Learned, NoPosition, Rope, Sinusoidal, T5Bias
from llm_jax.nn.recurrent import LSTM
from llm_jax.nn.residual import HyperConnections, NoResidual, Residual, ReZero, Scaled
from llm_jax.nn.rope import DynamicScaling, LinearScaling, Llama3Scaling, NtkScaling, YarnScaling
from llm_jax.nn.routing import ExpertChoice, Sigmoid, Softmax
from llm_jax.objectives.continuation import Continuation
from llm_jax.objectives.denoising import UL2, SpanCorruption
from llm_jax.objectives.distillation import Distillation
from llm_jax.objectives.infilling import FillInTheMiddle
from llm_jax.objectives.masked import MaskedLM
from llm_jax.objectives.next_token import NextToken
from llm_jax.objectives.prefix_lm import PrefixLM
from llm_jax.objectives.spans import Denoiser

__all__ = [
    "LSTM", "MLA", "UL2", "Alibi", "Attention", "Bidirectional", "Brier", "Capacity", "Causal", "Chunked", "Continuation",
    "CrossEntropy", "Decoder", "Denoiser", "Dense", "Distillation", "Dropless", "Dropout", "DynamicScaling", "Embed", "Encoder",
    "EncoderDecoder", "ExpertChoice", "FillInTheMiddle", "Focal", "Gated", "HyperConnections", "LanguageModel", "Layer",
    "LayerNorm", "Learned", "LinearScaling", "Llama3Scaling", "MaskedLM", "MoE", "MuP", "MultiToken", "NextToken",
    "NoFeedForward", "NoMixing", "NoNorm", "NoPosition", "NoResidual", "NtkScaling", "Precision", "Prefix", "PrefixLM",
    "RMSNorm", "ReZero", "Residual", "Rope", "Scalar", "Scaled", "SequenceClassifier", "Sigmoid", "Sinusoidal",
    "SlidingWindow", "Softmax", "SpanCorruption", "SquaredError", "Stack", "T5Bias", "TokenClassifier", "YarnScaling",
]  # fmt: skip

TOKENIZERS = (ByteLevelBPE, Bytes, Characters, HuggingFace, SentencePiece, WordPiece)
