"""Grouped-query attention with a sink per head, in a sliding window on some layers, with or without a cache."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from examples.gpt_oss.config import SLIDING, Config
from examples.gpt_oss.layers import Linear, contract, normal
from examples.gpt_oss.rotary import rotate


class LayerCache(NamedTuple):
    """Keys and values of one layer, `[B, length, num_key_value_heads, head_dim]`, by position."""

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, config: Config, batch: int, length: int, dtype: DTypeLike) -> LayerCache:
        shape = batch, length, config.num_key_value_heads, config.head_dim
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def write(self, other: LayerCache, position: jax.Array | int) -> LayerCache:
        """This cache with all of the other one from a position on."""
        return jax.tree.map(lambda mine, new: jax.lax.dynamic_update_slice(mine, new, (0, position, 0, 0)), self, other)

    def read(self, position: jax.Array, window: int | None) -> tuple[LayerCache, jax.Array]:
        """What the token at a position may see, all of it or the window that ends there, and its positions."""
        length = self.keys.shape[1]
        if window is None or window >= length:
            return self, jnp.arange(length)
        start = jnp.maximum(position + 1 - window, 0)
        seen = LayerCache(*(jax.lax.dynamic_slice_in_dim(each, start, window, axis=1) for each in self))
        return seen, start + jnp.arange(window)


class Attention(nnx.Module):
    """One layer's attention; parameters named and laid out as in the checkpoint."""

    def __init__(self, config: Config, layer: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        deviation, hidden = config.initializer_range, config.hidden_size
        self.head_dim = config.head_dim
        self.window = config.sliding_window if config.layer_types[layer] == SLIDING else None
        queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = Linear(hidden, queries, deviation=deviation, dtype=dtype, rngs=rngs)
        self.k_proj = Linear(hidden, keys, deviation=deviation, dtype=dtype, rngs=rngs)
        self.v_proj = Linear(hidden, keys, deviation=deviation, dtype=dtype, rngs=rngs)
        self.o_proj = Linear(queries, hidden, deviation=deviation, dtype=dtype, rngs=rngs)
        self.sinks = normal((config.num_attention_heads,), deviation, dtype, rngs)

    def __call__(
        self,
        x: jax.Array,
        rotation: tuple[jax.Array, jax.Array],
        cache: LayerCache | None = None,
        position: jax.Array | None = None,
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attention of tokens `[B, T, H]`, and the cache with their keys and values.

        Args:
          rotation: cos and sin at the positions of the tokens.
          cache: None to keep nothing.
          position: of the one token of each sequence, which sees the cache too; None: T tokens from position 0 on,
            which see one another.
        """

        def heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(*projected.shape[:2], -1, self.head_dim)

        queries = rotate(heads(self.q_proj(x)), *rotation)
        seen = LayerCache(rotate(heads(self.k_proj(x)), *rotation), heads(self.v_proj(x)))
        of_queries = of_keys = jnp.arange(x.shape[1])
        if cache is not None:
            cache = cache.write(seen, 0 if position is None else position)
            if position is not None:
                seen, of_keys = cache.read(position, self.window)
                of_queries = position[None]
        distance = of_queries[:, None] - of_keys
        visible = distance >= 0 if self.window is None else (distance >= 0) & (distance < self.window)
        attended = attend(queries, seen, visible, self.sinks[...])
        return self.o_proj(attended.reshape(*x.shape[:2], -1)), cache


def attend(queries: jax.Array, seen: LayerCache, visible: jax.Array, sinks: jax.Array) -> jax.Array:
    """Softmax over what is visible and the head's sink, which takes its share and adds nothing.

    Args:
      queries: `[B, T, heads, D]`; head h reads key-value head h // (heads / num_key_value_heads).
      seen: keys and values `[B, S, num_key_value_heads, D]`.
      visible: bool `[T, S]`.
      sinks: a logit per head.

    Products, scores, what is left of them without the highest, probabilities and the result are rounded to the dtype of
    the queries, as in transformers; XLA may leave a rounding out where it fuses.
    """
    batch, tokens, heads, depth = queries.shape
    shared, dtype = seen.keys.shape[2], queries.dtype
    grouped = queries.reshape(batch, tokens, shared, heads // shared, depth)
    products = contract("btngd,bsnd->bngts", grouped, seen.keys).astype(dtype)
    scaled = (products.astype(jnp.float32) * depth**-0.5).astype(dtype)  # by a factor that is not rounded
    scores = jnp.where(visible, scaled, -jnp.inf)
    sink = sinks.reshape(shared, heads // shared, 1, 1)
    highest = jnp.maximum(scores.max(-1, keepdims=True), sink)
    shares = jnp.exp((scores - highest).astype(jnp.float32))
    total = shares.sum(-1, keepdims=True) + jnp.exp((sink - highest).astype(jnp.float32))
    attended = contract("bngts,bsnd->btngd", (shares / total).astype(dtype), seen.values)
    return attended.astype(dtype).reshape(queries.shape)
