"""One of two processes that train together, the second of which is sent SIGTERM. Run by test_loop.py.

python tests/train/stopped_host.py INDEX PORT FOLDER STOP_AT
"""

import itertools
import os
import signal
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llm_jax.core.types import Batch, Weighted
from llm_jax.io.checkpoint import Checkpointer
from llm_jax.train.interruption import Interrupted
from llm_jax.train.loop import Program, Rhythm, Session, fit


def main(index: int, port: str, folder: str, stop_at: int) -> int:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, index)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    whole = NamedSharding(mesh, PartitionSpec())
    init = jax.jit(lambda: {"w": jnp.zeros(4), "step": jnp.int32(0)}, out_shardings=whole)
    update = jax.jit(lambda s, b: {"w": s["w"] * 0.9 + b.mean() * s["step"], "step": s["step"] + 1}, out_shardings=whole)

    def steps(state, batches):
        time.sleep(0.03 * (1 + index))
        if index == 1 and int(state["step"]) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        own = np.full((1, 4), 1.0 + index, np.float32)
        state = update(state, jax.make_array_from_process_local_data(NamedSharding(mesh, PartitionSpec("data")), own))
        return state, {"train/loss": Weighted(state["w"][:1], jnp.ones(1))}

    def evaluate(state, batches):
        return {"w": Weighted(state["w"][:1], jnp.ones(1))}

    ids = np.zeros((1, 1, 1, 1))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), jax.eval_shape(init))
    checkpointer = Checkpointer(folder)
    session = Session(
        record=lambda step, rows: None,
        rewind=lambda step, recorded: print("begins after", step),
        report=lambda step, **numbers: None,
        evaluations={},
        final={"valid": Batch(ids, ids)},
        tokens_per_step=1,
        flops_per_step=1,
        checkpointer=checkpointer,
    )
    try:
        program = Program(1, init, steps, evaluate, shapes)
        print(fit(program, lambda step: itertools.repeat(Batch(ids, ids)), Rhythm(120, 1, 10, 120, 120), session))
        return 0
    except Interrupted as interrupted:
        print("stopped after", interrupted.step)
        return interrupted.code
    finally:
        checkpointer.close()


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])))
