"""One of several processes that read a mixture together: writes the tokens of its rows. Run by test_hosts.py.

python tests/data/host.py INDEX COUNT FIRST_STEP STEPS WORKERS CACHE OUTPUT
"""

import sys

import numpy as np

from llm_jax.data import pipeline
from llm_jax.data.corpora import Mixture, Source, StandardLibrary
from llm_jax.data.packing import FirstFit
from llm_jax.data.pipeline import Data, Host
from llm_jax.data.tokenizers import Bytes

BATCH, TOGETHER, ALL = 40, 5, 250  # 10,000 rows


def main(index: str, count: str, first: str, steps: str, workers: str, cache: str, output: str) -> None:
    small, large = StandardLibrary(megabytes=2.0), StandardLibrary(megabytes=3.0)
    corpus = Mixture((Source("small", small, epochs=1.5), Source("large", large, weight=((0.0, 2.0), (1.0, 1.0)))))
    data = Data(corpus, sequence_length=64, batch_size=BATCH, packing=FirstFit())
    rows = pipeline.rows_of(data, Bytes().fit(corpus, cache), "valid", cache)
    host = Host((int(index),), int(count))
    source = pipeline.dispatches(data, rows, seeds=[3, 4], steps_per_item=TOGETHER, steps=ALL, host=host)
    feed = pipeline.feed(source, start_step=int(first), workers=int(workers))
    np.save(output, np.concatenate([next(feed).tokens for _ in range(int(steps) // TOGETHER)], 1))


if __name__ == "__main__":
    main(*sys.argv[1:])
