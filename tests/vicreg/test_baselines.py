"""The baselines' losses against float64 brute force, against torch, and over many devices."""

import doctest
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from vicreg import baselines

TAU, LAMBDA, SCALE = 0.2, 0.0051, 0.3
ROWS, INPUTS, DIMS = 24, 5, 7


def nt_xent_oracle(z_a, z_b):
    """Equation 1, view by view."""
    views = np.concatenate([z_a, z_b]).astype(np.float64)
    total, cosines, hits = 0.0, 0.0, 0
    for i, z in enumerate(views):
        partner = (i + len(z_a)) % len(views)
        others = [j for j in range(len(views)) if j != i]
        s = {j: z @ views[j] / np.linalg.norm(z) / np.linalg.norm(views[j]) for j in others}
        total -= np.log(np.exp(s[partner] / TAU) / sum(np.exp(x / TAU) for x in s.values()))
        cosines += s[partner]
        hits += s[partner] > max(x for j, x in s.items() if j != partner)
    return total / len(views), {"similarity": cosines / len(views), "top1": hits / len(views)}


def barlow_twins_oracle(z_a, z_b):
    """Equations 1 and 2, dimension by dimension."""
    z_a, z_b = np.float64(z_a), np.float64(z_b)
    on = off = 0.0
    for i in range(z_a.shape[1]):
        for j in range(z_b.shape[1]):
            a, b = z_a[:, i] - z_a[:, i].mean(), z_b[:, j] - z_b[:, j].mean()
            c = np.mean(a * b) / np.sqrt((np.mean(a**2) + 1e-5) * (np.mean(b**2) + 1e-5))
            on, off = (on + (1 - c) ** 2, off) if i == j else (on, off + c**2)
    return SCALE * (on + LAMBDA * off), {"on_diagonal": on, "off_diagonal": off}


def cross_entropy_oracle(logits, labels):
    losses, hits = [], 0
    for row, label in zip(np.float64(logits), labels, strict=True):
        losses.append(np.log(np.sum(np.exp(row - row.max()))) + row.max() - row[label])
        hits += np.argmax(row) == label
    return np.mean(losses), {"top1": hits / len(losses)}


LOSSES = {
    "nt_xent": functools.partial(baselines.nt_xent, temperature=TAU),
    "barlow_twins": functools.partial(
        baselines.barlow_twins, off_diagonal_weight=LAMBDA, scale=SCALE
    ),
    "cross_entropy": baselines.cross_entropy,
}
ORACLES = {
    "nt_xent": nt_xent_oracle,
    "barlow_twins": barlow_twins_oracle,
    "cross_entropy": cross_entropy_oracle,
}
all_losses = pytest.mark.parametrize("name", LOSSES)


def inputs(name, rows=ROWS, dims=DIMS, seed=0):
    """Rows that drift, so that the statistics of a part are not those of the whole."""
    rng = np.random.default_rng(seed)
    drift = np.linspace(-1.5, 1.5, rows)[:, None]
    a = (rng.normal(size=(rows, dims)) + drift).astype(np.float32)
    if name == "cross_entropy":
        return a, rng.integers(0, dims, rows).astype(np.int32)
    return a, (a + 0.5 * rng.normal(size=a.shape)).astype(np.float32)


@functools.cache
def value_and_grads(name):
    """Compiled once a shape: `((loss, terms), gradients of the float arguments)`."""
    argnums = (0,) if name == "cross_entropy" else (0, 1)
    return jax.jit(jax.value_and_grad(LOSSES[name], argnums, has_aux=True))


def assert_close(got, expected, tolerance=1e-5):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, expected
    )


@all_losses
@pytest.mark.parametrize("rows, dims", [(2, 1), (3, 2), (7, 13), (37, 5)])
def test_losses_against_brute_force(name, rows, dims):
    batch = inputs(name, rows, dims, seed=rows)
    expected = ORACLES[name](*batch)
    got = jax.jit(LOSSES[name])(*batch)
    assert_close(got, expected)
    assert all(x.dtype == jnp.float32 and x.shape == () for x in jax.tree.leaves(got))
    if rows == 3:  # outside jit every operation compiles on its own: once is enough
        assert_close(LOSSES[name](*batch), expected)


@all_losses
def test_gradient_against_differences_of_the_brute_force(name):
    a, b = inputs(name)
    _, (grad, *_) = value_and_grads(name)(a, b)
    for seed in range(3):
        v = np.random.default_rng(seed).normal(size=a.shape)
        up, down = (ORACLES[name](np.float64(a) + h * v, b)[0] for h in (1e-5, -1e-5))
        slope = np.sum(np.float64(grad) * v)
        np.testing.assert_allclose(slope, (up - down) / 2e-5, rtol=1e-4, atol=1e-6)


