"""The formula of a device's memory against what the compiler makes of the same steps."""

import json
import os
import subprocess
import sys

import pytest

from llm_jax.core.chips import Topology
from llm_jax.core.config import ConfigError, override
from llm_jax.core.mesh import Mesh
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import SentencePiece
from llm_jax.lab import autoshard, footprint
from llm_jax.lab.ahead import declared
from llm_jax.lab.experiment import Experiment, load
from llm_jax.models.decoder import Decoder
from llm_jax.models.presets import gpt2
from llm_jax.nn.ffn import Gated
from llm_jax.nn.linear import Precision
from llm_jax.nn.moe import MoE
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import RMSNorm

GIB = 2**30
MIXTURE = MoE(experts=8, active=2, expert=Gated(units=1024))


def experiment(*, rows=16, ids=8192, mesh=None, **model):
    given = {"width": 1024, "depth": 8, "attention": Attention(heads=8), "layers": "scanned"} | model
    return Experiment(
        model=Decoder(precision=Precision("bfloat16"), **given),
        tokenizer=SentencePiece(vocabulary=ids),
        data=Data(sequence_length=1024, batch_size=rows),
        mesh=mesh or Mesh(population=1, data=1, fsdp=-1),
    )


def small_gpt2(rows, **changes):
    model = override(gpt2(), {"precision.compute": "bfloat16", "layers": "scanned", **changes})
    return Experiment(
        model=model,
        tokenizer=SentencePiece(vocabulary=50_304),
        data=Data(sequence_length=1024, batch_size=rows),
        mesh=Mesh(population=1, data=-1),
    )


# GiB of a device that `compile` found with libtpu 0.0.42.1 for v5e:2x2, the program itself left out
COMPILED = {
    "plain": (experiment(), {"fsdp": 4}, 2.450),
    "plain, again": (experiment(remat="full"), {"fsdp": 4}, 0.864),
    "gated": (experiment(ffn=Gated(), norm=RMSNorm(), attention=Attention(heads=8, kv_heads=2)), {"fsdp": 4}, 2.965),
    "scores": (experiment(depth=4, attention=Attention(heads=8, backend="dense")), {"fsdp": 4}, 2.147),
    "tensor": (experiment(mesh=Mesh(population=1, data=1, fsdp=2, tensor=2)), {"fsdp": 2, "tensor": 2}, 3.199),
    "experts": (experiment(depth=4, ffn=MIXTURE, norm=RMSNorm()), {"fsdp": 4}, 2.188),
    "experts, shared": (
        experiment(depth=4, ffn=MIXTURE, norm=RMSNorm(), mesh=Mesh(population=1, data=1, fsdp=1, expert=4)),
        {"expert": 4},
        3.941,
    ),
    "stages, again": (
        experiment(remat="full", mesh=Mesh(population=1, data=1, fsdp=2, stage=2, microbatches=4)),
        {"fsdp": 2, "stage": 2},
        0.909,
    ),
    "GPT-2": (small_gpt2(32), {"data": 4}, 9.436),  # heads of 64 channels, which kernels fill up
}


@pytest.mark.parametrize("name", COMPILED)
def test_the_formula_is_near_what_was_compiled(name):
    given, mesh, gib = COMPILED[name]
    assert footprint.memory(given, declared(given).vocabulary, mesh) / GIB == pytest.approx(gib, rel=0.15)


def test_what_does_not_fit_is_not_offered():
    """Rows of GPT-2 whose layers keep everything need 29.5 GiB of a chip that has 15.75, as was compiled."""
    with pytest.raises(ConfigError, match=r"none of \d+ meshes fits"):
        autoshard.rank([(small_gpt2(512), 50_304)], Topology.parse("v5e:4x4"))
    assert autoshard.rank([(small_gpt2(512, remat="full"), 50_304)], Topology.parse("v5e:4x4")).fitting


# ── with libtpu ──────────────────────────────────────────────────────────────────────────────────────────────────────
ARMS = '''
"""Layers that keep what they compute, or some of it, and experts; tests/lab/test_scale.py has some that compute it again."""
from llm_jax.core.mesh import Mesh
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import SentencePiece
from llm_jax.lab.arms import Arms
from llm_jax.lab.experiment import Ablation, Experiment
from llm_jax.models.decoder import Decoder
from llm_jax.nn.ffn import Gated
from llm_jax.nn.linear import Precision
from llm_jax.nn.moe import MoE
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import RMSNorm

base = Experiment(
    model=Decoder(width=512, depth=6, layers="scanned", attention=Attention(heads=4), precision=Precision("bfloat16")),
    tokenizer=SentencePiece(vocabulary=4096),
    data=Data(sequence_length=512, batch_size=64),
    mesh=Mesh(population=1, data=1, fsdp=-1),
)
ablation = Ablation(
    question="How much?",
    base=base,
    scientific=Arms({
        "all": {},
        "products": {"model.remat": "dots", "model.ffn": Gated(units=1408), "model.norm": RMSNorm()},
        "experts": {"model.ffn": MoE(experts=4, active=2, expert=Gated(units=512))},
    }),
    seeds=1,
)
'''


@pytest.mark.slow
def test_the_formula_is_near_what_is_compiled(tmp_path):
    """In a process of its own, as XLA writes no program that it has cached."""
    pytest.importorskip("libtpu")
    file, out = tmp_path / "arms.py", tmp_path / "out.json"
    file.write_text(ARMS)
    command = [sys.executable, "-m", "llm_jax", "compile", f"--experiment={file}", f"--out={out}", "--topology=v5e:2x2"]
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([*command, "--all-arms"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ablation, compiled = load(file), json.loads(out.read_text())
    assert len(compiled) == 3
    for arm, found in compiled.items():
        parts = found["memory"]["parts"]
        formula = footprint.memory(ablation.experiment(arm), 4096, found["mesh"])
        assert formula == pytest.approx(sum(parts.values()) - parts["program"], rel=0.25), arm
