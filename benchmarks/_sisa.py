"""What the benchmarks of `unlearn` share: an ensemble of 16 shards to train, and its batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from unlearn import models, partition
from unlearn.config import ModelConfig, OptimConfig, SisaConfig
from unlearn.sisa import Learner, ShardState
from unlearn.trainer import Records, Trainer

CLASSES, SHARDS, PER_SHARD = 10, 16, 1024
SMALL, LARGE = "64-32-10", "784-128-10"
NETWORKS = {SMALL: (64, 32), LARGE: (784, 128)}  # inputs, hidden units


class Problem(NamedTuple):
    """What is trained, and on what."""

    config: SisaConfig
    learner: Learner
    records: Records

    def trainer(self, mesh: Mesh) -> Trainer:
        """A trainer on these devices."""
        return Trainer(self.learner, self.config, jax.random.key(0), mesh)


class Layout(NamedTuple):
    """All records and batches, shard by shard.

    Attributes:
      x: `(S, n, d)`.
      y: `(S, n)`.
      stages: of each slice int32 `(S, T, B)`: rows of a batch a step, and -1 where there are none.
    """

    x: np.ndarray
    y: np.ndarray
    stages: list[np.ndarray]


def problem(network: str, slices: int, epochs: int) -> Problem:
    """Random records with labels that can be learnt, about 1,024 a shard as the hash has it."""
    inputs, hidden = NETWORKS[network]
    count = SHARDS * PER_SHARD
    # Slow and of short records: otherwise training is chaotic, and rounding alone parts the peers.
    optim = OptimConfig(lr=0.01)
    config = SisaConfig(SHARDS, slices, epochs=epochs, optim=optim, model=ModelConfig((hidden,)))
    config = dataclasses.replace(config, capacity=partition.capacity_for(count, config))
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(count, inputs)) * 4 / np.sqrt(inputs)).astype(np.float32)
    y = (x @ rng.normal(size=(inputs, CLASSES))).argmax(axis=1).astype(np.int32)
    places = partition.assign(partition.check_ids(np.arange(count)), config, key=bytes(16))
    partition.check_capacity(places, config)
    learner = models.make_learner(config.model, config.optim, CLASSES)
    return Problem(config, learner, Records(x, y, places))


def batches(found: Problem, shard: int) -> Iterator[np.ndarray]:
    """A shard's batches, slice by slice: int32 `(T, B)`, rows among the records of the shard."""
    config, places = found.config, found.records.places
    epochs = partition.epochs_of_slices(config.epochs, config.slices)
    at = np.flatnonzero(places.shard == shard)
    slices, tokens = places.slice[at], places.token[at]
    for slice_ in range(config.slices):
        rows = np.flatnonzero(slices <= slice_).astype(np.int32)
        yield partition.batches(tokens[rows], rows, slice_, epochs[slice_], config.batch_size)


def lay_out(found: Problem) -> Layout:
    """The records and batches of all shards, those that the trainer makes."""
    x, y, places = found.records
    size = np.bincount(places.shard).max()
    xs, ys = (np.zeros((SHARDS, size, *a.shape[1:]), a.dtype) for a in (x, y))
    for shard in range(SHARDS):
        at = np.flatnonzero(places.shard == shard)
        xs[shard, : len(at)], ys[shard, : len(at)] = x[at], y[at]
    stages = []
    for parts in zip(*(batches(found, shard) for shard in range(SHARDS)), strict=True):
        longest = max(map(len, parts))
        padded = [
            np.pad(part, ((0, longest - len(part)), (0, 0)), constant_values=-1) for part in parts
        ]
        stages.append(np.stack(padded))
    return Layout(xs, ys, stages)


def fit(trainer: Trainer, records: Records) -> dict[tuple[int, int], ShardState]:
    """Trains all shards from their beginning; returns the states after each slice."""

    def load(shard: int, slice_: int) -> ShardState:
        raise AssertionError(f"shard {shard} was to begin at its beginning, not at {slice_}")

    start = dict.fromkeys(range(SHARDS), 0)
    return {(shard, slice_): state for shard, slice_, state in trainer.fit(records, start, load)}
