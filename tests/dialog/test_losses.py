"""Cross-entropy against torch's and a float64 brute force."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from dialog import losses
from fourfold.runtime import mesh as meshes

RNG = np.random.default_rng(0)
LOGITS = (3 * RNG.normal(size=(8, 5, 11))).astype(np.float32)
TARGETS = RNG.integers(0, 11, (8, 5)).astype(np.int32)
MASK = RNG.random((8, 5)) < 0.6


def brute(logits, targets, mask, smoothing):
    logits = logits.astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total = count = 0
    for row, t in zip(*np.nonzero(mask), strict=True):
        wanted = np.full(logits.shape[-1], smoothing / logits.shape[-1])
        wanted[targets[row, t]] += 1 - smoothing
        total -= wanted @ log_probs[row, t]
        count += 1
    return total / count


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("jit", [True, False])
def test_it_is_the_mean_over_tokens(smoothing, jit):
    fn = functools.partial(losses.cross_entropy, label_smoothing=smoothing)
    loss, sums = (jax.jit(fn) if jit else fn)(LOGITS, TARGETS, MASK)
    np.testing.assert_allclose(loss, brute(LOGITS, TARGETS, MASK, smoothing), rtol=1e-6)
    np.testing.assert_allclose(
        float(sums.nll) / MASK.sum(), brute(LOGITS, TARGETS, MASK, 0.0), rtol=1e-6
    )
    assert int(sums.tokens) == MASK.sum()
    assert int(sums.correct) == ((LOGITS.argmax(-1) == TARGETS) & MASK).sum()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_torch_agrees(smoothing):
    torch = pytest.importorskip("torch")
    x = torch.tensor(LOGITS, requires_grad=True)
    wanted = torch.tensor(np.where(MASK, TARGETS, -100)).long()
    theirs = torch.nn.functional.cross_entropy(
        x.view(-1, 11), wanted.view(-1), label_smoothing=smoothing
    )
    theirs.backward()

    def loss(logits):
        return losses.cross_entropy(logits, TARGETS, MASK, label_smoothing=smoothing)[0]

    ours, grad = jax.value_and_grad(loss)(LOGITS)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, x.grad.numpy(), atol=1e-7)


def test_padding_is_of_no_matter():
    """Not even NaN, forwards or backwards."""

    def loss(logits):
        return losses.cross_entropy(logits, TARGETS, MASK)[0]

    spoilt = np.where(MASK[..., None], LOGITS, np.nan).astype(np.float32)
    (plain, grad), (found, spoilt_grad) = (jax.value_and_grad(loss)(x) for x in (LOGITS, spoilt))
    assert plain == found
    np.testing.assert_array_equal(np.asarray(spoilt_grad)[MASK], np.asarray(grad)[MASK])


def test_no_token_at_all():
    loss, sums = losses.cross_entropy(LOGITS, TARGETS, np.zeros_like(MASK))
    assert loss == 0 and sums.tokens == 0


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_a_batch_may_be_spread(devices):
    mesh = meshes.make_mesh(devices)
    fn = functools.partial(losses.cross_entropy, axis_name="data")
    spread = jax.shard_map(fn, mesh=mesh, in_specs=P("data"), out_specs=P())
    for got, whole in zip(
        jax.tree.leaves(jax.jit(spread)(LOGITS, TARGETS, MASK)),
        jax.tree.leaves(losses.cross_entropy(LOGITS, TARGETS, MASK)),
        strict=True,
    ):
        np.testing.assert_allclose(got, whole, rtol=1e-6)


def test_half_precision_is_summed_in_float32():
    loss, _ = losses.cross_entropy(jnp.asarray(LOGITS, jnp.bfloat16), TARGETS, MASK)
    assert loss.dtype == jnp.float32
    rounded = np.asarray(jnp.asarray(LOGITS, jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_allclose(loss, brute(rounded, TARGETS, MASK, 0.0), rtol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"shape \(8, 5\).*found \(8, 4\)"):
        losses.token_losses(jnp.zeros((8, 5, 3)), jnp.zeros((8, 4), jnp.int32))
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), found 1.0"):
        losses.token_losses(jnp.zeros((1, 3)), jnp.zeros(1, jnp.int32), 1.0)


def test_shift_right():
    assert losses.shift_right(np.array([[7, 8, 2], [9, 2, 0]]), 1).tolist() == [
        [1, 7, 8],
        [1, 9, 2],
    ]
