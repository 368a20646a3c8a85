"""Spectral schedulers: what spectral normalisation does to optimisation, without normalising.

Gogianu et al. 2021, "Spectral Normalisation for Deep Reinforcement Learning: an Optimisation
Perspective". The layers' norms `sigma` are measured (hook them log-only) and act on the step
instead of on the weights: through the gradient (`div_grad`), through Adam's epsilon
(`adam_mul_eps`) or through the network's output (`div_out`).

The two transformations take the norms as an extra argument of `update`, in the form of the
network's Flax collection, `{layer: {"u", "v", "sigma"}}`, whose layers lie in the same place as
`{layer: {"kernel", "bias"}}` in the parameters, nested or not. They touch the kernels of those
layers alone. `optax.chain` passes the argument on:

    optimiser = optax.chain(div_grad(), optax.adam(2.5e-4))
    updates, state = optimiser.update(gradients, state, params, spectral=spectral)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from jaxrl.spectral import scale


def div_grad(bound: ArrayLike | None = None) -> optax.GradientTransformationExtraArgs:
    """Divides the gradients of the hooked kernels by their layers' spectral norms.

    Put it before the optimiser proper.

    Args:
      bound: None to divide by sigma, or k, traced or not, to divide by `max(sigma / k, 1)`.

    Returns:
      A transformation without state; `update` needs `spectral=`.

    Raises:
      ValueError: from `update`, where `spectral` is missing, empty or names an unknown layer.
    """

    def init(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        spectral: Any = None,
        **_: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params
        factors = {path: scale(sigma, bound) for path, sigma in _sigmas(spectral).items()}

        def divide(factor: jax.Array | None, gradient: jax.Array) -> jax.Array:
            return gradient if factor is None else gradient * factor.astype(gradient.dtype)

        return _map_hooked(divide, factors, updates), state

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def scale_by_adam_mul_eps(
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    bound: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam's direction, with epsilon multiplied by sigma on the hooked kernels.

    While sigma is constant this is Adam on the gradient divided by sigma:
    `(m / σ) / (sqrt(n / σ²) + ε) = m / (sqrt(n) + σ ε)`. Unlike `div_grad`, it leaves no trace of
    earlier norms in the moments.

    Args:
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: Adam's epsilon, outside of the square root.
      bound: None to multiply by sigma, or k to multiply by `max(sigma / k, 1)`.

    Returns:
      A transformation whose state is `optax.ScaleByAdamState`; `update` needs `spectral=`.

    Raises:
      ValueError: from `update`, where `spectral` is missing, empty or names an unknown layer.
    """

    def init(params: optax.Params) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params),
            nu=optax.tree.zeros_like(params),
        )

    def update(
        updates: optax.Updates,
        state: optax.ScaleByAdamState,
        params: optax.Params | None = None,
        *,
        spectral: Any = None,
        **_: Any,
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params
        factors = {path: 1 / scale(sigma, bound) for path, sigma in _sigmas(spectral).items()}
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        # optax.tree.bias_correction raises a float to an integer: an error under strict promotion.
        steps = jnp.asarray(count, jnp.float32)
        mu_mass, nu_mass = 1 - jnp.power(b1, steps), 1 - jnp.power(b2, steps)

        def direction(factor: jax.Array | None, m: jax.Array, n: jax.Array) -> jax.Array:
            epsilon = jnp.asarray(eps, m.dtype)
            if factor is not None:
                epsilon = epsilon * factor.astype(m.dtype)
            m_hat, n_hat = m / mu_mass.astype(m.dtype), n / nu_mass.astype(n.dtype)
            return m_hat / (jnp.sqrt(n_hat) + epsilon)

        scaled = _map_hooked(direction, factors, mu, nu)
        return scaled, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def adam_mul_eps(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    bound: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Adam with epsilon multiplied by sigma on the hooked kernels ("mulEps").

    Args:
      learning_rate: step size, a number, traced or not, or an optax schedule.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: Adam's epsilon. The paper's agents use 3.125e-4, not the usual 1e-8.
      bound: None to multiply by sigma, or k to multiply by `max(sigma / k, 1)`.

    Returns:
      An optimiser; `update` needs `spectral=`.

    Raises:
      ValueError: from `update`, where `spectral` is missing, empty or names an unknown layer.
    """
    return optax.chain(
        scale_by_adam_mul_eps(b1, b2, eps, bound), optax.scale_by_learning_rate(learning_rate)
    )


def div_out(outputs: jax.Array, spectral: Any, bound: ArrayLike | None = None) -> jax.Array:
    """Divides a network's outputs by the product of the hooked layers' spectral norms.

    With ReLU, no biases and every layer hooked, this is the forward pass of the normalised
    network, since ReLU commutes with positive factors.

    Args:
      outputs: float, any shape.
      spectral: the network's collection, `{layer: {"u", "v", "sigma"}}`, nested or not. Where its
        norms depend on parameters being differentiated, so do the outputs.
      bound: None to divide by each sigma, or k to divide by each `max(sigma / k, 1)`.

    Returns:
      Like `outputs`.

    Raises:
      ValueError: where `spectral` is missing or holds no norm.

    >>> spectral = {"fc": {"sigma": jnp.float32(2.0)}, "head": {"sigma": jnp.float32(4.0)}}
    >>> div_out(jnp.ones(2), spectral).tolist()
    [0.125, 0.125]
    """
    factor = math.prod(scale(sigma, bound) for sigma in _sigmas(spectral).values())
    return outputs * jnp.asarray(factor, outputs.dtype)


Path = tuple[str, ...]


def _path(keys: tuple[Any, ...]) -> Path:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _sigmas(spectral: Any) -> dict[Path, jax.Array]:
    """Returns the norm of each layer of the collection, by the layer's path."""
    if spectral is None:
        raise ValueError(
            "a spectral scheduler needs the norms: pass spectral={layer: {'sigma': ...}}, "
            "the network's 'spectral' collection"
        )
    leaves = jax.tree_util.tree_leaves_with_path(spectral)
    paths = [(_path(keys), leaf) for keys, leaf in leaves]
    sigmas = {path[:-1]: jnp.asarray(leaf) for path, leaf in paths if path[-1:] == ("sigma",)}
    if not sigmas:
        found = ", ".join("/".join(path) for path, _ in paths) or "nothing"
        raise ValueError(f"spectral holds no 'sigma', found {found}: hook a layer")
    return sigmas


def _map_hooked(
    function: Callable[..., jax.Array], factors: dict[Path, jax.Array], *trees: Any
) -> Any:
    """Maps `function(factor or None, leaf, ...)`, the factor being that of a hooked kernel."""
    leaves = jax.tree_util.tree_leaves_with_path(trees[0])
    kernels = [
        path[:-1] for path in (_path(keys) for keys, _ in leaves) if path[-1:] == ("kernel",)
    ]
    for layer in factors:
        if layer not in kernels:
            raise ValueError(
                f"spectral names the layer {'/'.join(layer)!r}, but the parameters have kernels "
                f"in {', '.join(repr('/'.join(kernel)) for kernel in kernels) or 'no layer'}"
            )

    def one(keys: tuple[Any, ...], *leaf: jax.Array) -> jax.Array:
        path = _path(keys)
        return function(factors.get(path[:-1]) if path[-1] == "kernel" else None, *leaf)

    return jax.tree_util.tree_map_with_path(one, *trees)
