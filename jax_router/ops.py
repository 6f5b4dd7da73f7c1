"""The public operations: contract, differentiation, batching. What computes them is in `implementations`."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_router import checks, checks_route, dispatch, implementations
from jax_router.routing import Routing, RoutingSpec, round_logits, routing_weights

# Of operands x, weight, bias or None, and of `route` also correction_bias, expert_scale, experts, each or None.
Operation = Callable[..., Any]
BY_TOKEN = (0, 5)  # the operands whose first axis is tokens: x and experts


def router_gemm(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    out_dtype: DTypeLike = jnp.float32,
    weight_layout: str = "experts_hidden",
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
      weight_layout: "experts_hidden" for a weight `[E, H]`, "hidden_experts" for one `[H, E]`, as the kernel of a Flax
        `Dense` is. Either is read as it is: nothing is transposed. Static under jit.
      implementation: None picks one and always works. A name ("xla", "pallas", "cuda") is used or raises, and never
        falls back. A sequence of names is tried in order. `jax_router.explain` says what is picked and why.

    Returns:
      Logits `[..., E]` in `out_dtype`. float32 inputs are computed to float32 accuracy, and so are mixed dtypes, as if
      the 16-bit operand were widened. An inf or NaN stays in its row; with a float32 weight `cuda` may answer NaN where
      an infinity is right.

    Differentiable in reverse mode in x, weight and bias; the cotangents are computed in float32 and have the dtypes of
    their primals, that of weight its layout too.

    Raises:
      TypeError: x, weight or bias is no array, or weight_layout or `implementation` no name.
      ValueError: shapes or dtypes that do not fit each other or are not taken; an unknown layout or implementation.
      NotImplementedError: no implementation named by `implementation` takes this problem on this device; says why.

    Source: `ReplicatedLinear` and `GateLinear` of vLLM, `GptOssTopKRouter` of Hugging Face transformers.
    """
    x, weight, bias, out_dtype = checks.router_gemm_inputs(x, weight, bias, out_dtype, weight_layout)
    checks.implementation_names(implementation)
    *leading, hidden = x.shape
    tokens, experts = math.prod(leading), weight.shape[implementations.experts_axis(weight_layout)]
    if tokens == 0:
        return jnp.zeros((*leading, experts), out_dtype)
    operands = x.reshape(tokens, hidden), weight, bias
    request = _Request.now(implementation, _device(x, weight), out_dtype, weight_layout=weight_layout)
    return _operation(_decide(*operands, request))(*operands).reshape(*leading, experts)


