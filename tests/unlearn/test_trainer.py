"""The theorem: forgetting gives the bits of training from scratch on the survivors."""

import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src import compiler

from fourfold.runtime import mesh as meshes
from unlearn import models, partition, programs, sisa
from unlearn import trainer as trainers
from unlearn.config import ModelConfig, OptimConfig, SisaConfig

KEY, N, CLASSES = b"k" * 16, 150, 3
CONFIG = SisaConfig(
    shards=6,
    slices=3,
    capacity=24,
    epochs=3,
    batch_size=4,
    width=4,
    optim=OptimConfig(lr=0.2),
    model=ModelConfig((7,)),
)


def records(config=CONFIG, n=N):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(n, 5)).astype(np.float32)
    y = (x[:, :CLASSES] + rng.normal(size=(n, CLASSES))).argmax(1).astype(np.int32)
    places = partition.assign(partition.check_ids(np.arange(n) * 7), config, KEY)
    partition.check_capacity(places, config)
    return trainers.Records(x, y, places)


def trainer(devices=1, config=CONFIG, optim=None):
    learner = models.make_learner(config.model, config.optim, CLASSES)
    learner = learner._replace(optimizer=optim) if optim else learner
    mesh = meshes.make_mesh(devices)
    return trainers.Trainer(learner, config, jax.random.key(3), mesh)


@pytest.fixture(scope="module")
def one():
    return trainer()


def fit(trainer, data, start=None, before=None):
    """All states by (shard, number of slices learnt)."""
    shards = range(CONFIG.shards)
    states = dict(before or {})
    chosen = {s: 0 for s in shards} if start is None else start
    for shard, slice_, state in trainer.fit(data, chosen, lambda s, r: (before or {})[s, r]):
        states[shard, slice_ + 1] = state
    return states


def hashes(states):
    return {place: programs.digest(state) for place, state in states.items()}


@pytest.fixture(scope="module")
def whole(one):
    return fit(one, records())


def forget(trainer, data, states, deleted):
    """What a user of the loop does; the deleted rows are poisoned first."""
    start = trainers.first_slices(data.places, deleted)
    poisoned = data.x.copy()
    poisoned[deleted] = np.nan
    left = data._replace(x=poisoned).take(~deleted)
    return fit(trainer, left, start, states), left, start


def mask(rows, n=N):
    deleted = np.zeros(n, bool)
    deleted[np.asarray(rows, int)] = True
    return deleted


def check(trainer, scratch, data, states, deleted):
    after, left, start = forget(trainer, data, states, deleted)
    reference = hashes(fit(scratch, left))
    got, before = hashes(after), hashes(states)
    assert got == reference
    for (shard, slice_), value in got.items():
        same = shard not in start or slice_ <= start[shard]
        assert (value == before[shard, slice_]) == same, (shard, slice_)
    return after, left


def cases():
    data = records()
    shard, slice_ = data.places.shard, data.places.slice
    token = data.places.token
    last = [np.flatnonzero((shard == s) & (slice_ == r))[-1] for s, r in ((0, 0), (1, 2), (3, 1))]
    yield "last of three slices", last
    yield "last of the data", [N - 1]
    yield "last of a shard by token", [np.flatnonzero(shard == 2)[token[shard == 2].argmax()]]
    yield "first of the first slice", [np.flatnonzero((shard == 4) & (slice_ == 0))[0]]
    yield "a whole slice", np.flatnonzero((shard == 5) & (slice_ == 1))
    yield "a whole first slice", np.flatnonzero((shard == 5) & (slice_ == 0))
    yield "a whole shard but one", np.flatnonzero(shard == 1)[1:]
    yield "a whole shard", np.flatnonzero(shard == 1)
    yield "one of every shard", [np.flatnonzero(shard == s)[0] for s in range(6)]
    order = partition.batches(
        token[(shard == 0) & (slice_ == 0)], np.flatnonzero((shard == 0) & (slice_ == 0)), 0, 1, 4
    )
    yield "a whole batch", order[0]


