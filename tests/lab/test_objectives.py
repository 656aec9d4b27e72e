"""Every objective as an arm of an ablation: it trains, is scored alike every time, and goes on from a state in the same numbers."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest

from llm_jax.core.config import ConfigError, override
from llm_jax.core.mesh import Mesh
from llm_jax.core.types import Batch
from llm_jax.data.corpora import TextFiles
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import Bytes
from llm_jax.lab.arms import Arms
from llm_jax.lab.components import (
    UL2,
    Attention,
    Bidirectional,
    Continuation,
    Decoder,
    Encoder,
    EncoderDecoder,
    FillInTheMiddle,
    Learned,
    MaskedLM,
    NextToken,
    Prefix,
    PrefixLM,
    SpanCorruption,
    Stack,
)
from llm_jax.lab.experiment import Ablation, Checkpoints, Evaluation, Experiment
from llm_jax.lab.population import compile_population
from llm_jax.lab.runner import Runner
from llm_jax.lab.trained import load
from llm_jax.lab.workfolder import WorkFolder
from llm_jax.objectives.hidden import Hidden
from llm_jax.train.check import compiled
from llm_jax.train.pretrain import Train, trial

SMALL = {"width": 8, "depth": 1}
TWO_WAYS = Attention(heads=2, mask=Bidirectional())
ENCODER = Encoder(**SMALL, attention=TWO_WAYS)
PAIR = EncoderDecoder(encoder=Stack(**SMALL, attention=TWO_WAYS), decoder=Stack(**SMALL, attention=Attention(heads=2)))
ARMS = {
    "causal": {},
    "prefix": {"objective": PrefixLM(), "model.attention.mask": Prefix()},
    "prefix, encoder-decoder": {"objective": PrefixLM(), "model": PAIR},
    "continuation": {"objective": Continuation(), "model": PAIR},
    "masked": {"objective": MaskedLM(), "model": ENCODER},
    "spans": {"objective": SpanCorruption(), "model": PAIR},
    "spans, decoder": {"objective": SpanCorruption()},
    "UL2": {"objective": UL2(), "model": PAIR},
    "UL2, decoder": {"objective": UL2(), "model.attention.mask": Prefix()},
    "middles": {"objective": FillInTheMiddle()},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    words = "the quick brown fox jumps over the lazy dog while many small numbers add up".split()
    file.write_text("\n".join(" ".join(words[(i * k) % len(words)] for k in range(1, 9)) for i in range(400)))
    return Experiment(
        data=Data(corpus=TextFiles(path=str(file)), sequence_length=32, batch_size=4),
        model=Decoder(**SMALL, attention=Attention(heads=2)),
        train=Train(steps=12, log_every=6),
        evaluation=Evaluation(every=6, bytes=512),
        checkpoints=Checkpoints(every=6),
    )


def ablation(base, arms, **more):
    return Ablation(question="?", base=base, scientific=Arms(arms), metric="valid/loss", **more)


def trained(folder, base, arms):
    runner = Runner(ablation(base, arms, seeds=2), WorkFolder(folder), note=lambda text: None)
    results = runner.run()
    assert not runner.failures, [result.get("error") for result in results]
    return results


def check(results, arm, scores):
    own = [result for result in results if result["arm"] == arm]
    assert [result["status"] for result in own] == ["done"] * 2, own
    for result in own:
        assert {f"valid/{score}" for score in scores} == {name for name in result["metrics"] if name.startswith("valid/")}
        curve = result["curve"]["valid/loss"]
        assert len(curve) == 2 and np.isfinite(curve).all() and curve[1] < curve[0] < 8, curve


def test_an_encoder_is_trained_and_loaded_with_its_mask(tmp_path, base):
    results = trained(tmp_path, base, {"masked": ARMS["masked"]})
    check(results, "masked", Hidden.scores)
    found = load(tmp_path)
    assert found.tokenizer.vocabulary == found.params["embedding"]["embedding"].shape[0] == 258
    assert found.tokenizer.specials == {"[MASK]": 257}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_objective_is_trained(tmp_path, base):
    longer = override(base, {"evaluation.lengths": (1, 2)})
    results = trained(tmp_path, longer, ARMS)
    for arm, changes in ARMS.items():
        own = type(changes.get("objective", base.objective))
        names = [f"{score}{at}" for score in own.scores for at in ("", "@1x", "@2x")]
        check(results, arm, names)


def test_what_is_scored_depends_on_no_seed_and_no_batch_size(base):
    """The same parameters have the same scores, whatever the trial's seed, and however rows come together."""
    given = override(base, ARMS["masked"])
    tokens = given.fitted("")
    one = trial(given, tokens)
    state = compiled(one.init)({"seed": np.int32(1)})
    ids = np.random.default_rng(0).integers(0, 256, (8, 16)).astype(np.int32)
    rows = lambda n, b: Batch(ids.reshape(n, b, 16), ids.reshape(n, b, 16), np.ones((n, b, 16), np.float32))  # noqa: E731
    evaluate = compiled(partial(one.evaluate, {}))
    first = evaluate(state, rows(2, 4))["loss"]
    again = evaluate(replace(state, key=jax.random.key(7), step=state.step + 5), rows(2, 4))["loss"]
    other = evaluate(state, rows(1, 8))["loss"]
    assert first.weight == again.weight == other.weight > 0 and first.total == again.total
    np.testing.assert_allclose(first.total, other.total, rtol=1e-6)


