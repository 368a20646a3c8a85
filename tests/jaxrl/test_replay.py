"""Both replays against an oracle that keeps whole episodes as lists of observations."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from scipy import stats

from jaxrl import device_replay
from jaxrl.replay import HostReplay, stack_frames
from jaxrl.types import Transition

DISCOUNT = 0.9


class Row(NamedTuple):
    frame: np.ndarray
    action: int
    reward: float
    terminal: bool
    truncated: bool
    first: bool
    valid: bool


def stream(rng, length, frame_shape, dtype, rate):
    """One environment's rows; every kind of ending, at the given rate, frames naming their row."""
    rows, pending = (
        [],
        ["first"] if rng.random() < 0.7 else [],
    )  # the oldest row opens a game anyway
    for number in range(length):
        kind = pending.pop(0) if pending else "play"
        first, valid = kind == "first", kind not in ("final", "forced")
        terminal = truncated = False
        if valid and rng.random() < rate:
            ending = rng.choice(
                ["game over", "game over, same step", "life", "life, free", "cap", "cap, forgot",
                 "cap, same step", "both", "restart", "ignored"]
            )  # fmt: skip
            terminal = ending in ("game over", "game over, same step", "life", "life, free", "both")
            truncated = ending in ("cap", "cap, forgot", "cap, same step", "both")
            pending = {
                "game over": ["final", "first"],
                "cap": ["final", "first"],
                "both": ["final", "first"],
                "life": ["forced"],
                "ignored": ["forced"],
                "game over, same step": ["first"],
                "cap, same step": ["first"],
                "restart": ["first"],
            }.get(ending, [])
        values = rng.integers(256, size=frame_shape)
        values.reshape(-1)[0] = number % 251
        frame = (values if dtype == np.uint8 else values & 1).astype(dtype)
        reward = float(rng.normal()) if valid else float("nan")  # an invalid row's is never read
        rows.append(Row(frame, int(rng.integers(256)), reward, terminal, truncated, first, valid))
    return rows


class Oracle:
    """Observations as lists of frames, episodes walked row by row; nothing is ever overwritten."""

    def __init__(self, rows, capacity, stack, n_step):
        self.rows, self.n_step, self.newest = rows, n_step, len(rows) - 1
        self.oldest = max(0, len(rows) - capacity)
        self.observation, self.depth = [], []
        blank = np.zeros_like(rows[0].frame)
        for number, row in enumerate(rows):
            opens = row.first or number == 0
            past = [blank] * stack if opens else self.observation[-1]
            self.observation.append([*past[1:], row.frame])
            self.depth.append(1 if opens else min(stack, self.depth[-1] + 1))

    def heeded(self, number):
        row = self.rows[number]
        follower = self.rows[number + 1] if number < self.newest else None
        return row.valid and (row.terminal or follower is None or not follower.first)

    def is_start(self, number):
        stored = self.oldest + self.depth[number] - 1 <= number <= self.newest - self.n_step
        return stored and self.heeded(number)

    def transition(self, number):
        total, discount = np.float64(0), 1.0
        for step in range(self.n_step):
            row = self.rows[number + step]
            total += discount * row.reward
            discount = 0.0 if row.terminal else discount * DISCOUNT
            follower = number + step + 1
            if row.terminal or row.truncated or not self.heeded(follower):
                break
        return (self.pixels(number), self.rows[number].action, total, discount,
                self.pixels(follower))  # fmt: skip

    def pixels(self, number):
        frames = [x if x.ndim == 3 else x[..., None] for x in self.observation[number]]
        return np.concatenate(frames, axis=-1)


class Setup(NamedTuple):
    capacity: int
    num_envs: int
    stack: int
    n_step: int
    frame_shape: tuple[int, ...] = (2, 3)
    dtype: type = np.uint8


SETUPS = [
    Setup(23, 1, 4, 1),
    Setup(50, 3, 4, 3),
    Setup(83, 8, 4, 5),
    Setup(10, 1, 4, 5),  # the least capacity
    Setup(31, 3, 1, 2, (3, 2, 5), np.bool_),
    Setup(31, 3, 2, 1, (3, 2, 5)),
]