@pytest.mark.parametrize("rows", [pytest.param(r, id=name) for name, r in cases()])
def test_forgetting_is_training_on_the_survivors(one, whole, rows):
    check(one, one, records(), whole, mask(rows))


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_on_any_number_of_devices(one, whole, devices):
    several = trainer(devices)
    data = records()
    assert hashes(fit(several, data)) == hashes(whole)
    for rows in ([0], [3, 40, 41, 99], np.arange(0, N, 3)):
        check(several, one, data, whole, mask(rows))


@settings(max_examples=12, deadline=None)
@given(st.lists(st.lists(st.integers(0, N - 1), min_size=1, max_size=12), min_size=1, max_size=4))
def test_any_sequence_of_deletions(one, whole, requests):
    data, states, gone = records(), whole, mask([])
    for rows in requests:
        fresh = mask(rows) & ~gone
        if not fresh.any():
            continue
        left = ~gone
        after, _, _ = forget(one, data.take(left), states, fresh[left])
        states, gone = after, gone | fresh
    assert hashes(states) == hashes(fit(one, data.take(~gone)))


def test_the_order_of_the_file_is_of_no_matter(one, whole):
    data = records()
    mixed = data.take(np.random.default_rng(5).permutation(N))
    assert hashes(fit(one, mixed)) == hashes(whole)


def test_shards_are_isolated(one, whole):
    data = records()
    x = data.x.copy()
    x[data.places.shard == 3] = np.nan
    got = hashes(fit(one, data._replace(x=x)))
    for (shard, slice_), value in hashes(whole).items():
        assert (got[shard, slice_] == value) == (shard != 3)


def widths(trainer):
    shapes = [programs.Shape.of(array) for array in records()[:2]]
    rest = trainer._learner, CONFIG, *shapes, trainer._mesh
    return tuple(width for width in (1, 2) if programs.is_exact(width, *rest))


def test_a_shard_of_its_own(one, whole):
    """Trained alone, in fewer lanes, a shard has the bits that it has among the others."""
    assert 2 in widths(one)
    data = records()
    for count in range(1, 6):
        got = fit(one, data, {s: 0 for s in range(count)}, {})
        assert all(programs.digest(s) == programs.digest(whole[at]) for at, s in got.items())


def lanes_used(monkeypatch):
    seen, begin = set(), trainers.Trainer._begin
    monkeypatch.setattr(trainers.Trainer, "_begin", lambda *a: seen.add(a[-1]) or begin(*a))
    return seen


def test_as_few_lanes_as_will_do(one, whole, monkeypatch):
    seen = lanes_used(monkeypatch)
    check(one, one, records(), whole, mask([3]))
    assert seen == {min(widths(one)), 2, 4}  # the reference trains all six, 4 and 2


def test_where_bits_depend_on_the_width_it_is_fixed(one, whole, monkeypatch):
    monkeypatch.setattr(programs, "is_exact", lambda *a: False)
    seen = lanes_used(monkeypatch)
    check(one, one, records(), whole, mask([3]))
    assert seen == {4}


def test_a_width_that_differs_is_found_out(one, monkeypatch):
    """Where two lanes give other bits than four, the trial sees it."""
    real = one._programs

    def run(state, *rest):
        new = real.run(state, *rest)
        if new.step.shape[0] == 2:
            new = new.replace(params=jax.tree.map(lambda p: np.nextafter(p, 9), new.params))
        return new

    monkeypatch.setattr(programs, "programs", lambda *a: real._replace(run=run))
    programs._trial.cache_clear()
    assert 2 not in widths(one)
    programs._trial.cache_clear()


