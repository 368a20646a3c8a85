"""What each family of models reads and writes: layouts, text to ids, ids to text as they come.

Text is only ever text: where `</s>` or `<|im_end|>` stands in it, those are letters, and never
become the control token of that name.
"""

from __future__ import annotations

import codecs
import functools
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, SupportsIndex

NEWLINE = "__newln__"  # BlenderbotSmall's token for a line's end


class Layout(NamedTuple):
    """What a family puts around texts and between turns, as it was trained.

    Attributes:
      alphabet: what its tokens are made of: "bytes" (GPT-2's byte-level BPE), "wordpiece" (a piece
        that goes on with a word begins in ##) or "subword" (subword-nmt's BPE of lower-cased words;
        a piece that its word goes on after ends in @@).
      pad: name of the control token that fills a batch.
      bos: of the one that begins a text.
      eos: of the one that ends a reply.
      unk: of the one for what the vocabulary can't spell.
      opening: control tokens before an input.
      closing: control tokens after an input.
      separator: text between turns, which is encoded by itself, as every turn is.
    """

    alphabet: Literal["bytes", "wordpiece", "subword"]
    pad: str
    bos: str
    eos: str
    unk: str | None = None
    opening: tuple[str, ...] = ()
    closing: tuple[str, ...] = ()
    separator: str = ""

    @property
    def control(self) -> set[str]:
        """Names of the control tokens that the family can't do without."""
        return {self.pad, self.bos, self.eos, *([self.unk] if self.unk else [])}


_BERT = Layout("wordpiece", "[PAD]", "[CLS]", "[SEP]", "[UNK]", ("[CLS]",), ("[SEP]",))
LAYOUTS = {
    # ParlAI's delimiter of two spaces, global end token, and leading space of each turn: in one
    # string, three spaces between turns. `</s> <s>`, of an example in transformers' documentation,
    # was never trained on.
    "blenderbot": Layout("bytes", "<pad>", "<s>", "</s>", "<unk>", (), ("</s>",), "  "),
    # ParlAI's defaults: one turn a line, and nothing at the input's end.
    "blenderbot-small": Layout(
        "subword", "__null__", "__start__", "__end__", "__unk__", separator="\n"
    ),
    # Not trained on turns; ParlAI fine-tunes it on one a line.
    "bart": Layout("bytes", "<pad>", "<s>", "</s>", "<unk>", ("<s>",), ("</s>",), "\n"),
    # One turn a line too, but a line's end is white space, which WordPiece doesn't see.
    "bert": _BERT,
    "dpr": _BERT,
    # ChatML, of which `conversation` knows the turns.
    "llama": Layout("bytes", "<|im_end|>", "<|im_start|>", "<|im_end|>"),
}


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer of one family; `tokens.load_tokenizer` makes it.

    Attributes:
      family: a key of `LAYOUTS`.
      tokens: by id, as the vocabulary spells them; None where an id has none.
      special: ids of the control tokens by name, that of the unknown token included.
      default_system: what the chat template says where a conversation has no system turn.
      pieces: ids of a text without any control token's.
    """

    family: str
    tokens: tuple[str | None, ...]
    special: dict[str, int]
    default_system: str | None
    pieces: Callable[[str], list[int]] = field(repr=False)

    @property
    def layout(self) -> Layout:
        """What the family puts around texts."""
        return LAYOUTS[self.family]

    @property
    def pad_id(self) -> int:
        """Id of the token that fills a batch."""
        return self.special[self.layout.pad]

    @property
    def eos_id(self) -> int:
        """Id of the token that ends a reply."""
        return self.special[self.layout.eos]

    def control(self, names: Iterable[str]) -> list[int]:
        """Ids of control tokens."""
        return [self.special[name] for name in names]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """Ids of a text.

        Args:
          text: any; the names of control tokens in it are letters.
          special: whether it is a whole input, with `opening` and `closing` of the layout.

        Raises:
          ValueError: the text has half of a surrogate pair, for which there is no UTF-8.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text must be without lone surrogates: {error}") from error
        ids = self.pieces(text)
        if not special:
            return ids
        return [*self.control(self.layout.opening), *ids, *self.control(self.layout.closing)]

    def encode_reply(self, text: str) -> list[int]:
        """Ids that a decoder learns to say: `opening`, the text, `eos`. Errors as `encode`."""
        return [*self.control(self.layout.opening), *self.encode(text), self.eos_id]

    def decode(self, ids: Iterable[SupportsIndex], *, special: bool = False) -> str:
        """Text of ids; bytes that aren't UTF-8 become U+FFFD.

        Blenderbot's leading space, which `encode` adds, is taken off again.

        Args:
          ids: integers, or an array of them.
          special: whether control tokens are shown; else they are left out.

        Raises:
          ValueError: an id has no token.
        """
        stream = StreamDecoder(self, special=special)
        return "".join([stream.feed(token_id) for token_id in ids]) + stream.finish()

    def spell(self, token_id: int) -> tuple[bytes, bool, bool]:
        """UTF-8 of a token; whether no space parts it from the one before; and the one after.

        Raises:
          ValueError: the id has no token.
        """
        token = self.tokens[token_id] if 0 <= token_id < len(self.tokens) else None
        if token is None:
            raise ValueError(f"ids must be of tokens, in [0, {len(self.tokens)}), found {token_id}")
        if self.layout.alphabet == "bytes":
            letters = _byte_of_letter()
            if token in self.special or not letters.keys() >= set(token):
                return token.encode(), True, True
            return bytes(letters[letter] for letter in token), True, True
        if self.layout.alphabet == "wordpiece":
            if token.startswith("##"):
                return token[2:].encode(), True, False
            return token.encode(), token in {".", ",", "?", "!"}, False
        if token == NEWLINE:
            return b"\n", True, True
        goes_on = token.endswith("@@")
        return token.removesuffix("@@").encode(), False, goes_on


class StreamDecoder:
    """Decodes ids as they come, to text that is never taken back.

    The parts in a row are what `Tokenizer.decode` gives. A character whose bytes are in several
    tokens comes with the last of them.

    Args:
      tokenizer: of the ids.
      special: whether control tokens are shown; else they are left out.
    """

    def __init__(self, tokenizer: Tokenizer, *, special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._hidden = frozenset(() if special else tokenizer.special.values())
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False
        self._glued = True  # the last token to the next one

    def feed(self, token_id: SupportsIndex) -> str:
        """The text that this id completes, often empty.

        Raises:
          ValueError: the id has no token.
        """
        index = operator.index(token_id)
        text, glued_before, glued_after = self._tokenizer.spell(index)
        if index in self._hidden:
            return ""
        if not self._begun and self._tokenizer.family == "blenderbot":
            text = text.removeprefix(b" ")
        if not (self._glued or glued_before):
            text = b" " + text
        self._begun, self._glued = True, glued_after
        return self._utf8.decode(text)

    def finish(self) -> str:
        """U+FFFD where a character's last bytes never came, else nothing."""
        return self._utf8.decode(b"", final=True)


@functools.cache
def _byte_of_letter() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes of Latin-1 are themselves, the others U+0100 onwards."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = [*map(chr, printable), *(chr(256 + n) for n in range(len(others)))]
    return dict(zip(letters, [*printable, *others], strict=True))
