"""Losses of one transition, for categorical (C51) and scalar (DQN) action values.

Every function takes a single transition, with rlax's time indices (`tm1` is t - 1); batch with
`jax.vmap`, then take the mean. Arithmetic is float32 whatever the inputs are. An action index out
of range is clamped, as JAX always does; it can't be checked under `jit`.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxrl.categorical import as_float32, categorical_projection, expected_values, support

__all__ = [
    "c51_loss",
    "categorical_projection",
    "double_c51_loss",
    "double_dqn_loss",
    "dqn_loss",
    "expected_values",
    "support",
]

Kind = Literal["huber", "mse"]


def c51_loss(
    logits_tm1: ArrayLike,
    a_tm1: ArrayLike,
    r_t: ArrayLike,
    discount_t: ArrayLike,
    logits_t: ArrayLike,
    *,
    v_min: float = -10.0,
    v_max: float = 10.0,
) -> jax.Array:
    """Cross-entropy from the projected distribution of the best next action (C51).

    Bellemare, Dabney and Munos 2017, algorithm 1. The logarithm is `log_softmax`, never the
    logarithm of a clipped probability: where a probability underflows, the gradient must not.

    Args:
      logits_tm1: float `(num_actions, num_atoms)`, online logits at t - 1.
      a_tm1: integer scalar, the action taken at t - 1.
      r_t: scalar, the (n-step) reward.
      discount_t: scalar, γⁿ, or 0 at a terminal.
      logits_t: float `(num_actions, num_atoms)`, target logits at t; no gradient flows to them.
      v_min: value of the first atom, a Python number.
      v_max: value of the last atom, a Python number.

    Returns:
      float32 scalar, at least the entropy of the target.

    Raises:
      ValueError: where a shape or the type of `a_tm1` is wrong; it names what was found.

    Uniform logits against a target of one atom, the terminal reward, cost log 5:

    >>> uniform = jnp.zeros((3, 5))
    >>> round(float(c51_loss(uniform, 0, 1.0, 0.0, uniform, v_min=-1.0, v_max=1.0)), 4)
    1.6094
    """
    return double_c51_loss(
        logits_tm1, a_tm1, r_t, discount_t, logits_t, logits_t, v_min=v_min, v_max=v_max
    )


def double_c51_loss(
    logits_tm1: ArrayLike,
    a_tm1: ArrayLike,
    r_t: ArrayLike,
    discount_t: ArrayLike,
    logits_t: ArrayLike,
    selector_logits_t: ArrayLike,
    *,
    v_min: float = -10.0,
    v_max: float = 10.0,
) -> jax.Array:
    """C51 whose next action is chosen by other logits than those that value it.

    The double Q-learning of van Hasselt, Guez and Silver 2016 on distributions, as in Rainbow
    (Hessel et al. 2018): the online network chooses, the target network values.

    Args:
      logits_tm1: float `(num_actions, num_atoms)`, online logits at t - 1.
      a_tm1: integer scalar, the action taken at t - 1.
      r_t: scalar, the (n-step) reward.
      discount_t: scalar, γⁿ, or 0 at a terminal.
      logits_t: float `(num_actions, num_atoms)`, target logits at t; no gradient.
      selector_logits_t: float `(num_actions, num_atoms)`, online logits at t; no gradient.
      v_min: value of the first atom, a Python number.
      v_max: value of the last atom, a Python number.

    Returns:
      float32 scalar.

    Raises:
      ValueError: where a shape or the type of `a_tm1` is wrong; it names what was found.
    """
    logits_tm1 = as_float32("logits_tm1", logits_tm1, ("num_actions", "num_atoms"))
    logits_t = as_float32("logits_t", logits_t, ("num_actions", "num_atoms"))
    selector_logits_t = as_float32(
        "selector_logits_t", selector_logits_t, ("num_actions", "num_atoms")
    )
    _check_same_shape(logits_tm1=logits_tm1, logits_t=logits_t, selector_logits_t=selector_logits_t)
    a_tm1 = _action(a_tm1)

    a_t = jnp.argmax(expected_values(selector_logits_t, v_min, v_max))
    target = categorical_projection(
        jax.nn.softmax(logits_t[a_t]), r_t, discount_t, v_min=v_min, v_max=v_max
    )
    return -jnp.sum(lax.stop_gradient(target) * jax.nn.log_softmax(logits_tm1[a_tm1]))


def dqn_loss(
    q_tm1: ArrayLike,
    a_tm1: ArrayLike,
    r_t: ArrayLike,
    discount_t: ArrayLike,
    q_t: ArrayLike,
    *,
    kind: Kind = "huber",
) -> jax.Array:
    """Loss of the temporal-difference error `r + γ max_a q_t[a] - q_tm1[a_tm1]` (DQN).

    Mnih et al. 2015, equation 2. Scaled as in PyTorch, in which the paper's results were made:
    "huber" is `smooth_l1_loss`, δ²/2 up to |δ| = 1 and |δ| - 1/2 beyond; "mse" is `mse_loss`, δ²
    with no half. A learning rate tuned for the other convention is off by two.

    Args:
      q_tm1: float `(num_actions,)`, online values at t - 1.
      a_tm1: integer scalar, the action taken at t - 1.
      r_t: scalar, the (n-step) reward.
      discount_t: scalar, γⁿ, or 0 at a terminal.
      q_t: float `(num_actions,)`, target values at t; no gradient flows to them.
      kind: "huber" or "mse".

    Returns:
      float32 scalar.

    Raises:
      ValueError: where a shape, the type of `a_tm1` or `kind` is wrong; it names what was found.

    >>> q = jnp.array([1.0, 2.0])
    >>> float(dqn_loss(q, 0, 0.5, 0.5, q)), float(dqn_loss(q, 0, 0.5, 0.5, q, kind="mse"))
    (0.125, 0.25)
    """
    return double_dqn_loss(q_tm1, a_tm1, r_t, discount_t, q_t, q_t, kind=kind)


def double_dqn_loss(
    q_tm1: ArrayLike,
    a_tm1: ArrayLike,
    r_t: ArrayLike,
    discount_t: ArrayLike,
    q_t: ArrayLike,
    selector_q_t: ArrayLike,
    *,
    kind: Kind = "huber",
) -> jax.Array:
    """DQN loss whose next action is chosen by other values than those that value it.

    van Hasselt, Guez and Silver 2016, equation 4: the online network chooses.

    Args:
      q_tm1: float `(num_actions,)`, online values at t - 1.
      a_tm1: integer scalar, the action taken at t - 1.
      r_t: scalar, the (n-step) reward.
      discount_t: scalar, γⁿ, or 0 at a terminal.
      q_t: float `(num_actions,)`, target values at t; no gradient.
      selector_q_t: float `(num_actions,)`, online values at t; no gradient.
      kind: "huber" or "mse", scaled as in `dqn_loss`.

    Returns:
      float32 scalar.

    Raises:
      ValueError: where a shape, the type of `a_tm1` or `kind` is wrong; it names what was found.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {get_args(Kind)}, found {kind!r}")
    q_tm1 = as_float32("q_tm1", q_tm1, ("num_actions",))
    q_t = as_float32("q_t", q_t, ("num_actions",))
    selector_q_t = as_float32("selector_q_t", selector_q_t, ("num_actions",))
    _check_same_shape(q_tm1=q_tm1, q_t=q_t, selector_q_t=selector_q_t)
    a_tm1 = _action(a_tm1)
    r_t = as_float32("r_t", r_t, ())
    discount_t = as_float32("discount_t", discount_t, ())

    target = lax.stop_gradient(r_t + discount_t * q_t[jnp.argmax(selector_q_t)])
    error = target - q_tm1[a_tm1]
    if kind == "mse":
        return jnp.square(error)
    size = jnp.abs(error)
    # |δ| clipped at 1 keeps the gradient finite and continuous, without a `where`.
    inner = jnp.minimum(size, 1)
    return 0.5 * jnp.square(inner) + (size - inner)


def _action(a_tm1: ArrayLike) -> jax.Array:
    array = jnp.asarray(a_tm1)
    if array.ndim or not jnp.issubdtype(array.dtype, jnp.integer):
        raise ValueError(
            f"a_tm1 must be an integer scalar, found {array.dtype} of shape {array.shape}: "
            "a loss takes one transition, batch it with jax.vmap"
        )
    return array


def _check_same_shape(**arrays: jax.Array) -> None:
    if len({array.shape for array in arrays.values()}) > 1:
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise ValueError(f"shapes must be equal, found {found}")
