"""Losses of one record; the caller vmaps and takes the mean.

Arithmetic is float32, or float64 where that is what comes in. The second derivatives of the last
three are bounded: `unlearn.convex` has the constants, and the same losses summed over records.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """The negative logarithm of the softmax probability of a label.

    Args:
      logits: float `(C,)`.
      label: int `()`, from 0 to C - 1; NaN is the loss of any other, since a traced value can't be
        refused.

    Returns:
      float `()`.

    Raises:
      ValueError: where a rank or type is wrong.

    >>> round(float(cross_entropy(jnp.zeros(4), jnp.array(2))), 4)
    1.3863
    """
    if logits.ndim != 1 or label.ndim != 0 or not jnp.issubdtype(label.dtype, jnp.integer):
        raise ValueError(
            f"logits must be (C,) and the label an integer, found {logits.dtype}"
            f"{list(logits.shape)} and {label.dtype}{list(label.shape)}"
        )
    logits = logits.astype(jnp.float64 if logits.dtype == jnp.float64 else jnp.float32)
    inside = (label >= 0) & (label < logits.shape[0])
    chosen = jnp.where(inside, logits[jnp.where(inside, label, 0)], jnp.nan)
    return jax.nn.logsumexp(logits) - chosen


def logistic(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """log(1 + exp(-y xᵀw)).

    Args:
      w: float `(d,)`.
      x: float `(d,)`.
      y: `()`, -1 or 1.

    Returns:
      float `()`.

    Raises:
      ValueError: where a shape is wrong.

    >>> round(float(logistic(jnp.array([2.0, 1.0]), jnp.array([1.0, -2.0]), jnp.array(-1))), 4)
    0.6931
    """
    return jax.nn.softplus(-y.astype(w.dtype) * _predict(w, x, 1))


def softmax_regression(w: jax.Array, x: jax.Array, label: jax.Array) -> jax.Array:
    """The cross-entropy of the logits Wᵀx.

    Args:
      w: float `(d, C)`.
      x: float `(d,)`.
      label: int `()`, from 0 to C - 1.

    Returns:
      float `()`.

    Raises:
      ValueError: where a shape or type is wrong.
    """
    return cross_entropy(_predict(w, x, 2), label)


def squared(w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """(xᵀw - y)² / 2, the loss of ridge regression.

    Args:
      w: float `(d,)`.
      x: float `(d,)`.
      y: `()`.

    Returns:
      float `()`.

    Raises:
      ValueError: where a shape is wrong.
    """
    return jnp.square(_predict(w, x, 1) - y.astype(w.dtype)) / 2


def _predict(w: jax.Array, x: jax.Array, rank: int) -> jax.Array:
    if w.ndim != rank or x.ndim != 1 or w.shape[0] != x.shape[0]:
        raise ValueError(
            f"w must have {rank} axes, the first as long as a vector x, found {list(w.shape)} and "
            f"{list(x.shape)}"
        )
    return jnp.matmul(x, w, precision=lax.Precision.HIGHEST)
