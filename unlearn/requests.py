"""What a request to forget is, and what an id, a model and a time are to the ledger."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from operator import index

import numpy as np

_INT64 = 1 << 63


class State(StrEnum):
    """How far a request is; a state is recorded once it is reached, never before."""

    REQUESTED = "requested"
    """Its ids are known; its shards are not yet, so that none is closed for it."""
    TOMBSTONED = "tombstoned"
    """Its shards are known and must not serve."""
    RETRAINED = "retrained"
    """Models that never saw its records are in place, and serve."""
    PURGED = "purged"
    """The records are deleted, all that was made of them, and their ids in the ledger."""
    ATTESTED = "attested"
    """All is done; only the salt may be there yet."""


@dataclass(frozen=True)
class Request:
    """One call of one requester.

    Attributes:
      number: 1, 2, … in the order of arrival.
      who: who asked.
      state: how far it is.
      times: of each state so far, UTC.
      hmacs: HMAC-SHA256 of each id under the request's salt, hexadecimal.
      before: SHA-256, hexadecimal, of the model of each affected shard; empty until tombstoned.
      after: those of the new models; empty until retrained.
      salt_due: until when the salt was to be kept, UTC; None if not beyond attesting.
      salt_destroyed: when it was, UTC; None while it is there.
    """

    number: int
    who: str
    state: State
    times: Mapping[State, datetime]
    hmacs: tuple[str, ...]
    before: Mapping[int, str]
    after: Mapping[int, str]
    salt_due: datetime | None
    salt_destroyed: datetime | None


def check_request(ids: Iterable[str | int], who: str) -> tuple[list[bytes], str]:
    """Returns the ids of a request as bytes, each once, and who asks.

    Raises:
      ValueError: there are no ids, or one that is none; or who asks is empty or one of them.
    """
    if isinstance(ids, (str, bytes)):
        raise ValueError("the ids of a request must be a list, found a text")
    found = list(dict.fromkeys(map(id_bytes, ids)))
    if not found:
        raise ValueError(f"a request needs at least one id, that of {who!r} has none")
    if not isinstance(who, str) or not who.strip():
        raise ValueError(f"a request must say who asks, found {who!r}")
    if {b"s" + who.encode(), b"i" + who.encode()} & set(found):
        raise ValueError("who asks is kept for good, so that it can't be the id of a record")
    return found, who


def id_bytes(id_: object) -> bytes:
    """Returns an id as bytes that tell its type, so that 7 and "7" are two.

    Raises:
      ValueError: it is neither text nor an integer of 64 bits.

    >>> id_bytes(7), id_bytes("7")
    (b'i7', b's7')
    """
    if isinstance(id_, str):
        return b"s" + id_.encode()
    if isinstance(id_, (int, np.integer)) and not isinstance(id_, bool) and -_INT64 <= id_ < _INT64:
        return b"i%d" % id_
    raise ValueError(f"an id must be text or an integer of 64 bits, found {id_!r}")


def id_of(data: bytes) -> str | int:
    """Returns the id whose `id_bytes` these are."""
    return int(data[1:]) if data[:1] == b"i" else data[1:].decode()


def check_models(models: Mapping[int, str], shards: Collection[int]) -> dict[int, str]:
    """Returns models by shard.

    Raises:
      ValueError: they are no hashes, or not of just these shards.
    """
    models = {index(shard): model for shard, model in models.items()}
    if set(models) != set(shards):
        raise ValueError(f"models must be of shards {sorted(shards)}, found {sorted(models)}")
    for shard, model in models.items():
        if not re.fullmatch("[0-9a-f]{64}", model):
            raise ValueError(f"shard {shard}: a model is 64 hexadecimal digits, found {model!r}")
    return models


def utc_text(time: datetime) -> str:
    """Returns a time as text of fixed width, so that it sorts.

    Raises:
      ValueError: it has no zone.
    """
    if time.tzinfo is None:
        raise ValueError(f"a time must have a zone, found {time}")
    return time.astimezone(UTC).isoformat(timespec="microseconds")
