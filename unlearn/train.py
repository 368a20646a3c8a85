"""Training of a run, and forgetting: the order of steps that no kill can break."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

import numpy as np

from fourfold.runtime.hardware import hardware
from fourfold.runtime.progress import Progress
from unlearn import certificate, data
from unlearn.config import RunConfig
from unlearn.ledger import Ledger, Request, State
from unlearn.run import Run
from unlearn.trainer import Records, first_slices


def train(
    config: RunConfig,
    out: str | os.PathLike[str],
    *,
    resume: bool = False,
    num_devices: int | None = None,
    quiet: bool = False,
) -> Run:
    """Trains an ensemble, or goes on with it.

    Args:
      config: of the run.
      out: its folder.
      resume: go on with what was killed; the configuration in the folder is taken.
      num_devices: devices that share the shards; None for all.
      quiet: no progress on the terminal.

    Raises:
      FileExistsError: the folder exists, and this is not to resume.
      FileNotFoundError: there is nothing to resume, or no data.
      ValueError: the data are not as `data.load` wants them, or don't fit the configuration.
    """
    if resume:
        run = Run(out)
    else:
        run = Run.create(out, config, data.load(config.data))
    with run.ledger() as ledger, ledger.exclusive():
        start = {s: 0 for s, shard in enumerate(run.shards) if shard.hash is None}
        _retrain(run, run.placed(), start, num_devices, quiet)
        if not ledger.head():
            ledger.trained({s: _hash(run, s) for s in range(len(run.shards))})
    return run


def forget(
    run: Run,
    ids: Any,
    who: str,
    *,
    wait_seconds: float = 0.0,
    num_devices: int | None = None,
    quiet: bool = False,
) -> list[Request]:
    """Removes records from a run, for good.

    Earlier requests that were interrupted are ended first.

    Args:
      run: the ensemble.
      ids: of the records; an id that is given twice counts once. None at all just ends what was
        interrupted.
      who: asks.
      wait_seconds: how long to wait for another process that forgets.
      num_devices: devices that share the retraining; None for all.
      quiet: no progress on the terminal.

    Returns:
      The requests that were ended, attested, in order.

    Raises:
      ValueError: an id is not in the run, by number or type; nothing was changed then.
      TimeoutError: another process is forgetting.
    """
    with run.ledger() as ledger, ledger.exclusive(wait_seconds):
        wanted = run.known(ids)
        done = _finish(run, ledger, num_devices, quiet)
        if len(wanted):
            ledger.request([(wanted.tolist(), who)])
            done += _finish(run, ledger, num_devices, quiet)
        return done


def _finish(run: Run, ledger: Ledger, num_devices: int | None, quiet: bool) -> list[Request]:
    """Takes every pending request to its end; after a kill anywhere, the next call goes on."""
    _repair(run, ledger, num_devices, quiet)
    pending = ledger.pending()
    numbers = {state: [r.number for r in pending if r.state is state] for state in State}
    ids, new = run.table().ids, numbers[State.REQUESTED]
    closed = new + numbers[State.TOMBSTONED]
    records = run.placed() if closed else None
    if records and new:
        shard = records.places.shard
        shards = {n: set(shard[_asked(ledger, [n], ids)].tolist()) for n in new}
        affected = {shard for found in shards.values() for shard in found}
        ledger.tombstone(shards, {shard: _hash(run, shard) for shard in affected})
    if records:
        gone = _asked(ledger, closed, ids)
        start, head = first_slices(records.places, gone), ledger.head()
        # A state that is not on record may be from a backup, and its slices, too, have seen more.
        start |= {s: 0 for s in start if run.shards[s].hash != head[s]}
        _retrain(run, records.take(~gone), start, num_devices, quiet)
        affected = {shard for n in closed for shard in ledger.get(n).before}
        ledger.retrained(closed, {shard: _hash(run, shard) for shard in affected})
    purge = closed + numbers[State.RETRAINED]
    if purge:
        run.records.drop(_asked(ledger, purge, ids))
        run.purge()
        ledger.purged(purge)
    attest = purge + numbers[State.PURGED]
    now, days = datetime.now(UTC), run.config.backup_days
    if attest:
        ledger.attest(attest, now + timedelta(days=days) if days else None)
    ledger.expire(now)
    for request in ledger.requests():
        facts = {"run": run.fingerprint, "hardware": hardware()}
        if request.state is State.ATTESTED and not run.certificate(request.number).exists():
            certificate.write(run.certificate(request.number).parent, request, facts)
    return [ledger.get(request.number) for request in pending]


def _repair(run: Run, ledger: Ledger, num_devices: int | None, quiet: bool) -> None:
    """Forgets again what a backup brought back.

    Raises:
      ValueError: a shard trained on the records that are there is not the one on record: forgotten
        records have come back whose salts are gone, or the software is another.
    """
    ids = run.table().ids
    open_ = [request.number for request in ledger.pending()]
    back = ledger.match(ids) & ~_asked(ledger, open_, ids)
    closed, head = ledger.closed_shards(), ledger.head()
    stale = {s: 0 for s, newest in head.items() if s not in closed and _hash(run, s) != newest}
    if stale:
        left = run.placed().take(~back)
        _retrain(run, left, stale, num_devices, quiet, {s: head[s] for s in stale})
    run.records.drop(back)
    run.purge()


def _asked(ledger: Ledger, numbers: list[int], ids: np.ndarray) -> np.ndarray:
    """Which ids any of some requests names, bool `(N,)`."""
    wanted = [id_ for number in numbers for id_ in ledger.ids(number)]
    return np.isin(ids, np.asarray(wanted)) if wanted else np.zeros(len(ids), bool)


def _hash(run: Run, shard: int) -> str:
    found = run.shards[shard].hash
    if found is None:
        raise ValueError(
            f"shard {shard} of {run.path} was not trained to its end: unlearn train --out "
            f"{run.path} --resume"
        )
    return found


def _retrain(
    run: Run,
    records: Records,
    start: dict[int, int],
    num_devices: int | None,
    quiet: bool,
    expected: Mapping[int, str] = MappingProxyType({}),
) -> None:
    """Trains shards on the records that are left, and makes the new states current.

    What an earlier attempt for the very same records came to is taken up where it ended; only those
    shards are trained in any case of which it is known what they have to come to.
    """
    config = run.config.sisa
    purposes, begin = {}, {}
    for shard, first in sorted(start.items()):
        mine = records.places.shard == shard
        tokens = np.sort(records.places.token[mine])
        purpose = hashlib.sha256(run.fingerprint.encode() + tokens.tobytes()).hexdigest()
        if run.shards[shard].purpose == purpose and shard not in expected:
            continue  # it was published, and the kill came after
        purposes[shard] = first
        begin[shard] = max(first, run.shards[shard].begin(purpose))
    like = run.like

    def load(shard: int, slice_: int) -> Any:
        draft = slice_ > purposes[shard]
        return run.shards[shard].load(slice_ - 1, like, draft=draft)

    def publish(shard: int) -> None:
        run.shards[shard].publish(config.slices, purposes[shard], like, expected.get(shard))

    work = {shard: first for shard, first in begin.items() if first < config.slices}
    for shard in begin.keys() - work.keys():
        publish(shard)
    if not work:
        return
    trainer = run.trainer(num_devices)
    bar = Progress(trainer.updates(records, work), "updates", quiet=quiet)
    try:
        for shard, slice_, state in trainer.fit(
            records, work, load, lambda done: bar.update(done, {"shards": len(work)})
        ):
            run.shards[shard].save(slice_, state)
            if slice_ == config.slices - 1:
                publish(shard)
    finally:
        bar.close()
