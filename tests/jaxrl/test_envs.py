import sys
from types import SimpleNamespace

import numpy as np
import pytest

envpool = pytest.importorskip("envpool")

from jaxrl.envs import AtariEnv, list_games, make_atari  # noqa: E402

N = 4


def raw_pool(num_envs, seed, **kw):
    """An envpool with nothing on, seeded as `make_atari(seed=seed)` is documented to."""
    seeds = [int(s) >> 1 for s in np.random.SeedSequence(seed).generate_state(num_envs)]
    off = dict(stack_num=1, episodic_life=False, use_fire_reset=False, reward_clip=False)
    return envpool.make(
        "Breakout-v5", env_type="gymnasium", num_envs=num_envs, seed=seeds, **{**off, **kw}
    )


def roll(env, steps, seed=0):
    """Random actions; returns the steps, fields stacked over time, and the actions."""
    rng = np.random.default_rng(seed)
    actions = rng.integers(0, env.num_actions, (steps, env.num_envs))
    rows = [env.reset()] + [env.step(a) for a in actions]
    return type(rows[0])(*(np.stack(f) for f in zip(*rows, strict=True))), actions


@pytest.fixture(scope="module")
def breakout():
    env = make_atari("breakout", N, seed=3, num_threads=2)
    out = roll(env, 700)
    env.close()
    return out


def test_shapes_and_dtypes(breakout):
    steps, _ = breakout
    step = type(steps)(*(f[5] for f in steps))
    assert step.frame.shape == (N, 84, 84) and step.frame.dtype == np.uint8
    for name in ("reward", "episode_return"):
        assert getattr(step, name).shape == (N,) and getattr(step, name).dtype == np.float32
    for name in ("terminal", "truncated", "first", "valid", "episode_over"):
        assert getattr(step, name).shape == (N,) and getattr(step, name).dtype == np.bool_


def test_classic_training_against_raw_envpool(breakout):
    """Every field, re-derived from a second, raw pool that is given the actions in force."""
    steps, actions = breakout
    pool = raw_pool(N, seed=3, noop_max=30)
    obs, info = pool.reset()
    np.testing.assert_array_equal(steps.frame[0], obs[:, 0])
    lives = info["lives"].tolist()
    forced, total, was_over = [False] * N, [0.0] * N, [False] * N
    life_losses = game_overs = 0
    for t, action in enumerate(actions, start=1):
        played = [0 if forced[i] else int(action[i]) for i in range(N)]
        obs, reward, term, trunc, info = pool.step(np.array(played, np.int32))
        np.testing.assert_array_equal(steps.frame[t], obs[:, 0])
        for i in range(N):
            over = bool(term[i] or trunc[i])
            lost = 0 < info["lives"][i] < lives[i] and not was_over[i] and not forced[i]
            total[i] = float(reward[i]) + (0.0 if was_over[i] else total[i])
            found = [bool(f[t, i]) for f in steps[2:7]]
            #        terminal          truncated first        valid                 episode_over
            expect = [over or lost, False, was_over[i], not (over or lost), over]
            assert found == expect, (t, i)
            assert steps.reward[t, i] == reward[i]
            assert steps.episode_return[t, i] == total[i]
            life_losses += lost
            game_overs += over
            forced[i], was_over[i], lives[i] = lost, over, int(info["lives"][i])
    assert life_losses > 10 and game_overs > 2


class Scripted:
    """Stands in for a pool of one environment that shows given (lives, done, game over)."""

    num_envs, action_space = 1, SimpleNamespace(n=4)

    def __init__(self, *script):
        self.script, self.clock, self.played = list(script), 0, []

    def _next(self):
        lives, done, over = (np.array([x]) for x in self.script.pop(0))
        info = dict(elapsed_step=np.array([self.clock]), lives=lives, terminated=over.astype(int))
        return np.zeros((1, 1, 84, 84), np.uint8), np.ones(1, np.float32), done, ~done & False, info

    def reset(self):
        frames, *_, info = self._next()
        return frames, info

    def send(self, actions):
        self.played.append(int(actions[0]))

    def recv(self):
        self.clock += 1
        return self._next()


