"""Tokenizers made from local files; nothing is ever fetched.

>>> tokenizer = load_tokenizer("SmolLM2-135M-Instruct.Q4_1.gguf", "llama")  # doctest: +SKIP
>>> tokenizer.decode(tokenizer.encode("It says <|im_end|>."))  # doctest: +SKIP
'It says <|im_end|>.'
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from dialog.models.gguf_weights import tokenizer_parts
from dialog.tokenizer import LAYOUTS, NEWLINE, Layout, StreamDecoder, Tokenizer

__all__ = ["LAYOUTS", "Layout", "StreamDecoder", "Tokenizer", "load_tokenizer"]

_CONTROL = 3  # the type of a control token in GGUF


def load_tokenizer(path: str | Path, family: str) -> Tokenizer:
    """Makes a family's tokenizer from local files.

    Args:
      path: a folder in Hugging Face's layout: with tokenizer.json; or, Llama's excepted, with
        vocab.json and merges.txt (BERT's and DPR's: vocab.txt), which BlenderbotSmall's is always
        made from. For Llama also a GGUF file whose digits are tokens by themselves, as SmolLM2's.
      family: a key of `LAYOUTS`: `model_type` in config.json.

    Raises:
      ValueError: the family is unknown; files are missing, broken or of another kind of tokenizer;
        or a control token is missing.
      ImportError: tokenizers, or gguf for such a file, isn't installed.
    """
    if family not in LAYOUTS:
        raise ValueError(f"family must be one of {', '.join(LAYOUTS)}, found {family!r}")
    path, layout = Path(path), LAYOUTS[family]
    if path.is_file() and family == "llama":
        return _from_gguf(path)
    plain = ("vocab.txt",) if layout.alphabet == "wordpiece" else ("vocab.json", "merges.txt")
    if family != "blenderbot-small" and (path / "tokenizer.json").is_file():
        return _from_json(path, family)
    if family == "llama" or not all((path / name).is_file() for name in plain):
        choices = {
            "llama": "a GGUF file or a folder with tokenizer.json",
            "blenderbot-small": f"a folder with {' and '.join(plain)}",
        }
        default = f"a folder with tokenizer.json or {' and '.join(plain)}"
        raise ValueError(
            f"a tokenizer of family {family!r} needs {choices.get(family, default)}, found {path}"
            + ("" if path.exists() else ", which doesn't exist; nothing is downloaded")
        )
    if layout.alphabet == "wordpiece":
        lines = (path / "vocab.txt").read_text(encoding="utf-8").split("\n")
        vocab = {line.rstrip("\r"): i for i, line in enumerate(lines) if line.rstrip("\r")}
        _check_control(vocab, layout, path)
        lower = _json(path / "tokenizer_config.json").get("do_lower_case", True)
        pieces = _word_pieces(vocab, lower)
    else:
        vocab = _json(path / "vocab.json")
        _check_control(vocab, layout, path)
        text = (path / "merges.txt").read_text(encoding="utf-8")
        merges = [s for s in text.split("\n") if s.strip() and not s.startswith("#version")]
        if layout.alphabet == "subword":
            pieces = _subwords(vocab, merges, layout, path)
        else:
            pieces = _byte_level(vocab, merges, path, prefix_space=family == "blenderbot")
    special = {name: vocab[name] for name in layout.control}
    if "<mask>" in vocab:
        special["<mask>"] = vocab["<mask>"]
    return Tokenizer(family, _by_id(vocab), special, None, pieces)


def _from_gguf(path: Path) -> Tokenizer:
    parts, layout = tokenizer_parts(path), LAYOUTS["llama"]
    vocab = {token: i for i, token in enumerate(parts.tokens)}
    _check_control(vocab, layout, path)
    typed = zip(parts.tokens, parts.types, strict=False)  # a file may lack the types
    control = {token for token, kind in typed if kind == _CONTROL}
    for token in vocab.keys() - control:
        if len(token) > 1 and any(letter in "0123456789" for letter in token):
            raise ValueError(
                f"{path}: digits must be tokens by themselves, as SmolLM2's are, found {token!r}; "
                f"read such a tokenizer from tokenizer.json"
            )
    pieces = _byte_level(vocab, parts.merges, path, digits=True)
    special = {name: vocab[name] for name in control | layout.control}
    return Tokenizer(
        "llama", tuple(parts.tokens), special, _default_system(parts.chat_template, path), pieces
    )


def _from_json(folder: Path, family: str) -> Tokenizer:
    path, layout = folder / "tokenizer.json", LAYOUTS[family]
    spec = _json(path)
    wanted = {"bytes": "ByteLevel", "wordpiece": "WordPiece"}[layout.alphabet]
    found = (spec.get("decoder") or {}).get("type")
    if found != wanted:
        raise ValueError(f"{path}: a decoder of {family!r} must be {wanted}, found {found}")
    spec["truncation"] = spec["padding"] = None
    for token in spec.get("added_tokens", []):
        token["special"] |= token["content"] in layout.control
    backend = _made(path, lambda tk: tk.Tokenizer.from_str(json.dumps(spec)))
    # The library's name says the contrary of what it does: they are spelt out as text.
    backend.encode_special_tokens = True
    vocab = backend.get_vocab(with_added_tokens=True)
    _check_control(vocab, layout, path)
    special = {t["content"]: t["id"] for t in spec.get("added_tokens", []) if t["special"]}
    special |= {name: vocab[name] for name in layout.control}
    system = _default_system(_template(folder), path) if family == "llama" else None
    return Tokenizer(family, _by_id(vocab), special, system, _ids(backend))


def _byte_level(
    vocab: Mapping[str, int],
    merges: Iterable[str],
    path: Path,
    *,
    prefix_space: bool = False,
    digits: bool = False,
) -> Callable[[str], list[int]]:
    def make(tk: Any) -> Any:
        backend = tk.Tokenizer(tk.models.BPE(vocab=vocab, merges=_pairs(merges)))
        split = [tk.pre_tokenizers.Digits(individual_digits=True)] if digits else []
        split.append(tk.pre_tokenizers.ByteLevel(add_prefix_space=prefix_space))
        backend.pre_tokenizer = tk.pre_tokenizers.Sequence(split)
        return backend

    return _ids(_made(path, make))


def _word_pieces(vocab: Mapping[str, int], lower: bool) -> Callable[[str], list[int]]:
    tk = _tokenizers()
    backend = tk.Tokenizer(tk.models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = tk.normalizers.BertNormalizer(lowercase=lower)
    backend.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
    return _ids(backend)


def _subwords(
    vocab: Mapping[str, int], merges: Iterable[str], layout: Layout, path: Path
) -> Callable[[str], list[int]]:
    """Subword-nmt's BPE after ParlAI's split into words, on which BlenderbotSmall was trained.

    The library knows a word's last piece by a suffix, the vocabulary knows the others by @@.
    Pieces of merges that the vocabulary lacks get ids of their own, which become `unk`; so does a
    control token that a text happens to spell.
    """
    if NEWLINE not in vocab:
        raise ValueError(f"{path}: the vocabulary must have the control token {NEWLINE}")
    text_only = {t: i for t, i in vocab.items() if t not in layout.control | {NEWLINE}}
    known = {t[:-2] if t.endswith("@@") else t + "</w>": i for t, i in text_only.items()}
    known[str(layout.unk)] = unk = vocab[str(layout.unk)]
    beyond = max(vocab.values()) + 1
    pairs = _pairs(merges)
    for left, right in pairs:
        for piece in (left, right, left + right):
            known.setdefault(piece, beyond + len(known))
    backend = _made(
        path,
        lambda tk: tk.Tokenizer(
            tk.models.BPE(known, pairs, unk_token=layout.unk, end_of_word_suffix="</w>")
        ),
    )

    def pieces(text: str) -> list[int]:
        ids: list[int] = []
        for number, line in enumerate(text.lower().split("\n")):
            words = re.findall(r"\w+|[^\w\s]", line)
            found = backend.encode(words, is_pretokenized=True, add_special_tokens=False).ids
            ids += [vocab[NEWLINE]] * (number > 0) + [i if i < beyond else unk for i in found]
        return ids

    return pieces


def _ids(backend: Any) -> Callable[[str], list[int]]:
    return lambda text: backend.encode(text, add_special_tokens=False).ids


def _pairs(merges: Iterable[str]) -> list[tuple[str, ...]]:
    return [tuple(merge.rstrip("\r").split(" ")) for merge in merges]


def _by_id(vocab: Mapping[str, int]) -> tuple[str | None, ...]:
    names = {i: token for token, i in vocab.items()}
    return tuple(names.get(i) for i in range(max(names) + 1))


def _check_control(vocab: Mapping[str, int], layout: Layout, path: Path) -> None:
    missing = sorted(layout.control - vocab.keys())
    if missing:
        raise ValueError(
            f"{path}: the vocabulary must have {', '.join(sorted(layout.control))}, "
            f"missing {', '.join(missing)}"
        )


def _template(folder: Path) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    return _json(folder / "tokenizer_config.json").get("chat_template")


def _default_system(template: str | None, path: Path) -> str | None:
    if template and "<|im_start|>" not in template:
        raise ValueError(f"{path}: the chat template must be ChatML's, found {template[:80]!r}")
    found = re.search(r"<\|im_start\|>system(?:\n|\\n)([^{}']+)<\|im_end\|>", template or "")
    return found.group(1).replace("\\n", "\n") if found else None


def _json(path: Path) -> dict[str, Any]:
    """A file's object; empty where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} isn't JSON: {error}") from error


def _made(path: Path, make: Callable[[Any], Any]) -> Any:
    """What `make` makes of the library, whose errors have no class of their own."""
    tokenizers = _tokenizers()
    try:
        return make(tokenizers)
    except Exception as error:
        raise ValueError(f"{path} is no tokenizer that can be read: {error}") from error


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("text needs tokenizers: pip install 'fourfold[dialog]'") from error
    return tokenizers
