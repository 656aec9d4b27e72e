"""Which tokenizer lets a small model learn most from the same text?

    python -m llm_jax run --experiment=experiments/c01_tokenization.py --workdir=runs/c01

Bytes, byte-pair encoding over lines and over words, a unigram model, and WordPiece, each of 1,024 ids but for the bytes. Rows hold
384 bytes of text for all, by the bytes an id that each has on this corpus, so that arms see equal text in equally many steps; bytes
cost about 2.6 times the compute for it. The score is bits per byte of the text. WordPiece drops spaces and line ends, so it is
scored on less than the others and belongs to no claim; "word-piece-uncased" drops case as well. What else there is to
know of them: `python -m llm_jax tokenize compare --tokenizer="SentencePiece(vocabulary=1024)" --tokenizer="WordPiece(1024)"`.
Literature: Sennrich et al. 2016 (BPE), Kudo 2018 and Bostrom & Durrett 2020 (unigram), Radford et al. 2019 (byte-level), Xue et al.
2022 (bytes), Devlin et al. 2019 (WordPiece).
"""

from llm_jax.core.config import override
from llm_jax.data.corpora import StandardLibrary
from llm_jax.lab import Ablation, Claim, log_grid, presets
from llm_jax.lab.arms import Arms
from llm_jax.lab.components import ByteLevelBPE, Bytes, SentencePiece, WordPiece

IDS = 1024
TOKENIZERS = {  # with the ids of 384 bytes
    "bytes": (Bytes(), 384),
    "bpe": (SentencePiece(vocabulary=IDS), 151),
    "unigram": (SentencePiece(vocabulary=IDS, kind="unigram"), 154),
    "byte-level-bpe": (ByteLevelBPE(vocabulary=IDS), 139),
    "word-piece": (WordPiece(vocabulary=IDS), 126),
    "word-piece-uncased": (WordPiece(vocabulary=IDS, lowercase=True), 119),
}
LENGTHS = {name: length for name, (_, length) in TOKENIZERS.items()}

ablation = Ablation(
    question="Which tokenizer lets a model learn most from the same text?",
    base=override(presets.nano(), {"data.corpus": StandardLibrary(megabytes=3.0)}),
    scientific=Arms({name: {"tokenizer": kind, "data.sequence_length": length} for name, (kind, length) in TOKENIZERS.items()}),
    nuisance={"optimizer.learning_rate": log_grid(2e-3, 5.4e-2, 4)},
    seeds=4,
    baseline="bytes",
    metric="valid/bits_per_byte",
    claims=[
        Claim("Merged bytes beat bytes at equal text", better="bpe", than="bytes"),
        Claim("A unigram model beats merges", better="unigram", than="bpe"),
        Claim("Pieces that end with words beat pieces that need not", better="byte-level-bpe", than="bpe"),
    ],
    scales={
        "smoke": presets.SMOKE | {"data.corpus": StandardLibrary(megabytes=1.0), "nuisance": {"optimizer.learning_rate": (4e-3,)}},
        "small": {},
        "full": {name: value for name, value in presets.FULL.items() if name != "data.sequence_length"}
        | {"arms": {name: {"data.sequence_length": 8 * length} for name, length in LENGTHS.items()}},
    },
)
