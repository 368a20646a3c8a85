"""Membership inference: can it be told from a model's outputs that a record was trained on?

An attack is a score for each example, higher for a member. How well it does is an `Estimate`, whose
interval is over examples: it says nothing of how much another training run would differ. All
arithmetic is float64 in NumPy.

A number alone says little of unlearning. Where the forgotten records are harder or easier than what
they are compared with, a model that never saw them is off 0.5 as well. So take the same number of a
retrained model too, and put both into a finding of `unlearn.audit`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import special


class Estimate(NamedTuple):
    """A number and the ends of its interval."""

    value: float
    low: float
    high: float


def auc(members: ArrayLike, nonmembers: ArrayLike, *, confidence: float = 0.95) -> Estimate:
    """The probability that a member scores higher than a non-member, ties counted half.

    The interval is Wilson's (1927) with min(m, n) trials, for an AUC A has at most the variance
    A(1 - A) / min(m, n) whatever the two distributions are (van Dantzig 1951; Birnbaum and Klose
    1957). Near 0.5 it is wider than need be, by 22 % for m = n and 73 % for m ≪ n; unlike
    DeLong's and a bootstrap's it keeps its width at 0 and 1.

    Args:
      members: scores `(m,)`, higher for a member.
      nonmembers: scores `(n,)`.
      confidence: of the interval, two-sided.

    Returns:
      The estimate, from 0 to 1; 0.5 where scores are no help.

    Raises:
      ValueError: scores are empty, of another rank or not finite, or confidence isn't in (0, 1).

    >>> auc([2.0, 3.0, 3.0], [1.0, 3.0]).value
    0.6666666666666666
    """
    members, nonmembers = _scores(members, "members"), _scores(nonmembers, "nonmembers")
    z = -special.ndtri(_tail(confidence))
    ordered = np.sort(nonmembers)
    wins = [np.searchsorted(ordered, members, side) for side in ("left", "right")]
    value = int(np.sum(wins)) / (2 * len(members) * len(nonmembers))
    trials = min(len(members), len(nonmembers))
    centre = value + z**2 / (2 * trials)
    half = z * np.sqrt(value * (1 - value) / trials + (z / (2 * trials)) ** 2)
    low, high = ((centre + sign * half) / (1 + z**2 / trials) for sign in (-1, 1))
    return Estimate(value, float(np.clip(low, 0, value)), float(np.clip(high, value, 1)))


def tpr_at_fpr(
    members: ArrayLike, nonmembers: ArrayLike, fpr: float, *, confidence: float = 0.95
) -> Estimate:
    """The share of members found where at most a share `fpr` of non-members is mistaken for them.

    Carlini et al. 2022, "Membership Inference Attacks From First Principles": an attack that is
    sure of a few members is worse for them than one that is right on average. The non-members
    alone fix the threshold, so the count of members above it is binomial and the interval Clopper
    and Pearson's (1934), exact for this threshold.

    Args:
      members: as `auc`.
      nonmembers: as `auc`; at least 1 / fpr of them, or no false positive at all would be allowed.
      fpr: the largest false positive rate, between 0 and 1.
      confidence: as `auc`.

    Returns:
      The estimate.

    Raises:
      ValueError: as `auc`, or there are too few non-members, or the rate isn't in (0, 1).

    >>> tpr_at_fpr([5.0, 6.0, 7.0, 1.0], [1.0, 2.0, 3.0, 6.0], 0.25).value
    0.75
    """
    members, nonmembers = _scores(members, "members"), _scores(nonmembers, "nonmembers")
    if not 0 < fpr < 1:
        raise ValueError(f"fpr must be between 0 and 1, found {fpr}")
    allowed = int(np.floor(fpr * len(nonmembers) + 1e-9))  # 0.29 * 100 falls short of 29
    if allowed == 0:
        raise ValueError(
            f"a false positive rate of {fpr} needs at least {int(np.ceil(1 / fpr - 1e-9))} "
            f"non-members, found {len(nonmembers)}"
        )
    threshold = np.sort(nonmembers)[len(nonmembers) - 1 - allowed]
    return _proportion(int(np.sum(members > threshold)), len(members), _tail(confidence))


def balanced_accuracy(
    members: ArrayLike, nonmembers: ArrayLike, *, seed: int = 0, confidence: float = 0.95
) -> Estimate:
    """The mean of both groups' accuracies at the threshold that was best on the other half.

    A threshold that is chosen on the scores it is judged by finds members where there are none: of
    20 and 20 scores from one distribution, it takes 0.59 on average for 0.5.

    Args:
      members: as `auc`, at least 2.
      nonmembers: as `auc`, at least 2.
      seed: of the division into halves, each group by itself.
      confidence: as `auc`; at least that, for the interval joins two exact ones.

    Returns:
      The estimate, from 0 to 1.

    Raises:
      ValueError: as `auc`, or there is only one score in a group.
    """
    rng = np.random.default_rng(seed)
    halves = []
    for name, scores in (("members", members), ("nonmembers", nonmembers)):
        scores = rng.permutation(_scores(scores, name))
        if len(scores) < 2:
            raise ValueError(f"{name} must be at least 2, one for each half, found 1")
        halves.append((np.sort(scores[: len(scores) // 2]), scores[len(scores) // 2 :]))
    (chosen, judged), (chosen_non, judged_non) = halves
    thresholds = np.append(np.unique(np.concatenate([chosen, chosen_non])), np.inf)
    missed = np.searchsorted(chosen, thresholds) / len(chosen)
    passed = np.searchsorted(chosen_non, thresholds) / len(chosen_non)
    threshold = thresholds[np.argmax(passed - missed)]
    tail = _tail(confidence) / 2  # Bonferroni: either interval may fail
    found = _proportion(int(np.sum(judged >= threshold)), len(judged), tail)
    spared = _proportion(int(np.sum(judged_non < threshold)), len(judged_non), tail)
    return Estimate(*((a + b) / 2 for a, b in zip(found, spared, strict=True)))


def loss_attack(
    member_losses: ArrayLike,
    nonmember_losses: ArrayLike,
    *,
    fprs: tuple[float, ...] = (0.001, 0.01),
    seed: int = 0,
    confidence: float = 0.95,
) -> dict[str, Estimate]:
    """All three of the attack that calls a record a member if its loss is below a threshold.

    Yeom et al. 2018, "Privacy Risk in Machine Learning", with one threshold for all records.

    Args:
      member_losses: `(m,)`: of the forgotten records, to audit unlearning.
      nonmember_losses: `(n,)`: of records that were never trained on.
      fprs: false positive rates; each needs 1 / fpr non-members.
      seed: as `balanced_accuracy`.
      confidence: of each interval.

    Returns:
      Estimates named "auc", "balanced accuracy" and "tpr at fpr 0.001", with each rate.

    Raises:
      ValueError: as those functions.
    """
    scores = (
        -_scores(member_losses, "member_losses"),
        -_scores(nonmember_losses, "nonmember_losses"),
    )
    return {
        "auc": auc(*scores, confidence=confidence),
        "balanced accuracy": balanced_accuracy(*scores, seed=seed, confidence=confidence),
        **{f"tpr at fpr {fpr:g}": tpr_at_fpr(*scores, fpr, confidence=confidence) for fpr in fprs},
    }


def margins(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """log(p / (1 - p)) of the label's probability: LiRA's logit-scaled confidence, KLoM's margin.

    As z_y - logsumexp of the other logits, which is exact where 1 - p would be 0 (Carlini et al.
    2022; Georgiev et al. 2024). Log-probabilities do as well as logits.

    Args:
      logits: float `(..., N, C)`, C at least 2.
      labels: int `(N,)`, from 0 to C - 1.

    Returns:
      float64 `(..., N)`.

    Raises:
      ValueError: shapes don't match, or a logit isn't finite, or a label is out of range.

    >>> margins([[0.0, 0.0], [3.0, 1.0]], [0, 1])
    array([ 0., -2.])
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim < 2 or logits.shape[-1] < 2 or labels.shape != logits.shape[-2:-1]:
        raise ValueError(
            f"logits must be (..., N, C) with C at least 2 and labels (N,), found {logits.shape} "
            f"and {labels.shape}"
        )
    if not np.isfinite(logits).all():
        raise ValueError("logits must be finite; take log-probabilities without leaving log space")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= logits.shape[-1]:
        raise ValueError(
            f"labels must be integers from 0 to {logits.shape[-1] - 1}, found {labels}"
        )
    own = np.arange(logits.shape[-1]) == labels[:, None]
    others = special.logsumexp(np.where(own, -np.inf, logits), axis=-1)
    return np.sum(np.where(own, logits, 0), axis=-1) - others


def _scores(scores: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(scores, np.float64)
    if array.ndim != 1 or not array.size or not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, of shape (n,) and at least 1, found {array}")
    return array


def _tail(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, found {confidence}")
    return (1 - confidence) / 2


def _proportion(count: int, total: int, tail: float) -> Estimate:
    """A binomial proportion, with the interval of Clopper and Pearson."""
    low = special.betaincinv(count, total - count + 1, tail) if count else 0.0
    high = special.betaincinv(count + 1, total - count, 1 - tail) if count < total else 1.0
    return Estimate(count / total, float(low), float(high))
