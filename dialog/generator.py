"""Models that answer: lists of ids in, lists of ids out, compiled once for each size of prompt."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from dialog.config import EncoderDecoderConfig, GenerationConfig, LlamaConfig
from dialog.conversation import pad
from dialog.decoding import beam, greedy
from dialog.decoding.constraints import Context
from dialog.decoding.greedy import Output, State
from dialog.models.encoder_decoder import EncoderDecoder
from dialog.models.llama import Llama
from dialog.prefill import CHUNK, Memory, prepare, step_of

Ids = Sequence[int]
# Prompts are padded to one of these, so that few programs are compiled. A decoder passes over
# padding, and has few sizes, so that a chat that grows doesn't wait for the compiler.
ENCODER_SIZES = (64, 256, 1024, 4096)
DECODER_SIZES = (1024, 4096, 16384, 65536)


class Generator:
    """A model with its parameters, for generation."""

    def __init__(self, model: nn.Module, params: Any) -> None:
        """Compiles nothing yet.

        Args:
          model: an `EncoderDecoder` or a `Llama`.
          params: of the model, on its devices.

        Raises:
          ValueError: the model is neither.
        """
        if not isinstance(model, EncoderDecoder | Llama):
            raise ValueError(
                f"a model that generates is an EncoderDecoder or a Llama, found "
                f"{type(model).__name__}"
            )
        self.model, self.params = model, params

    def generate(
        self,
        prompts: Sequence[Ids],
        options: GenerationConfig,
        key: jax.Array | None = None,
    ) -> list[list[int]]:
        """Answers some prompts, all at once.

        Args:
          prompts: of each the ids: an encoder's input, or what a decoder goes on from.
          options: how tokens are chosen.
          key: typed key `()`, where they are drawn.

        Returns:
          Of each the ids of its answer, without the token that ends it.

        Raises:
          ValueError: no prompts, an empty one, one that is too long for the model, an id that the
            model has not, or options that don't go together.
        """
        ids, mask = self._pad(prompts, options)
        found = _generate(self.model, options, self.params, ids, mask, key)
        tokens, lengths = np.asarray(found.tokens), np.asarray(found.lengths)
        ends = self._ends
        answers = [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
        return [a[:-1] if a and a[-1] in ends else a for a in answers]

    def stream(
        self, prompt: Ids, options: GenerationConfig, key: jax.Array | None = None
    ) -> Iterator[int]:
        """Answers one prompt token by token: those that `generate` gives, as soon as each is there.

        Args:
          prompt: ids.
          options: how tokens are chosen; one beam.
          key: typed key `()`, where they are drawn.

        Raises:
          ValueError: as for `generate`; and for several beams.
        """
        ids, mask = self._pad([prompt], options)
        state, *rest = _start(self.model, options, self.params, ids, mask, key)
        while True:
            tokens, at = np.asarray(state.tokens), int(state.at)
            token = int(tokens[0, at - 1])
            if token in self._ends:
                return
            yield token
            if at == tokens.shape[1]:
                return
            state = _advance(self.model, options, self.params, state, *rest)

    def room(self, options: GenerationConfig) -> int:
        """Returns how many tokens a prompt may have, beside a decoder's longest answer."""
        config = self.model.config
        if not isinstance(config, LlamaConfig):
            return config.max_positions
        # The last token is never read again; and a decoder reads whole chunks.
        limit = config.max_positions - options.max_new_tokens + 1
        return limit // CHUNK * CHUNK if limit >= CHUNK else limit

    @property
    def _ends(self) -> tuple[int, ...]:
        return ends_of(self.model.config)

    def _pad(
        self, prompts: Sequence[Ids], options: GenerationConfig
    ) -> tuple[np.ndarray, np.ndarray]:
        """Prompts as arrays `(B, P)`, padded to one of the sizes: a decoder's on the left."""
        config = self.model.config
        if not prompts:
            raise ValueError("there is no prompt")
        longest = max(map(len, prompts))
        if not min(map(len, prompts)):
            raise ValueError(f"prompt {[len(p) for p in prompts].index(0)} has no tokens")
        decoder, limit = isinstance(config, LlamaConfig), self.room(options)
        if longest > limit:
            room = f" beside {options.max_new_tokens} of the answer" if decoder else ""
            raise ValueError(
                f"a prompt has {longest} tokens, and the model has room for {limit}{room}"
            )
        for prompt in prompts:
            if min(prompt) < 0 or max(prompt) >= config.vocab_size:
                raise ValueError(
                    f"ids must be in [0, {config.vocab_size}), found {min(prompt)} to {max(prompt)}"
                )
        sizes = DECODER_SIZES if decoder else ENCODER_SIZES
        size = min(next((s for s in sizes if s >= longest), limit), limit)
        return pad(prompts, config.pad_id, side="left" if decoder else "right", buckets=(size,))


def ends_of(config: EncoderDecoderConfig | LlamaConfig) -> tuple[int, ...]:
    """Returns the ids that end an answer."""
    return config.eos_ids if isinstance(config, LlamaConfig) else (config.eos_id,)


def _fixed(model: Any, options: GenerationConfig) -> dict[str, Any]:
    return {"options": options, "eos_ids": ends_of(model.config), "pad_id": model.config.pad_id}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    model: nn.Module,
    options: GenerationConfig,
    params: Any,
    ids: jax.Array,
    mask: jax.Array,
    key: jax.Array | None,
) -> Output:
    memory, cache, logits, context = prepare(model, params, ids, mask, options.max_new_tokens)
    step, fixed = step_of(model, params, memory), _fixed(model, options)
    if options.num_beams > 1:
        return beam.search(step, cache, logits, context, **fixed)
    return greedy.generate(step, cache, logits, context, key=key, **fixed)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _start(
    model: nn.Module,
    options: GenerationConfig,
    params: Any,
    ids: jax.Array,
    mask: jax.Array,
    key: jax.Array | None,
) -> tuple[State, Memory | None, Context]:
    memory, cache, logits, context = prepare(model, params, ids, mask, options.max_new_tokens)
    state = greedy.start(logits, cache, context, key=key, **_fixed(model, options))
    return state, memory, context


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _advance(
    model: nn.Module,
    options: GenerationConfig,
    params: Any,
    state: State,
    memory: Memory | None,
    context: Context,
) -> State:
    step = step_of(model, params, memory)
    return greedy.advance(step, state, context, **_fixed(model, options))
