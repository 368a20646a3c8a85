"""Killed anywhere it goes on; what is gone is gone from every byte; one writer; no wrong order."""

import ctypes
import ctypes.util
import hashlib
import hmac
import itertools
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fourfold.runtime.host_arrays import DiskFullError
from unlearn import certificate, sqlite_file
from unlearn.ledger import Ledger, State

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
RUN = "c0ffee"
STATES = list(State)
LATER = datetime(2200, 1, 1, tzinfo=UTC)


def model(*of):
    return hashlib.sha256(repr(of).encode()).hexdigest()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


def bring(book, numbers, to, shards=(0,), **keep):
    """Takes requests from their state to another, on one and the same shards."""
    at = STATES.index(book.get(numbers[0]).state)
    for state in STATES[at + 1 : STATES.index(to) + 1]:
        if state is State.TOMBSTONED:
            closed = book.head()
            book.tombstone(
                dict.fromkeys(numbers, shards), {s: closed.get(s, model(s)) for s in shards}
            )
        elif state is State.RETRAINED:
            book.retrained(numbers, {s: model(s, *numbers) for s in shards})
        elif state is State.PURGED:
            book.purged(numbers)
        else:
            book.attest(numbers, **keep)


def rows(path, query):
    """What a second connection sees. (To read the file itself would drop this process's locks.)"""
    with closing(sqlite3.connect(path)) as db:
        return db.execute(query).fetchall()


def forms(id_):
    """Bytes by which an id might be in a file."""
    if isinstance(id_, str):
        return [id_.encode(), id_.encode("utf-16-le")]
    return [
        str(id_).encode(),
        *(id_.to_bytes(8, order, signed=True) for order in ("big", "little")),
    ]


def found_in(folder, needles):
    files = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    return [(file.name, needle) for file in files for needle in needles if needle in files[file]]


# ---- SIGKILL everywhere --------------------------------------------------------------------------

BATCH = [
    (["canary-5e1f93", 7311283114909127423, "canary-77aa0c"], "Alice"),
    (["canary-e3b0c4"], "Bob"),
    ([-6917529027641081857], "Carol"),
]
SHARDS = {1: [0, 2], 2: [2], 3: [1]}
KEPT = 3  # whose salt is kept for a while
AFTER = {shard: model(shard, "new") for shard in range(3)}


def secrets_of(path, number):
    return [row[0] for row in rows(path, f"SELECT salt FROM salts WHERE request = {number}")] + [
        row[0] for row in rows(path, f"SELECT mark FROM marks WHERE request = {number}")
    ]


def forget(folder, seen):
    """What a pipeline does, from wherever the one before it died."""
    path = folder / "ledger.sqlite"

    def at(state):
        return [request.number for request in book.requests() if request.state is state]

    def shards_of(numbers):
        return {shard for number in numbers for shard in SHARDS[number]}

    with Ledger.open(path, RUN) as book, book.exclusive():
        known = len(book.requests())
        if known < 2:
            assert book.request(BATCH[:2]) == [1, 2]
        if known < 3:
            assert book.request(BATCH[2:]) == [3]
        if todo := at(State.REQUESTED):
            book.tombstone({n: SHARDS[n] for n in todo}, {s: model(s) for s in shards_of(todo)})
        if todo := at(State.TOMBSTONED):
            book.retrained(todo, {s: AFTER[s] for s in shards_of(todo)})
        if todo := at(State.RETRAINED):
            book.purged(todo)
            assert (
                found_in(folder, [f for n in todo for i in BATCH[n - 1][0] for f in forms(i)]) == []
            )
        for number in SHARDS:
            seen.joinpath(str(number)).write_bytes(b"".join(secrets_of(path, number)))
        todo = at(State.PURGED)
        if now := [number for number in todo if number != KEPT]:
            book.attest(now)
        if KEPT in todo:
            book.attest([KEPT], LATER)
        book.expire(LATER)
        for request in book.requests():
            certificate.write(folder / "certificates", request, {"run": RUN})


def secrets_seen(seen, number):
    """The salts and marks that a request had, from any of its lives."""
    data = b"".join(file.read_bytes() for file in seen.glob(f"{number}*"))
    return [data[i : i + 16] for i in range(0, len(data), 16)]


