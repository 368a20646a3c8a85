"""The update of a shard against NumPy and optax, its masks, and the aggregation."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from unlearn import models, sisa
from unlearn.config import ModelConfig, OptimConfig
from unlearn.sisa import Learner

ROWS = np.array([[4, 1, 6], [0, 2, -1], [-1, -1, -1], [5, -1, -1]], np.int32)


def data(n=8, d=5, classes=3):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)).astype(np.float32), rng.integers(0, classes, n).astype(np.int32)


def linear(optim=None):
    optimizer = models.make_optimizer(optim or OptimConfig())
    return Learner(models.make_model(ModelConfig(()), 3), optimizer)


def start(learner, x, seed=0):
    return sisa.init(learner, jax.random.key(seed), jnp.asarray(x[0]))


def run(learner, state, x, y, rows, jit=True):
    step = functools.partial(sisa.update, learner)
    step = jax.jit(step) if jit else step
    for row in rows:
        state = step(state, jnp.asarray(x), jnp.asarray(y), jnp.asarray(row))
    return state


@pytest.mark.parametrize("jit", [True, False])
@pytest.mark.parametrize(
    "optim", [OptimConfig(lr=0.3), OptimConfig(momentum=0.0, weight_decay=0.2)]
)
def test_updates_against_numpy(optim, jit):
    x, y = data()
    learner = linear(optim)
    state = start(learner, x)
    got = run(learner, state, x, y, ROWS, jit)
    w, b = (np.float64(state.params["Dense_0"][name]) for name in ("kernel", "bias"))
    trace = [np.zeros_like(w), np.zeros_like(b)]
    for rows in ROWS:
        rows = rows[rows >= 0]
        if not len(rows):
            continue  # neither momentum nor decay
        logits = np.float64(x[rows]) @ w + b
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        p[np.arange(len(rows)), y[rows]] -= 1
        for i, g in enumerate((x[rows].T @ p / len(rows), p.mean(0))):
            trace[i] = g + optim.momentum * trace[i]
            g = g + optim.momentum * trace[i] if optim.momentum else g
            theta = (w, b)[i]
            theta -= optim.lr * (g + optim.weight_decay * theta)
    np.testing.assert_allclose(got.params["Dense_0"]["kernel"], w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got.params["Dense_0"]["bias"], b, rtol=1e-5, atol=1e-6)
    assert got.step == 3


def test_adam_is_optax_adam(lenient_promotion):
    x, y = data()
    learner = linear(OptimConfig("adam", lr=0.01))
    state = start(learner, x)
    tx = optax.adam(0.01)

    def loss(params):
        logits = learner.model.apply({"params": params}, x[ROWS[0]])
        return optax.softmax_cross_entropy_with_integer_labels(logits, y[ROWS[0]]).mean()

    params, opt_state = state.params, tx.init(state.params)
    for _ in range(3):
        changes, opt_state = tx.update(jax.grad(loss)(params), opt_state)
        params = optax.apply_updates(params, changes)
    got = run(learner, state, x, y, ROWS[:1].repeat(3, 0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), got.params, params)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
def test_other_records_have_no_influence(poison):
    x, y = data()
    learner = linear()
    state = start(learner, x)
    expected = run(learner, state, x, y, ROWS)
    used = np.unique(ROWS[ROWS >= 0])
    x[np.setdiff1d(np.arange(len(x)), used)] = poison
    got = run(learner, state, x, y, ROWS)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_an_empty_batch_changes_no_bit_even_among_poison():
    x, y = data()
    learner = linear(OptimConfig(weight_decay=0.1))
    state = run(learner, start(learner, x), x, y, ROWS[:1])  # momentum is under way
    x[:] = np.nan
    got = run(learner, state, x, y, ROWS[2:3])
    jax.tree.map(np.testing.assert_array_equal, got, state)


def test_the_first_updates_of_a_block():
    x, y = data()
    learner = linear()
    state = start(learner, x)
    for count in range(len(ROWS) + 1):
        got = jax.jit(functools.partial(sisa.updates, learner))(
            state, jnp.asarray(x), jnp.asarray(y), jnp.asarray(ROWS), jnp.int32(count)
        )
        expected = run(learner, state, x, y, ROWS[:count])
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7), got, expected
        )


class Noisy(nn.Module):
    """Has statistics and draws random numbers."""

    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


def test_networks_with_statistics_and_dropout():
    x, y = data()
    learner = Learner(Noisy(), optax.sgd(0.1), train_argument=True, rngs=("dropout",))
    state = start(learner, x)
    got = run(learner, state, x, y, ROWS[:2])
    # Statistics are those of the records there, each equally often or nearly so.
    mean = np.zeros(5)
    for rows in ([4, 1, 6], [0, 2, 0]):
        mean = 0.99 * mean + 0.01 * x[rows].mean(0)
    statistics = got.model_state["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(statistics["mean"], mean, rtol=1e-5, atol=1e-7)
    again = run(learner, state, x, y, ROWS[:2])
    jax.tree.map(np.testing.assert_array_equal, again, got)
    other = run(learner, start(learner, x, seed=1).replace(params=state.params), x, y, ROWS[:2])
    assert np.any(other.params["Dense_0"]["kernel"] != got.params["Dense_0"]["kernel"])
    # An update's noise is not the one before's.
    twice = run(learner, state.replace(step=state.step + 1), x, y, ROWS[:1])
    once = run(learner, state, x, y, ROWS[:1])
    assert np.any(twice.params["Dense_0"]["kernel"] != once.params["Dense_0"]["kernel"])
    probs = sisa.probabilities(learner, got, jnp.asarray(x))
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-6)


def test_aggregation():
    probs = jnp.array(
        [
            [[0.6, 0.4, 0.0], [0.5, 0.5, 0.0]],
            [[0.6, 0.3, 0.1], [0.0, 0.2, 0.8]],
            [[0.0, 1.0, 0.0], [0.0, 0.9, 0.1]],
        ]
    )
    mean = sisa.aggregate(probs, "mean")
    np.testing.assert_allclose(mean, np.mean(probs, 0), rtol=1e-6)
    vote = sisa.aggregate(probs, "vote")
    np.testing.assert_allclose(vote, np.array([[2, 1, 0], [1, 1, 1]]) / 3, rtol=1e-6)
    assert list(mean.argmax(1)) == [1, 1] and list(vote.argmax(1)) == [0, 0]
    serving = jnp.array([False, True, True])
    np.testing.assert_allclose(
        sisa.aggregate(probs, "mean", serving), np.mean(probs[1:], 0), rtol=1e-6
    )
    np.testing.assert_allclose(
        sisa.aggregate(probs, "vote", serving), [[0.5, 0.5, 0], [0, 0.5, 0.5]], rtol=1e-6
    )
    assert np.isnan(sisa.aggregate(probs, "mean", jnp.zeros(3, bool))).all()
