"""The losses against float64 brute force, and against the mistakes others made."""

import doctest
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxrl import losses

SUPPORTS = [(-10.0, 10.0, 51), (-3.0, 7.0, 11), (0.0, 1.0, 2), (-10.0, 10.0, 52), (2.0, 5.5, 17)]
DISCOUNTS = [0.99, 0.99**3, 1.0, 0.0, 1e-30, 1e-6, 0.5, 0.9999999]
TOLERANCE = 1e-6


def brute_force(probs, r, discount, v_min, v_max):
    """Algorithm 1 of Bellemare et al. in float64, atom by atom."""
    probs, r, discount = (np.float64(np.float32(x)) for x in (probs, r, discount))
    num_atoms = len(probs)
    atoms = np.linspace(v_min, v_max, num_atoms)
    out = np.zeros(num_atoms)
    for j in range(num_atoms):
        b = (np.clip(r + discount * atoms[j], v_min, v_max) - v_min) * (num_atoms - 1)
        b = np.clip(b / (v_max - v_min), 0, num_atoms - 1)
        lower = min(int(np.floor(b)), num_atoms - 2)
        out[lower] += probs[j] * (1 - (b - lower))
        out[lower + 1] += probs[j] * (b - lower)
    return out


@functools.cache
def projection(v_min, v_max):
    """Compiled once per support, on a batch."""
    return jax.jit(
        jax.vmap(functools.partial(losses.categorical_projection, v_min=v_min, v_max=v_max))
    )


def check_projection(probs, r, discount, v_min, v_max):
    probs = np.asarray(probs, np.float32)
    got = np.asarray(projection(v_min, v_max)(probs, np.float32(r), np.float32(discount)))
    expected = np.stack(
        [brute_force(*row, v_min, v_max) for row in zip(probs, r, discount, strict=True)]
    )
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(got.sum(1), probs.sum(1, dtype=np.float64), rtol=0, atol=TOLERANCE)
    assert got.min() >= 0


@pytest.mark.parametrize("support", SUPPORTS)
@pytest.mark.parametrize("discount", DISCOUNTS)
def test_projection_of_every_delta(support, discount):
    # A delta exposes the position's whole error; a spread-out distribution averages it away.
    v_min, v_max, num_atoms = support
    rewards = np.random.default_rng(0).uniform(-30, 30, 20 * num_atoms)
    rewards[: 5 * num_atoms] /= 10
    probs = np.tile(np.eye(num_atoms), (20, 1))
    check_projection(probs, rewards, np.full(len(rewards), discount), *support[:2])


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.0, 0.1, 1.0, 30.0]),
    rewards=st.lists(st.floats(-30, 30, width=32), min_size=8, max_size=8),
    discount=st.floats(0, 1, width=32) | st.sampled_from(DISCOUNTS),
    support=st.sampled_from(SUPPORTS),
)
@example(seed=0, temperature=1.0, rewards=[0.4, -0.4, 10, -10, 20, -20, 1, 0.0], discount=1.0,
         support=SUPPORTS[0])  # fmt: skip
def test_projection_of_anything(seed, temperature, rewards, discount, support):
    v_min, v_max, num_atoms = support
    logits = np.random.default_rng(seed).normal(size=(8, num_atoms)) * temperature
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    check_projection(probs, rewards, [discount] * 8, v_min, v_max)


@settings(deadline=None, max_examples=30)
@given(
    r=st.floats(-12, 12, width=32),
    discount=st.floats(0, 1, width=32),
    seed=st.integers(0, 2**32 - 1),
)
def test_projection_preserves_the_mean_where_nothing_is_clipped(r, discount, seed):
    v_min, v_max, num_atoms = -30.0, 30.0, 61
    atoms = np.linspace(v_min, v_max, num_atoms)
    probs = np.random.default_rng(seed).dirichlet(np.ones(num_atoms))
    probs[np.abs(atoms) > 15] = 0
    probs = np.float32(probs / probs.sum())[None]
    new = projection(v_min, v_max)(probs, np.float32([r]), np.float32([discount]))
    expected = r * probs.sum(dtype=np.float64) + discount * (probs[0] @ atoms)
    np.testing.assert_allclose(np.float64(new[0]) @ atoms, expected, rtol=0, atol=3e-5)


