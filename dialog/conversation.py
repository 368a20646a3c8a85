"""Conversations to ids, truncated from the left by turns, and batches of ids to arrays."""

from __future__ import annotations

import functools
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from dialog.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


class Turn(NamedTuple):
    """What one speaker says at once.

    Attributes:
      speaker: for Llama one of `ROLES`; else any name. "system" is what holds for the whole
        conversation, such as a persona or memories.
      text: not blank.
    """

    speaker: str
    text: str


def encode_conversation(
    tokenizer: Tokenizer,
    turns: Sequence[Turn],
    max_tokens: int,
    *,
    prefixes: Mapping[str, str] | None = None,
    keep_system: bool = True,
    reply: bool = True,
) -> list[int]:
    """Ids of a conversation, as the tokenizer's family was trained to read it.

    Blenderbot, BlenderbotSmall, BART and BERT know turns by what stands between them (`LAYOUTS`),
    Llama's are ChatML: `<|im_start|>role`, a line's end, the text, `<|im_end|>`, a line's end; and
    a conversation that doesn't begin with a system turn gets the template's default one. White
    space is part of a text, so one with a line's end (BlenderbotSmall) or two spaces (Blenderbot)
    reads as several turns.

    Truncation is from the left. The oldest turns go whole, until one is left of which the last
    words fit; its first words go, and all of it where its last word doesn't fit. Its speaker stays
    before what is left. Of a last turn whose last word is too long, the last letters stay.

    Args:
      tokenizer: of the model that reads the conversation.
      turns: from the oldest to the newest.
      max_tokens: the most ids, all control tokens counted.
      prefixes: by speaker, a text to put before each turn, such as `{"user": "Person 1: "}`; for
        all speakers or None. Not for Llama, whose roles say who speaks.
      keep_system: whether turns of the speaker "system" are kept whole; else they go like others.
      reply: whether Llama is asked for the assistant's next turn.

    Returns:
      At least one and at most `max_tokens` ids.

    Raises:
      ValueError: there are no turns, or one says nothing; a speaker has no role or prefix; or
        `max_tokens` is too few for the system turns and the last letter of the last turn.
    """
    if not turns:
        raise ValueError("a conversation must have at least one turn, found none")
    llama = tokenizer.family == "llama"
    if llama and prefixes is not None:
        raise ValueError(f"prefixes must be None for llama, whose turns have roles: {prefixes}")
    turns = [Turn(*turn) for turn in turns]
    _check_turns(tokenizer, turns, ROLES if llama else prefixes)
    if llama and tokenizer.default_system is not None and turns[0].speaker != "system":
        turns = [Turn("system", tokenizer.default_system), *turns]
    layout = tokenizer.layout
    opening, closing = tokenizer.control(layout.opening), tokenizer.control(layout.closing)
    if llama and reply:
        closing = [*tokenizer.control(["<|im_start|>"]), *tokenizer.encode("assistant\n")]
    between = tokenizer.encode(layout.separator)
    render = functools.partial(_render, tokenizer, prefixes or {})
    last = len(turns) - 1
    kept = {
        i: render(turn, turn.text)
        for i, turn in enumerate(turns)
        if keep_system and turn.speaker == "system" and i != last
    }
    room = max_tokens + len(between) - len(opening) - len(closing)
    room -= sum(len(between) + len(ids) for ids in kept.values())
    for i in reversed([i for i in range(len(turns)) if i not in kept]):
        room -= len(between)
        turn, ids = turns[i], render(turns[i], turns[i].text)
        cut = len(ids) > room
        if cut:
            ids = _end_that_fits(tokenizer, turn, room, render, r"\S+")
            if ids is None and i == last:
                ids = _end_that_fits(tokenizer, turn, room, render, r"\S")
        if ids is None and i == last:
            letter = render(turn, turn.text[_starts(tokenizer, turn.text, r"\S")[-1] :])
            raise ValueError(
                f"max_tokens must be at least {max_tokens - room + len(letter)} for the last "
                f"letter of the last turn with all that stays around it, found {max_tokens}"
            )
        if ids is not None:
            kept[i] = ids
            room -= len(ids)
        if cut:
            break
    body = [ids for _, ids in sorted(kept.items())]
    inner = [token for i, ids in enumerate(body) for token in ([*between, *ids] if i else ids)]
    return [*opening, *inner, *closing]


