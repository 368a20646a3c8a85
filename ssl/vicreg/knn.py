"""The weighted k-nearest-neighbour classifier that frozen features are scored with.

Wu et al. 2018, "Unsupervised Feature Learning via Non-Parametric Instance Discrimination",
section 3.4: the k training samples of the highest cosine similarity s vote for their classes, each
with the weight exp(s / τ).
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from vicreg.baselines import unit


def predict(
    features: ArrayLike,
    labels: ArrayLike,
    queries: ArrayLike,
    *,
    num_classes: int,
    k: int,
    temperature: ArrayLike = 0.07,
    chunk: int = 256,
) -> jax.Array:
    """The class that each query's neighbours vote for.

    Arithmetic is float32. Of equally similar samples the first is nearer, of equal votes the lower
    class wins, and a row of zeros has similarity 0 to all. Under `jit`, all keyword arguments but
    the temperature are static.

    Args:
      features: float `(M, D)`, of the training samples.
      labels: integer `(M,)`, their classes; a sample outside `[0, num_classes)` doesn't vote.
      queries: float `(Q, D)`.
      num_classes: number of classes.
      k: number of neighbours, at most M.
      temperature: τ, above 0; large values make all votes equal.
      chunk: queries at a time; the largest array is `(chunk, M)`, 4 bytes an entry.

    Returns:
      int32 `(Q,)`.

    Raises:
      ValueError: where a shape, a type or a number is wrong; it names what was found.

    >>> features = jnp.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.1]])
    >>> queries = jnp.array([[9.0, 1.0], [-2.0, 0.0]])
    >>> predict(features, jnp.array([0, 1, 1]), queries, num_classes=2, k=2).tolist()
    [0, 1]
    """
    return _predict(features, labels, queries, num_classes, (k,), temperature, chunk)[k]


def accuracy(
    features: ArrayLike,
    labels: ArrayLike,
    queries: ArrayLike,
    query_labels: ArrayLike,
    *,
    num_classes: int,
    ks: Sequence[int] = (20, 200),
    temperature: ArrayLike = 0.07,
    chunk: int = 256,
) -> dict[int, jax.Array]:
    """The fraction of queries that `predict` gets right, for several k from one search.

    Args:
      features: float `(M, D)`, of the training samples.
      labels: integer `(M,)`, their classes.
      queries: float `(Q, D)`, at least one.
      query_labels: integer `(Q,)`, their classes.
      num_classes: number of classes.
      ks: numbers of neighbours, each at most M.
      temperature: τ, above 0.
      chunk: queries at a time.

    Returns:
      For each k, a float32 scalar in [0, 1].

    Raises:
      ValueError: where a shape, a type or a number is wrong; it names what was found.

    >>> features, labels = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([0, 1])
    >>> scores = accuracy(features, labels, features, labels, num_classes=2, ks=(1, 2))
    >>> {k: float(score) for k, score in scores.items()}
    {1: 1.0, 2: 1.0}
    """
    query_labels = _labels("query_labels", query_labels, "queries", jnp.shape(queries))
    if not query_labels.size:
        raise ValueError("queries must hold at least one row, found none")
    predictions = _predict(features, labels, queries, num_classes, tuple(ks), temperature, chunk)
    return {
        k: jnp.mean(found == query_labels, dtype=jnp.float32) for k, found in predictions.items()
    }


def _predict(
    features: ArrayLike,
    labels: ArrayLike,
    queries: ArrayLike,
    num_classes: int,
    ks: tuple[int, ...],
    temperature: ArrayLike,
    chunk: int,
) -> dict[int, jax.Array]:
    features, queries = _unit("features", features), _unit("queries", queries)
    if features.shape[1] != queries.shape[1]:
        raise ValueError(
            f"features {features.shape} and queries {queries.shape} must have equal dimensions"
        )
    labels = _labels("labels", labels, "features", features.shape)
    if not ks or min(ks) < 1 or max(ks) > len(features):
        raise ValueError(
            f"k must be from 1 to the number of samples, {len(features)}, "
            f"found {', '.join(map(str, ks)) or 'none'}"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, found {chunk}")
    temperature = jnp.asarray(temperature, jnp.float32)

    def vote(query: jax.Array) -> dict[int, jax.Array]:
        cosines = jnp.einsum("d,md->m", query, features, precision=lax.Precision.HIGHEST)
        # XLA-CPU has a fast top-k, but sorts whole rows, 15 times slower, where it sees slices of
        # the result; behind the barrier it doesn't.
        similarities, nearest = lax.optimization_barrier(lax.top_k(cosines, max(ks)))
        # Relative to the nearest, so that no exponential overflows.
        weights = jnp.exp((similarities - similarities[0]) / temperature)
        voters = labels[nearest]

        def winner(k: int) -> jax.Array:
            votes = jnp.zeros(num_classes, jnp.float32).at[voters[:k]]
            votes = votes.add(weights[:k], mode="drop", wrap_negative_indices=False)
            return jnp.argmax(votes).astype(jnp.int32)

        return {k: winner(k) for k in ks}

    return lax.map(vote, queries, batch_size=max(min(chunk, len(queries)), 1))


def _unit(name: str, value: ArrayLike) -> jax.Array:
    array = jnp.asarray(value)
    if array.ndim != 2 or not jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(
            f"{name} must be floats of shape (samples, dimensions), "
            f"found {array.dtype} of shape {array.shape}"
        )
    return unit(array.astype(jnp.float32))


def _labels(name: str, value: ArrayLike, of: str, shape: tuple[int, ...]) -> jax.Array:
    array = jnp.asarray(value)
    if array.shape != shape[:1] or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"{name} must be integers, one per row of {of} {shape}, "
            f"found {array.dtype} of shape {array.shape}"
        )
    return array.astype(jnp.int32)
