"""Evaluated Atari runs beside the published scores of the same games."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fourfold.runtime.metrics import METRICS, read_metrics
from fourfold.runtime.run_dir import RunDir
from jaxrl import config_io, scores
from jaxrl.config import AgentConfig, AtariConfig

# Shown beside ours, by protocol.
PEERS = {
    "classic": {"C51": "c51_2017", "Rainbow": "rainbow_2018"},
    "modern": {"C51": "C51", "Rainbow": "Rainbow"},
}


@dataclasses.dataclass(frozen=True)
class Run:
    """The evaluations of one run.

    Attributes:
      path: its folder.
      agent: what was trained, such as "c51 SN[-2]".
      game: canonical name.
      protocol: "classic" or "modern".
      seed: of the run.
      steps: int `(K,)`, agent steps at which it was evaluated.
      returns: float `(K,)`, mean unclipped return of each evaluation.
    """

    path: Path
    agent: str
    game: str
    protocol: str
    seed: int
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
    return Run(
        path=path,
        agent=describe(config.agent),
        game=scores.canonical_name(config.game),
        protocol=config.protocol,
        seed=config.seed,
        steps=np.array(steps),
        returns=np.array(returns, float),
    )


def describe(agent: AgentConfig) -> str:
    """Names an agent by what sets it apart.

    >>> describe(AgentConfig(spectral=("-2L",), scheduler="div_grad"))
    'c51 div_grad[-2L]'
    """
    layers = ",".join(agent.spectral)
    if agent.scheduler != "none":
        return f"{agent.loss} {agent.scheduler}[{layers}]"
    return f"{agent.loss} SN[{layers}]" if layers else agent.loss


def compare(paths: Sequence[Path], *, best: bool = False) -> list[dict[str, Any]]:
    """Compares runs with published scores, one table per agent and protocol.

    Args:
      paths: run folders, several seeds and games among them.
      best: take each run's best evaluation, as the tables of the classic protocol do, in place
        of its last.

    Returns:
      Per agent and protocol JSON data: `games`, a list with `game`, `seeds`, `score` (mean over
      seeds), `human_normalised` (%, None where no human score is published) and the peers'
      scores; and over the games that have all of these, `count`, and under `median` and `iqm`
      ours with its 95 % stratified bootstrap interval and the peers', in per cent.

    Raises:
      FileNotFoundError, ValueError: as `read`, for the first folder that can't be read; or no
        folder.
    """
    if not paths:
        raise ValueError("no run folder was given")
    groups: dict[tuple[str, str], dict[str, list[float]]] = {}
    for run in map(read, paths):
        score = float(run.returns.max() if best else run.returns[-1])
        group = groups.setdefault((run.agent, run.protocol), {})
        group.setdefault(run.game, []).append(score)
    return [
        {"agent": agent, "protocol": protocol, "best": best, **_table(protocol, games)}
        for (agent, protocol), games in groups.items()
    ]


def _table(protocol: str, games: dict[str, list[float]]) -> dict[str, Any]:
    peers = {name: scores.published(key, protocol) for name, key in PEERS[protocol].items()}
    rows, ours = [], {}
    for game, values in sorted(games.items()):
        row: dict[str, Any] = {"game": game, "seeds": len(values), "score": float(np.mean(values))}
        known = game in scores.games()
        row["human_normalised"] = (
            float(scores.human_normalised(game, np.mean(values))) if known else None
        )
        row |= {name: table.get(game) for name, table in peers.items()}
        rows.append(row)
        if known and all(game in table for table in peers.values()):
            ours[game] = scores.human_normalised(game, values)
    summary: dict[str, Any] = {"games": rows, "count": len(ours)}
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

    console = Console()
    for data in tables:
        peers = list(PEERS[data["protocol"]])
        which = "best evaluation" if data["best"] else "last evaluation"
        title = f"{data['agent']}, {data['protocol']} protocol, {which} of each run"
        table = Table("game", title=title)
        for name in ("seeds", "score", "human-normalised", *peers):
            table.add_column(name, justify="right")
        for row in data["games"]:
            cells = [row["score"], row["human_normalised"], *(row[name] for name in peers)]
            words = ["–" if x is None else f"{x:,.1f}" for x in cells]
            words[1] += " %" if row["human_normalised"] is not None else ""
            table.add_row(row["game"], str(row["seeds"]), *words)
        console.print(table)
        for statistic in ("median", "iqm"):
            if statistic in data:
                found = data[statistic]
                theirs = ", ".join(f"{name} {found[name]:.2f} %" for name in peers)
                console.print(
                    f"{statistic} over {data['count']} of the paper's {len(scores.paper_games())} "
                    f"games: {found['ours']:.2f} % [{found['low']:.2f}, {found['high']:.2f}]; "
                    f"published, same games: {theirs}",
                    highlight=False,
                )


def to_json(tables: list[dict[str, Any]]) -> str:
    """The tables as JSON lines."""
    return "\n".join(json.dumps(table) for table in tables)
