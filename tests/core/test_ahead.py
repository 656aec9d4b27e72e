"""Programs compiled by other threads: the caller's numbers, for expected shapes and others, and the compiler's errors."""

import threading
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.core import distributed
from llm_jax.core.ahead import Ahead
from llm_jax.core.mesh import Mesh

TRACED: list[tuple[str, tuple[int, ...]]] = []


@pytest.fixture
def double():
    TRACED.clear()

    def scaled(factor, x):
        TRACED.append((threading.current_thread().name, x.shape))
        if x.shape == (13,):
            raise ValueError("13 is refused")
        return factor * x

    return Ahead(jax.jit(scaled), Mesh().build(jax.devices()[:1]))


def expect(function, size):
    with ThreadPoolExecutor(1, thread_name_prefix="compile") as pool:
        function.expect(pool, np.float32(2), jax.ShapeDtypeStruct((size,), jnp.float32))


def test_an_expected_program_is_traced_once_and_by_the_other_thread(double):
    expect(double, 3)
    expect(double, 3)
    np.testing.assert_array_equal(double(np.float32(2), jnp.arange(3.0)), [0, 2, 4])
    assert [(name.split("_")[0], shape) for name, shape in TRACED] == [("compile", (3,))]


def test_other_shapes_are_compiled_when_they_come(double):
    expect(double, 3)
    np.testing.assert_array_equal(double(np.float32(3), jnp.ones(2)), [3, 3])
    np.testing.assert_array_equal(double(np.float32(3), jnp.ones(3)), [3, 3, 3])
    assert [shape for _, shape in TRACED] == [(3,), (2,)]


def test_one_of_several_processes_compiles_before_it_waits_and_raises_again_what_the_compiler_raised(double, monkeypatch):
    met = []
    monkeypatch.setattr(distributed, "several", lambda: True)
    monkeypatch.setattr(distributed, "meet", lambda where, seconds: met.append((where, len(TRACED))))
    for _ in range(2):
        with pytest.raises(ValueError, match="13 is refused"):
            double(np.float32(2), jnp.ones(13))
    TRACED.clear()
    for _ in range(2):
        np.testing.assert_array_equal(double(np.float32(2), jnp.arange(3.0)), [0, 2, 4])
    assert met == [("a program's first run", 1)]


def test_the_call_raises_what_the_compiler_raised(double):
    expect(double, 13)
    with pytest.raises(ValueError, match="13 is refused"):
        double(np.float32(2), jnp.ones(13))
