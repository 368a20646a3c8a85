"""Losses of one record against float64 in NumPy; their sums and derivatives against autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from unlearn.convex import FunctionLoss, linear_loss
from unlearn.losses import cross_entropy, logistic, softmax_regression, squared
from unlearn.records import as_ids, as_mask, as_records, which

FUNCTIONS = {"logistic": logistic, "softmax": softmax_regression, "ridge": squared}
NAMES = list(FUNCTIONS)


def brute_cross_entropy(logits, label):
    logits = np.float64(logits)
    return -np.log(np.exp(logits - logits.max())[label] / np.exp(logits - logits.max()).sum())


def problem(name, n, d, classes=3, seed=0, scale=1.0):
    """The loss summed by hand, the same as a function, weights, features and targets."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d)) * scale
    y = {
        "logistic": rng.choice([-1.0, 1.0], n),
        "softmax": rng.integers(0, classes, n),
        "ridge": rng.normal(size=n),
    }[name]
    loss = linear_loss(name, classes if name == "softmax" else None)
    shape = (d, classes) if name == "softmax" else (d,)
    return loss, FunctionLoss(FUNCTIONS[name], shape), rng.normal(size=np.prod(shape)), x, y


# ---- losses of one record ------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [1, 2, 7, 1001])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_cross_entropy_of_a_batch(classes, transform):
    rng = np.random.default_rng(classes)
    logits = np.float32(rng.normal(size=(13, classes)) * 5)
    labels = rng.integers(0, classes, 13)
    got = transform(jax.vmap(cross_entropy))(jnp.asarray(logits), jnp.asarray(labels))
    want = [brute_cross_entropy(row, label) for row, label in zip(logits, labels, strict=True)]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)
    assert got.dtype == jnp.float32


def test_cross_entropy_has_the_usual_gradient():
    logits = jnp.array([1.0, -2.0, 0.5])
    want = jax.nn.softmax(logits) - jax.nn.one_hot(1, 3)
    np.testing.assert_allclose(jax.grad(cross_entropy)(logits, jnp.array(1)), want, rtol=1e-6)


def test_cross_entropy_of_extreme_and_narrow_logits():
    assert float(cross_entropy(jnp.array([1e30, -1e30]), jnp.array(0))) == 0
    assert float(cross_entropy(jnp.array([80.0, 0.0], jnp.bfloat16), jnp.array(1))) == 80
    assert cross_entropy(jnp.zeros(3, jnp.bfloat16), jnp.array(1)).dtype == jnp.float32


@pytest.mark.parametrize("label", [-1, 3, 2**30])
def test_a_label_that_is_no_class_is_not_taken_for_another(label):
    assert np.isnan(cross_entropy(jnp.zeros(3), jnp.array(label)))


@settings(max_examples=60, deadline=None)
@given(st.floats(-200, 200, width=32), st.sampled_from([-1, 1]))
def test_logistic_and_squared(z, y):
    w, x = np.float32([z, 0.5]), np.float32([1, 2])
    margin = np.float64(y) * (np.float64(z) + 1)
    assert float(logistic(w, x, jnp.array(y))) == pytest.approx(
        np.logaddexp(0, -margin), rel=1e-5, abs=1e-30
    )
    assert float(squared(w, x, jnp.array(y))) == pytest.approx(
        (np.float64(z) + 1 - y) ** 2 / 2, rel=1e-4, abs=1e-4
    )


def test_softmax_regression_of_two_classes_is_logistic():
    _, _, w, x, y = problem("logistic", 9, 4)
    both = jnp.stack([jnp.zeros(4), jnp.asarray(w, jnp.float32)], axis=1)
    x, labels = jnp.float32(x), jnp.asarray((y + 1) / 2, jnp.int32)
    got = jax.vmap(softmax_regression, (None, 0, 0))(both, x, labels)
    want = jax.vmap(logistic, (None, 0, 0))(both[:, 1], x, jnp.float32(y))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_entropy(jnp.zeros((2, 3)), jnp.array(0)), r"\(C,\).*float32\[2, 3\]"),
        (lambda: cross_entropy(jnp.zeros(3), jnp.array(0.0)), r"integer, found .*float32\[\]"),
        (lambda: logistic(jnp.zeros(3), jnp.zeros(2), jnp.array(1)), r"found \[3\] and \[2\]"),
        (lambda: squared(jnp.zeros((3, 1)), jnp.zeros(3), jnp.array(1)), "1 axes"),
        (lambda: softmax_regression(jnp.zeros(3), jnp.zeros(3), jnp.array(1)), "2 axes"),
    ],
)
def test_wrong_shapes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- sums and derivatives ------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (7, 3), (4, 9), (33, 5)])
def test_derivatives_by_hand_are_those_of_autodiff(name, n, d):
    loss, function, w, x, y = problem(name, n, d)
    v = np.random.default_rng(1).normal(size=w.size)
    for by_hand, automatic in [
        (loss.gradient(w, x, y), function.gradient(w, x, y)),
        (loss.gradients(w, x, y), function.gradients(w, x, y)),
        (loss.hessian(w, x, y), function.hessian(w, x, y)),
        (loss.product(w, x, y)(v), function.product(w, x, y)(v)),
        (loss.product(w, x, y)(v), loss.hessian(w, x, y) @ v),
        (loss.gradients(w, x, y).sum(axis=0), loss.gradient(w, x, y)),
    ]:
        assert by_hand.dtype == automatic.dtype == np.float64
        assert by_hand.shape == automatic.shape
        np.testing.assert_allclose(by_hand, automatic, rtol=1e-11, atol=1e-12)


