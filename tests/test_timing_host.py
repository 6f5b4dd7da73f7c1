"""What a call costs the host: what is called how often, what stays outside of the clock, its rows and its table."""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_rows
from test_timing import SPEC, assert_within_wall_time, operands, xla

from jax_router import report, sweep_run, timing, timing_host
from jax_router.implementations import cuda
from jax_router.sweep_points import HOST_TOKENS, Point, Shape, points
from jax_router.sweep_rows import RowsWriter, read_rows

WARM = {method: ((f"host_{method}", "warm"),) for method in ("launcher", "jit", "eager")}


@pytest.mark.parametrize("operation", ["router_gemm", "empty", "route"])
def test_the_launcher_is_called_as_often_as_it_says(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = operands()
    spec = SPEC if operation == "route" else None
    if spec is not None:
        data = dataclasses.replace(data, bias=(data.bias, None))
    asked = []

    def call(name: str, *arguments: Any) -> None:
        *first, args, calls, repeats, nanoseconds = arguments
        asked.append((name, *first))
        assert [(arg if spec is None else arg.gemm).x for arg in args] == [data.x.unsafe_buffer_pointer()]
        assert (calls, repeats) == (timing_host.LAUNCHER_CALLS, timing_host.REPEATS)
        nanoseconds[:] = [2500.0] * repeats

    monkeypatch.setattr(cuda, "call", call)
    samples = timing_host.launcher(data, spec, operation="empty" if operation == "empty" else "router_gemm")
    assert asked == [("jr_time_route_host",) if spec else ("jr_time_host", cuda.OPERATIONS[operation])]
    assert (samples.method, samples.median_us, len(samples.samples_us)) == ("host_launcher", 2.5, timing_host.REPEATS)
    assert f"in {timing_host.LAUNCHER_CALLS} C calls ({operation})" in samples.measured


@pytest.mark.parametrize("method", ["host_jit", "host_eager"])
def test_waiting_is_not_timed_and_happens_before_the_host_is_too_far_ahead(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = itertools.count()
    events: list[str] = []

    def tick() -> float:
        events.append("clock")
        return float(next(clock))

    monkeypatch.setattr(time, "perf_counter", tick)
    monkeypatch.setattr(jax, "block_until_ready", lambda results: events.append(f"wait for {results}"))
    samples = timing_host.dispatches(method, lambda: events.append("call") or len(events))
    calls = ["call"] * timing_host.DISPATCHES
    one = 3 + len(calls)
    assert len(calls) < 32, "XLA makes the host wait"
    for start in range(0, len(events), one):
        assert events[start : start + one] == ["clock", *calls, "clock", f"wait for {start + 1 + len(calls)}"]
    assert len(events) == one * (1 + timing_host.REPEATS)
    assert samples.samples_us == (1e6 / timing_host.DISPATCHES,) * timing_host.REPEATS
    assert samples.calls_per_sample == timing_host.DISPATCHES


def test_a_jitted_call_is_compiled_once_and_the_floor_calls_nothing() -> None:
    data = operands()
    traced = []

    def call(x: jax.Array, weight: jax.Array, bias: Any) -> jax.Array:
        traced.append(x.shape)
        return xla(x, weight, bias)

    compiled = timing_host.jitted(call, data)
    for _ in range(2):
        assert np.array_equal(compiled(), jax.jit(xla)(data.x, data.weights[0], data.bias))
    assert traced == [data.x.shape]
    assert timing_host.jitted(None, data)() == 1


def test_the_sweep_has_rows_of_what_a_call_costs_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing_host, "REPEATS", 3)
    launched = []

    def launcher(data: timing.Operands, spec: Any, *, operation: str) -> timing.Samples:
        launched.append((spec, operation))
        return timing.Samples("host_launcher", "warm", (2.5,), 256, "")

    monkeypatch.setattr(timing_host, "launcher", launcher)
    monkeypatch.setattr(sweep_run.Runner, "_refused", lambda *_: None)
    gemm, route = Shape(64, 16, True, ("small",)), Shape(64, 16, True, ("small",), SPEC)
    todo = [
        Point(gemm, None, "empty", WARM["launcher"]),
        Point(gemm, None, "no_routing", WARM["jit"]),
        *(Point(shape, 2, "xla", tuple(each for (each,) in WARM.values())) for shape in (gemm, route)),
    ]
    writer = RowsWriter(tmp_path / "rows.jsonl")
    runner = sweep_run.Runner(writer, provenance={"gpu": None}, device=jax.devices("cpu")[0])
    steps = []
    runner.advance = lambda cost, label: steps.append(cost)
    total = runner.cost(todo)
    runner.run(todo)
    writer.close()
    assert not runner.failed
    assert sum(steps) == total
    assert launched == [(None, "empty"), (None, "router_gemm"), (SPEC, "router_gemm")]
    timed = [row for row in read_rows(writer.path) if row["method"] != "check"]
    assert [(row["operation"], row["tokens"], row["candidate"], row["method"]) for row in timed] == [
        (point.shape.operation, point.tokens, point.candidate, method)
        for point in todo
        for method, _ in point.measurements
    ]
    assert {len(row["samples_us"]) for row in timed if row["method"] != "host_launcher"} == {3}


def test_the_headline_suite_measures_the_host_for_its_models_alone() -> None:
    found = points("headline", gpu=True, torch_gpu=True)
    by_method: dict[str, set[Any]] = {}
    for point in found:
        for method, weights in point.measurements:
            if method.startswith("host_"):
                assert (point.shape.headline, weights) == (True, "warm")
                by_method.setdefault(method, set()).add((point.shape.operation, point.candidate, point.tokens))
    floor = {"host_launcher": {"empty"}, "host_jit": {"no_routing"}, "host_eager": set()}
    for method, names in floor.items():
        calls = {"cuda"} if method == "host_launcher" else {"cuda", "xla"}
        expected = {(of, name, tokens) for of in ("router_gemm", "route") for name in calls for tokens in HOST_TOKENS}
        assert by_method[method] == expected | {("router_gemm", name, None) for name in names}
    quick = points("quick", gpu=True, torch_gpu=True)
    assert not any(method.startswith("host_") for point in quick for method, _ in point.measurements)


def test_the_report_has_a_table_of_the_host() -> None:
    def microseconds(point: Point, method: str, weights: str) -> float:
        times = {"host_launcher": 1.0, "host_jit": 20.0, "host_eager": 90.0}
        return times.get(method, 1.0) * {"cuda": 3, "xla": 2}.get(point.candidate, 1)

    rows = synthetic_rows.headline_rows(microseconds, only_models=["DeepSeek-V3"])
    table = report.generated_parts(rows, {}, Path())["host"]
    assert "| 7168x256 | floor | 1.00 | 20.0 | - | - | - |" in table
    assert "| 7168x256 | 4096 | 3.00 | 60.0 | 40.0 | 270 | 180 |" in table
    assert re.search(r"^\| route 7168x256 of DeepSeek-V3 \| 64 \| 3\.00 \| 60\.0 \|", table, re.M)
    assert table.count("\n| 7168x256 |") == table.count("\n| route") + 1 == 1 + len(HOST_TOKENS)
    without = [row for row in rows if not row["method"].startswith("host_")]
    assert report.generated_parts(without, {}, Path())["host"] == "Not measured.\n"


def test_gpu_the_host_is_timed_in_all_three_ways(gpu: jax.Device) -> None:
    assert cuda.unavailable() is None, cuda.unavailable()
    data = operands(tokens=512, hidden=2880, experts=128, copies=1, device=gpu)
    routed = dataclasses.replace(data, bias=(data.bias, None))
    start = time.perf_counter()
    launchers = [
        timing_host.launcher(data),
        timing_host.launcher(data, operation="empty"),
        timing_host.launcher(routed, SPEC),
    ]
    jitted = timing_host.dispatches("host_jit", timing_host.jitted(xla, data))
    eager = timing_host.dispatches("host_eager", lambda: xla(data.x, data.weights[0], data.bias))
    for samples in (*launchers, jitted, eager):
        assert_within_wall_time(samples, time.perf_counter() - start)
    assert jnp.isfinite(xla(data.x, data.weights[0], data.bias)).all(), "the device still computes"
