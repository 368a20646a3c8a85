"""Pictures of the unlearning claim."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fourfold.claims import Plot
from fourfold.claims._unlearn_ensemble import Plan

Result = Mapping[str, np.ndarray]


def accuracy(result: Result, plan: Plan) -> Plot:
    """Accuracy against S and against R."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(10, 3.8), layout="constrained")
    left, right = picture.subplots(1, 2, sharey=True)
    for name, label in (
        ("mean", "mean of probabilities"),
        ("vote", "votes"),
        ("fraction", "one network alone, on 1/S"),
    ):
        values = 100 * result[name][:, 0]
        (line,) = left.plot(plan.shards, values.mean(axis=-1), "o-", label=label)
        low, high = values.min(axis=-1), values.max(axis=-1)
        left.fill_between(plan.shards, low, high, color=line.get_color(), alpha=0.2)
    left.axhline(100 * result["mean"][0, 0].mean(), color="grey", ls=":", label="one network, all")
    left.set(xlabel="shards, S (one slice)", ylabel="test accuracy, %", xticks=plan.shards)
    left.legend(frameon=False)
    for i, shards in enumerate(plan.shards):
        values = 100 * result["mean"][i].mean(axis=-1)
        right.plot(plan.slices, values, "o-", label=f"S = {shards}")
    right.set(xlabel="slices, R (mean of probabilities)", xscale="log", xticks=plan.slices)
    right.set_xticklabels([str(slices) for slices in plan.slices])
    right.minorticks_off()
    right.legend(frameon=False)
    caption = "Lines are means over the seeds, bands reach from the lowest to the highest."
    return Plot("Accuracy against shards and slices", picture, caption)


def cost(result: Result, plan: Plan) -> Plot:
    """Speed-up of deletions against S, and against K at the largest S."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(10, 3.8), layout="constrained")
    left, right = picture.subplots(1, 2)
    middle = min(1, len(plan.requests) - 1)
    for j, slices in enumerate(plan.slices):
        for axes, at, x, whole in (
            (left, (slice(None), j, middle), plan.shards, result["whole"][middle]),
            (right, (-1, j), plan.requests, result["whole"]),
        ):
            expected, visits = result["expected"][at], result["visits"][at].mean(axis=-1)
            axes.plot(x, whole / expected, color=f"C{j}", label=f"R = {slices}: formula")
            axes.plot(x, whole / visits, "o", color=f"C{j}", label="measured")
    left.plot(
        plan.shards,
        result["whole"][middle] / result["paper"][:, middle],
        "k--",
        label="the paper's formula, R = 1",
    )
    left.set(title=f"{plan.requests[middle]} records at once", xlabel="shards, S")
    right.set(
        title=f"S = {plan.shards[-1]}", xlabel="records at once, K", yscale="log", ylim=(0.9, 40)
    )
    if plan.shards[-1] == 20:
        for requests, value, name, side in (
            (8, 4.63, "Purchase", "left"),
            (18, 2.45, "SVHN", "right"),
        ):
            right.plot(requests, value, "k*", ms=10)
            right.annotate(
                f"paper, {name}", (requests, value), (0, 9), textcoords="offset points", ha=side
            )
    left.set(ylabel="times fewer visits than one network anew", xticks=plan.shards)
    right.set(xticks=plan.requests)
    ticks = [1, 2, 3, 5, 10, 20, 30]
    right.set_yticks(ticks, [str(tick) for tick in ticks])
    right.minorticks_off()
    left.legend(frameon=False, fontsize=8)
    caption = "A visit is one record in one epoch of one network. The paper's stars are of seconds."
    return Plot("What a deletion saves", picture, caption)


def attack(result: Result, names: tuple[str, ...], indicators: list[float]) -> Plot:
    """Differences of accuracy, and indicators."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(8, 3.6), layout="constrained")
    axes = picture.subplots()
    gaps = 100 * (result["others"] - result["attacked"])
    axes.boxplot(list(gaps), orientation="horizontal", widths=0.5)
    axes.axvline(0, color="grey", ls=":")
    axes.set_yticks(
        range(1, len(names) + 1),
        [f"{name}\nindicator {value:.2f}" for name, value in zip(names, indicators, strict=True)],
    )
    axes.invert_yaxis()
    axes.set(xlabel="accuracy of the other half of the networks less that of the attacked, points")
    caption = (
        "Each trial deletes records and compares the halves on the test set. The indicator is the "
        "share of trials right of 0; networks of fresh shards would have 0.5."
    )
    return Plot("The attack on the assignment to shards", picture, caption)


def removal(result: Result) -> Plot:
    """Bound and true norm of the gradient over removals."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(8, 3.8), layout="constrained")
    axes = picture.subplots()
    x = np.arange(1, result["bound"].shape[1] + 1)
    for seed, (bound, true) in enumerate(zip(result["bound"], result["true"], strict=True)):
        axes.plot(x, bound, color="C0", alpha=0.8, label=None if seed else "bound, summed up")
        axes.plot(x, true, color="C1", alpha=0.8, label=None if seed else "true norm")
    axes.axhline(float(result["budget"]), color="k", ls="--", label="budget")
    axes.set(xlabel="records removed", ylabel="norm of the gradient", yscale="log")
    axes.legend(frameon=False)
    caption = "A line is a seed. Where the bound would pass the budget, the model is trained anew."
    return Plot("What certified removal leaves", picture, caption)
