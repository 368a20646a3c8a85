"""What a run is made of: its networks, loss and optimisers, and the state that they change.

The same parts serve VICReg and what it is compared with: only the loss differs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from vicreg import baselines, losses, models, optim
from vicreg.config import LossConfig, PretrainConfig

Metrics = dict[str, jax.Array]
Network = Any  # a Linen module, whose own types hide what apply returns
Objective = Callable[[jax.Array, jax.Array], tuple[jax.Array, Metrics]]


class Learner(NamedTuple):
    """The static parts of a run.

    Attributes:
      backbone: images to features.
      expander: features to embeddings; of the supervised baseline, to logits.
      objective: embeddings of two views to `(loss, terms)`; None for the supervised baseline.
      optimizer: of backbone and expander.
      schedule: the learning rate by step, for the log.
      probe_optimizer: of the online probe.
      num_classes: K.
      axis_name: the mapped axis that batches are spread over, if any.
    """

    backbone: Network
    expander: Network
    objective: Objective | None
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    probe_optimizer: optax.GradientTransformation
    num_classes: int
    axis_name: str | None = None


@flax.struct.dataclass
class TrainState:
    """The arrays of a run.

    Attributes:
      step: updates so far, int32 `()`.
      params: of `backbone` and `expander`.
      batch_stats: BatchNorm's running statistics of both.
      opt_state: the optimiser's.
      probe: the online probe, `kernel (F, K)` and `bias (K,)`.
      probe_opt_state: its optimiser's.
      key: source of the augmentations, which fold `step` and an image's position into it.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    probe: dict[str, jax.Array]
    probe_opt_state: optax.OptState
    key: jax.Array


def make(
    config: PretrainConfig, steps_per_epoch: int, num_classes: int, axis_name: str | None = None
) -> Learner:
    """Returns the static parts of a run.

    Args:
      config: the configuration.
      steps_per_epoch: updates an epoch.
      num_classes: K of the probe (and of the supervised baseline).
      axis_name: for steps inside shard_map or pmap, the axis that the batch is spread over.

    Raises:
      ValueError: a warm-up longer than the run.
    """
    steps = config.epochs * steps_per_epoch
    schedule = optim.warmup_cosine(config.optim, config.batch_size, steps, steps_per_epoch)
    supervised = config.loss.name == "supervised"
    return Learner(
        backbone=models.make_backbone(config.model, axis_name),
        expander=nn.Dense(num_classes)
        if supervised
        else models.make_expander(config.model, axis_name),
        objective=None if supervised else objective(config.loss, axis_name),
        optimizer=optim.lars(config.optim, schedule),
        schedule=schedule,
        probe_optimizer=optax.adam(config.probe_lr),
        num_classes=num_classes,
        axis_name=axis_name,
    )


def objective(config: LossConfig, axis_name: str | None = None) -> Objective:
    """Returns the loss of two views' embeddings, `(z_a, z_b) -> (loss, terms)`."""
    if config.name == "vicreg":
        return functools.partial(
            losses.vicreg_loss,
            invariance_weight=config.invariance_weight,
            variance_weight=config.variance_weight,
            covariance_weight=config.covariance_weight,
            variant=config.variant,
            axis_name=axis_name,
        )
    if config.name == "simclr":
        return functools.partial(
            baselines.nt_xent, temperature=config.temperature, axis_name=axis_name
        )
    return functools.partial(
        baselines.barlow_twins,
        off_diagonal_weight=config.off_diagonal_weight,
        scale=config.scale,
        axis_name=axis_name,
    )


def init(learner: Learner, key: jax.Array, image_shape: tuple[int, int, int]) -> TrainState:
    """Returns a run's state at its beginning.

    Args:
      learner: from `make`.
      key: typed PRNG key.
      image_shape: (height, width, channels) of a view.
    """
    key_backbone, key_expander, key_views = jax.random.split(key, 3)
    images = jnp.zeros((2, *image_shape))
    # In evaluation mode, which needs no mapped axis and counts no statistics.
    backbone = learner.backbone.init(key_backbone, images, train=False)
    features = learner.backbone.apply(backbone, images, train=False)
    options = {} if learner.objective is None else {"train": False}
    expander = learner.expander.init(key_expander, features, **options)
    params = {"backbone": backbone["params"], "expander": expander["params"]}
    probe = {
        "kernel": jnp.zeros((features.shape[-1], learner.num_classes)),
        "bias": jnp.zeros(learner.num_classes),
    }
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        batch_stats={
            "backbone": backbone.get("batch_stats", {}),
            "expander": expander.get("batch_stats", {}),
        },
        opt_state=learner.optimizer.init(params),
        probe=probe,
        probe_opt_state=learner.probe_optimizer.init(probe),
        key=key_views,
    )
