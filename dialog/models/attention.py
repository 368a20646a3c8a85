"""Attention, and the cache of keys and values that decoding goes on from."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class KeyValue(NamedTuple):
    """Keys and values of one layer.

    Attributes:
      key: `(N, S, H, d)`, of N sentences, S positions, H heads.
      value: `(N, S, H, d)`.
    """

    key: jax.Array
    value: jax.Array

    @classmethod
    def empty(cls, rows: int, length: int, heads: int, head_dim: int, dtype: jnp.dtype) -> KeyValue:
        """A cache with room for `length` positions."""
        zeros = jnp.zeros((rows, length, heads, head_dim), dtype)
        return cls(zeros, zeros)

    def write(self, new: KeyValue, at: jax.Array) -> KeyValue:
        """Puts keys and values `(N, T, H, d)` at the positions `at`, `at + 1`, ..."""
        return KeyValue(
            lax.dynamic_update_slice_in_dim(self.key, new.key.astype(self.key.dtype), at, 1),
            lax.dynamic_update_slice_in_dim(self.value, new.value.astype(self.value.dtype), at, 1),
        )


def attend(
    query: jax.Array, keys: KeyValue, mask: jax.Array | None, scale: float | None = None
) -> tuple[jax.Array, jax.Array]:
    """Scaled dot-product attention (Vaswani et al., Attention Is All You Need, 2017, equation 1).

    Grouped queries (Ainslie et al. 2023): H query heads may share G key and value heads, H / G
    neighbours each. The softmax is in float32 whatever the inputs are.

    Args:
      query: `(N, T, H, d)`.
      keys: of `(N, S, G, d)`.
      mask: bool, `(N, T, S)` or broadcast to it, which keys a query may see; None for all. A query
        that sees none gets zeros, and no NaN either forwards or backwards.
      scale: of the products; None for 1/√d.

    Returns:
      The values' means `(N, T, H, d)` in the query's dtype, and the weights `(N, H, T, S)` in
      float32.
    """
    rows, length, heads, dim = query.shape
    groups = keys.key.shape[2]
    scale = dim**-0.5 if scale is None else scale
    query = query.reshape(rows, length, groups, heads // groups, dim)
    logits = jnp.einsum(
        "ntghd,nsgd->nghts", query, keys.key, preferred_element_type=jnp.float32
    ) * jnp.float32(scale)
    if mask is None:
        weights = jax.nn.softmax(logits, axis=-1)
    else:
        seen = jnp.broadcast_to(mask, (rows, length, logits.shape[-1]))[:, None, None]
        # Not -inf: a row of nothing but -inf has a maximum that can't be subtracted.
        logits = jnp.where(seen, logits, jnp.finfo(jnp.float32).min)
        weights = jnp.where(seen, jax.nn.softmax(logits, axis=-1), jnp.float32(0))
    out = jnp.einsum("nghts,nsgd->ntghd", weights.astype(query.dtype), keys.value)
    return (
        out.reshape(rows, length, heads, dim),
        weights.reshape(rows, heads, length, weights.shape[-1]),
    )


def causal_mask(mask: jax.Array) -> jax.Array:
    """Returns which keys each position sees: itself and those before it, if they are there.

    Args:
      mask: bool `(N, T)`, False where a sentence is padded.

    Returns:
      bool `(N, T, T)`.
    """
    before = jnp.tril(jnp.ones((mask.shape[1],) * 2, bool))
    return before[None] & mask[:, None, :]
