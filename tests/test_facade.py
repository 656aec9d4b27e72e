"""The object that a user types first, against golden logits, sums by hand, loops without a cache, and what a run wrote down."""

import dataclasses
import functools
import json
import pathlib
import re
import shutil
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import llm_jax
from llm_jax import LM, Greedy, Sample
from llm_jax.core.config import ConfigError
from llm_jax.core.mesh import Mesh
from llm_jax.core.sharding import unbox
from llm_jax.data.corpora import TextFiles
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import Bytes, Characters, SentencePiece
from llm_jax.io import checkpoint, tokenizer_json
from llm_jax.io.huggingface.family import normal
from llm_jax.io.pretrained import shardings
from llm_jax.lab import Ablation, Arms, Experiment
from llm_jax.lab.experiment import Checkpoints, Evaluation
from llm_jax.lab.runner import Runner
from llm_jax.lab.sources import Sources
from llm_jax.lab.workfolder import WorkFolder
from llm_jax.models.decoder import Decoder
from llm_jax.models.heads import LanguageModel
from llm_jax.models.model import abstract_parameters
from llm_jax.nn.dispatch import Capacity
from llm_jax.nn.embedding import Embed
from llm_jax.nn.ffn import Dense
from llm_jax.nn.moe import MoE
from llm_jax.nn.multihead import Attention
from llm_jax.nn.position import Alibi, Learned
from llm_jax.optim.optimizers import ScheduleFreeAdamW
from llm_jax.train.pretrain import Train

GOLDEN = pathlib.Path(__file__).parent / "golden" / "huggingface"
TEXT = "the quick brown fox jumps over the lazy dog while many small numbers add up"


@functools.cache
def golden(case: str) -> tuple[LM, dict[str, np.ndarray]]:
    return llm_jax.load(GOLDEN / case), load_file(GOLDEN / case / "expected.safetensors")


def rows(values: np.ndarray, mask: np.ndarray) -> list[list]:
    """Without padding, wherever it stood."""
    return [row[real.astype(bool)].tolist() for row, real in zip(values, mask, strict=True)]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)


def test_the_package_is_imported_without_jax():
    code = "import llm_jax, sys; assert 'load' in dir(llm_jax); assert 'jax' not in sys.modules; llm_jax.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.strip().endswith("AttributeError: module 'llm_jax' has no attribute 'nothing'"), done.stderr


# ── what it says ─────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("case", ["gpt2", "llama", "mixtral", "t5", "bert", "bert-sequence", "bert-token", "llama-sequence"])
def test_logits_of_rows_of_several_lengths_are_those_of_transformers(case):
    lm, given = golden(case)
    tokens = rows(given["tokens"], given["mask"])
    targets = rows(given["targets"], given["target_mask"]) if "targets" in given else None
    types = rows(given["types"], given["mask"]) if "types" in given else None
    said = lm.logits(tokens, targets, types=types)
    assert said.dtype == np.float32
    if given["logits"].ndim == 2:
        np.testing.assert_allclose(said, given["logits"], rtol=0, atol=1e-4)
        return
    lengths = list(map(len, targets or tokens))
    assert said.shape == (len(tokens), max(lengths), given["logits"].shape[-1]) and len(set(lengths)) > 1
    for mine, theirs, mask, length in zip(said, given["logits"], given.get("target_mask", given["mask"]), lengths, strict=True):
        np.testing.assert_allclose(mine[:length], theirs[mask.astype(bool)], rtol=0, atol=1e-4)
        assert (mine[length:] == 0).all()


@pytest.mark.parametrize("case", ["llama", "t5"])
def test_loglikelihood_is_the_sum_over_the_continuation_however_it_is_batched(case):
    lm, _ = golden(case)
    pairs = [([3, 4, 5], [6, 7]), ([8], [9, 3, 2, 11]), ([1] * 20, [5]), ([2, 3], [4, 4]), ([7, 9, 9], [])]
    expected = []
    for context, continuation in pairs:
        if case == "t5":
            said, begin = lm.logits([context], [[0, *continuation]]), 1
        else:
            said, begin = lm.logits([context + continuation]), len(context)
        expected.append(sum(log_softmax(said[0])[begin - 1 + i, token] for i, token in enumerate(continuation)))
    contexts, continuations = zip(*pairs, strict=True)
    for size in (1, 2, 8):
        found = lm.loglikelihood(contexts, continuations, batch_size=size)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    alone = lm.loglikelihood(*pairs[0])
    assert isinstance(alone, float) and alone == pytest.approx(expected[0], abs=1e-5)
    choices = lm.loglikelihood(contexts[0], [[6, 7], [5]])
    np.testing.assert_allclose(choices, [expected[0], lm.loglikelihood(contexts[0], [5])], rtol=1e-5)


