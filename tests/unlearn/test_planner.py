"""Costs against all partitions and requests there are, the simulation, and the paper's numbers."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn import planner
from unlearn.partition import epochs_of_slices


def visits_of_requests(places, requests, stages, batch):
    """Record by record: who is visited in which stage of which shard's retraining."""
    left = dict(enumerate(places))
    cost = 0
    for group in [requests] if batch else [[r] for r in requests]:
        first = {}
        for record in group:
            shard, slice_ = left.pop(record)
            first[shard] = min(slice_, first.get(shard, slice_))
        for shard, slice_ in left.values():
            for stage, epochs in enumerate(stages):
                if shard in first and stage >= first[shard] and slice_ <= stage:
                    cost += epochs
    return cost


def every_outcome(n, shards, k, stages, batch):
    cells = list(itertools.product(range(shards), range(len(stages))))
    return [
        visits_of_requests(places, requests, stages, batch)
        for places in itertools.product(cells, repeat=n)
        for requests in itertools.permutations(range(n), k)
    ]


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(
    "n, shards, k, stages",
    [
        (1, 1, 1, [1]),
        (1, 3, 1, [2, 1]),
        (3, 1, 2, [1]),
        (3, 1, 1, [3, 1, 2]),
        (4, 2, 1, [1]),
        (4, 2, 3, [1]),
        (4, 3, 2, [2]),
        (3, 2, 2, [1, 4]),
        (3, 2, 3, [1, 0, 2]),
        (4, 2, 2, [3, 1]),
        (3, 4, 0, [1, 1]),
    ],
)
def test_costs_are_exact_and_simulated_as_drawn(n, shards, k, stages, batch):
    outcomes = np.array(every_outcome(n, shards, k, stages, batch), float)
    cost = planner.expected_cost(n, shards, k, stages, batch=batch)
    assert cost == pytest.approx(outcomes.mean(), rel=1e-12, abs=1e-12)
    rng = np.random.default_rng(0)
    drawn = planner.simulate(rng, n, shards, k, stages, batch=batch, trials=20_000)
    assert drawn.shape == (20_000,)
    # The distribution too, in total variation: its error is about √(values / trials).
    values, counts = np.unique(outcomes, return_counts=True)
    assert set(drawn) <= set(values)
    shares = np.array([np.mean(drawn == value) for value in values])
    np.testing.assert_allclose(shares, counts / len(outcomes), atol=0.02)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(
    "n, shards, slices, k",
    [
        *((200, s, r, k) for s in (1, 3, 20) for r in (1, 4) for k in (1, 5, 60)),
        (200, 7, 3, 200),
        (31, 40, 2, 11),  # more shards than records
        (5000, 20, 19, 8),
    ],
)
def test_expectation_within_the_interval_of_the_simulation(n, shards, slices, k, batch):
    stages = planner.slice_epochs(10, slices)
    rng = np.random.default_rng([n, shards, slices, k])
    drawn = planner.simulate(rng, n, shards, k, stages, batch=batch, trials=2000)
    error = drawn.std() / np.sqrt(len(drawn))
    cost = planner.expected_cost(n, shards, k, stages, batch=batch)
    assert abs(drawn.mean() - cost) <= 4.5 * error + 1e-9 * cost
    assert error < 0.1 * cost or cost == 0


def test_whole_epochs_of_training_have_a_cost_too():
    stages = epochs_of_slices(7, 5)
    assert len(set(stages)) > 1
    drawn = planner.simulate(np.random.default_rng(3), 400, 4, 9, stages, batch=False, trials=2000)
    cost = planner.expected_cost(400, 4, 9, stages, batch=False)
    assert abs(drawn.mean() - cost) <= 4.5 * drawn.std() / np.sqrt(2000)


@pytest.mark.parametrize("slices", [1, 2, 7, 50])
def test_slices_as_in_the_paper(slices):
    e0, size = 12.0, 350
    stages = planner.slice_epochs(e0, slices)
    assert sum(stages) == pytest.approx(2 * slices / (slices + 1) * e0)
    # e0 visits per record of the shard in all, 2/3 + 1/(3R) of them for a slice at random.
    restarts = [planner.restart_cost(size, first, stages) for first in range(slices)]
    assert restarts[0] == pytest.approx(e0 * size)
    assert restarts == sorted(restarts, reverse=True)
    one = e0 * size * (2 / 3 + 1 / (3 * slices))
    assert np.mean(restarts) == pytest.approx(one)
    # The shards of `expected_cost` have (N - 1) / S others on average.
    for batch in (False, True):
        cost = planner.expected_cost(5 * size + 1, 5, 1, stages, batch=batch)
        assert cost == pytest.approx(one)


