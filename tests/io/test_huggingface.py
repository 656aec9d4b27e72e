"""Folders of transformers, against the logits that it computes: golden models (`tests/golden/make_huggingface.py`), both ways."""

import dataclasses
import functools
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from llm_jax.core.config import ConfigError
from llm_jax.core.mesh import Mesh
from llm_jax.core.sharding import named, parameter_specs
from llm_jax.io import huggingface
from llm_jax.io.huggingface import arrays, layouts, weights
from llm_jax.io.huggingface.family import normal
from llm_jax.models.block import Layer
from llm_jax.models.count import parameters
from llm_jax.models.decoder import Decoder
from llm_jax.models.encoder_decoder import EncoderDecoder
from llm_jax.models.heads import LanguageModel, TokenClassifier
from llm_jax.models.model import abstract_parameters, unstack_layers
from llm_jax.models.mup import MuP
from llm_jax.nn.attention import Chunked, SlidingWindow
from llm_jax.nn.dispatch import Capacity
from llm_jax.nn.embedding import Embed
from llm_jax.nn.ffn import Dense, Gated
from llm_jax.nn.moe import MoE
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import LayerNorm, RMSNorm
from llm_jax.nn.position import Alibi, Learned, Rope
from llm_jax.nn.residual import ReZero, Scaled
from llm_jax.nn.rope import NtkScaling
from tests.io.published import CONFIGS
from tests.quick import QUICK

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "huggingface"
CASES = sorted(folder.name for folder in GOLDEN.iterdir())


@functools.cache
def loaded(case):
    return huggingface.load(GOLDEN / case, layers="unrolled")


def logits(model, vocabulary, params, given):
    """As `transformers` is asked: padding hidden, positions counted from the first token that is none."""
    network, real = model.build(vocabulary), jnp.asarray(given["mask"])
    if isinstance(model, EncoderDecoder):
        more = {"input_segments_BM": real - 1, "segments_BL": jnp.asarray(given["target_mask"]) - 1}
        inputs = (given["tokens"], given["targets"])
    else:
        inputs, more = (given["tokens"], jnp.maximum(real.cumsum(-1) - 1, 0), real - 1), {"types_BL": given.get("types")}
    # these run once: half of the time that it would take to compile them well
    forward = jax.jit(lambda p: network.apply({"params": p}, *inputs, **more)).lower(params)
    return forward.compile(compiler_options=QUICK)(params)


def assert_equal_logits(actual, given, expected, tolerance=1e-4):
    real = given.get("target_mask", given["mask"]).astype(bool)
    mine, theirs = (np.asarray(x) if np.ndim(x) == 2 else np.asarray(x)[real] for x in (actual, expected))
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=tolerance)