jit_add = jax.jit(device_replay.add, donate_argnums=0)
jit_is_start = jax.jit(device_replay.is_start, static_argnames=("stack", "n_step"))
jit_draw = jax.jit(device_replay.draw, static_argnums=2, static_argnames=("stack", "n_step"))


@functools.partial(jax.jit, static_argnames=("stack", "n_step"))
def jit_transitions(state, env, row, *, stack, n_step):
    batch = device_replay.gather(state, env, row, stack=stack, n_step=n_step, discount=DISCOUNT)
    return stack_frames(batch)


jit_sample = jax.jit(
    device_replay.sample, static_argnums=2, static_argnames=("stack", "n_step", "discount")
)


def make(setup):
    capacity, num_envs, stack, n_step, frame_shape, dtype = setup
    host = HostReplay(capacity, num_envs, frame_shape, stack, n_step, DISCOUNT, dtype)
    state = device_replay.init(capacity, num_envs, frame_shape, dtype, stack=stack, n_step=n_step)
    return host, state


def columns(streams, number):
    dtypes = [None, np.int32, np.float32, bool, bool, bool, bool]
    rows = [rows[number] for rows in streams]
    return [np.asarray(x, d) for x, d in zip(zip(*rows, strict=True), dtypes, strict=True)]


def fill(setup, seed, length, rate=0.2, device=True):
    rng = np.random.default_rng(seed)
    streams = [
        stream(rng, length, setup.frame_shape, setup.dtype, rate) for _ in range(setup.num_envs)
    ]
    host, state = make(setup)
    for number in range(length):
        row = columns(streams, number)
        host.add(*row)
        state = jit_add(state, *row) if device else state
    return streams, host, state


def assert_transitions(found: Transition, expected):
    s_tm1, a_tm1, r_t, discount_t, s_t = (np.stack(x) for x in zip(*expected, strict=True))
    np.testing.assert_array_equal(found.s_tm1, s_tm1, strict=True)
    np.testing.assert_array_equal(found.a_tm1, a_tm1)
    np.testing.assert_allclose(found.r_t, r_t, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.discount_t, discount_t, rtol=1e-6)
    np.testing.assert_array_equal(found.s_t, s_t, strict=True)
    dtypes = [np.dtype(x) for x in (np.int32, np.float32, np.float32)]
    assert [found.a_tm1.dtype, found.r_t.dtype, found.discount_t.dtype] == dtypes


@pytest.mark.parametrize("setup", SETUPS, ids=str)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_every_start_and_every_field_agree_with_the_oracle(setup, data):
    rows = setup.capacity // setup.num_envs
    length = data.draw(st.integers(1, 4 * rows), label="length")
    seed = data.draw(st.integers(0, 2**32 - 1), label="seed")
    rate = data.draw(st.sampled_from([0.0, 0.05, 0.3]), label="rate")
    streams, host, state = fill(setup, seed, length, rate)
    oracles = [Oracle(x, rows, setup.stack, setup.n_step) for x in streams]
    oldest = oracles[0].oldest
    numbers = np.arange(oldest, oldest + rows)  # of which those not yet written can't be starts
    expected = [[n < length and oracle.is_start(n) for n in numbers] for oracle in oracles]
    env, row = np.repeat(np.arange(setup.num_envs), rows), np.tile(numbers % rows, setup.num_envs)
    static = {"stack": setup.stack, "n_step": setup.n_step}
    device_env, device_row = env.astype(np.int32), row.astype(np.int32)

    starts = np.reshape(expected, -1)
    np.testing.assert_array_equal(host.is_start(env, row), starts)
    np.testing.assert_array_equal(jit_is_start(state, device_env, device_row, **static), starts)
    assert host.size == setup.num_envs * min(length, rows)
    if not starts.any():
        with pytest.raises(ValueError, match="no transition to sample"):
            host.sample(np.random.default_rng(0), 4)
        return
    wanted = [
        oracle.transition(number)
        for oracle, allowed in zip(oracles, expected, strict=True)
        for number, start in zip(numbers, allowed, strict=True)
        if start
    ]
    batch = host.gather(env[starts], row[starts])
    stacked = stack_frames(batch)
    assert isinstance(stacked.s_t, np.ndarray)
    assert_transitions(stacked, wanted)
    found = jit_transitions(state, device_env, device_row, **static)
    assert_transitions(jax.tree.map(lambda x: np.asarray(x)[starts], found), wanted)

    env, row = host.draw(np.random.default_rng(seed), 20)
    assert host.is_start(env, row).all()
    env, row = jit_draw(state, jax.random.key(seed), 20, **static)
    assert host.is_start(np.asarray(env), np.asarray(row)).all()