@pytest.mark.parametrize(
    ("script", "terminal", "valid"),
    [
        # A life is lost; the no-op that follows is not the policy's, but the one after it is.
        ([3, 3, 2, 2, 2], [0, 1, 0, 0], [1, 0, 1, 1]),
        # A second one lost in the forced no-op is nobody's fault.
        ([3, 2, 1, 1, 0], [1, 0, 0, 0], [0, 1, 1, 1]),
        # Lives of 0 while the game goes on (Q*bert), and a life won.
        ([1, 0, 0, 1, 2], [0, 0, 0, 0], [1, 1, 1, 1]),
        # No lives at all (Pong).
        ([0, 0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]),
    ],
)
def test_lives(script, terminal, valid):
    pool = Scripted(*((lives, False, False) for lives in script))
    env = AtariEnv(pool, "Scripted", life_loss_terminal=True)
    env.reset()
    steps = [env.step(np.array([3])) for _ in script[1:]]
    assert [int(s.terminal[0]) for s in steps] == terminal
    assert [int(s.valid[0]) for s in steps] == valid
    assert pool.played == [3] + [3 if v else 0 for v in valid[:-1]]


def test_life_lost_on_the_cap_is_terminal_and_over():
    env = AtariEnv(Scripted((3, False, False), (2, True, False)), "", life_loss_terminal=True)
    env.reset()
    step = env.step(np.array([1]))
    assert step.terminal[0] and step.episode_over[0] and not step.truncated[0] and not step.valid[0]


def test_reset_row_is_empty_and_flagged(breakout):
    steps, _ = breakout
    t, i = np.nonzero(steps.first)
    assert len(t) > N  # the first rows and some later ones
    assert not steps.reward[t, i].any() and not steps.episode_return[t, i].any()
    assert not steps.terminal[t, i].any() and not steps.truncated[t, i].any()
    assert steps.valid[t, i].all()


def test_no_valid_row_crosses_a_game(breakout):
    steps, _ = breakout
    assert not (steps.valid[:-1] & steps.first[1:]).any()
    assert not (steps.valid & steps.episode_over).any()


def test_evaluation_plays_full_games():
    env = make_atari("Breakout", 2, training=False, seed=3)
    steps, _ = roll(env, 400)
    np.testing.assert_array_equal(steps.terminal, steps.episode_over)
    np.testing.assert_array_equal(steps.valid, ~steps.episode_over)
    assert steps.episode_over.sum() >= 2
    # A game is five lives long, hence far longer than the first terminal in training.
    train, _ = roll(make_atari("Breakout", 2, seed=3), 400)
    assert train.terminal.sum() > 3 * steps.terminal.sum()


def test_rewards_are_not_clipped():
    env = make_atari("SpaceInvaders", 2, training=False, seed=0)
    steps, _ = roll(env, 300)
    assert set(np.unique(steps.reward)) <= {0.0, 5.0, 10.0, 15.0, 20.0, 25.0, 30.0, 200.0}
    assert steps.reward.max() >= 5.0
    ends = steps.episode_over.nonzero()
    if len(ends[0]):
        t, i = ends[0][0], ends[1][0]
        assert steps.episode_return[t, i] == steps.reward[: t + 1, i].sum()


@pytest.mark.parametrize("protocol", ["classic", "modern"])
def test_cap_truncates_and_is_not_terminal(protocol):
    env = make_atari("Pong", 2, protocol=protocol, seed=1, max_steps=7)
    steps, _ = roll(env, 20)
    np.testing.assert_array_equal(np.flatnonzero(steps.truncated[:, 0]), [7, 15])
    np.testing.assert_array_equal(np.flatnonzero(steps.first[:, 0]), [0, 8, 16])
    assert not steps.terminal.any()
    np.testing.assert_array_equal(steps.episode_over, steps.truncated)
    np.testing.assert_array_equal(steps.valid, ~steps.truncated)


