"""Spectral norms against singular values, and gradients against float64 by hand."""

import doctest
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from jaxrl import spectral


def unit(rng, shape, dtype=np.float32):
    x = rng.normal(size=shape)
    return (x / np.linalg.norm(x)).astype(dtype)


def iterate(kernel, u, num_steps=1, eps=1e-12):
    """Power iteration of torch.nn.utils.spectral_norm in float64, written for W = kernelᵀ."""
    weight = np.float64(kernel).T
    u = np.float64(u)
    for _ in range(num_steps):
        v = weight.T @ u
        v = v / max(np.linalg.norm(v), eps)
        u = weight @ v
        u = u / max(np.linalg.norm(u), eps)
    return u @ (weight @ v), u, v


# --- dense ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def xavier():
    """The paper's layer, 3136 to 512, and its true norm."""
    limit = np.sqrt(6 / (3136 + 512))
    kernel = np.random.default_rng(0).uniform(-limit, limit, (3136, 512)).astype(np.float32)
    gram = np.float64(kernel).T @ np.float64(kernel)
    return jnp.asarray(kernel), np.sqrt(np.linalg.eigvalsh(gram)[-1])


@pytest.mark.parametrize(
    "num_steps, ratio, tolerance", [(1, 0.76, 0.03), (10, 0.974, 0.03), (50, 0.996, 0.015)]
)
def test_convergence_from_a_cold_start(xavier, num_steps, ratio, tolerance):
    kernel, norm = xavier
    estimate = jax.jit(functools.partial(spectral.power_iteration_dense, num_steps=num_steps))
    for seed in range(3):
        u = spectral.initial_vectors(jax.random.key(seed), (512,))
        sigma, _, _ = estimate(kernel, u)
        assert abs(float(sigma) / norm - ratio) < tolerance


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 3), (3, 1), (64, 64)])
def test_dense_converges_to_the_largest_singular_value(shape):
    rng = np.random.default_rng(1)
    left, _ = np.linalg.qr(rng.normal(size=(shape[0], min(shape))))
    right, _ = np.linalg.qr(rng.normal(size=(shape[1], min(shape))))
    kernel = np.float32((left * np.geomspace(3, 0.1, min(shape))) @ right.T)
    sigma, u, v = spectral.power_iteration_dense(
        jnp.asarray(kernel), unit(rng, shape[1]), num_steps=150
    )
    expected = np.linalg.svd(np.float64(kernel), compute_uv=False)[0]
    np.testing.assert_allclose(sigma, expected, rtol=1e-5)
    np.testing.assert_allclose(v @ kernel, sigma * u, atol=1e-5 * expected)


def test_five_forwards_follow_torch():
    rng = np.random.default_rng(2)
    kernel, u = rng.normal(size=(9, 6)).astype(np.float32), unit(rng, 6)
    expected_u = u
    for _ in range(5):
        expected_sigma, expected_u, expected_v = iterate(kernel, expected_u)
        sigma, u, v = spectral.power_iteration_dense(jnp.asarray(kernel), jnp.asarray(u))
        np.testing.assert_allclose(sigma, expected_sigma, rtol=1e-5)
        np.testing.assert_allclose(u, expected_u, rtol=0, atol=1e-5)
        np.testing.assert_allclose(v, expected_v, rtol=0, atol=1e-5)


def test_steps_compose():
    rng = np.random.default_rng(3)
    kernel, u = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32), jnp.asarray(unit(rng, 6))
    once = u
    for _ in range(4):
        sigma, once, v = spectral.power_iteration_dense(kernel, once)
    at_once = spectral.power_iteration_dense(kernel, u, num_steps=4)
    for got, expected in zip(at_once, (sigma, once, v), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), size=st.floats(1e-6, 1e6), num_steps=st.integers(1, 3))
