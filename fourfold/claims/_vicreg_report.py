"""The VICReg claim in words, figures and pictures; every word that judges is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from fourfold.claims import Claim, Figure, Plot

Result = Mapping[str, np.ndarray]

PAPER = (
    "Bardes, Ponce, LeCun: VICReg: Variance-Invariance-Covariance Regularization for "
    "Self-Supervised Learning, ICLR 2022"
)
INTERVAL = "lowest and highest of the seeds"
# What the paper's ResNet-50 on ImageNet reaches, linear, in per cent; else what it says in words.
_PUBLISHED: dict[str, float | str] = {
    "VICReg": 73.2,
    "SimCLR": 69.3,
    "Barlow Twins": 73.2,
    "supervised": 76.5,
    "no variance": "collapse",
    "no covariance": "57.5 with weights 1, 1, 0, against 68.6 (100 epochs)",
    "no invariance": "collapse",
}
_COLLAPSED = 0.1  # mean standard deviation of embeddings whose target is 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """How much to run: a preset, its data, and what is changed of it."""

    preset: str
    data: str
    seeds: int
    epochs: int
    size: int


def write(results: Mapping[str, Result], plan: Plan, scale: str) -> Claim:
    """Compares the methods.

    Args:
      results: method → result of `train_and_measure`, named as in `vicreg_collapse.METHODS`.
      plan: what was run.
      scale: its name.
    """
    figures = []
    for name, result in results.items():
        note = "last epoch of the linear layer" if name == "VICReg" else ""
        published = _PUBLISHED.get(name)
        figures.append(_figure(f"{name}: linear", published, 100 * result["linear"], "%", note))
        figures.append(_figure(f"{name}: 20 nearest neighbours", None, 100 * result["knn"], "%"))
    for name, result in results.items():
        if result["std"].shape[1]:
            std, rank = result["std"][:, -1], result["rankme"][:, -1]
            target = "at least 1, the hinge's target" if name == "VICReg" else None
            figures.append(_figure(f"{name}: std of the embeddings", target, std))
            figures.append(_figure(f"{name}: effective rank of the embeddings", None, rank))
    return Claim(
        name="vicreg_collapse",
        title="VICReg without each of its terms, and beside other methods",
        paper=PAPER,
        text=_text(results, plan),
        verdict=verdict(results),
        figures=tuple(figures),
        plots=(_accuracy(results), _curves(results), _spectra(results)),
        seeds=tuple(range(plan.seeds)),
        seconds=sum(float(result["seconds"]) for result in results.values()),
        scale=scale,
        interval=INTERVAL,
    )


def _figure(
    name: str, paper: float | str | None, seeds: np.ndarray, unit: str = "", note: str = ""
) -> Figure:
    ours, low, high = float(seeds.mean()), float(seeds.min()), float(seeds.max())
    return Figure(name, paper, ours, low, high, unit, note)


def verdict(results: Mapping[str, Result]) -> str:
    """Answers the paper's claims by the numbers: a difference counts where no two seeds overlap."""
    parts = []
    for first, second, what in (
        ("VICReg", "random", "VICReg learns features better than untrained ones"),
        ("VICReg", "SimCLR", "and than SimCLR's"),
        ("VICReg", "Barlow Twins", "and than Barlow Twins'"),
        ("supervised", "VICReg", "supervised ones are better still"),
        ("VICReg", "no covariance", "the covariance term improves them"),
        ("VICReg", "no invariance", "so does the invariance term"),
    ):
        if first in results and second in results:
            parts.append(f"{what}: {_compare(results[first]['linear'], results[second]['linear'])}")
    if "no variance" in results:
        std = results["no variance"]["std"][:, -1]
        answer = "yes" if std.max() < _COLLAPSED else "no"
        parts.append(
            f"without the variance term the embeddings collapse: {answer} (std {std.mean():.3f})"
        )
    if "no covariance" in results:
        ranks = [results[name]["rankme"][:, -1] for name in ("VICReg", "no covariance")]
        parts.append(
            f"without the covariance term their dimensions are redundant: {_compare(*ranks)} "
            f"(effective rank {ranks[1].mean():.0f} against {ranks[0].mean():.0f})"
        )
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _compare(better: np.ndarray, worse: np.ndarray) -> str:
    if better.min() > worse.max():
        return "yes"
    return "the opposite" if better.max() < worse.min() else "not told apart"


