"""Removal by one Newton step and noise, for strongly convex losses.

Sekhari, Acharya, Kamath and Suresh 2021, "Remember what you want to forget", algorithms 1 and 2.
Where ŵ minimises the mean of f over n records, one Newton step on its mean over the n - m that
remain comes so close to the minimum there that noise of standard deviation σ hides the rest. That
σ must be the one of a model from which nothing was ever removed: otherwise the noise itself tells.
So it belongs to a `Mechanism`, fixed before any request, and `publish` adds it too.

σ is for the worst case, and falls as m²/(λ³n²): for the logistic loss of unit rows at λ = 1e-3 and
ε = 1, ten removals take a σ of 0.1 on each weight of a model of a million records, and of 100,000
on one of a thousand. There `unlearn.certified` keeps more accuracy. What is promised is of one
release, and of requests that do not depend on what was released before: whoever keeps an earlier
release still has it. Records removed later join those removed before, in one step from the same ŵ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import jax
import numpy as np
from numpy.typing import ArrayLike

from unlearn.convex import FunctionLoss, LinearLoss, LossFunction, LossName, linear_loss
from unlearn.gaussian import noise
from unlearn.records import as_mask, as_records
from unlearn.sensitivity import Constants, Variant, noise_scale
from unlearn.solvers import Method, minimise, solve


@dataclass(frozen=True)
class Mechanism:
    """What is fixed before any record is asked to be forgotten, and with it the noise.

    Attributes:
      loss: "logistic", "softmax" or "ridge", or a function `loss(w, x, y)` of one record, without
        the regulariser, that JAX differentiates twice.
      constants: λ, L and M of the loss with its regulariser.
      epsilon: ε, above 0.
      delta: δ, above 0, below 1.
      records: n, the least number of records that a model is fitted to before removals.
      removals: m, the most records that may be removed from it in all; n/2 at most.
      convex: your word that a loss given as a function is convex; the Hessian is checked only
        where it is used.
      tolerance: norm of the gradient of the mean of f at which a minimum is one; it is paid for in
        noise.
      variant: "paper", or "tight" for up to four times less noise; see `sensitivity`.
    """

    loss: LossName | LossFunction
    constants: Constants
    epsilon: float
    delta: float
    records: int
    removals: int
    convex: bool = False
    tolerance: float = 1e-10
    variant: Variant = "paper"

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range or the loss isn't declared convex."""
        if not callable(self.loss) and self.loss not in get_args(LossName):
            raise ValueError(
                f"loss must be a function or one of {', '.join(get_args(LossName))}, "
                f"found {self.loss!r}"
            )
        if callable(self.loss) and not self.convex:
            raise ValueError(
                "the loss must be convex: nothing is promised for others, neural networks among "
                "them. Where it is, declare it so: convex=True"
            )
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be above 0, found {self.tolerance}")
        _ = self.sigma  # refuses what is out of range

    @property
    def sigma(self) -> float:
        """Standard deviation of the noise on each weight, with removals and without."""
        return noise_scale(
            self.records,
            self.removals,
            self.constants,
            self.epsilon,
            self.delta,
            tolerance=self.tolerance,
            variant=self.variant,
        )


def fit(
    mechanism: Mechanism,
    w: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    *,
    method: Method | None = None,
) -> np.ndarray:
    """Minimises the mean of f, to the mechanism's tolerance.

    Args:
      mechanism: for its loss, λ and tolerance.
      w: where to start; `(d,)`, of softmax `(d, C)`, of a function what it takes.
      x: `(n, d)`; `(n, ...)` for a function. Append a column of ones for an intercept.
      y: `(n,)`.
      method: of Newton systems, as for `solvers.solve`.

    Returns:
      ŵ, float64, of the shape of `w`. It is not to be published as it is.

    Raises:
      ValueError: where an argument is wrong, or the tolerance can't be met.
    """
    loss, start, x, y = _prepare(mechanism, w, x, y)
    tolerance = mechanism.tolerance * len(x) / 2  # half, so that the sum may be rounded otherwise
    lam = mechanism.constants.lam
    return minimise(loss, start, x, y, lam, tolerance, method=method)[0].reshape(np.shape(w))