def test_64_bits_are_not_left_switched_on():
    _, function, w, x, y = problem("logistic", 5, 2)
    function.gradient(w, x, y)
    assert jnp.ones(2).dtype == jnp.float32


# ---- constants -----------------------------------------------------------------------------------


def test_the_logistic_constants_are_suprema():
    """|σ''| has the supremum 1/(6√3) = 0.0962, not the 1/4 of the authors' code."""
    loss = linear_loss("logistic")
    z = np.linspace(-20, 20, 2_000_001)
    s = 1 / (1 + np.exp(-z))
    second, third = s * (1 - s), s * (1 - s) * (1 - 2 * s)
    assert np.abs(third).max() == pytest.approx(loss.twist, rel=1e-9)
    assert np.abs(third).max() <= loss.twist * (1 + 1e-12)
    assert loss.twist == pytest.approx(0.09622504486493763)
    assert second.max() == pytest.approx(loss.curvature) and second.max() <= loss.curvature


def third_moment(p, u):
    """The third derivative of log Σ exp at logits log p along u; also D²(uᵀD²f u) by autodiff."""
    return p @ (u - p @ u) ** 3


@pytest.mark.parametrize("classes", [2, 3, 6])
def test_the_softmax_constant_is_the_supremum(classes):
    loss = linear_loss("softmax", classes)

    def negative(parameters):
        logits, u = np.split(parameters, 2)
        p = np.exp(logits - logits.max())
        return -third_moment(p / p.sum(), u / np.linalg.norm(u))

    rng = np.random.default_rng(classes)
    found = [minimize(negative, rng.normal(size=2 * classes) * 2).fun for _ in range(20)]
    assert -min(found) == pytest.approx(loss.twist, rel=1e-5)
    assert -min(found) <= loss.twist * (1 + 1e-9)


def test_the_third_moment_is_the_third_derivative():
    logits, u = np.array([0.3, -1.0, 0.8, 0.0]), np.array([1.0, -0.4, 0.2, 2.0])
    with jax.enable_x64(True):
        f = lambda t: jax.nn.logsumexp(logits + t * u)  # noqa: E731
        third = jax.grad(jax.grad(jax.grad(f)))(0.0)
    p = np.exp(logits) / np.exp(logits).sum()
    assert third_moment(p, u) == pytest.approx(float(third), rel=1e-10)


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(["logistic", "softmax"]),
    st.integers(2, 6),
    st.integers(0, 999),
    st.floats(-2, 2),
)
def test_hessians_are_as_lipschitz_as_stated(name, classes, seed, size):
    """Of one record between any two weights, and the slope and curvature within their bounds."""
    loss, _, w, x, y = problem(name, 1, 2, classes, seed)
    v = w + np.random.default_rng(seed + 1).normal(size=w.size) * 10**size
    difference = np.linalg.norm(loss.hessian(v, x, y) - loss.hessian(w, x, y), 2)
    row = np.linalg.norm(x)
    assert difference <= loss.twist * row**3 * np.linalg.norm(v - w) * (1 + 1e-9)
    assert np.linalg.norm(loss.hessian(w, x, y), 2) <= loss.curvature * row**2 * (1 + 1e-9)
    assert np.linalg.norm(loss.gradient(w, x, y)) <= loss.slope * row * (1 + 1e-9)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(NAMES),
    st.integers(1, 9),
    st.integers(0, 999),
    st.sampled_from([1e-3, 1.0, 30.0]),
    st.sampled_from([0.01, 1.0, 10.0]),
)
def test_the_remainder_bounds_what_a_linear_model_of_the_gradient_misses(name, n, seed, a, b):
    loss, _, w, x, y = problem(name, n, 3, seed=seed, scale=a)
    s = np.random.default_rng(seed).normal(size=w.size) * b
    before, after = loss.gradient(w, x, y), loss.gradient(w + s, x, y)
    missed = np.linalg.norm(after - before - loss.hessian(w, x, y) @ s)
    rounding = 1e-13 * (loss.scale(w, x, y) + loss.scale(w + s, x, y))
    assert missed <= loss.remainder(s, x, np.linalg.norm(x, 2)) * (1 + 1e-9) + rounding


