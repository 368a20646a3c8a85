"""The optimisers against transcriptions of the PyTorch originals in float64, and the schedule."""

import doctest
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vicreg import optim
from vicreg.config import OptimConfig

SHAPES = {"conv": (3, 3, 2, 4), "dense": (5, 3), "bias": (3,), "scale": (4,)}
MATRICES = ("conv", "dense")
STEPS, PER_EPOCH = 20, 4
LARS = OptimConfig(base_lr=0.4, warmup_epochs=3.0, weight_decay=1e-2, trust_coefficient=0.02)
LARC = OptimConfig(
    base_lr=0.4, warmup_epochs=3.0, weight_decay=1e-2, trust_coefficient=0.1, clip=True
)


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape) * scale for name, shape in SHAPES.items()}


def gradient(params, step):
    """Depends on the parameters, so that one wrong step spoils all later ones."""
    noise = tree(step + 1, 0.1 * (1 + step % 3))
    return {name: np.sin(p) + noise[name] for name, p in params.items()}


def learning_rate(config, batch_size, steps, per_epoch, step):
    """As the authors' adjust_learning_rate."""
    base = config.base_lr * batch_size / 256
    warmup = config.warmup_epochs * per_epoch
    if step < warmup:
        return base * step / warmup
    q = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
    return base * q + base * config.end_scale * (1 - q)


def direction(config, g, p, lr):
    """What enters the momentum of a parameter that isn't one-dimensional."""
    wd, eta = config.weight_decay, config.trust_coefficient
    g_norm, p_norm = np.sqrt(np.sum(g * g)), np.sqrt(np.sum(p * p))
    if not config.clip:
        d = g + wd * p
        d_norm = np.sqrt(np.sum(d * d))
        return d * (eta * p_norm / d_norm if p_norm > 0 and d_norm > 0 else 1.0)
    if p_norm == 0 or g_norm == 0:
        return g
    q = eta * p_norm / (g_norm + p_norm * wd + 1e-8)
    return min(q / lr if lr else math.inf, 1.0) * (g + wd * p)


def transcription(config, steps=STEPS, batch_size=256, params=None, gradients=gradient):
    """The original, parameter by parameter; the trajectory of the parameters."""
    params = tree(0) if params is None else params
    buffers = {name: np.zeros_like(p) for name, p in params.items()}
    trajectory = []
    for step in range(steps):
        lr = learning_rate(config, batch_size, STEPS, PER_EPOCH, step)
        grads, params = gradients(params, step), dict(params)
        for name, p in params.items():
            g = grads[name]
            d = g if p.ndim == 1 else direction(config, g, p, lr)
            buffers[name] = config.momentum * buffers[name] + d
            params[name] = p - lr * buffers[name]
        trajectory.append(params)
    return trajectory


def run(optimiser, steps=STEPS, params=None, gradients=gradient):
    """Ours, in float64."""
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, tree(0) if params is None else params)
        state, update, trajectory = optimiser.init(params), jax.jit(optimiser.update), []
        for step in range(steps):
            grads = jax.tree.map(jnp.asarray, gradients(params, step))
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            trajectory.append(jax.tree.map(np.asarray, params))
    return trajectory


def ours(config, batch_size=256):
    return optim.lars(config, optim.warmup_cosine(config, batch_size, STEPS, PER_EPOCH))


def largest_error(got, expected):
    """Of the way gone since the start, relative, over steps and parameters."""
    start = tree(0)
    return max(
        np.max(np.abs(a[name] - b[name])) / np.max(np.abs(b[name] - start[name]))
        for a, b in zip(got[1:], expected[1:], strict=True)
        for name in SHAPES
    )


@pytest.mark.parametrize("batch_size", [256, 640])
@pytest.mark.parametrize("config", [LARS, LARC], ids=["lars", "larc"])
def test_trajectory_is_that_of_the_original(config, batch_size):
    expected = transcription(config, batch_size=batch_size)
    assert largest_error(run(ours(config, batch_size)), expected) < 1e-10


def test_optax_lars_is_another_optimiser():
    schedule = optim.warmup_cosine(LARS, 256, STEPS, PER_EPOCH)
    mask = {name: name in MATRICES for name in SHAPES}
    theirs = optax.lars(schedule, LARS.weight_decay, mask, LARS.trust_coefficient, 0.0, mask, 0.9)
    assert largest_error(run(theirs), transcription(LARS)) > 0.2
    # It's the order, for at a constant rate they agree.
    constant = optax.lars(0.1, LARS.weight_decay, mask, LARS.trust_coefficient, 0.0, mask, 0.9)
    assert largest_error(run(constant), run(optim.lars(LARS, lambda step: 0.1))) < 1e-10


