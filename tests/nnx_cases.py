"""Routers of Flax NNX whose logits are exact in any order of additions, and what float64 makes of them."""

from __future__ import annotations

from typing import Any

import bounds
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_cases as cases
from flax import nnx
from test_ops import primitives

import jax_router as jr
from jax_router.nnx import GateLinear, GateLinearLoRA, Router, RouterLoRA

__all__ = ["primitives"]

HIDDEN, EXPERTS, RANK, ADAPTERS = 16, 8, 2, 3
# Its choice is a float32 sum of exact numbers: every implementation selects the same experts.
SPEC = jr.RoutingSpec(2, "sigmoid", renormalize=True, select_on="logits")
WITH_ALL = {"use_bias": True, "use_correction_bias": True, "use_expert_scale": True}
BF16, F32 = jnp.bfloat16, jnp.float32
KERNELS = [pytest.param(name, marks=pytest.mark.gpu) for name in ("cuda", "pallas")]
every_implementation = pytest.mark.parametrize("implementation", ["xla", *KERNELS])
with_float32 = pytest.mark.parametrize("implementation", ["xla", KERNELS[0]])  # pallas takes no weight in float32


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Multiples of a quarter from -1 to 1: products of three and sums of hundreds of them are exact in float32."""
    return np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32) / 4


def parameters(dtype: Any = F32, seed: int = 0) -> dict[str, np.ndarray]:
    """What a checkpoint holds of one layer."""
    seeds, scale = range(10 * seed, 10 * seed + 4), 1 + numbers(10 * seed + 4, EXPERTS) / 2
    kernel, bias, correction_bias = numbers(seeds[1], EXPERTS, HIDDEN), *(numbers(each, EXPERTS) for each in seeds[2:])
    held = {"kernel": kernel, "bias": bias, "expert_scale": scale}
    return {name: array.astype(dtype) for name, array in held.items()} | {"correction_bias": correction_bias}


def router(implementation: Any = None, dtype: Any = F32, *, spec=SPEC, compute_dtype: Any = None) -> Router:
    """With these parameters."""
    options = {"spec": spec, "dtype": compute_dtype, "param_dtype": dtype, "implementation": implementation}
    made = Router(HIDDEN, EXPERTS, rngs=nnx.Rngs(0), **options, **WITH_ALL)
    nnx.update(made, parameters(dtype))
    return made


def gate(implementation: Any = None, dtype: Any = F32, *, out_dtype: Any = F32) -> GateLinear:
    """With these parameters."""
    options = {"param_dtype": dtype, "out_dtype": out_dtype, "implementation": implementation}
    made = GateLinear(HIDDEN, EXPERTS, use_bias=True, rngs=nnx.Rngs(0), **options)
    nnx.update(made, {name: parameters(dtype)[name] for name in ("kernel", "bias")})
    return made


def hidden_states(*leading: int, dtype: Any = F32) -> jax.Array:
    return jnp.asarray(numbers(0, *leading, HIDDEN), dtype)


def logits_in_float64(x: Any, kernel: Any, bias: Any = None) -> np.ndarray:
    x, kernel = np.asarray(x).astype(np.float64), np.asarray(kernel).astype(np.float64)
    return x @ kernel.T + (0 if bias is None else np.asarray(bias).astype(np.float64))


def matrices(*adapters: int) -> tuple[np.ndarray, np.ndarray]:
    """A and B."""
    return numbers(5, *adapters, HIDDEN, RANK), numbers(6, *adapters, RANK, EXPERTS)


def with_adapter(base: Any, **options: Any) -> Any:
    """A layer with these matrices, scaled by two."""
    kind = RouterLoRA if isinstance(base, Router) else GateLinearLoRA
    layer = kind(base, RANK, alpha=2 * RANK, rngs=nnx.Rngs(0), **options)
    stack = () if layer.num_adapters is None else (layer.num_adapters,)
    nnx.update(layer, dict(zip(("lora_a", "lora_b"), map(jnp.asarray, matrices(*stack)), strict=True)))
    return layer


def assert_routing(routing: jr.Routing, logits: np.ndarray, spec: jr.RoutingSpec, **vectors: Any) -> None:
    """The logits exactly, the experts that they select, and weights within the roundings of float32."""
    logits = logits.reshape(-1, logits.shape[-1])
    if routing.logits is not None:
        assert routing.logits.dtype == np.float32
        np.testing.assert_array_equal(np.reshape(routing.logits, logits.shape), logits)
    experts = cases.select(logits.astype(np.float32), vectors.get("correction_bias"), spec)
    np.testing.assert_array_equal(np.reshape(routing.experts, experts.shape), experts)
    assert_weights(routing, logits, experts, spec, vectors.get("expert_scale"))


def assert_weights(routing: jr.Routing, logits: np.ndarray, experts: np.ndarray, spec: Any, expert_scale: Any) -> None:
    """Those of these experts and exact logits within the roundings of float32."""
    truth = bounds.weights(bounds.given(logits), experts, expert_scale, spec)
    bounds.within(np.reshape(routing.weights, experts.shape), truth)


def assert_same(actual: jr.Routing, expected: jr.Routing) -> None:
    """Every bit, of NaN and of the sign of zero too."""
    for result, truth in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        result, truth = np.asarray(result), np.asarray(truth)
        assert (result.shape, result.dtype) == (truth.shape, truth.dtype)
        np.testing.assert_array_equal(result.view(np.int32), truth.view(np.int32))
