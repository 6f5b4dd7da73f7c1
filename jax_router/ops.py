"""The public operations: contract, differentiation, batching. What computes them is in `implementations`."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_router import checks, dispatch, implementations

Operation = Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array]


def router_gemm(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    out_dtype: DTypeLike = jnp.float32,
    implementation: str | Sequence[str] | None = None,
) -> jax.Array:
    """Router logits of a Mixture-of-Experts layer, accumulated in float32 and rounded once.

        logits[..., E] = x[..., H] @ weight[E, H].T + bias[E]

    >>> x, weight = jnp.ones((3, 8), jnp.bfloat16), jnp.ones((4, 8), jnp.bfloat16)
    >>> logits = router_gemm(x, weight, jnp.zeros(4))
    >>> logits.shape, logits.dtype
    ((3, 4), dtype('float32'))

    Args:
      x: hidden states `[..., H]`, bfloat16, float16 or float32. Leading axes are tokens: any number of them, or none.
      weight: `[E, H]` as checkpoints store it, in x's dtype or float32. Any E and H from 1.
      bias: `[E]` in x's dtype or float32, or None.
      out_dtype: float32 or x's dtype.
      implementation: None picks one and always works. A name ("xla", "pallas", "cuda") is used or raises, and never
        falls back. A sequence of names is tried in order. `jax_router.explain` says what is picked and why.

    Returns:
      Logits `[..., E]` in `out_dtype`. float32 inputs are computed to float32 accuracy. With mixed dtypes the 16-bit
      operand is widened first, which is exact. An inf or NaN stays in its row.

    Differentiable in reverse mode in x, weight and bias; the cotangents are computed in float32 and have the dtypes of
    their primals.

    Raises:
      TypeError: x, weight or bias is no array, or `implementation` no name.
      ValueError: shapes or dtypes that do not fit each other or are not taken; an unknown implementation.
      NotImplementedError: no implementation named by `implementation` takes this problem on this device; says why.

    Source: `ReplicatedLinear` and `GateLinear` of vLLM, `GptOssTopKRouter` of Hugging Face transformers.
    """
    x, weight, bias, out_dtype = checks.router_gemm_inputs(x, weight, bias, out_dtype)
    checks.implementation_names(implementation)
    *leading, hidden = x.shape
    tokens, experts = math.prod(leading), weight.shape[0]
    if tokens == 0:
        return jnp.zeros((*leading, experts), out_dtype)
    named = implementation if implementation is None or isinstance(implementation, str) else tuple(implementation)
    operands = x.reshape(tokens, hidden), weight, bias
    operation = _operation(_decide(*operands, _Request.now(named, _device(x, weight), out_dtype)))
    return operation(*operands).reshape(*leading, experts)


def _device(*arrays: jax.Array) -> dispatch.Device:
    """Where concrete arrays are; while tracing, where JAX puts arrays by default."""
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return dispatch.Device.default()
    return dispatch.Device.of(min(arrays[0].devices(), key=lambda device: device.id))


@dataclass(frozen=True)
class _Request:
    """What the caller wants, apart from the operands."""

    implementation: str | tuple[str, ...] | None
    device: dispatch.Device
    out_dtype: str
    environment: tuple[str | None, ...]  # the dispatcher's variables: with others, what was traced is traced again

    @classmethod
    def now(cls, implementation: str | tuple[str, ...] | None, device: dispatch.Device, out_dtype: str) -> _Request:
        variables = (dispatch.PREFER_VARIABLE, dispatch.DISABLE_VARIABLE)
        return cls(implementation, device, out_dtype, tuple(map(os.environ.get, variables)))


@dataclass(frozen=True)
class _Decision:
    """What computes one problem, and the request that it answers."""

    implementation: str
    config: int | None
    request: _Request

    @property
    def portable(self) -> bool:
        """Whether XLA keeps a choice: under jit for another platform than the default device's, a kernel cannot run."""
        picked = self.request.implementation is None and self.implementation != "xla"
        return picked and self.request.device.platform == "gpu"


def _decide(x: jax.Array, weight: jax.Array, bias: jax.Array | None, request: _Request) -> _Decision:
    problem = dispatch.Problem(
        tokens=x.shape[0],
        hidden=x.shape[1],
        experts=weight.shape[0],
        dtype=x.dtype.name,
        weight_dtype=weight.dtype.name,
        bias_dtype=None if bias is None else bias.dtype.name,
        out_dtype=request.out_dtype,
    )
    choice = dispatch.resolve(problem, request.device, request.implementation)
    return _Decision(choice.implementation, choice.config, request)


