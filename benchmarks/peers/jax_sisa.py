"""SISA's training in JAX as one writes it first, not exact: a shard after the other, or vmapped.

A slice is one jitted scan, and the records are on the device before it begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

# Parameters and the optimiser's state.
Carry = tuple[Any, Any]
# Of records `(n, d)`, labels `(n,)` and batches `(T, B)`.
Scan = Callable[[Carry, Any, Any, Any], Carry]
Training = Callable[[], list[Carry]]


def scan_of(model: nn.Module, optimizer: optax.GradientTransformation) -> Scan:
    """The training of one shard on batches `(T, B)`, of which rows of -1 count for nothing."""

    def objective(params: Any, x: jax.Array, y: jax.Array, rows: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, x[rows])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y[rows])
        weights = (rows >= 0).astype(losses.dtype)
        return jnp.sum(losses * weights) / jnp.maximum(jnp.sum(weights), 1)

    def scan(carry: Carry, x: jax.Array, y: jax.Array, batches: jax.Array) -> Carry:
        def step(carry: Carry, rows: jax.Array) -> tuple[Carry, None]:
            params, opt_state = carry
            grads = jax.grad(objective)(params, x, y, rows)
            changes, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, changes), opt_state), None

        return lax.scan(step, carry, batches)[0]

    return scan


def loop(
    scan: Scan,
    x: np.ndarray,
    y: np.ndarray,
    first: Sequence[Carry],
    batches: Callable[[int], Iterable[np.ndarray | jax.Array]],
    keep: bool,
) -> Training:
    """A Python loop over shards and slices.

    Args:
      scan: jitted, from `scan_of`.
      x: `(S, n, d)`, records of each shard.
      y: `(S, n)`, their labels.
      first: of each shard.
      batches: of a shard, slice by slice, `(T, B)`.
      keep: whether the states after each slice are fetched.

    Returns:
      A function that trains all shards.
    """
    xs, ys, carries = jax.device_put((list(x), list(y), list(first)))

    def train() -> list[Carry]:
        trained = []
        for shard, carry in enumerate(carries):
            for rows in batches(shard):
                carry = scan(carry, xs[shard], ys[shard], rows)
                if keep:
                    jax.device_get(carry)
            trained.append(carry)
        return trained

    return train


def vmapped(
    scan: Scan, x: np.ndarray, y: np.ndarray, first: Sequence[Carry], stages: Sequence[np.ndarray]
) -> Training:
    """All shards at once; those with fewer batches than others go on by their momentum.

    Args:
      scan: vmapped and jitted, from `scan_of`.
      x: `(S, n, d)`, records of each shard.
      y: `(S, n)`, their labels.
      first: of each shard.
      stages: batches of each slice, `(S, T, B)`.

    Returns:
      A function that trains all shards.
    """
    xs, ys, batches = jax.device_put((x, y, list(stages)))
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *first)

    def train() -> list[Carry]:
        carry = together
        for rows in batches:
            carry = scan(carry, xs, ys, rows)
        return [carry]

    return train