@functools.cache
def final_hidden(case: str, row: tuple[int, ...]) -> np.ndarray:
    """`[L, D]` of a row alone, without padding."""
    lm, _ = golden(case)
    network, tokens = lm.config.build(lm.vocabulary), np.array([row])
    if lm.config.encodes:
        return np.asarray(jax.jit(lambda p: network.apply({"params": p}, tokens, method="encode").hidden)(lm.params))[0]
    _, sown = jax.jit(lambda p: network.apply({"params": p}, tokens, mutable=["intermediates"]))(lm.params)
    return np.asarray(sown["intermediates"]["hidden"][0])[0]


@pytest.mark.parametrize("case", ["gpt2", "bert", "t5"])
def test_a_text_is_embedded_as_the_mean_of_its_final_hidden_states(case):
    lm, given = golden(case)
    tokens = rows(given["tokens"], given["mask"])
    for pooling, pooled in {"mean": lambda x: x.mean(0), "first": lambda x: x[0], "last": lambda x: x[-1]}.items():
        found = lm.embed(tokens, pooling=pooling, batch_size=2)
        assert found.shape == (3, lm.config.final.width) and found.dtype == np.float32
        for row, vector in zip(tokens, found, strict=True):
            np.testing.assert_allclose(vector, pooled(final_hidden(case, tuple(row))), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["gpt2", "deepseek-v3", "t5"])
def test_generation_is_the_loop_that_reads_everything_again(case):
    lm, _ = golden(case)
    prompts, new = [[3, 4, 5, 6], [7], [2, 2, 9]], 5
    found = lm.generate(prompts, max_new_tokens=new, end=())
    for prompt, ids in zip(prompts, found, strict=True):
        row = [0] if case == "t5" else list(prompt)
        for _ in range(new):
            said = lm.logits([prompt], [row]) if case == "t5" else lm.logits([row])
            row.append(int(said[0, -1].argmax()))
        assert row[-new:] == ids
    assert lm.generate(prompts[0], max_new_tokens=new, end=()) == found[0]


