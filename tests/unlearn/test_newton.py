"""Newton-step removal against retraining, brute-force Hessians and figures worked out by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import norm as gaussian_distribution

from unlearn.convex import FunctionLoss, linear_loss
from unlearn.gaussian import allowed_distance, gaussian_delta, noise
from unlearn.losses import logistic, softmax_regression, squared
from unlearn.newton import Mechanism, fit, newton_step, publish, release
from unlearn.sensitivity import (
    Constants,
    constants,
    deletion_capacity,
    excess_risk,
    noise_scale,
    sensitivity,
)
from unlearn.solvers import choose_method, minimise, solve

FUNCTIONS = {"logistic": logistic, "softmax": softmax_regression, "ridge": squared}
NAMES = list(FUNCTIONS)
CLASSES = 3


def problem(name, n=40, d=4, seed=0):
    """Features in the unit ball, targets, and the weights to start from."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    x /= np.maximum(1, np.linalg.norm(x, axis=1, keepdims=True))
    y = {
        "logistic": np.where(x @ rng.normal(size=d) > rng.normal(size=n) / 2, 1, -1),
        "softmax": rng.integers(0, CLASSES, n),
        "ridge": rng.uniform(-1, 1, n),
    }[name]
    return x, y, np.zeros((d, CLASSES) if name == "softmax" else d)


def bounds(name, lam=0.1, row_norm=1.0):
    classes = CLASSES if name == "softmax" else None
    return constants(name, lam, row_norm, classes=classes, target=1.0 if name == "ridge" else None)


def mechanism(name, n=40, m=10, lam=0.1, **options):
    given = options.pop("given", None) or bounds(name, lam)
    return Mechanism(name, given, 1.0, 1e-5, n, m, **options)


def objective(name, x, y, lam):
    """The mean of f and its gradient, in NumPy, for SciPy to minimise."""

    def value(w):
        if name == "softmax":
            z = x @ w.reshape(x.shape[1], CLASSES)
            top = z.max(axis=1, keepdims=True)
            p = np.exp(z - top)
            losses = np.log(p.sum(axis=1)) + top[:, 0] - z[np.arange(len(y)), y]
            slopes = p / p.sum(axis=1, keepdims=True) - np.eye(CLASSES)[y]
        elif name == "logistic":
            losses, slopes = np.logaddexp(0, -y * (x @ w)), -y / (1 + np.exp(y * (x @ w)))
        else:
            losses, slopes = (x @ w - y) ** 2 / 2, x @ w - y
        gradient = (x.T @ slopes).ravel() / len(x) + lam * w
        return losses.mean() + lam / 2 * w @ w, gradient

    return value


def retrained(name, x, y, w, lam):
    options = {"ftol": 1e-30, "gtol": 1e-13, "maxiter": 10_000}
    found = minimize(
        objective(name, x, y, lam), np.zeros(w.size), jac=True, method="L-BFGS-B", options=options
    )
    assert np.abs(found.jac).max() < 1e-7
    loss = linear_loss(name, CLASSES if name == "softmax" else None)
    last_digits, _ = minimise(loss, found.x, x, y, lam, 1e-12 * len(x))
    return last_digits.reshape(w.shape)


# ---- the step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("removed", [[3], [0, 39, 17, 5, 5], list(range(10))], ids=len)
def test_the_step_is_that_of_the_paper(name, removed):
    """Ĥ and the gradients built record by record, with the Hessian of all minus those removed."""
    x, y, w = problem(name)
    how = mechanism(name)
    w_hat = fit(how, w, x, y)
    n, m, lam = len(x), len(set(removed)), how.constants.lam
    f = FunctionLoss(FUNCTIONS[name], w.shape)
    flat = w_hat.ravel()
    hessians = [f.hessian(flat, x[[i]], y[[i]]) + lam * np.eye(w.size) for i in range(n)]
    slopes = [f.gradient(flat, x[[i]], y[[i]]) + lam * flat for i in range(n)]
    whole = sum(hessians) / n
    remaining = (n * whole - sum(hessians[i] for i in set(removed))) / (n - m)
    total = sum(slopes[i] for i in set(removed))
    want = flat + np.linalg.solve(remaining, total) / (n - m)
    got = newton_step(how, w_hat, x, y, removed)
    assert got.shape == w.shape and got.dtype == np.float64
    np.testing.assert_allclose(got.ravel(), want, rtol=1e-9, atol=1e-10)
    mask = np.isin(np.arange(n), removed)
    np.testing.assert_array_equal(newton_step(how, w_hat, x, y, mask), got)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("lam", [0.5, 0.01])
