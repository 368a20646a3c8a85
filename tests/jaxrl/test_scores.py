"""Scores: published figures as oracle, brute force and closed forms for the statistics."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
@given(st.integers(1, 63), st.integers(0, 2**16))
def test_iqm_drops_a_quarter_at_either_end(count, seed):
    values = np.random.default_rng(seed).normal(size=count)
    cut = count // 4
    expected = sum(sorted(values.tolist())[cut : count - cut]) / (count - 2 * cut)
    np.testing.assert_allclose(scores.iqm(values), expected)


def test_iqm_ignores_outliers():
    assert scores.iqm([0.0, 1.0, 2.0, 3.0]) == 1.5
    assert scores.iqm([-1e9, 1.0, 2.0, 1e9]) == 1.5


@pytest.mark.parametrize("statistic", ["iqm", "median"])
def test_interval_is_stratified(statistic):
    # Runs agree within each game and games differ by far: resampling runs alone changes nothing.
    games = [np.full(runs, value) for runs, value in ((6, 1.0), (2, 10.0), (6, 100.0), (1, 5.0))]
    point, low, high = scores.interval(games, statistic, reps=50)
    assert point == pytest.approx(low) == pytest.approx(high)


def test_interval_against_the_normal_approximation():
    runs, games = 40, 3
    matrix = np.random.default_rng(1).normal([[0.0], [3.0], [9.0]], 2.0, (games, runs))
    point, low, high = scores.interval(matrix, "median", confidence=0.9, reps=20_000, seed=2)
    # The middle game's mean stays the median, so the interval is that of its mean alone.
    error = matrix[1].std() / np.sqrt(runs)
    assert point == pytest.approx(matrix[1].mean())
    np.testing.assert_allclose([low, high], point + 1.6449 * error * np.array([-1, 1]), atol=0.02)


def test_median_statistic_is_over_games_of_means_over_runs():
    assert scores.interval([[0.0, 2.0], [4.0, 6.0], [9.0]], "median", reps=10).point == 5.0


def test_interval_is_seeded_ordered_and_widens_with_confidence():
    games = np.random.default_rng(3).gamma(1.0, size=(13, 5))
    narrow, again = (scores.interval(games, confidence=0.5, reps=400) for _ in range(2))
    wide = scores.interval(games, confidence=0.99, reps=400)
    assert narrow == again
    assert wide.low < narrow.low < narrow.point < narrow.high < wide.high
    other = scores.interval(games, confidence=0.5, reps=400, seed=1)
    assert other.point == narrow.point and other.low != narrow.low


@pytest.mark.parametrize(
    ("values", "kwargs", "message"),
    [
        ([], {}, r"at least one game, got shapes \[\]"),
        ([[1.0], []], {}, r"\(0,\)"),
        (np.ones((2, 3, 1)), {}, r"\(3, 1\)"),
        ([[1.0, np.nan]], {}, "finite"),
        (np.ones((2, 3)), {"confidence": 95}, "got 95"),
        (np.ones((2, 3)), {"statistic": "mode"}, "'mode'"),
    ],
)
def test_interval_says_what_is_wrong(values, kwargs, message):
    with pytest.raises(ValueError, match=message):
        scores.interval(values, **kwargs)


def test_the_mean_of_what_is_finite():
    values = [[1.0, np.nan, np.nan], [3.0, 4.0, np.inf]]
    np.testing.assert_array_equal(scores.finite_mean(values, axis=0), [2.0, 4.0, np.nan])
    np.testing.assert_array_equal(scores.finite_mean(values, axis=1), [1.0, 3.5])


def test_bootstrap():
    values = np.random.default_rng(0).normal(size=(25, 7))
    low, high = scores.bootstrap(values)
    error = values.std(axis=0, ddof=1) / 5
    np.testing.assert_allclose(high - low, 2 * 1.96 * error, rtol=0.2)
    assert ((low < values.mean(axis=0)) & (values.mean(axis=0) < high)).all()
    values[:, 3] = np.nan
    values[:5, 2] = np.nan
    low, high = scores.bootstrap(values)
    assert np.isnan(low[3]) and np.isnan(high[3]) and np.isfinite(np.delete(low, 3)).all()
    assert low[2] < np.nanmean(values[:, 2]) < high[2]


def test_bootstrap_resamples_whole_rows():
    # Two seeds, offset by a constant: every resample is the shape plus 0, 1/2 or 1.
    shape = np.linspace(0.0, 5.0, 11)
    low, high = scores.bootstrap(np.stack([shape, shape + 1.0]), reps=500)
    np.testing.assert_allclose(low, shape)
    np.testing.assert_allclose(high, shape + 1.0)
