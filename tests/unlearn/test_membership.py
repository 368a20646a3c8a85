"""Attacks against all pairs, scikit-learn, SciPy and distributions with known likelihood ratios."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from unlearn.lira import check_ensembles, lira, u_lira
from unlearn.membership import auc, balanced_accuracy, loss_attack, margins, tpr_at_fpr

metrics = pytest.importorskip("sklearn.metrics")

# Few distinct values, so that ties are common.
SCORES = st.lists(st.integers(-4, 4).map(float), min_size=1, max_size=12)
DISTINCT = st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=12)


def labelled(members, nonmembers):
    return np.repeat([1, 0], [len(members), len(nonmembers)]), np.concatenate([members, nonmembers])


# ---- AUC -----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(members=st.one_of(SCORES, DISTINCT), nonmembers=st.one_of(SCORES, DISTINCT))
def test_auc_is_over_all_pairs(members, nonmembers):
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in members for b in nonmembers]
    estimate = auc(members, nonmembers)
    assert estimate.value == pytest.approx(np.mean(pairs), abs=1e-12)
    assert estimate.value == pytest.approx(metrics.roc_auc_score(*labelled(members, nonmembers)))
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert estimate.high - estimate.low > 0  # at 0 and at 1 too


@settings(max_examples=40, deadline=None)
@given(members=SCORES, nonmembers=SCORES)
def test_auc_swapped_and_transformed(members, nonmembers):
    estimate, swapped = auc(members, nonmembers), auc(nonmembers, members)
    assert swapped == pytest.approx((1 - estimate.value, 1 - estimate.high, 1 - estimate.low))
    assert auc(np.exp(members), np.exp(nonmembers)) == estimate
    assert auc(-np.array(members), -np.array(nonmembers)) == pytest.approx(swapped)


@pytest.mark.parametrize(
    ("m", "n", "shift", "scale"),
    [(20, 20, 0, 1), (15, 200, 0, 1), (30, 30, 2, 1), (50, 50, 1, 0.1)],
)
def test_auc_interval_covers(m, n, shift, scale):
    """At most 5 % of 95 % intervals miss; 400 draws can show 7 % by chance."""
    rng, truth = np.random.default_rng(m + n), stats.norm.cdf(shift / math.hypot(1, scale))
    missed = 0
    for _ in range(400):
        estimate = auc(rng.normal(shift, scale, m), rng.normal(0, 1, n))
        missed += not estimate.low <= truth <= estimate.high
    assert missed <= 28


def test_auc_interval_is_wilsons_with_the_smaller_group():
    estimate = auc([1.0] * 3 + [3.0] * 7, [2.0] * 25)
    want = stats.binomtest(7, 10).proportion_ci(0.9, method="wilson")
    assert auc([1.0] * 3 + [3.0] * 7, [2.0] * 25, confidence=0.9) == pytest.approx((0.7, *want))
    assert estimate.low < want.low and estimate.high > want.high


# ---- the true positive rate at a false positive rate ---------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    members=SCORES,
    nonmembers=st.lists(st.integers(-4, 4).map(float), min_size=10, max_size=40),
    percent=st.integers(10, 99),
)
def test_tpr_is_the_best_on_the_curve(members, nonmembers, percent):
    fpr, tpr, _ = metrics.roc_curve(*labelled(members, nonmembers), drop_intermediate=False)
    want = tpr[fpr <= percent / 100 + 1e-12].max()
    assert tpr_at_fpr(members, nonmembers, percent / 100).value == pytest.approx(want)


def test_tpr_counts_as_many_as_are_allowed():
    """0.29 * 100 is 28.999..., and still allows 29 of 100."""
    nonmembers = np.arange(100.0)
    assert tpr_at_fpr([70.5], nonmembers, 0.29).value == 1
    assert tpr_at_fpr([69.5], nonmembers, 0.29).value == 0


@pytest.mark.parametrize("found", [0, 1, 7, 10])
def test_tpr_interval_is_exact(found):
    members = [5.0] * found + [0.0] * (10 - found)
    want = stats.binomtest(found, 10).proportion_ci(0.9, method="exact")
    estimate = tpr_at_fpr(members, [1.0] * 100, 0.01, confidence=0.9)
    assert estimate == pytest.approx((found / 10, *want))


def test_tpr_of_normal_distributions():
    rng = np.random.default_rng(0)
    estimate = tpr_at_fpr(rng.normal(2, 1, 20_000), rng.normal(0, 1, 50_000), 0.01)
    assert estimate.value == pytest.approx(stats.norm.sf(stats.norm.isf(0.01) - 2), abs=0.02)


@pytest.mark.parametrize(("fpr", "n", "needed"), [(0.001, 999, "1000"), (0.01, 20, "100")])
def test_too_few_nonmembers(fpr, n, needed):
    with pytest.raises(ValueError, match=f"at least {needed} non-members, found {n}"):
        tpr_at_fpr([1.0], np.zeros(n), fpr)
    assert tpr_at_fpr([1.0], np.zeros(int(needed)), fpr).value == 1


# ---- balanced accuracy ---------------------------------------------------------------------------


def test_balanced_accuracy_of_known_groups():
    rng = np.random.default_rng(1)
    estimate = balanced_accuracy(rng.normal(2, 1, 20_000), rng.normal(0, 1, 5_000))
    assert estimate.value == pytest.approx(stats.norm.cdf(1), abs=0.02)
    assert estimate.low <= stats.norm.cdf(1) <= estimate.high
    assert balanced_accuracy([2.0, 3.0, 2.0], [0.0, 1.0]).value == 1
    assert balanced_accuracy([1.0] * 5, [1.0] * 6).value == 0.5
    # The attack's direction is given, not chosen: members that score low are missed.
    assert balanced_accuracy([0.0] * 9, [1.0] * 9).value == 0.5


def test_the_threshold_is_not_chosen_on_what_it_is_judged_by():
    rng = np.random.default_rng(2)
    values = [
        balanced_accuracy(rng.normal(size=20), rng.normal(size=20), seed=seed).value
        for seed in range(300)
    ]
    # In sample it would be 0.59; the standard error of this mean is 0.006.
    assert np.mean(values) == pytest.approx(0.5, abs=0.02)


def test_balanced_accuracy_interval_covers():
    rng, missed = np.random.default_rng(3), 0
    for seed in range(200):
        estimate = balanced_accuracy(rng.normal(size=40), rng.normal(size=60), seed=seed)
        missed += not estimate.low <= 0.5 <= estimate.high  # 0.5 is true of any threshold
    assert missed <= 10


def test_balanced_accuracy_interval_joins_two_exact_ones():
    """All four and all six are judged rightly; each interval may fail half as often."""
    estimate = balanced_accuracy([1.0] * 8, [0.0] * 12, confidence=0.9)
    low = [stats.binomtest(n, n).proportion_ci(0.95, method="exact").low for n in (4, 6)]
    assert estimate == pytest.approx((1, np.mean(low), 1))


def test_balanced_accuracy_depends_on_nothing_but_its_seed():
    rng = np.random.default_rng(4)
    members, nonmembers = rng.normal(0.5, 1, 31), rng.normal(size=30)
    by_seed = [balanced_accuracy(members, nonmembers, seed=seed) for seed in (7, 7, 8)]
    assert by_seed[0] == by_seed[1] != by_seed[2]


# ---- the loss attack -----------------------------------------------------------------------------


def test_a_low_loss_is_a_member():
    rng = np.random.default_rng(5)
    low, high = rng.exponential(0.1, 300), rng.exponential(1.0, 1000)
    attack = loss_attack(low, high)
    assert list(attack) == ["auc", "balanced accuracy", "tpr at fpr 0.001", "tpr at fpr 0.01"]
    # Two exponentials: P(X < Y) is the ratio of Y's mean to their sum.
    assert attack["auc"].value == pytest.approx(1 / 1.1, abs=0.02)
    assert attack["balanced accuracy"].value > 0.75
    assert attack["tpr at fpr 0.01"] == tpr_at_fpr(-low, -high, 0.01)
    assert loss_attack(high, low, fprs=())["auc"].value < 0.15


def test_no_difference_is_inside_the_interval():
    rng = np.random.default_rng(6)
    truth = {"auc": 0.5, "balanced accuracy": 0.5, "tpr at fpr 0.01": 0.01}
    missed = dict.fromkeys(truth, 0)
    for _ in range(100):
        attack = loss_attack(rng.exponential(size=200), rng.exponential(size=4000), fprs=(0.01,))
        for name, value in truth.items():
            missed[name] += not attack[name].low <= value <= attack[name].high
    assert max(missed.values()) <= 10, missed


# ---- margins -------------------------------------------------------------------------------------


def test_margins_are_log_odds():
    rng = np.random.default_rng(7)
    logits, labels = rng.normal(0, 3, (2, 5, 4)), rng.integers(0, 4, 5)
    p = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    for model in range(2):
        for i, label in enumerate(labels):
            want = math.log(p[model, i, label] / (1 - p[model, i, label]))
            assert margins(logits, labels)[model, i] == pytest.approx(want, rel=1e-12)
    np.testing.assert_allclose(margins(np.log(p), labels), margins(logits, labels), rtol=1e-9)


def test_margins_do_not_saturate():
    got = margins(np.array([[2000.0, 0.0, -5.0], [2000.0, 0.0, -5.0]]), np.array([0, 1]))
    np.testing.assert_allclose(got, [2000 - math.log(1 + math.exp(-5)), -2000])
    assert margins(np.array([[30, -30]], np.float32), [0]) == 60


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((3, 2)), np.zeros(2, int), r"found \(3, 2\) and \(2,\)"),
        (np.zeros((3, 1)), np.zeros(3, int), "C at least 2"),
        (np.array([[0.0, -np.inf]]), np.array([0]), "finite"),
        (np.zeros((1, 2)), np.array([2]), "integers from 0 to 1, found"),
        (np.zeros((1, 2)), np.array([-1]), "integers from 0 to 1"),
        (np.zeros((1, 2)), np.array([0.0]), "integers from 0 to 1"),
    ],
)
def test_bad_logits(logits, labels, message):
    with pytest.raises(ValueError, match=message):
        margins(logits, labels)


# ---- LiRA ----------------------------------------------------------------------------------------


def shadows(m, n, seed=0):
    rng = np.random.default_rng(seed)
    member = rng.random((m, n)) < 0.5
    member[:2], member[2:4] = True, False
    centre = rng.normal(0, 3, n)
    shadow = rng.normal(centre + np.where(member, 2.0, 0.0), np.where(member, 0.7, 1.1))
    return shadow, member, centre


def slow_lira(target, shadow, member, variant, variance):
    """Algorithm 1, example by example, from the densities themselves."""
    n = shadow.shape[1]
    kinds = {}
    for kind in (True, False):
        groups = [shadow[member[:, j] == kind, j] for j in range(n)]
        means = [g.mean() for g in groups]
        if variance == "local":
            deviations = [g.std() for g in groups]
        else:
            rest = np.concatenate([g - g.mean() for g in groups])
            deviations = [rest.std()] * n
        kinds[kind] = list(zip(means, deviations, strict=True))
    scores = np.empty_like(target)
    for k, j in np.ndindex(target.shape):
        x = target[k, j]
        if variant == "online":
            scores[k, j] = stats.norm.logpdf(x, *kinds[True][j]) - stats.norm.logpdf(
                x, *kinds[False][j]
            )
        else:
            scores[k, j] = -np.log(1 - stats.norm.cdf(x, *kinds[False][j]))
    return scores


@pytest.mark.parametrize("variant", ["online", "offline"])
@pytest.mark.parametrize("variance", ["local", "global"])
def test_lira_is_algorithm_1(variant, variance):
    shadow, member, centre = shadows(13, 7)
    target = np.random.default_rng(1).normal(centre, 2, (3, 7))
    got = lira(target, shadow, member, variant=variant, variance=variance)
    np.testing.assert_allclose(got, slow_lira(target, shadow, member, variant, variance), rtol=1e-9)
    alone = lira(target[1], shadow, member, variant=variant, variance=variance)
    np.testing.assert_array_equal(alone, got[1])


@pytest.mark.parametrize("variance", ["local", "global"])
def test_lira_of_many_models_is_the_true_ratio(variance):
    shadow, member, centre = shadows(20_000, 3)
    target = centre + np.linspace(-2, 4, 7)[:, None]
    want = stats.norm.logpdf(target, centre + 2, 0.7) - stats.norm.logpdf(target, centre, 1.1)
    got = lira(target, shadow, member, variance=variance)
    np.testing.assert_allclose(got, want, atol=0.35, rtol=0.03)


def test_offline_lira_does_not_saturate():
    shadow, member, _ = shadows(40, 1)
    scores = lira(np.array([[60.0], [90.0], [2000.0]]), shadow, member, variant="offline")[:, 0]
    assert np.isfinite(scores).all() and (np.diff(scores) > 0).all()


def test_lira_sees_what_a_global_threshold_does_not():
    """Examples differ more than membership moves them, so one threshold for all does little."""
    rng = np.random.default_rng(2)
    shadow, member, _ = shadows(64, 400)
    target, truth = shadow[-1], member[-1]
    scores = lira(target, shadow[:-1], member[:-1])
    assert auc(scores[truth], scores[~truth]).value > 0.85
    assert auc(target[truth], target[~truth]).value < 0.75
    shuffled = rng.permutation(truth)
    null = auc(scores[shuffled], scores[~shuffled])
    assert null.low <= 0.5 <= null.high


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"member": np.ones((6, 3), bool)}, "at least 2 models without it, found 0 for example 0"),
        ({"member": np.arange(6)[:, None] != [0, 1, 2]}, "2 models without it, found 1"),
        ({"member": np.arange(6)[:, None] < [3, 1, 3]}, "2 models with it, found 1 for example 1"),
        ({"member": np.ones((6, 3))}, "member bool"),
        ({"member": np.ones((5, 3), bool)}, r"and bool \(5, 3\)"),
        ({"target": np.zeros(4)}, r"found \(4,\), \(6, 3\)"),
        ({"target": np.array([0.0, np.nan, 0.0])}, "finite"),
        ({"shadow": np.full((6, 3), np.inf)}, "finite"),
        ({"shadow": np.ones((6, 3))}, "models without example 0 agree on it exactly"),
        ({"shadow": np.full((6, 3), 0.1)}, "agree on it exactly"),  # whose mean isn't 0.1
        ({"shadow": np.full((6, 3), 0.1), "variance": "global"}, "agree on it exactly"),
        ({"variant": "both"}, "'online' or 'offline' .* found 'both'"),
        (
            {"variance": "fixed"},
            "'local' or 'global', found 'local' and|found 'online' and 'fixed'",
        ),
    ],
)
def test_bad_shadow_models(change, message):
    good = {
        "target": np.zeros(3),
        "shadow": np.random.default_rng(0).normal(size=(6, 3)),
        "member": np.arange(6)[:, None] < [3, 3, 3],
    }
    lira(**good)
    with pytest.raises(ValueError, match=message):
        lira(**{**good, **change})


def test_the_global_variance_copes_with_models_that_agree():
    shadow, member, _ = shadows(12, 3)
    shadow[:, 1] = 0.1
    scores = lira(shadow[0], shadow, member, variance="global")
    np.testing.assert_allclose(
        scores, slow_lira(shadow[:1], shadow, member, "online", "global")[0], rtol=1e-9
    )
    with pytest.raises(ValueError, match="example 1 agree"):
        lira(shadow[0], shadow, member)


def test_offline_lira_needs_no_model_trained_on_the_example():
    shadow = np.random.default_rng(0).normal(size=(6, 3))
    assert lira(np.zeros(3), shadow, np.zeros((6, 3), bool), variant="offline").shape == (3,)


# ---- U-LiRA --------------------------------------------------------------------------------------


def test_u_lira_approaches_the_best_attack():
    """Of N(1, 1) against N(0, 1) the best accuracy is Φ(1/2), and the AUC Φ(1/√2)."""
    rng = np.random.default_rng(8)
    centre = rng.normal(0, 5, 30)
    ours, theirs = u_lira(rng.normal(centre + 1, 1, (201, 30)), rng.normal(centre, 1, (200, 30)))
    assert ours.shape == (201, 30) and theirs.shape == (200, 30)
    accuracy = ((ours > 0).mean() + (theirs <= 0).mean()) / 2
    assert accuracy == pytest.approx(stats.norm.cdf(0.5), abs=0.02)
    pooled = auc(ours.ravel(), theirs.ravel())
    assert pooled.value == pytest.approx(stats.norm.cdf(0.5**0.5), abs=0.02)


def test_u_lira_finds_nothing_in_one_distribution():
    rng = np.random.default_rng(9)
    ours, theirs = u_lira(rng.normal(size=(60, 50)), rng.normal(size=(60, 50)))
    assert auc(ours.ravel(), theirs.ravel()).value == pytest.approx(0.5, abs=0.03)


def test_u_lira_never_judges_a_model_by_itself():
    """A model moved far away makes others' Gaussians wide, but is not in the one it's scored by."""
    rng = np.random.default_rng(10)
    unlearned, retrained = rng.normal(size=(8, 1)), rng.normal(size=(8, 1))
    before = u_lira(unlearned, retrained, seed=3)[0]
    moved = unlearned.copy()
    moved[0] += 50
    after = u_lira(moved, retrained, seed=3)[0]
    same = np.isclose(before, after)[:, 0]
    assert same.sum() == 3 and not same[0]  # the other three of its half keep their score


def test_u_lira_of_disjoint_models_is_certain():
    rng = np.random.default_rng(11)
    ours, theirs = u_lira(rng.normal(100, 1, (4, 5)), rng.normal(0, 1, (4, 5)))
    assert (ours > 0).all() and (theirs < 0).all()


@pytest.mark.parametrize(
    ("unlearned", "retrained", "message"),
    [
        ((3, 2), (9, 2), "at least 4 models of each kind are needed, found 3 unlearned and 9"),
        ((9, 2), (3, 2), "at least 4 .* 3 retrained"),
        ((9, 2), (9, 3), r"unlearned \(9, 2\) and retrained \(9, 3\)"),
        ((9,), (9,), "models, examples"),
        ((9, 0), (9, 0), "models, examples"),
    ],
)
def test_bad_ensembles(unlearned, retrained, message):
    with pytest.raises(ValueError, match=message):
        u_lira(np.zeros(unlearned), np.zeros(retrained))


def test_equal_models_are_refused():
    with pytest.raises(ValueError, match="agree on it exactly"):
        u_lira(np.zeros((4, 2)), np.random.default_rng(0).normal(size=(4, 2)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad):
    good, wrong = [0.0, 1.0, 2.0], [0.0, bad, 2.0]
    for attack in (auc, balanced_accuracy, lambda a, b: loss_attack(a, b, fprs=())):
        for pair in ((good, wrong), (wrong, good)):
            with pytest.raises(ValueError, match="must be finite"):
                attack(*pair)
    with pytest.raises(ValueError, match=f"found {bad} in retrained"):
        check_ensembles([good], [wrong], 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: auc([], [1.0]), "members must be finite"),
        (lambda: auc([1.0], []), "nonmembers must be finite"),
        (lambda: auc([[1.0]], [1.0]), "of shape"),
        (
            lambda: auc([1.0], [1.0], confidence=1.0),
            "confidence must be between 0 and 1, found 1.0",
        ),
        (lambda: tpr_at_fpr([1.0], [1.0], 0.0), "fpr must be between 0 and 1, found 0.0"),
        (lambda: tpr_at_fpr([1.0], [1.0], 1.0), "fpr must be between 0 and 1"),
        (lambda: balanced_accuracy([1.0], [1.0, 2.0]), "members must be at least 2"),
        (lambda: balanced_accuracy([1.0, 2.0], [1.0]), "nonmembers must be at least 2"),
    ],
)
def test_bad_scores(call, message):
    with pytest.raises(ValueError, match=message):
        call()
