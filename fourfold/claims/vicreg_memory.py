"""Peak temporaries of the VICReg loss and of a contrastive loss as the batch grows."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fourfold.claims import Claim, Figure, Plot, Progress, at_scale
from fourfold.claims._vicreg_report import PAPER
from vicreg import baselines, losses

DIMS = 2048
ROWS = {
    "laptop": (256, 512, 1024, 2048, 4096, 8192, 16384),
    "gpu": (256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
    "paper": (256, 512, 1024, 2048, 4096, 8192, 16384, 32768),
}
_MIB = 2**20


def covariance_only(z_a: jax.Array, z_b: jax.Array) -> tuple[jax.Array, Any]:
    """VICReg as one writes it first: always by D×D matrices."""
    return losses.vicreg_loss(z_a, z_b, route="covariance")


LOSSES: dict[str, Callable[[jax.Array, jax.Array], Any]] = {
    "VICReg": losses.vicreg_loss,
    "VICReg, always D×D": covariance_only,
    "NT-Xent": functools.partial(baselines.nt_xent, temperature=0.2),
}


def run(scale: str, out: Path, progress: Progress) -> Claim:
    """Compiles every loss with its gradient at every batch size; nothing needs to run.

    Args:
      scale: one of `ROWS`.
      out: not used: it takes seconds.
      progress: called now and then.

    Raises:
      ValueError: the scale is unknown.
    """
    del out
    began, rows = time.monotonic(), at_scale(ROWS, scale)
    table = np.zeros((len(LOSSES), len(rows)))
    for i, (name, loss) in enumerate(LOSSES.items()):
        for j, n in enumerate(rows):
            progress((i * len(rows) + j) / table.size, f"{name}, batch {n:,}")
            table[i, j] = temporaries(loss, n, DIMS)
    figures = []
    for i, name in enumerate(LOSSES):
        for n in (rows[0], rows[-1]):
            ours = table[i, rows.index(n)]
            figures.append(Figure(f"{name}, batch {n:,}", None, ours, unit="MiB", seeds=0))
    growth = {name: exponent(rows, table[i]) for i, name in enumerate(LOSSES)}
    for name, power in growth.items():
        paper = "2: all pairs of the batch" if name == "NT-Xent" else None
        what = f"{name}: growth, as a power of the batch, at its end"
        figures.append(Figure(what, paper, power, seeds=0))
    return Claim(
        name="vicreg_memory",
        title="Memory of the VICReg loss as the batch grows",
        paper=PAPER,
        text=_text(),
        verdict=_verdict(table, growth),
        figures=tuple(figures),
        plots=(_plot(rows, table),),
        seconds=time.monotonic() - began,
        scale=scale,
    )


def temporaries(loss: Callable[[jax.Array, jax.Array], Any], n: int, d: int) -> float:
    """Returns MiB that loss and gradient need beside inputs and results, as the compiler says."""
    z = jax.ShapeDtypeStruct((n, d), jnp.float32)
    gradient = jax.jit(jax.value_and_grad(lambda a, b: loss(a, b)[0], argnums=(0, 1)))
    analysis: Any = gradient.lower(z, z).compile().memory_analysis()
    return analysis.temp_size_in_bytes / _MIB


def exponent(rows: tuple[int, ...], memory: np.ndarray) -> float:
    """Returns the slope of log memory over log batch between the two largest batches."""
    return float(np.log(memory[-1] / memory[-2]) / np.log(rows[-1] / rows[-2]))


def _verdict(table: np.ndarray, growth: dict[str, float]) -> str:
    names = list(LOSSES)
    linear = "yes" if growth["VICReg"] < 1.2 else "no"
    pairs = "yes" if growth["NT-Xent"] > 1.8 else "no"
    ratio = table[names.index("NT-Xent"), -1] / table[names.index("VICReg"), -1]
    saved = table[names.index("VICReg, always D×D"), 0] / table[0, 0]
    return (
        f"The memory of VICReg grows no faster than its batch: {linear}; that of a contrastive "
        f"loss with its square: {pairs} ({ratio:.1f} times VICReg's at the largest batch); taking "
        f"the cheaper of D×D and N×N saves {saved:.0f} times at the smallest."
    )


def _text() -> str:
    return (
        "VICReg compares dimensions and contrastive losses compare images: one has a matrix of D×D "
        "numbers at most, the other one of 2N×2N. The paper draws from this that VICReg needs no "
        "large batches and works with small ones.\n\n"
        f"Here each loss with its gradient is compiled for embeddings of {DIMS:,} dimensions in "
        "float32 on one device, and the compiler's own account of its temporaries is read; inputs "
        "and gradients are not in it. VICReg takes the N×N Gram matrix, whose norm is that of the "
        "covariance, where the batch is smaller than the embedding. NT-Xent is written plainly, "
        "without chunks."
    )


def _plot(rows: tuple[int, ...], table: np.ndarray) -> Plot:
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(6, 4), layout="constrained")
    axes = picture.subplots()
    for name, memory in zip(LOSSES, table, strict=True):
        axes.plot(rows, memory, "o-", label=name)
    axes.axvline(DIMS, color="grey", linestyle=":", label="N = D")
    axes.set(xscale="log", yscale="log", xlabel="batch", ylabel="temporaries, MiB")
    axes.legend(frameon=False)
    return Plot("Peak temporaries of loss and gradient", picture, f"D = {DIMS:,}, float32.")
