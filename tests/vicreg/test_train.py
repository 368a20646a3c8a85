"""Pre-training runs: what they leave behind, that they resume, and when they stop themselves."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from fourfold.runtime.checkpoint import Checkpoints
from fourfold.runtime.metrics import read_metrics
from fourfold.runtime.run_dir import RunDir, to_json
from vicreg import health, train
from vicreg.config import DataConfig, LossConfig, OptimConfig
from vicreg.health import CollapseError, NonFiniteError
from vicreg.train import pretrain

# What depends on the clock, so is no part of a run's result.
CLOCK = ("time", "images_per_second", "waiting")


def lines(path):
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in read_metrics(path)]


def same(a, b):
    unwrap = lambda x: jax.random.key_data(x) if x.dtype.name.startswith("key") else x  # noqa: E731
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(unwrap(x), unwrap(y))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "whole"
    return path, pretrain(tiny(), path, num_devices=1, quiet=True)


def test_a_run_leaves_its_folder(whole, tiny):
    path, state = whole
    assert int(state.step) == 36
    assert Checkpoints(path / "checkpoints").steps() == [24, 36]
    assert json.loads((path / "config.json").read_text()) == json.loads(json.dumps(to_json(tiny())))
    assert (path / "plots" / "training.png").read_bytes().startswith(b"\x89PNG")
    rows = read_metrics(path)
    assert [row["step"] for row in rows if "loss" in row] == [4, 8, 12, 16, 20, 24, 28, 32, 36]
    assert [row["step"] for row in rows if "test/top1" in row] == [24, 36]
    terms = {"invariance", "variance", "covariance"}
    signs = {
        "std",
        "off_diagonal_covariance",
        "rankme",
        "rankme/backbone",
        "nonfinite",
        "grad_norm",
        "lr",
    }
    probes = {"probe/loss", "probe/top1"}
    for row in rows:
        if "loss" in row:
            assert terms | signs | probes | {"epoch", "images_per_second", "waiting"} <= set(row)
            weighted = 25 * row["invariance"] + 25 * row["variance"] + row["covariance"]
            assert row["loss"] == pytest.approx(weighted, rel=1e-5)
            assert 1 <= row["rankme"] <= 16.1 and 0 <= row["waiting"] <= 1
    assert rows[0]["loss"] > [row for row in rows if "loss" in row][-1]["loss"]


def command(config, path):
    """A run from its start by the command line, in a folder that only has its configuration."""
    RunDir.create(path, config)
    words = ["pretrain", "--out", str(path), "--resume", "--quiet"]
    return [sys.executable, "-m", "vicreg.cli", *words]


def environment(**more):
    # One device, but compiled as here, for the digits of a sum depend on its order.
    flags = os.environ["XLA_FLAGS"].split()
    flags = [flag for flag in flags if "host_platform_device_count" not in flag]
    env = os.environ | {"XLA_FLAGS": " ".join(flags)}
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    paths = [root, os.path.join(root, "ssl"), env.get("PYTHONPATH", "")]
    return env | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)} | more


def test_sigkill_and_resume_give_the_same_run_bit_for_bit(whole, tiny, tmp_path):
    path, state = whole
    run = tmp_path / "killed"
    process = subprocess.Popen(command(tiny(), run), env=environment())
    try:
        for _ in range(1200):
            if Checkpoints(run / "checkpoints").steps() or process.poll() is not None:
                break
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert Checkpoints(run / "checkpoints").steps()[:1] == [12]
    resumed = pretrain(tiny(), run, resume=True, num_devices=1, quiet=True)
    same(resumed, state)
    assert lines(run) == lines(path)


def test_a_stop_saves_and_says_how_to_go_on(whole, tiny, tmp_path, capsys, monkeypatch):
    path, state = whole

    class Stop(train.Preemption):
        asked = 0

        @property
        def requested(self):
            Stop.asked += 1
            if Stop.asked == 17:  # in the middle of an epoch, between two lines of the log
                self.request("SIGTERM")
            return super().requested

    monkeypatch.setattr(train, "Preemption", Stop)
    stopped = pretrain(tiny(), tmp_path / "run", num_devices=1, quiet=True)
    assert int(stopped.step) == 17 and "at step 17, saved. Resume:" in capsys.readouterr().out
    monkeypatch.undo()
    same(pretrain(tiny(), tmp_path / "run", resume=True, num_devices=1, quiet=True), state)
    shown = [row for row in lines(tmp_path / "run") if row["step"] != 17]
    assert shown == lines(path)


def test_eight_devices_train_as_one(whole, tiny, tmp_path):
    path, _ = whole
    pretrain(tiny(epochs=1), tmp_path / "run", num_devices=8, quiet=True)
    for many, one in zip(lines(tmp_path / "run")[:3], lines(path)[:3], strict=True):
        # The learning rate of a shorter run is another one, after the first epoch's warm-up.
        for name in ("loss", "std", "covariance", "probe/loss", "grad_norm"):
            assert many[name] == pytest.approx(one[name], rel=2e-3), name


def test_two_processes_train_as_one(whole, tiny, tmp_path):
    path, _ = whole
    run = tmp_path / "run"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    words = command(tiny(), run)
    workers = [
        subprocess.Popen(
            words,
            env=environment(
                JAX_CPU_COLLECTIVES_IMPLEMENTATION="gloo",
                JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
                JAX_NUM_PROCESSES="2",
                JAX_PROCESS_ID=str(process),
            ),
            stderr=subprocess.PIPE,
            text=True,
        )
        for process in range(2)
    ]
    try:
        errors = [worker.communicate(timeout=240)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0], errors
    for two, one in zip(lines(run), lines(path), strict=True):
        assert two["step"] == one["step"]
        if two["step"] <= 12:
            for name in ("loss", "std", "covariance", "probe/loss", "grad_norm"):
                assert two[name] == pytest.approx(one[name], rel=2e-3), name
    assert Checkpoints(run / "checkpoints").steps() == [24, 36]


def test_numbers_that_overflow_stop_the_run_and_spare_the_checkpoint(tiny, tmp_path):
    wild = tiny(optim=OptimConfig(base_lr=1e9, warmup_epochs=2), epochs=4, log_every=2)
    with pytest.raises(NonFiniteError, match=r"step \d+: .*(not finite|nan|inf).*base-lr") as error:
        pretrain(wild, tmp_path / "run", num_devices=1, quiet=True)
    steps = Checkpoints(tmp_path / "run" / "checkpoints").steps()
    if steps:
        assert f"last good checkpoint is of step {steps[-1]}" in str(error.value)
    else:
        assert "no checkpoint was saved before" in str(error.value)


@pytest.mark.parametrize("on_collapse", ["stop", "warn"])
def test_a_collapse_is_noticed_and_what_was_good_is_kept(tiny, tmp_path, capsys, on_collapse):
    loss = LossConfig(variance_weight=0.0, invariance_weight=100.0)
    optim = OptimConfig(base_lr=0.8, warmup_epochs=1, trust_coefficient=0.02, clip=True)
    config = tiny(loss=loss, optim=optim, epochs=3, on_collapse=on_collapse)
    run = tmp_path / "run"
    if on_collapse == "stop":
        with pytest.raises(CollapseError, match="the embeddings have collapsed: their"):
            pretrain(config, run, num_devices=1, quiet=True)
        last = Checkpoints(run / "checkpoints").latest()
    else:
        pretrain(config, run, num_devices=1, quiet=True)
        assert "the embeddings have collapsed" in capsys.readouterr().out
        assert Checkpoints(run / "checkpoints").latest() == 36
        last = Checkpoints(run / "last_good").latest()
    rows = {row["step"]: row for row in lines(run) if "std" in row}
    assert rows[last]["std"] >= health.MIN_STD and rows[last]["rankme"] >= health.MIN_RANK


def test_bad_configurations_are_refused_before_a_folder_is_made(tiny, tmp_path):
    run = tmp_path / "run"
    three = dataclasses.replace(tiny().augment, mean=(0.5,) * 3, std=(1.0,) * 3)
    for config, message in (
        (tiny(batch_size=36), "batch_size 36 is not divisible by the 8 devices"),
        (
            tiny(batch_size=32, accumulate=8),
            "batch_size 32 in 8 parts of 4 is not divisible by the 8 devices",
        ),
        (tiny(batch_size=512), "batch_size 512 is larger than digits"),
        (tiny(epochs=1, optim=OptimConfig()), "warm-up of 10.0 epochs takes 120 updates"),
        (tiny(data=DataConfig("nowhere", data_dir=str(tmp_path))), "nowhere"),
        (tiny(augment=three), "of 3 channels"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            pretrain(config, run, quiet=True)
        assert not run.exists()


def test_another_configuration_does_not_resume(whole, tiny):
    path, _ = whole
    with pytest.raises(ValueError, match="batch_size: saved 32, given 16"):
        pretrain(tiny(batch_size=16), path, resume=True, quiet=True)
    # How a run is watched may change; this one has nothing left to do.
    state = pretrain(tiny(log_every=6), path, resume=True, num_devices=1, quiet=True)
    assert int(state.step) == 36


def test_an_unreadable_image_costs_no_work(tiny, tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    folder = tmp_path / "images"
    for split, count in (("train", 40), ("test", 4)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (14, 14, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / label / f"{i}.png")
    bad = folder / "train" / "dog" / "7.png"
    bad.write_bytes(bad.read_bytes()[:60])
    augment = dataclasses.replace(tiny().augment, mean=(0.5,) * 3, std=(0.25,) * 3)
    config = tiny(data=DataConfig(f"folder:{folder}"), augment=augment, batch_size=16, epochs=4)
    with pytest.raises(ValueError, match="7.png"):  # decoded into memory before anything else
        pretrain(config, tmp_path / "early", num_devices=1, quiet=True)
    assert not (tmp_path / "early").exists()
    # A set too large for memory is read as the run goes.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.data, "in_memory", lambda source, show: source)
        with pytest.raises(ValueError, match="7.png"):
            pretrain(config, tmp_path / "late", num_devices=1, quiet=True)
    steps = Checkpoints(tmp_path / "late" / "checkpoints").steps()
    assert steps or not read_metrics(tmp_path / "late")
