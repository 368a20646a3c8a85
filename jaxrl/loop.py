"""The training loop on Atari, as a generator that yields metrics.

One iteration steps every environment once. Actions come first, from the newest parameters; the
updates that are due are then dispatched, and while the device works through them the host runs
the emulators, fills the replay and samples the batches of the next iteration. Nothing waits but
the next forward, and no action ever comes from stale parameters.

The loop knows neither meshes nor jit nor files: `jaxrl.train` hands it compiled functions, takes
the metrics, and saves and evaluates between two of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from jaxrl.agent import AgentState
from jaxrl.config import AtariConfig
from jaxrl.envs import AtariEnv
from jaxrl.types import TimeStep


class Memory(Protocol):
    """A replay as the loop sees it, wherever it lives."""

    def add(self, *row: np.ndarray) -> None:
        """Stores one row per environment; its fields as for `replay.HostReplay.add`."""
        ...

    def draw(self, sizes: Sequence[int]) -> Sequence[Any]:
        """Returns an argument of `Functions.learn` per size: so many batches, stacked."""
        ...


class Functions(NamedTuple):
    """The compiled functions of a run.

    Attributes:
      act: `(agent_state, stack, frame, first, valid, steps) -> (actions, spectral, stack, steps)`,
        where `steps` counts the valid rows of all processes.
      learn: `(agent_state, batches) -> (agent_state, metrics)`, one update per batch, in order.
      sync: copies the online network to the target network.
      place: host arrays of this process → device arrays split over the mesh.
      fetch: actions of this process → NumPy.
      largest: most batches that one call of `learn` should take.
    """

    act: Callable
    learn: Callable
    sync: Callable
    place: Callable
    fetch: Callable
    largest: int


@dataclasses.dataclass
class Progress:
    """Where a run is; what a checkpoint must hold beside the replay.

    Attributes:
      agent: the learner's arrays.
      steps: agent steps of all environments so far, int32 device scalar; rows whose action was
        ignored (resets, forced no-ops) are not counted.
      updates: updates so far.
      games: full games finished so far, in this process.
    """

    agent: AgentState
    steps: jax.Array
    updates: int = 0
    games: int = 0


def run(
    config: AtariConfig,
    env: AtariEnv,
    memory: Memory,
    functions: Functions,
    stack: jax.Array,
    progress: Progress,
) -> Iterator[dict[str, Any]]:
    """Trains until `config.steps`; changes `progress` in place.

    Args:
      config: the configuration.
      env: environments, which are reset first.
      memory: the replay, empty or restored.
      functions: compiled functions.
      stack: uint8 `(N, 84, 84, 4)` on the device; the frames last seen, oldest first. Its values
        don't matter: a reset clears it.
      progress: a fresh one, or one restored from a checkpoint.

    Yields:
      After each iteration the agent steps so far as `step`; about every `config.log_every` of
      them, everything else too (`loss`, `q`, `sigma/…`, `return`, `updates`, `games`). The values
      of a learner's metrics are device arrays: fetching them waits for the device.
    """
    now = env.reset()
    steps = int(jax.device_get(progress.steps))
    next_log = steps + config.log_every
    returns: list[float] = []
    learned: dict[str, Any] = {}
    batches: Sequence[Any] = []
    while steps < config.steps:
        with jax.transfer_guard("disallow"):  # whatever moves here is meant to
            observed = functions.place((now.frame, now.first, now.valid))
            actions_on_device, hooks, stack, progress.steps = functions.act(
                progress.agent, stack, *observed, progress.steps
            )
            progress.agent = dataclasses.replace(progress.agent, spectral=hooks)
            actions = functions.fetch(actions_on_device)
            for batch in batches:
                progress.agent, learned = functions.learn(progress.agent, batch)
                progress.updates += _length(batch)
                if progress.updates % (config.target_period // config.update_period) == 0:
                    progress.agent = functions.sync(progress.agent)
            env.send(actions)
            after = env.recv()
            memory.add(*_row(now, actions, after))
            steps = int(jax.device_get(progress.steps))
            due = max(steps - config.exploration.warmup, 0) // config.update_period
            sizes = _sizes(due - progress.updates, config, functions, progress)
            batches = memory.draw(sizes) if sizes else []
        finished = after.episode_return[after.episode_over]
        progress.games += len(finished)
        returns.extend(finished.tolist())
        now = after
        metrics: dict[str, Any] = {"step": steps}
        if steps >= next_log or steps >= config.steps:
            next_log += config.log_every
            metrics |= {"updates": progress.updates, "games": progress.games, **learned}
            if returns:
                metrics["return"] = float(np.mean(returns))
            returns.clear()
        yield metrics


def _row(now: TimeStep, actions: np.ndarray, after: TimeStep) -> tuple:
    """The replay's row: rewards are clipped here, and nowhere else."""
    reward = np.clip(after.reward, -1.0, 1.0)
    return now.frame, actions, reward, after.terminal, after.truncated, now.first, now.valid


def _sizes(count: int, config: AtariConfig, functions: Functions, progress: Progress) -> list[int]:
    """Cuts updates into calls of `learn`: powers of two, so that few shapes compile.

    None reaches over a target sync.
    """
    sync_every = config.target_period // config.update_period
    sizes, done = [], progress.updates
    while count > 0:
        most = min(count, functions.largest, sync_every - done % sync_every)
        size = 1 << (most.bit_length() - 1)
        sizes.append(size)
        done, count = done + size, count - size
    return sizes


def _length(batch: Any) -> int:
    return jax.tree.leaves(batch)[0].shape[0]
