"""Pallas on Mosaic GPU: the router GEMM (`pallas_gemm.py`), and routing behind it (`pallas_routing.py`).

Run it alone on a CPU in Pallas' interpreter: `JAX_ROUTER_PALLAS_INTERPRET=1` and `implementation="pallas"`.
"""

from __future__ import annotations

import functools
import os
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jax_router.implementations import pallas_routing
from jax_router.implementations.pallas_gemm import CONFIGS, add_groups, group_sums, pick_config, slices_of
from jax_router.routing import Routing, RoutingSpec

if TYPE_CHECKING:
    from jax_router.dispatch import Device, Problem

INTERPRET_VARIABLE = "JAX_ROUTER_PALLAS_INTERPRET"
FIRST_JAX = (0, 11)  # 0.10.2 interprets no transposed wgmma operand and lowers Mosaic kernels in another way


def router_gemm(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    *,
    out_dtype: DTypeLike,
    weight_layout: str = "experts_hidden",
    config: int | None = None,
) -> jax.Array:
    """`logits[T, E] = x[T, H] @ weight[E, H].T + bias[E]` by the Mosaic GPU kernel; a row's bits depend on it alone.

    `config` indexes `CONFIGS`, None picks one; every configuration gives the same bits. Lowering for CUDA needs no GPU.
    """
    del weight_layout  # why_unsupported takes one alone
    logits = add_groups(_group_sums(x, weight, config), x.shape[0], weight.shape[0])
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
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
    """The router GEMM's kernel, then one that adds its groups, scores and selects. Row bits as of `router_gemm`.

    The logits are those of `router_gemm`, bit for bit. `config` is that of the router GEMM.
    """
    del weight_layout  # as in router_gemm
    results = pallas_routing.route_sums(
        _group_sums(x, weight, config),
        bias,
        correction_bias,
        expert_scale,
        experts,
        spec=spec,
        tokens=x.shape[0],
        experts=weight.shape[0],
        dtype=x.dtype,
        return_logits=return_logits,
        interpret=_interpreter(),
    )
    return Routing(*results)


def why_unsupported(problem: Problem, device: Device) -> str | None:
    """What the kernel does not take, from static facts; None if it takes the problem."""
    weight_dtype = problem.weight_dtype or problem.dtype
    if jax.__version_info__[:2] < FIRST_JAX:
        return f"needs jax {'.'.join(map(str, FIRST_JAX))} or newer, this is jax {jax.__version__}"
    if not (device.platform == "cpu" and os.environ.get(INTERPRET_VARIABLE) == "1"):
        if device.platform != "gpu" or device.compute_capability is None:
            hint = f" (on a CPU it runs in Pallas' interpreter if {INTERPRET_VARIABLE}=1)"
            return f"needs an NVIDIA GPU of compute capability 9.0, this device is {device.description}{hint}"
        if device.compute_capability.split(".")[0] != "9":
            return f"needs compute capability 9.0, this device is {device.description}"
    if problem.dtype not in ("bfloat16", "float16") or weight_dtype != problem.dtype:
        return f"needs x and weight both bfloat16 or both float16, they are {problem.dtype} and {weight_dtype}"
    if problem.weight_layout != "experts_hidden":
        return "takes weights [experts, hidden], this one is [hidden, experts]"
    if problem.bias_dtype not in (None, problem.dtype, "float32"):
        return f"needs a bias in float32 or in x's dtype, it is {problem.bias_dtype}"
    if problem.out_dtype not in (problem.dtype, "float32"):
        return f"needs out_dtype float32 or x's dtype, it is {problem.out_dtype}"
    if problem.hidden % 8 != 0:
        return f"needs hidden to be a multiple of 8 (TMA takes rows of whole 16 bytes), it is {problem.hidden}"
    return None if problem.spec is None else pallas_routing.why_unsupported(problem.spec, problem.experts)


@functools.cache
def unavailable() -> str | None:
    """Why Mosaic GPU cannot be imported on this machine, with what to do, or None."""
    try:
        import jax.experimental.pallas.mosaic_gpu  # noqa: F401
    except ImportError as error:
        return f"could not be imported: {error}. Install that module, or reinstall jax"
    return None


def _group_sums(x: jax.Array, weight: jax.Array, config: int | None) -> jax.Array:
    tokens, hidden = x.shape
    chosen = pick_config(tokens, hidden, weight.shape[0]) if config is None else CONFIGS[config]
    return group_sums(x, weight, chosen, slices_of(hidden), interpret=_interpreter())


def _interpreter() -> Any:
    """Interpreter parameters if this process opted in and computes on the CPU, else None."""
    if os.environ.get(INTERPRET_VARIABLE) != "1" or jax.default_backend() != "cpu":
        return None
    import jax.experimental.pallas.mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams()  # type: ignore[attr-defined]  # public since jax 0.11
