"""Uniform replay in device memory: pure functions on a ring buffer, each frame stored once.

What a row means, and which rows start a transition, is told in `jaxrl.windows`; `jaxrl.replay`
keeps the same contract in host memory. Everything here may be jitted (donate the state to `add`),
vmapped over a leading axis of seeds, and run under `shard_map` with each environment's ring on one
device: every leaf but the scalars `head` and `size` leads with the environments.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxrl.types import Transition
from jaxrl.windows import (
    FIRST,
    TERMINAL,
    TRUNCATED,
    VALID,
    FrameBatch,
    check_arguments,
    n_step_return,
    stack_frames,
    startable,
    window_rows,
)

_PROPOSALS = 4  # rows proposed at once per sample, as rounds are slow: a second one is rare
_MAX_ROUNDS = 1024  # so that a replay without a single start can't hang the device


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ReplayState:
    """The rows of N environments, T each.

    Attributes:
      frames: uint8 `(N, T, F)`, flat, because a TPU pads the last axis (84 to 128); bool frames
        are kept as bits, eight to a byte.
      action: uint8 `(N, T)`.
      reward: float32 `(N, T)`.
      flags: uint8 `(N, T)`, see `jaxrl.windows`.
      head: int32 `()`, next row to write, the same in every ring.
      size: int32 `()`, rows stored per environment.
      frame_shape: static, `(H, W)` or `(H, W, C)`.
      bits: static, whether frames are bool.
    """

    frames: jax.Array
    action: jax.Array
    reward: jax.Array
    flags: jax.Array
    head: jax.Array
    size: jax.Array
    frame_shape: tuple[int, ...] = field(metadata={"static": True})
    bits: bool = field(metadata={"static": True})


def _frame_bytes(frame_shape: tuple[int, ...], dtype: DTypeLike) -> int:
    if jnp.dtype(dtype) not in (jnp.uint8, jnp.bool_):
        raise ValueError(f"dtype is {jnp.dtype(dtype)}; it must be uint8 or bool")
    size = math.prod(frame_shape)
    return -(-size // 8) if jnp.dtype(dtype) == jnp.bool_ else size


def nbytes(
    capacity: int,
    num_envs: int,
    frame_shape: tuple[int, ...] = (84, 84),
    dtype: DTypeLike = np.uint8,
) -> int:
    """Bytes that `init` would claim, all at once: ask before claiming."""
    return capacity // num_envs * num_envs * (_frame_bytes(frame_shape, dtype) + 6) + 8


def init(
    capacity: int,
    num_envs: int,
    frame_shape: tuple[int, ...] = (84, 84),
    dtype: DTypeLike = np.uint8,
    *,
    stack: int = 4,
    n_step: int = 1,
) -> ReplayState:
    """Makes an empty replay.

    Args:
      capacity: most rows stored, over all environments; `capacity // num_envs` for each.
      num_envs: N, environments stepped together.
      frame_shape: (H, W) or (H, W, C) of the newest frame alone.
      dtype: of the frames, uint8 or bool.
      stack: frames in an observation; only checked against the capacity.
      n_step: rewards summed in a transition; only checked against the capacity.

    Raises:
      ValueError: an argument is out of range, or the capacity can't hold a window of each ring.
    """
    rows = check_arguments(capacity, num_envs, frame_shape, stack, n_step)
    shape = (num_envs, rows)
    return ReplayState(
        frames=jnp.zeros((*shape, _frame_bytes(frame_shape, dtype)), jnp.uint8),
        action=jnp.zeros(shape, jnp.uint8),
        reward=jnp.zeros(shape, jnp.float32),
        flags=jnp.zeros(shape, jnp.uint8),
        head=jnp.zeros((), jnp.int32),
        size=jnp.zeros((), jnp.int32),
        frame_shape=tuple(frame_shape),
        bits=jnp.dtype(dtype) == jnp.bool_,
    )


def add(
    state: ReplayState,
    frame: jax.Array,
    action: jax.Array,
    reward: jax.Array,
    terminal: jax.Array,
    truncated: jax.Array,
    first: jax.Array,
    valid: jax.Array,
) -> ReplayState:
    """Stores one row per environment, over the oldest one once the ring is full.

    Args:
      state: donate it where `add` is jitted; then the rows are written in place.
      frame: `(N, *frame_shape)`, newest frame of the observation acted in, in the state's dtype.
      action: integer `(N,)` in 0..255, which nothing checks.
      reward: float32 `(N,)`, what the action earned.
      terminal: bool `(N,)`, as the others: the action ended the game (or the life).
      truncated: the action's step cut the game.
      first: `frame` opens a game.
      valid: the action was heeded.

    Raises:
      ValueError: a wrong shape or dtype of frame.
    """
    num_envs, rows = state.flags.shape
    dtype = jnp.bool_ if state.bits else jnp.uint8
    if frame.shape != (num_envs, *state.frame_shape) or frame.dtype != dtype:
        raise ValueError(
            f"frame is {frame.dtype} {frame.shape}; expected {jnp.dtype(dtype)} "
            f"{(num_envs, *state.frame_shape)}"
        )
    frame = frame.reshape(num_envs, -1)
    stored = jnp.packbits(frame, axis=1) if state.bits else frame
    first = first | (state.size == 0)
    previous = (state.head - 1) % rows
    before = lax.dynamic_index_in_dim(state.flags, previous, axis=1, keepdims=False)
    lost = first & ((before & TERMINAL) == 0)
    before = jnp.where(lost, before & ~VALID, before)
    flags = jnp.zeros((num_envs,), jnp.uint8)
    bits = {TERMINAL: terminal, TRUNCATED: truncated, FIRST: first, VALID: valid}
    for bit, is_set in bits.items():
        flags |= jnp.where(is_set, bit, np.uint8(0))

    def write(ring: jax.Array, row: jax.Array, value: jax.Array) -> jax.Array:
        return lax.dynamic_update_index_in_dim(ring, value.astype(ring.dtype), row, axis=1)

    return replace(
        state,
        frames=write(state.frames, state.head, stored),
        action=write(state.action, state.head, action),
        reward=write(state.reward, state.head, reward),
        flags=write(write(state.flags, previous, before), state.head, flags),
        head=(state.head + 1) % rows,
        size=jnp.minimum(state.size + 1, rows),
    )


def is_start(
    state: ReplayState, env: jax.Array, row: jax.Array, *, stack: int, n_step: int
) -> jax.Array:
    """Whether the rows `(B,)` of environments `(B,)` start transitions, bool `(B,)`."""
    rows = state.flags.shape[1]
    offset = (row - state.head + state.size) % rows
    flags = state.flags[env[:, None], window_rows(row, rows, stack, n_step)]
    return startable(flags, offset, state.size, stack, n_step)


def draw(
    state: ReplayState, key: jax.Array, batch_size: int, *, stack: int, n_step: int
) -> tuple[jax.Array, jax.Array]:
    """Chooses starts uniformly, with replacement, over exactly the stored transitions.

    Rows are proposed until each is a start (rejection), so what isn't one is never chosen.

    Returns:
      `(env, row)`, int32 `(B,)` each, for `gather`; row is -1 where no transition was found in
      4096 proposals: nothing can be sampled yet.
    """
    num_envs, rows = state.flags.shape
    span = jnp.maximum(state.size - n_step, 1)  # the newest n_step rows lack a successor
    total = (num_envs * span).astype(jnp.uint32)
    # The largest multiple of total that fits 32 bits, less one: words above it would bias `%`.
    fair = ~((jnp.zeros((), jnp.uint32) - total) % total)

    def propose(carry):
        round_, env, row = carry
        shape = (batch_size, _PROPOSALS)
        words = jax.random.bits(jax.random.fold_in(key, round_), shape, jnp.uint32).reshape(-1)
        envs, offsets = jnp.divmod((words % total).astype(jnp.int32), span)
        rows_ = (state.head - state.size + offsets) % rows
        accept = is_start(state, envs, rows_, stack=stack, n_step=n_step) & (words <= fair)
        accept = accept.reshape(shape)
        chosen = accept.argmax(axis=1) + jnp.arange(batch_size) * _PROPOSALS
        new = accept.any(axis=1) & (row < 0)
        return round_ + 1, jnp.where(new, envs[chosen], env), jnp.where(new, rows_[chosen], row)

    def unfinished(carry):
        round_, _, row = carry
        return (round_ < _MAX_ROUNDS) & (row < 0).any()

    none = (jnp.zeros((batch_size,), jnp.int32), jnp.full((batch_size,), -1, jnp.int32))
    _, env, row = lax.while_loop(unfinished, propose, (jnp.zeros((), jnp.int32), *none))
    return env, row


def gather(
    state: ReplayState,
    env: jax.Array,
    row: jax.Array,
    *,
    stack: int,
    n_step: int,
    discount: float | jax.Array,
) -> FrameBatch:
    """Reads the transitions that start at `row` `(B,)` of `env` `(B,)`.

    Where row is -1 the reward is NaN, so that sampling from nothing can't pass for learning.
    """
    rows = state.flags.shape[1]
    window = window_rows(row, rows, stack, n_step)
    powers = jnp.stack([jnp.asarray(discount**k, jnp.float32) for k in range(n_step + 1)])
    mask_tm1, mask_t, steps, r_t, discount_t = n_step_return(
        state.flags[env[:, None], window],
        state.reward[env[:, None], window[:, stack - 1 : -1]],
        powers,
        stack,
    )
    frames = state.frames[env[:, None], window]
    if state.bits:
        frames = jnp.unpackbits(frames, axis=2, count=math.prod(state.frame_shape)).astype(bool)
    return FrameBatch(
        frames=frames.reshape(*window.shape, *state.frame_shape),
        mask_tm1=mask_tm1,
        mask_t=mask_t,
        steps=steps,
        a_tm1=state.action[env, row % rows].astype(jnp.int32),
        r_t=jnp.where(row < 0, jnp.float32(jnp.nan), r_t),
        discount_t=discount_t,
    )


def sample(
    state: ReplayState,
    key: jax.Array,
    batch_size: int,
    *,
    stack: int = 4,
    n_step: int = 1,
    discount: float | jax.Array = 0.99,
) -> Transition:
    """Samples transitions uniformly, with replacement.

    Args:
      state: with a transition stored; else the rewards are NaN.
      key: the same key and state give the same batch.
      batch_size: B, static as are `stack` and `n_step`.
      stack: frames in an observation; 1 keeps a frame's own channels.
      n_step: rewards summed in a transition.
      discount: γ.

    Returns:
      Transition with leading axis B; observations in the frames' dtype.
    """
    env, row = draw(state, key, batch_size, stack=stack, n_step=n_step)
    return stack_frames(gather(state, env, row, stack=stack, n_step=n_step, discount=discount))
