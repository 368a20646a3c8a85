"""Labelled records with ids, from a table, a file of arrays, or tensorflow-datasets."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np

from unlearn import partition
from unlearn.config import DataConfig

_INSTALL = "pip install 'fourfold[unlearn]'"


class Table(NamedTuple):
    """Records.

    Attributes:
      ids: int64 or text `(N,)`, each once.
      x: float32 `(N, ...)`, finite; of images, pixels in [0, 1].
      y: `(N,)`, labels as they are in the data: integers or text.
    """

    ids: np.ndarray
    x: np.ndarray
    y: np.ndarray


def load(config: DataConfig) -> Table:
    """Reads the records to learn from.

    Raises:
      ImportError: a package that reads this kind of data is missing.
      FileNotFoundError: the file or data set isn't there.
      ValueError: a column is missing or of the wrong type, a number isn't finite, or an id occurs
        twice; the message names them.
    """
    if _is_file(config.name):
        return read(config.name, config)
    return _named(config, "train")


def load_test(config: DataConfig) -> Table | None:
    """Reads the records to score on, where there are any; errors as `load`."""
    if config.test is not None:
        return read(config.test, config)
    return None if _is_file(config.name) else _named(config, "test")


def read(path: str, config: DataConfig, labels: bool = True) -> Table:
    """Reads a file; args and errors as `load`.

    Args:
      path: .npz, .csv or .parquet.
      config: names of the columns.
      labels: whether there have to be any; where there are none, `y` is empty text.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no data: {path} is no file")
    arrays = _npz(path) if path.endswith(".npz") else _columns(path, config)
    if "x" not in arrays or (labels and "y" not in arrays):
        raise ValueError(f"{path} must have arrays x and y, and may have ids; it has {[*arrays]}")
    x = arrays["x"]
    y = arrays.get("y", np.full(len(x), ""))
    return _checked(path, arrays.get("ids", np.arange(len(x))), x, y)


def _named(config: DataConfig, split: str) -> Table:
    return _digits(split) if config.name == "digits" else _tfds(config, split)


def _is_file(name: str) -> bool:
    return name.endswith((".npz", ".csv", ".parquet"))


def _npz(path: str) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _columns(path: str, config: DataConfig) -> dict[str, np.ndarray]:
    try:
        import pyarrow.csv
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"tables need pyarrow: {_INSTALL}") from error
    arrow = cast(Any, pyarrow)
    read = arrow.csv.read_csv if path.endswith(".csv") else arrow.parquet.read_table
    try:
        table = read(path)
    except arrow.ArrowInvalid as error:
        raise ValueError(f"{path} can't be read: {error}") from error
    columns = dict(zip(table.column_names, table.columns, strict=True))
    found: dict[str, np.ndarray] = {}
    if config.id_column not in columns:
        raise ValueError(
            f"{path} has no column {config.id_column!r} of ids; it has {[*columns]}: "
            "--data.id-column names it"
        )
    found["ids"] = columns.pop(config.id_column).to_numpy()
    if config.label_column in columns:
        found["y"] = columns.pop(config.label_column).to_numpy()
    wrong = [
        f"{name} ({column.type})"
        for name, column in columns.items()
        if not (arrow.types.is_integer(column.type) or arrow.types.is_floating(column.type))
    ]
    if wrong or not columns:
        raise ValueError(
            f"{path} must have columns of numbers beside {config.id_column} and "
            f"{config.label_column}; found {', '.join(wrong) or 'none'}"
        )
    found["x"] = np.stack([column.to_numpy() for column in columns.values()], axis=1)
    return found


def _digits(split: str) -> Table:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(f"the digits are in scikit-learn: {_INSTALL}") from error
    digits: Any = load_digits()
    at = np.arange(len(digits.target))
    at = at[(at % 5 == 4) == (split == "test")]
    return _checked("digits", at, digits.images[at] / 16, digits.target[at])


def _tfds(config: DataConfig, split: str) -> Table:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(
            f"{config.name!r} is no file (.npz, .csv, .parquet) and not digits; data sets of "
            "tensorflow-datasets need it: pip install 'fourfold[ssl]'"
        ) from error
    from PIL import Image

    tfds = cast(Any, tensorflow_datasets)
    builder = tfds.builder(config.name, data_dir=config.data_dir)
    if not builder.data_path.exists():
        raise FileNotFoundError(
            f"{config.name} is not in {builder.data_dir}; prepare it there with tensorflow-datasets"
        )
    records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
    found = records.__getitems__(list(range(len(records))))
    images = [np.asarray(Image.open(io.BytesIO(record["image"]))) for record in found]
    y = np.array([record["label"] for record in found])
    return _checked(f"{config.name}/{split}", np.arange(len(y)), np.stack(images) / 255, y)


def _checked(name: str, ids: np.ndarray, x: np.ndarray, y: np.ndarray) -> Table:
    try:
        ids = partition.check_ids(ids)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    x, y = np.asarray(x), np.asarray(y)
    if y.dtype == object and all(isinstance(label, str) for label in y):
        y = y.astype(str)
    if x.ndim < 2 or x.dtype.kind not in "fiub" or len(x) != len(ids) or y.shape != ids.shape:
        raise ValueError(
            f"{name} must have numbers x (N, ...), labels y (N,) and ids (N,), found "
            f"{x.dtype} {x.shape}, {y.dtype} {y.shape}, {ids.dtype} {ids.shape}"
        )
    if y.dtype.kind not in "iuU":
        raise ValueError(f"{name}: labels must be integers or text, found {y.dtype}")
    with np.errstate(over="ignore"):
        x = x.astype(np.float32)
    bad = ids[~np.isfinite(x.reshape(len(x), -1)).all(axis=1)]
    if len(bad):
        raise ValueError(
            f"{name}: {len(bad)} records have numbers that are not finite in float32: "
            f"{partition.some(bad)}"
        )
    return Table(ids, x, y)
