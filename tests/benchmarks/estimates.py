"""The model of time against what others have measured: MFU by formula, and as MaxText has published it, on 256 chips.

    python tests/benchmarks/estimates.py

Shapes, rows and meshes are those of github.com/AI-Hypercomputer/maxtext: `configs/v5e/*.sh`, `global_parameter_scale` and
`benchmarks/maxtext_trillium_model_configs.py`. What it keeps on the host for the backward pass on v6e is computed again here. The
model's four fitted constants were chosen with these six runs in sight: that so few describe them is what this shows, not that they
were predicted.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from llm_jax.core.chips import Topology
from llm_jax.data.pipeline import Data
from llm_jax.lab.expected import estimate
from llm_jax.lab.experiment import Experiment
from llm_jax.models.decoder import Decoder
from llm_jax.models.heads import LanguageModel
from llm_jax.models.presets.modern import llama3_1
from llm_jax.nn.ffn import Gated
from llm_jax.nn.linear import Precision
from llm_jax.nn.multihead import Attention
from llm_jax.nn.normalization import RMSNorm
from llm_jax.train.ahead.roofline import Estimate


@dataclass(frozen=True)
class Published:
    """A run: its chips, model, billions of parameters, ids, tokens a row, rows a chip, devices along fsdp (the rest: tensor), MFU."""

    topology: str
    model: Decoder
    billions: int
    vocabulary: int
    length: int
    rows: int
    fsdp: int
    mfu: float

    def estimate(self) -> Estimate:
        """By formula."""
        mesh = {"fsdp": self.fsdp, "tensor": 256 // self.fsdp}
        return expected(self.model, self.topology, vocabulary=self.vocabulary, length=self.length, rows=self.rows, **mesh)


def expected(model: Decoder, topology: str, *, vocabulary: int, length: int, rows: int, **mesh: int) -> Estimate:
    """Of a step of so many rows a chip on 256 chips, every layer computed again in the backward pass."""
    whole = replace(model, remat="full", precision=Precision("bfloat16"))
    experiment = Experiment(model=whole, data=Data(sequence_length=length, batch_size=256 * rows))
    return estimate(experiment, vocabulary, mesh, Topology.parse(topology))


def scaled(width: int, heads: int, units: int, depth: int) -> Decoder:
    """A decoder as MaxText's scripts scale it."""
    attention = Attention(heads=heads, head_dim=128)
    return Decoder(
        width=width, depth=depth, attention=attention, ffn=Gated(units=units), norm=RMSNorm(), head=LanguageModel(tied=False)
    )


PUBLISHED = {
    "16B": Published("v5e:16x16", scaled(4096, 64, 28_672, 32), 16, 32_000, 2048, 6, 256, 0.611),
    "32B": Published("v5e:16x16", scaled(8192, 64, 28_672, 32), 32, 32_000, 2048, 4, 256, 0.669),
    "64B": Published("v5e:16x16", scaled(8192, 64, 28_672, 64), 64, 32_000, 2048, 2, 256, 0.599),
    "128B": Published("v5e:16x16", scaled(8192, 128, 57_344, 64), 128, 32_000, 2048, 1, 16, 0.561),
    "Llama 3.1 8B": Published("v6e:16x16", llama3_1("8B"), 8, 128_256, 8192, 4, 256, 0.455),
    "Llama 3.1 70B": Published("v6e:16x16", llama3_1("70B"), 70, 128_256, 8192, 4, 256, 0.503),
}


def main() -> None:
    """Prints the table."""
    shown = Table(title="MFU: four constants of the estimate were chosen with these runs in sight", title_justify="left")
    for name in ("model", "chips", "mesh", "MaxText", "estimate", "difference"):
        shown.add_column(name, justify="left" if name in ("model", "chips", "mesh") else "right")
    for name, run in PUBLISHED.items():
        mesh = f"fsdp={run.fsdp}" + (f" × tensor={256 // run.fsdp}" if run.fsdp < 256 else "")
        found = run.estimate().mfu
        shown.add_row(name, run.topology, mesh, f"{run.mfu:.1%}", f"{found:.1%}", f"{100 * (found - run.mfu):+.1f} points")
    Console(width=120).print(shown)


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    main()
