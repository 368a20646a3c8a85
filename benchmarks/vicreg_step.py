"""How fast is a whole VICReg step, from uint8 images to new parameters, on this CPU?

Peer: torchvision's augmentations of PIL images in a DataLoader, and lightly's loss and LARS in
PyTorch, channels last; with 0 and with 2 worker processes, of which the faster counts. It runs in a
process of its own, in turns with ours.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from _bench import figure, median, show

from fourfold.runtime import mesh as meshes
from vicreg import compiled, learner, presets
from vicreg.config import ModelConfig, PretrainConfig

PEERS = str(Path(__file__).parent / "peers")
# Preset, what is changed of it, images.
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "ConvNet, 256 × 28×28×1": ("digits-laptop", {}, (2048, 28, 28, 1)),
    "ResNet-18, width 16, 128 × 32×32×3": (
        "cifar10-r18-1000ep",
        {
            "batch_size": 128,
            "model": ModelConfig("resnet18", stem="cifar", width=16, expander=(512, 512, 512)),
        },
        (2048, 32, 32, 3),
    ),
}


def config_of(case: str) -> PretrainConfig:
    """The configuration of a case."""
    preset, changes, _ = CASES[case]
    return dataclasses.replace(presets.get(preset).config, **changes)


def images_of(case: str) -> np.ndarray:
    """Smooth random images, since what is augmented doesn't matter."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, CASES[case][2]).astype(np.uint8)


def our_step(case: str) -> Callable[[], Any]:
    """A step as `vicreg pretrain` takes it."""
    config, images = config_of(case), images_of(case)
    parts = learner.make(config, steps_per_epoch=100, num_classes=10)
    functions = compiled.compile_functions(config, parts, meshes.make_mesh(1))
    state, rng = functions.init(jax.random.key(0)), np.random.default_rng(0)

    def step() -> Any:
        nonlocal state
        at = rng.integers(0, len(images), config.batch_size).astype(np.int32)
        batch = {
            "image": images[at],
            "size": np.tile(np.int32(images.shape[1:3]), (len(at), 1)),
            "label": at % 10,
            "index": at,
        }
        state, metrics, _ = functions.advance(state, batch)
        return metrics["loss"]

    return step


def peer(pipe: Connection, case: str, workers: int) -> None:
    """Times as many of the peer's steps as it is asked for."""
    sys.path.insert(0, PEERS)
    import torch_vicreg

    config = config_of(case)
    step = torch_vicreg.make_step(
        images_of(case), config.batch_size, config.model.expander, workers
    )
    while (count := pipe.recv()) is not None:
        pipe.send(timed(step, count))


def timed(step: Callable[[], Any], count: int) -> list[float]:
    """Seconds of each of `count` calls, after one that isn't timed."""
    jax.block_until_ready(step())
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        jax.block_until_ready(step())
        seconds.append(time.perf_counter() - start)
    return seconds


def main(turns: int = 8, quick: bool = False) -> None:
    """Times both networks.

    Args:
      turns: rounds, each of a few steps of everyone.
      quick: fewer of them.
    """
    turns = 2 if quick else turns
    try:
        import lightly  # noqa: F401
        import torchvision  # noqa: F401

        workers = (0, 2)
    except ImportError:
        print("lightly and torchvision aren't installed: their figures are left out")
        workers = ()
    context = multiprocessing.get_context("spawn")
    for case in CASES:
        step = our_step(case)
        seconds: dict[Any, list[float]] = {"ours": []}
        pipes: dict[int, Connection] = {}
        for count in workers:
            pipes[count], theirs = context.Pipe()
            # Not a daemon, which may not have workers of its own.
            context.Process(target=peer, args=(theirs, case, count)).start()
        timed(step, 3)
        for _ in range(turns):
            seconds["ours"] += timed(step, 4)
        # One peer at a time: its workers read ahead while it waits for its turn.
        for count, pipe in pipes.items():
            pipe.send(2)
            pipe.recv()
            seconds[count] = []
            for _ in range(turns):
                seconds["ours"] += timed(step, 4)
                pipe.send(8)  # of which the first ones were read ahead
                seconds[count] += pipe.recv()[3:]
            pipe.send(None)
        ours = median(seconds.pop("ours"), "ms")
        if not seconds:
            figure(f"{case}: whole step (no peer installed)", ours, None, "ms")
            continue
        for count, found in seconds.items():
            theirs = median(found, "ms")
            best = theirs == min(median(s, "ms") for s in seconds.values())
            name = f"{case}: whole step, lightly + torchvision, {count} workers"
            figure(name, ours, theirs, "ms", theirs / ours, 1.3 if best else None, "higher")
    show()


if __name__ == "__main__":
    tyro.cli(main)
