"""Where a record goes: its shard, slice and place in each batch, from a keyed hash of its id.

Nothing here depends on a record's place in a file, nor on which other records there are, but for
the order of those that remain. So whoever trains on the survivors alone comes to the same batches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unlearn.config import SisaConfig


@dataclass(frozen=True)
class Partition:
    """Places of N records.

    Attributes:
      shard: int32 `(N,)`, in 0..S-1.
      slice: int32 `(N,)`, in 0..R-1.
      token: uint64 `(N,)`, the record's own randomness.
    """

    shard: np.ndarray
    slice: np.ndarray
    token: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)

    def take(self, rows: np.ndarray) -> Partition:
        """The places of the records at `rows`, integer positions or a mask."""
        return Partition(self.shard[rows], self.slice[rows], self.token[rows])


def check_ids(ids: Sequence[str] | Sequence[int] | np.ndarray) -> np.ndarray:
    """Returns ids as an array `(N,)` of int64 or of text.

    Raises:
      ValueError: they are neither, or one occurs twice.

    >>> check_ids(["b", "a"])
    array(['b', 'a'], dtype='<U1')
    """
    array = np.asarray(ids)
    if array.dtype == object and all(isinstance(x, str) for x in array.flat):
        array = array.astype(str)
    if array.ndim != 1 or array.dtype.kind not in "iuU":
        raise ValueError(
            f"ids must be integers or text of shape (N,), found {array.dtype} {array.shape}"
        )
    if array.dtype.kind in "iu":
        if array.dtype.kind == "u" and len(array) and array.max() > np.iinfo(np.int64).max:
            raise ValueError(f"ids must be below 2**63, found {array.max()}")
        array = array.astype(np.int64)
    unique, counts = np.unique(array, return_counts=True)
    if len(unique) < len(array):
        twice = unique[counts > 1]
        raise ValueError(f"ids must be unique; {len(twice)} occur more than once: {some(twice)}")
    return array


def assign(
    ids: np.ndarray, config: SisaConfig, key: bytes, probability: np.ndarray | None = None
) -> Partition:
    """Gives every record its place.

    Args:
      ids: `(N,)` from `check_ids`. The integer 7 and the text "7" are two ids.
      config: shards, slices and groups.
      key: 16 to 64 bytes, of this ensemble alone. Whoever knows it can tell an id's shard.
      probability: float `(N,)`, of deletion, in [0, 1], where the configuration has groups. A
        record's shard depends on its own alone.

    Raises:
      ValueError: the key is too short or long; `probability` is missing, superfluous, or not in
        [0, 1].

    >>> places = assign(check_ids(range(6)), SisaConfig(shards=3, slices=2), key=bytes(16))
    >>> places.shard, places.slice
    (array([1, 2, 0, 0, 2, 0], dtype=int32), array([1, 1, 0, 1, 1, 0], dtype=int32))
    """
    if not 16 <= len(key) <= 64:
        raise ValueError(f"key must have 16 to 64 bytes, found {len(key)}")
    if (probability is None) != (not config.groups):
        raise ValueError("probability goes with groups in the configuration: give both or neither")
    hashes = _hashes(ids, key)
    first, count = np.zeros(len(ids), np.int32), np.full(len(ids), config.shards, np.uint64)
    if probability is not None:
        probability = np.asarray(probability, np.float64)
        good = (probability >= 0) & (probability <= 1)
        if probability.shape != ids.shape or not good.all():
            raise ValueError(
                f"probability must be in [0, 1], of shape {ids.shape}, found shape "
                f"{probability.shape} and {some(probability[~good])}"
            )
        bounds, counts = zip(*config.groups, strict=True)
        group = np.searchsorted(bounds, probability)
        first = (np.cumsum(counts) - counts).astype(np.int32)[group]
        count = np.asarray(counts, np.uint64)[group]
    shard = first + _scaled(hashes[:, 0], count).astype(np.int32)
    slices = np.full(len(ids), config.slices, np.uint64)
    return Partition(shard, _scaled(hashes[:, 1], slices).astype(np.int32), hashes[:, 2])


def check_capacity(places: Partition, config: SisaConfig, may_be_empty: bool = False) -> None:
    """Checks that no slice has too many records and, unless it may be, no shard too few.

    Raises:
      ValueError: the message names the first such place and what would do.
    """
    places_of = places.shard * config.slices + places.slice
    counts = np.bincount(places_of, minlength=config.shards * config.slices)
    counts = counts.reshape(config.shards, config.slices)
    if counts.max() > config.capacity:
        shard, slice_ = np.unravel_index(counts.argmax(), counts.shape)
        raise ValueError(
            f"slice {slice_} of shard {shard} has {counts.max()} records, more than the capacity "
            f"of {config.capacity}"
        )
    if may_be_empty:
        return
    totals = counts.sum(axis=1)
    empty = np.flatnonzero(totals == 0)
    if len(empty):
        raise ValueError(
            f"shard {some(empty)} of {config.shards} is empty: {len(places)} records are too few "
            "for so many shards"
        )
    if totals.min() < config.slices:
        raise ValueError(
            f"shard {totals.argmin()} has {totals.min()} records, fewer than its "
            f"{config.slices} slices: take fewer slices or shards"
        )


def capacity_for(count: int, config: SisaConfig) -> int:
    """Returns a capacity of slices that `count` records exceed less than once in 10^6 times.

    It is for whoever makes a configuration; from then on it is fixed. With groups, whose shares
    differ, count the records of the largest group and its shards.

    >>> capacity_for(4000, SisaConfig(shards=5, slices=4))
    288
    """
    mean = count / (config.shards * config.slices)
    # Chernoff: P(X ≥ mean + t) ≤ exp(-t² / (2 mean + 2 t / 3)), for each of the places.
    log = np.log(1e6 * config.shards * config.slices)
    slack = log / 3 + np.sqrt((log / 3) ** 2 + 2 * mean * log)
    return int(-(-min(mean + slack, count) // 8) * 8)


def epochs_of_slices(epochs: int, slices: int) -> list[int]:
    """Passes that each stage of training makes over the slices so far (Bourtoule et al., V-B).

    All stages together have 2 R / (R + 1) · e0 passes, rounded, so that a shard's network sees as
    many records as in e0 passes over the whole shard.

    >>> epochs_of_slices(10, 4)
    [4, 4, 4, 4]
    >>> epochs_of_slices(10, 1)
    [10]
    """
    ends = [round(2 * epochs * r / (slices + 1)) for r in range(slices + 1)]
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def batches(
    tokens: np.ndarray, rows: np.ndarray, stage: int, epochs: int, batch_size: int
) -> np.ndarray:
    """The batches of one stage of one shard's training.

    Every epoch has an order of its own, by a hash of each record's token, the stage and the epoch.

    Args:
      tokens: uint64 `(n,)` of the records of the slices so far.
      rows: int32 `(n,)`, what to write for each.
      stage: number of the slice that is new.
      epochs: passes over the records.
      batch_size: B.

    Returns:
      int32 `(epochs · ⌈n / B⌉, B)`; the last batch of an epoch is filled up with -1.
    """
    steps = -(-len(rows) // batch_size)
    out = np.full((epochs, steps * batch_size), -1, np.int32)
    salts = _mix(np.arange(epochs, dtype=np.uint64) | np.uint64(stage << 32))
    keys = _mix(tokens[None] ^ salts[:, None])
    out[:, : len(rows)] = rows[np.argsort(keys, axis=1, kind="stable")]
    return out.reshape(epochs * steps, batch_size)


def some(values: np.ndarray, most: int = 5) -> str:
    """The first few values in words.

    >>> some(np.arange(9))
    '0, 1, 2, 3, 4 and 4 more'
    """
    rest = len(values) - most
    return ", ".join(map(str, values[:most])) + (f" and {rest} more" if rest > 0 else "")


def _hashes(ids: np.ndarray, key: bytes) -> np.ndarray:
    """Three independent uint64 for each id, `(N, 3)`."""
    tag = b"i" if ids.dtype.kind == "i" else b"s"
    keyed = hashlib.blake2b(tag, key=key, digest_size=24)
    digests = bytearray()
    for value in ids.tolist():
        one = keyed.copy()
        one.update(str(value).encode())
        digests += one.digest()
    return np.frombuffer(digests, "<u8").reshape(-1, 3).astype(np.uint64)


def _scaled(hashes: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Maps uniform 64-bit hashes to 0..count-1, with a bias below count / 2^32."""
    return (hashes >> np.uint64(32)) * count >> np.uint64(32)


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose every output bit depends on every input bit (SplitMix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
