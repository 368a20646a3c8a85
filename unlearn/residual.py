"""Upper bounds on what a Newton step leaves of the gradient, with all that rounding may hide."""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import eigvalsh

from unlearn.convex import LinearLoss

_ULP = float(np.finfo(np.float64).eps)
_LARGEST_GRAM = 4096  # beyond, the Frobenius norm stands in for the spectral one


def spectral_norm_bound(x: np.ndarray) -> float:
    """Bounds ‖X‖₂ from above, tightly unless both axes have more than 4096.

    The largest eigenvalue of the smaller Gram matrix and what rounding may have taken from it, or
    the Frobenius norm where that is less. Power iteration, as in the authors' code, would come
    close from below: no bound.

    Args:
      x: float64 `(n, d)`.

    >>> spectral_norm_bound(np.array([[3.0, 0.0], [0.0, 4.0], [0.0, 0.0]])) - 4 < 1e-12
    True
    """
    n, d = x.shape
    squares = float(np.sum(np.square(x)))
    rounding = 4 * (n + d) * _ULP * squares
    if min(n, d) > _LARGEST_GRAM:
        return math.sqrt(squares + rounding)
    gram = x.T @ x if d < n else x @ x.T
    top = float(eigvalsh(gram, subset_by_index=[len(gram) - 1, len(gram) - 1])[0])
    return math.sqrt(min(squares, max(top, 0.0)) + rounding)


def gradient_rounding(
    loss: LinearLoss,
    w: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    lam: float,
    linear: np.ndarray | float = 0.0,
) -> float:
    """Bounds the rounding error of a computed Σ ∇ℓ_i(w) + nλw + linear.

    n + p ulps of the sum of the terms' norms, those of a prediction's terms included (Higham 2002,
    section 3.1).

    Args:
      loss: of a record.
      w: `(p,)`.
      x: `(n, d)`.
      y: `(n,)`.
      lam: λ.
      linear: `(p,)`, or zero.
    """
    terms = loss.scale(w, x, y) + len(x) * lam * np.linalg.norm(w) + np.linalg.norm(linear)
    return float((len(x) + w.size) * _ULP * terms)


def after_removal(
    loss: LinearLoss,
    w: np.ndarray,
    step: np.ndarray,
    unsolved: np.ndarray,
    x: np.ndarray,
    lam: float,
    norm: float,
) -> float:
    """Bounds what a Newton step adds to the norm of the gradient.

    With r the gradient before, Δ that of the removed records, H the Hessian of the others and H̄ its
    mean along the step s, the gradient after is r - Δ + H̄s = r + (H̄ - H)s - (Δ - Hs). The first
    new term is `loss.remainder`; the second, which is what the solver left, was measured.

    Args:
      loss: of a record.
      w: `(p,)`, before the step.
      step: s, `(p,)`.
      unsolved: Δ - Hs, `(p,)`, as computed from Δ as computed.
      x: `(n, d)`, of the records that remain.
      lam: λ.
      norm: bound on ‖X‖₂, that of more records included.
    """
    squares = float(np.sum(np.square(x))) * (1 + x.size * _ULP)
    norm = min(norm, math.sqrt(squares))
    size, ridge, length = len(x) + w.size, len(x) * lam, float(np.linalg.norm(step))
    of_product = size * (loss.curvature * squares + ridge) * length  # H s
    of_sum = (loss.curvature * norm**2 + ridge) * float(np.linalg.norm(w + step))  # w + s
    left_over = float(np.linalg.norm(unsolved))
    return loss.remainder(step, x, norm) + left_over + _ULP * (of_product + of_sum)
