"""How fast is the VICReg loss with its gradient, and how much memory does it take?

Peers: the same written plainly in JAX (D×D covariances and autodiff), and lightly's `VICRegLoss` in
PyTorch on the same threads. On a GPU or TPU only the plain form is compared.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _bench import alternate, figure, median, show

from vicreg.losses import vicreg_loss

SHAPES = ((256, 8192), (2048, 8192), (2048, 2048), (4096, 256))
MIB = 2**20


def naive(z_a: jax.Array, z_b: jax.Array) -> jax.Array:
    """The authors' formula as one would write it first."""
    n, d = z_a.shape
    invariance = jnp.mean((z_a - z_b) ** 2)
    variance = covariance = jnp.float32(0)
    for z in (z_a, z_b):
        z = z - z.mean(axis=0)
        variance += jnp.mean(jax.nn.relu(1 - jnp.sqrt(z.var(axis=0, ddof=1) + 1e-4))) / 2
        c = z.T @ z / (n - 1)
        covariance += (jnp.sum(c**2) - jnp.sum(jnp.diagonal(c) ** 2)) / d
    return 25 * invariance + 25 * variance + covariance


def lightly(z_a: np.ndarray, z_b: np.ndarray) -> Callable[[], Any] | None:
    """Lightly's loss and gradient as a function without arguments; None where it isn't there."""
    try:
        import torch
        from lightly.loss import VICRegLoss
    except ImportError:
        return None
    a, b = (torch.tensor(z, requires_grad=True) for z in (z_a, z_b))
    loss = VICRegLoss()

    def step() -> float:
        a.grad = b.grad = None
        value = loss(a, b)
        value.backward()
        return value.item()

    return step


def main(repeats: int = 7, quick: Annotated[bool, tyro.conf.arg(help="fewer repeats")] = False):
    """Times every shape.

    Args:
      repeats: timed calls of each.
      quick: fewer of them.
    """
    repeats = 3 if quick else repeats
    for n, d in SHAPES:
        rng = np.random.default_rng(0)
        z_a = rng.normal(size=(n, d)).astype(np.float32)
        z_b = (z_a + 0.3 * rng.normal(size=(n, d))).astype(np.float32)
        gradient = jax.jit(jax.value_and_grad(lambda a, b: vicreg_loss(a, b)[0], argnums=(0, 1)))
        plain = jax.jit(jax.value_and_grad(naive, argnums=(0, 1)))
        arguments = jax.device_put((z_a, z_b))
        fns: dict[str, Callable[[], Any]] = {
            "ours": lambda f=gradient, x=arguments: f(*x),
            "naive": lambda f=plain, x=arguments: f(*x),
        }
        peer = lightly(z_a, z_b) if jax.default_backend() == "cpu" else None
        if peer is not None:
            fns["lightly"] = peer
            assert abs(float(fns["ours"]()[0]) / peer() - 1) < 1e-3, "not the same loss"
        seconds = alternate(fns, repeats, warmup=1)
        ours, plainly = median(seconds["ours"], "ms"), median(seconds["naive"], "ms")
        target = 15.0 if (n, d) == SHAPES[0] else 1.0
        what = f"{n}×{d}: loss and gradient"
        figure(f"{what}, naive JAX", ours, plainly, "ms", plainly / ours, target, "higher")
        if peer is None:
            figure(f"{what}, lightly (not compared here)", ours, None, "ms")
        else:
            theirs = median(seconds["lightly"], "ms")
            figure(f"{what}, lightly", ours, theirs, "ms", theirs / ours, 1.0, "higher")
        memory = [
            f.lower(*arguments).compile().memory_analysis().temp_size_in_bytes / MIB
            for f in (gradient, plain)
        ]
        limit = 64.0 if (n, d) == SHAPES[0] else None
        figure(f"{n}×{d}: temporaries", *memory, "MiB", memory[0], limit, "lower")
    show()


if __name__ == "__main__":
    tyro.cli(main)
