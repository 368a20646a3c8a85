"""What forgetting costs a sharded and sliced ensemble, and how many shards and slices pay.

Bourtoule et al., Machine Unlearning (S&P 2021), section V. Costs are record visits: one record in
one epoch of one network. Records come to shards and slices independently and uniformly, as by a
keyed hash; requests are for K different records, all equally likely. `stages` are the epochs of
the R stages of a shard's training, of which stage t visits the first t slices; by default there
are no slices and one epoch, so that visits are points.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


def slice_epochs(epochs: float, slices: int) -> tuple[float, ...]:
    """Epochs of the stages, 2 e0 / (R + 1) each, so that they visit as much as e0 without slices.

    Training rounds them to whole numbers: give `partition.epochs_of_slices` for `stages` where the
    cost of those is wanted.

    >>> slice_epochs(10, 4)
    (4.0, 4.0, 4.0, 4.0)
    """
    return (2 * epochs / (slices + 1),) * slices


def restart_cost(records: float, first: int, stages: Sequence[float]) -> float:
    """Visits of a shard's training from slice `first` = 0..R-1 on, with `records` left in it.

    From the last slice on it is 2 / (R + 1) of the whole:

    >>> restart_cost(100, 0, slice_epochs(10, 4)), restart_cost(100, 3, slice_epochs(10, 4))
    (1000.0, 400.0)
    """
    if not 0 <= first < len(stages):
        raise ValueError(f"first must be in 0..{len(stages) - 1}, found {first}")
    epochs, share = _stages(stages)
    return records * float(np.sum((epochs * share)[first:]))


def expected_cost(
    records: int, shards: int, requests: int, stages: Sequence[float] = (1.0,), *, batch: bool
) -> float:
    """Expected visits to serve all requests; exact.

    One by one: request i leaves N - i records, each in the deleted one's shard with probability
    1 / S, and visited in stage t if neither is in a later slice, with (t / R)². In all
    Σ_t e_t (t / R)² · Σ_i (N - i) / S, where the first sum is e0 (2 / 3 + 1 / (3 R)) for
    `slice_epochs`: slices alone gain 1.5 × at most.

    As a batch: a shard restarts at the earliest slice that lost a record. Each of N - K records is
    visited in stage t if its slice is none later, and one of the K was in these slices of its
    shard: (N - K) Σ_t e_t (t / R) (1 - (1 - t / (R S))^K).

    Args:
      records: N.
      shards: S.
      requests: K, in 0..N.
      stages: epochs `(R,)`.
      batch: whether the requests are served together rather than one by one.

    Raises:
      ValueError: a number out of range.

    The paper measures 4.63, 2.45 and 1.36 times less than retraining, with S = 20 and R = 50, for
    8 requests (Purchase), 18 (SVHN) and 39 (ImageNet):

    >>> cost = [expected_cost(10**6, 20, k, slice_epochs(1, 50), batch=True) for k in (8, 18, 39)]
    >>> [round(10**6 / c, 2) for c in cost]
    [4.23, 2.24, 1.42]
    """
    _check(records, shards, requests)
    epochs, share = _stages(stages)
    if not batch:
        return float(np.sum(epochs * share**2)) * _left(records, requests) / shards
    hit = 1 - (1 - share / shards) ** requests
    return (records - requests) * float(np.sum(epochs * share * hit))


def paper_cost(records: int, shards: int, requests: int, *, batch: bool) -> float:
    """The paper's expected points, for shards of N / S and no slices.

    One by one, (N / S + 1 / (2 S) - 1) K - K² / (2 S): every shard is as likely to be hit next,
    whatever it has lost. As a batch, N (1 - (1 - 1 / S)^K) - K: deletions are independent. The
    exact cost with a hash is higher by K (1 - 1 / S) and K (1 - 1 / S)^K, for requests meet large
    shards more often: little, unless shards have few records. Arguments as `expected_cost`.
    """
    _check(records, shards, requests)
    if batch:
        return records * (1 - (1 - 1 / shards) ** requests) - requests
    return (records / shards + 1 / (2 * shards) - 1) * requests - requests**2 / (2 * shards)


def retraining_cost(records: int, requests: int, epochs: float = 1.0, *, batch: bool) -> float:
    """Visits of one network, trained anew on what is left, once (batch) or after each request."""
    _check(records, 1, requests)
    return epochs * (records - requests if batch else _left(records, requests))


def simulate(
    rng: np.random.Generator,
    records: int,
    shards: int,
    requests: int,
    stages: Sequence[float] = (1.0,),
    *,
    batch: bool,
    trials: int = 1000,
) -> np.ndarray:
    """Draws visits, float64 `(trials,)`: every trial has its own partition and requests.

    Shards shrink with every request and restart at the slice that was hit. Arguments and errors
    as `expected_cost`.

    >>> visits = simulate(np.random.default_rng(0), 1000, 10, 4, batch=True)
    >>> bool(abs(visits.mean() - expected_cost(1000, 10, 4, batch=True)) < visits.std() / 10)
    True
    """
    _check(records, shards, requests)
    epochs, _ = _stages(stages)
    slices = len(epochs)

    def visits(counts: np.ndarray, first: np.ndarray) -> np.ndarray:
        """Of shards `(T, s, R)` that restart at slices `(T, s)`."""
        stage_visits = epochs * np.cumsum(counts, axis=-1)
        return np.sum(stage_visits * (np.arange(slices) >= first[..., None]), axis=(1, 2))

    cells = shards * slices
    counts = rng.multinomial(records, np.full(cells, 1 / cells), size=trials)
    by_shard = counts.reshape(trials, shards, slices)  # a view
    earliest = np.full((trials, shards), slices)  # past the last: no restart
    trial, cost = np.arange(trials), np.zeros(trials)
    for left in range(records, records - requests, -1):
        record = rng.integers(left, size=(trials, 1))
        cell = np.sum(np.cumsum(counts, axis=1) <= record, axis=1)
        counts[trial, cell] -= 1
        shard, slice_ = np.divmod(cell, slices)
        earliest[trial, shard] = np.minimum(earliest[trial, shard], slice_)
        if not batch:
            cost += visits(by_shard[trial, shard][:, None], slice_[:, None])
    return visits(by_shard, earliest) if batch else cost


def distribution_aware_shards(probabilities: ArrayLike, limit: float) -> np.ndarray:
    """Gathers records that are likely to be deleted in small shards (section VI of the paper).

    From the least probable record on, a shard is filled until one more would bring its expected
    number of requests to the limit; a record that reaches it alone is alone. Unlike a hash's, one
    record's place depends on all others.

    Args:
      probabilities: `(N,)`, of each record's deletion, in [0, 1].
      limit: expected requests of a shard, above 0.

    Returns:
      int32 `(N,)`, each record's shard, 0 for the least probable; `np.bincount` has the sizes.

    Raises:
      ValueError: a number out of range.

    >>> distribution_aware_shards([0.5, 0.1, 0.1, 0.5, 0.1], limit=0.6)
    array([1, 0, 0, 2, 0], dtype=int32)
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 1 or not p.size or not np.all((p >= 0) & (p <= 1)):
        raise ValueError(f"probabilities must be (N,) in [0, 1], found shape {p.shape} with {p}")
    if not limit > 0:
        raise ValueError(f"limit must be above 0, found {limit}")
    order = np.argsort(p, kind="stable")
    total = np.concatenate([[0.0], np.cumsum(p[order])])
    shard = np.zeros(p.size, np.int32)
    start = count = 0
    while start < p.size:
        below = int(np.searchsorted(total, total[start] + limit)) - 1  # end of a sum below it
        stop = max(below, start + 1)
        shard[order[start:stop]] = count
        start, count = stop, count + 1
    return shard