@pytest.mark.parametrize("m", [1, 20])
def test_the_step_ends_within_its_sensitivity_of_retraining(name, lam, m):
    x, y, w = problem(name)
    how = mechanism(name, m=20, lam=lam)
    w_hat = fit(how, w, x, y)
    removed = np.argsort(x[:, 0])[-m:]  # not at random
    want = retrained(name, np.delete(x, removed, 0), np.delete(y, removed), w, lam)
    missed = np.linalg.norm(newton_step(how, w_hat, x, y, removed) - want)
    assert missed <= sensitivity(40, m, how.constants, tolerance=how.tolerance, variant="tight")
    moved = np.linalg.norm(w_hat - want)
    assert missed < (1e-8 if name == "ridge" else 0.5 * moved)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(["logistic", "softmax"]),
    seed=st.integers(0, 999),
    lam=st.sampled_from([1.0, 0.1, 1e-3]),
    n=st.integers(2, 30),
    row_norm=st.sampled_from([0.1, 1.0, 10.0]),
    data=st.data(),
)
def test_the_sensitivity_is_never_exceeded(name, seed, lam, n, row_norm, data):
    m = data.draw(st.integers(1, n // 2))
    x, y, w = problem(name, n, 3, seed)
    x *= row_norm
    how = mechanism(name, n, m, lam, given=bounds(name, lam, row_norm), tolerance=1e-9)
    w_hat = fit(how, w, x, y)
    got = newton_step(how, w_hat, x, y, range(m))
    loss = linear_loss(name, CLASSES if name == "softmax" else None)
    want, _ = minimise(loss, w.ravel(), x[m:], y[m:], lam, 1e-9 * (n - m))
    missed = np.linalg.norm(got.ravel() - want)
    tight = sensitivity(n, m, how.constants, tolerance=1e-9, variant="tight")
    assert missed <= tight <= sensitivity(n, m, how.constants, tolerance=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_function_gives_what_the_name_does(name):
    x, y, w = problem(name)
    named = mechanism(name)
    given = dataclasses.replace(named, loss=FUNCTIONS[name], convex=True)
    w_hat = fit(named, w, x, y)
    np.testing.assert_allclose(fit(given, w, x, y), w_hat, atol=1e-8)
    for method in ("cholesky", "cg"):
        np.testing.assert_allclose(
            newton_step(given, w_hat, x, y, [1, 2], method=method),
            newton_step(named, w_hat, x, y, [1, 2], method=method),
            atol=1e-9,
        )


def test_any_convex_function_of_any_records():
    """A pseudo-Huber loss of images and two targets: |third derivative| < 1, slope < 1."""

    def loss(w, image, target):
        return jnp.sum(jnp.sqrt(1 + jnp.square(jnp.tensordot(image, w, 2) - target)) - 1)

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(30, 2, 3)) / 3, rng.normal(size=(30, 2))
    how = Mechanism(loss, Constants(0.2, 20.0, 20.0), 1.0, 1e-5, 30, 5, convex=True)
    w_hat = fit(how, np.zeros((2, 3, 2)), x, y)
    got = newton_step(how, w_hat, x, y, [4, 7])
    want = fit(how, np.zeros((2, 3, 2)), np.delete(x, [4, 7], 0), np.delete(y, [4, 7], 0))
    assert got.shape == (2, 3, 2)
    assert np.linalg.norm(got - want) < 0.1 * np.linalg.norm(w_hat - want)


# ---- noise ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_noise_is_the_same_with_and_without_removals(name):
    x, y, w = problem(name)
    how = mechanism(name)
    w_hat, key = fit(how, w, x, y), jax.random.key(3)
    drawn = publish(how, w_hat, x, y, key) - w_hat
    assert np.abs(drawn).min() > 0
    for removed in ([1], range(10)):
        rest = newton_step(how, w_hat, x, y, removed)
        np.testing.assert_allclose(release(how, w_hat, x, y, removed, key) - rest, drawn, rtol=1e-6)
    # What it is compared with: a model of the records that remain, published.
    x, y = x[10:], y[10:]
    w_hat = fit(how, w, x, y)
    np.testing.assert_allclose(publish(how, w_hat, x, y, key) - w_hat, drawn, rtol=1e-6)


def test_noise_has_the_scale_asked_for_and_is_normal_in_float64():
    drawn = noise(jax.random.key(0), (100, 200), 3.0)
    assert drawn.dtype == np.float64 and drawn.shape == (100, 200)
    assert np.unique(drawn).size == drawn.size  # float32 has fewer different values
    assert drawn.std() == pytest.approx(3, rel=0.02) and abs(drawn.mean()) < 0.1
    order = np.sort(drawn.ravel())
    expected = gaussian_distribution.cdf(order / 3)
    assert np.abs(expected - np.arange(drawn.size) / drawn.size).max() < 1.63 / drawn.size**0.5
    assert jnp.ones(1).dtype == jnp.float32


def test_sigma_is_that_of_the_paper():
    """γ = 2 · 0.25 · 2² · 10² / (0.5³ · 100²) = 0.16, and √(2 ln(1.25/0.01)) = 3.1075."""
    given = Constants(0.5, 2.0, 0.25)
    assert sensitivity(100, 10, given) == pytest.approx(0.16, rel=1e-12)
    assert noise_scale(100, 10, given, 0.5, 0.01) == pytest.approx(0.16 / 0.5 * 3.1075, rel=1e-4)
    # (n - m) for n/2, and half: 0.25 · 2² · 10² / (2 · 0.5³ · 90²) = 0.04938…
    assert sensitivity(100, 10, given, variant="tight") == pytest.approx(100 / 2025, rel=1e-12)
    assert sensitivity(100, 50, given) == pytest.approx(
        sensitivity(100, 50, given, variant="tight"), rel=1e-12
    )
    assert sensitivity(100, 0, given) == 0


def test_a_minimum_that_is_off_is_paid_for():
    """By the tolerance, along a feature that is always zero: by τ/λ, and n/(n - m) of it remain."""
    x, y, w = problem("ridge")
    x[:, 3] = 0
    how = mechanism("ridge", tolerance=1e-3)
    off = fit(dataclasses.replace(how, tolerance=1e-12), w, x, y)
    off[3] += 0.99e-3 / 0.1
    want = retrained("ridge", x[10:], y[10:], w, 0.1)
    missed = np.linalg.norm(newton_step(how, off, x, y, range(10)) - want)
    assert missed == pytest.approx(0.99e-2 * 40 / 30, rel=1e-6)
    assert sensitivity(40, 10, how.constants) == 0
    # The other two are for the linear system and the model compared with.
    paid = sensitivity(40, 10, how.constants, tolerance=1e-3)
    assert paid == pytest.approx(1e-2 * (40 / 30 + 2))
    assert how.sigma == noise_scale(40, 10, how.constants, 1.0, 1e-5, tolerance=1e-3) > 0


@settings(max_examples=200, deadline=None)
@given(st.floats(1e-3, 100), st.floats(1e-12, 0.99), st.sampled_from([1.25, 1.5]))
def test_the_allowed_distance_keeps_epsilon_and_delta(epsilon, delta, numerator):
    distance = allowed_distance(epsilon, delta, numerator)
    assert gaussian_delta(distance, epsilon) <= delta * (1 + 1e-6)
    closed = epsilon / math.sqrt(2 * math.log(numerator / delta))
    assert distance <= closed
    if epsilon <= 3:
        assert distance == closed


def test_the_closed_form_fails_at_large_epsilon():
    closed = 10 / math.sqrt(2 * math.log(1.5 / 1e-4))
    assert gaussian_delta(closed, 10.0) > 2e-4
    assert gaussian_delta(allowed_distance(10.0, 1e-4, 1.5), 10.0) == pytest.approx(1e-4, rel=1e-6)


def test_gaussian_delta_by_integration():
    """∫ max(0, p - e^ε q) of densities of N(0, 1) and N(s, 1)."""
    grid = np.linspace(-12, 12, 2_000_001)
    for s, epsilon in [(0.3, 0.5), (1.0, 1.0), (4.0, 3.0)]:
        p, q = np.exp(-(grid**2) / 2), np.exp(-((grid - s) ** 2) / 2)
        want = np.maximum(0, p - math.exp(epsilon) * q).sum() * (grid[1] - grid[0])
        assert gaussian_delta(s, epsilon) == pytest.approx(want / math.sqrt(2 * math.pi), rel=1e-5)


# ---- constants and capacity ----------------------------------------------------------------------


def test_constants_worked_out_by_hand():
    got = constants("logistic", 0.02, 2.0)  # √(2 · 0.02 · ln 2) = 0.16651
    assert got.lipschitz == pytest.approx(2.166511, abs=1e-6)
    assert got.hessian_lipschitz == pytest.approx(8 * 0.0962250, rel=1e-6)
    assert constants("logistic", 100.0, 2.0).lipschitz == 4  # the other bound is the smaller
    got = constants("softmax", 0.02, 1.0, classes=10)  # √2 + √(2 · 0.02 · ln 10) = 1.71770
    assert got.lipschitz == pytest.approx(1.7177, abs=1e-4)
    assert got.hessian_lipschitz == pytest.approx(0.272166, abs=1e-6)
    got = constants("ridge", 0.25, 2.0, target=3.0)  # ‖ŵ‖ ≤ 3; 2 (2 · 3 + 3) + 0.25 · 3
    assert got.lipschitz == 18.75 and got.hessian_lipschitz == 0


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 999),
    lam=st.sampled_from([1e-4, 0.01, 1.0, 30.0]),
    n=st.integers(1, 12),
)
def test_gradients_at_the_minimum_are_within_l(name, seed, lam, n):
    x, y, w = problem(name, n, 3, seed)
    loss = linear_loss(name, CLASSES if name == "softmax" else None)
    w_hat, _ = minimise(loss, w.ravel(), x, y, lam, 1e-9)
    steepest = np.linalg.norm(loss.gradients(w_hat, x, y) + lam * w_hat, axis=1).max()
    assert steepest <= bounds(name, lam).lipschitz + 1e-9


