"""Typed random keys, which no file holds, as the integers that they are made of."""

from __future__ import annotations

from typing import Any

import jax


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def taken_out(state: Any) -> Any:
    """Typed keys as the integers they hold, for arrays and for shapes alike."""

    def plain(x):
        if not _is_key(x):
            return x
        if isinstance(x, jax.ShapeDtypeStruct):
            data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(x.shape, x.dtype))
            spec = x.sharding.spec if isinstance(x.sharding, jax.sharding.NamedSharding) else None
            where = jax.sharding.NamedSharding(x.sharding.mesh, spec) if spec is not None else x.sharding
            return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=where)
        return jax.random.key_data(x)

    return jax.tree.map(plain, state)


def put_back(state: Any, abstract: Any) -> Any:
    """`state` with the keys that `abstract` has."""
    return jax.tree.map(lambda x, like: jax.random.wrap_key_data(x) if _is_key(like) else x, state, abstract)
