"""The layers of an encoder–decoder: attention and dense layers, normalised before or after."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from dialog.config import EncoderDecoderConfig
from dialog.models.activations import ACTIVATIONS
from dialog.models.attention import KeyValue, attend

INIT = nn.initializers.normal(0.02)


class Stack(nn.Module):
    """The encoder or the decoder, from embedded tokens to its last states."""

    config: EncoderDecoderConfig
    decoder: bool
    dtype: Any
    remat: bool

    def setup(self) -> None:
        """Makes the layers."""
        config, decoder = self.config, self.decoder
        rows = config.position_offset + config.max_positions
        self.embed_positions = nn.Embed(rows, config.d_model, dtype=self.dtype, embedding_init=INIT)
        layer = nn.remat(_Layer, static_argnums=(7,)) if self.remat else _Layer
        count = config.decoder_layers if decoder else config.encoder_layers
        self.layers = [layer(config, decoder, self.dtype) for _ in range(count)]
        self.embed_norm = config.decoder_embed_norm if decoder else config.encoder_embed_norm
        if self.embed_norm != "none":
            self.layernorm_embedding = _norm()
        if config.pre_norm:
            self.layer_norm = _norm()
        self.dropout = nn.Dropout(config.dropout)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        source: tuple[KeyValue, ...] | jax.Array | None = None,
        source_mask: jax.Array | None = None,
        cache: tuple[KeyValue, ...] | None = None,
        at: jax.Array | int = 0,
        train: bool = False,
    ) -> tuple[jax.Array, tuple[KeyValue, ...]]:
        """Returns the last states `(N, T, D)` and the keys and values of self-attention.

        Arguments are those of `EncoderDecoder.decode`, with embedded tokens `x` for ids; `source`
        and `source_mask` are the encoder's, as `cross` and `attention_mask` there.
        """
        if self.embed_norm == "token":
            x = _apply(self.layernorm_embedding, x)
        x = x + self.embed_positions(positions + self.config.position_offset)
        if self.embed_norm == "sum":
            x = _apply(self.layernorm_embedding, x)
        x = self.dropout(x, deterministic=not train)
        new = []
        for i, layer in enumerate(self.layers):
            before = None if cache is None else cache[i]
            own = source[i] if isinstance(source, tuple) else source
            x, keys = layer(x, mask, own, source_mask, before, at, train)
            new.append(keys)
        return _apply(self.layer_norm, x) if self.config.pre_norm else x, tuple(new)

    def cross(self, encoded: jax.Array) -> tuple[KeyValue, ...]:
        """Keys and values of the encoder's states `(B, S, D)`, for each layer."""
        return tuple(layer.encoder_attn.keys(encoded) for layer in self.layers)


class _Layer(nn.Module):
    """Self-attention, in the decoder attention to the encoder, and two dense layers."""

    config: EncoderDecoderConfig
    decoder: bool
    dtype: Any

    def setup(self) -> None:
        config, decoder = self.config, self.decoder
        heads = config.decoder_heads if decoder else config.encoder_heads
        self.self_attn = _Attention(config, heads, self.dtype)
        self.self_attn_layer_norm = _norm()
        if decoder:
            self.encoder_attn = _Attention(config, heads, self.dtype)
            self.encoder_attn_layer_norm = _norm()
        dense = functools.partial(nn.Dense, dtype=self.dtype, kernel_init=INIT)
        self.fc1 = dense(config.decoder_ffn if decoder else config.encoder_ffn)
        self.fc2 = dense(config.d_model)
        self.final_layer_norm = _norm()
        self.dropout = nn.Dropout(config.dropout)
        self.activation_dropout = nn.Dropout(config.activation_dropout)

    def __call__(
        self, x, mask, source, source_mask, cache, at, train
    ) -> tuple[jax.Array, KeyValue]:
        h = self._before(self.self_attn_layer_norm, x)
        keys = self.self_attn.keys(h)
        keys = keys if cache is None else cache.write(keys, at)
        h = self.self_attn(h, keys, mask, train)
        x = self._after(self.self_attn_layer_norm, x, h, train)
        if self.decoder:
            h = self._before(self.encoder_attn_layer_norm, x)
            source = source if isinstance(source, KeyValue) else self.encoder_attn.keys(source)
            h = self.encoder_attn(h, source, source_mask, train)
            x = self._after(self.encoder_attn_layer_norm, x, h, train)
        h = self.fc1(self._before(self.final_layer_norm, x))
        h = self.activation_dropout(ACTIVATIONS[self.config.activation](h), deterministic=not train)
        return self._after(self.final_layer_norm, x, self.fc2(h), train), keys

    def _before(self, norm: nn.LayerNorm, x: jax.Array) -> jax.Array:
        return _apply(norm, x) if self.config.pre_norm else x

    def _after(self, norm: nn.LayerNorm, x: jax.Array, h: jax.Array, train: bool) -> jax.Array:
        x = x + self.dropout(h, deterministic=not train)
        return x if self.config.pre_norm else _apply(norm, x)


class _Attention(nn.Module):
    config: EncoderDecoderConfig
    heads: int
    dtype: Any

    def setup(self) -> None:
        dense = functools.partial(nn.Dense, self.config.d_model, dtype=self.dtype, kernel_init=INIT)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (dense() for _ in range(4))
        self.dropout = nn.Dropout(self.config.attention_dropout)

    def keys(self, x: jax.Array) -> KeyValue:
        shape = (*x.shape[:2], self.heads, -1)
        return KeyValue(self.k_proj(x).reshape(shape), self.v_proj(x).reshape(shape))

    def __call__(self, x: jax.Array, keys: KeyValue, mask: jax.Array, train: bool) -> jax.Array:
        rows, length, width = x.shape
        sentences = keys.key.shape[0]
        # The beams of a sentence are but more queries of its keys.
        query = self.q_proj(x).reshape(sentences, -1, self.heads, width // self.heads)
        out, weights = attend(query, keys, mask)
        if train and self.config.attention_dropout:
            weights = self.dropout(weights, deterministic=False)
            out = jnp.einsum("nhts,nshd->nthd", weights.astype(out.dtype), keys.value)
        shape = (sentences, self.heads, rows // sentences, length, -1)
        weights = weights.reshape(shape).swapaxes(1, 2)
        self.sow("intermediates", "weights", weights.reshape(rows, self.heads, length, -1))
        return self.out_proj(out.reshape(x.shape))


def _norm() -> nn.LayerNorm:
    # The fast variance E[x²] - E[x]² cancels where the mean is far from 0.
    return nn.LayerNorm(epsilon=1e-5, dtype=jnp.float32, use_fast_variance=False)


def _apply(norm: nn.LayerNorm, x: jax.Array) -> jax.Array:
    return norm(x.astype(jnp.float32)).astype(x.dtype)