def test_capacity_worked_out_by_hand():
    """γ = 2 · 100 · 10⁻² m² / 10¹⁰ = 2e-10 m²: at L = 0.1, σ √d L = 2e-11 m² · 4.8448 · 10 and

    4L²/(λn) = 4e-7, mL²/(λ(n - m)) ≈ 1e-7 m. A limit of 1e-3 is passed where
    9.69e-10 m² + 1e-7 m (1 + m/n) = 9.996e-4, at m = 964.9.
    """
    given = Constants(1.0, 0.1, 100.0)
    delta = 1.25 * math.exp(-(4.8448**2) / 2)
    got = deletion_capacity(100_000, 100, given, 1.0, delta, excess=1e-3)
    assert got == 964
    risk = 4e-7 + 0.01 * got / (100_000 - got) + 2e-11 * got**2 * 48.448
    assert excess_risk(100_000, got, 100, given, 1.0, delta) == pytest.approx(risk, rel=1e-9)


@pytest.mark.parametrize("variant", ["paper", "tight"])
@pytest.mark.parametrize("excess", [1e-3, 0.01, 0.1, 10.0])
def test_capacity_is_the_largest_of_all(variant, excess):
    given = Constants(0.5, 0.3, 5.0)
    risks = [excess_risk(300, m, 7, given, 0.5, 1e-3, variant=variant) for m in range(151)]
    within = [m for m, risk in enumerate(risks) if risk <= excess]
    got = deletion_capacity(300, 7, given, 0.5, 1e-3, excess=excess, variant=variant)
    assert got == max(within, default=0)


