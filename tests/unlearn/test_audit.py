"""Measures against literal loops and closed forms, and verdicts that follow from the numbers."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from unlearn import audit
from unlearn.audit import (
    against_retraining,
    audit_ensembles,
    challenge_score,
    epsilons,
    forgetting_quality,
    klom,
    ks_forget_quality,
)
from unlearn.findings import MEANINGS, Finding, Report
from unlearn.membership import Estimate

VALUES = st.lists(st.floats(-5, 5, width=16), min_size=1, max_size=15)


def normal(*shape, shift=0.0, scale=1.5, seed=0):
    return np.random.default_rng(seed).normal(shift, scale, shape)


# ---- KLoM ----------------------------------------------------------------------------------------


def at_bins(counts, bins):
    """Margins whose histogram over `bins` bins from 0 to `bins` has these counts."""
    return np.repeat(np.arange(bins) + 0.5, counts)


def slow_klom(p_margins, q_margins, bins=20, floor=1e-5):
    low = max(min(*p_margins, *q_margins), -100)
    width = (min(max(*p_margins, *q_margins), 100) - low) / bins
    p, q = np.zeros(bins), np.zeros(bins)
    for histogram, margins in ((p, p_margins), (q, q_margins)):
        for x in margins:
            place = (min(max(x, -100), 100) - low) / width if width else 0
            histogram[min(int(place), bins - 1)] += 1 / len(margins)
    q = np.maximum(q, floor)
    q /= q.sum()
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def test_klom_of_known_histograms():
    """The outermost bins hold the ends 0 and 20, so that the bins are those of the counts."""
    p, q = [3, 0, 5, *[0] * 16, 2], [5, 1, 2, *[0] * 16, 2]
    ends = lambda x: np.concatenate([[0.0], x[1:-1], [20.0]])  # noqa: E731
    got = klom(ends(at_bins(p, 20))[:, None], ends(at_bins(q, 20))[:, None])
    total = 1 + 16 * 1e-5  # sixteen bins are raised to the floor
    want = 0.3 * math.log(0.3 / 0.5) + 0.5 * math.log(0.5 / 0.2) + math.log(total)
    np.testing.assert_allclose(got, want, rtol=1e-12)


@pytest.mark.parametrize(("m", "n"), [(2, 2), (7, 13), (100, 100)])
def test_klom_against_a_loop(m, n):
    unlearned, retrained = normal(m, 5, shift=1), normal(n, 5, seed=1)
    want = [slow_klom(a, b) for a, b in zip(unlearned.T, retrained.T, strict=True)]
    np.testing.assert_allclose(klom(unlearned, retrained), want, rtol=1e-12)
    want = [slow_klom(a, b, bins=3) for a, b in zip(unlearned.T, retrained.T, strict=True)]
    np.testing.assert_allclose(klom(unlearned, retrained, bins=3), want, rtol=1e-12)


def test_klom_at_its_ends():
    same = normal(30, 4)
    np.testing.assert_allclose(klom(same, same[::-1]), 0, atol=2e-4)  # what floors and sums add
    assert klom(np.ones((5, 1)), np.ones((6, 1)))[0] == pytest.approx(0, abs=2e-4)
    disjoint = klom(normal(40, 3, scale=0.1, shift=-50), normal(40, 3, shift=1000))
    np.testing.assert_allclose(disjoint, -math.log(1e-5), rtol=1e-3)
    # The direction: mass of the unlearned models where retrained ones have none is what costs.
    narrow, wide = np.linspace(0.4, 0.6, 50)[:, None], np.linspace(0, 1, 50)[:, None]
    assert klom(wide, narrow)[0] > 3 * klom(narrow, wide)[0]


def test_klom_keeps_the_highest_margin():
    """In the authors' code, models that agree above all the retrained ones have no histogram."""
    assert klom(np.full((8, 1), 3.0), normal(8, 1, scale=0.1))[0] == pytest.approx(11.5, abs=0.1)


def test_klom_clips():
    """Between -100 and 100, 0 and 50 lie in different bins of 20; between -1e9 and 1e9 in one."""
    far, near = np.array([[-1e9], [0.0], [50.0], [1e9]]), np.array([[-1e9], [50.0], [50.0], [1e9]])
    clipped = klom(np.clip(far, -100, 100), np.clip(near, -100, 100))
    np.testing.assert_array_equal(klom(far, near), clipped)
    assert clipped[0] > 1