def test_game_over_on_the_cap_is_terminal():
    free, _ = roll(make_atari("Breakout", 1, training=False, seed=5), 400)
    length = int(np.flatnonzero(free.episode_over[:, 0])[0])
    for cap, terminal in ((length, True), (length - 1, False)):
        env = make_atari("Breakout", 1, training=False, seed=5, max_steps=cap)
        steps, _ = roll(env, cap)
        assert steps.episode_over[-1, 0]
        assert steps.terminal[-1, 0] == terminal and steps.truncated[-1, 0] == (not terminal)


def noop_memories(count):
    """Memory after 1..count no-op frames, from a pool that skips none."""
    pool = raw_pool(1, seed=0, noop_max=1, frame_skip=1)
    memory = [pool.reset()[1]["ram"][0].tobytes()]
    for _ in range(count - 1):
        memory.append(pool.step(np.zeros(1, np.int32))[4]["ram"][0].tobytes())
    assert len(set(memory)) == count
    return memory


@pytest.mark.parametrize(("protocol", "most"), [("classic", 30), ("modern", 1)])
def test_start_is_a_number_of_noops_and_nothing_else(protocol, most):
    """Both ends of the documented range occur, nothing beyond, and no button was pushed."""
    memory = noop_memories(31)
    env = make_atari("Breakout", 8, protocol=protocol, seed=0)
    counts = [
        memory.index(ram.tobytes()) + 1 for _ in range(16) for ram in env._pool.reset()[1]["ram"]
    ]
    assert min(counts) == 1 and max(counts) == most
    if most > 1:
        assert abs(np.mean(counts) - (most + 1) / 2) < 4 * most / np.sqrt(12 * len(counts))


def test_frame_is_area_resized_grey_maximum_of_the_last_two_of_four():
    """From colour screens of a pool without frame skip, in float64."""

    def area(size, out):
        edges = np.linspace(0, size, out + 1)
        low, high = edges[:-1, None], edges[1:, None]
        cells = np.arange(size)
        overlap = np.minimum(high, cells + 1) - np.maximum(low, cells)
        return np.clip(overlap, 0, None) * out / size

    rows, columns = area(210, 84), area(160, 84)
    env = make_atari("Breakout", 1, seed=2)
    pool = raw_pool(1, seed=2, noop_max=30, frame_skip=1, render_mode="rgb_array")
    env.reset(), pool.reset()
    moving = 0
    for action in [1, 2, 3, 0, 2, 2, 2, 3] * 2:
        frame = env.step(np.array([action])).frame[0]
        grey = []
        for _ in range(4):
            pool.step(np.array([action], np.int32))
            grey.append(pool.render(0)[0] @ np.array([0.299, 0.587, 0.114]))
        moving += not np.array_equal(grey[2], grey[3])
        expect = rows @ np.maximum(grey[2], grey[3]) @ columns.T
        np.testing.assert_allclose(frame, expect, atol=1.6)
        assert np.array_equal(env.render(), pool.render(0)[0])
    assert moving > 8


def test_sticky_actions_only_in_modern():
    actions = np.random.default_rng(0).integers(0, 6, 60)

    def distinct(env):
        env.reset()
        return len({f.tobytes() for f in [env.step(np.full(6, a)).frame for a in actions][-1]})

    # Modern games all start alike (shown above), so that only stickiness can tell them apart.
    assert distinct(make_atari("Pong", 6, protocol="modern", seed=0)) >= 4
    # Classic actions are heeded: `test_classic_training_against_raw_envpool`.
    modern, classic = (
        make_atari("Pong", 1, protocol=p)._pool.config for p in ("modern", "classic")
    )
    assert modern["repeat_action_probability"] == 0.25
    assert classic["repeat_action_probability"] == 0.0


