"""Checkpoints: what is saved comes back, in its place, and errors leave the old ones alone."""

import collections
import errno
import json
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from fourfold.runtime import host_arrays, mesh
from fourfold.runtime.checkpoint import Checkpoints, DiskFullError

State = collections.namedtuple("State", ["params", "key", "step"])


def _tree(seed=0):
    rng = np.random.default_rng(seed)
    return State(
        params={
            "conv": {"kernel": jnp.asarray(rng.normal(size=(3, 5)), jnp.float32)},
            "half": jnp.asarray(rng.normal(size=7), jnp.bfloat16),
            "empty": jnp.zeros((0, 3), jnp.float32),
            "host": rng.integers(0, 255, (4, 3), np.uint8),
            "host_half": rng.normal(size=3).astype(ml_dtypes.bfloat16),
        },
        key=jax.random.key(seed + 5),
        step=[seed + 3, 2.5, True, np.float32(seed)],
    )


def _assert_same(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for left, right in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert type(left) is type(right)
        if hasattr(right, "dtype"):
            assert left.dtype == right.dtype
            if jnp.issubdtype(right.dtype, jax.dtypes.prng_key):
                left, right = jax.random.key_data(left), jax.random.key_data(right)
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def test_round_trip_gives_the_same_leaves_types_and_extra(tmp_path):
    checkpoints = Checkpoints(tmp_path / "deep" / "checkpoints")
    assert checkpoints.latest() is None
    frames = np.arange(2**21, dtype=np.uint16).reshape(64, -1)
    extra = {
        "replay/frames": frames,
        "strided": frames[::3, 1::7],
        "fortran": np.asfortranarray(frames[:5, :4]),
        "broadcast": np.broadcast_to(np.float64(1.5), (3, 2)),
        "scalar": np.int64(7),
        "zero": np.zeros((0, 4), np.float32),
        "rng": np.random.default_rng(3).bit_generator.state,
        "best": float("-inf"),
    }
    checkpoints.save(12, _tree(), extra)
    tree, found = checkpoints.restore(12, _tree(seed=1))
    _assert_same(tree, _tree())
    assert set(found) == set(extra)
    for name, value in extra.items():
        if isinstance(value, (np.ndarray, np.generic)):
            assert found[name].dtype == value.dtype and found[name].shape == value.shape
            np.testing.assert_array_equal(found[name], value)
        else:
            assert found[name] == value
    # Large arrays are mapped, can be written to, and outlive the checkpoint.
    assert isinstance(found["replay/frames"], np.memmap)
    found["replay/frames"][0, 0] = 9
    shutil.rmtree(checkpoints.path)
    assert found["replay/frames"][0, 0] == 9
    np.testing.assert_array_equal(found["replay/frames"][1:], frames[1:])


def test_restores_into_the_shardings_of_like(tmp_path):
    devices = mesh.make_mesh()
    split, whole = mesh.batch_sharding(devices), mesh.replicated(devices)
    tree = {
        "w": jnp.arange(24.0).reshape(8, 3),
        "b": jnp.arange(3.0),
        "keys": jax.random.split(jax.random.key(0), 16),
    }
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, tree)
    like = {
        "w": jax.ShapeDtypeStruct((8, 3), jnp.float32, sharding=split),
        "b": jax.device_put(jnp.zeros(3), whole),
        "keys": jax.device_put(tree["keys"], split),
    }
    found, _ = checkpoints.restore(1, like)
    assert found["w"].sharding == split and found["b"].sharding == whole
    assert found["keys"].sharding == split
    np.testing.assert_array_equal(np.asarray(found["w"]), np.asarray(tree["w"]))
    assert jnp.array_equal(jax.random.key_data(found["keys"]), jax.random.key_data(tree["keys"]))
    # Saved from eight devices, read onto none in particular: free to meet arrays of any mesh.
    checkpoints.save(2, found)
    back, _ = checkpoints.restore(2, jax.eval_shape(lambda: tree))
    assert not back["w"].committed and not back["keys"].committed
    np.testing.assert_array_equal(np.asarray(back["w"]), np.asarray(tree["w"]))
    assert float((back["b"] + found["b"]).sum()) == 6.0


def test_key_implementation_is_kept(tmp_path):
    key = jax.random.key(7, impl="rbg")
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, {"key": key})
    found, _ = checkpoints.restore(0, {"key": jax.random.key(0, impl="rbg")})
    assert jnp.array_equal(jax.random.key_data(found["key"]), jax.random.key_data(key))
    with pytest.raises(ValueError, match="key: saved key<rbg>"):
        checkpoints.restore(0, {"key": jax.random.key(0)})


def test_partial_restore_reads_what_it_names(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, {"params": {"w": jnp.ones(3)}, "opt": {"m": jnp.zeros(3)}})
    like = {"params": {"w": jnp.zeros(3)}}
    found, _ = checkpoints.restore(4, like, partial=True)
    np.testing.assert_array_equal(np.asarray(found["params"]["w"]), np.ones(3))
    with pytest.raises(ValueError, match=r"opt\.m: in the checkpoint only"):
        checkpoints.restore(4, like)


