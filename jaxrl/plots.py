"""Pictures of a run in its folder: learning curves, or a heat map of a sweep."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from fourfold.runtime.metrics import read_metrics
from fourfold.runtime.run_dir import RunDir
from jaxrl import scores
from jaxrl.config import AtariConfig, MinAtarConfig, Sweep


def atari(run: RunDir, config: AtariConfig) -> None:
    """Draws returns, spectral norms and loss over the agent steps to `plots/training.png`."""
    rows = read_metrics(run.path)
    norms = sorted({name for row in rows for name in row if name.startswith("sigma/")})
    panels = [("return of a training game", ["return"]), ("loss", ["loss"])]
    panels += [("spectral norm", norms)] if norms else []
    figure, axes = _figure(1, len(panels))
    for ax, (label, names) in zip(axes.flat, panels, strict=True):
        for name in names:
            ax.plot(*_series(rows, name), label=name.removeprefix("sigma/"), alpha=0.7)
        ax.set(xlabel="agent steps", ylabel=label)
    steps, means = _series(rows, "evaluation/return")
    if len(steps):
        _, spread = _series(rows, "evaluation/std")
        axes[0, 0].errorbar(steps, means, spread, fmt="o", capsize=3, label="evaluation, ± std")
        axes[0, 0].legend(frameon=False)
    if norms:
        axes[0, -1].legend(frameon=False)
    figure.suptitle(f"{config.game}, {config.protocol} protocol, seed {config.seed}")
    _save(figure, run, "training.png")


def minatar(run: RunDir, config: MinAtarConfig) -> None:
    """Draws the seeds' learning curve to `plots/return.png`, or a sweep to `plots/sweep.png`."""
    rows = read_metrics(run.path)
    if not rows:
        return
    steps = np.array([row["step"] for row in rows])
    returns = np.array([[float(x) for x in row["returns"]] for row in rows]).T
    if config.sweep == Sweep():
        _curve(run, config, steps, returns)
    else:
        _heat_map(run, config, returns)


def _curve(run: RunDir, config: MinAtarConfig, steps: np.ndarray, returns: np.ndarray) -> None:
    figure, axes = _figure(1, 1)
    ax, many = axes[0, 0], len(returns) > 1
    ax.plot(steps, scores.finite_mean(returns, axis=0))
    if many:
        ax.fill_between(steps, *scores.bootstrap(returns), alpha=0.3, linewidth=0)
    band = f"{len(returns)} seeds, 95 % bootstrap band" if many else "1 seed"
    ax.set(xlabel="steps", ylabel="return of a game", title=f"{config.game}, {band}")
    _save(figure, run, "return.png")


def _heat_map(run: RunDir, config: MinAtarConfig, returns: np.ndarray) -> None:
    """One panel a bound: the mean return of the last fifth, over the seeds, per rate and eps."""
    sweep, agent = config.sweep, config.agent
    rates = sweep.learning_rate or (agent.learning_rate,)
    epses = sweep.eps or (agent.eps,)
    bounds: tuple[float | None, ...] = sweep.bound or (agent.bound,)
    last = returns[:, -max(1, returns.shape[1] // 5) :]
    shape = (len(rates), len(epses), len(bounds), config.num_seeds)
    # An agent whose games didn't end in that time has no return; nor has a cell of such agents.
    grid = scores.finite_mean(scores.finite_mean(last, axis=1).reshape(shape), axis=3)
    known = grid[np.isfinite(grid)]
    low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
    figure, axes = _figure(1, len(bounds))
    image, middle = None, (low + high) / 2
    for ax, panel, bound in zip(axes.flat, np.moveaxis(grid, 2, 0), bounds, strict=True):
        image = ax.imshow(panel, origin="lower", aspect="auto", vmin=low, vmax=high)
        for i, j in itertools.product(range(len(rates)), range(len(epses))):
            ink = "black" if panel[i, j] > middle else "white"
            ax.text(j, i, f"{panel[i, j]:.3g}", ha="center", va="center", fontsize=7, color=ink)
        ax.set(xlabel="eps", ylabel="learning rate", title="" if bound is None else f"k = {bound}")
        ax.set_xticks(range(len(epses)), [f"{x:.3g}" for x in epses], rotation=45)
        ax.set_yticks(range(len(rates)), [f"{x:.3g}" for x in rates])
    figure.colorbar(image, ax=axes, label="return of a game, last fifth of training")
    figure.suptitle(f"{config.game}, {config.num_seeds} seeds")
    _save(figure, run, "sweep.png")


def _series(rows: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    found = [(row["step"], float(row[name])) for row in rows if row.get(name) is not None]
    steps, values = np.array(found).reshape(-1, 2).T
    return steps, values


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    # Not pyplot, which would choose a backend for the whole process.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * columns, 3.6 * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _save(figure: Any, run: RunDir, name: str) -> None:
    run.plots.mkdir(exist_ok=True)
    draft = run.plots / f".{name}"
    figure.savefig(draft, dpi=160, format="png")
    draft.replace(run.plots / name)
