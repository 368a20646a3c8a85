"""The second moments of a batch that VICReg penalises, by the cheapest of three exact routes.

With z centred and C = zᵀz/(N - 1), the covariance term needs Σ_{i≠j} C_ij², a sum over D×D numbers.
But ‖zᵀz‖ = ‖zzᵀ‖ (Frobenius), so where N < D the N×N Gram matrix K = zzᵀ/(N - 1) gives the same:

    Σ_{i≠j} C_ij² = Σ C_ij² - Σ C_jj² = ‖K‖² - Σ_j var_j²

The gradient costs one more product of the same size, with C or K as the forward pass left it.
"""

from __future__ import annotations

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

Route = Literal["covariance", "gram", "gram_by_features"]
ROUTES: tuple[str, ...] = get_args(Route)

# float32 products in full: bfloat16 ones, which accelerators prefer, put K several per cent off.
_dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def choose_route(num_rows: int, num_dims: int, num_devices: int = 1) -> Route:
    """Returns the cheapest route for a batch.

    A Gram matrix takes fewer operations than the covariance where N < D, and never moves more.
    Of its two forms, with P devices, the rows move N·D numbers to each device and the features
    2N² + 2N·D/P.

    Args:
      num_rows: N, over all devices.
      num_dims: D.
      num_devices: P, those that the rows are spread over.

    >>> choose_route(256, 8192), choose_route(4096, 256), choose_route(2048, 8192, 32)
    ('gram', 'covariance', 'gram_by_features')
    """
    if num_rows >= num_dims:
        return "covariance"
    by_features = 2 * num_rows * (num_rows * num_devices + num_dims)
    if num_devices > 1 and by_features < num_rows * num_dims * num_devices:
        return "gram_by_features"
    return "gram"


