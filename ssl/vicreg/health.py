"""Whether a run is well: numbers that are not finite, and embeddings that collapse."""

from __future__ import annotations

import math
from collections.abc import Mapping

MIN_STD = 0.1  # of VICReg's embeddings, whose target is 1
MIN_RANK = 1.5  # effective; 1 is a line through the origin
PATIENCE = 2  # checks in a row, for the first updates may dip


class NonFiniteError(RuntimeError):
    """Numbers of a run are not finite; the last checkpoint is from before."""


class CollapseError(RuntimeError):
    """The embeddings have collapsed; the last checkpoint is from before."""


class Health:
    """What the metrics of a run say of its health, check by check."""

    def __init__(self, loss: str) -> None:
        """Starts with a healthy run.

        Args:
          loss: its name. VICReg's embeddings have a target for their standard deviations; what
            others minimise doesn't see their scale; the supervised baseline has logits in their
            place, which may well be few.
        """
        self._loss = loss
        self._collapsed = 0

    def check(self, metrics: Mapping[str, float]) -> str | None:
        """Returns what is wrong, in words; None where nothing is, or not yet for long enough.

        Args:
          metrics: `std`, `rankme`, `loss`, `grad_norm` and `nonfinite`, as of a `step.update`
            and `monitor.diagnose`.

        Raises:
          NonFiniteError: a number is not finite; the message says which.
        """
        if metrics["nonfinite"]:
            raise NonFiniteError(f"{metrics['nonfinite']:.0f} embeddings are not finite")
        for name in ("loss", "grad_norm"):
            if not math.isfinite(metrics[name]):
                raise NonFiniteError(f"{name} is {metrics[name]}")
        found = []
        if self._loss == "vicreg" and metrics["std"] < MIN_STD:
            found.append(f"their mean standard deviation is {metrics['std']:.3g}")
        if self._loss != "supervised" and not metrics["rankme"] >= MIN_RANK:
            found.append(f"their effective rank is {metrics['rankme']:.3g}")
        self._collapsed = self._collapsed + 1 if found else 0
        if self._collapsed < PATIENCE:
            return None
        return f"the embeddings have collapsed: {' and '.join(found)}"

    @property
    def suspect(self) -> bool:
        """Whether the last check saw a collapse, so that the state is not one to keep."""
        return self._collapsed > 0
