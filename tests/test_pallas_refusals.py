"""What the Pallas implementation takes, what it refuses and why, from static facts."""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import pytest
from test_pallas import EXPERTS, HIDDEN

from jax_router.dispatch import Device, Problem
from jax_router.implementations import pallas

H200, CPU = Device("gpu", "NVIDIA H200", "9.0"), Device("cpu", "cpu")

REFUSALS: list[tuple[Problem, Device, str]] = [
    (
        Problem(8, 2880, 128),
        Device("gpu", "NVIDIA A100", "8.0"),
        "needs compute capability 9.0, this device is NVIDIA A100 (8.0)",
    ),
    (
        Problem(8, 2880, 128),
        Device("gpu", "NVIDIA B200", "10.0"),
        "needs compute capability 9.0, this device is NVIDIA B200 (10.0)",
    ),
    (
        Problem(8, 2880, 128),
        CPU,
        f"needs an NVIDIA GPU of compute capability 9.0, this device is {CPU.description} (on a CPU it runs in Pallas' "
        "interpreter if JAX_ROUTER_PALLAS_INTERPRET=1)",
    ),
    (
        Problem(8, 2880, 128, "float32"),
        H200,
        "needs x and weight both bfloat16 or both float16, they are float32 and float32",
    ),
    (
        Problem(8, 2880, 128, weight_dtype="float32"),
        H200,
        "needs x and weight both bfloat16 or both float16, they are bfloat16 and float32",
    ),
    (
        Problem(8, 2880, 128, bias_dtype="float16"),
        H200,
        "needs a bias in float32 or in x's dtype, it is float16",
    ),
    (
        Problem(8, 2880, 128, out_dtype="float16"),
        H200,
        "needs out_dtype float32 or x's dtype, it is float16",
    ),
    (
        Problem(8, 2884, 128),
        H200,
        "needs hidden to be a multiple of 8 (TMA takes rows of whole 16 bytes), it is 2884",
    ),
    (
        Problem(8, 2880, 128, weight_layout="hidden_experts"),
        H200,
        "takes weights [experts, hidden], this one is [hidden, experts]",
    ),
]


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Judge as another version of jax would, and without the interpreter."""

    def set_version(version: str) -> None:
        monkeypatch.setattr(jax, "__version__", version)
        monkeypatch.setattr(jax, "__version_info__", tuple(map(int, version.split("."))))

    monkeypatch.delenv(pallas.INTERPRET_VARIABLE, raising=False)
    set_version("0.11.2")
    return set_version


@pytest.mark.parametrize(("problem", "device", "reason"), REFUSALS)
def test_refuses_with_a_reason(newest: Any, problem: Problem, device: Device, reason: str) -> None:
    assert pallas.why_unsupported(problem, device) == reason


def test_takes_what_it_promises(newest: Any) -> None:
    for dtype, hidden, experts in itertools.product(("bfloat16", "float16"), HIDDEN, EXPERTS):
        for bias_dtype, out_dtype in itertools.product((None, dtype, "float32"), (dtype, "float32")):
            problem = Problem(7, hidden, experts, dtype, None, bias_dtype, out_dtype)
            assert pallas.why_unsupported(problem, H200) is None


def test_refuses_an_old_jax(newest: Callable[[str], None]) -> None:
    newest("0.10.2")
    assert pallas.why_unsupported(Problem(8, 2880, 128), H200) == "needs jax 0.11 or newer, this is jax 0.10.2"


def test_a_cpu_must_opt_in_to_the_interpreter(newest: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pallas.why_unsupported(Problem(8, 2880, 128), CPU) is not None
    monkeypatch.setenv(pallas.INTERPRET_VARIABLE, "1")
    assert pallas.why_unsupported(Problem(8, 2880, 128), CPU) is None
    assert pallas.why_unsupported(Problem(8, 2884, 128), CPU) is not None


def test_a_missing_module_is_reported_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.mosaic_gpu", None)
    pallas.unavailable.cache_clear()
    reason = pallas.unavailable()
    pallas.unavailable.cache_clear()
    assert reason is not None
    assert reason.startswith("could not be imported: ")
    assert "Install" in reason


def test_importing_the_module_does_not_import_pallas() -> None:
    program = (
        "import sys, jax; import jax_router.implementations.pallas; "
        "assert not [name for name in sys.modules if 'pallas.mosaic_gpu' in name]"
    )
    path = os.pathsep.join([str(pathlib.Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, timeout=120, check=True)