def test_a_second_deletion_compiles_nothing(whole):
    """Not even one that begins with the first slice, after one that went on from another."""
    config = dataclasses.replace(CONFIG, optim=OptimConfig(lr=0.21))  # compiled by no other test
    data = records()
    late, early = (np.flatnonzero(data.places.slice == s)[:1] for s in (2, 0))
    forget(trainer(config=config), data, whole, mask(late))
    compiled = []
    compile_or_load = compiler.compile_or_get_cached

    def watched(*args, **kwargs):
        compiled.append(args)
        return compile_or_load(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler, "compile_or_get_cached", watched)
        forget(trainer(config=config), data, whole, mask(early))
        assert not compiled
        jax.jit(lambda x: x + len(compiled))(1)
    assert len(compiled) == 1  # that is: a compilation is seen


def test_optimisers_keep_their_state_at_slices(lenient_promotion):
    """With Adam, restarting with fresh moments would show."""
    adam = trainer(optim=optax.adam(0.01))
    data = records()
    states = fit(adam, data)
    check(adam, adam, data, states, mask(np.flatnonzero(data.places.slice == 2)[:3]))
    start = adam.init(0, programs.Shape.of(data.x)).opt_state
    fresh = {place: state.replace(opt_state=start) for place, state in states.items()}
    with pytest.raises(AssertionError):
        check(adam, adam, data, fresh, mask(np.flatnonzero(data.places.slice == 2)[:3]))


def test_a_stage_sees_its_slices_as_often_as_it_should():
    data = records()
    seen = []
    watched = trainer()
    run = watched._programs.run

    def spy(state, x, y, rows, count):
        seen.append(np.asarray(rows)[:, :count])
        return run(state, x, y, rows, count)

    watched._programs = watched._programs._replace(run=spy)
    stages = [len(seen) for _ in watched.fit(data, {2: 0}, None)]
    epochs = partition.epochs_of_slices(CONFIG.epochs, CONFIG.slices)
    assert len(stages) == 3
    counts = [np.bincount(s[0][s[0] >= 0] // CONFIG.capacity, minlength=3) for s in seen]
    sizes = np.bincount(data.places.slice[data.places.shard == 2], minlength=3)
    for stage, count in enumerate(counts):
        expected = np.where(np.arange(3) <= stage, epochs[stage] * sizes, 0)
        np.testing.assert_array_equal(count, expected)


def test_it_learns(one, whole):
    data = records()
    states = [whole[s, CONFIG.slices] for s in range(CONFIG.shards)]
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *states)
    probs = one._programs.predict(stacked, data.x)
    accuracy = np.mean(sisa.aggregate(probs, "mean").argmax(1) == data.y)
    assert accuracy > 0.6  # guessing: a third


def test_first_slices():
    places = partition.Partition(
        np.array([0, 0, 2, 2, 1]), np.array([3, 1, 0, 2, 2]), np.arange(5, dtype=np.uint64)
    )
    assert trainers.first_slices(places, mask([0, 1, 3], 5)) == {0: 1, 2: 2}
    assert trainers.first_slices(places, mask([], 5)) == {}


def test_digests_tell_states_apart(one):
    shape = programs.Shape.of(records().x)
    state, again, other = (one.init(shard, shape) for shard in (0, 0, 1))
    assert programs.digest(state) == programs.digest(again) != programs.digest(other)
    moved = state.replace(step=state.step + 1)
    zero = state.replace(params=jax.tree.map(lambda p: 0 * p, state.params))
    minus = state.replace(params=jax.tree.map(lambda p: -0.0 * np.abs(p), state.params))
    found = [programs.digest(s) for s in (state, moved, zero, minus)]
    assert all(a != b for a, b in itertools.combinations(found, 2))


def test_configurations_are_part_of_the_bits(whole):
    longer = dataclasses.replace(CONFIG, capacity=40)
    assert hashes(fit(trainer(config=longer), records())) == hashes(whole), "room is no matter"
    smaller = dataclasses.replace(CONFIG, batch_size=5)
    assert hashes(fit(trainer(config=smaller), records())) != hashes(whole)
