"""Features, targets, names and removals of records, checked before any work is done."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from unlearn.convex import FunctionLoss, LinearLoss


def as_records(
    loss: LinearLoss | FunctionLoss, x: ArrayLike, y: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Returns features in float64, and targets in float64 or, where they are classes, int64.

    Args:
      loss: whose records they are.
      x: `(n, d)`, or `(n, ...)` for a loss given as a function.
      y: `(n,)`, or `(n, ...)` likewise.

    Raises:
      ValueError: where a shape is wrong, a number is not finite, or a label is none of the loss's.
    """
    x, y = np.asarray(x), np.asarray(y)
    linear = isinstance(loss, LinearLoss)
    if not x.ndim or not y.ndim or len(x) != len(y) or not len(x):
        raise ValueError(f"features and targets must be as many, found {x.shape} and {y.shape}")
    if linear and (x.ndim != 2 or y.ndim != 1):
        raise ValueError(f"features must be (n, d), targets (n,); found {x.shape} and {y.shape}")
    for name, array in (("features", x), ("targets", y)):
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{name} must be real numbers, found {array.dtype}")
        if not np.isfinite(array).all():
            row = int(np.argmin(np.isfinite(array.reshape(len(array), -1)).all(axis=1)))
            raise ValueError(f"{name} must be finite; those of row {row} aren't")
    if linear and loss.name != "ridge":
        classes = loss.outputs
        known = np.array([-1, 1]) if loss.name == "logistic" else np.arange(classes)
        if not np.isin(y, known).all():
            raise ValueError(
                f"labels must be {'-1 or 1' if classes == 1 else f'from 0 to {classes - 1}'}, "
                f"found {y[~np.isin(y, known)][0]}"
            )
    as_class = (linear and loss.name == "softmax") or (not linear and y.dtype.kind in "biu")
    return x.astype(np.float64), y.astype(np.int64 if as_class else np.float64)


def as_mask(removed: ArrayLike, n: int) -> np.ndarray:
    """Returns which of n records are removed, bool `(n,)`.

    Args:
      removed: bool `(n,)`, or indices from 0 to n - 1 in any order, repeated or not.
      n: number of records.

    Raises:
      ValueError: where an index names no record, or it is neither.
    """
    removed = np.asarray(removed)
    if removed.dtype == bool:
        if removed.shape != (n,):
            raise ValueError(f"a mask must have the shape ({n},), found {removed.shape}")
        return removed
    if removed.size and removed.dtype.kind not in "iu":
        raise ValueError(f"removed must be a mask or indices, found {removed.dtype}")
    indices = np.unique(removed.astype(np.int64))
    if outside := [int(i) for i in indices if not 0 <= i < n]:
        raise ValueError(f"removed must be indices from 0 to {n - 1}, found {outside}")
    mask = np.zeros(n, bool)
    mask[indices] = True
    return mask


def as_ids(ids: ArrayLike | None, n: int) -> np.ndarray:
    """Returns the names of n records, `(n,)`; None makes them 0 to n - 1.

    Raises:
      ValueError: where they aren't n integers or strings, or one is there twice.
    """
    ids = np.arange(n) if ids is None else np.asarray(ids)
    if ids.shape != (n,) or ids.dtype.kind not in "iuSU":
        raise ValueError(f"ids must be {n} integers or strings, found {ids.dtype}{ids.shape}")
    names, counts = np.unique(ids, return_counts=True)
    if (counts > 1).any():
        raise ValueError(f"ids must be unique, found {names[counts > 1][:10].tolist()} repeated")
    return ids


def which(ids: np.ndarray, removed: ArrayLike) -> np.ndarray:
    """Returns which of the records are removed, bool `(n,)`.

    Args:
      ids: `(n,)`, names of the records.
      removed: some of them, in any order, repeated or not.

    Raises:
      ValueError: where one names no record, or is of another type: a mask is no list of ids.
    """
    requested = np.unique(np.asarray(removed))
    if not requested.size:
        return np.zeros(len(ids), bool)
    if requested.dtype.kind not in ("iu" if ids.dtype.kind in "iu" else ids.dtype.kind):
        raise ValueError(f"ids are of type {ids.dtype}, found {requested.dtype}")
    if unknown := requested[~np.isin(requested, ids)].tolist():
        raise ValueError(f"ids must be of records that remain, found {unknown[:10]}")
    return np.isin(ids, requested)