# ---- Kolmogorov and Smirnov ----------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:ks_2samp:RuntimeWarning")  # in the oracle, at ties
@settings(max_examples=60, deadline=None)
@given(x=VALUES, y=VALUES)
def test_ks_is_the_greatest_distance(x, y):
    x, y = np.array(x), np.array(y)
    want = max(abs(np.mean(x <= t) - np.mean(y <= t)) for t in np.concatenate([x, y]))
    distance, log10_p = ks_forget_quality(x, y)
    assert distance == pytest.approx(want, abs=1e-12)
    assert 10**log10_p == pytest.approx(np.array(stats.ks_2samp(x, y))[1], rel=1e-9)
    assert ks_forget_quality(np.exp(x), np.exp(y)) == (distance, log10_p)
    assert ks_forget_quality(y, x) == pytest.approx((distance, log10_p))


@pytest.mark.parametrize(("m", "n"), [(3, 3), (2, 5), (7, 4)])
def test_ks_of_disjoint_samples_by_hand(m, n):
    """Two of the orders of m + n values put one sample wholly before the other."""
    distance, log10_p = ks_forget_quality(np.arange(m), 100 + np.arange(n))
    assert distance == 1
    assert log10_p == pytest.approx(math.log10(2 / math.comb(m + n, m)))


def test_ks_with_ties_is_quiet():
    """SciPy fails to find the exact p here, says so, and goes on to the asymptotic one."""
    assert ks_forget_quality([0.0] * 7, [0.0] * 6 + [1.0]) == pytest.approx((1 / 7, 0), abs=1e-4)


def test_ks_below_the_least_float():
    log10_p = [ks_forget_quality(np.arange(n), 1e6 + np.arange(n))[1] for n in (500, 3000, 20_000)]
    assert np.isfinite(log10_p).all() and (np.diff(log10_p) < 0).all() and log10_p[1] < -1000


# ---- the NeurIPS 2023 challenge ------------------------------------------------------------------


def slow_epsilon(unlearned, retrained, delta=1e-5):
    """Literally: every threshold, every model, one after the other."""
    positive, negative = sorted(map(float, unlearned)), sorted(map(float, retrained))
    if np.median(negative) > np.median(positive):
        positive, negative = negative, positive
    spans = positive[-1] - positive[0], negative[-1] - negative[0]
    if max(spans) > 0 and min(spans) / max(spans) < 0.01:
        return 50.0
    rates = []
    low, high = min(positive[0], negative[0]), max(positive[-1], negative[-1])
    for t in np.linspace(low, high, math.ceil((high - low) * 100)):
        fnr = sum(x < t for x in positive) / len(positive)
        fpr = sum(x >= t for x in negative) / len(negative)
        rates.append((fnr, fpr))
    inner, outer = (negative, positive) if spans[0] >= spans[1] else (positive, negative)
    width = inner[-1] - inner[0]
    first, last = inner[0] + width - 2, inner[-1] + 2
    for right in np.linspace(first, last, math.ceil((last - first) * 100)).tolist():
        for left in np.linspace(right - width - 2, right - width + 2, 400).tolist():
            fnr = sum(not left <= x <= right for x in inner) / len(inner)
            fpr = sum(left <= x <= right for x in outer) / len(outer)
            rates.append((fnr, fpr))
    found = []
    for fnr, fpr in rates:
        if fnr == 0 and fpr == 0:
            return 50.0
        if fnr == 0 or fpr == 0:
            continue
        both = [
            math.log(1 - delta - a) - math.log(b)
            for a, b in ((fpr, fnr), (fnr, fpr))
            if 1 - delta - a > 0
        ]
        if both:
            found.append(max(*both, 0.0))
    return min(max(found), 50.0)


@pytest.mark.parametrize(
    ("shift", "scale"), [(0.0, 1.5), (1.0, 1.5), (-1.0, 0.3), (0.3, 4.0), (9.0, 1.0)]
)
def test_epsilon_against_a_literal_loop(shift, scale):
    unlearned, retrained = normal(6, 1, shift=shift, scale=scale), normal(6, 1, seed=1)
    want = slow_epsilon(unlearned[:, 0], retrained[:, 0])
    assert epsilons(unlearned, retrained)[0] == pytest.approx(want, rel=1e-12)