def route(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    spec: RoutingSpec,
    correction_bias: ArrayLike | None = None,
    expert_scale: ArrayLike | None = None,
    experts: ArrayLike | None = None,
    weight_layout: str = "experts_hidden",
    implementation: str | Sequence[str] | None = None,
    return_logits: bool = False,
) -> Routing:
    """The experts of every token and their weights: router GEMM, scoring and selection as `RoutingSpec` says them.

        logits[..., E] = x[..., H] @ weight[E, H].T + bias[E], then the rule of spec

    >>> x, weight = jnp.ones((3, 8), jnp.bfloat16), jnp.eye(4, 8, dtype=jnp.bfloat16)
    >>> spec = RoutingSpec(top_k=2, score_function="softmax_topk")
    >>> routing = route(x, weight, jnp.arange(4.0), spec=spec)
    >>> routing.experts
    Array([[3, 2],
           [3, 2],
           [3, 2]], dtype=int32)
    >>> replayed = route(x, weight, jnp.arange(4.0), spec=spec, experts=routing.experts)
    >>> bool((replayed.weights == routing.weights).all())
    True

    Args:
      x: hidden states `[..., H]`, bfloat16, float16 or float32. Leading axes are tokens: any number of them, or none.
      weight: `[E, H]` as checkpoints store it, in x's dtype or float32. Any E and H from 1.
      bias: `[E]` in x's dtype or float32, or None. Part of the logits.
      spec: the rule.
      correction_bias: `[E]` in x's dtype or float32, or None. Moves the selection and not the weights.
      expert_scale: `[E]` in x's dtype or float32, or None. Multiplies the weights.
      experts: `[..., k]` of any integer dtype, or None. The selection as given, to replay a recorded one or for routers
        that look experts up in a table; spec and correction_bias then select nothing. Recorded experts give the bits
        of the recorded weights where the logits have the same bits. Ids are checked where they are concrete; under jit
        an id out of range comes back as it was given, its weight and every weight it is normalised with as NaN.
      weight_layout: as in `router_gemm`: "hidden_experts" for a weight `[H, E]`. Static under jit.
      implementation: None picks one and always works. A name ("xla", "pallas", "cuda") is used or raises, and never
        falls back. A sequence of names is tried in order. `jax_router.explain` says what is picked and why.
      return_logits: return the logits too, those of `router_gemm` of the same implementation: of the kernels bit for
        bit; XLA may compile the two apart on a GPU. They are never rounded, whatever spec.round_logits says.

    Returns:
      `Routing(weights, experts, logits)`: float32 `[..., k]`, int32 `[..., k]` with the best expert first, and float32
      `[..., E]` or None.

    Differentiable in reverse mode in x, weight, bias and expert_scale, with the selection fixed; the gradient of
    correction_bias is zero, and rounding logits counts as the identity. Every implementation has the gradient of the
    specification; the cotangents are computed in float32 and have the dtypes of their primals, that of weight its
    layout too.

    Raises:
      TypeError: an array is none, spec is no `RoutingSpec`, return_logits no bool, or weight_layout or
        `implementation` no name.
      ValueError: shapes or dtypes that do not fit each other or are not taken; a spec that does not fit the number of
        experts; an id in experts that is out of range; an unknown layout or implementation.
      NotImplementedError: no implementation named by `implementation` takes this problem on this device; says why.

    Source: the routers of Hugging Face transformers, one `RoutingSpec` each; replay as in "Stabilizing MoE
    Reinforcement Learning by Aligning Training and Inference Routers" (arXiv 2510.11370).
    """
    arrays = checks_route.route_inputs(x, weight, bias, spec, correction_bias, expert_scale, experts, weight_layout)
    checks.flag("return_logits", return_logits)
    checks.implementation_names(implementation)
    tokens_and_hidden, matrix, *vectors, given = arrays
    *leading, hidden = tokens_and_hidden.shape
    tokens, count = math.prod(leading), matrix.shape[implementations.experts_axis(weight_layout)]
    if tokens == 0:
        logits = jnp.zeros((*leading, count), jnp.float32) if return_logits else None
        of_each = (*leading, spec.top_k)
        return Routing(jnp.zeros(of_each, jnp.float32), jnp.zeros(of_each, jnp.int32), logits)
    given = None if given is None else given.reshape(tokens, spec.top_k)
    operands = tokens_and_hidden.reshape(tokens, hidden), matrix, *vectors, given
    device = _device(tokens_and_hidden, matrix)
    request = _Request.now(implementation, device, "float32", spec, return_logits, weight_layout)
    routing = _operation(_decide(*operands, request))(*operands)
    return jax.tree.map(lambda result: result.reshape(*leading, result.shape[-1]), routing)


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
    ) -> _Request:
        named = implementation if implementation is None or isinstance(implementation, str) else tuple(implementation)
        variables = (dispatch.PREFER_VARIABLE, dispatch.DISABLE_VARIABLE)
        environment = tuple(map(os.environ.get, variables))
        return cls(named, device, out_dtype, spec, return_logits, weight_layout, environment)

    @property
    def experts_axis(self) -> int:
        """Of the weight."""
        return implementations.experts_axis(self.weight_layout)


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

    @property
    def with_logits(self) -> _Decision:
        """The same computation, that returns its logits too."""
        return replace(self, request=replace(self.request, return_logits=True))

    def function(self, implementation: str) -> Operation:
        """The operation as an implementation has it, but for the configuration."""
        module, request = implementations.load(implementation), self.request
        layout = request.weight_layout
        if request.spec is None:
            return functools.partial(module.router_gemm, out_dtype=request.out_dtype, weight_layout=layout)
        rule = {"spec": request.spec, "return_logits": request.return_logits}
        return functools.partial(module.route, **rule, weight_layout=layout)


