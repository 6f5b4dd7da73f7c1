"""Runs the points of a sweep: compile, check against float64, time what passed, one row per measurement."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import jax
import numpy as np

from jax_router import dispatch, implementations, parity, timing, timing_host, timing_launcher, timing_torch
from jax_router.sweep_data import BFLOAT16, SAME_BITS, ShapeData, implementation_calls, rms_errors
from jax_router.sweep_layout import layout_calls
from jax_router.sweep_points import (
    ACCURACY,
    BOUNDS,
    COMPILED_PEER,
    FLOAT32_PEER,
    HIDDEN_EXPERTS,
    IMPLEMENTATIONS,
    NO_ROUTING,
    OUT_DTYPE,
    PEERS,
    ROUTE_PEERS,
    Point,
    Shape,
    weight_layout_of,
)
from jax_router.sweep_route import RouteData, route_calls
from jax_router.sweep_rows import Row, RowsWriter

COMPILE_COST = 2  # of one executable, in units of one measurement, for the time left
CUPTI_SETTLES_IN = 2.0  # seconds of kernels
CHECK = ("check", "")  # method and weights of the row that holds a point's check

Key = tuple[Any, ...]


class DeviceLost(Exception):
    """The device computes nothing any more, so that no further point could be measured."""


class Runner:
    """Runs points and appends their rows. One broken point becomes a failed row and does not end the sweep."""

    def __init__(
        self,
        writer: RowsWriter,
        *,
        provenance: Row,
        device: jax.Device,
        torch: Any | None = None,
        done: frozenset[Key] | set[Key] = frozenset(),
        compile_threads: int = 1,
        advance: Callable[[float, str], None] = lambda *_: None,
    ):
        """
        Args:
          torch: the module if PyTorch has the GPU.
          done: keys of rows that need no second measurement.
          compile_threads: executables compiled at a time, before any of their shape is timed.
          advance: told the cost of each step when it is done, and the label of the next.
        """
        self.writer, self.provenance, self.device, self.torch = writer, provenance, device, torch
        self.done, self.compile_threads, self.advance = set(done), compile_threads, advance
        self.calls = implementation_calls() | layout_calls()
        self.failed: list[str] = []
        self.skipped: dict[str, str] = {}
        self.passed: dict[Point, Row | None] = {}  # points whose check passed, with the check
        self.written = 0
        self.cupti_settled = False

    def cost(self, points: Iterable[Point]) -> float:
        """Of all that `run` will do, in the units of `advance`."""
        return sum(len(self._missing(point)) + COMPILE_COST * len(self._executables(point)) for point in points)

    def run(self, points: Iterable[Point]) -> None:
        """Check and measure all points: everything but CUPTI first, then CUPTI.

        In a sweep that attached CUPTI with its first shape, an empty launch in a replayed graph read 0.5 microseconds
        before and 0.9 for every later shape (H200, 2026-11-24).
        """
        prepared = []
        for shape, of_shape in itertools.groupby(points, lambda point: point.shape):
            todo = [point for point in of_shape if self._missing(point)]
            if todo:
                prepared.append((todo, *self._run_shape(shape, todo)))
        for todo, data, executables in prepared:
            for point in todo:
                missing = [each for each in self._missing(point) if each[0] == "cupti"]
                if missing and point in self.passed:
                    self._settle_cupti(point, data, executables)
                    self._time(point, missing, data, executables, self.passed[point])
                self.advance(len(missing), point.label)

    def _settle_cupti(self, point: Point, data: ShapeData, executables: dict[tuple[Point, str], Future[Any]]) -> None:
        """Throw the first seconds of CUPTI away: the first points of a process read up to a quarter too much."""
        if self.cupti_settled:
            return
        self.cupti_settled = True
        end = time.monotonic() + CUPTI_SETTLES_IN
        while time.monotonic() < end:
            try:
                timing.cupti(executables[point, "calls"].result(), _operands(data, point))
            except Exception:  # the measurement that follows reports it
                return

    def _run_shape(self, shape: Shape, points: list[Point]) -> tuple[ShapeData, dict[tuple[Point, str], Future[Any]]]:
        self.advance(0, f"{shape.label}: data")
        data = (ShapeData if shape.spec is None else RouteData)(
            shape, sorted({point.tokens or 1 for point in points}), self.device
        )
        executables = self._compile(data, points)
        for point in points:
            missing = [each for each in self._missing(point) if each[0] != "cupti"]
            self.advance(0, point.label)
            try:
                refused = self._refused(point)
                if refused is not None:
                    self._skip(point, refused)
                else:
                    self._run_point(point, missing, data, executables)
            except DeviceLost:
                raise
            except Exception as error:  # whatever one point does, the others are still worth measuring
                self._fail(point, CHECK, _reason(error))
            self.advance(len(missing), point.label)
        return data, executables

    def _compile(self, data: ShapeData, points: list[Point]) -> dict[tuple[Point, str], Future[Any]]:
        """Compile everything of a shape before timing any of it: compiling loads the cores and XLA tunes on the GPU."""
        pool = ThreadPoolExecutor(self.compile_threads)
        try:
            futures = {
                (point, kind): pool.submit(self._compile_one, data, point, kind)
                for point in points
                for kind in self._executables(point)
            }
            labels = {future: f"{point.label}: compiled" for (point, _), future in futures.items()}
            for future in as_completed(labels):
                self.advance(COMPILE_COST, labels[future])
            return futures
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _executables(self, point: Point) -> list[str]:
        """Which executables a point needs: "calls" to check and to time calls, others for the method of that name."""
        methods = {method for method, _ in self._missing(point)}
        kinds = sorted(methods.intersection(("chain_slope", "host_jit")))
        if point.implementation in IMPLEMENTATIONS and methods and self._refused(point) is None:
            return ["calls", *kinds]
        return kinds if point.candidate == NO_ROUTING else []

    def _compile_one(self, data: ShapeData, point: Point, kind: str) -> Any:
        operands, call = _operands(data, point), self._call(point)
        if kind == "host_jit":  # JAX keeps what it compiled for calls in the context of this one
            return timing_host.jitted(call, operands)
        with jax.default_device(self.device):
            if kind == "chain_slope":
                return timing.compile_chains(call, operands)
            assert call is not None
            return timing.compile_calls(call, operands, self._calls_per_run)

    def _call(self, point: Point) -> timing.Call | None:
        """The public operation with the candidate named, if that is an implementation."""
        calls = self.calls if point.shape.spec is None else route_calls(point.shape.spec)
        return calls.get(point.candidate)

    @property
    def _calls_per_run(self) -> int:
        return timing.CALLS if self.device.platform == "gpu" else 1

    def _refused(self, point: Point) -> str | None:
        """Why this machine does not run the candidate, or None. May build the kernels."""
        name = point.implementation
        if name in BOUNDS:
            return implementations.load("cuda").unavailable()
        if name not in IMPLEMENTATIONS:
            return None
        problem = dispatch.Problem(
            tokens=point.tokens or 1,
            hidden=point.shape.hidden,
            experts=point.shape.experts,
            dtype=point.shape.dtype,
            weight_dtype=point.shape.weight_dtype,
            bias_dtype=point.shape.dtype if point.shape.bias else None,
            out_dtype=OUT_DTYPE,
            spec=point.shape.spec,
            weight_layout=weight_layout_of(point.candidate),
        )
        device = dispatch.Device.of(self.device)
        return dispatch.why_unsupported(problem, device, name) or implementations.load(name).unavailable()

    def _run_point(
        self, point: Point, missing: list[tuple[str, str]], data: ShapeData, executables: dict[tuple[Point, str], Any]
    ) -> None:
        if point.candidate == ACCURACY:
            self._accuracy(point, missing)
            return
        operands = _operands(data, point)
        if point.candidate in BOUNDS:
            self._time(point, missing, data, executables, None)
            return
        check: Row | None = None
        results: tuple[Any, ...] = ()
        peer: Callable[..., Any] | None = None
        if point.candidate != NO_ROUTING:
            if point.candidate in (*PEERS, FLOAT32_PEER, *ROUTE_PEERS):
                peer = data.peer(self.torch, point.candidate)
                try:
                    results = (self._of_peer(peer, operands),)
                except Exception as error:
                    if point.candidate != COMPILED_PEER:
                        raise
                    self._skip(point, f"PyTorch cannot compile it on this machine: {_reason(error)}")
                    return
            else:
                results = self._of_executable(executables[point, "calls"].result(), operands)
            check = self._judge(point, data, results)
            if not check["passed"]:
                self._fail(point, CHECK, check["reason"], check=check)
                return
            self._write(point, CHECK, check=check)
            check = {name: value for name, value in check.items() if name != "unit"}
        self.passed[point] = check
        self._time(point, missing, data, executables, check, results, peer)

    def _of_peer(self, peer: Callable[..., Any], operands: timing.Operands) -> Any:
        """What a PyTorch operator returns, on the host."""
        torch: Any = self.torch
        x, weights, bias = timing_torch.as_torch(torch, operands)
        with torch.no_grad():
            results = peer(x, weights[0], bias)

        def on_host(result: Any) -> Any:
            host = result.cpu()
            return host.float().numpy().astype(BFLOAT16) if result.dtype == torch.bfloat16 else host.numpy()

        return jax.tree.map(on_host, results)  # numpy knows no bfloat16 tensors

    def _of_executable(self, compiled: Any, operands: timing.Operands) -> tuple[Any, Any]:
        """What the first and the last call of the executable that is timed return, on the host."""
        outputs = compiled(operands.x, operands.weights[:1] * self._calls_per_run, operands.bias)
        return jax.device_get(outputs[0]), jax.device_get(outputs[-1])

    def _judge(self, point: Point, data: ShapeData, results: tuple[Any, ...]) -> Row:
        check = data.check(point.implementation, results[0])
        differing = parity.differing_rows(data.bits(results[-1]), data.bits(results[0]))
        if check["passed"] and point.implementation in SAME_BITS and len(differing):
            check |= {"passed": False, "reason": f"two calls on the same data differ in {len(differing)} rows"}
        return check

    def _time(
        self,
        point: Point,
        missing: list[tuple[str, str]],
        data: ShapeData,
        executables: dict[tuple[Point, str], Any],
        check: Row | None,
        results: tuple[Any, ...] = (),
        peer: Callable[..., Any] | None = None,
    ) -> None:
        operands = _operands(data, point)
        kernel_times: dict[str, timing.Samples] = {}

        def measure(method: str, weights: str) -> timing.Samples:
            if method == "host_launcher":
                operation = point.candidate if point.candidate in BOUNDS else "router_gemm"
                return timing_host.launcher(operands, point.shape.spec, operation=operation)
            if method == "host_jit":
                return timing_host.dispatches(method, executables[point, method].result())
            if method == "host_eager":
                arguments = operands.x, operands.weights[0], operands.bias
                call = self._call(point)
                assert call is not None
                return timing_host.dispatches(method, functools.partial(call, *arguments))
            if point.candidate in BOUNDS:
                out = timing_launcher.out_buffer(operands)
                return timing_launcher.graph_replay(operands, out, weights=weights, operation=point.candidate)
            if method == "graph_replay":
                samples, replayed = data.graph_replay(operands, weights=weights)
                if results and len(parity.differing_rows(data.bits(replayed), data.bits(results[0]))):
                    raise timing.TimingError("the replayed graph wrote other bits than the checked call")
                return samples
            if method == "torch_replay":
                assert peer is not None
                return timing_torch.torch_replay(self.torch, peer, operands, weights=weights)
            if method == "chain_slope":
                return timing.chain_slope(executables[point, method].result(), operands, weights=weights)
            if method == "wall":
                return timing.wall(executables[point, "calls"].result(), operands, calls=self._calls_per_run)
            if not kernel_times:
                warm, cold = timing.cupti(executables[point, "calls"].result(), operands)
                kernel_times.update(warm=warm, cold=cold)
            return kernel_times[weights]

        for method, weights in missing:
            try:
                samples = measure(method, weights)
            except Exception as error:  # one method that fails says nothing against the others
                self._fail(point, (method, weights), _reason(error))
            else:
                self._write(point, (method, weights), check=check, **_described(samples))

    def _accuracy(self, point: Point, missing: list[tuple[str, str]]) -> None:
        runs = [name for name in IMPLEMENTATIONS if self._refused(Point(point.shape, 1, name, ())) is None]
        for method, data in missing:
            errors = rms_errors(point.shape, data, self.device, {name: self.calls[name] for name in runs}, self.torch)
            self._write(point, (method, data), rms_error=errors)

    def _missing(self, point: Point) -> list[tuple[str, str]]:
        return [each for each in point.measurements if point.key(*each) not in self.done]

    def _fail(self, point: Point, measurement: tuple[str, str], reason: str, **more: Any) -> None:
        self.failed.append(f"{point.label} {measurement[0]}: {reason}")
        self._write(point, measurement, status="failed", reason=reason, **more)
        try:
            assert_computes(self.device)
        except Exception as error:
            raise DeviceLost(f"{self.failed[-1]}. Now the device refuses everything: {_reason(error)}") from error

    def _skip(self, point: Point, reason: str) -> None:
        self.skipped[f"{point.shape.label} {point.candidate}"] = reason
        self._write(point, CHECK, status="skipped", reason=reason)

    def _write(self, point: Point, measurement: tuple[str, str], *, status: str = "ok", **more: Any) -> None:
        method, weights = measurement
        measured = {"method": method, "weights": weights, "status": status, **more}
        self.writer.write({**point.fields, **measured, "provenance": self.provenance})
        self.written += 1


def assert_computes(device: jax.Device) -> None:
    """Raise what JAX raises if the device computes no more: after a fault, or with its stream in the error state."""
    jax.block_until_ready(jax.device_put(np.ones(8, np.float32), device) + 1)


def _operands(data: ShapeData, point: Point) -> timing.Operands:
    """What a point is called with."""
    tokens = point.tokens or 1
    return data.hidden_experts(tokens) if point.candidate in HIDDEN_EXPERTS else data.operands(tokens)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:1000]


def _described(samples: timing.Samples) -> Row:
    low, high = samples.spread_us
    return {
        "median_us": round(samples.median_us, 4),
        "spread_us": [round(low, 4), round(high, 4)],  # 10th and 90th percentile
        "samples_us": [round(sample, 4) for sample in samples.samples_us],
        "calls_per_sample": samples.calls_per_sample,
        "measured": samples.measured,
        "kernels": [name[:100] for name in samples.kernels],
    }