def test_epsilon_with_ties_against_a_literal_loop():
    rng = np.random.default_rng(2)
    unlearned, retrained = rng.integers(0, 4, (2, 5, 2)).astype(float)
    want = [slow_epsilon(a, b) for a, b in zip(unlearned.T, retrained.T, strict=True)]
    np.testing.assert_allclose(epsilons(unlearned, retrained), want, rtol=1e-12)


def test_epsilon_on_the_scale_of_the_grid_against_a_literal_loop():
    """Gaps near the grid's step, where each of its points counts."""
    rng = np.random.default_rng(3)
    unlearned, retrained = np.cumsum(rng.exponential(0.012, (2, 4, 6)), axis=1)
    want = [slow_epsilon(a, b) for a, b in zip(unlearned.T, retrained.T, strict=True)]
    np.testing.assert_allclose(epsilons(unlearned, retrained), want, rtol=1e-12)


def test_epsilon_of_an_interval_that_leaves_an_outlier_out():
    """The interval ends 1.8 below the narrower kind's highest value, within the 2 of the grid."""
    narrow = np.array([0.0, 0.1, 0.15, 0.2, 2.0])
    wide = np.array([-3.0, -1.0, 0.1, 1.0, 1.5])
    want = math.log((1 - 1e-5 - 0.2) / 0.2)  # one of five wrong, on both sides
    assert slow_epsilon(narrow, wide) == pytest.approx(want)
    assert epsilons(narrow[:, None], wide[:, None])[0] == pytest.approx(want)


def test_epsilon_of_a_known_threshold():
    """One of four on the wrong side, on both sides: log((1 - δ - 1/4) / (1/4)), and no better."""
    one, other = np.array([[0.0], [1.0], [2.0], [9.0]]), np.array([[1.0], [8.0], [9.0], [10.0]])
    assert epsilons(one, other)[0] == pytest.approx(math.log((0.75 - 1e-5) / 0.25))
    assert epsilons(one, other, delta=0.1)[0] == pytest.approx(math.log(0.65 / 0.25))


def test_epsilon_at_its_ends():
    same = normal(50, 4)
    np.testing.assert_allclose(epsilons(same, same), 0, atol=1e-3)
    assert forgetting_quality(same, same) == 1
    np.testing.assert_array_equal(epsilons(same, same + 100), 50)
    assert forgetting_quality(same, same + 100) == 0
    # A kind 1 % as wide as the other is at the cap even in its midst; wider, it is found out.
    np.testing.assert_array_equal(epsilons(same * 0.009, same), 50)
    line = np.linspace(-5, 5, 51)[:, None]  # three of the wide lie within the narrow
    assert epsilons(0.05 * line, line)[0] == pytest.approx(
        math.log((1 - 3 / 51) / (1 / 51)), rel=0.01
    )


def test_where_the_grid_finds_nothing():
    """A step of 0.01 misses what is narrower: models that agree, or nearly."""
    fine = normal(6, 1, scale=1e-5)
    assert epsilons(fine, fine + 1e-3)[0] == 50
    assert 0 < epsilons(fine, normal(6, 1, scale=1e-5, seed=1))[0] < math.log(6)
    assert epsilons(np.ones((6, 1)), np.ones((6, 1)))[0] == 0
    assert epsilons(np.ones((6, 1)), np.full((6, 1), 1 + 1e-9))[0] == 50


def test_exact_unlearning_scores_as_retraining_does_and_far_from_1():
    """The best of 160,000 thresholds finds chance."""
    unlearned, retrained = normal(40, 30), normal(40, 30, seed=1)
    quality = forgetting_quality(unlearned, retrained)
    assert quality == pytest.approx(0.18, abs=0.06)
    assert quality == pytest.approx(forgetting_quality(normal(40, 30, seed=2), retrained), abs=0.08)
    assert forgetting_quality(unlearned + 3, retrained) < quality / 3


@pytest.mark.parametrize(
    ("n", "points"),
    [
        (512, [1, 1, 0.5, 0.25, 2**-13, 0, 0]),
        (3, [1, 1, 0.5, 0, 0, 0, 0]),  # ⌈log 2⌉ = 1, two bins
        (4, [1, 1, 0.5, 0.25, 0, 0, 0]),  # ⌈log 3⌉ = 2
    ],
)
def test_points_halve_with_every_bin(monkeypatch, n, points):
    for epsilon, want in zip([0, 0.49, 0.5, 1.2, 6.99, 7, 50], points, strict=True):
        monkeypatch.setattr(audit, "epsilons", lambda *_, e=epsilon, **__: np.array([e]))
        assert forgetting_quality(np.zeros((n, 1)), np.zeros((n, 1))) == want
    monkeypatch.setattr(audit, "epsilons", lambda *_, **__: np.array([0.0, 0.5, 50.0]))
    assert forgetting_quality(np.zeros((512, 3)), np.zeros((512, 3))) == 0.5


