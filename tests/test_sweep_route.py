"""`route` in the sweep: its points, the check before the clock, PyTorch's peers, the table and the bars."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic_rows
from test_timing import operands

from jax_router import dispatch, sweep_run, timing, timing_launcher, timing_torch
from jax_router import parity_routing as judged
from jax_router.models import models
from jax_router.routing import RoutingSpec
from jax_router.sweep_points import (
    BOTH,
    COMPILED_PEER,
    MODELS,
    ROUTE_CHAIN_TOKENS,
    ROUTE_FEW_TOKENS,
    ROUTE_HEADLINE_MODELS,
    ROUTE_PEERS,
    SPARSE_TOKENS,
    Point,
    Shape,
    points,
    route_shapes,
    rule_key,
    spec_of,
)
from jax_router.sweep_route import RouteData, route_calls, to_bfloat16
from jax_router.sweep_rows import RowsWriter, key, read_rows, shape_of

ON_GPU = {"gpu": True, "torch_gpu": True}
ROUTE = {"only_operations": ["route"]}
GROUPED = RoutingSpec(4, "sigmoid", renormalize=True, scaling_factor=2.5, num_groups=4, group_topk=2, masked_choice=0.0)
SPECS = [
    (RoutingSpec(4, "softmax_topk"), False),
    (RoutingSpec(4, "softmax", renormalize=True, renormalize_min=1e-12), False),
    (GROUPED, True),
    (RoutingSpec(4, "softmax", scaling_factor=16.0, num_groups=4, group_topk=2, group_score="max"), False),
    (RoutingSpec(4, "sqrtsoftplus", renormalize=True, renormalize_epsilon=1e-20), True),
    (RoutingSpec(2, "sigmoid", select_on="logits"), True),
    (RoutingSpec(4, "softmax", scaling_factor=6.0), True),
]
every_spec = pytest.mark.parametrize(("spec", "corrected"), SPECS, ids=lambda value: str(value)[12:-1])
needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")
WALL = (("wall", "warm"),)


def small(spec: RoutingSpec = GROUPED, corrected: bool = True) -> Shape:
    return Shape(64, 16, True, ("small",), spec, corrected)


def data_of(spec: RoutingSpec = GROUPED, corrected: bool = True, tokens: tuple[int, ...] = (2, 64)) -> RouteData:
    return RouteData(small(spec, corrected), tokens, jax.devices("cpu")[0])


def routed(data: RouteData, tokens: int = 64) -> tuple[np.ndarray, np.ndarray]:
    arguments = data.operands(tokens)
    return jax.device_get(jax.jit(route_calls(data.spec)["xla"])(arguments.x, arguments.weights[0], arguments.bias))


# Points ----------------------------------------------------------------------------------------------------------


def test_every_model_is_routed_by_its_own_rule() -> None:
    found = route_shapes()
    assert sorted(name for shape in found for name in shape.models) == sorted(MODELS)
    every = route_shapes(models)
    assert sorted(name for shape in every for name in shape.models) == sorted(models)
    assert [shape.models[0] for shape in found[:3]] == list(ROUTE_HEADLINE_MODELS)
    for shape in every:
        for name in shape.models:
            assert (shape.spec, shape.hidden, shape.experts) == (
                models[name].spec,
                models[name].hidden,
                models[name].experts,
            )
    corrected = {name for shape in every for name in shape.models if shape.correction_bias}
    assert {"DeepSeek-V3", "Kimi-K2", "GLM-4.5", "GLM-4.5-Air", "MiniMax-M2"} <= corrected
    assert corrected.isdisjoint({"gpt-oss-120b", "Qwen3-235B-A22B", "Mixtral-8x7B", "Llama-4-Maverick"})


def test_headline_suite_covers_the_bars_of_route() -> None:
    found = points("headline", **ON_GPU, **ROUTE)
    for shape in route_shapes():
        of_shape = [point for point in found if point.shape == shape]
        tokens = {point.tokens for point in of_shape}
        assert tokens == set(SPARSE_TOKENS if shape.headline else ROUTE_FEW_TOKENS)
        for count in tokens:
            candidates = {point.candidate: point.measurements for point in of_shape if point.tokens == count}
            assert {"cuda", "pallas", "xla"} <= set(candidates)
            assert ("torch_route" in candidates) == shape.headline
            assert (COMPILED_PEER in candidates) == (shape.headline and count in ROUTE_FEW_TOKENS)
            replayed = {name for name in candidates if ("graph_replay", "cold") in candidates[name]}
            assert replayed == {"cuda"}
            with_chain = shape.headline and count in ROUTE_CHAIN_TOKENS
            for name in ("cuda", "pallas", "xla", "no_routing"):
                chains = {("chain_slope", weights) for weights in BOTH} & set(candidates.get(name, ()))
                assert len(chains) == (2 if with_chain else 0)
    keys = [point.key(*each) for point in points("headline", **ON_GPU) for each in point.measurements]
    assert len(set(keys)) == len(keys)


def test_full_suite_has_every_route_of_the_others() -> None:
    def keys(suite: str) -> set[Any]:
        return {point.key(*each) for point in points(suite, **ON_GPU, **ROUTE) for each in point.measurements}

    assert keys("quick") < keys("headline") < keys("full")
    assert {point.shape.operation for point in points("headline", **ON_GPU, **ROUTE)} == {"route"}


def test_without_a_gpu_the_headline_models_are_routed_by_xla() -> None:
    found = points("quick", gpu=False, torch_gpu=False, **ROUTE)
    names = {(point.candidate, point.shape.models[0]) for point in found}
    assert names == {("xla", name) for name in ROUTE_HEADLINE_MODELS}
    assert {each for point in found for each in point.measurements} == set(WALL)


@every_spec
def test_a_rule_survives_its_row(spec: RoutingSpec, corrected: bool) -> None:
    shape = small(spec, corrected)
    point = Point(shape, 8, "cuda", ())
    row = synthetic_rows.row(point, "cupti", "warm")
    assert shape_of(row) == shape
    assert key(row) == point.key("cupti", "warm")
    assert spec_of(rule_key(shape.rule)) == spec
    other = Point(small(spec, not corrected), 8, "cuda", ())
    assert other.key("cupti", "warm") != point.key("cupti", "warm")


# Checks come before times ----------------------------------------------------------------------------------------


@every_spec
def test_the_specification_passes_its_check(spec: RoutingSpec, corrected: bool) -> None:
    data = data_of(spec, corrected)
    _, experts = routed(data)
    result = data.check("xla", routed(data))
    assert result["passed"], result
    assert len({tuple(sorted(row)) for row in experts.tolist()}) > 4, "the correction bias alone decides"
    assert result["rows"] == 64
    assert 0 < result["worst_error"] < 1
    assert (data.correction is not None) == corrected
    if corrected:
        assert (data.correction != 0).all()
        without = judged.exact_choice(data._truth.logits, None, spec, to_bfloat16)
        moved = judged.exact_choice(data._truth.logits, data.correction, spec, to_bfloat16)
        assert (judged._best(without, spec.top_k) != judged._best(moved, spec.top_k)).any()


@every_spec
def test_wrong_experts_and_wrong_weights_fail_their_check(spec: RoutingSpec, corrected: bool) -> None:
    data = data_of(spec, corrected)
    weights, experts = routed(data)
    choice = judged.exact_choice(data._truth.logits, data.correction, spec, to_bfloat16)
    wrong = experts.copy()
    wrong[5, 0] = choice[5].argmin()
    result = data.check("xla", (weights, wrong))
    assert not result["passed"]
    assert "row 5 has experts" in result["reason"]
    heavier = weights.copy()
    heavier[7, 1] *= 1.001
    result = data.check("xla", (heavier, experts))
    assert not result["passed"]
    assert re.search(r"row 7 has weight \S+ for expert \d+ instead of \S+ \(1 of ", result["reason"])
    unknown = experts.copy()
    unknown[3, 1] = 16
    assert "row 3 has experts" in data.check("xla", (weights, unknown))["reason"]


def test_a_row_of_other_bits_in_another_batch_fails() -> None:
    data = data_of()

    class FakeGpu:
        platform = "gpu"

    weights, experts = routed(data)
    data.device = FakeGpu()  # type: ignore[assignment]  # the promise holds there
    assert data.check("cuda", (weights[:2], experts[:2]))["passed"]
    assert data.check("cuda", (weights, experts))["passed"]
    weights = weights.copy()
    weights[1, 2] = np.nextafter(weights[1, 2], np.float32(9))
    assert data.check("xla", (weights, experts))["passed"]
    result = data.check("cuda", (weights, experts))
    assert not result["passed"]
    assert "row 1 has other bits" in result["reason"]


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[sweep_run.Runner]:
    writer = RowsWriter(tmp_path / "rows.jsonl")
    yield sweep_run.Runner(writer, provenance={"gpu": None}, device=jax.devices("cpu")[0])
    writer.close()


def test_a_route_that_fails_its_check_is_not_timed(runner: sweep_run.Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(spec: RoutingSpec) -> dict[str, Any]:
        def call(x: jax.Array, weight: jax.Array, biases: Any) -> tuple[jax.Array, jax.Array]:
            weights, experts = route_calls(spec)["xla"](x, weight, biases)
            return weights, experts if x.shape[0] == 2 else experts.at[5, 0].set(experts[5, 1])

        return {"xla": call}

    monkeypatch.setattr(sweep_run, "route_calls", wrong)
    runner.run([Point(small(), tokens, "xla", WALL) for tokens in (2, 8)])
    rows = read_rows(runner.writer.path)
    assert [(row["tokens"], row["method"], row["status"]) for row in rows] == [
        (2, "check", "ok"),
        (2, "wall", "ok"),
        (8, "check", "failed"),
    ]
    assert {row["operation"] for row in rows} == {"route"}
    assert rows[0]["rule"]["num_groups"] == 4
    assert "row 5 has experts" in rows[-1]["reason"]


@pytest.mark.parametrize(("part", "status"), [(None, "ok"), (0, "failed"), (1, "failed")])
def test_a_replay_of_routing_that_leaves_other_results_fails(
    part: int | None, status: str, runner: sweep_run.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def replay(operands: timing.Operands, out: Any, spec: RoutingSpec, *, weights: str) -> timing.Samples:
        call = jax.jit(route_calls(spec)["xla"])
        results = [np.array(result) for result in call(operands.x, operands.weights[0], operands.bias)]
        if part is not None:
            results[part][1, 2] += 1
        for buffer, result in zip(out, results, strict=False):  # as a kernel does, behind JAX's back
            ctypes.memmove(buffer.unsafe_buffer_pointer(), result.ctypes.data, result.nbytes)
        return timing.Samples("graph_replay", weights, (1.0,), 1, "")

    monkeypatch.setattr(timing_launcher, "route_replay", replay)
    runner.run([Point(small(), 4, "xla", (("graph_replay", "cold"), *WALL))])
    rows = read_rows(runner.writer.path)
    assert [(row["method"], row["status"]) for row in rows] == [
        ("check", "ok"),
        ("graph_replay", status),
        ("wall", "ok"),
    ]
    assert ("other bits" in rows[1].get("reason", "")) == (status == "failed")


def test_an_implementation_that_does_not_take_the_rule_is_skipped_with_its_reason(
    runner: sweep_run.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def refuse(problem: dispatch.Problem, device: dispatch.Device, name: str) -> str:
        seen.append(problem)
        return "takes no groups"

    monkeypatch.setattr(dispatch, "why_unsupported", refuse)
    runner.run([Point(small(), 2, "cuda", WALL)])
    (row,) = read_rows(runner.writer.path)
    assert (row["status"], row["reason"]) == ("skipped", "takes no groups")
    assert seen[0].spec == GROUPED


# The chain -------------------------------------------------------------------------------------------------------


def test_a_chain_of_routings_needs_every_result_of_the_one_before() -> None:
    def call(x: jax.Array, weight: jax.Array, biases: Any) -> tuple[jax.Array, jax.Array]:
        weights, experts = route_calls(RoutingSpec(2, "sigmoid"))["xla"](x, weight, biases)
        return weights, experts

    data = operands(copies=3)
    arguments = data.x, data.weights, (data.bias, None)
    assert np.array_equal(timing.chain(call)(*arguments), data.x)
    hlo = timing.chain(call).lower(*arguments).as_text()
    barriers = re.findall(r"optimization_barrier %\S+, %\S+ : tensor<(\w+)>, tensor<(\w+)>", hlo)
    assert barriers.count(("4x2xf32", "4x2xi32")) == 3, hlo
    # Both reach x: without either, XLA could leave its part of the work out.
    for part in (0, 1):

        def broken(*operands: Any, part: int = part) -> tuple[jax.Array, ...]:
            results = [result.astype(jnp.float32) for result in call(*operands)]
            results[part] += jnp.nan
            return tuple(results)

        assert np.isnan(np.asarray(timing.chain(broken)(*arguments)).astype(np.float32)).all()


# PyTorch ---------------------------------------------------------------------------------------------------------


@needs_torch
@every_spec
def test_the_pytorch_peer_follows_the_rule(spec: RoutingSpec, corrected: bool) -> None:
    import torch

    data = data_of(spec, corrected)
    x, weights, biases = timing_torch.as_torch(torch, data.operands(64))
    in_float32 = x.float(), weights[0].float(), (biases[0].float(), biases[1])
    results = timing_torch.route_operator(torch, spec)(*in_float32)
    assert data.check("xla", tuple(result.numpy() for result in results))["passed"]
    rounded = tuple(result.numpy() for result in timing_torch.route_operator(torch, spec)(x, weights[0], biases))
    assert data.check("torch_route", rounded)["passed"]
    assert not data.check("xla", rounded)["passed"]
    other = RoutingSpec(spec.top_k, "sqrtsoftplus" if spec.score_function != "sqrtsoftplus" else "sigmoid", True)
    wrong = tuple(result.numpy() for result in timing_torch.route_operator(torch, other)(x, weights[0], biases))
    assert not data.check("torch_route", wrong)["passed"]


@needs_torch
def test_the_compiled_peer_is_compiled_anew_for_every_point() -> None:
    import torch

    traced = []

    def backend(module: Any, inputs: Any) -> Any:
        traced.append(tuple(inputs[0].shape))
        return module.forward

    original = torch.compile
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: original(function, backend=backend, **options))
        for tokens in range(2, 13):  # more than PyTorch compiles of one function
            x, weight = torch.ones(tokens, 8), torch.eye(4, 8)
            operator = timing_torch.route_operator(torch, RoutingSpec(2, "softmax_topk"), compiled=True)
            eager = timing_torch.route_operator(torch, RoutingSpec(2, "softmax_topk"))(x, weight, (None, None))
            for result, expected in zip(operator(x, weight, (None, None)), eager, strict=True):
                assert torch.equal(result, expected)
    assert len(traced) == 11


def test_a_peer_that_cannot_be_compiled_here_is_skipped_and_a_broken_one_fails(
    runner: sweep_run.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("no Python.h")

    monkeypatch.setattr(runner, "_of_peer", broken)
    monkeypatch.setattr(RouteData, "peer", lambda *_: broken)
    runner.run([Point(small(), 2, name, (("torch_replay", "warm"),)) for name in ROUTE_PEERS])
    rows = read_rows(runner.writer.path)
    status = {row["candidate"]: row["status"] for row in rows}
    assert status == {"torch_route": "failed", COMPILED_PEER: "skipped"}
    assert rows[1]["reason"] == "PyTorch cannot compile it on this machine: RuntimeError: no Python.h"


# On the GPU ------------------------------------------------------------------------------------------------------


def test_gpu_route_is_checked_and_timed_beside_pytorch(gpu: jax.Device, tmp_path: Path) -> None:
    import torch

    kernels, launches, replays, chains = (
        tuple((each, state) for state in BOTH) for each in ("cupti", "graph_replay", "torch_replay", "chain_slope")
    )
    shape = Shape(2048, 64, False, ("small",), GROUPED, True)
    todo = [
        *(Point(shape, 16, peer, replays) for peer in ROUTE_PEERS),
        *(
            Point(shape, 16, name, (*(launches if name == "cuda" else ()), *chains, *kernels))
            for name in dispatch.IMPLEMENTATIONS
        ),
        Point(shape, 16, "no_routing", chains),
    ]
    writer = RowsWriter(tmp_path / "rows.jsonl")
    runner = sweep_run.Runner(writer, provenance={}, device=gpu, torch=torch)
    runner.run(todo)
    writer.close()
    rows = read_rows(writer.path)
    assert not runner.failed
    measured = {(row["candidate"], row["method"], row["weights"]) for row in rows if "samples_us" in row}
    skipped = {row["candidate"] for row in rows if row["status"] == "skipped"}
    expected = {
        (point.candidate, *each) for point in todo if point.candidate not in skipped for each in point.measurements
    }
    assert measured == expected
    assert not skipped & {"xla", "torch_route", "no_routing"}


def test_gpu_the_compiled_peer_agrees_with_the_eager_one(gpu: jax.Device) -> None:
    import torch

    data = RouteData(Shape(2048, 64, False, ("small",), GROUPED, True), (16,), gpu)
    x, weights, biases = timing_torch.as_torch(torch, data.operands(16))
    with torch.no_grad():
        for compiled in (False, True):
            results = timing_torch.route_operator(torch, GROUPED, compiled=compiled)(x, weights[0], biases)
            check = data.check("torch_route", tuple(result.cpu().numpy() for result in results))
            assert check["passed"], check