@dataclass(frozen=True)
class Plan:
    """An ensemble of S shards with R slices for an expected load.

    Attributes:
      shards: S.
      slices: R.
      checkpoints: S R, to store.
      cost: expected visits for all requests.
      baseline: visits of one network that is retrained whenever the ensemble would be.
      warnings: sentences on why it may not pay.
    """

    shards: int
    slices: int
    checkpoints: int
    cost: float
    baseline: float
    warnings: tuple[str, ...]

    @property
    def speed_up(self) -> float:
        """Baseline over cost."""
        return self.baseline / self.cost


def plan(
    records: int, requests: int, shards: int, slices: int, *, epochs: float, batch: bool
) -> Plan:
    """Judges a choice of shards and slices, S R at most N, for K < N requests.

    `epochs` are e0, those that training without slices takes; else as `expected_cost`.

    >>> plan(60_000, 90, 30, 4, epochs=10, batch=True).warnings[0]
    '90 requests at once are at least 3 S = 90: 95 % of the records are in a shard that is hit.'
    """
    if not 0 < requests < records:
        raise ValueError(f"requests must be in 1..{records - 1}, found {requests}")
    if min(shards, slices) < 1 or shards * slices > records:
        raise ValueError(
            f"shards and slices must be at least 1 and at most {records} in all, one record each: "
            f"found {shards} × {slices}"
        )
    if not epochs > 0:
        raise ValueError(f"epochs must be above 0, found {epochs}")
    cost = expected_cost(records, shards, requests, slice_epochs(epochs, slices), batch=batch)
    once = retraining_cost(records, requests, epochs, batch=True)
    share = 100 * (1 - (1 - 1 / shards) ** requests)
    hit = f"{share:.0f} % of the records are in a shard that is hit."
    warnings = []
    if batch and requests >= 3 * shards:
        warnings.append(f"{requests} requests at once are at least 3 S = {3 * shards}: {hit}")
    elif batch and requests >= shards:
        warnings.append(f"{shards} shards are few for {requests} requests at once: {hit}")
    elif not batch and cost >= once:
        warnings.append(
            f"{requests} requests one by one cost {cost / once:.1f} times what it takes to retrain "
            "one network after the last of them."
        )
    if slices > 2 * epochs - 1:
        warnings.append(
            f"{slices} slices are more than 2 e0 - 1 = {2 * epochs - 1:g}: some get no epoch."
        )
    if shards > 20:
        warnings.append(f"{shards} shards: beyond 20, the paper loses over 5 points of accuracy.")
    baseline = retraining_cost(records, requests, epochs, batch=batch)
    return Plan(shards, slices, shards * slices, cost, baseline, tuple(warnings))


