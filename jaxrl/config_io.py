"""Configurations as JSON data and back: what `config.json` of a run holds."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxrl.config import AgentConfig, AtariConfig, Exploration, MinAtarConfig, Sweep

_KINDS = {"atari": AtariConfig, "minatar": MinAtarConfig}
_NESTED = {"agent": AgentConfig, "exploration": Exploration, "sweep": Sweep}


def to_json(config: AtariConfig | MinAtarConfig) -> dict[str, Any]:
    """Returns JSON-ready values, with the kind of the run as `kind`."""
    kind = next(name for name, cls in _KINDS.items() if isinstance(config, cls))
    return {"kind": kind, **dataclasses.asdict(config)}


def from_json(data: dict[str, Any]) -> AtariConfig | MinAtarConfig:
    """Reads what `to_json` gave.

    Raises:
      ValueError: an unknown kind or field, from another version say.
    """
    fields = dict(_object(data, "the configuration"))
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"kind must be one of {sorted(_KINDS)}, found {kind!r}")
    for name, cls in _NESTED.items():
        if name in fields:
            fields[name] = _make(cls, _object(fields[name], name))
    return _make(_KINDS[kind], fields)


def _object(data: Any, name: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{name} must be a JSON object, found {data!r}")
    return data


def _make(cls: type, fields: dict[str, Any]) -> Any:
    allowed = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(fields) - set(allowed))
    if unknown:
        raise ValueError(f"{cls.__name__} has no field {unknown}; allowed are {allowed}")
    # JSON has no tuples.
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
