"""Progress on a terminal as a bar with rate and time left, elsewhere as a plain line now and then.

It goes to standard error, so that standard output keeps a program's results.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from rich import progress as bars
from rich.console import Console
from rich.markup import escape
from rich.text import Text


def format_rate(rate: float | None, unit: str) -> str:
    """A rate in steps a second, or in seconds a step where it is below one.

    >>> format_rate(12345.6, "steps")
    '12.3k steps/s'
    >>> format_rate(0.25, "epochs")
    '4.0 s per epoch'
    """
    if rate is None or rate <= 0 or not math.isfinite(rate):
        return f"– {unit}/s"
    if rate < 1:
        return f"{1 / rate:.1f} s per {unit.removesuffix('s')}"
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:.1f}{suffix} {unit}/s"
    return f"{rate:.1f} {unit}/s"


def format_seconds(seconds: float | None) -> str:
    """A duration as h:mm:ss, or as –:–– where it is unknown.

    >>> format_seconds(3725)
    '1:02:05'
    """
    if seconds is None or not math.isfinite(seconds):
        return "–:––"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def format_metrics(metrics: Mapping[str, float], most: int = 4) -> str:
    """The first few metrics in a line, in the order given."""
    return "  ".join(f"{name} {value:.4g}" for name, value in list(metrics.items())[:most])


class _Rate(bars.ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: bars.Task) -> Text:
        return Text(format_rate(task.finished_speed or task.speed, self._unit))


class Progress:
    """Shows how far a run is, from step `start` to `total`."""

    def __init__(
        self,
        total: int,
        unit: str,
        *,
        start: int = 0,
        quiet: bool = False,
        every: float = 30.0,
        console: Console | None = None,
    ) -> None:
        """Starts the display.

        Args:
          total: the last step.
          unit: what a step is, in the plural.
          start: the step that the run starts at; the rate leaves it out.
          quiet: show nothing.
          every: seconds between plain lines; the first update and the last always have one.
          console: where to; None for standard error.
        """
        self._total, self._unit, self._start, self._every = total, unit, start, every
        self._console = console or Console(stderr=True)
        self._quiet = quiet
        self._began = time.monotonic()
        self._printed = -math.inf
        self._line = ""  # the newest plain line that was not printed
        self._bar: bars.Progress | None = None
        if not quiet and self._console.is_terminal:
            bar = bars.Progress(
                bars.BarColumn(bar_width=24),
                bars.TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                _Rate(unit),
                bars.TimeRemainingColumn(elapsed_when_finished=True),
                bars.TextColumn("[dim]{task.description}"),
                console=self._console,
            )
            bar.start()
            self._task = bar.add_task("", total=total, completed=start)
            self._bar = bar

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a step and the first few of its metrics."""
        if self._quiet:
            return
        text = format_metrics(metrics)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=escape(text))
            return
        now = time.monotonic()
        done = step - self._start
        rate = done / (now - self._began) if done > 0 and now > self._began else None
        left = (self._total - step) / rate if rate else None
        self._line = (
            f"{step:,}/{self._total:,} {self._unit}  {format_rate(rate, self._unit)}  "
            f"ETA {format_seconds(left)}  {text}"
        ).rstrip()
        if now - self._printed >= self._every or step >= self._total:
            self._flush()
            self._printed = now

    def _flush(self) -> None:
        if self._line:
            self._console.out(self._line, highlight=False)
            self._line = ""

    def close(self) -> None:
        """Ends the display."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        self._flush()
