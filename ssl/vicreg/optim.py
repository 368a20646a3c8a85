"""LARS as VICReg's authors compute it, LARC clipping as on CIFAR, and their learning rate.

`optax.lars` multiplies by the learning rate before the momentum, so that past gradients keep the
rate of their own step; PyTorch's optimisers, the authors' among them, multiply after it. While the
rate warms up, the two differ by up to a half.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from vicreg.config import OptimConfig


def warmup_cosine(
    config: OptimConfig, batch_size: int, steps: int, steps_per_epoch: int
) -> optax.Schedule:
    """Learning rate: linear from 0 to `base_lr * batch_size / 256`, then a cosine.

    Bardes, Ponce and LeCun 2022, section 4.2, as in the authors' code: the cosine ends in
    `end_scale` of the peak at step `steps`, one after the last update, and stays there.

    Args:
      config: `base_lr`, `warmup_epochs` and `end_scale` are read.
      batch_size: images per update, over all devices.
      steps: updates of the whole run, warm-up included.
      steps_per_epoch: updates per epoch; the warm-up is rounded to whole updates.

    Returns:
      A function of the number of updates made so far, an integer, traced or not; its value is a
      scalar of JAX's default float type.

    Raises:
      ValueError: where the warm-up is longer than the run.

    >>> schedule = warmup_cosine(OptimConfig(), batch_size=2048, steps=100, steps_per_epoch=2)
    >>> [round(float(schedule(step)), 4) for step in (0, 10, 20, 60, 100)]
    [0.0, 0.8, 1.6, 0.8008, 0.0016]
    """
    peak = config.base_lr * batch_size / 256
    warmup = round(config.warmup_epochs * steps_per_epoch)
    if warmup > steps:
        raise ValueError(
            f"the warm-up of {config.warmup_epochs} epochs takes {warmup} updates, more than the "
            f"run's {steps}: shorten warmup_epochs or train for longer"
        )

    def schedule(step: ArrayLike) -> jax.Array:
        step = jnp.asarray(step, float)
        # Each denominator is 0 only where the other branch is taken, at every step of the run.
        rising = peak * step / (warmup or 1)
        progress = jnp.minimum((step - warmup) / (steps - warmup or 1), 1)
        q = 0.5 * (1 + jnp.cos(math.pi * progress))
        return jnp.where(step < warmup, rising, peak * q + peak * config.end_scale * (1 - q))

    return schedule


def lars(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """LARS in the authors' order, or LARC where `config.clip` is set.

    You, Gitman and Ginsburg 2017, section 4, with weight decay `wd`, trust coefficient `η`, and
    norms of one parameter array each; at learning rate `lr`, for gradient `g` of parameter `p`:

        d = g + wd * p
        q = η * |p| / |d|, or 1 where either norm is 0
        m = momentum * m + q * d
        p = p - lr * m

    LARC clips the trust ratio so that a step is at most one of plain momentum, as solo-learn does
    in its recipes for CIFAR; unlike above, a parameter of which a norm is 0 isn't decayed either:

        q = min(η * |p| / (|g| + wd * |p| + 1e-8) / lr, 1)
        d = q * (g + wd * p), or g where |p| or |g| is 0
        m = momentum * m + d
        p = p - lr * m

    Parameters of one dimension, which are the biases and BatchNorm's, take neither weight decay nor
    a trust ratio. Map over seeds with `jax.vmap`, which hides the seeds' axis; to stack seeds
    without it would turn biases into matrices.

    Args:
      config: `momentum`, `weight_decay`, `trust_coefficient` and `clip` are read.
      schedule: learning rate as a function of the number of updates made so far.

    Returns:
      An optimiser whose updates are added to the parameters. `update` needs `params`, of the same
      types as the gradients.

    >>> optimiser = lars(OptimConfig(weight_decay=0.0), lambda step: 0.5)
    >>> params = {"kernel": jnp.full((1, 4), 2.0), "bias": jnp.ones(1)}
    >>> updates, _ = optimiser.update(params, optimiser.init(params), params)
    >>> round(float(updates["kernel"][0, 0]), 6), float(updates["bias"][0])
    (-0.001, -0.5)
    """
    if config.clip:
        scaled = [_scale_by_larc(config, schedule)]
    else:
        scaled = [
            optax.add_decayed_weights(config.weight_decay, mask=_is_scaled),
            optax.masked(
                optax.scale_by_trust_ratio(trust_coefficient=config.trust_coefficient), _is_scaled
            ),
        ]
    return optax.chain(
        *scaled, optax.trace(config.momentum), optax.scale_by_learning_rate(schedule)
    )


def _is_scaled(params: Any) -> Any:
    return jax.tree.map(lambda p: p.ndim != 1, params)


def _scale_by_larc(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    def init(params: optax.Params) -> optax.ScaleByScheduleState:
        del params
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates,
        state: optax.ScaleByScheduleState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.ScaleByScheduleState]:
        if params is None:
            raise ValueError("LARC needs the parameters: call update(gradients, state, params)")
        lr = schedule(state.count)

        def scale(g: jax.Array, p: jax.Array) -> jax.Array:
            if p.ndim == 1:
                return g
            g_norm, p_norm = jnp.linalg.norm(g), jnp.linalg.norm(p)
            local = config.trust_coefficient * p_norm
            local = local / (g_norm + config.weight_decay * p_norm + 1e-8)
            # min(local / lr, 1) without its division by the 0 that the warm-up starts from.
            largest = jnp.maximum(local, jnp.asarray(lr, local.dtype))
            q = local / jnp.where(largest > 0, largest, 1)
            decayed = q * (g + config.weight_decay * p)
            return jnp.where((p_norm != 0) & (g_norm != 0), decayed, g)

        count = jnp.asarray(optax.safe_increment(state.count))
        return jax.tree.map(scale, updates, params), optax.ScaleByScheduleState(count=count)

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
