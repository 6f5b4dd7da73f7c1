"""The C launchers on memory that ends where nothing is mapped: what `cuda` reads and writes, to the byte."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jax_router.implementations import cuda
from jax_router.verification import gpu_tools
from jax_router.verification.bits import calls, layout_in_words, row_bits
from jax_router.verification.data import Operands, Subject, as_stored, draw, in_its_layouts, put
from jax_router.verification.result import Context, Failure, Programs, Result

TOKENS, QUICK_TOKENS = (1, 7, 16, 127, 1024), (1, 7, 128)  # as of the memory check
CANARY, POISON = 0xA5, 0xFF
CANARY_BYTES = 65536  # right before a buffer; behind it is the fence
ALIGNMENT, ALIGNED = 16, ("x", "weight", "logits", "workspace")  # of csrc/router_gemm.h
OUTPUTS = ("logits", "weights", "experts", "workspace")


class Fenced:
    """An array on the device between canaries and a fence, which it meets as closely as its alignment lets it."""

    def __init__(self, contents: NDArray[Any], alignment: int):
        address, before = ctypes.c_void_p(), ctypes.c_int64()
        self.behind = -contents.nbytes % alignment
        size = contents.nbytes + self.behind
        gpu_tools.call("jr_fence_create", size, CANARY, ctypes.byref(address), ctypes.byref(before))
        self.address, self.contents = int(address.value or 0), np.ascontiguousarray(contents)
        gpu_tools.call("jr_fence_write", self.address, self.contents.ctypes.data, self.contents.nbytes)

    def read(self) -> NDArray[Any]:
        """What stands there, as an array like the contents."""
        now = np.empty_like(self.contents)
        gpu_tools.call("jr_fence_read", now.ctypes.data, self.address, now.nbytes)
        return now

    def overwritten(self) -> str | None:
        """Where a canary changed, or None."""
        before, behind = np.empty(CANARY_BYTES, np.uint8), np.empty(self.behind, np.uint8)
        gpu_tools.call("jr_fence_read", before.ctypes.data, self.address - CANARY_BYTES, before.nbytes)
        if self.behind:
            gpu_tools.call("jr_fence_read", behind.ctypes.data, self.address + self.contents.nbytes, behind.nbytes)
        if (before != CANARY).any():
            return f"{CANARY_BYTES - int(np.flatnonzero(before != CANARY)[-1])} bytes before"
        return f"{int((behind != CANARY).argmax())} bytes behind" if (behind != CANARY).any() else None

    def free(self) -> None:
        gpu_tools.call("jr_fence_free", self.address)


@contextlib.contextmanager
def fenced(arrays: dict[str, NDArray[Any] | None]) -> Iterator[dict[str, Fenced]]:
    """Each array that is there, fenced."""
    made: dict[str, Fenced] = {}
    try:
        for name, array in arrays.items():
            if array is not None and array.nbytes:
                made[name] = Fenced(array, ALIGNMENT if name in ALIGNED else 1)
        yield made
    finally:
        for each in made.values():
            each.free()


def programs(subject: Subject, context: Context) -> Programs:
    """What `check_fence` runs besides the C launchers."""
    return calls(subject, _tokens(context)) if subject.implementation == "cuda" else {}


def _tokens(context: Context) -> tuple[int, ...]:
    return context.tokens or (QUICK_TOKENS if context.quick else TOKENS)


def check_fence(subject: Subject, context: Context) -> Result:
    """The check "fence", of `cuda`: every buffer of a launch ends at unmapped memory and starts behind canaries.

    In both layouts of the weight, where these are taken. An access beyond ends the process with CUDA's illegal address,
    which the supervisor reports.
    """
    if subject.implementation != "cuda" or subject.function is not None:
        return Result("fence", None, reason="only the C launchers take memory of ours")
    if not context.on_gpu:
        return Result("fence", None, reason="there is no GPU")
    try:
        Fenced(np.zeros(1, np.uint8), 1).free()
    except NotImplementedError as error:
        return Result("fence", None, reason=str(error))
    started = time.monotonic()
    made, launches = programs(subject, context), 0
    forms = in_its_layouts(subject, context.device)
    for tokens in _tokens(context):
        context.doing(tokens, subject.usual)
        host = draw(subject, subject.usual, tokens, context.seed)
        run = context.program(key := ("call", tokens), made[key])
        expected = row_bits(run(put(host, context.device)))
        offered = sorted({0, cuda.workspace_bytes(tokens, subject.shape.experts)})
        for form, scratch in itertools.product(forms, offered):
            launches += 1
            stored = host._replace(weight=as_stored(host.weight, form))
            found = _launch(form, stored, tokens, scratch, expected)
            context.alive(1)
            if found is not None:
                what, row, wanted, got = found
                reason = f"{what}{layout_in_words(form)}"
                failure = Failure(tokens, subject.usual, context.seed, launches - 1, row, wanted, got)
                return Result("fence", False, launches, time.monotonic() - started, {}, reason, failure)
    return Result("fence", True, launches, time.monotonic() - started)


def _launch(
    subject: Subject, host: Operands, tokens: int, scratch: int, expected: NDArray[Any]
) -> tuple[str, int | None, Any, Any] | None:
    """One launch; what was wrong with it, or None."""
    shape, spec = subject.shape, subject.spec
    logits = np.full((tokens, shape.experts), np.nan, np.float32)
    outputs: dict[str, NDArray[Any] | None] = {"logits": logits}
    if spec is not None:
        outputs["weights"] = np.full((tokens, spec.top_k), np.nan, np.float32)
        outputs["experts"] = np.full((tokens, spec.top_k), -1, np.int32)
    if scratch:
        outputs["workspace"] = np.full(scratch, POISON, np.uint8)
    with fenced({**host._asdict(), **outputs}) as memory:
        at = {name: each.address for name, each in memory.items()}
        problem = subject.problem(tokens)
        gemm = cuda.RouterGemmArgs.of(
            problem, x=at["x"], weight=at["weight"], bias=at.get("bias"), out=at["logits"],
            workspace=at.get("workspace"), workspace_bytes=scratch,
        )  # fmt: skip
        if spec is None:
            cuda.call("jr_router_gemm", ctypes.byref(gemm), None)
            names: tuple[str, ...] = ("logits",)
        else:
            vectors = host._asdict()
            correction, scale = (
                (at[name], vectors[name].dtype.name) if name in at else None
                for name in ("correction_bias", "expert_scale")
            )
            args = cuda.RouteArgs.of(
                problem, gemm=gemm, weights=at["weights"], experts=at["experts"], correction_bias=correction,
                expert_scale=scale, return_logits=False,
            )  # fmt: skip
            cuda.call("jr_route", ctypes.byref(args), None)
            names = ("weights", "experts")
        got = row_bits([memory[name].read() for name in names])
        wrong = np.argwhere(got != expected)
        if len(wrong):
            row, place = map(int, wrong[0])
            return (f"row {row} is not what the custom call gives", row, f"0x{expected[row, place]:08x}",
                    f"0x{got[row, place]:08x}")  # fmt: skip
        for name, each in memory.items():
            where = each.overwritten()
            if where is not None:
                return f"{where} {name} something was written", None, hex(CANARY), "something else"
            if name not in OUTPUTS and not np.array_equal(each.read().view(np.uint8), each.contents.view(np.uint8)):
                return f"the launch changed its input {name}", None, "the same bytes", "others"
    return None