def recommend(
    records: int,
    requests: int,
    *,
    epochs: int,
    batch: bool,
    checkpoints: int,
    most_shards: int = 20,
) -> Plan:
    """Returns the cheapest plan within limits; of equal ones, that with fewest checkpoints.

    Costs know nothing of accuracy, which falls with S: a network learns from N / S records.

    Args:
      records: N.
      requests: K, below N.
      epochs: e0; slices are 2 e0 - 1 at most, so that each has an epoch.
      batch: whether the requests are served together rather than one by one.
      checkpoints: most that can be stored, S R.
      most_shards: most shards.

    Raises:
      ValueError: a number out of range.

    >>> best = recommend(60_000, 8, epochs=10, batch=True, checkpoints=100)
    >>> best.shards, best.slices, round(best.speed_up, 2), best.warnings
    (20, 5, 3.92, ())
    """
    if min(epochs, checkpoints, most_shards) < 1:
        raise ValueError(
            "epochs, checkpoints and most_shards must be at least 1, found "
            f"{epochs}, {checkpoints} and {most_shards}"
        )
    plans = [
        plan(records, requests, shards, slices, epochs=epochs, batch=batch)
        for shards in range(1, min(most_shards, checkpoints, records) + 1)
        for slices in range(1, min(2 * epochs - 1, checkpoints // shards, records // shards) + 1)
    ]
    return min(plans, key=lambda plan: (plan.cost, plan.checkpoints))


def _stages(stages: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Epochs of the stages, and the share of a shard's records that each visits; `(R,)` both."""
    if len(stages) == 0:
        raise ValueError("stages must be the epochs of one slice at least, found none")
    return np.asarray(stages, np.float64), np.arange(1, len(stages) + 1) / len(stages)


def _left(records: int, requests: int) -> float:
    """Σ (N - i) over requests i = 1..K."""
    return records * requests - requests * (requests + 1) / 2


def _check(records: int, shards: int, requests: int) -> None:
    if min(records, shards) < 1 or not 0 <= requests <= records:
        raise ValueError(
            "records and shards must be at least 1 and requests in 0..records, found "
            f"{records} records, {shards} shards, {requests} requests"
        )