def assert_equal_trees(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.fixture
def folder(tmp_path):
    """Makes a copy of a golden folder, with its tensors and configuration changed."""

    def copy(case, tensors=lambda found: found, config=lambda values: values):
        target = tmp_path / "copy"
        shutil.copytree(GOLDEN / case, target)
        save_file(tensors(load_file(target / "model.safetensors")), target / "model.safetensors")
        values = config(json.loads((target / "config.json").read_text()))
        (target / "config.json").write_text(json.dumps(values))
        return target

    return copy


# ── every family, both ways ──────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    given = load_file(GOLDEN / case / "expected.safetensors")
    assert_equal_logits(logits(*loaded(case), given), given, given["logits"])


WRITTEN_OTHERWISE = {
    "deepseek-v3-yarn": ("self_attn",),  # in pairs, however it was read
    "bert-untied": ("cls.predictions.bias",),  # which is not used
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_what_was_read(case, tmp_path):
    model, vocabulary, params = loaded(case)
    config = json.loads((GOLDEN / case / "config.json").read_text())
    carried = huggingface.settings(GOLDEN / case)
    huggingface.export(model, vocabulary, params, tmp_path / "out", family=config["model_type"], settings=carried)
    before, after = (load_file(where / "model.safetensors") for where in (GOLDEN / case, tmp_path / "out"))
    assert sorted(after) == sorted(before)
    for name, tensor in before.items():
        if not any(re.search(pattern, name) for pattern in WRITTEN_OTHERWISE.get(case, ())):
            np.testing.assert_array_equal(after[name], tensor, err_msg=name)
    again, size, values = huggingface.load(tmp_path / "out", layers="unrolled")
    assert (again, size) == (model, vocabulary)
    assert_equal_trees(values, params)
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: values[name] for name in carried.keys() - {"dtype"}} == {
        name: carried[name] for name in carried.keys() - {"dtype"}
    }


# ── arrays ───────────────────────────────────────────────────────────────────────────────────────────────────────────
@pytest.mark.parametrize(
    "case, small",
    [("gpt2", 1 << 20), ("gemma3", 1 << 20), ("qwen3-moe-sparse", 0), ("deepseek-v3-yarn", 1 << 20), ("t5-gated", 1 << 20)],
)
def test_scanned_layers_are_stacked_and_taken_apart(case, small, tmp_path, monkeypatch):
    model, vocabulary, params = loaded(case)
    monkeypatch.setattr(arrays, "SMALL", small)
    scanned, _, stacked = huggingface.load(GOLDEN / case, layers="scanned")
    assert scanned.scanned and scanned == model.with_layers("scanned")
    assert_equal_trees(unstack_layers(jax.tree.map(np.asarray, stacked), scanned), params)
    huggingface.export(scanned, vocabulary, stacked, tmp_path / "out")
    assert_equal_trees(huggingface.load(tmp_path / "out", layers="unrolled")[2], params)


@pytest.mark.parametrize("layers", ["unrolled", "scanned"])
@pytest.mark.parametrize("case", ["llama", "deepseek-v3"])
def test_every_device_gets_its_part(case, layers, tmp_path):
    whole, vocabulary, params = huggingface.load(GOLDEN / case, layers=layers)
    mesh = Mesh(data=1, fsdp=4, tensor=2).build()
    shardings = named(mesh, parameter_specs(abstract_parameters(whole, vocabulary), mesh))
    _, _, split = huggingface.load(GOLDEN / case, layers=layers, shardings=shardings)
    assert_equal_trees(split, params)
    jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(f"{x.sharding}"), split, shardings)
    huggingface.export(whole, vocabulary, split, tmp_path / "out")
    assert_equal_trees(huggingface.load(tmp_path / "out", layers=layers)[2], params)


def test_a_process_reads_only_what_its_devices_hold(monkeypatch):
    """Halves of the heads and of the inputs: a quarter of a query matrix is fetched; of every layer but one's, nothing."""
    folder = weights.Folder(GOLDEN / "mistral-full")
    model, vocabulary = huggingface.read_config(GOLDEN / "mistral-full")
    model = model.with_layers("scanned")
    rows = huggingface.FAMILIES["mistral"].rows(model, {})
    plan = huggingface.plans(rows, model, huggingface.parameter_shapes(model, vocabulary))["layers/step_0/attention/query/kernel"]
    fetched = []
    real = folder.read
    monkeypatch.setattr(folder, "read", lambda name, index: fetched.append((name, real(name, index))) or fetched[-1][1])
    index = (slice(1, 2), slice(4, 8), slice(0, 1), slice(0, 4))
    (part,) = arrays._part(arrays.Renamed(folder, ()), plan, index, [None], np.dtype("float32"))
    ((name, block),) = fetched
    assert name == "model.layers.1.self_attn.q_proj.weight" and block.shape == (4, 4)
    whole = huggingface.load(GOLDEN / "mistral-full", layers="scanned")[2]["layers"]["step_0"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(part, whole[index])


PROCESS = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[3]), heartbeat_timeout_seconds=10)
from llm_jax.core.mesh import Mesh
from llm_jax.core.sharding import named, parameter_specs
from llm_jax.io import huggingface
from llm_jax.io.huggingface import weights
from llm_jax.models.model import abstract_parameters
model, vocabulary = huggingface.read_config(sys.argv[1])
mesh = Mesh(data=1, fsdp=4).build()
shardings = named(mesh, parameter_specs(abstract_parameters(model, vocabulary), mesh))
count, real = 0, weights.Folder.read
def counted(folder, name, index):
    global count
    count += (found := real(folder, name, index)).nbytes
    return found
