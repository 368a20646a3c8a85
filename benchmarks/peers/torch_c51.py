"""The C51 update in PyTorch on the CPU: the peer of our own update, in the layout it likes best.

The network, loss and optimiser are those of `jaxrl`: Nature CNN, `num_actions` × 51 atoms on ±10,
γ = 0.99, Adam 2.5e-4 with eps 3.125e-4, float32 throughout. Each call of what `make_update` or
`make_gradient` returns starts from the same uint8 `(B, 84, 84, 4)` batch, so the conversion to
float32 and the division by 255 are part of the time, as they are in ours.

What counts as what:
  whole update: conversion, target network forward (no graph), projection, online forward,
    cross-entropy, backward, Adam step. No target sync, no sampling.
  gradient: the same without the Adam step.

Run as a script it measures PyTorch's configurations against each other, alternating:

    python benchmarks/peers/torch_c51.py --seconds 60 --compile

Measure on idle cores: OpenMP threads that wait for each other lose far more to a busy machine than
XLA's do, which would flatter us. It needs PyTorch (`pip install -e '.[bench]'`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

NUM_ATOMS = 51
V_MIN, V_MAX = -10.0, 10.0
DISCOUNT = 0.99
Step = Callable[[], torch.Tensor]


class NatureC51(nn.Module):
    """Nature CNN with a C51 head: uint8 `(B, 84, 84, 4)` → float32 logits `(B, A, 51)`.

    Args:
      num_actions: A.
      channels_last: keep activations and kernels NHWC in memory, which is PyTorch's faster layout
        on CPUs. The input is NHWC already, and the features are then flattened as they lie, so
        this costs no transposition at all.
      spectral: wrap `fc` in `torch.nn.utils.spectral_norm` (one power iteration a forward).
    """

    def __init__(
        self, num_actions: int = 6, *, channels_last: bool = True, spectral: bool = False
    ) -> None:
        super().__init__()
        self.num_actions = num_actions
        self.channels_last = channels_last
        self.conv1 = nn.Conv2d(4, 32, 8, 4)
        self.conv2 = nn.Conv2d(32, 64, 4, 2)
        self.conv3 = nn.Conv2d(64, 64, 3, 1)
        self.fc = nn.Linear(3136, 512)
        self.head = nn.Linear(512, num_actions * NUM_ATOMS)
        for layer in self.children():
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        if spectral:
            nn.utils.spectral_norm(self.fc)
        if channels_last:
            self.to(memory_format=torch.channels_last)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """Returns logits `(B, A, 51)` of uint8 observations `(B, 84, 84, 4)`."""
        x = obs.permute(0, 3, 1, 2)
        if not self.channels_last:
            x = x.contiguous()
        x = x.float().div_(255.0)
        x = functional.relu(self.conv1(x))
        x = functional.relu(self.conv2(x))
        x = functional.relu(self.conv3(x))
        x = (x.permute(0, 2, 3, 1) if self.channels_last else x).flatten(1)
        x = functional.relu(self.fc(x))
        return self.head(x).view(-1, self.num_actions, NUM_ATOMS)


def project(
    probs: torch.Tensor, r_t: torch.Tensor, discount_t: torch.Tensor, support: torch.Tensor
) -> torch.Tensor:
    """Projects `r + γz` back onto the support (Bellemare et al. 2017, equation 7).

    Args:
      probs: probabilities of the next action's atoms, `(B, 51)`.
      r_t: rewards, `(B,)`.
      discount_t: discounts, `(B,)`.
      support: atoms, `(51,)`.
    """
    target = (r_t[:, None] + discount_t[:, None] * support).clamp_(V_MIN, V_MAX)
    position = (target - V_MIN).mul_((NUM_ATOMS - 1) / (V_MAX - V_MIN))
    # Where the position is an integer, `upper` gets nothing and `lower` gets all: no mass is lost.
    lower = position.floor().clamp_(0, NUM_ATOMS - 1)
    upper_share = position - lower
    lower = lower.long()
    upper = (lower + 1).clamp_(max=NUM_ATOMS - 1)
    projected = torch.zeros_like(probs)
    projected.scatter_add_(1, lower, probs * (1.0 - upper_share))
    return projected.scatter_add_(1, upper, probs * upper_share)


def c51_loss(
    online: nn.Module, target: nn.Module, batch: Mapping[str, torch.Tensor], support: torch.Tensor
) -> torch.Tensor:
    """Mean cross-entropy of a batch; the target network chooses and values the next action."""
    rows = torch.arange(batch["a_tm1"].shape[0])
    with torch.no_grad():
        probs = target(batch["s_t"]).softmax(-1)
        best = (probs * support).sum(-1).argmax(-1)
        projected = project(probs[rows, best], batch["r_t"], batch["discount_t"], support)
    logits = online(batch["s_tm1"])[rows, batch["a_tm1"]]
    return -(projected * logits.log_softmax(-1)).sum(-1).mean()


def random_batch(
    num_actions: int = 6, batch_size: int = 32, seed: int = 0
) -> dict[str, np.ndarray]:
    """A fixed random batch, one in eight rows terminal, for the peer and for ours alike."""
    rng = np.random.default_rng(seed)
    obs = rng.integers(0, 256, (2, batch_size, 84, 84, 4), dtype=np.uint8)
    return {
        "s_tm1": obs[0],
        "a_tm1": rng.integers(0, num_actions, batch_size, dtype=np.int32),
        "r_t": rng.integers(-1, 2, batch_size).astype(np.float32),
        "discount_t": np.where(rng.random(batch_size) < 0.125, 0.0, DISCOUNT).astype(np.float32),
        "s_t": obs[1],
    }


def _tensors(batch: Mapping[str, np.ndarray]) -> dict[str, torch.Tensor]:
    tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
    return tensors | {"a_tm1": tensors["a_tm1"].long()}


def _make(
    num_actions: int,
    batch_size: int,
    channels_last: bool,
    spectral: bool,
    compiled: bool,
    num_threads: int,
    seed: int,
) -> tuple[Step, NatureC51]:
    torch.set_num_threads(num_threads)
    torch.manual_seed(seed)
    kwargs: dict[str, Any] = {"channels_last": channels_last, "spectral": spectral}
    online = NatureC51(num_actions, **kwargs)
    target = NatureC51(num_actions, **kwargs)
    target.load_state_dict(online.state_dict())
    batch = _tensors(random_batch(num_actions, batch_size, seed))
    support = torch.from_numpy(np.linspace(V_MIN, V_MAX, NUM_ATOMS).astype(np.float32))
    loss_fn = torch.compile(c51_loss) if compiled else c51_loss

    def gradient() -> torch.Tensor:
        for parameter in online.parameters():
            parameter.grad = None
        loss = loss_fn(online, target, batch, support)
        loss.backward()
        return loss.detach()

    return gradient, online


def make_gradient(
    num_actions: int = 6,
    *,
    batch_size: int = 32,
    channels_last: bool = True,
    spectral: bool = False,
    compiled: bool = False,
    num_threads: int = 2,
    seed: int = 0,
) -> Step:
    """Returns a function that computes loss and gradient of one fixed batch, without Adam."""
    args = (num_actions, batch_size, channels_last, spectral, compiled, num_threads, seed)
    return _make(*args)[0]


def make_update(
    num_actions: int = 6,
    *,
    batch_size: int = 32,
    channels_last: bool = True,
    fused: bool = True,
    foreach: bool = False,
    spectral: bool = False,
    compiled: bool = False,
    num_threads: int = 2,
    seed: int = 0,
) -> Step:
    """Returns a function that does one whole update on one fixed batch and returns the loss.

    Args:
      num_actions: number of actions.
      batch_size: transitions a batch.
      channels_last: memory layout, see `NatureC51`.
      fused: PyTorch's fused Adam kernel.
      foreach: its multi-tensor Adam; without either it loops over the tensors.
      spectral: spectral normalisation of `fc`, online and target.
      compiled: pass the loss through `torch.compile` (needs a C++ compiler).
      num_threads: intra-op threads.
      seed: of weights and batch.
    """
    args = (num_actions, batch_size, channels_last, spectral, compiled, num_threads, seed)
    gradient, online = _make(*args)
    adam = torch.optim.Adam(
        online.parameters(),
        lr=2.5e-4,
        eps=3.125e-4,
        fused=fused,
        foreach=foreach and not fused,
    )

    def update() -> torch.Tensor:
        loss = gradient()
        adam.step()
        return loss

    return update


def _flax_to_torch(kernel: np.ndarray) -> torch.Tensor:
    """HWIO → OIHW for convolutions, (in, out) → (out, in) for dense layers."""
    return torch.from_numpy(kernel.transpose((3, 2, 0, 1) if kernel.ndim == 4 else (1, 0)).copy())


def gradient_of(
    params: Mapping[str, Mapping[str, np.ndarray]], batch: Mapping[str, np.ndarray]
) -> tuple[float, dict[str, dict[str, np.ndarray]]]:
    """Loss and gradient of given weights, to show that both sides compute the same thing.

    Args:
      params: `{layer: {kernel, bias}}` in Flax layout, float32; layers conv1 conv2 conv3 fc head.
        Online and target network are both set to it.
      batch: as from `random_batch`.

    Returns:
      The loss and the gradient, in the layout of `params`.
    """
    # channels_last flattens in (H, W, C) order, which is Flax's: fc needs no reordering.
    net = NatureC51(params["head"]["bias"].size // NUM_ATOMS, channels_last=True)
    with torch.no_grad():
        for name, layer in net.named_children():
            layer.weight.copy_(_flax_to_torch(np.asarray(params[name]["kernel"])))
            layer.bias.copy_(torch.from_numpy(np.array(params[name]["bias"])))
    support = torch.from_numpy(np.linspace(V_MIN, V_MAX, NUM_ATOMS).astype(np.float32))
    loss = c51_loss(net, net, _tensors(batch), support)
    loss.backward()
    gradient = {}
    for name, layer in net.named_children():
        kernel = layer.weight.grad.numpy()
        axes = (2, 3, 1, 0) if kernel.ndim == 4 else (1, 0)
        gradient[name] = {"kernel": kernel.transpose(axes), "bias": layer.bias.grad.numpy()}
    return loss.item(), gradient


def measure(steps: Mapping[str, Step], seconds: float) -> dict[str, list[float]]:
    """Times each step in turn, one call at a time, until `seconds` have passed in all.

    Returns:
      Milliseconds of every call, by name. Turns are short so that a busy machine is busy for all.
    """
    for step in steps.values():
        for _ in range(3):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, step in steps.items():
            step()  # an untimed call brings this configuration's weights back into the caches
            for _ in range(4):
                start = time.perf_counter()
                step()
                times[name].append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    """Measures PyTorch's configurations against each other and prints one JSON line for each."""
    parser = argparse.ArgumentParser(description="PyTorch C51 update, batch 32, on this CPU")
    parser.add_argument("--seconds", type=float, default=30.0, help="seconds of timing in all")
    parser.add_argument("--threads", type=int, default=2, help="intra-op threads")
    parser.add_argument("--compile", action="store_true", help="try torch.compile as well")
    parser.add_argument("--flush-denormals", action="store_true", help="as XLA does")
    args = parser.parse_args()
    if args.flush_denormals:
        torch.set_flush_denormal(True)
    n = {"num_threads": args.threads}
    steps = {
        "gradient, contiguous": make_gradient(channels_last=False, **n),
        "gradient, channels_last": make_gradient(**n),
        "update, contiguous, fused": make_update(channels_last=False, **n),
        "update, channels_last, loop": make_update(fused=False, **n),
        "update, channels_last, foreach": make_update(fused=False, foreach=True, **n),
        "update, channels_last, fused": make_update(**n),
        "update, channels_last, fused, SN": make_update(spectral=True, **n),
    }
    if args.compile:
        steps["gradient, channels_last, compiled"] = make_gradient(compiled=True, **n)
        steps["update, channels_last, fused, compiled"] = make_update(compiled=True, **n)
    for name, times in measure(steps, args.seconds).items():
        line = {
            "name": f"torch C51 {name}",
            "median_ms": round(statistics.median(times), 2),
            "best_ms": round(min(times), 2),
            "calls": len(times),
            "threads": args.threads,
            "load": round(os.getloadavg()[0], 1),
            "torch": torch.__version__,
        }
        print(json.dumps(line))


if __name__ == "__main__":
    main()