def test_seeds():
    def frames(seed, threads):
        return roll(make_atari("Breakout", 3, seed=seed, num_threads=threads), 60)[0].frame

    one = frames(0, 1)
    np.testing.assert_array_equal(one, frames(0, 3))
    other = frames(1, 2)
    # Neither within a seed nor between neighbouring seeds is a stream used twice.
    streams = [f.tobytes() for f in np.concatenate([one, other], axis=1).swapaxes(0, 1)]
    assert len(set(streams)) == 6


def test_send_and_recv_are_the_halves_of_step():
    whole, halves = make_atari("Pong", 2, seed=4), make_atari("Pong", 2, seed=4)
    np.testing.assert_array_equal(whole.reset().frame, halves.reset().frame)
    kept = []
    for action in (0, 2, 3, 5, 2):
        expect = whole.step(np.full(2, action))
        halves.send(np.full(2, action))
        with pytest.raises(RuntimeError, match="idle"):
            halves.send(np.full(2, action))
        found = halves.recv()
        for x, y in zip(expect, found, strict=True):
            np.testing.assert_array_equal(x, y)
        kept.append((found.frame, found.frame.copy()))
    assert all(np.array_equal(x, y) for x, y in kept)  # later steps leave frames alone
    with pytest.raises(RuntimeError, match="recv"):
        halves.recv()
    halves.send(np.zeros(2, np.int64))
    halves.close()
    halves.close()
    with pytest.raises(RuntimeError, match="closed"):
        halves.reset()


def test_reset_midway_starts_afresh():
    env = make_atari("Breakout", 2, seed=0)
    roll(env, 40)
    step = env.reset()
    assert step.first.all() and step.valid.all() and not step.episode_return.any()
    assert not env.step(np.zeros(2, np.int32)).terminal.any()


@pytest.mark.parametrize(
    "actions",
    [np.zeros(3, int), np.zeros((2, 1), int), np.zeros(2), np.array([0, 6]), np.array([-1, 0])],
)
def test_bad_actions(actions):
    env = make_atari("Pong", 2)
    with pytest.raises(RuntimeError, match="idle"):
        env.send(np.zeros(2, int))
    env.reset()
    with pytest.raises(ValueError, match="actions must be"):
        env.step(actions)
    env.step(np.zeros(2, int))  # a refused action leaves the environments usable


@pytest.mark.parametrize(
    ("kw", "match"),
    [
        (dict(num_envs=0), "num_envs must be at least 1, found 0"),
        (dict(num_envs=-2), "num_envs .* found -2"),
        (dict(seed=-1), "seed"),
        (dict(num_threads=0), "num_threads"),
        (dict(max_steps=0), "max_steps"),
        (dict(protocol="clasic"), "'clasic'; allowed: classic, modern"),
        (dict(game="PongNoFrameskip-v4"), r"did you mean Pong.*list_games"),
        (dict(game="spaceinvader"), r"did you mean SpaceInvaders"),
        (dict(game="pogn"), r"did you mean Pong"),
        (dict(game="zzz"), r"unknown game 'zzz': jaxrl.envs.list_games"),
    ],
)
def test_bad_arguments(kw, match):
    with pytest.raises(ValueError, match=match):
        make_atari(**{**dict(game="Pong", num_envs=1), **kw})


def test_list_games_and_spelling():
    games = list_games()
    assert {"Pong", "Breakout", "SpaceInvaders", "MontezumaRevenge"} <= set(games)
    assert make_atari("space invaders", 1).game == make_atari("space_invaders", 1).game


def test_without_envpool(monkeypatch):
    monkeypatch.setitem(sys.modules, "envpool", None)
    with pytest.raises(ImportError, match=r"pip install 'fourfold\[rl\]'"):
        make_atari("Pong", 1)
