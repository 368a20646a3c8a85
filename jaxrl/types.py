"""The two records that pass between the parts of an agent: transitions and time steps."""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array | np.ndarray


class Transition(NamedTuple):
    """What a loss sees, with rlax's time indices; leaves may carry leading batch axes.

    Attributes:
      s_tm1: observation in which the action was chosen, uint8 `(..., H, W, C)`.
      a_tm1: action, int32 `(...)`.
      r_t: (n-step) reward, float32 `(...)`.
      discount_t: γⁿ, or 0 where the window ended in a termination, float32 `(...)`.
      s_t: observation from which to bootstrap, like `s_tm1`.
    """

    s_tm1: Array
    a_tm1: Array
    r_t: Array
    discount_t: Array
    s_t: Array


class TimeStep(NamedTuple):
    """What an environment answers, for N environments at once.

    Termination and truncation are told apart, and both are told apart from validity, because they
    mean three things to a replay: do not bootstrap, bootstrap from this very frame, and do not
    learn from this row at all.

    Attributes:
      frame: newest frame only, uint8 `(N, 84, 84)`; stacking is the caller's.
      reward: reward of the step that led here, float32 `(N,)`, never clipped.
      terminal: bool `(N,)`; the step ended the game (or a life, where the protocol says so).
      truncated: bool `(N,)`; the step hit the frame cap: the game is cut, not lost.
      first: bool `(N,)`; `frame` opens a game after a true reset, so a stack starts with zeros.
      valid: bool `(N,)`; whether the *next* action will be heeded. False on the last frame of a
        game (the next step only resets) and where the protocol forces the next action.
      episode_over: bool `(N,)`; the full game ended here (a lost life never sets it).
      episode_return: float32 `(N,)`; unclipped return of the full game so far.
    """

    frame: np.ndarray
    reward: np.ndarray
    terminal: np.ndarray
    truncated: np.ndarray
    first: np.ndarray
    valid: np.ndarray
    episode_over: np.ndarray
    episode_return: np.ndarray
