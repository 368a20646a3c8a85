"""The attacks find what is there and nothing where nothing is; votes keep their ε to the letter."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits

from unlearn import adaptive
from unlearn.sisa import aggregate

# ---- with access to the networks -----------------------------------------------------------------


def ensemble(seed, shards=6, n=600, classes=4, fit=1.0):
    """Networks that are more confident of the records they were fitted to."""
    rng = np.random.default_rng(seed)
    labels, shard = rng.integers(classes, size=n), rng.integers(shards, size=n)
    logits = rng.normal(size=(shards, n, classes))
    logits[shard, np.arange(n), labels] += fit
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    return np.float32(probs), labels.astype(np.int32), shard


@pytest.mark.parametrize("transform", [lambda f, **_: f, jax.jit], ids=["eager", "jit"])
def test_targets_are_those_of_the_most_confident(transform):
    probs, labels, _ = ensemble(0, shards=5, n=37)
    attacked = 2
    guess = transform(adaptive.guess_shards)(probs, labels)
    targets = transform(lambda p, y: adaptive.choose_targets(p, y, attacked))(probs, labels)
    for record, label in enumerate(labels):
        confidence = [probs[shard, record, label] for shard in range(5)]
        best = confidence.index(max(confidence))
        assert int(guess[record]) == best
        assert bool(targets[record]) == (best < attacked)
    assert guess.dtype == jnp.int32 and targets.dtype == jnp.bool_


def test_confidence_tells_the_shard():
    probs, labels, shard = ensemble(1, n=6000, fit=3.0)
    assert np.mean(np.asarray(adaptive.guess_shards(probs, labels)) == shard) > 0.7
    probs, labels, shard = ensemble(1, n=6000, fit=0.0)
    assert abs(np.mean(np.asarray(adaptive.guess_shards(probs, labels)) == shard) - 1 / 6) < 0.03


def test_accuracies_of_the_attacked_and_the_others():
    probs, labels, _ = ensemble(2, shards=5, n=41)
    attacked, others = jax.jit(adaptive.compare_attacked, static_argnums=2)(probs, labels, 2)
    right = [np.mean(probs[shard].argmax(axis=-1) == labels) for shard in range(5)]
    assert float(attacked) == pytest.approx(np.mean(right[:2]), rel=1e-6)
    assert float(others) == pytest.approx(np.mean(right[2:]), rel=1e-6)


def kernel_attack(key, attacked=2, shards=4, classes=3, n=240):
    """The attack on an ensemble of kernel classifiers, which remember, and on fresh shards."""
    rng = np.random.default_rng(key)
    centres = 2 * np.eye(classes, 6)

    def draw(n):
        y = rng.integers(classes, size=n).astype(np.int32)
        return centres[y] + rng.normal(size=(n, 6)), y

    def predict(x, y, shard, at):
        kernel = np.exp(-2 * scipy.spatial.distance.cdist(at, x, "sqeuclidean"))
        held = (shard == np.arange(shards)[:, None])[..., None] * np.eye(classes)[y]  # (S, n, C)
        mass = kernel @ held + 1e-9
        return np.float32(mass / mass.sum(axis=-1, keepdims=True))

    (x, y), (x_test, y_test) = draw(n), draw(500)
    shard = rng.permutation(n) % shards
    targets = np.asarray(adaptive.choose_targets(predict(x, y, shard, x), y, attacked))
    x, y, shard = x[~targets], y[~targets], shard[~targets]
    return [
        [float(a) for a in adaptive.compare_attacked(predict(x, y, s, x_test), y_test, attacked)]
        for s in (shard, rng.permutation(len(x)) % shards)
    ]


def test_the_attack_shows_and_does_not_against_fresh_shards():
    trials = np.array([kernel_attack(key) for key in range(150)])
    undefended = adaptive.sign_test(*trials[:, 0].T)
    fresh = adaptive.sign_test(*trials[:, 1].T)
    assert undefended.indicator > 0.65 and undefended.p_value < 1e-5
    assert 0.4 < fresh.indicator < 0.6 and fresh.p_value > 0.01


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=60))
def test_sign_test_against_scipy(pairs):
    first, second = np.array(pairs).T
    result = adaptive.sign_test(first, second)
    below, above = np.sum(first < second), np.sum(first > second)
    assert result.indicator == pytest.approx((below + 0.5 * np.sum(first == second)) / len(pairs))
    if below + above:
        p = scipy.stats.binomtest(int(below), int(below + above), alternative="greater").pvalue
        assert result.p_value == pytest.approx(p, rel=1e-12)
    else:
        assert result.p_value == 1


def test_sign_test_of_as_many_trials_as_the_authors_have():
    first = np.arange(7200) % 2
    assert adaptive.sign_test(first, np.full(7200, 0.5)).p_value == pytest.approx(0.5, abs=0.01)
    assert adaptive.sign_test(np.zeros(7200), np.ones(7200)).p_value == 0  # 2^-7200 underflows


# ---- lookup tables -------------------------------------------------------------------------------


def lookup_oracle(distance, labels, shard, radius, shards):
    predictions = []
    for row in distance:
        votes = []
        for table in range(shards):
            held = [(d, y) for d, y, s in zip(row, labels, shard, strict=True) if s == table]
            best = min(held, default=(math.inf, None))
            votes.append(best[1] if held and best[0] <= radius else -1)
        predictions.append(max(sorted(set(votes)), key=votes.count))  # of ties, the least
    return predictions


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0, 2.0, math.inf]))
def test_lookup_tables_against_a_loop(seed, radius):
    rng = np.random.default_rng(seed)
    n, shards = 11, 3
    distance = rng.integers(0, 4, size=(n, n)).astype(np.float32)  # many ties
    labels = rng.integers(0, 3, size=n).astype(np.int32)
    shard = rng.integers(-1, shards - 1, size=n).astype(np.int32)  # a table holds none
    got = jax.jit(adaptive.lookup_predict, static_argnames="shards")(
        distance, labels, shard, radius, shards=shards
    )
    assert got.tolist() == lookup_oracle(distance, labels, shard, radius, shards)
    assert got.dtype == jnp.int32


def digits():
    x, y = load_digits(return_X_y=True)
    x, y = x[y >= 8][:330] / 16, np.int32(y[y >= 8][:330])
    distance = np.float32(scipy.spatial.distance.cdist(x, x))
    return jnp.asarray(distance), jnp.asarray(y)


def test_black_box_attack_on_digits():
    distance, labels = digits()
    key = jax.random.key(0)
    u, r = adaptive.black_box_trials(key, distance, labels, 110, radius=1.3, trials=120)
    assert u.shape == r.shape == (120,) and u.dtype == jnp.float32
    result = adaptive.sign_test(u, r)
    assert result.indicator > 0.65 and result.p_value < 1e-5
    # After few requests there is nothing to see.
    u, r = adaptive.black_box_trials(key, distance, labels, 2, radius=1.3, trials=120)
    assert adaptive.sign_test(u, r).p_value > 0.01


def test_black_box_trial_step_by_step():
    """One record a cluster, and its twins: what is deleted, and accuracies, can be told by hand."""
    # 12 records that know but themselves: a vote of one table against two unknown ones.
    distance = jnp.where(jnp.eye(12, dtype=bool), 0.0, 9.0)
    labels = jnp.zeros(12, jnp.int32)
    run = jax.jit(
        adaptive.black_box_trials, static_argnames=("deletions", "radius", "shards", "trials")
    )
    u, r = run(jax.random.key(1), distance, labels, 4, radius=1.0, trials=5)
    assert u.tolist() == r.tolist() == [0.0] * 5  # never right, so that nothing is deleted
    # In one table, every record is known: 4 are deleted, and the rest still known.
    u, r = run(jax.random.key(1), distance, labels, 4, radius=1.0, shards=1, trials=5)
    assert u.tolist() == r.tolist() == [1.0] * 5
    # Two tables, and twins: a pair is known if its records are apart. Deleting one of a pair
    # leaves the other unknown, 1 vote to 1.
    twins = jnp.abs(jnp.arange(12)[:, None] // 2 - jnp.arange(12)[None] // 2).astype(jnp.float32)
    u, r = run(jax.random.key(2), twins, labels, 1, radius=0.5, shards=2, trials=64)
    u, r = np.float64(u), np.float64(r)
    # p pairs apart are 2 p known of 12; one record dies and leaves 2 (p - 1) of 11. If p = 0, none.
    # Of fresh tables likewise, of those that live.
    alive = np.where(np.abs(r * 11 - np.round(r * 11)) < 1e-5, 11, 12)
    assert set(np.round(u * 11, 4)) <= {0, 2, 4, 6, 8, 10} and np.ptp(u) > 0
    assert set(np.round(r * alive, 4)) <= {0, 2, 4, 6, 8, 10, 12} and np.ptp(r) > 0
    assert np.all(u[alive == 12] == 0)


def test_black_box_deletes_as_many_as_asked_and_deals_evenly(monkeypatch):
    seen = []
    predict = adaptive.lookup_predict

    def spy(distance, labels, shard, radius, *, shards):
        jax.debug.callback(lambda s: seen.append(np.asarray(s)), shard, ordered=True)
        return predict(distance, labels, shard, radius, shards=shards)

    monkeypatch.setattr(adaptive, "lookup_predict", spy)
    n = 20
    labels = jnp.arange(n, dtype=jnp.int32) % 2
    distance = jnp.where(labels[:, None] == labels[None], 0.0, 9.0)  # all are predicted right
    outcome = adaptive.black_box_trials(
        jax.random.key(5), distance, labels, 6, radius=1.0, trials=8
    )
    jax.block_until_ready(outcome)
    jax.effects_barrier()
    assert len(seen) == 24
    dead = set()
    for before, after, fresh in zip(*[iter(seen)] * 3, strict=True):
        assert np.bincount(before).tolist() == [6, 6, 8]
        assert np.sum(after < 0) == 6
        np.testing.assert_array_equal(after[after >= 0], before[after >= 0])
        np.testing.assert_array_equal(fresh < 0, after < 0)
        assert np.bincount(fresh[fresh >= 0]).tolist() == [4, 4, 6]
        dead.add(tuple(np.flatnonzero(after < 0)))
        assert not np.array_equal(fresh, after)
    assert len(dead) == 8


# ---- sizes of shards -----------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.lists(st.integers(0, 9), max_size=12))
def test_sizes_tell_shards_as_often_as_is_said(seed, shards, batches):
    rng = np.random.default_rng(seed)
    request = np.repeat(np.arange(len(batches)), batches)
    shard = rng.integers(shards, size=len(request))
    lost = np.zeros((len(batches), shards), int)
    np.add.at(lost, (request, shard), 1)
    sizes = 50 + lost.sum(axis=0) - np.vstack([np.zeros((1, shards), int), lost.cumsum(axis=0)])
    order = rng.permutation(len(request))
    guess, confidence = adaptive.shard_size_attack(sizes, request[order])
    right = guess == shard[order]
    for batch in range(len(batches)):
        of = request[order] == batch
        if batches[batch]:
            assert right[of].mean() == pytest.approx(confidence[of].mean(), abs=1e-12)
            assert np.ptp(confidence[of]) == 0
    # One by one, there is no doubt.
    single = np.isin(request[order], np.flatnonzero(np.array(batches) == 1))
    assert right[single].all() and np.all(confidence[single] == 1)


# ---- noisy votes ---------------------------------------------------------------------------------


def profiles(shards, classes):
    """All ways to vote, and how many of each class."""
    ballots = np.array(list(itertools.product(range(classes), repeat=shards)))
    return ballots, (ballots[..., None] == np.arange(classes)).sum(axis=1)


def worst_loss(log_probabilities, ballots):
    """Largest log-ratio of an answer's probabilities where two voters change their votes."""
    differ = (ballots[:, None] != ballots[None]).sum(axis=-1) <= 2
    loss = (log_probabilities[:, None] - log_probabilities[None]).max(axis=-1)
    return loss[differ].max()


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 7.0])
@pytest.mark.parametrize("shards, classes", [(2, 2), (3, 2), (2, 5), (5, 3), (8, 2)])
def test_two_votes_change_no_answer_by_more_than_epsilon(shards, classes, epsilon):
    ballots, votes = profiles(shards, classes)
    p = np.asarray(adaptive.vote_probabilities(jnp.asarray(votes), epsilon))
    expected = np.exp(epsilon * votes / 4)
    np.testing.assert_allclose(p, expected / expected.sum(axis=1, keepdims=True), rtol=2e-5)
    loss = worst_loss(np.log(np.float64(p)), ballots)
    assert loss <= epsilon * (1 + 1e-5)
    # Were it calibrated to one vote, as by exp(ε · votes / 2), it would break its promise.
    naive = epsilon * votes / 2
    naive = naive - np.log(np.exp(naive).sum(axis=1, keepdims=True))
    assert worst_loss(naive, ballots) > loss
    if shards == 8:
        assert worst_loss(naive, ballots) > 1.1 * epsilon


