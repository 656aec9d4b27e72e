"""Which batches are scored under which name."""

import pytest

from llm_jax.core.config import override
from llm_jax.data.corpora import TextFiles
from llm_jax.data.tasks import Recall
from llm_jax.lab.sources import Source
from tests.lab.test_population import LENGTH, tiny


@pytest.mark.parametrize(
    "lengths, names",
    [
        ((1,), ["valid"]),
        ((1, 2), ["valid", "valid@1x", "valid@2x"]),
        ((2,), ["valid", "valid@2x"]),
        ((4, 2), ["valid", "valid@4x", "valid@2x"]),
    ],
)
def test_valid_is_always_that_of_the_trained_length(lengths, names, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path))
    (tmp_path / "text.txt").write_text("every good boy does fine " * 200)
    corpus = TextFiles(path=str(tmp_path / "text.txt"), test_fraction=0.2, valid_fraction=0.2)
    source = Source(override(tiny(), {"data.corpus": corpus, "evaluation.lengths": lengths, "evaluation.test": True}))
    during, final = source.evaluations(final=False), source.evaluations(final=True)
    assert list(during) == ["valid"] and list(final) == names + [name.replace("valid", "test") for name in names]
    assert final["valid"] is during["valid"] and final["valid"] is final.get("valid@1x", final["valid"])
    for name, batches in final.items():
        assert batches.tokens.shape[-1] == LENGTH * int((name.partition("@")[2] or "1x")[:-1])


def test_the_corpus_says_what_else_is_scored_at_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path))
    changes = {"data.corpus": Recall(length=20, rows=30, distances=(1, 3)), "data.sequence_length": 20}
    source = Source(override(tiny(), changes))
    assert list(source.evaluations(final=False)) == ["valid"]
    assert list(source.evaluations(final=True)) == ["valid", "valid@1-facts", "valid@3-facts"]
