"""Rotary position embedding with YaRN scaling, in halves: dimension i turns with dimension i + head_dim / 2."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from examples.gpt_oss.config import Config


def inverse_frequencies(config: Config) -> np.ndarray:
    """Radians per position, float32 `[head_dim / 2]`, computed in float64 and rounded once.

    Without scaling theta ** (-2 i / head_dim). YaRN divides by `factor` where a dimension turns less than beta_slow
    times in `original_max_position_embeddings`, leaves those that turn more than beta_fast times, and goes from one to
    the other along a ramp. Source: arXiv 2309.00071, section 3.2.
    """
    dimensions = config.head_dim
    plain = config.rope_theta ** (-np.arange(0, dimensions, 2) / dimensions)
    yarn = config.yarn
    if yarn is None:
        return plain.astype(np.float32)

    def dimension_of(rotations: float) -> float:
        wavelength = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dimensions * math.log(wavelength) / (2 * math.log(config.rope_theta))

    first, last = dimension_of(yarn.beta_fast), dimension_of(yarn.beta_slow)
    if yarn.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dimensions - 1)
    width = last - first or 0.001
    interpolated = np.clip((np.arange(dimensions // 2) - first) / width, 0, 1)
    return (plain / yarn.factor * interpolated + plain * (1 - interpolated)).astype(np.float32)


def rotations(config: Config, positions: jax.Array, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """cos and sin `[T, head_dim / 2]` of integer positions `[T]`: computed in float32, scaled, rounded to dtype."""
    angles = positions.astype(jnp.float32)[:, None] * inverse_frequencies(config)
    scale = 1.0 if config.yarn is None else config.yarn.scale
    return (jnp.cos(angles) * scale).astype(dtype), (jnp.sin(angles) * scale).astype(dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Heads `[B, T, heads, head_dim]` turned by cos and sin `[T, head_dim / 2]`, in their dtype."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
