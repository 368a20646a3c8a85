"""Gradients against float64, ε against exact losses, and guarantees against enumeration."""

import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn import privacy
from unlearn.privacy import Training, Votes

# jax-privacy 2.0 calls it; the message is optax's.
pytestmark = pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")

# ---- the gradient --------------------------------------------------------------------------------


def loss_of_one(params, x, y):
    """Logistic loss of a label in {0, 1}."""
    logit = jnp.sum(params["w"] * x) + params["b"]
    return jnp.logaddexp(0, logit) - y * logit


def setting(batch, seed=0, features=3):
    rng = np.random.default_rng(seed)
    params = {"w": np.float32(rng.normal(size=features)), "b": np.float32(rng.normal())}
    x = np.float32(rng.normal(size=(batch, features)) * rng.uniform(0.1, 5, size=(batch, 1)))
    return params, x, np.float32(rng.integers(2, size=batch)), rng.uniform(size=batch) < 0.7


def brute_force(params, x, y, mask, clip_norm):
    total = np.zeros(x.shape[1] + 1)
    for record in np.flatnonzero(mask):
        row = np.append(np.float64(x[record]), 1.0)
        logit = row @ np.append(np.float64(params["w"]), np.float64(params["b"]))
        gradient = (1 / (1 + np.exp(-logit)) - y[record]) * row
        total += gradient * min(1, clip_norm / np.linalg.norm(gradient))
    return total / len(x)


def gradient(params, x, y, mask, key, clip_norm=1.0, noise_multiplier=0.0):
    args = jax.tree.map(jnp.asarray, (params, x, y, mask))
    return privacy.noisy_gradient(loss_of_one, *args, key, clip_norm, noise_multiplier)


jitted = jax.jit(gradient, static_argnums=(5, 6))
flat = lambda tree: np.append(np.asarray(tree["w"]), np.asarray(tree["b"]))  # noqa: E731
KEY = jax.random.key(0)


@pytest.mark.parametrize(
    "run, batch, clip_norm",
    [
        (jitted, 1, 0.1),
        (gradient, 7, 1.0),
        (jitted, 7, 1.0),
        (jitted, 33, 0.3),
        (jitted, 33, 100.0),
    ],
)
def test_clipped_mean_against_float64(run, batch, clip_norm):
    params, x, y, mask = setting(batch)
    mask[0] = True
    got = run(params, x, y, mask, KEY, clip_norm, 0.0)
    np.testing.assert_allclose(
        flat(got), brute_force(params, x, y, mask, clip_norm), rtol=1e-5, atol=1e-7
    )
    assert {leaf.dtype for leaf in got.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("poison", [np.nan, np.inf, -1e30])
def test_rows_that_are_no_records_add_nothing(poison):
    params, x, y, mask = setting(9)
    clean = flat(jitted(params, x, y, mask, KEY))
    x[~mask], y[~mask] = poison, poison
    assert (~mask).any()
    np.testing.assert_array_equal(flat(jitted(params, x, y, mask, KEY)), clean)


def test_a_record_without_a_finite_gradient_counts_as_zero():
    params, x, y, mask = setting(9)
    first = np.flatnonzero(mask)[0]
    x[first] = np.nan
    got = flat(jitted(params, x, y, mask, KEY))
    mask[first] = False
    np.testing.assert_allclose(got, brute_force(params, x, y, mask, 1.0), rtol=1e-5, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0.01, 1.0, 50.0]), st.data())
def test_one_record_changes_the_sum_by_the_clip_norm_at_most(seed, clip_norm, draw):
    params, x, y, mask = setting(8, seed)
    other = mask.copy()
    other[draw.draw(st.integers(0, 7))] ^= True
    # The same noise for both: what is left is the sensitivity.
    a, b = (flat(jitted(params, x, y, m, KEY, clip_norm, 1.0)) for m in (mask, other))
    scale = max(1.0, np.abs(a).max(), np.abs(b).max())
    assert 8 * np.linalg.norm(a - b) <= clip_norm * (1 + 1e-4) + 1e-5 * scale