def _decide(x: jax.Array, weight: jax.Array, bias: jax.Array | None, *others: Any) -> _Decision:
    *_, request = others
    problem = dispatch.Problem(
        tokens=x.shape[0],
        hidden=x.shape[1],
        experts=weight.shape[request.experts_axis],
        dtype=x.dtype.name,
        weight_dtype=weight.dtype.name,
        weight_layout=request.weight_layout,
        bias_dtype=None if bias is None else bias.dtype.name,
        out_dtype=request.out_dtype,
        spec=request.spec,
    )
    choice = dispatch.resolve(problem, request.device, request.implementation)
    return _Decision(choice.implementation, choice.config, request)


def _partitioned_by_xla(function: Operation, mesh: Any, shardings: Any) -> Operation:
    """The function, partitioned by XLA on a mesh with Explicit axes too; its results have these shardings there."""
    if mesh.empty or not mesh.explicit_axes:
        return function
    return jax.sharding.auto_axes(function, axes=mesh.explicit_axes, out_sharding=shardings)


def _on_a_mesh(function: Operation, request: _Request) -> Operation:
    """The operation with results sharded as x and weight: neither a custom call nor top_k derives that on such axes."""

    def placed(*operands: Any) -> Any:
        of_x, of_weight = jax.typeof(operands[0]).sharding, jax.typeof(operands[1]).sharding

        def rows(columns: Any) -> jax.sharding.NamedSharding:
            return jax.sharding.NamedSharding(of_x.mesh, jax.sharding.PartitionSpec(of_x.spec[0], columns))

        shardings: Any = rows(of_weight.spec[request.experts_axis])
        if request.spec is not None:
            each: Any = rows(None)
            shardings = Routing(each, each, shardings if request.return_logits else None)
        return _partitioned_by_xla(function, of_x.mesh, shardings)(*operands)

    return placed


def _varying_as(specification: Operation, kernel: Operation) -> Operation:
    """The kernel, its results varying over the axes of a shard_map that the specification's vary over."""

    def typed(*operands: Any) -> Any:
        traced, shapes = jax.make_jaxpr(specification, return_shape=True)(*operands)
        expected = jax.tree.unflatten(jax.tree.structure(shapes), traced.out_avals)

        def cast(result: jax.Array, expected: Any) -> jax.Array:
            missing = expected.manual_axis_type.varying - jax.typeof(result).manual_axis_type.varying
            return jax.lax.pcast(result, tuple(missing), to="varying") if missing else result

        return jax.tree.map(cast, kernel(*operands), expected)

    return typed


