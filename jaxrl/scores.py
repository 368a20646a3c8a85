"""Atari scores: human normalisation, published results, and intervals that respect few seeds.

The yardstick of the field is the median over games of the human-normalised score

    100 · (score − random) / (human − random)    [%]

(Mnih et al. 2015, https://doi.org/10.1038/nature14236). It ignores half of the games and has a
wide error with few seeds, so Agarwal et al. (2021, https://arxiv.org/abs/2108.13264) ask for the
interquartile mean with a stratified bootstrap interval beside it: `interval`. That is what rliable
computes; it isn't used here, because its dependency arch fails to import beside today's pandas.
All of this is NumPy on small arrays; nothing is read before the first call.
"""

from __future__ import annotations

import csv
import difflib
import functools
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

# Rainbow, and with it the paper on spectral normalisation, reports 57 games without these.
NOT_IN_PAPER = ("jamesbond", "riverraid", "up_n_down")
_FILES = {"classic": "published_noop_scores.csv", "modern": "dopamine_sticky_last5.csv"}
_REFERENCES = ("random", "human")
# Dopamine's names run together; these five are in no table of human scores to be told apart by.
_WITHOUT_HUMAN = ("air_raid", "carnival", "elevator_action", "journey_escape", "pooyan")


class Interval(NamedTuple):
    """A point estimate with its confidence interval."""

    point: float
    low: float
    high: float


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


def has_human(game: str) -> bool:
    """Whether a human score is published for a game, in any spelling; many games have none."""
    return _names().get(_key(game)) in games()


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


def iqm(scores: ArrayLike, axis: int | None = None) -> np.ndarray:
    """Interquartile mean: the mean without the lowest and the highest quarter.

    Of n values, ⌊n/4⌋ are dropped at either end (Agarwal et al. 2021, section 4.3).

    Args:
      scores: at least one value, all finite.
      axis: axis to reduce; all of them by default.
    """
    from scipy import stats

    # SciPy's annotation forgets that None is allowed.
    return np.asarray(stats.trim_mean(scores, 0.25, axis=axis))  # pyright: ignore[reportArgumentType]


def interval(
    scores: Sequence[ArrayLike],
    statistic: Literal["iqm", "median"] = "iqm",
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
      scores: normalised scores, `(runs,)` of each game; games may differ in their runs.
      statistic: "iqm" of all values, or "median" over games of the mean over runs.
      confidence: probability that the interval aims at.
      reps: bootstrap samples.
      seed: of the resampling.

    Returns:
      Numbers in the unit of `scores`.

    Raises:
      ValueError: an argument is out of range, or a score isn't finite.
    """
    games = [np.asarray(runs, np.float64) for runs in scores]
    if not games or any(runs.ndim != 1 or not runs.size for runs in games):
        shapes = [runs.shape for runs in games]
        raise ValueError(f"expected runs (runs,) of at least one game, got shapes {shapes}")
    if not all(np.isfinite(runs).all() for runs in games):
        raise ValueError("scores must be finite")
    if statistic not in ("iqm", "median"):
        raise ValueError(f"statistic must be 'iqm' or 'median', got {statistic!r}")
    if not 0.0 < confidence < 1.0:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")

    def reduce(samples: list[np.ndarray]) -> np.ndarray:
        """Of `(reps, runs)` of each game, `(reps,)`."""
        if statistic == "iqm":
            return iqm(np.concatenate(samples, axis=1), axis=1)
        return np.median([runs.mean(axis=1) for runs in samples], axis=0)

    rng = np.random.default_rng(seed)
    drawn = [runs[rng.integers(runs.size, size=(reps, runs.size))] for runs in games]
    tail = 50.0 * (1.0 - confidence)
    low, high = np.percentile(reduce(drawn), (tail, 100.0 - tail))
    return Interval(float(reduce([runs[None] for runs in games])[0]), float(low), float(high))


def finite_mean(values: ArrayLike, axis: int) -> np.ndarray:
    """Mean along an axis without what isn't finite; NaN where nothing is."""
    values = np.asarray(values, np.float64)
    known = np.isfinite(values)
    total = np.where(known, values, 0.0).sum(axis=axis)
    return np.where(known.any(axis=axis), total / np.maximum(known.sum(axis=axis), 1), np.nan)


def bootstrap(
    values: ArrayLike, *, confidence: float = 0.95, reps: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile bootstrap interval of the mean over seeds, at each point on its own.

    Args:
      values: `(seeds, ...)`; whole rows are resampled. NaNs are left out of the means.
      confidence: probability that the interval aims at.
      reps: bootstrap samples.
      seed: of the resampling.

    Returns:
      Lower and upper ends, `(...)`; NaN where no seed has a value.
    """
    values = np.asarray(values, np.float64)
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(values), size=(reps, len(values)))
    counts = np.stack([np.bincount(c, minlength=len(values)) for c in chosen]).astype(float)
    known = np.isfinite(values)
    flat = np.where(known, values, 0.0).reshape(len(values), -1)
    with np.errstate(invalid="ignore"):
        means = (counts @ flat) / (counts @ known.reshape(flat.shape).astype(float))
    empty = np.isnan(means).all(axis=0)
    tails = 50.0 * (1.0 - confidence) * np.array([1, -1]) + np.array([0, 100])
    low, high = np.nanpercentile(np.where(empty, 0.0, means), tails, axis=0)
    low, high = (np.where(empty, np.nan, x).reshape(values.shape[1:]) for x in (low, high))
    return low, high
