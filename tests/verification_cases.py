"""Subjects for the tests of the verification: routers of some families, and the specification with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from jax_router import routing
from jax_router.routing import RoutingSpec
from jax_router.sweep_points import Shape
from jax_router.verification.data import NUMERIC_TOKENS, Operands, Subject, compile_call, draw, put
from jax_router.verification.judge import judge_logits, judge_routing
from jax_router.verification.result import Context

HIDDEN, EXPERTS = 200, 32
CPU = jax.local_devices(backend="cpu")[0]


class OnGpu(Context):
    """What the checks of a GPU get here, so that they run."""

    on_gpu = True


def context(**changes: Any) -> Context:
    """One number of tokens in all, so that XLA compiles once."""
    return Context(CPU, **{"tokens": (NUMERIC_TOKENS,), **changes})


def shape(name: str, spec: RoutingSpec | None = None, *, bias: bool = False, correction_bias: bool = False) -> Shape:
    return Shape(HIDDEN, EXPERTS, bias, (name,), spec, correction_bias)


GEMM = shape("router GEMM", bias=True)
GPT_OSS = shape("gpt-oss", RoutingSpec(4, "softmax_topk"), bias=True)
DEEPSEEK_V3 = shape(
    "DeepSeek-V3",
    RoutingSpec(6, "sigmoid", True, renormalize_epsilon=1e-20, scaling_factor=2.5, num_groups=4, group_topk=2),
    correction_bias=True,
)
DEEPSEEK_V2 = shape(
    "DeepSeek-V2", RoutingSpec(6, "softmax", scaling_factor=16.0, num_groups=4, group_topk=2, group_score="max")
)
DEEPSEEK_V4 = shape("DeepSeek-V4", RoutingSpec(6, "sqrtsoftplus", True, scaling_factor=1.5), correction_bias=True)
QWEN3 = shape("Qwen3", RoutingSpec(4, "softmax", True))
ROUNDED = shape("in 16 bits", RoutingSpec(4, "softmax", True, round_logits=True))


def given(expert_scale: bool = True) -> Operands:
    """As of a checkpoint."""
    random = np.random.default_rng(5)
    weight = (random.normal(size=(EXPERTS, HIDDEN)) * 1.5 / np.sqrt(HIDDEN)).astype(ml_dtypes.bfloat16)
    bias = random.normal(size=EXPERTS).astype(np.float32)
    scale = random.uniform(0.5, 2, EXPERTS).astype(ml_dtypes.bfloat16) if expert_scale else None
    return Operands(None, weight, bias, None, scale)


SCALED = Subject("xla", shape("scaled", RoutingSpec(4, "softmax", True), bias=True), given=given())
SUBJECTS = {
    **{
        each.models[0]: Subject("xla", each)
        for each in (GEMM, GPT_OSS, DEEPSEEK_V3, DEEPSEEK_V2, DEEPSEEK_V4, QWEN3, ROUNDED)
    },
    "scaled": SCALED,
    "float16": Subject("xla", GPT_OSS, "float16"),
}

Logits = Callable[[Operands], jax.Array]


def product(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.matmul(x.astype(jnp.float32), weight.astype(jnp.float32).T, precision="highest")


def right_logits(operands: Operands) -> jax.Array:
    logits = product(operands.x, operands.weight)
    return logits if operands.bias is None else logits + operands.bias.astype(jnp.float32)


def function(
    spec: RoutingSpec | None,
    *,
    logits: Logits = right_logits,
    seen: Callable[[jax.Array], jax.Array] = lambda logits: logits,
    select: Callable[..., jax.Array] = routing.select_experts,
    weigh: Callable[..., jax.Array] = routing.routing_weights,
) -> Callable[..., tuple[jax.Array, ...]]:
    """What a subject calls: logits, what routing sees of them, the selection, its weights. Each can be replaced."""

    def call(operands: Operands, *, return_logits: bool = False) -> tuple[jax.Array, ...]:
        found = logits(operands)
        if spec is None:
            return (found,)
        of_routing = seen(found)
        experts = select(of_routing, operands.correction_bias, spec)
        weights = weigh(of_routing, experts, operands.expert_scale, spec)
        return (weights, experts, found) if return_logits else (weights, experts)

    return call


def broken(subject_shape: Shape, implementation: str = "xla", dtype: str = "bfloat16", **parts: Any) -> Subject:
    return Subject(implementation, subject_shape, dtype, function=function(subject_shape.spec, **parts))


def caught(subject: Subject, seed: int = 0, platform: str = "cpu") -> dict[str, str]:
    """Why each kind of data of which something is wrong is not right, by kind; on a CPU without subnormals."""
    run, found = compile_call(subject, NUMERIC_TOKENS, return_logits=True), {}
    for kind in subject.kinds:
        if kind == "subnormals":
            continue
        operands = draw(subject, kind, NUMERIC_TOKENS, seed)
        *routed, logits = (np.asarray(output) for output in run(put(operands, CPU)))
        verdicts = [judge_logits(subject, kind, operands, logits, platform)]
        if routed:
            verdicts.append(judge_routing(subject, kind, operands, *routed, logits, platform))
        for verdict in verdicts:
            if not verdict.passed:
                found[kind] = str(verdict.reason)
    return found
