"""The VICReg loss and its three terms (Bardes, Ponce and LeCun, ICLR 2022).

Embeddings are global arrays, on one device or spread over a mesh by jit; or, inside shard_map or
pmap, this device's rows of them with the name of the mapped axis. The loss is that of the global
batch either way. Inside a mapped axis, take the gradient there and `jax.lax.pmean` it:

    grads = jax.grad(lambda p: vicreg_loss(f(p, a), f(p, b), axis_name="data")[0])(params)
    grads = jax.lax.pmean(grads, "data")
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from vicreg.covariance import Route, as_statistics, check, second_moments
from vicreg.explicit import on_any_mesh

Variant = Literal["code", "paper"]
_EPSILON = 1e-4  # under the root of the standard deviation, in the paper and in the code


@on_any_mesh
def vicreg_loss(
    z_a: jax.Array,
    z_b: jax.Array,
    *,
    invariance_weight: float = 25.0,
    variance_weight: float = 25.0,
    covariance_weight: float = 1.0,
    variant: Variant = "code",
    axis_name: str | None = None,
    route: Route | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Variance, invariance and covariance of two views' embeddings (equation 6).

    Args:
      z_a: embeddings of the first view, float `(N, D)`; with `axis_name` this device's rows.
      z_b: those of the second view, of the same shape; row i is of the same image.
      invariance_weight: λ.
      variance_weight: μ.
      covariance_weight: ν.
      variant: "code" as the authors' code computes it, "paper" as Algorithm 1 does: twice the
        variance term.
      axis_name: mapped axis that the rows are spread over, if any.
      route: how covariances are computed, as in `covariance.second_moments`; None for the cheapest.

    Returns:
      The loss, and its unweighted terms `invariance`, `variance` and `covariance`; scalars of
      float32 (float64 for float64 embeddings). Embeddings that aren't finite give NaN.

    Raises:
      ValueError: the views differ in shape, are no float matrices or have one row in all; or the
        variant or route is unknown.

    >>> z = jax.numpy.asarray([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    >>> loss, terms = vicreg_loss(z, z)
    >>> round(float(loss), 3), round(float(terms["variance"]), 4)
    (4.586, 0.1834)
    """
    _check(z_a, z_b)
    (var_a, off_a), (var_b, off_b) = (
        second_moments(z, axis_name=axis_name, route=route) for z in (z_a, z_b)
    )
    terms = {
        "invariance": invariance_term(z_a, z_b, axis_name=axis_name),
        "variance": _hinge(var_a, var_b, variant),
        "covariance": (off_a + off_b) / z_a.shape[1],
    }
    loss = (
        invariance_weight * terms["invariance"]
        + variance_weight * terms["variance"]
        + covariance_weight * terms["covariance"]
    )
    return loss, terms


@on_any_mesh
def invariance_term(z_a: jax.Array, z_b: jax.Array, *, axis_name: str | None = None) -> jax.Array:
    """Mean squared distance of the two views, over rows and dimensions (equation 5, divided by D).

    Args and errors: as `vicreg_loss`.
    """
    _check(z_a, z_b)
    check(z_a, axis_name)
    difference = as_statistics(z_a) - as_statistics(z_b)
    by_dimension = jnp.sum(difference * difference, axis=0)
    mean = jnp.mean(by_dimension) / z_a.shape[0]
    return mean if axis_name is None else lax.pmean(mean, axis_name)


@on_any_mesh
def variance_term(
    z_a: jax.Array, z_b: jax.Array, *, variant: Variant = "code", axis_name: str | None = None
) -> jax.Array:
    """Mean over dimensions of max(0, 1 - std), of both views (equation 1).

    The standard deviation is √(var + 1e-4) with the unbiased variance of the global batch.
    "code" halves the sum of the views, "paper" does not.

    Args and errors: as `vicreg_loss`.
    """
    _check(z_a, z_b)
    var_a, var_b = (second_moments(z, axis_name=axis_name)[0] for z in (z_a, z_b))
    return _hinge(var_a, var_b, variant)


@on_any_mesh
def covariance_term(
    z_a: jax.Array, z_b: jax.Array, *, axis_name: str | None = None, route: Route | None = None
) -> jax.Array:
    """Sum of squared off-diagonal covariances over D, summed over the views (equations 3 and 4).

    Args and errors: as `vicreg_loss`.
    """
    _check(z_a, z_b)
    moments = (second_moments(z, axis_name=axis_name, route=route) for z in (z_a, z_b))
    return sum(off for _, off in moments) / z_a.shape[1]  # pyright: ignore[reportReturnType]


def _hinge(var_a: jax.Array, var_b: jax.Array, variant: Variant) -> jax.Array:
    if variant not in ("code", "paper"):
        raise ValueError(f"variant must be 'code' or 'paper', found {variant!r}")
    total = sum(jnp.mean(jax.nn.relu(1 - jnp.sqrt(var + _EPSILON))) for var in (var_a, var_b))
    return total / 2 if variant == "code" else total  # pyright: ignore[reportReturnType]


def _check(z_a: jax.Array, z_b: jax.Array) -> None:
    if z_a.shape != z_b.shape or z_a.dtype != z_b.dtype:
        raise ValueError(
            f"the views must have one shape and type, found {z_a.dtype}{list(z_a.shape)} and "
            f"{z_b.dtype}{list(z_b.shape)}"
        )
