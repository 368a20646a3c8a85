"""What the next token may be: rules on logits or log-probabilities, from the tokens so far.

They have the semantics, and in `constrain` the order, of the logits processors of transformers 5.
A forbidden token gets -inf. Everything has static shapes: the tokens so far are the first `at`
columns of a buffer, and `at` may be traced.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dialog.config import GenerationConfig


class Context(NamedTuple):
    """What there is before the first new token, of B sentences.

    Attributes:
      prompt: int32 `(B, P)`, what the decoder has read: one start token for an encoder-decoder, the
        conversation for a chat model, left-padded where sentences differ in length.
      prompt_mask: bool `(B, P)`, False at padding; None where there is none.
      source: int32 `(B, S)`, the encoder's input. For a chat model, the prompt again where
        `encoder_no_repeat_ngram` shall forbid to copy from it.
      source_mask: bool `(B, S)`, False at padding. None takes padding for tokens, as transformers
        does, which then forbids the padding token after a source's last tokens.
    """

    prompt: jax.Array
    prompt_mask: jax.Array | None = None
    source: jax.Array | None = None
    source_mask: jax.Array | None = None


def check(logits: jax.Array, context: Context, eos_ids: tuple[int, ...], pad_id: int) -> None:
    """Raises ValueError, with what was found, where shapes don't match or an id is out of range.

    Args:
      logits: of the first token, `(B, V)`.
      context: of the same B sentences.
      eos_ids: tokens that end a sentence.
      pad_id: what follows the end.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (B, V), found {logits.shape}")
    rows, vocabulary = logits.shape
    for name in ("prompt", "source"):
        ids, mask = getattr(context, name), getattr(context, f"{name}_mask")
        if ids is None and mask is None and name == "source":
            continue
        if ids is None or ids.ndim != 2 or ids.shape[0] != rows or ids.shape[1] == 0:
            found = None if ids is None else ids.shape
            raise ValueError(f"{name} must have shape ({rows}, at least 1), found {found}")
        if mask is not None and mask.shape != ids.shape:
            raise ValueError(f"{name}_mask must have shape {ids.shape}, found {mask.shape}")
    for name, token in (*(("eos_ids", token) for token in eos_ids), ("pad_id", pad_id)):
        if not 0 <= token < vocabulary:
            raise ValueError(f"{name} must be in [0, {vocabulary}), found {token}")


def begin(context: Context, vocabulary: int, max_new_tokens: int, pad_id: int) -> jax.Array:
    """The buffer of tokens before the first new one.

    Padding in front of a prompt becomes the id V, which is no token: no n-gram of real tokens
    contains it, so a sentence is decoded alike whatever it was padded to.

    Args:
      context: of B sentences; P tokens of prompt.
      vocabulary: V.
      max_new_tokens: room to leave.
      pad_id: what the room is filled with.

    Returns:
      int32 `(B, P + max_new_tokens)`.
    """
    prompt = context.prompt.astype(jnp.int32)
    if context.prompt_mask is not None:
        prompt = jnp.where(context.prompt_mask, prompt, vocabulary)
    room = jnp.full((prompt.shape[0], max_new_tokens), pad_id, jnp.int32)
    return jnp.concatenate([prompt, room], axis=1)


def constrain(
    logits: jax.Array,
    tokens: jax.Array,
    at: jax.Array,
    context: Context,
    options: GenerationConfig,
    eos_ids: tuple[int, ...],
) -> jax.Array:
    """Applies the rules that `options` ask for.

    In this order: n-grams of the output, n-grams of the source, minimum length, forced first token,
    forced last token; so a forced token comes even where another rule forbids it.

    Args:
      logits: float `(N, V)`, of N = B · beams hypotheses, or their log-probabilities.
      tokens: int32 `(N, L)` from `begin`, a prompt and room for `max_new_tokens`.
      at: int32 scalar, how many columns are filled.
      context: of the B sentences.
      options: static.
      eos_ids: static; tokens that end a sentence.

    Returns:
      As `logits`. A forced token has 0, all others -inf.

    Raises:
      ValueError: `options` ask for rules on a source that isn't there, or to force a token that
        isn't in the vocabulary.
    """
    vocabulary = logits.shape[-1]
    for name in ("forced_bos_id", "forced_eos_id"):
        forced = getattr(options, name)
        if forced is not None and not 0 <= forced < vocabulary:
            raise ValueError(f"{name} must be in [0, {vocabulary}), found {forced}")
    if options.no_repeat_ngram:
        logits = block_repeats(logits, tokens, at, options.no_repeat_ngram)
    if options.encoder_no_repeat_ngram:
        if context.source is None:
            raise ValueError(
                f"encoder_no_repeat_ngram {options.encoder_no_repeat_ngram} needs the encoder's "
                "input, found no source in the context"
            )
        logits = block_copies(
            logits, tokens, at, options.encoder_no_repeat_ngram, context.source, context.source_mask
        )
    if options.min_new_tokens:
        too_short = at - context.prompt.shape[1] < options.min_new_tokens
        logits = forbid(logits, eos_ids, too_short)
    if options.forced_bos_id is not None:
        logits = force(logits, options.forced_bos_id, at == 1)
    if options.forced_eos_id is not None:
        logits = force(logits, options.forced_eos_id, at == tokens.shape[1] - 1)
    return logits