def test_capacity_grows_as_the_theorem_says():
    """As n √ε / (d ln(1.25/δ))^¼ where noise is what costs."""
    given = Constants(1.0, 1e-3, 1e12)
    capacity = lambda n, d, epsilon, delta: deletion_capacity(n, d, given, epsilon, delta)  # noqa: E731
    base = capacity(10**9, 100, 0.1, 1e-5)
    factor = math.sqrt(0.01 / (2 * math.sqrt(2) * 1e12 * 1e-9))
    predicted = 1e9 * math.sqrt(0.1) / (100 * math.log(1.25e5)) ** 0.25 * factor
    assert base == pytest.approx(predicted, rel=1e-3)
    assert capacity(10**10, 100, 0.1, 1e-5) == pytest.approx(10 * base, rel=1e-3)
    assert capacity(10**9, 1600, 0.1, 1e-5) == pytest.approx(base / 2, rel=1e-3)
    assert capacity(10**9, 100, 0.4, 1e-5) == pytest.approx(2 * base, rel=1e-3)


# ---- solvers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(9, 4), (3, 8)], ids=str)
@pytest.mark.parametrize("method", ["cholesky", "cg"])
def test_both_solvers_solve(name, shape, method):
    x, y, w = problem(name, *shape)
    rng = np.random.default_rng(2)
    loss, w = linear_loss(name, CLASSES if name == "softmax" else None), rng.normal(size=w.size)
    target = rng.normal(size=w.size)
    got, left_over = solve(loss, w, x, y, 0.3, target, method=method)
    hessian = loss.hessian(w, x, y) + 0.3 * np.eye(w.size)
    np.testing.assert_allclose(got, np.linalg.solve(hessian, target), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(left_over, target - hessian @ got, atol=1e-14)


def test_the_solver_is_chosen_by_size():
    assert choose_method(2048) == "cholesky" and choose_method(2049) == "cg"


def test_newton_minimises_what_is_badly_scaled_and_separable():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 5)) * [1e-3, 1, 1, 100, 1e3]
    y = np.where(x[:, 1] > 0, 1, -1)
    loss = linear_loss("logistic")
    for lam in (1e-9, 1e-3, 1e3):
        w, norm = minimise(loss, np.zeros(5), x, y, lam, 1e-8)
        gradient = loss.gradient(w, x, y) + 30 * lam * w
        assert np.linalg.norm(gradient) <= 1e-8 and norm <= 1e-8


