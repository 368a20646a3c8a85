"""A job of two processes on one machine, joined by gloo: what a pod sees, in small."""

import os
import signal
import socket
import subprocess
import sys
import textwrap

import numpy as np

from fourfold.runtime.checkpoint import Checkpoints

_WORKER = """
    import pathlib, signal, sys, os
    import numpy as np
    import jax
    import jax.numpy as jnp

    from fourfold.runtime import mesh
    from fourfold.runtime.checkpoint import Checkpoints, DiskFullError
    from fourfold.runtime.metrics import Metrics, read_metrics
    from fourfold.runtime.preemption import Preemption

    root = pathlib.Path(sys.argv[1])
    assert mesh.initialize() and mesh.initialize()
    me = jax.process_index()
    assert jax.process_count() == 2 and jax.device_count() == 4
    assert mesh.is_lead() == (me == 0)
    assert mesh.gather((1 << 40) + me) == [1 << 40, (1 << 40) + 1]
    assert mesh.all_agree(True) and not mesh.all_agree(me == 0)

    devices = mesh.make_mesh()
    half = mesh.make_mesh(2)
    assert sorted(d.process_index for d in half.devices.flat) == [0, 1]
    for count, words in ((3, "not divisible by the 2"), (6, "[1, 4]")):
        try:
            mesh.make_mesh(count)
            raise SystemExit("a mesh of %d devices was made" % count)
        except ValueError as error:
            assert words in str(error), error

    batch = mesh.global_batch(devices, {"x": np.full((6, 3), me, np.float32)})
    assert batch["x"].shape == (12, 3)
    total = jax.jit(lambda b: b["x"].sum(), out_shardings=mesh.replicated(devices))(batch)
    assert float(total) == 18.0
    try:
        mesh.global_batch(devices, np.zeros((3, 1), np.float32))
        raise SystemExit("6 rows went onto 4 devices")
    except ValueError as error:
        assert "6 rows" in str(error) and "4 devices" in str(error), error

    keys = jax.jit(lambda: jax.random.split(jax.random.key(0), 4),
                   out_shardings=mesh.batch_sharding(devices))()
    tree = {
        "split": batch["x"],
        "whole": jax.jit(lambda: jnp.arange(5.0), out_shardings=mesh.replicated(devices))(),
        "keys": keys,
        "mine": jnp.arange(3),
        "host": np.arange(4),
        "n": 7,
    }
    checkpoints = Checkpoints(root / "checkpoints")
    checkpoints.save(3, tree, {"replay": np.full((me + 2, 5), me), "who": me})
    checkpoints.save(3, tree)
    found, extra = checkpoints.restore(3, tree)
    assert found["split"].sharding == tree["split"].sharding
    assert found["keys"].sharding == tree["keys"].sharding
    own = np.concatenate([np.asarray(s.data) for s in found["split"].addressable_shards])
    assert (own == me).all() and own.shape == (6, 3)
    assert (np.asarray(found["whole"]) == np.arange(5)).all()
    same = jax.jit(lambda a, b: (jax.random.key_data(a) == jax.random.key_data(b)).all(),
                   out_shardings=mesh.replicated(devices))(found["keys"], tree["keys"])
    assert bool(same)
    assert (np.asarray(found["mine"]) == np.arange(3)).all() and found["n"] == 7
    assert extra["who"] == me and (extra["replay"] == me).all() and len(extra["replay"]) == me + 2

    # A failure on one process is a failure on both, and soon.
    from fourfold.runtime import host_arrays
    write = host_arrays._write_bytes
    if me == 1:
        def full(*_):
            raise OSError(28, "No space left on device")
        host_arrays._write_bytes = full
    try:
        checkpoints.save(4, tree, {"replay": np.zeros(3)})
        raise SystemExit("saved on a full disk")
    except DiskFullError as error:
        assert me == 1 and "checkpoint of step 3 is intact" in str(error), error
    except RuntimeError as error:
        assert me == 0 and "another process failed to save step 4" in str(error), error
    host_arrays._write_bytes = write
    assert checkpoints.steps() == [3]

    with Metrics(root, total=10, quiet=True) as metrics:
        metrics.write(1, {"loss": total, "who": me})
    mesh.all_agree(True)
    assert [row["who"] for row in read_metrics(root)] == [0]

    with Preemption() as preemption:
        assert not preemption.agreed()
        if me == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.agreed() and preemption.requested
    checkpoints.save(5, tree, {"replay": np.full(2, me)})
    print("DONE", me, flush=True)
"""


def _start(root, process, port):
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(process),
    }
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_WORKER), str(root)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_two_processes_save_restore_fail_and_stop_together(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    workers = [_start(tmp_path, process, port) for process in range(2)]
    try:
        outputs = [worker.communicate(timeout=150)[0] for worker in workers]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGKILL)
                worker.wait()
    for process, (worker, output) in enumerate(zip(workers, outputs, strict=True)):
        assert worker.returncode == 0 and f"DONE {process}" in output, output
    # One process cannot take up the state of two, but may read parts of it.
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == [3, 5]
    found, _ = checkpoints.restore(5, {"split": np.zeros((12, 3), np.float32)}, partial=True)
    np.testing.assert_array_equal(found["split"], np.repeat([0, 1], 6)[:, None] * np.ones(3))


def test_a_checkpoint_of_another_number_of_processes_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    folder = checkpoints.save(1, {"n": 1})
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"processes": 1', '"processes": 3'))
    try:
        checkpoints.restore(1, {"n": 0})
    except ValueError as error:
        assert "saved by 3 processes" in str(error) and "this run has 1" in str(error)
    else:
        raise AssertionError("restored")
