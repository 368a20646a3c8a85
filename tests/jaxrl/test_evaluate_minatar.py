"""Evaluating, watching and sweeping MinAtar runs, from their folders."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("pgx")

from fourfold.runtime.checkpoint import Checkpoints  # noqa: E402
from fourfold.runtime.metrics import read_metrics  # noqa: E402
from fourfold.runtime.run_dir import RunDir  # noqa: E402
from jaxrl import agent as agents  # noqa: E402
from jaxrl import (  # noqa: E402
    cli,
    config_io,
    evaluate_minatar,
    fused,
    load,
    minatar_env,
    plots,
    train_minatar,
    watch,
)
from jaxrl.config import AgentConfig, Exploration, MinAtarConfig, Sweep  # noqa: E402

CONFIG = MinAtarConfig(
    agent=AgentConfig(spectral=("-2",), num_atoms=5),
    exploration=Exploration(warmup=40, end_step=160, end=0.1),
    steps=200,
    num_seeds=2,
    sweep=Sweep(learning_rate=(1e-3, 1e-4), eps=(1e-4, 1e-3, 1e-2)),
    convs=(2,),
    hidden=(8,),
    batch_size=4,
    target_period=40,
    replay_capacity=300,
    log_every=20,
    checkpoint_every=100,
)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A sweep of six combinations and two seeds over four devices, trained to its end."""
    path = tmp_path_factory.mktemp("sweep") / "run"
    carry = train_minatar.train(CONFIG, path, quiet=True)
    return path, jax.device_get(carry.agent)


def test_the_agents_of_a_sweep():
    keys, hypers = fused.agents_of(CONFIG)
    assert keys.shape == (12,)
    rate, eps = np.float32([1e-3, 1e-4]), np.float32([1e-4, 1e-3, 1e-2])
    np.testing.assert_array_equal(hypers.learning_rate, np.repeat(rate, 6))
    np.testing.assert_array_equal(hypers.eps, np.tile(np.repeat(eps, 2), 2))
    assert hypers.bound is None
    data = np.asarray(jax.random.key_data(keys)).reshape(6, 2, -1)
    assert (data == data[:1]).all() and (data[0, 0] != data[0, 1]).any()
    bounded = dataclasses.replace(CONFIG, sweep=Sweep(bound=(1.0, 2.0)))
    _, hypers = fused.agents_of(bounded)
    np.testing.assert_array_equal(hypers.bound, [1, 1, 2, 2])
    np.testing.assert_array_equal(hypers.eps, np.full(4, CONFIG.agent.eps, np.float32))


def test_each_agent_of_a_sweep_is_the_one_trained_alone(swept, tmp_path):
    _, state = swept
    index = 2 * (0 * 3 + 2) + 1  # learning rate 1e-3, eps 1e-2, seed 1
    one = dataclasses.replace(
        CONFIG, sweep=Sweep(), agent=dataclasses.replace(CONFIG.agent, learning_rate=1e-3, eps=1e-2)
    )
    alone = jax.device_get(train_minatar.train(one, tmp_path / "run", quiet=True).agent)
    # Batching over agents changes the order of sums, hence not bit for bit.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[index], b[1], rtol=2e-4, atol=2e-5), state, alone
    )
    other = jax.tree.leaves(jax.tree.map(lambda a: np.abs(a[index] - a[1]).max(), state.params))
    assert max(other) > 1e-3  # another eps is another agent


def test_a_sweep_draws_a_heat_map_and_logs_every_agent(swept):
    path, _ = swept
    assert (path / "plots" / "sweep.png").stat().st_size > 5_000
    assert not (path / "plots" / "return.png").exists()
    assert all(len(row["returns"]) == 12 for row in read_metrics(path))


@pytest.mark.parametrize("value", ["NaN", 1.0])
def test_a_heat_map_of_agents_that_ended_no_game(tmp_path, value):
    run = RunDir.create(tmp_path / "run", config_io.to_json(CONFIG))
    rows = [{"step": 20, "returns": ["NaN"] * 11 + [value]}]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    plots.minatar(run, CONFIG)
    assert (run.plots / "sweep.png").stat().st_size > 5_000