@pytest.mark.parametrize("config", [LARS, LARC], ids=["lars", "larc"])
def test_transcription_is_torch_momentum_of_the_scaled_gradient(config):
    torch = pytest.importorskip("torch")
    params = {name: torch.tensor(p) for name, p in tree(0).items()}
    sgd = torch.optim.SGD(params.values(), lr=0.0, momentum=config.momentum)
    for step, expected in enumerate(transcription(config)):
        lr = learning_rate(config, 256, STEPS, PER_EPOCH, step)
        sgd.param_groups[0]["lr"] = lr
        values = {name: p.numpy().copy() for name, p in params.items()}
        for name, g in gradient(values, step).items():
            d = direction(config, g, values[name], lr) if name in MATRICES else g
            params[name].grad = torch.tensor(d)
        sgd.step()
        for name, p in params.items():
            np.testing.assert_allclose(p.numpy(), expected[name], rtol=1e-12, atol=1e-14)


def test_larc_clips_some_steps_and_not_others():
    # Else the trajectory above would show one branch alone.
    params, ratios = tree(0), []
    for step, after in enumerate(transcription(LARC)):
        lr, g = learning_rate(LARC, 256, STEPS, PER_EPOCH, step), gradient(params, step)["conv"]
        p = params["conv"]
        d = direction(LARC, g, p, lr)
        ratios.append(np.sum(d * d) / np.sum((g + LARC.weight_decay * p) ** 2))
        params = after
    assert np.isclose(ratios[0], 1) and 3 <= sum(np.isclose(ratios, 1)) <= STEPS - 3


@pytest.mark.parametrize("config", [LARS, LARC], ids=["lars", "larc"])
@pytest.mark.parametrize("zero", ["parameters", "gradients", "both"])
def test_zero_norms(config, zero):
    params = tree(0, 0.0 if zero != "gradients" else 1.0)

    def gradients(params, step):
        if zero == "parameters" or step > 1:
            return gradient(params, step)
        return {name: np.zeros(shape) for name, shape in SHAPES.items()}

    expected = transcription(config, params=params, gradients=gradients)
    got = run(ours(config), params=params, gradients=gradients)
    for a, b in zip(got, expected, strict=True):
        for name in SHAPES:
            np.testing.assert_allclose(a[name], b[name], rtol=1e-10, atol=1e-13)
    # Without a gradient, LARS still decays, from the second step on; LARC doesn't.
    if zero == "gradients":
        moved = {name: np.any(got[1][name] != params[name]) for name in SHAPES}
        assert moved == {name: not config.clip and name in MATRICES for name in SHAPES}


def test_larc_makes_no_nan_on_the_way():
    # lr = 0 in the first step, the norms are 0 in turn; float32, and stopped at the first NaN.
    optimiser = ours(LARC)
    ones = {name: jnp.ones(shape) for name, shape in SHAPES.items()}
    zeros = jax.tree.map(jnp.zeros_like, ones)
    with jax.debug_nans(True):
        for params, grads in ((ones, ones), (zeros, ones), (ones, zeros), (zeros, zeros)):
            updates, state = optimiser.update(grads, optimiser.init(params), params)
            assert all(not np.any(u) for u in jax.tree.leaves(updates))  # the rate is 0
            updates, _ = optimiser.update(grads, state, params)
            expected = sum(not np.any(u) for u in jax.tree.leaves(updates))
            assert expected == (len(SHAPES) if grads is zeros else 0)


@pytest.mark.parametrize("config", [LARS, LARC], ids=["lars", "larc"])
def test_seeds_under_vmap_are_seeds_alone(config):
    optimiser = ours(config)
    params, grads = (
        jax.tree.map(lambda *x: np.stack(x).astype(np.float32), *map(tree, seeds))
        for seeds in ((1, 2, 3), (4, 5, 6))
    )

    def steps(vmap, params, grads):
        state, update = vmap(optimiser.init)(params), jax.jit(vmap(optimiser.update))
        for _ in range(3):
            updates, state = update(grads, state, params)
            params = jax.tree.map(np.add, params, updates)
        return params

    together = steps(jax.vmap, params, grads)
    for i in range(3):
        alone = steps(lambda f: f, *(jax.tree.map(lambda x, i=i: x[i], t) for t in (params, grads)))
        for name in SHAPES:
            np.testing.assert_allclose(together[name][i], alone[name], rtol=1e-6)


@pytest.mark.parametrize("config", [LARS, LARC], ids=["lars", "larc"])
def test_one_dimension_takes_neither_decay_nor_ratio(config):
    # A huge decay and coefficient, which the biases must not see.
    loud = OptimConfig(weight_decay=1e3, trust_coefficient=1e3, clip=config.clip)
    params = {"bias": jnp.asarray([3.0, -1.0]), "row": jnp.asarray([[3.0, -1.0]])}
    grads = {"bias": jnp.asarray([0.5, 0.25]), "row": jnp.asarray([[0.5, 0.25]])}
    optimiser = optim.lars(loud, lambda step: 2.0)
    updates, _ = optimiser.update(grads, optimiser.init(params), params)
    np.testing.assert_array_equal(updates["bias"], [-1.0, -0.5])
    assert np.all(np.abs(updates["row"]) > 100)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), factor=st.floats(1e-3, 1e3), lr=st.floats(1e-3, 10.0))
