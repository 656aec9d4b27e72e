"""Which batches are scored under which name."""

import pytest

from llm_jax.core.config import ConfigError, override
from llm_jax.data.corpora import Mixture, Prepared, TextFiles
from llm_jax.data.corpora import Source as Share
from llm_jax.data.labels import PythonSyntax
from llm_jax.data.prepare import prepare
from llm_jax.data.tasks import Recall
from llm_jax.data.tokenizers import Bytes
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


def test_a_probe_says_that_it_needs_text(tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_JAX_CACHE", str(tmp_path))
    (tmp_path / "text.txt").write_text("every good boy does fine " * 200)
    prepare(TextFiles(path=str(tmp_path / "text.txt")), Bytes(), tmp_path / "tokens", cache=tmp_path, workers=1)
    tokens = Prepared(path=str(tmp_path / "tokens"))
    for corpus in (tokens, Mixture((Share("a", tokens),))):
        source = Source(override(tiny(), {"data.corpus": corpus, "tokenizer": Bytes(), "evaluation.probe": PythonSyntax()}))
        with pytest.raises(ConfigError, match=r"^evaluation\.probe labels characters, and Prepared has tokens and no text: "):
            _ = source.probed
