"""Evaluation on MinAtar: full games of every agent of a run, side by side on the device."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from fourfold.runtime.progress import Progress
from jaxrl import agent as agents
from jaxrl import minatar_env
from jaxrl.agent import Agent, AgentState
from jaxrl.minatar_env import MinAtar

CHUNK = 250  # steps between two looks at who is finished


def evaluate(
    agent: Agent,
    state: AgentState,
    game: str,
    *,
    steps: int,
    epsilon: float,
    bounds: jax.Array | None = None,
    num_envs: int = 8,
    seed: int = 0,
    progress: bool = False,
) -> list[np.ndarray]:
    """Plays full games with each agent, by the rule of `jaxrl.evaluate`.

    Several games of an agent run side by side; none starts once its steps are used up, and each
    one under way is played to its end and counts. Power iterations stand still.

    Args:
      agent: the static parts of the agents.
      state: their arrays, with a leading axis `(A, ...)`.
      game: one of `minatar_env.GAMES`.
      steps: environment steps per agent, over its `num_envs` games.
      epsilon: probability of a uniformly random action, in [0, 1].
      bounds: k of each agent `(A,)`, where it isn't the same for all.
      num_envs: games side by side, per agent.
      seed: of the games and of ε.
      progress: show a progress bar.

    Returns:
      Per agent the returns of its games, float32 `(games,)`, in order of their ends.

    Raises:
      ValueError: a number is out of range, or the game is unknown.
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must be in [0, 1], found {epsilon}")
    for name, value, least in (("num_envs", num_envs, 1), ("steps", steps, 0), ("seed", seed, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, found {value}")
    env = minatar_env.minatar(game)
    count = jax.tree.leaves(state.params)[0].shape[0]
    init_key, play_key = jax.random.split(jax.random.key(seed))
    games = jax.jit(jax.vmap(jax.vmap(env.init)))(jax.random.split(init_key, (count, num_envs)))
    scores = jnp.zeros((count, num_envs), jnp.float32)
    play = jax.jit(functools.partial(_play, agent, env))
    running = np.ones((count, num_envs), bool)
    used = np.zeros(count, int)
    returns: list[list[float]] = [[] for _ in range(count)]
    bar = Progress(steps, "steps per agent", quiet=not progress)
    chunk = 0
    while running.any():
        key = jax.random.fold_in(play_key, chunk)
        games, scores, (over, ends) = play(state, bounds, games, scores, jnp.float32(epsilon), key)
        for over_t, ends_t in zip(*map(np.asarray, (over, ends)), strict=True):
            used += running.sum(axis=1)
            finished = over_t & running
            for member, env_index in zip(*np.nonzero(finished), strict=True):
                returns[member].append(float(ends_t[member, env_index]))
            running &= ~over_t | (used < steps)[:, None]
        chunk += 1
        bar.update(min(int(used.min()), steps), {"games": sum(map(len, returns))})
    bar.close()
    return [np.asarray(r, np.float32) for r in returns]


def _play(
    agent: Agent,
    env: MinAtar,
    state: AgentState,
    bounds: jax.Array | None,
    games: minatar_env.EnvState,
    scores: jax.Array,
    epsilon: jax.Array,
    key: jax.Array,
) -> tuple[minatar_env.EnvState, jax.Array, tuple[jax.Array, jax.Array]]:
    """Plays `CHUNK` steps everywhere; what ended and with which return, `(CHUNK, A, N)` each."""
    count, num_envs = scores.shape

    def act(state: AgentState, bound: jax.Array | None, obs: jax.Array, key: jax.Array):
        one = agents.with_bound(agent, bound)
        return agents.act_evaluation(one, state, obs, epsilon, key)

    def step(carry: tuple[minatar_env.EnvState, jax.Array], key: jax.Array):
        games, scores = carry
        act_key, env_key = jax.random.split(key)
        obs = jax.vmap(jax.vmap(env.observe))(games)
        actions = jax.vmap(act)(state, bounds, obs, jax.random.split(act_key, count))
        keys = jax.random.split(env_key, (count, num_envs))
        games, rewards, over, _ = jax.vmap(jax.vmap(env.step))(games, actions, keys)
        scores = scores + rewards
        return (games, jnp.where(over, 0, scores)), (over, scores)

    (games, scores), ended = jax.lax.scan(step, (games, scores), jax.random.split(key, CHUNK))
    return games, scores, ended
