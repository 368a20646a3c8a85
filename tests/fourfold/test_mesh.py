"""The mesh, batches onto it, and when a run is taken for a distributed one."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourfold.runtime import mesh
from fourfold.runtime.hardware import hardware


@pytest.mark.parametrize("count", [1, 3, 8, None])
def test_batches_are_split_over_the_mesh(count):
    devices = mesh.make_mesh(count)
    size = count or 8
    assert devices.shape == {"data": size}
    batch = {"x": np.arange(size * 6, dtype=np.int32).reshape(size * 2, 3), "y": np.ones(size)}
    placed = mesh.global_batch(devices, {**batch, "y": batch["y"].astype(np.float32)})
    np.testing.assert_array_equal(np.asarray(placed["x"]), batch["x"])
    assert placed["x"].sharding == mesh.batch_sharding(devices)
    assert {shard.data.shape for shard in placed["x"].addressable_shards} == {(2, 3)}
    # Auto axes: jitted code needs no annotation, and sees the global batch.
    weights = jax.device_put(jnp.ones(3, jnp.int32), mesh.replicated(devices))
    found = jax.jit(lambda x, w: (x * w[None, :]).sum())(placed["x"], weights)
    assert int(found) == batch["x"].sum()


def test_the_axis_can_be_named():
    devices = mesh.make_mesh(2, axis="seeds")
    assert mesh.batch_sharding(devices).spec == jax.sharding.PartitionSpec("seeds")


def test_an_indivisible_batch_names_rows_and_devices():
    devices = mesh.make_mesh(4)
    with pytest.raises(ValueError, match=r"\['x'\].* 6 rows .* not divisible by the 4 devices"):
        mesh.global_batch(devices, {"x": np.zeros((6, 2), np.float32)})
    with pytest.raises(ValueError, match=r"the batch has shape \(\); a batch needs an axis 0"):
        mesh.global_batch(devices, np.float32(3))


@pytest.mark.parametrize("count", [0, -1, 9])
def test_more_devices_than_there_are(count):
    with pytest.raises(ValueError, match=rf"\[1, 8\], found {count}"):
        mesh.make_mesh(count)


def test_alone_every_agreement_is_ones_own():
    assert mesh.is_lead()
    assert mesh.gather(5) == [5]
    assert mesh.all_agree(True) and not mesh.all_agree(False)


@pytest.fixture
def joined(monkeypatch):
    """Records what jax.distributed.initialize would have been called with."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    for name in (
        "JAX_COORDINATOR_ADDRESS",
        "JAX_NUM_PROCESSES",
        "JAX_PROCESS_ID",
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "OMPI_COMM_WORLD_SIZE",
        "MEGASCALE_NUM_SLICES",
        "TPU_WORKER_HOSTNAMES",
    ):
        monkeypatch.delenv(name, raising=False)
    return calls


@pytest.mark.parametrize("chosen", [{}, {"JAX_NUM_CPU_DEVICES": "5"}])
def test_a_device_per_core_unless_the_user_chose(chosen):
    code = """
import jax
from fourfold.runtime import mesh
mesh.one_cpu_device_per_core()
count = jax.device_count()
mesh.one_cpu_device_per_core()  # too late: nothing happens
print(count, jax.device_count())
"""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | chosen
    command = [sys.executable, "-c", code]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=True)
    expected = chosen.get("JAX_NUM_CPU_DEVICES", str(len(os.sched_getaffinity(0))))
    assert done.stdout.split() == [expected] * 2


def test_the_batch_may_be_another_axis():
    devices, batch = mesh.make_mesh(4), np.arange(24, dtype=np.float32).reshape(3, 8)
    placed = mesh.global_batch(devices, batch, axis=1)
    np.testing.assert_array_equal(placed, batch)
    assert [shard.data.shape for shard in placed.addressable_shards] == [(3, 2)] * 4
    with pytest.raises(ValueError, match="the batch has shape .8,.; a batch needs an axis 1"):
        mesh.global_batch(devices, np.zeros(8, np.float32), axis=1)


def test_one_process_joins_nothing(joined, monkeypatch):
    assert not mesh.initialize()
    # An interactive SLURM shell has tasks that nobody started.
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "one-host")
    assert not mesh.initialize()
    assert joined == []


def test_flags_and_environment_join(joined, monkeypatch):
    assert mesh.initialize("host:1", 2, 0)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "other:2")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    assert mesh.initialize()
    assert not mesh.initialize(distributed=False)
    assert joined == [("host:1", 2, 0), ("other:2", 3, 2)]


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"MEGASCALE_NUM_SLICES": "2"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
    ],
)
def test_clusters_are_recognised(joined, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert mesh.initialize()
    assert joined == [(None, None, None)]


def test_half_of_the_flags_is_an_error(joined):
    with pytest.raises(ValueError, match="missing coordinator, process_id"):
        mesh.initialize(num_processes=2)
    with pytest.raises(ValueError, match=r"process_id must be in \[0, 2\), found 2"):
        mesh.initialize("host:1", 2, 2)
    assert joined == []


def test_hardware_says_what_a_reader_compares():
    found = hardware()
    assert found["platform"] == "cpu" and found["devices"] == 8 and found["processes"] == 1
    assert found["jax"] == jax.__version__
    assert found["cpu"] and int(found["cores"]) >= 1