@pytest.mark.parametrize("setup", SETUPS[:3], ids=str)
def test_stacking_inside_jit_equals_stacking_on_the_host(setup):
    _, host, _ = fill(setup, 5, 60, device=False)
    batch = host.sample_frames(np.random.default_rng(1), 33)
    assert batch.frames.shape == (33, setup.stack + setup.n_step, *setup.frame_shape)
    on_host = host.sample(np.random.default_rng(1), 33)
    for run in (stack_frames, jax.jit(stack_frames)):
        jax.tree.map(np.testing.assert_array_equal, run(jax.device_put(batch)), on_host)


@pytest.mark.parametrize("place", ["host", "device"])
def test_sampling_is_uniform_over_exactly_the_starts(place):
    setup = Setup(60, 3, 4, 3)
    _, host, state = fill(setup, 2, 47, rate=0.15)
    all_env, all_row = np.divmod(np.arange(60), 20)
    starts = host.is_start(all_env, all_row)
    if place == "host":
        env, row = host.draw(np.random.default_rng(3), 40_000)
    else:
        env, row = device_replay.draw(state, jax.random.key(3), 40_000, stack=4, n_step=3)
    counts = np.bincount(np.asarray(env) * 20 + np.asarray(row), minlength=60)
    assert 20 < starts.sum() < 60 and counts[~starts].sum() == 0
    assert stats.chisquare(counts[starts]).pvalue > 1e-3


def test_host_finds_the_only_start_among_many_rows():
    host = HostReplay(6000, 2, (1, 1), 4, 1)
    for number in range(3000):
        valid = np.array([False, number == 1234])
        no = np.zeros(2, bool)
        host.add(np.zeros((2, 1, 1), np.uint8), np.zeros(2, int), np.zeros(2), no, no, no, valid)
    env, row = host.draw(np.random.default_rng(0), 3)
    assert (env == 1).all() and (row == 1234).all()


def tell(flags: str, n_step: int, stack: int = 3) -> HostReplay:
    """One environment told in letters: f first, . play, t terminal, c cut, i ignored."""
    host = HostReplay(50, 1, (1, 1), stack, n_step, 0.5)
    for number, flag in enumerate(flags):
        frame, action = np.full((1, 1, 1), number + 1, np.uint8), np.zeros(1, int)
        bits = [np.array([x]) for x in (flag in "tT", flag == "c", flag in "fT", flag != "i")]
        host.add(frame, action, np.array([2.0**number]), *bits)
    return host


def read(host: HostReplay, row: int) -> tuple[list[int], float, float, list[int]]:
    assert host.is_start(np.array([0]), np.array([row])).all()
    out = stack_frames(host.gather(np.array([0]), np.array([row])))
    return out.s_tm1[0, 0, 0].tolist(), out.r_t[0], out.discount_t[0], out.s_t[0, 0, 0].tolist()


def test_a_lost_life_ends_the_return_but_not_the_stack():
    host = tell("f.ti....", n_step=3)
    assert read(host, 1) == ([0, 1, 2], 2 + 4 / 2, 0.0, [2, 3, 4])
    assert read(host, 4) == ([3, 4, 5], 16 * 3, 0.125, [6, 7, 8])