@all_losses
def test_values_and_gradients_against_torch(name):
    torch = pytest.importorskip("torch")
    functional = torch.nn.functional
    a, b = (torch.tensor(x) for x in inputs(name))
    a = a.double().requires_grad_()
    if name == "nt_xent":
        b = b.double().requires_grad_()
        views = functional.normalize(torch.stack([a, b], 1).flatten(0, 1), dim=1)
        logits = (views @ views.T / TAU).fill_diagonal_(-torch.inf)
        loss = functional.cross_entropy(logits, torch.arange(len(views)) ^ 1)
    elif name == "barlow_twins":
        b = b.double().requires_grad_()
        norm = torch.nn.BatchNorm1d(DIMS, affine=False, dtype=torch.float64)
        correlations = norm(a).T @ norm(b) / len(a)
        weights = torch.full((DIMS, DIMS), LAMBDA).fill_diagonal_(1.0)
        loss = SCALE * (weights * (correlations - torch.eye(DIMS)) ** 2).sum()
    else:
        loss = functional.cross_entropy(a, b.long())
    loss.backward()
    (value, _), grads = value_and_grads(name)(*inputs(name))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    for got, x in zip(grads, (a, b), strict=False):
        np.testing.assert_allclose(got, x.grad.numpy(), rtol=1e-5, atol=1e-6)


def mesh_of(devices):
    return jax.make_mesh((devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices])


def outcome(params, batches, axis_name=None):
    """Of each loss: value, terms and the gradient of the layer that the embeddings come from."""
    results = {}
    for name, (x_a, x_b) in batches.items():

        def objective(params, name=name, x_a=x_a, x_b=x_b):
            z_a = jnp.tanh(x_a @ params)
            b = x_b if name == "cross_entropy" else jnp.tanh(x_b @ params)
            return LOSSES[name](z_a, b, axis_name=axis_name)

        out, grads = jax.value_and_grad(objective, has_aux=True)(params)
        results[name] = out, grads if axis_name is None else jax.lax.pmean(grads, axis_name)
    return results


PARAMS = np.random.default_rng(1).normal(size=(INPUTS, DIMS)).astype(np.float32)
BATCHES = {name: inputs(name, dims=INPUTS) for name in LOSSES}


@functools.cache
def on_one_device():
    return jax.jit(outcome)(PARAMS, BATCHES)


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("compiler", ["jit", "shard_map", "shard_map unchecked"])
def test_every_mesh_gives_the_loss_and_gradient_of_one_device(devices, compiler):
    mesh = mesh_of(devices)
    batches = jax.device_put(BATCHES, NamedSharding(mesh, P("data")))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    step = outcome
    if compiler != "jit":
        step = jax.shard_map(
            functools.partial(outcome, axis_name="data"),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
            check_vma=compiler == "shard_map",
        )
    assert_close(jax.jit(step)(params, batches), on_one_device())


def test_pmap():
    batches = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), BATCHES)
    step = functools.partial(outcome, axis_name="data")
    got = jax.pmap(step, axis_name="data", in_axes=(None, 0))(PARAMS, batches)
    for i in (0, 7):
        assert_close(jax.tree.map(lambda x, i=i: x[i], got), on_one_device())


def test_one_row_a_device_is_a_batch():
    z_a, z_b = inputs("nt_xent", rows=8)
    for name in ("nt_xent", "barlow_twins"):
        loss = functools.partial(LOSSES[name], axis_name="data")
        loss = jax.shard_map(loss, mesh=mesh_of(8), in_specs=(P("data"), P("data")), out_specs=P())
        assert_close(jax.jit(loss)(z_a, z_b), ORACLES[name](z_a, z_b))


@all_losses
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_other_precisions_are_computed_with_in_float32(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        first, second = map(jnp.asarray, inputs(name))
        first = first.astype(dtype)
        second = second if name == "cross_entropy" else second.astype(dtype)
        got, grads = value_and_grads(name)(first, second)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(got))
    assert all(grad.dtype == dtype for grad in grads)
    wide = (np.asarray(x, np.int32 if x.dtype == jnp.int32 else float) for x in (first, second))
    assert_close(got, ORACLES[name](*wide))


@pytest.mark.parametrize("name", ["nt_xent", "barlow_twins"])
@pytest.mark.parametrize("zero", [slice(0, 1), slice(0, ROWS)])
def test_zero_rows_keep_gradients_finite_and_moderate(name, zero):
    # Mistake: z / max(|z|, 1e-12) multiplies the gradient of a row of zeros by 1e12.
    z_a, z_b = (jnp.asarray(z).at[zero].set(0.0) for z in inputs(name))
    (loss, _), grads = value_and_grads(name)(z_a, z_b)
    assert np.isfinite(loss)
    assert all(np.all(np.isfinite(g)) and np.max(np.abs(g)) < 100 for g in grads)


def test_nt_xent_of_a_collapsed_batch():
    # All alike: the partner is one of 2N - 1 equals, and nobody's nearest.
    z = jnp.ones((5, 3))
    loss, terms = LOSSES["nt_xent"](z, z)
    np.testing.assert_allclose(loss, np.log(9), rtol=1e-6)
    np.testing.assert_allclose([terms["similarity"], terms["top1"]], [1, 0], rtol=1e-6)


