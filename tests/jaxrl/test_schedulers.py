"""The spectral schedulers' algebra, and that they touch hooked kernels alone."""

import doctest

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import freeze

from jaxrl import schedulers, spectral

# optax.adam raises a float to an integer power, an error under strict promotion.
optax_adam = pytest.mark.usefixtures("lenient_promotion")
SIGMAS = {"conv1": 0.3, "fc": 4.0}


def tree(seed, nested=False):
    rng = np.random.default_rng(seed)
    shapes = {
        "conv1": {"kernel": (3, 3, 2, 4), "bias": (4,)},
        "fc": {"kernel": (5, 3), "bias": (3,)},
        "head": {"kernel": (3, 2), "bias": (2,)},
    }
    params = jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    return {"torso": {"inner": params}, "extra": jnp.ones(2)} if nested else params


def collection(nested=False, sigmas=None):
    layers = {
        name: {"u": jnp.ones(2), "v": jnp.ones(3), "sigma": jnp.float32(sigma)}
        for name, sigma in (SIGMAS if sigmas is None else sigmas).items()
    }
    return {"torso": {"inner": layers}} if nested else layers


def hand_divided(grads, factors):
    """Gradients with the hooked kernels multiplied, by hand."""
    return {
        name: {
            "kernel": layer["kernel"] * jnp.float32(factors.get(name, 1.0)),
            "bias": layer["bias"],
        }
        for name, layer in grads.items()
    }


def assert_close(got, expected, rtol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=0), got, expected)


def assert_identical(got, expected):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def run(optimiser, num_steps, spectral_of=None, scale_gradients=None):
    """Trajectory of the parameters under gradients that depend on them."""
    params = tree(0)
    state = optimiser.init(params)

    @jax.jit
    def step(params, state, noise, extra):
        grads = jax.tree.map(lambda p, n: jnp.sin(p) + n, params, noise)
        if scale_gradients is not None:
            grads = hand_divided(grads, scale_gradients)
        updates, state = optimiser.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    trajectory = []
    for i in range(num_steps):
        extra = {} if spectral_of is None else {"spectral": spectral_of(i)}
        params, state = step(params, state, tree(i + 1), extra)
        trajectory.append(params)
    return trajectory


@pytest.mark.parametrize("bound", [None, 1.0, 2, 10.0])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("jit", [False, True])
def test_div_grad_divides_hooked_kernels_alone(bound, nested, jit):
    grads = tree(1, nested)
    optimiser = schedulers.div_grad(bound)
    update = jax.jit(optimiser.update) if jit else optimiser.update
    got, state = update(grads, optimiser.init(grads), spectral=collection(nested))
    inner_got = got["torso"]["inner"] if nested else got
    inner = grads["torso"]["inner"] if nested else grads
    for name, sigma in SIGMAS.items():
        divisor = sigma if bound is None else max(sigma / bound, 1)
        np.testing.assert_allclose(
            inner_got[name]["kernel"], inner[name]["kernel"] / np.float32(divisor), rtol=1e-6
        )
        assert_identical(inner_got[name]["bias"], inner[name]["bias"])
    assert_identical(inner_got["head"], inner["head"])
    if nested:
        assert_identical(got["extra"], grads["extra"])
    assert state == optax.EmptyState()


def test_frozen_collections_and_half_precision():
    grads = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(1))
    optimiser = schedulers.div_grad()
    got, _ = optimiser.update(grads, optimiser.init(grads), spectral=freeze(collection()))
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(got))
    np.testing.assert_allclose(
        np.float32(got["fc"]["kernel"]), np.float32(grads["fc"]["kernel"]) / 4, rtol=1e-2
    )


