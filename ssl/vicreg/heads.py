"""A linear classifier on features that stay as they are: seconds, where images would take hours."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

Head = dict[str, jax.Array]


class Split(NamedTuple):
    """Features `(N, F)` float32 with their labels `(N,)` int32."""

    features: np.ndarray | jax.Array
    labels: np.ndarray | jax.Array


def init(key: jax.Array, num_features: int, num_classes: int) -> Head:
    """Returns a head as the authors start it: weights from N(0, 0.01²), bias 0."""
    kernel = 0.01 * jax.random.normal(key, (num_features, num_classes))
    return {"kernel": kernel, "bias": jnp.zeros(num_classes)}


def logits(head: Head, features: jax.Array) -> jax.Array:
    """Class scores `(B, K)` of features `(B, F)`."""
    return jnp.matmul(features, head["kernel"]) + head["bias"][None]


def sgd(weight_decay: float, lr: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """PyTorch's SGD with momentum 0.9: the decay before the momentum, the rate after it."""
    return optax.chain(
        optax.add_decayed_weights(weight_decay),
        optax.trace(0.9),
        optax.scale_by_learning_rate(lr),
    )


def epoch_cosine(lr: float, epochs: int, steps_per_epoch: int) -> optax.Schedule:
    """A cosine to 0 that is constant within an epoch, PyTorch's CosineAnnealingLR.

    >>> [round(float(epoch_cosine(1.0, 4, 10)(step)), 3) for step in (0, 9, 10, 39)]
    [1.0, 1.0, 0.854, 0.146]
    """

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        epoch = jnp.asarray(step) // steps_per_epoch
        return lr / 2 * (1 + jnp.cos(jnp.pi * epoch.astype(jnp.float32) / epochs))

    return schedule


def hits(scores: jax.Array, labels: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Counts rows whose label is the first, or among the first five, by score; float32 `(2,)`."""
    own = jnp.take_along_axis(scores, labels[:, None], axis=1)
    # A tie counts against the row, and so does NaN: neither constant nor diverged scores score.
    rank = jnp.sum(~(scores < own), axis=1)
    found = jnp.stack([rank <= 1, rank <= 5]).astype(jnp.float32)
    return jnp.sum(found if mask is None else found * mask.astype(jnp.float32)[None], axis=1)


def fit(
    train: Split,
    test: Split,
    *,
    num_classes: int,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    seed: int,
) -> Iterator[dict[str, float]]:
    """Trains a head and scores it after every epoch.

    Args:
      train: what to learn from.
      test: what to score on.
      num_classes: K.
      epochs: passes over `train`.
      batch_size: rows per update; all of `train` where it is smaller. What does not fill a batch is
        left for the next epoch.
      lr: peak learning rate.
      weight_decay: of weights and bias.
      seed: of the head and the orders.

    Yields:
      After each epoch its number from 1 as `epoch`, `loss` (its mean), and `top1` and `top5` on
      `test`, fractions.

    Raises:
      ValueError: features that are not finite; the message says how many.
    """
    for name, split in (("train", train), ("test", test)):
        bad = int(np.count_nonzero(~np.isfinite(split.features).all(axis=1)))
        if bad:
            raise ValueError(f"{bad} of the {len(split.features)} {name} features are not finite")
    batch_size = min(batch_size, len(train.features))
    steps = len(train.features) // batch_size
    optimizer, epoch, score = _functions(lr, weight_decay, epochs, steps)
    train, test = Split(*map(jnp.asarray, train)), Split(*map(jnp.asarray, test))
    head = init(jax.random.key(seed), train.features.shape[1], num_classes)
    state = (head, optimizer.init(head))
    rng = np.random.default_rng(seed)
    for number in range(1, epochs + 1):
        order = rng.permutation(len(train.labels))[: steps * batch_size].reshape(steps, batch_size)
        state, loss = epoch(state, order.astype(np.int32), train)
        top1, top5 = np.asarray(score(state[0], test), np.float64) / len(test.labels)
        yield {"epoch": number, "loss": float(loss), "top1": float(top1), "top5": float(top5)}


# Kept, since all seeds and checkpoints that are compared share them.
@functools.lru_cache(maxsize=8)
def _functions(lr: float, weight_decay: float, epochs: int, steps: int):
    optimizer = sgd(weight_decay, epoch_cosine(lr, epochs, steps))

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(state, order: jax.Array, train: Split):
        def update(state, at: jax.Array):
            head, opt_state = state

            def objective(head: Head) -> jax.Array:
                scores = logits(head, train.features[at])
                return optax.softmax_cross_entropy_with_integer_labels(
                    scores, train.labels[at]
                ).mean()

            loss, grads = jax.value_and_grad(objective)(head)
            updates, opt_state = optimizer.update(grads, opt_state, head)
            return (optax.apply_updates(head, updates), opt_state), loss

        state, losses = lax.scan(update, state, order)
        return state, losses.mean()

    @jax.jit
    def score(head: Head, test: Split) -> jax.Array:
        return hits(logits(head, test.features), test.labels)  # pyright: ignore[reportArgumentType]

    return optimizer, epoch, score