# ---- conditions that aren't met ------------------------------------------------------------------


def refused(message, name="logistic", change=None, removed=(1,), **options):
    x, y, w = problem(name)
    how = mechanism(name, **options)
    w_hat = fit(how, w, x, y)
    arrays = {"w": w_hat, "x": x, "y": y} | (change(w_hat, x, y) if change else {})
    with pytest.raises(ValueError, match=message):
        newton_step(how, arrays["w"], arrays["x"], arrays["y"], removed)


def test_more_removals_than_the_noise_is_for():
    refused("for 10 removals of 40 records.*found 11", removed=range(11))
    with pytest.raises(ValueError, match=r"from 0 to n/2 = 20, found 21"):
        mechanism("logistic", m=21)


def test_fewer_records_than_the_noise_is_for():
    refused("for 41 records before removals, found 40", n=41)


def test_weights_that_are_no_minimum():
    refused("must be the minimum.* norm 0.0", change=lambda w, x, y: {"w": w + 1e-3})
    refused("must be the minimum", change=lambda w, x, y: {"w": w * 0}, removed=())


def test_rows_and_gradients_beyond_the_constants():
    given = bounds("logistic", 0.1, 0.5)
    x, y, w = problem("logistic")
    with pytest.raises(ValueError, match="norm 0.5 at most, as the constants assume; found 1"):
        fit(mechanism("logistic", given=given), w, x, y)
    refused("L-Lipschitz with L = 0.01: .* norm 0", given=Constants(0.1, 0.01, 1.0))


