"""A tokenizer that is not the one a model was trained with is noticed wherever the two meet."""

import dataclasses
import json

import jax
import pytest

import llm_jax
from llm_jax.core.config import ConfigError, override
from llm_jax.data.corpora import Prepared, TextFiles
from llm_jax.data.prepare import prepare
from llm_jax.data.tokenizers import Bytes, SentencePiece, nameless
from llm_jax.evaluation.perplexity import perplexity
from llm_jax.evaluation.reading import reader
from llm_jax.evaluation.tasks import Generation, MultipleChoice
from llm_jax.lab.components import Attention, Decoder
from llm_jax.lab.runner import Runner
from llm_jax.lab.workfolder import WorkFolder
from llm_jax.models.model import initial_parameters
from tests.lab.test_teachers import ablation, base, trained  # noqa: F401


@pytest.fixture
def file(base, tmp_path):  # noqa: F811
    """A tokenizer's file, and what makes it another's: as many ids, with other pieces."""
    path, corpus = tmp_path / "tokenizer.model", base.data.corpus
    other = TextFiles(path=str(tmp_path / "other.txt"))
    (tmp_path / "other.txt").write_text("zebras graze in fizzy jazz quizzes " * 200)
    path.write_bytes(SentencePiece(vocabulary=290).fit(corpus, tmp_path).model)
    return path, lambda: path.write_bytes(SentencePiece(vocabulary=290).fit(other, tmp_path).model)


def test_a_run_is_not_continued_with_another(base, file, tmp_path):  # noqa: F811
    path, exchange = file
    given = override(base, {"tokenizer": SentencePiece(path=str(path))})
    trained(tmp_path / "w", given, {"one": {}})
    assert llm_jax.load(tmp_path / "w").tokenizer.vocabulary == 290
    known = json.loads((tmp_path / "w" / "ablation.json").read_text())
    exchange()
    with pytest.raises(ConfigError, match=r"belongs to another experiment: tokenizers.one is .* there and .* here\. Choose"):
        trained(tmp_path / "w", given, {"one": {}}, seeds=2)
    with pytest.raises(ConfigError, match=r"tokenizer is not the one that one-final-.* was trained with: its corpus or file"):
        llm_jax.load(tmp_path / "w")
    del known["identity"]["tokenizers"]  # as folders were before
    (tmp_path / "w" / "ablation.json").write_text(json.dumps(known))
    WorkFolder(tmp_path / "w").claim(ablation(given, {"one": {}}), corpora=known["identity"]["corpora"], tokenizers={"one": "x"})
    with pytest.raises(ConfigError, match=r"tokenizers.one is \"x\" there"):
        Runner(ablation(given, {"one": {}}), WorkFolder(tmp_path / "w"), note=lambda text: None).run()


def test_ids_that_a_model_has_no_rows_for_are_never_read():
    model = Decoder(width=8, depth=1, attention=Attention(heads=2))
    lm = llm_jax.LM(model, 100, initial_parameters(model, 100, jax.random.key(0)), Bytes().fit(None, ""), source="a folder")
    assert lm.logits("!").shape == (1, 1, 100)
    for call in (lambda: lm.logits("z"), lambda: lm.loglikelihood("!", "z"), lambda: lm.generate("z"), lambda: lm.embed("z")):
        with pytest.raises(ConfigError, match="tokenizer gives the id 122, and a folder has only 100: it is another's"):
            call()
    alone = dataclasses.replace(lm, tokenizer=nameless(100))
    assert alone.logits([[99]]).shape == (1, 1, 100)


def test_nor_where_texts_are_scored(tmp_path):
    model = Decoder(width=8, depth=1, attention=Attention(heads=2))
    params = initial_parameters(model, 100, jax.random.key(0))
    lm = llm_jax.LM(model, 100, params, Bytes().fit(None, ""), source="a folder", start=1)
    (tmp_path / "a.txt").write_text("!z" * 100)
    (tmp_path / "choices.jsonl").write_text(json.dumps({"context": "!", "choices": ["z", "!"], "gold": 0}))
    (tmp_path / "answers.jsonl").write_text(json.dumps({"context": "z", "answer": "z"}))
    text, tokens = TextFiles(path=str(tmp_path / "a.txt")), Prepared(path=str(tmp_path / "tokens"))
    prepare(text, Bytes(), tmp_path / "tokens", cache=tmp_path, workers=1)
    asked = reader(lm, 8)
    assert asked.ids("!") == [33] and asked.prefix == [1]
    for call in (
        lambda: perplexity(asked, text, "valid"),
        lambda: perplexity(asked, tokens, "valid"),
        lambda: MultipleChoice(path=str(tmp_path / "choices.jsonl")).score(asked),
        lambda: Generation(path=str(tmp_path / "answers.jsonl")).score(reader(lm, 300)),
    ):
        with pytest.raises(ConfigError, match="tokenizer gives the id 122, and a folder has only 100: it is another's"):
            call()
    for more in ({"start": 100}, {"before": (100,)}, {"after": (100,)}):
        with pytest.raises(ConfigError, match="tokenizer gives the id 100, and a folder has only 100"):
            reader(dataclasses.replace(lm, **more), 8)
