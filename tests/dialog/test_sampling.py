"""What may be drawn is what transformers' warpers keep, and it is drawn by its law."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from dialog.config import GenerationConfig
from dialog.decoding.sampling import draw, keep_top_k, keep_top_p, warp

SETTINGS = [
    {},
    {"temperature": 0.7},
    {"temperature": 3.0, "top_k": 5},
    {"top_k": 1},
    {"top_k": 99},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"temperature": 0.5, "top_k": 7, "top_p": 0.6},
]


def config(**options):
    return GenerationConfig(sample=True, **options)


def kept(logits):
    return np.asarray(logits) > -np.inf


@pytest.mark.parametrize("options", SETTINGS, ids=str)
@pytest.mark.parametrize("kind", ["normal", "ties", "forbidden"])
def test_warp_is_their_warpers(options, kind):
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as theirs

    logits = np.random.default_rng(0).normal(size=(60, 13)).astype(np.float32) * 2
    if kind == "ties":
        logits = np.round(logits)
    if kind == "forbidden":
        logits[logits < 0.5] = -np.inf
        logits[:, 4] = 1.5
    warpers = theirs.LogitsProcessorList()
    if "temperature" in options:
        warpers.append(theirs.TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        warpers.append(theirs.TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        warpers.append(theirs.TopPLogitsWarper(options["top_p"]))
    want = warpers(None, torch.from_numpy(logits)).numpy()
    got = jax.jit(partial(warp, options=config(**options)))(jnp.asarray(logits))
    np.testing.assert_array_equal(kept(got), kept(want))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    np.testing.assert_array_equal(kept(warp(jnp.asarray(logits), config(**options))), kept(want))
    assert kept(got).any(axis=1).all()


@settings(max_examples=100, deadline=None)
@given(
    row=st.lists(st.integers(1, 50), min_size=7, max_size=7, unique=True),
    p=st.floats(0.01, 0.99),
    k=st.sampled_from([1, 3, 7, 8]),
)
def test_kept_sets_by_definition(row, p, k):
    """The k likeliest; the fewest that reach p, unless rounding could decide."""
    law = np.asarray(row, np.float64) / sum(row)
    logits = jnp.asarray(np.log(law), jnp.float32)[None]
    order = np.argsort(-law)
    assert set(np.flatnonzero(kept(jax.jit(keep_top_k, static_argnums=1)(logits, k)[0]))) == set(
        order[:k]
    )
    sums = np.cumsum(law[order])
    if np.abs(sums - p).min() > 1e-5:
        count = int(np.searchsorted(sums, p)) + 1
        assert set(np.flatnonzero(kept(jax.jit(keep_top_p)(logits, p)[0]))) == set(order[:count])


@pytest.mark.parametrize("options", [SETTINGS[0], SETTINGS[2], SETTINGS[5], SETTINGS[7]], ids=str)
def test_drawn_frequencies_follow_the_law(options):
    """Chi-square over 20,000 draws; fails by chance for one seed in 10,000."""
    count = 20_000
    row = np.random.default_rng(1).normal(size=11) * 1.5
    scaled = row / options.get("temperature", 1.0)
    law = np.exp(scaled)
    if "top_k" in options:
        law[np.argsort(-law)[options["top_k"] :]] = 0
    if "top_p" in options:
        order = np.argsort(-law)
        sums = np.cumsum(law[order]) / law.sum()
        law[order[np.searchsorted(sums, options["top_p"]) + 1 :]] = 0
    law /= law.sum()
    logits = jnp.broadcast_to(jnp.asarray(row, jnp.float32), (count, 11))
    keys = jax.random.split(jax.random.key(0), count)
    drawn = jax.jit(partial(draw, options=config(**options)))(keys, logits)
    assert drawn.dtype == jnp.int32
    seen = np.bincount(np.asarray(drawn), minlength=11)
    assert (seen[law == 0] == 0).all() and 1 < (law > 0).sum()
    assert stats.chisquare(seen[law > 0], count * law[law > 0]).pvalue > 1e-4


def test_a_draw_does_not_depend_on_its_neighbours():
    logits = jax.random.normal(jax.random.key(1), (6, 17))
    keys = jax.random.split(jax.random.key(2), 6)
    options = config(top_k=9, top_p=0.9)
    together = draw(keys, logits, options)
    for row in range(6):
        assert draw(keys[row, None], logits[row, None], options)[0] == together[row]
