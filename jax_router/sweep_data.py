"""Data of the sweep and its judgement: operands of one shape, float64 truth, checks before timing, RMS errors."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from jax_router import parity, timing_launcher
from jax_router.sweep_bars import SGEMM
from jax_router.sweep_points import DTYPE, IMPLEMENTATIONS, OUT_DTYPE, PEERS, Shape
from jax_router.timing import Call, Operands, Samples, cold_copies
from jax_router.timing_torch import as_torch, operators

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ALWAYS_CHECKED = 256  # the first rows; of more tokens, these and samples up to the last row
SAMPLED = 32
SAME_BITS = ("cuda", "pallas")  # implementations that promise a row the same bits in every batch, on the GPU
PEER_TOLERANCE = 2.0**-7  # two bfloat16 spacings of the norm: a peer only has to compute the same product
ACCURACY_TOKENS = 4096


class ShapeData:
    """Operands of one shape for any number of tokens up to the largest, and the truth about a fixed set of their rows.

    Every number of tokens uses the first rows of one x, so that batches can be compared with each other bit for bit.
    Data are standard normal, weights scaled so that logits have standard deviation 1.
    """

    def __init__(self, shape: Shape, tokens: Sequence[int], device: jax.Device):
        random = np.random.default_rng(zlib.crc32(shape.label.encode()))
        largest = max(tokens, default=1)
        self.shape, self.device = shape, device
        dtype = jnp.dtype(shape.dtype)
        self.x = random.standard_normal((largest, shape.hidden), np.float32).astype(dtype)
        scaled = random.standard_normal((shape.experts, shape.hidden), np.float32) / np.sqrt(shape.hidden)
        self.weight = scaled.astype(shape.weight_dtype)
        self.bias = random.standard_normal(shape.experts, np.float32).astype(dtype) if shape.bias else None
        copies = cold_copies(self.weight.nbytes) if device.platform == "gpu" else 1
        self._weights = tuple(jax.device_put(self.weight, device) for _ in range(copies))
        self._bias = None if self.bias is None else jax.device_put(self.bias, device)
        self._x_on_device: dict[int, jax.Array] = {}
        self._rows = _checked_rows(tokens, random)
        self._truth = parity.reference(self.x[self._rows], self.weight, self.bias)
        self._previous: dict[str, NDArray[Any]] = {}

    def operands(self, tokens: int) -> Operands:
        if tokens not in self._x_on_device:
            self._x_on_device[tokens] = jax.device_put(self.x[:tokens], self.device)
        return Operands(self._x_on_device[tokens], self._weights, self._bias)

    def hidden_experts(self, tokens: int) -> Operands:
        """The operands with the weights stored [hidden, experts]."""
        return replace(self.operands(tokens), weights=self._stored_weights)

    @functools.cached_property
    def _stored_weights(self) -> tuple[jax.Array, ...]:
        return tuple(weight.T.copy() for weight in self._weights)

    def bits(self, results: Any) -> NDArray[np.unsignedinteger]:
        """The bits of a call's results, one row per token."""
        return parity.bits(results)

    def peer(self, torch: Any, candidate: str) -> Callable[..., Any]:
        """PyTorch's operator of that name."""
        return operators(torch)[candidate]

    def graph_replay(self, operands: Operands, *, weights: str) -> tuple[Samples, Any]:
        """Time `cuda` in CUDA-graph replay. Returns the samples, and what the launches left as a call's results."""
        out = timing_launcher.out_buffer(operands, OUT_DTYPE)
        return timing_launcher.graph_replay(operands, out, weights=weights), np.asarray(out)

    def check(self, candidate: str, logits: Any) -> dict[str, Any]:
        """Judge logits [T, E] of the first T rows.

        Returns:
          "passed", "worst_error" and "rms_error" in units of the float32 bound, "rows" compared, "reason" if it failed.
        """
        rows, truth, accumulation = self._truth_about(candidate, len(logits))
        actual = logits[rows]
        agreement = parity.compare(actual, truth, accumulation)
        result = {
            "passed": agreement.ok,
            "worst_error": agreement.worst_units,
            "rms_error": agreement.rms_units,
            "rows": len(actual),
            "unit": "float32 bounds",
        }
        if candidate in PEERS:
            distance = np.linalg.norm(actual.astype(np.float64) - truth.logits) / np.linalg.norm(truth.logits)
            result["passed"] = bool(distance < PEER_TOLERANCE)
        if not result["passed"]:
            result["reason"] = str(agreement)
        self._check_bits(candidate, self.bits(logits), result)
        return result

    def _truth_about(
        self, candidate: str, tokens: int
    ) -> tuple[NDArray[np.intp], parity.Reference, parity.Accumulation]:
        """The rows to compare of a batch, the truth about them, and how the candidate adds."""
        chosen = self._rows < tokens
        truth = parity.Reference(
            hidden=self._truth.hidden,
            logits=self._truth.logits[chosen],
            magnitude=self._truth.magnitude[chosen],
            spread=self._truth.spread[chosen],
        )
        accumulation = parity.accumulation_of(
            candidate, hidden=self.shape.hidden, dtype=self.shape.weight_dtype, platform=self.device.platform
        )
        return self._rows[chosen], truth, accumulation

    def _check_bits(self, candidate: str, bits: NDArray[Any], result: dict[str, Any]) -> None:
        """Fail what passed so far if a row has other bits than in the batch before, where that is promised."""
        if not result["passed"] or candidate not in SAME_BITS or self.device.platform != "gpu":
            return
        previous = self._previous.get(candidate, bits)
        common = min(len(previous), len(bits))
        differing = parity.differing_rows(bits[:common], previous[:common])
        self._previous[candidate] = bits
        if len(differing):
            result["passed"] = False
            result["reason"] = (
                f"row {differing[0]} has other bits in a batch of {len(bits)} than in one of {len(previous)} "
                f"({len(differing)} of {common} rows differ)"
            )


