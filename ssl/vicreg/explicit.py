"""Losses of arrays whose shardings are part of their types."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import jax

F = TypeVar("F", bound=Callable[..., Any])


def on_any_mesh(loss: F) -> F:
    """Lets a loss take arrays that are split over a mesh with explicit axes.

    Such axes, which `jax.make_mesh` makes by default, want every product of sharded arrays to name
    the sharding of its result. The compiler may choose it here; what comes out is replicated.
    """

    @functools.wraps(loss)
    def wrapped(*args: Any, **options: Any) -> Any:
        arrays = {name: x for name, x in options.items() if isinstance(x, jax.Array)}
        rest = {name: x for name, x in options.items() if name not in arrays}
        mesh = _explicit_mesh(*args, *arrays.values())
        if mesh is None:
            return loss(*args, **options)
        auto: Any = jax.sharding.auto_axes
        return auto(
            lambda args, arrays: loss(*args, **arrays, **rest),
            axes=mesh.explicit_axes,
            out_sharding=jax.sharding.NamedSharding(mesh, jax.P()),
        )(args, arrays)

    return cast(F, wrapped)


def _explicit_mesh(*arrays: Any) -> Any:
    for array in arrays:
        if isinstance(array, jax.Array):
            mesh: Any = jax.typeof(array).sharding.mesh
            if mesh.explicit_axes:
                return mesh
    return None
