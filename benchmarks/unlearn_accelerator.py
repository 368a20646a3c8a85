"""How fast do 20 shards of a ResNet-18 learn on a GPU or TPU: at once, some at once, one by one?

    python benchmarks/unlearn_accelerator.py [--quick]

One epoch over random images of CIFAR's shape, 2,500 a shard, batches of 64, on one device. It is
`Trainer.fit` each time, by its number of shards at once: `SisaConfig.width`. At the largest it is
also compared with the same program compiled with XLA's own options, which need not be exact. On a
CPU, small networks and data only show that it works.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from unittest import mock

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro
from _bench import alternate, figure, median, show

from fourfold.runtime import mesh as meshes
from unlearn import partition, programs
from unlearn.config import SisaConfig
from unlearn.sisa import Learner, ShardState
from unlearn.trainer import Records, Trainer
from vicreg.config import ModelConfig
from vicreg.models import make_backbone

CLASSES = 10


class Classifier(nn.Module):
    """A backbone and a linear layer."""

    config: ModelConfig

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps `(B, H, W, C)` to logits `(B, 10)`."""
        return nn.Dense(CLASSES)(make_backbone(self.config)(images, train=train))


def trainers(
    learner: Learner, config: SisaConfig, widths: tuple[int, ...]
) -> Mapping[str, Trainer]:
    """A trainer of each width, and of the first one with XLA's own options."""

    def make(width: int) -> Trainer:
        wide = dataclasses.replace(config, width=width)
        return Trainer(learner, wide, jax.random.key(0), meshes.make_mesh(1))

    found = {f"{width} at once": make(width) for width in widths}
    programs.programs.cache_clear()
    with mock.patch.object(programs, "exact_options", lambda: None):
        found["XLA's options"] = make(widths[0])
    programs.programs.cache_clear()
    return found


def main(repeats: int = 3, quick: bool = False) -> None:
    """Times every width.

    Args:
      repeats: timed calls of each.
      quick: a tenth of the images.
    """
    shards, per_shard, widths = 20, 250 if quick else 2500, (20, 4, 1)
    model = ModelConfig("resnet18", stem="cifar")
    if jax.default_backend() == "cpu":
        print("no GPU or TPU: a small network, to show that it works")
        shards, per_shard, widths, model = 4, 128, (4, 2, 1), ModelConfig("convnet", width=4)
    count = shards * per_shard
    config = SisaConfig(shards, slices=1, epochs=1)
    config = dataclasses.replace(config, capacity=partition.capacity_for(count, config))
    rng = np.random.default_rng(0)
    records = Records(
        rng.random((count, 32, 32, 3), np.float32),
        rng.integers(0, CLASSES, count).astype(np.int32),
        partition.assign(partition.check_ids(np.arange(count)), config, key=bytes(16)),
    )
    optimizer = optax.sgd(0.1, momentum=0.9, nesterov=True)
    learner = Learner(Classifier(model), optimizer, train_argument=True)
    start = dict.fromkeys(range(shards), 0)

    def train(trainer: Trainer) -> list[ShardState]:
        found = trainer.fit(records, start, lambda shard, slice_: {}[shard, slice_])
        return [state for _, _, state in found]

    found = trainers(learner, config, widths)
    fns = {name: functools.partial(train, trainer) for name, trainer in found.items()}
    seconds = {name: median(times) for name, times in alternate(fns, repeats, warmup=1).items()}
    title = f"{shards} × {model.backbone}, {count:,} images ({jax.default_backend()})"
    one = seconds[f"{widths[-1]} at once"]
    for width in widths[:-1]:
        ours = seconds[f"{width} at once"]
        name = f"{title}: {width} at once, one by one"
        figure(name, ours, one, "s", one / ours, None, "higher")
    ours, peer = seconds[f"{widths[0]} at once"], seconds["XLA's options"]
    name = f"{title}: {widths[0]} at once, with XLA's own options (cost of exactness)"
    figure(name, ours, peer, "s", ours / peer, 1.15)
    show()


if __name__ == "__main__":
    tyro.cli(main)
