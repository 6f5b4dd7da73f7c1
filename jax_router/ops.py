"""The public operations: contract, differentiation, batching. What computes them is in `implementations`."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jax_router import checks, checks_route, dispatch, implementations, partitioning
from jax_router.computation import Decision, Operation, Request, batched_by_xla, decide, either, on_a_mesh
from jax_router.routing import Routing, RoutingSpec, round_logits, routing_weights, scale_of_experts


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
    request = Request.now(implementation, _device(x, weight), out_dtype, weight_layout=weight_layout)
    return _of_tokens(x, weight, bias, request=request)


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
    axis_name: str | tuple[str, ...] | None = None,
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
      axis_name: inside `jax.shard_map`, the axis or axes of the mesh that experts are split over, or None. Then weight,
        bias, correction_bias and expert_scale are those of this device's experts, E / n of them, and the results are
        of all experts, the same on every device of these axes, behind one all-gather of logits. Under jit on a mesh a
        sharded weight says it by itself. x and experts must be the same on every device of these axes, which their
        types say unless check_vma=False. Without these types `jax.grad` inside of the `shard_map` adds up what every
        device gets of the results, here as in all of JAX; outside of it gradients are right.

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
        experts; an id in experts that is out of range; an unknown layout or implementation; an axis_name outside of a
        shard_map over it, or an x that differs along it.
      NotImplementedError: no implementation named by `implementation` takes this problem on this device; says why. On
        a mesh what one device has is a problem of its own, and XLA says why while it compiles.

    Source: the routers of Hugging Face transformers, one `RoutingSpec` each; replay as in "Stabilizing MoE
    Reinforcement Learning by Aligning Training and Inference Routers" (arXiv 2510.11370).
    """
    shards = checks_route.shards(axis_name)
    vectors = correction_bias, expert_scale, experts
    arrays = checks_route.route_inputs(x, weight, bias, spec, *vectors, weight_layout, shards)
    checks_route.same_along(axis_name, x=arrays[0], experts=arrays[5])
    checks.flag("return_logits", return_logits)
    checks.implementation_names(implementation)
    request = Request.now(implementation, _device(*arrays[:2]), "float32", spec, return_logits, weight_layout)
    if axis_name is None:
        return _of_tokens(*arrays, request=request)
    logits = _of_tokens(*arrays[:3], request=request.of_gemm)
    rule = {"spec": spec, "dtype": arrays[0].dtype.name, "return_logits": return_logits}
    return partitioning.route_of_shards(logits, *arrays[3:], **rule, axis_name=axis_name, invariant=True)


def _of_tokens(*operands: Any, request: Request) -> Any:
    """The operation on checked operands: with no tokens nothing runs, and one may come without its axis."""
    if operands[0].ndim == 1:
        results = _of_tokens(*partitioning.of_each_token(lambda each: each[None], operands), request=request)
        return jax.tree.map(lambda result: result[0], results)
    return _operation(decide(*operands, request))(*operands)


def _device(*arrays: jax.Array) -> dispatch.Device:
    """Where concrete arrays are; while tracing, where JAX puts arrays by default."""
    if any(isinstance(array, jax.core.Tracer) for array in arrays):
        return dispatch.Device.default()
    return dispatch.Device.of(min(arrays[0].devices(), key=lambda device: device.id))


@functools.cache
def _forward(decision: Decision) -> Operation:
    """The batchable operation of one decision. Every result has the tokens of x as its leading axes."""
    request, computed = decision.request, on_a_mesh(decision)

    @jax.custom_batching.custom_vmap
    def forward(*operands: Any) -> Any:
        return computed(*operands)

    @forward.def_vmap
    def forward_of_batch(axis_size: int, in_batched: Sequence[Any], *operands: Any) -> tuple[Any, Any]:
        def all_batched(results: Any) -> tuple[Any, Any]:
            return results, jax.tree.map(lambda _: True, results)

        if not any(is_batched for index, is_batched in enumerate(in_batched) if index not in partitioning.BY_TOKEN):
            tokens = list(operands)
            for index in partitioning.BY_TOKEN:
                if index < len(operands) and operands[index] is not None and not in_batched[index]:
                    tokens[index] = partitioning.repeated(operands[index], axis_size)
            return all_batched(_forward(decide(*tokens, request))(*tokens))  # for that many tokens

        def one_by_one(*operands: Any) -> Any:
            batched = [operand for operand, is_batched in zip(operands, in_batched, strict=True) if is_batched]

            def one(of_batch: list[jax.Array]) -> Any:
                remaining = iter(of_batch)
                pairs = zip(operands, in_batched, strict=True)
                return forward(*(next(remaining) if is_batched else operand for operand, is_batched in pairs))

            return jax.lax.map(one, batched)

        in_axes = [0 if is_batched else None for is_batched in in_batched]
        batched_specification = functools.partial(batched_by_xla, request, in_axes)
        if decision.implementation == "xla":
            return all_batched(batched_specification(*operands))
        batched = either(decision, one_by_one, batched_specification) if decision.portable else one_by_one
        return all_batched(batched(*operands))

    return forward


