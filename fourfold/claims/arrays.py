"""Arrays of a finished part of a claim, kept with the settings that gave them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fourfold.runtime.host_arrays import replacing


def save(path: Path, settings: str, result: Mapping[str, np.ndarray]) -> None:
    """Writes a result with its settings, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {"settings": np.array(settings), **result}
    with replacing(path) as draft, draft.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load(path: Path, settings: str) -> dict[str, np.ndarray] | None:
    """Returns the result saved for these very settings, or None."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as file:
        if "settings" not in file.files or str(file["settings"]) != settings:
            return None
        return {name: file[name] for name in file.files if name != "settings"}
