"""Newton systems and minima of a regularised sum of convex losses, in float64."""

from __future__ import annotations

from typing import Literal

import numpy as np
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from scipy.sparse.linalg import LinearOperator, cg

from unlearn.convex import FunctionLoss, LinearLoss

Method = Literal["cholesky", "cg"]
METHODS: tuple[Method, ...] = ("cholesky", "cg")
_DENSE = (
    2048  # weights up to which a Hessian is built: 32 MiB, a factorisation in a tenth of a second
)
_FLAT = 1e-10  # curvature below this part of the Hessian's norm can't be told from zero


def choose_method(weights: int) -> Method:
    """Cholesky factors up to 2048 weights, conjugate gradients beyond."""
    return "cholesky" if weights <= _DENSE else "cg"


def solve(
    loss: LinearLoss | FunctionLoss,
    w: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    ridge: float,
    target: np.ndarray,
    *,
    method: Method | None = None,
    rtol: float = 1e-12,
) -> tuple[np.ndarray, np.ndarray]:
    """Solves (Σ ∇²ℓ_i(w) + ridge I) s = target.

    Args:
      loss: of a record.
      w: `(p,)`, where the Hessian is taken.
      x: `(n, ...)`.
      y: `(n,)`.
      ridge: above 0, the regulariser's part of the Hessian of the sum: nλ.
      target: `(p,)`.
      method: "cholesky" builds the Hessian, "cg" multiplies by it; None for `choose_method`.
      rtol: norm of what is left over, relative to the target's, at which "cg" stops.

    Returns:
      s, `(p,)`, and what is left over, target - (Σ ∇²ℓ_i + ridge I) s.

    Raises:
      ValueError: the method is unknown; the losses have negative curvature, so that they aren't
        convex (for "cg": along a direction that was tried); or the Hessian is so ill-conditioned
        that its system can't be solved.
    """
    method = choose_method(w.size) if method is None else method
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, found {method!r}")
    if method == "cholesky":
        hessian = loss.hessian(w, x, y)
        if not loss.proven_convex:
            lowest = float(np.linalg.eigvalsh(hessian)[0])
            _refuse_negative(lowest, np.linalg.norm(hessian))
        hessian.flat[:: w.size + 1] += ridge
        try:
            step = cho_solve(cho_factor(hessian, lower=True), target)
        except LinAlgError as error:
            raise ValueError(
                "the Hessian is singular in float64: scale the features down or raise lam"
            ) from error
        return step, target - hessian @ step
    product = loss.product(w, x, y)

    def multiply(v: np.ndarray) -> np.ndarray:
        bent = product(v)
        if not loss.proven_convex and v.any():
            length = np.linalg.norm(v)
            _refuse_negative(float(v @ bent) / length**2, np.linalg.norm(bent) / length)
        return bent + ridge * v

    operator = LinearOperator((w.size, w.size), matvec=multiply, dtype=np.float64)  # pyright: ignore[reportCallIssue]
    step, _ = cg(operator, target, rtol=rtol, maxiter=10 * w.size + 100)
    return step, target - multiply(step)


def _refuse_negative(curvature: float | np.floating, norm: float | np.floating) -> None:
    if curvature < -_FLAT * norm:
        raise ValueError(
            f"the loss must be convex: its Hessian, of norm {norm:.3g}, has the curvature "
            f"{curvature:.3g} along some direction"
        )


def minimise(
    loss: LinearLoss | FunctionLoss,
    w: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    lam: float,
    tolerance: float,
    *,
    linear: np.ndarray | float = 0.0,
    method: Method | None = None,
    steps: int = 200,
) -> tuple[np.ndarray, float]:
    """Minimises Σ ℓ_i(w) + nλ/2 ‖w‖² + linearᵀw by Newton's method.

    A step is halved until the gradient's norm falls, which every Newton direction makes it do, and
    which rounding disturbs less than the fall of a sum of losses close to its minimum.

    Args:
      loss: of a record.
      w: `(p,)`, where to start.
      x: `(n, ...)`.
      y: `(n,)`.
      lam: λ, above 0.
      tolerance: norm of the gradient of the sum at which to stop.
      linear: `(p,)`; the perturbation b of Guo et al. 2020.
      method: as for `solve`.
      steps: most Newton steps.

    Returns:
      w `(p,)` and the norm of the gradient there, at most `tolerance`.

    Raises:
      ValueError: the tolerance can't be met, or as for `solve`.
    """
    gradient = lambda w: loss.gradient(w, x, y) + len(x) * lam * w + linear  # noqa: E731
    g = gradient(w)
    norm = np.linalg.norm(g)
    for _ in range(steps):
        if norm <= tolerance:
            return w, float(norm)
        step, _ = solve(loss, w, x, y, len(x) * lam, -g, method=method, rtol=1e-3)
        size = 1.0
        while size > 1e-12:
            trial = w + size * step
            g = gradient(trial)
            if (trial_norm := np.linalg.norm(g)) <= (1 - size / 4) * norm:
                break
            size /= 2
        else:
            break
        w, norm = trial, trial_norm
    raise ValueError(
        f"no minimum to a gradient norm of {tolerance:.3g} was found, only to {norm:.3g}: scale "
        "the features down, raise lam, or allow a larger tolerance"
    )
