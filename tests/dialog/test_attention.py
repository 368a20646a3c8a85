"""Attention against a float64 brute force, and the cache of keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dialog.models.attention import KeyValue, attend, causal_mask

RNG = np.random.default_rng(0)


def inputs(heads, groups, rows=2, length=5, keys=7, dim=3):
    query = RNG.normal(size=(rows, length, heads, dim)).astype(np.float32)
    key, value = RNG.normal(size=(2, rows, keys, groups, dim)).astype(np.float32)
    mask = RNG.random((rows, length, keys)) < 0.5
    mask[0, 0] = False  # a query that sees nothing
    mask[1, :, :] |= np.eye(length, keys, dtype=bool)
    return query, KeyValue(key, value), mask


def brute(query, keys, mask, scale):
    rows, length, heads, dim = query.shape
    groups = keys.key.shape[2]
    out = np.zeros((rows, length, heads, dim))
    for n, t, h in np.ndindex(rows, length, heads):
        seen = np.flatnonzero(mask[n, t])
        if len(seen):
            g = h // (heads // groups)
            logits = keys.key[n, seen, g].astype(np.float64) @ query[n, t, h] * scale
            weights = np.exp(logits - logits.max())
            out[n, t, h] = weights / weights.sum() @ keys.value[n, seen, g]
    return out


@pytest.mark.parametrize("heads, groups", [(1, 1), (4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("jit", [True, False])
def test_it_is_the_softmax(heads, groups, scale, jit):
    query, keys, mask = inputs(heads, groups)
    fn = jax.jit(attend, static_argnums=3) if jit else attend
    out, weights = fn(query, keys, mask, scale)
    np.testing.assert_allclose(out, brute(query, keys, mask, scale or 3**-0.5), atol=1e-6)
    assert weights.shape == (2, heads, 5, 7)
    sums = np.broadcast_to(mask.any(-1)[:, None], (2, heads, 5))
    np.testing.assert_allclose(weights.sum(-1), sums, atol=1e-6)
    assert (np.asarray(weights)[~np.broadcast_to(mask[:, None], weights.shape)] == 0).all()


def test_no_mask_is_a_mask_of_all():
    query, keys, mask = inputs(4, 2)
    for ours, theirs in zip(
        attend(query, keys, None), attend(query, keys, np.ones_like(mask)), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-7)


def test_nothing_seen_is_zero_and_no_nan():
    query, keys, mask = inputs(2, 2)

    def total(query, keys):
        return jnp.sum(attend(query, keys, np.zeros_like(mask))[0])

    value, grads = jax.value_and_grad(total, (0, 1))(query, keys)
    assert value == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_the_softmax_of_half_precision_is_in_float32():
    query, keys, mask = inputs(2, 2)
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), (query, keys))
    out, weights = attend(*half, mask)
    assert out.dtype == jnp.bfloat16 and weights.dtype == jnp.float32
    rounded = jax.tree.map(lambda x: np.asarray(x.astype(jnp.float32)), half)
    np.testing.assert_allclose(weights, attend(*rounded, mask)[1], atol=1e-6)


def test_a_cache_is_written_where_one_says():
    cache = KeyValue.empty(2, 6, 3, 4, jnp.float32)
    new = KeyValue(*RNG.normal(size=(2, 2, 2, 3, 4)).astype(np.float32))
    after = jax.jit(KeyValue.write)(cache, new, 3)
    for was, got in zip(new, after, strict=True):
        np.testing.assert_array_equal(got[:, 3:5], was)
        assert (got[:, :3] == 0).all() and (got[:, 5:] == 0).all()


def test_causal_mask():
    got = causal_mask(np.array([[False, True, True], [True, True, False]]))
    assert got.tolist() == [
        [[False, False, False], [False, True, False], [False, True, True]],
        [[True, False, False], [True, True, False], [True, True, False]],
    ]
