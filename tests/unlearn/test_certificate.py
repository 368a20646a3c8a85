"""What a certificate says, that any change of it shows, and that a kill leaves whole files."""

import copy
import dataclasses
import errno
import hashlib
import inspect
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fourfold.runtime import host_arrays
from fourfold.runtime.host_arrays import DiskFullError
from unlearn import certificate
from unlearn.ledger import Ledger, Request, State

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
HOSTILE = """<script>alert("x")</script> & 'Ä' </main> <b onclick=x>"""
TIMES = {state: datetime(2026, 3, 1 + i, 12, i, 5, 7, UTC) for i, state in enumerate(State)}


def request(codes=1, shards=(0, 3), **changes):
    """An attested request as a ledger gives it."""
    names = ("before", "after")
    before, after = (
        {s: hashlib.sha256(f"{n}{s}".encode()).hexdigest() for s in shards} for n in names
    )
    hmacs = tuple(hashlib.sha256(bytes([i % 256, i // 256])).hexdigest() for i in range(codes))
    made = Request(
        7, HOSTILE, State.ATTESTED, TIMES, hmacs, before, after, None, TIMES[State.ATTESTED]
    )
    return dataclasses.replace(made, **changes)


def leaves(value, at=()):
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*at, key))
    else:
        yield at, value


class Page(HTMLParser):
    """Text by element, in order; fails on tags that aren't closed in turn."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.attributes = [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, *pair) for pair in attrs]
        self.found.append([tag, ""])
        if tag != "meta":
            self.open.append((tag, len(self.found) - 1))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for _, at in self.open:
            self.found[at][1] += data

    def texts(self, tag):
        return [text for name, text in self.found if name == tag]


def test_it_says_all_that_the_ledger_knows(tmp_path):
    facts = {"run": "c0ffee", "devices": {"kind": "cpu", "count": 8}, "loss": 0.1, "odd": HOSTILE}
    asked = request(codes=3)
    path, _ = certificate.write(tmp_path / "made" / "here", asked, facts)
    document = json.loads(path.read_text())
    body = {key: value for key, value in document.items() if key != "sha256"}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode("ascii")
    assert document["sha256"] == hashlib.sha256(canonical).hexdigest()
    assert list(document) == sorted(document) and document == certificate.verify(path)
    assert (document["request"], document["who"], document["records"]) == (7, HOSTILE, 3)
    assert document["hmac_sha256"] == list(asked.hmacs)
    assert document["times"] == {str(state): at.isoformat() for state, at in TIMES.items()}
    assert document["shards"] == [
        {"shard": s, "before": asked.before[s], "after": asked.after[s]} for s in (0, 3)
    ]
    assert document["salt_destroyed"] == TIMES[State.ATTESTED].isoformat()
    assert document["salt_due"] is None and document["facts"] == facts
    assert {"python", "jax", "jaxlib", "flax", "optax", "numpy"} <= set(document["software"])
    text = " ".join(document["guaranteed"])
    assert "bit-identical to training the same configuration from scratch" in text
    text = " ".join(document["not_guaranteed"])
    assert all(word in text for word in ("outside the run's folder", "Backups", "adaptive"))


def test_the_same_request_gives_the_same_bytes(tmp_path):
    first = certificate.write(tmp_path / "a", request(), {"b": 1, "a": 2})
    second = certificate.write(tmp_path / "b", request(), {"a": 2, "b": 1})
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]
    assert [p.name for p in first] == ["request_000007.json", "request_000007.html"]


def test_any_change_shows(tmp_path):
    path, _ = certificate.write(tmp_path, request(codes=2), {"run": "c0ffee", "n": [1, None]})
    whole = json.loads(path.read_text())
    places = list(leaves(whole))
    assert len(places) > 30
    for at, value in places:
        changed = copy.deepcopy(whole)
        inner = changed
        for key in at[:-1]:
            inner = inner[key]
        inner[at[-1]] = value + 1 if isinstance(value, int) else f"{value}."
        path.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="was changed|is no certificate|has version 2"):
            certificate.verify(path)
    for key in whole:
        path.write_text(json.dumps({k: v for k, v in whole.items() if k != key}))
        with pytest.raises(ValueError, match="was changed|is no certificate|has version None"):
            certificate.verify(path)
    path.write_text(json.dumps(dict(reversed(whole.items())), indent=7))  # no change of meaning
    assert certificate.verify(path) == whole
    for text in ("", "[1]", "{", "null", "\ufeff{}"):
        path.write_text(text)
        with pytest.raises(ValueError, match="is no certificate"):
            certificate.verify(path)


def test_the_page_is_whole_closed_and_escaped(tmp_path):
    facts = {"run": "c0ffee", HOSTILE: HOSTILE, "nested": {"x": [HOSTILE, 1]}}
    asked = request(codes=3)
    path, page = certificate.write(tmp_path, asked, facts)
    text = page.read_text(encoding="utf-8")
    parsed = Page(text)
    everything = " ".join(parsed.texts("html")[0].split())
    assert HOSTILE in everything and everything.count(HOSTILE) >= 3
    assert not parsed.texts("script") and not parsed.texts("b")
    values = [*asked.hmacs, *asked.before.values(), *asked.after.values()]
    values += [
        certificate.verify(path)["sha256"],
        *certificate.GUARANTEE,
        *certificate.NOT_GUARANTEED,
    ]
    assert all(" ".join(value.split()) in everything for value in values)
    assert all(f"{at:%Y-%m-%d %H:%M:%S} UTC" in everything for at in TIMES.values())
    assert "3 records were forgotten" in everything and "destroyed on 2026-03-05" in everything
    assert len(parsed.texts("h1")) == len(parsed.texts("main")) == len(parsed.texts("title")) == 1
    assert parsed.texts("title")[0] and ("html", "lang", "en") in parsed.attributes
    assert len(parsed.texts("caption")) == len(parsed.texts("table")) == 3
    scopes = [a for a in parsed.attributes if a[:2] == ("th", "scope")]
    assert len(scopes) == len(parsed.texts("th")) and parsed.texts("th")
    # No resource from elsewhere, and nothing that runs.
    names = {name for _, name, _ in parsed.attributes}
    assert names <= {
        "lang",
        "charset",
        "name",
        "content",
        "http-equiv",
        "scope",
        "datetime",
        "class",
    }
    (style,) = parsed.texts("style")
    assert not re.search(r"url\(|@import|https?:", style)
    assert "prefers-color-scheme: dark" in style and "@media print" in style
    assert style.count("{") == style.count("}")


def test_a_page_of_many_of_none_and_of_a_kept_salt(tmp_path):
    path, page = certificate.write(tmp_path, request(codes=250), {})
    assert len(certificate.verify(path)["hmac_sha256"]) == 250
    parsed = Page(page.read_text())
    assert sum(len(text) == 64 for text in parsed.texts("li")) == 100
    assert "And 150 more, in request_000007.json." in parsed.texts("html")[0]
    due = datetime(2027, 1, 2, 3, 4, 5, tzinfo=UTC)
    kept = request(shards=(), salt_destroyed=None, salt_due=due)
    path, page = certificate.write(tmp_path, kept, {})
    assert certificate.verify(path)["salt_due"] == due.isoformat()
    text = " ".join(Page(page.read_text()).texts("html")[0].split())
    assert "It is kept until 2027-01-02 03:04:05 UTC" in text and "destroyed" not in text
    assert "1 record was forgotten" in text and "an earlier request had removed the records" in text


def test_from_a_ledger_without_the_id(tmp_path):
    with Ledger.open(tmp_path / "ledger.sqlite", "c0ffee") as book:
        numbers = book.request([(["canary-1", 7311283114909127423], "Alice")])
        with pytest.raises(
            ValueError, match="request 1 is requested; a certificate is for attested"
        ):
            certificate.write(tmp_path, book.get(1), {})
        book.tombstone({1: [0]}, {0: "a" * 64})
        book.retrained(numbers, {0: "b" * 64})
        book.purged(numbers)
        with pytest.raises(ValueError, match="request 1 is purged"):
            certificate.write(tmp_path, book.get(1), {})
        book.attest(numbers)
        paths = certificate.write(tmp_path / "certificates", book.get(1), {})
    (canary,) = [7311283114909127423]
    needles = [
        b"canary",
        str(canary).encode(),
        canary.to_bytes(8, "big"),
        canary.to_bytes(8, "little"),
    ]
    assert not [n for n in needles for path in paths if n in path.read_bytes()]


@pytest.mark.parametrize(
    "facts", [{"x": object()}, {"x": float("nan")}, {"x": {1, 2}}, {"x": b"y"}]
)
def test_facts_that_are_no_json_are_refused_before_work(tmp_path, facts):
    with pytest.raises(ValueError, match="facts must be JSON values by name"):
        certificate.write(tmp_path / "new", request(), facts)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("which", [0, 1])
def test_a_failing_disk_leaves_what_was_there(tmp_path, monkeypatch, number, which):
    paths = certificate.write(tmp_path, request(), {"old": True})
    before = [path.read_bytes() for path in paths]
    calls = itertools.count()

    def fsync(_, real=os.fsync):
        if next(calls) == which:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fsync)
    expected = DiskFullError if number == errno.ENOSPC else OSError
    with pytest.raises(expected, match="no room on disk for a certificate|Input/output"):
        certificate.write(tmp_path, request(), {"old": False})
    monkeypatch.undo()
    assert paths[0].read_bytes() == before[0] and certificate.verify(paths[0])
    assert (paths[1].read_bytes() == before[1]) == (which == 0)  # the page is written first
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def kill_everywhere(base):
    """Dies at every line of the writing; returns at how many."""
    certificate._software()
    wanted = [
        certificate.write(Path(base, name), request(), {"new": new})
        for name, new in (("0", 0), ("1", 1))
    ]
    old, new = ([path.read_bytes() for path in paths] for paths in wanted)
    watched = {certificate.write.__code__, inspect.unwrap(host_arrays.replacing).__code__}
    for step in itertools.count():
        folder = Path(base, f"run{step}")
        certificate.write(folder, request(), {"new": 0})
        child = os.fork()
        if child == 0:
            count = itertools.count()

            def trace(frame, event, _, count=count, step=step):
                if frame.f_code not in watched:
                    return None
                if event == "line" and next(count) == step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return trace

            try:
                sys.settrace(trace)
                certificate.write(folder, request(), {"new": 1})
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        paths = [folder / path.name for path in wanted[0]]
        if not os.WIFSIGNALED(status):
            assert status == 0 and [path.read_bytes() for path in paths] == new
            return step
        found = [path.read_bytes() for path in paths]
        assert all(
            data in pair for data, pair in zip(found, zip(old, new, strict=True), strict=True)
        )
        certificate.verify(paths[0])
        assert found != [new[0], old[1]]  # the JSON file is the later one
        certificate.write(folder, request(), {"new": 1})
        assert [path.read_bytes() for path in paths] == new
        assert sorted(folder.iterdir()) == sorted(paths)


def test_killed_at_any_line_its_files_are_whole(tmp_path):
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}, {str(HERE)!r}]; import test_certificate as t"
    )
    run = f"{code}; print(t.kill_everywhere({str(tmp_path)!r}))"
    output = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True)
    assert int(output.stdout) > 20