@pytest.mark.parametrize("n, shards, k", [(12, 3, 1), (12, 3, 3), (8, 1, 5), (20, 2, 6)])
def test_what_the_paper_assumes(n, shards, k):
    """Equal shards; each request takes a shard at random, whatever it has lost."""
    size = Fraction(n, shards)
    hits = list(itertools.product(range(shards), repeat=k))
    one_by_one = [sum(size - hit[:i].count(hit[i]) - 1 for i in range(k)) for hit in hits]
    together = [len(set(hit)) * size - k for hit in hits]
    for batch, costs in ((False, one_by_one), (True, together)):
        mean = float(sum(costs) / len(hits))
        assert planner.paper_cost(n, shards, k, batch=batch) == pytest.approx(mean)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 10**6), st.integers(1, 60), st.data())
def test_how_far_the_paper_is_off(n, shards, draw):
    k = draw.draw(st.integers(0, min(n, 1000)))
    for batch, gap in ((False, k * (1 - 1 / shards)), (True, k * (1 - 1 / shards) ** k)):
        exact = planner.expected_cost(n, shards, k, batch=batch)
        difference = exact - planner.paper_cost(n, shards, k, batch=batch)
        assert difference == pytest.approx(gap, rel=1e-9, abs=1e-12 * n * max(k, 1))


def test_equal_shards_without_replacement():
    """Where the paper's assumptions fail for its own setting: 6 records, 2 shards of 3."""
    sequential, together = [], []
    for requests in itertools.permutations(range(6), 3):
        places = [(record % 2, 0) for record in range(6)]
        sequential.append(visits_of_requests(places, requests, [1], False))
        together.append(visits_of_requests(places, requests, [1], True))
    # Two records share a shard with probability 2/5; three are all in one with probability 1/10.
    assert np.mean(sequential) == pytest.approx(2 / 5 * (5 + 4 + 3))
    assert np.mean(together) == pytest.approx(3 - 1 / 10 * 3)
    assert planner.paper_cost(6, 2, 3, batch=False) == pytest.approx(4.5)  # not 4.8
    assert planner.paper_cost(6, 2, 3, batch=True) == pytest.approx(2.25)  # not 2.7


def test_retraining_is_one_shard():
    for batch in (False, True):
        cost = planner.expected_cost(100, 1, 7, planner.slice_epochs(3, 1), batch=batch)
        assert planner.retraining_cost(100, 7, 3, batch=batch) == pytest.approx(cost)
    assert planner.retraining_cost(100, 2, 3, batch=False) == 3 * (99 + 98)


# ---- sharding by probability ---------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 64), min_size=1, max_size=40),
    st.integers(1, 200),
)
def test_shards_by_probability_follow_the_algorithm(sixty_fourths, limit):
    """Algorithm 1 of the paper, record by record; sixty-fourths add up exactly."""
    p, limit = np.array(sixty_fourths) / 64, limit / 64
    expected, shard, total, filled = np.zeros(len(p), int), 0, 0.0, 0
    for record in np.argsort(p, kind="stable"):
        if filled and total + p[record] >= limit:
            shard, total, filled = shard + 1, 0.0, 0
        expected[record] = shard
        total, filled = total + p[record], filled + 1
    got = planner.distribution_aware_shards(p, limit)
    np.testing.assert_array_equal(got, expected)
    sizes = np.bincount(got)
    assert sizes.min() > 0 and sizes.sum() == len(p)
    sums = np.bincount(got, weights=p)
    assert np.all((sums < limit) | (sizes == 1))


def test_a_million_records_by_probability():
    p = np.random.default_rng(0).beta(0.5, 20, size=10**6)
    shard = planner.distribution_aware_shards(p, 1000.0)
    assert np.bincount(shard, weights=p).max() < 1000 + 1e-6
    assert np.all(np.diff(np.bincount(shard)[:-1]) <= 0)  # likelier to be hit, so smaller


# ---- plans ---------------------------------------------------------------------------------------


def words(**options):
    settings = {"records": 6000, "requests": 5, "shards": 20, "slices": 4, "epochs": 10}
    return planner.plan(**{**settings, "batch": True, **options}).warnings


def test_a_good_plan_has_no_warnings():
    assert words() == words(batch=False) == ()