def check_killed(folder, copy):
    """What holds wherever the process died, of the files as they lie there."""
    shutil.copytree(folder, copy)
    with Ledger.open(copy / "ledger.sqlite", RUN) as book:
        requests = book.requests()
        assert len(requests) in (0, 2, 3)
        head = book.head()
        for request in requests:
            ids = BATCH[request.number - 1][0]
            done = STATES.index(request.state)
            assert list(request.times) == STATES[: done + 1]
            assert sorted(request.before) == (SHARDS[request.number] if done >= 1 else [])
            assert sorted(request.after) == (SHARDS[request.number] if done >= 2 else [])
            assert all(head[s] == request.after[s] for s in request.after)
            assert book.ids(request.number) in ([ids] if done < 2 else [ids, []])
            gone = [form for id_ in ids for form in forms(id_)] if done >= 3 else []
            if request.salt_destroyed:
                seen = secrets_seen(folder.with_suffix(".seen"), request.number)
                assert seen or request.number != 1
                gone += seen
            assert found_in(folder, gone) == []
            live = 1 <= done and not secrets_gone(copy, request.number)
            assert book.match(ids).tolist() == [live] * len(ids)
        closed = {s for r in requests if r.state is State.TOMBSTONED for s in r.before}
        assert book.closed_shards() == closed
    shutil.rmtree(copy)


def secrets_gone(folder, number):
    return not secrets_of(folder / "ledger.sqlite", number)


def check_done(folder):
    with Ledger.open(folder / "ledger.sqlite", RUN) as book:
        assert [r.state for r in book.requests()] == [State.ATTESTED] * 3
        assert all(r.salt_destroyed for r in book.requests())
        assert book.head() == AFTER and not book.closed_shards() and not book.pending()
    everything = [form for ids, _ in BATCH for id_ in ids for form in forms(id_)]
    for number in SHARDS:
        assert (seen := secrets_seen(folder.with_suffix(".seen"), number))
        everything += seen
    assert found_in(folder, everything) == []
    assert len(list(folder.glob("certificates/*"))) == 6


def kill_everywhere(base, arm, stride=1):
    """Runs `forget` again and again, dying later each time; returns the first step not reached.

    Args:
      base: a folder to work in.
      arm: is called in the child with the function that it is to have called at every step.
      stride: steps from one death to the next.
    """
    certificate._software()  # remembered from now on
    for step in itertools.count(step=stride):
        folder = Path(base, f"run{step}")
        seen = folder.with_suffix(".seen")
        folder.mkdir()
        seen.mkdir()
        child = os.fork()
        if child == 0:
            count = itertools.count()

            def tick(last_words=None, count=count, step=step):
                if next(count) == step:
                    if last_words:
                        last_words()
                    os.kill(os.getpid(), signal.SIGKILL)

            try:
                arm(tick)
                forget(folder, seen)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert status == 0, f"step {step}: the child failed"
            check_done(folder)
            return step
        assert os.WTERMSIG(status) == signal.SIGKILL
        check_killed(folder, folder.with_suffix(".copy"))
        for file in seen.iterdir():
            file.rename(seen / f"{file.name}.killed")
        forget(folder, seen)
        check_done(folder)
        shutil.rmtree(folder)
        shutil.rmtree(seen)


def at_statements(tick):
    """Dies as a statement begins: BEGIN, COMMIT, VACUUM and checkpoints are among them."""
    connect = sqlite3.connect

    def traced(*args, **options):
        db = connect(*args, **options)
        db.set_trace_callback(lambda _: tick())
        return db

    sqlite_file.sqlite3.connect = traced


class Vfs(ctypes.Structure):
    """SQLite's `sqlite3_vfs`, whose last members replace the system calls it makes."""

    _fields_ = (
        [(name, ctypes.c_int) for name in ("version", "file_size", "path_size")]
        + [("next", ctypes.c_void_p), ("name", ctypes.c_char_p)]
        + [(f"method{i}", ctypes.c_void_p) for i in range(14)]
        + [("set_call", ctypes.c_void_p), ("get_call", ctypes.c_void_p)]
    )


def sqlite_library():
    """The library that Python's module has loaded, or None where it is built in."""
    try:
        name = ctypes.util.find_library("sqlite3")
        return ctypes.CDLL(name, mode=os.RTLD_NOLOAD) if name else None
    except (OSError, AttributeError):
        return None


