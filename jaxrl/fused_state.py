"""What training on MinAtar carries from step to step, and which of it all agents share."""

from __future__ import annotations

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jaxrl.agent import AgentState
from jaxrl.config import MinAtarConfig
from jaxrl.device_replay import ReplayState
from jaxrl.minatar_env import EnvState

Row = dict[str, jax.Array]


class Hyper(NamedTuple):
    """What a sweep varies without recompiling; each may be traced.

    Attributes:
      learning_rate: the optimiser's.
      eps: the optimiser's.
      bound: k of W / max(σ/k, 1), or None for W / σ; one program has either numbers or None.
    """

    learning_rate: ArrayLike
    eps: ArrayLike
    bound: ArrayLike | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums since the last line of the log.

    Attributes:
      returns: float32 `()`, of the games that ended.
      episodes: float32 `()`, how many.
      learning: the updates' metrics, float32 `()` each.
      updates: float32 `()`, how many.
    """

    returns: jax.Array
    episodes: jax.Array
    learning: Row
    updates: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Carry:
    """Everything that training goes on from; a checkpoint holds all of it.

    Attributes:
      step: int32 `()`, agent steps so far.
      key: of this agent; never changes, every step derives its own from it.
      agent: the learner.
      env: the game.
      first: bool `()`; the game is about to be acted in for the first time.
      score: float32 `()`, return of the game so far.
      replay: of this agent alone.
    """

    step: jax.Array
    key: jax.Array
    agent: AgentState
    env: EnvState
    first: jax.Array
    score: jax.Array
    replay: ReplayState


def hyper_of(config: MinAtarConfig) -> Hyper:
    """Returns the configuration's hyper-parameters as float32 scalars."""
    agent = config.agent
    bound = None if agent.bound is None else jnp.float32(agent.bound)
    return Hyper(jnp.float32(agent.learning_rate), jnp.float32(agent.eps), bound)


def seed_keys(config: MinAtarConfig) -> jax.Array:
    """Returns the keys `(num_seeds,)` of the seeds; that of seed s is the same for any number."""
    key = jax.random.key(config.seed)
    return jax.vmap(lambda s: jax.random.fold_in(key, s))(jnp.arange(config.num_seeds))


def agents_of(config: MinAtarConfig) -> tuple[jax.Array, Hyper]:
    """Returns a key and hyper-parameters for each agent of a run, leaves `(A,)`.

    The agents are the combinations of `config.sweep`, learning rates outermost, times the seeds,
    which vary fastest; all combinations share the seeds' keys.
    """
    sweep, agent = config.sweep, config.agent
    bounds: tuple[float | None, ...] = sweep.bound or (agent.bound,)
    grid = list(
        itertools.product(
            sweep.learning_rate or (agent.learning_rate,), sweep.eps or (agent.eps,), bounds
        )
    )
    columns = [
        None if None in column else jnp.repeat(jnp.asarray(column, jnp.float32), config.num_seeds)
        for column in zip(*grid, strict=True)
    ]
    keys = seed_keys(config)
    index = jnp.tile(jnp.arange(config.num_seeds), len(grid))
    return keys[index], Hyper(*columns)  # pyright: ignore[reportArgumentType]


def axes(carry: Carry) -> Carry:
    """Returns which axis of each leaf is that of the agents: 0, or None for what they share."""
    one = jax.tree.map(lambda _: 0, carry)
    replay = dataclasses.replace(one.replay, head=None, size=None)
    return dataclasses.replace(one, step=None, replay=replay)