def test_estimates_are_lower_bounds_that_grow(seed, size, num_steps):
    rng = np.random.default_rng(seed)
    kernel, u = jnp.asarray(size * rng.normal(size=(6, 4)), jnp.float32), jnp.asarray(unit(rng, 4))
    few = spectral.power_iteration_dense(kernel, u, num_steps=num_steps)
    more = spectral.power_iteration_dense(kernel, u, num_steps=num_steps + 1)
    norm = np.linalg.svd(np.float64(kernel), compute_uv=False)[0]
    assert 0 < few[0] <= more[0] * (1 + 1e-5) and more[0] <= norm * (1 + 1e-5)
    for vector in (*few[1:], *more[1:]):
        np.testing.assert_allclose(np.linalg.norm(vector), 1, rtol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
def test_gradient_of_sigma_is_the_outer_product_in_float64(jit):
    rng = np.random.default_rng(4)
    kernel = rng.normal(size=(9, 6))
    u = unit(rng, 6, np.float64)
    with jax.enable_x64(True):

        def sigma_of(kernel, u):
            return spectral.power_iteration_dense(kernel, u)[0]

        function = jax.value_and_grad(sigma_of, argnums=(0, 1))
        function = jax.jit(function) if jit else function
        sigma, (grad, grad_u) = function(jnp.asarray(kernel), jnp.asarray(u))
        assert sigma.dtype == jnp.float64
    expected, u, v = iterate(kernel, u)
    np.testing.assert_allclose(sigma, expected, rtol=1e-12)
    np.testing.assert_allclose(grad, np.outer(v, u), rtol=1e-10, atol=1e-12)
    assert not np.any(grad_u)


def test_vectors_and_stored_vectors_are_constants():
    rng = np.random.default_rng(5)
    kernel, u = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32), jnp.asarray(unit(rng, 4))
    v = jnp.asarray(unit(rng, 5))
    for i in (1, 2):
        grad = jax.grad(lambda k, i=i: jnp.sum(spectral.power_iteration_dense(k, u)[i]))(kernel)
        assert not np.any(grad)
    sigma, grads = jax.value_and_grad(spectral.sigma_dense, argnums=(0, 1, 2))(kernel, u, v)
    np.testing.assert_allclose(sigma, v @ kernel @ u, rtol=1e-5)
    np.testing.assert_allclose(grads[0], np.outer(v, u), rtol=1e-6)
    assert not np.any(grads[1]) and not np.any(grads[2])


def test_gradient_makes_one_kernel_sized_product_and_two_passes():
    # What makes normalisation cheap: two products with the kernel forwards, and backwards one
    # outer product, which XLA then fuses into its consumer.
    kernel, u = jnp.ones((33, 17)), jnp.ones(17)
    grad = jax.grad(lambda k: spectral.power_iteration_dense(k, u)[0])
    dots = [e for e in jax.make_jaxpr(grad)(kernel).eqns if e.primitive.name == "dot_general"]
    assert sum(kernel.shape in [v.aval.shape for v in e.invars] for e in dots) == 2
    kernel_sized = [e for e in dots if kernel.shape == e.outvars[0].aval.shape]
    assert len(kernel_sized) <= 1


def materialised(x, kernel, bias, u, v, bound):
    """The textbook form, in whatever dtype it is given, with u and v constants."""
    sigma = jnp.vdot(v, jnp.dot(kernel, u))
    divisor = sigma if bound is None else jnp.maximum(sigma / bound, 1.0)
    product = jnp.dot(x, kernel / divisor)
    return jnp.sum(jnp.square(jnp.sin(product + jnp.broadcast_to(bias, product.shape))))


