"""The C interface of the CUDA kernels in numpy, on arrays of the host, with configurations that can be broken."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from jax_router.implementations.cuda import RouteArgs, RouterGemmArgs

NAMES = {"router_gemm": ("one", "few", "many", "wide"), "route": ("fused", "two_launches")}


def array(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """The memory behind a pointer."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), np.uint8).view(dtype).reshape(shape)


class Kernels:
    """What `cuda.shared_library` returns in a test.

    Attributes:
      microseconds: of a configuration in one replay, by name and how often that one was timed before.
      break_outputs: called with a configuration's name and the outputs that it wrote, to damage them.
      refused: configurations whose launches are refused.
      timed: (operation, name, weights in rotation, launches, repeats) of every measurement.
    """

    def __init__(self) -> None:
        self.microseconds: Callable[[str, int], float] = lambda name, before: {"one": 4.0, "fused": 4.0}.get(name, 5.0)
        self.break_outputs: Callable[[str, list[np.ndarray]], None] = lambda name, outputs: None
        self.refused: set[str] = set()
        self.timed: list[tuple[str, str, int, int, int]] = []
        self.seen_weights: set[bytes] = set()
        self.returned_logits: list[int] = []
        for operation, names in NAMES.items():
            setattr(self, f"jr_{operation}_num_configs", lambda names=names: len(names))
            setattr(self, f"jr_{operation}_config_name", lambda index, names=names: names[index].encode())
            setattr(self, f"jr_{operation}_config_fits", lambda index, args, names=names: names[index] != "wide")
            setattr(self, f"jr_{operation}_pick_config", lambda args: 1)

    def logits(self, args: RouterGemmArgs) -> np.ndarray:
        assert args.workspace_bytes == 0 or args.workspace
        x = array(args.x, (args.tokens, args.hidden), ml_dtypes.bfloat16).astype(np.float32)
        weight = array(args.weight, (args.experts, args.hidden), ml_dtypes.bfloat16)
        self.seen_weights.add(weight.tobytes())
        bias = 0 if args.bias is None else array(args.bias, (args.experts,), ml_dtypes.bfloat16).astype(np.float32)
        out = array(args.out, (args.tokens, args.experts), np.float32)
        assert np.isnan(out).all(), "the output was not poisoned"
        out[:] = x @ weight.astype(np.float32).T + bias
        return out

    def jr_router_gemm_naive(self, args: Any, stream: Any, message: Any, size: int) -> int:
        self.logits(args._obj)
        return 0

    def jr_router_gemm(self, args: Any, stream: Any, message: Any, size: int) -> int:
        name = NAMES["router_gemm"][args._obj.config]
        if name in self.refused:
            message.value = b"no room"
            return 1
        self.break_outputs(name, [self.logits(args._obj)])
        return 0

    def jr_route(self, args: Any, stream: Any, message: Any, size: int) -> int:
        found: RouteArgs = args._obj
        assert found.gemm.config == -1
        logits = self.logits(found.gemm)
        selected = (found.gemm.tokens, found.integers[0])
        weights, experts = array(found.weights, selected, np.float32), array(found.experts, selected, np.int32)
        assert np.isnan(weights).all()
        experts[:] = np.argsort(-logits, axis=1, kind="stable")[:, : selected[1]]
        weights[:] = np.take_along_axis(logits, experts.astype(np.int64), 1)
        self.returned_logits.append(found.return_logits)
        if not found.return_logits:
            logits[:] = 7  # scratch
        self.break_outputs(NAMES["route"][found.config], [weights, experts, logits])
        return 0

    def jr_time_graph(
        self, code: int, variants: Any, count: int, launches: int, repeats: int, samples: Any, message: Any, size: int
    ) -> int:
        assert code == 0
        return self._time("router_gemm", variants[0].config, variants, count, launches, repeats, samples)

    def jr_time_route_graph(
        self, variants: Any, count: int, launches: int, repeats: int, samples: Any, message: Any, size: int
    ) -> int:
        assert not any(variant.return_logits for variant in variants)
        return self._time("route", variants[0].config, variants, count, launches, repeats, samples)

    def _time(
        self, operation: str, config: int, variants: Any, count: int, launches: int, repeats: int, samples
    ) -> int:
        assert count == len(variants)
        gemms = [variant if operation == "router_gemm" else variant.gemm for variant in variants]
        assert len({gemm.weight for gemm in gemms}) == count
        name = NAMES[operation][config]
        before = sum(each[1] == name for each in self.timed)
        self.timed.append((operation, name, count, launches, repeats))
        samples[:] = [self.microseconds(name, before)] * repeats
        return 0
