"""Timing: what is passed to the clock, how records are cut into calls, and that XLA cannot merge what is timed."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_router import timing, timing_launcher, timing_torch
from jax_router.implementations import cuda
from jax_router.ops import route, router_gemm
from jax_router.routing import RoutingSpec

SPEC = RoutingSpec(2, "sigmoid", scaling_factor=2.5)


def xla(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
    return router_gemm(x, weight, bias, implementation="xla")


def operands(
    *, tokens: int = 4, hidden: int = 64, experts: int = 16, copies: int = 16, device: Any = None
) -> timing.Operands:
    random = np.random.default_rng(0)
    x = random.standard_normal((tokens, hidden)).astype(jnp.bfloat16)
    weight = random.standard_normal((experts, hidden)).astype(jnp.bfloat16)
    bias = random.standard_normal(experts).astype(jnp.bfloat16)
    return timing.Operands(
        jax.device_put(x, device),
        tuple(jax.device_put(weight.copy(), device) for _ in range(copies)),
        jax.device_put(bias, device),
    )


@pytest.mark.parametrize("weight_bytes", [2 * 2880 * 32, 2 * 2880 * 128, 2 * 7168 * 384, 10**9])
def test_cold_copies_exceed_the_cache_between_two_uses(weight_bytes: int) -> None:
    copies = timing.cold_copies(weight_bytes)
    assert copies % timing.CALLS == 0
    assert (copies - timing.CALLS) * weight_bytes > 60e6 or weight_bytes > 120e6
    assert copies * weight_bytes > 120e6


def test_samples_report_median_and_spread() -> None:
    samples = timing.Samples("wall", "warm", (1.0, 2.0, 3.0, 100.0, 2.5), 1, "")
    assert samples.median_us == 2.5
    low, high = samples.spread_us
    assert low < 2.5 < high <= 100


def test_calls_stay_apart_and_each_returns_its_logits() -> None:
    data = operands()
    compiled = timing.compile_calls(xla, data, calls=3)
    lowered = jax.jit(xla).lower(data.x, data.weights[0], data.bias).compile()
    expected = np.asarray(lowered(data.x, data.weights[0], data.bias))
    other = jax.device_put(2 * np.asarray(data.weights[0]))
    outputs = compiled(data.x, (data.weights[0], data.weights[0], other), data.bias)
    assert np.array_equal(outputs[0], expected)
    assert np.array_equal(outputs[1], expected)
    assert not np.array_equal(outputs[2], expected)


def test_barriers_stand_between_the_calls() -> None:
    data = operands()

    def count(calls: int) -> int:
        seen: list[str] = []

        def call(x: jax.Array, weight: jax.Array, bias: jax.Array | None) -> jax.Array:
            seen.append(type(x).__name__)
            return xla(x, weight, bias)

        original = jax.lax.optimization_barrier
        barriers = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(jax.lax, "optimization_barrier", lambda value: (barriers.append(1), original(value))[1])
            timing.compile_calls(call, data, calls=calls)
        assert len(seen) == calls
        return len(barriers)

    assert count(4) == 3


def test_chain_depends_on_every_logit_row_and_leaves_x_alone() -> None:
    data = operands(copies=3)
    routed = timing.chain(xla)
    assert np.array_equal(routed(data.x, data.weights, data.bias), data.x)
    broken = (data.weights[0], jnp.full_like(data.weights[0], jnp.nan), data.weights[0])
    assert np.isnan(np.asarray(routed(data.x, broken, data.bias)).astype(np.float32)).all()
    # Without the routing the weights do not matter.
    assert np.array_equal(timing.chain(None)(data.x, broken, data.bias), data.x)


def test_chain_asks_for_all_logits_although_it_uses_one_column() -> None:
    data = operands(copies=2)
    hlo = timing.chain(xla).lower(data.x, data.weights, data.bias).as_text()
    barriers = re.findall(r"optimization_barrier \S+ : tensor<(\w+)>", hlo)
    logits = f"{data.x.shape[0]}x{data.weights[0].shape[0]}xf32"
    assert barriers.count(logits) == 2, hlo


@pytest.mark.parametrize("weights", ["warm", "cold"])
@pytest.mark.parametrize("call", [xla, None])
def test_chain_slope_is_per_call(weights: str, call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "COLD_BYTES", 1000)
    monkeypatch.setattr(timing, "CHAIN_LENGTHS", (2, 4))
    data = operands(copies=3)
    samples = timing.chain_slope(timing.compile_chains(call, data), data, weights=weights)
    assert samples.calls_per_sample == 2
    assert len(samples.samples_us) == timing.CHAIN_PAIRS
    assert "2 and 4" in samples.measured
    assert samples.weights == weights


def test_wall_divides_by_the_calls() -> None:
    data = operands()
    samples = timing.wall(timing.compile_calls(xla, data, calls=2), data, calls=2)
    assert samples.calls_per_sample == 2
    assert samples.median_us > 0


# CUPTI -----------------------------------------------------------------------------------------------------------


def kernels(*spans: tuple[str, float, float]) -> list[timing.Kernel]:
    return [timing.Kernel(start, end, name) for name, start, end in spans]


def test_records_are_cut_into_executions() -> None:
    recorded = kernels(("pad", 0, 1), ("gemm", 1, 3), ("pad", 4, 5), ("gemm", 4.5, 7))
    assert timing.split_executions(recorded, 2) == [recorded[:2], recorded[2:]]


@pytest.mark.parametrize(
    ("names", "executions"),
    [((), 2), (("gemm", "gemm", "gemm"), 2), (("gemm", "pad", "pad", "gemm"), 2)],
    ids=["nothing recorded", "one kernel lost", "kernels differ"],
)
def test_records_that_do_not_fit_are_refused(names: tuple[str, ...], executions: int) -> None:
    recorded = kernels(*((name, at, at + 1) for at, name in enumerate(names)))
    with pytest.raises(timing.TimingError, match="run the point again"):
        timing.split_executions(recorded, executions)


def test_what_kernels_run_side_by_side_counts_once_and_gaps_do_not() -> None:
    first = kernels(("gemm", 1, 3), ("select", 2, 4), ("inside", 2.5, 3.5), ("next", 6, 7))
    assert timing.busy_us([first, kernels(("late", 6.5, 8), ("early", 6.25, 6.5))]) == [4, 1]
    assert timing.busy_us([]) == []


def test_kernel_times_reads_the_record_of_the_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record is made up: no GPU is needed. Copies, fills and what is not on a stream are left out."""
    traced: list[str] = []

    @contextlib.contextmanager
    def trace(folder: str, profiler_options: Any) -> Iterator[None]:
        assert (profiler_options.host_tracer_level, profiler_options.python_tracer_level) == (0, 0)
        assert not profiler_options.enable_hlo_proto
        traced.append("begin")
        yield
        traced.append("end")
        (Path(folder) / "plugins").mkdir()
        (Path(folder) / "plugins" / "host.xplane.pb").touch()

    def event(name: str, start: float, end: float) -> SimpleNamespace:
        return SimpleNamespace(name=name, start_ns=start * 1e3, end_ns=end * 1e3)

    events = [
        event("route", 7, 8),
        event("gemm", 1, 2),
        event("gemm", 5, 6),
        event("route", 3, 4),
        event("MemcpyD2D", 2, 3),
    ]
    streams = [SimpleNamespace(name="Stream #7", events=events), SimpleNamespace(name="XLA Ops", events=events)]
    planes = [SimpleNamespace(name="/device:GPU:0", lines=streams), SimpleNamespace(name="/host:CPU", lines=streams)]
    monkeypatch.setattr(jax.profiler, "trace", trace)
    monkeypatch.setattr(
        jax.profiler, "ProfileData", SimpleNamespace(from_file=lambda path: SimpleNamespace(planes=planes))
    )
    runs = timing.kernel_times(lambda *arguments: traced.append(str(arguments)) or jnp.zeros(1), [(1,), (2,)])
    assert traced == ["(1,)", "(2,)", "begin", "(1,)", "(2,)", "end"]
    assert runs == [kernels(("gemm", 1, 2), ("route", 3, 4)), kernels(("gemm", 5, 6), ("route", 7, 8))]


