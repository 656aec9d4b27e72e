"""A trained model that is asked in training: from a work folder or from Hugging Face's, on any mesh, and never a wrong one."""

import pathlib
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
import safetensors.numpy

import llm_jax
from llm_jax.core import platform
from llm_jax.core.config import ConfigError, override
from llm_jax.core.mesh import Mesh
from llm_jax.data.corpora import TextFiles
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import Bytes, nameless
from llm_jax.lab import plan, population, teachers
from llm_jax.lab.arms import Arms
from llm_jax.lab.components import (
    Attention,
    ByteLevelBPE,
    Characters,
    Decoder,
    Distillation,
    HuggingFace,
    Learned,
    NextToken,
    Rope,
)
from llm_jax.lab.experiment import Ablation, Checkpoints, Evaluation, Experiment
from llm_jax.lab.runner import Runner
from llm_jax.lab.teachers import Found
from llm_jax.lab.workfolder import WorkFolder
from llm_jax.models import count
from llm_jax.models.model import initial_parameters
from llm_jax.optim.optimizers import AdamW
from llm_jax.train.pretrain import Teacher, Train
from tests.lab.test_population import LENGTH, VOCABULARY, tiny, train

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "huggingface"
SMALL = Decoder(width=8, depth=1, attention=Attention(heads=2))
WORDS = "the quick brown fox jumps over the lazy dog while many small numbers add up".split()


def ablation(base, arms, **more):
    return Ablation(question="?", base=base, scientific=Arms(arms), metric="valid/loss", **({"seeds": 1} | more))


def trained(folder, base, arms, **more):
    runner = Runner(ablation(base, arms, **more), WorkFolder(folder), note=lambda text: None)
    results = runner.run()
    assert not runner.failures, [result.get("error") for result in results]
    return results


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n".join(" ".join(WORDS[(i * k) % len(WORDS)] for k in range(1, 9)) for i in range(400)))
    return Experiment(
        data=Data(corpus=TextFiles(path=str(file)), sequence_length=32, batch_size=4),
        model=SMALL,
        train=Train(steps=6, log_every=6),
        evaluation=Evaluation(every=6, bytes=512),
        checkpoints=Checkpoints(every=6),
    )


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """Of a teacher of another shape, by a RoPE that llama's form can say."""
    folder = tmp_path_factory.mktemp("teacher")
    trained(folder, override(base, {"model.depth": 2, "model.width": 16, "model.position": Rope()}), {"teacher": {}})
    return folder


def test_a_student_is_trained_and_written_down_with_whom_it_asked(base, folder, tmp_path):
    arms = {"alone": {}, "taught": {"objective": Distillation(teacher=str(folder))}}
    results = trained(tmp_path, base, arms)
    metrics = {result["arm"]: result["metrics"] for result in results}
    assert set(metrics["alone"]) == set(metrics["taught"]), "scored alike"
    assert metrics["alone"]["valid/loss"] != metrics["taught"]["valid/loss"]
    assert {result["status"] for result in results} == {"done"}
    asked = {result["arm"]: result["provenance"]["teacher"] for result in results}
    assert asked["alone"] is None and asked["taught"].startswith("teacher-final-") and asked["taught"].endswith(" at step 6")
    other = tmp_path / "other"
    trained(other, override(base, {"model.position": Rope(), "seed": 5}), {"teacher": {}})
    folder.rename(folder.with_name("gone"))
    try:
        other.rename(folder)
        with pytest.raises(ConfigError, match=r"belongs to another experiment: corpora\.taught"):
            trained(tmp_path, base, arms)
        folder.rename(other)
    finally:
        folder.with_name("gone").rename(folder)


def test_another_tokenizer_and_what_is_no_teacher_are_refused(base, folder, tmp_path):
    def refused(sentence, given=base, **changes):
        taught = override(given, {"objective": Distillation(teacher=str(folder)), **changes})
        with pytest.raises(ConfigError, match=sentence):
            Runner(Ablation(question="?", base=taught), WorkFolder(tmp_path / "never")).check()

    refused("objective.teacher is .*, whose tokenizer is not this experiment's, so that ids mean", tokenizer=Characters())
    refused("objective.teacher is no model: give a folder", objective=Distillation(teacher=str(tmp_path)))
    (tmp_path / "trials").mkdir()
    refused("has no final trial that is done", objective=Distillation(teacher=str(tmp_path)))
    short = tmp_path / "short"
    trained(short, override(base, {"model.position": Learned(max_length=16), "data.sequence_length": 16}), {"short": {}})
    refused(
        r"objective.teacher cannot read these rows: .*max_length must be at least .* 32, got 16",
        objective=Distillation(teacher=str(short)),
    )


