"""What a call costs the host: the C launchers, and calls through JAX up to the return of their asynchronous dispatch.

    host_launcher  the calling thread's time in the C launcher; of nothing but a launch, with the candidate "empty"
    host_jit       wall time of a call of a jitted function; of JAX's own dispatch, with the candidate "no_routing"
    host_eager     wall time of the public function called outside of jit

The calls come back to back and nothing waits for the GPU within the timed part.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_router import timing_launcher
from jax_router.implementations import cuda
from jax_router.routing import RoutingSpec
from jax_router.timing import Call, Operands, Samples

REPEATS = 100
LAUNCHER_CALLS = 256  # per sample, as many as jr_time_host takes
DISPATCHES = 16  # per sample: a host that is 32 executions ahead is made to wait by XLA


def launcher(operands: Operands, spec: RoutingSpec | None = None, *, operation: str = "router_gemm") -> Samples:
    """Time the C launcher of the router GEMM or of a bound, or with a spec that of routing, on the calling thread.

    Raises:
      NotImplementedError: the kernel does not take the problem.
      RuntimeError: a CUDA call failed, or the library cannot be built.
    """
    nanoseconds = (ctypes.c_float * REPEATS)()
    arguments = LAUNCHER_CALLS, REPEATS, nanoseconds
    if spec is None:
        logits = timing_launcher.out_buffer(operands)
        variants, _workspace = timing_launcher.launches(operands, logits, weights="warm")
        cuda.call("jr_time_host", cuda.OPERATIONS[operation], variants, *arguments)
    else:
        out = timing_launcher.route_buffers(operands, spec)
        variants, _workspace = timing_launcher.launches(operands, out, spec, weights="warm")
        cuda.call("jr_time_route_host", variants, *arguments)
    return Samples(
        "host_launcher",
        "warm",
        tuple(sample / 1e3 for sample in nanoseconds),
        LAUNCHER_CALLS,
        f"time of the calling thread in {LAUNCHER_CALLS} C calls ({operation if spec is None else 'route'}) one after "
        "the other",
    )


def jitted(call: Call | None, operands: Operands) -> Callable[[], Any]:
    """A compiled jitted function of one call, its operands bound. With None one that adds one to one number."""
    function: Any
    arguments: tuple[Any, ...]
    if call is None:
        function, arguments = jax.jit(lambda number: number + 1), (jax.device_put(np.float32(0), operands.x.device),)
    else:
        function, arguments = jax.jit(call), (operands.x, operands.weights[0], operands.bias)
    bound = functools.partial(function, *arguments)
    jax.block_until_ready(bound())
    return bound


def dispatches(method: str, call: Callable[[], Any]) -> Samples:
    """Wall time of `call`, which returns arrays without waiting for them: "host_jit" or "host_eager"."""
    samples = []
    for _ in range(1 + REPEATS):  # the first one warms up
        begin = time.perf_counter()
        for _ in range(DISPATCHES):
            results = call()
        samples.append((time.perf_counter() - begin) * 1e6 / DISPATCHES)
        jax.block_until_ready(results)
    how = {"host_jit": "of a jitted function", "host_eager": "outside of jit"}[method]
    measured = f"wall time of {DISPATCHES} calls {how} one after the other, until the last one returned"
    return Samples(method, "warm", tuple(samples[1:]), DISPATCHES, measured)
