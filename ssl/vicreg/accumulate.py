"""One update from a batch larger than memory, in parts, with the statistics of the whole batch.

Summing the gradients of the parts' losses would be wrong: a variance of 4096 images isn't the mean
of sixteen variances of 256. So (as GradCache does for contrastive losses, Gao et al. 2021):

1. `cache` runs each part through the network and keeps its embeddings only;
2. `loss_gradient` takes the loss of all embeddings together, and its gradient by each of them;
3. `part_gradient` runs each part again, now for the parameters' gradient, which that of its
   embeddings weights; these add up to the exact gradient of the whole batch's loss.

BatchNorm's statistics are those of a part in both runs. Memory is that of one part, of all
embeddings and of their gradient; the price is one more forward pass.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from vicreg import step
from vicreg.learner import Learner, Metrics, TrainState
from vicreg.step import Batch, Embedded


def cache(learner: Learner, params: Any, batch_stats: Any, part: Batch) -> tuple[Embedded, Any]:
    """Embeds a part; the same as `step.embed` of a batch.

    Returns:
      The embedded part, and the running statistics after it, to go on with.
    """
    return step.embed(learner, params, batch_stats, part["view_a"], part["view_b"])


def loss_gradient(
    learner: Learner, embedded: Embedded, labels: jax.Array
) -> tuple[jax.Array, Metrics, tuple[jax.Array, jax.Array]]:
    """Returns the whole batch's loss, its terms, and its gradient by both views' embeddings.

    Args:
      learner: from `learner.make`.
      embedded: all parts, joined.
      labels: theirs, int32 `(B,)`.
    """
    (loss, terms), grads = jax.value_and_grad(
        lambda z_a, z_b: step.loss_of(learner, z_a, z_b, labels), argnums=(0, 1), has_aux=True
    )(embedded.embeddings_a, embedded.embeddings_b)
    return loss, terms, grads


def part_gradient(
    learner: Learner,
    state: TrainState,
    part: Batch,
    cotangents: tuple[jax.Array, jax.Array],
    grads: Any,
) -> Any:
    """Adds a part's share of the parameters' gradient.

    Args:
      learner: from `learner.make`.
      state: the state before the update.
      part: the batch that `cache` was given.
      cotangents: the rows of `loss_gradient`'s that belong to the part.
      grads: the sum so far, of the structure of `state.params`.
    """

    def embeddings(params: Any) -> tuple[jax.Array, jax.Array]:
        embedded, _ = cache(learner, params, state.batch_stats, part)
        return embedded.embeddings_a, embedded.embeddings_b

    _, pull_back = jax.vjp(embeddings, state.params)
    return jax.tree.map(jnp.add, grads, pull_back(cotangents)[0])


def finish(
    learner: Learner,
    state: TrainState,
    embedded: Embedded,
    labels: jax.Array,
    grads: Any,
    batch_stats: Any,
) -> tuple[TrainState, Metrics]:
    """Takes the step; returns the state after it, and `step.update`'s metrics but the loss's."""
    state = step.apply_gradients(learner, state, grads, batch_stats)
    state, probe = step.update_probe(learner, state, embedded, labels)
    metrics = {**probe, **step.embedding_metrics(learner, embedded)}
    return state, {**metrics, **step.gradient_metrics(learner, state, grads)}