def test_moved_middles_are_scored_from_left_to_right_too(base):
    """As `NextToken` scores the same text, and as it scores the text that was moved; where none is, the two are one."""
    given = override(base, {"objective": FillInTheMiddle(rate=1.0)})
    tokens = given.fitted("")
    one = trial(given, tokens)
    state = compiled(one.init)({"seed": np.int32(1)})
    ids = np.random.default_rng(0).integers(0, 256, (2, 4, 33)).astype(np.int32)
    rows = Batch(ids[..., :-1], ids[..., 1:])
    found = compiled(partial(one.evaluate, {}))(state, rows)
    assert set(found) == set(FillInTheMiddle.scores)
    plain = compiled(partial(trial(base, tokens).evaluate, {}))(state, rows)
    assert set(plain) == set(NextToken.scores)
    for name, score in plain.items():
        np.testing.assert_allclose(found[name].mean, score.mean, rtol=1e-6)
    assert found["infilling_loss"].weight == 8 * 35 and found["loss"].weight == 8 * 32
    assert abs(found["infilling_loss"].mean - found["loss"].mean) > 1e-4
    still = override(given, {"objective.rate": 0.0})
    unmoved = compiled(partial(trial(still, tokens).evaluate, {}))(state, Batch(ids[..., :-1], ids[..., 1:]))
    # of the first token of a row to the last but one, which is all that moving is given
    assert unmoved["infilling_loss"].weight == 8 * 31
    nll = unmoved["loss"].total - unmoved["infilling_loss"].total
    assert 0 < nll < 8 * 10 and unmoved["loss"].total == found["loss"].total


def test_micro_batches_and_interruptions_change_nothing(base):
    """What is hidden is drawn for the whole batch, by seed and step alone."""
    given = override(base, ARMS["masked"])
    ids = np.random.default_rng(0).integers(0, 256, (4, 4, 16)).astype(np.int32)
    batches = Batch(ids, ids)
    found = {}
    for parts in (1, 2):
        one = trial(override(given, {"train.accumulate": parts}), given.fitted(""))
        start = compiled(one.init)({"seed": np.int32(1)})
        step = compiled(partial(one.steps, {}))
        found[parts], metrics = step(start, jax.tree.map(lambda x: x[:2], batches))
        assert metrics["train/loss"].weight > 0
        if parts == 1:
            on, _ = step(found[1], jax.tree.map(lambda x: x[2:], batches))
            whole, _ = step(step(start, jax.tree.map(lambda x: x[:2], batches))[0], jax.tree.map(lambda x: x[2:], batches))
            jax.tree.map(np.testing.assert_array_equal, on.params, whole.params)
            other, _ = step(replace(found[1], step=found[1].step + 1), jax.tree.map(lambda x: x[2:], batches))
            assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (on.params, other.params)), strict=True))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-6), found[1].params, found[2].params)


@pytest.mark.parametrize(
    "changes, sentence",
    [
        (
            {"objective": SpanCorruption(sentinels=2), "model": PAIR},
            r"objective.sentinels must be at least 3 for rows of 32",
        ),
        ({"objective": SpanCorruption(), "model.position": Learned(max_length=32)}, r"max_length"),
    ],
)
def test_a_length_that_is_refused_is_found_before_anything_is_trained(tmp_path, base, changes, sentence):
    for others, where in (({}, ""), ({"other": {}}, r" \(in arm 'one'\)"), ({"other": changes}, "")):
        with pytest.raises(ConfigError, match=f"{sentence}[^()]*{where}$"):
            Runner(ablation(base, others | {"one": changes}), WorkFolder(tmp_path)).check()
        with pytest.raises(ConfigError, match=f"{sentence}[^()]*{where}$"):
            Runner(ablation(base, {"one": changes} | others), WorkFolder(tmp_path)).check()


def test_bits_per_byte_are_no_score_of_hidden_tokens(tmp_path, base):
    runner = Runner(replace(ablation(base, {"one": ARMS["masked"]}), metric="valid/bits_per_byte"), WorkFolder(tmp_path))
    with pytest.raises(ConfigError, match=r"metric 'valid/bits_per_byte' is not scored: did you mean"):
        runner.check()


@pytest.mark.parametrize("accumulate, devices", [(1, 1), (2, 2)], ids=["at once", "micro-batches on two devices"])
def test_what_there_was_no_room_for_adds_up(base, accumulate, devices):
    """Rows of documents of 2, 8, 2 and 32 tokens, of which those of 2 do not all have room: as counted in what is left of them."""
    changes = {"objective": SpanCorruption(), "train.accumulate": accumulate, "train.steps": 1, "mesh": Mesh(data=devices)}
    experiment, sizes, place = override(base, changes), (2, 8, 2, 32), np.arange(32)
    segments = np.stack([place // size for size in sizes]).astype(np.int32)
    weights = np.stack([place % size < size - 1 for size in sizes]).astype(np.float32)
    positions = np.stack([place % size for size in sizes]).astype(np.int32)
    ids = np.random.default_rng(0).integers(0, 256, (4, 32)).astype(np.int32)
    batch, tokens = Batch(ids, ids, weights, segments, positions), Bytes().fit(None, "").with_specials(SpanCorruption().specials)
    posed = SpanCorruption().pose(
        jax.tree.map(jax.numpy.asarray, batch), jax.random.split(jax.random.key(0), 4), model=experiment.model, tokens=tokens
    )
    kept = sum(size * len(set(row[row >= 0].tolist())) for size, row in zip(sizes, np.asarray(posed.segments), strict=True))
    program = compile_population(experiment, 1, tokens, devices=jax.devices()[:devices]).bind([experiment])
    _, metrics = program.steps(program.init(), jax.tree.map(lambda x: x[None, None], batch))
    found = metrics["train/left_out"]
    assert (float(found.total[0]), float(found.weight[0])) == (128 - kept, 128) and kept < 128
