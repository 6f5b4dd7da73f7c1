"""What the process of the verification makes of a check that raises."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from jax_router.toolchain import BuildError
from jax_router.verification import plan, worker

REQUEST = {
    "options": {"implementations": ["xla"], "models": ["gpt-oss-20b"], "operations": ["router_gemm"], "seed": 3},
    "skip": 0,
}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception], list[dict[str, Any]]]:
    def of(error: Exception) -> list[dict[str, Any]]:
        def run(_: Any, context: Any) -> Any:
            context.doing(17, "ties")
            raise error

        checks = {"memory": plan.Check(run, lambda *_: {})}
        monkeypatch.setattr(plan, "checks_of", lambda _: checks)
        events: list[dict[str, Any]] = []
        worker.run(REQUEST, lambda event, **facts: events.append({"event": event, **facts}))
        assert [each["event"] for each in events[-2:]] == ["done", "end"]
        return [each for each in events if each["event"] == "result"]

    return of


def test_a_check_that_raises_fails_with_its_case(results):
    [result] = results(NotImplementedError("no such tile\nand more"))
    assert (result["check"], result["passed"]) == ("memory", False)
    assert result["reason"] == "NotImplementedError: no such tile\nand more"
    assert result["failure"] == {
        "tokens": 17, "data": "ties", "seed": 3, "launch": 0, "row": None, "expected": "an end",
        "got": "NotImplementedError: no such tile",
    }  # fmt: skip


@pytest.mark.parametrize(
    "error",
    [
        BuildError("no nvcc was found. Install the CUDA toolkit"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"),
        RuntimeError("jr_fence_create: cudaMalloc() failed: cudaErrorMemoryAllocation (out of memory)"),
        RuntimeError("INTERNAL: CUDA_ERROR_OUT_OF_MEMORY"),
        MemoryError("Unable to allocate 9 TiB"),
    ],
)
def test_what_says_nothing_of_the_kernel_fails_nothing(results, error):
    [result] = results(error)
    assert (result["passed"], result["failure"]) == (None, None)
    assert str(error) in result["reason"]


@pytest.mark.parametrize(
    "message",
    [
        "INTERNAL: CUDA error: an illegal memory access",
        "jr_fence_read: cudaDeviceSynchronize() failed: cudaErrorIllegalAddress (an illegal memory access)",
        "INTERNAL: jax_router cuda with x bf16[8,64]: cuTensorMapEncodeTiled failed: CUresult 719",
    ],
)
def test_a_lost_device_ends_the_process(results, message):
    with pytest.raises(RuntimeError, match=r"illegal|CUresult 719"):
        results(RuntimeError(message))


def test_compiling_the_kernels_at_first_use_is_no_hang(monkeypatch):
    events: list[str] = []

    def subjects(*_: Any) -> Any:
        ends = time.monotonic() + 5
        while events.count("alive") < 4 and time.monotonic() < ends:  # the first comes before
            time.sleep(0.01)
        raise ImportError("safetensors is missing")

    monkeypatch.setattr(worker, "TICK_SECONDS", 0.01)
    monkeypatch.setattr(plan, "subjects", subjects)
    with pytest.raises(ValueError, match="safetensors is missing"):
        worker.run(REQUEST, lambda event, **_: events.append(event))
    count = len(events)
    assert count >= 4
    time.sleep(0.05)
    assert len(events) == count, "it ends with what it stands for"
