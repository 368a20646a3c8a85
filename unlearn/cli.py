"""The command line `unlearn train | predict | forget | plan | audit | certificate | status`."""

from __future__ import annotations

import dataclasses
import getpass
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from fourfold.runtime.commands import in_full, run_command
from fourfold.runtime.host_arrays import replacing, write_array, write_text
from unlearn.config import RunConfig

_USAGE = """usage: unlearn COMMAND [OPTIONS]

  train        train an ensemble that can forget:
               unlearn train --data digits --out runs/digits
  predict      write what it predicts of a file of records
  forget       remove records, by id, as if they had never been there:
               unlearn forget --run runs/digits --ids 17 42
  plan         how many shards and slices pay for the requests that are expected
  audit        measure what is left of records, beside models that never saw them
  certificate  check and show the certificate of a request
  status       what an ensemble holds, serves, and has been asked

unlearn COMMAND --help tells the options."""
_SHORT = {"--data": "--data.name", "--data-dir": "--data.data-dir"}


@dataclasses.dataclass(frozen=True)
class Train:
    """Train an ensemble that can forget.

    --data and --data-dir are short for --data.name and --data.data-dir.
    """

    out: Path
    """Folder of the run."""
    config: Annotated[RunConfig, tyro.conf.arg(name="")]
    resume: bool = False
    """Go on with the run in the folder, by its own configuration."""
    num_devices: int | None = None
    """Devices that share the shards; unset: all."""
    quiet: bool = False
    """No progress on the terminal."""


@dataclasses.dataclass(frozen=True)
class Predict:
    """Write the probabilities of each class, float32 (N, C); shares of votes where those decide."""

    run: Path
    """Folder of the run."""
    data: Path
    """File of records, as for training; labels are not needed."""
    out: Path
    """File to write, ending in .npy."""


@dataclasses.dataclass(frozen=True)
class Forget:
    """Remove records for good, and retrain what they had a part in."""

    run: Path
    """Folder of the run."""
    ids: tuple[str, ...] = ()
    """Of the records."""
    ids_file: Path | None = None
    """A file of ids, one a line."""
    who: str = dataclasses.field(default_factory=lambda: _user())
    """Who asks; it is kept, and stands in the certificate."""
    resume: bool = False
    """End what was interrupted; new ids may be given, too."""
    wait: float = 0.0
    """Seconds to wait for another process that forgets."""
    num_devices: int | None = None
    """Devices that share the retraining; unset: all."""
    quiet: bool = False
    """No progress on the terminal."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """Recommend shards and slices for the requests that are expected, or judge a choice; as JSON.

    Costs are in visits: a record in a pass of training.
    """

    records: int
    """Number of records."""
    requests: int
    """How many of them will be asked to be removed."""
    epochs: int = 10
    """Passes that training without slices takes."""
    one_by_one: bool = False
    """Serve each request at once, rather than all together."""
    shards: int | None = None
    """Judge this number of shards."""
    slices: int | None = None
    """Judge this number of slices."""
    checkpoints: int = 200
    """Most that can be stored: shards times slices."""


@dataclasses.dataclass(frozen=True)
class Audit:
    """Measure what ensembles like the run's keep of records that they forgot.

    Beside ones that never saw them. The report is printed, and kept in the run's audits/ as
    Markdown and JSON.
    """

    run: Path
    """Folder of the run."""
    ids: tuple[str, ...] = ()
    """Of records in the run, whose forgetting is rehearsed; the run itself is not changed."""
    forgotten: str | None = None
    """A file of records with labels that were forgotten earlier."""
    models: int = 48
    """Ensembles that forget, and as many again that never saw the records."""
    quiet: bool = False
    """No progress on the terminal."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """Check that a certificate is as it was written, and print it."""

    run: Path
    """Folder of the run."""
    request: int
    """Number of the request."""


@dataclasses.dataclass(frozen=True)
class Status:
    """Print what a run holds, which of its shards serve, and what it has been asked, as JSON."""

    run: Path
    """Folder of the run."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; errors that a user can mend are printed in one line."""
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "predict": _predict,
        "forget": _forget,
        "plan": _plan,
        "audit": _audit,
        "certificate": _certificate,
        "status": _status,
    }
    run_command("unlearn", _USAGE, commands, args)


