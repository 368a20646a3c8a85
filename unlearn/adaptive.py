"""Requests that depend on what was published: attacks on a sharded ensemble, and noisy votes.

Gupta, Jung, Neel, Roth, Sharifi-Malvajerdi and Waites, Adaptive Machine Unlearning (NeurIPS 2021).
Retraining the affected shards is exact for requests that are made blindly. Whoever has seen the
networks can ask for the records of certain shards; what is left then differs from an ensemble of
fresh shards, and the statistics here show it. `unlearn.privacy` says what noise is worth.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

# ---- with access to the networks -----------------------------------------------------------------


def guess_shards(probs: jax.Array, labels: jax.Array) -> jax.Array:
    """Guesses each record's shard: that of the network most confident of its label.

    Args:
      probs: float `(S, N, C)`, each network's probabilities for records of the training set.
      labels: integers `(N,)`.

    Returns:
      int32 `(N,)`; the first of equals.

    Raises:
      ValueError: the shapes don't fit.

    >>> guess_shards(jnp.array([[[0.9, 0.1]], [[0.6, 0.4]]]), jnp.array([1])).tolist()
    [1]
    """
    _check(probs, labels)
    confidence = jnp.take_along_axis(probs, labels[None, :, None], axis=-1)[..., 0]
    return jnp.argmax(confidence, axis=0).astype(jnp.int32)


def choose_targets(probs: jax.Array, labels: jax.Array, attacked: int) -> jax.Array:
    """Chooses the records to ask deletion of: those guessed to be in the first `attacked` shards.

    The paper attacks S // 2. Arguments and errors: as `guess_shards`.

    Returns:
      bool `(N,)`.
    """
    _check_attacked(probs, attacked)
    return guess_shards(probs, labels) < attacked


def compare_attacked(
    probs: jax.Array, labels: jax.Array, attacked: int
) -> tuple[jax.Array, jax.Array]:
    """Compares shards after the targets were deleted and the networks retrained.

    The attacked shards lost more records, and those that they fitted best. With fresh shards, the
    two figures would be as likely to fall either way if their numbers of shards are the same: the
    paper's indicator, whether the first is below, has expectation 0.5. `sign_test` has it over
    repeated trials.

    Args:
      probs: float `(S, N, C)`, the retrained networks' probabilities; of a test set in the paper.
      labels: integers `(N,)`.
      attacked: as in `choose_targets`.

    Returns:
      Mean accuracy of the attacked shards and of the others; float32 `()`.

    Raises:
      ValueError: the shapes don't fit.
    """
    _check(probs, labels)
    _check_attacked(probs, attacked)
    correct = jnp.argmax(probs, axis=-1) == labels[None]
    return jnp.mean(correct[:attacked]), jnp.mean(correct[attacked:])


class SignTest(NamedTuple):
    """Of T pairs.

    Attributes:
      indicator: share of pairs whose first is below its second; of ties, the half.
      p_value: probability of as many or more, ties left out, if either order were as likely.
    """

    indicator: float
    p_value: float


def sign_test(first: ArrayLike, second: ArrayLike) -> SignTest:
    """Tests whether figures after unlearning are below those of fresh shards; exact, one-sided.

    Perfect unlearning makes the two of a trial exchangeable, whatever the survivors are. (The
    authors compare with a threshold midway between the means; as it is chosen from the same
    figures, its binomial intervals are too narrow.)

    Args:
      first: float `(T,)`, of the attacked, or after unlearning.
      second: float `(T,)`, of the others, or after training anew.

    Raises:
      ValueError: the shapes don't fit.

    >>> sign_test([0.1, 0.2, 0.3], [0.5, 0.5, 0.5])
    SignTest(indicator=1.0, p_value=0.125)
    """
    first, second = np.asarray(first), np.asarray(second)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise ValueError(f"need two of one shape (T,), found {first.shape} and {second.shape}")
    below, above = int(np.sum(first < second)), int(np.sum(first > second))
    pairs = below + above
    tail, term = 0, math.comb(pairs, below)
    for wins in range(below, pairs + 1):
        tail += term
        term = term * (pairs - wins) // (wins + 1)
    indicator = (below + (first.size - pairs) / 2) / first.size
    return SignTest(indicator, tail / 2**pairs)


# ---- with access to predictions alone ------------------------------------------------------------


def lookup_predict(
    distance: jax.Array, labels: jax.Array, shard: jax.Array, radius: float, *, shards: int
) -> jax.Array:
    """Predictions of an ensemble of lookup tables for the records themselves.

    A table votes for the label of the nearest record it holds (of equals, the lowest), or for
    "unknown" where that is further than the radius. The most votes win; of ties, "unknown", then
    the lowest label.

    Args:
      distance: float `(N, N)`.
      labels: int32 `(N,)`, at least 0.
      shard: int32 `(N,)`; -1 for records that no table holds.
      radius: largest distance of use.
      shards: S.

    Returns:
      int32 `(N,)`, -1 for unknown.
    """
    highest = jnp.iinfo(jnp.int32).max

    def vote(table: jax.Array) -> jax.Array:
        held = jnp.where(shard[None] == table, distance, jnp.inf)
        nearest = jnp.min(held, axis=1)
        # Two plain minima are several times faster than argmin on CPUs.
        label = jnp.min(jnp.where(held == nearest[:, None], labels[None], highest), axis=1)
        return jnp.where((nearest <= radius) & jnp.isfinite(nearest), label, -1)

    votes = jax.vmap(vote)(jnp.arange(shards, dtype=jnp.int32))
    # Of each shard's vote, how many agree; the winner has most, then is least.
    support = jnp.sum(votes[:, None] == votes[None], axis=0)
    best = support == jnp.max(support, axis=0, keepdims=True)
    return jnp.min(jnp.where(best, votes, highest), axis=0)


def black_box_trials(
    key: jax.Array,
    distance: jax.Array,
    labels: jax.Array,
    deletions: int,
    *,
    radius: float,
    shards: int = 3,
    trials: int = 200,
) -> tuple[jax.Array, jax.Array]:
    """Repeats the black-box attack of appendix C.2 on lookup tables.

    The attacker asks to delete records at random of those that the ensemble predicts right. So the
    rest is unlike what fresh shards would leave: its predictions are worse. The paper takes 1,000
    images of MNIST's 0 and 1, with radius 6.5 between pixels in [0, 1].

    Args:
      key: source of randomness.
      distance: float `(N, N)`, between records.
      labels: int32 `(N,)`, at least 0.
      deletions: records to delete; fewer are where fewer are predicted right.
      radius: of `lookup_predict`.
      shards: tables, S, of equal size up to rounding.
      trials: T, each with shards and requests of its own.

    Returns:
      Accuracy on the surviving records, of the shards without the deleted ones and of fresh shards
      of the survivors; float32 `(T,)` both, for `sign_test`.

    Raises:
      ValueError: the shapes don't fit or a number is out of range.
    """
    distance, labels = jnp.asarray(distance), jnp.asarray(labels, jnp.int32)
    count = labels.size
    if distance.shape != (count, count) or labels.ndim != 1:
        raise ValueError(
            f"distance and labels must be (N, N) and (N,), found {distance.shape} and "
            f"{labels.shape}"
        )
    if not 0 < deletions < count or not 0 < shards <= count - deletions:
        raise ValueError(
            f"deletions and shards must be at least 1 and at most {count} together, found "
            f"{deletions} and {shards}"
        )

    def ranks(key: jax.Array, of: jax.Array) -> jax.Array:
        """A random order of the records `of`, then the others, as int32 `(N,)`."""
        draw = jnp.where(of, jax.random.uniform(key, of.shape), 2.0)
        return jnp.argsort(jnp.argsort(draw)).astype(jnp.int32)

    def deal(key: jax.Array, alive: jax.Array) -> jax.Array:
        """Shards of equal size for the living, whose last has the remainder; else -1."""
        size = jnp.sum(alive, dtype=jnp.int32) // shards
        return jnp.where(alive, jnp.minimum(ranks(key, alive) // size, shards - 1), -1)

    def trial(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        deal_key, delete_key, fresh_key = jax.random.split(key, 3)
        shard = deal(deal_key, jnp.ones(count, bool))
        right = lookup_predict(distance, labels, shard, radius, shards=shards) == labels
        alive = ~right | (ranks(delete_key, right) >= deletions)

        def accuracy(shard: jax.Array) -> jax.Array:
            right = lookup_predict(distance, labels, shard, radius, shards=shards) == labels
            return jnp.mean(right, where=alive)

        return accuracy(jnp.where(alive, shard, -1)), accuracy(deal(fresh_key, alive))

    return lax.map(trial, jax.random.split(key, trials))


def shard_size_attack(sizes: ArrayLike, request: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Tells the shards of deleted records from the sizes of shards alone.

    Of the k records deleted by one request, as many were in a shard as it lost. Guessing for all
    the shard that lost most is right for just these: for one record, always. So sizes, and which
    shards were retrained or for how long, must stay as secret as the assignment.

    Args:
      sizes: integers `(T + 1, S)`, before and after each of T requests.
      request: integers `(K,)`, in 0..T-1, by which each record was deleted.

    Returns:
      The guesses, int32 `(K,)`, and the share of those of its request that is right, float64
      `(K,)`. Its mean is the success of the attack; without the sizes, it would be 1 / S or little
      more.

    Raises:
      ValueError: the sizes are not those before and after these requests.

    >>> shard_size_attack([[5, 5], [5, 4], [3, 3]], [0, 1, 1, 1])
    (array([1, 0, 0, 0], dtype=int32), array([1.        , 0.66666667, 0.66666667, 0.66666667]))
    """
    sizes, request = np.asarray(sizes), np.asarray(request)
    lost = -np.diff(sizes, axis=0)
    if sizes.ndim != 2 or request.ndim != 1 or np.any(lost < 0):
        raise ValueError(
            f"sizes must be (T + 1, S) and never grow, and request (K,), found {sizes.tolist()} "
            f"and {request.tolist()}"
        )
    asked = np.bincount(request, minlength=len(lost))
    if not np.array_equal(asked, lost.sum(axis=1)):
        raise ValueError(f"the shards lost {lost.sum(axis=1)} records, but {asked} were deleted")
    guess = np.argmax(lost, axis=1).astype(np.int32)
    return guess[request], (np.max(lost, axis=1) / np.maximum(asked, 1))[request]