@pytest.mark.parametrize("bound", [None, 0.5, 1.0, 2.0, 10.0])
def test_scaling_the_output_equals_scaling_the_weight(bound):
    rng = np.random.default_rng(6)
    x, kernel, bias = rng.normal(size=(3, 9)), rng.normal(size=(9, 6)), rng.normal(size=6)
    u = unit(rng, 6)

    def ours(x, kernel, bias):
        sigma, _, _ = spectral.power_iteration_dense(kernel, jnp.asarray(u))
        return jnp.sum(
            jnp.square(jnp.sin(spectral.normalised_dense(x, kernel, bias, sigma, bound)))
        )

    arrays = [jnp.asarray(a, jnp.float32) for a in (x, kernel, bias)]
    value, grads = jax.jit(jax.value_and_grad(ours, argnums=(0, 1, 2)))(*arrays)
    _, new_u, new_v = iterate(np.float32(kernel), u)
    with jax.enable_x64(True):
        oracle = jax.value_and_grad(materialised, argnums=(0, 1, 2))
        wide = [jnp.asarray(np.float64(np.float32(a))) for a in (x, kernel, bias)]
        expected, expected_grads = oracle(*wide, jnp.asarray(new_u), jnp.asarray(new_v), bound)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, wanted in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_normalised_dense_keeps_the_dtype_and_leading_axes():
    kernel, bias = jnp.ones((4, 3), jnp.bfloat16), jnp.ones(3, jnp.bfloat16)
    sigma, u, v = spectral.power_iteration_dense(kernel, jnp.ones(3) / np.float32(np.sqrt(3)))
    assert {a.dtype for a in (sigma, u, v)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(sigma, np.sqrt(12), rtol=1e-6)
    x = jnp.ones((2, 5, 4), jnp.bfloat16)
    out = spectral.normalised_dense(x, kernel, bias, sigma)
    assert out.shape == (2, 5, 3) and out.dtype == jnp.bfloat16
    grad = jax.grad(lambda k: spectral.power_iteration_dense(k, u)[0])(kernel)
    assert grad.dtype == jnp.bfloat16


def test_zero_kernels_stay_finite():
    def loss(kernel):
        sigma, u, v = spectral.power_iteration_dense(kernel, jnp.ones(3))
        out = spectral.normalised_dense(jnp.ones((2, 4)), kernel, jnp.zeros(3), sigma)
        return jnp.sum(out), (sigma, u, v)

    (_, aux), grad = jax.value_and_grad(loss, has_aux=True)(jnp.zeros((4, 3)))
    assert all(np.all(np.isfinite(a)) for a in (*aux, grad))


# --- transformations ------------------------------------------------------------------------------


def test_vmap_over_kernels_and_over_traced_bounds():
    rng = np.random.default_rng(7)
    kernels = jnp.asarray(rng.normal(size=(3, 9, 6)), jnp.float32)
    us = jnp.asarray(np.stack([unit(rng, 6) for _ in range(3)]))
    bounds = jnp.asarray([0.5, 2.0, 100.0], jnp.float32)
    x, bias = jnp.asarray(rng.normal(size=(2, 9)), jnp.float32), jnp.ones(6)

    def loss(kernel, u, bound):
        sigma, _, _ = spectral.power_iteration_dense(kernel, u)
        return jnp.sum(jnp.square(spectral.normalised_dense(x, kernel, bias, sigma, bound)))

    function = jax.value_and_grad(loss)
    values, grads = jax.jit(jax.vmap(function))(kernels, us, bounds)
    for i in range(3):
        value, grad = function(kernels[i], us[i], float(bounds[i]))
        np.testing.assert_allclose(values[i], value, rtol=1e-5)
        np.testing.assert_allclose(grads[i], grad, rtol=1e-4, atol=1e-5)
    # Only k varies: one kernel, one iteration, many bounds.
    sweep = jax.jit(jax.vmap(function, in_axes=(None, None, 0)))(kernels[0], us[0], bounds)
    np.testing.assert_allclose(sweep[0][0], values[0], rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_shard_map_gives_the_gradient_of_the_whole_batch(check_vma):
    rng = np.random.default_rng(8)
    kernel, bias = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32), jnp.ones(6)
    u, x = jnp.asarray(unit(rng, 6)), jnp.asarray(rng.normal(size=(16, 9)), jnp.float32)

    def loss(kernel, u, x):
        sigma, u, v = spectral.power_iteration_dense(kernel, u, num_steps=2)
        return jnp.mean(jnp.square(spectral.normalised_dense(x, kernel, bias, sigma))), (u, v)

    function = jax.value_and_grad(loss, has_aux=True)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P(), check_vma=check_vma
    )
    def sharded(kernel, u, x):
        if check_vma:
            kernel = jax.lax.pcast(kernel, "data", to="varying")
            u = jax.lax.pcast(u, "data", to="varying")
        return jax.tree.map(lambda a: jax.lax.pmean(a, "data"), function(kernel, u, x))

    got, expected = jax.jit(sharded)(kernel, u, x), function(kernel, u, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, expected)


