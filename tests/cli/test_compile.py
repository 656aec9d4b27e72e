"""`python -m llm_jax compile`: its sentences here, and, slow, what it finds with libtpu, which compiles for TPUs on any machine."""

import functools
import importlib.util
import json
import os
import subprocess
import sys

import pytest

from llm_jax.core import platform
from llm_jax.core.chips import Topology
from llm_jax.core.config import ConfigError
from llm_jax.lab import ahead
from llm_jax.lab.expected import estimate
from llm_jax.lab.experiment import load
from llm_jax.models import count
from llm_jax.train.ahead.collectives import Collective
from llm_jax.train.ahead.memory import ACTIVATIONS, GRADIENTS, TEMPORARIES, TOGETHER
from tests.cli.outcome import outcome

SMALL = '''
"""A small model."""
from llm_jax.core.mesh import Mesh
from llm_jax.data.pipeline import Data
from llm_jax.data.tokenizers import SentencePiece
from llm_jax.lab.arms import Arms
from llm_jax.lab.experiment import Ablation, Experiment
from llm_jax.models.decoder import Decoder
from llm_jax.nn.ffn import Gated
from llm_jax.nn.linear import Precision
from llm_jax.nn.moe import MoE

base = Experiment(
    model=Decoder(width=256, depth=DEPTH, remat="full", precision=Precision("bfloat16")),
    tokenizer=SentencePiece(vocabulary=4096),
    data=Data(sequence_length=512, batch_size=16),
    mesh=Mesh(population=1, data=1, fsdp=-1),
)
ablation = Ablation(
    question="Which?",
    base=base,
    scientific=Arms({
        "dense": {},
        "rate": {"optimizer.learning_rate": 1e-4},
        "experts": {"model.ffn": MoE(experts=8, active=2, expert=Gated(units=512))},
    }),
    seeds=1,
)
'''


