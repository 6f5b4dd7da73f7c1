"""One point of the tuner on the device: operands, launches of one configuration through the C interface, their bits."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jax_router import timing
from jax_router.dispatch import Problem
from jax_router.implementations import cuda
from jax_router.sweep_points import OUT_DTYPE, Shape
from jax_router.sweep_route import correction_bias

LAUNCHES = 16  # compared per configuration, enqueued one behind the other, each into an output of its own
COMPARED_WEIGHTS = 4  # of the pool, in turn
ROUTE_REFERENCE = "two_launches"

Outputs = tuple[jax.Array, ...]  # logits [T, E]; of route weights [T, k], experts [T, k] and logits


class WrongReference(Exception):
    """What every configuration is compared with is wrong itself, so that none can be judged."""


class ShapePool:
    """Seeded operands of one shape: one x, whose first rows serve every number of tokens, and rotating weights."""

    def __init__(self, shape: Shape, tokens: int, device: jax.Device):
        self.shape, self.device = shape, device
        self._seed = zlib.crc32(shape.label.encode())
        random = np.random.default_rng(self._seed)
        dtype = jnp.dtype(shape.dtype)
        self.x = random.standard_normal((tokens, shape.hidden), np.float32).astype(dtype)
        self.bias = random.standard_normal(shape.experts, np.float32).astype(dtype) if shape.bias else None
        weight_bytes = jnp.dtype(shape.weight_dtype).itemsize * shape.experts * shape.hidden
        self._copies = timing.cold_copies(weight_bytes) if device.platform == "gpu" else timing.CALLS

    def operands(self, tokens: int, place: int) -> Operands:
        """Those of `tokens` rows, in buffers of their own. All weights differ; those of each `place` too."""
        with jax.default_device(self.device):
            keys = jax.random.split(jax.random.fold_in(jax.random.key(self._seed), place), self._copies)
            sizes = (self.shape.experts, self.shape.hidden)
            weights = tuple(_draw_weight(key, *sizes, self.shape.weight_dtype) for key in keys)
        host = (self.x[:tokens], self.bias, correction_bias(self.shape))
        x, bias, correction = jax.device_put(host, self.device)
        return Operands(self.shape, x, weights, bias, correction)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _draw_weight(key: jax.Array, experts: int, hidden: int, dtype: str) -> jax.Array:
    """A weight of which logits have standard deviation 1. The host would take seconds for a cold rotation of them."""
    return (jax.random.normal(key, (experts, hidden), np.float32) * hidden**-0.5).astype(dtype)


class Operands:
    """x [T, H], weights [E, H], both biases and the workspace of one point, and launches on them."""

    def __init__(
        self,
        shape: Shape,
        x: jax.Array,
        weights: tuple[jax.Array, ...],
        bias: jax.Array | None,
        correction: jax.Array | None,
    ):
        self.x, self.bias, self.correction, self.weights = x, bias, correction, weights
        self.problem = Problem(
            tokens=x.shape[0],
            hidden=shape.hidden,
            experts=shape.experts,
            dtype=shape.dtype,
            weight_dtype=shape.weight_dtype,
            bias_dtype=shape.dtype if shape.bias else None,
            out_dtype=OUT_DTYPE,
            spec=shape.spec,
        )
        self._workspace_bytes = cuda.workspace_bytes(self.problem.tokens, self.problem.experts)
        poison = np.full(self._workspace_bytes, 0xFF, np.uint8)
        self._workspace = jax.device_put(poison, x.device) if self._workspace_bytes else None
        self._out = self.outputs()  # of what is timed
        jax.block_until_ready((x, bias, correction, weights, self._workspace, self._out))

    def outputs(self) -> Outputs:
        """Buffers of one launch, full of NaN, and of the experts that no router has."""
        tokens, experts, spec = self.problem.tokens, self.problem.experts, self.problem.spec
        logits = jnp.full((tokens, experts), np.nan, np.float32, device=self.x.device)
        if spec is None:
            return (logits,)
        weights = jnp.full((tokens, spec.top_k), np.nan, np.float32, device=self.x.device)
        return weights, jnp.full((tokens, spec.top_k), -1, np.int32, device=self.x.device), logits

    def arguments(self, weight: jax.Array, outputs: Outputs, config: int, *, logits: bool = False) -> Any:
        """Of one launch, for the C interface. Of route the logits come back if `logits`; else they are scratch."""
        *selected, out = outputs
        gemm = cuda.RouterGemmArgs.of(
            self.problem,
            x=self.x.unsafe_buffer_pointer(),
            weight=weight.unsafe_buffer_pointer(),
            bias=None if self.bias is None else self.bias.unsafe_buffer_pointer(),
            out=out.unsafe_buffer_pointer(),
            workspace=None if self._workspace is None else self._workspace.unsafe_buffer_pointer(),
            workspace_bytes=self._workspace_bytes,
            config=config if self.problem.spec is None else -1,
        )
        if self.problem.spec is None:
            return gemm
        correction = self.correction
        return cuda.RouteArgs.of(
            self.problem,
            gemm=gemm,
            weights=selected[0].unsafe_buffer_pointer(),
            experts=selected[1].unsafe_buffer_pointer(),
            correction_bias=None if correction is None else (correction.unsafe_buffer_pointer(), correction.dtype.name),
            return_logits=logits,
            config=config,
        )

    def fitting(self) -> tuple[dict[str, int], str]:
        """The configurations that take this problem, name to number, and the name of the one the launcher picks.

        Raises:
          NotImplementedError: the launcher refuses the problem.
        """
        operation, library = self.problem.operation, cuda.shared_library()
        arguments = ctypes.byref(self.arguments(self.weights[0], self._out, -1))
        names = cuda.config_names(operation)
        pick = getattr(library, f"jr_{operation}_pick_config")(arguments)
        if pick < 0:
            raise NotImplementedError(f"the launcher of {operation} refuses {self.problem}")
        fits = getattr(library, f"jr_{operation}_config_fits")
        return {name: config for config, name in enumerate(names) if fits(config, arguments)}, names[pick]

    # Bits ------------------------------------------------------------------------------------------------------------

    def reference(self) -> list[Outputs]:
        """What every configuration must give, by weight: of the router GEMM what the naive kernel gives.

        Of route what the two launches give, whose logits are compared with the naive kernel's here.

        Raises:
          WrongReference: they differ, or something was not written.
        """
        found = []
        for weight in self.weights[:COMPARED_WEIGHTS]:
            naive, routed = self.outputs(), None if self.problem.spec is None else self.outputs()
            jax.block_until_ready((naive, routed))
            arguments = self.arguments(weight, naive, -1)
            gemm = arguments if routed is None else arguments.gemm
            cuda.call("jr_router_gemm_naive", ctypes.byref(gemm), None)
            if routed is not None:
                two = cuda.config_names("route").index(ROUTE_REFERENCE)
                cuda.call("jr_route", ctypes.byref(self.arguments(weight, routed, two, logits=True)), None)
            synchronize()
            if routed is not None and differing_rows(routed[-1:], naive[-1:]).any():
                raise WrongReference(f"the logits of {ROUTE_REFERENCE} are not those of the naive kernel")
            found.append(naive if routed is None else routed)
            if any(np.isnan(array).any() for array in found[-1] if array.dtype == np.float32):
                raise WrongReference("the kernel that all are compared with leaves NaN")
        return found

    def why_wrong(self, config: int, reference: Sequence[Outputs]) -> str | None:
        """Launch a configuration LAUNCHES times and compare every bit; None if all are the reference's.

        Of route half of the launches return no logits, as those that are timed.
        """
        outputs = [self.outputs() for _ in range(LAUNCHES)]
        jax.block_until_ready(outputs)
        name = f"jr_{self.problem.operation}"
        try:
            for launch, output in enumerate(outputs):
                weight = self.weights[launch % len(reference)]
                arguments = self.arguments(weight, output, config, logits=_returns_logits(launch, len(reference)))
                cuda.call(name, ctypes.byref(arguments), None)
            synchronize()
        except (NotImplementedError, RuntimeError) as refused:
            with contextlib.suppress(RuntimeError):
                synchronize()  # the launches before it may still write
            return f"launch {launch}: {refused}"
        for launch, output in enumerate(outputs):
            expected = reference[launch % len(reference)]
            if self.problem.spec is not None and not _returns_logits(launch, len(reference)):
                output, expected = output[:2], expected[:2]
            rows = np.flatnonzero(differing_rows(output, expected))
            if len(rows):
                return (
                    f"row {rows[0]} of launch {launch} has other bits than the reference "
                    f"({len(rows)} of {self.problem.tokens} rows differ)"
                )
        return None

    # Time ------------------------------------------------------------------------------------------------------------

    def time(self, config: int, weights: str, launches: int, repeats: int) -> list[float]:
        """Microseconds per call of `repeats` replays of a graph of `launches` calls, weights "warm" or "cold"."""
        rotation = self.weights[:1] if weights == "warm" else self.weights
        found = [self.arguments(weight, self._out, config) for weight in rotation]
        variants = (type(found[0]) * len(found))(*found)
        samples = (ctypes.c_float * repeats)()
        timed = (variants, len(found), launches, repeats, samples)
        if self.problem.spec is None:
            cuda.call("jr_time_graph", cuda.OPERATIONS["router_gemm"], *timed)
        else:
            cuda.call("jr_time_route_graph", *timed)
        return list(samples)


def _returns_logits(launch: int, weights: int) -> bool:
    """Every other launch on each weight."""
    return launch // weights % 2 == 0


@jax.jit
def _differing(found: Outputs, expected: Outputs) -> jax.Array:
    def differ(left: jax.Array, right: jax.Array) -> jax.Array:
        bits = (jax.lax.bitcast_convert_type(array, jnp.uint32) for array in (left, right))
        return jnp.not_equal(*bits).any(axis=1)

    return jnp.stack([differ(*pair) for pair in zip(found, expected, strict=True)]).any(axis=0)


def differing_rows(found: Outputs, expected: Outputs) -> NDArray[np.bool_]:
    """Which tokens [T] have other bits anywhere in arrays of 32-bit elements."""
    return np.asarray(_differing(found, expected))


def synchronize() -> None:
    """Wait for CUDA's default stream, on which launches without a stream run and which JAX does not know.

    Raises:
      RuntimeError: a launch failed.
    """
    status = ctypes.CDLL("libcuda.so.1").cuCtxSynchronize()
    if status != 0:
        raise RuntimeError(f"cuCtxSynchronize: CUresult {status}")