@optax_adam
@pytest.mark.parametrize("name", ["adam", "rmsprop", "sgd"])
def test_div_grad_in_a_chain_equals_dividing_by_hand(name):
    inner = {
        "adam": lambda: optax.adam(2.5e-4, eps=3.125e-4),
        "rmsprop": lambda: optax.rmsprop(2.5e-4, decay=0.95, eps=0.01, centered=True),
        "sgd": lambda: optax.sgd(0.1, momentum=0.9),
    }[name]
    ours = run(optax.chain(schedulers.div_grad(), inner()), 20, lambda _: collection())
    by_hand = run(inner(), 20, scale_gradients={k: 1 / v for k, v in SIGMAS.items()})
    assert_close(ours, by_hand, rtol=2e-6)


@optax_adam
@pytest.mark.parametrize("eps", [1e-8, 3.125e-4, 0.1])
@pytest.mark.parametrize("bound", [None, 2.0])
def test_mul_eps_equals_adam_on_divided_gradients_while_sigma_is_constant(eps, bound):
    mul_eps = schedulers.adam_mul_eps(1e-2, eps=eps, bound=bound)
    div_grad = optax.chain(schedulers.div_grad(bound), optax.adam(1e-2, eps=eps))
    got = run(mul_eps, 20, lambda _: collection())
    expected = run(div_grad, 20, lambda _: collection())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * (1 + np.abs(b).max())),
        got,
        expected,
    )
    # The two would agree for any optimiser that ignores sigma: it must have mattered.
    if eps > 1e-3:
        plain = run(optax.adam(1e-2, eps=eps), 20)
        assert np.abs(plain[-1]["fc"]["kernel"] - got[-1]["fc"]["kernel"]).max() > 1e-3


@optax_adam
def test_mul_eps_differs_from_div_grad_when_sigma_moves():
    def moving(i):
        return collection(sigmas={"fc": 1.0 + i})

    got = run(schedulers.adam_mul_eps(1e-2, eps=0.1), 20, moving)
    other = run(optax.chain(schedulers.div_grad(), optax.adam(1e-2, eps=0.1)), 20, moving)
    assert np.abs(got[-1]["fc"]["kernel"] - other[-1]["fc"]["kernel"]).max() > 1e-3


def test_mul_eps_against_a_float64_transcription():
    b1, b2, eps, learning_rate = 0.8, 0.95, 0.05, 0.03
    rng = np.random.default_rng(3)
    grads = rng.normal(size=(20, 4, 3)).astype(np.float32)
    sigmas = rng.uniform(0.1, 5, 20).astype(np.float32)
    optimiser = schedulers.adam_mul_eps(learning_rate, b1, b2, eps)
    params = {"fc": {"kernel": jnp.zeros((4, 3))}}
    state = optimiser.init(params)
    kernel, m, n = np.zeros((3, 4, 3))
    for t in range(20):
        updates, state = optimiser.update(
            {"fc": {"kernel": jnp.asarray(grads[t])}},
            state,
            params,
            spectral={"fc": {"sigma": jnp.asarray(sigmas[t])}},
        )
        params = optax.apply_updates(params, updates)
        m = b1 * m + (1 - b1) * np.float64(grads[t])
        n = b2 * n + (1 - b2) * np.float64(grads[t]) ** 2
        m_hat, n_hat = m / (1 - b1 ** (t + 1)), n / (1 - b2 ** (t + 1))
        kernel = kernel - learning_rate * m_hat / (np.sqrt(n_hat) + eps * sigmas[t])
        np.testing.assert_allclose(params["fc"]["kernel"], kernel, rtol=0, atol=1e-6)


@optax_adam
def test_unhooked_leaves_are_adams_bit_for_bit():
    got = run(schedulers.adam_mul_eps(1e-2, eps=1e-3), 5, lambda _: collection())
    plain = run(optax.adam(1e-2, eps=1e-3), 5)
    for ours, adams in zip(got, plain, strict=True):
        assert_identical(ours["head"], adams["head"])
        for name in SIGMAS:
            assert_identical(ours[name]["bias"], adams[name]["bias"])
            assert np.any(ours[name]["kernel"] != adams[name]["kernel"])