@pytest.mark.parametrize("some", [False, True])
def test_noise_has_the_scale_that_is_accounted_for(some):
    """σ C / B per coordinate, on all leaves, independent, and in an empty batch too."""
    batch, features, clip_norm, sigma = 5, 20_000, 0.5, 3.0
    params, x, y, mask = setting(batch, features=features)
    params["b"] = np.zeros(features, np.float32)
    loss = lambda p, x, y: jnp.sum((p["w"] + p["b"]) * x) * y  # noqa: E731
    run = jax.jit(
        lambda key, sigma: privacy.noisy_gradient(
            loss, *jax.tree.map(jnp.asarray, (params, x, y, mask & some)), key, clip_norm, sigma
        ),
        static_argnums=1,
    )
    mean = run(KEY, 0.0)
    assert some == bool(np.any(np.asarray(mean["w"])))
    draws = [run(jax.random.key(i), sigma) for i in (1, 2)]
    scale = sigma * clip_norm / batch
    noise = np.stack([np.asarray(d[n] - mean[n]) for d in draws for n in ("w", "b")])
    assert scipy.stats.kstest(noise.ravel() / scale, "norm").pvalue > 1e-3
    correlation = np.corrcoef(noise) - np.eye(4)
    assert np.abs(correlation).max() < 5 / np.sqrt(features)
    np.testing.assert_array_equal(run(jax.random.key(1), sigma)["w"], draws[0]["w"])


def test_vmap_over_shards():
    shards = [setting(6, seed) for seed in range(4)]
    shards[2][3][:] = False  # an empty batch
    keys = jax.random.split(KEY, 4)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *shards)
    step = lambda *args: gradient(*args, 0.7, 2.0)  # noqa: E731
    together = jax.jit(jax.vmap(step))(*stacked, keys)
    for index, shard in enumerate(shards):
        alone = jitted(*shard, keys[index], 0.7, 2.0)
        one = jax.tree.map(lambda leaf, i=index: leaf[i], together)
        np.testing.assert_allclose(flat(one), flat(alone), rtol=1e-5, atol=1e-6)


# ---- accounting ----------------------------------------------------------------------------------


def gaussian_epsilon(mu, delta):
    """Exact, of Gaussians whose means differ by μ standard deviations (Balle and Wang 2018)."""
    cdf = scipy.stats.norm.cdf

    def excess(epsilon):
        return cdf(mu / 2 - epsilon / mu) - np.exp(epsilon) * cdf(-mu / 2 - epsilon / mu) - delta

    return scipy.optimize.brentq(excess, 0, 500)


@pytest.mark.parametrize(
    "sigma, epochs, batches, times", [(8, 1, 1, 1), (20, 5, 4, 3), (2, 3, 2, 1)]
)
def test_epsilon_of_gaussians(sigma, epochs, batches, times):
    """A moved record shifts two shards' sums: in one update an epoch, or by 2 C in every one."""
    for sampler, squared in (("own_batch", epochs), ("shuffled", 4 * epochs * batches)):
        exact = gaussian_epsilon(math.sqrt(2 * times * squared) / sigma, 1e-5)
        training = Training(sigma, epochs, batches, sampler, times)
        assert exact <= privacy.total_epsilon([training], 1e-5) <= 1.2 * exact


def test_shuffled_batches_change_as_is_said():
    """A record that joins moves the others on: each batch gains and loses one."""
    from unlearn.partition import batches

    tokens = np.random.default_rng(0).integers(2**63, size=40).astype(np.uint64)
    rows = np.arange(40, dtype=np.int32)
    without, with_ = (batches(tokens[i:], rows[i:], 0, 1, 8) for i in (1, 0))
    changes = [(set(a) ^ set(b)) - {-1} for a, b in zip(without, with_, strict=True)]
    assert max(len(change) for change in changes) == 2
    assert sum(len(change) > 0 for change in changes) > 1


