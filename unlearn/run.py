"""An ensemble in a folder: what it is made of, and what of it may serve."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

import jax
import numpy as np

from fourfold.runtime import mesh as meshes
from fourfold.runtime.config_io import from_json
from fourfold.runtime.host_arrays import replacing, write_text
from fourfold.runtime.run_dir import RunDir, to_json
from unlearn import data, models, partition, programs, sisa, store
from unlearn.config import RunConfig
from unlearn.data import Table
from unlearn.ledger import Ledger
from unlearn.partition import Partition
from unlearn.programs import Shape
from unlearn.sisa import Learner, ShardState
from unlearn.store import RecordStore, ShardStore
from unlearn.trainer import Records, Trainer

_SECRET = "secret.json"


class Run:
    """The folder of an ensemble.

    Attributes:
      path: the folder.
      config: its configuration.
      classes: labels `(C,)`, sorted; a record has the position of its own.
      records: ids, x and y, without those that were forgotten.
      shards: states of each shard.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens a folder.

        Raises:
          FileNotFoundError: no ensemble is there; the message lists those beside it.
        """
        folder = RunDir.open(path)
        self.path = folder.path
        self.config = from_json(RunConfig, folder.saved_config())
        if not (self.path / _SECRET).exists():
            raise FileNotFoundError(
                f"{self.path} was never filled: remove the folder and train again"
            )
        secret = json.loads((self.path / _SECRET).read_text())
        self._key = bytes.fromhex(secret["key"])
        self.classes = np.array(secret["classes"])
        self._shape = Shape(tuple(secret["shape"]), "<f4")
        self.records = RecordStore(self.path / "records")
        self.shards = [
            ShardStore(self.path / "shards" / f"{shard:04d}")
            for shard in range(self.config.sisa.shards)
        ]

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: RunConfig, table: Table) -> Run:
        """Makes the folder of a new ensemble, with its records, and trains nothing yet.

        Raises:
          FileExistsError: the folder exists and isn't empty.
          ValueError: the records don't fill the shards, or overfill a slice; or shards are in
            groups.
        """
        if config.sisa.groups:
            raise ValueError(
                "a run in a folder keeps no probabilities of deletion, which groups go by; found "
                f"{config.sisa.groups}"
            )
        if not config.sisa.capacity:
            capacity = partition.capacity_for(len(table.ids), config.sisa)
            config = dataclasses.replace(
                config, sisa=dataclasses.replace(config.sisa, capacity=capacity)
            )
        key = secrets.token_bytes(32)
        places = partition.assign(table.ids, config.sisa, key)
        partition.check_capacity(places, config.sisa)
        classes = np.unique(table.y)
        if len(classes) < 2:
            raise ValueError(f"labels must be of two classes at least, found {classes.tolist()}")
        folder = RunDir.create(path, config)
        labels = np.searchsorted(classes, table.y).astype(np.int32)
        RecordStore(folder.path / "records").write({"ids": table.ids, "x": table.x, "y": labels})
        # Last: a folder without it was never filled.
        secret = {"key": key.hex(), "classes": classes.tolist(), "shape": table.x.shape[1:]}
        with replacing(folder.path / _SECRET) as draft:
            write_text(draft, json.dumps(secret))
            draft.chmod(0o600)
        return cls(path)

    @property
    def fingerprint(self) -> str:
        """A digest of all that the ensemble is made of but the records."""
        parts = [to_json(self.config), self.classes.tolist(), self._key.hex()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @property
    def like(self) -> ShardState:
        """Shapes of a shard's state."""
        init = functools.partial(sisa.init, self.learner())
        return jax.eval_shape(init, jax.random.key(0), self._shape.zeros())

    def learner(self) -> Learner:
        """What is trained."""
        return models.make_learner(
            self.config.sisa.model, self.config.sisa.optim, len(self.classes)
        )

    def trainer(self, num_devices: int | None = None) -> Trainer:
        """What trains it."""
        key, mesh = jax.random.key(self.config.seed), meshes.make_mesh(num_devices)
        return Trainer(self.learner(), self.config.sisa, key, mesh)

    def ledger(self) -> Ledger:
        """Opens the ledger."""
        return Ledger.open(self.path / "ledger.db", self.fingerprint)

    def places(self, ids: np.ndarray) -> Partition:
        """Places of records, there or not."""
        return partition.assign(ids, self.config.sisa, self._key)

    def table(self) -> Table:
        """The records that are left, their labels as positions in `classes`."""
        found = self.records.read()
        return Table(found["ids"], found["x"], found["y"])

    def placed(self) -> Records:
        """The same records with their places."""
        table = self.table()
        return Records(table.x, table.y, self.places(table.ids))

    def certificate(self, number: int) -> Path:
        """Where the certificate of a request is, or will be."""
        return self.path / "certificates" / f"request_{number:06d}.json"

    def purge(self) -> None:
        """Removes all states and records but the current ones."""
        for folder in (self.records.folder, *(shard.folder for shard in self.shards)):
            store.purge(folder)

    def serving(self) -> np.ndarray:
        """Returns which shards may predict, bool `(S,)`.

        A shard may not that has no state, or no records, or is about to be retrained for a request.

        Raises:
          ValueError: a shard's state is not the newest that the ledger knows of, as one restored
            from a backup.
        """
        with self.ledger() as ledger:
            closed, head = ledger.closed_shards(), ledger.head()
        filled = set(self.places(self.table().ids).shard.tolist())
        good = np.zeros(len(self.shards), bool)
        for number, shard in enumerate(self.shards):
            found = shard.hash
            if found is not None and number not in closed and head.get(number, found) != found:
                raise ValueError(
                    f"shard {number} has a state that is not its newest: was {self.path} restored "
                    "from a backup? unlearn forget --resume retrains it"
                )
            good[number] = found is not None and number in filled and number not in closed
        return good

    def status(self) -> dict[str, Any]:
        """Returns what the folder holds, as JSON values; it opens where it may not serve, too."""
        with self.ledger() as ledger:
            requests, closed, head = ledger.requests(), ledger.closed_shards(), ledger.head()
        counts = np.bincount(self.places(self.table().ids).shard, minlength=len(self.shards))
        states = {}
        for number, shard in enumerate(self.shards):
            if shard.hash is None:
                states[number] = "not trained"
            elif number in closed:
                states[number] = "closed until it is retrained"
            elif head.get(number, shard.hash) != shard.hash:
                states[number] = "not the newest: restored from a backup?"
            else:
                states[number] = "serves" if counts[number] else "empty"
        return {
            "run": str(self.path),
            "records": int(counts.sum()),
            "classes": self.classes.tolist(),
            "shards": [
                {"shard": n, "records": int(counts[n]), "state": states[n], "sha256": s.hash}
                for n, s in enumerate(self.shards)
            ],
            "requests": [
                {
                    "request": request.number,
                    "who": request.who,
                    "records": len(request.hmacs),
                    "state": str(request.state),
                    "since": request.times[request.state].isoformat(),
                }
                for request in requests
            ],
        }

    def known(self, ids: Any) -> np.ndarray:
        """Returns ids as an array `(K,)` without repeats.

        Raises:
          ValueError: one is not in the run, by number or by type.
        """
        there = self.table().ids
        wanted = np.asarray(ids)
        if not wanted.size:
            return there[:0]
        if wanted.dtype.kind == "U" and there.dtype.kind == "i":  # as a command line gives them
            numbers = [word for word in wanted.tolist() if not re.fullmatch(r"[+-]?\d+", word)]
            if numbers:
                raise ValueError(
                    f"ids of this run are integers, found {numbers[:5]}; nothing changed"
                )
            wanted = np.array([int(word) for word in wanted.tolist()])
        wanted = partition.check_ids(np.unique(wanted))
        if wanted.dtype.kind != there.dtype.kind:
            kinds = {"i": "integers", "U": "text"}
            raise ValueError(
                f"ids of this run are {kinds[there.dtype.kind]}, found {kinds[wanted.dtype.kind]}: "
                f"{partition.some(wanted)}; nothing was changed"
            )
        unknown = np.setdiff1d(wanted, there)
        if len(unknown):
            raise ValueError(
                f"{len(unknown)} of {len(wanted)} ids are not in this run, or no longer: "
                f"{partition.some(unknown)}; nothing was changed"
            )
        return wanted

    def accuracy(self) -> float | None:
        """Returns the share of test records that are predicted right; None where there are none."""
        test = data.load_test(self.config.data)
        if test is None:
            return None
        return float(np.mean(self.classes[self.predict(test.x).argmax(axis=1)] == test.y))

    def predict(self, x: np.ndarray, batch_size: int = 4096) -> np.ndarray:
        """Returns the ensemble's probabilities, or shares of votes, `(N, C)`.

        Args:
          x: float32 `(N, ...)`, of the shape that the records have.
          batch_size: records at a time.

        Raises:
          ValueError: x has another shape, or no shard may serve; and as `serving` does.
        """
        if x.shape[1:] != self._shape.shape:
            raise ValueError(f"records must have shape {self._shape.shape}, found {x.shape[1:]}")
        serving = self.serving()
        if not serving.any():
            raise ValueError(
                f"no shard of {self.path} may serve: unlearn status --run {self.path} says why"
            )
        last, like = self.config.sisa.slices - 1, self.like
        states = [s.load(last, like) for s, good in zip(self.shards, serving, strict=True) if good]
        stacked: Any = programs.stack(states)
        predict = programs.programs(self.learner(), meshes.make_mesh(1)).predict
        found = []
        for begin in range(0, len(x), batch_size):
            part = x[begin : begin + batch_size]
            filled = np.concatenate([part, self._shape.zeros(batch_size - len(part))])
            probs = sisa.aggregate(predict(stacked, filled), self.config.aggregation)
            found.append(np.asarray(probs)[: len(part)])
        return np.concatenate(found)
