"""An SQLite file that loses nothing, keeps nothing it deleted, and explains itself.

secure_delete overwrites what is deleted, but not the copies that pages keep when their rows are
shared out anew (about 1 row in 1,000); only rebuilding the file, and cutting its log, does.
"""

from __future__ import annotations

import errno
import os
import secrets
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from fourfold.runtime.host_arrays import DiskFullError, is_disk_full

_APPLICATION, _VERSION = 0x666F7267, 1  # SQLite's application_id and user_version
_BUSY_SECONDS = 30.0  # what a transaction waits for another process's, which takes seconds at most
_ADVICE = "the ledger, its folder and the files beside it must be writable by who runs this"
_SETTINGS = ("synchronous=FULL", "secure_delete=ON", "foreign_keys=ON", "temp_store=MEMORY")


class SqliteFile:
    """A file of one run, with tables; what `unlearn.ledger` stands on.

    Its table `ledger` has one row: the run, and a random key of 32 bytes.
    """

    def __init__(self, path: str | os.PathLike[str], tables: str, run: str) -> None:
        """Opens the file; makes it where there is none.

        Args:
          path: the file.
          tables: statements that make the tables.
          run: that it belongs to.

        Raises:
          ValueError: it belongs to another run, or is no ledger.
          OSError: it can't be made or written.
        """
        path = Path(path).absolute()
        with explained(path):
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "a ledger is a file, this is a folder", path)
            if not path.exists():  # opening one that exists would drop SQLite's locks on it
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            if 0 < path.stat().st_size < 512:  # SQLite would take it for an empty file
                raise ValueError(f"{path} is no ledger, it has {path.stat().st_size} bytes")
            self._db = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None)
        self.path = path
        try:
            self._prepare(tables, run)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Closes the file."""
        self._db.close()

    def _prepare(self, tables: str, run: str) -> None:
        """Recognises the file; makes the tables where it is empty, as a kill may have left it."""
        with explained(self.path):
            for setting in _SETTINGS:
                self._db.execute(f"PRAGMA {setting}")
            if not self._value("SELECT count(*) FROM sqlite_master"):
                self._create(tables, run)
            if self._value("PRAGMA application_id") != _APPLICATION:
                raise ValueError(f"{self.path} is an SQLite file, but no ledger")
            if (version := self._value("PRAGMA user_version")) != _VERSION:
                raise ValueError(f"{self.path} has version {version}, this software {_VERSION}")
            if (found := self._value("SELECT run FROM ledger")) != run:
                raise ValueError(f"{self.path} is the ledger of run {found!r}, not of {run!r}")
            self._log_ahead()
            for suffix in ("", "-wal", "-shm"):  # of a copy, say
                file = Path(f"{self.path}{suffix}")
                if file.exists() and file.stat().st_mode & 0o077:
                    file.chmod(0o600)

    def _create(self, tables: str, run: str) -> None:
        with self._transaction():
            if self._value("SELECT count(*) FROM sqlite_master"):
                return  # another process was faster
            for statement in tables.split(";"):
                self._db.execute(statement)
            self._db.execute("INSERT INTO ledger VALUES (?, ?)", (run, secrets.token_bytes(32)))
            self._db.execute(f"PRAGMA application_id={_APPLICATION}")
            self._db.execute(f"PRAGMA user_version={_VERSION}")

    def _log_ahead(self) -> None:
        """Switches to WAL. SQLite doesn't wait here by itself for another that just does so."""
        end = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                mode = self._value("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:
                if error.sqlite_errorname != "SQLITE_BUSY" or time.monotonic() > end:
                    raise
                time.sleep(0.01)
        if mode != "wal":
            raise OSError(f"{self.path}: the file system allows no WAL, only {mode}")

    @contextmanager
    def _transaction(self, kind: Literal["IMMEDIATE", "DEFERRED"] = "IMMEDIATE") -> Iterator[None]:
        with explained(self.path):
            self._db.execute(f"BEGIN {kind}")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # a full disk may have ended it
                    self._db.execute("ROLLBACK")
                raise

    def _value(self, query: str) -> Any:
        return self._db.execute(query).fetchone()[0]

    def _scrub(self, numbers: list[int]) -> None:
        """Leaves no byte of what was deleted in the file or its log.

        It is done even where nothing was deleted just now: a kill may have come in between.
        """
        if not numbers:
            return
        with explained(self.path):
            self._db.execute("VACUUM")
            if self._value("PRAGMA wal_checkpoint(TRUNCATE)"):
                raise TimeoutError(f"{self.path}: another process reads on; try again once it ends")


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Says in Python's own exceptions, and with advice, what SQLite and the system report."""
    try:
        yield
    except sqlite3.Error as error:
        name = getattr(error, "sqlite_errorname", "")
        if name == "SQLITE_FULL" or is_disk_full(error):
            raise DiskFullError(f"{path}: no room on disk; no request changed its state") from error
        if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_PERM")):
            raise OSError(errno.EACCES, f"{error}; {_ADVICE}", str(path)) from error
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise TimeoutError(f"{path} is busy in another process; try again") from error
        if name.startswith(("SQLITE_NOTADB", "SQLITE_CORRUPT")):
            raise ValueError(f"{path} is no ledger, or a damaged one: {error}") from error
        raise
    except OSError as error:
        if is_disk_full(error) and not isinstance(error, DiskFullError):
            raise DiskFullError(f"{path}: no room on disk; no request changed its state") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and _ADVICE not in str(error):
            raise OSError(error.errno, f"{error.strerror}; {_ADVICE}", str(path)) from error
        raise
