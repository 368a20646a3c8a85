"""A VICReg step in PyTorch on the CPU: torchvision's augmentations, lightly's loss and LARS.

The networks are those of `vicreg`: the small ConvNet on 28×28×1, and a ResNet-18 of width 16 with
the CIFAR stem on 32×32×3 (torchvision's blocks), channels last. A step takes uint8 images as PIL
images through two views each, in a DataLoader, and updates the parameters.

It needs PyTorch, torchvision and lightly (`pip install -e '.[bench]'`).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from lightly.loss import VICRegLoss
from lightly.utils.lars import LARS
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.models.resnet import BasicBlock, ResNet


class SmallResNet(ResNet):
    """torchvision's ResNet-18 with 16 channels to start with and the CIFAR stem; 128 features."""

    def __init__(self) -> None:
        super().__init__(BasicBlock, [2, 2, 2, 2])
        self.inplanes = 16
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.maxpool = nn.Identity()
        for i in range(4):
            layer = self._make_layer(BasicBlock, 16 * 2**i, 2, stride=1 if i == 0 else 2)
            setattr(self, f"layer{i + 1}", layer)
        self.fc = nn.Identity()


def conv_net() -> nn.Module:
    """Three strided convolutions with BatchNorm; 64 features."""
    layers: list[nn.Module] = []
    for before, after in ((1, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def expander(features: int, widths: tuple[int, ...]) -> nn.Module:
    """VICReg's expander."""
    layers: list[nn.Module] = []
    for width in widths[:-1]:
        layers += [nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU()]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, widths[-1], bias=False))


class Views(Dataset):
    """Two views of each image, endlessly often."""

    def __init__(self, images: np.ndarray, transform: Callable, length: int) -> None:
        self.images, self.transform, self.length = images, transform, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = self.images[index % len(self.images)]
        image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
        return self.transform(image), self.transform(image)


def transform(channels: int, size: int) -> Callable:
    """The views of our presets `digits-laptop` and `cifar10-r18-1000ep`."""
    bicubic = transforms.InterpolationMode.BICUBIC
    area = (0.3, 1.0) if channels == 1 else (0.2, 1.0)
    steps: list[Callable] = [transforms.RandomResizedCrop(size, area, interpolation=bicubic)]
    if channels == 1:
        blur = transforms.GaussianBlur(5, (0.1, 1.0))
        steps += [
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4)], 0.8),
            transforms.RandomApply([blur], 0.5),
        ]
    else:
        steps += [
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            transforms.RandomGrayscale(0.2),
            transforms.RandomSolarize(128, 0.1),
        ]
    half = (0.5,) * channels
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(half, half)])


def make_step(
    images: np.ndarray, batch_size: int, widths: tuple[int, ...], workers: int
) -> Callable[[], float]:
    """Returns a step from images to updated parameters, without arguments.

    Args:
      images: uint8 `(N, H, W, C)`; one channel for the ConvNet, three for the ResNet.
      batch_size: images per step.
      widths: of the expander.
      workers: processes that augment; 0 for this one.
    """
    channels, size = images.shape[-1], images.shape[1]
    backbone, features = (conv_net(), 64) if channels == 1 else (SmallResNet(), 128)
    backbone = backbone.to(memory_format=torch.channels_last)
    network = nn.Sequential(backbone, expander(features, widths)).train()
    loss_of, optimizer = VICRegLoss(), LARS(network.parameters(), lr=0.1, weight_decay=1e-6)
    views = Views(images, transform(channels, size), 10**9)
    batches = iter(DataLoader(views, batch_size, num_workers=workers, drop_last=True))

    def step() -> float:
        a, b = (x.contiguous(memory_format=torch.channels_last) for x in next(batches))
        loss = loss_of(network(a), network(b))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
