"""What a mixture of experts costs beside a dense network that spends the same FLOPs on a token, in turn, on this machine.

    python tests/benchmarks/moe.py --widths=256,512 --rounds=9

Forward and backward of one layer, float32, with the process settings and the data-parallel mesh that training uses: 8 experts of
half the dense network's hidden units, 2 of them active. Printed for every way of dispatching: the median step, and its ratio to the
dense step, the median of the rounds' ratios with the least and the greatest; then the same of processor seconds, which others on the
machine disturb less. "skewed" routes most tokens to two experts. With --at_most=1.6 the exit code is 1 where the dropless step's
median ratio is greater.
"""

from __future__ import annotations

import statistics
import time

from absl import app, flags
from harness import wait_for_quiet

from llm_jax.core import platform

WIDTHS = flags.DEFINE_list("widths", ["256", "512"], "Channels of the model.")
TOKENS = flags.DEFINE_integer("tokens", 4096, "Tokens a step, in rows of --length.")
LENGTH = flags.DEFINE_integer("length", 256, "Tokens a row.")
RATIO = flags.DEFINE_float("ratio", 4.0, "Hidden units of the dense network over the width.")
GATED = flags.DEFINE_bool("gated", False, "Gated networks (silu) instead of plain ones (gelu).")
ROUNDS = flags.DEFINE_integer("rounds", 9, "Pieces of each side.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 3, "Steps a piece.", lower_bound=1)
BLOCKS = flags.DEFINE_list("blocks", [], "More sizes of block to try.")
RAGGED = flags.DEFINE_bool("ragged", False, "Also jax.lax.ragged_dot.")
AT_MOST = flags.DEFINE_float("at_most", None, "The greatest ratio of a dropless step to the dense one.")
PATIENCE = flags.DEFINE_float("patience", 5.0, "Seconds to wait for the machine to be quiet, before each round.")


def networks(width: int) -> dict:
    """Name → configuration; the first is what the others are compared with."""
    from llm_jax.nn.dispatch import Capacity, Dropless
    from llm_jax.nn.ffn import Dense, Gated
    from llm_jax.nn.moe import MoE
    from llm_jax.nn.routing import ExpertChoice

    kind = Gated if GATED.value else Dense
    dense = kind(units=round(RATIO.value * width))
    expert = kind(units=dense.units // 2)
    ways = {"dropless": Dropless()} | {f"blocks of {b}": Dropless(form="blocks", block=int(b)) for b in BLOCKS.value}
    ways |= {"ragged_dot": Dropless(form="ragged")} if RAGGED.value else {}
    ways |= {"capacity 1.25": Capacity(), "capacity 1": Capacity(factor=1.0)}
    mixtures = {name: MoE(expert=expert, dispatch=way) for name, way in ways.items()}
    return {"dense": dense, **mixtures, "expert choice": MoE(expert=expert, router=ExpertChoice()), "skewed": mixtures["dropless"]}


def step(name: str, config, width: int):
    """A compiled forward and backward pass, as a function of nothing."""
    import jax
    import jax.numpy as jnp

    from llm_jax.core.sharding import sum_over_data, unbox
    from llm_jax.nn.ffn import MLP
    from llm_jax.nn.moe import Experts, MoE

    module = (Experts if isinstance(config, MoE) else MLP)(config, 1.0, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (TOKENS.value // LENGTH.value, LENGTH.value, width))
    params = unbox(jax.jit(lambda key: module.init(key, x[:1], {}))(jax.random.key(1)))["params"]
    if name == "skewed":
        x = x.at[..., 0].set(4.0)
        params["router"]["kernel"] = params["router"]["kernel"].at[0, :2].add(1.0)

    def total(params, x):
        return jnp.square(module.apply({"params": params}, x, {})).sum()

    both = jax.jit(sum_over_data(lambda params, x: _gradients(total, params, x)))
    x = jax.device_put(x, jax.sharding.NamedSharding(jax.sharding.get_mesh(), jax.sharding.PartitionSpec("data")))
    jax.block_until_ready(both(params, x))
    return lambda: jax.block_until_ready(both(params, x))


def _gradients(total, params, x):
    import jax
    import jax.numpy as jnp

    grads, dx = jax.grad(total, argnums=(0, 1))(params, x)
    return grads, jnp.square(dx).sum()  # a number that needs all of it, which devices can add


def main(_) -> int:
    """Measures every width in turn; the exit code."""
    platform.setup()
    import jax

    from llm_jax.core.mesh import Mesh

    above = False
    with jax.set_mesh(Mesh().build()):
        for width in map(int, WIDTHS.value):
            sides = {name: step(name, config, width) for name, config in networks(width).items()}
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
            for index in range(ROUNDS.value):
                wait_for_quiet(PATIENCE.value)
                for name in list(sides)[:: 1 if index % 2 == 0 else -1]:
                    seconds[name].append(timed(sides[name]))
            ratios = show(width, seconds)
            above = above or (AT_MOST.value is not None and ratios["dropless"] > AT_MOST.value)
    return int(above)


def timed(function) -> tuple[float, float]:
    """Seconds of a step, and processor seconds."""
    start, used = time.perf_counter(), time.process_time()
    for _ in range(STEPS.value):
        function()
    return (time.perf_counter() - start) / STEPS.value, (time.process_time() - used) / STEPS.value


def show(width: int, seconds: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Prints a width's table; returns each side's median ratio of wall time."""
    print(f"\nwidth {width}, {TOKENS.value} tokens, {'gated' if GATED.value else 'plain'}, {ROUNDS.value} rounds")
    base, medians = next(iter(seconds.values())), {}
    for name, own in seconds.items():
        typical = 1e3 * statistics.median(wall for wall, _ in own)
        wall, used = ([a[i] / b[i] for a, b in zip(own, base, strict=True)] for i in (0, 1))
        each = "".join(f"{statistics.median(r):9.2f} [{min(r):.2f}, {max(r):.2f}]" for r in (wall, used))
        print(f"  {name:16}{typical:9.1f} ms   × dense{each}", flush=True)
        medians[name] = statistics.median(wall)
    return medians


if __name__ == "__main__":
    app.run(main)
