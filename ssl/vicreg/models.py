"""Backbones as in torchvision, a small one for small images, and the expander; all in Linen.

The backbone's output is what is evaluated, the expander's what the loss sees. Names of submodules
are torchvision's with `_` for `.` (`layer1_0.downsample_0` for `layer1.0.downsample.0`), so that
`vicreg.torch_weights` need only rename. Parameters and running statistics are float32 whatever
`config.dtype` is.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from vicreg.config import ModelConfig

# Blocks of each stage, and whether a block is a bottleneck (He et al. 2016, table 1).
_RESNETS = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
}
_EXPANSION = 4  # of a bottleneck's last convolution
# Numbers in a patch up to which a convolution is done as a matrix product over patches, on which
# XLA-CPU is faster: 3×3 of three channels. Larger patches cost more than they save.
_FEW = 27

_kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# PyTorch's default for a linear layer: U(-1/√in, 1/√in).
_torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def make_backbone(config: ModelConfig, axis_name: str | None = None) -> nn.Module:
    """Makes the network whose features are evaluated: `(B, H, W, C)` to float32 `(B, F)`.

    With `apply(variables, images, train=True)`, BatchNorm uses the batch's statistics, and updates
    the running ones if the caller asks for them (`mutable=["batch_stats"]`); with `train=False`, it
    uses the running ones. Images are floats of any size and number of channels, or the module
    raises ValueError; F is `feature_dim(config)`.

    Args:
      config: architecture, width, stem and dtype of the computation.
      axis_name: the mapped axis (of `shard_map`, `pmap` or `vmap`) over which the batch is split.
        None where the module sees the whole batch, which includes a sharded one under plain `jit`.

    >>> config = ModelConfig(backbone="convnet", width=16)
    >>> backbone = make_backbone(config)
    >>> images = jnp.zeros((2, 28, 28, 1))
    >>> variables = backbone.init(jax.random.key(0), images, train=False)
    >>> backbone.apply(variables, images, train=False).shape
    (2, 64)
    """
    common = {"width": config.width, "dtype": jnp.dtype(config.dtype), "axis_name": axis_name}
    if config.backbone == "convnet":
        return ConvNet(**common)
    blocks, bottleneck = _RESNETS[config.backbone]
    return ResNet(blocks, bottleneck, config.stem == "imagenet", **common)


def make_expander(config: ModelConfig, axis_name: str | None = None) -> nn.Module:
    """Makes the network from features to embeddings: `(B, F)` to float32 `(B, D)`.

    Of VICReg (Bardes et al. 2022), section 4.2 and the authors' code: linear layer with bias,
    BatchNorm and ReLU for each width but the last, then a linear layer without bias. It is applied
    as the backbone is, and raises ValueError where the features aren't floats of rank 2.

    Args:
      config: `expander` has the widths; the last one is D.
      axis_name: see `make_backbone`.
    """
    return Expander(config.expander, jnp.dtype(config.dtype), axis_name)


def feature_dim(config: ModelConfig) -> int:
    """Returns F, the number of the backbone's features.

    >>> feature_dim(ModelConfig(backbone="resnet50"))
    2048
    """
    if config.backbone == "convnet":
        return 4 * config.width
    _, bottleneck = _RESNETS[config.backbone]
    return 8 * config.width * (_EXPANSION if bottleneck else 1)


class ResNet(nn.Module):
    """A residual network (He et al. 2016), layer for layer torchvision's.

    Attributes:
      blocks: how many of each stage.
      bottleneck: whether a block is 1×1, 3×3, 1×1 (the 3×3 carries the stride) or 3×3, 3×3.
      large_stem: 7×7 of stride 2 and a max pool, for ImageNet; or else 3×3 of stride 1.
      width: channels of the first stage; each later one doubles it.
    """

    blocks: tuple[int, ...]
    bottleneck: bool
    large_stem: bool
    width: int
    dtype: DTypeLike
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: ArrayLike, *, train: bool) -> jax.Array:
        """Maps `(B, H, W, C)` to features `(B, F)`."""
        x = _checked(images, "images", "(B, H, W, C)")
        common: dict[str, Any] = {"dtype": self.dtype, "axis_name": self.axis_name}
        size, stride = (7, 2) if self.large_stem else (3, 1)
        x = Conv(self.width, size, stride, self.dtype, name="conv1")(x)
        x = _relu(BatchNorm(**common, name="bn1")(x, train))
        if self.large_stem:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # pyright: ignore[reportArgumentType]
        for i, count in enumerate(self.blocks):
            for j in range(count):
                stride = 2 if i > 0 and j == 0 else 1
                name = f"layer{i + 1}_{j}"
                x = Block(self.width * 2**i, stride, self.bottleneck, **common, name=name)(x, train)
        return _pooled(x)


class Block(nn.Module):
    """A residual block; its last BatchNorm starts at zero, so that it begins as its shortcut."""

    width: int
    stride: int
    bottleneck: bool
    dtype: DTypeLike
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `(B, H, W, in)` to `(B, ⌈H/stride⌉, ⌈W/stride⌉, out)`."""
        w, s, common = self.width, self.stride, {"dtype": self.dtype, "axis_name": self.axis_name}
        if self.bottleneck:
            layers = [(w, 1, 1), (w, 3, s), (_EXPANSION * w, 1, 1)]
        else:
            layers = [(w, 3, s), (w, 3, 1)]
        y, features = x, layers[-1][0]
        for i, layer in enumerate(layers):
            last = i == len(layers) - 1
            y = Conv(*layer, self.dtype, name=f"conv{i + 1}")(y)
            y = BatchNorm(**common, zero_scale=last, name=f"bn{i + 1}")(y, train)
            y = y if last else _relu(y)
        if s != 1 or x.shape[-1] != features:
            x = Conv(features, 1, s, self.dtype, name="downsample_0")(x)
            x = BatchNorm(**common, name="downsample_1")(x, train)
        return _relu(x + y)


