"""The CUDA implementation where it cannot run: it says why, registers nothing, and never raises."""

import ctypes
import threading
import time

import jax
import jax.numpy as jnp
import pytest

from jax_router import build
from jax_router.dispatch import Device, Problem
from jax_router.implementations import cuda


@pytest.fixture
def fresh_cuda(monkeypatch):
    """The module as before its first use, with registrations recorded instead of made."""
    registered = []
    monkeypatch.setattr(cuda, "_library", None)
    monkeypatch.setattr(cuda, "_unavailable", None)
    monkeypatch.setattr(cuda, "_asked", False)
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *arguments, **_: registered.append(arguments))
    return registered


class FakeLibrary:
    jr_ffi_router_gemm = ctypes.CFUNCTYPE(None)(lambda: None)
    jr_ffi_route = ctypes.CFUNCTYPE(None)(lambda: None)

    def __init__(self, version: int):
        self.jr_ffi_api_version = lambda: version


def test_library_with_other_ffi_headers_is_not_registered(fresh_cuda, monkeypatch):
    monkeypatch.setattr(cuda, "shared_library", lambda: FakeLibrary(version=99))
    monkeypatch.setattr(jax, "local_devices", lambda backend: ["a GPU"])
    assert "built for FFI version 0.99 and this jaxlib has 0." in cuda.unavailable()
    assert fresh_cuda == []


def test_nothing_is_registered_without_a_cuda_backend(fresh_cuda, monkeypatch):
    def no_backend(backend):
        raise RuntimeError(f"Unknown backend: {backend}")

    monkeypatch.setattr(cuda, "shared_library", lambda: FakeLibrary(build.ffi_version()))
    monkeypatch.setattr(jax, "local_devices", no_backend)
    assert "Unknown backend: cuda" in cuda.unavailable()
    assert fresh_cuda == []


def test_custom_calls_are_registered_once(fresh_cuda, monkeypatch):
    monkeypatch.setattr(cuda, "shared_library", lambda: FakeLibrary(build.ffi_version()))
    monkeypatch.setattr(jax, "local_devices", lambda backend: ["a GPU"])
    assert cuda.unavailable() is None
    assert cuda.unavailable() is None
    assert [name for name, _ in fresh_cuda] == [cuda.TARGET, cuda.ROUTE_TARGET]


