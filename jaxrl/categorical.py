"""Categorical distributions over returns: their atoms, their mean, and C51's projection.

Arithmetic is float32 whatever the inputs are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike


def support(v_min: float = -10.0, v_max: float = 10.0, num_atoms: int = 51) -> np.ndarray:
    """Returns the atoms' values, equally spaced from `v_min` to `v_max`.

    Spaced in float64 and then rounded: `jnp.linspace` accumulates float32 errors, so that its
    spacings differ by more than one rounding.

    Args:
      v_min: smallest value.
      v_max: largest value, above `v_min`.
      num_atoms: number of atoms, at least 2.

    Returns:
      float32 `(num_atoms,)`, a NumPy array (so that it is a constant under `jit`).

    Raises:
      ValueError: where the range is empty or not finite, or `num_atoms` is below 2.

    >>> support(-1.0, 1.0, 5)
    array([-1. , -0.5,  0. ,  0.5,  1. ], dtype=float32)
    """
    _check_range(v_min, v_max, num_atoms)
    return np.linspace(v_min, v_max, num_atoms, dtype=np.float64).astype(np.float32)


def categorical_projection(
    probs: ArrayLike,
    r_t: ArrayLike,
    discount_t: ArrayLike,
    *,
    v_min: float = -10.0,
    v_max: float = 10.0,
) -> jax.Array:
    """Projects the law of `r_t + discount_t * Z` back onto Z's own support.

    Atom j moves to the position `b_j = (clip(r + γ z_j, v_min, v_max) - v_min) / Δ`, in atoms, and
    its mass is shared linearly between the two neighbours of `b_j` (Bellemare, Dabney and Munos
    2017, "A Distributional Perspective on Reinforcement Learning", equation 7 and algorithm 1).

    A float32 near 50 is only good to 4e-6, so positions are never held as one number: they are
    the sum of an exact integer and a fraction below one. Weights are then right to about 2e-7,
    an integer position keeps all its mass, and nothing is lost on a terminal (`discount_t = 0`).

    Args:
      probs: float `(num_atoms,)`, probabilities of the atoms `support(v_min, v_max, num_atoms)`.
      r_t: scalar, the (n-step) reward. Infinite rewards are clipped like any other.
      discount_t: scalar in [0, 1], the discount γⁿ; 0 at a terminal.
      v_min: value of the first atom, a Python number.
      v_max: value of the last atom, a Python number.

    Returns:
      float32 `(num_atoms,)`, probabilities with the mass of `probs`. Linear, and differentiable,
      in `probs`; the derivatives in `r_t` and `discount_t` are zero by construction.

    Raises:
      ValueError: where `probs` is not a vector, `r_t` or `discount_t` is not a scalar, or the
        range is empty.

    A reward of 1 with a discount of one half moves the atoms -1, 0, 1 to 0.5, 1 and 1.5, the last
    of which is clipped to 1:

    >>> probs = jnp.array([0.5, 0.25, 0.25])
    >>> categorical_projection(probs, 1.0, 0.5, v_min=-1.0, v_max=1.0).tolist()
    [0.0, 0.25, 0.75]
    """
    probs = as_float32("probs", probs, ("num_atoms",))
    r_t = lax.stop_gradient(as_float32("r_t", r_t, ()))
    discount_t = lax.stop_gradient(as_float32("discount_t", discount_t, ()))
    num_atoms = probs.shape[0]
    _check_range(v_min, v_max, num_atoms)

    # In units of atoms: b_j = r / Δ + γ (j - c) + c, where c = -v_min / Δ is the place of value 0.
    per_unit = (num_atoms - 1) / (float(v_max) - float(v_min))
    centre = -float(v_min) * per_unit
    # Farther out, every atom is clipped anyway; this keeps the integer parts exact.
    r_limit = 4.0 * max(abs(v_min), abs(v_max))
    r_t = jnp.clip(r_t, -r_limit, r_limit)
    reward_whole, reward_part = _product_in_parts(r_t, np.full(num_atoms, per_unit))
    value_whole, value_part = _product_in_parts(discount_t, np.arange(num_atoms) - centre)
    centre_whole = round(centre)
    whole = reward_whole + value_whole + np.float32(centre_whole)
    part = reward_part + value_part + np.float32(centre - centre_whole)

    carry = jnp.floor(part)
    whole, part = whole + carry, part - carry
    outside = (whole < 0) | (whole >= num_atoms - 1)
    whole = jnp.clip(whole, 0, num_atoms - 1)
    part = jnp.where(outside, np.float32(0), part)

    # Rows are the new atoms. A dense sum rather than a scatter: no write conflicts on an
    # accelerator; and no matrix product, which would round to bfloat16 or TF32 there.
    distance = whole[None, :] - np.arange(num_atoms, dtype=np.float32)[:, None]
    distance = distance + jnp.broadcast_to(part[None, :], distance.shape)
    weight = jnp.maximum(1 - jnp.abs(distance), 0)
    return jnp.sum(weight * jnp.broadcast_to(probs[None, :], weight.shape), axis=1)


def expected_values(logits: ArrayLike, v_min: float = -10.0, v_max: float = 10.0) -> jax.Array:
    """Returns the action values that the logits stand for.

    Args:
      logits: float `(num_actions, num_atoms)`.
      v_min: value of the first atom, a Python number.
      v_max: value of the last atom, a Python number.

    Returns:
      float32 `(num_actions,)`, the mean of each action's distribution.

    Raises:
      ValueError: where `logits` is not a matrix, or the range is empty.

    >>> expected_values(jnp.zeros((2, 4)), 0.0, 3.0).tolist()
    [1.5, 1.5]
    """
    logits = as_float32("logits", logits, ("num_actions", "num_atoms"))
    atoms = np.broadcast_to(support(v_min, v_max, logits.shape[1]), logits.shape)
    return jnp.sum(jax.nn.softmax(logits) * atoms, axis=1)


def _product_in_parts(x: jax.Array, constants: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Returns `x * constants` as integers and remainders, to about 1e-7 whatever its size.

    Both factors are cut into pieces of at most 12 significant bits, whose products are exact in
    float32. So is what remains of each after rounding to an integer, which makes the result
    indifferent to whether the compiler fuses the multiplications with the subtractions.

    Args:
      x: float32 scalar.
      constants: float64 `(n,)`, known when traced.

    Returns:
      Two float32 `(n,)`: integer values, and the remainders, at most about one half each piece.
    """
    high = _leading_bits(x)
    pieces = []
    for _ in range(3):
        rounded = constants.astype(np.float32)
        pieces.append((rounded.view(np.uint32) & np.uint32(0xFFFFF000)).view(np.float32))
        constants = constants - pieces[-1]
    # Smallest products first, so that their sum loses least.
    whole = part = jnp.zeros(constants.shape, jnp.float32)
    for piece in reversed(pieces):
        for factor in (x - high, high):
            product = factor * piece
            nearest = jnp.round(product)
            whole, part = whole + nearest, part + (product - nearest)
    return whole, part


def _leading_bits(x: jax.Array) -> jax.Array:
    """Truncates a float32 to 12 significant bits."""
    bits = lax.bitcast_convert_type(x, jnp.uint32) & np.uint32(0xFFFFF000)
    return lax.bitcast_convert_type(bits, jnp.float32)


def as_float32(name: str, value: ArrayLike, axes: tuple[str, ...]) -> jax.Array:
    """Casts to float32 and checks the rank, `axes` being the expected shape in words."""
    array = jnp.asarray(value)
    if array.ndim != len(axes):
        expected = f"shape ({', '.join(axes)})" if axes else "a scalar"
        raise ValueError(
            f"{name} must be {expected}, found shape {array.shape}: "
            "a loss takes one transition, batch it with jax.vmap"
        )
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(f"{name} must be real, found {array.dtype}")
    return array.astype(jnp.float32)


def _check_range(v_min: float, v_max: float, num_atoms: int) -> None:
    if num_atoms < 2:
        raise ValueError(f"num_atoms must be at least 2, found {num_atoms}")
    if not (np.isfinite(v_min) and np.isfinite(v_max) and v_min < v_max):
        raise ValueError(f"v_min must be below v_max, both finite, found {v_min} and {v_max}")