def at_writes(tick, half=False):
    """Dies as SQLite writes, cuts or removes a file; or when half of a write is done."""
    find = sqlite_library().sqlite3_vfs_find
    find.restype, find.argtypes = ctypes.POINTER(Vfs), [ctypes.c_char_p]
    vfs = find(None)

    def write_at(file, data, size, offset):
        data = ctypes.string_at(data, size)
        tick((lambda: os.pwrite(file, data[: size // 2], offset)) if half else None)
        return os.pwrite(file, data, offset)

    def cut(file, size):
        tick()
        os.ftruncate(file, size)
        return 0

    def remove(name):
        tick()
        os.unlink(name)
        return 0

    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    prototype = ctypes.CFUNCTYPE(ctypes.c_ssize_t, ctypes.c_int, pointer, size, ctypes.c_int64)
    calls = {
        "pwrite": prototype(write_at),
        "pwrite64": prototype(write_at),
        "ftruncate": ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_int64)(cut),
        "unlink": ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p)(remove),
    }
    at_writes.calls = calls  # they must outlive this function
    change = ctypes.CFUNCTYPE(ctypes.c_int, pointer, ctypes.c_char_p, pointer)(vfs[0].set_call)
    current = ctypes.CFUNCTYPE(pointer, pointer, ctypes.c_char_p)(vfs[0].get_call)
    for name, call in calls.items():
        if current(vfs, name.encode()):  # a build has pwrite or pwrite64
            assert change(vfs, name.encode(), ctypes.cast(call, pointer)) == 0


def at_halves(tick):
    at_writes(tick, half=True)


def in_process(code, **options):
    """Runs Python code that has this file as `t`, in a process without JAX."""
    path = f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(HERE)!r}]"
    code = f"{path}; import test_ledger as t\n{code}"
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True, **options
    )


