"""Noise that hides which shard a record is in, its price, and the guarantee that it buys.

Gupta et al., Adaptive Machine Unlearning (NeurIPS 2021): a guarantee for requests that are made
blindly holds, weakened, for those that depend on what was published, if all of that is
differentially private in the assignment of records to shards. Two assignments are neighbours where
one record is in another shard: one shard's training loses the record and another's gains it.
What isn't listed must not be published at all: sizes of shards, which of them were retrained, how
long it took, or a network trained without noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax

Loss = Callable[[Any, jax.Array, jax.Array], jax.Array]


def noisy_gradient(
    loss_of_one: Loss,
    params: Any,
    x: jax.Array,
    y: jax.Array,
    mask: jax.Array,
    key: jax.Array,
    clip_norm: float,
    noise_multiplier: float,
) -> Any:
    """DP-SGD's gradient for a batch of one shard (Abadi et al. 2016, Algorithm 1), by jax-privacy.

    (Σ clip(g_i) + N(0, (σ C)² I)) / B. The denominator is the width of the batch, however many
    records are in it, for their number tells of the shard. So an empty batch has a gradient too, of
    noise alone: to skip its update would tell as much. Works under `jit`, and under `vmap` over
    shards with a key each.

    Args:
      loss_of_one: loss `()` of params and one record, `x[i]` and `y[i]`.
      params: tree of float arrays.
      x: `(B, ...)`.
      y: `(B, ...)`.
      mask: bool `(B,)`, which rows are records. The others add nothing, even where they are NaN.
      key: fresh for each shard and update; whoever knows it can take the noise off again.
      clip_norm: C, above 0, most L2 norm of one record's gradient over all of params. What of it
        is not finite counts as 0.
      noise_multiplier: σ, at least 0.

    Returns:
      Tree like params.

    Raises:
      ImportError: jax-privacy is not installed.
      ValueError: a shape or number is out of range.
    """
    if mask.ndim != 1 or not x.shape[:1] == y.shape[:1] == mask.shape:
        raise ValueError(
            "x, y and mask must be (B, ...), (B, ...) and (B,), found "
            f"{x.shape}, {y.shape} and {mask.shape}"
        )
    if not clip_norm > 0 or not noise_multiplier >= 0:
        raise ValueError(
            "clip_norm must be above 0 and noise_multiplier at least 0, found "
            f"{clip_norm} and {noise_multiplier}"
        )
    try:
        import jax_privacy
    except ImportError as error:
        raise ImportError("noise needs jax-privacy: pip install 'fourfold[unlearn]'") from error
    gradient = jax_privacy.clipped_grad(
        loss_of_one,
        l2_clip_norm=clip_norm,
        normalize_by=x.shape[0],
        batch_argnums=(1, 2),
        keep_batch_dim=False,
    )
    # Of a sum that one record joins or leaves.
    stddev = noise_multiplier * gradient.sensitivity()
    noise = jax_privacy.noise_addition.gaussian_privatizer(stddev=stddev, prng_key=key)
    clipped = gradient(params, x, y, is_padding_example=~mask)
    return noise.update(clipped, noise.init(params))[0]


@dataclass(frozen=True)
class Training:
    """Networks of all shards, trained by `noisy_gradient` and published.

    Attributes:
      noise_multiplier: σ.
      epochs: passes of one training in all; with slices 2 R / (R + 1) · e0.
      batches: updates of an epoch, a number that doesn't depend on the shard's size.
      sampler: how batches come about, which is as much a part of privacy as the noise:
        "poisson": in each update, a coin of its own decides whether a record takes part, with
          probability 1 / batches. None may be left out where the batch has no room.
        "own_batch": in each epoch, a record takes part once, in a batch of its own choice, such as
          by a hash, whoever else is there. Nothing is claimed for the choice being secret.
        "shuffled": as in `partition.batches`, a random order is cut into batches, here padded with
          empty ones. A record that joins moves all those after it by a place, so that every batch
          may gain one record and lose another: twice the sensitivity in every update. No accountant
          of Poisson batches is right for these.
      times: trainings of one shard, each retraining included; of that shard which has most.
    """

    noise_multiplier: float
    epochs: int
    batches: int
    sampler: Literal["poisson", "own_batch", "shuffled"]
    times: int = 1

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        if not self.noise_multiplier >= 0:
            raise ValueError(f"noise_multiplier must be at least 0, found {self.noise_multiplier}")
        for name in ("epochs", "batches", "times"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if self.sampler not in ("poisson", "own_batch", "shuffled"):
            raise ValueError(
                f"sampler must be 'poisson', 'own_batch' or 'shuffled', found {self.sampler!r}"
            )


@dataclass(frozen=True)
class Votes:
    """Answers of `adaptive.noisy_vote`, of networks that aren't published themselves.

    Of networks that are, as `Training`, votes cost nothing more.

    Attributes:
      epsilon: ε of one answer.
      count: answers, ever.
    """

    epsilon: float
    count: int

    def __post_init__(self) -> None:
        """Raises ValueError where a number is out of range."""
        if not self.epsilon > 0 or self.count < 0:
            raise ValueError(
                "epsilon must be above 0 and count at least 0, found "
                f"{self.epsilon} and {self.count}"
            )


def total_epsilon(published: Sequence[Training | Votes], delta: float) -> float:
    """Returns ε such that all that was published is (ε, δ)-differentially private.

    A moved record takes part in the trainings of two shards; those of the others are the same.
    Rényi divergences add up, and those of dp-accounting bound both the loss and the gain of a
    record (Mironov et al. 2019). Its accountant of privacy loss distributions is tighter, but for
    two losses or two gains, where a move is one of each. Votes are ε-DP, so ε² / 2-zCDP (Bun and
    Steinke 2016); plain addition is taken where it is less.

    Args:
      published: everything, ever.
      delta: δ, in [0, 1); with 0, trainings have infinite ε.

    Raises:
      ImportError: dp-accounting is not installed.
      ValueError: delta is out of range.

    >>> total_epsilon([Votes(0.25, 8)], delta=0)
    2.0
    """
    if not 0 <= delta < 1:
        raise ValueError(f"delta must be in [0, 1), found {delta}")
    trainings = [item for item in published if isinstance(item, Training)]
    votes = [item for item in published if isinstance(item, Votes)]
    plain = math.fsum(item.epsilon * item.count for item in votes)
    if delta == 0:
        return math.inf if trainings else plain
    composed = _renyi_epsilon(published, delta)
    return min(composed, plain + (_renyi_epsilon(trainings, delta) if trainings else 0.0))


def _renyi_epsilon(published: Sequence[Training | Votes], delta: float) -> float:
    try:
        import dp_accounting
    except ImportError as error:
        message = "accounting needs dp-accounting: pip install 'fourfold[unlearn]'"
        raise ImportError(message) from error
    accountant = dp_accounting.rdp.RdpAccountant()  # a record is added or removed
    for item in published:
        if isinstance(item, Votes):
            accountant.compose(dp_accounting.ZCDpEvent(rho=item.epsilon**2 / 2), item.count)
            continue
        sigma, updates = item.noise_multiplier, item.epochs * item.batches
        if item.sampler == "poisson":
            event = dp_accounting.PoissonSampledDpEvent(
                1 / item.batches, dp_accounting.GaussianDpEvent(sigma)
            )
        elif item.sampler == "own_batch":
            event, updates = dp_accounting.GaussianDpEvent(sigma), item.epochs
        else:
            event = dp_accounting.GaussianDpEvent(sigma / 2)
        accountant.compose(event, 2 * item.times * updates)  # in two shards
    return float(accountant.get_epsilon(delta))


def max_information(epsilon: float, records: int, slack: float) -> float:
    """Bounds what ε-DP outputs tell of n independent coins: ε² n / 2 + ε √(n ln(2 / δ') / 2).

    Dwork et al. 2015 (arXiv 1506.02629), in nats; the paper's has a factor log2(e), for bits. Coins
    and outputs together are in any event at most e^bound times as probable, plus δ', as if they
    were independent. For δ = 0 alone.

    Args:
      epsilon: ε of everything that was published.
      records: n, each of which has a coin, its shard.
      slack: δ', in (0, 1).

    Raises:
      ValueError: a number out of range.

    >>> round(max_information(0.0019, 60_000, 1e-3), 3)
    1.016
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon must be at least 0, found {epsilon}")
    return epsilon**2 * records / 2 + epsilon * _deviation(records, slack)


def largest_epsilon(information: float, records: int, slack: float) -> float:
    """Inverts `max_information`: the largest total ε for which it is `information` nats.

    >>> round(largest_epsilon(1.0, 60_000, 1e-3), 5), round(largest_epsilon(1.0, 60_000, 1e-6), 5)
    (0.00187, 0.00142)
    """
    if not information >= 0:
        raise ValueError(f"information must be at least 0, found {information}")
    deviation = _deviation(records, slack)
    # The root of n/2 ε² + deviation ε - information, in a form without cancellation.
    return 2 * information / (deviation + math.sqrt(deviation**2 + 2 * records * information))


def _deviation(records: int, slack: float) -> float:
    if records < 1 or not 0 < slack < 1:
        raise ValueError(
            f"records must be at least 1 and slack in (0, 1), found {records} and {slack}"
        )
    return math.sqrt(records * math.log(2 / slack) / 2)


@dataclass(frozen=True)
class Guarantee:
    """For any way to choose requests after what was published, with probability 1 - γ over it.

    Pr[unlearned ∈ E] ≤ e^α Pr[retrained ∈ E] + β for all events E.

    Attributes:
      alpha: α', infinite where there is no bound.
      beta: β', at most 1.
      gamma: γ', at most 1.
      vacuous: whether it says nothing that is of use.
      why: the criteria that make it vacuous, or that it met, in a sentence.
    """

    alpha: float
    beta: float
    gamma: float
    vacuous: bool
    why: str


def guarantee(
    epsilon: float,
    delta: float,
    records: int,
    *,
    slack: float = 1e-6,
    alpha: float = 0.0,
    beta: float = 0.0,
    gamma: float = 0.0,
    most_alpha: float = 1.0,
) -> Guarantee:
    """Turns a guarantee for blind requests into one for adaptive ones.

    With ε' = `max_information`, in all but √δ' of the cases (Markov), what was published leaves the
    coins (ε', √δ')-close to fresh ones. So α' = α + ε', β' = β e^ε' + √δ' and γ' = γ + √δ'.

    Args:
      epsilon: ε of everything that was published, from `total_epsilon`.
      delta: its δ. Only 0 has a bound here: that of Rogers et al. 2016 for δ > 0 is stated up to
        constants. So published networks never have one.
      records: n.
      slack: δ', in (0, 1).
      alpha: of blind requests; 0 for retraining that is exact, as are the next two.
      beta: of blind requests.
      gamma: of blind requests.
      most_alpha: α' above this is called vacuous; 1 lets probabilities grow 2.7 times.

    Raises:
      ValueError: a number out of range.

    >>> guarantee(0.001, 0, 60_000).vacuous
    False
    >>> guarantee(0.1, 0, 60_000).why
    "α' = 366 is above 1: the total ε of 0.1 would have to be at most 0.00142."
    """
    if not (alpha >= 0 and 0 <= beta <= 1 and 0 <= gamma <= 1 and 0 <= delta < 1):
        raise ValueError(
            "alpha must be at least 0, beta and gamma in [0, 1] and delta in [0, 1), found "
            f"{alpha}, {beta}, {gamma} and {delta}"
        )
    information = max_information(epsilon, records, slack)
    if delta > 0:
        why = f"δ = {delta:g}, and the bound on max-information is for δ = 0 alone."
        return Guarantee(math.inf, 1.0, 1.0, True, why)
    grown = 0.0 if beta == 0 else math.exp(min(0.0, math.log(beta) + information))
    new_alpha = alpha + information
    new_beta, new_gamma = (min(1.0, b + math.sqrt(slack)) for b in (grown, gamma))
    reasons = []
    if new_alpha > most_alpha:
        reasons.append(f"α' = {new_alpha:.3g} is above {most_alpha:g}")
        if alpha <= most_alpha:
            bound = largest_epsilon(most_alpha - alpha, records, slack)
            reasons[-1] += f": the total ε of {epsilon:g} would have to be at most {bound:.3g}"
    reasons += [
        f"{name} = {value:g} allows everything"
        for name, value in (("β'", new_beta), ("γ'", new_gamma))
        if value >= 1
    ]
    why = "; ".join(reasons) or f"α' is at most {most_alpha:g}, and β' and γ' are below 1"
    return Guarantee(new_alpha, new_beta, new_gamma, bool(reasons), why + ".")