@pytest.mark.parametrize("shift", [-50, -7, -1, 0, 1, 2, 49, 50, 120])
def test_integer_positions_keep_all_their_mass(shift):
    # Mistake: with l = floor(b) and u = ceil(b), the weights u - b and b - l both vanish at l = u.
    v_min, v_max, num_atoms = -25.0, 25.0, 51
    probs = np.random.default_rng(1).dirichlet(np.ones(num_atoms)).astype(np.float32)
    got = losses.categorical_projection(probs, float(shift), 1.0, v_min=v_min, v_max=v_max)
    expected = np.zeros(num_atoms)
    np.add.at(expected, np.clip(np.arange(num_atoms) + shift, 0, num_atoms - 1), probs)
    # Bit for bit, but where clipping sums many atoms into one.
    np.testing.assert_array_equal(got[1:-1], expected[1:-1].astype(np.float32))
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


def test_identity_is_exact_on_the_papers_support():
    probs = np.random.default_rng(2).dirichlet(np.ones(51)).astype(np.float32)
    np.testing.assert_array_equal(losses.categorical_projection(probs, 0.0, 1.0), probs)


@pytest.mark.parametrize("r", [0.0, 1.0, -1.0, 0.1, 10.0, -10.0, 25.0, -1e30, np.inf, -np.inf])
def test_terminals_are_the_reward_alone(r):
    probs = np.full(51, 1 / 51, np.float32)
    got = np.asarray(losses.categorical_projection(probs, r, 0.0), np.float64)
    place = (np.clip(np.float64(np.float32(r)), -10, 10) + 10) * 2.5
    expected = np.maximum(1 - np.abs(place - np.arange(51)), 0)
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("batch_size", [1, 51, 52, 77])
def test_any_batch_size_with_terminals_in_late_rows(batch_size):
    # Mistake: indexing the flattened batch by atoms loses the mass of terminal rows from 51 on.
    rng = np.random.default_rng(batch_size)
    probs = rng.dirichlet(np.ones(51), batch_size)
    discounts = np.where(np.arange(batch_size) % 2 == 0, 0.0, 0.99)
    discounts[51:] = 0
    check_projection(probs, rng.uniform(-12, 12, batch_size), discounts, -10.0, 10.0)


def test_projection_outside_jit_and_in_other_precisions():
    probs = np.random.default_rng(3).dirichlet(np.ones(51))
    expected = brute_force(probs, 0.3, 0.99, -10.0, 10.0)
    eager = losses.categorical_projection(probs.tolist(), 0.3, 0.99)
    assert eager.dtype == jnp.float32
    np.testing.assert_allclose(eager, expected, rtol=0, atol=TOLERANCE)
    half = losses.categorical_projection(jnp.asarray(probs, jnp.bfloat16), 0.3, 0.99)
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, expected, rtol=0, atol=1e-3)
    with jax.enable_x64(True):
        wide = losses.categorical_projection(probs, np.float64(np.float32(0.3)), np.float32(0.99))
    assert wide.dtype == jnp.float32
    np.testing.assert_allclose(wide, expected, rtol=0, atol=TOLERANCE)


def test_projection_compiles_to_no_matrix_product():
    # TF32 or bfloat16 products would cost three digits on an accelerator.
    text = jax.jit(losses.categorical_projection).lower(jnp.ones(51), 0.0, 0.5).as_text()
    assert "dot_general" not in text


def test_projection_differentiates_in_probs_alone():
    probs = jnp.full(11, 1 / 11)

    def mean(probs, r, discount):
        new = losses.categorical_projection(probs, r, discount, v_min=-3.0, v_max=7.0)
        return jnp.sum(new * losses.support(-3.0, 7.0, 11))

    grads = jax.grad(mean, argnums=(0, 1, 2))(probs, jnp.float32(0.25), jnp.float32(0.5))
    expected = 0.25 + 0.5 * np.linspace(-3, 7, 11)
    np.testing.assert_allclose(grads[0], expected, rtol=0, atol=1e-5)
    assert grads[1] == 0 and grads[2] == 0


