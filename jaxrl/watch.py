"""Films of agents at play, on Atari and on MinAtar."""

from __future__ import annotations

import contextlib
import csv
import importlib.resources
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrl import agent as agents
from jaxrl import losses, minatar_env
from jaxrl.agent import Agent, AgentState
from jaxrl.config import AgentConfig, AtariConfig
from jaxrl.envs import make_atari
from jaxrl.evaluate import Policy
from jaxrl.film import FPS, Film
from jaxrl.panel import Panel, Scene

MINATAR_ACTIONS = ("noop", "left", "up", "right", "down", "fire")
_DIRECTIONS = ("UP", "RIGHT", "LEFT", "DOWN", "UPRIGHT", "UPLEFT", "DOWNRIGHT", "DOWNLEFT")
_ALL_ACTIONS = ("NOOP", "FIRE", *_DIRECTIONS, *(f"{name}FIRE" for name in _DIRECTIONS))


class Moment(NamedTuple):
    """One step of a game.

    Attributes:
      screen: uint8 `(h, w, 3)`.
      outputs: logits `(A, atoms)` or values `(A,)` in it.
      action: the action that will be taken.
      score: unclipped return so far.
      over: whether the game has ended here.
    """

    screen: np.ndarray
    outputs: np.ndarray
    action: int
    score: float
    over: bool = False


def watch(scene: Scene, moments: Iterator[Moment], out: Path, *, steps: int) -> float:
    """Films a game as it is played.

    Args:
      scene: from `atari_scene` or `minatar_scene`.
      moments: from `atari_moments` or `minatar_moments`.
      out: file to write, ending in `.gif` or `.mp4`. It appears when it is whole.
      steps: agent steps at most; the film ends with the game.

    Returns:
      The unclipped return up to the film's end.

    Raises:
      ValueError: another ending, or no steps.
      ImportError: Pillow or imageio-ffmpeg is not installed.
      OSError: the film can't be written; the message is ffmpeg's.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, found {steps}")
    panel, score = Panel(scene), 0.0
    with Film(Path(out)) as film:
        for step, moment in enumerate(moments):
            last, score = step == steps or moment.over, moment.score
            chosen = None if last else moment.action
            frame = panel.draw(moment.screen, moment.outputs, chosen, score, step)
            film.write(frame, FPS if last else 1)  # the end stays on for a second
            if last:
                break
    return score


def atari_scene(agent: Agent, config: AtariConfig) -> Scene:
    """Describes a film of an Atari game."""
    names = action_names(config.game, agent.network.num_actions)
    caption = "discounted return, rewards clipped to [-1, 1]"
    return Scene(config.game, names, config.evaluate_epsilon, _atoms(config.agent), caption)


def atari_moments(
    agent: Agent, state: AgentState, config: AtariConfig, *, seed: int = 0
) -> Iterator[Moment]:
    """Plays one full game as in an evaluation; `seed` is that of the game and of ε."""
    policy = Policy(agent, state, config.evaluate_epsilon, 1, seed)
    env = make_atari(config.game, 1, protocol=config.protocol, training=False, seed=seed)
    with contextlib.closing(env):
        now = env.reset()
        while True:
            action = int(policy(now.frame, now.first)[0])
            over, score = bool(now.episode_over[0]), float(now.episode_return[0])
            yield Moment(env.render(), policy.outputs()[0], action, score, over)
            now = env.step(np.array([action], np.int32))


def minatar_scene(game: str, config: AgentConfig, epsilon: float) -> Scene:
    """Describes a film of a MinAtar game.

    Raises:
      ValueError: epsilon is out of range.
    """
    if not 0 <= epsilon <= 1:
        raise ValueError(f"epsilon must be in [0, 1], found {epsilon}")
    return Scene(game, MINATAR_ACTIONS, epsilon, _atoms(config), "discounted return")


def minatar_moments(
    agent: Agent, state: AgentState, game: str, *, epsilon: float, seed: int = 0
) -> Iterator[Moment]:
    """Plays one full game with one agent, whose arrays have no axis of agents."""
    env = minatar_env.minatar(game)
    init_key, act_keys, env_keys = jax.random.split(jax.random.key(seed), 3)

    @jax.jit
    def look(state, now, count):
        obs = env.observe(now)
        act_key = jax.random.fold_in(act_keys, count)
        action = agents.act_evaluation(agent, state, obs[None], epsilon, act_key)[0]
        return obs, agents.outputs_evaluation(agent, state, obs[None])[0], action

    @jax.jit
    def step(now, action, count):
        return env.step(now, action, jax.random.fold_in(env_keys, count))

    now, score, count = jax.jit(env.init)(init_key), 0.0, 0
    while True:
        obs, outputs, action = look(state, now, jnp.int32(count))
        moment = Moment(minatar_env.draw(np.asarray(obs)), np.asarray(outputs), int(action), score)
        yield moment
        now, reward, terminal, truncated = step(now, action, jnp.int32(count))
        score, count = score + float(reward), count + 1
        if terminal | truncated:
            # `now` shows the next game already: the end is told beside the last screen.
            yield moment._replace(score=score, over=True)
            return


def action_names(game: str, num_actions: int) -> tuple[str, ...]:
    """Names of a game's minimal actions, in order, such as `("noop", "fire", "right fire")`.

    Args:
      game: envpool's name of the game.
      num_actions: size of the set; where the table holds another, the names are numbers.
    """
    file = importlib.resources.files("jaxrl").joinpath("data", "minimal_actions.csv")
    rows = csv.DictReader(file.read_text(encoding="utf-8").splitlines())
    table = {_plain(row["game"]): row["actions"].split() for row in rows}
    names = table.get(_plain(game), _ALL_ACTIONS)
    if len(names) != num_actions:
        return tuple(f"action {i}" for i in range(num_actions))
    return tuple(" ".join(re.findall("NOOP|FIRE|UP|DOWN|LEFT|RIGHT", n)).lower() for n in names)


def _atoms(config: AgentConfig) -> np.ndarray | None:
    if config.loss not in ("c51", "double_c51"):
        return None
    return losses.support(config.v_min, config.v_max, config.num_atoms)


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