def test_challenge_score():
    assert challenge_score(0.5, retain=(0.9, 1.0), test=(0.66, 0.6)) == pytest.approx(0.495)
    assert challenge_score(1.0, retain=(0.9, 0.9), test=(0.6, 0.5)) > 1  # not capped


# ---- the null value ------------------------------------------------------------------------------


def test_against_retraining_gives_halves_of_one_size():
    seen = []

    def measure(ours, theirs):
        seen.append((set(ours[:, 0]), set(theirs[:, 0])))
        return ours.mean() - theirs.mean()

    unlearned, retrained = np.arange(100.0, 105)[:, None], np.arange(12.0)[:, None]
    value, null = against_retraining(measure, unlearned, retrained, splits=4)
    assert [len(a) for pair in seen for a in pair] == [5] * 16
    for (drawn, half), (other, same_half) in zip(seen[::2], seen[1::2], strict=True):
        assert drawn <= set(unlearned[:, 0]) and other <= set(retrained[:, 0])
        assert half == same_half and not half & other
    differences = [np.mean(list(a)) - np.mean(list(b)) for a, b in seen]
    assert value == pytest.approx(
        (np.mean(differences[::2]), min(differences[::2]), max(differences[::2]))
    )
    assert null == pytest.approx(
        (np.mean(differences[1::2]), min(differences[1::2]), max(differences[1::2]))
    )
    assert len({frozenset(half) for _, half in seen}) > 1  # splits differ
    constant = against_retraining(lambda a, b: 0.1, unlearned, retrained, splits=3)[0]
    assert constant == (0.1, 0.1, 0.1)  # the mean of three is 0.10000000000000002
    again = against_retraining(lambda a, b: a.mean() - b.mean(), unlearned, retrained, splits=4)
    assert again == (value, null)