def test_another_tree_is_refused_by_name(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(4, {"w": jnp.ones((3, 2)), "n": 1})
    with pytest.raises(ValueError, match=r"w: saved float32\[3, 2\], expected float32\[2, 3\]"):
        checkpoints.restore(4, {"w": jnp.ones((2, 3)), "n": 1})
    with pytest.raises(ValueError, match=r"n: saved int64\[\], expected float64\[\]"):
        checkpoints.restore(4, {"w": jnp.ones((3, 2)), "n": 1.0})
    with pytest.raises(ValueError, match="v: not in the checkpoint"):
        checkpoints.restore(4, {"w": jnp.ones((3, 2)), "n": 1, "v": 2})


def test_keeps_the_newest_and_never_goes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 5, 9):
        checkpoints.save(step, {"n": step})
    assert checkpoints.steps() == [5, 9]
    checkpoints.save(9, {"n": -1})  # the same step: the same state, nothing written
    assert checkpoints.restore(9, {"n": 0})[0] == {"n": 9}
    with pytest.raises(ValueError, match="at least 9.*found 7"):
        checkpoints.save(7, {"n": 7})
    with pytest.raises(FileNotFoundError, match="no whole checkpoint of step 1 .*: 5, 9"):
        checkpoints.restore(1, {"n": 0})
    with pytest.raises(ValueError, match="keep must be at least 1, found 0"):
        Checkpoints(tmp_path, keep=0)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"../up": np.zeros(2)}, r"'\.\./up'"),
        ({"/root": np.zeros(2)}, "'/root'"),
        ({"a/../b": 1}, "a/../b"),
        ({"o": np.asarray([object()], object)}, "'o': dtype object"),
        ({"f": {"s": {1, 2}}}, "'f'.*set"),
        ({"j": jnp.zeros(3)}, "'j'.*neither a NumPy array nor JSON"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path, extra, message):
    with pytest.raises(ValueError, match=message):
        Checkpoints(tmp_path / "c").save(0, {"n": 1}, extra)
    assert not (tmp_path / "c").exists()


def test_bad_leaves_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"leaf 'a\.b' is a str"):
        Checkpoints(tmp_path).save(0, {"a": {"b": "text"}})
    with pytest.raises(ValueError, match=r"both named 'a\.b'"):
        Checkpoints(tmp_path).save(0, {"a": {"b": 1}, "a.b": 2})


def test_an_empty_tree_and_an_empty_extra(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(0, {})
    assert checkpoints.restore(0, {}) == ({}, {})


def _damage(folder, how):
    if how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "torn manifest":
        text = (folder / "manifest.json").read_text()
        (folder / "manifest.json").write_text(text[: len(text) // 2])
    elif how == "manifest is a list":
        (folder / "manifest.json").write_text("[]")
    elif how == "short array":
        path = next(folder.rglob("*.npy"))
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "missing file":
        next((folder / "tree").rglob("manifest.ocdbt")).unlink()
    elif how == "another format":
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


@pytest.mark.parametrize(
    "how",
    [
        "no manifest",
        "torn manifest",
        "manifest is a list",
        "short array",
        "missing file",
        "another format",
    ],
)
def test_a_broken_folder_is_ignored_and_replaced(tmp_path, how):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, {"n": step}, {"a": np.arange(5)})
    _damage(tmp_path / "step_000000000002", how)
    (tmp_path / "unfinished.step_000000000003").mkdir()
    (tmp_path / "step_x").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoints.steps() == [1]
    with pytest.raises(FileNotFoundError, match="step 2"):
        checkpoints.restore(2, {"n": 0})
    checkpoints.save(2, {"n": 20}, {"a": np.arange(6)})
    assert checkpoints.restore(2, {"n": 0})[0] == {"n": 20}
    assert checkpoints.steps() == [1, 2]
    assert not list(tmp_path.glob("unfinished.*"))
    assert (tmp_path / "notes.txt").exists()


def test_too_little_room_is_said_before_writing(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"n": 1})
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_500_000))
    checkpoints.save(2, {"n": 2}, {"a": np.zeros(10_000)})
    with pytest.raises(
        DiskFullError, match=r"needs up to 9,0\d\d,\d\d\d bytes, free are 1,500,000"
    ):
        checkpoints.save(3, {"n": 3}, {"a": np.zeros(1_000_000)})
    # What the new checkpoint would have replaced went early; the newest is still there.
    assert checkpoints.steps() == [2]
    assert checkpoints.restore(2, {"n": 0})[0] == {"n": 2}
    assert not list(tmp_path.glob("unfinished.*"))


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
def test_an_error_in_the_middle_leaves_the_older_ones(tmp_path, monkeypatch, error):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"n": 1}, {"a": np.arange(3)})

    def fail(file, array):
        raise OSError(error, "it failed")

    monkeypatch.setattr(host_arrays, "_write_bytes", fail)
    with pytest.raises(OSError) as caught:
        checkpoints.save(2, {"n": 2}, {"a": np.arange(3)})
    assert isinstance(caught.value, DiskFullError) == (error == errno.ENOSPC)
    if error == errno.ENOSPC:
        assert "the checkpoint of step 1 is intact" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000000001"]
    assert checkpoints.restore(1, {"n": 0})[0] == {"n": 1}


