"""Pictures of a run in its folder."""

from __future__ import annotations

from typing import Any

import numpy as np

from fourfold.runtime.metrics import read_metrics
from fourfold.runtime.run_dir import RunDir

# Panels: title, and the metrics in it.
_PANELS = (
    ("loss", ("loss",)),
    ("unweighted terms", ("invariance", "variance", "covariance", "on_diagonal", "off_diagonal")),
    ("std of the embeddings", ("std",)),
    ("effective rank (RankMe)", ("rankme", "rankme/backbone")),
    ("accuracy of the online probe", ("probe/top1", "test/top1")),
    ("learning rate", ("lr",)),
)


def pretraining(run: RunDir) -> None:
    """Draws losses, collapse and the online probe over the epochs to `plots/training.png`."""
    from matplotlib.figure import Figure

    rows = read_metrics(run.path)
    if not rows:
        return
    figure = Figure(figsize=(13, 7), layout="constrained")
    axes: Any = figure.subplots(2, 3)
    for ax, (title, names) in zip(axes.flat, _PANELS, strict=True):
        for name in names:
            steps, values = series(rows, name)
            if len(steps):
                ax.plot(steps, values, marker="o" if len(steps) < 20 else None, label=name)
        ax.set(title=title, xlabel="step")
        if len(ax.lines) > 1:
            ax.legend(frameon=False)
    run.plots.mkdir(exist_ok=True)
    figure.savefig(run.plots / "training.png", dpi=120)


def series(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the steps and values of a metric, where it was logged."""
    found = [(row["step"], float(row[name])) for row in rows if name in row]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.array(steps), np.array(values)