def _with_types(kernel: Operation) -> Operation:
    """The kernel, its result typed as JAX types the specification's on a mesh: a custom call drops that."""

    def typed(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        of_x, of_weight = jax.typeof(x), jax.typeof(weight)
        mesh = of_x.sharding.mesh
        run = kernel
        if not mesh.empty and mesh.explicit_axes:
            spec = jax.sharding.PartitionSpec(of_x.sharding.spec[0], of_weight.sharding.spec[0])
            sharding = jax.sharding.NamedSharding(mesh, spec)
            run = jax.sharding.auto_axes(kernel, axes=mesh.explicit_axes, out_sharding=sharding)
        logits = run(x, weight, bias)
        varying = of_x.manual_axis_type.varying | of_weight.manual_axis_type.varying
        missing = tuple(varying - jax.typeof(logits).manual_axis_type.varying)
        return jax.lax.pcast(logits, missing, to="varying") if missing else logits

    return typed


@functools.cache
def _forward(decision: _Decision) -> Operation:
    """The batchable operation of one decision: x [T, H], weight [E, H], bias [E] or None -> [T, E]."""
    request, out_dtype = decision.request, decision.request.out_dtype
    module = implementations.load(decision.implementation)
    kernel = _with_types(functools.partial(module.router_gemm, out_dtype=out_dtype, config=decision.config))
    specification = functools.partial(implementations.load("xla").router_gemm, out_dtype=out_dtype)

    def on_platform(for_kernel: Operation, for_specification: Operation, *operands: Any) -> jax.Array:
        if decision.implementation == "xla":
            return for_specification(*operands)
        if not decision.portable:
            return for_kernel(*operands)
        return jax.lax.platform_dependent(*operands, cuda=for_kernel, default=for_specification)

    @jax.custom_batching.custom_vmap
    def forward(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        if x.shape[0] == 0:  # a vmap over an axis of size 0
            return jnp.zeros((0, weight.shape[0]), out_dtype)
        return on_platform(kernel, specification, x, weight, bias)

    @forward.def_vmap
    def forward_of_batch(axis_size: int, in_batched: Sequence[Any], *operands: Any) -> tuple[jax.Array, bool]:
        x, weight, bias = operands
        if in_batched[0] and not in_batched[1] and not in_batched[2]:
            tokens, hidden = x.shape[1:]
            folded = x.reshape(axis_size * tokens, hidden), weight, bias
            again = forward if axis_size * tokens == 0 else _forward(_decide(*folded, request))  # for that many tokens
            return again(*folded).reshape(axis_size, tokens, weight.shape[0]), True

        def one_by_one(*operands: Any) -> jax.Array:
            batched = [operand for operand, is_batched in zip(operands, in_batched, strict=True) if is_batched]

            def one(of_batch: list[jax.Array]) -> jax.Array:
                remaining = iter(of_batch)
                pairs = zip(operands, in_batched, strict=True)
                return forward(*(next(remaining) if is_batched else operand for operand, is_batched in pairs))

            return jax.lax.map(one, batched)

        in_axes = [0 if is_batched else None for is_batched in in_batched]
        return on_platform(one_by_one, jax.vmap(specification, in_axes), *operands), True

    return forward


@functools.cache
def _operation(decision: _Decision) -> Operation:
    """The differentiable form of `_forward`."""
    forward = _forward(decision)

    @jax.custom_vjp
    def router_gemm(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        return forward(x, weight, bias)

    def router_gemm_fwd(*operands: Any) -> tuple[jax.Array, Any]:
        return router_gemm(*operands), operands

    def in_float32(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
        widened = x.astype(jnp.float32), weight.astype(jnp.float32)
        return implementations.load("xla").router_gemm(*widened, bias, out_dtype=jnp.float32)

    def router_gemm_bwd(operands: Any, cotangent: jax.Array) -> Any:
        # Every implementation has the specification's gradient. JAX derives it, with the types that shardings ask for.
        _, pullback = jax.vjp(in_float32, *operands)
        return pullback(cotangent.astype(jnp.float32))

    router_gemm.defvjp(router_gemm_fwd, router_gemm_bwd)
    return jax.jit(router_gemm)
