"""The loss of language models: teacher-forced cross-entropy of the next token."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Sums(NamedTuple):
    """Sums over the tokens of a batch, float32 `()`; those of two batches may be added.

    Attributes:
      loss: of the tokens' losses, smoothed where that was asked for.
      nll: of the negative log-likelihoods, in nats. `exp(nll / tokens)` is the perplexity.
      correct: number of tokens that were the likeliest.
      tokens: number of tokens.
    """

    loss: jax.Array
    nll: jax.Array
    correct: jax.Array
    tokens: jax.Array


def token_losses(
    logits: jax.Array, targets: jax.Array, label_smoothing: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """Returns the loss and the negative log-likelihood of each token.

    Label smoothing (Szegedy et al., Rethinking the Inception Architecture, 2016, section 7) has the
    target share ε of its mass with all V tokens, itself among them: (1 - ε) nll + ε mean of -log p.

    Args:
      logits: `(..., V)`, of any float dtype.
      targets: int32 `(...)`, in 0..V-1.
      label_smoothing: ε, in [0, 1).

    Returns:
      Two arrays `(...)`, float32, in nats.

    Raises:
      ValueError: shapes don't fit, or ε is out of range.

    >>> loss, nll = token_losses(jnp.zeros((2, 4)), jnp.array([0, 3]))
    >>> nll.shape, round(float(nll[0]), 4)  # log 4
    ((2,), 1.3863)
    """
    if logits.shape[:-1] != targets.shape:
        raise ValueError(
            f"targets must have shape {logits.shape[:-1]}, that of logits {logits.shape} without "
            f"the last axis, found {targets.shape}"
        )
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), found {label_smoothing}")
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    nll = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    if not label_smoothing:
        return nll, nll
    return (1 - label_smoothing) * nll - label_smoothing * jnp.mean(log_probs, axis=-1), nll


def cross_entropy_sums(
    logits: jax.Array, targets: jax.Array, mask: jax.Array, label_smoothing: float = 0.0
) -> Sums:
    """Returns the sums of a batch over its tokens.

    Args:
      logits: `(..., V)`.
      targets: int32 `(...)`; where the mask is False anything in 0..V-1, such as padding.
      mask: bool `(...)`, tokens that count.
      label_smoothing: see `token_losses`.
    """
    loss, nll = token_losses(logits, targets, label_smoothing)
    correct = jnp.argmax(logits, axis=-1) == targets
    # Selected, not multiplied: what stands beside the text may be anything, NaN included.
    loss, nll, correct = (
        jnp.sum(jnp.where(mask, x.astype(jnp.float32), 0.0)) for x in (loss, nll, correct)
    )
    return Sums(loss, nll, correct, jnp.sum(mask, dtype=jnp.float32))


def cross_entropy(
    logits: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    label_smoothing: float = 0.0,
    axis_name: str | None = None,
) -> tuple[jax.Array, Sums]:
    """Returns the mean loss over all tokens of a batch, and its sums.

    It is the mean over tokens, not over sentences: devices with more tokens weigh more.

    Args:
      logits: `(..., V)`.
      targets: int32 `(...)`.
      mask: bool `(...)`.
      label_smoothing: see `token_losses`.
      axis_name: of the mapped axis over which the batch is spread, under `shard_map` or `pmap`.

    Returns:
      The mean `()`, which is 0 if no token counts, and the sums over the whole batch.
    """
    sums = cross_entropy_sums(logits, targets, mask, label_smoothing)
    if axis_name is not None:
        sums = jax.tree.map(lambda x: lax.psum(x, axis_name), sums)
    return sums.loss / jnp.maximum(sums.tokens, 1), sums


def shift_right(ids: jax.Array, start_id: int) -> jax.Array:
    """Returns a decoder's input for targets `(..., T)`: the start token, and all but the last.

    >>> shift_right(jnp.array([[5, 6, 2]]), 1).tolist()
    [[1, 5, 6]]
    """
    start = jnp.full_like(ids[..., :1], start_id)
    return jnp.concatenate([start, ids[..., :-1]], axis=-1)
