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
from fourfold.runtime.metrics import Metrics, read_metrics
from fourfold.runtime.preemption import Preemption
from fourfold.runtime.run_dir import RunDir
from jaxrl import config_io, fused
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
            f"num_seeds must be a multiple of the {mesh.size} devices, found {num_agents}"
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
    """Trains `num_seeds` agents in a run folder, or goes on with them.

    A run that was killed at any moment and resumed ends with the same bits as one that wasn't,
    on the same number of devices of the same kind.

    Args:
      config: the configuration.
      path: the run's folder.
      resume: go on with the run in it.
      num_devices: devices to split the seeds over; None for as many as divide the seeds evenly.
      tensorboard: also log to TensorBoard.
      wandb: W&B project to log to, if any.
      quiet: no progress on the terminal.

    Returns:
      The carry at the end, or at the moment of a SIGTERM, leaves `(num_seeds, ...)`.

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
    seeds = config.num_seeds
    if num_devices is None:
        num_devices = max(n for n in range(1, jax.device_count() + 1) if seeds % n == 0)
    hyper = fused.hyper_of(config)
    functions = compile_functions(config, meshes.make_mesh(num_devices), seeds, hyper)
    saved = config_io.to_json(config)
    run = RunDir.open(path, saved, free=FREE) if resume else RunDir.create(path, saved)
    checkpoints = Checkpoints(run.checkpoints)
    keys = functions.place(fused.seed_keys(config))
    hypers = functions.place(jax.tree.map(lambda x: jnp.full((seeds,), x), hyper))
    start = (checkpoints.latest() or 0) if resume else 0
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
    plot(run)
    return carry


def summary(row: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns a row's means over the agents, `return` first, and each agent's as `returns`.

    Agents without a value (NaN: no game ended, or no update yet) are left out of the mean.
    """
    names = ["return", *(name for name in row if name not in ("return", "episodes"))]
    means = {name: _mean(row[name]) for name in names}
    return {**means, "episodes": int(row["episodes"].sum()), "returns": row["return"]}


def bootstrap(
    values: np.ndarray, *, level: float = 0.95, resamples: int = 2_000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the percentile bootstrap interval of the mean over seeds, at each point.

    Args:
      values: `(S, ...)`, one row a seed; NaNs are left out of the means.
      level: of confidence.
      resamples: of the seeds, with replacement.
      seed: of the resampling.

    Returns:
      Lower and upper ends, `(...)`.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(values), size=(resamples, len(values)))
    counts = np.stack([np.bincount(c, minlength=len(values)) for c in chosen]).astype(float)
    known = np.isfinite(values)
    flat = np.where(known, values, 0.0).reshape(len(values), -1)
    with np.errstate(invalid="ignore"):
        means = (counts @ flat) / (counts @ known.reshape(flat.shape).astype(float))
    tails = 100 * np.array([(1 - level) / 2, (1 + level) / 2])
    empty = np.isnan(means).all(axis=0)
    low, high = np.nanpercentile(np.where(empty, 0.0, means), tails, axis=0)
    low, high = (np.where(empty, np.nan, x).reshape(values.shape[1:]) for x in (low, high))
    return low, high


def plot(run: RunDir) -> None:
    """Draws the learning curve, mean over seeds with its bootstrap band, to `plots/return.png`."""
    from matplotlib.figure import Figure

    rows = read_metrics(run.path)
    if not rows:
        return
    steps = np.array([row["step"] for row in rows])
    returns = np.array([[float(x) for x in row["returns"]] for row in rows]).T
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, [float(row["return"]) for row in rows])
    if len(returns) > 1:
        axes.fill_between(steps, *bootstrap(returns), alpha=0.3, linewidth=0)
    band = ", 95 % bootstrap band" if len(returns) > 1 else ""
    axes.set(xlabel="steps", ylabel="return of a game", title=f"{len(returns)} seeds{band}")
    run.plots.mkdir(exist_ok=True)
    figure.savefig(run.plots / "return.png", dpi=160)


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")
