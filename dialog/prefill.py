"""A model and its prompts, made ready for decoding: the one place where the two meet."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dialog.decoding.constraints import Context
from dialog.decoding.greedy import Step
from dialog.models.attention import KeyValue
from dialog.models.encoder_decoder import EncoderDecoder, init_cache
from dialog.models.llama import Llama

CHUNK = 64  # tokens of a prompt that a decoder reads at once


class Memory(NamedTuple):
    """What a decoder sees of its encoder's input, the same at every step.

    Attributes:
      cross: keys and values for each layer, of B sentences.
      mask: bool `(B, S)`, False for padding.
    """

    cross: tuple[KeyValue, ...]
    mask: jax.Array


class Cache(NamedTuple):
    """What a decoder without an encoder has read.

    Attributes:
      layers: keys and values of each.
      padding: int32 `(N,)`, places in front of each prompt that hold nothing.
    """

    layers: tuple[KeyValue, ...]
    padding: jax.Array


class Ready(NamedTuple):
    """What decoding begins with.

    Attributes:
      memory: for `step_of`; None for a decoder alone.
      cache: of the prompts, one row a sentence.
      logits: of the first new token, float32 `(B, V)`.
      context: the prompts, for rules on n-grams.
    """

    memory: Memory | None
    cache: Any
    logits: jax.Array
    context: Context


def prepare(
    model: nn.Module, params: Any, ids: jax.Array, mask: jax.Array, new_tokens: int
) -> Ready:
    """Reads the prompts.

    A decoder reads them a chunk after the other. Chunks of padding alone are passed over, so that
    prompts may be padded to a fixed length, for the sake of a fixed shape, at no more cost than
    attention to places that are masked.

    Args:
      model: an `EncoderDecoder`, whose encoder reads the prompts and whose output begins with its
        start token, or a `Llama`, whose output follows them.
      params: its parameters.
      ids: int32 `(B, P)`. A decoder's are padded on the left, and P is at most 64 or a multiple
        of 64.
      mask: bool `(B, P)`, False for padding. Each prompt has one token at least.
      new_tokens: room in the cache.

    Raises:
      ValueError: prompt or output is longer than the model's positions, or P is something else.
    """
    if isinstance(model, Llama):
        return _read(model, params, ids, mask, new_tokens)
    assert isinstance(model, EncoderDecoder)
    encoded = model.apply({"params": params}, ids, mask, method="encode")
    cross: Any = model.apply({"params": params}, encoded, method="cross")
    memory = Memory(cross, mask)
    # The last token is never read again.
    cache = init_cache(model.config, ids.shape[0], new_tokens, model.dtype)
    start = jnp.full((ids.shape[0], 1), model.config.decoder_start_id, jnp.int32)
    logits, cache = step_of(model, params, memory)(start[:, 0], jnp.int32(0), cache)
    return Ready(memory, cache, logits, Context(start, None, ids, mask))


def step_of(model: nn.Module, params: Any, memory: Memory | None) -> Step:
    """Returns the model as decoding sees it; `memory` is from `prepare`."""
    if isinstance(model, Llama):
        return lambda ids, at, cache: _extend(model, params, ids[:, None], at, cache)
    assert memory is not None
    cross, mask = memory

    def step(ids: jax.Array, at: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        at = jnp.asarray(at, jnp.int32)
        seen = jnp.arange(cache[0].key.shape[1]) <= at
        given = ids[:, None], at[None, None], seen[None, None], cross, mask, cache, at
        out: Any = model.apply({"params": params}, *given, method="decode")
        return out[0][:, 0], out[1]

    return step


def _read(model: Llama, params: Any, ids: jax.Array, mask: jax.Array, new_tokens: int) -> Ready:
    config, (rows, length) = model.config, ids.shape
    chunk = min(CHUNK, length)
    if length % chunk:
        raise ValueError(f"prompts must be padded to a multiple of {CHUNK}, found {length} tokens")
    padding = length - jnp.sum(mask, axis=1, dtype=jnp.int32)
    shape = rows, length + new_tokens - 1, config.key_value_heads, config.head_dim
    layers = (KeyValue.empty(*shape, model.dtype),) * config.layers

    def more(carry: tuple[jax.Array, jax.Array, Cache]) -> tuple[jax.Array, jax.Array, Cache]:
        at, _, cache = carry
        part = lax.dynamic_slice_in_dim(ids, at, chunk, axis=1)
        return at + chunk, *_extend(model, params, part, at, cache)

    first = jnp.min(padding) // chunk * chunk
    nothing = jnp.zeros((rows, config.vocab_size), jnp.float32)
    _, logits, cache = lax.while_loop(
        lambda carry: carry[0] < length, more, (first, nothing, Cache(layers, padding))
    )
    return Ready(None, cache, logits, Context(ids, mask))


def _extend(
    model: Llama, params: Any, ids: jax.Array, at: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Puts tokens `(N, T)` into the cache at `at`; the logits of what follows the last of them."""
    places = jnp.asarray(at, jnp.int32) + jnp.arange(ids.shape[1], dtype=jnp.int32)
    slots = jnp.arange(cache.layers[0].key.shape[1], dtype=jnp.int32)
    padding = cache.padding[:, None]
    positions = jnp.maximum(places[None] - padding, 0)
    seen = (slots[None, None] >= padding[:, None]) & (slots[None, None] <= places[None, :, None])
    given = ids, positions, seen, cache.layers, at
    out: Any = model.apply({"params": params}, *given, last_only=True, method="decode")
    return out[0][:, 0], Cache(out[1], cache.padding)
