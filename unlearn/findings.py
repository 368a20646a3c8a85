"""A report on unlearning that says what each number means, beside retrained models' number."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from unlearn.membership import Estimate

# By the beginning of a finding's name: the side of the retrained models on which a trace of the
# forgotten records lies, and what the number means.
MEANINGS = {
    "auc": (
        "either",
        "How often a forgotten record has a lower loss than one never trained on. 0.5 is not the "
        "goal: a retrained model saw neither, so its value is how the groups differ by nature.",
    ),
    "balanced accuracy": (
        "either",
        "How well a loss threshold tells forgotten records from ones never trained on. The "
        "retrained model shows how far that goes without any memory of them.",
    ),
    "tpr at fpr": (
        "either",
        "The share of forgotten records that can be named with few false alarms. Easy records "
        "stand out in a retrained model too; only what exceeds that is memory.",
    ),
    "u-lira auc": (
        "above",
        "How well an attacker who has models of both kinds tells unlearned from retrained, example "
        "by example. Two halves of the retrained models show how far chance alone leads.",
    ),
    "klom": (
        "above",
        "The divergence of the margins from those of retrained models, in nats. Histograms of few "
        "models differ by chance, as much as those of two halves of the retrained models do.",
    ),
    "log10 ks p": (
        "below",
        "How improbable the distance between an unlearned and a retrained model is, if both behave "
        "alike. They see the same examples, so two retrained models show which values are usual.",
    ),
    "forgetting quality": (
        "below",
        "The NeurIPS 2023 score, 1 where no threshold tells unlearned from retrained models. The "
        "best of many thresholds also finds chance, as it does in halves of the retrained models.",
    ),
}


@dataclass(frozen=True)
class Finding:
    """A number of the unlearned models beside the same one of retrained models.

    Attributes:
      name: what was measured; begins with a key of `MEANINGS`.
      unlearned: its value and interval.
      retrained: the same of retrained models.

    Raises:
      ValueError: the name is unknown, or a number isn't finite or outside its interval.
    """

    name: str
    unlearned: Estimate
    retrained: Estimate

    def __post_init__(self) -> None:
        self._meaning  # noqa: B018  raises where the name is unknown
        for value, low, high in (self.unlearned, self.retrained):
            if not (np.isfinite([value, low, high]).all() and low <= value <= high):
                raise ValueError(f"{self.name}: {value} isn't in its interval {low} to {high}")

    @property
    def _meaning(self) -> tuple[str, str]:
        for start, meaning in MEANINGS.items():
            if self.name.startswith(start):
                return meaning
        raise ValueError(f"a finding is one of {', '.join(MEANINGS)}, found {self.name!r}")

    @property
    def meaning(self) -> str:
        """What the number means, and why the retrained models' is its measure."""
        return self._meaning[1]

    @property
    def trace(self) -> bool:
        """Whether the intervals are apart, on the side on which the records still show."""
        above = self.unlearned.low > self.retrained.high
        below = self.unlearned.high < self.retrained.low
        return {"above": above, "below": below, "either": above or below}[self._meaning[0]]

    @property
    def verdict(self) -> str:
        """Says "trace", or "none seen" where the intervals meet or the difference is harmless."""
        return "trace" if self.trace else "none seen"


@dataclass(frozen=True)
class Report:
    """Findings on one request or run.

    Attributes:
      title: what was audited.
      findings: at least one.

    Raises:
      ValueError: there are no findings.
    """

    title: str
    findings: Sequence[Finding]

    def __post_init__(self) -> None:
        if not self.findings:
            raise ValueError("a report needs at least one finding, found none")

    @property
    def verdict(self) -> str:
        """How many findings show a trace, and which."""
        traces = [finding.name for finding in self.findings if finding.trace]
        if traces:
            return f"{len(traces)} of {len(self.findings)} show a trace: {', '.join(traces)}"
        return (
            f"none of {len(self.findings)} shows a trace; what these attacks miss, a stronger one "
            "or more models may find"
        )

    def to_json(self) -> str:
        """The report as JSON: title, verdict and, of each finding, all that `render` shows."""
        findings = [
            {
                "name": f.name,
                "unlearned": f.unlearned._asdict(),
                "retrained": f.retrained._asdict(),
                "verdict": f.verdict,
                "meaning": f.meaning,
            }
            for f in self.findings
        ]
        page = {"title": self.title, "verdict": self.verdict, "findings": findings}
        return json.dumps(page, indent=2, allow_nan=False)

    def render(self) -> str:
        """The report as a Markdown table, which reads as plain text too, and the meanings."""
        rows = [("measure", "unlearned", "retrained", "verdict"), ("---",) * 4]
        for f in self.findings:
            cells = (
                f"{e.value:.4g} ({e.low:.4g} to {e.high:.4g})" for e in (f.unlearned, f.retrained)
            )
            rows.append((f.name, *cells, f.verdict))
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        meanings = "\n".join(f"- {f.name}: {f.meaning}" for f in self.findings)
        return f"# {self.title}\n\n{self.verdict}\n\n{table}\n\n{meanings}\n"
