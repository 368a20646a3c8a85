"""The linear head against transcriptions in NumPy and PyTorch, and its counts against a sort."""

import doctest
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vicreg import heads
from vicreg.heads import Split

FEATURES, CLASSES = 6, 7
EPOCHS, BATCH, LR, DECAY, SEED = 4, 5, 0.3, 0.01, 3


def clusters(seed, rows, num_classes=CLASSES, spread=1.0, dtype=np.float32):
    """Features around a centre per class, and the classes."""
    centres = np.random.default_rng(99).normal(size=(num_classes, FEATURES))
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, rows)
    features = centres[labels] + spread * rng.normal(size=(rows, FEATURES))
    return Split(features.astype(dtype), labels.astype(np.int32))


TRAIN, TEST = clusters(0, 23), clusters(1, 40)


def fit(train=TRAIN, test=TEST, **changes):
    options = {
        "num_classes": CLASSES,
        "epochs": EPOCHS,
        "batch_size": BATCH,
        "lr": LR,
        "weight_decay": DECAY,
        "seed": SEED,
    }
    return list(heads.fit(train, test, **options | changes))


@functools.cache
def fitted(batch_size=BATCH):
    return fit(batch_size=batch_size)


# ---- training ------------------------------------------------------------------------------------


def orders(batch_size):
    """The rows of each update of each epoch."""
    rng, size = np.random.default_rng(SEED), min(batch_size, len(TRAIN.labels))
    steps = len(TRAIN.labels) // size
    for _ in range(EPOCHS):
        yield rng.permutation(len(TRAIN.labels))[: steps * size].reshape(steps, size)


def start():
    """As `fit` starts."""
    head = heads.init(jax.random.key(SEED), FEATURES, CLASSES)
    return {name: np.float64(value) for name, value in head.items()}


def in_numpy(batch_size):
    """Kernel and bias after each epoch, and the mean loss of its updates."""
    head, buffers = start(), {"kernel": 0.0, "bias": 0.0}
    for epoch, order in enumerate(orders(batch_size)):
        lr, losses = LR * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2, []
        for rows in order:
            x, labels = np.float64(TRAIN.features[rows]), TRAIN.labels[rows]
            scores = x @ head["kernel"] + head["bias"]
            p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
            losses.append(-np.log(p[np.arange(len(rows)), labels]).mean())
            error = (p - np.eye(CLASSES)[labels]) / len(rows)
            for name, g in {"kernel": x.T @ error, "bias": error.sum(0)}.items():
                buffers[name] = 0.9 * buffers[name] + g + DECAY * head[name]
                head[name] = head[name] - lr * buffers[name]
        yield dict(head), np.mean(losses)


def in_torch(batch_size):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(FEATURES, CLASSES).double()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(start()["kernel"].T))
        layer.bias.zero_()
    sgd = torch.optim.SGD(layer.parameters(), lr=LR, momentum=0.9, weight_decay=DECAY)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, EPOCHS)
    for order in orders(batch_size):
        losses = []
        for rows in order:
            x, labels = torch.tensor(TRAIN.features[rows]), torch.tensor(TRAIN.labels[rows])
            loss = torch.nn.functional.cross_entropy(layer(x.double()), labels.long())
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            losses.append(loss.item())
        cosine.step()
        weight, bias = (p.detach().numpy().copy() for p in (layer.weight, layer.bias))
        yield {"kernel": weight.T, "bias": bias}, np.mean(losses)


@pytest.mark.parametrize("batch_size", [BATCH, 1000])
@pytest.mark.parametrize("peer", [in_numpy, in_torch])
def test_history_is_that_of_plain_sgd(peer, batch_size):
    history = list(peer(batch_size))
    assert len(fitted(batch_size)) == len(history) == EPOCHS
    for number, (line, (head, loss)) in enumerate(zip(fitted(batch_size), history, strict=True), 1):
        scores = TEST.features @ head["kernel"] + head["bias"]
        top1, top5 = by_sorting(scores, TEST.labels) / len(TEST.labels)
        assert line == pytest.approx({"epoch": number, "loss": loss, "top1": top1, "top5": top5})
    assert 0.3 < top1 < top5  # the head has learned something


