"""How long one C51 update takes: ours, PyTorch's, and ours with spectral normalisation.

Batch 32, Nature CNN, 51 atoms, 6 actions, Adam; the update reads uint8 observations and covers
both forwards, the projection, the backward pass and the optimiser. PyTorch runs in its best
configuration (channels_last, fused Adam) in a process of its own, turn by turn with ours, so that
neither's threads spin beside the other's.

    python benchmarks/jaxrl_update.py [--quick]
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import _bench
import jax
import jax.numpy as jnp
import numpy as np

from fourfold.runtime.hardware import cpu_options
from jaxrl import agent as agents
from jaxrl import networks
from jaxrl.compiled import best_conv_method
from jaxrl.config import AgentConfig
from jaxrl.types import Transition

PEERS = str(Path(__file__).parent / "peers")
NUM_ACTIONS = 6
SN = ("-2",)


def batch() -> Transition:
    """Random transitions on the device."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 32, 84, 84, 4), dtype=np.uint8)
    return jax.device_put(
        Transition(
            s_tm1=frames[0],
            a_tm1=rng.integers(0, NUM_ACTIONS, 32).astype(np.int32),
            r_t=rng.choice([-1.0, 0.0, 1.0], 32).astype(np.float32),
            discount_t=np.full(32, 0.99, np.float32),
            s_t=frames[1],
        )
    )


def our_update(
    spectral: tuple[str, ...] = (), method: str | None = None, tuned: bool = True
) -> Callable[[], jax.Array]:
    """Returns a function that does one update in place; `tuned` as `jaxrl.compiled` compiles."""
    network = networks.nature_net(NUM_ACTIONS, conv_method=method or best_conv_method())
    agent = agents.make(AgentConfig(spectral=spectral), network)
    transitions = batch()
    state = agents.init(agent, jax.random.key(0), (84, 84, 4))
    options = cpu_options() if tuned else None
    update = jax.jit(
        lambda state, transitions: agents.update(agent, state, transitions),
        donate_argnums=0,
        compiler_options=options,
    )

    def step() -> jax.Array:
        nonlocal state
        # An argument, as in training: of a constant, XLA could do part of the work beforehand.
        state, metrics = update(state, transitions)
        return metrics["loss"]

    return step


def materialised_update() -> Callable[[], jax.Array]:
    """The naive form of spectral normalisation: W / σ is formed, and differentiated through."""
    from jaxrl import spectral as module

    def normalised_dense(x, kernel, bias, sigma, bound=None):
        return jnp.dot(x, kernel * module.scale(sigma, bound)) + bias[None]

    ours, module.normalised_dense = module.normalised_dense, normalised_dense
    try:
        step = our_update(SN)
        step()  # traced here, while the naive form stands in
    finally:
        module.normalised_dense = ours
    return step


def torch_worker(pipe: Connection) -> None:
    """Times as many updates of PyTorch as it is asked for."""
    sys.path.insert(0, PEERS)
    import torch_c51

    steps = {"update": torch_c51.make_update(NUM_ACTIONS)}
    while (count := pipe.recv()) is not None:
        pipe.send(timed(steps["update"], count))


def timed(step: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` calls, after one that isn't timed."""
    jax.block_until_ready(step())
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        jax.block_until_ready(step())
        seconds.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a minute at most")
    turns = 12 if parser.parse_args().quick else 40
    steps = {
        "ours": our_update(),
        "SN": our_update(SN),
        "SN, W/σ formed": materialised_update(),
        "direct": our_update(method="direct"),
        "XLA's defaults": our_update(tuned=False),
        "direct, XLA's defaults": our_update(method="direct", tuned=False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    worker, pipe = None, None
    if importlib.util.find_spec("torch") is None:
        print("PyTorch isn't installed: its figures are left out (make bench installs it)")
    else:
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        worker = context.Process(target=torch_worker, args=(theirs,), daemon=True)
        worker.start()
        pipe.send(5)
        pipe.recv()
        seconds["torch"] = []
    for step in steps.values():
        timed(step, 3)
    for _ in range(turns):
        for name, step in steps.items():
            seconds[name] += timed(step, 5)
        if pipe is not None:
            pipe.send(5)
            seconds["torch"] += pipe.recv()
    if pipe is not None and worker is not None:
        pipe.send(None)
        worker.join()
    ms = {name: _bench.median(times, "ms") for name, times in seconds.items()}
    if "torch" in ms:
        speedup = ms["torch"] / ms["ours"]
        _bench.figure(
            "C51 update, PyTorch / ours", ms["ours"], ms["torch"], "ms", speedup, 1.0, "higher"
        )
    overhead = ms["SN"] / ms["ours"]
    _bench.figure("SN on -2, with / without", ms["SN"], ms["ours"], "ms", overhead, 1.10)
    naive = ms["SN, W/σ formed"]
    _bench.figure("SN with W/σ formed / without", naive, ms["ours"], "ms", naive / ms["ours"])
    for name in ("direct", "XLA's defaults", "direct, XLA's defaults"):
        _bench.figure(
            f"convolutions {name} / ours", ms[name], ms["ours"], "ms", ms[name] / ms["ours"]
        )
    _bench.show()


if __name__ == "__main__":
    main()
