"""The paper's convolutional networks, any layer of which may be spectrally normalised.

Names of layers: `conv1 … convN, fc, head` (`fc1 … fcM` if there are several). Parameters are
`{layer: {"kernel", "bias"}}`, Flax layout; the collection `"spectral"` holds, per hooked layer,
`{"u", "v", "sigma"}` (see `jaxrl.spectral`). A forward with `train=True` advances the vectors, if
the caller asks for them (`mutable=["spectral"]`); with `train=False` nothing advances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jaxrl import schedulers, spectral
from jaxrl.types import Array

ConvMethod = Literal["direct", "space_to_depth", "im2col"]
Mode = Literal["normalise", "log"]

_xavier_uniform = nn.initializers.xavier_uniform()


class ConvNet(nn.Module):
    """Convolutions, dense layers and a head of action values or of their distributions.

    Attributes:
      num_actions: A.
      num_atoms: atoms of each action's distribution, or None for plain action values.
      convs: (channels, kernel size, stride) of each convolution; no padding, as in the paper.
      hidden: widths of the dense layers before the head.
      input_scale: factor on the input, 1/255 for bytes.
      spectral: layers to hook, in the notation of `spectral.parse_layers`: `("-2",)` is the
        second-to-last layer, `("-2L",)` only logs its norm, `("all",)` hooks every layer.
      bound: None for W / σ; k for W / max(σ/k, 1). May be traced.
      div_out: divide the output by the product of the hooked layers' norms (the scheduler
        divOut) in place of normalising them.
      conv_method: see `conv2d`.
    """

    num_actions: int
    num_atoms: int | None
    convs: tuple[tuple[int, int, int], ...]
    hidden: tuple[int, ...]
    input_scale: float
    spectral: tuple[str, ...] = ()
    bound: ArrayLike | None = None
    div_out: bool = False
    conv_method: ConvMethod = "direct"

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of the layers, first to last."""
        fcs = ["fc"] if len(self.hidden) == 1 else [f"fc{i + 1}" for i in range(len(self.hidden))]
        return (*(f"conv{i + 1}" for i in range(len(self.convs))), *fcs, "head")

    def hooks(self) -> dict[str, Mode]:
        """Returns the mode of each hooked layer; ValueError where one is unknown."""
        modes: dict[str, Mode] = spectral.parse_layers(self.spectral, self.layer_names)
        return dict.fromkeys(modes, "log") if self.div_out else modes

    @nn.compact
    def __call__(self, obs: Array, *, train: bool) -> jax.Array:
        """Returns logits `(B, A, num_atoms)`, or action values `(B, A)`, float32.

        Args:
          obs: `(B, H, W, C)`, any dtype.
          train: whether hooked layers advance their power iteration.

        Raises:
          ValueError: where `obs` isn't of rank 4, or `spectral` names an unknown layer.
        """
        if obs.ndim != 4:
            raise ValueError(f"obs must have shape (B, H, W, C), found {obs.shape}")
        modes, layers = self.hooks(), iter(self.layer_names)

        def hook() -> dict:
            name = next(layers)
            return {"name": name, "mode": modes.get(name), "bound": self.bound}

        x, scale = jnp.asarray(obs), self.input_scale
        for features, size, stride in self.convs:
            layer = Conv(features, size, stride, self.conv_method, input_scale=scale, **hook())
            x, scale = nn.relu(layer(x, train)), 1.0
        x = x.reshape(x.shape[0], -1).astype(jnp.float32) * scale
        for features in self.hidden:
            x = nn.relu(Dense(features, **hook())(x, train))
        x = Dense(self.num_actions * (self.num_atoms or 1), **hook())(x, train)
        if self.div_out and modes:
            sigmas = {name: self.get_variable("spectral", name) for name in modes}
            x = schedulers.div_out(x, sigmas, self.bound)
        atoms = () if self.num_atoms is None else (self.num_atoms,)
        return x.reshape(x.shape[0], self.num_actions, *atoms)


def nature_net(num_actions: int, num_atoms: int | None = 51, **options) -> ConvNet:
    """Returns the Nature CNN (Mnih et al. 2015): input `(B, 84, 84, 4)` bytes.

    Args:
      num_actions: A.
      num_atoms: 51 for C51 (Bellemare et al. 2017), None for DQN.
      **options: `spectral`, `bound`, `div_out`, `conv_method` of `ConvNet`.
    """
    convs = ((32, 8, 4), (64, 4, 2), (64, 3, 1))
    return ConvNet(num_actions, num_atoms, convs, (512,), 1 / 255, **options)


def minatar_net(
    num_actions: int = 6,
    num_atoms: int | None = 51,
    *,
    convs: Sequence[int] = (16,),
    hidden: Sequence[int] = (128,),
    **options,
) -> ConvNet:
    """Returns the network of Young and Tian (2019): input `(B, 10, 10, C)` of zeros and ones.

    Args:
      num_actions: A; the paper uses all 6.
      num_atoms: 51 for C51, None for DQN.
      convs: channels of each 3×3 convolution; the authors sweep from (24,) to (24, 24, 24, 24).
      hidden: widths of the dense layers.
      **options: `spectral`, `bound`, `div_out`, `conv_method` of `ConvNet`.
    """
    options.setdefault("conv_method", "im2col")  # training runs in a scan, see `conv2d`
    layers = tuple((features, 3, 1) for features in convs)
    return ConvNet(num_actions, num_atoms, layers, tuple(hidden), 1.0, **options)


