"""The diagnostics against NumPy in float64, on healthy and on collapsed embeddings."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vicreg import diagnostics

FUNCTIONS = {
    name: jax.jit(getattr(diagnostics, name))
    for name in ("rankme", "mean_std", "off_diagonal_covariance")
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def oracle(name, z):
    z = np.float64(z)
    if name == "rankme":
        sigma = np.linalg.svd(z, compute_uv=False)
        p = sigma / sigma.sum() + 1e-7
        return np.exp(-np.sum(p * np.log(p)))
    if name == "mean_std":
        return np.mean(np.std(z, axis=0, ddof=1))
    covariances = np.cov(z.T)
    return np.sqrt(np.mean(covariances[~np.eye(z.shape[1], dtype=bool)] ** 2))


def embeddings(kind, n, d):
    rng = np.random.default_rng(n * d)
    z = rng.normal(size=(n, d))
    if kind == "rank 3":
        z = rng.normal(size=(n, 3)) @ rng.normal(size=(3, d))
    elif kind == "decaying":
        z = z / np.arange(1, d + 1)
    elif kind == "nearly constant":
        z = 1 + 1e-2 * z
    elif kind == "correlated":
        z = z + 2 * rng.normal(size=(n, 1))
    return np.float32(z)


@every_function
@pytest.mark.parametrize("kind", ["white", "rank 3", "decaying", "nearly constant", "correlated"])
@pytest.mark.parametrize("n, d", [(37, 5), (64, 64), (9, 101), (2, 3)])
def test_values_are_those_of_float64(name, kind, n, d):
    z = embeddings(kind, n, d)
    got = FUNCTIONS[name](z)
    assert got.dtype == jnp.float32 and got.shape == ()
    # A standard deviation of 1e-2 around 1 has lost two of float32's seven digits in z itself.
    np.testing.assert_allclose(got, oracle(name, z), rtol=3e-5, atol=1e-9)


def test_singular_values_of_the_gram_matrix_would_not_do():
    # Mistake: the cheaper eigenvalues of zᵀz have half of the digits, which collapse needs.
    z = embeddings("rank 3", 128, 96)
    sigma = np.sqrt(np.maximum(np.linalg.eigvalsh(z.T @ z), 0))
    p = sigma / sigma.sum() + 1e-7
    expected = oracle("rankme", z)
    assert np.exp(-np.sum(p * np.log(p))) > expected * 1.001
    np.testing.assert_allclose(FUNCTIONS["rankme"](z), expected, rtol=3e-5)


@pytest.mark.parametrize("value", [0.0, 1.0, -3e4])
@pytest.mark.parametrize("n, d", [(8, 40), (40, 8)])
def test_a_point_has_no_spread_and_rank_one(value, n, d):
    z = np.full((n, d), value, np.float32)
    z[:, 1] *= 2
    assert FUNCTIONS["mean_std"](z) == 0
    assert FUNCTIONS["off_diagonal_covariance"](z) == 0
    # 8 singular values, of which each adds at most 1e-7 * log(1e7).
    assert 1 - 1e-5 < FUNCTIONS["rankme"](z) < 1 + 3e-5


@pytest.mark.parametrize("n, d", [(2000, 16), (16, 2000)])
def test_white_noise_has_almost_full_rank(n, d):
    z = embeddings("white", n, d)
    assert 15.9 < FUNCTIONS["rankme"](z) < 16.001
    np.testing.assert_allclose(FUNCTIONS["mean_std"](z), 1, atol=0.1)
    # Covariances of independent dimensions spread by 1 / sqrt(N - 1).
    np.testing.assert_allclose(FUNCTIONS["off_diagonal_covariance"](z), (n - 1) ** -0.5, rtol=0.15)


def test_orthogonal_columns_have_no_covariance():
    # Where the Gram route subtracts equals: what is left is rounding, far below the variances.
    hadamard = np.float32([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])
    assert FUNCTIONS["off_diagonal_covariance"](hadamard) == 0
    wide = np.zeros((4, 9), np.float32)
    wide[:, :3] = hadamard
    assert FUNCTIONS["off_diagonal_covariance"](wide) < 1e-4
    np.testing.assert_allclose(FUNCTIONS["rankme"](wide), 3, rtol=1e-5)


def test_one_collapsed_dimension_shows_in_the_mean():
    z = embeddings("white", 100, 4)
    collapsed = np.where(np.arange(4) == 3, np.float32(7), z)
    expected = 4 * FUNCTIONS["mean_std"](z) - np.std(z[:, 3], ddof=1)
    np.testing.assert_allclose(4 * FUNCTIONS["mean_std"](collapsed), expected, rtol=1e-5)


def test_off_diagonal_is_the_papers_covariance_term():
    z = embeddings("correlated", 30, 12)
    c = np.cov(np.float64(z).T)
    term = (np.sum(c**2) - np.sum(np.diag(c) ** 2)) / 12
    got = np.square(FUNCTIONS["off_diagonal_covariance"](z)) * 11
    np.testing.assert_allclose(got, term, rtol=1e-5)


def test_no_matrix_of_all_dimensions_where_there_are_few_rows():
    compiled = FUNCTIONS["off_diagonal_covariance"].lower(jnp.zeros((8, 4000))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 8 * 4000 * 4


def test_no_digits_are_lost_where_there_are_many_rows():
    # Mistake: the diagonal subtracted from the whole leaves nothing of covariances of 1e-5.
    rng = np.random.default_rng(5)
    basis = np.linalg.qr(rng.normal(size=(512, 4)) - 0.5)[0]
    basis = np.linalg.qr(basis - basis.mean(0))[0] * np.sqrt(511)
    z = np.float32(basis @ (np.eye(4) + 1e-5 * rng.normal(size=(4, 4))))
    got, expected = FUNCTIONS["off_diagonal_covariance"](z), oracle("off_diagonal_covariance", z)
    assert expected < 1e-4
    np.testing.assert_allclose(got, expected, rtol=2e-2)


def test_rounding_below_zero_is_no_nan():
    # All variance in one dimension: the two sums that are subtracted are equal but for rounding.
    z = np.zeros((32, 5, 9), np.float32)
    z[:, :, 4] = np.random.default_rng(0).normal(size=(32, 5))
    found = jax.jit(jax.vmap(diagnostics.off_diagonal_covariance))(z)
    assert np.all(found >= 0) and np.all(found < 1e-3)


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**32 - 1),
    scale=st.sampled_from([1e-3, 0.5, 64.0, 1e3]),
    shape=st.sampled_from([(12, 5), (5, 12)]),
)
def test_scale_and_rotation(seed, scale, shape):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=shape) * rng.uniform(0.1, 2, shape[1])
    rotation = np.linalg.qr(rng.normal(size=(shape[1], shape[1])))[0]
    scaled, turned = np.float32(z * scale), np.float32(z @ rotation)
    z = np.float32(z)
    rank = FUNCTIONS["rankme"](z)
    assert 1 <= rank <= min(shape) + 1e-4
    np.testing.assert_allclose(FUNCTIONS["rankme"](scaled), rank, rtol=1e-5)
    np.testing.assert_allclose(FUNCTIONS["rankme"](turned), rank, rtol=1e-5)
    for name, power in (("mean_std", 1), ("off_diagonal_covariance", 2)):
        got, expected = FUNCTIONS[name](scaled), scale**power * FUNCTIONS[name](z)
        np.testing.assert_allclose(got, expected, rtol=1e-5)


@every_function
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_other_precisions_are_computed_with_in_float32(name, dtype):
    z = embeddings("correlated", 40, 9)
    with jax.enable_x64(dtype == jnp.float64):
        z = jnp.asarray(z, dtype)
        got = FUNCTIONS[name](z)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, oracle(name, np.asarray(z)), rtol=2e-5)


@pytest.mark.parametrize(
    "name, z, found",
    [
        ("rankme", np.zeros(3, np.float32), r"float32 of shape \(3,\)"),
        ("rankme", np.zeros((2, 3, 4), np.float32), r"\(2, 3, 4\)"),
        ("rankme", np.zeros((2, 3), np.int32), "floats.*int32"),
        ("rankme", np.zeros((0, 3), np.float32), r"N at least 1.*\(0, 3\)"),
        ("mean_std", np.zeros((1, 3), np.float32), r"N at least 2.*\(1, 3\)"),
        ("mean_std", np.zeros((3, 0), np.float32), r"D at least 1.*\(3, 0\)"),
        ("off_diagonal_covariance", np.zeros((1, 3), np.float32), r"\(1, 3\)"),
        ("off_diagonal_covariance", np.zeros((3, 1), np.float32), r"D at least 2.*\(3, 1\)"),
    ],
)
def test_errors_name_what_was_found(name, z, found):
    with pytest.raises(ValueError, match=found):
        FUNCTIONS[name](z)


def test_docstring_examples_run():
    assert doctest.testmod(diagnostics).failed == 0