def test_what_cannot_be_asked_is_refused_in_a_sentence(tmp_path):
    lm, _ = golden("gpt2")
    for call, sentence in {
        lambda: lm.logits("a text"): "token ids are what this model takes, got 'a text': .*gpt2 has no tokenizer",
        lambda: lm.logits([[3, 23]]): "a token id is 23, but there are only 0 … 22",
        lambda: lm.logits([[1], []]): "a text has nothing in it",
        lambda: lm.logits([[1] * 17]): "a row takes 17 tokens, but the model has learned only 16 positions",
        lambda: lm.loglikelihood([[1], [2]], [[3], [4], [5]]): "continuation has 3 texts, but context has 2",
        lambda: lm.generate([1] * 10, max_new_tokens=7): "10 tokens with max_new_tokens=7 takes 17 tokens",
        lambda: golden("t5")[0].logits([[1]]): "targets is missing",
        lambda: lm.logits([[1]], [[2]]): "targets are what an encoder-decoder reads, and this model has one stack",
        lambda: lm.logits([[1]], types=[[0]]): "types are kinds of tokens, and this model has none",
        lambda: golden("t5")[0].logits([[1]], [[0]], types=[[0]]): "types are kinds of tokens, and this model has none",
        lambda: golden("bert")[0].logits([[3, 4]], types=[[0, 5]]): "types has 5, but there are only 0 … 1",
        lambda: golden("bert")[0].logits([[3, 4]], types=[[-1, 1]]): "types has -1, but there are only 0 … 1",
        lambda: golden("bert")[0].logits([[3, 4], [5]], types=[[0, 1], [1, 1]]): r"types has rows of \[2, 2\] kinds, .* \[2, 1\]",
        lambda: golden("bert")[0].logits([[3, 4]], types=[[0, 1], [1]]): r"types has rows of \[2, 1\] kinds, .* \[2\] tokens",
        lambda: golden("t5")[0].logits([[1]], [[0, 99]]): "a token id is 99, but there are only 0 … 22",
        lambda: golden("bert")[0].generate([1]): "model is not causal",
        lambda: golden("bert")[0].loglikelihood([1], [2]): "model is not causal",
        lambda: lm.logits([[1]], batch_size=0): "batch_size must be > 0, got 0",
        lambda: lm.loglikelihood([1], []): "continuation has nothing in it",
        lambda: lm.embed([[1]], pooling="max"): "pooling must be 'first' . 'last' . 'mean', got 'max'",
        lambda: lm.generate([1], seed="a"): "seed must be int, got 'a'",
        lambda: lm.generate([1], end=3): "end must be a list of token ids, got 3",
        lambda: lm.generate([1], sampling="greedy"): "sampling must be Greedy . Sample . None, got 'greedy'",
        lambda: llm_jax.load(tmp_path): "is no model: give a folder with a config.json",
        lambda: llm_jax.load(GOLDEN / "gpt2", arm="a"): "is a model of Hugging Face, which has no arms",
        lambda: llm_jax.export(lm, tmp_path / "x", format="onnx"): "format must be 'huggingface', got 'onnx'",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            call()


@pytest.mark.parametrize("case", ["llama", "t5"])
def test_a_model_is_split_over_a_mesh_and_computes_in_bfloat16_where_that_is_asked(case):
    plain, given = golden(case)
    targets = [[0, 3]] * 3 if case == "t5" else None
    tokens = rows(given["tokens"], given["mask"])
    split = llm_jax.load(GOLDEN / case, mesh=Mesh(data=1, fsdp=4, tensor=2))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(split.params)} == {8}
    np.testing.assert_allclose(split.logits(tokens, targets), plain.logits(tokens, targets), rtol=1e-5, atol=1e-5)
    half = llm_jax.load(GOLDEN / case, dtype="bfloat16", compute="bfloat16")
    assert {stack.precision.compute for stack in half.config.stacks.values()} == {"bfloat16"}
    wide = llm_jax.load(GOLDEN / case, dtype="bfloat16").logits(tokens, targets)
    apart = np.abs(half.logits(tokens, targets) - wide).max()
    assert 1e-4 < apart < 0.1 * np.abs(wide).max()


# ── with a tokenizer ─────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> TextFiles:
    words, folder = TEXT.split(), tmp_path_factory.mktemp("corpus")
    lines = [" ".join(words[(i * k) % len(words)] for k in range(1, 9)) for i in range(600)]
    (folder / "text.txt").write_text("\n".join(lines))
    return TextFiles(path=str(folder / "text.txt"))


@pytest.fixture(scope="module")
def speller(corpus) -> LM:
    """A GPT-2 over bytes, whose weights are random."""
    config = Decoder(
        width=16,
        depth=1,
        attention=Attention(heads=2, bias=True),
        ffn=Dense(bias=True),
        position=Learned(max_length=64),
        embedding=Embed(scaled=False),
    )
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32) * 0.5, unbox(abstract_parameters(config, 257)))
    return LM(config, 257, params, Bytes().fit(corpus, "."), end=(256,), start=256)


def test_texts_and_ids_mean_the_same(speller):
    ids = list(TEXT[:9].encode())
    np.testing.assert_array_equal(speller.logits(TEXT[:9]), speller.logits(ids))
    np.testing.assert_array_equal(speller.embed([TEXT[:9]]), speller.embed(ids))
    assert speller.loglikelihood("the", " fox") == speller.loglikelihood([*b"the"], [*b" fox"])
    assert speller.loglikelihood("", "fox") == speller.loglikelihood([256], "fox")
    way = Sample(temperature=1.5, top_p=0.9)
    drawn = speller.generate([[*b"the"], [*b"a"]], max_new_tokens=12, sampling=way, seed=3)
    assert speller.generate(["the", "a"], max_new_tokens=12, sampling=way, seed=3) == [
        speller.tokenizer.decode(ids) for ids in drawn
    ]
    assert drawn == speller.generate([[*b"the"], [*b"a"]], max_new_tokens=12, sampling=way, seed=3, batch_size=1)
    assert drawn != speller.generate([[*b"the"], [*b"a"]], max_new_tokens=12, sampling=way, seed=4)
    assert speller.generate("the", max_new_tokens=4) == speller.generate("the", max_new_tokens=4, sampling=Greedy())


