"""The network of a shard where the user brings none, and the optimiser of a configuration."""

from __future__ import annotations

import functools
import math

import flax.linen as nn
import jax
import optax

from unlearn.config import ModelConfig, OptimConfig
from unlearn.sisa import Learner


class MLP(nn.Module):
    """A perceptron with ReLU on flattened records.

    Attributes:
      hidden: widths of the hidden layers.
      classes: number of outputs.
    """

    hidden: tuple[int, ...]
    classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(B, ...)` to logits `(B, classes)`."""
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
        for width in self.hidden:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.classes)(x)


def make_model(config: ModelConfig, classes: int) -> nn.Module:
    """Returns the network of a configuration."""
    return MLP(config.hidden, classes)


def make_optimizer(config: OptimConfig) -> optax.GradientTransformation:
    """Returns the optimiser of a configuration; weight decay is decoupled, as in AdamW."""
    if config.name == "adam":
        scale = optax.scale_by_adam()
    else:
        scale = optax.trace(config.momentum, nesterov=True) if config.momentum else optax.identity()
    return optax.chain(
        scale,
        optax.add_decayed_weights(config.weight_decay),
        optax.scale(-config.lr),
    )


@functools.lru_cache(maxsize=16)
def make_learner(model: ModelConfig, optim: OptimConfig, classes: int) -> Learner:
    """Returns what an ensemble trains; the same object each time, so that it is compiled once."""
    return Learner(make_model(model, classes), make_optimizer(optim))
