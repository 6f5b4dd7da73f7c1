"""PyTorch's peers of the sweep, and their timing in CUDA-graph replay. torch is an argument; one function finds it."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import jax

from jax_router.routing import RoutingSpec
from jax_router.timing import Operands, Samples, launches_of, replays


def torch_with_gpu() -> Any | None:
    """The torch module if it is installed and has the GPU."""
    # Processes that compile kernels take longer to start than the few kernels of a router to compile.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


def operators(torch: Any) -> dict[str, Callable[..., Any]]:
    """The PyTorch peers by name. Each takes x [T, H], weight [E, H] and bias [E] or None, all bfloat16.

    "torch_linear_float32" takes a float32 weight, and x and bias in any dtype, which it widens in every call.
    """

    def linear(x: Any, weight: Any, bias: Any) -> Any:
        return torch.nn.functional.linear(x, weight, bias)

    def linear_float32(x: Any, weight: Any, bias: Any) -> Any:
        return linear(x.float(), weight, None if bias is None else bias.float())

    def mm_float32(x: Any, weight: Any, bias: Any) -> Any:
        logits = torch.mm(x, weight.t(), out_dtype=torch.float32)
        return logits if bias is None else logits.add_(bias)

    return {"torch_linear": linear, "torch_mm_float32": mm_float32, "torch_linear_float32": linear_float32}


def route_operator(torch: Any, spec: RoutingSpec, *, compiled: bool = False) -> Callable[..., Any]:
    """Routing as PyTorch models have it, eager or compiled.

    It takes x [T, H], weight [E, H] and the pair (bias, correction bias), and returns (weights, experts), each [T, k].
    The logits are those of `linear`, in x's dtype; everything behind them is float32. A compiled one serves until the
    next is made; its first call compiles it for that number of tokens.
    """

    def route(x: Any, weight: Any, biases: Any) -> tuple[Any, Any]:
        bias, correction_bias = biases
        logits = torch.nn.functional.linear(x, weight, bias).float()
        if spec.score_function == "softmax":
            scores = logits.softmax(-1)
        elif spec.score_function == "sigmoid":
            scores = logits.sigmoid()
        elif spec.score_function == "sqrtsoftplus":
            scores = torch.nn.functional.softplus(logits).sqrt()
        else:
            scores = logits
        choice = logits if spec.select_on == "logits" else scores
        if correction_bias is not None:
            choice = choice + correction_bias
        if spec.num_groups is not None and spec.group_topk is not None:
            groups = choice.unflatten(-1, (spec.num_groups, -1))
            best = groups.topk(1 if spec.group_score == "max" else 2, -1).values.sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(spec.group_topk, -1).indices, True)
            choice = groups.masked_fill(~kept.unsqueeze(-1), spec.masked_choice).flatten(-2)
        experts = choice.topk(spec.top_k, -1).indices
        weights = scores.gather(-1, experts)
        if spec.score_function == "softmax_topk":
            weights = weights.softmax(-1)
        if spec.renormalize:
            weights = weights / (weights.sum(-1, keepdim=True).clamp(spec.renormalize_min) + spec.renormalize_epsilon)
        return weights * spec.scaling_factor, experts

    if not compiled:
        return route
    # PyTorch counts what it has compiled of these lines and refuses more than eight.
    torch.compiler.reset()
    return torch.compile(route, dynamic=False, fullgraph=True)


def as_torch(torch: Any, operands: Operands) -> tuple[Any, tuple[Any, ...], Any]:
    """The same buffers as PyTorch tensors: x, weights, bias."""
    arrays = operands.x, operands.weights, operands.bias
    return jax.tree.map(torch.from_dlpack, jax.block_until_ready(arrays))


def torch_replay(torch: Any, operator: Callable[..., Any], operands: Operands, *, weights: str) -> Samples:
    """Time a PyTorch operator in CUDA-graph replay, as `graph_replay` times the C launcher."""
    x, copies, bias = as_torch(torch, operands)
    rotation = copies[: len(operands.rotation(weights))]
    launches = launches_of(rotation)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                operator(x, rotation[0], bias)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # In the default mode a call that one of JAX's threads makes meanwhile invalidates the capture and JAX's stream.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for launch in range(launches):
                operator(x, rotation[launch % len(rotation)], bias)

    def replay(repeats: int) -> list[float]:
        samples = []
        for _ in range(repeats):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            samples.append(begin.elapsed_time(end) * 1e3 / launches)
        return samples

    samples = replays(replay, launches)
    graph.reset()
    return Samples(
        "torch_replay",
        weights,
        samples,
        launches,
        f"CUDA-graph replay of {launches} PyTorch calls, {len(rotation)} weights in rotation",
    )
