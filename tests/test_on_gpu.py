"""What only an NVIDIA GPU can show; everything here is skipped where there is none.

JAX_PLATFORMS=cuda XLA_PYTHON_CLIENT_PREALLOCATE=false python -m pytest tests/test_on_gpu.py
"""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import chips, platform
from llm_jax.nn.attention import Bias, Bidirectional, Causal, Chunked, Places, SlidingWindow, attend
from llm_jax.nn.kernels.grouped import grouped_products
from llm_jax.nn.position import Alibi
from tests.nn.attention_reference import expected, seen

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU: JAX_PLATFORMS=cuda")

HEADS, GROUPS, SIZE, LENGTH = 4, 2, 64, 64
ALIBI = Bias(lambda params, a, b: Alibi().bias({}, a, b, HEADS))

EXPERIMENT = """
from llm_jax.data.corpora import TextFiles
from llm_jax.data.pipeline import Data
from llm_jax.lab import Experiment
from llm_jax.lab.experiment import Checkpoints, Evaluation
from llm_jax.models.decoder import Decoder
from llm_jax.nn.ffn import Gated
from llm_jax.nn.moe import MoE
from llm_jax.nn.multihead import Attention
from llm_jax.train.pretrain import Train

experiment = Experiment(
    data=Data(corpus=TextFiles(path={text!r}), sequence_length=128, batch_size=8),
    model=Decoder(width=128, depth=2, attention=Attention(heads=2, kv_heads=1), ffn=MoE(experts=4, expert=Gated(units=128))),
    train=Train(steps=40, log_every=1, average=0.99),
    evaluation=Evaluation(every=20, bytes=4096),
    checkpoints=Checkpoints(every=40),
)
"""


# ── kernels against the closed form in float64 ───────────────────────────────────────────────────────────────────────
def arrays(keys=LENGTH):
    rng = np.random.default_rng(0)
    shapes = (2, LENGTH, HEADS, SIZE), (2, keys, GROUPS, SIZE), (2, keys, GROUPS, SIZE)
    return [jnp.asarray(rng.normal(size=shape), "bfloat16") for shape in shapes]


@pytest.mark.parametrize("backend", ["cudnn", "blockwise", "dense"])
@pytest.mark.parametrize(
    "mask, keys, divided, bias",
    [
        (Causal(), LENGTH, False, None),
        (Causal(), LENGTH + 32, False, None),
        (Bidirectional(), LENGTH + 32, False, ALIBI),
        (SlidingWindow(9), LENGTH, False, None),
        (SlidingWindow(9, sinks=1), LENGTH, False, None),
        (SlidingWindow(9, causal=False), LENGTH, False, ALIBI),
        (Chunked(16), LENGTH, False, None),
        (Causal(), LENGTH, True, ALIBI),
        (Causal(), LENGTH, True, None),
    ],
)
def test_attention_and_its_gradient(backend, mask, keys, divided, bias):
    given, documents = arrays(keys), None
    if divided:
        documents = np.array([[0] * 24 + [1] * 24 + [-1] * 16, [1] * LENGTH], np.int32)
    places = Places(segment=documents)
    out, pull = jax.vjp(
        lambda *a: attend(*a, mask=mask, queries=places, keys=places, bias=bias, scale=0.125, backend=backend), *given
    )
    g = jnp.asarray(np.random.default_rng(1).normal(size=out.shape), jnp.bfloat16)
    indices = [np.broadcast_to(np.arange(n), (2, n)) for n in (LENGTH, keys)]
    shown = seen(mask, *indices, documents, documents)
    added = 0.0 if bias is None else np.asarray(bias(*indices), np.float64)
    want = expected(*given, g, shown, bias=added, scale=0.125)
    assert (np.asarray(out)[~shown.any(-1)] == 0).all()
    for got, exact in zip((out, *pull(g)), (want.out, want.q, want.k, want.v), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, atol=3e-2 * np.abs(exact).max())


