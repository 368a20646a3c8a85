"""One stream of metrics: valid JSON lines whatever happens, and the sinks that were asked for."""

import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import types

import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from fourfold.runtime import jsonl, metrics, progress
from fourfold.runtime.metrics import Metrics, read_metrics


def _strict(path):
    def refuse(name):
        raise ValueError(name)

    lines = path.read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def test_lines_are_strict_json_of_any_metric(tmp_path):
    with Metrics(tmp_path, total=4, quiet=True) as stream:
        stream.write(
            0, {"loss": jnp.float32(0.5), "seeds": np.arange(3), "note": "a", "none": None}
        )
        stream.write(
            2, {"loss": math.nan, "up": jnp.inf, "down": -math.inf, "flag": np.bool_(True)}
        )
        stream.write(2, {"half": jnp.asarray([1.5, jnp.nan], jnp.bfloat16), "n": 2**40})
    rows = _strict(tmp_path / "metrics.jsonl")
    assert [row.pop("step") for row in rows] == [0, 2, 2]
    assert all(row.pop("time") > 1e9 for row in rows)
    assert rows == [
        {"loss": 0.5, "seeds": [0, 1, 2], "note": "a", "none": None},
        {"loss": "NaN", "up": "Infinity", "down": "-Infinity", "flag": True},
        {"half": [1.5, "NaN"], "n": 2**40},
    ]
    found = read_metrics(tmp_path)
    assert math.isnan(found[1]["loss"]) and found[1]["up"] == math.inf
    assert found[0]["note"] == "a"


def test_what_is_no_metric(tmp_path):
    with Metrics(tmp_path, total=4, quiet=True) as stream:
        stream.write(3, {})
        with pytest.raises(ValueError, match="at least 3, the last one, found 2"):
            stream.write(2, {})
        with pytest.raises(ValueError, match="'time'; reserved"):
            stream.write(3, {"time": 1})
        with pytest.raises(ValueError, match="found set"):
            stream.write(3, {"x": {1}})
    stream.close()
    assert len(read_metrics(tmp_path)) == 1


@pytest.mark.parametrize(("start", "kept"), [(0, []), (2, [1, 2, 2]), (7, [1, 2, 2, 3])])
def test_resuming_drops_later_and_torn_lines(tmp_path, start, kept):
    path = tmp_path / "metrics.jsonl"
    with Metrics(tmp_path, total=9, quiet=True) as stream:
        for step in (1, 2, 2, 3):
            stream.write(step, {"x": 1.0})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 4, "ti')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 2, 3]
    with Metrics(tmp_path, total=9, start=start, quiet=True) as stream:
        stream.write(8, {"x": 2.0})
    assert [row["step"] for row in _strict(path)] == [*kept, 8]


def test_a_full_disk_leaves_whole_lines(tmp_path, monkeypatch):
    lines = jsonl.JsonLines(tmp_path / "m.jsonl")
    lines.append({"step": 1})
    write, calls = os.write, []

    def part(number, data):
        calls.append(len(data))
        if len(calls) == 1:
            return write(number, data[:5])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", part)
    with pytest.raises(OSError, match="No space left"):
        lines.append({"step": 2, "x": 1})
    monkeypatch.undo()
    lines.append({"step": 3})
    lines.close()
    assert [row["step"] for row in _strict(tmp_path / "m.jsonl")] == [1, 3]


_WRITER = """
    import sys
    from fourfold.runtime.metrics import Metrics
    stream = Metrics(sys.argv[1], total=10**9, quiet=True)
    step = 0
    while True:
        step += 1
        stream.write(step, {"text": "x" * 2000})
        if step == 50:
            print("going", flush=True)
"""