def test_cupti_is_the_time_of_a_call_and_tells_warm_from_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    data = operands(copies=24)
    seen: list[tuple[int, ...]] = []

    def kernel_times(compiled: Any, arguments: list[Any]) -> list[list[timing.Kernel]]:
        runs = []
        warm_before = 0
        for x, weights, _ in arguments:
            assert x is data.x
            seen.append(tuple(weight.unsafe_buffer_pointer() for weight in weights))
            warm = len(set(seen[-1])) == 1
            warm_before += warm
            each = 2.0 if not warm else 1000.0 if warm_before <= 2 else 1.0  # the cache is not warm at once
            run = []
            for call in range(timing.CALLS):
                at = 2000 * (len(runs) * timing.CALLS + call)
                run += kernels(("pad", at, at + each), ("gemm", at + each, at + each + 3))
            runs.append(run)
        return runs

    monkeypatch.setattr(timing, "kernel_times", kernel_times)
    warm, cold = timing.cupti(None, data)  # type: ignore[arg-type]
    assert set(warm.samples_us) == {4.0}
    assert set(cold.samples_us) == {5.0}
    assert warm.kernels == cold.kernels == ("pad", "gemm")
    assert min(len(warm.samples_us), len(cold.samples_us)) >= timing.REPEATS
    rotated = [pointers for pointers in seen if len(set(pointers)) > 1]
    assert len({pointer for pointers in rotated for pointer in pointers}) == 24
    # The warm-up ends on weight 0, so the group that holds it is measured last.
    assert data.weights[0].unsafe_buffer_pointer() not in rotated[0]