@pytest.fixture
def small(tmp_path):
    file = tmp_path / "small.py"
    file.write_text(SMALL.replace("DEPTH", "2"))
    return file


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "error: --topology is missing"),
        (["--topology=v5e:16x17"], "error: --topology=v5e:16x17 does not exist: the nearest are v5e:16x16,"),
        (["--topology=v3:2x2"], "error: --topology=v3:2x2 is of no TPU known here"),
        (["--topology=v5e:2x2", "--slices=0"], "error: flag --slices=0"),
        (["--topology=v5e:2x2", "--arm=none"], "error: --arms names the arm 'none', but the arms are dense, rate, experts"),
        (["--topology=v5e:2x2", "--arm=dense", "--all-arms"], "error: --arm and --all-arms exclude each other"),
        (["--topology=v5e:8x8"], "error: data.batch_size must be a multiple of train.accumulate × data × fsdp = 64"),
        (["--topology=v5e:2x2", "--set=data.batch_size=18"], "error: data.batch_size must be a multiple of"),
        (
            ["--topology=v5e:4x4", "--set=mesh.population=None", "--set=data.batch_size=500"],
            "error: data.batch_size leaves 6 of 16 devices idle, got 500: take 512",
        ),
    ],
)
def test_mistakes_are_one_sentence(small, flags, says, monkeypatch, capsys):
    code, out, err = outcome("compile", [f"--experiment={small}", *flags], monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith(says)


def test_without_libtpu_the_extra_is_named(small, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    code, _, err = outcome("compile", [f"--experiment={small}", "--topology=v5e:2x2"], monkeypatch, capsys)
    assert code == 2
    assert 'pip install -e ".[tpu]"' in err


def test_a_vocabulary_that_is_declared_needs_no_text(small):
    assert ahead.declared(load(small).base).vocabulary == 4096


def test_a_teacher_is_refused(small, monkeypatch, capsys):
    from llm_jax.core.config import override
    from llm_jax.objectives.distillation import Distillation

    taught = override(load(small).base, {"objective": Distillation(teacher="runs/none")})
    with pytest.raises(ConfigError, match=r"objective\.teacher asks a trained model"):
        ahead.examine(taught, Topology.parse("v5e:2x2"))


def test_autoshard_ranks_meshes_without_libtpu(small, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("COLUMNS", "150")
    code, out, _ = outcome("compile", [f"--experiment={small}", "--topology=v5e:4x4", "--autoshard"], monkeypatch, capsys)
    assert code == 0
    assert "Meshes for v5e:4x4, the fastest first" in out
    assert "expert=" not in out  # as the dense arm could not take it
    code, out, _ = outcome(
        "compile", [f"--experiment={small}", "--topology=v5e:4x4", "--autoshard", "--arm=experts"], monkeypatch, capsys
    )
    assert "expert=2" in out


# ── with libtpu ──────────────────────────────────────────────────────────────────────────────────────────────────────
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What the command finds, by arms, and its end; in a process of its own, as XLA writes no program that it has cached.

    libtpu: flags for the compiler.
    """
    pytest.importorskip("libtpu")
    folder = tmp_path_factory.mktemp("compiled")
    small = folder / "small.py"
    small.write_text(SMALL.replace("DEPTH", "2"))

    @functools.cache
    def command(*flags, libtpu=None):
        given = {} if libtpu is None else {platform.LIBTPU: libtpu}
        out, env = folder / "out.json", {**os.environ, "JAX_PLATFORMS": "cpu", **given}
        out.unlink(missing_ok=True)
        given = [f"--experiment={small}", f"--out={out}", *flags]
        done = subprocess.run([sys.executable, "-m", "llm_jax", "compile", *given], env=env, capture_output=True, text=True)
        assert out.is_file(), done.stderr
        return json.loads(out.read_text()), done

    return command


@slow
@pytest.mark.parametrize("topology, chips", [("v5e:2x2", 4), ("v5e:4x4", 16)])
def test_a_small_step_for_v5e(compiled, small, topology, chips):
    (found,) = compiled(f"--topology={topology}")[0].values()
    base = load(small).base
    parameters = count.parameters(base.model, 4096)
    parts = found["memory"]["parts"]
    assert found["fits"]
    assert found["mesh"]["fsdp"] == chips
    # nearly all of them split over all devices, two moments each; norms are whole
    assert parts["parameters"] == pytest.approx(4 * parameters / chips, rel=0.02)
    assert parts["optimizer state"] == pytest.approx(2 * parts["parameters"], rel=0.01)
    assert found["memory_bytes"] == pytest.approx(sum(parts.values()))
    assert parts[ACTIVATIONS] > 0 and parts[TEMPORARIES] > 0 and TOGETHER not in parts
    model = 16 * count.flops_per_row(base.model, 4096, 512)
    assert found["model"] == pytest.approx(model)
    # what each device does is its share of what was traced
    assert found["device"] * chips == pytest.approx(found["machine"]["products"], rel=0.02)
    layers, head = (model - 16 * 512 * 6 * 256 * 4096), 16 * 512 * 6 * 256 * 4096
    scores = 16 * 6 * 512**2 * 2 * 256 * 2
    again, down = 4 / 3, 2 * 16 * 512 * 2 * 256 * 1024
    assert found["machine"]["products"] == pytest.approx(head + (layers - scores) * again - down, rel=0.02)
    formula = estimate(base, 4096, found["mesh"], Topology.parse(topology))
    for part in ("products", "kernels"):
        assert found["estimate"][part] == pytest.approx(getattr(formula, part), rel=0.02)
    # splash computes scores again in both of its backward kernels: 2 + 2 + 3 + 4 products, all blocks counted
    assert found["machine"]["kernels"] == pytest.approx(scores / 6 * 11, rel=0.02)


@slow
def test_activations_are_told_apart_where_they_are_kept(compiled, small):
    (found,) = compiled("--topology=v5e:2x2", "--set=model.depth=8", "--set=model.remat=none")[0].values()
    parts = found["memory"]["parts"]
    rows = 2 * 16 * 512 * 256 / 4  # of one device, in bfloat16
    # at least queries, keys, values, what attention gives, and the hidden units before and after their activation
    assert parts[ACTIVATIONS] > 12 * rows * 8
    assert 0 < parts[GRADIENTS] < parts[ACTIVATIONS] and parts[TEMPORARIES] > 0 and TOGETHER not in parts


@slow
def test_replicas_lie_in_slices_of_their_own_and_nothing_else_crosses(compiled, small):
    (found,) = compiled("--topology=v5e:2x2", "--slices=2", "--set=mesh.replica=2")[0].values()
    assert {axis: n for axis, n in found["mesh"].items() if n > 1} == {"replica": 2, "fsdp": 4}
    assert {(one["crosses"], *one["axes"]) for one in found["collectives"]} == {(True, "replica"), (False, "fsdp")}
    between = [one for one in found["collectives"] if one["crosses"]]
    assert {one["kind"] for one in between} == {"all-reduce"}
    own = count.parameters(load(small).base.model, 4096) / 4
    # each device's part of every gradient once, of two or four bytes; rows of a head are filled up to 128
    assert 2 * own < sum(one["bytes"] * one["count"] for one in between) < 6 * own
    assert found["estimate"]["dcn"] > 0 and found["estimate"]["ici"] > 0


WHOLE = "--xla_jf_spmd_threshold_for_windowed_einsum_mib=1000000"  # no product of less is made while its operands come in pieces


@slow
def test_weights_are_gathered_in_the_compute_dtype_forward_and_again(compiled, small):
    (found,) = compiled("--topology=v5e:2x2", libtpu=WHOLE)[0].values()
    gathers = [one for one in found["collectives"] if one["kind"] == "all-gather"]
    assert {one["dtype"] for one in gathers} == {"bf16"}
    layers = 2 * count.layer_entries(load(small).base.model, load(small).base.model.in_full[0])
    table = 2 * 4096 * 256  # embedding and head, each once
    sent = sum(one["bytes"] * one["count"] for one in gathers)
    # forward, and again for what is recomputed; queries' and the output's a third time, in the shape that the gradient wants
    assert 2 * (2 * layers + table) <= sent <= 1.15 * 2 * (2 * layers + table)


@slow
def test_what_goes_round_in_pieces_is_what_would_be_gathered_and_scattered(compiled):
    """libtpu may send matrices, and sums of their gradients, from device to device while their products are made."""
    (pieces,) = compiled("--topology=v5e:2x2")[0].values()
    (whole,) = compiled("--topology=v5e:2x2", libtpu=WHOLE)[0].values()
    assert "collective-permute" not in {one["kind"] for one in whole["collectives"]}
    assert {one["dtype"] for one in pieces["collectives"] if one["kind"] in ("all-gather", "collective-permute")} == {"bf16"}
    assert _reaching(whole) == pytest.approx(_reaching(pieces), rel=0.15)


def _reaching(found):
    """Bytes that reach a device in messages of a step."""
    messages = found["collectives"]
    return sum(one["count"] * Collective(one["kind"], one["bytes"], one["parts"]).travels for one in messages)


@slow
def test_experts_in_stages_with_rows_cut(compiled):
    axes = {"stage": 2, "fsdp": 2, "expert": 2, "sequence": 2}
    (found,) = compiled("--topology=v5e:4x4", "--arm=experts", *(f"--set=mesh.{axis}={n}" for axis, n in axes.items()))[0].values()
    assert found["fits"] and found["uncounted"] == 0
    sent = {(one["kind"], *one["axes"]) for one in found["collectives"]}
    assert {("all-to-all", "expert"), ("collective-permute", "stage"), ("all-gather", "sequence")} <= sent
    # keys, values and rows of stages are those of a device's own rows: nobody else's are gathered first
    along = {tuple(axes) for kind, *axes in sent if kind == "all-gather"}
    assert along <= {("stage",), ("sequence",), ("fsdp", "sequence"), ("fsdp", "expert", "sequence"), ("expert",)}


@slow
@pytest.mark.parametrize(
    "topology, arms, programs",
    [
        ("v4:2x2x1", "--arm=experts", ["experts"]),
        ("v5p:2x2x1", "--all-arms", ["dense, rate", "experts"]),  # a rate is traced, so that arm has no program of its own
        ("v6e:2x2", "--arm=experts", ["experts"]),
        ("tpu7x:2x2x1", "--arm=experts", ["experts"]),
    ],
)
def test_every_family_of_tpus(compiled, topology, arms, programs):
    found, done = compiled(f"--topology={topology}", arms)
    assert done.returncode == 0
    assert list(found) == programs
    assert ("Which?" in done.stdout) == (arms == "--all-arms")
    for one in found.values():
        chips = 4 * (2 if topology.startswith("tpu7x") else 1)
        assert one["device"] * chips == pytest.approx(one["machine"]["products"] + one["machine"]["grouped"], rel=0.03)
        assert 0 < one["estimate"]["mfu"] < 1
        assert one["collectives"]


@slow
def test_what_does_not_fit_is_told_what_to_change(compiled):
    large = ["--set=model.width=8192", "--set=model.depth=8", "--set=model.attention.heads=64", "--set=model.remat=none"]
    found, done = compiled("--topology=v5e:2x2", *large)
    assert done.returncode == 1
    (one,) = found.values()
    assert one["memory_bytes"] > one["memory_limit_bytes"]
    assert one["memory"]["largest"]
    assert "too many" in done.stdout
    assert "model.remat=full" in done.stdout


# the command, whose seconds are those of a CPU: other processes do not change them
OWN_SECONDS = "import sys, time; time.perf_counter = time.process_time; from llm_jax.__main__ import main; sys.exit(main())"


@slow
def test_scanned_layers_compile_as_fast_whatever_their_number(small, tmp_path):
    """32 layers within 1.5 times of 4, by the command, for TPUs: in this process the compiler is held back."""
    from llm_jax.core.config import override

    pytest.importorskip("libtpu")
    out, env = tmp_path / "out.json", {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}

    def compiled(depth):
        given = [f"--experiment={small}", f"--set=model.depth={depth}", "--set=model.layers=scanned", "--topology=v5e:2x2"]
        subprocess.run([sys.executable, "-c", OWN_SECONDS, "compile", *given, f"--out={out}"], env=env, check=True)
        (found,) = json.loads(out.read_text()).values()
        model = override(load(small).base.model, {"depth": depth})
        assert found["model"] == pytest.approx(16 * count.flops_per_row(model, 4096, 512))
        return found["seconds"]

    few, many = compiled(4), compiled(32)
    assert many <= 1.5 * few or compiled(32) <= 1.5 * compiled(4), (few, many)
