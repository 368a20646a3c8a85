"""MinAtar training on the device, against a plain Python loop over the same pure functions."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fourfold.runtime import mesh as meshes
from jaxrl import agent as agents
from jaxrl import device_replay, fused, train_minatar
from jaxrl.config import AgentConfig, Exploration, MinAtarConfig
from jaxrl.windows import TERMINAL

# No period divides another but by the update's; the ring is as long as the run plus a prime's rest.
CONFIG = MinAtarConfig(
    agent=AgentConfig(spectral=("-2",), num_atoms=5),
    exploration=Exploration(warmup=60, end_step=160, end=0.1),
    steps=240,
    num_seeds=4,
    convs=(2,),
    hidden=(8,),
    batch_size=4,
    target_period=28,
    replay_capacity=251,
    log_every=20,
    checkpoint_every=20,
)
RATES = np.array([2.5e-4, 0.0, 1e-2, 1e-2], np.float32)


@pytest.fixture(scope="module")
def run():
    """Four agents, differing in seed and in learning rate, two on each of two devices."""
    functions = train_minatar.compile_functions(
        CONFIG, meshes.make_mesh(2), 4, fused.hyper_of(CONFIG)
    )
    hyper = fused.Hyper(jnp.asarray(RATES), jnp.full((4,), CONFIG.agent.eps, jnp.float32))
    hypers, keys = functions.place(hyper), functions.place(fused.seed_keys(CONFIG))
    first = functions.init(keys, hypers)
    start = jax.device_get(first.agent)
    compiled = functions.interval.lower(first, hypers).compile()
    rows, carry = [], first
    for step, row, carry in train_minatar.intervals(  # noqa: B007
        functions._replace(interval=compiled), first, hypers, CONFIG.steps
    ):
        rows.append(row)
    assert step == CONFIG.steps
    rows = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return start, carry, rows, compiled.as_text()


@pytest.fixture(scope="module")
def plain():
    """One agent at a time, as a textbook writes it: one step, then perhaps an update or a sync."""
    env, agent = fused.make(CONFIG, fused.hyper_of(CONFIG))
    plan = CONFIG.exploration
    env_step, observe = jax.jit(env.step), jax.jit(env.observe)
    add = jax.jit(device_replay.add)
    start = jax.jit(lambda key: agents.init(agent, key, env.obs_shape))
    act = jax.jit(functools.partial(agents.act, agent))
    sample = functools.partial(device_replay.sample, batch_size=4, stack=1, discount=0.99)

    @jax.jit
    def learn(state, replay, key, rate):
        one = fused.make(CONFIG, fused.hyper_of(CONFIG)._replace(learning_rate=rate))[1]
        return agents.update(one, state, sample(replay, key))

    def play(seed, rate):
        key = jax.random.fold_in(jax.random.key(CONFIG.seed), seed)
        agent_key, env_key = jax.random.split(jax.random.fold_in(key, 0))
        state, game = start(agent_key), jax.jit(env.init)(env_key)
        replay = device_replay.init(CONFIG.replay_capacity, 1, env.obs_shape, bool, stack=1)
        warm_key, train_key, draw_key = (jax.random.fold_in(key, i) for i in (1, 2, 3))
        first, losses, yes, no = jnp.array([True]), [], jnp.array([True]), jnp.array([False])
        for step in range(CONFIG.steps):
            obs = observe(game)
            if step < plan.warmup:
                action_key, game_key = jax.random.split(jax.random.fold_in(warm_key, step))
                action = jax.random.randint(action_key, (), 0, 6)[None]
            else:
                step_key = jax.random.fold_in(train_key, step)
                if step % 4 == 0:
                    sample_key = jax.random.fold_in(draw_key, step)
                act_key, game_key = jax.random.split(step_key)
                epsilon = 1 - 0.9 * min((step - 60) / 100, 1)
                action, state = act(state, obs[None], jnp.float32(epsilon), act_key)
            game, reward, terminal, _ = env_step(game, action[0], game_key)
            replay = add(replay, obs[None], action, reward[None], terminal[None], no, first, yes)
            first = terminal[None]
            if step >= plan.warmup and (step + 1) % 4 == 0:
                state, metrics = learn(state, replay, sample_key, jnp.float32(rate))
                losses.append(float(metrics["loss"]))
            if (step + 1) % CONFIG.target_period == 0:
                state = agents.sync_target(state)
        return state, replay, losses

    return play


@pytest.mark.parametrize("seed", [0, 3])
def test_it_is_the_plain_loop(run, plain, seed):
    # Batching over agents changes the order of sums in matrix products, hence not bit for bit;
    # after 45 updates a wrong key, step or sync would show in the first digit.
    _, carry, rows, _ = run
    state, replay, losses = plain(seed, RATES[seed])
    mine = jax.tree.map(lambda x: x[seed], jax.device_get(carry.agent))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), mine, state)
    np.testing.assert_array_equal(np.asarray(carry.replay.frames)[seed], replay.frames)
    np.testing.assert_array_equal(np.asarray(carry.replay.action)[seed], replay.action)
    expected = np.reshape(losses, (-1, 5)).mean(axis=1)
    np.testing.assert_allclose(rows["loss"][3:, seed], expected, rtol=1e-4)


def test_updates_and_warm_up(run):
    start, carry, rows, _ = run
    assert int(carry.step) == 240
    np.testing.assert_array_equal(carry.agent.updates, 45)
    assert np.isnan(rows["loss"][:3]).all() and np.isfinite(rows["loss"][3:]).all()
    assert np.isfinite(rows["sigma/fc"][3:]).all()
    # The agent with a learning rate of 0 kept its weights but advanced its power iteration.
    after = jax.device_get(carry.agent)
    for old, new in zip(jax.tree.leaves(start.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_array_equal(old[1], new[1])
        assert not np.array_equal(old[0], new[0])
    assert not np.array_equal(start.spectral["fc"]["u"][1], after.spectral["fc"]["u"][1])


def test_returns_are_those_of_the_games_that_ended(run):
    _, carry, rows, _ = run
    rewards = np.asarray(carry.replay.reward)[:, 0, : CONFIG.steps]
    ends = (np.asarray(carry.replay.flags)[:, 0, : CONFIG.steps] & TERMINAL) != 0
    assert ends.sum() > 10 and rewards.sum() > 3
    for seed in range(4):
        returns, score = [[] for _ in range(12)], 0.0
        for step in range(CONFIG.steps):
            score += rewards[seed, step]
            if ends[seed, step]:
                returns[step // 20].append(score)
                score = 0.0
        assert rows["episodes"][:, seed].tolist() == [len(r) for r in returns]
        expected = [np.mean(r) if r else np.nan for r in returns]
        np.testing.assert_allclose(rows["return"][:, seed], expected, rtol=1e-6)
        assert float(carry.score[seed]) == pytest.approx(score)


def test_the_replay_is_written_in_place_and_devices_do_not_talk(run):
    text = run[-1]
    assert "dynamic-update-slice" in text and "while(" in text
    assert re.search(r"u8\[2,1,251,50\]", text), "the frames' shape isn't where it is looked for"
    copies = [x for x in text.splitlines() if re.search(r"= \S*\[2,1,251\S* (copy|select)\(", x)]
    assert not copies, copies
    assert not re.search(r"all-reduce|all-gather|collective-permute", text)


def test_the_agents_of_train_share_their_step():
    # vmap refuses out_axes None for whatever became batched.
    keys, hyper = fused.seed_keys(CONFIG), fused.hyper_of(CONFIG)
    train = functools.partial(fused.train, CONFIG)
    shared = fused.axes(jax.eval_shape(train, keys[0], hyper)[0])
    carry, rows = jax.eval_shape(jax.vmap(train, (0, None), (shared, 0)), keys, hyper)
    assert carry.step.shape == carry.replay.head.shape == ()
    assert rows["return"].shape == (4, 12)


def test_a_sweep_over_the_bound_is_one_program():
    config = dataclasses.replace(CONFIG, agent=AgentConfig(spectral=("-2",), bound=1.0))
    hyper = fused.hyper_of(config)
    sweep = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), hyper)
    train = jax.vmap(functools.partial(fused.train, config), (None, 0))
    carry, _ = jax.eval_shape(train, jax.random.key(0), sweep)
    assert carry.agent.params["fc"]["kernel"].shape == (2, 128, 8)


def test_a_seed_does_not_depend_on_how_many_there_are():
    many = fused.seed_keys(CONFIG)
    one = fused.seed_keys(dataclasses.replace(CONFIG, num_seeds=1))
    np.testing.assert_array_equal(jax.random.key_data(many)[0], jax.random.key_data(one)[0])
    assert len(np.unique(jax.random.key_data(many), axis=0)) == 4


def test_bad_arguments_are_refused():
    hyper = fused.hyper_of(CONFIG)
    odd = dataclasses.replace(CONFIG, exploration=Exploration(warmup=62, end_step=100))
    with pytest.raises(ValueError, match="warmup must be a multiple of update_period 4, found 62"):
        fused.make(odd, hyper)
    layer = dataclasses.replace(CONFIG, agent=AgentConfig(spectral=("-9",)))
    with pytest.raises(ValueError, match="'-9'"):
        fused.make(layer, hyper)
    with pytest.raises(ValueError, match="multiple of log_every 20, found 30"):
        fused.run(CONFIG, None, hyper, 30)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="multiple of the 3 devices, found 4"):
        train_minatar.compile_functions(CONFIG, meshes.make_mesh(3), 4, hyper)
