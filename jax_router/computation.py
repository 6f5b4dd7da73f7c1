"""One call: what is asked for, what the dispatcher decides, and the function that computes it, on a mesh or without."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from jax_router import dispatch, implementations, partitioning
from jax_router.partitioning import Operation
from jax_router.routing import Routing, RoutingSpec


@dataclass(frozen=True)
class Request:
    """What the caller wants, apart from the operands."""

    implementation: str | tuple[str, ...] | None
    device: dispatch.Device
    out_dtype: str
    spec: RoutingSpec | None  # None: the router GEMM alone
    return_logits: bool
    weight_layout: str
    environment: tuple[str | None, ...]  # the dispatcher's variables: with others, what was traced is traced again

    @classmethod
    def now(
        cls,
        implementation: str | Sequence[str] | None,
        device: dispatch.Device,
        out_dtype: str,
        spec: RoutingSpec | None = None,
        return_logits: bool = False,
        weight_layout: str = "experts_hidden",
    ) -> Request:
        named = implementation if implementation is None or isinstance(implementation, str) else tuple(implementation)
        variables = (dispatch.PREFER_VARIABLE, dispatch.DISABLE_VARIABLE)
        environment = tuple(map(os.environ.get, variables))
        return cls(named, device, out_dtype, spec, return_logits, weight_layout, environment)

    @property
    def experts_axis(self) -> int:
        """Of the weight."""
        return implementations.experts_axis(self.weight_layout)

    @property
    def of_gemm(self) -> Request:
        """The logits of the same call alone."""
        return replace(self, spec=None, return_logits=False)


@dataclass(frozen=True)
class Decision:
    """What computes one problem, and the request that it answers."""

    implementation: str
    config: int | None
    request: Request

    @property
    def portable(self) -> bool:
        """Whether XLA keeps a choice: under jit for another platform than the default device's, a kernel cannot run."""
        picked = self.request.implementation is None and self.implementation != "xla"
        return picked and self.request.device.platform == "gpu"

    @property
    def with_logits(self) -> Decision:
        """The same computation, that returns its logits too."""
        return replace(self, request=replace(self.request, return_logits=True))

    def function(self, implementation: str) -> Operation:
        """The operation as an implementation has it."""
        module, request = implementations.load(implementation), self.request
        function = module.router_gemm
        options: dict[str, Any] = {"out_dtype": request.out_dtype}
        if request.spec is not None:
            function, options = module.route, {"spec": request.spec, "return_logits": request.return_logits}
        options["weight_layout"] = request.weight_layout
        if implementation == "xla":
            return functools.partial(function, **options)
        config = self.config if implementation == self.implementation else None

        def of_rows(*operands: Any) -> Any:
            """The kernels take x [T, H]."""
            leading = operands[0].shape[:-1]
            tokens = math.prod(leading)
            rows = partitioning.of_each_token(lambda each: each.reshape(tokens, each.shape[-1]), operands)
            results = function(*rows, **options, config=config)
            return jax.tree.map(lambda result: result.reshape(*leading, result.shape[-1]), results)

        return of_rows


def decide(x: jax.Array, weight: jax.Array, bias: jax.Array | None, *others: Any) -> Decision:
    *_, request = others
    problem = dispatch.Problem(
        tokens=math.prod(x.shape[:-1]),
        hidden=x.shape[-1],
        experts=weight.shape[request.experts_axis],
        dtype=x.dtype.name,
        weight_dtype=weight.dtype.name,
        weight_layout=request.weight_layout,
        bias_dtype=None if bias is None else bias.dtype.name,
        out_dtype=request.out_dtype,
        spec=request.spec,
    )
    if not problem.symbolic and problem.tokens == 0:
        return Decision("xla", None, request)  # whatever is named
    choice = dispatch.resolve(problem, request.device, request.implementation)
    return Decision(choice.implementation, choice.config, request)


def _computed(decision: Decision) -> Operation:
    """The operation of one decision on one device, which launches nothing for no tokens."""
    request, specification = decision.request, decision.function("xla")
    computed = specification
    if decision.implementation != "xla":
        computed = partitioning.varying_as(specification, decision.function(decision.implementation))
        computed = either(decision, computed, specification) if decision.portable else computed

    def nothing(x: jax.Array, weight: jax.Array, *_: Any) -> Any:
        logits = jnp.zeros((*x.shape[:-1], weight.shape[request.experts_axis]), request.out_dtype)
        if request.spec is None:
            return logits
        of_each = (*x.shape[:-1], request.spec.top_k)
        each = jnp.zeros(of_each, jnp.float32), jnp.zeros(of_each, jnp.int32)
        return Routing(*each, logits if request.return_logits else None)

    def of_tokens(*operands: Any) -> Any:
        empty = 0 in operands[0].shape[:-1]
        return (partitioning.varying_as(specification, nothing) if empty else computed)(*operands)

    return of_tokens


def either(decision: Decision, kernel: Operation, specification: Operation) -> Operation:
    """The kernel where it is compiled for CUDA, and elsewhere the specification."""
    if decision.implementation == "pallas":
        from jax_router.lowering import for_cuda_alone

        kernel = for_cuda_alone(kernel)
    return lambda *operands: jax.lax.platform_dependent(*operands, cuda=kernel, default=specification)


def _of_device(*operands: Any, request: Request) -> Any:
    """The operation on what one device of a mesh has: the dispatcher decides for its tokens and experts."""
    return _computed(decide(*operands, request))(*operands)


def _of_shards(*operands: Any, request: Request, axis_name: tuple[str, ...]) -> Routing:
    logits = _of_device(*operands[:3], request=request.of_gemm)
    options = {"spec": request.spec, "dtype": operands[0].dtype.name, "return_logits": request.return_logits}
    return partitioning.route_of_shards(logits, *operands[3:], **options, axis_name=axis_name, invariant=False)


def batched_by_xla(request: Request, in_axes: Sequence[int | None], *operands: Any) -> Any:
    """The specification of a batch in which not only tokens differ: its GEMM by XLA, selection where tokens are."""
    gemm, size = Decision("xla", None, request.of_gemm).function("xla"), operands[in_axes.index(0)].shape[0]
    logits = jax.vmap(gemm, in_axes[:3], axis_size=size)(*operands[:3])
    if request.spec is None:
        return logits
    correction_bias, expert_scale = (
        vector if vector is None or axis is None else jnp.expand_dims(vector, range(1, logits.ndim - 1))
        for vector, axis in zip(operands[3:5], in_axes[3:5], strict=True)
    )
    *_, experts = operands
    if experts is not None and in_axes[5] is None:
        experts = partitioning.repeated(experts, logits.shape[0])
    rule = {"spec": request.spec, "dtype": operands[0].dtype.name}
    weights, selected = partitioning.route_by_tokens(logits, correction_bias, expert_scale, experts, **rule)
    return Routing(weights, selected, logits if request.return_logits else None)


def on_a_mesh(decision: Decision) -> Operation:
    """The operation, partitioned as `partitioning` says; logits of plain JAX are by XLA itself."""
    request = decision.request
    by_xla = decision.implementation == "xla" and request.spec is None
    by_xla |= decision.implementation == "pallas" and request.device.platform == "cpu"  # Pallas' interpreter calls back
    return partitioning.partitioned(
        _computed(decision),
        None if by_xla else functools.partial(_of_device, request=request),
        None if request.spec is None else functools.partial(_of_shards, request=request),
        experts_axis=request.experts_axis,
        return_logits=request.return_logits,
    )
