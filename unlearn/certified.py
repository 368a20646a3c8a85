"""Certified removal: noise in the objective, a Newton step a removal, a budget for what it leaves.

Guo, Goldstein, Hannun and van der Maaten 2020, "Certified data removal from machine learning
models". The weights minimise (1/n) Σ ℓ(Wᵀx_i, y_i) + λ/2 ‖w‖² + bᵀw/n with b ~ N(0, σ²I). All
gradients here are of n times that. A removal leaves a gradient r ≠ 0, as if b had been b - r; so
the weights are those of a retraining up to (ε, δ) as long as ‖r‖ stays within the budget
σε / √(2 ln(1.5/δ)), theorem 3. A bound on ‖r‖ is kept, with what solvers and rounding left over;
where it would pass the budget, the model is fitted again, with a new b.

Arithmetic is float64 in NumPy. A state holds the records that remain, b, and no others; publish its
weights alone. What is promised is of the last weights, to whoever has none from before. Like the
paper, it takes r and the choice to retrain as given, though both depend a little on b.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace

import jax
import numpy as np
from numpy.typing import ArrayLike

from unlearn.convex import LossName, linear_loss
from unlearn.gaussian import allowed_distance, noise
from unlearn.records import as_ids, as_records, which
from unlearn.residual import after_removal, gradient_rounding, spectral_norm_bound
from unlearn.solvers import Method, minimise, solve


def residual_budget(sigma: float, epsilon: float, delta: float) -> float:
    """σε / √(2 ln(1.5/δ)), or less where that is too much for (ε, δ); see `unlearn.gaussian`.

    >>> round(residual_budget(10.0, 1.0, 1e-4), 4), round(10 / (2 * math.log(1.5e4)) ** 0.5, 4)
    (2.2803, 2.2803)
    """
    return sigma * allowed_distance(epsilon, delta, 1.5)


@dataclass(frozen=True)
class Mechanism:
    """What is promised, and for which objective.

    Attributes:
      loss: "logistic" with labels -1 and 1, "softmax" with 0 to classes - 1, or "ridge".
      lam: λ, above 0; per record, so that the sum has nλ/2 ‖w‖².
      sigma: σ, standard deviation of b on each weight, in units of a gradient of the sum.
      epsilon: ε, above 0.
      delta: δ, above 0, below 1.
      classes: C, of softmax.
      tolerance: part of the budget at which solvers stop. It is set aside for the retraining that
        the weights are compared with, which isn't exact either.
    """

    loss: LossName
    lam: float
    sigma: float
    epsilon: float
    delta: float
    classes: int | None = None
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        linear_loss(self.loss, self.classes)
        for name in ("lam", "sigma"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, found {getattr(self, name)}")
        if not 0 < self.tolerance < 0.5:
            raise ValueError(f"tolerance must be between 0 and 0.5, found {self.tolerance}")
        _ = self.budget  # refuses ε and δ that are out of range

    @property
    def budget(self) -> float:
        """What the norm of the gradient that removals leave may not exceed."""
        return residual_budget(self.sigma, self.epsilon, self.delta) - self.reserve

    @property
    def reserve(self) -> float:
        """What the norm of the gradient that a fit leaves does not exceed."""
        return self.tolerance * residual_budget(self.sigma, self.epsilon, self.delta)


@dataclass(frozen=True)
class State:
    """A model and all that its next removal needs; arrays alone. Secret, but for `w`.

    Attributes:
      w: float64 `(d,)`, of softmax `(d, C)`.
      b: of the shape of w, the perturbation of the objective.
      x: float64 `(n, d)`, features of the records that remain.
      y: `(n,)`, their targets.
      ids: `(n,)`, their names.
      norm: `()`, bound on ‖X‖₂; of all the records fitted to, so of fewer too.
      residual: `()`, bound on the norm of the objective's gradient at w.
      lam: `()`, λ.
      sigma: `()`, σ.
    """

    w: np.ndarray
    b: np.ndarray
    x: np.ndarray
    y: np.ndarray
    ids: np.ndarray
    norm: np.ndarray
    residual: np.ndarray
    lam: np.ndarray
    sigma: np.ndarray


@dataclass(frozen=True)
class Removal:
    """What a request came to.

    Attributes:
      state: of the records that remain.
      retrained: whether the model was fitted again, for want of budget.
      residual: the bound on the gradient's norm that the Newton step had, or would have had.
    """

    state: State
    retrained: bool
    residual: float


def fit(
    mechanism: Mechanism,
    x: ArrayLike,
    y: ArrayLike,
    key: jax.Array,
    *,
    ids: ArrayLike | None = None,
    method: Method | None = None,
) -> State:
    """Minimises the perturbed objective.

    Args:
      mechanism: what is promised.
      x: `(n, d)`. Append a column of ones for an intercept.
      y: `(n,)`.
      key: typed key of b; it must stay as secret as b, and serve once.
      ids: `(n,)`, integers or strings, each once; None for 0 to n - 1.
      method: of Newton systems, "cholesky" or "cg"; None for the cheaper.

    Raises:
      ValueError: where an argument is wrong, or the tolerance can't be met in float64.
    """
    loss = linear_loss(mechanism.loss, mechanism.classes)
    x, y = as_records(loss, x, y)
    ids = as_ids(ids, len(x))
    shape = (x.shape[1], loss.outputs) if mechanism.loss == "softmax" else (x.shape[1],)
    b = noise(key, shape, mechanism.sigma)
    start, lam, linear = np.zeros(b.size), mechanism.lam, b.ravel()
    enough = mechanism.reserve / 2  # the other half is for rounding
    w, residual = minimise(loss, start, x, y, lam, enough, linear=linear, method=method)
    residual += gradient_rounding(loss, w, x, y, lam, linear)
    if residual > mechanism.reserve:
        raise ValueError(
            f"float64 can't tell that the gradient is within {mechanism.reserve:.3g}, only "
            f"{residual:.3g}: scale the features down, or raise sigma or the tolerance"
        )
    numbers = (spectral_norm_bound(x), residual, lam, mechanism.sigma)
    return State(w.reshape(shape), b, x, y, ids, *map(np.asarray, numbers))


def remove(
    mechanism: Mechanism,
    state: State,
    ids: ArrayLike,
    key: jax.Array,
    *,
    method: Method | None = None,
) -> Removal:
    """Removes records by a Newton step, or by fitting again where the budget would not allow it.

    Args:
      mechanism: as `state` was fitted with.
      state: before; it is left as it is, and holds the removed records until it is let go.
      ids: names of one record or many, in any order, repeated or not. Many at once cost less time
        than one after the other, and more of the budget.
      key: typed key of the new b, in case the model is fitted again; a new one per call.
      method: as for `fit`.

    Raises:
      ValueError: an id is of no record in the state, no record would remain, or the mechanism
        has another λ or σ than the state.
    """
    for name in ("lam", "sigma"):
        if getattr(state, name) != getattr(mechanism, name):
            raise ValueError(
                f"the state was fitted with {name} = {getattr(state, name)}, the mechanism has "
                f"{getattr(mechanism, name)}"
            )
    gone = which(state.ids, ids)
    if gone.all():
        raise ValueError(f"no record would remain of {len(gone)}")
    if not gone.any():
        return Removal(state, False, float(state.residual))
    loss, lam, w = linear_loss(mechanism.loss, mechanism.classes), mechanism.lam, state.w.ravel()
    x, y = state.x[~gone], state.y[~gone]
    x_gone, y_gone = state.x[gone], state.y[gone]
    target = loss.gradient(w, x_gone, y_gone) + len(x_gone) * lam * w
    step, unsolved = solve(loss, w, x, y, len(x) * lam, target, method=method)
    residual = (
        float(state.residual)
        + gradient_rounding(loss, w, x_gone, y_gone, lam)
        + after_removal(loss, w, step, unsolved, x, lam, float(state.norm))
    )
    if not residual <= mechanism.budget:
        again = fit(mechanism, x, y, key, ids=state.ids[~gone], method=method)
        return Removal(again, True, residual)
    after = replace(
        state,
        w=(w + step).reshape(state.w.shape),
        x=x,
        y=y,
        ids=state.ids[~gone],
        residual=np.asarray(residual),
    )
    return Removal(after, False, residual)


def gradient_norm(mechanism: Mechanism, state: State) -> float:
    """The norm of the objective's gradient at the state's weights: what `residual` bounds.

    For audits; up to rounding.
    """
    loss = linear_loss(mechanism.loss, mechanism.classes)
    w = state.w.ravel()
    gradient = loss.gradient(w, state.x, state.y) + len(state.x) * mechanism.lam * w
    return float(np.linalg.norm(gradient + state.b.ravel()))


def save(path: str | os.PathLike[str], state: State) -> None:
    """Writes a state as `.npz`, without pickle."""
    np.savez(path, **vars(state))


def load(path: str | os.PathLike[str]) -> State:
    """Reads a state that `save` wrote."""
    with np.load(path, allow_pickle=False) as arrays:
        return State(**arrays)
