"""Configurations as JSON data and back: what `config.json` of a run holds."""

from __future__ import annotations

import dataclasses
from typing import Any

from fourfold.runtime.config_io import from_json as read
from jaxrl.config import AtariConfig, MinAtarConfig

_KINDS = {"atari": AtariConfig, "minatar": MinAtarConfig}


def to_json(config: AtariConfig | MinAtarConfig) -> dict[str, Any]:
    """Returns JSON-ready values, with the kind of the run as `kind`."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(config, cls))
    return {"kind": kind, **dataclasses.asdict(config)}


def from_json(data: dict[str, Any]) -> AtariConfig | MinAtarConfig:
    """Reads what `to_json` gave.

    Raises:
      ValueError: an unknown kind or field, from another version say.
    """
    if not isinstance(data, dict):
        raise ValueError(f"the configuration must be a JSON object, found {data!r}")
    fields = dict(data)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {sorted(_KINDS)}, found {kind!r}")
    return read(_KINDS[kind], fields)
