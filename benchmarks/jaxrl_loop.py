"""How fast the whole training loop on Pong is, against its own update and against Dopamine.

Uniform replay on the host, one update of 32 per 4 agent steps, C51-SN, after warm-up. The loop and
the bare update take turns, a few seconds each; the share is the loop's agent steps per second over
those that the update alone would allow (4 per update). Dopamine 4.1.2 runs in an environment of
its own (`benchmarks/peers/dopamine_c51.py --install`), before and after.

    python benchmarks/jaxrl_loop.py [--quick] [--num-envs 32] [--replay host|device]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import _bench
import jax
import numpy as np

from fourfold.runtime import mesh as meshes
from jaxrl import compiled, loop, train
from jaxrl.config import AgentConfig, AtariConfig, Exploration
from jaxrl.envs import make_atari

DOPAMINE = Path(__file__).parent / "peers" / "dopamine_c51.py"


def measure(config: AtariConfig, turns: int, seconds: float) -> tuple[float, float]:
    """Agent steps per second of the loop, and of the update alone (times update_period)."""
    mesh = meshes.make_mesh(1)
    env = make_atari(config.game, config.num_envs, num_threads=compiled.emulator_threads())
    agent = train.make_agent(config, env.num_actions)
    functions = compiled.compile_functions(agent, config, mesh, jax.random.key(1))
    memory = compiled.make_memory(config, config.num_envs, mesh)
    progress = train.start_progress(agent, jax.random.key(0), mesh)
    stack = jax.device_put(np.zeros((config.num_envs, *train.OBS_SHAPE), np.uint8))
    lines = loop.run(config, env, memory, functions, stack, progress)
    while progress.updates < 50:
        next(lines)
    size = min(functions.largest, max(config.num_envs // config.update_period, 1))
    (batch,) = memory.draw([size])
    loops, updates = [], []
    for _ in range(turns):
        # Between two of these points lie as many iterations' updates as iterations.
        first = last = next(lines)["step"]
        jax.block_until_ready(progress.agent)
        begin = time.perf_counter()
        while time.perf_counter() - begin < seconds:
            last = next(lines)["step"]
        jax.block_until_ready(progress.agent)
        loops.append((last - first) / (time.perf_counter() - begin))
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            progress.agent, metrics = functions.learn(progress.agent, batch)
            jax.block_until_ready(metrics)
            count += size
        updates.append(count * config.update_period / (time.perf_counter() - begin))
    return statistics.median(loops), statistics.median(updates)


def dopamine(padding: str, seconds: float) -> float | None:
    """Agent steps per second of Dopamine's C51, or None where it isn't installed."""
    command = [sys.executable, str(DOPAMINE), "--padding", padding, "--seconds", str(seconds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"Dopamine left out: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])["agent_steps_per_second"]


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two minutes at most")
    parser.add_argument("--num-envs", type=int, default=32)
    parser.add_argument("--replay", choices=("host", "device"), default="host")
    args = parser.parse_args()
    turns, seconds = (4, 3.0) if args.quick else (10, 5.0)
    config = AtariConfig(
        agent=AgentConfig(spectral=("-2",)),
        exploration=Exploration(warmup=2_000, end_step=10_000),
        steps=1 << 30,
        num_envs=args.num_envs,
        replay=args.replay,
        replay_capacity=100_000,
        log_every=1_000,
    )
    theirs = {padding: [dopamine(padding, 4 * seconds)] for padding in ("SAME", "VALID")}
    ours, allowed = measure(config, turns, seconds)
    for padding, rates in theirs.items():
        rates.append(dopamine(padding, 4 * seconds) if rates[0] is not None else None)
    unit = "agent steps/s"
    name = f"Pong loop / update alone, {args.num_envs} environments, {args.replay} replay"
    _bench.figure(name, ours, allowed, unit, ours / allowed, 0.9, "higher")
    for padding, rates in theirs.items():
        known = [rate for rate in rates if rate is not None]
        peer = statistics.median(known) if known else None
        note = "" if padding == "SAME" else ", with our network"
        ratio = ours / peer if peer else None
        _bench.figure(f"Pong loop / Dopamine 4.1.2{note}", ours, peer, unit, ratio, 3.0, "higher")
    _bench.show()


if __name__ == "__main__":
    main()