@pytest.mark.parametrize("spec", [*SUPPORTS, (-10.0, 10.0, 201)])
def test_support_spacings_are_equal_up_to_one_rounding(spec):
    # Mistake: jnp.linspace(-10, 10, 51).
    atoms = losses.support(*spec)
    assert isinstance(atoms, np.ndarray) and atoms.dtype == np.float32
    v_min, v_max, num_atoms = spec
    exact = v_min + np.arange(num_atoms) * ((v_max - v_min) / (num_atoms - 1))
    assert np.all(np.abs(atoms - exact) <= np.spacing(np.abs(exact).astype(np.float32)) / 2 + 1e-14)
    assert atoms[0] == v_min and atoms[-1] == v_max


@pytest.mark.parametrize(
    "spec, found",
    [((1.0, 1.0, 5), "1.0"), ((2.0, -2.0, 5), "2.0"), ((-1.0, 1.0, 1), "1"),
     ((-np.inf, 1.0, 5), "inf"), ((np.nan, 1.0, 5), "nan")],
)  # fmt: skip
def test_support_errors_name_what_was_found(spec, found):
    with pytest.raises(ValueError, match=found):
        losses.support(*spec)


def test_expected_values():
    logits = np.random.default_rng(4).normal(size=(6, 51)).astype(np.float32) * 5
    probs = np.exp(np.float64(logits))
    probs /= probs.sum(1, keepdims=True)
    expected = probs @ np.linspace(-10, 10, 51)
    np.testing.assert_allclose(losses.expected_values(logits), expected, rtol=0, atol=1e-5)


def c51_oracle(logits_tm1, a_tm1, r, discount, logits_t, selector, v_min, v_max):
    def log_softmax(x):
        x = np.float64(x)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    atoms = np.linspace(v_min, v_max, logits_t.shape[1])
    best = np.argmax(np.exp(log_softmax(selector)) @ atoms)
    target = brute_force(np.exp(log_softmax(logits_t[best])), r, discount, v_min, v_max)
    return -target @ log_softmax(logits_tm1[a_tm1])


def c51_batch(batch_size, num_actions=5, num_atoms=51, seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(3, batch_size, num_actions, num_atoms)).astype(np.float32) * 3
    actions = rng.integers(0, num_actions, batch_size).astype(np.int32)
    rewards = rng.uniform(-12, 12, batch_size).astype(np.float32)
    discounts = rng.choice(np.float32([0, 0.99, 0.99**3]), batch_size)
    discounts[51:] = 0
    return logits, actions, rewards, discounts


@pytest.mark.parametrize("batch_size", [1, 51, 52, 77])
@pytest.mark.parametrize("double", [False, True])
def test_c51_losses_against_brute_force(batch_size, double):
    (tm1, t, selector), actions, rewards, discounts = c51_batch(batch_size, seed=batch_size)
    selector = selector if double else t
    function = losses.double_c51_loss if double else losses.c51_loss
    arguments = (tm1, actions, rewards, discounts, t) + ((selector,) if double else ())
    got = jax.jit(jax.vmap(function))(*arguments)
    expected = [
        c51_oracle(*row, -10.0, 10.0)
        for row in zip(tm1, actions, rewards, discounts, t, selector, strict=True)
    ]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=0)
    np.testing.assert_allclose(
        function(*(x[-1] for x in arguments)), expected[-1], rtol=1e-5, atol=0
    )


def test_c51_on_another_support():
    (tm1, t, _), actions, rewards, discounts = c51_batch(3, num_atoms=11)
    for row in zip(tm1, actions, rewards, discounts, t, strict=True):
        expected = c51_oracle(*row, row[-1], -3.0, 7.0)
        got = losses.c51_loss(*row, v_min=-3.0, v_max=7.0)
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("logit", [-200.0, -1e4])
def test_gradient_survives_an_underflowing_probability(logit):
    # Mistake: log(clip(p, 1e-5)) is flat wherever p is below 1e-5.
    logits = np.full((2, 51), logit, np.float32)
    logits[:, 0] = 0
    loss, grad = jax.value_and_grad(losses.c51_loss)(jnp.asarray(logits), 1, 10.0, 0.0, logits)
    assert float(jax.nn.softmax(jnp.asarray(logits[1]))[-1]) == 0
    np.testing.assert_allclose(loss, -logit, rtol=1e-6)
    # The gradient of a cross-entropy is the softmax less the target.
    expected = np.zeros((2, 51))
    expected[1, 0], expected[1, -1] = 1, -1
    np.testing.assert_allclose(grad, expected, rtol=0, atol=1e-6)


