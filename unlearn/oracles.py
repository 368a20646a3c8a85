"""Models to audit with: many ensembles that forgot, and as many that never saw the records."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from unlearn import membership, partition, programs
from unlearn.config import SisaConfig
from unlearn.data import Table
from unlearn.partition import Partition
from unlearn.sisa import Learner
from unlearn.trainer import Records, States, Trainer, first_slices

_TOGETHER = 12  # ensembles that are trained at once; each has its own copy of the records


class Margins(NamedTuple):
    """What ensembles think of the forgotten records: log(p / (1 - p)) of the label, `(M, K)`.

    Attributes:
      kept: ensembles that learnt the records.
      unlearned: the same ones after they forgot.
      retrained: others, trained without the records.
    """

    kept: np.ndarray
    unlearned: np.ndarray
    retrained: np.ndarray


def margins(
    learner: Learner,
    config: SisaConfig,
    table: Table,
    forgotten: np.ndarray,
    count: int,
    mesh: Mesh,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Margins:
    """Trains ensembles with partitions and networks of their own each.

    Args:
      learner: what is trained.
      config: of an ensemble, with a capacity.
      table: all records, `y` as positions of classes.
      forgotten: bool `(N,)`, with K true.
      count: M, ensembles of each kind.
      mesh: devices that share the shards.
      seed: of everything.
      progress: called now and then with ensembles done and to do.

    Raises:
      ValueError: a slice of an ensemble is over its capacity.
    """
    found: list[list[np.ndarray]] = [[], [], []]
    for begin in range(0, count, _TOGETHER):
        group = range(begin, min(begin + _TOGETHER, count))
        # Retrained ones are other draws of the same lottery, not the same ensembles once more.
        pairs = _Group(learner, config, table, mesh, [(seed, "kept", m) for m in group])
        states = pairs.train(np.zeros_like(forgotten), {})
        found[0] += pairs.margins(states, forgotten)
        progress(2 * begin + len(group), 2 * count)
        found[1] += pairs.margins(pairs.train(forgotten, states), forgotten)
        others = _Group(learner, config, table, mesh, [(seed, "retrained", m) for m in group])
        found[2] += others.margins(others.train(forgotten, {}), forgotten)
        progress(2 * (begin + len(group)), 2 * count)
    return Margins(*map(np.stack, found))


class _Group:
    """Ensembles as the shards of one large ensemble."""

    def __init__(
        self,
        learner: Learner,
        config: SisaConfig,
        table: Table,
        mesh: Mesh,
        names: list[tuple[int, str, int]],
    ) -> None:
        self._learner, self._table, self._shards, self._mesh = learner, table, config.shards, mesh
        self._count, self._slices = len(names), config.slices
        places = []
        for at, name in enumerate(names):
            key = hashlib.blake2b(str(name).encode(), digest_size=32).digest()
            own = partition.assign(table.ids, config, key)
            partition.check_capacity(own, config, may_be_empty=True)
            places.append(Partition(own.shard + np.int32(at * config.shards), own.slice, own.token))
        self._places = Partition(
            *(np.concatenate([getattr(p, name) for p in places]) for name in vars(places[0]))
        )
        whole = dataclasses.replace(config, shards=config.shards * len(names), groups=())
        seed = int.from_bytes(hashlib.blake2b(str(names[0]).encode(), digest_size=4).digest())
        self._trainer = Trainer(learner, whole, jax.random.key(seed), mesh)

    def train(self, gone: np.ndarray, states: States) -> States:
        """Trains all shards, or those that lost records since `states`."""
        gone = np.tile(gone, self._count)
        x, y = (np.tile(a, (self._count, *[1] * (a.ndim - 1))) for a in self._table[1:])
        records = Records(x, y.astype(np.int32), self._places).take(~gone)
        start = first_slices(self._places, gone) if states else None
        return self._trainer.train(records, start, states)

    def margins(self, states: States, forgotten: np.ndarray) -> list[np.ndarray]:
        """Of each ensemble, by the mean of its shards' probabilities."""
        x, y = self._table.x[forgotten], self._table.y[forgotten]
        last = [states[s, self._slices] for s in range(self._count * self._shards)]
        stacked = programs.stack(last)
        probs = programs.programs(self._learner, self._mesh).predict(stacked, x)
        found = []
        for part in np.split(np.asarray(probs, np.float64), self._count):
            log_probs = np.log(np.maximum(part.mean(axis=0), 1e-30))
            found.append(membership.margins(log_probs, y))
        return found
