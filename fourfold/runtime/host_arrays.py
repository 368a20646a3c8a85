"""Large host arrays and JSON values in a folder: written straight from memory, read by mapping.

A replay of a million frames takes 7 GB. Nothing here copies it: writing hands slices of the
array's own memory to the file, and reading maps the file.
"""

from __future__ import annotations

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
_KINDS = "biufcSUmM"
_CHUNK = 1 << 24  # bytes a write
_MAPPED = 1 << 20  # arrays of at least so many bytes are mapped, smaller ones read
_VALUES = "values.json"


class DiskFullError(OSError):
    """The disk has no room for a checkpoint; what was saved before is intact."""


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that the disk, a quota or the file size limit is exhausted."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in numbers:
        return True
    # TensorStore reports the operating system's error in words.
    text = str(error)
    return any(f"os_error_code='{n}'" in text or os.strerror(n) in text for n in numbers)


def check_extra(extra: Mapping[str, Any]) -> int:
    """Checks that `write_extra` can write this, before anything is touched.

    Args:
      extra: names to arrays or JSON values. A name is letters, digits, `_`, `.`, `-`, and `/`
        between parts.

    Returns:
      The bytes that writing takes, near enough.

    Raises:
      ValueError: a name, an array's dtype or a value can't be written; the message names it.
    """
    size = 0
    for name, value in extra.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(
                f"extra {name!r}: a name is letters, digits, '_', '.', '-' and '/' between parts"
            )
        if isinstance(value, (np.ndarray, np.generic)):
            if value.dtype.kind not in _KINDS:
                raise ValueError(
                    f"extra {name!r}: dtype {value.dtype} has no plain .npy form; allowed are "
                    f"booleans, numbers, dates and text"
                )
            size += value.nbytes + 4096
        else:
            try:
                size += len(json.dumps(value))
            except (TypeError, ValueError) as error:
                raise ValueError(
                    f"extra {name!r}: {type(value).__name__} is neither a NumPy array nor JSON "
                    f"({error})"
                ) from error
    return size


def write_extra(folder: Path, extra: Mapping[str, Any]) -> None:
    """Writes arrays as NAME.npy and the other values into one JSON file, all flushed to disk.

    Raises:
      OSError: as the operating system says, with its errno.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {}
    for name, value in extra.items():
        if isinstance(value, (np.ndarray, np.generic)):
            path = folder / f"{name}.npy"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_array(path, np.asarray(value))
        else:
            values[name] = value
    write_text(folder / _VALUES, json.dumps(values))


def read_extra(folder: Path) -> dict[str, Any]:
    """Reads what `write_extra` wrote.

    Large arrays are mapped copy-on-write: their pages are read when touched, writing to them
    leaves the file alone, and they outlive the file's removal.
    """
    extra: dict[str, Any] = json.loads((folder / _VALUES).read_text())
    for path in sorted(folder.rglob("*.npy")):
        mode = "c" if path.stat().st_size >= _MAPPED else None
        name = path.relative_to(folder).as_posix().removesuffix(".npy")
        extra[name] = np.load(path, mmap_mode=mode, allow_pickle=False)
    return extra


def write_array(path: Path, array: np.ndarray) -> None:
    """Writes a .npy file in bounded memory, whatever the array's size and strides.

    `np.save` would do but for one thing: where the disk fills up, it raises without an errno.
    """
    header = np.lib.format.header_data_from_array_1_0(array)
    if header["fortran_order"]:
        array = array.T
    with path.open("wb") as file:
        np.lib.format.write_array_header_2_0(file, header)
        if array.flags.c_contiguous:
            _write_bytes(file, array)
        else:
            rows = max(1, _CHUNK // max(1, array.nbytes // array.shape[0]))
            for start in range(0, array.shape[0], rows):
                _write_bytes(file, np.ascontiguousarray(array[start : start + rows]))
        file.flush()
        os.fsync(file.fileno())


def _write_bytes(file: Any, array: np.ndarray) -> None:
    view = array.reshape(-1).view(np.uint8).data
    for start in range(0, len(view), _CHUNK):
        file.write(view[start : start + _CHUNK])


def write_text(path: Path, text: str) -> None:
    """Writes a text file and flushes it to disk."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a draft to write, which takes the file's place once it is whole and on disk.

    Where the writing fails, the draft is removed and the file is as it was.
    """
    draft = path.with_name(f".{path.name}.tmp")
    try:
        yield draft
        sync(draft)
        draft.rename(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def sync_tree(folder: Path) -> dict[str, int]:
    """Flushes every file and folder below `folder` to disk.

    Returns:
      The size in bytes of each file by its path relative to `folder`.
    """
    sizes = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root, name)
            sync(path)
            sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
        sync(Path(root))
    return sizes


def sync(path: Path) -> None:
    """Flushes one file, or the names in one folder, to disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
