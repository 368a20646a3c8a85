"""Scores: published figures as oracle, SciPy for the statistics, closed forms for intervals."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxrl import scores


def test_median_of_published_rainbow_is_the_papers_figure():
    rainbow = scores.published("rainbow_2018")
    assert set(rainbow) == set(scores.paper_games())
    assert len(rainbow) == 54
    assert round(scores.median(rainbow), 2) == 227.05


def test_c51_has_all_57_games_and_its_published_median():
    c51 = scores.published("c51_2017")
    assert set(c51) == set(scores.games())
    assert len(c51) == 57
    assert round(scores.median(c51)) == 178  # Bellemare et al. 2017, figure 6


@pytest.mark.parametrize(
    "spelling",
    [
        "SpaceInvaders",
        "space_invaders",
        "ALE/SpaceInvaders-v5",
        "SpaceInvaders-v5",
        "spaceinvaders",
        "SpaceInvadersNoFrameskip-v4",
        "Space Invaders",
    ],
)
def test_spellings_of_one_game(spelling):
    assert scores.canonical_name(spelling) == "space_invaders"


def test_every_game_is_found_by_its_own_and_by_the_emulators_spelling():
    for game in scores.games():
        camel = "".join(word.capitalize() for word in game.split("_"))
        assert scores.canonical_name(game) == game
        assert scores.canonical_name(f"ALE/{camel}-v5") == game


def test_unknown_game_names_the_closest():
    with pytest.raises(ValueError, match="'Space_Invader'.*space_invaders"):
        scores.canonical_name("Space_Invader")
    with pytest.raises(ValueError, match="known: alien"):
        scores.canonical_name("12345")


def test_human_normalised_is_per_cent_and_keeps_shapes():
    random, human = scores.random_and_human("Pong")
    assert (random, human) == (-20.7, 14.6)
    values = scores.human_normalised("Pong-v5", [[random, human], [0.5 * (random + human), 21.0]])
    np.testing.assert_allclose(values, [[0, 100], [50, 100 * (21 + 20.7) / 35.3]])
    with pytest.raises(ValueError, match="no human score.*air_raid"):
        scores.human_normalised("AirRaid", 1.0)


def test_human_normalised_where_humans_score_below_zero():
    random, human = scores.random_and_human("skiing")
    assert random < human < 0
    assert scores.human_normalised("skiing", human) == pytest.approx(100)


def test_published_under_both_protocols():
    modern = scores.published("C51", protocol="modern")
    assert modern["alien"] == 2432.67
    assert {"bank_heist", "up_n_down", "air_raid"} <= set(modern)
    assert len(modern) == 60
    with pytest.raises(ValueError, match="'rainbow'.*rainbow_2018"):
        scores.published("rainbow")
    with pytest.raises(ValueError, match="human"):
        scores.published("human")
    with pytest.raises(ValueError, match="classic.*modern"):
        scores.published("C51", protocol="sticky")


def test_published_returns_a_copy():
    scores.published("rainbow_2018")["pong"] = 0.0
    assert scores.published("rainbow_2018")["pong"] != 0.0


def test_median_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no scores"):
        scores.median({})


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(0, 2**16))
def test_iqm_is_scipys_trimmed_mean(runs, games, seed):
    values = np.random.default_rng(seed).normal(size=(runs, games))
    np.testing.assert_allclose(scores.iqm(values), stats.trim_mean(values, 0.25, axis=None))
    np.testing.assert_allclose(scores.iqm(values, axis=0), stats.trim_mean(values, 0.25, axis=0))
    np.testing.assert_allclose(scores.iqm(values, axis=-1), stats.trim_mean(values, 0.25, axis=1))


def test_iqm_ignores_outliers():
    assert scores.iqm([0.0, 1.0, 2.0, 3.0]) == 1.5
    assert scores.iqm([-1e9, 1.0, 2.0, 1e9]) == 1.5


@pytest.mark.parametrize("statistic", ["iqm", "mean", "median"])
def test_interval_is_stratified(statistic):
    # Runs agree within each game and games differ by far: resampling runs alone changes nothing.
    matrix = np.tile([[1.0, 10.0, 100.0, 1000.0, 5.0]], (6, 1))
    point, low, high = scores.interval(matrix, statistic, reps=50)
    assert point == pytest.approx(low) == pytest.approx(high)


def test_mean_interval_against_the_normal_approximation():
    runs, games = 40, 25
    matrix = np.random.default_rng(1).normal(3.0, 2.0, (runs, games))
    point, low, high = scores.interval(matrix, "mean", confidence=0.9, reps=4000, seed=2)
    # The bootstrap variance of a stratified mean: within-game variances (1/n), over n and games².
    error = np.sqrt((matrix.var(axis=0) / runs).sum()) / games
    assert point == pytest.approx(matrix.mean())
    np.testing.assert_allclose([low, high], point + 1.6449 * error * np.array([-1, 1]), atol=0.004)


def test_median_statistic_is_over_games_of_means_over_runs():
    matrix = np.array([[0.0, 4.0, 9.0], [2.0, 6.0, 9.0]])
    assert scores.interval(matrix, "median", reps=10).point == 5.0


def test_iqm_interval_is_seeded_ordered_and_widens_with_confidence():
    matrix = np.random.default_rng(3).gamma(1.0, size=(5, 13))
    narrow, again = (scores.iqm_interval(matrix, confidence=0.5, reps=400) for _ in range(2))
    wide = scores.iqm_interval(matrix, confidence=0.99, reps=400)
    assert narrow == again
    assert wide.low < narrow.low < narrow.point < narrow.high < wide.high
    assert (
        scores.iqm_interval(matrix, reps=400, seed=1).low
        != scores.iqm_interval(matrix, reps=400, seed=2).low
    )


def test_one_run_gives_a_point():
    point, low, high = scores.iqm_interval(np.arange(7.0)[None], reps=20)
    assert point == low == high == 3.0


def test_band_resamples_whole_curves():
    # Two seeds, offset by a constant: every resample is the shape plus 0, 1/2 or 1.
    shape = np.linspace(0.0, 5.0, 11)
    point, low, high = scores.bootstrap_band(np.stack([shape, shape + 1.0]), reps=500)
    np.testing.assert_allclose(point, shape + 0.5)
    np.testing.assert_allclose(low, shape)
    np.testing.assert_allclose(high, shape + 1.0)


@pytest.mark.parametrize("statistic", ["iqm", "mean", "median"])
def test_band_contains_its_centre_at_every_point(statistic):
    curves = np.random.default_rng(4).normal(size=(7, 3)).cumsum(axis=1)
    point, low, high = scores.bootstrap_band(curves, statistic, reps=300)
    assert point.shape == low.shape == high.shape == (3,)
    assert np.all((low <= point) & (point <= high) & (low < high))


@pytest.mark.parametrize(
    ("values", "kwargs", "message"),
    [
        (np.ones(3), {}, r"\(runs, games\).*\(3,\)"),
        (np.ones((0, 3)), {}, r"\(0, 3\)"),
        ([[1.0, np.nan]], {}, "1 of 2 values"),
        (np.ones((2, 3)), {"confidence": 95}, "got 95"),
        (np.ones((2, 3)), {"reps": 0}, "reps"),
        (np.ones((2, 3)), {"statistic": "mode"}, "'mode'"),
    ],
)
def test_interval_says_what_is_wrong(values, kwargs, message):
    with pytest.raises(ValueError, match=message):
        scores.interval(values, **kwargs)


def test_performance_profile_counts_runs():
    matrix = np.array([[0.0, 1.0], [2.0, 3.0]])
    np.testing.assert_array_equal(
        scores.performance_profile(matrix, [-1.0, 0.0, 1.5, 3.0]), [1.0, 0.75, 0.5, 0.0]
    )


def test_probability_of_improvement_is_the_u_statistic():
    rng = np.random.default_rng(5)
    a, b = rng.integers(0, 5, (4, 6)), rng.integers(0, 5, (3, 6))
    u = [stats.mannwhitneyu(a[:, g], b[:, g]).statistic / 12 for g in range(6)]
    assert scores.probability_of_improvement(a, b) == pytest.approx(np.mean(u))
    with pytest.raises(ValueError, match=r"\(4, 6\) and \(3, 5\)"):
        scores.probability_of_improvement(a, b[:, :5])
