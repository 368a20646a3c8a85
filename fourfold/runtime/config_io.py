"""Configurations back from the JSON data that `run_dir.to_json` made of them."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, TypeVar

T = TypeVar("T")


def from_json(cls: type[T], data: Any) -> T:
    """Reads a dataclass, and those in its fields, from JSON data.

    Args:
      cls: a dataclass; fields that are dataclasses, and tuples of JSON values, are recognised.
      data: JSON data; fields that are absent take their defaults.

    Raises:
      ValueError: the data is no object, or has a field that the class does not know, as that of
        another version may.
    """
    if not isinstance(data, dict):
        raise ValueError(f"{cls.__name__} must be a JSON object, found {data!r}")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]  # pyright: ignore[reportArgumentType]
    unknown = sorted(set(data) - set(names))
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {unknown}; allowed are {names}")
    values = {}
    for name, value in data.items():
        if dataclasses.is_dataclass(hints[name]):
            value = from_json(hints[name], value)  # pyright: ignore[reportArgumentType]
        values[name] = tuple(value) if isinstance(value, list) else value
    return cls(**values)