def _checked_rows(tokens: Sequence[int], random: np.random.Generator) -> NDArray[np.intp]:
    """The first rows, and for every number of tokens its last rows and some of its second half."""
    rows = [np.arange(ALWAYS_CHECKED)]
    for count in tokens:
        if count > ALWAYS_CHECKED:
            rows += [np.arange(count - SAMPLED, count), random.integers(count // 2, count, SAMPLED)]
    unique = np.unique(np.concatenate(rows))
    return unique[unique < max(tokens, default=1)]


def rms_errors(
    shape: Shape,
    data: str,
    device: jax.Device,
    calls: dict[str, Call],
    torch: Any | None,
    tokens: int = ACCURACY_TOKENS,
) -> dict[str, float]:
    """Root-mean-square errors against float64 on the same data, by candidate, float32 SGEMM among them.

    Args:
      data: "zero mean" for standard normal data, "with a mean" for half a standard deviation added to both x and
        weight, so that partial sums grow in one direction.
      calls: implementations to include.
      torch: the module if it has the GPU; computes SGEMM, and of 16-bit weights adds cuBLAS. Otherwise SGEMM is XLA's
        float32 product.
    """
    random = np.random.default_rng(zlib.crc32(f"{shape.label} {data}".encode()))
    mean = {"zero mean": 0.0, "with a mean": 0.5}[data]
    dtype = jnp.dtype(shape.dtype)
    x = (random.standard_normal((tokens, shape.hidden), np.float32) + np.float32(mean)).astype(dtype)
    weight = random.standard_normal((shape.experts, shape.hidden), np.float32) + np.float32(mean)
    weight = (weight / np.sqrt(shape.hidden)).astype(shape.weight_dtype)
    bias = random.standard_normal(shape.experts, np.float32).astype(dtype) if shape.bias else None
    operands = Operands(*jax.device_put((x, (weight,), bias), device))
    logits: dict[str, Any] = {
        name: jax.jit(call)(operands.x, operands.weights[0], operands.bias) for name, call in calls.items()
    }
    if torch is None:
        single = jax.tree.map(lambda array: array.astype(np.float32), (operands.x, operands.weights[0], operands.bias))
        logits[SGEMM] = jax.jit(calls["xla"])(*single)
    else:
        tx, (tweight,), tbias = as_torch(torch, operands)
        with torch.no_grad():
            torch.backends.cuda.matmul.allow_tf32 = False
            exact = torch.mm(tx.float(), tweight.float().t())
            logits[SGEMM] = (exact if tbias is None else exact + tbias.float()).cpu().numpy()
            for name in PEERS if shape.weight_dtype == DTYPE else ():
                logits[name] = operators(torch)[name](tx, tweight, tbias).float().cpu().numpy()
    truth = parity.reference(x, weight, bias).logits
    errors = {name: np.asarray(value).astype(np.float64) - truth for name, value in logits.items()}
    return {name: float(np.sqrt(np.mean(error**2))) for name, error in errors.items()}


def implementation_calls(names: Sequence[str] = IMPLEMENTATIONS) -> dict[str, Call]:
    """The public operation with each implementation named, as (x, weight, bias) -> logits."""
    from jax_router.ops import router_gemm

    def call_of(name: str) -> Call:
        return lambda x, weight, bias: router_gemm(x, weight, bias, implementation=name)

    return {name: call_of(name) for name in names}
