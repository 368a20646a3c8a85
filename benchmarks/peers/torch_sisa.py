"""SISA's training in PyTorch: a plain loop over shards, slices, epochs and batches.

The network, the loss, the optimiser and the order of the batches are those of `unlearn`: a
perceptron, the mean cross-entropy, SGD with Nesterov's momentum. In the loop's favour all data and
all orders are tensors on the device before it begins, and it keeps no checkpoints.

It needs PyTorch (`pip install -e '.[bench]'`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

Params = Mapping[str, Mapping[str, np.ndarray]]


def network_of(params: Params) -> nn.Sequential:
    """A perceptron with weights in Flax's layout, `{"Dense_0": {kernel (in, out), bias}, ...}`."""
    layers: list[nn.Module] = []
    for i in range(len(params)):
        kernel, bias = (params[f"Dense_{i}"][name] for name in ("kernel", "bias"))
        layer = nn.Linear(*kernel.shape)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(kernel.T))
            layer.bias.copy_(torch.tensor(bias))
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def params_of(network: nn.Sequential) -> dict[str, dict[str, np.ndarray]]:
    """The weights of a perceptron in Flax's layout."""
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    arrays = [[a.detach().cpu().numpy() for a in (m.weight.T, m.bias)] for m in layers]
    return {f"Dense_{i}": {"kernel": w, "bias": b} for i, (w, b) in enumerate(arrays)}


class Ensemble:
    """The shards' data and first weights."""

    def __init__(
        self,
        x: np.ndarray,
        y: np.ndarray,
        stages: Sequence[np.ndarray],
        params: Sequence[Params],
        lr: float,
        momentum: float,
    ) -> None:
        """Puts all on the device.

        Args:
          x: float32 `(S, n, d)`, records of each shard.
          y: `(S, n)`, their labels.
          stages: of each slice, int32 `(S, T, B)`: a batch a step, with -1 where records lack.
          params: first weights of each shard.
          lr: learning rate.
          momentum: Nesterov's.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._x, self._y = torch.tensor(x).to(device), torch.tensor(y).long().to(device)
        self._orders = [
            [
                torch.tensor(rows[rows >= 0]).long().to(device)
                for stage in stages
                for rows in stage[shard]
                if rows[0] >= 0
            ]
            for shard in range(len(x))
        ]
        self._first = [network_of(p).to(device) for p in params]
        self._options = {"lr": lr, "momentum": momentum, "nesterov": True}
        self._device = device

    def train(self, threads: int) -> list[nn.Sequential]:
        """Trains one shard after the other; returns their networks.

        Args:
          threads: of PyTorch within an operation.
        """
        torch.set_num_threads(threads)
        networks = []
        for shard, first in enumerate(self._first):
            network = copy.deepcopy(first)
            optimizer = torch.optim.SGD(network.parameters(), **self._options)
            x, y = self._x[shard], self._y[shard]
            for rows in self._orders[shard]:
                optimizer.zero_grad()
                functional.cross_entropy(network(x[rows]), y[rows]).backward()
                optimizer.step()
            networks.append(network)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return networks