@functools.cache
def _forward(decision: _Decision) -> Operation:
    """The batchable operation of one decision. Every result has the tokens of x as its first axis."""
    request, specification = decision.request, decision.function("xla")
    if request.spec is not None:
        specification = _on_a_mesh(specification, request)
    bare = functools.partial(decision.function(decision.implementation), config=decision.config)
    kernel = _varying_as(specification, _on_a_mesh(bare, request))

    def on_platform(for_kernel: Operation, for_specification: Operation, *operands: Any) -> Any:
        if decision.implementation == "xla":
            return for_specification(*operands)
        if not decision.portable:
            return for_kernel(*operands)
        if decision.implementation == "pallas":
            from jax_router.lowering import for_cuda_alone

            for_kernel = for_cuda_alone(for_kernel)
        return jax.lax.platform_dependent(*operands, cuda=for_kernel, default=for_specification)

    @jax.custom_batching.custom_vmap
    def forward(*operands: Any) -> Any:
        if operands[0].shape[0] == 0:  # a vmap over an axis of size 0
            results = jax.eval_shape(specification, *operands)
            return jax.tree.map(lambda result: jnp.zeros(result.shape, result.dtype), results)
        return on_platform(kernel, specification, *operands)

    @forward.def_vmap
    def forward_of_batch(axis_size: int, in_batched: Sequence[Any], *operands: Any) -> tuple[Any, Any]:
        def all_batched(results: Any) -> tuple[Any, Any]:
            return results, jax.tree.map(lambda _: True, results)

        tokens = operands[0].shape[1 if in_batched[0] else 0]
        if not any(is_batched for index, is_batched in enumerate(in_batched) if index not in BY_TOKEN):
            folded = list(operands)
            for index in BY_TOKEN:
                if index < len(operands) and operands[index] is not None:
                    each = operands[index] if in_batched[index] else jnp.stack([operands[index]] * axis_size)
                    folded[index] = each.reshape(axis_size * tokens, each.shape[-1])
            again = forward if axis_size * tokens == 0 else _forward(_decide(*folded, request))  # for that many tokens
            unfold = lambda result: result.reshape(axis_size, tokens, result.shape[-1])  # noqa: E731
            return all_batched(jax.tree.map(unfold, again(*folded)))

        def one_by_one(*operands: Any) -> Any:
            batched = [operand for operand, is_batched in zip(operands, in_batched, strict=True) if is_batched]

            def one(of_batch: list[jax.Array]) -> Any:
                remaining = iter(of_batch)
                pairs = zip(operands, in_batched, strict=True)
                return forward(*(next(remaining) if is_batched else operand for operand, is_batched in pairs))

            return jax.lax.map(one, batched)

        in_axes = [0 if is_batched else None for is_batched in in_batched]
        return all_batched(on_platform(one_by_one, jax.vmap(specification, in_axes), *operands))

    return forward


def _gemm_in_float32(x: jax.Array, weight: jax.Array, bias: jax.Array | None, *, weight_layout: str) -> jax.Array:
    widened = x.astype(jnp.float32), weight.astype(jnp.float32)
    options = {"out_dtype": jnp.float32, "weight_layout": weight_layout}
    return implementations.load("xla").router_gemm(*widened, bias, **options)


@functools.cache
def _operation(decision: _Decision) -> Operation:
    """The differentiable form of `_forward`.

    Every implementation has the specification's gradient. JAX derives it, with the types that shardings ask for.
    """
    forward, spec = _forward(decision), decision.request.spec
    in_float32 = functools.partial(_gemm_in_float32, weight_layout=decision.request.weight_layout)

    @jax.custom_vjp
    def operation(*operands: Any) -> Any:
        return forward(*operands)

    def router_gemm_fwd(*operands: Any) -> tuple[jax.Array, Any]:
        return operation(*operands), operands

    def router_gemm_bwd(operands: Any, cotangent: jax.Array) -> Any:
        _, pullback = jax.vjp(in_float32, *operands)
        return pullback(cotangent.astype(jnp.float32))

    if spec is None:
        operation.defvjp(router_gemm_fwd, router_gemm_bwd)
        return jax.jit(operation)

    with_logits = operation if decision.request.return_logits else _operation(decision.with_logits)

    def route_fwd(*operands: Any) -> tuple[Routing, Any]:
        routing = with_logits(*operands)  # the logits are kept, so that the backward pass need not multiply for them
        x, weight, bias, _, expert_scale, _ = operands
        kept = (x, weight, bias), routing.logits, routing.experts, expert_scale
        return routing if decision.request.return_logits else routing._replace(logits=None), kept

    def route_bwd(kept: Any, cotangent: Routing) -> Any:
        of_gemm, logits, experts, expert_scale = kept
        if spec.round_logits:  # before differentiating: no cotangent is rounded to x's dtype on its way
            logits = round_logits(logits, of_gemm[0].dtype)
        sharding = jax.typeof(experts).sharding
        weights = _partitioned_by_xla(functools.partial(routing_weights, spec=spec), sharding.mesh, sharding)
        _, pullback = jax.vjp(weights, logits, experts, expert_scale)
        of_logits, _, of_scale = pullback(cotangent.weights)
        if cotangent.logits is not None:
            of_logits = of_logits + cotangent.logits
        _, pullback = jax.vjp(in_float32, *of_gemm)
        return (*pullback(of_logits), None, of_scale, None)  # None: zero

    operation.defvjp(route_fwd, route_bwd)
    return jax.jit(operation)