def test_c51_gradient_is_softmax_less_target():
    (tm1, t, _), actions, rewards, discounts = c51_batch(9)
    grads = jax.jit(jax.vmap(jax.grad(losses.c51_loss)))(
        jnp.asarray(tm1), actions, rewards, discounts, jnp.asarray(t)
    )
    for i in range(9):
        best = np.argmax(losses.expected_values(t[i]))
        probs_t = np.asarray(jax.nn.softmax(jnp.asarray(t[i, best])))
        target = brute_force(probs_t, rewards[i], discounts[i], -10.0, 10.0)
        expected = np.zeros((5, 51))
        expected[actions[i]] = np.asarray(jax.nn.softmax(jnp.asarray(tm1[i, actions[i]]))) - target
        np.testing.assert_allclose(grads[i], expected, rtol=0, atol=3e-6)


def test_no_gradient_flows_through_c51_targets():
    (tm1, t, selector), actions, rewards, discounts = c51_batch(1)
    grads = jax.grad(losses.double_c51_loss, argnums=(2, 3, 4, 5))(
        *map(jnp.asarray, (tm1[0], actions[0], rewards[0], discounts[0], t[0], selector[0]))
    )
    assert all(not np.any(grad) for grad in grads)
    # Nor where online and target logits are one and the same array.
    shared = jnp.asarray(tm1[0])

    def tied(x):
        return losses.c51_loss(x, 0, 0.5, 0.99, x)

    def frozen(x):
        return losses.c51_loss(x, 0, 0.5, 0.99, shared)

    np.testing.assert_array_equal(jax.grad(tied)(shared), jax.grad(frozen)(shared))


def test_double_c51_lets_the_selector_choose():
    # Target logits put action 0 at 10 and action 1 at -10; the selector prefers action 1.
    high, low = np.zeros((2, 51), np.float32)
    high[-1], low[0] = 100, 100
    target, selector = np.stack([high, low]), np.stack([low, high])
    online = np.random.default_rng(5).normal(size=(2, 51)).astype(np.float32)
    log_probs = np.asarray(jax.nn.log_softmax(jnp.asarray(online[0])))
    single = losses.c51_loss(online, 0, 0.0, 1.0, target)
    double = losses.double_c51_loss(online, 0, 0.0, 1.0, target, selector)
    np.testing.assert_allclose(single, -log_probs[-1], rtol=1e-5)
    np.testing.assert_allclose(double, -log_probs[0], rtol=1e-5)


def dqn_oracle(q_tm1, a_tm1, r, discount, q_t, selector, kind):
    error = np.float64(r) + np.float64(discount) * q_t[np.argmax(selector)] - q_tm1[a_tm1]
    if kind == "mse":
        return error**2
    return 0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5


@pytest.mark.parametrize("kind", ["huber", "mse"])
@pytest.mark.parametrize("double", [False, True])
def test_dqn_losses_against_brute_force(kind, double):
    rng = np.random.default_rng(6)
    q_tm1, q_t, selector = rng.normal(size=(3, 77, 4)).astype(np.float32)
    selector = selector if double else q_t
    actions = rng.integers(0, 4, 77).astype(np.int32)
    rewards = rng.normal(size=77).astype(np.float32)
    discounts = rng.choice(np.float32([0, 0.99]), 77)
    function = losses.double_dqn_loss if double else losses.dqn_loss
    function = jax.jit(jax.vmap(functools.partial(function, kind=kind)))
    arguments = (q_tm1, actions, rewards, discounts, q_t) + ((selector,) if double else ())
    expected = [
        dqn_oracle(*row, kind)
        for row in zip(q_tm1, actions, rewards, discounts, q_t, selector, strict=True)
    ]
    np.testing.assert_allclose(function(*arguments), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["huber", "mse"])
