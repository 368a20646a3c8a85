"""SIGTERM and SIGINT as a flag that the training loop reads between updates."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from fourfold.runtime import mesh


class Preemption:
    """Turns SIGTERM and SIGINT into a request to stop that the loop grants when it is ready.

    A second SIGINT raises KeyboardInterrupt at once, for a loop that no longer listens. Outside
    the main thread Python allows no signal handlers: there only `request` sets the flag.

    Example:
      with Preemption() as preemption:
          for step in range(...):
              ...
              if preemption.agreed():  # or .requested, in a run of one process
                  checkpoints.save(step, state)
                  print(preemption.farewell(step))
                  break
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self._reason: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None is a handler that Python did not install and cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._reason is not None:
            raise KeyboardInterrupt
        self.request(signal.Signals(number).name)

    def request(self, reason: str = "request") -> None:
        """Asks the loop to stop, as a signal would."""
        self._reason = self._reason or reason

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop."""
        return self._reason is not None

    def agreed(self) -> bool:
        """Whether any process was asked to stop; all processes get the same answer.

        With several processes this is a collective, so all must call it at the same steps: a save
        on one process alone would hang. Call it every few hundred updates, not at each.
        """
        stop = any(mesh.gather(int(self.requested)))
        if stop:
            self.request("another process")
        return stop

    def farewell(self, step: int, command: str | None = None) -> str:
        """The line to print before exiting with status 0.

        Args:
          step: the step that was saved.
          command: how to resume; None for this process's own command line with `--resume`.
        """
        return f"Stopped by {self._reason} at step {step}, saved. Resume: {command or _again()}"


def _again() -> str:
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if words[0] == "__main__.py" or words[0].endswith(".py"):
        words = ["python", sys.argv[0], *sys.argv[1:]]
    return shlex.join(words if "--resume" in words else [*words, "--resume"])