class ConvNet(nn.Module):
    """Three 3×3 convolutions of stride 2 with BatchNorm and ReLU, for images of about 28×28.

    The first has `width` channels, and each later one twice as many.
    """

    width: int
    dtype: DTypeLike
    axis_name: str | None = None

    @nn.compact
    def __call__(self, images: ArrayLike, *, train: bool) -> jax.Array:
        """Maps `(B, H, W, C)` to features `(B, 4 width)`."""
        x = _checked(images, "images", "(B, H, W, C)")
        for i in range(3):
            x = Conv(self.width * 2**i, 3, 2, self.dtype, name=f"conv{i + 1}")(x)
            x = _relu(BatchNorm(self.dtype, self.axis_name, name=f"bn{i + 1}")(x, train))
        return _pooled(x)


class Expander(nn.Module):
    """See `make_expander`."""

    widths: tuple[int, ...]
    dtype: DTypeLike
    axis_name: str | None = None

    @nn.compact
    def __call__(self, features: ArrayLike, *, train: bool) -> jax.Array:
        """Maps `(B, F)` to embeddings `(B, D)`."""
        x = _checked(features, "features", "(B, F)")
        common: dict[str, Any] = {"dtype": self.dtype, "kernel_init": _torch_uniform}
        for i, width in enumerate(self.widths[:-1]):
            x = nn.Dense(width, **common, name=f"dense{i + 1}")(x)
            x = _relu(BatchNorm(self.dtype, self.axis_name, name=f"bn{i + 1}")(x, train))
        name = f"dense{len(self.widths)}"
        x = nn.Dense(self.widths[-1], **common, use_bias=False, name=name)(x)
        return x.astype(jnp.float32)