@pytest.mark.parametrize(
    "at, before, message",
    [
        ({"shards": 21}, {"shards": 20}, "21 shards: beyond 20"),
        ({"slices": 20}, {"slices": 19}, "20 slices are more than 2 e0 - 1 = 19"),
        ({"requests": 60}, {"requests": 19}, "at least 3 S = 60: 95 % of the records"),
        ({"requests": 20}, {"requests": 19}, "20 shards are few for 20 requests at once: 64 %"),
        ({"requests": 59}, {"requests": 19}, "20 shards are few for 59 requests at once"),
        # One by one: 20 S / (2/3 + 1/12) requests cost one retraining, but for shrinkage.
        (
            {"requests": 27, "batch": False},
            {"requests": 26, "batch": False},
            "27 requests one by one cost 1.0 times",
        ),
    ],
)
def test_warnings_start_at_their_bound(at, before, message):
    assert len(words(**at)) == 1 and message in words(**at)[0]
    assert words(**before) == ()


def test_three_s_requests_one_by_one_never_pay():
    for shards, slices in itertools.product((1, 2, 9, 20), (1, 3, 19)):
        assert words(shards=shards, slices=slices, requests=3 * shards, batch=False)


def test_a_plan_s_numbers():
    plan = planner.plan(6000, 5, 20, 4, epochs=10, batch=False)
    stages = planner.slice_epochs(10, 4)
    assert plan.cost == planner.expected_cost(6000, 20, 5, stages, batch=False)
    assert plan.baseline == 10 * sum(6000 - i for i in range(1, 6))
    assert plan.speed_up == pytest.approx(20 / (2 / 3 + 1 / 12))
    assert plan.checkpoints == 80


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize(
    "n, k, epochs, room, most", [(900, 4, 6, 40, 20), (900, 300, 3, 7, 20), (11, 2, 9, 99, 50)]
)
def test_the_recommendation_is_the_cheapest(n, k, epochs, room, most, batch):
    best = planner.recommend(n, k, epochs=epochs, batch=batch, checkpoints=room, most_shards=most)
    allowed = [
        (s, r)
        for s, r in itertools.product(range(1, most + 1), range(1, 2 * epochs))
        if s * r <= min(room, n)
    ]
    assert (best.shards, best.slices) in allowed
    costs = [
        planner.expected_cost(n, s, k, planner.slice_epochs(epochs, r), batch=batch)
        for s, r in allowed
    ]
    assert best.cost == min(costs)
    assert not any("no epoch" in warning for warning in best.warnings)


def test_one_epoch_leaves_no_slices():
    best = planner.recommend(1000, 3, epochs=1, batch=False, checkpoints=100)
    assert (best.shards, best.slices) == (20, 1)


# ---- bad input -----------------------------------------------------------------------------------

RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: planner.expected_cost(0, 1, 0, batch=True), "found 0 records"),
        (lambda: planner.expected_cost(5, 0, 1, batch=True), "0 shards"),
        (lambda: planner.expected_cost(5, 1, 6, batch=False), "6 requests"),
        (lambda: planner.expected_cost(5, 1, 1, (), batch=False), "found none"),
        (lambda: planner.paper_cost(5, 1, -1, batch=False), "-1 requests"),
        (lambda: planner.retraining_cost(5, 6, batch=False), "6 requests"),
        (lambda: planner.simulate(RNG, 5, 2, 6, batch=True), "6 requests"),
        (lambda: planner.restart_cost(5, 2, (1.0, 1.0)), r"first must be in 0\.\.1, found 2"),
        (lambda: planner.restart_cost(5, -1, (1.0,)), "found -1"),
        (lambda: planner.distribution_aware_shards([0.5, 1.5], 1), r"in \[0, 1\], found .*1\.5"),
        (lambda: planner.distribution_aware_shards([0.5, np.nan], 1), "nan"),
        (lambda: planner.distribution_aware_shards([[0.5]], 1), r"\(1, 1\)"),
        (lambda: planner.distribution_aware_shards([], 1), r"\(0,\)"),
        (lambda: planner.distribution_aware_shards([0.5], 0), "limit must be above 0, found 0"),
        (lambda: words(requests=6000), r"requests must be in 1\.\.5999, found 6000"),
        (lambda: words(requests=0), "found 0"),
        (lambda: words(shards=0), "found 0 × 4"),
        (lambda: words(shards=3000, slices=3), "found 3000 × 3"),
        (lambda: words(epochs=0), "epochs must be above 0, found 0"),
        (
            lambda: planner.recommend(9, 1, epochs=3, batch=True, checkpoints=0),
            "found 3, 0 and 20",
        ),
    ],
)
def test_bad_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