def test_a_sweep_keeps_its_configuration(swept):
    path, _ = swept
    saved = json.loads((path / "config.json").read_text())
    assert config_io.from_json(saved) == CONFIG
    del saved["sweep"]  # a run from before there were sweeps
    assert config_io.from_json(saved) == dataclasses.replace(CONFIG, sweep=Sweep())


@pytest.mark.parametrize("values", [(0.0,), (-1e-3, 1e-3), (1e-3, 1e-3)])
def test_a_bad_sweep_is_named(values):
    with pytest.raises(ValueError, match=r"sweep\.eps must be different values above 0, found"):
        Sweep(eps=values)


def test_loading_gives_what_was_trained(swept):
    path, state = swept
    loaded = load.load_agent(path)
    assert loaded.config == CONFIG and loaded.step == 200
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(loaded.state), state)
    assert load.load_agent(path, 100).step == 100


def test_evaluation_plays_full_games_by_another_count(swept, monkeypatch):
    """Every game replayed step by step: returns, who may begin a game, and when it stops."""
    path, _ = swept
    loaded = load.load_agent(path)
    seen = []
    play = evaluate_minatar._play

    def spy(*args):
        games, scores, (over, ends) = play(*args)
        jax.debug.callback(lambda o, e: seen.append((np.array(o), np.array(e))), over, ends)
        return games, scores, (over, ends)

    monkeypatch.setattr(evaluate_minatar, "_play", spy)
    state = jax.tree.map(lambda x: x[:3], loaded.state)
    before = jax.tree.map(np.array, state)
    found = evaluate_minatar.evaluate(
        loaded.agent, state, "breakout", steps=120, epsilon=0.3, num_envs=2
    )
    jax.effects_barrier()
    over = np.concatenate([o for o, _ in seen])
    ends = np.concatenate([e for _, e in seen])
    for member in range(3):
        expected, used, running = [], 0, [True, True]
        for t in range(len(over)):
            used += sum(running)
            for i in range(2):
                if running[i] and over[t, member, i]:
                    expected.append(ends[t, member, i])
                    running[i] = used < 120
        assert running == [False, False] and len(expected) >= 2
        np.testing.assert_array_equal(found[member], np.float32(expected))
    # Nothing advances in evaluation.
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)


def test_scores_start_again_with_each_game():
    """An agent without parameters to speak of: what a game returns is the sum of its rewards."""
    config = dataclasses.replace(CONFIG, sweep=Sweep())
    _, agent = fused.make(config, fused.hyper_of(config))
    env = minatar_env.minatar("breakout")
    state = agents.init(agent, jax.random.key(0), env.obs_shape)
    many = jax.tree.map(lambda x: x[None], state)
    (returns,) = evaluate_minatar.evaluate(agent, many, "breakout", steps=3_000, epsilon=1.0)
    # Random play on Breakout scores about half a point a game.
    assert 0.2 < returns.mean() < 1.2 and (returns == np.round(returns)).all()
    assert len(returns) > 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epsilon": -0.1}, r"epsilon must be in \[0, 1\], found -0.1"),
        ({"num_envs": 0}, "num_envs must be at least 1, found 0"),
        ({"steps": -1}, "steps must be at least 0, found -1"),
        ({"game": "pong"}, "unknown MinAtar game 'pong'"),
    ],
)
def test_bad_numbers_are_named(swept, changes, message):
    loaded = load.load_agent(swept[0])
    options = {"game": "breakout", "steps": 10, "epsilon": 0.0, **changes}
    with pytest.raises(ValueError, match=message):
        evaluate_minatar.evaluate(loaded.agent, loaded.state, **options)