class Conv(nn.Module):
    """A convolution without bias, of odd size, padded by half of it on each side as PyTorch's."""

    features: int
    size: int
    stride: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `(B, H, W, in)` to `(B, ⌈H/stride⌉, ⌈W/stride⌉, features)`."""
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", _kaiming_normal, shape).astype(self.dtype)
        x, half = x.astype(self.dtype), self.size // 2
        if math.prod(shape[:3]) <= _FEW:
            return _over_patches(x, kernel, self.stride)
        strides, padding = (self.stride, self.stride), [(half, half), (half, half)]
        dims = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=dims)


class BatchNorm(nn.Module):
    """Normalises each channel over the batch and all positions (Ioffe and Szegedy 2015).

    Unlike Linen's, the running variance takes up the batch's with n - 1 in the denominator, as
    PyTorch's does, and the backward pass is the two sums that it need be. The variance is that of
    centred values: E[x²] - E[x]² loses its digits where the mean is large. Running statistics start
    at 0 and 1, and keep 0.9 of themselves at each update. With `axis_name` the shares of the batch
    must be equally large; with `zero_scale` the scale starts at 0.
    """

    dtype: DTypeLike
    axis_name: str | None = None
    zero_scale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps `(..., C)` to the same shape."""
        init = nn.initializers.zeros if self.zero_scale else nn.initializers.ones
        channels, axes = x.shape[-1:], tuple(range(x.ndim - 1))
        scale = self.param("scale", init, channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels)
        x = x.astype(jnp.float32)
        axis_name = None if self.is_initializing() else self.axis_name

        def average(values: jax.Array) -> jax.Array:
            mean = jnp.mean(values, axes)
            return mean if axis_name is None else lax.pmean(mean, axis_name)

        mean = average(x) if train else running_mean.value
        # The variance doesn't change, to first order, with the centre of its squares, and to y the
        # mean is but a shift of the channel. With gradients kept out of the centre, the backward
        # pass needs Σdy and Σdy·c, which autodiff finds, and no sums of sums after them.
        centre = lax.stop_gradient(mean)
        c = x - jnp.expand_dims(centre, axes)
        var = average(jnp.square(c)) if train else running_var.value
        scale = lax.rsqrt(var + 1e-5) * scale
        shift = bias - (mean - centre) * scale
        if train and self.is_mutable_collection("batch_stats") and not self.is_initializing():
            n = x.size // x.shape[-1] * (1 if axis_name is None else lax.axis_size(axis_name))
            running_mean.value += 0.1 * (centre - running_mean.value)
            unbiased = lax.stop_gradient(var) * (n / max(n - 1, 1))
            running_var.value += 0.1 * (unbiased - running_var.value)
        y = c * jnp.expand_dims(scale, axes) + jnp.expand_dims(shift, axes)
        return y.astype(self.dtype)


def _over_patches(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """The same convolution as one matrix product."""
    size, _, channels, features = kernel.shape
    half, width = size // 2, size * size * channels
    rows, cols = (range(0, n, stride) for n in x.shape[1:3])
    x = jnp.pad(x, ((0, 0), (half, half), (half, half), (0, 0)))
    shifted = [
        x[:, i : i + rows[-1] + 1 : stride, j : j + cols[-1] + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    y = jnp.dot(jnp.concatenate(shifted, -1).reshape(-1, width), kernel.reshape(width, features))
    return y.reshape(x.shape[0], len(rows), len(cols), features)


def _relu(x: jax.Array) -> jax.Array:
    """`max(x, 0)`, in a form that XLA-CPU computes once.

    An operation of one large operand it repeats wherever the result is read: of `nn.relu`, it would
    redo all since the last convolution inside the transposition of the next one's backward pass.
    """
    return jnp.where(x <= 0, jnp.zeros_like(x), x)


def _pooled(x: jax.Array) -> jax.Array:
    return jnp.mean(x.astype(jnp.float32), (1, 2))


def _checked(array: ArrayLike, name: str, shape: str) -> jax.Array:
    x = jnp.asarray(array)
    if x.ndim != shape.count(",") + 1:
        raise ValueError(f"{name} must have shape {shape}, found {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be of a floating type, found {x.dtype}")
    return x
