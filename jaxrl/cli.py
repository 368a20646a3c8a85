"""The command line `jaxrl train | evaluate | watch | scores | presets | games`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from fourfold.runtime import mesh
from fourfold.runtime.commands import run_command
from jaxrl import presets
from jaxrl.config import AtariConfig, MinAtarConfig

T = TypeVar("T")
MINATAR_STEPS, MINATAR_EPSILON = 125_000, 0.001  # of an evaluation, for each agent

_USAGE = """usage: jaxrl COMMAND [OPTIONS]

  train      train an agent on Atari or MinAtar:
             jaxrl train --preset atari-c51-sn --game Pong [--out DIR]
             jaxrl train --out DIR --resume
  evaluate   the paper's evaluation of a run's checkpoint
  watch      a GIF or MP4 of a run's agent at play
  scores     evaluated Atari runs beside published C51 and Rainbow: jaxrl scores runs/*
  presets    the named configurations, with what to expect of them
  games      the Atari games that are installed

jaxrl COMMAND --help tells the options."""


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a training run lives and how it is watched."""

    out: Path | None = None
    """Folder of the run; unset: runs/PRESET-GAME-sSEED."""
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
class TrainAtari:
    """Train on an Atari game; times are in agent steps of four emulator frames."""

    config: Annotated[AtariConfig, tyro.conf.arg(name="")]
    run: Annotated[Run, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class TrainMinAtar:
    """Train on a MinAtar game, wholly on the device; times are in frames."""

    config: Annotated[MinAtarConfig, tyro.conf.arg(name="")]
    run: Annotated[Run, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Play full games with a checkpoint's agent and print the scores as JSON."""

    run: Path
    """Folder of the run."""
    checkpoint: int | None = None
    """Agent step of the checkpoint; unset: the newest."""
    steps: int | None = None
    """Agent steps to play; unset: as configured, on MinAtar 125,000 (the paper's)."""
    epsilon: float | None = None
    """Probability of a random action, in [0, 1]; unset: as configured, on MinAtar 0.001."""
    num_envs: int = 8
    """Games side by side; on MinAtar those of each agent."""
    seed: int = 0
    """Of the games."""


@dataclasses.dataclass(frozen=True)
class Watch:
    """Write a film of a checkpoint's agent at play, its value distributions beside the screen."""

    run: Path
    """Folder of the run."""
    out: Path
    """File to write; its ending says what: .gif or .mp4."""
    checkpoint: int | None = None
    """Agent step of the checkpoint; unset: the newest."""
    steps: int = 1_000
    """Agent steps at most; the film ends with the game."""
    epsilon: float | None = None
    """Probability of a random action, in [0, 1]; unset: as configured."""
    seed: int = 0
    """Of the game."""
    member: int = 0
    """On MinAtar: which agent of the run, from 0; seeds vary fastest."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """Set evaluated Atari runs beside published scores of the same games."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of the runs; several seeds of a game are averaged."""
    best: bool = False
    """Take each run's best evaluation in place of its last, as the classic tables do."""
    json: bool = False
    """Print JSON lines in place of tables."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line; errors that a user can mend are printed in one line."""
    commands: dict[str, Callable[[list[str]], None]] = {
        "train": _train,
        "evaluate": _evaluate,
        "watch": _watch,
        "scores": _scores,
        "presets": _presets,
        "games": _games,
    }
    run_command("jaxrl", _USAGE, commands, args)


def _train(words: list[str]) -> None:
    words, name = _take(words, "--preset")
    if name is not None:
        config = presets.get(name).config
    elif "--resume" in words:
        config = _saved_config(words)
    elif {"-h", "--help"} & set(words):
        config = presets.get("atari-c51-sn").config
    else:
        raise ValueError(f"give --preset, one of {', '.join(presets.presets())}; or --resume")
    cls = TrainAtari if isinstance(config, AtariConfig) else TrainMinAtar
    prog = f"jaxrl train --preset {name or 'NAME'}"
    given: Any = tyro.cli(cls, default=cls(config, Run()), args=words, prog=prog)  # pyright: ignore[reportArgumentType]
    mesh.initialize()
    if cls is TrainAtari:
        from jaxrl.train import train
    else:
        mesh.one_cpu_device_per_core()
        from jaxrl.train_minatar import train
    options = {f.name: getattr(given.run, f.name) for f in dataclasses.fields(Run)}
    default = Path("runs") / f"{name}-{given.config.game.lower()}-s{given.config.seed}"
    train(given.config, options.pop("out") or default, **options)


def _evaluate(words: list[str]) -> None:
    given = tyro.cli(Evaluate, args=words, prog="jaxrl evaluate")
    from jaxrl.load import load_agent

    loaded = load_agent(given.run, given.checkpoint)
    report = {"game": loaded.config.game, "checkpoint": loaded.step}
    options: Any = {"num_envs": given.num_envs, "seed": given.seed, "progress": True}
    if isinstance(loaded.config, AtariConfig):
        from jaxrl.evaluate import evaluate

        changes = {"evaluate_steps": given.steps, "evaluate_epsilon": given.epsilon}
        config = _override(loaded.config, **changes)
        scores: Any = evaluate(loaded.agent, loaded.state, config, **options)
        report |= {**scores.metrics(), "returns": scores.returns.tolist()}
    else:
        from jaxrl import evaluate_minatar

        options["steps"] = _or(given.steps, MINATAR_STEPS)
        options["epsilon"] = _or(given.epsilon, MINATAR_EPSILON)
        options["bounds"] = loaded.bounds
        config = loaded.config
        returns = evaluate_minatar.evaluate(loaded.agent, loaded.state, config.game, **options)
        means = [float(r.mean()) for r in returns]
        report |= {"evaluation/return": sum(means) / len(means), "agents": means}
        report |= {"evaluation/games": [len(r) for r in returns]}
    print(json.dumps(report))


def _watch(words: list[str]) -> None:
    given = tyro.cli(Watch, args=words, prog="jaxrl watch")
    import jax

    from jaxrl import agent as agents
    from jaxrl import watch
    from jaxrl.load import load_agent

    loaded = load_agent(given.run, given.checkpoint)
    agent, state = loaded.agent, loaded.state
    if isinstance(loaded.config, AtariConfig):
        config = _override(loaded.config, evaluate_epsilon=given.epsilon)
        scene = watch.atari_scene(agent, config)
        moments = watch.atari_moments(agent, state, config, seed=given.seed)
    else:
        game, count = loaded.config.game, state.updates.shape[0]
        if not 0 <= given.member < count:
            raise ValueError(f"member must be in 0..{count - 1}, found {given.member}")
        epsilon = _or(given.epsilon, MINATAR_EPSILON)
        if loaded.bounds is not None:
            agent = agents.with_bound(agent, loaded.bounds[given.member])
        one = jax.tree.map(lambda x: x[given.member], state)
        scene = watch.minatar_scene(game, agent.config, epsilon)
        moments = watch.minatar_moments(agent, one, game, epsilon=epsilon, seed=given.seed)
    score = watch.watch(scene, moments, given.out, steps=given.steps)
    print(f"{given.out}: {score:g} points")


def _scores(words: list[str]) -> None:
    given = tyro.cli(Scores, args=words, prog="jaxrl scores")
    from jaxrl import compare

    runs, skipped = compare.read_all(given.runs)
    for reason in skipped:
        print(f"left out: {reason}", file=sys.stderr)
    tables = compare.compare(runs, best=given.best)
    if given.json:
        print(compare.to_json(tables))
    else:
        compare.show(tables)


def _presets(words: list[str]) -> None:
    _no_options("presets", words)
    for name, preset in presets.presets().items():
        print(f"{name}\n  {preset.command(name)}\n  {preset.run_time}\n  {preset.expect}")


def _games(words: list[str]) -> None:
    _no_options("games", words)
    from jaxrl.envs import list_games

    print("\n".join(list_games()))


def _take(words: list[str], option: str) -> tuple[list[str], str | None]:
    """Takes `option VALUE` or `option=VALUE` out of the words."""
    for i, word in enumerate(words):
        if word.startswith(f"{option}="):
            return words[:i] + words[i + 1 :], word.split("=", 1)[1]
        if word == option:
            if i + 1 == len(words):
                raise ValueError(f"{option} needs a value")
            return words[:i] + words[i + 2 :], words[i + 1]
    return words, None


def _saved_config(words: list[str]) -> AtariConfig | MinAtarConfig:
    from fourfold.runtime.run_dir import RunDir
    from jaxrl import config_io

    _, out = _take(words, "--out")
    if out is None:
        raise ValueError("--resume needs --out, the folder of the run to go on with")
    return config_io.from_json(RunDir.open(out).saved_config())


def _override(config: AtariConfig, **changes: Any) -> AtariConfig:
    given = {name: value for name, value in changes.items() if value is not None}
    return dataclasses.replace(config, **given)


def _or(given: T | None, default: T) -> T:
    return default if given is None else given


def _no_options(command: str, words: list[str]) -> None:
    if words:
        raise ValueError(f"{command} takes no options, found {' '.join(words)}")


if __name__ == "__main__":
    main()
