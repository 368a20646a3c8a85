"""The training step: two augmented views in, a new state and metrics out; pure and un-jitted.

A linear probe learns beside it from the features, and nothing flows back from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vicreg import baselines
from vicreg.covariance import second_moments
from vicreg.learner import Learner, Metrics, TrainState

Batch = Mapping[str, jax.Array]


class Embedded(NamedTuple):
    """What the network makes of a batch: `features (B, F)` and `embeddings (B, D)` of each view."""

    features_a: jax.Array
    features_b: jax.Array
    embeddings_a: jax.Array
    embeddings_b: jax.Array


def embed(
    learner: Learner, params: Any, batch_stats: Any, view_a: jax.Array, view_b: jax.Array
) -> tuple[Embedded, Any]:
    """Runs both views through the network in training mode, one after the other.

    BatchNorm's statistics are those of each view apart, as in the authors' code.

    Args:
      learner: from `make`.
      params: of a state.
      batch_stats: of a state.
      view_a: float32 `(B, H, W, C)`.
      view_b: the same.

    Returns:
      The embedded batch and the new running statistics.
    """

    def forward(stats: Any, images: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
        features, changed = learner.backbone.apply(
            {"params": params["backbone"], "batch_stats": stats["backbone"]},
            images,
            train=True,
            mutable=["batch_stats"],
        )
        after = {"backbone": changed["batch_stats"], "expander": stats["expander"]}
        if learner.objective is None:
            return features, learner.expander.apply({"params": params["expander"]}, features), after
        z, changed = learner.expander.apply(
            {"params": params["expander"], "batch_stats": stats["expander"]},
            features,
            train=True,
            mutable=["batch_stats"],
        )
        after["expander"] = changed.get("batch_stats", {})
        return features, z, after

    h_a, z_a, batch_stats = forward(batch_stats, view_a)
    h_b, z_b, batch_stats = forward(batch_stats, view_b)
    return Embedded(h_a, h_b, z_a, z_b), batch_stats


def loss_of(
    learner: Learner, z_a: jax.Array, z_b: jax.Array, labels: jax.Array
) -> tuple[jax.Array, Metrics]:
    """The run's loss of two views' embeddings; of the supervised baseline, of their logits."""
    if learner.objective is not None:
        return learner.objective(z_a, z_b)
    pairs = [baselines.cross_entropy(z, labels, axis_name=learner.axis_name) for z in (z_a, z_b)]
    (loss_a, terms_a), (loss_b, terms_b) = pairs
    return (loss_a + loss_b) / 2, jax.tree.map(lambda a, b: (a + b) / 2, terms_a, terms_b)


def update(learner: Learner, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    """Takes one step.

    Args:
      learner: from `make`.
      state: the state before.
      batch: `view_a` and `view_b`, float32 `(B, H, W, C)`, and `label`, int32 `(B,)`. With the
        learner's `axis_name`, this device's rows.

    Returns:
      The state after, and metrics: the loss and its unweighted terms, `std` (mean standard
      deviation of the embeddings' dimensions), `lr`, `grad_norm`, `probe/loss` and `probe/top1` of
      the online probe, and `nonfinite`, how many embeddings (rows) are not finite.
    """

    def objective_of(params: Any) -> tuple[jax.Array, Any]:
        embedded, batch_stats = embed(
            learner, params, state.batch_stats, batch["view_a"], batch["view_b"]
        )
        z_a, z_b = embedded.embeddings_a, embedded.embeddings_b
        loss, terms = loss_of(learner, z_a, z_b, batch["label"])
        return loss, (embedded, batch_stats, terms)

    gradient = jax.value_and_grad(objective_of, has_aux=True)
    (loss, (embedded, batch_stats, terms)), grads = gradient(state.params)
    if learner.axis_name is not None:
        grads = jax.lax.pmean(grads, learner.axis_name)
    state = apply_gradients(learner, state, grads, batch_stats)
    state, probe = update_probe(learner, state, embedded, batch["label"])
    metrics = {"loss": loss, **terms, **probe, **embedding_metrics(learner, embedded)}
    return state, {**metrics, **gradient_metrics(learner, state, grads)}


def apply_gradients(
    learner: Learner, state: TrainState, grads: Any, batch_stats: Any
) -> TrainState:
    """Returns the state after the optimiser's step, with new running statistics."""
    updates, opt_state = learner.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return state.replace(  # pyright: ignore[reportAttributeAccessIssue]
        step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state
    )


def update_probe(
    learner: Learner, state: TrainState, embedded: Embedded, labels: jax.Array
) -> tuple[TrainState, Metrics]:
    """Takes a step of the online probe on the features of both views, which do not feel it."""
    features = jax.lax.stop_gradient((embedded.features_a, embedded.features_b))

    def objective_of(probe: dict[str, jax.Array]) -> tuple[jax.Array, Metrics]:
        logits = [probe_logits(probe, h) for h in features]
        pairs = [baselines.cross_entropy(x, labels, axis_name=learner.axis_name) for x in logits]
        (loss_a, terms_a), (loss_b, terms_b) = pairs
        return (loss_a + loss_b) / 2, jax.tree.map(lambda a, b: (a + b) / 2, terms_a, terms_b)

    (loss, terms), grads = jax.value_and_grad(objective_of, has_aux=True)(state.probe)
    if learner.axis_name is not None:
        grads = jax.lax.pmean(grads, learner.axis_name)
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam mixes its integer count with floats
        updates, opt_state = learner.probe_optimizer.update(
            grads, state.probe_opt_state, state.probe
        )
    probe = optax.apply_updates(state.probe, updates)
    state = state.replace(probe=probe, probe_opt_state=opt_state)  # pyright: ignore[reportAttributeAccessIssue]
    return state, {"probe/loss": loss, "probe/top1": terms["top1"]}


def probe_logits(probe: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    """Class scores `(B, K)` of features `(B, F)`."""
    return jnp.matmul(features, probe["kernel"]) + probe["bias"][None]


def embedding_metrics(learner: Learner, embedded: Embedded) -> Metrics:
    """What a collapse and an overflow show in: `std` and `nonfinite`, see `update`."""
    views = (embedded.embeddings_a, embedded.embeddings_b)
    # Their covariances, which the moments come with, are computed for the loss or not at all.
    moments = [second_moments(z, axis_name=learner.axis_name) for z in views]
    std = jnp.mean(jnp.sqrt(jnp.stack([var for var, _ in moments])))
    bad = jnp.sum(~jnp.isfinite(jnp.stack(views)).all(axis=-1)).astype(jnp.float32)
    if learner.axis_name is not None:
        bad = jax.lax.psum(bad, learner.axis_name)
    return {"std": std, "nonfinite": bad}


def gradient_metrics(learner: Learner, state: TrainState, grads: Any) -> Metrics:
    """Norm of the gradient, and the learning rate that met it."""
    lr = jnp.asarray(learner.schedule(state.step - 1), jnp.float32)
    return {"grad_norm": optax.tree.norm(grads), "lr": lr}
