"""How far unlearned models are from retrained ones.

The measures compare ensembles: one statistic, say `membership.margins`, of the same N examples
under M models that unlearned them and under M that were retrained without them. With finitely many
models none reaches its ideal, even where unlearning is exact; so each stands beside its null value:
what one half of the retrained models gives against the other half.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike

from unlearn.findings import Finding
from unlearn.lira import check_ensembles, u_lira
from unlearn.membership import Estimate, auc


def klom(unlearned: ArrayLike, retrained: ArrayLike, *, bins: int = 20) -> np.ndarray:
    """KLoM, the KL divergence of margins, of each example (Georgiev et al. 2024, arXiv 2410.23232).

    KL(unlearned ‖ retrained) of histograms with equal bins from the lowest to the highest margin of
    both kinds, clipped to ±100, where a retrained bin holds at least 1e-5. So it is in the authors'
    code (github.com/RoyRin/data-unlearning-bench), with 20 bins and 100 models of each kind; the
    direction was not checked against the paper's text. There the highest margin falls out of the
    last bin, which holds it here.

    Args:
      unlearned: margins under the unlearned models, `(M, N)`, M at least 2.
      retrained: under the retrained models, `(M', N)`, M' at least 2.
      bins: at least 1.

    Returns:
      float64 `(N,)`, in nats, from 0 to about 11.5.

    Raises:
      ValueError: shapes don't fit, values aren't finite, or models or bins are too few.

    >>> klom([[0.0], [0.0], [0.0], [1.0]], [[0.0], [0.0], [1.0], [1.0]]).round(3)  # 3:1 from 1:1
    array([0.131])
    """
    from scipy import stats  # it takes longer to import than all else here

    ensembles = [np.clip(x, -100, 100) for x in check_ensembles(unlearned, retrained, 2)]
    if bins < 1:
        raise ValueError(f"bins must be at least 1, found {bins}")
    divergences = []
    for pair in zip(*(x.T for x in ensembles), strict=True):
        edges = np.histogram_bin_edges(np.concatenate(pair), bins)
        p, q = (np.histogram(x, edges)[0] / len(x) for x in pair)
        divergences.append(stats.entropy(p, np.maximum(q, 1e-5)))
    return np.asarray(divergences, np.float64)


def ks_forget_quality(unlearned: ArrayLike, retrained: ArrayLike) -> tuple[float, float]:
    """TOFU's forget quality, of two models: Kolmogorov and Smirnov's test (Maini et al. 2024).

    Args:
      unlearned: a statistic of each example under the unlearned model, `(N,)`; TOFU's is the truth
        ratio of each forgotten question.
      retrained: the same under the retrained model, `(N',)`.

    Returns:
      The distance of the distribution functions and log10 of its p-value, which is always finite.

    Raises:
      ValueError: an array is empty, of another rank or not finite.

    >>> ks_forget_quality([1.0, 2.0, 3.0], [1.5, 2.5, 3.5])  # p = 1
    (0.3333333333333333, 0.0)
    """
    from scipy import stats  # it takes longer to import than all else here

    x, y = np.asarray(unlearned, np.float64), np.asarray(retrained, np.float64)
    for values in (x, y):
        if values.ndim != 1 or not values.size or not np.isfinite(values).all():
            raise ValueError(f"a statistic must be finite, of shape (N,), found {values}")
    with warnings.catch_warnings():  # with ties the exact p can fail; the asymptotic one follows
        warnings.filterwarnings("ignore", "ks_2samp: Exact", RuntimeWarning)
        distance, p = map(float, stats.ks_2samp(x, y))
    # Below the least float, the first term of Kolmogorov's series: 2 exp(-2 D² nm / (n + m)).
    series = np.log(2) - 2 * distance**2 * len(x) * len(y) / (len(x) + len(y))
    return distance, float((np.log(p) if p > 0 else series) / np.log(10))


def epsilons(unlearned: ArrayLike, retrained: ArrayLike, *, delta: float = 1e-5) -> np.ndarray:
    """How well the best threshold tells an example's unlearned models from its retrained ones.

    The ε of the NeurIPS 2023 challenge (Triantafillou et al. 2024, arXiv 2406.09073), after its
    organisers' metric.py (github.com/google-deepmind/unlearning_evaluation); not checked against
    their technical report or the paper's text. It is the largest of
    max(log(1 - δ - FPR) - log FNR, log(1 - δ - FNR) - log FPR), over thresholds 0.01 apart for "the
    kind with the higher median is above" and, within 2 of the narrower kind's ends, for "the
    narrower kind is between". A threshold where one rate is 0 and the other isn't does not count;
    both at 0, or one kind less than 1 % as wide as the other, is the cap of 50.

    Thresholds are float64 here, float32 in part there. Where none counts, which stops their code,
    every value is tried as a threshold, and ε is 0 if still none counts.

    Args:
      unlearned: logit-scaled confidences, `(n, N)`, n at least 3; 512 in the challenge.
      retrained: the same, as many.
      delta: δ, from 0, below 1.

    Returns:
      float64 `(N,)`: from 0 to log(n - 1) or so, or 50.

    Raises:
      ValueError: as `klom`, or there are more models of one kind.
    """
    unlearned, retrained = check_ensembles(unlearned, retrained, 3)
    n = len(unlearned)
    if len(retrained) != n:
        raise ValueError(f"there must be as many of both kinds, found {n} and {len(retrained)}")
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be from 0 and below 1, found {delta}")
    rate = np.arange(n + 1) / n
    with np.errstate(divide="ignore", invalid="ignore"):
        one_way = np.log(1 - delta - rate)[:, None] - np.log(rate)
    table = np.maximum(np.fmax(one_way, one_way.T), 0)  # by false negatives and false positives
    table[0, :] = table[:, 0] = table[n, n] = -1  # doesn't count
    table[0, 0] = _CAP
    return np.array([_epsilon(*pair, table) for pair in zip(unlearned.T, retrained.T, strict=True)])


_CAP = 50.0


def _epsilon(unlearned: np.ndarray, retrained: np.ndarray, table: np.ndarray) -> float:
    n = len(unlearned)
    low, high = np.sort(unlearned), np.sort(retrained)
    if np.median(low) >= np.median(high):
        low, high = high, low
    narrow, wide = (low, high) if np.ptp(high) >= np.ptp(low) else (high, low)
    width = narrow[-1] - narrow[0]
    if width < 0.01 * (wide[-1] - wide[0]):
        return _CAP

    def above(thresholds: np.ndarray) -> float:
        missed, passed = (np.searchsorted(x, thresholds) for x in (high, low))
        return table[missed, n - passed].max(initial=-1)

    first, last = min(low[0], high[0]), max(low[-1], high[-1])
    one = above(np.linspace(first, last, int(np.ceil((last - first) * 100))))
    start, stop = narrow[0] + width - 2, narrow[-1] + 2
    right = np.linspace(start, stop, int(np.ceil((stop - start) * 100)))
    left = np.linspace(right - width - 2, right - width + 2, 400)
    caught, mistaken = (
        np.maximum(np.searchsorted(x, right, "right") - np.searchsorted(x, left), 0)
        for x in (narrow, wide)
    )
    best = max(one, table[n - caught, mistaken].max())
    return float(best if best >= 0 else max(above(np.concatenate([low, high])), 0))


def forgetting_quality(unlearned: ArrayLike, retrained: ArrayLike, *, delta: float = 1e-5) -> float:
    """The challenge's F: the mean over examples of 2^-k, ε in its k-th bin of 0.5, k from 0.

    Bins end at ⌈log(n - 1)⌉, which is 7 for 512 models; beyond, an example scores 0.

    Args and errors: as `epsilons`.

    Returns:
      From 0 to 1, higher for better forgetting. Exact unlearning is far from 1, for the best of so
      many thresholds finds chance: it has 0.11 to 0.21 for 16 to 512 models whose statistics are
      normal with a standard deviation of 0.1 to 5.
    """
    k = np.floor(2 * epsilons(unlearned, retrained, delta=delta))
    bins = 2 * np.ceil(np.log(len(np.asarray(unlearned)) - 1))
    return float(np.mean(np.where(k < bins, 2.0**-k, 0.0)))


def challenge_score(
    quality: float, *, retain: tuple[float, float], test: tuple[float, float]
) -> float:
    """The challenge's final score: F times RA_u / RA_r times TA_u / TA_r.

    After the organisers' main.py, where accuracies are means over the models and nothing is capped:
    better accuracy than retraining's can raise the score above 1.

    Args:
      quality: F.
      retain: accuracy on the retained records, of the unlearned and of the retrained models.
      test: accuracy on test records, of both.

    Raises:
      ValueError: F or an accuracy isn't from 0 to 1, or the retrained models' is 0.
    """
    for value in (quality, *retain, *test):
        if not 0 <= value <= 1:
            raise ValueError(f"F and accuracies must be from 0 to 1, found {value}")
    if not retain[1] or not test[1]:
        raise ValueError("the retrained models are never right, so there is no ratio to them")
    return quality * (retain[0] / retain[1]) * (test[0] / test[1])


def against_retraining(
    measure: Callable[[np.ndarray, np.ndarray], float],
    unlearned: ArrayLike,
    retrained: ArrayLike,
    *,
    splits: int = 10,
    seed: int = 0,
) -> tuple[Estimate, Estimate]:
    """A measure of unlearned against retrained models, and its null value, both of h models a side.

    The retrained models are divided into halves at random, and as many unlearned models drawn:
    measure(unlearned, one half) beside measure(other half, one half), as the size decides how large
    a measure is by chance alone.

    Args:
      measure: takes two arrays `(h, N)`, the retrained one last.
      unlearned: `(M, N)`.
      retrained: `(M', N)`; h is the lesser of M and M' / 2.
      splits: how many times, at least 1.
      seed: of the halves.

    Returns:
      Means over the splits, with the least and the greatest as interval.

    Raises:
      ValueError: as `klom`, or where the measure needs more models.
    """
    unlearned, retrained = check_ensembles(unlearned, retrained, 2)
    if splits < 1:
        raise ValueError(f"splits must be at least 1, found {splits}")
    rng, h = np.random.default_rng(seed), min(len(unlearned), len(retrained) // 2)
    values = []
    for _ in range(splits):
        order = rng.permutation(len(retrained))
        half, other = retrained[order[:h]], retrained[order[h : 2 * h]]
        drawn = unlearned[rng.permutation(len(unlearned))[:h]]
        values.append([measure(drawn, half), measure(other, half)])
    array = np.asarray(values, np.float64)
    lows, highs = array.min(axis=0), array.max(axis=0)
    means = np.clip(
        array.mean(axis=0), lows, highs
    )  # of equal values it may be off in the last bit
    ours, null = (Estimate(*map(float, x)) for x in zip(means, lows, highs, strict=True))
    return ours, null


def audit_ensembles(
    unlearned: ArrayLike, retrained: ArrayLike, *, splits: int = 10, seed: int = 0
) -> list[Finding]:
    """KLoM, U-LiRA, the KS test of single models and the challenge's F, each beside its null value.

    Args:
      unlearned: `membership.margins` of the forgotten records under unlearned models, `(M, N)`, M
        at least 4.
      retrained: the same under retrained models, `(M', N)`, M' at least 8.
      splits: as `against_retraining`.
      seed: as `against_retraining`.

    Raises:
      ValueError: as `klom` and `membership.u_lira`.
    """
    measures: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
        "klom": lambda u, r: float(klom(u, r).mean()),
        "u-lira auc": lambda u, r: auc(*(scores.ravel() for scores in u_lira(u, r))).value,
        "log10 ks p": lambda u, r: ks_forget_quality(u[0], r[0])[1],
        "forgetting quality": forgetting_quality,
    }
    return [
        Finding(name, *against_retraining(f, unlearned, retrained, splits=splits, seed=seed))
        for name, f in measures.items()
    ]
