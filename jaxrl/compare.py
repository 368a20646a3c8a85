"""Evaluated Atari runs beside the published scores of the same games."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fourfold.runtime.metrics import METRICS, read_metrics
from fourfold.runtime.run_dir import RunDir, differences
from jaxrl import config_io, scores
from jaxrl.config import AgentConfig, AtariConfig
from jaxrl.train import FREE

# Shown beside ours, by protocol; and what those figures are.
PEERS = {
    "classic": {"C51": "c51_2017", "Rainbow": "rainbow_2018"},
    "modern": {"C51": "C51", "Rainbow": "Rainbow"},
}
SOURCES = {
    "classic": "published: each game's best checkpoint, evaluated",
    "modern": "published: training games, mean of the last five of 200 iterations (Dopamine)",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """The evaluations of one run.

    Attributes:
      config: its configuration.
      game: canonical name, or the emulator's in lower case where it has none.
      steps: int `(K,)`, agent steps at which it was evaluated.
      returns: float `(K,)`, mean unclipped return of each evaluation.
    """

    config: AtariConfig
    game: str
    steps: np.ndarray
    returns: np.ndarray


def read(path: Path) -> Run:
    """Reads one run folder.

    Raises:
      FileNotFoundError: no run is there.
      ValueError: it isn't one on Atari, or was never evaluated.
    """
    run = RunDir.open(path)
    config = config_io.from_json(run.saved_config())
    if not isinstance(config, AtariConfig):
        raise ValueError(f"{path} holds a MinAtar run; scores are compared for Atari")
    rows = read_metrics(path) if (path / METRICS).exists() else []
    found = [(row["step"], row["evaluation/return"]) for row in rows if "evaluation/return" in row]
    if not found:
        raise ValueError(f"{path} was not evaluated yet; evaluate_every is {config.evaluate_every}")
    steps, returns = zip(*found, strict=True)
    try:
        game = scores.canonical_name(config.game)
    except ValueError:  # in none of the tables
        game = config.game.lower()
    return Run(config, game, np.array(steps), np.array(returns, float))


def read_all(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Reads the folders that hold evaluated Atari runs; why the others don't, a line each.

    Raises:
      ValueError: none does; the message says why of the first.
    """
    runs, skipped = [], []
    for path in paths:
        try:
            runs.append(read(path))
        except (ValueError, OSError) as error:
            skipped.append(str(error))
    if not runs:
        raise ValueError(skipped[0] if skipped else "no run folder was given")
    return runs, skipped


def describe(agent: AgentConfig) -> str:
    """Names an agent by what sets it apart.

    >>> describe(AgentConfig(spectral=("-2L",), scheduler="div_grad"))
    'c51 div_grad[-2L]'
    """
    layers = ",".join(agent.spectral)
    if agent.scheduler != "none":
        return f"{agent.loss} {agent.scheduler}[{layers}]"
    return f"{agent.loss} SN[{layers}]" if layers else agent.loss


def compare(runs: Sequence[Run], *, best: bool = False) -> list[dict[str, Any]]:
    """Compares runs with published scores, one table per configuration.

    Runs are seeds and games of one agent where nothing else sets their configurations apart, but
    for how long they are and how they are watched.

    Args:
      runs: from `read`, several seeds and games among them.
      best: take each run's best evaluation in place of its last.

    Returns:
      Per configuration JSON data: `agent`, a name; `changes`, what else differs from the first
      table of that name; `games`, a list with `game`, `seeds`, `steps` (least and most agent steps
      at which the scores were taken), `score` (mean over seeds), `human_normalised` (%, None where
      no human score is published) and the peers' scores; and over the games that have all of
      these, `count`, of how many (`published`), and under `median` and `iqm` ours with its 95 %
      stratified bootstrap interval and the peers', in per cent.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_apart(run.config), sort_keys=True), []).append(run)
    tables, first = [], {}
    for group in groups.values():
        config = group[0].config
        name = f"{describe(config.agent)}, {config.protocol} protocol"
        apart = first.setdefault(name, _apart(config))
        changes = [line.replace("saved", "first") for line in differences(apart, _apart(config))]
        tables.append({"agent": name, "protocol": config.protocol, "changes": changes})
        tables[-1] |= {"best": best, **_table(config.protocol, group, best)}
    return tables


def _apart(config: AtariConfig) -> dict[str, Any]:
    """What tells one agent's configuration from another's, as JSON data."""
    data = json.loads(json.dumps(config_io.to_json(config)))
    for name in ("game", "seed", "replay", *FREE):
        del data[name]
    return data


def _table(protocol: str, runs: list[Run], best: bool) -> dict[str, Any]:
    peers = {name: scores.published(key, protocol) for name, key in PEERS[protocol].items()}
    published = [g for g in scores.games() if all(g in table for table in peers.values())]
    rows, ours = [], {}
    for game in sorted({run.game for run in runs}):
        own = [run for run in runs if run.game == game]
        taken = [int(run.returns.argmax()) if best else -1 for run in own]
        values = [float(run.returns[i]) for run, i in zip(own, taken, strict=True)]
        steps = [int(run.steps[i]) for run, i in zip(own, taken, strict=True)]
        normalised = scores.human_normalised(game, values) if scores.has_human(game) else None
        row: dict[str, Any] = {"game": game, "seeds": len(own), "steps": [min(steps), max(steps)]}
        row["score"] = float(np.mean(values))
        row["human_normalised"] = None if normalised is None else float(normalised.mean())
        rows.append(row | {name: table.get(game) for name, table in peers.items()})
        if game in published:
            ours[game] = normalised
    summary: dict[str, Any] = {"games": rows, "count": len(ours), "published": len(published)}
    if ours:
        theirs = {
            name: [scores.human_normalised(game, [table[game]]) for game in ours]
            for name, table in peers.items()
        }
        for statistic in ("median", "iqm"):
            point, low, high = scores.interval(list(ours.values()), statistic)
            summary[statistic] = {
                "ours": point,
                "low": low,
                "high": high,
                **{name: scores.interval(x, statistic, reps=1).point for name, x in theirs.items()},
            }
    return summary


def show(tables: list[dict[str, Any]]) -> None:
    """Prints tables for people."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    for data in tables:
        peers = list(PEERS[data["protocol"]])
        which = "best" if data["best"] else "last"
        title = "; ".join([data["agent"], f"{which} evaluation of each run", *data["changes"]])
        table = Table("game", title=Text(title))  # as it is: [-2] is no markup
        for name in ("seeds", "at step", "score", "human-normalised", *peers):
            table.add_column(name, justify="right")
        for row in data["games"]:
            cells = [row["score"], row["human_normalised"], *(row[name] for name in peers)]
            words = ["–" if x is None else f"{x:,.1f}" for x in cells]
            words[1] += " %" if row["human_normalised"] is not None else ""
            steps = " to ".join(f"{x:,}" for x in dict.fromkeys(row["steps"]))
            table.add_row(row["game"], str(row["seeds"]), steps, *words)
        console.print(table)
        for statistic in ("median", "iqm"):
            if statistic in data:
                found = data[statistic]
                theirs = ", ".join(f"{name} {found[name]:.2f} %" for name in peers)
                line = (
                    f"{statistic} over {data['count']} of {data['published']} games: "
                    f"{found['ours']:.2f} % [{found['low']:.2f}, {found['high']:.2f}]; "
                    f"same games: {theirs}"
                )
                console.print(Text(line))
        console.print(Text(SOURCES[data["protocol"]]))


def to_json(tables: list[dict[str, Any]]) -> str:
    """The tables as JSON lines."""
    return "\n".join(json.dumps(table) for table in tables)