@pytest.fixture
def quick_folder(tmp_path):
    """In memory where there is such a place: thousands of fsyncs cost nothing there."""
    memory = Path("/dev/shm")
    where = memory if os.access(memory, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Path(folder)


@pytest.mark.parametrize("arm, stride", [("at_statements", 1), ("at_writes", 1), ("at_halves", 5)])
def test_killed_anywhere_it_goes_on(quick_folder, arm, stride, record_property):
    if arm != "at_statements" and sqlite_library() is None:
        pytest.skip("Python's SQLite is built in, so that its system calls can't be replaced")
    code = f"print(t.kill_everywhere({str(quick_folder)!r}, t.{arm}, {stride}))"
    with in_process(code) as process:
        output = process.communicate()[0]
    assert process.returncode == 0
    record_property("steps", int(output))
    assert int(output) > 100


# ---- nothing is left -----------------------------------------------------------------------------


def test_no_byte_of_an_id_or_salt_is_left(tmp_path, path):
    """Of many rows, whose pages join as they go: secure_delete alone leaves 3 to 7 of these."""
    rng = np.random.default_rng(4)
    names = [f"canary-{i:04d}-{'x' * rng.integers(300)}" for i in range(2900)]
    numbers = rng.integers(-(2**63), 2**63 - 1, size=100, dtype=np.int64).tolist()
    ids = [(names + numbers)[i] for i in rng.permutation(3000)]
    with Ledger.open(path, RUN) as book, book.exclusive():
        requests = book.request([([id_], "me") for id_ in ids])
        secret = rows(path, "SELECT salt FROM salts") + rows(path, "SELECT mark FROM marks")
        order = rng.permutation(requests).tolist()
        bring(book, order, State.RETRAINED)
        gone = set()
        for part in np.array_split(np.array(order), 20):
            book.purged(part)
            gone |= {str(ids[n - 1]).encode()[:11] for n in part}
            text = b"".join(file.read_bytes() for file in tmp_path.iterdir())
            assert set(re.findall(rb"canary-\d{4}", text)) & gone == set()
        assert found_in(tmp_path, [form for id_ in numbers for form in forms(id_)]) == []
        kept = order[:1500]
        book.attest(order[1500:])
        book.attest(kept, LATER)
        assert book.expire(LATER) == sorted(kept)
        text = b"".join(file.read_bytes() for file in tmp_path.iterdir())
        windows = {text[i : i + 16] for i in range(len(text) - 15)}
        assert len(secret) == 6000 and not windows & {value[:16] for (value,) in secret}


def test_the_canary_is_there_before(tmp_path, path):
    """So that what finds none afterwards could have found one."""
    with Ledger.open(path, RUN) as book:
        book.request([(["canary-1", 7311283114909127423], "me")])
        assert len(found_in(tmp_path, [b"canary-1", b"7311283114909127423"])) == 2


def test_codes_are_hmacs_of_the_id_with_its_type(path):
    with Ledger.open(path, RUN) as book:
        book.request([([7, "7", "ä"], "me"), (["7"], "me")])
        (salt,), (other,) = rows(path, "SELECT salt FROM salts ORDER BY request")
        expected = [
            hmac.new(salt, data, "sha256").hexdigest() for data in (b"i7", b"s7", b"s\xc3\xa4")
        ]
        assert len(salt) == 32 and salt != other
        assert book.get(1).hmacs == tuple(expected)
        assert book.get(2).hmacs == (hmac.new(other, b"s7", "sha256").hexdigest(),)


def test_files_are_the_owner_s_alone(tmp_path, path):
    before = os.umask(0)
    try:
        for _ in range(2):
            with Ledger.open(path, RUN) as book, book.exclusive():
                book.request([([1], "me")])
                modes = {file.name: file.stat().st_mode & 0o777 for file in tmp_path.iterdir()}
                assert len(modes) == 4 and set(modes.values()) == {0o600}
            path.chmod(0o644)  # as a copy may be
    finally:
        os.umask(before)


def test_settings(path):
    with Ledger.open(path, RUN) as book:
        names = ("journal_mode", "synchronous", "secure_delete", "foreign_keys", "temp_store")
        found = [book._db.execute(f"PRAGMA {name}").fetchone()[0] for name in names]
        assert found == ["wal", 2, 1, 1, 2]


# ---- against a model in Python -------------------------------------------------------------------

UNIVERSE = [*range(4), *map(str, range(4)), -(2**63), 2**63 - 1, ""]
IDS = st.lists(st.sampled_from(UNIVERSE), min_size=1, max_size=4)


class AnySequence(RuleBasedStateMachine):
    @initialize()
    def start(self):
        self.folder = tempfile.TemporaryDirectory(
            dir="/dev/shm" if Path("/dev/shm").exists() else None
        )
        self.path = Path(self.folder.name, "ledger.sqlite")
        self.book = Ledger.open(self.path, RUN)
        self.all = {}
        self.newest = {}
        self.versions = itertools.count()

    def teardown(self):
        self.book.close()
        self.folder.cleanup()

    def closed(self):
        return {s for r in self.all.values() if r["state"] == 1 for s in r["shards"]}

    @rule(batch=st.lists(st.tuples(IDS, st.sampled_from(["Alice", "Bob"])), max_size=3))
    def request(self, batch):
        numbers = self.book.request(batch)
        assert numbers == list(range(len(self.all) + 1, len(self.all) + len(batch) + 1))
        for number, (ids, who) in zip(numbers, batch, strict=True):
            ids = list(dict.fromkeys(ids))
            self.all[number] = {
                "ids": ids, "who": who, "state": 0, "shards": (), "salt": True, "due": None
            }  # fmt: skip

    @precondition(lambda self: any(r["state"] < 4 for r in self.all.values()))
    @rule(data=st.data(), days=st.sampled_from([None, 1, 2]))
    def step(self, data, days):
        state = data.draw(st.sampled_from(sorted({r["state"] for r in self.all.values()} - {4})))
        able = [n for n, r in self.all.items() if r["state"] == state]
        numbers = data.draw(st.lists(st.sampled_from(able), min_size=1, max_size=4))
        some = {n: self.all[n] for n in numbers}
        if state == 0:
            shards = {n: data.draw(st.sets(st.integers(0, 3), max_size=2)) for n in some}
            union = set().union(*shards.values())
            new = {s: model(s, next(self.versions)) for s in union}
            before = {
                s: new[s] if s in self.closed() else self.newest.get(s, new[s]) for s in union
            }
            self.book.tombstone(shards, before)
            self.newest = before | self.newest
            for n in some:
                self.all[n]["shards"] = sorted(shards[n])
        elif state == 1:
            after = {s: model(s, next(self.versions)) for r in some.values() for s in r["shards"]}
            self.book.retrained(numbers, after)
            self.newest |= after
        elif state == 2:
            self.book.purged(numbers)
        else:
            due = datetime.now(UTC) + timedelta(days=days) if days else None
            self.book.attest(numbers, due)
            for request in some.values():
                request |= {"due": days, "salt": bool(days)}
        for request in some.values():
            request["state"] += 1

    @rule(days=st.sampled_from([0, 1.5, 3]))
    def expire(self, days):
        due = [n for n, r in self.all.items() if r["salt"] and r["due"] and r["due"] <= days]
        assert self.book.expire(datetime.now(UTC) + timedelta(days=days)) == due
        for number in due:
            self.all[number]["salt"] = False

    @precondition(lambda self: self.all)
    @rule(data=st.data())
    def wrong_step(self, data):
        """One request among others that isn't where it should be: nothing changes."""
        numbers = data.draw(st.lists(st.sampled_from(list(self.all)), min_size=1, max_size=3))
        to = data.draw(st.integers(1, 4))
        if {self.all[n]["state"] for n in numbers} == {to - 1}:
            return
        with pytest.raises(ValueError, match="is (requested|tombstoned|retrained|purged|attested)"):
            step_to(self.book, STATES[to], numbers)

    @precondition(lambda self: self.all)
    @rule(shard=st.integers(0, 5))
    def train(self, shard):
        new = model(shard, next(self.versions))
        if shard in self.closed():
            with pytest.raises(ValueError, match=f"{shard}.* closed"):
                self.book.trained({shard: new})
        else:
            self.book.trained({shard: new})
            self.newest[shard] = new

    @rule()
    def reopen(self):
        self.book.close()
        self.book = Ledger.open(self.path, RUN)

    @invariant()
    def same(self):
        found = self.book.requests()
        assert [r.number for r in found] == list(self.all)
        assert [r.number for r in self.book.pending()] == [
            n for n, r in self.all.items() if r["state"] < 4
        ]
        for request, mine in zip(found, self.all.values(), strict=True):
            assert request == self.book.get(request.number)
            assert request.state == STATES[mine["state"]] and request.who == mine["who"]
            assert list(request.times) == STATES[: mine["state"] + 1]
            assert list(request.before) == list(mine["shards"])
            assert list(request.after) == list(mine["shards"] if mine["state"] >= 2 else ())
            assert len(request.hmacs) == len(mine["ids"])
            assert (request.salt_destroyed is None) == mine["salt"]
            assert (request.salt_due is None) == (mine["due"] is None)
            ids = self.book.ids(request.number)
            assert ids == (mine["ids"] if mine["state"] < 3 else [])
            assert [type(id_) for id_ in ids] == [type(id_) for id_ in mine["ids"][: len(ids)]]
        assert self.book.closed_shards() == self.closed()
        assert self.book.head() == self.newest
        stones = {
            (type(id_), id_)
            for r in self.all.values()
            if r["salt"] and r["state"]
            for id_ in r["ids"]
        }
        expected = [(type(id_), id_) in stones for id_ in UNIVERSE]
        matched = self.book.match(UNIVERSE)
        assert matched.dtype == bool and matched.tolist() == expected


def step_to(book, state, numbers):
    if state is State.TOMBSTONED:
        book.tombstone(dict.fromkeys(numbers, [9]), {9: model(9)})
    elif state is State.RETRAINED:
        shards = {s for n in numbers for s in book.get(n).before}
        book.retrained(numbers, {s: model(s) for s in shards})
    elif state is State.PURGED:
        book.purged(numbers)
    else:
        book.attest(numbers)


TestAnySequence = AnySequence.TestCase
TestAnySequence.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


# ---- order, and what is refused ------------------------------------------------------------------


@pytest.mark.parametrize("to", STATES[1:])
@pytest.mark.parametrize("state", STATES)
def test_only_the_next_state(path, state, to):
    with Ledger.open(path, RUN) as book:
        first, second = book.request([([1], "me"), ([2], "me")])
        bring(book, [first], state, shards=[9])
        before = book.requests(), book.head(), rows(path, "SELECT * FROM ids")
        at = STATES.index(state)
        if STATES.index(to) == at + 1:
            step_to(book, to, [first])
            assert (book.get(first).state, book.get(second).state) == (to, "requested")
            return
        may = f"may become {STATES[at + 1]}" if at < 4 else "stays so"
        with pytest.raises(ValueError, match=f"request 1 is {state} and {may}, not {to}"):
            step_to(book, to, [first])
        assert (book.requests(), book.head(), rows(path, "SELECT * FROM ids")) == before


@pytest.mark.parametrize(
    "batch, message",
    [
        ([([1], "me"), ([], "you")], "at least one id, that of 'you' has none"),
        ([("abc", "me")], "must be a list, found a text"),
        ([([1.0], "me")], "text or an integer of 64 bits, found 1.0"),
        ([([True], "me")], "found True"),
        ([([b"a"], "me")], "found b'a'"),
        ([([2**63], "me")], "found 9223372036854775808"),
        ([(["\ud800"], "me")], "surrogates"),
        ([([1], " ")], "must say who asks, found ' '"),
        ([(["Alice"], "Alice")], "can't be the id"),
        ([([12], "12")], "can't be the id"),
    ],
)
def test_a_bad_request_is_named_and_none_recorded(path, batch, message):
    with Ledger.open(path, RUN) as book:
        with pytest.raises(ValueError, match=message):
            book.request([([5], "first"), *batch])
        assert book.requests() == [] and rows(path, "SELECT count(*) FROM ids") == [(0,)]


def test_bad_arguments_of_steps(path):
    with Ledger.open(path, RUN) as book:
        one, two = book.request([([1], "me"), ([2], "me")])
        with pytest.raises(ValueError, match="no request 3; there are 2"):
            book.purged([3])
        for number in (0, 3, -1):
            with pytest.raises(ValueError, match=f"no request {number}; there are 2"):
                book.get(number)
            with pytest.raises(ValueError, match=f"no request {number}; there are 2"):
                book.ids(number)
        with pytest.raises(ValueError, match=r"must be of shards \[0, 3\], found \[0\]"):
            book.tombstone({one: [0], two: [0, 3]}, {0: model(0)})
        with pytest.raises(ValueError, match=r"must be of shards \[0\], found \[0, 1\]"):
            book.tombstone({one: [0]}, {0: model(0), 1: model(1)})
        with pytest.raises(ValueError, match="64 hexadecimal digits, found 'ABC'"):
            book.tombstone({one: [0]}, {0: "ABC"})
        bring(book, [one], State.TOMBSTONED)
        with pytest.raises(ValueError, match=r"must be of shards \[0\], found \[1\]"):
            book.retrained([one], {1: model(1)})
        bring(book, [one], State.PURGED)
        for wrong in (datetime(2300, 1, 1), datetime(2000, 1, 1, tzinfo=UTC)):
            with pytest.raises(ValueError, match="with a zone, in the future, or None, found"):
                book.attest([one], wrong)
        with pytest.raises(ValueError, match="must have a zone"):
            book.expire(datetime(2300, 1, 1))
        with pytest.raises(ValueError, match="found 1.5"):
            book.match([1.5])
        assert [r.state for r in book.requests()] == ["purged", "requested"]


def test_numpy_numbers_and_repeats_do(path):
    with Ledger.open(path, RUN) as book:
        (one,) = book.request([(np.array([7, 7, 9]), "me")])
        assert book.ids(np.int64(one)) == [7, 9]
        book.tombstone({np.int32(one): np.array([2, 2])}, {np.int64(2): model(2)})
        book.retrained(np.array([one, one]), {np.int64(2): model(3)})
        book.purged([one, one])
        assert book.get(one).after == {2: model(3)}


def test_a_model_from_a_backup_is_recognised(path):
    """Without any salt: by the newest hash of its shard."""
    with Ledger.open(path, RUN) as book:
        one, two = book.request([([1], "me"), ([2], "me")])
        book.trained({0: model("a"), 1: model("b")})
        bring(book, [one], State.ATTESTED, shards=[0])
        newest = model(0, one)
        assert book.head() == {0: newest, 1: model("b")}
        with pytest.raises(ValueError, match=f"{model('a')}, but its newest is {newest}: restored"):
            book.tombstone({two: [0, 1]}, {0: model("a"), 1: model("b")})
        assert book.get(two).state == "requested" and not book.closed_shards()
        book.trained({0: model("repaired")})
        book.tombstone({two: [0, 1]}, {0: model("repaired"), 1: model("b")})
        assert book.closed_shards() == {0, 1}


def test_a_shard_stays_closed_for_another_request(path):
    with Ledger.open(path, RUN) as book:
        one, two = book.request([([1], "me"), ([2], "me")])
        book.tombstone({one: [0, 1], two: [1, 2]}, {s: model(s) for s in range(3)})
        book.retrained([one], {0: model(0, 1), 1: model(1, 1)})
        assert book.closed_shards() == {1, 2}
        book.retrained([two], {1: model(1, 2), 2: model(2, 2)})
        assert book.closed_shards() == set()
        assert book.head() == {0: model(0, 1), 1: model(1, 2), 2: model(2, 2)}


def test_a_restored_backup_of_the_data_is_matched(path):
    """While the salt is kept; a request that was only made has no tombstone."""
    with Ledger.open(path, RUN) as book:
        gone, kept, asked = book.request([([1, "a"], "me"), ([2, "b"], "me"), ([3, "c"], "me")])
        bring(book, [gone, kept], State.PURGED)
        data = np.array([3, 2, 1, 0])
        assert book.match(data).tolist() == [False, True, True, False]
        book.attest([gone])
        until = datetime(2100, 6, 1, 12, tzinfo=timezone(timedelta(hours=2)))
        book.attest([kept], until)
        assert book.get(kept).salt_due == until and book.get(gone).salt_due is None
        assert book.match(data).tolist() == [False, True, False, False]
        assert book.match(np.array(["a", "b", "c", "2"])).tolist() == [False, True, False, False]
        assert book.match([2, "2", "b", 1]).tolist() == [True, False, True, False]
        assert book.match([]).shape == (0,)
        assert book.expire(until.astimezone(UTC) - timedelta(seconds=1)) == []
        assert book.match(data).any()
        assert book.expire(until) == [kept] and book.expire(until) == []
        assert not book.match(data).any()
        assert asked == 3 and book.ids(asked) == [3, "c"]


def test_a_salt_destroyed_by_a_killed_call_is_not_called_kept(path, monkeypatch):
    with Ledger.open(path, RUN) as book:
        numbers = book.request([([1], "me")])
        bring(book, numbers, State.PURGED)
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            killed = Mock(side_effect=KeyboardInterrupt)
            patch.setattr(book, "_scrub", killed)
            book.attest(numbers)
        salts = secrets_of(path, 1)
        assert book.get(1).state == "purged" and salts == []
        book.attest(numbers, LATER)
        assert book.get(1).salt_destroyed is not None and book.expire(LATER) == []


# ---- the file ------------------------------------------------------------------------------------


def test_another_run_names_both(path):
    Ledger.open(path, "run-one").close()
    with pytest.raises(ValueError, match="of run 'run-one', not of 'run-two'"):
        Ledger.open(path, "run-two")
    Ledger.open(path, "run-one").close()


def test_what_is_no_ledger_is_left_alone(path):
    for content in (b"hello, this is text" * 100, b"x"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="no ledger"):
            Ledger.open(path, RUN)
        assert path.read_bytes() == content
    path.unlink()
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE other (a)")
    path.chmod(0o644)
    content = path.read_bytes()
    with pytest.raises(ValueError, match="an SQLite file, but no ledger"):
        Ledger.open(path, RUN)
    assert path.read_bytes() == content and path.stat().st_mode & 0o777 == 0o644
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        Ledger.open(path, RUN)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        Ledger.open(path / "nowhere" / "ledger.sqlite", RUN)


def test_another_version_and_damage(path):
    with Ledger.open(path, RUN) as book:
        book.request([([i], "me") for i in range(500)])
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 7")
    with pytest.raises(ValueError, match="has version 7, this software 1"):
        Ledger.open(path, RUN)
    with closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 1")
    data = bytearray(path.read_bytes())
    data[8192:] = b"\xff" * (len(data) - 8192)
    path.write_bytes(data)
    with pytest.raises(ValueError, match="no ledger, or a damaged one"):
        with Ledger.open(path, RUN) as book:
            book.requests()


def try_as_nobody(folder):
    """Tries a read-only file and a read-only folder, as somebody whom that stops."""
    path = Path(folder, "ledger.sqlite")
    Ledger.open(path, RUN).close()
    path.chmod(0o444)
    if os.geteuid() == 0:
        os.setgid(65534)
        os.setuid(65534)
    else:
        Path(folder).chmod(0o555)
    for target in (path, path.with_name("new.sqlite")):
        try:
            Ledger.open(target, RUN).close()
            print("opened")
        except OSError as error:
            print(type(error).__name__, error)
    Path(folder).chmod(0o755) if os.geteuid() != 65534 else None


def test_read_only_says_what_to_do(quick_folder):
    quick_folder.chmod(0o755)
    with in_process(f"t.try_as_nobody({str(quick_folder)!r})") as process:
        lines = process.communicate()[0].splitlines()
    assert len(lines) == 2
    for line, name in zip(lines, ("ledger.sqlite", "new.sqlite"), strict=True):
        assert re.fullmatch(
            rf"PermissionError .*must be writable by who runs this: '.*{name}'", line
        )
        assert line.count("must be writable") == 1


@pytest.mark.parametrize("room", [*range(6), 9, 17])
def test_a_full_disk_leaves_the_state_before(path, room):
    """SQLite's page limit ends in the very error that a full disk does."""
    with Ledger.open(path, RUN) as book:
        done = book.request([([i], "me") for i in range(100)])
        pages = book._db.execute("PRAGMA page_count").fetchone()[0]
        book._db.execute(f"PRAGMA max_page_count = {pages + room}")
        with pytest.raises(DiskFullError, match="ledger.sqlite: no room on disk"):
            for i in range(1000):
                done += book.request([([f"{i} {j}" * 10 for j in range(3)], "me")])
        assert [r.number for r in book.requests()] == done
        assert sum(len(book.ids(n)) for n in done) == 100 + 3 * (len(done) - 100)
        book._db.execute("PRAGMA max_page_count = 100000")
        bring(book, done, State.ATTESTED)


# ---- several processes ---------------------------------------------------------------------------

HOLD = """
with t.Ledger.open({path!r}, t.RUN) as book, book.exclusive():
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("end", ["release", "kill"])
def test_one_process_forgets_at_a_time(path, end):
    with Ledger.open(path, RUN) as book, in_process(HOLD.format(path=str(path))) as other:
        assert other.stdout.readline() == "held\n"
        since = rf"{datetime.now(UTC):%Y-%m-%d}T..:..:"
        with pytest.raises(
            TimeoutError, match=rf"lock is held by process {other.pid} since {since}"
        ):
            with book.exclusive():
                raise AssertionError("two at once")
        with pytest.raises(TimeoutError, match=f"process {other.pid} since"):  # and still says so
            with book.exclusive(0.2):
                raise AssertionError("two at once")
        assert book.request([([1], "me")]) == [1]  # what needs no exclusive right goes on
        if end == "release":
            other.stdin.write("\n")
            other.stdin.flush()
        else:
            other.kill()
        with book.exclusive(60):
            with Ledger.open(path, RUN) as second:
                with pytest.raises(TimeoutError, match=f"process {os.getpid()} since"):
                    with second.exclusive():
                        raise AssertionError("two at once")
        with book.exclusive():  # given back
            pass
        for wrong in (-1.0, float("nan")):
            with pytest.raises(ValueError, match="at least 0"):
                with book.exclusive(wrong):
                    pass


ASK = """
with t.Ledger.open({path!r}, t.RUN) as book:
    print(*(book.request([([f"{{i}}-{name}", i], "{name}")])[0] for i in range(40)))
"""


def test_requests_of_several_processes_at_once(path):
    """From the making of the file on, while another one purges and attests."""
    code = [ASK.format(path=str(path), name=name) for name in "abc"]
    processes = [in_process(one) for one in code]
    done = 0
    with Ledger.open(path, RUN) as book:
        while done < 120:
            todo = [request.number for request in book.pending()]
            if todo:
                bring(book, todo, State.ATTESTED)
                done += len(todo)
            else:
                assert any(process.poll() is None for process in processes) or book.pending()
        numbers = []
        for process in processes:
            numbers += map(int, process.communicate()[0].split())
            assert process.returncode == 0
        assert sorted(numbers) == list(range(1, 121))
        assert [r.number for r in book.requests()] == sorted(numbers)
        assert {(r.who, len(r.hmacs)) for r in book.requests()} == {("a", 2), ("b", 2), ("c", 2)}


def make_at_once(base):
    """Several processes make one ledger, twenty times; returns how many failed."""
    failed = 0
    for turn in range(20):
        path, start, children = Path(base, f"ledger{turn}"), time.time() + 0.02, []
        for name in "abcdef":
            children.append(os.fork())
            if children[-1] == 0:
                try:
                    while time.time() < start:
                        pass
                    with Ledger.open(path, RUN) as book:
                        book.request([([name], "me")])
                    os._exit(0)
                finally:
                    os._exit(1)
        failed += sum(os.waitpid(child, 0)[1] != 0 for child in children)
        with Ledger.open(path, RUN) as book:
            assert len(book.requests()) == 6 - failed
    return failed


def test_several_processes_make_it_at_once(quick_folder):
    with in_process(f"print(t.make_at_once({str(quick_folder)!r}))") as process:
        assert process.communicate()[0] == "0\n"


def test_a_reader_that_stays_is_named_and_nothing_called_gone(path, monkeypatch):
    monkeypatch.setattr(sqlite_file, "_BUSY_SECONDS", 0.2)
    with Ledger.open(path, RUN) as book, closing(sqlite3.connect(path)) as other:
        numbers = book.request([(["canary-1"], "me")])
        bring(book, numbers, State.RETRAINED)
        other.execute("BEGIN")
        other.execute("SELECT * FROM ids").fetchall()
        with pytest.raises(TimeoutError, match="another process reads"):
            book.purged(numbers)
        assert book.get(1).state == "retrained" and book.ids(1) == []
        other.execute("COMMIT")
        book.purged(numbers)
        assert found_in(path.parent, [b"canary-1"]) == []


# ---- speed ---------------------------------------------------------------------------------------


def test_ten_thousand_requests_and_a_million_ids(path, record_property):
    with Ledger.open(path, RUN) as book:
        start = time.perf_counter()
        numbers = book.request([([i], "me") for i in range(10_000)])
        shards = {number: [number % 20] for number in numbers}
        book.tombstone(shards, {s: model(s) for s in range(20)})
        middle = time.perf_counter()
        found = book.match(np.arange(-500_000, 500_000))
        matched = time.perf_counter()
        assert found.sum() == 10_000 and found[500_000:510_000].all()
        book.retrained(numbers, {s: model(s, 1) for s in range(20)})
        book.purged(numbers)
        book.attest(numbers)
        assert len(book.requests()) == 10_000 and not book.pending()
        record_property("seconds to match 1e6 ids", matched - middle)
        record_property("seconds for 1e4 requests", time.perf_counter() - start - matched + middle)