def test_epsilon_of_poisson_batches_against_the_loss_itself():
    """A move: the updates of one shard lose the record, those of the other gain it."""
    sigma, epochs, batches, delta = 1.0, 2, 10, 1e-3
    q, updates, trials = 1 / batches, epochs * batches, 100_000
    rng = np.random.default_rng(0)

    def log_ratio(z):  # of a sum with the record, perhaps, to one without
        return np.log(1 - q + q * np.exp((2 * z - 1) / (2 * sigma**2)))

    noise = rng.normal(scale=sigma, size=(2, trials, updates))
    loses = log_ratio(noise[0] + (rng.uniform(size=noise[0].shape) < q)).sum(axis=1)
    gains = -log_ratio(noise[1]).sum(axis=1)
    epsilon = privacy.total_epsilon([Training(sigma, epochs, batches, "poisson")], delta)

    def exact_delta(epsilon):
        spent = np.maximum(0, -np.expm1(epsilon - (loses + gains)))
        return spent.mean(), spent.std() / np.sqrt(trials)

    mean, error = exact_delta(epsilon)
    assert mean <= delta + 4 * error
    mean, error = exact_delta(0.6 * epsilon)
    assert mean > delta + 4 * error  # the bound is no fantasy


def test_each_sampler_costs_more_than_the_one_before():
    epsilons = [
        privacy.total_epsilon([Training(4.0, 3, 20, sampler)], 1e-5)
        for sampler in ("poisson", "own_batch", "shuffled")
    ]
    assert epsilons == sorted(epsilons) and epsilons[0] < 0.8 * epsilons[1]


def test_everything_published_adds_up():
    training, votes = Training(10.0, 2, 5, "poisson"), Votes(0.01, 100)
    one = privacy.total_epsilon([training], 1e-5)
    again = Training(10.0, 2, 5, "poisson", times=2)
    assert privacy.total_epsilon([training, training], 1e-5) == pytest.approx(
        privacy.total_epsilon([again], 1e-5)
    )
    assert one < privacy.total_epsilon([again], 1e-5) < 2 * one
    both = privacy.total_epsilon([training, votes], 1e-5)
    assert one < both <= one + 1.0
    assert privacy.total_epsilon([training], 0) == math.inf
    assert privacy.total_epsilon([Training(0.0, 1, 1, "own_batch")], 0.1) == math.inf
    assert privacy.total_epsilon([], 0) == privacy.total_epsilon([], 1e-5) == 0


def test_votes_alone():
    few, many = Votes(0.5, 3), Votes(0.001, 10**6)
    assert privacy.total_epsilon([few, Votes(0.25, 2)], 0) == 2.0
    assert privacy.total_epsilon([few], 1e-5) == 1.5  # plain addition is less
    # ρ = k ε² / 2 = 1/2 and the standard ρ + 2 √(ρ ln(1/δ)), which dp-accounting improves on.
    standard = 0.5 + 2 * math.sqrt(0.5 * math.log(1e5))
    epsilon = privacy.total_epsilon([many], 1e-5)
    assert gaussian_epsilon(1.0, 1e-5) < epsilon < standard < 1000


# ---- the guarantee -------------------------------------------------------------------------------


def count_mechanism(n, epsilon, probability=0.3):
    """n coins whose number of heads is published with geometric noise; exact, by the number.

    Returns the prior (n + 1,), the posterior (n + 1, outputs), and outputs' probabilities. Of coins
    with the same number, all have the same ratio, so that worst events are unions of numbers.
    """
    heads = np.arange(n + 1)
    reach = int(40 / epsilon)
    outputs = np.arange(-reach, n + reach + 1)
    likelihood = np.exp(-epsilon * np.abs(outputs[None] - heads[:, None]))
    likelihood /= likelihood.sum(axis=1, keepdims=True)
    prior = scipy.stats.binom.pmf(heads, n, probability)
    joint = prior[:, None] * likelihood
    return prior, joint / joint.sum(axis=0), joint.sum(axis=0)


