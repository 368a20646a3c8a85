"""Training on real ROMs, with a small network where the test isn't about the network."""

import dataclasses
import json
import shutil
import signal
from types import SimpleNamespace

import jax
import numpy as np
import pytest

pytest.importorskip("envpool")

from fourfold.runtime.checkpoint import Checkpoints, DiskFullError  # noqa: E402
from jaxrl import config_io, evaluate, load, loop, train  # noqa: E402
from jaxrl.config import AgentConfig, AtariConfig, Exploration  # noqa: E402
from jaxrl.envs import make_atari  # noqa: E402
from jaxrl.types import TimeStep  # noqa: E402
from jaxrl.windows import VALID  # noqa: E402

pytestmark = pytest.mark.usefixtures("small_net", "compiled_once")


def tiny(**changes):
    settings = dict(
        game="Pong",
        agent=AgentConfig(spectral=("-2",)),
        exploration=Exploration(warmup=120, end_step=300),
        steps=360,
        num_envs=3,
        batch_size=8,
        target_period=40,
        replay_capacity=300,  # below the steps, so that the rings go round
        evaluate_every=0,
        checkpoint_every=120,
        log_every=30,
    )
    return AtariConfig(**{**settings, **changes})


def run(config, path, **options):
    return train.train(config, path, num_devices=1, quiet=True, **options)


def lines(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def same(a, b):
    leaves_a, tree_a = jax.tree.flatten(a)
    leaves_b, tree_b = jax.tree.flatten(b)
    assert tree_a == tree_b
    for x, y in zip(leaves_a, leaves_b, strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture
def saves(monkeypatch):
    """What each checkpoint should hold, copied from memory when it is written."""
    kept = {}
    save = train._save

    def record(checkpoints, step, progress, memory):
        kept[step] = jax.tree.map(np.array, contents(progress, memory))
        save(checkpoints, step, progress, memory)

    monkeypatch.setattr(train, "_save", record)
    return kept


def contents(progress, memory):
    arrays = {k: v for k, v in memory.arrays().items() if k != "rng"}
    # Bit generators count in 128-bit integers.
    rng = json.dumps(memory.rng.bit_generator.state) if hasattr(memory, "rng") else ""
    return {
        "agent": progress.agent,
        "steps": progress.steps,
        "counts": (progress.updates, progress.games),
        "memory": arrays,
        "rng": np.frombuffer(rng.encode(), np.uint8),
    }


def test_a_run_writes_its_folder(tmp_path, saves):
    config, path = tiny(), tmp_path / "run"
    state = run(config, path)
    assert json.loads((path / "config.json").read_text()) == json.loads(
        json.dumps(config_io.to_json(config))
    )
    log = lines(path)
    steps = [line["step"] for line in log]
    assert steps == sorted(set(steps)) and steps[-1] >= config.steps
    assert all(b - a < 2 * config.log_every for a, b in zip(steps, steps[1:], strict=False))
    before = [line for line in log if line["step"] <= 120]
    assert before and all("loss" not in line and line["updates"] == 0 for line in before)
    assert log[-1].keys() >= {"loss", "q", "sigma/fc", "updates", "games"}
    assert np.isfinite([log[-1]["loss"], log[-1]["q"], log[-1]["sigma/fc"]]).all()
    # The updates that the last iteration made due would come with the next one.
    assert log[-1]["updates"] == int(state.updates) == (steps[-1] - 3 - 120) // 4
    kept = Checkpoints(path / "checkpoints").steps()
    assert kept == sorted(saves)[-2:] and kept[-1] == steps[-1] and len(saves) == 3
    same(state, saves[steps[-1]]["agent"])


@pytest.mark.parametrize("replay", ["host", "device"])
def test_resume_restores_all_that_was_saved(tmp_path, saves, monkeypatch, replay):
    config, path = tiny(replay=replay), tmp_path / "run"
    run(config, path)
    latest = max(saves)
    expected = saves[latest]
    assert expected["counts"][0] > 0
    found = []
    iterate = loop.run

    def spy(config, env, memory, functions, stack, progress):
        found.append(jax.tree.map(np.array, contents(progress, memory)))
        return iterate(config, env, memory, functions, stack, progress)

    monkeypatch.setattr(loop, "run", spy)
    longer = dataclasses.replace(config, steps=600, log_every=50)  # both free to change
    state = run(longer, path, resume=True)
    same(found[0], expected)
    log = lines(path)
    steps = [line["step"] for line in log]
    assert steps == sorted(set(steps)) and latest in steps and steps[-1] >= 600
    assert int(state.updates) == log[-1]["updates"] == (steps[-1] - 3 - 120) // 4
    # A run that is complete stays as it is.
    same(run(longer, path, resume=True), state)
    assert lines(path) == log


def test_resuming_drops_the_lines_of_lost_work(tmp_path):
    config, path = tiny(), tmp_path / "run"
    run(config, path)
    older, newest = Checkpoints(path / "checkpoints").steps()
    # As if the process had been killed while it wrote the newest checkpoint.
    (path / "checkpoints" / f"step_{newest:012d}" / "manifest.json").unlink()
    run(config, path, resume=True)
    steps = [line["step"] for line in lines(path)]
    assert steps == sorted(set(steps)) and steps[-1] >= config.steps
    assert Checkpoints(path / "checkpoints").steps()[0] >= older


def test_resume_before_the_first_checkpoint_starts_again(tmp_path):
    config, path = tiny(), tmp_path / "run"
    expected = run(config, path)
    shutil.rmtree(path / "checkpoints")
    same(run(config, path, resume=True), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"replay": "device"},
        {"game": "Breakout", "protocol": "modern", "n_step": 3, "agent": AgentConfig("dqn")},
        {"agent": AgentConfig("double_dqn", optimizer="rmsprop", td_error="mse"), "num_envs": 1},
        {"agent": AgentConfig("double_c51", spectral=("-1L",), scheduler="mul_eps")},
    ],
    ids=["device", "dqn", "rmsprop", "muleps"],
)
def test_variants_train(tmp_path, changes):
    config = tiny(steps=240, checkpoint_every=240, **changes)
    state = run(config, tmp_path / "run")
    log = lines(tmp_path / "run")
    assert np.isfinite(log[-1]["loss"])
    assert int(state.updates) == (log[-1]["step"] - config.num_envs - 120) // 4
    for leaf, target in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(state.target_params), strict=True
    ):
        assert np.isfinite(np.asarray(leaf)).all() and np.isfinite(np.asarray(target)).all()