def _train(words: list[str]) -> None:
    words = in_full(words, _SHORT)
    default = Train(tyro.MISSING, RunConfig())
    given = tyro.cli(Train, default=default, args=words, prog="unlearn train")
    from unlearn.train import train

    run = train(
        given.config,
        given.out,
        resume=given.resume,
        num_devices=given.num_devices,
        quiet=given.quiet,
    )
    found: dict[str, Any] = {"run": str(given.out), "records": len(run.table().ids)}
    print(json.dumps(found | {"accuracy": run.accuracy()}))


def _predict(words: list[str]) -> None:
    given = tyro.cli(Predict, args=words, prog="unlearn predict")
    if given.out.suffix != ".npy":
        raise ValueError(f"out must end in .npy, found {given.out}")
    from unlearn import data
    from unlearn.run import Run

    run = Run(given.run)
    table = data.read(str(given.data), run.config.data, labels=False)
    with replacing(given.out) as draft:
        write_array(draft, run.predict(table.x))
    print(given.out)


def _forget(words: list[str]) -> None:
    given = tyro.cli(Forget, args=words, prog="unlearn forget")
    ids = [*given.ids]
    if given.ids_file is not None:
        ids += given.ids_file.read_text().split("\n")
    ids = [word for word in ids if word]
    if not ids and not given.resume:
        raise ValueError("give --ids or --ids-file, or --resume to end what was interrupted")
    from unlearn.run import Run
    from unlearn.train import forget

    run = Run(given.run)
    requests = forget(
        run,
        ids,
        given.who,
        wait_seconds=given.wait,
        num_devices=given.num_devices,
        quiet=given.quiet,
    )
    found = {
        "run": str(given.run),
        "requests": [request.number for request in requests],
        "shards": sorted({shard for request in requests for shard in request.after}),
        "records": len(run.table().ids),
        "accuracy": run.accuracy(),
        "certificates": [str(run.certificate(request.number)) for request in requests],
    }
    print(json.dumps(found))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # as in a container, whose user has a number alone
        return f"user {os.getuid()}"


def _plan(words: list[str]) -> None:
    given = tyro.cli(Plan, args=words, prog="unlearn plan")
    from unlearn import planner

    if (given.shards is None) != (given.slices is None):
        raise ValueError("--shards and --slices are judged together: give both or neither")
    load = {"epochs": given.epochs, "batch": not given.one_by_one}
    if given.shards is None or given.slices is None:
        found = planner.recommend(
            given.records, given.requests, checkpoints=given.checkpoints, **load
        )
    else:
        found = planner.plan(given.records, given.requests, given.shards, given.slices, **load)
    facts = {**dataclasses.asdict(found), "speed_up": found.speed_up}
    print(json.dumps(facts, indent=2))


def _audit(words: list[str]) -> None:
    given = tyro.cli(Audit, args=words, prog="unlearn audit")
    from unlearn.examine import audit
    from unlearn.run import Run

    run = Run(given.run)
    reports = audit(run, given.ids, given.forgotten, given.models, quiet=given.quiet)
    folder = given.run / "audits"
    folder.mkdir(exist_ok=True)
    text = "\n".join(report.render() for report in reports)
    pages = [json.loads(report.to_json()) for report in reports]
    for name, page in (("audit.md", text), ("audit.json", json.dumps(pages, indent=2))):
        with replacing(folder / name) as draft:
            write_text(draft, page)
    print(text)


def _certificate(words: list[str]) -> None:
    given = tyro.cli(Certificate, args=words, prog="unlearn certificate")
    from unlearn import certificate
    from unlearn.run import Run

    print(json.dumps(certificate.verify(Run(given.run).certificate(given.request)), indent=2))


def _status(words: list[str]) -> None:
    given = tyro.cli(Status, args=words, prog="unlearn status")
    from unlearn.run import Run

    print(json.dumps(Run(given.run).status(), indent=2))


if __name__ == "__main__":
    main()
