"""The loss against a float64 brute force, on one device and on many, by every route."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vicreg.covariance import ROUTES, choose_route, second_moments
from vicreg.losses import covariance_term, invariance_term, variance_term, vicreg_loss

ONE_DEVICE = ROUTES[:2]


def views(n, d, scale=1.0, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    z_a = rng.normal(size=(n, d)) * scale * rng.uniform(0.2, 1.5, size=d) + shift
    z_b = z_a + rng.normal(size=(n, d)) * 0.3 * scale
    return np.float32(z_a), np.float32(z_b)


def brute_force(z_a, z_b, variant="code"):
    """The terms in float64, the covariance as the double sum over pairs that it is."""
    z_a, z_b = np.float64(z_a), np.float64(z_b)
    n, d = z_a.shape
    invariance = np.mean((z_a - z_b) ** 2)
    variance = covariance = 0.0
    for z in (z_a, z_b):
        z = z - z.mean(axis=0)
        std = np.sqrt((z * z).sum(axis=0) / (n - 1) + 1e-4)
        variance += np.maximum(0, 1 - std).mean() / (2 if variant == "code" else 1)
        c = z.T @ z / (n - 1)
        covariance += sum((c[i, :i] ** 2).sum() + (c[i, i + 1 :] ** 2).sum() for i in range(d)) / d
    return {"invariance": invariance, "variance": variance, "covariance": covariance}


def naive(z_a, z_b, weights=(25.0, 25.0, 1.0)):
    """The same in JAX for autodiff, of whatever type."""
    n, d = z_a.shape
    variance = covariance = 0
    for z in (z_a, z_b):
        z = z - z.mean(axis=0, keepdims=True)
        var = (z * z).sum(axis=0) / (n - 1)
        variance += jax.nn.relu(1 - jnp.sqrt(var + 1e-4)).mean() / 2
        c = jnp.matmul(z.T, z, precision="highest") / (n - 1)
        covariance += ((c * (1 - jnp.eye(d, dtype=c.dtype))) ** 2).sum() / d
    terms = (((z_a - z_b) ** 2).mean(), variance, covariance)
    return sum(w * t for w, t in zip(weights, terms, strict=True))


def assert_close(got, want):
    """1e-6 of float64; the hinge 1 - std loses its own digits, so it is held to those of std."""
    for name in ("invariance", "covariance"):
        assert float(got[name]) == pytest.approx(want[name], rel=1e-6, abs=1e-12), name
    assert float(got["variance"]) == pytest.approx(want["variance"], rel=1e-6, abs=3e-7)


jitted = jax.jit(vicreg_loss, static_argnames=("variant", "route"))

SHAPES = [(2, 3), (2, 1000), (3, 1), (7, 13), (13, 7), (64, 64), (65, 63), (255, 1025), (2049, 33)]


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("scale", "shift"), [(1, 0), (0.3, 5), (0.01, 1)])
def test_terms_match_float64(shape, scale, shift, variant):
    z_a, z_b = views(*shape, scale, shift)
    want = brute_force(z_a, z_b, variant)
    loss, terms = jitted(z_a, z_b, variant=variant)
    assert_close(terms, want)
    total = 25 * want["invariance"] + 25 * want["variance"] + want["covariance"]
    assert float(loss) == pytest.approx(total, rel=1e-6)
    assert loss.dtype == jnp.float32


@pytest.mark.parametrize("variant", ["code", "paper"])
@pytest.mark.parametrize("shape", [(13, 7), (5, 90)], ids=str)
def test_terms_alone_and_eager(shape, variant):
    z_a, z_b = (jnp.asarray(z) for z in views(*shape))
    alone = {
        "invariance": invariance_term(z_a, z_b),
        "variance": variance_term(z_a, z_b, variant=variant),
        "covariance": covariance_term(z_a, z_b),
    }
    assert_close(alone, brute_force(z_a, z_b, variant))
    assert_close(vicreg_loss(z_a, z_b, variant=variant)[1], brute_force(z_a, z_b, variant))


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from([(2, 1), (2, 9), (5, 5), (9, 4)]),
    scale=st.sampled_from([1e-3, 0.1, 1.0, 10.0]),
    shift=st.sampled_from([0.0, -3.0]),
    seed=st.integers(0, 99),
)
def test_any_small_batch_by_either_route(shape, scale, shift, seed):
    z_a, z_b = views(*shape, scale, shift, seed)
    want = brute_force(z_a, z_b)
    # What cancels in ‖K‖² - Σvar² is measured against what is subtracted.
    squares = sum((z.var(axis=0, ddof=1) ** 2).sum() for z in (np.float64(z_a), np.float64(z_b)))
    for route in ONE_DEVICE:
        _, terms = jitted(z_a, z_b, route=route)
        tolerance = 2e-6 * (want["covariance"] + squares / shape[1]) + 1e-5 * (shift * scale) ** 2
        assert abs(float(terms["covariance"]) - want["covariance"]) <= tolerance


def test_weights_scale_their_terms():
    z_a, z_b = views(9, 5)
    want = brute_force(z_a, z_b)
    weights = {"invariance_weight": 2.0, "variance_weight": 0.5, "covariance_weight": 3.0}
    loss, _ = vicreg_loss(jnp.asarray(z_a), jnp.asarray(z_b), **weights)
    total = 2 * want["invariance"] + 0.5 * want["variance"] + 3 * want["covariance"]
    assert float(loss) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("route", ONE_DEVICE)
@pytest.mark.parametrize("shape", [(2, 5), (12, 33), (33, 12), (17, 17)], ids=str)
def test_gradient_matches_autodiff_in_float64(shape, route):
    z_a, z_b = views(*shape, 0.7, 2.0)
    names = ("invariance_weight", "variance_weight", "covariance_weight")

    def ours(z, weights):
        return vicreg_loss(*z, route=route, **dict(zip(names, weights, strict=True)))[0]

    gradient, oracle = jax.jit(jax.grad(ours)), jax.jit(jax.grad(lambda z, w: naive(*z, w)))
    for weights in ((25.0, 25.0, 1.0), (0.0, 0.0, 1.0), (0.0, 3.0, 0.0)):
        got = gradient((z_a, z_b), weights)
        with jax.enable_x64(True):
            want = [np.asarray(x) for x in oracle((np.float64(z_a), np.float64(z_b)), weights)]
        for g, w in zip(got, want, strict=True):
            np.testing.assert_allclose(g, w, rtol=1e-4, atol=2e-6 * np.abs(w).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_statistics_are_float32_whatever_the_input(dtype):
    z_a, z_b = (jnp.asarray(z).astype(dtype) for z in views(2048, 256, 3.0, 1.0))
    loss, terms = jax.jit(vicreg_loss)(z_a, z_b)
    assert loss.dtype == jnp.float32
    assert_close(terms, brute_force(*(np.asarray(z.astype(jnp.float32)) for z in (z_a, z_b))))
    gradient = jax.grad(lambda a: vicreg_loss(a, z_b)[0])(z_a)
    assert gradient.dtype == dtype


def test_float64_stays_float64():
    with jax.enable_x64(True):
        z_a, z_b = (jnp.float64(z) for z in views(20, 30))
        loss, terms = vicreg_loss(z_a, z_b)
        assert loss.dtype == jnp.float64
        want = brute_force(z_a, z_b)
        assert all(float(terms[n]) == pytest.approx(want[n], rel=1e-12) for n in want)


def test_it_vmaps():
    z_a, z_b = (np.stack(zs) for zs in zip(*(views(6, 9, seed=s) for s in range(3)), strict=True))
    losses, _ = jax.vmap(vicreg_loss)(z_a, z_b)
    for loss, a, b in zip(losses, z_a, z_b, strict=True):
        np.testing.assert_allclose(loss, vicreg_loss(jnp.asarray(a), jnp.asarray(b))[0], rtol=1e-6)


# ---- several devices -----------------------------------------------------------------------------


def encode(params, x, branch):
    """A small encoder; the branches share their weights where there is but one set."""
    w = params[branch % len(params)]
    return jnp.matmul(jnp.tanh(jnp.matmul(x, w[0], precision="highest")), w[1], precision="highest")


def setting(n, d, branches):
    rng = np.random.default_rng(1)
    params = [
        (np.float32(rng.normal(size=(6, 10))), np.float32(rng.normal(size=(10, d)) / 3))
        for _ in range(branches)
    ]
    x_a, x_b = (np.float32(rng.normal(size=(n, 6))) for _ in range(2))
    return params, x_a, x_b


def objective(params, x_a, x_b, **options):
    return vicreg_loss(encode(params, x_a, 0), encode(params, x_b, 1), **options)[0]


@functools.cache
def reference(n, d, branches):
    params, x_a, x_b = setting(n, d, branches)
    loss = lambda p, a, b: naive(encode(p, a, 0), encode(p, b, 1))  # noqa: E731
    with jax.enable_x64(True):
        args = jax.tree.map(jnp.float64, (params, x_a, x_b))
        return jax.tree.map(np.asarray, jax.value_and_grad(loss)(*args))


def assert_same(got, n, d, branches):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(reference(n, d, branches)), strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-5 * np.abs(w).max())


def mesh_of(devices):
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices]
    )


CASES = [(16, 37, 1), (16, 37, 2), (24, 5, 1)]


@pytest.mark.parametrize(
    ("devices", "route", "case"),
    [
        *((devices, None, CASES[0]) for devices in (1, 2, 4, 8)),
        *((8, route, case) for route in ONE_DEVICE for case in CASES[1:]),
    ],
)
def test_plain_jit_over_a_mesh(devices, route, case):
    params, x_a, x_b = setting(*case)
    mesh = mesh_of(devices)
    rows, whole = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    gradient = jax.jit(
        jax.value_and_grad(functools.partial(objective, route=route)),
        in_shardings=(whole, rows, rows),
        out_shardings=whole,
    )
    assert_same(jax.block_until_ready(gradient(params, x_a, x_b)), *case)


def inside(params, x_a, x_b, route=None):
    loss, grads = jax.value_and_grad(functools.partial(objective, axis_name="data", route=route))(
        params, x_a, x_b
    )
    return loss, jax.lax.pmean(grads, "data")


@pytest.mark.parametrize(
    ("devices", "check", "route", "case"),
    [
        *((*setup, route, CASES[0]) for setup in ((2, False), (8, True)) for route in ROUTES),
        *((4, True, route, CASES[1]) for route in ROUTES),
        *((8, False, route, CASES[2]) for route in ROUTES),
        (1, True, "gram_by_features", CASES[0]),
    ],
)
def test_shard_map_with_the_gradient_inside(devices, check, route, case):
    params, x_a, x_b = setting(*case)
    step = jax.shard_map(
        functools.partial(inside, route=route),
        mesh=mesh_of(devices),
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
        check_vma=check,
    )
    assert_same(jax.block_until_ready(jax.jit(step)(params, x_a, x_b)), *case)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("route", ROUTES)
def test_shard_map_with_the_gradient_outside(route, check):
    case = (16, 37, 1)
    params, x_a, x_b = setting(*case)
    loss = jax.shard_map(
        lambda a, b: vicreg_loss(a, b, axis_name="data", route=route)[0],
        mesh=mesh_of(8),
        in_specs=P("data"),
        out_specs=P(),
        check_vma=check,
    )
    whole = lambda p, a, b: loss(encode(p, a, 0), encode(p, b, 1))  # noqa: E731
    assert_same(jax.block_until_ready(jax.jit(jax.value_and_grad(whole))(params, x_a, x_b)), *case)


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_pmap():
    case = (16, 37, 1)
    params, x_a, x_b = setting(*case)
    x_a, x_b = (x.reshape(8, 2, -1) for x in (x_a, x_b))
    loss, grads = jax.pmap(inside, "data", in_axes=(None, 0, 0))(params, x_a, x_b)
    assert_same(jax.tree.map(lambda x: x[3], (loss, grads)), *case)


# ---- routes and memory ---------------------------------------------------------------------------


def test_routes_by_shape_and_devices():
    assert choose_route(256, 8192) == "gram" and choose_route(8192, 8192) == "covariance"
    assert choose_route(2048, 2048, 8) == "covariance"
    # The features win where N < D(1/2 - 1/P); at 32 devices D = 8192 that is N < 3840.
    assert choose_route(3839, 8192, 32) == "gram_by_features"
    assert choose_route(3841, 8192, 32) == "gram"
    assert choose_route(512, 8192, 2) == "gram"  # two devices: never


@pytest.mark.parametrize("devices", [1, 8])
def test_no_matrix_of_the_dearer_size_is_built(devices):
    """Neither in the forward pass nor in the gradient, on one device or on each of several."""
    mesh = mesh_of(devices)
    rows = NamedSharding(mesh, P("data"))
    gradient = jax.jit(
        jax.value_and_grad(lambda a, b: vicreg_loss(a, b)[0], argnums=(0, 1)), in_shardings=rows
    )
    z = jax.ShapeDtypeStruct((256, 8192), jnp.float32)
    compiled = gradient.lower(z, z).compile()
    assert "8192,8192" not in compiled.as_text()
    assert compiled.memory_analysis().temp_size_in_bytes <= 64 * 2**20
    z = jax.ShapeDtypeStruct((8192, 256), jnp.float32)
    assert "8192,8192" not in gradient.lower(z, z).compile().as_text()


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("z_a", "z_b", "options", "message"),
    [
        ((4, 3), (4, 2), {}, r"one shape and type, found float32\[4, 3\] and float32\[4, 2\]"),
        ((4, 3), (5, 3), {}, "one shape"),
        ((1, 3), (1, 3), {}, r"at least 2 rows, found embeddings of \[1, 3\]"),
        ((4, 3, 2), (4, 3, 2), {}, r"float \(N, D\), found float32\[4, 3, 2\]"),
        ((4, 3), (4, 3), {"variant": "code2"}, "variant must be 'code' or 'paper', found 'code2'"),
        ((4, 3), (4, 3), {"route": "B"}, "route must be one of covariance, gram, gram_by_features"),
        ((4, 3), (4, 3), {"route": "gram_by_features"}, "give axis_name"),
    ],
)
def test_bad_input_is_named(z_a, z_b, options, message):
    with pytest.raises(ValueError, match=message):
        vicreg_loss(jnp.zeros(z_a), jnp.zeros(z_b), **options)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="int32"):
        second_moments(jnp.zeros((4, 3), jnp.int32))


def test_what_is_not_finite_shows():
    z_a, z_b = views(6, 4)
    z_a[2, 1] = np.inf
    loss, _ = vicreg_loss(jnp.asarray(z_a), jnp.asarray(z_b))
    assert not np.isfinite(loss)


@pytest.mark.parametrize("route", ["gram", "covariance"])
def test_the_covariance_term_is_never_negative(route):
    """One column alone varies: the Gram matrix's norm less the variances' is rounding."""
    for seed in range(20):
        z = np.zeros((32, 64), np.float32)
        z[:, 3] = 30 * np.random.default_rng(seed).normal(size=32)
        assert covariance_term(z, z, route=route) >= 0
        grad = jax.grad(lambda z: covariance_term(z, z, route=route))(z)  # noqa: B023
        assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("term", [vicreg_loss, invariance_term, variance_term, covariance_term])
@pytest.mark.parametrize(
    "z",
    [
        np.ones((4, 3), np.int32),
        np.ones((1, 3), np.float32),
        np.ones(4, np.float32),
        np.ones((4, 0), np.float32),
        np.ones((4, 3, 2), np.float32),
    ],
)
def test_every_term_refuses_what_the_loss_refuses(term, z):
    with pytest.raises(ValueError, match="embeddings"):
        term(z, z)