_LIMITED = """
    import resource, sys
    import jax.numpy as jnp, numpy as np
    from fourfold.runtime.checkpoint import Checkpoints, DiskFullError
    checkpoints = Checkpoints(sys.argv[1])
    small = {"w": jnp.ones(10)}
    checkpoints.save(1, small)
    rng = np.random.default_rng(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for tree, extra in (
        (small, {"frames": rng.integers(0, 255, 1_000_000, np.uint8)}),
        ({"w": jnp.asarray(rng.random(1_000_000), jnp.float32)}, {}),
    ):
        resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, hard))
        try:
            checkpoints.save(2, tree, extra)
        except DiskFullError as error:
            print("FULL", error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert checkpoints.steps() == [1], checkpoints.steps()
        checkpoints.restore(1, small)
    checkpoints.save(2, tree, extra)  # with room again the same process goes on
    print("STEPS", checkpoints.steps())
"""


def test_a_full_disk_in_host_arrays_and_in_orbax(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_LIMITED), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["FULL", "FULL", "STEPS"]
    assert "STEPS [1, 2]" in lines[-1]
    for line in lines[:2]:
        assert "cannot save step 2" in line and "checkpoint of step 1 is intact" in line
    assert "Traceback" not in run.stderr


_KILLED = """
    import os, pathlib, shutil, signal, sys
    import numpy as np
    import jax
    from fourfold.runtime import checkpoint, host_arrays, pytree_io
    from fourfold.runtime.checkpoint import Checkpoints

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def arm(moment):
        rename = pathlib.Path.rename
        if moment == "empty draft":
            pytree_io.write_tree = die
        elif moment == "half an array":
            def write(file, array):
                file.write(array.data[: array.size // 2].cast("B"))
                file.flush()
                die()
            host_arrays._write_bytes = write
        elif moment == "inside Orbax":
            import orbax.checkpoint as ocp
            ocp.Checkpointer.save = lambda self, path, **_: (
                pathlib.Path(str(path) + ".orbax-checkpoint-tmp").mkdir(), die())
        elif moment == "before the rename":
            pathlib.Path.rename = die
        elif moment == "after the rename":
            pathlib.Path.rename = lambda *a: (rename(*a), die())
        elif moment == "half removed":
            def remove(path, **_):
                next(p for p in pathlib.Path(path).rglob("*.npy")).unlink()
                die()
            shutil.rmtree = remove

    root = pathlib.Path(sys.argv[1])
    for moment in sys.argv[2:]:
        child = os.fork()
        if child == 0:
            checkpoints = Checkpoints(root / moment, keep=1)
            checkpoints.save(1, {"n": 1}, {"a": np.full(1000, 1)})
            arm(moment)
            checkpoints.save(2, {"n": 2}, {"a": np.full(1000, 2)})
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, (moment, status)
"""

_MOMENTS = {
    "empty draft": 1,
    "half an array": 1,
    "inside Orbax": 1,
    "before the rename": 1,
    "after the rename": 2,
    "half removed": 2,
}


def test_sigkill_at_any_moment_of_a_save_leaves_a_resumable_folder(tmp_path):
    # One interpreter imports JAX, then forks a victim a moment, before any backend starts.
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(_KILLED), str(tmp_path), *_MOMENTS],
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr
    for moment, newest in _MOMENTS.items():
        checkpoints = Checkpoints(tmp_path / moment, keep=1)
        assert checkpoints.latest() == newest, moment
        tree, extra = checkpoints.restore(newest, {"n": 0})
        assert tree == {"n": newest}
        np.testing.assert_array_equal(extra["a"], np.full(1000, newest))
        checkpoints.save(3, {"n": 3})
        assert [p.name for p in (tmp_path / moment).iterdir()] == ["step_000000000003"], moment


def test_where_a_run_begins(tmp_path, capsys):
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.start(resume=False) == 0 and not capsys.readouterr().err
    assert checkpoints.start(resume=True) == 0
    line = f"no whole checkpoint in {tmp_path}: from the beginning\n"
    assert capsys.readouterr().err == line
    folder = checkpoints.save(7, {"x": np.zeros(3)})
    assert checkpoints.start(resume=True) == 7 and not capsys.readouterr().err
    (folder / "manifest.json").write_text("{")
    assert checkpoints.start(resume=True) == 0
    assert "only damaged ones (step_000000000007): from the beginning" in capsys.readouterr().err