def test_the_command_line(swept, capsys, tmp_path):
    path, _ = swept
    cli.main(["evaluate", "--run", str(path), "--steps", "50", "--num-envs", "2"])
    report = json.loads(capsys.readouterr().out)
    assert report["game"] == "breakout" and report["checkpoint"] == 200
    assert len(report["agents"]) == 12
    assert report["evaluation/return"] == pytest.approx(np.mean(report["agents"]))
    film = tmp_path / "film.gif"
    cli.main(["watch", "--run", str(path), "--out", str(film), "--steps", "8", "--member", "3"])
    assert "points" in capsys.readouterr().out and film.stat().st_size > 1_000
    with pytest.raises(SystemExit, match=r"member must be in 0\.\.11, found 12"):
        cli.main(["watch", "--run", str(path), "--out", str(film), "--member", "12"])
    with pytest.raises(SystemExit, match=r"epsilon must be in \[0, 1\], found 2"):
        cli.main(["watch", "--run", str(path), "--out", str(film), "--epsilon", "2"])


@pytest.mark.parametrize("member", [0, 3])
def test_each_agent_keeps_its_own_bound(tmp_path, monkeypatch, member):
    config = dataclasses.replace(CONFIG, sweep=Sweep(bound=(0.25, 100.0)))
    keys, hypers = fused.agents_of(config)
    loaded = _loaded(config, keys, hypers, tmp_path)
    np.testing.assert_array_equal(loaded.bounds, np.float32([0.25, 0.25, 100, 100]))
    one = jax.tree.map(lambda x: x[member], loaded.state)
    own = fused.make(config, jax.tree.map(lambda x: x[member], hypers))[1]
    obs = jnp.ones((1, 10, 10, 4), bool)
    expected = agents.outputs_evaluation(own, one, obs)[0]
    agent = agents.with_bound(loaded.agent, loaded.bounds[member])
    moment = next(watch.minatar_moments(agent, one, "breakout", epsilon=0.0))
    assert moment.outputs.shape == expected.shape
    np.testing.assert_allclose(agents.outputs_evaluation(agent, one, obs)[0], expected, rtol=1e-5)
    other = agents.with_bound(loaded.agent, loaded.bounds[3 - member])
    apart = np.abs(agents.outputs_evaluation(other, one, obs)[0] - expected).max()
    assert apart > 1e-4
    # In an evaluation each agent acts under its own bound.
    seen = []
    act = agents.act_evaluation

    def spy(agent, state, obs, epsilon, key):
        jax.debug.callback(lambda k: seen.append(float(k)), agent.network.bound)
        return act(agent, state, obs, epsilon, key)

    monkeypatch.setattr(agents, "act_evaluation", spy)
    monkeypatch.setattr(evaluate_minatar, "CHUNK", 3)
    options = {"steps": 0, "epsilon": 1.0, "num_envs": 1, "bounds": loaded.bounds}
    evaluate_minatar.evaluate(loaded.agent, loaded.state, "breakout", **options)
    jax.effects_barrier()
    assert set(seen) == {0.25, 100.0} and seen.count(0.25) == seen.count(100.0)


def _loaded(config, keys, hypers, path):
    """A run's folder as training leaves it, without the training."""
    run = RunDir.create(path / "run", config_io.to_json(config))
    carry = jax.jit(functools.partial(fused.init_many, config))(keys, hypers)
    Checkpoints(run.checkpoints).save(0, carry)
    return load.load_agent(run.path)


def test_a_film_ends_with_its_game(swept):
    loaded = load.load_agent(swept[0])
    one = jax.tree.map(lambda x: jnp.asarray(x[0]), loaded.state)
    moments = list(watch.minatar_moments(loaded.agent, one, "breakout", epsilon=1.0, seed=3))
    assert [m.over for m in moments] == [False] * (len(moments) - 1) + [True]
    assert 5 < len(moments) < 2_000
    assert moments[0].score == 0 and moments[-1].score >= moments[-2].score
    # The last screen is the old game's, not the first of the next.
    np.testing.assert_array_equal(moments[-1].screen, moments[-2].screen)
    assert moments[0].outputs.shape == (6, 5) and {m.action for m in moments} <= set(range(6))
