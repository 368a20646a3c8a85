"""What a ledger can be asked, and the tables that it answers from."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable
from datetime import datetime
from operator import index

import numpy as np

from unlearn.requests import Request, State, id_bytes, id_of
from unlearn.sqlite_file import SqliteFile, explained

TABLES = """
CREATE TABLE ledger (run TEXT NOT NULL, key BLOB NOT NULL);
CREATE TABLE requests (number INTEGER PRIMARY KEY, who TEXT NOT NULL, state TEXT NOT NULL,
    requested TEXT NOT NULL, tombstoned TEXT, retrained TEXT, purged TEXT, attested TEXT,
    salt_due TEXT, salt_destroyed TEXT);
CREATE INDEX by_state ON requests (state);
CREATE TABLE hmacs (request INTEGER REFERENCES requests, position INTEGER, hmac BLOB NOT NULL,
    PRIMARY KEY (request, position)) WITHOUT ROWID;
CREATE TABLE ids (request INTEGER REFERENCES requests, position INTEGER, id BLOB NOT NULL,
    PRIMARY KEY (request, position)) WITHOUT ROWID;
CREATE TABLE marks (request INTEGER REFERENCES requests, position INTEGER, mark BLOB NOT NULL,
    PRIMARY KEY (request, position)) WITHOUT ROWID;
CREATE TABLE salts (request INTEGER PRIMARY KEY REFERENCES requests, salt BLOB NOT NULL);
CREATE TABLE models (request INTEGER REFERENCES requests, shard INTEGER, before TEXT NOT NULL,
    after TEXT, PRIMARY KEY (request, shard)) WITHOUT ROWID;
CREATE TABLE heads (shard INTEGER PRIMARY KEY, model TEXT NOT NULL);
"""


class LedgerView(SqliteFile):
    """The questions to a ledger; see `unlearn.ledger.Ledger`."""

    def requests(self) -> list[Request]:
        """All requests, in order."""
        return self._requests("1")

    def pending(self) -> list[Request]:
        """Those not attested yet, in order."""
        return self._requests("state <> 'attested'")

    def get(self, number: int) -> Request:
        """One request.

        Raises:
          ValueError: there is no such number.
        """
        found = self._requests("number = ?", index(number))
        if not found:
            raise ValueError(self._unknown(number))
        return found[0]

    def ids(self, number: int) -> list[str | int]:
        """The ids of a request, in order, of their own types; none once purging has begun.

        Raises:
          ValueError: there is no such number.
        """
        with self._transaction("DEFERRED"):
            if not 1 <= index(number) <= self._count():
                raise ValueError(self._unknown(number))
            query = "SELECT id FROM ids WHERE request = ? ORDER BY position"
            rows = self._db.execute(query, (index(number),)).fetchall()
        return [id_of(data) for (data,) in rows]

    def closed_shards(self) -> set[int]:
        """Shards that must not serve: those of tombstoned requests."""
        query = (
            "SELECT DISTINCT shard FROM models JOIN requests ON number = request "
            "WHERE state = 'tombstoned'"
        )
        with explained(self.path):
            return {shard for (shard,) in self._db.execute(query)}

    def match(self, ids: np.ndarray | Iterable[str | int]) -> np.ndarray:
        """Which ids are under a tombstone whose salt exists, as in data from a backup.

        Args:
          ids: N of them, text or 64-bit integers.

        Returns:
          bool `(N,)`.

        Raises:
          ValueError: an id is neither.
        """
        query = (
            "SELECT mark FROM marks JOIN requests ON number = request WHERE state <> 'requested'"
        )
        with self._transaction("DEFERRED"):
            mark = self._marker()
            marks = {found for (found,) in self._db.execute(query)}
        values = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
        return np.fromiter((mark(id_bytes(v)) in marks for v in values), bool, len(values))

    def head(self) -> dict[int, str]:
        """SHA-256, hexadecimal, of the newest model of each shard that the ledger heard of.

        Weights on disk with another hash are old ones, from a backup perhaps, even where no salt is
        left by which `match` could tell.
        """
        with explained(self.path):
            return dict(self._db.execute("SELECT shard, model FROM heads ORDER BY shard"))

    def _count(self) -> int:
        return self._value("SELECT ifnull(max(number), 0) FROM requests")

    def _unknown(self, number: int) -> str:
        return f"there is no request {number}; there are {self._count()}"

    def _marker(self) -> Callable[[bytes], bytes]:
        """What makes the mark of an id: a keyed BLAKE2b of 128 bits."""
        keyed = hashlib.blake2b(key=self._value("SELECT key FROM ledger"), digest_size=16)

        def mark(id_: bytes) -> bytes:
            one = keyed.copy()
            one.update(id_)
            return one.digest()

        return mark

    def _requests(self, where: str, *values: int) -> list[Request]:
        inner = f"(SELECT number FROM requests WHERE {where})"
        hmacs: dict[int, list[str]] = defaultdict(list)
        before: dict[int, dict[int, str]] = defaultdict(dict)
        after: dict[int, dict[int, str]] = defaultdict(dict)
        with self._transaction("DEFERRED"):
            query = f"SELECT request, hmac FROM hmacs WHERE request IN {inner} ORDER BY 1, position"
            for number, code in self._db.execute(query, values):
                hmacs[number].append(code.hex())
            query = f"SELECT * FROM models WHERE request IN {inner} ORDER BY request, shard"
            for number, shard, old, new in self._db.execute(query, values):
                before[number][shard] = old
                if new is not None:
                    after[number][shard] = new
            query = f"SELECT * FROM requests WHERE {where} ORDER BY number"
            rows = self._db.execute(query, values).fetchall()
        found = []
        for number, who, state, *stamps in rows:
            *times, due, destroyed = (s and datetime.fromisoformat(s) for s in stamps)
            times = {state: at for state, at in zip(State, times, strict=True) if at}
            lists = tuple(hmacs[number]), before[number], after[number]
            found.append(Request(number, who, State(state), times, *lists, due, destroyed))
        return found