@pytest.mark.parametrize("error", [-1e4, -1.0, -0.3, 0.0, 0.5, 1.0, 7.0])
def test_dqn_gradients_follow_torch(kind, error):
    q = jnp.asarray([3.0, -2.0, 0.5], jnp.float32)

    def loss(q_tm1, r, discount, q_t, selector):
        return losses.double_dqn_loss(q_tm1, 1, r, discount, q_t, selector, kind=kind)

    arguments = (q, jnp.float32(error - 2.0), jnp.float32(0.0), q, q)
    grads = jax.grad(loss, argnums=(0, 1, 2, 3, 4))(*arguments)
    slope = 2 * error if kind == "mse" else np.clip(error, -1, 1)
    np.testing.assert_allclose(grads[0], [0, -slope, 0], rtol=1e-6)
    assert all(not np.any(grad) for grad in grads[1:])


LOGITS = np.zeros((3, 7), np.float32)
Q = np.zeros(3, np.float32)


@pytest.mark.parametrize(
    "call, found",
    [
        (lambda: losses.categorical_projection(LOGITS, 0.0, 0.0), r"probs .*\(3, 7\).*vmap"),
        (lambda: losses.categorical_projection(Q, Q, 0.0), r"r_t .*\(3,\).*vmap"),
        (lambda: losses.categorical_projection(Q, 0.0, Q), r"discount_t .*\(3,\)"),
        (lambda: losses.categorical_projection(Q[:1], 0.0, 0.0), "num_atoms .* found 1"),
        (lambda: losses.categorical_projection(Q, 0.0, 0.0, v_min=1.0, v_max=-1.0), "1.0 and -1.0"),
        (lambda: losses.categorical_projection(Q.astype(complex), 0.0, 0.0), "complex"),
        (lambda: losses.expected_values(Q), r"logits .*\(3,\)"),
        (lambda: losses.c51_loss(Q, 0, 0.0, 0.0, LOGITS), r"logits_tm1 .*\(3,\)"),
        (lambda: losses.c51_loss(LOGITS[None], 0, 0.0, 0.0, LOGITS), r"logits_tm1 .*\(1, 3, 7\)"),
        (lambda: losses.c51_loss(LOGITS, 0, 0.0, 0.0, LOGITS[:2]), r"\(3, 7\).*\(2, 7\)"),
        (lambda: losses.c51_loss(LOGITS, 0.0, 0.0, 0.0, LOGITS), "a_tm1 .*float32"),
        (lambda: losses.c51_loss(LOGITS, [0], 0.0, 0.0, LOGITS), r"a_tm1 .*\(1,\)"),
        (
            lambda: losses.double_c51_loss(LOGITS, 0, 0.0, 0.0, LOGITS, LOGITS[:, :5]),
            r"selector_logits_t \(3, 5\)",
        ),
        (lambda: losses.dqn_loss(LOGITS, 0, 0.0, 0.0, Q), r"q_tm1 .*\(3, 7\)"),
        (lambda: losses.dqn_loss(Q, 0, 0.0, 0.0, Q[:2]), r"\(3,\).*\(2,\)"),
        (lambda: losses.dqn_loss(Q, True, 0.0, 0.0, Q), "a_tm1 .*bool"),
        (lambda: losses.dqn_loss(Q, 0, Q, 0.0, Q), r"r_t .*\(3,\)"),
        (lambda: losses.dqn_loss(Q, 0, 0.0, 0.0, Q, kind="l1"), "huber.*mse.*'l1'"),
        (lambda: losses.double_dqn_loss(Q, 0, 0.0, 0.0, Q, Q[:2]), r"selector_q_t \(2,\)"),
    ],
)
def test_errors_name_what_was_found(call, found):
    with pytest.raises(ValueError, match=found):
        call()


@pytest.mark.parametrize("name", ["losses", "categorical"])
def test_docstring_examples_run(name):
    assert doctest.testmod(importlib.import_module(f"jaxrl.{name}")).failed == 0
