"""Timing of microsecond kernels. Every function returns raw samples in microseconds per call and says what it measured.

    graph_replay   a C launcher in a CUDA graph, replayed: what one call adds to a busy stream. Also the two bounds, an
                   empty launch and a read of the weight bytes: in timing_launcher
    torch_replay   the same for a PyTorch operator, so that the two can be compared: in timing_torch
    cupti          GPU time of the kernels of one call through JAX: how long at least one of them ran. What two that are
                   launched programmatically run side by side counts once, gaps between kernels do not count
    chain_slope    wall time that one more data-chained call adds to a jitted function: what a decode step pays
    host_*         what a call costs the host: in timing_host
    wall           wall time of one call, for machines without a GPU

Weights are `warm` (the same array in every call, resident in L2) or `cold` (rotated through more bytes than the L2
holds, or the L2 filled with other data before the run). x is the same array in every call, as if just computed.
"""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

CALLS = 8  # per jitted function: enough to spread its overhead, few enough to compile in the time of one
CHAIN_LENGTHS = (12, 36)  # decode layers; 36 is gpt-oss-120b
CHAIN_PAIRS = 300  # of runs of both lengths: a slope scatters by 2 us and more, so its median by 0.15
COLD_BYTES = 126_000_000  # the H200 has 60 MB of L2: a weight comes back after more than twice that
REPEATS = 20
GRAPH_LAUNCHES = 192  # per replay: some 400 us, far above the resolution of an event
REPLAY_BUDGET_US = 60_000.0  # of one measurement: more repeats than this add nothing to a median

# CUPTI times single kernels: launched one by one they are the same kernels, and each is recorded.
_WITHOUT_GRAPHS = {"xla_gpu_graph_min_graph_size": 1_000_000}


class TimingError(RuntimeError):
    """A measurement that cannot be trusted."""


@dataclass(frozen=True)
class Samples:
    """One measurement.

    Attributes:
      method: name of the function that measured.
      weights: "warm" or "cold".
      samples_us: raw, microseconds per call.
      calls_per_sample: how many calls one sample is the mean of.
      measured: what a sample is, in words.
      kernels: names of the GPU kernels of one call, where the method sees them.
    """

    method: str
    weights: str
    samples_us: tuple[float, ...]
    calls_per_sample: int
    measured: str
    kernels: tuple[str, ...] = ()

    @property
    def median_us(self) -> float:
        return statistics.median(self.samples_us)

    @property
    def spread_us(self) -> tuple[float, float]:
        """The 10th and the 90th percentile."""
        low, high = np.percentile(self.samples_us, [10, 90])
        return float(low), float(high)


@dataclass(frozen=True)
class Operands:
    """x [T, H], bias [E] or None, and copies of one weight [E, H] in distinct buffers, cold in rotation.

    Of `route` the bias is a pair: that of the logits and the correction bias, each [E] or None.
    """

    x: jax.Array
    weights: tuple[jax.Array, ...]
    bias: Any

    def rotation(self, weights: str) -> tuple[jax.Array, ...]:
        return self.weights[:1] if weights == "warm" else self.weights


