"""Rows of a sweep that never ran, for the tests of what reads rows. Never written outside a test's own folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jax_router import sweep_points

PROVENANCE = {
    "gpu": "NVIDIA H200",
    "compute_capability": "9.0",
    "driver": "1.2.3",
    "nvcc": "13.0.1",
    "python": "3.12.3",
    "jax": "0.11.2",
    "jaxlib": "0.11.2",
    "torch": "2.11.0",
    "numpy": "2.5.2",
    "jax_router": "0.1.0",
    "date": "2026-01-02T03:04:05+00:00",
    "source_hash": "0123456789abcdef" * 4,
}
MICROSECONDS = {
    "empty": 0.5,
    "read_weight": 1.6,
    "cuda": 2.5,
    "pallas": 4.0,
    "xla": 7.0,
    "torch_linear": 6.5,
    "torch_mm_float32": 6.0,
    "torch_linear_float32": 9.0,
    "no_routing": 3.5,
    "cuda_hidden_experts": 2.6,
    "xla_hidden_experts": 7.5,
    "cuda_transposed": 4.5,
}
ROUTE_MICROSECONDS = {"cuda": 3.0, "pallas": 5.0, "xla": 12.0, "torch_route": 30.0, "torch_route_compiled": 20.0}
ERRORS = {"cuda": 2e-7, "xla": 3e-6, "float32_sgemm": 5e-7, "torch_linear": 2e-3}

Time = Callable[[sweep_points.Point, str, str], float]


def constant_time(point: sweep_points.Point, method: str, weights: str) -> float:
    cold = 1.2 if weights == "cold" else 1.0
    if point.shape.spec is None:
        return MICROSECONDS[point.candidate] * cold
    chain = MICROSECONDS["no_routing"] if method == "chain_slope" else 0.0  # which holds the chain's own kernel
    return (ROUTE_MICROSECONDS.get(point.candidate, 0.0) + chain) * cold


def row(point: sweep_points.Point, method: str, weights: str, **more: Any) -> dict[str, Any]:
    shape = point.shape
    of_operation = {} if shape.rule is None else {"rule": shape.rule}
    return {
        "operation": shape.operation,
        **of_operation,
        "models": list(shape.models),
        "hidden": shape.hidden,
        "experts": shape.experts,
        "bias": shape.bias,
        "dtype": shape.dtype,
        "weight_dtype": shape.weight_dtype,
        "out_dtype": "float32",
        "tokens": point.tokens,
        "candidate": point.candidate,
        "method": method,
        "weights": weights,
        "status": "ok",
        "provenance": PROVENANCE,
        **more,
    }


def headline_rows(time: Time = constant_time, **only: Any) -> list[dict[str, Any]]:
    """Rows of the headline suite on a GPU, every check passed."""
    rows = []
    for point in sweep_points.points("headline", gpu=True, torch_gpu=True, **only):
        if point.candidate in sweep_points.IMPLEMENTATIONS:
            rows.append(row(point, "check", "", check={"passed": True, "worst_error": 0.2}))
        for method, weights in point.measurements:
            if method == "rms":
                rows.append(row(point, method, weights, rms_error=dict(ERRORS)))
            else:
                samples = [time(point, method, weights) * factor for factor in (0.99, 1.0, 1.05)]
                check = {"passed": True, "worst_error": 0.2}
                rows.append(row(point, method, weights, samples_us=samples, check=check))
    return rows


def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(each) + "\n" for each in rows), encoding="utf-8")
    return path
