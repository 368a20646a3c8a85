"""The unlearning claim in words, figures and pictures; every word that judges is computed."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fourfold.claims import Claim, Figure
from fourfold.claims import _unlearn_plots as plots
from fourfold.claims._unlearn_ensemble import Plan
from unlearn.adaptive import SignTest, sign_test

Result = Mapping[str, np.ndarray]

PAPER = (
    "Bourtoule et al.: Machine Unlearning, IEEE S&P 2021; Gupta et al.: Adaptive Machine "
    "Unlearning, NeurIPS 2021; Guo et al.: Certified Data Removal from Machine Learning Models, "
    "ICML 2020"
)
INTERVAL = "lowest and highest of the seeds"
_SPEED_UPS = {8: (4.63, "Purchase"), 18: (2.45, "SVHN")}  # S = 20, R = 50
_LEVEL = 0.01  # of a sign test
_POINTS = 2.0  # that the paper's simple tasks lose at most


def write(results: Mapping[str, Result], plan: Plan, scale: str) -> Claim:
    """Writes the claim.

    Args:
      results: part to its result, named as in `unlearn_sisa.PARTS`.
      plan: what was run.
      scale: its name.
    """
    names = attack_names(plan)
    indicators = [test.indicator for test in tests(results["attack"])]
    return Claim(
        name="unlearn_sisa",
        title="Sharded unlearning: what it costs, that it is exact, and what breaks it",
        paper=PAPER,
        text=_text(results, plan),
        verdict=verdict(results, plan),
        figures=(*_accuracies(results["accuracy"], plan), *_costs(results, plan))
        + (*_attacks(results["attack"], plan), *_removals(results["removal"])),
        plots=(
            plots.accuracy(results["accuracy"], plan),
            plots.cost(results["cost"], plan),
            plots.attack(results["attack"], names, indicators),
            plots.removal(results["removal"]),
        ),
        seeds=tuple(range(plan.seeds)),
        seconds=sum(float(result["seconds"]) for result in results.values()),
        scale=scale,
        interval=INTERVAL,
    )


def verdict(results: Mapping[str, Result], plan: Plan) -> str:
    """Answers the papers' claims by the numbers."""
    accuracy, exact = results["accuracy"], results["exactness"]
    single, many, part = (
        100 * accuracy[name][place, 0]
        for name, place in (("mean", 0), ("mean", -1), ("fraction", -1))
    )
    lost = float(single.mean() - many.mean())
    attacked, control, *private = tests(results["attack"])
    accuracies = results["attack"]["accuracy"]
    removal = results["removal"]
    equal = int(exact["equal"].sum())
    untouched = not np.any(exact["changed"] & ~exact["affected"])
    parts = (
        f"{plan.shards[-1]} shards lose under {_POINTS:g} points of accuracy: "
        f"{_yes(lost < _POINTS)} ({lost:.1f})",
        f"together they are better than one network on as small a part: "
        f"{_yes(many.min() > part.max())}",
        f"the visits that deletions take are those of the exact formula: "
        f"{_yes(deviation(results['cost']) < 4)} "
        f"(at most {deviation(results['cost']):.1f} standard errors away)",
        f"after deletions every network is bit for bit the one trained on the survivors: "
        f"{_yes(bool(exact['equal'].all()))} ({equal} of {exact['equal'].size}), and none changes "
        f"but those that held a deleted record: {_yes(untouched)}",
        f"requests that depend on what SISA published break it: "
        f"{_yes(attacked.p_value < _LEVEL)} (indicator {attacked.indicator:.2f}, "
        f"p = {attacked.p_value:.2g}), as many at random do: {_yes(control.p_value < _LEVEL)} "
        f"({control.indicator:.2f}, p = {control.p_value:.2g})",
        *(
            f"noise of {noise:g} in training hides it from as many trials: "
            f"{_yes(test.p_value >= _LEVEL)} ({test.indicator:.2f}, p = {test.p_value:.2g}), "
            f"at {100 * right.mean():.0f} % accuracy before the deletion"
            for noise, test, right in zip(plan.noise, private, accuracies[2:], strict=True)
        ),
        f"no gradient left by a certified removal is above its bound: "
        f"{_yes(bool(np.all(removal['true'] <= removal['bound'])))}",
    )
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def attack_names(plan: Plan) -> tuple[str, ...]:
    """What `attack` repeats, in its order."""
    defended = (f"private with noise {noise:g}, attacked" for noise in plan.noise)
    return ("SISA, attacked", "SISA, as many requests at random", *defended)