def test_sigkill_leaves_whole_lines(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_WRITER), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "going\n"
        process.send_signal(signal.SIGKILL)
    rows = _strict(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 50


def test_only_the_lead_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.mesh, "is_lead", lambda: False)
    with Metrics(tmp_path / "run", total=3, tensorboard=True, wandb="p") as stream:
        stream.write(1, {"x": 1.0})
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_the_scalars(tmp_path):
    pytest.importorskip("tensorboardX")
    with Metrics(tmp_path, total=3, tensorboard=True, quiet=True) as stream:
        stream.write(1, {"loss/total": 0.25, "text": "no", "many": [1, 2]})
    (events,) = (tmp_path / "tensorboard").iterdir()
    data = events.read_bytes()
    assert b"loss/total" in data and b"many" not in data


def test_wandb_is_resumed_under_its_own_name(tmp_path, monkeypatch):
    calls = []
    run = types.SimpleNamespace(
        log=lambda row, step: calls.append((row, step)), finish=lambda: calls.append("finish")
    )
    fake = types.SimpleNamespace(init=lambda **options: calls.append(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 1):
        with Metrics(tmp_path, 3, start=start, wandb="proj", config={"a": 1}, quiet=True) as stream:
            stream.write(start + 1, {"x": math.inf, "text": "no"})
    assert calls[0]["project"] == "proj" and calls[0]["config"] == {"a": 1}
    assert calls[1:3] == [({"x": math.inf}, 1), "finish"]
    assert calls[3]["id"] == calls[0]["id"] and calls[3]["resume"] == "allow"


@pytest.mark.parametrize(
    ("options", "module"), [({"tensorboard": True}, "tensorboardX"), ({"wandb": "p"}, "wandb")]
)
def test_a_missing_sink_names_the_extra_and_costs_nothing(tmp_path, monkeypatch, options, module):
    with Metrics(tmp_path, 3, quiet=True) as stream:
        stream.write(1, {"x": 1})
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"{module}: pip install 'fourfold\[log\]'"):
        Metrics(tmp_path, 3, **options)
    assert len(read_metrics(tmp_path)) == 1


def test_the_bar_shows_rate_time_left_and_metrics():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, color_system=None)
    bar = progress.Progress(1000, "updates", start=500, console=console)
    assert bar._bar is not None
    clock = [100.0]
    bar._bar.get_time = lambda: clock[0]
    task = bar._bar.tasks[0]
    task._get_time = lambda: clock[0]
    task.start_time = 100.0
    for step in (600, 700, 800):
        clock[0] += 10
        bar.update(step, {"loss": 0.12345, "[red]": 2.0})
    bar._bar.refresh()
    bar.close()
    text = out.getvalue()
    assert "800/1,000" in text and "10.0 updates/s" in text and "0:00:20" in text
    assert "loss 0.1235" in text and "[red] 2" in text


def test_without_a_terminal_lines_come_now_and_then(monkeypatch):
    out = io.StringIO()
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines = progress.Progress(100, "steps", every=30, console=Console(file=out, width=20))
    for step in range(1, 80):
        clock[0] = float(step)
        lines.update(step, {"loss": 1.0})
    lines.close()
    found = out.getvalue().splitlines()
    assert [line.split("/")[0] for line in found] == ["1", "31", "61", "79"]
    assert found[1] == "31/100 steps  1.0 steps/s  ETA 0:01:09  loss 1"


def test_quiet_says_nothing(capsys):
    bar = progress.Progress(10, "steps", quiet=True)
    bar.update(10, {"x": 1.0})
    bar.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (None, "– steps/s"),
        (math.inf, "– steps/s"),
        (0.1, "10.0 s per step"),
        (3.14159, "3.1 steps/s"),
        (2.5e6, "2.5M steps/s"),
        (7e9, "7.0G steps/s"),
    ],
)
def test_rates_read_well(rate, text):
    assert progress.format_rate(rate, "steps") == text


def test_durations_read_well():
    assert progress.format_seconds(None) == progress.format_seconds(math.nan) == "–:––"
    assert progress.format_seconds(59.7) == "0:01:00"
