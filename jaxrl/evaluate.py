"""Evaluation by the paper's protocol: full games, unclipped reward, nothing learned."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from fourfold.runtime.hardware import cpu_options
from fourfold.runtime.progress import Progress
from jaxrl import agent as agents
from jaxrl import scores
from jaxrl.agent import Agent, AgentState
from jaxrl.compiled import STACK, local_copy, push
from jaxrl.config import AtariConfig
from jaxrl.envs import make_atari

_SEED_OFFSET = 0x7E57  # evaluation games are none of the training ones


@dataclasses.dataclass(frozen=True)
class Scores:
    """What an evaluation gave.

    Attributes:
      returns: float32 `(games,)`, unclipped returns of the full games, in order of their ends.
      steps: agent steps played.
      game: its name.
    """

    returns: np.ndarray
    steps: int
    game: str

    def metrics(self) -> dict[str, float]:
        """Returns the lines for the log; the human-normalised score (%) where humans played."""
        mean = float(self.returns.mean())
        normalised = {}
        if scores.has_human(self.game):
            score = float(scores.human_normalised(self.game, mean))
            normalised = {"evaluation/human_normalised": score}
        return {
            "evaluation/return": mean,
            **normalised,
            "evaluation/std": float(self.returns.std()),
            "evaluation/games": len(self.returns),
            "evaluation/steps": self.steps,
        }


def evaluate(
    agent: Agent,
    state: AgentState,
    config: AtariConfig,
    *,
    num_envs: int = 8,
    seed: int | None = None,
    progress: bool = False,
    stop: Callable[[], bool] = lambda: False,
) -> Scores | None:
    """Plays for `config.evaluate_steps` agent steps and returns the scores.

    The paper plays one game after the other for 125,000 agent steps with ε = 0.001. Here several
    run side by side; no game starts once the steps are used up, but each one under way is played
    to its end (or the frame cap) and counts, since leaving out the unfinished ones would favour
    short games. Power iterations stand still.

    Args:
      agent: the static parts of the agent.
      state: its arrays.
      config: says the game, the protocol, the steps and ε.
      num_envs: games side by side.
      seed: of the games and of ε; None takes the configuration's.
      progress: show a progress bar.
      stop: asked at every step whether to give up.

    Returns:
      The scores; None where `stop` said so.
    """
    seed = config.seed if seed is None else seed
    env = make_atari(
        config.game, num_envs, protocol=config.protocol, training=False, seed=seed + _SEED_OFFSET
    )
    policy = Policy(agent, state, config.evaluate_epsilon, num_envs, seed)
    now = env.reset()
    running = np.ones(num_envs, bool)
    returns: list[float] = []
    steps = 0
    bar = Progress(config.evaluate_steps, "agent steps", quiet=not progress)
    while running.any() and not stop():
        steps += int((now.valid & running).sum())
        now = env.step(policy(now.frame, now.first))
        over = now.episode_over & running
        returns.extend(now.episode_return[over].tolist())
        running &= ~over | (steps < config.evaluate_steps)
        if over.any():
            bar.update(steps, {"games": len(returns), "return": float(np.mean(returns))})
    bar.close()
    env.close()
    if running.any():
        return None
    return Scores(np.asarray(returns, np.float32), steps, config.game)


class Policy:
    """An agent in evaluation mode behind a plain NumPy interface."""

    def __init__(
        self, agent: Agent, state: AgentState, epsilon: float, num_envs: int, seed: int = 0
    ):
        """Compiles the agent for `num_envs` environments.

        Args:
          agent: the static parts of the agent.
          state: its arrays.
          epsilon: probability of a uniformly random action.
          num_envs: N.
          seed: of those random actions.
        """
        # This process's own copy: evaluation may run on one process of many.
        self._state = jax.tree.map(local_copy, state)
        self._key = jax.random.key(seed)
        self._epsilon = jnp.float32(epsilon)
        self._count = jnp.zeros((), jnp.int32)
        self.stack = jnp.zeros((num_envs, 84, 84, STACK), jnp.uint8)

        def act(state, stack, frame, first, epsilon, key, count):
            stack = push(stack, frame, first)
            key = jax.random.fold_in(key, count)
            return agents.act_evaluation(agent, state, stack, epsilon, key), stack, count + 1

        def values(state, stack):
            return agents.outputs_evaluation(agent, state, stack)

        self._act = jax.jit(act, donate_argnames="stack", compiler_options=cpu_options())
        self._outputs = jax.jit(values)

    def __call__(self, frame: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Returns int32 actions `(N,)` for frames `(N, 84, 84)`; `first` clears a stack."""
        frame, first = jax.device_put((frame, first))
        actions, self.stack, self._count = self._act(
            self._state, self.stack, frame, first, self._epsilon, self._key, self._count
        )
        return np.asarray(jax.device_get(actions))

    def outputs(self) -> np.ndarray:
        """Returns the logits `(N, A, atoms)`, or values `(N, A)`, behind the last actions."""
        return np.asarray(jax.device_get(self._outputs(self._state, self.stack)))
