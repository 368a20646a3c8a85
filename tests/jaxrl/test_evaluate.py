"""The paper's evaluation: full games, unclipped returns, nothing learned, nothing remembered."""

import dataclasses

import jax
import numpy as np
import pytest

pytest.importorskip("envpool")

from jaxrl import agent as agents  # noqa: E402
from jaxrl import evaluate as module  # noqa: E402
from jaxrl import train  # noqa: E402
from jaxrl.config import AgentConfig, AtariConfig  # noqa: E402
from jaxrl.envs import make_atari  # noqa: E402
from jaxrl.evaluate import Policy, evaluate  # noqa: E402
from jaxrl.types import TimeStep  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_net", "compiled_once")


def make(config=AtariConfig(agent=AgentConfig(spectral=("-2",))), num_actions=6, seed=0):  # noqa: B008
    agent = train.make_agent(config, num_actions)
    return agent, agents.init(agent, jax.random.key(seed), train.OBS_SHAPE), config


class ScriptedEnv:
    """Environment i plays games of given lengths; a reward of 3 a step, then a lost step."""

    def __init__(self, lengths):
        self.lengths = [list(games) for games in lengths]
        self.num_envs, self.clock = len(lengths), np.zeros(len(lengths), int)
        self.started = np.ones(len(lengths), int)
        self.total_started_at = []
        self.closed = False

    def reset(self):
        return self._now(np.ones(self.num_envs, bool))

    def step(self, actions):
        assert actions.shape == (self.num_envs,) and not self.closed
        ended = np.array([t == g[0] for t, g in zip(self.clock, self.lengths, strict=True)])
        for i in np.flatnonzero(ended):
            self.lengths[i].pop(0)
        self.clock = np.where(ended, 0, self.clock + 1)
        return self._now(ended)

    def _now(self, first):
        over = np.array([t == g[0] for t, g in zip(self.clock, self.lengths, strict=True)])
        return TimeStep(
            frame=np.zeros((self.num_envs, 84, 84), np.uint8),
            reward=np.where(first, 0, 3).astype(np.float32),
            terminal=over,
            truncated=np.zeros_like(over),
            first=first,
            valid=~over,
            episode_over=over,
            episode_return=(3 * self.clock).astype(np.float32),
        )

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("lengths", "budget", "returns", "steps"),
    [
        # Always one game each, however small the budget.
        ([[4, 9], [6, 9]], 0, [12, 18], 10),
        # After the first round 8 steps are played of 9, so both begin again; then it is enough.
        ([[4, 5, 9], [4, 7, 9]], 9, [12, 12, 15, 21], 20),
        # A long game under way counts; those begun beside it after the end do not.
        ([[30, 9], [2, 3, 2, 9, 100]], 14, [6, 9, 6, 90], 37),
        ([[5, 5, 5, 5]], 15, [15, 15, 15], 15),
    ],
)
def test_which_games_count(monkeypatch, lengths, budget, returns, steps):
    agent, state, config = make()
    env = ScriptedEnv(lengths)
    asked = []
    monkeypatch.setattr(module, "make_atari", lambda *a, **k: asked.append((a, k)) or env)
    config = dataclasses.replace(config, evaluate_steps=budget, protocol="modern", seed=5)
    scores = evaluate(agent, state, config, num_envs=len(lengths))
    assert scores.returns.tolist() == returns and scores.steps == steps and env.closed
    ((game, n), options) = asked[0]
    assert (game, n, options["training"], options["protocol"]) == (
        *("Pong", len(lengths), False, "modern"),
    )
    assert options["seed"] != 5  # that is the training games'
    metrics = scores.metrics()
    assert metrics["evaluation/return"] == pytest.approx(np.mean(returns))
    assert metrics["evaluation/std"] == pytest.approx(np.std(returns))
    assert metrics["evaluation/games"] == len(returns)


def test_full_games_of_breakout_by_another_count(monkeypatch):
    """Five lives a game and unclipped bricks, counted from the frames' rewards."""
    opened = []

    def recorded(*args, **options):
        env = make_atari(*args, **options)
        step, env.seen, env.lives = env.step, [], []

        def spy(actions):
            out = step(actions)
            env.seen.append(out)
            env.lives.append(env._lives.copy())
            return out

        env.step = spy
        opened.append(env)
        return env

    monkeypatch.setattr(module, "make_atari", recorded)
    config = AtariConfig(game="Breakout", evaluate_steps=400, evaluate_epsilon=1.0)
    agent, state, _ = make(config, 4)
    scores = evaluate(agent, state, config, num_envs=3, seed=2)
    (env,) = opened
    assert not any(s.terminal[~s.episode_over].any() for s in env.seen)  # no life loss
    assert {0, 1, 2, 3, 4, 5} == set(np.unique(env.lives))
    totals, found, running = np.zeros(3), [], np.ones(3, bool)
    played = 0
    for now in env.seen:
        totals = np.where(now.first, 0, totals) + now.reward
        played += int((running & ~now.first).sum())
        for i in np.flatnonzero(now.episode_over & running):
            found.append(totals[i])
            running[i] = played < 400
    assert not running.any() and len(found) >= 3
    np.testing.assert_array_equal(scores.returns, found)
    assert scores.steps == played >= 400 and scores.returns.sum() > 0


