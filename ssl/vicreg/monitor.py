"""What a run is looked at with, between its steps: signs of collapse, the online probe's score."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vicreg import diagnostics, step
from vicreg.learner import Learner, Metrics, TrainState
from vicreg.step import Batch


def diagnose(learner: Learner, state: TrainState, images: jax.Array) -> Metrics:
    """Looks for collapse in a batch of one view, which takes singular values: now and then.

    Args:
      learner: from `make`, without an axis name.
      state: a state.
      images: float32 `(B, H, W, C)`; the first 512 are taken.

    Returns:
      `rankme`, the effective rank of the embeddings (at most 512), `rankme/backbone`, that of the
      features, and `off_diagonal_covariance`, the root mean square of the embeddings'
      covariances.
    """
    images = images[:512]
    embedded, _ = step.embed(learner, state.params, state.batch_stats, images, images)
    z = embedded.embeddings_a
    return {
        "rankme": diagnostics.rankme(z),
        "rankme/backbone": diagnostics.rankme(embedded.features_a),
        "off_diagonal_covariance": diagnostics.off_diagonal_covariance(z),
    }


def score(learner: Learner, state: TrainState, batch: Batch) -> jax.Array:
    """Counts what the online probe gets right of a batch, in evaluation mode.

    Args:
      learner: from `make`.
      state: a state.
      batch: `image`, float32 `(B, H, W, C)`, `label`, int32 `(B,)`, and `mask`, bool `(B,)`, False
        where a row is padding.

    Returns:
      float32 `()`.
    """
    logits = step.probe_logits(state.probe, features(learner, state, batch["image"]))
    hits = (jnp.argmax(logits, axis=-1).astype(jnp.int32) == batch["label"]) & batch["mask"]
    return jnp.sum(hits).astype(jnp.float32)


def features(learner: Learner, state: TrainState, images: jax.Array) -> jax.Array:
    """Returns the backbone's features `(B, F)` in evaluation mode."""
    variables = {
        "params": state.params["backbone"],
        "batch_stats": state.batch_stats["backbone"],
    }
    return learner.backbone.apply(variables, images, train=False)
