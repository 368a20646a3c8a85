"""Atari scores: human normalisation, published results, and intervals that respect few seeds.

The yardstick of the field is the median over games of the human-normalised score

    100 · (score − random) / (human − random)    [%]

(Mnih et al. 2015, https://doi.org/10.1038/nature14236). It ignores half of the games and has a
wide error with few seeds, so Agarwal et al. (2021, https://arxiv.org/abs/2108.13264) ask for the
interquartile mean with a stratified bootstrap interval beside it: `iqm_interval`. All of this is
NumPy on small arrays; nothing is read before the first call.
"""

from __future__ import annotations

import csv
import difflib
import functools
import importlib.resources
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# Rainbow, and with it the paper on spectral normalisation, reports 57 games without these.
NOT_IN_PAPER = ("jamesbond", "riverraid", "up_n_down")
_FILES = {"classic": "published_noop_scores.csv", "modern": "dopamine_sticky_last5.csv"}
_REFERENCES = ("random", "human")
# Dopamine's names run together; these five are in no table of human scores to be told apart by.
_WITHOUT_HUMAN = ("air_raid", "carnival", "elevator_action", "journey_escape", "pooyan")


class Interval(NamedTuple):
    """A point estimate with its confidence interval, all of one shape."""

    point: np.ndarray
    low: np.ndarray
    high: np.ndarray


def _key(game: str) -> str:
    """Drops what spellings of one game differ in: prefix, version, case, underscores."""
    name = re.sub(r"-v\d+$", "", game.strip().rsplit("/", 1)[-1])
    name = re.sub(r"(NoFrameskip|Deterministic)$", "", name)
    return re.sub(r"[^a-z0-9]", "", name.lower())


@functools.cache
def _table(protocol: str) -> dict[str, dict[str, float]]:
    """Returns {column: {game: score}} of one file, without the empty cells."""
    if protocol not in _FILES:
        raise ValueError(f"protocol must be one of {sorted(_FILES)}, got {protocol!r}")
    file = importlib.resources.files("jaxrl").joinpath("data", _FILES[protocol])
    rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
    columns = [column for column in rows[0] if column != "game"]
    spell = (lambda name: name) if protocol == "classic" else canonical_name
    return {c: {spell(row["game"]): float(row[c]) for row in rows if row[c]} for c in columns}


@functools.cache
def _names() -> dict[str, str]:
    return {_key(game): game for game in (*_table("classic")["human"], *_WITHOUT_HUMAN)}


def canonical_name(game: str) -> str:
    """Returns the one spelling used here, lower case with underscores: `space_invaders`.

    >>> canonical_name("ALE/SpaceInvaders-v5"), canonical_name("spaceinvaders")
    ('space_invaders', 'space_invaders')

    Args:
      game: any usual spelling: `SpaceInvaders`, `space_invaders`, `ALE/SpaceInvaders-v5`,
        envpool's `SpaceInvaders-v5`, Gym's `SpaceInvadersNoFrameskip-v4`.

    Raises:
      ValueError: unknown game; the message names the closest ones.
    """
    names = _names()
    if (key := _key(game)) in names:
        return names[key]
    close = [names[k] for k in difflib.get_close_matches(key, names, n=3, cutoff=0.5)]
    hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(names.values())}"
    raise ValueError(f"unknown Atari game {game!r}; {hint}")


def games() -> tuple[str, ...]:
    """The 57 games that have a human score."""
    return tuple(_table("classic")["human"])


def paper_games() -> tuple[str, ...]:
    """The paper's 54 games: the 57 without jamesbond, riverraid, up_n_down."""
    return tuple(game for game in games() if game not in NOT_IN_PAPER)


def random_and_human(game: str) -> tuple[float, float]:
    """Reference scores of a random player and of a human tester, in points of the game.

    Raises:
      ValueError: unknown game, or one without a human score.
    """
    name, table = canonical_name(game), _table("classic")
    if name not in table["human"]:
        raise ValueError(f"no human score is published for {name!r}, only for {', '.join(games())}")
    return table["random"][name], table["human"][name]


def human_normalised(game: str, score: ArrayLike) -> np.ndarray:
    """Human-normalised score in per cent: 0 is random play, 100 the human tester.

    Args:
      game: any spelling that `canonical_name` takes.
      score: unclipped returns of full games, any shape.

    Returns:
      float64, the shape of `score`.
    """
    random, human = random_and_human(game)
    return 100.0 * (np.asarray(score, np.float64) - random) / (human - random)


def algorithms(protocol: str = "classic") -> tuple[str, ...]:
    """Names that `published` takes under a protocol, "classic" or "modern"."""
    return tuple(name for name in _table(protocol) if name not in _REFERENCES)


def published(algorithm: str, protocol: str = "classic") -> dict[str, float]:
    """Published raw scores `{game: score}`; `jaxrl/data/README.md` says from where.

    Args:
      algorithm: a column, such as "rainbow_2018"; `algorithms(protocol)` lists them.
      protocol: "classic" (no-op starts) or "modern" (sticky actions, Dopamine's baselines).
    """
    if algorithm not in algorithms(protocol):
        raise ValueError(
            f"no published scores of {algorithm!r} under the {protocol} protocol; "
            f"there are {', '.join(algorithms(protocol))}"
        )
    return dict(_table(protocol)[algorithm])


def median(scores: Mapping[str, float]) -> float:
    """Median over games of the human-normalised score, in per cent.

    Args:
      scores: raw scores `{game: score}`; compare only medians over the same games.
    """
    if not scores:
        raise ValueError("no scores to take the median of")
    return float(np.median([human_normalised(game, score) for game, score in scores.items()]))


