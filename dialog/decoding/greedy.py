"""One token after the other: the likeliest, or one that is drawn.

`generate` runs to the end in one `while_loop`. `start` and `advance` do the same token by token,
for whoever wants to show them as they come:

    state = start(logits, cache, context, options, key, eos_ids=eos_ids, pad_id=pad_id)
    one_more = jax.jit(partial(advance, step, options=options, eos_ids=eos_ids, pad_id=pad_id))
    while running(state):
        print(state.tokens[:, state.at - 1])
        state = one_more(state, context)
    print(state.tokens[:, state.at - 1])
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dialog.config import GenerationConfig
from dialog.decoding.constraints import Context, begin, check, constrain
from dialog.decoding.sampling import draw

Step = Callable[[jax.Array, jax.Array, Any], tuple[jax.Array, Any]]
"""The model: the last tokens int32 `(N,)`, how many come before them in the decoder's buffer (int32
scalar), and a cache whose leaves have N rows; to the next logits float32 `(N, V)` and the cache."""


class Output(NamedTuple):
    """What was generated.

    Attributes:
      tokens: int32 `(B, max_new_tokens)`, without the prompt; padding after the end.
      lengths: int32 `(B,)`, in tokens, that which ended the sentence included.
      scores: float32 `(B,)`: from `generate`, the mean log-probability of a sentence's tokens under
        the model, before any rule or temperature; from `beam.search`, what hypotheses are ranked
        by.
    """

    tokens: jax.Array
    lengths: jax.Array
    scores: jax.Array


class State(NamedTuple):
    """Sentences on their way.

    Attributes:
      tokens: int32 `(N, P + max_new_tokens)`, from `constraints.begin`.
      at: int32 scalar, how many columns are filled.
      ended: bool `(N,)`.
      lengths: int32 `(N,)`, new tokens, the end included.
      log_probs: float32 `(N,)`, sum over new tokens.
      cache: the model's; it doesn't have the last token yet.
      keys: `(N,)` keys; None where nothing is drawn.
    """

    tokens: jax.Array
    at: jax.Array
    ended: jax.Array
    lengths: jax.Array
    log_probs: jax.Array
    cache: Any
    keys: jax.Array | None


def generate(
    step: Step,
    cache: Any,
    logits: jax.Array,
    context: Context,
    options: GenerationConfig,
    key: jax.Array | None = None,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Output:
    """Generates until all sentences have ended or are `max_new_tokens` long.

    To jit it, bind or declare static all but `cache`, `logits`, `context` and `key`.

    Args:
      step: the model.
      cache: its cache, the prompt in it; leaves `(N, ...)`.
      logits: of the first new token, float32 `(N, V)`.
      context: of the N sentences.
      options: `num_beams` must be 1.
      key: needed where `options.sample`. Sentence n draws from `fold_in(key, n)`; or give `(N,)`
        keys, and a sentence with the same key is the same whatever row it is in.
      eos_ids: tokens that end a sentence; there may be none.
      pad_id: what follows the end.

    Returns:
      Tokens, lengths and mean log-probabilities.

    Raises:
      ValueError: shapes that don't match, ids that aren't in the vocabulary, several beams, a
        missing key, or rules on a source that isn't there.

    A model to which v is followed by v + 1; token 3 is the end:

    >>> step = lambda ids, at, cache: (jax.nn.one_hot(ids + 1, 5), cache)
    >>> context = Context(jnp.array([[0], [2]]))
    >>> first, _ = step(context.prompt[:, -1], 0, ())
    >>> options = GenerationConfig(max_new_tokens=4)
    >>> generate(step, (), first, context, options, eos_ids=(3,), pad_id=4).tokens.tolist()
    [[1, 2, 3, 4], [3, 4, 4, 4]]
    """
    fixed: dict[str, Any] = {"options": options, "eos_ids": eos_ids, "pad_id": pad_id}
    state = start(logits, cache, context, key=key, **fixed)
    state = lax.while_loop(
        running, lambda state: advance(step, state, context=context, **fixed), state
    )
    tokens = state.tokens[:, context.prompt.shape[1] :]
    return Output(tokens, state.lengths, state.log_probs / state.lengths.astype(jnp.float32))


def start(
    logits: jax.Array,
    cache: Any,
    context: Context,
    options: GenerationConfig,
    key: jax.Array | None = None,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> State:
    """Chooses the first token. Arguments and errors as of `generate`."""
    check(logits, context, eos_ids, pad_id)
    if options.num_beams != 1:
        raise ValueError(f"num_beams must be 1, found {options.num_beams}: use beam.search")
    if options.sample and key is None:
        raise ValueError("sample needs a key, found None")
    rows, vocabulary = logits.shape
    zeros = jnp.zeros(rows, jnp.int32)
    state = State(
        tokens=begin(context, vocabulary, options.max_new_tokens, pad_id),
        at=jnp.int32(context.prompt.shape[1]),
        ended=jnp.zeros(rows, bool),
        lengths=zeros,
        log_probs=zeros.astype(jnp.float32),
        cache=cache,
        keys=_keys(key, rows) if options.sample and key is not None else None,
    )
    return _append(state, logits, context, options, eos_ids, pad_id)


def advance(
    step: Step,
    state: State,
    context: Context,
    options: GenerationConfig,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> State:
    """Runs the model on the last token and chooses one more; only while `running(state)`.

    Sentences that have ended get padding. Arguments as of `generate`.
    """
    last = state.at - 1
    ids = lax.dynamic_index_in_dim(state.tokens, last, axis=1, keepdims=False)
    logits, cache = step(ids, last, state.cache)
    return _append(state._replace(cache=cache), logits, context, options, eos_ids, pad_id)


def running(state: State) -> jax.Array:
    """Whether there is room, and a sentence that hasn't ended: bool scalar."""
    return (state.at < state.tokens.shape[1]) & ~jnp.all(state.ended)


def _append(
    state: State,
    logits: jax.Array,
    context: Context,
    options: GenerationConfig,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> State:
    logits = logits.astype(jnp.float32)
    allowed = constrain(logits, state.tokens, state.at, context, options, eos_ids)
    if state.keys is None:
        tokens = jnp.argmax(allowed, axis=-1).astype(jnp.int32)
    else:  # counted from the prompt's end, so that its padding doesn't matter
        nth = state.at - context.prompt.shape[1]
        keys = jax.vmap(partial(jax.random.fold_in, data=nth))(state.keys)
        tokens = draw(keys, allowed, options)
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0]
    tokens = jnp.where(state.ended, pad_id, tokens)
    return state._replace(
        tokens=lax.dynamic_update_slice_in_dim(state.tokens, tokens[:, None], state.at, axis=1),
        at=state.at + 1,
        ended=state.ended | jnp.isin(tokens, jnp.asarray(eos_ids, jnp.int32)),
        lengths=state.lengths + (~state.ended).astype(jnp.int32),
        log_probs=state.log_probs + jnp.where(state.ended, 0, log_probs),
    )


def _keys(key: jax.Array, rows: int) -> jax.Array:
    """One key a sentence, from one for all or as they are."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.ndim == 0:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(rows))
    if key.shape != (rows,):
        raise ValueError(f"key must be one, or {rows} of them, found shape {key.shape}")
    return key