def test_lambda_must_be_positive():
    for lam in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="strongly convex: lam above 0"):
            Constants(lam, 1.0, 1.0)
        with pytest.raises(ValueError, match="strongly convex: lam above 0"):
            constants("logistic", lam, 1.0)


def wavy(w, x, y):
    return jnp.cos(jnp.dot(w, x) - y)


def test_a_loss_must_be_declared_convex():
    with pytest.raises(ValueError, match="must be convex.*neural networks.*convex=True"):
        Mechanism(wavy, Constants(0.1, 1.0, 1.0), 1.0, 1e-5, 40, 10)


@pytest.mark.parametrize("method", ["cholesky", "cg"])
def test_negative_curvature_is_found_where_convexity_was_declared_wrongly(method):
    x, _, w = problem("ridge")
    # At w = 0 the slopes of two records cancel, and both have negative curvature: no minimum.
    x, y = np.repeat(x[:20], 2, axis=0), np.tile([0.3, -0.3], 20)
    how = Mechanism(wavy, Constants(10.0, 1.0, 1.0), 1.0, 1e-5, 40, 10, convex=True)
    with pytest.raises(ValueError, match="must be convex: its Hessian.* curvature -"):
        newton_step(how, w, x, y, [1], method=method)


def test_a_rank_deficient_hessian_is_not_taken_for_negative_curvature():
    x, y, w = problem("logistic", 6, 30)
    how = dataclasses.replace(mechanism("logistic", 6, 2), loss=logistic, convex=True)
    for method in ("cholesky", "cg"):
        newton_step(how, fit(how, w, x, y, method=method), x, y, [1, 2], method=method)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: constants("ridge", 0.1, 1.0), "target must be a bound >= 0 for ridge.* None"),
        (lambda: constants("logistic", 0.1, 1.0, target=1.0), "else None; found 1.0"),
        (lambda: constants("logistic", 0.1, 0.0), "row_norm must be above 0, found 0.0"),
        (lambda: Constants(0.1, -1.0, 1.0), "lipschitz must be finite and >= 0, found -1.0"),
        (lambda: Constants(0.1, 1.0, math.inf), "hessian_lipschitz must be finite.* inf"),
        (lambda: sensitivity(9, 5, bounds("logistic")), "from 0 to n/2 = 4.5, found 5"),
        (lambda: sensitivity(9, -1, bounds("logistic")), "found -1"),
        (lambda: sensitivity(0, 0, bounds("logistic")), "records, must be above 0"),
        (
            lambda: sensitivity(9, 1, bounds("logistic"), variant="code"),
            "variant must be 'paper' or 'tight', found 'code'",
        ),
        (lambda: allowed_distance(0.0, 0.1, 1.25), "epsilon must be above 0 and finite, found 0"),
        (lambda: allowed_distance(1.0, 1.0, 1.25), "delta must be between 0 and 1, found 1"),
        (lambda: mechanism("logistic", tolerance=0.0), "tolerance must be above 0, found 0"),
        (lambda: mechanism("hinge", given=bounds("ridge")), "one of logistic.* found 'hinge'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w, x, y: {"w": w[:2]}, r"a row per feature, found \(2,\) for 4"),
        (lambda w, x, y: {"w": w[:, None]}, r"\(d,\), of softmax \(d, C\); found \(4, 1\)"),
        (lambda w, x, y: {"w": w * np.nan}, "w must be finite"),
        (lambda w, x, y: {"x": x * np.nan}, "features must be finite; those of row 0"),
        (lambda w, x, y: {"y": y[:-1]}, "as many"),
    ],
)
def test_bad_arrays_are_named(change, message):
    refused(message, change=change)


def test_bad_methods_are_named():
    x, y, w = problem("ridge")
    with pytest.raises(ValueError, match="one of cholesky, cg, found 'lu'"):
        fit(mechanism("ridge"), w, x, y, method="lu")
    with pytest.raises(ValueError, match="only to .*: scale the features down"):
        fit(mechanism("logistic", tolerance=1e-25), *(problem("logistic")[i] for i in (2, 0, 1)))
