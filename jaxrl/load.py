"""Agents read back from run folders, which may still be in use."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import jax

from fourfold.runtime.checkpoint import Checkpoints
from fourfold.runtime.run_dir import RunDir
from jaxrl import agent as agents
from jaxrl import config_io, fused
from jaxrl.agent import Agent, AgentState
from jaxrl.config import AtariConfig, MinAtarConfig
from jaxrl.envs import make_atari
from jaxrl.train import OBS_SHAPE, make_agent


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What a checkpoint holds of the learner.

    Attributes:
      config: of the run, an `AtariConfig` or a `MinAtarConfig`.
      agent: its static parts.
      state: its arrays; with a leading axis of agents (see `fused.agents_of`) for MinAtar.
      step: agent steps so far.
      bounds: `(A,)`, k of each agent of a sweep over it, for `agents.with_bound`; else None.
    """

    config: AtariConfig | MinAtarConfig
    agent: Agent
    state: AgentState
    step: int
    bounds: jax.Array | None = None


def load_agent(path: str | Path, step: int | None = None) -> Loaded:
    """Reads an agent from a run folder, on this process's default device.

    Args:
      path: the run's folder.
      step: which checkpoint, in agent steps; None for the newest.

    Raises:
      FileNotFoundError: no run or no checkpoint; the message lists what there is.
    """
    run = RunDir.open(path)
    config = config_io.from_json(run.saved_config())
    checkpoints = Checkpoints(run.checkpoints)
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise FileNotFoundError(f"no checkpoint yet in {run.checkpoints}")
    bounds = None
    if isinstance(config, AtariConfig):
        env = make_atari(config.game, 1)
        agent = make_agent(config, env.num_actions)
        env.close()
        like = jax.eval_shape(lambda: agents.init(agent, jax.random.key(0), OBS_SHAPE))
    else:
        keys, hypers = fused.agents_of(config)
        bounds = hypers.bound if config.sweep.bound else None
        _, agent = fused.make(config, jax.tree.map(lambda x: x[0], hypers))
        like = jax.eval_shape(functools.partial(fused.init_many, config), keys, hypers).agent
    tree, _ = checkpoints.restore(step, {"agent": like}, partial=True)
    return Loaded(config, agent, tree["agent"], step, bounds)  # pyright: ignore[reportArgumentType]
