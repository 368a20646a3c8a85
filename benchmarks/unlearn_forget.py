"""How much sooner is a record forgotten than all is trained anew?

    python benchmarks/unlearn_forget.py [--quick]

16 shards of about 1,024 records, 8 slices, perceptrons 64-32-10 and 784-128-10. Both sides are
`Trainer.fit` on the records that are left, on one device, for a shard can't be split over several:
ours trains the shards that lost records, each from the slice where it lost the first, the peer the
whole ensemble. The speed-up stands beside that by the count of updates, and for requests together
also beside the planner's expectation. Neither side reads states from disk or writes them.
"""

from __future__ import annotations

import functools
import itertools
import statistics
from typing import Any

import _sisa
import jax
import numpy as np
import tyro
from _bench import alternate, figure, median, show
from _sisa import LARGE, SHARDS, SMALL, Problem

from fourfold.runtime import mesh as meshes
from unlearn import partition, planner, programs
from unlearn.sisa import ShardState
from unlearn.trainer import Records, first_slices

SLICES = 8
REQUESTS = (1, 4, 16, 64)


class Compilations:
    """Counts the compilations of this process from now on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"


def without(found: Problem, rows: np.ndarray) -> tuple[Records, dict[int, int]]:
    """The records that are left, and from where which shards are to be trained."""
    deleted = np.zeros(len(found.records.y), bool)
    deleted[rows] = True
    return found.records.take(~deleted), first_slices(found.records.places, deleted)


def measure(network: str, epochs: int, repeats: int, draws: int) -> None:
    """Times deletions from one network, and collects the figures."""
    found = _sisa.problem(network, SLICES, epochs)
    config, records, places = found.config, found.records, found.records.places
    trainer = found.trainer(meshes.make_mesh(1))
    states = _sisa.fit(trainer, records)

    # All shards; of each slice one record, of another shard each; some records drawn, some times.
    work: dict[Any, tuple[Records, dict[int, int]]] = {}
    work["all"] = records, dict.fromkeys(range(SHARDS), 0)
    for slice_ in range(SLICES):
        rows = np.flatnonzero((places.slice == slice_) & (places.shard == slice_))
        work[slice_] = without(found, rows[:1])
    rng = np.random.default_rng(0)
    for count, draw in itertools.product(REQUESTS, range(draws)):
        work[count, draw] = without(found, rng.choice(len(places), count, replace=False))

    def train(name: Any) -> dict[tuple[int, int], ShardState]:
        trained = trainer.fit(*work[name], lambda shard, slice_: states[shard, slice_ - 1])
        return {(shard, slice_): state for shard, slice_, state in trained}

    compilations = Compilations()
    train(SLICES - 1)
    first = compilations.count
    forgotten = train(0)
    second = compilations.count - first
    name = f"{network}: compilations of the second deletion, of the first"
    figure(name, second, first, "", second, 0)
    anew = _sisa.fit(trainer, work[0][0])
    for at, state in forgotten.items():
        assert programs.digest(state) == programs.digest(anew[at]), f"other bits at {at}"

    fns = {name: functools.partial(train, name) for name in work}
    timed = alternate(fns, repeats, warmup=1)
    seconds: dict[Any, float] = {name: median(times) for name, times in timed.items()}
    updates: dict[Any, int] = {name: trainer.updates(*given) for name, given in work.items()}
    for slice_ in range(SLICES):
        measured, counted = (x["all"] / x[slice_] for x in (seconds, updates))
        name = f"{network}: speed-up, a record of slice {slice_ + 1} of {SLICES}, by updates"
        figure(name, measured, counted, "×", measured / counted, 0.85, "higher")
    stages = partition.epochs_of_slices(config.epochs, config.slices)
    for count in REQUESTS:
        measured, counted = (
            x["all"] / statistics.mean(x[count, draw] for draw in range(draws))
            for x in (seconds, updates)
        )
        once = SHARDS * planner.restart_cost(len(places) / SHARDS, 0, stages)
        cost = planner.expected_cost(len(places), SHARDS, count, stages, batch=True)
        name = f"{network}: speed-up, {count} requests at once, "
        figure(f"{name}by updates", measured, counted, "×", measured / counted, None, "higher")
        expected = once / cost
        figure(f"{name}planner", measured, expected, "×", measured / expected, None, "higher")


def main(repeats: int = 9, draws: int = 4, quick: bool = False) -> None:
    """Times both networks.

    Args:
      repeats: timed calls of each.
      draws: of the requests that are served at once.
      quick: 3 repeats, 2 draws, and 5 epochs instead of 10.
    """
    repeats, draws, epochs = (3, 2, 5) if quick else (repeats, draws, 10)
    for network in (SMALL, LARGE):
        measure(network, epochs, repeats, draws)
    show()


if __name__ == "__main__":
    tyro.cli(main)
