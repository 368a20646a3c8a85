"""One update, many compilers: jit over a mesh, shard_map, pmap, and two processes with actors."""

import dataclasses
import functools
import importlib.util
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from fourfold.runtime import mesh as meshes
from fourfold.runtime.metrics import read_metrics
from jaxrl import agent as agents
from jaxrl import compiled, networks, train
from jaxrl.config import AgentConfig, AtariConfig, Exploration
from jaxrl.types import Transition
from jaxrl.windows import FrameBatch, stack_frames

OBS = (12, 12, 4)
UPDATES, ROWS, SYNC = 20, 16, 8
CONFIGS = {
    "c51, -2": AgentConfig(spectral=("-2",)),
    "c51, all": AgentConfig(spectral=("all",)),
    "double c51, divGrad": AgentConfig(
        loss="double_c51", spectral=("-2L", "conv2L"), scheduler="div_grad", bound=1.0
    ),
    "dqn, divOut": AgentConfig(loss="dqn", spectral=("all",), scheduler="div_out"),
}


@functools.cache
def make(name):
    config = CONFIGS[name]
    atoms = config.num_atoms if config.loss.endswith("c51") else None
    return agents.make(config, networks.ConvNet(5, atoms, ((4, 4, 2), (6, 3, 1)), (16,), 1 / 255))


@functools.cache
def start(name):
    return agents.init(make(name), jax.random.key(0), OBS)


def batch(seed):
    rng = np.random.default_rng(seed)
    return Transition(
        s_tm1=rng.integers(0, 256, (ROWS, *OBS)).astype(np.uint8),
        a_tm1=rng.integers(0, 5, ROWS).astype(np.int32),
        r_t=rng.normal(size=ROWS).astype(np.float32),
        discount_t=np.where(rng.random(ROWS) < 0.2, 0.0, 0.99).astype(np.float32),
        s_t=rng.integers(0, 256, (ROWS, *OBS)).astype(np.uint8),
    )


def assert_close(got, expected, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), got, expected)


def run(name, step, split=lambda batch: batch, sync=agents.sync_target, state=None):
    """Twenty updates with two syncs; the state at the end and the last update's metrics."""
    state, metrics = start(name) if state is None else state, {}
    for i in range(UPDATES):
        state, metrics = step(state, split(batch(i)))
        if (i + 1) % SYNC == 0:
            state = sync(state)
        jax.block_until_ready(state)  # one program at a time: eight devices share few threads
    return state, metrics


@functools.cache
def expected(name):
    """Plain jit on one device."""
    step = jax.jit(lambda state, batch: agents.update(make(name), state, batch))
    state, metrics = run(name, step)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), state.params, start(name).params)
    assert min(jax.tree.leaves(moved)) > 5e-4  # fifty times what is tolerated
    return state, metrics


def assert_as_expected(name, state, metrics):
    wanted, wanted_metrics = expected(name)
    assert_close(state.params, wanted.params)
    assert_close(state.target_params, wanted.target_params)
    assert_close((state.spectral, state.target_spectral), (wanted.spectral, wanted.target_spectral))
    assert_close(metrics, wanted_metrics, atol=1e-4)
    assert int(state.updates) == UPDATES


def sharded_update(name, mesh, check_vma):
    return jax.jit(
        jax.shard_map(
            lambda state, batch: agents.update(make(name), state, batch, axis_name="data"),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
            check_vma=check_vma,
        )
    )


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("devices", [1, 8])
def test_jit_over_a_mesh(name, devices):
    mesh = meshes.make_mesh(devices)
    replicated = meshes.replicated(mesh)
    step = jax.jit(
        lambda state, batch: agents.update(make(name), state, batch), out_shardings=replicated
    )
    state = jax.device_put(start(name), replicated)
    split = functools.partial(meshes.global_batch, mesh)
    state, metrics = run(name, step, split, state=state)
    assert_as_expected(name, state, metrics)
    for leaf in jax.tree.leaves(state):
        first, *others = (np.asarray(shard.data) for shard in leaf.addressable_shards)
        assert len(others) == devices - 1
        assert all(np.array_equal(first, other) for other in others)


# Checked, shard_map sums the gradients in replicated parameters by itself; unchecked, it does not.
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_shard_map(name, check_vma):
    if not check_vma and name not in ("c51, -2", "c51, all"):
        pytest.skip("the checked form covers this one")
    step = sharded_update(name, meshes.make_mesh(), check_vma)
    assert_as_expected(name, *run(name, step))


