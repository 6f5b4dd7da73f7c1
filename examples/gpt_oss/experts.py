"""The experts: a clamped SwiGLU between two products, computed by pairs of token and expert."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from examples.gpt_oss.config import Config
from examples.gpt_oss.layers import contract, normal, precision


class Experts(nnx.Module):
    """All experts of a layer; parameters named and laid out as in the checkpoint, MXFP4 dequantized."""

    def __init__(self, config: Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        experts, hidden, width = config.num_local_experts, config.hidden_size, config.intermediate_size
        deviation = config.initializer_range
        self.alpha, self.limit = config.swiglu_alpha, config.swiglu_limit
        self.gate_up_proj = normal((experts, hidden, 2 * width), deviation, dtype, rngs)
        self.gate_up_proj_bias = nnx.Param(jnp.zeros((experts, 2 * width), dtype))
        self.down_proj = normal((experts, width, hidden), deviation, dtype, rngs)
        self.down_proj_bias = nnx.Param(jnp.zeros((experts, hidden), dtype))

    def __call__(self, x: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        """The weighted sum of each token's experts, `[T, H]` in x's dtype.

        Args:
          x: `[T, H]`.
          experts: int32 `[T, k]`.
          weights: `[T, k]`. The products with them are in their dtype, the sums in float32.

        Up to a third as many pairs as there are experts, the weights of each pair's expert are gathered, and experts
        that nobody selected are not read. The gather writes and reads its copy of them, so it moves three times the
        bytes of what is selected; with more pairs they are sorted by expert for `jax.lax.ragged_dot`, which copies
        nothing but may read all experts.
        """
        top_k = experts.shape[1]
        pairs = experts.reshape(-1)
        count = self.gate_up_proj.shape[0]
        gather = 3 * pairs.size <= count
        if gather:
            of_rows, rows = pairs, jnp.repeat(x, top_k, axis=0)
        else:
            order = jnp.argsort(pairs)
            of_rows, rows = pairs[order], x[order // top_k]
            sizes = jnp.bincount(pairs, length=count)

        def product(rows: jax.Array, weight: jax.Array, bias: jax.Array) -> jax.Array:
            if gather:
                result = contract("nh,nhi->ni", rows, weight[of_rows])
            else:
                exact = {"precision": precision(rows, weight), "preferred_element_type": jnp.float32}
                result = jax.lax.ragged_dot(rows, weight, sizes, **exact)
            return result.astype(rows.dtype) + bias[of_rows]

        gate_up = product(rows, self.gate_up_proj[...], self.gate_up_proj_bias[...])
        outputs = product(self.activation(gate_up), self.down_proj[...], self.down_proj_bias[...])
        if not gather:
            outputs = jnp.zeros_like(outputs).at[order].set(outputs, unique_indices=True)
        weighted = outputs.reshape(*experts.shape, x.shape[-1]).astype(weights.dtype) * weights[..., None]
        return weighted.astype(jnp.float32).sum(1).astype(x.dtype)

    def activation(self, gate_up: jax.Array) -> jax.Array:
        """(up + 1) gate sigmoid(alpha gate) of `[..., 2I]` with gate and up interleaved, both clamped before.

        Every operation is rounded once, as in PyTorch: the product with alpha and the sigmoid are float32's, for JAX
        rounds a Python number to the dtype of the array, and computes a sigmoid in several roundings.
        """
        gate = jnp.minimum(gate_up[..., ::2], self.limit)
        up = jnp.clip(gate_up[..., 1::2], -self.limit, self.limit)
        scaled = (gate.astype(jnp.float32) * self.alpha).astype(gate.dtype)
        return (up + 1) * (gate * jax.nn.sigmoid(scaled.astype(jnp.float32)).astype(gate.dtype))