def tests(attack: Result) -> list[SignTest]:
    """A sign test for each of `attack_names`."""
    return [sign_test(a, b) for a, b in zip(attack["attacked"], attack["others"], strict=True)]


def deviation(cost: Result) -> float:
    """Most standard errors between measured visits and their expectation, over all S, R and K.

    Less than 0.1 % counts as none: where it takes a rare chance, the error is not known.
    """
    visits = cost["visits"]
    gap = np.abs(visits.mean(axis=-1) - cost["expected"])
    error = np.maximum(cost["spread"], 1e-6 * cost["expected"]) / np.sqrt(visits.shape[-1])
    return float(np.max(np.where(gap <= 1e-3 * cost["expected"], 0.0, gap / error)))


def until_retrained(removal: Result) -> np.ndarray:
    """Removals before the budget was first used up, or all there were; `(seeds,)`."""
    retrained = removal["retrained"].astype(bool)
    return np.where(retrained.any(axis=1), retrained.argmax(axis=1), retrained.shape[1])


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _seeds(
    name: str, paper: float | str | None, values: np.ndarray, unit: str = "", note: str = ""
) -> Figure:
    low, ours, high = float(values.min()), float(values.mean()), float(values.max())
    return Figure(name, paper, ours, low, high, unit, note)


def _accuracies(accuracy: Result, plan: Plan) -> list[Figure]:
    figures = [_seeds("one network on all records", None, 100 * accuracy["mean"][0, 0], "%")]
    for i, shards in enumerate(plan.shards[1:], 1):
        paper = "under 2 points less on simple tasks" if shards == 20 else None
        for name, words, published in (
            ("mean", "mean of probabilities", paper),
            ("vote", "votes", paper),
            ("fraction", "one network alone, on 1/S of the records", None),
        ):
            values = 100 * accuracy[name][i, 0]
            figures.append(_seeds(f"S = {shards}: {words}", published, values, "%", "R = 1"))
    return figures


def _costs(results: Mapping[str, Result], plan: Plan) -> list[Figure]:
    cost, exact, figures = results["cost"], results["exactness"], []
    for k, requests in enumerate(plan.requests):
        paper, name = _SPEED_UPS.get(requests, (None, ""))
        ours = cost["whole"][k] / cost["visits"][-1, -1, k].mean()
        theory = cost["whole"][k] / cost["expected"][-1, -1, k]
        updates = cost["whole_updates"][k] / cost["updates"][-1, -1, k].mean()
        note = (
            f"S = {plan.shards[-1]}, R = {plan.slices[-1]}, visits, {plan.draws} draws; by the "
            f"formula {theory:.2f}; in updates of {plan.batch_size}, {updates:.2f}"
        )
        note += f"; the paper's is of {name}, in seconds" if name else ""
        figures.append(
            Figure(f"speed-up, {requests} at once", paper, float(ours), unit="×", note=note)
        )
    forget, everything, one = (float(np.median(exact[name])) for name in ("forget", "all", "one"))
    note = (
        f"S = {plan.shards[-1]}, R = {plan.slices[len(plan.slices) // 2]}, medians, compiled before"
    )
    for name, seconds in (("all shards", everything), ("one network", one)):
        full = f"{note}: {1000 * forget:.0f} against {1000 * seconds:.0f} ms"
        figures.append(
            Figure(f"one deletion against {name} anew", None, seconds / forget, unit="×", note=full)
        )
    count = f"{int(exact['equal'].sum())} of {exact['equal'].size}"
    note = f"SHA-256 of all training state; {int(exact['affected'].sum())} were trained again"
    return [
        *figures,
        Figure("networks equal to training on the survivors", "all", count, note=note),
    ]