def test_it_is_a_function_of_the_seed():
    assert fit() == fitted()
    other = fit(seed=SEED + 1)
    assert [line["loss"] for line in other] != [line["loss"] for line in fitted()]


def test_features_may_lie_on_the_device():
    assert fit(*(Split(*map(jnp.asarray, split)) for split in (TRAIN, TEST))) == fitted()


def test_it_separates_what_logistic_regression_separates():
    linear_model = pytest.importorskip("sklearn.linear_model")
    train, test = (clusters(seed, 1000, num_classes=3) for seed in (2, 3))
    theirs = linear_model.LogisticRegression(C=1e4).fit(*train)
    *_, last = fit(train, test, num_classes=3, epochs=20, batch_size=100, lr=0.1, weight_decay=0.0)
    assert 0.75 < theirs.score(*test) < 0.95
    assert last["top1"] == pytest.approx(theirs.score(*test), abs=0.02)
    p = theirs.predict_proba(train.features)[np.arange(1000), train.labels]
    assert last["loss"] == pytest.approx(-np.log(p).mean(), abs=0.01)
    assert last["top5"] == 1


@pytest.mark.parametrize(
    ("name", "bad", "message"),
    [
        ("train", {3: np.nan, 4: np.inf, 9: -np.inf}, "3 of the 23 train features are not finite"),
        ("test", {39: np.nan}, "1 of the 40 test features are not finite"),
    ],
)
def test_features_that_are_not_finite_are_counted(name, bad, message):
    splits = {"train": TRAIN, "test": TEST}
    features = splits[name].features.copy()
    for row, value in bad.items():
        features[row, row % FEATURES] = features[row, 0] = value
    splits[name] = splits[name]._replace(features=features)
    with pytest.raises(ValueError, match=message):
        fit(**splits)


def test_a_head_starts_small():
    head = heads.init(jax.random.key(0), 100, 50)
    assert head["kernel"].shape == (100, 50) and head["bias"].shape == (50,)
    assert float(head["kernel"].std()) == pytest.approx(0.01, rel=0.05)
    assert abs(float(head["kernel"].mean())) < 1e-3 and not head["bias"].any()


def test_examples():
    assert doctest.testmod(heads).failed == 0


# ---- counting ------------------------------------------------------------------------------------


def by_sorting(scores, labels, mask=None):
    """How many labels come first, and among the first five, when they lose all ties."""
    ranks = []
    for row, label in zip(np.asarray(scores), labels, strict=True):
        ranking = sorted(range(len(row)), key=lambda k: (-row[k], k == label))  # noqa: B023
        ranks.append(ranking.index(label))
    ranks = np.array(ranks)[slice(None) if mask is None else mask]
    return np.array([(ranks < 1).sum(), (ranks < 5).sum()])


@pytest.mark.parametrize("num_classes", [1, 3, 5, 6, 20])
@pytest.mark.parametrize("levels", [4, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_hits_against_a_sort(num_classes, levels, masked):
    rng = np.random.default_rng(num_classes)
    scores = rng.integers(0, levels, (200, num_classes)).astype(np.float32)
    labels = rng.integers(0, num_classes, 200).astype(np.int32)
    mask = rng.random(200) < 0.7 if masked else None
    found = heads.hits(jnp.asarray(scores), jnp.asarray(labels), mask)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, by_sorting(scores, labels, mask))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf, -np.inf])
def test_scores_all_alike_score_nothing(value):
    scores = jnp.full((4, 10), value)
    assert heads.hits(scores, jnp.arange(4)).tolist() == [0, 0]
