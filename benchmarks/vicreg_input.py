"""Does a step ever wait for data, and what does augmentation cost?

Runs as `vicreg pretrain` does: batches read ahead in threads, augmented on the device. The digits
come from memory; CIFAR-10, with `--data-dir`, is decoded anew for every batch.
"""

from __future__ import annotations

import dataclasses
import time

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _bench import alternate, figure, median, show

from fourfold.runtime import mesh as meshes
from vicreg import augment, compiled, data, learner, presets, train
from vicreg.config import DataConfig, ModelConfig, PretrainConfig


def waiting(config: PretrainConfig, source: data.Source, steps: int) -> tuple[float, float]:
    """Share of the time spent waiting for data, and images a second, after a warm-up."""
    parts = learner.make(config, steps_per_epoch=100, num_classes=source.num_classes)
    functions = compiled.compile_functions(config, parts, meshes.make_mesh(1))
    state = functions.init(jax.random.key(0))
    batches = data.batches(source, config.batch_size, seed=0)
    for _ in range(3):
        state, metrics, _ = functions.advance(state, next(batches))
        jax.block_until_ready(metrics)
    waited, began = 0.0, time.perf_counter()
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(batches)
        waited += time.perf_counter() - start
        state, metrics, _ = functions.advance(state, batch)
        jax.block_until_ready(metrics)
    seconds = time.perf_counter() - began
    return waited / seconds, steps * config.batch_size / seconds


def main(data_dir: str | None = None, quick: bool = False) -> None:
    """Measures both.

    Args:
      data_dir: where tensorflow-datasets keeps cifar10; without it only the digits are measured.
      quick: fewer steps.
    """
    steps = 10 if quick else 40
    digits = presets.get("digits-laptop").config
    runs = {"digits, ConvNet": (digits, train.open_images(digits, "train", quiet=True))}
    if data_dir is not None:
        cifar = dataclasses.replace(
            presets.get("cifar10-r18-1000ep").config,
            data=DataConfig("cifar10", data_dir),
            batch_size=128,
            model=ModelConfig("resnet18", stem="cifar", width=16, expander=(512, 512, 512)),
        )
        # Lazy: the set would fit into memory, and would then not be decoded at all.
        runs["cifar10 decoded anew, ResNet-18 of width 16"] = (
            cifar,
            data.open_source(cifar.data, "train"),
        )
    for name, (config, source) in runs.items():
        share, rate = waiting(config, source, steps)
        figure(f"{name}: share of the time waiting for data", share, None, "", share, 0.02)
        figure(f"{name}: images a second", rate, None, "images/s", better="higher")

    for name, preset, shape in (
        ("256 × 32×32×3, views of cifar", "cifar10-r18-1000ep", (256, 32, 32, 3)),
        ("256 × 28×28×1, views of digits", "digits-laptop", (256, 28, 28, 1)),
    ):
        config = presets.get(preset).config.augment
        images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
        keys = jax.random.split(jax.random.key(0), shape[0])
        sizes = jnp.full((shape[0], 2), shape[1], jnp.int32)
        pair = jax.jit(lambda k, x, s, c=config: augment.two_views(k, x, s, c))
        seconds = alternate({"ours": lambda f=pair, x=images, k=keys, s=sizes: f(k, x, s)}, steps)
        figure(f"{name}: one view of each", median(seconds["ours"], "ms") / 2, None, "ms")
    show()


if __name__ == "__main__":
    tyro.cli(main)