def bucket(length: int) -> int:
    """The least power of two from 16 on that is at least `length`.

    >>> [bucket(n) for n in (0, 16, 17, 100)]
    [16, 16, 32, 128]
    """
    return max(16, 1 << (length - 1).bit_length())


def pad(
    batch: Sequence[Sequence[int]],
    pad_id: int,
    *,
    side: Literal["left", "right"] = "right",
    buckets: Sequence[int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids in one array of a length out of few, so that few programs are compiled.

    Args:
      batch: N rows; a row may be empty, as that of a document that isn't there.
      pad_id: fills rows.
      side: where rows are filled: "right" for encoders and for training, "left" for the prompts
        of a decoder.
      buckets: lengths to choose from, such as powers of two up to the model's longest input; None
        for those from 16 on.

    Returns:
      Ids int32 `(N, L)`, and a mask bool `(N, L)` that is True at the rows' own ids. L is the least
      bucket that holds the longest row.

    Raises:
      ValueError: there are no rows, a row is longer than any bucket, or the side is unknown.

    >>> ids, mask = pad([[5, 6, 7], [8]], 0, side="left", buckets=(2, 4))
    >>> ids.tolist(), mask.sum(axis=1).tolist()
    ([[0, 5, 6, 7], [0, 0, 0, 8]], [3, 1])
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', found {side!r}")
    if not batch:
        raise ValueError("a batch must have at least one row, found none")
    longest = max(len(row) for row in batch)
    fitting = [b for b in ([bucket(longest)] if buckets is None else buckets) if b >= longest]
    if not fitting:
        raise ValueError(f"rows must fit one of the buckets {buckets}, found {longest} ids")
    length = min(fitting)
    ids = np.full((len(batch), length), pad_id, np.int32)
    mask = np.zeros((len(batch), length), bool)
    for n, row in enumerate(batch):
        own = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[n, own], mask[n, own] = row, True
    return ids, mask


def _render(tokenizer: Tokenizer, prefixes: Mapping[str, str], turn: Turn, text: str) -> list[int]:
    """Ids of a turn with this much of its text."""
    if tokenizer.family != "llama":
        return tokenizer.encode(prefixes.get(turn.speaker, "") + text)
    begin, end = tokenizer.control(["<|im_start|>", "<|im_end|>"])
    # The template's string has role and text together, so they are encoded together.
    return [begin, *tokenizer.encode(f"{turn.speaker}\n{text}"), end, *tokenizer.encode("\n")]


def _end_that_fits(
    tokenizer: Tokenizer,
    turn: Turn,
    room: int,
    render: Callable[[Turn, str], list[int]],
    pattern: str,
) -> list[int] | None:
    """The turn from the first match on with which it fits, or None.

    Found by bisection: less text has fewer ids, but for the odd one at the new first word, which
    has lost the space before it.
    """
    starts = _starts(tokenizer, turn.text, pattern)
    at = bisect_left(starts, True, key=lambda i: len(render(turn, turn.text[i:])) <= room)
    return render(turn, turn.text[starts[at] :]) if at < len(starts) else None


def _starts(tokenizer: Tokenizer, text: str, pattern: str) -> list[int]:
    """Where matches start, up to the last one from which on there is a token.

    WordPiece has none for zero-width and control characters.
    """
    starts = [match.start() for match in re.finditer(pattern, text)]
    while starts and not tokenizer.encode(text[starts[-1] :]):
        starts.pop()
    return starts


def _check_turns(
    tokenizer: Tokenizer, turns: Sequence[Turn], speakers: Collection[str] | None
) -> None:
    for i, (speaker, text) in enumerate(turns):
        if not _starts(tokenizer, text, r"\S+"):
            raise ValueError(f"the text of turn {i} must say something, found {text!r}")
        if speakers is not None and speaker not in speakers:
            raise ValueError(
                f"the speaker of turn {i} must be one of {', '.join(speakers)}, found {speaker!r}"
            )
