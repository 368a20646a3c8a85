"""Training on Atari: the edge where the pure agent meets devices, files and the terminal."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fourfold.runtime import mesh as meshes
from fourfold.runtime.checkpoint import Checkpoints
from fourfold.runtime.metrics import METRICS, Metrics, read_metrics
from fourfold.runtime.preemption import Preemption
from fourfold.runtime.run_dir import RunDir
from jaxrl import agent as agents
from jaxrl import compiled, config_io, evaluate, loop, networks, plots
from jaxrl.agent import Agent, AgentState
from jaxrl.config import AtariConfig
from jaxrl.envs import FRAME_SHAPE, make_atari

OBS_SHAPE = (*FRAME_SHAPE, compiled.STACK)
# What may change when a run goes on: how long, and how it is watched.
FREE = ("steps", "evaluate_every", "evaluate_steps", "checkpoint_every", "log_every")


def make_agent(config: AtariConfig, num_actions: int) -> Agent:
    """Returns the static parts of the agent of a configuration."""
    categorical = config.agent.loss in ("c51", "double_c51")
    num_atoms = config.agent.num_atoms if categorical else None
    network = networks.nature_net(num_actions, num_atoms, conv_method=compiled.best_conv_method())
    return agents.make(config.agent, network)


def train(
    config: AtariConfig,
    path: str | Path,
    *,
    resume: bool = False,
    num_devices: int | None = None,
    tensorboard: bool = False,
    wandb: str | None = None,
    quiet: bool = False,
) -> AgentState:
    """Trains an agent in a run folder, or goes on with it.

    The emulators' state can't be saved, so a resumed run starts new games; the learner, the
    replay, the spectral vectors and every source of randomness go on where they were.

    Args:
      config: the configuration.
      path: the run's folder.
      resume: go on with the run in it.
      num_devices: devices to train on, over all processes; None for all.
      tensorboard: also log to TensorBoard.
      wandb: W&B project to log to, if any.
      quiet: no progress on the terminal.

    Returns:
      The agent's arrays at the end, or at the moment of a SIGTERM.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: a bad configuration or folder; nothing was
        changed.
      DiskFullError: a checkpoint didn't fit; the earlier ones are intact.
    """
    mesh = meshes.make_mesh(num_devices)
    num_envs = _local_envs(config, mesh.size)
    seed = config.seed + 1_000_003 * jax.process_index()
    threads = compiled.emulator_threads()
    env = make_atari(
        config.game, num_envs, protocol=config.protocol, seed=seed, num_threads=threads
    )
    agent = make_agent(config, env.num_actions)
    key_init, key_act = jax.random.split(jax.random.key(config.seed))
    memory = compiled.make_memory(config, num_envs, mesh)
    functions = compiled.compile_functions(agent, config, mesh, key_act)
    saved = config_io.to_json(config)
    run = RunDir.open(path, saved, free=FREE) if resume else RunDir.create(path, saved)
    checkpoints = Checkpoints(run.checkpoints)
    progress = start_progress(agent, key_init, mesh)
    start = checkpoints.start(resume)
    if start:
        progress = _restore(checkpoints, start, progress, memory)
    stack = jax.device_put(
        np.zeros((num_envs * jax.process_count(), *OBS_SHAPE), np.uint8),
        meshes.batch_sharding(mesh),
    )
    next_save = start + config.checkpoint_every
    evaluated = _last_evaluation(run, start)
    options = {"start": start, "tensorboard": tensorboard, "wandb": wandb, "quiet": quiet}
    with (
        Metrics(run.path, config.steps, "agent steps", config=saved, **options) as metrics,
        Preemption() as preemption,
    ):
        alone = jax.process_count() == 1

        def evaluate_at(step: int) -> int:
            """Evaluates if that is due; returns the step of the last evaluation."""
            every = config.evaluate_every
            if not every or step // every <= evaluated // every:
                return evaluated
            scores = evaluate.evaluate(
                agent, progress.agent, config, stop=lambda: alone and preemption.requested
            )
            if scores is None:
                return evaluated
            metrics.write(step, scores.metrics())
            return step

        # A run may have been killed between a checkpoint and the evaluation of it.
        evaluated = evaluate_at(start)
        for line in loop.run(config, env, memory, functions, stack, progress):
            step = line.pop("step")
            stop = preemption.requested if alone else bool(line) and preemption.agreed()
            if line:
                metrics.write(step, line)
            if stop or step >= next_save or step >= config.steps:
                next_save += config.checkpoint_every
                _save(checkpoints, step, progress, memory)
            if not stop:
                evaluated = evaluate_at(step)
                stop = alone and preemption.requested
                if stop:  # during an evaluation; where this step was saved already, that is all
                    _save(checkpoints, step, progress, memory)
            if stop:
                if meshes.is_lead():
                    print(preemption.farewell(step))
                break
    env.close()
    if meshes.is_lead():
        plots.atari(run, config)
    return progress.agent


def _local_envs(config: AtariConfig, devices: int) -> int:
    if config.num_envs % devices:
        raise ValueError(
            f"num_envs must be a multiple of the {devices} devices, found {config.num_envs}"
        )
    return config.num_envs // jax.process_count()


def start_progress(agent: Agent, key: jax.Array, mesh: jax.sharding.Mesh) -> loop.Progress:
    """Returns a run at its beginning, replicated over the mesh."""
    replicated = meshes.replicated(mesh)
    init = jax.jit(lambda key: agents.init(agent, key, OBS_SHAPE), out_shardings=replicated)
    steps = jax.jit(lambda: jnp.zeros((), jnp.int32), out_shardings=replicated)
    return loop.Progress(init(key), steps())


def _save(
    checkpoints: Checkpoints,
    step: int,
    progress: loop.Progress,
    memory: compiled.HostMemory | compiled.DeviceMemory,
) -> None:
    tree = {"agent": progress.agent, "steps": progress.steps}
    counts = {"updates": progress.updates, "games": progress.games}
    checkpoints.save(step, tree, {"counts": counts, **memory.arrays()})


def _restore(
    checkpoints: Checkpoints,
    step: int,
    fresh: loop.Progress,
    memory: compiled.HostMemory | compiled.DeviceMemory,
) -> loop.Progress:
    tree, extra = checkpoints.restore(step, {"agent": fresh.agent, "steps": fresh.steps})
    memory.load(extra)
    return loop.Progress(**tree, **extra["counts"])


def _last_evaluation(run: RunDir, start: int) -> int:
    """Returns the step of the last evaluation up to `start`, by the log; 0 if there was none."""
    if not start or not (run.path / METRICS).exists():
        return 0
    rows = (row for row in read_metrics(run.path) if "evaluation/return" in row)
    return max((row["step"] for row in rows if row["step"] <= start), default=0)