@pytest.mark.parametrize("replay", ["host", "device"])
def test_learning_lowers_the_loss(tmp_path, replay):
    """A support whose width is that of a reward is learned in a few updates."""
    agent = AgentConfig(learning_rate=1e-2, num_atoms=5, v_min=-1, v_max=1)
    config = tiny(replay=replay, agent=agent, discount=0, steps=600, log_every=60)
    run(config, tmp_path / "run")
    losses = [line["loss"] for line in lines(tmp_path / "run") if "loss" in line]
    assert np.mean(losses[-3:]) < 0.3 < np.log(5)  # the last is the loss of the uniform law


def test_rewards_are_clipped_in_the_replay_and_nowhere_else(tmp_path, saves):
    config = tiny(
        game="SpaceInvaders",
        num_envs=4,
        steps=4000,
        exploration=Exploration(warmup=3900, end_step=4000),
        replay_capacity=8000,
        checkpoint_every=4000,
    )
    run(config, tmp_path / "run")
    memory = next(iter(saves.values()))["memory"]
    assert set(np.unique(memory["reward"])) == {0.0, 1.0}
    returns = [line["return"] for line in lines(tmp_path / "run") if "return" in line]
    assert len(returns) > 1 and max(returns) > 50  # aliens are worth 5 to 30 points
    # Resets and the no-op after a lost life are rows, but not steps.
    valid = (memory["flags"] & VALID) != 0
    rows = valid.size
    assert valid.sum() == saves.keys().__iter__().__next__() < rows