def iqm(scores: ArrayLike, axis: int | tuple[int, ...] | None = None) -> np.ndarray:
    """Interquartile mean: the mean without the lowest and the highest quarter.

    Of n values, ⌊n/4⌋ are dropped at either end (Agarwal et al. 2021, section 4.3).

    Args:
      scores: at least one value, all finite.
      axis: axes to reduce; all of them by default.
    """
    values = np.asarray(scores, np.float64)
    axes = range(values.ndim) if axis is None else np.atleast_1d(axis)
    axes = tuple(int(a) % values.ndim for a in axes)
    values = np.moveaxis(values, axes, range(-len(axes), 0))
    values = np.sort(values.reshape(*values.shape[: values.ndim - len(axes)], -1), axis=-1)
    n = values.shape[-1]
    return values[..., n // 4 : n - n // 4].mean(axis=-1)


def _median_of_games(scores: np.ndarray) -> np.ndarray:
    return np.median(scores.mean(axis=0))


_OVER_RUNS_AND_GAMES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "iqm": iqm,
    "mean": np.mean,
    "median": _median_of_games,
}
_OVER_SEEDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "iqm": functools.partial(iqm, axis=0),
    "mean": functools.partial(np.mean, axis=0),
    "median": functools.partial(np.median, axis=0),
}


def _percentiles(samples: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(samples, (tail, 100.0 - tail), axis=0)
    return low, high


def _checked(
    values: ArrayLike, axes: str, statistic: str, confidence: float, reps: int
) -> np.ndarray:
    """Returns `values` as a float64 matrix; raises ValueError where an argument makes no sense."""
    if statistic not in _OVER_SEEDS:
        raise ValueError(f"statistic must be one of {sorted(_OVER_SEEDS)}, got {statistic!r}")
    array = np.asarray(values, np.float64)
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"expected a non-empty array {axes}, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{(~np.isfinite(array)).sum()} of {array.size} values aren't finite")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if reps < 1:
        raise ValueError(f"reps must be at least 1, got {reps}")
    return array


def interval(
    scores: ArrayLike,
    statistic: str = "iqm",
    *,
    confidence: float = 0.95,
    reps: int = 2000,
    seed: int = 0,
) -> Interval:
    """Stratified bootstrap interval of a statistic over all runs and games.

    Runs are resampled with replacement within each game on its own, since games are fixed and
    only runs are random (Agarwal et al. 2021, section 4.1); the interval is made of percentiles.
    With one run per game there is nothing to resample and the interval is a point.

    Args:
      scores: normalised scores `(runs, games)`.
      statistic: "iqm" or "mean" of all values, or "median" over games of the mean over runs.
      confidence: probability that the interval aims at.
      reps: bootstrap samples.
      seed: of the resampling.

    Returns:
      Scalars in the unit of `scores`.
    """
    matrix = _checked(scores, "(runs, games)", statistic, confidence, reps)
    reduce = _OVER_RUNS_AND_GAMES[statistic]
    rng = np.random.default_rng(seed)
    runs, columns = matrix.shape[0], np.arange(matrix.shape[1])
    samples = np.empty(reps)
    for i in range(reps):  # one at a time: the memory of one sample, whatever `reps` is
        samples[i] = reduce(matrix[rng.integers(0, runs, matrix.shape), columns])
    return Interval(np.asarray(reduce(matrix)), *_percentiles(samples, confidence))


def iqm_interval(
    scores: ArrayLike, *, confidence: float = 0.95, reps: int = 2000, seed: int = 0
) -> Interval:
    """Interquartile mean of scores `(runs, games)` with its interval: see `interval`."""
    return interval(scores, "iqm", confidence=confidence, reps=reps, seed=seed)


def bootstrap_band(
    curves: ArrayLike,
    statistic: str = "mean",
    *,
    confidence: float = 0.95,
    reps: int = 2000,
    seed: int = 0,
) -> Interval:
    """Pointwise bootstrap band of learning curves; whole curves are resampled.

    Args:
      curves: `(seeds, points)`, one learning curve a row.
      statistic: "mean", "median" or "iqm", taken over the seeds.
      confidence: probability that the band aims at, at each point on its own.
      reps: bootstrap samples.
      seed: of the resampling.

    Returns:
      Arrays `(points,)` in the unit of `curves`.
    """
    matrix = _checked(curves, "(seeds, points)", statistic, confidence, reps)
    reduce = _OVER_SEEDS[statistic]
    rng = np.random.default_rng(seed)
    samples = np.empty((reps, matrix.shape[1]))
    for i in range(reps):
        samples[i] = reduce(matrix[rng.integers(0, len(matrix), len(matrix))])
    return Interval(reduce(matrix), *_percentiles(samples, confidence))


def performance_profile(scores: ArrayLike, thresholds: Sequence[float]) -> np.ndarray:
    """Fraction of runs `(runs, games)` above each threshold (Agarwal et al. 2021, section 4.2)."""
    values = np.asarray(scores, np.float64)
    return np.array([(values > threshold).mean() for threshold in thresholds])


def probability_of_improvement(ours: ArrayLike, theirs: ArrayLike) -> float:
    """Probability that a run of ours beats one of theirs on a random game; ties count half.

    Args:
      ours: scores `(runs, games)`.
      theirs: scores `(other runs, games)` of the same games in the same order.
    """
    a, b = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"expected (runs, games) over the same games, got {a.shape} and {b.shape}")
    wins = np.where(a[:, None] == b[None], 0.5, a[:, None] > b[None])
    return float(wins.mean())