def test_shard_map_with_a_replicated_kernel():
    rng = np.random.default_rng(9)
    kernel, u = jnp.asarray(rng.normal(size=(9, 6)), jnp.float32), jnp.asarray(unit(rng, 6))
    x, bias = jnp.asarray(rng.normal(size=(16, 9)), jnp.float32), jnp.ones(6)

    def loss(kernel, x):
        sigma, _, _ = spectral.power_iteration_dense(kernel, u)
        return jnp.mean(jnp.square(spectral.normalised_dense(x, kernel, bias, sigma)))

    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(
        lambda k, x: jax.grad(lambda k: jax.lax.pmean(loss(k, x), "data"))(k),
        mesh=mesh, in_specs=(P(), P("data")), out_specs=P(),
    )  # fmt: skip
    np.testing.assert_allclose(
        jax.jit(sharded)(kernel, x), jax.grad(loss)(kernel, x), rtol=1e-4, atol=1e-6
    )


def test_forward_mode_agrees_with_reverse_mode():
    rng = np.random.default_rng(10)
    kernel, direction = jnp.asarray(rng.normal(size=(2, 9, 6)), jnp.float32)
    u = jnp.asarray(unit(rng, 6))

    def sigma_of(kernel):
        return spectral.power_iteration_dense(kernel, u)[0]

    _, tangent = jax.jvp(sigma_of, (kernel,), (direction,))
    np.testing.assert_allclose(tangent, jnp.vdot(jax.grad(sigma_of)(kernel), direction), rtol=1e-4)


# --- convolutions ---------------------------------------------------------------------------------

CONVS = [
    # height, width, in, kernel, out, strides, padding
    (7, 7, 2, (3, 3), 3, 1, "VALID"),
    (7, 6, 2, (3, 3), 3, 1, "SAME"),
    (9, 8, 1, (4, 4), 2, 2, "SAME"),
    (9, 8, 2, (4, 3), 3, (3, 2), "VALID"),
    (5, 7, 3, (1, 1), 2, 1, "SAME"),
    (8, 5, 2, (3, 2), 2, (2, 1), ((1, 0), (2, 1))),
    (11, 11, 1, (8, 8), 4, 4, "SAME"),
    (4, 4, 2, (4, 4), 3, 1, "VALID"),
]


