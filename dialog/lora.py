"""Low-rank adapters: training of a few numbers beside weights that stay (Hu et al., LoRA, 2021)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Projections of attention, in all three families of models.
ATTENTION = r"(q|k|v|out|o)_proj/kernel$"


class Adapter(NamedTuple):
    """Two factors, whose product is added to a kernel `(in, out)`.

    Attributes:
      a: `(in, rank)`, drawn at first.
      b: `(rank, out)`, zero at first, so that the model begins as it was.
    """

    a: jax.Array
    b: jax.Array


def init(
    key: jax.Array, params: Mapping[str, Any], rank: int, targets: str = ATTENTION
) -> dict[str, Adapter]:
    """Returns adapters of kernels.

    Args:
      key: typed key `()`.
      params: of the model; only shapes and names are read.
      rank: r.
      targets: regular expression that is searched for in paths such as
        `encoder/layers_0/self_attn/q_proj/kernel`.

    Returns:
      Path of the kernel to its adapter, float32; `a` has He's uniform distribution with the bound
      1/√in, as the authors' code has.

    Raises:
      ValueError: the rank is below 1, or no kernel matches.

    >>> params = {"q_proj": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
    >>> jax.tree.map(jnp.shape, init(jax.random.key(0), params, 2))
    {'q_proj/kernel': Adapter(a=(4, 2), b=(2, 6))}
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, found {rank}")
    leaves = {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    chosen = [
        name for name, leaf in leaves.items() if np.ndim(leaf) == 2 and re.search(targets, name)
    ]
    if not chosen:
        some = ", ".join(name for name in leaves if name.endswith("kernel"))[:300]
        raise ValueError(f"no kernel matches targets {targets!r}; there are {some}")
    adapters = {}
    for number, name in enumerate(sorted(chosen)):
        rows, columns = leaves[name].shape
        bound = rows**-0.5
        a = jax.random.uniform(
            jax.random.fold_in(key, number), (rows, rank), jnp.float32, -bound, bound
        )
        adapters[name] = Adapter(a, jnp.zeros((rank, columns), jnp.float32))
    return adapters


def merge(params: Any, adapters: Mapping[str, Adapter], scale: float = 1.0) -> Any:
    """Returns parameters with the adapters' products added: W + scale · A B.

    Args:
      params: of the model.
      adapters: from `init`, trained or not.
      scale: α / r of the paper.
    """

    def add(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        adapter = adapters.get(_name(path))
        if adapter is None:
            return leaf
        return leaf + (scale * (adapter.a @ adapter.b)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(add, params)


def _name(path: jax.tree_util.KeyPath) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
