"""The transformer of BART, Blenderbot and BlenderbotSmall (Lewis et al. 2020; Roller et al. 2021).

Parameters have Hugging Face's names and Linen's shapes; D is `d_model`, F the width of the dense
layers, STACK `encoder` or `decoder`:

| path | shape |
|---|---|
| `shared/embedding`, of both stacks and of the output | (vocabulary, D) |
| `final_logits_bias` | (vocabulary,) |
| `STACK/embed_positions/embedding` | (offset + positions, D) |
| `STACK/layers_I/self_attn/{q,k,v,out}_proj/{kernel,bias}` | (D, D), (D,) |
| `STACK/layers_I/fc1/{kernel,bias}` | (D, F), (F,) |
| `STACK/layers_I/fc2/{kernel,bias}` | (F, D), (D,) |
| `STACK/layers_I/{self_attn,final}_layer_norm/{scale,bias}` | (D,) |
| `decoder/layers_I/encoder_attn/...`, `decoder/layers_I/encoder_attn_layer_norm/...` | the same |
| `STACK/layernorm_embedding/{scale,bias}`, where embeddings are normalised | (D,) |
| `STACK/layer_norm/{scale,bias}`, with `pre_norm` | (D,) |

Parameters are float32; norms, softmax and logits are so whatever the rest is computed in.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from dialog.config import EncoderDecoderConfig
from dialog.models.activations import ACTIVATIONS
from dialog.models.attention import KeyValue, causal_mask
from dialog.models.stack import INIT, Stack


class EncoderDecoder(nn.Module):
    """Logits of the next token of an output, given the output so far and an input.

    Weights of attention come if asked for: `apply(..., mutable="intermediates")` returns beside its
    result `decoder/layers_I/encoder_attn/weights` and its like, each a tuple of one float32 array
    (rows, heads, queries, keys).

    Attributes:
      config: the shape, and where it normalises.
      dtype: what is computed in.
      remat: whether each layer is computed again in the backward pass, which spares its memory.

    Raises:
      ValueError: an unknown activation, heads that don't divide `d_model`, an input or output
        longer than the table of positions, or rows of the decoder that are no multiple of the
        encoder's.

    >>> shape = dict(encoder_layers=1, decoder_layers=1, encoder_heads=2, decoder_heads=2)
    >>> config = EncoderDecoderConfig(9, 4, **shape, encoder_ffn=8, decoder_ffn=8, max_positions=5)
    >>> model, ids = EncoderDecoder(config), jnp.array([[3, 4, 2]])
    >>> variables = model.init(jax.random.key(0), ids, ids > 0, ids)
    >>> model.apply(variables, ids, ids > 0, ids).shape
    (1, 3, 9)
    """

    config: EncoderDecoderConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Makes the stacks."""
        config = self.config
        if config.activation not in ACTIVATIONS:
            allowed = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation must be one of {allowed}; found {config.activation!r}")
        for name in ("encoder_heads", "decoder_heads"):
            if config.d_model % getattr(config, name):
                raise ValueError(
                    f"{name} must divide d_model {config.d_model}, found {getattr(config, name)}"
                )
        self.shared = nn.Embed(
            config.vocab_size, config.d_model, dtype=self.dtype, embedding_init=INIT
        )
        self.encoder = Stack(config, False, self.dtype, self.remat)
        self.decoder = Stack(config, True, self.dtype, self.remat)
        self.final_logits_bias = self.param(
            "final_logits_bias", nn.initializers.zeros, (config.vocab_size,)
        )

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array,
        decoder_input_ids: jax.Array,
        decoder_mask: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Logits of a whole output, as training with the right tokens before each needs them.

        Positions are 0, 1, ... in both, whatever the padding, as in transformers.

        Args:
          input_ids: int32 `(N, S)`.
          attention_mask: bool `(N, S)`, False for padding.
          decoder_input_ids: int32 `(N, T)`; the output moved right behind its first token.
          decoder_mask: bool `(N, T)`, False for padding; None where it all comes last.
          train: whether dropout is applied, with the random stream "dropout".

        Returns:
          float32 `(N, T, vocabulary)`.
        """
        encoded = self.encode(input_ids, attention_mask, train)
        if decoder_mask is None:
            decoder_mask = jnp.ones((1, decoder_input_ids.shape[1]), bool)
        positions = jnp.arange(decoder_input_ids.shape[1], dtype=jnp.int32)[None]
        mask = causal_mask(decoder_mask)
        return self.decode(
            decoder_input_ids, positions, mask, encoded, attention_mask, train=train
        )[0]

    def encode(
        self, input_ids: jax.Array, attention_mask: jax.Array, train: bool = False
    ) -> jax.Array:
        """States of the last layer of the encoder, `(N, S, d_model)`; arguments as in a call."""
        positions = jnp.arange(input_ids.shape[1], dtype=jnp.int32)[None]
        mask = attention_mask[:, None, :]
        embedded = self._embed(input_ids, self.config.scale_embedding)
        return self.encoder(embedded, positions, mask, train=train)[0]

    def cross(self, encoded: jax.Array) -> tuple[KeyValue, ...]:
        """Keys and values of the encoder's states for each layer of the decoder, made only once."""
        return self.decoder.cross(encoded)

    def decode(
        self,
        decoder_input_ids: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cross: tuple[KeyValue, ...] | jax.Array,
        attention_mask: jax.Array,
        cache: tuple[KeyValue, ...] | None = None,
        at: jax.Array | int = 0,
        train: bool = False,
    ) -> tuple[jax.Array, tuple[KeyValue, ...]]:
        """Logits of some tokens of an output, which go on from those in the cache.

        Args:
          decoder_input_ids: int32 `(N, T)`; N = B·K rows, the K beams of a sentence beside each
            other, which share its keys and values in memory.
          positions: int32 `(N, T)` or `(1, T)`, each in [0, max_positions), those of padding too.
          mask: bool `(N, T, length of the cache)`, or `(1, ...)`, the positions that each token
            sees; without a cache `(N, T, T)`.
          cross: keys and values of `cross`, of B rows; or the encoder's states `(B, S, d_model)`
            themselves.
          attention_mask: bool `(B, S)`, False for the input's padding.
          cache: of `init_cache`, where the tokens' keys and values are written at `at` before
            they are attended to; None where the tokens are all that there is.
          at: int32, how many positions of the cache are before the first token.
          train: whether dropout is applied.

        Returns:
          Logits, float32 `(N, T, vocabulary)`, and the new cache; without one, the tokens' own.
        """
        rows, sentences = decoder_input_ids.shape[0], attention_mask.shape[0]
        if rows % sentences:
            raise ValueError(
                f"each sentence must have as many beams, found {rows} rows of {sentences} sentences"
            )
        # A norm of the token alone undoes its scale, but for what epsilon is beside its variance:
        # transformers 5 leaves the scale out there, 4 did not.
        scaled = self.config.scale_embedding and self.config.decoder_embed_norm != "token"
        embedded, source_mask = self._embed(decoder_input_ids, scaled), attention_mask[:, None, :]
        hidden, cache = self.decoder(
            embedded, positions, mask, cross, source_mask, cache, at, train
        )
        embedding = self.shared.embedding.astype(self.dtype)
        logits = jnp.einsum("ntd,vd->ntv", hidden, embedding, preferred_element_type=jnp.float32)
        # The bias belongs to the checkpoint and isn't learned, there as here.
        return logits + lax.stop_gradient(self.final_logits_bias)[None, None], cache

    def _embed(self, ids: jax.Array, scaled: bool) -> jax.Array:
        if ids.shape[1] > self.config.max_positions:
            raise ValueError(
                f"{ids.shape[1]} tokens are more than the model's {self.config.max_positions} "
                "positions"
            )
        return self.shared(ids) * (self.config.d_model**0.5 if scaled else 1.0)


def init_cache(
    config: EncoderDecoderConfig, rows: int, length: int, dtype: Any = jnp.float32
) -> tuple[KeyValue, ...]:
    """An empty cache for `decode`, of `length` positions in each layer of the decoder.

    Args:
      config: the model's.
      rows: sentences times beams.
      length: how many tokens it holds, those that `decode` starts from counted.
      dtype: what the model computes in.

    Raises:
      ValueError: where it is longer than the table of positions.
    """
    if length > config.max_positions:
        raise ValueError(
            f"a cache of {length} tokens is more than the model's {config.max_positions} positions"
        )
    heads = config.decoder_heads
    empty = KeyValue.empty(rows, length, heads, config.d_model // heads, dtype)
    return (empty,) * config.decoder_layers