def _attacks(attack: Result, plan: Plan) -> list[Figure]:
    figures = []
    most_noise = "0.53 to 0.55 with the most noise"
    papers = ("0.86 to 0.99", "0.5 expected", *(most_noise for _ in plan.noise))
    for row, (name, paper, test) in enumerate(
        zip(attack_names(plan), papers, tests(attack), strict=True)
    ):
        note = (
            f"{plan.trials} trials, S = {plan.attack_shards}; p = {test.p_value:.2g}; "
            f"{100 * attack['share'][row].mean():.0f} % of the records deleted"
        )
        figures.append(Figure(f"indicator: {name}", paper, test.indicator, note=note))
    note = "mean of probabilities, before deletions; the paper's is with the most noise"
    for noise, accuracy in zip(plan.noise, attack["accuracy"][2:], strict=True):
        lost, name = 100 * (attack["accuracy"][0] - accuracy).mean(), f"lost to noise {noise:g}"
        figures.append(
            Figure(f"accuracy {name}", "1.4 to 10", float(lost), unit="points", note=note)
        )
    return figures


def _removals(removal: Result) -> list[Figure]:
    speed = removal["fits"] / np.median(removal["step_seconds"], axis=1)
    done = removal["bound"].shape[1]
    return [
        _seeds("3 against 8: before removals", None, 100 * removal["before"], "%"),
        _seeds(f"after {done} removals", None, 100 * removal["after"], "%"),
        _seeds("trained anew, same noise", None, 100 * removal["anew"], "%"),
        _seeds("trained anew, no noise", None, 100 * removal["plain"], "%"),
        _seeds("removals until the budget was used up", None, until_retrained(removal)),
        _seeds("one removal against training anew", "over 250 (LSUN)", speed, "×"),
    ]


def _text(results: Mapping[str, Result], plan: Plan) -> str:
    attack, removal = results["attack"], results["removal"]
    noises = " or ".join(f"{noise:g}" for noise in plan.noise)
    epsilons = " or ".join(f"{epsilon:.2g}" for epsilon in attack["epsilon"])
    promise = "nothing" if attack["vacuous"].all() else "something"
    paragraphs = (
        "SISA deals records to S shards with a network each, and trains it slice by slice, R of "
        "them, with a checkpoint before each. To delete a record, its shard alone is trained "
        "again, from the checkpoint before its slice. The paper reports 4.63 (Purchase) and 2.45 "
        "(SVHN) times less time than training one network anew, with S = 20 and R = 50, for 8 and "
        "18 requests at once, for under 2 points of accuracy.",
        f"Here networks of {plan.hidden} hidden units learn {plan.data}, e0 = {plan.epochs}. A "
        "cost is counted in visits, one record in one epoch of one network, over deletions of "
        "random records that are planned as they would be served; it is compared with the exact "
        "expectation. Seconds are measured too: this small a network leaves much of them to what "
        "is not training. Exactness is not a matter of accuracy: after each of a sequence of "
        "deletions, all shards are trained from nothing on the survivors, and their hashes, "
        "momentum and counters included, compared.",
        "All that holds for requests made blindly. Gupta et al. ask for the records of which a "
        "network of the first half is the most confident, so that this half is left with fewer "
        f"records. The indicator is the share of {plan.trials} trials in which it then is less "
        "accurate than the other half; if deletions left no trace, it would be 0.5. The defence is "
        f"DP-SGD in every shard, on all its records at once, {plan.updates} updates with noise of "
        f"{noises} times the clipping norm; its networks are trained anew with fresh noise. All "
        f"that is published is then (ε, 1e-5)-differentially private in the assignment, with ε of "
        f"{epsilons}; the bound of `unlearn.privacy` then guarantees {promise} for requests that "
        "depend on it. Noisy votes are in the library and not in this claim.",
        "Certified removal is for convex losses: logistic regression of the classes 3 and 8 on "
        f"{int(removal['records'])} records, λ = 0.01, σ = 0.3, ε = 1, δ = 1e-4, one Newton step "
        "a record, and training anew where the sum of bounds on what the steps leave would pass "
        "the budget. The figure of speed is of steps without it.",
    )
    return "\n\n".join(paragraphs)
