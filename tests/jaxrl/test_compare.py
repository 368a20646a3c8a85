"""Runs beside published scores: folders written by hand, figures from the published tables."""

import dataclasses
import json
import re

import numpy as np
import pytest

from fourfold.runtime.metrics import METRICS
from fourfold.runtime.run_dir import RunDir
from jaxrl import cli, compare, config_io, scores
from jaxrl.config import AgentConfig, AtariConfig, MinAtarConfig

SN = AgentConfig(spectral=("-2",))


def write(path, game, returns, **changes):
    config = AtariConfig(**{"game": game, "agent": SN, **changes})
    RunDir.create(path, config_io.to_json(config))
    rows = [{"step": 50 * k, "loss": 1.0} for k in range(1, 2 * len(returns) + 2)]
    for k, value in enumerate(returns):
        rows[2 * k + 1]["evaluation/return"] = value
    (path / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_published_scores_give_the_published_median(tmp_path):
    rainbow = scores.published("rainbow_2018")
    paths = [write(tmp_path / game, game, [1.0, score]) for game, score in rainbow.items()]
    (table,) = compare.compare(compare.read_all(paths)[0])
    assert table["agent"] == "c51 SN[-2], classic protocol"
    assert (table["protocol"], table["count"], table["published"]) == ("classic", 54, 54)
    median = table["median"]
    assert round(median["Rainbow"], 2) == 227.05
    for name in ("ours", "low", "high"):  # one seed a game: nothing to resample
        assert median[name] == pytest.approx(median["Rainbow"])
    assert table["iqm"]["ours"] == pytest.approx(table["iqm"]["Rainbow"])
    assert median["C51"] < median["ours"]


def test_last_or_best_and_seeds_are_averaged(tmp_path):
    a = write(tmp_path / "a", "Pong", [3.0, 20.0, 10.0])
    b = write(tmp_path / "b", "Pong", [-5.0, 14.0], seed=1)
    (last,) = compare.compare([compare.read(a), compare.read(b)])
    (best,) = compare.compare([compare.read(a), compare.read(b)], best=True)
    assert last["games"][0] | {"C51": 0, "Rainbow": 0} == {
        "game": "pong",
        "seeds": 2,
        "steps": [200, 300],
        "score": 12.0,
        "human_normalised": pytest.approx(100 * (12 + 20.7) / 35.3),
        "C51": 0,
        "Rainbow": 0,
    }
    assert best["games"][0]["score"] == 17.0
    assert last["median"]["low"] < last["median"]["ours"] < last["median"]["high"]
    assert not last["best"] and best["best"]


def test_agents_and_protocols_are_kept_apart(tmp_path):
    div = AgentConfig(spectral=("-2L",), scheduler="div_grad")
    paths = [
        write(tmp_path / "a", "Pong", [1.0]),
        write(tmp_path / "b", "Pong", [2.0], agent=div),
        write(tmp_path / "c", "Pong", [3.0], protocol="modern"),
        write(tmp_path / "d", "Pong", [4.0], agent=AgentConfig("dqn")),
    ]
    tables = compare.compare(compare.read_all(paths)[0])
    assert [table["agent"] for table in tables] == [
        "c51 SN[-2], classic protocol",
        "c51 div_grad[-2L], classic protocol",
        "c51 SN[-2], modern protocol",
        "dqn, classic protocol",
    ]
    assert [table["games"][0]["score"] for table in tables] == [1.0, 2.0, 3.0, 4.0]
    assert not any(table["changes"] for table in tables)
    assert tables[2]["games"][0]["C51"] == scores.published("C51", "modern")["pong"]


def test_another_configuration_is_no_seed_of_the_first(tmp_path):
    slow = dataclasses.replace(SN, learning_rate=1e-5)
    paths = [
        write(tmp_path / "a", "Pong", [1.0]),
        write(tmp_path / "b", "Pong", [3.0], agent=slow, n_step=3),
        write(tmp_path / "c", "Pong", [5.0], seed=1, steps=1_000, log_every=7, replay="device"),
    ]
    ours, other = compare.compare(compare.read_all(paths)[0])
    assert ours["games"][0]["score"] == 3.0 and ours["games"][0]["seeds"] == 2
    assert other["games"][0]["score"] == 3.0 and other["games"][0]["seeds"] == 1
    assert ours["changes"] == []
    assert other["changes"] == [
        "agent.learning_rate: first 0.00025, given 1e-05",
        "n_step: first 1, given 3",
    ]


def test_games_without_a_peer_or_a_human_stay_out_of_the_median(tmp_path):
    paths = [
        write(tmp_path / "a", "Riverraid", [5_000.0]),  # Rainbow has no score
        write(tmp_path / "b", "AirRaid", [5_000.0]),  # nor has a human
    ]
    (table,) = compare.compare(compare.read_all(paths)[0])
    assert table["count"] == 0 and "median" not in table
    by_name = {row["game"]: row for row in table["games"]}
    assert by_name["riverraid"]["Rainbow"] is None
    assert by_name["riverraid"]["human_normalised"] > 0
    assert by_name["air_raid"]["human_normalised"] is None


def test_what_cannot_be_read_is_named_and_left_out(tmp_path):
    unfinished = write(tmp_path / "a", "Pong", [])
    with pytest.raises(ValueError, match="a was not evaluated yet; evaluate_every is 250000"):
        compare.read(unfinished)
    (unfinished / METRICS).unlink()
    with pytest.raises(ValueError, match="not evaluated yet"):
        compare.read_all([unfinished])
    RunDir.create(tmp_path / "m", config_io.to_json(MinAtarConfig()))
    good = write(tmp_path / "b", "Pong", [2.0])
    runs, skipped = compare.read_all([unfinished, tmp_path / "m", good, tmp_path / "none"])
    assert [run.returns.tolist() for run in runs] == [[2.0]]
    assert ["not evaluated" in skipped[0], "MinAtar" in skipped[1], "no run" in skipped[2]] == [
        True
    ] * 3
    with pytest.raises(ValueError, match="no run folder was given"):
        compare.read_all([])


def test_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    every = AgentConfig(spectral=("all",))
    a = write(tmp_path / "a", "Pong", [3.0, 20.0], agent=every)
    cli.main(["scores", str(a), str(tmp_path)])
    said = capsys.readouterr()
    assert f"left out: no run: {tmp_path}" in said.err
    # Square brackets are no markup.
    assert "c51 SN[all], classic protocol; last evaluation of each run" in said.out
    assert re.search(r"200 │ +20\.0 │ +115\.3 %", said.out)
    assert "median over 1 of 54 games: 115.30 % [115.30, 115.30]" in said.out
    assert "best checkpoint" in said.out
    cli.main(["scores", str(a), "--json"])
    (line,) = capsys.readouterr().out.splitlines()
    table = json.loads(line)
    assert table["games"][0]["score"] == 20.0
    assert np.isfinite(list(table["iqm"].values())).all()
    b = write(tmp_path / "b", "Jamesbond", [500.0], protocol="modern")
    cli.main(["scores", str(b)])
    said = capsys.readouterr().out
    assert "median over 1 of 55 games" in said and "last five of 200 iterations" in said


def test_the_name_of_an_agent():
    assert compare.describe(dataclasses.replace(SN, loss="double_c51")) == "double_c51 SN[-2]"
    assert compare.describe(AgentConfig(spectral=("-2", "-3"))) == "c51 SN[-2,-3]"
