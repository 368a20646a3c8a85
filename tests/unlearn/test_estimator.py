"""The estimator keeps scikit-learn's conventions, and forgets exactly."""

import pickle
import warnings

import numpy as np
import pytest

pytest.importorskip("sklearn")
from sklearn.base import clone  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.utils.estimator_checks import check_estimator  # noqa: E402

from unlearn.estimator import SisaClassifier  # noqa: E402


def small(**options):
    given = {"shards": 3, "slices": 2, "epochs": 3, "hidden": (8,), "capacity": 64, **options}
    return SisaClassifier(**given)


@pytest.fixture(scope="module")
def digits():
    found = load_digits()
    return found.data[:300] / 16, np.array(list("abcdefghij"))[found.target[:300]]


@pytest.mark.slow
def test_scikit_learn_s_own_checks():
    with warnings.catch_warnings():
        # That it does not inherit from BaseEstimator, and that the array API was not tried.
        warnings.simplefilter("ignore")
        found = check_estimator(
            SisaClassifier(epochs=20, slices=2, shards=3, batch_size=8), on_fail=None
        )
    failed = {r["check_name"]: r["exception"] for r in found if r["status"] == "failed"}
    assert not failed and sum(r["status"] == "passed" for r in found) > 45


def test_forgetting_is_fitting_the_others(digits):
    x, y = digits
    ids = np.array([f"r{i}" for i in range(len(x))])
    whole = small().fit(x, y, ids)
    gone = np.array([3, 77, 120, 299])
    left = np.setdiff1d(np.arange(len(x)), gone)
    before = whole.hashes_
    whole.forget(ids[gone])
    fresh = small(classes=whole.classes_).fit(x[left], y[left], ids[left])
    assert whole.hashes_ == fresh.hashes_ != before
    np.testing.assert_array_equal(whole.predict_proba(x), fresh.predict_proba(x))
    assert set(whole.ids_) == set(ids[left])
    # In another order of rows, too.
    mixed = np.random.default_rng(0).permutation(left)
    again = small(classes=whole.classes_).fit(x[mixed], y[mixed], ids[mixed])
    assert again.hashes_ == whole.hashes_


@pytest.mark.parametrize("aggregation", ["vote", "mean"])
def test_it_learns(digits, aggregation):
    x, y = digits
    model = small(epochs=30, aggregation=aggregation).fit(x, y)
    assert model.score(x, y) > 0.9
    probs = model.predict_proba(x)
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    np.testing.assert_array_equal(model.predict(x), model.classes_[probs.argmax(1)])


def test_bad_requests_change_nothing(digits):
    x, y = digits
    model = small().fit(x, y)
    before = model.hashes_
    for ids, message in (
        ([5, 1000], "1 ids are not of this ensemble: 1000; nothing was changed"),
        (["a"], "ids must be of type int64, found <U1"),
        (np.arange(300), "no record would be left"),
    ):
        with pytest.raises(ValueError, match=message):
            model.forget(ids)
    assert model.hashes_ == before and len(model.ids_) == 300
    model.forget([5, 5])
    with pytest.raises(ValueError, match="not of this ensemble: 5"):
        model.forget([5])


def test_what_is_interrupted_is_as_it_was(digits, monkeypatch):
    x, y = digits
    model = small().fit(x, y)
    before, probs = model.hashes_, model.predict_proba(x)
    from unlearn import trainer

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.Trainer, "_run_stage", stop)
    with pytest.raises(KeyboardInterrupt):
        model.forget([1, 2])
    assert model.hashes_ == before and len(model.ids_) == 300
    np.testing.assert_array_equal(model.predict_proba(x), probs)


def test_a_shard_without_records_has_no_say():
    x = np.float32(np.random.default_rng(0).normal(size=(6, 3)))
    model = small(shards=8, epochs=5).fit(x, x[:, 0] > 0)
    assert not model._serving.all()
    np.testing.assert_allclose(model.predict_proba(x).sum(1), 1, rtol=1e-5)


def test_copies(digits):
    x, y = digits
    model = small().fit(x, y)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(x), model.predict_proba(x))
    assert again.forget([0]).hashes_ == model.forget([0]).hashes_
    assert clone(model).get_params() == model.get_params()
    with pytest.raises(ValueError, match="no parameter 'shard'; there are shards"):
        model.set_params(shard=3)
    with pytest.raises(ValueError, match="labels must be among a, b, found c"):
        small(classes=["a", "b"]).fit(x[:4], ["a", "b", "a", "c"])
    with pytest.raises(ValueError, match="has .* records, more than the capacity of 2"):
        small(capacity=2).fit(x, y)
