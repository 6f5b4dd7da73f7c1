"""The C launchers of the CUDA kernels in CUDA-graph replay: the router GEMM with its bounds, and routing."""

from __future__ import annotations

import ctypes
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_router.dispatch import Problem
from jax_router.implementations import cuda
from jax_router.routing import RoutingSpec
from jax_router.timing import Operands, Samples, launches_of, replays

RouteBuffers = tuple[jax.Array, jax.Array, jax.Array]  # weights [T, k], experts [T, k], logits [T, E]


def out_buffer(operands: Operands, out_dtype: str = "float32") -> jax.Array:
    """A buffer [T, E] for `graph_replay`, full of NaN so that an element that is not written shows."""
    shape = (operands.x.shape[0], operands.weights[0].shape[0])
    return jax.device_put(np.full(shape, np.nan, jnp.dtype(out_dtype)), operands.x.device)


def route_buffers(operands: Operands, spec: RoutingSpec) -> RouteBuffers:
    """Buffers for `route_replay`: weights full of NaN, experts of -1. The logits are scratch."""
    selected = (operands.x.shape[0], spec.top_k)
    host = np.full(selected, np.nan, np.float32), np.full(selected, -1, np.int32)
    weights, experts = jax.device_put(host, operands.x.device)
    return weights, experts, out_buffer(operands)


def graph_replay(operands: Operands, out: jax.Array, *, weights: str, operation: str = "router_gemm") -> Samples:
    """Time the C launcher, or a bound ("empty", "read_weight"), in CUDA-graph replay.

    `out` [T, E] is overwritten behind JAX's back: read it only afterwards.

    Raises:
      NotImplementedError: the kernel does not take the problem.
      RuntimeError: a CUDA call failed, or the library cannot be built.
    """
    variants, _workspace = launches(operands, out, weights=weights)
    return _replay(operation, weights, variants, "jr_time_graph", cuda.OPERATIONS[operation])


def route_replay(operands: Operands, out: RouteBuffers, spec: RoutingSpec, *, weights: str) -> Samples:
    """Time the C launcher of routing, which returns no logits, in CUDA-graph replay.

    `out` is overwritten as by `graph_replay`, which has the errors.
    """
    variants, _workspace = launches(operands, out, spec, weights=weights)
    return _replay("route", weights, variants, "jr_time_route_graph")


def launches(
    operands: Operands, out: jax.Array | RouteBuffers, spec: RoutingSpec | None = None, *, weights: str
) -> tuple[Any, jax.Array | None]:
    """What a C launcher is called with, one per weight in rotation, and the workspace that must outlive the launches.

    Without a spec an array of `cuda.RouterGemmArgs`, with one of `cuda.RouteArgs`.
    """
    rotation = operands.rotation(weights)
    jax.block_until_ready((operands.x, rotation, operands.bias, out))
    bias, correction_bias = (operands.bias, None) if spec is None else operands.bias
    *selected, logits = (out,) if isinstance(out, jax.Array) else out
    problem = Problem(
        tokens=operands.x.shape[0],
        hidden=operands.x.shape[1],
        experts=rotation[0].shape[0],
        dtype=operands.x.dtype.name,
        weight_dtype=rotation[0].dtype.name,
        bias_dtype=None if bias is None else bias.dtype.name,
        out_dtype=logits.dtype.name,
        spec=spec,
    )
    scratch = cuda.workspace_bytes(problem.tokens, problem.experts)
    workspace = jax.device_put(np.zeros(scratch, np.uint8), operands.x.device) if scratch else None
    gemms = [
        cuda.RouterGemmArgs.of(
            problem,
            x=operands.x.unsafe_buffer_pointer(),
            weight=weight.unsafe_buffer_pointer(),
            bias=None if bias is None else bias.unsafe_buffer_pointer(),
            out=logits.unsafe_buffer_pointer(),
            workspace=None if workspace is None else jax.block_until_ready(workspace).unsafe_buffer_pointer(),
            workspace_bytes=scratch,
        )
        for weight in rotation
    ]
    if spec is None:
        return (cuda.RouterGemmArgs * len(gemms))(*gemms), workspace
    of_weights, of_experts = (array.unsafe_buffer_pointer() for array in selected)
    correction = (
        None if correction_bias is None else (correction_bias.unsafe_buffer_pointer(), correction_bias.dtype.name)
    )
    routes = [
        cuda.RouteArgs.of(
            problem,
            gemm=gemm,
            weights=of_weights,
            experts=of_experts,
            correction_bias=correction,
            return_logits=False,
        )
        for gemm in gemms
    ]
    return (cuda.RouteArgs * len(routes))(*routes), workspace


def _replay(operation: str, weights: str, variants: Any, function: str, *first: int) -> Samples:
    """Time `variants` by a function of the library that takes them behind the arguments `first`."""
    calls = launches_of(variants)

    def replay(repeats: int) -> list[float]:
        samples = (ctypes.c_float * repeats)()
        cuda.call(function, *first, variants, len(variants), calls, repeats, samples)
        return list(samples)

    return Samples(
        "graph_replay",
        weights,
        replays(replay, calls),
        calls,
        f"CUDA-graph replay of {calls} C launches ({operation}), {len(variants)} weights in rotation",
    )
