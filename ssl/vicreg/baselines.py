"""Losses of the methods that VICReg is compared with.

As everywhere here, `axis_name` says what the arrays are. With None they hold the whole batch, and
the loss runs under plain `jit`, sharded or not. With a name they hold one device's rows, inside
`shard_map` or `pmap` over that axis, and the loss is still that of the whole batch: differentiate
inside, then take the `pmean` of the parameters' gradients. Arithmetic is float32 whatever the
inputs are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from vicreg.explicit import on_any_mesh

Loss = tuple[jax.Array, dict[str, jax.Array]]


@on_any_mesh
def nt_xent(
    z_a: ArrayLike, z_b: ArrayLike, *, temperature: float, axis_name: str | None = None
) -> Loss:
    """SimCLR's loss: each of the 2N views must find its partner among the 2N - 1 others.

    Chen et al. 2020, equation 1, the mean over all views, with cosine similarities and the
    negatives of every device. A row of zeros has no direction, and similarity 0 to all.

    Args:
      z_a: float `(N, D)`, embeddings of the first views; with `axis_name`, this device's rows.
      z_b: float `(N, D)`, embeddings of the second views, in the same order.
      temperature: τ, above 0, by which the similarities are divided.
      axis_name: the mapped axis over which the batch is split, or None.

    Returns:
      The loss, a float32 scalar in nats, and its terms: `similarity`, the mean cosine of two
      partners; `top1`, the fraction of views to which no other view is as similar as their partner.

    Raises:
      ValueError: where a shape or type is wrong, the whole batch has fewer than two rows, or the
        temperature is not above 0.

    Partners alike and all else orthogonal, at τ = 1: -log(e / (e + 2)).

    >>> loss, terms = nt_xent(jnp.eye(2), jnp.eye(2), temperature=1.0)
    >>> round(float(loss), 4), float(terms["similarity"]), float(terms["top1"])
    (0.5514, 1.0, 1.0)
    """
    if isinstance(temperature, float | int) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, found {temperature}")
    z_a, z_b, total = _views(z_a, z_b, axis_name)
    rows, offset = z_a.shape[0], 0
    u_a, u_b = keys_a, keys_b = unit(z_a), unit(z_b)
    if axis_name is not None:
        offset = lax.axis_index(axis_name) * rows
        keys_a, keys_b = (lax.all_gather(u, axis_name, tiled=True) for u in (u_a, u_b))
    queries, keys = jnp.concatenate([u_a, u_b]), jnp.concatenate([keys_a, keys_b])
    cosines = jnp.matmul(queries, keys.T, precision=lax.Precision.HIGHEST)

    row = (offset + jnp.arange(rows))[:, None]
    column = jnp.arange(2 * total)[None]
    own = column == jnp.concatenate([row, total + row])
    partner = column == jnp.concatenate([total + row, row])
    positive = jnp.sum(jnp.where(partner, cosines, 0), axis=1)
    logits = jnp.where(own, -jnp.inf, cosines / temperature)
    losses = jax.nn.logsumexp(logits, axis=1) - positive / temperature
    nearest = jnp.max(jnp.where(own | partner, -jnp.inf, cosines), axis=1)

    def mean(x: jax.Array) -> jax.Array:
        return _sum(jnp.sum(x), axis_name) / (2 * total)

    hits = (positive > nearest).astype(jnp.float32)
    return mean(losses), {"similarity": mean(positive), "top1": mean(hits)}


@on_any_mesh
def barlow_twins(
    z_a: ArrayLike,
    z_b: ArrayLike,
    *,
    off_diagonal_weight: float,
    scale: float = 1.0,
    axis_name: str | None = None,
) -> Loss:
    """Barlow Twins' loss: the correlations of the two views' dimensions should be the identity.

    Zbontar et al. 2021, equations 1 and 2. As in the authors' code, embeddings are standardised
    per dimension by the biased variance over the whole batch, plus 1e-5.

    Args:
      z_a: float `(N, D)`, embeddings of the first views; with `axis_name`, this device's rows.
      z_b: float `(N, D)`, embeddings of the second views, in the same order.
      off_diagonal_weight: λ, of the squared correlations of different dimensions.
      scale: what the loss is multiplied by, not its terms. A sum over dimensions, it is large, and
        LARS does not adapt the step of biases to it; the authors took 0.024.
      axis_name: the mapped axis over which the batch is split, or None.

    Returns:
      The loss, a float32 scalar, and its two terms before the weight: `on_diagonal`, the sum of
      `(1 - C_ii)²`; `off_diagonal`, the sum of the other `C_ij²`.

    Raises:
      ValueError: where a shape or type is wrong, or the whole batch has fewer than two rows.

    Two dimensions, each perfectly correlated with both:

    >>> z = jnp.array([[-100.0, 100.0], [100.0, -100.0]])
    >>> loss, terms = barlow_twins(z, z, off_diagonal_weight=0.25)
    >>> round(float(loss), 4), round(float(terms["off_diagonal"]), 4)
    (0.5, 2.0)
    """
    z_a, z_b, total = _views(z_a, z_b, axis_name)

    def mean(x: jax.Array) -> jax.Array:
        return _sum(jnp.sum(x, axis=0, keepdims=True), axis_name) / total

    def standardise(z: jax.Array) -> jax.Array:
        z = z - mean(z)
        return z / jnp.sqrt(mean(jnp.square(z)) + 1e-5)

    z_a, z_b = standardise(z_a), standardise(z_b)
    products = jnp.matmul(z_a.T, z_b, precision=lax.Precision.HIGHEST)
    correlations = _sum(products, axis_name) / total
    diagonal = jnp.eye(z_a.shape[1], dtype=bool)
    on_diagonal = jnp.sum(jnp.square(1 - jnp.diagonal(correlations)))
    # Masked, not subtracted from the whole: the difference would have lost digits.
    off_diagonal = jnp.sum(jnp.square(jnp.where(diagonal, 0, correlations)))
    loss = scale * (on_diagonal + off_diagonal_weight * off_diagonal)
    return loss, {"on_diagonal": on_diagonal, "off_diagonal": off_diagonal}


@on_any_mesh
def cross_entropy(logits: ArrayLike, labels: ArrayLike, *, axis_name: str | None = None) -> Loss:
    """The supervised loss: mean cross-entropy of a softmax.

    A label that is no class makes the loss NaN, for a traced label can't raise.

    Args:
      logits: float `(N, C)`; with `axis_name`, this device's rows.
      labels: integer `(N,)`, in `[0, C)`.
      axis_name: the mapped axis over which the batch is split, or None.

    Returns:
      The loss, a float32 scalar in nats, and its terms: `top1`, the fraction of rows whose largest
      logit, the first of equals, is their label's.

    Raises:
      ValueError: where a shape or type is wrong.

    >>> loss, terms = cross_entropy(jnp.zeros((2, 5)), jnp.array([0, 3]))
    >>> round(float(loss), 4), float(terms["top1"])
    (1.6094, 0.5)
    """
    logits, labels = _as_float32("logits", logits), jnp.asarray(labels)
    if labels.shape != logits.shape[:1]:
        raise ValueError(
            f"labels must have one entry per row of logits {logits.shape}, found {labels.shape}"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(f"labels must be integers, found {labels.dtype}")
    rows, classes = logits.shape
    if not rows or not classes:
        raise ValueError(f"logits must have at least one row and one class, found {logits.shape}")
    total = rows * _devices(axis_name)
    labels = labels.astype(jnp.int32)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    # An index below 0 would count from the end.
    losses = jnp.where((labels >= 0) & (labels < classes), -log_probs, jnp.nan)
    hits = (jnp.argmax(logits, axis=1).astype(jnp.int32) == labels).astype(jnp.float32)
    loss, top1 = (_sum(jnp.sum(x), axis_name) / total for x in (losses, hits))
    return loss, {"top1": top1}


def _views(
    z_a: ArrayLike, z_b: ArrayLike, axis_name: str | None
) -> tuple[jax.Array, jax.Array, int]:
    """Both in float32, and the number of rows over all devices."""
    z_a, z_b = _as_float32("z_a", z_a), _as_float32("z_b", z_b)
    if z_a.shape != z_b.shape:
        raise ValueError(f"shapes must be equal, found z_a {z_a.shape}, z_b {z_b.shape}")
    total = z_a.shape[0] * _devices(axis_name)
    if total < 2:
        raise ValueError(
            f"a batch needs at least two images to compare, found {total} of shape {z_a.shape}"
        )
    return z_a, z_b, total


def _as_float32(name: str, value: ArrayLike) -> jax.Array:
    array = jnp.asarray(value)
    if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floats of shape (batch, dimensions), "
            f"found {array.dtype} of shape {array.shape}"
        )
    return array.astype(jnp.float32)


def unit(z: jax.Array) -> jax.Array:
    """Returns rows `(N, D)` scaled to length 1; rows of zeros stay so."""
    # By its largest number first, whose square might be out of range. Zeros are divided by 1, not
    # by a tiny constant, which would make their gradient huge.
    largest = lax.stop_gradient(jnp.max(jnp.abs(z), axis=1, keepdims=True))
    z = z / jnp.where(largest > 0, largest, 1)
    square = jnp.sum(jnp.square(z), axis=1, keepdims=True)
    return z / jnp.sqrt(jnp.where(square > 0, square, 1))


def _devices(axis_name: str | None) -> int:
    return 1 if axis_name is None else lax.axis_size(axis_name)


def _sum(x: jax.Array, axis_name: str | None) -> jax.Array:
    return x if axis_name is None else lax.psum(x, axis_name)