def test_evaluation_changes_nothing_in_training(tmp_path, monkeypatch):
    def short(*args, **options):
        assert options["training"] is False
        return make_atari(*args, **options, max_steps=20)

    monkeypatch.setattr(evaluate, "make_atari", short)
    quiet, config = tiny(), tiny(evaluate_every=100, evaluate_steps=30)
    expected = run(quiet, tmp_path / "quiet")
    same(run(config, tmp_path / "run"), expected)
    scores = [line for line in lines(tmp_path / "run") if "evaluation/return" in line]
    assert [line["step"] // 100 for line in scores] == [1, 2, 3]
    assert all(line["evaluation/games"] >= 8 for line in scores)


@pytest.mark.parametrize("moment", ["killed", "stopped"])
def test_an_evaluation_cut_short_is_made_up_for(tmp_path, monkeypatch, moment):
    """Killed or stopped in its last evaluation, a run evaluates that checkpoint when resumed."""
    config, path = tiny(evaluate_every=120, steps=240), tmp_path / "run"
    play, steps = evaluate.evaluate, []

    def short(agent, state, config, **options):
        scores = evaluate.Scores(np.float32([len(steps)]), 1, config.game)
        steps.append(int(state.updates))
        if len(steps) == 2:
            if moment == "killed":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)
            return play(agent, state, config, **options)
        return scores

    monkeypatch.setattr(evaluate, "evaluate", short)
    if moment == "killed":
        with pytest.raises(KeyboardInterrupt):
            run(config, path)
    else:
        run(config, path)
    found = [row["step"] for row in lines(path) if "evaluation/return" in row]
    assert len(found) == 1 and len(steps) == 2
    state = run(config, path, resume=True)
    rows = [row for row in lines(path) if "evaluation/return" in row]
    assert [row["evaluation/return"] for row in rows] == [0.0, 2.0]
    # The same learner is evaluated that was to be, at the step of its checkpoint.
    assert steps == [steps[0], int(state.updates), int(state.updates)]
    assert rows[1]["step"] == Checkpoints(path / "checkpoints").latest()
    run(config, path, resume=True)  # and no third time
    assert len(steps) == 3


