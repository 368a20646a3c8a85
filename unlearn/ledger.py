"""The durable ledger of requests to forget: one SQLite file that in the end can't name a record.

Of an id it keeps, for good, the HMAC under its request's own salt. Three things go on the way: when
purged, the id itself; when attested, or later if backups of the data may yet be restored, the salt
and the id's mark. Marks are hashes under one key of the ledger: by salts alone, `match` would hash
every id once a salt; by marks it hashes each once, however many requests there are.

A state is recorded once it is true: what was deleted is gone from every byte of the file first. A
kill in between leaves the state before.
"""

from __future__ import annotations

import hmac
import os
import secrets
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from operator import index

from unlearn.ledger_view import TABLES, LedgerView
from unlearn.lock import exclusive
from unlearn.requests import Request, State, check_models, check_request, utc_text
from unlearn.sqlite_file import explained

__all__ = ["Ledger", "Request", "State"]


class Ledger(LedgerView):
    """The ledger of one run, from `Ledger.open`; `LedgerView` has the questions to it.

    A step moves many requests from one state to the next, all or none. It raises ValueError where a
    number is unknown or its request in another state than the one before. Any method may raise
    `DiskFullError`, `PermissionError` and, where another process keeps the file, `TimeoutError`.
    `purged`, `attest` and `expire` rewrite the whole file, so give them many requests at once.

    >>> import tempfile
    >>> folder = tempfile.TemporaryDirectory()
    >>> book = Ledger.open(f"{folder.name}/ledger.sqlite", run="fingerprint")
    >>> with book, book.exclusive():
    ...     numbers = book.request([(["a", "b"], "Alice"), ([7], "Bob")])
    ...     book.tombstone({1: [0, 2], 2: [2]}, {0: "0" * 64, 2: "2" * 64})
    ...     print(book.closed_shards(), book.match(["b", "c", 7, "7"]))
    ...     book.retrained(numbers, {0: "a" * 64, 2: "b" * 64})
    ...     book.purged(numbers)
    ...     book.attest(numbers)
    ...     print(book.get(2).state, book.ids(2), book.match([7]))
    {0, 2} [ True False  True False]
    attested [] [False]
    >>> folder.cleanup()
    """

    @classmethod
    def open(cls, path: str | os.PathLike[str], run: str) -> Ledger:
        """Opens a ledger; makes it where there is none.

        Args:
          path: the file, in a folder that exists. `-wal`, `-shm` and `.lock` may stand beside it.
            While this process has it open, it must not read it by other means: by POSIX's rules
            that would drop SQLite's locks.
          run: fingerprint of the configuration that the ledger belongs to.

        Raises:
          ValueError: it belongs to another run, or is no ledger.
          OSError: the file can't be made or written.
        """
        return cls(path, TABLES, run)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def exclusive(self, wait_seconds: float = 0.0) -> Iterator[None]:
        """Holds the right to forget: one process has it at a time, and a dead one no longer.

        It is for the whole of the work, files and all: take it before reading `pending`, hold it
        until `attest`. Other processes may `request` meanwhile.

        Args:
          wait_seconds: how long to wait for another process; may be infinite.

        Raises:
          TimeoutError: the other one is still at it; the message has its pid and since when.
          ValueError: the time is negative or NaN.
        """
        path = self.path.with_name(f"{self.path.name}.lock")
        with ExitStack() as stack:
            with explained(path):  # what comes of taking it, not of what is done with it
                stack.enter_context(exclusive(path, wait_seconds))
            yield

    def request(self, batch: Iterable[tuple[Iterable[str | int], str]]) -> list[int]:
        """Records requests; once it returns, they are on disk.

        Args:
          batch: of each request its ids, text or 64-bit integers (7 and "7" are two), and who asks,
            which is kept and shown for good. An id given twice counts once; several requests may
            name the same.

        Returns:
          The requests' numbers.

        Raises:
          ValueError: a request has no ids, or one that is neither text nor such an integer; or who
            asks is empty or one of the ids. None was recorded.
        """
        new = [check_request(ids, who) for ids, who in batch]
        now = utc_text(datetime.now(UTC))
        with self._transaction():
            first = self._count() + 1
            mark = self._marker()
            rows, salts, hmacs, marks, plain = [], [], [], [], []
            for number, (ids, who) in enumerate(new, first):
                salt = secrets.token_bytes(32)
                rows.append((number, who, State.REQUESTED, now))
                salts.append((number, salt))
                for at, id_ in enumerate(ids):
                    hmacs.append((number, at, hmac.digest(salt, id_, "sha256")))
                    marks.append((number, at, mark(id_)))
                    plain.append((number, at, id_))
            insert = self._db.executemany
            insert("INSERT INTO requests (number, who, state, requested) VALUES (?, ?, ?, ?)", rows)
            insert("INSERT INTO salts VALUES (?, ?)", salts)
            for table, values in (("hmacs", hmacs), ("marks", marks), ("ids", plain)):
                insert(f"INSERT INTO {table} VALUES (?, ?, ?)", values)
        return list(range(first, first + len(new)))

    def tombstone(
        self, shards: Mapping[int, Collection[int]], model_before: Mapping[int, str]
    ) -> None:
        """Closes the shards of requests, until they are retrained.

        Args:
          shards: of each request those that have its records; none where an earlier request
            already removed them all.
          model_before: SHA-256, hexadecimal, of the model of each of these shards.

        Raises:
          ValueError: a model is missing or superfluous; or is another than `head` knows, as one
            from a backup is, of a shard that was not closed yet.
        """
        rows = [(index(n), index(s)) for n, found in shards.items() for s in set(found)]
        models = check_models(model_before, {shard for _, shard in rows})
        with self._transaction():
            self._advance(shards, State.TOMBSTONED)
            head, closed = self.head(), self.closed_shards()
            for shard in set(models) - closed:
                if (newest := head.get(shard, models[shard])) != models[shard]:
                    raise ValueError(
                        f"shard {shard} has the model {models[shard]}, but its newest is {newest}: "
                        "restored from a backup? Retrain it, and say so by `trained`"
                    )
            self._db.executemany("INSERT OR IGNORE INTO heads VALUES (?, ?)", list(models.items()))
            insert = "INSERT INTO models (request, shard, before) VALUES (?, ?, ?)"
            self._db.executemany(insert, [(n, s, models[s]) for n, s in rows])

    def retrained(self, numbers: Iterable[int], model_after: Mapping[int, str]) -> None:
        """Opens the shards of requests again, but for those that another request closes.

        Call it once the new models are on disk and in place of the old.

        Args:
          numbers: of the requests.
          model_after: SHA-256, hexadecimal, of the model of each of their shards.

        Raises:
          ValueError: a model is missing or superfluous.
        """
        with self._transaction():
            numbers = self._advance(numbers, State.RETRAINED)
            select = "SELECT shard FROM models WHERE request = ?"
            rows = [(n, s) for n in numbers for (s,) in self._db.execute(select, (n,))]
            models = check_models(model_after, {shard for _, shard in rows})
            self._db.executemany(
                "UPDATE models SET after = ? WHERE request = ? AND shard = ?",
                [(models[shard], number, shard) for number, shard in rows],
            )
            self._set_heads(models)

    def purged(self, numbers: Iterable[int]) -> None:
        """Deletes the ids of requests from the ledger.

        Call it once the records, and the checkpoints that saw them, are gone from disk.
        """
        with self._transaction():
            numbers = self._check(numbers, State.PURGED)
            self._delete(numbers, "ids")
        self._scrub(numbers)
        with self._transaction():
            self._advance(numbers, State.PURGED)

    def attest(self, numbers: Iterable[int], keep_salt_until: datetime | None = None) -> None:
        """Ends requests, and destroys their salts and marks.

        Args:
          numbers: of the requests.
          keep_salt_until: keep them until then, with a time zone, because until then backups of the
            data may be restored: `match` has to know its records. `expire` destroys them.

        Raises:
          ValueError: the time has no zone or is past.
        """
        until = keep_salt_until
        if until is not None and not (until.tzinfo and until > datetime.now(UTC)):
            raise ValueError(
                f"keep_salt_until must be a time with a zone, in the future, or None, found {until}"
            )
        with self._transaction():
            numbers = self._check(numbers, State.ATTESTED)
            if until is None:
                self._delete(numbers, "salts", "marks")
        self._scrub(numbers)  # also where they are kept: a call that was killed may not have
        with self._transaction():
            self._advance(numbers, State.ATTESTED)
            if until is not None:
                self._stamp(numbers, "salt_due", until)
            self._stamp_destroyed(numbers)

    def expire(self, now: datetime) -> list[int]:
        """Destroys the salts and marks that were kept until `now`, a time with a zone, or before.

        Returns:
          The numbers of their requests.
        """
        with self._transaction():
            due = self._db.execute(
                "SELECT number FROM requests WHERE salt_due <= ? AND salt_destroyed IS NULL "
                "ORDER BY number",
                (utc_text(now),),
            )
            numbers = [number for (number,) in due]
            self._delete(numbers, "salts", "marks")
        self._scrub(numbers)
        with self._transaction():
            self._stamp_destroyed(numbers)
        return numbers

    def trained(self, models: Mapping[int, str]) -> None:
        """Records models that come from no request: first ones, or those of a repaired backup.

        Args:
          models: SHA-256, hexadecimal, by shard.

        Raises:
          ValueError: a shard is closed: `retrained` is what opens it.
        """
        models = check_models(models, set(models))
        with self._transaction():
            if closed := self.closed_shards() & set(models):
                raise ValueError(f"shards {sorted(closed)} are closed, until `retrained`")
            self._set_heads(models)

    # ---- inside ----------------------------------------------------------------------------------

    def _check(self, numbers: Iterable[int], to: State) -> list[int]:
        """The numbers, each once, if all may go to this state."""
        numbers = list(dict.fromkeys(map(index, numbers)))
        order = list(State)
        query = "SELECT state FROM requests WHERE number = ?"
        for number in numbers:
            row = self._db.execute(query, (number,)).fetchone()
            if row is None:
                raise ValueError(self._unknown(number))
            allowed = order[order.index(State(row[0])) + 1 :][:1]
            if to not in allowed:
                may = f"may become {allowed[0]}" if allowed else "stays so"
                raise ValueError(f"request {number} is {row[0]} and {may}, not {to}")
        return numbers

    def _advance(self, numbers: Iterable[int], to: State) -> list[int]:
        numbers = self._check(numbers, to)
        self._db.executemany(
            "UPDATE requests SET state = ? WHERE number = ?", [(to, number) for number in numbers]
        )
        self._stamp(numbers, to, datetime.now(UTC))
        return numbers

    def _stamp(self, numbers: list[int], column: str, at: datetime) -> None:
        query = f"UPDATE requests SET {column} = ? WHERE number = ?"
        self._db.executemany(query, [(utc_text(at), number) for number in numbers])

    def _stamp_destroyed(self, numbers: list[int]) -> None:
        """Notes of those that have no salt any more that it is gone."""
        query = "SELECT count(*) FROM salts WHERE request = ?"
        gone = [n for n in numbers if not self._db.execute(query, (n,)).fetchone()[0]]
        self._stamp(gone, "salt_destroyed", datetime.now(UTC))

    def _delete(self, numbers: list[int], *tables: str) -> None:
        for table in tables:
            rows = [(number,) for number in numbers]
            self._db.executemany(f"DELETE FROM {table} WHERE request = ?", rows)

    def _set_heads(self, models: Mapping[int, str]) -> None:
        self._db.executemany("INSERT OR REPLACE INTO heads VALUES (?, ?)", list(models.items()))