def _gemm_in_float32(x: jax.Array, weight: jax.Array, bias: jax.Array | None, *, weight_layout: str) -> jax.Array:
    widened = x.astype(jnp.float32), weight.astype(jnp.float32)
    options = {"out_dtype": jnp.float32, "weight_layout": weight_layout}
    return implementations.load("xla").router_gemm(*widened, bias, **options)


def _weights_bwd(
    logits: jax.Array, experts: jax.Array, scale: jax.Array | None, cotangent: jax.Array, *, spec: RoutingSpec
) -> tuple[jax.Array, jax.Array | None]:
    """The cotangents of logits `[..., E]` and of the scale `[..., k]` of the selected experts, or None, of weights."""

    def weights(logits: jax.Array, scale: jax.Array | None) -> jax.Array:
        unscaled = routing_weights(logits, experts, None, spec)
        return unscaled if scale is None else unscaled * scale

    _, pullback = jax.vjp(weights, logits, scale)
    return pullback(cotangent)


@functools.cache
def _operation(decision: Decision) -> Operation:
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

    def of_operands(operands: Any, cotangent: jax.Array) -> Any:
        """The cotangents of x, weight and bias, each sharded as it is."""
        mesh = partitioning.mesh_of(operands)

        def pulled_back(cotangent: jax.Array, *operands: Any) -> Any:
            _, pullback = jax.vjp(in_float32, *operands)
            return pullback(cotangent)

        shardings = partitioning.shardings_on(mesh, operands)
        return partitioning.by_xla(pulled_back, mesh, shardings)(cotangent, *operands)

    def router_gemm_bwd(operands: Any, cotangent: jax.Array) -> Any:
        return of_operands(operands, cotangent.astype(jnp.float32))

    if spec is None:
        operation.defvjp(router_gemm_fwd, router_gemm_bwd)
        return jax.jit(operation)

    with_logits = operation if decision.request.return_logits else _operation(decision.with_logits)

    def route_fwd(*operands: Any) -> tuple[Routing, Any]:
        routing = with_logits(*operands)  # the logits are kept, so that the backward pass need not multiply for them
        x, weight, bias, _, expert_scale, _ = operands
        kept = (x, weight, bias), routing.logits, routing.experts, expert_scale
        logits = None
        if decision.request.return_logits:  # apart, so that XLA does not split what is kept as the caller's loss is
            logits = partitioning.by_tokens(lambda logits: logits)(routing.logits)
        return routing._replace(logits=logits), kept

    def route_bwd(kept: Any, cotangent: Routing) -> Any:
        of_gemm, logits, experts, expert_scale = kept
        scale, of_scale = None, None
        if expert_scale is not None:
            sharding = jax.typeof(experts).sharding
            of_experts = partitioning.by_xla(scale_of_experts, sharding.mesh, sharding)
            scale, pullback_scale = jax.vjp(of_experts, expert_scale, experts)
        if spec.round_logits:
            logits = round_logits(logits, of_gemm[0].dtype)
        of_rows = partitioning.by_tokens(functools.partial(_weights_bwd, spec=spec))
        of_logits, of_selected = of_rows(logits, experts, scale, cotangent.weights)
        if expert_scale is not None:
            of_scale, _ = pullback_scale(of_selected)
        if cotangent.logits is not None:
            of_logits = of_logits + cotangent.logits
        return (*of_operands(of_gemm, of_logits), None, of_scale, None)  # None: zero

    operation.defvjp(route_fwd, route_bwd)
    return jax.jit(operation)