def second_moments(
    z: jax.Array, *, axis_name: str | None = None, route: Route | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns the variances of a batch and the sum of its squared off-diagonal covariances.

    Both are over the global batch and unbiased (N - 1). The derivative is exact, in reverse mode.

    Args:
      z: float `(N, D)`, uncentred; with `axis_name` this device's rows of it. Computed in float32
        at least, whatever its type.
      axis_name: the mapped axis that the rows are spread over, inside shard_map or pmap. None: `z`
        is the whole batch, which under jit may itself be spread over a mesh by its rows.
      route: "covariance" (D×D; with several devices an all-reduce of it), "gram" (N×N, each device
        its own rows; an all-gather of z) or "gram_by_features" (N×N, each device from its own
        features; all-to-all, then an all-reduce of N×N; needs `axis_name`); None for the cheapest.

    Returns:
      `var (D,)` and `off_diagonal ()`, the same on every device.

    Raises:
      ValueError: z isn't a float matrix of at least two rows (over all devices), or the route is
        unknown or needs an `axis_name`.
    """
    rows, devices = check(z, axis_name)
    route = choose_route(rows, z.shape[1], devices) if route is None else route
    if route not in ROUTES:
        raise ValueError(f"route must be one of {', '.join(ROUTES)}, found {route!r}")
    if route == "gram_by_features" and axis_name is None:
        raise ValueError(
            "route 'gram_by_features' moves rows between the devices of an axis: give axis_name, "
            f"or take one of {ROUTES[:2]}"
        )
    z = as_statistics(z)
    var, off_diagonal = _partial_moments(z, axis_name, route)  # pyright: ignore[reportGeneralTypeIssues]
    # By the Gram routes it is a difference, which rounding may take below what it is a sum of.
    return _sum_over(var, axis_name), _above_zero(_sum_over(off_diagonal, axis_name))


def check(z: jax.Array, axis_name: str | None) -> tuple[int, int]:
    """Returns the rows of all devices and the number of those; raises as `second_moments` does."""
    if z.ndim != 2 or not z.shape[1] or not jnp.issubdtype(z.dtype, jnp.floating):
        raise ValueError(f"embeddings must be float (N, D), found {z.dtype}{list(z.shape)}")
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    rows = z.shape[0] * devices
    if rows < 2:
        raise ValueError(f"a variance needs at least 2 rows, found embeddings of {list(z.shape)}")
    return rows, devices


def as_statistics(z: jax.Array) -> jax.Array:
    """Returns `z` in the type of all statistics: float32, or float64 where it has that already."""
    return z if z.dtype == jnp.float64 else z.astype(jnp.float32)


def _above_zero(x: jax.Array) -> jax.Array:
    """`max(x, 0)`, with the gradient of x everywhere."""
    return x + lax.stop_gradient(jnp.maximum(x, 0) - x)


def _sum_over(x: jax.Array, axis_name: str | None) -> jax.Array:
    return x if axis_name is None else lax.psum(x, axis_name)


# Each device returns its summand of the moments. JAX differentiates their psum outside, in whatever
# way the mapped axis is typed; the cotangents that arrive here are thereby the same on all devices.
@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _partial_moments(
    z: jax.Array, axis_name: str | None, route: Route
) -> tuple[jax.Array, jax.Array]:
    return _forward(z, axis_name, route)[0]


def _forward(z: jax.Array, axis_name: str | None, route: Route):
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    rows = z.shape[0] * devices
    z = z - _sum_over(jnp.sum(z, axis=0, keepdims=True), axis_name) / rows
    own_var = jnp.sum(z * z, axis=0) / (rows - 1)
    var = _sum_over(own_var, axis_name)
    if route == "covariance":
        c = _sum_over(_dot(z.T, z), axis_name) / (rows - 1)
        # Masked, not subtracted: with N far above D that would cost digits.
        c = jnp.where(jnp.eye(c.shape[0], dtype=bool), 0, c)
        by_row = _sum_of_squares(c)
        if axis_name is not None:  # each device sums its share of the rows
            mine = jnp.arange(c.shape[0]) % devices == lax.axis_index(axis_name)
            by_row = jnp.where(mine, by_row, 0)
        return (own_var, jnp.sum(by_row)), (z, c, None, var)
    if route == "gram":
        everyone = z if axis_name is None else lax.all_gather(z, axis_name, tiled=True)
        k = _dot(z, everyone.T) / (rows - 1)
        total = jnp.sum(_sum_of_squares(k)) - jnp.sum(var * var) / devices
        return (own_var, total), (z, k, None if axis_name is None else everyone, var)
    features = _to_features(z, axis_name, devices)
    k = _sum_over(_dot(features, features.T), axis_name) / (rows - 1)
    feature_var = jnp.sum(features * features, axis=0) / (rows - 1)
    total = jnp.sum(_sum_of_squares(k)) / devices - jnp.sum(feature_var * feature_var)
    return (own_var, total), (z, k, features, var)


def _backward(axis_name: str | None, route: Route, residuals, cotangents):
    z, matrix, others, var = residuals
    g_var, g_off = cotangents
    devices = 1 if axis_name is None else lax.axis_size(axis_name)
    rows = z.shape[0] * devices
    if route == "covariance":
        product = _dot(z, matrix)
    elif route == "gram":
        product = _dot(matrix, z if others is None else others)
    else:
        product = _to_rows(_dot(matrix, others), axis_name, z.shape[1])
    by_column = 2 * g_var
    if route != "covariance":  # whose matrix has no diagonal
        by_column = by_column - 4 * g_off * var
    # z is centred, so both summands are, as the gradient of a function of centred rows must be.
    return ((4 * g_off * product + by_column[None] * z) / (rows - 1),)


_partial_moments.defvjp(_forward, _backward)


def _sum_of_squares(x: jax.Array) -> jax.Array:
    """Returns the sum of each row; a sum of a sum loses fewer digits than one over all at once."""
    return jnp.einsum("ij,ij->i", x, x, precision=lax.Precision.HIGHEST)


def _to_features(z: jax.Array, axis_name: str | None, devices: int) -> jax.Array:
    """`(N/P, D)` rows to `(N, D/P)` features; where P does not divide D, with columns of zeros."""
    z = jnp.pad(z, ((0, 0), (0, -z.shape[1] % devices)))
    return lax.all_to_all(z, axis_name, split_axis=1, concat_axis=0, tiled=True)


def _to_rows(features: jax.Array, axis_name: str | None, num_dims: int) -> jax.Array:
    rows = lax.all_to_all(features, axis_name, split_axis=0, concat_axis=1, tiled=True)
    return rows[:, :num_dims]
