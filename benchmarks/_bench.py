"""What the benchmarks share: alternating timings, and figures as a table and as JSON lines."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
from rich.console import Console
from rich.table import Table

_figures: list[dict[str, Any]] = []


def alternate(
    fns: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Times the functions in turn, so that a busy moment of the machine falls on all of them.

    Args:
      fns: name → function without arguments; the JAX arrays it returns are waited for.
      repeats: timed calls of each.
      warmup: calls of each before, not timed (compilation, caches).

    Returns:
      name → seconds of each timed call, in order.
    """
    for _ in range(warmup):
        for fn in fns.values():
            jax.block_until_ready(fn())
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    for turn in range(repeats):
        names = list(fns)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            jax.block_until_ready(fns[name]())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median(seconds: list[float], unit: Literal["s", "ms", "us"] = "s") -> float:
    """The median of timings, in the unit asked for."""
    return statistics.median(seconds) * {"s": 1, "ms": 1e3, "us": 1e6}[unit]


def figure(
    name: str,
    ours: float,
    peer: float | None,
    unit: str,
    ratio: float | None = None,
    target: float | None = None,
    better: Literal["higher", "lower"] = "lower",
) -> None:
    """Collects one figure for `show`.

    Args:
      name: what was measured, and against what.
      ours: our value.
      peer: the peer's, or None where there is no peer (or it isn't installed: say so in the name).
      unit: of both values.
      ratio: the figure that the target speaks of.
      target: what the ratio should reach, or None.
      better: the direction in which the ratio (or, without one, our value) improves.
    """
    _figures.append(
        dict(name=name, ours=ours, peer=peer, unit=unit, ratio=ratio, target=target, better=better)
    )


def show() -> None:
    """Prints the collected figures, as a table for people and then one JSON line each."""
    table = Table("figure", "ours", "peer", "unit", "ratio", "target", "met")
    for row in _figures:
        ratio, target = row["ratio"], row["target"]
        met = ""
        if ratio is not None and target is not None:
            met = (
                "yes"
                if (ratio >= target if row["better"] == "higher" else ratio <= target)
                else "no"
            )
        sign = "≥ " if row["better"] == "higher" else "≤ "
        numbers = ["–" if x is None else f"{x:.4g}" for x in (row["ours"], row["peer"], ratio)]
        goal = "–" if target is None else f"{sign}{target:.4g}"
        table.add_row(row["name"], *numbers[:2], row["unit"], numbers[2], goal, met)
    Console().print(table)
    for row in _figures:
        print(json.dumps(row, ensure_ascii=False), flush=True)
    _figures.clear()
