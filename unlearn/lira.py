"""Likelihood-ratio attacks, which model what a record does to models by having many of them."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import special


def lira(
    target: ArrayLike,
    shadow: ArrayLike,
    member: ArrayLike,
    *,
    variant: Literal["online", "offline"] = "online",
    variance: Literal["local", "global"] = "local",
) -> np.ndarray:
    """LiRA, the likelihood ratio attack of Carlini et al. 2022 (Algorithm 1).

    online: log N(x; μ_in, σ²_in) - log N(x; μ_out, σ²_out). offline, which needs no model that was
    trained on the example: -log Pr[Z > x], Z ~ N(μ_out, σ²_out), a monotone function of the paper's
    Pr[Z ≤ x] that does not saturate. Means are the paper's; its authors' code takes medians,
    and for the offline attack the two-sided density.

    Args:
      target: logit-scaled confidences of the attacked models, `(N,)` or `(K, N)`; see `margins`.
      shadow: those of the shadow models, `(M, N)`.
      member: bool `(M, N)`: whether the shadow model was trained on the example.
      variant: as above.
      variance: "local" for each example's own variances, "global" for those of the deviations of
        all examples together, better with few models. The authors' code adds to the latter how far
        examples are from one another, and uses σ_in for both.

    Returns:
      Scores of the shape of `target`, higher for a member.

    Raises:
      ValueError: shapes don't match, values aren't finite, an example has fewer than 2 models of a
        kind or no variance, or the variant is unknown.
    """
    target, shadow = np.asarray(target, np.float64), np.asarray(shadow, np.float64)
    member = np.asarray(member)
    if variant not in ("online", "offline") or variance not in ("local", "global"):
        raise ValueError(
            "variant must be 'online' or 'offline' and variance 'local' or 'global', "
            f"found {variant!r} and {variance!r}"
        )
    shapes_fit = member.shape == shadow.shape and target.shape[-1:] == shadow.shape[1:]
    if shadow.ndim != 2 or target.ndim not in (1, 2) or not shapes_fit or member.dtype != bool:
        raise ValueError(
            "target must be (N,) or (K, N), shadow (M, N) and member bool (M, N), found "
            f"{target.shape}, {shadow.shape} and {member.dtype} {member.shape}"
        )
    if not (np.isfinite(target).all() and np.isfinite(shadow).all()):
        raise ValueError("target and shadow must be finite")
    mean, deviation = _gaussians(shadow, ~member, variance, "without")
    z_out = (target - mean) / deviation
    if variant == "offline":
        return -special.log_ndtr(-z_out)
    mean, deviation_in = _gaussians(shadow, member, variance, "with")
    z_in = (target - mean) / deviation_in
    return (z_out**2 - z_in**2) / 2 + np.log(deviation / deviation_in)


def u_lira(
    unlearned: ArrayLike, retrained: ArrayLike, *, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """U-LiRA of Hayes et al. 2024 (arXiv 2403.01218): was this model unlearned, or retrained?

    For each example, Gaussians are fitted to one half of the models of each kind and score the
    other half by the log-likelihood ratio; then the halves change places. The paper's accuracy is
    the share of unlearned models above 0 and of retrained ones below; `auc` takes the scores too.

    Args:
      unlearned: logit-scaled confidences under the unlearned models, `(M, N)`, M at least 4.
      retrained: under the retrained models, `(M', N)`, M' at least 4.
      seed: of the halves.

    Returns:
      Scores `(M, N)` and `(M', N)`, higher for unlearned.

    Raises:
      ValueError: shapes don't fit, values aren't finite, there are too few models, or those of one
        kind agree exactly on an example.
    """
    rng = np.random.default_rng(seed)
    ensembles = check_ensembles(unlearned, retrained, 4)
    halves = [np.array_split(rng.permutation(len(x)), 2) for x in ensembles]
    scores = np.empty_like(ensembles[0]), np.empty_like(ensembles[1])
    for fit, judge in ((0, 1), (1, 0)):
        shadow = [x[half[fit]] for x, half in zip(ensembles, halves, strict=True)]
        member = np.zeros((len(shadow[0]) + len(shadow[1]), shadow[0].shape[1]), bool)
        member[: len(shadow[0])] = True
        for x, half, score in zip(ensembles, halves, scores, strict=True):
            score[half[judge]] = lira(x[half[judge]], np.concatenate(shadow), member)
    return scores


def check_ensembles(
    unlearned: ArrayLike, retrained: ArrayLike, needed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns statistics of both kinds of models as float64, `(M, N)` and `(M', N)`.

    Raises:
      ValueError: shapes don't fit, a value isn't finite, or fewer models than needed.
    """
    x, y = np.asarray(unlearned, np.float64), np.asarray(retrained, np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or not x.shape[1]:
        raise ValueError(
            "statistics must be (models, examples) of the same examples, found "
            f"unlearned {x.shape} and retrained {y.shape}"
        )
    if min(len(x), len(y)) < needed:
        raise ValueError(
            f"at least {needed} models of each kind are needed, found {len(x)} unlearned and "
            f"{len(y)} retrained"
        )
    for name, array in (("unlearned", x), ("retrained", y)):
        if not np.isfinite(array).all():
            raise ValueError(
                f"statistics must be finite, found {array[~np.isfinite(array)][0]} in {name}"
            )
    return x, y


def _gaussians(shadow: np.ndarray, mask: np.ndarray, variance: str, kind: str):
    """Means and standard deviations `(N,)` of the models in the mask, by maximum likelihood."""
    count = mask.sum(axis=0)
    if count.min(initial=2) < 2:
        raise ValueError(
            f"each example needs at least 2 models {kind} it, found {count.min()} for example "
            f"{np.argmin(count)}"
        )
    highest = np.max(shadow, axis=0, where=mask, initial=-np.inf)
    agree = highest == np.min(shadow, axis=0, where=mask, initial=np.inf)
    if agree.all() if variance == "global" else agree.any():
        raise ValueError(
            f"the models {kind} example {np.argmax(agree)} agree on it exactly, so there is no "
            "Gaussian to fit; take more models, or the global variance"
        )
    mean = np.sum(shadow, axis=0, where=mask) / count
    squares = np.sum((shadow - mean) ** 2, axis=0, where=mask)
    if variance == "global":
        return mean, np.sqrt(squares.sum() / count.sum())
    return mean, np.sqrt(squares / count)