# The C launcher --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["router_gemm", "empty", "read_weight"])
@pytest.mark.parametrize(("weights", "variants"), [("warm", 1), ("cold", 16)])
def test_graph_replay_describes_the_problem_to_the_launcher(
    operation: str, weights: str, variants: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = operands()
    out = timing_launcher.out_buffer(data)
    assert np.isnan(np.asarray(timing_launcher.out_buffer(data))).all()
    calls = []

    def call(name: str, code: int, args: Any, count: int, launches: int, repeats: int, samples: Any) -> None:
        calls.append((name, code, count, launches, repeats))
        assert [arg.weight for arg in args] == [w.unsafe_buffer_pointer() for w in data.weights[:variants]]
        assert {(arg.x, arg.out) for arg in args} == {(data.x.unsafe_buffer_pointer(), out.unsafe_buffer_pointer())}
        assert {(arg.tokens, arg.hidden, arg.experts, arg.config) for arg in args} == {(4, 64, 16, -1)}
        assert {(arg.dtype, arg.bias_dtype, arg.out_dtype) for arg in args} == {(0, 0, 2)}
        samples[:] = [2.0] * repeats

    monkeypatch.setattr(cuda, "call", call)
    samples = timing_launcher.graph_replay(data, out, weights=weights, operation=operation)
    assert samples.samples_us == (2.0,) * timing.REPEATS
    assert {call[:3] for call in calls} == {("jr_time_graph", cuda.OPERATIONS[operation], variants)}
    assert all(launches % variants == 0 and launches >= timing.GRAPH_LAUNCHES for *_, launches, _ in calls)
    assert re.search(rf"{operation}.*{variants} weights in rotation", samples.measured)


@pytest.mark.parametrize(("weights", "variants"), [("warm", 1), ("cold", 16)])
@pytest.mark.parametrize("corrected", [False, True])
def test_route_replay_describes_the_problem_to_the_launcher(
    corrected: bool, weights: str, variants: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gemm = operands()
    correction = jax.device_put(np.ones(16, np.float32))
    data = dataclasses.replace(gemm, bias=(gemm.bias, correction if corrected else None))
    out = timing_launcher.route_buffers(data, SPEC)
    assert [array.shape for array in out] == [(4, 2), (4, 2), (4, 16)]
    assert np.isnan(out[0]).all()
    assert (np.asarray(out[1]) == -1).all()
    calls = []

    def call(name: str, args: Any, count: int, launches: int, repeats: int, samples: Any) -> None:
        calls.append((name, count, launches, repeats))
        assert [arg.gemm.weight for arg in args] == [w.unsafe_buffer_pointer() for w in data.weights[:variants]]
        addresses = {(arg.gemm.x, arg.weights, arg.experts, arg.gemm.out) for arg in args}
        assert addresses == {tuple(array.unsafe_buffer_pointer() for array in (data.x, *out))}
        assert {(arg.gemm.tokens, arg.gemm.hidden, arg.gemm.experts) for arg in args} == {(4, 64, 16)}
        assert {(arg.return_logits, arg.config, arg.gemm.config, arg.replay) for arg in args} == {(0, -1, -1, None)}
        assert {(arg.integers[0], arg.floats[2]) for arg in args} == {(2, 2.5)}
        given = (correction.unsafe_buffer_pointer(), 2) if corrected else (None, -1)
        assert {(arg.correction_bias, arg.correction_bias_dtype) for arg in args} == {given}
        samples[:] = [3.0] * repeats

    monkeypatch.setattr(cuda, "call", call)
    samples = timing_launcher.route_replay(data, out, SPEC, weights=weights)
    assert (samples.method, samples.weights) == ("graph_replay", weights)
    assert samples.samples_us == (3.0,) * timing.REPEATS
    assert {call[:2] for call in calls} == {("jr_time_route_graph", variants)}
    assert all(launches % variants == 0 and launches >= timing.GRAPH_LAUNCHES for _, _, launches, _ in calls)
    assert re.search(rf"route.*{variants} weights in rotation", samples.measured)


def test_slow_kernels_are_replayed_less_often() -> None:
    asked = []

    def replay(repeats: int) -> list[float]:
        asked.append(repeats)
        return [10_000.0] * repeats

    assert len(timing.replays(replay, 192)) == 5
    assert asked == [3, 5]


# On the GPU ------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu_operands(gpu: jax.Device) -> timing.Operands:
    hidden, experts = 2880, 128
    return operands(
        tokens=16, hidden=hidden, experts=experts, copies=timing.cold_copies(2 * hidden * experts), device=gpu
    )


def assert_within_wall_time(samples: timing.Samples, wall_seconds: float) -> None:
    """Positive times, as many as promised, that together fit into the time that measuring them took: no speed."""
    assert samples.samples_us
    assert all(0 < sample < float("inf") for sample in samples.samples_us)
    assert sum(samples.samples_us) * samples.calls_per_sample <= wall_seconds * 1e6


def test_gpu_kernel_times_are_those_of_a_router_gemm(gpu_operands: timing.Operands) -> None:
    start = time.perf_counter()
    warm, cold = timing.cupti(timing.compile_calls(xla, gpu_operands), gpu_operands)
    wall_seconds = time.perf_counter() - start
    assert warm.kernels
    assert warm.kernels == cold.kernels
    for samples in (warm, cold):
        assert_within_wall_time(samples, wall_seconds)


@pytest.mark.parametrize("operation", ["empty", "read_weight", "router_gemm"])
@pytest.mark.parametrize("weights", ["warm", "cold"])
def test_gpu_replay_runs_what_it_times(operation: str, weights: str, gpu_operands: timing.Operands) -> None:
    assert cuda.unavailable() is None, cuda.unavailable()
    out = timing_launcher.out_buffer(gpu_operands)
    start = time.perf_counter()
    samples = timing_launcher.graph_replay(gpu_operands, out, weights=weights, operation=operation)
    assert_within_wall_time(samples, time.perf_counter() - start)
    expected = jax.jit(lambda x, w, b: router_gemm(x, w, b, implementation="cuda"))(
        gpu_operands.x, gpu_operands.weights[0], gpu_operands.bias
    )
    assert np.array_equal(out, expected) == (operation == "router_gemm")


@pytest.mark.parametrize("weights", ["warm", "cold"])
def test_gpu_replay_of_routing_runs_what_it_times(weights: str, gpu_operands: timing.Operands) -> None:
    assert cuda.unavailable() is None, cuda.unavailable()
    data = dataclasses.replace(gpu_operands, bias=(gpu_operands.bias, None))
    out = timing_launcher.route_buffers(data, SPEC)
    start = time.perf_counter()
    samples = timing_launcher.route_replay(data, out, SPEC, weights=weights)
    assert_within_wall_time(samples, time.perf_counter() - start)
    expected = jax.jit(lambda x, w, b: route(x, w, b, spec=SPEC, implementation="cuda"))(
        data.x, data.weights[0], gpu_operands.bias
    )
    assert np.array_equal(out[0], expected.weights)
    assert np.array_equal(out[1], expected.experts)


def test_gpu_torch_replay_is_timed_like_the_launcher(gpu_operands: timing.Operands) -> None:
    torch = pytest.importorskip("torch")
    assert torch.cuda.is_available()
    for name, operator in timing_torch.operators(torch).items():
        given = gpu_operands
        if name == "torch_linear_float32":  # takes a float32 weight
            given = dataclasses.replace(given, weights=tuple(w.astype("float32") for w in given.weights))
        for weights in ("warm", "cold"):
            start = time.perf_counter()
            samples = timing_torch.torch_replay(torch, operator, given, weights=weights)
            assert_within_wall_time(samples, time.perf_counter() - start)
