"""Beam search, with the semantics of transformers 5, in one `while_loop`.

Of each sentence, K hypotheses run. A step ranks all their continuations and takes the best C, with
C large enough that K of them don't end. Those that end among the best K are finished, and compete
for K places by log-probability over length to a power; of those that don't, the best K run on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dialog.config import GenerationConfig
from dialog.decoding.constraints import Context, begin, check, constrain
from dialog.decoding.greedy import Output, Step

# The score of a hypothesis that isn't there, as transformers has it. Not -inf, which forbidden ones
# have: those must not take a place, not even an empty one.
_NONE = -1e9


class State(NamedTuple):
    """The search of B sentences; K hypotheses of each run, and K places are for finished ones.

    Attributes:
      tokens: int32 `(B, K, P + max_new_tokens)`, of those that run.
      scores: float32 `(B, K)`, their log-probabilities, the highest first.
      rows: int32 `(B · K,)`, in the cache, of the hypotheses that they continue.
      finished: int32 `(B, K, max_new_tokens)`, padding after the end.
      finished_lengths: int32 `(B, K)`; 0 where the place is free.
      finished_scores: float32 `(B, K)`, over length to the power, the highest first.
      open: bool `(B,)`, whether the search of a sentence goes on.
      at: int32 scalar, how many columns of `tokens` are filled.
      cache: the model's, of B · K rows; it has all but the last token.
    """

    tokens: jax.Array
    scores: jax.Array
    rows: jax.Array
    finished: jax.Array
    finished_lengths: jax.Array
    finished_scores: jax.Array
    open: jax.Array
    at: jax.Array
    cache: Any


def search(
    step: Step,
    cache: Any,
    logits: jax.Array,
    context: Context,
    options: GenerationConfig,
    *,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> Output:
    """Finds a likely continuation of each sentence.

    A sentence's search ends when its K places are taken and, unless `early_stopping`, the best that
    runs, at its present length, scores less than the worst that has finished. Its neighbours in the
    batch change nothing. To jit it, bind or declare static all but `cache`, `logits` and `context`.

    Args:
      step: the model; it sees B · K rows, row b · K + k being beam k of sentence b.
      cache: its cache, the prompt in it, of one row a sentence; leaves `(B, ...)`.
      logits: of the first new token, float32 `(B, V)`.
      context: of the B sentences.
      options: K is `num_beams`.
      eos_ids: tokens that end a sentence; there may be none.
      pad_id: what follows the end.

    Returns:
      The best of each sentence, and its score: the sum of its tokens' log-probabilities, a forced
      one counting 0, over its length to the power `length_penalty`. Where the rules forbid every
      continuation before any hypothesis has finished, the length is 0 and the score -1e9.

    Raises:
      ValueError: shapes that don't match, ids that aren't in the vocabulary, `sample`, or rules on
        a source that isn't there.
    """
    check(logits, context, eos_ids, pad_id)
    if options.sample:
        raise ValueError("beams are not drawn, found sample True: use greedy.generate")
    batch, vocabulary = logits.shape
    if vocabulary < max(2, 1 + len(eos_ids)):
        raise ValueError(
            f"the vocabulary must have a token that isn't in eos_ids, found {vocabulary} tokens "
            f"and eos_ids {eos_ids}"
        )
    for leaf in jax.tree.leaves(cache):
        if leaf.shape[:1] != (batch,):
            raise ValueError(f"the cache must have {batch} rows in front, found {leaf.shape}")
    beams, new = options.num_beams, options.max_new_tokens
    repeat = lambda x: jnp.repeat(x, beams, axis=0)  # noqa: E731
    tokens = repeat(begin(context, vocabulary, new, pad_id)).reshape(batch, beams, -1)
    state = State(
        tokens=tokens,
        # All hypotheses are the same at first, and one of them is enough.
        scores=jnp.full((batch, beams), _NONE, jnp.float32).at[:, 0].set(0),
        rows=jnp.arange(batch * beams, dtype=jnp.int32),
        finished=jnp.full((batch, beams, new), pad_id, jnp.int32),
        finished_lengths=jnp.zeros((batch, beams), jnp.int32),
        finished_scores=jnp.full((batch, beams), _NONE, jnp.float32),
        open=jnp.ones(batch, bool),
        at=jnp.int32(context.prompt.shape[1]),
        cache=jax.tree.map(repeat, cache),
    )

    def body(state: State) -> State:
        cache = jax.tree.map(lambda leaf: leaf[state.rows], state.cache)
        last = state.at - 1
        ids = lax.dynamic_index_in_dim(state.tokens, last, axis=2, keepdims=False)
        logits, cache = step(ids.reshape(-1), last, cache)
        return _extend(state._replace(cache=cache), logits, context, options, eos_ids, pad_id)

    # The first choice stands before the loop, so that no step is run after the last one.
    state = _extend(state, repeat(logits), context, options, eos_ids, pad_id)
    state = lax.while_loop(lambda state: jnp.any(state.open), body, state)
    return Output(state.finished[:, 0], state.finished_lengths[:, 0], state.finished_scores[:, 0])


def _extend(
    state: State,
    logits: jax.Array,
    context: Context,
    options: GenerationConfig,
    eos_ids: tuple[int, ...],
    pad_id: int,
) -> State:
    """Chooses the next K hypotheses from logits `(B · K, V)`, and keeps those that finish."""
    batch, beams, length = state.tokens.shape
    vocabulary = logits.shape[-1]
    prompt = context.prompt.shape[1]

    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    flat = state.tokens.reshape(batch * beams, length)
    log_probs = constrain(log_probs, flat, state.at, context, options, eos_ids)
    scores = state.scores[:, :, None] + log_probs.reshape(batch, beams, vocabulary)
    candidates = max(2, 1 + len(eos_ids)) * beams
    scores, choice = lax.top_k(scores.reshape(batch, beams * vocabulary), candidates)
    parents, ids = choice // vocabulary, choice % vocabulary
    tokens = lax.dynamic_update_slice_in_dim(
        _gather(state.tokens, parents), ids[:, :, None], state.at, axis=2
    )
    ends = jnp.isin(ids, jnp.asarray(eos_ids, jnp.int32)) | (state.at + 1 == length)

    # Which run on. One that has ended does so only for want of others, and then it doesn't count.
    running, best = lax.top_k(jnp.where(ends, scores + _NONE, scores), beams)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None] * beams + _gather(parents, best)

    # Which are kept: finished ones, old and new. Powers in float64, divisions in float32.
    count = state.at + 1 - prompt
    powers = np.arange(1, options.max_new_tokens + 1, dtype=np.float64) ** options.length_penalty
    power = jnp.asarray(powers, jnp.float32)[count - 1]
    finish = ends & state.open[:, None] & (jnp.arange(candidates) < beams)[None]
    finished_scores, kept = lax.top_k(
        jnp.concatenate([state.finished_scores, jnp.where(finish, scores / power, _NONE)], 1), beams
    )
    finished = _gather(jnp.concatenate([state.finished, tokens[:, :, prompt:]], 1), kept)
    lengths = jnp.where(finish, count, 0)
    lengths = _gather(jnp.concatenate([state.finished_lengths, lengths], 1), kept)

    full = jnp.all(lengths > 0, axis=1)
    # All that run have ended where there is no room, or nothing else is allowed.
    go_on = (running[:, 0] > _NONE / 2) & (running[:, 0] / power > finished_scores[:, -1])
    if options.early_stopping:
        go_on = go_on & ~full
    return state._replace(
        tokens=_gather(tokens, best),
        scores=running,
        rows=rows.reshape(-1),
        finished=finished,
        finished_lengths=lengths,
        finished_scores=finished_scores,
        open=state.open & go_on,
        at=state.at + 1,
    )


def _gather(x: jax.Array, indices: jax.Array) -> jax.Array:
    """Hypotheses `(B, I, ...)` of `(B, K, ...)` by indices `(B, I)`."""
    return jnp.take_along_axis(x, indices.reshape(indices.shape + (1,) * (x.ndim - 2)), axis=1)
