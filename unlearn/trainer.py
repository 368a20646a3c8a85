"""Training of shards, some or all, each from the slice where it has to begin.

Every shard's result has the same bits whatever other shards are trained beside it, on however many
devices: see `unlearn.programs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from unlearn import partition, programs
from unlearn.config import SisaConfig
from unlearn.partition import Partition
from unlearn.programs import BLOCK, Shape
from unlearn.sisa import Learner, ShardState

T = TypeVar("T")
# By shard and number of slices learnt.
States = dict[tuple[int, int], ShardState]


class _Lane(NamedTuple):
    """A shard's positions among the records, and its rows on the device, by slice and token."""

    shard: int
    at: np.ndarray
    rows: np.ndarray


class _Stage(NamedTuple):
    """The training of a group of shards on one more slice.

    Attributes:
      slice_: number of the slice.
      batches: of the lanes that take part, int32 `(T, B)`, rows on the device.
    """

    slice_: int
    batches: dict[int, np.ndarray]


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
        states = self._init([shard], record)
        return jax.tree.map(lambda leaf: leaf[0], states)

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
        done = 0
        for group, stage, state in _one_ahead(self._dispatch(records, start, load)):
            found = programs.to_host(state)
            for lane, batches in stage.batches.items():
                done += len(batches)
                own = jax.tree.map(lambda leaf, i=lane: leaf[i], found)
                yield group[lane].shard, stage.slice_, own
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

    def _dispatch(
        self,
        records: Records,
        start: Mapping[int, int],
        load: Callable[[int, int], ShardState],
    ) -> Iterator[tuple[list[_Lane], _Stage, ShardState]]:
        """Sets one stage after the other going and waits for none: states are still to come."""
        config, record, label = self._config, Shape.of(records.x), Shape.of(records.y)
        # Shards that begin together are trained together: lanes whose turn has not come idle.
        shards = sorted(start, key=lambda shard: (start[shard], shard))
        most = programs.width_of(self._learner, config, record) * self._mesh.size
        for begin in range(0, len(shards), most):
            group = [_lane(records.places, s, config) for s in shards[begin : begin + most]]
            lanes = self._width(len(group), record, label) * self._mesh.size
            x, y = self._place(records, group, lanes)
            state = self._begin(group, start, load, record, lanes)
            for slice_ in range(start[group[0].shard], config.slices):
                stage = self._plan(records.places, group, start, slice_)
                state = self._run_stage(state, x, y, stage, lanes)
                yield group, stage, state

    def _width(self, shards: int, record: Shape, label: Shape) -> int:
        """Shards of a device at once: as few as will do, where that changes no bit."""
        widest = programs.width_of(self._learner, self._config, record)
        need = -(-shards // self._mesh.size)
        if need >= widest:
            return widest
        width = 1 << (need - 1).bit_length()
        while width < widest:
            if programs.is_exact(width, self._learner, self._config, record, label, self._mesh):
                return width
            width *= 2
        return widest

    def _begin(
        self,
        group: list[_Lane],
        start: Mapping[int, int],
        load: Callable[[int, int], ShardState],
        record: Shape,
        lanes: int,
    ) -> ShardState:
        """The states that a group goes on from, on their devices; idle lanes have one, too."""
        shards = [lane.shard for lane in group] + [group[0].shard] * (lanes - len(group))
        new = None if all(start[s] for s in shards) else self._init(shards, record)
        states = [
            load(shard, start[shard]) if start[shard] else jax.tree.map(lambda a, i=i: a[i], new)
            for i, shard in enumerate(shards[: len(group)])
        ]
        states += [states[0]] * (lanes - len(group))
        return self._programs.place(programs.stack(states))

    def _init(self, shards: list[int], record: Shape) -> ShardState:
        """States before the first slice, on the host, with an axis of shards."""
        states = self._programs.init(self._key, np.array(shards, np.uint32), record.zeros())
        return programs.to_host(states)

    def _plan(
        self, places: Partition, group: list[_Lane], start: Mapping[int, int], slice_: int
    ) -> _Stage:
        """One stage of a group: the batches of those that have begun."""
        config = self._config
        epochs = partition.epochs_of_slices(config.epochs, config.slices)[slice_]
        batches = {}
        for number, lane in enumerate(group):
            if start[lane.shard] <= slice_:
                seen = np.searchsorted(places.slice[lane.at], slice_, side="right")
                tokens, rows = places.token[lane.at[:seen]], lane.rows[:seen]
                batches[number] = partition.batches(tokens, rows, slice_, epochs, config.batch_size)
        return _Stage(slice_, batches)

    def _place(self, records: Records, group: list[_Lane], lanes: int) -> tuple[Any, Any]:
        """The records of each lane's shard on its device, `(lanes, R · capacity, ...)`."""
        size = self._config.slices * self._config.capacity
        x = Shape.of(records.x).zeros(lanes, size)
        y = Shape.of(records.y).zeros(lanes, size)
        for number, lane in enumerate(group):
            x[number, lane.rows], y[number, lane.rows] = records.x[lane.at], records.y[lane.at]
        return self._programs.place((x, y))

    def _run_stage(
        self, state: ShardState, x: Any, y: Any, stage: _Stage, lanes: int
    ) -> ShardState:
        longest = max(map(len, stage.batches.values()))
        for begin in range(0, longest, BLOCK):
            block = np.full((lanes, BLOCK, self._config.batch_size), -1, np.int32)
            for lane, batches in stage.batches.items():
                part = batches[begin : begin + BLOCK]
                block[lane, : len(part)] = part
            count = np.int32(min(BLOCK, longest - begin))
            state = self._programs.run(state, x, y, self._programs.place(block), count)
        return state


def _one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Gives an item when the next one is on its way: the host plans while the devices work."""
    waiting = next(items, None)
    if waiting is None:
        return
    for item in items:
        yield waiting
        waiting = item
    yield waiting


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
    return _Lane(shard, at, rows.astype(np.int32))