def test_generation_ends_where_the_model_says_so(speller):
    free = speller.generate([*b"the quick"], max_new_tokens=12, end=())
    end = free[4]
    assert speller.generate([*b"the quick"], max_new_tokens=12, end=[end]) == free[: free.index(end) + 1]


def test_its_name_says_what_it_is(speller):
    assert repr(speller) == f"LM(Decoder, 1 layers × 16, {sum(x.size for x in jax.tree.leaves(speller.params)):,} parameters, " + (
        "257 tokens (Bytes), from memory)"
    )


def test_rows_that_compete_for_experts_are_computed_alone():
    config = Decoder(
        width=8, depth=1, attention=Attention(heads=2), ffn=MoE(experts=2, dispatch=Capacity(factor=0.6, over="batch"))
    )
    draw = np.random.default_rng(0)
    params = jax.tree.map(lambda x: draw.normal(size=x.shape).astype(np.float32), unbox(abstract_parameters(config, 11)))
    lm, tokens = LM(config, 11, params), [[1, 2, 3, 4, 5, 6], [7, 8, 9], [1, 1, 1]]
    said = lm.logits(tokens)
    for row, mine in zip(tokens, said, strict=True):
        alone = jax.jit(lambda p, row=row: config.build(11).apply({"params": p}, np.array([row])))(params)[0]
        np.testing.assert_allclose(mine[: len(row)], alone, atol=1e-5)


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<s>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "</s>", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
    "special_tokens": {name: {"id": name, "ids": [i], "tokens": [name]} for name, i in {"<s>": 1, "</s>": 2}.items()},
}


@pytest.mark.parametrize("case", ["llama", "bert"])
def test_a_tokenizer_puts_its_own_tokens_around_a_text(case, tmp_path):
    """A model that goes on from a text gets none behind it; and what two texts are joined to is what is scored."""
    shutil.copytree(GOLDEN / case, tmp_path / "m")
    pieces = ["<pad>", "<s>", "</s>", *"abcdefg", "ab", "bc"]
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model = {"type": "BPE", "vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": [["a", "b"], ["b", "c"]]}
    added = [{"id": i, "content": pieces[i]} | special for i in range(3)]
    described = {"version": "1.0", "added_tokens": added, "post_processor": TEMPLATE, "decoder": {"type": "Fuse"}, "model": model}
    (tmp_path / "m" / "tokenizer.json").write_text(json.dumps(described))
    lm = llm_jax.load(tmp_path / "m")
    assert (lm.before, lm.after) == ((1,), (2,))
    around = [1, 10, 5] if case == "llama" else [1, 10, 5, 2]
    np.testing.assert_array_equal(lm.embed("abc"), lm.embed([around]))
    if case == "llama":
        assert lm.loglikelihood("ca", "bd") == pytest.approx(lm.loglikelihood([1, 5], [10, 6]))
        assert lm.loglikelihood("", "d") == pytest.approx(lm.loglikelihood([1], [6]))
        text, ids = (lm.generate(prompt, max_new_tokens=6, end=()) for prompt in ("abc", around))
        assert text == "".join(pieces[i] for i in ids if 3 <= i < len(pieces))


@pytest.mark.parametrize(
    "case, said, around",
    [
        ("llama", {}, ((1,), ())),
        ("llama", {"add_bos_token": False, "add_eos_token": True, "eos_token": {"content": "</s>"}}, ((), (2,))),
        ("t5", {}, ((), (2,))),
    ],
)
def test_a_sentencepiece_model_alone_has_its_class_put_tokens_around_a_text(case, said, around, tmp_path):
    import sentencepiece

    shutil.copytree(GOLDEN / case, tmp_path / "m")
    name = "spiece" if case == "t5" else "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the fox has a hat"] * 9),
        model_prefix=str(tmp_path / "m" / name),
        vocab_size=23,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    if said:
        (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(said))
    lm = llm_jax.load(tmp_path / "m")
    assert (lm.before, lm.after) == around
    ids = lm.tokenizer.encode("the fox").tolist()
    np.testing.assert_array_equal(lm.embed("the fox"), lm.embed([*around[0], *ids, *(around[1] if case == "t5" else ())]))