def test_a_teacher_trained_again_on_other_text_is_another(base, tmp_path):
    """By the same name, at the same step, from a file of the same name."""
    text, identities = tmp_path / "text.txt", []
    for words in (WORDS, WORDS[::-1]):
        text.write_text("\n".join(" ".join(words[(i * k) % len(words)] for k in range(1, 9)) for i in range(400)))
        work = tmp_path / words[0]
        trained(work, override(base, {"data.corpus": TextFiles(path=str(text))}), {"teacher": {}})
        identities.append(teachers.find(str(work), Distillation(), Bytes().fit(None, "")).identity)
    shutil.copytree(work, tmp_path / "copy")
    copied = teachers.find(str(tmp_path / "copy"), Distillation(), Bytes().fit(None, "")).identity
    first, second = (identity.partition(" (") for identity in identities)
    assert first[0] == second[0] and first[2] != second[2] and copied == identities[1]


def test_the_newest_checkpoint_of_a_teacher_is_read_or_none(folder, tmp_path):
    """Which one is asked is written down before it is read, so that an older one may not take its place."""
    shutil.copytree(folder, tmp_path / "own")
    found = teachers.find(str(tmp_path / "own"), Distillation(), Bytes().fit(None, ""))
    (data,) = (tmp_path / "own").glob("groups/*/checkpoints/6/state/manifest.ocdbt")
    shutil.copytree(data.parents[1], data.parents[2] / "3")
    data.write_bytes(b"damaged")
    with pytest.raises(ConfigError, match=r"step is 6, but the checkpoints of teacher-.* that were kept are of 3"):
        found.parameters(Mesh().build(jax.devices()[:1]))


def test_all_bytes_of_published_weights_tell_a_teacher(tmp_path, monkeypatch):
    """Two that differ at the beginning of files of 3 MB; what has been read is not read again until it changes."""
    shutil.copytree(GOLDEN / "gpt2", tmp_path / "first")
    shutil.copytree(GOLDEN / "gpt2", tmp_path / "second")
    for name, first in (("first", 0.0), ("second", 1.0)):
        tensors = {"a": np.full(1, first, np.float32), "b": np.zeros(700_000, np.float32)}
        safetensors.numpy.save_file(tensors, tmp_path / name / "model-00002-of-00002.safetensors")
    shutil.copytree(tmp_path / "first", tmp_path / "copy")
    identity = lambda name: teachers._published(tmp_path / name).identity  # noqa: E731
    assert identity("first") == identity("copy") != identity("second")
    with monkeypatch.context() as patch:
        patch.setattr("llm_jax.data.prepared.described", lambda file: pytest.fail("read again"))
        assert identity("first") == identity("copy")
    before = identity("second")
    safetensors.numpy.save_file({"a": np.zeros(1, np.float32)}, tmp_path / "second" / "model-00002-of-00002.safetensors")
    assert identity("second") != before


@pytest.mark.slow
def test_a_folder_of_hugging_face_teaches_as_the_trial_it_was_written_from(base, tmp_path):
    given = override(base, {"tokenizer": ByteLevelBPE(vocabulary=280), "model.position": Rope()})
    own, written = tmp_path / "own", tmp_path / "written"
    trained(own, given, {"teacher": {}})
    llm_jax.export(llm_jax.load(own), written)
    student = override(given, {"tokenizer": HuggingFace(path=str(written)), "seed": 1})
    refused = override(given, {"objective": Distillation(teacher=str(written))})
    with pytest.raises(ConfigError, match="whose tokenizer is not this experiment's"):
        Runner(Ablation(question="?", base=refused), WorkFolder(tmp_path / "never")).check()
    found = {}
    for name, path, tokenizer in (("own", own, given.tokenizer), ("written", written, student.tokenizer)):
        taught = override(student, {"tokenizer": tokenizer, "objective": Distillation(teacher=str(path))})
        (result,) = trained(tmp_path / name.upper(), taught, {"taught": {}})
        found[name] = result["metrics"]["valid/loss"]
    np.testing.assert_allclose(found["written"], found["own"], rtol=1e-5)


# ── on a mesh ────────────────────────────────────────────────────────────────────────────────────────────────────────
TEACHER = Teacher(Decoder(width=32, depth=2, attention=Attention(heads=4)), VOCABULARY + 1)


def found(read=None):
    params = initial_parameters(TEACHER.model, TEACHER.vocabulary, jax.random.key(7))
    return Found(TEACHER, "seven", read or (lambda where: jax.device_put(params, where)))