# Errors: each before anything is written, or with nothing lost.


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    config, path = tiny(steps=60, checkpoint_every=60), tmp_path / "run"
    run(config, path)
    before = sorted((p, p.stat().st_mtime_ns) for p in path.rglob("*"))
    with pytest.raises(FileExistsError, match="--resume to continue"):
        run(config, path)
    other = tiny(steps=60, seed=3, agent=AgentConfig(spectral=("-2",), eps=0.1))
    with pytest.raises(ValueError, match=r"agent\.eps: saved 0\.0003125, given 0\.1.*seed: saved"):
        run(other, path, resume=True)
    assert sorted((p, p.stat().st_mtime_ns) for p in path.rglob("*")) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"game": "Pnog"}, "did you mean Pong"),
        ({"agent": AgentConfig(spectral=("-6",))}, "no layer '-6'; allowed are .*'-1'.*'head'"),
        ({"replay_capacity": 10}, "capacity is 10"),
    ],
)
def test_a_bad_configuration_leaves_no_folder(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(tiny(**changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_resuming_nothing_lists_what_there_is(tmp_path):
    run(tiny(steps=60), tmp_path / "pong")
    with pytest.raises(FileNotFoundError, match="does not exist; runs in .*: pong"):
        run(tiny(steps=60), tmp_path / "pogn", resume=True)
    assert not (tmp_path / "pogn").exists()


def test_a_full_disk_loses_nothing(small_disk, monkeypatch):
    config, path = tiny(), small_disk / "run"
    filler, save = small_disk / "filler", train._save

    def fill_then_save(checkpoints, step, progress, memory):
        if checkpoints.latest() is not None:
            filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 300_000))
        save(checkpoints, step, progress, memory)

    monkeypatch.setattr(train, "_save", fill_then_save)
    with pytest.raises(DiskFullError, match=r"free are .*; the checkpoint of step \d+ is intact"):
        run(config, path)
    filler.unlink()
    monkeypatch.setattr(train, "_save", save)
    (step,) = Checkpoints(path / "checkpoints").steps()
    assert load.load_agent(path).step == step < config.steps
    run(config, path, resume=True)
    steps = [line["step"] for line in lines(path)]
    assert steps == sorted(set(steps)) and steps[-1] >= config.steps


# The loop's accounts, with everything around it made of plain Python.


class ScriptedEnv:
    """Rows of random flags; rewards and frames that say which step they are of."""

    def __init__(self, num_envs, seed):
        self.num_envs, self.rng, self.sent, self.steps = (
            num_envs,
            np.random.default_rng(seed),
            [],
            [],
        )

    def reset(self):
        return self._step(first=True)

    def send(self, actions):
        self.sent.append(actions)

    def recv(self):
        return self._step(first=False)

    def _step(self, first):
        n, t = self.num_envs, len(self.steps)
        self.steps.append(
            TimeStep(
                frame=np.full((n, 2, 2), t % 256, np.uint8),
                reward=self.rng.normal(0, 3, n).astype(np.float32),
                terminal=self.rng.random(n) < 0.1,
                truncated=self.rng.random(n) < 0.1,
                first=np.full(n, first),
                valid=self.rng.random(n) < 0.8,
                episode_over=self.rng.random(n) < 0.05,
                episode_return=self.rng.normal(0, 300, n).astype(np.float32),
            )
        )
        return self.steps[-1]


@dataclasses.dataclass(frozen=True)
class Hooked:
    spectral: int


@pytest.mark.parametrize("largest", [1, 64])
@pytest.mark.parametrize("num_envs", [1, 3, 8, 64])
def test_the_loop_keeps_its_accounts(num_envs, largest):
    warmup, period, target = 37, 4, 40
    config = AtariConfig(
        exploration=Exploration(warmup, warmup),
        steps=1200,
        update_period=period,
        target_period=target,
        log_every=50,
    )
    events, rows, acted = [], [], []
    env = ScriptedEnv(num_envs, seed=num_envs)

    def act(agent, stack, frame, first, valid, steps):
        acted.append(np.arange(num_envs) + len(acted))
        return acted[-1], agent.spectral + 1, stack, steps + int(valid.sum())

    def learn(agent, batches):
        assert agent.spectral == len(acted)  # what acting advanced is what learning starts from
        events.extend(["update"] * len(batches))
        return agent, {"loss": 0.0}

    def sync(agent):
        events.append("sync")
        return agent

    def draw(sizes):
        drawn.append(list(sizes))
        return [np.zeros(size) for size in sizes]

    drawn = []
    memory = SimpleNamespace(add=lambda *row: rows.append(row), draw=draw)
    functions = loop.Functions(act, learn, sync, lambda x: x, lambda x: x, largest)
    progress = loop.Progress(Hooked(spectral=0), steps=0)
    seen, logged = [], []
    for line in loop.run(config, env, memory, functions, None, progress):
        before = seen[-1] if seen else 0
        seen.append(line["step"])
        now, after = env.steps[-2], env.steps[-1]
        assert line["step"] == before + now.valid.sum() == progress.steps
        # Every batch that is due is drawn now, and learned from in the next iteration.
        assert sum(map(sum, drawn)) == max(line["step"] - warmup, 0) // period
        assert progress.updates == events.count("update") == max(before - warmup, 0) // period
        frame, action, reward, terminal, truncated, first, valid = rows[-1]
        assert frame is now.frame and first is now.first and valid is now.valid
        assert action is acted[-1] is env.sent[-1]
        assert terminal is after.terminal and truncated is after.truncated
        np.testing.assert_array_equal(reward, np.clip(after.reward, -1, 1))
        if len(line) > 1:
            logged.append(line)
    assert seen[-1] >= config.steps > seen[-2]
    sizes = [size for call in drawn for size in call]
    assert all(1 <= size <= largest and size & (size - 1) == 0 for size in sizes)
    # A target sync after every target_period / update_period updates, wherever calls end.
    every, updates = target // period, events.count("update")
    expected = ["update"] * updates
    for k in range(updates // every, 0, -1):
        expected.insert(k * every, "sync")
    assert events == expected and updates > 2 * every
    over = [s.episode_return[s.episode_over] for s in env.steps[1:]]
    assert progress.games == logged[-1]["games"] == sum(map(len, over))
    # Returns are means over the games since the last line, and they are not clipped.
    ends = [seen.index(line["step"]) + 1 for line in logged]
    for line, start, end in zip(logged, [0, *ends], ends, strict=False):
        finished = np.concatenate(over[start:end])
        if len(finished):
            np.testing.assert_allclose(line["return"], finished.mean(), rtol=1e-5)
        else:
            assert "return" not in line
    assert max(abs(line.get("return", 0)) for line in logged) > 10
