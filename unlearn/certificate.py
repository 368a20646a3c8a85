"""The certificate of a request: what was forgotten, how it shows, and what nobody can promise.

It is a JSON file, with a digest of itself, and a page for people to read or print. Neither has an
id; both are the same, bit by bit, whenever they are written on the same software.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from html import escape
from importlib import metadata
from pathlib import Path
from typing import Any

from fourfold.runtime.host_arrays import DiskFullError, is_disk_full, replacing, sync
from unlearn.ledger import Request, State

_FORMAT, _VERSION = "fourfold unlearning certificate", 1
_SOFTWARE = ("fourfold", "jax", "jaxlib", "flax", "optax", "numpy")
_SHOWN = 100  # codes on the page; the JSON file has all
_STEPS = {
    "requested": "asked",
    "tombstoned": "affected shards stopped serving",
    "retrained": "new models in place",
    "purged": "records and old checkpoints deleted",
    "attested": "attested",
}
_STYLE = """
:root { color-scheme: light dark; --paper: #fdfcfa; --ink: #23211e; --soft: #6b665f;
  --rule: #e2ddd5; --accent: #9a3b26; }
@media (prefers-color-scheme: dark) { :root { --paper: #181715; --ink: #e6e2db; --soft: #a19b92;
  --rule: #37342f; --accent: #e59a80; } }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #444; } }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 1.0625rem/1.55 Charter, "Iowan Old Style", Georgia, "DejaVu Serif", serif; }
main { max-width: 46rem; margin: 0 auto; padding: 3rem 1.5rem; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; font-weight: 600; break-after: avoid; }
h2 { font-size: 1.35rem; margin-top: 2.2rem; padding-top: 1.4rem;
  border-top: 1px solid var(--rule); }
.lede { font-size: 1.2rem; padding-left: 1.1rem; border-left: 3px solid var(--accent); }
table { border-collapse: collapse; width: 100%; font-size: 0.95rem; }
caption { text-align: left; color: var(--soft); }
th, td { padding: 0.5rem 1.2rem 0.5rem 0; text-align: left; vertical-align: baseline;
  border-bottom: 1px solid var(--rule); }
thead th { overflow-wrap: normal; }
tr, li { break-inside: avoid; }
code { font: 0.82rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
"""
GUARANTEE = (
    "The models of the affected shards, with the state of their optimisers, are bit-identical to "
    "training the same configuration from scratch on the surviving records, with the software "
    "named here on the same kind of hardware.",
    "The models of the other shards never saw the records.",
    "The records, every checkpoint that saw them, and their ids were deleted from the run's folder "
    "before this was written.",
)
NOT_GUARANTEED = (
    "Copies outside the run's folder: the source of the data, exports, logs of other systems, and "
    "models or predictions that were handed out before.",
    "Backups and snapshots, the ledger's among them, and what a disk keeps of deleted files. A "
    "restored backup of the data is recognised only while the key of the HMACs exists.",
    "Requests that depend on what was published (adaptive requests), unless all that is published "
    "is differentially private with respect to the assignment of records to shards: which records "
    "share a shard may show.",
    "Forgery: the digest finds accidental changes. It is no signature, since whoever changes the "
    "certificate can compute it anew; keep a copy, or the digest, elsewhere.",
)


def write(
    folder: str | os.PathLike[str], request: Request, facts: Mapping[str, Any]
) -> tuple[Path, Path]:
    """Writes a certificate; each of its files is whole or not there, and replaces an older one.

    Args:
      folder: where to; made if it isn't there.
      request: attested.
      facts: what else to say of the run, JSON values by name: its fingerprint, the devices, the
        defence against adaptive requests. They must not name a record.

    Returns:
      Paths of the JSON file and of the page.

    Raises:
      ValueError: the request isn't attested, or a fact is no JSON value.
      DiskFullError: no room; older files are as they were.
      OSError: the folder can't be written.
    """
    document = _document(request, facts)
    folder = Path(folder)
    stem = f"request_{request.number:06d}"
    paths = folder / f"{stem}.json", folder / f"{stem}.html"
    data = json.dumps(document, sort_keys=True, indent=2).encode() + b"\n"
    page = _page(document, paths[0].name).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in ((paths[1], page), (paths[0], data)):  # the last vouches for the page
            with replacing(path) as draft:
                draft.write_bytes(content)
        sync(folder)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFullError(f"{folder}: no room on disk for a certificate") from error
        raise
    return paths


def verify(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the JSON file of a certificate and computes its digest anew.

    Returns:
      What it says.

    Raises:
      ValueError: it is no certificate, of another version, or was changed; the message has both
        digests.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no certificate: {error}") from error
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise ValueError(f"{path} is no certificate")
    if document.get("version") != _VERSION:
        raise ValueError(
            f"{path} has version {document.get('version')}, this software reads {_VERSION}"
        )
    if (found := document.get("sha256")) != (computed := digest(document)):
        raise ValueError(f"{path} was changed: it says {found}, its digest is {computed}")
    return document


def digest(document: Mapping[str, Any]) -> str:
    """SHA-256, hexadecimal, of a certificate without its member `sha256`.

    Of JSON as ASCII, with sorted keys and no white space.
    """
    body = {key: value for key, value in document.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _document(request: Request, facts: Mapping[str, Any]) -> dict[str, Any]:
    if request.state is not State.ATTESTED:
        raise ValueError(
            f"request {request.number} is {request.state}; a certificate is for attested ones"
        )
    try:
        facts = json.loads(json.dumps(dict(facts), sort_keys=True, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"facts must be JSON values by name: {error}") from error
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "request": request.number,
        "who": request.who,
        "records": len(request.hmacs),
        "hmac_sha256": list(request.hmacs),
        "salt_destroyed": request.salt_destroyed and request.salt_destroyed.isoformat(),
        "salt_due": request.salt_due and request.salt_due.isoformat(),
        "times": {str(state): at.isoformat() for state, at in request.times.items()},
        "shards": [
            {"shard": shard, "before": before, "after": request.after[shard]}
            for shard, before in sorted(request.before.items())
        ],
        "guaranteed": list(GUARANTEE),
        "not_guaranteed": list(NOT_GUARANTEED),
        "facts": facts,
        "software": _software(),
    }
    return document | {"sha256": digest(document)}


@functools.cache  # some milliseconds a name
def _software() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _page(document: Mapping[str, Any], name: str) -> str:
    number, count = document["request"], document["records"]
    times = document["times"]
    what = "1 record was" if count == 1 else f"{count} records were"
    steps = [(_STEPS[state], _time(at)) for state, at in times.items()]
    models = [
        (row["shard"], _code(row["before"]), _code(row["after"])) for row in document["shards"]
    ]
    if not models:
        models = [("none", "an earlier request had removed the records", "")]
    codes = [f"<li>{_code(code)}</li>\n" for code in document["hmac_sha256"][:_SHOWN]]
    rest = f"<p>And {count - _SHOWN} more, in {escape(name)}.</p>" if count > _SHOWN else ""
    facts = [(escape(key), _value(value)) for key, value in document["facts"].items()]
    software = [(escape(key), escape(value)) for key, value in document["software"].items()]
    check = f"python -c \"from unlearn.certificate import verify; verify('{name}')\""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Certificate of unlearning, request {number}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<h1>Certificate of unlearning, request {number}</h1>
<p class="lede">{what} forgotten, as {escape(document["who"])} asked on {_time(times["requested"])}.
It was done on {_time(times["attested"])}.</p>
<h2>What was done</h2>
{_table("Times in UTC", ("Step", "Time"), steps)}
<h2>Models</h2>
{_table("SHA-256 of the affected shards' models", ("Shard", "Before", "After"), models)}
<h2>Records</h2>
<p>{_salt(document)}</p>
<ol>
{"".join(codes)}</ol>
{rest}
<h2>What is guaranteed</h2>
{_list(document["guaranteed"])}
<h2>What is not</h2>
{_list(document["not_guaranteed"])}
<h2>Run and software</h2>
{_table("As they were when this was written", ("Name", "Value"), facts + software)}
<h2>Digest</h2>
<p>SHA-256 of {escape(name)}: {_code(document["sha256"])}</p>
<p>To compute it anew: {_code(check)}</p>
</main>
</body>
</html>
"""


def _salt(document: Mapping[str, Any]) -> str:
    text = "HMAC-SHA256 of each record's id, under a key drawn for this request alone."
    if at := document["salt_destroyed"]:
        return f"{text} It was destroyed on {_time(at)}: nobody can test an id against them now."
    return (
        f"{text} It is kept until {_time(document['salt_due'])}, so that the records are known "
        "should a backup of the data be restored. Until then, who has it can test an id against "
        "them."
    )


def _table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML; the first cell of a row names it."""
    columns = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>\n'
        for first, *cells in rows
    )
    return (
        f"<table><caption>{caption}</caption>\n<thead><tr>{columns}</tr></thead>\n"
        f"<tbody>\n{body}</tbody></table>"
    )


def _list(items: Sequence[str]) -> str:
    return "<ul>\n" + "".join(f"<li>{escape(item)}</li>\n" for item in items) + "</ul>"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _time(text: str) -> str:
    return f'<time datetime="{text}">{text[:10]} {text[11:19]} UTC</time>'


def _value(value: Any) -> str:
    return escape(value) if isinstance(value, str) else _code(json.dumps(value, ensure_ascii=False))