@optax_adam
def test_learning_rate_schedules_and_vmapped_hyper_parameters():
    scheduled = run(
        schedulers.adam_mul_eps(optax.constant_schedule(1e-2), eps=1e-3), 3, lambda _: collection()
    )
    assert_close(scheduled, run(schedulers.adam_mul_eps(1e-2, eps=1e-3), 3, lambda _: collection()))

    params, grads = tree(0), tree(1)

    def step(learning_rate, eps, bound):
        updates = []
        for optimiser in (
            schedulers.adam_mul_eps(learning_rate, eps=eps, bound=bound),
            optax.chain(schedulers.div_grad(bound), optax.adam(learning_rate, eps=eps)),
        ):
            state = optimiser.init(params)
            updates.append(optimiser.update(grads, state, params, spectral=collection())[0])
        return updates

    hyper = np.float32([[1e-3, 1e-2, 0.1], [1e-4, 1e-2, 1e-3], [1.0, 2.0, 10.0]])
    swept = jax.jit(jax.vmap(step))(*hyper)
    for i in range(3):
        one = step(*(float(x) for x in hyper[:, i]))
        assert_close(jax.tree.map(lambda x, i=i: x[i], swept), one, rtol=2e-5)


def relu_net(params, x, factor):
    """Dense ReLU network whose kernels are multiplied by `factor(name)`."""
    for name in ("a", "b", "c"):
        x = jnp.dot(x, params[name] * factor(name))
        x = x if name == "c" else jax.nn.relu(x)
    return x


@pytest.mark.parametrize("bound", [None, 1.5])
def test_div_out_equals_normalising_every_layer_of_a_relu_net_without_biases(bound):
    rng = np.random.default_rng(4)
    sizes = {"a": (7, 5), "b": (5, 6), "c": (6, 3)}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in sizes.items()}
    x = jnp.asarray(rng.normal(size=(11, 7)), jnp.float32)
    hooked = {}
    for name, kernel in params.items():
        u = spectral.initial_vectors(jax.random.key(0), kernel.shape[1:])
        sigma, u, v = spectral.power_iteration_dense(kernel, u)
        hooked[name] = {"u": u, "v": v, "sigma": sigma}
    normalised = relu_net(params, x, lambda name: spectral.scale(hooked[name]["sigma"], bound))
    plain = relu_net(params, x, lambda _: jnp.float32(1))
    got = jax.jit(schedulers.div_out)(plain, hooked, bound)
    np.testing.assert_allclose(got, normalised, rtol=1e-5, atol=1e-6)
    assert np.abs(plain - got).max() > 0.1


def test_div_out_differentiates_through_sigma_where_it_is_not_a_constant():
    def value(sigma):
        return jnp.sum(schedulers.div_out(jnp.ones(3), {"fc": {"sigma": sigma}}))

    np.testing.assert_allclose(jax.grad(value)(jnp.float32(2.0)), -3 / 4, rtol=1e-6)


@pytest.mark.parametrize("make", [schedulers.div_grad, lambda: schedulers.adam_mul_eps(1e-3)])
@pytest.mark.parametrize(
    "extra, found",
    [
        ({}, "pass spectral="),
        ({"spectral": {}}, "found nothing"),
        ({"spectral": {"fc": {"u": np.ones(2)}}}, "found fc/u"),
        (
            {"spectral": {"fc9": {"sigma": np.float32(1)}}},
            "'fc9'.*have kernels in 'conv1', 'fc', 'head'",
        ),
    ],
)
@pytest.mark.parametrize("chained", [False, True])
def test_missing_norms_are_named(make, extra, found, chained):
    optimiser = optax.chain(make(), optax.identity()) if chained else make()
    params = tree(0)
    with pytest.raises(ValueError, match=found):
        optimiser.update(params, optimiser.init(params), params, **extra)


def test_div_out_without_norms_is_an_error():
    for missing in (None, {}):
        with pytest.raises(ValueError, match="spectral"):
            schedulers.div_out(jnp.ones(2), missing)


def test_docstring_examples_run():
    assert doctest.testmod(schedulers).failed == 0
