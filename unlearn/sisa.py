"""An ensemble vmapped over shards: its update, its training by slices, its predictions.

Sharded, Isolated, Sliced, Aggregated (Bourtoule et al., Machine Unlearning, S&P 2021, section IV).
The functions are pure; `unlearn.trainer` compiles them and drives them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax

from unlearn.losses import cross_entropy

# Of the logits `(C,)` and the label `()` of one record.
Loss = Callable[[jax.Array, jax.Array], jax.Array]


@flax.struct.dataclass
class ShardState:
    """A shard's network and all else that its training goes on from.

    Attributes:
      params: of the network.
      model_state: the network's other variables, such as BatchNorm's statistics.
      opt_state: of the optimiser.
      step: int32 `()`, updates so far.
      key: uint32, `jax.random.key_data` of the shard's key: plain bits can be kept and compared.
    """

    params: Any
    model_state: Any
    opt_state: Any
    step: jax.Array
    key: jax.Array


class Learner(NamedTuple):
    """What is trained, and how.

    Attributes:
      model: Linen module, `(B, ...)` to logits `(B, C)`.
      optimizer: of one shard.
      loss: of one record; the batch's is its mean.
      train_argument: whether the module is called with a keyword `train`, True in training.
      rngs: names of the module's streams of random numbers in training, such as "dropout".
    """

    model: nn.Module
    optimizer: optax.GradientTransformation
    loss: Loss = cross_entropy
    train_argument: bool = False
    rngs: tuple[str, ...] = ()


def init(learner: Learner, key: jax.Array, record: jax.Array) -> ShardState:
    """Returns a shard's state before its first slice.

    Args:
      learner: what is trained.
      key: of the shard: `jax.random.fold_in(key of the ensemble, shard)`.
      record: one record, for its shape and dtype.
    """
    key_params, key = jax.random.split(key)
    options: dict[str, Any] = {"train": False} if learner.train_argument else {}
    variables = learner.model.init(key_params, jnp.zeros_like(record)[None], **options)
    model_state = {name: value for name, value in variables.items() if name != "params"}
    opt_state = learner.optimizer.init(variables["params"])
    bits = jax.random.key_data(key)
    return ShardState(variables["params"], model_state, opt_state, jnp.zeros((), jnp.int32), bits)


def update(
    learner: Learner, state: ShardState, x: jax.Array, y: jax.Array, rows: jax.Array
) -> ShardState:
    """Makes one update of one shard; none at all where the batch is empty.

    Args:
      learner: what is trained.
      state: of the shard.
      x: `(n, ...)`, records of the shard.
      y: `(n, ...)`, their labels.
      rows: int32 `(B,)`, which records are the batch, and then -1 where there are fewer. What
        stands in other rows of `x` and `y`, NaN included, has no influence.

    Returns:
      The new state.
    """
    count = jnp.sum(rows >= 0)
    # Momentum would move the weights with no record at all. Vmapped, both ways are gone and one is
    # taken; what the other has, NaN included, is lost.
    return lax.cond(
        count > 0,
        lambda state: _update(learner, state, x, y, rows, count),
        lambda state: state,
        state,
    )


def _update(
    learner: Learner,
    state: ShardState,
    x: jax.Array,
    y: jax.Array,
    rows: jax.Array,
    count: jax.Array,
) -> ShardState:
    # Missing records are repeats of the others, so that BatchNorm sees nothing else; the loss has
    # each once.
    there = rows >= 0
    rows = rows[jnp.arange(rows.size) % jnp.maximum(count, 1).astype(jnp.int32)]
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    options: dict[str, Any] = {"train": True} if learner.train_argument else {}
    if learner.rngs:
        options["rngs"] = {n: jax.random.fold_in(key, i) for i, n in enumerate(learner.rngs)}

    def objective(params: Any) -> tuple[jax.Array, Any]:
        logits, model_state = learner.model.apply(
            {"params": params, **state.model_state},
            x[rows],
            mutable=list(state.model_state),
            **options,
        )
        losses = jax.vmap(learner.loss)(logits, y[rows])
        total = jnp.sum(jnp.where(there, losses, jnp.zeros_like(losses)))
        return total / jnp.maximum(count, 1).astype(losses.dtype), model_state

    grads, model_state = jax.grad(objective, has_aux=True)(state.params)
    changes, opt_state = learner.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, changes)
    return ShardState(params, model_state, opt_state, state.step + 1, state.key)


def updates(
    learner: Learner,
    state: ShardState,
    x: jax.Array,
    y: jax.Array,
    rows: jax.Array,
    count: jax.Array,
) -> ShardState:
    """Makes the first `count` updates of a block.

    Args:
      learner: what is trained.
      state: of the shard.
      x: as for `update`.
      y: as for `update`.
      rows: int32 `(T, B)`, a batch an update.
      count: int32 `()`, at most T.
    """

    def body(t: jax.Array, state: ShardState) -> ShardState:
        return update(learner, state, x, y, lax.dynamic_index_in_dim(rows, t, keepdims=False))

    return lax.fori_loop(0, count, body, state)


def probabilities(learner: Learner, state: ShardState, x: jax.Array) -> jax.Array:
    """Returns what a shard's network gives each class, `(B, C)`, for records `(B, ...)`."""
    options: dict[str, Any] = {"train": False} if learner.train_argument else {}
    logits: Any = learner.model.apply({"params": state.params, **state.model_state}, x, **options)
    return jax.nn.softmax(logits)


def aggregate(
    probs: jax.Array, method: Literal["vote", "mean"], serving: jax.Array | None = None
) -> jax.Array:
    """Joins the predictions of shards.

    Args:
      probs: float `(S, B, C)`, of each shard.
      method: "mean" of the probabilities, or the shares of the votes, of which each shard has one
        for its likeliest class, the first where several are. The winner is the argmax of either;
        of a tie of votes, the lowest class.
      serving: bool `(S,)`, shards that take part; None for all. With none, the result is NaN.

    Returns:
      float `(B, C)`, rows that sum to 1.
    """
    if method == "vote":
        probs = jax.nn.one_hot(jnp.argmax(probs, axis=-1), probs.shape[-1], dtype=probs.dtype)
    if serving is None:
        return jnp.mean(probs, axis=0)
    weights = serving.astype(probs.dtype)
    return jnp.einsum("s,sbc->bc", weights, probs) / jnp.sum(weights)