def test_bfloat16_takes_cudnns_kernel():
    text = jax.jit(lambda *a: attend(*a, mask=Causal())).lower(*arrays()).compile().as_text()
    assert "__cudnn$fmha" in text


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("block", [None, 16])
def test_products_with_experts(dtype, block):
    """Also with experts that nobody chose."""
    rng, sizes = np.random.default_rng(0), np.array([40, 0, 24, 64], np.int32)
    x, kernel = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((128 + 16, 64), (4, 64, 32)))
    with jax.default_matmul_precision("highest"):
        out, pull = jax.vjp(lambda x, kernel: grouped_products(x, [kernel], jnp.asarray(sizes), block=block)[0][:128], x, kernel)
        g = jnp.asarray(rng.normal(size=out.shape), dtype)
        dx, dkernel = pull(g)
    x64, kernel64, g64 = (np.asarray(a, np.float64) for a in (x, kernel, g))
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    want = np.concatenate([x64[part] @ kernel64[e] for e, part in enumerate(parts)])
    want_dx = np.concatenate([g64[part] @ kernel64[e].T for e, part in enumerate(parts)])
    want_dkernel = np.stack([x64[part].T @ g64[part] for part in parts])
    tolerance = 1e-4 if dtype == "float32" else 2e-2
    for got, exact in ((out, want), (dx[:128], want_dx), (dkernel, want_dkernel)):
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, atol=tolerance * np.abs(exact).max())


def test_the_device_is_known():
    """Its peak comes from its data sheet, and its memory from the driver."""
    assert chips.of_kind(jax.devices()[0].device_kind) is not None
    assert platform.memory() > 2**30


# ── runs, as they are typed ──────────────────────────────────────────────────────────────────────────────────────────
@pytest.fixture(scope="module")
def declared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("declared")
    (folder / "text.txt").write_text("\n".join(f"{n} {n * n % 97} {n % 7}" for n in range(20_000)))
    (folder / "mixture.py").write_text(EXPERIMENT.format(text=str(folder / "text.txt")))
    return folder / "mixture.py"


def started(declared, workdir, *flags, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment |= {"LLM_JAX_CACHE": str(declared.parent / "cache"), "XLA_PYTHON_CLIENT_PREALLOCATE": "false"} | variables
    command = [sys.executable, "-m", "llm_jax", "run", f"--experiment={declared}", f"--workdir={workdir}", *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run(declared, workdir, *flags, **variables):
    """The training loss of every step, and what was printed."""
    process = started(declared, workdir, *flags, **variables)
    told = process.communicate(timeout=300)[0]
    assert process.returncode == 0, told + "".join(file.read_text() for file in workdir.glob("trials/*/error.txt"))
    return losses(workdir), told


def losses(workdir):
    (file,) = workdir.glob("trials/*/metrics.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}


def test_training_in_float32_is_a_cpus(declared, tmp_path):
    """With products in full float32: JAX has them in TF32 on these GPUs otherwise."""
    exact = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    here, _ = run(declared, tmp_path / "gpu", **exact)
    one = "--xla_force_host_platform_device_count=1"
    there, _ = run(declared, tmp_path / "cpu", JAX_PLATFORMS="cpu", XLA_FLAGS=one, **exact)
    assert len(here) == 40 and here.keys() == there.keys()
    np.testing.assert_allclose([*here.values()], [*there.values()], atol=2e-4)


def test_deterministic_runs_have_the_same_bits_and_go_on_with_them(declared, tmp_path):
    """In bfloat16 with cuDNN's attention and experts; the third is stopped by SIGTERM and started again."""
    flags = ["--deterministic", "--set=model.precision.compute=bfloat16", "--set=train.steps=400", "--set=train.log_every=10"]
    first, _ = run(declared, tmp_path / "first", *flags)
    second, _ = run(declared, tmp_path / "second", *flags)
    assert len(first) == 40 and first == second
    process, deadline = started(declared, tmp_path / "third", *flags), time.monotonic() + 120
    while not any(file.stat().st_size for file in (tmp_path / "third").glob("trials/*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    told = process.communicate(timeout=120)[0]
    assert process.returncode == 0 and "stopped at step" in told, told
    third, told = run(declared, tmp_path / "third", *flags)
    assert "going on after step" in told and third == first


def test_a_profile_tells_kernels_apart(declared, tmp_path):
    run(declared, tmp_path / "run", "--profile=10:15", "--set=model.precision.compute=bfloat16")
    (file,) = (tmp_path / "run" / "profiles").rglob("summary.json")
    summary = json.loads(file.read_text())
    assert summary["devices"] == 1 and summary["shares"]["matrix products"] > 0 and summary["shares"]["attention kernels"] > 0
    assert sum(summary["shares"].values()) == pytest.approx(1.0, abs=1e-3)