def test_vocabularies_without_a_tokenizer_json(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    for case in ("gpt2", "bert", "llama"):
        shutil.copytree(GOLDEN / case, tmp_path / case)
    pairs, words = tokenizers.ByteLevelBPETokenizer(), tokenizers.BertWordPieceTokenizer()
    for trained, case, specials in (
        (pairs, "gpt2", ["<|endoftext|>"]),
        (words, "bert", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]),
    ):
        trained.train_from_iterator([TEXT] * 9, vocab_size=290, special_tokens=specials, show_progress=False)
        trained.save_model(str(tmp_path / case))
    found = {case: llm_jax.load(tmp_path / case) for case in ("gpt2", "bert")}
    text = "The Quick fóx, it's 12  jumps"
    assert found["gpt2"].tokenizer.encode(text).tolist() == pairs.encode(text).ids
    assert found["bert"].tokenizer.encode(text).tolist() == words.encode(text, add_special_tokens=False).ids
    assert (found["gpt2"].before, found["gpt2"].after, found["bert"].before, found["bert"].after) == ((), (), (2,), (3,))
    shutil.copy(tmp_path / "gpt2" / "vocab.json", tmp_path / "llama")
    lm = llm_jax.load(tmp_path / "llama")
    assert lm.logits([[1, 2]]).shape == (1, 2, 23)
    with pytest.raises(ConfigError, match=r"vocab.json of a tokenizer of llama and no tokenizer.json: write one with `AutoTok"):
        lm.logits("a")


# ── export ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("case", ["mistral", "t5-gated", "bert-sequence"])
def test_what_is_exported_is_loaded_again(case, tmp_path):
    lm, _ = golden(case)
    llm_jax.export(lm, tmp_path / "out")
    again = llm_jax.load(tmp_path / "out")
    same = ("config", "vocabulary", "end", "start", "family")
    assert [getattr(again, name) for name in same] == [getattr(lm, name) for name in same]
    jax.tree.map(np.testing.assert_array_equal, again.params, lm.params)
    before, after = (json.loads((where / "config.json").read_text()) for where in (GOLDEN / case, tmp_path / "out"))
    assert after["model_type"] == before["model_type"]


def test_a_model_made_here_is_exported_with_its_tokenizer(speller, tmp_path):
    llm_jax.export(speller, tmp_path / "out")
    again = llm_jax.load(tmp_path / "out")
    assert (normal(again.config), again.family, again.end, again.start) == (normal(speller.config), "gpt2", (256,), 256)
    text = "naïve ▁ <|endoftext|> 日本\n\t"
    assert again.tokenizer.encode(text).tolist() == speller.tokenizer.encode(text).tolist() and again.tokenizer.end == 256
    assert again.loglikelihood("the quick", text) == pytest.approx(speller.loglikelihood("the quick", text))
    llm_jax.export(again, tmp_path / "twice")
    assert llm_jax.load(tmp_path / "twice").generate("fox", max_new_tokens=9) == speller.generate("fox", max_new_tokens=9)


