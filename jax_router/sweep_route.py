"""Data and judgement of `route` in the sweep: as of the router GEMM, and a correction bias where the model has one."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from jax_router import parity, timing_launcher
from jax_router import parity_routing as judged
from jax_router.routing import RoutingSpec
from jax_router.sweep_data import BFLOAT16, PEER_TOLERANCE, ShapeData
from jax_router.sweep_points import COMPILED_PEER, IMPLEMENTATIONS, ROUTE_PEERS, Shape
from jax_router.timing import Call, Operands, Samples
from jax_router.timing_torch import route_operator

CORRECTION_DEVIATION = 0.1  # of scores near 0.5: enough to move most selections


def correction_bias(shape: Shape) -> NDArray[np.float32] | None:
    """The seeded correction bias [experts] of a router that has one, of both signs and of its scores' size."""
    if shape.spec is None or not shape.correction_bias:
        return None
    random = np.random.default_rng(zlib.crc32(f"correction bias of {shape.label}".encode()))
    deviation = 1 / shape.experts if shape.spec.score_function == "softmax" else CORRECTION_DEVIATION
    return random.normal(0.0, deviation, shape.experts).astype(np.float32)


def to_bfloat16(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Values that bfloat16 holds, nearest to these."""
    return values.astype(BFLOAT16).astype(np.float64)


class RouteData(ShapeData):
    """Operands of the routing of one shape by one rule, and the truth about a fixed set of their rows."""

    def __init__(self, shape: Shape, tokens: Sequence[int], device: jax.Device):
        assert shape.spec is not None
        super().__init__(shape, tokens, device)
        self.spec = shape.spec
        self.correction = correction_bias(shape)
        self._correction = None if self.correction is None else jax.device_put(self.correction, device)

    def operands(self, tokens: int) -> Operands:
        of_gemm = super().operands(tokens)
        return dataclasses.replace(of_gemm, bias=(of_gemm.bias, self._correction))

    def bits(self, results: Any) -> NDArray[np.unsignedinteger]:
        return np.concatenate([parity.bits(result) for result in results], axis=1)

    def peer(self, torch: Any, candidate: str) -> Callable[..., Any]:
        return route_operator(torch, self.spec, compiled=candidate == COMPILED_PEER)

    def graph_replay(self, operands: Operands, *, weights: str) -> tuple[Samples, Any]:
        out = timing_launcher.route_buffers(operands, self.spec)
        samples = timing_launcher.route_replay(operands, out, self.spec, weights=weights)
        return samples, jax.device_get(out[:2])

    def check(self, candidate: str, results: Any) -> dict[str, Any]:
        """Judge (weights, experts), each [T, k], of the first T rows.

        Every expert set must be possible with logits within the bound of the candidate's accumulation, every weight
        within what that leaves of it. A peer's logits may be off by two bfloat16 spacings of the row's largest.

        Returns:
          "passed"; "worst_error" of a weight, over its bound; "differing" tokens from the exact experts, "undecided"
          tokens that may differ, "rows" compared, "reason" if it failed.
        """
        weights, experts = results
        rows, truth, accumulation = self._truth_about(candidate, len(experts))
        slack = parity.logit_bound(truth, accumulation, truth.logits.size)
        if candidate in ROUTE_PEERS:
            slack = np.maximum(slack, PEER_TOLERANCE * abs(truth.logits).max(-1, keepdims=True))
        logits = judged.logit_interval(truth.logits, slack, self.spec, to_bfloat16)
        exact = judged.exact_choice(truth.logits, self.correction, self.spec, to_bfloat16)
        actual = experts[rows]
        choice = judged.choice_interval(logits, self.correction, self.spec)
        selection = judged.judge_selection(actual, exact, choice)
        result: dict[str, Any] = {
            "passed": not selection.impossible.any(),
            "worst_error": 0.0,
            "differing": int(selection.differs.sum()),
            "undecided": int(selection.undecided.sum()),
            "rows": len(rows),
            "unit": "bounds of the weights",
        }
        if not result["passed"]:
            row = int(rows[selection.impossible.argmax()])
            result["reason"] = (
                f"row {row} has experts {sorted(experts[row].tolist())}, which no logits within the bound lead to "
                f"({int(selection.impossible.sum())} of {len(rows)} rows)"
            )
            return result
        bounds = judged.weight_interval(judged.score_interval(logits, self.spec), actual, self.spec)
        expected = judged.exact_weights(truth.logits, actual, self.spec, to_bfloat16)
        errors = abs(weights[rows] - expected) / np.maximum(bounds.high - expected, expected - bounds.low)
        outside = ~((bounds.low <= weights[rows]) & (weights[rows] <= bounds.high))
        result["worst_error"] = float(errors.max(initial=0.0))
        if outside.any():
            row, place = np.argwhere(outside)[0]
            result["passed"] = False
            result["reason"] = (
                f"row {rows[row]} has weight {weights[rows[row], place]} for expert {actual[row, place]} instead of "
                f"{expected[row, place]} ({int(outside.sum())} of {outside.size} weights out of bounds)"
            )
        self._check_bits(candidate, self.bits(results), result)
        return result


def route_calls(spec: RoutingSpec) -> dict[str, Call]:
    """The public operation with each implementation named, as (x, weight, both biases) -> (weights, experts)."""
    from jax_router.ops import route

    def call_of(name: str) -> Call:
        def call(x: jax.Array, weight: jax.Array, biases: Any) -> tuple[jax.Array, jax.Array]:
            bias, correction = biases
            routing = route(x, weight, bias, spec=spec, correction_bias=correction, implementation=name)
            return routing.weights, routing.experts

        return call

    return {name: call_of(name) for name in IMPLEMENTATIONS}
