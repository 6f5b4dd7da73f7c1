"""Losses that keep a router balanced and its logits small, and how many tokens each expert gets. Pure functions.

Inside `shard_map` they are of one shard's tokens; under a sharded `jit` of all.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jax_router import checks_route
from jax_router.routing import is_each


def tokens_per_expert(experts: ArrayLike, num_experts: int, *, mask: ArrayLike | None = None) -> jax.Array:
    """How many tokens each expert gets: int32 `[E]`. What balancing by correction bias goes by, too.

    >>> tokens_per_expert(jnp.array([[0, 2], [2, 1]]), 4)
    Array([1, 1, 2, 0], dtype=int32)

    Args:
      experts: `[..., k]` of any integer dtype, as `route` returns them. An id out of range counts for no expert.
      num_experts: E.
      mask: which tokens count: `[...]` or broadcastable to it, bool or integers, 0 for padding. None: all.

    Raises:
      TypeError: experts or mask is no array, or num_experts no integer.
      ValueError: a shape or dtype that does not fit.

    Source: "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (arXiv 2408.15664) for that use.
    """
    ids, counted = checks_route.experts_and_mask(experts, num_experts, mask)
    chosen = is_each(ids, num_experts)
    if counted is not None:
        chosen &= counted[..., None, None]
    return chosen.sum(tuple(range(chosen.ndim - 1)), dtype=jnp.int32)


def load_balancing_loss(probabilities: ArrayLike, experts: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
    """E times the dot product of the experts' shares of tokens and their mean probabilities: k when all is balanced.

        E * sum_e (tokens_per_expert[e] / T) * (sum_t probabilities[t, e] / T)

    >>> logits = jnp.zeros((8, 4))
    >>> experts = jnp.tile(jnp.array([[0, 1], [2, 3]]), (4, 1))
    >>> load_balancing_loss(jax.nn.softmax(logits), experts)
    Array(2., dtype=float32)

    Args:
      probabilities: `[..., E]`, `jax.nn.softmax(routing.logits)`; for a sigmoid router the scores divided by their sum.
      experts: `[..., k]` of any integer dtype. Layers may be stacked in a leading axis, which averages over them.
      mask: which tokens count: `[...]` or broadcastable to it, bool or integers, 0 for padding. None: all.

    Returns:
      A float32 scalar, differentiable in probabilities. 0 if no token counts. It equals `load_balancing_loss_func` of
      Hugging Face transformers; `switch_load_balancing_loss_func` of Megatron-LM with coefficient 1 is this divided
      by k, so that it is 1 when all is balanced.

    Raises:
      TypeError: probabilities, experts or mask is no array.
      ValueError: shapes or dtypes that do not fit each other.

    Source: Switch Transformers (arXiv 2101.03961), equations 4 to 6; GShard (arXiv 2006.16668), where it began.
    """
    of_tokens, ids, counted = checks_route.probabilities_and_experts(probabilities, experts, mask)
    num_experts = of_tokens.shape[-1]
    counts = tokens_per_expert(ids, num_experts, mask=counted).astype(jnp.float32)
    kept = of_tokens if counted is None else jnp.where(counted[..., None], of_tokens, 0)
    tokens = _number_of_tokens(of_tokens, counted)
    mean_probabilities = kept.sum(tuple(range(kept.ndim - 1))) / tokens
    return num_experts * (counts / tokens * mean_probabilities).sum()


def router_z_loss(logits: ArrayLike, *, mask: ArrayLike | None = None) -> jax.Array:
    """The mean over tokens of `logsumexp(logits)^2`, which keeps logits small.

    >>> round(float(router_z_loss(jnp.zeros((3, 4)))), 4)  # log(4)^2
    1.9218

    Args:
      logits: `[..., E]`, `routing.logits` of `route(..., return_logits=True)`.
      mask: which tokens count: `[...]` or broadcastable to it, bool or integers, 0 for padding. None: all.

    Returns:
      A float32 scalar, differentiable in logits. 0 if no token counts. It equals `z_loss_func` of Megatron-LM with
      coefficient 1.

    Raises:
      TypeError: logits or mask is no array.
      ValueError: shapes or dtypes that do not fit each other.

    Source: ST-MoE (arXiv 2202.08906), equation 5.
    """
    of_tokens, counted = checks_route.logits_and_mask(logits, mask)
    # Before the logarithm, so that NaN of padding stays out of the gradient too.
    kept = of_tokens if counted is None else jnp.where(counted[..., None], of_tokens, 0)
    squares = jax.nn.logsumexp(kept, axis=-1) ** 2
    squares = squares if counted is None else jnp.where(counted, squares, 0)
    return squares.sum() / _number_of_tokens(of_tokens, counted)


def _number_of_tokens(of_tokens: jax.Array, counted: jax.Array | None) -> jax.Array | float:
    if counted is None:
        tokens = math.prod(of_tokens.shape[:-1])
        return float(max(tokens, 1)) if isinstance(tokens, int) else jnp.maximum(jnp.asarray(tokens, jnp.float32), 1)
    return jnp.maximum(counted.sum(dtype=jnp.int32), 1).astype(jnp.float32)