def test_failed_build_is_a_reason_and_is_tried_once_by_all_threads(fresh_cuda, monkeypatch):
    attempts = []

    def fail():
        attempts.append(1)
        time.sleep(0.05)
        raise build.BuildError("there is no CUDA compiler. Install one")

    monkeypatch.setattr(build, "load_library", fail)
    reasons: list[str | None] = []
    threads = [threading.Thread(target=lambda: reasons.append(cuda.unavailable())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(reasons) == {"could not be built or loaded: there is no CUDA compiler. Install one"}
    assert len(attempts) == 1


HOPPER = Device("gpu", "NVIDIA H200", "9.0")


@pytest.mark.parametrize(
    ("change", "device", "reason"),
    [
        ({}, HOPPER, None),
        ({"bias_dtype": "float32", "out_dtype": "bfloat16"}, HOPPER, None),
        ({"dtype": "float16", "bias_dtype": "float16", "out_dtype": "float16"}, HOPPER, None),
        ({}, Device("gpu", "NVIDIA A100", "8.0"), "needs compute capability 9.0, this device is NVIDIA A100 (8.0)"),
        ({}, Device("gpu", "NVIDIA B200", "10.0"), "needs compute capability 9.0, this device is NVIDIA B200 (10.0)"),
        ({}, Device("cpu"), "needs an NVIDIA GPU of compute capability 9.0, this device is cpu"),
        ({"dtype": "float32"}, HOPPER, None),
        ({"weight_dtype": "float32"}, HOPPER, None),
        ({"weight_dtype": "float32", "bias_dtype": "float32", "out_dtype": "bfloat16"}, HOPPER, None),
        ({"dtype": "float32", "bias_dtype": "float32", "weight_layout": "hidden_experts"}, HOPPER, None),
        (
            {"dtype": "float16", "weight_dtype": "float32"},
            HOPPER,
            "needs x and weight both bfloat16, both float16 or both float32, or x in bfloat16 and weight in float32, "
            "they are float16 and float32",
        ),
        ({"dtype": "float32", "weight_dtype": "bfloat16"}, HOPPER, "they are float32 and bfloat16"),
        ({"weight_dtype": "float16"}, HOPPER, "they are bfloat16 and float16"),
        ({"dtype": "float32", "bias_dtype": "bfloat16"}, HOPPER, "a bias in float32 or in x's dtype, it is bfloat16"),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, HOPPER, "out_dtype float32 or x's dtype, it is bfloat16"),
        (
            {"weight_dtype": "float32", "experts": 13, "weight_layout": "hidden_experts"},
            HOPPER,
            "needs experts to be a multiple of 8 in weights [hidden, experts], they are 13",
        ),
        ({"bias_dtype": "float16"}, HOPPER, "a bias in float32 or in x's dtype, it is float16"),
        ({"out_dtype": "float16"}, HOPPER, "out_dtype float32 or x's dtype, it is float16"),
        ({"hidden": 2884}, HOPPER, "hidden to be a multiple of 8 up to 65536, it is 2884"),
        ({"hidden": 65544}, HOPPER, "hidden to be a multiple of 8 up to 65536, it is 65544"),
        ({"hidden": 65536, "experts": 65536}, HOPPER, None),
        ({"weight_layout": "hidden_experts"}, HOPPER, None),
        ({"experts": 13}, HOPPER, None),
        (
            {"experts": 13, "weight_layout": "hidden_experts"},
            HOPPER,
            "needs experts to be a multiple of 8 in weights [hidden, experts], they are 13",
        ),
        ({"experts": 65537}, HOPPER, "at most 65536 experts, they are 65537"),
        ({"tokens": 2**27, "experts": 120}, HOPPER, None),
        ({"tokens": 2**27, "experts": 121}, HOPPER, "fewer than 17179869184 logits"),
        ({"tokens": 2**27 + 1, "experts": 1}, HOPPER, "at most 134217728 tokens"),
    ],
)
def test_unsupported_problem_or_device_is_refused_with_the_reason(change, device, reason):
    sizes = {"tokens": 8, "hidden": 2880, "experts": 128}
    answer = cuda.why_unsupported(Problem(**{**sizes, **change}), device)
    assert answer == reason if reason is None else reason in answer


def test_lowering_for_cuda_needs_no_library(monkeypatch):
    monkeypatch.setattr(cuda, "shared_library", lambda: pytest.fail("lowering asked for the library"))
    x, weight, bias = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((8, 2880), (128, 2880), (128,)))
    for operands in ((x, weight), (x, weight, bias)):

        def call(x, weight, bias=None):
            return cuda.router_gemm(x, weight, bias, out_dtype=jnp.float32, config=3)

        text = jax.jit(call).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        custom_call = next(line for line in text.splitlines() if cuda.TARGET in line)
        assert "config = 3 : i32" in custom_call
        assert "-> tensor<8x128xf32>" in custom_call
        assert custom_call.count("bf16>") == len(operands)


@pytest.mark.parametrize("of_x", ["bf16", "f32"])
def test_a_float32_weight_reaches_the_custom_call_as_it_is(of_x):
    dtype = {"bf16": jnp.bfloat16, "f32": jnp.float32}[of_x]
    x, weight = jax.ShapeDtypeStruct((8, 2880), dtype), jax.ShapeDtypeStruct((128, 2880), jnp.float32)

    def call(x, weight):
        return cuda.router_gemm(x, weight, None, out_dtype=jnp.float32)

    text = jax.jit(call).trace(x, weight).lower(lowering_platforms=("cuda",)).as_text()
    assert f"(tensor<8x2880x{of_x}>, tensor<128x2880xf32>) -> tensor<8x128xf32>" in text
    assert "stablehlo.convert" not in text


def test_many_tokens_lend_the_kernel_a_workspace_and_few_do_not():
    def results(tokens: int) -> str:
        operands = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((tokens, 2880), (128, 2880))]

        def call(x, weight):
            return cuda.router_gemm(x, weight, None, out_dtype=jnp.float32)

        text = jax.jit(call).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
        return next(line for line in text.splitlines() if cuda.TARGET in line).rpartition("->")[2]

    assert "ui8" not in results(64)
    assert f"tensor<{cuda.workspace_bytes(65, 128)}xui8>" in results(65)
