"""The command line `vicreg pretrain | probe | embed | presets`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fourfold.runtime import mesh
from fourfold.runtime.commands import in_full, run_command
from fourfold.runtime.config_io import from_json
from fourfold.runtime.run_dir import RunDir
from vicreg import presets
from vicreg.config import PretrainConfig, ProbeConfig
from vicreg.health import CollapseError, NonFiniteError

_USAGE = """usage: vicreg COMMAND [OPTIONS]

  pretrain   pre-train a network without labels:
             vicreg pretrain --preset digits-laptop [--data NAME] [--data-dir DIR] [--out DIR]
             vicreg pretrain --out DIR --resume
  probe      score a run's features: linear, nearest neighbours, few labels
  embed      write a run's features as .npy files
  presets    the named configurations, with what to expect of them

vicreg COMMAND --help tells the options."""
# Options that are asked for most, without the name of the group that they are in.
_SHORT = {"--data": "--data.name", "--data-dir": "--data.data-dir"}


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a run lives and how it is watched."""

    out: Path | None = None
    """Folder of the run; unset: runs/PRESET-sSEED."""
    resume: bool = False
    """Go on with the run in the folder. Without --preset its own configuration is taken."""
    num_devices: int | None = None
    """Devices to train on, over all processes; unset: all."""
    tensorboard: bool = False
    """Also write TensorBoard event files."""
    wandb: str | None = None
    """Also log to this Weights & Biases project."""
    quiet: bool = False
    """No progress on the terminal."""


@dataclasses.dataclass(frozen=True)
class Pretrain:
    """Pre-train a network without labels.

    --data and --data-dir are short for --data.name and --data.data-dir.
    """

    config: Annotated[PretrainConfig, tyro.conf.arg(name="")]
    run: Annotated[Run, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class Probe:
    """Score a checkpoint's features and print the scores, fractions, as JSON."""

    run: Path
    """Folder of the run; the scores are kept in its probe/."""
    config: Annotated[ProbeConfig, tyro.conf.arg(name="")]
    checkpoint: int | None = None
    """Update of the checkpoint; unset: the newest."""
    random: bool = False
    """Score the untrained network that the run started from, as a baseline."""
    quiet: bool = False
    """No progress on the terminal."""


@dataclasses.dataclass(frozen=True)
class Embed:
    """Write the features of all images of a split, float32 (N, F), and their labels."""

    run: Path
    """Folder of the run."""
    out: Path
    """File to write, ending in .npy; the labels go beside it, to NAME_labels.npy."""
    split: Literal["train", "test"] = "test"
    """Of the run's data set."""
    checkpoint: int | None = None
    """Update of the checkpoint; unset: the newest."""
    random: bool = False
    """Take the untrained network that the run started from."""
    quiet: bool = False
    """No progress on the terminal."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; errors that a user can mend are printed in one line."""
    commands: dict[str, Callable[[list[str]], None]] = {
        "pretrain": _pretrain,
        "probe": _probe,
        "embed": _embed,
        "presets": _presets,
    }
    run_command("vicreg", _USAGE, commands, args, (CollapseError, NonFiniteError))


def _pretrain(words: list[str]) -> None:
    words = in_full(words, _SHORT)
    words, name = _take(words, "--preset")
    if name is not None:
        config = presets.get(name).config
    elif "--resume" in words:
        _, out = _take(words, "--out")
        if out is None:
            raise ValueError("--resume without --preset needs --out, the folder of the run")
        config = _saved_config(out)
    elif {"-h", "--help"} & set(words):
        config = presets.get("digits-laptop").config
    else:
        raise ValueError(f"give --preset, one of {', '.join(presets.presets())}; or --resume")
    prog = f"vicreg pretrain --preset {name or 'NAME'}"
    given = tyro.cli(Pretrain, default=Pretrain(config, Run()), args=words, prog=prog)
    mesh.initialize()
    from vicreg.train import pretrain

    options = {f.name: getattr(given.run, f.name) for f in dataclasses.fields(Run)}
    default = Path("runs") / f"{name}-s{given.config.seed}"
    pretrain(given.config, options.pop("out") or default, **options)


def _probe(words: list[str]) -> None:
    _, run = _take(words, "--run")
    default = _saved_config(run).evaluation if run else ProbeConfig()
    start = Probe(tyro.MISSING if run is None else Path(run), default)
    given = tyro.cli(Probe, default=start, args=words, prog="vicreg probe")
    step = _step(given)
    mesh.initialize()
    from vicreg.probe import probe

    report = probe(given.run, given.config, step, quiet=given.quiet)
    if mesh.is_lead():
        print(json.dumps(report))


def _embed(words: list[str]) -> None:
    given = tyro.cli(Embed, args=words, prog="vicreg embed")
    step = _step(given)
    mesh.initialize()
    from vicreg.probe import embed

    features, labels = embed(given.run, given.out, given.split, step, quiet=given.quiet)
    if mesh.is_lead():
        print(f"{features}\n{labels}")


def _step(given: Probe | Embed) -> int | None:
    if given.random and given.checkpoint is not None:
        raise ValueError("--random is the network before the first update: no --checkpoint with it")
    return 0 if given.random else given.checkpoint


def _presets(words: list[str]) -> None:
    if words:
        raise ValueError(f"presets takes no options, found {words}")
    for name, preset in presets.presets().items():
        print(f"{name}\n  {preset.command(name)}\n  {preset.run_time}\n  {preset.expect}\n")


def _take(words: list[str], option: str) -> tuple[list[str], str | None]:
    """Takes an option and its value out of the words."""
    for at, word in enumerate(words):
        if word.startswith(f"{option}="):
            return words[:at] + words[at + 1 :], word.partition("=")[2]
        if word == option:
            if at + 1 == len(words):
                raise ValueError(f"{option} needs a value")
            return words[:at] + words[at + 2 :], words[at + 1]
    return words, None


def _saved_config(path: str) -> PretrainConfig:
    return from_json(PretrainConfig, RunDir.open(path).saved_config())


if __name__ == "__main__":
    main()
