"""MinAtar (Young & Tian 2019, arXiv:1903.03176) as pure functions, through pgx.

The protocol is the paper's: all six actions in every game, sticky actions with probability 0.1,
difficulty ramping, one 10x10 observation of boolean planes, no cap on the length of a game.
Freeway ends after 2,500 steps by its own rules, which MinAtar and pgx count as a termination.

pgx is an optional dependency: its MinAtar files are under the GPL and are called, not copied.
"""

from __future__ import annotations

import colorsys
import contextlib
import dataclasses
import difflib
import importlib
from collections.abc import Iterator
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

STICKY = 0.1
NUM_ACTIONS = 6  # no-op, left, up, right, down, fire
_CLASSES = {
    "asterix": "MinAtarAsterix",
    "breakout": "MinAtarBreakout",
    "freeway": "MinAtarFreeway",
    "seaquest": "MinAtarSeaquest",
    "space_invaders": "MinAtarSpaceInvaders",
}
GAMES = tuple(_CLASSES)

EnvState: TypeAlias = Any
"""A pytree of arrays, whose fields are pgx's own business."""


@dataclasses.dataclass(frozen=True)
class MinAtar:
    """One MinAtar game: functions of ONE environment; the caller vmaps and jits.

    Two instances of the same game are equal and hash alike, so either may be a static argument.

    Attributes:
      game: its name, one of `GAMES`.
      obs_shape: (10, 10, C); C is 4, 4, 7, 10, 6 for the games in the order of `GAMES`.
      num_actions: 6, whether or not the game heeds all of them.
    """

    game: str
    obs_shape: tuple[int, int, int]
    num_actions: int = NUM_ACTIONS
    _env: Any = dataclasses.field(default=None, repr=False, compare=False)

    def init(self, key: jax.Array) -> EnvState:
        """Starts a game.

        Args:
          key: consumed; only Breakout and Freeway have random starts.

        Returns:
          The state before the first action.
        """
        with _lenient():
            return self._lean(self._env.init(key))

    def step(
        self, env_state: EnvState, action: jax.Array, key: jax.Array
    ) -> tuple[EnvState, jax.Array, jax.Array, jax.Array]:
        """Plays one action, and starts the next game at once where that ended the game.

        The reset is part of the step ("same step"), so that every row is valid and none is wasted:
        with `terminal`, the returned state is the first of the next game and `observe` shows its
        first frame. The last frame of the old game is not shown; nothing bootstraps from it.

        Args:
          env_state: from `init` or `step`.
          action: int32 `()`, 0..5. With probability 0.1 the previous action is played instead.
          key: consumed by the game and by the reset.

        Returns:
          The next state; the reward, float32 `()`, never clipped; `terminal`, bool `()`; and
          `truncated`, bool `()`, always False, since these games are never cut.
        """
        step_key, reset_key = jax.random.split(key)
        with _lenient():
            after = self._lean(stepped := self._env.step(self._lean(env_state), action, step_key))
            terminal = stepped.terminated
            # Three of the five starts are constants, so that the reset compiles to next to nothing.
            state = jax.tree.map(
                lambda fresh, old: jnp.where(terminal, fresh, old), self.init(reset_key), after
            )
        return state, stepped.rewards[0], terminal, jnp.zeros_like(terminal)

    def observe(self, env_state: EnvState) -> jax.Array:
        """Shows the state as boolean planes, bool `(10, 10, C)`."""
        with _lenient():
            return self._env.observe(env_state)

    def _lean(self, state: EnvState) -> EnvState:
        """Makes constants of the fields that auto-reset and the full action set leave constant.

        pgx draws the observation at every step and at every reset, guards against stepping a
        finished game and checks that actions are legal. With these fields constant the compiler
        drops all of that, which makes Breakout a quarter to a half faster on a CPU.
        """
        return state.replace(
            observation=jnp.zeros(self.obs_shape, bool),
            terminated=jnp.zeros((), bool),
            truncated=jnp.zeros((), bool),
            legal_action_mask=jnp.ones(NUM_ACTIONS, bool),
        )


def minatar(game: str) -> MinAtar:
    """Opens a MinAtar game under the paper's protocol.

    Args:
      game: one of `GAMES`.

    Raises:
      ImportError: pgx is not installed.
      ValueError: an unknown game.

    Example:
      >>> env = minatar("breakout")
      >>> state = env.init(jax.random.key(0))
      >>> state, reward, terminal, truncated = env.step(state, jnp.int32(3), jax.random.key(1))
      >>> env.observe(state).shape
      (10, 10, 4)
    """
    if game not in _CLASSES:
        close = difflib.get_close_matches(game.lower(), GAMES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ValueError(f"unknown MinAtar game {game!r}: {hint}allowed: {', '.join(GAMES)}")
    with _lenient():  # pgx builds arrays when it is imported
        try:
            module = importlib.import_module(f"pgx.minatar.{game}")
        except ImportError as error:
            raise ImportError("MinAtar needs pgx: pip install 'fourfold[rl]'") from error
        env = getattr(module, _CLASSES[game])(
            use_minimal_action_set=False, sticky_action_prob=STICKY
        )
        shape = jax.eval_shape(env.init, jax.random.key(0)).observation.shape
    return MinAtar(game=game, obs_shape=shape, _env=env)


def draw(observation: np.ndarray, *, scale: int = 16) -> np.ndarray:
    """Colours an observation for people: one hue a plane, later planes on top, black behind.

    Args:
      observation: bool `(10, 10, C)`.
      scale: pixels a cell, along each side.

    Returns:
      uint8 `(10 * scale, 10 * scale, 3)`.
    """
    planes = np.asarray(observation, bool)
    count = planes.shape[-1]
    hues = [colorsys.hsv_to_rgb(c / count, 0.6, 1.0) for c in range(count)]
    palette = np.concatenate([np.zeros((1, 3)), hues])
    top = (planes * np.arange(1, count + 1)).max(axis=-1)
    image = np.rint(255 * palette[top]).astype(np.uint8)
    return image.repeat(scale, axis=0).repeat(scale, axis=1)


@contextlib.contextmanager
def _lenient() -> Iterator[None]:
    """Lets pgx mix dtypes and ranks while it is traced, whatever the caller's settings."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
