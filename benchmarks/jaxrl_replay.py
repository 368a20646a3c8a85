"""How much memory does a replay of a million transitions take, and what does a sample cost?

    python benchmarks/jaxrl_replay.py [--quick | --full]

The peer of the sampling times is what a plain implementation does: build both stacked NHWC
observations of every sample on the host. Memory is counted from the arrays; `--full` also writes
a million rows (about 7 GB) and reports what the process then holds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from _bench import alternate, figure, median, show

from jaxrl import device_replay
from jaxrl.replay import HostReplay, stack_frames
from jaxrl.windows import window_rows

BATCH, STACK, NUM_ENVS = 32, 4, 8


def resident_bytes() -> int:
    """What the process holds in physical memory (Linux)."""
    status = Path("/proc/self/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def rows(count: int = 64) -> list[tuple[np.ndarray, ...]]:
    """Rows as an Atari game with a life lost about every 200 steps gives them."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(count):
        frame = rng.integers(256, size=(NUM_ENVS, 84, 84), dtype=np.uint8)
        action = rng.integers(18, size=NUM_ENVS)
        reward = rng.integers(-1, 2, size=NUM_ENVS).astype(np.float32)
        terminal = rng.random(NUM_ENVS) < 0.005
        no, valid = np.zeros(NUM_ENVS, bool), rng.random(NUM_ENVS) < 0.995
        made.append((frame, action, reward, terminal, no, no, valid))
    return made


def stacked_on_host(replay: HostReplay, rng: np.random.Generator) -> Callable[[], object]:
    """The peer: two stacked NHWC batches, frame by frame, without padding or returns."""
    frames = replay.state_dict()["frames"]

    def run():
        env, row = replay.draw(rng, BATCH)
        window = window_rows(row, replay.rows, STACK, 1)
        both = (window[:, :-1], window[:, 1:])
        return [np.stack([frames[env, x[:, k]] for k in range(STACK)], axis=-1) for x in both]

    return run


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rows and repeats")
    parser.add_argument("--full", action="store_true", help="write a million rows (7 GB)")
    arguments = parser.parse_args()
    repeats, capacity = (100, 16_000) if arguments.quick else (500, 64_000)
    some = rows()

    for name, size in {
        "host": HostReplay(1_000_000, NUM_ENVS).nbytes,
        "device": device_replay.nbytes(1_000_000, NUM_ENVS),
    }.items():
        gigabytes = size / 1e9
        figure(f"1M replay, {name}, counted", gigabytes, None, "GB", gigabytes, 7.3)
    if arguments.full:
        before = resident_bytes()
        replay = HostReplay(1_000_000, NUM_ENVS)
        for step in range(replay.rows):
            replay.add(*some[step % len(some)])
        gigabytes = (resident_bytes() - before) / 1e9
        figure("1M replay, host, resident when full", gigabytes, None, "GB", gigabytes, 7.3)
        del replay

    host = HostReplay(capacity, NUM_ENVS)
    state = device_replay.init(capacity, NUM_ENVS)
    add = jax.jit(device_replay.add, donate_argnums=0)
    for step in range(host.rows):
        host.add(*some[step % len(some)])
        state = add(state, *some[step % len(some)])

    def add_on_device():
        nonlocal state
        state = add(state, *some[0])
        return state.head

    rng, key = np.random.default_rng(0), jax.random.key(0)
    stack = jax.jit(stack_frames)
    static = {"static_argnames": ("batch_size", "n_step")}
    sample = jax.jit(device_replay.sample, **static)
    seconds = alternate(
        {
            "peer": stacked_on_host(host, rng),
            "draw": lambda: host.draw(rng, BATCH),
            "host": lambda: host.sample_frames(rng, BATCH),
            "host + stack": lambda: stack(host.sample_frames(rng, BATCH)),
            "device": lambda: sample(state, key, BATCH),
            "device, 3 steps": lambda: sample(state, key, BATCH, n_step=3),
            "add": lambda: host.add(*some[0]),
            "device add": add_on_device,
        },
        repeats,
    )
    micro = {name: median(x, "us") for name, x in seconds.items()}
    peer = micro["peer"]
    for name, label in {
        "host": "host sample, frames once",
        "host + stack": "host sample + stacking inside jit",
        "device": f"device sample, stacked ({jax.default_backend()})",
        "device, 3 steps": f"device sample, stacked, 3 steps ({jax.default_backend()})",
    }.items():
        figure(f"{label} / stacked on host", micro[name], peer, "µs", micro[name] / peer)
    figure("host sample, choosing rows only", micro["draw"], None, "µs")
    figure(f"host add, {NUM_ENVS} environments", micro["add"], None, "µs")
    figure(f"device add, {NUM_ENVS} environments, from host", micro["device add"], None, "µs")
    show()


if __name__ == "__main__":
    main()
