"""Programs compiled before they are called, by threads beside the caller's: XLA leaves the interpreter free meanwhile."""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

import jax

from llm_jax.core import distributed, sharding
from llm_jax.core.mesh import Mesh

_Key = tuple[tuple[int, ...], ...]


class Ahead:
    """A jitted `function` on a mesh; `expect` starts compiling it for arguments to come, and a call waits for that program.

    Programs are told apart by the shapes of the last argument (a batch), so all else must keep its shapes. Arguments that
    were not expected are compiled for when they come. An error of the compiler is raised by the call. Several processes begin a
    program's first run together, however long each of them compiles.
    """

    def __init__(self, function: jax.stages.Wrapped, devices: jax.sharding.Mesh, layout: Mesh | None = None):
        self._function, self._where = function, partial(sharding.on, devices, layout)
        self._programs: dict[_Key, Future] = {}
        self._begun = set[_Key]()

    def expect(self, pool: ThreadPoolExecutor, *args: Any) -> None:
        """Has `pool` trace and compile for `args`, whose leaves may be `jax.ShapeDtypeStruct`s with their shardings."""
        if _key(args) not in self._programs:
            self._programs[_key(args)] = pool.submit(contextvars.copy_context().run, self._compile, args)

    def trace(self, *args: Any) -> jax.stages.Traced:
        """The traced program, as of `jax.jit`."""
        with self._where():
            return self._function.trace(*args)

    def lower(self, *args: Any) -> jax.stages.Lowered:
        """The lowered program."""
        with self._where():
            return self._function.lower(*args)

    def _compile(self, args: tuple) -> Callable:
        return self.lower(*args).compile()

    def __call__(self, *args: Any) -> Any:
        key = _key(args)
        if distributed.several() and key not in self._programs:  # the call would compile, when it is too late to wait for others
            compiled: Future = Future()
            compiled.set_result(self._compile(args))
            self._programs[key] = compiled
        ahead = self._programs.get(key)
        program = self._function if ahead is None else ahead.result()
        if key not in self._begun:
            distributed.abreast("a program's first run")
            self._begun.add(key)
        with self._where():
            return program(*args)


def _key(args: tuple) -> _Key:
    return tuple(leaf.shape for leaf in jax.tree.leaves(args[-1]))
