"""Claims as JSON and PNG files, so that a finished one needn't run again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from fourfold.claims import Claim, Figure, Plot
from fourfold.runtime.host_arrays import replacing
from fourfold.runtime.jsonl import to_plain

_FILE = "claim.json"


def write_atomically(path: Path, text: str) -> None:
    """Replaces a text file, or leaves the old one if the process dies before the new one is whole.

    Raises:
      OSError: as the operating system says.
    """
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def to_data(claim: Claim) -> dict[str, Any]:
    """A claim as JSON data; its plots without their pictures, which are PNG files beside it."""
    data = {field.name: getattr(claim, field.name) for field in dataclasses.fields(claim)}
    data["figures"] = [
        {name: to_plain(value) for name, value in dataclasses.asdict(figure).items()}
        for figure in claim.figures
    ]
    data["plots"] = [
        {"title": plot.title, "caption": plot.caption, "file": f"plot_{number}.png"}
        for number, plot in enumerate(claim.plots, 1)
    ]
    data["hardware"] = {name: to_plain(value) for name, value in claim.hardware.items()}
    data["seeds"] = [int(seed) for seed in claim.seeds]
    data["seconds"] = to_plain(claim.seconds)
    return data


def save(claim: Claim, folder: Path) -> None:
    """Writes `claim.json` and the plots; the JSON last, so that it vouches for the pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, plot in enumerate(claim.plots, 1):
        (folder / f"plot_{number}.png").write_bytes(plot.png)
    text = json.dumps(to_data(claim), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / _FILE, text + "\n")


def load(folder: Path, scale: str) -> Claim | None:
    """The claim that was finished in this folder at this scale, or None."""
    try:
        data = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        if data["scale"] != scale or data["error"] is not None:
            return None
        figures = tuple(Figure(**_floats(figure)) for figure in data.pop("figures"))
        plots = tuple(
            Plot(plot["title"], (folder / plot["file"]).read_bytes(), plot["caption"])
            for plot in data.pop("plots")
        )
        seeds = tuple(data.pop("seeds"))
        return Claim(**data, figures=figures, plots=plots, seeds=seeds)
    except (OSError, ValueError, KeyError, TypeError):
        return None  # never finished, or by another version


def _floats(figure: dict[str, Any]) -> dict[str, Any]:
    names = ("NaN", "Infinity", "-Infinity")
    return {
        key: float(value) if isinstance(value, str) and value in names else value
        for key, value in figure.items()
    }
