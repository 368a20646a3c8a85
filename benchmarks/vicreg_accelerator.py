"""How many images a second does a GPU or TPU train on, and what share of its peak is that?

ResNet-18 with the CIFAR stem and ResNet-50 on ImageNet-shaped images, both in bfloat16, whole
steps with augmentation from uint8 images on the device; and the share of the loss in them. FLOPs
are the compiler's count of the update; `--peak-tflops` overrides what is known of the device.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _bench import alternate, figure, median, show

from vicreg import augment, learner, presets, step
from vicreg.config import PretrainConfig

# Dense bfloat16 peaks, as the vendors state them.
PEAKS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "TPU v4": 275.0, "TPU v5e": 197.0}


def measure(name: str, config: PretrainConfig, side: int, peak: float | None, repeats: int) -> None:
    """Times a step and its parts, and collects the figures."""
    parts = learner.make(config, steps_per_epoch=100, num_classes=1000)
    size, batch = config.augment.size, config.batch_size
    state = jax.jit(lambda k: learner.init(parts, k, (size, size, 3)))(jax.random.key(0))
    images = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3)).astype(np.uint8)
    sizes = jnp.full((batch, 2), side, jnp.int32)
    labels = jnp.zeros(batch, jnp.int32)
    keys = jax.random.split(jax.random.key(1), batch)
    images = jax.device_put(images)
    views = jax.jit(lambda k, x, s: augment.two_views(k, x, s, config.augment))
    update = jax.jit(lambda state, batch: step.update(parts, state, batch))
    a, b = views(keys, images, sizes)
    on_device = {"view_a": a, "view_b": b, "label": labels}
    z = jax.random.normal(jax.random.key(2), (2, batch, config.model.expander[-1]))
    loss = jax.jit(jax.value_and_grad(lambda z: parts.objective(z[0], z[1])[0]))  # pyright: ignore[reportOptionalCall]
    compiled = update.lower(state, on_device).compile()
    flops = compiled.cost_analysis()["flops"]
    seconds = alternate(
        {
            "views": lambda: views(keys, images, sizes),
            "update": lambda: compiled(state, on_device)[1]["loss"],
            "loss": lambda: loss(z),
        },
        repeats,
    )
    parts_ms = {part: median(found, "ms") for part, found in seconds.items()}
    whole = parts_ms["views"] + parts_ms["update"]
    figure(f"{name}: a step", whole, None, "ms")
    figure(f"{name}: images a second", batch / whole * 1e3, None, "images/s", better="higher")
    share = parts_ms["loss"] / whole
    figure(f"{name}: share of the step in the loss", parts_ms["loss"], whole, "ms", share, 0.02)
    if peak is not None:
        used = flops / (whole * 1e-3) / (peak * 1e12)
        target = 0.4 if config.model.backbone == "resnet50" else None
        unit = "FLOP a step"
        figure(f"{name}: share of the peak (MFU)", flops, None, unit, used, target, "higher")


def main(peak_tflops: float | None = None, repeats: int = 20, quick: bool = False) -> None:
    """Measures both networks.

    Args:
      peak_tflops: of the device, in bfloat16; unset: from a table, where the device is in it.
      repeats: timed steps of each.
      quick: small batches and few repeats.
    """
    kind = jax.devices()[0].device_kind
    peak = peak_tflops or next((v for name, v in PEAKS.items() if name in kind), None)
    for name, preset, side, batch in (
        ("ResNet-18, CIFAR", "cifar10-r18-1000ep", 32, 1024),
        ("ResNet-50, ImageNet-shaped", "imagenet-r50-100ep", 256, 256),
    ):
        config = presets.get(preset).config
        config = dataclasses.replace(
            config,
            batch_size=8 if quick else batch,
            model=dataclasses.replace(config.model, dtype="bfloat16"),
        )
        measure(f"{name}, {kind}", config, side, peak, 3 if quick else repeats)
    show()


if __name__ == "__main__":
    tyro.cli(main)