def test_what_no_family_computes_is_said_in_a_sentence(speller, tmp_path):
    other = dataclasses.replace(speller, config=dataclasses.replace(speller.config, position=Alibi()))
    with pytest.raises(ConfigError, match="position is a Alibi, gpt2 has Learned"):
        llm_jax.export(other, tmp_path / "out", family="gpt2")
    with pytest.raises(ConfigError, match=r"model is like no family of gpt2, .* The nearest: bloom has "):
        llm_jax.export(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind",
    [Bytes(), Characters(), SentencePiece(vocabulary=300), SentencePiece(vocabulary=300, kind="unigram")],
    ids=["bytes", "characters", "bpe", "unigram"],
)
def test_a_tokenizer_json_does_what_the_tokenizer_does(kind, corpus, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    fitted = kind.fit(corpus, tmp_path / "cache")
    files = tokenizer_json.write(fitted, tmp_path)
    assert [file.name for file in files] == ["tokenizer.json", "tokenizer_config.json"]
    theirs = tokenizers.Tokenizer.from_file(str(files[0]))
    known = ["the lazy dog\nthe quick", "  numbers  add", "n", pathlib.Path(corpus.path).read_text()[:2000]]
    unseen = [] if isinstance(kind, Characters) else ["Übergröße — 日本", "a\tb"]
    for text in known + unseen:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ids == fitted.encode(text).tolist(), text
        assert theirs.decode(ids) == text
    assert theirs.get_vocab_size() == fitted.vocabulary


# ── what was trained here ────────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def work(corpus, tmp_path_factory):
    """A work folder of two arms, two steps each, and the ablation."""
    base = Experiment(
        data=Data(corpus=corpus, sequence_length=16, batch_size=8),
        model=Decoder(width=16, depth=1, attention=Attention(heads=2), head=LanguageModel(tied=False)),
        train=Train(steps=2, log_every=2, clip=None),
        evaluation=Evaluation(every=2, bytes=256),
        checkpoints=Checkpoints(every=2),
    )
    arms = {
        "averaged": {"train.average": 0.5, "model.layers": "scanned"},
        "schedule free": {"optimizer": ScheduleFreeAdamW(learning_rate=0.1)},
    }
    ablation = Ablation(question="Does it load?", base=base, scientific=Arms(arms), seeds=2)
    folder = tmp_path_factory.mktemp("work") / "w"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_JAX_CACHE", str(folder.parent / "cache"))
        assert [r["status"] for r in Runner(ablation, WorkFolder(folder), note=print).run()] == ["done"] * 4
        yield folder, ablation


def results(folder):
    return [json.loads(file.read_text()) for file in sorted(folder.glob("trials/*/results.json"))]


def test_every_trial_scores_what_its_evaluation_wrote_down(work):
    """The right member of its group, and the parameters that were evaluated: averages where there are any."""
    folder, ablation = work
    for result in results(folder):
        lm = llm_jax.load(folder, trial=result["trial"])
        batches = Sources().of(ablation.experiment(result["arm"])).evaluations(final=True)["valid"]
        tokens, targets, weights = (np.asarray(x) for x in (batches.tokens, batches.targets, batches.weights))
        log_p = log_softmax(lm.logits(tokens.reshape(-1, tokens.shape[-1]).tolist())).reshape(*tokens.shape, -1)
        nll = -np.take_along_axis(log_p, targets[..., None], -1)[..., 0]
        loss = (nll * weights).sum() / weights.sum()
        assert loss == pytest.approx(result["metrics"]["valid/loss"], abs=2e-5), result["trial"]


def test_a_trial_is_read_by_each_device_as_far_as_it_holds_it(work, monkeypatch):
    """Over eight, bit for bit what one holds, or the same arithmetic; of its group only the trials before it come along."""
    folder, _ = work
    read, seen = checkpoint.read, []
    monkeypatch.setattr(checkpoint, "read", lambda *given, **more: seen.append(read(*given, **more)) or seen[-1])
    for result in results(folder):
        split = llm_jax.load(folder, trial=result["trial"], mesh=Mesh(data=1, fsdp=4, tensor=2))
        members = json.loads((folder / "groups" / result["provenance"]["group"] / "members.json").read_text())
        ((_, state),) = seen
        matrices = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 3]
        assert matrices and {leaf.shape[0] for leaf in matrices} == {members.index(result["trial"]) + 1}
        assert max(leaf.addressable_shards[0].data.size / leaf.size for leaf in matrices) <= 1 / 4
        seen.clear()
        alone = llm_jax.load(folder, trial=result["trial"])
        seen.clear()
        assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(split.params)} == {8}
        apart = 0 if result["arm"] == "averaged" else 1e-6  # compiled, what is made of the optimizer is rounded otherwise
        jax.tree.map(partial(np.testing.assert_allclose, rtol=apart, atol=apart / 10), split.params, alone.params)
        wanted = shardings(alone.config, alone.vocabulary, Mesh(data=1, fsdp=4, tensor=2))
        assert all(jax.tree.leaves(jax.tree.map(lambda leaf, to: leaf.sharding == to, split.params, wanted)))