@pytest.mark.parametrize("n, epsilon, slack", [(8, 0.3, 0.01), (60, 0.1, 0.01), (60, 0.5, 1e-4)])
def test_the_guarantee_holds_where_everything_can_be_counted(n, epsilon, slack):
    prior, posterior, output = count_mechanism(n, epsilon)
    assert output.sum() == pytest.approx(1)
    held = privacy.guarantee(epsilon, 0, n, slack=slack)

    def excess(alpha):
        """The worst event's Pr[E | output] - e^α Pr[E], for each output."""
        return np.maximum(0, posterior - np.exp(alpha) * prior[:, None]).sum(axis=0)

    assert output @ excess(held.alpha) <= slack  # the bound on max-information itself
    broken = excess(held.alpha) > held.beta
    assert output @ broken <= held.gamma
    assert output @ excess(0.1 * held.alpha) > slack  # and one of a tenth would be wrong


def test_the_figures_of_the_literature():
    """60,000 records and α' ≤ 1 leave a total ε below 0.0019: 0.00187."""
    assert privacy.max_information(0.00187, 60_000, 1e-3) < 1
    assert privacy.max_information(0.0019, 60_000, 1e-3) == pytest.approx(1.0156, abs=1e-4)
    assert privacy.largest_epsilon(1.0, 60_000, 1e-3) == pytest.approx(0.001873, abs=1e-6)
    # In bits: log2(e) times as much, so that 2^bits is e^nats.
    bits = math.log2(math.e) * (0.01**2 * 50 / 2 + 0.01 * math.sqrt(50 * math.log(2 / 1e-3) / 2))
    assert 2**bits == pytest.approx(math.exp(privacy.max_information(0.01, 50, 1e-3)))


@given(st.floats(0, 100), st.integers(1, 10**7), st.floats(1e-12, 0.5))
def test_largest_epsilon_inverts(information, records, slack):
    epsilon = privacy.largest_epsilon(information, records, slack)
    assert privacy.max_information(epsilon, records, slack) == pytest.approx(information, rel=1e-9)


def test_what_noise_does_to_a_guarantee():
    held = privacy.guarantee(0.001, 0, 60_000, slack=1e-4, alpha=0.2, beta=0.01, gamma=0.05)
    information = privacy.max_information(0.001, 60_000, 1e-4)
    assert held.alpha == pytest.approx(0.2 + information)
    assert held.beta == pytest.approx(0.01 * math.exp(information) + 0.01)
    assert held.gamma == pytest.approx(0.06)
    assert not held.vacuous and held.why == "α' is at most 1, and β' and γ' are below 1."
    assert privacy.guarantee(0, 0, 10, slack=1e-4) == privacy.Guarantee(
        0, 0.01, 0.01, False, held.why
    )


@pytest.mark.parametrize(
    "options, found, message",
    [
        (
            {"epsilon": 0.0015},
            {},
            "is above 1: the total ε of 0.0015 would have to be at most 0.00142",
        ),
        ({"epsilon": 1.0, "delta": 1e-5}, {"alpha": math.inf, "beta": 1, "gamma": 1}, "for δ = 0"),
        ({"epsilon": 3.0, "alpha": 2.0}, {}, "is above 1."),
        ({"epsilon": math.inf}, {"alpha": math.inf}, "ε of inf would have to be at most"),
        ({"epsilon": 9.0, "beta": 1e-9}, {"beta": 1}, "β' = 1 allows everything"),
        ({"beta": 0.9995}, {"beta": 1}, "β' = 1 allows everything"),
        ({"gamma": 0.9995}, {"gamma": 1}, "γ' = 1 allows everything"),
        ({"gamma": 1.0}, {"gamma": 1}, "γ' = 1 allows everything"),
        ({"epsilon": 0.0013, "most_alpha": 0.8}, {}, "is above 0.8"),
    ],
)
def test_vacuous_guarantees_say_why(options, found, message):
    settings = {"epsilon": 0.0, "delta": 0.0, "records": 60_000, **options}
    held = privacy.guarantee(**settings)
    assert held.vacuous and message in held.why
    assert {name: getattr(held, name) for name in found} == found


