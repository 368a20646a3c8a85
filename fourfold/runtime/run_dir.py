"""The folder of a run: made once with its configuration, opened again only with the same one."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fourfold.runtime import mesh

CONFIG = "config.json"
_DRAFT = ".config.json.tmp"


def to_json(config: Any) -> Any:
    """A configuration as JSON data: dataclasses and mappings as objects, tuples as lists.

    Raises:
      ValueError: a value is of a type that JSON has no form for (after `os.PathLike` as text).
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, Mapping):
        return {str(key): to_json(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_json(value) for value in config]
    if isinstance(config, os.PathLike):
        return os.fspath(config)
    if config is None or isinstance(config, (bool, int, float, str)):
        return config
    raise ValueError(f"a configuration cannot hold {config!r} of type {type(config).__name__}")


def _flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(config, dict) and (config or not prefix):
        return {
            name: leaf
            for key, value in config.items()
            for name, leaf in _flatten(value, f"{prefix}.{key}" if prefix else key).items()
        }
    return {prefix: config}


def differences(saved: Any, given: Any, free: Sequence[str] = ()) -> list[str]:
    """What differs between two configurations in JSON form, one line a field.

    Args:
      saved: the first configuration.
      given: the second.
      free: dotted names of fields that may differ; a name frees what is below it too.
    """
    old, new = _flatten(saved), _flatten(given)
    lines = []
    for name in dict.fromkeys([*old, *new]):
        if any(name == field or name.startswith(f"{field}.") for field in free):
            continue
        before = json.dumps(old[name]) if name in old else "absent"
        after = json.dumps(new[name]) if name in new else "absent"
        if before != after:
            lines.append(f"{name}: saved {before}, given {after}")
    return lines


@dataclasses.dataclass(frozen=True)
class RunDir:
    """A run's folder: `config.json`, `metrics.jsonl`, `checkpoints/`, `plots/`."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where `Checkpoints` writes."""
        return self.path / "checkpoints"

    @property
    def plots(self) -> Path:
        """Where pictures go."""
        return self.path / "plots"

    @classmethod
    def create(cls, path: str | os.PathLike[str], config: Any) -> RunDir:
        """Makes the folder of a new run and writes its configuration.

        With several processes only process 0 writes; the folder must be shared by all.

        Raises:
          FileExistsError: the folder exists and isn't empty.
          NotADirectoryError: there is a file of that name.
          ValueError: the configuration has no JSON form.
        """
        path = Path(path)
        text = json.dumps(to_json(config), indent=2) + "\n"
        if not mesh.is_lead():
            return cls(path)
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"{path} is a file; a run needs a folder")
        # A kill between making the folder and writing the configuration leaves only the draft.
        if path.exists() and (found := sorted(p.name for p in path.iterdir() if p.name != _DRAFT)):
            what = "a run" if CONFIG in found else "other files"
            raise FileExistsError(
                f"{path} holds {what} ({_some(found)}): choose another folder, or --resume to "
                f"continue the run in it"
            )
        path.mkdir(parents=True, exist_ok=True)
        draft = path / _DRAFT
        with draft.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path / CONFIG)
        return cls(path)

    @classmethod
    def open(
        cls, path: str | os.PathLike[str], config: Any | None = None, free: Sequence[str] = ()
    ) -> RunDir:
        """Opens the folder of an earlier run.

        Args:
          path: the folder.
          config: the configuration to continue with, compared with the saved one; None to take
            the saved one as it is (`saved_config`).
          free: dotted names of fields that may differ, such as the number of steps.

        Raises:
          FileNotFoundError: no run is there; the message lists the runs beside it.
          ValueError: the configurations differ; the message names each field.
        """
        run = cls(Path(path))
        if not (run.path / CONFIG).is_file():
            runs = sorted(p.parent.name for p in run.path.parent.glob(f"*/{CONFIG}"))
            inside = sorted(p.parent.name for p in run.path.glob(f"*/{CONFIG}"))
            state = "has no config.json" if run.path.exists() else "does not exist"
            beside = f"runs in {run.path.parent}: {_some(runs) if runs else 'none'}"
            within = f"; runs inside it: {_some(inside)}" if inside else ""
            raise FileNotFoundError(f"no run: {run.path} {state}; {beside}{within}")
        if config is not None:
            lines = differences(run.saved_config(), json.loads(json.dumps(to_json(config))), free)
            if lines:
                raise ValueError(
                    f"the configuration differs from {run.path / CONFIG}: {'; '.join(lines)}"
                )
        return run

    def saved_config(self) -> Any:
        """The configuration that the run was made with, as JSON data.

        Raises:
          ValueError: `config.json` isn't JSON.
        """
        try:
            return json.loads((self.path / CONFIG).read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path / CONFIG} is not JSON: {error}") from error


def _some(names: Sequence[str], most: int = 12) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
