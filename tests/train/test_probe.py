"""A linear probe beside NumPy in float64, and what it is asked: the classes that Python's lexer gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core.config import ConfigError, override
from llm_jax.core.types import Batch, Labelled, Probed
from llm_jax.data.corpora import Recall, StandardLibrary
from llm_jax.data.labels import NO_CLASS, PythonSyntax, labelled
from llm_jax.data.tokenizers import Bytes, SentencePiece
from llm_jax.lab.components import Attention, Bidirectional, Decoder, EncoderDecoder, NextToken, SpanCorruption, Stack
from llm_jax.lab.presets import nano
from llm_jax.lab.sources import Sources
from llm_jax.models.predict import hidden_states
from llm_jax.train.pretrain import trial
from llm_jax.train.probe import RIDGE, linear_probe

CLASSES, WIDTH = 4, 8


def random(seed, features):
    """Rows whose token ids are the places of their features in a table, and classes that a linear map mostly tells."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, len(features), (3, 4, 16)).astype(np.int32)
    told = (features[ids] - features.mean()) @ np.random.default_rng(9).normal(size=(WIDTH, CLASSES))
    classes = np.argmax(told + rng.normal(size=told.shape), -1)
    classes[rng.random(ids.shape) < 0.2] = NO_CLASS
    return Labelled(Batch(ids, ids), classes.astype(np.int32))


def test_it_is_the_least_squares_classifier():
    table = np.random.default_rng(0).normal(3.0, 2.0, (200, WIDTH))
    fit, test = random(1, table), random(2, table)
    found = jax.jit(lambda p: linear_probe(lambda batch: jnp.asarray(table, jnp.float32)[batch.tokens], p, CLASSES))(
        Probed(fit, test)
    )

    def rows(part):
        keep = part.classes >= 0
        return np.c_[table[part.batch.tokens[keep]], np.ones(keep.sum())], part.classes[keep]

    x, y = rows(fit)
    ridge = np.eye(WIDTH + 1) * RIDGE * np.mean(x[:, :-1] ** 2) * len(x)
    ridge[-1, -1] = 0
    weights = np.linalg.solve(x.T @ x + ridge, x.T @ np.eye(CLASSES)[y])
    x, truth = rows(test)
    assert found["accuracy"].weight == len(truth)
    assert found["accuracy"].total == (np.argmax(x @ weights, 1) == truth).sum() > 1.3 * found["chance"].total
    assert found["chance"].total == (truth == np.bincount(y).argmax()).sum()


def test_the_classes_are_those_of_pythons_lexer():
    text = 'def f(x):  # why\n    return "a\\"b" + 1.5\n'
    found = PythonSyntax().of(text)
    said = {name: "".join(c for c, k in zip(text, found, strict=True) if k == i) for i, name in enumerate(PythonSyntax.classes)}
    assert not said.pop("space").strip()
    expected = {"comment": "# why", "string": '"a\\"b"', "keyword": "defreturn", "name": "fx", "number": "1.5", "operator": "():+"}
    assert said == expected
    assert (PythonSyntax().of("This is 'not Python at all") == NO_CLASS).all()
    assert (PythonSyntax().of('x = """a\nb"""') == PythonSyntax.classes.index("string")).sum() == 9


@pytest.mark.parametrize("tokenizer", [Bytes(), SentencePiece(vocabulary=500)])
def test_a_token_has_the_class_of_its_first_character_that_is_no_space(tokenizer, tmp_path):
    corpus = StandardLibrary(megabytes=1.2)
    fitted = tokenizer.fit(corpus, tmp_path)
    found = labelled(corpus, fitted, "valid", PythonSyntax(bytes=4000), length=32, batch=2)
    text = next(t for t in corpus.documents("valid") if (PythonSyntax().of(t) >= 0).any())
    ends = np.cumsum(fitted.byte_lengths[found.batch.tokens[0, 0]])
    for place in range(1, 32):
        first, stop = (len(text.encode()[:end].decode("utf-8", "ignore")) for end in ends[place - 1 : place + 1])
        solid = [at for at in range(first, stop) if not text[at].isspace()] or [first]
        assert found.classes[0, 0, place] == PythonSyntax().of(text)[solid[0]]
    assert found.batch.tokens.shape == found.classes.shape and found.classes.max() < len(PythonSyntax.classes)


def test_what_is_no_python_is_one_sentence(tmp_path):
    corpus = Recall(length=32, rows=64, distances=(4,))
    with pytest.raises(ConfigError, match=r"evaluation\.probe finds 0 tokens of the valid split that PythonSyntax has classes for"):
        labelled(corpus, Bytes().fit(corpus, tmp_path), "valid", PythonSyntax(), length=32, batch=2)


@pytest.mark.parametrize("model", ["Decoder", "EncoderDecoder"])
def test_an_experiment_has_its_scores(model):
    narrow = {"width": 16, "depth": 1}
    encoder = Stack(**narrow, attention=Attention(heads=2, mask=Bidirectional()))
    both = EncoderDecoder(encoder=encoder, decoder=Stack(**narrow, attention=Attention(heads=2)))
    kinds = {"Decoder": (Decoder(**narrow, attention=Attention(heads=2)), NextToken()), "EncoderDecoder": (both, SpanCorruption())}
    chosen, objective = kinds[model]
    changes = {"data.corpus": StandardLibrary(megabytes=1.2), "model": chosen, "objective": objective}
    experiment = override(nano(sequence_length=32), changes | {"evaluation.probe": PythonSyntax(bytes=20_000)})
    source = Sources().of(experiment)
    probed = source.probed["probe"]
    one = trial(experiment, source.tokenizer)
    state = one.init({})
    scores = jax.jit(one.evaluate)({}, state, probed)
    assert 0 < scores["chance"].mean < scores["accuracy"].mean < 1
    hidden = hidden_states(experiment.model, source.vocabulary, state.params, jax.tree.map(lambda x: x[0], probed.test.batch))
    assert hidden.shape == (*probed.test.classes.shape[1:], 16)