@pytest.mark.parametrize(
    "mesh, devices",
    [
        (Mesh(fsdp=2, population=2), 4),
        pytest.param(Mesh(population=2), 2, marks=pytest.mark.slow),
        pytest.param(Mesh(data=2, population=2), 4, marks=pytest.mark.slow),
    ],
    ids=["fsdp × population", "population", "data × population"],
)
def test_a_mesh_gives_the_numbers_of_one_device(mesh, devices):
    experiments = [tiny(objective=Distillation(temperature=2.0, top_k=3), seed=seed) for seed in range(2)]
    one = population.compile_population(experiments[0], 1, nameless(VOCABULARY), teacher=found(), devices=jax.devices()[:1])
    alone = [train(one, [e]) for e in experiments]
    spread = [override(e, {"mesh": mesh}) for e in experiments]
    several = population.compile_population(spread[0], 2, nameless(VOCABULARY), teacher=found(), devices=jax.devices()[:devices])
    together = train(several, spread)
    for member in range(2):
        _, losses, scored = alone[member]
        np.testing.assert_allclose(together[1][member], losses[0], rtol=2e-4)
        np.testing.assert_allclose(together[2][member], scored[0], rtol=2e-4)
    (taught,) = several.taught
    halves = [leaf for leaf in jax.tree.leaves(taught) if leaf.addressable_shards[0].data.size == leaf.size // 2]
    assert (len(halves) > 4) == (mesh.fsdp == 2), "what is split in its own training is split here"
    assert all(leaf.ndim == reference.ndim for leaf, reference in zip(*map(jax.tree.leaves, (taught, found().shapes)), strict=True))


@pytest.mark.slow
def test_logits_by_blocks_of_tokens_are_those_of_one_device_on_a_mesh(monkeypatch):
    experiment = tiny(objective=Distillation(temperature=2.0))
    whole = population.compile_population(experiment, 1, nameless(VOCABULARY), teacher=found(), devices=jax.devices()[:1])
    _, losses, _ = train(whole, [experiment])
    monkeypatch.setattr(platform, "CPU", replace(platform.CPU, logits_at_once=4 * VOCABULARY, tokens_at_once=2))
    spread = override(experiment, {"mesh": Mesh(data=2, fsdp=2)})
    several = population.compile_population(spread, 1, nameless(VOCABULARY), teacher=found(), devices=jax.devices()[:4])
    np.testing.assert_allclose(train(several, [spread])[1], losses, rtol=2e-4)


def test_its_parameters_are_read_once_for_all_programs_of_a_mesh():
    calls = []
    one = found(lambda where: calls.append(where) or where)
    meshes = [Mesh().build(jax.devices()[:1]), Mesh().build(jax.devices()[:1]), Mesh(data=2).build(jax.devices()[:2])]
    assert [one.parameters(mesh) is calls[k] for mesh, k in zip(meshes, (0, 0, 1), strict=True)] == [True] * 3 and len(calls) == 2


def test_asking_costs_a_forward_pass_and_its_parameters():
    experiment = tiny()
    plain, taught = (plan.cost(experiment, VOCABULARY, teacher=teacher) for teacher in (None, TEACHER))
    tokens = experiment.train.steps * experiment.data.batch_size * LENGTH
    each = count.flops_per_token(TEACHER.model, TEACHER.vocabulary, LENGTH)
    assert taught.flops - plain.flops == pytest.approx(tokens * each / 3)
    assert taught.shared == 4 * count.parameters(TEACHER.model, TEACHER.vocabulary)
    assert replace(taught, flops=plain.flops, shared=0.0) == plain


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_better_teacher_helps_where_there_is_little_text(tmp_path):
    """Two seeds each, on 6 kB of text; the teacher has read 60 times as much."""
    rng, odds = np.random.default_rng(0), 1.0 / np.arange(1, len(WORDS) + 1)
    for name, lines in (("much.txt", 8000), ("little.txt", 140)):
        (tmp_path / name).write_text("\n".join(" ".join(rng.choice(WORDS, 8, p=odds / odds.sum())) for _ in range(lines)))
    much = Experiment(
        data=Data(corpus=TextFiles(path=str(tmp_path / "much.txt")), sequence_length=64, batch_size=4),
        model=Decoder(width=32, depth=2, attention=Attention(heads=2)),
        optimizer=AdamW(learning_rate=8e-3),
        train=Train(steps=240, log_every=60),
        evaluation=Evaluation(every=240, bytes=16_384),
        checkpoints=Checkpoints(every=240),
    )
    (best,) = trained(tmp_path / "teacher", much, {"teacher": {}})
    few = override(much, {"data.corpus.path": str(tmp_path / "little.txt"), "data.corpus.valid_fraction": 0.3})
    taught = Distillation(teacher=str(tmp_path / "teacher"), weight=0.9)
    arms = {"alone": {"objective": NextToken()}, "taught": {"objective": taught}}
    results = trained(tmp_path / "students", few, arms, seeds=2)
    scores = {arm: [r["metrics"]["valid/bits_per_byte"] for r in results if r["arm"] == arm] for arm in arms}
    assert max(scores["taught"]) < min(scores["alone"]), (scores, best["metrics"]["valid/bits_per_byte"])
