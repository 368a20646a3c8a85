"""The nearest-neighbour classifier against brute force in float64 and against scikit-learn."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vicreg import knn

CLASSES = 4
predict = jax.jit(knn.predict, static_argnames=("num_classes", "k", "chunk"))
accuracy = jax.jit(knn.accuracy, static_argnames=("num_classes", "ks", "chunk"))


def samples(num, dims=96, seed=0, noise=4.0):
    """Overlapping clusters, of cosines so close that all neighbours count; float32 and int32."""
    centres = np.random.default_rng(99).normal(size=(CLASSES, dims))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, num).astype(np.int32)
    return np.float32(centres[labels] + noise * rng.normal(size=(num, dims))), labels


def brute_force(features, labels, queries, k, temperature=0.07):
    """The votes `(Q, CLASSES)`, and per query how clear its k-th neighbour is."""
    unit = [
        x / np.linalg.norm(x, axis=1, keepdims=True) for x in map(np.float64, (features, queries))
    ]
    cosines = unit[1] @ unit[0].T
    votes, gaps = np.zeros((len(queries), CLASSES)), np.full(len(queries), np.inf)
    for q, row in enumerate(cosines):
        order = sorted(range(len(row)), key=lambda i: -row[i])
        for i in order[:k]:
            votes[q, labels[i]] += np.exp(row[i] / temperature)
        if k < len(row):
            gaps[q] = row[order[k - 1]] - row[order[k]]
    return votes, gaps


def decided(votes, gaps):
    """Queries that no rounding can turn."""
    best, second = np.sort(votes, axis=1)[:, ::-1][:, :2].T
    return (best - second > 1e-4 * best) & (gaps > 1e-6)


@pytest.mark.parametrize("k", [1, 2, 5, 20, 61])
@pytest.mark.parametrize("temperature", [0.07, 1.0, 0.002])
def test_predictions_are_those_of_brute_force(k, temperature):
    # At τ = 0.002 exp(s / τ) overflows float32.
    (features, labels), (queries, _) = samples(61), samples(83, seed=1)
    votes, gaps = brute_force(features, labels, queries, k, temperature)
    sure = decided(votes, gaps)
    assert np.mean(sure) > 0.95
    got = predict(
        features, labels, queries, num_classes=CLASSES, k=k, temperature=temperature, chunk=32
    )
    assert got.dtype == jnp.int32 and got.shape == (83,)
    np.testing.assert_array_equal(got[sure], np.argmax(votes, axis=1)[sure])


def test_both_the_weights_and_k_matter():
    # Else the comparisons could not tell one rule from another.
    (features, labels), (queries, _) = samples(61), samples(83, seed=1)
    one = functools.partial(predict, features, labels, queries, num_classes=CLASSES)
    usual = np.asarray(one(k=20))
    for other in (one(k=1), one(k=5), one(k=20, temperature=1.0), one(k=61, temperature=1.0)):
        assert np.mean(usual != other) > 0.05


@pytest.mark.parametrize("chunk", [1, 7, 83, 84, 1000])
def test_chunks_do_not_matter(chunk):
    (features, labels), (queries, _) = samples(61), samples(83, seed=1)
    one = functools.partial(predict, features, labels, queries, num_classes=CLASSES, k=5)
    np.testing.assert_array_equal(one(chunk=chunk), one(chunk=32))


@pytest.mark.parametrize("k", [1, 20, 200])
def test_predictions_are_those_of_scikit_learn(k):
    neighbors = pytest.importorskip("sklearn.neighbors")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = np.float32(digits.data), digits.target.astype(np.int32)
    train, test = slice(0, 1200), slice(1200, None)
    theirs = neighbors.KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(images[train].astype(np.float64), labels[train])
    expected = theirs.predict_proba(images[test].astype(np.float64))
    best, second = np.sort(expected, axis=1)[:, ::-1][:, :2].T
    sure = best - second > 1e-3
    assert np.mean(sure) > 0.98
    got = predict(images[train], labels[train], images[test], num_classes=10, k=k)
    np.testing.assert_array_equal(got[sure], theirs.classes_[np.argmax(expected, axis=1)][sure])


def test_accuracies_of_several_k_are_those_of_each():
    (features, labels), (queries, targets) = samples(300), samples(83, seed=1)
    got = accuracy(features, labels, queries, targets, num_classes=CLASSES)
    assert list(got) == [20, 200]
    for k, score in got.items():
        found = predict(features, labels, queries, num_classes=CLASSES, k=k)
        assert score.dtype == jnp.float32 and score.shape == ()
        np.testing.assert_allclose(score, np.mean(found == targets), rtol=1e-6)
    assert got[20] != got[200] and all(0.5 < score < 1 for score in got.values())
    # In any order, and outside jit.
    back = knn.accuracy(features, labels, queries, targets, num_classes=CLASSES, ks=[200, 1, 20])
    assert set(back) == {200, 1, 20} and all(back[k] == got[k] for k in (20, 200))


def test_a_sample_finds_itself():
    features, labels = samples(200)
    assert accuracy(features, labels, features, labels, num_classes=CLASSES, ks=(1,)) == {1: 1.0}


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), k=st.sampled_from([1, 8]))
def test_lengths_and_order_do_not_matter(seed, k):
    (features, labels), (queries, _) = samples(40), samples(30, seed=1)
    rng = np.random.default_rng(seed)
    order, scale = rng.permutation(40), rng.uniform(1e-4, 1e4, (40, 1)).astype(np.float32)
    one = functools.partial(predict, num_classes=CLASSES, k=k)
    expected = one(features, labels, queries)
    sure = decided(*brute_force(features, labels, queries, k))
    got = one((features * scale)[order], labels[order], queries)
    np.testing.assert_array_equal(got[sure], expected[sure])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float64])
def test_other_precisions_are_compared_in_float32(dtype):
    (features, labels), (queries, _) = samples(61), samples(83, seed=1)
    with jax.enable_x64(dtype == np.float64):
        features, queries = (np.asarray(jnp.asarray(x, dtype)) for x in (features, queries))
        got = predict(features, labels, queries, num_classes=CLASSES, k=20)
    assert got.dtype == jnp.int32
    votes, gaps = brute_force(features, labels, queries, 20)
    sure = decided(votes, gaps)
    np.testing.assert_array_equal(got[sure], np.argmax(votes, axis=1)[sure])


def test_rows_of_zeros_are_similar_to_nothing():
    features = np.array([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0]], np.float32)
    labels = np.array([2, 1, 3], np.uint8)
    queries = np.array([[1.0, 0.1], [-1.0, 0.1], [0.0, 0.0]], np.float32)
    # A query of zeros has three equal neighbours, of which the first is taken.
    one = functools.partial(predict, features, labels, queries, num_classes=CLASSES)
    assert one(k=1).tolist() == [1, 3, 2]
    # With all three voting alike, the lowest class wins; a NaN would have made it class 0.
    assert one(k=3).tolist() == [1, 3, 1]


@pytest.mark.parametrize("foreign", [-1, CLASSES, 1000])
def test_samples_of_no_class_do_not_vote(foreign):
    # Mistake: an index of -1 is the last class.
    features, labels = samples(61)
    queries, _ = samples(20, seed=1)
    labels = np.where(np.arange(61) % 3 == 0, foreign, labels).astype(np.int32)
    known = labels != foreign
    votes, gaps = brute_force(features[known], labels[known], queries, np.sum(known))
    got = predict(features, labels, queries, num_classes=CLASSES, k=61)
    sure = decided(votes, gaps)
    assert np.sum(sure) > 15
    np.testing.assert_array_equal(got[sure], np.argmax(votes, axis=1)[sure])


def test_no_queries():
    features, labels = samples(9)
    assert predict(features, labels, features[:0], num_classes=CLASSES, k=3).shape == (0,)


@pytest.mark.parametrize("num_queries", [64, 256])
def test_memory_is_bounded_by_the_chunk(num_queries):
    shapes = jnp.zeros((4096, 8)), jnp.zeros(4096, jnp.int32), jnp.zeros((num_queries, 8))
    compiled = predict.lower(*shapes, num_classes=CLASSES, k=20, chunk=16).compile()
    # Similarities, and top-k's workspace of values and indices: a few chunks of 256 KiB.
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * 16 * 4096 * 4


def test_top_k_stays_the_fast_one():
    # Where XLA-CPU sees slices of the result, it sorts whole rows instead.
    features, labels = samples(61)
    one = predict.lower(features, labels, features, num_classes=CLASSES, k=20, chunk=16)
    assert "sort(" not in one.compile().as_text()


F, L = np.zeros((4, 3), np.float32), np.zeros(4, np.int32)


def call(features=F, labels=L, queries=F, k=2, **options):
    return knn.predict(features, labels, queries, num_classes=2, k=k, **options)


@pytest.mark.parametrize(
    "wrong, found",
    [
        (lambda: call(k=5), "from 1 to the number of samples, 4, found 5"),
        (lambda: call(k=0), "found 0"),
        (lambda: call(chunk=0), "chunk .*found 0"),
        (lambda: call(F[0]), r"features .*\(3,\)"),
        (lambda: call(F.astype(int)), "features must be floats.*int"),
        (lambda: call(queries=F[0]), r"queries .*\(3,\)"),
        (lambda: call(queries=F[:, :2]), r"\(4, 3\).*\(4, 2\)"),
        (lambda: call(labels=L[:3]), r"labels .*\(4, 3\).*\(3,\)"),
        (lambda: call(labels=L.astype(np.float32)), "labels .*float32"),
        (lambda: call(F[:0], L[:0], k=1), "number of samples, 0"),
        (lambda: knn.accuracy(F, L, F, L, num_classes=2), "4, found 20, 200"),
        (lambda: knn.accuracy(F, L, F, L, num_classes=2, ks=()), "found none"),
        (lambda: knn.accuracy(F, L, F, L[:2], num_classes=2, ks=(1,)), r"query_labels .*\(2,\)"),
        (lambda: knn.accuracy(F, L, F[:0], L[:0], num_classes=2, ks=(1,)), "at least one row"),
    ],
)
def test_errors_name_what_was_found(wrong, found):
    with pytest.raises(ValueError, match=found):
        wrong()


def test_docstring_examples_run():
    assert doctest.testmod(knn).failed == 0