weights.Folder.read = counted
params = huggingface.load(sys.argv[1], shardings=shardings)[2]
total = jax.jit(lambda tree: sum(leaf.sum() for leaf in jax.tree.leaves(tree)))(params)
print(count, float(total))
"""


@pytest.mark.slow
def test_two_processes_read_half_each(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "PYTHONPATH": ".", "JAX_PLATFORMS": "cpu"}
    folder = str(GOLDEN / "llama-biases")
    command = [sys.executable, "-c", PROCESS, folder, address]
    runs = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True, env=os.environ | flags) for rank in range(2)]
    lines = [run.communicate(timeout=300)[0].splitlines()[-1] for run in runs]
    reads, totals = zip(*(map(float, line.split()) for line in lines), strict=True)
    file = load_file(GOLDEN / "llama-biases" / "model.safetensors")
    whole, once = (sum(t.nbytes for t in file.values() if t.ndim > least) for least in (0, 1))
    np.testing.assert_allclose(totals, sum(tensor.sum(dtype=np.float64) for tensor in file.values()), rtol=1e-5)
    assert max(reads) <= whole - once / 2  # vectors are whole on every device


def test_the_host_holds_about_one_tensor(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "SMALL", 1 << 16)
    depth, width = 6, 256
    model = Decoder(
        width=width, depth=depth, ffn=Gated(units=2048), norm=RMSNorm(), embedding=Embed(scaled=False), layers="scanned"
    )
    shapes = huggingface.parameter_shapes(model, 64)
    params = arrays.nested({path: jnp.zeros(shape) for path, shape in shapes.items()})
    tensor = 4 * width * 2048
    _, peak = traced(lambda: huggingface.export(model, 64, params, tmp_path / "out", max_shard_bytes=tensor))
    assert peak < 3.5 * tensor, peak / tensor
    _, peak = traced(lambda: huggingface.load(tmp_path / "out", layers="scanned"))
    # as read, transposed, and the one before, which the device lets go of when it is next spoken to
    assert peak < 3.5 * tensor < tensor * depth, peak / tensor


def traced(function):
    """Its result, and the most bytes that NumPy and Python held."""
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


BOUNDS = st.tuples(st.integers(0, 4), st.integers(0, 4)).map(sorted)
HEADS = layouts.transposed(1)
ARRANGED = {
    "same": layouts.same,
    "flat": layouts.flat(1),
    "two-inputs": layouts.flat(2),
    "transposed": HEADS,
    "transposed-two": layouts.transposed(2),
    "third-of-columns": layouts.part(layouts.flat(1), 1, 1, 3),
    "third-of-heads": layouts.part(HEADS, 0, 2, 3, before=1),
    "shuffled": layouts.shuffled(HEADS, 1, lambda size: (2, 0, 3, 1)),
}


@pytest.mark.parametrize("arrange", ARRANGED.values(), ids=ARRANGED)
@given(st.lists(BOUNDS, min_size=3, max_size=3))
@settings(max_examples=25, deadline=None)
def test_a_slice_read_is_the_slice_written(arrange, bounds):
    ours = np.arange(64.0).reshape(4, 4, 4)
    layout = arrange(ours.shape)
    tensor = np.full(layout.shape, np.nan)
    layout.write(tensor, ours)
    index = tuple(slice(*pair) for pair in bounds)
    np.testing.assert_array_equal(layout.read(lambda where: tensor[where], index), ours[index])


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────
def test_files_are_cut_and_put_together(tmp_path):
    model, vocabulary, params = loaded("mixtral")
    (tmp_path / "tokenizer.json").write_text("{}")
    files = huggingface.tokenizer_files(tmp_path)
    huggingface.export(model, vocabulary, params, tmp_path / "out", max_shard_bytes=2000, tokenizer_files=files)
    index = json.loads((tmp_path / "out" / weights.INDEX).read_text())
    written = {file.name: load_file(file) for file in sorted((tmp_path / "out").glob("*.safetensors"))}
    assert len(written) > 3 and set(index["weight_map"].values()) == set(written)
    assert all(name in written[file] for name, file in index["weight_map"].items())
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in written.values()]
    assert max(sizes) <= 2000 and sum(sizes) == index["metadata"]["total_size"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [*written, weights.INDEX, weights.CONFIG, "tokenizer.json"]
    )
    assert_equal_trees(huggingface.load(tmp_path / "out", layers="unrolled")[2], params)
    (tmp_path / "out" / sorted(written)[1]).unlink()
    with pytest.raises(ConfigError, match=r"lacks model-00002-of-0000..safetensors, which its index names"):
        huggingface.load(tmp_path / "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_files(dtype, tmp_path):
    model, vocabulary, params = loaded("qwen3")
    huggingface.export(model, vocabulary, params, tmp_path / "out", dtype=dtype)
    rounded = jax.tree.map(lambda x: np.asarray(x).astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype), params)
    assert_equal_trees(huggingface.load(tmp_path / "out", layers="unrolled", dtype=dtype)[2], rounded)
    wide = huggingface.load(tmp_path / "out", layers="unrolled")[2]
    assert {leaf.dtype for leaf in jax.tree.leaves(wide)} == {np.dtype("float32")}
    assert_equal_trees(wide, jax.tree.map(lambda x: x.astype(np.float32), rounded))


@pytest.mark.parametrize(
    "case, dtype, kept",
    [
        ("deepseek-v3", "bfloat16", {f"layers_1/ffn/router/{name}" for name in ("bias", "kernel")}),
        ("t5", "float16", {f"{stack}/layers_{i}/ffn/down/kernel" for stack in ("encoder", "decoder") for i in range(2)}),
        ("t5", "bfloat16", set()),
    ],
)
def test_what_transformers_keeps_in_float32_stays_so(case, dtype, kept, tmp_path):
    """In memory, and in the files that are written."""
    model, vocabulary, params = huggingface.load(GOLDEN / case, layers="unrolled", dtype=dtype)
    whole, leaves = (arrays.flatten(tree) for tree in (loaded(case)[2], params))
    assert {path for path, leaf in leaves.items() if leaf.dtype == np.float32} == kept
    huggingface.export(model, vocabulary, params, tmp_path / "out", dtype=dtype, max_shard_bytes=3000)
    again = arrays.flatten(huggingface.load(tmp_path / "out", layers="unrolled")[2])
    for path in kept:
        np.testing.assert_array_equal(leaves[path], whole[path])
        np.testing.assert_array_equal(again[path], whole[path])


def dropped(pattern):
    return lambda found: {name: tensor for name, tensor in found.items() if not re.search(pattern, name)}


def added(**more):
    return lambda found: found | {name.replace("__", "."): tensor for name, tensor in more.items()}


def renamed(pattern, replacement):
    return lambda found: {re.sub(pattern, replacement, name): tensor for name, tensor in found.items()}


def together(found):
    """Experts in one tensor, as the code of transformers 5 holds them."""
    rest = {re.sub("block_sparse_moe", "mlp", n): t for n, t in found.items() if ".experts." not in n}
    for layer in range(2):
        w1, w2, w3 = (
            np.stack([found[f"model.layers.{layer}.block_sparse_moe.experts.{e}.{w}.weight"] for e in range(4)])
            for w in ("w1", "w2", "w3")
        )
        rest |= {f"model.layers.{layer}.mlp.experts.gate_up_proj": np.concatenate([w1, w3], 1)}
        rest |= {f"model.layers.{layer}.mlp.experts.down_proj": w2}
    return rest


ZEROS = np.zeros((1, 1, 16, 16), np.float32)
OTHER_FILES = {
    "without-prefix": ("gpt2", renamed(r"^transformer\.", "")),
    "causal-masks": ("gpt2", added(transformer__h__0__attn__bias=ZEROS, transformer__h__1__attn__masked_bias=ZEROS)),
    "old-norms": (
        "bert",
        lambda found: renamed(r"LayerNorm\.bias", "LayerNorm.beta")(renamed(r"LayerNorm\.weight", "LayerNorm.gamma")(found)),
    ),
    "other-heads": (
        "bert",
        added(bert__pooler__dense__bias=ZEROS, cls__seq_relationship__weight=ZEROS, cls__predictions__decoder__bias=ZEROS),
    ),
    "rotary-buffers": ("llama", added(model__layers__0__self_attn__rotary_emb__inv_freq=ZEROS)),
    "neox-buffers": ("gpt-neox", added(gpt_neox__layers__0__attention__masked_bias=ZEROS)),
    "neox-head": ("gpt-neox", renamed("embed_out", "lm_head")),
    "tied-copy": ("qwen2-window", lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"]}),
    "t5-copies": (
        "t5",
        lambda found: found | {f"{tower}.embed_tokens.weight": found["shared.weight"] for tower in ("encoder", "decoder")},
    ),
    "experts-together": ("mixtral", together),
    "further-tokens": ("deepseek-v3", added(model__layers__2__eh_proj__weight=ZEROS)),
}


@pytest.mark.parametrize("case, change", OTHER_FILES.values(), ids=OTHER_FILES)
def test_files_of_other_versions(case, change, folder):
    model, _, params = huggingface.load(folder(case, change), layers="unrolled")
    assert model == loaded(case)[0]
    assert_equal_trees(params, loaded(case)[2])


def test_t5_is_tied_as_its_tensors_say(folder):
    """Transformers 5 writes that every T5 is tied, and loads the output matrix where there is one."""
    path = folder("t5-gated", config=lambda values: values | {"tie_word_embeddings": True})
    model, _, params = huggingface.load(path, layers="unrolled")
    assert model == loaded("t5-gated")[0] == huggingface.read_config(path)[0].with_layers("unrolled")
    assert_equal_trees(params, loaded("t5-gated")[2])


def test_mistakes_in_files(folder, tmp_path):
    cases = [
        ("llama", dropped("layers.1.mlp.up|model.norm"), r"lacks model.layers.1.mlp.up_proj.weight, model.norm.weight, which"),
        ("llama", added(model__layers__2__mlp__up_proj__weight=ZEROS), "has model.layers.2.mlp.up_proj.weight, for which"),
        (
            "llama",
            added(lm_head__weight=ZEROS[0, 0]),
            r"lm_head.weight has the shape \[16, 16\], and config.json calls for \[23, 8\]",
        ),
        ("llama-biases", added(lm_head__weight=ZEROS[0, 0]), "tie_word_embeddings is true, but lm_head.weight is not"),
        ("llama", added(model__norm__weight=np.zeros(8, np.int8)), "model.norm.weight is stored as I8"),
    ]
    for case, change, sentence in cases:
        with pytest.raises(ConfigError, match=sentence):
            huggingface.load(folder(case, change))
        shutil.rmtree(tmp_path / "copy")


def test_folders_that_are_none(folder, tmp_path):
    path = folder("gpt2")
    whole = (path / weights.WHOLE).read_bytes()
    for content, sentence in [(whole[:-9], "is no whole safetensors file"), (None, "holds neither")]:
        (path / weights.WHOLE).unlink() if content is None else (path / weights.WHOLE).write_bytes(content)
        with pytest.raises(ConfigError, match=sentence):
            huggingface.load(path)
    (path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"pickled weights.*save_pretrained.*safetensors"):
        huggingface.load(path)
    (path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        huggingface.read_config(path)
    (path / "config.json").unlink()
    for absent, sentence in [(path, "has no config.json"), (tmp_path / "nowhere", "has no nowhere")]:
        with pytest.raises(ConfigError, match=sentence):
            huggingface.read_config(absent)
    with pytest.raises(ConfigError, match="is no folder"):
        huggingface.load(tmp_path / "nowhere")


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    model, vocabulary, params = loaded("llama")
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(weights, "write_json", lambda *_: (_ for _ in ()).throw(OSError("no space left on device")))
    with pytest.raises(OSError, match="no space"):
        huggingface.export(model, vocabulary, params, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").iterdir())
    monkeypatch.undo()
    huggingface.export(model, vocabulary, params, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists already"):
        huggingface.export(model, vocabulary, params, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"head/words/kernel must have the shape \[8, 23\] that the model says, got nothing"):
        huggingface.export(model, vocabulary, {k: v for k, v in params.items() if k != "head"}, tmp_path / "other")


# ── configurations ───────────────────────────────────────────────────────────────────────────────────────────────────
def read(values, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(values))
    return huggingface.read_config(tmp_path / "config.json")


def golden(case):
    return json.loads((GOLDEN / case / "config.json").read_text())


def older(values):
    """As transformers 4 writes it."""
    values = {"dtype": None, "torch_dtype": "float32"} | values
    rope = values.pop("rope_parameters", None)
    if rope and "full_attention" in rope:
        full = rope["full_attention"]
        values |= {"rope_theta": full.pop("rope_theta"), "rope_scaling": full if full["rope_type"] != "default" else None}
        values["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    elif rope:
        names = (
            {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"} if values["model_type"] == "gpt_neox" else {}
        )
        for name in ("rope_theta", "partial_rotary_factor"):
            values |= {names.get(name, name): rope.pop(name)} if name in rope else {}
        values["rope_scaling"] = {"type": rope.pop("rope_type")} | rope if rope["rope_type"] != "default" else None
    if values["model_type"] == "qwen3_moe":
        values["num_experts"] = values.pop("num_local_experts")
    return values


@pytest.mark.parametrize("case", [case for case in CASES if "rope_parameters" in golden(case)])
def test_older_configurations_say_the_same(case, tmp_path):
    assert read(older(golden(case)), tmp_path) == read(golden(case), tmp_path)


WITHOUT_FACTOR = {
    "max_position_embeddings": 128,
    "rope_parameters": golden("llama-yarn")["rope_parameters"] | {"factor": None},
}
PATTERN = {"layer_types": None, "sliding_window_pattern": 3}
DEFAULTS = {
    "gpt2": ("gpt2", {"n_inner": None, "activation_function": "gelu_new"}, {"n_inner": 32}),
    "llama-heads": ("llama-linear", {"num_key_value_heads": None, "head_dim": None}, {"num_key_value_heads": 2, "head_dim": 4}),
    "qwen2-window": ("qwen2-window", {"layer_types": None}, {"layer_types": ["full_attention"] + ["sliding_attention"] * 3}),
    "gemma3-pattern": (
        "gemma3",
        PATTERN,
        {"layer_types": ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] * 2},
    ),
    "yarn-factor": ("llama-yarn", {"max_position_embeddings": 128}, WITHOUT_FACTOR),
    "sparse-steps": (
        "qwen3-moe-sparse",
        {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
        {"decoder_sparse_step": 1, "mlp_only_layers": [0, 2, 3]},
    ),
}


@pytest.mark.parametrize("case, one, other", DEFAULTS.values(), ids=DEFAULTS)
def test_configurations_that_say_the_same(case, one, other, tmp_path):
    first, second = (read(golden(case) | changes, tmp_path)[0] for changes in (one, other))
    assert normal(first) == normal(second) != normal(huggingface.read_config(GOLDEN / "bert")[0])


REFUSED = {
    "unknown": ("llama", {"frobnicate": 3}, "frobnicate is 3, a key that is not known here"),
    "quantized": ("deepseek-v3", {"quantization_config": {"bits": 4}}, "quantization_config is .* changes the arithmetic"),
    "activation": ("gpt2", {"activation_function": "quick_gelu"}, "activation_function must be one of .* got 'quick_gelu'"),
    "rope-kind": ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "rope_type must be one of .* got 'longrope'"),
    "rope-key": (
        "llama",
        {"rope_parameters": {"rope_theta": 5.0, "mrope_section": [1]}},
        r"mrope_section is .* \(rope_parameters in",
    ),
    "rope-factor": ("llama", {"rope_parameters": {"rope_type": "linear"}}, "factor must be given"),
    "rope-twice": ("llama", {"rope_theta": 7.0}, "rope_theta says 7.0, and rope_parameters says 100.0"),
    "rope-scaling-twice": (
        "llama",
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        "rope_scaling says Rope.* and rope_parameters",
    ),
    "local-base-twice": ("gemma3", {"rope_local_base_freq": 7.0}, "rope_local_base_freq says 7.0, and"),
    "rotary-part": ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, which changes the arithmetic"),
    "bidirectional": ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
    "relative": ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
    "cross": ("bert", {"add_cross_attention": True}, "add_cross_attention is True"),
    "residual": ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm is True"),
    "scoring": ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
    "layer-types": ("qwen3", {"layer_types": ["chunked_attention"] * 2}, "layer_types must be"),
    "gate": ("t5", {"is_gated_act": True}, "is_gated_act is True"),
    "family": ("llama", {"model_type": "lama"}, "model_type 'lama' is no family .* did you mean llama"),
    "architecture": (
        "llama",
        {"architectures": ["LlamaModel"]},
        "architectures must be one of LlamaForCausalLM, .* got 'LlamaModel'",
    ),
    "heads": ("llama", {"num_attention_heads": 3, "head_dim": None}, r"attention.heads must divide width=8 .*config.json\)"),
    "width": ("llama", {"hidden_size": "8"}, "width must be int, got '8'"),
}


@pytest.mark.parametrize("case, changes, sentence", REFUSED.values(), ids=REFUSED)
def test_what_changes_the_arithmetic_is_never_ignored(case, changes, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        read(golden(case) | changes, tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_every_key_is_read_or_known_to_be_harmless(case, tmp_path):
    """A key with another value gives another model, or an error, unless it is on the list of those that change nothing."""
    values = golden(case)
    model, vocabulary = read(values, tmp_path)
    known = huggingface.fields.HARMLESS
    for name, value in values.items():
        other = {bool: lambda v: not v, int: lambda v: v + 2, float: lambda v: v * 1.5, str: lambda v: f"{v}x"}.get(type(value))
        if other is None or known.fullmatch(name):
            continue
        try:
            changed = read(values | {name: other(value)}, tmp_path)
        except ConfigError:
            continue
        words = () if isinstance(model.head, LanguageModel) else ("tie_word_embeddings", "final_logit_softcapping")
        assert changed != (model, vocabulary) or name in (*words, *UNREAD.get(case.split("-")[0], ())), name


# what says nothing that another key of the same file does not say
UNREAD = {
    "qwen2": ("max_window_layers", "use_sliding_window", "sliding_window"),
    "qwen3": ("max_window_layers", "use_sliding_window", "sliding_window", "intermediate_size", "num_experts"),
    "deepseek": ("num_nextn_predict_layers", "rope_interleave"),
    "gemma3": ("_sliding_window_pattern",),
    "gemma2": ("sliding_window",),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configurations_are_understood(name, tmp_path):
    values, count = CONFIGS[name]
    model, vocabulary = read(values, tmp_path)
    assert parameters(model, vocabulary) == sum(map(np.prod, huggingface.parameter_shapes(model, vocabulary).values())) == count


# ── models of our own ────────────────────────────────────────────────────────────────────────────────────────────────
def like_llama(**changes):
    usual = {
        "width": 8,
        "depth": 4,
        "attention": Attention(heads=2),
        "ffn": Gated(),
        "norm": RMSNorm(),
        "embedding": Embed(scaled=False),
    }
    return Decoder(**(usual | changes))


NEAR = Attention(heads=2, mask=SlidingWindow(4))
SAME_NETWORK = {
    "llama": like_llama(),
    "mistral": like_llama(attention=NEAR, first=(Layer(attention=NEAR, position=Rope()),)),
    "qwen3": like_llama(
        attention=Attention(heads=2, kv_heads=1, head_dim=6, mask=SlidingWindow(4), qk_norm=RMSNorm()),
        pattern=(Layer(), Layer(attention=Attention(heads=2, kv_heads=1, head_dim=6, qk_norm=RMSNorm()))),
    ),
    "bloom": like_llama(
        attention=Attention(heads=2, bias=True),
        ffn=Dense(activation="gelu_tanh", bias=True),
        norm=LayerNorm(),
        position=Alibi(),
        embedding=Embed(scaled=False, norm=LayerNorm()),
    ),
    "gpt2": like_llama(
        attention=Attention(heads=2, bias=True), ffn=Dense(ratio=3, bias=True), norm=LayerNorm(), position=Learned(32)
    ),
}


@pytest.mark.parametrize("family, model", SAME_NETWORK.items())
def test_the_family_of_a_model_is_found(family, model, tmp_path):
    """The first that computes the same, whatever the model was built from; what comes back computes the same too."""
    leaves = huggingface.parameter_shapes(model, 12)
    rng = np.random.default_rng(0)
    params = arrays.nested({path: jnp.asarray(rng.normal(size=shape), jnp.float32) for path, shape in leaves.items()})
    huggingface.export(model, 12, params, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    again, vocabulary, read = huggingface.load(tmp_path / "out")
    assert (values["model_type"], vocabulary) == (family, 12) and normal(again) == normal(model)
    assert_equal_trees(read, params)


def drawn(model, vocabulary=12):
    """Random parameters, of the size that trained ones have."""
    rng = np.random.default_rng(0)
    shapes = huggingface.parameter_shapes(model, vocabulary)
    return arrays.nested({path: jnp.asarray(0.4 * rng.normal(size=shape), jnp.float32) for path, shape in shapes.items()})


def own(**changes):
    """The model that our experiments start from."""
    return dataclasses.replace(Decoder(width=8, depth=2, attention=Attention(heads=2)), **changes)


GROUPED_HEADS = Attention(heads=2, kv_heads=1)
SHARP = Attention(heads=2, scale=0.9, bias=True)
OTHER_FORMS = {
    "as-it-is-by-default": ("gpt_neox", own()),
    "half-turned": ("gpt_neox", own(position=Rope(fraction=0.5), placement="parallel", layers="scanned")),
    "units": ("gpt_neox", own(ffn=Dense(ratio=3, activation="squared_relu"))),
    "learned": ("gpt2", own(position=Learned(16), norm=LayerNorm(bias=False))),
    "gated": ("llama", own(norm=RMSNorm(), ffn=Gated(), head=LanguageModel(tied=False, gain=0.5))),
    "gated-layer-norm": ("stablelm", own(norm=LayerNorm(bias=False), ffn=Gated(activation="gelu"), attention=GROUPED_HEADS)),
    "transferred": ("llama", own(width=16, norm=RMSNorm(), ffn=Gated(units=12), mup=MuP(base_width=8))),
    "scaled-branches": ("gpt_neox", own(residual=Scaled(), ffn=Dense(bias=True))),
    "learned-branches": ("gpt_neox", own(residual=ReZero(), attention=GROUPED_HEADS, depth=3, layers="scanned")),
    "one-learned-branch": ("gpt_neox", own(residual=Scaled(learned=True), placement="parallel")),
    "labels": ("gpt_neox", own(head=TokenClassifier(labels=3, gain=0.5))),
    "sharp": ("gpt_neox", own(attention=SHARP, depth=3, first=(Layer(Attention(heads=2, bias=True)),), layers="scanned")),
    "louder": ("llama", own(norm=RMSNorm(), ffn=Gated(), head=LanguageModel(multiplier=2.5), embedding=Embed(scaled=False))),
    "experts": ("mixtral", own(norm=RMSNorm(), ffn=MoE(experts=4, expert=Gated(units=6, activation="relu")))),
}


def run(model, params, vocabulary=12):
    tokens = np.random.default_rng(1).integers(0, vocabulary, (2, 7))
    forward = jax.jit(lambda p: model.build(vocabulary).apply({"params": p}, tokens)).lower(params)
    return tokens, forward.compile(compiler_options=QUICK)(params)


@pytest.mark.parametrize("family, model", OTHER_FORMS.values(), ids=OTHER_FORMS)
def test_factors_are_folded_and_absent_biases_are_zeros(family, model, tmp_path):
    params = drawn(model)
    huggingface.export(model, 12, params, tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    again, _, read = huggingface.load(tmp_path / "out")
    assert values["model_type"] == family and values.get("intermediate_size", 32)
    np.testing.assert_allclose(run(again, read)[1], run(model, params)[1], rtol=0, atol=1e-4)


EXPERTS = MoE(experts=4, expert=Gated(units=12), dispatch=Capacity())
OTHER_NETWORKS = {
    "norm": (like_llama(norm=LayerNorm(), placement="sandwich"), "norm is a LayerNorm, llama has RMSNorm"),
    "mask": (
        like_llama(attention=Attention(heads=2, mask=Chunked(4))),
        r"attention.mask is Chunked\(size=4\), which llama cannot say",
    ),
    "scaling": (like_llama(position=Rope(scaling=NtkScaling())), "rope_type must be one of .* got 'NtkScaling'"),
    "head": (like_llama(head=LanguageModel(bias=True)), "head.bias is True, which llama cannot say"),
    "activation": (
        like_llama(ffn=Gated(activation="tanh"), placement="sandwich"),
        "placement is 'sandwich', which llama cannot say",
    ),
}


@pytest.mark.parametrize("model, sentence", OTHER_NETWORKS.values(), ids=OTHER_NETWORKS)
def test_a_family_that_cannot_say_it_says_why(model, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        huggingface.export(model, 12, {}, tmp_path / "out", family="llama")
    with pytest.raises(ConfigError, match="is like no family of gpt2, llama"):
        huggingface.export(model, 12, {}, tmp_path / "out")


def test_the_nearest_families_are_named_with_what_they_have(tmp_path):
    way = r"The nearest: bloom has ffn.activation='gelu_tanh', embedding.norm=LayerNorm\(.*\); gpt2 has position=Learned; gpt_neox"
    with pytest.raises(ConfigError, match=way):
        huggingface.export(own(position=Alibi()), 12, {}, tmp_path / "out")


def test_experts_that_drop_tokens_are_none_of_transformers(tmp_path):
    with pytest.raises(ConfigError, match=r"ffn.dispatch is Capacity.* which mixtral cannot say: it would be Dropless"):
        huggingface.export(like_llama(ffn=EXPERTS), 12, {}, tmp_path / "out", family="mixtral")


def test_only_harmless_keys_can_be_added(tmp_path):
    model, vocabulary, params = loaded("llama")
    extra = {"eos_token_id": 3, "rope_theta": 5, "hidden_act": "relu"}
    with pytest.raises(ConfigError, match="settings has hidden_act, rope_theta: only keys"):
        huggingface.export(model, vocabulary, params, tmp_path / "out", settings=extra)