def test_lars_feels_the_direction_of_a_gradient_alone(seed, factor, lr):
    config = OptimConfig(weight_decay=0.0, trust_coefficient=0.05)
    optimiser = optim.lars(config, lambda step: lr)
    params, grads = (
        {"kernel": jnp.asarray(tree(s)["dense"], jnp.float32)} for s in (seed, seed + 1)
    )
    scaled = jax.tree.map(lambda g: g * jnp.float32(factor), grads)
    state = optimiser.init(params)
    one, other = (optimiser.update(g, state, params)[0]["kernel"] for g in (grads, scaled))
    np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-7)
    step, size = np.linalg.norm(one), np.linalg.norm(params["kernel"])
    np.testing.assert_allclose(step, lr * 0.05 * size, rtol=1e-5)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 1000), size=st.floats(1e-3, 1e3), lr=st.floats(1e-3, 10.0))
def test_a_larc_step_is_the_smaller_of_two(seed, size, lr):
    config = OptimConfig(weight_decay=0.0, trust_coefficient=0.05, clip=True)
    optimiser = optim.lars(config, lambda step: lr)
    params = {"kernel": jnp.asarray(tree(seed)["dense"], jnp.float32)}
    grads = {"kernel": jnp.asarray(tree(seed + 1, size)["dense"], jnp.float32)}
    updates, _ = optimiser.update(grads, optimiser.init(params), params)
    limits = 0.05 * np.linalg.norm(params["kernel"]), lr * np.linalg.norm(grads["kernel"])
    np.testing.assert_allclose(np.linalg.norm(updates["kernel"]), min(limits), rtol=1e-4)


def test_larc_needs_parameters():
    optimiser = ours(LARC)
    params = {"kernel": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="needs the parameters"):
        optimiser.update(params, optimiser.init(params))


def test_schedule_at_its_boundaries():
    # The paper's: 0.2 * 2048 / 256 = 1.6; here with 4 updates an epoch, 10 epochs up, 100 in all.
    schedule = optim.warmup_cosine(OptimConfig(), 2048, 400, 4)
    by_hand = {
        0: 0.0, 1: 0.04, 20: 0.8, 39: 1.56, 40: 1.6, 220: 0.8 + 0.0008, 400: 0.0016, 1000: 0.0016,
        130: 1.6 * 0.8535533906 + 0.0016 * 0.1464466094,
    }  # fmt: skip
    for step, lr in by_hand.items():
        np.testing.assert_allclose(schedule(step), lr, rtol=1e-5, atol=1e-9, err_msg=str(step))
        np.testing.assert_array_equal(schedule(jnp.int32(step)), schedule(step))
    np.testing.assert_array_equal(jax.jit(schedule)(jnp.int32(130)), schedule(130))
    assert schedule(0).dtype == jnp.float32


@pytest.mark.parametrize("warmup, first", [(0.0, 1.0), (0.25, 0.0), (5.0, 0.0)])
def test_schedule_without_warm_up_or_of_nothing_else(warmup, first):
    schedule = optim.warmup_cosine(OptimConfig(base_lr=1.0, warmup_epochs=warmup), 256, 20, 4)
    rates = np.asarray([schedule(step) for step in range(21)])
    assert rates[0] == first and np.all(np.isfinite(rates))
    np.testing.assert_allclose(rates[round(4 * warmup)], 1, rtol=1e-6)
    if warmup < 5:
        np.testing.assert_allclose(rates[-1], 1e-3, rtol=1e-4)


def test_a_warm_up_longer_than_the_run():
    optim.warmup_cosine(OptimConfig(warmup_epochs=2.5), 256, 10, 4)
    with pytest.raises(ValueError, match="2.75 epochs takes 11 updates, more than the run's 10"):
        optim.warmup_cosine(OptimConfig(warmup_epochs=2.75), 256, 10, 4)


@settings(deadline=None, max_examples=30)
@given(
    warmup=st.integers(0, 20),
    extra=st.integers(1, 60),
    per_epoch=st.integers(1, 7),
    batch_size=st.integers(1, 4096),
    end_scale=st.floats(0, 1),
)
def test_schedule_rises_then_falls(warmup, extra, per_epoch, batch_size, end_scale):
    config = OptimConfig(warmup_epochs=warmup, end_scale=end_scale)
    up = warmup * per_epoch
    steps = up + extra
    schedule = optim.warmup_cosine(config, batch_size, steps, per_epoch)
    rates = np.asarray(schedule(np.arange(256)))  # of one shape, so that nothing compiles anew
    expected = [
        learning_rate(config, batch_size, steps, per_epoch, step) for step in range(steps + 1)
    ]
    peak = config.base_lr * batch_size / 256
    np.testing.assert_allclose(rates[: steps + 1], expected, rtol=1e-5, atol=1e-6 * peak)
    assert np.all(np.diff(rates[: up + 1]) > 0) and np.max(rates) <= rates[up] * (1 + 1e-6)
    assert np.all(np.diff(rates[up:]) <= 1e-6 * peak)
    np.testing.assert_array_equal(rates[steps:], rates[-1])


def test_docstring_examples_run():
    assert doctest.testmod(optim).failed == 0
