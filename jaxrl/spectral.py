"""Spectral norms of dense and convolution layers, by power iteration.

Gogianu, Berariu, Rosca, Clopath, Busoniu and Pascanu 2021, "Spectral Normalisation for Deep
Reinforcement Learning: an Optimisation Perspective", after Miyato, Kataoka, Koyama and Yoshida
2018 (algorithm 1). A layer is normalised by scaling its *output*: `(x @ W) * scale(sigma) + b`
is `x @ (W / sigma) + b`, in values and in gradients, without ever forming `W / sigma`.

Kernels are in Flax's layout, dense `(in, out)` and convolution `(height, width, in, out)`. Of the
two singular vectors, `u` has the layer's output shape and `v` its input shape; they are state,
which the caller keeps (one pair a network: a target network owns its own) and advances by one
call of `power_iteration_*` per forward in training mode.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

Strides = int | Sequence[int]
Padding = str | Sequence[tuple[int, int]]

# The operator norm is a ratio, which bfloat16 or TF32 products would spoil; mat-vecs are bound by
# memory, so exact ones cost nothing.
_PRECISION = lax.Precision.HIGHEST


def initial_vectors(key: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Returns a random array of unit Euclidean norm, uniform on the sphere.

    Args:
      key: a random key.
      shape: shape of the vector: `(out,)`, or `(height, width, channels)` of an output map.

    Returns:
      float32 `shape`.
    """
    return _normalise(jax.random.normal(key, tuple(shape), jnp.float32), 1e-12)