class Dense(nn.Module):
    """A dense layer with Xavier weights that may be hooked; see `ConvNet` for the attributes."""

    features: int
    mode: Mode | None = None
    bound: ArrayLike | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `(B, in)` to `(B, features)`."""
        kernel = self.param("kernel", _xavier_uniform, (x.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        if self.mode is None:
            return jnp.dot(x, kernel) + bias[None]

        def advance(u: jax.Array):
            return spectral.power_iteration_dense(kernel, u)

        def hold(u: jax.Array, v: jax.Array):
            return spectral.sigma_dense(kernel, u, v)

        sigma = _norm(self, (self.features,), advance, hold, train)
        if self.mode == "log":
            return jnp.dot(x, kernel) + bias[None]
        return spectral.normalised_dense(x, kernel, bias, sigma, self.bound)


class Conv(nn.Module):
    """An unpadded convolution with Xavier weights that may be hooked; see `ConvNet`."""

    features: int
    size: int
    stride: int
    method: ConvMethod = "direct"
    mode: Mode | None = None
    bound: ArrayLike | None = None
    input_scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `(B, H, W, in)`, bytes or floats, to float32 maps as `conv2d` does."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", _xavier_uniform, shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        # Scaling the kernel is scaling the input, which has a hundred times as many numbers.
        y = conv2d(x, kernel * self.input_scale, self.stride, self.method)
        if self.mode is not None:
            options = {"strides": self.stride, "padding": "VALID"}

            def advance(u: jax.Array):
                input_shape = x.shape[1:]
                return spectral.power_iteration_conv(kernel, u, input_shape=input_shape, **options)

            def hold(u: jax.Array, v: jax.Array):
                return spectral.sigma_conv(kernel, u, v, **options)

            sigma = _norm(self, y.shape[1:], advance, hold, train)
            if self.mode == "normalise":
                y = y * spectral.scale(sigma, self.bound)
        return y + bias[None, None, None]


def _norm(module: nn.Module, u_shape, advance, hold, train: bool) -> jax.Array:
    """Returns σ of a hooked layer, and advances its vectors if this forward is a training one."""
    if module.is_initializing():
        # The first training forward must start from u as drawn; v and σ are filled in so that an
        # evaluation before it is well defined.
        u = module.variable(
            "spectral", "u", lambda: spectral.initial_vectors(module.make_rng("params"), u_shape)
        ).value
        sigma, _, v = advance(u)
        module.variable("spectral", "v", lambda: v)
        module.variable("spectral", "sigma", lambda: sigma)
        return sigma
    u, v = module.get_variable("spectral", "u"), module.get_variable("spectral", "v")
    if not train:
        return hold(u, v)
    sigma, u, v = advance(u)
    if module.is_mutable_collection("spectral"):
        fresh = lax.stop_gradient({"u": u, "v": v, "sigma": sigma})
        for name, value in fresh.items():
            module.put_variable("spectral", name, value)
    return sigma


def conv2d(x: jax.Array, kernel: jax.Array, stride: int, method: ConvMethod) -> jax.Array:
    """Convolves without padding; all methods compute the same sums.

    `direct` leaves it to XLA. `space_to_depth` rewrites a strided convolution as one of stride 1
    on blocks of `stride × stride` pixels, which suits wide vector units. `im2col` is a matrix
    product over patches, for small maps inside `lax.scan`, where XLA-CPU runs convolutions ten
    times slower, and under `vmap` over kernels, where they would become grouped ones.

    Args:
      x: `(B, H, W, in)` of any dtype, which becomes the kernel's; bytes are rearranged as such.
      kernel: float `(size, size, in, out)`.
      stride: of both axes.
      method: how.

    Returns:
      float `(B, (H-size)//stride+1, (W-size)//stride+1, out)`.

    Raises:
      ValueError: where the method is unknown, or the map is smaller than the kernel.
    """
    size = kernel.shape[0]
    if min(x.shape[1:3]) < size:
        raise ValueError(f"a map of {x.shape[1:3]} is smaller than the kernel {kernel.shape[:2]}")
    if method == "space_to_depth" and stride > 1 and size % stride == 0:
        rows, cols = ((n - size) // stride * stride + size for n in x.shape[1:3])
        x = _blocks(x[:, :rows, :cols], stride)
        kernel = jnp.moveaxis(_blocks(jnp.moveaxis(kernel, 3, 0), stride), 0, 3)
        stride = 1
    elif method not in ("direct", "space_to_depth", "im2col"):
        raise ValueError(f"method must be one of {get_args(ConvMethod)}, found {method!r}")
    x = x.astype(kernel.dtype)
    if method == "im2col":
        return _im2col(x, kernel, stride)
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, (stride, stride), "VALID", dimension_numbers=dims)


def _blocks(x: jax.Array, s: int) -> jax.Array:
    """`(N, H, W, C)` → `(N, H/s, W/s, s·s·C)`."""
    n, h, w, c = x.shape
    if x.dtype == jnp.uint8 and c == 4:
        # A pixel of four bytes moves as one word: XLA-CPU is several times faster at that.
        words = lax.bitcast_convert_type(x, jnp.uint32)[..., None]
        return lax.bitcast_convert_type(_blocks(words, s), jnp.uint8).reshape(
            n, h // s, w // s, s * s * c
        )
    x = x.reshape(n, h // s, s, w // s, s, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(n, h // s, w // s, s * s * c)


def _im2col(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    size, _, channels, features = kernel.shape
    height, width = ((n - size) // stride + 1 for n in x.shape[1:3])
    spans = [slice(i, i + stride * (height - 1) + 1, stride) for i in range(size)]
    across = [slice(j, j + stride * (width - 1) + 1, stride) for j in range(size)]
    patches = jnp.concatenate([x[:, rows, cols] for rows in spans for cols in across], axis=-1)
    flat = patches.reshape(math.prod(patches.shape[:-1]), size * size * channels)
    y = jnp.dot(flat, kernel.reshape(size * size * channels, features))
    return y.reshape(*patches.shape[:-1], features)