# ---- noisy votes ---------------------------------------------------------------------------------


def count_votes(probs: jax.Array) -> jax.Array:
    """Counts votes, int32 `(N, C)`: of probs `(S, N, C)`, a shard votes for its likeliest class."""
    winners = jnp.argmax(probs, axis=-1, keepdims=True)
    classes = jnp.arange(probs.shape[-1], dtype=winners.dtype)
    return jnp.sum(winners == classes[None, None], axis=0, dtype=jnp.int32)


def vote_probabilities(votes: jax.Array, epsilon: float) -> jax.Array:
    """Probability of each answer of `noisy_vote`, softmax(ε · votes / 4).

    Args:
      votes: integers `(N, C)`.
      epsilon: ε of one answer, above 0.

    Returns:
      float32 `(N, C)`.
    """
    return jax.nn.softmax(_scores(votes, epsilon))


def noisy_vote(key: jax.Array, votes: jax.Array, epsilon: float) -> jax.Array:
    """Answers with the class of most votes after noise; ε-differentially private in the assignment.

    A record that moves from one shard to another changes two networks, so two votes, and a class
    may gain 2 where another loses 2. Report-noisy-max with Gumbel noise of scale 2 · 2 / ε is the
    exponential mechanism of sensitivity 2: an answer is e^ε times likelier at most, and the factor
    comes as near as there are votes. This holds for each answer: k of them cost k ε. (The authors
    add Laplace noise of scale 1 / ε, or take exp(ε · votes / 2): for this neighbourhood, these are
    4 ε and 2 ε.)

    Args:
      key: source of randomness, which must stay secret.
      votes: integers `(N, C)`, of `count_votes`.
      epsilon: ε of one answer, above 0.

    Returns:
      int32 `(N,)`. The noise is of float32, so that answers of probability far below 2^-24 may
      never come.
    """
    scores = _scores(votes, epsilon)
    return jax.random.categorical(key, scores, mode="high").astype(jnp.int32)


def _scores(votes: jax.Array, epsilon: float) -> jax.Array:
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, found {epsilon}")
    return votes.astype(jnp.float32) * (epsilon / 4)


def _check(probs: jax.Array, labels: jax.Array) -> None:
    if probs.ndim != 3 or labels.shape != probs.shape[1:2]:
        raise ValueError(
            f"probs and labels must be (S, N, C) and (N,), found {probs.shape} and {labels.shape}"
        )


def _check_attacked(probs: jax.Array, attacked: int) -> None:
    if not 0 < attacked < probs.shape[0]:
        raise ValueError(f"attacked must be in 1..{probs.shape[0] - 1}, found {attacked}")
