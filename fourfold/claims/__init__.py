"""The published results that this project reproduces, one module a claim.

A claim's module has `run(scale, out, progress) -> Claim`:

- `scale` is "laptop", "gpu" or "paper";
- `out` is a folder of its own, kept between attempts, for runs that may be resumed;
- `progress(fraction, message)` is called now and then, with a fraction in [0, 1].

Modules are imported when they are run, so that listing the claims needs none of their packages.
"""

from __future__ import annotations

import dataclasses
import importlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

T = TypeVar("T")

Scale = Literal["laptop", "gpu", "paper"]
SCALES: tuple[str, ...] = get_args(Scale)
Progress = Callable[[float, str], None]


@dataclasses.dataclass(frozen=True)
class Figure:
    """One number: the paper's beside ours.

    Attributes:
      name: what is measured.
      paper: the published figure; text for what isn't one number; None where there is none.
      ours: the figure measured here; None where it was not measured.
      low: lower end of the interval around `ours`, None where there is none.
      high: its upper end.
      unit: of all of them, such as "%" or "return per game".
      note: what a reader must know to compare them.
      seeds: how many independent runs `ours` is over; None for all of the claim's.
    """

    name: str
    paper: float | str | None
    ours: float | str | None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    note: str = ""
    seeds: int | None = None


@dataclasses.dataclass(frozen=True)
class Plot:
    """A picture.

    Attributes:
      title: what it shows; also its text for those who can't see it.
      png: the PNG file, or a Matplotlib figure, which becomes one.
      caption: a sentence below it.
    """

    title: str
    png: Any
    caption: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.png, bytes):
            buffer = io.BytesIO()
            self.png.savefig(buffer, format="png", dpi=160, bbox_inches="tight")
            object.__setattr__(self, "png", buffer.getvalue())


@dataclasses.dataclass(frozen=True)
class Claim:
    """A result, as the report shows it.

    Attributes:
      name: as registered.
      title: the claim in a few words.
      paper: the citation.
      text: what was done and what came out: paragraphs between blank lines, `code` in backticks.
      verdict: one honest sentence: whether the claim holds here, and at what scale.
      figures: paper against ours.
      plots: pictures.
      command: what gives this result.
      seeds: the seeds, all of them.
      hardware: as `fourfold.runtime.hardware.hardware` describes it.
      seconds: run time.
      scale: one of `SCALES`.
      interval: what `low` and `high` of the figures are, such as "95 % bootstrap over seeds".
      date: day of the run, ISO 8601.
      error: why there is no result; None where there is one.
    """

    name: str
    title: str
    paper: str
    text: str
    figures: tuple[Figure, ...] = ()
    plots: tuple[Plot, ...] = ()
    command: str = ""
    seeds: tuple[int, ...] = ()
    hardware: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    scale: str = "laptop"
    verdict: str = ""
    interval: str = ""
    date: str = ""
    error: str | None = None


class Entry(NamedTuple):
    """Where a claim's code is and what it says."""

    module: str
    summary: str


CLAIMS: dict[str, Entry] = {
    "jaxrl_minatar": Entry(
        "fourfold.claims.jaxrl_minatar",
        "C51 with and without spectral normalisation on MinAtar (Gogianu et al., 2021)",
    ),
    "vicreg_collapse": Entry(
        "fourfold.claims.vicreg_collapse",
        "VICReg without each of its terms, and beside other methods (Bardes et al., 2022)",
    ),
    "vicreg_memory": Entry(
        "fourfold.claims.vicreg_memory",
        "Memory of the VICReg loss as the batch grows (Bardes et al., 2022)",
    ),
    "unlearn_sisa": Entry(
        "fourfold.claims.unlearn_sisa",
        "Sharded unlearning: cost, equal hashes, the adaptive attack (Bourtoule et al., 2021)",
    ),
}


def select(names: tuple[str, ...] = ()) -> list[str]:
    """The claims to run, in the registry's order; all of them where none is named.

    Raises:
      ValueError: a name is unknown; the message lists those there are.
    """
    unknown = [name for name in names if name not in CLAIMS]
    if unknown:
        raise ValueError(f"unknown claim {', '.join(unknown)}; there are: {', '.join(CLAIMS)}")
    return [name for name in CLAIMS if not names or name in names]


def load(name: str) -> Callable[[str, Path, Progress], Claim]:
    """Imports a claim's module and returns its `run`."""
    return importlib.import_module(CLAIMS[name].module).run


def at_scale(scales: Mapping[str, T], scale: str) -> T:
    """Returns what a claim does at a scale.

    Raises:
      ValueError: the claim has no such scale.
    """
    if scale not in scales:
        raise ValueError(f"scale must be one of {', '.join(scales)}, found {scale!r}")
    return scales[scale]