def newton_step(
    mechanism: Mechanism,
    w: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    removed: ArrayLike,
    *,
    method: Method | None = None,
) -> np.ndarray:
    """w̄ = ŵ + Ĥ⁻¹ Σ_U ∇f / (n - m), with Ĥ = (n ∇²F̂(ŵ) - Σ_U ∇²f) / (n - m).

    Ĥ is summed over the records that remain, which is the same without the cancellation.

    Args:
      mechanism: what is assumed.
      w: ŵ, the minimum over all of the records, removed ones included.
      x: as for `fit`, all of the records.
      y: likewise.
      removed: U; indices of rows, in any order, or bool `(n,)`. All that were removed since ŵ was
        fitted. May be empty.
      method: "cholesky" or "cg"; None for the cheaper.

    Returns:
      w̄, float64, of the shape of `w`. It is not to be published as it is.

    Raises:
      ValueError: an argument is wrong; or a condition of the theorem, which is named, isn't met:
        fewer records or more removals than the mechanism has, rows longer or gradients larger than
        its constants say, ŵ no minimum, a Hessian with negative curvature.
    """
    loss, w_hat, x, y = _prepare(mechanism, w, x, y)
    gone = as_mask(removed, len(x))
    m, given, tolerance = int(gone.sum()), mechanism.constants, mechanism.tolerance
    if m > mechanism.removals:
        raise ValueError(
            f"the mechanism's noise is for {mechanism.removals} removals of {mechanism.records} "
            f"records (at most n/2), found {m}"
        )
    if len(x) < mechanism.records - (0 if m else mechanism.removals):
        raise ValueError(
            f"the mechanism's noise is for {mechanism.records} records before removals, "
            f"found {len(x)}"
        )
    norm = np.linalg.norm(loss.gradient(w_hat, x, y) / len(x) + given.lam * w_hat)
    if not norm <= tolerance:
        raise ValueError(
            f"w must be the minimum: the gradient of the mean has the norm {norm:.3g}, more than "
            f"the tolerance of {tolerance:.3g}"
        )
    if not m:
        return w_hat.reshape(np.shape(w))
    slopes = loss.gradients(w_hat, x[gone], y[gone]) + given.lam * w_hat
    steepest = np.linalg.norm(slopes, axis=1).max()
    if steepest > given.lipschitz * (1 + 1e-9):
        raise ValueError(
            f"the loss must be L-Lipschitz with L = {given.lipschitz:.6g}: a removed record's "
            f"gradient has the norm {steepest:.6g}"
        )
    left = len(x) - m
    step, unsolved = solve(
        loss, w_hat, x[~gone], y[~gone], left * given.lam, slopes.sum(axis=0), method=method
    )
    if not np.linalg.norm(unsolved) <= tolerance * left:
        raise ValueError(
            f"the Newton system was solved to {np.linalg.norm(unsolved) / left:.3g} only, the "
            f"tolerance is {tolerance:.3g}: take method='cholesky', raise lam or the tolerance"
        )
    return (w_hat + step).reshape(np.shape(w))


def release(
    mechanism: Mechanism,
    w: ArrayLike,
    x: ArrayLike,
    y: ArrayLike,
    removed: ArrayLike,
    key: jax.Array,
    *,
    method: Method | None = None,
) -> np.ndarray:
    """Returns w̄ + N(0, σ²I), which may be published.

    Args: as of `newton_step`, and
      key: typed key of the noise; never the one of another release.
    """
    w_bar = newton_step(mechanism, w, x, y, removed, method=method)
    return w_bar + noise(key, w_bar.shape, mechanism.sigma)


def publish(
    mechanism: Mechanism, w: ArrayLike, x: ArrayLike, y: ArrayLike, key: jax.Array
) -> np.ndarray:
    """Returns ŵ + N(0, σ²I), the release of a model from which nothing was removed.

    That is also what a removal is compared with, so n - m records are enough here.

    Args: as of `release`.
    """
    return release(mechanism, w, x, y, (), key)


def _prepare(
    mechanism: Mechanism, w: ArrayLike, x: ArrayLike, y: ArrayLike
) -> tuple[LinearLoss | FunctionLoss, np.ndarray, np.ndarray, np.ndarray]:
    w = np.asarray(w, np.float64)
    if callable(mechanism.loss):
        loss = FunctionLoss(mechanism.loss, w.shape)
    else:
        if w.ndim != (2 if mechanism.loss == "softmax" else 1):
            raise ValueError(
                f"w must be (d,), of softmax (d, C); found {w.shape} for {mechanism.loss}"
            )
        loss = linear_loss(mechanism.loss, w.shape[1] if w.ndim == 2 else None)
    if not np.isfinite(w).all():
        raise ValueError("w must be finite")
    x, y = as_records(loss, x, y)
    if isinstance(loss, LinearLoss) and w.shape[0] != x.shape[1]:
        raise ValueError(f"w must have a row per feature, found {w.shape} for {x.shape[1]}")
    longest = np.linalg.norm(x.reshape(len(x), -1), axis=1).max()
    if longest > mechanism.constants.row_norm * (1 + 1e-9):
        raise ValueError(
            f"rows of features must have the norm {mechanism.constants.row_norm:.6g} at most, "
            f"as the constants assume; found {longest:.6g}"
        )
    return loss, w.ravel(), x, y
