"""One update of a dialogue model: pure and un-jitted, the same on one device and on a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

from dialog import lora
from dialog.losses import Sums, cross_entropy_sums

# Parameters, the batch, and the key of dropout (None: none is dropped) to logits `(B, T, V)`.
Forward = Callable[[Any, "Batch", jax.Array | None], jax.Array]


class Batch(NamedTuple):
    """Sentences to learn from; arrays are `(B, ...)`, or `(A, B, ...)` for A parts of a batch.

    Attributes:
      inputs: keyword arguments of the model: `input_ids`, `attention_mask`, `decoder_input_ids` of
        an encoder–decoder, `input_ids` and `mask` of a decoder.
      targets: int32 `(B, T)`, the next token at each position.
      mask: bool `(B, T)`, which of them count.
    """

    inputs: Mapping[str, jax.Array]
    targets: jax.Array
    mask: jax.Array


@flax.struct.dataclass
class TrainState:
    """All that training goes on from.

    Attributes:
      params: what is trained: the model's parameters, or adapters of them.
      base: the parameters that stay, where adapters are trained; else None.
      opt_state: of the optimiser.
      step: int32 `()`, updates so far.
      key: typed key `()`; an update's dropout has `fold_in(key, step)`.
    """

    params: Any
    base: Any
    opt_state: optax.OptState
    step: jax.Array
    key: jax.Array


class Learner(NamedTuple):
    """What is trained, and how.

    Attributes:
      forward: of the model; see `forward_of`.
      optimizer: of the parameters, or of the adapters.
      label_smoothing: see `losses.token_losses`.
      lora_scale: of adapters, α / r.
    """

    forward: Forward
    optimizer: optax.GradientTransformation
    label_smoothing: float = 0.0
    lora_scale: float = 1.0


def forward_of(model: nn.Module) -> Forward:
    """Returns the function of a model that is called with a batch's inputs and `train`."""

    def forward(params: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
        options: dict[str, Any] = {**batch.inputs, "train": key is not None}
        if key is not None:
            options["rngs"] = {"dropout": key}
        logits: Any = model.apply({"params": params}, **options)
        return logits

    return forward


def init(learner: Learner, params: Any, key: jax.Array, base: Any = None) -> TrainState:
    """Returns the state before the first update.

    Args:
      learner: what is trained.
      params: of the model, or adapters from `lora.init`.
      key: typed key `()`.
      base: the model's parameters, where `params` are adapters.
    """
    opt_state = learner.optimizer.init(params)
    return TrainState(params, base, opt_state, jnp.zeros((), jnp.int32), key)


def model_params(learner: Learner, state: TrainState) -> Any:
    """Returns the model's parameters, with the adapters merged in, if there are any."""
    if state.base is None:
        return state.params
    return lora.merge(state.base, state.params, learner.lora_scale)


def train_step(
    learner: Learner, state: TrainState, batch: Batch, *, axis_name: str | None = None
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Makes one update.

    The loss is the mean over all tokens of the batch, over all its parts and devices. A batch in A
    parts gives the update of the whole, up to rounding and dropout, in the memory of one part.

    Args:
      learner: what is trained.
      state: before.
      batch: its arrays have an axis of B sentences in front, or of A parts and B sentences.
      axis_name: of the mapped axis over which sentences are spread, under `shard_map` or `pmap`.

    Returns:
      The state after, and `loss`, `nll` (nats a token), `perplexity`, `accuracy`, `tokens` and
      `grad_norm`, float32 `()`.
    """
    key = jax.random.fold_in(state.key, state.step)
    if axis_name is not None:
        key = jax.random.fold_in(key, lax.axis_index(axis_name))

    def total(params: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        merged = model_params(learner, dataclasses.replace(state, params=params))
        logits = learner.forward(merged, part, key)
        sums = cross_entropy_sums(logits, part.targets, part.mask, learner.label_smoothing)
        return sums.loss, sums

    grad = jax.grad(total, has_aux=True)
    if batch.targets.ndim == 2:
        grads, sums = grad(state.params, batch, key)
    else:

        def add(carry: Any, part: tuple[Batch, jax.Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, grad(state.params, *part)), None

        keys = jax.random.split(key, batch.targets.shape[0])
        nothing = Sums(*jnp.zeros((4,), jnp.float32))
        zeros = jax.tree.map(jnp.zeros_like, state.params), nothing
        (grads, sums), _ = lax.scan(add, zeros, (batch, keys))
    if axis_name is not None:
        grads, sums = lax.psum((grads, sums), axis_name)
    tokens = jnp.maximum(sums.tokens, 1)
    grads = jax.tree.map(lambda g: g / tokens.astype(g.dtype), grads)
    changes, opt_state = learner.optimizer.update(grads, state.opt_state, state.params)
    new = dataclasses.replace(
        state,
        params=optax.apply_updates(state.params, changes),
        opt_state=opt_state,
        step=state.step + 1,
    )
    metrics = _metrics(sums) | {"grad_norm": optax.tree.norm(grads)}
    return new, metrics


def eval_step(learner: Learner, params: Any, batch: Batch) -> Sums:
    """Returns the sums of a batch without dropout and smoothing; those of batches may be added."""
    return cross_entropy_sums(learner.forward(params, batch, None), batch.targets, batch.mask)


def _metrics(sums: Sums) -> dict[str, jax.Array]:
    tokens = jnp.maximum(sums.tokens, 1)
    nll = sums.nll / tokens
    return {
        "loss": sums.loss / tokens,
        "nll": nll,
        "perplexity": jnp.exp(nll),
        "accuracy": sums.correct / tokens,
        "tokens": sums.tokens,
    }
