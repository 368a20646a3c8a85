"""A pytree in a folder through Orbax, leaf by leaf under its path's name.

Leaves are stored flat, so that any container (NamedTuple, dataclass, a part's own state) comes
back as the one the caller holds, and nothing of it is pickled. Typed PRNG keys are stored as
their data.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Leaf(NamedTuple):
    """What the manifest says of a leaf."""

    shape: list[int]
    dtype: str
    impl: str | None  # of a typed PRNG key

    def __str__(self) -> str:
        """Dtype and shape, as in an error message."""
        return f"{self.dtype}{self.shape}"


def _is_key(leaf: Any) -> bool:
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def named_leaves(tree: Any) -> dict[str, Any]:
    """The leaves of a pytree by path, such as `params.conv1.kernel`.

    Raises:
      ValueError: two leaves have the same name, or a leaf is neither an array nor a number.
    """
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "leaf"
        if name in leaves:
            raise ValueError(f"two leaves of the tree are both named {name!r}")
        if not hasattr(leaf, "dtype") and not isinstance(leaf, (bool, int, float, complex)):
            raise ValueError(
                f"leaf {name!r} is a {type(leaf).__name__}; a tree holds JAX or NumPy arrays, "
                f"typed PRNG keys and numbers"
            )
        leaves[name] = leaf
    return leaves


def describe(leaf: Any) -> Leaf:
    """Shape and dtype of a leaf, as saved (a number is a NumPy scalar)."""
    if _is_key(leaf):
        # A ShapeDtypeStruct of keys knows its dtype alone, which is enough to compare.
        impl = str(jax.random.key_impl(leaf)) if isinstance(leaf, jax.Array) else None
        return Leaf(list(leaf.shape), str(leaf.dtype), impl)
    if not hasattr(leaf, "dtype"):
        leaf = np.asarray(leaf)
    return Leaf(list(leaf.shape), str(leaf.dtype), None)


def num_bytes(leaves: dict[str, Any]) -> int:
    """Bytes that this process writes for the leaves, uncompressed."""
    total = 0
    for leaf in leaves.values():
        data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
        if isinstance(data, jax.Array):
            total += sum(s.data.nbytes for s in data.addressable_shards if s.replica_id == 0)
        elif jax.process_index() == 0:
            total += np.asarray(data).nbytes
    return total


def _plain(leaf: Any) -> Any:
    data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    if isinstance(data, jax.Array) and (jax.process_count() == 1 or not data.is_fully_addressable):
        return data
    # An array that lives on this process alone is saved as the host array that it is.
    return np.asarray(data)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbax logs a traceback a thread before it raises; the error that we raise says it once."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def write_tree(folder: Path, leaves: dict[str, Any]) -> None:
    """Writes named leaves; all processes call it. Zero-sized leaves live in the manifest only."""
    import orbax.checkpoint as ocp

    data = {name: _plain(leaf) for name, leaf in leaves.items()}
    data = {name: leaf for name, leaf in data.items() if leaf.size}
    if data:
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(data))


def read_tree(folder: Path, saved: dict[str, Leaf], like: Any) -> Any:
    """Reads the leaves that `like` names and gives them `like`'s structure, types and places.

    Args:
      folder: what `write_tree` wrote.
      saved: the manifest's leaves; `like` has been compared with them.
      like: see `Checkpoints.restore`.
    """
    import orbax.checkpoint as ocp

    wanted = named_leaves(like)
    args: dict[str, Any] = {}
    for name, leaf in wanted.items():
        sharding = _sharding(leaf)
        if 0 in saved[name].shape:
            continue
        if isinstance(sharding, jax.sharding.NamedSharding):
            args[name] = ocp.ArrayRestoreArgs(sharding=sharding)
        else:
            args[name] = ocp.RestoreArgs(restore_type=np.ndarray)
    data: dict[str, Any] = {}
    if args:
        request = ocp.args.PyTreeRestore(
            item=dict.fromkeys(args, 0), restore_args=args, partial_restore=True
        )
        with _quiet(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            data = checkpointer.restore(folder.absolute(), args=request)
    leaves = [_place(leaf, data.get(name), saved[name]) for name, leaf in wanted.items()]
    return jax.tree_util.tree_unflatten(jax.tree_util.tree_structure(like), leaves)


def _sharding(leaf: Any) -> jax.sharding.Sharding | None:
    """Where a restored leaf goes; None for the host, or for JAX's default device."""
    # An uncommitted array must come back uncommitted, or it could not meet arrays of a mesh.
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    return getattr(leaf, "sharding", None)


def _place(like: Any, data: Any, saved: Leaf) -> Any:
    sharding = _sharding(like)
    if data is None:
        shape = jax.eval_shape(jax.random.key_data, like).shape if _is_key(like) else like.shape
        data = np.zeros(shape, np.uint32 if _is_key(like) else like.dtype)
    if _is_key(like):
        data = jax.random.wrap_key_data(data, impl=saved.impl)
    elif isinstance(like, np.generic):
        return data[()]
    elif isinstance(like, np.ndarray):
        return data
    elif not isinstance(like, (jax.Array, jax.ShapeDtypeStruct)):
        return type(like)(data.item())
    if isinstance(data, jax.Array) and data.sharding == sharding:
        return data
    return jax.device_put(data, sharding)