def _text(results: Mapping[str, Result], plan: Plan) -> str:
    steps = int(max((r["steps"].max(initial=0) for r in results.values()), default=0))
    trained = [name for name in results if name != "random"]
    paragraphs = (
        "The paper claims that two terms alone, a hinge that keeps every dimension's standard "
        "deviation up and a penalty on the covariances, keep joint embeddings from collapsing, "
        "without negatives, momentum or a stop-gradient, and that the features are as good as "
        "those of the best methods: 73.2 % of ImageNet with a linear layer on a ResNet-50.",
        f"Here each of {', '.join(trained)} trains a network from the preset `{plan.preset}` on "
        f"{plan.data} for {plan.epochs} epochs ({steps:,} updates), with views of {plan.size} "
        f"pixels, the same optimiser, learning rate and augmentations for all, and {plan.seeds} "
        "seeds. Nothing was tuned for any but VICReg. Then the backbone is frozen, and its "
        "features of the training images, not augmented, train a linear layer, whose last epoch is "
        "scored on the test images; the published figures are of augmented ones and the best "
        "epoch. `random` is the network before training. Published figures are of another data set "
        "and network: only the order of the methods can be compared.",
        "Two kinds of collapse are looked for: of all embeddings to a point, which the standard "
        "deviation shows, and of the dimensions into few that matter, which the effective rank "
        "(RankMe, of the embeddings of one batch) and the spectrum of the features show.",
    )
    return "\n\n".join(paragraphs)


def _colours(results: Mapping[str, Result]) -> dict[str, str]:
    return {name: f"C{number}" for number, name in enumerate(results)}


def _accuracy(results: Mapping[str, Result]) -> Plot:
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(8, 3.6), layout="constrained")
    axes = picture.subplots()
    for place, name in enumerate(results):
        for key, shift, colour in (("linear", -0.12, "C0"), ("knn", 0.12, "C1")):
            values = 100 * results[name][key]
            label = {"linear": "linear", "knn": "20 nearest neighbours"}[key] if not place else None
            axes.plot(np.full(len(values), place + shift), values, "o", color=colour, label=label)
    axes.set(ylabel="test accuracy, %", xticks=range(len(results)))
    axes.set_xticklabels(list(results), rotation=20)
    axes.legend(frameon=False)
    return Plot("What the features are worth", picture, "A dot is a seed.")


def _curves(results: Mapping[str, Result]) -> Plot:
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(10, 3.8), layout="constrained")
    left, right = picture.subplots(1, 2)
    for name, colour in _colours(results).items():
        result = results[name]
        for axes, key in ((left, "std"), (right, "rankme")):
            for number, values in enumerate(result[key]):
                if len(values):
                    label = None if number else name
                    axes.plot(result["steps"], values, color=colour, alpha=0.7, label=label)
    left.set(title="mean standard deviation of the embeddings", xlabel="update", yscale="log")
    right.set(title="their effective rank (RankMe)", xlabel="update", yscale="log")
    left.legend(frameon=False, fontsize=8)
    caption = "A line is a seed. Without the variance term all embeddings fall towards one point."
    return Plot("Collapse in training", picture, caption)


def _spectra(results: Mapping[str, Result]) -> Plot:
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(6.5, 3.8), layout="constrained")
    axes = picture.subplots()
    for name, colour in _colours(results).items():
        spectrum = results[name]["spectrum"].mean(axis=0)
        axes.plot(np.arange(1, len(spectrum) + 1), spectrum, color=colour, label=name)
    axes.set(yscale="log", xlabel="singular value", ylabel="fraction of the largest")
    axes.legend(frameon=False, fontsize=8)
    caption = "Of the backbone's test features, centred; mean over seeds."
    return Plot("Spectrum of the features", picture, caption)