def test_the_factor_is_reached_in_the_limit():
    """So no smaller ε can be claimed: 60 votes to none, or to two."""
    votes = jnp.asarray([[0, 60], [2, 58]])
    log_p = np.log(np.float64(adaptive.vote_probabilities(votes, 2.0)))
    assert log_p[1, 0] - log_p[0, 0] == pytest.approx(2.0, abs=1e-3)


def test_answers_are_drawn_from_these_probabilities():
    votes = jnp.asarray([[5, 3, 0], [0, 0, 9]])
    p = np.float64(adaptive.vote_probabilities(votes, 1.5))
    draws = 40_000
    many = jnp.repeat(votes, draws, axis=0)
    answers = jax.jit(adaptive.noisy_vote, static_argnums=2)(jax.random.key(0), many, 1.5)
    assert answers.dtype == jnp.int32
    for row, drawn in zip(p, np.asarray(answers).reshape(2, draws), strict=True):
        counts = np.bincount(drawn, minlength=3)
        assert scipy.stats.chisquare(counts, row / row.sum() * draws).pvalue > 1e-3


def test_it_is_gumbel_report_noisy_max_of_scale_4_over_epsilon():
    rng = np.random.default_rng(0)
    votes = np.array([5, 3, 4])
    noisy = votes + rng.gumbel(scale=4 / 0.8, size=(100_000, 3))
    counts = np.bincount(noisy.argmax(axis=1))
    p = np.float64(adaptive.vote_probabilities(jnp.asarray(votes[None]), 0.8))[0]
    assert scipy.stats.chisquare(counts, p / p.sum() * 100_000).pvalue > 1e-3


