"""The decoder of the Llama family, such as SmolLM2.

Parameters of D = d_model, H query heads and G key and value heads of d = D / H, F = ffn; kernels
(in, out), no biases, everything float32; lm_head only where it isn't tied to the embedding:

    embed_tokens/embedding  (vocab_size, D)             lm_head/kernel  (D, vocab_size)
    layers_i/{input,post_attention}_layernorm/scale, norm/scale         (D,)
    layers_i/self_attn/{q,o}_proj/kernel  (D, D)        .../{k,v}_proj/kernel     (D, G d)
    layers_i/mlp/{gate,up}_proj/kernel    (D, F)        .../mlp/down_proj/kernel  (F, D)

Queries and keys are as in Hugging Face's checkpoints: `rotate` pairs dimension i of a head with
i + d/2. GGUF files pair neighbours: within each head, row 2i + j of their `attn_q.weight` (D, D)
and `attn_k.weight` (G d, D) is our row i + j d/2, j = 0 or 1. Their reader must undo it, before it
transposes, with `heads` H for queries and G for keys; everything else is in one order:

    w.reshape(heads, d // 2, 2, D).swapaxes(1, 2).reshape(w.shape)
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dialog.config import LlamaConfig
from dialog.models.attention import KeyValue, attend, causal_mask

_Cache = tuple[KeyValue, jax.Array]  # a layer's, and where the next tokens go
_normal = nn.initializers.normal(0.02)
_dense = functools.partial(nn.Dense, use_bias=False, kernel_init=_normal)


def rotate(x: jax.Array, positions: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al., RoFormer, 2021, equation 34), in float32.

    Dimensions i and i + d/2 are a plane that turns by position · theta^(-2i/d). Keeps x's dtype.

    Args:
      x: queries or keys `(N, T, H, d)`, d even.
      positions: int `(N, T)`.
      theta: base of the frequencies.

    >>> x = jnp.ones((1, 1, 1, 2))
    >>> [round(float(v), 4) for v in rotate(x, jnp.array([[1]]), 10000.0).ravel()]
    [-0.3012, 1.3818]
    """
    half = x.shape[-1] // 2
    # In float32 as checkpoints were trained: at position 8000 the last bit is half a milliradian.
    frequency = np.float32(1) / np.float32(theta) ** (np.arange(half, dtype=np.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return turned.astype(x.dtype)


class SelfAttention(nn.Module):
    """Attention of grouped queries over the keys of this call, or over a cache of more."""

    config: LlamaConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, mask: jax.Array, cache: _Cache | None
    ) -> tuple[jax.Array, KeyValue]:
        """Returns states `(N, T, D)`, and the keys and values attended to; see `Llama.decode`."""
        config = self.config

        def project(name: str, heads: int) -> jax.Array:
            y = _dense(heads * config.head_dim, dtype=self.dtype, name=name)(x)
            return y.reshape(*x.shape[:-1], heads, config.head_dim)

        query = rotate(project("q_proj", config.heads), positions, config.rope_theta)
        key = rotate(project("k_proj", config.key_value_heads), positions, config.rope_theta)
        keys = KeyValue(key, project("v_proj", config.key_value_heads))
        if cache is not None:
            keys = cache[0].write(keys, at=cache[1])
        out, _ = attend(query, keys, mask)
        return _dense(config.d_model, dtype=self.dtype, name="o_proj")(out.reshape(x.shape)), keys


class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer, GLU Variants Improve Transformer, 2020, equation 6)."""

    ffn: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, T, D)` to the same."""
        gate, up = (_dense(self.ffn, dtype=self.dtype, name=f"{n}_proj")(x) for n in ("gate", "up"))
        return _dense(x.shape[-1], dtype=self.dtype, name="down_proj")(jax.nn.silu(gate) * up)


def _float32(norm: nn.RMSNorm, x: jax.Array) -> jax.Array:
    return norm(x.astype(jnp.float32)).astype(x.dtype)


class LlamaLayer(nn.Module):
    """Attention and feed-forward, each after an RMSNorm (Zhang and Sennrich, NeurIPS 2019)."""

    config: LlamaConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: jax.Array, positions: jax.Array, mask: jax.Array, cache: _Cache | None = None
    ) -> tuple[jax.Array, KeyValue]:
        """As `SelfAttention`."""
        norm = functools.partial(nn.RMSNorm, self.config.norm_eps, dtype=jnp.float32)
        y = _float32(norm(name="input_layernorm"), x)
        attention = SelfAttention(self.config, self.dtype, name="self_attn")
        y, keys = attention(y, positions, mask, cache)
        x = x + y
        y = _float32(norm(name="post_attention_layernorm"), x)
        return x + SwiGLU(self.config.ffn, self.dtype, name="mlp")(y), keys


