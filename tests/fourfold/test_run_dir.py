"""Run folders: made once, opened again with the same configuration only."""

import dataclasses
import json
from pathlib import Path

import pytest

from fourfold.runtime.run_dir import RunDir


@dataclasses.dataclass(frozen=True)
class Optimiser:
    lr: float = 2.5e-4
    betas: tuple[float, float] = (0.9, 0.999)


@dataclasses.dataclass(frozen=True)
class Config:
    game: str = "Pong"
    steps: int = 100
    optimiser: Optimiser = Optimiser()
    data: Path | None = Path("data")


def test_create_then_open(tmp_path):
    run = RunDir.create(tmp_path / "runs" / "a", Config())
    assert json.loads((run.path / "config.json").read_text())["optimiser"]["betas"] == [0.9, 0.999]
    again = RunDir.open(run.path, Config())
    assert again == run and again.saved_config()["data"] == "data"
    assert RunDir.open(run.path).saved_config()["game"] == "Pong"
    assert run.checkpoints.parent == run.plots.parent == run.path


def test_an_occupied_folder_is_refused(tmp_path):
    RunDir.create(tmp_path / "a", Config())
    with pytest.raises(FileExistsError, match=r"holds a run \(config\.json\).*--resume"):
        RunDir.create(tmp_path / "a", Config())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("")
    with pytest.raises(FileExistsError, match=r"holds other files \(thesis\.tex\)"):
        RunDir.create(tmp_path / "b", Config())
    (tmp_path / "c").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file"):
        RunDir.create(tmp_path / "c", Config())


def test_an_empty_folder_and_one_killed_at_birth_can_be_used(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".config.json.tmp").write_text('{"ga')
    RunDir.create(tmp_path / "a", Config())
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["config.json"]


def test_a_missing_run_lists_what_is_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist; runs in .*: none"):
        RunDir.open(tmp_path / "nowhere" / "x", Config())
    for name in ("alpha", "beta"):
        RunDir.create(tmp_path / name, Config())
    with pytest.raises(FileNotFoundError, match="gamma does not exist; .*: alpha, beta"):
        RunDir.open(tmp_path / "gamma", Config())
    with pytest.raises(FileNotFoundError, match="has no config.json.*runs inside it: alpha, beta"):
        RunDir.open(tmp_path, Config())


def test_differences_are_named_field_by_field(tmp_path):
    RunDir.create(tmp_path / "a", Config())
    other = Config(game="Breakout", optimiser=Optimiser(lr=1e-3))
    with pytest.raises(ValueError) as caught:
        RunDir.open(tmp_path / "a", other)
    text = str(caught.value)
    assert 'game: saved "Pong", given "Breakout"' in text
    assert "optimiser.lr: saved 0.00025, given 0.001" in text
    assert "betas" not in text and "steps" not in text


def test_free_fields_may_differ_and_others_may_appear(tmp_path):
    RunDir.create(tmp_path / "a", Config())
    longer = Config(steps=200, optimiser=Optimiser(lr=1.0))
    assert RunDir.open(tmp_path / "a", longer, free=("steps", "optimiser"))
    with pytest.raises(ValueError, match=r"optimiser\.lr"):
        RunDir.open(tmp_path / "a", longer, free=("steps", "optim"))
    with pytest.raises(ValueError, match="new: saved absent, given 1.*|game: saved"):
        RunDir.open(tmp_path / "a", {"new": 1})


def test_what_json_cannot_hold(tmp_path):
    with pytest.raises(ValueError, match="cannot hold .* of type set"):
        RunDir.create(tmp_path / "a", {"layers": {1, 2}})
    assert not (tmp_path / "a").exists()
    RunDir.create(tmp_path / "b", Config())
    (tmp_path / "b" / "config.json").write_text('{"game"')
    with pytest.raises(ValueError, match="is not JSON"):
        RunDir.open(tmp_path / "b", Config())