def test_a_cut_game_bootstraps_from_its_final_frame():
    host = tell("f..cif...", n_step=3)
    assert read(host, 2) == ([1, 2, 3], 4 + 8 / 2, 0.25, [3, 4, 5])
    assert read(host, 5) == ([0, 0, 6], 32 * 3, 0.125, [7, 8, 9])
    assert not host.is_start(np.zeros(1, int), np.array([4])).any()


def test_a_restart_costs_the_row_before_it():
    host = tell("f...f....", n_step=3)
    assert not host.is_start(np.zeros(1, int), np.array([3])).any()
    assert read(host, 1) == ([0, 1, 2], 2 + 4 / 2, 0.25, [2, 3, 4])


def test_device_without_a_start_returns_nan_and_ends():
    state = device_replay.init(40, 2, (2, 2))
    for _ in range(2):
        batch = jit_sample(state, jax.random.key(0), 5, stack=4, n_step=1)
        assert np.isnan(batch.r_t).all()
        row = columns([stream(np.random.default_rng(0), 1, (2, 2), np.uint8, 0)] * 2, 0)
        state = jit_add(state, *row)


def test_the_same_seed_gives_the_same_batch():
    setup = SETUPS[1]
    _, host, state = fill(setup, 7, 40)
    a, b, c = (host.sample(np.random.default_rng(seed), 16) for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.array_equal(a.s_tm1, c.s_tm1)
    keys = [jax.random.key(seed) for seed in (1, 1, 2)]
    a, b, c = (jit_sample(state, key, 16, stack=4, n_step=3, discount=DISCOUNT) for key in keys)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert not np.array_equal(a.s_tm1, c.s_tm1)


def test_device_under_vmap_and_shard_map_equals_one_at_a_time():
    setup = Setup(23, 1, 1, 2, (3, 2, 5), np.bool_)
    states = [fill(setup, seed, 20 + seed)[2] for seed in range(8)]  # heads differ
    keys = jax.random.split(jax.random.key(9), 8)
    sample = functools.partial(
        device_replay.sample, batch_size=6, stack=1, n_step=2, discount=DISCOUNT
    )
    alone = [jax.jit(sample)(*pair) for pair in zip(states, keys, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, sample(states[0], keys[0]), alone[0])
    alone = jax.tree.map(lambda *x: jnp.stack(x), *alone)
    assert alone.s_tm1.shape == (8, 6, 3, 2, 5) and alone.s_tm1.dtype == bool
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
    row = columns([stream(np.random.default_rng(1), 1, (3, 2, 5), np.bool_, 0)] * 1, 0)
    jax.tree.map(np.testing.assert_array_equal, jax.jit(jax.vmap(sample))(stacked, keys), alone)
    added = jax.jit(jax.vmap(lambda state: device_replay.add(state, *row)))(stacked)
    one = jit_add(states[3], *row)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x[3], y), added, one)

    # One replay of eight environments over eight devices: each device samples from its own.
    _, _, joint = fill(Setup(8 * 23, 8, 4, 3), 11, 40)
    specs = jax.tree.map(lambda x: P("data") if x.ndim else P(), joint)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sample = functools.partial(device_replay.sample, batch_size=4, stack=4, n_step=3)

    @jax.jit
    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"), check_vma=False
    )
    def sharded(state, key):
        return sample(state, key[0])

    found = sharded(joint, keys)
    for index in (0, 5):
        shard = jax.tree.map(lambda x, i=index: x[i : i + 1] if x.ndim else x, joint)
        expected = jax.jit(sample)(shard, keys[index])
        part = jax.tree.map(lambda x, i=index: x[4 * i : 4 * i + 4], found)
        jax.tree.map(np.testing.assert_array_equal, part, expected)


def test_adding_on_the_device_writes_in_place():
    state = device_replay.init(1000, 2, (20, 20))
    row = columns([stream(np.random.default_rng(0), 1, (20, 20), np.uint8, 0)] * 2, 0)
    compiled = jit_add.lower(state, *row).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 10_000
    before = state.frames.unsafe_buffer_pointer()
    assert jit_add(state, *row).frames.unsafe_buffer_pointer() == before
    assert state.frames.is_deleted()


