"""A right that one process has at a time; the system takes it from one that died."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from unlearn.requests import utc_text


@contextmanager
def exclusive(path: Path, wait_seconds: float) -> Iterator[None]:
    """Holds an exclusive lock on a file, made if it isn't there, that says whose it is.

    Args:
      path: of the lock file.
      wait_seconds: how long to wait for another process; may be infinite.

    Raises:
      TimeoutError: the other one still has it; the message has its pid and since when.
      ValueError: the time is negative or NaN.
      OSError: the file can't be written.
    """
    if not wait_seconds >= 0:
        raise ValueError(f"wait_seconds must be at least 0, found {wait_seconds}")
    number = _locked(path, wait_seconds)
    try:
        yield
    finally:
        os.ftruncate(number, 0)
        fcntl.flock(number, fcntl.LOCK_UN)  # closing alone would leave it to a forked child
        os.close(number)


def _locked(path: Path, wait_seconds: float) -> int:
    """The number of the open lock file once it is ours; it says whose it is."""
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    end = time.monotonic() + wait_seconds
    try:
        while True:
            try:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= end:
                    holder = os.pread(number, 100, 0).decode() or "another process"
                    raise TimeoutError(f"{path} is held by {holder}; wait for it to end") from None
                time.sleep(0.05)
        os.ftruncate(number, 0)
        os.pwrite(number, f"process {os.getpid()} since {utc_text(datetime.now(UTC))}".encode(), 0)
    except BaseException:
        os.close(number)
        raise
    return number