@pytest.mark.parametrize("game", ["DonkeyKong", "Tetris", "AirRaid", "Pong"])
def test_any_game_may_be_evaluated(game):
    metrics = module.Scores(np.float32([1.0, 3.0]), 10, game).metrics()
    assert metrics["evaluation/return"] == 2.0
    assert ("evaluation/human_normalised" in metrics) == (game == "Pong")


def test_an_evaluation_that_is_told_to_stop_has_no_scores(short_games):
    agent, state, config = make()
    asked = iter([False] * 5 + [True])
    assert evaluate(agent, state, config, num_envs=2, stop=lambda: next(asked)) is None


@pytest.fixture
def short_games(monkeypatch):
    """Games of 80 agent steps, in which Pong sees its first points."""
    monkeypatch.setattr(module, "make_atari", lambda *a, **k: make_atari(*a, **k, max_steps=80))


def test_the_seed_alone_decides(short_games):
    agent, state, config = make()
    config = dataclasses.replace(config, evaluate_steps=500, evaluate_epsilon=0.5)
    scores = [evaluate(agent, state, config, num_envs=4, seed=s).returns for s in (0, 0, 1)]
    np.testing.assert_array_equal(scores[0], scores[1])
    assert len(scores[0]) == 8 and not np.array_equal(scores[0], scores[2])
    # Neither training games under way nor earlier evaluations leave a trace.
    training = make_atari("Pong", 4, seed=0)
    training.reset()
    for _ in range(7):
        training.step(np.ones(4, np.int32))
    np.testing.assert_array_equal(
        evaluate(agent, state, config, num_envs=4, seed=0).returns, scores[0]
    )
    training.step(np.ones(4, np.int32))
    training.close()
    seeded = dataclasses.replace(config, seed=1)
    np.testing.assert_array_equal(evaluate(agent, state, seeded, num_envs=4).returns, scores[2])


def test_nothing_in_the_agent_advances(short_games):
    agent, state, config = make()
    before = jax.tree.map(np.array, state)
    evaluate(agent, state, dataclasses.replace(config, evaluate_steps=100), num_envs=2)
    for now, then in zip(jax.tree.leaves(state), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(now, then)
    # A training forward would have moved u, so standing still is not for want of a hook.
    _, acted = agents.act(agent, state, np.zeros((1, 84, 84, 4), np.uint8), 0.0, jax.random.key(0))
    assert not np.array_equal(acted.spectral["fc"]["u"], before.spectral["fc"]["u"])


def test_the_policy_stacks_frames_and_uses_the_stored_vectors():
    agent, state, _ = make()
    rng = np.random.default_rng(0)
    policy = Policy(agent, state, 0.0, 3)
    firsts = np.array([[1, 1, 1], [0, 0, 0], [0, 1, 0], [0, 0, 0], [0, 0, 0], [1, 0, 0]], bool)
    stack = rng.integers(0, 256, (3, 84, 84, 4), dtype=np.uint8)  # whatever was there before
    for first in firsts:
        frame = rng.integers(0, 256, (3, 84, 84), dtype=np.uint8)
        actions = policy(frame, first)
        stack = np.where(first[:, None, None, None], 0, stack)[..., 1:].astype(np.uint8)
        stack = np.concatenate([stack, frame[..., None]], axis=-1)
        np.testing.assert_array_equal(policy.stack, stack)
        logits = agents.outputs_evaluation(agent, state, stack)
        np.testing.assert_allclose(policy.outputs(), logits, rtol=1e-4, atol=1e-5)
        probs = np.exp(np.asarray(logits, np.float64))
        values = (probs / probs.sum(-1, keepdims=True)) @ np.linspace(-10, 10, 51)
        assert actions.dtype == np.int32
        np.testing.assert_array_equal(actions, values.argmax(-1))


def test_epsilon_is_the_share_of_random_actions():
    agent, state, _ = make()
    count, frame = 400, np.random.default_rng(0).integers(0, 256, (84, 84), dtype=np.uint8)
    frames, first = np.repeat(frame[None], count, 0), np.ones(count, bool)
    greedy = Policy(agent, state, 0.0, count)(frames, first)
    assert len(set(greedy.tolist())) == 1
    policy = Policy(agent, state, 0.3, count, seed=3)
    drawn = np.concatenate([policy(frames, first) for _ in range(5)])
    # Of the random ones a sixth is the greedy action.
    assert np.mean(drawn != greedy[0]) == pytest.approx(0.3 * 5 / 6, abs=0.04)
    again = Policy(agent, state, 0.3, count, seed=3)
    np.testing.assert_array_equal(again(frames, first), drawn[:count])
    assert not np.array_equal(drawn[:count], drawn[count : 2 * count])  # a new draw each step
