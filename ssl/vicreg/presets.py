"""Named configurations, each with its command, its run time and what to expect.

A preset is where the command line starts from: every option may still be changed, as in
`vicreg pretrain --preset cifar10-r18-1000ep --epochs 200 --data-dir DIR`.
"""

from __future__ import annotations

import dataclasses

from vicreg.augment import views
from vicreg.config import (
    AugmentConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    ProbeConfig,
    ViewConfig,
)

_IMAGENET = PretrainConfig(
    data=DataConfig(name="imagenet2012", test_split="validation", canvas=512)
)
_CIFAR10 = PretrainConfig(
    data=DataConfig(name="cifar10"),
    augment=AugmentConfig(
        32, *views("cifar"), mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    ),
    loss=LossConfig(variant="paper"),
    model=ModelConfig("resnet18", stem="cifar", expander=(2048, 2048, 2048)),
    optim=OptimConfig(
        base_lr=0.3, end_scale=0.0, weight_decay=1e-4, trust_coefficient=0.02, clip=True
    ),
    epochs=1000,
    batch_size=256,
)
# Digits have no colours, and a mirrored one is another sign.
_DIGIT = ViewConfig(area=(0.3, 1.0), flip=0.0, gray=0.0, blur_sigma=(0.1, 1.0), solarize=0.0)
_DIGITS = PretrainConfig(
    augment=AugmentConfig(28, _DIGIT, _DIGIT, mean=(0.1307,), std=(0.3081,)),
    model=ModelConfig("convnet", width=16, expander=(256, 256, 256)),
    optim=OptimConfig(
        base_lr=0.2, warmup_epochs=2, weight_decay=1e-4, trust_coefficient=0.02, clip=True
    ),
    # The authors' learning rate is for features of ImageNet; a smaller network needs a larger one.
    evaluation=ProbeConfig(epochs=50, batch_size=64, lr=1.0, semi_epochs=100),
    epochs=40,
    batch_size=256,
    log_every=10,
    checkpoint_every=5,
)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A configuration and what is known of it.

    Attributes:
      config: the configuration.
      run_time: on hardware on which it was measured, or that none was.
      expect: published or measured score, with its source.
    """

    config: PretrainConfig
    run_time: str
    expect: str

    def command(self, name: str) -> str:
        """Returns the command that runs it under its name."""
        return f"vicreg pretrain --preset {name}"


def presets() -> dict[str, Preset]:
    """Returns all presets by name.

    >>> presets()["imagenet-r50-1000ep"].config.model.expander
    (8192, 8192, 8192)
    """
    unmeasured = "not yet measured; for an accelerator"
    imagenet_100 = dataclasses.replace(
        _IMAGENET, epochs=100, optim=dataclasses.replace(_IMAGENET.optim, base_lr=0.3)
    )
    mnist = dataclasses.replace(
        _DIGITS, data=DataConfig(name="mnist"), epochs=5, validate_every=1, checkpoint_every=1
    )
    mnist = dataclasses.replace(mnist, optim=dataclasses.replace(mnist.optim, warmup_epochs=0.5))
    return {
        "imagenet-r50-1000ep": Preset(
            _IMAGENET, unmeasured, "paper: 73.2 % top-1, 91.1 % top-5, linear"
        ),
        "imagenet-r50-100ep": Preset(imagenet_100, unmeasured, "paper: 68.6 % top-1, linear"),
        "cifar10-r18-1000ep": Preset(
            _CIFAR10, unmeasured, "solo-learn: 92.07 % top-1, online linear probe"
        ),
        "mnist-small": Preset(
            mnist,
            "3½ minutes on 2 CPU cores",
            "measured, one seed, without augmentation: 97.0 % linear, 96.9 % 20-NN",
        ),
        "digits-laptop": Preset(
            _DIGITS,
            "1½ minutes on 2 CPU cores",
            "measured, one seed, without augmentation: 94.5 % linear, 90.4 % 20-NN",
        ),
    }


def get(name: str) -> Preset:
    """Returns a preset.

    Raises:
      ValueError: an unknown name; the message lists those there are.
    """
    found = presets()
    if name not in found:
        raise ValueError(f"unknown preset {name!r}; allowed: {', '.join(found)}")
    return found[name]
