"""The unlearning claim: a small run, its resumption, its parts against oracles, its judgements."""

import dataclasses

import numpy as np
import pytest

from fourfold.claims import _unlearn_attack as attacks
from fourfold.claims import _unlearn_ensemble as ensembles
from fourfold.claims import _unlearn_report as report
from fourfold.claims import load
from fourfold.claims import unlearn_sisa as claim
from unlearn import partition, planner

# jax-privacy calls it.
pytestmark = pytest.mark.filterwarnings("ignore:optax.global_norm is deprecated:DeprecationWarning")

PLAN = ensembles.Plan(
    "digits",
    seeds=2,
    shards=(1, 3),
    slices=(1, 2, 3),
    requests=(1, 8),
    hidden=8,
    epochs=4,
    batch_size=32,
    width=2,
    draws=10,
    trials=2,
    attack_shards=4,
    updates=2,
    noise=(16.0,),
    removals=5,
)


@pytest.fixture(scope="module")
def problem():
    return ensembles.load(PLAN)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out, messages = tmp_path_factory.mktemp("claim"), []
    result = claim.run_plan(PLAN, "laptop", out, lambda f, m: messages.append((f, m)))
    return out, result, messages


def part(done, name):
    with np.load(done[0] / f"{name}.npz", allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def test_it_runs_and_reports(done):
    _, result, messages = done
    fractions = [fraction for fraction, _ in messages]
    assert fractions == sorted(fractions) and fractions[0] == 0 and fractions[-1] == 1
    figures = {figure.name: figure for figure in result.figures}
    numbers = [f for f in result.figures if not isinstance(f.ours, str)]
    assert all(np.isfinite(f.ours) and (f.low is None or f.low <= f.ours) for f in numbers)
    assert figures["speed-up, 8 at once"].paper == 4.63
    assert figures["speed-up, 1 at once"].paper is None
    assert 60 < figures["one network on all records"].ours < 100
    assert figures["networks equal to training on the survivors"].ours == "12 of 12"
    assert len(result.plots) == 4 and all(p.png.startswith(b"\x89PNG") for p in result.plots)
    assert result.seeds == (0, 1) and result.seconds > 0 and result.name == "unlearn_sisa"


def test_a_killed_claim_loses_one_part_at_most(done, monkeypatch):
    out, result, _ = done
    ran = []

    def killed(plan, problem, progress):
        ran.append(plan.draws)
        raise KeyboardInterrupt

    monkeypatch.setattr(claim, "PARTS", dict.fromkeys(claim.PARTS, killed))
    again = claim.run_plan(PLAN, "laptop", out, lambda f, m: None)
    assert again.figures == result.figures and not ran
    with pytest.raises(KeyboardInterrupt):
        claim.run_plan(dataclasses.replace(PLAN, draws=7), "laptop", out, lambda f, m: None)
    assert ran == [7]


def test_visits_are_counted_as_by_hand(problem):
    ensemble = ensembles.make(PLAN, problem, 3, 2, seed=5)
    gone = np.isin(np.arange(len(problem.train.ids)), [3, 700, 701])
    epochs = partition.epochs_of_slices(PLAN.epochs, 2)
    visits = updates = 0
    places = ensemble.records.places
    for shard in range(3):
        hit = places.slice[gone & (places.shard == shard)]
        for stage in range(min(hit, default=2), 2):
            seen = int(np.sum(~gone & (places.shard == shard) & (places.slice <= stage)))
            visits += epochs[stage] * seen
            updates += epochs[stage] * -(-seen // PLAN.batch_size)
    assert ensemble.cost(gone) == (visits, updates) and visits > 0
    assert ensemble.cost()[0] == sum(epochs[s] * int(np.sum(places.slice <= s)) for s in range(2))


def test_costs_are_the_planner_s(done, problem):
    cost = part(done, "cost")
    assert cost["visits"].shape == (2, 3, 2, 10)
    count = len(problem.train.ids)
    assert cost["expected"][1, 0, 1] == PLAN.epochs * planner.expected_cost(count, 3, 8, batch=True)
    assert cost["whole"].tolist() == [4 * (count - 1), 4 * (count - 8)]
    assert np.all(cost["visits"][0, 0] == cost["whole"][:, None]), "one shard in one slice"
    assert report.deviation(cost) < 5
    assert report.deviation({**cost, "expected": 1.2 * cost["expected"]}) > 5


def test_hashes_tell_a_network_that_still_remembers(problem):
    ensemble = ensembles.make(PLAN, problem, 3, 2, seed=0)
    states = ensemble.fit()
    gone = ensemble.records.places.shard == 1
    gone &= np.cumsum(gone) == 1
    left, after = ensemble.forget(states, gone)
    anew = left.digests(left.fit())
    assert np.array_equal(left.digests(after), anew)
    assert np.array_equal(ensemble.digests(states) == anew, [True, False, True])


def test_exactness_counts_every_network(done):
    exact = part(done, "exactness")
    assert exact["equal"].shape == exact["affected"].shape == (2 * 2 * 3,)
    assert exact["equal"].all() and np.array_equal(exact["affected"], exact["changed"])
    assert exact["affected"].sum() >= 4 and all(exact[k].shape == (5,) for k in ("forget", "one"))


def test_requests_at_random_are_as_many(done):
    attack = part(done, "attack")
    assert attack["attacked"].shape == attack["others"].shape == (3, 2)
    assert np.array_equal(attack["share"][0], attack["share"][1])
    assert np.array_equal(attack["accuracy"][0], attack["accuracy"][1])
    assert not np.array_equal(attack["attacked"][0], attack["attacked"][1])
    assert attack["vacuous"].all() and 0 < attack["epsilon"] < np.inf


def test_private_networks_do_not_read_the_deleted(problem):
    alive = np.arange(len(problem.train.ids)) % 3 > 0
    x = problem.train.x.copy()
    x[~alive] = np.nan
    poisoned = problem._replace(train=problem.train._replace(x=x))
    (_, clean), (on_train, other) = (
        attacks.private(PLAN, p, 0, 16.0)(alive) for p in (problem, poisoned)
    )
    np.testing.assert_array_equal(clean, other)
    assert np.isfinite(on_train[:, alive]).all()
    assert not np.array_equal(attacks.private(PLAN, problem, 0, 32.0)(alive)[1], clean)


def test_residuals_keep_to_their_bounds(done):
    removal = part(done, "removal")
    assert removal["bound"].shape == (2, 5)
    assert np.all(removal["true"] <= removal["bound"])
    assert np.all(removal["bound"] <= removal["budget"])
    assert np.all(np.diff(removal["bound"], axis=1)[removal["retrained"][:, 1:] == 0] > 0)
    assert removal["plain"].min() > 0.9


def test_an_unknown_scale_is_refused(tmp_path):
    with pytest.raises(ValueError, match="scale must be one of laptop, gpu, paper, found 'huge'"):
        load("unlearn_sisa")("huge", tmp_path, lambda f, m: None)


def results_of(lost, equal, gap):
    """Results whose judgements are known."""
    accuracy = np.full((2, 1, 3), 0.95)
    accuracy[-1] -= lost
    below = np.array([np.full(20, 0.5 - gap), np.arange(20) % 2, np.full(20, 0.5 - gap)])
    visits = np.array([90.0, 110.0, 100.0, 100.0])[None, None, None]
    return {
        "accuracy": {"mean": accuracy, "vote": accuracy, "fraction": accuracy - 0.1},
        "cost": {
            "visits": visits,
            "expected": np.array([[[100.0 + 500 * gap]]]),
            "spread": np.array([[[8.0]]]),
        },
        "exactness": {
            "equal": np.array([True, equal]),
            "affected": np.array([True, False]),
            "changed": np.array([True, not equal]),
        },
        "attack": {
            "attacked": below,
            "others": np.full((3, 20), 0.5),
            "accuracy": np.full((3, 20), [[0.9], [0.9], [0.2]]),
        },
        "removal": {"true": np.array([[1.0 + gap]]), "bound": np.array([[1.05]])},
    }


def test_the_verdict_follows_the_numbers():
    good = report.verdict(results_of(0.01, True, 0.0), PLAN)
    assert good.startswith("3 shards lose under 2 points of accuracy: yes (1.0); together")
    assert "small a part: yes" in good and "exact formula: yes" in good
    assert "survivors: yes (2 of 2)" in good and "held a deleted record: yes" in good
    assert "published break it: no (indicator 0.50, p = 1)" in good
    assert (
        "from as many trials: yes (0.50, p = 1), at 20 % accuracy" in good
        and "above its bound: yes." in good
    )
    bad = report.verdict(results_of(0.2, False, 0.1), PLAN)
    assert "accuracy: no (20.0)" in bad and "small a part: yes" in bad
    assert "exact formula: no" in bad and "survivors: no (1 of 2)" in bad
    assert "held a deleted record: no" in bad and "published break it: yes" in bad
    assert "at random do: no (0.50" in bad and "as many trials: no" in bad
    assert "above its bound: no." in bad


def test_removals_until_training_anew():
    retrained = np.array([[0, 0, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]])
    assert report.until_retrained({"retrained": retrained}).tolist() == [2, 4, 0]