def ensembles(m, n, shift, seed=0):
    """Models differ as a whole and example by example, examples more than models."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(0, 3, n)
    make = lambda k: centre + rng.normal(0, 0.5, (k, 1)) + rng.normal(0, 1, (k, n))  # noqa: E731
    return make(m) + shift, make(2 * m)


def test_an_audit_of_exact_and_of_no_unlearning():
    for seed in range(3):
        report = Report("exact", audit_ensembles(*ensembles(8, 6, 0, seed), splits=4, seed=seed))
        assert report.verdict.startswith("none of 4 shows a trace")
    findings = {f.name: f for f in audit_ensembles(*ensembles(8, 6, 8), splits=4)}
    assert list(findings) == ["klom", "u-lira auc", "log10 ks p", "forgetting quality"]
    assert findings["klom"].trace and findings["u-lira auc"].trace
    assert findings["forgetting quality"].trace
    assert findings["u-lira auc"].unlearned.value > 0.98
    assert findings["forgetting quality"].unlearned.value == 0


# ---- findings and reports ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "below", "within", "above"),
    [
        ("auc", True, False, True),
        ("balanced accuracy", True, False, True),
        ("tpr at fpr 0.01", True, False, True),
        ("u-lira auc", False, False, True),
        ("klom", False, False, True),
        ("log10 ks p", True, False, False),
        ("forgetting quality", True, False, False),
    ],
)
def test_the_verdict_is_where_the_value_lies(name, below, within, above):
    reference = Estimate(0.53, 0.5, 0.56)
    for value, trace in (
        (Estimate(0.4, 0.3, 0.49), below),
        (Estimate(0.4, 0.3, 0.5), within),
        (Estimate(0.53, 0.52, 0.54), within),
        (Estimate(0.6, 0.56, 0.7), within),
        (Estimate(0.6, 0.57, 0.7), above),
    ):
        finding = Finding(name, value, reference)
        assert finding.trace is trace
        assert finding.verdict == ("trace" if trace else "none seen")
        assert "retrained" in finding.meaning
    assert {start for start in MEANINGS if name.startswith(start)}


def test_an_auc_of_a_half_is_a_trace_where_retraining_has_more():
    assert Finding("auc", Estimate(0.5, 0.48, 0.52), Estimate(0.6, 0.58, 0.62)).trace


def report():
    return Report(
        "request 7",
        [
            Finding("auc", Estimate(0.71, 0.65, 0.77), Estimate(0.53, 0.47, 0.59)),
            Finding("klom", Estimate(0.04, 0.03, 0.05), Estimate(0.05, 0.04, 0.06)),
        ],
    )


def test_a_report_as_json():
    page = json.loads(report().to_json())
    assert page["title"] == "request 7"
    assert page["verdict"] == "1 of 2 show a trace: auc"
    assert page["findings"][0] == {
        "name": "auc",
        "unlearned": {"value": 0.71, "low": 0.65, "high": 0.77},
        "retrained": {"value": 0.53, "low": 0.47, "high": 0.59},
        "verdict": "trace",
        "meaning": MEANINGS["auc"][1],
    }
    assert page["findings"][1]["verdict"] == "none seen"


def test_a_report_as_text():
    lines = report().render().splitlines()
    assert lines[0] == "# request 7" and lines[2] == "1 of 2 show a trace: auc"
    assert lines[4] == "| measure | unlearned | retrained | verdict |"
    assert lines[6] == "| auc | 0.71 (0.65 to 0.77) | 0.53 (0.47 to 0.59) | trace |"
    assert lines[7] == "| klom | 0.04 (0.03 to 0.05) | 0.05 (0.04 to 0.06) | none seen |"
    assert lines[-1] == f"- klom: {MEANINGS['klom'][1]}"


def test_no_findings_is_no_report():
    with pytest.raises(ValueError, match="at least one finding"):
        Report("empty", [])


# ---- bad input -----------------------------------------------------------------------------------

GOOD = np.zeros((4, 2))


@pytest.mark.parametrize("measure", [klom, epsilons, forgetting_quality])
@pytest.mark.parametrize(
    ("unlearned", "retrained", "message"),
    [
        (np.zeros((1, 2)), GOOD, "at least [23] models of each kind are needed, found 1 unlearned"),
        (GOOD, np.zeros((1, 2)), "at least [23] models .* 1 retrained"),
        (GOOD, np.zeros((4, 3)), r"unlearned \(4, 2\) and retrained \(4, 3\)"),
        (np.zeros(4), GOOD, "models, examples"),
        (np.full((4, 2), np.nan), GOOD, "found nan in unlearned"),
        (GOOD, np.full((4, 2), -np.inf), "found -inf in retrained"),
    ],
)
def test_bad_ensembles(measure, unlearned, retrained, message):
    with pytest.raises(ValueError, match=message):
        measure(unlearned, retrained)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: klom(GOOD, GOOD, bins=0), "bins must be at least 1, found 0"),
        (lambda: epsilons(GOOD, np.zeros((5, 2))), "as many of both kinds, found 4 and 5"),
        (lambda: epsilons(GOOD, GOOD, delta=1.0), "delta must be from 0 and below 1, found 1.0"),
        (lambda: ks_forget_quality([], [1.0]), "finite, of shape"),
        (lambda: ks_forget_quality([[1.0]], [1.0]), "finite, of shape"),
        (lambda: ks_forget_quality([1.0], [np.nan]), "finite"),
        (lambda: challenge_score(1.2, retain=(1, 1), test=(1, 1)), "from 0 to 1, found 1.2"),
        (lambda: challenge_score(1, retain=(1, math.nan), test=(1, 1)), "found nan"),
        (lambda: challenge_score(1, retain=(1, 0), test=(1, 1)), "never right"),
        (lambda: challenge_score(1, retain=(1, 1), test=(1, 0)), "never right"),
        (lambda: against_retraining(np.vdot, GOOD, GOOD, splits=0), "splits must be at least 1"),
        (lambda: against_retraining(np.vdot, GOOD, GOOD[:1]), "at least 2 models"),
        (lambda: audit_ensembles(normal(8, 2), normal(7, 2)), "at least 4 models .* found 3"),
        (
            lambda: Finding("mia", Estimate(0, 0, 0), Estimate(0, 0, 0)),
            "one of auc, .* forgetting quality, found 'mia'",
        ),
        (
            lambda: Finding("klom", Estimate(math.nan, 0, 1), Estimate(0, 0, 0)),
            "klom: nan isn't in its interval 0 to 1",
        ),
        (
            lambda: Finding("klom", Estimate(0, 0, 1), Estimate(2, 0, 1)),
            "klom: 2 isn't in its interval 0 to 1",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
