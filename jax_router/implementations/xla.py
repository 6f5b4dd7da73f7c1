"""The specification in plain JAX: the router GEMM, and routing behind it. The others are tested against it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_router.implementations import experts_axis
from jax_router.routing import Routing, RoutingSpec, route_logits

if TYPE_CHECKING:
    from jax_router.dispatch import Device, Problem


def router_gemm(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    *,
    out_dtype: DTypeLike,
    weight_layout: str = "experts_hidden",
    config: int | None = None,
) -> jax.Array:
    """`logits[T, E] = x[T, H] @ weight[E, H].T + bias[E]`, accumulated in float32 and rounded once, to `out_dtype`.

    A weight [H, E] is contracted over its first axis: nothing is transposed. Here x may have any leading axes: what is
    sharded over several of them must not be made one.
    """
    del config  # XLA picks its own kernels
    if x.dtype != weight.dtype:
        x, weight = x.astype(jnp.float32), weight.astype(jnp.float32)
    # DEFAULT would let the GPU multiply float32 as TF32; 16-bit inputs lose nothing to it, their products fit float32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    contract_hidden = (((x.ndim - 1,), (1 - experts_axis(weight_layout),)), ((), ()))
    logits = jax.lax.dot_general(x, weight, contract_hidden, precision=precision, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + jnp.expand_dims(bias.astype(jnp.float32), range(logits.ndim - 1))
    return logits.astype(out_dtype)


def route(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    correction_bias: jax.Array | None,
    expert_scale: jax.Array | None,
    experts: jax.Array | None,
    *,
    spec: RoutingSpec,
    return_logits: bool,
    weight_layout: str = "experts_hidden",
    config: int | None = None,
) -> Routing:
    """The router GEMM, then scoring and selection: `routing.route_logits` of its float32 logits."""
    logits = router_gemm(x, weight, bias, out_dtype=jnp.float32, weight_layout=weight_layout, config=config)
    weights, selected = route_logits(logits, correction_bias, expert_scale, experts, spec=spec, dtype=x.dtype.name)
    return Routing(weights, selected, logits if return_logits else None)


def why_unsupported(problem: Problem, device: Device) -> str | None:
    """Always None: the specification takes every problem on every device."""
    del problem, device
    return None


def unavailable() -> str | None:
    """Always None: there is nothing to build or to load."""
    return None