def cold_copies(weight_bytes: int) -> int:
    """How many copies of a weight make a rotation cold: a multiple of CALLS, of more than COLD_BYTES."""
    return CALLS * math.ceil((COLD_BYTES // weight_bytes + 1) / CALLS)


def launches_of(rotation: Sequence[Any]) -> int:
    """How many a replayed graph has: every weight of the rotation equally often."""
    return len(rotation) * math.ceil(GRAPH_LAUNCHES / len(rotation))


def replays(replay: Callable[[int], list[float]], launches: int) -> tuple[float, ...]:
    """Samples of as many replays as the budget allows. The first ones warm up and give the estimate."""
    estimate = statistics.median(replay(3)) * launches
    return tuple(replay(int(min(REPEATS, max(5, REPLAY_BUDGET_US / max(estimate, 1.0))))))


Call = Callable[[jax.Array, jax.Array, Any], Any]  # (x, weight, bias) -> logits, or (weights, experts) of `route`


def compile_calls(call: Call, operands: Operands, calls: int = CALLS) -> jax.stages.Compiled:
    """Compile `calls` calls in one jitted function of (x, tuple of weights, bias), which returns every call's results.

    One executable serves warm (the same array passed for every weight) and cold (distinct arrays), and its outputs are
    the ones to check. The barriers keep XLA from merging the calls, which share x, into one product.
    """

    def run(x: jax.Array, weights: tuple[jax.Array, ...], bias: Any) -> tuple[Any, ...]:
        results: list[Any] = []
        for weight in weights:
            if results:
                x, results[-1] = jax.lax.optimization_barrier((x, results[-1]))
            results.append(call(x, weight, bias))
        return tuple(results)

    (device,) = operands.x.devices()
    options = _WITHOUT_GRAPHS if device.platform == "gpu" else {}
    function = jax.jit(run, compiler_options=options)
    return function.lower(operands.x, operands.weights[:1] * calls, operands.bias).compile()


@dataclass(frozen=True, order=True)
class Kernel:
    """One execution of a GPU kernel: when it began and ended, in microseconds of the GPU's clock."""

    start_us: float
    end_us: float
    name: str


def kernel_times(compiled: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> list[list[Kernel]]:
    """The GPU kernels of each execution of `compiled`, one list per element of `arguments`, as CUPTI records them.

    Everything runs once before CUPTI is attached. Copies and fills that are not kernels are left out.

    Raises:
      TimingError: executions with different kernels, so that times cannot be assigned to them.
    """

    def run() -> None:
        for each in arguments:
            outputs = compiled(*each)
        jax.block_until_ready(outputs)

    run()
    options = jax.profiler.ProfileOptions()
    options.host_tracer_level = options.python_tracer_level = 0
    options.enable_hlo_proto = False  # of every executable of the process: seconds per measurement in a sweep
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            run()
        recorded = [
            Kernel(event.start_ns / 1e3, event.end_ns / 1e3, event.name)
            for path in Path(folder).rglob("*.xplane.pb")
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
            if plane.name.startswith("/device:GPU")
            for line in plane.lines
            if line.name.startswith("Stream")
            for event in line.events
            if not event.name.startswith(("Memcpy", "Memset"))
        ]
    return split_executions(sorted(recorded), len(arguments))


def split_executions(recorded: Sequence[Kernel], executions: int) -> list[list[Kernel]]:
    """Cut CUPTI's record of equal executions, in order of time, into one list each."""
    per_execution, rest = divmod(len(recorded), executions)
    if rest or not per_execution:
        raise TimingError(
            f"CUPTI recorded {len(recorded)} kernels for {executions} equal executions. Expected a positive multiple; "
            "look for another profiler attached to this process, and run the point again."
        )
    runs = [list(recorded[start : start + per_execution]) for start in range(0, len(recorded), per_execution)]
    names = [kernel.name for kernel in runs[0]]
    if any([kernel.name for kernel in run] != names for run in runs):
        raise TimingError("CUPTI recorded different kernels for equal executions; run the point again.")
    return runs


def busy_us(runs: Sequence[Sequence[Kernel]]) -> list[float]:
    """How long at least one kernel of each run ran, in microseconds, what ran beside the run before not again."""
    times, reached = [], -math.inf
    for run in runs:
        busy = 0.0
        for kernel in sorted(run):
            busy += max(kernel.end_us - max(kernel.start_us, reached), 0.0)
            reached = max(reached, kernel.end_us)
        times.append(busy)
    return times


def cupti(compiled: jax.stages.Compiled, operands: Operands) -> tuple[Samples, Samples]:
    """GPU kernel time of one call, warm and cold, of an executable of `compile_calls`. One CUPTI session for both.

    A sample is one execution's kernel time over its CALLS calls.
    """
    x, weights, bias = operands.x, operands.weights, operands.bias
    groups = [weights[start : start + CALLS] for start in range(0, len(weights), CALLS)]
    groups = groups[1:] + groups[:1]  # the warm-up ends on weight 0, so its group comes last
    cold = groups * math.ceil(REPEATS / len(groups))
    warm = [weights[:1] * CALLS] * (REPEATS + 2)
    runs = kernel_times(compiled, [(x, group, bias) for group in cold + warm])
    samples = [busy / CALLS for busy in busy_us(runs)]
    kernels = [kernel.name for kernel in runs[0]]
    kernels = kernels[: len(kernels) // CALLS] if len(kernels) % CALLS == 0 else kernels

    def result(state: str, state_samples: list[float]) -> Samples:
        return Samples(
            "cupti",
            state,
            tuple(state_samples),
            CALLS,
            f"CUPTI kernel time over {CALLS} calls in one jitted function, {len(kernels)} kernels per call, "
            f"{1 if state == 'warm' else len(weights)} weights in rotation",
            tuple(kernels),
        )

    # The first two warm executions still find the last cold weights in the cache.
    return result("warm", samples[len(cold) + 2 :]), result("cold", samples[: len(cold)])


def chain(call: Call | None) -> Any:
    """A jitted function of (x, weights, bias), one layer per weight, whose layer i + 1 needs all results of layer i.

    With `call` None the same chain without the routing: what the chain's own elementwise kernel costs.
    """

    def run(x: jax.Array, weights: tuple[jax.Array, ...], bias: Any) -> jax.Array:
        for weight in weights:
            # Behind a barrier: only one column is used, and XLA would be free to compute no other.
            results = x if call is None else jax.lax.optimization_barrier(call(x, weight, bias))
            columns = [result[:, :1] for result in jax.tree.leaves(results)]
            signal = functools.reduce(lambda total, column: total + column.astype(total.dtype), columns)
            x = x + (signal * 2.0**-60).astype(x.dtype)  # too small to change x, which XLA cannot know
            x = jax.lax.optimization_barrier(x)
        return x

    return jax.jit(run)


def compile_chains(call: Call | None, operands: Operands) -> dict[int, jax.stages.Compiled]:
    """The chain at each of CHAIN_LENGTHS, compiled with XLA's default options (so with CUDA graphs)."""
    return {
        length: chain(call).lower(operands.x, operands.weights[:1] * length, operands.bias).compile()
        for length in CHAIN_LENGTHS
    }


def chain_slope(chains: dict[int, jax.stages.Compiled], operands: Operands, *, weights: str) -> Samples:
    """Wall time that one more call adds: the slope over the two chains of `compile_chains`. Nothing is subtracted.

    Cold chains use distinct weights in every layer and fill the L2 with other data, outside the timed window, before
    every run.
    """
    short, long = sorted(chains)
    copies = operands.weights

    def arguments(length: int) -> tuple[Any, ...]:
        chosen = tuple(copies[0 if weights == "warm" else layer % len(copies)] for layer in range(length))
        return operands.x, chosen, operands.bias

    # Reading leaves clean lines behind: written ones would have to go back to memory inside the timed window.
    read_all = jax.jit(lambda buffer: jnp.sum(buffer, dtype=jnp.int32))
    other_data = jax.device_put(np.zeros(2 * COLD_BYTES, np.int8), operands.x.device) if weights == "cold" else None

    def timed(length: int) -> float:
        if other_data is not None:
            jax.block_until_ready(read_all(other_data))
        begin = time.perf_counter()
        jax.block_until_ready(chains[length](*arguments(length)))
        return (time.perf_counter() - begin) * 1e6

    for _ in range(3):  # XLA records its CUDA graphs in the first runs
        timed(short), timed(long)
    # Neighbours in time share the machine's mood, so each pair gives one slope.
    slopes = tuple((-timed(short) + timed(long)) / (long - short) for _ in range(CHAIN_PAIRS))
    return Samples(
        "chain_slope",
        weights,
        slopes,
        long - short,
        f"slope of wall time between {short} and {long} data-chained calls in one jitted function, chain included",
    )


def wall(compiled: jax.stages.Compiled, operands: Operands, *, calls: int, repeats: int = REPEATS) -> Samples:
    """Wall time of one call, dispatch and wait included: an executable of `compile_calls` over its `calls`. Warm."""
    arguments = (operands.x, operands.weights[:1] * calls, operands.bias)
    jax.block_until_ready(compiled(*arguments))
    samples = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*arguments))
        samples.append((time.perf_counter() - begin) * 1e6 / calls)
        if sum(samples) * calls > 5e5 and len(samples) >= 5:
            break
    measured = f"wall time of {calls} calls in one jitted function, with dispatch"
    return Samples("wall", "warm", tuple(samples), calls, measured)