def power_iteration_dense(
    kernel: jax.Array, u: jax.Array, *, num_steps: int = 1, eps: float = 1e-12
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Advances `u` and estimates the spectral norm of a dense kernel.

    One step is `v = normalise(K u)`, `u = normalise(Kᵀ v)`, and then `sigma = vᵀ K u`: two
    products with the kernel in all, because the second serves both `u` and `sigma`.

    Args:
      kernel: float `(in, out)`.
      u: float `(out,)`, from the last call or from `initial_vectors`.
      num_steps: power iterations, at least 1. The paper's is 1; a cold start needs fifty for 1 %.
      eps: smallest norm that a vector is divided by.

    Returns:
      `(sigma, u, v)`, scalar, `(out,)` and `(in,)`, float32 (float64 for a float64 kernel).
      `sigma` is differentiable in the kernel, with gradient `outer(v, u)`; `u` and `v` are not.

    Raises:
      ValueError: where the shapes don't fit, or `num_steps` is below 1.

    >>> kernel = jnp.diag(jnp.array([3.0, 1.0]))
    >>> sigma, u, v = power_iteration_dense(kernel, jnp.array([1.0, 0.0]))
    >>> float(sigma)
    3.0
    """
    _check_rank("kernel", kernel, ("in", "out"))
    _check_shape("u", u, kernel.shape[1:])
    dtype = _accumulator(kernel)
    kernel = kernel.astype(dtype)
    fixed = lax.stop_gradient(kernel)
    sigma, u, v = _iterate(
        lambda v: jnp.dot(v, fixed, precision=_PRECISION),
        lambda u: jnp.dot(fixed, u, precision=_PRECISION),
        u.astype(dtype),
        num_steps,
        eps,
    )
    return _with_gradient(kernel, u, v, sigma), u, v


def power_iteration_conv(
    kernel: jax.Array,
    u: jax.Array,
    *,
    input_shape: Sequence[int],
    strides: Strides,
    padding: Padding,
    num_steps: int = 1,
    eps: float = 1e-12,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Advances `u` and estimates the norm of the linear operator that a convolution is.

    That operator maps whole inputs to whole outputs, so its norm depends on input size, strides
    and padding; the norm of the reshaped kernel, often used instead, is only a bound. As in the
    paper's code, `sigma` is a constant for the gradient here.

    Args:
      kernel: float `(kernel_height, kernel_width, in, out)`.
      u: float `(height, width, out)`, shaped like one output.
      input_shape: `(height, width, in)` of one input.
      strides: one integer, or one per spatial axis.
      padding: "SAME", "VALID", or `((top, bottom), (left, right))`.
      num_steps: power iterations, at least 1. Those after the first run in a loop, in which
        XLA compiles convolutions badly on CPU.
      eps: smallest norm that a vector is divided by.

    Returns:
      `(sigma, u, v)`, scalar, output-shaped and input-shaped; no gradient flows through any.

    Raises:
      ValueError: where the shapes don't fit, or `num_steps` is below 1.
    """
    kernel, u = lax.stop_gradient((kernel, u))
    dtype = _accumulator(kernel)
    forward, output_shape = _conv_operator(kernel.astype(dtype), input_shape, strides, padding)
    _check_shape("u", u, output_shape)
    # Zeros of the kernel's own kind: under shard_map, its type says over which axes it varies.
    transpose = jax.linear_transpose(forward, jnp.zeros_like(kernel, dtype, tuple(input_shape)))
    return _iterate(forward, lambda u: transpose(u)[0], u.astype(dtype), num_steps, eps)


def sigma_dense(kernel: jax.Array, u: jax.Array, v: jax.Array) -> jax.Array:
    """Returns `vᵀ K u` for stored vectors: the norm in evaluation mode, where nothing advances.

    Args:
      kernel: float `(in, out)`.
      u: float `(out,)`, constant for the gradient.
      v: float `(in,)`, constant for the gradient.

    Returns:
      Scalar, differentiable in the kernel.

    Raises:
      ValueError: where the shapes don't fit.
    """
    _check_rank("kernel", kernel, ("in", "out"))
    _check_shape("u", u, kernel.shape[1:])
    _check_shape("v", v, kernel.shape[:1])
    dtype = _accumulator(kernel)
    u, v = (lax.stop_gradient(vector.astype(dtype)) for vector in (u, v))
    kernel = kernel.astype(dtype)
    sigma = jnp.vdot(jnp.dot(v, lax.stop_gradient(kernel), precision=_PRECISION), u)
    return _with_gradient(kernel, u, v, sigma)


def sigma_conv(
    kernel: jax.Array, u: jax.Array, v: jax.Array, *, strides: Strides, padding: Padding
) -> jax.Array:
    """Returns the inner product of `u` with the convolution of `v`, without a gradient.

    Args:
      kernel: float `(kernel_height, kernel_width, in, out)`.
      u: float `(height, width, out)`, shaped like one output.
      v: float `(height, width, in)`, shaped like one input.
      strides: one integer, or one per spatial axis.
      padding: "SAME", "VALID", or `((top, bottom), (left, right))`.

    Returns:
      Scalar.

    Raises:
      ValueError: where the shapes don't fit.
    """
    kernel, u, v = lax.stop_gradient((kernel, u, v))
    dtype = _accumulator(kernel)
    forward, output_shape = _conv_operator(kernel.astype(dtype), v.shape, strides, padding)
    _check_shape("u", u, output_shape)
    return jnp.vdot(forward(v.astype(dtype)), u.astype(dtype), precision=_PRECISION)


def scale(sigma: jax.Array, bound: ArrayLike | None = None) -> jax.Array:
    """Returns the factor that normalises a layer whose spectral norm is `sigma`.

    Args:
      sigma: float scalar, or an array of norms.
      bound: None for `1 / sigma`: the norm becomes 1, be it larger or smaller before. A scalar k,
        traced or not, for the relaxed form `1 / max(sigma / k, 1)`: the norm becomes at most k.

    Returns:
      Like `sigma`; finite even for a kernel of zeros.

    Raises:
      ValueError: where `bound` is a Python number that is not above 0.

    >>> float(scale(jnp.float32(4.0))), float(scale(jnp.float32(4.0), bound=2.0))
    (0.25, 0.5)
    """
    sigma = jnp.asarray(sigma)
    if bound is None:
        return 1 / jnp.maximum(sigma, 1e-12)
    if isinstance(bound, (int, float)) and not bound > 0:
        raise ValueError(f"bound must be above 0, or None, found {bound}")
    return 1 / jnp.maximum(sigma / jnp.asarray(bound, sigma.dtype), 1)


def normalised_dense(
    x: jax.Array,
    kernel: jax.Array,
    bias: jax.Array,
    sigma: jax.Array,
    bound: ArrayLike | None = None,
) -> jax.Array:
    """Applies `x @ (kernel * scale(sigma, bound)) + bias` by scaling the product.

    Args:
      x: float `(..., in)`.
      kernel: float `(in, out)`.
      bias: float `(out,)`; not normalised.
      sigma: float scalar, from `power_iteration_dense` or `sigma_dense`.
      bound: as for `scale`.

    Returns:
      float `(..., out)`. The gradient reaches the kernel through the product and through `sigma`.
    """
    product = jnp.dot(x, kernel)
    product = product * scale(sigma, bound).astype(product.dtype)
    return product + jnp.broadcast_to(bias, product.shape).astype(product.dtype)


def parse_layers(
    spec: Sequence[str], names: Sequence[str]
) -> dict[str, Literal["normalise", "log"]]:
    """Reads which layers to hook, in the notation of the paper's configurations.

    Args:
      spec: entries, each an index from the end ("-2"), a name ("fc") or "all"; a suffix "L"
        ("-2L") only logs the norm. No entry, no hook.
      names: the network's layers, first to last.

    Returns:
      Mode of each hooked layer, in the order of `names`.

    Raises:
      ValueError: where an entry is unknown, or names a layer twice; it names what is allowed.

    >>> parse_layers(["-2", "conv1L"], ["conv1", "fc", "head"])
    {'conv1': 'log', 'fc': 'normalise'}
    """
    if isinstance(spec, str):
        raise ValueError(f"spec must be a sequence of entries, found the string {spec!r}")
    names = tuple(names)
    places = {"all": names}
    places |= {str(i - len(names)): (name,) for i, name in enumerate(names)}
    places |= {name: (name,) for name in names}
    modes: dict[str, Literal["normalise", "log"]] = {}
    for entry in spec:
        logged = entry not in places and entry.endswith("L")
        found = places.get(entry[:-1] if logged else entry)
        if found is None:
            raise ValueError(
                f"no layer {entry!r}; allowed are {', '.join(map(repr, places))}, "
                "each with a suffix 'L' to log only"
            )
        for name in found:
            if name in modes:
                raise ValueError(f"layer {name!r} is named twice in {list(spec)}")
            modes[name] = "log" if logged else "normalise"
    return {name: modes[name] for name in names if name in modes}


def _iterate(
    forward: Callable[[jax.Array], jax.Array],
    transpose: Callable[[jax.Array], jax.Array],
    u: jax.Array,
    num_steps: int,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, found {num_steps}")
    u = lax.stop_gradient(u)

    def step(_: int | jax.Array, u: jax.Array) -> jax.Array:
        return _normalise(forward(_normalise(transpose(u), eps)), eps)

    if num_steps > 1:
        u = lax.fori_loop(0, num_steps - 1, step, u)
    v = _normalise(transpose(u), eps)
    image = forward(v)
    u = _normalise(image, eps)
    return jnp.vdot(u, image, precision=_PRECISION), u, v


@jax.custom_jvp
def _with_gradient(kernel: jax.Array, u: jax.Array, v: jax.Array, sigma: jax.Array) -> jax.Array:
    """Returns `sigma`, with the derivative that `vᵀ kernel u` has in the kernel alone."""
    del kernel, u, v
    return sigma


@_with_gradient.defjvp
def _with_gradient_jvp(primals, tangents):
    _, u, v, sigma = primals
    # Transposed, this is outer(v, u) times a scalar, which XLA fuses into its consumer.
    rows = jnp.dot(tangents[0], u, precision=_PRECISION)
    return sigma, jnp.vdot(v, rows, precision=_PRECISION)


def _conv_operator(
    kernel: jax.Array, input_shape: Sequence[int], strides: Strides, padding: Padding
) -> tuple[Callable[[jax.Array], jax.Array], tuple[int, ...]]:
    """Returns the convolution as a function of one input, and the shape of its output."""
    _check_rank("kernel", kernel, ("kernel_height", "kernel_width", "in", "out"))
    if len(input_shape) != 3 or input_shape[2] != kernel.shape[2]:
        raise ValueError(
            f"input_shape must be (height, width, {kernel.shape[2]}) for a kernel of shape "
            f"{kernel.shape}, found {tuple(input_shape)}"
        )
    window_strides = (strides, strides) if isinstance(strides, int) else tuple(strides)

    def forward(x: jax.Array) -> jax.Array:
        return lax.conv_general_dilated(
            x[None],
            kernel,
            window_strides,
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=_PRECISION,
        )[0]

    out = jax.eval_shape(forward, jax.ShapeDtypeStruct(tuple(input_shape), kernel.dtype))
    return forward, out.shape


def _normalise(x: jax.Array, eps: float) -> jax.Array:
    # A reciprocal of the scalar: XLA fuses this into kernel-sized loops, where divisions are slow.
    return x * (1 / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(x))), eps))


def _accumulator(kernel: jax.Array) -> jnp.dtype:
    """The dtype to iterate in: float32, or float64 for a float64 kernel."""
    return jnp.dtype(jnp.float64 if kernel.dtype == jnp.float64 else jnp.float32)


def _check_rank(name: str, array: jax.Array, axes: tuple[str, ...]) -> None:
    if array.ndim != len(axes):
        raise ValueError(f"{name} must have shape ({', '.join(axes)}), found {array.shape}")


def _check_shape(name: str, array: jax.Array, expected: tuple[int, ...]) -> None:
    if array.shape != tuple(expected):
        raise ValueError(f"{name} must have shape {tuple(expected)}, found {array.shape}")
