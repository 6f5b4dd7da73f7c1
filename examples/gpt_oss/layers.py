"""What every part of the model is made of: a linear layer in PyTorch's layout, RMS norm, contraction in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike


def contract(equation: str, *operands: jax.Array) -> jax.Array:
    """`jnp.einsum` accumulated in float32, without TF32, and returned so."""
    return jnp.einsum(equation, *operands, precision=precision(*operands), preferred_element_type=jnp.float32)


def precision(*operands: jax.Array) -> jax.lax.Precision:
    """What keeps float32 from being multiplied as TF32. Products of 16 bits fit float32, and need nothing."""
    in_float32 = any(each.dtype == jnp.float32 for each in operands)
    return jax.lax.Precision.HIGHEST if in_float32 else jax.lax.Precision.DEFAULT


def normal(shape: tuple[int, ...], deviation: float, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Param:
    """A parameter drawn from a normal distribution."""
    return nnx.Param(nnx.initializers.normal(deviation)(rngs.params(), shape, dtype))


class Linear(nnx.Module):
    """x `[..., I]` to x @ weight[O, I].T + bias[O], rounded once to x's dtype; weight as checkpoints have it."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool = True, deviation: float, dtype: DTypeLike, rngs: nnx.Rngs
    ):
        self.weight = normal((outputs, inputs), deviation, dtype, rngs)
        self.bias = nnx.Param(jnp.zeros(outputs, dtype)) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        product = contract("...i,oi->...o", x, self.weight[...])
        if self.bias is not None:
            product = product + self.bias[...].astype(jnp.float32)
        return product.astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight, in float32, rounded once to x's dtype."""

    def __init__(self, hidden: int, *, epsilon: float, dtype: DTypeLike):
        self.weight = nnx.Param(jnp.ones(hidden, dtype))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt((wide * wide).mean(-1, keepdims=True) + self.epsilon)
        return (self.weight[...].astype(jnp.float32) * normed).astype(x.dtype)
