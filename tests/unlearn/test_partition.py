"""Places are a function of the id and the key alone; batches of the survivors alone."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlearn import partition
from unlearn.config import SisaConfig

KEY = b"a key of 16 byte"


def place_oracle(value, config, key):
    """The same by Python's integers."""
    tag = b"i" if isinstance(value, int) else b"s"
    digest = hashlib.blake2b(tag + str(value).encode(), key=key, digest_size=24).digest()
    words = [int.from_bytes(digest[i : i + 8], "little") for i in (0, 8, 16)]
    shard, slice_ = (
        (word >> 32) * n >> 32
        for word, n in zip(words, (config.shards, config.slices), strict=False)
    )
    return shard, slice_, words[2]


@pytest.mark.parametrize("ids", [[7, -1, 2**62, 0], ["7", "", "ä", "a b"]])
@pytest.mark.parametrize("shards, slices", [(1, 1), (3, 2), (20, 50)])
def test_places_against_integers(ids, shards, slices):
    config = SisaConfig(shards=shards, slices=slices, epochs=30)
    places = partition.assign(partition.check_ids(ids), config, KEY)
    expected = [place_oracle(value, config, KEY) for value in ids]
    assert list(zip(*(a.tolist() for a in vars(places).values()), strict=True)) == expected
    assert (places.shard.dtype, places.slice.dtype, places.token.dtype) == ("i4", "i4", "u8")


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), unique=True, min_size=1, max_size=60), st.data())
def test_a_record_s_place_is_its_own(ids, draw):
    config = SisaConfig(shards=4, slices=3)
    whole = partition.assign(partition.check_ids(ids), config, KEY)
    some = draw.draw(st.lists(st.sampled_from(range(len(ids))), unique=True, min_size=1))
    few = partition.assign(partition.check_ids([ids[i] for i in some]), config, KEY)
    for a, b in zip(vars(few).values(), vars(whole.take(np.array(some))).values(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_places_are_uniform_and_independent():
    config = SisaConfig(shards=5, slices=4)
    ids = partition.check_ids(np.arange(40_000))  # in order, as they often are
    places = partition.assign(ids, config, KEY)
    table = np.zeros((5, 4))
    np.add.at(table, (places.shard, places.slice), 1)
    chi2 = ((table - 2000) ** 2 / 2000).sum()
    assert 6 < chi2 < 45  # of 19 degrees of freedom, both tails below 1 in 500
    other = partition.assign(ids, config, KEY[::-1])
    assert abs(np.mean(other.shard == places.shard) - 0.2) < 0.02
    halves = places.token >> np.uint64(63)
    assert abs(halves.mean() - 0.5) < 0.02


def test_the_number_and_the_text_are_two_ids():
    config = SisaConfig(shards=1000, slices=1)
    number, text = (partition.assign(partition.check_ids([v]), config, KEY) for v in (7, "7"))
    assert number.token != text.token


def test_groups_by_the_probability_of_deletion():
    config = SisaConfig(shards=5, slices=1, groups=((0.1, 3), (0.5, 1), (1.0, 1)))
    probability = np.array([0.0, 0.1, 0.05, 0.100001, 0.5, 0.51, 1.0] * 40)
    ids = partition.check_ids(np.arange(len(probability)))
    shard = partition.assign(ids, config, KEY, probability).shard
    assert set(shard[probability <= 0.1]) == {0, 1, 2}
    assert set(shard[(probability > 0.1) & (probability <= 0.5)]) == {3}
    assert set(shard[probability > 0.5]) == {4}
    again = partition.assign(ids[5:9], config, KEY, probability[5:9]).shard
    np.testing.assert_array_equal(again, shard[5:9])
    with pytest.raises(ValueError, match="give both or neither"):
        partition.assign(ids, config, KEY)
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\].*nan, 1.5"):
        partition.assign(ids[:3], config, KEY, np.array([np.nan, 1.5, 0]))


@pytest.mark.parametrize(
    "ids, message",
    [
        ([1, 2, 1, 3, 3], r"2 occur more than once: 1, 3"),
        (["a", "a"], r"1 occur more than once: a"),
        ([1.5], r"integers or text of shape \(N,\), found float64"),
        ([[1, 2]], r"found int64 \(1, 2\)"),
        (np.array([1, "a"], object), "found object"),
        (np.array([2**63], np.uint64), "below 2"),
    ],
)
def test_bad_ids(ids, message):
    with pytest.raises(ValueError, match=message):
        partition.check_ids(ids)


def test_capacity():
    config = SisaConfig(shards=2, slices=2, capacity=2)
    places = partition.Partition(
        np.array([0, 0, 1, 1, 1]), np.array([0, 1, 1, 1, 1]), np.arange(5, dtype=np.uint64)
    )
    with pytest.raises(ValueError, match="slice 1 of shard 1 has 3 records, more than the cap.* 2"):
        partition.check_capacity(places, config)
    partition.check_capacity(places.take(np.arange(4)), config)
    with pytest.raises(ValueError, match="shard 1 of 2 is empty: 2 records are too few"):
        partition.check_capacity(places.take(np.arange(2)), config)
    few = partition.Partition(
        np.array([0, 0, 1]), np.array([0, 1, 1]), np.arange(3, dtype=np.uint64)
    )
    with pytest.raises(ValueError, match="shard 1 has 1 records, fewer than its 2 slices"):
        partition.check_capacity(few, config)
    partition.check_capacity(few, config, may_be_empty=True)
    # A thousand partitions: none exceeds what exceeds once in a million.
    config = SisaConfig(shards=10, slices=8)
    most = partition.capacity_for(3000, config)
    counts = np.random.default_rng(0).multinomial(3000, np.full(80, 1 / 80), size=1000)
    assert counts.max() < most < 3 * counts.max()
    assert partition.capacity_for(3, config) == 8


@pytest.mark.parametrize("epochs, slices", [(1, 1), (10, 4), (7, 13), (20, 39), (50, 50)])
def test_epochs_of_slices(epochs, slices):
    found = partition.epochs_of_slices(epochs, slices)
    assert len(found) == slices and min(found) >= 1 and max(found) - min(found) <= 1
    assert abs(sum(found) - 2 * slices / (slices + 1) * epochs) <= 0.5
    # Passes over parts of the shard: as many records as in `epochs` passes over the whole.
    seen = sum(e * (r + 1) / slices for r, e in enumerate(found))
    assert abs(seen - epochs) <= (slices + 1) / 2


def test_too_many_slices():
    SisaConfig(slices=19, epochs=10)
    with pytest.raises(ValueError, match="20 slices are more than 2 epochs - 1 = 19"):
        SisaConfig(slices=20, epochs=10)


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(0, 40), epochs=st.integers(0, 3), size=st.integers(1, 9), stage=st.integers(0, 3)
)
def test_batches_have_every_record_once_an_epoch(n, epochs, size, stage):
    tokens = np.random.default_rng(n).integers(0, 2**64, n, np.uint64)
    rows = 3 * np.arange(n, dtype=np.int32)
    found = partition.batches(tokens, rows, stage, epochs, size)
    steps = -(-n // size)
    assert found.shape == (epochs * steps, size)
    for epoch in found.reshape(epochs, steps * size):
        assert sorted(epoch[:n]) == list(rows) and np.all(epoch[n:] == -1)


def test_the_order_of_survivors_is_that_of_the_whole():
    tokens = np.random.default_rng(0).integers(0, 2**64, 50, np.uint64)
    rows = np.arange(50, dtype=np.int32)
    stay = np.random.default_rng(1).random(50) < 0.7
    whole = partition.batches(tokens, rows, 1, 2, 50).reshape(2, -1)
    left = partition.batches(tokens[stay], rows[stay], 1, 2, stay.sum())
    for a, b in zip(whole, left, strict=True):
        np.testing.assert_array_equal(a[stay[a]], b)
    assert not np.array_equal(whole[0], whole[1]), "every epoch has its own order"
    assert not np.array_equal(whole[0], partition.batches(tokens, rows, 2, 1, 50)[0])
    # Nor does it depend on the order that they are given in.
    mixed = np.random.default_rng(2).permutation(50)
    again = partition.batches(tokens[mixed], rows[mixed], 1, 2, 50).reshape(2, -1)
    np.testing.assert_array_equal(again, whole)


def test_the_order_is_random():
    tokens = np.arange(4000, dtype=np.uint64)  # the worst there may be
    order = partition.batches(tokens, np.arange(4000, dtype=np.int32), 0, 3, 4000)
    for epoch in order:
        assert abs(np.corrcoef(epoch, np.arange(4000))[0, 1]) < 0.06
    assert abs(np.corrcoef(order[0], order[1])[0, 1]) < 0.06


def test_a_bad_key():
    with pytest.raises(ValueError, match="key must have 16 to 64 bytes, found 15"):
        partition.assign(partition.check_ids([1]), SisaConfig(), bytes(15))
