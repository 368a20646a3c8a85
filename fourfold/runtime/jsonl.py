"""A file of JSON lines that holds whole lines at any moment, whatever kills the writer.

Each line is one append of the operating system. What a full disk or a power cut leaves of a line
is cut off, at once or when the file is next opened.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def to_plain(value: Any) -> Any:
    """A metric as JSON data.

    Args:
      value: a number, text, None, or an array of numbers (JAX or NumPy, any shape).

    Returns:
      The same as Python data; arrays of rank 0 as numbers, others as lists. JSON has no
      non-finite numbers: they become the strings "NaN", "Infinity" and "-Infinity", which
      `float` reads.

    Raises:
      ValueError: it is none of these.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    if hasattr(value, "dtype"):
        array = np.asarray(value)
        if array.dtype.kind in "biu":
            return array.tolist()
        # bfloat16 and its like are floating to NumPy only once converted.
        return to_plain(array.astype(np.float64).tolist())
    raise ValueError(f"a metric is a number, text, None or an array, found {type(value).__name__}")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` (or of the run folder that holds it), oldest first.

    Non-finite numbers come back as floats; a torn last line, of a run being written or killed, is
    left out.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.jsonl"
    names = {"NaN", "Infinity", "-Infinity"}
    rows = []
    with path.open("rb") as file:
        for line in file:
            row = _parse(line)
            if row is None:
                break
            rows.append(
                {k: float(v) if isinstance(v, str) and v in names else v for k, v in row.items()}
            )
    return rows


def _parse(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


class JsonLines:
    """A file of JSON objects with a "step" that never decreases, open for appending."""

    def __init__(self, path: Path, start: int = 0) -> None:
        """Opens the file and cuts it before its first line that is torn or past step `start`.

        A `start` of 0 is a new run and cuts everything.
        """
        self.path = path
        keep = _length_up_to(path, start) if start > 0 and path.exists() else 0
        self._number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._number, keep)

    def append(self, row: Mapping[str, Any]) -> None:
        """Writes one line.

        Raises:
          OSError: the disk is full, say; the file still holds whole lines.
          ValueError: a value isn't JSON, as a non-finite number isn't.
        """
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        end = os.lseek(self._number, 0, os.SEEK_END)
        try:
            written = os.write(self._number, line)
            while written < len(line):  # a disk that fills up takes a part before it complains
                written += os.write(self._number, line[written:])
        except OSError:
            os.ftruncate(self._number, end)
            raise

    def close(self) -> None:
        """Flushes the file to disk and closes it."""
        os.fsync(self._number)
        os.close(self._number)


def _length_up_to(path: Path, start: int) -> int:
    keep = 0
    with path.open("rb") as file:
        for line in file:
            row = _parse(line)
            if row is None or row["step"] > start:
                break
            keep += len(line)
    return keep
