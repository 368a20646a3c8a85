"""Sums of a convex loss over records and their derivatives, in float64.

The losses of a linear prediction are written out in NumPy: nothing is compiled again when a record
goes, and no record is left in a compilation cache. Any other loss is differentiated by JAX, with
64-bit types switched on for the duration of a call.

Weights are flat vectors `(p,)` here; a matrix `(d, C)` is its rows, one after the other. Sums are
without a regulariser.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from scipy.special import expit, softmax

LossName = Literal["logistic", "softmax", "ridge"]
LossFunction = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Product = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class LinearLoss:
    """A convex loss ℓ(z, y) of a prediction z = Wᵀx, with bounds on its derivatives by z.

    Attributes:
      name: of the loss.
      outputs: C, the length of z.
      at_zero: the loss at z = 0; infinite where it depends on y.
      slope: bound on ‖∇ℓ‖₂.
      curvature: bound on ‖∇²ℓ‖₂.
      twist: Lipschitz constant of ∇²ℓ; γ of Guo et al. 2020.
      first: of z `(n, C)` and y `(n,)`; ∇ℓ of each record, `(n, C)`.
      second: of z `(n, C)`; what multiplies vectors `(n, C)` by ∇²ℓ of each record.
    """

    name: LossName
    outputs: int
    at_zero: float
    slope: float
    curvature: float
    twist: float
    first: Callable[[np.ndarray, np.ndarray], np.ndarray]
    second: Callable[[np.ndarray], Product]
    proven_convex = True

    def predictions(self, w: np.ndarray, x: np.ndarray) -> np.ndarray:
        """z, `(n, C)`, of weights `(p,)` and features `(n, d)`."""
        return x @ w.reshape(x.shape[1], self.outputs)

    def gradient(self, w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Sum of gradients, `(p,)`."""
        return (x.T @ self.first(self.predictions(w, x), y)).ravel()

    def gradients(self, w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Gradient of each record, `(n, p)`."""
        slopes = self.first(self.predictions(w, x), y)
        return (x[:, :, None] * slopes[:, None, :]).reshape(len(x), w.size)

    def product(self, w: np.ndarray, x: np.ndarray, y: np.ndarray) -> Product:
        """What multiplies vectors `(p,)` by the sum of Hessians, without building it."""
        second = self.second(self.predictions(w, x))
        return lambda v: (x.T @ second(self.predictions(v, x))).ravel()

    def hessian(self, w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Sum of Hessians, `(p, p)`."""
        d, c = x.shape[1], self.outputs
        second, unit = self.second(self.predictions(w, x)), np.eye(c)
        blocks = np.empty((d, c, d, c))
        for j in range(c):
            column = second(np.broadcast_to(unit[j], (len(x), c)))
            for i in range(j + 1):  # both blocks are symmetric, and equal
                blocks[:, i, :, j] = blocks[:, j, :, i] = x.T @ (column[:, i, None] * x)
        return blocks.reshape(d * c, d * c)

    def remainder(self, step: np.ndarray, x: np.ndarray, norm: float) -> float:
        """Bounds ‖∇L(w + s) - ∇L(w) - ∇²L(w) s‖₂ for the sum L over records, at any w.

        The step moves the prediction of record i by a_i, which adds x_i ⊗ c_i to what is missed,
        ‖c_i‖ ≤ ∫₀¹ γ t ‖a_i‖² dt = γ ‖a_i‖² / 2. The sum over records is Xᵀ(c_1, …, c_n)ᵀ, so its
        norm is at most (γ/2) ‖X‖₂ (Σ ‖a_i‖⁴)^½. Corollary 1 of Guo et al. 2020, γ ‖X‖₂ ‖s‖ ‖Xs‖,
        follows for rows of norm 1 at most, with two to spare; for longer rows it does not hold.

        Args:
          step: s, `(p,)`.
          x: `(n, d)`.
          norm: bound on ‖X‖₂.
        """
        squares = np.sum(np.square(self.predictions(step, x)), axis=1)
        return self.twist / 2 * norm * float(np.linalg.norm(squares))

    def scale(self, w: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
        """Σ ‖x_i‖ (‖∇ℓ_i‖ + κ ‖x_i‖ ‖w‖), of which a computed sum of gradients is off by ulps."""
        rows = np.linalg.norm(x, axis=1)
        slopes = np.linalg.norm(self.first(self.predictions(w, x), y), axis=1)
        return float(rows @ (slopes + self.curvature * rows * np.linalg.norm(w)))


def linear_loss(name: str, classes: int | None = None) -> LinearLoss:
    """Returns a loss by name.

    The bounds are suprema. Logistic: |σ'| ≤ 1/4 and |σ''| ≤ 1/(6√3). Softmax: the derivatives of
    log Σ exp z_c along u are central moments of u_c under the softmax probabilities. The second is
    at most (range/2)², the third range³/(6√3), since for a given mean it is linear in the
    probabilities, so that two points suffice for its maximum, and p(1-p)(1-2p) ≤ 1/(6√3). A unit
    vector has a range of √2 at most: 1/2 and √(2/27). A symmetric trilinear form has its norm on
    the diagonal (Banach 1938), so the last is the Lipschitz constant of the Hessian.

    Args:
      name: "logistic" with labels -1 and 1, "softmax" with labels from 0 to classes - 1, or
        "ridge" with any targets.
      classes: C of "softmax", at least 2. It is not taken from the data: a class may have its last
        record removed.

    Raises:
      ValueError: where the name or the number of classes is wrong.
    """
    if (name == "softmax") != (classes is not None) or (classes is not None and classes < 2):
        raise ValueError(f"classes must be 2 at least for softmax, else None; found {classes}")
    if name == "logistic":
        return LinearLoss(
            name, 1, math.log(2), 1.0, 1 / 4, 1 / (6 * math.sqrt(3)), _logistic_1, _logistic_2
        )
    if name == "softmax" and classes is not None:
        bounds = (math.log(classes), math.sqrt(2), 1 / 2, math.sqrt(2 / 27))
        return LinearLoss(name, classes, *bounds, _softmax_1, _softmax_2)
    if name == "ridge":
        return LinearLoss(name, 1, math.inf, math.inf, 1.0, 0.0, _ridge_1, _ridge_2)
    raise ValueError(f"loss must be logistic, softmax or ridge, found {name!r}")


def _logistic_1(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    return -y[:, None] * expit(-y[:, None] * z)


def _logistic_2(z: np.ndarray) -> Product:
    weights = expit(z) * expit(-z)
    return lambda a: weights * a


def _softmax_1(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    slopes = softmax(z, axis=1)
    slopes[np.arange(len(z)), y] -= 1
    return slopes


def _softmax_2(z: np.ndarray) -> Product:
    p = softmax(z, axis=1)
    return lambda a: p * (a - np.sum(p * a, axis=1, keepdims=True))


def _ridge_1(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    return z - y[:, None]


def _ridge_2(z: np.ndarray) -> Product:
    return lambda a: a


@dataclass(frozen=True)
class FunctionLoss:
    """Any loss of one record, `loss(w, x, y)`, twice differentiable by JAX.

    Attributes:
      function: the loss.
      shape: of w.
    """

    function: LossFunction
    shape: tuple[int, ...]
    proven_convex = False

    def gradient(self, w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Sum of gradients, `(p,)`."""
        return self._float64(_gradient, w, x, y)

    def gradients(self, w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Gradient of each record, `(n, p)`."""
        return self._float64(_gradients, w, x, y).reshape(len(x), w.size)

    def product(self, w: np.ndarray, x: np.ndarray, y: np.ndarray) -> Product:
        """What multiplies vectors `(p,)` by the sum of Hessians, without building it."""
        return lambda v: self._float64(_product, w, x, y, v[None])[0]

    def hessian(self, w: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Sum of Hessians, `(p, p)`."""
        return self._float64(_product, w, x, y, np.eye(w.size))

    def _float64(self, compiled: Any, w: np.ndarray, *arrays: np.ndarray) -> np.ndarray:
        with jax.enable_x64(True):
            return np.array(compiled(self.function, self.shape, w, *arrays))


def _total(f: LossFunction, shape: tuple[int, ...], w: Any, x: Any, y: Any) -> jax.Array:
    return jnp.sum(jax.vmap(f, (None, 0, 0))(w.reshape(shape), x, y))


# Records are arguments, never closed over: a compiled program keeps what it closes over.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradient(f: LossFunction, shape: tuple[int, ...], w: Any, x: Any, y: Any) -> jax.Array:
    return jax.grad(_total, 2)(f, shape, w, x, y)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(f: LossFunction, shape: tuple[int, ...], w: Any, x: Any, y: Any) -> jax.Array:
    return jax.vmap(jax.grad(f), (None, 0, 0))(w.reshape(shape), x, y)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _product(
    f: LossFunction, shape: tuple[int, ...], w: Any, x: Any, y: Any, vectors: Any
) -> jax.Array:
    gradient = functools.partial(jax.grad(_total, 2), f, shape)
    along = lambda v: jax.jvp(lambda w: gradient(w, x, y), (w,), (v,))[1]  # noqa: E731
    return lax.map(along, vectors, batch_size=min(32, len(vectors)))
