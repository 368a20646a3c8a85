"""Uniform replay in host memory: a ring buffer of rows, each frame stored once.

What a row means, and which rows start a transition, is told in `jaxrl.windows`;
`jaxrl.device_replay` keeps the same contract in device memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

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

__all__ = ["FrameBatch", "HostReplay", "stack_frames"]

_MAX_ROUNDS = 64  # rejection rounds before all starts are listed instead


class HostReplay:
    """Ring buffer in host memory, one contiguous ring per environment; see `jaxrl.windows`.

    Frames take `capacity` times their size (7.056 GB for a million 84 × 84 bytes) and everything
    else 6 bytes a row. Memory is claimed from the system only as rows are written.

    Attributes:
      rows: rows per environment, `capacity // num_envs`.
      num_envs, frame_shape, stack, n_step, discount: as given.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        frame_shape: tuple[int, ...] = (84, 84),
        stack: int = 4,
        n_step: int = 1,
        discount: float = 0.99,
        dtype: Any = np.uint8,
    ):
        """Makes an empty replay.

        Args:
          capacity: most rows stored, over all environments.
          num_envs: environments stepped together.
          frame_shape: (H, W) or (H, W, C) of the newest frame alone.
          stack: frames in an observation.
          n_step: rewards summed in a transition.
          discount: γ, in [0, 1].
          dtype: of the frames.

        Raises:
          ValueError: an argument is out of range, or the capacity can't hold one window per
            environment.
        """
        self.rows = check_arguments(capacity, num_envs, frame_shape, stack, n_step)
        if not 0.0 <= discount <= 1.0:
            raise ValueError(f"discount is {discount}; it must lie in [0, 1]")
        self.num_envs, self.frame_shape = num_envs, tuple(frame_shape)
        self.stack, self.n_step, self.discount = stack, n_step, discount
        self._powers = (np.float64(discount) ** np.arange(n_step + 1)).astype(np.float32)
        shape = (num_envs, self.rows)
        self._frames = np.zeros(shape + self.frame_shape, dtype)
        self._action = np.zeros(shape, np.uint8)
        self._reward = np.zeros(shape, np.float32)
        self._flags = np.zeros(shape, np.uint8)
        self._head = 0  # next row to write, the same in every ring
        self._filled = 0  # rows stored per environment

    @property
    def size(self) -> int:
        """Rows stored, over all environments."""
        return self.num_envs * self._filled

    @property
    def nbytes(self) -> int:
        """Bytes of a full replay."""
        return sum(x.nbytes for x in self._arrays().values())

    def _arrays(self) -> dict[str, np.ndarray]:
        return {
            "frames": self._frames,
            "action": self._action,
            "reward": self._reward,
            "flags": self._flags,
        }

    def add(
        self,
        frame: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        terminal: np.ndarray,
        truncated: np.ndarray,
        first: np.ndarray,
        valid: np.ndarray,
    ) -> None:
        """Stores one row per environment, over the oldest one once the ring is full.

        Args:
          frame: `(N, *frame_shape)`, newest frame of the observation acted in.
          action: integer `(N,)` in 0..255.
          reward: `(N,)`, what the action earned.
          terminal: bool `(N,)`; the action ended the game (or the life).
          truncated: bool `(N,)`; the action's step cut the game.
          first: bool `(N,)`; `frame` opens a game.
          valid: bool `(N,)`; the action was heeded.

        Raises:
          ValueError: a wrong shape, another dtype of frame, or an action outside 0..255.
        """
        row, flags = self._head, self._flags
        action, reward, terminal, truncated, first, valid = fields = tuple(
            map(np.asarray, (action, reward, terminal, truncated, first, valid))
        )
        expected = (self.num_envs, *self.frame_shape)
        if frame.shape != expected or frame.dtype != self._frames.dtype:
            raise ValueError(
                f"frame is {frame.dtype} {frame.shape}; expected {self._frames.dtype} {expected}"
            )
        if any(x.shape != (self.num_envs,) for x in fields):
            raise ValueError(
                f"action, reward, terminal, truncated, first, valid have the shapes "
                f"{[x.shape for x in fields]}; expected ({self.num_envs},) for each"
            )
        if action.min() < 0 or action.max() > 255:
            raise ValueError(f"actions are {action}; they must lie in 0..255")
        if self._filled == 0:
            first = np.ones_like(first)
        else:
            lost = first & ((flags[:, row - 1] & TERMINAL) == 0)
            flags[lost, row - 1] &= ~VALID
        self._frames[:, row] = frame
        self._action[:, row] = action
        self._reward[:, row] = reward
        flags[:, row] = terminal * TERMINAL | truncated * TRUNCATED | first * FIRST | valid * VALID
        self._head = (row + 1) % self.rows
        self._filled = min(self._filled + 1, self.rows)

    def is_start(self, env: np.ndarray, row: np.ndarray) -> np.ndarray:
        """Whether the rows `(B,)` of environments `(B,)` start transitions, bool `(B,)`."""
        offset = (row - self._head + self._filled) % self.rows
        window = window_rows(row, self.rows, self.stack, self.n_step)
        flags = self._flags[env[:, None], window]
        return startable(flags, offset, self._filled, self.stack, self.n_step)

    def _oldest_starts(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        """The starts (env, row) among the rows numbered begin to end - 1 from the oldest."""
        row = (self._head - self._filled + np.arange(begin, end)) % self.rows
        env = np.repeat(np.arange(self.num_envs), len(row))
        row = np.tile(row, self.num_envs)
        found = self.is_start(env, row)
        return env[found], row[found]

    def draw(self, rng: np.random.Generator, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
        """Chooses starts uniformly, with replacement, over exactly the stored transitions.

        Args:
          rng: source of randomness; the same state gives the same choice.
          batch_size: B.

        Returns:
          `(env, row)`, int64 `(B,)` each, for `gather`.

        Raises:
          ValueError: no transition is stored yet.
        """
        span = self._filled - self.n_step  # the newest n_step rows lack a successor
        if span > 0:
            oldest = self._head - self._filled
            env, row = np.zeros((2, batch_size), np.int64)
            missing = np.arange(batch_size)
            for _ in range(_MAX_ROUNDS):
                env[missing], offset = np.divmod(
                    rng.integers(self.num_envs * span, size=len(missing)), span
                )
                row[missing] = (oldest + offset) % self.rows
                missing = missing[~self.is_start(env[missing], row[missing])]
                if not len(missing):
                    return env, row
            starts = self._oldest_starts(0, span)
            if len(starts[0]):
                chosen = rng.integers(len(starts[0]), size=len(missing))
                env[missing], row[missing] = starts[0][chosen], starts[1][chosen]
                return env, row
        raise ValueError(
            f"no transition to sample among {self._filled} rows per environment; a transition "
            f"takes a valid row and the n_step = {self.n_step} rows after it"
        )

    def gather(self, env: np.ndarray, row: np.ndarray) -> FrameBatch:
        """Reads the transitions that start at `row` `(B,)` of `env` `(B,)`, as NumPy arrays."""
        stack, n_step = self.stack, self.n_step
        window = env[:, None] * self.rows + window_rows(row, self.rows, stack, n_step)
        flags, reward = self._flags.reshape(-1)[window], self._reward.reshape(-1)
        mask_tm1, mask_t, steps, r_t, discount_t = n_step_return(
            flags, reward[window[:, stack - 1 : -1]], self._powers, stack
        )
        frames = self._frames.reshape(-1, *self.frame_shape)[window]
        a_tm1 = self._action[env, row].astype(np.int32)
        return FrameBatch(frames, mask_tm1, mask_t, steps, a_tm1, r_t, discount_t)

    def sample_frames(self, rng: np.random.Generator, batch_size: int) -> FrameBatch:
        """Samples a batch for `stack_frames` inside the update: the fast path; raises as `draw`."""
        return self.gather(*self.draw(rng, batch_size))

    def sample(self, rng: np.random.Generator, batch_size: int) -> Transition:
        """Samples a batch with its observations stacked, in NumPy; raises as `draw`."""
        return stack_frames(self.sample_frames(rng, batch_size))

    def _layout(self) -> dict[str, np.ndarray]:
        return {
            "rows": np.asarray(self.rows),
            "num_envs": np.asarray(self.num_envs),
            "frame_shape": np.asarray(self.frame_shape),
        }

    def state_dict(self) -> dict[str, np.ndarray]:
        """The rows stored so far and the layout, as arrays to save before the next `add`.

        The arrays of rows, `(N, filled, ...)` in ring order, are views: nothing is copied.
        """
        rows = {name: x[:, : self._filled] for name, x in self._arrays().items()}
        return {**rows, "head": np.asarray(self._head), **self._layout()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Takes up where `state_dict` was made; sampling then gives the same transitions.

        If the environments start afresh afterwards, their first rows must say `first`, as always.

        Raises:
          ValueError: the state is of another capacity, number of environments or frame shape.
        """
        for name, here in self._layout().items():
            if not np.array_equal(state[name], here):
                raise ValueError(f"saved replay has {name} {state[name]}; this one has {here}")
        if state["frames"].dtype != self._frames.dtype:
            raise ValueError(
                f"saved frames are {state['frames'].dtype}; these are {self._frames.dtype}"
            )
        filled = state["flags"].shape[1]
        for name, x in self._arrays().items():
            x[:, :filled] = state[name]
        self._filled, self._head = filled, int(state["head"])
