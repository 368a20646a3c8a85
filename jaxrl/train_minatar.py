"""Training on MinAtar: the edge where `jaxrl.fused` meets devices, files and the terminal."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fourfold.runtime import mesh as meshes
from fourfold.runtime.checkpoint import Checkpoints
from fourfold.runtime.metrics import Metrics
from fourfold.runtime.preemption import Preemption
from fourfold.runtime.run_dir import RunDir
from jaxrl import config_io, fused, plots, scores
from jaxrl.config import MinAtarConfig
from jaxrl.fused import Carry, Hyper

# What may change when a run goes on: how long it is, and how often it is saved.
FREE = ("steps", "checkpoint_every")


class Functions(NamedTuple):
    """The compiled functions of a run, over the devices of a mesh.

    Attributes:
      init: `(keys, hypers) -> carry`.
      interval: `(carry, hypers) -> (carry, row)`, donates the carry; see `fused.interval_many`.
      like: shapes and shardings of the carry, for restoring it.
      place: puts a pytree of `(A, ...)` arrays on the devices, split by agent.
    """

    init: Any
    interval: Any
    like: Carry
    place: Any


def compile_functions(
    config: MinAtarConfig, mesh: Mesh, num_agents: int, hyper: Hyper
) -> Functions:
    """Compiles the training of `num_agents` agents, to each device its share of them.

    Args:
      config: the configuration.
      mesh: over whose first axis the agents are split.
      num_agents: A, a multiple of the mesh's size.
      hyper: of one agent; says whether there is a bound.

    Raises:
      ValueError: `num_agents` isn't such a multiple.
    """
    if num_agents % mesh.size:
        raise ValueError(
            f"the agents (seeds times combinations of a sweep) must be a multiple of the "
            f"{mesh.size} devices, found {num_agents}"
        )
    split = PartitionSpec(mesh.axis_names[0])
    keys = jnp.broadcast_to(jax.random.key(0)[None], (num_agents,))
    hypers = jax.tree.map(lambda x: jnp.broadcast_to(x, (num_agents,)), hyper)
    shapes = jax.eval_shape(functools.partial(fused.init_many, config), keys, hypers)
    specs = jax.tree.map(
        lambda axis: split if axis == 0 else PartitionSpec(),
        fused.axes(shapes),
        is_leaf=lambda axis: axis is None,
    )
    # Not left to GSPMD: it would reduce over all agents to end the sampling loop of each.
    options = {"mesh": mesh, "in_specs": (split, split), "out_specs": specs, "check_vma": False}
    init = jax.shard_map(functools.partial(fused.init_many, config), **options)
    options |= {"in_specs": (specs, split), "out_specs": (specs, split)}
    interval = jax.shard_map(functools.partial(fused.interval_many, config), **options)
    like = jax.tree.map(
        lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
        shapes,
        specs,
    )
    place = functools.partial(jax.device_put, device=NamedSharding(mesh, split))
    return Functions(jax.jit(init), jax.jit(interval, donate_argnums=0), like, place)


def most_devices(num_agents: int) -> int:
    """Returns the largest number of this machine's devices that divides the agents evenly."""
    return max(n for n in range(1, jax.device_count() + 1) if num_agents % n == 0)


def intervals(
    functions: Functions, carry: Carry, hypers: Hyper, stop: int
) -> Iterator[tuple[int, dict[str, np.ndarray], Carry]]:
    """Trains until step `stop`, which is `log_every` steps at a time.

    Yields:
      The step, the row with leaves `(A,)` on the host, and the carry, which the next turn
      consumes.
    """
    step = int(carry.step)
    while step < stop:
        carry, row = functions.interval(carry, hypers)
        step = int(carry.step)
        yield step, jax.device_get(row), carry


def train(
    config: MinAtarConfig,
    path: str | Path,
    *,
    resume: bool = False,
    num_devices: int | None = None,
    tensorboard: bool = False,
    wandb: str | None = None,
    quiet: bool = False,
) -> Carry:
    """Trains `num_seeds` agents for each combination of the sweep in a run folder, or goes on.

    A run that was killed at any moment and resumed ends with the same bits as one that wasn't,
    on the same number of devices of the same kind.

    Args:
      config: the configuration.
      path: the run's folder.
      resume: go on with the run in it.
      num_devices: devices to split the agents over; None for as many as divide them evenly.
      tensorboard: also log to TensorBoard.
      wandb: W&B project to log to, if any.
      quiet: no progress on the terminal.

    Returns:
      The carry at the end, or at the moment of a SIGTERM, leaves `(A, ...)`, agents as in
      `fused.agents_of`.

    Raises:
      ValueError, FileNotFoundError, FileExistsError: a bad configuration or folder; nothing was
        changed.
      DiskFullError: a checkpoint didn't fit; the earlier ones are intact.
    """
    if jax.process_count() > 1:
        raise ValueError(f"MinAtar trains in one process, found {jax.process_count()}")
    if config.steps % config.log_every:
        raise ValueError(
            f"steps must be a multiple of log_every {config.log_every}, found {config.steps}"
        )
    keys, hypers = fused.agents_of(config)
    mesh = meshes.make_mesh(most_devices(len(keys)) if num_devices is None else num_devices)
    functions = compile_functions(config, mesh, len(keys), jax.tree.map(lambda x: x[0], hypers))
    saved = config_io.to_json(config)
    run = RunDir.open(path, saved, free=FREE) if resume else RunDir.create(path, saved)
    checkpoints = Checkpoints(run.checkpoints)
    keys, hypers = functions.place((keys, hypers))
    start = checkpoints.start(resume)
    if start:
        carry, _ = checkpoints.restore(start, functions.like)
    else:
        carry = functions.init(keys, hypers)
    options = {"start": start, "tensorboard": tensorboard, "wandb": wandb, "quiet": quiet}
    with (
        Metrics(run.path, config.steps, "steps", config=saved, **options) as metrics,
        Preemption() as preemption,
    ):
        for step, row, after in intervals(functions, carry, hypers, config.steps):
            carry = after
            metrics.write(step, summary(row))
            stop = preemption.requested
            if stop or step % config.checkpoint_every == 0 or step >= config.steps:
                checkpoints.save(step, carry)
            if stop:
                print(preemption.farewell(step))
                break
    plots.minatar(run, config)
    return carry


def summary(row: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns a row's means over the agents, `return` first, and each agent's as `returns`.

    Agents without a value (NaN: no game ended, or no update yet) are left out of the mean.
    """
    names = ["return", *(name for name in row if name not in ("return", "episodes"))]
    means = {name: float(scores.finite_mean(row[name], axis=0)) for name in names}
    return {**means, "episodes": int(row["episodes"].sum()), "returns": row["return"]}