def test_much_epsilon_is_the_majority():
    probs, _, _ = ensemble(3, shards=7, n=200)
    votes = adaptive.count_votes(jnp.asarray(probs))
    assert votes.dtype == jnp.int32 and votes.shape == (200, 4)
    shares = aggregate(jnp.asarray(probs), "vote")
    np.testing.assert_allclose(np.asarray(votes) / 7, shares, rtol=1e-6)
    ordered = np.sort(np.asarray(votes), axis=1)
    clear = ordered[:, -1] > ordered[:, -2]
    assert clear.sum() > 50
    answers = adaptive.noisy_vote(jax.random.key(0), votes, 1e4)
    np.testing.assert_array_equal(answers[clear], np.argmax(shares, axis=1)[clear])


# ---- bad input -----------------------------------------------------------------------------------

P, Y = jnp.full((4, 6, 3), 1 / 3), jnp.zeros(6, jnp.int32)
D = jnp.zeros((6, 6))
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: adaptive.guess_shards(P[0], Y), r"found \(6, 3\) and \(6,\)"),
        (lambda: adaptive.guess_shards(P, Y[:5]), r"found \(4, 6, 3\) and \(5,\)"),
        (lambda: adaptive.choose_targets(P, Y, 4), r"attacked must be in 1\.\.3, found 4"),
        (lambda: adaptive.compare_attacked(P, Y, 0), "found 0"),
        (lambda: adaptive.compare_attacked(P, Y[:1], 1), r"\(1,\)"),
        (lambda: adaptive.sign_test([1, 2], [1]), r"found \(2,\) and \(1,\)"),
        (lambda: adaptive.sign_test([], []), r"\(0,\)"),
        (lambda: adaptive.black_box_trials(KEY, D[:5], Y, 1, radius=1.0), r"found \(5, 6\)"),
        (lambda: adaptive.black_box_trials(KEY, D, Y, 6, radius=1.0), "found 6 and 3"),
        (lambda: adaptive.black_box_trials(KEY, D, Y, 4, radius=1.0), "found 4 and 3"),
        (lambda: adaptive.black_box_trials(KEY, D, Y, 0, radius=1.0), "found 0 and 3"),
        (lambda: adaptive.shard_size_attack([[3, 3], [3, 4]], [0]), "never grow"),
        (lambda: adaptive.shard_size_attack([[3, 3], [3, 2]], [0, 0]), r"\[1\] .* but \[2\]"),
        (lambda: adaptive.shard_size_attack([[3, 3], [3, 2]], [1]), r"\[1\] .* but \[0 1\]"),
        (lambda: adaptive.noisy_vote(KEY, Y[None], 0.0), "epsilon must be above 0, found 0"),
        (lambda: adaptive.vote_probabilities(Y[None], -1.0), "found -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
