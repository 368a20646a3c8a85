"""The ensembles of the unlearning claim: what they learn from, their networks, their deletions."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np

from fourfold.runtime import mesh as meshes
from unlearn import data, models, partition, programs, trainer
from unlearn.config import DataConfig, ModelConfig, OptimConfig, SisaConfig
from unlearn.data import Table
from unlearn.sisa import Learner, ShardState
from unlearn.trainer import Records, States, Trainer


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much to run.

    Attributes:
      data: a name for `unlearn.data.load`.
      seeds: ensembles of each kind.
      shards: numbers of shards, S, ascending from 1.
      slices: numbers of slices, R, ascending from 1.
      requests: numbers of records deleted at once, K.
      hidden: units of a network.
      epochs: e0.
      batch_size: records an update.
      width: networks trained at once.
      lr: learning rate of SGD with momentum 0.9.
      draws: partitions and requests whose cost is counted, for each S, R and K.
      trials: of each attack.
      attack_shards: S of the attacked ensembles.
      noise: noise multipliers of the defence.
      updates: of one private training.
      removals: records removed from the convex model, one after the other.
    """

    data: str
    seeds: int
    shards: tuple[int, ...] = (1, 2, 5, 10, 20)
    slices: tuple[int, ...] = (1, 10, 50)
    requests: tuple[int, ...] = (1, 8, 18)
    hidden: int = 32
    epochs: int = 26
    batch_size: int = 16
    width: int = 5
    lr: float = 0.05
    draws: int = 200
    trials: int = 80
    attack_shards: int = 6
    noise: tuple[float, ...] = (16.0, 64.0)
    updates: int = 30
    removals: int = 100


class Problem(NamedTuple):
    """Records to learn from and others to score on; labels int32 from 0 to classes - 1."""

    train: Table
    test: Table
    classes: int


class Ensemble(NamedTuple):
    """All that determines an ensemble's networks.

    Attributes:
      config: of the ensemble.
      learner: what is trained.
      records: what on.
      seed: of the networks.
    """

    config: SisaConfig
    learner: Learner
    records: Records
    seed: int

    @property
    def trainer(self) -> Trainer:
        """Its trainer, on one device: the networks are small."""
        key = jax.random.key(self.seed)
        return Trainer(self.learner, self.config, key, meshes.make_mesh(1))

    def fit(self, start: dict[int, int] | None = None, states: States | None = None) -> States:
        """Trains shards from a slice on, by default all of them from the first; others stay."""
        return self.trainer.train(self.records, start, states or {})

    def forget(self, states: States, gone: np.ndarray) -> tuple[Ensemble, States]:
        """Returns the ensemble without the records `gone`, bool `(N,)`, and its networks."""
        start = trainer.first_slices(self.records.places, gone)
        left = self._replace(records=self.records.take(~gone))
        return left, left.fit(start, states)

    def cost(self, gone: np.ndarray | None = None) -> tuple[int, int]:
        """Visits and updates that `forget` takes; without `gone`, those of `fit`.

        A visit is one record in one epoch of one network: an update, were batches of one record.
        """
        start, records = dict.fromkeys(range(self.config.shards), 0), self.records
        if gone is not None:
            start, records = trainer.first_slices(records.places, gone), records.take(~gone)
        one = self._replace(config=dataclasses.replace(self.config, batch_size=1))
        return one.trainer.updates(records, start), self.trainer.updates(records, start)

    def last(self, states: States) -> list[ShardState]:
        """The end state of each shard."""
        return [states[shard, self.config.slices] for shard in range(self.config.shards)]

    def probabilities(self, states: States, x: np.ndarray) -> np.ndarray:
        """Of each network for records `(B, ...)`, float32 `(S, B, C)`."""
        stacked = programs.stack(self.last(states))
        return np.asarray(programs.programs(self.learner, meshes.make_mesh(1)).predict(stacked, x))

    def digests(self, states: States) -> np.ndarray:
        """SHA-256 of the end state of each shard, text `(S,)`."""
        return np.array([programs.digest(state) for state in self.last(states)])


def load(plan: Plan) -> Problem:
    """Reads the plan's data."""
    train, test = data.load(DataConfig(plan.data)), data.load_test(DataConfig(plan.data))
    if test is None:
        raise ValueError(f"{plan.data} has no records to score on")
    classes = np.unique(train.y)
    train, test = (
        table._replace(y=np.searchsorted(classes, table.y).astype(np.int32))
        for table in (train, test)
    )
    return Problem(train, test, len(classes))


def make(
    plan: Plan, problem: Problem, shards: int, slices: int, seed: int, width: int | None = None
) -> Ensemble:
    """Returns an ensemble; the seed is of its networks and of the key of its partition."""
    config = SisaConfig(
        shards=shards,
        slices=slices,
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        width=width or plan.width,
        optim=OptimConfig(lr=plan.lr),
        model=ModelConfig((plan.hidden,)),
    )
    capacity = partition.capacity_for(len(problem.train.ids), config)
    config = dataclasses.replace(config, capacity=capacity)
    places = partition.assign(problem.train.ids, config, seed.to_bytes(16, "big"))
    learner = models.make_learner(config.model, config.optim, problem.classes)
    return Ensemble(config, learner, Records(problem.train.x, problem.train.y, places), seed)
