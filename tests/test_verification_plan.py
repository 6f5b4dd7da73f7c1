"""What a run covers: subjects by options and device, those of a checkpoint, and what stands between neighbours."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from verification_cases import CPU, GEMM, OnGpu

from jax_router import dispatch, implementations, parity
from jax_router.implementations import cuda, pallas
from jax_router.models import models
from jax_router.sweep_points import IMPLEMENTATIONS, ROUTE_HEADLINE_MODELS
from jax_router.verification import data, gpu_tools, judge, load, neighbours, plan
from jax_router.verification.data import Subject, draw
from jax_router.verification.plan import AWKWARD, CHECKS, Options, all_shapes, checks_of, describe, subjects
from jax_router.verification.result import Context

HOPPER = SimpleNamespace(platform="gpu", device_kind="NVIDIA H200", compute_capability="9.0")


@pytest.fixture
def on_hopper(monkeypatch):
    """A device on which everything can run."""
    for name in IMPLEMENTATIONS:
        monkeypatch.setattr(implementations.load(name), "unavailable", lambda: None)
    monkeypatch.setattr(pallas, "FIRST_JAX", (0, 10))
    monkeypatch.setattr(dispatch.Device, "of", lambda _: dispatch.Device("gpu", "NVIDIA H200", "9.0"))
    return HOPPER


def names(shapes) -> list[tuple[str, str]]:
    return [(shape.operation, shape.models[0]) for shape in shapes]


def test_some_models_and_awkward_sizes_are_verified_unless_told():
    found = names(all_shapes(Options()))
    assert {operation: sum(each == operation for each, _ in found) for operation in ("router_gemm", "route")} == {
        "router_gemm": 2 + len(ROUTE_HEADLINE_MODELS), "route": 1 + len(ROUTE_HEADLINE_MODELS)
    }  # fmt: skip
    for name in ROUTE_HEADLINE_MODELS:
        assert sum(name in shape.models for shape in all_shapes(Options())) == 2
    assert sum(AWKWARD in shape.models for shape in all_shapes(Options())) == 3
    assert names(all_shapes(Options(quick=True))) == [
        *[("router_gemm", AWKWARD)] * 2, ("router_gemm", "gpt-oss-120b"), ("route", AWKWARD), ("route", "gpt-oss-120b")
    ]  # fmt: skip


def test_all_is_every_preset_and_names_are_those_alone():
    everything = all_shapes(Options(models=("all",)))
    for operation in ("router_gemm", "route"):
        covered = [model for shape in everything if shape.operation == operation for model in shape.models]
        assert sorted(covered) == sorted([*models, *[AWKWARD] * (2 if operation == "router_gemm" else 1)])
    assert names(all_shapes(Options(models=("awkward",), operations=("route",)))) == [("route", AWKWARD)]
    for name in models:
        found = all_shapes(Options(models=(name,)))
        assert [(shape.operation, name in shape.models) for shape in found] == [("router_gemm", True), ("route", True)]


def test_awkward_sizes_are_multiples_of_no_tile():
    for shape in plan.AWKWARD_SHAPES:
        assert shape.hidden % 8 == 0
        assert shape.hidden % 16
        assert shape.experts % 16
        assert shape.bias
    assert any(shape.experts % 4 for shape in plan.AWKWARD_SHAPES)
    # The kernels with large tiles want 16 units of K, weights [hidden, experts] experts in eights.
    assert any(shape.hidden > 960 and shape.hidden % 64 and shape.experts % 8 == 0 for shape in plan.AWKWARD_SHAPES)


def test_every_implementation_runs_on_a_gpu_and_xla_alone_without(on_hopper, monkeypatch):
    found, refused = subjects(Options(models=("Kimi-K2",)), on_hopper)
    assert [(each.implementation, each.operation) for each in found] == [
        (name, operation) for name in IMPLEMENTATIONS for operation in ("router_gemm", "route")
    ]
    assert refused == {}
    quick, _ = subjects(Options(models=("Kimi-K2",), quick=True), on_hopper)
    assert {each.implementation for each in quick} == {"cuda"}, "one is what a minute is enough for"
    monkeypatch.undo()
    found, refused = subjects(Options(models=("Kimi-K2",)), CPU)
    assert {each.implementation for each in found} == {"xla"}
    assert refused == {}


def with_float32(options: Options, device) -> list[tuple[str, ...]]:
    """The subjects whose weight is float32: implementation, operation, model, dtype of x."""
    found, _ = subjects(options, device)
    wide = [each for each in found if each.problem(1).weight_dtype == "float32" or each.dtype == "float32"]
    assert all(each.multiplied == "float32" for each in wide)
    return [(each.implementation, each.operation, each.shape.models[0], each.dtype) for each in wide]


def test_float32_weights_are_verified_with_cuda(on_hopper):
    minimax = [("cuda", operation, "MiniMax-M2", "bfloat16") for operation in ("router_gemm", "route")]
    awkward = [
        ("cuda", "router_gemm", AWKWARD, "float32"),
        *[("cuda", "route", AWKWARD, dtype) for dtype in ("bfloat16", "float32")],
    ]
    deepseek = [("cuda", operation, "DeepSeek-V3", "bfloat16") for operation in ("router_gemm", "route")]
    ernie = [("cuda", operation, "ERNIE-4.5-21B-A3B", "float32") for operation in ("router_gemm", "route")]
    assert with_float32(Options(), on_hopper) == [*minimax, *awkward]
    assert with_float32(Options(operations=("route",)), on_hopper) == [*minimax[1:], *awkward[1:]]
    assert with_float32(Options(models=("MiniMax-M2",)), on_hopper) == minimax
    assert with_float32(Options(models=("awkward", "DeepSeek-V3")), on_hopper) == [*deepseek, *awkward]
    assert with_float32(Options(models=("all",)), on_hopper) == [*deepseek, *minimax, *ernie, *awkward]
    assert with_float32(Options(("pallas", "xla")), on_hopper) == []
    assert with_float32(Options(), CPU) == []


def test_a_run_verifies_each_operation_with_float32_weights_beside_each_dtype_of_x(on_hopper):
    assert {(operation, dtype) for _, operation, _, dtype in with_float32(Options(), on_hopper)} == set(
        itertools.product(("router_gemm", "route"), ("bfloat16", "float32"))
    )


def test_float32_weights_take_a_sixth_of_a_run_and_nothing_of_a_quick_one(on_hopper):
    assert with_float32(Options(quick=True), on_hopper) == []
    assert len(with_float32(Options(quick=True, models=("MiniMax-M2",)), on_hopper)) == 2
    assert len(with_float32(Options(), on_hopper)) / len(subjects(Options(), on_hopper)[0]) < 1 / 6


def test_subjects_with_float32_weights_have_both_layouts_and_their_dtypes(on_hopper):
    for subject in subjects(Options(("cuda",), models=("MiniMax-M2", "awkward")), on_hopper)[0]:
        if subject.multiplied != "float32":
            continue
        for kind in subject.kinds:
            operands = draw(subject, kind, 4, 0)
            assert (operands.x.dtype.name, operands.weight.dtype.name) == (subject.dtype, "float32")
            assert operands.bias is None or operands.bias.dtype.name == subject.dtype
        other = data.in_other_layout(subject, on_hopper)
        assert draw(other, "normal", 4, 0).weight.shape == (subject.shape.hidden, subject.shape.experts)
        assert judge.accumulation(subject, "normal", "gpu") == parity.split_tree(subject.shape.hidden)
        assert judge.accumulation(subject, data.ONE_PRODUCT, "gpu") == parity.split_tree(1)
        dtypes = (subject.dtype, None if subject.dtype == "float32" else "float32")
        assert (describe(subject)["dtype"], describe(subject)["weight_dtype"]) == dtypes
        near = draw(subject, "near ties", 4, 0).weight
        spacings = abs(near[1::3] - near[0:-1:3]) / np.spacing(abs(near[0:-1:3]))
        assert (spacings.max(-1) == 1).all()


def test_what_cannot_run_is_refused_with_the_reason(on_hopper, monkeypatch):
    monkeypatch.setattr(cuda, "unavailable", lambda: "has no compiler")
    found, refused = subjects(Options(models=("awkward",)), on_hopper)
    assert {each.implementation for each in found} == {"pallas", "xla"}
    assert refused == {"cuda": "has no compiler"}
    monkeypatch.undo()
    found, refused = subjects(Options(("pallas", "cuda")), CPU)
    assert found == []
    assert set(refused) == {"pallas", "cuda"}
    assert "cpu" in refused["cuda"]


def checkpoint(folder, *, dtype, layers=3, model_type="gpt_oss"):
    pytest.importorskip("safetensors")
    from test_checkpoint_files import CONFIG, EXPERTS, HIDDEN, write

    random = np.random.default_rng(0)
    tensors = {}
    for layer in range(layers):
        name = f"model.layers.{layer}.mlp.router"
        tensors[f"{name}.weight"] = random.normal(size=(EXPERTS, HIDDEN)).astype(dtype)
        tensors[f"{name}.bias"] = random.normal(size=EXPERTS).astype(dtype)
    return write(folder, {"model.safetensors": tensors}, {**CONFIG, "model_type": model_type}), tensors


def test_the_first_and_the_last_router_of_a_checkpoint_are_verified(tmp_path):
    folder, tensors = checkpoint(tmp_path, dtype=ml_dtypes.bfloat16)
    np.save(tmp_path / "x.npy", np.ones((5, 16), np.float32))
    found, _ = subjects(Options(checkpoint=str(folder), activations=str(tmp_path / "x.npy")), CPU)
    routers = ["model.layers.0.mlp.router", "model.layers.2.mlp.router"]
    assert sorted((each.operation, each.shape.models) for each in found) == [
        (operation, (name,)) for operation in ("route", "router_gemm") for name in routers
    ]
    for subject in found:
        name = subject.shape.models[0]
        assert np.array_equal(subject.given.weight, tensors[f"{name}.weight"])
        assert np.array_equal(subject.given.bias, tensors[f"{name}.bias"])
        assert subject.source == f"checkpoint {folder}"
        assert (draw(subject, "as given", 3, 0).x == 1).all()
        assert (subject.spec is None) == (subject.operation == "router_gemm")
    only, _ = subjects(Options(checkpoint=str(folder), operations=("route",)), CPU)
    assert {each.operation for each in only} == {"route"}


def test_a_checkpoint_in_float32_is_rounded_for_pallas_alone_and_has_x_in_bfloat16_with_cuda(tmp_path, on_hopper):
    folder, tensors = checkpoint(tmp_path, dtype=np.float32, layers=1)
    found, refused = subjects(Options(checkpoint=str(folder)), on_hopper)
    assert refused == {}
    stored = tensors["model.layers.0.mlp.router.weight"]
    for subject in found:
        if subject.implementation != "pallas":
            assert (subject.multiplied, subject.source) == ("float32", f"checkpoint {folder}")
            assert np.array_equal(subject.given.weight, stored)
        else:
            assert (subject.multiplied, subject.source) == ("bfloat16", f"checkpoint {folder}, in bfloat16")
            assert np.array_equal(subject.given.weight, stored.astype(ml_dtypes.bfloat16))
        operands = draw(subject, "as given", 2, 0)
        assert (operands.x.dtype.name, operands.weight.dtype.name) == (subject.dtype, subject.multiplied)
    of_each = [("cuda", "float32"), ("cuda", "bfloat16"), ("pallas", "bfloat16"), ("xla", "float32")]
    expected = {(name, dtype, operation) for name, dtype in of_each for operation in ("router_gemm", "route")}
    assert {(each.implementation, each.dtype, each.operation) for each in found} == expected
    assert len(found) == len(expected)


def test_checks_run_in_their_order_and_each_once():
    assert list(checks_of(Options())) == [name for name in CHECKS if name != "experts"]
    assert list(checks_of(Options(checks=("load", "experts")))) == ["experts", "load"]
    assert list(checks_of(Options(checks=("experts", "accuracy")))) == ["accuracy"]


def test_a_subject_is_described_by_what_a_record_has():
    found, _ = subjects(Options(models=("DeepSeek-V3",)), CPU)
    described = [describe(subject) for subject in found]
    assert described[1] == {
        "operation": "route", "implementation": "xla", "models": list(found[1].shape.models), "source": "random",
        "hidden": 7168, "experts": 256, "bias": False, "dtype": "bfloat16", "weight_dtype": None,
        "out_dtype": "float32", "rule": found[1].shape.rule,
    }  # fmt: skip
    assert described[1]["rule"]["correction_bias"]
    assert described[0]["rule"] is None


def replayed(subject: Subject, options: Options, device) -> list[Subject]:
    """The subjects that run again for a case of this one: as `command.read_case` asks for them."""
    return subjects(
        dataclasses.replace(
            options, implementations=(subject.implementation,), operations=(subject.operation,),
            models=() if options.checkpoint else subject.shape.models[:1],
            subject=json.loads(json.dumps(describe(subject))),
        ),
        device,
    )[0]  # fmt: skip


def test_one_subject_alone_is_told_from_its_siblings(on_hopper):
    options = Options(models=("all",))
    found, _ = subjects(options, on_hopper)
    for subject in found:
        assert replayed(subject, options, on_hopper) == [subject], subject.label


def test_one_router_of_a_checkpoint_is_told_from_its_siblings(tmp_path, on_hopper):
    folder, _ = checkpoint(tmp_path, dtype=np.float32)
    options = Options(checkpoint=str(folder))
    found, _ = subjects(options, on_hopper)
    for subject in found:
        assert [describe(each) for each in replayed(subject, options, on_hopper)] == [describe(subject)]


def test_a_subject_that_is_not_verified_any_more_is_refused(on_hopper, monkeypatch):
    [subject] = subjects(Options(("cuda",), ("route",), ("gpt-oss-120b",)), on_hopper)[0]
    gone = dataclasses.replace(subject, shape=dataclasses.replace(subject.shape, experts=120))
    with pytest.raises(ValueError, match=r"^subject is route of 2880x120 \+bias of gpt-oss-120b.*, random\. Expected"):
        replayed(gone, Options(), on_hopper)
    monkeypatch.setattr(cuda, "unavailable", lambda: "has no compiler")
    assert subjects(Options(("cuda",), subject=describe(subject)), on_hopper) == ([], {"cuda": "has no compiler"})


# What XLA is given for a GPU, seen without one.


def of_cuda(operands, *, return_logits=False):
    return (cuda.router_gemm(operands.x, operands.weight, operands.bias, out_dtype=jnp.float32),)


def custom_calls(text: str, target: str) -> list[str]:
    return re.findall(rf"custom_call @{target}\(.*", text)


def aliases(call: str) -> list[tuple[int, int]]:
    """(result, operand) of each alias; a single result has no index."""
    found = re.findall(r"output_tuple_indices = \[(\d*)\],\s*operand_index = (\d+)", call)
    return [(int(result or 0), int(operand)) for result, operand in found]


def test_the_neighbours_write_into_the_buffers_of_what_they_surround():
    subject = Subject("cuda", dataclasses.replace(GEMM, hidden=256), function=of_cuda)
    text = neighbours.trace_between(subject, 16).lower(lowering_platforms=("cuda",)).as_text()
    produce, consume = (custom_calls(text, name) for name in (gpu_tools.PRODUCE, gpu_tools.CONSUME))
    assert len(produce) == len(consume) == neighbours.CALLS
    assert len(custom_calls(text, cuda.TARGET)) == 1  # in a function
    assert len(re.findall(r"= call @", text)) == neighbours.CALLS  # that is called
    for call in produce:  # operands wrong, three buffers, three sources
        assert aliases(call) == [(0, 1), (1, 2), (2, 3)]
        assert "has_side_effect = true" in call
    for launch, call in enumerate(consume):  # operands wrong, the logits, what is expected of them
        assert aliases(call) == [(0, 0), (1, 1)]
        assert "has_side_effect = true" in call
        assert f"launch = {launch} : i32" in call


def test_a_chain_is_compared_by_one_kernel_on_a_gpu():
    def differing(outputs, expected):
        return load._differing(outputs, expected, OnGpu(CPU))

    outputs = [(jax.ShapeDtypeStruct((8, 4), jnp.float32), jax.ShapeDtypeStruct((8, 4), jnp.int32))] * 3
    text = jax.jit(differing).trace(outputs, outputs).lower(lowering_platforms=("cuda",)).as_text()
    [call] = custom_calls(text, gpu_tools.FIND_DIFFERING)
    assert "-> tensor<6x4xui32>" in call
    assert call.count("tensor<8x4xf32>") == call.count("tensor<8x4xi32>") == 6


def test_neighbours_need_a_gpu_and_bits_to_compare():
    for subject, where, reason in (
        (Subject("cuda", GEMM), Context(CPU), "there is no GPU"),
        (Subject("xla", GEMM), OnGpu(CPU), "xla promises no bits to compare"),
    ):
        result = neighbours.check_neighbours(subject, where)
        assert (result.passed, result.reason) == (None, reason)


@pytest.fixture
def between(monkeypatch):
    """Check "neighbours" with late words in these blocks of launches, and words that are wrong after a wait in those.

    Blocks count on over the numbers of tokens.
    """

    def check(late, waited, **changes):
        monkeypatch.setattr(gpu_tools, "loaded", lambda: None)
        where, executions = OnGpu(CPU, **changes), iter(range(1000))

        class Between:
            def as_text(self):
                return ""

            def __call__(self, wrong, buffers, sources, expected):
                block = next(executions) // neighbours.READ_EVERY
                found = [3 * (block in waited), 96 * (block in late), 7, 0, 12 * GEMM.experts, 1, 2, 0]
                return jnp.array(found, jnp.uint32), buffers

        def call(operands):
            return (jnp.zeros((len(operands.x), GEMM.experts)),)

        for tokens in where.tokens:
            where.ahead({("call", tokens): lambda: call, ("between", tokens): Between})
        with jax.default_device(CPU):
            return neighbours.check_neighbours(Subject("cuda", GEMM), where)

    return check


@pytest.mark.parametrize(
    ("quick", "late", "waited", "passed", "blocks"),
    [
        (False, (), (), True, 25),
        (False, (24,), (), None, 25),
        (False, range(0, 16, 2), (), None, 25),  # 8 of 25
        (False, range(0, 18, 2), (), False, 17),
        (True, (0, 4), (), None, 5),
        (True, (0, 3, 4), (), False, 5),
        (False, (), (6,), False, 7),
    ],
)
def test_late_words_are_a_fault_in_many_blocks_and_no_pass_in_some(between, quick, late, waited, passed, blocks):
    result = between(late, waited, quick=quick, tokens=(8,))
    assert (result.passed, result.launches) == (passed, blocks * neighbours.BLOCK)
    if passed is not False:
        assert result.figures == {"late_blocks": len(late), "blocks": blocks}
    if passed is None:
        assert f" in {len(late)} of {blocks} times 240 launches, where 0 pass and " in result.reason
    elif not passed:
        who = "threads that waited" if waited else "a warp that did not wait"
        assert result.reason.startswith(who)
        assert result.reason.endswith(f"in {len(late)} of {blocks} times 240")
        assert (result.failure.row, result.failure.launch) == (12, (blocks - 1) * neighbours.BLOCK + 7)


@pytest.mark.parametrize("late", [(1, 3), (1, 3, 7), (3, 6, 8)])  # five blocks of 8 tokens, then five of 16
def test_late_words_with_any_number_of_tokens_are_no_pass(between, late):
    result = between(late, (), quick=True, tokens=(8, 16))
    assert (result.passed, result.launches) == (None, 10 * neighbours.BLOCK)
    assert result.figures == {"late_blocks": 2, "blocks": 5}, "the most of one number of tokens"
    assert " in 2 of 5 times 240 launches" in result.reason