def operator_matrix(kernel, height, width, strides, padding):
    """The dense matrix of the convolution, column by column, in NumPy float64."""
    kh, kw, channels, out = kernel.shape
    sh, sw = (strides, strides) if isinstance(strides, int) else strides

    def pads(size, k, s, axis):
        if padding == "VALID":
            return 0, 0
        if padding == "SAME":
            total = max((-(-size // s) - 1) * s + k - size, 0)
            return total // 2, total - total // 2
        return padding[axis]

    (top, bottom), (left, right) = pads(height, kh, sh, 0), pads(width, kw, sw, 1)
    rows, cols = (height + top + bottom - kh) // sh + 1, (width + left + right - kw) // sw + 1
    columns = []
    for place in itertools.product(range(height), range(width), range(channels)):
        image = np.zeros((height + top + bottom, width + left + right, channels))
        image[place[0] + top, place[1] + left, place[2]] = 1
        output = np.zeros((rows, cols, out))
        for i, j in itertools.product(range(rows), range(cols)):
            patch = image[i * sh : i * sh + kh, j * sw : j * sw + kw]
            output[i, j] = np.tensordot(patch, np.float64(kernel), 3)
        columns.append(output.ravel())
    return np.stack(columns, 1), (rows, cols, out)


@pytest.mark.parametrize("height, width, channels, size, out, strides, padding", CONVS)
def test_conv_norm_is_that_of_the_operator(height, width, channels, size, out, strides, padding):
    rng = np.random.default_rng(11)
    kernel = rng.normal(size=(*size, channels, out)).astype(np.float32)
    matrix, output_shape = operator_matrix(kernel, height, width, strides, padding)
    norm = np.linalg.svd(matrix, compute_uv=False)[0]
    u = jnp.asarray(unit(rng, output_shape))
    estimate = functools.partial(
        spectral.power_iteration_conv,
        input_shape=(height, width, channels),
        strides=strides,
        padding=padding,
    )
    # One step, against the same step on the matrix.
    expected_sigma, expected_u, expected_v = iterate(matrix.T, np.ravel(u))
    sigma, new_u, v = estimate(jnp.asarray(kernel), u)
    np.testing.assert_allclose(sigma, expected_sigma, rtol=1e-5)
    np.testing.assert_allclose(new_u.ravel(), expected_u, rtol=0, atol=1e-5)
    np.testing.assert_allclose(v.ravel(), expected_v, rtol=0, atol=1e-5)
    assert v.shape == (height, width, channels)
    # Many steps, against the singular value.
    sigma, u, v = jax.jit(functools.partial(estimate, num_steps=400))(jnp.asarray(kernel), u)
    np.testing.assert_allclose(sigma, norm, rtol=1e-4)
    stored = spectral.sigma_conv(jnp.asarray(kernel), u, v, strides=strides, padding=padding)
    np.testing.assert_allclose(stored, sigma, rtol=1e-5)


def test_conv_norm_is_not_that_of_the_reshaped_kernel():
    kernel = np.ones((3, 3, 1, 1), np.float32)
    sigma, _, _ = spectral.power_iteration_conv(
        jnp.asarray(kernel), jnp.full((9, 9, 1), 1 / 9), input_shape=(11, 11, 1), strides=1,
        padding="VALID", num_steps=60,
    )  # fmt: skip
    matrix, _ = operator_matrix(kernel, 11, 11, 1, "VALID")
    np.testing.assert_allclose(sigma, np.linalg.svd(matrix, compute_uv=False)[0], rtol=1e-5)
    assert float(sigma) > 2 * np.linalg.norm(kernel)  # reshaped to (9, 1), its norm is 3


def test_conv_sigma_is_a_constant_under_grad_jit_and_vmap():
    rng = np.random.default_rng(12)
    kernels = jnp.asarray(rng.normal(size=(3, 3, 3, 2, 4)), jnp.float32)
    us = jnp.asarray(np.stack([unit(rng, (4, 3, 4)) for _ in range(3)]))

    def sigma_of(kernel, u):
        return spectral.power_iteration_conv(
            kernel, u, input_shape=(7, 6, 2), strides=2, padding="SAME"
        )[0]

    values, grads = jax.jit(jax.vmap(jax.value_and_grad(sigma_of)))(kernels, us)
    np.testing.assert_allclose(values, [sigma_of(*row) for row in zip(kernels, us, strict=True)],
                               rtol=1e-5)  # fmt: skip
    assert not np.any(grads)
    u, v = us[0], jnp.ones((7, 6, 2))
    grads = jax.grad(spectral.sigma_conv, argnums=(0, 1, 2))(
        kernels[0], u, v, strides=2, padding="SAME"
    )
    assert not any(np.any(grad) for grad in grads)


# --- scale, vectors, names ------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [1e-3, 0.5, 1.0, 3.0, 1e4])
@pytest.mark.parametrize("bound", [None, 1.0, 2, 10.0])
def test_scale(sigma, bound):
    expected = 1 / sigma if bound is None else 1 / max(sigma / bound, 1)
    np.testing.assert_allclose(spectral.scale(jnp.float32(sigma), bound), expected, rtol=1e-6)
    traced = jax.jit(spectral.scale)(jnp.float32(sigma), None if bound is None else bound * 1.0)
    np.testing.assert_allclose(traced, expected, rtol=1e-6)


def test_relaxed_scale_has_no_gradient_below_its_bound():
    assert jax.grad(spectral.scale)(jnp.float32(1.5), 2.0) == 0
    np.testing.assert_allclose(jax.grad(spectral.scale)(jnp.float32(4.0), 2.0), -2 / 16, rtol=1e-6)


def test_initial_vectors_are_unit_and_differ_by_key():
    a, b = (spectral.initial_vectors(jax.random.key(i), (5, 4, 3)) for i in range(2))
    assert a.shape == (5, 4, 3) and a.dtype == jnp.float32
    np.testing.assert_allclose([jnp.linalg.norm(a), jnp.linalg.norm(b)], 1, rtol=1e-6)
    assert abs(float(jnp.vdot(a, b))) < 0.6


NAMES = ("conv1", "conv2", "fc", "valueL", "head")


@pytest.mark.parametrize(
    "spec, modes",
    [
        ([], {}),
        (["-2"], {"valueL": "normalise"}),
        (["-1L", "conv2"], {"conv2": "normalise", "head": "log"}),
        (["-5"], {"conv1": "normalise"}),
        (("fcL",), {"fc": "log"}),
        (["valueL"], {"valueL": "normalise"}),
        (["valueLL"], {"valueL": "log"}),
        (["all"], dict.fromkeys(NAMES, "normalise")),
        (["allL"], dict.fromkeys(NAMES, "log")),
    ],
)
def test_parse_layers(spec, modes):
    parsed = spectral.parse_layers(spec, NAMES)
    assert parsed == modes
    assert list(parsed) == [name for name in NAMES if name in modes]


@pytest.mark.parametrize(
    "spec, found",
    [
        (["-6"], "'-6'; allowed are 'all', '-5', .*'-1', 'conv1'.*'head'"),
        (["0"], "'0'"),
        (["fc2"], "'fc2'.*'fc'"),
        (["L"], "'L'"),
        ([""], "''"),
        (["-3", "fc"], "'fc' is named twice"),
        (["all", "-1L"], "'head' is named twice"),
        ("-2", "the string '-2'"),
    ],
)
def test_parse_layers_errors_name_what_is_allowed(spec, found):
    with pytest.raises(ValueError, match=found):
        spectral.parse_layers(spec, NAMES)


K, C = jnp.ones((4, 3)), jnp.ones((3, 3, 2, 4))
CONV = dict(input_shape=(7, 6, 2), strides=1, padding="VALID")


@pytest.mark.parametrize(
    "call, found",
    [
        (lambda: spectral.power_iteration_dense(C, jnp.ones(3)), r"\(in, out\).*\(3, 3, 2, 4\)"),
        (lambda: spectral.power_iteration_dense(K, jnp.ones(4)), r"u .*\(3,\), found \(4,\)"),
        (lambda: spectral.power_iteration_dense(K, jnp.ones(3), num_steps=0), "found 0"),
        (lambda: spectral.sigma_dense(K, jnp.ones(3), jnp.ones(3)), r"v .*\(4,\), found \(3,\)"),
        (lambda: spectral.power_iteration_conv(K, jnp.ones(3), **CONV), r"found \(4, 3\)"),
        (lambda: spectral.power_iteration_conv(C, jnp.ones((7, 6, 4)), **CONV), r"\(5, 4, 4\)"),
        (
            lambda: spectral.power_iteration_conv(
                C, jnp.ones((5, 4, 4)), **(CONV | {"input_shape": (7, 6, 3)})
            ),
            r"\(height, width, 2\).*found \(7, 6, 3\)",
        ),
        (lambda: spectral.scale(jnp.ones(()), 0), "found 0"),
        (lambda: spectral.scale(jnp.ones(()), -1.5), "found -1.5"),
    ],
)
def test_errors_name_what_was_found(call, found):
    with pytest.raises(ValueError, match=found):
        call()


def test_docstring_examples_run():
    assert doctest.testmod(spectral).failed == 0