def test_nt_xent_is_blind_to_lengths_and_order():
    z_a, z_b = inputs("nt_xent")
    order = np.random.default_rng(2).permutation(ROWS)
    scale = np.random.default_rng(3).uniform(1e-3, 1e3, (ROWS, 1)).astype(np.float32)
    loss = jax.jit(LOSSES["nt_xent"])
    expected = loss(z_a, z_b)
    assert_close(loss((z_a * scale)[order], z_b[order]), expected)
    assert_close(loss(z_b, z_a), expected)
    # But not to which rows are partners.
    assert loss(z_a, z_b[order])[0] > expected[0] + 0.5


def test_barlow_twins_is_blind_to_scale_and_shift():
    z_a, z_b = inputs("barlow_twins")
    scale = np.random.default_rng(4).uniform(1, 50, (1, DIMS)).astype(np.float32)
    loss = jax.jit(LOSSES["barlow_twins"])
    assert_close(loss(z_a * scale + scale, z_b), loss(z_a, z_b), 1e-4)
    # A constant dimension correlates with nothing: 1 on the diagonal, 0 off it.
    z_a = np.where(np.arange(DIMS) == 2, np.float32(3), z_a)
    others = np.delete(z_a, 2, axis=1)
    terms, apart = loss(z_a, z_a)[1], loss(others, others)[1]
    np.testing.assert_allclose(terms["on_diagonal"], 1 + apart["on_diagonal"], rtol=1e-5)
    np.testing.assert_allclose(terms["off_diagonal"], apart["off_diagonal"], rtol=1e-5)


def test_cross_entropy_of_far_logits_and_of_equals():
    logits = np.array([[1e4, 0.0, -1e4], [-1e4, 1e4, 1e4]], np.float32)
    loss, terms = baselines.cross_entropy(logits, np.array([2, 1], np.uint8))
    np.testing.assert_allclose(loss, (2e4 + np.log(2)) / 2, rtol=1e-6)
    assert terms["top1"] == 0.5


@pytest.mark.parametrize("label", [-1, 3, 1000])
def test_a_label_that_is_no_class_is_nan(label):
    # Mistake: an index of -1 takes the last class, and a clamped one too.
    loss, _ = baselines.cross_entropy(jnp.zeros((2, 3)), jnp.asarray([0, label]))
    assert np.isnan(loss)


Z, LABELS = np.zeros((4, 3), np.float32), np.zeros(4, np.int32)


@pytest.mark.parametrize(
    "call, found",
    [
        (lambda: LOSSES["nt_xent"](Z, Z[:3]), r"\(4, 3\).*\(3, 3\)"),
        (lambda: LOSSES["nt_xent"](Z, Z[:, :1]), r"\(4, 3\).*\(4, 1\)"),
        (lambda: LOSSES["nt_xent"](Z[0], Z[0]), r"z_a .*float32 of shape \(3,\)"),
        (lambda: LOSSES["nt_xent"](Z, Z[None]), r"z_b .*\(1, 4, 3\)"),
        (lambda: LOSSES["nt_xent"](Z.astype(int), Z), "z_a must be floats.*int"),
        (lambda: LOSSES["nt_xent"](Z[:1], Z[:1]), r"at least two images.*found 1"),
        (lambda: LOSSES["barlow_twins"](Z, Z[:3]), r"\(4, 3\).*\(3, 3\)"),
        (lambda: LOSSES["barlow_twins"](Z[0], Z[0]), r"z_a .*\(3,\)"),
        (lambda: LOSSES["barlow_twins"](Z[:1], Z[:1]), "found 1"),
        (lambda: LOSSES["barlow_twins"](Z[:0], Z[:0]), "found 0"),
        (lambda: baselines.cross_entropy(Z[0], LABELS), r"logits .*\(3,\)"),
        (lambda: baselines.cross_entropy(Z, LABELS[:3]), r"\(4, 3\).*\(3,\)"),
        (lambda: baselines.cross_entropy(Z, LABELS[:, None]), r"\(4, 1\)"),
        (lambda: baselines.cross_entropy(Z, LABELS.astype(np.float32)), "labels .*float32"),
        (lambda: baselines.cross_entropy(Z, LABELS.astype(bool)), "labels .*bool"),
        (lambda: baselines.cross_entropy(Z[:0], LABELS[:0]), r"\(0, 3\)"),
        (lambda: baselines.cross_entropy(Z[:, :0], LABELS), r"\(4, 0\)"),
    ],
)
def test_errors_name_what_was_found(call, found):
    with pytest.raises(ValueError, match=found):
        call()


def test_docstring_examples_run():
    assert doctest.testmod(baselines).failed == 0


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_nt_xent_does_not_see_the_scale(scale):
    """Even where a square would be out of range of float32."""
    a, b = inputs("nt_xent")
    expected = LOSSES["nt_xent"](a, b)
    scale = np.float32(scale)
    assert_close(LOSSES["nt_xent"](a * scale, b / scale), expected)
    grad = jax.grad(lambda a: LOSSES["nt_xent"](a, b)[0])
    np.testing.assert_allclose(grad(a * scale) * scale, grad(a), rtol=1e-4, atol=1e-7)


def test_the_temperature_is_above_zero():
    with pytest.raises(ValueError, match="temperature must be above 0, found 0.0"):
        baselines.nt_xent(*inputs("nt_xent"), temperature=0.0)
