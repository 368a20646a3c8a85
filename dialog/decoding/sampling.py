"""Drawing a token: temperature, top-k, top-p, in the order of transformers' logits warpers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from dialog.config import GenerationConfig


def draw(keys: jax.Array, logits: jax.Array, options: GenerationConfig) -> jax.Array:
    """Draws a token for each sentence.

    Args:
      keys: `(N,)` keys, one a sentence, so that it draws alike whatever its neighbours are.
      logits: float32 `(N, V)`.
      options: static.

    Returns:
      int32 `(N,)`.
    """
    tokens = jax.vmap(jax.random.categorical)(keys, warp(logits, options))
    return tokens.astype(jnp.int32)


def warp(logits: jax.Array, options: GenerationConfig) -> jax.Array:
    """The logits of the law that is drawn from: `(N, V)`, -inf for what is never drawn."""
    if options.temperature != 1:
        logits = logits / options.temperature
    if options.top_k:
        logits = keep_top_k(logits, options.top_k)
    if options.top_p < 1:
        logits = keep_top_p(logits, options.top_p)
    return logits


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Keeps the k likeliest tokens, and what ties with the last of them.

    Fan, Lewis and Dauphin 2018 (Hierarchical Neural Story Generation), section 5.4.

    Args:
      logits: float `(N, V)`.
      k: static, at least 1; all are kept from V on.

    Returns:
      As `logits`, -inf where not kept.

    >>> keep_top_k(jnp.array([[1.0, 3.0, 2.0, 2.0]]), 2).tolist()
    [[-inf, 3.0, 2.0, 2.0]]
    """
    least = lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < least, -jnp.inf, logits)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keeps the fewest tokens whose probabilities reach p in sum; one at least.

    Holtzman et al. 2020 (The Curious Case of Neural Text Degeneration), equation 2. Of tied tokens
    that aren't all needed, those with the larger ids are kept, as transformers does.

    Args:
      logits: float `(N, V)`.
      p: static, in (0, 1].

    Returns:
      As `logits`, -inf where not kept.

    >>> keep_top_p(jnp.log(jnp.array([[0.2, 0.5, 0.3]])), 0.6)[0] > -jnp.inf
    Array([False,  True,  True], dtype=bool)
    """
    order = jnp.argsort(logits, axis=-1, stable=True)
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    # Summed from the least likely on, which keeps the digits of the tail that is cut off.
    below = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    cut = (below <= jnp.asarray(1 - p, logits.dtype)).at[:, -1].set(False)
    cut = jnp.zeros_like(cut).at[jnp.arange(len(cut))[:, None], order].set(cut)
    return jnp.where(cut, -jnp.inf, logits)
