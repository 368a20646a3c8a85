"""Training of shards, some or all, each from the slice where it has to begin.

Every shard's result has the same bits whatever other shards are trained beside it, on however many
devices: see `unlearn.programs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from fourfold.runtime import mesh as meshes
from unlearn import partition, programs
from unlearn.config import SisaConfig
from unlearn.partition import Partition
from unlearn.programs import BLOCK, Shape
from unlearn.sisa import Learner, ShardState

# By shard and number of slices learnt.
States = dict[tuple[int, int], ShardState]


class _Lane(NamedTuple):
    """A shard's positions among the records, and its rows on the device, by slice and token."""

    at: np.ndarray
    rows: np.ndarray


# Of a group of shards, the batches of one stage of their training.
_Stage = dict[int, np.ndarray]


class Records(NamedTuple):
    """The records that there are, or that are left.

    Attributes:
      x: `(N, ...)`, float or integer.
      y: `(N, ...)`, labels.
      places: of the same records.
    """

    x: np.ndarray
    y: np.ndarray
    places: Partition

    def take(self, rows: np.ndarray) -> Records:
        """The records at `rows`, integer positions or a mask."""
        return Records(self.x[rows], self.y[rows], self.places.take(rows))


class Trainer:
    """The training of one ensemble, compiled once for all deletions to come."""

    def __init__(self, learner: Learner, config: SisaConfig, key: jax.Array, mesh: Mesh) -> None:
        """Compiles nothing yet.

        Args:
          learner: what is trained.
          config: of the ensemble.
          key: typed key `()`; shard s has `fold_in(key, s)`.
          mesh: devices that share the shards.
        """
        self._learner, self._config, self._key, self._mesh = learner, config, key, mesh
        self._programs = programs.programs(learner, mesh)

    def init(self, shard: int, record: Shape) -> ShardState:
        """Returns a shard's state before its first slice, on the host."""
        state = self._programs.init(self._key, np.uint32(shard), record.zeros())
        return programs.to_host(state)

    def fit(
        self,
        records: Records,
        start: Mapping[int, int],
        load: Callable[[int, int], ShardState],
        progress: Callable[[int], None] = lambda done: None,
    ) -> Iterator[tuple[int, int, ShardState]]:
        """Trains shards, all others untouched.

        Args:
          records: all that there are; those of other shards are not read.
          start: shard to the number of the first slice to train, 0..R-1.
          load: `(shard, slice) -> state`, before that slice, which is what was yielded for the one
            before; asked once for each shard of `start` that does not begin with slice 0.
          progress: called now and then with the number of updates done, of `updates`.

        Yields:
          `(shard, slice, state)` as soon as a slice is finished, on the host; of each shard in the
          order of its slices.

        Raises:
          ValueError: a slice has more records than the configuration's capacity.
        """
        partition.check_capacity(records.places, self._config, may_be_empty=True)
        record, label = Shape.of(records.x), Shape.of(records.y)
        shards = sorted(start)
        lanes = self._width(len(shards), record, label) * self._mesh.size
        groups = [shards[i : i + lanes] for i in range(0, len(shards), lanes)]
        done = 0
        for group in groups:
            own = {shard: _lane(records.places, shard, self._config) for shard in group}
            plan = self._plan(records.places, own, start)
            x, y = self._place(records, own, lanes)
            states = [load(s, start[s]) if start[s] else self.init(s, record) for s in group]
            state = programs.place(states, lanes, self._mesh)
            for slice_, stage in enumerate(plan):
                if not stage:
                    continue
                state = self._run_stage(state, x, y, stage, group, lanes)
                done += sum(len(rows) for rows in stage.values())
                found = programs.to_host(state)
                for lane, shard in enumerate(group):
                    if shard in stage:
                        yield shard, slice_, jax.tree.map(lambda leaf, i=lane: leaf[i], found)
                progress(done)

    def train(
        self,
        records: Records,
        start: Mapping[int, int] | None = None,
        states: Mapping[tuple[int, int], ShardState] = MappingProxyType({}),
    ) -> States:
        """Trains shards and keeps every state in memory.

        Args:
          records: as for `fit`.
          start: as for `fit`; None for all shards from their first slices on.
          states: those that there are, by shard and number of slices learnt.

        Returns:
          The same with the new ones; the end of a shard is at (shard, R).
        """
        known = dict(states)
        start = dict.fromkeys(range(self._config.shards), 0) if start is None else start
        for shard, slice_, state in self.fit(records, start, lambda s, r: known[s, r]):
            known[shard, slice_ + 1] = state
        return known

    def updates(self, records: Records, start: Mapping[int, int]) -> int:
        """Returns how many updates `fit` makes, over all shards."""
        config, total = self._config, 0
        epochs = partition.epochs_of_slices(config.epochs, config.slices)
        for shard, first in start.items():
            slices = records.places.slice[records.places.shard == shard]
            seen = np.cumsum(np.bincount(slices, minlength=config.slices))
            steps = -(-seen // config.batch_size) * np.array(epochs)
            total += int(steps[first:].sum())
        return total

    def _width(self, shards: int, record: Shape, label: Shape) -> int:
        """Shards of a device at once: as few as will do, where that changes no bit."""
        widest, need = programs.width_of(self._config), -(-shards // self._mesh.size)
        if need >= widest:
            return widest
        width = 1 << (need - 1).bit_length()
        while width < widest:
            if programs.is_exact(width, self._learner, self._config, record, label, self._mesh):
                return width
            width *= 2
        return widest

    def _plan(
        self, places: Partition, own: dict[int, _Lane], start: Mapping[int, int]
    ) -> list[_Stage]:
        """The stages of a group, one for each slice."""
        config = self._config
        epochs = partition.epochs_of_slices(config.epochs, config.slices)
        plan: list[_Stage] = [{} for _ in range(config.slices)]
        for shard, (at, rows) in own.items():
            tokens, slices = places.token[at], places.slice[at]
            for slice_ in range(start[shard], config.slices):
                seen = slices <= slice_
                plan[slice_][shard] = partition.batches(
                    tokens[seen], rows[seen], slice_, epochs[slice_], config.batch_size
                )
        return plan

    def _place(self, records: Records, own: dict[int, _Lane], lanes: int) -> tuple[Any, Any]:
        """The records of each lane's shard on its device, `(lanes, R · capacity, ...)`."""
        size = self._config.slices * self._config.capacity
        x = Shape.of(records.x).zeros(lanes, size)
        y = Shape.of(records.y).zeros(lanes, size)
        for lane, (at, rows) in enumerate(own.values()):
            x[lane, rows], y[lane, rows] = records.x[at], records.y[at]
        return jax.device_put((x, y), meshes.batch_sharding(self._mesh))

    def _run_stage(
        self, state: ShardState, x: Any, y: Any, stage: _Stage, group: list[int], lanes: int
    ) -> ShardState:
        longest = max(len(rows) for rows in stage.values())
        sharding = meshes.batch_sharding(self._mesh)
        for begin in range(0, longest, BLOCK):
            block = np.full((lanes, BLOCK, self._config.batch_size), -1, np.int32)
            for lane, shard in enumerate(group):
                part = stage[shard][begin : begin + BLOCK] if shard in stage else block[lane, :0]
                block[lane, : len(part)] = part
            count = np.int32(min(BLOCK, longest - begin))
            state = self._programs.run(state, x, y, jax.device_put(block, sharding), count)
        return state


def first_slices(places: Partition, deleted: np.ndarray) -> dict[int, int]:
    """Returns each shard that has deleted records, and the earliest of their slices.

    Args:
      places: of the records before the deletion.
      deleted: bool `(N,)`.
    """
    start: dict[int, int] = {}
    for shard, slice_ in zip(
        places.shard[deleted].tolist(), places.slice[deleted].tolist(), strict=True
    ):
        start[shard] = min(slice_, start.get(shard, slice_))
    return start


def _lane(places: Partition, shard: int, config: SisaConfig) -> _Lane:
    at = np.flatnonzero(places.shard == shard)
    at = at[np.lexsort((places.token[at], places.slice[at]))]
    slices = places.slice[at]
    first = np.searchsorted(slices, slices)
    rows = slices * config.capacity + np.arange(len(at)) - first
    return _Lane(at, rows.astype(np.int32))
