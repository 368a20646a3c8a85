import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("pgx")

from jaxrl.minatar_env import GAMES, draw, minatar  # noqa: E402

CHANNELS = {"asterix": 4, "breakout": 4, "freeway": 7, "seaquest": 10, "space_invaders": 6}


@partial(jax.jit, static_argnums=0)
def rollout(env, key, actions):
    """Plays actions (T, N); returns the last states and (T, N) records."""
    steps, num_envs = actions.shape

    def body(states, xs):
        key, action = xs
        frames = jax.vmap(env.observe)(states)
        states, *outcome = jax.vmap(env.step)(states, action, jax.random.split(key, num_envs))
        return states, (frames, *outcome)

    states = jax.vmap(env.init)(jax.random.split(key, num_envs))
    return jax.lax.scan(body, states, (jax.random.split(key, steps), actions))


def play(game, seed, *, steps=400, num_envs=16):
    """Random actions; one size for all, so that each game compiles once."""
    key, action_key = jax.random.split(jax.random.key(seed))
    actions = jax.random.randint(action_key, (steps, num_envs), 0, 6)
    return rollout(minatar(game), key, actions)


@pytest.mark.parametrize("game", GAMES)
def test_shapes_dtypes_and_ends(game):
    env = minatar(game)
    assert env.num_actions == 6 and env.obs_shape == (10, 10, CHANNELS[game])
    states, (frames, reward, terminal, truncated) = play(game, 0)
    assert frames.shape == (400, 16, *env.obs_shape) and frames.dtype == bool
    assert reward.shape == (400, 16) and reward.dtype == jnp.float32
    assert terminal.dtype == bool and truncated.dtype == bool
    assert not truncated.any()
    assert frames.any(axis=(2, 3, 4)).all()
    if game == "freeway":  # which lasts 2,500 steps
        assert not terminal.any()
    else:
        assert terminal.any() and reward.max() >= 1
    if game == "asterix":  # difficulty ramps: pgx's own count goes up as a game goes on
        assert states._ramp_index.max() >= 1


def test_steps_are_those_of_pgx(lenient_promotion):
    """The pruned step against pgx's own, with the reset done by hand."""
    from pgx.minatar.breakout import MinAtarBreakout

    theirs = MinAtarBreakout(use_minimal_action_set=False, sticky_action_prob=0.1)
    step, init = jax.jit(theirs.step), jax.jit(theirs.init)
    steps, key = 60, jax.random.key(5)
    actions = jax.random.randint(jax.random.key(6), (steps, 1), 0, 6)
    _, (frames, reward, terminal, _) = rollout(minatar("breakout"), key, actions)
    state = init(jax.random.split(key, 1)[0])
    for t, step_key in enumerate(jax.random.split(key, steps)):
        np.testing.assert_array_equal(frames[t, 0], state.observation)
        first, second = jax.random.split(jax.random.split(step_key, 1)[0])
        state = step(state, actions[t, 0], first)
        assert reward[t, 0] == state.rewards[0]
        assert terminal[t, 0] == state.terminated
        if state.terminated:
            state = init(second)
    assert terminal.any() and reward.any()


def test_reset_is_part_of_the_terminal_step():
    _, (frames, _, terminal, _) = play("breakout", 1)
    after = np.asarray(frames)[1:][np.asarray(terminal)[:-1]]
    assert len(after) > 20
    # A new game: paddle at column 4, ball and trail in row 3 at a side, three full rows of bricks.
    assert after[:, 9, 4, 0].all()
    assert (after[:, 1:4, :, 3].all(axis=(1, 2))).all() and not after[:, 4:, :, 3].any()
    sides = after[:, 3, :, 1].argmax(axis=1)
    assert set(sides) == {0, 9}


def test_sticky_probability():
    """Left and right in turn: wherever the paddle moves the wrong way, the action was repeated."""
    steps, num_envs = 400, 16
    actions = jnp.tile(jnp.array([[3], [1]], jnp.int32), (steps // 2, num_envs))
    _, (frames, _, terminal, _) = rollout(minatar("breakout"), jax.random.key(2), actions)
    paddle = np.asarray(frames)[:, :, 9, :, 0].argmax(-1)
    moved, asked = np.diff(paddle, axis=0), np.where(np.asarray(actions) == 3, 1, -1)[:-1]
    ended = np.asarray(terminal)[:-1]
    played = asked.copy()
    played[(moved == -asked)] *= -1
    clear = ~ended & (moved != 0)
    # A repeat shows only where the previous action played was the other one.
    previous = np.vstack([np.zeros((1, num_envs), int), np.where(clear, played, 0)[:-1]])
    clear &= previous == -asked
    rate, count = (moved == -asked)[clear].mean(), clear.sum()
    assert count > 2000
    assert abs(rate - 0.1) < 4 * np.sqrt(0.09 / count)


def test_all_six_actions_are_heeded_and_eager_agrees():
    """Fire (5) does not exist in a minimal set of four; no key below makes it stick."""
    env = minatar("space_invaders")
    keys = jax.random.split(jax.random.key(0), 6)
    states = jax.jit(jax.vmap(env.init))(keys)
    actions = jnp.arange(6, dtype=jnp.int32)
    batched = jax.jit(jax.vmap(env.step))(states, actions, keys)
    bullets = jax.vmap(env.observe)(batched[0])[..., 4].sum(axis=(1, 2))
    np.testing.assert_array_equal(bullets, [0, 0, 0, 0, 0, 1])
    single = env.step(jax.tree.map(lambda x: x[5], states), actions[5], keys[5])
    same = jax.tree.map(lambda a, b: bool((a[5] == b).all()), batched, single)
    assert all(jax.tree.leaves(same))


def test_state_keeps_its_structure():
    env = minatar("breakout")
    state = env.init(jax.random.key(0))
    after = env.step(state, jnp.int32(0), jax.random.key(1))[0]
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, after)
    assert minatar("breakout") == env and hash(minatar("breakout")) == hash(env)


def test_draw():
    env = minatar("breakout")
    picture = draw(env.observe(env.init(jax.random.key(0))), scale=3)
    assert picture.shape == (30, 30, 3) and picture.dtype == np.uint8
    assert not picture[0].any() and picture[3:12].any(axis=-1).all()


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match="'Breakout': did you mean breakout.*allowed: asterix"):
        minatar("Breakout")
    with pytest.raises(ValueError, match="allowed"):
        minatar("zzz")
    monkeypatch.setitem(sys.modules, "pgx.minatar.breakout", None)
    with pytest.raises(ImportError, match=r"pip install 'fourfold\[rl\]'"):
        minatar("breakout")
