"""Programs of tests run once or twice: what XLA:CPU spends on fast code is three quarters of the time."""

from typing import Any

from jaxlib.version import __version_info__ as jaxlib

EMITTERS: dict[str, Any] = {"xla_cpu_use_fusion_emitters": False} if jaxlib < (0, 11) else {}  # later ones do not know it
QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0, **EMITTERS}


def flags(options: dict[str, Any]) -> str:
    """The same for `XLA_FLAGS`."""
    return " ".join(f"--{name}={str(value).lower()}" for name, value in options.items())
