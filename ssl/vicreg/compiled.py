"""The edge of the training step: its pure functions compiled for a mesh, whole or in parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from fourfold.runtime import mesh as meshes
from fourfold.runtime.hardware import cpu_options
from vicreg import accumulate, augment, monitor, step
from vicreg import learner as learners
from vicreg.config import LossConfig, PretrainConfig
from vicreg.learner import Learner, Metrics, TrainState
from vicreg.step import Embedded

HostBatch = dict[str, np.ndarray]


class Functions(NamedTuple):
    """What a run calls.

    Attributes:
      init: `key -> state`, replicated.
      advance: `(state, batch) -> (state, metrics, images)` takes a batch of the host (this
        process's rows) through one update; the images are augmented ones, to diagnose with. The
        state that goes in is given up.
      diagnose: `(state, images) -> metrics`.
      score: `(state, batch) -> ()`, what the online probe gets right of a batch of `data.ordered`.
    """

    init: Callable[[jax.Array], TrainState]
    advance: Callable[[TrainState, HostBatch], tuple[TrainState, Metrics, jax.Array]]
    diagnose: Callable[[TrainState, jax.Array], Metrics]
    score: Callable[[TrainState, HostBatch], jax.Array]


def compile_functions(config: PretrainConfig, learner: Learner, mesh: Mesh) -> Functions:
    """Compiles a run for a mesh: batches split over it, the state on every device.

    An image's views depend on the state's key and step and on the image's position in the data set,
    whatever device or process it is on.

    Args:
      config: the configuration.
      learner: from `learner.make`.
      mesh: from `fourfold.runtime.mesh.make_mesh`.
    """
    whole, rows = meshes.replicated(mesh), meshes.batch_sharding(mesh)
    options: Any = {"compiler_options": cpu_options()}
    learner = _over(mesh, learner, config.loss)
    view_shape = (config.augment.size, config.augment.size, len(config.augment.mean))

    # In a program of its own: on a CPU, one with the update takes twice as long.
    def augment_batch(key: jax.Array, step: jax.Array, batch: dict[str, jax.Array]):
        key = jax.random.fold_in(key, step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["index"])
        a, b = augment.two_views(keys, batch["image"], batch["size"], config.augment)
        return {"view_a": a, "view_b": b, "label": batch["label"]}

    def score(state: TrainState, batch: dict[str, jax.Array]) -> jax.Array:
        images = augment.for_evaluation(batch["image"], batch["size"], config.augment)
        return monitor.score(learner, state, {**batch, "image": images})

    augment_batch = jax.jit(augment_batch, out_shardings=rows, **options)
    score = jax.jit(score, out_shardings=whole, **options)

    def views(state: TrainState, batch: HostBatch) -> dict[str, jax.Array]:
        on_device: Any = meshes.global_batch(mesh, batch)
        return augment_batch(state.key, state.step, on_device)

    if config.accumulate == 1:
        update = jax.jit(
            lambda state, batch: step.update(learner, state, batch),
            donate_argnums=0,
            out_shardings=whole,
            **options,
        )

        def in_one(state: TrainState, batch: HostBatch) -> tuple[TrainState, Metrics, jax.Array]:
            on_device = views(state, batch)
            state, metrics = update(state, on_device)
            return state, metrics, on_device["view_a"]

        advance = in_one
    else:
        advance = _in_parts(config, learner, views, whole, rows, options)

    return Functions(
        init=jax.jit(lambda key: learners.init(learner, key, view_shape), out_shardings=whole),
        advance=advance,
        diagnose=jax.jit(
            lambda state, images: monitor.diagnose(learner, state, images),
            out_shardings=whole,
            **options,
        ),
        score=lambda state, batch: score(state, meshes.global_batch(mesh, batch)),
    )


def _over(mesh: Mesh, learner: Learner, config: LossConfig) -> Learner:
    """The learner with its loss under shard_map, where it may choose how devices share the work."""
    if mesh.size == 1 or learner.objective is None:
        return learner
    axis = mesh.axis_names[0]
    objective = jax.shard_map(
        learners.objective(config, axis),
        mesh=mesh,
        in_specs=PartitionSpec(axis),
        out_specs=PartitionSpec(),
    )
    return learner._replace(objective=objective)


def _in_parts(
    config: PretrainConfig,
    learner: Learner,
    views: Callable[[TrainState, HostBatch], dict[str, jax.Array]],
    whole: jax.sharding.Sharding,
    rows: jax.sharding.Sharding,
    options: dict[str, Any],
) -> Callable[[TrainState, HostBatch], tuple[TrainState, Metrics, jax.Array]]:
    """`advance` by `accumulate`: programs of one part each, which the host calls in turn."""

    def cache(params: Any, batch_stats: Any, part: dict[str, jax.Array]):
        return accumulate.cache(learner, params, batch_stats, part)

    def part_gradient(state: TrainState, part: Any, cotangents: Any, grads: Any):
        return accumulate.part_gradient(learner, state, part, cotangents, grads)

    def join(parts: list[Embedded], labels: list[jax.Array]) -> tuple[Embedded, jax.Array]:
        return jax.tree.map(lambda *xs: jnp.concatenate(xs), *parts), jnp.concatenate(labels)

    def finish(state: TrainState, embedded: Embedded, labels: Any, grads: Any, batch_stats: Any):
        return accumulate.finish(learner, state, embedded, labels, grads, batch_stats)

    def loss_gradient(embedded: Embedded, labels: jax.Array):
        loss, terms, cotangents = accumulate.loss_gradient(learner, embedded, labels)
        parts = [jnp.split(g, config.accumulate) for g in cotangents]
        return {"loss": loss, **terms}, list(zip(*parts, strict=True))

    cache = jax.jit(cache, out_shardings=(rows, whole), **options)
    join = jax.jit(join, out_shardings=rows)
    loss_gradient = jax.jit(loss_gradient, out_shardings=(whole, rows), **options)
    part_gradient = jax.jit(part_gradient, donate_argnums=3, out_shardings=whole, **options)
    finish = jax.jit(finish, donate_argnums=0, out_shardings=whole, **options)

    def advance(state: TrainState, batch: HostBatch):
        shares = {name: np.split(x, config.accumulate) for name, x in batch.items()}
        parts = [{n: x[i] for n, x in shares.items()} for i in range(config.accumulate)]
        embedded, labels, stats = [], [], state.batch_stats
        for part in parts:
            on_device = views(state, part)
            found, stats = cache(state.params, stats, on_device)
            embedded.append(found)
            labels.append(on_device["label"])
        everything, all_labels = join(embedded, labels)
        metrics, cotangents = loss_gradient(everything, all_labels)
        grads, on_device = jax.tree.map(jnp.zeros_like, state.params), {}
        # The views are made again, the same from the same keys: kept, they would fill the memory.
        for part, share in zip(parts, cotangents, strict=True):
            on_device = views(state, part)
            grads = part_gradient(state, on_device, share, grads)
        state, more = finish(state, everything, all_labels, grads, stats)
        return state, {**metrics, **more}, on_device["view_a"]

    return advance