def block_repeats(logits: jax.Array, tokens: jax.Array, at: jax.Array, n: int) -> jax.Array:
    """Forbids what would complete an n-gram that the tokens so far, or the prompt, contain.

    Paulus, Xiong and Socher 2018 (A Deep Reinforced Model for Abstractive Summarization), section
    2.5.

    Args:
      logits: float `(N, V)`.
      tokens: int32 `(N, L)`; ids from V on are no tokens.
      at: int32 scalar, how many columns are filled.
      n: static, at least 1.

    Returns:
      As `logits`.

    After 5 6 5, a second bigram 5 6 is forbidden:

    >>> tokens = jnp.array([[5, 6, 5, 0]])
    >>> jnp.flatnonzero(jnp.isinf(block_repeats(jnp.zeros((1, 8)), tokens, 3, 2)[0])).tolist()
    [6]
    """
    windows = tokens.shape[1] - n + 1
    if windows < 1:
        return logits
    last = _last(tokens, at, n - 1)
    repeats = jnp.arange(windows)[None] + n <= at
    for i in range(n - 1):
        repeats = repeats & (tokens[:, i : i + windows] == last[:, i : i + 1])
    return _forbid_found(logits, tokens[:, n - 1 :], repeats)


def block_copies(
    logits: jax.Array,
    tokens: jax.Array,
    at: jax.Array,
    n: int,
    source: jax.Array,
    source_mask: jax.Array | None = None,
) -> jax.Array:
    """Forbids what would complete an n-gram that the source contains.

    Args:
      logits: float `(B · beams, V)`; all beams of a sentence share its source.
      tokens: int32 `(B · beams, L)`.
      at: int32 scalar, how many columns are filled.
      n: static, at least 1.
      source: int32 `(B, S)`.
      source_mask: bool `(B, S)`, False at padding, whose n-grams don't count; None if all count.

    Returns:
      As `logits`.
    """
    rows, vocabulary = logits.shape
    batch, length = source.shape
    windows = length - n + 1
    if windows < 1:
        return logits
    if source_mask is not None:  # V marks a padded prompt; nor must the two match each other
        source = jnp.where(source_mask, source, vocabulary + 1)
    source = source[:, None]
    last = _last(tokens, at, n - 1).reshape(batch, rows // batch, n - 1)
    copies = jnp.broadcast_to(at >= n - 1, (batch, rows // batch, windows))
    for i in range(n - 1):
        copies = copies & (source[:, :, i : i + windows] == last[:, :, i : i + 1])
    ids = jnp.broadcast_to(source[:, :, n - 1 :], copies.shape)
    return _forbid_found(logits, ids.reshape(rows, windows), copies.reshape(rows, windows))


def forbid(logits: jax.Array, ids: tuple[int, ...], now: jax.Array) -> jax.Array:
    """Forbids the tokens `ids` where the bool scalar `now` is true."""
    mask = np.zeros((1, logits.shape[-1]), bool)
    mask[:, list(ids)] = True
    return jnp.where(now & jnp.asarray(mask), -jnp.inf, logits)


def force(logits: jax.Array, token: int, now: jax.Array) -> jax.Array:
    """Leaves nothing but `token`, with 0, where the bool scalar `now` is true."""
    only = np.full((1, logits.shape[-1]), -np.inf)
    only[:, token] = 0
    return jnp.where(now, jnp.asarray(only, logits.dtype), logits)


def _last(tokens: jax.Array, at: jax.Array, count: int) -> jax.Array:
    """The last `count` tokens; anything where there are not so many."""
    start = jnp.maximum(jnp.asarray(at, jnp.int32) - count, 0)
    return lax.dynamic_slice_in_dim(tokens, start, count, axis=1)


def _forbid_found(logits: jax.Array, ids: jax.Array, found: jax.Array) -> jax.Array:
    """Forbids `ids` `(N, W)` where `found`; whatever isn't in the vocabulary is dropped."""
    rows, vocabulary = logits.shape
    ids = jnp.where(found, ids, vocabulary)
    return logits.at[jnp.arange(rows)[:, None], ids].set(-jnp.inf, mode="drop")
