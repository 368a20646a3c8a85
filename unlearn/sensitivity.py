"""How far a Newton step may miss the retrained model, the noise that hides it, and what it costs.

Sekhari, Acharya, Kamath and Suresh 2021, "Remember what you want to forget". The loss of a record,
f(w, z) = loss(w, x, y) + λ/2 ‖w‖², is λ-strongly convex, L-Lipschitz where it was minimised, and
has an M-Lipschitz Hessian.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass
from typing import Literal

from unlearn.convex import LossName, linear_loss
from unlearn.gaussian import allowed_distance

Variant = Literal["paper", "tight"]


@dataclass(frozen=True)
class Constants:
    """What is assumed of f, the loss of one record with its regulariser.

    Attributes:
      lam: λ, the regulariser's weight; f is λ-strongly convex.
      lipschitz: L, a bound on ‖∇f‖ at the minimum, of any record.
      hessian_lipschitz: M, a Lipschitz constant of ∇²f.
      row_norm: the bound on ‖x‖ under which L and M hold; infinite if there is none.
    """

    lam: float
    lipschitz: float
    hessian_lipschitz: float
    row_norm: float = math.inf

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        if not 0 < self.lam < math.inf:
            raise ValueError(f"the loss must be strongly convex: lam above 0, found {self.lam}")
        for name in ("lipschitz", "hessian_lipschitz"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be finite and >= 0, found {getattr(self, name)}")
        if not self.row_norm > 0:
            raise ValueError(f"row_norm must be above 0, found {self.row_norm}")


def constants(
    loss: LossName,
    lam: float,
    row_norm: float,
    *,
    classes: int | None = None,
    target: float | None = None,
) -> Constants:
    """Derives L and M of a built-in loss from a bound on the features.

    At the minimum λ‖ŵ‖ ≤ a R, and λ/2 ‖ŵ‖² ≤ ℓ(0), where R bounds rows and a slopes. So
    L = a R + min(a R, √(2 λ ℓ(0))), and M = γ R³; a, γ and ℓ(0) are in `convex.linear_loss`. For
    ridge ‖ŵ‖ ≤ Y / (2√λ) where Y bounds the targets, L = R (R ‖ŵ‖ + Y) + λ ‖ŵ‖ and M = 0.

    Args:
      loss: "logistic", "softmax" or "ridge".
      lam: λ, above 0.
      row_norm: R, a bound on the norm of any row of features, also of records yet to come. A bound
        read off the data depends on the records that will be forgotten.
      classes: C, of "softmax".
      target: Y, a bound on |y|, of "ridge".

    Raises:
      ValueError: where an argument is out of range, lacking, or of another loss.

    >>> constants("logistic", 0.01, 1.0).hessian_lipschitz == 1 / (6 * 3**0.5)
    True
    """
    family = linear_loss(loss, classes)
    if (loss == "ridge") != (target is not None) or not (target is None or target >= 0):
        raise ValueError(f"target must be a bound >= 0 for ridge, else None; found {target}")
    Constants(lam, 0.0, 0.0, row_norm)  # refuses what is out of range
    if target is not None:
        radius = target / (2 * math.sqrt(lam))
        return Constants(lam, row_norm * (row_norm * radius + target) + lam * radius, 0.0, row_norm)
    slope = family.slope * row_norm
    lipschitz = slope + min(slope, math.sqrt(2 * lam * family.at_zero))
    return Constants(lam, lipschitz, family.twist * row_norm**3, row_norm)


def sensitivity(
    n: int, m: int, given: Constants, *, tolerance: float = 0.0, variant: Variant = "paper"
) -> float:
    """γ: how far the Newton step's result may be from the minimum over the records that remain.

    The step starts at most (mL + nτ) / (λ(n - m)) from there, and leaves M/(2λ) times the square:
    "tight". The paper's 2ML²m²/(λ³n²) has n/2 for n - m. Solvers that stop at a gradient norm of τ
    add (n/(n - m) + 2) τ/λ: ŵ's, that of the linear system, and that of the model compared with.

    Args:
      n: records of ŵ.
      m: of those, how many are removed; n/2 at most.
      given: λ, L and M.
      tolerance: τ, of the mean of f.
      variant: "paper" or "tight".

    Raises:
      ValueError: where m is out of range or the variant is unknown.

    2 · 0.25 · 2² · 10² / (0.5³ · 100²):

    >>> round(sensitivity(100, 10, Constants(0.5, 2.0, 0.25)), 9)
    0.16
    """
    if variant not in ("paper", "tight"):
        raise ValueError(f"variant must be 'paper' or 'tight', found {variant!r}")
    if not 0 <= m <= n / 2:
        raise ValueError(f"m, removed records, must be from 0 to n/2 = {n / 2:g}, found {m}")
    if not n:
        raise ValueError("n, records, must be above 0")
    remaining = n / 2 if variant == "paper" else n - m
    start = (m * given.lipschitz + n * tolerance) / (given.lam * remaining)
    unsolved = (n / (n - m) + 2) * tolerance / given.lam
    return given.hessian_lipschitz / (2 * given.lam) * start**2 + unsolved


def noise_scale(
    n: int,
    m: int,
    given: Constants,
    epsilon: float,
    delta: float,
    *,
    tolerance: float = 0.0,
    variant: Variant = "paper",
) -> float:
    """σ = (γ/ε) √(2 ln(1.25/δ)), or more where that falls short of (ε, δ).

    Args: as of `sensitivity`, and
      epsilon: ε, above 0. See `gaussian` for those above 4.
      delta: δ, above 0, below 1.

    Raises:
      ValueError: where an argument is out of range.
    """
    gamma = sensitivity(n, m, given, tolerance=tolerance, variant=variant)
    return gamma / allowed_distance(epsilon, delta, 1.25)


def excess_risk(
    n: int,
    m: int,
    weights: int,
    given: Constants,
    epsilon: float,
    delta: float,
    *,
    variant: Variant = "paper",
) -> float:
    """Bounds how much more the released model loses on new records than the best one, on average.

    The terms of theorem 3, with their constants: 4L²/(λn) for having n records only
    (Shalev-Shwartz et al. 2009), mL²/(λ(n - m)) for the step and L σ √d for the noise.

    Args: as of `noise_scale`, and
      weights: d, the length of w.
    """
    lam, slope = given.lam, given.lipschitz
    sigma = noise_scale(n, m, given, epsilon, delta, variant=variant)
    learning, step = 4 * slope**2 / (lam * n), m * slope**2 / (lam * (n - m))
    return learning + step + slope * sigma * math.sqrt(weights)


def deletion_capacity(
    n: int,
    weights: int,
    given: Constants,
    epsilon: float,
    delta: float,
    *,
    excess: float = 0.01,
    variant: Variant = "paper",
) -> int:
    """The most records, n/2 at most, whose removal keeps `excess_risk` within a limit.

    Definition 3 of the paper. Where noise is what costs, it is n √ε / (d ln(1.25/δ))^¼ times
    √(excess λ³ / (2√2 M L³)); removal by differential privacy gets n / √d, in its dependence on d.

    Args: as of `excess_risk`, and
      excess: the limit; the paper's is 0.01.

    Returns:
      m; 0 also where n records are too few to learn from.
    """
    risk = lambda m: excess_risk(n, m, weights, given, epsilon, delta, variant=variant)  # noqa: E731
    return max(bisect.bisect_right(range(n // 2 + 1), excess, key=risk) - 1, 0)
