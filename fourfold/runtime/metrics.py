"""One stream of metrics: a progress bar, `metrics.jsonl` always, TensorBoard and W&B on request.

Only process 0 writes. Resuming drops what a killed run wrote past the step it resumes from.
"""

from __future__ import annotations

import importlib
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

from fourfold.runtime import mesh
from fourfold.runtime.jsonl import JsonLines, read_metrics, to_plain
from fourfold.runtime.progress import Progress

__all__ = ["METRICS", "Metrics", "read_metrics"]

METRICS = "metrics.jsonl"
_RESERVED = ("step", "time")


class Metrics:
    """Writes metrics; use it as a context manager, so that the bar ends and the sinks flush."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        total: int,
        unit: str = "steps",
        *,
        start: int = 0,
        tensorboard: bool = False,
        wandb: str | None = None,
        config: Any = None,
        quiet: bool = False,
    ) -> None:
        """Opens the stream of the run in folder `path`.

        Args:
          path: the run's folder; `metrics.jsonl` and `tensorboard/` are in it.
          total: the step at which the bar is full.
          unit: what a step is, in the plural, as shown with the rate.
          start: the step that the run resumes from; lines past it are dropped. 0 is a new run and
            drops all.
          tensorboard: also write TensorBoard's event files.
          wandb: the name of a W&B project to log to; a resumed run continues its W&B run.
          config: JSON data that W&B shows with the run.
          quiet: no progress on the terminal.

        Raises:
          ImportError: a sink's package is missing; the message says which extra has it.
        """
        self.path = Path(path)
        self._last = start
        self._file: JsonLines | None = None
        self._writer: Any = None
        self._wandb: Any = None
        self._progress: Progress | None = None
        if not mesh.is_lead():
            return
        # The sinks first: a missing package must not cost the lines of the run to resume.
        board = _optional("tensorboardX", "TensorBoard") if tensorboard else None
        weights = _optional("wandb", "W&B") if wandb is not None else None
        self.path.mkdir(parents=True, exist_ok=True)
        self._file = JsonLines(self.path / METRICS, start)
        if board is not None:
            folder = str(self.path / "tensorboard")
            self._writer = board.SummaryWriter(folder, purge_step=start + 1 if start else None)
        if weights is not None:
            self._wandb = weights.init(
                project=wandb,
                id=_run_id(self.path / "wandb_id"),
                resume="allow",
                dir=str(self.path),
                config=config,
            )
        self._progress = Progress(total, unit, start=start, quiet=quiet)

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line.

        Args:
          step: the step, never less than the one before.
          metrics: names to numbers, arrays, text or None. JAX arrays are fetched, which waits for
            the device: call it every so many steps.

        Raises:
          ValueError: the step goes back, or a name or value isn't allowed.
          OSError: the disk is full, say; the file still holds whole lines.
        """
        if step < self._last:
            raise ValueError(f"step must be at least {self._last}, the last one, found {step}")
        for name in metrics:
            if name in _RESERVED:
                raise ValueError(f"a metric cannot be called {name!r}; reserved are {_RESERVED}")
        self._last = step
        if self._file is None:
            return
        plain = {name: to_plain(value) for name, value in metrics.items()}
        self._file.append({"step": step, "time": round(time.time(), 3), **plain})
        numbers = {name: _number(value) for name, value in plain.items()}
        scalars = {name: value for name, value in numbers.items() if value is not None}
        if self._writer is not None:
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)
        if self._progress is not None:
            self._progress.update(step, scalars)

    def close(self) -> None:
        """Ends the bar and flushes the sinks; a second call does nothing."""
        if self._progress is not None:
            self._progress.close()
        if self._writer is not None:
            self._writer.close()
        if self._wandb is not None:
            self._wandb.finish()
        if self._file is not None:
            self._file.close()
        self._progress = self._writer = self._wandb = self._file = None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        return float(value) if value in ("NaN", "Infinity", "-Infinity") else None
    return float(value) if isinstance(value, (bool, int, float)) else None


def _optional(module: str, what: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        message = f"{what} logging needs {module}: pip install 'fourfold[log]'"
        raise ImportError(message) from error


def _run_id(path: Path) -> str:
    if not path.exists():
        path.write_text(secrets.token_hex(8))
    return path.read_text().strip()
