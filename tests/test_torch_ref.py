"""The PyTorch reference: independent of the library, and in agreement with the float64 numpy reference of `parity`."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import pathlib

import ml_dtypes
import numpy as np
import pytest
from test_parity import DTYPES, FACTORS, HEADLINE, Case, cases_of, data_of, run

from jax_router import dispatch, parity

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None,
    reason="PyTorch is not installed: its oracle is not compared. test_parity.py checks against numpy's float64.",
)
REPOSITORY = pathlib.Path(__file__).parents[1]


def imported_packages(folder: str) -> set[str]:
    """The packages that any file of a folder imports, inside functions too."""
    names: set[str] = set()
    for file in (REPOSITORY / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module)
    return {name.split(".")[0] for name in names}


def test_library_and_reference_never_import_each_other() -> None:
    assert "torch_ref" not in imported_packages("jax_router")
    assert imported_packages("torch_ref").isdisjoint({"jax_router", "jax", "jaxlib"})
    assert {"torch", "torch_ref"} <= imported_packages("torch_ref")


def as_torch(case: Case, device: str = "cpu"):
    import torch_ref

    return [None if array is None else torch_ref.to_torch(array, device) for array in data_of(case)[:3]]


@needs_torch
@pytest.mark.parametrize("hidden", FACTORS["hidden"])
def test_torch_oracle_agrees_with_the_numpy_reference(hidden: int) -> None:
    import torch_ref

    for case in cases_of(hidden):
        truth = data_of(case)[3]
        oracle = torch_ref.to_numpy(torch_ref.router_gemm_float64(*as_torch(case)))
        assert oracle.dtype == np.float64
        # Products are exact, so each side errs by hidden * 2^-53 of the sum of magnitudes at most, in any order.
        assert (np.abs(oracle - truth.logits) <= 2 * hidden * 2.0**-53 * truth.magnitude).all(), case


@needs_torch
def test_oracle_takes_leading_axes_and_no_tokens() -> None:
    import torch

    import torch_ref

    x, weight = torch.randn(2, 3, 8), torch.randn(4, 8)
    logits = torch_ref.router_gemm_float64(x, weight)
    assert torch.equal(logits.reshape(6, 4), torch_ref.router_gemm_float64(x.reshape(6, 8), weight))
    assert torch_ref.router_gemm_float64(x[:0], weight).shape == (0, 3, 4)


@needs_torch
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_conversion_keeps_every_bit(dtype: str) -> None:
    import torch_ref

    unsigned = np.dtype(f"u{np.dtype(DTYPES[dtype]).itemsize}")
    pattern = np.linspace(0, np.iinfo(unsigned).max, 1 << 16).astype(unsigned)  # NaN, -0 and subnormals included
    square = pattern.view(DTYPES[dtype]).reshape(256, 256)
    for array in (square, square[:, ::2]):
        tensor = torch_ref.to_torch(array)
        assert str(tensor.dtype) == f"torch.{dtype}"
        backs = torch_ref.to_numpy(tensor), torch_ref.to_numpy(tensor.T).T
        tensor.zero_()  # all are copies: neither side sees what happens to the other
        assert array.view(unsigned).any()
        assert [parity.differing_rows(back, array).size for back in backs] == [0, 0]


@needs_torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("data", FACTORS["data"])
def test_replicated_linear_agrees_with_float64(dtype: str, data: str) -> None:
    import torch_ref

    case = dataclasses.replace(HEADLINE[1], dtypes=(dtype, dtype), data=data, out_dtype="x")
    x, weight, bias = as_torch(case)
    output, skipped = torch_ref.ReplicatedLinear.from_tensors(weight, bias)(x)
    assert skipped is None
    assert output.dtype == weight.dtype
    agreement = parity.compare(torch_ref.to_numpy(output), data_of(case)[3], parity.float32_chain(case.hidden))
    assert agreement.ok, agreement


@needs_torch
def test_replicated_linear_returns_the_bias_it_skips() -> None:
    import torch

    import torch_ref

    x, weight, bias = as_torch(dataclasses.replace(HEADLINE[1], dtypes=("float32", "float32")))
    whole, none = torch_ref.ReplicatedLinear.from_tensors(weight, bias)(x)
    output, skipped = torch_ref.ReplicatedLinear.from_tensors(weight, bias, skip_bias_add=True)(x)
    assert none is None
    assert torch.equal(skipped, bias)
    torch.testing.assert_close(output + skipped, whole)
    assert not torch.equal(output, whole)
    assert torch_ref.ReplicatedLinear(8, 4, bias=False, skip_bias_add=True)(x[:, :8])[1] is None


@needs_torch
def test_replicated_linear_computes_in_the_dtype_of_its_parameters() -> None:
    import torch

    import torch_ref

    layer = torch_ref.ReplicatedLinear(2880, 32, params_dtype=torch.bfloat16)
    assert layer.weight.shape == (32, 2880)
    assert layer.bias.shape == (32,)
    assert {parameter.dtype for parameter in layer.parameters()} == {torch.bfloat16}
    assert 0 < layer.weight.abs().max() <= 1 / np.sqrt(2880) * (1 + 2**-8)
    x = torch.randn(3, 2880, dtype=torch.bfloat16)
    assert layer(x)[0].dtype == torch.bfloat16
    assert torch_ref.ReplicatedLinear(2880, 32)(x)[0].dtype == torch.float32
    with pytest.raises(ValueError, match=r"ReplicatedLinear has hidden=0, experts=4\. Expected at least 1; fix"):
        torch_ref.ReplicatedLinear(0, 4)


@pytest.mark.gpu
@needs_torch
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_cublas_and_the_library_meet_one_yardstick(dtype: str, record_property, monkeypatch) -> None:
    """`torch.nn.functional.linear` on the GPU and every implementation, against float64 and in the same units."""
    import torch

    import torch_ref

    matmul = torch.backends.cuda.matmul
    assert torch.get_float32_matmul_precision() == "highest"  # TF32 would keep 10 bits of the inputs
    monkeypatch.setattr(matmul, "allow_bf16_reduced_precision_reduction", False)  # splits of K would meet in 16 bits
    monkeypatch.setattr(matmul, "allow_fp16_reduced_precision_reduction", False)
    for case in HEADLINE:
        # Without bias: how often 16-bit logits are rounded before it is added is PyTorch's business.
        case = dataclasses.replace(case, dtypes=(dtype, dtype), bias=None)
        truth = data_of(case)[3]
        x, weight, _ = as_torch(case, "cuda")
        logits = {"torch": torch_ref.to_numpy(torch.nn.functional.linear(x, weight))}
        for name in dispatch.IMPLEMENTATIONS:
            if dispatch.why_unsupported(case.problem, dispatch.Device.default(), name) is None:
                logits[name] = run(name, case)
        assert set(logits) >= ({"torch", "xla", "cuda"} if dtype != "float32" else {"torch", "xla"})
        for name, values in logits.items():
            accumulation = parity.accumulation_of(name, hidden=case.hidden, dtype=dtype, platform="gpu")
            agreement = parity.compare(values, truth, accumulation)
            record_property(f"{name} {case.tokens}x{case.hidden}x{case.experts} {values.dtype}", str(agreement))
            assert agreement.ok, (name, case, agreement)
        gpu_oracle = torch_ref.to_numpy(torch_ref.router_gemm_float64(x, weight))
        assert (np.abs(gpu_oracle - truth.logits) <= 2 * case.hidden * 2.0**-53 * truth.magnitude).all()


@needs_torch
def test_bfloat16_of_numpy_is_bfloat16_of_torch() -> None:
    import torch

    import torch_ref

    values = np.linspace(-3, 3, 1001, dtype=np.float32)
    theirs = torch_ref.to_numpy(torch.from_numpy(values).to(torch.bfloat16))
    assert parity.differing_rows(theirs[:, None], values.astype(ml_dtypes.bfloat16)[:, None]).size == 0
