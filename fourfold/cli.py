"""`fourfold reproduce` runs the claims and writes the report; `fourfold claims` lists them."""

from __future__ import annotations

import dataclasses
import datetime
import shlex
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich import progress as bars
from rich.console import Console
from rich.markup import escape

from fourfold import claims
from fourfold.claims import Claim, Scale, store
from fourfold.report import write_report
from fourfold.runtime.hardware import hardware
from fourfold.runtime.progress import format_seconds


@dataclasses.dataclass(frozen=True)
class Reproduce:
    """Runs the claims and writes an HTML report with the paper's figures beside ours.

    A claim finished earlier in the same folder at the same scale is taken as it is, so a run that
    was stopped goes on where it was.
    """

    scale: Scale = "laptop"
    """How much to run: laptop is 2 CPU cores and 20 minutes in all, gpu is one GPU and hours,
    paper is the paper's own protocol."""
    only: tuple[str, ...] = ()
    """Names of the claims to run, as `fourfold claims` lists them. Without any, all are run."""
    out: Path = Path("reports")
    """Folder to write to; each scale has a folder in it."""
    fresh: bool = False
    """Run claims again that were finished earlier."""


@dataclasses.dataclass(frozen=True)
class Claims:
    """Lists the claims."""


Command = (
    Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
    | Annotated[Claims, tyro.conf.subcommand("claims")]
)


class _Display:
    """A claim's progress: a bar on a terminal, elsewhere a line every half minute."""

    EVERY = 30.0

    def __init__(self, name: str, console: Console) -> None:
        self._name, self._console = name, console
        self._began = self._printed = time.monotonic()
        self._bar: bars.Progress | None = None
        if console.is_terminal:
            self._bar = bars.Progress(
                bars.TextColumn(escape(name)),
                bars.BarColumn(bar_width=24),
                bars.TaskProgressColumn(),
                bars.TimeElapsedColumn(),
                bars.TextColumn("[dim]{task.description}"),
                console=console,
            )
            self._task = self._bar.add_task("", total=1.0)
            self._bar.start()
        else:
            console.out(f"{name}: started", highlight=False)

    def __call__(self, fraction: float, message: str) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=fraction, description=escape(message))
            return
        now = time.monotonic()
        if now - self._printed >= self.EVERY:
            self._printed = now
            passed = format_seconds(now - self._began)
            line = f"{self._name}: {fraction:.0%} after {passed}, {message}"
            self._console.out(line, highlight=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


def _run(name: str, command: Reproduce, folder: Path, console: Console) -> Claim:
    """Runs one claim; whatever it raises becomes a claim with an error."""
    again = ["fourfold", "reproduce", "--scale", command.scale, "--only", name]
    if command.out != Path("reports"):
        again += ["--out", str(command.out)]
    display = _Display(name, console)
    began = time.monotonic()
    today = datetime.date.today().isoformat()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim = claims.load(name)(command.scale, folder, display)
        claim = dataclasses.replace(
            claim,
            name=name,
            scale=command.scale,
            date=today,
            command=claim.command or shlex.join(again),
            hardware=claim.hardware or hardware(),
            seconds=claim.seconds or time.monotonic() - began,
        )
        store.save(claim, folder)
        return claim
    except (Exception, SystemExit) as error:
        trace = traceback.format_exc()
        console.out(trace, highlight=False)
        return Claim(
            name=name,
            title=claims.CLAIMS[name].summary,
            paper="",
            text="",
            command=shlex.join(again),
            seconds=time.monotonic() - began,
            error=f"{type(error).__name__}: {error}",
            scale=command.scale,
            date=today,
        )
    finally:
        display.close()


def reproduce(command: Reproduce) -> int:
    """Runs the claims, rewriting the report after each, and prints where it is.

    Returns:
      The exit status: 0, or 1 where a claim failed.

    Raises:
      ValueError: an unknown claim.
    """
    names = claims.select(command.only)
    console = Console(stderr=True)
    out = command.out / command.scale
    # The page shows every claim that is finished here, also those that weren't asked for now.
    earlier = {name: store.load(out / name, command.scale) for name in claims.CLAIMS}
    done = {name: claim for name, claim in earlier.items() if claim is not None}
    failed = False
    report = out
    for name in names:
        if name in done and not command.fresh:
            console.out(f"{name}: finished earlier, on {done[name].date}", highlight=False)
        else:
            if command.fresh:
                shutil.rmtree(out / name, ignore_errors=True)  # parts of an earlier attempt, too
            done[name] = _run(name, command, out / name, console)
        claim = done[name]
        failed |= claim.error is not None
        report = write_report([done[n] for n in claims.CLAIMS if n in done], out, command.scale)
        words = f"failed: {claim.error}" if claim.error is not None else claim.verdict or "done"
        print(f"{name}: {words} ({format_seconds(claim.seconds)})")
    print(f"Report: {report.absolute()}")
    return int(failed)


def main(argv: Sequence[str] | None = None) -> int:
    """The `fourfold` command.

    Args:
      argv: the arguments; None for the process's own.

    Returns:
      The exit status: 0, 1 where a claim failed, 2 for an unknown claim or an unusable folder,
      130 where it was interrupted.
    """
    command: Reproduce | Claims = tyro.cli(
        Command,  # pyright: ignore[reportArgumentType]
        prog="fourfold",
        description="Published results in JAX, reproduced.",
        args=argv,
    )
    if isinstance(command, Claims):
        width = max(map(len, claims.CLAIMS))
        for name, entry in claims.CLAIMS.items():
            print(f"{name:<{width}}  {entry.summary}")
        return 0
    try:
        return reproduce(command)
    except (ValueError, OSError) as error:
        print(f"fourfold: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fourfold: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