def test_the_best_final_trial_is_taken_of_all_or_of_an_arm(work):
    folder, _ = work
    known = results(folder)
    for arm in (None, "averaged", "schedule free"):
        best = min((r for r in known if arm in (None, r["arm"])), key=lambda r: r["metrics"]["valid/bits_per_byte"])
        assert llm_jax.load(folder, arm=arm).source == f"{best['trial']} at step 2"
    name = known[3]["trial"]
    assert llm_jax.load(folder / "trials" / name).source == llm_jax.load(folder, trial=name).source == f"{name} at step 2"
    lm = llm_jax.load(folder)
    assert (lm.vocabulary, lm.end, lm.start) == (257, (256,), 256) and isinstance(lm.generate("the", max_new_tokens=3), str)


README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_what_the_readme_shows_is_true_of_what_was_trained(work, tmp_path, monkeypatch):
    (block,) = re.findall(r"```python\n(import llm_jax\n.*?)```", README, re.DOTALL)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "c06").symlink_to(work[0])
    monkeypatch.chdir(tmp_path)
    said: dict = {}
    exec(block, said)
    again, tokens = llm_jax.load("folder"), [[1, 2, 3], [4, 5]]
    assert again.family == "gpt_neox" and (again.end, again.start) == (said["lm"].end, said["lm"].start)
    np.testing.assert_allclose(again.logits(tokens), said["lm"].logits(tokens), rtol=0, atol=1e-4)
    assert again.generate("the", max_new_tokens=4) == said["lm"].generate("the", max_new_tokens=4)


def test_what_is_missing_is_named(work, tmp_path):
    shutil.copytree(work[0], tmp_path / "w")
    group = results(work[0])[0]["provenance"]["group"]
    name = results(work[0])[0]["trial"]
    checkpoint = tmp_path / "w" / "groups" / group / "checkpoints"
    largest = max((f for f in checkpoint.rglob("state/**/*") if f.is_file()), key=lambda f: f.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    for call, sentence in {
        lambda: llm_jax.load(tmp_path / "w", arm="alibi"): "has no final trial of 'alibi': its arms are averaged, schedule free",
        lambda: llm_jax.load(tmp_path / "w", trial=f"{name}x"): f"has no finished trial '{name}x': did you mean {name}",
        lambda: llm_jax.load(tmp_path / "w", trial=name): f"holds no whole checkpoint of {name}: remove its results.json",
    }.items():
        with pytest.raises(ConfigError, match=sentence):
            call()
    shutil.rmtree(checkpoint.parent)
    with pytest.raises(ConfigError, match=f"is gone, with the parameters of {name}: remove its results.json"):
        llm_jax.load(tmp_path / "w", trial=name)


@pytest.mark.parametrize(
    "call, sentence",
    [
        (lambda lm: lm.logits([[1.9]]), "a token id must be a whole number, got 1.9: ids and texts go one a row"),
        (lambda lm: lm.loglikelihood([[1], [2]], [["c"], ["d"]]), "a token id must be a whole number, got 'c'"),
        (lambda lm: lm.generate(None), "a text must be a string, token ids, or a list of such, got None"),
        (lambda lm: lm.generate(5), "a text must be a string, token ids, or a list of such, got 5"),
        (
            lambda lm: llm_jax.load(GOLDEN / "gpt2", dtype="bfloat17"),
            "dtype must be 'float32' | 'bfloat16' | 'float16', got 'bfloat17'",
        ),
        (lambda lm: llm_jax.load(GOLDEN / "gpt2", mesh="fsdp"), "mesh must be Mesh | None, got 'fsdp'"),
        (lambda lm: llm_jax.load(GOLDEN / "gpt2", trial=99), "trial must be str | None, got 99"),
    ],
)
def test_what_is_of_the_wrong_kind_is_a_sentence(call, sentence):
    with pytest.raises(ConfigError) as error:
        call(golden("gpt2")[0])
    assert sentence in str(error.value)