@pytest.mark.parametrize("name", ["logistic", "softmax"])
def test_the_remainder_is_attained(name):
    """One row many times, at the inflexion of the curvature: a constant 1 % smaller is no bound."""
    loss = linear_loss(name, 2 if name == "softmax" else None)
    steepest = np.log((1 + 1 / np.sqrt(3)) / (1 - 1 / np.sqrt(3)))  # logit of p with largest σ''
    w, s = np.array([steepest]), np.array([-1e-3])
    if name == "softmax":
        w, s = np.array([0, steepest]), np.array([1e-3, -1e-3])
    x, y = np.ones((50, 1)), np.ones(50, np.int64)
    missed = loss.gradient(w + s, x, y) - loss.gradient(w, x, y) - loss.hessian(w, x, y) @ s
    bound = loss.remainder(s, x, np.sqrt(50))
    assert 0.99 * bound < np.linalg.norm(missed) <= bound * (1 + 1e-7)


# ---- records -------------------------------------------------------------------------------------


def test_masks_and_indices_in_any_order():
    want = np.array([True, False, False, True])
    for removed in (want, [3, 0], [3, 0, 3], np.array([0, 3], np.uint8)):
        np.testing.assert_array_equal(as_mask(removed, 4), want)
    assert not as_mask((), 4).any()
    np.testing.assert_array_equal(which(np.array([7, 9, 8, 1]), [1, 7, 1]), want)
    np.testing.assert_array_equal(which(np.array(["a", "b", "c", "d"]), ["d", "a"]), want)
    assert not which(np.array(["a", "b"]), []).any()


def test_types_of_records():
    x, y = as_records(linear_loss("softmax", 3), np.ones((2, 1), np.float32), [2, 0])
    assert x.dtype == np.float64 and y.dtype == np.int64
    assert as_records(linear_loss("ridge"), np.ones((2, 1)), [2, 0])[1].dtype == np.float64
    assert as_records(FunctionLoss(squared, (1,)), np.ones((2, 1)), [2, 0])[1].dtype == np.int64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_loss("hinge"), "logistic, softmax or ridge, found 'hinge'"),
        (lambda: linear_loss("softmax"), "classes must be 2 at least for softmax.* found None"),
        (lambda: linear_loss("softmax", 1), "found 1"),
        (lambda: linear_loss("logistic", 3), "found 3"),
        (lambda: as_mask([0, 4, -1], 4), r"from 0 to 3, found \[-1, 4\]"),
        (lambda: as_mask([0.0], 4), "mask or indices, found float64"),
        (lambda: as_mask([True], 4), r"shape \(4,\), found \(1,\)"),
        (lambda: as_ids([1, 2, 1], 3), r"unique, found \[1\]"),
        (lambda: as_ids([1, 2], 3), r"3 integers or strings, found int64\(2,\)"),
        (lambda: as_ids([1.0], 1), "found float64"),
        (lambda: which(np.array([5, 6]), [6, 7]), r"that remain, found \[7\]"),
        (lambda: which(np.array([0, 1]), [True, False]), "type int64, found bool"),
        (lambda: which(np.array([0, 1]), ["1"]), "type int64, found <U1"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("name", "x", "y", "message"),
    [
        ("ridge", [[1.0], [np.nan], [2.0]], [0, 0, 0], "features must be finite; those of row 1"),
        ("ridge", [[1.0], [2.0]], [0, np.inf], "targets must be finite; those of row 1"),
        ("ridge", [[1.0]], [0, 0], r"as many, found \(1, 1\) and \(2,\)"),
        ("ridge", np.zeros((0, 2)), [], "as many"),
        ("ridge", [1.0, 2.0], [0, 0], r"\(n, d\), targets \(n,\)"),
        ("ridge", [["a"]], [0], "real numbers, found <U1"),
        ("logistic", [[1.0], [2.0]], [0, 1], "labels must be -1 or 1, found 0"),
        ("softmax", [[1.0], [2.0]], [0, 3], "labels must be from 0 to 2, found 3"),
        ("softmax", [[1.0], [2.0]], [0, 0.5], "found 0.5"),
    ],
)
def test_bad_records_are_named(name, x, y, message):
    with pytest.raises(ValueError, match=message):
        as_records(linear_loss(name, 3 if name == "softmax" else None), x, y)
