"""How long do partition and ledger take for 10,000 requests among a million records?

    python benchmarks/unlearn_scale.py [--quick] [--folder DIR]

A million records with 16 features, 20 shards of 10 slices, each request for one record. All that is
done but the retraining: every record's place and the check of capacities; the requests, each
recorded by itself as it arrives (and, to compare, all in one call); their shards and first slices;
the records that are left; and the ledger's states to the end: requested, tombstoned, retrained,
purged, attested, all on disk. The largest resident memory of the process is stated, in which JAX,
imported but not used, has its part. There is no peer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tyro
from _bench import figure, show

from unlearn import partition
from unlearn.config import SisaConfig
from unlearn.ledger import Ledger, State
from unlearn.trainer import Records, first_slices

RECORDS, FEATURES, REQUESTS, MIB = 1_000_000, 16, 10_000, 2**20
KEY = bytes(range(32))
ONCE = "requests, in one call"


def peak_mib() -> float:
    """The most resident memory that the process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / MIB if sys.platform == "darwin" else peak / 1024


class Clock:
    """Seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def on(self, what: str) -> Iterator[None]:
        """Counts the time within."""
        start = time.perf_counter()
        yield
        self.seconds[what] = time.perf_counter() - start


def model(shard: int, version: str) -> str:
    """A hash that stands for a shard's model."""
    return hashlib.sha256(f"{shard} {version}".encode()).hexdigest()


def handle(
    clock: Clock, folder: Path, ids: np.ndarray, records: Records, config: SisaConfig, count: int
) -> None:
    """Serves requests for records, in all but retraining."""
    asked = np.random.default_rng(1).choice(ids, count, replace=False).tolist()
    with Ledger.open(folder / "once.db", "scale") as ledger, clock.on(ONCE):
        ledger.request([([id_], "who asks") for id_ in asked])
    with Ledger.open(folder / "ledger.db", "scale") as ledger, ledger.exclusive():
        with clock.on("requests, one a call"):
            numbers = [ledger.request([([id_], "who asks")])[0] for id_ in asked]
        with clock.on("rows and first slices"):
            order = np.argsort(ids)
            wanted = np.array([ledger.ids(number)[0] for number in numbers])
            rows = order[np.searchsorted(ids, wanted, sorter=order)]
            deleted = np.zeros(len(ids), bool)
            deleted[rows] = True
            start = first_slices(records.places, deleted)
        shard_of = dict(zip(numbers, records.places.shard[rows].tolist(), strict=True))
        with clock.on("tombstoned"):
            before = {shard: model(shard, "before") for shard in start}
            ledger.tombstone({number: [shard] for number, shard in shard_of.items()}, before)
        with clock.on("match of all ids, as after a backup"):
            found = ledger.match(ids)
        with clock.on("records that are left"):
            left = records.take(~deleted)
            partition.check_capacity(left.places, config, may_be_empty=True)
        with clock.on("retrained"):
            ledger.retrained(numbers, {shard: model(shard, "after") for shard in start})
        with clock.on("purged"):
            ledger.purged(numbers)
        with clock.on("attested"):
            ledger.attest(numbers)
        assert (found == np.isin(ids, asked)).all() and len(left.y) == len(ids) - count
        assert all(request.state is State.ATTESTED for request in ledger.requests())


def main(folder: Path | None = None, quick: bool = False) -> None:
    """Serves the requests, and prints what each step took.

    Args:
      folder: on the disk where ledgers are to lie; unset: that of temporary files.
      quick: a tenth of the records and requests.
    """
    count, requests = (n // (10 if quick else 1) for n in (RECORDS, REQUESTS))
    before, clock, rng = peak_mib(), Clock(), np.random.default_rng(0)
    ids = rng.permutation(10 * count)[:count]
    x = rng.normal(size=(count, FEATURES)).astype(np.float32)
    y = rng.integers(0, 10, count).astype(np.int32)
    config = SisaConfig(shards=20, slices=10)
    config = dataclasses.replace(config, capacity=partition.capacity_for(count, config))
    with clock.on("check of ids"):
        ids = partition.check_ids(ids)
    with clock.on("places of all records"):
        places = partition.assign(ids, config, KEY)
    with clock.on("check of capacities"):
        partition.check_capacity(places, config)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        handle(clock, Path(name), ids, Records(x, y, places), config, requests)
        size = sum(path.stat().st_size for path in Path(name).glob("ledger.db*")) / MIB

    what = f"{count:,} records, {requests:,} requests"
    for name, seconds in clock.seconds.items():
        figure(f"{what}: {name}", seconds, None, "s")
    total = sum(clock.seconds.values()) - clock.seconds[ONCE]
    limit = None if quick else 60.0
    figure(f"{what}: all but requests in one call", total, None, "s", total, limit)
    figure(f"{what}: ledger at the end", size, None, "MiB")
    figure(f"{what}: largest resident memory, before", peak_mib(), before, "MiB")
    show()


if __name__ == "__main__":
    tyro.cli(main)
