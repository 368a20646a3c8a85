"""The command line, in this process where that is enough, and as a process to be killed."""

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

pytest.importorskip("envpool")

from fourfold.runtime.checkpoint import Checkpoints  # noqa: E402
from jaxrl import cli, envs, evaluate, load, presets, watch  # noqa: E402

TINY = (
    "--game Pong --num-envs 4 --replay-capacity 600 --exploration.warmup 100 "
    "--exploration.end-step 400 --target-period 40 --evaluate-every 0 --log-every 20 "
    "--num-devices 1"
).split()


def new(out, *options):
    return ["train", "--preset", "atari-c51-sn", "--out", str(out), *TINY, *options]


def fails(capsys, *words):
    """Runs a command that must fail, and returns what it says."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(word) for word in words])
    said = stopped.value.code if isinstance(stopped.value.code, str) else capsys.readouterr().err
    assert stopped.value.code not in (0, None) and "Traceback" not in said
    return said


# Errors


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["trian"],
            "unknown command 'trian'; allowed: train, evaluate, watch, scores, presets, games",
        ),
        (["train"], "give --preset, one of atari-dqn, .*; or --resume"),
        (["train", "--preset", "c51"], "unknown preset 'c51'; allowed: atari-dqn, "),
        (["train", "--preset"], "--preset needs a value"),
        (["train", "--resume"], "--out"),
        (["games", "all"], "games takes no options, found all"),
        (["evaluate"], "--run"),
        (["evaluate", "--run", "/nowhere"], "/nowhere does not exist"),
        (["watch", "--run", "/nowhere", "--out", "a.gif"], "/nowhere does not exist"),
        (["scores"], "no run folder was given"),
        (["scores", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_a_wrong_command(capsys, words, message):
    assert re.search(message, fails(capsys, *words))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--game", "Pnog"], "unknown game 'Pnog': did you mean Pong"),
        (["--agent.spectral", "-9"], "no layer '-9'; allowed are .*'-5'.*'conv1'.*'head'"),
        (["--agent.spectral", "conv4L"], "no layer 'conv4L'; allowed are .*'conv3'"),
        (["--exploration.end", "-0.1"], r"epsilon must be in \[0, 1\], found -0.1"),
        (["--evaluate-epsilon", "-1"], r"epsilon must be in \[0, 1\], found -1"),
        (["--agent.eps", "-1"], "eps must be above 0, found -1"),
        (["--agent.loss", "c52"], "c51"),
        (
            ["--target-period", "41"],
            "target_period must be a multiple of update_period 4, found 41",
        ),
        (["--num-devices", "3"], "num_envs must be a multiple of the 3 devices, found 4"),
        (["--replay-capacity", "8"], "capacity is 8"),
        (["--replay", "device", "--num-devices", "2"], "needs one device, found 2"),
        (["--epochs", "3"], "--epochs"),
        (["--seed", "99999999999999999999"], r"seed must be in \[0, 2147483648\), found 9999"),
        (["--agent.spectral", "-2L", "--agent.bound", "2"], "bound 2.0 acts on nothing: give"),
    ],
)
def test_a_bad_option_is_named_and_nothing_written(tmp_path, capsys, options, message):
    said = fails(capsys, *new(tmp_path / "run", *options))
    assert re.search(message, said)
    assert said.strip().count("\n") <= 6  # a box around one line, at most
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--hidden", "0"], r"hidden must be one or more sizes of at least 1, found \(0,\)"),
        (["--convs", "16", "-3"], r"convs must be one or more sizes of at least 1"),
        (["--seed", "-1"], r"seed must be in \[0, 2147483648\), found -1"),
        (["--sweep.bound", "1", "2"], "sweep.bound .* acts on nothing: give spectral"),
        (["--sweep.eps", "0"], "sweep.eps must be different values above 0"),
        (["--game", "pong"], "pong"),
    ],
)
def test_a_bad_option_for_minatar(tmp_path, capsys, options, message):
    said = fails(capsys, "train", "--preset", "minatar-dqn", "--out", tmp_path / "run", *options)
    assert re.search(message, said) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["[1]", '{"kind": "atari", "agent": 3}', "{}", "{"])
def test_a_damaged_configuration(tmp_path, capsys, text):
    (tmp_path / "config.json").write_text(text)
    assert "JSON" in (said := fails(capsys, "evaluate", "--run", tmp_path)) or "kind" in said


def test_folders(tmp_path, capsys):
    there, missing = tmp_path / "pong", tmp_path / "pogn"
    there.mkdir()
    (there / "notes.txt").write_text("mine")
    assert "holds other files (notes.txt)" in fails(capsys, *new(there))
    said = fails(capsys, "train", "--out", missing, "--resume")
    assert "does not exist; runs in" in said
    assert "has no config.json" in fails(capsys, "train", "--out", there, "--resume")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["notes.txt", "pong"]


# What it prints


def test_help_and_lists(capsys):
    cli.main([])
    said = capsys.readouterr().out
    assert all(f"\n  {command} " in said for command in ("train", "evaluate", "watch", "games"))
    cli.main(["presets"])
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if not line.startswith(" ")] == [*presets.presets()]
    for name in presets.presets():
        place = said.index(name)
        assert said[place + 1].startswith(f"  jaxrl train --preset {name} --game ")
        assert "CPU cores" in said[place + 2] and len(said[place + 3].strip()) > 10
    cli.main(["games"])
    assert "SpaceInvaders" in capsys.readouterr().out.split()
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "--preset", "atari-c51-sn", "--help"])
    said = capsys.readouterr().out
    assert stopped.value.code == 0
    assert "--exploration.warmup" in said and "(default: -2)" in said


@pytest.fixture
def finished(tmp_path, small_net, compiled_once, monkeypatch):
    """A short run, whose evaluation cuts games after 30 steps."""

    def short(*args, **options):
        return envs.make_atari(*args, **options, max_steps=30)

    for module in (evaluate, watch):
        monkeypatch.setattr(module, "make_atari", short)
    cli.main(new(tmp_path / "run", "--steps", "160", "--checkpoint-every", "80", "--quiet"))
    return tmp_path / "run"


def test_evaluate_prints_json(finished, capsys):
    def scores(*options):
        cli.main(["evaluate", "--run", str(finished), "--steps", "50", *options])
        (line,) = capsys.readouterr().out.splitlines()
        return json.loads(line)

    first = scores("--num-envs", "2")
    assert first["game"] == "Pong" and first["checkpoint"] == 160
    assert len(first["returns"]) == first["evaluation/games"] == 2
    normalised = 100 * (first["evaluation/return"] + 20.7) / (14.6 + 20.7)
    assert first["evaluation/human_normalised"] == pytest.approx(normalised)
    assert first["evaluation/steps"] == 60
    assert first["evaluation/return"] == np.mean(first["returns"])
    assert scores("--num-envs", "2") == first
    older = scores("--checkpoint", "80", "--num-envs", "1")
    assert older["checkpoint"] == 80 and older["evaluation/games"] == 2
    said = fails(capsys, "evaluate", "--run", finished, "--checkpoint", "7")
    assert "no whole checkpoint of step 7" in said and said.endswith("80, 160")
    assert "found -0.1" in fails(capsys, "evaluate", "--run", finished, "--epsilon", "-0.1")


def test_resume_with_other_options_names_them(finished, capsys):
    said = fails(
        capsys, "train", "--out", finished, "--resume", "--agent.eps", "0.1", "--num-devices", 1
    )
    assert "agent.eps: saved 0.0003125, given 0.1" in said
    assert "(checkpoints, config.json, metrics.jsonl, plots)" in fails(capsys, *new(finished))
    # The command that started the run, with --resume; and --resume alone.
    cli.main(new(finished, "--resume", "--quiet", "--steps", "200"))
    cli.main(["train", "--out", str(finished), "--resume", "--quiet", "--num-devices", "1"])
    assert Checkpoints(finished / "checkpoints").latest() == 200


@pytest.mark.parametrize("ending", ["gif", "MP4"])
def test_watch_writes_a_film(finished, capsys, ending):
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    out = finished / "films" / f"pong.{ending}"
    cli.main(["watch", "--run", str(finished), "--out", str(out), "--steps", "12"])
    assert re.fullmatch(rf"{out}: -?\d+ points\n", capsys.readouterr().out)
    assert [p.name for p in out.parent.iterdir()] == [out.name]
    program = imageio_ffmpeg.get_ffmpeg_exe()
    decode = f"-loglevel error -i {out} -f rawvideo -pix_fmt rgb24 -".split()
    frames = subprocess.run([program, *decode], capture_output=True, check=True).stdout
    shape = (552, 996, 3)  # twice the screen's 210 lines, and what stands around it
    pictures = np.frombuffer(frames, np.uint8).reshape(-1, *shape)
    assert len(pictures) == 12 + 15  # a frame for each step, and a second for the last
    change = np.abs(pictures[1:].astype(int) - pictures[:-1]).mean(axis=(1, 2, 3))
    assert change[:12].max() > 0.1 > change[12:].max()


def test_watch_refuses_before_it_plays(finished, capsys):
    command = ["watch", "--run", finished, "--out"]
    said = fails(capsys, *command, finished / "film.avi")
    assert "ends in .gif or .mp4, found 'film.avi'" in said
    assert "steps must be at least 1" in fails(capsys, *command, finished / "a.gif", "--steps", "0")
    (finished / "taken").write_text("a file")
    assert "taken" in fails(capsys, *command, finished / "taken" / "a.gif")
    assert not list(finished.glob("*.gif")) and not list(finished.glob(".*"))


def test_names_of_actions_fit_every_game():
    assert watch.action_names("Pong", 6) == (
        *("noop", "fire", "right", "left", "right fire", "left fire"),
    )
    assert watch.action_names("Seaquest", 18)[-1] == "down left fire"
    assert watch.action_names("Pong", 7)[0] == "action 0"
    for game in ("Breakout", "Freeway", "Asterix", "MsPacman", "Qbert", "SpaceInvaders", "Tennis"):
        env = envs.make_atari(game, 1)
        assert watch.action_names(env.game, env.num_actions)[0] == "noop"
        env.close()


# As a process


def start(*words):
    """The command line in a process of its own, with the real network."""
    code = "import sys; sys.argv[0] = 'jaxrl'; from jaxrl.cli import main; main()"
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def log(path):
    """The metrics, without a line that was cut short."""
    text = (path / "metrics.jsonl").read_text() if (path / "metrics.jsonl").exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def wait_for(condition, process, seconds=180):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


def check_log(path):
    lines = log(path)
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    for line in lines:  # four environments make one update due at a time
        assert line["updates"] == max(line["step"] - 4 - 100, 0) // 4
    return lines


@pytest.mark.slow
def test_kill_and_resume(tmp_path, compiled_once):
    """SIGKILL at random moments costs no more than the work since the last checkpoint."""
    path, chance = tmp_path / "run", random.Random(0)
    checkpoints = Checkpoints(path / "checkpoints")
    command = new(path, "--checkpoint-every", "40", "--steps", "100000")
    latest = 0
    for _ in range(3):
        process = start(*command)
        try:
            before = latest
            wait_for(lambda: (checkpoints.latest() or 0) > before, process)  # noqa: B023
            time.sleep(chance.uniform(0, 1.5))
        finally:
            process.kill()
            process.communicate()
        latest = checkpoints.latest()
        assert log(path)[-1]["step"] >= latest - 20
        command = ["train", "--out", path, "--resume", "--num-devices", "1"]
    process = start(*command, "--steps", latest + 60)
    assert process.wait(180) == 0, process.communicate()
    process.communicate()
    assert check_log(path)[-1]["step"] == checkpoints.latest() == latest + 60
    # Nothing but whole checkpoints is left.
    assert len(list((path / "checkpoints").iterdir())) == 2
    leaves = jax.tree.leaves(load.load_agent(path).state)
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in leaves)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_says_how_to_resume(tmp_path, compiled_once, number):
    path = tmp_path / "run"
    process = start(*new(path, "--steps", "100000"))
    try:
        wait_for(lambda: any(line["updates"] for line in log(path)), process)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    last = out.strip().splitlines()[-1]
    found = re.fullmatch(rf"Stopped by {number.name} at step (\d+), saved. Resume: (.*)", last)
    assert found, out
    step, words = int(found[1]), shlex.split(found[2])
    assert Checkpoints(path / "checkpoints").latest() == step
    assert words[0] == "jaxrl" and words[-1] == "--resume"
    words[words.index("100000")] = str(step + 40)
    process = start(*words[1:])
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert check_log(path)[-1]["step"] == step + 40
