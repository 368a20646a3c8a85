"""Losses of arrays over a mesh with explicit axes, which JAX makes where one does not ask."""

import contextlib
import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from vicreg import baselines, losses

LOSSES = {
    "vicreg": losses.vicreg_loss,
    "invariance": lambda *z: (losses.invariance_term(*z), {}),
    "variance": lambda *z: (losses.variance_term(*z), {}),
    "covariance": lambda *z: (losses.covariance_term(*z), {}),
    "nt_xent": functools.partial(baselines.nt_xent, temperature=0.2),
    "barlow_twins": functools.partial(baselines.barlow_twins, off_diagonal_weight=0.1),
}


@pytest.fixture(scope="module")
def mesh():
    mesh = jax.make_mesh((8,), ("data",))
    assert mesh.axis_types == (jax.sharding.AxisType.Explicit,)
    return mesh


def batch(rows, dims):
    rng = np.random.default_rng(rows)
    a = rng.normal(size=(rows, dims)).astype(np.float32)
    return a, a + rng.normal(size=a.shape).astype(np.float32)


@pytest.mark.parametrize("spec", [P("data"), P(None, "data")])
@pytest.mark.parametrize("rows, dims", [(8, 24), (32, 16)])
@pytest.mark.parametrize("name", LOSSES)
def test_values_and_gradients_are_those_of_one_device(name, rows, dims, spec, mesh):
    views = batch(rows, dims)
    gradient = jax.value_and_grad(LOSSES[name], argnums=(0, 1), has_aux=True)
    expected = jax.jit(gradient)(*views)
    split = [jax.device_put(z, NamedSharding(mesh, spec)) for z in views]
    got = jax.jit(gradient)(*split)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-6), got, expected)
    assert got[1][0].sharding.is_equivalent_to(split[0].sharding, 2)


@pytest.mark.parametrize("within", [True, False])
def test_eager_and_by_name_and_in_the_mesh_s_context(within, mesh):
    views = batch(8, 24)
    split = [jax.device_put(z, NamedSharding(mesh, P("data"))) for z in views]
    expected, _ = losses.vicreg_loss(*views, variant="paper")
    with jax.set_mesh(mesh) if within else contextlib.nullcontext():
        got, terms = losses.vicreg_loss(z_a=split[0], z_b=split[1], variant="paper")
        assert got.shape == () and set(terms) == {"invariance", "variance", "covariance"}
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        with pytest.raises(ValueError, match="must have one shape"):
            losses.vicreg_loss(split[0], split[1][:, :8])


def test_labels_too(mesh):
    logits, _ = batch(16, 5)
    labels = np.arange(16, dtype=np.int32) % 5
    expected, _ = baselines.cross_entropy(logits, labels)
    rows = NamedSharding(mesh, P("data"))
    got, _ = jax.jit(baselines.cross_entropy)(*jax.device_put((logits, labels), rows))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
