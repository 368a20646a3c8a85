"""Windows of a replay that stores each frame once: which start a transition, and what it is.

One row is stored per environment and step: the newest frame of the observation, the action chosen
in it, and what the environment answered. Row t of an environment is

    (frame_t, a_t, r_{t+1}, terminal_{t+1}, truncated_{t+1}, first_t, valid_t)

and stacks and n-step returns are put together when sampling, from a *window* of `stack + n_step`
consecutive rows. Four rules make every window safe:

- A stack looks back to the last `first` row and is zero-padded before it. It survives a life loss.
- A return stops after a terminal row (no bootstrap), after a truncated one, and before an invalid
  one (both bootstrap from the next row's frame). An invalid row never starts a transition.
- A row that a `first` row follows without a terminal between them has lost its successor (its
  environment was reset or restarted), so `add` marks it invalid.
- A start must have all its rows stored: `n_step` rows after it, its unpadded stack before it.

`jaxrl.replay` keeps the rows in host memory and `jaxrl.device_replay` on the device; both read them
through these functions, which take NumPy and JAX arrays alike.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxrl.types import Array, Transition

TERMINAL, TRUNCATED, FIRST, VALID = (np.uint8(1 << bit) for bit in range(4))


class FrameBatch(NamedTuple):
    """A sampled batch before stacking: W = stack + n_step frames a sample, each held once.

    Attributes:
      frames: `(B, W, *frame_shape)`, oldest first; those of s_tm1 are the first `stack`.
      mask_tm1: bool `(B, stack)`; False where s_tm1 is zero-padded.
      mask_t: bool `(B, stack)`; False where s_t is zero-padded.
      steps: int32 `(B,)` in 1..n_step; s_t is made of `frames[:, steps:steps + stack]`.
      a_tm1: int32 `(B,)`.
      r_t: float32 `(B,)`, Σ γᵏ r over the window's `steps` rewards.
      discount_t: float32 `(B,)`, γ^steps, or 0 where the window ended in a termination.
    """

    frames: Array
    mask_tm1: Array
    mask_t: Array
    steps: Array
    a_tm1: Array
    r_t: Array
    discount_t: Array


def _numpy_for(x: Array) -> Any:
    return np if isinstance(x, np.ndarray) else jnp


def _slice_at(x: Array, steps: Array, stack: int) -> Array:
    """`x[:, steps:steps + stack]` row by row; selecting among static slices beats a gather."""
    xp = _numpy_for(x)
    out = x[:, 1 : 1 + stack]
    for step in range(2, x.shape[1] - stack + 1):
        chosen = (steps == step).reshape((-1,) + (1,) * (x.ndim - 1))
        out = xp.where(chosen, x[:, step : step + stack], out)
    return out


def _stacked(frames: Array, mask: Array) -> Array:
    xp = _numpy_for(frames)
    stack, mask = mask.shape[1], mask.reshape(mask.shape + (1,) * (frames.ndim - 2))
    frames = xp.where(mask, frames, xp.zeros((), frames.dtype))
    if xp is jnp and stack == 4 and frames.ndim == 4 and frames.dtype == np.uint8:
        # Four bytes side by side are one 32-bit word: 10 times faster on CPU than a transposition.
        shifted = [frames[:, k].astype(np.uint32) << np.uint32(8 * k) for k in range(4)]
        return lax.bitcast_convert_type(functools.reduce(operator.or_, shifted), np.uint8)
    frames = xp.moveaxis(frames, 1, 3)
    return frames.reshape(frames.shape[:3] + (-1,))


def stack_frames(batch: FrameBatch) -> Transition:
    """Builds the observations of a sampled batch; pure, meant to run inside the jitted update.

    A frame `(H, W)` is one channel and a frame `(H, W, C)` is C of them; an observation is
    `(H, W, stack * C)`, oldest frame first, in the frames' dtype.

    Args:
      batch: of NumPy or JAX arrays; the result's arrays are of the same kind.

    Returns:
      Transition with leading axis B.
    """
    stack = batch.mask_tm1.shape[1]
    return Transition(
        s_tm1=_stacked(batch.frames[:, :stack], batch.mask_tm1),
        a_tm1=batch.a_tm1,
        r_t=batch.r_t,
        discount_t=batch.discount_t,
        s_t=_stacked(_slice_at(batch.frames, batch.steps, stack), batch.mask_t),
    )


def _shown(first: Array) -> Any:
    """Which frames of stacks with these `first` flags `(B, stack)` show: no game opens later."""
    later = np.triu(np.ones((first.shape[1],) * 2, bool), k=1)
    return ~(first[:, None, :] & later[None]).any(axis=-1)


def check_arguments(
    capacity: int, num_envs: int, frame_shape: tuple[int, ...], stack: int, n_step: int
) -> int:
    """Returns the rows per environment, `capacity // num_envs`.

    Raises:
      ValueError: an argument is out of range, or an environment's ring can't hold a window.
    """
    if len(frame_shape) not in (2, 3):
        raise ValueError(f"frame_shape is {frame_shape}; it must be (H, W) or (H, W, C)")
    for name, value in {"num_envs": num_envs, "stack": stack, "n_step": n_step}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    least = num_envs * (stack + n_step + 1)
    if capacity < least:
        raise ValueError(
            f"capacity is {capacity}; num_envs {num_envs}, stack {stack} and n_step {n_step} "
            f"need at least num_envs * (stack + n_step + 1) = {least}"
        )
    return capacity // num_envs


def window_rows(row: Array, rows: int, stack: int, n_step: int) -> Array:
    """Ring positions `(B, stack + n_step)` of the windows of starts `row` `(B,)`."""
    columns = np.arange(1 - stack, n_step + 1, dtype=row.dtype)
    return (row[:, None] + columns[None]) % rows


def startable(flags: Array, offset: Array, size: Any, stack: int, n_step: int) -> Any:
    """Whether starts can be sampled, bool `(B,)`, NumPy or JAX as its arguments are.

    Args:
      flags: uint8 `(B, stack + n_step)`, the windows' flags.
      offset: integer `(B,)`, how many rows older than the start are stored.
      size: rows stored per environment.
      stack: frames in an observation.
      n_step: longest return.
    """
    shown = _shown((flags[:, :stack] & FIRST) != 0)
    stored = offset[:, None] >= np.arange(stack - 1, -1, -1, dtype=offset.dtype)[None]
    valid = (flags[:, stack - 1] & VALID) != 0
    return valid & (offset < size - n_step) & (stored | ~shown).all(axis=-1)


def n_step_return(
    flags: Array, reward: Array, powers: Array, stack: int
) -> tuple[Array, Array, Array, Array, Array]:
    """Reads windows that start transitions.

    Args:
      flags: uint8 `(B, stack + n_step)`.
      reward: float32 `(B, n_step)`, of the start and the rows after it.
      powers: float32 `(n_step + 1,)`, γ⁰ to γⁿ.
      stack: frames in an observation.

    Returns:
      `mask_tm1, mask_t, steps, r_t, discount_t`, as in `FrameBatch`.
    """
    xp = _numpy_for(flags)
    n_step = reward.shape[1]
    now, after = flags[:, stack - 1 : -1], flags[:, stack:]
    terminal = (now & TERMINAL) != 0
    stop = ((now & (TERMINAL | TRUNCATED)) != 0) | ((after & VALID) == 0)
    earlier = np.tril(np.ones((n_step, n_step), bool), k=-1)
    summed = ~(stop[:, None, :] & earlier[None]).any(axis=-1)  # step k: nothing before it stopped
    steps = summed.sum(axis=-1, dtype=np.int32)
    r_t = xp.where(summed, reward * powers[None, :-1], np.float32(0)).sum(axis=-1)
    ended = (summed & terminal).any(axis=-1)
    discount_t = xp.where(ended, np.float32(0), powers[steps])
    first = (flags & FIRST) != 0
    mask_t = _shown(_slice_at(first, steps, stack))
    return _shown(first[:, :stack]), mask_t, steps, r_t, discount_t