def test_practical_settings_are_vacuous():
    """DP-SGD that is good for privacy, and one noisy answer, are both out of reach."""
    training = Training(1.1, 10, 200, "poisson")
    epsilon = privacy.total_epsilon([training], 1e-5)
    assert 1 < epsilon < 10
    assert privacy.guarantee(epsilon, 1e-5, 60_000).vacuous
    assert privacy.guarantee(privacy.total_epsilon([Votes(0.1, 1)], 0), 0, 60_000).vacuous
    assert not privacy.guarantee(privacy.total_epsilon([Votes(0.001, 1)], 0), 0, 60_000).vacuous


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": jnp.ones((3, 2))}, r"found \(3, 2\), \(4,\) and \(4,\)"),
        ({"y": jnp.ones(5)}, r"\(5,\)"),
        ({"mask": jnp.ones((4, 1), bool)}, r"\(4, 1\)"),
        ({"clip_norm": 0.0}, "found 0.0 and 1.0"),
        ({"noise_multiplier": -1.0}, "found 1.0 and -1.0"),
        ({"noise_multiplier": math.nan}, "nan"),
    ],
)
def test_bad_batches_are_named(change, message):
    settings = {
        "params": {"w": jnp.ones(2), "b": jnp.ones(())},
        "x": jnp.ones((4, 2)),
        "y": jnp.ones(4),
        "mask": jnp.ones(4, bool),
        "key": KEY,
        "clip_norm": 1.0,
        "noise_multiplier": 1.0,
    }
    with pytest.raises(ValueError, match=message):
        privacy.noisy_gradient(loss_of_one, **{**settings, **change})


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: Training(-1.0, 1, 1, "poisson"), "noise_multiplier must be at least 0, found -1"),
        (lambda: Training(1.0, 0, 1, "poisson"), "epochs must be at least 1, found 0"),
        (lambda: Training(1.0, 1, 0, "poisson"), "batches must be at least 1, found 0"),
        (lambda: Training(1.0, 1, 1, "poisson", 0), "times must be at least 1, found 0"),
        (lambda: Training(1.0, 1, 1, "uniform"), "'shuffled', found 'uniform'"),
        (lambda: Votes(0.0, 1), "found 0.0 and 1"),
        (lambda: Votes(1.0, -1), "found 1.0 and -1"),
        (lambda: privacy.total_epsilon([], 1.0), r"delta must be in \[0, 1\), found 1"),
        (lambda: privacy.max_information(-1.0, 5, 0.1), "epsilon must be at least 0, found -1"),
        (lambda: privacy.max_information(1.0, 0, 0.1), "found 0 and 0.1"),
        (lambda: privacy.largest_epsilon(1.0, 5, 1.0), "found 5 and 1.0"),
        (lambda: privacy.largest_epsilon(-1.0, 5, 0.1), "information .* found -1"),
        (lambda: privacy.guarantee(1.0, -0.1, 5), "0.0 and -0.1"),
        (lambda: privacy.guarantee(1.0, 0, 5, beta=1.5), "found 0.0, 1.5"),
        (lambda: privacy.guarantee(1.0, 0, 5, slack=0), "found 5 and 0"),
    ],
)
def test_bad_numbers_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_missing_extras_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jax_privacy", None)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ImportError, match=r"jax-privacy: pip install 'fourfold\[unlearn\]'"):
        gradient(*setting(3), KEY)
    with pytest.raises(ImportError, match=r"dp-accounting: pip install 'fourfold\[unlearn\]'"):
        privacy.total_epsilon([Training(1.0, 1, 1, "poisson")], 1e-5)
    assert privacy.total_epsilon([Votes(1.0, 1)], 0) == 1.0