class Llama(nn.Module):
    """Llama (Touvron et al. 2023) with grouped queries (Ainslie et al., EMNLP 2023).

    Attributes:
      config: shape.
      dtype: what is computed in; norms, rotations, softmax and logits are float32 anyway.
      remat: compute each layer again in the backward pass, and keep its input alone.
    """

    config: LlamaConfig
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self) -> None:
        """Makes the layers; ValueError where the configuration is no Llama."""
        config = self.config
        check(config)
        embed = functools.partial(nn.Embed, dtype=self.dtype, embedding_init=_normal)
        self.embed_tokens = embed(config.vocab_size, config.d_model)
        layer = nn.remat(LlamaLayer) if self.remat else LlamaLayer
        self.layers = [layer(config, self.dtype) for _ in range(config.layers)]
        self.norm = nn.RMSNorm(config.norm_eps, dtype=jnp.float32)
        if not config.tie_embeddings:
            dot = functools.partial(lax.dot_general, preferred_element_type=jnp.float32)
            self.lm_head = _dense(config.vocab_size, dtype=self.dtype, dot_general=dot)

    def __call__(
        self, input_ids: jax.Array, mask: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Returns the logits of each next token, float32 `(N, T, vocab_size)`.

        Positions count the tokens that are there, so padding on the left changes nothing.

        Args:
          input_ids: int `(N, T)`.
          mask: bool `(N, T)`, False where a sentence is padded; None for nowhere. Logits of padding
            mean nothing, but are no NaN.
          train: for the interface's sake; this family knows no dropout.

        Raises:
          ValueError: shapes differ, the mask isn't bool, or T is above `max_positions`.
        """
        _check_input(input_ids, input_ids.shape[-1], self.config.max_positions)
        mask = jnp.ones(input_ids.shape, bool) if mask is None else mask
        _expect("mask", mask, input_ids.shape, bool)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
        x, seen = self.embed_tokens(input_ids), causal_mask(mask)
        for layer in self.layers:
            x, _ = layer(x, positions, seen)
        return self._logits(x)

    def decode(
        self,
        ids: jax.Array,
        positions: jax.Array,
        mask: jax.Array,
        cache: tuple[KeyValue, ...] | None,
        at: jax.Array | int,
        last_only: bool = False,
    ) -> tuple[jax.Array, tuple[KeyValue, ...]]:
        """Puts tokens into the cache, and returns the logits of what follows them.

        Args:
          ids: int `(N, T)`.
          positions: int `(N, T)` below `max_positions`, of the tokens in their sentences.
          mask: bool `(N, T, S)`, which places of the cache each token sees, its own among them.
          cache: of each layer, `(N, S, G, d)`; None for an empty one.
          at: int `()`, where in the cache the first of the tokens goes, at most S - T.
          last_only: whether to return the last token's logits alone.

        Returns:
          The logits, float32 `(N, T, vocab_size)` or `(N, 1, vocab_size)`, and the cache.

        Raises:
          ValueError: shapes don't go together, or S is above `max_positions`.
        """
        config, slots = self.config, mask.shape[-1]
        _check_input(ids, slots, config.max_positions)
        _expect("positions", positions, ids.shape)
        _expect("mask", mask, (*ids.shape, slots), bool)
        shape = (ids.shape[0], slots, config.key_value_heads, config.head_dim)
        if cache is None:
            cache = (KeyValue.empty(*shape, self.dtype),) * config.layers
        if len(cache) != config.layers or ids.shape[1] > slots:
            raise ValueError(
                f"{ids.shape[1]} tokens want a cache of so many places at least and of "
                f"{config.layers} layers, found {slots} places and {len(cache)} layers"
            )
        for part in cache:
            _expect("cache", part.key, shape)
        x, written = self.embed_tokens(ids), []
        for layer, part in zip(self.layers, cache, strict=True):
            x, part = layer(x, positions, mask, (part, jnp.asarray(at)))
            written.append(part)
        return self._logits(x[:, -1:] if last_only else x), tuple(written)

    def _logits(self, x: jax.Array) -> jax.Array:
        x = _float32(self.norm, x)
        if not self.config.tie_embeddings:
            return self.lm_head(x)
        table = self.embed_tokens.embedding.astype(self.dtype)
        return jnp.einsum("ntd,vd->ntv", x, table, preferred_element_type=jnp.float32)


def check(config: LlamaConfig) -> None:
    """Raises ValueError where heads can't be shared evenly, or can't be rotated."""
    d_model, heads, groups = config.d_model, config.heads, config.key_value_heads
    if d_model % heads or config.head_dim % 2 or heads % groups:
        raise ValueError(
            "heads must divide d_model into even numbers, and key_value_heads must divide heads; "
            f"found d_model {d_model}, heads {heads}, key_value_heads {groups}"
        )


def _check_input(ids: jax.Array, length: int, limit: int) -> None:
    if ids.ndim != 2:
        raise ValueError(f"ids must be (N, T), found {list(ids.shape)}")
    if length > limit:
        raise ValueError(f"{length} tokens are more than max_positions, {limit}")


def _expect(name: str, x: jax.Array, shape: tuple[int, ...], dtype: Any = None) -> None:
    if x.shape != shape or (dtype is not None and x.dtype != dtype):
        want = f"{dtype.__name__ if dtype else ''}{list(shape)}"
        raise ValueError(f"{name} must be {want}, found {x.dtype}{list(x.shape)}")