def test_shard_map_on_one_device():
    step = sharded_update("c51, -2", meshes.make_mesh(1), True)
    assert_as_expected("c51, -2", *run("c51, -2", step))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("devices", [1, 8])
def test_pmap(name, devices):
    if devices == 1 and name != "c51, -2":
        pytest.skip("one of them is enough")
    step = jax.pmap(
        lambda state, batch: agents.update(make(name), state, batch, axis_name="data"),
        axis_name="data",
        devices=jax.devices()[:devices],
    )

    def split(batch):
        return jax.tree.map(lambda x: x.reshape(devices, ROWS // devices, *x.shape[1:]), batch)

    state = jax.tree.map(lambda x: jnp.repeat(x[None], devices, axis=0), start(name))
    state, metrics = run(name, step, split, sync=jax.pmap(agents.sync_target), state=state)
    for device in (0, devices - 1):
        own = jax.tree.map(lambda x, device=device: np.asarray(x)[device], (state, metrics))
        assert_as_expected(name, *own)


def test_without_the_axis_name_devices_would_drift_apart():
    name = "c51, -2"
    step = jax.pmap(lambda state, batch: agents.update(make(name), state, batch), axis_name="data")
    state = jax.tree.map(lambda x: jnp.repeat(x[None], 8, axis=0), start(name))
    one = jax.tree.map(lambda x: x.reshape(8, ROWS // 8, *x.shape[1:]), batch(0))
    drifted = np.asarray(step(state, one)[0].params["fc"]["kernel"])
    assert np.abs(drifted[0] - drifted[7]).max() > 1e-4


# --- the compiled functions of a run --------------------------------------------------------------


def frame_batches(seed, count):
    rng = np.random.default_rng(seed)
    shape = (count, ROWS)
    return FrameBatch(
        frames=rng.integers(0, 256, (*shape, 5, *OBS[:2])).astype(np.uint8),
        mask_tm1=rng.random((*shape, 4)) < 0.8,
        mask_t=rng.random((*shape, 4)) < 0.8,
        steps=np.ones(shape, np.int32),
        a_tm1=rng.integers(0, 5, shape).astype(np.int32),
        r_t=rng.normal(size=shape).astype(np.float32),
        discount_t=np.full(shape, 0.99, np.float32),
    )


def learner(name, devices):
    """The compiled functions on a mesh, and a state on it."""
    mesh = meshes.make_mesh(devices)
    config = AtariConfig(agent=CONFIGS[name], exploration=Exploration(warmup=8, end_step=16))
    functions = compiled.compile_functions(make(name), config, mesh, jax.random.key(1))
    place = functools.partial(compiled.place, mesh=mesh, axis=1)
    # A copy: on one device, placing shares the memory that `learn` then takes for itself.
    own = jax.tree.map(jnp.copy, start(name))
    return functions, jax.device_put(own, meshes.replicated(mesh)), place, mesh


def test_one_call_of_learn_takes_several_batches_on_any_mesh():
    ends = []
    for devices, cuts in ((1, [1] * 4), (8, [4]), (8, [1, 2, 1])):
        functions, state, place, _ = learner("c51, -2", devices)
        batches, done = frame_batches(0, 4), 0
        with jax.transfer_guard("disallow"):
            for count in cuts:
                part = jax.tree.map(lambda x, a=done, n=count: x[a : a + n], batches)
                state, metrics = functions.learn(state, place(part))
                done += count
            state = functions.sync(state)
        assert int(state.updates) == 4 and np.isfinite(metrics["loss"])
        ends.append(jax.device_get(state))
    assert_close(ends[1].params, ends[0].params)
    assert_close(ends[2].params, ends[0].params)
    assert_close(ends[1].target_spectral, ends[0].spectral)


def test_acting_is_the_same_on_any_mesh():
    def play(devices):
        functions, state, _, mesh = learner("c51, all", devices)
        zeros = np.zeros((ROWS, *OBS), np.uint8)
        stack = jax.device_put(zeros, meshes.batch_sharding(mesh))
        steps = jax.device_put(np.int32(0), meshes.replicated(mesh))
        rng, actions = np.random.default_rng(0), []
        for i in range(6):
            frame = rng.integers(0, 256, (ROWS, *OBS[:2])).astype(np.uint8)
            first, valid = np.full(ROWS, i == 0), rng.random(ROWS) < 0.6
            with jax.transfer_guard("disallow"):
                observed = functions.place((frame, first, valid))
                chosen, hooks, stack, steps = functions.act(state, stack, *observed, steps)
                state = dataclasses.replace(state, spectral=hooks)
                actions.append(functions.fetch(chosen))
        return np.stack(actions), jax.device_get((state.spectral, stack, steps))

    (actions, after), (actions_8, after_8) = play(1), play(8)
    np.testing.assert_array_equal(actions_8, actions)
    assert_close(after_8, after)
    assert after[2] > 16  # the schedule went from random to greedy
    assert np.abs(after[0]["fc"]["u"] - start("c51, all").spectral["fc"]["u"]).max() > 1e-3


def test_indivisible_shares_are_named():
    mesh = meshes.make_mesh(8)
    with pytest.raises(ValueError, match="12 is not divisible by 8 devices or 1 processes"):
        compiled.HostMemory(AtariConfig(batch_size=12, replay_capacity=1_000), 8, mesh)
    with pytest.raises(ValueError, match="needs one device, found 8; use 'host'"):
        compiled.make_memory(AtariConfig(replay="device"), 8, mesh)


# --- two processes --------------------------------------------------------------------------------

_WORKER = Path(__file__).with_name("two_process_worker.py")


def two_processes(folder, devices):
    """Runs the worker twice, side by side, and returns what each noted."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": "2",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    workers = [
        subprocess.Popen(
            [sys.executable, str(_WORKER), str(folder)],
            env={**env, "JAX_PROCESS_ID": str(process)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGKILL)
                worker.wait()
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
    return [dict(np.load(folder / f"{process}.npz", allow_pickle=False)) for process in range(2)]


def like(tree, notes, prefix):
    """The tree whose leaves were noted under `prefix`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: jnp.asarray(notes[prefix + jax.tree_util.keystr(path)]), tree
    )


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_two_processes_with_their_own_actors_train_one_agent(tmp_path, devices, monkeypatch):
    pytest.importorskip("envpool")
    spec = importlib.util.spec_from_file_location("two_process_worker", _WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    notes = two_processes(tmp_path, devices)

    # Bit for bit one agent, after the first training, after resuming, and when evaluated.
    for name in notes[0]:
        if not name.split("/")[1:2] == ["batch"]:
            np.testing.assert_array_equal(notes[0][name], notes[1][name], err_msg=name)

    # The learner is told of 4 environments' steps, and learns once per 4 of them.
    count = sum(name.endswith("/sync") for name in notes[0]), int(notes[0]["end1/.updates"])
    due = (worker.ALL_STEPS - worker.CONFIG.exploration.warmup) // 4
    assert due - 1 <= count[1] <= due and count[0] == count[1] // 5

    # Each process samples its own games: half a batch each, and never the same frames.
    mine, other = (note["3/batch/frames"] for note in notes)
    assert mine.shape == other.shape == (4, 5, 84, 84)
    games = [np.concatenate([n[f"{i}/batch/frames"] for i in range(5)]) for n in notes]
    same = [np.array_equal(a, b) for a in games[0] for b in games[1]]
    assert np.mean(same) < 0.05

    # One process that is given both halves learns the same, to rounding.
    monkeypatch.setattr(networks, "nature_net", worker.small_net)
    agent = train.make_agent(worker.CONFIG, 6)
    state = like(
        jax.eval_shape(lambda: agents.init(agent, jax.random.key(0), train.OBS_SHAPE)),
        notes[0],
        "start/",
    )
    began = state

    @jax.jit
    def update(state, frames):
        return agents.update(agent, state, stack_frames(frames))[0]

    for i in range(count[1]):
        halves = [
            FrameBatch(**{f: jnp.asarray(n[f"{i}/batch/{f}"]) for f in FrameBatch._fields})
            for n in notes
        ]
        # Acting advanced u in between.
        hooks = like(state.spectral, notes[0], f"{i}/hooks/")
        state = dataclasses.replace(state, spectral=hooks)
        state = update(state, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), *halves))
        if f"{i}/sync" in notes[0]:
            state = agents.sync_target(state)
    end = like(began, notes[0], "end1/")
    assert_close(end.params, state.params)
    assert_close(end.target_params, state.target_params)
    assert_close(end.opt_state, state.opt_state)
    moved = np.abs(np.asarray(end.params["fc"]["kernel"] - began.params["fc"]["kernel"]))
    assert moved.max() > 1e-3

    # Acting advanced u between updates, and the lead alone wrote the log.
    u = [notes[0][f"{i}/hooks/['fc']['u']"] for i in range(count[1])]
    assert all(np.abs(a - b).max() > 1e-6 for a, b in zip(u[10:], u[11:], strict=False))
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    assert np.isfinite(notes[0]["outputs"]).all()
