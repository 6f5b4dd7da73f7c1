"""What the kernels get from PyTorch: every argument, or a refusal. Tensors of the CPU stand for those of a GPU.

First a launcher looks at its arguments. Then the kernels themselves run on the CPU (tests/emulation), in a process of
its own, because a fault in a kernel ends it:

    python tests/test_torch_arguments.py LIBRARY
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from emulated import answer, in_a_process  # noqa: E402
from routing_cases import CASES  # noqa: E402
from torch_cases import DTYPES, STREAM, numbers, pretend_a_gpu  # noqa: E402

import jax_router as jr  # noqa: E402
import jax_router.torch as jrt  # noqa: E402
import torch_ref  # noqa: E402
from jax_router.dispatch import Device  # noqa: E402
from jax_router.implementations import cuda, experts_axis  # noqa: E402

PLAIN = jr.RoutingSpec(4, "softmax_topk")
WRITTEN = {"workspace": 0xFF, "out": 1, "weights": 2, "experts": 3}  # every byte, by the launcher below
ALIGNED = ("x", "weight", "out", "workspace")


def memory(args: cuda.RouterGemmArgs | cuda.RouteArgs) -> dict[str, tuple[int | None, int, str | None]]:
    """Address, number of elements and dtype of what the arguments of a launch point to."""
    dtype_of = {code: name for name, code in cuda.DTYPES.items()}
    route = args if isinstance(args, cuda.RouteArgs) else None
    gemm = args.gemm if route is not None else args
    places = {
        "x": (gemm.x, gemm.tokens * gemm.hidden, dtype_of[gemm.dtype]),
        "weight": (gemm.weight, gemm.experts * gemm.hidden, dtype_of[gemm.weight_dtype]),
        "bias": (gemm.bias, gemm.experts, dtype_of.get(gemm.bias_dtype)),
        "workspace": (gemm.workspace, gemm.workspace_bytes, "uint8"),
        "out": (gemm.out, gemm.tokens * gemm.experts, dtype_of[gemm.out_dtype]),
    }
    if route is not None:
        selected = gemm.tokens * route.integers[0]
        places |= {
            "correction_bias": (route.correction_bias, gemm.experts, dtype_of.get(route.correction_bias_dtype)),
            "expert_scale": (route.expert_scale, gemm.experts, dtype_of.get(route.expert_scale_dtype)),
            "replay": (route.replay, selected, "int32"),
            "weights": (route.weights, selected, "float32"),
            "experts": (route.experts, selected, "int32"),
        }
    return places


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, dict]]:
    """What reaches a launcher: its name, its arguments, what these point to. It writes every byte of the outputs."""
    seen: list[tuple[str, dict]] = []
    made_current = pretend_a_gpu(monkeypatch)

    def call(name: str, reference, stream: int) -> None:
        assert (stream, [device.type for device in made_current]) == (STREAM, ["cpu"])
        args = reference._obj
        gemm = args.gemm if name == "jr_route" else args
        found = {"configs": {gemm.config, args.config}, "workspace_bytes": gemm.workspace_bytes}
        found["layout"] = gemm.weight_layout
        if name == "jr_route":
            found |= {"return_logits": args.return_logits, "spec": (list(args.integers), list(args.floats))}
        for field, (address, count, kind) in memory(args).items():
            if address is None:
                continue
            dtype = DTYPES.get(kind) or np.dtype(kind)
            assert field not in ALIGNED or address % 16 == 0
            if field in WRITTEN:
                ctypes.memset(address, WRITTEN[field], count * dtype.itemsize)
            else:
                found[field] = np.frombuffer(ctypes.string_at(address, count * dtype.itemsize), dtype)
        seen.append((name, found))

    monkeypatch.setattr(cuda, "call", call)
    return seen


def assert_given(found: dict, **arrays: np.ndarray | None) -> None:
    """That a launcher found these numbers, and nothing where there is None."""
    for name, array in arrays.items():
        assert (array is None) == (name not in found), name
        if array is not None:
            assert found[name].dtype == array.dtype, name
            assert found[name].tobytes() == array.tobytes(), name


def assert_written(tensor: torch.Tensor, field: str) -> None:
    """That every byte of a result is what the launcher wrote there."""
    assert set(torch_ref.to_numpy(tensor).tobytes()) == {WRITTEN[field]}


@pytest.mark.parametrize("tokens", [1, 64, 65])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_launcher_of_logits_gets_every_argument(launches, dtype, tokens) -> None:
    x, weight, bias, bias32, _ = numbers(tokens, 72, 13, dtype=dtype)
    given = [torch_ref.to_torch(array) for array in (x, weight, bias, bias32)]
    wide = torch.cat([given[0]] * 2, 1)
    misaligned = torch.cat([given[0].flatten()[:1], given[0].flatten()])[1:].view(tokens, 72)
    for rows in (given[0], wide[:, :72], wide[:, 72:], misaligned):
        for added, array, out in ((None, None, dtype), (given[2], bias, "float32"), (given[3], bias32, dtype)):
            logits = jrt.router_gemm(rows, given[1], added, out_dtype=getattr(torch, out))
            ((name, found),) = launches
            launches.clear()
            assert name == "jr_router_gemm"
            assert_given(found, x=x, weight=weight, bias=array)
            assert (found["configs"], found["workspace_bytes"]) == ({-1}, cuda.workspace_bytes(tokens, 13))
            assert (found["workspace_bytes"] > 0) == (tokens > 64)
            assert (logits.shape, logits.dtype) == ((tokens, 13), getattr(torch, out))
            assert_written(logits, "out")


@pytest.mark.parametrize("tokens", [3, 66])
@pytest.mark.parametrize("name", ["DeepSeek-V3", "Gemma-4", "Mixtral", "rounded logits, corrected", "one group"])
def test_a_launcher_of_routing_gets_every_argument(launches, name, tokens) -> None:
    case, leading = CASES[name], (3, tokens // 3)
    x, weight, bias, correction, scale = numbers(tokens, 72, case.experts, dtype=case.dtype)
    replay = np.random.default_rng(0).integers(0, case.experts, (tokens, case.spec.top_k), np.int32)
    vectors = {
        "bias": bias if case.bias else None,
        "correction_bias": correction if case.correction_bias else None,
        "expert_scale": scale.astype(x.dtype) if case.expert_scale else None,
    }
    tensors_of = {key: None if array is None else torch_ref.to_torch(array) for key, array in vectors.items()}
    rows, matrix = torch_ref.to_torch(x).unflatten(0, leading), torch_ref.to_torch(weight)
    strided = torch_ref.to_torch(replay).to(torch.int64).t().contiguous().t().unflatten(0, leading)
    for return_logits, experts, array in ((True, None, None), (False, strided, replay)):
        options = {**tensors_of, "spec": case.spec, "experts": experts, "return_logits": return_logits}
        routing = jrt.route(rows, matrix, **options)
        ((name, found),) = launches
        launches.clear()
        assert name == "jr_route"
        assert_given(found, x=x, weight=weight, **vectors, replay=array)
        assert (found["configs"], found["return_logits"]) == ({-1}, return_logits)
        assert found["spec"] == tuple(numbers.tolist() for numbers in cuda.spec_numbers(case.spec))
        assert found["workspace_bytes"] == cuda.workspace_bytes(tokens, case.experts)
        assert routing.weights.shape == routing.experts.shape == (*leading, case.spec.top_k)
        assert_written(routing.weights, "weights")
        assert_written(routing.experts, "experts")
        assert (routing.logits is not None) == return_logits
        if routing.logits is not None:
            assert routing.logits.shape == (*leading, case.experts)
            assert_written(routing.logits, "out")


def test_a_weight_of_the_other_layout_is_launched_where_it_is(launches) -> None:
    x, weight, bias, _, _ = numbers(3, 72, 16)
    stored = np.ascontiguousarray(weight.T)
    for layout, matrix in (("experts_hidden", weight), ("hidden_experts", stored)):
        rows, tensor, added = (torch_ref.to_torch(array) for array in (x, matrix, bias))
        assert jrt.router_gemm(rows, tensor, added, weight_layout=layout).shape == (3, 16)
        routing = jrt.route(rows, tensor, added, spec=PLAIN, weight_layout=layout, return_logits=True)
        assert [result.shape[-1] for result in routing] == [4, 4, 16]
        for _, found in launches:
            assert found["layout"] == experts_axis(layout)
            assert_given(found, x=x, weight=matrix.ravel(), bias=bias)
        assert len(launches) == 2
        launches.clear()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_float32_weight_is_launched_where_it_is(launches, dtype) -> None:
    x, _, bias, bias32, _ = numbers(3, 72, 16, dtype=dtype)
    _, weight, *_ = numbers(3, 72, 16, dtype="float32")
    for layout, matrix in (("experts_hidden", weight), ("hidden_experts", np.ascontiguousarray(weight.T))):
        rows, tensor, *biases = (torch_ref.to_torch(array) for array in (x, matrix, bias, bias32))
        for added, array, out in ((biases[0], bias, "float32"), (biases[1], bias32, dtype)):
            logits = jrt.router_gemm(rows, tensor, added, out_dtype=getattr(torch, out), weight_layout=layout)
            assert logits.dtype == getattr(torch, out)
            jrt.route(rows, tensor, added, spec=PLAIN, weight_layout=layout)
            for _, found in launches:
                assert_given(found, x=x, weight=matrix.ravel(), bias=array)
            assert len(launches) == 2
            launches.clear()


def test_no_tokens_need_no_launch(launches) -> None:
    x, weight = torch.empty(2, 0, 72, dtype=torch.bfloat16), torch.ones(9, 72, dtype=torch.bfloat16)
    logits = jrt.router_gemm(x, weight, out_dtype=torch.bfloat16)
    assert (logits.shape, logits.dtype) == ((2, 0, 9), torch.bfloat16)
    routing = jrt.route(x, weight, spec=PLAIN, return_logits=True)
    assert [tuple(tensor.shape) for tensor in routing] == [(2, 0, 4), (2, 0, 4), (2, 0, 9)]
    assert [tensor.dtype for tensor in routing] == [torch.float32, torch.int32, torch.float32]
    assert not launches


# ---- Refusals -------------------------------------------------------------------------------------------------------


def ones(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


def arguments(**changes) -> dict:
    """Good arguments of `route`, some replaced."""
    return {"x": ones(3, 72), "weight": ones(9, 72), "spec": PLAIN} | changes


TO_TENSOR = "Expected a torch.Tensor on a GPU; convert it, for example with torch.as_tensor("
SHAPES = (
    "Expected (..., hidden) and (experts, hidden), both numbers at least 1; if your weight is (hidden, experts), pass "
    'weight_layout="hidden_experts".'
)
TAKEN = "Pass what it takes, or use PyTorch's own operations, whose bits are others."
F32, F64 = torch.float32, torch.float64
# Of arguments that router_gemm has too, both operations are asked.
REFUSED = [
    ({"x": np.ones((3, 72))}, TypeError, f'x is a numpy.ndarray. {TO_TENSOR}x, device="cuda").'),
    ({"weight": None}, TypeError, f"weight is None (NoneType). {TO_TENSOR}weight"),
    ({"bias": 0.5}, TypeError, f"bias is 0.5 (float). {TO_TENSOR}bias"),
    ({"experts": [[1, 2, 3, 4]] * 3}, TypeError, f"experts is a list. {TO_TENSOR}experts"),
    ({"weight": torch.ones(9, 72, device="meta")}, ValueError,
     "weight is on meta but x is on cpu. Expected one device; pass weight.to(x.device)."),
    ({"weight": torch.nn.Parameter(ones(9, 72))}, ValueError,
     "weight requires a gradient. Expected tensors without, because the kernels have none; call under "
     "torch.no_grad(), or differentiate jax_router.route in JAX."),
    ({"weight": ones(72, 9)}, ValueError,
     f"x has shape (3, 72) and weight has shape (72, 9). {SHAPES}"),
    ({"x": ones()}, ValueError, f"x has shape () and weight has shape (9, 72). {SHAPES}"),
    ({"weight": ones(2, 9, 72)}, ValueError, f"weight has shape (2, 9, 72). {SHAPES}"),
    ({"weight": ones(0, 72)}, ValueError, f"weight has shape (0, 72). {SHAPES}"),
    ({"bias": ones(10)}, ValueError,
     "bias has shape torch.Size([10]) but weight has experts=9. Expected bias of shape (9,); pass one value"),
    ({"expert_scale": ones(8)}, ValueError, "expert_scale has shape torch.Size([8]) but weight has experts=9."),
    ({"weight": ones(72, 9).t()}, ValueError,
     "weight has shape (9, 72) and strides (1, 9). Expected it to be contiguous; call weight.contiguous() once, where "
     "it is loaded."),
    ({"weight_layout": "hidden_experts"}, ValueError,
     "x has shape (3, 72) and weight has shape (9, 72). Expected (..., hidden) and (hidden, experts), both numbers at "
     'least 1; if your weight is (experts, hidden), pass weight_layout="experts_hidden".'),
    ({"weight": ones(16, 72).t(), "weight_layout": "hidden_experts"}, ValueError,
     "weight has shape (72, 16) and strides (1, 72). Expected it to be contiguous; call weight.contiguous() once"),
    ({"weight": ones(72, 9), "weight_layout": "hidden_experts"}, NotImplementedError,
     f"route of these tensors needs experts to be a multiple of 8 in weights [hidden, experts], they are 9. {TAKEN}"),
    ({"weight_layout": "rows"}, ValueError, "weight_layout is 'rows'. Expected experts_hidden or hidden_experts; pass"),
    ({"bias": ones(9, 2)[:, 0]}, ValueError, "bias has shape (9,) and strides (2,). Expected it to be contiguous;"),
    ({"weight": ones(9 * 72 + 1)[1:].view(9, 72)}, ValueError,
     "weight begins 2 bytes behind a multiple of 16. Expected none; call weight.clone() once, where it is loaded."),
    ({"correction_bias": ones(9, dtype=F64)}, ValueError,
     "correction_bias is torch.float64 but x is torch.bfloat16. Expected x's dtype or torch.float32; pass "
     "correction_bias.to(x.dtype)."),
    ({"spec": 4}, TypeError, "spec is 4 (int). Expected a jax_router.RoutingSpec; make one"),
    ({"spec": jr.RoutingSpec(10)}, ValueError, "spec has top_k=10 but weight has experts=9. Expected at most 9; fix"),
    ({"experts": ones(3, 4)}, ValueError,
     "experts is torch.bfloat16. Expected torch.int32 or torch.int64; pass experts.to(torch.int32)."),
    ({"experts": ones(4, 4, dtype=torch.int32)}, ValueError,
     "experts has shape (4, 4) but x and spec ask for (3, 4). Expected the tokens of x in the leading axes and "
     "top_k=4 ids in the last; pass one id for every weight."),
    ({"return_logits": 1}, TypeError, "return_logits is 1 (int). Expected True or False; pass one of them."),
    ({"x": ones(3, 72, dtype=F32)}, NotImplementedError,
     "route of these tensors needs x and weight both bfloat16, both float16 or both float32, or x in bfloat16 and "
     f"weight in float32, they are float32 and bfloat16. {TAKEN}"),
    ({"x": ones(3, 72, dtype=torch.float16), "weight": ones(9, 72, dtype=F32)}, NotImplementedError,
     f"or x in bfloat16 and weight in float32, they are float16 and float32. {TAKEN}"),
    ({"weight": ones(9 * 72 + 1, dtype=F32)[1:].view(9, 72)}, ValueError,
     "weight begins 4 bytes behind a multiple of 16. Expected none; call weight.clone() once, where it is loaded."),
    ({"bias": ones(9, dtype=F64)}, NotImplementedError,
     f"route of these tensors needs a bias in float32 or in x's dtype, it is float64. {TAKEN}"),
    ({"x": ones(3, 4), "weight": ones(9, 4)}, NotImplementedError,
     f"route of these tensors needs hidden to be a multiple of 8 up to 65536, it is 4. {TAKEN}"),
    ({"spec": PLAIN, "weight": ones(1025, 72)}, NotImplementedError,
     f"route of these tensors routes among at most 1024 experts, they are 1025. {TAKEN}"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "error", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_does_not_fit_is_refused_before_a_launch(launches, changes, error, words) -> None:
    with pytest.raises(error) as refused:
        jrt.route(**arguments(**changes))
    assert words in str(refused.value)
    if changes.keys() <= {"x", "weight", "bias", "weight_layout"}:
        of_gemm = arguments(**changes)
        del of_gemm["spec"]
        with pytest.raises(error) as refused:
            jrt.router_gemm(**of_gemm)
        assert words.replace("route of", "router_gemm of") in str(refused.value)
    assert not launches


def test_another_dtype_of_logits_is_refused(launches) -> None:
    for out_dtype, error, words in (
        (
            "float32",
            TypeError,
            "out_dtype is 'float32' (str). Expected torch.float32 or x's dtype; pass a torch.dtype.",
        ),
        (torch.float16, NotImplementedError, f"needs out_dtype float32 or x's dtype, it is float16. {TAKEN}"),
    ):
        with pytest.raises(error) as refused:
            jrt.router_gemm(ones(3, 72), ones(9, 72), out_dtype=out_dtype)
        assert words in str(refused.value)
    assert not launches


def test_parameters_are_taken_where_no_gradient_is_asked_for(launches) -> None:
    for without in (torch.no_grad, torch.inference_mode):
        with without():
            jrt.route(**arguments(weight=torch.nn.Parameter(ones(9, 72))))
    assert len(launches) == 2


def test_tensors_that_are_not_on_a_gpu_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(cuda, "call", lambda *_: pytest.fail("launched"))
    with pytest.raises(NotImplementedError) as refused:
        jrt.route(**arguments())
    assert f"needs an NVIDIA GPU of compute capability 9.0, this device is cpu. {TAKEN}" in str(refused.value)


def test_a_gpu_is_judged_by_its_own_capability(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, index))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    jrt._cuda_device.cache_clear()
    try:
        devices = [jrt._device(torch.device("cuda", index)) for index in (0, 6, 0)]
    finally:
        jrt._cuda_device.cache_clear()
    assert devices == [Device("gpu", "GPU 0", "8.0"), Device("gpu", "GPU 6", "8.6"), Device("gpu", "GPU 0", "8.0")]


# ---- The kernels on the CPU -----------------------------------------------------------------------------------------


def examine(path: str, *names: str) -> dict[str, list[bool]]:
    """Whether calls from PyTorch give the bits of direct calls: logits; routing and its logits; routing replayed."""
    import test_emulation
    import test_emulation_route as direct

    patch, library = pytest.MonkeyPatch(), ctypes.CDLL(path)
    for name, structure in (("jr_router_gemm", cuda.RouterGemmArgs), ("jr_route", cuda.RouteArgs)):
        kinds = (ctypes.POINTER(structure), ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t)
        getattr(library, name).argtypes = kinds
    call = cuda.call
    pretend_a_gpu(patch)
    patch.setattr(cuda, "call", call)
    patch.setattr(cuda, "shared_library", lambda: library)
    found = {}
    for name in names:
        case = direct.CASES[name]
        arrays = direct.operands(case)
        x, weight, bias, correction, scale = (None if array is None else torch_ref.to_torch(array) for array in arrays)
        options = {"spec": case.spec, "correction_bias": correction, "expert_scale": scale}
        routing = jrt.route(x, weight, bias, **options, return_logits=True)
        replayed = jrt.route(x, weight, bias, **options, experts=routing.experts)
        expected = direct.route(library, arrays, case.spec, None, -1)
        naive = test_emulation.call(library, *arrays[:3], np.float32, None)
        logits = torch_ref.to_numpy(jrt.router_gemm(x, weight, bias))
        ours = [torch_ref.to_numpy(tensor) for tensor in routing]
        again = [torch_ref.to_numpy(tensor) for tensor in replayed[:2]]
        found[name] = [
            logits.tobytes() == naive.tobytes() == ours[2].tobytes(),
            direct.same_bits(ours, expected),
            direct.same_bits(again, expected),
        ]
    return found


def test_the_emulated_kernels_give_pytorch_the_bits_of_direct_calls(sources) -> None:
    names = ("gpt-oss", "DeepSeek-V3", "best expert of a group", "rounded", "1024 experts")
    found, said = in_a_process(__file__, sources.link("called-from-torch.so"), names)
    assert [list(each) for each in found] == [list(names)], said
    assert all(map(all, found[0].values())), found


if __name__ == "__main__":
    answer(examine)