@pytest.mark.parametrize("length", [9, 40])
def test_a_saved_replay_goes_on_as_if_never_stopped(length, tmp_path):
    setup = SETUPS[1]
    streams, host, _ = fill(setup, 4, length + 5, device=False)
    whole, _ = make(setup)
    for number in range(length):
        whole.add(*columns(streams, number))
    saved = whole.state_dict()
    assert saved["frames"].shape == (3, min(length, 16), 2, 3)
    np.savez(tmp_path / "replay.npz", **saved)
    resumed, _ = make(setup)
    with np.load(tmp_path / "replay.npz", allow_pickle=False) as file:
        resumed.load_state_dict(file)
    for number in range(length, length + 5):
        resumed.add(*columns(streams, number))
    rngs = [np.random.default_rng(0) for _ in range(2)]
    batches = [x.sample(rng, 50) for x, rng in zip((host, resumed), rngs, strict=True)]
    jax.tree.map(np.testing.assert_array_equal, *batches)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"capacity": 61}, r"has rows 20; this one has 30"),
        ({"num_envs": 2, "capacity": 40}, r"has num_envs 3; this one has 2"),
        ({"frame_shape": (3, 2)}, r"has frame_shape \[2 3\]; this one has \[3 2\]"),
        ({"dtype": bool}, r"saved frames are uint8; these are bool"),
    ],
)
def test_another_layout_is_refused(other, message):
    arguments = {"capacity": 60, "num_envs": 3, "frame_shape": (2, 3), "stack": 2}
    saved = HostReplay(**arguments).state_dict()
    if "capacity" in other and "num_envs" not in other:
        other = {"capacity": 90}
    with pytest.raises(ValueError, match=message):
        HostReplay(**{**arguments, **other}).load_state_dict(saved)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"n_step": 0}, "n_step is 0; it must be at least 1"),
        ({"stack": 0}, "stack is 0"),
        ({"num_envs": 0}, "num_envs is 0"),
        ({"capacity": 17}, "capacity is 17.*= 18"),
        ({"frame_shape": (4,)}, r"frame_shape is \(4,\)"),
    ],
)
def test_bad_arguments_are_named(bad, message):
    arguments = {"capacity": 18, "num_envs": 3, "frame_shape": (2, 2), "stack": 4, "n_step": 1}
    for build in (HostReplay, device_replay.init):
        build(**arguments)
        with pytest.raises(ValueError, match=message):
            build(**{**arguments, **bad})


def test_bad_rows_and_types_are_named():
    host, state = make(Setup(40, 2, 4, 1))
    row = columns([stream(np.random.default_rng(0), 1, (2, 3), np.uint8, 0)] * 2, 0)
    bad = [
        (0, row[0][:1], r"frame is uint8 \(1, 2, 3\); expected uint8 \(2, 2, 3\)"),
        (0, row[0].astype(np.float32), "frame is float32"),
        (1, np.array([3, 256]), r"actions are \[  3 256\]; they must lie in 0..255"),
        (2, np.zeros((2, 1)), r"expected \(2,\) for each"),
    ]
    for index, value, message in bad:
        with pytest.raises(ValueError, match=message):
            host.add(*row[:index], value, *row[index + 1 :])
    assert host.size == 0
    with pytest.raises(ValueError, match="frame is float32"):
        device_replay.add(state, row[0].astype(np.float32), *row[1:])
    with pytest.raises(ValueError, match="dtype is float32"):
        device_replay.init(40, 2, dtype=np.float32)
    with pytest.raises(ValueError, match="discount is 1.5"):
        HostReplay(40, 2, discount=1.5)


def test_a_million_transitions_fit_in_7_3_gigabytes():
    assert HostReplay(1_000_000, 8).nbytes <= 7.3e9  # claimed from the system only when written
    assert device_replay.nbytes(1_000_000, 8) <= 7.3e9
    state = device_replay.init(100, 3, (5, 5, 3), np.bool_)
    assert device_replay.nbytes(100, 3, (5, 5, 3), np.bool_) == sum(
        x.nbytes for x in jax.tree.leaves(state)
    )
