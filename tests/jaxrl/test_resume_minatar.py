"""A MinAtar run that is stopped ends where an undisturbed one ends, bit for bit."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from fourfold.runtime import mesh as meshes
from fourfold.runtime.checkpoint import Checkpoints
from fourfold.runtime.metrics import read_metrics
from jaxrl import config_io, fused, train_minatar
from jaxrl.config import AgentConfig, Exploration, MinAtarConfig

ROOT = Path(__file__).resolve().parents[2]
CONFIG = MinAtarConfig(
    agent=AgentConfig(spectral=("-2L",), scheduler="div_grad", num_atoms=5),
    exploration=Exploration(warmup=200, end_step=1_000),
    steps=9_000,
    num_seeds=2,
    convs=(2,),
    hidden=(8,),
    batch_size=4,
    target_period=120,
    replay_capacity=300,
    log_every=100,
    checkpoint_every=500,
)
WORKER = """
import json, sys
from jaxrl.config_io import from_json
from jaxrl.train_minatar import train

train(from_json(json.loads(sys.argv[2])), sys.argv[1], resume="--resume" in sys.argv)
"""


def start(folder: Path, cache: Path, *options: str) -> subprocess.Popen:
    """Starts a run in a process of its own; the processes share what they compile."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "PYTHONPATH": str(ROOT),
    }
    config = json.dumps(config_io.to_json(CONFIG))
    command = [sys.executable, "-c", WORKER, str(folder), config, *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe, text=True)


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def newest(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    rows = read_metrics(file) if file.exists() else []
    return rows[-1]["step"] if rows else 0


def interrupt(process: subprocess.Popen, folder: Path, number: int, steps: int) -> None:
    """Sends a signal a random moment after a run has got so many steps farther than it was."""
    goal = newest(folder) + steps
    deadline = time.monotonic() + 300
    while newest(folder) < goal:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "the run made no progress"
        time.sleep(0.002)
    time.sleep(random.random() * 0.2)
    process.send_signal(number)


def final_bytes(folder: Path) -> str:
    """A digest of the values of every array in the last checkpoint."""
    functions = train_minatar.compile_functions(
        CONFIG, meshes.make_mesh(1), CONFIG.num_seeds, fused.hyper_of(CONFIG)
    )
    carry, _ = Checkpoints(folder / "checkpoints").restore(CONFIG.steps, functions.like)
    assert int(carry.step) == CONFIG.steps
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(carry):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def rows_without_time(folder: Path) -> list[str]:
    return [str({k: v for k, v in row.items() if k != "time"}) for row in read_metrics(folder)]


def test_stopped_and_killed_and_resumed_is_undisturbed(tmp_path):
    whole, broken, cache = (tmp_path / name for name in ("whole", "broken", "cache"))
    finish(start(whole, cache))
    assert (whole / "plots" / "return.png").stat().st_size > 1000

    process = start(broken, cache)
    interrupt(process, broken, signal.SIGTERM, 300)
    farewell = finish(process)  # exit status 0
    assert "SIGTERM" in farewell and "Resume: " in farewell
    assert newest(broken) < CONFIG.steps, "over before it was stopped: make the run longer"
    assert Checkpoints(broken / "checkpoints").latest() == newest(broken)

    for more in (400, 900):
        process = start(broken, cache, "--resume")
        interrupt(process, broken, signal.SIGKILL, more)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        assert newest(broken) < CONFIG.steps, "over before it was killed: make the run longer"
    finish(start(broken, cache, "--resume"))

    assert final_bytes(broken) == final_bytes(whole)
    assert rows_without_time(broken) == rows_without_time(whole)
    assert len(rows_without_time(whole)) == CONFIG.steps // 100


def test_what_cannot_run_is_refused_before_anything_is_written(tmp_path):
    odd = MinAtarConfig(steps=15_000)
    with pytest.raises(ValueError, match="steps must be a multiple of log_every 10000"):
        train_minatar.train(odd, tmp_path / "run")
    with pytest.raises(ValueError, match="multiple of the 2 devices, found 1"):
        train_minatar.train(MinAtarConfig(), tmp_path / "run", num_devices=2)
    with pytest.raises(FileNotFoundError, match="no run: "):
        train_minatar.train(MinAtarConfig(), tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_rows_of_the_log():
    row = {
        "loss": np.array([1.0, np.nan, 3.0]),
        "return": np.array([np.nan, 2.0, 4.0]),
        "episodes": np.array([0.0, 2.0, 1.0]),
    }
    summary = train_minatar.summary(row)
    assert list(summary) == ["return", "loss", "episodes", "returns"]
    assert (summary["return"], summary["loss"], summary["episodes"]) == (3.0, 2.0, 3)
    assert np.isnan(train_minatar.summary({**row, "loss": np.full(3, np.nan)})["loss"])
